//! The progress of a batch on stderr. On a terminal it is one line per room, which is redrawn; elsewhere it is one line
//! when a room opens and one when it ends.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;
use tracing_subscriber::fmt::MakeWriter;

use super::format::{delay, join_delay, printable};
use super::{print_error, table};
use crate::batch::BatchEvent;
use crate::config::{Project, Target};
use crate::livekit::RoomName;
use crate::probe::{Milestone, Outcome, ProbeEvent, ProbeReport, Span, Timeline};

/// How often the seconds of open rooms are redrawn.
pub(super) const REFRESH_INTERVAL: Duration = Duration::from_millis(200);

/// After this time without an agent, `once` prints what to check. A typing error in the agent's name looks like this, and the
/// join deadline is much later.
const NO_AGENT_NOTICE_AFTER: Duration = Duration::from_secs(10);

pub(super) struct ProgressView {
    rooms: usize,
    /// The lines that are redrawn; `None` if each event is a line of its own.
    live: Option<MultiProgress>,
    /// Each line is a row of [`table::brief_row`], which fills up.
    as_table: bool,
    head: Option<ProgressBar>,
    lines: Vec<RoomLine>,
    /// The time limits that the lines show.
    limits: StepLimits,
    /// Printed once, if no agent has come after [`NO_AGENT_NOTICE_AFTER`].
    no_agent_notice: Option<String>,
}

/// One room.
struct RoomLine {
    /// `None` if each event is a line of its own.
    bar: Option<ProgressBar>,
    opened_at: Instant,
    timeline: Timeline,
    hold_until: Option<Instant>,
    /// The number of the caller's turn, from 1; 0 before the first.
    turn: u32,
    /// What the outcome is, once it is final.
    outcome: Option<&'static str>,
    ended: bool,
}

impl ProgressView {
    pub(super) fn new(target: &Target, project: &Project) -> Self {
        let live =
            is_terminal().then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        let limits = StepLimits::of(target, project);
        let notice = || no_agent_notice(target.agent_name.as_deref(), limits.join);
        Self {
            rooms: target.batch.rooms,
            live,
            as_table: false,
            head: None,
            lines: Vec::new(),
            no_agent_notice: (limits.join > NO_AGENT_NOTICE_AFTER).then(notice),
            limits,
        }
    }

    /// A table that fills up, if stderr can redraw lines. Otherwise it shows nothing: the result has the same content and
    /// follows at once.
    pub(super) fn live_table(rooms: usize) -> Self {
        let target = if is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self {
            rooms,
            live: Some(MultiProgress::with_draw_target(target)),
            as_table: true,
            head: None,
            lines: Vec::new(),
            limits: StepLimits::default(),
            no_agent_notice: None,
        }
    }

    /// Shows the time limits of these settings from now on.
    pub(super) fn set_limits(&mut self, target: &Target, project: &Project) {
        self.limits = StepLimits::of(target, project);
    }

    /// Returns whether stderr takes colour. `NO_COLOR` turns it off.
    pub(super) fn colour() -> bool {
        is_terminal() && console::colors_enabled_stderr()
    }

    /// Returns a writer for the log. Its lines appear above the lines that are redrawn.
    pub(super) fn log_writer(&self) -> LogWriter {
        LogWriter(self.live.clone())
    }

    pub(super) fn show(&mut self, event: &BatchEvent) {
        match event {
            BatchEvent::Started | BatchEvent::Ended(_) => {}
            BatchEvent::RoomOpened { index, room } => self.room_opened(*index, room),
            BatchEvent::Probe { index, event } => {
                if let Some(line) = self.lines.get_mut(*index) {
                    line.advance(event);
                }
            }
            BatchEvent::HoldDecided { index, until } => {
                if let Some(line) = self.lines.get_mut(*index) {
                    line.hold_until = Some(*until);
                }
            }
            BatchEvent::RoomClosed { index, report } => {
                let as_table = self.as_table;
                let drawn = self
                    .lines
                    .get_mut(*index)
                    .is_some_and(|line| line.end(report, as_table));
                if !drawn {
                    let outcome = outcome_text(report);
                    print_error(&format!("room {} of {}: {outcome}", index + 1, self.rooms));
                }
            }
        }
    }

