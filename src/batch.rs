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

use crate::config::{self, Project, Stay, Target};
use crate::guard::{Guard, Places, Refusal, worst_cases};
use crate::history::Reservation;
use crate::livekit::RoomName;
use crate::livekit::engine::panic_message;
use crate::probe::driver::{self, Context, HoldUntil};
use crate::probe::{Failure, Milestone, Outcome, Position, Progress, Reason, Report, Span};

pub(crate) mod json;
#[cfg(test)]
pub(crate) mod sample;

/// Everything that one batch found out.
#[derive(Debug, Clone)]
pub struct BatchReport {
    /// See [`new_id`].
    pub batch_id: String,
    pub target: String,
    pub started_at: DateTime<Utc>,
    pub ended_at: DateTime<Utc>,
    /// In the order of opening.
    pub probes: Vec<ProbeReport>,
    /// Rooms of the batch that never opened, and why.
    pub not_opened: Option<NotOpened>,
}

#[derive(Debug, Clone)]
pub struct ProbeReport {
    pub report: Report,
    /// Wall clock of the probe's start, for display.
    pub started_at: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotOpened {
    pub rooms: usize,
    pub why: String,
    /// Where a guard rail refused the next one.
    pub refusal: Option<Refusal>,
}

/// What a batch comes to as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchResult {
    /// Every room that opened.
    Ok,
    /// Some rooms ok, some failed.
    Degraded,
    /// No room ok.
    Failed,
    /// The service named a limit, whatever else happened: what the rest would have shown is not known.
    Limited,
    /// We were told to stop.
    Aborted,
}

impl BatchResult {
    pub const ALL: [Self; 5] = [
        Self::Ok,
        Self::Degraded,
        Self::Failed,
        Self::Limited,
        Self::Aborted,
    ];

    /// The label value in metrics and the `result` in output.
    pub fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
            Self::Limited => "limited",
            Self::Aborted => "aborted",
        }
    }
}

/// How the probes of a batch ended, and how long their agents took to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    pub ok: usize,
    pub failed: usize,
    pub aborted: usize,
    /// `None` where no probe has a join delay.
    pub join_delay: Option<Quantiles>,
}

/// Nearest-rank quantiles: each is a delay that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantiles {
    pub p50: Duration,
    pub p90: Duration,
    pub max: Duration,
}

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
    let max_rooms = rails.places.as_ref().map(Places::count);
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

impl BatchReport {
    /// A batch that was aborted is not judged by the rooms that had ended before; nor is one that never opened a room.
    pub fn result(&self) -> BatchResult {
        let any = |wanted: fn(&Outcome) -> bool| {
            let mut outcomes = self.probes.iter().map(|probe| &probe.report.outcome);
            outcomes.any(wanted)
        };
        let ok = any(|outcome| *outcome == Outcome::Ok);
        let failed = any(|outcome| matches!(outcome, Outcome::Failed(_)));
        if any(|outcome| *outcome == Outcome::Aborted) {
            BatchResult::Aborted
        } else if any(is_plan_limit) {
            BatchResult::Limited
        } else {
            match (ok, failed) {
                (true, false) => BatchResult::Ok,
                (true, true) => BatchResult::Degraded,
                (false, true) => BatchResult::Failed,
                (false, false) => BatchResult::Aborted,
            }
        }
    }

    /// The share of rooms that were ok; aborted ones don't count. `None` where that leaves none.
    pub fn success_ratio(&self) -> Option<f64> {
        let summary = self.summary();
        let [ok, ended] = [summary.ok, summary.ok + summary.failed]
            .map(|rooms| f64::from(u32::try_from(rooms).unwrap_or(u32::MAX)));
        (ended > 0.0).then(|| ok / ended)
    }

    /// Nothing was found out: a guard rail refused the first room, or the end came before it.
    pub fn opened_nothing(&self) -> bool {
        self.probes.is_empty()
    }

    /// The join delays are those of every probe whose agent joined, whatever its outcome, without upper bounds.
    pub fn summary(&self) -> Summary {
        let count = |wanted: fn(&Outcome) -> bool| {
            let outcomes = self.probes.iter().map(|probe| &probe.report.outcome);
            outcomes.filter(|outcome| wanted(outcome)).count()
        };
        let delays = self
            .probes
            .iter()
            .filter(|probe| !probe.report.join_upper_bound)
            .filter_map(|probe| probe.report.timeline.span(Span::AgentJoin));
        Summary {
            ok: count(|outcome| matches!(outcome, Outcome::Ok)),
            failed: count(|outcome| matches!(outcome, Outcome::Failed(_))),
            aborted: count(|outcome| matches!(outcome, Outcome::Aborted)),
            join_delay: Quantiles::of(delays.collect()),
        }
    }
}

fn is_plan_limit(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed(failure) if matches!(failure.reason, Reason::PlanLimit(_)))
}

