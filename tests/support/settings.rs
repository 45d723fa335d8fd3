//! Builds a settings file with one project and one target.

use toml::{Table, Value};

use crate::behaviour::Behaviour;
use crate::canary::{Canary, Finished, Running, engine};
use crate::stack::{AGENT, Stack};

/// The name of the only target.
pub const TARGET: &str = "scenario";

pub struct Settings {
    project: Table,
    target: Table,
}

impl Settings {
    /// One room with the stack's ordinary agent, which does not reply, open just long enough for a greeting and its echo. A room
    /// whose call failed is re-checked for 3 s only: a test with an agent that comes later removes `late_agent_window`.
    pub fn new(stack: &Stack) -> Self {
        let settings = Self {
            project: Table::new(),
            target: Table::new(),
        };
        settings
            .project("url", stack.url.as_str())
            .project("api_key", stack.key.as_str())
            .project("api_secret", stack.secret.as_str())
            .set("agent_name", AGENT)
            .set("engine", engine())
            .set("batch.rooms", 1)
            .set("batch.hold", stack.hold)
            .set("expect.reply", false)
            // Even so, a turn that has begun is finished.
            .set("deadlines.reply", "2s")
            // Most tests count the batches of a schedule.
            .set("confirm.rooms", 0)
            .set("deadlines.join", "15s")
            .set("late_agent_window", "3s")
    }

    /// Every turn must be answered.
    #[must_use]
    pub fn expects_reply(self) -> Self {
        self.set("expect.reply", true).set("deadlines.reply", "20s")
    }

    #[must_use]
    pub fn project(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.project.insert(key.to_owned(), value.into());
        self
    }

    /// Whether the project restricts the paths of media.
    pub fn is_restricted(&self) -> bool {
        self.project.contains_key("ice")
    }

    /// Sets a key of the target, with dots: `batch.rooms`.
    #[must_use]
    pub fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        let mut keys: Vec<_> = path.split('.').collect();
        let last = keys.pop().unwrap_or_default();
        let mut table = &mut self.target;
        for key in keys {
            table = table
                .entry(key)
                .or_insert_with(|| Table::new().into())
                .as_table_mut()
                .expect("no test sets a key both as a table and as a value");
        }
        table.insert(last.to_owned(), value.into());
        self
    }

    /// Sets an attribute of the echo participant. Its name may contain dots.
    #[must_use]
    pub fn attribute(mut self, name: &str, value: &str) -> Self {
        let participant = self.target.entry("participant");
        let participant = participant.or_insert_with(|| Table::new().into());
        let participant = participant.as_table_mut().expect("participant is a table");
        let attributes = participant.entry("attributes");
        let attributes = attributes.or_insert_with(|| Table::new().into());
        let attributes = attributes.as_table_mut().expect("attributes are a table");
        attributes.insert(name.to_owned(), value.into());
        self
    }

    /// Adds a line to the script of the caller, with the keys of its `expect`.
    #[must_use]
    pub fn line(mut self, audio: &str, expected: Table) -> Self {
        let mut line = Table::new();
        line.insert("audio".to_owned(), audio.into());
        if !expected.is_empty() {
            line.insert("expect".to_owned(), expected.into());
        }
        self = self.set("caller.mode", "script");
        let caller = self.target["caller"].as_table_mut();
        let lines = caller.expect("set above").entry("lines");
        let lines = lines.or_insert_with(|| Value::Array(Vec::new()));
        lines
            .as_array_mut()
            .expect("no test sets the lines in another way")
            .push(line.into());
        self
    }

    /// The caller says `builtin:hello` before the agent speaks, and its reply must be as `expected` has it.
    #[must_use]
    pub fn speaks_first(self, expected: Table) -> Self {
        self.set("caller.speaks_first", true)
            .line("builtin:hello", expected)
    }

    /// Calls the agent of this behaviour, and tells it the behaviour in the dispatch metadata.
    #[must_use]
    pub fn behaviour(self, behaviour: &Behaviour) -> Self {
        self.set("agent_name", behaviour.agent)
            .set("dispatch.metadata", behaviour.metadata())
    }

    /// Removes a key of the target.
    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        self.target.remove(key);
        self
    }

    /// The text of the file.
    pub fn text(&self) -> String {
        let mut file = Table::new();
        let named = |name: &str, table: &Table| {
            let mut outer = Table::new();
            outer.insert(name.to_owned(), table.clone().into());
            Value::Table(outer)
        };
        file.insert("projects".to_owned(), named("main", &self.project));
        file.insert("targets".to_owned(), named(TARGET, &self.target));
        file.to_string()
    }

    /// Starts `once` with these settings.
    pub fn once(&self) -> anyhow::Result<Running> {
        Canary::once().config(&self.text())?.start()
    }

    /// Runs `once` with these settings until it ends.
    pub fn run(&self) -> anyhow::Result<Finished> {
        self.once()?.finish()
    }
}
