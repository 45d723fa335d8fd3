//! Turns: which utterance was echoed, whether the agent spoke into the echo, and what counts as its answer.

use std::time::Duration;

use tokio::time::Instant;

use super::Turn;
use crate::config::{Caller, CallerMode};

/// What was heard and echoed so far.
///
/// In continuous mode speech and echo overlap by design: there are no turns and no reply delay. All that can be told
/// is whether the agent spoke again once the echo of its first utterance was over.
#[derive(Debug)]
pub(super) struct Turns {
    mode: CallerMode,
    delay: Duration,
    most: usize,
    list: Vec<Turn>,
    /// The start of the utterance that goes on.
    speaking: Option<Instant>,
    /// The end of the last one.
    spoke_until: Option<Instant>,
    /// The end of an echo that nothing answered yet; in continuous mode possibly ahead.
    unanswered: Option<Instant>,
    answered: bool,
}

impl Turns {
    pub(super) fn new(caller: &Caller) -> Self {
        Self {
            mode: caller.mode,
            delay: caller.silence,
            most: usize::try_from(caller.turns).unwrap_or(usize::MAX),
            list: Vec::new(),
            speaking: None,
            spoke_until: None,
            unanswered: None,
            answered: false,
        }
    }

    /// Whether any echo was answered, overlap or not.
    pub(super) fn answered(&self) -> bool {
        self.answered
    }

    /// The end of the last echo, while nothing answered it.
    pub(super) fn unanswered_since(&self) -> Option<Instant> {
        self.unanswered
    }

    /// Since when an echo has been owed or playing; `None` while the agent still talks before it.
    pub(super) fn caller_turn_since(&self) -> Option<Instant> {
        let turn = self.list.last();
        match turn.and_then(|turn| turn.caller_started) {
            Some(started) => Some(started),
            None if self.speaking.is_some() => None,
            None => self.spoke_until,
        }
    }

    pub(super) fn list(&self) -> &[Turn] {
        &self.list
    }

    pub(super) fn speech_started(&mut self, at: Instant) {
        self.speaking = Some(at);
        if self.mode == CallerMode::PassThrough {
            if self.unanswered.is_some_and(|over| at >= over) {
                self.answer();
            }
            return;
        }
        match self.list.last_mut() {
            None => self.open(at),
            // The agent goes on after a pause: still what it says before the echo.
            Some(turn) if turn.caller_started.is_none() => turn.agent_ended = None,
            Some(turn) => match turn.caller_ended {
                Some(over) if at >= over => {
                    turn.replied.get_or_insert(at);
                    self.answer();
                    self.open(at);
                }
                _ => turn.overlap = true,
            },
        }
    }

    pub(super) fn speech_ended(&mut self, at: Instant) {
        self.speaking = None;
        self.spoke_until = Some(at);
        if self.mode == CallerMode::PassThrough {
            if !self.answered {
                self.unanswered.get_or_insert(at + self.delay);
            }
            return;
        }
        if let Some(turn) = self.list.last_mut()
            && turn.caller_started.is_none_or(|echo| at <= echo)
        {
            turn.agent_ended.get_or_insert(at);
        }
    }

    pub(super) fn caller_started(&mut self, at: Instant) {
        if self.mode == CallerMode::PassThrough {
            return;
        }
        let next = self
            .list
            .last()
            .is_none_or(|turn| turn.caller_started.is_some());
        if next {
            self.list.push(Turn::default());
        }
        if let Some(turn) = self.list.last_mut() {
            turn.caller_started = Some(at);
            turn.overlap = self.speaking.is_some();
        }
    }

    pub(super) fn caller_ended(&mut self, at: Instant) {
        if self.mode == CallerMode::PassThrough {
            return;
        }
        let Some(turn) = self.list.last_mut() else {
            return;
        };
        turn.caller_ended.get_or_insert(at);
        let caller_started = turn.caller_started;
        self.unanswered = Some(at);
        // An utterance that began during the echo and outlasts it answers it, though it has no delay. One that was
        // going on before is what the agent had to say anyway.
        if let Some(speech) = self.speaking
            && caller_started.is_some_and(|echo| speech > echo)
        {
            self.answer();
            self.open(speech);
        }
    }

    fn answer(&mut self) {
        self.unanswered = None;
        self.answered = true;
    }

