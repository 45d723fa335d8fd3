use super::ear::SPEECH_BYTES;
use super::*;
use crate::sandbox::fault::Faults;

/// An agent under `faults`, run by hand on a clock of its own.
struct ScriptedCall {
    agent: DemoAgent,
    now: Instant,
    acts: Vec<(Duration, AgentAction)>,
    start: Instant,
}

impl ScriptedCall {
    fn new(faults: &[&str]) -> Self {
        let rules: Vec<_> = faults.iter().map(|text| text.parse().unwrap()).collect();
        let script = AgentScript::new(&Faults::of_room(&rules, 1));
        let now = Instant::now();
        Self {
            agent: DemoAgent::new(script, Arc::new(VoiceClips::load()), now),
            now,
            acts: Vec::new(),
            start: now,
        }
    }

    fn run(&mut self, time: Duration) {
        self.run_hearing(time, None);
    }

    /// Lets time pass, with a frame of `bytes` every 20 ms.
    fn run_hearing(&mut self, time: Duration, bytes: Option<usize>) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(5);
            let on_frame = (self.now - self.start).as_millis().is_multiple_of(20);
            if let (Some(bytes), true) = (bytes, on_frame) {
                self.agent.on_caller_frame(bytes, self.now);
            }
            let at = self.now - self.start;
            let acts = self.agent.on_time(self.now);
            self.acts.extend(acts.into_iter().map(|act| (at, act)));
        }
    }

    fn meet(&mut self) {
        self.run(Duration::from_millis(300));
        self.agent.on_caller_published();
        self.agent.on_subscribed(self.now);
    }

    fn states(&self) -> Vec<&'static str> {
        self.acts
            .iter()
            .filter_map(|(_, act)| match act {
                AgentAction::State(state) => Some(state.name()),
                _ => None,
            })
            .collect()
    }

    fn heard(&self) -> Vec<Utterance> {
        self.acts
            .iter()
            .filter_map(|(_, act)| match act {
                AgentAction::Heard(utterance) => Some(*utterance),
                _ => None,
            })
            .collect()
    }
}

impl ScriptedCall {
    /// After the greeting, and after the time in which the agent can't be interrupted.
    fn greeted(faults: &[&str]) -> Self {
        let mut call = Self::new(faults);
        call.meet();
        call.run(SECOND * 4);
        call
    }

    /// The caller speaks for this long. Then the agent has time to answer.
    fn say(&mut self, time: Duration) {
        self.run_hearing(time, Some(100));
        self.run(SECOND * 4);
    }

    fn session(&self) -> Vec<&SessionEvent> {
        let events = self.acts.iter().filter_map(|(_, act)| match act {
            AgentAction::Session(event) => Some(event),
            _ => None,
        });
        events.collect()
    }

    /// The session's reports in short: `+`/`-` caller speaks or is silent, `t` transcript, `c` message of the caller, `a` of
    /// the agent, `i` that was interrupted, `LTS` agent listens, thinks, speaks, `f` tool, `e` error.
    fn reports(&self) -> String {
        let short = |event: &&SessionEvent| match event {
            SessionEvent::CallerState { speaks: true, .. } => '+',
            SessionEvent::CallerState { speaks: false, .. } => '-',
            SessionEvent::Transcribed(_) => 't',
            SessionEvent::Message(message) => match message.speaker {
                MessageSpeaker::Caller => 'c',
                MessageSpeaker::Agent if message.interrupted => 'i',
                MessageSpeaker::Agent => 'a',
            },
            SessionEvent::AgentState { new, .. } => match new {
                AgentState::Initializing => 'I',
                AgentState::Listening => 'L',
                AgentState::Thinking => 'T',
                AgentState::Speaking => 'S',
            },
            SessionEvent::ToolStarted(_)
            | SessionEvent::ToolEnded(_)
            | SessionEvent::ToolsExecuted(_) => 'f',
            SessionEvent::Error(_) => 'e',
        };
        self.session().iter().map(short).collect()
    }

    fn messages(&self, speaker: MessageSpeaker) -> Vec<&Message> {
        let messages = self.session().into_iter().filter_map(|event| match event {
            SessionEvent::Message(message) if message.speaker == speaker => Some(message),
            _ => None,
        });
        messages.collect()
    }

