//! Property tests with messages from a server or an agent in any form and order. They may end a participant or a call with
//! an error about the sender, but not with an internal error, and nothing may block.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use livekit_protocol as proto;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use prost::Message as _;
use proto::signal_request::Message as Request;
use proto::signal_response::Message as Response;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async};

use crate::config::{self as settings, CallerMode, Engine, Speech};
use crate::livekit::RoomName;
use crate::livekit::arbitrary::{
    ANSWER, OFFER, bytes, candidate, check, config, protobuf, sdp, sdp_changes,
};
use crate::livekit::audio::caller::{AgentActivity, AgentFrame, CallerPlayer};
use crate::livekit::audio::opus::{self, Decoder, OpusFrame};
use crate::livekit::audio::rtp::{RtpHeader, RtpReceiver};
use crate::livekit::audio::speech::{Detector, SpeechEvent};
use crate::livekit::engine::join;
use crate::livekit::event::{EndReason, RoomEventKind};
use crate::livekit::join::request;
use crate::livekit::test_server::{TestServer, keys, read_request};
use crate::livekit::wire::api::{Api, ApiError};
use crate::livekit::wire::request;
use crate::livekit::wire::signal;

/// One step of a server after the join response.
#[derive(Debug, Clone)]
enum ServerStep {
    Send(Box<Response>),
    /// An acknowledgement of the track that the client really added.
    Acknowledge(String),
    Bytes(Vec<u8>),
    Text(String),
}

/// Few names, so that the same one is often used twice.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => select(vec!["", "a", "b", "canary-echo", "PA_1", "TR_voice", "support"]).prop_map(str::to_owned),
        1 => ".{0,20}",
    ]
}

fn track() -> impl Strategy<Value = proto::TrackInfo> {
    (name(), -1..6_i32, -1..4_i32, any::<bool>()).prop_map(|(sid, source, kind, muted)| {
        proto::TrackInfo {
            sid,
            source,
            r#type: kind,
            muted,
            ..proto::TrackInfo::default()
        }
    })
}

fn participant() -> impl Strategy<Value = proto::ParticipantInfo> {
    let keys = select(vec![
        "lk.agent_name",
        "lk.agent.name",
        "lk.agent.state",
        "lk.publish_on_behalf",
    ]);
    let attributes = vec((keys, name()), 0..4);
    let identity = (name(), name(), vec(track(), 0..3), attributes);
    let state = (-1..6_i32, -1..9_i32, -1..20_i32, any::<u32>(), any::<i64>());
    (identity, state).prop_map(
        |((sid, identity, tracks, attributes), (state, kind, reason, version, joined))| {
            let attributes = attributes.into_iter();
            proto::ParticipantInfo {
                sid,
                identity,
                tracks,
                attributes: attributes
                    .map(|(key, value)| (key.to_owned(), value))
                    .collect(),
                state,
                kind,
                disconnect_reason: reason,
                version,
                joined_at_ms: joined,
                ..proto::ParticipantInfo::default()
            }
        },
    )
}

fn description(text: &'static str) -> impl Strategy<Value = proto::SessionDescription> {
    (sdp_changes(), 0..3_u32).prop_map(move |(changes, id)| proto::SessionDescription {
        r#type: "offer".to_owned(),
        sdp: sdp(text, &changes),
        id,
        ..proto::SessionDescription::default()
    })
}

