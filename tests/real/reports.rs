//! Scenarios about what an agent's session tells of itself: the errors of its models, what it measured, what was said.

use anyhow::{Context as _, ensure};
use serde_json::Value;
use support::behaviour::Behaviour;
use support::canary::Finished;
use support::report::Batch;

use crate::fixture::{Fixture, expect};

/// Calls an agent whose model fails, long enough for every attempt that a session makes by its defaults.
fn call_failing(
    fixture: &Fixture,
    behaviour: &Behaviour,
    code: i32,
    verdict: &str,
) -> anyhow::Result<Batch> {
    let (_, settings) = fixture.call(behaviour)?;
    let finished = settings.set("deadlines.speech", "8s").run()?;
    expect(fixture, &finished, code, &[verdict])
}

/// A call in which the agent greets, hears its echo and answers.
fn converse(fixture: &Fixture, transcript: bool) -> anyhow::Result<(Batch, Finished)> {
    let (_, settings) = fixture.call(&Behaviour::converses())?;
    let finished = settings
        .set("expect.reply", true)
        .set("transcript", transcript)
        .set("batch.hold", "14s")
        .run()?;
    let batch = expect(fixture, &finished, 0, &["ok"])?;
    Ok((batch, finished))
}

/// The first of the evidence's notes that has these words.
fn noted<'a>(batch: &'a Batch, words: &str) -> anyhow::Result<&'a str> {
    let notes = &batch.probes[0].evidence.notes;
    let note = notes.iter().find(|note| note.contains(words));
    ensure!(note.is_some(), "{words:?} isn't in {notes:?}");
    Ok(note.map_or("", String::as_str))
}

fn expect_inference_limit(
    fixture: &Fixture,
    behaviour: &Behaviour,
    words: &str,
) -> anyhow::Result<String> {
    let batch = call_failing(fixture, behaviour, 3, "plan_limit")?;
    let probe = &batch.probes[0];
    ensure!(probe.limit.as_deref() == Some("inference"), "{probe:?}");
    ensure!(probe.origin.as_deref() == Some("limit"), "{probe:?}");
    noted(&batch, words)?;
    Ok(probe.detail.clone().unwrap_or_default())
}

pub fn model_that_answers_429_is_a_plan_limit(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::whose_model_fails("llm", "429", "inference_error=status_code=429");
    expect_inference_limit(fixture, &behaviour, "status_code=429")
}

pub fn voice_that_answers_429_is_a_plan_limit(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::whose_model_fails("tts", "429", "inference_error=status_code=429");
    expect_inference_limit(fixture, &behaviour, "status_code=429")
}

pub fn inference_that_is_used_up_is_a_plan_limit(fixture: &Fixture) -> anyhow::Result<String> {
    let quota = "inference_quota_exceeded";
    let behaviour =
        Behaviour::whose_model_fails("llm", "quota", &format!("inference_error={quota}"));
    expect_inference_limit(fixture, &behaviour, quota)
}

pub fn other_error_of_a_model_is_evidence_of_a_silent_agent(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let behaviour = Behaviour::whose_model_fails("llm", "500", "inference_error=status_code=500");
    let batch = call_failing(fixture, &behaviour, 1, "agent_silent")?;
    Ok(noted(&batch, "status_code=500")?.to_owned())
}

pub fn conversation_is_written_down_where_that_is_wanted(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (batch, finished) = converse(fixture, true)?;
    let probe = &batch.probes[0];
    let said = probe.transcript.as_deref().context("no transcript")?;
    let lines: Vec<_> = said
        .iter()
        .map(|it| (it.speaker.as_str(), it.text.as_str(), it.r#final))
        .collect();
    let expected = [
        ("agent", "Good day to you.", true),
        ("caller", "hello there", true),
        ("agent", "Good day to you.", true),
    ];
    ensure!(lines == expected, "{said:?}");
    let in_order = said.is_sorted_by(|one, other| one.at < other.at);
    let joined = probe.seconds("AgentJoined")?;
    ensure!(in_order && said[0].at > joined, "{said:?}");
    ensure!(!finished.stderr.contains("hello there"), "it is in the log");
    let at: Vec<_> = said.iter().map(|it| format!("{:.2}", it.at)).collect();
    Ok(format!("3 segments, at {} s", at.join(", ")))
}

pub fn conversation_is_not_written_down_where_nobody_asked(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (batch, finished) = converse(fixture, false)?;
    ensure!(batch.probes[0].transcript.is_none());
    for words in ["Good day", "hello there"] {
        ensure!(!finished.output().contains(words), "{}", finished.output());
    }
    Ok("ok, no transcript, none of its words anywhere".to_owned())
}

pub fn turns_are_measured_by_the_agent_itself(fixture: &Fixture) -> anyhow::Result<String> {
    let (batch, _) = converse(fixture, false)?;
    let turns = &batch.probes[0].evidence.agent_metrics;
    let speakers: Vec<_> = turns.iter().map(|turn| turn["speaker"].as_str()).collect();
    let expected = ["agent", "caller", "agent"].map(Some);
    ensure!(speakers == expected, "{turns:?}");
    let figures = |turn: &Value, names: &[&str]| {
        let figures = names.iter().map(|name| {
            let figure = turn[name].as_f64();
            figure.with_context(|| format!("no {name} in {turn}"))
        });
        figures.collect::<anyhow::Result<Vec<_>>>()
    };
    let answer = ["llm_ttft_seconds", "tts_ttfb_seconds"];
    figures(&turns[0], &answer)?;
    let heard = figures(
        &turns[1],
        &["transcription_delay_seconds", "end_of_turn_delay_seconds"],
    )?;
    let answered = figures(&turns[2], &answer)?;
    Ok(format!(
        "transcription and end of turn {heard:?} s, LLM and TTS {answered:?} s"
    ))
}
