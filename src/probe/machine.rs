//! The state machine of one probe: answers, room events and deadlines in, actions out. No I/O, no clock of its own.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use super::transcript::Transcript;
use super::turns::Turns;
use super::verdict::{Step, names_inference_limit, quote};
use super::{AgentTurn, Failure, Milestone, Outcome, Position, ProbeEvent, ProbeReport, Reason};
use crate::config::{AgentMayLeave, DispatchFacts, DispatchRequest, Target};
use crate::janitor::Deletion;
use crate::livekit::RoomName;
use crate::livekit::event::{
    Agent, AudioStats, EndReason, MediaPermission, RoomEvent, RoomEventKind, TurnMetrics,
    to_microseconds,
};
use crate::livekit::wire::api::{ApiError, Call, DispatchInfo, RoomInfo};

/// The engine's own deadline for signal comes first, for it knows more; this much later ours does.
const ENGINE_GRACE: Duration = Duration::from_secs(2);

/// Longest time after which a server that froze is known to be: one ping interval and the ping timeout.
const SIGNAL_SILENCE: Duration = Duration::from_secs(20);

/// Longest time from the end of the agent's speech to the end of its echo, besides the delay, and longest play of one
/// that has begun: 30 s are recorded. An echo that takes longer is a fault of ours.
const ECHO_LONGEST: Duration = Duration::from_secs(40);

/// How long the agent may talk, where its answer to an echo is expected, without a pause that lets the echo begin.
const TALK_LONGEST: Duration = Duration::from_mins(2);

/// The kind of participant that agents are, as LiveKit names it.
const AGENT: &str = "AGENT";

/// From how much on the server's news of a join was late enough to be worth a note.
const LATE_NEWS: Duration = Duration::from_millis(500);

/// Most entries of each list in the evidence: a crowded room must not grow a report without bound.
const MOST_KEPT: usize = 20;

/// From the agent's join, the longest that its room stays open for a verdict, whatever the hold; cleaning up comes on
/// top. What a room can cost rests on it.
pub fn longest_verdict(target: &Target) -> Duration {
    let deadlines = &target.deadlines;
    let reply = if target.expect.reply {
        TALK_LONGEST + target.echo.delay + ECHO_LONGEST + deadlines.reply
    } else {
        Duration::ZERO
    };
    deadlines.speech + reply + SIGNAL_SILENCE
}

/// What the driver feeds in.
#[derive(Debug)]
pub(super) enum Input {
    /// The first one.
    Start,
    Created(Call<RoomInfo>),
    Dispatched(Call<String>),
    Listed(Call<Vec<DispatchInfo>>),
    Room(RoomEvent),
    /// `None` keeps the room open.
    HoldUntil(Option<Instant>),
    /// [`Probe::next_deadline`] has passed.
    DeadlinePassed,
    Abort,
    Panicked(String),
    Deleted(Deletion),
}

/// What the driver carries out.
#[derive(Debug)]
pub(super) enum Action {
    CreateRoom,
    Join,
    Dispatch,
    ListDispatch,
    /// The dispatch's id, for whoever ends its jobs.
    KeepDispatch(String),
    /// Whether every agent seen in the room, in time or not, has its connection up.
    AgentsConnected(bool),
    Leave,
    DeleteRoom,
    Emit(ProbeEvent),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    /// `CreateRoom` is under way.
    Creating,
    Joining,
    /// In the room; media or the echo track is still missing.
    Connecting,
    /// Our own way in is done: what is missing now is up to the agent.
    Watching,
    /// The agent missed a deadline. Before it is blamed LiveKit shows that it still answers, and what it dispatched.
    LastLook {
        missed: Missed,
        at: Instant,
    },
    Leaving {
        until: Instant,
    },
    Deleting,
    Over,
}

/// What the agent owed by a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missed {
    Join,
    Track,
    Speech,
    /// A pause for the echo.
    Pause,
    Reply,
}

/// A deadline, in the order of precedence where two fall together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Signal,
    Media,
    Agent(Missed),
    /// The echo of what the agent said is still not over.
    Echo,
    /// All that is expected has come, and the room need not stay open.
    Ok,
    LastLook,
    Leave,
}

