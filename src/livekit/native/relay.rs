//! One allocation on a TURN server (RFC 8656): an address of the server that relays UDP for one peer connection. The canary
//! reaches the server over UDP, TCP or TLS. `rtc-turn` speaks the protocol and does no I/O.
//!
//! It knows no ICE. Everything that the server sends is bounded here; what it refuses becomes a text for people.

mod crypto;
mod frames;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::{Sink, Stream as _};
use rtc_shared::{TransportContext, TransportMessage, TransportProtocol};
use rtc_turn::client::{Client, ClientConfig, Event};
use sansio::Protocol as _;
use secrecy::ExposeSecret;
use str0m::ice::StunMessage;
use tokio::time::Instant;
use tokio_util::codec::Framed;

use self::crypto::TurnCrypto;
use self::frames::TurnFrames;
use super::udp::{MediaSocket, route_to};
use crate::livekit::wire::connect::{ConnectError, Endpoint, Stream, is_shortage};
use crate::livekit::wire::turn::{TurnServer, TurnTransport};

/// A server that answers later than this cannot carry media within a sensible media deadline. The allocation has as much
/// time again; `rtc-turn` itself waits 8 s on UDP and 40 s on a stream.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ALLOCATION_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a relay without any permission waits for another candidate of LiveKit. Candidates arrive together.
const PERMISSION_GRACE: Duration = Duration::from_secs(1);

/// Maximum number of LiveKit's addresses that the server is asked to relay to.
const MAX_PEERS: usize = 16;

/// The server has renewed its nonce, so the request is repeated with the new one.
const STALE_NONCE: u16 = 438;

/// How often one permission is requested.
const MAX_ATTEMPTS: u8 = 3;

/// Maximum number of bytes that wait for space in the kernel's buffer: about two seconds of one voice.
const MAX_UNSENT: usize = 16 * 1024;

/// A timer that does not advance must not keep the task busy.
const MIN_TIMER_STEP: Duration = Duration::from_millis(10);

/// What `rtc-turn` takes for the server's address if a stream leads to it. Any address will do.
const STREAM_PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 443);

/// What happened on a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RelayEvent {
    /// Peers may send to this address of the server.
    Allocated(SocketAddr),
    /// The server relays to a first peer, so packets can be sent.
    Usable,
    /// A datagram of a peer is in the buffer.
    Datagram {
        at: Instant,
        from: SocketAddr,
        length: usize,
    },
    /// The relay is gone. No event follows.
    Failed(RelayError),
}

/// Why a TURN server cannot be used. The text follows the server's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RelayError {
    #[error("cannot be reached: {0}")]
    Unreachable(#[from] ConnectError),
    #[error(
        "cannot be reached: no UDP socket could be opened on the local address that reaches it"
    )]
    NoRoute,
    #[error("did not answer the allocation within {ALLOCATION_TIMEOUT:?}")]
    Silent,
    #[error("{}", refusal(*.0))]
    Refused(Option<u16>),
    #[error(
        "does not relay to LiveKit's media address {0} (error {1}): its settings forbid that network, in livekit-server \
         unless turn.allow_restricted_peer_cidrs lists it"
    )]
    PeerRefused(IpAddr, u16),
    #[error("closed the connection")]
    Closed,
    #[error("lost the connection: {0}")]
    Broken(String),
}

impl RelayError {
    /// Whether this process or its machine is at fault, so that nothing is known about the server.
    pub(crate) fn is_shortage(&self) -> bool {
        matches!(self, Self::Unreachable(ConnectError::Shortage { .. }))
    }
}

/// What the server answered to the allocation, by the code of its error (RFC 8656, section 19).
fn refusal(code: Option<u16>) -> String {
    let Some(code) = code else {
        return "answered the allocation with a message that is no TURN".to_owned();
    };
    let why = match code {
        // pion answers 400 to a wrong signature, and coturn 401.
        400 | 401 | 441 => {
            "refused the credentials of the join response: they are wrong or expired"
        }
        403 => "forbids allocations",
        437 => "has another allocation for the same connection",
        440 | 443 => "has no relay address of this IP version",
        442 => "relays no UDP",
        486 => "refused the allocation: the quota of this user is reached",
        508 => "refused the allocation: it has no relay port left",
        _ => "refused the allocation",
    };
    format!("{why} (error {code})")
}

