//! The network of the SDK's signal client: it uses the canary's own connections. Private CAs, the status and
//! `Retry-After` of a refusal, and the limits on received data therefore work as in the native engine, and the token
//! stays in a header.
//!
//! Each message of the server is reported to the participant, with the time at which it was read, before the SDK gets
//! it.
//!
//! The SDK has one transport per process (`livekit_net::set_ws_client`, the first call wins), so a task-local value
//! holds the connector of the participant. A request from any other task is an attempt of the SDK to reconnect, to
//! query the reason of a failure or to fail over. It is refused, because each would hide a failure from the canary.

use std::sync::{Arc, Once};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use livekit_net::{
    Header, HttpClient, HttpMethod, HttpResponse, TransportError, WsClient, WsConnectResult,
    WsConnection,
};
use livekit_protocol as proto;
use prost::Message as _;
use proto::signal_request::Message as Request;
use proto::signal_response::Message as Response;
use secrecy::SecretString;
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;
use url::{Position, Url};

use crate::livekit::wire::connect::{Endpoint, Stream};
use crate::livekit::wire::signal::{self, MessageRate, SignalError};

/// Maximum number of events that wait for the participant. When it is reached, the socket is not read either.
const MAX_PENDING_EVENTS: usize = 64;

tokio::task_local! {
    static CONNECTOR: SdkConnector;
}

/// Connects the SDK to the server for one participant.
#[derive(Clone)]
pub(crate) struct SdkConnector {
    endpoint: Endpoint,
    token: SecretString,
    timeout: Duration,
    events: mpsc::Sender<WireEvent>,
    hang_up: CancellationToken,
}

/// What happened on the connections of a connector.
#[derive(Debug)]
pub(crate) enum WireEvent {
    /// TLS is established and the upgrade request is about to be written.
    Requested(Instant),
    /// The SDK sent a ping with this timestamp.
    Pinged(Instant, i64),
    /// The server sent a message.
    Message(Instant, Box<Response>),
    /// A connection could not be opened or has ended.
    Lost(SignalError),
}

impl SdkConnector {
    /// `timeout`: the time for one connection, from DNS to the answer to the upgrade request. Cancelling `hang_up`
    /// closes all connections.
    pub(crate) fn new(
        endpoint: Endpoint,
        token: SecretString,
        timeout: Duration,
        hang_up: CancellationToken,
    ) -> (Self, mpsc::Receiver<WireEvent>) {
        static REGISTER: Once = Once::new();
        REGISTER.call_once(|| {
            livekit_net::set_ws_client(Arc::new(SdkTransport));
            livekit_net::set_http_client(Arc::new(SdkTransport));
        });
        let (events, receiver) = mpsc::channel(MAX_PENDING_EVENTS);
        let connector = Self {
            endpoint,
            token,
            timeout,
            events,
            hang_up,
        };
        (connector, receiver)
    }

    /// Runs `work` with this connector as the network of the SDK. A task that `work` spawns does not inherit it.
    pub(crate) fn carry<F: Future>(self, work: F) -> impl Future<Output = F::Output> {
        CONNECTOR.scope(self, work)
    }

    async fn connect(self, url: &str) -> Result<SdkConnection, TransportError> {
        let url = Url::parse(url).map_err(|error| TransportError::Other(error.to_string()))?;
        let target = &url[Position::BeforePath..];
        let on_request = |at| self.try_emit(WireEvent::Requested(at));
        let opened = signal::open_websocket(
            &self.endpoint,
            target,
            &self.token,
            self.timeout,
            on_request,
        );
        match opened.await {
            Ok(opened) => {
                let (sink, source) = opened.socket.split();
                let rate = MessageRate::new(Instant::now());
                Ok(SdkConnection {
                    sink: Mutex::new(sink),
                    source: Mutex::new(ReceiveHalf { source, rate }),
                    connector: self,
                })
            }
            Err(error) => {
                let for_sdk = transport_error(&error);
                self.emit(WireEvent::Lost(error)).await;
                Err(for_sdk)
            }
        }
    }

    /// Sends an event. It is dropped if the participant has ended.
    async fn emit(&self, event: WireEvent) {
        self.events.send(event).await.ok();
    }

    /// Sends an event without waiting; drops it if the channel is full.
    fn try_emit(&self, event: WireEvent) {
        self.events.try_send(event).ok();
    }
}

/// Converts an error for the SDK. No text contains the token: [`signal`] ensures that.
fn transport_error(error: &SignalError) -> TransportError {
    match error {
        SignalError::Refused(refusal) => TransportError::Http {
            status: refusal.status,
        },
        SignalError::JoinTimeout(_) => TransportError::Timeout,
        other => TransportError::Connection(other.to_string()),
    }
}

