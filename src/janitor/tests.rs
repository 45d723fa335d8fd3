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
/// For waits that never run out.
const AMPLE: Duration = Duration::from_secs(10);
/// For deletions that are answered at once, and for windows that are as long as a deletion may take.
const ENOUGH: Duration = Duration::from_millis(500);
/// For windows and deadlines that must run out before the test can end.
const BRIEF: Duration = Duration::from_millis(50);

/// The scripted server's answer to one call.
#[derive(Clone)]
enum ScriptedAnswer {
    Ok(Vec<u8>),
    Refused(u16, &'static str),
    /// No answer, for ever.
    Silence,
}

fn done() -> ScriptedAnswer {
    ScriptedAnswer::Ok(Vec::new())
}

fn rooms(names: &[&str]) -> ScriptedAnswer {
    let room = |name: &&str| proto::Room {
        name: (*name).to_owned(),
        ..proto::Room::default()
    };
    let rooms = names.iter().map(room).collect();
    ScriptedAnswer::Ok(proto::ListRoomsResponse { rooms }.encode_to_vec())
}

fn dispatches(ids: &[&str]) -> ScriptedAnswer {
    let dispatch = |id: &&str| proto::AgentDispatch {
        id: (*id).to_owned(),
        ..proto::AgentDispatch::default()
    };
    let agent_dispatches = ids.iter().map(dispatch).collect();
    ScriptedAnswer::Ok(proto::ListAgentDispatchResponse { agent_dispatches }.encode_to_vec())
}

/// A server that answers each method from its own script and records the calls. The last answer of a script repeats. A
/// method without a script gets an empty message, which means: done, no rooms, no dispatches.
struct ScriptedServer {
    api: Api,
    calls: Arc<Mutex<Vec<String>>>,
    _serving: JoinSet<()>,
}

impl ScriptedServer {
    async fn start(script: &[(&str, &[ScriptedAnswer])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut script: HashMap<String, Vec<ScriptedAnswer>> = script
            .iter()
            .map(|(method, answers)| ((*method).to_owned(), answers.to_vec()))
            .collect();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let recorded = Arc::clone(&calls);
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
                recorded.lock().unwrap().push(method);
                match answer {
                    ScriptedAnswer::Ok(body) => respond(stream, 200, "protobuf", &body).await,
                    ScriptedAnswer::Refused(status, code) => {
                        let body = format!(r#"{{"code":"{code}","msg":"as scripted"}}"#);
                        respond(stream, status, "json", body.as_bytes()).await;
                    }
                    ScriptedAnswer::Silence => silent.push(stream),
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
        janitor.lease(RoomName(ROOM.to_owned()), self.api.clone(), cleanup, window)
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

/// Reads one request and returns its Twirp method.
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
    let unconfirmed = janitor.close(Instant::now() + within).await;
    let why = |unconfirmed: UnconfirmedRoom| {
        assert_eq!(unconfirmed.room.0, ROOM);
        unconfirmed.why
    };
    unconfirmed.into_iter().map(why).collect()
}

fn is_deleted(deletion: &Deletion) -> bool {
    matches!(deletion, Deletion::Deleted { .. })
}

#[tokio::test]
async fn dispatch_is_deleted_before_the_room_and_a_connected_agent_needs_only_a_short_recheck() {
    let server = ScriptedServer::start(&[]).await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, AMPLE, 2 * AMPLE);
    lease.dispatched("AD_1".to_owned());
    lease.agents_connected(true);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    let calls = server.calls().join(" ");
    assert_eq!(calls, "DeleteDispatch DeleteRoom ListRooms ListRooms");
}

/// Seen on livekit-server 1.13.5: an agent that was connecting again when the room was deleted re-created it 0.4 s later.
#[tokio::test]
async fn room_that_a_reconnecting_agent_re_created_is_deleted_again() {
    let server = ScriptedServer::start(&[("ListRooms", &[rooms(&[ROOM]), rooms(&[])])]).await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, AMPLE, AMPLE);
    lease.dispatched("AD_1".to_owned());
    lease.agents_connected(true);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    let calls = server.calls().join(" ");
    let expected =
        "DeleteDispatch DeleteRoom ListRooms ListDispatch DeleteRoom ListRooms ListRooms";
    assert_eq!(calls, expected);
}

#[tokio::test]
async fn room_that_another_agent_was_about_to_join_is_rechecked() {
    let server = ScriptedServer::start(&[]).await;
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
async fn room_that_was_never_created_causes_no_request() {
    let server = ScriptedServer::start(&[]).await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, AMPLE, AMPLE);
    lease.not_created();
    assert_eq!(lease.delete().await, Deletion::NothingThere);
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    assert_eq!(server.calls(), [""; 0]);
}

#[tokio::test]
async fn panic_cancel_or_a_dropped_delete_still_deletes_the_room() {
    for end in ["panic", "cancel", "half a delete"] {
        let server = ScriptedServer::start(&[]).await;
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
async fn room_whose_creation_was_in_flight_when_its_lease_was_dropped_is_deleted_when_it_appears() {
    let server = ScriptedServer::start(&[
        (
            "DeleteRoom",
            &[ScriptedAnswer::Refused(404, "not_found"), done()],
        ),
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
async fn without_a_connected_agent_all_listed_dispatches_are_deleted() {
    let server = ScriptedServer::start(&[
        ("ListDispatch", &[dispatches(&["AD_1", "AD_2"])]),
        (
            "DeleteDispatch",
            &[ScriptedAnswer::Refused(404, "not_found")],
        ),
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
async fn dispatch_with_an_unknown_id_is_deleted_although_its_agent_is_connected() {
    let listed = &[dispatches(&["AD_1"])];
    let server = ScriptedServer::start(&[("ListDispatch", listed)]).await;
    let janitor = Janitor::start();
    let mut lease = server.lease(&janitor, AMPLE, AMPLE);
    lease.agents_connected(true);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    let expected = ["ListDispatch", "DeleteDispatch", "DeleteRoom"];
    assert_eq!(server.calls()[..3], expected);
}

/// An agent whose connection was up comes back after a crash of the server, or after its own network was down.
#[tokio::test]
async fn room_is_watched_although_its_agent_was_connected_if_the_deletion_may_not_have_reached_it()
{
    let not_found = [ScriptedAnswer::Refused(404, "not_found"), done()];
    for (lost_sight, deletions) in [(true, &[done()][..]), (false, &not_found)] {
        let server = ScriptedServer::start(&[
            ("DeleteRoom", deletions),
            ("ListRooms", &[rooms(&[ROOM]), rooms(&[])]),
        ])
        .await;
        let janitor = Janitor::start();
        let mut lease = server.lease(&janitor, ENOUGH, BRIEF);
        lease.dispatched("AD_1".to_owned());
        lease.agents_connected(true);
        if lost_sight {
            lease.lost_sight();
        }
        assert!(is_deleted(&lease.delete().await));
        assert_eq!(close(janitor, AMPLE).await, [""; 0]);
        let calls = server.calls().join(" ");
        let expected = "DeleteDispatch DeleteRoom ListRooms ListDispatch DeleteRoom ListRooms";
        assert_eq!(calls, expected, "lost sight: {lost_sight}");
    }
}

#[tokio::test]
async fn room_that_a_late_agent_re_created_is_deleted_again() {
    let server = ScriptedServer::start(&[("ListRooms", &[rooms(&[ROOM]), rooms(&[])])]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, ENOUGH, BRIEF);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    let deletion = "ListDispatch DeleteRoom ListRooms";
    let calls = server.calls().join(" ");
    assert_eq!(calls, format!("{deletion} {deletion}"));
}

#[tokio::test]
async fn room_that_comes_back_twice_stays_open_until_the_jobs_that_re_create_it_have_ended() {
    let back = rooms(&[ROOM]);
    let server = ScriptedServer::start(&[("ListRooms", &[back.clone(), back, rooms(&[])])]).await;
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
async fn transient_fault_is_retried_and_a_permanent_refusal_is_not() {
    let unavailable = ScriptedAnswer::Refused(503, "unavailable");
    let denied = ScriptedAnswer::Refused(403, "permission_denied");
    let deletions = &[unavailable.clone(), unavailable, denied];
    let server = ScriptedServer::start(&[("DeleteRoom", deletions)]).await;
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
async fn room_is_reported_as_not_deleted_if_the_server_does_not_answer() {
    let silence = &[ScriptedAnswer::Silence];
    let methods = ["ListDispatch", "DeleteRoom", "ListRooms"];
    let server = ScriptedServer::start(&methods.map(|method| (method, &silence[..]))).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, BRIEF, BRIEF);
    let Deletion::NotDeleted { why } = lease.delete().await else {
        panic!("reported as deleted")
    };
    assert!(why.starts_with("no answer within"), "{why}");
    let left = close(janitor, AMPLE).await;
    assert_eq!(left, [format!("not deleted: {why}")]);
}

#[tokio::test]
async fn room_whose_deletion_failed_is_reported_at_once() {
    let server = ScriptedServer::start(&[("DeleteRoom", &[ScriptedAnswer::Silence])]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, BRIEF, Duration::from_hours(1));
    let deletion = lease.delete().await;
    assert!(!is_deleted(&deletion), "{deletion:?}");
    let left = close(janitor, Duration::from_hours(1)).await;
    assert!(left[0].starts_with("not deleted: no answer"), "{left:?}");
}

#[tokio::test]
async fn room_whose_deletion_failed_is_deleted_when_the_server_is_back() {
    let server = ScriptedServer::start(&[
        ("DeleteRoom", &[ScriptedAnswer::Silence, done()]),
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
async fn close_before_the_end_of_the_window_reports_the_unconfirmed_rooms() {
    let server = ScriptedServer::start(&[]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, AMPLE, Duration::from_mins(1));
    assert!(is_deleted(&lease.delete().await));
    let left = close(janitor, BRIEF).await;
    let why = "deleted, but re-checked for only 0 of 60 s: a late agent would re-create it";
    assert_eq!(left, [why]);
}

#[tokio::test]
async fn room_whose_last_recheck_failed_is_unconfirmed() {
    let denied = &[ScriptedAnswer::Refused(403, "permission_denied")];
    let server = ScriptedServer::start(&[("ListRooms", denied)]).await;
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
async fn close_while_a_probe_still_holds_its_room_reports_it() {
    let server = ScriptedServer::start(&[]).await;
    let janitor = Janitor::start();
    let lease = server.lease(&janitor, AMPLE, AMPLE);
    assert_eq!(close(janitor, BRIEF).await, ["its probe is still running"]);
    drop(lease);
}

/// A janitor, and the results that it reports.
fn janitor_with_results() -> (Janitor, Arc<Mutex<Vec<String>>>) {
    let results = Arc::new(Mutex::new(Vec::new()));
    let recorded = Arc::clone(&results);
    let janitor = Janitor::start_with(Arc::new(
        move |room: &RoomName, result: CleanupResult<'_>| {
            recorded.lock().unwrap().push(format!("{room} {result:?}"));
        },
    ));
    (janitor, results)
}

#[tokio::test]
async fn room_is_reported_gone_only_after_its_rechecks() {
    let server = ScriptedServer::start(&[("ListRooms", &[rooms(&[ROOM]), rooms(&[])])]).await;
    let (janitor, results) = janitor_with_results();
    let lease = server.lease(&janitor, ENOUGH, BRIEF);
    assert!(is_deleted(&lease.delete().await));
    assert_eq!(*results.lock().unwrap(), [""; 0]);
    assert_eq!(close(janitor, AMPLE).await, [""; 0]);
    assert_eq!(*results.lock().unwrap(), ["canary-test-1 Gone"]);
}

#[tokio::test]
async fn unconfirmed_room_is_reported_as_unconfirmed_and_one_that_was_never_created_as_gone() {
    let denied = &[ScriptedAnswer::Refused(403, "permission_denied")];
    let server = ScriptedServer::start(&[("ListRooms", denied)]).await;
    let (janitor, results) = janitor_with_results();
    drop(server.lease(&janitor, ENOUGH, BRIEF));
    assert_eq!(close(janitor, AMPLE).await.len(), 1);
    let result = results.lock().unwrap()[0].clone();
    assert!(
        result.contains("Unconfirmed") && result.contains("403"),
        "{result}"
    );

    let (janitor, results) = janitor_with_results();
    let mut lease = server.lease(&janitor, ENOUGH, BRIEF);
    lease.not_created();
    lease.delete().await;
    close(janitor, AMPLE).await;
    assert_eq!(*results.lock().unwrap(), ["canary-test-1 Gone"]);
}

#[tokio::test]
async fn sweep_deletes_existing_rooms_and_reports_those_that_it_could_not_delete() {
    let server = ScriptedServer::start(&[(
        "DeleteRoom",
        &[
            done(),
            ScriptedAnswer::Refused(404, "not_found"),
            ScriptedAnswer::Refused(403, "permission_denied"),
        ],
    )])
    .await;
    let janitor = Janitor::start();
    let names = ["one", "two", "three"].map(|name| RoomName(name.to_owned()));
    let mut swept = SweepResult::default();
    // One after the other, because the script sets the order of the answers.
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
async fn sweep_of_many_rooms_deletes_all_of_them() {
    let server = ScriptedServer::start(&[]).await;
    let janitor = Janitor::start();
    let names: Vec<RoomName> = (0..20).map(|n| RoomName(format!("room-{n}"))).collect();
    let swept = janitor.sweep(&server.api, names.clone()).await;
    assert_eq!((swept.deleted, swept.unconfirmed), (names, Vec::new()));
    let calls = server.calls();
    let deletions = calls.iter().filter(|call| *call == "DeleteRoom");
    assert_eq!(deletions.count(), 20);
}

/// The seconds after the deletion at which the room is re-checked, if it exists at the seconds in `found`.
fn rechecks(window: u64, found: &[u64]) -> Vec<u64> {
    let start = Instant::now();
    let mut schedule = RecheckSchedule::new(start, Duration::from_secs(window));
    let mut rechecks = Vec::new();
    while let Some(at) = schedule.next {
        let second = (at - start).as_secs();
        rechecks.push(second);
        if found.contains(&second) {
            schedule.room_found(at);
        } else {
            schedule.room_absent(at);
        }
    }
    rechecks
}

#[test]
fn room_is_rechecked_at_growing_intervals_and_at_the_end_of_the_window() {
    assert_eq!(rechecks(20, &[]), [1, 3, 7, 12, 17, 20]);
    assert_eq!(rechecks(6, &[]), [1, 3, 6]);
    assert_eq!(rechecks(0, &[]), [0_u64; 0]);
}

#[test]
fn room_that_came_back_is_rechecked_for_another_whole_window() {
    assert_eq!(rechecks(20, &[7]), [1, 3, 7, 8, 10, 14, 19, 24, 27]);
}

#[test]
fn room_that_keeps_coming_back_holds_the_janitor_for_at_most_four_windows() {
    let always: Vec<u64> = (0..1000).collect();
    assert_eq!(rechecks(20, &always), [1, 2, 3, 4, 6, 10, 15, 20, 23]);
    assert_eq!(rechecks(2, &[2, 4, 6, 8]).last(), Some(&8));
}
