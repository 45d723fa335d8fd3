//! The paths: what each requires of a request, and which handler responds.
//!
//! [`ReadRoute`] and [`ChangeRoute`] are apart so that the compiler guards every change of state: the enum decides the method,
//! and only [`AppState::respond`] calls [`AppState::change`], with the [`ChangePermit`] that every handler of a change needs.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use http::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, LOCATION, X_CONTENT_TYPE_OPTIONS,
};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt, Collected, LengthLimitError, Limited};
use hyper::body::Incoming;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::access::{self, ChangePermit, Protection};
use super::api::Api;
use super::control::{Control, Controller, NoSuchTarget};
use super::health::Health;
use super::live::LiveProgress;
use super::page::{self, PageError, Pages};
use super::response::{HttpError, ServerResponse, json, plain, response};
use super::scrape::Scrapes;
use super::status::{DaemonStage, Status};
use super::stream::Streams;
use super::users::Passwords;
use super::web_config::WebConfig;
use super::{api, audio, badge, event};
use crate::history::History;
use crate::livekit::event::Speaker;
use crate::metrics::{InternalError, Metrics};

/// The `http` crate has no constant for it.
const CROSS_ORIGIN_RESOURCE_POLICY: HeaderName =
    HeaderName::from_static("cross-origin-resource-policy");

