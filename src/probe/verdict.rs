//! What a failure means: every function that returns a [`Failure`].
//!
//! Each chooses the reason, writes the detail for a person, and records in the evidence what the detail rests on.

use std::time::Duration;

use livekit_protocol::{DisconnectReason, SubscriptionError};

use super::ProbeReport;
use super::reason::{Evidence, Failure, LimitKind, Reason};
use super::timeline::Milestone;
use super::turns::{Contradiction, UplinkProof};
use crate::config::{DispatchRequest, Target};
use crate::livekit::event::{EndReason, MediaPermission, NOT_PERMITTED};
use crate::livekit::wire::api::ApiError;
use crate::livekit::wire::connect::ConnectError;
use crate::livekit::wire::request::HttpRejection;
use crate::livekit::wire::signal::SignalError;

/// Characters of a server's text that a `detail` quotes at most; the evidence holds more.
const MAX_QUOTE: usize = 200;

/// Maximum length of the cause of a media failure, which may name two TURN servers and what each of them answered.
const MAX_MEDIA_DETAIL: usize = 700;

/// What many proxies and load balancers accept of a request's headers by default, in bytes.
pub const USUAL_HEADER_BYTES: usize = 8 * 1024;

/// What LiveKit Cloud answers to a call of the server API in a region that the project is not pinned to. Upstream's mock
/// mirrors it (`regionPinStatus` in livekit-server's `cmd/test-server/config.go`).
pub(super) const REGION_PIN: u16 = 451;
/// What it answers to the signal connection there.
const REGION_PIN_AT_JOIN: u16 = 403;

/// A call of the server API whose failure ends the probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProbeCall {
    CreateRoom,
    CreateDispatch,
}

impl ProbeCall {
    fn step(self) -> &'static str {
        match self {
            Self::CreateRoom => "create_room",
            Self::CreateDispatch => "dispatch",
        }
    }

    fn method(self) -> &'static str {
        match self {
            Self::CreateRoom => "CreateRoom",
            Self::CreateDispatch => "CreateDispatch",
        }
    }

    fn reason(self) -> Reason {
        match self {
            Self::CreateRoom => Reason::RoomCreateFailed,
            Self::CreateDispatch => Reason::DispatchFailed,
        }
    }
}

/// What the agent owed by a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AgentDuty {
    Join,
    Track,
    Speech,
    /// A pause that lets the caller speak.
    Pause,
    Reply,
    /// The reply that is expected.
    Words,
    /// Silence after an interruption.
    Yield,
}

impl AgentDuty {
    fn step(self) -> &'static str {
        match self {
            Self::Join => "agent_join",
            Self::Track => "agent_track",
            Self::Speech => "agent_speech",
            Self::Pause | Self::Reply | Self::Words => "agent_reply",
            Self::Yield => "agent_yield",
        }
    }

    /// The agent can only do this if it heard the caller.
    pub(super) fn needs_uplink(self) -> bool {
        match self {
            Self::Join | Self::Track | Self::Speech | Self::Pause => false,
            Self::Reply | Self::Words | Self::Yield => true,
        }
    }
}

/// What `ListDispatch` showed of the target's dispatch after the agent missed a deadline.
#[derive(Debug)]
pub(super) enum DispatchListing {
    /// The call failed.
    Unknown,
    NoDispatch,
    /// Dispatched, but no worker is known to have accepted the job.
    NoJob,
    /// A worker accepted this job.
    Job(String),
}

/// An agent that missed a deadline, and what is known about it.
pub(super) struct MissedDuty<'a> {
    pub(super) duty: AgentDuty,
    pub(super) limit: Duration,
    pub(super) listing: &'a DispatchListing,
    pub(super) target: &'a Target,
    /// An agent has joined under the target's name before.
    pub(super) agent_known: bool,
    /// Names of other agents that joined, quoted.
    pub(super) strays: &'a [String],
    /// A track of the agent's audio to which LiveKit could not subscribe the canary, and its error.
    pub(super) subscription: Option<(String, &'static str)>,
    pub(super) conversation: Conversation,
}

/// What is known of the caller's last turn.
#[derive(Debug)]
pub(super) struct Conversation {
    /// The number of the turn, from 1.
    pub(super) turn: usize,
    /// The caller spoke into a reply.
    pub(super) interrupts: bool,
    /// The agent and the caller spoke at the same time.
    pub(super) overlap: bool,
    /// Whether the agent's session reported that it heard the caller; `None` if it reports nothing.
    pub(super) confirmed: Option<bool>,
    /// Why what the agent said after the caller was no reply.
    pub(super) rejected: Option<Contradiction>,
    pub(super) uplink: UplinkProof,
    /// What is wrong with the reply.
    pub(super) wrong: Option<String>,
    /// The agent's session reported that it listens.
    pub(super) listens: bool,
}

impl MissedDuty<'_> {
    /// ` in turn 2 of 3`, or nothing if there is only one.
    fn of_turn(&self) -> String {
        match self.target.caller.turns {
            0 | 1 => String::new(),
            turns => format!(" in turn {} of {turns}", self.conversation.turn),
        }
    }
}

