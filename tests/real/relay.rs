//! A bad network between the canary and a server behind a veth pair. It delays everything in both directions. Datagrams from
//! the server's media port are also lost, and have jitter. The agents are on the server's side and have a good network.
//!
//! The relay records which RTP packets it delivered and when. The loss and jitter that a receiver measures must match that.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// The maximum of packets or chunks on their way in one direction. One second of media in both directions is about 200.
const MAX_IN_FLIGHT: usize = 4096;
const DATAGRAM: usize = 2048;
/// Ticks per second of Opus over RTP (RFC 7587, 4.1).
const CLOCK_RATE: f64 = 48_000.0;

/// What the network does to packets.
#[derive(Clone, Copy)]
pub(crate) struct Path {
    /// In each direction, for all packets.
    pub delay: Duration,
    /// The maximum additional delay of a datagram from the server. Datagrams stay in order, as in a queue.
    pub jitter: Duration,
    /// The share of datagrams from the server that are lost, 0 to 1.
    pub loss: f64,
}

/// The addresses of the server that the relay forwards to.
#[derive(Clone, Copy)]
pub(crate) struct Server {
    pub api: SocketAddr,
    pub media: SocketAddr,
}

/// Dropping the relay stops it.
pub(crate) struct Relay {
    /// The ports of the relay for the API and for media.
    pub ports: (u16, u16),
    delivered: Arc<Mutex<Vec<Packet>>>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// An RTP packet that was sent on to the canary.
#[derive(Clone, Copy)]
struct Packet {
    at: SystemTime,
    ssrc: u32,
    sequence: u16,
    timestamp: u32,
}

/// The figures that a receiver of the delivered packets must measure.
pub(crate) struct Expected {
    pub packets: usize,
    pub lost: usize,
    /// Seconds; RFC 3550, 6.4.1.
    pub jitter: f64,
}

impl Relay {
    /// Starts a relay in front of `server`, in the network namespace of this name.
    pub(crate) fn start(namespace: &str, server: Server, path: Path) -> anyhow::Result<Self> {
        let namespace = File::open(format!("/run/netns/{namespace}"))?;
        let delivered = Arc::new(Mutex::new(Vec::new()));
        let stop = CancellationToken::new();
        let (ports_tx, ports_rx) = std::sync::mpsc::channel();
        let (stopped, record) = (stop.clone(), Arc::clone(&delivered));
        // A thread of its own, because each thread has its network namespace.
        let thread = thread::spawn(move || {
            let link = LinkNameSpaceType::Network;
            let outcome = move_into_link_name_space(namespace.as_fd(), Some(link))
                .map_err(anyhow::Error::from)
                .and_then(|()| serve(server, path, &record, &ports_tx, &stopped));
            if let Err(error) = outcome {
                // If the relay had started, there is no receiver any more.
                drop(ports_tx.send(Err(error)));
            }
        });
        let limit = Duration::from_secs(10);
        let ports = ports_rx.recv_timeout(limit).context("the relay")??;
        Ok(Self {
            ports,
            delivered,
            stop,
            thread: Some(thread),
        })
    }

    /// The figures of the stream with the most packets, up to the Unix time `until`.
    pub(crate) fn expected(&self, until: f64) -> anyhow::Result<Expected> {
        let delivered = self
            .delivered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut streams: HashMap<u32, Vec<Packet>> = HashMap::new();
        let cut = UNIX_EPOCH + Duration::from_secs_f64(until);
        for packet in delivered.iter().filter(|packet| packet.at < cut) {
            streams.entry(packet.ssrc).or_default().push(*packet);
        }
        let stream = streams.into_values().max_by_key(Vec::len);
        let stream = stream.context("no RTP packet was delivered")?;
        let sequences: BTreeSet<_> = stream.iter().map(|packet| packet.sequence).collect();
        let (first, last) = (sequences.first(), sequences.last());
        let span = usize::from(last.context("none")? - first.context("none")?) + 1;
        // A call of these scenarios has a thousand packets. In one of sixty calls the sequence numbers wrap around.
        ensure!(
            span < 10_000,
            "the sequence numbers wrapped around: run it again"
        );
        Ok(Expected {
            packets: stream.len(),
            lost: span - sequences.len(),
            jitter: jitter(&stream)?,
        })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // If the thread panicked, the scenario fails because packets are missing.
            drop(thread.join());
        }
    }
}

/// RFC 3550, A.8, on the times of delivery.
fn jitter(stream: &[Packet]) -> anyhow::Result<f64> {
    let mut jitter = 0.0;
    for pair in stream.windows(2) {
        let arrived = pair[1].at.duration_since(pair[0].at)?.as_secs_f64();
        let sent = f64::from(pair[1].timestamp.wrapping_sub(pair[0].timestamp)) / CLOCK_RATE;
        jitter += ((arrived - sent).abs() - jitter) / 16.0;
    }
    Ok(jitter)
}

type Ports = std::sync::mpsc::Sender<anyhow::Result<(u16, u16)>>;

