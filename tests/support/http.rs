//! An HTTP client for servers on loopback, and what a test needs to serve one request itself.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::de::DeserializeOwned;

pub struct HttpClient {
    agent: ureq::Agent,
    pub address: SocketAddr,
}

/// A response with any status.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub body: String,
}

impl HttpClient {
    pub fn new(address: SocketAddr) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(30)))
            .build();
        Self {
            agent: agent.into(),
            address,
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn get(&self, path: &str) -> anyhow::Result<Response> {
        Response::read(self.agent.get(self.url(path)).call(), path)
    }

    pub fn post(&self, path: &str) -> anyhow::Result<Response> {
        Response::read(self.agent.post(self.url(path)).send_empty(), path)
    }

    /// The status of a response with any content.
    pub fn status(&self, path: &str) -> anyhow::Result<u16> {
        let response = self.agent.get(self.url(path)).call();
        Ok(response.with_context(|| path.to_owned())?.status().as_u16())
    }

    /// The body of a successful response.
    pub fn text(&self, path: &str) -> anyhow::Result<String> {
        self.get(path)?.success()
    }

    /// The JSON of a successful response.
    pub fn json<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let text = self.text(path)?;
        serde_json::from_str(&text).with_context(|| format!("{path}: {text}"))
    }
}

impl Response {
    fn read(
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
        path: &str,
    ) -> anyhow::Result<Self> {
        let mut response = response.with_context(|| path.to_owned())?;
        let body = response.body_mut().read_to_string();
        Ok(Self {
            status: response.status().as_u16(),
            body: body.with_context(|| path.to_owned())?,
        })
    }

    /// The body.
    ///
    /// # Errors
    /// If the status isn't one of success.
    pub fn success(self) -> anyhow::Result<String> {
        let success = (200..300).contains(&self.status);
        ensure!(success, "HTTP status {}: {}", self.status, self.body);
        Ok(self.body)
    }

    /// The body as JSON, whatever the status is.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| self.body.clone())
    }
}

/// Reads one request and responds to it. Returns the body of the request.
pub fn receive(mut client: TcpStream, status: &str, response: &str) -> anyhow::Result<Vec<u8>> {
    let body = read_body(&client)?;
    respond(&mut client, status, response)?;
    Ok(body)
}

fn read_body(client: &TcpStream) -> anyhow::Result<Vec<u8>> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim_end().to_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(body)
}

fn respond(client: &mut TcpStream, status: &str, body: &str) -> anyhow::Result<()> {
    // The type of a scrape, which a receiver of webhooks does not read.
    let response = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    Ok(client.write_all(response.as_bytes())?)
}
