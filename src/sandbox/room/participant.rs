//! A participant that is a client: its peer connections, the tracks that it publishes and those that it receives.

use livekit_protocol as proto;
use proto::signal_response::Message as Down;
use str0m::media::Mid;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::sandbox::command::Newcomer;
use crate::sandbox::demux::Side;
use crate::sandbox::ids::{guid, unix_millis};
use crate::sandbox::peer::{ClientPeer, NewTrack, Offer, first_mid};

/// Tracks per participant; further ones are ignored.
const MAX_TRACKS: usize = 16;

pub(super) struct Client {
    pub(super) number: u64,
    pub(super) info: proto::ParticipantInfo,
    pub(super) auto_subscribe: bool,
    pub(super) out: mpsc::Sender<Down>,
    pub(super) publisher: ClientPeer,
    pub(super) subscriber: ClientPeer,
    pub(super) tracks: Vec<PublishedTrack>,
    pub(super) subscriptions: Vec<Subscription>,
    pub(super) signal_lost: Option<Instant>,
}

/// A track that a participant publishes.
pub(super) struct PublishedTrack {
    pub(super) cid: String,
    pub(super) info: proto::TrackInfo,
    pub(super) mid: Option<Mid>,
    /// Its first packet has arrived: the other participants see the track.
    pub(super) live: bool,
    pub(super) subscription_notified: bool,
}

/// A track that a participant receives.
pub(super) struct Subscription {
    pub(super) track_sid: String,
    pub(super) mid: Mid,
    /// The client has answered the offer that holds it.
    pub(super) live: bool,
    /// The source's sequence number and time at the first packet sent here.
    pub(super) base: Option<(u64, u32)>,
}

impl Client {
    pub(super) fn peer(&mut self, side: Side) -> &mut ClientPeer {
        match side {
            Side::Publisher => &mut self.publisher,
            Side::Subscriber => &mut self.subscriber,
        }
    }

    /// Sends a message; a client whose queue is full is treated as gone.
    pub(super) fn send(&mut self, message: Down) {
        if self.out.try_send(message).is_err() && self.signal_lost.is_none() {
            self.signal_lost = Some(Instant::now());
        }
    }

    pub(super) fn trickle(&mut self, side: Side, mid: &str) {
        let target = match side {
            Side::Publisher => proto::SignalTarget::Publisher,
            Side::Subscriber => proto::SignalTarget::Subscriber,
        };
        let candidate_init = self.peer(side).candidate_init(mid);
        self.send(Down::Trickle(proto::TrickleRequest {
            candidate_init,
            target: target.into(),
            r#final: true,
        }));
    }

    pub(super) fn add_track(&mut self, request: proto::AddTrackRequest) {
        if self.tracks.len() >= MAX_TRACKS || self.tracks.iter().any(|t| t.cid == request.cid) {
            return;
        }
        let info = proto::TrackInfo {
            sid: guid("TR_AM"),
            r#type: request.r#type,
            name: request.name,
            muted: request.muted,
            source: request.source,
            codecs: vec![proto::SimulcastCodecInfo {
                cid: request.cid.clone(),
                ..proto::SimulcastCodecInfo::default()
            }],
            stream: "camera".to_owned(),
            ..proto::TrackInfo::default()
        };
        self.tracks.push(PublishedTrack {
            cid: request.cid.clone(),
            info: info.clone(),
            mid: None,
            live: false,
            subscription_notified: false,
        });
        self.send(Down::TrackPublished(proto::TrackPublishedResponse {
            cid: request.cid,
            track: Some(info),
        }));
    }

    /// Subscribes this client to exactly `tracks` (ids of owner and track), excluding its own.
    pub(super) fn negotiate(&mut self, tracks: &[(String, String)], now: Instant) {
        let wanted: Vec<&(String, String)> = tracks
            .iter()
            .filter(|(owner, _)| self.auto_subscribe && *owner != self.info.sid)
            .collect();
        let new: Vec<&(String, String)> = wanted
            .iter()
            .filter(|(_, track)| !self.subscriptions.iter().any(|s| s.track_sid == *track))
            .copied()
            .collect();
        let stopped: Vec<Mid> = self
            .subscriptions
            .iter()
            .filter(|s| !wanted.iter().any(|(_, track)| *track == s.track_sid))
            .map(|s| s.mid)
            .collect();
        let lines: Vec<NewTrack> = new
            .iter()
            .map(|(owner, track)| NewTrack {
                stream_id: format!("{owner}|{track}"),
                track_id: track.clone(),
            })
            .collect();
        let Some(offer) = self.subscriber.offer(&lines, &stopped, now) else {
            return;
        };
        self.subscriptions.retain(|s| !stopped.contains(&s.mid));
        for ((owner, track), mid) in new.iter().zip(&offer.mids) {
            self.subscriptions.push(Subscription {
                track_sid: track.clone(),
                mid: *mid,
                live: false,
                base: None,
            });
            self.send(Down::SubscriptionPermissionUpdate(
                proto::SubscriptionPermissionUpdate {
                    participant_sid: owner.clone(),
                    track_sid: track.clone(),
                    allowed: true,
                },
            ));
        }
        self.send_offer(offer);
    }

    pub(super) fn send_offer(&mut self, offer: Offer) {
        let mid_to_track_id = self
            .subscriptions
            .iter()
            .map(|s| (s.mid.to_string(), s.track_sid.clone()))
            .collect();
        let mid = first_mid(&offer.sdp).to_owned();
        self.send(Down::Offer(proto::SessionDescription {
            r#type: "offer".to_owned(),
            sdp: offer.sdp,
            id: offer.id,
            mid_to_track_id,
        }));
        if offer.id == 1 {
            self.trickle(Side::Subscriber, &mid);
        }
    }
}

pub(super) fn is_microphone(track: &proto::TrackInfo) -> bool {
    track.source() == proto::TrackSource::Microphone
}

pub(super) fn newcomer_info(newcomer: &Newcomer) -> proto::ParticipantInfo {
    let joined = unix_millis();
    proto::ParticipantInfo {
        sid: guid("PA_"),
        identity: newcomer.identity.clone(),
        name: newcomer.name.clone(),
        metadata: newcomer.metadata.clone(),
        attributes: newcomer.attributes.clone(),
        joined_at: joined / 1000,
        joined_at_ms: joined,
        permission: Some(newcomer.permission.clone()),
        kind: newcomer.kind.into(),
        client_protocol: newcomer.client_protocol,
        ..proto::ParticipantInfo::default()
    }
}
