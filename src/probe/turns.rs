//! Turns: what the agent said, what the caller said then, and what counts as the agent's reply.
//!
//! A voice after the caller's speech is only a candidate: the rest of a greeting sounds like an answer. It is the reply if the
//! agent's session does not contradict it. That is decided when the turn closes: after the agent's last word its session has
//! time to report.

use std::time::Duration;

use tokio::time::Instant;

use super::{Turn, TurnResult};
use crate::config::{Caller, CallerMode};
use crate::livekit::event::{CallerTurn, SessionEvent, SessionMessage, Speaker, UplinkReport};

/// The metrics and the transcript of a message follow its playout within this time.
pub(super) const EVIDENCE_WAIT: Duration = Duration::from_secs(2);

/// An agent that is silent for this long has yielded.
pub(super) const YIELD_SILENCE: Duration = Duration::from_secs(1);

/// What the conversation waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The agent talks since then, and the caller waits for its turn.
    AgentPause { since: Instant },
    /// The caller's turn is due since then.
    CallerTurn { since: Instant },
    /// The caller speaks since then.
    CallerSpeech { since: Instant },
    /// The caller's speech ended then, and nothing answered it yet.
    Reply { since: Instant },
    /// The agent replies since then.
    ReplyEnd { since: Instant },
    /// The agent's session may report the turn until then.
    Evidence { until: Instant },
    /// No turn is due.
    Nothing,
}

/// Why a voice after the caller's speech is no reply to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contradiction {
    /// The agent's session reported nothing of the caller since its turn began.
    NotHeard,
    /// The agent's session reported an error since then, and no message that shows that it recovered.
    Error,
    /// The voice began while the caller spoke, and no session confirms that the agent heard the caller.
    Unconfirmed,
}

/// What LiveKit received of the caller's last turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UplinkProof {
    /// Its receiver reports cover the turn, and less than half of the packets was lost.
    Received,
    /// They cover the turn: of `of` packets, `lost` were lost.
    Lost { lost: u64, of: u64 },
    /// No report covers the turn.
    Unreported,
}

/// What was said and heard so far.
#[derive(Debug)]
pub(super) struct Turns {
    mode: CallerMode,
    /// How many turns the caller takes, excluding an interruption.
    wanted: usize,
    list: Vec<Turn>,
    voice: AgentVoice,
    /// The agent's session reports to the canary.
    has_session: bool,
    last: LastTurn,
    uplink: Uplink,
}

/// When the agent spoke.
#[derive(Debug, Default)]
struct AgentVoice {
    /// The start of the utterance that goes on.
    speaking: Option<Instant>,
    /// The end of the last one.
    spoke_until: Option<Instant>,
    /// The start of the first one since the caller's last turn.
    since: Option<Instant>,
}

/// What is known of the caller's last turn in addition to its marks.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is an independent fact")]
struct LastTurn {
    /// The agent's session reported something of the caller.
    heard: bool,
    /// It reported an error from which it has not recovered.
    failed: bool,
    /// It reported the metrics of a message of the agent after the caller's speech.
    reported: bool,
    /// The last voice that was no reply.
    rejected: Option<Contradiction>,
    closed: bool,
}

/// Receiver reports of LiveKit for the caller's track.
#[derive(Debug, Default)]
struct Uplink {
    last: UplinkReport,
    /// The last report before the turn.
    before: UplinkReport,
    /// Packets sent at the end of the turn.
    sent: u64,
}

impl Turns {
    pub(super) fn new(caller: &Caller) -> Self {
        Self {
            mode: caller.mode,
            wanted: usize::try_from(caller.turns).unwrap_or(usize::MAX),
            list: Vec::new(),
            voice: AgentVoice::default(),
            has_session: false,
            last: LastTurn::default(),
            uplink: Uplink::default(),
        }
    }

    pub(super) fn list(&self) -> &[Turn] {
        &self.list
    }

    pub(super) fn list_mut(&mut self) -> &mut [Turn] {
        &mut self.list
    }

    /// The turn that the caller took last.
    pub(super) fn last_said(&self) -> Option<&Turn> {
        self.list
            .last()
            .filter(|turn| turn.caller_started.is_some())
    }

    /// How many turns the caller has taken, excluding an interruption.
    pub(super) fn taken(&self) -> usize {
        self.taken_turns().count()
    }

    fn taken_turns(&self) -> impl Iterator<Item = &Turn> {
        let turns = self.list.iter();
        turns.filter(|turn| turn.caller_started.is_some() && !turn.interrupts)
    }

    /// Whether the caller has spoken, and every turn was answered so far.
    pub(super) fn answered(&self) -> bool {
        self.taken() > 0 && self.taken_turns().all(|turn| turn.replied.is_some())
    }

    /// Why the last voice was no reply to the caller's last turn.
    pub(super) fn rejected(&self) -> Option<Contradiction> {
        self.last.rejected
    }

