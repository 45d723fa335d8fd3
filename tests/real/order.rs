//! What a scenario's agent is told to do: in agent.py's words, and in the sandbox's faults for the same.

use serde_json::{Map, Value, json};

use crate::stack::{AGENT, BUSY_AGENT};

pub struct Order {
    /// The agent that is told so.
    pub agent: &'static str,
    /// For agent.py: the dispatch metadata.
    metadata: Map<String, Value>,
    /// For the sandbox, in the text of `--fault`.
    pub faults: Vec<String>,
}

impl Order {
    fn new(behaviour: &str, faults: &[&str]) -> Self {
        Self {
            agent: AGENT,
            metadata: Map::from_iter([("behaviour".to_owned(), behaviour.into())]),
            faults: faults.iter().map(|&fault| fault.to_owned()).collect(),
        }
    }

    /// Greets, and listens for the rest of the call.
    pub fn greets() -> Self {
        Self::new("greet", &["no_reply"])
    }

    /// Greets, and answers the first echo.
    pub fn replies() -> Self {
        Self::new("reply", &[])
    }

    /// Greets, and answers the first echo, by models.
    pub fn converses() -> Self {
        Self::new("converse", &[])
    }

    /// Speaks by models, of which one (`llm`, `tts`) fails: its provider answers with this error.
    pub fn whose_model_fails(model: &str, error: &str, fault: &str) -> Self {
        Self::new("converse", &[fault])
            .with("failing", model)
            .with("error", error)
    }

    /// Greets and hangs up at once.
    pub fn hangs_up() -> Self {
        // The whole greeting.
        Self::new("leave", &["leaves_early=2500ms"])
    }

    /// Takes its job and never joins.
    pub fn never_connects() -> Self {
        Self::new("never_connect", &["never_joins"])
    }

    /// Breaks before it connects.
    pub fn fails() -> Self {
        Self::new("fail", &["never_joins"])
    }

    /// Speaks whether or not anybody has subscribed yet.
    pub fn speaks_at_once() -> Self {
        Self::new("blurt", &["no_reply", "speaks_at_once"])
    }

    /// Greets, answers the first echo and hangs up.
    pub fn replies_and_leaves() -> Self {
        // All of its greeting, and some of its reply.
        Self::new("reply_and_leave", &["leaves_early=3s500ms"])
    }

    /// Greets, with sound on a second track all along.
    pub fn greets_over_background() -> Self {
        Self::new("greet_over_background", &["no_reply", "background"])
    }

    /// The same sound, and a voice that is silent.
    pub fn plays_background_alone() -> Self {
        Self::new("background_alone", &["silent_track", "background"])
    }

    /// Publishes nothing itself: another participant speaks for it.
    pub fn speaks_by_avatar() -> Self {
        Self::new("speak_by_avatar", &["no_reply", "avatar"])
    }

    /// Greets, and answers the first echo on another track.
    pub fn restarts_its_track() -> Self {
        Self::new("restart_track", &["restarts_track"])
    }

    /// On the sandbox: an agent without a name comes too, and the second room's agent is silent.
    pub fn beside_a_stray(self) -> Self {
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

    /// The worker that claims to be at full load: it is sent no job.
    pub fn is_busy() -> Self {
        Self {
            agent: BUSY_AGENT,
            ..Self::new("greet", &["never_accepts"])
        }
    }

    /// By an agent without a name.
    pub fn unnamed(self) -> Self {
        Self { agent: "", ..self }
    }

    /// Joins so many seconds after its dispatch, and the time that connecting takes.
    pub fn after(self, seconds: u32) -> Self {
        self.fault(format!("join_delay={seconds}s100ms"))
            .with("connect_after", seconds)
    }

    /// Joins so many seconds after its dispatch, which the canary waits only `deadline` of: its room is deleted by then.
    pub fn too_late(self, seconds: u32, deadline: u32) -> Self {
        let after_deletion = seconds - deadline;
        self.fault(format!("late_after_deletion={after_deletion}s"))
            .with("connect_after", seconds)
    }

    /// Marks its job in the agents' report.
    pub fn tag(self, tag: &str) -> Self {
        self.with("tag", tag)
    }

    /// A setting of agent.py's alone.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.metadata.insert(key.to_owned(), value.into());
        self
    }

    /// A fault of the sandbox's alone.
    pub fn fault(mut self, fault: impl Into<String>) -> Self {
        self.faults.push(fault.into());
        self
    }

    pub fn metadata(&self) -> String {
        json!(self.metadata).to_string()
    }
}
