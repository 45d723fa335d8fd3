//! One way to a LiveKit host: DNS, TCP, then TLS for `wss`/`https`, each failure named by its stage.
//!
//! The signal socket and the server API both open their connections here, so that a host that can't be reached is
//! told from a request that was refused. What is said over a connection is [`super::request`]'s.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsConnector, rustls};
use url::{Host, Url};

pub use super::request::Refusal;

/// A LiveKit host and how to trust it. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint {
    pub(crate) url: Url,
    pub(crate) tls: Option<Arc<rustls::ClientConfig>>,
}

/// Why no connection came up, by stage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    #[error("DNS lookup of {host} failed: {error}")]
    Dns { host: String, error: String },
    #[error("TCP connection to {address} failed: {error}")]
    Tcp { address: String, error: String },
    #[error("TLS handshake with {host} failed: {error}")]
    Tls { host: String, error: String },
}

impl Endpoint {
    /// `ca_file` holds PEM certificates that are trusted besides the public roots, which are built in.
    ///
    /// # Errors
    /// A URL of another scheme or without a host; a `ca_file` that can't be read or holds no certificate.
    pub fn new(url: &Url, ca_file: Option<&Path>) -> anyhow::Result<Self> {
        let secure = match url.scheme() {
            "wss" | "https" => true,
            "ws" | "http" => false,
            other => bail!("scheme {other:?} is none of wss, ws, https, http"),
        };
        ensure!(url.host().is_some(), "the URL names no host");
        let roots = roots(ca_file)?;
        let tls = secure.then(|| client_config(roots)).transpose()?;
        let mut url = url.clone();
        // Credentials in the URL are no part of LiveKit's protocol, and must not reach an error text.
        url.set_username("").ok();
        url.set_password(None).ok();
        url.set_query(None);
        url.set_fragment(None);
        Ok(Self { url, tls })
    }

    /// Opens a connection: DNS, TCP, TLS. Until `deadline`, but always with the stage that it got stuck in.
    pub(crate) async fn connect(&self, deadline: Instant) -> Result<Stream, ConnectError> {
        let started = Instant::now();
        let addresses = self.resolve(started, deadline).await?;
        let tcp = self.dial(&addresses, deadline).await?;
        let (local, peer) = tcp
            .set_nodelay(true)
            .and_then(|()| Ok((tcp.local_addr()?, tcp.peer_addr()?)))
            .map_err(|error| ConnectError::Tcp {
                address: self.authority(),
                error: error.to_string(),
            })?;
        let io = match &self.tls {
            None => Io::Plain(tcp),
            Some(config) => Io::Tls(Box::new(self.secure(config, tcp, deadline).await?)),
        };
        Ok(Stream { local, peer, io })
    }

    /// The path of a request: `path` below the base path of the project's URL.
    pub(crate) fn target(&self, path: &str) -> String {
        format!("{}{path}", self.url.path().trim_end_matches('/'))
    }

    /// Host, and port where it isn't the scheme's own: the `Host` header.
    pub(crate) fn authority(&self) -> String {
        match self.url.port() {
            Some(port) => format!("{}:{port}", self.host()),
            None => self.host().to_owned(),
        }
    }

    fn host(&self) -> &str {
        self.url
            .host_str()
            .expect("an endpoint's URL has a host: `new` checks it")
    }

    async fn resolve(
        &self,
        started: Instant,
        deadline: Instant,
    ) -> Result<Vec<SocketAddr>, ConnectError> {
        let port = self
            .url
            .port_or_known_default()
            .expect("ws, wss, http and https have default ports, and `new` takes no other scheme");
        let failed = |error| ConnectError::Dns {
            host: self.host().to_owned(),
            error,
        };
        let domain = match self.url.host() {
            Some(Host::Ipv4(ip)) => return Ok(vec![(ip, port).into()]),
            Some(Host::Ipv6(ip)) => return Ok(vec![(ip, port).into()]),
            _ => self.host(),
        };
        let addresses: Vec<_> = timeout_at(deadline, lookup_host((domain, port)))
            .await
            .map_err(|_| failed(timed_out(started)))?
            .map_err(|error| failed(error.to_string()))?
            .collect();
        if addresses.is_empty() {
            return Err(failed("the name has no address".to_owned()));
        }
        Ok(addresses)
    }

