//! Reads the history: on a separate read-only connection, off the async threads, one query at a time.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use rusqlite::types::ToSql;
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::store::{FILE, FileId, purpose, time};
use crate::probe::Circumstances;
use crate::report::{BatchResult, Purpose};

/// Bound for one query, including the wait for earlier ones.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of batches, incidents or probes in one answer.
pub(crate) const MAX_BATCHES: usize = 200;

/// Which batches to return, the latest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct BatchFilter {
    pub target: Option<String>,
    pub result: Option<BatchResult>,
    pub purpose: Option<Purpose>,
    /// A batch's id: only batches that started before it. The last id of an answer requests the next page.
    pub before: Option<String>,
    /// At most [`MAX_BATCHES`].
    pub limit: usize,
}

/// Which incidents to return, the latest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct IncidentFilter {
    pub target: Option<String>,
    /// Only open ones, or only those that have ended.
    pub open: Option<bool>,
    /// An incident's id: only incidents before it. The last id of an answer requests the next page.
    pub before: Option<String>,
    /// At most [`MAX_BATCHES`].
    pub limit: usize,
}

/// The document of a batch or an incident, with its id.
#[derive(Debug, Clone)]
pub(crate) struct StoredDocument {
    pub id: String,
    pub document: Box<RawValue>,
}

/// A probe of the history, for comparison with those of an incident.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RecentProbe {
    pub room: String,
    pub batch_id: String,
    pub purpose: Purpose,
    /// Its number in the batch, from 0.
    pub place: usize,
    pub started_at: DateTime<Utc>,
    /// A label of [`Outcome`](crate::probe::Outcome).
    pub outcome: String,
    /// A label of [`Reason`](crate::probe::Reason).
    pub reason: Option<String>,
    pub circumstances: Circumstances,
}

/// The last batch of a target that was not aborted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct LastBatch {
    pub batch_id: String,
    pub started_at: DateTime<Utc>,
    pub ended_at: DateTime<Utc>,
    pub result: String,
    pub ok: usize,
    pub failed: usize,
    pub aborted: usize,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("the history did not answer within {READ_TIMEOUT:?}")]
    Busy,
    #[error("the history can't be read")]
    Failed(#[source] rusqlite::Error),
}

#[derive(Clone)]
pub(super) struct HistoryReader {
    path: PathBuf,
    /// Opened by the first query, and again after a query that failed.
    connection: Arc<Mutex<Option<(FileId, Connection)>>>,
    permit: Arc<Semaphore>,
}

impl HistoryReader {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            path: dir.join(FILE),
            connection: Arc::default(),
            permit: Arc::new(Semaphore::new(1)),
        }
    }

    /// Runs one query. A query that times out runs on in its thread, and the next one waits for it.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, ReadError> {
        let reader = self.clone();
        let answer = async move {
            let permit = Arc::clone(&reader.permit).acquire_owned().await;
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                reader.run(query)
            })
            .await
        };
        match timeout(READ_TIMEOUT, answer).await {
            Ok(Ok(answer)) => answer.map_err(ReadError::Failed),
            Ok(Err(_)) | Err(_) => Err(ReadError::Busy),
        }
    }

    fn run<T>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let mut cached = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let file = FileId::of(&self.path).ok();
        let (opened, connection) = match cached.take() {
            Some((opened, connection)) if file == Some(opened) => (file, connection),
            // The file was removed or replaced, or there is no connection.
            _ => (file, self.connect()?),
        };
        // On an error the connection is dropped: a file that was replaced meanwhile needs a new one.
        let answer = query(&connection)?;
        *cached = opened.map(|opened| (opened, connection));
        Ok(answer)
    }

    fn connect(&self) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        connection.busy_timeout(READ_TIMEOUT)?;
        Ok(connection)
    }
}