    /// Opens the turn of an utterance that will be echoed.
    fn open(&mut self, agent_started: Instant) {
        if self.list.len() < self.most {
            self.list.push(Turn {
                agent_started: Some(agent_started),
                ..Turn::default()
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct TurnsScript {
        turns: Turns,
        base: Instant,
    }

    impl TurnsScript {
        fn new(mode: CallerMode, max_turns: u32) -> Self {
            let echo = Caller {
                mode,
                delay: Duration::from_secs(1),
                max_turns,
            };
            Self {
                turns: Turns::new(&echo),
                base: Instant::now(),
            }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.base + Duration::from_secs(seconds)
        }

        /// `S`peech starts and `s` ends, `E`cho starts and `e` ends; `.` lets a second pass.
        fn play(mut self, script: &str) -> Self {
            let mut second = 0;
            for step in script.chars() {
                let at = self.at(second);
                match step {
                    'S' => self.turns.speech_started(at),
                    's' => self.turns.speech_ended(at),
                    'E' => self.turns.caller_started(at),
                    'e' => self.turns.caller_ended(at),
                    _ => second += 1,
                }
            }
            self
        }
    }

    #[test]
    fn plain_turn_has_every_mark_and_a_delay() {
        let script = TurnsScript::new(CallerMode::Echo, 1).play("S.s.E.e..S.s");
        let expected = Turn {
            agent_started: Some(script.at(0)),
            agent_ended: Some(script.at(1)),
            caller_started: Some(script.at(2)),
            caller_ended: Some(script.at(3)),
            replied: Some(script.at(5)),
            overlap: false,
        };
        assert_eq!(script.turns.list(), std::slice::from_ref(&expected));
        assert_eq!(expected.reply_delay(), Some(Duration::from_secs(2)));
        assert!(script.turns.answered());
    }

    #[test]
    fn speech_that_began_before_the_echo_is_overlap_and_no_answer() {
        let script = TurnsScript::new(CallerMode::Echo, 1).play("S.s.S.E.e");
        assert!(script.turns.list()[0].overlap);
        assert!(!script.turns.answered());
        assert_eq!(script.turns.unanswered_since(), Some(script.at(4)));
    }

    #[test]
    fn speech_that_outlasts_the_echo_is_an_answer_without_delay() {
        let script = TurnsScript::new(CallerMode::Echo, 1).play("S.s.E.S.e");
        assert!(script.turns.list()[0].overlap);
        assert_eq!(script.turns.list()[0].reply_delay(), None);
        assert!(script.turns.answered());
    }

    #[test]
    fn speech_within_the_echo_is_no_answer() {
        let script = TurnsScript::new(CallerMode::Echo, 1).play("S.s.E.S.s.e");
        assert!(script.turns.list()[0].overlap);
        assert!(!script.turns.answered());
    }

    #[test]
    fn reply_after_overlap_is_an_answer_without_delay() {
        let script = TurnsScript::new(CallerMode::Echo, 1).play("S.s.E.S.s.e.S");
        let turn = &script.turns.list()[0];
        assert_eq!(turn.replied, Some(script.at(6)));
        assert_eq!(turn.reply_delay(), None);
        assert!(script.turns.answered());
    }

    #[test]
    fn pause_before_the_echo_stays_in_one_turn() {
        let script = TurnsScript::new(CallerMode::Echo, 2).play("S.s.S.s.E.e");
        assert_eq!(script.turns.list().len(), 1);
        assert_eq!(script.turns.list()[0].agent_ended, Some(script.at(3)));
    }

    #[test]
    fn reply_opens_the_next_turn_up_to_the_most() {
        let script = TurnsScript::new(CallerMode::Echo, 2).play("S.s.E.e.S.s.E.e.S.s");
        let delays: Vec<_> = script.turns.list().iter().map(Turn::reply_delay).collect();
        assert_eq!(delays, [Some(Duration::from_secs(1)); 2]);
        assert_eq!(script.turns.unanswered_since(), None);
    }

    #[test]
    fn continuous_echo_has_no_turns() {
        let script = TurnsScript::new(CallerMode::PassThrough, 1).play("SE.s.S.e");
        assert!(script.turns.list().is_empty());
    }

    #[test]
    fn in_continuous_mode_speech_after_the_first_echo_is_an_answer() {
        let script = TurnsScript::new(CallerMode::PassThrough, 1).play("SE..s");
        assert_eq!(script.turns.unanswered_since(), Some(script.at(3)));
        let over = script.at(3);
        let mut turns = script.turns;
        turns.speech_started(over - Duration::from_millis(1));
        assert!(!turns.answered());
        turns.speech_started(over);
        assert!(turns.answered());
    }
}
