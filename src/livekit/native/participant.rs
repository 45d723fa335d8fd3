//! The native participant: one task that owns a signal connection, two peer connections, and the state machines that
//! hear and echo. Everything it sees goes out as an event, stamped with when it came.

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

use super::peer::{
    self, BrokenTransport, Incoming, OutgoingPacket, PeerConnection, PeerError, PeerEvent,
    ReceivedPacket,
};
use crate::config::Ice;
use crate::livekit::audio::echo::{EchoOutput, EchoPlayer};
use crate::livekit::audio::opus::{self, Decoder};
use crate::livekit::audio::rtp::{self, RtpReceiver};
use crate::livekit::audio::speech::Detector;
use crate::livekit::event::{EndReason, RoomEvent, RoomEventKind};
use crate::livekit::join::JoinRequest;
use crate::livekit::room::observer::{EventSender, LEAVE_TIMEOUT, Observer};
use crate::livekit::room::voice_selector::VoiceSelector;
use crate::livekit::wire::candidate::candidate_line;
use crate::livekit::wire::signal::{Joined, Signal, SignalError};

/// How long a transport may be down while the signal connection lives, which a ping every five seconds shows.
const MEDIA_DOWN_TIMEOUT: Duration = Duration::from_secs(6);

/// The same while the signal connection is quiet too: then the server or the whole network is gone, and the ping
/// deadline (15 s) gives the better verdict.
const SERVER_SILENT_TIMEOUT: Duration = Duration::from_secs(20);

/// Largest datagram taken; the path's MTU is below it.
const MAX_DATAGRAM: usize = 2_048;

/// Streams whose m-line is remembered; a probe's room has one or two.
const MAX_STREAMS: usize = 16;

/// Packets kept of a voice before its agent is known, 5 s of 20 ms: the server's news may come three seconds late.
const MAX_EARLY_PACKETS: usize = 250;

/// How often a participant whose media flows sends what is due: as often as its agent does, once a packet of 20 ms. All
/// participants do so at the same moments, for a wake-up costs more than a packet.
const ROUND_INTERVAL: Duration = Duration::from_millis(20);

/// How often it looks what has come, where no packet must go back sooner: every second round, for the second of two packets
/// costs far less than the first.
const READ_INTERVAL: Duration = Duration::from_millis(40);

/// Datagrams taken in a row before anything else is done; a flood must not hold up the rest.
const MAX_DATAGRAMS_IN_A_ROW: usize = 64;

/// The number of our one offer.
const OFFER_ID: u32 = 1;

/// Joins, echoes and listens until something ends it. The last event is the caller's to send.
pub(crate) async fn run(
    request: JoinRequest,
    events: mpsc::Sender<RoomEvent>,
    leave: CancellationToken,
    voice: &mut RtpReceiver,
) -> EndReason {
    let events = EventSender::new(events);
    let joining = async {
        let joined = connect(&request, &events).await?;
        NativeSession::start(&request, events, voice, joined)
    };
    let mut session = tokio::select! {
        biased;
        () = leave.cancelled() => return EndReason::Left,
        session = joining => match session {
            Ok(session) => session,
            Err(why) => return why,
        },
    };
    let served = session.serve(&leave).await;
    let reported = session.observer.report_unfinished();
    let why = served
        .and_then(|why| reported.map(|()| why))
        .unwrap_or_else(|why| why);
    // A connection that is gone or that the server ended takes no farewell.
    if !matches!(why, EndReason::Signal(_) | EndReason::Removed { .. }) {
        session.signal.leave(LEAVE_TIMEOUT).await;
    }
    why
}

/// Connects; when the upgrade was requested is told at once.
async fn connect(request: &JoinRequest, events: &EventSender) -> Result<Joined, EndReason> {
    let token = request.token()?;
    let (requested, request_sent) = oneshot::channel();
    let connecting = Signal::connect(&request.endpoint, &token, request.signal_timeout, requested);
    let reporting = async {
        match request_sent.await {
            Ok(at) => events.send(at, RoomEventKind::SignalRequested),
            // No connection came up: the other half says why.
            Err(_) => Ok(()),
        }
    };
    let (joined, reported) = tokio::join!(connecting, reporting);
    reported?;
    joined.map_err(EndReason::Signal)
}

