use std::time::Duration;

use super::*;
use crate::config::{DispatchMode, Expect};
use crate::livekit::event::{
    Agent, AudioStats, CallerTurn, EndReason, MediaConnection, MediaPath, MediaPermission,
    NOT_PERMITTED, RoomEventKind, SessionEvent, SessionMessage, Speaker, TranscriptText,
    TurnMetrics, UplinkReport,
};
use crate::livekit::wire::api::JobInfo;
use crate::livekit::wire::connect::ConnectError;
use crate::livekit::wire::request::HttpRejection;
use crate::livekit::wire::signal::SignalError;
use crate::probe::{Circumstances, LimitKind, Span, Turn};

/// A probe and its clock, in milliseconds since the start.
struct MachineScript {
    machine: ProbeMachine,
    base: Instant,
    actions: Vec<Action>,
}

const OVER_UDP: RoomEventKind = RoomEventKind::MediaConnected {
    path: Some(MediaPath::Udp),
};

/// Most tests need no reply.
fn explicit() -> Target {
    let mut target = Target {
        agent_name: Some("support".to_owned()),
        ..Target::default()
    };
    target.expect.reply = false;
    target
}

fn automatic() -> Target {
    let mut target = explicit();
    target.agent_name = None;
    target.dispatch.mode = DispatchMode::Automatic;
    target
}

fn named(mode: DispatchMode) -> Target {
    let mut target = explicit();
    target.dispatch.mode = mode;
    target
}

fn expecting(reply: bool, agent_may_leave: AgentMayLeave) -> Target {
    Target {
        expect: Expect {
            reply,
            agent_may_leave,
            ..Expect::default()
        },
        ..explicit()
    }
}

fn agent() -> Agent {
    Agent {
        identity: "agent-1".to_owned(),
        sid: "PA_1".to_owned(),
        name: Some("support".to_owned()),
        joined_at_ms: 0,
        joined: None,
    }
}

fn refusal(status: u16, code: Option<&str>, message: &str) -> HttpRejection {
    HttpRejection {
        status,
        twirp_code: code.map(str::to_owned),
        message: message.to_owned(),
        retry_after: None,
    }
}

fn dispatches(agent_name: &str, job: Option<&str>) -> Vec<DispatchInfo> {
    let jobs = job.map(|status| JobInfo {
        id: "AJ_1".to_owned(),
        status: status.to_owned(),
        error: String::new(),
        identity: "agent-AJ_1".to_owned(),
        worker: "AW_1".to_owned(),
    });
    vec![DispatchInfo {
        id: "AD_1".to_owned(),
        agent_name: agent_name.to_owned(),
        deployment: String::new(),
        jobs: jobs.into_iter().collect(),
    }]
}

fn ping_timeout() -> EndReason {
    EndReason::Signal(SignalError::PingTimeout(Duration::from_secs(15)))
}

impl MachineScript {
    fn new(target: Target) -> Self {
        Self::with_agent_known(target, false)
    }

    fn with_agent_known(target: Target, agent_known: bool) -> Self {
        let machine = ProbeMachine::new(
            Arc::new(target),
            RoomName("canary-test".to_owned()),
            Position::First,
            Utc::now(),
            agent_known,
            700,
        );
        let script = Self {
            machine,
            base: Instant::now(),
            actions: Vec::new(),
        };
        script.feed(0, Input::Start)
    }

    fn time(&self, at: u64) -> Instant {
        self.base + Duration::from_millis(at)
    }

    fn feed(mut self, at: u64, input: Input) -> Self {
        let now = self.time(at);
        self.actions.extend(self.machine.on(input, now));
        self
    }

    fn see(self, at: u64, seen: RoomEventKind) -> Self {
        let event = RoomEvent {
            at: self.time(at),
            kind: seen,
        };
        self.feed(at, Input::Room(event))
    }

    /// Lets time pass: every deadline fires when it is due.
    fn wait(mut self, until: u64) -> Self {
        while let Some(due) = self
            .machine
            .next_deadline()
            .filter(|due| *due <= self.time(until))
        {
            self.actions
                .extend(self.machine.on(Input::DeadlinePassed, due));
        }
        self
    }

    fn created(self, at: u64, result: Result<(), ApiError>) -> Self {
        let call = Call {
            sent_at: Some(self.time(1)),
            answered_at: self.time(at),
            result: result.map(|()| RoomInfo {
                sid: "RM_1".to_owned(),
            }),
        };
        self.feed(at, Input::Created(call))
    }

    fn dispatched(self, sent: u64, at: u64, result: Result<(), ApiError>) -> Self {
        let call = Call {
            sent_at: Some(self.time(sent)),
            answered_at: self.time(at),
            result: result.map(|()| "AD_1".to_owned()),
        };
        self.feed(at, Input::Dispatched(call))
    }

    fn listed(self, at: u64, result: Result<Vec<DispatchInfo>, ApiError>) -> Self {
        let dispatches = Call {
            sent_at: Some(self.time(at)),
            answered_at: self.time(at),
            result,
        };
        let participants = None;
        let listed = ListedRoom {
            dispatches,
            participants,
        };
        self.feed(at, Input::Listed(listed))
    }

    fn signal(self, at: u64) -> Self {
        self.see(
            at,
            RoomEventKind::SignalConnected {
                room_sid: "RM_1".to_owned(),
                server_version: "1.13.5".to_owned(),
                region: String::new(),
                node: "ND_1".to_owned(),
            },
        )
    }

    /// Media up and the echo track published.
    fn up(self, at: u64) -> Self {
        self.see(at, OVER_UDP)
            .see(at, RoomEventKind::CallerPublished)
    }

    fn joined(self, at: u64) -> Self {
        self.see(
            at,
            RoomEventKind::AgentJoined {
                agent: agent(),
                in_join_response: false,
            },
        )
    }

    /// First seen `at`; the server's own stamp is `joined`.
    fn stamped(self, joined: u64, at: u64, in_join_response: bool) -> Self {
        let joined = Some(self.time(joined));
        let agent = Agent { joined, ..agent() };
        let seen = RoomEventKind::AgentJoined {
            agent,
            in_join_response,
        };
        self.see(at, seen)
    }

    fn track(self, at: u64) -> Self {
        self.see(at, RoomEventKind::AgentTrackSubscribed)
    }

    fn left(self, at: u64, reason: &str) -> Self {
        let reason = reason.to_owned();
        self.see(at, RoomEventKind::AgentLeft { reason })
    }

    /// The agent speaks from `start` to `end`.
    fn speech(self, start: u64, end: u64) -> Self {
        self.see(start, RoomEventKind::SpeechStarted)
            .see(end, RoomEventKind::SpeechEnded)
    }

    /// The caller speaks from `start` to `end`, and LiveKit receives every packet.
    fn echo(self, start: u64, end: u64) -> Self {
        let sent = end / 20;
        let received = UplinkReport {
            covered: sent,
            lost: 0,
        };
        self.see(start, RoomEventKind::CallerStarted(CallerTurn::default()))
            .see(end, RoomEventKind::CallerEnded { sent })
            .see(end, RoomEventKind::UplinkReported(received))
    }

    fn hold(self, at: u64, until: u64) -> Self {
        let until = Some(self.time(until));
        self.feed(at, Input::HoldUntil(until))
    }

    fn ended(self, at: u64, why: EndReason) -> Self {
        let audio = AudioStats::default();
        self.see(at, RoomEventKind::Ended { reason: why, audio })
    }

    // Scripts that most tests share.

    /// Room created at 10, signal at 40, all up at 100: the dispatch is actions for.
    fn way_in(self) -> Self {
        self.created(10, Ok(())).signal(40).up(100)
    }

    /// `way_in`, dispatch sent at 101 and accepted at 110.
    fn waiting(self) -> Self {
        self.way_in().dispatched(101, 110, Ok(()))
    }

    /// `waiting`, the agent joined at 500, its track at 520, first packet at 530.
    fn with_agent(self) -> Self {
        self.waiting()
            .joined(500)
            .track(520)
            .see(530, RoomEventKind::AgentFirstAudio)
    }

    fn count(&self, wanted: fn(&Action) -> bool) -> usize {
        self.actions.iter().filter(|action| wanted(action)).count()
    }

    fn join_decisions(&self) -> Vec<bool> {
        let decisions = self.actions.iter().filter_map(|action| match action {
            Action::Emit(ProbeEvent::JoinDecided { joined }) => Some(*joined),
            _ => None,
        });
        decisions.collect()
    }

    fn is_decided(&self) -> bool {
        self.machine.outcome.is_some()
    }

    /// Leaves and deletes as actions, and holds what is true of every probe that has ended.
    fn report(mut self, at: u64) -> ProbeReport {
        assert!(self.is_decided(), "no outcome at {at} ms");
        if self.machine.in_room {
            assert_eq!(self.count(|action| matches!(action, Action::Leave)), 1);
            self = self.ended(at, EndReason::Left);
        }
        assert_eq!(self.count(|action| matches!(action, Action::DeleteRoom)), 1);
        assert_eq!(
            self.count(|action| matches!(action, Action::Emit(ProbeEvent::OutcomeDecided { .. }))),
            1
        );
        assert_eq!(self.join_decisions().len(), 1);
        let gone = Deletion::Deleted { at: self.time(at) };
        let script = self.feed(at, Input::Deleted(gone));
        assert!(script.machine.is_over());
        assert_eq!(script.machine.next_deadline(), None);
        script.machine.into_report()
    }

    fn reason(self, at: u64) -> Reason {
        reason_of(&self.report(at))
    }
}

fn reason_of(report: &ProbeReport) -> Reason {
    match &report.outcome {
        Outcome::Failed(failure) => failure.reason,
        other => panic!("not failed but {other:?}"),
    }
}

fn millis(duration: Option<Duration>) -> Option<u128> {
    duration.map(|duration| duration.as_millis())
}

const MINUTE: u64 = 60_000;

// From start to end.

#[test]
fn probe_whose_agent_joins_and_speaks_is_ok_when_the_hold_is_over() {
    let script = MachineScript::new(explicit())
        .with_agent()
        .speech(700, 2_000);
    let script = script.echo(3_000, 4_300).speech(5_000, 6_000);
    let script = script.wait(MINUTE);
    assert!(!script.is_decided());
    let report = script
        .hold(MINUTE, MINUTE + 5_000)
        .wait(MINUTE + 5_000)
        .report(MINUTE + 5_010);
    assert_eq!(report.outcome, Outcome::Ok);
    assert_eq!(millis(report.timeline.span(Span::AgentJoin)), Some(399));
    assert_eq!(millis(report.timeline.span(Span::FirstSpeech)), Some(599));
    assert_eq!(
        report
            .turns
            .iter()
            .map(Turn::reply_delay)
            .map(millis)
            .collect::<Vec<_>>(),
        [Some(700)]
    );
    assert_eq!(report.room_sid.as_deref(), Some("RM_1"));
    assert_eq!(report.timeline.marks().count(), 13);
}

