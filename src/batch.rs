//! The rooms opened for one tick: the ramp, the hold and the caps.
//!
//! It knows no metrics and no HTTP.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;

use chrono::{DateTime, SubsecRound, Utc};
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use tokio::sync::{mpsc, watch};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::config::{Project, Stay, Target};
use crate::guard::{Guard, RoomPermits, worst_cases};
use crate::history::Reservation;
use crate::livekit::RoomName;
use crate::livekit::engine::panic_message;
use crate::probe::driver::{self, Context, HoldUntil};
use crate::probe::{Failure, Milestone, Outcome, Position, Progress, Reason, Report};
use crate::report::{BatchReport, Denial, NotOpened, ProbeReport};

mod ramp;

use ramp::{Plan, Ramp};

/// What a batch tells while it runs.
#[derive(Debug, Clone)]
pub enum BatchEvent {
    Opened { index: usize, room: RoomName },
    Progress { index: usize, progress: Progress },
    Ended { index: usize, report: Box<Report> },
}

/// Runs one batch to its end; a cancelled `abort` ends it early, every probe `aborted`, every room deleted.
///
/// It starts once the project's `guard` has places for its rooms, and asks it before each of them. Without a guard every
/// room may open, and none is journalled.
///
/// `events` never holds the batch up: what a slow or gone reader can't take is lost to it, but not to the report.
/// Dropping the future drops the probes, and the janitor deletes their rooms.
pub async fn run(
    batch_id: String,
    target: &str,
    context: Context,
    guard: Option<Guard>,
    abort: CancellationToken,
    events: mpsc::Sender<BatchEvent>,
) -> BatchReport {
    let rails = Rails::of(target, &context.target, &context.project, guard, &abort).await;
    let max_rooms = rails.places.as_ref().map(RoomPermits::count);
    let started_at = Utc::now().trunc_subsecs(6);
    let plan = Plan {
        rooms: context.target.batch.rooms,
        max_rooms: max_rooms.unwrap_or(context.project.max_rooms),
        ramp: context.target.batch.ramp,
        interval: context.target.batch.interval,
        stay: context.target.batch.stay,
        hold: context.target.batch.hold,
        stop_after_no_shows: context.target.batch.stop_after_no_shows,
    };
    let open = |index, opening: Opening| {
        driver::run(
            context.of_room(index),
            opening.room,
            opening.position,
            opening.hold_until,
            opening.abort,
            opening.progress,
        )
    };
    let running = Running::new(plan, rails, abort, events, open);
    let (probes, not_opened) = running.run().await;
    BatchReport {
        batch_id,
        target: target.to_owned(),
        started_at,
        ended_at: Utc::now().trunc_subsecs(6),
        probes,
        not_opened,
    }
}

/// Sorts by time; unique across processes.
pub fn new_id() -> String {
    let digits = base32(fastrand::u64(..), 4);
    format!(
        "{}-{}-{digits}",
        Utc::now().format("%Y%m%dT%H%M%S"),
        *INSTANCE
    )
}

/// This process in the names that it gives: tells apart two canaries on one project.
static INSTANCE: LazyLock<String> = LazyLock::new(|| base32(fastrand::u64(..), 5));

/// A room name that is never used again: 64 random bits beside the instance.
fn new_room_name() -> RoomName {
    RoomName(format!(
        "canary-{}-{}",
        *INSTANCE,
        base32(fastrand::u64(..), 13)
    ))
}

/// The low `5 × digits` bits, in Crockford's alphabet (no letter that reads as a digit), lower case.
fn base32(mut bits: u64, digits: usize) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let digit = |_| {
        let digit = ALPHABET[(bits & 31) as usize];
        bits >>= 5;
        char::from(digit)
    };
    (0..digits).map(digit).collect()
}

/// What a probe is started with.
struct Opening {
    room: RoomName,
    position: Position,
    hold_until: HoldUntil,
    abort: CancellationToken,
    progress: mpsc::Sender<Progress>,
}

/// What the project's guard grants a batch; everything where there is none.
struct Rails {
    guard: Option<Guard>,
    /// Held until the batch has ended.
    places: Option<RoomPermits>,
    target: String,
    worst_cases: Vec<Duration>,
}

impl Rails {
    /// Waits until the batch may hold its rooms open. An abort ends the wait: nothing opens after it.
    async fn of(
        name: &str,
        target: &Target,
        project: &Project,
        guard: Option<Guard>,
        abort: &CancellationToken,
    ) -> Self {
        let places = match &guard {
            Some(guard) => {
                let places = guard.acquire(target);
                abort.run_until_cancelled(places).await
            }
            None => None,
        };
        Self {
            guard,
            places,
            target: name.to_owned(),
            worst_cases: worst_cases(target, project).collect(),
        }
    }