/// When in its call an agent left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(
    clippy::enum_variant_names,
    reason = "each names what the agent left before"
)]
pub(super) enum LeftWhen {
    BeforeSpeech,
    BeforeReply,
    BeforeRoomEnd,
}

/// How far the canary's own media was when `deadlines.media` passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MediaState {
    Published,
    ConnectedOnly,
    Neither,
}

// The canary itself.

impl Failure {
    fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }

    /// The outcome of a probe until it has another.
    pub(super) fn unfinished() -> Self {
        Self::new(
            Reason::Internal,
            "the probe did not come to an end: a fault of the canary",
        )
    }

    /// A panic, or an error of an engine.
    pub(super) fn of_own_fault(message: &str) -> Self {
        let message = quote(message);
        Self::new(
            Reason::Internal,
            format!("the canary itself failed: {message}"),
        )
    }

    /// This process did not run for this long.
    pub(super) fn of_stall(time: Duration) -> Self {
        Self::new(
            Reason::Internal,
            format!(
                "the canary itself did not run for {:.1} s of this call, so the call shows nothing about the agent. Check \
                 whether this process was stopped, its machine was suspended or stalled, or it got too little CPU.",
                time.as_secs_f64()
            ),
        )
    }

    pub(super) fn of_missing_caller_turn() -> Self {
        Self::new(
            Reason::Internal,
            "the canary's caller did not speak when it was its turn: a fault of the canary",
        )
    }
}

// The server API.

impl Failure {
    /// What a failed call of the server API means.
    pub(super) fn of_api(call: ProbeCall, error: &ApiError, evidence: &mut Evidence) -> Self {
        evidence.step = Some(call.step());
        let method = call.method();
        match error {
            ApiError::Unreachable(error) => Self::unreachable(error),
            ApiError::Refused(rejection) => {
                evidence.record_answer(rejection);
                Self::of_refused_call(call, rejection)
            }
            ApiError::Timeout(limit) => {
                evidence.deadline_seconds = Some(limit.as_secs_f64());
                let detail = format!(
                    "{method} had no answer within {limit:?}: LiveKit is overloaded or hangs. Check its status and load."
                );
                Self::new(call.reason(), detail)
            }
            ApiError::Broken(_) | ApiError::Protocol(_) => {
                let error = quote(&error.to_string());
                let detail = format!(
                    "{method} failed: {error}. Check LiveKit and any proxy in front of it."
                );
                Self::new(call.reason(), detail)
            }
        }
    }

    fn of_refused_call(call: ProbeCall, rejection: &HttpRejection) -> Self {
        let answer = summary(rejection);
        let method = call.method();
        if let Some(kind) = api_limit(rejection) {
            let what = format!("LiveKit refused {method} because of a limit: {answer}");
            return Self::limit(kind, &what, rejection);
        }
        match (rejection.status, rejection.twirp_code.as_deref()) {
            (200..=399, _) => Self::of_other_server(method, rejection),
            (REGION_PIN, _) => Self::region_pinned(method, &answer),
            (401 | 403, _) | (_, Some("unauthenticated" | "permission_denied")) => {
                Self::auth_rejected(method, rejection)
            }
            // CreateRoom has just succeeded, so no setting explains that the room is unknown.
            (_, Some("not_found")) if call == ProbeCall::CreateDispatch => Self::new(
                call.reason(),
                format!("{method} failed: {answer}. Check who deletes rooms of this project."),
            ),
            (404, _) | (_, Some("not_found" | "bad_route")) => Self::new(
                Reason::ConfigRejected,
                format!(
                    "the server does not know {method}: {answer}. Check the project's url, including its path."
                ),
            ),
            _ => Self::new(
                call.reason(),
                format!("LiveKit refused {method}: {answer}. Check its status and log."),
            ),
        }
    }

    /// `CreateDispatch` was still under way when `deadlines.join` passed.
    pub(super) fn of_slow_dispatch(limit: Duration, evidence: &mut Evidence) -> Self {
        evidence.record_deadline("dispatch", limit);
        Self::new(
            Reason::DispatchFailed,
            format!(
                "CreateDispatch had no answer within {limit:?}, and no agent joined. Check LiveKit's status and load."
            ),
        )
    }
}

// The signal connection.

impl Failure {
    /// What a signal connection that failed before the join response means.
    pub(super) fn of_join(error: &SignalError, evidence: &mut Evidence) -> Self {
        evidence.step = Some("signal");
        match error {
            SignalError::Unreachable(error) => Self::unreachable(error),
            SignalError::Refused(rejection) => {
                evidence.record_answer(rejection);
                Self::of_refused_join(rejection)
            }
            SignalError::JoinTimeout(limit) => Self::of_slow_join(*limit, evidence),
            SignalError::LeftBeforeJoin { reason } => Self::of_leave_before_join(reason, evidence),
            SignalError::PingTimeout(_) | SignalError::Closed(_) | SignalError::Protocol(_) => {
                let error = quote(&error.to_string());
                let detail = format!("joining failed: {error}. Check LiveKit's status and log.");
                Self::new(Reason::SignalFailed, detail)
            }
        }
    }

