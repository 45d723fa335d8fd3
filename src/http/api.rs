//! The API's answers from the history, and what a query may say.

use std::time::Duration;

use http::{StatusCode, Uri};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tracing::warn;
use url::form_urlencoded;

use super::answer::{Answer, Refusal, json};
use crate::history::{BatchFilter, History, MAX_BATCHES, ReadError};

/// The labels of a batch's result, as metrics have them.
const RESULTS: [&str; 5] = ["ok", "degraded", "failed", "limited", "aborted"];
/// Most batches of an answer; one more is read.
const MOST_LISTED: usize = MAX_BATCHES - 1;
/// Batches of an answer where the query doesn't say.
const USUAL_LIMIT: usize = 50;

#[derive(Serialize)]
struct Batches {
    /// The latest first, without their probes.
    batches: Vec<Box<RawValue>>,
    /// What `before` must be for those that follow; null where there are no more.
    next_before: Option<String>,
}

pub(super) async fn batches(history: &History, uri: &Uri) -> Result<Answer, Refusal> {
    let filter = filter(uri)?;
    let limit = filter.limit;
    // One more than asked for tells whether there are more.
    let filter = BatchFilter {
        limit: limit + 1,
        ..filter
    };
    let mut batches = history.batches(filter).await.map_err(unreadable)?;
    let more = batches.len() > limit;
    batches.truncate(limit);
    let last = batches.last().filter(|_| more);
    let next_before = last.and_then(|batch| id(batch));
    let found = Batches {
        batches,
        next_before,
    };
    Ok(json(StatusCode::OK, &found))
}

fn id(batch: &RawValue) -> Option<String> {
    #[derive(Deserialize)]
    struct Head {
        batch_id: String,
    }
    let head: Head = serde_json::from_str(batch.get()).ok()?;
    Some(head.batch_id)
}

pub(super) async fn batch(history: &History, id: &str) -> Result<Answer, Refusal> {
    let found = history.batch(id.to_owned()).await.map_err(unreadable)?;
    let missing = "no batch that has ended has this id, or it is no longer kept; /api/v1/batches lists those there are";
    let found = found.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, missing))?;
    Ok(json(StatusCode::OK, &found))
}

/// `room`: a probe's id is the name of its room.
pub(super) async fn probe(history: &History, room: &str) -> Result<Answer, Refusal> {
    let found = history.probe(room.to_owned()).await.map_err(unreadable)?;
    let missing = "no batch that is kept has a probe of this room; /api/v1/batches/{id} lists a batch's probes";
    let found = found.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, missing))?;
    Ok(json(StatusCode::OK, &found))
}

fn unreadable(error: ReadError) -> Refusal {
    let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string());
    match error {
        ReadError::Busy => refusal.retry_after(Duration::from_secs(5)),
        ReadError::Failed(source) => {
            warn!("HTTP: the history can't be read: {source}");
            refusal
        }
    }
}

fn filter(uri: &Uri) -> Result<BatchFilter, Refusal> {
    let [target, result, limit, before] = query(uri, ["target", "result", "limit", "before"])?;
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if let Some(target) = &target
        && (target.is_empty() || !target.bytes().all(word))
    {
        return Err(bad(
            "target",
            target,
            "a target's name: /api/v1/targets lists them",
        ));
    }
    if let Some(result) = &result
        && !RESULTS.contains(&result.as_str())
    {
        let expected = format!("one of {}", RESULTS.join(", "));
        return Err(bad("result", result, &expected));
    }
    if let Some(before) = &before
        && (before.is_empty() || !before.bytes().all(word))
    {
        return Err(bad("before", before, "a batch's id"));
    }
    let limit = limit.map_or(Ok(USUAL_LIMIT), |limit| {
        let number = limit.parse().ok();
        number
            .filter(|number| (1..=MOST_LISTED).contains(number))
            .ok_or_else(|| {
                bad(
                    "limit",
                    &limit,
                    &format!("a number from 1 to {MOST_LISTED}"),
                )
            })
    })?;
    Ok(BatchFilter {
        target,
        result,
        before,
        limit,
    })
}