/// A relay, from the connection to its server on.
pub(crate) struct TurnRelay {
    server: TurnServer,
    link: Link,
    /// Exists while the link is open.
    client: Option<Box<Client>>,
    /// When the client's next timer is due.
    timer: Option<Instant>,
    /// When the relay fails, and why, unless something better happens first.
    deadline: Option<(Instant, RelayError)>,
    relayed: Option<SocketAddr>,
    peers: Vec<PeerPermission>,
    events: VecDeque<RelayEvent>,
}

enum Link {
    Connecting(Pin<Box<dyn Future<Output = Result<Link, RelayError>> + Send>>),
    /// With the server's address.
    Udp(MediaSocket, SocketAddr),
    Stream(Box<Framed<Stream, TurnFrames>>),
    Closed,
}

/// An address of LiveKit's to which the server may relay.
struct PeerPermission {
    peer: SocketAddr,
    state: PermissionState,
    attempts: u8,
}

#[derive(PartialEq)]
enum PermissionState {
    /// Requested once there is an allocation.
    Wanted,
    /// With the id of the request.
    Requested([u8; 12]),
    Granted,
    /// With the code of the error.
    Refused(u16),
}

impl TurnRelay {
    /// Starts to connect; [`poll`](Self::poll) continues. `endpoint` is the project's, whose certificates count here, too.
    pub(crate) fn connect(endpoint: &Endpoint, server: TurnServer) -> Self {
        let transport = server.transport;
        let secure = transport == TurnTransport::Tls;
        let service = endpoint.service(&server.host, server.port, secure);
        let connecting = async move {
            let deadline = Instant::now() + CONNECT_TIMEOUT;
            if transport == TurnTransport::Udp {
                return open_udp(&service, deadline).await;
            }
            let stream = service.connect(deadline).await?;
            Ok(Link::Stream(Box::new(Framed::new(
                stream,
                TurnFrames::default(),
            ))))
        };
        Self {
            server,
            link: Link::Connecting(Box::pin(connecting)),
            client: None,
            timer: None,
            deadline: None,
            relayed: None,
            peers: Vec::new(),
            events: VecDeque::new(),
        }
    }

    pub(crate) fn server(&self) -> &TurnServer {
        &self.server
    }

    /// The address that the server has allocated.
    pub(crate) fn relayed(&self) -> Option<SocketAddr> {
        self.relayed
    }

    /// Has the server relay to `peer` as soon as there is an allocation.
    pub(crate) fn permit(&mut self, now: Instant, peer: SocketAddr) {
        let is_known = self.peers.iter().any(|it| it.peer == peer);
        if is_known || self.peers.len() >= MAX_PEERS {
            return;
        }
        self.peers.push(PeerPermission {
            peer,
            state: PermissionState::Wanted,
            attempts: 0,
        });
        self.request_permissions(now);
    }

    /// Sends a datagram to a peer. Drops it if the server may not relay to that peer or if too many bytes are waiting, as
    /// UDP would.
    pub(crate) fn send(&mut self, now: Instant, peer: SocketAddr, datagram: &[u8]) {
        let (Some(client), Some(relayed)) = (&mut self.client, self.relayed) else {
            return;
        };
        // Before it becomes a frame: a request of the client must never be dropped on a stream.
        if self.link.unsent() + datagram.len() > MAX_UNSENT {
            tracing::trace!("dropped a datagram: the connection to the TURN server is congested");
            return;
        }
        let sent = client
            .relay(relayed)
            .and_then(|mut relay| relay.send_to(now.into_std(), datagram, peer));
        match sent {
            Ok(()) => self.flush(now),
            // LiveKit may send from an address that it did not offer.
            Err(_) => self.permit(now, peer),
        }
    }

