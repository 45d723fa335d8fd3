use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use livekit_protocol as proto;
use prost::Message as _;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use url::Url;

use super::*;
use crate::livekit::wire::connect::Endpoint;
use crate::livekit::wire::token::Keys;

const ROOM: &str = "canary-test-1";
/// Of what never has to pass.
const AMPLE: Duration = Duration::from_secs(10);
/// Of deletions that are answered at once, and of the windows that are as long as a deletion may take.
const ENOUGH: Duration = Duration::from_millis(500);
/// Of windows and deadlines that have to pass for the test to end.
const BRIEF: Duration = Duration::from_millis(50);

/// What the scripted server says to one call.
#[derive(Clone)]
enum Answer {
    Ok(Vec<u8>),
    Refused(u16, &'static str),
    /// None, for ever.
    Silence,
}

fn done() -> Answer {
    Answer::Ok(Vec::new())
}

fn rooms(names: &[&str]) -> Answer {
    let room = |name: &&str| proto::Room {
        name: (*name).to_owned(),
        ..proto::Room::default()
    };
    let rooms = names.iter().map(room).collect();
    Answer::Ok(proto::ListRoomsResponse { rooms }.encode_to_vec())
}

fn dispatches(ids: &[&str]) -> Answer {
    let dispatch = |id: &&str| proto::AgentDispatch {
        id: (*id).to_owned(),
        ..proto::AgentDispatch::default()
    };
    let agent_dispatches = ids.iter().map(dispatch).collect();
    Answer::Ok(proto::ListAgentDispatchResponse { agent_dispatches }.encode_to_vec())
}

/// A server that answers each method from its own script, the last answer for ever, and what is not scripted with
/// an empty message (done, no rooms, no dispatches); and notes what it was asked.
struct Scripted {
    api: Api,
    calls: Arc<Mutex<Vec<String>>>,
    _serving: JoinSet<()>,
}

impl Scripted {
    async fn start(script: &[(&str, &[Answer])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut script: HashMap<String, Vec<Answer>> = script
            .iter()
            .map(|(method, answers)| ((*method).to_owned(), answers.to_vec()))
            .collect();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&calls);
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut silent = Vec::new();
            loop {
                let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                let method = read_request(&mut stream).await;
                let answer = match script.get_mut(&method) {
                    None => done(),
                    Some(answers) if answers.len() == 1 => answers[0].clone(),
                    Some(answers) => answers.remove(0),
                };
                noted.lock().unwrap().push(method);
                match answer {
                    Answer::Ok(body) => respond(stream, 200, "protobuf", &body).await,
                    Answer::Refused(status, code) => {
                        let body = format!(r#"{{"code":"{code}","msg":"as scripted"}}"#);
                        respond(stream, status, "json", body.as_bytes()).await;
                    }
                    Answer::Silence => silent.push(stream),
                }
            }
        });
        let keys = Keys::new("key", "secret").unwrap();
        let endpoint = Endpoint::new(&Url::parse(&url).unwrap(), None).unwrap();
        Self {
            api: Api::new(endpoint, keys, AMPLE),
            calls,
            _serving: serving,
        }
    }

    fn lease(&self, janitor: &Janitor, cleanup: Duration, window: Duration) -> RoomLease {
        janitor.own(RoomName(ROOM.to_owned()), self.api.clone(), cleanup, window)
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

/// Reads one request and gives its Twirp method.
async fn read_request(stream: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    let path = line.split(' ').nth(1).unwrap();
    let method = path.rsplit('/').next().unwrap().to_owned();
    let mut length = 0;
    loop {
        line.clear();
        stream.read_line(&mut line).await.unwrap();
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap();
        }
    }
    stream.read_exact(&mut vec![0; length]).await.unwrap();
    method
}

async fn respond(mut stream: BufReader<TcpStream>, status: u16, format: &str, body: &[u8]) {
    let head = format!(
        "HTTP/1.1 {status} As scripted\r\ncontent-type: application/{format}\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
}

async fn close(janitor: Janitor, within: Duration) -> Vec<String> {
    let left = janitor.close(Instant::now() + within).await;
    let say = |left: UnconfirmedRoom| {
        assert_eq!(left.room.0, ROOM);
        left.why
    };
    left.into_iter().map(say).collect()
}

fn is_deleted(deletion: &Deletion) -> bool {
    matches!(deletion, Deletion::Deleted { .. })
}

#[tokio::test]
async fn the_dispatch_ends_before_the_room_and_a_seen_agent_leaves_nothing_to_re_check() {
    let server = Scripted::start(&[]).await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, AMPLE, AMPLE);
    lease.dispatched("AD_1".to_owned());
    lease.agents_connected(true);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    assert_eq!(server.calls(), ["DeleteDispatch", "DeleteRoom"]);
}

#[tokio::test]
async fn a_room_that_another_agent_was_about_to_join_is_re_checked() {
    let server = Scripted::start(&[]).await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, ENOUGH, BRIEF);
    lease.dispatched("AD_1".to_owned());
    lease.agents_connected(true);
    lease.agents_connected(false);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    assert_eq!(server.calls().last().map(String::as_str), Some("ListRooms"));
}

