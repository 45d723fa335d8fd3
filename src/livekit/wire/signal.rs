//! The signal connection: a WebSocket that carries LiveKit's protobufs. A single attempt without failover, because a
//! canary must see what a retry would hide. Frames are bounded, and the token never appears in an error.

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

use super::connect::{ConnectError, Endpoint, Stream, format_rounded};
use super::request::{ExchangeError, HttpRejection, HttpResponse, bearer, exchange, sanitize};

/// The version of the signal protocol. 18 would promise negotiated data channels, which this client does not support.
const PROTOCOL_VERSION: u32 = 16;
/// The version of the upstream Rust SDK whose behaviour this client follows. Servers select work-arounds by SDK and version.
const SDK_VERSION: &str = "0.10.0";
/// Size of a message that is accepted. A join response with a few participants has some KiB.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Bytes that may wait to be written if the server does not read.
const MAX_BACKLOG_BYTES: usize = 1 << 20;
/// Messages that are accepted in one second. A room with three participants sends some tens while it is joined.
const MAX_MESSAGES_PER_SECOND: u32 = 1000;

/// Messages that are kept until the join response has arrived.
const MAX_EARLY_MESSAGES: usize = 64;

/// An open signal connection, after the join response.
pub(crate) struct Signal {
    socket: WebSocketStream<Stream>,
    /// The socket may hold queued messages that it has not written yet.
    unflushed: bool,
    ping: Interval,
    ping_timeout: Duration,
    /// Fires at the ping timeout, or earlier: it is only rearmed when it fires.
    give_up: Pin<Box<Sleep>>,
    /// When the last message arrived, including pongs.
    received_at: Instant,
    pings: Pings,
    rate: MessageRate,
}

/// A WebSocket to the server, before its first message.
pub(crate) struct OpenSocket {
    pub(crate) socket: WebSocketStream<Stream>,
    /// Our end of the TCP connection.
    pub(crate) local: SocketAddr,
}

/// Pings and pongs, which measure the round trip and the server's clock.
#[derive(Default)]
pub(crate) struct Pings {
    /// The last ping: its timestamp, which the pong returns, and when it was sent.
    sent: Option<(i64, Instant)>,
    /// From the last pong. The next ping reports it to the server, which keeps statistics of it.
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

    /// The server's clock according to the pong with the shortest round trip; `None` before the first pong.
    pub(crate) fn clock(&self) -> Option<ServerClock> {
        self.clock
    }
}

/// The same moment on the server's clock and on ours, from a ping and its pong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ServerClock {
    local: Instant,
    /// Unix milliseconds.
    server: i64,
    /// The round trip. The two times differ by at most half of it.
    rtt: Duration,
}

impl ServerClock {
    /// Converts a server timestamp in Unix milliseconds to our clock; `None` for 0, which means that it is not set.
    ///
    /// The timestamp may come from another node: the clocks of LiveKit Cloud's nodes differ by less than the error of a
    /// join time.
    pub(crate) fn to_local(self, stamp: i64) -> Option<Instant> {
        let apart = Duration::from_millis(stamp.abs_diff(self.server));
        match stamp {
            0 => None,
            _ if stamp < self.server => self.local.checked_sub(apart),
            _ => self.local.checked_add(apart),
        }
    }
}

/// The result of a successful join.
pub(crate) struct Joined {
    pub(crate) signal: Signal,
    pub(crate) response: Box<proto::JoinResponse>,
    /// What arrived before the join response, in order. LiveKit's node can send an update of the participants first.
    pub(crate) early: Vec<Incoming>,
    /// When the join response was read.
    pub(crate) at: Instant,
    /// Our end of the TCP connection, which is the local address that routes to the server.
    pub(crate) local: SocketAddr,
}

