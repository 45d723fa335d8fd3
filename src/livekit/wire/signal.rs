//! The signal connection: a WebSocket that carries LiveKit's protobufs. One attempt, no failover, bounded frames;
//! the token never appears in an error.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use futures_util::{FutureExt, SinkExt, StreamExt};
use http::header::{
    AUTHORIZATION, CONNECTION, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::Full;
use livekit_protocol as proto;
use prost::Message as _;
use proto::signal_request::Message as Outgoing;
use proto::signal_response::Message as Incoming;
use secrecy::SecretString;
use tokio::sync::oneshot;
use tokio::time::{
    Instant, Interval, MissedTickBehavior, Sleep, interval, sleep_until, timeout_at,
};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as SocketError, Message, error::ProtocolError};

use super::connect::{ConnectError, Endpoint, Stream, rounded};
use super::request::{ExchangeError, HttpRejection, HttpResponse, bearer, exchange, sanitize};

/// The signal protocol that this client speaks. 18 would mean negotiated data channels, which it doesn't do.
const PROTOCOL_VERSION: u32 = 16;
/// The upstream Rust SDK whose behaviour this client follows; servers keep work-arounds by SDK and version.
const SDK_VERSION: &str = "0.10.0";
/// Largest message accepted. A join response with a few participants takes some KiB.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Most bytes that may wait for a server that doesn't read.
const MAX_BACKLOG_BYTES: usize = 1 << 20;
/// Most messages in one second; a room of three sends some tens while it is being joined.
const MAX_MESSAGES_PER_SECOND: u32 = 1000;

/// An open signal connection, after the join response.
pub struct Signal {
    socket: WebSocketStream<Stream>,
    /// Something was queued that the socket may not have taken yet.
    unflushed: bool,
    ping: Interval,
    ping_timeout: Duration,
    /// No later than the ping timeout.
    give_up: Pin<Box<Sleep>>,
    /// When the last message came.
    received_at: Instant,
    pings: Pings,
    rate: MessageRate,
}

/// A WebSocket to the server, before its first message.
pub(crate) struct OpenSocket {
    pub(crate) socket: WebSocketStream<Stream>,
    /// Our end of the TCP connection, and the server's.
    pub(crate) local: SocketAddr,
    pub(crate) peer: SocketAddr,
}

/// Pings and their pongs, as far as they tell the time.
#[derive(Default)]
pub(crate) struct Pings {
    /// The last ping: its timestamp, which comes back in the pong, and when it was sent.
    sent: Option<(i64, Instant)>,
    /// As the last pong told it; the server keeps statistics of it.
    rtt: Duration,
    clock: Option<ServerClock>,
}

impl Pings {
    pub(crate) fn on_ping(&mut self, timestamp: i64, at: Instant) {
        self.sent = Some((timestamp, at));
    }

    pub(crate) fn on_pong(&mut self, at: Instant, pong: &proto::Pong) {
        let answered = self
            .sent
            .take_if(|(timestamp, _)| *timestamp == pong.last_ping_timestamp);
        let Some((_, sent)) = answered else {
            return;
        };
        self.rtt = at.saturating_duration_since(sent);
        if pong.timestamp > 0 && self.clock.is_none_or(|known| self.rtt < known.rtt) {
            self.clock = Some(ServerClock {
                local: sent + self.rtt / 2,
                server: pong.timestamp,
                rtt: self.rtt,
            });
        }
    }

    /// The server's clock, as the quickest pong told it; `None` until one has come.
    pub(crate) fn clock(&self) -> Option<ServerClock> {
        self.clock
    }
}

/// A moment on the server's clock and on ours, from a ping and its pong.
#[derive(Debug, Clone, Copy)]
pub struct ServerClock {
    local: Instant,
    /// Unix milliseconds.
    server: i64,
    /// From ping to pong; the two moments lie at most half of it apart.
    rtt: Duration,
}

