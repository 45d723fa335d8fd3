//! Connections: accepts them, serves their requests within timeouts, and drains them at shutdown.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::select;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::routes::{AppState, Sources};
use super::web_config::WebConfig;

/// Connections that are open at once. Further ones wait in the listener's queue.
const MAX_CONNECTIONS: usize = 256;
/// From accepting a connection to the end of its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// From the start of a connection, or from the previous response, to the end of a request's headers. Longer than 60 s, so
/// that a scraper with an interval of one minute can reuse its connection.
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
    let state = Arc::new(AppState::new(on_loopback, web, sources));
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    while let Some((stream, slot)) = select! {
        () = shutdown.cancelled() => None,
        accepted = accept(&listener, &slots) => Some(accepted),
    } {
        while let Some(ended) = connections.try_join_next() {
            report_panic(&state, ended);
        }
        connections.spawn(serve_client(
            stream,
            Arc::clone(&state),
            shutdown.clone(),
            slot,
        ));
    }
    // Further clients are refused at once, instead of waiting for a server that will not accept them.
    drop(listener);
    drain_connections(connections, &state).await;
}

/// Waits for a free slot first, and only then for a connection: the kernel's queue holds the others.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> (TcpStream, OwnedSemaphorePermit) {
    let slot = Arc::clone(slots).acquire_owned().await;
    let slot = slot.expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, slot),
            Err(error) => {
                warn!("HTTP: cannot accept a connection: {error}");
                // The process is out of descriptors or memory. Without a pause this loop would use a whole core.
                sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// Serves one client until it disconnects or `shutdown`, and frees its slot.
async fn serve_client(
    stream: TcpStream,
    state: Arc<AppState>,
    shutdown: CancellationToken,
    _slot: OwnedSemaphorePermit,
) {
    let opened = select! {
        () = shutdown.cancelled() => return,
        opened = timeout(HANDSHAKE_TIMEOUT, open(stream, state.web())) => opened,
    };
    match opened {
        Ok(Ok(stream)) => serve_connection(stream, state, &shutdown).await,
        Ok(Err(error)) => debug!("HTTP: TLS handshake failed: {error}"),
        Err(_) => debug!("HTTP: no TLS handshake within {HANDSHAKE_TIMEOUT:?}"),
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
) {
    let service = service_fn(|request| {
        let state = Arc::clone(&state);
        async move { Ok::<_, Infallible>(state.respond(request).await) }
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