fn bad(key: &str, value: &str, expected: &str) -> Refusal {
    let shown: String = value.chars().take(40).collect();
    Refusal::new(
        StatusCode::BAD_REQUEST,
        format!("{key}: {shown:?} is not {expected}"),
    )
}

/// The values of these keys.
///
/// # Errors
/// Another key, or one given twice: what would be ignored was meant to say something.
pub(super) fn query<const N: usize>(
    uri: &Uri,
    known: [&str; N],
) -> Result<[Option<String>; N], Refusal> {
    let mut values = [const { None }; N];
    for (key, value) in form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()) {
        let refusal = |verdict| {
            let shown: String = key.chars().take(40).collect();
            let text = format!("query key {shown:?} {verdict}");
            Refusal::new(StatusCode::BAD_REQUEST, text)
        };
        let Some(place) = known.iter().position(|known| *known == key) else {
            return Err(refusal(match known.len() {
                0 => "is not known: this path takes no query".to_owned(),
                _ => format!("is not known; known are {}", known.join(", ")),
            }));
        };
        if values[place].replace(value.into_owned()).is_some() {
            return Err(refusal("is given twice".to_owned()));
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
    use crate::report::sample::{WELL, failed, mixed, probe as sample_probe, project};
    use crate::report::{BatchReport, BatchResult};

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
        // On the batches' own day none is too old to be kept.
        let clock = Arc::new(|| mixed().ended_at);
        let history = History::open_with_clock(&settings, clock).unwrap();
        for batch in batches() {
            history.record(&batch, &Target::default(), &project());
        }
        // All is on disk then, and can still be read.
        let soon = Instant::now() + Duration::from_secs(20);
        assert!(history.close(soon).await);
        (history, folder)
    }

    async fn listed(history: &History, query: &str) -> (Vec<String>, Option<String>) {
        let uri = format!("/api/v1/batches?{query}").parse().unwrap();
        let answer = super::batches(history, &uri).await.unwrap();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap();
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let ids = body["batches"].as_array().unwrap().iter();
        (
            ids.map(|batch| text(&batch["batch_id"]).unwrap()).collect(),
            text(&body["next_before"]),
        )
    }

    #[tokio::test]
    async fn batches_are_listed_page_by_page_and_by_what_the_query_says() {
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
            ("target=nobody", &[], None),
            ("target=support&result=ok&limit=1", &["b-4"], Some("b-4")),
        ] {
            let listed = listed(&history, query).await;
            let expected = ids.iter().map(|id| (*id).to_owned()).collect();
            assert_eq!(listed, (expected, next.map(str::to_owned)), "{query}");
        }
    }

    #[tokio::test]
    async fn batch_has_its_probes_and_a_probe_stands_alone() {
        let (history, _folder) = history().await;
        let document = async |answer: Result<Answer, Refusal>| {
            let body = answer.unwrap().into_body().collect().await.unwrap();
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
            assert_eq!(Answer::from(missing.err().unwrap()).status(), 404);
        }
    }

    #[test]
    fn query_that_would_be_ignored_is_refused() {
        for (query, said) in [
            (
                "targets=a",
                "\"targets\" is not known; known are target, result, limit, before",
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
            assert!(error.text().contains(said), "{query}: {}", error.text());
        }
        let long = format!("/?limit={}", "9".repeat(5000)).parse().unwrap();
        assert!(filter(&long).unwrap_err().text().len() < 200);
        assert!(query(&"/?a=1".parse().unwrap(), []).is_err());
        assert!(query(&"/?".parse().unwrap(), []).is_ok());
    }

    #[test]
    fn results_are_those_that_a_batch_can_have() {
        assert_eq!(RESULTS, BatchResult::ALL.map(BatchResult::label));
    }
}
