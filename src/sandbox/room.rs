//! One room: its participants, their tracks and subscriptions, its dispatches and its agents. One task owns all of it;
//! others send it commands.

use std::sync::Arc;
use std::time::Duration;

use livekit_protocol as proto;
use prost::Message as _;
use proto::signal_request::Message as Up;
use proto::signal_response::Message as Down;
use str0m::media::Mid;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::agent::{AgentAction, AgentScript, AgentSound, Clip, DemoAgent, FRAME, Utterance};
use super::command::{JoinedClient, Newcomer, RoomCommand, RoomFull, RoomOptions, leave};
use super::data_stream;
use super::demux::{PeerId, RoutedDatagram, Side};
use super::fault::{Faults, InjectedFault};
use super::ids::{guid, unix_millis};
use super::peer::{AudioPacket, ClientPeer, ClientPeerEvent, first_mid, track_ids};
use super::registry::{CallerUtterance, Registry, RoomHandle, TooManyRooms};
use super::report::{ReportEvent, SpeechInterval};

mod agent_seat;
mod dispatch;
mod participant;

use agent_seat::{AgentSeat, AudioOut, agent_info, agent_track, avatar_of};
use dispatch::{AgentJob, RoomDispatch, new_job};
use participant::{Client, is_microphone, newcomer_info};

/// The version of livekit-server whose behaviour the sandbox follows.
const SERVER_VERSION: &str = "1.13.5";
/// Defaults of livekit-server, in seconds.
pub(crate) const DEFAULT_EMPTY_TIMEOUT: u32 = 300;
pub(crate) const DEFAULT_DEPARTURE_TIMEOUT: u32 = 20;

/// How long a participant outlives its signal socket. A real server waits this long for a reconnect; the sandbox accepts
/// none.
const SIGNAL_GRACE: Duration = Duration::from_secs(20);
/// Signal messages that may wait for a client; a client that falls further behind is dropped.
const SIGNAL_QUEUE: usize = 256;
/// Two seconds of a few participants' audio.
const DATAGRAM_QUEUE: usize = 512;
const MAX_PARTICIPANTS: usize = 64;
const MAX_DISPATCHES: usize = 64;

pub(crate) struct RoomActor {
    shared: Arc<Registry>,
    id: u64,
    info: proto::Room,
    faults: Faults,
    participants: Vec<Client>,
    seats: Vec<AgentSeat>,
    dispatches: Vec<RoomDispatch>,
    datagrams: mpsc::Sender<RoutedDatagram>,
    next_number: u64,
    was_joined: bool,
    /// When the last participant other than an agent left, or the room's creation.
    empty_since: Option<Instant>,
    /// Participants to remove after the pending events are handled.
    leaving: Vec<(u64, Option<proto::DisconnectReason>)>,
    closed: CancellationToken,
}

/// The open room of this name; a new room is created and its task started.
///
/// # Errors
/// [`TooManyRooms`] if the sandbox has reached its limit.
pub(crate) fn open(
    shared: &Arc<Registry>,
    name: &str,
    new: RoomOptions,
) -> Result<RoomHandle, TooManyRooms> {
    let (handle, queues) = shared.open(name)?;
    if let Some(queues) = queues {
        let (datagrams, datagram_queue) = mpsc::channel(DATAGRAM_QUEUE);
        let faults = shared.faults(name);
        let room = RoomActor::new(Arc::clone(shared), queues.id, name, new, faults, datagrams);
        shared
            .tracker
            .spawn(room.run(queues.commands, datagram_queue));
    }
    Ok(handle)
}

impl RoomActor {
    pub(crate) fn new(
        shared: Arc<Registry>,
        id: u64,
        name: &str,
        new: RoomOptions,
        faults: Faults,
        datagrams: mpsc::Sender<RoutedDatagram>,
    ) -> Self {
        let created = unix_millis();
        let or_default = |value: u32, default: u32| if value > 0 { value } else { default };
        let mut room = Self {
            info: proto::Room {
                sid: guid("RM_"),
                name: name.to_owned(),
                empty_timeout: or_default(new.empty_timeout, DEFAULT_EMPTY_TIMEOUT),
                departure_timeout: or_default(new.departure_timeout, DEFAULT_DEPARTURE_TIMEOUT),
                max_participants: new.max_participants,
                metadata: new.metadata,
                creation_time: created / 1000,
                creation_time_ms: created,
                enabled_codecs: vec![codec("audio/opus")],
                ..proto::Room::default()
            },
            shared,
            id,
            faults,
            participants: Vec::new(),
            seats: Vec::new(),
            dispatches: Vec::new(),
            datagrams,
            next_number: 0,
            was_joined: false,
            empty_since: Some(Instant::now()),
            leaving: Vec::new(),
            closed: CancellationToken::new(),
        };
        // A room without named agents dispatches the unnamed one.
        let mut agents = new.agents;
        if agents.is_empty() {
            agents.push(proto::RoomAgentDispatch::default());
        }
        for agent in agents {
            room.add_dispatch(proto::AgentDispatch {
                id: guid("AD_"),
                agent_name: agent.agent_name,
                metadata: agent.metadata,
                deployment: agent.deployment,
                ..proto::AgentDispatch::default()
            });
        }
        room
    }

