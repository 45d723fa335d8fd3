//! What is seen in the room.

use std::time::Duration;

use livekit_protocol::DisconnectReason;
use tokio::time::Instant;

use super::{Action, DispatchCall, Disruption, MAX_ENTRIES, Phase, ProbeMachine, push_new};
use crate::config::DispatchRequest;
use crate::livekit::event::{
    Agent, AudioStats, EndReason, MediaPath, RemoteTrackInfo, RoomEvent, RoomEventKind,
    SessionEvent, Speaker,
};
use crate::probe::verdict::{DispatchListing, ends_call};
use crate::probe::{Failure, Milestone, Reason};

/// LiveKit's name for the kind of participant that agents are.
const AGENT_KIND: &str = "AGENT";

/// An agent without a name, in the words of a detail.
pub(super) const NAMELESS: &str = "one without a name";

/// A server that reports a join this late or later gets a note.
const MIN_NOTED_LAG: Duration = Duration::from_millis(500);

/// An agent that reports speech for this long must have been heard.
const MIN_NOTED_CLAIM: Duration = Duration::from_secs(1);

/// What the agent's session reports about its speech, by the attribute `lk.agent.state`, and what was heard of it.
#[derive(Debug, Default)]
pub(super) struct SpeechClaim {
    state: Option<String>,
    claimed: Stopwatch,
    heard: Stopwatch,
}

impl SpeechClaim {
    fn on_state(&mut self, state: &str, at: Instant) {
        self.state = Some(state.to_owned());
        self.claimed.set(state == "speaking", at);
    }

    /// Whether its last report allows that it has finished.
    pub(super) fn listens(&self) -> bool {
        self.state.as_ref().is_none_or(|state| state == "listening")
    }

    /// How long it reported to speak until `now`; `None` if it reports no states.
    fn spoke_for(&self, now: Instant) -> Option<Duration> {
        self.state.as_ref().map(|_| self.claimed.total(now))
    }
}

/// The sum of several stretches of time.
#[derive(Debug, Default)]
struct Stopwatch {
    since: Option<Instant>,
    before: Duration,
}

impl Stopwatch {
    fn set(&mut self, runs: bool, at: Instant) {
        if runs {
            self.since.get_or_insert(at);
        } else {
            self.before = self.total(at);
            self.since = None;
        }
    }

    /// Zero only if it never ran.
    fn total(&self, now: Instant) -> Duration {
        let current = |since| {
            let passed = now.saturating_duration_since(since);
            passed.max(Duration::from_nanos(1))
        };
        self.before + self.since.map(current).unwrap_or_default()
    }
}

impl ProbeMachine {
    pub(super) fn room_event(&mut self, event: RoomEvent, now: Instant) {
        let at = event.at;
        match event.kind {
            RoomEventKind::Ended { reason, audio } => self.ended(reason, audio, at, now),
            RoomEventKind::Session { identity, event } => {
                self.session_event(&identity, event, at);
            }
            RoomEventKind::UplinkReported(report) => {
                self.turns.uplink_reported(report);
                self.judge_final_check(now);
            }
            RoomEventKind::Transcribed { speaker, segment } => {
                if speaker == Speaker::Caller && self.outcome.is_none() {
                    self.turns.caller_transcribed();
                }
                self.transcript.record(speaker, segment);
            }
            RoomEventKind::MediaConnections(connections) => {
                self.report.evidence.media = connections;
            }
            RoomEventKind::TrackChanged(track) => self.track_changed(track),
            RoomEventKind::SubscriptionFailed { track_sid, error } => {
                self.subscription_failed(track_sid, error);
            }
            kind if self.outcome.is_some() || matches!(self.phase, Phase::FinalCheck { .. }) => {
                self.after_verdict(kind, at);
            }
            kind => self.before_verdict(kind, at, now),
        }
    }

    fn signal_connected(&mut self, room_sid: String, at: Instant) {
        self.mark(Milestone::SignalConnected, at);
        // The join response answers the request that named the agent. If none was named, nothing was accepted.
        let facts = self.facts();
        if facts.request == DispatchRequest::Join && facts.names_agent {
            self.mark(Milestone::DispatchAccepted, at);
        }
        self.joined_room(room_sid);
    }

    fn server_known(&mut self, version: &str, region: String, node: String) {
        let named = if region.is_empty() {
            "unnamed"
        } else {
            &region
        };
        self.add_note(format!(
            "joined LiveKit {version}, region {named}, node {node}"
        ));
        let circumstances = &mut self.report.circumstances;
        circumstances.node = Some(node).filter(|node| !node.is_empty());
        circumstances.region = Some(region).filter(|region| !region.is_empty());
    }

