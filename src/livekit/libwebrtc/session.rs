//! One participant on the SDK: a loop that passes the server's messages, the SDK's events and the agent's audio to the
//! same state machines as in the native engine, and plays what their caller says through the SDK.

use std::borrow::Cow;
use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, OptionFuture};
use futures_util::stream::{BoxStream, SelectAll};
use futures_util::{FutureExt, StreamExt};
use livekit::options::TrackPublishOptions;
use livekit::prelude::{
    LocalAudioTrack, LocalTrack, LocalTrackPublication, ParticipantIdentity, RemoteAudioTrack,
    RemoteTrack, Room, RoomOptions, RoomResult, TrackSource, TranscriptionSegment,
};
use livekit::webrtc::audio_frame::AudioFrame;
use livekit::webrtc::audio_source::native::NativeAudioSource;
use livekit::webrtc::audio_source::{AudioSourceOptions, RtcAudioSource};
use livekit::webrtc::audio_stream::native::{NativeAudioStream, NativeAudioStreamOptions};
use livekit::webrtc::peer_connection_factory::IceTransportsType;
use livekit::webrtc::stats::dictionaries::IceCandidateStats;
use livekit::webrtc::stats::{
    DtlsTransportState, IceCandidateType, IceServerTransportProtocol, RtcStats,
};
use livekit::{
    ByteStreamInfo, RoomDataStreamOptions, RoomEvent as SdkEvent, StreamReader, TextStreamInfo,
};
use livekit_protocol as proto;
use proto::DataPacket;
use proto::data_packet::Value;
use secrecy::ExposeSecret;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::pcm::{self, FrameClock};
use super::stats::{InboundStats, InboundTotals, OutboundStats, UplinkTotals};
use super::streams::{self, OpenedStream};
use super::transport::{SdkConnector, WireEvent};
use super::watch::SignalWatch;
use crate::config::Ice;
use crate::livekit::audio::caller::{AgentFrame, CallerOutput, CallerPlayer, Frame as _};
use crate::livekit::audio::recording::{self, CallSound};
use crate::livekit::audio::rtp;
use crate::livekit::audio::speech::{Detector, PcmChunk, SpeechEvent};
use crate::livekit::event::{EndReason, MediaPath, RoomEvent, RoomEventKind, Speaker};
use crate::livekit::join::{Adoption, JoinRequest};
use crate::livekit::room::observer::{EventSender, LEAVE_TIMEOUT, Observer};
use crate::livekit::room::voice_selector::VoiceSelector;
use crate::livekit::wire::signal::SignalError;

/// Maximum number of received frames that wait to be read: 1 s.
const MAX_QUEUED_FRAMES: usize = 100;

/// Length of the SDK's queue of frames to send, in milliseconds.
const SDK_QUEUE_MS: u32 = 100;

/// Maximum number of frames that are buffered before the agent is known, 5 s of 10 ms. The server may report a
/// participant three seconds after it joined.
const MAX_EARLY_FRAMES: usize = 500;

/// How often the SDK's statistics are queried. They alone show that the transports are connected and that the agent's
/// first packet arrived: the SDK has no events for these.
const STATS_INTERVAL: Duration = Duration::from_millis(50);

/// Once the agent's audio arrives, its statistics are queried only every this many intervals.
const FLOWING_STATS_EVERY: u32 = 20;

/// The statistics of the caller's track are queried every this many intervals.
const UPLINK_STATS_EVERY: u32 = 10;

/// How long the last query of the statistics may take before the participant leaves.
const LAST_STATS_TIMEOUT: Duration = Duration::from_millis(500);

/// Maximum number of data streams that are read at a time.
const MAX_STREAMS: usize = 8;

/// Maximum size of one data stream; the messages of an agent session and its transcripts are short.
const MAX_STREAM_BYTES: usize = 64 * 1024;

type SdkEvents = mpsc::UnboundedReceiver<SdkEvent>;

