//! One participant on the SDK: a loop that carries what the server says, what the SDK tells and what the agent speaks to the
//! state machines that the native engine has as well, and their echo to the SDK.

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
use livekit::webrtc::stats::{DtlsTransportState, RtcStats};
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

use super::pcm::{self, Arrivals};
use super::stats::{Inbound, Tally};
use super::streams::{self, Opened};
use super::transport::{Line, Told};
use super::watch::Watch;
use crate::livekit::audio::echo::{self, Echo};
use crate::livekit::audio::speech::{Detector, Heard, Sound};
use crate::livekit::event::{EndReason, RoomEvent, RoomEventKind};
use crate::livekit::join::JoinRequest;
use crate::livekit::room::observer::{LEAVE_TIMEOUT, Observer, Outlet};
use crate::livekit::room::voice_selector::Listening;
use crate::livekit::wire::signal::SignalError;

/// Sound that may wait: for us 1 s of it, for the SDK 100 ms.
const FRAMES_TO_READ: usize = 100;
const MILLIS_TO_SEND: u32 = 100;

/// Frames kept of a voice before its agent is known, 5 s of 10 ms: the server's news may come three seconds late.
const MOST_EARLY: usize = 500;

/// How often the SDK is asked for what it has no event for: its transports, and the agent's first packet.
const SAMPLE: Duration = Duration::from_millis(50);

/// In samples: how often the agent's audio is counted once it flows.
const SELDOM: u32 = 20;

/// For the last count, before the room is left.
const LAST_COUNT: Duration = Duration::from_millis(500);

/// Data streams that are read at once, and the most of one; a session's messages and transcripts are short.
const MOST_STREAMS: usize = 8;
const MOST_BYTES: usize = 64 * 1024;

type SdkEvents = mpsc::UnboundedReceiver<SdkEvent>;

/// Joins, echoes and listens until something ends it. The last event is the caller's to send.
pub(crate) async fn run(
    request: JoinRequest,
    events: mpsc::Sender<RoomEvent>,
    leave: CancellationToken,
    audio: &mut Tally,
) -> EndReason {
    let token = match request.token() {
        Ok(token) => token,
        Err(why) => return why,
    };
    let hang_up = CancellationToken::new();
    // Whatever ends this actor closes its socket, and with it what the SDK has running.
    let _hung_up = hang_up.clone().drop_guard();
    let (line, told) = Line::new(
        request.endpoint.clone(),
        token.clone(),
        request.signal_timeout,
        hang_up.clone(),
    );
    let mut session = Session::new(&request, Outlet::new(events), told, audio);
    let connecting = Room::connect(
        request.endpoint.url.as_str(),
        token.expose_secret(),
        options(&request),
    );
    let joined = session.join(line.carry(connecting), &leave, request.signal_timeout);
    let (room, events) = match joined.await {
        Ok(joined) => joined,
        Err(why) => return why,
    };
    let mut seat = Seat(Some(Arc::new(room)));
    let served = match &seat.0 {
        Some(room) => session.serve(room, events, &leave).await,
        None => Ok(EndReason::Left),
    };
    let told = session.watch.observer.tell_unfinished();
    let why = served
        .and_then(|why| told.map(|()| why))
        .unwrap_or_else(|why| why);
    session.count_once_more().await;
    // A connection that is gone or that the server ended takes no farewell.
    if matches!(why, EndReason::Signal(_) | EndReason::Removed { .. }) {
        hang_up.cancel();
    }
    seat.leave(&hang_up).await;
    why
}

/// The SDK's defaults, which are those of the callers, but for what would hide a loss.
fn options(request: &JoinRequest) -> RoomOptions {
    let mut options = RoomOptions::default();
    options.join_retries = 0;
    options.connect_timeout = request.signal_timeout;
    options.data_stream = RoomDataStreamOptions::default().with_max_payload_byte_length(MOST_BYTES);
    options
}

/// Our place in a room. The SDK's tasks hold each other: only its own farewell ends them, so one is said in any case.
struct Seat(Option<Arc<Room>>);

