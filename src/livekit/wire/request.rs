//! One HTTP/1.1 request and its answer on a connection of its own, and what a refusal said.
//!
//! The server API and the WebSocket upgrade both go through here: so both keep status, body and `Retry-After`, and
//! neither lets a token into a text.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Utc};
use http::header::{LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};

use super::connect::Stream;

/// Most bytes of an answer's body that are read.
pub(crate) const MAX_BODY_BYTES: usize = 1 << 20;
/// Most bytes of a refusal's text that are kept.
const MAX_TEXT_BYTES: usize = 1 << 10;
/// Most bytes of an answer's header section; hyper's own limit is 400 KiB.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// What a refused HTTP request or WebSocket upgrade said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpRejection {
    pub status: u16,
    /// Twirp's `code`, where the body was Twirp JSON.
    pub twirp_code: Option<String>,
    /// Twirp's `msg`, or the first KiB of the body as text; never a token.
    pub message: String,
    /// `Retry-After` in seconds or as a date, resolved to seconds from receipt.
    pub retry_after: Option<Duration>,
}

/// An HTTP answer.
pub(crate) struct HttpResponse {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub body_end: BodyEnd,
    /// After 101: the connection, and what was already read of the other protocol.
    pub upgraded: Option<(Stream, Bytes)>,
}

/// How the reading of a body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyEnd {
    Whole,
    /// More than [`MAX_BODY_BYTES`]; the rest is left unread.
    TooLong,
    /// The deadline passed in the middle of it.
    Late,
    /// The connection broke in the middle of it.
    Cut,
}

/// Why there is no answer at all.
#[derive(Debug)]
pub(crate) enum ExchangeError {
    Timeout,
    /// The connection broke before the head of the answer was complete.
    Broken(String),
    /// Whatever came, it was no HTTP.
    Malformed(String),
}

/// The `Authorization` of a token, marked so that `Debug` doesn't show it.
pub(crate) fn bearer(token: &SecretString) -> HeaderValue {
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.expose_secret()))
        .expect("a JWT is Base64 and dots");
    value.set_sensitive(true);
    value
}

/// Sends `request` and reads the answer.
///
/// A refusal whose body is late or breaks off is still a refusal: only the head must come before `deadline`.
pub(crate) async fn exchange(
    stream: Stream,
    request: Request<Full<Bytes>>,
    deadline: Instant,
) -> Result<HttpResponse, ExchangeError> {
    let (mut sender, connection) = http1::Builder::new()
        .max_header_size(MAX_HEADER_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(&error))?;
    let talk = async move {
        let response = timeout_at(deadline, sender.send_request(request))
            .await
            .map_err(|_| ExchangeError::Timeout)?
            .map_err(|error| failed(&error))?;
        let (head, body) = response.into_parts();
        let (body, body_end) = if head.status == StatusCode::SWITCHING_PROTOCOLS {
            (Bytes::new(), BodyEnd::Whole)
        } else {
            read(body, deadline).await
        };
        Ok(HttpResponse {
            status: head.status,
            headers: head.headers,
            body,
            body_end,
            upgraded: None,
        })
    };
    let mut talk = pin!(talk);
    let mut connection = Box::pin(connection);
    // The connection does the work while the talk waits for it; its own errors reach the talk.
    let mut ended = false;
    let mut answer = poll_fn(|cx| {
        if !ended {
            ended = connection.as_mut().poll(cx).is_ready();
        }
        talk.as_mut().poll(cx)
    })
    .await?;
    if answer.status == StatusCode::SWITCHING_PROTOCOLS {
        if !ended {
            timeout_at(deadline, connection.as_mut())
                .await
                .map_err(|_| ExchangeError::Timeout)?
                .map_err(|error| failed(&error))?;
        }
        let parts = (*std::pin::Pin::into_inner(connection)).into_parts();
        answer.upgraded = Some((parts.io.into_inner(), parts.read_buf));
    }
    Ok(answer)
}

/// What of a body comes before `deadline`, up to the limit.
async fn read(mut body: Incoming, deadline: Instant) -> (Bytes, BodyEnd) {
    let mut bytes = BytesMut::new();
    let end = loop {
        match timeout_at(deadline, body.frame()).await {
            Ok(Some(Ok(frame))) => {
                let Some(data) = frame.data_ref() else {
                    continue;
                };
                let room = MAX_BODY_BYTES - bytes.len();
                bytes.extend_from_slice(&data[..data.len().min(room)]);
                if data.len() > room {
                    break BodyEnd::TooLong;
                }
            }
            Ok(None) => break BodyEnd::Whole,
            Ok(Some(Err(_))) => break BodyEnd::Cut,
            Err(_) => break BodyEnd::Late,
        }
    };
    (bytes.freeze(), end)
}

fn failed(error: &hyper::Error) -> ExchangeError {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    if error.is_parse() {
        ExchangeError::Malformed(text)
    } else {
        ExchangeError::Broken(text)
    }
}