/// What the last look found of the target's dispatch.
#[derive(Debug)]
enum Listing {
    /// `ListDispatch` gave no answer.
    Unknown,
    NoDispatch,
    /// Dispatched, and no worker is known to have accepted.
    NoJob,
    /// A worker had accepted this one.
    Job(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DispatchCall {
    NotSent,
    UnderWay { since: Instant },
    Answered,
}

/// What the agent did that may end the probe once our own way in is done.
#[derive(Debug, Clone)]
enum Incident {
    Left { at: Instant, reason: String },
    Duplicate { identity: String },
}

/// One room, from creation to deletion.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Probe {
    agent_known: bool,
    /// What the agent said of a limit that its inference met.
    inference_limit: Option<String>,
    /// A second agent of the target's name came, and nobody tells when its connection is up.
    has_twin: bool,
    target: Arc<Target>,
    phase: Phase,
    outcome: Option<Outcome>,
    creating: bool,
    dispatch: DispatchCall,
    join_asked: Option<Instant>,
    in_room: bool,
    /// Since when media is up and the echo track published.
    ready: Option<Instant>,
    incident: Option<Incident>,
    hold_until: Option<Instant>,
    join_told: bool,
    /// Agents that aren't the target's, by their quoted names.
    strays: Vec<String>,
    /// Where the server wants media.
    media_addresses: Vec<String>,
    turns: Turns,
    transcript: Transcript,
    report: ProbeReport,
    actions: Vec<Action>,
}

impl Probe {
    /// `agent_known`: see [`Context::agent_known`](super::driver::Context::agent_known).
    pub(super) fn new(
        target: Arc<Target>,
        room: RoomName,
        position: Position,
        started_at: DateTime<Utc>,
        agent_known: bool,
    ) -> Self {
        Self {
            agent_known,
            inference_limit: None,
            has_twin: false,
            phase: Phase::Idle,
            outcome: None,
            creating: false,
            dispatch: DispatchCall::NotSent,
            join_asked: None,
            in_room: false,
            ready: None,
            incident: None,
            hold_until: None,
            join_told: false,
            strays: Vec::new(),
            media_addresses: Vec::new(),
            turns: Turns::new(&target.echo),
            transcript: Transcript::default(),
            report: ProbeReport::new(
                room,
                position,
                started_at,
                Outcome::Failed(Failure::new(
                    Reason::Internal,
                    "the probe did not come to its end: a fault of the canary",
                )),
            ),
            actions: Vec::new(),
            target,
        }
    }

    /// Takes one input and says what to do about it. Room events may come in any order.
    pub(super) fn on(&mut self, input: Input, now: Instant) -> Vec<Action> {
        match input {
            Input::Start => self.start(now),
            Input::Created(call) => self.created(call, now),
            Input::Dispatched(call) => self.dispatched(call, now),
            Input::Listed(call) => self.listed(call, now),
            Input::Room(event) => {
                // What passed before this was seen comes first, however late either is read.
                self.expire(now, |due| due < event.at);
                self.room_event(event, now);
            }
            Input::HoldUntil(until) => self.hold_until = until,
            Input::DeadlinePassed => self.expire(now, |due| due <= now),
            Input::Abort => self.settle(Outcome::Aborted, now),
            Input::Panicked(message) => {
                let detail = format!("the canary itself failed: {}", quote(&message));
                self.fail(Failure::new(Reason::Internal, detail), now);
            }
            Input::Deleted(deletion) => self.deleted(deletion),
        }
        self.proceed(now);
        std::mem::take(&mut self.actions)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.due().map(|(at, _)| at)
    }

    /// The outcome is final, and the room gone or given up.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    pub(super) fn agent_joined(&self) -> bool {
        self.report.agent.is_some()
    }

    pub(super) fn into_report(mut self) -> ProbeReport {
        self.report.turns = self.turns.list().to_vec();
        if self.target.transcript {
            let agent = self.report.agent.as_ref().map(|agent| &*agent.identity);
            self.report.transcript = Some(self.transcript.of(agent));
        }
        self.report
    }

    fn start(&mut self, now: Instant) {
        self.mark(Milestone::Started, now);
        if self.facts().request.joins_to_create() {
            self.join(now);
        } else {
            self.phase = Phase::Creating;
            self.creating = true;
            self.actions.push(Action::CreateRoom);
        }
    }

    fn facts(&self) -> DispatchFacts {
        self.target.dispatch.mode.facts()
    }

    // Answers of the server API.

    fn created(&mut self, call: Call<RoomInfo>, now: Instant) {
        self.creating = false;
        let dispatches = self.facts().request == DispatchRequest::CreateRoom;
        if let Some(sent_at) = call.sent_at.filter(|_| dispatches) {
            self.mark(Milestone::DispatchSent, sent_at);
        }
        match call.result {
            Ok(room) => {
                self.mark(Milestone::RoomCreated, call.answered_at);
                if dispatches {
                    self.mark(Milestone::DispatchAccepted, call.answered_at);
                }
                self.report.room_sid = Some(room.sid);
                if self.phase == Phase::Creating {
                    self.join(now);
                }
            }
            Err(error) => self.fail_call(Step::CreateRoom, &error, now),
        }
    }

    fn dispatched(&mut self, call: Call<String>, now: Instant) {
        self.dispatch = DispatchCall::Answered;
        if let Some(sent_at) = call.sent_at {
            self.mark(Milestone::DispatchSent, sent_at);
        }
        match call.result {
            Ok(id) => {
                self.mark(Milestone::DispatchAccepted, call.answered_at);
                self.actions.push(Action::KeepDispatch(id));
            }
            Err(error) => {
                if self.agent_joined() {
                    self.note("the agent joined although the dispatch call failed".to_owned());
                }
                self.fail_call(Step::Dispatch, &error, now);
            }
        }
    }

    fn fail_call(&mut self, step: Step, error: &ApiError, now: Instant) {
        if self.outcome.is_none() {
            let failure = Failure::of_api(step, error, &mut self.report.evidence);
            self.fail(failure, now);
        }
    }

