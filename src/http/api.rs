//! The responses of the API that come from the history, and the queries that they accept.

use std::time::Duration;

use http::{StatusCode, Uri};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tracing::warn;
use url::form_urlencoded;

use super::response::{HttpError, ServerResponse, json};
use crate::history::{BatchFilter, History, MAX_BATCHES, ReadError};
use crate::report::BatchResult;

/// The most batches in one response. One less than the history returns, because one more is read.
const MAX_LIMIT: usize = MAX_BATCHES - 1;
/// Batches in a response if the query has no `limit`.
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

pub(super) async fn batches(history: &History, uri: &Uri) -> Result<ServerResponse, HttpError> {
    let filter = filter(uri)?;
    let limit = filter.limit;
    // One more than requested shows whether there is a next page.
    let filter = BatchFilter {
        limit: limit + 1,
        ..filter
    };
    let mut batches = history.batches(filter).await.map_err(unreadable)?;
    let more = batches.len() > limit;
    batches.truncate(limit);
    let last = batches.last().filter(|_| more);
    let next_before = last.and_then(|batch| batch_id(batch));
    let page = BatchPage {
        batches,
        next_before,
    };
    Ok(json(StatusCode::OK, &page))
}

fn batch_id(batch: &RawValue) -> Option<String> {
    #[derive(Deserialize)]
    struct WithBatchId {
        batch_id: String,
    }
    let batch: WithBatchId = serde_json::from_str(batch.get()).ok()?;
    Some(batch.batch_id)
}

pub(super) async fn batch(history: &History, id: &str) -> Result<ServerResponse, HttpError> {
    let found = history.batch(id.to_owned()).await.map_err(unreadable)?;
    let missing = "the history has no ended batch with this id; /api/v1/batches lists those it has";
    let found = found.ok_or_else(|| HttpError::new(StatusCode::NOT_FOUND, missing))?;
    Ok(json(StatusCode::OK, &found))
}

/// A probe's id is the name of its room.
pub(super) async fn probe(history: &History, room: &str) -> Result<ServerResponse, HttpError> {
    let found = history.probe(room.to_owned()).await.map_err(unreadable)?;
    let missing = "the history has no probe of this room; /api/v1/batches/{batch_id} lists the probes of a batch";
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

fn filter(uri: &Uri) -> Result<BatchFilter, HttpError> {
    let [target, result, limit, before] = query(uri, ["target", "result", "limit", "before"])?;
    let in_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if let Some(target) = &target
        && (target.is_empty() || !target.bytes().all(in_name))
    {
        return Err(bad_value(
            "target",
            target,
            "a target's name; /api/v1/targets lists all targets",
        ));
    }
    if let Some(result) = &result {
        let labels: Vec<_> = BatchResult::ALL
            .iter()
            .map(|result| result.label())
            .collect();
        if !labels.contains(&result.as_str()) {
            let expected = format!("one of {}", labels.join(", "));
            return Err(bad_value("result", result, &expected));
        }
    }
    if let Some(before) = &before
        && (before.is_empty() || !before.bytes().all(in_name))
    {
        return Err(bad_value("before", before, "a batch's id"));
    }
    let limit = limit.map_or(Ok(DEFAULT_LIMIT), |limit| {
        let number = limit.parse().ok();
        number
            .filter(|number| (1..=MAX_LIMIT).contains(number))
            .ok_or_else(|| bad_value("limit", &limit, &format!("a number from 1 to {MAX_LIMIT}")))
    })?;
    Ok(BatchFilter {
        target,
        result,
        before,
        limit,
    })
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
            batch
        };
        (0..COUNT).map(batch).collect()
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

    #[test]
    fn query_that_would_be_ignored_is_an_error() {
        for (query, expected) in [
            (
                "targets=a",
                "\"targets\" is unknown; the known keys are target, result, limit, before",
            ),
            ("target=a&target=b", "\"target\" is given twice"),
            ("target=", "\"\" is not a target's name"),
            ("target=a%20b", "\"a b\" is not a target's name"),
            (
                "result=good",
                "\"good\" is not one of ok, degraded, failed, limited, aborted",
            ),
            ("result=OK", "\"OK\" is not one of"),
            ("limit=0", "\"0\" is not a number from 1 to 199"),
            ("limit=200", "\"200\" is not a number"),
            ("limit=-1", "\"-1\" is not a number"),
            ("limit=99999999999999999999", "is not a number"),
            ("limit", "\"\" is not a number"),
            ("before=", "\"\" is not a batch's id"),
            ("before=%FF", "is not a batch's id"),
        ] {
            let uri = format!("/?{query}").parse().unwrap();
            let error = filter(&uri).unwrap_err();
            assert!(error.text().contains(expected), "{query}: {}", error.text());
        }
        let long = format!("/?limit={}", "9".repeat(5000)).parse().unwrap();
        assert!(filter(&long).unwrap_err().text().len() < 200);
        assert!(query(&"/?a=1".parse().unwrap(), []).is_err());
        assert!(query(&"/?".parse().unwrap(), []).is_ok());
    }
}