/// Runs a participant: joins, detects speech and speaks as the caller until it leaves or fails. The caller sends the last event.
pub(crate) async fn run(
    request: JoinRequest,
    events: mpsc::Sender<RoomEvent>,
    leave: CancellationToken,
    mut adoption: Adoption,
    audio: &mut InboundTotals,
    sound: &mut CallSound,
) -> EndReason {
    let token = match request.token() {
        Ok(token) => token,
        Err(why) => return why,
    };
    let hang_up = CancellationToken::new();
    // However this actor ends, even by a panic, the guard closes the socket, which ends the tasks of the SDK.
    let _close_socket = hang_up.clone().drop_guard();
    let (connector, wire_events) = SdkConnector::new(
        request.endpoint.clone(),
        token.clone(),
        request.signal_timeout,
        hang_up.clone(),
    );
    let mut session = SdkSession::new(
        &request,
        EventSender::new(events),
        wire_events,
        audio,
        sound,
    );
    let connecting = Room::connect(
        request.endpoint.url.as_str(),
        token.expose_secret(),
        options(&request),
    );
    let joined = session.join(connector.carry(connecting), &leave, request.signal_timeout);
    let (room, events) = match joined.await {
        Ok(joined) => joined,
        Err(why) => return why,
    };
    let mut joined_room = LeaveOnDrop(Some(Arc::new(room)));
    let served = match &joined_room.0 {
        Some(room) => session.serve(room, events, &leave, &mut adoption).await,
        None => Ok(EndReason::Left),
    };
    let reported = session.watch.observer.report_unfinished();
    let why = served
        .and_then(|why| reported.map(|()| why))
        .unwrap_or_else(|why| why);
    session.count_once_more().await;
    // A connection that failed or that the server closed carries no `Leave`.
    if matches!(why, EndReason::Signal(_) | EndReason::Removed { .. }) {
        hang_up.cancel();
    }
    joined_room.leave(&hang_up).await;
    why
}

/// The SDK's defaults, which real callers use, except those that would hide a failure, such as retries.
fn options(request: &JoinRequest) -> RoomOptions {
    let mut options = RoomOptions::default();
    options.join_retries = 0;
    options.connect_timeout = request.signal_timeout;
    // The settings refuse every other restriction for this engine.
    if request.ice == Ice::Relay {
        options.rtc_config.ice_transport_type = IceTransportsType::Relay;
    }
    options.data_stream =
        RoomDataStreamOptions::default().with_max_payload_byte_length(MAX_STREAM_BYTES);
    options
}

/// A joined room that is left on drop. The SDK's tasks keep each other alive, and only `Room::close` ends them.
struct LeaveOnDrop(Option<Arc<Room>>);

impl LeaveOnDrop {
    async fn leave(&mut self, hang_up: &CancellationToken) {
        let Some(room) = self.0.take() else {
            return;
        };
        let mut closing = pin!(room.close());
        if timeout(LEAVE_TIMEOUT, &mut closing).await.is_err() {
            // The SDK waits for the socket, so closing the socket lets it finish.
            hang_up.cancel();
            if timeout(LEAVE_TIMEOUT, closing).await.is_err() {
                tracing::warn!("the SDK did not leave its room in time");
            }
        }
    }
}

impl Drop for LeaveOnDrop {
    fn drop(&mut self) {
        if let (Some(room), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn(async move { room.close().await });
        }
    }
}

/// A participant that is joining or has joined its room.
struct SdkSession<'a> {
    wire_events: mpsc::Receiver<WireEvent>,
    watch: SignalWatch,
    audio: &'a mut InboundTotals,
    sound: &'a mut CallSound,
    speech: Detector,
    caller: CallerPlayer<Arc<[i16]>>,
    uplink: UplinkTotals,
    source: NativeAudioSource,
    track: LocalAudioTrack,
    /// The subscribed audio tracks: a key that is unique in this session, the track sid and the track.
    tracks: Vec<(u32, String, RemoteAudioTrack)>,
    next_track: u32,
    voice_selector: VoiceSelector<u32, (Instant, Arc<[i16]>)>,
    voice: Option<SdkVoice>,
    clock: FrameClock,
    /// The packets of the data streams that are being read.
    packets: SelectAll<BoxStream<'static, DataPacket>>,
    measuring: Option<BoxFuture<'static, MeasuredStats>>,
    samples: u32,
    published: bool,
    media_reported: bool,
    /// The settings allow direct UDP, so any other path means that it failed.
    udp_tried: bool,
}

