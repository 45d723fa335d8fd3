//! Turns what a participant observes in its room into events. Both engines use it, so the same input gives the same events.
//! It knows the server's messages and the agent's data packets; of media, it knows only the detected speech.

use std::time::Duration;

use livekit_protocol as proto;
use prost::Message as _;
use proto::signal_response::Message as Response;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::agent_session::{self, AgentMessage};
use super::roster::Roster;
use super::voice_selector::VoiceSelector;
use crate::livekit::audio::caller::{AgentActivity, CallerPlayer, Frame};
use crate::livekit::audio::speech::{Detector, SpeechEvent};
use crate::livekit::event::{
    EndReason, MediaPermission, NOT_PERMITTED, RoomEvent, RoomEventKind, Speaker,
    TranscriptSegment, UplinkReport,
};
use crate::livekit::join::JoinRequest;
use crate::livekit::wire::request::sanitize;
use crate::livekit::wire::signal::{ServerClock, leave_reason};

/// How long leaving may take. `Leave` frees the participant's place at once; the server also detects a closed socket.
pub(crate) const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Media addresses that are reported; a server offers a few.
const MAX_MEDIA_ADDRESSES: usize = 128;

/// The state of an `AgentSession` that waits for the caller (`AgentState` in livekit-agents' `voice/events.py`).
const LISTENING: &str = "listening";

/// Sends events to the reader of the participant.
pub(crate) struct EventSender {
    sender: mpsc::Sender<RoomEvent>,
}

impl EventSender {
    pub(crate) fn new(events: mpsc::Sender<RoomEvent>) -> Self {
        Self { sender: events }
    }

    pub(crate) fn send(&self, at: Instant, kind: RoomEventKind) -> Result<(), EndReason> {
        self.forward(RoomEvent { at, kind })
    }

    /// Sends an event that no verdict needs. The event is dropped if the queue is half full, so that a participant that
    /// floods the room cannot displace the events that a verdict needs.
    pub(crate) fn send_if_room(&self, at: Instant, kind: RoomEventKind) -> Result<(), EndReason> {
        if self.sender.capacity() > self.sender.max_capacity() / 2 {
            self.send(at, kind)
        } else {
            Ok(())
        }
    }

    /// Sends an event with its own timestamp. It never waits, because waiting would delay the media.
    ///
    /// # Errors
    /// The queue is full, or the reader is gone.
    pub(crate) fn forward(&self, event: RoomEvent) -> Result<(), EndReason> {
        self.sender.try_send(event).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                EndReason::Internal("the participant's events are not being read".to_owned())
            }
            mpsc::error::TrySendError::Closed(_) => EndReason::Left,
        })
    }
}

pub(crate) struct Observer {
    pub(crate) events: EventSender,
    pub(crate) roster: Roster,
    /// The media addresses that were already reported.
    addresses: Vec<String>,
    track_cid: String,
    /// The server's id of the caller's track, once it has acknowledged the track.
    track_sid: Option<String>,
    streams: agent_session::StreamReader,
    first_audio_sent: bool,
    /// Since when the agent's session reports that it listens.
    listening_since: Option<Instant>,
    /// Since when the agent's audio track is received.
    subscribed_since: Option<Instant>,
    /// The latest report that was passed on.
    uplink: UplinkReport,
}

impl Observer {
    /// `track_cid` is the client's id of the caller's track.
    pub(crate) fn new(request: &JoinRequest, events: EventSender, track_cid: String) -> Self {
        Self {
            events,
            roster: Roster::new(
                request.participant.identity.clone(),
                request.agent_name.clone(),
            ),
            addresses: Vec::new(),
            track_cid,
            track_sid: None,
            streams: agent_session::StreamReader::new(request.transcript),
            first_audio_sent: false,
            listening_since: None,
            subscribed_since: None,
            uplink: UplinkReport::default(),
        }
    }

    /// Handles the join response, excluding its other participants, which go to [`Self::on_participants`].
    ///
    /// # Errors
    /// The canary is in the room, but may not publish.
    pub(crate) fn on_join(
        &mut self,
        at: Instant,
        response: &proto::JoinResponse,
    ) -> Result<(), EndReason> {
        let room = response.room.clone().unwrap_or_default();
        let server = response.server_info.clone().unwrap_or_default();
        self.events.send(
            at,
            RoomEventKind::SignalConnected {
                room_sid: room.sid,
                server_version: sanitize(&server.version),
                region: sanitize(&server.region),
                node: sanitize(&server.node_id),
            },
        )?;
        let own = response.participant.clone().unwrap_or_default();
        if own.permission.is_some_and(|it| !it.can_publish) {
            let why = "the token does not allow this participant to publish".to_owned();
            return Err(EndReason::PublishFailed(why));
        }
        if !own.identity.is_empty() {
            self.roster.set_own_identity(own.identity);
        }
        Ok(())
    }

