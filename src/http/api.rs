//! The responses of the API that come from the history, and the queries that they accept.

use std::time::Duration;

use chrono::{DateTime, Utc};
use http::header::{CONTENT_DISPOSITION, LINK};
use http::{HeaderValue, StatusCode, Uri};
use serde::Serialize;
use serde_json::value::RawValue;
use strum::VariantArray;
use tracing::warn;
use url::form_urlencoded;

use super::access::Protection;
use super::response::{HttpError, ServerResponse, json, response};
use super::{csv, sensitive};
use crate::history::{
    BatchFilter, EventFilter, History, HistoryEvent, IncidentFilter, MAX_BATCHES, ProbeCursor,
    ProbeFilter, ReadError, RoomFilter, StoredDocument,
};
use crate::metrics::Metrics;
use crate::probe::{Origin, Outcome, Reason};
use crate::report::{BatchResult, Purpose};

/// The most documents in one response. One less than the history returns, because one more is read.
const MAX_LIMIT: usize = MAX_BATCHES - 1;
/// Documents in a response if the query has no `limit`.
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

#[derive(Serialize)]
struct ProbePage {
    /// The latest first.
    probes: Vec<Box<RawValue>>,
    /// The value of `before` for the next page; null on the last page.
    next_before: Option<String>,
}

#[derive(Serialize)]
struct EventPage {
    /// The latest first.
    events: Vec<HistoryEvent>,
    /// The value of `before` for the next page; null on the last page.
    next_before: Option<String>,
}

/// The history, as the client of one request may see it.
#[derive(Clone, Copy)]
pub(super) struct Api<'a> {
    pub(super) history: &'a History,
    pub(super) metrics: &'a Metrics,
    pub(super) protection: Protection,
}

