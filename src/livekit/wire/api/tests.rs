use livekit_api::access_token::{TokenVerifier, VideoGrants};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::*;
use crate::livekit::test_server::{
    REJECTIONS, SECRET, TestCa, TestServer, endpoint, keys, read_request, respond,
};

const TIMEOUT: Duration = Duration::from_secs(20);

fn api(endpoint: Endpoint) -> Api {
    Api::new(endpoint, keys(), TIMEOUT)
}

fn room() -> RoomName {
    RoomName("canary-1".to_owned())
}

async fn error_of(answer: &'static str) -> ApiError {
    let server = TestServer::answering(answer).await;
    let call = api(server.endpoint()).list_rooms(&[]).await;
    assert!(call.sent_at.is_some());
    call.result.unwrap_err()
}

#[tokio::test]
async fn every_rejection_preserves_status_text_and_retry_after() {
    for case in REJECTIONS {
        match error_of(case.answer).await {
            ApiError::Refused(rejection) => assert_eq!(rejection, case.rejection()),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn only_twirps_own_not_found_counts_as_not_found() {
    assert!(error_of(REJECTIONS[2].answer).await.is_not_found());
    let proxy = "HTTP/1.1 404 Not Found\r\n\r\nno such route";
    assert!(!error_of(proxy).await.is_not_found());
}

#[tokio::test]
async fn token_that_the_server_quotes_does_not_appear_in_the_error() {
    let server = TestServer::quoting_the_token().await;
    let call = api(server.endpoint()).list_rooms(&[]).await;
    let shown = format!("{call:?} {}", call.result.as_ref().unwrap_err());
    assert!(shown.contains("invalid token"), "{shown}");
    assert!(!shown.contains("eyJ") && !shown.contains(SECRET), "{shown}");
}

#[tokio::test]
async fn bytes_that_cannot_be_decoded_are_a_protocol_error() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\nContent-Length: 14\r\n\r\n<html>Welcome!",
        "SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ] {
        let error = error_of(answer).await;
        assert!(matches!(error, ApiError::Protocol(_)), "{error}");
    }
}

/// An empty body is a valid message, such as an empty list of rooms.
#[tokio::test]
async fn http_200_without_twirps_content_type_is_refused() {
    for (answer, message) in [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n<html>Welcome!",
            "<html>Welcome!",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 0\r\n\r\n",
            "OK",
        ),
    ] {
        match error_of(answer).await {
            ApiError::Refused(rejection) => {
                assert_eq!((rejection.status, &*rejection.message), (200, message));
            }
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn connection_that_breaks_before_the_response_is_complete_is_broken() {
    let during_the_body = "HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\nContent-Length: 100\r\n\r\nthe beginning";
    let error = error_of(during_the_body).await;
    assert!(matches!(error, ApiError::Broken(_)), "{error}");
    let before_the_head = TestServer::start(|mut stream| async move {
        read_request(&mut stream).await;
    })
    .await;
    let call = api(before_the_head.endpoint()).list_rooms(&[]).await;
    let error = call.result.unwrap_err();
    assert!(matches!(error, ApiError::Broken(_)), "{error}");
}

#[tokio::test]
async fn endless_body_is_cut_at_the_limit() {
    let server = TestServer::start(|mut stream| async move {
        read_request(&mut stream).await;
        let head = b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\n\r\n";
        stream.write_all(head).await.unwrap();
        while stream.write_all(&[0; 4096]).await.is_ok() {}
    })
    .await;
    let call = api(server.endpoint()).list_rooms(&[]).await;
    let text = call.result.unwrap_err().to_string();
    assert!(text.contains("more than 1048576 bytes"), "{text}");
}

#[tokio::test]
async fn silent_server_is_a_timeout_after_the_request_was_sent() {
    let server = TestServer::silent().await;
    let api = Api::new(server.endpoint(), keys(), Duration::from_millis(100));
    let call = api.list_rooms(&[]).await;
    assert!(call.sent_at.is_some());
    let error = call.result.unwrap_err();
    assert!(matches!(error, ApiError::Timeout(_)), "{error}");
}

#[tokio::test]
async fn rejection_whose_body_never_ends_is_still_that_rejection() {
    let server = TestServer::start(|mut stream| async move {
        read_request(&mut stream).await;
        let start = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 99\r\n\r\nbusy";
        stream.write_all(start).await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    let api = Api::new(server.endpoint(), keys(), Duration::from_secs(1));
    match api.list_rooms(&[]).await.result.unwrap_err() {
        ApiError::Refused(rejection) => {
            assert_eq!(
                (rejection.status, rejection.message.as_str()),
                (503, "busy")
            );
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn request_that_was_never_written_has_no_send_time() {
    let server = TestCa::new().server("localhost", 2999, "").await;
    let url = format!("https://localhost:{}", server.address.port());
    let call = api(endpoint(&url)).list_rooms(&[]).await;
    assert_eq!(call.sent_at, None);
    let error = call.result.unwrap_err();
    assert!(
        matches!(error, ApiError::Unreachable(ConnectError::Tls { .. })),
        "{error}"
    );
}

/// Makes every call; returns each path with the grants of its token.
async fn requests() -> Vec<(String, VideoGrants)> {
    let (heads, mut received) = mpsc::channel(10);
    let server = TestServer::start(move |mut stream| {
        let heads = heads.clone();
        async move {
            heads.send(read_request(&mut stream).await).await.unwrap();
            // An empty body decodes as the default of every protobuf message.
            let answer =
                "HTTP/1.1 200 OK\r\nContent-Type: Application/Protobuf;v=1\r\nContent-Length: 0\r\n\r\n";
            respond(&mut stream, answer).await;
        }
    })
    .await;
    let api = api(endpoint(&format!("http://{}/base", server.address)));
    let room = room();
    let new = NewRoom {
        name: room.clone(),
        metadata: String::new(),
        empty_timeout: Duration::from_secs(30),
        departure_timeout: Duration::from_secs(2),
        max_participants: 1,
        agents: Vec::new(),
    };
    api.create_room(&new).await.result.unwrap();
    api.list_rooms(std::slice::from_ref(&room))
        .await
        .result
        .unwrap();
    api.delete_room(&room).await.result.unwrap();
    api.list_participants(&room).await.result.unwrap();
    let agent = NamedAgent {
        name: "agent".to_owned(),
        deployment: String::new(),
        metadata: String::new(),
    };
    api.create_dispatch(&room, agent).await.result.unwrap();
    api.list_dispatch(&room).await.result.unwrap();
    api.delete_dispatch(&room, "id").await.result.unwrap();
    drop(server);
    let mut requests = Vec::new();
    while let Ok(head) = received.try_recv() {
        let path = head.split(' ').nth(1).unwrap().to_owned();
        let token = head
            .lines()
            .find_map(|line| line.strip_prefix("authorization: Bearer "));
        let verifier = TokenVerifier::with_api_key("some-key", SECRET);
        requests.push((path, verifier.verify(token.unwrap()).unwrap().video));
    }
    requests
}

#[tokio::test]
async fn each_call_has_its_path_and_only_the_grants_that_it_needs() {
    let create = VideoGrants {
        room_create: true,
        ..VideoGrants::default()
    };
    let list = VideoGrants {
        room_list: true,
        ..VideoGrants::default()
    };
    let admin = VideoGrants {
        room_admin: true,
        room: "canary-1".to_owned(),
        ..VideoGrants::default()
    };
    let expected = [
        ("RoomService/CreateRoom", &create),
        ("RoomService/ListRooms", &list),
        ("RoomService/DeleteRoom", &create),
        ("RoomService/ListParticipants", &admin),
        ("AgentDispatchService/CreateDispatch", &admin),
        ("AgentDispatchService/ListDispatch", &admin),
        ("AgentDispatchService/DeleteDispatch", &admin),
    ]
    .map(|(method, grants)| (format!("/base/twirp/livekit.{method}"), grants.clone()));
    assert_eq!(requests().await, expected);
}

#[test]
fn timeout_below_a_second_does_not_become_the_servers_default() {
    assert_eq!(whole_seconds(Duration::from_millis(200)), 1);
    assert_eq!(whole_seconds(Duration::from_secs(2)), 2);
    assert_eq!(whole_seconds(Duration::ZERO), 0);
}

#[test]
fn job_has_its_worker_and_the_name_of_its_status_from_the_protobuf() {
    let job = proto::Job {
        id: "AJ_1".to_owned(),
        state: Some(proto::JobState {
            status: proto::JobStatus::JsRunning.into(),
            worker_id: "AW_1\n".to_owned(),
            ..proto::JobState::default()
        }),
        ..proto::Job::default()
    };
    let dispatch = DispatchInfo::from(proto::AgentDispatch {
        state: Some(proto::AgentDispatchState {
            jobs: vec![job],
            ..proto::AgentDispatchState::default()
        }),
        ..proto::AgentDispatch::default()
    });
    assert_eq!(dispatch.jobs[0].status, "JS_RUNNING");
    assert_eq!(dispatch.jobs[0].worker, "AW_1");
}
