//! The state machine of one probe: answers, room events and deadlines in, actions out. No I/O, no clock of its own.
//!
//! This file has its states, the answers of the server API, and its end. `room` handles what is seen in the room;
//! `deadlines` knows what is due when. What a failure means is in `verdict`.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use super::transcript::Transcript;
use super::turns::{Turns, UplinkProof};
use super::verdict::{
    AgentDuty, Conversation, DispatchListing, LeftWhen, MissedDuty, ProbeCall, expected_agent,
    quote,
};
use super::{Failure, Milestone, Outcome, Position, ProbeEvent, ProbeReport, Reason};
use crate::config::{AgentMayLeave, DispatchFacts, DispatchRequest, Target};
use crate::janitor::Deletion;
use crate::livekit::RoomName;
use crate::livekit::event::{AudioStats, RemoteTrackInfo, RoomEvent};
use crate::livekit::wire::api::{ApiError, Call, DispatchInfo, ParticipantBrief, RoomInfo};

mod conversation;
mod deadlines;
mod room;

use conversation::{Message, ReplyFault};
use deadlines::{ENGINE_GRACE, LIST_INTERVAL};
use room::{NAMELESS, SpeechClaim};

pub use deadlines::{max_overrun, max_time_to_verdict};

/// Entries of each list in the evidence: a crowded room must not grow a report without bound.
const MAX_ENTRIES: usize = 20;

/// What the driver feeds in.
#[derive(Debug)]
pub(super) enum Input {
    /// The first one.
    Start,
    Created(Call<RoomInfo>),
    Dispatched(Call<String>),
    Listed(ListedRoom),
    JobsListed(Call<Vec<DispatchInfo>>),
    Room(RoomEvent),
    /// `None` keeps the room open.
    HoldUntil(Option<Instant>),
    /// [`ProbeMachine::next_deadline`] has passed.
    DeadlinePassed,
    Abort,
    Panicked(String),
    /// This process did not run for this long, since the probe's start.
    Stalled(Duration),
    Deleted(Deletion),
}

/// What the server API shows of the room.
#[derive(Debug)]
pub(super) struct ListedRoom {
    pub(super) dispatches: Call<Vec<DispatchInfo>>,
    /// `None` if they were not asked for.
    pub(super) participants: Option<Call<Vec<ParticipantBrief>>>,
}

