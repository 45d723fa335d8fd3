//! One peer connection of a participant: SDP both ways, ICE candidates, audio and data channels, on str0m.
//!
//! Every change of the connection is followed by a full drain of its output, as str0m requires. Its events wait in a
//! queue for the room.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use str0m::change::{SdpAnswer, SdpOffer, SdpPendingOffer};
use str0m::channel::{ChannelConfig, ChannelId, Reliability};
use str0m::media::{Direction, MediaKind, Mid};
use str0m::net::{Protocol, Receive};
use str0m::rtp::{Extension, ExtensionMap, RtpWrite};
use str0m::{Candidate, Event, IceConnectionState, Input, Output, Rtc, RtcError};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::demux::{Demux, PeerId, PeerRegistration, RoutedDatagram, Side};

/// How often the server reports what it received of a track, as livekit-server does.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Candidates kept until the client's description arrives.
const MAX_EARLY_CANDIDATES: usize = 32;
/// Interval between connectivity checks. The first one often arrives before the client knows this side's credentials.
const STUN_RTO: Duration = Duration::from_millis(50);

/// What all peer connections share.
pub(crate) struct Net {
    /// Doesn't block.
    pub socket: UdpSocket,
    pub address: SocketAddr,
    pub demux: Arc<Demux>,
}

pub(crate) struct ClientPeer {
    rtc: Rtc,
    net: Arc<Net>,
    _registration: PeerRegistration,
    ufrag: String,
    /// When str0m expects its next timeout input.
    pub deadline: Instant,
    pub events: VecDeque<ClientPeerEvent>,
    remote_known: bool,
    early: Vec<Candidate>,
    pending: Option<(u32, SdpPendingOffer)>,
    offers: u32,
    reliable: Option<ChannelId>,
    lossy: Option<ChannelId>,
}

pub(crate) enum ClientPeerEvent {
    Connected,
    Disconnected,
    Audio(AudioPacket),
    Data { packet: Vec<u8>, reliable: bool },
}

/// One packet of a client's audio.
pub(crate) struct AudioPacket {
    pub mid: Mid,
    pub seq: u64,
    pub time: u32,
    pub marker: bool,
    pub payload: Arc<[u8]>,
}

/// A new offer to the client.
pub(crate) struct Offer {
    pub id: u32,
    pub sdp: String,
    /// The m-lines of the tracks that were added, in their order.
    pub mids: Vec<Mid>,
}

/// A track that a client is to receive.
pub(crate) struct NewTrack {
    pub stream_id: String,
    pub track_id: String,
}

impl ClientPeer {
    pub(crate) fn new(
        id: PeerId,
        net: &Arc<Net>,
        room: mpsc::Sender<RoutedDatagram>,
        now: Instant,
    ) -> Self {
        let mut extensions = ExtensionMap::empty();
        if id.side == Side::Publisher {
            // The extensions with which livekit-server answers an audio offer. It forwards neither to subscribers.
            extensions.set(1, Extension::AudioLevel);
            extensions.set(4, Extension::RtpMid);
        }
        // Without RED: in RTP mode, a RED payload would be taken for Opus.
        let mut config = Rtc::builder();
        config.set_initial_stun_rto(STUN_RTO);
        let mut rtc = config
            .set_rtp_mode(true)
            .clear_codecs()
            .enable_opus(true, false)
            .set_extension_map(extensions)
            .set_rtcp_report_interval_audio(REPORT_INTERVAL)
            .build(now.into_std());
        let ufrag = rtc.direct_api().local_ice_credentials().ufrag;
        match Candidate::host(net.address, "udp") {
            Ok(candidate) => {
                rtc.add_local_candidate(candidate);
            }
            Err(error) => {
                tracing::error!(%error, "the UDP socket's address can't be an ICE candidate");
            }
        }
        let mut peer = Self {
            rtc,
            _registration: net.demux.register(&ufrag, id, room),
            net: Arc::clone(net),
            ufrag,
            deadline: now,
            events: VecDeque::new(),
            remote_known: false,
            early: Vec::new(),
            pending: None,
            offers: 0,
            reliable: None,
            lossy: None,
        };
        peer.drain();
        peer
    }

    /// The trickled form of the one local candidate, as the signal protocol carries it (a JSON text).
    ///
    /// `mid` names the description's first m-line: browsers refuse a candidate for one that they don't know.
    pub(crate) fn candidate_init(&self, mid: &str) -> String {
        let candidate = format!(
            "candidate:1 1 udp 2130706431 {} {} typ host ufrag {}",
            self.net.address.ip(),
            self.net.address.port(),
            self.ufrag
        );
        serde_json::json!({
            "candidate": candidate, "sdpMid": mid, "sdpMLineIndex": 0, "usernameFragment": null,
        })
        .to_string()
    }

