//! Scenarios about what an agent's session tells of itself: the errors of its models.

use anyhow::ensure;

use crate::canary::Batch;
use crate::order::Order;
use crate::scenarios::{Ground, expect};

/// Calls an agent whose model fails, long enough for every attempt that a session makes by its defaults.
fn call_failing(ground: &Ground, order: &Order, code: i32, verdict: &str) -> anyhow::Result<Batch> {
    let (_, settings) = ground.call(order)?;
    let finished = settings.set("deadlines.speech", "8s").run()?;
    expect(ground, &finished, code, &[verdict])
}

/// The first of the evidence's notes that has these words.
fn noted<'a>(batch: &'a Batch, words: &str) -> anyhow::Result<&'a str> {
    let notes = &batch.probes[0].evidence.notes;
    let note = notes.iter().find(|note| note.contains(words));
    ensure!(note.is_some(), "{words:?} isn't in {notes:?}");
    Ok(note.map_or("", String::as_str))
}

fn expect_inference_limit(ground: &Ground, order: &Order, words: &str) -> anyhow::Result<String> {
    let batch = call_failing(ground, order, 3, "plan_limit")?;
    let probe = &batch.probes[0];
    ensure!(probe.limit.as_deref() == Some("inference"), "{probe:?}");
    ensure!(probe.origin.as_deref() == Some("limit"), "{probe:?}");
    noted(&batch, words)?;
    Ok(probe.detail.clone().unwrap_or_default())
}

pub fn model_that_answers_429_is_a_plan_limit(ground: &Ground) -> anyhow::Result<String> {
    let order = Order::whose_model_fails("llm", "429", "inference_error=status_code=429");
    expect_inference_limit(ground, &order, "status_code=429")
}

pub fn voice_that_answers_429_is_a_plan_limit(ground: &Ground) -> anyhow::Result<String> {
    let order = Order::whose_model_fails("tts", "429", "inference_error=status_code=429");
    expect_inference_limit(ground, &order, "status_code=429")
}

pub fn inference_that_is_used_up_is_a_plan_limit(ground: &Ground) -> anyhow::Result<String> {
    let quota = "inference_quota_exceeded";
    let order = Order::whose_model_fails("llm", "quota", &format!("inference_error={quota}"));
    expect_inference_limit(ground, &order, quota)
}

pub fn other_error_of_a_model_is_evidence_of_a_silent_agent(
    ground: &Ground,
) -> anyhow::Result<String> {
    let order = Order::whose_model_fails("llm", "500", "inference_error=status_code=500");
    let batch = call_failing(ground, &order, 1, "agent_silent")?;
    Ok(noted(&batch, "status_code=500")?.to_owned())
}