    fn room_opened(&mut self, index: usize, room: &RoomName) {
        let bar = self.live.as_ref().map(|live| {
            if self.as_table && self.head.is_none() {
                let head = live.add(ProgressBar::no_length());
                head.set_style(style("dim"));
                head.set_prefix("  room");
                head.set_message(console::style(table::BRIEF_HEAD).dim().to_string());
                self.head = Some(head);
            }
            let bar = live.add(ProgressBar::no_length());
            bar.set_style(style("cyan"));
            bar.set_prefix(if self.as_table {
                format!("  {:>4}", index + 1)
            } else {
                format!("{:>3} {room}", index + 1)
            });
            bar
        });
        if bar.is_none() {
            let (number, of) = (index + 1, self.rooms);
            print_error(&format!("room {number} of {of}: {room} opens"));
        }
        self.lines.push(RoomLine {
            bar,
            opened_at: Instant::now(),
            timeline: Timeline::default(),
            hold_until: None,
            turn: 0,
            outcome: None,
            ended: false,
        });
        self.refresh();
    }

    /// Redraws the seconds of every open room.
    pub(super) fn refresh(&mut self) {
        let now = Instant::now();
        for line in self.lines.iter().filter(|line| !line.ended) {
            let Some(bar) = &line.bar else { continue };
            let state = line.state(&self.limits, now);
            bar.set_message(if self.as_table {
                table::brief_row(&line.timeline, "-", state)
            } else {
                state
            });
        }
        let late = |line: &RoomLine| {
            let waits = !line.ended && line.timeline.get(Milestone::AgentJoined).is_none();
            let sent = line.timeline.get(Milestone::DispatchSent);
            waits && sent.is_some_and(|sent| now - sent >= NO_AGENT_NOTICE_AFTER)
        };
        if self.lines.iter().any(late)
            && let Some(notice) = self.no_agent_notice.take()
        {
            self.print(&notice);
        }
    }

    /// Prints a message above the lines that are redrawn.
    pub(super) fn print(&self, message: &str) {
        match &self.live {
            Some(live) => live.suspend(|| print_error(message)),
            None => print_error(message),
        }
    }

    /// Ends the lines of this batch, so that another batch can begin.
    ///
    /// If stdout is the same terminal, the lines are cleared: the result replaces them.
    pub(super) fn close(&mut self) {
        let lines = self.lines.drain(..).filter_map(|line| line.bar);
        for bar in self.head.take().into_iter().chain(lines) {
            if console::user_attended() {
                bar.finish_and_clear();
            } else {
                bar.abandon();
            }
        }
        if let Some(live) = &self.live
            && console::user_attended()
        {
            drop(live.clear());
        }
    }
}

fn no_agent_notice(agent_name: Option<&str>, join: Duration) -> String {
    let worker = match agent_name {
        Some(name) => format!("is registered as {name:?}"),
        None => "without a name is registered".to_owned(),
    };
    format!(
        "no agent after {} s: check that a worker {worker} and has free capacity\n\
         (the canary waits up to {} s in each room; Ctrl-C stops it)",
        NO_AGENT_NOTICE_AFTER.as_secs(),
        join.as_secs()
    )
}

impl RoomLine {
    fn advance(&mut self, event: &ProbeEvent) {
        match event {
            ProbeEvent::Reached { milestone, at } => {
                self.timeline.mark(*milestone, *at);
            }
            ProbeEvent::OutcomeDecided { outcome, .. } => {
                self.outcome = Some(match outcome {
                    Outcome::Failed(failure) => failure.reason.label(),
                    Outcome::Aborted | Outcome::Ok => outcome.label(),
                });
            }
            ProbeEvent::TurnStarted { .. } => self.turn += 1,
            ProbeEvent::JoinDecided { .. } => {}
        }
    }

