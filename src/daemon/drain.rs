//! The end of a daemon, in order: ticks, batches, rooms, history, and HTTP last.

use std::pin::pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, interval, sleep, sleep_until};

use super::{Daemon, Ending, Order, REFRESH, say, supervisor};
use crate::http::{BatchRefused, Control, DaemonStage, ReloadRefused};
use crate::janitor::FINAL_DELETION_TIMEOUT;

/// What a batch that was told to stop may take beyond its rooms' deletion.
const ABORT_BATCH: Duration = Duration::from_millis(2500);
/// For what the history has yet to write.
const LAST_WRITES: Duration = Duration::from_secs(5);

impl Daemon {
    /// Ends in order: ticks, batches, rooms, history, and HTTP last, so that a scrape sees how it all ended.
    pub(super) async fn drain(
        mut self,
        orders: &mut mpsc::Receiver<Order>,
        grace: Duration,
    ) -> Ending {
        supervisor::stopping();
        self.stage = DaemonStage::Draining;
        for name in self.targets.keys() {
            self.ticker.remove(name);
        }
        self.refresh();
        tracing::info!("stopping, {} batches under way", self.batches.len());
        let ending = tokio::select! {
            () = self.end_in_order(grace) => Ending::Drained,
            () = told_to_stop(orders) => Ending::CutShort,
        };
        if ending == Ending::CutShort {
            tracing::warn!("told to stop again: ending at once");
            // The probes are dropped, and the janitor deletes their rooms.
            self.batches.abort_all();
            self.leave(Instant::now() + FINAL_DELETION_TIMEOUT).await;
        }
        self.http_end.cancel();
        self.control.close();
        while let Some(asked) = self.control.recv().await {
            refuse(asked);
        }
        while self.http.join_next().await.is_some() {}
        ending
    }

    async fn end_in_order(&mut self, grace: Duration) {
        self.join_batches(Instant::now() + grace).await;
        if !self.batches.is_empty() {
            tracing::warn!("aborting {} batches", self.batches.len());
            self.abort.cancel();
            let patience = ABORT_BATCH + self.longest_cleanup();
            self.join_batches(Instant::now() + patience).await;
            self.batches.abort_all();
        }
        self.leave(Instant::now() + self.longest_cleanup()).await;
        let linger = self.config.daemon.lifetime.shutdown_linger;
        self.attend(sleep(linger)).await;
    }

    async fn join_batches(&mut self, until: Instant) {
        let mut refresh = interval(REFRESH);
        while !self.batches.is_empty() {
            tokio::select! {
                () = sleep_until(until) => return,
                () = self.meanwhile(&mut refresh) => {}
            }
        }
    }

    /// Waits until the rooms are gone and what there is to write is written. A room that can't be vouched for stays in
    /// the journal, and the next start looks for it.
    async fn leave(&mut self, until: Instant) {
        let closing = self.janitor.clone().close(until);
        for left in self.attend(closing).await {
            tracing::warn!(
                "room {} may be left behind, the next start looks for it: {}",
                left.room,
                left.why
            );
        }
        let history = self.history.clone();
        let closing = history.close(Instant::now() + LAST_WRITES);
        if !self.attend(closing).await {
            tracing::warn!("the history could not be written to its end");
        }
    }

    async fn attend<T>(&mut self, what: impl Future<Output = T>) -> T {
        let mut what = pin!(what);
        let mut refresh = interval(REFRESH);
        loop {
            tokio::select! {
                done = &mut what => return done,
                () = self.meanwhile(&mut refresh) => {}
            }
        }
    }

    /// The next thing that a daemon on its way out sees to: a scraper and an operator still get answers.
    async fn meanwhile(&mut self, refresh: &mut Interval) {
        tokio::select! {
            Some(ended) = self.batches.join_next_with_id() => self.batch_ended(ended),
            Some(swept) = self.sweep.join_next() => self.swept(swept),
            Some(asked) = self.control.recv() => refuse(asked),
            _ = refresh.tick() => self.refresh(),
        }
    }

    fn longest_cleanup(&self) -> Duration {
        let targets = self.config.targets.values();
        let longest = targets.map(|target| target.deadlines.cleanup).max();
        longest.unwrap_or_default()
    }
}

async fn told_to_stop(orders: &mut mpsc::Receiver<Order>) {
    loop {
        match orders.recv().await {
            Some(Order::Stop) => return,
            Some(Order::Reload | Order::Batch(_) | Order::Play(_)) => {}
            // Nobody can tell any more.
            None => std::future::pending().await,
        }
    }
}

/// Answers a request that comes too late.
fn refuse(asked: Control) {
    match asked {
        Control::Reload { reply } => say(reply, Err(ReloadRefused::ShuttingDown)),
        Control::RunBatch { reply, .. } => say(reply, Err(BatchRefused::ShuttingDown)),
        Control::SetPaused { reply, .. } => say(reply, Ok(())),
    }
}