#[test]
fn explicit_dispatch_waits_until_media_is_up_and_the_echo_published() {
    let dispatches =
        |script: &MachineScript| script.count(|action| matches!(action, Action::Dispatch));
    let script = MachineScript::new(explicit())
        .created(10, Ok(()))
        .signal(40);
    let script = script.see(60, RoomEventKind::CallerPublished);
    assert_eq!(dispatches(&script), 0);
    let script = script.see(90, OVER_UDP);
    assert_eq!(dispatches(&script), 1);
}

#[test]
fn automatic_dispatch_creates_no_room_and_is_sent_with_the_signal_request() {
    let script = MachineScript::new(automatic());
    assert_eq!(
        script.count(|action| matches!(action, Action::CreateRoom)),
        0
    );
    let script = script
        .see(12, RoomEventKind::SignalRequested)
        .signal(40)
        .joined(300)
        .up(350);
    assert_eq!(script.count(|action| matches!(action, Action::Dispatch)), 0);
    let report = script
        .hold(400, 0)
        .track(400)
        .speech(500, 800)
        .wait(900)
        .report(910);
    assert_eq!(report.outcome, Outcome::Ok);
    assert_eq!(millis(report.timeline.span(Span::AgentJoin)), Some(288));
    assert_eq!(millis(report.timeline.span(Span::Signal)), Some(40));
    assert!(!report.join_upper_bound);
}

#[test]
fn dispatch_by_room_is_sent_and_accepted_with_create_room() {
    let script = MachineScript::new(named(DispatchMode::Room))
        .way_in()
        .joined(300);
    assert_eq!(script.count(|action| matches!(action, Action::Dispatch)), 0);
    let script = script.hold(400, 0).track(400).speech(500, 800).wait(900);
    let report = script.report(910);
    assert_eq!(report.outcome, Outcome::Ok);
    // CreateRoom was sent at 1 and answered at 10.
    assert_eq!(millis(report.timeline.span(Span::Dispatch)), Some(9));
    assert_eq!(millis(report.timeline.span(Span::AgentJoin)), Some(299));
    assert!(!report.join_upper_bound);
}

#[test]
fn dispatch_by_token_creates_no_room_and_is_accepted_with_the_join_response() {
    let script = MachineScript::new(named(DispatchMode::Token));
    let script = script
        .see(12, RoomEventKind::SignalRequested)
        .signal(40)
        .up(100);
    assert_eq!(
        script.count(|action| matches!(action, Action::CreateRoom | Action::Dispatch)),
        0
    );
    let script = script.joined(300).hold(400, 0).track(400);
    let report = script.speech(500, 800).wait(900).report(910);
    assert_eq!(report.outcome, Outcome::Ok);
    assert_eq!(millis(report.timeline.span(Span::Dispatch)), Some(28));
    assert_eq!(millis(report.timeline.span(Span::AgentJoin)), Some(288));
    assert_eq!(report.timeline.get(Milestone::RoomCreated), None);
}

#[test]
fn room_that_could_not_be_created_has_a_dispatch_time() {
    let script = MachineScript::new(named(DispatchMode::Room));
    let report = script
        .created(5_000, Err(ApiError::Timeout(Duration::from_secs(5))))
        .report(5_010);
    assert_eq!(reason_of(&report), Reason::RoomCreateFailed);
    assert!(report.timeline.get(Milestone::DispatchSent).is_some());
    assert_eq!(report.timeline.get(Milestone::DispatchAccepted), None);
}

#[test]
fn join_deadline_of_dispatch_by_room_counts_from_create_room_once_media_is_up() {
    let late = |up| {
        MachineScript::new(named(DispatchMode::Room))
            .created(20_000, Ok(()))
            .signal(26_000)
            .wait(up)
            .up(up)
    };
    let script = late(27_000).wait(30_000);
    assert!(script.join_decisions().is_empty());
    assert_eq!(script.wait(30_001).join_decisions(), [false]);
    // Media came up after the deadline. The agent is judged only then, and at once.
    let script = late(35_000);
    assert!(script.join_decisions().is_empty());
    let script = script.wait(35_000);
    assert_eq!(script.join_decisions(), [false]);
    let script = script.listed(35_010, Ok(dispatches("support", Some("JS_RUNNING"))));
    assert_eq!(script.reason(35_020), Reason::AgentNoShow);
}

// Events in any order.

#[test]
fn agent_that_joins_before_dispatch_returns_still_has_a_join_delay() {
    let script = MachineScript::new(explicit()).way_in().joined(300);
    assert_eq!(script.join_decisions(), [true]);
    let script = script.track(320).speech(400, 900).hold(900, 0);
    let script = script.wait(2_000);
    assert!(!script.is_decided(), "the dispatch call is outstanding");
    let report = script
        .dispatched(101, 2_000, Ok(()))
        .wait(2_000)
        .report(2_100);
    assert_eq!(report.outcome, Outcome::Ok);
    assert_eq!(millis(report.timeline.span(Span::AgentJoin)), Some(199));
}

#[test]
fn join_that_the_server_reports_late_does_not_lengthen_the_join_delay() {
    let script = MachineScript::new(explicit())
        .way_in()
        .dispatched(101, 110, Ok(()));
    let script = script.stamped(600, 2_900, false);
    let script = script.track(2_900).speech(3_000, 3_500).hold(3_500, 0);
    let report = script.wait(3_500).report(3_600);
    assert_eq!(millis(report.timeline.span(Span::AgentJoin)), Some(499));
    let notes = report.evidence.notes.join("\n");
    assert!(notes.contains("2.300 s after it had joined"), "{notes}");
}

#[test]
fn stamp_from_before_the_dispatch_or_after_the_first_sight_is_ignored() {
    for (stamp, delay) in [(90, 499), (700, 499)] {
        let script = MachineScript::new(explicit())
            .way_in()
            .dispatched(101, 110, Ok(()));
        let script = script.stamped(stamp, 600, false).track(610);
        let script = script.speech(700, 900).hold(900, 0).wait(900);
        let span = script.report(1_000).timeline.span(Span::AgentJoin);
        assert_eq!(millis(span), Some(delay), "stamp {stamp}");
    }
}

#[test]
fn audio_before_the_track_event_counts_as_a_track() {
    let script = MachineScript::new(explicit()).waiting().joined(500);
    let script = script.see(510, RoomEventKind::AgentFirstAudio).wait(15_000);
    assert!(!script.is_decided());
    let script = script.speech(16_000, 17_000).hold(17_000, 0).wait(17_000);
    assert_eq!(script.report(17_001).outcome, Outcome::Ok);
}

#[test]
fn agent_in_the_join_response_is_an_upper_bound_unless_it_is_dispatched_later() {
    for (target, bound) in [
        (explicit(), false),
        (named(DispatchMode::Room), true),
        (named(DispatchMode::Token), true),
        (automatic(), true),
    ] {
        let script = MachineScript::new(target).created(10, Ok(())).signal(40);
        let script = script.stamped(20, 40, true);
        let seen = script.time(40);
        let report = script.feed(50, Input::Abort).report(60);
        assert_eq!(report.join_upper_bound, bound);
        assert_eq!(report.timeline.get(Milestone::AgentJoined), Some(seen));
    }
}

#[test]
fn agent_that_was_there_before_its_dispatch_has_no_join_delay() {
    let script = MachineScript::new(explicit())
        .created(10, Ok(()))
        .signal(40)
        .joined(50)
        .up(100);
    let script = script.dispatched(101, 110, Ok(())).feed(200, Input::Abort);
    let report = script.report(210);
    assert_eq!(report.timeline.span(Span::AgentJoin), None);
    let notes = report.evidence.notes.join("; ");
    assert!(notes.contains("before it was dispatched"), "{notes}");
}

#[test]
fn deadline_before_an_event_expires_first_even_if_it_is_read_later() {
    // The track's deadline (10.5 s) passed before the track came (11 s), but the timer was late.
    let script = MachineScript::new(explicit())
        .waiting()
        .joined(500)
        .track(11_000);
    let script = script.listed(11_001, Ok(Vec::new()));
    assert_eq!(script.reason(11_010), Reason::AgentNoTrack);
}

#[test]
fn event_before_the_deadline_counts_even_if_it_is_read_later() {
    let script = MachineScript::new(explicit()).waiting();
    let event = RoomEvent {
        at: script.time(30_100),
        kind: RoomEventKind::AgentJoined {
            agent: agent(),
            in_join_response: false,
        },
    };
    let script = script.feed(30_200, Input::Room(event)).wait(30_300);
    assert_eq!(script.join_decisions(), [true]);
    assert!(!script.is_decided());
}

// Verdicts on the agent.

#[test]
fn no_agent_and_no_job_is_dispatch_unanswered() {
    let script = MachineScript::new(explicit()).waiting().wait(30_101);
    assert_eq!(script.join_decisions(), [false]);
    assert_eq!(
        script.count(|action| matches!(action, Action::ListRoom { .. })),
        1
    );
    assert!(!script.is_decided());
    let report = script
        .listed(30_110, Ok(dispatches("support", None)))
        .report(30_120);
    assert_eq!(reason_of(&report), Reason::DispatchUnanswered);
    assert_eq!(report.evidence.step, Some("agent_join"));
    assert_eq!(report.evidence.deadline_seconds, Some(30.0));
    assert_eq!(
        report.evidence.dispatches,
        Some(vec!["AD_1 for agent \"support\": no job".to_owned()])
    );
}

#[test]
fn no_agent_but_an_accepted_job_is_agent_no_show() {
    let script = MachineScript::new(explicit()).waiting().wait(30_101);
    let report = script
        .listed(30_110, Ok(dispatches("support", Some("JS_RUNNING"))))
        .report(30_120);
    assert_eq!(reason_of(&report), Reason::AgentNoShow);
    let Outcome::Failed(failure) = &report.outcome else {
        unreachable!()
    };
    assert!(
        failure.detail.contains("AJ_1 JS_RUNNING"),
        "{}",
        failure.detail
    );
}

#[test]
fn job_of_another_agent_does_not_make_a_no_show() {
    let script = MachineScript::new(explicit()).waiting().wait(30_101);
    let script = script.listed(30_110, Ok(dispatches("", Some("JS_RUNNING"))));
    assert_eq!(script.reason(30_120), Reason::DispatchUnanswered);
}

