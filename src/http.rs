//! The daemon over HTTP: metrics, health, a status page, a JSON API, and the few POSTs that steer it.
//!
//! It knows no probe: what it shows is handed to it as [`Sources`], and what it is asked to do it passes on as
//! [`Control`].

use std::convert::Infallible;
use std::io::{self, Write};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY,
    LOCATION, VARY, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Collected, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::select;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use answer::{Answer, Refusal, answer, json, plain};
use route::Route;
use users::Passwords;
use web_config::Protection;

use crate::history::History;
use crate::metrics::{self, InternalError, Metrics};

mod access;
mod answer;
mod api;
mod health;
mod page;
mod route;
mod status;
mod users;
mod web_config;

pub use health::{Health, Pulse};
pub use status::{
    BatchRefused, BudgetStatus, Control, LastReload, NoSuchTarget, ProjectStatus, ReloadRefused,
    Stage, Status, TargetStatus,
};
pub use web_config::WebConfig;

/// Where answers come from.
pub struct Sources {
    pub metrics: Metrics,
    pub status: watch::Receiver<Arc<Status>>,
    pub health: Health,
    pub history: History,
    pub control: mpsc::Sender<Control>,
}

/// What is open at once; the rest waits in the listener's queue.
const MOST_CONNECTIONS: usize = 256;
const LONGEST_HANDSHAKE: Duration = Duration::from_secs(10);
/// From the connection's begin, or from the answer before, to the whole head of a request. Beyond the minute in which
/// a scraper comes back to its open connection.
const LONGEST_WAIT_FOR_A_REQUEST: Duration = Duration::from_secs(65);
/// From the head of a request to its answer.
const LONGEST_REQUEST: Duration = Duration::from_secs(30);
/// How long a client may take nothing of what is written to it.
const LONGEST_STALL: Duration = Duration::from_secs(30);
/// What answers that are under way at the end may still take.
const LONGEST_FAREWELL: Duration = Duration::from_secs(5);
/// The request line and all headers of a request.
const MOST_HEAD_BYTES: usize = 32 * 1024;
/// No request needs a body: this much is read to say so.
const MOST_BODY_BYTES: usize = 4 * 1024;
/// Each takes a core for some milliseconds.
const RENDERINGS_AT_ONCE: usize = 2;

/// Answers on `listener` until `shutdown`, then finishes what is under way.
pub async fn serve(
    listener: TcpListener,
    web: WebConfig,
    sources: Sources,
    shutdown: CancellationToken,
) {
    let on_loopback = listener
        .local_addr()
        .is_ok_and(|address| address.ip().to_canonical().is_loopback());
    let site = Arc::new(Site {
        on_loopback,
        web,
        passwords: Passwords::new(),
        renderings: Arc::new(Semaphore::new(RENDERINGS_AT_ONCE)),
        sources,
    });
    let slots = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    while let Some((stream, slot)) = select! {
        () = shutdown.cancelled() => None,
        next = next_connection(&listener, &slots) => Some(next),
    } {
        while let Some(ended) = connections.try_join_next() {
            site.report(ended);
        }
        connections.spawn(connection(
            stream,
            Arc::clone(&site),
            shutdown.clone(),
            slot,
        ));
    }
    drop(listener);
    let farewell = async {
        while let Some(ended) = connections.join_next().await {
            site.report(ended);
        }
    };
    if timeout(LONGEST_FAREWELL, farewell).await.is_err() {
        connections.shutdown().await;
    }
}

