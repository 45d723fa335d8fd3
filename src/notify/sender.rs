//! One request to a channel's receiver, over the connections that requests to LiveKit use: no redirect is followed, and the
//! response has a bound.
//!
//! Addresses and keys are secrets. An error names the host at most, and repeats of a response only what contains no secret.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::header::{
    ACCEPT, AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, HeaderValue, LOCATION, USER_AGENT,
};
use http::{Method, Request};
use http_body_util::Full;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};
use url::{Position, Url};

use super::queue::Delivery;
use super::text::{Tense, shortened};
use super::{Notice, NoticeKind, pagerduty, webhook};
use crate::config::{Channel, ChannelKind, WebhookFormat};
use crate::livekit::wire::connect::{ConnectError, Endpoint};
use crate::livekit::wire::request::{ExchangeError, HttpRejection, exchange};

/// What an error repeats of a response.
const MAX_SHOWN_CHARS: usize = 200;
/// A shorter part of an address is no secret: it would be removed from every word that contains it.
const MIN_SECRET_CHARS: usize = 6;

/// After 429 without `Retry-After`.
const PAUSE_OF_A_LIMIT: Duration = Duration::from_secs(10);

/// Why an attempt failed. The texts contain no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SendError {
    #[error("{0}")]
    Settings(String),
    #[error("{0}. Check that this host can reach it")]
    Connect(#[from] ConnectError),
    #[error("{host} did not answer within {}", humantime::format_duration(*.timeout))]
    Timeout { host: String, timeout: Duration },
    #[error("the connection to {host} broke: {error}")]
    Broken { host: String, error: String },
    #[error("{host} redirects to {to}, which is not followed. Set the address to which it leads")]
    Redirect { host: String, to: String },
    #[error("{host} answered {status}: {message}.{}", advice(*.status))]
    Status {
        host: String,
        status: u16,
        message: String,
        retry_after: Option<Duration>,
    },
}

fn advice(status: u16) -> &'static str {
    match status {
        400 | 413 | 422 => {
            " It does not accept the message. Check kind and format, and the routing key"
        }
        401 | 403 | 404 | 405 | 410 => " Check the address and the key of the channel",
        429 => " It takes fewer messages than are sent",
        _ => "",
    }
}