/// The track that carries the agent's voice.
struct SdkVoice {
    key: u32,
    track: RemoteAudioTrack,
    stream: NativeAudioStream,
    /// The statistics show received packets.
    flows: bool,
}

/// The answer to a query of the SDK's statistics.
enum MeasuredStats {
    Transports(Vec<RtcStats>),
    /// The statistics of the track with this key.
    Voice(u32, Vec<RtcStats>),
    /// The statistics of the caller's track.
    Uplink(Option<Vec<RtcStats>>),
}

impl<'a> SdkSession<'a> {
    fn new(
        request: &JoinRequest,
        events: EventSender,
        wire_events: mpsc::Receiver<WireEvent>,
        audio: &'a mut InboundTotals,
        sound: &'a mut CallSound,
    ) -> Self {
        let source =
            NativeAudioSource::new(AudioSourceOptions::default(), pcm::RATE, 1, SDK_QUEUE_MS);
        let track =
            LocalAudioTrack::create_audio_track("echo", RtcAudioSource::Native(source.clone()));
        let cid = track.rtc_track().id();
        Self {
            wire_events,
            watch: SignalWatch::new(Instant::now(), Observer::new(request, events, cid)),
            audio,
            sound,
            speech: Detector::new(request.speech.clone(), pcm::RATE),
            caller: CallerPlayer::new(request.caller.clone(), request.agent_turn),
            uplink: UplinkTotals::default(),
            source,
            track,
            tracks: Vec::new(),
            next_track: 0,
            voice_selector: VoiceSelector::new(MAX_EARLY_FRAMES),
            voice: None,
            clock: FrameClock::default(),
            packets: SelectAll::new(),
            measuring: None,
            samples: 0,
            published: false,
            media_reported: false,
            udp_tried: request.ice == Ice::All,
        }
    }

    async fn join(
        &mut self,
        connecting: impl Future<Output = RoomResult<(Room, SdkEvents)>>,
        leave: &CancellationToken,
        timeout: Duration,
    ) -> Result<(Room, SdkEvents), EndReason> {
        let deadline = Instant::now() + timeout;
        let mut connecting = pin!(connecting);
        let connected = loop {
            tokio::select! {
                biased;
                () = leave.cancelled() => return Err(EndReason::Left),
                Some(event) = self.wire_events.recv() => self.on_wire_event(event)?,
                connected = &mut connecting => break connected,
                () = sleep_until(deadline), if !self.watch.joined() => {
                    return Err(EndReason::Signal(SignalError::JoinTimeout(timeout)));
                }
            }
        };
        // Events that arrived meanwhile give a better reason than the SDK's error.
        while let Ok(event) = self.wire_events.try_recv() {
            self.on_wire_event(event)?;
        }
        connected.map_err(|error| self.watch.not_connected(error.to_string()))
    }

