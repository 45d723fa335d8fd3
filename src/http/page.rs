//! The pages for people: what fails, since when, and room by room what happened.
//!
//! HTML that is complete without its one script, which only follows what changes. Links are relative, so that the pages work behind
//! a prefix of a proxy.

mod batch;
mod docs;
mod document;
mod figure;
mod incident;
mod layout;
mod list;
mod overview;
mod past;
mod probe;
mod target;

use chrono::{DateTime, TimeDelta, Utc};
use http::{StatusCode, Uri};
use serde::Deserialize;
use serde_json::value::RawValue;
use tracing::warn;

use self::document::{BatchDocument, IncidentDocument, ProbeDocument};
use self::incident::Sides;
pub(super) use self::layout::{POLICY, Tone};
use self::list::List;
use self::overview::Overview;
use self::past::Past;
use self::target::TargetPage;
use super::api::{self, Api};
use super::live::LiveProgress;
use super::response::HttpError;
use super::status::Status;
use crate::history::{BatchFilter, EventFilter, IncidentFilter, MAX_BATCHES, ReadError};

/// The files that all pages use, by their names, and the type of each.
pub(super) const ASSETS: [(&str, &str, &str); 2] = [
    (
        "style.css",
        "text/css; charset=utf-8",
        include_str!("page/style.css"),
    ),
    (
        "live.js",
        "text/javascript; charset=utf-8",
        include_str!("page/live.js"),
    ),
];

/// Batches that a page lists.
const RECENT_BATCHES: usize = 20;
/// Incidents that the page of a target lists.
const RECENT_INCIDENTS: usize = 10;

/// Why there is no page.
#[derive(Debug)]
pub(super) enum PageError {
    Http(HttpError),
    /// A document of the history is not as this version expects it.
    Document(serde_json::Error),
    History(ReadError),
}

impl From<ReadError> for PageError {
    fn from(error: ReadError) -> Self {
        Self::History(error)
    }
}

impl From<HttpError> for PageError {
    fn from(error: HttpError) -> Self {
        Self::Http(error)
    }
}

impl From<serde_json::Error> for PageError {
    fn from(error: serde_json::Error) -> Self {
        Self::Document(error)
    }
}

/// What the pages show, at one moment.
pub(super) struct Pages<'a> {
    pub(super) status: &'a Status,
    pub(super) live: &'a LiveProgress,
    /// Withholds what the reader may not see.
    pub(super) api: Api<'a>,
    pub(super) now: DateTime<Utc>,
}