impl SendError {
    /// Whether the same message would be refused again.
    pub(super) fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Status {
                status: 400 | 413 | 422,
                ..
            }
        )
    }

    /// Whether the settings are the likely cause.
    pub(crate) fn blames_settings(&self) -> bool {
        match self {
            Self::Settings(_) | Self::Redirect { .. } => true,
            Self::Status { status, .. } => {
                matches!(status, 400 | 401 | 403 | 404 | 405 | 410 | 413 | 422)
            }
            Self::Connect(_) | Self::Timeout { .. } | Self::Broken { .. } => false,
        }
    }

    /// Whether the receiver may have taken the message all the same.
    pub(super) fn may_have_arrived(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Broken { .. } => true,
            // A proxy answers these for a receiver of which it knows nothing.
            Self::Status { status, .. } => matches!(status, 500 | 502 | 504),
            Self::Settings(_) | Self::Connect(_) | Self::Redirect { .. } => false,
        }
    }

    /// How long the receiver asks to wait with all messages.
    pub(super) fn pause(&self) -> Option<Duration> {
        match self {
            Self::Status {
                status: 429,
                retry_after,
                ..
            } => Some(retry_after.unwrap_or(PAUSE_OF_A_LIMIT)),
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// The receiver of a channel's requests, and what they contain.
pub(super) struct Sender {
    url: Url,
    /// The path of the request, with its query.
    path: String,
    host: String,
    authorization: Option<HeaderValue>,
    body: BodyKind,
    timeout: Duration,
    ca_file: Option<PathBuf>,
    /// What no error may contain.
    secrets: Vec<SecretString>,
}

enum BodyKind {
    Webhook(WebhookFormat),
    Pagerduty { routing_key: SecretString },
    Heartbeat,
}

impl Sender {
    pub(super) fn new(channel: &Channel) -> Result<Self, SendError> {
        let (url, body) = match &channel.kind {
            ChannelKind::Webhook { url, format } => {
                (url.expose_secret(), BodyKind::Webhook(*format))
            }
            ChannelKind::Heartbeat { url } => (url.expose_secret(), BodyKind::Heartbeat),
            ChannelKind::Pagerduty { routing_key, url } => {
                let routing_key = routing_key.clone();
                (url.as_str(), BodyKind::Pagerduty { routing_key })
            }
        };
        let url = Url::parse(url)
            .ok()
            .filter(|url| url.host_str().is_some() && matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| {
                SendError::Settings("the address is not an http or https URL".to_owned())
            })?;
        let mut secrets: Vec<SecretString> = parts_of(&url).map(SecretString::from).collect();
        if let BodyKind::Pagerduty { routing_key } = &body {
            secrets.push(routing_key.clone());
        }
        Ok(Self {
            path: url[Position::BeforePath..Position::AfterQuery].to_owned(),
            host: url.host_str().unwrap_or_default().to_owned(),
            authorization: basic_authorization(&url),
            url,
            body,
            timeout: channel.timeout,
            ca_file: channel.ca_file.clone(),
            secrets,
        })
    }

    /// Sends the messages of one delivery.
    pub(super) async fn deliver(&self, delivery: &Delivery) -> Result<(), SendError> {
        self.send(self.body_of(&delivery.notices, delivery.tense))
            .await
    }

    /// Reports to a heartbeat's receiver that the canary works.
    pub(super) async fn beat(&self) -> Result<(), SendError> {
        self.send(None).await
    }

    /// Sends a test message. An event that would wake people is resolved at once.
    pub(super) async fn test(&self, notice: &Notice) -> Result<(), SendError> {
        self.send(self.body_of(std::slice::from_ref(notice), Tense::Present))
            .await?;
        match &self.body {
            BodyKind::Pagerduty { routing_key } => {
                let event = pagerduty::resolve(notice, routing_key.expose_secret());
                self.send(Some(event)).await
            }
            BodyKind::Webhook(_) | BodyKind::Heartbeat => Ok(()),
        }
    }

    /// `None`: the request has no body.
    fn body_of(&self, notices: &[Notice], tense: Tense) -> Option<Value> {
        match &self.body {
            BodyKind::Webhook(WebhookFormat::Json) => webhook::document(notices, tense),
            BodyKind::Webhook(WebhookFormat::Slack) => Some(webhook::slack(notices, tense)),
            BodyKind::Pagerduty { routing_key } => {
                let notice = notices.first()?;
                Some(pagerduty::event(notice, routing_key.expose_secret()))
            }
            BodyKind::Heartbeat => None,
        }
    }

    async fn send(&self, body: Option<Value>) -> Result<(), SendError> {
        let started = Instant::now();
        let deadline = started + self.timeout;
        let late = || SendError::Timeout {
            host: self.host.clone(),
            timeout: self.timeout,
        };
        let endpoint = timeout_at(deadline, self.endpoint())
            .await
            .map_err(|_| late())??;
        let stream = endpoint.connect(deadline).await?;
        let request = self.request(&endpoint, body)?;
        let response = exchange(stream, request, deadline).await;
        let response = response.map_err(|error| match error {
            ExchangeError::Timeout => late(),
            ExchangeError::Broken(error) | ExchangeError::Malformed(error) => SendError::Broken {
                host: self.host.clone(),
                error: self.without_secrets(error),
            },
        })?;
        if response.status.is_success() {
            return Ok(());
        }
        if response.status.is_redirection() {
            let to = response.headers.get(LOCATION);
            let to = to.and_then(|to| self.url.join(to.to_str().ok()?).ok());
            let to = to.and_then(|to| Some(to.host_str()?.to_owned()));
            return Err(SendError::Redirect {
                host: self.host.clone(),
                to: to.unwrap_or_else(|| "another address".to_owned()),
            });
        }
        Err(self.refusal(response.rejection()))
    }

    fn refusal(&self, rejection: HttpRejection) -> SendError {
        let message = self.without_secrets(rejection.message);
        let message = shortened(message.trim_end_matches('.'), MAX_SHOWN_CHARS);
        SendError::Status {
            host: self.host.clone(),
            status: rejection.status,
            message,
            retry_after: rejection.retry_after,
        }
    }

    /// A certificate's file is read for each request, so that a renewed one needs no reload, and on a thread of its own, because a
    /// file system may hang.
    async fn endpoint(&self) -> Result<Endpoint, SendError> {
        let (url, ca_file) = (self.url.clone(), self.ca_file.clone());
        let read = move || Endpoint::new(&url, ca_file.as_deref());
        let endpoint = if self.ca_file.is_some() {
            let read = tokio::task::spawn_blocking(read).await;
            read.unwrap_or_else(|error| Err(error.into()))
        } else {
            read()
        };
        endpoint.map_err(|error| SendError::Settings(format!("{error:#}")))
    }

    fn request(
        &self,
        endpoint: &Endpoint,
        body: Option<Value>,
    ) -> Result<Request<Full<Bytes>>, SendError> {
        let method = if body.is_some() {
            Method::POST
        } else {
            Method::GET
        };
        let mut request = Request::builder()
            .method(method)
            .uri(&self.path)
            .header(HOST, endpoint.authority())
            .header(
                USER_AGENT,
                concat!("livekit-canary/", env!("CARGO_PKG_VERSION")),
            )
            .header(ACCEPT, "*/*")
            .header(CONNECTION, "close");
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
        request.body(Full::new(body)).map_err(|_| {
            SendError::Settings("the address contains characters that no request can".to_owned())
        })
    }

    fn without_secrets(&self, text: String) -> String {
        self.secrets.iter().fold(text, |text, secret| {
            text.replace(secret.expose_secret(), "[secret]")
        })
    }
}

/// The parts of an address that may be secret: everything except scheme, host and port.
fn parts_of(url: &Url) -> impl Iterator<Item = String> {
    let path = url.path_segments().into_iter().flatten();
    let query = url.query_pairs().map(|(_, value)| value.into_owned());
    let whole = [url.as_str(), &url[Position::BeforePath..]];
    let login = [url.username(), url.password().unwrap_or_default()];
    let parts = whole.into_iter().chain(path).chain(login);
    let parts: Vec<String> = parts.map(str::to_owned).chain(query).collect();
    parts
        .into_iter()
        .filter(|part| part.chars().count() >= MIN_SECRET_CHARS)
}

/// The credentials of an address, which a request sends as a header.
fn basic_authorization(url: &Url) -> Option<HeaderValue> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let decoded = |text: &str| {
        let form = format!("x={}", text.replace('+', "%2B"));
        let pair = url::form_urlencoded::parse(form.as_bytes()).next();
        pair.map_or_else(String::new, |(_, value)| value.into_owned())
    };
    let user = decoded(url.username());
    let password = decoded(url.password().unwrap_or_default());
    let login = BASE64_STANDARD.encode(format!("{user}:{password}"));
    let mut value = HeaderValue::try_from(format!("Basic {login}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The notice of a test.
pub(super) fn test_notice(now: chrono::DateTime<chrono::Utc>) -> Notice {
    Notice {
        kind: NoticeKind::Test,
        target: "test".to_owned(),
        project: "test".to_owned(),
        fault: None,
        incident: format!(
            "test-{}-{:08x}",
            now.format("%Y%m%dT%H%M%S"),
            fastrand::u32(..)
        ),
        continues: false,
        began_at: now,
        at: now,
        reasons: Vec::new(),
        failed: 0,
        rooms: 0,
        differs: Vec::new(),
        detail: None,
        url: None,
        ended_by: None,
        drill: false,
    }
}