    /// Runs the room until it closes.
    pub(crate) async fn run(
        mut self,
        mut commands: mpsc::Receiver<RoomCommand>,
        mut datagrams: mpsc::Receiver<RoutedDatagram>,
    ) {
        let shutdown = self.shared.shutdown.clone();
        while !self.closed.is_cancelled() {
            let deadline = self.deadline();
            tokio::select! {
                () = shutdown.cancelled() => self.close(proto::DisconnectReason::ServerShutdown),
                command = commands.recv() => match command {
                    Some(command) => self.on_command(command, Instant::now()),
                    None => self.close(proto::DisconnectReason::RoomClosed),
                },
                Some(datagram) = datagrams.recv() => self.on_datagram(&datagram),
                () = tokio::time::sleep_until(deadline) => {}
            }
            self.on_time(Instant::now());
        }
    }

    fn deadline(&self) -> Instant {
        let peers = self
            .participants
            .iter()
            .flat_map(|p| [p.publisher.deadline, p.subscriber.deadline]);
        let lost = self
            .participants
            .iter()
            .filter_map(|p| p.signal_lost.map(|at| at + SIGNAL_GRACE));
        let agents = self.seats.iter().filter_map(|seat| seat.agent.deadline());
        peers
            .chain(lost)
            .chain(agents)
            .chain(self.expiry())
            .min()
            .unwrap_or_else(|| Instant::now() + Duration::from_mins(1))
    }

    /// When an empty room closes; agents don't keep it open.
    fn expiry(&self) -> Option<Instant> {
        let timeout = if self.was_joined {
            self.info.departure_timeout
        } else {
            self.info.empty_timeout
        };
        self.empty_since
            .map(|since| since + Duration::from_secs(timeout.into()))
    }

    fn on_time(&mut self, now: Instant) {
        for participant in &mut self.participants {
            for peer in [&mut participant.publisher, &mut participant.subscriber] {
                if peer.deadline <= now {
                    peer.tell_time(now);
                }
            }
            if participant
                .signal_lost
                .is_some_and(|at| at + SIGNAL_GRACE <= now)
            {
                self.leaving.push((participant.number, None));
            }
        }
        self.settle(now);
        self.run_agents(now);
        self.settle(now);
        if self.expiry().is_some_and(|expiry| expiry <= now) {
            self.close(proto::DisconnectReason::RoomClosed);
        }
    }

    fn on_datagram(&mut self, datagram: &RoutedDatagram) {
        if self.faults.has(&InjectedFault::NoMedia) {
            return;
        }
        let PeerId { participant, side } = datagram.peer;
        let uplink_lost = self.faults.has(&InjectedFault::UplinkLost);
        if let Some(participant) = self
            .participants
            .iter_mut()
            .find(|p| p.number == participant)
        {
            // An agent starts with a caller whose track is there: media gets lost only from then on.
            let is_live = participant.tracks.iter().any(|track| track.live);
            if uplink_lost && side == Side::Publisher && is_live && is_media(&datagram.data) {
                return;
            }
            participant.peer(side).on_datagram(datagram);
        }
    }

    /// Handles the events of the peer connections until there are none.
    fn settle(&mut self, now: Instant) {
        loop {
            let next = self
                .participants
                .iter_mut()
                .enumerate()
                .find_map(|(at, p)| {
                    [Side::Publisher, Side::Subscriber]
                        .into_iter()
                        .find_map(|side| Some((at, side, p.peer(side).events.pop_front()?)))
                });
            if let Some((at, side, event)) = next {
                self.on_peer_event(at, side, event, now);
            } else if let Some((number, reason)) = self.leaving.pop() {
                self.remove(number, reason, now);
            } else {
                return;
            }
        }
    }

    fn on_peer_event(&mut self, at: usize, side: Side, event: ClientPeerEvent, now: Instant) {
        match event {
            ClientPeerEvent::Connected => {
                // The subscriber connection is the primary one.
                if side == Side::Subscriber {
                    let participant = &mut self.participants[at];
                    participant.info.state = proto::participant_info::State::Active.into();
                    self.announce(at);
                }
            }
            ClientPeerEvent::Disconnected => {
                let participant = &self.participants[at];
                if participant.signal_lost.is_some() {
                    self.leaving.push((participant.number, None));
                }
            }
            ClientPeerEvent::Audio(audio) => self.on_audio(at, &audio, now),
            ClientPeerEvent::Data { packet, reliable } => self.on_data(at, &packet, reliable, now),
        }
    }