/// The network implementation that is registered with the SDK.
struct SdkTransport;

#[async_trait]
impl WsClient for SdkTransport {
    async fn connect(
        &self,
        url: String,
        _headers: Vec<Header>,
        _timeout_ms: u64,
    ) -> Result<WsConnectResult, TransportError> {
        let connector = CONNECTOR
            .try_with(SdkConnector::clone)
            .map_err(|_| refused())?;
        let connection = Arc::new(connector.connect(&url).await?);
        Ok(WsConnectResult { connection })
    }
}

#[async_trait]
impl HttpClient for SdkTransport {
    /// Always refused. The SDK would query other regions, and the reason of a refusal, which the answer to the upgrade
    /// request has already given.
    async fn request(
        &self,
        _method: HttpMethod,
        _url: String,
        _headers: Vec<Header>,
        _body: Option<Vec<u8>>,
    ) -> Result<HttpResponse, TransportError> {
        Err(refused())
    }
}

fn refused() -> TransportError {
    TransportError::Connection("the canary connects only once".to_owned())
}

/// One WebSocket in the interface that the SDK expects.
struct SdkConnection {
    sink: Mutex<SplitSink<WebSocketStream<Stream>, Message>>,
    source: Mutex<ReceiveHalf>,
    connector: SdkConnector,
}

struct ReceiveHalf {
    source: SplitStream<WebSocketStream<Stream>>,
    rate: MessageRate,
}

#[async_trait]
impl WsConnection for SdkConnection {
    async fn send(&self, frame: Vec<u8>) -> Result<(), TransportError> {
        if let Some(timestamp) = ping(&frame) {
            self.connector
                .try_emit(WireEvent::Pinged(Instant::now(), timestamp));
        }
        let sending = async { self.sink.lock().await.send(Message::binary(frame)).await };
        tokio::select! {
            biased;
            () = self.connector.hang_up.cancelled() => Err(TransportError::Closed),
            sent = sending => sent.map_err(|error| transport_error(&signal::socket_error(&error))),
        }
    }

    async fn recv(&self) -> Result<Option<Vec<u8>>, TransportError> {
        let mut source = self.source.lock().await;
        let ReceiveHalf { source, rate } = &mut *source;
        loop {
            let frame = tokio::select! {
                biased;
                () = self.connector.hang_up.cancelled() => return Ok(None),
                frame = source.next() => frame,
            };
            let frame = frame.transpose();
            let frame = frame.map_err(|error| signal::socket_error(&error));
            let taken = frame.and_then(|frame| signal::read_frame(frame, rate));
            let read = taken.and_then(|(at, content)| {
                let message = content.as_ref().map(signal::decode).transpose()?;
                Ok((at, content, message.flatten()))
            });
            match read {
                Ok((_, None, _)) => {}
                Ok((at, Some(content), message)) => {
                    // A refreshed token is a secret and serves only to reconnect, which the canary does not do.
                    let message = message.filter(|it| !matches!(it, Response::RefreshToken(_)));
                    if let Some(message) = message {
                        self.connector
                            .emit(WireEvent::Message(at, Box::new(message)))
                            .await;
                    }
                    return Ok(Some(content.into()));
                }
                Err(error) => {
                    self.connector.emit(WireEvent::Lost(error)).await;
                    return Ok(None);
                }
            }
        }
    }

    async fn close(&self) {
        let closing = async { self.sink.lock().await.close().await };
        tokio::select! {
            biased;
            () = self.connector.hang_up.cancelled() => {}
            // An error means that the connection is already closed.
            _ = closing => {}
        }
    }
}

