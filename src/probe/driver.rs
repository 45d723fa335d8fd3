//! Carries out a probe's actions, and feeds answers, room events and deadlines back.

use std::collections::VecDeque;
use std::future::pending;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use chrono::{SubsecRound as _, Utc};
use futures_util::future::{BoxFuture, OptionFuture};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use livekit_protocol::RoomConfiguration;
use secrecy::ExposeSecret as _;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::machine::{Action, Input, ListedRoom, ProbeMachine};
use super::verdict::{REGION_PIN, expected_agent};
use super::{Position, ProbeEvent, ProbeReport};
use crate::config::{DispatchRequest, Project, RecordAudio, Target};
use crate::janitor::{Deletion, Janitor, RoomLease};
use crate::livekit::RoomName;
use crate::livekit::audio::recording::CallSound;
use crate::livekit::engine::{self, Participant, panic_message};
use crate::livekit::event::{AudioStats, EndReason, RoomEvent, RoomEventKind};
use crate::livekit::join::JoinRequest;
use crate::livekit::wire::api::{Api, ApiError, NamedAgent, NewRoom};
use crate::livekit::wire::connect::Endpoint;
use crate::livekit::wire::request::HttpRejection;
use crate::livekit::wire::signal::SignalError;
use crate::livekit::wire::token::{Keys, TokenParticipant};
use crate::recording::{self, RecordingStore};
use crate::stall::{StallWatch, Stalls};

/// The participant's identity. There is one canary in each room, so it can be the same in all.
const IDENTITY: &str = "canary-echo";

/// How much longer than the join an empty room lives. It bounds how long a room outlives a crash of the canary.
const EMPTY_MARGIN: Duration = Duration::from_secs(30);

/// How long a room lives after the canary has left, for an agent that finishes its work. LiveKit replaces 0 by its own
/// default.
const DEPARTURE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an aborted probe may take to leave and to delete its room; a healthy server needs a tenth of this. After that,
/// the probe reports without the deletion, so that one slow room does not delay the result of the batch.
const ABORT_TIMEOUT: Duration = Duration::from_secs(2);

/// What a probe needs; shared by all rooms of a batch.
#[derive(Clone)]
pub struct Context {
    pub project: Arc<Project>,
    pub target: Arc<Target>,
    pub endpoint: Endpoint,
    pub api: Api,
    pub janitor: Janitor,
    pub stalls: StallWatch,
    /// Takes the files of calls that the target records; without it, none is recorded.
    pub recordings: Option<RecordingStore>,
    /// An agent has joined under this target's name before. If none joins now, the name is not the first thing to check.
    pub agent_known: bool,
    /// A fault to inject, for drills and for tests of this program.
    pub fault: Option<ProbeFault>,
}

/// A fault of the canary itself, injected to show drills and tests what it affects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeFault {
    /// The probe panics once its agent has joined: in the room with this index in the order of opening, or in every room.
    Panic { index: Option<usize> },
}

impl ProbeFault {
    /// Reads `LIVEKIT_CANARY_FAULT` (`panic:<index>`); the command line does so once.
    ///
    /// # Errors
    /// The value has another form: a test whose fault is not injected must not pass.
    pub fn from_env() -> anyhow::Result<Option<Self>> {
        let Some(value) =
            std::env::var_os("LIVEKIT_CANARY_FAULT").filter(|value| !value.is_empty())
        else {
            return Ok(None);
        };
        let index = value
            .to_str()
            .and_then(|value| value.strip_prefix("panic:"));
        match index.and_then(|index| index.parse().ok()) {
            Some(index) => Ok(Some(Self::Panic { index: Some(index) })),
            None => anyhow::bail!("LIVEKIT_CANARY_FAULT: expected panic:<index>"),
        }
    }

    fn of_room(self, room: usize) -> Option<Self> {
        let Self::Panic { index } = self;
        index.is_none_or(|index| index == room).then_some(self)
    }
}