    /// Handles participants from the join response or from an update. `clock` is the server's, if it is known yet.
    ///
    /// # Errors
    /// A permission of the canary was revoked.
    pub(crate) fn on_participants(
        &mut self,
        at: Instant,
        participants: Vec<proto::ParticipantInfo>,
        in_join_response: bool,
        clock: Option<ServerClock>,
    ) -> Result<(), EndReason> {
        let own = |info: &&proto::ParticipantInfo| self.roster.is_own(&info.identity);
        if let Some(right) = participants.iter().find(own).and_then(revoked) {
            return Err(EndReason::Revoked(right));
        }
        let events = self.roster.update(at, participants, in_join_response);
        self.forward_participants(at, events, clock)
    }

    /// Treats this participant, an agent without a name attribute, as the target's agent.
    pub(crate) fn adopt(
        &mut self,
        at: Instant,
        identity: &str,
        clock: Option<ServerClock>,
    ) -> Result<(), EndReason> {
        let events = self.roster.adopt(at, identity);
        self.forward_participants(at, events, clock)
    }

    fn forward_participants(
        &mut self,
        at: Instant,
        events: Vec<RoomEvent>,
        clock: Option<ServerClock>,
    ) -> Result<(), EndReason> {
        for mut event in events {
            if let (RoomEventKind::AgentJoined { agent, .. }, Some(clock)) =
                (&mut event.kind, clock)
            {
                // The clocks are only known to within half a round trip, but an agent cannot be seen before it joined.
                let joined = clock.to_local(agent.joined_at_ms);
                agent.joined = joined.map(|joined| joined.min(event.at));
            }
            self.follow_agent(&event);
            self.events.forward(event)?;
        }
        for kind in self.roster.changes() {
            match kind {
                RoomEventKind::AgentEncrypted(_) | RoomEventKind::NamelessAgent { .. } => {
                    self.events.send(at, kind)?;
                }
                _ => self.events.send_if_room(at, kind)?,
            }
        }
        Ok(())
    }

    fn follow_agent(&mut self, event: &RoomEvent) {
        match &event.kind {
            RoomEventKind::AgentState(state) => {
                self.listening_since = (state == LISTENING).then_some(event.at);
            }
            RoomEventKind::AgentLeft { .. } => {
                self.listening_since = None;
                self.subscribed_since = None;
            }
            _ => {}
        }
    }

    /// Reports the addresses at which the server receives media, each once.
    pub(crate) fn on_addresses(
        &mut self,
        at: Instant,
        addresses: impl IntoIterator<Item = String>,
    ) -> Result<(), EndReason> {
        for address in addresses {
            if self.addresses.len() < MAX_MEDIA_ADDRESSES && !self.addresses.contains(&address) {
                self.events
                    .send_if_room(at, RoomEventKind::MediaAddress(address.clone()))?;
                self.addresses.push(address);
            }
        }
        Ok(())
    }

    /// Handles any other message from the server. The engine itself handles messages about media.
    pub(crate) fn on_message(&mut self, at: Instant, message: Response) -> Result<(), EndReason> {
        match message {
            Response::TrackPublished(published) if published.cid == self.track_cid => {
                let first = self.track_sid.is_none();
                self.track_sid = Some(published.track.unwrap_or_default().sid);
                if first {
                    self.events.send(at, RoomEventKind::CallerPublished)?;
                }
                Ok(())
            }
            Response::TrackUnpublished(gone)
                if Some(&gone.track_sid) == self.track_sid.as_ref() =>
            {
                // livekit-server unpublishes a client's track only if the permission to publish was revoked.
                Err(EndReason::Revoked(MediaPermission::Publish))
            }
            Response::SubscriptionResponse(failed) => {
                let error = failed.err().as_str_name();
                let track_sid = sanitize(&failed.track_sid);
                self.events
                    .send_if_room(at, RoomEventKind::SubscriptionFailed { track_sid, error })
            }
            Response::SubscriptionPermissionUpdate(update) if !update.allowed => {
                let failed = RoomEventKind::SubscriptionFailed {
                    track_sid: sanitize(&update.track_sid),
                    error: NOT_PERMITTED,
                };
                self.events.send_if_room(at, failed)
            }
            Response::RequestResponse(response) => refused(&response),
            Response::Leave(leave) => Err(EndReason::Removed {
                reason: leave_reason(&leave),
            }),
            _ => Ok(()),
        }
    }

