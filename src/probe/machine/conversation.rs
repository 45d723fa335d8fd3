//! The conversation: what the caller says, what the agent's session reports, and whether a reply is the one that is expected.

use std::time::Duration;

use tokio::time::Instant;

use super::{MAX_ENTRIES, ProbeMachine};
use crate::config::{CallerLine, CallerMode};
use crate::livekit::event::{
    CallerTurn, SessionEvent, SessionMessage, Speaker, TranscriptText, TurnMetrics, to_microseconds,
};
use crate::probe::verdict::{AgentDuty, names_inference_limit, quote};
use crate::probe::words::{contains_any, word_error};
use crate::probe::{AgentTurn, Outcome, ProbeEvent, SessionEntry, Turn, TurnResult, TurnStages};

/// Entries of the evidence on the agent's session; a conversation of many turns has more than other lists.
const MAX_SESSION_ENTRIES: usize = 100;

/// Messages of the conversation whose texts are compared.
const MAX_MESSAGES: usize = 300;

/// The least difference of two times.
const TICK: Duration = Duration::from_nanos(1);

/// A longer text was cut when it was received, and can't be compared.
const MAX_COMPARED_BYTES: usize = 1_000;

/// A message of the agent's session, and when it was said.
#[derive(Debug)]
pub(super) struct Message {
    at: Instant,
    speaker: Speaker,
    text: TranscriptText,
    interrupted: bool,
}

/// A reply that is not the expected one.
#[derive(Debug, Clone)]
pub(super) struct ReplyFault {
    /// The number of its turn, from 1.
    pub(super) turn: usize,
    pub(super) what: String,
}

/// The texts of one turn.
#[derive(Debug, Default)]
struct TurnTexts {
    said: Option<String>,
    heard: Option<String>,
    reply: Option<String>,
}

impl ProbeMachine {
    pub(super) fn is_agent(&self, identity: &str) -> bool {
        let agent = self.report.agent.as_ref();
        agent.is_some_and(|agent| agent.identity == identity)
    }

    /// The caller begins to speak, which ends its last turn: whatever voice came after that was the reply, or there is none.
    pub(super) fn caller_started(&mut self, what: CallerTurn, at: Instant, now: Instant) {
        self.turns.close_before(what);
        let last = self.turns.last_said();
        let unanswered = last.is_some_and(|turn| turn.result == TurnResult::Unanswered);
        if unanswered && self.target.expect.reply {
            self.final_check(AgentDuty::Reply, now);
            return;
        }
        // The text of a reply that is interrupted comes later.
        let fault = if what.interrupts {
            None
        } else {
            self.reply_fault()
        };
        if let Some(fault) = fault {
            self.blame_reply(fault, now);
            return;
        }
        self.turns.caller_started(what, at);
        let to_verdict = self.time_to_verdict(now);
        if self.turns.list().len() <= self.target.caller.turns as usize + 1 {
            self.emit(ProbeEvent::TurnStarted { to_verdict });
        }
    }

    /// The turn's time is over: a voice after it is its reply, unless the agent's session contradicts that. Without a voice,
    /// nothing answered it.
    pub(super) fn end_turn(&mut self, now: Instant) {
        self.turns.close();
        if let Some(fault) = self.reply_fault() {
            self.blame_reply(fault, now);
        }
    }

    /// Everything that is expected has happened, unless the last reply was not the expected one.
    pub(super) fn conclude(&mut self, now: Instant) {
        match self.reply_fault() {
            Some(fault) => self.blame_reply(fault, now),
            None => self.decide(Outcome::Ok, now),
        }
    }

    fn blame_reply(&mut self, fault: ReplyFault, now: Instant) {
        self.wrong_reply = Some(fault);
        self.final_check(AgentDuty::Words, now);
    }

    // What the agent's session reports.

    pub(super) fn session_event(&mut self, identity: &str, event: SessionEvent, at: Instant) {
        if !self.is_agent(identity) {
            return;
        }
        if self.outcome.is_none() {
            self.turns.session_event(&event);
        }
        // The attribute `lk.agent.state` shows the states, too.
        if !matches!(event, SessionEvent::AgentState(_)) {
            self.record_session(&event, at);
        }
        match event {
            SessionEvent::Error(message) => self.agent_error(message),
            SessionEvent::Message(message) => self.message_added(message, at),
            _ => {}
        }
        // What a reply needs may be known before its time is over.
        if self.outcome.is_none()
            && self.claim.listens()
            && self.turns.is_reported()
            && self.reply_fault().is_none()
        {
            self.turns.close();
        }
    }

    /// The agent may recover from an error, so an error alone is only evidence.
    fn agent_error(&mut self, message: String) {
        self.add_note(format!("the agent reported an error: {}", quote(&message)));
        if self.outcome.is_none() {
            if names_inference_limit(&message) {
                self.inference_limit.get_or_insert_with(|| message.clone());
            }
            self.agent_error = Some(message);
        }
    }

