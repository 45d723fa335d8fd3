//! A relay against a TURN server of a few lines, which checks nothing and answers as a test wants.

use std::future::{pending, poll_fn};

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::*;
use crate::livekit::arbitrary::{bytes, check};

const TEST_TIMEOUT: Duration = Duration::from_secs(20);
const RELAYED: &str = "192.0.2.9:40000";
const PEER: &str = "192.0.2.7:7882";

const ALLOCATE: u16 = 0x003;
const CREATE_PERMISSION: u16 = 0x008;
const CHANNEL_BIND: u16 = 0x009;
const SEND: u16 = 0x016;
const DATA: u16 = 0x017;
const SUCCESS: u16 = 0x100;
const ERROR: u16 = 0x110;

const COOKIE: u32 = 0x2112_a442;

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The value of an attribute with an IPv4 address, in the XOR form with the cookie (RFC 8489, section 14.2).
fn xor_address(address: SocketAddr) -> Vec<u8> {
    let IpAddr::V4(ip) = address.ip() else {
        panic!("IPv4 only")
    };
    let port = address.port() ^ 0x2112;
    let mut value = vec![0, 1];
    value.extend(port.to_be_bytes());
    value.extend((ip.to_bits() ^ COOKIE).to_be_bytes());
    value
}

fn stun(kind: u16, id: &[u8], attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in attributes {
        body.extend(name.to_be_bytes());
        body.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut message = kind.to_be_bytes().to_vec();
    message.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
    message.extend(COOKIE.to_be_bytes());
    message.extend(id);
    message.extend(body);
    message
}

fn error(request: &[u8], code: u16) -> Vec<u8> {
    let class = u8::try_from(code / 100).unwrap();
    let number = u8::try_from(code % 100).unwrap();
    let attributes = [
        (0x0009, vec![0, 0, class, number]),
        (0x0014, b"realm".to_vec()),
        (0x0015, b"nonce".to_vec()),
    ];
    stun(method(request) | ERROR, id(request), &attributes)
}

fn allocated(request: &[u8]) -> Vec<u8> {
    let attributes = [
        (0x0016, xor_address(address(RELAYED))),
        (0x000d, 600_u32.to_be_bytes().to_vec()),
    ];
    stun(ALLOCATE | SUCCESS, id(request), &attributes)
}

fn method(message: &[u8]) -> u16 {
    u16::from_be_bytes([message[0], message[1]])
}

fn id(message: &[u8]) -> &[u8] {
    &message[8..20]
}

/// Whether a request has the integrity of the long-term credential.
fn is_signed(request: &[u8]) -> bool {
    request.windows(5).any(|it| it == b"realm")
}

/// What a well-behaved server answers to a frame.
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    Some(match method(frame) {
        ALLOCATE if is_signed(frame) => allocated(frame),
        ALLOCATE => error(frame, 401),
        kind @ (CREATE_PERMISSION | CHANNEL_BIND) => stun(kind | SUCCESS, id(frame), &[]),
        _ => return None,
    })
}

/// The other end of a stream.
struct Server {
    stream: TcpStream,
    frames: TurnFrames,
    buffer: BytesMut,
}

