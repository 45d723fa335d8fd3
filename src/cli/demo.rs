//! `demo`: the sandbox and the canary in one process, batch after batch, with faults by turns.
//!
//! What is announced is what the sandbox was told; what follows is what the canary found out by itself. Where the two
//! differ, the demo says so.

use std::time::Duration;

use anyhow::Context as _;

use super::once::verdict;
use super::progress::Screen;
use super::rehearsal::{self, How};
use super::sandboxed::{
    LocalEvent, SandboxedDaemon, Setup, Wanted, heading, judgement, listen, result,
};
use super::{Demo, Exit, phrasing, print_unless_closed};
use crate::batch::BatchEvent;
use crate::daemon::Order;
use crate::probe::{LimitKind, Outcome, ProbeReport, Reason, Span};
use crate::report::BatchReport;
use crate::sandbox::fault::{FaultRule, RoomSelector};
use crate::sandbox::{Handle, Sandbox, SandboxSettings};
use crate::telemetry;

const TARGET: &str = "demo";

/// Batches without a fault before the first that has one; from there on they alternate.
const GOOD_AT_FIRST: usize = 2;

/// A fault that is played for one batch.
struct Drill {
    play: Play,
    rooms: Affected,
}

/// What is played, and so what the canary must make of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Play {
    LateJoin,
    Failure(Reason),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Affected {
    All,
    /// The second, where there is one: so the table shows what the fault changes.
    One,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Ok,
    OkLate(Duration),
    Failed(Reason),
}

const fn in_one(reason: Reason) -> Drill {
    Drill {
        play: Play::Failure(reason),
        rooms: Affected::One,
    }
}

const fn in_all(reason: Reason) -> Drill {
    Drill {
        play: Play::Failure(reason),
        rooms: Affected::All,
    }
}

/// In the order of playing: what a person knows by sight first, and no two of a kind in a row.
const DRILLS: &[Drill] = &[
    Drill {
        play: Play::LateJoin,
        rooms: Affected::One,
    },
    in_one(Reason::AgentSilent),
    in_all(Reason::PlanLimit(LimitKind::Connections)),
    in_all(Reason::DispatchUnanswered),
    in_one(Reason::AgentLeftEarly),
    in_one(Reason::SignalLost),
    in_one(Reason::AgentNoTrack),
    in_all(Reason::PlanLimit(LimitKind::Node)),
    in_one(Reason::AgentDuplicate),
    in_one(Reason::MediaFailed),
    in_all(Reason::AgentNoShow),
    in_one(Reason::AgentNoReply),
    in_all(Reason::PlanLimit(LimitKind::AgentSessions)),
];

impl Play {
    /// What is said of it, and the fault of the sandbox that brings it about.
    fn staging(self) -> (&'static str, &'static str) {
        match self {
            // A little more: the server stamps the join in whole milliseconds, on a clock that is only estimated here.
            Self::LateJoin => ("the agent takes 3 s to join", "join_delay=3s50ms"),
            Self::Failure(reason) => {
                let rehearsal = rehearsal::of(reason);
                let How::Sandbox(fault) = rehearsal.how else {
                    unreachable!("a test looks at every drill")
                };
                (rehearsal.what, fault)
            }
        }
    }

    fn expected(self) -> Expected {
        match self {
            Self::LateJoin => Expected::OkLate(Duration::from_secs(3)),
            Self::Failure(reason) => Expected::Failed(reason),
        }
    }
}

impl Drill {
    /// What is played in batch `number`, counted from 1.
    fn of_batch(number: usize) -> Option<&'static Self> {
        let faulty = number.checked_sub(GOOD_AT_FIRST + 1)?;
        faulty
            .is_multiple_of(2)
            .then(|| &DRILLS[faulty / 2 % DRILLS.len()])
    }

    /// Index of the one affected room of a batch; `None` where all are.
    fn only_room(&self, rooms: usize) -> Option<usize> {
        (self.rooms == Affected::One).then(|| rooms.min(2) - 1)
    }

    /// `seen`: the rooms that the sandbox has numbered so far.
    fn rule(&self, rooms: usize, seen: u64) -> FaultRule {
        let (_, fault) = self.play.staging();
        let mut rule: FaultRule = fault.parse().expect("a test reads every fault");
        if let Some(index) = self.only_room(rooms) {
            rule.rooms = RoomSelector::Nth(seen + index as u64 + 1);
        }
        rule
    }

    fn announcement(&self, rooms: usize) -> String {
        let (what, _) = self.play.staging();
        match self.only_room(rooms) {
            Some(index) if rooms > 1 => format!("fault in room {}: {what}", index + 1),
            _ => format!("fault: {what}"),
        }
    }
}