    pub(super) fn of_slow_join(limit: Duration, evidence: &mut Evidence) -> Self {
        evidence.record_deadline("signal", limit);
        Self::new(
            Reason::SignalFailed,
            format!(
                "LiveKit sent no join response within {limit:?}. Check its load, and any proxy that may hold WebSockets back."
            ),
        )
    }

    fn of_refused_join(rejection: &HttpRejection) -> Self {
        let answer = summary(rejection);
        if rejection.status == 429 {
            let what =
                format!("LiveKit refused the signal connection because of a limit: {answer}");
            return Self::limit(LimitKind::Connections, &what, rejection);
        }
        if names_node_limit(rejection) {
            let what = format!("the LiveKit node is full: {answer}");
            return Self::limit(LimitKind::Node, &what, rejection);
        }
        match rejection.status {
            200..=399 => Self::of_other_server("the signal connection", rejection),
            401 => Self::auth_rejected("the signal connection", rejection),
            // livekit-server answers a token that it does not accept with 401.
            REGION_PIN_AT_JOIN => Self::region_pinned("the signal connection", &answer),
            404 if !rejection.message.contains("room does not exist") => Self::new(
                Reason::ConfigRejected,
                format!(
                    "the server has no signal endpoint: {answer}. Check the project's url, including its path, and that proxies \
                     in front of LiveKit pass the headers Upgrade and Connection on: LiveKit answers 404 without them."
                ),
            ),
            426 => Self::new(
                Reason::ConfigRejected,
                format!(
                    "the signal connection did not become a WebSocket: {answer}. Check that proxies in front of LiveKit pass \
                     the headers Upgrade and Connection on."
                ),
            ),
            _ => Self::new(
                Reason::SignalFailed,
                format!(
                    "LiveKit refused the signal connection: {answer}. Check its status and log."
                ),
            ),
        }
    }

    /// `self`, or the size of the join token that explains it: the token is a header of the request.
    pub(super) fn or_large_token(self, bytes: usize, evidence: &Evidence) -> Self {
        if self.reason != Reason::SignalFailed || bytes <= USUAL_HEADER_BYTES {
            return self;
        }
        // 494 is nginx's own status for a header that is too large; it sends 400 instead. haproxy sends 400, too.
        let refused = matches!(evidence.http_status, Some(400 | 413 | 414 | 431 | 494));
        let reason = if refused {
            Reason::ConfigRejected
        } else {
            self.reason
        };
        Self::new(
            reason,
            format!(
                "{} The join token has {bytes} bytes, and many proxies accept only {USUAL_HEADER_BYTES} bytes of a header. Shorten \
                 the metadata and the attributes that it carries, or set dispatch.mode to \"explicit\" or \"room\".",
                self.detail
            ),
        )
    }

    fn of_leave_before_join(reason: &str, evidence: &mut Evidence) -> Self {
        evidence.answer = Some(format!("Leave {reason}"));
        match DisconnectReason::from_str_name(reason) {
            Some(DisconnectReason::JoinFailure) => Self::new(
                Reason::PlanLimit(LimitKind::Room),
                "LiveKit did not admit the canary to the room (Leave JOIN_FAILURE before the join response). \
                 Check the limits on participants and rooms.",
            ),
            _ => match Self::of_leave(reason) {
                removed if removed.reason == Reason::Removed => removed,
                _ => Self::new(
                    Reason::SignalFailed,
                    format!(
                        "LiveKit sent Leave ({reason}) before the join response. Check its status and log."
                    ),
                ),
            },
        }
    }

    /// What a signal connection that broke after the join response means.
    pub(super) fn of_lost_signal(error: &SignalError, evidence: &mut Evidence) -> Self {
        evidence.step = Some("signal");
        if let SignalError::PingTimeout(limit) = error {
            evidence.deadline_seconds = Some(limit.as_secs_f64());
        }
        let error = quote(&error.to_string());
        Self::new(
            Reason::SignalLost,
            format!(
                "{error}. Check whether that LiveKit server was killed or restarted, or hangs."
            ),
        )
    }

    /// What the server's `Leave` after the join response means.
    ///
    /// livekit-server gives these reasons: `CONNECTION_TIMEOUT` if a peer connection broke, `JOIN_FAILURE` if media never
    /// came up, `STATE_MISMATCH` for its own failed negotiations.
    pub(super) fn of_leave(reason: &str) -> Self {
        use DisconnectReason as D;
        match DisconnectReason::from_str_name(reason) {
            Some(D::RoomDeleted | D::RoomClosed) => Self::new(
                Reason::Removed,
                format!(
                    "the room was closed during the probe ({reason}). Check who deletes rooms of this project. \
                     If the agent ends its calls this way, set expect.agent_may_leave."
                ),
            ),
            Some(D::ParticipantRemoved) => Self::new(
                Reason::Removed,
                format!(
                    "another program removed the echo participant ({reason}). Check who moderates rooms of this project."
                ),
            ),
            Some(D::DuplicateIdentity) => Self::new(
                Reason::Removed,
                format!(
                    "another participant joined under the echo participant's identity ({reason}). \
                     Check what else joins canary rooms."
                ),
            ),
            Some(D::ConnectionTimeout | D::JoinFailure | D::MediaFailure) => Self::new(
                Reason::MediaFailed,
                format!(
                    "LiveKit lost the canary's media connection ({reason}). \
                     Check UDP and TCP between this machine and LiveKit's media ports."
                ),
            ),
            _ => Self::new(
                Reason::SignalLost,
                format!(
                    "LiveKit ended the session ({reason}). Check whether it was restarted or drained."
                ),
            ),
        }
    }
}

