//! The rooms opened for one tick: the ramp, the hold and the caps.
//!
//! It knows no metrics and no HTTP.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;

use chrono::{DateTime, SubsecRound, Utc};
use tokio::sync::{mpsc, watch};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::config::{self, Stay};
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
    /// Sorts by time of start; unique across processes.
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
/// `events` never holds the batch up: what a slow or gone reader can't take is lost to it, but not to the report.
/// Dropping the future drops the probes, and the janitor deletes their rooms.
pub async fn run(
    target: &str,
    context: Context,
    abort: CancellationToken,
    events: mpsc::Sender<BatchEvent>,
) -> BatchReport {
    let started_at = Utc::now().trunc_subsecs(6);
    let plan = Plan {
        rooms: context.target.batch.rooms,
        max_rooms: context.project.max_rooms,
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
    let (probes, not_opened) = Running::new(plan, abort, events, open).run().await;
    BatchReport {
        batch_id: format!(
            "{}-{}-{}",
            started_at.format("%Y%m%dT%H%M%S"),
            *INSTANCE,
            base32(fastrand::u64(..), 4)
        ),
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
    stopped: Option<String>,
}

impl Ramp {
    fn new(plan: Plan) -> Self {
        Self {
            plan,
            stages: Vec::new(),
            opened: None,
            no_shows: 0,
            stopped: None,
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
            self.stop(why.to_owned());
        }
        if self.stages[index] != Stage::Joining {
            return;
        }
        self.stages[index] = Stage::Decided;
        self.no_shows += 1;
        if self.no_shows == self.plan.stop_after_no_shows {
            self.stop(match self.no_shows {
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
        self.stopped.get_or_insert(why);
    }

    /// No room opens any more, and every join is decided.
    fn is_over(&self) -> bool {
        !self.has_more() && !self.stages.contains(&Stage::Joining)
    }

    fn not_opened(self) -> Option<NotOpened> {
        let rooms = self.plan.rooms - self.stages.len();
        (rooms > 0).then(|| NotOpened {
            rooms,
            why: self
                .stopped
                .expect("a ramp ends early only where it was stopped"),
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

struct OpenedProbe {
    room: RoomName,
    started_at: DateTime<Utc>,
    hold_until: watch::Sender<Option<Instant>>,
    report: Option<Report>,
}

/// A batch at work: the thin loop around [`Ramp`] that owns the probes' tasks.
struct Running<F> {
    ramp: Ramp,
    open: F,
    abort: CancellationToken,
    events: mpsc::Sender<BatchEvent>,
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
        abort: CancellationToken,
        events: mpsc::Sender<BatchEvent>,
        open: F,
    ) -> Self {
        Self {
            ramp: Ramp::new(plan),
            open,
            abort,
            events,
            probes: Vec::new(),
            tasks: JoinSet::new(),
            index_of: HashMap::new(),
        }
    }

    async fn run(mut self) -> (Vec<ProbeReport>, Option<NotOpened>) {
        let (told, mut progress) = mpsc::channel(Progress::MOST);
        let abort = self.abort.clone();
        let mut aborted = false;
        loop {
            while let Some(index) = self.ramp.open_next(Instant::now()) {
                self.open(index, told.clone());
            }
            self.hold_together_once_over();
            let due = self.ramp.due();
            if self.tasks.is_empty() && due.is_none() {
                break;
            }
            // Progress before endings: a probe has told all of its progress before its task ends.
            tokio::select! {
                biased;
                () = abort.cancelled(), if !aborted => {
                    aborted = true;
                    self.ramp.stop("the batch was aborted".to_owned());
                }
                Some((index, progress)) = progress.recv() => self.progressed(index, progress),
                Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
        }
        let reports = self.probes.into_iter().map(|probe| ProbeReport {
            report: probe.report.expect("every task has ended with a report"),
            started_at: probe.started_at,
        });
        (reports.collect(), self.ramp.not_opened())
    }

    fn open(&mut self, index: usize, told: mpsc::Sender<(usize, Progress)>) {
        let room = new_room_name();
        let (hold_until, held) = watch::channel(None);
        let (progress, seen) = mpsc::channel(Progress::MOST);
        self.probes.push(OpenedProbe {
            room: room.clone(),
            started_at: Utc::now().trunc_subsecs(6),
            hold_until,
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
            Progress::Settled(outcome) => self.ramp.settled(index, outcome),
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
        let report = match ended {
            Ok((_, report)) => report,
            Err(error) => crashed(self.probes[index].room.clone(), position(index), error),
        };
        self.ramp.ended(index, &report.outcome);
        self.tell(BatchEvent::Ended {
            index,
            report: Box::new(report.clone()),
        });
        self.probes[index].report = Some(report);
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
    use crate::probe::{LimitKind, Timeline};

    type Probe = Pin<Box<dyn Future<Output = Report> + Send>>;

    const SECOND: Duration = Duration::from_secs(1);

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
        say(&opening, Progress::Settled(outcome.clone())).await;
        report(&opening, outcome)
    }

    /// No agent comes: the outcome is known after `delay`, and the room is deleted 1 s later.
    async fn fails(delay: Duration, reason: Reason, opening: Opening) -> Report {
        sleep(delay).await;
        say(&opening, Progress::JoinSettled { joined: false }).await;
        sleep(Duration::from_millis(5)).await;
        say(&opening, Progress::Settled(failed(reason))).await;
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

    async fn run_scripted(
        plan: Plan,
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
        let (probes, not_opened) = Running::new(plan, abort, events, open).run().await;
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
        let running = Running::new(plan, CancellationToken::new(), events, open);
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

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_never_reads_or_is_gone_holds_nothing_up() {
        for keep in [true, false] {
            let (events, reader) = mpsc::channel(1);
            let reader = keep.then_some(reader);
            let open = |_, opening| joins(SECOND, opening);
            let plan = plan(3, Stay::Together);
            let running = Running::new(plan, CancellationToken::new(), events, open);
            let (probes, _) = running.run().await;
            assert_eq!(probes.len(), 3);
            drop(reader);
        }
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
                    Progress::Settled(_) => "settled",
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