impl ServerClock {
    /// Our moment of a stamp of the server's, in Unix milliseconds; `None` for 0, which is no stamp.
    ///
    /// Cloud's nodes keep their clocks together better than a join is exact.
    pub fn to_local(self, stamp: i64) -> Option<Instant> {
        let apart = Duration::from_millis(stamp.abs_diff(self.server));
        match stamp {
            0 => None,
            _ if stamp < self.server => self.local.checked_sub(apart),
            _ => self.local.checked_add(apart),
        }
    }
}

/// What a join brings.
pub struct Joined {
    pub signal: Signal,
    pub response: Box<proto::JoinResponse>,
    /// When the join response was read.
    pub at: Instant,
    /// Our end of the TCP connection: the address that routes to the server.
    pub local: SocketAddr,
    pub peer: SocketAddr,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum SignalError {
    #[error(transparent)]
    Unreachable(#[from] ConnectError),
    #[error("the signal connection was refused with HTTP {}: {}", .0.status, .0.message)]
    Refused(HttpRejection),
    /// The connection came up, but the upgrade or the join response did not come in time.
    #[error("no join response within {0:?}")]
    JoinTimeout(Duration),
    /// `Leave` before the join response.
    #[error("the server sent Leave ({reason}) before the join response")]
    LeftBeforeJoin { reason: String },
    #[error("the server answers no pings: nothing came for {0:?}")]
    PingTimeout(Duration),
    #[error("the signal connection closed: {0}")]
    Closed(String),
    /// A frame above the size limit, an undecodable one, or more of them than any room sends.
    #[error("the server broke the signal protocol: {0}")]
    Protocol(String),
}

impl Signal {
    /// Connects and waits for the join response, for `timeout` from DNS to that response.
    ///
    /// `requested` is told the time just before the upgrade is written, after TLS. It stays silent where no connection
    /// came up.
    pub async fn connect(
        endpoint: &Endpoint,
        token: &SecretString,
        timeout: Duration,
        requested: oneshot::Sender<Instant>,
    ) -> Result<Joined, SignalError> {
        let deadline = Instant::now() + timeout;
        let target = format!(
            "{}?auto_subscribe=1&adaptive_stream=0&protocol={PROTOCOL_VERSION}&sdk=rust&version={SDK_VERSION}",
            endpoint.target("/rtc")
        );
        let on_request = |at| {
            // A caller that no longer listens doesn't want to know.
            requested.send(at).ok();
        };
        let opened = open_websocket(endpoint, &target, token, timeout, on_request).await?;
        let (local, peer) = (opened.local, opened.peer);
        let mut signal = Self::new(opened.socket);
        let (at, first) = timeout_at(deadline, signal.next_message())
            .await
            .map_err(|_| SignalError::JoinTimeout(timeout))??;
        let response = match first {
            Incoming::Join(response) => Box::new(response),
            Incoming::Leave(leave) => {
                return Err(SignalError::LeftBeforeJoin {
                    reason: leave_reason(&leave),
                });
            }
            _ => {
                let text = "the first message was no join response".to_owned();
                return Err(SignalError::Protocol(text));
            }
        };
        signal.received_at = at;
        signal.set_keep_alive(&response);
        Ok(Joined {
            signal,
            response,
            at,
            local,
            peer,
        })
    }

    fn new(socket: WebSocketStream<Stream>) -> Self {
        let now = Instant::now();
        Self {
            socket,
            unflushed: false,
            ping: ping_interval(Duration::from_secs(5)),
            ping_timeout: Duration::from_secs(15),
            give_up: Box::pin(sleep_until(now)),
            received_at: now,
            pings: Pings::default(),
            rate: MessageRate::new(now),
        }
    }

    fn set_keep_alive(&mut self, response: &proto::JoinResponse) {
        let (ping, timeout) = keep_alive(response);
        self.ping = ping_interval(ping);
        self.ping_timeout = timeout;
    }

    /// The next message and when its frame was read. Pings and their deadline are kept in here, so it must be polled
    /// for as long as the connection is to live.
    ///
    /// Cancel-safe.
    pub async fn recv(&mut self) -> Result<(Instant, Incoming), SignalError> {
        loop {
            tokio::select! {
                // What has come counts before a deadline that passed meanwhile.
                biased;
                message = next_message(&mut self.socket, &mut self.unflushed, &mut self.rate) => {
                    let (at, message) = message?;
                    self.received_at = at;
                    if let Some(message) = self.filter(at, message) {
                        return Ok((at, message));
                    }
                }
                () = &mut self.give_up => {
                    // Armed anew only here: this is polled with every packet of media, and must cost nothing then.
                    let give_up = self.received_at + self.ping_timeout;
                    if give_up <= Instant::now() {
                        return Err(SignalError::PingTimeout(self.ping_timeout));
                    }
                    self.give_up.as_mut().reset(give_up);
                }
                _ = self.ping.tick() => self.send_ping()?,
            }
        }
    }

    /// When the server was last heard, pongs included.
    pub fn received_at(&self) -> Instant {
        self.received_at
    }

    /// See [`Pings::clock`].
    pub fn clock(&self) -> Option<ServerClock> {
        self.pings.clock()
    }

    /// Queues a message and writes what the socket takes; [`recv`](Self::recv) writes the rest. It never waits, so it
    /// needs no deadline: a server that reads nothing meets the ping deadline, or before that the limit of the backlog.
    ///
    /// A connection that is gone is no error here: [`recv`](Self::recv) tells of it, after what the server said before.
    ///
    /// # Errors
    /// [`SignalError::Closed`] where a MiB already waits to be written.
    pub fn send(&mut self, message: Outgoing) -> Result<(), SignalError> {
        let request = proto::SignalRequest {
            message: Some(message),
        };
        self.queue(Message::Binary(request.encode_to_vec().into()))
    }

    /// Sends `Leave` and closes the socket, within `timeout`.
    pub async fn leave(mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let leave = proto::LeaveRequest {
            reason: proto::DisconnectReason::ClientInitiated.into(),
            action: proto::leave_request::Action::Disconnect.into(),
            ..proto::LeaveRequest::default()
        };
        let closing = async {
            self.send(Outgoing::Leave(leave)).ok()?;
            self.socket.close(None).await.ok()?;
            // The server's own close: until then it may not have read the `Leave`.
            while let Some(Ok(_)) = self.socket.next().await {}
            Some(())
        };
        // Nothing more can be done for a connection that is already gone, or doesn't end in time.
        timeout_at(deadline, closing).await.ok();
    }

    async fn next_message(&mut self) -> Result<(Instant, Incoming), SignalError> {
        next_message(&mut self.socket, &mut self.unflushed, &mut self.rate).await
    }

    /// Keeps back what is this connection's own business.
    fn filter(&mut self, at: Instant, message: Incoming) -> Option<Incoming> {
        match message {
            Incoming::PongResp(pong) => {
                self.pings.on_pong(at, &pong);
                None
            }
            // The new token is for reconnecting, which a canary doesn't do: it stays out of reach of every log.
            Incoming::Pong(_) | Incoming::RefreshToken(_) => None,
            other => Some(other),
        }
    }

    /// Both forms, as upstream's SDKs do: servers before protocol 8 answer only the first.
    fn send_ping(&mut self) -> Result<(), SignalError> {
        let timestamp = Utc::now().timestamp_millis();
        self.pings.on_ping(timestamp, Instant::now());
        self.send(Outgoing::Ping(timestamp))?;
        self.send(Outgoing::PingReq(proto::Ping {
            timestamp,
            rtt: i64::try_from(self.pings.rtt.as_millis()).unwrap_or(i64::MAX),
        }))
    }

    fn queue(&mut self, message: Message) -> Result<(), SignalError> {
        self.unflushed = true;
        written(self.socket.start_send_unpin(message))?;
        if let Some(flushed) = self.socket.flush().now_or_never() {
            self.unflushed = false;
            written(flushed)?;
        }
        Ok(())
    }
}

/// Reads up to the next protobuf message. A function of the parts, so that [`Signal::recv`] can wait for its timers
/// beside it.
///
/// Cancel-safe: the only await is a poll function that keeps no state of its own.
async fn next_message(
    socket: &mut WebSocketStream<Stream>,
    unflushed: &mut bool,
    rate: &mut MessageRate,
) -> Result<(Instant, Incoming), SignalError> {
    loop {
        let frame = poll_fn(|cx| {
            if *unflushed && let Poll::Ready(flushed) = socket.poll_flush_unpin(cx) {
                *unflushed = false;
                written(flushed)?;
            }
            let next = socket.poll_next_unpin(cx);
            next.map(|frame| frame.transpose().map_err(|error| socket_error(&error)))
        })
        .await?;
        let (at, content) = read_frame(frame, rate)?;
        if let Some(bytes) = content
            && let Some(message) = decode(&bytes)?
        {
            return Ok((at, message));
        }
    }
}

/// When a frame came, and its content where it is one for a client; or why there are no more.
pub(crate) fn read_frame(
    frame: Option<Message>,
    rate: &mut MessageRate,
) -> Result<(Instant, Option<Bytes>), SignalError> {
    let at = Instant::now();
    let Some(frame) = frame else {
        return Err(SignalError::Closed("end of stream".to_owned()));
    };
    rate.count(at)?;
    match frame {
        Message::Binary(bytes) => Ok((at, Some(bytes))),
        Message::Close(frame) => Err(closed(frame.as_ref())),
        Message::Text(_) => {
            let text = "a text frame, where only protobufs were agreed on".to_owned();
            Err(SignalError::Protocol(text))
        }
        // The socket answers pings by itself on its next poll.
        Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => Ok((at, None)),
    }
}

/// Opens a WebSocket at `target`, a path with its query, within `timeout` from DNS to the answer to the upgrade.
///
/// `on_request` gets the time just before the upgrade is written, after TLS.
pub(crate) async fn open_websocket(
    endpoint: &Endpoint,
    target: &str,
    token: &SecretString,
    timeout: Duration,
    on_request: impl FnOnce(Instant),
) -> Result<OpenSocket, SignalError> {
    let deadline = Instant::now() + timeout;
    let stream = endpoint.connect(deadline).await?;
    let (local, peer) = (stream.local, stream.peer);
    let key = generate_key();
    let request = upgrade_request(endpoint, target, token, &key);
    on_request(Instant::now());
    let answer = exchange(stream, request, deadline)
        .await
        .map_err(|error| match error {
            ExchangeError::Timeout => SignalError::JoinTimeout(timeout),
            ExchangeError::Broken(text) => SignalError::Closed(text),
            ExchangeError::Malformed(text) => SignalError::Protocol(text),
        })?;
    let socket = upgraded(answer, &key).await?;
    Ok(OpenSocket {
        socket,
        local,
        peer,
    })
}

async fn upgraded(answer: HttpResponse, key: &str) -> Result<WebSocketStream<Stream>, SignalError> {
    if answer.status != StatusCode::SWITCHING_PROTOCOLS {
        return Err(SignalError::Refused(answer.rejection()));
    }
    if !accepts(&answer.headers, key) {
        let text = "the answer to the upgrade is not a WebSocket's".to_owned();
        return Err(SignalError::Protocol(text));
    }
    let (stream, read_ahead) = answer
        .upgraded
        .expect("an answer of status 101 carries its connection");
    // So much is filled with zeros whenever the socket is polled, which is with every packet of media.
    let config = WebSocketConfig::default()
        .read_buffer_size(1 << 10)
        .write_buffer_size(0)
        .max_write_buffer_size(MAX_BACKLOG_BYTES)
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    let read_ahead = read_ahead.to_vec();
    let socket =
        WebSocketStream::from_partially_read(stream, read_ahead, Role::Client, Some(config));
    Ok(socket.await)
}

/// How often to ping and how long to wait for the server, by its own figures, within reason: zero means that it names
/// none.
pub(crate) fn keep_alive(response: &proto::JoinResponse) -> (Duration, Duration) {
    let seconds = |given: i32, default: u64| {
        let given = u64::try_from(given).ok().filter(|given| *given > 0);
        Duration::from_secs(given.unwrap_or(default).min(60))
    };
    let every = seconds(response.ping_interval, 5);
    (every, seconds(response.ping_timeout, 15).max(2 * every))
}

/// `None` for a message of a kind that is newer than our protobufs.
pub(crate) fn decode(bytes: &Bytes) -> Result<Option<Incoming>, SignalError> {
    proto::SignalResponse::decode(bytes.clone())
        .map(|response| response.message)
        .map_err(|error| SignalError::Protocol(format!("an undecodable message: {error}")))
}

fn closed(frame: Option<&tokio_tungstenite::tungstenite::protocol::CloseFrame>) -> SignalError {
    SignalError::Closed(match frame {
        None => "by the server, without a code".to_owned(),
        Some(frame) if frame.reason.is_empty() => format!("code {}", u16::from(frame.code)),
        Some(frame) => format!(
            "code {}: {}",
            u16::from(frame.code),
            sanitize(&frame.reason)
        ),
    })
}

/// What a write came to. One that met a closed or broken connection is no news yet: the server's `Leave` or close may lie
/// there unread, and whoever reads to the end learns of both.
fn written(result: Result<(), SocketError>) -> Result<(), SignalError> {
    match result {
        Ok(()) | Err(SocketError::Io(_)) => Ok(()),
        Err(error) => Err(socket_error(&error)),
    }
}

pub(crate) fn socket_error(error: &SocketError) -> SignalError {
    match error {
        SocketError::Io(error) => SignalError::Closed(error.to_string()),
        SocketError::ConnectionClosed | SocketError::AlreadyClosed => {
            SignalError::Closed("it was closed before".to_owned())
        }
        SocketError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            SignalError::Closed("the server cut it without a word".to_owned())
        }
        SocketError::WriteBufferFull(_) => SignalError::Closed(format!(
            "the server reads nothing: {MAX_BACKLOG_BYTES} bytes wait for it"
        )),
        other => SignalError::Protocol(other.to_string()),
    }
}

/// The reason's name in the protobufs (`ROOM_DELETED`, `JOIN_FAILURE`, …).
pub fn leave_reason(leave: &proto::LeaveRequest) -> String {
    proto::DisconnectReason::try_from(leave.reason).map_or_else(
        |_| format!("reason {}", leave.reason),
        |reason| reason.as_str_name().to_owned(),
    )
}

/// The token goes into a header, which livekit-server reads before the query: so no URL ever carries it.
fn upgrade_request(
    endpoint: &Endpoint,
    target: &str,
    token: &SecretString,
    key: &str,
) -> Request<Full<Bytes>> {
    Request::get(target)
        .header(HOST, endpoint.authority())
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "websocket")
        .header(SEC_WEBSOCKET_VERSION, "13")
        .header(SEC_WEBSOCKET_KEY, key)
        .header(AUTHORIZATION, bearer(token))
        .body(Full::default())
        .expect("the path of a URL, a host and fixed headers make a request")
}

