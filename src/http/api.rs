//! The responses of the API that come from the history, and the queries that they accept.

use std::time::Duration;

use http::{StatusCode, Uri};
use serde::Serialize;
use serde_json::value::RawValue;
use tracing::warn;
use url::form_urlencoded;

use super::response::{HttpError, ServerResponse, json};
use crate::history::{
    BatchFilter, History, IncidentFilter, MAX_BATCHES, ReadError, StoredDocument,
};
use crate::report::{BatchResult, Purpose};

/// The most batches or incidents in one response. One less than the history returns, because one more is read.
const MAX_LIMIT: usize = MAX_BATCHES - 1;
/// Batches or incidents in a response if the query has no `limit`.
const DEFAULT_LIMIT: usize = 50;
/// Characters of a wrong key or value that an error repeats.
const MAX_QUOTED_CHARS: usize = 40;

#[derive(Serialize)]
struct BatchPage {
    /// The latest first, without their probes.
    batches: Vec<Box<RawValue>>,
    /// The value of `before` for the next page; null on the last page.
    next_before: Option<String>,
}

#[derive(Serialize)]
struct IncidentPage {
    /// The latest first.
    incidents: Vec<Box<RawValue>>,
    /// The value of `before` for the next page; null on the last page.
    next_before: Option<String>,
}

pub(super) async fn batches(history: &History, uri: &Uri) -> Result<ServerResponse, HttpError> {
    let mut filter = batch_filter(uri)?;
    let limit = filter.limit;
    // One more than requested shows whether there is a next page.
    filter.limit += 1;
    let found = history.batches(filter).await.map_err(unreadable)?;
    let (batches, next_before) = page(found, limit);
    let page = BatchPage {
        batches,
        next_before,
    };
    Ok(json(StatusCode::OK, &page))
}

pub(super) async fn batch(history: &History, id: &str) -> Result<ServerResponse, HttpError> {
    let missing = "the history has no ended batch with this id; /api/v1/batches lists those it has";
    document(history.batch(id.to_owned()).await, missing)
}

/// A probe's id is the name of its room.
pub(super) async fn probe(history: &History, room: &str) -> Result<ServerResponse, HttpError> {
    let missing = "the history has no probe of this room; /api/v1/batches/{batch_id} lists the probes of a batch";
    document(history.probe(room.to_owned()).await, missing)
}

pub(super) async fn incidents(history: &History, uri: &Uri) -> Result<ServerResponse, HttpError> {
    let mut filter = incident_filter(uri)?;
    let limit = filter.limit;
    // One more than requested shows whether there is a next page.
    filter.limit += 1;
    let found = history.incidents(filter).await.map_err(unreadable)?;
    let (incidents, next_before) = page(found, limit);
    let page = IncidentPage {
        incidents,
        next_before,
    };
    Ok(json(StatusCode::OK, &page))
}

pub(super) async fn incident(history: &History, id: &str) -> Result<ServerResponse, HttpError> {
    let missing = "the history has no incident with this id; /api/v1/incidents lists those it has";
    document(history.incident(id.to_owned()).await, missing)
}

/// The first `limit` documents. If more were found, also the value of `before` for the next page.
fn page(mut found: Vec<StoredDocument>, limit: usize) -> (Vec<Box<RawValue>>, Option<String>) {
    let more = found.len() > limit;
    found.truncate(limit);
    let last = found.last().filter(|_| more);
    let next_before = last.map(|last| last.id.clone());
    let documents = found.into_iter().map(|it| it.document).collect();
    (documents, next_before)
}

/// # Errors
/// 404 with the text `missing` if the history has no such document, 503 if it can't be read.
fn document(
    found: Result<Option<Box<RawValue>>, ReadError>,
    missing: &str,
) -> Result<ServerResponse, HttpError> {
    let found = found.map_err(unreadable)?;
    let found = found.ok_or_else(|| HttpError::new(StatusCode::NOT_FOUND, missing))?;
    Ok(json(StatusCode::OK, &found))
}

fn unreadable(error: ReadError) -> HttpError {
    let response = HttpError::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string());
    match error {
        ReadError::Busy => response.retry_after(Duration::from_secs(5)),
        ReadError::Failed(source) => {
            warn!("HTTP: cannot read the history: {source}");
            response
        }
    }
}