    fn listed(&mut self, call: Call<Vec<DispatchInfo>>, now: Instant) {
        let Phase::LastLook { missed, .. } = self.phase else {
            return;
        };
        match call.result {
            Ok(dispatches) => {
                let lines = dispatches.iter().take(MOST_KEPT).map(dispatch_line);
                self.report.evidence.dispatches = Some(lines.collect());
                let listing = self.listing(&dispatches);
                self.blame_agent(missed, &listing, now);
            }
            Err(error) => {
                self.note(format!(
                    "ListDispatch failed: {}",
                    quote(&error.to_string())
                ));
                // Where the room's server may not have answered, the signal connection will tell within its ping
                // timeout whether it was LiveKit that went silent, not the agent.
                if shows_life(&error) {
                    self.blame_agent(missed, &Listing::Unknown, now);
                }
            }
        }
    }

    /// What these dispatches say of the target's agent.
    fn listing(&self, dispatches: &[DispatchInfo]) -> Listing {
        let wanted = expected_agent(&self.target);
        let mut own = dispatches
            .iter()
            .filter(|dispatch| wanted.is_none_or(|name| dispatch.agent_name == name))
            .peekable();
        if own.peek().is_none() {
            return Listing::NoDispatch;
        }
        match own.flat_map(|dispatch| &dispatch.jobs).next() {
            Some(job) => Listing::Job(format!("{} {}", job.id, job.status)),
            None => Listing::NoJob,
        }
    }

    fn deleted(&mut self, deletion: Deletion) {
        match deletion {
            Deletion::Deleted { at } => {
                self.mark(Milestone::RoomDeleted, at);
            }
            Deletion::NotDeleted { why } => self.note(format!("the room was not deleted: {why}")),
            Deletion::NothingThere => {}
        }
        if self.phase == Phase::Deleting {
            self.phase = Phase::Over;
        }
    }

    // What is seen in the room.

    fn room_event(&mut self, event: RoomEvent, now: Instant) {
        let at = event.at;
        match event.kind {
            RoomEventKind::Ended { reason: why, audio } => self.ended(why, audio, at, now),
            RoomEventKind::AgentError { identity, message } => {
                self.agent_error(&identity, &message)
            }
            RoomEventKind::AgentMetrics { identity, metrics } => {
                self.agent_metrics(&identity, metrics, at)
            }
            RoomEventKind::Transcribed { speaker, segment } => {
                self.transcript.hear(speaker, segment)
            }
            seen if self.outcome.is_some() || matches!(self.phase, Phase::LastLook { .. }) => {
                self.late(seen, at);
            }
            seen => self.timely(seen, at),
        }
    }

    fn timely(&mut self, seen: RoomEventKind, at: Instant) {
        match seen {
            RoomEventKind::SignalRequested => {
                if self.facts().request == DispatchRequest::Join {
                    self.mark(Milestone::DispatchSent, at);
                }
            }
            RoomEventKind::SignalConnected {
                room_sid,
                server_version,
                region,
                node,
            } => {
                self.mark(Milestone::SignalConnected, at);
                // The answer to the request that named the agent. If none was named, nothing was accepted.
                let facts = self.facts();
                if facts.request == DispatchRequest::Join && facts.names_agent {
                    self.mark(Milestone::DispatchAccepted, at);
                }
                self.report.room_sid = Some(room_sid);
                self.note(format!(
                    "joined LiveKit {server_version}, region {}, node {node}",
                    if region.is_empty() {
                        "unnamed"
                    } else {
                        &region
                    }
                ));
            }
            RoomEventKind::MediaAddress(address) => keep(&mut self.media_addresses, address),
            RoomEventKind::MediaConnected => self.mark(Milestone::MediaConnected, at),
            RoomEventKind::UdpBlocked => self.note(
                "media runs over TCP: UDP doesn't get through, check the firewalls between here and LiveKit's media ports"
                    .to_owned(),
            ),
            RoomEventKind::EchoPublished => self.mark(Milestone::EchoPublished, at),
            RoomEventKind::AgentJoined {
                agent,
                in_join_response,
            } => self.agent_joined_at(agent, in_join_response, at),
            RoomEventKind::AgentConnected => self.tell_connected(),
            RoomEventKind::AgentState(state) => {
                if state == "listening" {
                    self.mark(Milestone::AgentListening, at);
                }
            }
            RoomEventKind::AgentTrackSubscribed => self.mark(Milestone::AgentTrackSubscribed, at),
            RoomEventKind::AgentFirstAudio => self.mark(Milestone::AgentFirstAudio, at),
            RoomEventKind::SpeechStarted => {
                self.mark(Milestone::AgentSpoke, at);
                self.turns.speech_started(at);
            }
            RoomEventKind::SpeechEnded => self.turns.speech_ended(at),
            RoomEventKind::EchoStarted => self.turns.echo_started(at),
            RoomEventKind::EchoEnded => self.turns.echo_ended(at),
            RoomEventKind::AgentLeft { reason } => {
                self.incident.get_or_insert(Incident::Left { at, reason });
            }
            RoomEventKind::AgentDuplicate { identity } => {
                self.another_agent();
                self.incident
                    .get_or_insert(Incident::Duplicate { identity });
            }
            RoomEventKind::OtherJoined {
                identity,
                kind,
                agent_name,
            } => self.other_joined(&identity, &kind, agent_name.as_deref()),
            RoomEventKind::AgentError { .. }
            | RoomEventKind::AgentMetrics { .. }
            | RoomEventKind::Transcribed { .. }
            | RoomEventKind::Ended { .. } => unreachable!("handled before"),
        }
    }