    /// Reports the agent's track as soon as the agent is known; returns the audio that was buffered until then.
    pub(crate) fn report_voice<K, S>(
        &mut self,
        selector: &mut VoiceSelector<K, S>,
    ) -> Result<impl IntoIterator<Item = S> + use<K, S>, EndReason> {
        let Some(found) = selector.announce(&self.roster) else {
            return Ok(None.into_iter().flatten());
        };
        if let Some(source) = self.roster.unusual_source(&found.track_sid) {
            self.events
                .send(found.since, RoomEventKind::AgentVoiceSource(source))?;
        }
        self.subscribed_since = Some(found.since);
        self.events
            .send(found.since, RoomEventKind::AgentTrackSubscribed)?;
        Ok(Some(found.early).into_iter().flatten())
    }

    pub(crate) fn first_audio(&mut self, at: Instant) -> Result<(), EndReason> {
        if std::mem::replace(&mut self.first_audio_sent, true) {
            return Ok(());
        }
        self.events.send(at, RoomEventKind::AgentFirstAudio)
    }

    /// Reports what LiveKit received of the caller's track, if that changed.
    pub(crate) fn on_uplink(&mut self, at: Instant, report: UplinkReport) -> Result<(), EndReason> {
        if report == self.uplink {
            return Ok(());
        }
        self.uplink = report;
        self.events.send(at, RoomEventKind::UplinkReported(report))
    }

    /// What the agent does now, as its voice and its session show it.
    pub(crate) fn activity(&self, speech: &Detector) -> AgentActivity {
        let state = self.roster.agent_state();
        AgentActivity {
            may_speak: speech.speech_pending(),
            is_busy: state.is_some_and(|state| state != LISTENING),
            listening_since: self.listening_since,
            subscribed_since: self.subscribed_since,
            last_speech: speech.last_speech(),
        }
    }

    pub(crate) fn on_speech<F: Frame>(
        &self,
        caller: &mut CallerPlayer<F>,
        speech: &Detector,
        event: SpeechEvent,
    ) -> Result<(), EndReason> {
        let at = match event {
            SpeechEvent::Started(at) => {
                caller.on_speech_started(at);
                self.events.send(at, RoomEventKind::SpeechStarted)?;
                at
            }
            SpeechEvent::Ended(at) => {
                caller.on_speech_ended(at);
                self.events.send(at, RoomEventKind::SpeechEnded)?;
                at
            }
        };
        match speech.level() {
            Some(level) => self
                .events
                .send_if_room(at, RoomEventKind::SpeechLevel(level)),
            None => Ok(()),
        }
    }

    /// Handles data from a reliable data channel. Data that is not a `DataPacket` is dropped.
    pub(crate) fn on_data(&mut self, at: Instant, data: &[u8]) -> Result<(), EndReason> {
        match proto::DataPacket::decode(data) {
            Ok(packet) => self.on_packet(at, packet),
            Err(_) => Ok(()),
        }
    }

    pub(crate) fn on_packet(
        &mut self,
        at: Instant,
        packet: proto::DataPacket,
    ) -> Result<(), EndReason> {
        for message in self.streams.on_packet(at, packet) {
            let kind = match message {
                AgentMessage::Session { identity, event } => {
                    RoomEventKind::Session { identity, event }
                }
                AgentMessage::Transcript(segment) => self.transcribed(segment),
            };
            self.events.send_if_room(at, kind)?;
        }
        Ok(())
    }

    fn transcribed(&self, segment: TranscriptSegment) -> RoomEventKind {
        let of_us = segment.track.is_some() && segment.track == self.track_sid;
        let speaker = if of_us || self.roster.is_own(&segment.identity) {
            Speaker::Caller
        } else {
            Speaker::Agent
        };
        RoomEventKind::Transcribed { speaker, segment }
    }

    /// Reports the transcripts that were incomplete when the call ended.
    pub(crate) fn report_unfinished(&mut self) -> Result<(), EndReason> {
        for segment in self.streams.unfinished() {
            let kind = self.transcribed(segment);
            self.events.send_if_room(Instant::now(), kind)?;
        }
        Ok(())
    }
}

fn refused(response: &proto::RequestResponse) -> Result<(), EndReason> {
    use proto::request_response::{Reason, Request as About};
    let fine = matches!(response.reason(), Reason::Ok | Reason::Queued);
    if fine || !matches!(response.request, Some(About::AddTrack(_))) {
        return Ok(());
    }
    let reason = response.reason().as_str_name();
    Err(EndReason::PublishFailed(format!(
        "{reason}: {}",
        response.message
    )))
}

