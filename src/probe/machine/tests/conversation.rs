//! Conversations: replies that do not come, that are none, or that are not the expected ones.

use super::*;
use crate::clip::SpeechClip;
use crate::config::{CallerLine, CallerMode};
use crate::livekit::event::TranscriptSegment;
use crate::probe::TurnResult;

fn expects_reply() -> Target {
    expecting(true, AgentMayLeave::Never)
}

fn scripted(words: &[&str], tool: Option<&str>) -> Target {
    let mut target = expects_reply();
    target.caller.mode = CallerMode::Script;
    target.caller.lines = vec![CallerLine {
        name: "question.wav".to_owned(),
        audio: Arc::new(SpeechClip {
            packets: Vec::new(),
            pcm: Vec::new(),
        }),
        text: Some("Where is my order?".to_owned()),
        expected_words: words
            .iter()
            .map(|any| any.split('|').map(str::to_owned).collect())
            .collect(),
        expected_tool: tool.map(str::to_owned),
    }];
    target
}

fn message(speaker: Speaker, text: &str, measured: bool) -> SessionEvent {
    let nothing = TurnMetrics::none(speaker);
    let metrics = match speaker {
        Speaker::Caller => TurnMetrics {
            transcription_delay_seconds: Some(0.25),
            end_of_turn_delay_seconds: Some(0.5),
            ..nothing
        },
        Speaker::Agent => TurnMetrics {
            llm_ttft_seconds: Some(0.125),
            e2e_latency_seconds: Some(0.5),
            ..nothing
        },
    };
    SessionEvent::Message(SessionMessage {
        speaker,
        text: TranscriptText::new(text),
        interrupted: false,
        metrics: measured.then_some(metrics),
    })
}

impl MachineScript {
    fn reports(self, at: u64, event: SessionEvent) -> Self {
        self.see(at, session("agent-1", event))
    }

    /// The caller says the line with this index.
    fn says(self, line: usize, start: u64, end: u64) -> Self {
        let what = CallerTurn {
            line: Some(line),
            interrupts: false,
        };
        self.see(start, RoomEventKind::CallerStarted(what))
            .see(end, RoomEventKind::CallerEnded { sent: 100 })
            .uplink(end, 100, 0)
    }

    fn uplink(self, at: u64, covered: u64, lost: u64) -> Self {
        let report = UplinkReport { covered, lost };
        self.see(at, RoomEventKind::UplinkReported(report))
    }

    /// Greeted at 700 to 2000, and the hold is over.
    fn greeted(target: Target) -> Self {
        let script = Self::new(target).with_agent().hold(600, 1_000);
        script.speech(700, 2_000)
    }

    fn detail_of_failure(self, at: u64, reason: Reason) -> String {
        let report = self.report(at);
        assert_eq!(reason_of(&report), reason, "{:?}", report.outcome);
        report.outcome.failure().unwrap().detail.clone()
    }
}

#[test]
fn reply_is_expected_by_default() {
    assert!(Target::default().expect.reply);
}

#[test]
fn missing_reply_is_the_networks_fault_unless_livekit_received_the_caller() {
    let unanswered = || {
        MachineScript::greeted(expects_reply())
            .see(4_000, RoomEventKind::CallerStarted(CallerTurn::default()))
            .see(5_000, RoomEventKind::CallerEnded { sent: 100 })
    };
    let nothing = || Ok(Vec::new());
    // No report covers it, and none comes.
    let script = unanswered().uplink(4_500, 99, 0).wait(25_000);
    let script = script.listed(25_010, nothing()).wait(29_999);
    assert!(!script.is_decided());
    let detail = script
        .wait(30_000)
        .detail_of_failure(30_010, Reason::MediaFailed);
    assert!(
        detail.contains("no receiver report of LiveKit covers it"),
        "{detail}"
    );
    // Half of it was lost.
    let script = unanswered().uplink(5_500, 100, 50).wait(25_000);
    let script = script.listed(25_010, nothing());
    let detail = script.detail_of_failure(25_020, Reason::MediaFailed);
    assert!(detail.contains("50 of 100 packets were lost"), "{detail}");
    // It was received; the report may come late.
    let script = unanswered().wait(25_000).listed(25_010, nothing());
    assert!(!script.is_decided());
    let script = script.uplink(26_000, 120, 3);
    let detail = script.detail_of_failure(26_010, Reason::AgentNoReply);
    assert!(
        detail.contains("LiveKit received the caller's speech."),
        "{detail}"
    );
    // The agent heard it, whatever the reports say.
    let script = unanswered().reports(5_100, SessionEvent::CallerSpeaks(true));
    let script = script.wait(25_000).listed(25_010, nothing()).wait(30_000);
    let detail = script.detail_of_failure(30_010, Reason::AgentNoReply);
    assert!(
        detail.contains("reported that it heard the caller"),
        "{detail}"
    );
}