    fn on_audio(&mut self, at: usize, audio: &AudioPacket, now: Instant) {
        let participant = &mut self.participants[at];
        let Some(track) = participant
            .tracks
            .iter_mut()
            .find(|track| track.mid == Some(audio.mid))
        else {
            return;
        };
        let first = !std::mem::replace(&mut track.live, true);
        let sid = track.info.sid.clone();
        let microphone = is_microphone(&track.info);
        if first {
            self.on_track_live(at, audio.mid, now);
        }
        if microphone {
            for seat in &mut self.seats {
                seat.agent.on_caller_frame(audio.payload.len(), now);
            }
        }
        self.forward(&sid, audio, now);
    }

    fn on_track_live(&mut self, at: usize, mid: Mid, now: Instant) {
        let participant = &mut self.participants[at];
        for track in participant.tracks.iter_mut().filter(|t| t.mid == Some(mid)) {
            "audio/opus".clone_into(&mut track.info.mime_type);
            track.info.mid = mid.to_string();
            for codec in &mut track.info.codecs {
                codec.mime_type.clone_from(&track.info.mime_type);
                codec.mid.clone_from(&track.info.mid);
            }
        }
        participant.info.is_publisher = true;
        self.announce(at);
        self.agents_listen(now);
        self.renegotiate(now);
    }

    /// Subscribes the agents whose media is up to callers' microphones; an agent hears no other source.
    fn agents_listen(&mut self, now: Instant) {
        if !self.seats.iter().any(|seat| seat.visible) {
            return;
        }
        let mut live = Vec::new();
        for participant in &self.participants {
            for track in participant.tracks.iter().filter(|track| track.live) {
                if is_microphone(&track.info) {
                    live.push(track.info.sid.clone());
                    self.agents_meet(&participant.info, &track.info.sid);
                }
            }
        }
        for sid in &live {
            self.notify_subscribed(sid, now);
            for seat in self.seats.iter_mut().filter(|seat| seat.visible) {
                if !seat.listens_to.contains(sid) {
                    seat.listens_to.push(sid.clone());
                    seat.agent.on_caller_published();
                }
            }
        }
    }

    /// Reports a caller whose track is new to an agent.
    fn agents_meet(&self, caller: &proto::ParticipantInfo, track_sid: &String) {
        for seat in self.seats.iter().filter(|seat| seat.visible) {
            if !seat.listens_to.contains(track_sid) {
                let event = ReportEvent::Caller {
                    caller: caller.identity.clone(),
                    attributes: caller.attributes.clone(),
                    name: caller.name.clone(),
                    metadata: caller.metadata.clone(),
                    room_metadata: self.info.metadata.clone(),
                };
                self.report(seat, &event);
            }
        }
    }

    fn report(&self, seat: &AgentSeat, event: &ReportEvent) {
        self.shared
            .report(&self.info.name, &seat.info.identity, event);
    }

    /// Notifies a track's owner of its first subscriber.
    fn notify_subscribed(&mut self, track_sid: &str, now: Instant) {
        for seat in &mut self.seats {
            if seat
                .voice
                .as_ref()
                .is_some_and(|it| it.track_sid == track_sid)
            {
                seat.agent.on_subscribed(now);
            }
        }
        for participant in &mut self.participants {
            let Some(track) = participant
                .tracks
                .iter_mut()
                .find(|track| track.info.sid == track_sid)
            else {
                continue;
            };
            if !std::mem::replace(&mut track.subscription_notified, true) {
                let track_sid = track_sid.to_owned();
                participant.send(Down::TrackSubscribed(proto::TrackSubscribed { track_sid }));
            }
        }
    }

    /// Sends one packet of a track to all its subscribers.
    fn forward(&mut self, track_sid: &str, audio: &AudioPacket, now: Instant) {
        for participant in &mut self.participants {
            let Some(subscription) = participant
                .subscriptions
                .iter_mut()
                .find(|s| s.live && s.track_sid == track_sid)
            else {
                continue;
            };
            // SRTP requires a sequence that starts below 65536 (RFC 3711, 3.3.1).
            let (seq, time) = *subscription.base.get_or_insert((audio.seq, audio.time));
            let Some(distance) = audio.seq.checked_sub(seq) else {
                continue;
            };
            let rebased = AudioPacket {
                mid: subscription.mid,
                seq: distance + 1,
                time: audio.time.wrapping_sub(time),
                marker: audio.marker,
                payload: Arc::clone(&audio.payload),
            };
            let mid = subscription.mid;
            participant.subscriber.send_audio(mid, &rebased, now);
        }
    }

    /// Forwards a client's data packet with the sender filled in.
    fn on_data(&mut self, at: usize, packet: &[u8], reliable: bool, now: Instant) {
        let Ok(mut packet) = proto::DataPacket::decode(packet) else {
            return;
        };
        let sender = &self.participants[at];
        let number = sender.number;
        packet
            .participant_identity
            .clone_from(&sender.info.identity);
        packet.participant_sid.clone_from(&sender.info.sid);
        self.send_data(&packet, reliable, Some(number), now);
    }

