use super::*;
use crate::livekit::event::{TranscriptText, TurnMetrics};

struct TurnsScript {
    turns: Turns,
    base: Instant,
    second: u64,
}

fn metrics() -> TurnMetrics {
    TurnMetrics {
        llm_ttft_seconds: Some(0.3),
        e2e_latency_seconds: Some(0.9),
        ..TurnMetrics::none(Speaker::Agent)
    }
}

/// Those of a text that the session was only asked to speak.
fn metrics_of_say() -> TurnMetrics {
    TurnMetrics {
        llm_ttft_seconds: None,
        tts_ttfb_seconds: Some(0.1),
        e2e_latency_seconds: None,
        ..metrics()
    }
}

fn message(interrupted: bool, metrics: Option<TurnMetrics>) -> SessionEvent {
    SessionEvent::Message(SessionMessage {
        speaker: Speaker::Agent,
        text: TranscriptText::new("Good day."),
        interrupted,
        metrics,
    })
}

impl TurnsScript {
    fn new(turns: u32) -> Self {
        Self::of(&Caller {
            turns,
            ..Caller::default()
        })
    }

    fn of(caller: &Caller) -> Self {
        Self {
            turns: Turns::new(caller),
            base: Instant::now(),
            second: 0,
        }
    }

    fn at(&self, seconds: u64) -> Instant {
        self.base + Duration::from_secs(seconds)
    }

    /// The agent's `S`peech starts and `s` ends, the `C`aller starts and `c` ends, `I` is an interruption; the session
    /// reports that it `h`eard the caller, an `x` error, a `m`essage of its LLM, a `t`ext without one, a message that was
    /// `i`nterrupted; the turn `e`nds; `.` lets a second pass.
    fn play(mut self, script: &str) -> Self {
        for step in script.chars() {
            let at = self.at(self.second);
            let turns = &mut self.turns;
            match step {
                'S' => turns.speech_started(at),
                's' => turns.speech_ended(at),
                'C' | 'I' => {
                    let what = CallerTurn {
                        line: None,
                        interrupts: step == 'I',
                    };
                    turns.close_before(what);
                    turns.caller_started(what, at);
                }
                'c' => turns.caller_ended(100, at),
                'h' => turns.session_event(&SessionEvent::CallerSpeaks(true)),
                'x' => turns.session_event(&SessionEvent::Error("LLM".to_owned())),
                'm' => turns.session_event(&message(false, Some(metrics()))),
                't' => turns.session_event(&message(false, Some(metrics_of_say()))),
                'i' => turns.session_event(&message(true, None)),
                'e' => turns.close(),
                '.' => self.second += 1,
                other => panic!("{other:?} is no step"),
            }
        }
        self
    }

    fn results(&self) -> Vec<TurnResult> {
        self.turns.list().iter().map(|turn| turn.result).collect()
    }

    fn delays(&self) -> Vec<Option<u64>> {
        let delays = self.turns.list().iter().map(Turn::reply_delay);
        delays.map(|it| it.map(|it| it.as_secs())).collect()
    }
}

#[test]
fn plain_turn_has_every_mark_and_a_delay() {
    let script = TurnsScript::new(1).play("S.s.C.c..S.se");
    let turn = &script.turns.list()[0];
    let marks = [
        turn.agent_started,
        turn.agent_ended,
        turn.caller_started,
        turn.caller_ended,
        turn.replied,
        turn.reply_ended,
    ];
    let seconds = [0, 1, 2, 3, 5, 6];
    assert_eq!(marks, seconds.map(|second| Some(script.at(second))));
    assert_eq!(script.delays(), [Some(2)]);
    assert_eq!(script.results(), [TurnResult::Answered]);
    assert_eq!(turn.confirmed, None);
    assert!(script.turns.answered());
    assert_eq!(script.turns.awaited(), Awaited::Nothing);
}

#[test]
fn turn_waits_for_each_of_its_steps_in_order() {
    for (steps, expected) in [
        ("S", ("agent's pause", 0)),
        ("S.s", ("caller's turn", 1)),
        ("S.s.C", ("caller's speech", 2)),
        ("S.s.C.c", ("reply", 3)),
        ("S.s.C.c.S", ("end of the reply", 4)),
        ("S.s.C.c.S.s", ("evidence", 7)),
        ("S.s.C.c.S.se", ("caller's turn", 5)),
        ("S.s.C.c.S.seC.c.S", ("end of the reply", 7)),
        ("S.s.C.c.S.seC.c.S.se", ("nothing", 0)),
    ] {
        let script = TurnsScript::new(2).play(steps);
        let (what, time) = match script.turns.awaited() {
            Awaited::AgentPause { since } => ("agent's pause", since),
            Awaited::CallerTurn { since } => ("caller's turn", since),
            Awaited::CallerSpeech { since } => ("caller's speech", since),
            Awaited::Reply { since } => ("reply", since),
            Awaited::ReplyEnd { since } => ("end of the reply", since),
            Awaited::Evidence { until } => ("evidence", until),
            Awaited::Nothing => ("nothing", script.base),
        };
        assert_eq!((what, (time - script.base).as_secs()), expected, "{steps}");
    }
}

#[test]
fn turn_before_a_caller_who_speaks_first_has_no_agent() {
    let script = TurnsScript::new(1).play(".C.c.S.se");
    assert_eq!(script.turns.list()[0].agent_started, None);
    assert_eq!(script.delays(), [Some(1)]);
}