    /// Whether the agent's session reported that it heard the last turn; `None` if it reports nothing.
    pub(super) fn confirmed(&self) -> Option<bool> {
        (self.has_session || self.last.heard).then_some(self.last.heard)
    }

    /// Whether the agent has been speaking since before this time.
    pub(super) fn speaks_since(&self, before: Instant) -> bool {
        self.voice.speaking.is_some_and(|since| since <= before)
    }

    /// What the conversation waits for, once the agent has spoken or the caller has.
    pub(super) fn awaited(&self) -> Awaited {
        if self.mode == CallerMode::PassThrough {
            return Awaited::Nothing;
        }
        if let Some(turn) = self.last_said()
            && !self.last.closed
        {
            return self.awaited_in(turn);
        }
        if self.taken() >= self.wanted {
            return Awaited::Nothing;
        }
        match &self.voice {
            AgentVoice {
                speaking: Some(speaking),
                since,
                ..
            } => Awaited::AgentPause {
                since: since.unwrap_or(*speaking),
            },
            AgentVoice { spoke_until, .. } => match spoke_until {
                Some(since) => Awaited::CallerTurn { since: *since },
                None => Awaited::Nothing,
            },
        }
    }

    /// What a turn waits for that the caller has begun.
    fn awaited_in(&self, turn: &Turn) -> Awaited {
        let (Some(started), Some(ended)) = (turn.caller_started, turn.caller_ended) else {
            return match turn.caller_started {
                Some(since) => Awaited::CallerSpeech { since },
                None => Awaited::Nothing,
            };
        };
        // Nothing is due from an agent that does not yield: it finishes what it says.
        let due = !turn.interrupts || turn.yielded.is_some();
        match (turn.replied, self.voice.speaking) {
            (None, _) if due => Awaited::Reply { since: ended },
            (replied, Some(speaking)) => Awaited::ReplyEnd {
                since: replied.unwrap_or(speaking.max(started)),
            },
            (_, None) => {
                let silent_since = self.voice.spoke_until.map_or(ended, |it| it.max(ended));
                Awaited::Evidence {
                    until: silent_since + EVIDENCE_WAIT,
                }
            }
        }
    }

    // What is heard.

    pub(super) fn speech_started(&mut self, at: Instant) {
        self.voice.speaking = Some(at);
        self.voice.since.get_or_insert(at);
        if self.mode == CallerMode::PassThrough {
            return;
        }
        let Some(turn) = self.list.last_mut() else {
            self.list.push(Turn {
                agent_started: Some(at),
                ..Turn::default()
            });
            return;
        };
        let Some(started) = turn.caller_started else {
            // The agent goes on after a pause: still what it says before the caller.
            turn.agent_ended = None;
            return;
        };
        // A pause was no yielding.
        turn.yielded = turn.yielded.filter(|it| at >= *it + YIELD_SILENCE);
        match turn.caller_ended {
            Some(ended) if at >= ended => {
                if !self.last.closed {
                    turn.replied.get_or_insert(at);
                }
            }
            _ => turn.overlap |= at >= started && !turn.interrupts,
        }
    }

    pub(super) fn speech_ended(&mut self, at: Instant) {
        self.voice.speaking = None;
        self.voice.spoke_until = Some(at);
        let Some(turn) = self.list.last_mut() else {
            return;
        };
        match turn.caller_started {
            None => turn.agent_ended = Some(at),
            Some(_) if turn.replied.is_some() => {
                if !self.last.closed {
                    turn.reply_ended = Some(at);
                }
            }
            Some(started) if turn.interrupts => {
                let limit = turn
                    .caller_ended
                    .map(|ended| ended + CallerTurn::MAX_YIELD_AFTER);
                let in_time = at >= started && limit.is_none_or(|limit| at <= limit);
                turn.yielded = in_time.then_some(at);
                if let [.., interrupted, _] = self.list.as_mut_slice() {
                    interrupted.reply_ended = Some(at);
                }
            }
            Some(started) if at <= started => turn.agent_ended = Some(at),
            Some(_) => {}
        }
    }

    // What the caller says.

    pub(super) fn caller_started(&mut self, what: CallerTurn, at: Instant) {
        if self.mode == CallerMode::PassThrough {
            return;
        }
        let since = self.voice.since.take();
        if self
            .list
            .last()
            .is_none_or(|turn| turn.caller_started.is_some())
        {
            self.list.push(Turn {
                agent_started: since,
                agent_ended: self.voice.spoke_until.filter(|_| since.is_some()),
                ..Turn::default()
            });
        }
        let turn = self
            .list
            .last_mut()
            .expect("one was pushed if there was none");
        if self.voice.speaking.is_some() {
            turn.agent_ended = None;
            turn.overlap = !what.interrupts;
        }
        turn.caller_started = Some(at);
        turn.line = what.line;
        turn.interrupts = what.interrupts;
        self.last = LastTurn::default();
        self.uplink.before = self.uplink.last;
    }

