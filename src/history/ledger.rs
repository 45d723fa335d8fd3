//! The budget ledger and the journal of rooms, in memory. All decisions are made here, whether or not the disk works.
//!
//! A row serves both: for the journal it is a name that may stand for a room, for the ledger it is agent time of a
//! project. It counts for the UTC day and month in which the room opened. This module knows no disk and reads no clock.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use chrono::{DateTime, Months, NaiveDate, Utc};

use super::kept::Kept;
use crate::config::Period;
use crate::livekit::RoomName;
use crate::report::Purpose;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LedgerRow {
    pub(super) project: String,
    pub(super) target: String,
    pub(super) purpose: Purpose,
    /// The run of this program that opened the room.
    pub(super) boot: String,
    pub(super) opened_at: DateTime<Utc>,
    /// Worst case of the agent time, in seconds.
    pub(super) reserved: u64,
    /// Final agent time in seconds. Until it is known, the worst case counts.
    pub(super) settled: Option<u64>,
    /// When the janitor confirmed that the room is gone.
    pub(super) gone_at: Option<DateTime<Utc>>,
}

impl LedgerRow {
    pub(super) fn seconds(&self) -> u64 {
        self.settled.unwrap_or(self.reserved)
    }
}

/// Agent time that a project has used; open rooms count with their worst case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AgentTimeUsed {
    /// In the current UTC day.
    pub day: Duration,
    /// In the current UTC calendar month.
    pub month: Duration,
    /// The part of `day` that open rooms of this run have reserved.
    pub reserved_day: Duration,
    /// The part of `month` that open rooms of this run have reserved.
    pub reserved_month: Duration,
    /// Neither figure includes earlier use, because its record is lost.
    pub ledger_lost: bool,
    /// Neither figure includes earlier use, because the disk could not be read so far.
    pub ledger_unread: bool,
}

impl AgentTimeUsed {
    pub(crate) fn in_period(&self, period: Period) -> Duration {
        match period {
            Period::Day => self.day,
            Period::Month => self.month,
        }
    }

    /// The part of [`Self::in_period`] that open rooms have reserved. It ends with them: their use replaces it.
    pub(crate) fn reserved_in(&self, period: Period) -> Duration {
        match period {
            Period::Day => self.reserved_day,
            Period::Month => self.reserved_month,
        }
    }
}

/// The part of the ledger on disk that this run needs.
#[derive(Debug, Default)]
pub(super) struct LoadedLedger {
    /// Rooms that are not confirmed to be gone.
    pub(super) rows: Vec<(RoomName, LedgerRow)>,
    /// The rows above included.
    pub(super) sums: Vec<LedgerSum>,
    pub(super) lost: bool,
}

/// Agent time of the rooms of one target, purpose and UTC day.
#[derive(Debug)]
pub(super) struct LedgerSum {
    pub(super) project: String,
    pub(super) target: String,
    pub(super) purpose: Purpose,
    pub(super) day: NaiveDate,
    pub(super) seconds: u64,
}

/// Agent time of a project in one UTC day, in seconds.
#[derive(Debug, Default)]
struct DayUse {
    total: u64,
    /// The part of each target's confirmations.
    confirmations: BTreeMap<String, u64>,
}

impl DayUse {
    fn add(&mut self, target: &str, purpose: Purpose, seconds: u64) {
        self.replace(target, purpose, 0, seconds);
    }

