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
use crate::probe::{Milestone, Outcome, ProbeEvent, ProbeReport, Span, Timeline};

/// How often the seconds of open rooms are redrawn.
pub(super) const REFRESH_INTERVAL: Duration = Duration::from_millis(200);

pub(super) struct ProgressView {
    rooms: usize,
    /// The lines that are redrawn; `None` if each event is a line of its own.
    live: Option<MultiProgress>,
    /// Each line is a row of [`table::brief_row`], which fills up.
    as_table: bool,
    head: Option<ProgressBar>,
    lines: Vec<RoomLine>,
}

/// One room on a terminal.
struct RoomLine {
    bar: ProgressBar,
    opened_at: Instant,
    state: String,
    /// The row so far; `None` if lines are not rows.
    row: Option<Timeline>,
    ended: bool,
}

impl ProgressView {
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
        }
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
                    self.lines.push(RoomLine {
                        bar,
                        opened_at: Instant::now(),
                        state: "opening".to_owned(),
                        row: self.as_table.then(Timeline::default),
                        ended: false,
                    });
                    self.refresh();
                } else {
                    print_error(&format!(
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
                    let outcome = outcome_text(report);
                    print_error(&format!("room {} of {}: {outcome}", index + 1, self.rooms));
                }
            }
        }
    }

    /// Redraws the seconds of every open room.
    pub(super) fn refresh(&mut self) {
        for line in self.lines.iter().filter(|line| !line.ended) {
            let open_for = line.opened_at.elapsed().as_secs();
            line.bar.set_message(match &line.row {
                Some(row) => table::brief_row(row, None, format!("{}, {open_for} s", line.state)),
                None => format!("{open_for:>3} s  {}", line.state),
            });
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

impl RoomLine {
    fn advance(&mut self, event: &ProbeEvent) {
        match event {
            ProbeEvent::Reached { milestone, at } => {
                let since = at.saturating_duration_since(self.opened_at).as_secs_f64();
                let state = state_after(*milestone);
                if let Some(row) = &mut self.row {
                    row.mark(*milestone, *at);
                    self.state = state.map_or(std::mem::take(&mut self.state), str::to_owned);
                } else if let Some(state) = state {
                    self.state = format!("{state} (at {since:.1} s)");
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
            Some(_) => table::brief_row_of(report),
            None => outcome_text(report),
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
        .expect("the template is valid for every colour")
}

/// Returns the state of a room after a milestone, and `None` if the milestone does not change what the room waits for.
fn state_after(milestone: Milestone) -> Option<&'static str> {
    Some(match milestone {
        Milestone::RoomCreated => "room created",
        Milestone::SignalConnected => "connected, waiting for media",
        Milestone::MediaConnected => "media connected",
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
