use std::collections::HashMap;

use proto::participant_info::Kind;
use tokio::sync::mpsc;

use super::*;
use crate::livekit::event::{MediaPermission, RoomEvent};
use crate::livekit::join;
use crate::livekit::room::observer::EventSender;
use crate::livekit::test_server::TestServer;

struct WatchedRoom {
    watch: SignalWatch,
    events: mpsc::Receiver<RoomEvent>,
    start: Instant,
}

impl WatchedRoom {
    async fn new() -> Self {
        let silent = TestServer::silent().await;
        let (sender, events) = mpsc::channel(64);
        let request = join::request(silent.endpoint());
        let observer = Observer::new(&request, EventSender::new(sender), "echo-1".to_owned());
        let start = Instant::now();
        Self {
            watch: SignalWatch::new(start, observer),
            events,
            start,
        }
    }

    async fn joined(others: Vec<proto::ParticipantInfo>) -> Self {
        let mut room = Self::new().await;
        let response = proto::JoinResponse {
            other_participants: others,
            ..proto::JoinResponse::default()
        };
        assert!(room.receive(0, Response::Join(response)).is_ok());
        room
    }

    fn at(&self, millis: u64) -> Instant {
        self.start + Duration::from_millis(millis)
    }

    fn receive(&mut self, millis: u64, message: Response) -> Result<Option<Instant>, EndReason> {
        let event = WireEvent::Message(self.at(millis), Box::new(message));
        self.watch.on_wire_event(event)
    }

    /// The reported events, each with its time in milliseconds.
    fn events(&mut self) -> Vec<(u128, RoomEventKind)> {
        let events = std::iter::from_fn(|| self.events.try_recv().ok());
        let start = self.start;
        events
            .map(|event| (event.at.duration_since(start).as_millis(), event.kind))
            .collect()
    }
}

fn agent() -> proto::ParticipantInfo {
    proto::ParticipantInfo {
        sid: "PA_1".to_owned(),
        identity: "agent-1".to_owned(),
        kind: Kind::Agent.into(),
        joined_at_ms: 1_000_400,
        attributes: HashMap::from([("lk.agent_name".to_owned(), "support".to_owned())]),
        ..proto::ParticipantInfo::default()
    }
}

fn update(participant: proto::ParticipantInfo) -> Response {
    let participants = vec![participant];
    Response::Update(proto::ParticipantUpdate { participants })
}

fn closed() -> WireEvent {
    WireEvent::Lost(SignalError::Closed("by the server".to_owned()))
}

#[tokio::test]
async fn agent_in_the_join_response_is_reported() {
    let mut room = WatchedRoom::joined(vec![agent()]).await;
    assert!(matches!(
        &room.events()[..],
        [
            (0, RoomEventKind::SignalConnected { .. }),
            (0, RoomEventKind::AgentJoined { agent, in_join_response: true }),
        ] if agent.identity == "agent-1"
    ));
}

#[tokio::test]
async fn agent_has_the_time_of_its_message_and_the_servers_time_of_the_join() {
    let mut room = WatchedRoom::joined(Vec::new()).await;
    let pinged = WireEvent::Pinged(room.at(0), 7);
    assert!(matches!(room.watch.on_wire_event(pinged), Ok(None)));
    let answer = proto::Pong {
        last_ping_timestamp: 7,
        timestamp: 1_000_010,
    };
    assert!(room.receive(20, Response::PongResp(answer)).is_ok());
    let at = room.at(500);
    assert!(matches!(room.receive(500, update(agent())), Ok(Some(it)) if it == at));
    let expected = room.at(400);
    assert!(matches!(
        &room.events()[1..],
        [(500, RoomEventKind::AgentJoined { agent, in_join_response: false })]
            if agent.joined == Some(expected)
    ));
}

#[tokio::test]
async fn each_media_address_is_reported_once() {
    let mut room = WatchedRoom::joined(Vec::new()).await;
    let line = "candidate:1 1 udp 2130706431 192.0.2.1 7882 typ host";
    let answer = proto::SessionDescription {
        sdp: format!("v=0\r\na={line}\r\na=mid:0\r\n"),
        ..proto::SessionDescription::default()
    };
    assert!(room.receive(10, Response::Answer(answer)).is_ok());
    let trickle = proto::TrickleRequest {
        candidate_init: serde_json::json!({ "candidate": line }).to_string(),
        ..proto::TrickleRequest::default()
    };
    assert!(room.receive(20, Response::Trickle(trickle)).is_ok());
    assert!(matches!(
        &room.events()[1..],
        [(10, RoomEventKind::MediaAddress(address))] if address == "UDP 192.0.2.1:7882"
    ));
}