    fn replace(&mut self, target: &str, purpose: Purpose, counted: u64, seconds: u64) {
        let changed = |used: u64| (used + seconds).saturating_sub(counted);
        self.total = changed(self.total);
        if purpose == Purpose::Confirmation {
            let used = self.confirmations.get(target).copied().unwrap_or(0);
            self.confirmations.insert(target.to_owned(), changed(used));
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Rooms that are not settled, not confirmed to be gone, or not on disk.
    entries: HashMap<RoomName, Kept<LedgerRow>>,
    /// By project.
    days: HashMap<String, BTreeMap<NaiveDate, DayUse>>,
    /// Number of changes so far.
    change: u64,
    pub(super) lost: bool,
    /// The disk could not be read so far, so what it holds is unknown.
    pub(super) unread: bool,
}

impl Ledger {
    /// Adds what the disk holds to what has happened since the start.
    pub(super) fn load(&mut self, loaded: LoadedLedger) {
        for (room, row) in loaded.rows {
            let entry = Kept {
                value: row,
                unwritten: None,
            };
            self.entries.entry(room).or_insert(entry);
        }
        for sum in loaded.sums {
            self.day_of(&sum.project, sum.day)
                .add(&sum.target, sum.purpose, sum.seconds);
        }
        self.lost = loaded.lost;
        self.unread = false;
    }

    /// `boot` is this run. Rooms that an earlier run left unsettled stay at their worst case, so they are used.
    pub(super) fn used(&self, project: &str, boot: &str, now: DateTime<Utc>) -> AgentTimeUsed {
        let today = now.date_naive();
        let (first, next) = (Period::Month.first_day(today), Period::Month.next(today));
        let days = self.days.get(project);
        let month = days.map_or(0, |days| {
            days.range(first..next).map(|(_, used)| used.total).sum()
        });
        let day = days.and_then(|days| days.get(&today));
        let reserved = |period: Period| {
            let days = period.first_day(today)..period.next(today);
            let open = self.entries.values().map(|entry| &entry.value);
            let open = open.filter(|row| {
                row.project == project
                    && row.boot == boot
                    && row.settled.is_none()
                    && days.contains(&row.opened_at.date_naive())
            });
            Duration::from_secs(open.map(|row| row.reserved).sum())
        };
        AgentTimeUsed {
            day: Duration::from_secs(day.map_or(0, |used| used.total)),
            month: Duration::from_secs(month),
            reserved_day: reserved(Period::Day),
            reserved_month: reserved(Period::Month),
            ledger_lost: self.lost,
            ledger_unread: self.unread,
        }
    }

    /// Agent time that this target used for confirmations in the current UTC day; open rooms count with their worst case.
    pub(super) fn confirmations(
        &self,
        project: &str,
        target: &str,
        now: DateTime<Utc>,
    ) -> Duration {
        let days = self.days.get(project);
        let day = days.and_then(|days| days.get(&now.date_naive()));
        let seconds = day.and_then(|used| used.confirmations.get(target));
        Duration::from_secs(seconds.copied().unwrap_or(0))
    }

    /// Adds a row and returns the number of the change.
    pub(super) fn open(&mut self, room: &RoomName, row: LedgerRow) -> u64 {
        let today = row.opened_at.date_naive();
        self.day_of(&row.project, today)
            .add(&row.target, row.purpose, row.seconds());
        let entry = Kept {
            value: row,
            unwritten: None,
        };
        self.entries.insert(room.clone(), entry);
        self.count_change(room)
    }

    /// Sets the worst case of a room that is not settled.
    pub(super) fn reserve(&mut self, room: &RoomName, seconds: u64) {
        self.recount(room, |row| row.reserved = seconds);
    }

    /// Sets the room's final agent time; a second settlement is ignored.
    pub(super) fn settle(&mut self, room: &RoomName, seconds: u64) {
        self.recount(room, |row| row.settled = Some(seconds));
    }

    /// Changes the agent time of a room that is not settled.
    fn recount(&mut self, room: &RoomName, change: impl FnOnce(&mut LedgerRow)) {
        let entry = self.entries.get_mut(room);
        let Some(row) = entry.map(|entry| &mut entry.value) else {
            return;
        };
        if row.settled.is_some() {
            return;
        }
        let counted = row.seconds();
        change(row);
        let row = row.clone();
        self.day_of(&row.project, row.opened_at.date_naive())
            .replace(&row.target, row.purpose, counted, row.seconds());
        self.count_change(room);
    }

    pub(super) fn gone(&mut self, room: &RoomName, now: DateTime<Utc>) {
        if let Some(Kept { value: row, .. }) = self.entries.get_mut(room)
            && row.gone_at.is_none()
        {
            row.gone_at = Some(now);
            self.count_change(room);
        }
    }

    pub(super) fn get(&self, room: &RoomName) -> Option<&LedgerRow> {
        self.entries.get(room).map(|entry| &entry.value)
    }

    /// Rooms of earlier runs that are not confirmed to be gone.
    pub(super) fn orphans(&self, boot: &str) -> impl Iterator<Item = (&RoomName, &LedgerRow)> {
        self.entries
            .iter()
            .map(|(room, entry)| (room, &entry.value))
            .filter(move |(_, row)| row.boot != boot && row.gone_at.is_none())
    }

    /// The rows that the disk lacks, and the number of the last change in them.
    pub(super) fn unwritten(&self) -> (Vec<(RoomName, LedgerRow)>, u64) {
        let entries = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.unwritten.is_some());
        let rows = entries.map(|(room, entry)| (room.clone(), entry.value.clone()));
        (rows.collect(), self.change)
    }

    /// Records that the disk has every change up to this one, and removes the rows that can't change any more.
    pub(super) fn written(&mut self, change: u64, boot: &str) {
        self.entries.retain(|_, entry| {
            entry.written(change);
            let row = &entry.value;
            let closed = row.gone_at.is_some() && (row.settled.is_some() || row.boot != boot);
            entry.unwritten.is_some() || !closed
        });
    }

    /// Another file takes the place of the one that had the rows: all must be written again.
    pub(super) fn write_again(&mut self) {
        self.change += 1;
        for entry in self.entries.values_mut() {
            entry.unwritten = Some(self.change);
        }
    }

    fn count_change(&mut self, room: &RoomName) -> u64 {
        self.change += 1;
        if let Some(entry) = self.entries.get_mut(room) {
            entry.unwritten = Some(self.change);
        }
        self.change
    }

    fn day_of(&mut self, project: &str, day: NaiveDate) -> &mut DayUse {
        // Not `entry()`, which would copy the name for each lookup.
        if !self.days.contains_key(project) {
            self.days.insert(project.to_owned(), BTreeMap::new());
        }
        let days = self.days.get_mut(project).expect("inserted if missing");
        days.entry(day).or_default()
    }

    /// Forgets the days that no budget counts any more. The month before is kept, because the clock may be set back.
    pub(super) fn forget(&mut self, now: DateTime<Utc>) {
        let first = Period::Month.first_day(now.date_naive()) - Months::new(1);
        for days in self.days.values_mut() {
            *days = days.split_off(&first);
        }
    }
}

#[cfg(test)]
impl Ledger {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}
