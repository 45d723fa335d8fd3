//! The one thread that writes: ledger rows first, then batches. In between it deletes what is too old or too large.
//!
//! It retries what it can't write: ledger rows without limit, batches up to a bound.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::HistoryShared;
use super::store::{Store, StoreOpenError, is_of_content};
use crate::config;

/// Pause between two attempts while the disk takes nothing.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// How often the thread looks for what is too old or too large.
const EXPIRY_INTERVAL: Duration = Duration::from_mins(1);

pub(super) struct HistoryWriter {
    shared: Arc<HistoryShared>,
    settings: config::HistorySettings,
    /// `None` while it can't be opened.
    store: Option<Store>,
    delete_expired_at: Instant,
    /// The store has been set to count a lost ledger from zero.
    accepted: bool,
}

impl HistoryWriter {
    pub(super) fn new(
        shared: Arc<HistoryShared>,
        settings: config::HistorySettings,
        store: Option<Store>,
    ) -> Self {
        Self {
            shared,
            settings,
            store,
            delete_expired_at: Instant::now(),
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
        if self.store.is_none() && !self.reopen() {
            return;
        }
        match self.write() {
            Ok(()) => self.shared.set_healthy(),
            Err(error) => self.shared.set_unwritable(&format!("can't write: {error}")),
        }
    }

    fn reopen(&mut self) -> bool {
        match Store::open(&self.settings.dir, (self.shared.clock)()) {
            Ok((store, loaded)) => {
                self.shared.lock().load(loaded);
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
        while let Some(record) = self.shared.next_record() {
            let store = self.store.as_mut().expect("opened before this call");
            match store.write_record(&record) {
                Ok(()) => self.shared.record_done(true),
                Err(error) if is_of_content(&error) => {
                    // Dropped, because a retry would fail in the same way and hold up all later batches.
                    tracing::error!(%error, "can't write a batch to the history: it is dropped");
                    self.shared.count_fault();
                    self.shared.record_done(false);
                }
                Err(error) => return Err(error),
            }
            // A reservation that came in meanwhile must not wait for the remaining batches.
            self.write_ledger()?;
        }
        if Instant::now() >= self.delete_expired_at {
            self.delete_expired()?;
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

    /// Runs one step. If there is more to delete, the next step follows at once.
    fn delete_expired(&mut self) -> rusqlite::Result<()> {
        let store = self.store.as_mut().expect("opened before this call");
        let more = store.delete_expired(&self.settings, (self.shared.clock)())?;
        self.delete_expired_at = Instant::now();
        if !more {
            self.delete_expired_at += EXPIRY_INTERVAL;
        }
        Ok(())
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
