//! One connection of ICE over TCP, the side that connects (RFC 6544): datagrams to and from one address, each behind its
//! length (RFC 4571). It knows no ICE.

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

/// A server that takes longer to accept is no way round blocked UDP within any sensible media deadline.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes that may wait for the kernel to take them, above its own buffer: some two seconds of a voice.
const MAX_UNSENT: usize = 16 * 1024;

pub(crate) struct IceTcpConnection {
    remote: SocketAddr,
    state: TcpState,
}

enum TcpState {
    Connecting(Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>),
    Open(TcpFrames, IpAddr),
    Closed,
}

type TcpFrames = Framed<TcpStream, LengthDelimitedCodec>;

/// What a connection has to say.
#[derive(Debug)]
pub(crate) enum TcpEvent {
    /// It is up, from this address of ours.
    Opened(IpAddr),
    /// A datagram to that address is in the buffer.
    Datagram { to: IpAddr, length: usize },
    /// It never came up, or ended. It says nothing any more.
    Closed,
}

impl IceTcpConnection {
    /// Begins to connect; [`poll`](Self::poll) carries it on.
    pub(crate) fn to(remote: SocketAddr) -> Self {
        let connecting = async move {
            let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(remote)).await??;
            // Each datagram is due now.
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        Self {
            remote,
            state: TcpState::Connecting(Box::pin(connecting)),
        }
    }

    /// Sends a datagram, or drops it where the connection isn't up or what waits to be sent is too much already.
    pub(crate) fn send(&mut self, datagram: &[u8]) {
        let TcpState::Open(frames, _) = &mut self.state else {
            return;
        };
        let unsent = frames.write_buffer_mut();
        let Ok(length) = u16::try_from(datagram.len()) else {
            return;
        };
        if unsent.len() + datagram.len() > MAX_UNSENT {
            tracing::trace!("a datagram was not sent: the connection takes no more");
            return;
        }
        unsent.put_u16(length);
        unsent.extend_from_slice(datagram);
        // At once, as a UDP socket would; what the kernel doesn't take now, or an error, is the next poll's.
        if let Ok(sent) = frames.get_ref().try_write(frames.write_buffer()) {
            frames.write_buffer_mut().advance(sent);
        }
    }

    /// Goes on connecting, sending and receiving. A datagram that is empty or larger than `buffer` is dropped.
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
            tracing::debug!(remote = %self.remote, %error, "no connection for media over TCP");
            self.state = TcpState::Closed;
            TcpEvent::Closed
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

    /// A connection that is up, and the server's end of it.
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
            TcpEvent::Closed => OwnedTcpEvent::Closed,
        }
    }

    fn datagram(bytes: &[u8]) -> OwnedTcpEvent {
        OwnedTcpEvent::Datagram(bytes.to_vec())
    }

    #[tokio::test]
    async fn datagrams_keep_their_bounds_however_the_bytes_are_cut() {
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
    async fn empty_and_oversize_datagrams_are_dropped_and_the_next_is_not() {
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
    async fn sent_datagram_goes_out_behind_its_length() {
        let (mut connection, mut server) = connected().await;
        connection.send(b"hello");
        let mut bytes = [0; 7];
        server.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"\x00\x05hello");
    }

    #[tokio::test]
    async fn peer_that_reads_nothing_costs_datagrams_and_no_memory() {
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
        // What was accepted arrives whole: the stream is still in step.
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
    async fn end_of_the_stream_is_told_once() {
        let (mut connection, mut server) = connected().await;
        server.write_all(b"\x00\x03one\x00\x03t").await.unwrap();
        drop(server);
        assert_eq!(next(&mut connection).await, datagram(b"one"));
        assert_eq!(next(&mut connection).await, OwnedTcpEvent::Closed);
        connection.send(b"nobody hears this");
        let mut buffer = [0; 16];
        let after = poll_fn(|cx| Poll::Ready(connection.poll(cx, &mut buffer))).await;
        assert!(after.is_pending());
    }

    #[tokio::test]
    async fn closed_port_is_a_closed_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert_eq!(
            next(&mut IceTcpConnection::to(address)).await,
            OwnedTcpEvent::Closed
        );
    }
}