#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum SignalError {
    #[error(transparent)]
    Unreachable(#[from] ConnectError),
    #[error("the signal connection was refused with HTTP {}: {}", .0.status, .0.message)]
    Refused(HttpRejection),
    /// The connection was opened, but the upgrade or the join response did not arrive in time.
    #[error("no join response within {0:?}")]
    JoinTimeout(Duration),
    #[error("the server sent Leave ({reason}) before the join response")]
    LeftBeforeJoin { reason: String },
    #[error("the server stopped answering pings: nothing arrived for {0:?}")]
    PingTimeout(Duration),
    #[error("the signal connection closed: {0}")]
    Closed(String),
    /// A frame exceeded the size limit or could not be decoded, or there were more frames than any room sends.
    #[error("the server broke the signal protocol: {0}")]
    Protocol(String),
}

impl Signal {
    /// Connects and waits for the join response. `timeout` covers everything from DNS to that response.
    ///
    /// `requested` receives the time just before the upgrade is written, after TLS. It is dropped unused if no connection
    /// could be opened.
    pub(crate) async fn connect(
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
            // The caller may have dropped its receiver; then it does not need the time.
            requested.send(at).ok();
        };
        let opened = open_websocket(endpoint, &target, token, timeout, on_request).await?;
        let local = opened.local;
        let mut signal = Self::new(opened.socket);
        let joining = timeout_at(deadline, signal.join_response());
        let (at, response, early) = joining
            .await
            .map_err(|_| SignalError::JoinTimeout(timeout))??;
        signal.received_at = at;
        signal.set_keep_alive(&response);
        Ok(Joined {
            signal,
            response,
            early,
            at,
            local,
        })
    }

    /// Waits for the join response, and keeps the messages that arrive before it.
    async fn join_response(
        &mut self,
    ) -> Result<(Instant, Box<proto::JoinResponse>, Vec<Incoming>), SignalError> {
        let mut early = Vec::new();
        loop {
            match self.next_message().await? {
                (at, Incoming::Join(response)) => return Ok((at, Box::new(response), early)),
                (_, Incoming::Leave(leave)) => {
                    return Err(SignalError::LeftBeforeJoin {
                        reason: leave_reason(&leave),
                    });
                }
                (_, message) if early.len() < MAX_EARLY_MESSAGES => early.push(message),
                _ => {
                    return Err(SignalError::Protocol(format!(
                        "{MAX_EARLY_MESSAGES} messages before the join response"
                    )));
                }
            }
        }
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

    /// The next message, and when its frame was read.
    ///
    /// This also sends pings and checks their deadline, so it must be polled as long as the connection is in use. Cancel-safe.
    pub(crate) async fn recv(&mut self) -> Result<(Instant, Incoming), SignalError> {
        loop {
            tokio::select! {
                // Messages first: if this task was delayed, a message that has arrived refutes a deadline that passed meanwhile.
                biased;
                message = next_message(&mut self.socket, &mut self.unflushed, &mut self.rate) => {
                    let (at, message) = message?;
                    self.received_at = at;
                    if let Some(message) = self.filter(at, message) {
                        return Ok((at, message));
                    }
                }
                () = &mut self.give_up => {
                    // Rearmed only here and not per message: this select runs with every packet of media and must stay cheap.
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

    /// When the last message from the server arrived, including pongs.
    pub(crate) fn received_at(&self) -> Instant {
        self.received_at
    }

    /// See [`Pings::clock`].
    pub(crate) fn clock(&self) -> Option<ServerClock> {
        self.pings.clock()
    }

    /// Queues a message and writes as much as the socket accepts; [`recv`](Self::recv) writes the rest.
    ///
    /// It never waits, so it needs no deadline. If the server does not read, the ping deadline or the backlog limit ends
    /// the connection. A broken connection is not an error here: [`recv`](Self::recv) reports it, after the messages that
    /// the server sent before.
    ///
    /// # Errors
    /// [`SignalError::Closed`] if 1 MiB already waits to be written.
    pub(crate) fn send(&mut self, message: Outgoing) -> Result<(), SignalError> {
        let request = proto::SignalRequest {
            message: Some(message),
        };
        self.queue(Message::Binary(request.encode_to_vec().into()))
    }

    /// Sends `Leave` and closes the socket, within `timeout`.
    pub(crate) async fn leave(mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let leave = proto::LeaveRequest {
            reason: proto::DisconnectReason::ClientInitiated.into(),
            action: proto::leave_request::Action::Disconnect.into(),
            ..proto::LeaveRequest::default()
        };
        let closing = async {
            self.send(Outgoing::Leave(leave)).ok()?;
            self.socket.close(None).await.ok()?;
            // Wait for the server's own close: before that, it may not have read the `Leave`.
            while let Some(Ok(_)) = self.socket.next().await {}
            Some(())
        };
        // Best effort: the connection may already be gone, or the server may not close it in time.
        timeout_at(deadline, closing).await.ok();
    }

    async fn next_message(&mut self) -> Result<(Instant, Incoming), SignalError> {
        next_message(&mut self.socket, &mut self.unflushed, &mut self.rate).await
    }

    /// Handles the messages that concern only this connection, and returns the others.
    fn filter(&mut self, at: Instant, message: Incoming) -> Option<Incoming> {
        match message {
            Incoming::PongResp(pong) => {
                self.pings.on_pong(at, &pong);
                None
            }
            // The new token is for reconnecting, which a canary does not do. It is dropped so that no log can show it.
            Incoming::Pong(_) | Incoming::RefreshToken(_) => None,
            other => Some(other),
        }
    }

    /// Sends both forms of a ping, as the upstream SDKs do: servers before protocol 8 answer only the first.
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
        tolerate_broken_pipe(self.socket.start_send_unpin(message))?;
        if let Some(flushed) = self.socket.flush().now_or_never() {
            self.unflushed = false;
            tolerate_broken_pipe(flushed)?;
        }
        Ok(())
    }
}

/// Reads up to the next protobuf message. It takes the parts instead of `&mut Signal`, so that [`Signal::recv`] can wait for
/// its timers at the same time.
///
/// Cancel-safe: it awaits only a poll function that has no state of its own.
async fn next_message(
    socket: &mut WebSocketStream<Stream>,
    unflushed: &mut bool,
    rate: &mut MessageRate,
) -> Result<(Instant, Incoming), SignalError> {
    loop {
        let frame = poll_fn(|cx| {
            if *unflushed && let Poll::Ready(flushed) = socket.poll_flush_unpin(cx) {
                *unflushed = false;
                tolerate_broken_pipe(flushed)?;
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

/// The time of a frame and, if it is a binary one, its content; or why there are no more frames.
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
            let text = "a text frame; LiveKit sends only binary ones".to_owned();
            Err(SignalError::Protocol(text))
        }
        // tungstenite answers WebSocket pings by itself on the next poll.
        Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => Ok((at, None)),
    }
}

/// Opens a WebSocket at `target`, a path with its query. `timeout` covers everything from DNS to the answer to the upgrade.
///
/// `on_request` is called with the time just before the upgrade is written, after TLS.
pub(crate) async fn open_websocket(
    endpoint: &Endpoint,
    target: &str,
    token: &SecretString,
    timeout: Duration,
    on_request: impl FnOnce(Instant),
) -> Result<OpenSocket, SignalError> {
    let deadline = Instant::now() + timeout;
    let stream = endpoint.connect(deadline).await?;
    let local = stream.local;
    let key = generate_key();
    let request = upgrade_request(endpoint, target, token, &key);
    on_request(Instant::now());
    let response = exchange(stream, request, deadline)
        .await
        .map_err(|error| match error {
            ExchangeError::Timeout => SignalError::JoinTimeout(timeout),
            ExchangeError::Broken(text) => SignalError::Closed(text),
            ExchangeError::Malformed(text) => SignalError::Protocol(text),
        })?;
    let socket = upgraded(response, &key).await?;
    Ok(OpenSocket { socket, local })
}

async fn upgraded(
    response: HttpResponse,
    key: &str,
) -> Result<WebSocketStream<Stream>, SignalError> {
    if response.status != StatusCode::SWITCHING_PROTOCOLS {
        return Err(SignalError::Refused(response.rejection()));
    }
    if !accepts(&response.headers, key) {
        let text = "the answer to the upgrade is not a valid WebSocket handshake".to_owned();
        return Err(SignalError::Protocol(text));
    }
    let (stream, read_ahead) = response
        .upgraded
        .expect("`exchange` returns the connection with status 101");
    // A small read buffer: tungstenite fills it with zeros on every poll, and this is polled with every packet of media.
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

/// The ping interval and the ping timeout that the server asks for, within limits. The server sends zero if it asks for
/// none.
pub(crate) fn keep_alive(response: &proto::JoinResponse) -> (Duration, Duration) {
    let seconds = |given: i32, default: u64| {
        let given = u64::try_from(given).ok().filter(|given| *given > 0);
        Duration::from_secs(given.unwrap_or(default).min(60))
    };
    let every = seconds(response.ping_interval, 5);
    // With a timeout below two intervals, one late pong would end the connection.
    (every, seconds(response.ping_timeout, 15).max(2 * every))
}

/// `None` for a kind of message that is newer than our protobufs.
pub(crate) fn decode(bytes: &Bytes) -> Result<Option<Incoming>, SignalError> {
    proto::SignalResponse::decode(bytes.clone())
        .map(|response| response.message)
        .map_err(|error| {
            SignalError::Protocol(format!("a message that cannot be decoded: {error}"))
        })
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

/// The result of a write. A broken connection counts as success: the server's `Leave` or close frame may still be
/// unread. Reading on returns these first and then reports the broken connection.
fn tolerate_broken_pipe(result: Result<(), SocketError>) -> Result<(), SignalError> {
    match result {
        Ok(()) | Err(SocketError::Io(_)) => Ok(()),
        Err(error) => Err(socket_error(&error)),
    }
}

pub(crate) fn socket_error(error: &SocketError) -> SignalError {
    match error {
        SocketError::Io(error) => SignalError::Closed(error.to_string()),
        SocketError::ConnectionClosed | SocketError::AlreadyClosed => {
            SignalError::Closed("it was already closed".to_owned())
        }
        SocketError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            SignalError::Closed("the server dropped it without a close frame".to_owned())
        }
        SocketError::WriteBufferFull(_) => SignalError::Closed(format!(
            "the server does not read: {MAX_BACKLOG_BYTES} bytes wait to be sent"
        )),
        other => SignalError::Protocol(other.to_string()),
    }
}

/// The name of the reason in the protobufs: `ROOM_DELETED`, `JOIN_FAILURE`, …
pub(crate) fn leave_reason(leave: &proto::LeaveRequest) -> String {
    proto::DisconnectReason::try_from(leave.reason).map_or_else(
        |_| format!("reason {}", leave.reason),
        |reason| reason.as_str_name().to_owned(),
    )
}

/// Builds the upgrade request. The token goes into a header, which livekit-server reads before the query, so that no URL
/// contains it.
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

/// Whether the answer passes the checks that RFC 6455, 4.1 requires of a client.
fn accepts(headers: &HeaderMap, key: &str) -> bool {
    // `Connection` is a list, and a proxy may have extended it.
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

/// The timer for pings. The first ping is sent at once, so that its pong gives the server's clock before an agent can join.
fn ping_interval(span: Duration) -> Interval {
    let mut pings = interval(span);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pings
}

/// Counts frames per second, to detect a flood.
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
                "{} messages within {}; a room sends at most some tens per second",
                self.frames,
                format_rounded(window)
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
