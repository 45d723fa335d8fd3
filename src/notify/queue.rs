//! Which message a channel sends next, and when. Pure: it does no I/O and is given the time.
//!
//! Messages of one incident are sent in order. A message that waits for its next attempt blocks no other incident.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::text::Tense;
use super::{Notice, NoticeKind};

/// Messages of one channel that wait. Each new one replaces the oldest.
pub(super) const MAX_WAITING: usize = 1_000;
/// A message that is not delivered within this time is given up.
pub(super) const GIVE_UP_AFTER: Duration = Duration::from_hours(24);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_mins(5);
/// Upper bound of the time that a receiver can ask to wait.
const LONGEST_PAUSE: Duration = Duration::from_hours(1);
/// After a message about a new outage, further ones of the project wait for the end of this time and become one message.
pub(super) const GROUP_WINDOW: Duration = Duration::from_mins(1);
/// Notices of one grouped message.
const MAX_GROUP: usize = 50;

/// A message that waits for its delivery.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    pub(super) id: String,
    pub(super) notice: Notice,
    pub(super) give_up_at: Instant,
    /// An attempt may have reached the receiver without an answer: in this process, or in one before it.
    pub(super) may_have_arrived: bool,
    pub(super) attempts: u32,
    not_before: Instant,
    in_flight: bool,
}

impl Pending {
    pub(super) fn new(id: String, notice: Notice, now: Instant, age: Duration) -> Self {
        Self {
            id,
            notice,
            give_up_at: now + GIVE_UP_AFTER.saturating_sub(age),
            may_have_arrived: false,
            attempts: 0,
            not_before: now,
            in_flight: false,
        }
    }
}

/// What the channel's task does next.
#[derive(Debug)]
pub(super) enum Step {
    Send(Delivery),
    /// These messages need no request: the receiver never learned of the incident, and it is over.
    Skip(Vec<Pending>),
    /// These messages are too old.
    GiveUp(Vec<Pending>),
    WaitUntil(Instant),
    /// No message waits.
    Idle,
}

/// The content of one request.
#[derive(Debug, Clone)]
pub(super) struct Delivery {
    /// The messages that it delivers.
    ids: Vec<String>,
    /// Several only for a group.
    pub(super) notices: Vec<Notice>,
    pub(super) tense: Tense,
    /// Of the message that has the most.
    pub(super) attempts: u32,
}

impl Delivery {
    /// What it reports, for the log.
    pub(super) fn summary(&self) -> String {
        let notices = self.notices.iter();
        let parts: Vec<String> = notices
            .map(|notice| {
                let kind: &str = notice.kind.into();
                format!("{kind} {} of {}", notice.incident, notice.target)
            })
            .collect();
        parts.join(", ")
    }
}

/// How a channel combines messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// Texts for people: one message for several targets, or for an outage that is over.
    Texts,
    /// Events that a program pairs by the incident's id.
    Events,
}

/// The messages of one channel.
#[derive(Debug)]
pub(super) struct Queue {
    style: Style,
    /// In the order in which they were created.
    waiting: VecDeque<Pending>,
    /// The receiver asked for a pause until then.
    paused_until: Option<Instant>,
    /// The end of the window in which further outages of a project wait, by project.
    grouped_until: BTreeMap<String, Instant>,
}