    /// Start, end and interruption of each speech of the agent.
    fn said(&self) -> Vec<(Duration, Duration, bool)> {
        let said = self.acts.iter().filter_map(|(_, act)| match act {
            AgentAction::Said {
                began,
                ended,
                interrupted,
                ..
            } => Some((*began - self.start, *ended - self.start, *interrupted)),
            _ => None,
        });
        said.collect()
    }

    /// When frames with the agent's voice were sent.
    fn voice_at(&self) -> Vec<Duration> {
        let sent = self.acts.iter().filter_map(|(at, act)| match act {
            AgentAction::Send { frame, .. } if frame.len() > SPEECH_BYTES => Some(*at),
            _ => None,
        });
        sent.collect()
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn an_agent_speaks_only_once_it_is_subscribed_and_its_caller_published() {
    let mut stage = ScriptedCall::new(&[]);
    stage.run(SECOND);
    assert_eq!(stage.states(), ["initializing", "listening"]);
    stage.agent.on_caller_published();
    stage.run(SECOND);
    assert_eq!(stage.states(), ["initializing", "listening"]);
    stage.agent.on_subscribed(stage.now);
    stage.run(SECOND * 4);
    assert_eq!(
        stage.states(),
        ["initializing", "listening", "speaking", "listening"]
    );
}

#[test]
fn an_utterance_is_answered_once() {
    let mut stage = ScriptedCall::new(&[]);
    stage.meet();
    stage.run(SECOND * 4);
    stage.run_hearing(SECOND, Some(100));
    stage.run_hearing(SECOND * 4, Some(3));
    let heard = stage.heard();
    assert_eq!(heard.len(), 1);
    assert_eq!(heard[0].frames, 50);
    assert_eq!(
        stage.states()[3..],
        ["listening", "thinking", "speaking", "listening"]
    );
}

#[test]
fn every_turn_of_the_caller_is_answered() {
    let mut stage = ScriptedCall::greeted(&[]);
    for _ in 0..4 {
        stage.say(SECOND);
    }
    let thinking = stage.states().iter().filter(|s| **s == "thinking").count();
    assert_eq!((stage.heard().len(), thinking), (4, 4));
}

#[test]
fn while_its_echo_canceller_warms_up_speech_neither_interrupts_it_nor_gets_an_answer() {
    let mut stage = ScriptedCall::new(&[]);
    stage.meet();
    stage.run(Duration::from_millis(500));
    stage.run_hearing(SECOND, Some(100));
    stage.run(SECOND * 4);
    assert!(stage.heard()[0].over_agent);
    // Its voice detector hears the caller all the same.
    assert_eq!(stage.reports(), "LS+-aL");
}

#[test]
fn silence_and_comfort_noise_are_not_heard() {
    let mut stage = ScriptedCall::new(&[]);
    stage.meet();
    stage.run_hearing(SECOND * 5, Some(55));
    assert_eq!(stage.heard(), []);
}

#[test]
fn a_silent_track_sends_frames_and_no_speech() {
    let mut stage = ScriptedCall::new(&["silent_track"]);
    stage.meet();
    stage.run(SECOND * 3);
    let sizes: Vec<usize> = stage
        .acts
        .iter()
        .filter_map(|(_, act)| match act {
            AgentAction::Send { frame, .. } => Some(frame.len()),
            _ => None,
        })
        .collect();
    assert!(sizes.len() >= 149 && sizes.iter().all(|size| *size == 3));
    assert!(!stage.states().contains(&"speaking"));
}

#[test]
fn a_track_without_packets_is_published_and_stays_empty() {
    let mut stage = ScriptedCall::new(&["no_packets"]);
    stage.meet();
    stage.run(SECOND * 3);
    let publish = AgentAction::Publish(AgentSound::Voice);
    assert!(stage.acts.iter().any(|(_, act)| *act == publish));
    let sends = stage
        .acts
        .iter()
        .any(|(_, act)| matches!(act, AgentAction::Send { .. }));
    assert!(!sends);
}

#[test]
fn background_plays_all_along_on_a_track_of_its_own() {
    let mut stage = ScriptedCall::new(&["background"]);
    stage.run(SECOND * 2);
    let publish = AgentAction::Publish(AgentSound::Background);
    assert!(stage.acts.iter().any(|(_, act)| *act == publish));
    let mut sent = stage.acts.iter().filter_map(|(_, act)| match act {
        AgentAction::Send { sound, frame, .. } => Some((*sound, frame.len())),
        _ => None,
    });
    assert!(sent.clone().count() > 90, "before anybody has subscribed");
    assert!(sent.all(|(sound, bytes)| sound == AgentSound::Background && bytes > SPEECH_BYTES));
}

#[test]
fn an_agent_that_restarts_its_track_answers_once_the_new_one_is_subscribed() {
    let mut stage = ScriptedCall::new(&["restarts_track"]);
    stage.meet();
    stage.run(SECOND * 4);
    stage.run_hearing(SECOND, Some(100));
    stage.run(SECOND * 4);
    assert_eq!(stage.states().last(), Some(&"thinking"));
    let voice = |(_, act): &&(Duration, AgentAction)| {
        matches!(
            act,
            AgentAction::Unpublish | AgentAction::Publish(AgentSound::Voice)
        )
    };
    assert_eq!(stage.acts.iter().filter(voice).count(), 3);
    stage.agent.on_subscribed(stage.now);
    stage.run(SECOND * 4);
    assert_eq!(stage.states()[4..], ["thinking", "speaking", "listening"]);
}

#[test]
fn an_agent_that_leaves_early_leaves_within_its_greeting() {
    let mut stage = ScriptedCall::new(&["leaves_early=500ms"]);
    stage.meet();
    stage.run(SECOND * 3);
    let leaves = stage
        .acts
        .iter()
        .filter(|(_, act)| *act == AgentAction::Leave)
        .count();
    assert_eq!(leaves, 1);
    assert!(
        !stage
            .acts
            .iter()
            .any(|(at, _)| *at > Duration::from_secs(1))
    );
}

#[test]
fn an_agent_that_never_pauses_is_never_through_with_its_greeting() {
    let mut stage = ScriptedCall::new(&["never_pauses"]);
    stage.meet();
    stage.run(SECOND * 10);
    assert_eq!(stage.states(), ["initializing", "listening", "speaking"]);
    let speech = stage.acts.iter().filter(
        |(_, act)| matches!(act, AgentAction::Send { frame, .. } if frame.len() > SPEECH_BYTES),
    );
    assert!(speech.count() > 450);
}

#[test]
fn what_an_agent_said_is_told_once_it_is_said() {
    let mut stage = ScriptedCall::new(&[]);
    stage.meet();
    stage.run(SECOND * 4);
    let said: Vec<_> = stage
        .acts
        .iter()
        .filter_map(|(_, act)| match act {
            AgentAction::Said {
                clip, began, ended, ..
            } => Some((*clip, *ended - *began)),
            _ => None,
        })
        .collect();
    assert_eq!(said.len(), 1);
    let (clip, length) = said[0];
    assert_eq!(clip, Clip::Greeting);
    let frames = u32::try_from(stage.agent.voice.greeting.len()).unwrap();
    assert!(length >= FRAME * frames && length < FRAME * (frames + 3));
}

#[test]
fn an_inference_error_is_reported_and_silences_the_agent() {
    let mut stage = ScriptedCall::new(&["inference_error=quota"]);
    stage.meet();
    stage.run(SECOND * 3);
    let report = AgentAction::Session(SessionEvent::Error("quota".to_owned()));
    assert!(stage.acts.iter().any(|(_, act)| *act == report));
    assert!(!stage.states().contains(&"speaking"));
}

#[test]
fn the_greeting_lasts_two_to_three_seconds_of_audible_frames() {
    let greeting = VoiceClips::load().greeting;
    assert!((100..150).contains(&greeting.len()));
    assert!(greeting.iter().all(|frame| frame.len() > SPEECH_BYTES));
}

#[test]
fn session_reports_a_turn_in_the_order_of_a_real_one() {
    let mut call = ScriptedCall::greeted(&[]);
    call.say(SECOND);
    assert_eq!(call.reports(), "LSaL+-tcTSaL");
}

#[test]
fn claims_of_a_turn_add_up_to_its_delay() {
    let mut call = ScriptedCall::greeted(&[]);
    call.say(SECOND);
    let caller = call.messages(MessageSpeaker::Caller)[0].metrics;
    let agent = call.messages(MessageSpeaker::Agent)[1].metrics;
    let (end_of_turn, llm, tts) = (
        caller.end_of_turn_delay.unwrap(),
        agent.llm_node_ttft.unwrap(),
        agent.tts_node_ttfb.unwrap(),
    );
    let total = agent.e2e_latency.unwrap();
    assert!((end_of_turn + llm + tts - total).abs() < 1e-6);
    let ended = call.heard()[0].ended;
    let (began, _) = agent.spoke.unwrap();
    assert!(((began - ended).as_secs_f64() - total).abs() < 1e-6);
    assert!(caller.transcription_delay.unwrap() < end_of_turn);
    let first = call
        .voice_at()
        .into_iter()
        .find(|at| *at >= began - call.start);
    assert!(first.unwrap() <= began - call.start + FRAME);
}

/// The claims of a turn of the caller and of the answer, in milliseconds: transcription, end of turn, LLM, TTS, all.
fn claims(faults: &[&str]) -> [u128; 5] {
    let mut call = ScriptedCall::greeted(faults);
    call.run_hearing(SECOND, Some(100));
    call.run(SECOND * 8);
    let caller = call.messages(MessageSpeaker::Caller)[0].metrics;
    let agent = call.messages(MessageSpeaker::Agent)[1].metrics;
    let claims = [
        caller.transcription_delay,
        caller.end_of_turn_delay,
        agent.llm_node_ttft,
        agent.tts_node_ttfb,
        agent.e2e_latency,
    ];
    claims.map(|claim| Duration::from_secs_f64(claim.unwrap()).as_millis())
}

#[test]
fn delay_of_a_stage_is_claimed_in_that_stage_and_in_the_sum() {
    let slow = |fault| {
        let (with, without) = (claims(&[fault]), claims(&[]));
        std::array::from_fn(|at| (with[at].abs_diff(without[at]) + 50) / 100 * 100)
    };
    // The end of a turn waits for the transcript.
    let transcription = [2000, 2000, 0, 0, 2000];
    assert_eq!(slow("slow_stage=transcription:2s"), transcription);
    let end_of_turn = [0, 2000, 0, 0, 2000];
    assert_eq!(slow("slow_stage=end_of_turn:2s"), end_of_turn);
    let llm = [0, 0, 2000, 0, 2000];
    assert_eq!(slow("slow_stage=llm:2s"), llm);
    let tts = [0, 0, 0, 2000, 2000];
    assert_eq!(slow("slow_stage=tts:2s"), tts);
    let reply = [0, 0, 4500, 0, 4500];
    assert_eq!(slow("slow_reply=5s"), reply);
    assert_eq!(slow("slow_network=1s"), [0; 5]);
}

#[test]
fn delay_of_the_network_makes_only_the_voice_late() {
    let mut call = ScriptedCall::greeted(&["slow_network=1s"]);
    call.say(SECOND);
    let (began, _, _) = call.said()[1];
    let mut voice = call.voice_at().into_iter();
    let late = voice.find(|at| *at >= began).unwrap();
    let late = late.checked_sub(began).unwrap();
    assert!(late >= SECOND && late < SECOND + FRAME * 2, "{late:?}");
}

#[test]
fn caller_interrupts_a_reply_and_gets_an_answer() {
    let mut call = ScriptedCall::greeted(&["long_reply=8s"]);
    call.run_hearing(SECOND, Some(100));
    call.run(Duration::from_millis(2500));
    let interrupted_at = call.now - call.start;
    call.say(SECOND * 2);
    let (began, ended, interrupted) = call.said()[1];
    assert!(interrupted && began + SECOND < interrupted_at);
    let yielded = ended.checked_sub(interrupted_at).unwrap();
    let range = INTERRUPTION..INTERRUPTION + Duration::from_millis(200);
    assert!(range.contains(&yielded), "{yielded:?}");
    let voice = call.voice_at();
    let next = voice.iter().find(|at| **at > ended).unwrap();
    assert!(
        *next > interrupted_at + SECOND * 2,
        "silent until it answers"
    );
    // It listens before it is certain that this is an interruption.
    assert_eq!(call.reports(), "LSaL+-tcTS+L-ticTSaL");
    let message = call.messages(MessageSpeaker::Agent)[1];
    let whole = "Good day to you. Good day to you.";
    assert!(message.text.len() < whole.len(), "{}", message.text);
}

#[test]
fn short_sound_over_a_reply_interrupts_only_with_a_transcript() {
    let mut call = ScriptedCall::greeted(&["long_reply=8s"]);
    call.run_hearing(SECOND, Some(100));
    call.run(Duration::from_millis(2500));
    let began = call.now - call.start;
    call.say(Duration::from_millis(300));
    let (_, ended, interrupted) = call.said()[1];
    assert!(interrupted && ended > began + Duration::from_millis(600));
    assert!(
        call.reports().ends_with("S+-LticTSaL"),
        "{}",
        call.reports()
    );
}

#[test]
fn agent_that_never_yields_speaks_on_and_does_not_answer() {
    let mut call = ScriptedCall::greeted(&["long_reply=8s", "never_yields"]);
    call.run_hearing(SECOND, Some(100));
    call.run(Duration::from_millis(2500));
    call.run_hearing(SECOND * 2, Some(100));
    call.run(SECOND * 8);
    assert_eq!(call.reports(), "LSaL+-tcTS+-aL");
    let (began, ended, interrupted) = call.said()[1];
    assert!(!interrupted && ended >= began + SECOND * 8);
}

#[test]
fn deaf_agent_greets_and_reports_nothing_of_its_caller() {
    let mut call = ScriptedCall::greeted(&["deaf"]);
    call.say(SECOND);
    assert_eq!(call.reports(), "LSaL");
    assert_eq!(call.heard(), []);
}

#[test]
fn agent_that_turns_deaf_hears_the_turns_before() {
    let mut call = ScriptedCall::greeted(&["deaf_after=2"]);
    for _ in 0..3 {
        call.say(SECOND);
    }
    assert_eq!(call.reports(), "LSaL+-tcTSaL+-tcTSaL");
}

#[test]
fn agent_that_waits_for_its_caller_speaks_only_to_answer() {
    let mut call = ScriptedCall::greeted(&["waits_for_caller"]);
    assert_eq!(call.reports(), "L");
    call.say(SECOND);
    assert_eq!(call.reports(), "L+-tcTSaL");
    let clips = call.acts.iter().filter_map(|(_, act)| match act {
        AgentAction::Said { clip, .. } => Some(*clip),
        _ => None,
    });
    assert_eq!(clips.collect::<Vec<_>>(), [Clip::Reply]);
    let metrics = call.messages(MessageSpeaker::Agent)[0].metrics;
    assert!(metrics.e2e_latency.is_some());
}

#[test]
fn greeting_in_two_parts_has_the_pause_between_them() {
    let mut call = ScriptedCall::greeted(&["two_part_greeting=2s"]);
    call.run(SECOND * 4);
    assert_eq!(call.reports(), "LSaLSaL");
    let said = call.said();
    assert_eq!(call.messages(MessageSpeaker::Agent)[0].text, "Good day");
    let pause = said[1].0.checked_sub(said[0].1).unwrap();
    assert!(
        pause >= SECOND * 2 && pause < SECOND * 2 + FRAME,
        "{pause:?}"
    );
}

#[test]
fn second_part_of_a_greeting_comes_also_if_the_caller_spoke_and_the_llm_is_dead() {
    let mut call = ScriptedCall::new(&["dead_llm"]);
    call.meet();
    call.run(SECOND * 4);
    // The second part is due while the caller speaks.
    call.run_hearing(SECOND, Some(100));
    call.run(SECOND * 5);
    assert_eq!(call.reports(), "LSaL+-tcTeLSaL");
    let after = call.session().into_iter().rev();
    let error = after.into_iter().find_map(|event| match event {
        SessionEvent::Error(text) => Some(text.clone()),
        _ => None,
    });
    assert!(error.unwrap().contains("recoverable=False"));
    let rest = call.messages(MessageSpeaker::Agent)[1].metrics;
    assert_eq!(
        (rest.llm_node_ttft, rest.e2e_latency.is_some()),
        (None, true)
    );
}

#[test]
fn transcript_of_an_echo_is_what_was_said_with_the_planted_errors() {
    let mut call = ScriptedCall::greeted(&["word_errors=1"]);
    call.run_hearing(FRAME * 125, Some(100));
    call.run(SECOND * 4);
    assert_eq!(
        call.messages(MessageSpeaker::Agent)[0].text,
        "Good day to you."
    );
    assert_eq!(
        call.messages(MessageSpeaker::Caller)[0].text,
        "mistaken day to you."
    );
    let transcript = AgentAction::TranscribeCaller("mistaken day to you.".to_owned());
    assert!(call.acts.iter().any(|(_, act)| *act == transcript));
}

#[test]
fn text_of_a_fault_is_what_the_agent_understands() {
    let mut call = ScriptedCall::greeted(&["hears=what time is it"]);
    call.say(SECOND);
    assert_eq!(
        call.messages(MessageSpeaker::Caller)[0].text,
        "what time is it"
    );
}

#[test]
fn wrong_words_are_in_the_replies_and_not_in_the_greeting() {
    let mut call = ScriptedCall::greeted(&["wrong_words"]);
    call.say(SECOND);
    let texts: Vec<_> = call.messages(MessageSpeaker::Agent);
    assert_eq!(texts[0].text, "Good day to you.");
    assert!(!texts[1].text.contains("Good"), "{}", texts[1].text);
    let transcript = AgentAction::TranscribeSelf(texts[1].text.clone());
    assert!(call.acts.iter().any(|(_, act)| *act == transcript));
}

#[test]
fn tool_is_reported_before_the_reply() {
    for (fault, fails) in [("tool=lookup", false), ("tool_error=lookup", true)] {
        let mut call = ScriptedCall::greeted(&[fault]);
        call.say(SECOND);
        assert_eq!(call.reports(), "LSaL+-tcTfffSaL");
        let executed = call.session().into_iter().find_map(|event| match event {
            SessionEvent::ToolsExecuted(call) => Some(call.tool.clone()),
            _ => None,
        });
        let tool = executed.unwrap();
        assert_eq!((tool.name.as_str(), tool.is_error), ("lookup", fails));
    }
}

#[test]
fn agent_without_a_session_replies_and_reports_nothing() {
    let mut call = ScriptedCall::greeted(&["silent_session"]);
    call.say(SECOND);
    assert_eq!((call.reports(), call.states()), (String::new(), vec![]));
    assert_eq!(call.said().len(), 2);
    let transcripts = call.acts.iter().filter(|(_, act)| {
        matches!(
            act,
            AgentAction::TranscribeSelf(_) | AgentAction::TranscribeCaller(_)
        )
    });
    assert_eq!(transcripts.count(), 0);
}

#[test]
fn caller_that_goes_on_while_the_agent_thinks_gets_one_answer() {
    let mut call = ScriptedCall::greeted(&[]);
    call.run_hearing(SECOND, Some(100));
    call.run(Duration::from_millis(800));
    call.say(SECOND);
    assert_eq!(call.reports(), "LSaL+-tcT+-tcSaL");
    let reply = call.messages(MessageSpeaker::Agent)[1].metrics;
    assert!(reply.e2e_latency.unwrap() < 1.2);
}

#[test]
fn idle_agent_has_no_deadline_in_the_past() {
    for faults in [
        &[][..],
        &["two_part_greeting=2s"],
        &["never_yields", "long_reply=4s"],
    ] {
        let mut call = ScriptedCall::greeted(faults);
        call.run_hearing(SECOND, Some(100));
        for _ in 0..1000 {
            call.run(Duration::from_millis(5));
            let deadline = call.agent.deadline();
            assert!(deadline.is_none_or(|due| due > call.now), "{faults:?}");
        }
    }
}
