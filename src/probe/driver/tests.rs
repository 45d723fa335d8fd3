use std::sync::Mutex;

use secrecy::SecretString;
use strum::VariantArray as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use url::Url;

use super::*;
use crate::config::DispatchMode;
use crate::livekit::wire::token::Keys;
use crate::probe::{Milestone, Outcome, Reason};

/// A server API that gives every call the same answer, and records the calls.
struct FixedApi {
    url: Url,
    calls: Arc<Mutex<Vec<String>>>,
    _task: JoinSet<()>,
}

const EMPTY_OK: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\ncontent-length: 0\r\n\r\n";
const EMPTY_PAGE: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 0\r\n\r\n";
const MOVED: &str =
    "HTTP/1.1 301 Moved Permanently\r\nlocation: https://lk.example/\r\ncontent-length: 0\r\n\r\n";
const LIMIT: &str =
    "HTTP/1.1 429 Too Many Requests\r\nretry-after: 7\r\ncontent-length: 9\r\n\r\nslow down";
/// As upstream's mock of LiveKit Cloud answers in a region that the project is not pinned to.
const PINNED: &str = "HTTP/1.1 451 Unavailable For Legal Reasons\r\ncontent-length: 35\r\n\r\nproject not allowed in this region.";

impl FixedApi {
    async fn start(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let calls = Arc::default();
        let mut task = JoinSet::new();
        task.spawn(serve(listener, answer, Arc::clone(&calls)));
        Self {
            url: url.parse().unwrap(),
            calls,
            _task: task,
        }
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

async fn serve(listener: TcpListener, answer: &str, calls: Arc<Mutex<Vec<String>>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let method = read_request(stream, answer).await;
        calls.lock().unwrap().push(method);
    }
}

/// Reads one request to its end and answers it. A socket that is closed with unread bytes would reset the connection.
async fn read_request(mut stream: TcpStream, answer: &str) -> String {
    let mut request = Vec::new();
    let mut length_due = usize::MAX;
    while request.len() < length_due {
        assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
        let text = String::from_utf8_lossy(&request);
        if let Some((head, _)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            let body: usize = length.map_or(0, |length| length.parse().unwrap());
            length_due = head.len() + 4 + body;
        }
    }
    stream.write_all(answer.as_bytes()).await.unwrap();
    let text = String::from_utf8_lossy(&request);
    let path = text.split(' ').nth(1).unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

fn context(url: &Url) -> Context {
    let (key, secret) = ("devkey", SecretString::from("secret"));
    let endpoint = Endpoint::new(url, None).unwrap();
    let keys = Keys::new(key, secret.clone()).unwrap();
    let mut target = Target {
        agent_name: Some("support".to_owned()),
        ..Target::default()
    };
    target.deadlines.cleanup = Duration::from_millis(300);
    Context {
        project: Arc::new(Project {
            url: url.clone(),
            api_key: key.into(),
            api_secret: secret,
            credential_files: crate::config::CredentialFiles::default(),
            ca_file: None,
            cloud_project: None,
            ice: crate::config::Ice::default(),
            api_timeout: Duration::from_secs(5),
            max_rooms: 1,
            budget: crate::config::Budget::default(),
            backoff: crate::config::Backoff::default(),
        }),
        target: Arc::new(target),
        api: Api::new(endpoint.clone(), keys, Duration::from_secs(5)),
        endpoint,
        janitor: Janitor::start(),
        stalls: crate::stall::tests::manual().0,
        recordings: None,
        agent_known: false,
        fault: None,
    }
}

struct StartedProbe {
    driver: Driver,
    abort: CancellationToken,
    events: mpsc::UnboundedReceiver<ProbeEvent>,
    _hold: watch::Sender<Option<Instant>>,
}

fn start(url: &Url) -> StartedProbe {
    start_with(context(url))
}

fn start_with(context: Context) -> StartedProbe {
    let (hold, until) = watch::channel(None);
    let (events_tx, events) = mpsc::unbounded_channel();
    let emit = Box::new(move |event| events_tx.send(event).unwrap());
    let abort = CancellationToken::new();
    let room = RoomName("canary-test".to_owned());
    StartedProbe {
        driver: Driver::new(context, room, Position::First, until, abort.clone(), emit),
        abort,
        events,
        _hold: hold,
    }
}

fn reason(report: &ProbeReport) -> Reason {
    match &report.outcome {
        Outcome::Failed(failure) => failure.reason,
        other => panic!("not failed but {other:?}"),
    }
}

#[tokio::test]
async fn refused_room_is_reported_with_evidence() {
    let server = FixedApi::start(LIMIT).await;
    let started = start(&server.url);
    let report = started.driver.run_to_end().await;
    assert_eq!(reason(&report).label(), "plan_limit");
    assert_eq!(report.evidence.retry_after_seconds, Some(7.0));
    assert_eq!(report.timeline.get(Milestone::RoomDeleted), None);
    assert_eq!(server.calls(), ["CreateRoom"]);
}

#[tokio::test]
async fn room_that_was_never_created_is_not_deleted() {
    for answer in [PINNED, EMPTY_PAGE, MOVED] {
        let server = FixedApi::start(answer).await;
        let report = start(&server.url).driver.run_to_end().await;
        assert_eq!(reason(&report), Reason::ConfigRejected, "{answer}");
        assert_eq!(report.timeline.get(Milestone::RoomDeleted), None);
        let notes = report.evidence.notes.join("\n");
        assert!(!notes.contains("not deleted"), "{notes}");
        assert_eq!(server.calls(), ["CreateRoom"], "{answer}");
    }
}

#[tokio::test]
async fn unreachable_server_decides_join_and_outcome_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let mut started = start(&url.parse().unwrap());
    let report = started.driver.run_to_end().await;
    assert_eq!(reason(&report), Reason::Unreachable);
    let mut events = Vec::new();
    started
        .events
        .recv_many(&mut events, ProbeEvent::max_per_probe(1))
        .await;
    assert!(
        matches!(
            events.as_slice(),
            [
                ProbeEvent::Reached {
                    milestone: Milestone::Started,
                    ..
                },
                ProbeEvent::JoinDecided { joined: false },
                ProbeEvent::OutcomeDecided { .. },
            ]
        ),
        "{events:?}"
    );
}

#[tokio::test]
async fn probe_starts_on_the_wall_clock_when_its_task_first_runs() {
    let server = FixedApi::start(LIMIT).await;
    let (_hold, until) = watch::channel(None);
    let room = RoomName("canary-test".to_owned());
    let probe = run(
        context(&server.url),
        room,
        Position::First,
        until,
        CancellationToken::new(),
        Box::new(|_| {}),
    );
    sleep(Duration::from_millis(2)).await;
    let before = Utc::now().trunc_subsecs(6);
    let report = probe.await;
    assert!(before <= report.started_at && report.started_at <= Utc::now());
}

#[tokio::test]
async fn aborted_probe_deletes_its_room_after_the_calls_that_could_create_it() {
    let server = FixedApi::start(EMPTY_OK).await;
    let started = start(&server.url);
    started.abort.cancel();
    let report = started.driver.run_to_end().await;
    assert_eq!(report.outcome, Outcome::Aborted);
    assert!(report.timeline.get(Milestone::RoomDeleted).is_some());
    let calls = server.calls();
    assert_eq!(calls.first().map(String::as_str), Some("CreateRoom"));
    assert_eq!(calls.last().map(String::as_str), Some("DeleteRoom"));
}

#[tokio::test(start_paused = true)]
async fn aborted_probe_reports_in_time_even_if_the_server_hangs() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut context = context(&url.parse().unwrap());
    context.target = Arc::new(Target::default());
    let janitor = context.janitor.clone();
    let started = start_with(context);
    started.abort.cancel();
    let begun = Instant::now();
    let report = started.driver.run_to_end().await;
    assert_eq!(report.outcome, Outcome::Aborted);
    assert_eq!(report.timeline.get(Milestone::RoomDeleted), None);
    assert_eq!(begun.elapsed().as_secs(), ABORT_TIMEOUT.as_secs());
    // The janitor still owns the room.
    let left = janitor.close(Instant::now()).await;
    assert_eq!(left.len(), 1, "{left:?}");
}