impl Api<'_> {
    pub(super) async fn batches(&self, uri: &Uri) -> Result<ServerResponse, HttpError> {
        let (filter, format) = batch_filter(uri)?;
        let (batches, next_before) = self.find_batches(filter).await?;
        match format {
            Format::Csv => self.csv(
                "batches.csv",
                csv::BATCH_COLUMNS,
                &batches,
                uri,
                next_before,
            ),
            Format::Json => Ok(json(
                StatusCode::OK,
                &BatchPage {
                    batches: documents(batches),
                    next_before,
                },
            )),
        }
    }

    /// A page of the list, and the value of `before` for the next page.
    pub(super) async fn find_batches(
        &self,
        mut filter: BatchFilter,
    ) -> Result<(Vec<StoredDocument>, Option<String>), HttpError> {
        let limit = filter.limit;
        filter.limit += 1;
        let found = self.history.batches(filter).await.map_err(unreadable)?;
        Ok(page(found, limit, |it| &it.id))
    }

    pub(super) async fn batch(&self, id: &str) -> Result<ServerResponse, HttpError> {
        Ok(json(StatusCode::OK, &self.find_batch(id).await?))
    }

    /// The document without what this client may not read.
    pub(super) async fn find_batch(&self, id: &str) -> Result<Box<RawValue>, HttpError> {
        let missing =
            "the history has no ended batch with this id; /api/v1/batches lists those it has";
        let document = found(self.history.batch(id.to_owned()).await, missing)?;
        self.disclose(&document)
    }

    pub(super) async fn probes(&self, uri: &Uri) -> Result<ServerResponse, HttpError> {
        let (filter, format) = probe_filter(uri)?;
        let (probes, next_before) = self.find_probes(filter).await?;
        match format {
            Format::Csv => self.csv("probes.csv", csv::PROBE_COLUMNS, &probes, uri, next_before),
            Format::Json => {
                let probes = probes.iter().map(|probe| self.disclose(&probe.document));
                let page = ProbePage {
                    probes: probes.collect::<Result<_, _>>()?,
                    next_before,
                };
                Ok(json(StatusCode::OK, &page))
            }
        }
    }

    /// A page of the list, with what people said: only [`Self::probes`] removes that.
    pub(super) async fn find_probes(
        &self,
        mut filter: ProbeFilter,
    ) -> Result<(Vec<StoredDocument>, Option<String>), HttpError> {
        let limit = filter.limit;
        filter.limit += 1;
        let found = self.history.probes(filter).await.map_err(unreadable)?;
        Ok(page(found, limit, |it| &it.id))
    }

    /// A probe's id is the name of its room.
    pub(super) async fn probe(&self, room: &str) -> Result<ServerResponse, HttpError> {
        Ok(json(StatusCode::OK, &self.find_probe(room).await?))
    }

    /// The document without what this client may not read.
    pub(super) async fn find_probe(&self, room: &str) -> Result<Box<RawValue>, HttpError> {
        let missing = "the history has no probe of this room; /api/v1/probes lists those it has";
        let document = found(self.history.probe(room.to_owned()).await, missing)?;
        self.disclose(&document)
    }

    pub(super) async fn incidents(&self, uri: &Uri) -> Result<ServerResponse, HttpError> {
        let (incidents, next_before) = self.find_incidents(incident_filter(uri)?).await?;
        let page = IncidentPage {
            incidents: documents(incidents),
            next_before,
        };
        Ok(json(StatusCode::OK, &page))
    }

    pub(super) async fn find_incidents(
        &self,
        mut filter: IncidentFilter,
    ) -> Result<(Vec<StoredDocument>, Option<String>), HttpError> {
        let limit = filter.limit;
        filter.limit += 1;
        let found = self.history.incidents(filter).await.map_err(unreadable)?;
        Ok(page(found, limit, |it| &it.id))
    }

    pub(super) async fn incident(&self, id: &str) -> Result<ServerResponse, HttpError> {
        Ok(json(StatusCode::OK, &self.find_incident(id).await?))
    }

    pub(super) async fn find_incident(&self, id: &str) -> Result<Box<RawValue>, HttpError> {
        let missing =
            "the history has no incident with this id; /api/v1/incidents lists those it has";
        found(self.history.incident(id.to_owned()).await, missing)
    }

    pub(super) async fn events(&self, uri: &Uri) -> Result<ServerResponse, HttpError> {
        let mut filter = event_filter(uri)?;
        let limit = filter.limit;
        filter.limit += 1;
        let events = self.history.events(filter).await.map_err(unreadable)?;
        let (events, next_before) = page(events, limit, |it| &it.id);
        let page = EventPage {
            events,
            next_before,
        };
        Ok(json(StatusCode::OK, &page))
    }

    pub(super) async fn statistics(&self, now: DateTime<Utc>) -> Result<ServerResponse, HttpError> {
        let statistics = self
            .history
            .statistics(now, None)
            .await
            .map_err(unreadable)?;
        Ok(json(StatusCode::OK, &statistics))
    }

    fn disclose(&self, document: &RawValue) -> Result<Box<RawValue>, HttpError> {
        sensitive::disclose(document, self.protection).map_err(|error| self.unusable(&error))
    }

    /// A download with one row per document. The address of the next page is in the header `Link`.
    fn csv(
        &self,
        file: &str,
        columns: &[csv::Column],
        documents: &[StoredDocument],
        uri: &Uri,
        next_before: Option<String>,
    ) -> Result<ServerResponse, HttpError> {
        let rows = csv::render(columns, documents).map_err(|error| self.unusable(&error))?;
        let mut response = response(
            StatusCode::OK,
            "text/csv; charset=utf-8; header=present",
            rows,
        );
        let headers = response.headers_mut();
        let disposition = format!("attachment; filename=\"{file}\"");
        let mut set = |name, value: String| {
            let value = HeaderValue::try_from(value);
            headers.insert(
                name,
                value.expect("file names and encoded queries are ASCII"),
            );
        };
        set(CONTENT_DISPOSITION, disposition);
        if let Some(next_before) = next_before {
            // Relative, so that it works behind a prefix of a proxy (RFC 8288).
            let next = with_before(uri, &next_before);
            set(LINK, format!("<?{next}>; rel=\"next\""));
        }
        Ok(response)
    }

    fn unusable(&self, error: &serde_json::Error) -> HttpError {
        warn!("HTTP: a document of the history can't be read: {error}");
        let text = "a document of the history can't be read; the log says why";
        HttpError::internal(self.metrics, text)
    }
}