#[test]
fn detail_distinguishes_an_unlisted_dispatch_from_one_without_a_job() {
    let detail = |mode, listed| {
        let script = MachineScript::new(named(mode));
        let script = match mode {
            DispatchMode::Explicit => script.waiting(),
            DispatchMode::Room => script.way_in(),
            _ => script
                .see(20, RoomEventKind::SignalRequested)
                .signal(40)
                .up(100),
        };
        let script = script.wait(30_101);
        let report = script.listed(30_110, Ok(listed)).report(30_120);
        assert_eq!(reason_of(&report), Reason::DispatchUnanswered);
        match report.outcome {
            Outcome::Failed(failure) => failure.detail,
            other => panic!("{other:?}"),
        }
    };
    for (mode, which) in [
        (DispatchMode::Room, "the agent that CreateRoom names"),
        (DispatchMode::Token, "the agent that a token names"),
    ] {
        let detail = detail(mode, dispatches("", None));
        assert!(detail.contains("lists no dispatch"), "{detail}");
        assert!(detail.contains(which), "{detail}");
    }
    for mode in [
        DispatchMode::Explicit,
        DispatchMode::Room,
        DispatchMode::Token,
    ] {
        let detail = detail(mode, dispatches("support", None));
        assert!(detail.contains("lists no accepted job"), "{detail}");
    }
}

#[test]
fn automatic_dispatch_takes_any_job() {
    let script = MachineScript::new(automatic())
        .see(10, RoomEventKind::SignalRequested)
        .signal(40)
        .up(100);
    let script = script.wait(30_009);
    assert_eq!(script.join_decisions(), [] as [bool; 0]);
    let script = script.wait(30_010);
    let script = script.listed(30_020, Ok(dispatches("", Some("JS_RUNNING"))));
    assert_eq!(script.reason(30_030), Reason::AgentNoShow);
}

#[test]
fn agent_name_is_the_first_check_only_if_no_agent_ever_joined_under_it() {
    for (agent_known, first) in [
        (false, "that a worker registered as exactly \"support\""),
        (true, "that the worker of \"support\" is connected"),
    ] {
        let script = MachineScript::with_agent_known(explicit(), agent_known).waiting();
        let script = script.wait(30_101).listed(30_110, Ok(Vec::new()));
        let report = script.report(30_120);
        let Outcome::Failed(failure) = &report.outcome else {
            unreachable!()
        };
        let check = format!("Check first {first}");
        assert!(failure.detail.contains(&check), "{}", failure.detail);
    }
}

#[test]
fn detail_names_another_agent_that_joined() {
    for (name, words) in [
        (Some("suport"), "another agent came: \"suport\")"),
        (None, "another agent came: one without a name)"),
    ] {
        let stray = RoomEventKind::OtherJoined {
            identity: "agent-x".to_owned(),
            kind: "AGENT".to_owned(),
            agent_name: name.map(str::to_owned),
        };
        let script = MachineScript::new(explicit()).waiting().see(400, stray);
        let script = script.wait(30_101).listed(30_110, Ok(Vec::new()));
        let report = script.report(30_120);
        let failure = report.outcome.failure().unwrap();
        assert!(failure.detail.contains(words), "{}", failure.detail);
        assert_eq!(report.evidence.participants.len(), 1);
    }
}

#[test]
fn late_agent_changes_no_verdict_but_is_evidence() {
    let script = MachineScript::new(explicit())
        .waiting()
        .wait(30_101)
        .joined(30_105)
        .see(30_106, RoomEventKind::AgentConnected);
    let script = script.listed(30_110, Ok(Vec::new()));
    assert_eq!(script.join_decisions(), [false]);
    assert_eq!(
        script.count(|action| matches!(action, Action::AgentsConnected(true))),
        1
    );
    let report = script.report(30_120);
    assert_eq!(reason_of(&report), Reason::DispatchUnanswered);
    assert_eq!(report.timeline.get(Milestone::AgentJoined), None);
    assert_eq!(report.billed(), Some(Duration::from_mins(1)));
    let notes = report.evidence.notes.join("; ");
    assert!(
        notes.contains("joined 30.004 s after the dispatch, too late"),
        "{notes}"
    );
}

fn losses_of_sight(script: &MachineScript) -> usize {
    script.count(|action| matches!(action, Action::LostSight))
}

#[test]
fn room_is_watched_after_its_deletion_if_its_agent_was_cut_off_or_the_canary_was() {
    let ok = || {
        MachineScript::new(explicit())
            .waiting()
            .joined(400)
            .see(500, RoomEventKind::AgentConnected)
    };
    let end = |reason: EndReason| RoomEventKind::Ended {
        reason,
        audio: AudioStats::default(),
    };
    let removed = |reason: &str| {
        end(EndReason::Removed {
            reason: reason.to_owned(),
        })
    };
    let left = |reason: &str| RoomEventKind::AgentLeft {
        reason: reason.to_owned(),
    };
    assert_eq!(losses_of_sight(&ok()), 0);
    for cut_off in [
        end(EndReason::Signal(SignalError::Closed("reset".to_owned()))),
        removed("DUPLICATE_IDENTITY"),
        removed("ROOM_DELETED"),
        left("CONNECTION_TIMEOUT"),
        left(""),
    ] {
        let script = ok().see(600, cut_off);
        assert!(losses_of_sight(&script) > 0);
    }
    // A silent agent may be cut off.
    let script = MachineScript::new(explicit()).waiting().joined(400);
    let script = script.wait(60_000).listed(60_010, Ok(Vec::new()));
    assert!(losses_of_sight(&script) > 0);
}

#[test]
fn refused_list_dispatch_is_noted_and_does_not_change_the_verdict() {
    let script = MachineScript::new(explicit()).waiting().wait(30_101);
    let error = ApiError::Refused(refusal(500, Some("internal"), "oops"));
    let report = script.listed(30_110, Err(error)).report(30_120);
    assert_eq!(reason_of(&report), Reason::DispatchUnanswered);
    assert_eq!(report.evidence.dispatches, None);
    let Outcome::Failed(failure) = &report.outcome else {
        unreachable!()
    };
    assert!(
        failure.detail.contains("LiveKit did not report"),
        "{}",
        failure.detail
    );
    let notes = report.evidence.notes.join("; ");
    assert!(
        notes.contains("ListDispatch failed: refused with HTTP 500"),
        "{notes}"
    );
}

#[test]
fn server_that_went_silent_is_blamed_before_the_agent() {
    for silence in [
        ApiError::Timeout(Duration::from_secs(5)),
        ApiError::Refused(refusal(
            503,
            Some("unavailable"),
            "no response from servers",
        )),
    ] {
        assert_silent_server_is_blamed(&silence);
    }
}

fn assert_silent_server_is_blamed(silence: &ApiError) {
    let silence = || Err(silence.clone());
    let script = MachineScript::new(explicit())
        .waiting()
        .wait(30_101)
        .listed(35_101, silence());
    assert!(!script.is_decided());
    let script = script.ended(42_000, ping_timeout());
    assert_eq!(script.reason(42_001), Reason::SignalLost);

    let script = MachineScript::new(explicit())
        .waiting()
        .wait(30_101)
        .listed(35_101, silence());
    let script = script.wait(50_100);
    assert!(!script.is_decided());
    assert_eq!(
        script.wait(50_101).reason(50_110),
        Reason::DispatchUnanswered
    );
}

#[test]
fn removal_during_the_final_check_does_not_change_the_verdict() {
    let script = MachineScript::new(explicit()).waiting().wait(30_101);
    let reason = "ROOM_DELETED".to_owned();
    let script = script.ended(30_105, EndReason::Removed { reason });
    assert_eq!(script.reason(30_110), Reason::DispatchUnanswered);
}

#[test]
fn agent_without_a_track_is_agent_no_track() {
    let script = MachineScript::new(explicit())
        .waiting()
        .joined(500)
        .wait(10_500);
    let report = script
        .listed(10_510, Ok(dispatches("support", Some("JS_RUNNING"))))
        .report(10_520);
    assert_eq!(reason_of(&report), Reason::AgentNoTrack);
    assert!(report.timeline.span(Span::AgentJoin).is_some());
}

fn session(identity: &str, event: SessionEvent) -> RoomEventKind {
    RoomEventKind::Session {
        identity: identity.to_owned(),
        event,
    }
}

fn agent_error(identity: &str, message: &str) -> RoomEventKind {
    session(identity, SessionEvent::Error(message.to_owned()))
}

#[test]
fn silence_after_an_inference_limit_is_a_plan_limit() {
    let agent = agent().identity;
    for (identity, message, expected) in [
        (
            agent.as_str(),
            "inference_quota_exceeded",
            Reason::PlanLimit(LimitKind::Inference),
        ),
        (
            agent.as_str(),
            "LLM failed, status_code=429",
            Reason::PlanLimit(LimitKind::Inference),
        ),
        (
            agent.as_str(),
            "the provider said 429.",
            Reason::PlanLimit(LimitKind::Inference),
        ),
        (
            agent.as_str(),
            "request 4290 timed out, timestamp=1795540886.429 error=Broken()",
            Reason::AgentSilent,
        ),
        (
            "agent-of-another-name",
            "status_code=429",
            Reason::AgentSilent,
        ),
    ] {
        let script = MachineScript::new(explicit())
            .waiting()
            .joined(500)
            .track(520);
        let script = script.see(700, agent_error(identity, message));
        let script = script.wait(20_500).listed(20_510, Ok(Vec::new()));
        let report = script.report(20_520);
        assert_eq!(reason_of(&report), expected, "{message}");
        let note = format!("the agent reported an error: {message}");
        assert_eq!(report.evidence.notes.contains(&note), identity == agent);
    }
}

#[test]
fn only_the_agents_own_turn_metrics_are_evidence_up_to_a_bound() {
    let agent = agent().identity;
    let mut script = MachineScript::new(explicit())
        .waiting()
        .joined(500)
        .track(520);
    for (identity, turns) in [("agent-of-another-name", 1), (agent.as_str(), 50)] {
        for turn in 0..turns {
            let metrics = TurnMetrics {
                transcription_delay_seconds: Some(0.25),
                ..TurnMetrics::none(Speaker::Caller)
            };
            let message = SessionEvent::Message(SessionMessage {
                speaker: Speaker::Caller,
                text: TranscriptText::new("Hello"),
                interrupted: false,
                metrics: Some(metrics),
            });
            script = script.see(600 + turn, session(identity, message));
        }
    }
    let script = script.wait(20_500).listed(20_510, Ok(Vec::new()));
    let report = script.report(20_520);
    let entries = &report.evidence.agent_metrics;
    assert_eq!(entries.len(), MAX_ENTRIES);
    assert!((entries[0].at - 0.6).abs() < 1e-9, "{}", entries[0].at);
    assert_eq!(report.transcript, None);
}

#[test]
fn error_that_the_agent_recovers_from_is_only_evidence() {
    let agent = agent().identity;
    let script = MachineScript::new(explicit())
        .waiting()
        .joined(500)
        .track(520);
    let script = script
        .see(700, agent_error(&agent, "status_code=429, retryable=True"))
        .see(900, RoomEventKind::SpeechStarted)
        .hold(950, 1_000);
    let report = script.wait(1_000).report(1_010);
    assert_eq!(report.outcome, Outcome::Ok);
    let notes = report.evidence.notes.join("\n");
    assert!(
        notes.contains("reported an error: status_code=429"),
        "{notes}"
    );
}