/// What the driver carries out.
#[derive(Debug)]
pub(super) enum Action {
    CreateRoom,
    Join,
    Dispatch,
    /// `ListDispatch`, and `ListParticipants` if no agent was seen.
    ListRoom {
        participants: bool,
    },
    /// `ListDispatch` again, only to learn which worker serves the room. The probe never waits for the answer.
    ListJobs,
    /// The id of the dispatch, for the clean-up of its jobs.
    RecordDispatch(String),
    /// This participant, an agent without a name attribute, is the target's agent.
    Adopt(String),
    /// Whether every agent seen in the room, in time or late, has its connection up.
    AgentsConnected(bool),
    /// An agent of the room may be cut off from the server, or may be in it unseen.
    LostSight,
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
    /// In the room, but media or the echo track is still missing.
    Connecting,
    /// The canary's own way in is complete: whatever is missing now is up to the agent.
    Watching,
    /// The agent missed a deadline. Before it is blamed, `ListDispatch` has to show that LiveKit still answers, and what it
    /// dispatched.
    FinalCheck {
        duty: AgentDuty,
        at: Instant,
    },
    Leaving {
        until: Instant,
    },
    Deleting,
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DispatchCall {
    NotSent,
    UnderWay { since: Instant },
    Answered,
}

/// What an agent did that may end the probe once the canary's own way in is complete.
#[derive(Debug, Clone)]
enum Disruption {
    Left {
        at: Instant,
        reason: String,
    },
    Duplicate {
        identity: String,
    },
    /// Its audio is end-to-end encrypted, by this method.
    Encrypted(&'static str),
}

/// Agents without a name attribute. `ListDispatch` can show that one of them has our job.
#[derive(Debug, Default)]
struct NamelessAgents {
    identities: Vec<String>,
    /// When `ListDispatch` is called next for them.
    list_at: Option<Instant>,
    /// Until when the join of one that was recognised may be reported.
    join_by: Option<Instant>,
}

/// The most calls that ask for the worker of one room. The first one found it in 8 of 10 rooms of livekit-server 1.13.5 under
/// load, and the second one, 2 s later, in all.
const MAX_WORKER_LISTS: u8 = 3;

/// The calls of `ListDispatch` that ask which worker serves the room.
#[derive(Debug, Default)]
struct WorkerSearch {
    /// How many were made.
    calls: u8,
    /// When the next one is due, because LiveKit can list a job late.
    next_at: Option<Instant>,
}

/// One room, from creation to deletion.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is an independent fact")]
pub(super) struct ProbeMachine {
    target: Arc<Target>,
    /// See [`Context::agent_known`](super::driver::Context::agent_known).
    agent_known: bool,
    /// The size of the token that the canary joins with.
    token_bytes: usize,
    phase: Phase,
    /// Final once set; the report's own outcome is a placeholder until then.
    outcome: Option<Outcome>,
    /// `CreateRoom` is under way.
    creating: bool,
    dispatch: DispatchCall,
    join_asked: Option<Instant>,
    in_room: bool,
    /// Since when media is up and the echo track is published.
    ready: Option<Instant>,
    /// The first that was seen.
    disruption: Option<Disruption>,
    hold_until: Option<Instant>,
    join_decided: bool,
    /// The agent's error that named a limit of its inference.
    inference_limit: Option<String>,
    /// A second agent of the target's name joined. No event reports when its connection is up.
    has_duplicate: bool,
    /// This process did not run for some of the call.
    stalled: bool,
    /// The id of the room that CreateRoom returned, if the canary joined another room of that name.
    other_room: Option<String>,
    /// Agents that are not the target's, by their quoted names.
    strays: Vec<String>,
    nameless: NamelessAgents,
    /// The tracks of other participants, in the order in which they were seen.
    tracks: Vec<RemoteTrackInfo>,
    /// The ids of tracks to which LiveKit could not subscribe the canary, and its errors.
    failed_subscriptions: Vec<(String, &'static str)>,
    /// The addresses at which the server expects media.
    media_addresses: Vec<String>,
    turns: Turns,
    /// Whether the agent yielded to the interruption has been decided.
    yield_judged: bool,
    /// What was missing in a reply.
    wrong_reply: Option<ReplyFault>,
    /// The last error that the agent's session reported.
    agent_error: Option<String>,
    worker_search: WorkerSearch,
    /// What `ListDispatch` showed in the final check.
    final_listing: Option<DispatchListing>,
    claim: SpeechClaim,
    /// What was said, by the messages of the agent's session.
    messages: Vec<Message>,
    transcript: Transcript,
    report: ProbeReport,
    /// Those of the input that is being handled.
    actions: Vec<Action>,
}

impl ProbeMachine {
    pub(super) fn new(
        target: Arc<Target>,
        room: RoomName,
        position: Position,
        started_at: DateTime<Utc>,
        agent_known: bool,
        token_bytes: usize,
    ) -> Self {
        let outcome = Outcome::Failed(Failure::unfinished());
        Self {
            agent_known,
            token_bytes,
            phase: Phase::Idle,
            outcome: None,
            creating: false,
            dispatch: DispatchCall::NotSent,
            join_asked: None,
            in_room: false,
            ready: None,
            disruption: None,
            hold_until: None,
            join_decided: false,
            inference_limit: None,
            has_duplicate: false,
            stalled: false,
            other_room: None,
            strays: Vec::new(),
            nameless: NamelessAgents::default(),
            tracks: Vec::new(),
            failed_subscriptions: Vec::new(),
            media_addresses: Vec::new(),
            turns: Turns::new(&target.caller),
            yield_judged: false,
            wrong_reply: None,
            agent_error: None,
            worker_search: WorkerSearch::default(),
            final_listing: None,
            claim: SpeechClaim::default(),
            messages: Vec::new(),
            transcript: Transcript::default(),
            report: ProbeReport {
                expects_reply: target.expect.reply,
                ..ProbeReport::new(room, position, started_at, outcome)
            },
            actions: Vec::new(),
            target,
        }
    }

