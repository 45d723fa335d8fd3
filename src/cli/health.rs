//! `health`: asks a daemon whether it is healthy, for a container whose image has nothing else that could.

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

use super::{Exit, Health, complain, print};

/// For the whole answer; a healthy daemon needs a few milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);
/// An answer names the few tasks that are silent.
const LONGEST_ANSWER: usize = 16 << 10;

pub(super) fn run(args: &Health) -> anyhow::Result<Exit> {
    let runtime = super::runtime()?;
    let asked = runtime.block_on(async { timeout(PATIENCE, ask(&args.url)).await });
    runtime.shutdown_background();
    let asked = asked.unwrap_or_else(|_| anyhow::bail!("no answer within {PATIENCE:?}"));
    match asked.with_context(|| args.url.to_string()) {
        Ok((true, said)) => {
            print(&said)?;
            Ok(Exit::Ok)
        }
        Ok((false, said)) => {
            complain(said.trim_end());
            Ok(Exit::Fault)
        }
        Err(error) => {
            complain(&super::report(&error));
            Ok(Exit::Fault)
        }
    }
}

/// Whether the answer was a good one, and its text.
async fn ask(url: &Url) -> anyhow::Result<(bool, String)> {
    let host = url.host_str().context("no host")?;
    let port = url.port_or_known_default().context("no port")?;
    let stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
    let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Path and query: what a server is asked for.
    let request = Request::get(&url[Position::BeforePath..Position::AfterQuery])
        .header(header::HOST, format!("{host}:{port}"))
        .body(Empty::<Bytes>::new())?;
    let answered = async {
        let answer = requests.send_request(request).await?;
        let good = answer.status().is_success();
        let body = Limited::new(answer.into_body(), LONGEST_ANSWER);
        let body = body.collect().await.map_err(anyhow::Error::from_boxed)?;
        let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        anyhow::Ok((good, text))
    };
    // The connection does the work; its own end is no news.
    tokio::select! {
        answered = answered => answered,
        Err(error) = connection => Err(error.into()),
    }
}

/// A URL of plain HTTP.
pub(super) fn plain_url(text: &str) -> Result<Url, String> {
    let url: Url = text.parse().map_err(|error| format!("{error}"))?;
    match url.scheme() {
        "http" => Ok(url),
        other => Err(format!("{other} is not supported, only http is")),
    }
}