#[tokio::test]
async fn a_room_that_was_never_created_is_not_asked_for() {
    let server = Scripted::start(&[]).await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, AMPLE, AMPLE);
    lease.not_created();
    assert_eq!(lease.delete().await, Deletion::NothingThere);
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    assert_eq!(server.calls(), [""; 0]);
}

#[tokio::test]
async fn a_panic_a_cancel_or_a_delete_that_nobody_awaits_still_deletes_the_room() {
    for end in ["panic", "cancel", "half a delete"] {
        let server = Scripted::start(&[]).await;
        let janitor = Janitor::start();
        let lease = server.lease(&janitor, ENOUGH, BRIEF);
        let mut probe = JoinSet::new();
        probe.spawn(async move {
            let lease = lease;
            match end {
                "panic" => panic!("scripted"),
                "cancel" => std::future::pending().await,
                _ => {
                    let mut deletion = pin!(lease.delete());
                    let once = poll_fn(|context| Poll::Ready(deletion.as_mut().poll(context)));
                    assert!(once.await.is_pending());
                }
            }
        });
        if end == "cancel" {
            probe.abort_all();
        }
        let ended = probe.join_next().await.unwrap();
        assert_eq!(ended.is_ok(), end == "half a delete", "{end}");
        assert_eq!(close(janitor, AMPLE).await, [""; 0], "{end}");
        let calls = server.calls();
        assert!(calls.contains(&"DeleteRoom".to_owned()), "{end}: {calls:?}");
    }
}

#[tokio::test]
async fn a_room_whose_creation_was_in_flight_when_its_lease_was_dropped_is_deleted_once_it_is_there()
 {
    let server = Scripted::start(&[
        ("DeleteRoom", &[Answer::Refused(404, "not_found"), done()]),
        ("ListRooms", &[rooms(&[ROOM]), rooms(&[])]),
    ])
    .await;
    let janitor = Janitor::start();
    drop(server.lease(&janitor, ENOUGH, Duration::ZERO));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    let calls = server.calls();
    let deletions = calls.iter().filter(|call| *call == "DeleteRoom");
    assert_eq!(deletions.count(), 2, "{calls:?}");
    assert_eq!(calls.last().unwrap(), "ListRooms");
}

#[tokio::test]
async fn where_no_agent_was_seen_the_dispatches_that_nobody_knows_of_end_too() {
    let server = Scripted::start(&[
        ("ListDispatch", &[dispatches(&["AD_1", "AD_2"])]),
        ("DeleteDispatch", &[Answer::Refused(404, "not_found")]),
    ])
    .await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, ENOUGH, BRIEF);
    lease.dispatched("AD_1".to_owned());
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    let calls = server.calls().join(" ");
    let expected = "DeleteDispatch ListDispatch DeleteDispatch DeleteRoom ListRooms";
    assert_eq!(calls, expected);
}

#[tokio::test]
async fn a_dispatch_whose_id_nobody_told_ends_though_its_agent_was_seen() {
    let listed = &[dispatches(&["AD_1"])];
    let server = Scripted::start(&[("ListDispatch", listed)]).await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, AMPLE, AMPLE);
    lease.agents_connected(true);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    let expected = ["ListDispatch", "DeleteDispatch", "DeleteRoom"];
    assert_eq!(server.calls(), expected);
}

#[tokio::test]
async fn a_room_that_a_late_agent_brought_back_is_deleted_again() {
    let server = Scripted::start(&[("ListRooms", &[rooms(&[ROOM]), rooms(&[])])]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, ENOUGH, BRIEF);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    let deletion = "ListDispatch DeleteRoom ListRooms";
    let calls = server.calls().join(" ");
    assert_eq!(calls, format!("{deletion} {deletion}"));
}

