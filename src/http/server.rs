//! Connections: accepts them, serves their requests within timeouts, and drains them at shutdown.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::select;
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::routes::{AppState, Sources};
use super::web_config::WebConfig;

/// Connections that are open at once. A further client gets the place of the one that has been connected longest and whose
/// request is not being handled: see [`Clients::make_room`].
const MAX_CONNECTIONS: usize = 256;
/// From accepting a connection to the end of its first request's headers, TLS handshake included.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// From the previous response to the end of a request's headers. Longer than 60 s, so that a scraper with an interval of one
/// minute can reuse its connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(65);
/// How long a client may leave a response unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests that are being served may still take at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// The request line and all headers of a request.
const MAX_HEADER_BYTES: usize = 32 * 1024;

/// Serves requests on `listener` until `shutdown`, then finishes those that it has begun.
pub(crate) async fn serve(
    listener: TcpListener,
    web: WebConfig,
    sources: Sources,
    shutdown: CancellationToken,
) {
    let on_loopback = listener
        .local_addr()
        .is_ok_and(|address| address.ip().to_canonical().is_loopback());
    let state = Arc::new(AppState::new(on_loopback, web, sources, shutdown.clone()));
    let mut clients = Clients::default();
    while let Some(stream) = select! {
        () = shutdown.cancelled() => None,
        accepted = accept(&listener, &state) => Some(accepted),
    } {
        clients.remove_ended(&state);
        clients.make_room();
        clients.add(stream, &state, &shutdown);
    }
    // Further clients are refused at once, instead of waiting for a server that will not accept them.
    drop(listener);
    drain_connections(clients.connections, &state).await;
}

async fn accept(listener: &TcpListener, state: &AppState) -> TcpStream {
    let mut failed = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                // The process is out of descriptors or memory. Without a pause this loop would use a whole core.
                if !failed {
                    warn!("HTTP: cannot accept a connection: {error}");
                    state.count_internal_error();
                }
                failed = true;
                sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// The open connections.
#[derive(Default)]
struct Clients {
    connections: JoinSet<()>,
    /// The oldest first, without those that [`Clients::make_room`] closes.
    open: VecDeque<(task::Id, Arc<ClientActivity>)>,
}

/// What a connection's client does.
#[derive(Default)]
struct ClientActivity {
    has_requested: AtomicBool,
    /// A handler works on its request.
    is_served: AtomicBool,
    evict: CancellationToken,
}

impl Clients {
    fn add(&mut self, stream: TcpStream, state: &Arc<AppState>, shutdown: &CancellationToken) {
        let activity = Arc::new(ClientActivity::default());
        let client = serve_client(
            stream,
            Arc::clone(state),
            shutdown.clone(),
            Arc::clone(&activity),
        );
        let task = self.connections.spawn(client);
        self.open.push_back((task.id(), activity));
    }

    fn remove_ended(&mut self, state: &AppState) {
        while let Some(ended) = self.connections.try_join_next_with_id() {
            let id = ended.as_ref().map_or_else(JoinError::id, |(id, ())| *id);
            self.open.retain(|(open, _)| *open != id);
            report_panic(state, ended.map(|_| ()));
        }
    }

    /// Closes a connection if there are too many, so that clients that send nothing, or read nothing, can't keep an
    /// orchestrator's health probe and a scraper out. Their requests are complete at once, and are handled at once.
    fn make_room(&mut self) {
        if self.open.len() < MAX_CONNECTIONS {
            return;
        }
        let waits = |client: &(_, Arc<ClientActivity>)| !client.1.is_served.load(Ordering::Relaxed);
        let oldest = self.open.iter().position(waits).unwrap_or(0);
        if let Some((_, activity)) = self.open.remove(oldest) {
            activity.evict.cancel();
        }
    }
}

impl ClientActivity {
    /// Resolves if the first request is late.
    async fn first_request_late(&self) {
        sleep(FIRST_REQUEST_TIMEOUT).await;
        if self.has_requested.load(Ordering::Relaxed) {
            pending::<()>().await;
        }
    }
}

/// Serves one client until it disconnects, is too slow, has to make room, or `shutdown`.
async fn serve_client(
    stream: TcpStream,
    state: Arc<AppState>,
    shutdown: CancellationToken,
    activity: Arc<ClientActivity>,
) {
    let served = async {
        let opened = select! {
            () = shutdown.cancelled() => return,
            opened = open(stream, state.web()) => opened,
        };
        match opened {
            Ok(stream) => serve_connection(stream, Arc::clone(&state), &shutdown, &activity).await,
            Err(error) => debug!("HTTP: TLS handshake failed: {error}"),
        }
    };
    select! {
        () = served => {}
        () = activity.first_request_late() => {
            debug!("HTTP: no request within {FIRST_REQUEST_TIMEOUT:?}");
        }
        () = activity.evict.cancelled() => {
            debug!("HTTP: closed a connection to make room for another client");
        }
    }
}

type ClientStream = Pin<Box<TimeoutStream<TcpStream>>>;

/// Plain HTTP, or TLS with the certificate that is configured at this moment.
async fn open(
    stream: TcpStream,
    web: &WebConfig,
) -> io::Result<Either<ClientStream, TlsStream<ClientStream>>> {
    let mut stream = Box::pin(TimeoutStream::new(stream));
    stream
        .as_mut()
        .set_write_timeout_pinned(Some(WRITE_TIMEOUT));
    match &web.current().await.tls {
        None => Ok(Either::Left(stream)),
        Some(config) => {
            let accepted = TlsAcceptor::from(Arc::clone(config)).accept(stream).await;
            accepted.map(Either::Right)
        }
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    state: Arc<AppState>,
    shutdown: &CancellationToken,
    activity: &ClientActivity,
) {
    let service = service_fn(|request| {
        let state = Arc::clone(&state);
        activity.has_requested.store(true, Ordering::Relaxed);
        activity.is_served.store(true, Ordering::Relaxed);
        async move {
            let response = state.respond(request).await;
            activity.is_served.store(false, Ordering::Relaxed);
            Ok::<_, Infallible>(response)
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEADER_BYTES)
            .serve_connection(TokioIo::new(stream), service)
    );
    let ended = select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            // Closes an idle connection at once, and another one after its current response.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!("HTTP: connection failed: {error}");
    }
}

/// Waits until the connections have sent their last responses, at most for [`DRAIN_TIMEOUT`].
async fn drain_connections(mut connections: JoinSet<()>, state: &AppState) {
    let drained = async {
        while let Some(ended) = connections.join_next().await {
            report_panic(state, ended);
        }
    };
    if timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        connections.shutdown().await;
    }
}

fn report_panic(state: &AppState, ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        error!("HTTP: the task of a connection failed: {error}");
        state.count_internal_error();
    }
}
