//! The task of one channel: it sends what its queue holds, one request at a time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::OnDone;
use super::queue::{Delivery, MAX_WAITING, Pending, Queue, Step, Style};
use super::sender::{SendError, Sender};
use crate::config::{Channel, ChannelKind};
use crate::metrics::ChannelMetrics;
use crate::report::counted;

/// A channel, its task, and what they share.
pub(super) struct Worker {
    settings: Channel,
    shared: Arc<Shared>,
    task: AbortOnDropHandle<()>,
}

struct Shared {
    name: String,
    /// The error of an address that cannot be used. Validated settings have none.
    sender: Mutex<Arc<Result<Sender, SendError>>>,
    feed: Feed,
    /// There is something to do.
    news: Notify,
    closing: AtomicBool,
    metrics: ChannelMetrics,
    done: OnDone,
}

/// What a channel sends.
enum Feed {
    Messages(Mutex<Queue>),
    /// Whether a heartbeat is due. A later one replaces it.
    Beats(AtomicBool),
}

impl Worker {
    pub(super) fn start(
        name: &str,
        settings: &Channel,
        metrics: ChannelMetrics,
        done: OnDone,
    ) -> Self {
        let sender = Sender::new(settings);
        let feed = match style(settings) {
            Some(style) => Feed::Messages(Mutex::new(Queue::new(style))),
            None => Feed::Beats(AtomicBool::new(false)),
        };
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            sender: Mutex::new(Arc::new(sender)),
            feed,
            news: Notify::new(),
            closing: AtomicBool::new(false),
            metrics,
            done,
        });
        let task = tokio::spawn(Arc::clone(&shared).run());
        Self {
            settings: settings.clone(),
            shared,
            task: AbortOnDropHandle::new(task),
        }
    }

    /// Whether a channel with these settings can continue with this one's queue.
    pub(super) fn takes(&self, settings: &Channel) -> bool {
        style(settings) == style(&self.settings)
    }

    pub(super) fn configure(&mut self, settings: &Channel) {
        if *settings == self.settings {
            return;
        }
        self.settings = settings.clone();
        *lock(&self.shared.sender) = Arc::new(Sender::new(settings));
        if let Feed::Messages(queue) = &self.shared.feed {
            lock(queue).wake(Instant::now());
        }
        self.shared.news.notify_one();
    }

    pub(super) fn reports(&self, target: &str) -> bool {
        self.settings.reports(target)
    }

    pub(super) fn takes_messages(&self) -> bool {
        matches!(self.shared.feed, Feed::Messages(_))
    }

    pub(super) fn push(&self, message: Pending) {
        let Feed::Messages(queue) = &self.shared.feed else {
            return;
        };
        let displaced = lock(queue).push(message);
        if let Some(displaced) = displaced {
            let Shared { name, .. } = &*self.shared;
            tracing::error!(
                channel = name,
                "the oldest message to {name} is dropped: more than {MAX_WAITING} messages wait"
            );
            self.shared.lost(&[displaced]);
        }
        self.shared.news.notify_one();
    }

    /// Requests the heartbeat; a channel of another kind ignores it.
    pub(super) fn beat(&self) {
        if let Feed::Beats(due) = &self.shared.feed {
            due.store(true, Ordering::Release);
            self.shared.news.notify_one();
        }
    }

    /// The task ends when it has sent what can be sent at once.
    pub(super) fn finish(&self) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.news.notify_one();
    }

    /// Waits for the end of the task. Cancel-safe.
    pub(super) async fn ended(&mut self) {
        let ended = (&mut self.task).await;
        if let Err(error) = ended {
            tracing::error!("the task of a channel has ended: {error}");
        }
    }

    /// Ends the task at once. Returns the messages that it has not delivered.
    pub(super) fn stop(self) -> Vec<Pending> {
        self.task.abort();
        match &self.shared.feed {
            Feed::Messages(queue) => lock(queue).clear(),
            Feed::Beats(_) => Vec::new(),
        }
    }
}

impl Shared {
    async fn run(self: Arc<Self>) {
        match &self.feed {
            Feed::Messages(queue) => self.send_messages(queue).await,
            Feed::Beats(due) => self.send_beats(due).await,
        }
    }