    fn send_data(
        &mut self,
        packet: &proto::DataPacket,
        reliable: bool,
        except: Option<u64>,
        now: Instant,
    ) {
        let to = &packet.destination_identities;
        let bytes = packet.encode_to_vec();
        for participant in &mut self.participants {
            let meant = to.is_empty() || to.contains(&participant.info.identity);
            if meant && Some(participant.number) != except {
                participant.subscriber.send_data(&bytes, reliable, now);
            }
        }
    }

    fn run_agents(&mut self, now: Instant) {
        let mut at = 0;
        while at < self.seats.len() {
            let due = self.seats[at]
                .agent
                .deadline()
                .is_some_and(|due| due <= now);
            // An agent that waits for its caller has no deadline; asking it is cheap.
            let acts = if due || self.seats[at].agent.deadline().is_none() {
                self.seats[at].agent.on_time(now)
            } else {
                Vec::new()
            };
            let mut left = false;
            for act in acts {
                if act == AgentAction::DeleteRoom {
                    self.close(proto::DisconnectReason::RoomDeleted);
                    return;
                }
                left |= self.act(at, act, now);
            }
            if left {
                self.agent_leaves(at, proto::DisconnectReason::ClientInitiated, now);
            } else {
                at += 1;
            }
        }
    }

    /// Performs an agent's action; returns whether the agent leaves.
    fn act(&mut self, at: usize, act: AgentAction, now: Instant) -> bool {
        let seat = &mut self.seats[at];
        match act {
            AgentAction::Appear => {
                seat.visible = !self.faults.has(&InjectedFault::Hidden);
                for info in seat.people_mut() {
                    info.state = proto::participant_info::State::Active.into();
                }
                // The avatar first: the real server announces an agent that publishes nothing up to three seconds late.
                if seat.avatar.is_some() {
                    self.announce_of(at, |seat| seat.speaker(AgentSound::Voice));
                }
                self.announce_of(at, |seat| &mut seat.info);
                self.report(&self.seats[at], &ReportEvent::Connected);
                self.agents_listen(now);
            }
            AgentAction::Publish(sound) => {
                let track = agent_track(sound, &self.faults);
                *seat.line(sound) = Some(AudioOut {
                    track_sid: track.sid.clone(),
                    seq: 0,
                    time: 0,
                });
                let speaker = seat.speaker(sound);
                speaker.tracks.push(track);
                speaker.is_publisher = true;
                self.announce_of(at, |seat| seat.speaker(sound));
                self.renegotiate(now);
            }
            AgentAction::Unpublish => {
                if let Some(line) = seat.voice.take() {
                    let tracks = &mut seat.speaker(AgentSound::Voice).tracks;
                    tracks.retain(|track| track.sid != line.track_sid);
                }
                self.announce_of(at, |seat| seat.speaker(AgentSound::Voice));
                self.renegotiate(now);
            }
            AgentAction::State(state) => {
                let attributes = &mut seat.info.attributes;
                attributes.insert("lk.agent.state".to_owned(), state.name().to_owned());
                self.announce_of(at, |seat| &mut seat.info);
            }
            AgentAction::Send {
                sound,
                frame,
                first,
            } => self.send_agent_frame(at, sound, frame, first, now),
            AgentAction::Heard(utterance) => self.on_heard(at, utterance),
            AgentAction::Said {
                clip,
                began,
                ended,
                interrupted,
            } => {
                let stretch = SpeechInterval::of(began, ended);
                let event = match clip {
                    Clip::Greeting | Clip::GreetingRest => ReportEvent::Greeted(stretch),
                    Clip::Reply if interrupted => ReportEvent::Interrupted(stretch),
                    Clip::Reply => ReportEvent::Replied(stretch),
                };
                self.report(&self.seats[at], &event);
            }
            AgentAction::TranscribeSelf(text) => {
                let track = seat.voice.as_ref().map(|line| &*line.track_sid);
                let stream = data_stream::transcript(&seat.info.identity, track, &text);
                self.send_stream(stream, now);
            }
            AgentAction::TranscribeCaller(text) => self.send_caller_transcript(&text, now),
            AgentAction::Session(event) => {
                let stream = data_stream::session(&seat.info.identity, event.encode());
                self.send_stream(stream, now);
            }
            // The room itself performs a deletion: no agent is left to act for.
            AgentAction::Leave | AgentAction::DeleteRoom => return true,
        }
        false
    }

