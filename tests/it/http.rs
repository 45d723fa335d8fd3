//! HTTP at the socket: what clients, browsers' tricks and broken peers get.

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
use livekit_canary::config;
use livekit_canary::history::{History, LastBatch};
use livekit_canary::http::{
    BatchRefused, BudgetStatus, Control, Health, LastReload, NoSuchTarget, ProjectStatus,
    ReloadRefused, Sources, Stage, Status, TargetStatus, WebConfig, serve,
};
use livekit_canary::metrics::{Build, Metrics};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
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

/// A line of every scrape.
const SERIES: &str = "\nlivekit_canary_history_degraded ";
/// Ends a test that hangs; none waits so long.
const GIVE_UP: Duration = Duration::from_mins(2);

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(1_790_000_000 + seconds)
}

fn status() -> Status {
    Status {
        version: "1.2.3",
        started_at: at(0),
        stage: Stage::Running,
        targets: vec![TargetStatus {
            name: "support".to_owned(),
            project: "acme".to_owned(),
            url: "wss://acme.livekit.cloud".to_owned(),
            agent_name: Some("support-agent".to_owned()),
            dispatch: "explicit",
            schedule: "every 15m".to_owned(),
            paused: false,
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
                limit_seconds: Some(3600),
            }],
        }],
        last_reload: None,
    }
}

/// A server with a daemon behind it that the test plays.
struct Server {
    address: SocketAddr,
    metrics: Metrics,
    status: watch::Sender<Arc<Status>>,
    health: Health,
    control: mpsc::Receiver<Control>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
    _state: TempDir,
}

impl Server {
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
        let metrics = Metrics::new(&Build {
            version: "1.2.3".to_owned(),
            revision: "0a1b2c3".to_owned(),
            rustc: "1.95.0".to_owned(),
            engine: "native".to_owned(),
        });
        let state = tempfile::tempdir().unwrap();
        let history = History::open(&config::HistorySettings {
            dir: state.path().to_owned(),
            ..config::HistorySettings::default()
        });
        let sources = Sources {
            metrics: metrics.clone(),
            status: status_receiver,
            health: health.clone(),
            history: history.unwrap(),
            control: control_sender,
        };
        let web = WebConfig::load(http).unwrap();
        let shutdown = CancellationToken::new();
        Self {
            address: (Ipv4Addr::LOCALHOST, port).into(),
            metrics,
            status,
            health,
            control,
            shutdown: shutdown.clone(),
            task: tokio::spawn(serve(listener, web, sources, shutdown)),
            _state: state,
        }
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn get(&self, path: &str) -> Reply {
        self.ask(request(Method::GET, path)).await
    }

    async fn post(&self, path: &str) -> Reply {
        self.ask(request(Method::POST, path)).await
    }

    /// One request on a connection of its own.
    async fn ask(&self, request: Request<Full<Bytes>>) -> Reply {
        ask(self.tcp().await, request).await
    }