impl Expected {
    fn of_room(drill: Option<&Drill>, index: usize, rooms: usize) -> Self {
        match drill {
            Some(drill) if drill.only_room(rooms).is_none_or(|only| only == index) => {
                drill.play.expected()
            }
            _ => Self::Ok,
        }
    }

    fn is_met_by(self, report: &ProbeReport) -> bool {
        match (self, &report.outcome) {
            (Self::Ok, Outcome::Ok) => true,
            (Self::OkLate(least), Outcome::Ok) => {
                let join = report.timeline.span(Span::AgentJoin);
                join.is_some_and(|join| join >= least)
            }
            (Self::Failed(reason), Outcome::Failed(failure)) => failure.reason == reason,
            _ => false,
        }
    }

    fn describe(self) -> String {
        match self {
            Self::Ok => "ok".to_owned(),
            Self::OkLate(least) => format!("ok, with a join delay of {least:?} or more"),
            Self::Failed(reason) => phrasing::reason(reason),
        }
    }
}

pub(super) fn run(args: &Demo) -> anyhow::Result<Exit> {
    let screen = Screen::live_table(args.rooms);
    // The demo tells of failed rooms and of skipped ticks in its own way.
    telemetry::log_to(screen.log_writer(), Screen::colour(), "error");
    let runtime = super::runtime()?;
    let exit = runtime.block_on(perform(args, screen));
    runtime.shutdown_background();
    exit
}

async fn perform(args: &Demo, screen: Screen) -> anyhow::Result<Exit> {
    let sandbox = Sandbox::bind(SandboxSettings::default()).await?;
    let folder = tempfile::tempdir().context("can't make a folder for the history")?;
    let wanted = Wanted {
        target: TARGET.to_owned(),
        project: "default",
        rooms: args.rooms,
        every: args.every,
        history_dir: folder.path().to_owned(),
    };
    let config = wanted.draft(&sandbox)?.validate()?;
    let url = sandbox.url();
    let rooms = args.rooms;
    let setup = Setup {
        listener: listen(None).await?,
        screen,
        fault: None,
        drill: false,
        before_batch: Box::new(move |handle, number| stage(handle, number, rooms)),
    };
    let mut daemon = SandboxedDaemon::start(sandbox, config, setup)?;
    let introduction = introduction(args, &url, &daemon.page);
    let exit = play(&mut daemon, args, &introduction).await;
    daemon.close().await?;
    exit
}

/// Has the sandbox play what is due.
fn stage(handle: &Handle, number: usize, rooms: usize) {
    let drill = Drill::of_batch(number);
    let rule = drill.map(|drill| drill.rule(rooms, handle.rooms_seen()));
    handle.set_faults(rule.into_iter().collect());
}

async fn play(
    daemon: &mut SandboxedDaemon,
    args: &Demo,
    introduction: &str,
) -> anyhow::Result<Exit> {
    let mut exit = None;
    if print_unless_closed(introduction)? {
        daemon.tell(Order::Batch(TARGET.to_owned()));
    } else {
        daemon.stop();
    }
    let mut number = 0;
    loop {
        match daemon.next().await? {
            LocalEvent::Batch(BatchEvent::Started { .. }) => {
                number += 1;
                let fault = Drill::of_batch(number).map(|drill| drill.announcement(args.rooms));
                if !print_unless_closed(&heading(number, fault))? {
                    daemon.stop();
                }
            }
            LocalEvent::Batch(BatchEvent::Ended(report)) => {
                let judgement = judged(Drill::of_batch(number), &report, args.rooms);
                let read = print_unless_closed(&(result(&report) + &judgement))?;
                if args.once {
                    exit = Some(verdict(&report));
                }
                if args.once || !read {
                    daemon.stop();
                }
            }
            LocalEvent::Batch(_) => {}
            LocalEvent::Interrupted => {
                exit.get_or_insert(if args.once { Exit::Aborted } else { Exit::Ok });
                daemon.stop();
            }
            LocalEvent::Stopped => break,
        }
    }
    if !args.once {
        let left = match daemon.handle.rooms().len() {
            0 => "none is left".to_owned(),
            left => format!("{left} are left"),
        };
        let opened = daemon.handle.rooms_seen();
        print_unless_closed(&format!("Stopped. Of the {opened} rooms opened, {left}.\n"))?;
    }
    Ok(exit.unwrap_or(Exit::Ok))
}