impl Context {
    /// The context of one room: without a fault that is meant for another room.
    #[must_use]
    pub fn of_room(&self, index: usize) -> Self {
        Self {
            fault: self.fault.and_then(|fault| fault.of_room(index)),
            ..self.clone()
        }
    }
}

/// Receives a probe's events; must not block.
pub type Emit = Box<dyn Fn(ProbeEvent) + Send + Sync>;

/// When the probe may end by itself: `None` until the batch knows. If the sender is gone, the hold is over.
pub type HoldUntil = watch::Receiver<Option<Instant>>;

/// Runs one probe until its room is deleted or the deletion is given up. Never panics: a panic inside becomes `internal`.
///
/// The probe starts, on both clocks, when the future is first polled.
pub async fn run(
    context: Context,
    room: RoomName,
    position: Position,
    hold_until: HoldUntil,
    abort: CancellationToken,
    emit: Emit,
) -> ProbeReport {
    let driver = Driver::new(context, room, position, hold_until, abort, emit);
    driver.run_to_end().await
}

struct Driver {
    context: Context,
    room: RoomName,
    machine: ProbeMachine,
    /// `None` once the deletion is requested.
    lease: Option<RoomLease>,
    /// The stalls of this process before the probe's start.
    stalls_before: Stalls,
    /// `None` before the join and after its last event.
    participant: Option<Participant>,
    /// The call's audio and the time at which the participant had left.
    sound: Option<(CallSound, Instant)>,
    /// Calls under way. Each ends with an input, within its own deadline.
    calls: FuturesUnordered<BoxFuture<'static, Input>>,
    /// Inputs that are due now, in order.
    inputs: VecDeque<Input>,
    /// `None` once the batch can't change it any more.
    hold_until: Option<HoldUntil>,
    /// `None` once it was cancelled and the machine was informed.
    abort: Option<CancellationToken>,
    emit: Emit,
}

impl Driver {
    fn new(
        context: Context,
        room: RoomName,
        position: Position,
        mut hold_until: HoldUntil,
        abort: CancellationToken,
        emit: Emit,
    ) -> Self {
        let target = &context.target;
        let lease = context.janitor.lease(
            room.clone(),
            context.api.clone(),
            target.deadlines.cleanup,
            target.late_agent_window,
        );
        let hold = *hold_until.borrow_and_update();
        Self {
            machine: ProbeMachine::new(
                Arc::clone(target),
                room.clone(),
                position,
                // `Input::Start` is handled next, without a wait in between.
                Utc::now().trunc_subsecs(6),
                context.agent_known,
                join_token_bytes(target, &context.api.keys, &room),
            ),
            lease: Some(lease),
            stalls_before: context.stalls.seen(),
            participant: None,
            sound: None,
            calls: FuturesUnordered::new(),
            inputs: VecDeque::from([Input::Start, Input::HoldUntil(hold)]),
            hold_until: Some(hold_until),
            abort: Some(abort),
            emit,
            room,
            context,
        }
    }

    async fn run_to_end(mut self) -> ProbeReport {
        let too_long = too_long(self.abort.clone());
        tokio::select! {
            biased;
            () = self.drive_and_catch_panics() => {}
            // The janitor continues with the room. This report has no stamp of its deletion.
            () = too_long => tracing::debug!(room = %self.room, "an aborted probe did not end in time"),
        }
        let sound = self.sound.take();
        let mut report = self.machine.into_report();
        if let Some((sound, left)) = sound {
            keep_sound(&mut report, sound, left, &self.context).await;
        }
        report
    }