#[test]
fn rest_of_the_greeting_with_a_dead_llm_is_no_reply() {
    let script = MachineScript::greeted(expects_reply())
        .reports(2_100, message(Speaker::Agent, "Hi.", false))
        .echo(4_000, 4_500)
        .reports(4_700, SessionEvent::CallerSpeaks(true))
        .reports(
            4_900,
            SessionEvent::Error("LLM: connection refused".to_owned()),
        )
        .speech(5_500, 7_000)
        .reports(7_100, message(Speaker::Agent, "How can I help you?", false))
        .wait(24_500)
        .listed(24_510, Ok(Vec::new()));
    let report = script.report(24_520);
    assert_eq!(reason_of(&report), Reason::AgentNoReply);
    let detail = &report.outcome.failure().unwrap().detail;
    for words in ["that was no answer", "LLM: connection refused"] {
        assert!(detail.contains(words), "{detail}");
    }
    assert_eq!(report.turns[0].result, TurnResult::Unanswered);
    assert_eq!(report.turns[0].replied, None);
}

#[test]
fn turn_under_way_is_finished_after_the_hold_and_its_evidence_is_kept() {
    let script = MachineScript::new(expecting(false, AgentMayLeave::Never))
        .with_agent()
        .hold(600, 4_500)
        .speech(700, 2_000)
        .echo(4_000, 5_000)
        .reports(5_200, SessionEvent::CallerSpeaks(true))
        .reports(5_700, message(Speaker::Caller, "Hi.", true))
        .speech(6_000, 8_000);
    assert!(!script.is_decided());
    let script = script.reports(8_100, message(Speaker::Agent, "How can I help you?", true));
    let report = script.wait(8_100).report(8_110);
    assert_eq!(report.outcome, Outcome::Ok);
    let turn = &report.turns[0];
    assert_eq!(turn.result, TurnResult::Answered);
    assert_eq!(turn.confirmed, Some(true));
    assert_eq!(millis(turn.reply_delay()), Some(1_000));
    assert_eq!(turn.unexplained_seconds(), Some(0.5));
    assert_eq!(millis(turn.stages.end_of_turn), Some(500));
    assert_eq!(turn.said, None, "the target keeps no transcripts");
}

#[test]
fn word_error_compares_what_was_echoed_with_what_was_heard() {
    let mut target = expects_reply();
    target.transcript = true;
    target.expect.word_error_below = Some(0.3);
    let call = |heard: &str| {
        MachineScript::greeted(target.clone())
            .reports(2_100, message(Speaker::Agent, "Good day to you.", false))
            .echo(4_000, 5_000)
            .reports(5_700, message(Speaker::Caller, heard, true))
            .speech(6_000, 8_000)
            .reports(8_100, message(Speaker::Agent, "Yes?", true))
            .wait(10_000)
    };
    let report = call("good day do you").report(10_010);
    assert_eq!(report.outcome, Outcome::Ok);
    let turn = &report.turns[0];
    assert_eq!(turn.word_error, Some(0.25));
    let text = |text: &Option<TranscriptText>| text.as_ref().map(|it| it.as_str().to_owned());
    let texts = [text(&turn.said), text(&turn.heard), text(&turn.reply_text)];
    let expected = ["Good day to you.", "good day do you", "Yes?"];
    assert_eq!(texts, expected.map(|text| Some(text.to_owned())));
    let misheard = call("good tay do you").listed(10_010, Ok(Vec::new()));
    let detail = misheard.detail_of_failure(10_020, Reason::AgentWrongReply);
    assert!(detail.contains("word error of 50 %"), "{detail}");
}

#[test]
fn reply_without_the_expected_words_or_tool_is_wrong() {
    let call = |words: &[&str], tool: Option<&str>, ran: Option<bool>| {
        let script = MachineScript::greeted(scripted(words, tool))
            .says(0, 4_000, 5_000)
            .reports(5_200, SessionEvent::CallerSpeaks(true));
        let script = match ran {
            Some(is_error) => script.reports(
                5_500,
                SessionEvent::ToolExecuted {
                    name: "look_up".to_owned(),
                    is_error,
                },
            ),
            None => script,
        };
        script
            .speech(6_000, 8_000)
            .reports(8_100, message(Speaker::Agent, "It has been shipped.", true))
            .wait(10_000)
    };
    for (words, tool, ran) in [
        (vec!["shipped"], None, None),
        (
            vec!["delivered|has been SHIPPED"],
            Some("look_up"),
            Some(false),
        ),
    ] {
        let report = call(&words, tool, ran).report(10_010);
        assert_eq!(report.outcome, Outcome::Ok, "{words:?}");
        assert_eq!(report.turns[0].line, Some(0));
    }
    for (words, tool, ran, missing) in [
        (
            vec!["order", "shipped"],
            None,
            None,
            "did not contain \"order\".",
        ),
        (vec!["a|b"], None, None, "did not contain \"a|b\"."),
        (
            vec![],
            Some("look_up"),
            None,
            "did not run the tool \"look_up\".",
        ),
        (vec![], Some("look_up"), Some(true), "but the tool failed."),
    ] {
        let script = call(&words, tool, ran).listed(10_010, Ok(Vec::new()));
        let detail = script.detail_of_failure(10_020, Reason::AgentWrongReply);
        assert!(detail.contains(missing), "{detail}");
    }
}

