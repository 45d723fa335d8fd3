//! Reads the history: on a separate read-only connection, off the async threads, one query at a time.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use rusqlite::types::ToSql;
use rusqlite::{Connection, OpenFlags, OptionalExtension};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::store::{FILE, FileId, time};

/// Bound for one query, including the wait for earlier ones.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of batches in one answer.
pub(crate) const MAX_BATCHES: usize = 200;

/// Which batches to return, the latest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct BatchFilter {
    pub target: Option<String>,
    /// A label of [`BatchResult`](crate::report::BatchResult).
    pub result: Option<String>,
    /// A batch's id: only batches that started before it. The last id of an answer requests the next page.
    pub before: Option<String>,
    /// At most [`MAX_BATCHES`].
    pub limit: usize,
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
) -> rusqlite::Result<Vec<Box<RawValue>>> {
    let limit = i64::try_from(filter.limit.min(MAX_BATCHES)).unwrap_or(0);
    let conditions = [
        ("target = ?", &filter.target),
        ("result = ?", &filter.result),
        ("id < ?", &filter.before),
    ];
    let mut sql = "SELECT head FROM batches WHERE true".to_owned();
    let mut values: Vec<&dyn ToSql> = Vec::new();
    for (condition, value) in &conditions {
        if let Some(value) = value {
            sql.push_str(" AND ");
            sql.push_str(condition);
            values.push(value);
        }
    }
    sql.push_str(" ORDER BY id DESC LIMIT ?");
    values.push(&limit);
    let mut statement = connection.prepare(&sql)?;
    let heads = statement.query_map(&values[..], |row| json(row, 0))?;
    heads.collect()
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
) -> rusqlite::Result<Option<LastBatch>> {
    let sql = "SELECT id, started_at, ended_at, result, ok, failed, aborted FROM batches
               WHERE target = ?1 AND result <> 'aborted' ORDER BY id DESC LIMIT 1";
    let count = |row: &rusqlite::Row<'_>, column| {
        let count: i64 = row.get(column)?;
        Ok::<_, rusqlite::Error>(usize::try_from(count).unwrap_or(0))
    };
    let last = connection.query_row(sql, [target], |row| {
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
