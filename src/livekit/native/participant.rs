//! The native participant: one task that owns the signal connection, two peer connections, the speech detector and the
//! caller. It reports everything as a room event with the time at which it was received.
//!
//! It uses two peer connections (`/rtc`), one per direction. In a trial with a single one, up to 15 of 50 rooms lost
//! their audio, because that path needs a queue of negotiations.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use livekit_protocol as proto;
use proto::signal_request::Message as Request;
use proto::signal_response::Message as Response;
use str0m::media::Mid;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::peer::relays::Relays;
use super::peer::{
    self, BrokenTransport, Incoming, OutgoingPacket, PeerConnection, PeerError, PeerEvent,
    ReceivedPacket, ReceiverReport,
};
use crate::config::Ice;
use crate::livekit::audio::caller::{AgentFrame, CallerOutput, CallerPlayer};
use crate::livekit::audio::opus::{self, Decoder, OpusFrame};
use crate::livekit::audio::recording::{self, CallSound, SoundPacket};
use crate::livekit::audio::rtp::{self, RtpHeader, RtpReceiver};
use crate::livekit::audio::speech::Detector;
use crate::livekit::event::{
    EndReason, MediaPath, RoomEvent, RoomEventKind, Speaker, UplinkReport,
};
use crate::livekit::join::{Adoption, JoinRequest};
use crate::livekit::room::observer::{EventSender, LEAVE_TIMEOUT, Observer};
use crate::livekit::room::voice_selector::VoiceSelector;
use crate::livekit::wire::candidate::candidate_line;
use crate::livekit::wire::signal::{Joined, Signal, SignalError};
use crate::livekit::wire::turn::TurnServer;

/// How long a transport may be down while the signal connection is alive. A ping every five seconds shows whether it
/// is.
const MEDIA_DOWN_TIMEOUT: Duration = Duration::from_secs(6);

/// How long a transport may be down while the signal connection is silent, too. Then the server or the network is down,
/// and the ping timeout (15 s), which comes first, gives the better verdict.
const SERVER_SILENT_TIMEOUT: Duration = Duration::from_secs(20);

/// Size of the receive buffer in bytes; the MTU of the path is smaller.
const MAX_DATAGRAM: usize = 2_048;

/// Maximum number of SSRCs whose m-line is cached; a probe's room has one or two.
const MAX_STREAMS: usize = 16;

/// Maximum number of video tracks that are paused; an avatar has one.
const MAX_VIDEO_TRACKS: usize = 64;

/// Maximum number of packets that are buffered before the agent is known, 5 s of 20 ms. The server may report a
/// participant three seconds after it joined.
const MAX_EARLY_PACKETS: usize = 250;

/// How often a connected participant sends the packets that are due: at the pace of an agent, which sends one every 20
/// ms. All participants do so at the same times, because a wake-up costs more than a packet.
const ROUND_INTERVAL: Duration = Duration::from_millis(20);

/// How often the sockets are read if no packet has to be sent earlier: every second round, because the second of two
/// packets costs far less than the first.
const READ_INTERVAL: Duration = Duration::from_millis(40);

/// Maximum number of datagrams that are read in a row, so that a flood does not hold up the signal connection and
/// timers.
const MAX_DATAGRAMS_IN_A_ROW: usize = 64;

/// The id of the canary's only offer; the server's answer repeats it.
const OFFER_ID: u32 = 1;

const FORCED_RELAY: &str = "LiveKit asked for media over TURN servers only (force_relay): calls of the same room and identity \
                            failed without";

/// Runs a participant: joins, detects speech and speaks as the caller until it leaves or fails. The caller sends the last event.
pub(crate) async fn run(
    request: JoinRequest,
    events: mpsc::Sender<RoomEvent>,
    leave: CancellationToken,
    mut adoption: Adoption,
    voice: &mut RtpReceiver,
    sound: &mut CallSound,
) -> EndReason {
    let events = EventSender::new(events);
    let joining = async {
        let joined = connect(&request, &events).await?;
        NativeSession::start(&request, events, voice, sound, joined)
    };
    let mut session = tokio::select! {
        biased;
        () = leave.cancelled() => return EndReason::Left,
        session = joining => match session {
            Ok(session) => session,
            Err(why) => return why,
        },
    };
    let served = session.serve(&leave, &mut adoption).await;
    let reported = session.observer.report_unfinished();
    let why = served
        .and_then(|why| reported.map(|()| why))
        .unwrap_or_else(|why| why);
    for peer in [&mut session.publisher, &mut session.subscriber] {
        peer.close(Instant::now());
    }
    // A connection that failed or that the server closed carries no `Leave`.
    if !matches!(why, EndReason::Signal(_) | EndReason::Removed { .. }) {
        session.signal.leave(LEAVE_TIMEOUT).await;
    }
    why
}

