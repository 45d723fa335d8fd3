//! The one thread that writes: ledger rows first, then what the detection keeps, then events and batches. In between it deletes what is too
//! old or too large.
//!
//! It retries what it can't write: ledger rows without limit, everything else up to a bound.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::Instant;

use super::HistoryShared;
use super::store::{Store, StoreOpenError, is_of_content};
use crate::config;
use crate::recording::RecordingStore;

/// Pause between two attempts while the disk takes nothing.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// How often the thread looks for what is too old or too large.
const EXPIRY_INTERVAL: Duration = Duration::from_mins(1);

/// How far the wall clock may move against the process's own clock between two looks at it.
const MAX_CLOCK_CHANGE: TimeDelta = TimeDelta::minutes(5);

/// A clock that was set, or that has just been seen for the first time, is trusted after this long. It may be wrong by months
/// until the network has set it, and what is forgotten is lost.
const CLOCK_TRIAL: Duration = Duration::from_hours(1);

/// How often the log says that the file is too large.
const SIZE_WARNING_INTERVAL: Duration = Duration::from_hours(24);

/// Decides whether the wall clock may tell what is old.
#[derive(Debug)]
struct ClockTrust {
    last_look: (DateTime<Utc>, Instant),
    plausible_since: Instant,
}

impl ClockTrust {
    fn new(wall: DateTime<Utc>, now: Instant) -> Self {
        Self {
            last_look: (wall, now),
            plausible_since: now,
        }
    }

    /// Looks at the clock, and returns whether it has been plausible for long enough.
    fn trusts(&mut self, wall: DateTime<Utc>, now: Instant) -> bool {
        let (before, then) = self.last_look;
        let passed = TimeDelta::from_std(now - then).unwrap_or(TimeDelta::MAX);
        if (wall - before - passed).abs() > MAX_CLOCK_CHANGE {
            self.plausible_since = now;
        }
        self.last_look = (wall, now);
        now - self.plausible_since >= CLOCK_TRIAL
    }
}

pub(super) struct HistoryWriter {
    shared: Arc<HistoryShared>,
    settings: config::HistorySettings,
    recordings: RecordingStore,
    /// Rooms whose recordings were deleted, and whose documents do not say so yet.
    unrecorded: Vec<String>,
    /// `None` while it can't be opened.
    store: Option<Store>,
    delete_expired_at: Instant,
    clock: ClockTrust,
    size_warned_at: Option<Instant>,
    /// The file was removed or replaced, and the one that takes its place lacks its rows.
    displaced: bool,
    /// The store has been set to count a lost ledger from zero.
    accepted: bool,
}

impl HistoryWriter {
    pub(super) fn new(
        shared: Arc<HistoryShared>,
        settings: config::HistorySettings,
        store: Option<Store>,
        recordings: RecordingStore,
    ) -> Self {
        let now = Instant::now();
        Self {
            clock: ClockTrust::new((shared.clock)(), now),
            shared,
            settings,
            recordings,
            unrecorded: Vec::new(),
            store,
            delete_expired_at: now,
            size_warned_at: None,
            displaced: false,
            accepted: false,
        }
    }

    pub(super) fn run(mut self) {
        // Reports the end of the thread even after a panic: otherwise `close` would wait until its deadline.
        struct NotifyEnd(Arc<HistoryShared>);
        impl Drop for NotifyEnd {
            fn drop(&mut self) {
                self.0.writer_ended();
            }
        }
        let _end = NotifyEnd(Arc::clone(&self.shared));
        loop {
            let closing = self.shared.wait_for_work(self.pause());
            self.run_once();
            if closing {
                break;
            }
        }
        // Closed and unlocked before the end is reported, so that the next run can open the folder at once.
        drop(self.store.take());
    }

    fn pause(&self) -> Duration {
        let pause = self.delete_expired_at.duration_since(Instant::now());
        if self.shared.is_degraded() {
            pause.min(RETRY_INTERVAL)
        } else {
            pause
        }
    }

    /// Does all work that is due now.
    pub(super) fn run_once(&mut self) {
        if self
            .store
            .as_ref()
            .is_some_and(|store| !store.is_in_place())
        {
            self.displaced();
        }
        if self.store.is_none() && !self.reopen() {
            return;
        }
        match self.write() {
            Ok(()) => self.shared.set_healthy(),
            Err(error) => self.shared.set_unwritable(&format!("can't write: {error}")),
        }
    }

    fn displaced(&mut self) {
        self.store = None;
        self.displaced = true;
        self.shared.set_ledger_down();
        self.shared.set_unwritable(&format!(
            "{} was removed or replaced while the canary ran. This run knows the agent time that was used, but the next start \
             does not: it opens no room of a project with a budget until you accept that with `run --accept-lost-ledger`, \
             unless you put the folder back while the canary is stopped",
            self.settings.dir.display()
        ));
    }

    fn reopen(&mut self) -> bool {
        match Store::open(&self.settings.dir, (self.shared.clock)()) {
            Ok((mut store, _)) if self.displaced => {
                if let Err(error) = store.mark_ledger_lost() {
                    self.shared.set_unwritable(&format!("can't write: {error}"));
                    return false;
                }
                // The memory is complete, whatever ledger the new folder has.
                let mut state = self.shared.lock();
                state.ledger.write_again();
                state.detections.write_again();
                drop(state);
                self.displaced = false;
                self.store = Some(store);
                true
            }
            Ok((store, loaded)) => {
                self.shared.load(loaded);
                self.store = Some(store);
                true
            }
            Err(StoreOpenError::Unavailable(why)) => {
                self.shared.set_unwritable(&why);
                false
            }
            Err(StoreOpenError::Refused(error)) => {
                self.shared.set_unwritable(&error.to_string());
                false
            }
        }
    }

