//! The shutdown of a daemon, in order: ticks, batches, rooms, history, and HTTP last.

use std::pin::pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, interval, sleep, sleep_until};

use super::{Daemon, DaemonCommand, REFRESH_INTERVAL, ShutdownKind, send_reply, supervisor};
use crate::http::{BatchRefused, Control, DaemonStage, ReloadRefused};
use crate::janitor::FINAL_DELETION_TIMEOUT;
use crate::report::counted;

/// How long an aborted batch may take in addition to the deletion of its rooms.
const ABORT_TIMEOUT: Duration = Duration::from_millis(2500);
/// How long the channels may take to deliver what can be delivered at once.
const NOTIFY_CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the history may take to write its last records.
const HISTORY_CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

impl Daemon {
    /// Shuts down, with HTTP last, so that a scraper still receives the final values. Batches may run on for `grace`.
    pub(super) async fn drain(
        mut self,
        commands: &mut mpsc::Receiver<DaemonCommand>,
        grace: Duration,
    ) -> ShutdownKind {
        supervisor::stopping();
        self.stage = DaemonStage::Draining;
        if let Some(reload) = self.reload.take() {
            reload.refuse(&ReloadRefused::ShuttingDown);
        }
        for name in self.targets.keys() {
            self.ticker.remove(name);
        }
        self.refresh();
        let running = counted(self.batches.len() as u64, "running batch");
        tracing::info!("stopping; waiting for {running}");
        let kind = tokio::select! {
            () = self.shut_down(grace) => ShutdownKind::Drained,
            () = second_stop(commands) => ShutdownKind::Immediate,
        };
        if kind == ShutdownKind::Immediate {
            tracing::warn!("stop requested again: stopping at once");
            // This drops the probes, whose rooms the janitor deletes.
            self.batches.abort_all();
            self.clean_up(Instant::now() + FINAL_DELETION_TIMEOUT).await;
        }
        self.http_end.cancel();
        self.control.close();
        while let Some(control) = self.control.recv().await {
            refuse(control);
        }
        while self.http.join_next().await.is_some() {}
        kind
    }

    async fn shut_down(&mut self, grace: Duration) {
        self.join_batches(Instant::now() + grace).await;
        if !self.batches.is_empty() {
            tracing::warn!(
                "aborting {} that did not end within the grace period",
                counted(self.batches.len() as u64, "batch")
            );
            self.abort.cancel();
            let limit = ABORT_TIMEOUT + self.max_cleanup_deadline();
            self.join_batches(Instant::now() + limit).await;
            // A batch that is still running now hangs.
            self.batches.abort_all();
        }
        self.clean_up(Instant::now() + self.max_cleanup_deadline())
            .await;
        let linger = self.config.daemon.lifetime.shutdown_linger;
        self.serve_until(sleep(linger)).await;
    }

    async fn join_batches(&mut self, until: Instant) {
        let mut refresh = interval(REFRESH_INTERVAL);
        while !self.batches.is_empty() {
            tokio::select! {
                () = sleep_until(until) => return,
                () = self.next_event(&mut refresh) => {}
            }
        }
    }

    /// Waits until the rooms are deleted and the history has written its records. A room without confirmed deletion stays in
    /// the journal, and the next start deletes it.
    async fn clean_up(&mut self, until: Instant) {
        let closing = self.janitor.clone().close(until);
        for unconfirmed in self.serve_until(closing).await {
            tracing::warn!(
                "room {} may still exist; the next start deletes it: {}",
                unconfirmed.room,
                unconfirmed.why
            );
        }
        let notifier = self.notifier.clone();
        let closing = notifier.close(Instant::now() + NOTIFY_CLOSE_TIMEOUT);
        self.serve_until(closing).await;
        let history = self.history.clone();
        let closing = history.close(Instant::now() + HISTORY_CLOSE_TIMEOUT);
        if !self.serve_until(closing).await {
            tracing::warn!("the history could not write all of its records");
        }
    }

    /// Handles events until `work` is done.
    async fn serve_until<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let mut refresh = interval(REFRESH_INTERVAL);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = self.next_event(&mut refresh) => {}
            }
        }
    }

    /// Handles one event during the shutdown. Scrapers and operators still get responses. Cancel-safe.
    async fn next_event(&mut self, refresh: &mut Interval) {
        tokio::select! {
            Some(ended) = self.batches.join_next_with_id() => self.batch_ended(ended),
            Some(swept) = self.sweep.join_next() => self.swept(swept),
            Some(control) = self.control.recv() => refuse(control),
            _ = refresh.tick() => self.refresh(),
        }
    }

    fn max_cleanup_deadline(&self) -> Duration {
        let targets = self.config.targets.values();
        let max = targets.map(|target| target.deadlines.cleanup).max();
        max.unwrap_or_default()
    }
}

async fn second_stop(commands: &mut mpsc::Receiver<DaemonCommand>) {
    loop {
        match commands.recv().await {
            Some(DaemonCommand::Stop) => return,
            Some(DaemonCommand::Reload | DaemonCommand::SetFault(_)) => {}
            // No further command can come.
            None => std::future::pending().await,
        }
    }
}

/// Replies to a request that arrives during the shutdown.
fn refuse(control: Control) {
    match control {
        Control::Reload { reply } => send_reply(reply, Err(ReloadRefused::ShuttingDown)),
        Control::RunBatch { reply, .. } => send_reply(reply, Err(BatchRefused::ShuttingDown)),
        Control::SetPaused { reply, .. } => send_reply(reply, Ok(())),
    }
}