fn batch_filter(uri: &Uri) -> Result<BatchFilter, HttpError> {
    let keys = ["target", "result", "purpose", "limit", "before"];
    let [target, result, purpose, limit, before] = query(uri, keys)?;
    Ok(BatchFilter {
        result: one_of("result", result, &BatchResult::ALL, BatchResult::label)?,
        target: name("target", target, TARGET_NAME)?,
        purpose: one_of("purpose", purpose, &Purpose::ALL, Purpose::label)?,
        before: name("before", before, "a batch's id")?,
        limit: self::limit(limit)?,
    })
}

fn incident_filter(uri: &Uri) -> Result<IncidentFilter, HttpError> {
    let [target, open, limit, before] = query(uri, ["target", "open", "limit", "before"])?;
    let open = open.map(|open| {
        let parsed = open.parse();
        parsed.map_err(|_| bad_value("open", &open, "true or false"))
    });
    Ok(IncidentFilter {
        target: name("target", target, TARGET_NAME)?,
        open: open.transpose()?,
        before: name("before", before, "an incident's id")?,
        limit: self::limit(limit)?,
    })
}

/// What `target` must be.
const TARGET_NAME: &str = "a target's name; /api/v1/targets lists all targets";

/// The value with this label, if there is one.
fn one_of<T: Copy>(
    key: &str,
    value: Option<String>,
    all: &[T],
    label: fn(T) -> &'static str,
) -> Result<Option<T>, HttpError> {
    let Some(value) = value else {
        return Ok(None);
    };
    let found = all.iter().find(|&&it| label(it) == value).copied();
    if found.is_none() {
        let labels: Vec<_> = all.iter().map(|&it| label(it)).collect();
        let expected = format!("one of {}", labels.join(", "));
        return Err(bad_value(key, &value, &expected));
    }
    Ok(found)
}

/// A name or an id, if there is one.
fn name(key: &str, value: Option<String>, expected: &str) -> Result<Option<String>, HttpError> {
    let in_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    match value {
        Some(value) if value.is_empty() || !value.bytes().all(in_name) => {
            Err(bad_value(key, &value, expected))
        }
        value => Ok(value),
    }
}

fn limit(limit: Option<String>) -> Result<usize, HttpError> {
    let Some(limit) = limit else {
        return Ok(DEFAULT_LIMIT);
    };
    let number = limit.parse().ok();
    number
        .filter(|number| (1..=MAX_LIMIT).contains(number))
        .ok_or_else(|| bad_value("limit", &limit, &format!("a number from 1 to {MAX_LIMIT}")))
}

fn bad_value(key: &str, value: &str, expected: &str) -> HttpError {
    let shown: String = value.chars().take(MAX_QUOTED_CHARS).collect();
    HttpError::new(
        StatusCode::BAD_REQUEST,
        format!("{key}: {shown:?} is not {expected}"),
    )
}