/// A participant in its room.
struct NativeSession<'a> {
    observer: Observer,
    signal: Signal,
    publisher: PeerConnection,
    subscriber: PeerConnection,
    voice: &'a mut RtpReceiver,
    decoder: Decoder,
    speech: Detector,
    echo: EchoPlayer<Arc<[u8]>>,
    track: EchoTrack,
    voice_selector: VoiceSelector<Mid, ReceivedPacket>,
    /// M-lines of the streams seen; learnt anew after each negotiation.
    streams: Vec<(u32, Option<Mid>)>,
    media_reported: bool,
    /// The round in which it next looks what has come.
    read_at: Instant,
    read_interval: Duration,
    /// Media over TCP is a fallback, not what was asked for.
    udp_tried: bool,
}

/// Our echo track.
struct EchoTrack {
    mid: Mid,
    sequence: u64,
    /// A moment and the RTP timestamp that belongs to it.
    origin: (Instant, u32),
    last: Option<u64>,
}

enum SessionStep {
    Left,
    Message(Result<(Instant, Box<Response>), SignalError>),
    Incoming(proto::SignalTarget, Incoming),
    Time,
}

impl<'a> NativeSession<'a> {
    /// Starts publishing at once, without waiting for the acknowledgement: the server takes the requests in order.
    fn start(
        request: &JoinRequest,
        events: EventSender,
        voice: &'a mut RtpReceiver,
        joined: Joined,
    ) -> Result<Box<Self>, EndReason> {
        let Joined {
            signal,
            response,
            at,
            local,
            ..
        } = joined;
        // The same in `AddTrack` and in the offer's msid.
        let cid = format!("echo-{:016x}", fastrand::u64(..));
        let mut observer = Observer::new(request, events, cid.clone());
        observer.on_join(at, &response)?;
        let peer = |target| {
            let peer = PeerConnection::new(target, local.ip(), request.ice);
            peer.map_err(|error| media_failed(peer::name(target), &error))
        };
        let mut publisher = peer(proto::SignalTarget::Publisher)?;
        let subscriber = peer(proto::SignalTarget::Subscriber)?;
        let (mid, offer) = publisher.offer_track("echo", &cid, OFFER_ID);
        let mut session = Box::new(Self {
            observer,
            signal,
            publisher,
            subscriber,
            voice,
            decoder: Decoder::default(),
            speech: Detector::new(request.speech.clone(), opus::RATE),
            echo: EchoPlayer::new(request.echo.clone()),
            track: EchoTrack {
                mid,
                // Below 2^16, or the stack would need its rollover counter told to the server.
                sequence: fastrand::u64(1..1 << 15),
                origin: (Instant::now(), fastrand::u32(..)),
                last: None,
            },
            voice_selector: VoiceSelector::new(MAX_EARLY_PACKETS),
            streams: Vec::new(),
            media_reported: false,
            read_at: at,
            read_interval: if request.echo.delay < READ_INTERVAL {
                ROUND_INTERVAL
            } else {
                READ_INTERVAL
            },
            udp_tried: request.ice == Ice::All,
        });
        session.publish(cid, offer)?;
        session.on_participants(at, response.other_participants, true)?;
        Ok(session)
    }

    fn publish(&mut self, cid: String, offer: String) -> Result<(), EndReason> {
        self.send(Request::AddTrack(proto::AddTrackRequest {
            cid,
            name: "echo".to_owned(),
            r#type: proto::TrackType::Audio.into(),
            // An agent listens to a microphone and to nothing else.
            source: proto::TrackSource::Microphone.into(),
            disable_red: true,
            ..proto::AddTrackRequest::default()
        }))?;
        self.send(Request::Offer(description("offer", offer, OFFER_ID)))
    }