    /// Returns what the room waits for, and for how long.
    fn state(&self, limits: &StepLimits, now: Instant) -> String {
        if let Some(outcome) = self.outcome {
            return format!("{outcome}, cleaning up");
        }
        let Some(step) = limits.step_after(&self.timeline) else {
            let state = match self.hold_until {
                Some(until) if until > now => {
                    // Rounded up, so that the last second is not shown as zero.
                    let left = (until - now).as_millis().div_ceil(1000);
                    format!("holding, {left} s left")
                }
                Some(_) => "finishing the call".to_owned(),
                None => "spoke, waiting for the other rooms".to_owned(),
            };
            return match self.turn {
                0 => state,
                turn => format!("{state}, turn {turn}"),
            };
        };
        let since = step.since.unwrap_or(self.opened_at);
        let waited = now.saturating_duration_since(since).as_secs();
        format!("{}, {waited} of {} s", step.what, step.limit.as_secs_f32())
    }

    /// Shows the outcome, and returns whether it can.
    fn end(&mut self, report: &ProbeReport, as_table: bool) -> bool {
        self.ended = true;
        let Some(bar) = &self.bar else { return false };
        bar.set_style(style(match report.outcome {
            Outcome::Ok => "green",
            Outcome::Aborted => "yellow",
            Outcome::Failed(_) => "red",
        }));
        bar.abandon_with_message(if as_table {
            table::brief_row_of(report)
        } else {
            outcome_text(report)
        });
        true
    }
}

/// How long each step of a call may take.
#[derive(Default)]
struct StepLimits {
    request: Duration,
    signal: Duration,
    media: Duration,
    join: Duration,
    track: Duration,
    speech: Duration,
    /// The canary's join creates the room.
    joins_to_create: bool,
}

impl StepLimits {
    fn of(target: &Target, project: &Project) -> Self {
        let deadlines = &target.deadlines;
        let facts = target.dispatch.mode.facts();
        Self {
            request: project.api_timeout,
            signal: deadlines.signal,
            media: deadlines.media,
            join: deadlines.join,
            track: deadlines.track,
            speech: deadlines.speech,
            joins_to_create: facts.request.joins_to_create(),
        }
    }

    /// Returns the step that a call waits for, and `None` once the agent has spoken.
    fn step_after(&self, timeline: &Timeline) -> Option<CallStep> {
        let at = |milestone| timeline.get(milestone);
        let step = |what, since, limit| Some(CallStep { what, since, limit });
        if at(Milestone::SignalConnected).is_none() {
            let created = at(Milestone::RoomCreated);
            return if created.is_none() && !self.joins_to_create {
                step("creating the room", at(Milestone::Started), self.request)
            } else {
                step(
                    "connecting",
                    created.or(at(Milestone::Started)),
                    self.signal,
                )
            };
        }
        if at(Milestone::MediaConnected).is_none() || at(Milestone::CallerPublished).is_none() {
            return step(
                "connecting media",
                at(Milestone::SignalConnected),
                self.media,
            );
        }
        let joined = at(Milestone::AgentJoined);
        match (at(Milestone::DispatchSent), joined) {
            (None, None) => step("dispatching", at(Milestone::MediaConnected), self.request),
            (sent, None) => step("waiting for the agent", sent, self.join),
            _ if at(Milestone::AgentTrackSubscribed).is_none() => {
                step("waiting for its audio", joined, self.track)
            }
            _ if at(Milestone::AgentSpoke).is_none() => {
                step("waiting for its speech", joined, self.speech)
            }
            _ => None,
        }
    }
}

/// A step that has begun and not ended.
struct CallStep {
    what: &'static str,
    /// `None` at the start of the call.
    since: Option<Instant>,
    limit: Duration,
}