    /// Answers the client's offer.
    pub(crate) fn accept_offer(&mut self, sdp: &str, now: Instant) -> Result<String, String> {
        let offer = SdpOffer::from_sdp_string(sdp).map_err(|error| error.to_string())?;
        let answer = self.rtc.sdp_api().accept_offer(offer);
        self.drain();
        let answer = answer.map_err(|error| error.to_string())?;
        self.on_remote_description(now);
        Ok(answer.to_sdp_string())
    }

    /// Offers what changed; `None` while an earlier offer is unanswered, and if nothing changed.
    pub(crate) fn offer(
        &mut self,
        tracks: &[NewTrack],
        stopped: &[Mid],
        now: Instant,
    ) -> Option<Offer> {
        if self.pending.is_some() {
            return None;
        }
        let mut changes = self.rtc.sdp_api();
        if self.offers == 0 {
            self.reliable = Some(changes.add_channel_with_config(ChannelConfig {
                label: "_reliable".to_owned(),
                ..ChannelConfig::default()
            }));
            self.lossy = Some(changes.add_channel_with_config(ChannelConfig {
                label: "_lossy".to_owned(),
                ordered: false,
                reliability: Reliability::MaxRetransmits { retransmits: 0 },
                ..ChannelConfig::default()
            }));
        }
        for mid in stopped {
            changes.set_direction(*mid, Direction::Inactive);
        }
        let mids = tracks
            .iter()
            .map(|track| {
                let (stream, track) = (track.stream_id.clone(), track.track_id.clone());
                let direction = Direction::SendOnly;
                changes.add_media(MediaKind::Audio, direction, Some(stream), Some(track), None)
            })
            .collect();
        let change = changes.apply();
        self.drain();
        let (offer, pending) = change?;
        self.offers += 1;
        self.pending = Some((self.offers, pending));
        self.tell_time(now);
        Some(Offer {
            id: self.offers,
            sdp: offer.to_sdp_string(),
            mids,
        })
    }

    /// Takes the client's answer; `Ok(false)` for one to an offer that is no longer open.
    ///
    /// Older clients answer without an id.
    pub(crate) fn accept_answer(
        &mut self,
        id: u32,
        sdp: &str,
        now: Instant,
    ) -> Result<bool, String> {
        if !matches!(&self.pending, Some((open, _)) if id == 0 || id == *open) {
            return Ok(false);
        }
        let Some((_, pending)) = self.pending.take() else {
            return Ok(false);
        };
        let answer = SdpAnswer::from_sdp_string(sdp).map_err(|error| error.to_string())?;
        let accepted = self.rtc.sdp_api().accept_answer(pending, answer);
        self.drain();
        accepted.map_err(|error| error.to_string())?;
        self.on_remote_description(now);
        Ok(true)
    }

    fn on_remote_description(&mut self, now: Instant) {
        self.remote_known = true;
        for candidate in std::mem::take(&mut self.early) {
            self.rtc.add_remote_candidate(candidate);
            self.drain();
        }
        self.tell_time(now);
    }

    /// Adds a trickled candidate; any other than a UDP host candidate is ignored.
    pub(crate) fn add_candidate(&mut self, candidate_init: &str, now: Instant) {
        #[derive(serde::Deserialize)]
        struct CandidateInit {
            candidate: String,
        }
        let Ok(init) = serde_json::from_str::<CandidateInit>(candidate_init) else {
            return;
        };
        let Ok(candidate) = Candidate::from_sdp_string(&init.candidate) else {
            return;
        };
        if candidate.addr().is_ipv4() != self.net.address.is_ipv4() {
            return;
        }
        if self.remote_known {
            self.rtc.add_remote_candidate(candidate);
            self.drain();
            self.tell_time(now);
        } else if self.early.len() < MAX_EARLY_CANDIDATES {
            self.early.push(candidate);
        }
    }

    pub(crate) fn on_datagram(&mut self, datagram: &RoutedDatagram) {
        let Ok(receive) = Receive::new(
            Protocol::Udp,
            datagram.source,
            self.net.address,
            &datagram.data,
        ) else {
            return;
        };
        let at = datagram.at.into_std();
        self.input(Input::Receive(at, receive));
    }

    pub(crate) fn tell_time(&mut self, now: Instant) {
        self.input(Input::Timeout(now.into_std()));
    }

    fn input(&mut self, input: Input) {
        if let Err(error) = self.rtc.handle_input(input) {
            self.fail(&error);
        }
        self.drain();
    }