    /// `sent`: packets of the caller's track so far.
    pub(super) fn caller_ended(&mut self, sent: u64, at: Instant) {
        self.uplink.sent = sent;
        let speaking = self.voice.speaking;
        let Some(turn) = self.list.last_mut() else {
            return;
        };
        if turn.caller_started.is_none() || turn.caller_ended.is_some() {
            return;
        }
        turn.caller_ended = Some(at);
        // An utterance that began during the caller's speech and outlasts it may be the reply, though it has no delay.
        if !turn.interrupts && speaking > turn.caller_started {
            turn.replied = speaking;
        }
    }

    pub(super) fn uplink_reported(&mut self, report: UplinkReport) {
        self.uplink.last = report;
    }

    /// What LiveKit received of the caller's last turn.
    pub(super) fn uplink_proof(&self) -> UplinkProof {
        let Uplink { last, before, sent } = &self.uplink;
        if last.covered < *sent || last.covered <= before.covered {
            return UplinkProof::Unreported;
        }
        let of = last.covered - before.covered;
        let lost = last.lost.saturating_sub(before.lost);
        if lost * 2 < of {
            UplinkProof::Received
        } else {
            UplinkProof::Lost { lost, of }
        }
    }

    // What the agent's session reports.

    /// The caller was transcribed in a text stream, which agents without a session host send, too.
    pub(super) fn caller_transcribed(&mut self) {
        self.last.heard |= self.last_said().is_some();
    }

    pub(super) fn session_event(&mut self, event: &SessionEvent) {
        self.has_session = true;
        if self.last_said().is_none() {
            return;
        }
        match event {
            SessionEvent::Error(_) => self.last.failed = true,
            SessionEvent::CallerSpeaks(true) | SessionEvent::CallerTranscribed { .. } => {
                self.last.heard = true;
            }
            SessionEvent::Message(message) => self.message_added(message),
            _ => {}
        }
    }

    fn message_added(&mut self, message: &SessionMessage) {
        let Some(turn) = self.list.last_mut() else {
            return;
        };
        match message.speaker {
            Speaker::Caller => self.last.heard = true,
            Speaker::Agent if message.interrupted => {
                if !turn.interrupts && turn.replied.is_none() {
                    turn.cut_in = true;
                }
            }
            Speaker::Agent => {
                // It finished what it said, so it did not yield.
                if turn.interrupts && turn.replied.is_none() {
                    turn.yielded = None;
                }
                // A text that the agent was only asked to speak has no metrics, or those of its TTS alone (`_tts_task_impl` of
                // livekit-agents 1.8.9). It shows no recovery. A realtime model has neither an LLM's nor a TTS's.
                if let Some(metrics) = &message.metrics {
                    let is_fixed_text =
                        metrics.llm_ttft_seconds.is_none() && metrics.tts_ttfb_seconds.is_some();
                    self.last.failed &= is_fixed_text;
                    self.last.reported |= turn.replied.is_some();
                }
            }
        }
    }

    // The result.

    /// Whether the session has reported the reply of a turn that is still open, and the agent is silent again.
    pub(super) fn is_reported(&self) -> bool {
        let replied = self.last_said().is_some_and(|turn| turn.replied.is_some());
        replied && self.last.reported && !self.last.closed && self.voice.speaking.is_none()
    }

    /// Ends the last turn because the caller speaks again.
    pub(super) fn close_before(&mut self, what: CallerTurn) {
        // An interrupted reply can't show any more that the agent recovered from an error.
        self.last.failed &= !what.interrupts;
        self.close();
    }

    /// Ends the last turn, and decides whether the voice after it is a reply. If it is none, the turn stays open.
    pub(super) fn close(&mut self) {
        if self.last.closed {
            return;
        }
        self.last.closed = self.set_result().is_none();
    }

    /// Returns why the voice after the turn is no reply.
    fn set_result(&mut self) -> Option<Contradiction> {
        let confirmed = self.confirmed();
        let contradiction = self.contradiction();
        let turn = self.list.last_mut()?;
        turn.caller_ended?;
        turn.confirmed = confirmed;
        if contradiction.is_some() {
            self.last.rejected = contradiction;
            turn.replied = None;
            turn.reply_ended = None;
        }
        turn.result = match turn.replied {
            None if turn.interrupts && turn.yielded.is_none() => TurnResult::Overlapped,
            None => TurnResult::Unanswered,
            Some(_) if turn.overlap || turn.cut_in => TurnResult::Overlapped,
            Some(_) => TurnResult::Answered,
        };
        contradiction
    }

    /// What contradicts that the voice after the last turn is a reply.
    fn contradiction(&self) -> Option<Contradiction> {
        let turn = self.last_said()?;
        let (replied, ended) = (turn.replied?, turn.caller_ended?);
        if self.has_session && !self.last.heard {
            Some(Contradiction::NotHeard)
        } else if self.last.failed {
            Some(Contradiction::Error)
        } else if replied < ended && !self.last.heard {
            Some(Contradiction::Unconfirmed)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests;