    async fn serve(
        &mut self,
        room: &Arc<Room>,
        mut events: SdkEvents,
        leave: &CancellationToken,
        adoption: &mut Adoption,
    ) -> Result<EndReason, EndReason> {
        let mut publishing = Some(self.publish(room));
        let mut sampling = interval(STATS_INTERVAL);
        sampling.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.play(Instant::now()).await?;
            let deadlines = [self.speech.next_deadline(), self.caller.next_deadline()];
            let deadline = deadlines.into_iter().flatten().min();
            // The server's messages come before the SDK's events that follow from them, and received data before the
            // timers.
            tokio::select! {
                biased;
                () = leave.cancelled() => return Ok(EndReason::Left),
                Some(event) = self.wire_events.recv() => self.on_wire_event(event)?,
                Some(event) = events.recv() => self.on_sdk(event)?,
                Some(published) = OptionFuture::from(publishing.as_mut()) => {
                    publishing = None;
                    published.map_err(|error| EndReason::PublishFailed(error.to_string()))?;
                    self.published = true;
                }
                Some(frame) = next_frame(&mut self.voice) => self.on_frame(&frame)?,
                Some(packet) = self.packets.next() => {
                    self.watch.observer.on_packet(Instant::now(), packet)?;
                }
                Some(measured) = OptionFuture::from(self.measuring.as_mut()) => {
                    self.measuring = None;
                    self.on_measured(measured)?;
                }
                identity = adoption.next() => {
                    let now = Instant::now();
                    self.watch.adopt(now, &identity)?;
                    self.select_voice(now)?;
                }
                _ = sampling.tick() => self.measure(room),
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    self.on_time(Instant::now())?;
                }
            }
        }
    }

    fn publish(&self, room: &Room) -> BoxFuture<'static, RoomResult<LocalTrackPublication>> {
        let participant = room.local_participant();
        let track = LocalTrack::Audio(self.track.clone());
        let options = TrackPublishOptions {
            // An agent listens only to a track whose source is MICROPHONE.
            source: TrackSource::Microphone,
            red: false,
            ..TrackPublishOptions::default()
        };
        async move { participant.publish_track(track, options).await }.boxed()
    }

    fn on_wire_event(&mut self, event: WireEvent) -> Result<(), EndReason> {
        match self.watch.on_wire_event(event)? {
            Some(at) => {
                // The first time after the join is that of the join response.
                if self.watch.joined() {
                    self.sound.start(at);
                }
                self.select_voice(at)
            }
            None => Ok(()),
        }
    }

    fn on_sdk(&mut self, event: SdkEvent) -> Result<(), EndReason> {
        let now = Instant::now();
        match event {
            SdkEvent::TrackSubscribed {
                track: RemoteTrack::Audio(track),
                publication,
                ..
            } => {
                let sid = String::from(publication.sid());
                self.tracks.push((self.next_track, sid, track));
                self.next_track += 1;
                self.select_voice(now)
            }
            SdkEvent::TrackUnsubscribed { publication, .. } => {
                let gone = String::from(publication.sid());
                self.tracks.retain(|(_, sid, _)| *sid != gone);
                self.select_voice(now)
            }
            SdkEvent::Reconnecting | SdkEvent::Disconnected { .. } => {
                Err(self.watch.reconnecting(now))
            }
            SdkEvent::TextStreamOpened {
                reader,
                participant_identity: sender,
                ..
            } => {
                let named = |info: &TextStreamInfo| (info.id.clone(), info.topic.clone());
                self.read(reader.take(), sender, named, TextStreamInfo::attributes);
                Ok(())
            }
            SdkEvent::ByteStreamOpened {
                reader,
                participant_identity: sender,
                ..
            } => {
                let named = |info: &ByteStreamInfo| (info.id.clone(), info.topic.clone());
                self.read(reader.take(), sender, named, ByteStreamInfo::attributes);
                Ok(())
            }
            SdkEvent::TranscriptionReceived {
                participant,
                track_publication,
                segments,
            } => {
                let identity = participant.map_or_else(String::new, |it| it.identity().into());
                let track_id = track_publication.map_or_else(String::new, |it| it.sid().into());
                let transcription = proto::Transcription {
                    transcribed_participant_identity: identity,
                    track_id,
                    segments: segments.into_iter().map(segment).collect(),
                };
                let value = Value::Transcription(transcription);
                let packet = streams::packet(String::new(), value);
                self.watch.observer.on_packet(now, packet)
            }
            _ => Ok(()),
        }
    }

    /// Starts to read a data stream. Streams beyond [`MAX_STREAMS`] at a time are not read; no agent sends that many.
    fn read<R>(
        &mut self,
        reader: Option<R>,
        sender: ParticipantIdentity,
        named: fn(&R::Info) -> (String, String),
        attributes: fn(&R::Info) -> HashMap<String, String>,
    ) where
        R: StreamReader + Send + 'static,
        R::Info: Clone + Send + 'static,
        R::Output: Into<Vec<u8>>,
    {
        let Some(reader) = reader.filter(|_| self.packets.len() < MAX_STREAMS) else {
            return;
        };
        let info = reader.info().clone();
        let (id, topic) = named(&info);
        let opened = OpenedStream {
            identity: sender.into(),
            id,
            topic,
        };
        let content = reader.map(|piece| piece.map(Into::into));
        let packets = streams::packets(opened, move || attributes(&info), content);
        self.packets.push(packets.boxed());
    }

    /// Selects the track that carries the agent's voice and processes the audio that was buffered until then.
    fn select_voice(&mut self, at: Instant) -> Result<(), EndReason> {
        let tracks = self.tracks.iter().map(|(key, sid, _)| (*key, sid.as_str()));
        self.voice_selector
            .select(at, &self.watch.observer.roster, &tracks);
        let wanted = self.voice_selector.selected();
        if wanted != self.voice.as_ref().map(|voice| voice.key) {
            let mut tracks = self.tracks.iter();
            let found = tracks.find(|(key, ..)| Some(*key) == wanted);
            self.voice = found.map(|(key, _, track)| SdkVoice::of(*key, track.clone()));
        }
        for (at, pcm) in self.watch.observer.report_voice(&mut self.voice_selector)? {
            self.on_voice(at, &pcm)?;
        }
        Ok(())
    }

    fn on_frame(&mut self, frame: &AudioFrame<'_>) -> Result<(), EndReason> {
        let pcm = Arc::from(frame.data.as_ref());
        match self.voice_selector.admit_or_buffer((Instant::now(), pcm)) {
            Some((at, pcm)) => self.on_voice(at, &pcm),
            None => Ok(()),
        }
    }

    fn on_voice(&mut self, at: Instant, pcm: &Arc<[i16]>) -> Result<(), EndReason> {
        let position = self.clock.on_frame(at, pcm.len());
        let sound = PcmChunk {
            follows: position.follows,
            pcm,
        };
        let events = self.speech.on_sound(at, sound);
        let length = rtp::span(pcm.len() as u64);
        self.sound
            .on_level(Speaker::Agent, at, length, recording::peak(pcm));
        self.caller.on_frame(AgentFrame {
            arrived: at,
            time: position.time,
            level: self.speech.last_level(),
            frame: Arc::clone(pcm),
        });
        for event in events {
            // Speech proves audio before the next query of the statistics does.
            if let SpeechEvent::Started(at) = event {
                self.watch.observer.first_audio(at)?;
            }
            let observer = &self.watch.observer;
            observer.on_speech(&mut self.caller, &self.speech, event)?;
        }
        Ok(())
    }

    fn on_time(&mut self, now: Instant) -> Result<(), EndReason> {
        match self.speech.on_time(now) {
            Some(event) => {
                let observer = &self.watch.observer;
                observer.on_speech(&mut self.caller, &self.speech, event)
            }
            None => Ok(()),
        }
    }

    /// Passes the caller's due frames to the SDK, which fills gaps with silence.
    async fn play(&mut self, now: Instant) -> Result<(), EndReason> {
        let agent = self.watch.observer.activity(&self.speech);
        while let Some(out) = self.caller.poll(now, agent) {
            match out {
                CallerOutput::Started(turn) => self
                    .watch
                    .observer
                    .events
                    .send(now, RoomEventKind::CallerStarted(turn))?,
                CallerOutput::Ended => {
                    let sent = self.uplink.sent(now);
                    self.watch
                        .observer
                        .events
                        .send(now, RoomEventKind::CallerEnded { sent })?;
                }
                CallerOutput::Send { due, frame, .. } => {
                    let (length, peak) = (frame.duration(), recording::peak(&frame));
                    self.sound.on_level(Speaker::Caller, due, length, peak);
                    send(&self.source, &frame).await?;
                }
            }
        }
        Ok(())
    }

    /// Starts the next query of the SDK's statistics, if one is needed and none is running.
    fn measure(&mut self, room: &Arc<Room>) {
        self.samples = self.samples.wrapping_add(1);
        if self.measuring.is_some() {
            return;
        }
        if self.published && !self.media_reported {
            let room = Arc::clone(room);
            let asked = async move {
                let stats = room.get_stats().await.ok();
                let stats = stats.map(|it| [it.publisher_stats, it.subscriber_stats].concat());
                MeasuredStats::Transports(stats.unwrap_or_default())
            };
            self.measuring = Some(asked.boxed());
        } else if self.media_reported && self.samples.is_multiple_of(UPLINK_STATS_EVERY) {
            let track = self.track.clone();
            let asked = async move { MeasuredStats::Uplink(track.get_stats().await.ok()) };
            self.measuring = Some(asked.boxed());
        } else if let Some(voice) = &self.voice
            && (!voice.flows || self.samples % FLOWING_STATS_EVERY == FLOWING_STATS_EVERY / 4)
        {
            let (key, track) = (voice.key, voice.track.clone());
            let asked = async move {
                let stats = track.get_stats().await;
                MeasuredStats::Voice(key, stats.unwrap_or_default())
            };
            self.measuring = Some(asked.boxed());
        }
    }

    fn on_measured(&mut self, measured: MeasuredStats) -> Result<(), EndReason> {
        let now = Instant::now();
        match measured {
            MeasuredStats::Transports(stats) if are_up(&stats) => {
                self.media_reported = true;
                self.caller.open(now);
                let path = media_path(&stats);
                self.watch
                    .observer
                    .events
                    .send(now, RoomEventKind::MediaConnected { path })?;
                if self.udp_tried && path.is_some_and(|path| path != MediaPath::Udp) {
                    self.watch
                        .observer
                        .events
                        .send(now, RoomEventKind::UdpBlocked)?;
                }
                Ok(())
            }
            MeasuredStats::Transports(_) | MeasuredStats::Uplink(None) => Ok(()),
            MeasuredStats::Uplink(Some(stats)) => {
                match self.uplink.on_stats(now, outbound(&stats)) {
                    Some(report) => self.watch.observer.on_uplink(now, report),
                    None => Ok(()),
                }
            }
            MeasuredStats::Voice(key, stats) => {
                let Some(inbound) = inbound(&stats).filter(|it| it.packets > 0) else {
                    return Ok(());
                };
                let mut voice = self.voice.as_mut().filter(|voice| voice.key == key);
                // Statistics are cumulative, so those of a voice without a known agent count later.
                if !self.voice_selector.is_announced() {
                    return Ok(());
                }
                if let Some(voice) = &mut voice {
                    voice.flows = true;
                }
                self.audio.on_stats(inbound);
                self.watch.observer.first_audio(now)
            }
        }
    }

    async fn count_once_more(&mut self) {
        let voice = self
            .voice
            .as_ref()
            .filter(|_| self.voice_selector.is_announced());
        let Some(track) = voice.map(|voice| voice.track.clone()) else {
            return;
        };
        let counted = timeout(LAST_STATS_TIMEOUT, track.get_stats()).await;
        let counted = counted.ok().and_then(Result::ok);
        if let Some(inbound) = counted.and_then(|stats| inbound(&stats)) {
            self.audio.on_stats(inbound);
        }
    }
}