    /// Handles one input and returns what to do about it. Room events may come in any order.
    pub(super) fn on(&mut self, input: Input, now: Instant) -> Vec<Action> {
        match input {
            Input::Start => self.start(now),
            Input::Created(call) => self.created(call, now),
            Input::Dispatched(call) => self.dispatched(call, now),
            Input::Listed(listed) => self.listed(listed, now),
            Input::JobsListed(call) => self.jobs_listed(call, now),
            Input::Room(event) => {
                // Expire deadlines that are earlier than this event's timestamp before applying it: a late read of either
                // must not change the verdict.
                self.expire(now, |due| due < event.at);
                self.room_event(event, now);
            }
            Input::HoldUntil(until) => self.hold_until = until,
            Input::DeadlinePassed => self.expire(now, |due| due <= now),
            Input::Abort => self.decide(Outcome::Aborted, now),
            Input::Panicked(message) => self.fail(Failure::of_own_fault(&message), now),
            Input::Stalled(time) => self.stalled(time, now),
            Input::Deleted(deletion) => self.deleted(deletion),
        }
        self.proceed(now);
        std::mem::take(&mut self.actions)
    }

    /// The outcome is final, and the room is gone or its deletion was given up.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    pub(super) fn agent_joined(&self) -> bool {
        self.report.agent.is_some()
    }

    pub(super) fn into_report(mut self) -> ProbeReport {
        if self.stalled {
            // Their delays and losses are not the agent's.
            self.report.audio = AudioStats::default();
        } else {
            self.turns.close();
            self.describe_turns();
            self.note_unconfirmed();
            self.report.turns = self.turns.list().to_vec();
        }
        self.report.evidence.tracks = self.tracks.iter().map(track_line).collect();
        if self.target.transcript {
            let agent = self.report.agent.as_ref().map(|agent| &*agent.identity);
            self.report.transcript = Some(self.transcript.into_lines(agent));
        }
        self.report
    }

    /// What is missing or late now may have been in time: deadlines passed, and packets were lost, while the canary did not run.
    fn stalled(&mut self, time: Duration, now: Instant) {
        if self.outcome.is_none() {
            self.stalled = true;
            self.report.timeline.record_stall();
            self.fail(Failure::of_stall(time), now);
        }
    }

    fn facts(&self) -> DispatchFacts {
        self.target.dispatch.mode.facts()
    }

    // Progress.

    fn start(&mut self, now: Instant) {
        self.mark(Milestone::Started, now);
        if self.target.caller.speaks_first {
            self.report.timeline.exclude_first_speech();
        }
        if self.facts().request.joins_to_create() {
            self.join(now);
        } else {
            self.phase = Phase::Creating;
            self.creating = true;
            self.actions.push(Action::CreateRoom);
        }
    }

    fn join(&mut self, now: Instant) {
        self.phase = Phase::Joining;
        self.join_asked = Some(now);
        self.in_room = true;
        self.actions.push(Action::Join);
    }

    /// Takes the steps that the milestones now allow.
    fn proceed(&mut self, now: Instant) {
        let reached = |milestone| self.report.timeline.get(milestone);
        if self.phase == Phase::Joining && reached(Milestone::SignalConnected).is_some() {
            self.phase = Phase::Connecting;
        }
        if self.phase == Phase::Connecting
            && let Some(media) = reached(Milestone::MediaConnected)
            && let Some(publish) = reached(Milestone::CallerPublished)
        {
            self.phase = Phase::Watching;
            self.ready = Some(media.max(publish));
            if self.facts().request == DispatchRequest::CreateDispatch {
                self.dispatch = DispatchCall::UnderWay { since: now };
                self.actions.push(Action::Dispatch);
            }
        }
        if self.phase == Phase::Watching {
            self.ask_for_worker();
            self.judge_disruption(now);
        }
        // CreateDispatch creates a missing room. So a call still under way could bring the room back after its deletion.
        if matches!(self.phase, Phase::Leaving { .. }) && !self.in_room && !self.call_under_way() {
            self.delete();
        }
    }

