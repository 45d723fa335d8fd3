//! `POST /api/v1/events`: people and other programs report what they change, such as a deployment.

use chrono::{DateTime, TimeDelta, Utc};
use http::StatusCode;
use serde::Deserialize;

use super::access::ChangePermit;
use super::control::NoSuchTarget;
use super::response::{HttpError, ServerResponse, json};
use super::status::Status;
use crate::history::{EventRecorded, History, HistoryEvent};

const MAX_TEXT_CHARS: usize = 200;
const MAX_KIND_CHARS: usize = 32;
/// How far the clock of the sender may be ahead.
const MAX_AHEAD: TimeDelta = TimeDelta::hours(1);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EventBody {
    /// All targets if it is left out.
    target: Option<String>,
    /// Now if it is left out.
    at: Option<DateTime<Utc>>,
    kind: String,
    text: String,
}

/// Records the event in the history. The permit is what keeps a request without a permission check from writing anything.
///
/// # Errors
/// 400 if the body is no event, 404 for an unknown target, 503 if too many events wait for the disk.
pub(super) async fn record(
    history: &History,
    status: &Status,
    body: &[u8],
    now: DateTime<Utc>,
    _permit: ChangePermit,
) -> Result<ServerResponse, HttpError> {
    let event = parse(status, body, now)?;
    let code = match history.record_event(event.clone()).await {
        EventRecorded::Durable => StatusCode::CREATED,
        EventRecorded::Waiting => StatusCode::ACCEPTED,
        EventRecorded::Dropped => {
            let text = "the history can't be written, and too many events wait for it already; this one is dropped";
            return Err(HttpError::new(StatusCode::SERVICE_UNAVAILABLE, text));
        }
    };
    Ok(json(code, &event))
}

fn parse(status: &Status, body: &[u8], now: DateTime<Utc>) -> Result<HistoryEvent, HttpError> {
    let bad = |text: String| HttpError::new(StatusCode::BAD_REQUEST, text);
    let event: EventBody = serde_json::from_slice(body).map_err(|error| {
        bad(format!(
            "the body is no event: {error}; expected {{\"kind\": \"deploy\", \"text\": \"…\"}}, and optionally \"target\" and \"at\""
        ))
    })?;
    let in_kind = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
    let length = event.kind.len();
    if !(1..=MAX_KIND_CHARS).contains(&length) || !event.kind.bytes().all(in_kind) {
        return Err(bad(format!(
            "kind: use 1 to {MAX_KIND_CHARS} characters of a-z, 0-9, - and _, such as deploy"
        )));
    }
    let text = event.text.trim();
    let length = text.chars().count();
    if !(1..=MAX_TEXT_CHARS).contains(&length) || text.chars().any(char::is_control) {
        return Err(bad(format!(
            "text: use one line of 1 to {MAX_TEXT_CHARS} characters; this one has {length}"
        )));
    }
    if let Some(name) = &event.target
        && status.target(name).is_none()
    {
        let text = format!("target: {NoSuchTarget}");
        return Err(HttpError::new(StatusCode::NOT_FOUND, text));
    }
    let at = event.at.unwrap_or(now);
    if at > now + MAX_AHEAD || at < DateTime::UNIX_EPOCH {
        return Err(bad(
            "at: use a time in the past, or leave it out for the present".to_owned(),
        ));
    }
    Ok(HistoryEvent::new(
        at,
        event.target,
        event.kind,
        text.to_owned(),
    ))
}