impl Seat {
    async fn leave(&mut self, hang_up: &CancellationToken) {
        let Some(room) = self.0.take() else {
            return;
        };
        let mut closing = pin!(room.close());
        if timeout(LEAVE_TIMEOUT, &mut closing).await.is_err() {
            // What it waits for is the socket.
            hang_up.cancel();
            if timeout(LEAVE_TIMEOUT, closing).await.is_err() {
                tracing::warn!("the SDK did not leave its room in time");
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let (Some(room), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn(async move { room.close().await });
        }
    }
}

/// A participant on its way into its room, and in it.
struct Session<'a> {
    told: mpsc::Receiver<Told>,
    watch: Watch,
    audio: &'a mut Tally,
    speech: Detector,
    echo: Echo<Arc<[i16]>>,
    source: NativeAudioSource,
    track: LocalAudioTrack,
    /// The audio tracks that are there, each under a number of its own.
    tracks: Vec<(u32, String, RemoteAudioTrack)>,
    next_track: u32,
    listening: Listening<u32, (Instant, Arc<[i16]>)>,
    voice: Option<Voice>,
    arrivals: Arrivals,
    /// Data streams that are being read, packet by packet.
    packets: SelectAll<BoxStream<'static, DataPacket>>,
    measuring: Option<BoxFuture<'static, Measured>>,
    samples: u32,
    published: bool,
    media_told: bool,
}

/// The track that is listened to.
struct Voice {
    key: u32,
    track: RemoteAudioTrack,
    stream: NativeAudioStream,
    /// Packets of it have come.
    flows: bool,
}

/// What the SDK was asked for.
enum Measured {
    Transports(Vec<RtcStats>),
    /// Of the track of this number.
    Voice(u32, Vec<RtcStats>),
}

impl<'a> Session<'a> {
    fn new(
        request: &JoinRequest,
        outlet: Outlet,
        told: mpsc::Receiver<Told>,
        audio: &'a mut Tally,
    ) -> Self {
        let source =
            NativeAudioSource::new(AudioSourceOptions::default(), pcm::RATE, 1, MILLIS_TO_SEND);
        let track =
            LocalAudioTrack::create_audio_track("echo", RtcAudioSource::Native(source.clone()));
        let cid = track.rtc_track().id();
        Self {
            told,
            watch: Watch::new(Instant::now(), Observer::new(request, outlet, cid)),
            audio,
            speech: Detector::new(request.speech.clone(), pcm::RATE),
            echo: Echo::new(request.echo.clone()),
            source,
            track,
            tracks: Vec::new(),
            next_track: 0,
            listening: Listening::new(MOST_EARLY),
            voice: None,
            arrivals: Arrivals::default(),
            packets: SelectAll::new(),
            measuring: None,
            samples: 0,
            published: false,
            media_told: false,
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
                Some(told) = self.told.recv() => self.on_told(told)?,
                connected = &mut connecting => break connected,
                () = sleep_until(deadline), if !self.watch.joined() => {
                    return Err(EndReason::Signal(SignalError::JoinTimeout(timeout)));
                }
            }
        };
        // What was told while it connected says better why it didn't.
        while let Ok(told) = self.told.try_recv() {
            self.on_told(told)?;
        }
        connected.map_err(|error| self.watch.not_connected(error.to_string()))
    }

    async fn serve(
        &mut self,
        room: &Arc<Room>,
        mut events: SdkEvents,
        leave: &CancellationToken,
    ) -> Result<EndReason, EndReason> {
        let mut publishing = Some(self.publish(room));
        let mut sampling = interval(SAMPLE);
        sampling.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.play(Instant::now()).await?;
            let deadlines = [self.speech.next_deadline(), self.echo.next_deadline()];
            let deadline = deadlines.into_iter().flatten().min();
            // What the server said goes before what the SDK makes of it, and what has come before the timers.
            tokio::select! {
                biased;
                () = leave.cancelled() => return Ok(EndReason::Left),
                Some(told) = self.told.recv() => self.on_told(told)?,
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
            // An agent listens to a microphone and to nothing else.
            source: TrackSource::Microphone,
            red: false,
            ..TrackPublishOptions::default()
        };
        async move { participant.publish_track(track, options).await }.boxed()
    }

