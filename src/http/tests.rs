//! The server at its socket: the responses to clients, to hostile web pages and to broken peers.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use flate2::read::GzDecoder;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use strum::VariantArray;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion, crypto, version,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;

use super::routes::{ChangeRouteKind, ReadRouteKind};
use super::*;
use crate::config;
use crate::history::{History, LastBatch};
use crate::livekit::RoomName;
use crate::livekit::event::TranscriptText;
use crate::metrics::{Build, Metrics};
use crate::probe::{Failure, Milestone, Outcome, ProbeEvent, Reason};
use crate::recording;
use crate::report::sample::{mixed, project};

/// The beginning of a line that every scrape has.
const SERIES: &str = "\nlivekit_canary_history_degraded ";
/// Ends a test that hangs. No test waits this long otherwise.
const TEST_TIMEOUT: Duration = Duration::from_mins(2);

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(1_790_000_000 + seconds)
}

fn status() -> Status {
    Status {
        version: "1.2.3",
        started_at: at(0),
        stage: DaemonStage::Running,
        targets: vec![TargetStatus {
            name: "support".to_owned(),
            project: "acme".to_owned(),
            url: "wss://acme.livekit.cloud".to_owned(),
            agent_name: Some("support-agent".to_owned()),
            dispatch: "explicit",
            schedule: "every 15m".to_owned(),
            rooms: 3,
            worst_case_seconds: 360,
            objectives: ObjectivesStatus {
                join_within_seconds: 5.0,
                first_speech_within_seconds: 8.0,
                reply_within_seconds: 5.0,
            },
            paused: false,
            state: "failing",
            state_since: "2026-11-24T12:01:00Z".parse().unwrap(),
            incident: Some("20261124T120000Z-support".to_owned()),
            confirming: None,
            running: None,
            next_batch_at: Some(at(900)),
            last_tick_at: Some(at(0)),
            last_batch: Some(LastBatch {
                batch_id: "20260921T132640-abcde-wxyz".to_owned(),
                started_at: at(1),
                ended_at: at(40),
                result: "ok".to_owned(),
                ok: 3,
                failed: 0,
                aborted: 0,
            }),
            held_back: None,
        }],
        projects: vec![ProjectStatus {
            name: "acme".to_owned(),
            url: "wss://acme.livekit.cloud".to_owned(),
            max_rooms: 5,
            rooms_in_flight: 2,
            backoff_until: None,
            budgets: vec![BudgetStatus {
                period: "day",
                used_seconds: 180,
                reserved_seconds: 240,
                limit_seconds: Some(3600),
            }],
        }],
        last_reload: None,
    }
}

/// A server, and the daemon's side of its channels, which the test plays.
struct HttpFixture {
    address: SocketAddr,
    metrics: Metrics,
    status: watch::Sender<Arc<Status>>,
    health: Health,
    control: mpsc::Receiver<Control>,
    progress: LiveProgress,
    history: History,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
    _state: TempDir,
}

impl HttpFixture {
    async fn start() -> Self {
        Self::with(&config::Http::default(), Ipv4Addr::LOCALHOST).await
    }

    async fn with_web(http: &config::Http) -> Self {
        Self::with(http, Ipv4Addr::LOCALHOST).await
    }