    /// Asks which worker serves the room: after all calls and connections that the canary itself waits for, and while the
    /// room exists.
    fn ask_for_worker(&mut self) {
        let asked = self.worker_search.calls > 0 || self.report.circumstances.worker.is_some();
        if !asked && self.agent_joined() && !self.call_under_way() {
            self.list_jobs();
        }
    }

    fn list_jobs(&mut self) {
        self.worker_search.calls += 1;
        self.worker_search.next_at = None;
        self.actions.push(Action::ListJobs);
    }

    fn call_under_way(&self) -> bool {
        self.creating || matches!(self.dispatch, DispatchCall::UnderWay { .. })
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
            Err(error) => self.fail_call(ProbeCall::CreateRoom, &error, now),
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
                self.actions.push(Action::RecordDispatch(id));
            }
            Err(error) => {
                if self.agent_joined() {
                    self.add_note("the agent joined although the dispatch call failed".to_owned());
                }
                self.fail_call(ProbeCall::CreateDispatch, &error, now);
            }
        }
    }

    fn fail_call(&mut self, call: ProbeCall, error: &ApiError, now: Instant) {
        if self.outcome.is_none() {
            let failure = Failure::of_api(call, error, &mut self.report.evidence);
            self.fail(failure, now);
        }
    }

    fn listed(&mut self, listed: ListedRoom, now: Instant) {
        if let Ok(dispatches) = &listed.dispatches.result {
            self.record_worker(dispatches);
            if self.adopt_agent(dispatches, now) {
                return;
            }
        }
        if !matches!(self.phase, Phase::FinalCheck { .. }) {
            return;
        }
        let participants = listed.participants.and_then(|call| call.result.ok());
        match listed.dispatches.result {
            Ok(dispatches) => {
                let lines = dispatches.iter().take(MAX_ENTRIES).map(dispatch_line);
                self.report.evidence.dispatches = Some(lines.collect());
                let participants = participants.unwrap_or_default();
                if let Some(identity) = self.hidden_agent(&participants, &dispatches) {
                    // LiveKit bills its session like that of any other agent.
                    self.report.other_agents += 1;
                    self.record_participant(&identity, "AGENT, hidden", None);
                    let failure = Failure::of_hidden_agent(&identity, &mut self.report.evidence);
                    return self.fail(failure, now);
                }
                self.final_listing = Some(self.listing(&dispatches));
                self.judge_final_check(now);
            }
            Err(error) => {
                self.add_note(format!(
                    "ListDispatch failed: {}",
                    quote(&error.to_string())
                ));
                // If the room's server may be silent, wait for the signal connection: its ping timeout shows whether LiveKit
                // or the agent is at fault.
                if proves_server_alive(&error) {
                    self.final_listing = Some(DispatchListing::Unknown);
                    self.judge_final_check(now);
                }
            }
        }
    }

    fn jobs_listed(&mut self, call: Call<Vec<DispatchInfo>>, now: Instant) {
        match call.result {
            Ok(dispatches) => {
                self.record_worker(&dispatches);
                let more = self.worker_search.calls < MAX_WORKER_LISTS;
                let unknown = self.report.circumstances.worker.is_none();
                self.worker_search.next_at = (unknown && more).then_some(now + LIST_INTERVAL);
            }
            // The call of a room that is being deleted fails.
            Err(_) if self.outcome.is_some() => {}
            Err(error) => self.add_note(format!(
                "the agent's worker is unknown, because ListDispatch failed: {}",
                quote(&error.to_string())
            )),
        }
    }

    /// Records the worker of the target's agent. LiveKit may list no job although one runs, or no worker.
    fn record_worker(&mut self, dispatches: &[DispatchInfo]) {
        let agent = self.report.agent.as_ref().map(|agent| &*agent.identity);
        let own = own_dispatches(expected_agent(&self.target), dispatches);
        let jobs = own
            .flat_map(|dispatch| &dispatch.jobs)
            .filter(|job| job.identity.is_empty() || agent.is_none_or(|agent| job.is_of(agent)));
        let mut workers = jobs.map(|job| &job.worker).filter(|id| !id.is_empty());
        let Some(worker) = workers.next() else {
            return;
        };
        // Jobs of two workers show who might have taken the room, not who did.
        if workers.all(|other| other == worker) {
            self.report.circumstances.worker = Some(worker.clone());
        }
    }