    /// Tries the addresses in the resolver's order. Each may take its share of what is left of the time, so that a
    /// dead first address leaves some for the next.
    async fn dial(
        &self,
        addresses: &[SocketAddr],
        deadline: Instant,
    ) -> Result<TcpStream, ConnectError> {
        let mut errors = Vec::new();
        for (tried, address) in addresses.iter().enumerate() {
            let started = Instant::now();
            let left = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            let share = deadline.saturating_duration_since(started) / left;
            match timeout_at(started + share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => errors.push((address, error.to_string())),
                Err(_) => errors.push((address, timed_out(started))),
            }
        }
        Err(tcp_error(self.authority(), errors))
    }

    async fn secure(
        &self,
        config: &Arc<rustls::ClientConfig>,
        tcp: TcpStream,
        deadline: Instant,
    ) -> Result<TlsStream<TcpStream>, ConnectError> {
        let started = Instant::now();
        let failed = |error| ConnectError::Tls {
            host: self.host().to_owned(),
            error,
        };
        let name = match self.url.host() {
            Some(Host::Ipv4(ip)) => ServerName::from(std::net::IpAddr::V4(ip)),
            Some(Host::Ipv6(ip)) => ServerName::from(std::net::IpAddr::V6(ip)),
            _ => ServerName::try_from(self.host().to_owned())
                .map_err(|_| failed("the host is no valid name for a certificate".to_owned()))?,
        };
        let connector = TlsConnector::from(Arc::clone(config));
        timeout_at(deadline, connector.connect(name, tcp))
            .await
            .map_err(|_| failed(timed_out(started)))?
            .map_err(|error| failed(tls_error(&error)))
    }
}

fn tcp_error(authority: String, mut errors: Vec<(&SocketAddr, String)>) -> ConnectError {
    if errors.len() == 1
        && let Some((address, error)) = errors.pop()
    {
        return ConnectError::Tcp {
            address: address.to_string(),
            error,
        };
    }
    let each: Vec<_> = errors
        .iter()
        .map(|(address, error)| format!("{address}: {error}"))
        .collect();
    ConnectError::Tcp {
        address: authority,
        error: each.join("; "),
    }
}

fn timed_out(started: Instant) -> String {
    format!("timed out after {}", rounded(started.elapsed()))
}

/// A duration for people: to ten milliseconds, so that a deadline of 5 s reads `5s`.
pub(crate) fn rounded(duration: Duration) -> String {
    let tens = (duration.as_millis() + 5) / 10;
    let millis = u64::try_from(tens * 10).unwrap_or(u64::MAX);
    format!("{:?}", Duration::from_millis(millis))
}

fn roots(ca_file: Option<&Path>) -> anyhow::Result<rustls::RootCertStore> {
    let mut roots = rustls::RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    };
    let Some(file) = ca_file else {
        return Ok(roots);
    };
    let before = roots.len();
    let pem = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate =
            certificate.with_context(|| format!("{} is not valid PEM", file.display()))?;
        roots.add(certificate).with_context(|| {
            format!("{} holds a certificate that can't be used", file.display())
        })?;
    }
    ensure!(
        roots.len() > before,
        "{} holds no PEM certificate",
        file.display()
    );
    Ok(roots)
}

/// The provider is named, never the process's default: a dependency that turns on a second one must change nothing.
fn client_config(roots: rustls::RootCertStore) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// A failed handshake in words for the person who must mend it.
fn tls_error(error: &io::Error) -> String {
    use rustls::{CertificateError as Certificate, Error};
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>());
    match inner {
        Some(Error::InvalidCertificate(certificate)) => match certificate {
            Certificate::UnknownIssuer => {
                "the certificate's issuer is not trusted (a private CA goes into ca_file)"
                    .to_owned()
            }
            Certificate::ExpiredContext { not_after, .. } => {
                format!("the certificate expired at {}", utc(*not_after))
            }
            Certificate::NotValidYetContext { not_before, .. } => format!(
                "the certificate is not valid before {} (or this machine's clock is wrong)",
                utc(*not_before)
            ),
            Certificate::NotValidForNameContext { presented, .. } if !presented.is_empty() => {
                let names: Vec<_> = presented.iter().map(|name| plain(name)).collect();
                format!("the certificate is for another name: {}", names.join(", "))
            }
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
                "the certificate is for another name".to_owned()
            }
            other => format!("the certificate is not acceptable: {other}"),
        },
        Some(Error::InvalidMessage(_)) => "the port does not speak TLS".to_owned(),
        Some(other) => other.to_string(),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the host closed the connection".to_owned()
        }
        None => error.to_string(),
    }
}

