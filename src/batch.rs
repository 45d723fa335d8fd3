//! Runs one batch: opens its rooms as the ramp and the project's guard allow, holds them open, and reports.
//!
//! This module knows neither metrics nor HTTP; both follow from its events and its report.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use chrono::{DateTime, SubsecRound, Utc};
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::config::{Project, Stay, Target};
use crate::guard::{Guard, RoomPermits, RoomTime, room_times};
use crate::history::Reservation;
use crate::livekit::RoomName;
use crate::livekit::engine::panic_message;
use crate::probe::driver::{self, Context, Emit, HoldUntil};
use crate::probe::{
    Failure, Milestone, Outcome, Position, ProbeEvent, ProbeReport, Reason, max_time_to_verdict,
};
use crate::report::{BatchReport, Denial, NotOpened, Purpose};

mod ramp;

use ramp::{Plan, Ramp};

/// What happens in a batch, in order. `index` counts its rooms from 0, in the order of opening.
#[derive(Debug, Clone)]
pub(crate) enum BatchEvent {
    /// No room is open yet: the batch may still wait for its rooms.
    Started,
    RoomOpened {
        index: usize,
        room: RoomName,
    },
    Probe {
        index: usize,
        event: ProbeEvent,
    },
    /// The room stays open until this time, and for as long after it as its call needs.
    HoldDecided {
        index: usize,
        until: Instant,
    },
    /// The probe has ended; no event of this room follows.
    RoomClosed {
        index: usize,
        report: Box<ProbeReport>,
    },
    Ended(Arc<BatchReport>),
}

/// The most events that a batch with this many rooms emits, and this many turns per room.
pub(crate) fn max_events(rooms: usize, turns: u32) -> usize {
    // The batch's start and end; each room's opening, progress, hold and closing.
    2 + rooms * (ProbeEvent::max_per_probe(turns) + 3)
}

/// Runs one batch to its end. A cancelled `abort` ends it early, with every probe `aborted` and every room deleted.
///
/// It reserves agent time before each of its rooms, unless its `access` is unguarded.
///
/// `on_event` is called with each event as soon as the batch knows of it. It must not block: the batch waits for it.
/// Dropping the future drops the probes, and the janitor deletes their rooms.
pub(crate) async fn run(
    batch_id: String,
    target: &str,
    purpose: Purpose,
    context: Context,
    access: Access,
    abort: CancellationToken,
    mut on_event: impl FnMut(&BatchEvent),
) -> Arc<BatchReport> {
    on_event(&BatchEvent::Started);
    let admission = Admission::wait(
        target,
        purpose,
        &context.target,
        &context.project,
        access,
        &abort,
    )
    .await;
    let max_rooms = admission.permits.as_ref().map(RoomPermits::count);
    let started_at = Utc::now().trunc_subsecs(6);
    let plan = Plan {
        rooms: context.target.batch.rooms,
        turns: context.target.caller.turns,
        max_rooms: max_rooms.unwrap_or(context.project.max_rooms),
        ramp: context.target.batch.ramp,
        interval: context.target.batch.interval,
        stay: context.target.batch.stay,
        hold: context.target.batch.hold,
        stop_after_no_shows: context.target.batch.stop_after_no_shows,
    };
    let start_probe = |index, start: ProbeStart| {
        driver::run(
            context.of_room(index),
            start.room,
            start.position,
            start.hold_until,
            start.abort,
            start.emit,
        )
    };
    let runner = BatchRunner::new(plan, admission, abort, start_probe, &mut on_event);
    let (probes, not_opened) = runner.run().await;
    let report = Arc::new(BatchReport {
        batch_id,
        target: target.to_owned(),
        purpose,
        started_at,
        ended_at: Utc::now().trunc_subsecs(6),
        probes,
        not_opened,
    });
    on_event(&BatchEvent::Ended(Arc::clone(&report)));
    report
}

/// A new batch id: it sorts by time and is unique across processes.
pub(crate) fn new_id() -> String {
    let digits = base32(fastrand::u64(..), 4);
    format!(
        "{}-{}-{digits}",
        Utc::now().format("%Y%m%dT%H%M%S"),
        *INSTANCE
    )
}

/// This process in the names that it gives, so that two canaries on one project differ.
static INSTANCE: LazyLock<String> = LazyLock::new(|| base32(fastrand::u64(..), 5));

