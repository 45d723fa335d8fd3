//! A UDP socket that returns the kernel's receive time of each datagram, so that a late read loses no accuracy.
//!
//! It knows no ICE.

use std::io::{self, IoSliceMut};
use std::net::{self, IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

/// A UDP socket for media, either watched by the runtime or read by the caller's clock.
pub(crate) struct MediaSocket {
    reader: DatagramReader,
    /// Wakes the task for each datagram; `None` once the task reads often enough by itself.
    watch: Option<AsyncFd<Arc<net::UdpSocket>>>,
    local: SocketAddr,
}

struct DatagramReader {
    udp: Arc<net::UdpSocket>,
    /// The buffer for the kernel's timestamp.
    control: Vec<u8>,
    /// When the socket was last empty: a datagram that is read later arrived later.
    empty_at: Instant,
}

/// A datagram in the caller's buffer.
pub(crate) struct Datagram {
    /// When the kernel received it.
    pub(crate) at: Instant,
    pub(crate) from: SocketAddr,
    pub(crate) length: usize,
}

impl MediaSocket {
    /// Binds to any free port of `local`.
    pub(crate) fn bind(local: IpAddr) -> io::Result<Self> {
        let udp = Arc::new(net::UdpSocket::bind((local, 0))?);
        udp.set_nonblocking(true)?;
        // Linux starts to timestamp packets shortly after the first socket on the machine requests it. Until then, the
        // timestamp is the time of the read.
        setsockopt(&udp, sockopt::ReceiveTimestamp, &true)?;
        // Readable only: for the default interest, epoll would also wake the task after each datagram that was sent.
        #[expect(
            deprecated,
            reason = "its successor is unsafe for types that may change their descriptor; a std socket does not"
        )]
        let watch = AsyncFd::with_interest(Arc::clone(&udp), Interest::READABLE)?;
        let local = udp.local_addr()?;
        let reader = DatagramReader {
            udp,
            control: cmsg_space!(TimeVal),
            empty_at: Instant::now(),
        };
        Ok(Self {
            reader,
            watch: Some(watch),
            local,
        })
    }

    pub(crate) fn local(&self) -> SocketAddr {
        self.local
    }

    /// Stops waking the task for each datagram: a wake-up costs more time than the packet itself. From now on, the
    /// caller calls [`try_recv`](Self::try_recv) at an interval.
    pub(crate) fn stop_watching(&mut self) {
        self.watch = None;
    }

    /// Waits for a datagram; pending for ever once the socket is no longer watched.
    pub(crate) fn poll_recv(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<Datagram> {
        while let Some(watch) = &self.watch
            && let Poll::Ready(Ok(mut ready)) = watch.poll_read_ready(cx)
        {
            match self.reader.try_recv(buffer) {
                Some(datagram) => return Poll::Ready(datagram),
                None => ready.clear_ready(),
            }
        }
        Poll::Pending
    }

    /// Reads the next datagram; `None` if there is none. On a watched socket, it costs no system call unless the
    /// runtime knows of a datagram.
    pub(crate) fn try_recv(&mut self, buffer: &mut [u8]) -> Option<Datagram> {
        let Self { reader, watch, .. } = self;
        let Some(watch) = watch else {
            return reader.try_recv(buffer);
        };
        let read = |_: &_| {
            let datagram = reader.try_recv(buffer);
            datagram.ok_or_else(|| io::ErrorKind::WouldBlock.into())
        };
        watch.try_io(Interest::READABLE, read).ok()
    }

    /// Sends a datagram without waiting.
    ///
    /// # Errors
    /// The kernel did not take the datagram, for example because its buffer is full.
    pub(crate) fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.reader.udp.send_to(datagram, to).map(drop)
    }
}

impl DatagramReader {
    fn try_recv(&mut self, buffer: &mut [u8]) -> Option<Datagram> {
        loop {
            let asked_at = Instant::now();
            match RawDatagram::read(&self.udp, buffer, &mut self.control) {
                Ok(received) => {
                    let (wall, now) = (SystemTime::now(), Instant::now());
                    return Some(Datagram {
                        at: arrival_time(received.stamp, wall, self.empty_at, now),
                        from: received.from,
                        length: received.length,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.empty_at = asked_at;
                    return None;
                }
                // An ICMP error for an earlier datagram that we sent. Reading it cleared it, and a datagram may follow.
                Err(_) => {}
            }
        }
    }
}

struct RawDatagram {
    from: SocketAddr,
    length: usize,
    stamp: Option<SystemTime>,
}

impl RawDatagram {
    fn read(udp: &net::UdpSocket, buffer: &mut [u8], control: &mut [u8]) -> io::Result<Self> {
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::empty();
        let message =
            recvmsg::<SockaddrStorage>(udp.as_raw_fd(), &mut parts, Some(control), flags)?;
        let from = message.address.as_ref().and_then(address);
        Ok(Self {
            from: from.ok_or(io::ErrorKind::InvalidData)?,
            length: message.bytes,
            stamp: message
                .cmsgs()
                .ok()
                .and_then(|mut it| it.find_map(|it| stamp(&it))),
        })
    }
}

fn address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|it| SocketAddr::from(*it));
    v4.or_else(|| address.as_sockaddr_in6().map(|it| SocketAddr::from(*it)))
}