impl SdkVoice {
    fn of(key: u32, track: RemoteAudioTrack) -> Self {
        let options = NativeAudioStreamOptions {
            queue_size_frames: Some(MAX_QUEUED_FRAMES),
        };
        let rate = pcm::RATE.cast_signed();
        let stream = NativeAudioStream::with_options(track.rtc_track(), rate, 1, options);
        Self {
            key,
            track,
            stream,
            flows: false,
        }
    }
}

/// The next frame of the voice; `None` at once if there is no voice or its stream has ended.
async fn next_frame(voice: &mut Option<SdkVoice>) -> Option<AudioFrame<'static>> {
    voice.as_mut()?.stream.next().await
}

async fn send(source: &NativeAudioSource, pcm: &[i16]) -> Result<(), EndReason> {
    let frame = AudioFrame {
        data: Cow::Borrowed(pcm),
        sample_rate: pcm::RATE,
        num_channels: 1,
        samples_per_channel: u32::try_from(pcm.len()).unwrap_or(u32::MAX),
    };
    let taken = source.capture_frame(&frame).await;
    taken.map_err(|error| {
        EndReason::Internal(format!("the SDK did not accept an audio frame: {error}"))
    })
}

fn segment(segment: TranscriptionSegment) -> proto::TranscriptionSegment {
    proto::TranscriptionSegment {
        id: segment.id,
        text: segment.text,
        start_time: segment.start_time,
        end_time: segment.end_time,
        r#final: segment.r#final,
        language: segment.language,
    }
}