impl Pages<'_> {
    /// The first page. Without the history it shows what the daemon knows by itself.
    pub(super) async fn overview(&self) -> Result<String, PageError> {
        let past = self.past(None).await;
        let overview = Overview {
            status: self.status,
            past: without_history(past)?,
            now: self.now,
        };
        Ok(overview.render())
    }

    pub(super) async fn target(&self, name: &str) -> Result<String, PageError> {
        let missing = || {
            HttpError::new(
                StatusCode::NOT_FOUND,
                "no target has this name; the first page lists all targets",
            )
        };
        let target = self.status.target(name).ok_or_else(missing)?;
        let past = self.past(Some(name)).await;
        let page = TargetPage {
            target,
            past: without_history(past)?,
            now: self.now,
        };
        Ok(page.render())
    }

    /// A batch that is running, or one that has ended.
    pub(super) async fn batch(&self, id: &str) -> Result<String, PageError> {
        if let Some(batch) = self.live.running(id) {
            let page = batch::render_running(id, &batch.target, Some(&batch), self.now);
            return Ok(page);
        }
        match (self.api.find_batch(id).await, self.status.of_batch(id)) {
            (Ok(document), _) => {
                let batch: BatchDocument = serde_json::from_str(document.get())?;
                Ok(batch::render(&batch, self.now))
            }
            // It is about to start, or it has just ended.
            (Err(_), Some(target)) => Ok(batch::render_running(id, &target.name, None, self.now)),
            (Err(error), None) => Err(error.into()),
        }
    }

    pub(super) async fn probe(&self, room: &str) -> Result<String, PageError> {
        let document = self.api.find_probe(room).await?;
        let probe: ProbeDocument = serde_json::from_str(document.get())?;
        Ok(probe::render(&probe, self.now))
    }

    pub(super) async fn incident(&self, id: &str) -> Result<String, PageError> {
        let document = self.api.find_incident(id).await?;
        let incident: IncidentDocument = serde_json::from_str(document.get())?;
        let sides = Sides {
            good: self.side(incident.last_good()).await?,
            bad: self.side(incident.first_bad()).await?,
        };
        Ok(incident::render(&incident, &sides, self.now))
    }

    pub(super) async fn batches(&self, uri: &Uri) -> Result<String, PageError> {
        let query = list::query_of(uri);
        let (filter, _) = api::batch_filter(&query)?;
        let (found, next) = self.api.find_batches(filter).await?;
        let batches = read_all(found.iter().map(|it| &it.document))?;
        Ok(list::batches(&batches, &self.list(&query, next)))
    }

    pub(super) async fn probes(&self, uri: &Uri) -> Result<String, PageError> {
        let query = list::query_of(uri);
        let (filter, _) = api::probe_filter(&query)?;
        let (found, next) = self.api.find_probes(filter).await?;
        let probes = read_all(found.iter().map(|it| &it.document))?;
        Ok(list::probes(&probes, &self.list(&query, next)))
    }

    pub(super) async fn incidents(&self, uri: &Uri) -> Result<String, PageError> {
        let query = list::query_of(uri);
        let filter = api::incident_filter(&query)?;
        let (found, next) = self.api.find_incidents(filter).await?;
        let incidents = read_all(found.iter().map(|it| &it.document))?;
        Ok(list::incidents(&incidents, &self.list(&query, next)))
    }

    fn list<'a>(&'a self, query: &'a Uri, next: Option<String>) -> List<'a> {
        List {
            targets: self
                .status
                .targets
                .iter()
                .map(|target| target.name.as_str())
                .collect(),
            query,
            next,
            now: self.now,
        }
    }

    /// What a page shows of the history: of one target; otherwise of all targets, and only the open incidents.
    async fn past(&self, target: Option<&str>) -> Result<Past, PageError> {
        let incidents = IncidentFilter {
            target: target.map(str::to_owned),
            open: target.is_none().then_some(true),
            limit: if target.is_none() {
                MAX_BATCHES
            } else {
                RECENT_INCIDENTS
            },
            ..IncidentFilter::default()
        };
        let batches = BatchFilter {
            target: target.map(str::to_owned),
            limit: RECENT_BATCHES,
            ..BatchFilter::default()
        };
        let events = EventFilter {
            target: target.map(str::to_owned),
            since: Some(self.now - TimeDelta::days(30)),
            limit: MAX_BATCHES,
            ..EventFilter::default()
        };
        let history = self.api.history;
        let incidents = history.incidents(incidents).await?;
        let batches = history.batches(batches).await?;
        Ok(Past {
            incidents: read_all(incidents.iter().map(|it| &it.document))?,
            batches: read_all(batches.iter().map(|it| &it.document))?,
            statistics: history
                .statistics(self.now, target.map(str::to_owned))
                .await?,
            events: history.events(events).await?,
        })
    }

    /// All that the history has of a room of an incident. It may have been deleted before the incident.
    async fn side(
        &self,
        sample: Option<&document::SampleDocument>,
    ) -> Result<Option<ProbeDocument>, PageError> {
        let Some(sample) = sample else {
            return Ok(None);
        };
        let Ok(document) = self.api.find_probe(&sample.room).await else {
            return Ok(None);
        };
        Ok(Some(serde_json::from_str(document.get())?))
    }
}

/// A document of `docs/` as a page.
///
/// # Errors
/// 404 if there is none of this name.
pub(super) fn docs(name: &str) -> Result<String, PageError> {
    let missing = || {
        HttpError::new(
            StatusCode::NOT_FOUND,
            "no document has this name; docs/reasons links to all of them",
        )
    };
    Ok(docs::render(name).ok_or_else(missing)?)
}

/// The page of an error. `depth` is the number of folders above the page.
pub(super) fn error(text: &str, depth: usize) -> String {
    let root = ["./", "../"].get(depth).copied().unwrap_or("../");
    layout::error(text, root)
}

/// A history that can't be read takes only its part of a page away.
fn without_history(past: Result<Past, PageError>) -> Result<Option<Past>, PageError> {
    match past {
        Err(PageError::History(error)) => {
            warn!("HTTP: a page lacks the history: {error}");
            Ok(None)
        }
        other => other.map(Some),
    }
}

fn read_all<'a, T: Deserialize<'a>>(
    documents: impl Iterator<Item = &'a Box<RawValue>>,
) -> serde_json::Result<Vec<T>> {
    documents
        .map(|document| serde_json::from_str(document.get()))
        .collect()
}

#[cfg(test)]
mod tests;