fn server_message() -> impl Strategy<Value = Response> {
    let trickle = prop_oneof![
        candidate().prop_map(|line| serde_json::json!({ "candidate": line }).to_string()),
        ".{0,40}"
    ];
    prop_oneof![
        3 => description(OFFER).prop_map(Response::Offer),
        3 => description(ANSWER).prop_map(Response::Answer),
        3 => (trickle, -1..3_i32).prop_map(|(candidate_init, target)| {
            Response::Trickle(proto::TrickleRequest {
                candidate_init,
                target,
                r#final: false,
            })
        }),
        4 => vec(participant(), 0..4).prop_map(|participants| {
            Response::Update(proto::ParticipantUpdate { participants })
        }),
        1 => name().prop_map(|track_sid| {
            Response::TrackUnpublished(proto::TrackUnpublishedResponse { track_sid })
        }),
        1 => (any::<i64>(), any::<i64>()).prop_map(|(last_ping_timestamp, timestamp)| {
            Response::PongResp(proto::Pong { last_ping_timestamp, timestamp })
        }),
        1 => any::<i32>().prop_map(|reason| Response::RequestResponse(proto::RequestResponse {
            reason,
            ..proto::RequestResponse::default()
        })),
        1 => name().prop_map(Response::RefreshToken),
    ]
}

fn steps() -> impl Strategy<Value = Vec<ServerStep>> {
    let step = prop_oneof![
        12 => server_message().prop_map(|message| ServerStep::Send(Box::new(message))),
        2 => name().prop_map(ServerStep::Acknowledge),
        1 => (-1..20_i32).prop_map(|reason| {
            let leave = proto::LeaveRequest { reason, ..proto::LeaveRequest::default() };
            ServerStep::Send(Box::new(Response::Leave(leave)))
        }),
        1 => protobuf().prop_map(ServerStep::Bytes),
        1 => bytes(40).prop_map(ServerStep::Bytes),
        1 => ".{0,10}".prop_map(ServerStep::Text),
    ];
    vec(step, 0..12)
}

async fn send(socket: &mut WebSocketStream<TcpStream>, message: Response) -> Option<()> {
    let response = proto::SignalResponse {
        message: Some(message),
    };
    let message = Message::binary(response.encode_to_vec());
    socket.send(message).await.ok()
}

/// Answers the join and performs the steps; closes the socket after the last one.
async fn serve(stream: TcpStream, others: Vec<proto::ParticipantInfo>, steps: Vec<ServerStep>) {
    let conversation = async {
        let mut socket = accept_async(stream).await.ok()?;
        let join = proto::JoinResponse {
            other_participants: others,
            ..proto::JoinResponse::default()
        };
        send(&mut socket, Response::Join(join)).await?;
        let (mut cid, mut mid) = (String::new(), String::new());
        while cid.is_empty() || mid.is_empty() {
            let Message::Binary(bytes) = socket.next().await?.ok()? else {
                continue;
            };
            match proto::SignalRequest::decode(bytes).ok()?.message? {
                Request::AddTrack(request) => cid = request.cid,
                Request::Offer(offer) => {
                    let mut lines = offer.sdp.lines();
                    mid = lines
                        .find_map(|line| line.strip_prefix("a=mid:"))?
                        .to_owned();
                }
                _ => {}
            }
        }
        for step in steps {
            match step {
                ServerStep::Send(mut message) => {
                    if let Response::Answer(answer) = &mut *message {
                        answer.sdp = answer.sdp.replace("MID", &mid);
                    }
                    send(&mut socket, *message).await?;
                }
                ServerStep::Acknowledge(sid) => {
                    let track = proto::TrackInfo {
                        sid,
                        ..proto::TrackInfo::default()
                    };
                    let published = proto::TrackPublishedResponse {
                        cid: cid.clone(),
                        track: Some(track),
                    };
                    send(&mut socket, Response::TrackPublished(published)).await?;
                }
                ServerStep::Bytes(bytes) => socket.send(Message::binary(bytes)).await.ok()?,
                ServerStep::Text(text) => socket.send(Message::text(text)).await.ok()?,
            }
        }
        socket.close(None).await.ok()
    };
    // The client may end the connection at any time.
    conversation.await;
}

