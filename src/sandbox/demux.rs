//! Routes a datagram from the shared UDP socket to its peer connection: by the ufrag of a STUN request, otherwise by the
//! source address. Media takes one map lookup; no list is scanned.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio::time::Instant;

/// Addresses remembered per peer connection; a browser has fewer candidates.
const MAX_ADDRESSES: usize = 16;

/// Which of the two peer connections of a participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    /// The client sends on it.
    Publisher,
    /// The client receives on it.
    Subscriber,
}

/// A peer connection within its room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PeerId {
    /// The participant's number within its room.
    pub participant: u64,
    pub side: Side,
}

/// A datagram on its way to a room.
#[derive(Debug)]
pub(crate) struct RoutedDatagram {
    pub peer: PeerId,
    pub at: Instant,
    pub source: SocketAddr,
    pub data: Vec<u8>,
}

#[derive(Default)]
pub(crate) struct Demux {
    routes: Mutex<DatagramRoutes>,
}

#[derive(Default)]
struct DatagramRoutes {
    sessions: HashMap<u64, IceSession>,
    by_ufrag: HashMap<String, u64>,
    by_address: HashMap<SocketAddr, u64>,
    next: u64,
}

struct IceSession {
    peer: PeerId,
    room: mpsc::Sender<RoutedDatagram>,
    ufrag: String,
    addresses: Vec<SocketAddr>,
}

/// A registered peer connection; dropping it ends the routing.
pub(crate) struct PeerRegistration {
    demux: std::sync::Arc<Demux>,
    session: u64,
}

impl Demux {
    /// Routes datagrams for the holder of `ufrag` to `room`.
    pub(crate) fn register(
        self: &std::sync::Arc<Self>,
        ufrag: &str,
        peer: PeerId,
        room: mpsc::Sender<RoutedDatagram>,
    ) -> PeerRegistration {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let session = routes.next;
        routes.next += 1;
        routes.by_ufrag.insert(ufrag.to_owned(), session);
        let entry = IceSession {
            peer,
            room,
            ufrag: ufrag.to_owned(),
            addresses: Vec::new(),
        };
        routes.sessions.insert(session, entry);
        PeerRegistration {
            demux: std::sync::Arc::clone(self),
            session,
        }
    }

    /// Passes a datagram to its room. A datagram without a known room, or for a room with a full queue, is dropped, as a
    /// network may do.
    pub(crate) fn dispatch(&self, source: SocketAddr, data: &[u8]) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let session = match stun_local_ufrag(data) {
            Some(ufrag) => routes.learn(ufrag, source),
            None => routes.by_address.get(&source).copied(),
        };
        let Some(entry) = session.and_then(|session| routes.sessions.get(&session)) else {
            return;
        };
        let datagram = RoutedDatagram {
            peer: entry.peer,
            at: Instant::now(),
            source,
            data: data.to_vec(),
        };
        if entry.room.try_send(datagram).is_err() {
            tracing::debug!(%source, "a room's queue is full: datagram dropped");
        }
    }

    #[cfg(test)]
    fn size(&self) -> (usize, usize, usize) {
        let routes = self.routes.lock().unwrap();
        (
            routes.sessions.len(),
            routes.by_ufrag.len(),
            routes.by_address.len(),
        )
    }
}

impl DatagramRoutes {
    /// The session that owns `ufrag`; later datagrams from `source` go to it too.
    fn learn(&mut self, ufrag: &str, source: SocketAddr) -> Option<u64> {
        let session = *self.by_ufrag.get(ufrag)?;
        if self.by_address.get(&source) == Some(&session) {
            return Some(session);
        }
        let entry = self.sessions.get_mut(&session)?;
        if entry.addresses.len() == MAX_ADDRESSES {
            self.by_address.remove(&entry.addresses.remove(0));
        }
        entry.addresses.push(source);
        self.by_address.insert(source, session);
        Some(session)
    }
}

impl Drop for PeerRegistration {
    fn drop(&mut self) {
        let mut routes = self
            .demux
            .routes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = routes.sessions.remove(&self.session) else {
            return;
        };
        routes.by_ufrag.remove(&entry.ufrag);
        for address in entry.addresses {
            // Another session may have taken the address over.
            if routes.by_address.get(&address) == Some(&self.session) {
                routes.by_address.remove(&address);
            }
        }
    }
}