#[test]
fn agent_without_speech_is_agent_silent_and_the_detail_says_whether_packets_came() {
    for (audio, words) in [
        (true, "but no speech in them"),
        (false, "no audio packet arrived"),
    ] {
        let mut script = MachineScript::new(explicit())
            .waiting()
            .joined(500)
            .track(520);
        if audio {
            script = script.see(540, RoomEventKind::AgentFirstAudio);
        }
        let script = script.wait(20_500).listed(20_510, Ok(Vec::new()));
        let report = script.report(20_520);
        assert_eq!(reason_of(&report), Reason::AgentSilent);
        let failure = report.outcome.failure().unwrap();
        assert!(failure.detail.contains(words), "{}", failure.detail);
    }
}

#[test]
fn detail_of_a_silent_agent_that_joined_first_notes_that_it_may_have_spoken() {
    let script = MachineScript::new(named(DispatchMode::Token))
        .see(10, RoomEventKind::SignalRequested)
        .signal(40)
        .stamped(20, 40, true)
        .up(300)
        .track(320)
        .wait(20_300)
        .listed(20_310, Ok(Vec::new()));
    let report = script.report(20_320);
    let failure = report.outcome.failure().unwrap();
    assert_eq!(failure.reason, Reason::AgentSilent);
    assert!(failure.detail.contains("may have spoken before"));
}

#[test]
fn revoked_permission_is_removed_and_not_blamed_on_the_agent() {
    for (right, words) in [
        (MediaPermission::Publish, "right to publish"),
        (MediaPermission::Subscribe, "right to subscribe"),
    ] {
        let script = MachineScript::new(explicit()).waiting().joined(500);
        let report = script.ended(600, EndReason::Revoked(right)).report(620);
        assert_eq!(reason_of(&report), Reason::Removed);
        let failure = report.outcome.failure().unwrap();
        assert!(failure.detail.contains(words), "{}", failure.detail);
    }
}

#[test]
fn deadlines_of_the_agent_start_once_the_canarys_media_is_up() {
    let script = MachineScript::new(automatic())
        .see(10, RoomEventKind::SignalRequested)
        .signal(40);
    let script = script.joined(100).up(9_000).wait(18_999);
    assert!(matches!(script.machine.phase, Phase::Watching));
    let script = script.wait(19_000).listed(19_010, Ok(Vec::new()));
    assert_eq!(script.reason(19_020), Reason::AgentNoTrack);
}

#[test]
fn agent_is_not_judged_before_the_canarys_media_is_up() {
    let mut target = automatic();
    target.deadlines.join = Duration::from_secs(5);
    let script = MachineScript::new(target)
        .see(10, RoomEventKind::SignalRequested)
        .signal(40)
        .see(50, RoomEventKind::CallerPublished)
        .wait(15_040);
    assert_eq!(script.reason(15_050), Reason::MediaFailed);
}

#[test]
fn path_that_is_not_udp_is_noted_and_the_last_report_of_the_connections_is_evidence() {
    let connection = |round_trip_seconds| MediaConnection {
        connection: "publisher",
        path: MediaPath::RelayTls,
        via: Some("turn.example.com:443".to_owned()),
        round_trip_seconds,
    };
    let seen = |round_trip| RoomEventKind::MediaConnections(vec![connection(round_trip)]);
    let path = Some(MediaPath::RelayTls);
    let report = MachineScript::new(explicit())
        .created(10, Ok(()))
        .signal(40)
        .see(90, RoomEventKind::MediaConnected { path })
        .see(90, RoomEventKind::UdpBlocked)
        .see(
            91,
            RoomEventKind::MediaNote("TURN/UDP a:1 failed".to_owned()),
        )
        .see(92, seen(None))
        .see(95, seen(Some(0.041)))
        .wait(15_040)
        .report(15_050);
    let notes = &report.evidence.notes;
    let blocked = "media runs over a TURN server over TLS because UDP does not get through";
    assert!(
        notes.iter().any(|note| note.starts_with(blocked)),
        "{notes:?}"
    );
    assert!(
        notes.contains(&"TURN/UDP a:1 failed".to_owned()),
        "{notes:?}"
    );
    assert_eq!(report.evidence.media, [connection(Some(0.041))]);
}

#[test]
fn media_failure_notes_the_addresses_that_the_server_named() {
    let address = |text: &str| RoomEventKind::MediaAddress(text.to_owned());
    let way_in = || {
        MachineScript::new(explicit())
            .created(10, Ok(()))
            .signal(40)
    };
    let addressed = way_in()
        .see(50, address("UDP 192.0.2.1:7882"))
        .see(50, RoomEventKind::CallerPublished)
        .see(60, address("TCP 192.0.2.1:7881"))
        .wait(15_040);
    let report = addressed.report(15_050);
    let expected = "LiveKit expects media at UDP 192.0.2.1:7882, TCP 192.0.2.1:7881".to_owned();
    assert!(report.evidence.notes.contains(&expected), "{report:?}");
    let unaddressed = way_in()
        .see(50, RoomEventKind::CallerPublished)
        .wait(15_040);
    let report = unaddressed.report(15_050);
    let none = "LiveKit named no address for media".to_owned();
    assert!(report.evidence.notes.contains(&none), "{report:?}");
}

#[test]
fn missing_reply_is_a_failure_only_if_one_is_expected() {
    for (reply, expected) in [(true, Some(Reason::AgentNoReply)), (false, None)] {
        let script = MachineScript::new(expecting(reply, AgentMayLeave::Never)).with_agent();
        let script = script
            .hold(600, 15_000)
            .speech(700, 2_000)
            .echo(3_000, 4_300);
        let script = script.wait(24_300);
        let report = if reply {
            script.listed(24_310, Ok(Vec::new())).report(24_320)
        } else {
            script.report(24_320)
        };
        match expected {
            Some(reason) => assert_eq!(reason_of(&report), reason),
            None => assert_eq!(report.outcome, Outcome::Ok),
        }
    }
}

#[test]
fn probe_waits_past_the_hold_for_an_expected_reply() {
    let script = MachineScript::new(expecting(true, AgentMayLeave::Never)).with_agent();
    let script = script
        .hold(600, 1_000)
        .speech(700, 2_000)
        .echo(3_000, 4_300)
        .wait(20_000);
    assert!(!script.is_decided());
    // The reply is heard to its end, and its evidence is waited for.
    let script = script.speech(21_000, 22_000).wait(23_999);
    assert!(!script.is_decided());
    assert_eq!(script.wait(24_000).report(24_010).outcome, Outcome::Ok);
}

#[test]
fn reply_after_overlap_counts_as_a_reply_but_has_no_delay() {
    let script = MachineScript::new(expecting(true, AgentMayLeave::Never)).with_agent();
    let script = script.hold(600, 1_000).speech(700, 2_000);
    let script = script
        .see(3_000, RoomEventKind::CallerStarted(CallerTurn::default()))
        .speech(3_500, 3_900)
        .see(4_300, RoomEventKind::CallerEnded { sent: 100 });
    let script = script.speech(6_000, 7_000).wait(9_000);
    let report = script.report(9_010);
    assert_eq!(report.outcome, Outcome::Ok);
    assert!(report.turns[0].overlap);
    assert_eq!(report.turns[0].reply_delay(), None);
}

#[test]
fn caller_that_never_speaks_is_internal() {
    let script = MachineScript::new(expecting(true, AgentMayLeave::Never)).with_agent();
    // 30 s for a busy agent, and 10 s more.
    let script = script.speech(700, 2_000).wait(41_999);
    assert!(!script.is_decided());
    assert_eq!(script.wait(42_000).reason(42_010), Reason::Internal);
}

#[test]
fn agent_that_never_pauses_gives_no_reply() {
    let script = MachineScript::new(expecting(true, AgentMayLeave::Never)).with_agent();
    let script = script
        .speech(700, 20_000)
        .see(20_900, RoomEventKind::SpeechStarted);
    let script = script.wait(30_699);
    assert!(!script.is_decided());
    let script = script.wait(30_700).listed(30_710, Ok(Vec::new()));
    assert_eq!(script.reason(30_720), Reason::AgentNoReply);
}

#[test]
fn long_greeting_still_gets_its_echo_and_reply() {
    let mut target = expecting(true, AgentMayLeave::Never);
    target.deadlines.agent_turn = Duration::from_mins(2);
    let script = MachineScript::new(target).with_agent();
    let script = script
        .hold(600, 1_000)
        .speech(700, 100_000)
        .echo(101_000, 131_000);
    let script = script.wait(140_000).speech(141_000, 142_000).wait(144_000);
    assert_eq!(script.report(144_010).outcome, Outcome::Ok);
}

#[test]
fn second_agent_is_agent_duplicate() {
    let identity = "agent-2".to_owned();
    let script = MachineScript::new(explicit())
        .with_agent()
        .see(900, RoomEventKind::AgentDuplicate { identity })
        .see(905, RoomEventKind::AgentConnected);
    assert_eq!(
        script.count(|action| matches!(action, Action::AgentsConnected(false))),
        2
    );
    let report = script.report(910);
    assert_eq!(reason_of(&report), Reason::AgentDuplicate);
    assert_eq!(report.billed(), Some(Duration::from_mins(2)));
}

#[test]
fn second_agent_after_the_verdict_is_billed_too() {
    let identity = "agent-2".to_owned();
    let script = MachineScript::new(explicit())
        .with_agent()
        .feed(900, Input::Abort)
        .see(910, RoomEventKind::AgentDuplicate { identity });
    let report = script.report(920);
    assert_eq!(report.outcome, Outcome::Aborted);
    assert_eq!(report.billed(), Some(Duration::from_mins(2)));
}

#[test]
fn agent_may_leave_when_its_target_allows() {
    use AgentMayLeave::{AfterReply, AfterSpeech, Never};
    // After its join, its speech, its answer: whether it is early to leave then.
    let table = [
        (Never, false, [true, true, true]),
        (AfterSpeech, false, [true, false, false]),
        (AfterReply, false, [true, true, false]),
        (AfterSpeech, true, [true, true, false]),
        (AfterReply, true, [true, true, false]),
    ];
    for (may_leave, reply, early) in table {
        for (stage, early) in early.into_iter().enumerate() {
            let mut script = MachineScript::new(expecting(reply, may_leave)).with_agent();
            if stage >= 1 {
                script = script.speech(700, 2_000);
            }
            if stage >= 2 {
                script = script.echo(3_000, 4_300).speech(5_000, 6_000);
            }
            let report = script
                .left(7_000, "CLIENT_INITIATED")
                .wait(7_000)
                .report(7_010);
            let case = format!("{may_leave:?}, reply {reply}, stage {stage}");
            if early {
                assert_eq!(reason_of(&report), Reason::AgentLeftEarly, "{case}");
                let Outcome::Failed(failure) = &report.outcome else {
                    unreachable!()
                };
                assert!(
                    failure
                        .detail
                        .contains("(CLIENT_INITIATED) 6.500 s after its join"),
                    "{}",
                    failure.detail
                );
            } else {
                assert_eq!(report.outcome, Outcome::Ok, "{case}");
            }
        }
    }
}