async fn next_connection(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> (TcpStream, OwnedSemaphorePermit) {
    let slot = Arc::clone(slots).acquire_owned().await;
    let slot = slot.expect("nobody closes the semaphore");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, slot),
            Err(error) => {
                warn!("HTTP: a connection could not be accepted: {error}");
                // Out of descriptors or memory: asking again at once would only take a core as well.
                sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// Serves one client until it leaves or `shutdown`; its slot is free again after.
async fn connection(
    stream: TcpStream,
    site: Arc<Site>,
    shutdown: CancellationToken,
    _slot: OwnedSemaphorePermit,
) {
    let opened = select! {
        () = shutdown.cancelled() => return,
        opened = timeout(LONGEST_HANDSHAKE, open(stream, &site.web)) => opened,
    };
    match opened {
        Ok(Ok(stream)) => converse(stream, site, &shutdown).await,
        Ok(Err(error)) => debug!("HTTP: TLS handshake failed: {error}"),
        Err(_) => debug!("HTTP: no TLS handshake within {LONGEST_HANDSHAKE:?}"),
    }
}

type Tcp = Pin<Box<TimeoutStream<TcpStream>>>;

/// Plain, or TLS with the certificate that is there now.
async fn open(stream: TcpStream, web: &WebConfig) -> io::Result<Either<Tcp, TlsStream<Tcp>>> {
    let mut stream = Box::pin(TimeoutStream::new(stream));
    stream
        .as_mut()
        .set_write_timeout_pinned(Some(LONGEST_STALL));
    match &web.current().await.tls {
        None => Ok(Either::Left(stream)),
        Some(config) => {
            let accepted = TlsAcceptor::from(Arc::clone(config)).accept(stream).await;
            accepted.map(Either::Right)
        }
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    site: Arc<Site>,
    shutdown: &CancellationToken,
) {
    let service = service_fn(|request| {
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(site.answer(request).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(LONGEST_WAIT_FOR_A_REQUEST)
            .max_buf_size(MOST_HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service)
    );
    let ended = select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!("HTTP: a connection broke: {error}");
    }
}

/// Everything that an answer depends on.
struct Site {
    on_loopback: bool,
    web: WebConfig,
    passwords: Passwords,
    renderings: Arc<Semaphore>,
    sources: Sources,
}

impl Site {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let mut answer = match timeout(LONGEST_REQUEST, self.decide(request)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(refusal)) => refusal.into(),
            Err(_) => {
                let text = format!("no answer within {LONGEST_REQUEST:?}");
                Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text).into()
            }
        };
        let headers = answer.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        answer
    }

    async fn decide(&self, request: Request<Incoming>) -> Result<Answer, Refusal> {
        let (head, body) = request.into_parts();
        let route = Route::of(head.uri.path());
        if let Some(route) = route.filter(|route| route.is_for_everybody()) {
            route.check(&head.method)?;
            return self.carry_out(route, &head).await;
        }
        // Before anything else: who may not ask doesn't learn which paths there are.
        let protection = self.web.current().await;
        self.admit(&head.headers, &protection).await?;
        let route = route.ok_or_else(|| {
            let text = "no such path; / has links to those there are";
            Refusal::new(StatusCode::NOT_FOUND, text)
        })?;
        route.check(&head.method)?;
        if route.takes_no_query() {
            api::query(&head.uri, [])?;
        }
        if route.changes() {
            self.permit_change(&head.headers, &protection)?;
            expect_no_body(body).await?;
        }
        self.carry_out(route, &head).await
    }

    async fn carry_out(&self, route: Route<'_>, head: &Parts) -> Result<Answer, Refusal> {
        let status = || Arc::clone(&self.sources.status.borrow());
        match route {
            Route::Page => Ok(page(&status())),
            Route::Metrics => self.metrics(&head.headers).await,
            Route::Healthy => Ok(healthy(&self.sources.health)),
            Route::Ready => Ok(ready(status().stage)),
            Route::Targets => Ok(json(StatusCode::OK, &*status())),
            Route::Batches => api::batches(&self.sources.history, &head.uri).await,
            Route::Batch(id) => api::batch(&self.sources.history, id).await,
            Route::Probe(room) => api::probe(&self.sources.history, room).await,
            Route::Reload => self.reload().await,
            Route::RunBatch(target) => self.run_batch(target).await,
            Route::Pause(target) => self.set_paused(target, true).await,
            Route::Resume(target) => self.set_paused(target, false).await,
        }
    }

    /// Lets everybody in where there are no users.
    async fn admit(&self, headers: &HeaderMap, protection: &Protection) -> Result<(), Refusal> {
        let Some(users) = &protection.users else {
            return Ok(());
        };
        let authorization = headers.get(AUTHORIZATION);
        if self.passwords.admit(users, authorization).await {
            return Ok(());
        }
        let text = match authorization {
            None => "a user and a password are needed",
            Some(_) => "no such user, or another password",
        };
        let challenge =
            HeaderValue::from_static("Basic realm=\"livekit-canary\", charset=\"UTF-8\"");
        Err(Refusal::new(StatusCode::UNAUTHORIZED, text).with(WWW_AUTHENTICATE, challenge))
    }

    /// Whether this request may steer the canary.
    fn permit_change(&self, headers: &HeaderMap, protection: &Protection) -> Result<(), Refusal> {
        let forbidden = |text| Err(Refusal::new(StatusCode::FORBIDDEN, text));
        let trusted = protection.users.is_some() || self.web.enable_lifecycle;
        if !trusted && !self.on_loopback {
            return forbidden(
                "POST is off: it needs users (basic_auth_users in http.web_config_file), a loopback address in \
                 http.listen, or http.enable_lifecycle = true",
            );
        }
        // Whom a loopback address alone lets in must have meant it.
        if !trusted && !access::is_for_loopback(headers) {
            return forbidden(
                "POST needs localhost, 127.0.0.1 or [::1] as Host here: http.listen is a loopback address, and there \
                 are no users",
            );
        }
        if access::is_cross_origin(headers) {
            return forbidden("a page of another origin may not do this");
        }
        Ok(())
    }

    /// Off the async threads: with many targets it takes long enough to be heard in the probes' audio.
    async fn metrics(&self, headers: &HeaderMap) -> Result<Answer, Refusal> {
        let turn = Arc::clone(&self.renderings).acquire_owned().await;
        let turn = turn.expect("nobody closes the semaphore");
        let gzip = takes_gzip(headers);
        let metrics = self.sources.metrics.clone();
        let rendering = task::spawn_blocking(move || {
            let _turn = turn;
            let text = metrics.render();
            if gzip { compressed(&text) } else { text.into() }
        });
        let body = rendering.await.map_err(|error| {
            error!("HTTP: rendering the metrics failed: {error}");
            self.our_fault("the metrics could not be rendered")
        })?;
        let mut answer = answer(StatusCode::OK, metrics::CONTENT_TYPE, body);
        let headers = answer.headers_mut();
        headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
        if gzip {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        Ok(answer)
    }

    async fn reload(&self) -> Result<Answer, Refusal> {
        self.ask(|reply| Control::Reload { reply })
            .await?
            .map_err(|refused| {
                let status = match refused {
                    ReloadRefused::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
                    ReloadRefused::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
                };
                Refusal::new(status, refused.to_string())
            })?;
        Ok(json(StatusCode::OK, &json!({ "reloaded": true })))
    }

    async fn run_batch(&self, target: &str) -> Result<Answer, Refusal> {
        let target = target.to_owned();
        let batch_id = self
            .ask(|reply| Control::RunBatch { target, reply })
            .await?
            .map_err(|refused| {
                let text = refused.to_string();
                match refused {
                    BatchRefused::Busy { .. } => Refusal::new(StatusCode::CONFLICT, text),
                    BatchRefused::Refused { retry_after, .. } => {
                        let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, text);
                        match retry_after {
                            Some(wait) => refusal.retry_after(wait),
                            None => refusal,
                        }
                    }
                    BatchRefused::NoSuchTarget => Refusal::new(StatusCode::NOT_FOUND, text),
                    BatchRefused::ShuttingDown => {
                        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text)
                    }
                }
            })?;
        let mut answer = json(StatusCode::ACCEPTED, &json!({ "batch_id": batch_id }));
        // It is there once the batch has ended.
        if let Ok(location) = HeaderValue::try_from(format!("/api/v1/batches/{batch_id}")) {
            answer.headers_mut().insert(LOCATION, location);
        }
        Ok(answer)
    }

    async fn set_paused(&self, target: &str, paused: bool) -> Result<Answer, Refusal> {
        let name = target.to_owned();
        self.ask(|reply| Control::SetPaused {
            target: name,
            paused,
            reply,
        })
        .await?
        .map_err(|unknown: NoSuchTarget| {
            Refusal::new(StatusCode::NOT_FOUND, unknown.to_string())
        })?;
        let done = json!({ "target": target, "paused": paused });
        Ok(json(StatusCode::OK, &done))
    }

    fn our_fault(&self, text: &str) -> Refusal {
        self.sources.metrics.internal_error(InternalError::Http);
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text)
    }

    /// The end of a connection's task, which is no news unless it panicked.
    fn report(&self, ended: Result<(), JoinError>) {
        if let Err(error) = ended {
            error!("HTTP: {error}");
            self.sources.metrics.internal_error(InternalError::Http);
        }
    }

    /// Hands a request to the daemon and waits for its word; the request's deadline bounds both.
    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Control,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        let sent = self.sources.control.send(request(reply)).await;
        sent.map_err(|_| {
            let text = ReloadRefused::ShuttingDown.to_string();
            Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text)
        })?;
        answer
            .await
            .map_err(|_| self.our_fault("the canary has dropped this request; its log says why"))
    }
}

