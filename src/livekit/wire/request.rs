//! One HTTP/1.1 request and its response, on a connection of their own.
//!
//! The server API and the WebSocket upgrade both send their requests here. Both therefore preserve the status, body and
//! `Retry-After` of a rejection, and neither lets a token into an error message.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Utc};
use http::header::{AUTHORIZATION, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};

use super::connect::Stream;

/// Bytes of a response's body that are read.
pub(crate) const MAX_BODY_BYTES: usize = 1 << 20;
/// Bytes of a rejection's text that are stored.
const MAX_TEXT_BYTES: usize = 1 << 10;
/// Bytes of a response's header section; hyper's own limit is 400 KiB.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// The response to a refused HTTP request or WebSocket upgrade.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpRejection {
    pub status: u16,
    /// Twirp's `code`, if the body is Twirp JSON.
    pub twirp_code: Option<String>,
    /// Twirp's `msg`, or the first KiB of the body as text. Tokens and the API key are removed.
    pub message: String,
    /// The time that `Retry-After` asks to wait, counted from receipt.
    pub retry_after: Option<Duration>,
}

pub(crate) struct HttpResponse {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub body_end: BodyEnd,
    /// After status 101: the connection, and the bytes of the new protocol that were already read.
    pub upgraded: Option<(Stream, Bytes)>,
    /// The API key of the request's token. livekit-server repeats it when it does not know it.
    pub api_key: Option<String>,
}

/// How the reading of a body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyEnd {
    Whole,
    /// The body exceeds [`MAX_BODY_BYTES`]; the rest is not read.
    TooLong,
    /// The deadline passed before the end of the body.
    Late,
    /// The connection broke before the end of the body.
    Cut,
}

/// Why there is no response at all.
#[derive(Debug)]
pub(crate) enum ExchangeError {
    Timeout,
    /// The connection broke before the head of the response was complete.
    Broken(String),
    /// The response is not HTTP.
    Malformed(String),
}

/// The `Authorization` header for a token, marked as sensitive so that `Debug` does not show it.
pub(crate) fn bearer(token: &SecretString) -> HeaderValue {
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.expose_secret()))
        .expect("a JWT consists of Base64 and dots");
    value.set_sensitive(true);
    value
}

/// The issuer of the token in an `Authorization` header, which is the API key.
fn issuer(header: &HeaderValue) -> Option<String> {
    #[derive(Deserialize)]
    struct Claims {
        iss: String,
    }
    let claims = header.to_str().ok()?.split('.').nth(1)?;
    let claims = BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    Some(claims.iss)
}

/// Sends `request` and reads the response.
///
/// Only the head must arrive before `deadline`: a rejection whose body is late or incomplete is still a rejection.
pub(crate) async fn exchange(
    stream: Stream,
    request: Request<Full<Bytes>>,
    deadline: Instant,
) -> Result<HttpResponse, ExchangeError> {
    let api_key = request.headers().get(AUTHORIZATION).and_then(issuer);
    let (mut sender, connection) = http1::Builder::new()
        .max_header_size(MAX_HEADER_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(&error))?;
    let exchange = async move {
        let response = timeout_at(deadline, sender.send_request(request))
            .await
            .map_err(|_| ExchangeError::Timeout)?
            .map_err(|error| failed(&error))?;
        let (head, body) = response.into_parts();
        let (body, body_end) = if head.status == StatusCode::SWITCHING_PROTOCOLS {
            (Bytes::new(), BodyEnd::Whole)
        } else {
            read_body(body, deadline).await
        };
        Ok(HttpResponse {
            status: head.status,
            headers: head.headers,
            body,
            body_end,
            upgraded: None,
            api_key,
        })
    };
    let mut exchange = pin!(exchange);
    let mut connection = Box::pin(connection);
    // hyper separates the two: the connection does the I/O, the exchange waits for it and receives its errors. Polling both
    // here, instead of spawning the connection, ends it with this future.
    let mut ended = false;
    let mut response = poll_fn(|cx| {
        if !ended {
            ended = connection.as_mut().poll(cx).is_ready();
        }
        exchange.as_mut().poll(cx)
    })
    .await?;
    if response.status == StatusCode::SWITCHING_PROTOCOLS {
        if !ended {
            timeout_at(deadline, connection.as_mut())
                .await
                .map_err(|_| ExchangeError::Timeout)?
                .map_err(|error| failed(&error))?;
        }
        let parts = (*std::pin::Pin::into_inner(connection)).into_parts();
        response.upgraded = Some((parts.io.into_inner(), parts.read_buf));
    }
    Ok(response)
}

/// Reads the part of a body that arrives before `deadline`, up to the limit.
async fn read_body(mut body: Incoming, deadline: Instant) -> (Bytes, BodyEnd) {
    let mut bytes = BytesMut::new();
    let end = loop {
        match timeout_at(deadline, body.frame()).await {
            Ok(Some(Ok(frame))) => {
                let Some(data) = frame.data_ref() else {
                    continue;
                };
                let capacity = MAX_BODY_BYTES - bytes.len();
                bytes.extend_from_slice(&data[..data.len().min(capacity)]);
                if data.len() > capacity {
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
        let mut message = sanitize(&self.without_key(text));
        if message.is_empty() {
            message = self.fallback_message();
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

    /// A message must not show the API key: it is half of a credential, and a file of two lines makes the secret part of it.
    fn without_key(&self, text: String) -> String {
        match self.api_key.as_deref() {
            Some(key) if !key.is_empty() => text.replace(key, "[API key]"),
            _ => text,
        }
    }

    /// Replaces an empty body: the target of a redirect, or the status in words.
    fn fallback_message(&self) -> String {
        let location = self
            .headers
            .get(LOCATION)
            .filter(|_| self.status.is_redirection())
            .and_then(|value| value.to_str().ok());
        match location {
            // The query could contain a token or other secrets.
            Some(to) => {
                let to = to.split(['?', '#']).next().unwrap_or_default();
                format!("redirected to {}", sanitize(to))
            }
            None => self
                .status
                .canonical_reason()
                .unwrap_or("no reason phrase")
                .to_owned(),
        }
    }
}

/// Parses a number of seconds or an HTTP date (RFC 9110, 10.2.3). A date in the past gives zero.
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

/// Makes a server's text safe to show: without tokens and control characters, with single spaces, at most 1 KiB.
///
/// Tokens do occur: livekit-server quotes the whole token when it rejects a bad signature.
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

/// Copies `word` to `out` and replaces everything that looks like a JWT. A JWT's header is JSON, so it starts with `eyJ` in
/// Base64.
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
    fn sanitize_removes_tokens_and_control_characters() {
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
    fn long_text_is_cut_at_one_kib_between_characters() {
        let shown = sanitize(&"€".repeat(2000));
        assert_eq!(shown, "€".repeat(MAX_TEXT_BYTES / 3));
    }

    #[test]
    fn redirect_message_gives_the_target_without_the_query() {
        let response = HttpResponse {
            status: StatusCode::MOVED_PERMANENTLY,
            headers: HeaderMap::from_iter([(
                LOCATION,
                HeaderValue::from_static("https://example.com/rtc?access_token=hidden"),
            )]),
            body: Bytes::new(),
            body_end: BodyEnd::Whole,
            upgraded: None,
            api_key: None,
        };
        assert_eq!(
            response.rejection().message,
            "redirected to https://example.com/rtc"
        );
    }
}