/// The query with another `before`.
pub(super) fn with_before(uri: &Uri, before: &str) -> String {
    let pairs = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
    let others = pairs.filter(|(key, _)| key != "before");
    form_urlencoded::Serializer::new(String::new())
        .extend_pairs(others)
        .append_pair("before", before)
        .finish()
}

/// The first `limit` of what was found with a limit of one more. If there is one more, also the value of `before` for the next
/// page.
fn page<T>(mut found: Vec<T>, limit: usize, id: fn(&T) -> &str) -> (Vec<T>, Option<String>) {
    let more = found.len() > limit;
    found.truncate(limit);
    let last = found.last().filter(|_| more);
    let next_before = last.map(|last| id(last).to_owned());
    (found, next_before)
}

fn documents(found: Vec<StoredDocument>) -> Vec<Box<RawValue>> {
    found.into_iter().map(|it| it.document).collect()
}

/// # Errors
/// 404 with the text `missing` if the history has no such document, 503 if it can't be read.
fn found(
    found: Result<Option<Box<RawValue>>, ReadError>,
    missing: &str,
) -> Result<Box<RawValue>, HttpError> {
    let found = found.map_err(unreadable)?;
    found.ok_or_else(|| HttpError::new(StatusCode::NOT_FOUND, missing))
}

pub(super) fn unreadable(error: ReadError) -> HttpError {
    let response = HttpError::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string());
    match error {
        ReadError::Busy => response.retry_after(Duration::from_secs(5)),
        ReadError::Failed(source) => {
            warn!("HTTP: cannot read the history: {source}");
            response
        }
    }
}

/// The form of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub(super) enum Format {
    Json,
    Csv,
}

impl Format {
    fn label(self) -> &'static str {
        self.into()
    }
}

pub(super) fn batch_filter(uri: &Uri) -> Result<(BatchFilter, Format), HttpError> {
    let keys = [
        "target", "result", "purpose", "reason", "origin", "node", "worker", "since", "until",
        "limit", "before", "format",
    ];
    let values = query(uri, keys)?;
    let [
        target,
        result,
        purpose,
        reason,
        origin,
        node,
        worker,
        since,
        until,
        limit,
        before,
        format,
    ] = values;
    let (since, until) = period(since, until)?;
    let filter = BatchFilter {
        target: name("target", target, TARGET_NAME)?,
        result: one_of("result", result, &BatchResult::ALL, BatchResult::label)?,
        purpose: one_of("purpose", purpose, &Purpose::ALL, Purpose::label)?,
        since,
        until,
        with_room: room_filter(reason, origin, node, worker)?,
        before: name("before", before, "a batch's id")?,
        limit: self::limit(limit)?,
    };
    Ok((filter, self::format(format)?))
}

pub(super) fn probe_filter(uri: &Uri) -> Result<(ProbeFilter, Format), HttpError> {
    let keys = [
        "target", "outcome", "purpose", "reason", "origin", "node", "worker", "since", "until",
        "limit", "before", "format",
    ];
    let values = query(uri, keys)?;
    let [
        target,
        outcome,
        purpose,
        reason,
        origin,
        node,
        worker,
        since,
        until,
        limit,
        before,
        format,
    ] = values;
    let before = before.map(|before| {
        let parsed = before.parse::<ProbeCursor>();
        parsed.map_err(|()| bad_value("before", &before, "the next_before of an earlier answer"))
    });
    let (since, until) = period(since, until)?;
    let filter = ProbeFilter {
        target: name("target", target, TARGET_NAME)?,
        outcome: one_of("outcome", outcome, &Outcome::LABELS, |label| label)?,
        purpose: one_of("purpose", purpose, &Purpose::ALL, Purpose::label)?,
        since,
        until,
        room: room_filter(reason, origin, node, worker)?,
        before: before.transpose()?,
        limit: self::limit(limit)?,
    };
    Ok((filter, self::format(format)?))
}