    fn reserve(&self, index: usize) -> BoxFuture<'static, Asked> {
        let (guard, target) = (self.guard.clone(), self.target.clone());
        let worst_case = self.worst_cases.get(index).copied().unwrap_or_default();
        let room = new_room_name();
        Box::pin(async move {
            let reservation = match guard {
                Some(guard) => guard.reserve(&room, &target, worst_case).await.map(Some),
                None => Ok(None),
            };
            Asked {
                index,
                room,
                reservation,
            }
        })
    }

    fn rejected(&self, outcome: &Outcome, retry_after: Option<Duration>) {
        if let (Some(guard), Outcome::Failed(failure)) = (&self.guard, outcome)
            && let Reason::PlanLimit(limit) = failure.reason
        {
            guard.record_rejection(limit, retry_after);
        }
    }
}

/// Whether a room may open.
struct Asked {
    index: usize,
    room: RoomName,
    reservation: Result<Option<Reservation>, Denial>,
}

struct OpenedProbe {
    room: RoomName,
    /// When it was opened, on both clocks.
    opened: (DateTime<Utc>, Instant),
    hold_until: watch::Sender<Option<Instant>>,
    /// Until the probe has ended; dropped before that, the room's worst case stands.
    reservation: Option<Reservation>,
    report: Option<Report>,
}

impl OpenedProbe {
    /// Its start is the zero of its milestones, on the wall clock: on a busy machine its task runs some time after it
    /// was opened.
    fn into_report(self) -> ProbeReport {
        let report = self.report.expect("every task has ended with a report");
        let (wall, clock) = self.opened;
        let started = report.timeline.get(Milestone::Started).unwrap_or(clock);
        let started_at = wall + started.saturating_duration_since(clock);
        ProbeReport {
            report,
            started_at: started_at.trunc_subsecs(6),
        }
    }
}

/// A batch at work: the thin loop around [`Ramp`] that owns the probes' tasks.
struct Running<F> {
    ramp: Ramp,
    rails: Rails,
    open: F,
    abort: CancellationToken,
    events: mpsc::Sender<BatchEvent>,
    /// Rooms that the guard is asked for, in the order of opening.
    asked: FuturesOrdered<BoxFuture<'static, Asked>>,
    probes: Vec<OpenedProbe>,
    tasks: JoinSet<Report>,
    index_of: HashMap<task::Id, usize>,
}

