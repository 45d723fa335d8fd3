//! Which paths there are, and which methods each takes.

use http::header::ALLOW;
use http::{HeaderValue, Method, StatusCode};

use super::answer::Refusal;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route<'a> {
    Page,
    Metrics,
    Healthy,
    Ready,
    Targets,
    Batches,
    Batch(&'a str),
    /// By the name of its room.
    Probe(&'a str),
    Reload,
    /// Open a batch of this target.
    RunBatch(&'a str),
    Pause(&'a str),
    Resume(&'a str),
}

impl<'a> Route<'a> {
    /// Names are matched as they stand: nothing that has a name here needs an escape in a path.
    pub(super) fn of(path: &'a str) -> Option<Self> {
        let segments: Vec<_> = path.strip_prefix('/')?.split('/').collect();
        match segments[..] {
            [""] => Some(Self::Page),
            ["metrics"] => Some(Self::Metrics),
            ["-", "healthy"] => Some(Self::Healthy),
            ["-", "ready"] => Some(Self::Ready),
            ["-", "reload"] => Some(Self::Reload),
            ["api", "v1", ref api @ ..] => Self::of_api(api),
            _ => None,
        }
    }

    fn of_api(segments: &[&'a str]) -> Option<Self> {
        match *segments {
            ["targets"] => Some(Self::Targets),
            ["batches"] => Some(Self::Batches),
            ["batches", id] => Some(Self::Batch(id)),
            ["probes", id] => Some(Self::Probe(id)),
            ["targets", name, "batches"] => Some(Self::RunBatch(name)),
            ["targets", name, "pause"] => Some(Self::Pause(name)),
            ["targets", name, "resume"] => Some(Self::Resume(name)),
            _ => None,
        }
    }

    /// An orchestrator's probes have no password.
    pub(super) fn is_for_everybody(self) -> bool {
        matches!(self, Self::Healthy | Self::Ready)
    }

    /// A query here is a mistake. Scrapers and orchestrators may add one of their own to what isn't API.
    pub(super) fn takes_no_query(self) -> bool {
        !matches!(
            self,
            Self::Page | Self::Metrics | Self::Healthy | Self::Ready | Self::Batches
        )
    }

    /// Whether it does something, and so takes POST alone.
    pub(super) fn changes(self) -> bool {
        matches!(
            self,
            Self::Reload | Self::RunBatch(_) | Self::Pause(_) | Self::Resume(_)
        )
    }

    pub(super) fn check(self, method: &Method) -> Result<(), Refusal> {
        let (right, allowed) = if self.changes() {
            (method == Method::POST, "POST")
        } else {
            (method == Method::GET || method == Method::HEAD, "GET, HEAD")
        };
        if right {
            return Ok(());
        }
        let text = format!("this path takes {allowed} and not {method}");
        Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text)
            .with(ALLOW, HeaderValue::from_static(allowed)))
    }
}
