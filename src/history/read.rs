//! Reads the history: on a separate read-only connection, off the async threads, one query at a time.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use rusqlite::types::ToSql;
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::store::{FILE, FileId, millis, purpose, time};
use crate::probe::{Circumstances, Origin, Reason};
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
    /// Only batches that started at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Only batches that started before this time.
    pub until: Option<DateTime<Utc>>,
    /// Only batches with such a room.
    pub with_room: RoomFilter,
    /// A batch's id: only batches that started before it. The last id of an answer requests the next page.
    pub before: Option<String>,
    /// At most [`MAX_BATCHES`].
    pub limit: usize,
}

/// A room that meets each condition that is set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RoomFilter {
    pub reason: Option<Reason>,
    pub origin: Option<Origin>,
    pub node: Option<String>,
    pub worker: Option<String>,
}

/// Which probes to return, the latest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct ProbeFilter {
    pub target: Option<String>,
    /// A label of [`Outcome`](crate::probe::Outcome).
    pub outcome: Option<&'static str>,
    pub purpose: Option<Purpose>,
    /// Only probes that started at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Only probes that started before this time.
    pub until: Option<DateTime<Utc>>,
    pub room: RoomFilter,
    /// Only probes after this place of the list. The id of the last document of an answer requests the next page.
    pub before: Option<ProbeCursor>,
    /// At most [`MAX_BATCHES`].
    pub limit: usize,
}

/// A probe's place in the list of all probes: `{start in Unix milliseconds}-{row}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProbeCursor {
    started_at: i64,
    row: i64,
}

impl fmt::Display for ProbeCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.started_at, self.row)
    }
}

impl FromStr for ProbeCursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (started_at, row) = text.split_once('-').ok_or(())?;
        match (started_at.parse(), row.parse()) {
            (Ok(started_at), Ok(row)) => Ok(Self { started_at, row }),
            _ => Err(()),
        }
    }
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

/// A document of a list, with the id that requests the documents after it.
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
    /// A label of [`Reason`].
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

/// How the rooms of a span of time ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct RoomCount {
    pub(crate) ok: usize,
    pub(crate) failed: usize,
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
    let (since, until) = (filter.since.map(millis), filter.until.map(millis));
    let (target, purpose) = (optional(filter.target.as_ref()), optional(purpose.as_ref()));
    let of_batch = [
        ("result = ?", optional(result.as_ref())),
        ("batches.started_at >= ?", optional(since.as_ref())),
        ("batches.started_at < ?", optional(until.as_ref())),
        ("id < ?", optional(filter.before.as_ref())),
    ];
    // The ids first: their indexes have every column of the conditions, so no head is read in vain.
    let (sql, conditions): (_, Conditions<'_>) = if filter.with_room == RoomFilter::default() {
        // One condition has an index in the order of the list. For several, one pass over an index that has all columns.
        let equal = [target.is_some(), purpose.is_some(), result.is_some()];
        let is_of_time = since.is_some() || until.is_some();
        let sql = if is_of_time || equal.into_iter().filter(|is_set| *is_set).count() > 1 {
            "SELECT id FROM batches INDEXED BY batches_by_time WHERE {} ORDER BY id DESC LIMIT ?"
        } else {
            "SELECT id FROM batches WHERE {} ORDER BY id DESC LIMIT ?"
        };
        let other = [("target = ?", target), ("purpose = ?", purpose)];
        (sql, of_batch.into_iter().chain(other).collect())
    } else {
        // The index of probes has these columns, too.
        let other = [
            ("probes.target = ?", target),
            ("probes.purpose = ?", purpose),
        ];
        // The cursor again, for the index of probes.
        let before = ("batch < ?", optional(filter.before.as_ref()));
        let of_room = filter.with_room.conditions().into_iter().chain([before]);
        let conditions = of_batch.into_iter().chain(other).chain(of_room);
        let sql =
            "SELECT id FROM probes INDEXED BY probes_of_batch CROSS JOIN batches ON id = batch
                   WHERE {} GROUP BY batch ORDER BY batch DESC LIMIT ?";
        (sql, filter.with_room.add_reasons(conditions.collect()))
    };
    let ids = sql.replace("{}", &conditions.sql);
    let limit = row_limit(filter.limit);
    let values: Vec<&dyn ToSql> = conditions.values.into_iter().chain([&limit as _]).collect();
    let sql = format!("SELECT id, head FROM batches WHERE id IN ({ids}) ORDER BY id DESC");
    let mut statement = connection.prepare(&sql)?;
    let found = statement.query_map(&values[..], document)?;
    found.collect()
}

