//! Connections to a LiveKit host: DNS, TCP, then TLS for `wss`/`https`. Each failure names its stage.
//!
//! The signal socket and the server API both open their connections here, so that an unreachable host and a refused
//! request are different errors. [`super::request`] sends requests over these connections.

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

use crate::config::{MAX_CA_BYTES, read_regular};

/// A LiveKit host and the certificates that it may present. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint {
    pub(crate) url: Url,
    tls: Arc<rustls::ClientConfig>,
}

/// Why no connection could be opened, by stage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    #[error("DNS lookup of {host} failed: {error}")]
    Dns { host: String, error: String },
    #[error("TCP connection to {address} failed: {error}")]
    Tcp { address: String, error: String },
    #[error("TLS handshake with {host} failed: {error}")]
    Tls { host: String, error: String },
    /// Nothing is known about the network: the process or its machine has no descriptor or no memory left.
    #[error("cannot open a connection to {host}: {error}")]
    Shortage { host: String, error: String },
}

impl Endpoint {
    /// `ca_file` contains PEM certificates that are trusted in addition to the built-in public roots.
    ///
    /// # Errors
    /// The URL has another scheme or no host, or `ca_file` cannot be read or contains no certificate.
    pub fn new(url: &Url, ca_file: Option<&Path>) -> anyhow::Result<Self> {
        let scheme = url.scheme();
        if !["wss", "ws", "https", "http"].contains(&scheme) {
            bail!("scheme {scheme:?} is not one of wss, ws, https, http");
        }
        ensure!(url.host().is_some(), "the URL has no host");
        let tls = client_config(roots(ca_file)?)?;
        let mut url = url.clone();
        // LiveKit's protocol has no credentials in the URL, and they must not reach an error message.
        url.set_username("").ok();
        url.set_password(None).ok();
        url.set_query(None);
        url.set_fragment(None);
        Ok(Self { url, tls })
    }

    /// Another service of the same project, which may present the same certificates.
    pub(crate) fn service(&self, host: &Host, port: u16, secure: bool) -> Self {
        let scheme = if secure { "https" } else { "http" };
        let url = format!("{scheme}://{host}:{port}").parse();
        Self {
            url: url.expect("a host that was parsed and a port are a URL"),
            tls: Arc::clone(&self.tls),
        }
    }

    /// Opens a connection: DNS, TCP, TLS. If `deadline` passes, the error names the stage that did not finish.
    pub(crate) async fn connect(&self, deadline: Instant) -> Result<Stream, ConnectError> {
        let addresses = self.resolve(deadline).await?;
        let tcp = self.dial(&addresses, deadline).await?;
        // Signal messages are small: Nagle's algorithm would delay them and distort every span that is measured.
        let local = tcp
            .set_nodelay(true)
            .and_then(|()| tcp.local_addr())
            .map_err(|error| ConnectError::Tcp {
                address: self.authority(),
                error: error.to_string(),
            })?;
        let io = if ["wss", "https"].contains(&self.url.scheme()) {
            Io::Tls(Box::new(self.secure(tcp, deadline).await?))
        } else {
            Io::Plain(tcp)
        };
        Ok(Stream { local, io })
    }

    /// The path of a request: `path` below the base path of the project's URL.
    pub(crate) fn target(&self, path: &str) -> String {
        format!("{}{path}", self.url.path().trim_end_matches('/'))
    }

    /// The `Host` header: the host, and the port if it is not the scheme's default.
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

    /// The addresses of the host; at least one.
    pub(crate) async fn resolve(&self, deadline: Instant) -> Result<Vec<SocketAddr>, ConnectError> {
        let started = Instant::now();
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
            .map_err(|error| match own_shortage(&error) {
                Some(shortage) => self.shortage(&shortage),
                None => failed(error.to_string()),
            })?
            .collect();
        if addresses.is_empty() {
            return Err(failed("the name has no address".to_owned()));
        }
        Ok(addresses)
    }

    /// Tries the addresses in the resolver's order. Each gets an equal share of the remaining time, so that a dead first
    /// address leaves time for the next.
    async fn dial(
        &self,
        addresses: &[SocketAddr],
        deadline: Instant,
    ) -> Result<TcpStream, ConnectError> {
        let mut errors = Vec::new();
        for (tried, address) in addresses.iter().enumerate() {
            let started = Instant::now();
            let remaining = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            let share = deadline.saturating_duration_since(started) / remaining;
            match timeout_at(started + share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) if is_shortage(&error) => return Err(self.shortage(&error)),
                Ok(Err(error)) => errors.push((address, error.to_string())),
                Err(_) => errors.push((address, timed_out(started))),
            }
        }
        Err(tcp_error(self.authority(), errors))
    }

    fn shortage(&self, error: &io::Error) -> ConnectError {
        ConnectError::Shortage {
            host: self.host().to_owned(),
            error: error.to_string(),
        }
    }

    async fn secure(
        &self,
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
                .map_err(|_| failed("the host is not a valid name for a certificate".to_owned()))?,
        };
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        timeout_at(deadline, connector.connect(name, tcp))
            .await
            .map_err(|_| failed(timed_out(started)))?
            .map_err(|error| failed(tls_error(&error)))
    }
}

/// Whether the process or its machine has no descriptor, no memory or no buffers left.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let shortages = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS];
    let code = error.raw_os_error();
    code.is_some_and(|code| shortages.contains(&Errno::from_raw(code)))
}

/// The shortage that explains a failed DNS lookup. The resolver opens files and sockets, and reports its own error if it
/// can't.
fn own_shortage(error: &io::Error) -> Option<io::Error> {
    if let Some(code) = error.raw_os_error().filter(|_| is_shortage(error)) {
        return Some(io::Error::from_raw_os_error(code));
    }
    std::fs::File::open("/dev/null").err().filter(is_shortage)
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
    format!("timed out after {}", format_rounded(started.elapsed()))
}

/// A duration for people, rounded to ten milliseconds, so that a deadline of 5 s is shown as `5s`.
pub(crate) fn format_rounded(duration: Duration) -> String {
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
    let pem = read_regular(file, MAX_CA_BYTES)
        .with_context(|| format!("cannot read {}", file.display()))?;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate =
            certificate.with_context(|| format!("{} is not valid PEM", file.display()))?;
        roots.add(certificate).with_context(|| {
            format!(
                "{} contains a certificate that cannot be used",
                file.display()
            )
        })?;
    }
    ensure!(
        roots.len() > before,
        "{} contains no PEM certificate",
        file.display()
    );
    Ok(roots)
}

/// Names its crypto provider instead of using the process's default. rustls has no default if a dependency enables a second
/// provider.
fn client_config(roots: rustls::RootCertStore) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Describes a failed handshake for the person who has to fix it.
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
                let names: Vec<_> = presented.iter().map(|name| bare_name(name)).collect();
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

/// rustls gives the names of a certificate as `DnsName("example.com")` or `IpAddress(10.0.0.1)`.
fn bare_name(presented: &str) -> &str {
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

/// A connected byte stream, plain or TLS, and the local address of its TCP connection.
pub(crate) struct Stream {
    pub(crate) local: SocketAddr,
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
mod tests;