pub(super) fn batches(
    connection: &Connection,
    filter: &BatchFilter,
) -> rusqlite::Result<Vec<StoredDocument>> {
    let result = filter.result.map(BatchResult::label);
    let purpose = filter.purpose.map(Purpose::label);
    let conditions = [
        ("target = ?", optional(filter.target.as_ref())),
        ("result = ?", optional(result.as_ref())),
        ("purpose = ?", optional(purpose.as_ref())),
        ("id < ?", optional(filter.before.as_ref())),
    ];
    latest(connection, "batches", "head", &conditions, filter.limit)
}

pub(super) fn incidents(
    connection: &Connection,
    filter: &IncidentFilter,
) -> rusqlite::Result<Vec<StoredDocument>> {
    let ended = filter.open.map(|open| !open);
    let conditions = [
        ("target = ?", optional(filter.target.as_ref())),
        ("(ended_at IS NOT NULL) = ?", optional(ended.as_ref())),
        ("id < ?", optional(filter.before.as_ref())),
    ];
    latest(
        connection,
        "incidents",
        "document",
        &conditions,
        filter.limit,
    )
}

fn optional<T: ToSql>(value: Option<&T>) -> Option<&dyn ToSql> {
    value.map(|value| value as &dyn ToSql)
}

/// The rows that meet each condition that has a value, by their ids, the latest first. `document` is the column of the document.
fn latest(
    connection: &Connection,
    table: &str,
    document: &str,
    conditions: &[(&str, Option<&dyn ToSql>)],
    limit: usize,
) -> rusqlite::Result<Vec<StoredDocument>> {
    let limit = row_limit(limit);
    let mut sql = format!("SELECT id, {document} FROM {table} WHERE true");
    let mut values: Vec<&dyn ToSql> = Vec::new();
    for (condition, value) in conditions {
        if let Some(value) = value {
            sql.push_str(" AND ");
            sql.push_str(condition);
            values.push(*value);
        }
    }
    sql.push_str(" ORDER BY id DESC LIMIT ?");
    values.push(&limit);
    let mut statement = connection.prepare(&sql)?;
    let found = statement.query_map(&values[..], |row| {
        Ok(StoredDocument {
            id: row.get(0)?,
            document: json(row, 1)?,
        })
    })?;
    found.collect()
}

fn row_limit(limit: usize) -> i64 {
    i64::try_from(limit.min(MAX_BATCHES)).unwrap_or(0)
}

pub(super) fn incident(
    connection: &Connection,
    id: &str,
) -> rusqlite::Result<Option<Box<RawValue>>> {
    let sql = "SELECT document FROM incidents WHERE id = ?1";
    let found = connection.query_row(sql, [id], |row| json(row, 0));
    found.optional()
}

pub(super) fn target_state(
    connection: &Connection,
    target: &str,
) -> rusqlite::Result<Option<String>> {
    let sql = "SELECT document FROM target_states WHERE target = ?1";
    let found = connection.query_row(sql, [target], |row| row.get(0));
    found.optional()
}

pub(super) fn recent_probes(
    connection: &Connection,
    target: &str,
    limit: usize,
) -> rusqlite::Result<Vec<RecentProbe>> {
    // The inner query walks through the target's batches from the latest one and stops at the limit. Batches may overlap, so the
    // outer query sorts by time.
    let sql = "SELECT * FROM (
                   SELECT room, batch, purpose, place, p.started_at AS began, outcome, reason,
                          node, region, worker, media_path, agent_version
                   FROM batches JOIN probes AS p ON batch = id
                   WHERE target = ?1 ORDER BY id DESC, place DESC LIMIT ?2
               ) ORDER BY began DESC, batch DESC, place DESC";
    let mut statement = connection.prepare(sql)?;
    let probes = statement.query_map(params![target, row_limit(limit)], |row| {
        let label: String = row.get(2)?;
        let place: i64 = row.get(3)?;
        let media_path: Option<String> = row.get(10)?;
        Ok(RecentProbe {
            room: row.get(0)?,
            batch_id: row.get(1)?,
            purpose: purpose(&label),
            place: usize::try_from(place).unwrap_or(0),
            started_at: time(row.get(4)?),
            outcome: row.get(5)?,
            reason: row.get(6)?,
            circumstances: Circumstances {
                node: row.get(7)?,
                region: row.get(8)?,
                worker: row.get(9)?,
                media_path: media_path.and_then(|label| label.parse().ok()),
                agent_version: row.get(11)?,
            },
        })
    })?;
    probes.collect()
}