    async fn drive_and_catch_panics(&mut self) {
        let Err(panic) = AssertUnwindSafe(self.drive()).catch_unwind().await else {
            return;
        };
        let message = panic_message(&*panic)
            .unwrap_or("a panic without a message")
            .to_owned();
        // The panic hook has already logged it, with its location.
        tracing::debug!(room = %self.room, message, "a probe crashed");
        self.inputs.push_front(Input::Panicked(message));
        // Leaving and deleting remain, each bounded by `cleanup`. If the machine panics again, the report holds what is known,
        // and the dropped lease makes the janitor delete the room.
        let limit = 3 * self.context.target.deadlines.cleanup;
        let rest = AssertUnwindSafe(self.drive()).catch_unwind();
        if !matches!(timeout(limit, rest).await, Ok(Ok(()))) {
            tracing::error!(room = %self.room, "a probe that crashed could not leave and delete its room");
        }
    }

    async fn drive(&mut self) {
        while !self.machine.is_over() {
            let input = match self.inputs.pop_front() {
                Some(input) => input,
                None => self.next_input().await,
            };
            // Before the start, there is no call that a stall could spoil.
            if !matches!(input, Input::Start) {
                self.check_stalls();
            }
            if self.creation_failed(&input)
                && let Some(lease) = &mut self.lease
            {
                lease.not_created();
            }
            self.feed(input);
            let fault = self.machine.agent_joined() && self.context.fault.take().is_some();
            assert!(!fault, "the injected fault");
        }
    }

    fn feed(&mut self, input: Input) {
        for action in self.machine.on(input, Instant::now()) {
            self.carry_out(action);
        }
    }

    /// Before any input is judged: after a stall, the input may be the stall's consequence.
    fn check_stalls(&mut self) {
        let seen = self.context.stalls.seen();
        if seen.count > self.stalls_before.count {
            let time = seen.total.saturating_sub(self.stalls_before.total);
            self.stalls_before = seen;
            self.feed(Input::Stalled(time));
        }
    }

    /// The next input. An event of the room comes before a deadline that it may have met.
    async fn next_input(&mut self) -> Input {
        let deadline = self.machine.next_deadline();
        tokio::select! {
            biased;
            () = cancelled(&mut self.abort) => Input::Abort,
            event = next_event(&mut self.participant, &mut self.sound) => Input::Room(event),
            Some(input) = self.calls.next() => input,
            until = changed(&mut self.hold_until) => Input::HoldUntil(until),
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => Input::DeadlinePassed,
        }
    }

    /// Whether the one request that creates the room never reached LiveKit or was refused. Then there is no room to delete,
    /// and an attempt would only fail in the same way.
    fn creation_failed(&self, input: &Input) -> bool {
        match input {
            Input::Created(call) => match &call.result {
                Err(ApiError::Refused(refusal)) => is_final(refusal),
                Err(_) => call.sent_at.is_none(),
                Ok(_) => false,
            },
            Input::Room(RoomEvent {
                kind:
                    RoomEventKind::Ended {
                        reason: EndReason::Signal(error),
                        ..
                    },
                ..
            }) if self
                .context
                .target
                .dispatch
                .mode
                .facts()
                .request
                .joins_to_create() =>
            {
                match error {
                    SignalError::Refused(refusal) => is_final(refusal),
                    error => matches!(error, SignalError::Unreachable(_)),
                }
            }
            _ => false,
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::CreateRoom => {
                let room = new_room(&self.context.target, &self.room);
                let api = self.context.api.clone();
                self.call(async move { Input::Created(api.create_room(&room).await) });
            }
            Action::Join => {
                let request = self.join_request();
                self.participant = Some(engine::join(self.context.target.engine, request));
            }
            Action::Dispatch => self.dispatch(),
            Action::ListRoom { participants } => {
                let (api, room) = (self.context.api.clone(), self.room.clone());
                self.call(async move {
                    let asked = participants.then(|| api.list_participants(&room));
                    let (dispatches, participants) =
                        tokio::join!(api.list_dispatch(&room), OptionFuture::from(asked));
                    Input::Listed(ListedRoom {
                        dispatches,
                        participants,
                    })
                });
            }
            Action::ListJobs => {
                let (api, room) = (self.context.api.clone(), self.room.clone());
                self.call(async move { Input::JobsListed(api.list_dispatch(&room).await) });
            }
            Action::RecordDispatch(id) => {
                if let Some(lease) = &mut self.lease {
                    lease.dispatched(id);
                }
            }
            Action::Adopt(identity) => {
                if let Some(participant) = &self.participant {
                    participant.adopt(identity);
                }
            }
            Action::AgentsConnected(connected) => {
                if let Some(lease) = &mut self.lease {
                    lease.agents_connected(connected);
                }
            }
            Action::LostSight => {
                if let Some(lease) = &mut self.lease {
                    lease.lost_sight();
                }
            }
            Action::Leave => {
                if let Some(participant) = &self.participant {
                    participant.leave();
                }
            }
            Action::DeleteRoom => {
                let lease = self.lease.take();
                self.call(async move {
                    Input::Deleted(match lease {
                        Some(lease) => lease.delete().await,
                        None => Deletion::NotDeleted {
                            why: "its deletion was requested before".to_owned(),
                        },
                    })
                });
            }
            Action::Emit(event) => (self.emit)(event),
        }
    }