#[test]
fn arbitrary_server_messages_end_a_participant_without_an_internal_error() {
    let inputs = (vec(participant(), 0..3), steps());
    check(48, &inputs, async |(others, steps)| {
        let server =
            TestServer::start(move |stream| serve(stream, others.clone(), steps.clone())).await;
        let mut participant = join(Engine::Native, request(server.endpoint()));
        let mut last = None;
        while let Some(event) = participant.events.recv().await {
            last = Some(event.kind);
        }
        match last {
            Some(RoomEventKind::Ended { reason, .. }) => {
                assert!(
                    !matches!(reason, EndReason::Internal(_) | EndReason::Left),
                    "{reason:?}"
                );
            }
            other => panic!("the last event is {other:?}"),
        }
    });
}

proptest! {
    #![proptest_config(config(500))]

    #[test]
    fn arbitrary_bytes_of_a_signal_message_are_decoded_or_refused(
        message in prop_oneof![protobuf(), bytes(200)],
    ) {
        if let Err(error) = signal::decode(&message.into()) {
            let text = error.to_string();
            prop_assert!(text.len() < 1000, "{text}");
        }
    }

    #[test]
    fn arbitrary_retry_after_is_a_duration_or_none(value in prop_oneof![
        "\\PC{0,30}",
        "[0-9]{1,25}",
        "(Mon|Tue), [0-9]{1,3} (Jan|Feb) [0-9]{1,6} [0-9]{1,3}:[0-9]{1,3}:[0-9]{1,3} (GMT|[+-][0-9]{1,6})",
    ]) {
        request::retry_after(&value, chrono::Utc::now());
    }

    #[test]
    fn sanitized_server_text_is_short_and_contains_no_token(
        text in vec(prop_oneof!["\\PC{0,50}", ".{0,50}", "eyJ[a-zA-Z0-9._-]{0,40}"], 0..60),
    ) {
        let shown = request::sanitize(&text.concat());
        prop_assert!(shown.len() <= 1024);
        prop_assert!(!shown.contains("eyJ") && !shown.contains(char::is_control), "{shown}");
    }
}

/// The bytes of a response: usually in the form of HTTP, with random values.
fn answer() -> impl Strategy<Value = Vec<u8>> {
    let status = prop_oneof![
        select(vec![100_u32, 101, 200, 204, 301, 401, 404, 429, 500, 503]),
        0..1100_u32
    ];
    let retry = prop_oneof![
        "[0-9]{1,22}",
        "[ -~]{0,30}",
        Just("Sun, 06 Nov 1994 08:49:37 GMT".to_owned())
    ];
    let header = prop_oneof![
        retry.prop_map(|value| format!("Retry-After: {value}")),
        (0..3000_u64).prop_map(|length| format!("Content-Length: {length}")),
        Just("Transfer-Encoding: chunked".to_owned()),
        Just("Content-Type: application/json".to_owned()),
        Just("Upgrade: websocket".to_owned()),
        "[a-zA-Z-]{0,12}: [ -~]{0,20}",
        "[ -~]{0,20}",
    ];
    let twirp = ("[a-z_]{0,20}", ".{0,60}")
        .prop_map(|(code, msg)| serde_json::json!({ "code": code, "msg": msg }).to_string());
    let body = prop_oneof![
        bytes(2000),
        protobuf(),
        twirp.prop_map(String::into_bytes),
        Just(b"5\r\nhello\r\n0\r\n\r\n".to_vec()),
        Just(b"fffffffffffffffff\r\nhello".to_vec()),
    ];
    let formed = (status, vec(header, 0..4), body).prop_map(|(status, headers, body)| {
        let mut answer = format!("HTTP/1.1 {status} Something\r\n").into_bytes();
        for header in headers {
            answer.extend(header.bytes());
            answer.extend(b"\r\n");
        }
        answer.extend(b"\r\n");
        answer.extend(body);
        answer
    });
    prop_oneof![6 => formed, 1 => bytes(300)]
}

