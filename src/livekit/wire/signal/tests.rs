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
    REJECTIONS, SECRET, TestCa, TestServer, endpoint, keys, read_request,
};
use crate::livekit::wire::token::TokenParticipant;

const TIMEOUT: Duration = Duration::from_secs(20);

type ServerSocket = WebSocketStream<TcpStream>;

fn token() -> SecretString {
    let room = RoomName("canary-1".to_owned());
    let participant = TokenParticipant {
        identity: "echo".to_owned(),
        ..TokenParticipant::default()
    };
    keys().participant(&room, &participant, None).unwrap()
}

async fn connect_within(
    endpoint: &Endpoint,
    timeout: Duration,
) -> (Result<Joined, SignalError>, Option<Instant>) {
    let (requested, at) = oneshot::channel();
    let result = Signal::connect(endpoint, &token(), timeout, requested).await;
    (result, at.await.ok())
}

async fn error_of(server: &TestServer) -> SignalError {
    let (result, requested) = connect_within(&server.endpoint(), TIMEOUT).await;
    assert!(requested.is_some());
    result.err().unwrap()
}

async fn join(server: &TestServer) -> Joined {
    connect_within(&server.endpoint(), TIMEOUT).await.0.unwrap()
}

/// A server that accepts the upgrade; `talk` does the rest.
async fn upgrading<F, Fut>(talk: F) -> TestServer
where
    F: Fn(ServerSocket) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send,
{
    TestServer::start(move |stream| {
        let talk = talk.clone();
        async move { talk(accept_async(stream).await.unwrap()).await }
    })
    .await
}

/// A server that answers the join; `talk` does the rest.
async fn joining<F, Fut>(talk: F) -> TestServer
where
    F: Fn(ServerSocket) -> Fut + Clone + Send + Sync + 'static,
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
            send(&mut socket, Incoming::Join(join)).await;
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

async fn send(socket: &mut ServerSocket, message: Incoming) {
    socket
        .send(Message::binary(encoded(message)))
        .await
        .unwrap();
}