pub(super) fn probes(
    connection: &Connection,
    filter: &ProbeFilter,
) -> rusqlite::Result<Vec<StoredDocument>> {
    let purpose = filter.purpose.map(Purpose::label);
    let (since, until) = (filter.since.map(millis), filter.until.map(millis));
    let conditions = [
        ("target = ?", optional(filter.target.as_ref())),
        ("outcome = ?", optional(filter.outcome.as_ref())),
        ("purpose = ?", optional(purpose.as_ref())),
        ("started_at >= ?", optional(since.as_ref())),
        ("started_at < ?", optional(until.as_ref())),
    ];
    let conditions = conditions.into_iter().chain(filter.room.conditions());
    let mut conditions = filter.room.add_reasons(conditions.collect());
    if let Some(ProbeCursor { started_at, row }) = &filter.before {
        conditions
            .sql
            .push_str(" AND started_at <= ? AND (started_at < ? OR rowid < ?)");
        conditions
            .values
            .extend([started_at as &dyn ToSql, started_at, row]);
    }
    let is_not_ok = filter.outcome.is_some_and(|outcome| outcome != "ok");
    let index = if is_not_ok || filter.room.needs_failure() {
        // SQLite uses this index only if the query has its condition word by word.
        conditions.sql.push_str(" AND outcome <> 'ok'");
        "probes_not_ok"
    } else {
        "probes_by_time"
    };
    let limit = row_limit(filter.limit);
    let values: Vec<&dyn ToSql> = conditions.values.into_iter().chain([&limit as _]).collect();
    let sql = format!(
        "SELECT document, batch, target, started_at, rowid FROM probes WHERE rowid IN (
             SELECT rowid FROM probes INDEXED BY {index} WHERE {} ORDER BY started_at DESC, rowid DESC LIMIT ?
         ) ORDER BY started_at DESC, rowid DESC",
        conditions.sql
    );
    let mut statement = connection.prepare(&sql)?;
    let found = statement.query_map(&values[..], |row| {
        let cursor = ProbeCursor {
            started_at: row.get(3)?,
            row: row.get(4)?,
        };
        Ok(StoredDocument {
            id: cursor.to_string(),
            document: probe_document(row)?,
        })
    })?;
    found.collect()
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
    let conditions: Conditions<'_> = conditions.into_iter().collect();
    let limit = row_limit(filter.limit);
    let values: Vec<&dyn ToSql> = conditions.values.into_iter().chain([&limit as _]).collect();
    let sql = format!(
        "SELECT id, document FROM incidents WHERE {} ORDER BY id DESC LIMIT ?",
        conditions.sql
    );
    let mut statement = connection.prepare(&sql)?;
    let found = statement.query_map(&values[..], document)?;
    found.collect()
}

/// A condition, and its value if it is to be met.
type Condition<'a> = (&'static str, Option<&'a dyn ToSql>);

/// The conditions that have a value, as SQL with a `?` for each value.
pub(super) struct Conditions<'a> {
    pub(super) sql: String,
    pub(super) values: Vec<&'a dyn ToSql>,
}

impl<'a> FromIterator<Condition<'a>> for Conditions<'a> {
    fn from_iter<T: IntoIterator<Item = Condition<'a>>>(conditions: T) -> Self {
        let mut sql = "true".to_owned();
        let mut values = Vec::new();
        for (condition, value) in conditions {
            if let Some(value) = value {
                sql.push_str(" AND ");
                sql.push_str(condition);
                values.push(value);
            }
        }
        Self { sql, values }
    }
}

pub(super) fn optional<T: ToSql>(value: Option<&T>) -> Option<&dyn ToSql> {
    value.map(|value| value as &dyn ToSql)
}

impl RoomFilter {
    fn conditions(&self) -> [Condition<'_>; 2] {
        [
            ("node = ?", optional(self.node.as_ref())),
            ("worker = ?", optional(self.worker.as_ref())),
        ]
    }

    fn needs_failure(&self) -> bool {
        self.reason.is_some() || self.origin.is_some()
    }

    /// Adds the reasons that meet both reason and origin: the origin follows from the reason and has no column.
    fn add_reasons<'a>(&self, mut conditions: Conditions<'a>) -> Conditions<'a> {
        if self.needs_failure() {
            let meets = |reason: &Reason| {
                self.reason
                    .is_none_or(|only| only.label() == reason.label())
                    && self.origin.is_none_or(|origin| reason.origin() == origin)
            };
            let reasons = Reason::ALL.into_iter().filter(meets);
            let labels: Vec<_> = reasons.map(Reason::label).collect();
            let list = format!(" AND reason IN ('{}')", labels.join("', '"));
            conditions.sql.push_str(&list);
        }
        conditions
    }
}

fn document(row: &rusqlite::Row<'_>) -> rusqlite::Result<StoredDocument> {
    Ok(StoredDocument {
        id: row.get(0)?,
        document: json(row, 1)?,
    })
}

pub(super) fn row_limit(limit: usize) -> i64 {
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
                   SELECT room, batch, batches.purpose, place, p.started_at AS began, outcome, reason,
                          node, region, worker, media_path, agent_version
                   FROM batches JOIN probes AS p ON batch = id
                   WHERE batches.target = ?1 ORDER BY id DESC, place DESC LIMIT ?2
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
    let sql = "SELECT document, batch, target FROM probes WHERE room = ?1";
    let found = connection.query_row(sql, [room], probe_document);
    found.optional()
}

/// The document of the first column, with the batch's id and the target of the next two.
fn probe_document(row: &rusqlite::Row<'_>) -> rusqlite::Result<Box<RawValue>> {
    let document: String = row.get(0)?;
    let quoted = |text: String| serde_json::Value::String(text).to_string();
    let (batch, target) = (quoted(row.get(1)?), quoted(row.get(2)?));
    let fields = format!("\"batch_id\":{batch},\"target\":{target}");
    raw(append(&document, &fields), 0)
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

pub(super) fn count(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<usize> {
    let count: i64 = row.get(column)?;
    Ok(usize::try_from(count).unwrap_or(0))
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
