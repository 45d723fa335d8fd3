//! `demo`: the sandbox and the canary in one process, one batch after another, each second one with a fault.
//!
//! The demo announces the fault that it injects into the sandbox, and then prints what the canary found without knowing of
//! it. If the two differ, the demo prints that.

use std::time::Duration;

use anyhow::Context as _;

use super::fault_catalogue::{self, Injection};
use super::local_daemon::{
    LocalDaemon, LocalEvent, LocalSetup, LocalTarget, batch_result, comparison, heading, listen,
};
use super::once::verdict;
use super::progress::ProgressView;
use super::{DemoArgs, Exit, format, print_unless_closed};
use crate::batch::BatchEvent;
use crate::config::RecordAudio;
use crate::probe::{LimitKind, Outcome, ProbeReport, Reason, Span};
use crate::report::{BatchReport, counted};
use crate::sandbox::fault::{FaultRule, RoomSelector};
use crate::sandbox::{Handle, Sandbox, SandboxSettings};
use crate::telemetry;

const TARGET: &str = "demo";

/// A fault that is injected into one batch.
struct ScheduledFault {
    fault: DemoFault,
    rooms: AffectedRooms,
}

/// The fault, and so what the canary must find.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DemoFault {
    LateJoin,
    /// The fault of the catalogue.
    Failure(Reason),
    /// Another agent with the same failure as one of the catalogue.
    Agent {
        description: &'static str,
        rule: &'static str,
        reason: Reason,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum AffectedRooms {
    All,
    /// The second room if there is one, so that the table shows the difference to the first.
    One,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExpectedOutcome {
    Ok,
    /// Ok, with a join delay of at least this long.
    OkLate(Duration),
    Failed(Reason),
}

const fn in_one(reason: Reason) -> ScheduledFault {
    ScheduledFault {
        fault: DemoFault::Failure(reason),
        rooms: AffectedRooms::One,
    }
}

const fn in_all(reason: Reason) -> ScheduledFault {
    ScheduledFault {
        fault: DemoFault::Failure(reason),
        rooms: AffectedRooms::All,
    }
}

/// The faults in the order of their batches: one that can be heard, then familiar ones, and never two of the same kind in a row.
const SCHEDULE: &[ScheduledFault] = &[
    in_one(Reason::AgentLeftEarly),
    ScheduledFault {
        fault: DemoFault::LateJoin,
        rooms: AffectedRooms::One,
    },
    in_one(Reason::AgentSilent),
    in_all(Reason::PlanLimit(LimitKind::Connections)),
    in_all(Reason::DispatchUnanswered),
    in_one(Reason::SignalLost),
    in_one(Reason::AgentNoTrack),
    in_all(Reason::PlanLimit(LimitKind::Node)),
    in_one(Reason::AgentDuplicate),
    in_one(Reason::MediaFailed),
    in_all(Reason::AgentNoShow),
    in_one(Reason::AgentNoReply),
    in_all(Reason::PlanLimit(LimitKind::AgentSessions)),
    ScheduledFault {
        fault: DemoFault::Agent {
            description: "the agent waits for the caller",
            rule: "waits_for_caller",
            reason: Reason::AgentSilent,
        },
        rooms: AffectedRooms::One,
    },
    ScheduledFault {
        fault: DemoFault::Agent {
            description: "the LLM of the agent fails",
            rule: "dead_llm",
            reason: Reason::AgentNoReply,
        },
        rooms: AffectedRooms::One,
    },
];

impl DemoFault {
    /// Returns the description for people, and the rule for the sandbox.
    fn description_and_rule(self) -> (&'static str, &'static str) {
        match self {
            // 50 ms more than announced: the server stamps the join in whole milliseconds, and the canary only estimates the
            // server's clock. A measured delay just below 3 s would look wrong.
            Self::LateJoin => ("the agent takes 3 s to join", "join_delay=3s50ms"),
            Self::Failure(reason) => {
                let fault = fault_catalogue::for_reason(reason);
                let Injection::Sandbox(rule) = fault.injection else {
                    unreachable!("a test checks every fault of the schedule")
                };
                (fault.description, rule)
            }
            Self::Agent {
                description, rule, ..
            } => (description, rule),
        }
    }

    fn expected(self) -> ExpectedOutcome {
        match self {
            Self::LateJoin => ExpectedOutcome::OkLate(Duration::from_secs(3)),
            Self::Failure(reason) | Self::Agent { reason, .. } => ExpectedOutcome::Failed(reason),
        }
    }
}

impl ScheduledFault {
    /// Returns the fault of batch `number`, which starts at 1: every second batch has one.
    fn of_batch(number: usize) -> Option<&'static Self> {
        let index = (number / 2).checked_sub(1)?;
        number
            .is_multiple_of(2)
            .then(|| &SCHEDULE[index % SCHEDULE.len()])
    }

    /// Returns the index of the affected room of a batch, and `None` if all rooms are affected.
    fn only_room(&self, rooms: usize) -> Option<usize> {
        (self.rooms == AffectedRooms::One).then(|| rooms.min(2) - 1)
    }

    /// Returns the rule for the sandbox. The sandbox numbers all its rooms, and it has opened `earlier_rooms` before this
    /// batch.
    fn rule(&self, rooms: usize, earlier_rooms: u64) -> FaultRule {
        let (_, rule) = self.fault.description_and_rule();
        let mut rule: FaultRule = rule.parse().expect("a test parses every rule");
        if let Some(index) = self.only_room(rooms) {
            rule.rooms = RoomSelector::Nth(earlier_rooms + index as u64 + 1);
        }
        rule
    }

    fn announcement(&self, rooms: usize) -> String {
        let (what, _) = self.fault.description_and_rule();
        match self.only_room(rooms) {
            Some(index) if rooms > 1 => format!("fault in room {}: {what}", index + 1),
            _ => format!("fault: {what}"),
        }
    }
}

impl ExpectedOutcome {
    fn of_room(fault: Option<&ScheduledFault>, index: usize, rooms: usize) -> Self {
        match fault {
            Some(fault) if fault.only_room(rooms).is_none_or(|only| only == index) => {
                fault.fault.expected()
            }
            _ => Self::Ok,
        }
    }

    fn is_met_by(self, report: &ProbeReport) -> bool {
        match (self, &report.outcome) {
            (Self::Ok, Outcome::Ok) => true,
            (Self::OkLate(min), Outcome::Ok) => {
                let join = report.timeline.span(Span::AgentJoin);
                join.is_some_and(|join| join >= min)
            }
            (Self::Failed(reason), Outcome::Failed(failure)) => failure.reason == reason,
            _ => false,
        }
    }

    fn describe(self) -> String {
        match self {
            Self::Ok => "ok".to_owned(),
            Self::OkLate(min) => format!("ok, with a join delay of at least {min:?}"),
            Self::Failed(reason) => format::reason(reason),
        }
    }
}

pub(super) fn run(args: &DemoArgs) -> anyhow::Result<Exit> {
    let view = ProgressView::live_table(args.rooms);
    // Only errors: the demo prints failed rooms itself, and skipped ticks do not matter to it.
    telemetry::log_to(view.log_writer(), ProgressView::colour(), "error");
    let runtime = super::runtime()?;
    let exit = runtime.block_on(run_demo(args, view));
    runtime.shutdown_background();
    exit
}

async fn run_demo(args: &DemoArgs, view: ProgressView) -> anyhow::Result<Exit> {
    let sandbox = Sandbox::bind(SandboxSettings::default()).await?;
    let folder = tempfile::tempdir().context("cannot create a folder for the history")?;
    let target = LocalTarget {
        target: TARGET.to_owned(),
        project: "default",
        rooms: args.rooms,
        every: args.every,
        history_dir: folder.path().to_owned(),
        record: RecordAudio::Always,
    };
    let config = target.draft(&sandbox)?.validate()?;
    let url = sandbox.url();
    let rooms = args.rooms;
    let setup = LocalSetup {
        listener: listen(None).await?,
        view,
        fault: None,
        drill: false,
        before_batch: Box::new(move |handle, number| inject_due_fault(handle, number, rooms)),
    };
    let mut daemon = LocalDaemon::start(sandbox, config, setup)?;
    let introduction = introduction(args, &url, &daemon.page);
    let exit = run_batches(&mut daemon, args, &introduction).await;
    daemon.close().await?;
    exit
}

/// Sets the fault of batch `number` in the sandbox.
fn inject_due_fault(handle: &Handle, number: usize, rooms: usize) {
    let fault = ScheduledFault::of_batch(number);
    let rule = fault.map(|fault| fault.rule(rooms, handle.rooms_seen()));
    handle.set_faults(rule.into_iter().collect());
}

async fn run_batches(
    daemon: &mut LocalDaemon,
    args: &DemoArgs,
    introduction: &str,
) -> anyhow::Result<Exit> {
    let mut exit = None;
    if !print_unless_closed(introduction)? {
        daemon.stop();
    }
    let mut number = 0;
    loop {
        match daemon.next().await? {
            LocalEvent::Batch(BatchEvent::Started) => {
                number += 1;
                let fault =
                    ScheduledFault::of_batch(number).map(|fault| fault.announcement(args.rooms));
                if !print_unless_closed(&heading(number, fault))? {
                    daemon.stop();
                }
            }
            LocalEvent::Batch(BatchEvent::Ended(report)) => {
                let comparison = compare(ScheduledFault::of_batch(number), &report, args.rooms);
                let open = print_unless_closed(&(batch_result(&report) + &comparison))?;
                if args.once {
                    exit = Some(verdict(&report));
                }
                if args.once || !open {
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
        let opened = daemon.handle.rooms_seen();
        let remaining = match daemon.handle.rooms().len() {
            0 => "none of them remains".to_owned(),
            1 => "1 of them remains".to_owned(),
            count => format!("{count} of them remain"),
        };
        print_unless_closed(&format!("Stopped. Rooms opened: {opened}; {remaining}.\n"))?;
    }
    Ok(exit.unwrap_or(Exit::Ok))
}

fn introduction(args: &DemoArgs, url: &str, page: &str) -> String {
    let rooms = counted(args.rooms as u64, "room");
    let (often, then) = if args.once {
        (String::new(), String::new())
    } else {
        (
            format!(" every {}", humantime::format_duration(args.every)),
            "Every second batch has a fault. Ctrl-C ends the demo.\n".to_owned(),
        )
    };
    format!(
        "A LiveKit server with a demo agent runs on this machine ({url}).\n\
         The canary opens {rooms}{often}. In each room it dispatches the agent,\n\
         waits for its first speech, plays that back to it and waits for the reply.\n\
         Join delay and first speech are measured from the dispatch, reply from the end\n\
         of the playback.\n\
         The page is at {page} and the metrics are at {page}metrics.\n{then}"
    )
}

fn compare(fault: Option<&ScheduledFault>, batch: &BatchReport, rooms: usize) -> String {
    let probes = batch.probes.iter().enumerate();
    let mismatches: Vec<String> = probes
        .filter_map(|(index, probe)| {
            let expected = ExpectedOutcome::of_room(fault, index, rooms);
            (!expected.is_met_by(probe))
                .then(|| format!("room {} should be {}", index + 1, expected.describe()))
        })
        .collect();
    comparison(&mismatches)
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

    fn scheduled(rule: &str) -> &'static ScheduledFault {
        let found = SCHEDULE
            .iter()
            .find(|fault| fault.fault.description_and_rule().1 == rule);
        found.unwrap()
    }

    #[test]
    fn the_sandbox_accepts_every_scheduled_fault() {
        for fault in SCHEDULE {
            let (_, rule) = fault.fault.description_and_rule();
            assert_eq!(fault.rule(3, 0).fault.to_string(), rule);
        }
    }

    #[test]
    fn every_heading_fits_80_columns() {
        for fault in SCHEDULE {
            let heading = heading(999, Some(fault.announcement(3)));
            assert!(
                console::measure_text_width(heading.trim()) <= 80,
                "{heading}"
            );
        }
    }

    #[test]
    fn every_fault_gets_a_batch_with_a_good_batch_after_it() {
        let good = |number| ScheduledFault::of_batch(number).is_none();
        let last = 2 * SCHEDULE.len();
        for number in 1..=last {
            assert_eq!(good(number), !number.is_multiple_of(2));
        }
        let injected = (1..=last).filter_map(ScheduledFault::of_batch);
        assert!(
            injected
                .map(|fault| fault.fault)
                .eq(SCHEDULE.iter().map(|fault| fault.fault))
        );
        assert!(ScheduledFault::of_batch(last + 2).unwrap().fault == SCHEDULE[0].fault);
    }

    #[test]
    fn rule_for_one_room_counts_the_rooms_of_earlier_batches() {
        let silent = scheduled("silent_track");
        assert_eq!(silent.rule(3, 6).to_string(), "room8:silent_track");
        assert_eq!(silent.rule(1, 6).to_string(), "room7:silent_track");
        assert_eq!(
            scheduled("never_accepts").rule(3, 6).to_string(),
            "never_accepts"
        );
    }

    #[test]
    fn findings_of_the_canary_are_compared_with_the_injected_fault() {
        let silent = scheduled("silent_track");
        let good = |fault, report: &BatchReport| compare(fault, report, 3).contains("As expected");
        assert!(good(Some(silent), &silent_in(2, 3)));
        assert!(good(None, &silent_in(0, 3)));
        assert!(!good(Some(silent), &silent_in(0, 3)), "a missed fault");
        assert!(!good(Some(silent), &silent_in(3, 3)), "another room");
        assert!(
            !good(Some(scheduled("no_track")), &silent_in(2, 3)),
            "another reason"
        );
        assert!(!good(None, &silent_in(1, 3)), "a false alarm");
        assert!(
            !good(Some(scheduled("join_delay=3s50ms")), &silent_in(0, 3)),
            "a short join delay"
        );
    }
}