fn style(colour: &str) -> ProgressStyle {
    ProgressStyle::with_template(&format!("{{prefix:.{colour}}}  {{wide_msg}}"))
        .expect("the template is valid for every colour")
}

fn outcome_text(report: &ProbeReport) -> String {
    match &report.outcome {
        // Short, because it shares 80 columns with the name of the room.
        Outcome::Ok => {
            let join = join_delay(report);
            let speech = delay(report.timeline.span(Span::FirstSpeech));
            format!("ok: agent joined in {join}, spoke in {speech}")
        }
        Outcome::Aborted => "aborted".to_owned(),
        Outcome::Failed(failure) => {
            let (reason, origin) = (failure.reason, failure.reason.origin());
            let detail = printable(&failure.detail);
            format!("failed: {} ({}): {detail}", reason.label(), origin.label())
        }
    }
}

/// Returns whether stderr can redraw lines.
fn is_terminal() -> bool {
    console::user_attended_stderr() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Writes each log line to stderr as a whole, between two redraws.
pub(super) struct LogWriter(Option<MultiProgress>);

pub(super) struct LogLine<'a> {
    live: Option<&'a MultiProgress>,
    text: Vec<u8>,
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = LogLine<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        LogLine {
            live: self.0.as_ref(),
            text: Vec::new(),
        }
    }
}

impl Write for LogLine<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LogLine<'_> {
    fn drop(&mut self) {
        let text = String::from_utf8_lossy(&self.text);
        let text = text.trim_end();
        match self.live {
            Some(live) => live.suspend(|| print_error(text)),
            None => print_error(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample::project;

    fn line(marks: &[(Milestone, u64)], base: Instant) -> RoomLine {
        let mut timeline = Timeline::default();
        for (milestone, seconds) in marks {
            timeline.mark(*milestone, base + Duration::from_secs(*seconds));
        }
        RoomLine {
            bar: None,
            opened_at: base,
            timeline,
            hold_until: None,
            turn: 0,
            outcome: None,
            ended: false,
        }
    }

    #[test]
    fn line_names_what_the_room_waits_for_and_for_how_long() {
        use Milestone::{
            AgentJoined, AgentSpoke, AgentTrackSubscribed, CallerPublished, DispatchSent,
            MediaConnected, RoomCreated, SignalConnected, Started,
        };
        let limits = StepLimits::of(&Target::default(), &project());
        let base = Instant::now();
        let now = base + Duration::from_secs(20);
        let marks = [
            (Started, 1),
            (RoomCreated, 2),
            (SignalConnected, 3),
            (MediaConnected, 4),
            (CallerPublished, 5),
            (DispatchSent, 6),
            (AgentJoined, 7),
            (AgentTrackSubscribed, 8),
            (AgentSpoke, 9),
        ];
        let states = [
            "creating the room, 20 of 10 s",
            "creating the room, 19 of 10 s",
            "connecting, 18 of 10 s",
            "connecting media, 17 of 15 s",
            "connecting media, 17 of 15 s",
            "dispatching, 16 of 10 s",
            "waiting for the agent, 14 of 30 s",
            "waiting for its audio, 13 of 10 s",
            "waiting for its speech, 13 of 20 s",
            "spoke, waiting for the other rooms",
        ];
        for (count, state) in states.into_iter().enumerate() {
            assert_eq!(line(&marks[..count], base).state(&limits, now), state);
        }
        let mut held = line(&marks, base);
        held.hold_until = Some(now + Duration::from_millis(8200));
        assert_eq!(held.state(&limits, now), "holding, 9 s left");
        held.hold_until = Some(now);
        assert_eq!(held.state(&limits, now), "finishing the call");
        held.advance(&ProbeEvent::TurnStarted {
            to_verdict: Duration::ZERO,
        });
        assert_eq!(held.state(&limits, now), "finishing the call, turn 1");
        held.outcome = Some("agent_silent");
        assert_eq!(held.state(&limits, now), "agent_silent, cleaning up");
    }
}