#[test]
fn arbitrary_response_is_a_result_of_the_call() {
    check(100, &answer(), async |answer| {
        let server = TestServer::start(move |mut stream| {
            let answer = answer.clone();
            async move {
                use tokio::io::AsyncWriteExt;
                read_request(&mut stream).await;
                // The client may have closed the connection.
                stream.write_all(&answer).await.ok();
                stream.shutdown().await.ok();
            }
        })
        .await;
        let api = Api::new(server.endpoint(), keys(), Duration::from_secs(10));
        let room = RoomName("room".to_owned());
        match api.list_dispatch(&room).await.result {
            Err(ApiError::Timeout(_)) => panic!("the response was complete"),
            Err(error) => {
                let text = error.to_string();
                assert!(text.len() < 1500 && !text.contains("eyJ"), "{text}");
            }
            Ok(_) => {}
        }
    });
}

/// Packets of an agent: milliseconds since the last, SSRC, sequence number, timestamp and payload.
fn packets() -> impl Strategy<Value = Vec<(u64, u32, u64, u32, Vec<u8>)>> {
    let wait = prop_oneof![8 => 0..40_u64, 1 => 0..100_000_u64];
    let sequence = prop_oneof![4 => 0..50_u64, 1 => any::<u64>().prop_map(|it| it >> 8)];
    let timestamp = prop_oneof![4 => (0..50_u32).prop_map(|it| it * 960), 1 => any::<u32>()];
    // The first byte of an Opus packet is its configuration. These are common ones, with random content.
    let payload = prop_oneof![
        bytes(120),
        (select(vec![0x78_u8, 0xf8, 0xfc, 0x0b, 0x43]), bytes(120)).prop_map(|(toc, mut rest)| {
            rest.insert(0, toc);
            rest
        }),
        Just(include_bytes!("../sandbox/greeting.opusframes")[2..80].to_vec()),
    ];
    vec((wait, 0..3_u32, sequence, timestamp, payload), 0..60)
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn arbitrary_packets_are_decoded_and_echoed_within_bounds(
        packets in packets(),
        continuous in any::<bool>(),
    ) {
        let echo_settings = settings::Caller {
            mode: if continuous { CallerMode::PassThrough } else { CallerMode::Echo },
            ..settings::Caller::default()
        };
        let mut now = Instant::now();
        let mut receiver = RtpReceiver::default();
        let mut decoder = Decoder::default();
        let mut speech = Detector::new(Speech::default(), opus::RATE);
        let mut echo = CallerPlayer::new(echo_settings, Duration::from_secs(30));
        echo.open(now);
        let mut last = None;
        for (wait, ssrc, sequence, timestamp, payload) in packets {
            now += Duration::from_millis(wait);
            let payload: Arc<[u8]> = payload.into();
            let head = RtpHeader { ssrc, sequence, timestamp };
            if let Some(position) = receiver.on_packet(now, head) {
                prop_assert!(last < Some(position.time), "the media clock went back");
                last = Some(position.time);
                let heard = speech.on_sound(now, decoder.decode(position, &payload));
                echo.on_frame(AgentFrame {
                    arrived: now,
                    time: position.time,
                    level: speech.last_level(),
                    frame: OpusFrame { payload, peak: 0 },
                });
                for event in heard {
                    match event {
                        SpeechEvent::Started(at) => echo.on_speech_started(at),
                        SpeechEvent::Ended(at) => echo.on_speech_ended(at),
                    }
                }
            }
            // A queue that returns more than this never becomes empty.
            let mut sent = 0;
            let agent = AgentActivity {
                may_speak: speech.speech_pending(),
                ..AgentActivity::default()
            };
            while echo.poll(now, agent).is_some() {
                sent += 1;
                prop_assert!(sent < 10_000, "the echo never ends");
            }
        }
        let stats = receiver.stats();
        prop_assert!(stats.jitter.is_none_or(|it| it < Duration::from_hours(24 * 365)));
    }
}