    fn fail(&mut self, error: &RtcError) {
        tracing::debug!(%error, "a peer connection broke");
        self.rtc.disconnect();
        self.events.push_back(ClientPeerEvent::Disconnected);
    }

    /// Sends one audio packet; drops it before the m-line is negotiated.
    pub(crate) fn send_audio(&mut self, mid: Mid, audio: &AudioPacket, now: Instant) {
        let Some(pt) = self
            .rtc
            .media(mid)
            .and_then(|media| media.remote_pts().first().copied())
        else {
            return;
        };
        let mut direct = self.rtc.direct_api();
        let Some(stream) = direct.stream_tx_by_mid(mid, None) else {
            return;
        };
        let payload = Arc::clone(&audio.payload);
        let write = RtpWrite::new(pt, audio.seq.into(), audio.time, now.into_std(), payload);
        stream.write_rtp(write.marker(audio.marker));
        self.drain();
        self.tell_time(now);
    }

    /// Sends a data packet; drops it if the channel isn't open or its buffer is full.
    pub(crate) fn send_data(&mut self, packet: &[u8], reliable: bool, now: Instant) {
        let id = if reliable { self.reliable } else { self.lossy };
        let Some(mut channel) = id.and_then(|id| self.rtc.channel(id)) else {
            return;
        };
        if !matches!(channel.write(true, packet), Ok(true)) {
            tracing::debug!(bytes = packet.len(), "a data packet was dropped");
        }
        self.drain();
        self.tell_time(now);
    }

    fn drain(&mut self) {
        loop {
            match self.rtc.poll_output() {
                Ok(Output::Timeout(at)) => {
                    self.deadline = Instant::from_std(at);
                    return;
                }
                // A full socket buffer loses the packet, as a network would.
                Ok(Output::Transmit(transmit)) => {
                    if let Err(error) = self
                        .net
                        .socket
                        .send_to(&transmit.contents, transmit.destination)
                    {
                        tracing::debug!(%error, "a datagram was not sent");
                    }
                }
                Ok(Output::Event(event)) => self.on_event(event),
                Err(error) => {
                    self.fail(&error);
                    self.deadline = far_future();
                    return;
                }
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        let event = match event {
            Event::Connected => ClientPeerEvent::Connected,
            Event::IceConnectionStateChange(IceConnectionState::Disconnected) | Event::Closed => {
                ClientPeerEvent::Disconnected
            }
            Event::RtpPacket(packet) => {
                let ssrc = packet.header.ssrc;
                let Some(mid) = self.rtc.direct_api().stream_rx(&ssrc).map(|rx| rx.mid()) else {
                    return;
                };
                ClientPeerEvent::Audio(AudioPacket {
                    mid,
                    seq: *packet.seq_no,
                    time: packet.header.timestamp,
                    marker: packet.header.marker,
                    payload: packet.payload,
                })
            }
            Event::ChannelData(data) => {
                let channel = self.rtc.channel(data.id);
                let lossy = channel.is_some_and(|channel| {
                    channel
                        .config()
                        .is_some_and(|config| config.label == "_lossy")
                });
                ClientPeerEvent::Data {
                    packet: data.data,
                    reliable: !lossy,
                }
            }
            _ => return,
        };
        self.events.push_back(event);
    }
}

fn far_future() -> Instant {
    Instant::now() + Duration::from_hours(24)
}

/// The mid of a description's first m-line.
pub(crate) fn first_mid(sdp: &str) -> &str {
    sdp.lines()
        .find_map(|line| line.strip_prefix("a=mid:"))
        .map_or("0", str::trim)
}

/// The track id (second part of `a=msid`) of each m-line that has one: how `AddTrack.cid` finds its media.
pub(crate) fn track_ids(sdp: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let (mut mid, mut track) = (None, None);
    for line in sdp.lines().chain(["m="]) {
        if line.starts_with("m=") {
            if let (Some(mid), Some(track)) = (mid.take(), track.take()) {
                found.push((mid, track));
            }
            (mid, track) = (None, None);
        } else if let Some(value) = line.strip_prefix("a=mid:") {
            mid = Some(value.trim().to_owned());
        } else if let Some(value) = line.strip_prefix("a=msid:") {
            track = value.split_whitespace().nth(1).map(str::to_owned);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn track_ids_are_read_per_media_line() {
        let sdp = "v=0\r\na=msid-semantic: WMS\r\nm=audio 9 X 111\r\na=mid:7\r\na=recvonly\r\n\
                   m=audio 9 X 111\r\na=mid:14\r\na=msid:- cid-1\r\nm=application 9 Y z\r\na=mid:15\r\n";
        assert_eq!(track_ids(sdp), [("14".to_owned(), "cid-1".to_owned())]);
    }
}
