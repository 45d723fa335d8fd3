//! The forms of a response: JSON, plain text, HTML, and every error as `{"error": "…"}`.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body_util::{Either, Full};
use serde::Serialize;

use super::stream::EventBody;
use crate::metrics::{InternalError, Metrics};

pub(super) type ServerResponse = Response<Either<Full<Bytes>, EventBody>>;

pub(super) fn response(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> ServerResponse {
    let mut response = Response::new(Either::Left(Full::new(body.into())));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub(super) fn json(status: StatusCode, value: &impl Serialize) -> ServerResponse {
    let mut body =
        serde_json::to_vec(value).expect("plain structs with string keys always serialize");
    body.push(b'\n');
    response(status, "application/json", body)
}

/// Text for people and for the health probes of an orchestrator.
pub(super) fn plain(status: StatusCode, text: &str) -> ServerResponse {
    response(status, "text/plain; charset=utf-8", format!("{text}\n"))
}

/// Why a request fails, as the client receives it.
#[derive(Debug)]
pub(super) struct HttpError {
    status: StatusCode,
    text: String,
    header: Option<(HeaderName, HeaderValue)>,
}

impl HttpError {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
            header: None,
        }
    }

    /// A fault of the canary, which `metrics` counts.
    pub(super) fn internal(metrics: &Metrics, text: &str) -> Self {
        metrics.internal_error(InternalError::Http);
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, text)
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn with(self, name: HeaderName, value: HeaderValue) -> Self {
        Self {
            header: Some((name, value)),
            ..self
        }
    }

    /// Adds `Retry-After`, rounded up to whole seconds so that the client does not retry too early.
    pub(super) fn retry_after(self, wait: Duration) -> Self {
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        self.with(RETRY_AFTER, seconds.into())
    }
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: &'a str,
}

impl From<HttpError> for ServerResponse {
    fn from(error: HttpError) -> Self {
        let body = ErrorBody { error: &error.text };
        let mut response = json(error.status, &body);
        response.headers_mut().extend(error.header);
        response
    }
}