    fn on_heard(&self, at: usize, utterance: Utterance) {
        let seat = &self.seats[at];
        let heard = ReportEvent::Heard {
            stretch: SpeechInterval::of(utterance.began, utterance.ended),
            seconds: (FRAME * utterance.frames).as_secs_f64(),
            over_agent: utterance.over_agent,
        };
        self.report(seat, &heard);
        self.shared.record(CallerUtterance {
            room: self.info.name.clone(),
            agent: seat.info.identity.clone(),
            frames: utterance.frames,
            duration: utterance.ended - utterance.began,
            over_agent: utterance.over_agent,
        });
    }

    /// The transcript is that of a caller's microphone track.
    fn send_caller_transcript(&mut self, text: &str, now: Instant) {
        let stream = self.participants.iter().find_map(|participant| {
            let identity = &participant.info.identity;
            let mut tracks = participant.tracks.iter();
            let track = tracks.find(|it| is_microphone(&it.info))?;
            Some(data_stream::transcript(
                identity,
                Some(&track.info.sid),
                text,
            ))
        });
        if let Some(stream) = stream {
            self.send_stream(stream, now);
        }
    }

    fn send_stream(&mut self, stream: Vec<proto::DataPacket>, now: Instant) {
        for packet in stream {
            self.send_data(&packet, true, None, now);
        }
    }

    fn send_agent_frame(
        &mut self,
        at: usize,
        sound: AgentSound,
        payload: Arc<[u8]>,
        first: bool,
        now: Instant,
    ) {
        let Some(line) = self.seats[at].line(sound) else {
            return;
        };
        line.seq += 1;
        line.time = line.time.wrapping_add(960);
        let audio = AudioPacket {
            mid: Mid::from("0"),
            seq: line.seq,
            time: line.time,
            marker: first,
            payload,
        };
        let sid = line.track_sid.clone();
        self.forward(&sid, &audio, now);
    }

    fn agent_leaves(&mut self, at: usize, reason: proto::DisconnectReason, now: Instant) {
        let mut seat = self.seats.remove(at);
        self.report(&seat, &ReportEvent::Left);
        for info in seat.people_mut() {
            info.state = proto::participant_info::State::Disconnected.into();
            info.disconnect_reason = reason.into();
            info.version += 1;
            self.broadcast(info);
        }
        self.renegotiate(now);
    }

    /// Sends all participants the state of an agent, or of its avatar.
    fn announce_of(
        &mut self,
        at: usize,
        who: impl Fn(&mut AgentSeat) -> &mut proto::ParticipantInfo,
    ) {
        let seat = &mut self.seats[at];
        let visible = seat.visible;
        let info = who(seat);
        info.version += 1;
        if visible {
            let info = info.clone();
            self.broadcast(&info);
        }
    }

    /// Sends all participants, including the participant itself, the state of a participant.
    fn announce(&mut self, at: usize) {
        let participant = &mut self.participants[at];
        participant.info.version += 1;
        participant.info.tracks = participant
            .tracks
            .iter()
            .filter(|track| track.live)
            .map(|track| track.info.clone())
            .collect();
        let info = participant.info.clone();
        self.broadcast(&info);
    }

    fn broadcast(&mut self, info: &proto::ParticipantInfo) {
        for participant in &mut self.participants {
            let update = proto::ParticipantUpdate {
                participants: vec![info.clone()],
            };
            participant.send(Down::Update(update));
        }
    }

    /// Offers each client the tracks that it lacks, and removes those that are gone.
    fn renegotiate(&mut self, now: Instant) {
        let mut tracks: Vec<(String, String)> = Vec::new();
        for participant in &self.participants {
            let live = participant.tracks.iter().filter(|track| track.live);
            tracks.extend(live.map(|t| (participant.info.sid.clone(), t.info.sid.clone())));
        }
        let seats = self.seats.iter().filter(|seat| seat.visible);
        for info in seats.flat_map(AgentSeat::people) {
            let published = info.tracks.iter();
            tracks.extend(published.map(|track| (info.sid.clone(), track.sid.clone())));
        }
        for participant in &mut self.participants {
            participant.negotiate(&tracks, now);
        }
    }

    fn on_command(&mut self, command: RoomCommand, now: Instant) {
        // The requester may have gone; then the answer is dropped.
        match command {
            RoomCommand::Join(newcomer, reply) => drop(reply.send(self.join(&newcomer, now))),
            RoomCommand::Signal(number, message) => self.on_signal(number, *message, now),
            RoomCommand::SignalClosed(number) => {
                for p in self.participants.iter_mut().filter(|p| p.number == number) {
                    p.signal_lost = Some(now);
                }
            }
            RoomCommand::Info(reply) => drop(reply.send(self.info())),
            RoomCommand::SetMetadata(metadata, reply) => {
                self.info.metadata = metadata;
                let room = self.info();
                for participant in &mut self.participants {
                    let room = Some(room.clone());
                    participant.send(Down::RoomUpdate(proto::RoomUpdate { room }));
                }
                drop(reply.send(room));
            }
            RoomCommand::Participants(reply) => drop(reply.send(self.all_participants())),
            RoomCommand::Remove(identity, reply) => drop(reply.send(self.expel(&identity, now))),
            RoomCommand::Dispatch(dispatch, reply) => {
                drop(reply.send(self.add_dispatch(*dispatch)));
            }
            RoomCommand::ListDispatch(reply) => {
                let all = self.dispatches.iter().map(|d| d.info.clone()).collect();
                drop(reply.send(all));
            }
            RoomCommand::DeleteDispatch(id, reply) => {
                drop(reply.send(self.delete_dispatch(&id, now)));
            }
            RoomCommand::JobAccepted(job) => self.job_accepted(*job),
            RoomCommand::AgentJoin(job, script) => self.agent_joins(&job, *script, now),
            RoomCommand::Close(reply) => {
                self.close(proto::DisconnectReason::RoomDeleted);
                if reply.send(()).is_err() {
                    tracing::debug!("a room was deleted, but its requester had gone");
                }
            }
        }
    }

