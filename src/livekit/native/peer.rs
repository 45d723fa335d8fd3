//! One of a participant's two peer connections: the WebRTC stack str0m, which does no I/O, and the sockets it uses.
//!
//! It knows SDP, ICE and RTP; it knows no room, no agent and no signal connection.
//!
//! The stack has two rules. Its output must be polled to the end after each input, and it acts on a description or a
//! candidate only at the next `Input::Timeout`, which [`PeerConnection::wake`] requests.

pub(super) mod relays;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use livekit_protocol::SignalTarget;
use str0m::change::{SdpAnswer, SdpOffer, SdpPendingOffer};
use str0m::media::{Direction, MediaKind, Mid, Pt};
use str0m::net::{Protocol, Receive, TcpType, Transmit};
use str0m::rtp::{Extension, ExtensionMap, ExtensionValues, RtpPacket, RtpWrite};
use str0m::{Candidate, Event, IceConnectionState, Input, Output, Rtc, RtcError};
use tokio::time::Instant;

use self::relays::{Relays, relayed_candidate};
use super::ice_tcp::{IceTcpConnection, TcpEvent};
use super::relay::{RelayError, RelayEvent};
use super::udp::{Datagram, MediaSocket, route_to};
use crate::config::Ice;
use crate::livekit::audio::rtp::RtpHeader;
use crate::livekit::event::{MediaConnection, MediaPath, to_microseconds};
use crate::livekit::wire::candidate::media_address;
use crate::livekit::wire::connect::is_shortage;

/// Maximum number of local addresses per peer connection: one per route, and few hosts have more routes to one server.
const MAX_SOCKETS: usize = 4;

/// Maximum number of candidates accepted from the server; a normal server sends a few.
const MAX_CANDIDATES: usize = 64;

/// Maximum number of TCP connections per peer connection: a server offers one address, or a few.
const MAX_TCP_CONNECTIONS: usize = 4;

/// How long UDP is tried alone. It needs a few round trips, and an unneeded TCP connection is a cost for the server.
const UDP_HEAD_START: Duration = Duration::from_secs(1);

/// The port of an active TCP candidate, which does not listen (RFC 6544, section 4.5).
const DISCARD_PORT: u16 = 9;

/// A STUN message starts with at most this value, DTLS and SRTP with a higher one (RFC 7983, section 7).
const MAX_STUN_FIRST_BYTE: u8 = 3;

/// Maximum rounds of output and due timers per call, so that a timer that does not advance cannot block the task.
const MAX_POLL_ROUNDS: usize = 32;

/// How often ICE checks a server that does not answer, and how many times before it gives a path up: about eight
/// seconds in total. The stack's defaults take over twenty, and until then a probe would blame the agent for its
/// silence.
const ICE_CHECK_INTERVAL: Duration = Duration::from_secs(1);
const MAX_ICE_CHECKS: usize = 8;

/// How often the receiver reports for the sent track are passed on. The server sends one about every second.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);

/// How often the round trip of a receiving connection is read; that of a sending one comes with its reports.
const ROUND_TRIP_INTERVAL: Duration = Duration::from_secs(2);

/// A cumulative count of lost packets is a signed number of 24 bits (RFC 3550, section 6.4.1); duplicates make it negative.
const MAX_LOST: u64 = (1 << 23) - 1;

/// Maximum number of ICE paths whose round trips are measured; few are ever answered.
const MAX_PAIRS: usize = 32;

/// The first two bytes of the answer to an ICE check: a success response to a Binding request (RFC 8489, section 5).
const CHECK_ANSWER: [u8; 2] = [1, 1];

/// A connected transport that receives nothing for this long is down: the server answers an ICE check every second.
const QUIET_TIMEOUT: Duration = Duration::from_secs(5);

/// What happened on a peer connection.
#[derive(Debug)]
pub(crate) enum PeerEvent {
    /// ICE and DTLS are up.
    Connected,
    Packet(ReceivedPacket),
    /// A message of a data channel and the time at which it was received.
    Data(Instant, Vec<u8>),
    /// The round trip of the path was measured; emitted every [`ROUND_TRIP_INTERVAL`] by the subscriber.
    RoundTrip,
    /// A local candidate for the server that was found later than the description.
    Candidate(String),
    /// A TURN server failed, and another path may still work. The text names the server.
    RelayFailed(String),
    /// The server's latest receiver report for the sent track; emitted every [`REPORT_INTERVAL`].
    Report(ReceiverReport),
}

/// What the server received of a track, by its RTCP receiver report (RFC 3550, section 6.4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReceiverReport {
    /// The highest sequence number, extended by the number of wraps.
    pub(crate) highest: u64,
    pub(crate) lost: u64,
}

/// A received RTP packet.
#[derive(Debug)]
pub(crate) struct ReceivedPacket {
    pub(crate) at: Instant,
    pub(crate) header: RtpHeader,
    pub(crate) payload: Arc<[u8]>,
}

