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

use super::connect::{ConnectError, Endpoint, Refusal, Stream, rounded};
use super::request::{Answer, ExchangeError, bearer, exchange, presentable};

/// The signal protocol that this client speaks. 18 would mean negotiated data channels, which it doesn't do.
const PROTOCOL_VERSION: u32 = 16;
/// The upstream Rust SDK whose behaviour this client follows; servers keep work-arounds by SDK and version.
const SDK_VERSION: &str = "0.10.0";
/// Largest message accepted. A join response with a few participants takes some KiB.
const MESSAGE_LIMIT: usize = 1 << 20;
/// Most bytes that may wait for a server that doesn't read.
const BACKLOG_LIMIT: usize = 1 << 20;
/// Most messages in one second; a room of three sends some tens while it is being joined.
const RATE_LIMIT: u32 = 1000;

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
    heard_at: Instant,
    pings: Pings,
    rate: Rate,
}

/// A WebSocket to the server, before its first message.
pub(crate) struct Opened {
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
                ours: sent + self.rtt / 2,
                theirs: pong.timestamp,
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
    ours: Instant,
    /// Unix milliseconds.
    theirs: i64,
    /// From ping to pong; the two moments lie at most half of it apart.
    rtt: Duration,
}

impl ServerClock {
    /// Our moment of a stamp of the server's, in Unix milliseconds; `None` for 0, which is no stamp.
    ///
    /// Cloud's nodes keep their clocks together better than a join is exact.
    pub fn ours(self, stamp: i64) -> Option<Instant> {
        let apart = Duration::from_millis(stamp.abs_diff(self.theirs));
        match stamp {
            0 => None,
            _ if stamp < self.theirs => self.ours.checked_sub(apart),
            _ => self.ours.checked_add(apart),
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
    Refused(Refusal),
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
        let asked = |at| {
            // A caller that no longer listens doesn't want to know.
            requested.send(at).ok();
        };
        let opened = open(endpoint, &target, token, timeout, asked).await?;
        let (local, peer) = (opened.local, opened.peer);
        let mut signal = Self::over(opened.socket);
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
        signal.heard_at = at;
        signal.keep_alive_as(&response);
        Ok(Joined {
            signal,
            response,
            at,
            local,
            peer,
        })
    }

    fn over(socket: WebSocketStream<Stream>) -> Self {
        let now = Instant::now();
        Self {
            socket,
            unflushed: false,
            ping: every(Duration::from_secs(5)),
            ping_timeout: Duration::from_secs(15),
            give_up: Box::pin(sleep_until(now)),
            heard_at: now,
            pings: Pings::default(),
            rate: Rate::new(now),
        }
    }

    fn keep_alive_as(&mut self, response: &proto::JoinResponse) {
        let (ping, timeout) = keep_alive(response);
        self.ping = every(ping);
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
                    self.heard_at = at;
                    if let Some(message) = self.sift(at, message) {
                        return Ok((at, message));
                    }
                }
                () = &mut self.give_up => {
                    // Armed anew only here: this is asked for with every packet of media, and must cost nothing then.
                    let give_up = self.heard_at + self.ping_timeout;
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
    pub fn heard_at(&self) -> Instant {
        self.heard_at
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
    fn sift(&mut self, at: Instant, message: Incoming) -> Option<Incoming> {
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
    rate: &mut Rate,
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
        let (at, content) = take(frame, rate)?;
        if let Some(bytes) = content
            && let Some(message) = decode(&bytes)?
        {
            return Ok((at, message));
        }
    }
}

/// When a frame came, and its content where it is one for a client; or why there are no more.
pub(crate) fn take(
    frame: Option<Message>,
    rate: &mut Rate,
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
/// `asked` is told the time just before the upgrade is written, after TLS.
pub(crate) async fn open(
    endpoint: &Endpoint,
    target: &str,
    token: &SecretString,
    timeout: Duration,
    asked: impl FnOnce(Instant),
) -> Result<Opened, SignalError> {
    let deadline = Instant::now() + timeout;
    let stream = endpoint.connect(deadline).await?;
    let (local, peer) = (stream.local, stream.peer);
    let key = generate_key();
    let request = upgrade_request(endpoint, target, token, &key);
    asked(Instant::now());
    let answer = exchange(stream, request, deadline)
        .await
        .map_err(|error| match error {
            ExchangeError::Timeout => SignalError::JoinTimeout(timeout),
            ExchangeError::Broken(text) => SignalError::Closed(text),
            ExchangeError::Malformed(text) => SignalError::Protocol(text),
        })?;
    let socket = upgraded(answer, &key).await?;
    Ok(Opened {
        socket,
        local,
        peer,
    })
}

async fn upgraded(answer: Answer, key: &str) -> Result<WebSocketStream<Stream>, SignalError> {
    if answer.status != StatusCode::SWITCHING_PROTOCOLS {
        return Err(SignalError::Refused(answer.refusal()));
    }
    if !accepts(&answer.headers, key) {
        let text = "the answer to the upgrade is not a WebSocket's".to_owned();
        return Err(SignalError::Protocol(text));
    }
    let (stream, read_ahead) = answer
        .upgraded
        .expect("an answer of status 101 carries its connection");
    // So much is filled with zeros whenever the socket is asked, which is with every packet of media.
    let config = WebSocketConfig::default()
        .read_buffer_size(1 << 10)
        .write_buffer_size(0)
        .max_write_buffer_size(BACKLOG_LIMIT)
        .max_message_size(Some(MESSAGE_LIMIT))
        .max_frame_size(Some(MESSAGE_LIMIT));
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
            presentable(&frame.reason)
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
            "the server reads nothing: {BACKLOG_LIMIT} bytes wait for it"
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
fn every(span: Duration) -> Interval {
    let mut pings = interval(span);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pings
}

/// Counts the frames of each second.
pub(crate) struct Rate {
    since: Instant,
    frames: u32,
}

impl Rate {
    pub(crate) fn new(since: Instant) -> Self {
        Self { since, frames: 0 }
    }

    fn count(&mut self, at: Instant) -> Result<(), SignalError> {
        let window = at.saturating_duration_since(self.since);
        if window >= Duration::from_secs(1) {
            *self = Self::new(at);
        }
        self.frames += 1;
        if self.frames > RATE_LIMIT {
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
mod tests {
    use std::collections::BTreeMap;
    use std::future::Future;
    use std::sync::Arc;

    use socket2::SockRef;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::sync::{Barrier, mpsc};
    use tokio_tungstenite::accept_async;
    use tokio_tungstenite::tungstenite::protocol::CloseFrame;

    use super::*;
    use crate::livekit::RoomName;
    use crate::livekit::test_server::{
        Authority, REFUSALS, SECRET, Server, endpoint, keys, read_request,
    };

    const LONG: Duration = Duration::from_secs(20);

    type Socket = WebSocketStream<TcpStream>;

    fn token() -> SecretString {
        let room = RoomName("canary-1".to_owned());
        keys()
            .participant(&room, "echo", &BTreeMap::new(), None)
            .unwrap()
    }

    async fn connect_within(
        endpoint: &Endpoint,
        timeout: Duration,
    ) -> (Result<Joined, SignalError>, Option<Instant>) {
        let (requested, at) = oneshot::channel();
        let result = Signal::connect(endpoint, &token(), timeout, requested).await;
        (result, at.await.ok())
    }

    async fn error_of(server: &Server) -> SignalError {
        let (result, requested) = connect_within(&server.endpoint(), LONG).await;
        assert!(requested.is_some());
        result.err().unwrap()
    }

    async fn join(server: &Server) -> Joined {
        connect_within(&server.endpoint(), LONG).await.0.unwrap()
    }

    /// A server that accepts the upgrade and leaves the rest to `talk`.
    async fn upgrading<F, Fut>(talk: F) -> Server
    where
        F: Fn(Socket) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send,
    {
        Server::start(move |stream| {
            let talk = talk.clone();
            async move { talk(accept_async(stream).await.unwrap()).await }
        })
        .await
    }

    /// A server that answers the join, then leaves the rest to `talk`.
    async fn joining<F, Fut>(talk: F) -> Server
    where
        F: Fn(Socket) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send,
    {
        upgrading(move |mut socket| {
            let talk = talk.clone();
            async move {
                let join = proto::JoinResponse {
                    ping_interval: 5,
                    ping_timeout: 15,
                    ..proto::JoinResponse::default()
                };
                say(&mut socket, Incoming::Join(join)).await;
                talk(socket).await;
            }
        })
        .await
    }

    fn encoded(message: Incoming) -> Vec<u8> {
        let response = proto::SignalResponse {
            message: Some(message),
        };
        response.encode_to_vec()
    }

    async fn say(socket: &mut Socket, message: Incoming) {
        socket
            .send(Message::binary(encoded(message)))
            .await
            .unwrap();
    }

    async fn hear(socket: &mut Socket) -> Option<Outgoing> {
        loop {
            match socket.next().await? {
                Ok(Message::Binary(bytes)) => {
                    return proto::SignalRequest::decode(bytes).unwrap().message;
                }
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    fn update(sid: impl Into<String>) -> Incoming {
        Incoming::TrackUnpublished(proto::TrackUnpublishedResponse {
            track_sid: sid.into(),
        })
    }

    fn sid(message: &Incoming) -> &str {
        match message {
            Incoming::TrackUnpublished(update) => &update.track_sid,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn every_refused_upgrade_keeps_status_text_and_retry_after() {
        for case in REFUSALS {
            match error_of(&Server::answering(case.answer).await).await {
                SignalError::Refused(refusal) => assert_eq!(refusal, case.refusal()),
                other => panic!("{other}"),
            }
        }
    }

    #[tokio::test]
    async fn a_200_instead_of_an_upgrade_is_a_refusal_with_its_text() {
        let server = Server::answering("HTTP/1.1 200 OK\r\n\r\n<html>Please sign in").await;
        match error_of(&server).await {
            SignalError::Refused(refusal) => {
                assert_eq!(refusal.status, 200);
                assert_eq!(refusal.message, "<html>Please sign in");
            }
            other => panic!("{other}"),
        }
    }

    #[tokio::test]
    async fn a_server_that_quotes_the_token_does_not_get_it_into_the_error() {
        let error = error_of(&Server::quoting_the_token().await).await;
        let shown = format!("{error} {error:?}");
        assert!(shown.contains("invalid token"), "{shown}");
        assert!(!shown.contains("eyJ") && !shown.contains(SECRET), "{shown}");
    }

    #[tokio::test]
    async fn the_token_travels_in_a_header_and_never_in_the_url() {
        let (heads, mut seen) = mpsc::channel(1);
        let server = Server::start(move |mut stream| {
            let heads = heads.clone();
            async move { heads.send(read_request(&mut stream).await).await.unwrap() }
        })
        .await;
        error_of(&server).await;
        let head = seen.recv().await.unwrap();
        let (request, headers) = head.split_once("\r\n").unwrap();
        assert!(
            request.starts_with("GET /rtc?auto_subscribe=1&"),
            "{request}"
        );
        assert!(request.contains("protocol=16"), "{request}");
        assert!(!request.contains("eyJ"), "{request}");
        assert!(headers.contains("authorization: Bearer eyJ"), "{headers}");
    }

    #[tokio::test]
    async fn an_answer_with_a_wrong_accept_key_is_no_websocket() {
        let server = Server::answering(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: bm90IHRoZSBrZXk=\r\n\r\n",
        )
        .await;
        let error = error_of(&server).await;
        assert!(matches!(error, SignalError::Protocol(_)), "{error}");
    }

    #[tokio::test]
    async fn an_upgrade_or_a_join_without_an_answer_is_a_join_timeout() {
        let accepts_and_waits = upgrading(|socket| async move {
            let _held = socket;
            std::future::pending::<()>().await;
        })
        .await;
        for server in [Server::silent().await, accepts_and_waits] {
            let (result, requested) =
                connect_within(&server.endpoint(), Duration::from_millis(500)).await;
            assert!(requested.is_some());
            let error = result.err().unwrap();
            assert!(matches!(error, SignalError::JoinTimeout(_)), "{error}");
        }
    }

    #[tokio::test]
    async fn a_handshake_without_an_answer_is_unreachable_and_nothing_was_requested() {
        let server = Server::silent().await;
        let endpoint = endpoint(&format!("wss://{}", server.address));
        let (result, requested) = connect_within(&endpoint, Duration::from_millis(100)).await;
        assert_eq!(requested, None);
        let error = result.err().unwrap();
        assert!(
            matches!(error, SignalError::Unreachable(ConnectError::Tls { .. })),
            "{error}"
        );
    }

    #[tokio::test]
    async fn leave_before_the_join_response_tells_its_reason() {
        let server = upgrading(|mut socket| async move {
            let leave = proto::LeaveRequest {
                reason: proto::DisconnectReason::JoinFailure.into(),
                ..proto::LeaveRequest::default()
            };
            say(&mut socket, Incoming::Leave(leave)).await;
        })
        .await;
        let error = error_of(&server).await;
        assert!(
            matches!(&error, SignalError::LeftBeforeJoin { reason } if reason == "JOIN_FAILURE"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_close_tells_its_code_and_reason() {
        let server = upgrading(|mut socket| async move {
            let frame = CloseFrame {
                code: 1008.into(),
                reason: "not you".into(),
            };
            socket.close(Some(frame)).await.unwrap();
        })
        .await;
        assert_eq!(
            error_of(&server).await.to_string(),
            "the signal connection closed: code 1008: not you"
        );
    }

    #[tokio::test]
    async fn a_join_through_tls_knows_both_ends_of_the_connection() {
        let authority = Authority::new();
        let acceptor = authority.acceptor("localhost", 2999);
        let (peers, mut seen) = mpsc::channel(1);
        let server = Server::start(move |stream| {
            let (acceptor, peers) = (acceptor.clone(), peers.clone());
            async move {
                peers.send(stream.peer_addr().unwrap()).await.unwrap();
                let stream = acceptor.accept(stream).await.unwrap();
                let mut socket = accept_async(stream).await.unwrap();
                let join = encoded(Incoming::Join(proto::JoinResponse::default()));
                socket.send(Message::binary(join)).await.unwrap();
                while let Some(Ok(_)) = socket.next().await {}
            }
        })
        .await;
        let url = format!("wss://localhost:{}", server.address.port());
        let endpoint = Endpoint::new(&url.parse().unwrap(), Some(authority.pem.path())).unwrap();
        let (result, requested) = connect_within(&endpoint, LONG).await;
        let joined = result.unwrap();
        assert_eq!(joined.local, seen.recv().await.unwrap());
        assert_eq!(joined.peer, server.address);
        assert!(requested.unwrap() <= joined.at);
    }

    #[tokio::test]
    async fn what_comes_with_the_upgrade_in_one_segment_is_not_lost() {
        let server = Server::start(|mut stream| async move {
            let head = read_request(&mut stream).await;
            let key = head
                .lines()
                .find_map(|line| line.strip_prefix("sec-websocket-key: "))
                .unwrap();
            let mut answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                 Sec-WebSocket-Accept: {}\r\n\r\n",
                derive_accept_key(key.as_bytes())
            )
            .into_bytes();
            answer.extend(frame(&encoded(Incoming::Join(
                proto::JoinResponse::default(),
            ))));
            stream.write_all(&answer).await.unwrap();
            std::future::pending::<()>().await;
        })
        .await;
        join(&server).await;
    }

    /// A server's binary frame, unmasked (RFC 6455, 5.2).
    fn frame(payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        assert!(length < 126);
        [&[0x82, length], payload].concat()
    }

    async fn protocol_error(server: &Server) -> String {
        let mut joined = join(server).await;
        loop {
            match joined.signal.recv().await {
                Ok(_) => {}
                Err(SignalError::Protocol(text)) => return text,
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[tokio::test]
    async fn a_message_above_the_limit_is_refused_with_both_figures() {
        let server = joining(|socket| async move {
            // The head of a frame of 16 MiB is enough.
            let mut stream = socket.into_inner();
            let head = [&[0x82, 127][..], &(16_u64 << 20).to_be_bytes()].concat();
            stream.write_all(&head).await.unwrap();
            std::future::pending::<()>().await;
        })
        .await;
        let text = protocol_error(&server).await;
        assert!(
            text.contains("16777216") && text.contains("1048576"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_flood_is_refused_with_its_figures() {
        let server = joining(|socket| async move {
            let mut stream = socket.into_inner();
            let flood = frame(&encoded(update("TR"))).repeat(10_000);
            stream.write_all(&flood).await.ok();
            std::future::pending::<()>().await;
        })
        .await;
        let text = protocol_error(&server).await;
        assert!(text.starts_with("1001 messages within "), "{text}");
    }

    #[test]
    fn a_second_of_many_messages_does_not_count_against_the_next() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        for second in 0..5 {
            for _ in 0..RATE_LIMIT {
                rate.count(start + Duration::from_secs(second)).unwrap();
            }
        }
    }

    #[tokio::test]
    async fn text_and_garbage_are_protocol_errors() {
        let text = joining(|mut socket| async move {
            socket.send(Message::text("{}")).await.unwrap();
            std::future::pending::<()>().await;
        })
        .await;
        assert!(protocol_error(&text).await.starts_with("a text frame"));
        let garbage = joining(|mut socket| async move {
            socket.send(Message::binary(vec![0xff; 9])).await.unwrap();
            std::future::pending::<()>().await;
        })
        .await;
        assert!(
            protocol_error(&garbage)
                .await
                .starts_with("an undecodable message")
        );
    }

    #[tokio::test]
    async fn a_server_that_vanishes_closes_the_connection() {
        let server = joining(|socket| async move { drop(socket) }).await;
        let mut joined = join(&server).await;
        let error = joined.signal.recv().await.unwrap_err();
        assert!(matches!(error, SignalError::Closed(_)), "{error}");
    }

    #[tokio::test]
    async fn last_words_of_the_server_are_read_after_a_write_that_found_the_connection_gone() {
        for in_backlog in [false, true] {
            let turn = Arc::new(Barrier::new(2));
            let servers_turn = Arc::clone(&turn);
            let server = joining(move |mut socket| {
                let turn = Arc::clone(&servers_turn);
                async move {
                    turn.wait().await;
                    let leave = proto::LeaveRequest {
                        reason: proto::DisconnectReason::RoomDeleted.into(),
                        ..proto::LeaveRequest::default()
                    };
                    say(&mut socket, Incoming::Leave(leave)).await;
                    let frame = CloseFrame {
                        code: 1011.into(),
                        reason: "no more".into(),
                    };
                    socket.close(Some(frame)).await.unwrap();
                    // The reset comes right behind them, not only after our next write.
                    let linger = SockRef::from(socket.get_ref()).set_linger(Some(Duration::ZERO));
                    linger.unwrap();
                    drop(socket);
                    turn.wait().await;
                }
            })
            .await;
            let mut signal = join(&server).await.signal;
            while in_backlog && !signal.unflushed {
                signal.send(offer()).unwrap();
            }
            turn.wait().await;
            turn.wait().await;
            if !in_backlog {
                signal.send(Outgoing::Ping(0)).unwrap();
            }
            let (_, message) = signal.recv().await.unwrap();
            assert!(matches!(message, Incoming::Leave(_)), "{message:?}");
            assert_eq!(
                signal.recv().await.unwrap_err().to_string(),
                "the signal connection closed: code 1011: no more"
            );
        }
    }

    #[tokio::test]
    async fn a_server_that_answers_no_pings_is_given_up() {
        let server =
            joining(|mut socket| async move { while hear(&mut socket).await.is_some() {} }).await;
        let mut joined = join(&server).await;
        tokio::time::pause();
        let error = joined.signal.recv().await.unwrap_err();
        assert!(
            matches!(error, SignalError::PingTimeout(after) if after == Duration::from_secs(15)),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_quiet_connection_lives_as_long_as_pings_are_answered() {
        let server = joining(|mut socket| async move {
            // Ten pings take 50 s, thrice the deadline.
            for _ in 0..10 {
                let timestamp = loop {
                    match hear(&mut socket).await.unwrap() {
                        Outgoing::PingReq(ping) => break ping.timestamp,
                        other => assert!(matches!(other, Outgoing::Ping(_)), "{other:?}"),
                    }
                };
                let pong = proto::Pong {
                    last_ping_timestamp: timestamp,
                    timestamp,
                };
                say(&mut socket, Incoming::PongResp(pong)).await;
            }
            say(&mut socket, update("TR_alive")).await;
            std::future::pending::<()>().await;
        })
        .await;
        let mut joined = join(&server).await;
        tokio::time::pause();
        let (_, message) = joined.signal.recv().await.unwrap();
        assert_eq!(sid(&message), "TR_alive");
    }

    #[tokio::test]
    async fn quickest_pong_tells_the_servers_clock() {
        let server = joining(|socket| async move { drop(socket) }).await;
        let mut signal = join(&server).await.signal;
        assert!(signal.clock().is_none());
        let start = Instant::now();
        let mut pong = |sent: u64, took: u64, stamp| {
            let sent = start + Duration::from_millis(sent);
            signal.pings.on_ping(7, sent);
            let pong = proto::Pong {
                last_ping_timestamp: 7,
                timestamp: stamp,
            };
            signal
                .pings
                .on_pong(sent + Duration::from_millis(took), &pong);
            // A pong that answers nothing changes nothing.
            signal.pings.on_pong(start, &pong);
            signal.clock()
        };
        assert!(pong(0, 1, 0).is_none(), "a server that stamps nothing");
        pong(0, 80, 1_000_050);
        pong(5_000, 20, 1_005_010);
        let clock = pong(10_000, 60, 1_010_059).unwrap();
        for (stamp, ours) in [(1_000_600, 600), (1_007_000, 7_000)] {
            let expected = start + Duration::from_millis(ours);
            assert_eq!(clock.ours(stamp), Some(expected), "{stamp}");
        }
        assert_eq!(clock.ours(0), None);
    }

    #[tokio::test]
    async fn no_message_is_lost_when_recv_is_cancelled_over_and_over() {
        let server = joining(|socket| async move {
            let mut stream = socket.into_inner();
            for number in 0..300 {
                for piece in frame(&encoded(update(format!("TR_{number}")))).chunks(3) {
                    stream.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
            }
            std::future::pending::<()>().await;
        })
        .await;
        let mut signal = join(&server).await.signal;
        let mut cancelled = 0;
        for number in 0..300 {
            let message = loop {
                tokio::select! {
                    biased;
                    message = signal.recv() => break message.unwrap().1,
                    () = tokio::task::yield_now() => cancelled += 1,
                }
            };
            assert_eq!(sid(&message), format!("TR_{number}"));
        }
        assert!(cancelled > 0);
    }

    #[tokio::test]
    async fn a_refreshed_token_never_leaves_the_connection() {
        let server = joining(|mut socket| async move {
            say(&mut socket, Incoming::RefreshToken("eyJ".to_owned())).await;
            say(&mut socket, update("TR_next")).await;
            std::future::pending::<()>().await;
        })
        .await;
        let (_, message) = join(&server).await.signal.recv().await.unwrap();
        assert_eq!(sid(&message), "TR_next");
    }

    /// A message that fills buffers.
    fn offer() -> Outgoing {
        Outgoing::Offer(proto::SessionDescription {
            sdp: "x".repeat(256 << 10),
            ..proto::SessionDescription::default()
        })
    }

    #[tokio::test]
    async fn sending_to_a_server_that_reads_nothing_fails_instead_of_waiting() {
        let server = joining(|socket| async move {
            let _held = socket;
            std::future::pending::<()>().await;
        })
        .await;
        let mut signal = join(&server).await.signal;
        // Far more than the kernel's buffers hold.
        let error = (0..1000).find_map(|_| signal.send(offer()).err()).unwrap();
        assert_eq!(
            error.to_string(),
            "the signal connection closed: the server reads nothing: 1048576 bytes wait for it"
        );
    }

    #[tokio::test]
    async fn what_the_socket_did_not_take_at_once_is_written_while_receiving() {
        let server = joining(|mut socket| async move {
            while let Some(Outgoing::Offer(_)) = hear(&mut socket).await {}
            say(&mut socket, update("TR_all_heard")).await;
            std::future::pending::<()>().await;
        })
        .await;
        let mut signal = join(&server).await.signal;
        // The server reads nothing before we yield to it.
        while !signal.unflushed {
            signal.send(offer()).unwrap();
        }
        signal.send(Outgoing::Ping(0)).unwrap();
        let (_, message) = signal.recv().await.unwrap();
        assert_eq!(sid(&message), "TR_all_heard");
    }

    #[tokio::test]
    async fn leaving_tells_the_server_why_and_waits_for_its_close() {
        let (requests, mut seen) = mpsc::channel(1);
        let server = joining(move |mut socket| {
            let requests = requests.clone();
            async move {
                requests
                    .send(hear(&mut socket).await.unwrap())
                    .await
                    .unwrap();
                assert!(hear(&mut socket).await.is_none());
            }
        })
        .await;
        join(&server).await.signal.leave(LONG).await;
        match seen.recv().await.unwrap() {
            Outgoing::Leave(leave) => {
                assert_eq!(leave.reason(), proto::DisconnectReason::ClientInitiated);
            }
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn leaving_a_server_that_does_not_answer_ends_in_time() {
        let server = joining(|socket| async move {
            let mut stream = socket.into_inner();
            let mut sink = [0; 1024];
            while matches!(stream.read(&mut sink).await, Ok(1..)) {}
        })
        .await;
        let signal = join(&server).await.signal;
        tokio::time::pause();
        signal.leave(Duration::from_secs(2)).await;
    }
}
