//! Reports outages to people: webhooks, `PagerDuty` and heartbeats.
//!
//! Each message is in the history before it is sent, and it leaves the history once a channel has taken it. So it is delivered
//! at least once, over restarts, and in order per incident.
//!
//! Each channel has a task of its own, so a receiver that does not answer delays no other one. `queue` decides what a channel
//! sends next, `webhook` and `pagerduty` make its body, and `sender` sends it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use crate::config::Channel;
use crate::history::OutboxMessage;
use crate::metrics::Metrics;
use crate::report::counted;

mod channel;
mod pagerduty;
mod queue;
mod sender;
#[cfg(test)]
mod tests;
mod text;
mod webhook;

use channel::Worker;
use queue::Pending;
use sender::Sender;

pub(crate) use sender::SendError;

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub(crate) enum NoticeKind {
    /// An incident began, or a recent one goes on.
    Opened,
    /// An incident is over.
    Closed,
    /// The canary has had no verdict on the agent for too long.
    Blind,
    /// It has a verdict again.
    Sighted,
    /// A test by `check --notify`.
    Test,
}

/// One message, before a channel gives it its form. It contains no text of a call and no secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Notice {
    pub(crate) kind: NoticeKind,
    pub(crate) target: String,
    pub(crate) project: String,
    /// `agent` or `service`; `None` if there is no outage.
    pub(crate) fault: Option<String>,
    /// The id of the incident, or of the time without a verdict. Both of its messages have it.
    pub(crate) incident: String,
    /// The incident is one that ended a short time ago.
    pub(crate) continues: bool,
    /// The first failed room, or the last verdict.
    pub(crate) began_at: DateTime<Utc>,
    /// When the state changed.
    pub(crate) at: DateTime<Utc>,
    /// The reasons of the failed rooms with their numbers, the most frequent first.
    pub(crate) reasons: Vec<(String, u32)>,
    /// Failed rooms of all rooms since it began.
    pub(crate) failed: u32,
    pub(crate) rooms: u32,
    /// What differs between failed and good rooms, as sentences.
    pub(crate) differs: Vec<String>,
    /// The detail of the last failure, which names what to do.
    pub(crate) detail: Option<String>,
    /// The page of the incident.
    pub(crate) url: Option<String>,
    /// How the incident ended: `recovered`, or for example `paused`, which is no recovery. `None` while it is open.
    #[serde(default)]
    pub(crate) ended_by: Option<String>,
    /// The faults are simulated.
    pub(crate) drill: bool,
}

/// Removes a message from the history: it was delivered or given up. It must not block.
pub(crate) type OnDone = Arc<dyn Fn(&str) + Send + Sync>;

/// The channels and their tasks. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Notifier {
    inner: Arc<NotifierInner>,
}

struct NotifierInner {
    /// `None` once the notifier is closed.
    workers: Mutex<Option<BTreeMap<String, Worker>>>,
    done: OnDone,
    metrics: Metrics,
    /// The time of the last message's id, in microseconds.
    last_id: AtomicI64,
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notifier").finish_non_exhaustive()
    }
}

impl Notifier {
    /// Starts a task per channel. `left` are the messages that an earlier run did not deliver, the oldest first.
    pub(crate) fn start_with(
        channels: &BTreeMap<String, Channel>,
        left: Vec<OutboxMessage>,
        done: OnDone,
        metrics: Metrics,
    ) -> Self {
        let notifier = Self {
            inner: Arc::new(NotifierInner {
                workers: Mutex::new(Some(BTreeMap::new())),
                done,
                metrics,
                last_id: AtomicI64::new(0),
            }),
        };
        notifier.configure(channels);
        if !left.is_empty() {
            tracing::info!(
                "an earlier run did not deliver {} about outages; this run will",
                counted(left.len() as u64, "message")
            );
        }
        notifier.enqueue(left, true);
        notifier
    }

    /// Takes changed settings. Messages of a removed channel are dropped; those of a changed one are sent as it says now.
    /// After [`Self::close`], it starts no channel.
    pub(crate) fn configure(&self, channels: &BTreeMap<String, Channel>) {
        let mut workers = self.workers();
        let Some(workers) = workers.as_mut() else {
            return;
        };
        let gone: Vec<String> = workers
            .keys()
            .filter(|name| !channels.contains_key(*name))
            .cloned()
            .collect();
        for name in gone {
            if let Some(worker) = workers.remove(&name) {
                self.drop_all(&name, worker.stop(), "the channel was removed");
            }
            self.inner.metrics.remove_channel(&name);
        }
        for (name, channel) in channels {
            if let Some(worker) = workers.get_mut(name) {
                if worker.takes(channel) {
                    worker.configure(channel);
                    continue;
                }
                let messages = workers.remove(name).map(Worker::stop).unwrap_or_default();
                self.drop_all(name, messages, "the channel is of another kind now");
            }
            let metrics = self.inner.metrics.channel(name);
            let done = Arc::clone(&self.inner.done);
            workers.insert(name.clone(), Worker::start(name, channel, metrics, done));
        }
    }