    /// Asks the server to end the allocation, without waiting for the answer.
    pub(crate) fn close(&mut self, now: Instant) {
        if let (Some(client), Some(relayed)) = (&mut self.client, self.relayed) {
            let closed = client
                .relay(relayed)
                .and_then(|mut relay| relay.close(now.into_std()));
            if closed.is_ok() {
                self.flush(now);
            }
        }
    }

    /// Continues to connect, send and receive.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<RelayEvent> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(event);
            }
            let received = match &mut self.link {
                Link::Connecting(connecting) => {
                    match ready!(connecting.as_mut().poll(cx)) {
                        Ok(link) => self.allocate(link),
                        Err(error) => self.fail(error),
                    }
                    continue;
                }
                Link::Udp(socket, server) => {
                    let datagram = ready!(socket.poll_recv(cx, buffer));
                    let frame = BytesMut::from(&buffer[..datagram.length]);
                    (datagram.from == *server).then_some((datagram.at, frame))
                }
                Link::Stream(frames) => match ready!(poll_frame(frames, cx)) {
                    Ok(frame) => Some((Instant::now(), frame)),
                    Err(error) => {
                        self.fail(error);
                        continue;
                    }
                },
                Link::Closed => return Poll::Pending,
            };
            if let Some((at, frame)) = received
                && let Some(datagram) = self.on_frame(at, frame, buffer)
            {
                return Poll::Ready(datagram);
            }
        }
    }

    /// Reads what waits on a UDP socket. A stream is read by [`poll`](Self::poll) alone.
    pub(crate) fn try_recv(&mut self, buffer: &mut [u8]) -> Option<RelayEvent> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            let Link::Udp(socket, server) = &mut self.link else {
                return None;
            };
            let datagram = socket.try_recv(buffer)?;
            if datagram.from != *server {
                continue;
            }
            let frame = BytesMut::from(&buffer[..datagram.length]);
            if let Some(event) = self.on_frame(datagram.at, frame, buffer) {
                return Some(event);
            }
        }
    }

    /// Stops waking the task for each datagram; the caller then calls [`try_recv`](Self::try_recv) at an interval. A stream
    /// stays watched.
    pub(crate) fn stop_watching(&mut self) {
        if let Link::Udp(socket, _) = &mut self.link {
            socket.stop_watching();
        }
    }

    /// Handles the timers that are due. An event may follow.
    pub(crate) fn on_time(&mut self, now: Instant) {
        if self.deadline.as_ref().is_some_and(|(at, _)| *at <= now)
            && let Some((_, error)) = self.deadline.take()
        {
            self.fail(error);
        }
        if self.timer.is_some_and(|at| at <= now)
            && let Some(client) = &mut self.client
        {
            // It cannot fail: errors of the requests that it repeats become events.
            client.handle_timeout(now.into_std()).ok();
            self.on_client_events(now);
            self.flush(now);
        }
    }

    /// When [`on_time`](Self::on_time) has to be called next.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let deadline = self.deadline.as_ref().map(|(at, _)| *at);
        [deadline, self.timer].into_iter().flatten().min()
    }

    /// Requests the allocation over an open link.
    fn allocate(&mut self, link: Link) {
        let now = Instant::now();
        let (local_addr, server, transport_protocol) = match &link {
            Link::Udp(socket, server) => (socket.local(), *server, TransportProtocol::UDP),
            _ => (STREAM_PEER, STREAM_PEER, TransportProtocol::TCP),
        };
        // An address, never a name: `rtc-turn` would block the thread for the lookup.
        let config = ClientConfig {
            turn_serv_addr: server.to_string(),
            local_addr,
            transport_protocol,
            username: self.server.username.expose_secret().to_owned(),
            password: self.server.password.expose_secret().to_owned(),
            ..ClientConfig::default()
        };
        self.link = link;
        let client = Client::new(config, Arc::new(TurnCrypto)).and_then(|mut client| {
            client.allocate(now.into_std())?;
            Ok(client)
        });
        match client {
            Ok(client) => {
                self.client = Some(Box::new(client));
                self.deadline = Some((now + ALLOCATION_TIMEOUT, RelayError::Silent));
                self.flush(now);
            }
            Err(_) => self.fail(RelayError::Refused(None)),
        }
    }

    /// Hands a whole frame to the client; copies the datagram that it carries into `buffer`.
    fn on_frame(&mut self, at: Instant, frame: BytesMut, buffer: &mut [u8]) -> Option<RelayEvent> {
        let client = self.client.as_mut()?;
        let now = Instant::now();
        // The client passes the code on as part of a text only.
        let code = StunMessage::parse(&frame)
            .ok()
            .and_then(|message| message.error_code())
            .map(|(code, _)| code);
        let (local_addr, peer_addr, transport_protocol) = match &self.link {
            Link::Udp(socket, server) => (socket.local(), *server, TransportProtocol::UDP),
            _ => (STREAM_PEER, STREAM_PEER, TransportProtocol::TCP),
        };
        let message = TransportMessage {
            now: now.into_std(),
            transport: TransportContext {
                local_addr,
                peer_addr,
                transport_protocol,
                ecn: None,
            },
            message: frame,
        };
        if client.handle_read(message).is_err() {
            tracing::trace!("ignored a message of the TURN server");
        }
        let mut datagram = None;
        while let Some(event) = self.next_client_event() {
            match event {
                Event::DataIndicationOrChannelData(_, from, data) => {
                    let length = data.len();
                    if let Some(place) = buffer.get_mut(..length)
                        && length > 0
                    {
                        place.copy_from_slice(&data);
                        datagram = Some(RelayEvent::Datagram { at, from, length });
                    }
                }
                other => self.on_client_event(now, &other, code),
            }
        }
        self.flush(now);
        datagram
    }

    fn next_client_event(&mut self) -> Option<Event> {
        self.client.as_mut()?.poll_event()
    }

    fn on_client_events(&mut self, now: Instant) {
        while let Some(event) = self.next_client_event() {
            self.on_client_event(now, &event, None);
        }
    }

    /// Handles an event of the client; `code` is that of the error that caused it.
    fn on_client_event(&mut self, now: Instant, event: &Event, code: Option<u16>) {
        match event {
            Event::AllocateResponse(_, relayed) if self.relayed.is_none() => {
                self.relayed = Some(*relayed);
                self.deadline = None;
                self.events.push_back(RelayEvent::Allocated(*relayed));
                self.request_permissions(now);
            }
            Event::AllocateError(..) if self.relayed.is_none() => {
                self.fail(RelayError::Refused(code));
            }
            Event::CreatePermissionResponse(_, peer) => {
                let is_first = self.granted().next().is_none();
                if let Some(permission) = self.peers.iter_mut().find(|it| it.peer == *peer) {
                    permission.state = PermissionState::Granted;
                    self.deadline = None;
                    if is_first {
                        self.events.push_back(RelayEvent::Usable);
                    }
                }
            }
            Event::CreatePermissionError(id, _) | Event::TransactionTimeout(id) => {
                self.permission_refused(now, id.0, code);
            }
            _ => {}
        }
    }

    fn granted(&self) -> impl Iterator<Item = &PeerPermission> {
        let granted = |it: &&PeerPermission| it.state == PermissionState::Granted;
        self.peers.iter().filter(granted)
    }

    /// A refused peer is no failure while the server relays to another one, or may.
    fn permission_refused(&mut self, now: Instant, id: [u8; 12], code: Option<u16>) {
        let requested = PermissionState::Requested(id);
        let Some(permission) = self.peers.iter_mut().find(|it| it.state == requested) else {
            return;
        };
        permission.state = match code {
            None | Some(STALE_NONCE) if permission.attempts < MAX_ATTEMPTS => {
                PermissionState::Wanted
            }
            code => PermissionState::Refused(code.unwrap_or_default()),
        };
        self.request_permissions(now);
        let refused = self.peers.iter().map(|it| match it.state {
            PermissionState::Refused(code) => Some((it.peer.ip(), code)),
            _ => None,
        });
        if let Some(refused) = refused.collect::<Option<Vec<_>>>()
            && let Some((peer, code)) = refused.first()
        {
            let error = RelayError::PeerRefused(*peer, *code);
            self.deadline = Some((now + PERMISSION_GRACE, error));
        }
    }

    /// Requests the permissions that are wanted, each with a request of its own: pion grants the addresses of one request
    /// all or none.
    fn request_permissions(&mut self, now: Instant) {
        let (Some(client), Some(relayed)) = (&mut self.client, self.relayed) else {
            return;
        };
        for permission in &mut self.peers {
            // The server refuses an address of the other IP version (error 443).
            let fits = permission.peer.is_ipv4() == relayed.is_ipv4();
            if permission.state != PermissionState::Wanted || !fits {
                continue;
            }
            let requested = client
                .relay(relayed)
                .and_then(|mut relay| relay.create_permission(now.into_std(), permission.peer));
            if let Ok(Some(id)) = requested {
                permission.attempts += 1;
                permission.state = PermissionState::Requested(id.0);
                self.deadline = None;
            }
        }
        self.flush(now);
    }

    /// Sends what the client has to send, and notes its next timer.
    fn flush(&mut self, now: Instant) {
        let Some(client) = &mut self.client else {
            return;
        };
        while let Some(message) = client.poll_write() {
            self.link.send(&message.message);
        }
        let timer = client.poll_timeout().map(Instant::from_std);
        self.timer = timer.map(|at| at.max(now + MIN_TIMER_STEP));
    }

    fn fail(&mut self, error: RelayError) {
        tracing::debug!(server = %self.server, %error, "a TURN relay failed or ended");
        self.link = Link::Closed;
        self.client = None;
        self.timer = None;
        self.deadline = None;
        self.events.push_back(RelayEvent::Failed(error));
    }
}