// The canary's participant and its media.

impl Failure {
    /// What it means that the participant ended by itself; `joined`: after the join response.
    pub(super) fn of_end(why: EndReason, joined: bool, evidence: &mut Evidence) -> Self {
        match why {
            EndReason::Left => Self::new(
                Reason::Internal,
                "the participant left without a request: a fault of the canary",
            ),
            EndReason::Signal(error) if joined => Self::of_lost_signal(&error, evidence),
            EndReason::Signal(error) => Self::of_join(&error, evidence),
            EndReason::Removed { reason } => {
                evidence.answer = Some(format!("Leave {reason}"));
                Self::of_leave(&reason)
            }
            EndReason::Revoked(permission) => {
                evidence.step = Some("permission");
                let right = match permission {
                    MediaPermission::Publish => "to publish",
                    MediaPermission::Subscribe => "to subscribe",
                };
                Self::new(
                    Reason::Removed,
                    format!(
                        "another program revoked the echo participant's right {right}. \
                         Check who changes permissions in rooms of this project."
                    ),
                )
            }
            EndReason::PublishFailed(why) => {
                evidence.step = Some("publish");
                let why = quote(&why);
                Self::new(
                    Reason::PublishFailed,
                    format!("the echo track was not published: {why}. Check LiveKit's log."),
                )
            }
            EndReason::MediaFailed { transport, detail } => {
                evidence.step = Some("media");
                let detail = one_line(&detail, MAX_MEDIA_DETAIL);
                Self::new(
                    Reason::MediaFailed,
                    format!(
                        "the {transport} transport failed: {detail}. \
                         Check UDP and TCP between this machine and LiveKit's media ports."
                    ),
                )
            }
            EndReason::Internal(why) => Self::of_own_fault(&why),
        }
    }

    /// `deadlines.media` passed before the canary's media was up.
    pub(super) fn of_slow_media(
        state: MediaState,
        limit: Duration,
        evidence: &mut Evidence,
    ) -> Self {
        let (step, reason, detail) = match state {
            MediaState::Published => (
                "media",
                Reason::MediaFailed,
                format!(
                    "ICE and DTLS were not up within {limit:?} of the join response. \
                     Check UDP and TCP between this machine and LiveKit's media ports."
                ),
            ),
            MediaState::ConnectedOnly => (
                "publish",
                Reason::PublishFailed,
                format!(
                    "LiveKit did not acknowledge the echo track within {limit:?} of the join response. Check its log."
                ),
            ),
            // Media needs LiveKit's answers, too. So this does not show that the network is at fault.
            MediaState::Neither => (
                "publish",
                Reason::PublishFailed,
                format!(
                    "LiveKit did not acknowledge the echo track within {limit:?} of the join response, \
                     and media did not come up either. Check whether that LiveKit server hangs."
                ),
            ),
        };
        evidence.record_deadline(step, limit);
        Self::new(reason, detail)
    }
}

// The agent.

impl Failure {
    /// The verdict on an agent that missed a deadline.
    pub(super) fn of_agent(missed: &MissedDuty<'_>, report: &mut ProbeReport) -> Self {
        if missed.duty.needs_uplink()
            && let Some(failure) = Self::of_uplink(missed, &mut report.evidence)
        {
            return failure;
        }
        let limit = missed.limit;
        report.evidence.record_deadline(missed.duty.step(), limit);
        match missed.duty {
            AgentDuty::Join => Self::of_absent_agent(missed),
            AgentDuty::Track => Self::of_missing_track(missed),
            AgentDuty::Speech => Self::of_silent_agent(missed, report),
            AgentDuty::Pause => Self::new(
                Reason::AgentNoReply,
                format!(
                    "the agent talked for {limit:?} without a pause in which the caller could speak. Check its greeting. If it \
                     needs longer, raise deadlines.agent_turn. If music plays on the track of its voice, play it on another track."
                ),
            ),
            AgentDuty::Reply => Self::of_missing_reply(missed),
            AgentDuty::Words => Self::new(
                Reason::AgentWrongReply,
                format!(
                    "{}{}. Check its transcript (transcript = true), its LLM and its tools.",
                    missed
                        .conversation
                        .wrong
                        .as_deref()
                        .unwrap_or("the agent's reply was not as expected"),
                    missed.of_turn(),
                ),
            ),
            AgentDuty::Yield => Self::new(
                Reason::AgentNotYielding,
                format!(
                    "the agent spoke on for more than {limit:?} after the caller interrupted it. Check whether it allows \
                     interruptions, its voice activity detection and its turn detection."
                ),
            ),
        }
    }