    fn is_agent(&self, identity: &str) -> bool {
        let agent = self.report.agent.as_ref();
        agent.is_some_and(|agent| agent.identity == identity)
    }

    /// An error may be overcome by the agent: alone it is evidence.
    fn agent_error(&mut self, identity: &str, message: &str) {
        if !self.is_agent(identity) {
            return;
        }
        self.note(format!("the agent reported an error: {}", quote(message)));
        if self.outcome.is_none() && names_inference_limit(message) {
            self.inference_limit.get_or_insert(message.to_owned());
        }
    }

    fn agent_metrics(&mut self, identity: &str, metrics: TurnMetrics, at: Instant) {
        let own = self.is_agent(identity);
        let started = self.report.timeline.get(Milestone::Started);
        let kept = &mut self.report.evidence.agent_metrics;
        if own
            && kept.len() < MOST_KEPT
            && let Some(started) = started
        {
            let since_started = at.saturating_duration_since(started);
            let at = to_microseconds(since_started.as_secs_f64());
            kept.push(AgentTurn { at, metrics });
        }
    }

    /// Past the verdict: it stands, and what a person may want to know is kept.
    fn late(&mut self, seen: RoomEventKind, at: Instant) {
        match seen {
            RoomEventKind::AgentDuplicate { .. } => self.another_agent(),
            RoomEventKind::AgentConnected => self.tell_connected(),
            RoomEventKind::AgentJoined { agent, .. } => {
                self.report.other_agents += 1;
                self.saw(&agent.identity, AGENT, agent.name.as_deref());
                let after = self.since(Milestone::DispatchSent, at);
                self.note(format!(
                    "the agent ({}) joined{after}, too late to count",
                    agent.identity
                ));
            }
            RoomEventKind::AgentTrackSubscribed => {
                let after = self.since(Milestone::AgentJoined, at);
                self.note(format!(
                    "the agent's audio track came{after}, too late to count"
                ));
            }
            RoomEventKind::SpeechStarted
                if self.report.timeline.get(Milestone::AgentSpoke).is_none() =>
            {
                let after = self.since(Milestone::AgentJoined, at);
                self.note(format!("the agent spoke{after}, too late to count"));
            }
            RoomEventKind::OtherJoined {
                identity,
                kind,
                agent_name,
            } => self.other_joined(&identity, &kind, agent_name.as_deref()),
            _ => {}
        }
    }

    fn another_agent(&mut self) {
        self.report.other_agents += 1;
        self.has_twin = true;
        self.tell_connected();
    }

    fn tell_connected(&mut self) {
        self.actions.push(Action::AgentsConnected(!self.has_twin));
    }

    fn agent_joined_at(&mut self, agent: Agent, in_join_response: bool, at: Instant) {
        self.saw(&agent.identity, AGENT, agent.name.as_deref());
        if self.agent_joined() {
            return;
        }
        let precedes_join = self.facts().request.precedes_join();
        if !precedes_join && self.dispatch == DispatchCall::NotSent {
            self.note("the agent was in the room before it was dispatched".to_owned());
        }
        // It came between the dispatch and our own coming, nobody here saw when.
        self.report.join_upper_bound = in_join_response && precedes_join;
        let joined = self.join_of(&agent, at);
        self.report.agent = Some(agent);
        self.mark(Milestone::AgentJoined, joined);
        self.tell_join(true);
    }

    /// When an agent that was first seen at `seen` joined, by the server's own stamp.
    ///
    /// The server tells of a participant that publishes nothing and changes no attribute only with the next batch, up to
    /// three seconds later (`subscriberUpdateInterval` in livekit-server's room.go); that is no delay of the agent's. A stamp from before
    /// the dispatch is a wrong clock, and of an upper bound only the bound was measured.
    fn join_of(&mut self, agent: &Agent, seen: Instant) -> Instant {
        // Unknown while the dispatch call is under way: then only the first sight is sure to come after it.
        let dispatched = self.report.timeline.get(Milestone::DispatchSent);
        let stamp = agent
            .joined
            .filter(|joined| dispatched.is_some_and(|at| at <= *joined));
        let joined = match stamp {
            Some(joined) if !self.report.join_upper_bound => joined.min(seen),
            _ => return seen,
        };
        let late = seen - joined;
        if late >= LATE_NEWS {
            self.note(format!(
                "LiveKit told of the agent {:.3} s after it had joined",
                late.as_secs_f64()
            ));
        }
        joined
    }