/// The values of these keys.
///
/// # Errors
/// 400 for an unknown key, or for one that is given twice: the client expects an effect that it would not have.
pub(super) fn query<const N: usize>(
    uri: &Uri,
    known: [&str; N],
) -> Result<[Option<String>; N], HttpError> {
    let mut values = [const { None }; N];
    for (key, value) in form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()) {
        let error = |problem| {
            let shown: String = key.chars().take(MAX_QUOTED_CHARS).collect();
            let text = format!("query key {shown:?} {problem}");
            HttpError::new(StatusCode::BAD_REQUEST, text)
        };
        let Some(index) = known.iter().position(|known| *known == key) else {
            return Err(error(match known.len() {
                0 => "is unknown: this path takes no query".to_owned(),
                _ => format!("is unknown; the known keys are {}", known.join(", ")),
            }));
        };
        if values[index].replace(value.into_owned()).is_some() {
            return Err(error("is given twice".to_owned()));
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chrono::TimeDelta;
    use http_body_util::BodyExt;
    use serde_json::Value;
    use tempfile::TempDir;
    use tokio::time::Instant;

    use super::*;
    use crate::config::{self, Target};
    use crate::history::{DetectionRecord, IncidentRecord};
    use crate::livekit::RoomName;
    use crate::probe::{Evidence, Outcome, Reason};
    use crate::report::BatchReport;
    use crate::report::sample::{WELL, failed, mixed, probe as sample_probe, project};

    const COUNT: u8 = 5;

    /// Five batches, `b-0` the oldest; every other one failed.
    fn batches() -> Vec<BatchReport> {
        let batch = |number: u8| {
            let outcome = match number % 2 {
                0 => Outcome::Ok,
                _ => failed(Reason::AgentSilent, "no speech"),
            };
            let mut probe = sample_probe(number, outcome, Evidence::default(), WELL);
            probe.room = RoomName(format!("canary-x-{number}"));
            let mut batch = mixed();
            batch.batch_id = format!("b-{number}");
            batch.started_at += TimeDelta::seconds(number.into());
            batch.probes = vec![probe];
            batch.not_opened = None;
            if number == 3 {
                batch.purpose = Purpose::Confirmation;
            }
            batch
        };
        (0..COUNT).map(batch).collect()
    }

    /// Of five incidents, the last one is open; every other one is of target `support`.
    fn incident(number: u8) -> DetectionRecord {
        let target = ["support", "sales"][usize::from(number % 2)];
        let ended_at = mixed().ended_at;
        let incident = IncidentRecord {
            id: format!("i-{number}"),
            target: target.to_owned(),
            project: "acme".to_owned(),
            fault: "agent".to_owned(),
            began_at: mixed().started_at,
            ended_at: (number + 1 < COUNT).then_some(ended_at),
            document: format!("{{\"id\":\"i-{number}\",\"rooms\":[]}}"),
        };
        DetectionRecord {
            target: target.to_owned(),
            state: "{}".to_owned(),
            incident: Some(incident),
            messages: Vec::new(),
        }
    }

    async fn history() -> (History, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let settings = config::HistorySettings {
            dir: folder.path().join("state"),
            ..config::HistorySettings::default()
        };
        // The clock shows the batches' own day, so that none is too old for the history.
        let clock = Arc::new(|| mixed().ended_at);
        let history = History::open_with_clock(&settings, clock).unwrap();
        for batch in batches() {
            history.record(&batch, &Target::default(), &project());
        }
        for number in 0..COUNT {
            history.record_detection(incident(number));
        }
        // After closing, everything is on disk and can still be read.
        let deadline = Instant::now() + Duration::from_secs(20);
        assert!(history.close(deadline).await);
        (history, folder)
    }

    async fn listed(history: &History, query: &str) -> (Vec<String>, Option<String>) {
        let uri = format!("/api/v1/batches?{query}").parse().unwrap();
        let response = super::batches(history, &uri).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap();
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let ids = body["batches"].as_array().unwrap().iter();
        (
            ids.map(|batch| text(&batch["batch_id"]).unwrap()).collect(),
            text(&body["next_before"]),
        )
    }

    #[tokio::test]
    async fn query_selects_and_pages_the_batches() {
        let (history, _folder) = history().await;
        for (query, ids, next) in [
            ("", &["b-4", "b-3", "b-2", "b-1", "b-0"][..], None),
            ("limit=5", &["b-4", "b-3", "b-2", "b-1", "b-0"], None),
            ("limit=2", &["b-4", "b-3"], Some("b-3")),
            ("limit=2&before=b-3", &["b-2", "b-1"], Some("b-1")),
            ("limit=2&before=b-1", &["b-0"], None),
            ("before=b-0", &[], None),
            ("result=failed", &["b-3", "b-1"], None),
            ("result=limited", &[], None),
            ("purpose=confirmation", &["b-3"], None),
            ("purpose=scheduled&result=failed", &["b-1"], None),
            ("purpose=manual", &[], None),
            ("target=unknown", &[], None),
            ("target=support&result=ok&limit=1", &["b-4"], Some("b-4")),
        ] {
            let listed = listed(&history, query).await;
            let expected = ids.iter().map(|id| (*id).to_owned()).collect();
            assert_eq!(listed, (expected, next.map(str::to_owned)), "{query}");
        }
    }

    #[tokio::test]
    async fn batch_includes_its_probes_and_a_probe_is_found_by_its_room() {
        let (history, _folder) = history().await;
        let document = async |response: Result<ServerResponse, HttpError>| {
            let body = response.unwrap().into_body().collect().await.unwrap();
            serde_json::from_slice::<Value>(&body.to_bytes()).unwrap()
        };
        let one = document(super::batch(&history, "b-1").await).await;
        assert_eq!(one["result"], "failed");
        assert_eq!(one["probes"][0]["room"], "canary-x-1");
        let probe = document(super::probe(&history, "canary-x-1").await).await;
        assert_eq!(probe["reason"], "agent_silent");
        assert_eq!(probe["batch_id"], "b-1");
        for missing in [
            super::batch(&history, "b-9").await,
            super::probe(&history, "canary-x-9").await,
            super::batch(&history, "' OR 1=1 --").await,
        ] {
            assert_eq!(ServerResponse::from(missing.err().unwrap()).status(), 404);
        }
    }

    #[tokio::test]
    async fn query_selects_and_pages_the_incidents_and_returns_their_documents() {
        let (history, _folder) = history().await;
        let body = async |response: Result<ServerResponse, HttpError>| {
            let body = response.unwrap().into_body().collect().await.unwrap();
            serde_json::from_slice::<Value>(&body.to_bytes()).unwrap()
        };
        for (query, ids, next) in [
            ("", &["i-4", "i-3", "i-2", "i-1", "i-0"][..], None),
            ("limit=2", &["i-4", "i-3"], Some("i-3")),
            ("limit=2&before=i-3", &["i-2", "i-1"], Some("i-1")),
            ("before=i-0", &[], None),
            ("open=true", &["i-4"], None),
            ("open=false&limit=4", &["i-3", "i-2", "i-1", "i-0"], None),
            ("target=sales", &["i-3", "i-1"], None),
            ("target=sales&open=true", &[], None),
            ("target=support&open=false", &["i-2", "i-0"], None),
        ] {
            let uri = format!("/api/v1/incidents?{query}").parse().unwrap();
            let page = body(super::incidents(&history, &uri).await).await;
            let listed = page["incidents"].as_array().unwrap().iter();
            let listed: Vec<_> = listed.map(|it| it["id"].as_str().unwrap()).collect();
            assert_eq!(
                (listed, page["next_before"].as_str()),
                (ids.to_vec(), next),
                "{query}"
            );
        }
        let one = body(super::incident(&history, "i-2").await).await;
        assert_eq!(one, serde_json::json!({"id": "i-2", "rooms": []}));
        let missing = super::incident(&history, "i-9").await.err().unwrap();
        assert_eq!(ServerResponse::from(missing).status(), 404);
    }

    #[test]
    fn query_that_would_be_ignored_is_an_error() {
        for (query, expected) in [
            (
                "targets=a",
                "\"targets\" is unknown; the known keys are target, result, purpose, limit, before",
            ),
            ("target=a&target=b", "\"target\" is given twice"),
            ("target=", "\"\" is not a target's name"),
            ("target=a%20b", "\"a b\" is not a target's name"),
            (
                "result=good",
                "\"good\" is not one of ok, degraded, failed, limited, aborted",
            ),
            ("result=OK", "\"OK\" is not one of"),
            (
                "purpose=drill",
                "\"drill\" is not one of scheduled, confirmation, manual",
            ),
            ("limit=0", "\"0\" is not a number from 1 to 199"),
            ("limit=200", "\"200\" is not a number"),
            ("limit=-1", "\"-1\" is not a number"),
            ("limit=99999999999999999999", "is not a number"),
            ("limit", "\"\" is not a number"),
            ("before=", "\"\" is not a batch's id"),
            ("before=%FF", "is not a batch's id"),
        ] {
            let uri = format!("/?{query}").parse().unwrap();
            let error = batch_filter(&uri).unwrap_err();
            assert!(error.text().contains(expected), "{query}: {}", error.text());
        }
        for (query, expected) in [
            (
                "result=ok",
                "\"result\" is unknown; the known keys are target, open, limit, before",
            ),
            ("open=yes", "\"yes\" is not true or false"),
            ("open=", "\"\" is not true or false"),
            ("before=a%20b", "\"a b\" is not an incident's id"),
            ("limit=200", "\"200\" is not a number"),
        ] {
            let uri = format!("/?{query}").parse().unwrap();
            let error = incident_filter(&uri).unwrap_err();
            assert!(error.text().contains(expected), "{query}: {}", error.text());
        }
        let long = format!("/?limit={}", "9".repeat(5000)).parse().unwrap();
        assert!(batch_filter(&long).unwrap_err().text().len() < 200);
        assert!(query(&"/?a=1".parse().unwrap(), []).is_err());
        assert!(query(&"/?".parse().unwrap(), []).is_ok());
    }
}