    /// Blames the agent, unless LiveKit may still report that the caller's speech did not arrive.
    fn judge_final_check(&mut self, now: Instant) {
        let Phase::FinalCheck { duty, .. } = self.phase else {
            return;
        };
        let unproven = duty.needs_uplink() && self.turns.uplink_proof() == UplinkProof::Unreported;
        if !unproven && let Some(listing) = self.final_listing.take() {
            self.blame_agent(duty, &listing, now);
        }
    }

    /// Recognises the target's agent among the agents without a name; returns whether it is one of them.
    fn adopt_agent(&mut self, dispatches: &[DispatchInfo], now: Instant) -> bool {
        let waits = match self.phase {
            Phase::Watching => true,
            Phase::FinalCheck { duty, .. } => duty == AgentDuty::Join,
            _ => false,
        };
        if !waits || self.agent_joined() {
            return false;
        }
        let Some((identity, proof)) = self.own_nameless_agent(dispatches) else {
            return false;
        };
        self.add_note(format!(
            "the agent ({identity}) has no name attribute, and was recognised {proof}: LiveKit sets the attribute from \
             version 1.9.2 on"
        ));
        self.nameless = NamelessAgents {
            join_by: Some(now + ENGINE_GRACE),
            ..NamelessAgents::default()
        };
        self.strays.retain(|stray| stray != NAMELESS);
        self.phase = Phase::Watching;
        self.actions.push(Action::Adopt(identity));
        true
    }

    /// The agent without a name that has a job of our dispatch, or that is the only agent of a room with no other dispatch.
    fn own_nameless_agent(&self, dispatches: &[DispatchInfo]) -> Option<(String, &'static str)> {
        let wanted = expected_agent(&self.target)?;
        let mut jobs = own_dispatches(Some(wanted), dispatches).flat_map(|one| &one.jobs);
        let identities = &self.nameless.identities;
        let by_job = jobs.find_map(|job| identities.iter().find(|identity| job.is_of(identity)));
        if let Some(identity) = by_job {
            return Some((identity.clone(), "by its job"));
        }
        let only_ours = own_dispatches(Some(wanted), dispatches).count() == dispatches.len();
        match (&identities[..], &self.strays[..]) {
            ([identity], [_]) if only_ours && !dispatches.is_empty() => Some((
                identity.clone(),
                "as the only agent of a room with no other dispatch",
            )),
            _ => None,
        }
    }

    /// The identity of the target's agent, if it is in the room and LiveKit hides it from the canary.
    fn hidden_agent(
        &self,
        participants: &[ParticipantBrief],
        dispatches: &[DispatchInfo],
    ) -> Option<String> {
        let wanted = expected_agent(&self.target);
        let names = ["lk.agent_name", "lk.agent.name"];
        let is_ours = |one: &&ParticipantBrief| {
            let mut own = own_dispatches(wanted, dispatches).flat_map(|dispatch| &dispatch.jobs);
            let attributes = &one.attributes;
            wanted.is_none_or(|wanted| {
                let has_name =
                    |key: &&str| attributes.get(*key).is_some_and(|value| value == wanted);
                names.iter().any(has_name) || own.any(|job| job.identity == one.identity)
            })
        };
        let mut hidden = participants
            .iter()
            .filter(|one| one.hidden && one.kind == "AGENT");
        Some(hidden.find(is_ours)?.identity.clone())
    }

    /// What these dispatches show of the target's agent.
    fn listing(&self, dispatches: &[DispatchInfo]) -> DispatchListing {
        let mut own = own_dispatches(expected_agent(&self.target), dispatches).peekable();
        if own.peek().is_none() {
            return DispatchListing::NoDispatch;
        }
        match own.flat_map(|dispatch| &dispatch.jobs).next() {
            Some(job) => DispatchListing::Job(format!("{} {}", job.id, job.status)),
            None => DispatchListing::NoJob,
        }
    }

    fn deleted(&mut self, deletion: Deletion) {
        match deletion {
            Deletion::Deleted { at } => self.mark(Milestone::RoomDeleted, at),
            Deletion::NotDeleted { why } => {
                self.add_note(format!("the room was not deleted: {why}"));
            }
            Deletion::NothingThere => {}
        }
        if self.phase == Phase::Deleting {
            self.phase = Phase::Over;
        }
    }

