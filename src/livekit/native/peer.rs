//! One of a participant's two peer connections: a sans-IO WebRTC stack with its sockets. It knows SDP, ICE and RTP; it
//! knows no room, no agent and no signal connection.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use livekit_protocol::SignalTarget;
use str0m::change::{SdpAnswer, SdpOffer, SdpPendingOffer};
use str0m::media::{Direction, MediaKind, Mid, Pt};
use str0m::net::{Protocol, Receive, TcpType, Transmit};
use str0m::rtp::{Extension, ExtensionMap, ExtensionValues, RtpPacket, RtpWrite};
use str0m::{Candidate, Event, IceConnectionState, Input, Output, Rtc, RtcError};
use tokio::net::UdpSocket;
use tokio::time::Instant;

use super::ice_tcp::{IceTcpConnection, TcpEvent};
use super::udp::{Datagram, MediaSocket};
use crate::config::Ice;
use crate::livekit::audio::rtp::RtpHeader;
use crate::livekit::wire::candidate::media_address;

/// Local addresses of one peer connection: one a route, and few hosts have more routes to one server.
const MAX_SOCKETS: usize = 4;

/// Candidates taken from the server; one that offers more doesn't mean us well.
const MAX_CANDIDATES: usize = 64;

/// Connections for media over TCP of one peer connection: a server offers one address, or a few.
const MAX_TCP_CONNECTIONS: usize = 4;

/// How long UDP is tried alone. It takes some round trips, and a TCP connection that nobody needs costs the server.
const UDP_HEAD_START: Duration = Duration::from_secs(1);

/// The port of a candidate that connects rather than listens (RFC 6544, 4.5).
const DISCARD_PORT: u16 = 9;

/// The highest first byte of a STUN message, which DTLS and SRTP stay above (RFC 7983).
const MAX_STUN_FIRST_BYTE: u8 = 3;

/// Rounds of output and due timers within one call; more would be a timer that never moves on.
const MAX_POLL_ROUNDS: usize = 32;

/// How often and how long ICE asks an unresponsive server before it gives a path up: some eight seconds, where the
/// stack's defaults take over twenty and a probe would blame the agent's silence on the agent.
const ICE_CHECK_INTERVAL: Duration = Duration::from_secs(1);
const MAX_ICE_CHECKS: usize = 8;

/// A transport on which nothing at all came for so long is down: the server answers a check every second.
const QUIET_TIMEOUT: Duration = Duration::from_secs(5);

/// What came of a peer connection.
#[derive(Debug)]
pub(crate) enum PeerEvent {
    /// ICE and DTLS are up.
    Connected,
    Packet(ReceivedPacket),
    /// What came on a data channel, and when.
    Data(Instant, Vec<u8>),
}

/// A received RTP packet.
#[derive(Debug)]
pub(crate) struct ReceivedPacket {
    pub(crate) at: Instant,
    pub(crate) header: RtpHeader,
    pub(crate) payload: Arc<[u8]>,
}