/// Connects the signal connection and reports the time of the upgrade request before the server answers it.
async fn connect(request: &JoinRequest, events: &EventSender) -> Result<Joined, EndReason> {
    let token = request.token()?;
    let (requested, request_sent) = oneshot::channel();
    let connecting = Signal::connect(&request.endpoint, &token, request.signal_timeout, requested);
    let reporting = async {
        match request_sent.await {
            Ok(at) => events.send(at, RoomEventKind::SignalRequested),
            // There was no connection to send the request on. `connecting` returns the reason.
            Err(_) => Ok(()),
        }
    };
    let (joined, reported) = tokio::join!(connecting, reporting);
    reported?;
    joined.map_err(EndReason::Signal)
}

/// A participant that has joined its room.
struct NativeSession<'a> {
    observer: Observer,
    signal: Signal,
    publisher: PeerConnection,
    subscriber: PeerConnection,
    voice: &'a mut RtpReceiver,
    sound: &'a mut CallSound,
    decoder: Decoder,
    speech: Detector,
    caller: CallerPlayer<OpusFrame>,
    track: CallerTrack,
    voice_selector: VoiceSelector<Mid, ReceivedPacket>,
    /// The m-line of each received SSRC; cleared by each negotiation.
    streams: Vec<(u32, Option<Mid>)>,
    /// The sids of the video tracks that were paused.
    paused: Vec<String>,
    media_reported: bool,
    /// The round in which the sockets are read next.
    read_at: Instant,
    read_interval: Duration,
    /// The settings allow UDP, so media over TCP means that UDP failed.
    udp_tried: bool,
}

/// The state of the caller's track.
struct CallerTrack {
    mid: Mid,
    /// The sequence number of the last packet; it does not wrap at 2^16.
    sequence: u64,
    /// The number before that of the first packet.
    before_first: u64,
    /// A time and the matching RTP timestamp.
    origin: (Instant, u32),
    /// Ticks since the origin, of the last packet.
    last: Option<u64>,
}

/// What the session handles next.
enum SessionStep {
    Left,
    Message(Result<(Instant, Box<Response>), SignalError>),
    Incoming(proto::SignalTarget, Incoming),
    /// This agent without a name is the target's.
    Adopted(String),
    Time,
}

impl<'a> NativeSession<'a> {
    /// Sends `AddTrack` and the offer at once, without waiting for the acknowledgement: the server handles the requests
    /// in order.
    fn start(
        request: &JoinRequest,
        events: EventSender,
        voice: &'a mut RtpReceiver,
        sound: &'a mut CallSound,
        joined: Joined,
    ) -> Result<Box<Self>, EndReason> {
        let Joined {
            signal,
            response,
            early,
            at,
            local,
        } = joined;
        // LiveKit matches `AddTrack.cid` with the track id of the offer's msid, so both must be equal.
        let cid = format!("echo-{:016x}", fastrand::u64(..));
        let mut observer = Observer::new(request, events, cid.clone());
        observer.on_join(at, &response)?;
        sound.start(at);
        let ice = forced_relay(request.ice, &response);
        let servers = TurnServer::offered(&response.ice_servers);
        let peer = |target| {
            let relays = Relays::new(&request.endpoint, &servers, ice);
            let peer = PeerConnection::new(target, local.ip(), ice, relays);
            peer.map_err(|error| media_failed(peer::name(target), &error))
        };
        let mut publisher = peer(proto::SignalTarget::Publisher)?;
        let subscriber = peer(proto::SignalTarget::Subscriber)?;
        let (mid, offer) = publisher.offer_track("echo", &cid, OFFER_ID);
        let before_first = fastrand::u64(1..1 << 15);
        let mut session = Box::new(Self {
            observer,
            signal,
            publisher,
            subscriber,
            voice,
            sound,
            decoder: Decoder::default(),
            speech: Detector::new(request.speech.clone(), opus::RATE),
            caller: CallerPlayer::new(request.caller.clone(), request.agent_turn),
            track: CallerTrack {
                mid,
                // Below 2^16: the stack derives the rollover counter of SRTP from the higher bits, and the server
                // assumes 0 (RFC 3711, section 3.3.1).
                sequence: before_first,
                before_first,
                origin: (Instant::now(), fastrand::u32(..)),
                last: None,
            },
            voice_selector: VoiceSelector::new(MAX_EARLY_PACKETS),
            streams: Vec::new(),
            paused: Vec::new(),
            media_reported: false,
            read_at: at,
            read_interval: if request.caller.silence < READ_INTERVAL {
                ROUND_INTERVAL
            } else {
                READ_INTERVAL
            },
            udp_tried: ice == Ice::All,
        });
        session.publish(cid, offer)?;
        session.report_addresses()?;
        if ice != request.ice {
            session.note(at, FORCED_RELAY.to_owned())?;
        }
        session.on_participants(at, response.other_participants, true)?;
        // The canary is in the room only since the join response, so the time of an earlier message says nothing.
        for message in early {
            match message {
                Response::Update(update) => {
                    session.on_participants(at, update.participants, true)?;
                }
                // There was nothing to negotiate before the join response.
                Response::Answer(_) | Response::Offer(_) | Response::Trickle(_) => {}
                other => session.observer.on_message(at, other)?,
            }
        }
        Ok(session)
    }