impl Link {
    /// Bytes that the kernel has not taken yet.
    fn unsent(&self) -> usize {
        match self {
            Self::Stream(frames) => frames.write_buffer().len(),
            _ => 0,
        }
    }

    /// Sends a frame at once. What a stream does not take waits for the next poll, which also reports an error.
    fn send(&mut self, frame: &[u8]) {
        match self {
            Self::Udp(socket, server) => {
                if let Err(error) = socket.send(frame, *server) {
                    tracing::trace!(%error, "dropped a datagram to a TURN server: the kernel did not take it");
                }
            }
            Self::Stream(frames) => {
                let mut frames = Pin::new(&mut **frames);
                let mut cx = Context::from_waker(Waker::noop());
                if Sink::<&[u8]>::start_send(frames.as_mut(), frame).is_ok() {
                    let _ = Sink::<&[u8]>::poll_flush(frames, &mut cx);
                }
            }
            Self::Connecting(_) | Self::Closed => {}
        }
    }
}

/// Opens a socket on the local address that routes to the server.
async fn open_udp(service: &Endpoint, deadline: Instant) -> Result<Link, RelayError> {
    for server in service.resolve(deadline).await? {
        let Some(local) = route_to(server).await else {
            continue;
        };
        return match MediaSocket::bind(local) {
            Ok(socket) => Ok(Link::Udp(socket, server)),
            Err(error) if is_shortage(&error) => Err(ConnectError::Shortage {
                host: server.to_string(),
                error: error.to_string(),
            }
            .into()),
            Err(_) => Err(RelayError::NoRoute),
        };
    }
    Err(RelayError::NoRoute)
}

fn poll_frame(
    frames: &mut Framed<Stream, TurnFrames>,
    cx: &mut Context<'_>,
) -> Poll<Result<BytesMut, RelayError>> {
    let broken = |error: std::io::Error| RelayError::Broken(error.to_string());
    if let Poll::Ready(Err(error)) = Sink::<&[u8]>::poll_flush(Pin::new(&mut *frames), cx) {
        return Poll::Ready(Err(broken(error)));
    }
    Poll::Ready(match ready!(Pin::new(frames).poll_next(cx)) {
        Some(Ok(frame)) => Ok(frame),
        Some(Err(error)) => Err(broken(error)),
        None => Err(RelayError::Closed),
    })
}