/// Returns the timestamp if the frame is a ping.
fn ping(frame: &[u8]) -> Option<i64> {
    match proto::SignalRequest::decode(frame).ok()?.message? {
        Request::PingReq(ping) => Some(ping.timestamp),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tokio_tungstenite::accept_async;

    use super::*;
    use crate::livekit::RoomName;
    use crate::livekit::test_server::{REJECTIONS, TestServer, keys};
    use crate::livekit::wire::token::TokenParticipant;

    fn connector(
        server: &TestServer,
    ) -> (SdkConnector, mpsc::Receiver<WireEvent>, CancellationToken) {
        let room = RoomName("canary-1".to_owned());
        let participant = TokenParticipant {
            identity: "echo".to_owned(),
            ..TokenParticipant::default()
        };
        let token = keys().participant(&room, &participant, None);
        let hang_up = CancellationToken::new();
        let (connector, events) = SdkConnector::new(
            server.endpoint(),
            token.unwrap(),
            Duration::from_secs(20),
            hang_up.clone(),
        );
        (connector, events, hang_up)
    }

    /// Connects as the SDK's signal client does.
    async fn connect(server: &TestServer) -> Result<Arc<dyn WsConnection>, TransportError> {
        let url = format!("ws://{}/rtc/v1?join_request=abc", server.address);
        let client = livekit_net::ws_client().expect("a connector was made before");
        let connected = client.connect(url, Vec::new(), 5_000).await;
        connected.map(|connected| connected.connection)
    }

    fn update(sid: &str) -> Vec<u8> {
        let message = Response::TrackUnpublished(proto::TrackUnpublishedResponse {
            track_sid: sid.to_owned(),
        });
        let message = Some(message);
        proto::SignalResponse { message }.encode_to_vec()
    }

    #[tokio::test]
    async fn refused_upgrade_is_reported_with_its_text_and_retry_after() {
        for case in REJECTIONS {
            let server = TestServer::answering(case.answer).await;
            let (connector, mut events, _) = connector(&server);
            let error = connector.carry(connect(&server)).await.err();
            assert!(
                matches!(error, Some(TransportError::Http { status }) if status == case.status),
                "{error:?}"
            );
            assert!(matches!(events.recv().await, Some(WireEvent::Requested(_))));
            match events.recv().await {
                Some(WireEvent::Lost(SignalError::Refused(refusal))) => {
                    assert_eq!(refusal, case.rejection());
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn request_from_another_task_is_refused_without_a_connection() {
        let server = TestServer::start(|_| async { panic!("the SDK connected") }).await;
        let (connector, mut events, _) = connector(&server);
        // A task that the SDK spawns does not belong to the participant.
        let address = server.address;
        let reconnect = tokio::spawn(async move {
            let client = livekit_net::ws_client().unwrap();
            let connected = client.connect(format!("ws://{address}/rtc"), Vec::new(), 5_000);
            connected.await.err()
        });
        let error = connector.carry(reconnect).await.unwrap();
        assert!(
            matches!(error, Some(TransportError::Connection(_))),
            "{error:?}"
        );
        assert!(events.recv().await.is_none());
        let http = livekit_net::http_client().unwrap();
        let url = format!("http://{address}/rtc/validate");
        let answer = http.request(HttpMethod::Get, url, Vec::new(), None).await;
        assert!(answer.is_err());
    }

    #[tokio::test]
    async fn messages_are_reported_and_reach_both_ends_unchanged() {
        let server = TestServer::start(|stream| async move {
            let mut socket = accept_async(stream).await.unwrap();
            socket.send(Message::binary(update("TR_1"))).await.unwrap();
            // Answer each binary message with another one.
            while let Some(Ok(message)) = socket.next().await {
                if message.is_binary() {
                    socket.send(Message::binary(update("TR_2"))).await.unwrap();
                }
            }
        })
        .await;
        let (connector, mut events, hang_up) = connector(&server);
        let connection = connector.carry(connect(&server)).await.unwrap();
        assert!(matches!(events.recv().await, Some(WireEvent::Requested(_))));
        assert_eq!(connection.recv().await.unwrap(), Some(update("TR_1")));
        let sid = |event: Option<WireEvent>| match event {
            Some(WireEvent::Message(_, message)) => match *message {
                Response::TrackUnpublished(gone) => gone.track_sid,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        };
        assert_eq!(sid(events.recv().await), "TR_1");
        let ping = Request::PingReq(proto::Ping {
            timestamp: 7,
            rtt: 0,
        });
        let message = Some(ping);
        let ping = proto::SignalRequest { message }.encode_to_vec();
        connection.send(ping).await.unwrap();
        assert_eq!(connection.recv().await.unwrap(), Some(update("TR_2")));
        assert!(matches!(events.recv().await, Some(WireEvent::Pinged(_, 7))));
        assert_eq!(sid(events.recv().await), "TR_2");
        hang_up.cancel();
        assert_eq!(connection.recv().await.unwrap(), None);
        assert!(connection.send(Vec::new()).await.is_err());
    }

    #[tokio::test]
    async fn close_by_the_server_is_reported_with_its_reason() {
        let server = TestServer::start(|stream| async move {
            let mut socket = accept_async(stream).await.unwrap();
            socket.close(None).await.unwrap();
        })
        .await;
        let (connector, mut events, _) = connector(&server);
        let connection = connector.carry(connect(&server)).await.unwrap();
        assert_eq!(connection.recv().await.unwrap(), None);
        assert!(matches!(events.recv().await, Some(WireEvent::Requested(_))));
        let lost = events.recv().await;
        assert!(
            matches!(lost, Some(WireEvent::Lost(SignalError::Closed(_)))),
            "{lost:?}"
        );
    }
}