    fn publish(&mut self, cid: String, offer: String) -> Result<(), EndReason> {
        self.send(Request::AddTrack(proto::AddTrackRequest {
            cid,
            name: "echo".to_owned(),
            r#type: proto::TrackType::Audio.into(),
            // An agent listens only to a track whose source is MICROPHONE.
            source: proto::TrackSource::Microphone.into(),
            // The track is plain Opus: see `PeerConnection::new`.
            disable_red: true,
            ..proto::AddTrackRequest::default()
        }))?;
        self.send(Request::Offer(description("offer", offer, OFFER_ID)))
    }

    async fn serve(
        &mut self,
        leave: &CancellationToken,
        adoption: &mut Adoption,
    ) -> Result<EndReason, EndReason> {
        let mut buffer = [0; MAX_DATAGRAM];
        let timer = sleep_until(Instant::now());
        let left = leave.cancelled();
        tokio::pin!(timer, left);
        loop {
            let now = Instant::now();
            self.settle(now)?;
            let deadline = self.next_deadline(now);
            if deadline != timer.deadline() {
                timer.as_mut().reset(deadline);
            }
            let step = self
                .next_step(left.as_mut(), timer.as_mut(), adoption, &mut buffer)
                .await;
            match step {
                SessionStep::Left => return Ok(EndReason::Left),
                SessionStep::Message(message) => {
                    // Media that arrived before the message comes first, even if the message ends the session.
                    self.drain(&mut buffer)?;
                    let (at, message) = message.map_err(EndReason::Signal)?;
                    self.on_message(at, *message).await?;
                }
                SessionStep::Incoming(target, incoming) => {
                    self.receive(target, &incoming, &buffer)?;
                }
                SessionStep::Adopted(identity) => {
                    let now = Instant::now();
                    let clock = self.signal.clock();
                    self.observer.adopt(now, &identity, clock)?;
                    self.select_voice(now)?;
                }
                SessionStep::Time => self.on_timer(&mut buffer)?,
            }
        }
    }

    /// Reads the sockets if this round is one for reading. The next [`settle`](Self::settle) sends in any round.
    fn on_timer(&mut self, buffer: &mut [u8]) -> Result<(), EndReason> {
        if Instant::now() < self.read_at || !self.drain(buffer)? {
            return Ok(());
        }
        let now = Instant::now();
        // Before that, each transport sets its own deadline.
        if self.media_reported {
            self.read_at = round_start(now) + self.read_interval;
        }
        self.on_time(now)
    }

    /// Handles the datagrams that wait on the UDP sockets; returns whether none is left.
    fn drain(&mut self, buffer: &mut [u8]) -> Result<bool, EndReason> {
        for _ in 0..MAX_DATAGRAMS_IN_A_ROW {
            let Some((target, incoming)) = self.try_recv(buffer) else {
                return Ok(true);
            };
            self.receive(target, &incoming, buffer)?;
            self.settle(Instant::now())?;
        }
        Ok(false)
    }

