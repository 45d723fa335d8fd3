//! What an agent does in a scenario: as dispatch metadata for `agent.py`, and as faults of the sandbox that have the same
//! effect.

use serde_json::{Map, Value, json};

use crate::stack::{AGENT, BUSY_AGENT, CONVERSATION_AGENT};

/// About 20 s of speech.
const LONG_ANSWER: &str = "Of course. Our opening hours are from nine in the morning until six in the evening, from \
    Monday to Friday. On Saturday we are open from ten to four, and on Sunday we are closed. If you come by car, please use the \
    entrance at the back of the house, because the front door is under repair until the end of the month.";

pub struct Behaviour {
    /// The name of the agent.
    pub agent: &'static str,
    /// The dispatch metadata, for `agent.py`.
    metadata: Map<String, Value>,
    /// The values of `--fault`, for the sandbox.
    pub faults: Vec<String>,
}

impl Behaviour {
    fn new(behaviour: &str, faults: &[&str]) -> Self {
        Self {
            agent: AGENT,
            metadata: Map::from_iter([("behaviour".to_owned(), behaviour.into())]),
            faults: faults.iter().map(|&fault| fault.to_owned()).collect(),
        }
    }

    /// Greets, and then only listens.
    pub fn greets() -> Self {
        Self::new("greet", &["no_reply"])
    }

    /// Greets so briefly that a batch is short.
    pub fn greets_briefly() -> Self {
        Self::greets().with("seconds", 0.3)
    }

    /// Greets, and replies to the first echo.
    pub fn replies() -> Self {
        Self::new("reply", &[])
    }

    /// Greets, and replies to the first echo, both with models.
    pub fn converses() -> Self {
        Self::new("converse", &["hears=hello there"])
    }

    /// Converses with a real `AgentSession`. Its settings are those of `pipeline.py`.
    pub fn pipeline() -> Self {
        Self {
            agent: CONVERSATION_AGENT,
            metadata: Map::new(),
            faults: Vec::new(),
        }
    }

    /// Never hears the caller.
    pub fn is_deaf() -> Self {
        Self::pipeline().with("deaf_after", 0).fault("deaf")
    }

    /// Replies to this many turns of the caller, and hears nothing after that.
    pub fn goes_deaf_after(turns: u32) -> Self {
        Self::pipeline()
            .with("deaf_after", turns)
            .fault(format!("deaf_after={turns}"))
    }

    /// Gives an answer of about 20 s, and then a short one.
    pub fn gives_a_long_answer() -> Self {
        Self::pipeline()
            .with("replies", vec![LONG_ANSWER, "All right."])
            .fault("long_reply=20s")
    }

    /// Goes on with a long answer when the caller interrupts.
    pub fn never_yields() -> Self {
        Self::gives_a_long_answer()
            .with("uninterruptible", true)
            .fault("never_yields")
    }

    /// Greets in two parts, and its LLM fails.
    pub fn has_a_dead_llm() -> Self {
        let greeting = json!(["Hi.", 3, "How can I help you today?"]);
        Self::pipeline()
            .with("greeting", greeting)
            .with("failing", "llm")
            .with("error", "500")
            .fault("dead_llm")
    }

    /// Has a dead TTS, and noise on the track of its voice.
    pub fn plays_noise() -> Self {
        Self::pipeline()
            .with("noise", -38)
            .with("failing", "tts")
            .with("error", "hang")
            .fault("plays=noise")
    }

    /// Does not greet, and answers the caller.
    pub fn waits_for_the_caller() -> Self {
        Self::pipeline()
            .with("greeting", json!([]))
            .fault("waits_for_caller")
    }

    /// Speaks with models. The provider of one of them (`llm` or `tts`) responds with this error.
    pub fn whose_model_fails(model: &str, error: &str, fault: &str) -> Self {
        Self::new("converse", &[fault])
            .with("failing", model)
            .with("error", error)
    }

    /// Greets and hangs up at once.
    pub fn hangs_up() -> Self {
        // As long as the greeting.
        Self::new("leave", &["leaves_early=2500ms"])
    }

    /// Accepts its job and never joins.
    pub fn never_connects() -> Self {
        Self::new("never_connect", &["never_joins"])
    }

    /// Fails before it connects.
    pub fn fails() -> Self {
        Self::new("fail", &["never_joins"])
    }

