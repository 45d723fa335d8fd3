//! One active connection of ICE over TCP (RFC 6544): datagrams to and from one address, each after its length (RFC
//! 4571).
//!
//! It frames bytes and knows no ICE.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{Sink, Stream};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// A server that accepts later than this cannot replace blocked UDP within a sensible media deadline.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of bytes that wait for space in the kernel's buffer: about two seconds of one voice.
const MAX_UNSENT: usize = 16 * 1024;

/// A TCP connection that carries one remote candidate's media.
pub(crate) struct IceTcpConnection {
    remote: SocketAddr,
    state: TcpState,
}

enum TcpState {
    Connecting(Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>),
    /// With the local address.
    Open(TcpFrames, IpAddr),
    Closed,
}

type TcpFrames = Framed<TcpStream, LengthDelimitedCodec>;

/// What happened on a connection.
#[derive(Debug)]
pub(crate) enum TcpEvent {
    /// The connection is open, from this local address.
    Opened(IpAddr),
    /// A datagram to this local address is in the buffer.
    Datagram { to: IpAddr, length: usize },
    /// The connection failed or ended. No event follows.
    Closed(io::Error),
}

impl IceTcpConnection {
    /// Starts to connect; [`poll`](Self::poll) continues.
    pub(crate) fn to(remote: SocketAddr) -> Self {
        let connecting = async move {
            let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(remote)).await??;
            // Nagle's algorithm would hold small packets back, and media is due at once.
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        Self {
            remote,
            state: TcpState::Connecting(Box::pin(connecting)),
        }
    }

    /// Sends a datagram. Drops it if the connection is not open or if too many bytes are waiting, as UDP would.
    pub(crate) fn send(&mut self, datagram: &[u8]) {
        let TcpState::Open(frames, _) = &mut self.state else {
            return;
        };
        let unsent = frames.write_buffer_mut();
        let Ok(length) = u16::try_from(datagram.len()) else {
            return;
        };
        if unsent.len() + datagram.len() > MAX_UNSENT {
            tracing::trace!("dropped a datagram: the TCP connection is congested");
            return;
        }
        unsent.put_u16(length);
        unsent.extend_from_slice(datagram);
        // Write at once, as a UDP socket does. The next poll handles an error and the bytes that the kernel did not
        // take.
        if let Ok(sent) = frames.get_ref().try_write(frames.write_buffer()) {
            frames.write_buffer_mut().advance(sent);
        }
    }

    /// Continues to connect, send and receive. Drops a datagram that is empty or larger than `buffer`.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<TcpEvent> {
        let event = match &mut self.state {
            TcpState::Connecting(connecting) => {
                ready!(connecting.as_mut().poll(cx)).and_then(|it| {
                    let local = it.local_addr()?.ip();
                    self.state = TcpState::Open(framed(it), local);
                    Ok(TcpEvent::Opened(local))
                })
            }
            TcpState::Open(frames, to) => ready!(poll_datagram(frames, cx, buffer))
                .map(|length| TcpEvent::Datagram { to: *to, length }),
            TcpState::Closed => return Poll::Pending,
        };
        Poll::Ready(event.unwrap_or_else(|error| {
            tracing::debug!(remote = %self.remote, %error, "the TCP connection for media failed or ended");
            self.state = TcpState::Closed;
            TcpEvent::Closed(error)
        }))
    }
}

fn framed(stream: TcpStream) -> TcpFrames {
    LengthDelimitedCodec::builder()
        .length_field_type::<u16>()
        .new_framed(stream)
}