#[tokio::test]
async fn panic_is_internal_and_the_room_is_still_deleted() {
    let server = FixedApi::start(EMPTY_OK).await;
    let mut started = start(&server.url);
    started.driver.call(async { panic!("of a test") });
    let report = started.driver.run_to_end().await;
    assert_eq!(reason(&report), Reason::Internal);
    assert!(report.timeline.get(Milestone::RoomDeleted).is_some());
    assert_eq!(
        server.calls().last().map(String::as_str),
        Some("DeleteRoom")
    );
}

#[tokio::test]
async fn probe_that_panics_twice_still_reports() {
    let server = FixedApi::start(EMPTY_OK).await;
    let mut started = start(&server.url);
    started.driver.call(async { panic!("of a test") });
    started.driver.call(async { panic!("of a test, again") });
    let report = started.driver.run_to_end().await;
    assert_eq!(reason(&report), Reason::Internal);
}

#[tokio::test]
async fn hold_is_over_if_its_sender_is_gone() {
    let (hold, until) = watch::channel(None);
    let mut until = Some(until);
    drop(hold);
    assert!(changed(&mut until).await.is_some());
    assert!(until.is_none());
}

#[tokio::test]
async fn request_that_creates_the_room_names_the_agent_as_the_mode_requires() {
    let url = "http://127.0.0.1:1".parse().unwrap();
    for mode in DispatchMode::VARIANTS {
        let (in_room, in_token) = match mode {
            DispatchMode::Explicit => (false, None),
            DispatchMode::Room => (true, None),
            DispatchMode::Token => (true, Some(true)),
            DispatchMode::Automatic => (false, Some(false)),
        };
        let mut started = start(&url);
        let mut target = Target::clone(&started.driver.context.target);
        target.dispatch.mode = *mode;
        target.dispatch.deployment = "staging".to_owned();
        target.dispatch.metadata = "vip".to_owned();
        started.driver.context.target = Arc::new(target);
        let driver = &started.driver;

        let agent = NamedAgent {
            name: "support".to_owned(),
            deployment: "staging".to_owned(),
            metadata: "vip".to_owned(),
        };
        let expected = Vec::from_iter(in_room.then_some(agent));
        let target = &driver.context.target;
        assert_eq!(new_room(target, &driver.room).agents, expected, "{mode:?}");
        let config = driver.join_request().room_config;
        assert_eq!(
            config.as_ref().map(|config| config
                .agents
                .iter()
                .any(|agent| agent.agent_name == "support"
                    && agent.deployment == "staging"
                    && agent.metadata == "vip")),
            in_token,
            "{mode:?}"
        );
        let metadata = config.map(|config| config.metadata);
        assert_eq!(metadata, in_token.map(|_| r#"{"canary":true}"#.to_owned()));
    }
}

/// The deadline passed and the answers came while the process was stopped: nothing of it is the server's fault.
#[tokio::test]
async fn probe_that_spans_a_stall_of_this_process_is_internal_whatever_its_next_input_is() {
    let api = FixedApi::start(LIMIT).await;
    let (stalls, clock) = crate::stall::tests::manual();
    let context = Context {
        stalls,
        ..context(&api.url)
    };
    let probe = start_with(context);
    clock.store(12_000, std::sync::atomic::Ordering::Relaxed);
    let report = probe.driver.run_to_end().await;
    let failure = report.outcome.failure().unwrap();
    assert_eq!(failure.reason, Reason::Internal);
    assert_eq!(
        failure.detail,
        "the canary itself did not run for 12.0 s of this call, so the call shows nothing about the agent. Check whether \
         this process was stopped, its machine was suspended or stalled, or it got too little CPU."
    );
    for span in crate::probe::Span::ALL {
        assert_eq!(report.timeline.span(span), None, "{span:?}");
    }
}

#[tokio::test]
async fn stall_before_the_start_of_a_probe_does_not_concern_it() {
    let api = FixedApi::start(LIMIT).await;
    let (stalls, clock) = crate::stall::tests::manual();
    clock.store(12_000, std::sync::atomic::Ordering::Relaxed);
    let context = Context {
        stalls,
        ..context(&api.url)
    };
    let report = start_with(context).driver.run_to_end().await;
    let reason = report.outcome.failure().unwrap().reason;
    assert!(matches!(reason, Reason::PlanLimit(_)), "{reason:?}");
}