    /// Speaks at once, even if no participant has subscribed yet.
    pub fn speaks_at_once() -> Self {
        Self::new("blurt", &["no_reply", "speaks_at_once"])
    }

    /// Greets, replies to the first echo and hangs up.
    pub fn replies_and_leaves() -> Self {
        // Its whole greeting, and a part of its reply.
        Self::new("reply_and_leave", &["leaves_early=3s500ms"])
    }

    /// Greets, and then ends the call by deleting the room, as `EndCallTool` of livekit-agents does.
    pub fn ends_the_call() -> Self {
        Self::new("end_call", &["deletes_room=2500ms"])
    }

    /// Greets, and closes its session, which deletes the room (`delete_room_on_close`).
    pub fn closes_its_session() -> Self {
        Self::new("close_session", &["deletes_room=2500ms"])
    }

    /// Greets, with background sound on a second track for the whole call.
    pub fn greets_over_background() -> Self {
        Self::new("greet_over_background", &["no_reply", "background"])
    }

    /// Plays that background sound, but does not speak.
    pub fn plays_background_alone() -> Self {
        Self::new("background_alone", &["silent_track", "background"])
    }

    /// Publishes nothing. An avatar, which is another participant, speaks for it.
    pub fn speaks_by_avatar() -> Self {
        Self::new("speak_by_avatar", &["no_reply", "avatar"])
    }

    /// The same with an avatar that joins as an ordinary participant, as those of older plugins do.
    pub fn speaks_by_standard_avatar() -> Self {
        Self::new("speak_by_avatar", &["no_reply", "standard_avatar"]).with("kind", "standard")
    }

    /// Greets on a track without a source.
    pub fn speaks_without_a_source() -> Self {
        Self::new("speak_without_source", &["no_reply", "unknown_source"])
    }

    /// Publishes video, greets, and replies to the first echo.
    pub fn has_video() -> Self {
        Self::new("greet_with_video", &[])
    }

    /// Lets no participant subscribe to its track.
    pub fn denies_subscription() -> Self {
        Self::new("deny_subscription", &[])
    }

    /// Greets with end-to-end encrypted audio.
    pub fn is_encrypted() -> Self {
        Self::new("greet_encrypted", &["no_reply", "encrypted"])
    }

    /// Greets, and replies to the first echo on a second track.
    pub fn restarts_its_track() -> Self {
        Self::new("restart_track", &["restarts_track"])
    }

    /// On the sandbox: an agent without a name joins, too, and the agent of the second room is silent.
    #[must_use]
    pub fn with_stray_agent(self) -> Self {
        self.fault("stray").fault("room2:silent_track")
    }

    pub fn has_no_track() -> Self {
        Self::new("no_track", &["no_track"])
    }

    pub fn sends_no_packets() -> Self {
        Self::new("no_packets", &["no_packets"])
    }

    pub fn is_silent() -> Self {
        Self::new("silence", &["silent_track"])
    }

    /// The worker that reports full load: LiveKit sends it no job.
    pub fn is_busy() -> Self {
        Self {
            agent: BUSY_AGENT,
            ..Self::new("greet", &["never_accepts"])
        }
    }

    /// The same by an agent without a name.
    #[must_use]
    pub fn unnamed(self) -> Self {
        Self { agent: "", ..self }
    }

    /// Connects this many seconds after its dispatch.
    #[must_use]
    pub fn after(self, seconds: u32) -> Self {
        self.fault(format!("join_delay={seconds}s100ms"))
            .with("connect_after", seconds)
    }

    /// Connects this many seconds after its dispatch. The canary waits only `deadline` seconds and has then deleted the room.
    #[must_use]
    pub fn too_late(self, seconds: u32, deadline: u32) -> Self {
        let after_deletion = seconds - deadline;
        self.fault(format!("late_after_deletion={after_deletion}s"))
            .with("connect_after", seconds)
    }

    /// Marks the job in the report of the agents.
    #[must_use]
    pub fn tag(self, tag: &str) -> Self {
        self.with("tag", tag)
    }

    /// Adds a setting of `agent.py`.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.metadata.insert(key.to_owned(), value.into());
        self
    }

    /// Adds a fault of the sandbox.
    #[must_use]
    pub fn fault(mut self, fault: impl Into<String>) -> Self {
        self.faults.push(fault.into());
        self
    }

    pub fn metadata(&self) -> String {
        json!(self.metadata).to_string()
    }
}