fn introduction(args: &Demo, url: &str, page: &str) -> String {
    let rooms = match args.rooms {
        1 => "1 room".to_owned(),
        rooms => format!("{rooms} rooms"),
    };
    let (often, then) = if args.once {
        (String::new(), String::new())
    } else {
        (
            format!(" every {}", humantime::format_duration(args.every)),
            format!(
                "The first {GOOD_AT_FIRST} batches go well, then every other one meets a fault. \
                 Ctrl-C ends it.\n"
            ),
        )
    };
    format!(
        "A LiveKit server with a demo agent runs on this machine ({url}).\n\
         The canary opens {rooms}{often}. In each it calls the agent, waits for\n\
         its first words, plays them back to it and waits for the reply. Join delay and\n\
         first speech count from the call, reply from the end of what was played back.\n\
         Its page is at {page} and its metrics at {page}metrics.\n{then}"
    )
}

fn judged(drill: Option<&Drill>, batch: &BatchReport, rooms: usize) -> String {
    let probes = batch.probes.iter().enumerate();
    let wrong: Vec<String> = probes
        .filter_map(|(index, probe)| {
            let expected = Expected::of_room(drill, index, rooms);
            (!expected.is_met_by(probe))
                .then(|| format!("room {} should be {}", index + 1, expected.describe()))
        })
        .collect();
    judgement(&wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Evidence;
    use crate::report::sample::{WELL, batch, failed, probe};

    fn silent_in(room: u8, rooms: u8) -> BatchReport {
        let outcome = |index| {
            if index == room {
                failed(Reason::AgentSilent, "no speech")
            } else {
                Outcome::Ok
            }
        };
        let probes = (1..=rooms).map(|room| probe(room, outcome(room), Evidence::default(), WELL));
        batch(probes.collect(), None)
    }

    fn drill(fault: &str) -> &'static Drill {
        let mut drills = DRILLS.iter();
        drills
            .find(|drill| drill.play.staging().1 == fault)
            .unwrap()
    }

    #[test]
    fn every_drill_has_a_fault_that_the_sandbox_knows() {
        for drill in DRILLS {
            let (_, fault) = drill.play.staging();
            assert_eq!(drill.rule(3, 0).fault.to_string(), fault);
        }
    }

    #[test]
    fn every_heading_fits_80_columns() {
        for drill in DRILLS {
            let heading = heading(999, Some(drill.announcement(3)));
            assert!(
                console::measure_text_width(heading.trim()) <= 80,
                "{heading}"
            );
        }
    }

    #[test]
    fn every_drill_is_played_with_a_good_batch_between() {
        let good = |number| Drill::of_batch(number).is_none();
        assert!(good(1) && good(2));
        let last = GOOD_AT_FIRST + 2 * DRILLS.len();
        for number in GOOD_AT_FIRST + 1..=last {
            assert_eq!(good(number), (number - GOOD_AT_FIRST).is_multiple_of(2));
        }
        let played = (1..=last).filter_map(Drill::of_batch);
        assert!(
            played
                .map(|drill| drill.play)
                .eq(DRILLS.iter().map(|drill| drill.play))
        );
        assert!(Drill::of_batch(last + 1).unwrap().play == DRILLS[0].play);
    }

    #[test]
    fn rooms_of_earlier_batches_are_counted_where_one_room_is_meant() {
        let silent = drill("silent_track");
        assert_eq!(silent.rule(3, 6).to_string(), "room8:silent_track");
        assert_eq!(silent.rule(1, 6).to_string(), "room7:silent_track");
        assert_eq!(
            drill("never_accepts").rule(3, 6).to_string(),
            "never_accepts"
        );
    }

    #[test]
    fn what_the_canary_says_is_held_against_what_was_played() {
        let silent = drill("silent_track");
        let good = |drill, report: &BatchReport| judged(drill, report, 3).contains("As expected");
        assert!(good(Some(silent), &silent_in(2, 3)));
        assert!(good(None, &silent_in(0, 3)));
        assert!(!good(Some(silent), &silent_in(0, 3)), "a missed fault");
        assert!(!good(Some(silent), &silent_in(3, 3)), "another room");
        assert!(
            !good(Some(drill("no_track")), &silent_in(2, 3)),
            "another reason"
        );
        assert!(!good(None, &silent_in(1, 3)), "a false alarm");
        assert!(
            !good(Some(drill("join_delay=3s50ms")), &silent_in(0, 3)),
            "a short join delay"
        );
    }
}
