//! The transcript of a room, segment by segment, within bounds.

use tokio::time::Instant;

use crate::livekit::event::Speaker;
use crate::livekit::event::{TranscriptSegment, TranscriptText};

/// Segments of one probe, each with at most 1 KiB of text. Later ones are dropped.
const MAX_SEGMENTS: usize = 100;

/// A part of the call as the agent transcribed it.
#[derive(Debug, Clone, PartialEq)]
pub struct TranscriptLine {
    /// When its first words arrived.
    pub at: Instant,
    pub speaker: Speaker,
    pub text: TranscriptText,
    /// `false` if it was cut off or is only a guess so far.
    pub is_final: bool,
}

#[derive(Debug, Default)]
pub(super) struct Transcript {
    segments: Vec<Segment>,
    /// The agent sends text streams. Packets of the older form repeat the same words.
    streams: bool,
}

#[derive(Debug)]
struct Segment {
    identity: String,
    id: String,
    line: TranscriptLine,
}

impl Transcript {
    pub(super) fn record(&mut self, speaker: Speaker, words: TranscriptSegment) {
        if words.older && self.streams {
            return;
        }
        if !words.older && !self.streams {
            self.streams = true;
            self.segments.clear();
        }
        let full = self.segments.len() >= MAX_SEGMENTS;
        let same = |it: &&mut Segment| it.id == words.segment && it.line.speaker == speaker;
        match self.segments.iter_mut().find(same) {
            Some(known) if known.line.is_final => {}
            Some(known) => {
                known.line.text = words.text;
                known.line.is_final = words.is_final;
            }
            None if !full => self.segments.push(Segment {
                identity: words.identity,
                id: words.segment,
                line: TranscriptLine {
                    at: words.began,
                    speaker,
                    text: words.text,
                    is_final: words.is_final,
                },
            }),
            None => {}
        }
    }

    /// The agent was interrupted: its last words were cut off, although their segment ended as usual.
    pub(super) fn cut_off(&mut self) {
        let mut segments = self.segments.iter_mut();
        if let Some(segment) = segments.rfind(|it| it.line.speaker == Speaker::Agent) {
            segment.line.is_final = false;
        }
    }

    /// The text of the segments of a speaker that began within a time; guesses count only if nothing is final.
    pub(super) fn text(
        &self,
        speaker: Speaker,
        agent: Option<&str>,
        within: impl Fn(Instant) -> bool,
    ) -> Option<String> {
        let is_agent = |it: &Segment| Some(it.identity.as_str()) == agent;
        let wanted = |it: &&Segment| {
            it.line.speaker == speaker
                && within(it.line.at)
                && (speaker == Speaker::Caller || is_agent(it))
        };
        let segments = || self.segments.iter().filter(wanted);
        let any_final = segments().any(|it| it.line.is_final);
        let counted = segments().filter(|it| it.line.is_final || !any_final);
        let texts: Vec<&str> = counted.map(|it| it.line.text.as_str()).collect();
        (!texts.is_empty()).then(|| texts.join(" "))
    }

    /// Returns the lines of the caller and of the agent with this identity, in order of time. Lines of other agents are
    /// dropped.
    pub(super) fn into_lines(self, agent: Option<&str>) -> Vec<TranscriptLine> {
        let ours = |segment: &Segment| match segment.line.speaker {
            Speaker::Caller => true,
            Speaker::Agent => Some(segment.identity.as_str()) == agent,
        };
        let segments = self.segments.into_iter().filter(ours);
        let mut lines: Vec<_> = segments.map(|segment| segment.line).collect();
        lines.sort_by_key(|it| it.at);
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The lines that remain of segments that arrive one per second: segment, text, whether final, whether in the older form.
    fn lines(segments: &[(Speaker, &str, &str, bool, bool)]) -> Vec<(u64, String, bool)> {
        let start = Instant::now();
        let mut transcript = Transcript::default();
        for (second, (speaker, segment, text, is_final, older)) in (0..).zip(segments) {
            let words = TranscriptSegment {
                identity: "agent-x".to_owned(),
                track: None,
                segment: (*segment).to_owned(),
                text: TranscriptText::new(text),
                is_final: *is_final,
                began: start + Duration::from_secs(second),
                older: *older,
            };
            transcript.record(*speaker, words);
        }
        let lines = transcript.into_lines(Some("agent-x")).into_iter();
        lines
            .map(|it| {
                (
                    (it.at - start).as_secs(),
                    it.text.as_str().to_owned(),
                    it.is_final,
                )
            })
            .collect()
    }

    #[test]
    fn repeated_segment_replaces_the_last_one_until_it_is_final() {
        use Speaker::Caller;
        let segments = [
            (Caller, "a", "hel", false, false),
            (Caller, "a", "hello", false, false),
            (Caller, "a", "Hello.", true, false),
            (Caller, "a", "hell", false, false),
        ];
        assert_eq!(lines(&segments), [(0, "Hello.".to_owned(), true)]);
    }

    #[test]
    fn both_forms_of_the_same_words_are_one_line() {
        use Speaker::Agent;
        let older = (Agent, "SG_1", "Good", false, true);
        assert_eq!(lines(&[older]), [(0, "Good".to_owned(), false)]);
        let segments = [
            older,
            (Agent, "SG_2", "Good day", true, false),
            (Agent, "SG_1", "Good day", true, true),
        ];
        assert_eq!(lines(&segments), [(1, "Good day".to_owned(), true)]);
    }

    #[test]
    fn lines_of_other_agents_are_dropped_and_those_of_the_caller_are_not() {
        for (agent, count) in [(Some("agent-x"), 2), (Some("agent-y"), 1), (None, 1)] {
            let mut transcript = Transcript::default();
            for speaker in [Speaker::Agent, Speaker::Caller] {
                let words = TranscriptSegment {
                    identity: "agent-x".to_owned(),
                    track: None,
                    segment: "a".to_owned(),
                    text: TranscriptText::new("hello"),
                    is_final: true,
                    began: Instant::now(),
                    older: false,
                };
                transcript.record(speaker, words);
            }
            assert_eq!(transcript.into_lines(agent).len(), count, "{agent:?}");
        }
    }

    #[test]
    fn endless_talk_is_recorded_up_to_a_bound() {
        let ids: Vec<_> = (0..1000).map(|id| id.to_string()).collect();
        let segments: Vec<_> = ids
            .iter()
            .map(|id| (Speaker::Agent, id.as_str(), "so", true, false))
            .collect();
        assert_eq!(lines(&segments).len(), MAX_SEGMENTS);
    }
}