/// rustls tells the names of a certificate as `DnsName("example.com")` or `IpAddress(10.0.0.1)`.
fn plain(presented: &str) -> &str {
    let inner = presented
        .split_once('(')
        .map_or(presented, |(_, rest)| rest);
    inner.trim_end_matches(')').trim_matches('"')
}

fn utc(time: UnixTime) -> String {
    i64::try_from(time.as_secs())
        .ok()
        .and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0))
        .map_or_else(
            || "a time out of range".to_owned(),
            |time| time.format("%Y-%m-%d %H:%M:%S UTC").to_string(),
        )
}

/// A connected byte stream, plain or TLS, and the two addresses of its TCP connection.
pub struct Stream {
    pub local: SocketAddr,
    pub peer: SocketAddr,
    io: Io,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;
    use crate::livekit::test_server::{Authority, Server, endpoint};

    const LONG: Duration = Duration::from_secs(20);

    async fn connect(endpoint: &Endpoint, within: Duration) -> Result<Stream, ConnectError> {
        endpoint.connect(Instant::now() + within).await
    }

    fn trusting(authority: &Authority, url: &str) -> Endpoint {
        Endpoint::new(&url.parse().unwrap(), Some(authority.pem.path())).unwrap()
    }

    fn tls_text(result: Result<Stream, ConnectError>) -> String {
        match result {
            Err(ConnectError::Tls { error, .. }) => error,
            Err(other) => panic!("not a TLS error: {other}"),
            Ok(_) => panic!("connected"),
        }
    }

    #[tokio::test]
    async fn an_unknown_host_fails_in_the_dns_stage() {
        let error = connect(&endpoint("wss://nonexistent.invalid"), LONG)
            .await
            .err()
            .unwrap();
        assert!(
            matches!(&error, ConnectError::Dns { host, .. } if host == "nonexistent.invalid"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_closed_port_fails_in_the_tcp_stage_and_is_named() {
        let address = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let error = connect(&endpoint(&format!("ws://{address}")), LONG)
            .await
            .err()
            .unwrap();
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("TCP connection to {address} failed: ")),
            "{text}"
        );
    }

    /// A listener whose queue is full drops what else comes: the nearest that loopback has to a dead host.
    async fn dead_address() -> (SocketAddr, Vec<TcpStream>, TcpListener) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queue = Vec::new();
        while let Ok(stream) =
            tokio::time::timeout(Duration::from_millis(50), TcpStream::connect(address)).await
        {
            queue.push(stream.unwrap());
        }
        (address, queue, listener)
    }

    #[tokio::test]
    async fn a_dead_first_address_leaves_time_for_the_next() {
        let (dead, _queue, _listener) = dead_address().await;
        let server = Server::silent().await;
        let stream = server
            .endpoint()
            .dial(
                &[dead, server.address],
                Instant::now() + Duration::from_secs(1),
            )
            .await
            .unwrap();
        assert_eq!(stream.peer_addr().unwrap(), server.address);
    }

    #[tokio::test]
    async fn a_host_that_does_not_answer_times_out_in_the_tcp_stage() {
        let (dead, _queue, _listener) = dead_address().await;
        let error = connect(
            &endpoint(&format!("ws://{dead}")),
            Duration::from_millis(100),
        )
        .await
        .err()
        .unwrap();
        let text = error.to_string();
        assert!(
            text.starts_with(&format!(
                "TCP connection to {dead} failed: timed out after "
            )),
            "{text}"
        );
    }