#[test]
fn words_are_found_in_the_transcript_of_an_agent_without_a_session_host() {
    let target = scripted(&["shipped"], None);
    assert!(!target.transcript && target.reads_transcript());
    assert!(!scripted(&[], Some("look_up")).reads_transcript());
    let script = MachineScript::greeted(target);
    let segment = TranscriptSegment {
        identity: "agent-1".to_owned(),
        track: None,
        segment: "SG_1".to_owned(),
        text: TranscriptText::new("It has been shipped."),
        is_final: true,
        began: script.time(6_100),
        older: false,
    };
    let speaker = Speaker::Agent;
    let script = script
        .says(0, 4_000, 5_000)
        .see(6_000, RoomEventKind::SpeechStarted)
        .see(6_100, RoomEventKind::Transcribed { speaker, segment })
        .see(8_000, RoomEventKind::SpeechEnded)
        .wait(10_000);
    let report = script.report(10_010);
    assert_eq!(report.outcome, Outcome::Ok);
    assert_eq!(report.turns[0].reply_text, None);
    assert_eq!(report.transcript, None);
}

#[test]
fn failure_names_the_turn() {
    let mut target = expects_reply();
    target.caller.turns = 3;
    let script = MachineScript::greeted(target)
        .echo(4_000, 5_000)
        .speech(6_000, 7_000)
        .wait(9_100)
        .echo(9_100, 10_000)
        .wait(30_000)
        .listed(30_010, Ok(Vec::new()));
    let report = script.report(30_020);
    let detail = &report.outcome.failure().unwrap().detail;
    assert!(
        detail.contains("did not answer the caller in turn 2 of 3"),
        "{detail}"
    );
    let results: Vec<_> = report.turns.iter().map(|turn| turn.result).collect();
    assert_eq!(results, [TurnResult::Answered, TurnResult::Unanswered]);
}

#[test]
fn room_stays_open_until_every_turn_was_taken() {
    let mut target = expects_reply();
    target.caller.turns = 2;
    let script = MachineScript::greeted(target)
        .echo(4_000, 5_000)
        .speech(6_000, 7_000)
        .wait(9_100);
    assert!(!script.is_decided());
    let script = script
        .echo(9_100, 10_000)
        .speech(11_000, 12_000)
        .wait(14_000);
    let report = script.report(14_010);
    assert_eq!(report.outcome, Outcome::Ok);
    let delays = report.turns.iter().map(|turn| millis(turn.reply_delay()));
    assert_eq!(delays.collect::<Vec<_>>(), [Some(1_000), Some(1_000)]);
    let notes = report.evidence.notes.join("\n");
    assert!(notes.contains("nothing confirms"), "{notes}");
}

#[test]
fn agent_that_speaks_on_after_an_interruption_is_not_yielding() {
    let interrupted = |within: u64, stops: u64| {
        let mut target = expects_reply();
        target.caller.interrupt = true;
        target.expect.yield_within = Some(Duration::from_millis(within));
        let what = CallerTurn {
            line: None,
            interrupts: true,
        };
        MachineScript::greeted(target)
            .echo(4_000, 5_000)
            .see(6_000, RoomEventKind::SpeechStarted)
            .see(7_000, RoomEventKind::CallerStarted(what))
            .uplink(8_000, 400, 0)
            .wait(stops.min(8_900))
            .see(stops.min(8_900), RoomEventKind::CallerEnded { sent: 440 })
            .uplink(stops.min(8_900), 440, 0)
            .wait(stops)
            .see(stops, RoomEventKind::SpeechEnded)
    };
    let script = interrupted(1_000, 7_400)
        .wait(9_000)
        .speech(9_500, 10_500)
        .wait(12_500);
    let report = script.report(12_510);
    assert_eq!(report.outcome, Outcome::Ok, "{report:?}");
    assert_eq!(millis(report.turns[1].yield_delay()), Some(400));
    let script = interrupted(1_000, 8_500)
        .wait(9_000)
        .listed(9_010, Ok(Vec::new()));
    let detail = script.detail_of_failure(9_020, Reason::AgentNotYielding);
    assert!(
        detail.contains("for more than 1s after the caller interrupted it"),
        "{detail}"
    );
}

