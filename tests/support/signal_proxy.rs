//! A proxy in front of a LiveKit server that rewrites what the server sends on a signal connection. Everything else passes
//! unchanged.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use livekit_protocol::SignalResponse;
pub use livekit_protocol::signal_response::Message as SignalMessage;
use prost::Message as _;

/// The length of a WebSocket's frame header that has a length of 64 bits.
const LONG_HEADER: usize = 10;
const BINARY: u8 = 0x82;

/// Replaces one message by any number of messages.
type Rewrite = Arc<dyn Fn(SignalMessage) -> Vec<SignalMessage> + Send + Sync>;

pub struct SignalProxy {
    /// The address to which the canary must connect.
    pub address: SocketAddr,
}

impl SignalProxy {
    /// A proxy in front of this server.
    pub fn before(
        server: SocketAddr,
        rewrite: impl Fn(SignalMessage) -> Vec<SignalMessage> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let rewrite: Rewrite = Arc::new(rewrite);
        // The thread ends with the process. The threads of a connection end when both sides have closed it.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let rewrite = Arc::clone(&rewrite);
                thread::spawn(move || pass(client, server, &rewrite));
            }
        });
        Ok(Self { address })
    }

    /// The URL of the proxy.
    pub fn url(&self) -> String {
        format!("ws://{}", self.address)
    }
}

fn pass(mut client: TcpStream, server: SocketAddr, rewrite: &Rewrite) -> io::Result<()> {
    let mut first = [0; 16 * 1024];
    let read = client.read(&mut first)?;
    let mut upstream = TcpStream::connect(server)?;
    upstream.write_all(&first[..read])?;
    let (mut from, mut to) = (client.try_clone()?, upstream.try_clone()?);
    thread::spawn(move || {
        let copied = io::copy(&mut from, &mut to);
        drop(to.shutdown(Shutdown::Write));
        copied
    });
    // `/rtc`, or `/rtc/v1` for a single peer connection.
    if first.starts_with(b"GET /rtc") && pass_head(&mut upstream, &mut client)? {
        while let Some((head, payload)) = read_frame(&mut upstream)? {
            let message = (head[0] == BINARY)
                .then(|| SignalResponse::decode(&*payload).ok()?.message)
                .flatten();
            match message {
                Some(message) => {
                    for message in rewrite(message) {
                        client.write_all(&frame_of(message))?;
                    }
                }
                None => client.write_all(&[head, payload].concat())?,
            }
        }
    }
    io::copy(&mut upstream, &mut client)?;
    client.shutdown(Shutdown::Write)
}

/// Passes the head of the response; returns whether it opens a WebSocket.
fn pass_head(upstream: &mut TcpStream, client: &mut TcpStream) -> io::Result<bool> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if upstream.read(&mut byte)? == 0 {
            break;
        }
        head.extend(byte);
    }
    client.write_all(&head)?;
    Ok(head.starts_with(b"HTTP/1.1 101"))
}

/// The header and the payload of the next frame; `None` at the end. A server does not mask its frames (RFC 6455, 5.1).
fn read_frame(upstream: &mut TcpStream) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
    let mut head = vec![0; 2];
    if upstream.read_exact(&mut head).is_err() {
        return Ok(None);
    }
    let more = match head[1] {
        126 => 2,
        127 => LONG_HEADER - 2,
        _ => 0,
    };
    head.resize(2 + more, 0);
    upstream.read_exact(&mut head[2..])?;
    let length = match more {
        0 => u64::from(head[1]),
        _ => head[2..]
            .iter()
            .fold(0, |length, byte| length << 8 | u64::from(*byte)),
    };
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let mut payload = vec![0; length];
    upstream.read_exact(&mut payload)?;
    Ok(Some((head, payload)))
}

fn frame_of(message: SignalMessage) -> Vec<u8> {
    let message = Some(message);
    let payload = SignalResponse { message }.encode_to_vec();
    let mut frame = vec![BINARY, 127];
    frame.extend((payload.len() as u64).to_be_bytes());
    frame.extend(payload);
    frame
}