    fn of_silent_agent(missed: &MissedDuty<'_>, report: &ProbeReport) -> Self {
        let limit = missed.limit;
        let packets = match report.timeline.get(Milestone::AgentFirstAudio) {
            Some(_) => "its track carried audio packets, but no speech in them",
            None => "no audio packet arrived on its track",
        };
        let before = if report.join_upper_bound {
            " It joined before the canary, and may have spoken before the canary could hear it."
        } else {
            ""
        };
        let waits = if missed.conversation.listens {
            " If it waits for the caller to speak first, set caller.mode to \"script\" and caller.speaks_first to true."
        } else {
            ""
        };
        Self::new(
            Reason::AgentSilent,
            format!(
                "the agent did not speak within {limit:?} of joining: {packets}.{before} Check its greeting and its TTS.{waits}"
            ),
        )
    }

    fn of_missing_reply(missed: &MissedDuty<'_>) -> Self {
        let limit = missed.limit;
        let conversation = &missed.conversation;
        let what = if conversation.interrupts {
            "the caller's interruption".to_owned()
        } else {
            format!("the caller{}", missed.of_turn())
        };
        let voice = match conversation.rejected {
            Some(Contradiction::NotHeard) => {
                " It spoke, but that was no answer: its session reported nothing of the caller."
            }
            Some(Contradiction::Error) => {
                " It spoke, but that was no answer: its session reported an error, and did not recover."
            }
            Some(Contradiction::Unconfirmed) => {
                " It spoke, but it had begun while the caller was still speaking, and nothing shows that it heard the caller."
            }
            None if conversation.overlap => " It spoke at the same time as the caller.",
            None => "",
        };
        let (heard, check) = match conversation.confirmed {
            Some(true) => (
                "Its session reported that it heard the caller.",
                "Check its turn detection, LLM and TTS.",
            ),
            Some(false) => (
                "LiveKit received the caller's speech, but the agent's session reported nothing of it.",
                "Check its audio input, voice activity detection and STT.",
            ),
            None => (
                "LiveKit received the caller's speech.",
                "Check its STT, turn detection, LLM and TTS.",
            ),
        };
        Self::new(
            Reason::AgentNoReply,
            format!("the agent did not answer {what} within {limit:?}.{voice} {heard} {check}"),
        )
    }

    /// The caller's speech did not reach LiveKit, or nothing shows that it did. Then the agent is not at fault.
    fn of_uplink(missed: &MissedDuty<'_>, evidence: &mut Evidence) -> Option<Self> {
        let what = match missed.conversation.uplink {
            // The agent heard the caller, whatever the reports say.
            _ if missed.conversation.confirmed == Some(true) => return None,
            UplinkProof::Received => return None,
            UplinkProof::Lost { lost, of } => format!("{lost} of {of} packets were lost"),
            UplinkProof::Unreported => "no receiver report of LiveKit covers it".to_owned(),
        };
        evidence.step = Some("media");
        Some(Self::new(
            Reason::MediaFailed,
            format!(
                "the caller's speech{} did not reach LiveKit: {what}. So the agent could not answer. Check UDP and TCP from this \
                 machine to LiveKit's media ports.",
                missed.of_turn()
            ),
        ))
    }

    /// No agent joined, and the canary is in another room than the one that it created, although both have the same name.
    /// `created` is the id of the latter.
    pub(super) fn of_other_room(created: &str, report: &mut ProbeReport) -> Self {
        report.evidence.step = Some("signal");
        let joined = report.room_sid.as_deref().unwrap_or_default();
        Self::new(
            Reason::SignalFailed,
            format!(
                "LiveKit has two rooms of this name: CreateRoom returned {created}, and the canary joined {joined}. So no agent \
                 could join it. Check whether all nodes behind the project's url use the same Redis, and LiveKit's status."
            ),
        )
    }

    fn of_missing_track(missed: &MissedDuty<'_>) -> Self {
        let limit = missed.limit;
        if let Some((track, error)) = &missed.subscription {
            return Self::of_failed_subscription(track, error, limit);
        }
        let places = match missed.target.room.max_participants {
            1 => " If an avatar speaks for it that is no agent, raise room.max_participants.",
            _ => "",
        };
        Self::new(
            Reason::AgentNoTrack,
            format!(
                "the agent published no audio track within {limit:?} of joining. \
                 Check that its session starts and that it has audio output.{places}"
            ),
        )
    }

