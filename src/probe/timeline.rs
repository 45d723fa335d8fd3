//! Milestones, spans and turns of a probe, on one monotonic clock.

use std::time::Duration;

use strum::VariantArray;
use tokio::time::Instant;

use crate::livekit::event::TranscriptText;

/// Something that a probe sees at most once. Milestones come in no fixed order: an agent can join before the dispatch call
/// returns.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, strum::IntoStaticStr, strum::VariantArray,
)]
pub enum Milestone {
    Started,
    RoomCreated,
    SignalConnected,
    /// Both transports are up.
    MediaConnected,
    CallerPublished,
    /// Just before the request on which LiveKit dispatches: `CreateDispatch`, `CreateRoom`, or the upgrade of the signal
    /// socket if joining creates the room.
    DispatchSent,
    /// The answer to that request, if it named an agent; with dispatch by token, the join response. An accepted dispatch does
    /// not mean that an agent will join.
    DispatchAccepted,
    /// By the server's stamp if there is one, otherwise the first sight.
    AgentJoined,
    AgentListening,
    AgentTrackSubscribed,
    /// The first RTP packet of the agent's audio.
    AgentFirstAudio,
    AgentSpoke,
    Left,
    RoomDeleted,
}

impl Milestone {
    /// In the order of a probe that goes well.
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The name in output and history.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// A named time between two milestones.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, strum::IntoStaticStr, strum::VariantArray,
)]
#[strum(serialize_all = "snake_case")]
pub enum Span {
    RoomCreate,
    Signal,
    Media,
    Publish,
    Dispatch,
    AgentJoin,
    AgentTrack,
    FirstAudio,
    FirstSpeech,
    /// The first turn's reply delay; the only span that comes from a turn.
    Reply,
}

impl Span {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The label value in metrics and the key in output.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// When each milestone was first seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Timeline {
    marks: [Option<Instant>; Milestone::ALL.len()],
    /// This process did not run for some of the time. So a mark may be much later than what it marks.
    stalled: bool,
    caller_speaks_first: bool,
}

impl Timeline {
    /// Returns whether this was the first sight. A later one changes nothing.
    pub fn mark(&mut self, milestone: Milestone, at: Instant) -> bool {
        let mark = &mut self.marks[milestone as usize];
        let first = mark.is_none();
        mark.get_or_insert(at);
        first
    }

    pub fn get(&self, milestone: Milestone) -> Option<Instant> {
        self.marks[milestone as usize]
    }

    /// The caller speaks first, so the agent's first speech is a reply, and no span of the call's start.
    pub(super) fn exclude_first_speech(&mut self) {
        self.caller_speaks_first = true;
    }

    /// Whether the caller speaks before the agent does.
    pub fn caller_speaks_first(&self) -> bool {
        self.caller_speaks_first
    }

    /// From now on no span has a value: the canary did not see when things happened.
    pub(super) fn record_stall(&mut self) {
        self.stalled = true;
    }

    /// The milestones that were seen, in the order of [`Milestone::ALL`].
    pub fn marks(&self) -> impl Iterator<Item = (Milestone, Instant)> + '_ {
        Milestone::ALL
            .into_iter()
            .filter_map(|milestone| Some((milestone, self.get(milestone)?)))
    }

    /// How long after the probe's start this was; `None` if it was before.
    pub fn since_start(&self, at: Instant) -> Option<Duration> {
        at.checked_duration_since(self.get(Milestone::Started)?)
    }

    /// From the probe's start; `None` if either is missing or they are reversed.
    pub fn since_started(&self, milestone: Milestone) -> Option<Duration> {
        self.between(Milestone::Started, milestone)
    }

    /// `None`, never zero, if an end is missing or the span runs backwards. [`Span::Reply`] is always `None` here: see
    /// [`Turn::reply_delay`].
    pub fn span(&self, span: Span) -> Option<Duration> {
        use Milestone as M;
        let (from, to) = match span {
            Span::RoomCreate => (M::Started, M::RoomCreated),
            // If joining creates the room, no milestone comes before the connection.
            Span::Signal if self.get(M::RoomCreated).is_none() => (M::Started, M::SignalConnected),
            Span::Signal => (M::RoomCreated, M::SignalConnected),
            Span::Media => (M::SignalConnected, M::MediaConnected),
            Span::Publish => (M::SignalConnected, M::CallerPublished),
            Span::Dispatch => (M::DispatchSent, M::DispatchAccepted),
            Span::AgentJoin => (M::DispatchSent, M::AgentJoined),
            Span::AgentTrack => (M::AgentJoined, M::AgentTrackSubscribed),
            Span::FirstAudio => (M::DispatchSent, M::AgentFirstAudio),
            Span::FirstSpeech if self.caller_speaks_first => return None,
            Span::FirstSpeech => (M::DispatchSent, M::AgentSpoke),
            Span::Reply => return None,
        };
        self.between(from, to)
    }

    fn between(&self, from: Milestone, to: Milestone) -> Option<Duration> {
        if self.stalled {
            return None;
        }
        self.get(to)?.checked_duration_since(self.get(from)?)
    }
}