#[test]
fn rest_of_the_greeting_is_no_answer() {
    for (steps, why) in [
        // The session reported its own greeting, and nothing of the caller.
        ("S.st.C.c.S.ste", Contradiction::NotHeard),
        // It heard the caller, and its LLM is dead.
        ("S.st.Ch.cx.S.ste", Contradiction::Error),
        // It began while the caller spoke, and no session shows that it heard the caller.
        ("S.s.C.S.c.se", Contradiction::Unconfirmed),
    ] {
        let script = TurnsScript::new(1).play(steps);
        assert_eq!(script.turns.rejected(), Some(why), "{steps}");
        assert_eq!(script.results(), [TurnResult::Unanswered], "{steps}");
        let ended = script.turns.list()[0].caller_ended.unwrap();
        let still = Awaited::Reply { since: ended };
        assert_eq!(script.turns.awaited(), still, "{steps}");
        assert!(!script.turns.answered());
    }
}

#[test]
fn answer_after_a_voice_that_was_none_counts() {
    let script = TurnsScript::new(1).play("S.st.C.c.S.steh.S.sme");
    assert_eq!(script.results(), [TurnResult::Answered]);
    assert_eq!(script.delays(), [Some(3)]);
    assert_eq!(script.turns.list()[0].confirmed, Some(true));
}

#[test]
fn agent_that_recovers_from_an_error_has_answered() {
    let script = TurnsScript::new(1).play("S.st.C.chx.S.sme");
    assert_eq!(script.results(), [TurnResult::Answered]);
}

#[test]
fn error_after_the_answer_changes_nothing() {
    let script = TurnsScript::new(1).play("S.st.C.ch.S.smex.e");
    assert_eq!(script.results(), [TurnResult::Answered]);
}

#[test]
fn overlap_has_no_delay() {
    // It goes on after a pause, and answers later.
    let script = TurnsScript::new(1).play("S.s.S.C.c.s.S.se");
    assert!(script.turns.list()[0].overlap);
    assert_eq!(script.results(), [TurnResult::Overlapped]);
    // It answers before the caller has finished, and its session heard the caller.
    let script = TurnsScript::new(1).play("S.s.Ch.S.c.se");
    assert_eq!(script.results(), [TurnResult::Overlapped]);
    assert_eq!(script.delays(), [None]);
    // What it says ends before the caller does.
    let script = TurnsScript::new(1).play("S.s.C.S.s.ce");
    assert_eq!(script.results(), [TurnResult::Unanswered]);
}

#[test]
fn caller_that_cuts_in_is_noticed_and_has_no_delay() {
    let script = TurnsScript::new(1).play("S.s.Ch.i.c.S.sme");
    assert!(script.turns.list()[0].cut_in);
    assert_eq!(script.results(), [TurnResult::Overlapped]);
    assert_eq!(script.delays(), [None]);
}

#[test]
fn each_turn_has_its_result_and_the_reply_begins_the_next() {
    let script = TurnsScript::new(2).play("S.s.C.c.S.s.C.c.S.se");
    assert_eq!(script.delays(), [Some(1), Some(1)]);
    assert_eq!(script.turns.list()[1].agent_started, Some(script.at(4)));
    assert_eq!(script.turns.taken(), 2);
    assert_eq!(script.turns.awaited(), Awaited::Nothing);
    let deaf_in_turn_2 = TurnsScript::new(3).play("S.s.C.c.S.s.C.c.e");
    assert_eq!(
        deaf_in_turn_2.results(),
        [TurnResult::Answered, TurnResult::Unanswered]
    );
}

#[test]
fn interrupted_agent_yields_after_a_second_of_silence() {
    let script = TurnsScript::new(1).play("S.s.C.c.S..I.s.c..S.se");
    let turn = &script.turns.list()[1];
    assert_eq!(turn.yield_delay(), Some(Duration::from_secs(1)));
    assert_eq!(turn.reply_delay(), None);
    assert_eq!(
        script.results(),
        [TurnResult::Answered, TurnResult::Answered]
    );
    assert_eq!(script.turns.taken(), 1);
}

#[test]
fn agent_that_finishes_what_it_says_has_not_yielded() {
    // Its session reports that it was not interrupted.
    let script = TurnsScript::new(1).play("S.s.Ch.c.S..I.smc.e");
    assert_eq!(script.turns.list()[1].yield_delay(), None);
    // It ends long after the interruption.
    let script = TurnsScript::new(1).play("S.s.C.c.S..I.c...se");
    assert_eq!(script.turns.list()[1].yield_delay(), None);
    assert_eq!(script.results()[1], TurnResult::Overlapped);
    assert_eq!(script.turns.awaited(), Awaited::Nothing);
}

#[test]
fn pass_through_has_no_turns() {
    let caller = Caller {
        mode: CallerMode::PassThrough,
        ..Caller::default()
    };
    let script = TurnsScript::of(&caller).play("SC.s.S.c");
    assert!(script.turns.list().is_empty());
    assert_eq!(script.turns.awaited(), Awaited::Nothing);
}

#[test]
fn uplink_is_proven_by_reports_that_cover_the_turn_with_less_than_half_lost() {
    let report = |covered, lost| UplinkReport { covered, lost };
    for (reports, expected) in [
        (vec![], UplinkProof::Unreported),
        (vec![report(99, 0)], UplinkProof::Unreported),
        (
            vec![report(100, 49)],
            UplinkProof::Lost { lost: 39, of: 60 },
        ),
        (vec![report(100, 12)], UplinkProof::Received),
    ] {
        let mut script = TurnsScript::new(1);
        script.turns.uplink_reported(report(40, 10));
        script = script.play("S.s.C.c");
        for one in reports {
            script.turns.uplink_reported(one);
        }
        assert_eq!(script.turns.uplink_proof(), expected);
    }
}