#[test]
fn agent_that_leaves_before_the_canarys_media_is_up_is_judged_afterwards() {
    let way_in = || {
        MachineScript::new(automatic())
            .see(10, RoomEventKind::SignalRequested)
            .signal(40)
            .see(50, RoomEventKind::CallerPublished)
            .joined(60)
            .left(80, "AGENT_ERROR")
    };
    assert!(!way_in().is_decided());
    assert_eq!(way_in().up(100).reason(110), Reason::AgentLeftEarly);
    assert_eq!(way_in().wait(15_040).reason(15_050), Reason::MediaFailed);
}

#[test]
fn agent_that_left_with_the_room_or_the_server_is_not_blamed() {
    for (why, reason) in [
        ("ROOM_DELETED", Reason::Removed),
        ("PARTICIPANT_REMOVED", Reason::Removed),
        ("SERVER_SHUTDOWN", Reason::SignalLost),
        ("CONNECTION_TIMEOUT", Reason::AgentLeftEarly),
        ("", Reason::AgentLeftEarly),
    ] {
        let script = MachineScript::new(explicit()).with_agent().left(900, why);
        assert_eq!(script.reason(910), reason, "{why}");
    }
}

// The hold.

#[test]
fn hold_that_is_over_before_the_agent_spoke_waits_for_speech_or_its_deadline() {
    let script = MachineScript::new(explicit())
        .with_agent()
        .hold(600, 1_000)
        .wait(20_499);
    assert!(!script.is_decided());
    let spoke = script
        .see(20_500, RoomEventKind::SpeechStarted)
        .wait(20_500);
    assert_eq!(spoke.report(20_510).outcome, Outcome::Ok);

    let script = MachineScript::new(explicit())
        .with_agent()
        .hold(600, 1_000)
        .wait(20_500);
    assert_eq!(
        script.listed(20_510, Ok(Vec::new())).reason(20_520),
        Reason::AgentSilent
    );
}

#[test]
fn voice_that_the_agents_state_contradicts_is_noted() {
    let notes = |script: MachineScript| script.report(60_000).evidence.notes.join("; ");
    let state = |script: MachineScript, at, state: &str| {
        script.see(at, RoomEventKind::AgentState(state.to_owned()))
    };
    let heard = || {
        let script = MachineScript::new(explicit()).with_agent();
        script.speech(900, 2_000).hold(2_100, 5_000)
    };
    let contradiction = "never reported that it speaks";

    // It reports no states at all.
    assert!(!notes(heard().wait(5_000)).contains("voice"));
    let listening = state(heard(), 2_200, "listening");
    assert!(notes(listening.wait(5_000)).contains(contradiction));
    let speaking = state(state(heard(), 2_200, "speaking"), 2_200, "listening");
    assert!(!notes(speaking.wait(5_000)).contains("voice"));
}

#[test]
fn speech_that_only_the_agents_state_shows_is_noted() {
    let claims = |until: u64| {
        let script = MachineScript::new(explicit()).with_agent();
        let script = script.see(1_000, RoomEventKind::AgentState("speaking".to_owned()));
        let script = script.see(until, RoomEventKind::AgentState("listening".to_owned()));
        let report = script
            .wait(30_000)
            .listed(30_010, Ok(Vec::new()))
            .report(30_020);
        assert_eq!(reason_of(&report), Reason::AgentSilent);
        report.evidence.notes.join("; ")
    };
    assert!(claims(3_500).contains("spoke for 2.5 s, but the canary heard 0.0 s of speech"));
    assert!(!claims(1_900).contains("0.0 s of speech"));
    // Half of what it says is too quiet.
    let state = |state: &str| RoomEventKind::AgentState(state.to_owned());
    let quiet = MachineScript::new(explicit())
        .with_agent()
        .see(700, state("speaking"))
        .speech(2_000, 3_000)
        .see(5_000, state("listening"))
        .hold(5_100, 5_200)
        .wait(5_200);
    let notes = quiet.report(5_210).evidence.notes.join("\n");
    assert!(
        notes.contains("spoke for 4.3 s, but the canary heard 1.0 s of speech"),
        "{notes}"
    );
}

#[test]
fn level_of_the_speech_is_evidence() {
    let script = MachineScript::new(explicit())
        .with_agent()
        .speech(900, 2_000);
    let script = script.see(2_000, RoomEventKind::SpeechLevel(-21.3512));
    let report = script.hold(2_100, 5_000).wait(5_000).report(5_000);
    assert_eq!(report.evidence.speech_level_dbfs, Some(-21.4));
}

#[test]
fn hold_can_be_set_late_and_moved() {
    let script = MachineScript::new(explicit())
        .with_agent()
        .speech(700, 900)
        .wait(10 * MINUTE);
    assert!(!script.is_decided());
    let script = script.hold(10 * MINUTE, 20 * MINUTE).wait(15 * MINUTE);
    assert!(!script.is_decided());
    let script = script.hold(15 * MINUTE, 5 * MINUTE).wait(15 * MINUTE);
    assert_eq!(script.report(15 * MINUTE).outcome, Outcome::Ok);
}

#[test]
fn failure_during_the_hold_is_found() {
    let script = MachineScript::new(explicit())
        .with_agent()
        .speech(700, 900)
        .hold(900, 30_000);
    let script = script.wait(20_000).left(20_000, "CONNECTION_TIMEOUT");
    assert_eq!(script.reason(20_010), Reason::AgentLeftEarly);
}

// The canary's way in, LiveKit and the network.

fn assert_reasons(table: impl IntoIterator<Item = (MachineScript, Reason, Option<&'static str>)>) {
    for (row, (script, reason, step)) in table.into_iter().enumerate() {
        let report = script.report(MINUTE);
        assert_eq!(reason_of(&report), reason, "row {row}");
        assert_eq!(report.evidence.step, step, "row {row}");
    }
}

#[test]
fn failed_call_or_join_has_the_reason_of_its_step() {
    let dns = || ConnectError::Dns {
        host: "nowhere.invalid".to_owned(),
        error: "no such host".to_owned(),
    };
    let timeout = || Err(ApiError::Timeout(Duration::from_secs(10)));
    let create = |result| MachineScript::new(explicit()).created(10, result);
    let dispatch = |result| {
        MachineScript::new(explicit())
            .way_in()
            .dispatched(101, 9_000, result)
    };
    let join = |error: SignalError| create(Ok(())).ended(30, EndReason::Signal(error));
    let turned_away = SignalError::LeftBeforeJoin {
        reason: "JOIN_FAILURE".to_owned(),
    };
    assert_reasons([
        (
            create(Err(dns().into())),
            Reason::Unreachable,
            Some("create_room"),
        ),
        (
            create(timeout()),
            Reason::RoomCreateFailed,
            Some("create_room"),
        ),
        (
            dispatch(timeout()),
            Reason::DispatchFailed,
            Some("dispatch"),
        ),
        (join(dns().into()), Reason::Unreachable, Some("signal")),
        (
            join(SignalError::Closed("reset".to_owned())),
            Reason::SignalFailed,
            Some("signal"),
        ),
        (
            join(turned_away),
            Reason::PlanLimit(LimitKind::Room),
            Some("signal"),
        ),
    ]);
}

#[test]
fn slow_step_of_the_canary_has_its_reason() {
    let created = || MachineScript::new(explicit()).created(10, Ok(()));
    assert_reasons([
        (created().wait(12_010), Reason::SignalFailed, Some("signal")),
        (
            created()
                .signal(40)
                .see(60, RoomEventKind::CallerPublished)
                .wait(15_040),
            Reason::MediaFailed,
            Some("media"),
        ),
        // Nothing was answered, so the network is not at fault.
        (
            created().signal(40).wait(15_040),
            Reason::PublishFailed,
            Some("publish"),
        ),
        (
            created().signal(40).see(60, OVER_UDP).wait(15_040),
            Reason::PublishFailed,
            Some("publish"),
        ),
        (
            MachineScript::new(explicit()).way_in().wait(30_100),
            Reason::DispatchFailed,
            Some("dispatch"),
        ),
    ]);
}

#[test]
fn participant_that_ends_has_the_reason_of_its_end() {
    let ended = |why| MachineScript::new(explicit()).with_agent().ended(900, why);
    let lost = |error| ended(EndReason::Signal(error));
    let removed = |reason: &str| {
        ended(EndReason::Removed {
            reason: reason.to_owned(),
        })
    };
    let media = EndReason::MediaFailed {
        transport: "subscriber",
        detail: "ICE disconnected".to_owned(),
    };
    let panicked = Input::Panicked("a panic".to_owned());
    assert_reasons(vec![
        (ended(ping_timeout()), Reason::SignalLost, Some("signal")),
        (
            lost(SignalError::Closed("reset".to_owned())),
            Reason::SignalLost,
            Some("signal"),
        ),
        (
            lost(SignalError::Protocol("too large".to_owned())),
            Reason::SignalLost,
            Some("signal"),
        ),
        (removed("ROOM_DELETED"), Reason::Removed, None),
        (removed("DUPLICATE_IDENTITY"), Reason::Removed, None),
        (removed("SERVER_SHUTDOWN"), Reason::SignalLost, None),
        (removed("CONNECTION_TIMEOUT"), Reason::MediaFailed, None),
        (
            ended(EndReason::PublishFailed("refused".to_owned())),
            Reason::PublishFailed,
            Some("publish"),
        ),
        (ended(media), Reason::MediaFailed, Some("media")),
        (
            ended(EndReason::Internal("a panic".to_owned())),
            Reason::Internal,
            None,
        ),
        (ended(EndReason::Left), Reason::Internal, None),
        (
            MachineScript::new(explicit())
                .with_agent()
                .feed(900, panicked),
            Reason::Internal,
            None,
        ),
    ]);
}

#[test]
fn first_terminal_event_decides() {
    let script = MachineScript::new(explicit())
        .with_agent()
        .left(900, "CLIENT_INITIATED");
    let script = script.feed(905, Input::Abort).ended(910, ping_timeout());
    assert_eq!(script.reason(920), Reason::AgentLeftEarly);
}

// The end.

#[test]
fn abort_ends_every_phase_at_once_and_is_no_failure() {
    let phases = [
        MachineScript::new(automatic()),
        MachineScript::new(explicit()).created(10, Ok(())),
        MachineScript::new(explicit())
            .created(10, Ok(()))
            .signal(40),
        MachineScript::new(explicit()).waiting(),
        MachineScript::new(explicit()).waiting().wait(30_101),
        MachineScript::new(explicit()).with_agent(),
        MachineScript::new(explicit()).with_agent().speech(700, 900),
    ];
    for script in phases {
        let report = script.feed(31_000, Input::Abort).report(31_010);
        assert_eq!(report.outcome, Outcome::Aborted);
        assert!(report.timeline.get(Milestone::Left).is_some());
        assert!(report.timeline.get(Milestone::RoomDeleted).is_some());
    }
}

#[test]
fn room_is_not_deleted_while_a_call_could_recreate_it() {
    let deletes =
        |script: &MachineScript| script.count(|action| matches!(action, Action::DeleteRoom));
    let script = MachineScript::new(explicit()).feed(5, Input::Abort);
    assert!(script.is_decided());
    assert_eq!(deletes(&script), 0);
    let script = script.created(20, Ok(()));
    assert_eq!(script.count(|action| matches!(action, Action::Join)), 0);
    assert_eq!(script.report(30).outcome, Outcome::Aborted);

    let script = MachineScript::new(explicit())
        .way_in()
        .feed(105, Input::Abort)
        .ended(110, EndReason::Left);
    assert_eq!(deletes(&script), 0);
    let script = script.dispatched(101, 120, Ok(()));
    assert_eq!(
        script.count(|action| matches!(action, Action::RecordDispatch(_))),
        1
    );
    assert_eq!(script.report(130).outcome, Outcome::Aborted);
}

#[test]
fn room_is_deleted_if_leaving_takes_too_long() {
    let script = MachineScript::new(explicit())
        .with_agent()
        .feed(1_000, Input::Abort)
        .wait(10_999);
    assert_eq!(
        script.count(|action| matches!(action, Action::DeleteRoom)),
        0
    );
    let script = script.wait(11_000);
    assert_eq!(
        script.count(|action| matches!(action, Action::DeleteRoom)),
        1
    );
    let why = "no answer".to_owned();
    let script = script.feed(12_000, Input::Deleted(Deletion::NotDeleted { why }));
    assert!(script.machine.is_over());
    let report = script.machine.into_report();
    assert_eq!(report.timeline.get(Milestone::RoomDeleted), None);
    let notes = report.evidence.notes.join("; ");
    assert!(notes.contains("not deleted: no answer"), "{notes}");
}

#[test]
fn probe_emits_each_milestone_once_and_no_more_events_than_promised() {
    let script = MachineScript::new(explicit())
        .with_agent()
        .joined(600)
        .speech(700, 900)
        .speech(950, 990);
    let script = script.see(995, RoomEventKind::AgentState("listening".to_owned()));
    let script = script
        .hold(1_000, 0)
        .wait(1_000)
        .ended(1_010, EndReason::Left);
    let gone = Deletion::Deleted {
        at: script.time(1_020),
    };
    let script = script.feed(1_020, Input::Deleted(gone));
    let emitted = script.count(|action| matches!(action, Action::Emit(_)));
    // No turn, and no interruption.
    assert_eq!(emitted, ProbeEvent::max_per_probe(0) - 1);
}

#[test]
fn evidence_is_bounded_in_a_crowded_room() {
    let mut script = MachineScript::new(explicit()).waiting();
    for guest in 0..1_000 {
        script = script.see(
            200,
            RoomEventKind::OtherJoined {
                identity: format!("guest-{guest}"),
                kind: "STANDARD".to_owned(),
                agent_name: Some(format!("name-{guest}")),
            },
        );
    }
    let report = script.feed(300, Input::Abort).report(310);
    assert_eq!(report.evidence.participants.len(), MAX_ENTRIES);
}

/// Any events in any order with any stamps: one outcome, one deletion, and an end.
#[test]
fn any_order_of_events_ends_in_one_outcome() {
    for seed in 0..20_000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut target = match random.u8(..6) {
            0 => automatic(),
            3 => named(DispatchMode::Room),
            4 => named(DispatchMode::Token),
            1 => expecting(true, AgentMayLeave::AfterReply),
            2 => expecting(random.bool(), AgentMayLeave::AfterSpeech),
            _ => explicit(),
        };
        if random.u8(..4) == 0 {
            target.caller.mode = crate::config::CallerMode::PassThrough;
        }
        let mut script = MachineScript::new(target);
        let mut at = 0;
        for _ in 0..random.usize(..40) {
            at += random.u64(..4_000);
            let input = random_input(&mut random, &script, at);
            script = script.feed(at, input);
            if random.bool() {
                script = script.wait(at);
            }
        }
        at = finish(&mut script, at);
        assert!(script.machine.is_over(), "seed {seed} still runs at {at}");
        let decided = script
            .count(|action| matches!(action, Action::Emit(ProbeEvent::OutcomeDecided { .. })));
        let deleted = script.count(|action| matches!(action, Action::DeleteRoom));
        assert_eq!(
            (decided, deleted, script.join_decisions().len()),
            (1, 1, 1),
            "seed {seed}"
        );
        let emitted = script.count(|action| matches!(action, Action::Emit(_)));
        assert!(emitted <= ProbeEvent::max_per_probe(1), "seed {seed}");
    }
}