fn stamp(message: &ControlMessageOwned) -> Option<SystemTime> {
    let ControlMessageOwned::ScmTimestamp(time) = message else {
        return None;
    };
    let micros = u64::try_from(time.num_microseconds()).ok()?;
    Some(UNIX_EPOCH + Duration::from_micros(micros))
}

/// Converts the kernel's timestamp to the monotonic clock.
///
/// The kernel uses the wall clock, which may be changed at any time. The result is therefore limited to the time
/// between the last empty read and now.
fn arrival_time(
    stamp: Option<SystemTime>,
    wall: SystemTime,
    empty_at: Instant,
    now: Instant,
) -> Instant {
    let age = stamp.and_then(|stamp| wall.duration_since(stamp).ok());
    let at = now.checked_sub(age.unwrap_or_default());
    at.map_or(empty_at, |at| at.max(empty_at))
}

/// Returns the local address that packets to `remote` leave from. Connecting a UDP socket looks up the route without
/// sending.
pub(crate) async fn route_to(remote: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match remote {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = tokio::net::UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect(remote).await.ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::thread::sleep;

    use super::*;

    const TEST_TIMEOUT: Duration = Duration::from_secs(20);
    const READ_DELAY: Duration = Duration::from_millis(300);

    fn pair() -> (MediaSocket, MediaSocket) {
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let socket = || MediaSocket::bind(loopback).unwrap();
        (socket(), socket())
    }

    #[tokio::test]
    async fn datagram_that_is_read_late_keeps_its_receive_time() {
        let (mut ours, theirs) = pair();
        ours.stop_watching();
        // The kernel needs a moment before it timestamps packets.
        sleep(READ_DELAY);
        let sent = Instant::now();
        theirs.send(b"one", ours.local()).unwrap();
        sleep(READ_DELAY);
        let mut buffer = [0; 16];
        let datagram = ours.try_recv(&mut buffer).unwrap();
        assert_eq!(datagram.from, theirs.local());
        assert_eq!(&buffer[..datagram.length], b"one");
        let after = datagram.at.duration_since(sent);
        assert!(after < READ_DELAY / 2, "{after:?}");
        assert!(ours.try_recv(&mut buffer).is_none());
    }

    #[tokio::test]
    async fn socket_that_is_not_watched_does_not_wake_its_reader() {
        let (mut ours, theirs) = pair();
        let mut buffer = [0; 16];
        theirs.send(b"one", ours.local()).unwrap();
        let received = poll_fn(|cx| ours.poll_recv(cx, &mut buffer));
        tokio::time::timeout(TEST_TIMEOUT, received).await.unwrap();
        ours.stop_watching();
        theirs.send(b"two", ours.local()).unwrap();
        let received = poll_fn(|cx| Poll::Ready(ours.poll_recv(cx, &mut buffer))).await;
        assert!(received.is_pending());
        assert!(ours.try_recv(&mut buffer).is_some());
    }

    #[tokio::test]
    async fn local_address_follows_the_route() {
        let loopback: SocketAddr = "127.0.0.1:9".parse().unwrap();
        assert_eq!(route_to(loopback).await, Some(loopback.ip()));
    }

    #[test]
    fn change_of_the_wall_clock_moves_no_arrival_out_of_its_bounds() {
        let (wall, now) = (SystemTime::now(), Instant::now());
        let empty_at = now - Duration::from_millis(20);
        let arrived = |stamp| arrival_time(stamp, wall, empty_at, now);
        let ago = Duration::from_millis(5);
        assert_eq!(arrived(Some(wall - ago)), now - ago);
        assert_eq!(arrived(Some(wall - TEST_TIMEOUT)), empty_at);
        assert_eq!(arrived(Some(wall + TEST_TIMEOUT)), now);
        assert_eq!(arrived(None), now);
        assert_eq!(arrived(Some(UNIX_EPOCH)), empty_at);
    }
}