/// The batch's document with its probes.
pub(super) fn batch(connection: &Connection, id: &str) -> rusqlite::Result<Option<Box<RawValue>>> {
    let head = "SELECT head FROM batches WHERE id = ?1";
    let head: Option<String> = connection
        .query_row(head, [id], |row| row.get(0))
        .optional()?;
    let Some(head) = head else {
        return Ok(None);
    };
    let mut statement =
        connection.prepare("SELECT document FROM probes WHERE batch = ?1 ORDER BY place")?;
    let probes = statement.query_map([id], |row| row.get::<_, String>(0))?;
    let probes: Vec<String> = probes.collect::<rusqlite::Result<_>>()?;
    let with_probes = append(&head, &format!("\"probes\":[{}]", probes.join(",")));
    raw(with_probes, 0).map(Some)
}

/// The probe's document with its batch's id and target.
pub(super) fn probe(
    connection: &Connection,
    room: &str,
) -> rusqlite::Result<Option<Box<RawValue>>> {
    let sql =
        "SELECT document, batch, target FROM probes JOIN batches ON id = batch WHERE room = ?1";
    let found = connection.query_row(sql, [room], |row| {
        let document: String = row.get(0)?;
        let quoted = |text: String| serde_json::Value::String(text).to_string();
        let (batch, target) = (quoted(row.get(1)?), quoted(row.get(2)?));
        let fields = format!("\"batch_id\":{batch},\"target\":{target}");
        raw(append(&document, &fields), 0)
    });
    found.optional()
}

pub(super) fn last_completed(
    connection: &Connection,
    target: &str,
    purposes: &[Purpose],
) -> rusqlite::Result<Option<LastBatch>> {
    let labels: Vec<_> = purposes.iter().map(|purpose| purpose.label()).collect();
    let sql = format!(
        "SELECT id, started_at, ended_at, result, ok, failed, aborted FROM batches
         WHERE target = ?1 AND result <> 'aborted' AND purpose IN ('{}') ORDER BY id DESC LIMIT 1",
        labels.join("', '")
    );
    let count = |row: &rusqlite::Row<'_>, column| {
        let count: i64 = row.get(column)?;
        Ok::<_, rusqlite::Error>(usize::try_from(count).unwrap_or(0))
    };
    let last = connection.query_row(&sql, [target], |row| {
        Ok(LastBatch {
            batch_id: row.get(0)?,
            started_at: time(row.get(1)?),
            ended_at: time(row.get(2)?),
            result: row.get(3)?,
            ok: count(row, 4)?,
            failed: count(row, 5)?,
            aborted: count(row, 6)?,
        })
    });
    last.optional()
}

pub(super) fn has_seen_agent(
    connection: &Connection,
    target: &str,
    agent_name: &str,
) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM agents_seen WHERE target = ?1 AND agent_name = ?2)";
    connection.query_row(sql, [target, agent_name], |row| row.get(0))
}

/// Appends fields to a document, which must be an object with at least one field.
fn append(document: &str, fields: &str) -> String {
    let open = document.strip_suffix('}').unwrap_or(document);
    format!("{open},{fields}}}")
}

fn json(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Box<RawValue>> {
    raw(row.get(column)?, column)
}

/// Invalid JSON is an error: this program did not write it.
fn raw(text: String, column: usize) -> rusqlite::Result<Box<RawValue>> {
    RawValue::from_string(text).map_err(|error| {
        let kind = rusqlite::types::Type::Text;
        rusqlite::Error::FromSqlConversionFailure(column, kind, Box::new(error))
    })
}