    fn message_added(&mut self, message: SessionMessage, at: Instant) {
        if message.interrupted && message.speaker == Speaker::Agent {
            self.transcript.cut_off();
            if self.turns.last_said().is_some_and(|turn| turn.cut_in) {
                self.add_note(
                    "the caller cut in: the agent's session reported that it was interrupted, and the rest of what it had to say \
                     was not spoken. If the agent pauses for that long, raise caller.silence"
                        .to_owned(),
                );
            }
        }
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(Message {
                at: self.time_of(&message, at),
                speaker: message.speaker,
                text: message.text,
                interrupted: message.interrupted,
            });
        }
        if let Some(metrics) = message.metrics {
            self.claim_stages(&metrics);
            self.record_metrics(metrics, at);
        }
    }

    /// When a message that arrived at `at` was said. An interrupted one was said before the caller spoke.
    fn time_of(&self, message: &SessionMessage, at: Instant) -> Instant {
        let last = self.turns.last_said().filter(|_| message.interrupted);
        let unanswered = last.filter(|turn| turn.replied.is_none());
        let before = unanswered.and_then(|turn| turn.caller_started?.checked_sub(TICK));
        before.map_or(at, |before| before.min(at))
    }

    /// The metrics of a message follow its playout. Those of the agent belong to the last turn that it answered.
    fn claim_stages(&mut self, metrics: &TurnMetrics) {
        let turns = self.turns.list_mut();
        let turn = match metrics.speaker {
            Speaker::Caller => turns.iter_mut().rfind(|turn| turn.caller_started.is_some()),
            Speaker::Agent => turns.iter_mut().rfind(|turn| turn.replied.is_some()),
        };
        if let Some(turn) = turn {
            turn.stages.claim(metrics);
        }
    }

    fn record_metrics(&mut self, metrics: TurnMetrics, at: Instant) {
        let at = self.since_started(at);
        let entries = &mut self.report.evidence.agent_metrics;
        if entries.len() < MAX_ENTRIES
            && let Some(at) = at
        {
            entries.push(AgentTurn { at, metrics });
        }
    }

    pub(super) fn record_session(&mut self, event: &SessionEvent, at: Instant) {
        let at = self.since_started(at);
        let entries = &mut self.report.evidence.session;
        if entries.len() < MAX_SESSION_ENTRIES
            && let (Some(at), Some(entry)) = (at, SessionEntry::of(event))
        {
            entries.push(SessionEntry { at, ..entry });
        }
    }

    fn since_started(&self, at: Instant) -> Option<f64> {
        let since = self.report.timeline.since_start(at)?;
        Some(to_microseconds(since.as_secs_f64()))
    }

    // What is expected of a reply.

    /// The first turn whose reply is not the expected one.
    fn reply_fault(&self) -> Option<ReplyFault> {
        let turns = self.turns.list().iter();
        let mut number = 0;
        turns.enumerate().find_map(|(index, turn)| {
            number += usize::from(!turn.interrupts);
            let what = turn.replied.and_then(|_| self.fault_of(index))?;
            Some(ReplyFault { turn: number, what })
        })
    }

    /// What is wrong with the reply to the turn with this index.
    fn fault_of(&self, index: usize) -> Option<String> {
        let turn = &self.turns.list()[index];
        let texts = self.texts(index);
        if let Some(line) = self.line_of(turn) {
            let reply = texts.reply.as_deref();
            let fault = missing_words(line, reply).or_else(|| self.missing_tool(line, turn));
            if fault.is_some() {
                return fault;
            }
        }
        let limit = self.target.expect.word_error_below?;
        let error = self
            .word_error_of(turn, &texts)
            .filter(|error| *error >= limit)?;
        Some(format!(
            "the agent understood the caller with a word error of {:.0} %, and expect.word_error_below is {:.0} %",
            error * 100.0,
            limit * 100.0
        ))
    }

    fn line_of(&self, turn: &Turn) -> Option<&CallerLine> {
        self.target.caller.lines.get(turn.line?)
    }

    fn missing_tool(&self, line: &CallerLine, turn: &Turn) -> Option<String> {
        let tool = line.expected_tool.as_ref()?;
        let from = self.since_started(turn.caller_started?)?;
        let mut runs = self.report.evidence.session.iter().filter(|entry| {
            entry.at >= from
                && entry.event == SessionEntry::TOOL_EXECUTED
                && entry.name.as_ref() == Some(tool)
        });
        let mut failed = runs.clone();
        if runs.any(|entry| entry.is_error == Some(false)) {
            return None;
        }
        Some(match failed.next() {
            Some(_) => format!("the agent ran the tool \"{tool}\", but the tool failed"),
            None => format!("the agent did not run the tool \"{tool}\""),
        })
    }

    // Texts.

    /// Notes that a reply rests on the canary's ear alone.
    pub(super) fn note_unconfirmed(&mut self) {
        let mut turns = self.turns.list().iter();
        if turns.any(|turn| turn.result == TurnResult::Answered && turn.confirmed.is_none()) {
            self.add_note(
                "the agent's session reports nothing to the canary, so nothing confirms that its reply answers the caller"
                    .to_owned(),
            );
        }
    }

    /// Adds to each turn what was said and understood. The texts themselves are only kept where transcripts are.
    pub(super) fn describe_turns(&mut self) {
        for index in 0..self.turns.list().len() {
            let texts = self.texts(index);
            let error = self.word_error_of(&self.turns.list()[index], &texts);
            let turn = &mut self.turns.list_mut()[index];
            turn.word_error = error;
            if self.target.transcript {
                let text = |text: Option<String>| text.map(|text| TranscriptText::new(&text));
                turn.said = text(texts.said);
                turn.heard = text(texts.heard);
                turn.reply_text = text(texts.reply);
            }
        }
    }

    /// The texts of the turn with this index.
    fn texts(&self, index: usize) -> TurnTexts {
        let list = self.turns.list();
        let turn = &list[index];
        let Some(started) = turn.caller_started else {
            return TurnTexts::default();
        };
        let before = list[..index]
            .iter()
            .rev()
            .find_map(|turn| turn.caller_started);
        let next = list.get(index + 1).and_then(|turn| turn.caller_started);
        let agent_said = || self.text(Speaker::Agent, before, Some(started));
        let said = match self.line_of(turn) {
            _ if turn.interrupts => None,
            Some(line) => line.text.clone(),
            None => agent_said(),
        };
        TurnTexts {
            said,
            heard: self.text(Speaker::Caller, Some(started), next),
            reply: self.text(Speaker::Agent, Some(started), next),
        }
    }

    /// What was said from one time on to another, by the messages of the agent's session, or else by its transcript.
    fn text(&self, speaker: Speaker, from: Option<Instant>, to: Option<Instant>) -> Option<String> {
        let messages = self.messages_of(speaker, from, to);
        let texts: Vec<&str> = messages.map(|message| message.text.as_str()).collect();
        if !texts.is_empty() {
            return Some(texts.join(" "));
        }
        let agent = self.report.agent.as_ref().map(|agent| &*agent.identity);
        let within = |at| is_within(at, from, to);
        self.transcript.text(speaker, agent, within)
    }

    fn messages_of(
        &self,
        speaker: Speaker,
        from: Option<Instant>,
        to: Option<Instant>,
    ) -> impl Iterator<Item = &Message> {
        let all = self.messages.iter();
        all.filter(move |message| message.speaker == speaker && is_within(message.at, from, to))
    }

    /// `None` if either text is missing, or if not everything that was said was to be heard.
    fn word_error_of(&self, turn: &Turn, texts: &TurnTexts) -> Option<f64> {
        let (said, heard) = (texts.said.as_ref()?, texts.heard.as_ref()?);
        let is_echo = self.target.caller.mode == CallerMode::Echo;
        let long = || {
            let length = turn.agent_ended.zip(turn.agent_started);
            length.is_none_or(|(ended, started)| {
                ended.saturating_duration_since(started) > CallerTurn::MAX_ECHO
            })
        };
        let cut = said.len().max(heard.len()) >= MAX_COMPARED_BYTES;
        if turn.overlap || turn.cut_in || cut || is_echo && (long() || self.was_interrupted(turn)) {
            return None;
        }
        word_error(said, heard)
    }

    /// Whether what the agent said before this turn was cut off: its text is longer than what was heard of it.
    fn was_interrupted(&self, turn: &Turn) -> bool {
        let (from, to) = (turn.agent_started, turn.caller_started);
        let mut own = self.messages_of(Speaker::Agent, from, to);
        from.and(to).is_some() && own.any(|message| message.interrupted)
    }
}

