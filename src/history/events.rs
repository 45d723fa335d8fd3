//! What people and other programs report of their own changes, such as a deployment: a mark in time beside the results.

use chrono::{DateTime, SubsecRound as _, Utc};
use rusqlite::types::ToSql;
use rusqlite::{Connection, Transaction, params};
use serde::Serialize;

use super::read::{Conditions, optional};
use super::store::{millis, time};

/// Beyond it, the oldest events are deleted.
const MAX_EVENTS: i64 = 10_000;

/// One event. The names of the fields are keys of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct HistoryEvent {
    /// Sorts by time.
    pub(crate) id: String,
    pub(crate) at: DateTime<Utc>,
    /// `None` if it concerns all targets.
    pub(crate) target: Option<String>,
    /// A short word, such as `deploy`.
    pub(crate) kind: String,
    pub(crate) text: String,
}

/// Which events to return, the latest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct EventFilter {
    /// Events of this target, and those of all targets.
    pub(crate) target: Option<String>,
    pub(crate) since: Option<DateTime<Utc>>,
    /// Only events before this time.
    pub(crate) until: Option<DateTime<Utc>>,
    /// An event's id: only events before it. The last id of an answer requests the next page.
    pub(crate) before: Option<String>,
    /// At most [`MAX_BATCHES`](super::MAX_BATCHES).
    pub(crate) limit: usize,
}

impl HistoryEvent {
    /// An event with a new id.
    pub(crate) fn new(
        at: DateTime<Utc>,
        target: Option<String>,
        kind: String,
        text: String,
    ) -> Self {
        let id = format!(
            "{}-{:08x}",
            at.format("%Y%m%dT%H%M%S%3f"),
            fastrand::u32(..)
        );
        Self {
            id,
            at: at.trunc_subsecs(3),
            target,
            kind,
            text,
        }
    }

    pub(super) fn insert(&self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        transaction.execute(
            "INSERT INTO events (id, at, target, kind, text) VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
            params![self.id, millis(self.at), self.target, self.kind, self.text],
        )?;
        transaction.execute(
            "DELETE FROM events WHERE id <= (SELECT id FROM events ORDER BY id DESC LIMIT 1 OFFSET ?1)",
            [MAX_EVENTS],
        )?;
        Ok(())
    }
}

pub(super) fn events(
    connection: &Connection,
    filter: &EventFilter,
) -> rusqlite::Result<Vec<HistoryEvent>> {
    let (since, until) = (filter.since.map(millis), filter.until.map(millis));
    let conditions: Conditions<'_> = [
        (
            "(target IS NULL OR target = ?)",
            optional(filter.target.as_ref()),
        ),
        ("at >= ?", optional(since.as_ref())),
        ("at < ?", optional(until.as_ref())),
        ("id < ?", optional(filter.before.as_ref())),
    ]
    .into_iter()
    .collect();
    let limit = super::read::row_limit(filter.limit);
    let sql = format!(
        "SELECT id, at, target, kind, text FROM events WHERE {} ORDER BY id DESC LIMIT ?",
        conditions.sql
    );
    let values: Vec<&dyn ToSql> = conditions.values.into_iter().chain([&limit as _]).collect();
    let mut statement = connection.prepare(&sql)?;
    let found = statement.query_map(&values[..], |row| {
        Ok(HistoryEvent {
            id: row.get(0)?,
            at: time(row.get(1)?),
            target: row.get(2)?,
            kind: row.get(3)?,
            text: row.get(4)?,
        })
    })?;
    found.collect()
}