/// A room name that is never used again: the target's prefix, the instance and 64 random bits.
fn new_room_name(prefix: &str) -> RoomName {
    RoomName(format!(
        "{prefix}{}-{}",
        *INSTANCE,
        base32(fastrand::u64(..), 13)
    ))
}

/// The low `5 × digits` bits in Crockford's alphabet, which has no letter that looks like a digit, in lower case.
fn base32(mut bits: u64, digits: usize) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let digit = |_| {
        let digit = ALPHABET[(bits & 31) as usize];
        bits >>= 5;
        char::from(digit)
    };
    (0..digits).map(digit).collect()
}

/// How a batch gets the right to open its rooms.
pub(crate) enum Access {
    /// Every room may open, and none is journalled.
    Unguarded,
    /// The batch waits until the guard has permits for its rooms.
    Queue(Guard),
    /// The batch has permits already.
    Granted(Guard, RoomPermits),
}

/// What a probe is started with.
struct ProbeStart {
    room: RoomName,
    position: Position,
    hold_until: HoldUntil,
    abort: CancellationToken,
    emit: Emit,
}

/// What the project's guard grants a batch; without a guard, everything.
struct Admission {
    guard: Option<Guard>,
    /// Held until the batch has ended.
    permits: Option<RoomPermits>,
    target: String,
    purpose: Purpose,
    /// The beginning of each room's name.
    name_prefix: String,
    room_times: Vec<RoomTime>,
    max_time_to_verdict: Duration,
}

impl Admission {
    /// Waits until the batch may hold its rooms open. An abort ends the wait, and then no room opens.
    async fn wait(
        name: &str,
        purpose: Purpose,
        target: &Target,
        project: &Project,
        access: Access,
        abort: &CancellationToken,
    ) -> Self {
        let (guard, permits) = match access {
            Access::Unguarded => (None, None),
            Access::Queue(guard) => {
                let permits = abort.run_until_cancelled(guard.acquire(target)).await;
                (Some(guard), permits)
            }
            Access::Granted(guard, permits) => (Some(guard), Some(permits)),
        };
        Self {
            guard,
            permits,
            target: name.to_owned(),
            purpose,
            name_prefix: target.room.name_prefix.clone(),
            room_times: room_times(target, project).collect(),
            max_time_to_verdict: max_time_to_verdict(target),
        }
    }

    fn reserve(&self, index: usize) -> BoxFuture<'static, Admitted> {
        let (guard, target, purpose) = (self.guard.clone(), self.target.clone(), self.purpose);
        let worst_case = self.worst_case(index, self.max_time_to_verdict);
        let room = new_room_name(&self.name_prefix);
        Box::pin(async move {
            let reservation = match guard {
                Some(guard) => {
                    let reserved = guard.reserve(&room, &target, purpose, worst_case);
                    reserved.await.map(Some)
                }
                None => Ok(None),
            };
            Admitted {
                index,
                room,
                reservation,
            }
        })
    }

    /// The worst case of the room with this index, if its verdict takes at most this long after the agent's join.
    fn worst_case(&self, index: usize, to_verdict: Duration) -> Duration {
        let time = self.room_times.get(index).copied().unwrap_or_default();
        time.worst_case(to_verdict)
    }

    fn rejected(&self, outcome: &Outcome, retry_after: Option<Duration>) {
        if let (Some(guard), Outcome::Failed(failure)) = (&self.guard, outcome)
            && let Reason::PlanLimit(limit) = failure.reason
        {
            guard.record_rejection(limit, retry_after);
        }
    }
}

/// The guard's answer for one room.
struct Admitted {
    index: usize,
    room: RoomName,
    reservation: Result<Option<Reservation>, Denial>,
}

/// A probe that was started, and its report once it has ended.
struct ActiveProbe {
    room: RoomName,
    opened_at: DateTime<Utc>,
    hold_until: watch::Sender<Option<Instant>>,
    /// `None` once the probe has ended. If it is dropped before, the room's worst case stays reserved.
    reservation: Option<Reservation>,
    report: Option<ProbeReport>,
}

