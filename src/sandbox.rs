//! An embedded, loopback-only LiveKit server with a demo agent and faults, for demos, fire drills and tests.
//!
//! It behaves towards a client as livekit-server 1.13.5 does. It shares no code with the client side of this crate:
//! otherwise a misreading of the protocol on one side would be hidden by the same misreading on the other.
//!
//! Known gaps: video, RED, simulcast, TURN, ICE over TCP, the single peer connection of `/rtc/v1`, resuming
//! a session, agent workers of other processes, and the messages `speakers_changed`, `connection_quality` and
//! `refresh_token`. Twirp JSON omits empty fields and spells names in camel case, which clients accept. A call for the
//! dispatches of a room that doesn't exist fails at once; the real server takes three seconds.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use socket2::SockRef;
use tokio::net::{TcpListener, UdpSocket};
use tokio_util::sync::CancellationToken;

mod agent;
mod command;
mod data_stream;
mod demux;
pub mod fault;
mod ids;
mod peer;
mod registry;
pub mod report;
mod room;
mod server;
mod settings;
mod signal;
mod token;
mod twirp;

use demux::Demux;
use fault::FaultRule;
use peer::Net;
use registry::Registry;

pub use registry::CallerUtterance;
pub use settings::SandboxSettings;

/// How long tasks may take to end after shutdown; none of them waits for the network by then.
const DRAIN: Duration = Duration::from_secs(3);
/// Bytes of the largest datagram; DTLS and RTP stay below 1500.
const MAX_DATAGRAM: usize = 2048;
/// Receive buffer requested from the kernel, in bytes: 200 rooms send some 20,000 datagrams per second, and the kernel
/// accounts 1 KiB for each.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Why a sandbox can't start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("can't bind to loopback")]
    Loopback(#[from] io::Error),
    #[error("can't open the report {}", .path.display())]
    AgentReport { path: PathBuf, source: io::Error },
}

/// A sandbox that is bound and not yet running.
pub struct Sandbox {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Registry>,
    report: Option<report::ReportWriter>,
}

/// A running sandbox's controls.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Registry>,
}

impl Sandbox {
    /// Binds the TCP port and the one UDP port, both on loopback, and opens the report.
    ///
    /// # Errors
    /// [`BindError`] if the port is taken, if there is no loopback, or if the report can't be written.
    pub async fn bind(settings: SandboxSettings) -> Result<Self, BindError> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, settings.port)).await?;
        let address = listener.local_addr()?;
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_nonblocking(true)?;
        // The kernel grants at most its own limit.
        if let Err(error) = SockRef::from(&socket).set_recv_buffer_size(RECEIVE_BUFFER) {
            tracing::debug!(%error, "the UDP socket keeps its receive buffer");
        }
        let net = Net {
            address: socket.local_addr()?,
            socket,
            demux: Arc::new(Demux::default()),
        };
        let (report, writer) = match &settings.report {
            Some(path) => {
                let opened = report::open(path).await;
                let (report, writer) = opened.map_err(|source| BindError::AgentReport {
                    path: path.clone(),
                    source,
                })?;
                (Some(report), Some(writer))
            }
            None => (None, None),
        };
        Ok(Self {
            listener,
            address,
            shared: Arc::new(Registry::new(settings, net, report)),
            report: writer,
        })
    }

    /// The URL that a client connects to.
    pub fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    pub fn api_key(&self) -> &str {
        &self.shared.settings.api_key
    }

    pub fn api_secret(&self) -> &SecretString {
        &self.shared.settings.api_secret
    }

    pub fn handle(&self) -> Handle {
        Handle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Serves until `shutdown`, then ends every room with `Leave` and waits for its tasks. Dropping the future ends them
    /// without waiting.
    pub async fn run(self, shutdown: CancellationToken) {
        let shared = self.shared;
        let _ends_with_this_future = shared.shutdown.clone().drop_guard();
        let tracker = &shared.tracker;
        tracker.spawn(server::serve(self.listener, Arc::clone(&shared)));
        let (net, ending) = (Arc::clone(&shared.net), shared.shutdown.clone());
        if let Some(report) = self.report {
            tracker.spawn(report.run(shared.shutdown.clone()));
        }
        tracker.spawn_blocking(move || receive_apart(&net, &ending));
        shutdown.cancelled().await;
        shared.shutdown.cancel();
        tracker.close();
        if tokio::time::timeout(DRAIN, tracker.wait()).await.is_err() {
            tracing::warn!(
                tasks = tracker.len(),
                "some tasks of the sandbox did not end in time"
            );
        }
    }
}

impl Handle {
    /// Replaces the faults. Rooms that exist keep theirs, except for HTTP and signal faults.
    pub fn set_faults(&self, rules: Vec<FaultRule>) {
        self.shared.set_faults(rules);
    }

    /// Names of the rooms that are open now.
    pub fn rooms(&self) -> Vec<String> {
        let rooms = self.shared.open_rooms();
        rooms.into_iter().map(|(name, _)| name).collect()
    }

    /// How many room names the sandbox has seen: the number of the latest one.
    pub fn rooms_seen(&self) -> u64 {
        self.shared.rooms_seen()
    }

    /// The utterances that the agents heard, oldest first; the latest 10,000 are kept.
    pub fn heard(&self) -> Vec<CallerUtterance> {
        self.shared.heard()
    }
}

/// Reads the UDP socket on a thread of its own. While hundreds of rooms handshake at once, a task would run too late to
/// empty the kernel's buffer, and a handshake that loses a datagram waits seconds for the retransmission.
fn receive_apart(net: &Net, shutdown: &CancellationToken) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build();
    let received = runtime.and_then(|runtime| runtime.block_on(receive(net, shutdown)));
    if let Err(error) = received {
        tracing::error!(%error, "the sandbox can't read its UDP socket: no media will connect");
    }
}

/// Hands each datagram to its room.
async fn receive(net: &Net, shutdown: &CancellationToken) -> io::Result<()> {
    let socket = UdpSocket::from_std(net.socket.try_clone()?)?;
    let mut buffer = [0; MAX_DATAGRAM];
    loop {
        let received = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            received = socket.recv_from(&mut buffer) => received,
        };
        match received {
            Ok((size, source)) => net.demux.dispatch(source, &buffer[..size]),
            // The kernel reports a client's closed port as an error of the next read.
            Err(error) => tracing::debug!(%error, "the UDP socket reported an error"),
        }
    }
}