/// Why a peer connection cannot continue. The text contains no address and no SDP.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error("the canary does not understand the server's SDP {0}")]
    Sdp(&'static str),
    #[error("the server sent an SDP {0}, but the canary has no offer pending")]
    Unexpected(&'static str),
    #[error("no UDP socket could be opened on the local address that reaches the server")]
    NoRoute,
    #[error("LiveKit offers no TURN server{}, and the settings or LiveKit itself allow no other path", if *.tls { " over TLS" } else { "" })]
    NoRelay { tls: bool },
    /// With one text for each.
    #[error("{0}")]
    Relays(String),
    /// The process has no descriptor or no memory left.
    #[error("no {protocol} socket could be opened: {error}")]
    Shortage {
        protocol: &'static str,
        error: String,
    },
    #[error(transparent)]
    Stack(#[from] RtcError),
}

/// Since when and why a connected transport is down.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BrokenTransport {
    pub(crate) since: Instant,
    pub(crate) reason: &'static str,
}

/// A peer connection for one direction.
pub(crate) struct PeerConnection {
    rtc: Box<Rtc>,
    target: SignalTarget,
    ice: Ice,
    sockets: Vec<MediaSocket>,
    tcp: TcpFallback,
    relays: Relays,
    /// Events that did not come from the stack.
    notices: VecDeque<PeerEvent>,
    /// When the stack needs its next `Input::Timeout`.
    timeout: Instant,
    /// The stack's output has not been polled to the end since its last input.
    unpolled: bool,
    /// ICE has selected a path at least once.
    path: bool,
    connected: bool,
    /// How the last sent packet that is no ICE check left.
    carrier: Option<MediaPath>,
    /// The index of the relay that it took.
    carrying_relay: Option<usize>,
    /// The mean over the ICE checks on the selected path.
    round_trip: Option<Duration>,
    /// How long answers to ICE checks waited in the socket, in total, and how many there were: by local and remote address.
    waited: HashMap<(SocketAddr, SocketAddr), (Duration, u32)>,
    broken: Option<BrokenTransport>,
    /// The TURN servers that failed, and why.
    relay_faults: Vec<String>,
    /// When the last datagram arrived that the stack accepted.
    last_received_at: Instant,
    pending: Option<(u32, SdpPendingOffer)>,
    /// How many candidates of the server were accepted.
    candidates: usize,
    /// The server's media addresses since [`take_addresses`](Self::take_addresses).
    addresses: Vec<String>,
    /// The track sid of each m-line of the latest offer.
    tracks: HashMap<Mid, String>,
}

/// The fallback for blocked UDP: connections to the server's passive TCP candidates.
#[derive(Default)]
struct TcpFallback {
    /// Candidates without a connection yet.
    offered: Vec<Candidate>,
    /// When to connect to them, unless ICE has a path by then.
    due: Option<Instant>,
    connections: Vec<(Candidate, IceTcpConnection)>,
}

/// What the network delivered.
pub(crate) enum Incoming {
    Datagram {
        at: Instant,
        proto: Protocol,
        from: SocketAddr,
        to: SocketAddr,
        length: usize,
    },
    /// A TCP connection was opened from this local address.
    Opened(IpAddr),
    /// The TCP connection to this candidate failed or ended.
    Closed(Candidate, io::Error),
    /// With the index of the relay.
    Relay(usize, RelayEvent),
}

impl PeerConnection {
    /// Creates a peer connection with a UDP host candidate on `local`, the local address of the signal connection. Unless
    /// `ice` is [`Ice::All`], it has no candidate yet.
    ///
    /// # Errors
    /// [`PeerError::NoRoute`] or [`PeerError::Shortage`] if no UDP socket can be bound to `local`; [`PeerError::NoRelay`] if
    /// only a relay may be used and there is none.
    pub(crate) fn new(
        target: SignalTarget,
        local: IpAddr,
        ice: Ice,
        relays: Relays,
    ) -> Result<Self, PeerError> {
        let relays_only = matches!(ice, Ice::Relay | Ice::Tls);
        if relays_only && relays.is_empty() {
            return Err(PeerError::NoRelay {
                tls: ice == Ice::Tls,
            });
        }
        let mut extensions = ExtensionMap::empty();
        extensions.set(1, Extension::AudioLevel);
        extensions.set(4, Extension::RtpMid);
        let now = Instant::now();
        // Without RED: in RTP mode the stack does not unpack it, so an echo would send RED (RFC 2198) as Opus
        // and be inaudible.
        // Video is accepted, although none is received (the participant pauses it): an answer that rejects an m-line breaks
        // the server's next offer, and livekit-server then ends the session (`STATE_MISMATCH`).
        let mut config = Rtc::builder()
            .clear_codecs()
            .enable_opus(true, false)
            .enable_vp8(true)
            .enable_vp9(true)
            .enable_h264(true)
            .enable_h265(true)
            .enable_av1(true)
            .set_extension_map(extensions)
            .set_rtp_mode(true);
        config.set_max_stun_rto(ICE_CHECK_INTERVAL);
        config.set_max_stun_retransmits(MAX_ICE_CHECKS);
        let config = config.set_stats_interval(Some(match target {
            SignalTarget::Publisher => REPORT_INTERVAL,
            SignalTarget::Subscriber => ROUND_TRIP_INTERVAL,
        }));
        let rtc = config.build(now.into_std());
        let mut peer = Self {
            rtc: Box::new(rtc),
            target,
            ice,
            sockets: Vec::new(),
            tcp: TcpFallback::default(),
            addresses: relays.servers().map(ToString::to_string).collect(),
            relays,
            notices: VecDeque::new(),
            timeout: now,
            unpolled: true,
            path: false,
            connected: false,
            carrier: None,
            carrying_relay: None,
            round_trip: None,
            waited: HashMap::new(),
            broken: None,
            relay_faults: Vec::new(),
            last_received_at: now,
            pending: None,
            candidates: 0,
            tracks: HashMap::new(),
        };
        if relays_only {
            peer.relays.start_at(now);
        }
        if ice == Ice::All {
            let socket = MediaSocket::bind(local).map_err(|error| {
                if is_shortage(&error) {
                    PeerError::Shortage {
                        protocol: "UDP",
                        error: error.to_string(),
                    }
                } else {
                    PeerError::NoRoute
                }
            })?;
            peer.listen(socket).ok_or(PeerError::NoRoute)?;
        }
        Ok(peer)
    }

    pub(crate) fn name(&self) -> &'static str {
        name(self.target)
    }

    pub(crate) fn connected(&self) -> bool {
        self.connected
    }

    /// How media is sent; `None` until the first packet that is no ICE check.
    pub(crate) fn path(&self) -> Option<MediaPath> {
        self.carrier
    }

    /// How media is sent, and what is known of that path; `None` until it is known how.
    pub(crate) fn connection(&self) -> Option<MediaConnection> {
        let relay = self.carrying_relay.map(|index| &self.relays.open[index]);
        Some(MediaConnection {
            connection: self.name(),
            path: self.carrier?,
            via: relay.map(|path| path.relay.server().authority()),
            round_trip_seconds: self.round_trip.map(|it| to_microseconds(it.as_secs_f64())),
        })
    }

    /// Why a transport is down that `broken` describes, with the TURN server's part in it.
    pub(crate) fn describe(&self, broken: BrokenTransport) -> String {
        match self.relay_faults.last() {
            Some(fault) if self.carrier.is_some_and(MediaPath::is_relayed) => fault.clone(),
            _ => broken.reason.to_owned(),
        }
    }

    /// Gives the relays' addresses back to their servers.
    pub(crate) fn close(&mut self, now: Instant) {
        self.relays.close(now);
    }

    /// Returns since when and why a connected transport is down. Call it only when no datagram waits to be read.
    pub(crate) fn broken(&self, now: Instant) -> Option<BrokenTransport> {
        let quiet_at = self.last_received_at + QUIET_TIMEOUT;
        let quiet = (self.connected && now >= quiet_at).then_some(BrokenTransport {
            since: quiet_at,
            reason: "the server stopped sending",
        });
        self.broken.or(quiet)
    }

    /// Creates an offer with one audio track to send. The server's answer repeats `id`.
    pub(crate) fn offer_track(&mut self, stream: &str, track: &str, id: u32) -> (Mid, String) {
        let mut api = self.rtc.sdp_api();
        let mid = api.add_media(
            MediaKind::Audio,
            Direction::SendOnly,
            Some(stream.to_owned()),
            Some(track.to_owned()),
            None,
        );
        let (offer, pending) = api.apply().expect("a track was added");
        self.pending = Some((id, pending));
        self.wake(Instant::now());
        (mid, offer.to_sdp_string())
    }

    /// Accepts the answer to the offer `id`; 0 means that the server does not number answers. Returns new local
    /// candidates.
    ///
    /// # Errors
    /// No offer with this id is pending, or the SDP is unusable.
    pub(crate) async fn accept_answer(
        &mut self,
        id: u32,
        sdp: &str,
    ) -> Result<Vec<String>, PeerError> {
        let (_, pending) = self
            .pending
            .take_if(|(offered, _)| id == 0 || id == *offered)
            .ok_or(PeerError::Unexpected("answer"))?;
        let answer = SdpAnswer::from_sdp_string(sdp).map_err(|_| PeerError::Sdp("answer"))?;
        self.rtc
            .sdp_api()
            .accept_answer(pending, answer)
            .map_err(|error| sdp_error(error, "answer"))?;
        let candidates = self.reach_all(sdp).await;
        self.wake(Instant::now());
        Ok(candidates)
    }

    /// Accepts an offer; returns the answer, and local candidates that are not part of it.
    ///
    /// # Errors
    /// The SDP is unusable.
    pub(crate) async fn accept_offer(
        &mut self,
        sdp: &str,
    ) -> Result<(String, Vec<String>), PeerError> {
        let offer = SdpOffer::from_sdp_string(sdp).map_err(|_| PeerError::Sdp("offer"))?;
        let answer = self
            .rtc
            .sdp_api()
            .accept_offer(offer)
            .map_err(|error| sdp_error(error, "offer"))?;
        self.tracks = tracks(sdp);
        let candidates = self.reach_all(sdp).await;
        self.wake(Instant::now());
        Ok((answer.to_sdp_string(), candidates))
    }

    /// Accepts a candidate of the server; returns the new local candidate that reaches it, if any.
    pub(crate) async fn add_candidate(&mut self, line: &str) -> Vec<String> {
        let Some(candidate) = self.usable(line) else {
            return Vec::new();
        };
        self.rtc.add_remote_candidate(candidate.clone());
        let ours = self.reach(candidate).await;
        self.wake(Instant::now());
        ours.into_iter().collect()
    }

    /// The track sid of each m-line of the latest offer.
    pub(crate) fn tracks(&self) -> &HashMap<Mid, String> {
        &self.tracks
    }

    /// The m-line that the packets of an SSRC belong to.
    pub(crate) fn mid_of(&mut self, ssrc: u32) -> Option<Mid> {
        let mut api = self.rtc.direct_api();
        api.stream_rx(&ssrc.into()).map(|stream| stream.mid())
    }

    /// The payload type of Opus, once it is negotiated.
    pub(crate) fn payload_type(&self, mid: Mid) -> Option<Pt> {
        self.rtc.media(mid)?.remote_pts().first().copied()
    }

    /// Queues a packet of the caller's track; [`poll`](Self::poll) sends it.
    pub(crate) fn write(&mut self, mid: Mid, packet: OutgoingPacket) {
        let mut api = self.rtc.direct_api();
        let Some(stream) = api.stream_tx_by_mid(mid, None) else {
            return;
        };
        // The offer negotiates the audio level extension (RFC 6464), from which the server computes its active
        // speakers.
        let levels = ExtensionValues {
            audio_level: Some(if packet.silent { -127 } else { -20 }),
            voice_activity: Some(!packet.silent),
            ..ExtensionValues::default()
        };
        let rtp = RtpWrite::new(
            packet.payload_type,
            packet.sequence.into(),
            packet.timestamp,
            packet.at.into_std(),
            packet.payload,
        );
        stream.write_rtp(rtp.marker(packet.marker).ext_vals(levels));
        // The stack sends queued packets on a timer, so that timer is due now.
        self.timeout = packet.at;
    }

    /// Waits for data. Once connected, it stops waiting on a socket that receives media. Only one task may poll.
    pub(crate) fn poll_recv(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<Incoming> {
        for socket in &mut self.sockets {
            if let Poll::Ready(datagram) = socket.poll_recv(cx, buffer) {
                // From now on, the participant reads this socket at an interval. A socket without media stays watched:
                // reading it at an interval would cost more than waking up for its rare datagrams.
                if self.connected && buffer[0] > MAX_STUN_FIRST_BYTE {
                    socket.stop_watching();
                }
                return Poll::Ready(Incoming::from_udp(&datagram, socket));
            }
        }
        if let Poll::Ready((index, event)) = self.relays.poll(cx, buffer) {
            // The buffer holds the peer's datagram, without the frame around it.
            if self.connected
                && matches!(event, RelayEvent::Datagram { .. })
                && buffer[0] > MAX_STUN_FIRST_BYTE
            {
                self.relays.open[index].relay.stop_watching();
            }
            return Poll::Ready(Incoming::Relay(index, event));
        }
        self.tcp.poll(cx, buffer)
    }

    /// Reads the next datagram that waits on a UDP socket.
    pub(crate) fn try_recv(&mut self, buffer: &mut [u8]) -> Option<Incoming> {
        let direct = self.sockets.iter_mut().find_map(|socket| {
            let datagram = socket.try_recv(buffer)?;
            Some(Incoming::from_udp(&datagram, socket))
        });
        direct.or_else(|| {
            let (index, event) = self.relays.try_recv(buffer)?;
            Some(Incoming::Relay(index, event))
        })
    }

    /// Handles what the network delivered. Call [`poll`](Self::poll) to the end after each: the stack requires it.
    pub(crate) fn on_incoming(
        &mut self,
        now: Instant,
        incoming: &Incoming,
        buffer: &[u8],
    ) -> Result<(), PeerError> {
        match incoming {
            Incoming::Datagram {
                at,
                proto,
                from,
                to,
                length,
            } => {
                // The socket is open to every sender, so a datagram that is not STUN, DTLS or SRTP is dropped.
                let bytes = &buffer[..*length];
                match Receive::new(*proto, *from, *to, bytes) {
                    Ok(receive) => self.on_receive(*at, now, receive, bytes),
                    Err(_) => Ok(()),
                }
            }
            // This candidate is not sent to the server. A server does nothing with an active candidate and takes the
            // address from the first check.
            Incoming::Opened(local) => {
                if let Some(candidate) = active_candidate(*local) {
                    self.rtc.add_local_candidate(candidate);
                }
                self.wake(now);
                Ok(())
            }
            Incoming::Closed(_, error) if !self.path && is_shortage(error) => {
                Err(PeerError::Shortage {
                    protocol: "TCP",
                    error: error.to_string(),
                })
            }
            Incoming::Closed(remote, _) => {
                self.rtc.direct_api().invalidate_candidate(remote);
                self.wake(now);
                Ok(())
            }
            Incoming::Relay(index, event) => self.on_relay(now, *index, event, buffer),
        }
    }

    fn on_relay(
        &mut self,
        now: Instant,
        index: usize,
        event: &RelayEvent,
        buffer: &[u8],
    ) -> Result<(), PeerError> {
        let path = &mut self.relays.open[index];
        match event {
            RelayEvent::Allocated(relayed) => {
                let Some(candidate) = relayed_candidate(*relayed, path.relay.server().transport)
                else {
                    return self.on_relay_failed(now, index, &RelayError::Refused(None));
                };
                let line = candidate.to_sdp_string();
                self.notices.push_back(PeerEvent::Candidate(line));
                path.candidate = Some(candidate);
            }
            // Not before: the server drops packets to a peer without a permission, and with them the first ICE check,
            // whose repetition costs a quarter of a second.
            RelayEvent::Usable => {
                if let Some(candidate) = path.candidate.clone() {
                    self.rtc.add_local_candidate(candidate);
                    self.wake(now);
                }
            }
            RelayEvent::Datagram { at, from, length } => {
                let Some(relayed) = path.relay.relayed() else {
                    return Ok(());
                };
                let bytes = &buffer[..*length];
                return match Receive::new(Protocol::Udp, *from, relayed, bytes) {
                    Ok(receive) => self.on_receive(*at, now, receive, bytes),
                    Err(_) => Ok(()),
                };
            }
            RelayEvent::Failed(error) => return self.on_relay_failed(now, index, error),
        }
        Ok(())
    }

    fn on_relay_failed(
        &mut self,
        now: Instant,
        index: usize,
        error: &RelayError,
    ) -> Result<(), PeerError> {
        let path = &self.relays.open[index];
        let fault = format!("{} {error}", path.relay.server());
        if let Some(candidate) = &path.candidate {
            self.rtc.direct_api().invalidate_candidate(candidate);
        }
        self.wake(now);
        self.relay_faults.push(fault.clone());
        let all_failed = self.relays.all_failed(index);
        if !self.path && error.is_shortage() {
            return Err(PeerError::Shortage {
                protocol: "TURN",
                error: error.to_string(),
            });
        }
        if !self.path && all_failed && self.ice != Ice::All {
            return Err(PeerError::Relays(self.relay_faults.join("; ")));
        }
        self.notices.push_back(PeerEvent::RelayFailed(fault));
        Ok(())
    }

    /// The stack's time must not go back, so it gets `now`. The time of arrival, `at`, is stored for the events.
    fn on_receive(
        &mut self,
        at: Instant,
        now: Instant,
        receive: Receive<'_>,
        bytes: &[u8],
    ) -> Result<(), PeerError> {
        let is_check_answer = bytes.starts_with(&CHECK_ANSWER);
        let pair = (receive.destination, receive.source);
        let input = Input::Receive(now.into_std(), receive);
        if self.rtc.accepts(&input) {
            if is_check_answer && (self.waited.len() < MAX_PAIRS || self.waited.contains_key(&pair))
            {
                let (waited, answers) = self.waited.entry(pair).or_default();
                *waited += now.saturating_duration_since(at);
                *answers += 1;
            }
            self.last_received_at = at;
            self.unpolled = true;
            self.rtc.handle_input(input)?;
        }
        Ok(())
    }

    /// Sends due packets, runs the stack's timers and returns the next event. Call it until it returns `None`.
    ///
    /// # Errors
    /// DTLS failed, or the stack reported another error.
    pub(crate) fn poll(&mut self, now: Instant) -> Result<Option<PeerEvent>, PeerError> {
        if !self.path {
            self.tcp.connect(now);
            self.relays.connect(now);
        }
        self.relays.on_time(now);
        if let Some(notice) = self.notices.pop_front() {
            return Ok(Some(notice));
        }
        // Without an input or a due timer, the stack has no output. Most rounds concern only the other peer connection.
        if !self.unpolled && self.timeout > now {
            return Ok(None);
        }
        self.unpolled = true;
        for _ in 0..MAX_POLL_ROUNDS {
            if self.timeout <= now {
                self.rtc.handle_input(Input::Timeout(now.into_std()))?;
            }
            loop {
                match self.rtc.poll_output()? {
                    Output::Timeout(at) => {
                        self.timeout = Instant::from_std(at);
                        break;
                    }
                    Output::Transmit(packet) => self.transmit(now, &packet),
                    Output::Event(event) => {
                        if let Some(event) = self.on_event(now, event) {
                            return Ok(Some(event));
                        }
                    }
                }
            }
            if self.timeout > now {
                self.unpolled = false;
                return Ok(None);
            }
        }
        // The timer does not advance. Continue a moment later instead of spinning.
        self.timeout = now + Duration::from_millis(1);
        self.unpolled = false;
        Ok(None)
    }

    /// Makes the stack's timeout due. Needed after each description and candidate: the stack acts on them only at a
    /// timeout.
    fn wake(&mut self, now: Instant) {
        self.timeout = now;
    }

    /// When [`poll`](Self::poll) has to be called next if nothing arrives.
    pub(crate) fn next_deadline(&self) -> Instant {
        let fallbacks = [self.tcp.due, self.relays.due()].map(|due| due.filter(|_| !self.path));
        let others = fallbacks.into_iter().chain([self.relays.next_deadline()]);
        others.flatten().fold(self.timeout, Instant::min)
    }

    fn on_event(&mut self, now: Instant, event: Event) -> Option<PeerEvent> {
        match event {
            Event::Connected => {
                self.connected = true;
                Some(PeerEvent::Connected)
            }
            Event::RtpPacket(packet) => Some(PeerEvent::Packet(ReceivedPacket::new(
                self.last_received_at,
                packet,
            ))),
            Event::ChannelData(data) => Some(PeerEvent::Data(self.last_received_at, data.data)),
            Event::MediaEgressStats(stats) => stats.remote.map(|remote| {
                PeerEvent::Report(ReceiverReport {
                    highest: *remote.maximum_sequence_number,
                    lost: if remote.packets_lost > MAX_LOST {
                        0
                    } else {
                        remote.packets_lost
                    },
                })
            }),
            Event::PeerStats(stats) => {
                let pair = stats.selected_candidate_pair?;
                let checks = u32::try_from(pair.responses_received).ok()?;
                let measured = pair.total_round_trip_time.checked_div(checks);
                let waited = self.waited.get(&(pair.local.addr, pair.remote.addr));
                let waited = waited.copied().unwrap_or_default();
                self.round_trip = measured.map(|it| without_wait(it, waited));
                (self.target == SignalTarget::Subscriber).then_some(PeerEvent::RoundTrip)
            }
            Event::IceConnectionStateChange(state) => {
                self.path |= state.is_connected();
                let lost = self.connected && state == IceConnectionState::Disconnected;
                self.broken = lost.then_some(BrokenTransport {
                    since: now,
                    reason: "the server stopped answering ICE checks",
                });
                None
            }
            Event::Closed => {
                self.broken = Some(BrokenTransport {
                    since: now,
                    reason: "the server closed the transport",
                });
                None
            }
            _ => None,
        }
    }

    /// Sends a packet of the stack. A packet that the kernel drops counts as lost on the way, as UDP promises no
    /// delivery.
    fn transmit(&mut self, now: Instant, packet: &Transmit) {
        let (source, bytes) = (packet.source, &*packet.contents);
        let same = |it: &&MediaSocket| {
            let local = it.local();
            local.ip() == source.ip() && local.port() == source.port()
        };
        let relay = self.relays.of_address(source);
        let path = if packet.proto == Protocol::Tcp {
            self.tcp.send(packet.destination, bytes);
            MediaPath::Tcp
        } else if let Some(index) = relay {
            let relay = &mut self.relays.open[index].relay;
            relay.send(now, packet.destination, bytes);
            relay.server().transport.into()
        } else {
            if let Some(socket) = self.sockets.iter().find(same)
                && let Err(error) = socket.send(bytes, packet.destination)
            {
                tracing::trace!(transport = self.name(), %error, "dropped a datagram: the kernel did not take it");
            }
            MediaPath::Udp
        };
        if bytes
            .first()
            .is_some_and(|first| *first > MAX_STUN_FIRST_BYTE)
        {
            self.carrier = Some(path);
            self.carrying_relay = relay.filter(|_| path.is_relayed());
        }
    }

    /// Parses a candidate of the server and records its address. Returns `None` if it cannot be used: its protocol is
    /// not allowed, the TCP candidate does not listen, or there are too many.
    fn usable(&mut self, line: &str) -> Option<Candidate> {
        let candidate = Candidate::from_sdp_string(line.trim()).ok()?;
        let usable = match candidate.proto() {
            // With relays only, it is what they relay to.
            Protocol::Udp => self.ice != Ice::Tcp,
            Protocol::Tcp => {
                matches!(self.ice, Ice::All | Ice::Tcp)
                    && candidate.tcptype() == Some(TcpType::Passive)
            }
            _ => false,
        };
        (usable && self.candidates < MAX_CANDIDATES).then(|| {
            self.candidates += 1;
            self.addresses.push(media_address(&candidate));
            candidate
        })
    }

    /// Returns the server's media addresses that arrived since the last call.
    pub(crate) fn take_addresses(&mut self) -> Vec<String> {
        std::mem::take(&mut self.addresses)
    }

    /// Opens the sockets for the candidates of a description, which the stack has already parsed.
    async fn reach_all(&mut self, sdp: &str) -> Vec<String> {
        let mut ours = Vec::new();
        for line in sdp.lines() {
            let Some(candidate) = line.strip_prefix("a=").and_then(|it| self.usable(it)) else {
                continue;
            };
            ours.extend(self.reach(candidate).await);
        }
        ours
    }

    /// Opens a UDP socket on the local address that routes to `remote`, unless there is one. A TCP candidate is
    /// connected later, if it is needed, and so are relays to `remote`.
    ///
    /// The address comes from the route and never from a constant, which would work on loopback only.
    async fn reach(&mut self, remote: Candidate) -> Option<String> {
        let now = Instant::now();
        if remote.proto() == Protocol::Tcp {
            let wait = match self.ice {
                Ice::Tcp => Duration::ZERO,
                _ => UDP_HEAD_START,
            };
            self.tcp.offer(remote, now + wait);
            return None;
        }
        self.relays.start_at(now + UDP_HEAD_START);
        self.relays.permit(now, remote.addr());
        if self.ice != Ice::All {
            return None;
        }
        let local = route_to(remote.addr()).await?;
        let known = self.sockets.iter().any(|it| it.local().ip() == local);
        if known || self.sockets.len() >= MAX_SOCKETS {
            return None;
        }
        self.listen(MediaSocket::bind(local).ok()?)
    }

    /// Offers a socket as a host candidate.
    fn listen(&mut self, socket: MediaSocket) -> Option<String> {
        let local = socket.local();
        let candidate = Candidate::host(local, Protocol::Udp).ok()?;
        let line = candidate.to_sdp_string();
        self.rtc.add_local_candidate(candidate)?;
        self.sockets.push(socket);
        Some(line)
    }
}

impl TcpFallback {
    /// Adds a candidate, unless it is known. The first one sets when to connect.
    fn offer(&mut self, remote: Candidate, due: Instant) {
        let connections = self.connections.iter().map(|(remote, _)| remote);
        let mut known = self.offered.iter().chain(connections);
        let has_room = self.offered.len() + self.connections.len() < MAX_TCP_CONNECTIONS;
        if has_room && known.all(|it| it.addr() != remote.addr()) {
            self.offered.push(remote);
            self.due.get_or_insert(due);
        }
    }

    fn connect(&mut self, now: Instant) {
        if self.due.take_if(|due| *due <= now).is_some() {
            let started = self.offered.drain(..).map(|remote| {
                let connection = IceTcpConnection::to(remote.addr());
                (remote, connection)
            });
            self.connections.extend(started);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<Incoming> {
        for (remote, connection) in &mut self.connections {
            if let Poll::Ready(event) = connection.poll(cx, buffer) {
                return Poll::Ready(match event {
                    TcpEvent::Opened(local) => Incoming::Opened(local),
                    TcpEvent::Datagram { to, length } => Incoming::Datagram {
                        at: Instant::now(),
                        proto: Protocol::Tcp,
                        from: remote.addr(),
                        to: SocketAddr::new(to, DISCARD_PORT),
                        length,
                    },
                    TcpEvent::Closed(error) => Incoming::Closed(remote.clone(), error),
                });
            }
        }
        Poll::Pending
    }

    fn send(&mut self, remote: SocketAddr, bytes: &[u8]) {
        let mut connections = self.connections.iter_mut();
        if let Some((_, connection)) = connections.find(|(it, _)| it.addr() == remote) {
            connection.send(bytes);
        }
    }
}

/// The local candidate of all TCP connections from `local`. The stack does not need the port of each: it distinguishes
/// connections by the server's address.
fn active_candidate(local: IpAddr) -> Option<Candidate> {
    Candidate::builder()
        .tcp()
        .host(SocketAddr::new(local, DISCARD_PORT))
        .tcptype(TcpType::Active)
        .build()
        .ok()
}

impl Incoming {
    fn from_udp(datagram: &Datagram, socket: &MediaSocket) -> Self {
        Self::Datagram {
            at: datagram.at,
            proto: Protocol::Udp,
            from: datagram.from,
            to: socket.local(),
            length: datagram.length,
        }
    }
}

impl ReceivedPacket {
    fn new(at: Instant, packet: RtpPacket) -> Self {
        Self {
            at,
            header: RtpHeader {
                ssrc: *packet.header.ssrc,
                sequence: *packet.seq_no,
                timestamp: packet.header.timestamp,
            },
            payload: packet.payload,
        }
    }
}

/// A round trip by the stack's clock, without the mean time that the answers waited in the socket: once media flows, sockets
/// are read at an interval, which is longer than many round trips.
fn without_wait(round_trip: Duration, (waited, answers): (Duration, u32)) -> Duration {
    let wait = waited.checked_div(answers).unwrap_or_default();
    round_trip.saturating_sub(wait)
}

/// `publisher` or `subscriber`.
pub(crate) fn name(target: SignalTarget) -> &'static str {
    match target {
        SignalTarget::Publisher => "publisher",
        SignalTarget::Subscriber => "subscriber",
    }
}

/// A packet of the caller's track.
pub(crate) struct OutgoingPacket {
    pub(crate) payload_type: Pt,
    pub(crate) sequence: u64,
    pub(crate) timestamp: u32,
    /// When it is sent.
    pub(crate) at: Instant,
    /// The first packet after a pause (RFC 7587, section 4.1).
    pub(crate) marker: bool,
    pub(crate) silent: bool,
    pub(crate) payload: Arc<[u8]>,
}

/// Replaces the stack's own text, which may quote the SDP with its ICE credentials.
fn sdp_error(error: RtcError, what: &'static str) -> PeerError {
    match error {
        RtcError::Sdp(_) | RtcError::RemoteSdp(_) => PeerError::Sdp(what),
        other => PeerError::Stack(other),
    }
}

/// Returns the sid of each track that an offer sends, by m-line. LiveKit's stream id is `<participant sid>|<track
/// sid>`, and its track id is the track sid.
fn tracks(sdp: &str) -> HashMap<Mid, String> {
    let mut tracks = HashMap::new();
    for section in sdp.split("\nm=").skip(1) {
        // Port 0 marks a stopped m-line (RFC 3264, section 8.2).
        let stopped = section.split(' ').nth(1) == Some("0");
        let attribute = |name: &str| {
            let mut lines = section.lines().filter_map(|line| line.strip_prefix("a="));
            lines
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        let silent = ["inactive", "recvonly"]
            .into_iter()
            .any(|it| attribute(it).is_some());
        let (Some(mid), Some(names)) = (attribute("mid:"), attribute("msid:")) else {
            continue;
        };
        let (stream, track) = names.split_once(' ').unwrap_or((names, ""));
        let sid = stream.split_once('|').map_or(track, |(_, sid)| sid);
        if !stopped && !silent && !sid.is_empty() {
            tracks.insert(Mid::from(mid), sid.to_owned());
        }
    }
    tracks
}

#[cfg(test)]
mod robustness;

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::livekit::wire::connect::Endpoint;
    use crate::livekit::wire::turn::TurnServer;

    #[test]
    fn tracks_are_read_from_the_m_lines_that_send() {
        let sdp = "v=0\r\na=group:BUNDLE 0 1 2 3\r\n\
            m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=mid:0\r\n\
            m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:1\r\na=sendrecv\r\na=msid:PA_a|TR_voice TR_voice\r\n\
            m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:2\r\na=inactive\r\na=msid:PA_a|TR_gone TR_gone\r\n\
            m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=msid:stream TR_plain\r\na=mid:3\r\na=sendonly\r\n\
            m=audio 0 UDP/TLS/RTP/SAVPF 111\r\na=mid:4\r\na=sendonly\r\na=msid:PA_a|TR_stopped x\r\n";
        let expected = [("1", "TR_voice"), ("3", "TR_plain")];
        assert_eq!(
            tracks(sdp),
            expected
                .into_iter()
                .map(|(mid, sid)| (Mid::from(mid), sid.to_owned()))
                .collect()
        );
    }

    fn peer(target: SignalTarget, ice: Ice) -> PeerConnection {
        let local = IpAddr::from([127, 0, 0, 1]);
        PeerConnection::new(target, local, ice, Relays::default()).unwrap()
    }

    /// livekit-server can't make its next offer after an answer that rejects an m-line.
    #[tokio::test]
    async fn answer_accepts_the_video_of_every_codec() {
        for codec in ["VP8", "VP9", "H264", "H265", "AV1"] {
            let profile = match codec {
                "H264" => {
                    "a=fmtp:96 level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f\r\n"
                }
                _ => "",
            };
            let video = format!(
                "m=video 9 UDP/TLS/RTP/SAVPF 96\r\nc=IN IP4 0.0.0.0\r\na=setup:actpass\r\na=mid:2\r\n\
                 a=ice-ufrag:MvriBrWOAZxftQql\r\na=ice-pwd:gvAQsUDqWfKEWKjAiwThMYgNuFHsaRhk\r\na=rtcp-mux\r\n\
                 a=rtpmap:96 {codec}/90000\r\n{profile}a=msid:PA_a|TR_video TR_video\r\na=sendrecv\r\n"
            );
            let offer = crate::livekit::arbitrary::sdp(crate::livekit::arbitrary::OFFER, &[]);
            let offer = offer.replace("BUNDLE 0 1", "BUNDLE 0 1 2") + &video;
            let mut peer = peer(SignalTarget::Subscriber, Ice::All);
            let (answer, _) = peer.accept_offer(&offer).await.unwrap();
            assert!(!answer.contains("m=video 0 "), "{codec}: {answer}");
            assert!(answer.contains("BUNDLE 0 1 2"), "{codec}: {answer}");
        }
    }

    #[tokio::test]
    async fn unusable_and_excess_candidates_are_ignored() {
        let mut peer = peer(SignalTarget::Subscriber, Ice::All);
        for line in [
            "",
            "candidate:1 1 tcp 1 127.0.0.1 7881 typ host tcptype active",
            "candidate:1 1 tcp 1 127.0.0.1 7881 typ host",
            "candidate:1 1 ssltcp 1 127.0.0.1 7881 typ host",
            "candidate:1 1 udp 1 abc.local 7881 typ host",
            "candidate",
        ] {
            peer.add_candidate(line).await;
        }
        assert_eq!(peer.candidates, 0);
        for port in 1..1000 {
            let line = format!("candidate:1 1 udp 1 127.0.0.1 {port} typ host");
            assert_eq!(peer.add_candidate(&line).await, [""; 0]);
        }
        assert_eq!(peer.candidates, MAX_CANDIDATES);
        assert_eq!(peer.sockets.len(), 1);
    }

    /// The network is not at fault if this process has no descriptor for the connection.
    #[tokio::test]
    async fn tcp_connection_without_a_descriptor_is_a_shortage_and_a_refused_one_is_not() {
        for (code, is_shortage) in [(Errno::EMFILE, true), (Errno::ECONNREFUSED, false)] {
            let mut peer = peer(SignalTarget::Publisher, Ice::Tcp);
            let remote = Candidate::builder()
                .tcp()
                .host("127.0.0.1:1".parse().unwrap())
                .tcptype(TcpType::Passive)
                .build()
                .unwrap();
            let closed = Incoming::Closed(remote, code.into());
            let result = peer.on_incoming(Instant::now(), &closed, &[]);
            let shortage = matches!(
                result,
                Err(PeerError::Shortage {
                    protocol: "TCP",
                    ..
                })
            );
            assert_eq!(shortage, is_shortage, "{code}: {result:?}");
        }
    }

    const PASSIVE: &str = "candidate:1 1 tcp 1 127.0.0.1 1 typ host tcptype passive";

    #[tokio::test]
    async fn tcp_connects_only_after_a_second_without_udp() {
        let mut peer = peer(SignalTarget::Publisher, Ice::All);
        for _ in 0..3 {
            peer.add_candidate(PASSIVE).await;
        }
        let due = peer.tcp.due.unwrap();
        peer.poll(due - Duration::from_millis(1)).unwrap();
        assert!(peer.tcp.connections.is_empty());
        assert!(peer.next_deadline() <= due);
        peer.poll(due).unwrap();
        assert_eq!(peer.tcp.connections.len(), 1);
        // A renegotiation repeats the same candidates.
        peer.add_candidate(PASSIVE).await;
        assert!(peer.tcp.due.is_none());
    }

    #[tokio::test]
    async fn tcp_does_not_connect_if_udp_has_a_path() {
        let mut peer = peer(SignalTarget::Publisher, Ice::All);
        peer.add_candidate(PASSIVE).await;
        let due = peer.tcp.due.unwrap();
        peer.path = true;
        peer.poll(due).unwrap();
        assert!(peer.tcp.connections.is_empty());
        assert!(
            peer.next_deadline() > due,
            "the deadline of TCP remains, and nothing clears it"
        );
    }

    #[tokio::test]
    async fn tcp_without_udp_connects_at_once_and_opens_no_udp_socket() {
        let mut peer = peer(SignalTarget::Publisher, Ice::Tcp);
        peer.add_candidate("candidate:1 1 udp 1 127.0.0.1 1 typ host")
            .await;
        for port in 1..100 {
            let line = format!("candidate:1 1 tcp 1 127.0.0.1 {port} typ host tcptype passive");
            peer.add_candidate(&line).await;
        }
        peer.poll(Instant::now()).unwrap();
        assert!(peer.sockets.is_empty());
        assert_eq!(peer.tcp.connections.len(), MAX_TCP_CONNECTIONS);
    }

    /// A peer connection to which a server offered TURN over UDP and TLS on a closed port.
    fn with_relays(ice: Ice) -> Result<PeerConnection, PeerError> {
        let offered = livekit_protocol::IceServer {
            urls: ["turn:127.0.0.1:1?transport=udp", "turns:127.0.0.1:1"]
                .map(str::to_owned)
                .into(),
            ..livekit_protocol::IceServer::default()
        };
        let endpoint = Endpoint::new(&"ws://127.0.0.1:1".parse().unwrap(), None).unwrap();
        let relays = Relays::new(&endpoint, &TurnServer::offered(&[offered]), ice);
        let local = IpAddr::from([127, 0, 0, 1]);
        PeerConnection::new(SignalTarget::Publisher, local, ice, relays)
    }

    const HOST: &str = "candidate:1 1 udp 1 127.0.0.1 1 typ host";

    #[tokio::test]
    async fn relays_connect_only_after_a_second_without_udp() {
        let mut peer = with_relays(Ice::All).unwrap();
        assert_eq!(peer.relays.due(), None);
        peer.add_candidate(HOST).await;
        let due = peer.relays.due().unwrap();
        peer.poll(due - Duration::from_millis(1)).unwrap();
        assert!(peer.relays.open.is_empty());
        assert!(peer.next_deadline() <= due);
        let mut connected = with_relays(Ice::All).unwrap();
        connected.add_candidate(HOST).await;
        connected.path = true;
        connected.poll(due + UDP_HEAD_START).unwrap();
        assert!(connected.relays.open.is_empty());
        peer.poll(due).unwrap();
        assert_eq!(peer.relays.open.len(), 2);
    }

    #[tokio::test]
    async fn relays_alone_connect_at_once_and_open_no_other_socket() {
        for (ice, relays) in [(Ice::Relay, 2), (Ice::Tls, 1)] {
            let mut peer = with_relays(ice).unwrap();
            assert_eq!(peer.add_candidate(HOST).await, [""; 0]);
            peer.add_candidate(PASSIVE).await;
            peer.poll(Instant::now()).unwrap();
            assert_eq!(peer.relays.open.len(), relays, "{ice:?}");
            assert!(peer.sockets.is_empty() && peer.tcp.due.is_none(), "{ice:?}");
        }
        let peer = with_relays(Ice::Tcp).unwrap();
        assert!(peer.relays.is_empty());
    }

    #[test]
    fn round_trip_excludes_the_mean_wait_in_the_socket() {
        let millis = Duration::from_millis;
        assert_eq!(without_wait(millis(21), (millis(60), 3)), millis(1));
        assert_eq!(without_wait(millis(21), (millis(0), 0)), millis(21));
        assert_eq!(without_wait(millis(5), (millis(60), 3)), millis(0));
    }

    /// With relays alone, the last one that fails ends the connection; otherwise another path may work.
    #[tokio::test]
    async fn failed_relays_end_a_connection_that_has_no_other_path() {
        for (ice, ends) in [(Ice::Relay, true), (Ice::All, false)] {
            let mut peer = with_relays(ice).unwrap();
            peer.add_candidate(HOST).await;
            peer.poll(Instant::now() + UDP_HEAD_START).unwrap();
            let now = Instant::now();
            let failed = |index, code| {
                Incoming::Relay(index, RelayEvent::Failed(RelayError::Refused(Some(code))))
            };
            peer.on_incoming(now, &failed(0, 486), &[]).unwrap();
            let last = peer.on_incoming(now, &failed(1, 508), &[]);
            assert_eq!(last.is_err(), ends, "{last:?}");
            if let Err(error) = last {
                let text = error.to_string();
                assert!(text.contains("TURN/UDP 127.0.0.1:1 refused"), "{text}");
                assert!(text.contains("TURN/TLS 127.0.0.1:1 refused"), "{text}");
            } else {
                let noted = peer.poll(now).unwrap();
                assert!(
                    matches!(noted, Some(PeerEvent::RelayFailed(_))),
                    "{noted:?}"
                );
            }
        }
    }

    #[test]
    fn relays_that_are_required_but_not_offered_are_an_error() {
        for (ice, text) in [
            (Ice::Relay, "no TURN server,"),
            (Ice::Tls, "no TURN server over TLS,"),
        ] {
            let local = IpAddr::from([127, 0, 0, 1]);
            let peer = PeerConnection::new(SignalTarget::Publisher, local, ice, Relays::default());
            let error = peer.err().unwrap().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[tokio::test]
    async fn datagrams_of_other_senders_change_nothing() {
        let mut peer = peer(SignalTarget::Subscriber, Ice::All);
        let now = Instant::now();
        for first in 0..=255_u8 {
            let bytes = [first; 64];
            let datagram = Incoming::Datagram {
                at: now,
                proto: Protocol::Udp,
                from: "127.0.0.1:9".parse().unwrap(),
                to: peer.sockets[0].local(),
                length: bytes.len(),
            };
            peer.on_incoming(now, &datagram, &bytes).unwrap();
        }
        assert!(peer.poll(now).unwrap().is_none());
    }
}