fn random_input(random: &mut fastrand::Rng, script: &MachineScript, at: u64) -> Input {
    let stamp = script.time(at.saturating_sub(random.u64(..2_000)));
    let call_ok = random.u8(..8) != 0;
    let error = || ApiError::Timeout(Duration::from_secs(10));
    let seen = match random.u8(..24) {
        0 => {
            return Input::Created(Call {
                sent_at: Some(stamp),
                answered_at: stamp,
                result: if call_ok {
                    Ok(RoomInfo { sid: String::new() })
                } else {
                    Err(error())
                },
            });
        }
        1 => {
            return Input::Dispatched(Call {
                sent_at: Some(stamp),
                answered_at: stamp,
                result: if call_ok {
                    Ok("AD_1".to_owned())
                } else {
                    Err(error())
                },
            });
        }
        2 => {
            let dispatches = Call {
                sent_at: Some(stamp),
                answered_at: stamp,
                result: if call_ok {
                    Ok(dispatches("support", random.bool().then_some("JS_RUNNING")))
                } else {
                    Err(error())
                },
            };
            if random.bool() {
                return Input::JobsListed(dispatches);
            }
            return Input::Listed(ListedRoom {
                dispatches,
                participants: None,
            });
        }
        3 => return Input::HoldUntil(random.bool().then_some(stamp)),
        4 if random.u8(..8) == 0 => return Input::Abort,
        5 if random.u8(..8) == 0 => return Input::Panicked(String::new()),
        6 if random.u8(..4) == 0 => RoomEventKind::Ended {
            reason: match random.u8(..5) {
                0 => EndReason::Left,
                1 => ping_timeout(),
                2 => EndReason::Removed {
                    reason: "ROOM_DELETED".to_owned(),
                },
                3 => EndReason::PublishFailed(String::new()),
                _ => EndReason::Internal(String::new()),
            },
            audio: AudioStats::default(),
        },
        7 => RoomEventKind::SignalRequested,
        8 | 9 => RoomEventKind::SignalConnected {
            room_sid: String::new(),
            server_version: String::new(),
            region: String::new(),
            node: String::new(),
        },
        10 | 11 => OVER_UDP,
        12 | 13 => RoomEventKind::CallerPublished,
        14 => RoomEventKind::AgentJoined {
            agent: agent(),
            in_join_response: random.bool(),
        },
        15 if random.bool() => RoomEventKind::AgentState("listening".to_owned()),
        15 => RoomEventKind::AgentConnected,
        16 => RoomEventKind::AgentTrackSubscribed,
        17 => RoomEventKind::AgentFirstAudio,
        18 => RoomEventKind::SpeechStarted,
        19 => RoomEventKind::SpeechEnded,
        20 => RoomEventKind::CallerStarted(CallerTurn {
            line: None,
            interrupts: random.bool(),
        }),
        21 => RoomEventKind::CallerEnded { sent: 100 },
        22 if random.bool() => RoomEventKind::AgentLeft {
            reason: String::new(),
        },
        23 if random.bool() => RoomEventKind::AgentDuplicate {
            identity: String::new(),
        },
        _ => RoomEventKind::OtherJoined {
            identity: String::new(),
            kind: String::new(),
            agent_name: None,
        },
    };
    Input::Room(RoomEvent {
        at: stamp,
        kind: seen,
    })
}

/// Answers the outstanding calls, as the driver does, and lets every deadline pass.
fn finish(script: &mut MachineScript, mut at: u64) -> u64 {
    for _ in 0..50 {
        at += 10_000;
        let stamp = script.time(at);
        let mut inputs = vec![Input::HoldUntil(Some(stamp)), Input::DeadlinePassed];
        if script.machine.creating {
            inputs.push(Input::Created(Call {
                sent_at: None,
                answered_at: stamp,
                result: Err(ApiError::Broken(String::new())),
            }));
        }
        if matches!(script.machine.dispatch, DispatchCall::UnderWay { .. }) {
            inputs.push(Input::Dispatched(Call {
                sent_at: None,
                answered_at: stamp,
                result: Ok(String::new()),
            }));
        }
        if script.machine.phase == Phase::Deleting {
            inputs.push(Input::Deleted(Deletion::Deleted { at: stamp }));
        }
        for input in inputs {
            script.actions.extend(script.machine.on(input, stamp));
        }
    }
    at
}

// An agent that ends the call.

#[test]
fn call_that_the_agent_may_end_is_ok_however_it_ends() {
    let spoke = || {
        let script = MachineScript::new(expecting(false, AgentMayLeave::AfterSpeech));
        script.with_agent().speech(600, 2_600).hold(2_600, 60_000)
    };
    for reason in ["ROOM_DELETED", "ROOM_CLOSED", "PARTICIPANT_REMOVED"] {
        let reason = reason.to_owned();
        let script = spoke().ended(5_000, EndReason::Removed { reason });
        let report = script.wait(5_000).report(5_010);
        assert_eq!(report.outcome, Outcome::Ok);
        let notes = report.evidence.notes.join("\n");
        assert!(notes.contains("allowed to end it"), "{notes}");
    }
    let disconnects = [
        "CLIENT_INITIATED",
        "ROOM_DELETED",
        "ROOM_CLOSED",
        "PARTICIPANT_REMOVED",
        "CONNECTION_TIMEOUT",
        "UNKNOWN_REASON",
    ];
    for reason in disconnects {
        let report = spoke().left(5_000, reason).wait(5_000).report(5_010);
        assert_eq!(report.outcome, Outcome::Ok, "{reason}");
        let noted = report.evidence.notes.join("\n").contains(reason);
        let by_the_room = ["ROOM_DELETED", "ROOM_CLOSED", "PARTICIPANT_REMOVED"];
        assert_eq!(noted, by_the_room.contains(&reason), "{reason}");
    }
}