/// Twirp's error body: <https://twitchtv.github.io/twirp/docs/spec_v7.html#error-responses>
#[derive(Deserialize)]
struct TwirpError {
    code: String,
    #[serde(default)]
    msg: String,
}

impl HttpResponse {
    pub(crate) fn rejection(&self) -> HttpRejection {
        let twirp: Option<TwirpError> = serde_json::from_slice(&self.body).ok();
        let (twirp_code, text) = match twirp {
            Some(error) => (Some(sanitize(&error.code)), error.msg),
            None => (None, String::from_utf8_lossy(&self.body).into_owned()),
        };
        let mut message = sanitize(&text);
        if message.is_empty() {
            message = self.headline();
        }
        HttpRejection {
            status: self.status.as_u16(),
            twirp_code,
            message,
            retry_after: self
                .headers
                .get(RETRY_AFTER)
                .and_then(|value| retry_after(value.to_str().ok()?, Utc::now())),
        }
    }

    /// Stands in for a body that says nothing: where a redirect leads, or the status in words.
    fn headline(&self) -> String {
        let location = self
            .headers
            .get(LOCATION)
            .filter(|_| self.status.is_redirection())
            .and_then(|value| value.to_str().ok());
        match location {
            // A query could hold anything.
            Some(to) => {
                let to = to.split(['?', '#']).next().unwrap_or_default();
                format!("redirected to {}", sanitize(to))
            }
            None => self
                .status
                .canonical_reason()
                .unwrap_or("no text")
                .to_owned(),
        }
    }
}

/// A number of seconds or an HTTP date (RFC 9110, 10.2.3); a date in the past is zero.
pub(crate) fn retry_after(value: &str, now: DateTime<Utc>) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = DateTime::parse_from_rfc2822(value).ok()?;
    Some(
        date.signed_duration_since(now)
            .to_std()
            .unwrap_or(Duration::ZERO),
    )
}

/// A server's text for people: no token, no control characters, white space in runs of one, at most 1 KiB.
///
/// livekit-server answers a bad signature with the whole token in its text.
pub(crate) fn sanitize(text: &str) -> String {
    let mut shown = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
        if word.is_empty() {
            continue;
        }
        if !shown.is_empty() {
            shown.push(' ');
        }
        redact(word, &mut shown);
        if shown.len() > MAX_TEXT_BYTES {
            shown.truncate(shown.floor_char_boundary(MAX_TEXT_BYTES));
            break;
        }
    }
    shown
}

/// Copies `word` to `out` without what looks like a JWT: its header is JSON, which begins `eyJ` in Base64.
fn redact(word: &str, out: &mut String) {
    let is_token =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '=' | '%');
    let mut rest = word;
    while let Some(start) = rest.find("eyJ") {
        let token = rest[start..]
            .find(|c| !is_token(c))
            .unwrap_or(rest.len() - start);
        out.push_str(&rest[..start]);
        out.push_str("[token]");
        rest = &rest[start + token..];
    }
    out.push_str(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(value: &str) -> Option<u64> {
        let now = DateTime::parse_from_rfc3339("2026-11-24T10:00:00Z").unwrap();
        retry_after(value, now.into()).map(|wait| wait.as_secs())
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date() {
        assert_eq!(retry("120"), Some(120));
        assert_eq!(retry(" 5 "), Some(5));
        assert_eq!(retry("Tue, 24 Nov 2026 10:01:30 GMT"), Some(90));
        assert_eq!(retry("Tue, 24 Nov 2026 09:00:00 GMT"), Some(0));
        assert_eq!(retry("soon"), None);
        assert_eq!(retry("-3"), None);
    }

    #[test]
    fn tokens_and_control_characters_never_stay_in_a_text() {
        assert_eq!(
            sanitize("invalid token: eyJ0eXAi.eyJleHAi.lSt_TAg-x, error: \x1b[31mbad\r\n"),
            "invalid token: [token], error: [31mbad"
        );
        assert_eq!(
            sanitize("/rtc?access_token=eyJhbGci.eyJ2aWRl.AbC&x=\"eyJhbGci\""),
            "/rtc?access_token=[token]&x=\"[token]\""
        );
    }

    #[test]
    fn a_long_text_is_cut_at_one_kib_between_characters() {
        let shown = sanitize(&"€".repeat(2000));
        assert_eq!(shown, "€".repeat(MAX_TEXT_BYTES / 3));
    }

    #[test]
    fn a_redirect_says_where_to_without_the_query() {
        let answer = HttpResponse {
            status: StatusCode::MOVED_PERMANENTLY,
            headers: HeaderMap::from_iter([(
                LOCATION,
                HeaderValue::from_static("https://example.com/rtc?access_token=hidden"),
            )]),
            body: Bytes::new(),
            body_end: BodyEnd::Whole,
            upgraded: None,
        };
        assert_eq!(
            answer.rejection().message,
            "redirected to https://example.com/rtc"
        );
    }
}