    // The verdict.

    fn judge_disruption(&mut self, now: Instant) {
        let failure = match self.disruption.clone() {
            Some(Disruption::Duplicate { identity }) => {
                Failure::of_duplicate_agent(&identity, &mut self.report.evidence)
            }
            Some(Disruption::Encrypted(method)) => {
                Failure::of_encrypted_agent(method, &mut self.report.evidence)
            }
            Some(Disruption::Left { at, reason }) if !self.agent_may_have_left() => {
                let after = self.after(Milestone::AgentJoined, at);
                let when = if !self.agent_spoke() {
                    LeftWhen::BeforeSpeech
                } else if self.target.expect.agent_may_leave == AgentMayLeave::Never {
                    LeftWhen::BeforeRoomEnd
                } else {
                    LeftWhen::BeforeReply
                };
                Failure::of_agent_leave(&reason, &after, when, &mut self.report.evidence)
            }
            Some(Disruption::Left { .. }) | None => return,
        };
        self.fail(failure, now);
    }

    fn agent_may_have_left(&self) -> bool {
        let allowed = match self.target.expect.agent_may_leave {
            AgentMayLeave::Never => false,
            AgentMayLeave::AfterSpeech => true,
            AgentMayLeave::AfterReply => self.turns.answered(),
        };
        allowed && self.agent_spoke() && (!self.target.expect.reply || self.turns.answered())
    }

    fn agent_spoke(&self) -> bool {
        self.report.timeline.get(Milestone::AgentSpoke).is_some()
    }

    /// Why LiveKit could not subscribe the canary to audio that the agent publishes.
    fn failed_subscription(&self) -> Option<(String, &'static str)> {
        let is_audio = |sid: &str| {
            let mut tracks = self.tracks.iter();
            tracks.any(|track| track.sid == sid && track.kind == "AUDIO")
        };
        let mut failed = self.failed_subscriptions.iter();
        let (sid, error) = failed.find(|(sid, _)| is_audio(sid))?;
        Some((sid.clone(), *error))
    }

    /// The verdict on an agent that missed the deadline of this duty.
    fn blame_agent(&mut self, duty: AgentDuty, listing: &DispatchListing, now: Instant) {
        let missed = MissedDuty {
            duty,
            limit: self.limit_of(duty),
            listing,
            target: &self.target,
            agent_known: self.agent_known,
            strays: &self.strays,
            subscription: self.failed_subscription(),
            conversation: self.conversation(),
        };
        let failure = match &self.other_room {
            Some(created) if duty == AgentDuty::Join => {
                Failure::of_other_room(created, &mut self.report)
            }
            _ => Failure::of_agent(&missed, &mut self.report),
        };
        self.fail(failure, now);
    }

    /// What is known of the caller's last turn.
    fn conversation(&self) -> Conversation {
        let last = self.turns.last_said();
        let wrong = self.wrong_reply.as_ref();
        Conversation {
            turn: wrong.map_or(self.turns.taken(), |fault| fault.turn),
            interrupts: last.is_some_and(|turn| turn.interrupts),
            overlap: last.is_some_and(|turn| turn.overlap),
            confirmed: self.turns.confirmed(),
            rejected: self.turns.rejected(),
            uplink: self.turns.uplink_proof(),
            wrong: wrong.map(|fault| fault.what.clone()),
            listens: self
                .report
                .timeline
                .get(Milestone::AgentListening)
                .is_some(),
        }
    }

    fn fail(&mut self, failure: Failure, now: Instant) {
        let failure = failure.with_agent_error(self.agent_error.as_deref());
        let failure = match &self.inference_limit {
            Some(reported) => failure.or_inference_limit(reported, &mut self.report.evidence),
            None => failure,
        };
        if failure.reason == Reason::MediaFailed {
            self.note_media_addresses();
        }
        self.decide(Outcome::Failed(failure), now);
    }

    /// A server that announces only an address of its own network is the usual cause of media that never comes up.
    fn note_media_addresses(&mut self) {
        self.add_note(match self.media_addresses.as_slice() {
            [] => "LiveKit named no address for media".to_owned(),
            addresses => format!("LiveKit expects media at {}", addresses.join(", ")),
        });
    }