    fn other_joined(&mut self, identity: &str, kind: &str, agent_name: Option<&str>) {
        self.saw(identity, kind, agent_name);
        if kind == AGENT {
            let stray = agent_name.map_or("one without a name".to_owned(), |name| {
                format!("\"{name}\"")
            });
            keep(&mut self.strays, stray);
        }
    }

    fn ended(&mut self, why: EndReason, audio: AudioStats, at: Instant, now: Instant) {
        self.in_room = false;
        self.report.audio = audio;
        if matches!(why, EndReason::Left) {
            self.mark(Milestone::Left, at);
        }
        if self.outcome.is_some() {
            return;
        }
        let failure = self.failure_of(why);
        if let Phase::LastLook { missed, .. } = self.phase
            && !matches!(failure.reason, Reason::SignalLost | Reason::MediaFailed)
        {
            self.note(failure.detail);
            self.blame_agent(missed, &Listing::Unknown, now);
        } else {
            self.fail(failure, now);
        }
    }

    fn failure_of(&mut self, why: EndReason) -> Failure {
        let joined = self
            .report
            .timeline
            .get(Milestone::SignalConnected)
            .is_some();
        let evidence = &mut self.report.evidence;
        match why {
            EndReason::Left => Failure::new(
                Reason::Internal,
                "the participant left without being asked: a fault of the canary",
            ),
            EndReason::Signal(error) if joined => Failure::of_lost_signal(&error, evidence),
            EndReason::Signal(error) => Failure::of_join(&error, evidence),
            EndReason::Removed { reason } => {
                evidence.answer = Some(format!("Leave {reason}"));
                Failure::of_leave(&reason)
            }
            EndReason::Revoked(right) => {
                evidence.step = Some("permission");
                let right = match right {
                    MediaPermission::Publish => "to publish",
                    MediaPermission::Subscribe => "to subscribe",
                };
                Failure::new(
                    Reason::Removed,
                    format!(
                        "somebody took the echo participant's right {right} away: check who changes permissions in rooms of this project"
                    ),
                )
            }
            EndReason::PublishFailed(why) => {
                evidence.step = Some("publish");
                let why = quote(&why);
                Failure::new(
                    Reason::PublishFailed,
                    format!("the echo track was not published: {why}; check LiveKit's log"),
                )
            }
            EndReason::MediaFailed { transport, detail } => {
                evidence.step = Some("media");
                let detail = quote(&detail);
                Failure::new(
                    Reason::MediaFailed,
                    format!(
                        "the {transport} transport failed: {detail}; check UDP and TCP between here and LiveKit's media ports"
                    ),
                )
            }
            EndReason::Internal(why) => Failure::new(
                Reason::Internal,
                format!("the canary itself failed: {}", quote(&why)),
            ),
        }
    }

    // Progress and deadlines.

    fn join(&mut self, now: Instant) {
        self.phase = Phase::Joining;
        self.join_asked = Some(now);
        self.in_room = true;
        self.actions.push(Action::Join);
    }

    /// Takes the steps that the marks now allow.
    fn proceed(&mut self, now: Instant) {
        let reached = |milestone| self.report.timeline.get(milestone);
        if self.phase == Phase::Joining && reached(Milestone::SignalConnected).is_some() {
            self.phase = Phase::Connecting;
        }
        if self.phase == Phase::Connecting
            && let Some(media) = reached(Milestone::MediaConnected)
            && let Some(publish) = reached(Milestone::EchoPublished)
        {
            self.phase = Phase::Watching;
            self.ready = Some(media.max(publish));
            if self.facts().request == DispatchRequest::CreateDispatch {
                self.dispatch = DispatchCall::UnderWay { since: now };
                self.actions.push(Action::Dispatch);
            }
        }
        if self.phase == Phase::Watching {
            self.judge_incident(now);
        }
        // A call still under way could bring the room back after its deletion: CreateDispatch creates a missing room.
        if matches!(self.phase, Phase::Leaving { .. }) && !self.in_room && !self.call_under_way() {
            self.delete();
        }
    }

    fn call_under_way(&self) -> bool {
        self.creating || matches!(self.dispatch, DispatchCall::UnderWay { .. })
    }

    fn judge_incident(&mut self, now: Instant) {
        match self.incident.clone() {
            Some(Incident::Duplicate { identity }) => {
                self.report.evidence.step = Some("agent");
                let detail = format!(
                    "a second agent of that name joined ({identity}): check for a second dispatch \
                     (automatic beside explicit, or another program's)"
                );
                self.fail(Failure::new(Reason::AgentDuplicate, detail), now);
            }
            Some(Incident::Left { at, reason }) if !self.agent_may_have_left() => {
                self.report.evidence.step = Some("agent");
                let after = self.since(Milestone::AgentJoined, at);
                let before = if !self.spoke() {
                    "before it spoke"
                } else if self.target.expect.agent_may_leave == AgentMayLeave::Never {
                    "while the room was still open"
                } else {
                    "before it answered the echo"
                };
                let said = if reason.is_empty() {
                    "no reason given"
                } else {
                    &reason
                };
                let detail = format!(
                    "the agent left ({said}){after}, {before}: check its log for a crash, a restart or a hang-up"
                );
                self.fail(Failure::of_agent_leave(&reason, detail), now);
            }
            _ => {}
        }
    }