fn poll_datagram(
    frames: &mut TcpFrames,
    cx: &mut Context<'_>,
    buffer: &mut [u8],
) -> Poll<io::Result<usize>> {
    if let Poll::Ready(Err(error)) = Sink::<Bytes>::poll_flush(Pin::new(&mut *frames), cx) {
        return Poll::Ready(Err(error));
    }
    loop {
        let frame: BytesMut = match ready!(Pin::new(&mut *frames).poll_next(cx)) {
            Some(frame) => frame?,
            None => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
        };
        if !frame.is_empty()
            && let Some(place) = buffer.get_mut(..frame.len())
        {
            place.copy_from_slice(&frame);
            return Poll::Ready(Ok(frame.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// An open connection and the server's end of it.
    async fn connected() -> (IceTcpConnection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut connection = IceTcpConnection::to(listener.local_addr().unwrap());
        let (opened, accepted) = tokio::join!(next(&mut connection), listener.accept());
        let (server, from) = accepted.unwrap();
        server.set_nodelay(true).unwrap();
        assert!(
            matches!(opened, OwnedTcpEvent::Opened(local) if local == from.ip()),
            "{opened:?}"
        );
        (connection, server)
    }

    #[derive(Debug, PartialEq)]
    enum OwnedTcpEvent {
        Opened(IpAddr),
        Datagram(Vec<u8>),
        Closed,
    }

    async fn next(connection: &mut IceTcpConnection) -> OwnedTcpEvent {
        let mut buffer = [0; 16];
        let event = poll_fn(|cx| connection.poll(cx, &mut buffer)).await;
        match event {
            TcpEvent::Opened(local) => OwnedTcpEvent::Opened(local),
            TcpEvent::Datagram { length, .. } => OwnedTcpEvent::Datagram(buffer[..length].to_vec()),
            TcpEvent::Closed(_) => OwnedTcpEvent::Closed,
        }
    }

    fn datagram(bytes: &[u8]) -> OwnedTcpEvent {
        OwnedTcpEvent::Datagram(bytes.to_vec())
    }

    #[tokio::test]
    async fn datagrams_keep_their_bounds_in_any_segmentation_of_the_stream() {
        let (mut connection, mut server) = connected().await;
        let sending = async {
            for byte in b"\x00\x03one\x00\x01x" {
                server.write_all(&[*byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
            server.write_all(b"\x00\x03two\x00\x05three").await.unwrap();
        };
        let reading = async {
            let mut events = Vec::new();
            for _ in 0..4 {
                events.push(next(&mut connection).await);
            }
            events
        };
        let ((), events) = tokio::join!(sending, reading);
        assert_eq!(events, [b"one", &b"x"[..], b"two", b"three"].map(datagram));
    }

    #[tokio::test]
    async fn datagram_after_an_empty_and_an_oversize_one_is_received() {
        let (mut connection, mut server) = connected().await;
        let sending = async {
            server.write_all(b"\x00\x00\xff\xff").await.unwrap();
            server.write_all(&vec![7; 0xffff]).await.unwrap();
            server.write_all(b"\x00\x04next").await.unwrap();
        };
        let ((), events) = tokio::join!(sending, next(&mut connection));
        assert_eq!(events, datagram(b"next"));
    }

    #[tokio::test]
    async fn sent_datagram_follows_its_length() {
        let (mut connection, mut server) = connected().await;
        connection.send(b"hello");
        let mut bytes = [0; 7];
        server.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"\x00\x05hello");
    }

    #[tokio::test]
    async fn peer_that_reads_nothing_loses_datagrams_and_costs_no_memory() {
        let (mut connection, mut server) = connected().await;
        let sent = [9; 1000];
        let unsent = |connection: &mut IceTcpConnection| match &mut connection.state {
            TcpState::Open(frames, _) => frames.write_buffer().len(),
            _ => panic!("not open"),
        };
        while unsent(&mut connection) + sent.len() <= MAX_UNSENT {
            connection.send(&sent);
        }
        connection.send(&sent);
        assert!(unsent(&mut connection) <= MAX_UNSENT);
        // Accepted datagrams arrive complete, so the framing of the stream is intact.
        let reading = async {
            let mut frame = [0; 1002];
            for _ in 0..100 {
                server.read_exact(&mut frame).await.unwrap();
                assert_eq!(frame[..2], 1000_u16.to_be_bytes());
            }
            server.write_all(b"\x00\x04done").await.unwrap();
            server
        };
        let (_server, events) = tokio::join!(reading, next(&mut connection));
        assert_eq!(events, datagram(b"done"));
    }

    #[tokio::test]
    async fn end_of_the_stream_is_reported_once() {
        let (mut connection, mut server) = connected().await;
        server.write_all(b"\x00\x03one\x00\x03t").await.unwrap();
        drop(server);
        assert_eq!(next(&mut connection).await, datagram(b"one"));
        assert_eq!(next(&mut connection).await, OwnedTcpEvent::Closed);
        connection.send(b"into a closed connection");
        let mut buffer = [0; 16];
        let after = poll_fn(|cx| Poll::Ready(connection.poll(cx, &mut buffer))).await;
        assert!(after.is_pending());
    }

    #[tokio::test]
    async fn refused_connection_is_reported_as_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert_eq!(
            next(&mut IceTcpConnection::to(address)).await,
            OwnedTcpEvent::Closed
        );
    }
}
