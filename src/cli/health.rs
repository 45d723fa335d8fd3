//! `health`: asks a daemon whether it is healthy. It serves container images that have no HTTP client of their own.

use std::time::Duration;

use anyhow::Context as _;
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use url::{Position, Url};

use super::{Exit, HealthArgs, error_text, print, print_error};

/// For connection, request and response together; a healthy daemon needs a few milliseconds.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(3);
/// In bytes. The response of an unhealthy daemon names the few tasks that are stuck.
const MAX_RESPONSE: usize = 16 << 10;

pub(super) fn run(args: &HealthArgs) -> anyhow::Result<Exit> {
    let runtime = super::runtime()?;
    let response = runtime.block_on(async { timeout(RESPONSE_TIMEOUT, get(&args.url)).await });
    runtime.shutdown_background();
    let response =
        response.unwrap_or_else(|_| anyhow::bail!("no answer within {RESPONSE_TIMEOUT:?}"));
    match response.with_context(|| args.url.to_string()) {
        Ok((true, text)) => {
            print(&text)?;
            Ok(Exit::Ok)
        }
        Ok((false, text)) => {
            print_error(text.trim_end());
            Ok(Exit::CanaryFailed)
        }
        Err(error) => {
            print_error(&error_text(&error));
            Ok(Exit::CanaryFailed)
        }
    }
}

/// Returns whether the status is a success, and the body.
async fn get(url: &Url) -> anyhow::Result<(bool, String)> {
    let host = url.host_str().context("the URL has no host")?;
    let port = url.port_or_known_default().context("the URL has no port")?;
    let stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
    let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // HTTP/1.1 in origin form: path and query, without scheme and host.
    let request = Request::get(&url[Position::BeforePath..Position::AfterQuery])
        .header(header::HOST, format!("{host}:{port}"))
        .body(Empty::<Bytes>::new())?;
    let response = async {
        let response = requests.send_request(request).await?;
        let success = response.status().is_success();
        let body = Limited::new(response.into_body(), MAX_RESPONSE);
        let body = body.collect().await.map_err(anyhow::Error::from_boxed)?;
        let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        anyhow::Ok((success, text))
    };
    // The request makes progress only while the connection is polled. A connection that ends well needs no handling: the
    // response is the result.
    tokio::select! {
        response = response => response,
        Err(error) = connection => Err(error.into()),
    }
}

/// Parses a URL with the scheme `http`.
pub(super) fn plain_url(text: &str) -> Result<Url, String> {
    let url: Url = text.parse().map_err(|error| format!("{error}"))?;
    match url.scheme() {
        "http" => Ok(url),
        other => Err(format!("the scheme {other} is not supported, use http")),
    }
}
