//! What was said in the room, segment by segment, within bounds.

use tokio::time::Instant;

use crate::livekit::event::Speaker;
use crate::livekit::event::{TranscriptSegment, TranscriptText};

/// Segments of one probe, the text of each at most 1 KiB; what comes later isn't kept.
const MOST_SEGMENTS: usize = 100;

/// A stretch of speech in the agent's own writing.
#[derive(Debug, Clone, PartialEq)]
pub struct Said {
    /// When the first of its words came.
    pub at: Instant,
    pub speaker: Speaker,
    pub text: TranscriptText,
    /// `false`: cut off, or only guessed so far.
    pub is_final: bool,
}

#[derive(Debug, Default)]
pub(super) struct Transcript {
    segments: Vec<Segment>,
    /// Streams came: what packets of the older form say is the same once more.
    streams: bool,
}

#[derive(Debug)]
struct Segment {
    identity: String,
    id: String,
    said: Said,
}

impl Transcript {
    pub(super) fn hear(&mut self, speaker: Speaker, words: TranscriptSegment) {
        if words.older && self.streams {
            return;
        }
        if !words.older && !self.streams {
            self.streams = true;
            self.segments.clear();
        }
        let full = self.segments.len() >= MOST_SEGMENTS;
        let same = |it: &&mut Segment| it.id == words.segment && it.said.speaker == speaker;
        match self.segments.iter_mut().find(same) {
            Some(known) if known.said.is_final => {}
            Some(known) => {
                known.said.text = words.text;
                known.said.is_final = words.is_final;
            }
            None if !full => self.segments.push(Segment {
                identity: words.identity,
                id: words.segment,
                said: Said {
                    at: words.began,
                    speaker,
                    text: words.text,
                    is_final: words.is_final,
                },
            }),
            None => {}
        }
    }

    /// In the order of time: what we said, and what the agent of this identity did. A stray speaks for itself.
    pub(super) fn of(self, agent: Option<&str>) -> Vec<Said> {
        let ours = |segment: &Segment| match segment.said.speaker {
            Speaker::Caller => true,
            Speaker::Agent => Some(segment.identity.as_str()) == agent,
        };
        let segments = self.segments.into_iter().filter(ours);
        let mut said: Vec<_> = segments.map(|segment| segment.said).collect();
        said.sort_by_key(|it| it.at);
        said
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What is kept of words told one a second: segment, text, whether final, whether in the older form.
    fn kept(told: &[(Speaker, &str, &str, bool, bool)]) -> Vec<(u64, String, bool)> {
        let start = Instant::now();
        let mut transcript = Transcript::default();
        for (second, (speaker, segment, text, is_final, older)) in (0..).zip(told) {
            let words = TranscriptSegment {
                identity: "agent-x".to_owned(),
                track: None,
                segment: (*segment).to_owned(),
                text: TranscriptText::new(text),
                is_final: *is_final,
                began: start + Duration::from_secs(second),
                older: *older,
            };
            transcript.hear(*speaker, words);
        }
        let said = transcript.of(Some("agent-x")).into_iter();
        said.map(|it| {
            (
                (it.at - start).as_secs(),
                it.text.as_str().to_owned(),
                it.is_final,
            )
        })
        .collect()
    }

    #[test]
    fn a_segment_that_is_told_again_is_replaced_until_it_is_final() {
        use Speaker::Caller;
        let told = [
            (Caller, "a", "hel", false, false),
            (Caller, "a", "hello", false, false),
            (Caller, "a", "Hello.", true, false),
            (Caller, "a", "hell", false, false),
        ];
        assert_eq!(kept(&told), [(0, "Hello.".to_owned(), true)]);
    }

    #[test]
    fn both_forms_of_the_same_words_are_one() {
        use Speaker::Agent;
        let older = (Agent, "SG_1", "Good", false, true);
        assert_eq!(kept(&[older]), [(0, "Good".to_owned(), false)]);
        let told = [
            older,
            (Agent, "SG_2", "Good day", true, false),
            (Agent, "SG_1", "Good day", true, true),
        ];
        assert_eq!(kept(&told), [(1, "Good day".to_owned(), true)]);
    }

    #[test]
    fn words_of_a_stray_are_left_out_and_ours_are_not() {
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
                transcript.hear(speaker, words);
            }
            assert_eq!(transcript.of(agent).len(), count, "{agent:?}");
        }
    }

    #[test]
    fn endless_talk_is_kept_up_to_a_bound() {
        let ids: Vec<_> = (0..1000).map(|id| id.to_string()).collect();
        let told: Vec<_> = ids
            .iter()
            .map(|id| (Speaker::Agent, id.as_str(), "so", true, false))
            .collect();
        assert_eq!(kept(&told).len(), MOST_SEGMENTS);
    }
}
