//! Scenarios about what the agent's session reports: errors of its models, its metrics, and the transcript.

use anyhow::{Context as _, ensure};
use serde_json::Value;
use support::behaviour::Behaviour;
use support::canary::Finished;
use support::report::Batch;

use crate::fixture::{Fixture, expect};

/// Calls an agent whose model fails, for long enough for all attempts that a session makes by default.
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

/// A call in which the agent greets, hears its echo and replies.
fn converse(fixture: &Fixture, transcript: bool) -> anyhow::Result<(Batch, Finished)> {
    let (_, settings) = fixture.call(&Behaviour::converses())?;
    let finished = settings
        .expects_reply()
        .set("transcript", transcript)
        .set("batch.hold", "14s")
        .run()?;
    let batch = expect(fixture, &finished, 0, &["ok"])?;
    Ok((batch, finished))
}

/// The first note that contains this text.
fn note<'a>(batch: &'a Batch, text: &str) -> anyhow::Result<&'a str> {
    let notes = &batch.probes[0].evidence.notes;
    let note = notes.iter().find(|note| note.contains(text));
    ensure!(note.is_some(), "{text:?} isn't in {notes:?}");
    Ok(note.map_or("", String::as_str))
}

fn expect_inference_limit(
    fixture: &Fixture,
    behaviour: &Behaviour,
    text: &str,
) -> anyhow::Result<String> {
    let batch = call_failing(fixture, behaviour, 3, "plan_limit")?;
    let probe = &batch.probes[0];
    ensure!(probe.limit.as_deref() == Some("inference"), "{probe:?}");
    ensure!(probe.origin.as_deref() == Some("limit"), "{probe:?}");
    note(&batch, text)?;
    Ok(probe.detail.clone().unwrap_or_default())
}

pub(crate) fn llm_that_responds_with_429_is_a_plan_limit(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let behaviour = Behaviour::whose_model_fails("llm", "429", "inference_error=status_code=429");
    expect_inference_limit(fixture, &behaviour, "status_code=429")
}

pub(crate) fn tts_that_responds_with_429_is_a_plan_limit(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let behaviour = Behaviour::whose_model_fails("tts", "429", "inference_error=status_code=429");
    expect_inference_limit(fixture, &behaviour, "status_code=429")
}

pub(crate) fn exhausted_inference_quota_is_a_plan_limit(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let quota = "inference_quota_exceeded";
    let behaviour =
        Behaviour::whose_model_fails("llm", "quota", &format!("inference_error={quota}"));
    expect_inference_limit(fixture, &behaviour, quota)
}

pub(crate) fn other_error_of_an_llm_is_evidence_of_a_silent_agent(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let behaviour = Behaviour::whose_model_fails("llm", "500", "inference_error=status_code=500");
    let batch = call_failing(fixture, &behaviour, 1, "agent_silent")?;
    Ok(note(&batch, "status_code=500")?.to_owned())
}

pub(crate) fn transcript_is_recorded_if_the_target_requests_it(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (batch, finished) = converse(fixture, true)?;
    let probe = &batch.probes[0];
    let segments = probe.transcript.as_deref().context("no transcript")?;
    let lines: Vec<_> = segments
        .iter()
        .map(|it| (it.speaker.as_str(), it.text.as_str(), it.r#final))
        .collect();
    let expected = [
        ("agent", "Good day to you.", true),
        ("caller", "hello there", true),
        ("agent", "Good day to you.", true),
    ];
    ensure!(lines == expected, "{segments:?}");
    let in_order = segments.is_sorted_by(|one, other| one.at < other.at);
    let joined = probe.seconds("AgentJoined")?;
    ensure!(in_order && segments[0].at > joined, "{segments:?}");
    ensure!(
        !finished.stderr.contains("hello there"),
        "the transcript is in the log"
    );
    let at: Vec<_> = segments.iter().map(|it| format!("{:.2}", it.at)).collect();
    Ok(format!("3 segments, at {} s", at.join(", ")))
}

pub(crate) fn transcript_is_not_recorded_by_default(fixture: &Fixture) -> anyhow::Result<String> {
    let (batch, finished) = converse(fixture, false)?;
    ensure!(batch.probes[0].transcript.is_none());
    for text in ["Good day", "hello there"] {
        ensure!(!finished.output().contains(text), "{}", finished.output());
    }
    Ok("ok, no transcript, and none of its words in any output".to_owned())
}

pub(crate) fn metrics_of_the_agent_session_are_evidence(
    fixture: &Fixture,
) -> anyhow::Result<String> {
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