    /// One message for each channel that reports this target. They must be in the history before [`Self::deliver`].
    pub(crate) fn messages(&self, notice: &Notice) -> Vec<OutboxMessage> {
        let Ok(document) = serde_json::to_string(notice) else {
            return Vec::new();
        };
        let workers = self.workers();
        let reporting = workers
            .iter()
            .flatten()
            .filter(|(_, worker)| worker.takes_messages() && worker.reports(&notice.target));
        reporting
            .map(|(name, _)| OutboxMessage {
                id: self.new_id(),
                channel: name.clone(),
                created_at: Utc::now(),
                document: document.clone(),
            })
            .collect()
    }

    /// Sends messages that are in the history.
    pub(crate) fn deliver(&self, messages: Vec<OutboxMessage>) {
        self.enqueue(messages, false);
    }

    /// Requests the heartbeats that report this target: the canary has a verdict on it. Does not wait for them.
    pub(crate) fn heartbeat(&self, target: &str) {
        for worker in self.workers().iter().flat_map(BTreeMap::values) {
            if worker.reports(target) {
                worker.beat();
            }
        }
    }

    /// Sends what can be sent at once, and ends the tasks at `deadline` at the latest. Other messages stay in the history, for
    /// the next run, also those that arrive later.
    pub(crate) async fn close(&self, deadline: Instant) {
        let workers = self.workers().take().unwrap_or_default();
        for worker in workers.values() {
            worker.finish();
        }
        let mut left = 0;
        for (_, mut worker) in workers {
            let ended = timeout_at(deadline, worker.ended()).await;
            if ended.is_err() {
                tracing::debug!("a channel did not finish in time");
            }
            left += worker.stop().len();
        }
        if left > 0 {
            warn_of_undelivered(left);
        }
    }

    fn enqueue(&self, messages: Vec<OutboxMessage>, from_earlier_run: bool) {
        let (now, wall) = (Instant::now(), Utc::now());
        let workers = self.workers();
        let Some(workers) = &*workers else {
            // Not `done`: that would remove them from the history.
            warn_of_undelivered(messages.len());
            return;
        };
        for message in messages {
            let OutboxMessage { id, channel, .. } = &message;
            let Some(worker) = workers
                .get(channel)
                .filter(|worker| worker.takes_messages())
            else {
                tracing::warn!(
                    channel,
                    "a message is dropped: channel {channel} is not configured"
                );
                (self.inner.done)(id);
                continue;
            };
            let notice: Notice = match serde_json::from_str(&message.document) {
                Ok(notice) => notice,
                Err(error) => {
                    tracing::error!(
                        channel,
                        "a message to {channel} is dropped: it cannot be read: {error}"
                    );
                    self.inner.metrics.channel(channel).lost(1);
                    (self.inner.done)(id);
                    continue;
                }
            };
            // A clock that was set back gives no message a longer life.
            let age = (wall - message.created_at).to_std().unwrap_or_default();
            let mut pending = Pending::new(message.id, notice, now, age);
            pending.may_have_arrived = from_earlier_run;
            worker.push(pending);
        }
    }

    fn drop_all(&self, channel: &str, messages: Vec<Pending>, why: &str) {
        if messages.is_empty() {
            return;
        }
        tracing::warn!(
            channel,
            "the canary drops {} to {channel}: {why}",
            counted(messages.len() as u64, "message")
        );
        for message in messages {
            (self.inner.done)(&message.id);
        }
    }

    /// Sorts by time, also if the clock is set back while this process runs.
    fn new_id(&self) -> String {
        let now = Utc::now().timestamp_micros();
        let last = self.inner.last_id.fetch_max(now, Ordering::Relaxed);
        let time = if last < now {
            now
        } else {
            self.inner.last_id.fetch_add(1, Ordering::Relaxed) + 1
        };
        format!("{time:016}-{:08x}", fastrand::u32(..))
    }

    fn workers(&self) -> MutexGuard<'_, Option<BTreeMap<String, Worker>>> {
        // Each change is a single insert, remove or take, so a panic elsewhere leaves the map consistent.
        self.inner
            .workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn warn_of_undelivered(messages: usize) {
    let messages = counted(messages as u64, "message");
    tracing::warn!("this run did not deliver {messages} about outages; the next run will");
}

/// Sends a test message to a channel; returns how long that took.
///
/// # Errors
/// The receiver did not take it.
pub(crate) async fn send_test(channel: &Channel) -> Result<Duration, SendError> {
    let started = Instant::now();
    let sender = Sender::new(channel)?;
    sender.test(&sender::test_notice(Utc::now())).await?;
    Ok(started.elapsed())
}