    fn try_recv(&mut self, buffer: &mut [u8]) -> Option<(proto::SignalTarget, Incoming)> {
        if let Some(incoming) = self.subscriber.try_recv(buffer) {
            return Some((proto::SignalTarget::Subscriber, incoming));
        }
        let incoming = self.publisher.try_recv(buffer)?;
        Some((proto::SignalTarget::Publisher, incoming))
    }

    /// Waits for the next thing to handle.
    ///
    /// Received data comes before the timers. A deadline that passed while this task did not run proves nothing.
    async fn next_step(
        &mut self,
        left: impl Future<Output = ()>,
        timer: Pin<&mut Sleep>,
        adoption: &mut Adoption,
        buffer: &mut [u8],
    ) -> SessionStep {
        tokio::select! {
            biased;
            () = left => SessionStep::Left,
            message = self.signal.recv() => {
                SessionStep::Message(message.map(|(at, message)| (at, Box::new(message))))
            }
            (target, incoming) = incoming(&mut self.publisher, &mut self.subscriber, buffer) => {
                SessionStep::Incoming(target, incoming)
            }
            identity = adoption.next() => SessionStep::Adopted(identity),
            () = timer => SessionStep::Time,
        }
    }

    fn receive(
        &mut self,
        target: proto::SignalTarget,
        incoming: &Incoming,
        buffer: &[u8],
    ) -> Result<(), EndReason> {
        let peer = self.peer(target);
        peer.on_incoming(Instant::now(), incoming, buffer)
            .map_err(|error| media_failed(peer.name(), &error))
    }

    fn peer(&mut self, target: proto::SignalTarget) -> &mut PeerConnection {
        match target {
            proto::SignalTarget::Publisher => &mut self.publisher,
            proto::SignalTarget::Subscriber => &mut self.subscriber,
        }
    }

    /// Handles everything that is due at `now`.
    fn settle(&mut self, now: Instant) -> Result<(), EndReason> {
        while let Some(event) = poll(&mut self.subscriber, now)? {
            match event {
                PeerEvent::Connected => self.on_connected(now)?,
                PeerEvent::Packet(packet) => self.on_packet(packet)?,
                PeerEvent::Data(at, data) => self.observer.on_data(at, &data)?,
                PeerEvent::RoundTrip => self.report_connections(now)?,
                PeerEvent::Candidate(line) => {
                    self.trickle(proto::SignalTarget::Subscriber, vec![line])?;
                }
                PeerEvent::RelayFailed(fault) => self.note(now, fault)?,
                // It sends no track.
                PeerEvent::Report(_) => {}
            }
        }
        // Polling the publisher sends the packets, so they are queued before. Otherwise each would wait for a round.
        self.play(now)?;
        while let Some(event) = poll(&mut self.publisher, now)? {
            match event {
                PeerEvent::Connected => {
                    self.caller.open(round_start(now));
                    self.on_connected(now)?;
                }
                PeerEvent::Report(report) => {
                    let report = self.track.uplink(report);
                    self.observer.on_uplink(now, report)?;
                }
                PeerEvent::Candidate(line) => {
                    self.trickle(proto::SignalTarget::Publisher, vec![line])?;
                }
                PeerEvent::RelayFailed(fault) => self.note(now, fault)?,
                // It receives neither, and its round trip is reported with the subscriber's.
                PeerEvent::Packet(_) | PeerEvent::Data(..) | PeerEvent::RoundTrip => {}
            }
        }
        Ok(())
    }

    /// Checks the timeouts. Call it only after the sockets have been read to the end.
    fn on_time(&mut self, now: Instant) -> Result<(), EndReason> {
        if let Some(event) = self.speech.on_time(now) {
            self.observer
                .on_speech(&mut self.caller, &self.speech, event)?;
        }
        for peer in [&self.publisher, &self.subscriber] {
            if let Some(broken) = peer.broken(now)
                && now >= self.give_up_at(broken)
            {
                return Err(EndReason::MediaFailed {
                    transport: peer.name(),
                    detail: peer.describe(broken),
                });
            }
        }
        Ok(())
    }

    /// When to wake up next: at a round for a connected transport, otherwise at the transport's own deadline.
    fn next_deadline(&self, now: Instant) -> Instant {
        let peers = [&self.publisher, &self.subscriber];
        let deadlines = peers.map(|peer| {
            if peer.connected() {
                next_round(now, self.read_at, self.caller.next_deadline())
            } else {
                peer.next_deadline()
            }
        });
        deadlines[0].min(deadlines[1])
    }