    /// The agent published audio, but LiveKit could not subscribe the canary to it.
    fn of_failed_subscription(track: &str, error: &str, limit: Duration) -> Self {
        let what = format!(
            "the agent's audio did not arrive within {limit:?} of joining: LiveKit could not subscribe the canary to track {track} \
             ({error})."
        );
        if error == SubscriptionError::SeCodecUnsupported.as_str_name() {
            return Self::new(
                Reason::ConfigRejected,
                format!(
                    "{what} The canary receives Opus. Have the agent publish Opus, and check the server's enabled_codecs."
                ),
            );
        }
        let check = match error {
            NOT_PERMITTED => {
                "The agent does not permit it: check its track subscription permissions \
                 (set_track_subscription_permissions)."
            }
            _ => "Check whether the agent withdrew the track, and LiveKit's log.",
        };
        Self::new(Reason::AgentNoTrack, format!("{what} {check}"))
    }

    /// The agent is in the room, but LiveKit shows it only to the server API.
    pub(super) fn of_hidden_agent(identity: &str, evidence: &mut Evidence) -> Self {
        evidence.step = Some("agent_join");
        Self::new(
            Reason::AgentNoTrack,
            format!(
                "the agent ({identity}) joined as a hidden participant, so no caller can see or hear it. Check the permissions \
                 of its worker (hidden)."
            ),
        )
    }

    fn of_absent_agent(missed: &MissedDuty<'_>) -> Self {
        let limit = missed.limit;
        if let DispatchListing::Job(job) = missed.listing {
            let detail = format!(
                "a worker accepted the job ({job}), but no agent joined within {limit:?}. \
                 Check that worker's log for a slow or failed start."
            );
            return Self::new(Reason::AgentNoShow, detail);
        }
        let check = match expected_agent(missed.target) {
            // The name is right: an agent has joined under it.
            Some(name) if missed.agent_known => format!(
                "Check first that the worker of \"{name}\" is connected to this project and below its load limit. \
                 Then check its log for a job that failed before it connected, and that it still registers under this name."
            ),
            Some(name) if !missed.target.dispatch.deployment.is_empty() => format!(
                "Check first that a worker registered as exactly \"{name}\" with the deployment \"{}\" \
                 (LIVEKIT_AGENT_DEPLOYMENT). Then check that it is connected to this project and below its load limit, and its \
                 log for a job that failed before it connected.",
                missed.target.dispatch.deployment
            ),
            Some(name) => format!(
                "Check first that a worker registered as exactly \"{name}\". Then check that it is connected to this \
                 project and below its load limit, and its log for a job that failed before it connected."
            ),
            None => "Check first that an unnamed worker is connected to this project and below its load limit. Then check \
                     its log for a job that failed before it connected."
                .to_owned(),
        };
        let facts = missed.target.dispatch.mode.facts();
        let (listed, hint) = match (missed.listing, facts.request) {
            (DispatchListing::NoDispatch, DispatchRequest::CreateRoom) => (
                "LiveKit lists no dispatch of it",
                " This server may not dispatch the agent that CreateRoom names.",
            ),
            (DispatchListing::NoDispatch, DispatchRequest::Join) if facts.names_agent => (
                "LiveKit lists no dispatch of it",
                " This server may not dispatch the agent that a token names.",
            ),
            (
                DispatchListing::NoDispatch,
                DispatchRequest::CreateDispatch | DispatchRequest::Join,
            ) => ("LiveKit lists no dispatch of it", ""),
            (DispatchListing::NoJob | DispatchListing::Job(_), _) => {
                ("LiveKit lists no accepted job", "")
            }
            (DispatchListing::Unknown, _) => (
                "LiveKit did not report whether a worker accepted the job",
                "",
            ),
        };
        let strays = match missed.strays {
            [] => String::new(),
            strays => format!(" (another agent came: {})", strays.join(", ")),
        };
        Self::new(
            Reason::DispatchUnanswered,
            format!(
                "no agent joined within {limit:?} of the dispatch, and {listed}{strays}.{hint} {check}"
            ),
        )
    }

    /// What it means that the agent left with this disconnect reason when it should have stayed. `after` says how long
    /// after its join, with a leading space.
    ///
    /// If a room closes or a server shuts down, LiveKit informs the participants in any order. So the agent may be seen to
    /// leave before the canary learns why, and it is not the agent's fault.
    pub(super) fn of_agent_leave(
        reason: &str,
        after: &str,
        when: LeftWhen,
        evidence: &mut Evidence,
    ) -> Self {
        use DisconnectReason as D;
        evidence.step = Some("agent");
        match DisconnectReason::from_str_name(reason) {
            Some(D::RoomDeleted | D::RoomClosed | D::ServerShutdown | D::Migration) => {
                Self::of_leave(reason)
            }
            Some(D::ParticipantRemoved) => Self::new(
                Reason::Removed,
                format!(
                    "another program removed the agent ({reason}). Check who moderates rooms of this project."
                ),
            ),
            _ => {
                let reason = if reason.is_empty() {
                    "no reason given"
                } else {
                    reason
                };
                let when = match when {
                    LeftWhen::BeforeSpeech => "before it spoke",
                    LeftWhen::BeforeReply => "before it answered the caller",
                    LeftWhen::BeforeRoomEnd => "while the room was still open",
                };
                Self::new(
                    Reason::AgentLeftEarly,
                    format!(
                        "the agent left ({reason}){after}, {when}. Check its log for a crash, a restart or a hang-up."
                    ),
                )
            }
        }
    }

