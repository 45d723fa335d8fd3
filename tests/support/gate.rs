//! A proxy in front of a LiveKit server that delays one kind of request, or the response to it, until the gate is opened. So an
//! agent can be in the room before the canary, or before the response to its dispatch.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// What the gate delays.
#[derive(Clone, Copy)]
pub enum Hold {
    /// The request for the signal connection.
    Signal,
    /// The response to `CreateDispatch`. The server receives the request at once.
    DispatchResponse,
}

impl Hold {
    fn is_about(self, request: &[u8]) -> bool {
        request.starts_with(match self {
            // `/rtc`, or `/rtc/v1` for a single peer connection.
            Self::Signal => b"GET /rtc".as_slice(),
            Self::DispatchResponse => b"POST /twirp/livekit.AgentDispatchService/CreateDispatch",
        })
    }
}

/// Dropping the gate opens it, so that no connection waits for ever.
pub struct Gate {
    /// The address to which the canary must connect.
    pub address: SocketAddr,
    opened: Arc<Opened>,
}

#[derive(Default)]
struct Opened {
    is: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    /// A closed gate in front of this server.
    pub fn before(server: SocketAddr, hold: Hold) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let gate = Self {
            address: listener.local_addr()?,
            opened: Arc::default(),
        };
        let opened = Arc::clone(&gate.opened);
        // The thread ends with the process. The threads of a connection end when both sides have closed it.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let opened = Arc::clone(&opened);
                thread::spawn(move || pass(client, server, hold, &opened));
            }
        });
        Ok(gate)
    }

    pub fn open(&self) {
        *self
            .opened
            .is
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.changed.notify_all();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

impl Opened {
    fn wait(&self) {
        let is = self.is.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(is, |is| !*is));
    }
}

fn pass(mut client: TcpStream, server: SocketAddr, hold: Hold, opened: &Opened) -> io::Result<()> {
    let mut first = [0; 16 * 1024];
    let read = client.read(&mut first)?;
    let waits_for = hold.is_about(&first[..read]).then_some(hold);
    if let Some(Hold::Signal) = waits_for {
        opened.wait();
    }
    let mut upstream = TcpStream::connect(server)?;
    upstream.write_all(&first[..read])?;
    let (mut from, mut to) = (client.try_clone()?, upstream.try_clone()?);
    thread::spawn(move || {
        let copied = io::copy(&mut from, &mut to);
        drop(to.shutdown(Shutdown::Write));
        copied
    });
    if let Some(Hold::DispatchResponse) = waits_for {
        opened.wait();
    }
    io::copy(&mut upstream, &mut client)?;
    client.shutdown(Shutdown::Write)
}