    /// When a broken transport ends the session. If the server is silent on the signal connection, too, the ping
    /// timeout comes first.
    fn give_up_at(&self, broken: BrokenTransport) -> Instant {
        let alive = self.signal.received_at() > broken.since;
        broken.since
            + if alive {
                MEDIA_DOWN_TIMEOUT
            } else {
                SERVER_SILENT_TIMEOUT
            }
    }

    fn on_connected(&mut self, now: Instant) -> Result<(), EndReason> {
        if !self.media_reported && self.publisher.connected() && self.subscriber.connected() {
            self.media_reported = true;
            let path = self.publisher.path().max(self.subscriber.path());
            self.observer
                .events
                .send(now, RoomEventKind::MediaConnected { path })?;
            if path != Some(MediaPath::Udp) && self.udp_tried {
                self.observer.events.send(now, RoomEventKind::UdpBlocked)?;
            }
            self.report_connections(now)?;
        }
        Ok(())
    }

    /// Reports the paths of both peer connections, once both are up.
    fn report_connections(&mut self, now: Instant) -> Result<(), EndReason> {
        if !self.media_reported {
            return Ok(());
        }
        let peers = [&self.publisher, &self.subscriber];
        let connections = peers.into_iter().filter_map(PeerConnection::connection);
        let event = RoomEventKind::MediaConnections(connections.collect());
        self.observer.events.send_if_room(now, event)
    }

    fn note(&mut self, now: Instant, note: String) -> Result<(), EndReason> {
        self.observer
            .events
            .send(now, RoomEventKind::MediaNote(note))
    }

    async fn on_message(&mut self, at: Instant, message: Response) -> Result<(), EndReason> {
        match message {
            Response::Answer(answer) => self.on_answer(answer).await,
            Response::Offer(offer) => self.on_offer(at, offer).await,
            Response::Trickle(trickle) => self.on_trickle(&trickle).await,
            Response::Update(update) => self.on_participants(at, update.participants, false),
            other => self.observer.on_message(at, other),
        }
    }

    async fn on_answer(&mut self, answer: proto::SessionDescription) -> Result<(), EndReason> {
        let accepted = self.publisher.accept_answer(answer.id, &answer.sdp).await;
        // The network does not garble an answer. A server without Opus, however, answers with a track without any
        // codec.
        let candidates = accepted.map_err(|error| {
            EndReason::PublishFailed(format!(
                "{error} (does LiveKit's enabled_codecs list Opus?)"
            ))
        })?;
        self.report_addresses()?;
        self.trickle(proto::SignalTarget::Publisher, candidates)
    }

    /// Answers an offer under the offer's own id: the server may send the next offer before it has the answer to this
    /// one.
    async fn on_offer(
        &mut self,
        at: Instant,
        offer: proto::SessionDescription,
    ) -> Result<(), EndReason> {
        let accepted = self.subscriber.accept_offer(&offer.sdp).await;
        let (answer, candidates) = accepted.map_err(|error| media_failed("subscriber", &error))?;
        self.report_addresses()?;
        self.send(Request::Answer(description("answer", answer, offer.id)))?;
        self.trickle(proto::SignalTarget::Subscriber, candidates)?;
        self.streams.clear();
        self.select_voice(at)
    }

    async fn on_trickle(&mut self, trickle: &proto::TrickleRequest) -> Result<(), EndReason> {
        let Some(line) = candidate_line(trickle) else {
            return Ok(());
        };
        let candidates = self.peer(trickle.target()).add_candidate(&line).await;
        self.report_addresses()?;
        self.trickle(trickle.target(), candidates)
    }

    fn report_addresses(&mut self) -> Result<(), EndReason> {
        let mut addresses = self.publisher.take_addresses();
        addresses.append(&mut self.subscriber.take_addresses());
        self.observer.on_addresses(Instant::now(), addresses)
    }

    fn trickle(
        &mut self,
        target: proto::SignalTarget,
        candidates: Vec<String>,
    ) -> Result<(), EndReason> {
        for candidate in candidates {
            let init =
                serde_json::json!({ "candidate": candidate, "sdpMid": "0", "sdpMLineIndex": 0 });
            self.send(Request::Trickle(proto::TrickleRequest {
                candidate_init: init.to_string(),
                target: target.into(),
                r#final: false,
            }))?;
        }
        Ok(())
    }