/// A permission that a probe needs and that this update says the canary does not have. Without the permission to
/// subscribe, no audio would arrive and the agent would seem silent.
fn revoked(own: &proto::ParticipantInfo) -> Option<MediaPermission> {
    let permission = own.permission.as_ref()?;
    match (permission.can_subscribe, permission.can_publish) {
        (false, _) => Some(MediaPermission::Subscribe),
        (true, false) => Some(MediaPermission::Publish),
        (true, true) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::livekit::event::{CallerTurn, SessionEvent};
    use crate::livekit::test_server::TestServer;

    #[test]
    fn full_queue_ends_the_participant_and_the_reserved_last_event_still_fits() {
        let (events, mut reader) = mpsc::channel(3);
        let last = events.clone().try_reserve_owned().unwrap();
        let sender = EventSender::new(events);
        let now = Instant::now();
        assert!(
            sender
                .send(now, RoomEventKind::CallerStarted(CallerTurn::default()))
                .is_ok()
        );
        assert!(
            sender
                .send(now, RoomEventKind::CallerEnded { sent: 0 })
                .is_ok()
        );
        let full = sender.send(now, RoomEventKind::MediaConnected { path: None });
        assert!(matches!(full, Err(EndReason::Internal(_))));
        last.send(RoomEvent {
            at: now,
            kind: RoomEventKind::SpeechEnded,
        });
        let order: Vec<_> = std::iter::from_fn(|| reader.try_recv().ok()).collect();
        assert_eq!(order.len(), 3);
        assert!(matches!(order[2].kind, RoomEventKind::SpeechEnded));
    }

    #[test]
    fn events_that_no_verdict_needs_leave_half_of_the_queue_free() {
        let (events, mut reader) = mpsc::channel(10);
        let sender = EventSender::new(events);
        let error = || RoomEventKind::Session {
            identity: String::new(),
            event: SessionEvent::Error(String::new()),
        };
        for _ in 0..100 {
            assert!(sender.send_if_room(Instant::now(), error()).is_ok());
        }
        assert!(
            sender
                .send(
                    Instant::now(),
                    RoomEventKind::CallerStarted(CallerTurn::default())
                )
                .is_ok()
        );
        let sent = std::iter::from_fn(|| reader.try_recv().ok());
        assert_eq!(sent.count(), 6);
    }

    #[tokio::test]
    async fn track_that_the_canary_may_not_subscribe_to_is_reported() {
        let (sender, mut events) = mpsc::channel(10);
        let request = crate::livekit::join::request(TestServer::silent().await.endpoint());
        let mut observer = Observer::new(&request, EventSender::new(sender), "echo-1".to_owned());
        // livekit-server also sends one when a subscription begins.
        for allowed in [true, false] {
            let update = proto::SubscriptionPermissionUpdate {
                participant_sid: "PA_agent".to_owned(),
                track_sid: "TR_voice".to_owned(),
                allowed,
            };
            let message = Response::SubscriptionPermissionUpdate(update);
            assert!(observer.on_message(Instant::now(), message).is_ok());
        }
        let kind = events.try_recv().unwrap().kind;
        let expected = matches!(
            &kind,
            RoomEventKind::SubscriptionFailed { track_sid, error }
                if track_sid == "TR_voice" && *error == NOT_PERMITTED
        );
        assert!(expected, "{kind:?}");
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn only_a_revoked_permission_that_a_probe_needs_is_reported() {
        let own = |can_subscribe, can_publish| proto::ParticipantInfo {
            permission: Some(proto::ParticipantPermission {
                can_subscribe,
                can_publish,
                ..proto::ParticipantPermission::default()
            }),
            ..proto::ParticipantInfo::default()
        };
        assert_eq!(revoked(&own(true, true)), None);
        assert_eq!(revoked(&own(true, false)), Some(MediaPermission::Publish));
        assert_eq!(revoked(&own(false, true)), Some(MediaPermission::Subscribe));
        // An update without permissions revokes none.
        assert_eq!(revoked(&proto::ParticipantInfo::default()), None);
    }

    #[test]
    fn only_a_refused_track_is_a_failure() {
        use proto::request_response::{Reason, Request as About};
        let response = |reason: Reason, request| proto::RequestResponse {
            reason: reason.into(),
            request,
            ..proto::RequestResponse::default()
        };
        let track = || Some(About::AddTrack(proto::AddTrackRequest::default()));
        assert!(refused(&response(Reason::NotAllowed, track())).is_err());
        assert!(refused(&response(Reason::Queued, track())).is_ok());
        assert!(refused(&response(Reason::NotAllowed, None)).is_ok());
    }
}