/// From the headers of a request to its response.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest body of a request that changes something.
const MAX_BODY_BYTES: usize = 4 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route<'a> {
    /// GET or HEAD.
    Read(ReadRoute<'a>),
    /// POST, with the lifecycle permission.
    Change(ChangeRoute<'a>),
}

/// The routes that change nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    test,
    derive(strum::EnumDiscriminants),
    strum_discriminants(name(ReadRouteKind), derive(strum::VariantArray, Hash))
)]
pub(super) enum ReadRoute<'a> {
    /// The overview.
    Page,
    /// By the target's name.
    TargetPage(&'a str),
    BatchesPage,
    /// By the batch's id.
    BatchPage(&'a str),
    ProbesPage,
    /// By the name of the probe's room.
    ProbePage(&'a str),
    IncidentsPage,
    /// By the incident's id.
    IncidentPage(&'a str),
    /// A document of `docs/`, by its name.
    DocsPage(&'a str),
    /// The style sheet, the script or an icon, by its file name.
    Asset(&'a str),
    Metrics,
    Healthy,
    Ready,
    Targets,
    Batches,
    /// By the batch's id.
    Batch(&'a str),
    /// By the name of the probe's room.
    Probe(&'a str),
    /// One track of a recorded call.
    Audio {
        room: &'a str,
        track: Speaker,
    },
    Incidents,
    /// By the incident's id.
    Incident(&'a str),
    Probes,
    Events,
    Statistics,
    /// By the target's name.
    Badge(&'a str),
    Stream,
}

/// The routes that change the daemon's state or the history. Each name is a target's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    test,
    derive(strum::EnumDiscriminants),
    strum_discriminants(name(ChangeRouteKind), derive(strum::VariantArray, Hash))
)]
pub(super) enum ChangeRoute<'a> {
    Reload,
    RunBatch(&'a str),
    Pause(&'a str),
    Resume(&'a str),
    RecordEvent,
}

/// What a read requires of its request.
struct ReadRule {
    /// Whether the request must name a user, if there are users.
    needs_user: bool,
    /// Whether a query is allowed. If it is not, a query is a mistake that the response reports.
    takes_query: bool,
}

impl<'a> Route<'a> {
    /// Compares names as they are: no batch, room, incident or target has a name that a path must escape. The method only
    /// matters for a path that both reads and changes.
    pub(super) fn parse(method: &Method, path: &'a str) -> Option<Self> {
        let segments: Vec<_> = path.strip_prefix('/')?.split('/').collect();
        let route = match segments[..] {
            [""] => Self::Read(ReadRoute::Page),
            ["targets", name] => Self::Read(ReadRoute::TargetPage(name)),
            ["batches", id] => Self::Read(ReadRoute::BatchPage(id)),
            ["batches"] => Self::Read(ReadRoute::BatchesPage),
            ["probes"] => Self::Read(ReadRoute::ProbesPage),
            ["incidents"] => Self::Read(ReadRoute::IncidentsPage),
            ["docs", name] => Self::Read(ReadRoute::DocsPage(name)),
            ["probes", room] => Self::Read(ReadRoute::ProbePage(room)),
            ["incidents", id] => Self::Read(ReadRoute::IncidentPage(id)),
            ["assets", file] => Self::Read(ReadRoute::Asset(file)),
            ["metrics"] => Self::Read(ReadRoute::Metrics),
            ["-", "healthy"] => Self::Read(ReadRoute::Healthy),
            ["-", "ready"] => Self::Read(ReadRoute::Ready),
            ["-", "reload"] => Self::Change(ChangeRoute::Reload),
            ["api", "v1", ref api @ ..] => return Self::parse_api(method, api),
            _ => return None,
        };
        Some(route)
    }

    fn parse_api(method: &Method, segments: &[&'a str]) -> Option<Self> {
        let route = match *segments {
            ["events"] if method == Method::POST => Self::Change(ChangeRoute::RecordEvent),
            ["events"] => Self::Read(ReadRoute::Events),
            ["statistics"] => Self::Read(ReadRoute::Statistics),
            ["stream"] => Self::Read(ReadRoute::Stream),
            ["targets", name, "badge.svg"] => Self::Read(ReadRoute::Badge(name)),
            ["targets"] => Self::Read(ReadRoute::Targets),
            ["batches"] => Self::Read(ReadRoute::Batches),
            ["batches", id] => Self::Read(ReadRoute::Batch(id)),
            ["probes"] => Self::Read(ReadRoute::Probes),
            ["probes", room] => Self::Read(ReadRoute::Probe(room)),
            ["probes", room, "audio", file] => Self::Read(ReadRoute::Audio {
                room,
                track: audio::track(file)?,
            }),
            ["incidents"] => Self::Read(ReadRoute::Incidents),
            ["incidents", id] => Self::Read(ReadRoute::Incident(id)),
            ["targets", name, "batches"] => Self::Change(ChangeRoute::RunBatch(name)),
            ["targets", name, "pause"] => Self::Change(ChangeRoute::Pause(name)),
            ["targets", name, "resume"] => Self::Change(ChangeRoute::Resume(name)),
            _ => return None,
        };
        Some(route)
    }

    /// # Errors
    /// 405 with the methods that the route accepts.
    pub(super) fn check_method(self, method: &Method) -> Result<(), HttpError> {
        let (accepted, allowed) = match self {
            Self::Read(ReadRoute::Events) => (
                method == Method::GET || method == Method::HEAD,
                "GET, HEAD, POST",
            ),
            Self::Read(_) => (method == Method::GET || method == Method::HEAD, "GET, HEAD"),
            Self::Change(_) => (method == Method::POST, "POST"),
        };
        if accepted {
            return Ok(());
        }
        let text = format!("this path accepts {allowed}, not {method}");
        Err(HttpError::new(StatusCode::METHOD_NOT_ALLOWED, text)
            .with(ALLOW, HeaderValue::from_static(allowed)))
    }
}

impl ReadRoute<'_> {
    /// Whether the response has what was said in a call.
    pub(super) fn is_sensitive(self) -> bool {
        matches!(self, Self::Audio { .. })
    }

    fn rule(self) -> ReadRule {
        let (needs_user, takes_query) = match self {
            // The health probes of an orchestrator have no password.
            Self::Healthy | Self::Ready => (false, true),
            // Browsers and scrapers may add a query of their own to what isn't API.
            Self::Page
            | Self::TargetPage(_)
            | Self::DocsPage(_)
            | Self::BatchesPage
            | Self::ProbesPage
            | Self::IncidentsPage
            | Self::BatchPage(_)
            | Self::ProbePage(_)
            | Self::IncidentPage(_)
            | Self::Asset(_)
            | Self::Metrics
            | Self::Batches
            | Self::Probes
            | Self::Incidents
            | Self::Events
            // A README or a wiki may add a query, so that no copy of the picture is shown.
            | Self::Badge(_) => (true, true),
            Self::Targets
            | Self::Batch(_)
            | Self::Probe(_)
            | Self::Audio { .. }
            | Self::Incident(_)
            | Self::Statistics
            | Self::Stream => (true, false),
        };
        ReadRule {
            needs_user,
            takes_query,
        }
    }
}

/// What the daemon gives to the server.
pub(crate) struct Sources {
    pub(crate) metrics: Metrics,
    pub(crate) status: watch::Receiver<Arc<Status>>,
    pub(crate) health: Health,
    pub(crate) history: History,
    /// Receives the requests that change the daemon's state.
    pub(crate) control: mpsc::Sender<Control>,
    pub(crate) progress: LiveProgress,
}

/// What the responses are made from, and what decides whether a request is allowed.
pub(super) struct AppState {
    /// Whether the listener's address is a loopback address.
    on_loopback: bool,
    web: WebConfig,
    passwords: Passwords,
    scrapes: Scrapes,
    controller: Controller,
    metrics: Metrics,
    status: watch::Receiver<Arc<Status>>,
    health: Health,
    history: History,
    streams: Streams,
    live: LiveProgress,
}

impl AppState {
    /// The streams end at `shutdown`.
    pub(super) fn new(
        on_loopback: bool,
        web: WebConfig,
        sources: Sources,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            on_loopback,
            streams: Streams::new(sources.status.clone(), sources.progress.clone(), shutdown),
            live: sources.progress,
            web,
            passwords: Passwords::new(),
            scrapes: Scrapes::new(sources.metrics.clone()),
            controller: Controller::new(sources.control, sources.metrics.clone()),
            metrics: sources.metrics,
            status: sources.status,
            health: sources.health,
            history: sources.history,
        }
    }

    pub(super) fn web(&self) -> &WebConfig {
        &self.web
    }

    pub(super) fn count_internal_error(&self) {
        self.metrics.internal_error(InternalError::Http);
    }

    pub(super) async fn respond(&self, request: Request<Incoming>) -> ServerResponse {
        let mut response = match timeout(REQUEST_TIMEOUT, self.try_respond(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => error.into(),
            Err(_) => {
                let text = format!("the canary did not respond within {REQUEST_TIMEOUT:?}");
                HttpError::new(StatusCode::SERVICE_UNAVAILABLE, text).into()
            }
        };
        let headers = response.headers_mut();
        headers
            .entry(CACHE_CONTROL)
            .or_insert(HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        response
    }

    async fn try_respond(&self, request: Request<Incoming>) -> Result<ServerResponse, HttpError> {
        let (head, body) = request.into_parts();
        let route = Route::parse(&head.method, head.uri.path());
        if let Some(route @ Route::Read(read)) = route
            && !read.rule().needs_user
        {
            route.check_method(&head.method)?;
            // These paths show nothing that needs a protection.
            return self.read(read, &head, Protection::default()).await;
        }
        // Before every other check: a client without a user does not learn which paths exist.
        let security = self.web.current().await;
        if let Some(users) = &security.users {
            self.passwords.authenticate(users, &head.headers).await?;
        }
        let protection = Protection {
            has_users: security.users.is_some(),
            has_client_certificates: security.client_auth.identifies_every_client(),
            sensitive: self.web.sensitive,
            enable_lifecycle: self.web.enable_lifecycle,
            on_loopback: self.on_loopback,
        };
        access::check_host(&head.headers, protection)?;
        let route = route.ok_or_else(|| {
            let text = "no such path; / links to those that exist";
            HttpError::new(StatusCode::NOT_FOUND, text)
        })?;
        route.check_method(&head.method)?;
        match route {
            Route::Read(read) => {
                if !read.rule().takes_query {
                    api::query(&head.uri, [])?;
                }
                self.read(read, &head, protection).await
            }
            Route::Change(change) => {
                api::query(&head.uri, [])?;
                let permit = access::permit_change(&head.headers, protection)?;
                let body = read_body(body).await?;
                self.change(change, &body, permit, &head.headers).await
            }
        }
    }

    async fn read(
        &self,
        route: ReadRoute<'_>,
        head: &Parts,
        protection: Protection,
    ) -> Result<ServerResponse, HttpError> {
        if route.is_sensitive() {
            protection.check_sensitive()?;
        }
        let mut answer = self.answer(route, head, protection).await;
        if route.is_sensitive()
            && let Ok(response) = &mut answer
        {
            // A page of another origin can't play it either.
            let policy = HeaderValue::from_static("same-origin");
            response
                .headers_mut()
                .insert(CROSS_ORIGIN_RESOURCE_POLICY, policy);
        }
        answer
    }

    async fn answer(
        &self,
        route: ReadRoute<'_>,
        head: &Parts,
        protection: Protection,
    ) -> Result<ServerResponse, HttpError> {
        let status = Arc::clone(&self.status.borrow());
        let api = Api {
            history: &self.history,
            metrics: &self.metrics,
            protection,
        };
        let pages = Pages {
            status: &status,
            live: &self.live,
            api,
            now: Utc::now(),
        };
        match route {
            ReadRoute::Page => self.page(pages.overview().await, 0),
            ReadRoute::TargetPage(name) => self.page(pages.target(name).await, 1),
            ReadRoute::BatchesPage => self.page(pages.batches(&head.uri).await, 0),
            ReadRoute::BatchPage(id) => self.page(pages.batch(id).await, 1),
            ReadRoute::ProbesPage => self.page(pages.probes(&head.uri).await, 0),
            ReadRoute::ProbePage(room) => self.page(pages.probe(room).await, 1),
            ReadRoute::IncidentsPage => self.page(pages.incidents(&head.uri).await, 0),
            ReadRoute::IncidentPage(id) => self.page(pages.incident(id).await, 1),
            ReadRoute::DocsPage(name) => self.page(page::docs(name), 1),
            ReadRoute::Asset(file) => asset(file),
            ReadRoute::Metrics => self.scrapes.respond(&head.headers).await,
            ReadRoute::Healthy => Ok(healthy(&self.health)),
            ReadRoute::Ready => Ok(ready(status.stage)),
            ReadRoute::Targets => Ok(json(StatusCode::OK, &*status)),
            ReadRoute::Batches => api.batches(&head.uri).await,
            ReadRoute::Batch(id) => api.batch(id).await,
            ReadRoute::Probes => api.probes(&head.uri).await,
            ReadRoute::Probe(room) => api.probe(room).await,
            ReadRoute::Audio { room, track } => {
                audio::recording(&self.history, room, track, &head.headers).await
            }
            ReadRoute::Incidents => api.incidents(&head.uri).await,
            ReadRoute::Incident(id) => api.incident(id).await,
            ReadRoute::Events => api.events(&head.uri).await,
            ReadRoute::Statistics => api.statistics(Utc::now()).await,
            ReadRoute::Badge(name) => badge(&status, name),
            ReadRoute::Stream => self.streams.open(),
        }
    }

    /// A page, or the page of the error. `depth` is the number of folders above it.
    fn page(
        &self,
        page: Result<String, PageError>,
        depth: usize,
    ) -> Result<ServerResponse, HttpError> {
        let (status, text) = match page {
            Ok(page) => (StatusCode::OK, page),
            Err(PageError::Http(error)) => (error.status(), page::error(error.text(), depth)),
            Err(PageError::History(error)) => {
                let error = api::unreadable(error);
                (error.status(), page::error(error.text(), depth))
            }
            Err(PageError::Document(error)) => {
                warn!("HTTP: a document of the history can't be shown: {error}");
                let text = "a document of the history can't be shown; the log says why";
                return Err(HttpError::internal(&self.metrics, text));
            }
        };
        let mut response = response(status, "text/html; charset=utf-8", text);
        let policy = HeaderValue::from_static(page::POLICY);
        response
            .headers_mut()
            .insert(CONTENT_SECURITY_POLICY, policy);
        Ok(response)
    }

    async fn change(
        &self,
        route: ChangeRoute<'_>,
        body: &[u8],
        permit: ChangePermit,
        headers: &HeaderMap,
    ) -> Result<ServerResponse, HttpError> {
        let controller = &self.controller;
        // A client that sends a body expects an effect of it, so a body is an error and never ignored.
        if !matches!(route, ChangeRoute::RecordEvent) && !body.is_empty() {
            let text = "this path takes no body";
            return Err(HttpError::new(StatusCode::BAD_REQUEST, text));
        }
        match route {
            ChangeRoute::RecordEvent => {
                let status = Arc::clone(&self.status.borrow());
                event::record(&self.history, &status, body, Utc::now(), permit).await
            }
            ChangeRoute::Reload => controller.reload(permit).await,
            ChangeRoute::RunBatch(target) => {
                let started = controller.run_batch(permit, target).await;
                started.map(|response| for_a_page(response, headers))
            }
            ChangeRoute::Pause(target) => controller.set_paused(permit, target, true).await,
            ChangeRoute::Resume(target) => controller.set_paused(permit, target, false).await,
        }
    }
}

/// The answer to the form of a page leads on to the page of what was started. `Location` is a path of the API.
fn for_a_page(mut response: ServerResponse, headers: &HeaderMap) -> ServerResponse {
    let accepted = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
    let is_form = accepted.is_some_and(|accepted| accepted.contains("text/html"));
    let location = response
        .headers()
        .get(LOCATION)
        .and_then(|value| value.to_str().ok());
    let page = location.and_then(|location| location.strip_prefix("/api/v1/"));
    // Relative to `/api/v1/targets/{name}/batches`, so that it holds behind a prefix of a proxy.
    let page = page.and_then(|page| HeaderValue::try_from(format!("../../../../{page}")).ok());
    if let Some(page) = page.filter(|_| is_form) {
        *response.status_mut() = StatusCode::SEE_OTHER;
        response.headers_mut().insert(LOCATION, page);
    }
    response
}

fn asset(file: &str) -> Result<ServerResponse, HttpError> {
    let found = page::ASSETS.iter().find(|(name, _, _)| *name == file);
    if let Some(&(_, content_type, text)) = found {
        return Ok(response(StatusCode::OK, content_type, text));
    }
    let icon = page::Tone::of_icon(file).map(page::Tone::icon);
    let icon = icon.ok_or_else(|| HttpError::new(StatusCode::NOT_FOUND, "no such file"))?;
    Ok(response(StatusCode::OK, "image/svg+xml", icon))
}

fn badge(status: &Status, name: &str) -> Result<ServerResponse, HttpError> {
    let target = status.target(name);
    let target =
        target.ok_or_else(|| HttpError::new(StatusCode::NOT_FOUND, NoSuchTarget.to_string()))?;
    let state = if target.paused {
        "paused"
    } else {
        target.state
    };
    let mut response = response(
        StatusCode::OK,
        "image/svg+xml",
        badge::render(&target.name, state),
    );
    let headers = response.headers_mut();
    // The proxies of code hosts keep pictures: they have to ask again each time.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    let policy = HeaderValue::from_static("default-src 'none'");
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    Ok(response)
}

fn healthy(health: &Health) -> ServerResponse {
    match &health.failing()[..] {
        [] => plain(StatusCode::OK, "livekit-canary is healthy"),
        failing => plain(StatusCode::SERVICE_UNAVAILABLE, &failing.join("\n")),
    }
}

fn ready(stage: DaemonStage) -> ServerResponse {
    match stage {
        DaemonStage::Starting => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "livekit-canary is starting",
        ),
        DaemonStage::Running => plain(StatusCode::OK, "livekit-canary is ready"),
        DaemonStage::Draining => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "livekit-canary is draining",
        ),
    }
}

async fn read_body(body: Incoming) -> Result<Bytes, HttpError> {
    let read = Limited::new(body, MAX_BODY_BYTES).collect().await;
    match read.map(Collected::to_bytes) {
        Ok(body) => Ok(body),
        Err(failure) if failure.is::<LengthLimitError>() => {
            let text = format!("the body is longer than {MAX_BODY_BYTES} bytes");
            Err(HttpError::new(StatusCode::PAYLOAD_TOO_LARGE, text))
        }
        Err(failure) => {
            let text = format!("cannot read the body: {failure}");
            Err(HttpError::new(StatusCode::BAD_REQUEST, text))
        }
    }
}

#[cfg(test)]
impl ReadRouteKind {
    pub(super) fn example(self) -> &'static str {
        match self {
            Self::Page => "/",
            Self::TargetPage => "/targets/support",
            Self::DocsPage => "/docs/reasons",
            Self::BatchesPage => "/batches",
            Self::ProbesPage => "/probes",
            Self::IncidentsPage => "/incidents",
            Self::BatchPage => "/batches/some-batch",
            Self::ProbePage => "/probes/some-room",
            Self::IncidentPage => "/incidents/some-incident",
            Self::Asset => "/assets/style.css",
            Self::Metrics => "/metrics",
            Self::Healthy => "/-/healthy",
            Self::Ready => "/-/ready",
            Self::Targets => "/api/v1/targets",
            Self::Batches => "/api/v1/batches",
            Self::Batch => "/api/v1/batches/some-batch",
            Self::Probe => "/api/v1/probes/some-room",
            Self::Audio => "/api/v1/probes/some-room/audio/agent.ogg",
            Self::Incidents => "/api/v1/incidents",
            Self::Incident => "/api/v1/incidents/some-incident",
            Self::Probes => "/api/v1/probes",
            Self::Events => "/api/v1/events",
            Self::Statistics => "/api/v1/statistics",
            Self::Badge => "/api/v1/targets/support/badge.svg",
            Self::Stream => "/api/v1/stream",
        }
    }
}

#[cfg(test)]
impl ChangeRouteKind {
    pub(super) fn example(self) -> &'static str {
        match self {
            Self::Reload => "/-/reload",
            Self::RunBatch => "/api/v1/targets/support/batches",
            Self::Pause => "/api/v1/targets/support/pause",
            Self::Resume => "/api/v1/targets/support/resume",
            Self::RecordEvent => "/api/v1/events",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use strum::VariantArray;

    use super::*;

    /// Every path of the table in `docs/api.md`, and whether it needs POST.
    fn documented_paths() -> Vec<(String, bool)> {
        let docs = include_str!("../../docs/api.md");
        let (_, section) = docs.split_once("\n## Paths\n").unwrap();
        let rows = section
            .lines()
            .skip_while(|line| !line.starts_with("| `"))
            .take_while(|line| line.starts_with('|'));
        let mut paths = Vec::new();
        for row in rows {
            let cell = row.trim_matches('|').split('|').next().unwrap();
            let mut full = String::new();
            let mut is_post = false;
            for code in cell.split('`').skip(1).step_by(2) {
                let path = code.strip_prefix("POST ");
                is_post |= path.is_some();
                let path = path.unwrap_or(code);
                // `…/resume` stands for the path before it with another last segment.
                full = match path.strip_prefix("…/") {
                    Some(last) => {
                        let (before, _) = full.rsplit_once('/').unwrap();
                        format!("{before}/{last}")
                    }
                    None => path.to_owned(),
                };
                paths.push((full.clone(), is_post));
            }
        }
        paths
    }

    #[test]
    fn documented_paths_are_the_routes_and_post_is_for_changes_of_state() {
        let mut reads = HashSet::new();
        let mut changes = HashSet::new();
        for (path, is_post) in documented_paths() {
            let method = if is_post { Method::POST } else { Method::GET };
            let route =
                Route::parse(&method, &path).unwrap_or_else(|| panic!("{path} is no route"));
            assert_eq!(is_post, matches!(route, Route::Change(_)), "{path}");
            let is_new = match route {
                Route::Read(read) => reads.insert(ReadRouteKind::from(read)),
                Route::Change(change) => changes.insert(ChangeRouteKind::from(change)),
            };
            assert!(is_new, "{path} is documented twice");
        }
        let all_reads: HashSet<_> = ReadRouteKind::VARIANTS.iter().copied().collect();
        let all_changes: HashSet<_> = ChangeRouteKind::VARIANTS.iter().copied().collect();
        assert_eq!((reads, changes), (all_reads, all_changes));
    }
}
