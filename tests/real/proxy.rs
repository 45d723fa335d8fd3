//! haproxy in front of a stack, as providers run a proxy in front of LiveKit.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::process::{Process, command, free_ports};
use support::stack::Stack;
use support::wait_for;
use tempfile::TempDir;

/// A proxy that ends TLS, as LiveKit Cloud does, with a certificate of a private authority.
pub(crate) struct TlsProxy {
    /// With the host that the certificate should have: `localhost`.
    pub url: String,
    /// The certificate of the authority.
    pub ca_file: PathBuf,
    _process: Process,
    _dir: TempDir,
}

impl TlsProxy {
    /// `name` is the host name in the certificate.
    pub(crate) fn start(stack: &Stack, name: &str) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let (authority, server) = certificates(name)?;
        let ca_file = dir.path().join("ca.pem");
        fs::write(&ca_file, authority)?;
        fs::write(dir.path().join("server.pem"), server)?;
        let certificate = format!("ssl crt {}", dir.path().join("server.pem").display());
        let (port, process) = haproxy(dir.path(), stack, &certificate, "")?;
        Ok(Self {
            url: format!("wss://localhost:{port}"),
            ca_file,
            _process: process,
            _dir: dir,
        })
    }
}

/// A proxy that responds to some requests itself.
pub(crate) struct Interceptor {
    pub url: String,
    _process: Process,
    _dir: TempDir,
}

impl Interceptor {
    /// `rules` are lines of haproxy's configuration.
    pub(crate) fn start(stack: &Stack, rules: &str) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let (port, process) = haproxy(dir.path(), stack, "", rules)?;
        Ok(Self {
            url: format!("ws://127.0.0.1:{port}"),
            _process: process,
            _dir: dir,
        })
    }
}

/// Starts haproxy, and returns its port. `bind` are parameters of its listener.
fn haproxy(dir: &Path, stack: &Stack, bind: &str, rules: &str) -> anyhow::Result<(u16, Process)> {
    let (from, to) = (free_ports()?, stack.port);
    let text = format!(
        "defaults
  mode http
  timeout connect 5s
  timeout client 1m
  timeout server 1m
  timeout tunnel 1h
frontend proxy
  bind 127.0.0.1:{from} {bind}
  {rules}
  default_backend livekit
backend livekit
  server livekit 127.0.0.1:{to}
"
    );
    let config = dir.join("haproxy.cfg");
    fs::write(&config, text)?;
    let mut command = command("haproxy");
    command.arg("-db").arg("-f").arg(&config);
    let mut process = Process::spawn("haproxy", command, dir)?;
    wait_for("haproxy to listen", Duration::from_secs(10), || {
        process.expect_running()?;
        let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, from));
        Ok(connected.is_ok().then_some(()))
    })?;
    Ok((from, process))
}

/// An authority's certificate, and a server's certificate and key signed by it, all PEM.
pub(crate) fn certificates(name: &str) -> anyhow::Result<(String, String)> {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate()?;
    let authority_pem = authority.self_signed(&authority_key)?.pem();
    let key = KeyPair::generate()?;
    let issuer = Issuer::new(authority, authority_key);
    let server = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, &issuer)?;
    Ok((authority_pem, server.pem() + &key.serialize_pem()))
}