/// Whether DTLS is connected on every transport; without any transport, it is not.
fn are_up(stats: &[RtcStats]) -> bool {
    let mut transports = stats.iter().filter_map(|stats| match stats {
        RtcStats::Transport(it) => Some(it.transport.dtls_state),
        _ => None,
    });
    let connected = Some(DtlsTransportState::Connected);
    transports.next() == Some(connected) && transports.all(|state| state == connected)
}

/// The path of the transports' selected candidate pairs: the less plain one. `None` if the SDK shows no selected pair.
/// The SDK always tries UDP first.
fn media_path(stats: &[RtcStats]) -> Option<MediaPath> {
    let selected = stats.iter().filter_map(|stats| match stats {
        RtcStats::Transport(it) => Some(&it.transport.selected_candidate_pair_id),
        _ => None,
    });
    let local = selected.filter_map(|pair| {
        stats.iter().find_map(|stats| match stats {
            RtcStats::CandidatePair(it) if it.rtc.id == *pair => {
                Some(&it.candidate_pair.local_candidate_id)
            }
            _ => None,
        })
    });
    let paths = local.filter_map(|local| {
        stats.iter().find_map(|stats| match stats {
            RtcStats::LocalCandidate(it) if it.rtc.id == *local => path_of(&it.local_candidate),
            _ => None,
        })
    });
    paths.max()
}