    fn write(&mut self) -> rusqlite::Result<()> {
        self.write_ledger()?;
        self.write_detections()?;
        self.write_events()?;
        while let Some(record) = self.shared.next_record() {
            let store = self.store.as_mut().expect("opened before this call");
            match store.write_record(&record) {
                Ok(()) => {
                    // Those that were deleted before their probe was stored, for the size of the folder.
                    let gone = record.recorded_rooms();
                    let gone = gone.filter(|room| !self.recordings.contains(room));
                    self.unrecorded.extend(gone);
                    self.shared.record_done(true);
                }
                Err(error) if is_of_content(&error) => {
                    // Dropped, because a retry would fail in the same way and hold up all later batches.
                    tracing::error!(%error, "can't write a batch to the history: it is dropped");
                    self.recordings.discard(record.recorded_rooms());
                    self.shared.count_fault();
                    self.shared.record_done(false);
                }
                Err(error) => return Err(error),
            }
            // Neither a reservation nor an outage that came in meanwhile may wait for the remaining batches.
            self.write_ledger()?;
            self.write_detections()?;
            self.write_events()?;
        }
        if Instant::now() >= self.delete_expired_at {
            self.delete_expired()?;
        }
        self.update_recordings()
    }

    /// Deletes the recordings without a probe, and removes deleted ones from the documents of their probes.
    fn update_recordings(&mut self) -> rusqlite::Result<()> {
        let store = self.store.as_mut().expect("opened before this call");
        self.recordings.sweep(|room| store.has_probe(room))?;
        self.recordings.delete_discarded();
        self.unrecorded.append(&mut self.recordings.take_deleted());
        if !self.unrecorded.is_empty() {
            store.remove_recordings(&self.unrecorded)?;
            self.unrecorded.clear();
        }
        Ok(())
    }

    fn write_ledger(&mut self) -> rusqlite::Result<()> {
        let store = self.store.as_mut().expect("opened before this call");
        let (rows, change, accepted) = self.shared.unwritten();
        let written = (|| {
            if accepted && !self.accepted {
                store.accept_lost_ledger()?;
                self.accepted = true;
            }
            if rows.is_empty() {
                return Ok(());
            }
            store.write_rows(&rows)
        })();
        match written {
            Ok(()) => self.shared.ledger_written(change),
            Err(_) => self.shared.set_ledger_down(),
        }
        written
    }

    fn write_detections(&mut self) -> rusqlite::Result<()> {
        let (rows, change) = self.shared.lock().detections.unwritten();
        if !rows.is_empty() {
            let store = self.store.as_mut().expect("opened before this call");
            match store.write_detections(&rows) {
                Err(error) if is_of_content(&error) => {
                    tracing::error!(
                        %error,
                        "can't write states, incidents and messages to the history: they are dropped"
                    );
                    self.shared.count_fault();
                }
                written => written?,
            }
        }
        self.shared.detections_written(change);
        Ok(())
    }

    fn write_events(&mut self) -> rusqlite::Result<()> {
        while let Some(event) = self.shared.next_event() {
            let store = self.store.as_mut().expect("opened before this call");
            match store.write_event(&event) {
                Err(error) if is_of_content(&error) => {
                    tracing::error!(%error, "can't write an event to the history: it is dropped");
                    self.shared.count_fault();
                }
                written => written?,
            }
            self.shared.event_done();
        }
        Ok(())
    }

    /// Runs one step. If there is more to delete, the next step follows at once.
    fn delete_expired(&mut self) -> rusqlite::Result<()> {
        let store = self.store.as_mut().expect("opened before this call");
        let (wall, now) = ((self.shared.clock)(), Instant::now());
        let trusted = self.clock.trusts(wall, now).then_some(wall);
        let expiry = store.delete_expired(&self.settings, trusted, &self.shared.boot)?;
        self.recordings.delete(expiry.rooms);
        if let Some(wall) = trusted {
            self.shared.lock().ledger.forget(wall);
            self.recordings
                .expire((wall - self.settings.keep_recordings).into());
        }
        if expiry.for_size {
            self.warn_of_size(now);
        }
        self.delete_expired_at = Instant::now();
        if !expiry.more {
            self.delete_expired_at += EXPIRY_INTERVAL;
        }
        Ok(())
    }

    fn warn_of_size(&mut self, now: Instant) {
        let quiet = |warned_at| now - warned_at < SIZE_WARNING_INTERVAL;
        if !self.size_warned_at.is_some_and(quiet) {
            self.size_warned_at = Some(now);
            tracing::warn!(
                "the history is larger than history.max_megabytes = {}: the oldest batches are deleted before history.keep is \
                 over. Raise max_megabytes, or shorten keep",
                self.settings.max_megabytes
            );
        }
    }

    #[cfg(test)]
    pub(super) fn dir(&self) -> &std::path::Path {
        &self.settings.dir
    }

    #[cfg(test)]
    pub(super) fn store(&mut self) -> &mut Store {
        self.store.as_mut().expect("the test has a writable folder")
    }
}