fn page(status: &Status) -> Answer {
    let page = page::render(status, chrono::Utc::now());
    let mut answer = answer(StatusCode::OK, "text/html; charset=utf-8", page);
    let policy = HeaderValue::from_static(page::POLICY);
    answer.headers_mut().insert(CONTENT_SECURITY_POLICY, policy);
    answer
}

fn healthy(health: &Health) -> Answer {
    match &health.failing()[..] {
        [] => plain(StatusCode::OK, "livekit-canary is healthy"),
        failing => plain(StatusCode::SERVICE_UNAVAILABLE, &failing.join("\n")),
    }
}

fn ready(stage: Stage) -> Answer {
    match stage {
        Stage::Starting => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "livekit-canary is starting",
        ),
        Stage::Running => plain(StatusCode::OK, "livekit-canary is ready"),
        Stage::Draining => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "livekit-canary is draining",
        ),
    }
}

/// A body that would be ignored is refused: whoever sends one expects something of it.
async fn expect_no_body(body: Incoming) -> Result<(), Refusal> {
    let refusal = |status| Refusal::new(status, "this path takes no body");
    let read = Limited::new(body, MOST_BODY_BYTES).collect().await;
    match read.map(Collected::to_bytes) {
        Ok(body) if body.is_empty() => Ok(()),
        Ok(_) => Err(refusal(StatusCode::BAD_REQUEST)),
        Err(error) if error.is::<LengthLimitError>() => Err(refusal(StatusCode::PAYLOAD_TOO_LARGE)),
        Err(error) => {
            let text = format!("the body could not be read: {error}");
            Err(Refusal::new(StatusCode::BAD_REQUEST, text))
        }
    }
}

/// What `Accept-Encoding` says of gzip (RFC 9110, 12.5.3): its own weight goes before that of `*`.
fn takes_gzip(headers: &HeaderMap) -> bool {
    let weights = headers
        .get_all(ACCEPT_ENCODING)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|coding| {
            let mut parts = coding.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default().to_ascii_lowercase();
            let refused = parts.any(|part| {
                let weight = part.strip_prefix("q=").or(part.strip_prefix("Q="));
                weight.is_some_and(|weight| weight.parse() == Ok(0.0))
            });
            (name, !refused)
        });
    let (mut gzip, mut any) = (None, None);
    for (name, accepted) in weights {
        match name.as_str() {
            "gzip" | "x-gzip" => gzip = Some(accepted),
            "*" => any = Some(accepted),
            _ => {}
        }
    }
    gzip.or(any).unwrap_or(false)
}

fn compressed(text: &str) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::with_capacity(text.len() / 8), Compression::fast());
    encoder
        .write_all(text.as_bytes())
        .and_then(|()| encoder.finish())
        .expect("a Vec takes everything")
        .into()
}
