use super::*;

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
        let script = AgentScript::new(&Faults::of_room(&rules, 1), 2);
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
                AgentAction::State(state) => Some(*state),
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
fn replies_are_bounded() {
    let mut stage = ScriptedCall::new(&[]);
    stage.meet();
    stage.run(SECOND * 4);
    for _ in 0..4 {
        stage.run_hearing(SECOND, Some(100));
        stage.run(SECOND * 4);
    }
    let thinking = stage.states().iter().filter(|s| **s == "thinking").count();
    assert_eq!((stage.heard().len(), thinking), (4, 2));
}

#[test]
fn what_it_hears_while_it_speaks_gets_no_answer() {
    let mut stage = ScriptedCall::new(&[]);
    stage.meet();
    stage.run(Duration::from_millis(500));
    stage.run_hearing(SECOND, Some(100));
    stage.run(SECOND * 4);
    assert!(stage.heard()[0].over_agent);
    assert!(!stage.states().contains(&"thinking"));
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
            AgentAction::Said { clip, began, ended } => Some((*clip, *ended - *began)),
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
    let report = AgentAction::Report("quota".to_owned());
    assert!(stage.acts.iter().any(|(_, act)| *act == report));
    assert!(!stage.states().contains(&"speaking"));
}

#[test]
fn the_greeting_lasts_two_to_three_seconds_of_audible_frames() {
    let greeting = VoiceClips::load().greeting;
    assert!((100..150).contains(&greeting.len()));
    assert!(greeting.iter().all(|frame| frame.len() > SPEECH_BYTES));
}
