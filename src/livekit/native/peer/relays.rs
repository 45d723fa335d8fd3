//! The TURN relays of one peer connection: which servers it may use, when it connects to them, and the ICE candidate of
//! each. Every peer connection has allocations of its own: LiveKit tells peer connections apart by the address of the sender.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::task::{Context, Poll};

use str0m::net::Protocol;
use str0m::{Candidate, CandidateKind};
use tokio::time::Instant;

use crate::config::Ice;
use crate::livekit::event::MediaPath;
use crate::livekit::native::relay::{RelayEvent, TurnRelay};
use crate::livekit::wire::connect::Endpoint;
use crate::livekit::wire::turn::{TurnServer, TurnTransport};

/// Maximum number of LiveKit's addresses that are kept for relays that connect later.
const MAX_PEERS: usize = 16;

/// The relays of a peer connection.
#[derive(Default)]
pub(crate) struct Relays {
    /// Servers without a connection yet.
    offered: Vec<(Endpoint, TurnServer)>,
    /// When to connect to them, unless ICE has a path by then.
    due: Option<Instant>,
    pub(super) open: Vec<RelayPath>,
    /// LiveKit's UDP addresses: what each relay must be allowed to send to.
    peers: Vec<SocketAddr>,
}

/// A relay, and its ICE candidate once the server has allocated an address.
pub(super) struct RelayPath {
    pub(super) relay: TurnRelay,
    pub(super) candidate: Option<Candidate>,
    failed: bool,
}

impl Relays {
    /// Selects the servers that `ice` allows: at most one over UDP, and one over TLS or else TCP.
    pub(crate) fn new(endpoint: &Endpoint, servers: &[TurnServer], ice: Ice) -> Self {
        use TurnTransport::{Tcp, Tls, Udp};
        let first = |transport| servers.iter().find(|it| it.transport == transport);
        let selected = match ice {
            Ice::All | Ice::Relay => [first(Udp), first(Tls).or_else(|| first(Tcp))],
            Ice::Tls => [first(Tls), None],
            Ice::Tcp => [None, None],
        };
        let offered = selected.into_iter().flatten();
        Self {
            offered: offered
                .map(|server| (endpoint.clone(), server.clone()))
                .collect(),
            ..Self::default()
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.offered.is_empty() && self.open.is_empty()
    }

    pub(super) fn servers(&self) -> impl Iterator<Item = &TurnServer> {
        let open = self.open.iter().map(|path| path.relay.server());
        self.offered.iter().map(|(_, server)| server).chain(open)
    }

    /// Sets when to connect, unless it is set.
    pub(super) fn start_at(&mut self, due: Instant) {
        if !self.offered.is_empty() {
            self.due.get_or_insert(due);
        }
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Connects to the servers if that is due.
    pub(super) fn connect(&mut self, now: Instant) {
        if self.due.take_if(|due| *due <= now).is_none() {
            return;
        }
        for (endpoint, server) in self.offered.drain(..) {
            let mut relay = TurnRelay::connect(&endpoint, server);
            for peer in &self.peers {
                relay.permit(now, *peer);
            }
            self.open.push(RelayPath {
                relay,
                candidate: None,
                failed: false,
            });
        }
    }

    /// Has all relays send to `peer`, an address of LiveKit's.
    pub(super) fn permit(&mut self, now: Instant, peer: SocketAddr) {
        if self.peers.len() < MAX_PEERS && !self.peers.contains(&peer) {
            self.peers.push(peer);
            for path in &mut self.open {
                path.relay.permit(now, peer);
            }
        }
    }

    pub(super) fn on_time(&mut self, now: Instant) {
        for path in &mut self.open {
            path.relay.on_time(now);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let deadlines = self.open.iter().filter_map(|it| it.relay.next_deadline());
        deadlines.min()
    }

    /// Waits for an event of a relay; returns its index, too.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<(usize, RelayEvent)> {
        for (index, path) in self.open.iter_mut().enumerate() {
            if let Poll::Ready(event) = path.relay.poll(cx, buffer) {
                return Poll::Ready((index, event));
            }
        }
        Poll::Pending
    }

    pub(super) fn try_recv(&mut self, buffer: &mut [u8]) -> Option<(usize, RelayEvent)> {
        let mut paths = self.open.iter_mut().enumerate();
        paths.find_map(|(index, path)| Some((index, path.relay.try_recv(buffer)?)))
    }

    /// The index of the relay whose allocated address this is.
    pub(super) fn of_address(&self, relayed: SocketAddr) -> Option<usize> {
        let mut relays = self.open.iter().map(|path| &path.relay);
        relays.position(|relay| relay.relayed() == Some(relayed))
    }

    /// Whether every relay has failed, the one of `index` now.
    pub(super) fn all_failed(&mut self, index: usize) -> bool {
        self.open[index].failed = true;
        self.offered.is_empty() && self.open.iter().all(|path| path.failed)
    }

    pub(super) fn close(&mut self, now: Instant) {
        for path in &mut self.open {
            path.relay.close(now);
        }
    }
}

/// The candidate of an allocation; `None` if no peer could send to that address.
///
/// Its priority is explicit, because LiveKit chooses between the candidates by what is sent to it: the stack would give
/// equal priorities to all relays, and that of a reflexive address, which is above TCP, to the checks that it sends over one.
pub(super) fn relayed_candidate(
    relayed: SocketAddr,
    transport: TurnTransport,
) -> Option<Candidate> {
    const COMPONENT: u16 = 1;
    // The type preferences of libwebrtc.
    let preference: u32 = match transport {
        TurnTransport::Udp => 2,
        TurnTransport::Tcp => 1,
        TurnTransport::Tls => 0,
    };
    // RFC 8445, section 5.1.2.1, for the only component.
    let priority = preference << 24 | u32::from(u16::MAX) << 8 | (256 - u32::from(COMPONENT));
    // Refuses an address that is none of a host.
    Candidate::relayed(relayed, relayed, Protocol::Udp).ok()?;
    Some(Candidate::from_parts(
        format!("relay{preference}"),
        COMPONENT,
        // The protocol of the relayed side, however the server is reached.
        Protocol::Udp,
        priority,
        relayed,
        CandidateKind::Relayed,
        Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)),
        None,
        None,
    ))
}

impl From<TurnTransport> for MediaPath {
    fn from(transport: TurnTransport) -> Self {
        match transport {
            TurnTransport::Udp => Self::RelayUdp,
            TurnTransport::Tcp => Self::RelayTcp,
            TurnTransport::Tls => Self::RelayTls,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plainer_relay_has_the_higher_priority_and_every_relay_less_than_tcp() {
        use TurnTransport::{Tcp, Tls, Udp};
        let address: SocketAddr = "192.0.2.1:40000".parse().unwrap();
        let priority = |transport| relayed_candidate(address, transport).unwrap().prio();
        let tcp = Candidate::host(address, Protocol::Tcp).unwrap().prio();
        let priorities = [tcp, priority(Udp), priority(Tcp), priority(Tls)];
        assert!(
            priorities.is_sorted_by(|one, next| one > next),
            "{priorities:?}"
        );
        let line = relayed_candidate(address, Udp).unwrap().to_sdp_string();
        assert_eq!(
            line,
            "candidate:relay2 1 udp 50331647 192.0.2.1 40000 typ relay raddr 0.0.0.0 rport 0"
        );
        let unusable = "0.0.0.0:0".parse().unwrap();
        assert!(relayed_candidate(unusable, Udp).is_none());
    }
}