impl<F, Fut> Running<F>
where
    F: Fn(usize, Opening) -> Fut,
    Fut: Future<Output = Report> + Send + 'static,
{
    fn new(
        plan: Plan,
        rails: Rails,
        abort: CancellationToken,
        events: mpsc::Sender<BatchEvent>,
        open: F,
    ) -> Self {
        Self {
            ramp: Ramp::new(plan),
            rails,
            open,
            abort,
            events,
            asked: FuturesOrdered::new(),
            probes: Vec::new(),
            tasks: JoinSet::new(),
            index_of: HashMap::new(),
        }
    }

    async fn run(mut self) -> (Vec<ProbeReport>, Option<NotOpened>) {
        let (told, mut progress) = mpsc::channel(Progress::MOST);
        let abort = self.abort.clone();
        loop {
            let aborted = abort.is_cancelled();
            if aborted {
                self.ramp.halt("the batch was aborted".to_owned());
            }
            while let Some(index) = self.ramp.open_next(Instant::now()) {
                self.asked.push_back(self.rails.reserve(index));
            }
            if self.ramp.halted {
                self.asked = FuturesOrdered::new();
                self.ramp.stages.truncate(self.probes.len());
            }
            self.hold_together_once_over();
            let due = self.ramp.due();
            if self.tasks.is_empty() && self.asked.is_empty() && due.is_none() {
                break;
            }
            // Progress before endings: a probe has told all of its progress before its task ends.
            tokio::select! {
                biased;
                () = abort.cancelled(), if !aborted => {}
                Some((index, progress)) = progress.recv() => self.progressed(index, progress),
                Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
                Some(asked) = self.asked.next() => self.answered(asked, told.clone()),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
        }
        self.tell_guard_of_no_rejection();
        let reports = self.probes.into_iter().map(OpenedProbe::into_report);
        (reports.collect(), self.ramp.not_opened())
    }

    fn answered(&mut self, asked: Asked, told: mpsc::Sender<(usize, Progress)>) {
        match asked.reservation {
            Ok(reservation) => self.open(asked.index, asked.room, reservation, told),
            Err(refusal) => self.ramp.refused(refusal),
        }
    }

    fn open(
        &mut self,
        index: usize,
        room: RoomName,
        mut reservation: Option<Reservation>,
        told: mpsc::Sender<(usize, Progress)>,
    ) {
        if let Some(reservation) = &mut reservation {
            reservation.opened();
        }
        let (hold_until, held) = watch::channel(None);
        let (progress, seen) = mpsc::channel(Progress::MOST);
        self.probes.push(OpenedProbe {
            room: room.clone(),
            opened: (Utc::now(), Instant::now()),
            hold_until,
            reservation,
            report: None,
        });
        self.tell(BatchEvent::Opened {
            index,
            room: room.clone(),
        });
        let probe = (self.open)(
            index,
            Opening {
                room,
                position: position(index),
                hold_until: held,
                abort: self.abort.clone(),
                progress,
            },
        );
        let task = self.tasks.spawn(forward(index, probe, seen, told));
        self.index_of.insert(task.id(), index);
    }

    fn progressed(&mut self, index: usize, progress: Progress) {
        match &progress {
            Progress::JoinSettled { joined: true } => self.ramp.joined(index),
            Progress::Settled {
                outcome,
                retry_after,
            } => {
                self.ramp.settled(index, outcome);
                self.rails.rejected(outcome, *retry_after);
            }
            Progress::Reached {
                milestone: Milestone::AgentJoined,
                at,
            } if self.ramp.plan.stay == Stay::OneByOne => {
                self.hold(index, *at + self.ramp.plan.hold);
            }
            Progress::JoinSettled { joined: false } | Progress::Reached { .. } => {}
        }
        self.tell(BatchEvent::Progress { index, progress });
    }

    fn ended(&mut self, ended: Result<(task::Id, Report), JoinError>) {
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let index = self.index_of[&id];
        let reservation = self.probes[index].reservation.take();
        let report = match ended {
            Ok((_, report)) => {
                if let Some(reservation) = reservation {
                    settle(reservation, &report);
                }
                report
            }
            // Nobody knows what its agent did: its worst case stands.
            Err(error) => crashed(self.probes[index].room.clone(), position(index), error),
        };
        self.ramp.ended(index, &report.outcome);
        self.tell(BatchEvent::Ended {
            index,
            report: Box::new(report.clone()),
        });
        self.probes[index].report = Some(report);
    }

    fn tell_guard_of_no_rejection(&self) {
        let mut reports = self.probes.iter().filter_map(|probe| probe.report.as_ref());
        if let Some(places) = &self.rails.places
            && !self.probes.is_empty()
            && !reports.any(|report| report.outcome.is_plan_limit())
        {
            places.confirm_none_rejected();
        }
    }

    fn hold_together_once_over(&self) {
        if self.ramp.plan.stay == Stay::Together && self.ramp.is_over() {
            let until = Instant::now() + self.ramp.plan.hold;
            for index in 0..self.probes.len() {
                self.hold(index, until);
            }
        }
    }

    /// The first answer stands.
    fn hold(&self, index: usize, until: Instant) {
        self.probes[index].hold_until.send_if_modified(|held| {
            let first = held.is_none();
            held.get_or_insert(until);
            first
        });
    }

    fn tell(&self, event: BatchEvent) {
        if self.events.try_send(event).is_err() {
            tracing::trace!("the reader of the batch's progress is slow or gone");
        }
    }
}

/// Where the room's deletion is not known, its agent may stay on in it: then not less than the worst case.
fn settle(reservation: Reservation, report: &Report) {
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

/// Runs a probe and passes on what it tells, in order and before its end.
async fn forward(
    index: usize,
    probe: impl Future<Output = Report>,
    mut seen: mpsc::Receiver<Progress>,
    told: mpsc::Sender<(usize, Progress)>,
) -> Report {
    let mut probe = std::pin::pin!(probe);
    let report = loop {
        tokio::select! {
            biased;
            Some(progress) = seen.recv() => pass_on(&told, index, progress).await,
            report = &mut probe => break report,
        }
    };
    while let Ok(progress) = seen.try_recv() {
        pass_on(&told, index, progress).await;
    }
    report
}

async fn pass_on(told: &mpsc::Sender<(usize, Progress)>, index: usize, progress: Progress) {
    let sent = told.send((index, progress)).await;
    sent.expect("the batch reads until its last probe has ended");
}

/// The report of a probe whose task panicked, past the driver's own guard.
fn crashed(room: RoomName, position: Position, error: JoinError) -> Report {
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
    Report::new(room, position, Outcome::Failed(failure))
}

#[cfg(test)]
mod tests;