    /// All audio of the agent is encrypted, by this method. To the canary it is noise, which could pass for speech.
    pub(super) fn of_encrypted_agent(method: &str, evidence: &mut Evidence) -> Self {
        evidence.step = Some("agent_track");
        Self::new(
            Reason::ConfigRejected,
            format!(
                "the agent's audio is end-to-end encrypted ({method}), and the canary has no key for it. Turn encryption off \
                 in the canary's rooms: the agent can recognise them by the participant attribute canary=true."
            ),
        )
    }

    pub(super) fn of_duplicate_agent(identity: &str, evidence: &mut Evidence) -> Self {
        evidence.step = Some("agent");
        Self::new(
            Reason::AgentDuplicate,
            format!(
                "a second agent of that name joined ({identity}). Check for a second dispatch: automatic in addition to \
                 explicit, or by another program."
            ),
        )
    }

    /// Adds the error that the agent's session reported, if it can explain the failure.
    pub(super) fn with_agent_error(mut self, reported: Option<&str>) -> Self {
        let explains = matches!(
            self.reason,
            Reason::AgentSilent
                | Reason::AgentNoReply
                | Reason::AgentWrongReply
                | Reason::AgentLeftEarly
        );
        if let Some(error) = reported.filter(|_| explains) {
            let error = quote(error);
            self.detail = format!("{} Its session reported an error: {error}.", self.detail);
        }
        self
    }

    /// `failure`, or the inference limit that explains it. `reported` is the error that the agent's session reported.
    ///
    /// An agent without a model is silent or leaves.
    pub(super) fn or_inference_limit(self, reported: &str, evidence: &mut Evidence) -> Self {
        match self.reason {
            Reason::AgentSilent | Reason::AgentNoReply | Reason::AgentLeftEarly => {
                evidence.answer = Some(reported.to_owned());
                Self::new(
                    Reason::PlanLimit(LimitKind::Inference),
                    format!(
                        "the agent's inference reached a limit: {}. So the agent failed ({}). Compare the inference limits \
                         of the plan, or of the model's provider, with everything that uses them.",
                        quote(reported),
                        self.reason.label()
                    ),
                )
            }
            _ => self,
        }
    }
}

// Parts of several.

impl Failure {
    /// The process or its machine has no descriptor or no memory left.
    fn of_shortage(error: &str) -> Self {
        let error = quote(error);
        Self::new(
            Reason::Internal,
            format!(
                "the canary itself failed: {error}. Raise the limits of this process (LimitNOFILE, ulimit -n, memory), or \
                 lower max_rooms."
            ),
        )
    }

    fn unreachable(error: &ConnectError) -> Self {
        let check = match error {
            ConnectError::Dns { .. } => {
                "Check the host in the project's url and this machine's DNS resolver."
            }
            ConnectError::Tcp { .. } => "Check that LiveKit runs there, the port, and firewalls.",
            ConnectError::Tls { .. } => {
                "Check the certificate and its host name. If a private CA signed it, set ca_file."
            }
            ConnectError::Shortage { .. } => return Self::of_shortage(&error.to_string()),
        };
        let error = quote(&error.to_string());
        Self::new(Reason::Unreachable, format!("{error}. {check}"))
    }

    fn auth_rejected(what: &str, rejection: &HttpRejection) -> Self {
        let answer = summary(rejection);
        let check = if names_time_of_token(rejection) {
            "The key pair is right: compare the clock of this machine with LiveKit's. A token of the canary is valid for 10 minutes \
             from its creation."
        } else if is_page(rejection) || rejection.status == 403 && rejection.twirp_code.is_none() {
            "The answer is not in LiveKit's form: check first whether a proxy or a firewall in front of it refuses this machine. \
             Then check the project's api_key and api_secret."
        } else {
            "Check the project's api_key and api_secret, and that they belong to its url."
        };
        Self::new(
            Reason::AuthRejected,
            format!("LiveKit refused {what}: {answer}. {check}"),
        )
    }

    /// The answer is no error, but it is not LiveKit's either: a redirect, or a page of another server.
    fn of_other_server(what: &str, rejection: &HttpRejection) -> Self {
        let answer = summary(rejection);
        let check = match rejection.status {
            300.. => {
                "Set the project's url to the address that it leads to: the canary follows no redirect."
            }
            _ => "Check the project's url, including its path, and any proxy in front of LiveKit.",
        };
        Self::new(
            Reason::ConfigRejected,
            format!("another server than LiveKit answered {what}: {answer}. {check}"),
        )
    }

    /// LiveKit Cloud refuses a project that is pinned to another region.
    fn region_pinned(what: &str, answer: &str) -> Self {
        Self::new(
            Reason::ConfigRejected,
            format!(
                "LiveKit refused {what}: {answer}. LiveKit Cloud answers so if the project is pinned to a region and this \
                 machine reached another one. Run the canary in an allowed region, or check the project's region pinning. \
                 A proxy in front of LiveKit can answer so, too."
            ),
        )
    }