fn room_filter(
    reason: Option<String>,
    origin: Option<String>,
    node: Option<String>,
    worker: Option<String>,
) -> Result<RoomFilter, HttpError> {
    Ok(RoomFilter {
        reason: one_of("reason", reason, &Reason::ALL, Reason::label)?,
        origin: one_of("origin", origin, Origin::VARIANTS, Origin::label)?,
        node: text("node", node, "the id of a LiveKit node")?,
        worker: text("worker", worker, "the id of a worker")?,
    })
}

fn event_filter(uri: &Uri) -> Result<EventFilter, HttpError> {
    let keys = ["target", "since", "until", "limit", "before"];
    let [target, since, until, limit, before] = query(uri, keys)?;
    let (since, until) = period(since, until)?;
    Ok(EventFilter {
        target: name("target", target, TARGET_NAME)?,
        since,
        until,
        before: name("before", before, "an event's id")?,
        limit: self::limit(limit)?,
    })
}

pub(super) fn incident_filter(uri: &Uri) -> Result<IncidentFilter, HttpError> {
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

/// A name that LiveKit chose, if there is one.
fn text(key: &str, value: Option<String>, expected: &str) -> Result<Option<String>, HttpError> {
    match value {
        Some(value) if value.is_empty() || value.chars().any(char::is_control) => {
            Err(bad_value(key, &value, expected))
        }
        value => Ok(value),
    }
}

fn format(format: Option<String>) -> Result<Format, HttpError> {
    let format = one_of("format", format, Format::VARIANTS, Format::label)?;
    Ok(format.unwrap_or(Format::Json))
}

type Period = (Option<DateTime<Utc>>, Option<DateTime<Utc>>);

fn period(since: Option<String>, until: Option<String>) -> Result<Period, HttpError> {
    let time = |key: &str, value: Option<String>| {
        let parsed = value.map(|value| {
            let parsed = DateTime::parse_from_rfc3339(&value);
            let expected =
                "a time of RFC 3339, such as 2026-09-21T14:00:00Z (+ in a query is written as %2B)";
            parsed.map_err(|_| bad_value(key, &value, expected))
        });
        let parsed = parsed.transpose()?;
        Ok::<_, HttpError>(parsed.map(|time| time.to_utc()))
    };
    let (start, end) = (time("since", since)?, time("until", until.clone())?);
    match (start, end, until) {
        (Some(start), Some(end), Some(until)) if end <= start => {
            Err(bad_value("until", &until, "later than since"))
        }
        _ => Ok((start, end)),
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
    use crate::metrics::Build;
    use crate::probe::Evidence;
    use crate::report::BatchReport;
    use crate::report::sample::{
        WELL, assert_same_keys, failed, mixed, probe as sample_probe, project,
    };

    const COUNT: u8 = 5;

    /// What a handler needs besides the history. Its client may read everything.
    struct ApiFixture {
        history: History,
        metrics: Metrics,
    }

    impl ApiFixture {
        fn new(history: &History) -> Self {
            let build = Build {
                version: "1.2.3".to_owned(),
                revision: "0a1b2c3".to_owned(),
                rustc: "1.95.0".to_owned(),
                engine: "native".to_owned(),
            };
            Self {
                history: history.clone(),
                metrics: Metrics::new(&build, false),
            }
        }

        fn api(&self) -> Api<'_> {
            Api {
                history: &self.history,
                metrics: &self.metrics,
                protection: Protection {
                    has_users: true,
                    ..Protection::default()
                },
            }
        }
    }

    async fn body(response: Result<ServerResponse, HttpError>) -> Value {
        let body = response.unwrap().into_body().collect().await.unwrap();
        serde_json::from_slice(&body.to_bytes()).unwrap()
    }

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
        let fixture = ApiFixture::new(history);
        let response = fixture.api().batches(&uri).await.unwrap();
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
        let fixture = ApiFixture::new(&history);
        let api = fixture.api();
        let one = body(api.batch("b-1").await).await;
        assert_eq!(one["result"], "failed");
        assert_eq!(one["probes"][0]["room"], "canary-x-1");
        let probe = body(api.probe("canary-x-1").await).await;
        assert_eq!(probe["reason"], "agent_silent");
        assert_eq!(probe["batch_id"], "b-1");
        for missing in [
            api.batch("b-9").await,
            api.probe("canary-x-9").await,
            api.batch("' OR 1=1 --").await,
        ] {
            assert_eq!(ServerResponse::from(missing.err().unwrap()).status(), 404);
        }
    }

    #[tokio::test]
    async fn query_selects_and_pages_the_incidents_and_returns_their_documents() {
        let (history, _folder) = history().await;
        let fixture = ApiFixture::new(&history);
        let api = fixture.api();
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
            let page = body(api.incidents(&uri).await).await;
            let listed = page["incidents"].as_array().unwrap().iter();
            let listed: Vec<_> = listed.map(|it| it["id"].as_str().unwrap()).collect();
            assert_eq!(
                (listed, page["next_before"].as_str()),
                (ids.to_vec(), next),
                "{query}"
            );
        }
        let one = body(api.incident("i-2").await).await;
        assert_eq!(one, serde_json::json!({"id": "i-2", "rooms": []}));
        let missing = api.incident("i-9").await.err().unwrap();
        assert_eq!(ServerResponse::from(missing).status(), 404);
    }

    #[tokio::test]
    async fn statistics_have_the_shape_that_the_docs_show() {
        let (history, _folder) = history().await;
        let fixture = ApiFixture::new(&history);
        let found = body(fixture.api().statistics(mixed().ended_at).await).await;
        let docs = include_str!("../../docs/api.md");
        let (_, section) = docs.split_once("\n## Statistics\n").unwrap();
        let (_, example) = section.split_once("```json\n").unwrap();
        let (example, _) = example.split_once("```").unwrap();
        let mut example: Value = serde_json::from_str(example).unwrap();
        let span = example["targets"][0]["compared"][0]["now"].clone();
        for spans in ["hours", "hours_before", "days"] {
            example["targets"][0][spans] = serde_json::json!([span]);
        }
        assert_same_keys(&example, &found, "");
    }

    #[test]
    fn query_that_would_be_ignored_is_an_error() {
        for (query, expected) in [
            (
                "targets=a",
                "\"targets\" is unknown; the known keys are target, result, purpose, reason, origin, node, worker, since, until, \
                 limit, before, format",
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
            ("outcome=ok", "\"outcome\" is unknown"),
            (
                "reason=silent",
                "\"silent\" is not one of agent_no_show, dispatch_unanswered",
            ),
            (
                "origin=me",
                "\"me\" is not one of agent, undetermined, livekit",
            ),
            ("node=", "\"\" is not the id of a LiveKit node"),
            ("worker=a%0Ab", "is not the id of a worker"),
            ("since=yesterday", "\"yesterday\" is not a time of RFC 3339"),
            (
                "until=2026-09-21T14:00:00+02:00",
                "+ in a query is written as %2B",
            ),
            (
                "since=2026-09-21T14:00:00Z&until=2026-09-21T14:00:00Z",
                "until: \"2026-09-21T14:00:00Z\" is not later than since",
            ),
            ("format=xml", "\"xml\" is not one of json, csv"),
        ] {
            let uri = format!("/?{query}").parse().unwrap();
            let error = batch_filter(&uri).unwrap_err();
            assert!(error.text().contains(expected), "{query}: {}", error.text());
        }
        for (query, expected) in [
            ("result=ok", "the known keys are target, outcome, purpose"),
            ("outcome=good", "\"good\" is not one of ok, failed, aborted"),
            (
                "before=canary-1",
                "\"canary-1\" is not the next_before of an earlier answer",
            ),
        ] {
            let uri = format!("/?{query}").parse().unwrap();
            let error = probe_filter(&uri).unwrap_err();
            assert!(error.text().contains(expected), "{query}: {}", error.text());
        }
        let with_offset = "/?since=2026-09-21T14:00:00%2B02:00".parse().unwrap();
        let (filter, _) = batch_filter(&with_offset).unwrap();
        assert_eq!(filter.since, "2026-09-21T12:00:00Z".parse().ok());
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