/// A batch at work: the thin loop around [`Ramp`] that owns the probes' tasks.
struct BatchRunner<F, E> {
    ramp: Ramp,
    admission: Admission,
    start_probe: F,
    abort: CancellationToken,
    on_event: E,
    /// The events of all probes: the one channel of a batch.
    events: mpsc::Receiver<BatchEvent>,
    events_tx: mpsc::Sender<BatchEvent>,
    /// Rooms that wait for the guard's answer, in the order of opening.
    admissions: FuturesOrdered<BoxFuture<'static, Admitted>>,
    probes: Vec<ActiveProbe>,
    tasks: JoinSet<ProbeReport>,
    index_of: HashMap<task::Id, usize>,
}

impl<F, Fut, E> BatchRunner<F, E>
where
    F: Fn(usize, ProbeStart) -> Fut,
    Fut: Future<Output = ProbeReport> + Send + 'static,
    E: FnMut(&BatchEvent),
{
    fn new(
        plan: Plan,
        admission: Admission,
        abort: CancellationToken,
        start_probe: F,
        on_event: E,
    ) -> Self {
        // Capacity for everything that the probes can emit, so that none of them waits and nothing is lost.
        let (events_tx, events) = mpsc::channel(max_events(plan.rooms, plan.turns));
        Self {
            ramp: Ramp::new(plan),
            admission,
            start_probe,
            abort,
            on_event,
            events,
            events_tx,
            admissions: FuturesOrdered::new(),
            probes: Vec::new(),
            tasks: JoinSet::new(),
            index_of: HashMap::new(),
        }
    }

    async fn run(mut self) -> (Vec<ProbeReport>, Option<NotOpened>) {
        let abort = self.abort.clone();
        loop {
            let aborted = abort.is_cancelled();
            if aborted {
                self.ramp.halt("the batch was aborted".to_owned());
            }
            while let Some(index) = self.ramp.open_next(Instant::now()) {
                self.admissions.push_back(self.admission.reserve(index));
            }
            if self.ramp.halted {
                self.admissions = FuturesOrdered::new();
                self.ramp.rooms.truncate(self.probes.len());
            }
            self.hold_together_once_over();
            let due = self.ramp.due();
            if self.tasks.is_empty() && self.admissions.is_empty() && due.is_none() {
                break;
            }
            tokio::select! {
                biased;
                () = abort.cancelled(), if !aborted => {}
                Some(event) = self.events.recv() => self.handle(&event),
                Some(ended) = self.tasks.join_next_with_id() => self.probe_ended(ended),
                Some(admitted) = self.admissions.next() => self.admitted(admitted),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
        }
        self.report_no_rejection();
        let reports = self
            .probes
            .into_iter()
            .map(|probe| probe.report.expect("every task has ended with a report"));
        (reports.collect(), self.ramp.not_opened())
    }

    fn admitted(&mut self, admitted: Admitted) {
        match admitted.reservation {
            Ok(reservation) => self.open(admitted.index, admitted.room, reservation),
            Err(denial) => self.ramp.denied(denial),
        }
    }

    fn open(&mut self, index: usize, room: RoomName, mut reservation: Option<Reservation>) {
        if let Some(reservation) = &mut reservation {
            reservation.opened();
        }
        let (hold_until, held) = watch::channel(None);
        self.probes.push(ActiveProbe {
            room: room.clone(),
            opened_at: Utc::now().trunc_subsecs(6),
            hold_until,
            reservation,
            report: None,
        });
        self.handle(&BatchEvent::RoomOpened {
            index,
            room: room.clone(),
        });
        let start = ProbeStart {
            room,
            position: position(index),
            hold_until: held,
            abort: self.abort.clone(),
            emit: emit_to(self.events_tx.clone(), index),
        };
        let task = self.tasks.spawn((self.start_probe)(index, start));
        self.index_of.insert(task.id(), index);
    }

    /// Passes an event to the ramp first, then to `on_event`.
    fn handle(&mut self, event: &BatchEvent) {
        if let BatchEvent::Probe { index, event } = event {
            self.advance(*index, event);
        }
        (self.on_event)(event);
    }

    fn advance(&mut self, index: usize, event: &ProbeEvent) {
        match event {
            ProbeEvent::JoinDecided { joined: true } => self.ramp.joined(index),
            ProbeEvent::OutcomeDecided {
                outcome,
                retry_after,
            } => {
                self.ramp.outcome_decided(index, outcome);
                self.admission.rejected(outcome, *retry_after);
            }
            ProbeEvent::Reached {
                milestone: Milestone::AgentJoined,
                at,
            } if self.ramp.plan.stay == Stay::OneByOne => {
                self.hold(index, *at + self.ramp.plan.hold);
            }
            ProbeEvent::TurnStarted { to_verdict } => {
                let worst_case = self.admission.worst_case(index, *to_verdict);
                if let Some(reservation) = &mut self.probes[index].reservation {
                    reservation.shrink(worst_case);
                }
            }
            ProbeEvent::JoinDecided { joined: false } | ProbeEvent::Reached { .. } => {}
        }
    }

    fn probe_ended(&mut self, ended: Result<(task::Id, ProbeReport), JoinError>) {
        // On another thread the probe may have emitted its last events after the channel was looked at.
        while let Ok(event) = self.events.try_recv() {
            self.handle(&event);
        }
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let index = self.index_of[&id];
        let probe = &mut self.probes[index];
        let reservation = probe.reservation.take();
        let report = match ended {
            Ok((_, report)) => {
                if let Some(reservation) = reservation {
                    settle(reservation, &report);
                }
                report
            }
            // What its agent did is unknown, so its worst case stays reserved.
            Err(error) => crashed(probe, position(index), error),
        };
        probe.report = Some(report.clone());
        self.ramp.ended(index, &report.outcome);
        self.handle(&BatchEvent::RoomClosed {
            index,
            report: Box::new(report),
        });
    }

    fn report_no_rejection(&self) {
        let mut reports = self.probes.iter().filter_map(|probe| probe.report.as_ref());
        if let Some(permits) = &self.admission.permits
            && !self.probes.is_empty()
            && !reports.any(|report| report.outcome.is_plan_limit())
        {
            permits.confirm_none_rejected();
        }
    }

    fn hold_together_once_over(&mut self) {
        if self.ramp.plan.stay == Stay::Together && self.ramp.is_over() {
            let until = Instant::now() + self.ramp.plan.hold;
            for index in 0..self.probes.len() {
                self.hold(index, until);
            }
        }
    }

    /// The first end of a hold is final.
    fn hold(&mut self, index: usize, until: Instant) {
        let decided = self.probes[index].hold_until.send_if_modified(|held| {
            let first = held.is_none();
            held.get_or_insert(until);
            first
        });
        if decided {
            (self.on_event)(&BatchEvent::HoldDecided { index, until });
        }
    }
}

/// Sends a probe's events to its batch without waiting.
fn emit_to(events: mpsc::Sender<BatchEvent>, index: usize) -> Emit {
    Box::new(move |event| {
        // If the batch is gone, so is the reader of its events.
        if let Err(TrySendError::Full(lost)) = events.try_send(BatchEvent::Probe { index, event }) {
            tracing::warn!(?lost, "a batch event was lost: its channel is too small");
        }
    })
}

/// Settles the reservation at the billed time. If the deletion is unconfirmed, the agent may still be in the room, so at
/// least the worst case is billed.
fn settle(reservation: Reservation, report: &ProbeReport) {
    let billed = match report.billed() {
        Some(billed) if report.timeline.get(Milestone::RoomDeleted).is_none() => {
            billed.max(reservation.worst_case())
        }
        billed => billed.unwrap_or_default(),
    };
    reservation.settle(billed);
}

fn position(index: usize) -> Position {
    if index == 0 {
        Position::First
    } else {
        Position::Later
    }
}

/// The report of a probe whose task panicked outside the code that catches panics.
fn crashed(probe: &ActiveProbe, position: Position, error: JoinError) -> ProbeReport {
    let room = probe.room.clone();
    let detail = match error.try_into_panic() {
        Ok(panic) => {
            let text = panic_message(&*panic).unwrap_or("no message");
            format!("the canary's own probe crashed: {text}")
        }
        Err(error) => format!("the canary's own probe was stopped: {error}"),
    };
    tracing::error!(%room, "{detail}");
    let failure = Failure {
        reason: Reason::Internal,
        detail,
    };
    ProbeReport::new(room, position, probe.opened_at, Outcome::Failed(failure))
}

#[cfg(test)]
mod tests;