    async fn with(http: &config::Http, ip: impl Into<IpAddr>) -> Self {
        let listener = TcpListener::bind((ip.into(), 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (status, status_receiver) = watch::channel(Arc::new(status()));
        let (control_sender, control) = mpsc::channel(1);
        let health = Health::default();
        let build = Build {
            version: "1.2.3".to_owned(),
            revision: "0a1b2c3".to_owned(),
            rustc: "1.95.0".to_owned(),
            engine: "native".to_owned(),
        };
        let metrics = Metrics::new(&build, false);
        let state = tempfile::tempdir().unwrap();
        let history = History::open(&config::HistorySettings {
            dir: state.path().to_owned(),
            ..config::HistorySettings::default()
        })
        .unwrap();
        let progress = LiveProgress::default();
        let sources = Sources {
            metrics: metrics.clone(),
            status: status_receiver,
            health: health.clone(),
            history: history.clone(),
            control: control_sender,
            progress: progress.clone(),
        };
        let web = WebConfig::load(http).unwrap();
        let shutdown = CancellationToken::new();
        Self {
            address: (Ipv4Addr::LOCALHOST, port).into(),
            metrics,
            status,
            health,
            control,
            progress,
            history,
            shutdown: shutdown.clone(),
            task: tokio::spawn(serve(listener, web, sources, shutdown)),
            _state: state,
        }
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn get(&self, path: &str) -> ClientReply {
        self.send(request(Method::GET, path)).await
    }

    async fn post(&self, path: &str) -> ClientReply {
        self.send(request(Method::POST, path)).await
    }

    /// Sends one request on a connection of its own.
    async fn send(&self, request: Request<Full<Bytes>>) -> ClientReply {
        send_on(self.tcp().await, request).await
    }

    /// Sends a POST, and passes the request that the daemon receives to `daemon`.
    async fn post_to_daemon(&mut self, path: &str, daemon: impl FnOnce(Control)) -> ClientReply {
        let sent = send_on(self.tcp().await, request(Method::POST, path));
        let handled = async { daemon(self.control.recv().await.unwrap()) };
        let (reply, ()) = timeout(TEST_TIMEOUT, async { tokio::join!(sent, handled) })
            .await
            .unwrap();
        reply
    }
}

impl Drop for HttpFixture {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct ClientReply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl ClientReply {
    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        assert_eq!(self.header("content-type"), "application/json");
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The status, and the text of the error.
    fn error(&self) -> (u16, String) {
        let error = self.json()["error"].as_str().unwrap().to_owned();
        (self.status.as_u16(), error)
    }
}

fn request(method: Method, path: &str) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .body(Full::default())
        .unwrap()
}

fn with(
    mut request: Request<Full<Bytes>>,
    name: &'static str,
    value: &str,
) -> Request<Full<Bytes>> {
    request.headers_mut().insert(name, value.parse().unwrap());
    request
}

type ClientSender = SendRequest<Full<Bytes>>;

/// A connection for one request after the other. It is open as long as the returned task.
async fn client(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> (ClientSender, JoinSet<()>) {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async { drop(connection.await) });
    (sender, tasks)
}

async fn send_with(sender: &mut ClientSender, request: Request<Full<Bytes>>) -> ClientReply {
    let (head, body) = sender.send_request(request).await.unwrap().into_parts();
    ClientReply {
        status: head.status,
        headers: head.headers,
        body: body.collect().await.unwrap().to_bytes(),
    }
}

async fn send_on(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> ClientReply {
    let (mut sender, _tasks) = client(stream).await;
    timeout(TEST_TIMEOUT, send_with(&mut sender, request))
        .await
        .unwrap()
}

/// Writes bytes that no client would write, and reads until the server closes.
async fn send_raw(server: &HttpFixture, bytes: &[u8]) -> String {
    let mut stream = server.tcp().await;
    // The server may close before it has read everything.
    stream.write_all(bytes).await.ok();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    timeout(TEST_TIMEOUT, read).await.unwrap().ok();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn every_path_responds_with_its_content_type_and_forbids_storing() {
    let server = HttpFixture::start().await;
    for (path, content_type, part) in [
        (
            "/metrics",
            "text/plain; version=0.0.4; charset=utf-8",
            SERIES,
        ),
        ("/-/healthy", "text/plain; charset=utf-8", "healthy\n"),
        ("/-/ready", "text/plain; charset=utf-8", "ready\n"),
        ("/", "text/html; charset=utf-8", "support-agent"),
        ("/api/v1/targets", "application/json", "support-agent"),
        (
            "/api/v1/batches?limit=1",
            "application/json",
            "{\"batches\":[],\"next_before\":null}\n",
        ),
        (
            "/api/v1/incidents?open=true",
            "application/json",
            "{\"incidents\":[],\"next_before\":null}\n",
        ),
        (
            "/api/v1/probes?outcome=failed&since=2026-09-21T14:00:00Z",
            "application/json",
            "{\"probes\":[],\"next_before\":null}\n",
        ),
        (
            "/api/v1/probes?format=csv",
            "text/csv; charset=utf-8; header=present",
            "room,batch_id,target,",
        ),
        (
            "/api/v1/batches?format=csv",
            "text/csv; charset=utf-8; header=present",
            "batch_id,target,",
        ),
        (
            "/api/v1/events?target=support",
            "application/json",
            "{\"events\":[],\"next_before\":null}\n",
        ),
        (
            "/api/v1/statistics",
            "application/json",
            "\"targets\":[]}\n",
        ),
        // A path outside the API ignores a query, because a scraper may add one.
        (
            "/metrics?a=b",
            "text/plain; version=0.0.4; charset=utf-8",
            SERIES,
        ),
    ] {
        let reply = server.get(path).await;
        assert_eq!(reply.status, StatusCode::OK, "{path}");
        assert_eq!(reply.header("content-type"), content_type, "{path}");
        assert_eq!(reply.header("cache-control"), "no-store", "{path}");
        assert_eq!(reply.header("x-content-type-options"), "nosniff", "{path}");
        assert!(reply.text().contains(part), "{path}: {}", reply.text());
    }
}

#[tokio::test]
async fn recording_is_served_as_a_whole_or_in_part_and_not_to_other_origins() {
    const PATH: &str = "/api/v1/probes/canary-1/audio/agent.ogg";
    let server = HttpFixture::start().await;
    let room = RoomName("canary-1".to_owned());
    let call = recording::sample_call(Duration::from_secs(1));
    let saved = server.history.recordings().save(&room, call).await.unwrap();
    let bytes = saved.agent.unwrap().bytes;

    let whole = server.get(PATH).await;
    assert_eq!(whole.status, StatusCode::OK);
    assert_eq!(whole.body.len() as u64, bytes);
    assert!(whole.body.starts_with(b"OggS"));
    for (name, value) in [
        ("content-type", "audio/ogg"),
        ("accept-ranges", "bytes"),
        ("cache-control", "private, no-cache"),
        ("cross-origin-resource-policy", "same-origin"),
        ("x-content-type-options", "nosniff"),
    ] {
        assert_eq!(whole.header(name), value, "{name}");
    }
    let tag = whole.header("etag").to_owned();

    let head = server.send(request(Method::HEAD, PATH)).await;
    assert_eq!(head.status, StatusCode::OK);
    assert!(head.body.is_empty());
    assert_eq!(head.header("content-length"), bytes.to_string());

    let ranged = |range: &str| with(request(Method::GET, PATH), "range", range);
    let part = server.send(ranged("bytes=100-199")).await;
    assert_eq!(part.status, StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.body, whole.body[100..200]);
    assert_eq!(
        part.header("content-range"),
        format!("bytes 100-199/{bytes}")
    );
    assert_eq!(part.header("etag"), tag);
    let last = server.send(ranged("bytes=-10")).await;
    assert_eq!(last.body, whole.body[whole.body.len() - 10..]);
    let beyond = server.send(ranged(&format!("bytes={bytes}-"))).await;
    assert_eq!(beyond.status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(beyond.header("content-range"), format!("bytes */{bytes}"));
    let unchanged = with(ranged("bytes=0-9"), "if-range", &tag);
    assert_eq!(server.send(unchanged).await.body.len(), 10);
    let changed = with(ranged("bytes=0-9"), "if-range", "\"another\"");
    assert_eq!(server.send(changed).await.body, whole.body);
    let known = with(request(Method::GET, PATH), "if-none-match", &tag);
    let known = server.send(known).await;
    assert_eq!(known.status, StatusCode::NOT_MODIFIED);
    assert!(known.body.is_empty());

    for missing in [
        "/api/v1/probes/canary-1/audio/caller.ogg",
        "/api/v1/probes/canary-2/audio/agent.ogg",
        "/api/v1/probes/../audio/agent.ogg",
        "/api/v1/probes/..%2F..%2Fx/audio/agent.ogg",
    ] {
        let (status, error) = server.get(missing).await.error();
        assert_eq!(status, 404, "{missing}");
        assert!(error.contains("was not recorded"), "{missing}: {error}");
    }
    server.history.recordings().delete([room.0]);
    let (status, error) = server.get(PATH).await.error();
    assert_eq!(status, 404);
    assert!(error.contains("was deleted"), "{error}");
}

#[tokio::test]
async fn head_has_the_headers_of_get_and_no_body() {
    let server = HttpFixture::start().await;
    for path in ["/metrics", "/", "/-/healthy", "/api/v1/targets", "/nowhere"] {
        let get = server.get(path).await;
        let head = server.send(request(Method::HEAD, path)).await;
        assert_eq!(head.status, get.status, "{path}");
        assert!(head.body.is_empty(), "{path}");
        assert_eq!(head.header("content-type"), get.header("content-type"));
        if !["/", "/metrics"].contains(&path) {
            // The bodies of those two change with time.
            assert_eq!(head.header("content-length"), get.body.len().to_string());
        }
    }
}

#[tokio::test]
async fn unknown_path_is_404_and_wrong_method_is_405_with_the_allowed_methods() {
    let server = HttpFixture::start().await;
    for path in [
        "/metrics/",
        "/nowhere",
        "//",
        "/api/v1",
        "/api/v1/targets/",
        "/-/",
        "/api/v1/targets/support",
        "/%2e%2e/metrics",
    ] {
        assert_eq!(server.get(path).await.error().0, 404, "{path}");
        assert_eq!(server.post(path).await.error().0, 404, "{path}");
    }
    for (method, path, allowed) in [
        (Method::POST, "/metrics", "GET, HEAD"),
        (Method::PUT, "/", "GET, HEAD"),
        (Method::OPTIONS, "/api/v1/targets", "GET, HEAD"),
        (Method::DELETE, "/api/v1/events", "GET, HEAD, POST"),
        (Method::GET, "/-/reload", "POST"),
        (Method::HEAD, "/-/reload", "POST"),
        (Method::DELETE, "/api/v1/targets/support/pause", "POST"),
        (
            Method::from_bytes(b"BREW").unwrap(),
            "/-/healthy",
            "GET, HEAD",
        ),
    ] {
        let reply = server.send(request(method.clone(), path)).await;
        assert_eq!(
            (reply.status.as_u16(), reply.header("allow")),
            (405, allowed),
            "{method} {path}"
        );
    }
}

#[tokio::test]
async fn api_names_what_is_missing_and_what_is_wrong_in_a_query() {
    let mut server = HttpFixture::start().await;
    for (path, list) in [
        ("/api/v1/batches/none", "/api/v1/batches"),
        ("/api/v1/probes/none", "/api/v1/probes"),
        ("/api/v1/incidents/none", "/api/v1/incidents"),
        ("/api/v1/targets/none/badge.svg", "/api/v1/targets"),
    ] {
        let (status, error) = server.get(path).await.error();
        assert_eq!(status, 404);
        assert!(error.contains(list), "{error}");
    }
    for path in [
        "/api/v1/batches?limit=many",
        "/api/v1/batches/none?limit=1",
        "/api/v1/targets?name=support",
        "/api/v1/probes/none?x",
        "/api/v1/probes?state=failed",
        "/api/v1/events?until=tomorrow",
        "/api/v1/statistics?days=7",
        "/api/v1/stream?target=support",
        "/api/v1/incidents?open=maybe",
        "/api/v1/incidents/none?open=true",
    ] {
        assert_eq!(server.get(path).await.error().0, 400, "{path}");
    }
    let run = "/api/v1/targets/support/batches?rooms=5";
    let unknown = "query key \"rooms\" is unknown: this path takes no query";
    assert_eq!(server.post(run).await.error(), (400, unknown.to_owned()));
    assert!(server.control.try_recv().is_err());
}

#[tokio::test]
async fn every_route_that_changes_state_takes_only_post_and_every_other_only_get_and_head() {
    let mut server = HttpFixture::start().await;
    let reads = ReadRouteKind::VARIANTS.iter().map(|kind| kind.example());
    for path in reads.clone() {
        // The stream has no end.
        if path == ReadRouteKind::Stream.example() {
            continue;
        }
        let reply = server.get(path).await;
        assert_ne!(reply.status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
        assert!(!reply.text().contains("no such path"), "{path}");
    }
    // This path takes both: its route depends on the method.
    let of_both = |path: &&str| *path == ChangeRouteKind::RecordEvent.example();
    let both = reads.clone().filter(of_both);
    assert_eq!(both.clone().count(), 1);
    let both = both.map(|path| (path, Vec::new(), "GET, HEAD, POST"));
    let reads = reads.filter(move |path| !of_both(path));
    let reads = reads.map(|path| (path, vec![Method::POST], "GET, HEAD"));
    let changes = changes().filter(move |path| !of_both(path));
    let changes = changes.map(|path| (path, vec![Method::GET, Method::HEAD], "POST"));
    let never = [Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];
    for (path, wrong, allowed) in reads.chain(changes).chain(both) {
        for method in wrong.iter().chain(&never) {
            let reply = server.send(request(method.clone(), path)).await;
            assert_eq!(
                (reply.status.as_u16(), reply.header("allow")),
                (405, allowed),
                "{method} {path}"
            );
        }
    }
    assert!(server.control.try_recv().is_err());
}

#[tokio::test]
async fn metrics_are_compressed_if_the_client_accepts_gzip() {
    let server = HttpFixture::start().await;
    for (accept, compressed) in [
        ("gzip", true),
        ("gzip, deflate", true),
        ("deflate, GZIP;q=0.5", true),
        ("*", true),
        ("identity;q=0.1, *;q=1", true),
        ("gzip;q=0", false),
        ("gzip; q=0.000, *", false),
        ("br", false),
        ("identity", false),
        ("", false),
        (";;;,,q=", false),
    ] {
        let sent = with(request(Method::GET, "/metrics"), "accept-encoding", accept);
        let reply = server.send(sent).await;
        assert_eq!(reply.status, StatusCode::OK);
        assert_eq!(reply.header("vary"), "accept-encoding");
        let encoding = reply.header("content-encoding");
        assert_eq!(encoding == "gzip", compressed, "{accept:?}");
        let mut text = String::new();
        if compressed {
            GzDecoder::new(&reply.body[..])
                .read_to_string(&mut text)
                .unwrap();
        } else {
            text.push_str(reply.text());
        }
        assert!(text.contains(SERIES), "{accept:?}: {text}");
    }
}

#[tokio::test]
async fn health_names_the_dead_tasks_and_does_not_depend_on_the_stage() {
    let server = HttpFixture::start().await;
    server.status.send_modify(|status| {
        Arc::make_mut(status).stage = DaemonStage::Draining;
    });
    let pulse = server.health.watch("scheduler", None);
    let _other = server.health.watch("recorder", Some(TEST_TIMEOUT));
    assert_eq!(server.get("/-/healthy").await.status, StatusCode::OK);
    drop(pulse);
    let reply = server.get("/-/healthy").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(reply.text(), "scheduler: the task has ended\n");
}

#[tokio::test]
async fn only_a_running_daemon_is_ready() {
    let server = HttpFixture::start().await;
    let _dead = server.health.watch("recorder", None);
    for (stage, code) in [
        (DaemonStage::Starting, 503),
        (DaemonStage::Running, 200),
        (DaemonStage::Draining, 503),
    ] {
        server
            .status
            .send_modify(|status| Arc::make_mut(status).stage = stage);
        let reply = server.get("/-/ready").await;
        assert_eq!(reply.status.as_u16(), code, "{}", reply.text());
    }
}

#[tokio::test]
async fn targets_are_the_status_of_the_daemon() {
    let server = HttpFixture::start().await;
    let document = server.get("/api/v1/targets").await.json();
    insta::assert_snapshot!(serde_json::to_string_pretty(&document).unwrap());
}

#[tokio::test]
async fn page_escapes_every_text_that_it_shows() {
    const HOSTILE: &str = "<script>\"'&";
    let server = HttpFixture::start().await;
    server.status.send_modify(|status| {
        let status = Arc::make_mut(status);
        let hostile = || HOSTILE.to_owned();
        let target = &mut status.targets[0];
        target.name = hostile();
        target.project = hostile();
        target.agent_name = Some(hostile());
        target.schedule = hostile();
        target.held_back = Some(hostile());
        target.incident = Some(hostile());
        let batch = target.last_batch.as_mut().unwrap();
        batch.batch_id = hostile();
        batch.result = hostile();
        let project = &mut status.projects[0];
        project.name = hostile();
        project.url = hostile();
        project.backoff_until = Some(at(0));
        status.last_reload = Some(LastReload {
            at: at(0),
            ok: false,
            error: Some(hostile()),
        });
    });
    let reply = server.get("/").await;
    let page = reply.text();
    // One script is the page's own.
    assert_eq!(page.matches("<script").count(), 1, "{page}");
    assert!(!page.contains(HOSTILE), "{page}");
    let shown = page.matches("&lt;script&gt;&quot;'&amp;").count();
    assert_eq!(shown, 16, "{page}");
    let policy = reply.header("content-security-policy");
    assert!(policy.starts_with("default-src 'none';"), "{policy}");
}

#[tokio::test]
async fn response_to_reload_has_its_result() {
    let mut server = HttpFixture::start().await;
    let answer = |answer: Result<Vec<String>, ReloadRefused>| {
        |control| match control {
            Control::Reload { reply } => reply.send(answer).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let reply = server
        .post_to_daemon(
            "/-/reload",
            answer(Ok(vec!["target \"sales\" added".to_owned()])),
        )
        .await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(
        reply.json(),
        json!({ "reloaded": true, "changes": ["target \"sales\" added"] })
    );

    let problems = "error: target \"a\": batch.rooms: 0 is too few\nhint: 1 or more".to_owned();
    let invalid = answer(Err(ReloadRefused::Invalid(problems.clone())));
    let reply = server.post_to_daemon("/-/reload", invalid).await;
    assert_eq!(reply.error(), (422, problems));

    let late = answer(Err(ReloadRefused::ShuttingDown));
    let reply = server.post_to_daemon("/-/reload", late).await;
    assert_eq!(
        reply.error(),
        (503, "the canary is shutting down".to_owned())
    );
}

#[tokio::test]
async fn batch_is_accepted_or_refused_with_a_reason() {
    const PATH: &str = "/api/v1/targets/support/batches";
    let mut server = HttpFixture::start().await;
    let answer = |answer: Result<&str, BatchRefused>| {
        let answer = answer.map(str::to_owned);
        |control| match control {
            Control::RunBatch { target, reply } => {
                assert_eq!(target, "support");
                reply.send(answer).unwrap();
            }
            other => panic!("{other:?}"),
        }
    };
    let reply = server.post_to_daemon(PATH, answer(Ok("some-batch"))).await;
    assert_eq!(reply.status, StatusCode::ACCEPTED);
    assert_eq!(reply.json(), json!({ "batch_id": "some-batch" }));
    assert_eq!(reply.header("location"), "/api/v1/batches/some-batch");

    let refused = |retry_after| BatchRefused::Refused {
        text: "the project backs off".to_owned(),
        retry_after,
    };
    let busy = BatchRefused::Busy {
        batch_id: "some-batch".to_owned(),
    };
    for (refusal, code, text, retry_after) in [
        (busy, 409, "batch some-batch of this target", ""),
        (refused(None), 429, "the project backs off", ""),
        (
            refused(Some(Duration::from_millis(1200))),
            429,
            "the project backs off",
            "2",
        ),
        (
            BatchRefused::NoSuchTarget(NoSuchTarget),
            404,
            "no target has",
            "",
        ),
        (BatchRefused::ShuttingDown, 503, "shutting down", ""),
    ] {
        let reply = server.post_to_daemon(PATH, answer(Err(refusal))).await;
        let (status, error) = reply.error();
        assert_eq!((status, reply.header("retry-after")), (code, retry_after));
        assert!(error.contains(text), "{error}");
    }
}

#[tokio::test]
async fn event_is_kept_and_listed_and_a_mistake_in_it_is_named() {
    let server = HttpFixture::start().await;
    let post = async |body: String| {
        let sent = request(Method::POST, "/api/v1/events").map(|_| Full::from(body));
        server.send(sent).await
    };
    let sent = json!({"kind": "deploy", "text": " deployed 1.2.3 ", "target": "support", "at": "2026-09-21T14:00:00+02:00"});
    let reply = post(sent.to_string()).await;
    assert_eq!(reply.status, StatusCode::CREATED, "{}", reply.text());
    let event = reply.json();
    let id = event["id"].as_str().unwrap();
    assert_eq!(
        event,
        json!({"id": id, "at": "2026-09-21T12:00:00Z", "target": "support", "kind": "deploy", "text": "deployed 1.2.3"})
    );
    let before = Utc::now() - TimeDelta::seconds(1);
    let now = post(json!({"kind": "note", "text": "<b>"}).to_string())
        .await
        .json();
    let at: DateTime<Utc> = now["at"].as_str().unwrap().parse().unwrap();
    assert!((before..=Utc::now()).contains(&at), "{now}");
    assert_eq!(now["target"], Value::Null);
    let list = server.get("/api/v1/events?limit=1").await.json();
    assert_eq!(list["events"], json!([now]));
    let next = list["next_before"].as_str().unwrap();
    let list = server
        .get(&format!("/api/v1/events?before={next}"))
        .await
        .json();
    assert_eq!(list, json!({"events": [event], "next_before": null}));
    let text = |text: &str| json!({"kind": "deploy", "text": text}).to_string();
    let kind = |kind: &str| json!({"kind": kind, "text": "x"}).to_string();
    for (body, code, expected) in [
        (String::new(), 400, "the body is no event"),
        ("[]".to_owned(), 400, "expected {\"kind\""),
        ("{\"text\": \"x\"}".to_owned(), 400, "missing field `kind`"),
        (
            json!({"kind": "a", "text": "b", "txet": 1}).to_string(),
            400,
            "unknown field `txet`",
        ),
        (kind(""), 400, "kind: use 1 to 32 characters"),
        (kind("Big Deploy"), 400, "kind: use 1 to 32 characters"),
        (kind(&"k".repeat(33)), 400, "kind: use 1 to 32 characters"),
        (
            text("  "),
            400,
            "text: use one line of 1 to 200 characters; this one has 0",
        ),
        (text(&"é".repeat(201)), 400, "this one has 201"),
        (text("two\nlines"), 400, "text: use one line"),
        (
            json!({"kind": "a", "text": "b", "target": "other"}).to_string(),
            404,
            "target: no target has this name",
        ),
        (
            json!({"kind": "a", "text": "b", "at": "yesterday"}).to_string(),
            400,
            "the body is no event",
        ),
        (
            json!({"kind": "a", "text": "b", "at": Utc::now() + TimeDelta::hours(2)}).to_string(),
            400,
            "at: use a time in the past",
        ),
        (text(&"x".repeat(5000)), 413, "longer than 4096 bytes"),
    ] {
        let (status, error) = post(body.clone()).await.error();
        assert_eq!(status, code, "{body}");
        assert!(error.contains(expected), "{body}: {error}");
    }
    let longest = text(&"é".repeat(200));
    assert_eq!(post(longest).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn csv_has_a_row_per_probe_and_the_address_of_the_next_page() {
    let server = HttpFixture::start().await;
    record_call(&server).await;
    let first = server
        .get("/api/v1/probes?format=csv&target=support&limit=3&before=9999999999999-1")
        .await;
    assert_eq!(
        first.header("content-disposition"),
        "attachment; filename=\"probes.csv\""
    );
    assert_eq!(first.text().lines().count(), 4, "{}", first.text());
    assert!(
        first.text().contains(",failed,plan_limit,limit,api_rate,"),
        "{}",
        first.text()
    );
    let link = first.header("link");
    let query = link
        .strip_prefix('<')
        .unwrap()
        .strip_suffix(">; rel=\"next\"")
        .unwrap();
    assert!(
        query.starts_with("?format=csv&target=support&limit=3&before="),
        "{query}"
    );
    let last = server.get(&format!("/api/v1/probes{query}")).await;
    assert_eq!(last.header("link"), "");
    let rows: Vec<_> = last.text().lines().collect();
    assert_eq!(rows.len(), 2, "{rows:?}");
    assert!(
        rows[1].contains(",support,2026-09-21T14:13:21.123456Z,first,ok,"),
        "{rows:?}"
    );
    let batches = server
        .get("/api/v1/batches?format=csv&reason=agent_no_show")
        .await;
    assert!(
        batches.text().contains(",support,,scheduled,"),
        "{}",
        batches.text()
    );
    assert_eq!(
        server
            .get("/api/v1/batches?reason=agent_silent")
            .await
            .json()["batches"],
        json!([])
    );
}

#[tokio::test]
async fn badge_shows_the_state_and_may_not_be_kept() {
    let server = HttpFixture::start().await;
    let badge = server
        .get("/api/v1/targets/support/badge.svg?cache=1")
        .await;
    assert_eq!(badge.status, StatusCode::OK);
    assert_eq!(badge.header("content-type"), "image/svg+xml");
    assert_eq!(badge.header("cache-control"), "no-cache");
    assert_eq!(
        badge.header("content-security-policy"),
        "default-src 'none'"
    );
    assert!(
        badge.text().contains("support: failing"),
        "{}",
        badge.text()
    );
    let mut paused = status();
    paused.targets[0].paused = true;
    server.status.send_replace(Arc::new(paused));
    let badge = server.get("/api/v1/targets/support/badge.svg").await;
    assert!(badge.text().contains("support: paused"), "{}", badge.text());
}

/// Opens `/api/v1/stream`, and reads until the events have `end`.
async fn read_stream(stream: &mut TcpStream, end: &str) -> String {
    let mut text = String::new();
    let read = async {
        while !text.contains(end) {
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer).await.unwrap() {
                0 => break,
                length => text += std::str::from_utf8(&buffer[..length]).unwrap(),
            }
        }
    };
    timeout(TEST_TIMEOUT, read).await.unwrap();
    text
}

const OPEN_STREAM: &[u8] = b"GET /api/v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[tokio::test]
async fn stream_sends_the_status_and_batches_and_ends_with_the_server() {
    let mut server = HttpFixture::start().await;
    let mut stream = server.tcp().await;
    stream.write_all(OPEN_STREAM).await.unwrap();
    let start = read_stream(&mut stream, "support-agent").await;
    assert!(start.starts_with("HTTP/1.1 200 OK\r\n"), "{start}");
    assert!(
        start.contains("content-type: text/event-stream\r\n"),
        "{start}"
    );
    assert!(start.contains("cache-control: no-store\r\n"), "{start}");
    assert!(
        start.contains("event: status\ndata: {\"version\":\"1.2.3\""),
        "{start}"
    );
    let batch = server.progress.start("b-1", "support", "scheduled");
    batch.room_opened("canary-1");
    let opened = read_stream(&mut stream, "}\n\n").await;
    assert!(
        opened.contains("event: batch\ndata: {\"batch_id\":\"b-1\""),
        "{opened}"
    );
    assert!(
        opened.contains("\"room\":{\"room\":\"canary-1\",\"stage\":\"opened\",\"outcome\":null"),
        "{opened}"
    );
    let mut changed = status();
    changed.stage = DaemonStage::Draining;
    server.status.send_replace(Arc::new(changed));
    let change = read_stream(&mut stream, "draining").await;
    assert!(change.contains("event: status"), "{change}");
    server.shutdown.cancel();
    // A server that waited for the stream would take the whole drain timeout, and then cut the response off.
    let end = read_stream(&mut stream, "0\r\n\r\n").await;
    assert!(end.ends_with("0\r\n\r\n"), "{end}");
    timeout(TEST_TIMEOUT, &mut server.task)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn stream_beyond_the_limit_is_refused_until_another_one_ends() {
    let server = HttpFixture::start().await;
    let mut open = Vec::new();
    for _ in 0..20 {
        let mut stream = server.tcp().await;
        stream.write_all(OPEN_STREAM).await.unwrap();
        read_stream(&mut stream, "event: status").await;
        open.push(stream);
    }
    let refused = server.get("/api/v1/stream").await;
    assert_eq!(refused.error().0, 503);
    assert_eq!(refused.header("retry-after"), "5");
    open.pop();
    let freed = async {
        loop {
            let mut stream = server.tcp().await;
            stream.write_all(OPEN_STREAM).await.unwrap();
            let start = read_stream(&mut stream, "\r\n\r\n").await;
            if start.starts_with("HTTP/1.1 200") {
                break;
            }
        }
    };
    timeout(TEST_TIMEOUT, freed).await.unwrap();
}

#[tokio::test]
async fn target_is_paused_and_resumed() {
    let mut server = HttpFixture::start().await;
    for (path, expected) in [("pause", true), ("resume", false)] {
        let path = format!("/api/v1/targets/support/{path}");
        for known in [true, false] {
            let reply = server
                .post_to_daemon(&path, |control| match control {
                    Control::SetPaused {
                        target,
                        paused,
                        reply,
                    } => {
                        assert_eq!((target.as_str(), paused), ("support", expected));
                        reply.send(known.then_some(()).ok_or(NoSuchTarget)).unwrap();
                    }
                    other => panic!("{other:?}"),
                })
                .await;
            if known {
                let done = json!({ "target": "support", "paused": expected });
                assert_eq!(reply.json(), done);
            } else {
                assert_eq!(reply.error().0, 404);
            }
        }
    }
}

#[tokio::test]
async fn request_that_the_daemon_drops_is_500_and_one_that_it_cannot_receive_is_503() {
    let mut server = HttpFixture::start().await;
    let reply = server.post_to_daemon("/-/reload", drop).await;
    let dropped = "the canary dropped this request; its log gives the reason";
    assert_eq!(reply.error(), (500, dropped.to_owned()));
    let counted = "livekit_canary_internal_errors_total{kind=\"http\"} 1\n";
    assert!(server.get("/metrics").await.text().contains(counted));
    server.control.close();
    let reply = server.post("/-/reload").await;
    assert_eq!(
        reply.error(),
        (503, "the canary is shutting down".to_owned())
    );
}

#[tokio::test(start_paused = true)]
async fn request_without_a_reply_of_the_daemon_times_out() {
    let mut server = HttpFixture::start().await;
    let mut unanswered = None;
    let reply = server
        .post_to_daemon("/-/reload", |control| unanswered = Some(control))
        .await;
    assert_eq!(
        reply.error(),
        (503, "the canary did not respond within 30s".to_owned())
    );
}

/// A path of every route that changes state.
fn changes() -> impl Iterator<Item = &'static str> {
    ChangeRouteKind::VARIANTS.iter().map(|kind| kind.example())
}

/// The request of a change, with the body that it needs.
fn change(path: &str) -> Request<Full<Bytes>> {
    let body = if path == ChangeRouteKind::RecordEvent.example() {
        "{\"kind\": \"deploy\", \"text\": \"1.2.3\"}"
    } else {
        ""
    };
    request(Method::POST, path).map(|_| Full::from(body))
}

/// The path of every change that the daemon itself makes.
fn changes_of_the_daemon() -> impl Iterator<Item = &'static str> {
    changes().filter(|path| *path != ChangeRouteKind::RecordEvent.example())
}

/// Accepts the next request as the daemon.
async fn accept_next(control: &mut mpsc::Receiver<Control>) {
    match control.recv().await.unwrap() {
        Control::Reload { reply } => reply.send(Ok(Vec::new())).unwrap(),
        Control::RunBatch { reply, .. } => reply.send(Ok("some-batch".to_owned())).unwrap(),
        Control::SetPaused { reply, .. } => reply.send(Ok(())).unwrap(),
    }
}

#[tokio::test]
async fn every_change_of_state_from_the_network_requires_users_or_the_setting() {
    let any = Ipv4Addr::UNSPECIFIED;
    let server = HttpFixture::with(&config::Http::default(), any).await;
    for path in changes() {
        let (status, error) = server.send(change(path)).await.error();
        assert_eq!(status, 403, "{path}");
        for way_out in ["basic_auth_users", "http.listen", "http.enable_lifecycle"] {
            assert!(error.contains(way_out), "{error}");
        }
    }
    assert_eq!(server.get("/metrics").await.status, StatusCode::OK);

    let enabled = config::Http {
        enable_lifecycle: true,
        ..config::Http::default()
    };
    let folder = WebFolder::new("basic_auth_users: {}", &[("alice", "secret")]);
    for (http, authorization) in [
        (enabled, None),
        (folder.http(), Some("Basic YWxpY2U6c2VjcmV0")),
    ] {
        let mut server = HttpFixture::with(&http, any).await;
        let allowed = |path| {
            let sent = with(change(path), "host", "canary.example");
            match authorization {
                Some(authorization) => with(sent, "authorization", authorization),
                None => sent,
            }
        };
        let event = allowed(ChangeRouteKind::RecordEvent.example());
        assert_eq!(server.send(event).await.status, StatusCode::CREATED);
        for path in changes_of_the_daemon() {
            let sent = allowed(path);
            let stream = server.tcp().await;
            let (reply, ()) = tokio::join!(send_on(stream, sent), accept_next(&mut server.control));
            assert!(reply.status.is_success(), "{path}: {}", reply.text());
        }
    }
}

#[tokio::test]
async fn every_change_of_state_is_refused_for_another_origin_or_another_host() {
    let mut server = HttpFixture::start().await;
    for path in changes() {
        for (name, value) in [
            ("origin", "http://evil.example"),
            ("origin", "null"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("host", "evil.example"),
            ("host", "localhost.evil.example:9787"),
        ] {
            let sent = with(change(path), name, value);
            let reply = server.send(sent).await;
            assert_eq!(reply.error().0, 403, "{path} with {name}: {value}");
        }
    }
    assert!(server.control.try_recv().is_err());
    for (name, value) in [
        ("origin", "http://localhost"),
        ("sec-fetch-site", "same-origin"),
        ("host", "[::1]:9787"),
    ] {
        let sent = with(
            request(Method::POST, ChangeRouteKind::RunBatch.example()),
            name,
            value,
        );
        let stream = server.tcp().await;
        let (reply, ()) = tokio::join!(send_on(stream, sent), accept_next(&mut server.control));
        assert_eq!(reply.status, StatusCode::ACCEPTED, "{name}: {value}");
    }
}

/// The form of a page works without a script.
#[tokio::test]
async fn form_that_starts_a_batch_leads_to_the_page_of_the_batch() {
    let mut server = HttpFixture::start().await;
    let path = ChangeRouteKind::RunBatch.example();
    let sent = with(request(Method::POST, path), "accept", "text/html,*/*;q=0.8");
    let stream = server.tcp().await;
    let (reply, ()) = tokio::join!(send_on(stream, sent), accept_next(&mut server.control));
    assert_eq!(reply.status, StatusCode::SEE_OTHER);
    // The browser resolves it against the path of the form's request.
    let request = format!("http://canary/prefix{path}")
        .parse::<url::Url>()
        .unwrap();
    let page = request.join(reply.header("location")).unwrap();
    assert_eq!(page.path(), "/prefix/batches/some-batch");
}

#[tokio::test]
async fn missing_page_is_a_page_and_a_missing_document_is_json() {
    let server = HttpFixture::start().await;
    for path in [
        "/batches/none",
        "/probes/none",
        "/incidents/none",
        "/targets/none",
        "/docs/none",
    ] {
        let reply = server.get(path).await;
        assert_eq!(reply.status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(
            reply.header("content-type"),
            "text/html; charset=utf-8",
            "{path}"
        );
        assert!(
            reply.text().contains("<a href=\"../\">All targets</a>"),
            "{path}: {}",
            reply.text()
        );
    }
    let (status, error) = server.get("/api/v1/batches/none").await.error();
    assert!(
        status == 404 && error.contains("/api/v1/batches"),
        "{error}"
    );
    let reply = server.get("/probes?reason=none").await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    assert!(
        reply.text().contains("&quot;none&quot; is not one of"),
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn batch_that_runs_has_a_page_with_its_rooms() {
    let server = HttpFixture::start().await;
    server.status.send_modify(|status| {
        Arc::make_mut(status).targets[0].running = Some("b-1".to_owned());
    });
    let page = server.get("/batches/b-1").await;
    assert_eq!(page.status, StatusCode::OK);
    for expected in [
        "<title>support: batch is running, 0 ok, 0 failed</title>",
        "data-live=\"../api/v1/stream\"",
        "No room is open.",
    ] {
        assert!(page.text().contains(expected), "{}", page.text());
    }

    let batch = server.progress.start("b-1", "support", "scheduled");
    for room in ["canary-good", "canary-bad", "canary-open"] {
        batch.room_opened(room);
    }
    let start = Instant::now();
    let reached = |milestone, millis| ProbeEvent::Reached {
        milestone,
        at: start + Duration::from_millis(millis),
    };
    for index in 0..3 {
        batch.probe_advanced(index, &reached(Milestone::Started, 0));
        batch.probe_advanced(index, &reached(Milestone::DispatchSent, 100));
    }
    batch.probe_advanced(0, &reached(Milestone::AgentJoined, 612));
    batch.probe_advanced(0, &decided(Outcome::Ok));
    let failure = Failure {
        reason: Reason::AgentSilent,
        detail: "said <nothing>".to_owned(),
    };
    batch.probe_advanced(1, &decided(Outcome::Failed(failure)));

    let page = server.get("/batches/b-1").await;
    for expected in [
        "<title>support: batch is running, 1 ok, 1 failed</title>",
        "<h1 class=\"bad\">",
        "0.512\u{a0}s",
        "agent_silent<small>said &lt;nothing&gt;</small>",
        "canary-open",
        "waits for the agent",
    ] {
        assert!(
            page.text().contains(expected),
            "{expected}: {}",
            page.text()
        );
    }

    // It has ended, and the history has it not yet.
    drop(batch);
    let page = server.get("/batches/b-1").await;
    assert!(page.text().contains("batch is running"), "{}", page.text());
}

fn decided(outcome: Outcome) -> ProbeEvent {
    ProbeEvent::OutcomeDecided {
        outcome,
        retry_after: None,
    }
}

/// A page whose name was rebound to the canary's address is of the same origin for its browser.
#[tokio::test]
async fn page_with_a_rebound_name_reads_nothing_on_loopback_and_changes_nothing_in_the_network() {
    let server = HttpFixture::start().await;
    for kind in ReadRouteKind::VARIANTS {
        let path = kind.example();
        let sent = with(request(Method::GET, path), "host", "evil.example:9787");
        let reply = server.send(sent).await;
        match kind {
            ReadRouteKind::Healthy | ReadRouteKind::Ready => {
                assert_eq!(reply.status, StatusCode::OK, "{path}");
            }
            _ => {
                let (status, error) = reply.error();
                assert_eq!(status, 403, "{path}");
                assert!(error.contains("localhost"), "{error}");
            }
        }
    }
    let folder = WebFolder::new(USERS, &[("alice", "secret")]);
    let server = HttpFixture::with_web(&folder.http()).await;
    let sent = with(
        get_as("/metrics", "alice", "secret"),
        "host",
        "canary.example",
    );
    assert_eq!(server.send(sent).await.status, StatusCode::OK);

    let enabled = config::Http {
        enable_lifecycle: true,
        ..config::Http::default()
    };
    let mut server = HttpFixture::with(&enabled, Ipv4Addr::UNSPECIFIED).await;
    for path in changes() {
        let sent = with(change(path), "host", "evil.example:9787");
        let sent = with(sent, "origin", "http://evil.example:9787");
        assert_eq!(server.send(sent).await.error().0, 403, "{path}");
    }
    assert!(server.control.try_recv().is_err());
    let sent = with(request(Method::POST, "/-/reload"), "host", "10.0.0.7:9787");
    let sent = with(sent, "origin", "http://10.0.0.7:9787");
    let stream = server.tcp().await;
    let (reply, ()) = tokio::join!(send_on(stream, sent), accept_next(&mut server.control));
    assert_eq!(reply.status, StatusCode::OK);
}

#[tokio::test]
async fn body_is_refused_before_all_of_it_is_read() {
    let mut server = HttpFixture::start().await;
    for (body, code) in [(vec![b'x'; 2], 400), (vec![b'x'; 1_000_000], 413)] {
        let sent = request(Method::POST, "/-/reload").map(|_| Full::from(body));
        assert_eq!(server.send(sent).await.error().0, code);
    }
    assert!(server.control.try_recv().is_err());
    // A body that never ends, and one that is longer than the server reads.
    for start in [
        "POST /-/reload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST /-/reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n",
    ] {
        let body = "1000\r\n".to_owned() + &"x".repeat(0x1000) + "\r\n";
        let answer = send_raw(&server, (start.to_owned() + &body + &body).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    }
    let answer = send_raw(
        &server,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn invalid_request_is_refused_and_the_server_continues() {
    let server = HttpFixture::start().await;
    let long = "x".repeat(100_000);
    let head = |headers: &str| format!("GET / HTTP/1.1\r\n{headers}\r\n");
    for (bytes, code) in [
        ("\0\0\0\0\r\n\r\n".to_owned(), "400"),
        ("GET\r\n\r\n".to_owned(), "400"),
        ("GET / HTTP/9.9\r\n\r\n".to_owned(), "400"),
        (head("no colon\r\n"), "400"),
        (head("Content-Length: -1\r\n"), "400"),
        (head("Content-Length: 1\r\nContent-Length: 2\r\n"), "400"),
        (head(&format!("X: {long}\r\n")), "431"),
        (head(&"X: y\r\n".repeat(500)), "431"),
        (format!("GET /{long} HTTP/1.1\r\n\r\n"), "4"),
        // TLS, to a server without TLS.
        ("\x16\x03\x01\x02\0\x01\0\x01\r\n\r\n".to_owned(), "400"),
    ] {
        let answer = send_raw(&server, bytes.as_bytes()).await;
        let start = &bytes[..bytes.len().min(40)];
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {code}")),
            "{start:?}: {answer:?}"
        );
    }
    assert_eq!(server.get("/-/healthy").await.status, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn client_that_never_completes_its_headers_is_disconnected() {
    let server = HttpFixture::start().await;
    for begun in ["", "GET / HTTP/1.1\r\nHost: local"] {
        // The paused clock advances while every task waits. The read ends because the server has closed the connection.
        let answer = send_raw(&server, begun.as_bytes()).await;
        assert_eq!(answer, "");
    }
    let (mut sender, mut tasks) = client(server.tcp().await).await;
    let sent = request(Method::GET, "/-/healthy");
    assert_eq!(send_with(&mut sender, sent).await.status, StatusCode::OK);
    // An open connection without further requests.
    timeout(TEST_TIMEOUT, tasks.join_next()).await.unwrap();
}

#[tokio::test]
async fn client_that_does_not_read_its_response_is_disconnected() {
    let server = HttpFixture::start().await;
    // The response must be larger than the buffers of the kernel.
    let project = config::Project {
        url: "wss://acme.livekit.cloud".parse().unwrap(),
        api_key: "some-key".into(),
        api_secret: "some-secret".to_owned().into(),
        credential_files: config::CredentialFiles::default(),
        ca_file: None,
        cloud_project: None,
        ice: config::Ice::All,
        api_timeout: config::Project::DEFAULT_API_TIMEOUT,
        max_rooms: config::Project::DEFAULT_MAX_ROOMS,
        budget: config::Budget::default(),
        backoff: config::Backoff::default(),
    };
    let _big = server.metrics.project(&"x".repeat(6 << 20), &project);
    let whole = server.metrics.render().len();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(server.address).await.unwrap();
    let sent = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(sent).await.unwrap();
    // The response has begun. From here on the test needs time to pass.
    stream.read_u8().await.unwrap();
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(40)).await;
    tokio::time::resume();
    let mut rest = Vec::new();
    let read = stream.read_to_end(&mut rest);
    let read = timeout(TEST_TIMEOUT, read).await.unwrap();
    assert!(
        read.is_err() || rest.len() < whole,
        "the client received the whole response"
    );
}

#[tokio::test(start_paused = true)]
async fn clients_that_never_finish_a_request_delay_no_other_client() {
    let server = HttpFixture::start().await;
    let begun = Instant::now();
    let mut slow = Vec::new();
    for _ in 0..300 {
        let mut stream = server.tcp().await;
        stream.write_all(b"GET / HTTP/1.1\r\nX: ").await.unwrap();
        slow.push(stream);
    }
    for path in ["/-/healthy", "/metrics", "/"] {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
    // On paused time: nothing waited for a timeout.
    assert!(begun.elapsed() < Duration::from_secs(1));
    // The oldest made room for the others, and the others are disconnected when their time is over.
    for mut stream in slow {
        let mut rest = Vec::new();
        let read = timeout(TEST_TIMEOUT, stream.read_to_end(&mut rest)).await;
        assert!(read.unwrap().is_err() || rest.is_empty());
    }
    assert!(begun.elapsed() < Duration::from_secs(12), "{begun:?}");
}

#[tokio::test(start_paused = true)]
async fn idle_clients_make_room_for_a_new_one() {
    let server = HttpFixture::start().await;
    let begun = Instant::now();
    let mut idle = Vec::new();
    for _ in 0..256 {
        let mut stream = server.tcp().await;
        let sent = b"GET /-/healthy HTTP/1.1\r\nHost: localhost\r\n\r\n";
        stream.write_all(sent).await.unwrap();
        stream.read_u8().await.unwrap();
        idle.push(stream);
    }
    assert_eq!(server.get("/-/healthy").await.status, StatusCode::OK);
    assert!(begun.elapsed() < Duration::from_secs(1));
    let mut rest = Vec::new();
    let read = idle[0].read_to_end(&mut rest);
    let closed = timeout(Duration::from_secs(1), read).await;
    assert!(
        closed.is_ok(),
        "the client that waited longest is still connected"
    );
    let read = idle[255].read_to_end(&mut rest);
    assert!(timeout(Duration::from_secs(1), read).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn shutdown_finishes_a_response_and_closes_idle_connections_at_once() {
    let begun = Instant::now();
    let mut server = HttpFixture::start().await;
    let (mut idle, mut idle_tasks) = client(server.tcp().await).await;
    let sent = request(Method::GET, "/-/healthy");
    assert_eq!(send_with(&mut idle, sent).await.status, StatusCode::OK);
    let shutdown = server.shutdown.clone();
    let reply = server
        .post_to_daemon("/-/reload", |control| {
            shutdown.cancel();
            let Control::Reload { reply } = control else {
                panic!("{control:?}")
            };
            reply.send(Ok(Vec::new())).unwrap();
        })
        .await;
    assert_eq!(reply.status, StatusCode::OK);
    timeout(TEST_TIMEOUT, &mut server.task)
        .await
        .unwrap()
        .unwrap();
    timeout(TEST_TIMEOUT, idle_tasks.join_next()).await.unwrap();
    // On paused time: the shutdown waited for no timeout.
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn shutdown_does_not_wait_forever_for_a_response() {
    let mut server = HttpFixture::start().await;
    let (mut sender, _tasks) = client(server.tcp().await).await;
    let sent = sender.send_request(request(Method::POST, "/-/reload"));
    let end = async {
        let unanswered = server.control.recv().await;
        server.shutdown.cancel();
        (&mut server.task).await.unwrap();
        drop(unanswered);
    };
    let (answered, ()) = tokio::join!(sent, end);
    assert!(answered.is_err());
}

/// A folder with a web configuration and the files that it names.
struct WebFolder {
    folder: TempDir,
}

impl WebFolder {
    /// Writes `web.yml` with this text. Users with these passwords replace `{}`.
    fn new(yaml: &str, users: &[(&str, &str)]) -> Self {
        let web = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        web.write(yaml, users);
        web
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, yaml: &str, users: &[(&str, &str)]) {
        let mut text = yaml.to_owned();
        if !users.is_empty() {
            let of =
                |(name, password)| format!("\n  {name}: {}", bcrypt::hash(password, 4).unwrap());
            let users: String = users.iter().copied().map(of).collect();
            text = text.replace("{}", &users);
        }
        std::fs::write(self.path("web.yml"), text).unwrap();
    }

    fn http(&self) -> config::Http {
        config::Http {
            web_config_file: Some(self.path("web.yml")),
            ..config::Http::default()
        }
    }

    fn error(&self) -> String {
        let error = WebConfig::load(&self.http()).err().unwrap();
        let folder = self.folder.path().to_str().unwrap();
        error.replace(folder, "FOLDER")
    }
}

fn credentials(name: &str, password: &str) -> String {
    use base64::Engine;
    let both = format!("{name}:{password}");
    format!("Basic {}", base64::prelude::BASE64_STANDARD.encode(both))
}

fn get_as(path: &str, name: &str, password: &str) -> Request<Full<Bytes>> {
    let authorization = credentials(name, password);
    with(request(Method::GET, path), "authorization", &authorization)
}

const USERS: &str = "basic_auth_users: {}\n";

#[tokio::test]
async fn with_users_every_path_except_health_requires_one() {
    let web = WebFolder::new(USERS, &[("alice", "secret"), ("bob", "hunter2")]);
    let server = HttpFixture::with_web(&web.http()).await;
    for path in ["/-/healthy", "/-/ready"] {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
    let is_open = |path: &&str| path.starts_with("/-/") && !path.ends_with("reload");
    let reads = ReadRouteKind::VARIANTS.iter().map(|kind| kind.example());
    let mut closed: Vec<_> = reads.chain(changes()).chain(["/nowhere"]).collect();
    closed.retain(|path| !is_open(path));
    for path in closed {
        for method in [Method::GET, Method::POST] {
            let reply = server.send(request(method, path)).await;
            assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{path}");
            let challenge = "Basic realm=\"livekit-canary\", charset=\"UTF-8\"";
            assert_eq!(reply.header("www-authenticate"), challenge);
        }
    }
    for (name, password, code) in [
        ("alice", "secret", 200),
        ("bob", "hunter2", 200),
        ("alice", "hunter2", 401),
        ("carol", "secret", 401),
        ("", "", 401),
    ] {
        let reply = server.send(get_as("/metrics", name, password)).await;
        assert_eq!(reply.status.as_u16(), code, "{name}");
    }
}

/// Records a batch with a transcript and with replies, and closes the history, so that it can be read at once.
async fn record_call(server: &HttpFixture) -> (String, String) {
    let mut batch = mixed();
    for turn in &mut batch.probes[0].turns {
        turn.heard = Some(TranscriptText::new("a heard secret"));
        turn.reply_text = Some(TranscriptText::new("a replied secret"));
    }
    let target = config::Target::default();
    server.history.record(&batch, &target, &project());
    assert!(server.history.close(Instant::now() + TEST_TIMEOUT).await);
    (batch.batch_id.clone(), batch.probes[0].room.0.clone())
}

#[tokio::test]
async fn what_people_said_is_shown_to_users_on_loopback_and_by_the_setting_only() {
    let any = IpAddr::from(Ipv4Addr::UNSPECIFIED);
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
    let everyone = config::Http {
        sensitive: config::SensitiveAccess::Everyone,
        ..config::Http::default()
    };
    let users = WebFolder::new(USERS, &[("alice", "secret")]);
    for (http, ip, is_shown) in [
        (config::Http::default(), any, false),
        (config::Http::default(), loopback, true),
        (everyone, any, true),
        (users.http(), any, true),
    ] {
        let server = HttpFixture::with(&http, ip).await;
        let (batch, room) = record_call(&server).await;
        let (batch, probe) = (
            format!("/api/v1/batches/{batch}"),
            format!("/api/v1/probes/{room}"),
        );
        let get = async |path: &str| server.send(get_as(path, "alice", "secret")).await;
        let list = get("/api/v1/probes").await;
        // The first room is the last one of the list.
        let listed = list.json()["probes"]
            .as_array()
            .unwrap()
            .last()
            .unwrap()
            .clone();
        let of_batch = get(&batch).await.json();
        let texts = |probe: &Value| {
            let turn = &probe["turns"][0];
            let texts = [
                &probe["transcript"][0]["text"],
                &turn["heard"],
                &turn["reply_text"],
            ];
            texts.map(|text| text.as_str().map(str::to_owned))
        };
        let expected = if is_shown {
            ["Good day to you.", "a heard secret", "a replied secret"].map(|it| Some(it.to_owned()))
        } else {
            [const { None }; 3]
        };
        let one = get(&probe).await.json();
        for (document, probe) in [
            (&one, &one),
            (&listed, &listed),
            (&of_batch, &of_batch["probes"][0]),
        ] {
            assert_eq!(texts(probe), expected, "{http:?}");
            match document["withheld"].as_str() {
                None => assert!(is_shown, "{document}"),
                Some(why) => assert!(!is_shown && why.contains("http.sensitive"), "{why}"),
            }
        }
        let audio = get(&format!("{probe}/audio/agent.ogg")).await;
        let (status, error) = audio.error();
        let expected = if is_shown {
            (404, "was not recorded")
        } else {
            (403, "http.sensitive")
        };
        assert_eq!(status, expected.0, "{error}");
        assert!(error.contains(expected.1), "{error}");
        let pages = [&probe, &batch].map(|path| path.replace("/api/v1", ""));
        let lists = ["/api/v1/probes?format=csv", "/api/v1/batches"].map(str::to_owned);
        for path in pages.into_iter().chain(lists) {
            let reply = get(&path).await;
            assert_eq!(reply.status, StatusCode::OK, "{path}");
            let is_told = ["secret", "Good day"]
                .iter()
                .any(|text| reply.text().contains(text));
            assert!(is_shown || !is_told, "{path}: {}", reply.text());
        }
    }
}

#[tokio::test]
async fn users_are_read_again_and_never_removed() {
    let web = WebFolder::new(USERS, &[("alice", "old")]);
    let server = HttpFixture::with_web(&web.http()).await;
    let (mut sender, _tasks) = client(server.tcp().await).await;
    // An open connection follows the change as well.
    let mut code = async |password| {
        let sent = get_as("/metrics", "alice", password);
        send_with(&mut sender, sent).await.status.as_u16()
    };
    assert_eq!((code("old").await, code("new").await), (200, 401));
    web.write(USERS, &[("alice", "new")]);
    assert_eq!((code("old").await, code("new").await), (401, 200));
    for broken in [
        "",
        "basic_auth_users:\n",
        "basic_auth_users: {}",
        "basic_auth_users: [",
        "basic_auth_users: { alice: new }",
    ] {
        web.write(broken, &[]);
        assert_eq!((code("").await, code("new").await), (401, 200), "{broken}");
    }
    std::fs::remove_file(web.path("web.yml")).unwrap();
    assert_eq!((code("").await, code("new").await), (401, 200));
    web.write(USERS, &[("alice", "newest")]);
    assert_eq!((code("new").await, code("newest").await), (401, 200));
}

#[tokio::test]
async fn pipe_in_place_of_the_web_configuration_delays_no_request() {
    let web = WebFolder::new(USERS, &[("alice", "old")]);
    let server = HttpFixture::with_web(&web.http()).await;
    // By default, to open a pipe for reading blocks until there is a writer.
    let (pipe, file, new) = (web.path("pipe"), web.path("web.yml"), web.path("new"));
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    std::fs::hard_link(&pipe, &new).unwrap();
    std::fs::rename(&new, &file).unwrap();
    for _ in 0..2 {
        let reply = server.send(get_as("/metrics", "alice", "old")).await;
        assert_eq!(reply.status, StatusCode::OK);
    }
    std::fs::remove_file(&file).unwrap();
    web.write(USERS, &[("alice", "new")]);
    let reply = server.send(get_as("/metrics", "alice", "new")).await;
    assert_eq!(reply.status, StatusCode::OK);
}

/// A certificate authority, and a client that trusts it.
struct TestAuthority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    pem: String,
}

impl TestAuthority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap();
        Self {
            root: root.der().clone(),
            pem: root.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// Writes a certificate for `name` and its key, and returns the certificate.
    fn issue(&self, name: &str, certificate: &Path, key_file: &Path) -> CertificateDer<'static> {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let issued = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(certificate, issued.pem()).unwrap();
        std::fs::write(key_file, key.serialize_pem()).unwrap();
        issued.der().clone()
    }

    async fn connect(
        &self,
        server: &HttpFixture,
        versions: &[&'static SupportedProtocolVersion],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        self.connect_as(server, versions, None).await
    }

    /// Connects with the certificate and the key of a client, if there is one.
    async fn connect_as(
        &self,
        server: &HttpFixture,
        versions: &[&'static SupportedProtocolVersion],
        client: Option<&TestIdentity>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        let provider = Arc::new(crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        let config = match client {
            Some((certificate, key)) => config
                .with_client_auth_cert(vec![certificate.clone()], key.clone_key())
                .unwrap(),
            None => config.with_no_client_auth(),
        };
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, server.tcp().await)
            .await
    }
}

/// The certificate of a client and its key.
type TestIdentity = (CertificateDer<'static>, PrivateKeyDer<'static>);

const TLS: &str = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n";
const BOTH: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];

fn presented(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    let (_, session) = stream.get_ref();
    session.peer_certificates().unwrap()[0].clone().into_owned()
}

/// A folder with a certificate for localhost, and its authority.
fn tls_web(
    yaml: &str,
    users: &[(&str, &str)],
) -> (WebFolder, TestAuthority, CertificateDer<'static>) {
    let web = WebFolder::new(yaml, users);
    let authority = TestAuthority::new();
    let certificate = authority.issue(
        "localhost",
        &web.path("server.crt"),
        &web.path("server.key"),
    );
    (web, authority, certificate)
}

#[tokio::test]
async fn tls_uses_the_certificate_of_the_file_and_users_are_still_required() {
    let yaml = TLS.to_owned() + USERS;
    let (web, authority, certificate) = tls_web(&yaml, &[("alice", "secret")]);
    let server = HttpFixture::with_web(&web.http()).await;
    for versions in [&BOTH[..], &BOTH[1..]] {
        let stream = authority.connect(&server, versions).await.unwrap();
        assert_eq!(presented(&stream), certificate);
        let reply = send_on(stream, get_as("/metrics", "alice", "secret")).await;
        assert!(reply.text().contains(SERIES), "{}", reply.text());
    }
    let stream = authority.connect(&server, &BOTH).await.unwrap();
    let reply = send_on(stream, request(Method::GET, "/metrics")).await;
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
    // A version of the file without users does not remove them.
    web.write(TLS, &[]);
    let stream = authority.connect(&server, &BOTH).await.unwrap();
    let reply = send_on(stream, request(Method::GET, "/metrics")).await;
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
    // A client without TLS gets no HTTP response.
    let (mut sender, _tasks) = client(server.tcp().await).await;
    let sent = sender.send_request(request(Method::GET, "/-/healthy"));
    assert!(timeout(TEST_TIMEOUT, sent).await.unwrap().is_err());
}

impl TestAuthority {
    /// A client with this name in its certificate. A name that is an address becomes an IP name.
    fn client(&self, name: &str) -> TestIdentity {
        let folder = tempfile::tempdir().unwrap();
        let (certificate, key) = (folder.path().join("c"), folder.path().join("k"));
        let certificate = self.issue(name, &certificate, &key);
        (certificate, PrivateKeyDer::from_pem_file(&key).unwrap())
    }

    /// Whether the server answers this client. TLS 1.3 reports a refusal only after the handshake.
    async fn is_answered(
        &self,
        server: &HttpFixture,
        version: &'static SupportedProtocolVersion,
        client: Option<&TestIdentity>,
    ) -> bool {
        let Ok(mut stream) = self.connect_as(server, &[version], client).await else {
            return false;
        };
        let request = "GET /-/healthy HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        let mut answer = Vec::new();
        stream.write_all(request.as_bytes()).await.is_ok()
            && stream.read_to_end(&mut answer).await.is_ok()
            && answer.starts_with(b"HTTP/1.1 200")
    }
}

#[tokio::test]
async fn client_certificates_are_required_as_exporter_toolkit_does() {
    let (web, authority, _) = tls_web(TLS, &[]);
    std::fs::write(web.path("ca.crt"), &authority.pem).unwrap();
    let other = TestAuthority::new();
    let known = authority.client("prometheus.example");
    let by_address = authority.client("10.1.2.3");
    let stranger = other.client("prometheus.example");
    let verify = "  client_ca_file: ca.crt\n  client_auth_type: ";
    let sans = "\n  client_allowed_sans: [prometheus.example, 10.1.2.3]";
    // Whether no certificate, one of the authority, and one of another authority are accepted.
    for (settings, answered) in [
        (
            "  client_auth_type: NoClientCert".to_owned(),
            [true, true, true],
        ),
        (
            "  client_auth_type: RequestClientCert".to_owned(),
            [true, true, true],
        ),
        (
            "  client_auth_type: RequireClientCert".to_owned(),
            [false, true, true],
        ),
        (
            "  client_auth_type: RequireAnyClientCert".to_owned(),
            [false, true, true],
        ),
        (
            format!("{verify}VerifyClientCertIfGiven"),
            [true, true, false],
        ),
        (
            format!("{verify}RequireAndVerifyClientCert"),
            [false, true, false],
        ),
        (
            format!("{verify}RequireAndVerifyClientCert{sans}"),
            [false, true, false],
        ),
    ] {
        web.write(&format!("{TLS}{settings}\n"), &[]);
        let server = HttpFixture::with_web(&web.http()).await;
        for version in BOTH {
            let clients = [None, Some(&known), Some(&stranger)];
            for (client, expected) in clients.into_iter().zip(answered) {
                let is = authority.is_answered(&server, version, client).await;
                assert_eq!(is, expected, "{settings}, {version:?}");
            }
        }
    }
    web.write(
        &format!("{TLS}{verify}RequireAndVerifyClientCert{sans}\n"),
        &[],
    );
    let server = HttpFixture::with_web(&web.http()).await;
    let of_another_name = authority.client("grafana.example");
    for (client, expected) in [(&by_address, true), (&of_another_name, false)] {
        let is = authority
            .is_answered(&server, &version::TLS13, Some(client))
            .await;
        assert_eq!(is, expected);
    }
    // A version of the file without the requirement does not remove it.
    web.write(TLS, &[]);
    assert!(!authority.is_answered(&server, &version::TLS13, None).await);
    assert!(
        authority
            .is_answered(&server, &version::TLS13, Some(&known))
            .await
    );
}

#[tokio::test]
async fn tls_version_below_min_version_is_refused() {
    let yaml = TLS.to_owned() + "  min_version: TLS13\n";
    let (web, authority, _) = tls_web(&yaml, &[]);
    let server = HttpFixture::with_web(&web.http()).await;
    assert!(authority.connect(&server, &BOTH[1..]).await.is_err());
    let stream = authority.connect(&server, &BOTH).await.unwrap();
    let reply = send_on(stream, request(Method::GET, "/-/ready")).await;
    assert_eq!(reply.status, StatusCode::OK);
}

#[tokio::test]
async fn new_certificate_is_used_for_the_next_connection_unless_it_is_invalid() {
    let (web, authority, first) = tls_web(TLS, &[]);
    let server = HttpFixture::with_web(&web.http()).await;
    let certificate = async || {
        let stream = authority.connect(&server, &BOTH).await.unwrap();
        presented(&stream)
    };
    assert_eq!(certificate().await, first);
    let (file, key) = (web.path("server.crt"), web.path("server.key"));
    // The new certificate is there, but its key is not.
    let other = web.path("other.key");
    let second = authority.issue("localhost", &file, &other);
    assert_eq!(certificate().await, first);
    std::fs::rename(&other, &key).unwrap();
    assert_eq!(certificate().await, second);

    std::fs::write(&file, "").unwrap();
    assert_eq!(certificate().await, second);
    std::fs::remove_file(&key).unwrap();
    assert_eq!(certificate().await, second);
    // If the settings of TLS are removed, TLS stays.
    web.write(USERS, &[("alice", "secret")]);
    assert_eq!(certificate().await, second);
    web.write(TLS, &[]);
    let third = authority.issue("localhost", &file, &key);
    assert_eq!(certificate().await, third);
}

#[tokio::test(start_paused = true)]
async fn client_that_never_completes_its_handshake_is_disconnected() {
    let (web, ..) = tls_web(TLS, &[]);
    let server = HttpFixture::with_web(&web.http()).await;
    assert_eq!(send_raw(&server, b"").await, "");
    assert_eq!(send_raw(&server, b"\x16\x03\x01").await, "");
}

#[test]
fn web_configuration_with_a_mistake_is_an_error_that_names_the_key() {
    let (web, ..) = tls_web(TLS, &[]);
    let other = TestAuthority::new();
    other.issue("localhost", &web.path("other.crt"), &web.path("other.key"));
    std::fs::write(web.path("empty.pem"), "").unwrap();
    std::fs::write(
        web.path("broken.pem"),
        "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    let tls = |lines: &str| format!("tls_server_config: {{ {lines} }}");
    let clients = |line: &str| {
        tls(&format!(
            "cert_file: server.crt, key_file: server.key, {line}"
        ))
    };
    let cases = [
        String::new(),
        "# nothing\n".to_owned(),
        "tls_server_config:\nbasic_auth_users:\n".to_owned(),
        "basic_auth_users: {}".to_owned(),
        "- a\n- b\n".to_owned(),
        "just text".to_owned(),
        "basic_auth_users: [".to_owned(),
        "basic_auth_users: { alice: a, alice: b }".to_owned(),
        "basic_auth_users: [alice]".to_owned(),
        "basic_auth_users: { alice: 12345 }".to_owned(),
        "basic_auth_users: { alice: hunter2 }".to_owned(),
        "basic_auth_users: { alice: $2b$04$short }".to_owned(),
        "basic_auth_user: { alice: hunter2 }".to_owned(),
        "http_server_config: { http2: false }".to_owned(),
        "rate_limit: { interval: 1s }".to_owned(),
        tls(""),
        tls("cert_file: server.crt"),
        tls("key_file: server.key"),
        tls("cert_file: server.crt, key_file: nowhere.key"),
        tls("cert_file: 5, key_file: server.key"),
        tls("cert_file: server.crt, key_file: other.key"),
        tls("cert_file: server.key, key_file: server.key"),
        tls("cert_file: server.crt, key_file: server.crt"),
        tls("cert_file: empty.pem, key_file: server.key"),
        tls("cert_file: broken.pem, key_file: server.key"),
        tls("cert_file: server.crt, key_file: server.key, min_version: TLS11"),
        clients("client_auth_type: Whatever"),
        clients("client_auth_type: 5"),
        clients("client_auth_type: RequireAndVerifyClientCert"),
        clients("client_auth_type: RequireAnyClientCert, client_ca_file: server.crt"),
        clients("client_ca_file: server.crt"),
        clients("client_allowed_sans: [a]"),
        clients("client_auth_type: RequireAnyClientCert, client_allowed_sans: a"),
        clients("client_auth_type: RequireAndVerifyClientCert, client_ca_file: nowhere.crt"),
        clients("client_auth_type: RequireAndVerifyClientCert, client_ca_file: empty.pem"),
        clients("client_auth_type: RequireAndVerifyClientCert, client_ca_file: broken.pem"),
        tls("cert_file: server.crt, key_file: server.key, cipher_suites: []"),
        tls("cert: inline, key: inline"),
        tls("certfile: server.crt"),
    ];
    let errors: Vec<_> = cases
        .iter()
        .map(|yaml| {
            web.write(yaml, &[]);
            format!("{yaml}\n  → {}\n", web.error())
        })
        .collect();
    insta::assert_snapshot!(errors.join("\n"));
    let missing = config::Http {
        web_config_file: Some("nowhere/web.yml".into()),
        ..config::Http::default()
    };
    let error = WebConfig::load(&missing).err().unwrap();
    assert!(
        error.starts_with("nowhere/web.yml: cannot be read: "),
        "{error}"
    );
}