#[tokio::test]
async fn server_acknowledges_and_ends_the_echo_track() {
    let mut room = WatchedRoom::joined(Vec::new()).await;
    let published = |cid: &str| {
        Response::TrackPublished(proto::TrackPublishedResponse {
            cid: cid.to_owned(),
            track: Some(proto::TrackInfo {
                sid: "TR_1".to_owned(),
                ..proto::TrackInfo::default()
            }),
        })
    };
    assert!(room.receive(10, published("another")).is_ok());
    assert!(room.receive(20, published("echo-1")).is_ok());
    assert!(matches!(
        room.events()[1..],
        [(20, RoomEventKind::CallerPublished)]
    ));
    let gone = Response::TrackUnpublished(proto::TrackUnpublishedResponse {
        track_sid: "TR_1".to_owned(),
    });
    let why = room.receive(30, gone);
    assert!(
        matches!(why, Err(EndReason::Revoked(MediaPermission::Publish))),
        "{why:?}"
    );
}

#[tokio::test]
async fn request_is_reported_once_if_the_sdk_tries_two_paths() {
    let mut room = WatchedRoom::new().await;
    for millis in [5, 9] {
        let requested = WireEvent::Requested(room.at(millis));
        assert!(room.watch.on_wire_event(requested).is_ok());
    }
    assert!(matches!(
        room.events()[..],
        [(5, RoomEventKind::SignalRequested)]
    ));
}

#[tokio::test]
async fn leave_ends_a_participant_and_refuses_one_that_has_not_joined() {
    let leave = || {
        Response::Leave(proto::LeaveRequest {
            reason: proto::DisconnectReason::RoomDeleted.into(),
            ..proto::LeaveRequest::default()
        })
    };
    let why = WatchedRoom::joined(Vec::new()).await.receive(10, leave());
    assert!(
        matches!(&why, Err(EndReason::Removed { reason }) if reason == "ROOM_DELETED"),
        "{why:?}"
    );
    let why = WatchedRoom::new().await.receive(10, leave());
    assert!(
        matches!(
            why,
            Err(EndReason::Signal(SignalError::LeftBeforeJoin { .. }))
        ),
        "{why:?}"
    );
}

#[tokio::test]
async fn refused_path_ends_the_participant_only_if_the_sdk_gives_up() {
    let mut room = WatchedRoom::new().await;
    assert!(room.watch.on_wire_event(closed()).is_ok());
    let why = room.watch.not_connected("handshake error".to_owned());
    assert!(
        matches!(why, EndReason::Signal(SignalError::Closed(_))),
        "{why:?}"
    );
}

#[tokio::test]
async fn missing_join_response_is_a_join_timeout_and_missing_media_is_a_media_failure() {
    let why = WatchedRoom::new().await.watch.not_connected(String::new());
    assert!(
        matches!(why, EndReason::Signal(SignalError::JoinTimeout(_))),
        "{why:?}"
    );
    let mut room = WatchedRoom::joined(Vec::new()).await;
    assert!(room.watch.joined());
    let why = room.watch.not_connected("timed out".to_owned());
    assert!(matches!(&why, EndReason::MediaFailed { detail, .. } if detail == "timed out"));
}

#[tokio::test]
async fn closed_socket_ends_the_participant_before_the_sdk_reconnects() {
    let lost = WatchedRoom::joined(Vec::new())
        .await
        .watch
        .on_wire_event(closed());
    assert!(matches!(
        lost,
        Err(EndReason::Signal(SignalError::Closed(_)))
    ));
}

#[tokio::test]
async fn reconnect_is_a_ping_timeout_if_the_server_was_silent_and_a_media_failure_otherwise() {
    let mut room = WatchedRoom::joined(Vec::new()).await;
    assert!(room.receive(10_000, update(agent())).is_ok());
    let soon = room.watch.reconnecting(room.at(16_000));
    assert!(matches!(soon, EndReason::MediaFailed { .. }), "{soon:?}");
    let late = room.watch.reconnecting(room.at(25_000));
    assert!(
        matches!(late, EndReason::Signal(SignalError::PingTimeout(_))),
        "{late:?}"
    );
}

#[tokio::test]
async fn agent_in_an_update_before_the_join_response_was_there_before_the_canary() {
    let mut room = WatchedRoom::new().await;
    assert!(room.receive(0, update(agent())).is_ok());
    let response = proto::JoinResponse::default();
    assert!(room.receive(5, Response::Join(response)).is_ok());
    assert!(matches!(
        &room.events()[..],
        [
            (
                0,
                RoomEventKind::AgentJoined {
                    in_join_response: true,
                    ..
                }
            ),
            (5, RoomEventKind::SignalConnected { .. }),
        ]
    ));
}

#[tokio::test]
async fn nameless_agent_is_the_agent_once_it_is_adopted() {
    let mut room = WatchedRoom::joined(Vec::new()).await;
    let nameless = proto::ParticipantInfo {
        attributes: HashMap::new(),
        ..agent()
    };
    assert!(room.receive(5, update(nameless)).is_ok());
    let at = room.at(20);
    assert!(room.watch.adopt(at, "agent-1").is_ok());
    assert!(matches!(
        &room.events()[..],
        [
            (0, RoomEventKind::SignalConnected { .. }),
            (5, RoomEventKind::OtherJoined { .. }),
            (5, RoomEventKind::NamelessAgent { .. }),
            (5, RoomEventKind::AgentJoined { .. }),
        ]
    ));
}