    fn on_told(&mut self, told: Told) -> Result<(), EndReason> {
        match self.watch.on_told(told)? {
            Some(at) => self.listen(at),
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
                self.listen(now)
            }
            SdkEvent::TrackUnsubscribed { publication, .. } => {
                let gone = String::from(publication.sid());
                self.tracks.retain(|(_, sid, _)| *sid != gone);
                self.listen(now)
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

    /// Reads a data stream that a participant has begun to send; more at once than any agent sends are left unread.
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
        let Some(reader) = reader.filter(|_| self.packets.len() < MOST_STREAMS) else {
            return;
        };
        let info = reader.info().clone();
        let (id, topic) = named(&info);
        let opened = Opened {
            identity: sender.into(),
            id,
            topic,
        };
        let content = reader.map(|piece| piece.map(Into::into));
        let packets = streams::packets(opened, move || attributes(&info), content);
        self.packets.push(packets.boxed());
    }

    /// Settles which track carries the agent's voice, and takes in what it had said by the time that is known.
    fn listen(&mut self, at: Instant) -> Result<(), EndReason> {
        let tracks = self.tracks.iter().map(|(key, sid, _)| (*key, sid.as_str()));
        self.listening
            .settle(at, &self.watch.observer.roster, &tracks);
        let wanted = self.listening.key();
        if wanted != self.voice.as_ref().map(|voice| voice.key) {
            let mut tracks = self.tracks.iter();
            let found = tracks.find(|(key, ..)| Some(*key) == wanted);
            self.voice = found.map(|(key, _, track)| Voice::of(*key, track.clone()));
        }
        for (at, pcm) in self.watch.observer.tell_of_voice(&mut self.listening)? {
            self.on_voice(at, &pcm)?;
        }
        Ok(())
    }

    fn on_frame(&mut self, frame: &AudioFrame<'_>) -> Result<(), EndReason> {
        let pcm = Arc::from(frame.data.as_ref());
        match self.listening.sift((Instant::now(), pcm)) {
            Some((at, pcm)) => self.on_voice(at, &pcm),
            None => Ok(()),
        }
    }

    fn on_voice(&mut self, at: Instant, pcm: &Arc<[i16]>) -> Result<(), EndReason> {
        let position = self.arrivals.on_frame(at, pcm.len());
        self.echo.on_frame(at, position.time, pcm);
        let sound = Sound {
            follows: position.follows,
            pcm,
        };
        for heard in self.speech.on_sound(at, sound) {
            // Speech is audio, though its packets may not have been counted yet.
            if let Heard::Started(at) = heard {
                self.watch.observer.first_audio(at)?;
            }
            self.watch.observer.heard(&mut self.echo, heard)?;
        }
        Ok(())
    }

    fn on_time(&mut self, now: Instant) -> Result<(), EndReason> {
        match self.speech.on_time(now) {
            Some(heard) => self.watch.observer.heard(&mut self.echo, heard),
            None => Ok(()),
        }
    }

    /// Hands what the echo has due to the SDK, which fills what is left with silence.
    async fn play(&mut self, now: Instant) -> Result<(), EndReason> {
        while let Some(out) = self.echo.poll(now, self.speech.on_the_verge()) {
            match out {
                echo::Out::Started => self
                    .watch
                    .observer
                    .outlet
                    .tell(now, RoomEventKind::EchoStarted)?,
                echo::Out::Ended => self
                    .watch
                    .observer
                    .outlet
                    .tell(now, RoomEventKind::EchoEnded)?,
                echo::Out::Send { frame, .. } => send(&self.source, &frame).await?,
            }
        }
        Ok(())
    }

    /// Asks the SDK for what is wanted next, if anything.
    fn measure(&mut self, room: &Arc<Room>) {
        self.samples = self.samples.wrapping_add(1);
        if self.measuring.is_some() {
            return;
        }
        if self.published && !self.media_told {
            let room = Arc::clone(room);
            let asked = async move {
                let stats = room.get_stats().await.ok();
                let stats = stats.map(|it| [it.publisher_stats, it.subscriber_stats].concat());
                Measured::Transports(stats.unwrap_or_default())
            };
            self.measuring = Some(asked.boxed());
        } else if let Some(voice) = &self.voice
            && (!voice.flows || self.samples.is_multiple_of(SELDOM))
        {
            let (key, track) = (voice.key, voice.track.clone());
            let asked = async move {
                let stats = track.get_stats().await;
                Measured::Voice(key, stats.unwrap_or_default())
            };
            self.measuring = Some(asked.boxed());
        }
    }

    fn on_measured(&mut self, measured: Measured) -> Result<(), EndReason> {
        let now = Instant::now();
        match measured {
            Measured::Transports(stats) if are_up(&stats) => {
                self.media_told = true;
                self.echo.open(now);
                self.watch
                    .observer
                    .outlet
                    .tell(now, RoomEventKind::MediaConnected)?;
                if over_tcp(&stats) {
                    self.watch
                        .observer
                        .outlet
                        .tell(now, RoomEventKind::UdpBlocked)?;
                }
                Ok(())
            }
            Measured::Transports(_) => Ok(()),
            Measured::Voice(key, stats) => {
                let Some(inbound) = inbound(&stats).filter(|it| it.packets > 0) else {
                    return Ok(());
                };
                let mut voice = self.voice.as_mut().filter(|voice| voice.key == key);
                // Those of a voice whose agent isn't known yet are counted once it is.
                if !self.listening.told() {
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
        let heard = self.voice.as_ref().filter(|_| self.listening.told());
        let Some(track) = heard.map(|voice| voice.track.clone()) else {
            return;
        };
        let counted = timeout(LAST_COUNT, track.get_stats()).await;
        let counted = counted.ok().and_then(Result::ok);
        if let Some(inbound) = counted.and_then(|stats| inbound(&stats)) {
            self.audio.on_stats(inbound);
        }
    }
}

impl Voice {
    fn of(key: u32, track: RemoteAudioTrack) -> Self {
        let options = NativeAudioStreamOptions {
            queue_size_frames: Some(FRAMES_TO_READ),
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

/// `None` at once where there is no voice, or no more of it.
async fn next_frame(voice: &mut Option<Voice>) -> Option<AudioFrame<'static>> {
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
    taken.map_err(|error| EndReason::Internal(format!("the SDK takes no sound: {error}")))
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

/// Whether every transport has its keys.
fn are_up(stats: &[RtcStats]) -> bool {
    let mut transports = stats.iter().filter_map(|stats| match stats {
        RtcStats::Transport(it) => Some(it.transport.dtls_state),
        _ => None,
    });
    let connected = Some(DtlsTransportState::Connected);
    transports.next() == Some(connected) && transports.all(|state| state == connected)
}

/// Whether a transport runs over TCP, though UDP was tried.
fn over_tcp(stats: &[RtcStats]) -> bool {
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
    let mut protocols = local.filter_map(|local| {
        stats.iter().find_map(|stats| match stats {
            RtcStats::LocalCandidate(it) if it.rtc.id == *local => {
                Some(it.local_candidate.protocol.as_str())
            }
            _ => None,
        })
    });
    protocols.any(|protocol| protocol == "tcp")
}

fn inbound(stats: &[RtcStats]) -> Option<Inbound> {
    stats.iter().find_map(|stats| match stats {
        RtcStats::InboundRtp(it) => Some(Inbound {
            ssrc: it.stream.ssrc,
            packets: it.received.packets_received,
            lost: it.received.packets_lost,
            jitter_seconds: it.received.jitter,
        }),
        _ => None,
    })
}