    async fn serve(&mut self, leave: &CancellationToken) -> Result<EndReason, EndReason> {
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
                .next_step(left.as_mut(), timer.as_mut(), &mut buffer)
                .await;
            match step {
                SessionStep::Left => return Ok(EndReason::Left),
                SessionStep::Message(message) => {
                    // What was said came before it, even where it is the end.
                    self.drain(&mut buffer)?;
                    let (at, message) = message.map_err(EndReason::Signal)?;
                    self.on_message(at, *message).await?;
                }
                SessionStep::Incoming(target, incoming) => {
                    self.receive(target, &incoming, &buffer)?
                }
                SessionStep::Time => self.on_timer(&mut buffer)?,
            }
        }
    }

    /// Looks what has come, in a round for that: what is to be sent is sent in any case.
    fn on_timer(&mut self, buffer: &mut [u8]) -> Result<(), EndReason> {
        if Instant::now() < self.read_at || !self.drain(buffer)? {
            return Ok(());
        }
        let now = Instant::now();
        // Until then each transport asks for its own time.
        if self.media_reported {
            self.read_at = round_start(now) + self.read_interval;
        }
        self.on_time(now)
    }

    /// Takes in what has come over UDP; returns whether that is all.
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

    /// What has come goes before the timers: a deadline that passed while we were not running proves nothing.
    async fn next_step(
        &mut self,
        left: impl Future<Output = ()>,
        timer: Pin<&mut Sleep>,
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

    /// Does all that is due now.
    fn settle(&mut self, now: Instant) -> Result<(), EndReason> {
        while let Some(event) = poll(&mut self.subscriber, now)? {
            match event {
                PeerEvent::Connected => self.on_connected(now)?,
                PeerEvent::Packet(packet) => self.on_packet(packet)?,
                PeerEvent::Data(at, data) => self.observer.on_data(at, &data)?,
            }
        }
        // Before the publisher is polled, which sends it: otherwise every packet would wait for the next round.
        self.play(now)?;
        while let Some(event) = poll(&mut self.publisher, now)? {
            if let PeerEvent::Connected = event {
                self.echo.open(round_start(now));
                self.on_connected(now)?;
            }
        }
        Ok(())
    }

    /// What only passing time brings; asked when nothing is left to read.
    fn on_time(&mut self, now: Instant) -> Result<(), EndReason> {
        if let Some(heard) = self.speech.on_time(now) {
            self.observer.on_speech(&mut self.echo, heard)?;
        }
        for peer in [&self.publisher, &self.subscriber] {
            if let Some(broken) = peer.broken(now)
                && now >= self.give_up_at(broken)
            {
                return Err(EndReason::MediaFailed {
                    transport: peer.name(),
                    detail: broken.how.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// What is due of a transport that is up, of the echo and of what is heard is done in a round.
    fn next_deadline(&self, now: Instant) -> Instant {
        let peers = [&self.publisher, &self.subscriber];
        let deadlines = peers.map(|peer| {
            if peer.connected() {
                next_round(now, self.read_at, self.echo.next_deadline())
            } else {
                peer.next_deadline()
            }
        });
        deadlines[0].min(deadlines[1])
    }

    /// When a broken transport is given up. With a server that is silent everywhere the signal's verdict comes first.
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
            self.observer
                .events
                .send(now, RoomEventKind::MediaConnected)?;
            let over_tcp = self.publisher.over_tcp() || self.subscriber.over_tcp();
            if over_tcp && self.udp_tried {
                self.observer.events.send(now, RoomEventKind::UdpBlocked)?;
            }
        }
        Ok(())
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
        // No network garbles it: a server that takes no Opus answers with a track of no codec at all.
        let candidates = accepted.map_err(|error| {
            EndReason::PublishFailed(format!(
                "{error} (does LiveKit's enabled_codecs have Opus?)"
            ))
        })?;
        self.report_addresses()?;
        self.trickle(proto::SignalTarget::Publisher, candidates)
    }

    /// Offers are answered one after the other, each under its own number: the server may send the next one before it
    /// has our answer to the last.
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
        let mut reported = self.publisher.take_addresses();
        reported.append(&mut self.subscriber.take_addresses());
        self.observer.on_addresses(Instant::now(), reported)
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
        self.observer
            .on_participants(at, participants, in_join_response, clock)?;
        self.select_voice(at)
    }

    /// Settles which m-line carries the agent's voice, and takes in what it had said by the time that is known:
    /// participants and descriptions come in any order.
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
        // A packet without a payload is padding, with which a server probes the path.
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
        let Some(position) = self.voice.on_packet(at, packet.header) else {
            return Ok(());
        };
        self.echo.on_frame(at, position.time, &packet.payload);
        let sound = self.decoder.decode(position, &packet.payload);
        for heard in self.speech.on_sound(at, sound) {
            self.observer.on_speech(&mut self.echo, heard)?;
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

    /// Sends what the echo has due by the round's own time: its packets keep their pace, however late a round begins.
    fn play(&mut self, now: Instant) -> Result<(), EndReason> {
        let due = round_start(now);
        while let Some(out) = self.echo.poll(due, self.speech.speech_pending()) {
            match out {
                EchoOutput::Started => {
                    self.observer.events.send(now, RoomEventKind::EchoStarted)?
                }
                EchoOutput::Ended => self.observer.events.send(now, RoomEventKind::EchoEnded)?,
                EchoOutput::Send {
                    due,
                    frame,
                    resumes,
                } => self.send_packet(now, due, frame, resumes),
            }
        }
        Ok(())
    }

    fn send_packet(&mut self, now: Instant, due: Instant, payload: Arc<[u8]>, resumes: bool) {
        let mid = self.track.mid;
        let Some(payload_type) = self.publisher.payload_type(mid) else {
            return;
        };
        let (sequence, timestamp) = self.track.next(due);
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

impl EchoTrack {
    /// Sequence number and RTP timestamp of the packet that is due at `due`. Timestamps keep the track's own clock, so
    /// that a pause is a pause, and never stand still.
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

/// When the round began that `now` is in.
fn round_start(now: Instant) -> Instant {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let since = now.saturating_duration_since(*FIRST.get_or_init(|| now));
    let into = since.as_nanos() % ROUND_INTERVAL.as_nanos();
    now - Duration::from_nanos(u64::try_from(into).unwrap_or_default())
}

/// The next round, or the one after it where the next has nothing to read and nothing to send.
fn next_round(now: Instant, read_at: Instant, send_at: Option<Instant>) -> Instant {
    let next = round_start(now) + ROUND_INTERVAL;
    let due = send_at.map_or(read_at, |send_at| send_at.min(read_at));
    if due <= next {
        next
    } else {
        next + ROUND_INTERVAL
    }
}

/// Waits for what comes on either connection. Cancel-safe: what isn't returned stays where it was.
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

fn media_failed(transport: &'static str, error: &PeerError) -> EndReason {
    EndReason::MediaFailed {
        transport,
        detail: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_keep_the_clock_and_never_stand_still() {
        let epoch = Instant::now();
        let mut track = EchoTrack {
            mid: Mid::from("0"),
            sequence: 7,
            origin: (epoch, u32::MAX - 959),
            last: None,
        };
        assert_eq!(track.next(epoch), (8, u32::MAX - 959));
        assert_eq!(track.next(epoch + Duration::from_millis(20)), (9, 0));
        assert_eq!(track.next(epoch), (10, 1));
        assert_eq!(track.next(epoch + Duration::from_secs(1)), (11, 47_040));
    }

    #[test]
    fn rounds_follow_each_other_at_their_pace_for_all() {
        // They are counted from whoever asks first.
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
    fn round_with_nothing_to_do_is_left_out() {
        round_start(Instant::now());
        let now = Instant::now();
        let next = round_start(now) + ROUND_INTERVAL;
        let after = next + ROUND_INTERVAL;
        assert_eq!(next_round(now, after, None), after);
        assert_eq!(next_round(now, after, Some(after)), after);
        assert_eq!(next_round(now, after, Some(next)), next);
        assert_eq!(next_round(now, next, Some(after)), next);
        // What is overdue waits no longer, and what is far off loses no round of listening.
        assert_eq!(next_round(now, now, None), next);
        assert_eq!(next_round(now, after, Some(now)), next);
        assert_eq!(next_round(now, after + READ_INTERVAL, None), after);
    }
}
