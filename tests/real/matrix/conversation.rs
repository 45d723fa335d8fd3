//! How the faults of a conversation are caused. On the real stack, the agent is that of `pipeline.py`.

use support::behaviour::Behaviour;
use support::settings::Settings;
use support::stack::{Agent, Stack};
use toml::{Table, Value};

use super::faults::one_batch;
use super::{DaemonBatch, Observation};
use crate::fixture::Fixture;

/// A call with such an agent, which must answer the caller.
fn converse(
    fixture: &Fixture,
    behaviour: &Behaviour,
    set: impl FnOnce(Settings) -> Settings,
) -> anyhow::Result<Observation> {
    converse_on(fixture.stack(behaviour)?, behaviour, set)
}

fn converse_on(
    stack: &Stack,
    behaviour: &Behaviour,
    set: impl FnOnce(Settings) -> Settings,
) -> anyhow::Result<Observation> {
    let settings = one_batch(Settings::new(stack).behaviour(behaviour))
        .set("expect.reply", true)
        .set("deadlines.reply", "4s");
    DaemonBatch::start(&set(settings))?.finish(stack)
}

pub(super) fn deaf(fixture: &Fixture) -> anyhow::Result<Observation> {
    converse(fixture, &Behaviour::is_deaf(), |settings| settings)
}

pub(super) fn deaf_later(fixture: &Fixture) -> anyhow::Result<Observation> {
    converse(fixture, &Behaviour::goes_deaf_after(2), |settings| {
        settings.set("caller.turns", 4)
    })
}

pub(super) fn dead_llm(fixture: &Fixture) -> anyhow::Result<Observation> {
    // The caller says "Hi." within the greeting's pause of 3 s.
    converse(fixture, &Behaviour::has_a_dead_llm(), |settings| {
        settings.set("caller.silence", "1s")
    })
}

pub(super) fn never_yields(fixture: &Fixture) -> anyhow::Result<Observation> {
    converse(fixture, &Behaviour::never_yields(), |settings| {
        settings
            .set("caller.interrupt", true)
            .set("expect.yield_within", "2s")
    })
}

pub(super) fn noise(fixture: &Fixture) -> anyhow::Result<Observation> {
    converse(fixture, &Behaviour::plays_noise(), |settings| {
        settings.set("deadlines.speech", "4s")
    })
}

pub(super) fn waits_for_an_echo(fixture: &Fixture) -> anyhow::Result<Observation> {
    converse(fixture, &Behaviour::waits_for_the_caller(), |settings| {
        settings.set("deadlines.speech", "4s")
    })
}

pub(super) fn waits_for_the_caller(fixture: &Fixture) -> anyhow::Result<Observation> {
    expect_of_first_reply(fixture, Table::new())
}

pub(super) fn wrong_words(fixture: &Fixture) -> anyhow::Result<Observation> {
    let words = Value::from(vec!["table|seat"]);
    expect_of_first_reply(fixture, Table::from_iter([("words".to_owned(), words)]))
}

pub(super) fn no_tool(fixture: &Fixture) -> anyhow::Result<Observation> {
    let tool = Value::from("book_table");
    expect_of_first_reply(fixture, Table::from_iter([("tool".to_owned(), tool)]))
}

/// A call in which the caller speaks first, and the reply must be as `expected` has it.
fn expect_of_first_reply(fixture: &Fixture, expected: Table) -> anyhow::Result<Observation> {
    converse(fixture, &Behaviour::waits_for_the_caller(), |settings| {
        settings.speaks_first(expected)
    })
}

pub(super) fn lost_uplink(fixture: &Fixture) -> anyhow::Result<Observation> {
    let stack = fixture.stack_behind_veth(&[Agent::conversation()])?;
    stack.drop_caller_audio()?;
    converse_on(stack, &Behaviour::pipeline(), |settings| settings)
}

pub(super) fn lost_uplink_of_the_sandbox(fixture: &Fixture) -> anyhow::Result<Observation> {
    let behaviour = Behaviour::pipeline().fault("uplink_lost");
    converse(fixture, &behaviour, |settings| settings)
}
