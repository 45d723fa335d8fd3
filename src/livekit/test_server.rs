//! Servers on 127.0.0.1 that send exactly what a test specifies, and certificates for them.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls_pki_types::PrivateKeyDer;
use tempfile::NamedTempFile;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{ServerConfig, crypto};
use url::Url;

use crate::livekit::wire::connect::Endpoint;
use crate::livekit::wire::request::HttpRejection;
use crate::livekit::wire::token::Keys;

/// A response that rejects an HTTP request, and the [`HttpRejection`] that is expected from it.
pub(crate) struct RejectionCase {
    pub answer: &'static str,
    pub status: u16,
    pub twirp_code: Option<&'static str>,
    pub message: &'static str,
    pub retry_after: Option<u64>,
}

impl RejectionCase {
    pub(crate) fn rejection(&self) -> HttpRejection {
        HttpRejection {
            status: self.status,
            twirp_code: self.twirp_code.map(str::to_owned),
            message: self.message.to_owned(),
            retry_after: self.retry_after.map(Duration::from_secs),
        }
    }
}

/// Rejections in the words of livekit-server, Twirp and proxies.
pub(crate) const REJECTIONS: [RejectionCase; 6] = [
    RejectionCase {
        answer: "HTTP/1.1 401 Unauthorized\r\nContent-Length: 26\r\n\r\ninvalid API key: some-key\r\n",
        status: 401,
        twirp_code: None,
        message: "invalid API key: [API key]",
        retry_after: None,
    },
    RejectionCase {
        answer: "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
        status: 403,
        twirp_code: None,
        message: "Forbidden",
        retry_after: None,
    },
    RejectionCase {
        answer: "HTTP/1.1 404 Not Found\r\nContent-Length: 58\r\n\r\n\
                 {\"code\":\"not_found\",\"msg\":\"requested room does not exist\"}",
        status: 404,
        twirp_code: Some("not_found"),
        message: "requested room does not exist",
        retry_after: None,
    },
    RejectionCase {
        answer: "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nTransfer-Encoding: chunked\r\n\r\n\
                 2d\r\n{\"code\":\"resource_exhausted\",\"msg\":\"too many \r\n\
                 a\r\nrequests\"}\r\n0\r\n\r\n",
        status: 429,
        twirp_code: Some("resource_exhausted"),
        message: "too many requests",
        retry_after: Some(7),
    },
    RejectionCase {
        answer: "HTTP/1.1 429 Too Many Requests\r\nRetry-After: Sun, 06 Nov 1994 08:49:37 GMT\r\n\
                 Connection: close\r\n\r\n<html><h1>Slow\n down</h1></html>",
        status: 429,
        twirp_code: None,
        message: "<html><h1>Slow down</h1></html>",
        retry_after: Some(0),
    },
    RejectionCase {
        answer: "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 43\r\n\r\n\
                 node has exceeded its configured limit\r\n\r\n\n",
        status: 503,
        twirp_code: None,
        message: "node has exceeded its configured limit",
        retry_after: None,
    },
];

/// A listening socket with one handler for all connections. Dropping it stops the server.
pub(crate) struct TestServer {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl TestServer {
    pub(crate) async fn start<F, Fut>(handle: F) -> Self
    where
        F: Fn(TcpStream) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(handle(stream));
            }
        });
        Self { address, task }
    }

    /// Answers every HTTP request with the same bytes, head and body in two segments.
    pub(crate) async fn answering(answer: &'static str) -> Self {
        Self::start(move |mut stream| async move {
            read_request(&mut stream).await;
            respond(&mut stream, answer).await;
        })
        .await
    }

    /// Rejects every HTTP request and quotes its `Authorization` header in the body.
    pub(crate) async fn quoting_the_token() -> Self {
        Self::start(|mut stream| async move {
            let head = read_request(&mut stream).await;
            let body = head
                .lines()
                .find(|line| line.starts_with("authorization: Bearer "))
                .unwrap();
            let answer = format!("HTTP/1.1 401 Unauthorized\r\n\r\ninvalid token, {body}, sorry");
            respond(&mut stream, &answer).await;
        })
        .await
    }

    /// Accepts connections and reads, but sends nothing.
    pub(crate) async fn silent() -> Self {
        Self::start(|mut stream| async move {
            let mut sink = [0; 1024];
            while matches!(stream.read(&mut sink).await, Ok(1..)) {}
        })
        .await
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        endpoint(&format!("ws://{}", self.address))
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reads a request with the body that `Content-Length` announces; returns the head.
pub(crate) async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(bytes).unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    head
}

pub(crate) async fn respond(stream: &mut (impl AsyncWrite + Unpin), answer: &str) {
    let (head, body) = answer.split_at(answer.find("\r\n\r\n").unwrap() + 4);
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    // Lets the client read the head before the body is sent.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    // The client may have closed the connection.
    stream.write_all(body.as_bytes()).await.ok();
    stream.shutdown().await.ok();
}

pub(crate) fn endpoint(url: &str) -> Endpoint {
    Endpoint::new(&Url::parse(url).unwrap(), None).unwrap()
}

pub(crate) const SECRET: &str = "a-secret-that-nobody-may-see";

pub(crate) fn keys() -> Keys {
    Keys::new("some-key", SECRET).unwrap()
}

/// A private certificate authority.
pub(crate) struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    /// The authority's certificate, for `ca_file`.
    pub pem: NamedTempFile,
}

impl TestCa {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        let pem = NamedTempFile::new().unwrap();
        std::fs::write(pem.path(), certificate.pem()).unwrap();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// A TLS acceptor whose certificate is for `name`, valid until the end of `year`.
    pub(crate) fn acceptor(&self, name: &str, year: i32) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 12, 31);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            )
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    /// A TLS server with a certificate for `name`, which answers one request.
    pub(crate) async fn server(&self, name: &str, year: i32, answer: &'static str) -> TestServer {
        let acceptor = self.acceptor(name, year);
        TestServer::start(move |stream| {
            let acceptor = acceptor.clone();
            async move {
                // A client that does not trust the certificate aborts the handshake.
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    read_request(&mut stream).await;
                    respond(&mut stream, answer).await;
                }
            }
        })
        .await
    }
}