/// A peer connection that can't go on. Its text names no address and quotes no SDP.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error("the server's {0} is not understood")]
    Sdp(&'static str),
    #[error("the server's {0} came without an offer of ours")]
    Unexpected(&'static str),
    #[error("no local UDP address reaches the server")]
    NoRoute,
    #[error(transparent)]
    Stack(#[from] RtcError),
}

/// Why a transport that was up is not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BrokenTransport {
    pub(crate) since: Instant,
    pub(crate) how: &'static str,
}

pub(crate) struct PeerConnection {
    rtc: Box<Rtc>,
    target: SignalTarget,
    ice: Ice,
    sockets: Vec<MediaSocket>,
    tcp: TcpFallback,
    /// When the stack next wants to be told the time.
    timeout: Instant,
    /// The stack took something in, and its output hasn't been polled to the end since.
    unpolled: bool,
    /// ICE has a path, and DTLS or media may have gone over it.
    path: bool,
    connected: bool,
    /// What the last of our own packets, rather than a check, went over.
    carrier: Option<Protocol>,
    broken: Option<BrokenTransport>,
    /// When the server last sent something that is its own.
    last_received_at: Instant,
    pending: Option<(u32, SdpPendingOffer)>,
    candidates: usize,
    /// Where the server wants media, since this was last asked.
    addresses: Vec<String>,
    /// Track by m-line, of the latest offer.
    tracks: HashMap<Mid, String>,
}

/// The way round blocked UDP: connections to the server's passive candidates.
#[derive(Default)]
struct TcpFallback {
    /// Candidates that are not connected to yet.
    offered: Vec<Candidate>,
    /// When they are to be, unless ICE has a path by then.
    due: Option<Instant>,
    connections: Vec<(Candidate, IceTcpConnection)>,
}

/// What the network brought.
pub(crate) enum Incoming {
    Datagram {
        at: Instant,
        proto: Protocol,
        from: SocketAddr,
        to: SocketAddr,
        length: usize,
    },
    /// A connection came up, from this address of ours.
    Opened(IpAddr),
    /// The connection to this candidate ended, or never came up.
    Closed(Candidate),
}

impl PeerConnection {
    /// Starts with a UDP host candidate on `local`, the address that reaches the signal connection's server.
    ///
    /// # Errors
    /// [`PeerError::NoRoute`] where no UDP socket can be bound there.
    pub(crate) fn new(target: SignalTarget, local: IpAddr, ice: Ice) -> Result<Self, PeerError> {
        let mut extensions = ExtensionMap::empty();
        extensions.set(1, Extension::AudioLevel);
        extensions.set(4, Extension::RtpMid);
        let now = Instant::now();
        // Without RED: in RTP mode the stack would hand it out raw, and nobody could hear its echo.
        let mut config = Rtc::builder()
            .clear_codecs()
            .enable_opus(true, false)
            .set_extension_map(extensions)
            .set_rtp_mode(true);
        config.set_max_stun_rto(ICE_CHECK_INTERVAL);
        config.set_max_stun_retransmits(MAX_ICE_CHECKS);
        let rtc = config.build(now.into_std());
        let mut peer = Self {
            rtc: Box::new(rtc),
            target,
            ice,
            sockets: Vec::new(),
            tcp: TcpFallback::default(),
            timeout: now,
            unpolled: true,
            path: false,
            connected: false,
            carrier: None,
            broken: None,
            last_received_at: now,
            pending: None,
            candidates: 0,
            addresses: Vec::new(),
            tracks: HashMap::new(),
        };
        if ice == Ice::All {
            peer.listen(local).ok_or(PeerError::NoRoute)?;
        }
        Ok(peer)
    }

    pub(crate) fn name(&self) -> &'static str {
        name(self.target)
    }

    pub(crate) fn connected(&self) -> bool {
        self.connected
    }

    /// Whether TCP carries the media.
    pub(crate) fn over_tcp(&self) -> bool {
        self.carrier == Some(Protocol::Tcp)
    }

    /// Whether the transport was up and is not; to be asked when no datagram is waiting to be read.
    pub(crate) fn broken(&self, now: Instant) -> Option<BrokenTransport> {
        let quiet_at = self.last_received_at + QUIET_TIMEOUT;
        let quiet = (self.connected && now >= quiet_at).then_some(BrokenTransport {
            since: quiet_at,
            how: "nothing came from the server any more",
        });
        self.broken.or(quiet)
    }

    /// Offers one audio track to send; `id` comes back in the answer.
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

    /// Takes the answer to our offer `id`; 0 is a server that doesn't number them.
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

    /// Takes an offer; returns our answer, and candidates of ours that the answer doesn't have.
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

    /// Takes a candidate of the server's; returns those of ours that it called for.
    pub(crate) async fn add_candidate(&mut self, line: &str) -> Vec<String> {
        let Some(candidate) = self.usable(line) else {
            return Vec::new();
        };
        self.rtc.add_remote_candidate(candidate.clone());
        let ours = self.reach(candidate).await;
        self.wake(Instant::now());
        ours.into_iter().collect()
    }

    /// The track of an m-line of the latest offer.
    pub(crate) fn tracks(&self) -> &HashMap<Mid, String> {
        &self.tracks
    }

    /// The m-line that a stream of packets belongs to.
    pub(crate) fn mid_of(&mut self, ssrc: u32) -> Option<Mid> {
        let mut api = self.rtc.direct_api();
        api.stream_rx(&ssrc.into()).map(|stream| stream.mid())
    }

    /// Opus's payload type, once it is agreed on.
    pub(crate) fn payload_type(&self, mid: Mid) -> Option<Pt> {
        self.rtc.media(mid)?.remote_pts().first().copied()
    }

    /// Queues a packet of our track; [`poll`](Self::poll) sends it.
    pub(crate) fn write(&mut self, mid: Mid, packet: OutgoingPacket) {
        let mut api = self.rtc.direct_api();
        let Some(stream) = api.stream_tx_by_mid(mid, None) else {
            return;
        };
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
        // The stack sends on a timer, which is due now.
        self.timeout = packet.at;
    }

    /// Waits for what comes; once connected, no longer on a socket that media comes by. Only one task may poll.
    pub(crate) fn poll_recv(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<Incoming> {
        for socket in &mut self.sockets {
            if let Poll::Ready(datagram) = socket.poll_recv(cx, buffer) {
                // From now on it is read by the clock; one that nothing comes by is dearer to read than to watch.
                if self.connected && buffer[0] > MAX_STUN_FIRST_BYTE {
                    socket.stop_watching();
                }
                return Poll::Ready(Incoming::from_udp(&datagram, socket));
            }
        }
        self.tcp.poll(cx, buffer)
    }

    /// What has come over UDP.
    pub(crate) fn try_recv(&mut self, buffer: &mut [u8]) -> Option<Incoming> {
        self.sockets.iter_mut().find_map(|socket| {
            let datagram = socket.try_recv(buffer)?;
            Some(Incoming::from_udp(&datagram, socket))
        })
    }

    /// Takes in what came. One at a time: the stack wants its output polled after each.
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
                // Anybody can send here: what isn't STUN, DTLS or SRTP is nothing to us.
                match Receive::new(*proto, *from, *to, &buffer[..*length]) {
                    Ok(receive) => self.on_receive(*at, now, receive),
                    Err(_) => Ok(()),
                }
            }
            // The server isn't told: it would do nothing with a candidate that connects, and takes the address from
            // the first check.
            Incoming::Opened(local) => {
                if let Some(candidate) = active_candidate(*local) {
                    self.rtc.add_local_candidate(candidate);
                }
                self.wake(now);
                Ok(())
            }
            Incoming::Closed(remote) => {
                self.rtc.direct_api().invalidate_candidate(remote);
                self.wake(now);
                Ok(())
            }
        }
    }

    /// The stack's time never goes back, so it is told when the datagram was read; when it came is ours to keep.
    fn on_receive(
        &mut self,
        at: Instant,
        now: Instant,
        receive: Receive<'_>,
    ) -> Result<(), PeerError> {
        let input = Input::Receive(now.into_std(), receive);
        if self.rtc.accepts(&input) {
            self.last_received_at = at;
            self.unpolled = true;
            self.rtc.handle_input(input)?;
        }
        Ok(())
    }

    /// Sends what is to be sent, keeps the stack's timers, and says what happened; to be called until it says `None`.
    ///
    /// # Errors
    /// DTLS failed, or the stack gave up.
    pub(crate) fn poll(&mut self, now: Instant) -> Result<Option<PeerEvent>, PeerError> {
        if !self.path {
            self.tcp.connect(now);
        }
        // Nothing can have come of nothing: most rounds of a participant are about its other peer connection.
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
                    Output::Transmit(packet) => self.transmit(&packet),
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
        // Never spin: whatever is due is due a moment later.
        self.timeout = now + Duration::from_millis(1);
        self.unpolled = false;
        Ok(None)
    }

    /// After a description or a candidate: the stack acts on such a change only when it is told the time.
    fn wake(&mut self, now: Instant) {
        self.timeout = now;
    }

    pub(crate) fn next_deadline(&self) -> Instant {
        let due = self.tcp.due.filter(|_| !self.path);
        due.map_or(self.timeout, |due| due.min(self.timeout))
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
            Event::IceConnectionStateChange(state) => {
                self.path |= state.is_connected();
                let lost = self.connected && state == IceConnectionState::Disconnected;
                self.broken = lost.then_some(BrokenTransport {
                    since: now,
                    how: "ICE lost its connection: the server answers no more checks",
                });
                None
            }
            Event::Closed => {
                self.broken = Some(BrokenTransport {
                    since: now,
                    how: "the server closed the transport",
                });
                None
            }
            _ => None,
        }
    }

    /// UDP promises nothing: what a full buffer or a missing route drops is lost like any other packet.
    fn transmit(&mut self, packet: &Transmit) {
        let (source, bytes) = (packet.source, &*packet.contents);
        if bytes
            .first()
            .is_some_and(|first| *first > MAX_STUN_FIRST_BYTE)
        {
            self.carrier = Some(packet.proto);
        }
        if packet.proto == Protocol::Tcp {
            self.tcp.send(packet.destination, bytes);
            return;
        }
        let same = |it: &&MediaSocket| {
            let local = it.local();
            local.ip() == source.ip() && local.port() == source.port()
        };
        if let Some(socket) = self.sockets.iter().find(same)
            && let Err(error) = socket.send(bytes, packet.destination)
        {
            tracing::trace!(transport = self.name(), %error, "a datagram was not sent");
        }
    }

    /// Whether we can do anything with a candidate: UDP where we may, TCP where it listens, and not one too many.
    fn usable(&mut self, line: &str) -> Option<Candidate> {
        let candidate = Candidate::from_sdp_string(line.trim()).ok()?;
        let usable = match candidate.proto() {
            Protocol::Udp => self.ice == Ice::All,
            Protocol::Tcp => candidate.tcptype() == Some(TcpType::Passive),
            _ => false,
        };
        (usable && self.candidates < MAX_CANDIDATES).then(|| {
            self.candidates += 1;
            self.addresses.push(media_address(&candidate));
            candidate
        })
    }

    /// Where the server wants media, as far as it was not told before.
    pub(crate) fn take_addresses(&mut self) -> Vec<String> {
        std::mem::take(&mut self.addresses)
    }

    /// Sees to it that the candidates of a description, which the stack has taken already, can be reached.
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

    /// Opens a socket on the local address that routes to `remote`, unless there is one; one over TCP only once it is
    /// needed.
    async fn reach(&mut self, remote: Candidate) -> Option<String> {
        if remote.proto() == Protocol::Tcp {
            let wait = match self.ice {
                Ice::All => UDP_HEAD_START,
                Ice::Tcp => Duration::ZERO,
            };
            self.tcp.offer(remote, Instant::now() + wait);
            return None;
        }
        let local = route_to(remote.addr()).await?;
        let known = self.sockets.iter().any(|it| it.local().ip() == local);
        if known || self.sockets.len() >= MAX_SOCKETS {
            return None;
        }
        self.listen(local)
    }

    /// Binds a socket to `local` and offers it as a host candidate.
    fn listen(&mut self, local: IpAddr) -> Option<String> {
        let socket = MediaSocket::bind(local).ok()?;
        let local = socket.local();
        let candidate = Candidate::host(local, Protocol::Udp).ok()?;
        let line = candidate.to_sdp_string();
        self.rtc.add_local_candidate(candidate)?;
        self.sockets.push(socket);
        Some(line)
    }
}

