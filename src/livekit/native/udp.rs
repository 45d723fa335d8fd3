//! A UDP socket that says when each datagram came by the kernel's own stamp: how late it is read then costs no exactness.
//! It knows no ICE.

use std::io::{self, IoSliceMut};
use std::net::{self, IpAddr, SocketAddr};
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

pub(crate) struct MediaSocket {
    reader: DatagramReader,
    /// Wakes the task for each datagram; `None` once the task comes often enough by itself.
    watch: Option<AsyncFd<Arc<net::UdpSocket>>>,
    local: SocketAddr,
}

struct DatagramReader {
    udp: Arc<net::UdpSocket>,
    /// Where the kernel puts its stamp.
    control: Vec<u8>,
    /// When nothing was left to read: what is read later came later.
    empty_at: Instant,
}

/// A datagram that is in the buffer.
pub(crate) struct Datagram {
    pub(crate) at: Instant,
    pub(crate) from: SocketAddr,
    pub(crate) length: usize,
}

impl MediaSocket {
    /// Binds to any free port of `local`.
    pub(crate) fn bind(local: IpAddr) -> io::Result<Self> {
        let udp = Arc::new(net::UdpSocket::bind((local, 0))?);
        udp.set_nonblocking(true)?;
        // The kernel begins a moment after the first socket has asked; until then it takes the time of reading.
        setsockopt(&udp, sockopt::ReceiveTimestamp, &true)?;
        // For what comes alone: the kernel would tell of each datagram that went out, too.
        #[expect(
            deprecated,
            reason = "its successor is unsafe for types that may give their descriptor away; a socket of std doesn't"
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

    /// From now on [`poll_recv`](Self::poll_recv) wakes nobody, and [`try_recv`](Self::try_recv) is to be called by the
    /// clock. A wake-up for each packet costs more than the packet.
    pub(crate) fn stop_watching(&mut self) {
        self.watch = None;
    }

    /// Waits for a datagram, as long as the socket is watched.
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

    /// Reads the next datagram; `None` where nothing is left. As long as the socket is watched the kernel isn't asked
    /// again for what it has not told of.
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

    /// Sends at once, or not at all.
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
                // An ICMP answer to something sent before, and gone now: the next datagram may be well.
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

/// The kernel stamps by the wall clock, which may be set meanwhile: the moment lies between the two on ours in any case.
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::thread::sleep;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);
    const LATE: Duration = Duration::from_millis(300);

    fn pair() -> (MediaSocket, MediaSocket) {
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let socket = || MediaSocket::bind(loopback).unwrap();
        (socket(), socket())
    }

    #[tokio::test]
    async fn datagram_that_is_read_late_came_when_it_came() {
        let (mut ours, theirs) = pair();
        ours.stop_watching();
        // So that the kernel has begun to stamp.
        sleep(LATE);
        let sent = Instant::now();
        theirs.send(b"one", ours.local()).unwrap();
        sleep(LATE);
        let mut buffer = [0; 16];
        let datagram = ours.try_recv(&mut buffer).unwrap();
        assert_eq!(datagram.from, theirs.local());
        assert_eq!(&buffer[..datagram.length], b"one");
        let after = datagram.at.duration_since(sent);
        assert!(after < LATE / 2, "{after:?}");
        assert!(ours.try_recv(&mut buffer).is_none());
    }

    #[tokio::test]
    async fn only_a_watched_socket_wakes_its_reader() {
        let (mut ours, theirs) = pair();
        let mut buffer = [0; 16];
        theirs.send(b"one", ours.local()).unwrap();
        let came = poll_fn(|cx| ours.poll_recv(cx, &mut buffer));
        tokio::time::timeout(LONG, came).await.unwrap();
        ours.stop_watching();
        theirs.send(b"two", ours.local()).unwrap();
        let came = poll_fn(|cx| Poll::Ready(ours.poll_recv(cx, &mut buffer))).await;
        assert!(came.is_pending());
        assert!(ours.try_recv(&mut buffer).is_some());
    }

    #[test]
    fn clock_that_is_set_moves_no_arrival_out_of_its_bounds() {
        let (wall, now) = (SystemTime::now(), Instant::now());
        let empty_at = now - Duration::from_millis(20);
        let came = |stamp| arrival_time(stamp, wall, empty_at, now);
        let ago = Duration::from_millis(5);
        assert_eq!(came(Some(wall - ago)), now - ago);
        assert_eq!(came(Some(wall - LONG)), empty_at);
        assert_eq!(came(Some(wall + LONG)), now);
        assert_eq!(came(None), now);
        assert_eq!(came(Some(UNIX_EPOCH)), empty_at);
    }
}