    fn on_participants(
        &mut self,
        at: Instant,
        participants: Vec<proto::ParticipantInfo>,
        in_join_response: bool,
    ) -> Result<(), EndReason> {
        let clock = self.signal.clock();
        self.pause_video(&participants)?;
        self.observer
            .on_participants(at, participants, in_join_response, clock)?;
        self.select_voice(at)
    }

    /// Has the server send no packets of new video tracks. They would cost bandwidth, and the canary shows no video.
    fn pause_video(&mut self, participants: &[proto::ParticipantInfo]) -> Result<(), EndReason> {
        let tracks = participants.iter().flat_map(|one| &one.tracks);
        let is_new = |track: &&proto::TrackInfo| {
            track.r#type() == proto::TrackType::Video && !self.paused.contains(&track.sid)
        };
        let new: Vec<_> = tracks
            .filter(is_new)
            .map(|track| track.sid.clone())
            .take(MAX_VIDEO_TRACKS - self.paused.len())
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        self.paused.extend(new.iter().cloned());
        self.send(Request::TrackSetting(proto::UpdateTrackSettings {
            track_sids: new,
            disabled: true,
            ..proto::UpdateTrackSettings::default()
        }))
    }

    /// Selects the m-line that carries the agent's voice and processes the packets that were buffered until then.
    /// Participants and descriptions arrive in any order.
    fn select_voice(&mut self, at: Instant) -> Result<(), EndReason> {
        let tracks = self.subscriber.tracks().iter();
        let tracks = tracks.map(|(mid, sid)| (*mid, sid.as_str()));
        self.voice_selector
            .select(at, &self.observer.roster, &tracks);
        for packet in self.observer.report_voice(&mut self.voice_selector)? {
            self.on_voice(&packet)?;
        }
        Ok(())
    }

    fn on_packet(&mut self, packet: ReceivedPacket) -> Result<(), EndReason> {
        // A server probes the bandwidth with packets that carry only padding.
        if packet.payload.is_empty() || !self.is_voice(packet.header.ssrc) {
            return Ok(());
        }
        match self.voice_selector.admit_or_buffer(packet) {
            Some(packet) => self.on_voice(&packet),
            None => Ok(()),
        }
    }

    fn on_voice(&mut self, packet: &ReceivedPacket) -> Result<(), EndReason> {
        let at = packet.at;
        self.observer.first_audio(at)?;
        self.sound.on_packet(Speaker::Agent, || SoundPacket {
            at,
            header: packet.header,
            payload: Arc::clone(&packet.payload),
        });
        let Some(position) = self.voice.on_packet(at, packet.header) else {
            return Ok(());
        };
        let sound = self.decoder.decode(position, &packet.payload);
        let peak = recording::peak(sound.pcm);
        let events = self.speech.on_sound(at, sound);
        self.sound
            .on_level(Speaker::Agent, at, opus::duration(&packet.payload), peak);
        self.caller.on_frame(AgentFrame {
            arrived: at,
            time: position.time,
            level: self.speech.last_level(),
            frame: OpusFrame {
                payload: Arc::clone(&packet.payload),
                peak,
            },
        });
        for event in events {
            self.observer
                .on_speech(&mut self.caller, &self.speech, event)?;
        }
        Ok(())
    }

    fn is_voice(&mut self, ssrc: u32) -> bool {
        let Some(wanted) = self.voice_selector.selected() else {
            return false;
        };
        let streams = &mut self.streams;
        if let Some((_, mid)) = streams.iter().find(|(it, _)| *it == ssrc) {
            return *mid == Some(wanted);
        }
        let mid = self.subscriber.mid_of(ssrc);
        if streams.len() < MAX_STREAMS {
            streams.push((ssrc, mid));
        }
        mid == Some(wanted)
    }

    /// Sends the caller's packets that are due at the start of this round, so that a late round does not change their
    /// pace.
    fn play(&mut self, now: Instant) -> Result<(), EndReason> {
        let due = round_start(now);
        let agent = self.observer.activity(&self.speech);
        while let Some(out) = self.caller.poll(due, agent) {
            match out {
                CallerOutput::Started(turn) => self
                    .observer
                    .events
                    .send(now, RoomEventKind::CallerStarted(turn))?,
                CallerOutput::Ended => {
                    let sent = self.track.sent();
                    self.observer
                        .events
                        .send(now, RoomEventKind::CallerEnded { sent })?;
                }
                CallerOutput::Send {
                    due,
                    frame,
                    resumes,
                } => self.send_packet(now, due, frame, resumes),
            }
        }
        Ok(())
    }