    async fn send_messages(&self, queue: &Mutex<Queue>) {
        loop {
            let closing = self.closing.load(Ordering::Acquire);
            let step = lock(queue).next(Instant::now(), closing);
            match step {
                Step::Send(delivery) => self.send(queue, &delivery).await,
                Step::Skip(messages) => {
                    let Self { name, .. } = self;
                    tracing::info!(
                        channel = name,
                        "an incident is not reported to {name}: it was over before a message could be sent"
                    );
                    self.remove(&messages);
                }
                Step::GiveUp(messages) => {
                    let Self { name, .. } = self;
                    tracing::error!(
                        channel = name,
                        "the canary gives up {} to {name}: no delivery within a day",
                        counted(messages.len() as u64, "message")
                    );
                    self.lost(&messages);
                }
                Step::WaitUntil(_) | Step::Idle if closing => return,
                Step::WaitUntil(at) => tokio::select! {
                    () = sleep_until(at) => {}
                    () = self.news.notified() => {}
                },
                Step::Idle => self.news.notified().await,
            }
        }
    }

    async fn send(&self, queue: &Mutex<Queue>, delivery: &Delivery) {
        let Self { name, .. } = self;
        let sent = self.attempt(Some(delivery)).await;
        let now = Instant::now();
        match sent {
            Ok(()) => {
                let delivered = lock(queue).delivered(delivery, now);
                tracing::info!(
                    channel = name,
                    messages = delivered.len(),
                    attempt = delivery.attempts + 1,
                    "notified {name}: {}",
                    delivery.summary()
                );
                self.remove(&delivered);
            }
            Err(error) if error.is_final() => {
                let refused = lock(queue).refused(delivery);
                tracing::error!(
                    channel = name,
                    "a message to {name} is given up, because it would be refused again: {error}"
                );
                self.lost(&refused);
            }
            Err(error) => {
                let next =
                    lock(queue).failed(delivery, now, error.pause(), error.may_have_arrived());
                let wait = next.saturating_duration_since(now).as_secs();
                // Once per message: a receiver that is down for a day would fill the log.
                if delivery.attempts == 0 {
                    tracing::warn!(
                        channel = name,
                        "cannot notify {name}: {error}. The next attempt is in {wait} s; further ones follow for a day"
                    );
                } else {
                    tracing::debug!(
                        channel = name,
                        "cannot notify {name}: {error}. The next attempt is in {wait} s"
                    );
                }
            }
        }
    }

    async fn send_beats(&self, due: &AtomicBool) {
        let Self { name, .. } = self;
        let mut failed = false;
        loop {
            if due.swap(false, Ordering::AcqRel) {
                match self.attempt(None).await {
                    // Once per series of failures: the next heartbeat is the next attempt.
                    Err(error) if !failed => {
                        tracing::warn!(channel = name, "the heartbeat {name} failed: {error}");
                        failed = true;
                    }
                    Err(error) => {
                        tracing::debug!(channel = name, "the heartbeat {name} failed: {error}");
                    }
                    Ok(()) => {
                        if failed {
                            tracing::info!(channel = name, "the heartbeat {name} works again");
                        }
                        failed = false;
                    }
                }
            } else if self.closing.load(Ordering::Acquire) {
                return;
            } else {
                self.news.notified().await;
            }
        }
    }

    /// Makes one request and counts it: this delivery, or the heartbeat if there is none.
    async fn attempt(&self, delivery: Option<&Delivery>) -> Result<(), SendError> {
        let sender = Arc::clone(&lock(&self.sender));
        let sent = match (&*sender, delivery) {
            (Ok(sender), Some(delivery)) => sender.deliver(delivery).await,
            (Ok(sender), None) => sender.beat().await,
            (Err(error), _) => Err(error.clone()),
        };
        self.metrics.attempt(sent.is_ok());
        sent
    }

    /// Removes messages from the history that need no further attempt.
    fn remove(&self, messages: &[Pending]) {
        for message in messages {
            (self.done)(&message.id);
        }
    }

    fn lost(&self, messages: &[Pending]) {
        self.metrics.lost(messages.len() as u64);
        self.remove(messages);
    }
}

/// How a channel combines messages; `None` for a heartbeat, which sends none.
fn style(settings: &Channel) -> Option<Style> {
    match settings.kind {
        ChannelKind::Webhook { .. } => Some(Style::Texts),
        ChannelKind::Pagerduty { .. } => Some(Style::Events),
        ChannelKind::Heartbeat { .. } => None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic can't leave a queue inconsistent: each of its steps replaces whole values.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