/// The receiver's ufrag in the USERNAME of a STUN binding request (RFC 8445, 7.2.2: `receiver:sender`).
fn stun_local_ufrag(data: &[u8]) -> Option<&str> {
    const BINDING_REQUEST: [u8; 2] = [0x00, 0x01];
    const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
    const USERNAME: u16 = 0x0006;
    if data.len() < 20 || data[..2] != BINDING_REQUEST || data[4..8] != MAGIC_COOKIE {
        return None;
    }
    let mut attributes = &data[20..];
    while let [kind_high, kind_low, len_high, len_low, rest @ ..] = attributes {
        let len = usize::from(u16::from_be_bytes([*len_high, *len_low]));
        if u16::from_be_bytes([*kind_high, *kind_low]) == USERNAME {
            let username = std::str::from_utf8(rest.get(..len)?).ok()?;
            return username.split(':').next();
        }
        // Values are padded to four bytes.
        attributes = rest.get(len.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn binding_request(username: &str) -> Vec<u8> {
        let mut attributes = vec![0x80, 0x22, 0, 1, b'x', 0, 0, 0];
        attributes.extend([0, 6, 0, u8::try_from(username.len()).unwrap()]);
        attributes.extend(username.as_bytes());
        attributes.resize(attributes.len().next_multiple_of(4), 0);
        let mut packet = vec![0, 1, 0, u8::try_from(attributes.len()).unwrap()];
        packet.extend([0x21, 0x12, 0xa4, 0x42]);
        packet.extend([7; 12]);
        packet.extend(attributes);
        packet
    }

    fn peer(participant: u64) -> PeerId {
        PeerId {
            participant,
            side: Side::Publisher,
        }
    }

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn media_follows_the_address_that_a_stun_request_came_from() {
        let demux = Arc::new(Demux::default());
        let (room, mut inbox) = mpsc::channel(8);
        let _one = demux.register("one", peer(1), room.clone());
        let _two = demux.register("two", peer(2), room);
        demux.dispatch(address(1000), &binding_request("one:remote"));
        demux.dispatch(address(2000), &binding_request("two:remote"));
        demux.dispatch(address(2000), &[0x80, 1, 2, 3]);
        let peers: Vec<u64> = std::iter::from_fn(|| inbox.try_recv().ok())
            .map(|datagram| datagram.peer.participant)
            .collect();
        assert_eq!(peers, [1, 2, 2]);
    }

    #[test]
    fn a_datagram_from_an_unknown_source_is_dropped() {
        let demux = Arc::new(Demux::default());
        let (room, mut inbox) = mpsc::channel(8);
        let _one = demux.register("one", peer(1), room);
        demux.dispatch(address(1000), &binding_request("other:remote"));
        demux.dispatch(address(1000), &[0x80, 1, 2, 3]);
        demux.dispatch(address(1000), &[0, 1]);
        assert!(inbox.try_recv().is_err());
    }

    #[test]
    fn an_ended_session_leaves_no_route_behind() {
        let demux = Arc::new(Demux::default());
        let (room, _inbox) = mpsc::channel(64);
        let one = demux.register("one", peer(1), room);
        for port in 1..40 {
            demux.dispatch(address(port), &binding_request("one:remote"));
        }
        assert_eq!(demux.size(), (1, 1, MAX_ADDRESSES));
        drop(one);
        assert_eq!(demux.size(), (0, 0, 0));
    }

    #[test]
    fn an_address_that_changed_hands_stays_with_its_new_session() {
        let demux = Arc::new(Demux::default());
        let (room, mut inbox) = mpsc::channel(8);
        let one = demux.register("one", peer(1), room.clone());
        demux.dispatch(address(1000), &binding_request("one:remote"));
        let _two = demux.register("two", peer(2), room);
        demux.dispatch(address(1000), &binding_request("two:remote"));
        drop(one);
        demux.dispatch(address(1000), &[0x80, 0]);
        let last = std::iter::from_fn(|| inbox.try_recv().ok()).last();
        assert_eq!(last.unwrap().peer.participant, 2);
    }
}