impl Quantiles {
    fn of(mut delays: Vec<Duration>) -> Option<Self> {
        delays.sort_unstable();
        let rank = |percent: usize| delays[(delays.len() * percent).div_ceil(100) - 1];
        let max = *delays.last()?;
        Some(Self {
            p50: rank(50),
            p90: rank(90),
            max,
        })
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

/// The settings that rule a ramp.
#[derive(Debug, Clone)]
struct Plan {
    rooms: usize,
    max_rooms: usize,
    ramp: config::Ramp,
    interval: Duration,
    stay: Stay,
    hold: Duration,
    stop_after_no_shows: usize,
}

/// How far an opened probe has come, as far as the ramp cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Joining,
    /// Its agent has joined, or its outcome is final: the next room may open beside it.
    Decided,
    Ended,
}

/// Decides when the next room opens.
///
/// `after_join`, rooms staying `together`: when the join of the room before is decided. `one_by_one`: when the room
/// before is gone, so that never more than one is open, which is what a plan of one concurrent session needs. An agent
/// that did not come decides nothing by itself: the probe's outcome does, which follows at once and may be a rejection
/// after which no room may open.
///
/// `interval` and `burst` don't look at the room before; whatever stops a ramp stops `interval` too.
#[derive(Debug)]
struct Ramp {
    plan: Plan,
    stages: Vec<Stage>,
    /// When the last room opened.
    opened: Option<Instant>,
    /// Rooms without an agent since the last one with an agent.
    no_shows: usize,
    stopped: Option<Stop>,
    /// Rooms that were to open, but have not yet, stay shut too.
    halted: bool,
}

#[derive(Debug)]
struct Stop {
    why: String,
    refusal: Option<Refusal>,
}

impl Ramp {
    fn new(plan: Plan) -> Self {
        Self {
            plan,
            stages: Vec::new(),
            opened: None,
            no_shows: 0,
            stopped: None,
            halted: false,
        }
    }

    /// Counts the next room as open and says its index, if it may open now.
    fn open_next(&mut self, now: Instant) -> Option<usize> {
        let index = self.stages.len();
        if !self.has_more() || !self.is_ready(now) {
            return None;
        }
        // Rooms that stay together only close once the ramp is over: waiting for a free place would be for ever.
        let open = self.stages.iter().filter(|stage| **stage != Stage::Ended);
        if open.count() >= self.plan.max_rooms {
            self.stop(format!(
                "the project's max_rooms is {}",
                self.plan.max_rooms
            ));
            return None;
        }
        self.stages.push(Stage::Joining);
        self.opened = Some(now);
        Some(index)
    }

    fn has_more(&self) -> bool {
        self.stopped.is_none() && self.stages.len() < self.plan.rooms
    }

    fn is_ready(&self, now: Instant) -> bool {
        let Some(before) = self.stages.last() else {
            return true;
        };
        match (self.plan.ramp, self.plan.stay) {
            (config::Ramp::AfterJoin, Stay::Together) => *before != Stage::Joining,
            (config::Ramp::AfterJoin, Stay::OneByOne) => *before == Stage::Ended,
            (config::Ramp::Interval, _) => self.due().is_some_and(|due| due <= now),
            (config::Ramp::Burst, _) => true,
        }
    }

    /// When the next room opens if nothing but time has to pass.
    fn due(&self) -> Option<Instant> {
        let timed = self.plan.ramp == config::Ramp::Interval && self.has_more();
        self.opened
            .filter(|_| timed)
            .map(|opened| opened + self.plan.interval)
    }

    fn joined(&mut self, index: usize) {
        if self.stages[index] == Stage::Joining {
            self.stages[index] = Stage::Decided;
            self.no_shows = 0;
        }
    }

    fn settled(&mut self, index: usize, outcome: &Outcome) {
        if let Outcome::Failed(failure) = outcome
            && let Some(why) = stops_the_batch(failure)
        {
            self.halt(why.to_owned());
        }
        if self.stages[index] != Stage::Joining {
            return;
        }
        self.stages[index] = Stage::Decided;
        self.no_shows += 1;
        if self.no_shows == self.plan.stop_after_no_shows {
            self.halt(match self.no_shows {
                1 => "no agent came to a room".to_owned(),
                n => format!("no agent came to {n} rooms in a row"),
            });
        }
    }

    fn ended(&mut self, index: usize, outcome: &Outcome) {
        self.settled(index, outcome);
        self.stages[index] = Stage::Ended;
    }

    /// The first reason stands.
    fn stop(&mut self, why: String) {
        self.stopped.get_or_insert(Stop { why, refusal: None });
    }

    fn halt(&mut self, why: String) {
        self.stop(why);
        self.halted = true;
    }

    fn refused(&mut self, refusal: Refusal) {
        self.stopped.get_or_insert(Stop {
            why: refusal.to_string(),
            refusal: Some(refusal),
        });
        self.halted = true;
    }

    /// No room opens any more, and every join is decided.
    fn is_over(&self) -> bool {
        !self.has_more() && !self.stages.contains(&Stage::Joining)
    }

    fn not_opened(self) -> Option<NotOpened> {
        let rooms = self.plan.rooms - self.stages.len();
        (rooms > 0).then(|| {
            let stop = self.stopped;
            let stop = stop.expect("a ramp ends early only where it was stopped");
            NotOpened {
                rooms,
                why: stop.why,
                refusal: stop.refusal,
            }
        })
    }
}

/// After a rejection more rooms would only meet it again, and cost the project more refused calls.
///
/// The probe's own failure holds the detail.
fn stops_the_batch(failure: &Failure) -> Option<&'static str> {
    Some(match failure.reason {
        Reason::PlanLimit(_) => "a plan limit was met",
        Reason::AuthRejected => "the credentials were rejected",
        Reason::ConfigRejected => "a setting was rejected",
        Reason::Unreachable => "the server could not be reached",
        _ => return None,
    })
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
    places: Option<Places>,
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
                let places = guard.places(target);
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
            guard.rejected(limit, retry_after);
        }
    }
}