    fn agent_may_have_left(&self) -> bool {
        let allowed = match self.target.expect.agent_may_leave {
            AgentMayLeave::Never => false,
            AgentMayLeave::AfterSpeech => true,
            AgentMayLeave::AfterReply => self.turns.answered(),
        };
        allowed && self.spoke() && (!self.target.expect.reply || self.turns.answered())
    }

    fn spoke(&self) -> bool {
        self.report.timeline.get(Milestone::AgentSpoke).is_some()
    }

    /// The next deadline and what it is for.
    fn due(&self) -> Option<(Instant, Due)> {
        let deadlines = &self.target.deadlines;
        match self.phase {
            Phase::Idle | Phase::Creating | Phase::Deleting | Phase::Over => None,
            Phase::Joining => Some((
                self.join_asked? + deadlines.signal + ENGINE_GRACE,
                Due::Signal,
            )),
            Phase::Connecting => {
                let joined = self.report.timeline.get(Milestone::SignalConnected)?;
                Some((joined + deadlines.media, Due::Media))
            }
            Phase::Watching => self.due_of_agent(),
            Phase::LastLook { at, .. } => Some((at + SIGNAL_SILENCE, Due::LastLook)),
            Phase::Leaving { until } => Some((until, Due::Leave)),
        }
    }

    fn due_of_agent(&self) -> Option<(Instant, Due)> {
        let deadlines = &self.target.deadlines;
        let timeline = &self.report.timeline;
        let Some(joined) = timeline.get(Milestone::AgentJoined) else {
            return Some((
                self.dispatch_base()? + deadlines.join,
                Due::Agent(Missed::Join),
            ));
        };
        // Its track can't come, nor will it speak, before our own transports are up.
        let start = joined.max(self.ready?);
        let Some(spoke) = timeline.get(Milestone::AgentSpoke) else {
            let heard = [Milestone::AgentTrackSubscribed, Milestone::AgentFirstAudio];
            return Some(if heard.iter().any(|mark| timeline.get(*mark).is_some()) {
                (start + deadlines.speech, Due::Agent(Missed::Speech))
            } else {
                let track = deadlines.track.min(deadlines.speech);
                (start + track, Due::Agent(Missed::Track))
            });
        };
        if self.target.expect.reply {
            if let Some(echo_ended) = self.turns.unanswered_since() {
                return Some((echo_ended + deadlines.reply, Due::Agent(Missed::Reply)));
            }
            if !self.turns.answered() {
                return Some(match self.turns.echo_since() {
                    Some(since) => (since + self.target.echo.delay + ECHO_LONGEST, Due::Echo),
                    None => (spoke + TALK_LONGEST, Due::Agent(Missed::Pause)),
                });
            }
        }
        if matches!(self.dispatch, DispatchCall::UnderWay { .. }) {
            return None;
        }
        match &self.incident {
            Some(Incident::Left { at, .. }) => Some((*at, Due::Ok)),
            _ => self.hold_until.map(|until| (until, Due::Ok)),
        }
    }

    /// From when the agent's join counts.
    fn dispatch_base(&self) -> Option<Instant> {
        let sent = self.report.timeline.get(Milestone::DispatchSent);
        sent.or(match self.dispatch {
            DispatchCall::UnderWay { since } => Some(since),
            _ => self.join_asked,
        })
    }

    /// Acts on every deadline that `passed` covers, the earliest first.
    fn expire(&mut self, now: Instant, passed: impl Fn(Instant) -> bool) {
        while let Some((at, due)) = self.due().filter(|(at, _)| passed(*at)) {
            self.pass(due, at, now);
            self.proceed(now);
        }
    }

    fn pass(&mut self, due: Due, at: Instant, now: Instant) {
        let deadlines = &self.target.deadlines;
        match due {
            Due::Signal => {
                let limit = deadlines.signal;
                self.miss("signal", limit);
                let detail = format!(
                    "LiveKit sent no join response within {limit:?}: check its load and any proxy that holds WebSockets back"
                );
                self.fail(Failure::new(Reason::SignalFailed, detail), now);
            }
            Due::Media => self.media_missed(now),
            Due::Agent(Missed::Join) if self.call_under_way() => {
                let limit = deadlines.join;
                self.miss("dispatch", limit);
                let detail = format!(
                    "CreateDispatch had no answer within {limit:?}, and no agent joined: check LiveKit's status and load"
                );
                self.fail(Failure::new(Reason::DispatchFailed, detail), now);
            }
            Due::Agent(missed) => {
                if missed == Missed::Join {
                    self.tell_join(false);
                }
                self.phase = Phase::LastLook { missed, at };
                self.actions.push(Action::ListDispatch);
            }
            Due::Echo => {
                let detail = "the agent spoke, but its echo never went out: a fault of the canary";
                self.fail(Failure::new(Reason::Internal, detail), now);
            }
            Due::Ok => self.settle(Outcome::Ok, now),
            Due::LastLook => {
                if let Phase::LastLook { missed, .. } = self.phase {
                    self.blame_agent(missed, &Listing::Unknown, now);
                }
            }
            Due::Leave => {
                self.note("leaving the room took too long and was given up".to_owned());
                self.delete();
            }
        }
    }