impl Queue {
    pub(super) fn new(style: Style) -> Self {
        Self {
            style,
            waiting: VecDeque::new(),
            paused_until: None,
            grouped_until: BTreeMap::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Adds a message. Returns the one that it displaces, if the queue is full.
    pub(super) fn push(&mut self, message: Pending) -> Option<Pending> {
        self.waiting.push_back(message);
        if self.waiting.len() <= MAX_WAITING {
            return None;
        }
        let oldest = self.waiting.iter().position(|message| !message.in_flight)?;
        self.waiting.remove(oldest)
    }

    /// Takes all messages out of the queue.
    pub(super) fn clear(&mut self) -> Vec<Pending> {
        self.waiting.drain(..).collect()
    }

    /// The settings of the channel have changed: every message may be sent now.
    pub(super) fn wake(&mut self, now: Instant) {
        self.paused_until = None;
        for message in &mut self.waiting {
            message.not_before = message.not_before.min(now);
        }
    }

    /// What to do at `now`. Messages of a [`Step::Send`] stay in the queue until [`Self::delivered`] or [`Self::refused`].
    ///
    /// `closing`: the process ends, so no message waits for others.
    pub(super) fn next(&mut self, now: Instant, closing: bool) -> Step {
        let expired = self.take(|message| message.give_up_at <= now);
        if !expired.is_empty() {
            return Step::GiveUp(expired);
        }
        if let Some(ids) = self.needless() {
            return Step::Skip(self.take(|message| ids.contains(&message.id)));
        }
        self.grouped_until.retain(|_, until| *until > now);
        let pauses = self.paused_until.filter(|until| *until > now);
        let mut wake_at: Option<Instant> = None;
        let mut wait_until =
            |at: Instant| wake_at = Some(wake_at.map_or(at, |earlier| earlier.min(at)));
        let mut ready: Option<&Pending> = None;
        for message in self.heads() {
            let over = self.end_of(message).is_some();
            let held = (!closing && !over)
                .then(|| self.held_until(message))
                .flatten();
            let at = [Some(message.not_before), pauses, held]
                .into_iter()
                .flatten()
                .max()
                .unwrap_or(now);
            if at > now {
                wait_until(at.min(message.give_up_at));
            } else if ready.is_none_or(|first| message.not_before < first.not_before) {
                // The one that has waited longest since its last attempt: no message keeps the others from being sent.
                ready = Some(message);
            }
        }
        let Some(first) = ready else {
            return wake_at.map_or(Step::Idle, Step::WaitUntil);
        };
        let delivery = self.delivery(first, now);
        for message in &mut self.waiting {
            message.in_flight = delivery.ids.contains(&message.id);
        }
        Step::Send(delivery)
    }

    /// Two events about begin and end of which the receiver needs neither: it never learned of the incident.
    fn needless(&self) -> Option<Vec<String>> {
        let mut unknown = self
            .heads()
            .filter(|message| self.style == Style::Events && !message.may_have_arrived);
        let begin = unknown.find(|message| self.end_of(message).is_some())?;
        Some(self.pair(begin))
    }

    /// The first message of each incident.
    fn heads(&self) -> impl Iterator<Item = &Pending> {
        let mut incidents = BTreeSet::new();
        let waiting = self.waiting.iter();
        waiting.filter(move |message| incidents.insert(&message.notice.incident))
    }

    /// The message about the end that follows this message about the begin.
    fn end_of(&self, begin: &Pending) -> Option<&Pending> {
        let end = match begin.notice.kind {
            NoticeKind::Opened => NoticeKind::Closed,
            NoticeKind::Blind => NoticeKind::Sighted,
            NoticeKind::Closed | NoticeKind::Sighted | NoticeKind::Test => return None,
        };
        let incident = &begin.notice.incident;
        let mut own = self
            .waiting
            .iter()
            .filter(|message| message.notice.incident == *incident);
        own.nth(1).filter(|next| next.notice.kind == end)
    }

    /// The ids of the messages about begin and end.
    fn pair(&self, begin: &Pending) -> Vec<String> {
        let end = self.end_of(begin).map(|end| end.id.clone());
        std::iter::once(begin.id.clone()).chain(end).collect()
    }

    /// The end of the window in which this message waits for others of its project.
    fn held_until(&self, message: &Pending) -> Option<Instant> {
        let groups = self.style == Style::Texts && message.notice.kind == NoticeKind::Opened;
        let until = self.grouped_until.get(&message.notice.project);
        until.filter(|_| groups).copied()
    }

    fn delivery(&self, first: &Pending, now: Instant) -> Delivery {
        let one = |message: &Pending, tense| Delivery {
            ids: vec![message.id.clone()],
            notices: vec![message.notice.clone()],
            tense,
            attempts: message.attempts,
        };
        if let Some(end) = self.end_of(first) {
            return Delivery {
                ids: self.pair(first),
                attempts: first.attempts,
                ..one(end, Tense::Past)
            };
        }
        if self.style == Style::Events || first.notice.kind != NoticeKind::Opened {
            return one(first, Tense::Present);
        }
        let group: Vec<&Pending> = self
            .heads()
            .filter(|message| {
                message.notice.kind == NoticeKind::Opened
                    && message.notice.project == first.notice.project
                    && message.not_before <= now
                    && self.end_of(message).is_none()
            })
            .take(MAX_GROUP)
            .collect();
        Delivery {
            ids: group.iter().map(|message| message.id.clone()).collect(),
            notices: group.iter().map(|message| message.notice.clone()).collect(),
            tense: Tense::Present,
            attempts: group
                .iter()
                .map(|message| message.attempts)
                .max()
                .unwrap_or(0),
        }
    }

    /// The receiver has taken it. Returns its messages, which are no longer in the queue.
    pub(super) fn delivered(&mut self, delivery: &Delivery, now: Instant) -> Vec<Pending> {
        // The receiver works, so what waits because of earlier failures can be sent.
        self.wake(now);
        let opened = delivery
            .notices
            .iter()
            .filter(|notice| notice.kind == NoticeKind::Opened && self.style == Style::Texts);
        for notice in opened {
            let project = notice.project.clone();
            self.grouped_until.insert(project, now + GROUP_WINDOW);
        }
        self.take(|message| delivery.ids.contains(&message.id))
    }

    /// The receiver will never take it. Returns its messages, which are no longer in the queue.
    pub(super) fn refused(&mut self, delivery: &Delivery) -> Vec<Pending> {
        self.take(|message| delivery.ids.contains(&message.id))
    }

    /// The attempt failed. `pause` is what the receiver asks for, and holds for all messages. Returns when the next attempt is.
    pub(super) fn failed(
        &mut self,
        delivery: &Delivery,
        now: Instant,
        pause: Option<Duration>,
        may_have_arrived: bool,
    ) -> Instant {
        let wait = backoff(delivery.attempts);
        if let Some(pause) = pause {
            self.paused_until = Some(now + pause.min(LONGEST_PAUSE));
        }
        for message in &mut self.waiting {
            message.in_flight = false;
            if delivery.ids.contains(&message.id) {
                message.attempts = message.attempts.saturating_add(1);
                message.not_before = now + wait;
                message.may_have_arrived |= may_have_arrived;
            }
        }
        self.paused_until
            .map_or(now + wait, |until| until.max(now + wait))
    }

    fn take(&mut self, mut which: impl FnMut(&Pending) -> bool) -> Vec<Pending> {
        let (taken, kept): (Vec<_>, Vec<_>) = self.waiting.drain(..).partition(|one| which(one));
        self.waiting = kept.into();
        taken
    }
}

/// Doubles with each failed attempt. Up to a quarter less, so that channels of one receiver do not ask in step.
fn backoff(failed_before: u32) -> Duration {
    let factor = 1_u32.checked_shl(failed_before).unwrap_or(u32::MAX);
    let longest = FIRST_BACKOFF.saturating_mul(factor).min(LONGEST_BACKOFF);
    longest.mul_f64(1.0 - fastrand::f64() / 4.0)
}
