//! Responses to scrapes: the metrics as text, compressed if the client accepts gzip.

use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, VARY};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::sync::Semaphore;
use tokio::task;
use tracing::error;

use super::response::{HttpError, ServerResponse, response};
use crate::metrics::{self, Metrics};

/// Scrapes that are rendered at once. Each takes a core for some milliseconds.
const MAX_CONCURRENT_RENDERINGS: usize = 2;

pub(super) struct Scrapes {
    metrics: Metrics,
    permits: Arc<Semaphore>,
}

impl Scrapes {
    pub(super) fn new(metrics: Metrics) -> Self {
        let permits = Arc::new(Semaphore::new(MAX_CONCURRENT_RENDERINGS));
        Self { metrics, permits }
    }

    /// Renders on a blocking thread: with many targets it takes long enough to disturb the probes' audio.
    pub(super) async fn respond(&self, headers: &HeaderMap) -> Result<ServerResponse, HttpError> {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let gzip = accepts_gzip(headers);
        let metrics = self.metrics.clone();
        let rendering = task::spawn_blocking(move || {
            // Held by the thread, because the rendering goes on if the client disconnects.
            let _permit = permit;
            let text = metrics.render();
            if gzip { compress(&text) } else { text.into() }
        });
        let body = rendering.await.map_err(|error| {
            error!("HTTP: cannot render the metrics: {error}");
            HttpError::internal(&self.metrics, "cannot render the metrics")
        })?;
        let mut response = response(StatusCode::OK, metrics::CONTENT_TYPE, body);
        let headers = response.headers_mut();
        headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
        if gzip {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        Ok(response)
    }
}

/// Whether `Accept-Encoding` allows gzip (RFC 9110, 12.5.3): an entry for gzip takes precedence over `*`.
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let codings = headers
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
    for (name, accepted) in codings {
        match name.as_str() {
            "gzip" | "x-gzip" => gzip = Some(accepted),
            "*" => any = Some(accepted),
            _ => {}
        }
    }
    gzip.or(any).unwrap_or(false)
}

fn compress(text: &str) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::with_capacity(text.len() / 8), Compression::fast());
    encoder
        .write_all(text.as_bytes())
        .and_then(|()| encoder.finish())
        .expect("writing to a Vec cannot fail")
        .into()
}