    fn media_missed(&mut self, now: Instant) {
        let limit = self.target.deadlines.media;
        let timeline = &self.report.timeline;
        let failure = if timeline.get(Milestone::EchoPublished).is_some() {
            self.miss("media", limit);
            let detail = format!(
                "ICE and DTLS were not up within {limit:?} of the join response: check UDP and TCP between here and LiveKit's media ports"
            );
            Failure::new(Reason::MediaFailed, detail)
        } else {
            // Without media too, as that needs LiveKit's answers: then it isn't the network that is to blame.
            let check = if timeline.get(Milestone::MediaConnected).is_some() {
                "check its log"
            } else {
                "nor did media come up: check whether that LiveKit server hangs"
            };
            self.miss("publish", limit);
            let detail = format!(
                "LiveKit did not acknowledge the echo track within {limit:?} of the join response: {check}"
            );
            Failure::new(Reason::PublishFailed, detail)
        };
        self.fail(failure, now);
    }

    /// The verdict on an agent that missed its deadline.
    fn blame_agent(&mut self, missed: Missed, listing: &Listing, now: Instant) {
        let deadlines = &self.target.deadlines;
        let (step, limit) = match missed {
            Missed::Join => ("agent_join", deadlines.join),
            Missed::Track => ("agent_track", deadlines.track.min(deadlines.speech)),
            Missed::Speech => ("agent_speech", deadlines.speech),
            Missed::Pause => ("agent_reply", TALK_LONGEST),
            Missed::Reply => ("agent_reply", deadlines.reply),
        };
        let failure = match missed {
            Missed::Join => self.no_agent(listing),
            Missed::Track => Failure::new(
                Reason::AgentNoTrack,
                format!(
                    "the agent published no audio track within {limit:?} of joining: check that its session starts and that it has audio output"
                ),
            ),
            Missed::Speech => {
                let heard = self.report.timeline.get(Milestone::AgentFirstAudio);
                let packets = match heard {
                    Some(_) => "its track carried audio packets, but no speech in them",
                    None => "no audio packet came on its track",
                };
                let before = if self.report.join_upper_bound {
                    "; it was there before the canary, and may have spoken before anybody could hear it"
                } else {
                    ""
                };
                Failure::new(
                    Reason::AgentSilent,
                    format!(
                        "the agent did not speak within {limit:?} of joining ({packets}{before}): check its greeting and its TTS"
                    ),
                )
            }
            Missed::Pause => Failure::new(
                Reason::AgentNoReply,
                format!(
                    "the agent talked for {limit:?} without a pause for the echo that it should answer: check its greeting, or raise speech.threshold_dbfs where it plays background sound"
                ),
            ),
            Missed::Reply => Failure::new(
                Reason::AgentNoReply,
                format!(
                    "the agent did not answer within {limit:?} of the end of the echo: check its STT, LLM and turn detection"
                ),
            ),
        };
        self.miss(step, limit);
        self.fail(failure, now);
    }

    fn no_agent(&self, listing: &Listing) -> Failure {
        let limit = self.target.deadlines.join;
        if let Listing::Job(job) = listing {
            let detail = format!(
                "a worker accepted the job ({job}), but no agent joined within {limit:?}: check that worker's log for a slow or failed start"
            );
            return Failure::new(Reason::AgentNoShow, detail);
        }
        let check = match expected_agent(&self.target) {
            // The name is right: this agent has come by it.
            Some(name) if self.agent_known => format!(
                "check, in this order, that the worker of \"{name}\" runs and is connected to this project, that it is below its load limit, that its log shows no job that failed before it connected, and that it still registers under this name"
            ),
            Some(name) => format!(
                "check, in this order, that a worker registered as exactly \"{name}\", that it runs and is connected to this project, that it is below its load limit, and that its log shows no job that failed before it connected"
            ),
            None => "check that an unnamed worker runs, is connected to this project and is below its load limit, and that its log shows no job that failed before it connected".to_owned(),
        };
        let facts = self.facts();
        let listed = match (listing, facts.request) {
            (Listing::NoDispatch, DispatchRequest::CreateRoom) => {
                "LiveKit lists no dispatch of it (does this server dispatch whom CreateRoom names?)"
            }
            (Listing::NoDispatch, DispatchRequest::Join) if facts.names_agent => {
                "LiveKit lists no dispatch of it (does this server dispatch whom a token names?)"
            }
            (Listing::NoDispatch, DispatchRequest::CreateDispatch | DispatchRequest::Join) => {
                "LiveKit lists no dispatch of it"
            }
            (Listing::NoJob | Listing::Job(_), _) => "LiveKit lists no accepted job",
            (Listing::Unknown, _) => "LiveKit did not say whether a worker accepted the job",
        };
        let strays = match self.strays.as_slice() {
            [] => String::new(),
            strays => format!(" (another agent came: {})", strays.join(", ")),
        };
        let detail = format!(
            "no agent joined within {limit:?} of the dispatch, and {listed}{strays}: {check}"
        );
        Failure::new(Reason::DispatchUnanswered, detail)
    }