    fn call(&mut self, call: impl Future<Output = Input> + Send + 'static) {
        self.calls.push(call.boxed());
    }

    fn dispatch(&mut self) {
        let (api, room) = (self.context.api.clone(), self.room.clone());
        let agent = named_agent(&self.context.target);
        self.call(async move { Input::Dispatched(api.create_dispatch(&room, agent).await) });
    }

    fn join_request(&self) -> JoinRequest {
        let target = &self.context.target;
        JoinRequest {
            endpoint: self.context.endpoint.clone(),
            keys: self.context.api.keys.clone(),
            room: self.room.clone(),
            participant: token_participant(target),
            agent_name: expected_agent(target).map(str::to_owned),
            room_config: room_of_token(target, &self.room),
            caller: target.caller.clone(),
            agent_turn: target.deadlines.agent_turn,
            speech: target.speech.clone(),
            signal_timeout: target.deadlines.signal,
            ice: self.context.project.ice,
            transcript: target.reads_transcript(),
            record: self.context.recordings.is_some() && target.record != RecordAudio::Never,
        }
    }
}

/// Adds the levels of a call to its report, and writes its recording if the target keeps one of this outcome.
async fn keep_sound(report: &mut ProbeReport, sound: CallSound, left: Instant, context: &Context) {
    let Some((waveform, recording)) = recording::of_call(sound, left) else {
        return;
    };
    report.waveform = Some(waveform);
    let (Some(recording), Some(store)) = (recording, &context.recordings) else {
        return;
    };
    let is_kept = match context.target.record {
        RecordAudio::Never => false,
        RecordAudio::Failures => report.outcome.failure().is_some(),
        RecordAudio::Always => true,
    };
    if !is_kept {
        return;
    }
    match store.save(&report.room, recording).await {
        Ok(saved) => report.recording = Some(saved),
        Err(error) => {
            tracing::warn!(room = %report.room, "cannot write the recording of room {}: {error}", report.room);
            let note = format!("the recording of the call could not be written: {error}");
            report.evidence.notes.push(note);
        }
    }
}

/// The size of the token with which the canary joins this room, in bytes. The token is a header of the signal connection's
/// request.
pub fn join_token_bytes(target: &Target, keys: &Keys, room: &RoomName) -> usize {
    let config = room_of_token(target, room);
    let token = keys.participant(room, &token_participant(target), config.as_ref());
    token.map_or(0, |token| token.expose_secret().len())
}

fn token_participant(target: &Target) -> TokenParticipant {
    let participant = &target.participant;
    let mut attributes = participant.attributes.clone();
    attributes.insert("canary".to_owned(), "true".to_owned());
    TokenParticipant {
        identity: IDENTITY.to_owned(),
        name: participant.name.clone(),
        metadata: participant.metadata.clone(),
        attributes,
    }
}