#[test]
fn deleted_room_is_removed_before_the_agent_may_end_the_call() {
    let deleted = || EndReason::Removed {
        reason: "ROOM_DELETED".to_owned(),
    };
    let never = MachineScript::new(explicit()).with_agent();
    let never = never.speech(600, 2_600).ended(5_000, deleted());
    assert_eq!(never.reason(5_010), Reason::Removed);
    let after_reply = MachineScript::new(expecting(true, AgentMayLeave::AfterReply));
    let unanswered = after_reply.with_agent().speech(600, 2_600);
    let unanswered = unanswered.echo(3_000, 5_000).ended(6_000, deleted());
    assert_eq!(unanswered.reason(6_010), Reason::Removed);
    let silent = MachineScript::new(expecting(false, AgentMayLeave::AfterSpeech));
    let silent = silent.with_agent().ended(5_000, deleted());
    assert_eq!(silent.reason(5_010), Reason::Removed);
    // A server that ends is no agent that ends the call.
    let shut_down = MachineScript::new(expecting(false, AgentMayLeave::AfterSpeech));
    let shut_down = shut_down.with_agent().speech(600, 2_600);
    let reason = "SERVER_SHUTDOWN".to_owned();
    let shut_down = shut_down.ended(5_000, EndReason::Removed { reason });
    assert_eq!(shut_down.reason(5_010), Reason::SignalLost);
}

#[test]
fn call_that_ends_before_the_dispatch_response_waits_for_it() {
    let script = MachineScript::new(expecting(false, AgentMayLeave::AfterSpeech));
    let script = script.way_in().joined(300).track(320).speech(400, 900);
    let reason = "ROOM_DELETED".to_owned();
    let script = script
        .ended(1_000, EndReason::Removed { reason })
        .wait(1_500);
    assert!(!script.is_decided(), "the dispatch call is outstanding");
    let report = script
        .dispatched(101, 2_000, Ok(()))
        .wait(2_000)
        .report(2_100);
    assert_eq!(report.outcome, Outcome::Ok);
}

// Tracks.

fn remote_track(sid: &str, muted: bool) -> RemoteTrackInfo {
    RemoteTrackInfo {
        sid: sid.to_owned(),
        identity: "agent-1".to_owned(),
        kind: "AUDIO",
        source: "UNKNOWN",
        name: "voice".to_owned(),
        muted,
        encryption: "GCM",
    }
}

#[test]
fn encrypted_agent_is_a_wrong_setting_and_no_failure_of_the_agent() {
    let script = MachineScript::new(explicit()).waiting().joined(500);
    let script = script.see(520, RoomEventKind::AgentEncrypted("GCM"));
    let report = script.report(530);
    assert_eq!(reason_of(&report), Reason::ConfigRejected);
    let failure = report.outcome.failure().unwrap();
    assert!(failure.detail.contains("encrypted (GCM)"), "{failure:?}");
}

#[test]
fn tracks_are_evidence_as_they_were_at_last() {
    let seen = |muted| RoomEventKind::TrackChanged(remote_track("TR_1", muted));
    let script = MachineScript::new(explicit()).with_agent();
    let script = script.see(540, seen(false)).see(550, seen(true));
    let mut script = script.feed(600, Input::Abort);
    for number in 2..100 {
        let track = remote_track(&format!("TR_{number}"), false);
        script = script.see(700, RoomEventKind::TrackChanged(track));
    }
    let tracks = script.report(800).evidence.tracks;
    assert_eq!(tracks.len(), MAX_ENTRIES);
    assert_eq!(
        tracks[0],
        "agent-1: AUDIO from UNKNOWN \"voice\", muted, encrypted (GCM)"
    );
}

#[test]
fn voice_of_an_unusual_source_is_noted() {
    let script = MachineScript::new(explicit()).waiting().joined(500);
    let script = script.see(510, RoomEventKind::AgentVoiceSource("UNKNOWN"));
    let script = script.track(520).speech(600, 900).hold(900, 0).wait(900);
    let report = script.report(910);
    assert_eq!(report.outcome, Outcome::Ok);
    let notes = report.evidence.notes.join("\n");
    assert!(notes.contains("a track of source UNKNOWN"), "{notes}");
}

#[test]
fn failed_subscription_reaches_the_verdict() {
    let published = || {
        let mut track = remote_track("TR_1", false);
        track.encryption = "NONE";
        let script = MachineScript::new(explicit()).waiting().joined(500);
        script.see(510, RoomEventKind::TrackChanged(track))
    };
    for (error, reason) in [
        ("SE_CODEC_UNSUPPORTED", Reason::ConfigRejected),
        ("SE_TRACK_NOTFOUND", Reason::AgentNoTrack),
        (NOT_PERMITTED, Reason::AgentNoTrack),
    ] {
        let failed = |sid: &str| RoomEventKind::SubscriptionFailed {
            track_sid: sid.to_owned(),
            error,
        };
        let script = published().see(520, failed("TR_1")).wait(10_500);
        let report = script.listed(10_510, Ok(Vec::new())).report(10_520);
        assert_eq!(reason_of(&report), reason);
        let detail = &report.outcome.failure().unwrap().detail;
        assert!(detail.contains(&format!("TR_1 ({error})")), "{detail}");
        // That of another track explains nothing.
        let script = published().see(520, failed("TR_other")).wait(10_500);
        let report = script.listed(10_510, Ok(Vec::new())).report(10_520);
        assert_eq!(reason_of(&report), Reason::AgentNoTrack);
        let detail = &report.outcome.failure().unwrap().detail;
        assert!(detail.contains("published no audio track"), "{detail}");
        assert!(report.evidence.notes.join("").contains("TR_other"));
    }
}

#[test]
fn second_room_of_the_same_name_is_not_the_agents_fault() {
    let in_room = |sid: &str| {
        let connected = RoomEventKind::SignalConnected {
            room_sid: sid.to_owned(),
            server_version: "1.13.5".to_owned(),
            region: String::new(),
            node: "ND_2".to_owned(),
        };
        let script = MachineScript::new(explicit()).created(10, Ok(()));
        let script = script.see(40, connected).up(90);
        script.dispatched(101, 110, Ok(()))
    };
    let absent = |script: MachineScript| {
        let job = Ok(dispatches("support", Some("JS_RUNNING")));
        script.wait(30_101).listed(30_110, job).report(30_120)
    };
    let report = absent(in_room("RM_2"));
    assert_eq!(reason_of(&report), Reason::SignalFailed);
    let detail = &report.outcome.failure().unwrap().detail;
    let both = "CreateRoom returned RM_1, and the canary joined RM_2";
    assert!(detail.contains(both), "{detail}");
    // LiveKit Cloud may send the id after the join response.
    for sid in ["RM_1", ""] {
        assert_eq!(reason_of(&absent(in_room(sid))), Reason::AgentNoShow);
    }
    // An agent that joins shows that there is one room.
    let silent = in_room("RM_2").joined(500).track(520).wait(20_500);
    let report = silent.listed(20_510, Ok(Vec::new())).report(20_520);
    assert_eq!(reason_of(&report), Reason::AgentSilent);
}

#[test]
fn hidden_agent_is_no_missing_agent() {
    let brief = |identity: &str, hidden, name: &str| ParticipantBrief {
        identity: identity.to_owned(),
        kind: "AGENT".to_owned(),
        hidden,
        attributes: [("lk.agent_name".to_owned(), name.to_owned())].into(),
        joined_at_ms: 0,
    };
    let verdict = |present: ParticipantBrief| {
        let script = MachineScript::new(explicit()).waiting().wait(30_101);
        let at = script.time(30_110);
        let (sent_at, answered_at) = (Some(at), at);
        let listed = ListedRoom {
            dispatches: Call {
                sent_at,
                answered_at,
                result: Ok(dispatches("support", Some("JS_RUNNING"))),
            },
            participants: Some(Call {
                sent_at,
                answered_at,
                result: Ok(vec![present]),
            }),
        };
        script.feed(30_110, Input::Listed(listed)).report(30_120)
    };
    for present in [
        brief("agent-x", true, "support"),
        brief("agent-AJ_1", true, ""),
    ] {
        let report = verdict(present);
        assert_eq!(reason_of(&report), Reason::AgentNoTrack);
        let detail = &report.outcome.failure().unwrap().detail;
        assert!(detail.contains("hidden participant"), "{detail}");
        assert_eq!(report.timeline.get(Milestone::AgentJoined), None);
        assert_eq!(report.other_agents, 1);
    }
    for present in [
        brief("agent-AJ_1", false, "support"),
        brief("agent-y", true, "billing"),
    ] {
        assert_eq!(reason_of(&verdict(present)), Reason::AgentNoShow);
    }
}

// The circumstances.

impl MachineScript {
    fn jobs_listed(self, at: u64, result: Result<Vec<DispatchInfo>, ApiError>) -> Self {
        let call = Call {
            sent_at: Some(self.time(at)),
            answered_at: self.time(at),
            result,
        };
        self.feed(at, Input::JobsListed(call))
    }

    fn job_lists(&self) -> usize {
        self.count(|action| matches!(action, Action::ListJobs))
    }

    /// Speaks, and ends the room at once.
    fn spoken(self, at: u64) -> Self {
        self.track(at)
            .speech(at, at + 400)
            .hold(at, 0)
            .wait(at + 500)
    }
}

/// A dispatch of the target's agent, whose jobs these agents and workers have.
fn jobs(of: &[(&str, &str)]) -> Vec<DispatchInfo> {
    let mut all = dispatches("support", Some("JS_RUNNING"));
    let template = all[0].jobs.remove(0);
    let of = of.iter().map(|(identity, worker)| JobInfo {
        identity: (*identity).to_owned(),
        worker: (*worker).to_owned(),
        ..template.clone()
    });
    all[0].jobs.extend(of);
    all
}

#[test]
fn worker_is_asked_for_after_the_agents_join_and_recorded() {
    for mode in [
        DispatchMode::Explicit,
        DispatchMode::Room,
        DispatchMode::Token,
        DispatchMode::Automatic,
    ] {
        let mut target = named(mode);
        if mode == DispatchMode::Automatic {
            target.agent_name = None;
        }
        let script = MachineScript::new(target).created(10, Ok(())).signal(40);
        let script = script.up(100).dispatched(101, 110, Ok(()));
        assert_eq!(script.job_lists(), 0);
        let script = script.joined(500);
        assert_eq!(script.job_lists(), 1);
        let script = script.jobs_listed(520, Ok(jobs(&[("agent-1", "AW_7")])));
        let script = script.spoken(600);
        assert_eq!(script.job_lists(), 1);
        let report = script.report(1_110);
        assert_eq!(report.outcome, Outcome::Ok);
        assert_eq!(report.circumstances.worker.as_deref(), Some("AW_7"));
    }
}