    fn info(&self) -> proto::Room {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let all_participants = self.all_participants();
        let publishers = all_participants.iter().filter(|info| info.is_publisher);
        proto::Room {
            // As livekit-server counts: an agent is not a participant here, but it is a publisher.
            num_participants: count(self.people()),
            num_publishers: count(publishers.count()),
            ..self.info.clone()
        }
    }

    /// Participants other than agents: the only ones that count for limits and keep the room open.
    fn people(&self) -> usize {
        let agent = i32::from(proto::participant_info::Kind::Agent);
        let people = self.participants.iter().filter(|p| p.info.kind != agent);
        people.count()
    }

    fn all_participants(&self) -> Vec<proto::ParticipantInfo> {
        let people = self.participants.iter().map(|p| &p.info);
        people
            .chain(self.seats.iter().flat_map(AgentSeat::people))
            .cloned()
            .collect()
    }

    fn visible_participants(&self) -> Vec<proto::ParticipantInfo> {
        let mut all = self.all_participants();
        all.retain(|info| info.permission.as_ref().is_none_or(|it| !it.hidden));
        all
    }

    fn join(&mut self, newcomer: &Newcomer, now: Instant) -> Result<JoinedClient, RoomFull> {
        let twin = self
            .participants
            .iter()
            .find(|p| p.info.identity == newcomer.identity)
            .map(|p| p.number);
        if let Some(twin) = twin {
            self.remove(twin, Some(proto::DisconnectReason::DuplicateIdentity), now);
        }
        let limit = self.max_people();
        let is_agent = newcomer.kind == proto::participant_info::Kind::Agent;
        if (!is_agent && self.people() >= limit) || self.participants.len() >= MAX_PARTICIPANTS {
            return Err(RoomFull);
        }
        let number = self.next_number;
        self.next_number += 1;
        let (out, messages) = mpsc::channel(SIGNAL_QUEUE);
        let peer = |side| {
            let id = PeerId {
                participant: number,
                side,
            };
            ClientPeer::new(id, &self.shared.net, self.datagrams.clone(), now)
        };
        let participant = Client {
            number,
            info: newcomer_info(newcomer),
            auto_subscribe: newcomer.auto_subscribe,
            out,
            publisher: peer(Side::Publisher),
            subscriber: peer(Side::Subscriber),
            tracks: Vec::new(),
            subscriptions: Vec::new(),
            signal_lost: None,
        };
        let join = Box::new(self.join_response(&participant.info));
        self.participants.push(participant);
        if !is_agent {
            self.was_joined = true;
            self.empty_since = None;
        }
        self.renegotiate(now);
        Ok(JoinedClient {
            number,
            join,
            messages,
        })
    }

    fn join_response(&self, info: &proto::ParticipantInfo) -> proto::JoinResponse {
        proto::JoinResponse {
            room: Some(self.info()),
            participant: Some(info.clone()),
            other_participants: self.visible_participants(),
            server_version: SERVER_VERSION.to_owned(),
            subscriber_primary: true,
            ping_timeout: 15,
            ping_interval: 5,
            server_info: Some(proto::ServerInfo {
                version: SERVER_VERSION.to_owned(),
                protocol: 17,
                node_id: self
                    .faults
                    .node()
                    .unwrap_or(&self.shared.node_id)
                    .to_owned(),
                region: self.faults.region().to_owned(),
                agent_protocol: 1,
                ..proto::ServerInfo::default()
            }),
            enabled_publish_codecs: vec![codec("audio/opus")],
            // The client negotiates its publisher connection at once.
            fast_publish: true,
            ..proto::JoinResponse::default()
        }
    }

