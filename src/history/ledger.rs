//! The budget ledger and the journal of rooms in memory: what decisions are made on, whether the disk follows or not.
//!
//! A row is both at once: the journal's (a name that may stand for a room) and the ledger's (agent time of its project).
//! It counts to the UTC day and month in which it was opened. It knows no disk and reads no clock.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use chrono::{DateTime, Months, NaiveDate, Utc};

use crate::config::Period;
use crate::livekit::RoomName;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub project: String,
    pub target: String,
    /// The run of this program that opened the room.
    pub boot: String,
    pub opened_at: DateTime<Utc>,
    /// Seconds of agent time at worst.
    pub reserved: u64,
    /// Seconds of agent time in the end; until then the worst counts.
    pub settled: Option<u64>,
    /// When the janitor vouched for the room.
    pub gone_at: Option<DateTime<Utc>>,
}

impl Row {
    pub fn counts(&self) -> u64 {
        self.settled.unwrap_or(self.reserved)
    }
}

/// Agent time that a project has used, open rooms counted at their worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// In the UTC day.
    pub day: Duration,
    /// In the UTC calendar month.
    pub month: Duration,
    /// Earlier use is not known, and neither figure holds it.
    pub ledger_lost: bool,
}

/// What the disk held.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    /// Rooms that nobody has vouched for.
    pub rows: Vec<(RoomName, Row)>,
    /// Seconds of each project and day that may still be asked for, the rows above included.
    pub days: Vec<(String, NaiveDate, u64)>,
    pub lost: bool,
}

#[derive(Debug)]
struct Kept {
    row: Row,
    /// The ledger's change that the disk has not seen.
    unwritten: Option<u64>,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Rooms that are not settled, not vouched for or not on disk.
    rows: HashMap<RoomName, Kept>,
    days: HashMap<String, BTreeMap<NaiveDate, u64>>,
    /// Counts the changes of rows.
    change: u64,
    pub lost: bool,
}

impl Ledger {
    /// Adds what the disk held to what has happened since.
    pub fn load(&mut self, loaded: Loaded) {
        for (room, row) in loaded.rows {
            let kept = Kept {
                row,
                unwritten: None,
            };
            self.rows.entry(room).or_insert(kept);
        }
        for (project, day, seconds) in loaded.days {
            *self.of_day(&project, day) += seconds;
        }
        self.lost = loaded.lost;
    }

    pub fn used(&self, project: &str, now: DateTime<Utc>) -> Used {
        let today = now.date_naive();
        let (first, next) = (Period::Month.first_day(today), Period::Month.next(today));
        let (mut day, mut month) = (0, 0);
        if let Some(days) = self.days.get(project) {
            day = days.get(&today).copied().unwrap_or(0);
            month = days.range(first..next).map(|(_, seconds)| seconds).sum();
        }
        Used {
            day: Duration::from_secs(day),
            month: Duration::from_secs(month),
            ledger_lost: self.lost,
        }
    }

    /// Gives the number of the change.
    pub fn open(&mut self, room: &RoomName, row: Row) -> u64 {
        let today = row.opened_at.date_naive();
        self.forget_days_before(Period::Month.first_day(today) - Months::new(1));
        *self.of_day(&row.project, today) += row.counts();
        let kept = Kept {
            row,
            unwritten: None,
        };
        self.rows.insert(room.clone(), kept);
        self.changed(room)
    }

    /// The first settlement stands.
    pub fn settle(&mut self, room: &RoomName, seconds: u64) {
        let Some(Kept { row, .. }) = self.rows.get_mut(room) else {
            return;
        };
        if row.settled.is_some() {
            return;
        }
        let (project, day) = (row.project.clone(), row.opened_at.date_naive());
        let counted = row.counts();
        row.settled = Some(seconds);
        let used = self.of_day(&project, day);
        *used = (*used + seconds).saturating_sub(counted);
        self.changed(room);
    }

    pub fn gone(&mut self, room: &RoomName, now: DateTime<Utc>) {
        if let Some(Kept { row, .. }) = self.rows.get_mut(room)
            && row.gone_at.is_none()
        {
            row.gone_at = Some(now);
            self.changed(room);
        }
    }

    pub fn get(&self, room: &RoomName) -> Option<&Row> {
        self.rows.get(room).map(|kept| &kept.row)
    }

    /// Rooms that an earlier run journalled and that nobody has vouched for.
    pub fn left_by_others(&self, boot: &str) -> impl Iterator<Item = (&RoomName, &Row)> {
        self.rows
            .iter()
            .map(|(room, kept)| (room, &kept.row))
            .filter(move |(_, row)| row.boot != boot && row.gone_at.is_none())
    }

    /// The rows that the disk lacks, and the number of the last change in them.
    pub fn unwritten(&self) -> (Vec<(RoomName, Row)>, u64) {
        let rows = self
            .rows
            .iter()
            .filter(|(_, kept)| kept.unwritten.is_some());
        let rows = rows.map(|(room, kept)| (room.clone(), kept.row.clone()));
        (rows.collect(), self.change)
    }

    /// The disk holds every change up to this one. Rows of which nothing more can come are forgotten.
    pub fn written(&mut self, change: u64, boot: &str) {
        self.rows.retain(|_, kept| {
            if kept.unwritten.is_some_and(|unwritten| unwritten <= change) {
                kept.unwritten = None;
            }
            let row = &kept.row;
            let closed = row.gone_at.is_some() && (row.settled.is_some() || row.boot != boot);
            kept.unwritten.is_some() || !closed
        });
    }

    fn changed(&mut self, room: &RoomName) -> u64 {
        self.change += 1;
        if let Some(kept) = self.rows.get_mut(room) {
            kept.unwritten = Some(self.change);
        }
        self.change
    }

    fn of_day(&mut self, project: &str, day: NaiveDate) -> &mut u64 {
        if !self.days.contains_key(project) {
            self.days.insert(project.to_owned(), BTreeMap::new());
        }
        let days = self.days.get_mut(project).expect("inserted if missing");
        days.entry(day).or_default()
    }

    fn forget_days_before(&mut self, first: NaiveDate) {
        for days in self.days.values_mut() {
            *days = days.split_off(&first);
        }
    }
}

#[cfg(test)]
impl Ledger {
    pub fn len(&self) -> usize {
        self.rows.len()
    }
}