    /// A POST, which the daemon answers as `answer` says.
    async fn steer(&mut self, path: &str, answer: impl FnOnce(Control)) -> Reply {
        let asked = ask(self.tcp().await, request(Method::POST, path));
        let played = async { answer(self.control.recv().await.unwrap()) };
        let (reply, ()) = timeout(GIVE_UP, async { tokio::join!(asked, played) })
            .await
            .unwrap();
        reply
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Reply {
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

    /// The status, and the text of a refusal.
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

type Sender = SendRequest<Full<Bytes>>;

/// A connection that takes one request after the other; it ends with the task that is returned.
async fn client(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> (Sender, JoinSet<()>) {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async { drop(connection.await) });
    (sender, tasks)
}

async fn send(sender: &mut Sender, request: Request<Full<Bytes>>) -> Reply {
    let (head, body) = sender.send_request(request).await.unwrap().into_parts();
    Reply {
        status: head.status,
        headers: head.headers,
        body: body.collect().await.unwrap().to_bytes(),
    }
}

async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Reply {
    let (mut sender, _tasks) = client(stream).await;
    timeout(GIVE_UP, send(&mut sender, request)).await.unwrap()
}

/// Writes bytes that no client would, and reads until the server closes.
async fn raw(server: &Server, bytes: &[u8]) -> String {
    let mut stream = server.tcp().await;
    // The server may have had enough before the end.
    stream.write_all(bytes).await.ok();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    timeout(GIVE_UP, read).await.unwrap().ok();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn every_path_answers_in_its_content_type_and_is_stored_nowhere() {
    let server = Server::start().await;
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
        // What isn't API takes any query: a scraper may add one of its own.
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
async fn head_has_the_headers_of_get_and_no_body() {
    let server = Server::start().await;
    for path in ["/metrics", "/", "/-/healthy", "/api/v1/targets", "/nowhere"] {
        let get = server.get(path).await;
        let head = server.ask(request(Method::HEAD, path)).await;
        assert_eq!(head.status, get.status, "{path}");
        assert!(head.body.is_empty(), "{path}");
        assert_eq!(head.header("content-type"), get.header("content-type"));
        if !["/", "/metrics"].contains(&path) {
            // Those two tell of time that passes.
            assert_eq!(head.header("content-length"), get.body.len().to_string());
        }
    }
}

#[tokio::test]
async fn unknown_path_is_404_and_wrong_method_405_with_those_allowed() {
    let server = Server::start().await;
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
        (Method::GET, "/-/reload", "POST"),
        (Method::HEAD, "/-/reload", "POST"),
        (Method::DELETE, "/api/v1/targets/support/pause", "POST"),
        (
            Method::from_bytes(b"BREW").unwrap(),
            "/-/healthy",
            "GET, HEAD",
        ),
    ] {
        let reply = server.ask(request(method.clone(), path)).await;
        assert_eq!(
            (reply.status.as_u16(), reply.header("allow")),
            (405, allowed),
            "{method} {path}"
        );
    }
}

#[tokio::test]
async fn api_says_what_there_is_not_and_what_it_does_not_understand() {
    let mut server = Server::start().await;
    for path in ["/api/v1/batches/none", "/api/v1/probes/none"] {
        let (status, error) = server.get(path).await.error();
        assert_eq!(status, 404);
        assert!(error.contains("/api/v1/batches"), "{error}");
    }
    for path in [
        "/api/v1/batches?limit=many",
        "/api/v1/batches/none?limit=1",
        "/api/v1/targets?name=support",
        "/api/v1/probes/none?x",
    ] {
        assert_eq!(server.get(path).await.error().0, 400, "{path}");
    }
    let run = "/api/v1/targets/support/batches?rooms=5";
    let unknown = "query key \"rooms\" is not known: this path takes no query";
    assert_eq!(server.post(run).await.error(), (400, unknown.to_owned()));
    assert!(server.control.try_recv().is_err());
}

#[tokio::test]
async fn every_documented_path_exists() {
    let server = Server::start().await;
    let (_, section) = include_str!("../../docs/api.md")
        .split_once("\n## Paths\n")
        .unwrap();
    let rows = section
        .lines()
        .skip_while(|line| !line.starts_with("| `"))
        .take_while(|line| line.starts_with('|'));
    let mut seen = 0;
    for row in rows {
        let cell = row.trim_matches('|').split('|').next().unwrap();
        let path = cell.split('`').nth(1).unwrap();
        // A GET of what takes POST is refused for its method, and does nothing.
        let reply = server
            .get(&path.trim_start_matches("POST ").replace(['{', '}'], ""))
            .await;
        assert!(!reply.text().contains("no such path"), "{path}");
        assert_eq!(path.starts_with("POST "), reply.status == 405, "{path}");
        seen += 1;
    }
    assert_eq!(seen, 11);
}

#[tokio::test]
async fn metrics_are_compressed_for_whom_asks() {
    let server = Server::start().await;
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
        let asked = with(request(Method::GET, "/metrics"), "accept-encoding", accept);
        let reply = server.ask(asked).await;
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
async fn health_names_the_tasks_that_are_dead_and_not_the_stage() {
    let server = Server::start().await;
    server.status.send_modify(|status| {
        Arc::make_mut(status).stage = Stage::Draining;
    });
    let pulse = server.health.watch("scheduler", None);
    let other = server.health.watch("recorder", Some(GIVE_UP));
    assert_eq!(server.get("/-/healthy").await.status, StatusCode::OK);
    drop(pulse);
    let reply = server.get("/-/healthy").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(reply.text(), "scheduler: has ended\n");
    other.retire();
}

#[tokio::test]
async fn only_a_running_canary_is_ready() {
    let server = Server::start().await;
    let _dead = server.health.watch("recorder", None);
    for (stage, code) in [
        (Stage::Starting, 503),
        (Stage::Running, 200),
        (Stage::Draining, 503),
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
    let server = Server::start().await;
    let document = server.get("/api/v1/targets").await.json();
    insta::assert_snapshot!(serde_json::to_string_pretty(&document).unwrap());
}

#[tokio::test]
async fn page_escapes_every_text_that_it_shows() {
    const HOSTILE: &str = "<script>\"'&";
    let server = Server::start().await;
    server.status.send_modify(|status| {
        let status = Arc::make_mut(status);
        let hostile = || HOSTILE.to_owned();
        let target = &mut status.targets[0];
        target.name = hostile();
        target.project = hostile();
        target.agent_name = Some(hostile());
        target.schedule = hostile();
        target.held_back = Some(hostile());
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
    assert!(
        !page.contains("<script") && !page.contains(HOSTILE),
        "{page}"
    );
    let shown = page.matches("&lt;script&gt;&quot;&#39;&amp;").count();
    assert_eq!(shown, 10, "{page}");
    let policy = reply.header("content-security-policy");
    assert!(policy.starts_with("default-src 'none';"), "{policy}");
}

#[tokio::test]
async fn reload_tells_how_it_went() {
    let mut server = Server::start().await;
    let answer = |answer: Result<(), ReloadRefused>| {
        |control| match control {
            Control::Reload { reply } => reply.send(answer).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let reply = server.steer("/-/reload", answer(Ok(()))).await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(reply.json(), json!({ "reloaded": true }));

    let problems = "error: target \"a\": batch.rooms: 0 is too few\nhint: 1 or more".to_owned();
    let invalid = answer(Err(ReloadRefused::Invalid(problems.clone())));
    let reply = server.steer("/-/reload", invalid).await;
    assert_eq!(reply.error(), (422, problems));

    let late = answer(Err(ReloadRefused::ShuttingDown));
    let reply = server.steer("/-/reload", late).await;
    assert_eq!(
        reply.error(),
        (503, "the canary is shutting down".to_owned())
    );
}

#[tokio::test]
async fn batch_is_accepted_or_refused_for_a_reason() {
    const PATH: &str = "/api/v1/targets/support/batches";
    let mut server = Server::start().await;
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
    let reply = server.steer(PATH, answer(Ok("some-batch"))).await;
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
        (BatchRefused::NoSuchTarget, 404, "no target has", ""),
        (BatchRefused::ShuttingDown, 503, "shutting down", ""),
    ] {
        let reply = server.steer(PATH, answer(Err(refusal))).await;
        let (status, error) = reply.error();
        assert_eq!((status, reply.header("retry-after")), (code, retry_after));
        assert!(error.contains(text), "{error}");
    }
}

#[tokio::test]
async fn target_is_paused_and_resumed() {
    let mut server = Server::start().await;
    for (path, expected) in [("pause", true), ("resume", false)] {
        let path = format!("/api/v1/targets/support/{path}");
        for known in [true, false] {
            let reply = server
                .steer(&path, |control| match control {
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
async fn request_that_the_daemon_drops_or_can_t_take_is_its_fault() {
    let mut server = Server::start().await;
    let reply = server.steer("/-/reload", drop).await;
    let dropped = "the canary has dropped this request; its log says why";
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
async fn request_that_the_daemon_never_answers_has_a_deadline() {
    let mut server = Server::start().await;
    let mut unanswered = None;
    let reply = server
        .steer("/-/reload", |control| unanswered = Some(control))
        .await;
    assert_eq!(reply.error(), (503, "no answer within 30s".to_owned()));
}

const CHANGES: [&str; 4] = [
    "/-/reload",
    "/api/v1/targets/support/batches",
    "/api/v1/targets/support/pause",
    "/api/v1/targets/support/resume",
];

/// Answers every request, and counts them.
async fn obey(control: &mut mpsc::Receiver<Control>) {
    match control.recv().await.unwrap() {
        Control::Reload { reply } => reply.send(Ok(())).unwrap(),
        Control::RunBatch { reply, .. } => reply.send(Ok("some-batch".to_owned())).unwrap(),
        Control::SetPaused { reply, .. } => reply.send(Ok(())).unwrap(),
    }
}

#[tokio::test]
async fn post_from_the_network_needs_users_or_the_setting() {
    let any = Ipv4Addr::UNSPECIFIED;
    let server = Server::with(&config::Http::default(), any).await;
    for path in CHANGES {
        let (status, error) = server.post(path).await.error();
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
    let folder = Web::new("basic_auth_users: {}", &[("alice", "secret")]);
    for (http, authorization) in [
        (enabled, None),
        (folder.http(), Some("Basic YWxpY2U6c2VjcmV0")),
    ] {
        let mut server = Server::with(&http, any).await;
        for path in CHANGES {
            let mut asked = with(request(Method::POST, path), "host", "canary.example");
            if let Some(authorization) = authorization {
                asked = with(asked, "authorization", authorization);
            }
            let stream = server.tcp().await;
            let (reply, ()) = tokio::join!(ask(stream, asked), obey(&mut server.control));
            assert!(reply.status.is_success(), "{path}: {}", reply.text());
        }
    }
}

#[tokio::test]
async fn post_of_another_origin_or_to_another_name_does_nothing() {
    let mut server = Server::start().await;
    for path in CHANGES {
        for (name, value) in [
            ("origin", "http://evil.example"),
            ("origin", "null"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("host", "evil.example"),
            ("host", "localhost.evil.example:9787"),
        ] {
            let asked = with(request(Method::POST, path), name, value);
            let reply = server.ask(asked).await;
            assert_eq!(reply.error().0, 403, "{path} with {name}: {value}");
        }
    }
    assert!(server.control.try_recv().is_err());
    for (name, value) in [
        ("origin", "http://localhost"),
        ("sec-fetch-site", "same-origin"),
        ("host", "[::1]:9787"),
    ] {
        let asked = with(request(Method::POST, CHANGES[1]), name, value);
        let stream = server.tcp().await;
        let (reply, ()) = tokio::join!(ask(stream, asked), obey(&mut server.control));
        assert_eq!(reply.status, StatusCode::ACCEPTED, "{name}: {value}");
    }
}

#[tokio::test]
async fn body_is_refused_before_it_is_read_to_its_end() {
    let mut server = Server::start().await;
    for (body, code) in [(vec![b'x'; 2], 400), (vec![b'x'; 1_000_000], 413)] {
        let asked = request(Method::POST, "/-/reload").map(|_| Full::from(body));
        assert_eq!(server.ask(asked).await.error().0, code);
    }
    assert!(server.control.try_recv().is_err());
    // One that would never end, and one where none is expected.
    for start in [
        "POST /-/reload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST /-/reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n",
    ] {
        let body = "1000\r\n".to_owned() + &"x".repeat(0x1000) + "\r\n";
        let answer = raw(&server, (start.to_owned() + &body + &body).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    }
    let answer = raw(
        &server,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn what_is_no_request_is_refused_and_leaves_the_server_as_it_was() {
    let server = Server::start().await;
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
        // TLS where none is spoken.
        ("\x16\x03\x01\x02\0\x01\0\x01\r\n\r\n".to_owned(), "400"),
    ] {
        let answer = raw(&server, bytes.as_bytes()).await;
        let start = &bytes[..bytes.len().min(40)];
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {code}")),
            "{start:?}: {answer:?}"
        );
    }
    assert_eq!(server.get("/-/healthy").await.status, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn client_that_never_ends_its_head_is_shown_out() {
    let server = Server::start().await;
    for begun in ["", "GET / HTTP/1.1\r\nHost: local"] {
        // The clock runs on while all wait: the read ends because the server has closed.
        let answer = raw(&server, begun.as_bytes()).await;
        assert_eq!(answer, "");
    }
    let (mut sender, mut tasks) = client(server.tcp().await).await;
    let asked = request(Method::GET, "/-/healthy");
    assert_eq!(send(&mut sender, asked).await.status, StatusCode::OK);
    // An open connection that asks nothing more.
    timeout(GIVE_UP, tasks.join_next()).await.unwrap();
}

#[tokio::test]
async fn client_that_takes_nothing_of_its_answer_is_shown_out() {
    let server = Server::start().await;
    // More than the buffers of the kernel hold.
    let project = config::Project {
        url: "wss://acme.livekit.cloud".parse().unwrap(),
        api_key: "some-key".to_owned(),
        api_secret: "some-secret".to_owned().into(),
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
    let asked = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(asked).await.unwrap();
    // The answer has begun; from here on time passes.
    stream.read_u8().await.unwrap();
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(40)).await;
    tokio::time::resume();
    let mut rest = Vec::new();
    let read = stream.read_to_end(&mut rest);
    let read = timeout(GIVE_UP, read).await.unwrap();
    assert!(read.is_err() || rest.len() < whole, "all of it came");
}

#[tokio::test(start_paused = true)]
async fn one_client_more_than_there_are_slots_waits_for_one() {
    let server = Server::start().await;
    let mut idle = Vec::new();
    for _ in 0..256 {
        let mut stream = server.tcp().await;
        let asked = b"GET /-/healthy HTTP/1.1\r\nHost: localhost\r\n\r\n";
        stream.write_all(asked).await.unwrap();
        stream.read_u8().await.unwrap();
        idle.push(stream);
    }
    let asked = server.get("/-/healthy");
    tokio::pin!(asked);
    // Before the idle ones are shown out nothing comes, and then it does.
    let early = timeout(Duration::from_secs(30), asked.as_mut()).await;
    assert!(early.is_err(), "answered beside 256 others");
    assert_eq!(asked.await.status, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn shutdown_lets_an_answer_finish_and_closes_what_is_idle_at_once() {
    let begun = Instant::now();
    let mut server = Server::start().await;
    let (mut idle, mut idle_tasks) = client(server.tcp().await).await;
    let asked = request(Method::GET, "/-/healthy");
    assert_eq!(send(&mut idle, asked).await.status, StatusCode::OK);
    let shutdown = server.shutdown.clone();
    let reply = server
        .steer("/-/reload", |control| {
            shutdown.cancel();
            let Control::Reload { reply } = control else {
                panic!("{control:?}")
            };
            reply.send(Ok(())).unwrap();
        })
        .await;
    assert_eq!(reply.status, StatusCode::OK);
    timeout(GIVE_UP, &mut server.task).await.unwrap().unwrap();
    timeout(GIVE_UP, idle_tasks.join_next()).await.unwrap();
    // On paused time: nothing had to be waited for.
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn shutdown_does_not_wait_for_ever_for_an_answer() {
    let mut server = Server::start().await;
    let (mut sender, _tasks) = client(server.tcp().await).await;
    let asked = sender.send_request(request(Method::POST, "/-/reload"));
    let end = async {
        let unanswered = server.control.recv().await;
        server.shutdown.cancel();
        (&mut server.task).await.unwrap();
        drop(unanswered);
    };
    let (answered, ()) = tokio::join!(asked, end);
    assert!(answered.is_err());
}

/// A folder with a web configuration and what it names.
struct Web {
    folder: TempDir,
}

impl Web {
    /// Writes `web.yml`: this text, with users that have these passwords in place of `{}`.
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
async fn with_users_all_but_health_asks_for_one() {
    let web = Web::new(USERS, &[("alice", "secret"), ("bob", "hunter2")]);
    let server = Server::with_web(&web.http()).await;
    for path in ["/-/healthy", "/-/ready"] {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
    let mut closed = vec!["/", "/metrics", "/api/v1/targets", "/nowhere"];
    closed.extend(CHANGES);
    for path in closed {
        for method in [Method::GET, Method::POST] {
            let reply = server.ask(request(method, path)).await;
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
        let reply = server.ask(get_as("/metrics", name, password)).await;
        assert_eq!(reply.status.as_u16(), code, "{name}");
    }
}

#[tokio::test]
async fn users_are_read_again_and_never_lost() {
    let web = Web::new(USERS, &[("alice", "old")]);
    let server = Server::with_web(&web.http()).await;
    let (mut sender, _tasks) = client(server.tcp().await).await;
    // On an open connection too.
    let mut code = async |password| {
        let asked = get_as("/metrics", "alice", password);
        send(&mut sender, asked).await.status.as_u16()
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
async fn disk_that_does_not_answer_holds_up_nobody() {
    let web = Web::new(USERS, &[("alice", "old")]);
    let server = Server::with_web(&web.http()).await;
    // Whoever opens a pipe without a writer waits for one.
    let (pipe, file, new) = (web.path("pipe"), web.path("web.yml"), web.path("new"));
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    std::fs::hard_link(&pipe, &new).unwrap();
    std::fs::rename(&new, &file).unwrap();
    for _ in 0..2 {
        let reply = server.ask(get_as("/metrics", "alice", "old")).await;
        assert_eq!(reply.status, StatusCode::OK);
    }
    std::fs::remove_file(&file).unwrap();
    web.write(USERS, &[("alice", "new")]);
    // The disk answers at last; what it says is no longer what the file holds.
    let writer = tokio::fs::OpenOptions::new().write(true).open(&pipe).await;
    drop(writer.unwrap());
    let reply = server.ask(get_as("/metrics", "alice", "new")).await;
    assert_eq!(reply.status, StatusCode::OK);
}

/// A certificate authority, and a client that trusts it.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Self {
            issuer: Issuer::new(params, key),
            root,
        }
    }

    /// Writes a certificate for `name` and its key; the certificate's bytes are returned.
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
        server: &Server,
        versions: &[&'static SupportedProtocolVersion],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        let provider = Arc::new(crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, server.tcp().await)
            .await
    }
}

const TLS: &str = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n";
const BOTH: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];

fn presented(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    let (_, session) = stream.get_ref();
    session.peer_certificates().unwrap()[0].clone().into_owned()
}

/// A folder with a certificate for localhost, and its authority.
fn tls_web(yaml: &str, users: &[(&str, &str)]) -> (Web, Authority, CertificateDer<'static>) {
    let web = Web::new(yaml, users);
    let authority = Authority::new();
    let certificate = authority.issue(
        "localhost",
        &web.path("server.crt"),
        &web.path("server.key"),
    );
    (web, authority, certificate)
}

#[tokio::test]
async fn tls_is_spoken_with_the_certificate_of_the_file_and_users_still_asked_for() {
    let yaml = TLS.to_owned() + USERS;
    let (web, authority, certificate) = tls_web(&yaml, &[("alice", "secret")]);
    let server = Server::with_web(&web.http()).await;
    for versions in [&BOTH[..], &BOTH[1..]] {
        let stream = authority.connect(&server, versions).await.unwrap();
        assert_eq!(presented(&stream), certificate);
        let reply = ask(stream, get_as("/metrics", "alice", "secret")).await;
        assert!(reply.text().contains(SERIES), "{}", reply.text());
    }
    let stream = authority.connect(&server, &BOTH).await.unwrap();
    let reply = ask(stream, request(Method::GET, "/metrics")).await;
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
    // A version without users opens nothing.
    web.write(TLS, &[]);
    let stream = authority.connect(&server, &BOTH).await.unwrap();
    let reply = ask(stream, request(Method::GET, "/metrics")).await;
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
    // Whoever speaks no TLS hears no HTTP.
    let answer = server.tcp().await;
    let (mut sender, _tasks) = client(answer).await;
    let asked = sender.send_request(request(Method::GET, "/-/healthy"));
    assert!(timeout(GIVE_UP, asked).await.unwrap().is_err());
}

#[tokio::test]
async fn older_version_than_the_least_is_refused() {
    let yaml = TLS.to_owned() + "  min_version: TLS13\n";
    let (web, authority, _) = tls_web(&yaml, &[]);
    let server = Server::with_web(&web.http()).await;
    assert!(authority.connect(&server, &BOTH[1..]).await.is_err());
    let stream = authority.connect(&server, &BOTH).await.unwrap();
    let reply = ask(stream, request(Method::GET, "/-/ready")).await;
    assert_eq!(reply.status, StatusCode::OK);
}

#[tokio::test]
async fn certificate_is_read_again_for_the_next_connection_and_kept_while_the_new_one_is_broken() {
    let (web, authority, first) = tls_web(TLS, &[]);
    let server = Server::with_web(&web.http()).await;
    let certificate = async || {
        let stream = authority.connect(&server, &BOTH).await.unwrap();
        presented(&stream)
    };
    assert_eq!(certificate().await, first);
    let (file, key) = (web.path("server.crt"), web.path("server.key"));
    // The certificate has come, its key not yet.
    let other = web.path("other.key");
    let second = authority.issue("localhost", &file, &other);
    assert_eq!(certificate().await, first);
    std::fs::rename(&other, &key).unwrap();
    assert_eq!(certificate().await, second);

    std::fs::write(&file, "").unwrap();
    assert_eq!(certificate().await, second);
    std::fs::remove_file(&key).unwrap();
    assert_eq!(certificate().await, second);
    // TLS must not be lost with its settings.
    web.write(USERS, &[("alice", "secret")]);
    assert_eq!(certificate().await, second);
    web.write(TLS, &[]);
    let third = authority.issue("localhost", &file, &key);
    assert_eq!(certificate().await, third);
}

#[tokio::test(start_paused = true)]
async fn client_that_never_begins_its_handshake_is_shown_out() {
    let (web, ..) = tls_web(TLS, &[]);
    let server = Server::with_web(&web.http()).await;
    assert_eq!(raw(&server, b"").await, "");
    assert_eq!(raw(&server, b"\x16\x03\x01").await, "");
}

#[test]
fn web_configuration_that_would_not_come_about_is_an_error_that_names_the_key() {
    let (web, ..) = tls_web(TLS, &[]);
    let stranger = Authority::new();
    stranger.issue(
        "localhost",
        &web.path("stranger.crt"),
        &web.path("stranger.key"),
    );
    std::fs::write(web.path("empty.pem"), "").unwrap();
    std::fs::write(
        web.path("broken.pem"),
        "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    let tls = |lines: &str| format!("tls_server_config: {{ {lines} }}");
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
        tls("cert_file: server.crt, key_file: stranger.key"),
        tls("cert_file: server.key, key_file: server.key"),
        tls("cert_file: server.crt, key_file: server.crt"),
        tls("cert_file: empty.pem, key_file: server.key"),
        tls("cert_file: broken.pem, key_file: server.key"),
        tls("cert_file: server.crt, key_file: server.key, min_version: TLS11"),
        tls("cert_file: server.crt, key_file: server.key, client_auth_type: RequireAnyClientCert"),
        tls("cert_file: server.crt, key_file: server.key, client_ca_file: ca.crt"),
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