fn path_of(local: &IceCandidateStats) -> Option<MediaPath> {
    if local.candidate_type == Some(IceCandidateType::Relay) {
        return local.relay_protocol.map(|protocol| match protocol {
            IceServerTransportProtocol::Udp => MediaPath::RelayUdp,
            IceServerTransportProtocol::Tcp => MediaPath::RelayTcp,
            IceServerTransportProtocol::Tls => MediaPath::RelayTls,
        });
    }
    match local.protocol.as_str() {
        "udp" => Some(MediaPath::Udp),
        "tcp" => Some(MediaPath::Tcp),
        _ => None,
    }
}

fn outbound(stats: &[RtcStats]) -> OutboundStats {
    let mut outbound = OutboundStats::default();
    for stats in stats {
        match stats {
            RtcStats::OutboundRtp(it) => outbound.packets = it.sent.packets_sent,
            RtcStats::RemoteInboundRtp(it) => {
                outbound.report = Some((it.rtc.timestamp, it.received.packets_lost));
            }
            _ => {}
        }
    }
    outbound
}

fn inbound(stats: &[RtcStats]) -> Option<InboundStats> {
    stats.iter().find_map(|stats| match stats {
        RtcStats::InboundRtp(it) => Some(InboundStats {
            ssrc: it.stream.ssrc,
            packets: it.received.packets_received,
            lost: it.received.packets_lost,
            jitter_seconds: it.received.jitter,
        }),
        _ => None,
    })
}