#[test]
fn text_of_an_interrupted_reply_belongs_to_the_turn_that_it_answers() {
    let mut target = scripted(&["shipped"], None);
    target.transcript = true;
    target.caller.interrupt = true;
    let interruption = CallerTurn {
        line: None,
        interrupts: true,
    };
    let cut = SessionEvent::Message(SessionMessage {
        speaker: Speaker::Agent,
        text: TranscriptText::new("It has been shipped to"),
        interrupted: true,
        metrics: None,
    });
    let script = MachineScript::greeted(target)
        .says(0, 4_000, 5_000)
        .reports(5_100, SessionEvent::CallerSpeaks(true))
        .see(6_000, RoomEventKind::SpeechStarted)
        .see(7_000, RoomEventKind::CallerStarted(interruption))
        .reports(7_300, SessionEvent::CallerSpeaks(true))
        .see(7_500, RoomEventKind::SpeechEnded)
        .reports(7_600, cut)
        .see(9_000, RoomEventKind::CallerEnded { sent: 450 })
        .speech(10_000, 11_000)
        .reports(11_100, message(Speaker::Agent, "Yes?", true))
        .wait(13_000);
    let report = script.report(13_010);
    assert_eq!(report.outcome, Outcome::Ok);
    let replies = report.turns.iter().map(|turn| turn.reply_text.as_ref());
    let replies: Vec<_> = replies
        .map(|text| text.map_or("", TranscriptText::as_str))
        .collect();
    assert_eq!(replies, ["It has been shipped to", "Yes?"]);
}

#[test]
fn caller_that_speaks_first_needs_no_greeting() {
    let mut target = scripted(&[], None);
    target.caller.speaks_first = true;
    let script = MachineScript::new(target)
        .with_agent()
        .hold(600, 1_000)
        .wait(25_000);
    assert!(!script.is_decided());
    let script = script
        .says(0, 25_000, 26_000)
        .speech(27_000, 28_000)
        .wait(30_000);
    let report = script.report(30_010);
    assert_eq!(report.outcome, Outcome::Ok);
    assert_eq!(report.timeline.span(Span::FirstSpeech), None);
    assert_eq!(millis(report.turns[0].reply_delay()), Some(1_000));
    assert_eq!(report.turns[0].agent_started, None);
}

#[test]
fn agent_that_waits_for_the_caller_gets_the_advice_to_speak_first() {
    let script = MachineScript::new(expects_reply())
        .with_agent()
        .see(600, RoomEventKind::AgentState("listening".to_owned()))
        .wait(20_500)
        .listed(20_510, Ok(Vec::new()));
    let detail = script.detail_of_failure(20_520, Reason::AgentSilent);
    assert!(detail.contains("caller.speaks_first"), "{detail}");
}

#[test]
fn caller_that_cuts_in_is_noted_and_the_turn_has_no_delay() {
    let cut = SessionEvent::Message(SessionMessage {
        speaker: Speaker::Agent,
        text: TranscriptText::new("This call"),
        interrupted: true,
        metrics: None,
    });
    let script = MachineScript::greeted(expects_reply())
        .see(4_000, RoomEventKind::CallerStarted(CallerTurn::default()))
        .reports(4_600, SessionEvent::CallerSpeaks(true))
        .reports(4_700, cut)
        .see(5_000, RoomEventKind::CallerEnded { sent: 100 })
        .speech(6_000, 7_000)
        .wait(9_000);
    let report = script.report(9_010);
    assert_eq!(report.outcome, Outcome::Ok);
    assert_eq!(report.turns[0].reply_delay(), None);
    let notes = report.evidence.notes.join("\n");
    assert!(notes.contains("the caller cut in"), "{notes}");
    assert!(!notes.contains("nothing confirms"), "{notes}");
    assert!(
        report
            .evidence
            .session
            .iter()
            .any(|entry| entry.event == "interrupted")
    );
}

#[test]
fn worst_case_of_a_room_grows_with_its_turns() {
    let seconds = |turns, reply| {
        let mut target = expects_reply();
        target.caller.turns = turns;
        target.expect.reply = reply;
        max_time_to_verdict(&target).as_secs()
    };
    assert_eq!(seconds(1, false), 20 + 20);
    assert_eq!(seconds(1, true), 20 + (30 + 30 + 40 + 20) + 30 + 2 + 20);
    assert_eq!(seconds(2, true) - seconds(1, true), 120);
}
