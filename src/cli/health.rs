//! `health`: asks a daemon whether it is healthy. It serves container images that have no HTTP client of their own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio_rustls::rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use url::{Position, Url};

use super::{Exit, HealthArgs, error_text, print, print_error};
use crate::config::{MAX_CA_BYTES, read_regular};

/// For connection, request and response together; a healthy daemon needs a few milliseconds.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(3);
/// In bytes. The response of an unhealthy daemon names the few tasks that are stuck.
const MAX_RESPONSE: usize = 16 << 10;

pub(super) fn run(args: &HealthArgs) -> anyhow::Result<Exit> {
    let tls = client_config(args)?;
    let runtime = super::runtime()?;
    let response = runtime.block_on(async { timeout(RESPONSE_TIMEOUT, get(&args.url, tls)).await });
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
///
/// An image has one command for its health check, whether the daemon has TLS or not. If a port does not speak plain HTTP, the
/// request is sent again over TLS.
async fn get(url: &Url, tls: Arc<ClientConfig>) -> anyhow::Result<(bool, String)> {
    let host = url.host_str().context("the URL has no host")?;
    let host = host.trim_matches(['[', ']']);
    let port = url.port_or_known_default().context("the URL has no port")?;
    if url.scheme() == "http" {
        let response = exchange(url, TcpStream::connect((host, port)).await?).await;
        match response {
            Err(error) if error.is::<hyper::Error>() => {}
            response => return response,
        }
    }
    let name = ServerName::try_from(host.to_owned())?;
    let stream = TcpStream::connect((host, port)).await?;
    let stream = TlsConnector::from(tls).connect(name, stream).await;
    exchange(url, stream.context("TLS handshake failed")?).await
}

async fn exchange(
    url: &Url,
    stream: impl AsyncRead + AsyncWrite + Unpin,
) -> anyhow::Result<(bool, String)> {
    let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // HTTP/1.1 in origin form: path and query, without scheme and host.
    let request = Request::get(&url[Position::BeforePath..Position::AfterQuery])
        .header(
            header::HOST,
            &url[Position::BeforeHost..Position::AfterPort],
        )
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

/// Parses a URL with the scheme `http` or `https`.
pub(super) fn http_url(text: &str) -> Result<Url, String> {
    let url: Url = text.parse().map_err(|error| format!("{error}"))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        other => Err(format!(
            "the scheme {other} is not supported, use http or https"
        )),
    }
}

/// Accepts every certificate of the daemon. Presents the certificate of `--client-cert`, if there is one.
fn client_config(args: &HealthArgs) -> anyhow::Result<Arc<ClientConfig>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)));
    let config = match (&args.client_cert, &args.client_key) {
        (Some(certificate), Some(key)) => {
            let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem(certificate)?)
                .collect::<Result<_, _>>()
                .with_context(|| certificate.display().to_string())?;
            ensure!(
                !chain.is_empty(),
                "{} contains no PEM certificate",
                certificate.display()
            );
            let key_der = PrivateKeyDer::from_pem_slice(&pem(key)?)
                .with_context(|| key.display().to_string())?;
            builder
                .with_client_auth_cert(chain, key_der)
                .context("--client-cert and --client-key cannot be used together")?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(Arc::new(config))
}

fn pem(file: &Path) -> anyhow::Result<Vec<u8>> {
    read_regular(file, MAX_CA_BYTES).with_context(|| file.display().to_string())
}

/// The daemon's certificate is for the name that scrapers use, and not for the loopback address. There is nothing to protect:
/// the request has no secret, and the answer is one of health only.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