    fn send_packet(&mut self, now: Instant, due: Instant, frame: OpusFrame, resumes: bool) {
        let mid = self.track.mid;
        let Some(payload_type) = self.publisher.payload_type(mid) else {
            return;
        };
        let (sequence, timestamp) = self.track.next(due);
        let OpusFrame { payload, peak } = frame;
        self.sound.on_packet(Speaker::Caller, || SoundPacket {
            at: due,
            header: RtpHeader {
                ssrc: 0,
                sequence,
                timestamp,
            },
            payload: Arc::clone(&payload),
        });
        self.sound
            .on_level(Speaker::Caller, due, opus::duration(&payload), peak);
        let packet = OutgoingPacket {
            payload_type,
            sequence,
            timestamp,
            at: now,
            marker: resumes,
            silent: *payload == opus::SILENCE,
            payload,
        };
        self.publisher.write(mid, packet);
    }

    fn send(&mut self, message: Request) -> Result<(), EndReason> {
        self.signal.send(message).map_err(EndReason::Signal)
    }
}

impl CallerTrack {
    /// How many packets were sent.
    fn sent(&self) -> u64 {
        self.sequence - self.before_first
    }

    fn uplink(&self, report: ReceiverReport) -> UplinkReport {
        UplinkReport {
            // No report covers more than was sent, whatever it claims.
            covered: report
                .highest
                .saturating_sub(self.before_first)
                .min(self.sent()),
            lost: report.lost,
        }
    }

    /// Returns the sequence number and RTP timestamp of the packet that is due at `due`.
    ///
    /// Both belong to the caller's track, not to the agent's stream, whose SSRC may change. Timestamps follow the clock, so
    /// that a pause remains a pause, and always increase.
    fn next(&mut self, due: Instant) -> (u64, u32) {
        let (epoch, base) = self.origin;
        let by_clock = rtp::ticks(due.saturating_duration_since(epoch));
        let ticks = self.last.map_or(by_clock, |last| by_clock.max(last + 1));
        self.last = Some(ticks);
        self.sequence += 1;
        #[expect(clippy::cast_possible_truncation, reason = "RTP timestamps wrap")]
        let timestamp = base.wrapping_add(ticks as u32);
        (self.sequence, timestamp)
    }
}

/// The start of the round that contains `now`. All participants of the process share the rounds.
fn round_start(now: Instant) -> Instant {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let since = now.saturating_duration_since(*FIRST.get_or_init(|| now));
    let into = since.as_nanos() % ROUND_INTERVAL.as_nanos();
    now - Duration::from_nanos(u64::try_from(into).unwrap_or_default())
}

/// The next round, or the one after it if the next has nothing to read and nothing to send.
fn next_round(now: Instant, read_at: Instant, send_at: Option<Instant>) -> Instant {
    let next = round_start(now) + ROUND_INTERVAL;
    let due = send_at.map_or(read_at, |send_at| send_at.min(read_at));
    if due <= next {
        next
    } else {
        next + ROUND_INTERVAL
    }
}

/// Waits for data on either peer connection. Cancel-safe: data that is not returned stays in the socket.
async fn incoming(
    publisher: &mut PeerConnection,
    subscriber: &mut PeerConnection,
    buffer: &mut [u8],
) -> (proto::SignalTarget, Incoming) {
    poll_fn(|cx| {
        if let Poll::Ready(incoming) = subscriber.poll_recv(cx, buffer) {
            return Poll::Ready((proto::SignalTarget::Subscriber, incoming));
        }
        let incoming = publisher.poll_recv(cx, buffer);
        incoming.map(|incoming| (proto::SignalTarget::Publisher, incoming))
    })
    .await
}

fn poll(peer: &mut PeerConnection, now: Instant) -> Result<Option<PeerEvent>, EndReason> {
    peer.poll(now)
        .map_err(|error| media_failed(peer.name(), &error))
}

fn description(kind: &str, sdp: String, id: u32) -> proto::SessionDescription {
    proto::SessionDescription {
        r#type: kind.to_owned(),
        sdp,
        id,
        ..proto::SessionDescription::default()
    }
}