#[tokio::test]
async fn a_room_that_comes_back_twice_keeps_standing_until_the_jobs_that_re_create_it_are_ended() {
    let back = rooms(&[ROOM]);
    let server = Scripted::start(&[("ListRooms", &[back.clone(), back, rooms(&[])])]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, ENOUGH, BRIEF);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    let deletion = "ListDispatch DeleteRoom ListRooms";
    let calls = server.calls().join(" ");
    assert_eq!(
        calls,
        format!("{deletion} {deletion} ListDispatch {deletion}")
    );
}

#[tokio::test]
async fn a_passing_fault_is_retried_and_a_refusal_in_earnest_is_not() {
    let unavailable = Answer::Refused(503, "unavailable");
    let denied = Answer::Refused(403, "permission_denied");
    let deletions = &[unavailable.clone(), unavailable, denied];
    let server = Scripted::start(&[("DeleteRoom", deletions)]).await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, AMPLE, AMPLE);
    lease.dispatched("AD_1".to_owned());
    lease.agents_connected(true);
    let deletion = lease.delete().await;
    assert!(
        matches!(&deletion, Deletion::NotDeleted { why } if why.contains("403")),
        "{deletion:?}"
    );
    assert_eq!(server.calls()[1..], ["DeleteRoom"; 3]);
}

#[tokio::test]
async fn a_server_that_does_not_answer_leaves_the_room_named_and_never_claimed_deleted() {
    let silence = &[Answer::Silence];
    let methods = ["ListDispatch", "DeleteRoom", "ListRooms"];
    let server = Scripted::start(&methods.map(|method| (method, &silence[..]))).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, BRIEF, BRIEF);
    let Deletion::NotDeleted { why } = lease.delete().await else {
        panic!("claimed deleted")
    };
    assert!(why.starts_with("no answer within"), "{why}");
    let left = close(janitor, AMPLE).await;
    assert_eq!(left, [format!("not deleted: {why}")]);
}

#[tokio::test]
async fn a_room_whose_deletion_failed_is_named_at_once() {
    let server = Scripted::start(&[("DeleteRoom", &[Answer::Silence])]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, BRIEF, Duration::from_hours(1));
    let deletion = lease.delete().await;
    assert!(!is_deleted(&deletion), "{deletion:?}");
    let left = close(janitor, Duration::from_hours(1)).await;
    assert!(left[0].starts_with("not deleted: no answer"), "{left:?}");
}

#[tokio::test]
async fn a_room_whose_deletion_failed_is_deleted_when_the_server_is_back() {
    let server = Scripted::start(&[
        ("DeleteRoom", &[Answer::Silence, done()]),
        ("ListRooms", &[rooms(&[ROOM]), rooms(&[])]),
    ])
    .await;
    let janitor = Janitor::start();
    let deletion = server.lease(&janitor, ENOUGH, BRIEF).delete().await;
    assert!(!is_deleted(&deletion), "{deletion:?}");
    janitor.shared.tasks.wait().await;
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
}

#[tokio::test]
async fn a_close_before_the_windows_end_names_the_rooms_that_it_can_not_vouch_for() {
    let server = Scripted::start(&[]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, AMPLE, Duration::from_mins(1));
    assert!(is_deleted(&lease.delete().await));
    let left = close(janitor, BRIEF).await;
    let why = "deleted, but watched for only 0 of 60 s: a late agent would re-create it";
    assert_eq!(left, [why]);
}

#[tokio::test]
async fn a_room_whose_last_re_check_failed_is_not_vouched_for() {
    let denied = &[Answer::Refused(403, "permission_denied")];
    let server = Scripted::start(&[("ListRooms", denied)]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, ENOUGH, BRIEF);
    assert!(is_deleted(&lease.delete().await));
    let left = close(janitor, AMPLE).await;
    assert!(
        left[0].contains("the last re-check failed: refused with HTTP 403"),
        "{left:?}"
    );
}

#[tokio::test]
async fn a_close_while_a_probe_still_holds_its_room_names_it() {
    let server = Scripted::start(&[]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, AMPLE, AMPLE);
    assert_eq!(close(janitor, BRIEF).await, ["its probe had not ended"]);
    drop(lease);
}

/// A janitor, and what it tells its on_cleanup.
fn janitor_with_results() -> (Janitor, Arc<Mutex<Vec<String>>>) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let on_cleanup = Arc::clone(&told);
    let janitor = Janitor::start_with(Arc::new(
        move |room: &RoomName, result: CleanupResult<'_>| {
            on_cleanup
                .lock()
                .unwrap()
                .push(format!("{room} {result:?}"));
        },
    ));
    (janitor, told)
}