/// Whether a time is within two others, of which the second does not count; without one, there is no bound.
fn is_within(at: Instant, from: Option<Instant>, to: Option<Instant>) -> bool {
    from.is_none_or(|from| at >= from) && to.is_none_or(|to| at < to)
}

/// What the reply lacks of the words that the line expects.
fn missing_words(line: &CallerLine, reply: Option<&str>) -> Option<String> {
    if line.expected_words.is_empty() {
        return None;
    }
    let Some(reply) = reply else {
        return Some(
            "the agent sent no transcript of its reply, so the expected words could not be found"
                .to_owned(),
        );
    };
    let missing = line
        .expected_words
        .iter()
        .filter(|any| !contains_any(reply, any));
    let missing: Vec<String> = missing
        .map(|any| format!("\"{}\"", any.join("|")))
        .collect();
    (!missing.is_empty())
        .then(|| format!("the agent's reply did not contain {}", missing.join(", ")))
}

impl TurnStages {
    fn claim(&mut self, metrics: &TurnMetrics) {
        let set = |stage: &mut Option<Duration>, seconds: Option<f64>| {
            let claimed = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
            *stage = stage.or(claimed);
        };
        set(&mut self.transcription, metrics.transcription_delay_seconds);
        set(&mut self.end_of_turn, metrics.end_of_turn_delay_seconds);
        set(&mut self.llm, metrics.llm_ttft_seconds);
        set(&mut self.tts, metrics.tts_ttfb_seconds);
        set(&mut self.end_to_end, metrics.e2e_latency_seconds);
    }
}