    fn on_signal(&mut self, number: u64, message: Up, now: Instant) {
        let Some(at) = self.participants.iter().position(|p| p.number == number) else {
            return;
        };
        match message {
            Up::Offer(offer) => self.on_offer(at, &offer, now),
            Up::Answer(answer) => self.on_answer(at, &answer, now),
            Up::Trickle(trickle) => {
                let side = if trickle.target == i32::from(proto::SignalTarget::Subscriber) {
                    Side::Subscriber
                } else {
                    Side::Publisher
                };
                let peer = self.participants[at].peer(side);
                peer.add_candidate(&trickle.candidate_init, now);
            }
            Up::AddTrack(request) => self.participants[at].add_track(request),
            Up::Mute(mute) => {
                let tracks = &mut self.participants[at].tracks;
                for track in tracks.iter_mut().filter(|t| t.info.sid == mute.sid) {
                    track.info.muted = mute.muted;
                }
                self.announce(at);
            }
            Up::Leave(_) => self.leaving.push((number, None)),
            _ => {}
        }
    }

    fn on_offer(&mut self, at: usize, offer: &proto::SessionDescription, now: Instant) {
        let participant = &mut self.participants[at];
        match participant.publisher.accept_offer(&offer.sdp, now) {
            Ok(sdp) => {
                for (mid, cid) in track_ids(&offer.sdp) {
                    for track in participant.tracks.iter_mut().filter(|t| t.cid == cid) {
                        track.mid = Some(Mid::from(mid.as_str()));
                    }
                }
                let answer = proto::SessionDescription {
                    r#type: "answer".to_owned(),
                    sdp,
                    id: offer.id,
                    ..proto::SessionDescription::default()
                };
                participant.send(Down::Answer(answer));
                participant.trickle(Side::Publisher, first_mid(&offer.sdp));
            }
            Err(error) => self.bad_description(at, &error),
        }
    }

    fn on_answer(&mut self, at: usize, answer: &proto::SessionDescription, now: Instant) {
        let participant = &mut self.participants[at];
        let accepted = participant
            .subscriber
            .accept_answer(answer.id, &answer.sdp, now);
        match accepted {
            Ok(true) => {
                let mut began = Vec::new();
                for subscription in participant.subscriptions.iter_mut().filter(|s| !s.live) {
                    subscription.live = true;
                    began.push(subscription.track_sid.clone());
                }
                for track_sid in began {
                    self.notify_subscribed(&track_sid, now);
                }
                // Changes in the meantime waited for this answer.
                self.renegotiate(now);
            }
            Ok(false) => tracing::debug!("an answer to an offer that is no longer open"),
            Err(error) => self.bad_description(at, &error),
        }
    }

    fn bad_description(&mut self, at: usize, error: &str) {
        let number = self.participants[at].number;
        tracing::warn!(
            room = self.info.name,
            error,
            "rejected a client's session description"
        );
        self.leaving
            .push((number, Some(proto::DisconnectReason::UnknownReason)));
    }

    /// Removes a participant. With a `reason`, it is sent a `Leave`; `None` means that it left by itself.
    fn remove(&mut self, number: u64, reason: Option<proto::DisconnectReason>, now: Instant) {
        let Some(at) = self.participants.iter().position(|p| p.number == number) else {
            return;
        };
        let mut gone = self.participants.remove(at);
        if let Some(reason) = reason {
            gone.send(leave(reason));
        }
        gone.info.state = proto::participant_info::State::Disconnected.into();
        gone.info.version += 1;
        gone.info.disconnect_reason = reason
            .unwrap_or(proto::DisconnectReason::ClientInitiated)
            .into();
        self.broadcast(&gone.info);
        if self.people() == 0 {
            self.empty_since.get_or_insert(now);
        }
        self.renegotiate(now);
    }

    fn expel(&mut self, identity: &str, now: Instant) -> bool {
        let found = self
            .participants
            .iter()
            .find(|p| p.info.identity == identity)
            .map(|p| p.number);
        if let Some(number) = found {
            self.remove(
                number,
                Some(proto::DisconnectReason::ParticipantRemoved),
                now,
            );
            return true;
        }
        let is_of = |seat: &AgentSeat| seat.people().any(|info| info.identity == identity);
        match self.seats.iter().position(is_of) {
            Some(at) => {
                let reason = proto::DisconnectReason::ParticipantRemoved;
                self.agent_leaves(at, reason, now);
                true
            }
            None => false,
        }
    }