async fn recv(socket: &mut ServerSocket) -> Option<Outgoing> {
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
async fn every_refused_upgrade_preserves_status_text_and_retry_after() {
    for case in REJECTIONS {
        match error_of(&TestServer::answering(case.answer).await).await {
            SignalError::Refused(rejection) => assert_eq!(rejection, case.rejection()),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn http_200_instead_of_an_upgrade_is_a_rejection_with_its_text() {
    let server = TestServer::answering("HTTP/1.1 200 OK\r\n\r\n<html>Please sign in").await;
    match error_of(&server).await {
        SignalError::Refused(rejection) => {
            assert_eq!(rejection.status, 200);
            assert_eq!(rejection.message, "<html>Please sign in");
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn token_that_the_server_quotes_does_not_appear_in_the_error() {
    let error = error_of(&TestServer::quoting_the_token().await).await;
    let shown = format!("{error} {error:?}");
    assert!(shown.contains("invalid token"), "{shown}");
    assert!(!shown.contains("eyJ") && !shown.contains(SECRET), "{shown}");
}

#[tokio::test]
async fn token_is_in_a_header_and_not_in_the_url() {
    let (heads, mut received) = mpsc::channel(1);
    let server = TestServer::start(move |mut stream| {
        let heads = heads.clone();
        async move { heads.send(read_request(&mut stream).await).await.unwrap() }
    })
    .await;
    error_of(&server).await;
    let head = received.recv().await.unwrap();
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
async fn answer_with_a_wrong_accept_key_is_a_protocol_error() {
    let server = TestServer::answering(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: bm90IHRoZSBrZXk=\r\n\r\n",
    )
    .await;
    let error = error_of(&server).await;
    assert!(matches!(error, SignalError::Protocol(_)), "{error}");
}

#[tokio::test]
async fn upgrade_or_join_without_an_answer_is_a_join_timeout() {
    let accepts_and_waits = upgrading(|socket| async move {
        let _held = socket;
        std::future::pending::<()>().await;
    })
    .await;
    for server in [TestServer::silent().await, accepts_and_waits] {
        let (result, requested) =
            connect_within(&server.endpoint(), Duration::from_millis(500)).await;
        assert!(requested.is_some());
        let error = result.err().unwrap();
        assert!(matches!(error, SignalError::JoinTimeout(_)), "{error}");
    }
}

#[tokio::test]
async fn handshake_without_an_answer_is_unreachable_and_sends_no_request() {
    let server = TestServer::silent().await;
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
async fn leave_before_the_join_response_is_reported_with_its_reason() {
    let server = upgrading(|mut socket| async move {
        let leave = proto::LeaveRequest {
            reason: proto::DisconnectReason::JoinFailure.into(),
            ..proto::LeaveRequest::default()
        };
        send(&mut socket, Incoming::Leave(leave)).await;
    })
    .await;
    let error = error_of(&server).await;
    assert!(
        matches!(&error, SignalError::LeftBeforeJoin { reason } if reason == "JOIN_FAILURE"),
        "{error}"
    );
}

#[tokio::test]
async fn close_is_reported_with_its_code_and_reason() {
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
async fn join_over_tls_knows_the_local_address_of_the_connection() {
    let authority = TestCa::new();
    let acceptor = authority.acceptor("localhost", 2999);
    let (peers, mut received) = mpsc::channel(1);
    let server = TestServer::start(move |stream| {
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
    let (result, requested) = connect_within(&endpoint, TIMEOUT).await;
    let joined = result.unwrap();
    assert_eq!(joined.local, received.recv().await.unwrap());
    assert!(requested.unwrap() <= joined.at);
}

#[tokio::test]
async fn message_in_the_same_segment_as_the_upgrade_is_not_lost() {
    let server = TestServer::start(|mut stream| async move {
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

async fn protocol_error(server: &TestServer) -> String {
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
async fn error_for_a_message_above_the_limit_gives_both_figures() {
    let server = joining(|socket| async move {
        // Only the head of a frame of 16 MiB is sent; that is enough.
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
async fn error_for_a_flood_gives_its_figures() {
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
fn messages_of_one_second_do_not_count_in_the_next() {
    let start = Instant::now();
    let mut rate = MessageRate::new(start);
    for second in 0..5 {
        for _ in 0..MAX_MESSAGES_PER_SECOND {
            rate.count(start + Duration::from_secs(second)).unwrap();
        }
    }
}

#[tokio::test]
async fn text_frames_and_garbage_are_protocol_errors() {
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
            .starts_with("a message that cannot be decoded")
    );
}

#[tokio::test]
async fn server_that_vanishes_closes_the_connection() {
    let server = joining(|socket| async move { drop(socket) }).await;
    let mut joined = join(&server).await;
    let error = joined.signal.recv().await.unwrap_err();
    assert!(matches!(error, SignalError::Closed(_)), "{error}");
}

#[tokio::test]
async fn last_messages_are_read_after_a_write_to_a_broken_connection() {
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
                send(&mut socket, Incoming::Leave(leave)).await;
                let frame = CloseFrame {
                    code: 1011.into(),
                    reason: "no more".into(),
                };
                socket.close(Some(frame)).await.unwrap();
                // With a linger time of zero, closing resets the connection at once, not only after our next write.
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
async fn server_that_answers_no_pings_is_given_up() {
    let server =
        joining(|mut socket| async move { while recv(&mut socket).await.is_some() {} }).await;
    let mut joined = join(&server).await;
    tokio::time::pause();
    let error = joined.signal.recv().await.unwrap_err();
    assert!(
        matches!(error, SignalError::PingTimeout(after) if after == Duration::from_secs(15)),
        "{error}"
    );
}

#[tokio::test]
async fn quiet_connection_stays_open_as_long_as_pings_are_answered() {
    let server = joining(|mut socket| async move {
        // Ten pings take 50 s, three times the deadline.
        for _ in 0..10 {
            let timestamp = loop {
                match recv(&mut socket).await.unwrap() {
                    Outgoing::PingReq(ping) => break ping.timestamp,
                    other => assert!(matches!(other, Outgoing::Ping(_)), "{other:?}"),
                }
            };
            let pong = proto::Pong {
                last_ping_timestamp: timestamp,
                timestamp,
            };
            send(&mut socket, Incoming::PongResp(pong)).await;
        }
        send(&mut socket, update("TR_alive")).await;
        std::future::pending::<()>().await;
    })
    .await;
    let mut joined = join(&server).await;
    tokio::time::pause();
    let (_, message) = joined.signal.recv().await.unwrap();
    assert_eq!(sid(&message), "TR_alive");
}

#[tokio::test]
async fn pong_with_the_shortest_round_trip_sets_the_servers_clock() {
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
        // A second pong for the same ping changes nothing.
        signal.pings.on_pong(start, &pong);
        signal.clock()
    };
    assert!(pong(0, 1, 0).is_none(), "a server that sends no timestamp");
    pong(0, 80, 1_000_050);
    pong(5_000, 20, 1_005_010);
    let clock = pong(10_000, 60, 1_010_059).unwrap();
    for (stamp, ours) in [(1_000_600, 600), (1_007_000, 7_000)] {
        let expected = start + Duration::from_millis(ours);
        assert_eq!(clock.to_local(stamp), Some(expected), "{stamp}");
    }
    assert_eq!(clock.to_local(0), None);
}

#[tokio::test]
async fn no_message_is_lost_when_recv_is_cancelled_repeatedly() {
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
async fn refreshed_token_is_not_returned_to_the_caller() {
    let server = joining(|mut socket| async move {
        send(&mut socket, Incoming::RefreshToken("eyJ".to_owned())).await;
        send(&mut socket, update("TR_next")).await;
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
async fn sending_to_a_server_that_does_not_read_fails_instead_of_waiting() {
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
        "the signal connection closed: the server does not read: 1048576 bytes wait to be sent"
    );
}

#[tokio::test]
async fn message_that_the_socket_did_not_accept_is_written_while_receiving() {
    let server = joining(|mut socket| async move {
        while let Some(Outgoing::Offer(_)) = recv(&mut socket).await {}
        send(&mut socket, update("TR_all_received")).await;
        std::future::pending::<()>().await;
    })
    .await;
    let mut signal = join(&server).await.signal;
    // The server's task runs, and reads, only when this one yields.
    while !signal.unflushed {
        signal.send(offer()).unwrap();
    }
    signal.send(Outgoing::Ping(0)).unwrap();
    let (_, message) = signal.recv().await.unwrap();
    assert_eq!(sid(&message), "TR_all_received");
}

#[tokio::test]
async fn leaving_sends_the_reason_and_waits_for_the_servers_close() {
    let (requests, mut received) = mpsc::channel(1);
    let server = joining(move |mut socket| {
        let requests = requests.clone();
        async move {
            requests
                .send(recv(&mut socket).await.unwrap())
                .await
                .unwrap();
            assert!(recv(&mut socket).await.is_none());
        }
    })
    .await;
    join(&server).await.signal.leave(TIMEOUT).await;
    match received.recv().await.unwrap() {
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

#[tokio::test]
async fn message_before_the_join_response_is_kept() {
    let server = upgrading(|mut socket| async move {
        for sid in ["TR_1", "TR_2"] {
            send(&mut socket, update(sid)).await;
        }
        let join = proto::JoinResponse::default();
        send(&mut socket, Incoming::Join(join)).await;
        recv(&mut socket).await;
    })
    .await;
    let joined = join(&server).await;
    let early: Vec<_> = joined.early.iter().map(sid).collect();
    assert_eq!(early, ["TR_1", "TR_2"]);
}

#[tokio::test]
async fn endless_messages_before_the_join_response_break_the_protocol() {
    let server = upgrading(|mut socket| async move {
        for _ in 0..=MAX_EARLY_MESSAGES {
            send(&mut socket, update("TR_1")).await;
        }
        recv(&mut socket).await;
    })
    .await;
    let error = error_of(&server).await;
    assert!(matches!(error, SignalError::Protocol(_)), "{error}");
}