impl Server {
    async fn frame(&mut self) -> Vec<u8> {
        use tokio_util::codec::Decoder;
        loop {
            if let Some(frame) = self.frames.decode(&mut self.buffer).unwrap() {
                return frame.to_vec();
            }
            if self
                .stream
                .read_buf(&mut self.buffer)
                .await
                .unwrap_or_default()
                == 0
            {
                pending::<()>().await;
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Answers frames until one has another method than the known ones, or for ever.
    async fn serve(&mut self) -> Vec<u8> {
        loop {
            let frame = self.frame().await;
            match answer(&frame) {
                Some(answer) => self.send(&answer).await,
                None => return frame,
            }
        }
    }
}

fn turn_server(transport: TurnTransport, at: SocketAddr) -> TurnServer {
    TurnServer {
        transport,
        host: at
            .ip()
            .to_string()
            .parse()
            .map_or_else(|_| panic!("an address"), url::Host::Ipv4),
        port: at.port(),
        username: "key|PA_1|1".to_owned().into(),
        password: "password".to_owned().into(),
    }
}

fn endpoint() -> Endpoint {
    Endpoint::new(&"ws://127.0.0.1:1".parse().unwrap(), None).unwrap()
}

/// A relay over TCP and the server's end of its connection.
async fn over_tcp() -> (TurnRelay, Server) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = turn_server(TurnTransport::Tcp, listener.local_addr().unwrap());
    let mut relay = TurnRelay::connect(&endpoint(), server);
    // The connection is opened by the first poll.
    let early = poll_fn(|cx| Poll::Ready(relay.poll(cx, &mut [0; 8]))).await;
    assert!(early.is_pending(), "{early:?}");
    let (stream, _) = listener.accept().await.unwrap();
    let server = Server {
        stream,
        frames: TurnFrames::default(),
        buffer: BytesMut::new(),
    };
    (relay, server)
}

/// The next event, with the timers of the relay.
async fn next(relay: &mut TurnRelay, buffer: &mut [u8]) -> RelayEvent {
    loop {
        let due = relay.next_deadline();
        let due = due.unwrap_or_else(|| Instant::now() + TEST_TIMEOUT);
        let event = poll_fn(|cx| relay.poll(cx, buffer));
        match tokio::time::timeout_at(due, event).await {
            Ok(event) => return event,
            Err(_) => relay.on_time(Instant::now()),
        }
    }
}

async fn failure(relay: &mut TurnRelay) -> RelayError {
    loop {
        if let RelayEvent::Failed(error) = next(relay, &mut [0; 64]).await {
            return error;
        }
    }
}

/// A relay that may send to [`PEER`].
async fn usable() -> (TurnRelay, Server) {
    let (mut relay, mut server) = over_tcp().await;
    relay.permit(Instant::now(), address(PEER));
    let events = async {
        let mut buffer = [0; 64];
        let allocated = next(&mut relay, &mut buffer).await;
        assert_eq!(allocated, RelayEvent::Allocated(address(RELAYED)));
        assert_eq!(next(&mut relay, &mut buffer).await, RelayEvent::Usable);
    };
    tokio::select! {
        () = events => {}
        frame = server.serve() => panic!("{frame:?}"),
    }
    (relay, server)
}

#[tokio::test]
async fn datagrams_of_any_length_cross_a_stream_both_ways() {
    let (mut relay, mut server) = usable().await;
    let mut buffer = [0; 2_048];
    // The first ones travel in Send indications, until the channel is bound.
    for length in [1, 2, 3, 4, 5, 1_200] {
        let sent: Vec<u8> = (0..=u8::MAX).cycle().take(length).collect();
        relay.send(Instant::now(), address(PEER), &sent);
        let frame = tokio::select! {
            frame = server.serve() => frame,
            event = next(&mut relay, &mut buffer) => panic!("{event:?}"),
        };
        let carried = frame.windows(length).any(|it| it == sent);
        assert!(carried, "{length}: {frame:?}");
        let attributes = [(0x0012, xor_address(address(PEER))), (0x0013, sent.clone())];
        server.send(&stun(DATA, &[7; 12], &attributes)).await;
        let event = next(&mut relay, &mut buffer).await;
        let expected = address(PEER);
        assert!(
            matches!(event, RelayEvent::Datagram { from, length: got, .. } if from == expected && got == length),
            "{event:?}"
        );
        assert_eq!(buffer[..length], sent);
    }
}

#[tokio::test]
async fn channel_data_follows_the_bound_channel() {
    let (mut relay, mut server) = usable().await;
    let mut buffer = [0; 64];
    relay.send(Instant::now(), address(PEER), b"first");
    let bind = server.frame().await;
    assert_eq!(method(&bind), CHANNEL_BIND);
    assert_eq!(method(&server.frame().await), SEND);
    server.send(&answer(&bind).unwrap()).await;
    // The number of the channel is an attribute of the request.
    let at = bind
        .windows(4)
        .position(|it| it == [0, 0x0c, 0, 4])
        .unwrap()
        + 4;
    let channel = [bind[at], bind[at + 1]];
    let data = |text: &[u8]| {
        let length = u8::try_from(text.len()).unwrap();
        let mut frame = [&channel[..], &[0, length], text].concat();
        frame.resize(frame.len().next_multiple_of(4), 0);
        frame
    };
    server.send(&[data(b"hello"), data(b"you")].concat()).await;
    for expected in [&b"hello"[..], b"you"] {
        let event = next(&mut relay, &mut buffer).await;
        assert!(matches!(event, RelayEvent::Datagram { .. }), "{event:?}");
        assert_eq!(buffer[..expected.len()], *expected);
    }
    relay.send(Instant::now(), address(PEER), b"second");
    assert_eq!(
        server.frame().await,
        [&channel[..], b"\0\x06second"].concat()
    );
}

#[tokio::test]
async fn refused_allocation_names_the_cause() {
    for (code, cause) in [
        (400, "refused the credentials"),
        (401, "refused the credentials"),
        (486, "the quota of this user is reached"),
        (508, "no relay port left"),
        (599, "refused the allocation (error 599)"),
    ] {
        let (mut relay, mut server) = over_tcp().await;
        let serving = async {
            let first = server.frame().await;
            server.send(&error(&first, 401)).await;
            let second = server.frame().await;
            server.send(&error(&second, code)).await;
        };
        let (error, ()) = tokio::join!(failure(&mut relay), serving);
        assert_eq!(error, RelayError::Refused(Some(code)));
        assert!(error.to_string().contains(cause), "{error}");
    }
}

#[tokio::test]
async fn peer_that_is_refused_fails_the_relay_and_names_the_setting() {
    let (mut relay, mut server) = over_tcp().await;
    relay.permit(Instant::now(), address("10.0.0.5:7882"));
    let serving = async {
        loop {
            let frame = server.frame().await;
            let answer = match method(&frame) {
                CREATE_PERMISSION => error(&frame, 403),
                _ => answer(&frame).unwrap(),
            };
            server.send(&answer).await;
        }
    };
    let error = tokio::select! {
        error = failure(&mut relay) => error.to_string(),
        () = serving => unreachable!(),
    };
    assert!(
        error.contains("does not relay to LiveKit's media address 10.0.0.5"),
        "{error}"
    );
    assert!(
        error.contains("turn.allow_restricted_peer_cidrs"),
        "{error}"
    );
}

#[tokio::test]
async fn one_refused_peer_does_not_fail_a_relay_that_reaches_another() {
    let (mut relay, mut server) = usable().await;
    relay.permit(Instant::now(), address("10.0.0.5:7882"));
    let request = server.frame().await;
    server.send(&error(&request, 403)).await;
    server
        .send(&stun(
            DATA,
            &[7; 12],
            &[(0x0012, xor_address(address(PEER))), (0x0013, vec![9])],
        ))
        .await;
    let event = next(&mut relay, &mut [0; 64]).await;
    assert!(matches!(event, RelayEvent::Datagram { .. }), "{event:?}");
    assert!(relay.deadline.is_none());
}

#[tokio::test]
async fn permission_is_requested_again_with_a_new_nonce_but_not_for_ever() {
    let (mut relay, mut server) = over_tcp().await;
    relay.permit(Instant::now(), address(PEER));
    let mut requests = 0_u8;
    let serving = async {
        loop {
            let frame = server.frame().await;
            let answer = if method(&frame) == CREATE_PERMISSION {
                requests += 1;
                error(&frame, 438)
            } else {
                answer(&frame).unwrap()
            };
            server.send(&answer).await;
        }
    };
    let error = tokio::select! {
        error = failure(&mut relay) => error,
        () = serving => unreachable!(),
    };
    assert_eq!(error, RelayError::PeerRefused(address(PEER).ip(), 438));
    assert_eq!(requests, MAX_ATTEMPTS);
}

#[tokio::test]
async fn server_without_an_answer_fails_within_its_deadline() {
    let (mut relay, mut server) = over_tcp().await;
    let mut buffer = [0; 8];
    tokio::select! {
        event = next(&mut relay, &mut buffer) => panic!("{event:?}"),
        request = server.frame() => assert_eq!(method(&request), ALLOCATE),
    }
    let now = Instant::now();
    relay.on_time(now);
    assert!(relay.events.is_empty());
    relay.on_time(now + ALLOCATION_TIMEOUT);
    assert_eq!(failure(&mut relay).await, RelayError::Silent);
}

#[tokio::test]
async fn unreachable_and_closed_servers_are_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    let mut relay = TurnRelay::connect(&endpoint(), turn_server(TurnTransport::Tcp, at));
    let error = failure(&mut relay).await;
    assert!(
        matches!(error, RelayError::Unreachable(ConnectError::Tcp { .. })),
        "{error:?}"
    );

    let (mut relay, server) = usable().await;
    drop(server);
    let error = failure(&mut relay).await;
    assert!(
        matches!(error, RelayError::Closed | RelayError::Broken(_)),
        "{error:?}"
    );
    let after = poll_fn(|cx| Poll::Ready(relay.poll(cx, &mut [0; 8]))).await;
    assert!(after.is_pending());
    assert_eq!(relay.next_deadline(), None);
}

#[tokio::test]
async fn udp_carries_the_same_and_ignores_other_senders() {
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = server.local_addr().unwrap();
    let mut relay = TurnRelay::connect(&endpoint(), turn_server(TurnTransport::Udp, at));
    relay.permit(Instant::now(), address(PEER));
    let attributes = [
        (0x0012, xor_address(address(PEER))),
        (0x0013, b"data".to_vec()),
    ];
    let data = stun(DATA, &[7; 12], &attributes);
    let serving = async {
        let mut buffer = [0; 2_048];
        loop {
            let (length, from) = server.recv_from(&mut buffer).await.unwrap();
            stranger.send_to(&data, from).await.unwrap();
            if let Some(answer) = answer(&buffer[..length]) {
                server.send_to(&answer, from).await.unwrap();
            }
            if method(&buffer) == CREATE_PERMISSION {
                server.send_to(&data, from).await.unwrap();
            }
        }
    };
    let reading = async {
        let mut events = Vec::new();
        while events.len() < 3 {
            events.push(next(&mut relay, &mut [0; 64]).await);
        }
        events
    };
    let events = tokio::select! {
        events = reading => events,
        () = serving => unreachable!(),
    };
    assert!(
        matches!(
            events[..],
            [
                RelayEvent::Allocated(_),
                RelayEvent::Usable,
                RelayEvent::Datagram { length: 4, .. }
            ]
        ),
        "{events:?}"
    );
}

#[tokio::test]
async fn number_of_peers_is_bounded() {
    let (mut relay, _server) = usable().await;
    for port in 1..100 {
        relay.permit(Instant::now(), SocketAddr::new([192, 0, 2, 7].into(), port));
    }
    assert_eq!(relay.peers.len(), MAX_PEERS);
}

#[tokio::test]
async fn server_that_reads_nothing_loses_datagrams_and_costs_no_memory() {
    let (mut relay, _server) = usable().await;
    for _ in 0..20_000 {
        relay.send(Instant::now(), address(PEER), &[9; 1_000]);
    }
    assert!(relay.link.unsent() <= MAX_UNSENT + 2_048);
}

#[test]
fn no_error_and_no_name_contains_the_credential() {
    let server = turn_server(TurnTransport::Tls, address("127.0.0.1:443"));
    assert_eq!(server.to_string(), "TURN/TLS 127.0.0.1:443");
}

/// What a hostile server sends for each frame that it gets.
#[derive(Debug, Clone)]
enum Hostile {
    Raw(Vec<u8>),
    /// A response with the id of the request, of any kind and with any attributes.
    Response(u16, Vec<(u16, Vec<u8>)>),
    Honest,
}

fn hostile() -> impl Strategy<Value = Hostile> {
    let kind = prop_oneof![
        prop::sample::select(vec![
            ALLOCATE | SUCCESS,
            ALLOCATE | ERROR,
            CREATE_PERMISSION | SUCCESS,
            CREATE_PERMISSION | ERROR,
            CHANNEL_BIND | SUCCESS,
            0x104,
            DATA,
        ]),
        0..0x4000_u16,
    ];
    let name = prop_oneof![
        prop::sample::select(vec![
            0x0009_u16, 0x000c, 0x000d, 0x0012, 0x0013, 0x0014, 0x0015, 0x0016, 0x0020
        ]),
        any::<u16>(),
    ];
    let attributes = prop::collection::vec((name, bytes(24)), 0..6);
    prop_oneof![
        1 => bytes(80).prop_map(Hostile::Raw),
        3 => (kind, attributes).prop_map(|(kind, attributes)| Hostile::Response(kind, attributes)),
        4 => Just(Hostile::Honest),
    ]
}

#[test]
fn any_answers_leave_a_relay_within_its_bounds() {
    let answers = prop::collection::vec(hostile(), 1..12);
    check(48, &answers, async |answers| {
        let (mut relay, mut server) = over_tcp().await;
        relay.permit(Instant::now(), address(PEER));
        let serving = async {
            for one in answers {
                let frame = server.frame().await;
                let bytes = match one {
                    Hostile::Raw(bytes) => bytes,
                    Hostile::Response(kind, attributes) => stun(kind, &frame[8..20], &attributes),
                    Hostile::Honest => answer(&frame).unwrap_or_default(),
                };
                server.send(&bytes).await;
            }
        };
        let reading = async {
            let mut buffer = [0; 256];
            loop {
                relay.send(Instant::now(), address(PEER), b"datagram");
                match next(&mut relay, &mut buffer).await {
                    RelayEvent::Failed(_) => return,
                    RelayEvent::Datagram { length, .. } => assert!(length <= buffer.len()),
                    RelayEvent::Allocated(_) | RelayEvent::Usable => {}
                }
            }
        };
        // It reads what has arrived, and then waits for more.
        let both = async { tokio::join!(serving, reading) };
        timeout(Duration::from_millis(50), both).await.ok();
        assert!(relay.peers.len() <= MAX_PEERS);
        assert!(relay.events.len() <= 4, "{:?}", relay.events);
        let now = Instant::now();
        for seconds in [0, 1, 10, 100, 1_000] {
            let now = now + Duration::from_secs(seconds);
            relay.on_time(now);
            assert!(
                relay.next_deadline().is_none_or(|due| due > now),
                "it would spin"
            );
        }
    });
}