/// LiveKit has a client use relays alone after several calls of the same room and identity failed without them, as SDKs do.
fn forced_relay(ice: Ice, response: &proto::JoinResponse) -> Ice {
    let forced = response
        .client_configuration
        .as_ref()
        .is_some_and(|it| it.force_relay() == proto::ClientConfigSetting::Enabled);
    if forced && ice == Ice::All {
        Ice::Relay
    } else {
        ice
    }
}

fn media_failed(transport: &'static str, error: &PeerError) -> EndReason {
    if let PeerError::Shortage { .. } = error {
        return EndReason::Internal(error.to_string());
    }
    EndReason::MediaFailed {
        transport,
        detail: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_follow_the_clock_and_always_increase() {
        let epoch = Instant::now();
        let mut track = CallerTrack {
            mid: Mid::from("0"),
            sequence: 7,
            before_first: 7,
            origin: (epoch, u32::MAX - 959),
            last: None,
        };
        assert_eq!(track.next(epoch), (8, u32::MAX - 959));
        assert_eq!(track.next(epoch + Duration::from_millis(20)), (9, 0));
        assert_eq!(track.next(epoch), (10, 1));
        assert_eq!(track.next(epoch + Duration::from_secs(1)), (11, 47_040));
    }

    #[test]
    fn forced_relay_replaces_all_paths_and_no_narrower_setting() {
        let response = |force_relay: proto::ClientConfigSetting| proto::JoinResponse {
            client_configuration: Some(proto::ClientConfiguration {
                force_relay: force_relay.into(),
                ..proto::ClientConfiguration::default()
            }),
            ..proto::JoinResponse::default()
        };
        let forced = response(proto::ClientConfigSetting::Enabled);
        assert_eq!(forced_relay(Ice::All, &forced), Ice::Relay);
        for ice in [Ice::Tcp, Ice::Relay, Ice::Tls] {
            assert_eq!(forced_relay(ice, &forced), ice);
        }
        let unset = response(proto::ClientConfigSetting::Unset);
        for free in [unset, proto::JoinResponse::default()] {
            assert_eq!(forced_relay(Ice::All, &free), Ice::All);
        }
    }

    #[test]
    fn report_covers_the_packets_from_the_first_one_on_across_the_wrap() {
        let mut track = CallerTrack {
            mid: Mid::from("0"),
            sequence: 32_000,
            before_first: 32_000,
            origin: (Instant::now(), 0),
            last: None,
        };
        let uplink =
            |track: &CallerTrack, highest| track.uplink(ReceiverReport { highest, lost: 3 });
        for _ in 0..90_000 {
            track.next(Instant::now());
        }
        assert_eq!(track.sent(), 90_000);
        let covered = |covered| UplinkReport { covered, lost: 3 };
        assert_eq!(uplink(&track, 32_001), covered(1));
        assert_eq!(uplink(&track, 122_000), covered(90_000));
        // What no packet had.
        assert_eq!(uplink(&track, 31_000), covered(0));
        assert_eq!(uplink(&track, 200_000), covered(90_000));
    }

    #[test]
    fn rounds_are_a_multiple_of_the_interval_apart() {
        // The first call in the process sets the origin of the rounds.
        round_start(Instant::now());
        let now = Instant::now();
        let round = round_start(now);
        assert!(round <= now && now < round + ROUND_INTERVAL);
        assert_eq!(round_start(round), round);
        for millis in [0, 19, 20, 21, 12_345] {
            let later = now + Duration::from_millis(millis);
            let apart = round_start(later).duration_since(round).as_nanos();
            assert_eq!(apart % ROUND_INTERVAL.as_nanos(), 0);
        }
    }

    #[test]
    fn round_without_work_is_skipped() {
        round_start(Instant::now());
        let now = Instant::now();
        let next = round_start(now) + ROUND_INTERVAL;
        let after = next + ROUND_INTERVAL;
        assert_eq!(next_round(now, after, None), after);
        assert_eq!(next_round(now, after, Some(after)), after);
        assert_eq!(next_round(now, after, Some(next)), next);
        assert_eq!(next_round(now, next, Some(after)), next);
        // An overdue read does not wait longer, and one that is far away skips no more than one round.
        assert_eq!(next_round(now, now, None), next);
        assert_eq!(next_round(now, after, Some(now)), next);
        assert_eq!(next_round(now, after + READ_INTERVAL, None), after);
    }
}