    #[test]
    fn every_address_that_failed_is_named() {
        let addresses = ["10.0.0.1:443", "[fd00::1]:443"].map(|text| text.parse().unwrap());
        let errors = vec![
            (&addresses[0], "refused".to_owned()),
            (&addresses[1], "timed out after 2s".to_owned()),
        ];
        let error = tcp_error("example.com:443".to_owned(), errors);
        assert_eq!(
            error.to_string(),
            "TCP connection to example.com:443 failed: \
             10.0.0.1:443: refused; [fd00::1]:443: timed out after 2s"
        );
    }

    #[tokio::test]
    async fn a_server_of_a_private_ca_is_trusted_with_its_ca_file() {
        let authority = Authority::new();
        let server = authority
            .server("localhost", 2999, "HTTP/1.1 200 OK\r\n\r\n")
            .await;
        let url = format!("wss://localhost:{}", server.address.port());
        let mut stream = connect(&trusting(&authority, &url), LONG).await.unwrap();
        assert_eq!(stream.peer, server.address);
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "HTTP/1.1 200 OK\r\n\r\n");
    }

    #[tokio::test]
    async fn an_untrusted_issuer_is_told_as_such() {
        let server = Authority::new().server("localhost", 2999, "").await;
        let url = format!("wss://localhost:{}", server.address.port());
        let text = tls_text(connect(&endpoint(&url), LONG).await);
        assert!(text.contains("issuer is not trusted"), "{text}");
        assert!(text.contains("ca_file"), "{text}");
    }

    #[tokio::test]
    async fn a_certificate_for_another_name_says_for_which() {
        let authority = Authority::new();
        let server = authority.server("other.example", 2999, "").await;
        let url = format!("wss://localhost:{}", server.address.port());
        let text = tls_text(connect(&trusting(&authority, &url), LONG).await);
        assert_eq!(text, "the certificate is for another name: other.example");
    }

    #[tokio::test]
    async fn an_expired_certificate_says_since_when() {
        let authority = Authority::new();
        let server = authority.server("localhost", 2001, "").await;
        let url = format!("wss://localhost:{}", server.address.port());
        let text = tls_text(connect(&trusting(&authority, &url), LONG).await);
        assert_eq!(text, "the certificate expired at 2001-12-31 00:00:00 UTC");
    }

    #[tokio::test]
    async fn a_port_without_tls_is_told_as_such() {
        let server = Server::start(|mut stream| async move {
            stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                .await
                .unwrap();
            let mut sink = [0; 1024];
            while matches!(stream.read(&mut sink).await, Ok(1..)) {}
        })
        .await;
        let text = tls_text(connect(&endpoint(&format!("wss://{}", server.address)), LONG).await);
        assert_eq!(text, "the port does not speak TLS");
    }

    #[tokio::test]
    async fn a_handshake_without_an_answer_times_out_in_the_tls_stage() {
        let server = Server::silent().await;
        let url = format!("wss://{}", server.address);
        let text = tls_text(connect(&endpoint(&url), Duration::from_millis(100)).await);
        assert!(text.starts_with("timed out after "), "{text}");
    }

    #[test]
    fn a_base_path_is_kept_and_credentials_and_query_are_dropped() {
        let endpoint = endpoint("wss://user:hidden@example.com:8443/base/?token=hidden#hidden");
        assert_eq!(endpoint.target("/rtc"), "/base/rtc");
        assert_eq!(endpoint.authority(), "example.com:8443");
        assert_eq!(endpoint.url.as_str(), "wss://example.com:8443/base/");
    }

    #[test]
    fn the_host_header_has_no_default_port_and_keeps_the_brackets_of_ipv6() {
        assert_eq!(endpoint("wss://example.com").authority(), "example.com");
        assert_eq!(endpoint("ws://[::1]:7880").authority(), "[::1]:7880");
    }

    #[test]
    fn a_url_or_a_ca_file_of_no_use_is_refused_with_its_reason() {
        let refused = |url: &str, file: Option<&Path>| {
            let error = Endpoint::new(&url.parse().unwrap(), file).err().unwrap();
            format!("{error:#}")
        };
        assert_eq!(
            refused("ftp://example.com", None),
            "scheme \"ftp\" is none of wss, ws, https, http"
        );
        let missing = Path::new("missing.pem");
        assert!(refused("wss://example.com", Some(missing)).starts_with("cannot read missing.pem"));
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(
            refused("wss://example.com", Some(empty.path())).ends_with("holds no PEM certificate")
        );
    }
}