/// RFC 6455, 4.1: what the client must verify in the answer.
fn accepts(headers: &HeaderMap, key: &str) -> bool {
    // `Connection` is a list, and a proxy may have added to it.
    let is = |name, wanted: &str| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
            .is_some_and(|value| {
                value
                    .split(',')
                    .any(|one| one.trim().eq_ignore_ascii_case(wanted))
            })
    };
    is(UPGRADE, "websocket")
        && is(CONNECTION, "upgrade")
        && headers
            .get(SEC_WEBSOCKET_ACCEPT)
            .is_some_and(|value| value == derive_accept_key(key.as_bytes()).as_str())
}

/// The first at once: its pong tells the server's clock before an agent can have joined.
fn ping_interval(span: Duration) -> Interval {
    let mut pings = interval(span);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pings
}

/// Counts the frames of each second.
pub(crate) struct MessageRate {
    since: Instant,
    frames: u32,
}

impl MessageRate {
    pub(crate) fn new(since: Instant) -> Self {
        Self { since, frames: 0 }
    }

    fn count(&mut self, at: Instant) -> Result<(), SignalError> {
        let window = at.saturating_duration_since(self.since);
        if window >= Duration::from_secs(1) {
            *self = Self::new(at);
        }
        self.frames += 1;
        if self.frames > MAX_MESSAGES_PER_SECOND {
            return Err(SignalError::Protocol(format!(
                "{} messages within {}; a room sends some tens a second at most",
                self.frames,
                rounded(window)
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
