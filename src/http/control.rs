//! The requests that change the daemon's state, and the responses to them.

use std::time::Duration;

use http::header::LOCATION;
use http::{HeaderValue, StatusCode};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};

use super::access::ChangePermit;
use super::response::{HttpError, ServerResponse, json};
use crate::metrics::Metrics;

/// A request to the daemon, which replies once it has decided. If the daemon drops `reply`, the response is an internal
/// error.
#[derive(Debug)]
pub(crate) enum Control {
    /// Reads the settings again and applies all of them or none. The reply lists what has changed.
    Reload {
        reply: oneshot::Sender<Result<Vec<String>, ReloadRefused>>,
    },
    /// Starts a batch of `target` now, in addition to its schedule. The reply is the batch's id.
    RunBatch {
        target: String,
        reply: oneshot::Sender<Result<String, BatchRefused>>,
    },
    /// Pauses or resumes the schedule of `target`.
    SetPaused {
        target: String,
        paused: bool,
        reply: oneshot::Sender<Result<(), NoSuchTarget>>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReloadRefused {
    /// All problems of the new settings, as text. The previous settings stay in effect.
    #[error("{0}")]
    Invalid(String),
    #[error("the canary is shutting down")]
    ShuttingDown,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BatchRefused {
    #[error("batch {batch_id} of this target is still running")]
    Busy { batch_id: String },
    /// A budget is used up, or the project backs off.
    #[error("{text}")]
    Refused {
        text: String,
        retry_after: Option<Duration>,
    },
    #[error(transparent)]
    NoSuchTarget(#[from] NoSuchTarget),
    #[error("the canary is shutting down")]
    ShuttingDown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no target has this name; /api/v1/targets lists all targets")]
pub(crate) struct NoSuchTarget;

/// Sends [`Control`]s to the daemon and turns its replies into responses.
pub(super) struct Controller {
    daemon: mpsc::Sender<Control>,
    /// Counts the requests that the daemon drops.
    metrics: Metrics,
}

impl Controller {
    pub(super) fn new(daemon: mpsc::Sender<Control>, metrics: Metrics) -> Self {
        Self { daemon, metrics }
    }

    pub(super) async fn reload(&self, permit: ChangePermit) -> Result<ServerResponse, HttpError> {
        let changes = self
            .request(permit, |reply| Control::Reload { reply })
            .await?
            .map_err(|refused| {
                let status = match refused {
                    ReloadRefused::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
                    ReloadRefused::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
                };
                HttpError::new(status, refused.to_string())
            })?;
        Ok(json(
            StatusCode::OK,
            &json!({ "reloaded": true, "changes": changes }),
        ))
    }

    pub(super) async fn run_batch(
        &self,
        permit: ChangePermit,
        target: &str,
    ) -> Result<ServerResponse, HttpError> {
        let target = target.to_owned();
        let reply = self.request(permit, |reply| Control::RunBatch { target, reply });
        let batch_id = reply.await?.map_err(|refused| {
            let text = refused.to_string();
            match refused {
                BatchRefused::Busy { .. } => HttpError::new(StatusCode::CONFLICT, text),
                BatchRefused::Refused { retry_after, .. } => {
                    let error = HttpError::new(StatusCode::TOO_MANY_REQUESTS, text);
                    match retry_after {
                        Some(wait) => error.retry_after(wait),
                        None => error,
                    }
                }
                BatchRefused::NoSuchTarget(_) => HttpError::new(StatusCode::NOT_FOUND, text),
                BatchRefused::ShuttingDown => HttpError::new(StatusCode::SERVICE_UNAVAILABLE, text),
            }
        })?;
        let mut response = json(StatusCode::ACCEPTED, &json!({ "batch_id": batch_id }));
        // This path responds with 404 until the batch has ended.
        if let Ok(location) = HeaderValue::try_from(format!("/api/v1/batches/{batch_id}")) {
            response.headers_mut().insert(LOCATION, location);
        }
        Ok(response)
    }

    pub(super) async fn set_paused(
        &self,
        permit: ChangePermit,
        target: &str,
        paused: bool,
    ) -> Result<ServerResponse, HttpError> {
        let name = target.to_owned();
        self.request(permit, |reply| Control::SetPaused {
            target: name,
            paused,
            reply,
        })
        .await?
        .map_err(|unknown: NoSuchTarget| {
            HttpError::new(StatusCode::NOT_FOUND, unknown.to_string())
        })?;
        let done = json!({ "target": target, "paused": paused });
        Ok(json(StatusCode::OK, &done))
    }

    /// Sends a request to the daemon and waits for its reply. The request's own deadline bounds both.
    ///
    /// The permit is what keeps a handler without a permission check from changing anything.
    async fn request<T>(
        &self,
        _permit: ChangePermit,
        control: impl FnOnce(oneshot::Sender<T>) -> Control,
    ) -> Result<T, HttpError> {
        let (sender, reply) = oneshot::channel();
        let sent = self.daemon.send(control(sender)).await;
        sent.map_err(|_| {
            let text = ReloadRefused::ShuttingDown.to_string();
            HttpError::new(StatusCode::SERVICE_UNAVAILABLE, text)
        })?;
        reply.await.map_err(|_| {
            let text = "the canary dropped this request; its log gives the reason";
            HttpError::internal(&self.metrics, text)
        })
    }
}