    /// The first outcome is final.
    fn decide(&mut self, outcome: Outcome, now: Instant) {
        if self.outcome.is_some() {
            return;
        }
        self.decide_join(false);
        self.note_contradiction(now);
        if outcome.failure().is_some() {
            // An agent that is silent or leaves may be cut off, and so may the canary itself.
            self.actions.push(Action::LostSight);
        }
        self.report.outcome = outcome.clone();
        self.outcome = Some(outcome.clone());
        let retry_after = self.report.evidence.retry_after_seconds;
        self.emit(ProbeEvent::OutcomeDecided {
            outcome,
            retry_after: retry_after.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
        });
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

    // Events and evidence.

    fn emit(&mut self, event: ProbeEvent) {
        self.actions.push(Action::Emit(event));
    }

    fn mark(&mut self, milestone: Milestone, at: Instant) {
        if self.report.timeline.mark(milestone, at) {
            self.emit(ProbeEvent::Reached { milestone, at });
        }
    }

    /// The first decision is final.
    fn decide_join(&mut self, joined: bool) {
        if !self.join_decided {
            self.join_decided = true;
            self.emit(ProbeEvent::JoinDecided { joined });
        }
    }

    fn add_note(&mut self, note: String) {
        push_new(&mut self.report.evidence.notes, note);
    }

    /// ` 1.234 s after the dispatch`, or nothing if that is unknown.
    fn after(&self, milestone: Milestone, at: Instant) -> String {
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

/// The dispatches of the agent with this name; all of them if any agent counts.
fn own_dispatches<'a>(
    wanted: Option<&'a str>,
    dispatches: &'a [DispatchInfo],
) -> impl Iterator<Item = &'a DispatchInfo> {
    let all = dispatches.iter();
    all.filter(move |dispatch| wanted.is_none_or(|name| dispatch.agent_name == name))
}

/// Whether a failed call proves that the room's server is alive. A proxy answers 502 to 504, and so does a node that waits
/// in vain for the one that holds the room. What is no error is another server's answer.
fn proves_server_alive(error: &ApiError) -> bool {
    match error {
        ApiError::Refused(rejection) => !matches!(rejection.status, 200..=399 | 502..=504),
        ApiError::Protocol(_) => true,
        ApiError::Unreachable(_) | ApiError::Timeout(_) | ApiError::Broken(_) => false,
    }
}

/// Adds a line that is new, up to [`MAX_ENTRIES`].
fn push_new(list: &mut Vec<String>, line: String) {
    if list.len() < MAX_ENTRIES && !list.contains(&line) {
        list.push(line);
    }
}

fn track_line(track: &RemoteTrackInfo) -> String {
    let name = match track.name.as_str() {
        "" => String::new(),
        name => format!(" \"{name}\""),
    };
    let muted = if track.muted { ", muted" } else { "" };
    let encrypted = match track.encryption {
        "NONE" => String::new(),
        method => format!(", encrypted ({method})"),
    };
    format!(
        "{}: {} from {}{name}{muted}{encrypted}",
        track.identity, track.kind, track.source
    )
}

fn dispatch_line(dispatch: &DispatchInfo) -> String {
    let jobs: Vec<_> = dispatch
        .jobs
        .iter()
        .take(MAX_ENTRIES)
        .map(|job| match job.error.as_str() {
            "" => format!("job {} {}", job.id, job.status),
            error => format!("job {} {} ({})", job.id, job.status, quote(error)),
        })
        .collect();
    let jobs = match jobs.as_slice() {
        [] => "no job".to_owned(),
        jobs => jobs.join(", "),
    };
    let deployment = match dispatch.deployment.as_str() {
        "" => String::new(),
        name => format!(", deployment \"{name}\""),
    };
    let agent = match dispatch.agent_name.as_str() {
        // livekit-server adds it to every room, whether or not such an agent exists.
        "" => "LiveKit's own for unnamed agents".to_owned(),
        name => format!("for agent \"{name}\""),
    };
    format!("{} {agent}{deployment}: {jobs}", dispatch.id)
}

#[cfg(test)]
mod tests;