    fn add_dispatch(&mut self, mut info: proto::AgentDispatch) -> Option<proto::AgentDispatch> {
        if self.dispatches.len() >= MAX_DISPATCHES {
            return None;
        }
        info.room.clone_from(&self.info.name);
        info.state = Some(proto::AgentDispatchState {
            created_at: unix_millis() * 1_000_000,
            ..proto::AgentDispatchState::default()
        });
        let cancel = CancellationToken::new();
        // As livekit-server routes: a worker without a deployment takes no job for one, and the other way round.
        let is_target = info.agent_name == self.shared.settings.agent_name
            && info.deployment == self.faults.deployment();
        let is_stray = info.agent_name.is_empty() && self.faults.has(&InjectedFault::Stray);
        if is_target || is_stray {
            // Faults concern only the target's agent.
            let none = Faults::default();
            let faults = if is_target { &self.faults } else { &none };
            let script = AgentScript::new(faults);
            let launch = |script: AgentScript| {
                let job = Box::new(new_job(&info, &self.info, self.faults.worker_id()));
                let (shared, cancel) = (Arc::clone(&self.shared), cancel.clone());
                let errand = AgentJob {
                    job,
                    script,
                    cancel,
                    room_closed: self.closed.clone(),
                };
                self.shared.tracker.spawn(bring_agent(errand, shared));
            };
            if script.has(&InjectedFault::Duplicate) {
                let mut second = script.clone();
                second.join_delay += Duration::from_millis(300);
                launch(second);
            }
            launch(script);
        }
        self.dispatches.push(RoomDispatch {
            info: info.clone(),
            cancel,
        });
        Some(info)
    }

    fn delete_dispatch(&mut self, id: &str, now: Instant) -> Option<proto::AgentDispatch> {
        let at = self.dispatches.iter().position(|d| d.info.id == id)?;
        let dispatch = self.dispatches.remove(at);
        dispatch.cancel.cancel();
        while let Some(at) = self.seats.iter().position(|s| s.dispatch_id == id) {
            self.agent_leaves(at, proto::DisconnectReason::ClientInitiated, now);
        }
        Some(dispatch.info)
    }

    fn job_accepted(&mut self, job: proto::Job) {
        let dispatch = self
            .dispatches
            .iter_mut()
            .find(|dispatch| dispatch.info.id == job.dispatch_id);
        if let Some(state) = dispatch.and_then(|dispatch| dispatch.info.state.as_mut()) {
            state.jobs.push(job);
        }
    }

    /// Adds an agent whose media is not up yet: it does not hear, and the others do not see it.
    fn agent_joins(&mut self, job: &proto::Job, script: AgentScript, now: Instant) {
        let mut info = agent_info(job);
        if let Some(version) = &script.version {
            info.attributes
                .insert("agent.version".to_owned(), version.clone());
        }
        if let Some(permission) = &mut info.permission {
            permission.hidden = script.has(&InjectedFault::Hidden);
        }
        let (avatar, turned_away) = self.avatar(&script, &info);
        let mut script = script;
        if turned_away {
            script.speaks_by_missing_avatar();
        }
        let seat = AgentSeat {
            avatar,
            info,
            agent: DemoAgent::new(script, Arc::clone(&self.shared.voice), now),
            dispatch_id: job.dispatch_id.clone(),
            visible: false,
            listens_to: Vec::new(),
            voice: None,
            background: None,
        };
        self.seats.push(seat);
    }

    /// The participant that speaks for an agent with this script, and whether the room turned it away.
    fn avatar(
        &self,
        script: &AgentScript,
        agent: &proto::ParticipantInfo,
    ) -> (Option<proto::ParticipantInfo>, bool) {
        let avatar = || avatar_of(agent, &self.info.name);
        if script.has(&InjectedFault::Avatar) {
            return (Some(avatar()), false);
        }
        if !script.has(&InjectedFault::StandardAvatar) {
            return (None, false);
        }
        if self.people() >= self.max_people() {
            return (None, true);
        }
        let standard = proto::ParticipantInfo {
            kind: proto::participant_info::Kind::Standard.into(),
            ..avatar()
        };
        (Some(standard), false)
    }

    fn max_people(&self) -> usize {
        match self.info.max_participants {
            0 => MAX_PARTICIPANTS,
            limit => usize::try_from(limit).unwrap_or(MAX_PARTICIPANTS),
        }
    }

    fn close(&mut self, reason: proto::DisconnectReason) {
        for participant in &mut self.participants {
            participant.send(leave(reason));
        }
        for seat in &self.seats {
            self.report(seat, &ReportEvent::Left);
        }
        self.participants.clear();
        self.seats.clear();
        self.shared.forget(&self.info.name, self.id);
        self.closed.cancel();
    }
}

/// Brings a job's agent to its room.
async fn bring_agent(errand: AgentJob, shared: Arc<Registry>) {
    let Some(errand) = errand.run(&shared).await else {
        return;
    };
    // Connecting creates a room that is missing, as a token with roomJoin may.
    if let Ok(room) = open(&shared, errand.room_name(), RoomOptions::default()) {
        let script = Box::new(errand.script);
        room.send(RoomCommand::AgentJoin(errand.job, script)).await;
    }
}

/// Whether a datagram is RTP or RTCP, and not STUN or DTLS (RFC 7983, section 7).
fn is_media(datagram: &[u8]) -> bool {
    matches!(datagram.first(), Some(128..=191))
}

fn codec(mime: &str) -> proto::Codec {
    proto::Codec {
        mime: mime.to_owned(),
        ..proto::Codec::default()
    }
}