fn serve(
    server: Server,
    path: Path,
    record: &Arc<Mutex<Vec<Packet>>>,
    ports: &Ports,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let api = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
        let media = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
        ports.send(Ok((api.local_addr()?.port(), media.local_addr()?.port())))?;
        // All tasks of a connection end with the runtime.
        tokio::select! {
            () = stop.cancelled() => Ok(()),
            result = pass_connections(&api, server.api, path.delay) => result,
            result = pass_datagrams(Arc::new(media), server.media, path, record) => result,
        }
    })
}

async fn pass_connections(
    listener: &TcpListener,
    server: SocketAddr,
    delay: Duration,
) -> anyhow::Result<()> {
    loop {
        let (client, _) = listener.accept().await?;
        let server = TcpStream::connect(server).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::spawn(pass_bytes(from_client, to_server, delay));
        tokio::spawn(pass_bytes(from_server, to_client, delay));
    }
}

async fn pass_bytes(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    delay: Duration,
) {
    let (queue, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(MAX_IN_FLIGHT);
    let reading = async move {
        let mut buffer = [0; 16 * 1024];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let chunk = (Instant::now() + delay, buffer[..read].to_vec());
            if queue.send(chunk).await.is_err() {
                break;
            }
        }
    };
    let writing = async move {
        while let Some((at, chunk)) = due.recv().await {
            sleep_until(at).await;
            if to.write_all(&chunk).await.is_err() {
                break;
            }
        }
    };
    tokio::join!(reading, writing);
}

async fn pass_datagrams(
    outside: Arc<UdpSocket>,
    server: SocketAddr,
    path: Path,
    record: &Arc<Mutex<Vec<Packet>>>,
) -> anyhow::Result<()> {
    let mut clients: HashMap<SocketAddr, mpsc::Sender<(Instant, Vec<u8>)>> = HashMap::new();
    let mut buffer = [0; DATAGRAM];
    loop {
        let (read, client) = outside.recv_from(&mut buffer).await?;
        if !clients.contains_key(&client) {
            let inside = Arc::new(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?);
            inside.connect(server).await?;
            let (queue, due) = mpsc::channel(MAX_IN_FLIGHT);
            tokio::spawn(send_up(due, Arc::clone(&inside)));
            let (down, due_down) = mpsc::channel(MAX_IN_FLIGHT);
            // The same losses in every run, but different ones for each transport.
            let random = fastrand::Rng::with_seed(clients.len() as u64);
            tokio::spawn(receive_down(inside, down, path, random));
            let (outside, record) = (Arc::clone(&outside), Arc::clone(record));
            tokio::spawn(send_down(due_down, outside, client, record));
            clients.insert(client, queue);
        }
        // A full queue drops the datagram, as a router does.
        let datagram = (Instant::now() + path.delay, buffer[..read].to_vec());
        drop(clients[&client].try_send(datagram));
    }
}

async fn send_up(mut due: mpsc::Receiver<(Instant, Vec<u8>)>, inside: Arc<UdpSocket>) {
    while let Some((at, datagram)) = due.recv().await {
        sleep_until(at).await;
        // A datagram that can't be sent is lost, as in any network.
        drop(inside.send(&datagram).await);
    }
}

async fn receive_down(
    inside: Arc<UdpSocket>,
    queue: mpsc::Sender<(Instant, Vec<u8>)>,
    path: Path,
    mut random: fastrand::Rng,
) {
    let mut buffer = [0; DATAGRAM];
    let mut due = Instant::now();
    loop {
        let Ok(read) = inside.recv(&mut buffer).await else {
            return;
        };
        let (lost, late) = (random.f64() < path.loss, random.f64());
        if lost {
            continue;
        }
        due = due.max(Instant::now() + path.delay + path.jitter.mul_f64(late));
        if queue.send((due, buffer[..read].to_vec())).await.is_err() {
            return;
        }
    }
}

async fn send_down(
    mut due: mpsc::Receiver<(Instant, Vec<u8>)>,
    outside: Arc<UdpSocket>,
    client: SocketAddr,
    record: Arc<Mutex<Vec<Packet>>>,
) {
    while let Some((at, datagram)) = due.recv().await {
        sleep_until(at).await;
        if outside.send_to(&datagram, client).await.is_err() {
            return;
        }
        if let Some(packet) = rtp(&datagram) {
            let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
            record.push(packet);
        }
    }
}

/// Parses the header of an RTP packet, which SRTP doesn't encrypt. `None` for other packets on the port (RFC 7983), such as
/// RTCP (RFC 5761, 4).
fn rtp(datagram: &[u8]) -> Option<Packet> {
    let (head, _) = datagram.split_first_chunk::<12>()?;
    let is_rtcp = (192..=223).contains(&head[1]);
    if !(128..=191).contains(&head[0]) || is_rtcp {
        return None;
    }
    let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    Some(Packet {
        at: SystemTime::now(),
        ssrc: word(8),
        sequence: u16::from_be_bytes([head[2], head[3]]),
        timestamp: word(4),
    })
}