#[tokio::test]
async fn a_room_is_told_to_be_gone_only_when_its_re_checks_are_over() {
    let server = Scripted::start(&[("ListRooms", &[rooms(&[ROOM]), rooms(&[])])]).await;
    let (janitor, told) = janitor_with_results();
    let lease = server.lease(&janitor, ENOUGH, BRIEF);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(*told.lock().unwrap(), [""; 0]);
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    assert_eq!(*told.lock().unwrap(), ["canary-test-1 Gone"]);
}

#[tokio::test]
async fn a_room_that_nobody_can_vouch_for_is_told_as_such_and_one_that_never_was_as_gone() {
    let denied = &[Answer::Refused(403, "permission_denied")];
    let server = Scripted::start(&[("ListRooms", denied)]).await;
    let (janitor, told) = janitor_with_results();
    drop(server.lease(&janitor, ENOUGH, BRIEF));
    assert_eq!(close(janitor, AMPLE).await.len(), 1);
    let said = told.lock().unwrap()[0].clone();
    assert!(
        said.contains("Unconfirmed") && said.contains("403"),
        "{said}"
    );

    let (janitor, told) = janitor_with_results();
    let mut lease = server.lease(&janitor, ENOUGH, BRIEF);
    lease.not_created();
    lease.delete().await;
    close(janitor, AMPLE).await;
    assert_eq!(*told.lock().unwrap(), ["canary-test-1 Gone"]);
}

#[tokio::test]
async fn a_sweep_deletes_what_there_is_and_names_what_it_could_not() {
    let server = Scripted::start(&[(
        "DeleteRoom",
        &[
            done(),
            Answer::Refused(404, "not_found"),
            Answer::Refused(403, "permission_denied"),
        ],
    )])
    .await;
    let janitor = Janitor::start();
    let names = ["one", "two", "three"].map(|name| RoomName(name.to_owned()));
    let mut swept = SweepResult::default();
    // One after the other, as the server is scripted.
    for name in names {
        let one = janitor.sweep(&server.api, vec![name]).await;
        swept.deleted.extend(one.deleted);
        swept.unconfirmed.extend(one.unconfirmed);
    }
    let deleted: Vec<&str> = swept.deleted.iter().map(|room| room.0.as_str()).collect();
    assert_eq!(deleted, ["one", "two"]);
    assert_eq!(swept.unconfirmed[0].room.0, "three");
    assert!(
        swept.unconfirmed[0].why.contains("403"),
        "{:?}",
        swept.unconfirmed
    );
}

#[tokio::test]
async fn a_sweep_of_many_rooms_deletes_them_all() {
    let server = Scripted::start(&[]).await;
    let janitor = Janitor::start();
    let names: Vec<RoomName> = (0..20).map(|n| RoomName(format!("room-{n}"))).collect();
    let swept = janitor.sweep(&server.api, names.clone()).await;
    assert_eq!((swept.deleted, swept.unconfirmed), (names, Vec::new()));
    let calls = server.calls();
    let deletions = calls.iter().filter(|call| *call == "DeleteRoom");
    assert_eq!(deletions.count(), 20);
}

/// The seconds since the deletion at which a room is looked for; found there at those in `found`.
fn looks(window: u64, found: &[u64]) -> Vec<u64> {
    let start = Instant::now();
    let mut watch = RecheckSchedule::new(start, Duration::from_secs(window));
    let mut looks = Vec::new();
    while let Some(at) = watch.next {
        let second = (at - start).as_secs();
        looks.push(second);
        if found.contains(&second) {
            watch.found(at);
        } else {
            watch.checked(at);
        }
    }
    looks
}

#[test]
fn a_room_in_doubt_is_looked_for_at_growing_intervals_and_at_the_windows_end() {
    assert_eq!(looks(20, &[]), [1, 3, 7, 12, 17, 20]);
    assert_eq!(looks(6, &[]), [1, 3, 6]);
    assert_eq!(looks(0, &[]), [0_u64; 0]);
}

#[test]
fn a_room_that_came_back_is_looked_for_a_whole_window_longer() {
    assert_eq!(looks(20, &[7]), [1, 3, 7, 8, 10, 14, 19, 24, 27]);
}

#[test]
fn a_room_that_keeps_coming_back_holds_the_janitor_for_four_windows_at_most() {
    let always: Vec<u64> = (0..1000).collect();
    assert_eq!(looks(20, &always), [1, 2, 3, 4, 6, 10, 15, 20, 23]);
    assert_eq!(looks(2, &[2, 4, 6, 8]).last(), Some(&8));
}