    fn limit(kind: LimitKind, what: &str, rejection: &HttpRejection) -> Self {
        let retry = match rejection.retry_after {
            Some(after) => format!("It asks to retry after {after:?}."),
            None => "It gave no retry time.".to_owned(),
        };
        let check = match kind {
            LimitKind::Node => "Add nodes, or raise the limits of the server.",
            _ => "Compare the plan's limits with everything that runs on this project.",
        };
        Self::new(Reason::PlanLimit(kind), format!("{what}. {retry} {check}"))
    }
}

impl Evidence {
    fn record_answer(&mut self, rejection: &HttpRejection) {
        self.http_status = Some(rejection.status);
        self.twirp_code.clone_from(&rejection.twirp_code);
        self.answer = Some(rejection.message.clone());
        self.retry_after_seconds = rejection.retry_after.as_ref().map(Duration::as_secs_f64);
    }

    fn record_deadline(&mut self, step: &'static str, limit: Duration) {
        self.step = Some(step);
        self.deadline_seconds = Some(limit.as_secs_f64());
    }
}

/// Whether a `Leave` with this reason is how an agent can end the call of its caller.
pub(super) fn ends_call(reason: &str) -> bool {
    use DisconnectReason as D;
    matches!(
        DisconnectReason::from_str_name(reason),
        Some(D::RoomDeleted | D::RoomClosed | D::ParticipantRemoved)
    )
}

/// The name of the agent that counts; `None` if the dispatch names none, and any agent counts.
pub(super) fn expected_agent(target: &Target) -> Option<&str> {
    let names_agent = target.dispatch.mode.facts().names_agent;
    target.agent_name.as_deref().filter(|_| names_agent)
}

/// The limit that a refused API call names. Only a limit that the service itself names counts.
fn api_limit(rejection: &HttpRejection) -> Option<LimitKind> {
    if names_node_limit(rejection) {
        return Some(LimitKind::Node);
    }
    // Twirp servers gave `resource_exhausted` the status 403 in the past, and a proxy may change it.
    if rejection.status != 429 && rejection.twirp_code.as_deref() != Some("resource_exhausted") {
        return None;
    }
    let text = rejection.message.to_lowercase();
    let contains = |words: &[&str]| words.iter().any(|word| text.contains(word));
    Some(if contains(&["agent session", "concurrent agent"]) {
        LimitKind::AgentSessions
    } else if contains(&["quota", "minutes"]) {
        LimitKind::Quota
    } else if rejection.status == 429 || contains(&["rate limit", "too many"]) {
        LimitKind::ApiRate
    } else {
        LimitKind::Other
    })
}

/// Whether an agent's error names a limit of its inference.
///
/// LiveKit's inference names its quota. A model's provider answers HTTP 429, which the plugins of livekit-agents write as
/// `status_code=429` into the error.
pub(super) fn names_inference_limit(error: &str) -> bool {
    // The text may hold a timestamp, whose decimals are no number of their own.
    let mut numbers = error.split(|c: char| !c.is_ascii_alphanumeric() && c != '.');
    error.contains("inference_quota_exceeded")
        || numbers.any(|number| number.trim_matches('.') == "429")
}

/// Whether livekit-server reports that a node is above its own limits: for a join with 503 (`rtc.ErrLimitExceeded`), for a
/// call that picks a room's node with 500 (`routing.ErrNodeLimitReached`).
fn names_node_limit(rejection: &HttpRejection) -> bool {
    let text = rejection.message.to_lowercase();
    let phrases = [
        "node has exceeded its configured limit",
        "reached configured limit for node",
    ];
    phrases.iter().any(|phrase| text.contains(phrase))
}

/// Whether livekit-server refused a token because of its times. Its versions use two libraries for tokens: go-jose, and
/// golang-jwt.
fn names_time_of_token(rejection: &HttpRejection) -> bool {
    let text = rejection.message.to_lowercase();
    let phrases = [
        "not valid yet",
        "token is expired",
        "issued in the future",
        "used before issued",
    ];
    rejection.status == 401 && phrases.iter().any(|phrase| text.contains(phrase))
}

/// Whether the answer is HTML. LiveKit answers with JSON or plain text.
fn is_page(rejection: &HttpRejection) -> bool {
    rejection.message.starts_with('<')
}

/// A rejection in one line: `HTTP 404 (not_found): requested room does not exist`.
fn summary(rejection: &HttpRejection) -> String {
    let code = rejection.twirp_code.as_ref();
    let code = code
        .map(|code| format!(" ({})", quote(code)))
        .unwrap_or_default();
    match quote(&rejection.message) {
        message if message.is_empty() => format!("HTTP {}{code}", rejection.status),
        message => format!("HTTP {}{code}: {message}", rejection.status),
    }
}

/// A server's text on one line, cut to [`MAX_QUOTE`] characters.
pub(super) fn quote(text: &str) -> String {
    one_line(text, MAX_QUOTE)
}

fn one_line(text: &str, max: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(max) {
        Some((cut, _)) => format!("{}…", &line[..cut]),
        None => line,
    }
}

#[cfg(test)]
mod tests;
