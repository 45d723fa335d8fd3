//! The one thread that writes: ledger rows first, then batches, and in between it forgets what is too old or too much.
//!
//! What it can't write it keeps and tries again: the ledger's rows for as long as it takes, batches up to a bound.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Shared;
use super::store::{NotOpened, Store, is_of_content};
use crate::config;

/// From one try to the next while the disk takes nothing.
const RETRY: Duration = Duration::from_secs(5);

/// How often it looks for what is too old.
const FORGET_EVERY: Duration = Duration::from_mins(1);

pub(super) struct Writer {
    shared: Arc<Shared>,
    settings: config::HistorySettings,
    store: Option<Store>,
    forget_at: Instant,
    accepted: bool,
}

impl Writer {
    /// `store`: `None` where it can't be opened yet.
    pub fn new(
        shared: Arc<Shared>,
        settings: config::HistorySettings,
        store: Option<Store>,
    ) -> Self {
        Self {
            shared,
            settings,
            store,
            forget_at: Instant::now(),
            accepted: false,
        }
    }

    pub fn run(mut self) {
        // Also where this thread panics: nobody must wait for it. The store is closed and unlocked by then.
        struct Ended(Arc<Shared>);
        impl Drop for Ended {
            fn drop(&mut self) {
                self.0.writer_ended();
            }
        }
        let _ended = Ended(Arc::clone(&self.shared));
        loop {
            let closing = self.shared.wait_for_work(self.pause());
            self.turn();
            if closing {
                break;
            }
        }
        drop(self.store.take());
    }

    fn pause(&self) -> Duration {
        let forget = self.forget_at.duration_since(Instant::now());
        if self.shared.is_degraded() {
            forget.min(RETRY)
        } else {
            forget
        }
    }

    /// Does all that is to be done now.
    pub fn turn(&mut self) {
        if self.store.is_none() && !self.reopen() {
            return;
        }
        match self.write() {
            Ok(()) => self.shared.well(),
            Err(error) => self.shared.trouble(&format!("can't write: {error}")),
        }
    }

    fn reopen(&mut self) -> bool {
        match Store::open(&self.settings.dir, (self.shared.clock)()) {
            Ok((store, loaded)) => {
                self.shared.lock().load(loaded);
                self.store = Some(store);
                true
            }
            Err(NotOpened::Unavailable(why)) => {
                self.shared.trouble(&why);
                false
            }
            Err(NotOpened::Refused(error)) => {
                self.shared.trouble(&error.to_string());
                false
            }
        }
    }

    fn write(&mut self) -> rusqlite::Result<()> {
        self.write_ledger()?;
        while let Some(record) = self.shared.next_record() {
            let store = self.store.as_mut().expect("a turn has a store");
            match store.write_record(&record) {
                Ok(()) => self.shared.record_done(true),
                Err(error) if is_of_content(&error) => {
                    tracing::error!(%error, "a batch does not fit into the history");
                    self.shared.count_fault();
                    self.shared.record_done(false);
                }
                Err(error) => return Err(error),
            }
            self.write_ledger()?;
        }
        if Instant::now() >= self.forget_at {
            self.forget()?;
        }
        Ok(())
    }

    fn write_ledger(&mut self) -> rusqlite::Result<()> {
        let store = self.store.as_mut().expect("a turn has a store");
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
            Err(_) => self.shared.ledger_down(),
        }
        written
    }

    /// One step; the next follows at once where there is more.
    fn forget(&mut self) -> rusqlite::Result<()> {
        let store = self.store.as_mut().expect("a turn has a store");
        let more = store.forget(&self.settings, (self.shared.clock)())?;
        self.forget_at = Instant::now();
        if !more {
            self.forget_at += FORGET_EVERY;
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn dir(&self) -> &std::path::Path {
        &self.settings.dir
    }

    #[cfg(test)]
    pub fn store(&mut self) -> &mut Store {
        self.store.as_mut().expect("the test has a writable folder")
    }
}
