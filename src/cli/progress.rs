//! What a running batch shows on stderr: on a terminal a line per room that stays up to date, elsewhere a plain line per
//! opening and per outcome.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;
use tracing_subscriber::fmt::MakeWriter;

use super::phrasing::{delay, join_delay, printable};
use super::{complain, table};
use crate::batch::BatchEvent;
use crate::probe::{Milestone, Outcome, ProbeEvent, ProbeReport, Span, Timeline};

/// How often a screen that waits is drawn again.
pub(super) const REFRESH: Duration = Duration::from_millis(200);

pub(super) struct Screen {
    rooms: usize,
    /// On a terminal only.
    live: Option<MultiProgress>,
    /// Lines are rows of [`table::brief`] that fill up.
    as_table: bool,
    head: Option<ProgressBar>,
    lines: Vec<Line>,
}

/// One room on a terminal.
struct Line {
    bar: ProgressBar,
    opened_at: Instant,
    state: String,
    /// The row so far, where lines are rows.
    row: Option<Timeline>,
    ended: bool,
}

impl Screen {
    pub(super) fn new(rooms: usize) -> Self {
        let live =
            is_terminal().then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self {
            rooms,
            live,
            as_table: false,
            head: None,
            lines: Vec::new(),
        }
    }

    /// A table that fills up, where lines can be redrawn; elsewhere nothing, for results that follow at once and tell as
    /// much.
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
        }
    }

    /// Whether stderr takes colour; `NO_COLOR` is respected.
    pub(super) fn colour() -> bool {
        is_terminal() && console::colors_enabled_stderr()
    }

    /// Where logs go: above the live lines, which are redrawn.
    pub(super) fn log_writer(&self) -> LogWriter {
        LogWriter(self.live.clone())
    }

    pub(super) fn show(&mut self, event: &BatchEvent) {
        match event {
            BatchEvent::Started { .. } | BatchEvent::Ended(_) => {}
            BatchEvent::RoomOpened { index, room } => {
                if let Some(live) = &self.live {
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
                    self.lines.push(Line {
                        bar,
                        opened_at: Instant::now(),
                        state: "opening".to_owned(),
                        row: self.as_table.then(Timeline::default),
                        ended: false,
                    });
                    self.refresh();
                } else {
                    complain(&format!(
                        "room {} of {}: {room} opens",
                        index + 1,
                        self.rooms
                    ));
                }
            }
            BatchEvent::Probe { index, event } => {
                if let Some(line) = self.lines.get_mut(*index) {
                    line.advance(event);
                }
            }
            BatchEvent::RoomClosed { index, report } => {
                if let Some(line) = self.lines.get_mut(*index) {
                    line.end(report);
                } else {
                    let outcome = describe(report);
                    complain(&format!("room {} of {}: {outcome}", index + 1, self.rooms));
                }
            }
        }
    }

    /// Brings the running clocks up to date.
    pub(super) fn refresh(&mut self) {
        for line in self.lines.iter().filter(|line| !line.ended) {
            let open_for = line.opened_at.elapsed().as_secs();
            line.bar.set_message(match &line.row {
                Some(row) => table::brief(row, None, format!("{}, {open_for} s", line.state)),
                None => format!("{open_for:>3} s  {}", line.state),
            });
        }
    }

    pub(super) fn say(&self, message: &str) {
        match &self.live {
            Some(live) => live.suspend(|| complain(message)),
            None => complain(message),
        }
    }

    /// The table tells it all: where it goes to the same terminal, the live lines make room for it.
    /// The screen is then ready for another batch.
    pub(super) fn close(&mut self) {
        let lines = self.lines.drain(..).map(|line| line.bar);
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

impl Line {
    fn advance(&mut self, event: &ProbeEvent) {
        match event {
            ProbeEvent::Reached { milestone, at } => {
                let since = at.saturating_duration_since(self.opened_at).as_secs_f64();
                let phrase = phrase(*milestone);
                if let Some(row) = &mut self.row {
                    row.mark(*milestone, *at);
                    self.state = phrase.map_or(std::mem::take(&mut self.state), str::to_owned);
                } else if let Some(phrase) = phrase {
                    self.state = format!("{phrase} (at {since:.1} s)");
                }
            }
            ProbeEvent::OutcomeDecided {
                outcome: Outcome::Failed(failure),
                ..
            } => {
                self.state = format!("{}, cleaning up", failure.reason.label());
            }
            ProbeEvent::OutcomeDecided {
                outcome: Outcome::Aborted,
                ..
            } => {
                "aborted, cleaning up".clone_into(&mut self.state);
            }
            ProbeEvent::OutcomeDecided {
                outcome: Outcome::Ok,
                ..
            }
            | ProbeEvent::JoinDecided { .. } => {}
        }
    }

    fn end(&mut self, report: &ProbeReport) {
        self.ended = true;
        let description = match &self.row {
            Some(_) => table::brief_of(report),
            None => describe(report),
        };
        self.bar.set_style(style(match report.outcome {
            Outcome::Ok => "green",
            Outcome::Aborted => "yellow",
            Outcome::Failed(_) => "red",
        }));
        self.bar.abandon_with_message(description);
    }
}

fn style(colour: &str) -> ProgressStyle {
    ProgressStyle::with_template(&format!("{{prefix:.{colour}}}  {{wide_msg}}"))
        .expect("the template is well-formed whatever the colour")
}

/// The state that a milestone leaves a room in; `None` where it changes nothing that a reader waits for.
fn phrase(milestone: Milestone) -> Option<&'static str> {
    Some(match milestone {
        Milestone::RoomCreated => "room created",
        Milestone::SignalConnected => "connected, media not up yet",
        Milestone::MediaConnected => "media up",
        Milestone::EchoPublished => "echo published",
        Milestone::DispatchSent => "waiting for the agent",
        Milestone::AgentJoined => "agent joined",
        Milestone::AgentTrackSubscribed => "agent's track subscribed",
        Milestone::AgentSpoke => "agent spoke",
        Milestone::Left => "left, cleaning up",
        Milestone::RoomDeleted => "room deleted",
        Milestone::Started
        | Milestone::DispatchAccepted
        | Milestone::AgentListening
        | Milestone::AgentFirstAudio => return None,
    })
}

fn describe(report: &ProbeReport) -> String {
    match &report.outcome {
        Outcome::Ok => {
            let join = join_delay(report);
            let speech = delay(report.timeline.span(Span::FirstSpeech));
            format!("ok: agent joined after {join}, spoke after {speech}")
        }
        Outcome::Aborted => "aborted".to_owned(),
        Outcome::Failed(failure) => {
            let (reason, origin) = (failure.reason, failure.reason.origin());
            let detail = printable(&failure.detail);
            format!("failed: {} ({}): {detail}", reason.label(), origin.label())
        }
    }
}

/// Whether stderr can redraw lines.
fn is_terminal() -> bool {
    console::user_attended_stderr() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Hands each log line to stderr whole, between two drawings of the live lines.
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
            Some(live) => live.suspend(|| complain(text)),
            None => complain(text),
        }
    }
}
