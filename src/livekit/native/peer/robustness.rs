//! Property tests: a peer connection accepts or refuses any description and datagram, within its limits.

use std::future::poll_fn;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::livekit::arbitrary::{ANSWER, OFFER, bytes, candidate, check, sdp, sdp_changes};

fn peer(target: SignalTarget) -> PeerConnection {
    let local = IpAddr::from([127, 0, 0, 1]);
    PeerConnection::new(target, local, Ice::All, Relays::default()).unwrap()
}

/// Advances the time of `peer` in steps up to 60 s. The transport may fail on the way.
fn age(peer: &mut PeerConnection) {
    let now = Instant::now();
    for seconds in [0, 1, 2, 10, 60] {
        let now = now + Duration::from_secs(seconds);
        loop {
            match peer.poll(now) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(peer.next_deadline() > now, "the participant would spin");
    }
}

fn assert_bounded(peer: &PeerConnection) {
    assert!(peer.candidates <= MAX_CANDIDATES);
    assert!(peer.sockets.len() <= MAX_SOCKETS);
    assert!(peer.tcp.offered.len() + peer.tcp.connections.len() <= MAX_TCP_CONNECTIONS);
}

#[test]
fn any_offer_and_candidates_are_accepted_or_refused() {
    let offers = vec(sdp_changes(), 1..3);
    let inputs = (offers, vec(candidate(), 0..8));
    check(64, &inputs, async |(offers, candidates)| {
        let mut peer = peer(SignalTarget::Subscriber);
        for changes in &offers {
            peer.accept_offer(&sdp(OFFER, changes)).await.ok();
            for line in &candidates {
                peer.add_candidate(line).await;
            }
        }
        age(&mut peer);
        assert_bounded(&peer);
    });
}

#[test]
fn any_answer_is_accepted_or_refused() {
    check(64, &sdp_changes(), async |changes| {
        let mut peer = peer(SignalTarget::Publisher);
        let (mid, _) = peer.offer_track("echo", "echo-1", 1);
        let answer = sdp(ANSWER, &changes).replace("MID", &mid);
        peer.accept_answer(1, &answer).await.ok();
        peer.payload_type(mid);
        age(&mut peer);
        assert_bounded(&peer);
    });
}

#[test]
fn any_text_as_a_description_is_refused_without_a_panic() {
    check(64, &"\\PC{0,200}", async |text| {
        let mut subscriber = peer(SignalTarget::Subscriber);
        subscriber.accept_offer(&text).await.ok();
        tracks(&text);
        age(&mut subscriber);
    });
}

/// Exchanges datagrams until both are connected.
async fn connect(one: &mut PeerConnection, other: &mut PeerConnection) {
    let mut buffer = [0; 2_048];
    loop {
        let now = Instant::now();
        for peer in [&mut *one, &mut *other] {
            while peer.poll(now).unwrap().is_some() {}
        }
        if one.connected() && other.connected() {
            return;
        }
        let deadline = one.next_deadline().min(other.next_deadline());
        let receiving = poll_fn(|cx| {
            if let Poll::Ready(incoming) = one.poll_recv(cx, &mut buffer) {
                return Poll::Ready((true, incoming));
            }
            other
                .poll_recv(cx, &mut buffer)
                .map(|incoming| (false, incoming))
        });
        if let Ok((first, incoming)) = tokio::time::timeout_at(deadline, receiving).await {
            let peer = if first { &mut *one } else { &mut *other };
            peer.on_incoming(Instant::now(), &incoming, &buffer)
                .unwrap();
        }
    }
}

/// What the server or any other sender may send to an open transport.
#[derive(Debug, Clone)]
enum HostileInput {
    /// A datagram without encryption.
    Raw(Vec<u8>),
    /// An encrypted packet with any sequence number, timestamp and payload.
    Rtp(u16, u32, Vec<u8>),
}

fn hostile_inputs() -> impl Strategy<Value = Vec<HostileInput>> {
    // The first byte distinguishes STUN, DTLS and SRTP (RFC 7983).
    let first = prop_oneof![0..4_u8, 20..64_u8, 128..192_u8, any::<u8>()];
    let raw = (first, bytes(200)).prop_map(|(first, mut rest)| {
        rest.insert(0, first);
        HostileInput::Raw(rest)
    });
    let rtp = (any::<u16>(), any::<u32>(), bytes(200));
    let rtp = rtp
        .prop_map(|(sequence, timestamp, payload)| HostileInput::Rtp(sequence, timestamp, payload));
    vec(prop_oneof![raw, rtp], 0..20)
}

#[test]
fn connected_transport_reads_or_drops_any_datagram() {
    check(12, &hostile_inputs(), async |sent| {
        let mut publisher = peer(SignalTarget::Publisher);
        let mut subscriber = peer(SignalTarget::Subscriber);
        let (mid, offer) = publisher.offer_track("echo", "echo-1", 1);
        let (answer, _) = subscriber.accept_offer(&offer).await.unwrap();
        publisher.accept_answer(1, &answer).await.unwrap();
        connect(&mut publisher, &mut subscriber).await;
        let (from, to) = (publisher.sockets[0].local(), subscriber.sockets[0].local());
        let payload_type = publisher.payload_type(mid).unwrap();
        for one in sent {
            let now = Instant::now();
            match one {
                HostileInput::Raw(bytes) => {
                    let datagram = Incoming::Datagram {
                        at: now,
                        proto: Protocol::Udp,
                        from,
                        to,
                        length: bytes.len(),
                    };
                    // An error is allowed, too: a forged alert ends a DTLS connection.
                    subscriber.on_incoming(now, &datagram, &bytes).ok();
                }
                HostileInput::Rtp(sequence, timestamp, payload) => {
                    let packet = OutgoingPacket {
                        payload_type,
                        sequence: sequence.into(),
                        timestamp,
                        at: now,
                        marker: true,
                        silent: false,
                        payload: payload.into(),
                    };
                    publisher.write(mid, packet);
                    publisher.poll(now).unwrap();
                    let mut buffer = [0; 2_048];
                    if let Some(incoming) = subscriber.try_recv(&mut buffer) {
                        subscriber.on_incoming(now, &incoming, &buffer).ok();
                    }
                }
            }
            while let Ok(Some(_)) = subscriber.poll(now) {}
        }
        age(&mut subscriber);
        assert_bounded(&subscriber);
    });
}