    // The end.

    fn fail(&mut self, failure: Failure, now: Instant) {
        let failure = match &self.inference_limit {
            // Without a model an agent says nothing, or gives up.
            Some(said) if falls_silent(failure.reason) => {
                self.report.evidence.answer = Some(said.clone());
                Failure::of_inference_limit(said, &failure)
            }
            _ => failure,
        };
        if failure.reason == Reason::MediaFailed {
            self.note_media_addresses();
        }
        self.settle(Outcome::Failed(failure), now);
    }

    /// A server that names an address of its own network alone is the usual cause of media that never comes up.
    fn note_media_addresses(&mut self) {
        self.note(match self.media_addresses.as_slice() {
            [] => "LiveKit named no address for media".to_owned(),
            addresses => format!("LiveKit wants media at {}", addresses.join(", ")),
        });
    }

    /// The first outcome stands.
    fn settle(&mut self, outcome: Outcome, now: Instant) {
        if self.outcome.is_some() {
            return;
        }
        self.tell_join(false);
        self.report.outcome = outcome.clone();
        self.outcome = Some(outcome.clone());
        let retry_after = self.report.evidence.retry_after_seconds;
        self.actions.push(Action::Emit(ProbeEvent::OutcomeDecided {
            outcome,
            retry_after: retry_after.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
        }));
        if self.in_room {
            self.actions.push(Action::Leave);
        }
        self.phase = Phase::Leaving {
            until: now + self.target.deadlines.cleanup,
        };
    }

    fn delete(&mut self) {
        self.phase = Phase::Deleting;
        self.actions.push(Action::DeleteRoom);
    }

    // Keeping and telling.

    fn mark(&mut self, milestone: Milestone, at: Instant) {
        if self.report.timeline.mark(milestone, at) {
            self.actions
                .push(Action::Emit(ProbeEvent::Reached { milestone, at }));
        }
    }

    fn tell_join(&mut self, joined: bool) {
        if !self.join_told {
            self.join_told = true;
            self.actions
                .push(Action::Emit(ProbeEvent::JoinDecided { joined }));
        }
    }

    fn miss(&mut self, step: &'static str, limit: Duration) {
        self.report.evidence.step = Some(step);
        self.report.evidence.deadline_seconds = Some(limit.as_secs_f64());
    }

    fn note(&mut self, note: String) {
        keep(&mut self.report.evidence.notes, note);
    }

    fn saw(&mut self, identity: &str, kind: &str, agent_name: Option<&str>) {
        let name = agent_name.map(|name| format!(", agent name \"{name}\""));
        let line = format!("{identity} ({kind}{})", name.unwrap_or_default());
        keep(&mut self.report.evidence.participants, line);
    }

    /// ` 1.234 s after the dispatch`, or nothing where that can't be told.
    fn since(&self, milestone: Milestone, at: Instant) -> String {
        let from = self.report.timeline.get(milestone);
        let what = match milestone {
            Milestone::AgentJoined => "its join",
            _ => "the dispatch",
        };
        match from.and_then(|from| at.checked_duration_since(from)) {
            Some(after) => format!(" {:.3} s after {what}", after.as_secs_f64()),
            None => String::new(),
        }
    }
}

/// The name of the agent that counts; `None` if the dispatch names none, and any agent counts.
pub(super) fn expected_agent(target: &Target) -> Option<&str> {
    let names_agent = target.dispatch.mode.facts().names_agent;
    target.agent_name.as_deref().filter(|_| names_agent)
}

/// Whether a failed call proves that the room's server is alive: a proxy, or another node that asks it in vain, says
/// 502 to 504.
fn shows_life(error: &ApiError) -> bool {
    match error {
        ApiError::Refused(refusal) => !matches!(refusal.status, 502..=504),
        ApiError::Protocol(_) => true,
        ApiError::Unreachable(_) | ApiError::Timeout(_) | ApiError::Broken(_) => false,
    }
}

fn falls_silent(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::AgentSilent | Reason::AgentNoReply | Reason::AgentLeftEarly
    )
}

fn keep(list: &mut Vec<String>, line: String) {
    if list.len() < MOST_KEPT && !list.contains(&line) {
        list.push(line);
    }
}

fn dispatch_line(dispatch: &DispatchInfo) -> String {
    let jobs: Vec<_> = dispatch
        .jobs
        .iter()
        .take(MOST_KEPT)
        .map(|job| match job.error.as_str() {
            "" => format!("job {} {}", job.id, job.status),
            error => format!("job {} {} ({})", job.id, job.status, quote(error)),
        })
        .collect();
    let jobs = match jobs.as_slice() {
        [] => "no job".to_owned(),
        jobs => jobs.join(", "),
    };
    format!(
        "{} for agent \"{}\": {jobs}",
        dispatch.id, dispatch.agent_name
    )
}

#[cfg(test)]
mod tests;
