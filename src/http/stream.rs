//! `/api/v1/stream`: what changes, as server-sent events.
//!
//! A stream has no buffer of its own. It makes the next event when the connection can send it, from the status of that moment, so
//! a reader that is slow misses states in between. What happens in a batch can't be left out like that: a reader that falls too far behind
//! is disconnected.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::{Either, StreamBody};
use hyper::body::Frame;
use tokio::select;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::live::{BatchProgress, LiveProgress};
use super::response::{HttpError, ServerResponse};
use super::status::Status;

/// Streams that are open at once.
const MAX_STREAMS: usize = 20;
/// The status is sent at most this often.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// How long a stream may be silent: proxies close connections that they take for dead.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// A stream ends after this long. Browsers open it again, and with that the canary checks their credentials again.
const MAX_AGE: Duration = Duration::from_mins(10);
/// A client whose stream has ended tries again after this long.
const RETRY: Duration = Duration::from_secs(5);

pub(super) type EventBody = StreamBody<BoxStream<'static, Result<Frame<Bytes>, Infallible>>>;

/// Opens streams, up to a number.
pub(super) struct Streams {
    places: Arc<Semaphore>,
    status: watch::Receiver<Arc<Status>>,
    progress: LiveProgress,
    shutdown: CancellationToken,
}

impl Streams {
    /// The streams end at `shutdown`.
    pub(super) fn new(
        status: watch::Receiver<Arc<Status>>,
        progress: LiveProgress,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            places: Arc::new(Semaphore::new(MAX_STREAMS)),
            status,
            progress,
            shutdown,
        }
    }

    /// # Errors
    /// 503 if too many streams are open.
    pub(super) fn open(&self) -> Result<ServerResponse, HttpError> {
        let events = self.events().ok_or_else(|| {
            let text = format!("{MAX_STREAMS} streams are open, which is the limit; close one, or poll /api/v1/targets");
            HttpError::new(StatusCode::SERVICE_UNAVAILABLE, text).retry_after(RETRY)
        })?;
        let frames = stream::unfold(events, |mut events| async move {
            let next = events.next().await?;
            Some((Ok(Frame::data(Bytes::from(next))), events))
        });
        let mut response = Response::new(Either::Right(StreamBody::new(frames.boxed())));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        // nginx collects a response before it passes it on, unless the response has this.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    fn events(&self) -> Option<LiveEvents> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        Some(LiveEvents {
            status: StatusChanges {
                status: self.status.clone(),
                sent: None,
                next_at: Instant::now(),
            },
            progress: self.progress.subscribe(),
            shutdown: self.shutdown.clone(),
            silent_until: Instant::now() + KEEP_ALIVE_INTERVAL,
            ends_at: Instant::now() + MAX_AGE,
            _place: place,
        })
    }
}

/// The events of one stream.
struct LiveEvents {
    status: StatusChanges,
    progress: broadcast::Receiver<Arc<BatchProgress>>,
    shutdown: CancellationToken,
    /// When the next comment is due, unless an event comes before it.
    silent_until: Instant,
    ends_at: Instant,
    _place: OwnedSemaphorePermit,
}

impl LiveEvents {
    /// The next event as it is sent, or `None` at the end of the stream.
    async fn next(&mut self) -> Option<String> {
        let event = select! {
            biased;
            () = self.shutdown.cancelled() => return None,
            () = sleep_until(self.ends_at) => return None,
            status = self.status.next() => event("status", &status?),
            progress = self.progress.recv() => match progress {
                Ok(progress) => {
                    let progress = serde_json::to_string(&*progress);
                    event("batch", &progress.expect("plain structs always serialize"))
                }
                Err(RecvError::Lagged(_) | RecvError::Closed) => return None,
            },
            () = sleep_until(self.silent_until) => ": keep-alive\n\n".to_owned(),
        };
        self.silent_until = Instant::now() + KEEP_ALIVE_INTERVAL;
        Some(event)
    }
}

fn event(name: &str, json: &str) -> String {
    format!("event: {name}\ndata: {json}\n\n")
}

struct StatusChanges {
    status: watch::Receiver<Arc<Status>>,
    /// The daemon publishes its status every second, changed or not.
    sent: Option<String>,
    next_at: Instant,
}