impl TcpFallback {
    /// Takes a candidate, unless it is known. The first one says when to connect.
    fn offer(&mut self, remote: Candidate, due: Instant) {
        let connections = self.connections.iter().map(|(remote, _)| remote);
        let mut known = self.offered.iter().chain(connections);
        let room = self.offered.len() + self.connections.len() < MAX_TCP_CONNECTIONS;
        if room && known.all(|it| it.addr() != remote.addr()) {
            self.offered.push(remote);
            self.due.get_or_insert(due);
        }
    }

    fn connect(&mut self, now: Instant) {
        if self.due.take_if(|due| *due <= now).is_some() {
            let begun = self.offered.drain(..).map(|remote| {
                let connection = IceTcpConnection::to(remote.addr());
                (remote, connection)
            });
            self.connections.extend(begun);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<Incoming> {
        for (remote, connection) in &mut self.connections {
            if let Poll::Ready(came) = connection.poll(cx, buffer) {
                return Poll::Ready(match came {
                    TcpEvent::Opened(local) => Incoming::Opened(local),
                    TcpEvent::Datagram { to, length } => Incoming::Datagram {
                        at: Instant::now(),
                        proto: Protocol::Tcp,
                        from: remote.addr(),
                        to: SocketAddr::new(to, DISCARD_PORT),
                        length,
                    },
                    TcpEvent::Closed => Incoming::Closed(remote.clone()),
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

/// The candidate of all connections from `local`. Each has a port of its own, which the stack need not know: it tells
/// connections apart by the server's address.
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

/// `publisher` or `subscriber`.
pub(crate) fn name(target: SignalTarget) -> &'static str {
    match target {
        SignalTarget::Publisher => "publisher",
        SignalTarget::Subscriber => "subscriber",
    }
}

/// A packet of our track.
pub(crate) struct OutgoingPacket {
    pub(crate) payload_type: Pt,
    pub(crate) sequence: u64,
    pub(crate) timestamp: u32,
    pub(crate) at: Instant,
    pub(crate) marker: bool,
    pub(crate) silent: bool,
    pub(crate) payload: Arc<[u8]>,
}

/// The local address that packets to `remote` leave from. A connected UDP socket tells, without sending anything.
async fn route_to(remote: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match remote {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect(remote).await.ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// The stack's own text may quote the description, and with it the credentials of ICE.
fn sdp_error(error: RtcError, what: &'static str) -> PeerError {
    match error {
        RtcError::Sdp(_) | RtcError::RemoteSdp(_) => PeerError::Sdp(what),
        other => PeerError::Stack(other),
    }
}

/// The tracks that an offer sends, by m-line. LiveKit's stream id is `<participant sid>|<track sid>`, and its track id
/// the track's sid.
fn tracks(sdp: &str) -> HashMap<Mid, String> {
    let mut tracks = HashMap::new();
    for section in sdp.split("\nm=").skip(1) {
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
    use super::*;

    #[test]
    fn tracks_are_read_from_the_lines_that_send() {
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
        PeerConnection::new(target, Ipv4Addr::LOCALHOST.into(), ice).unwrap()
    }

    #[tokio::test]
    async fn local_address_follows_the_route() {
        let loopback: SocketAddr = "127.0.0.1:9".parse().unwrap();
        assert_eq!(route_to(loopback).await, Some(loopback.ip()));
    }

    #[tokio::test]
    async fn candidates_are_bounded_and_of_a_kind_that_can_be_used() {
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

    const PASSIVE: &str = "candidate:1 1 tcp 1 127.0.0.1 1 typ host tcptype passive";

    #[tokio::test]
    async fn udp_has_a_second_before_tcp_is_connected() {
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
        // Renegotiation tells of the same candidates again.
        peer.add_candidate(PASSIVE).await;
        assert!(peer.tcp.due.is_none());
    }

    #[tokio::test]
    async fn udp_that_has_a_path_makes_tcp_needless() {
        let mut peer = peer(SignalTarget::Publisher, Ice::All);
        peer.add_candidate(PASSIVE).await;
        let due = peer.tcp.due.unwrap();
        peer.path = true;
        peer.poll(due).unwrap();
        assert!(peer.tcp.connections.is_empty());
        assert!(peer.next_deadline() > due, "a deadline that nothing meets");
    }

    #[tokio::test]
    async fn tcp_alone_connects_at_once_and_opens_no_udp_socket() {
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

    #[tokio::test]
    async fn datagrams_of_strangers_change_nothing() {
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