#[test]
fn worker_that_is_listed_late_is_asked_for_again_and_not_forever() {
    let script = MachineScript::new(explicit())
        .with_agent()
        .speech(700, 1_000);
    let script = script.jobs_listed(560, Ok(jobs(&[]))).wait(2_559);
    assert_eq!(script.job_lists(), 1);
    let script = script.wait(2_560);
    assert_eq!(script.job_lists(), 2);
    let found = script.jobs_listed(2_570, Ok(jobs(&[("agent-1", "AW_7")])));
    let found = found.hold(9_000, 0).wait(9_000);
    assert_eq!(found.job_lists(), 2);
    let worker = found.report(9_010).circumstances.worker;
    assert_eq!(worker.as_deref(), Some("AW_7"));

    let mut script = MachineScript::new(explicit())
        .with_agent()
        .speech(700, 1_000);
    for at in [560, 3_100, 6_000, 9_000] {
        script = script.jobs_listed(at, Ok(jobs(&[]))).wait(at + 2_500);
    }
    assert_eq!(script.job_lists(), 3);
    assert!(!script.is_decided());
    let script = MachineScript::new(explicit())
        .with_agent()
        .speech(700, 1_000);
    let refused = ApiError::Refused(refusal(403, None, "no"));
    let script = script.jobs_listed(560, Err(refused)).wait(9_000);
    assert_eq!(script.job_lists(), 1);
}

#[test]
fn agent_that_joins_before_the_canary_is_ready_has_its_worker_asked_for_later() {
    let early = MachineScript::new(named(DispatchMode::Room))
        .created(10, Ok(()))
        .signal(40)
        .joined(50);
    assert_eq!(early.job_lists(), 0);
    assert_eq!(early.up(100).job_lists(), 1);
    // CreateDispatch has not returned yet.
    let script = MachineScript::new(explicit()).way_in().joined(300);
    assert_eq!(script.job_lists(), 0);
    assert_eq!(script.dispatched(101, 310, Ok(())).job_lists(), 1);
}

#[test]
fn list_of_jobs_that_fails_or_hangs_changes_no_verdict_and_holds_no_room_open() {
    let failed = || ApiError::Timeout(Duration::from_secs(10));
    let ends = |script: MachineScript| {
        let report = script.spoken(600).report(1_110);
        assert_eq!(report.outcome, Outcome::Ok);
        assert_eq!(report.circumstances.worker, None);
        report.evidence.notes.join("; ")
    };
    let hangs = MachineScript::new(explicit()).with_agent();
    assert!(!ends(hangs).contains("worker"));
    let script = MachineScript::new(explicit()).with_agent();
    let notes = ends(script.jobs_listed(560, Err(failed())));
    let why = "the agent's worker is unknown, because ListDispatch failed";
    assert!(notes.contains(why), "{notes}");
    let refused = ApiError::Refused(refusal(503, Some("unavailable"), "no response"));
    let script = MachineScript::new(explicit()).with_agent();
    // The room is being deleted.
    let script = script.spoken(600).jobs_listed(1_101, Err(refused));
    let notes = script.report(1_110).evidence.notes.join("; ");
    assert!(!notes.contains("worker"), "{notes}");
}

#[test]
fn answer_about_jobs_is_no_answer_to_the_final_check() {
    let script = MachineScript::new(explicit()).with_agent().wait(20_500);
    let script = script.jobs_listed(20_501, Ok(jobs(&[("agent-1", "AW_7")])));
    assert!(!script.is_decided());
    let report = script.listed(20_510, Ok(Vec::new())).report(20_520);
    assert_eq!(reason_of(&report), Reason::AgentSilent);
    assert_eq!(report.circumstances.worker.as_deref(), Some("AW_7"));
}

#[test]
fn answer_after_the_verdict_still_names_the_worker() {
    let script = MachineScript::new(explicit()).with_agent();
    let script = script.left(540, "CLIENT_INITIATED");
    assert!(script.is_decided());
    let report = script
        .jobs_listed(545, Ok(jobs(&[("agent-1", "AW_7")])))
        .report(560);
    assert_eq!(reason_of(&report), Reason::AgentLeftEarly);
    assert_eq!(report.circumstances.worker.as_deref(), Some("AW_7"));
}

#[test]
fn worker_is_the_one_of_the_agents_own_job_and_never_a_guess() {
    let worker = |listed| {
        let script = MachineScript::new(explicit()).with_agent();
        let script = script.jobs_listed(560, Ok(listed)).spoken(600);
        script.report(1_110).circumstances.worker
    };
    let two = jobs(&[("agent-2", "AW_1"), ("agent-1", "AW_2")]);
    assert_eq!(worker(two).as_deref(), Some("AW_2"));
    let unnamed = jobs(&[("", "AW_1"), ("", "AW_1")]);
    assert_eq!(worker(unnamed).as_deref(), Some("AW_1"));
    for unknown in [
        jobs(&[]),
        jobs(&[("agent-1", "")]),
        jobs(&[("agent-2", "AW_1")]),
        jobs(&[("", "AW_1"), ("", "AW_2")]),
        with_unnamed(Vec::new()),
    ] {
        assert_eq!(worker(unknown), None);
    }
}

#[test]
fn worker_of_an_agent_that_never_joined_comes_from_the_final_check() {
    let script = MachineScript::new(explicit()).waiting().wait(30_101);
    let script = script.listed(30_110, Ok(dispatches("support", Some("JS_RUNNING"))));
    assert_eq!(script.job_lists(), 0);
    let report = script.report(30_120);
    assert_eq!(reason_of(&report), Reason::AgentNoShow);
    assert_eq!(report.circumstances.worker.as_deref(), Some("AW_1"));
}

#[test]
fn node_region_media_path_and_version_are_recorded_unless_they_are_empty() {
    let circumstances = |region: &str, node: &str, path, version: Option<&str>| {
        let joined = RoomEventKind::SignalConnected {
            room_sid: "RM_1".to_owned(),
            server_version: "1.13.5".to_owned(),
            region: region.to_owned(),
            node: node.to_owned(),
        };
        let script = MachineScript::new(explicit())
            .created(10, Ok(()))
            .see(40, joined);
        let script = script
            .see(90, RoomEventKind::MediaConnected { path })
            .see(100, RoomEventKind::CallerPublished)
            .dispatched(101, 110, Ok(()))
            .joined(500);
        let script = match version {
            Some(version) => script.see(510, RoomEventKind::AgentVersion(version.to_owned())),
            None => script,
        };
        script.spoken(600).report(1_110).circumstances
    };
    let known = circumstances("eu", "ND_1", Some(MediaPath::Tcp), Some("1.4.0"));
    let expected = Circumstances {
        node: Some("ND_1".to_owned()),
        region: Some("eu".to_owned()),
        worker: None,
        media_path: Some(MediaPath::Tcp),
        agent_version: Some("1.4.0".to_owned()),
    };
    assert_eq!(known, expected);
    assert_eq!(circumstances("", "", None, None), Circumstances::default());
}

// Agents without a name.

impl MachineScript {
    /// `waiting`; an agent without a name attribute joined at 500.
    fn with_nameless_agent(self) -> Self {
        let joined = RoomEventKind::OtherJoined {
            identity: "agent-AJ_1".to_owned(),
            kind: "AGENT".to_owned(),
            agent_name: None,
        };
        let identity = "agent-AJ_1".to_owned();
        self.waiting()
            .see(500, joined)
            .see(500, RoomEventKind::NamelessAgent { identity })
            .wait(500)
    }

    fn adopted(&self) -> usize {
        self.count(|action| matches!(action, Action::Adopt(identity) if identity == "agent-AJ_1"))
    }

    fn lists(&self) -> usize {
        self.count(|action| matches!(action, Action::ListRoom { .. }))
    }
}

fn with_unnamed(mut all: Vec<DispatchInfo>) -> Vec<DispatchInfo> {
    all.extend(dispatches("", None));
    all
}

#[test]
fn agent_without_a_name_is_recognised_by_its_job() {
    let script = MachineScript::new(explicit()).with_nameless_agent();
    assert_eq!(script.lists(), 1);
    // LiveKit may list the job late. Its own dispatch of an unnamed agent could have sent this one.
    let script = script.listed(510, Ok(with_unnamed(dispatches("support", None))));
    assert_eq!(script.adopted(), 0);
    let script = script.wait(2_500);
    assert_eq!(script.lists(), 2);
    let listed = with_unnamed(dispatches("support", Some("JS_RUNNING")));
    let script = script.listed(2_510, Ok(listed));
    assert_eq!(script.adopted(), 1);
    let joined = RoomEventKind::AgentJoined {
        agent: Agent {
            name: None,
            ..agent()
        },
        in_join_response: false,
    };
    let script = script.see(2_520, joined).track(2_520);
    let script = script.speech(2_600, 3_000).hold(3_000, 0).wait(3_000);
    let report = script.report(3_010);
    assert_eq!(report.outcome, Outcome::Ok);
    let notes = report.evidence.notes.join("\n");
    assert!(notes.contains("recognised by its job"), "{notes}");
}

#[test]
fn only_agent_of_the_only_dispatch_is_the_agent() {
    let script = MachineScript::new(named(DispatchMode::Room)).way_in();
    let joined = RoomEventKind::OtherJoined {
        identity: "agent-AJ_1".to_owned(),
        kind: "AGENT".to_owned(),
        agent_name: None,
    };
    let identity = "agent-AJ_1".to_owned();
    let script = script.see(500, joined);
    let script = script.see(500, RoomEventKind::NamelessAgent { identity });
    let script = script
        .wait(500)
        .listed(510, Ok(dispatches("support", None)));
    assert_eq!(script.adopted(), 1);
}

#[test]
fn job_of_another_dispatch_is_no_proof() {
    let billing = dispatches("billing", Some("JS_RUNNING"));
    let unnamed = dispatches("", Some("JS_RUNNING"));
    for other in [billing, unnamed] {
        let all: Vec<_> = dispatches("support", None)
            .into_iter()
            .chain(other)
            .collect();
        let script = MachineScript::new(explicit()).with_nameless_agent();
        let script = script.listed(510, Ok(all.clone())).wait(30_101);
        let script = script.listed(30_110, Ok(all));
        assert_eq!(script.adopted(), 0);
        let report = script.report(30_120);
        assert_eq!(reason_of(&report), Reason::DispatchUnanswered);
        let detail = &report.outcome.failure().unwrap().detail;
        assert!(detail.contains("one without a name"), "{detail}");
    }
}

#[test]
fn agent_without_a_name_that_is_recognised_at_the_deadline_still_counts() {
    let script = MachineScript::new(explicit()).with_nameless_agent();
    let script = script.wait(30_101);
    let listed = with_unnamed(dispatches("support", Some("JS_RUNNING")));
    let script = script.listed(30_110, Ok(listed));
    assert_eq!(script.adopted(), 1);
    assert!(!script.is_decided());
    // The engine that does not find it any more reports nothing.
    let script = script.wait(33_000);
    let script = script.listed(33_010, Ok(dispatches("support", Some("JS_RUNNING"))));
    assert_eq!(script.reason(33_020), Reason::AgentNoShow);
}

mod conversation;