impl StatusChanges {
    /// The status as JSON: at once for the first time, and then when it has changed. `None` if the daemon is gone. Cancel-safe.
    async fn next(&mut self) -> Option<String> {
        loop {
            sleep_until(self.next_at).await;
            if self.sent.is_some() {
                self.status.changed().await.ok()?;
            }
            let status = Arc::clone(&self.status.borrow_and_update());
            let status = serde_json::to_string(&*status).expect("plain structs always serialize");
            self.next_at = Instant::now() + STATUS_INTERVAL;
            if self.sent.as_ref() != Some(&status) {
                self.sent = Some(status.clone());
                return Some(status);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};
    use tokio::time::timeout;

    use super::*;
    use crate::http::live::MAX_BEHIND;
    use crate::http::status::DaemonStage;

    fn status(stage: DaemonStage) -> Arc<Status> {
        Arc::new(Status {
            version: "1.2.3",
            started_at: DateTime::<Utc>::UNIX_EPOCH,
            stage,
            targets: Vec::new(),
            projects: Vec::new(),
            last_reload: None,
        })
    }

    fn streams() -> (Streams, watch::Sender<Arc<Status>>) {
        let (sender, receiver) = watch::channel(status(DaemonStage::Running));
        let streams = Streams::new(receiver, LiveProgress::default(), CancellationToken::new());
        (streams, sender)
    }

    #[tokio::test(start_paused = true)]
    async fn status_comes_at_once_and_on_every_change_but_at_most_once_per_second() {
        let (streams, sender) = streams();
        let mut events = streams.events().unwrap();
        let start = Instant::now();
        let first = events.next().await.unwrap();
        assert!(
            first.starts_with("event: status\ndata: {\"version\":\"1.2.3\""),
            "{first}"
        );
        assert!(first.ends_with("}\n\n"), "{first}");
        assert_eq!(start.elapsed(), Duration::ZERO);
        sender.send_replace(status(DaemonStage::Starting));
        sender.send_replace(status(DaemonStage::Draining));
        let next = events.next().await.unwrap();
        assert!(next.contains("draining"), "only the last state: {next}");
        assert_eq!(start.elapsed(), STATUS_INTERVAL);
        // Published again without a change.
        sender.send_replace(status(DaemonStage::Draining));
        assert_eq!(events.next().await.unwrap(), ": keep-alive\n\n");
        assert_eq!(start.elapsed(), STATUS_INTERVAL + KEEP_ALIVE_INTERVAL);
        drop(sender);
        assert_eq!(events.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn reader_receives_the_progress_of_batches_and_is_disconnected_if_it_falls_behind() {
        let (streams, _sender) = streams();
        let mut events = streams.events().unwrap();
        events.next().await.unwrap();
        let batch = streams.progress.start("b-1", "support", "scheduled");
        batch.room_opened("canary-1");
        let next = events.next().await.unwrap();
        let expected = "event: batch\ndata: {\"batch_id\":\"b-1\",\"target\":\"support\",\"purpose\":\"scheduled\",\
                        \"opened\":1,\"ok\":0,\"failed\":0,\"aborted\":0,\"room\":{\"room\":\"canary-1\",\"stage\":\"opened\",\
                        \"outcome\":null,\"reason\":null,\"join_delay_seconds\":null},\"result\":null}\n\n";
        assert_eq!(next, expected);
        for _ in 0..=MAX_BEHIND {
            batch.room_opened("canary-2");
        }
        assert_eq!(events.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn stream_ends_so_that_its_reader_shows_its_credentials_again() {
        let (streams, _sender) = streams();
        let mut events = streams.events().unwrap();
        let start = Instant::now();
        while events.next().await.is_some() {}
        assert_eq!(start.elapsed(), MAX_AGE);
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_ends_every_stream_and_each_gives_its_place_back() {
        let (streams, _sender) = streams();
        let mut open: Vec<_> = (0..MAX_STREAMS)
            .map(|_| streams.events().unwrap())
            .collect();
        let error = streams.open().err().unwrap();
        assert!(error.text().contains("20 streams"), "{}", error.text());
        open.pop();
        let mut last = streams.events().unwrap();
        last.next().await.unwrap();
        streams.shutdown.cancel();
        let ended = timeout(Duration::from_millis(1), last.next()).await;
        assert_eq!(ended, Ok(None));
    }
}