    fn before_verdict(&mut self, kind: RoomEventKind, at: Instant, now: Instant) {
        match kind {
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
                self.signal_connected(room_sid, at);
                self.server_known(&server_version, region, node);
            }
            RoomEventKind::MediaAddress(address) => push_new(&mut self.media_addresses, address),
            RoomEventKind::MediaConnected { path } => {
                self.report.circumstances.media_path = path;
                self.mark(Milestone::MediaConnected, at);
            }
            RoomEventKind::UdpBlocked => self.note_blocked_udp(),
            RoomEventKind::MediaNote(note) => self.add_note(note),
            RoomEventKind::CallerPublished => self.mark(Milestone::CallerPublished, at),
            RoomEventKind::AgentJoined {
                agent,
                in_join_response,
            } => self.agent_joined_at(agent, in_join_response, at),
            RoomEventKind::NamelessAgent { identity } => {
                if self.nameless.identities.len() < MAX_ENTRIES {
                    self.nameless.identities.push(identity);
                }
                self.nameless.list_at.get_or_insert(at);
            }
            RoomEventKind::AgentConnected => self.report_connections(),
            RoomEventKind::AgentState(state) => {
                if state == "listening" {
                    self.mark(Milestone::AgentListening, at);
                }
                self.claim.on_state(&state, at);
                self.record_session(&SessionEvent::AgentState(state), at);
            }
            RoomEventKind::AgentVersion(version) => {
                self.report.circumstances.agent_version = Some(version);
            }
            RoomEventKind::AgentTrackSubscribed => {
                self.mark(Milestone::AgentTrackSubscribed, at);
            }
            RoomEventKind::AgentVoiceSource(source) => self.add_note(format!(
                "the agent speaks on a track of source {source}: publish its voice as MICROPHONE, or clients may not treat it as \
                 speech"
            )),
            RoomEventKind::AgentEncrypted(method) => {
                self.disruption.get_or_insert(Disruption::Encrypted(method));
            }
            RoomEventKind::AgentFirstAudio => self.mark(Milestone::AgentFirstAudio, at),
            RoomEventKind::SpeechStarted
            | RoomEventKind::SpeechEnded
            | RoomEventKind::SpeechLevel(_)
            | RoomEventKind::CallerStarted(_)
            | RoomEventKind::CallerEnded { .. } => self.spoken(&kind, at, now),
            RoomEventKind::AgentLeft { reason } => {
                self.note_departure(&reason);
                self.turns.close();
                // If a room closes, this can come before the canary's own `Leave`, and then ends the probe.
                if self.agent_may_have_left() && ends_call(&reason) {
                    self.note_end_of_call(&reason);
                }
                let left = Disruption::Left { at, reason };
                self.disruption.get_or_insert(left);
            }
            RoomEventKind::AgentDuplicate { identity } => {
                self.duplicate_joined();
                let duplicate = Disruption::Duplicate { identity };
                self.disruption.get_or_insert(duplicate);
            }
            RoomEventKind::OtherJoined {
                identity,
                kind,
                agent_name,
            } => self.other_joined(&identity, &kind, agent_name.as_deref()),
            RoomEventKind::Session { .. }
            | RoomEventKind::Transcribed { .. }
            | RoomEventKind::UplinkReported(_)
            | RoomEventKind::MediaConnections(_)
            | RoomEventKind::TrackChanged(_)
            | RoomEventKind::SubscriptionFailed { .. }
            | RoomEventKind::Ended { .. } => unreachable!("room_event handles them"),
        }
    }

    fn note_blocked_udp(&mut self) {
        let path = match self.report.circumstances.media_path {
            Some(MediaPath::RelayUdp) => "a TURN server over UDP",
            Some(MediaPath::RelayTcp) => "a TURN server over TCP",
            Some(MediaPath::RelayTls) => "a TURN server over TLS",
            _ => "TCP",
        };
        self.add_note(format!(
            "media runs over {path} because UDP does not get through: check the firewalls between this machine and \
             LiveKit's media ports"
        ));
    }

    /// What the agent and the caller say.
    fn spoken(&mut self, kind: &RoomEventKind, at: Instant, now: Instant) {
        match kind {
            RoomEventKind::SpeechStarted => {
                self.mark(Milestone::AgentSpoke, at);
                self.claim.heard.set(true, at);
                self.turns.speech_started(at);
            }
            RoomEventKind::SpeechEnded => {
                self.claim.heard.set(false, at);
                self.turns.speech_ended(at);
            }
            RoomEventKind::SpeechLevel(level) => {
                let tenths = (f64::from(*level) * 10.0).round();
                self.report.evidence.speech_level_dbfs = Some(tenths / 10.0);
            }
            RoomEventKind::CallerStarted(what) => self.caller_started(*what, at, now),
            RoomEventKind::CallerEnded { sent } => self.turns.caller_ended(*sent, at),
            _ => unreachable!("before_verdict passes on nothing else"),
        }
    }

    /// The verdict is final; what may help a person is noted.
    fn after_verdict(&mut self, kind: RoomEventKind, at: Instant) {
        match kind {
            RoomEventKind::AgentDuplicate { .. } => self.duplicate_joined(),
            RoomEventKind::AgentConnected => self.report_connections(),
            RoomEventKind::AgentLeft { reason } => self.note_departure(&reason),
            RoomEventKind::AgentJoined { agent, .. } => {
                self.report.other_agents += 1;
                self.record_participant(&agent.identity, AGENT_KIND, agent.name.as_deref());
                let after = self.after(Milestone::DispatchSent, at);
                self.add_note(format!(
                    "the agent ({}) joined{after}, too late to count",
                    agent.identity
                ));
            }
            RoomEventKind::AgentTrackSubscribed => {
                let after = self.after(Milestone::AgentJoined, at);
                self.add_note(format!(
                    "the agent's audio track arrived{after}, too late to count"
                ));
            }
            RoomEventKind::SpeechStarted if !self.agent_spoke() => {
                let after = self.after(Milestone::AgentJoined, at);
                self.add_note(format!("the agent spoke{after}, too late to count"));
            }
            RoomEventKind::OtherJoined {
                identity,
                kind,
                agent_name,
            } => self.other_joined(&identity, &kind, agent_name.as_deref()),
            _ => {}
        }
    }

    /// If the id is not the one that CreateRoom returned, LiveKit has two rooms of this name, and the agent goes to the other
    /// one. LiveKit Cloud may send the id later; then the join response has none.
    fn joined_room(&mut self, sid: String) {
        if sid.is_empty() {
            return;
        }
        let created = self.report.room_sid.replace(sid);
        self.other_room = created.filter(|created| {
            !created.is_empty() && self.report.room_sid.as_ref() != Some(created)
        });
    }

    // Agents.

    fn agent_joined_at(&mut self, agent: Agent, in_join_response: bool, at: Instant) {
        self.record_participant(&agent.identity, AGENT_KIND, agent.name.as_deref());
        if self.agent_joined() {
            return;
        }
        let precedes_join = self.facts().request.precedes_join();
        if !precedes_join && self.dispatch == DispatchCall::NotSent {
            self.add_note("the agent was in the room before it was dispatched".to_owned());
        }
        // It joined between the dispatch and the canary's own join, when the canary could not see it.
        self.report.join_upper_bound = in_join_response && precedes_join;
        let joined = self.join_time(&agent, at);
        self.report.agent = Some(agent);
        self.mark(Milestone::AgentJoined, joined);
        self.decide_join(true);
    }

    /// When an agent that was first seen at `seen` joined, by the server's own stamp.
    ///
    /// LiveKit reports a participant that publishes nothing and changes no attribute with the next batch of updates, up to
    /// three seconds later (`subscriberUpdateInterval` in livekit-server's room.go). The agent does not cause that delay. A
    /// stamp from before the dispatch comes from a wrong clock. Of an upper bound, only the bound was measured.
    fn join_time(&mut self, agent: &Agent, seen: Instant) -> Instant {
        // Unknown while the dispatch call is under way. Then only the first sight is certain to come after it.
        let dispatched = self.report.timeline.get(Milestone::DispatchSent);
        let stamp = agent
            .joined
            .filter(|joined| dispatched.is_some_and(|at| at <= *joined));
        let joined = match stamp {
            Some(joined) if !self.report.join_upper_bound => joined.min(seen),
            _ => return seen,
        };
        let lag = seen - joined;
        if lag >= MIN_NOTED_LAG {
            self.add_note(format!(
                "LiveKit reported the agent {:.3} s after it had joined",
                lag.as_secs_f64()
            ));
        }
        joined
    }

    /// An agent that did not leave by itself was cut off, and comes back to the room even if it is deleted meanwhile.
    fn note_departure(&mut self, reason: &str) {
        let by_itself = DisconnectReason::from_str_name(reason)
            .is_some_and(|reason| reason == DisconnectReason::ClientInitiated);
        if !by_itself {
            self.actions.push(Action::LostSight);
        }
    }

    fn duplicate_joined(&mut self) {
        self.report.other_agents += 1;
        self.has_duplicate = true;
        self.report_connections();
    }

    fn report_connections(&mut self) {
        let all_connected = !self.has_duplicate;
        self.actions.push(Action::AgentsConnected(all_connected));
    }

    /// Notes where the agent's session contradicts what the canary heard. Call it before the verdict.
    pub(super) fn note_contradiction(&mut self, now: Instant) {
        let Some(claimed) = self.claim.spoke_for(now) else {
            return;
        };
        let heard = self.claim.heard.total(now);
        if self.agent_spoke() && claimed.is_zero() {
            self.add_note(
                "the canary heard a voice, but the agent's session never reported that it speaks: what was heard may be \
                 another sound on its track, such as music"
                    .to_owned(),
            );
        } else if claimed > heard * 2 + MIN_NOTED_CLAIM {
            self.add_note(format!(
                "the agent's session reported that it spoke for {:.1} s, but the canary heard {:.1} s of speech: check its TTS \
                 and its audio output. If its voice is quiet, lower speech.threshold_dbfs ({})",
                claimed.as_secs_f64(),
                heard.as_secs_f64(),
                self.target.speech.threshold_dbfs
            ));
        }
    }

    // Other participants.

    fn other_joined(&mut self, identity: &str, kind: &str, agent_name: Option<&str>) {
        self.record_participant(identity, kind, agent_name);
        if kind == AGENT_KIND {
            let stray = agent_name.map_or(NAMELESS.to_owned(), |name| format!("\"{name}\""));
            push_new(&mut self.strays, stray);
        }
    }

    fn track_changed(&mut self, track: RemoteTrackInfo) {
        match self.tracks.iter().position(|it| it.sid == track.sid) {
            Some(known) => self.tracks[known] = track,
            None if self.tracks.len() < MAX_ENTRIES => self.tracks.push(track),
            None => {}
        }
    }

    fn subscription_failed(&mut self, track_sid: String, error: &'static str) {
        self.add_note(format!(
            "LiveKit could not subscribe the canary to track {track_sid} ({error})"
        ));
        if self.failed_subscriptions.len() < MAX_ENTRIES {
            self.failed_subscriptions.push((track_sid, error));
        }
    }

    pub(super) fn record_participant(
        &mut self,
        identity: &str,
        kind: &str,
        agent_name: Option<&str>,
    ) {
        let name = agent_name.map(|name| format!(", agent name \"{name}\""));
        let line = format!("{identity} ({kind}{})", name.unwrap_or_default());
        push_new(&mut self.report.evidence.participants, line);
    }

    // The end of the canary's own participant.

    /// Whether the canary was sent away after the agent was allowed to end the call. The probe is then ok: an agent ends a
    /// call by deleting its room (`EndCallTool` and `delete_room_on_close` of livekit-agents), or by removing its caller.
    fn agent_ended_call(&mut self, why: &EndReason, at: Instant) -> bool {
        let EndReason::Removed { reason } = why else {
            return false;
        };
        let in_call = self.phase == Phase::Watching && self.agent_may_have_left();
        if !in_call || !ends_call(reason) {
            return false;
        }
        self.note_end_of_call(reason);
        let reason = reason.clone();
        self.disruption
            .get_or_insert(Disruption::Left { at, reason });
        true
    }

    fn note_end_of_call(&mut self, reason: &str) {
        self.add_note(format!(
            "the call ended ({reason}) when the agent was allowed to end it"
        ));
    }

    fn ended(&mut self, reason: EndReason, audio: AudioStats, at: Instant, now: Instant) {
        self.in_room = false;
        self.report.audio = audio;
        if matches!(reason, EndReason::Left) {
            self.mark(Milestone::Left, at);
        } else {
            // Also after the verdict: what happens in the room from now on is unknown.
            self.actions.push(Action::LostSight);
        }
        if self.outcome.is_some() {
            return;
        }
        self.turns.close();
        if self.agent_ended_call(&reason, at) {
            return;
        }
        let timeline = &self.report.timeline;
        let joined = timeline.get(Milestone::SignalConnected).is_some();
        let failure = Failure::of_end(reason, joined, &mut self.report.evidence);
        let failure = if joined {
            failure
        } else {
            failure.or_large_token(self.token_bytes, &self.report.evidence)
        };
        if let Phase::FinalCheck { duty, .. } = self.phase
            && !matches!(failure.reason, Reason::SignalLost | Reason::MediaFailed)
        {
            // The agent missed its deadline before the end came, and the canary's own way was still good.
            self.add_note(failure.detail);
            self.blame_agent(duty, &DispatchListing::Unknown, now);
        } else {
            self.fail(failure, now);
        }
    }
}