/// Whether a room may open.
struct Asked {
    index: usize,
    room: RoomName,
    reservation: Result<Option<Reservation>, Refusal>,
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
            && !reports.any(|report| is_plan_limit(&report.outcome))
        {
            places.none_rejected();
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
mod tests {
    use std::pin::Pin;
    use std::sync::{Arc, Mutex};

    use tokio::time::sleep;

    use super::*;
    use crate::config::Period;
    use crate::history::History;
    use crate::probe::{LimitKind, Timeline};

    type Probe = Pin<Box<dyn Future<Output = Report> + Send>>;

    const SECOND: Duration = Duration::from_secs(1);
    const MINUTE: Duration = Duration::from_mins(1);

    fn plan(rooms: usize, stay: Stay) -> Plan {
        Plan {
            rooms,
            max_rooms: 10,
            ramp: config::Ramp::AfterJoin,
            interval: SECOND,
            stay,
            hold: 10 * SECOND,
            stop_after_no_shows: 2,
        }
    }

    fn plan_of(ramp: config::Ramp, rooms: usize) -> Plan {
        Plan {
            ramp,
            ..plan(rooms, Stay::Together)
        }
    }

    fn failed(reason: Reason) -> Outcome {
        Outcome::Failed(Failure {
            reason,
            detail: "as scripted".to_owned(),
        })
    }

    fn report(opening: &Opening, outcome: Outcome) -> Report {
        Report::new(opening.room.clone(), opening.position, outcome)
    }

    fn settled(outcome: Outcome) -> Progress {
        Progress::Settled {
            outcome,
            retry_after: None,
        }
    }

    async fn say(opening: &Opening, progress: Progress) {
        opening.progress.send(progress).await.unwrap();
    }

    /// The agent joins after `delay`; the probe ends when its hold is over or the batch is aborted.
    async fn joins(delay: Duration, mut opening: Opening) -> Report {
        let abort = opening.abort.clone();
        let held = async {
            sleep(delay).await;
            let at = Instant::now();
            let milestone = Milestone::AgentJoined;
            say(&opening, Progress::Reached { milestone, at }).await;
            say(&opening, Progress::JoinSettled { joined: true }).await;
            let until = opening
                .hold_until
                .wait_for(Option::is_some)
                .await
                .map(|until| *until);
            sleep_until(until.unwrap().unwrap()).await;
        };
        let outcome = tokio::select! {
            () = held => Outcome::Ok,
            () = abort.cancelled() => Outcome::Aborted,
        };
        say(&opening, settled(outcome.clone())).await;
        report(&opening, outcome)
    }

    /// No agent comes: the outcome is known after `delay`, and the room is deleted 1 s later.
    async fn fails(delay: Duration, reason: Reason, opening: Opening) -> Report {
        sleep(delay).await;
        say(&opening, Progress::JoinSettled { joined: false }).await;
        sleep(Duration::from_millis(5)).await;
        say(&opening, settled(failed(reason))).await;
        sleep(SECOND).await;
        report(&opening, failed(reason))
    }

    /// When a probe was opened and when it ended, in seconds since the batch began.
    type OpenedAndEnded = (u64, Option<u64>);

    struct Ran {
        times: Vec<OpenedAndEnded>,
        outcomes: Vec<Outcome>,
        not_opened: Option<NotOpened>,
        events: mpsc::Receiver<BatchEvent>,
    }

    fn no_rails() -> Rails {
        Rails {
            guard: None,
            places: None,
            target: "support".to_owned(),
            worst_cases: Vec::new(),
        }
    }

    async fn run_scripted(
        plan: Plan,
        abort: CancellationToken,
        script: impl Fn(usize, Opening) -> Probe,
    ) -> Ran {
        run_guarded(plan, no_rails(), abort, script).await
    }

    async fn run_guarded(
        plan: Plan,
        rails: Rails,
        abort: CancellationToken,
        script: impl Fn(usize, Opening) -> Probe,
    ) -> Ran {
        let (events, seen) = mpsc::channel(10_000);
        let times = Arc::new(Mutex::new(Vec::<OpenedAndEnded>::new()));
        let began = Instant::now();
        let open = |index, opening| {
            times
                .lock()
                .unwrap()
                .push((began.elapsed().as_secs(), None));
            let probe = script(index, opening);
            let times = Arc::clone(&times);
            async move {
                let report = probe.await;
                times.lock().unwrap()[index].1 = Some(began.elapsed().as_secs());
                report
            }
        };
        let (probes, not_opened) = Running::new(plan, rails, abort, events, open).run().await;
        let outcomes = probes.into_iter().map(|probe| probe.report.outcome);
        Ran {
            times: times.lock().unwrap().clone(),
            outcomes: outcomes.collect(),
            not_opened,
            events: seen,
        }
    }

    fn why(ran: &Ran) -> (usize, &str) {
        let not_opened = ran.not_opened.as_ref().unwrap();
        (not_opened.rooms, &not_opened.why)
    }

    #[tokio::test(start_paused = true)]
    async fn together_each_room_opens_on_the_join_before_and_all_end_hold_after_the_last_join() {
        let script = |_, opening| Box::pin(joins(2 * SECOND, opening)) as Probe;
        let ran = run_scripted(plan(3, Stay::Together), CancellationToken::new(), script).await;
        assert_eq!(ran.times, [(0, Some(16)), (2, Some(16)), (4, Some(16))]);
        assert_eq!(ran.outcomes, [Outcome::Ok, Outcome::Ok, Outcome::Ok]);
        assert_eq!(ran.not_opened, None);
    }

    #[tokio::test(start_paused = true)]
    async fn one_by_one_never_has_two_rooms_open_and_holds_each_from_its_own_join() {
        let mut plan = plan(3, Stay::OneByOne);
        plan.max_rooms = 1;
        let script = |_, opening| Box::pin(joins(2 * SECOND, opening)) as Probe;
        let ran = run_scripted(plan, CancellationToken::new(), script).await;
        assert_eq!(ran.times, [(0, Some(12)), (12, Some(24)), (24, Some(36))]);
        assert_eq!(ran.not_opened, None);
    }

    #[tokio::test(start_paused = true)]
    async fn interval_opens_rooms_whatever_the_ones_before_do_and_holds_from_the_last_join() {
        let script = |index, opening| match index {
            1 => Box::pin(fails(9 * SECOND, Reason::AgentNoTrack, opening)) as Probe,
            _ => Box::pin(joins(5 * SECOND, opening)),
        };
        let plan = plan_of(config::Ramp::Interval, 3);
        let ran = run_scripted(plan, CancellationToken::new(), script).await;
        // The second room, opened at 1, is decided last, at 10.
        assert_eq!(ran.times, [(0, Some(20)), (1, Some(11)), (2, Some(20))]);
        assert_eq!(ran.not_opened, None);
    }

    #[tokio::test(start_paused = true)]
    async fn interval_outlasts_a_time_without_any_room_open() {
        let script =
            |_, opening| Box::pin(fails(SECOND, Reason::DispatchUnanswered, opening)) as Probe;
        let mut plan = plan_of(config::Ramp::Interval, 3);
        plan.interval = 5 * SECOND;
        plan.stop_after_no_shows = 0;
        let ran = run_scripted(plan, CancellationToken::new(), script).await;
        assert_eq!(ran.times, [(0, Some(2)), (5, Some(7)), (10, Some(12))]);
    }

    #[tokio::test(start_paused = true)]
    async fn no_shows_a_rejection_the_cap_and_an_abort_stop_an_interval() {
        let no_shows =
            |_, opening| Box::pin(fails(2 * SECOND, Reason::DispatchUnanswered, opening)) as Probe;
        let plan = || plan_of(config::Ramp::Interval, 9);
        let ran = run_scripted(plan(), CancellationToken::new(), no_shows).await;
        // The second no-show is known 5 ms after the fourth room opened.
        assert_eq!(why(&ran), (5, "no agent came to 2 rooms in a row"));

        let limit = Reason::PlanLimit(LimitKind::Connections);
        let rejected = move |index, opening| match index {
            1 => Box::pin(fails(SECOND / 2, limit, opening)) as Probe,
            _ => Box::pin(joins(20 * SECOND, opening)),
        };
        let ran = run_scripted(plan(), CancellationToken::new(), rejected).await;
        assert_eq!(why(&ran), (7, "a plan limit was met"));

        let all_join = |_, opening| Box::pin(joins(20 * SECOND, opening)) as Probe;
        let mut capped = plan();
        capped.max_rooms = 3;
        let ran = run_scripted(capped, CancellationToken::new(), all_join).await;
        assert_eq!(why(&ran), (6, "the project's max_rooms is 3"));

        let abort = CancellationToken::new();
        let stop = async {
            sleep(3 * SECOND / 2).await;
            abort.cancel();
        };
        let running = run_scripted(plan(), abort.clone(), all_join);
        let (ran, ()) = tokio::join!(running, stop);
        assert_eq!(ran.outcomes, [Outcome::Aborted, Outcome::Aborted]);
        assert_eq!(why(&ran), (7, "the batch was aborted"));
    }

    #[tokio::test(start_paused = true)]
    async fn burst_opens_all_at_once_and_no_failure_is_in_time_to_stop_it() {
        let script = |index, opening| match index {
            0 | 1 => Box::pin(fails(SECOND, Reason::DispatchUnanswered, opening)) as Probe,
            _ => Box::pin(joins(2 * SECOND, opening)),
        };
        let plan = plan_of(config::Ramp::Burst, 4);
        let ran = run_scripted(plan, CancellationToken::new(), script).await;
        let (failed, held) = ((0, Some(2)), (0, Some(12)));
        assert_eq!(ran.times, [failed, failed, held, held]);
        assert_eq!(ran.not_opened, None);
    }

    #[tokio::test(start_paused = true)]
    async fn burst_of_two_hundred_loses_no_room_and_no_event() {
        let mut plan = plan_of(config::Ramp::Burst, 200);
        plan.max_rooms = 200;
        let script = |_, opening| Box::pin(joins(SECOND, opening)) as Probe;
        let mut ran = run_scripted(plan, CancellationToken::new(), script).await;
        assert_eq!(ran.outcomes, vec![Outcome::Ok; 200]);
        let mut ended = 0;
        while let Ok(event) = ran.events.try_recv() {
            ended += usize::from(matches!(event, BatchEvent::Ended { .. }));
        }
        assert_eq!(ended, 200);
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_does_not_come_delays_the_next_room_only_until_the_outcome() {
        let script = |index, opening| match index {
            0 => Box::pin(fails(3 * SECOND, Reason::AgentNoShow, opening)) as Probe,
            _ => Box::pin(joins(SECOND, opening)),
        };
        let ran = run_scripted(plan(3, Stay::Together), CancellationToken::new(), script).await;
        assert_eq!(ran.times, [(0, Some(4)), (3, Some(15)), (4, Some(15))]);
        assert_eq!(
            ran.outcomes,
            [failed(Reason::AgentNoShow), Outcome::Ok, Outcome::Ok]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn no_shows_in_a_row_stop_the_ramp_and_a_join_between_starts_the_count_anew() {
        let script = |index, opening| match index {
            1 => Box::pin(joins(SECOND, opening)) as Probe,
            _ => Box::pin(fails(SECOND, Reason::DispatchUnanswered, opening)),
        };
        let ran = run_scripted(plan(7, Stay::Together), CancellationToken::new(), script).await;
        assert_eq!(ran.outcomes.len(), 4);
        assert_eq!(ran.outcomes[1], Outcome::Ok);
        assert_eq!(why(&ran), (3, "no agent came to 2 rooms in a row"));
    }

    #[tokio::test(start_paused = true)]
    async fn no_number_of_no_shows_stops_the_ramp_where_the_guard_is_off() {
        let mut plan = plan(4, Stay::Together);
        plan.stop_after_no_shows = 0;
        let script =
            |_, opening| Box::pin(fails(SECOND, Reason::DispatchUnanswered, opening)) as Probe;
        let ran = run_scripted(plan, CancellationToken::new(), script).await;
        assert_eq!(ran.outcomes.len(), 4);
        assert_eq!(ran.not_opened, None);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_rejection_no_room_opens_and_the_open_ones_are_held_to_their_end() {
        for (reason, said) in [
            (
                Reason::PlanLimit(LimitKind::Connections),
                "a plan limit was met",
            ),
            (Reason::AuthRejected, "the credentials were rejected"),
            (Reason::ConfigRejected, "a setting was rejected"),
            (Reason::Unreachable, "the server could not be reached"),
        ] {
            let script = |index, opening| match index {
                1 => Box::pin(fails(SECOND, reason, opening)) as Probe,
                _ => Box::pin(joins(2 * SECOND, opening)),
            };
            let ran = run_scripted(plan(5, Stay::Together), CancellationToken::new(), script).await;
            assert_eq!(ran.times, [(0, Some(13)), (2, Some(4))]);
            assert_eq!(ran.outcomes, [Outcome::Ok, failed(reason)]);
            assert_eq!(why(&ran), (3, said));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_panicking_probe_among_five_is_reported_by_its_room_and_harms_no_other() {
        async fn panics(opening: Opening) -> Report {
            let index = opening.room.clone();
            drop(opening);
            sleep(SECOND).await;
            panic!("scripted fault in {index}");
        }
        let script = |index, opening: Opening| match index {
            2 => Box::pin(panics(opening)) as Probe,
            _ => Box::pin(joins(SECOND, opening)),
        };
        let mut ran = run_scripted(plan(5, Stay::Together), CancellationToken::new(), script).await;
        let crashed = ran.outcomes.remove(2);
        assert_eq!(ran.outcomes, vec![Outcome::Ok; 4]);
        let mut opened = Vec::new();
        let mut told = None;
        while let Ok(event) = ran.events.try_recv() {
            match event {
                BatchEvent::Opened { room, .. } => opened.push(room),
                BatchEvent::Ended { index: 2, report } => told = Some(report),
                _ => {}
            }
        }
        let Outcome::Failed(failure) = crashed else {
            panic!("{crashed:?}")
        };
        assert_eq!(failure.reason, Reason::Internal);
        let said = format!("scripted fault in {}", opened[2]);
        assert!(failure.detail.ends_with(&said), "{}", failure.detail);
        assert_eq!(told.unwrap().room, opened[2]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_abort_mid_ramp_opens_nothing_more_and_waits_for_every_probe() {
        let abort = CancellationToken::new();
        let script = |index, opening| match index {
            0 => Box::pin(fails(SECOND, Reason::AgentNoShow, opening)) as Probe,
            _ => Box::pin(joins(2 * SECOND, opening)),
        };
        let stop = async {
            sleep(4 * SECOND).await;
            abort.cancel();
        };
        let running = run_scripted(plan(5, Stay::Together), abort.clone(), script);
        let (ran, ()) = tokio::join!(running, stop);
        assert_eq!(
            ran.outcomes,
            [
                failed(Reason::AgentNoShow),
                Outcome::Aborted,
                Outcome::Aborted
            ]
        );
        assert!(ran.times.iter().all(|(_, ended)| *ended <= Some(4)));
        assert_eq!(why(&ran), (2, "the batch was aborted"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_batch_drops_its_probes_and_with_them_their_leases() {
        let (probe_lives, mut dropped) = mpsc::channel::<()>(1);
        let open = move |_, opening| {
            let alive = probe_lives.clone();
            async move {
                let report = joins(SECOND, opening).await;
                drop(alive);
                report
            }
        };
        let (events, _reader) = mpsc::channel(1);
        let plan = plan(3, Stay::Together);
        let running = Running::new(plan, no_rails(), CancellationToken::new(), events, open);
        let cut_short = tokio::time::timeout(3 * SECOND, running.run());
        assert!(cut_short.await.is_err());
        assert_eq!(dropped.recv().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn more_rooms_than_the_cap_are_named_as_not_opened() {
        let mut plan = plan(5, Stay::Together);
        plan.max_rooms = 3;
        let script = |_, opening| Box::pin(joins(SECOND, opening)) as Probe;
        let ran = run_scripted(plan, CancellationToken::new(), script).await;
        assert_eq!(ran.outcomes, vec![Outcome::Ok; 3]);
        assert_eq!(why(&ran), (2, "the project's max_rooms is 3"));
    }

    /// A guard that allows so many minutes a day, and three for each room.
    fn guard(minutes: u32) -> (Guard, History) {
        let history = History::in_memory(Arc::new(Utc::now));
        let project = Project {
            budget: config::Budget {
                agent_time_per_day: Some(minutes * MINUTE),
                ..config::Budget::default()
            },
            ..sample::project()
        };
        (Guard::new("acme", &project, history.clone()), history)
    }

    fn target(rooms: usize) -> config::Target {
        config::Target {
            batch: config::Batch {
                rooms,
                ..config::Batch::default()
            },
            ..config::Target::default()
        }
    }

    async fn rails(guard: &Guard) -> Rails {
        Rails {
            places: Some(guard.places(&target(2)).await),
            guard: Some(guard.clone()),
            worst_cases: vec![3 * MINUTE; 10],
            ..no_rails()
        }
    }

    /// The agent joins, and is in the room for 70 s.
    async fn is_billed(opening: Opening) -> Report {
        let began = Instant::now();
        let mut report = joins(SECOND, opening).await;
        report.timeline.mark(Milestone::AgentJoined, began);
        let deleted = began + 70 * SECOND;
        report.timeline.mark(Milestone::RoomDeleted, deleted);
        report
    }

    fn used_minutes(guard: &Guard) -> u64 {
        guard.used(Period::Day).as_secs() / 60
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_by_the_budget_leaves_the_rest_shut_and_says_so() {
        for ramp in [config::Ramp::AfterJoin, config::Ramp::Burst] {
            let (guard, _) = guard(8);
            let script = |_, opening| Box::pin(is_billed(opening)) as Probe;
            let abort = CancellationToken::new();
            let ran = run_guarded(plan_of(ramp, 5), rails(&guard).await, abort, script).await;
            assert_eq!(ran.outcomes, [Outcome::Ok, Outcome::Ok], "{ramp:?}");
            let not_opened = ran.not_opened.unwrap();
            let refusal = not_opened.refusal.unwrap();
            assert_eq!((not_opened.rooms, refusal.label()), (3, "budget"));
            assert_eq!(not_opened.why, refusal.to_string());
            // Two minutes each, and nothing for the rooms that were asked for in vain.
            assert_eq!(used_minutes(&guard), 4, "{ramp:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_project_that_rests_opens_no_room_at_all() {
        let (guard, _) = guard(100);
        guard.rejected(LimitKind::ApiRate, None);
        let script = |_, opening| Box::pin(joins(SECOND, opening)) as Probe;
        let (plan, abort) = (plan(3, Stay::Together), CancellationToken::new());
        let ran = run_guarded(plan, rails(&guard).await, abort, script).await;
        assert_eq!(ran.outcomes, []);
        let not_opened = ran.not_opened.unwrap();
        assert_eq!(not_opened.rooms, 3);
        assert_eq!(not_opened.refusal.unwrap().label(), "backoff");
        assert_eq!(used_minutes(&guard), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejection_is_told_when_it_is_known_and_stops_another_batch_of_the_project() {
        async fn is_rejected(opening: Opening) -> Report {
            sleep(SECOND).await;
            let outcome = failed(Reason::PlanLimit(LimitKind::Connections));
            let progress = Progress::Settled {
                outcome: outcome.clone(),
                retry_after: Some(90 * SECOND),
            };
            say(&opening, progress).await;
            // Its room takes long to delete.
            sleep(20 * SECOND).await;
            report(&opening, outcome)
        }
        let (guard, _) = guard(100);
        let rejected = |_, opening| Box::pin(is_rejected(opening)) as Probe;
        let joins = |_, opening| Box::pin(joins(2 * SECOND, opening)) as Probe;
        let plan = || plan(2, Stay::Together);
        let (one, other) = (rails(&guard).await, rails(&guard).await);
        let (one, other) = tokio::join!(
            run_guarded(plan(), one, CancellationToken::new(), rejected),
            run_guarded(plan(), other, CancellationToken::new(), joins),
        );
        assert_eq!(why(&one), (1, "a plan limit was met"));
        assert_eq!(other.outcomes, [Outcome::Ok]);
        let refusal = other.not_opened.unwrap().refusal.unwrap();
        assert_eq!(refusal.label(), "backoff");
        let rest = refusal.until().unwrap() - Utc::now();
        assert!(
            rest > chrono::TimeDelta::seconds(60),
            "as the answer said: {rest}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn every_end_of_a_probe_settles_its_room() {
        async fn panics(_: Opening) -> Report {
            sleep(SECOND).await;
            panic!("scripted")
        }
        async fn is_not_deleted(opening: Opening) -> Report {
            let mut report = joins(SECOND, opening).await;
            report.timeline.mark(Milestone::AgentJoined, Instant::now());
            report
        }
        for (what, minutes) in [
            ("an agent for 70 s", 2),
            ("no agent", 0),
            ("a panic", 3),
            ("an agent, and no deletion", 3),
        ] {
            let (guard, history) = guard(100);
            let seen = Arc::new(Mutex::new(None));
            let script = |_, opening: Opening| {
                *seen.lock().unwrap() = Some(opening.room.clone());
                match what {
                    "an agent for 70 s" => Box::pin(is_billed(opening)) as Probe,
                    "no agent" => Box::pin(fails(SECOND, Reason::AgentNoShow, opening)),
                    "a panic" => Box::pin(panics(opening)),
                    _ => Box::pin(is_not_deleted(opening)),
                }
            };
            let (plan, abort) = (plan(1, Stay::Together), CancellationToken::new());
            let ran = run_guarded(plan, rails(&guard).await, abort, script).await;
            assert_eq!(ran.outcomes.len(), 1, "{what}");
            assert_eq!(used_minutes(&guard), minutes, "{what}");
            // Whoever vouches for the room is another.
            let room = seen.lock().unwrap().clone().unwrap();
            assert_eq!(history.target_of(&room).unwrap(), "support");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_batch_leaves_its_rooms_at_their_worst_and_gives_its_places_back() {
        let (guard, _) = guard(100);
        let (events, _reader) = mpsc::channel(1);
        let open = |_, opening| is_billed(opening);
        let (plan, abort) = (plan(2, Stay::Together), CancellationToken::new());
        let running = Running::new(plan, rails(&guard).await, abort, events, open);
        let cut_short = tokio::time::timeout(3 * SECOND, running.run());
        assert!(cut_short.await.is_err());
        assert_eq!(used_minutes(&guard), 6);
        let all = target(sample::project().max_rooms);
        let _all = guard.places(&all).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_abort_while_rooms_are_asked_for_opens_none_and_costs_nothing() {
        let (guard, _) = guard(100);
        let abort = CancellationToken::new();
        abort.cancel();
        let script = |_, opening| Box::pin(is_billed(opening)) as Probe;
        let plan = plan_of(config::Ramp::Burst, 3);
        let ran = run_guarded(plan, rails(&guard).await, abort, script).await;
        assert_eq!(ran.outcomes, []);
        assert_eq!(why(&ran), (3, "the batch was aborted"));
        assert_eq!(used_minutes(&guard), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_abort_ends_the_wait_for_places_and_nothing_opens() {
        let (guard, _) = guard(100);
        let project = sample::project();
        let _all = guard.places(&target(project.max_rooms)).await;
        let abort = CancellationToken::new();
        let stop = async {
            sleep(SECOND).await;
            abort.cancel();
        };
        let settings = target(1);
        let waiting = Rails::of("support", &settings, &project, Some(guard), &abort);
        let (rails, ()) = tokio::join!(waiting, stop);
        assert!(rails.places.is_none());
        let script = |_, opening| Box::pin(joins(SECOND, opening)) as Probe;
        let ran = run_guarded(plan(1, Stay::Together), rails, abort, script).await;
        assert_eq!(why(&ran), (1, "the batch was aborted"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_without_a_rejection_makes_the_next_rest_short_again() {
        let (guard, _) = guard(100);
        let rest = || guard.backoff_until().unwrap() - Utc::now();
        for _ in 0..3 {
            guard.rejected(LimitKind::ApiRate, None);
            sleep(Duration::from_hours(1)).await;
        }
        let script = |_, opening| Box::pin(joins(SECOND, opening)) as Probe;
        let (plan, abort) = (plan(1, Stay::Together), CancellationToken::new());
        run_guarded(plan, rails(&guard).await, abort, script).await;
        guard.rejected(LimitKind::ApiRate, None);
        assert!(rest() < chrono::TimeDelta::minutes(2), "{}", rest());
    }

    #[tokio::test]
    async fn a_room_is_journalled_on_disk_before_it_can_exist() {
        let dir = tempfile::tempdir().unwrap();
        let settings = config::History {
            dir: dir.path().to_owned(),
            ..config::History::default()
        };
        let history = History::open(&settings).unwrap();
        let guard = Guard::new("acme", &sample::project(), history);
        let file = dir.path().join("history.sqlite3");
        let journalled = Arc::new(Mutex::new(Vec::new()));
        let script = |_, opening: Opening| {
            let database = rusqlite::Connection::open(&file).unwrap();
            let sql = "SELECT count(*) FROM rooms WHERE room = ?1";
            let rows: i64 = database
                .query_row(sql, [&opening.room.0], |row| row.get(0))
                .unwrap();
            journalled.lock().unwrap().push(rows);
            let report = report(&opening, Outcome::Ok);
            Box::pin(async move {
                drop(opening);
                report
            }) as Probe
        };
        let mut plan = plan_of(config::Ramp::Burst, 3);
        // No agent joins, and two rooms may be over before the disk has the third.
        plan.stop_after_no_shows = 0;
        let abort = CancellationToken::new();
        let ran = run_guarded(plan, rails(&guard).await, abort, script).await;
        assert_eq!(ran.outcomes.len(), 3);
        assert_eq!(*journalled.lock().unwrap(), [1, 1, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_never_reads_or_is_gone_holds_nothing_up() {
        for keep in [true, false] {
            let (events, reader) = mpsc::channel(1);
            let reader = keep.then_some(reader);
            let open = |_, opening| joins(SECOND, opening);
            let plan = plan(3, Stay::Together);
            let running = Running::new(plan, no_rails(), CancellationToken::new(), events, open);
            let (probes, _) = running.run().await;
            assert_eq!(probes.len(), 3);
            drop(reader);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_starts_on_the_wall_clock_where_its_milestones_do_however_late_its_task_runs() {
        let runs_late = |_, opening: Opening| async move {
            sleep(SECOND).await;
            let mut report = report(&opening, Outcome::Ok);
            report.timeline.mark(Milestone::Started, Instant::now());
            say(&opening, settled(Outcome::Ok)).await;
            report
        };
        let opened = Utc::now().trunc_subsecs(6);
        let (events, _reader) = mpsc::channel(100);
        let abort = CancellationToken::new();
        let plan = plan(1, Stay::Together);
        let running = Running::new(plan, no_rails(), abort, events, runs_late);
        let (probes, _) = running.run().await;
        assert!(probes[0].started_at >= opened + SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn progress_is_told_in_order_and_before_the_end() {
        let script = |_, opening| Box::pin(joins(SECOND, opening)) as Probe;
        let mut ran = run_scripted(plan(1, Stay::Together), CancellationToken::new(), script).await;
        let mut told = Vec::new();
        while let Ok(event) = ran.events.try_recv() {
            told.push(match event {
                BatchEvent::Opened { .. } => "opened",
                BatchEvent::Progress { progress, .. } => match progress {
                    Progress::Reached { .. } => "reached",
                    Progress::JoinSettled { .. } => "join settled",
                    Progress::Settled { .. } => "settled",
                },
                BatchEvent::Ended { .. } => "ended",
            });
        }
        assert_eq!(
            told,
            ["opened", "reached", "join settled", "settled", "ended"]
        );
    }

    #[test]
    fn quantiles_are_delays_that_were_measured() {
        let of = |millis: &[u64]| {
            Quantiles::of(millis.iter().copied().map(Duration::from_millis).collect())
                .map(|q| (q.p50.as_millis(), q.p90.as_millis(), q.max.as_millis()))
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[7]), Some((7, 7, 7)));
        assert_eq!(of(&[40, 10, 30, 20]), Some((20, 40, 40)));
        assert_eq!(of(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), Some((5, 9, 10)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_upper_bound_is_no_join_delay_of_the_summary() {
        let probe = |delay: Duration, join_upper_bound| {
            let (room, now) = (new_room_name(), Instant::now());
            let mut timeline = Timeline::default();
            timeline.mark(Milestone::DispatchSent, now);
            timeline.mark(Milestone::AgentJoined, now + delay);
            let (progress, _) = mpsc::channel(1);
            let (_, hold_until) = watch::channel(None);
            let opening = Opening {
                room,
                position: Position::First,
                hold_until,
                abort: CancellationToken::new(),
                progress,
            };
            ProbeReport {
                report: Report {
                    timeline,
                    join_upper_bound,
                    ..report(&opening, failed(Reason::AgentSilent))
                },
                started_at: Utc::now(),
            }
        };
        let batch = BatchReport {
            batch_id: String::new(),
            target: String::new(),
            started_at: Utc::now(),
            ended_at: Utc::now(),
            probes: vec![probe(SECOND, false), probe(9 * SECOND, true)],
            not_opened: None,
        };
        let summary = batch.summary();
        assert_eq!((summary.ok, summary.failed, summary.aborted), (0, 2, 0));
        assert_eq!(summary.join_delay.unwrap().max, SECOND);
    }

    #[test]
    fn result_of_a_batch_follows_from_its_rooms() {
        let ok = || Outcome::Ok;
        let silent = || failed(Reason::AgentSilent);
        let limited = || failed(Reason::PlanLimit(LimitKind::Quota));
        let result = |outcomes: Vec<Outcome>| {
            let probes = outcomes.into_iter().map(|outcome| ProbeReport {
                report: Report::new(new_room_name(), Position::First, outcome),
                started_at: Utc::now(),
            });
            sample::batch(probes.collect(), None).result()
        };
        assert_eq!(result(vec![ok(), ok()]), BatchResult::Ok);
        assert_eq!(result(vec![ok(), silent()]), BatchResult::Degraded);
        assert_eq!(result(vec![silent(), silent()]), BatchResult::Failed);
        assert_eq!(
            result(vec![ok(), silent(), limited()]),
            BatchResult::Limited
        );
        assert_eq!(
            result(vec![limited(), Outcome::Aborted]),
            BatchResult::Aborted
        );
        assert_eq!(result(Vec::new()), BatchResult::Aborted);
    }

    #[test]
    fn room_names_share_the_instance_and_nothing_else() {
        let (one, other) = (new_room_name().0, new_room_name().0);
        let parts: Vec<&str> = one.split('-').collect();
        assert_eq!(parts[..2], ["canary", INSTANCE.as_str()]);
        assert_eq!((parts[1].len(), parts[2].len()), (5, 13));
        assert_ne!(one, other);
    }
}