/// The room's settings for the token, if joining creates the room.
fn room_of_token(target: &Target, room: &RoomName) -> Option<RoomConfiguration> {
    let creates = target.dispatch.mode.facts().request.joins_to_create();
    creates.then(|| room_config(new_room(target, room)))
}

fn new_room(target: &Target, room: &RoomName) -> NewRoom {
    NewRoom {
        name: room.clone(),
        metadata: target.room.metadata.clone(),
        // It counts until the first participant has joined, so it must exceed the time for that.
        empty_timeout: target.deadlines.signal + EMPTY_MARGIN,
        departure_timeout: DEPARTURE_TIMEOUT,
        max_participants: target.room.max_participants,
        agents: agents(target),
    }
}

fn named_agent(target: &Target) -> NamedAgent {
    NamedAgent {
        name: target.agent_name.clone().unwrap_or_default(),
        deployment: target.dispatch.deployment.clone(),
        metadata: target.dispatch.metadata.clone(),
    }
}

/// The agents that the request that creates the room dispatches.
fn agents(target: &Target) -> Vec<NamedAgent> {
    let facts = target.dispatch.mode.facts();
    let named = match facts.request {
        DispatchRequest::CreateDispatch => None,
        DispatchRequest::CreateRoom | DispatchRequest::Join => {
            facts.names_agent.then(|| named_agent(target))
        }
    };
    Vec::from_iter(named)
}

/// Whether LiveKit refused the request before it did anything, or it never reached LiveKit: no conflict, timeout or fault of
/// the server.
fn is_final(refusal: &HttpRejection) -> bool {
    matches!(
        refusal.status,
        200..=399 | 400 | 401 | 403 | 404 | 413 | 414 | 426 | 429 | 431 | REGION_PIN
    )
}

/// The same settings for the token: the server applies them when the canary's join creates the room.
fn room_config(room: NewRoom) -> RoomConfiguration {
    let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
    RoomConfiguration {
        metadata: room.metadata,
        empty_timeout: seconds(room.empty_timeout),
        departure_timeout: seconds(room.departure_timeout),
        max_participants: room.max_participants,
        agents: room.agents.into_iter().map(Into::into).collect(),
        ..RoomConfiguration::default()
    }
}

/// Resolves when the time of an aborted probe is over.
async fn too_long(mut abort: Option<CancellationToken>) {
    cancelled(&mut abort).await;
    sleep(ABORT_TIMEOUT).await;
}

/// Resolves once, and never again.
async fn cancelled(abort: &mut Option<CancellationToken>) {
    match abort {
        Some(token) => token.cancelled().await,
        None => pending().await,
    }
    *abort = None;
}

/// The next event. If the task of the participant ended without a last event, that is an internal error.
async fn next_event(
    participant: &mut Option<Participant>,
    sound: &mut Option<(CallSound, Instant)>,
) -> RoomEvent {
    let Some(running) = participant else {
        return pending().await;
    };
    let event = running.events.recv().await.unwrap_or_else(|| RoomEvent {
        at: Instant::now(),
        kind: RoomEventKind::Ended {
            reason: EndReason::Internal(
                "the participant's task ended without a last event".to_owned(),
            ),
            audio: AudioStats::default(),
        },
    });
    if matches!(event.kind, RoomEventKind::Ended { .. }) {
        *sound = running.take_sound().map(|sound| (sound, event.at));
        *participant = None;
    }
    event
}

async fn changed(hold_until: &mut Option<HoldUntil>) -> Option<Instant> {
    let Some(watched) = hold_until else {
        return pending().await;
    };
    if watched.changed().await.is_ok() {
        return *watched.borrow_and_update();
    }
    // The batch is gone, so nothing else can end the hold.
    let last = *watched.borrow();
    *hold_until = None;
    last.or_else(|| Some(Instant::now()))
}

#[cfg(test)]
mod tests;