/// What the agent said, what the caller said then, and the agent's reply.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Turn {
    /// The start of what the agent said before the caller; `None` if the caller spoke first.
    pub agent_started: Option<Instant>,
    pub agent_ended: Option<Instant>,
    pub caller_started: Option<Instant>,
    pub caller_ended: Option<Instant>,
    /// The start of the reply.
    pub replied: Option<Instant>,
    pub reply_ended: Option<Instant>,
    /// Both spoke at the same time, although the caller did not mean to interrupt. Such a turn has no reply delay.
    pub overlap: bool,
    /// The line of the script that the caller said, from 0; `None` if it was no line of the script.
    pub line: Option<usize>,
    /// The caller interrupted the agent.
    pub interrupts: bool,
    /// An interrupted agent stopped speaking at this time.
    pub yielded: Option<Instant>,
    pub result: TurnResult,
    /// Whether the agent's session reported that it heard the caller; `None` if it reports nothing.
    pub confirmed: Option<bool>,
    /// The session reported that the caller interrupted the agent, although it did not mean to.
    pub cut_in: bool,
    /// What the caller said, as the settings or the agent's own transcript have it.
    pub said: Option<TranscriptText>,
    /// What the agent's session transcribed of the caller.
    pub heard: Option<TranscriptText>,
    /// What the agent's session transcribed of its own reply.
    pub reply_text: Option<TranscriptText>,
    /// The share of words that the agent heard wrongly, from 0; above 1 if it heard more than was said.
    pub word_error: Option<f64>,
    pub stages: TurnStages,
}

/// What became of a turn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum TurnResult {
    /// The caller had not said its line to the end when the call ended.
    #[default]
    NotSent,
    /// The agent replied.
    Answered,
    /// The agent did not reply, or its session contradicts the reply.
    Unanswered,
    /// The agent replied, but both spoke at the same time before, so the delay is unknown.
    Overlapped,
}

impl TurnResult {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The label value in metrics, and the value in JSON.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// What the agent's session claims of one reply. The stages overlap: their sum means nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TurnStages {
    pub transcription: Option<Duration>,
    pub end_of_turn: Option<Duration>,
    pub llm: Option<Duration>,
    pub tts: Option<Duration>,
    pub end_to_end: Option<Duration>,
}

/// A stage of [`TurnStages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum AgentStage {
    /// From the end of the caller's speech to its transcript.
    Transcription,
    /// From the end of the caller's speech to the decision that the turn is over.
    EndOfTurn,
    /// Until the first token of the LLM.
    Llm,
    /// From the first text to the first audio of the TTS.
    Tts,
    /// From the end of the caller's speech to the start of the reply.
    EndToEnd,
}

impl AgentStage {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The label value in metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

impl TurnStages {
    pub fn get(&self, stage: AgentStage) -> Option<Duration> {
        match stage {
            AgentStage::Transcription => self.transcription,
            AgentStage::EndOfTurn => self.end_of_turn,
            AgentStage::Llm => self.llm,
            AgentStage::Tts => self.tts,
            AgentStage::EndToEnd => self.end_to_end,
        }
    }
}

impl Turn {
    /// From the end of the caller's speech to the reply; `None` if either is missing, they are reversed, both spoke at the
    /// same time, or the agent's session reports that the caller cut in.
    pub fn reply_delay(&self) -> Option<Duration> {
        if self.overlap || self.cut_in || self.interrupts {
            return None;
        }
        self.replied?.checked_duration_since(self.caller_ended?)
    }

    /// From the start of the interruption until the agent was silent.
    pub fn yield_delay(&self) -> Option<Duration> {
        let started = self.caller_started.filter(|_| self.interrupts)?;
        self.yielded?.checked_duration_since(started)
    }

    /// The part of the reply delay in seconds that the agent does not claim; negative if it claims more than was measured.
    pub fn unexplained_seconds(&self) -> Option<f64> {
        let claim = self.stages.end_to_end?.as_secs_f64();
        Some(self.reply_delay()?.as_secs_f64() - claim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(base: Instant, millis: u64) -> Instant {
        base + Duration::from_millis(millis)
    }

    #[test]
    fn first_sight_of_a_milestone_is_kept() {
        let base = Instant::now();
        let mut timeline = Timeline::default();
        assert!(timeline.mark(Milestone::AgentJoined, at(base, 5)));
        assert!(!timeline.mark(Milestone::AgentJoined, at(base, 3)));
        assert_eq!(timeline.get(Milestone::AgentJoined), Some(at(base, 5)));
        assert_eq!(timeline.marks().count(), 1);
    }

    #[test]
    fn missing_or_backward_span_is_none_never_zero() {
        let base = Instant::now();
        let mut timeline = Timeline::default();
        assert_eq!(timeline.span(Span::AgentJoin), None);
        timeline.mark(Milestone::AgentJoined, at(base, 400));
        assert_eq!(timeline.span(Span::AgentJoin), None);
        timeline.mark(Milestone::DispatchSent, at(base, 401));
        assert_eq!(timeline.span(Span::AgentJoin), None);
    }

    #[test]
    fn signal_span_begins_at_the_start_if_no_room_was_created() {
        let base = Instant::now();
        let mut timeline = Timeline::default();
        timeline.mark(Milestone::Started, base);
        timeline.mark(Milestone::SignalConnected, at(base, 30));
        assert_eq!(timeline.span(Span::Signal), Some(Duration::from_millis(30)));
        assert_eq!(
            timeline.since_started(Milestone::SignalConnected),
            Some(Duration::from_millis(30))
        );
    }

    #[test]
    fn reply_delay_needs_a_reply_after_an_echo_without_overlap() {
        let base = Instant::now();
        let mut turn = Turn {
            caller_ended: Some(at(base, 100)),
            replied: Some(at(base, 900)),
            ..Turn::default()
        };
        assert_eq!(turn.reply_delay(), Some(Duration::from_millis(800)));
        turn.overlap = true;
        assert_eq!(turn.reply_delay(), None);
        turn.overlap = false;
        turn.replied = Some(at(base, 99));
        assert_eq!(turn.reply_delay(), None);
        turn.replied = None;
        assert_eq!(turn.reply_delay(), None);
    }
}
