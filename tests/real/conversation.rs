//! Conversations with the agent of `pipeline.py`: a real `AgentSession` with the VAD and the turn detector that livekit-agents
//! contains. The agent writes its own log of what it played, heard and requested, and the canary's figures must match it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::json;
use support::SHORT_TIMEOUT;
use support::behaviour::Behaviour;
use support::process::{Process, command, program, source};
use support::report::{Probe, Turn, unix_seconds};
use support::settings::Settings;
use support::stack::{Agent, AgentEvent, Stack};
use toml::Table;

use crate::fixture::{Fixture, expect, expect_gone};
use crate::network_path::start_relay;
use crate::relay::Path;
use crate::scenarios::{Scenario, scenarios};

/// Why these run only on the real stack.
const NO_SESSION: &str = "its agent is no AgentSession";
const NO_NETWORK: &str = "it listens on 127.0.0.1 only, so there is no network in between";

scenarios! { CONVERSATIONS:
    every_turn_of_a_conversation_matches_the_agents_log: "ok, 10 turns; reply delay and onsets match the log", real only: NO_SESSION, load: 9;
    long_answer_is_interrupted: "ok, yield delay as in the log", real only: NO_SESSION;
    network_delay_is_the_unexplained_part_of_a_reply: "ok, twice 150 ms are unexplained", real only: NO_NETWORK;
    quiet_agent_is_heard: "ok at -51 dBFS, its whole greeting echoed", real only: NO_SESSION;
    reply_in_progress_is_finished: "ok, the reply played to its end", real only: NO_SESSION;
    caller_that_cuts_in_is_noted: "ok, noted, no reply delay", real only: NO_SESSION;
    two_parts_of_a_greeting_are_spoken_whole: "ok, not interrupted, both parts echoed", real only: NO_SESSION;
    pause_within_a_greeting_is_waited_for: "ok, not interrupted, both parts echoed", real only: NO_SESSION;
    planted_delay_of_each_stage_is_reported: "ok, four stages as planted", real only: NO_SESSION;
    recognised_speech_has_no_word_error: "ok, as PocketSphinx heard it", real only: NO_SESSION;
    planted_word_errors_are_the_word_error: "ok, a word error of 2/6", real only: NO_SESSION;
    tool_that_runs_is_ok: "ok with expect.tool and expect.words", real only: NO_SESSION;
    pauses_in_an_echo_are_one_turn: "ok, one LLM request", real only: NO_SESSION;
    hold_music_is_no_reply: "ok, the reply after the tool", real only: NO_SESSION;
    thinking_sound_is_no_reply: "ok, the reply after the LLM", real only: NO_SESSION;
    colleague_answers_after_a_handoff: "ok, the reply of the second agent", real only: NO_SESSION;
    reply_of_a_slow_llm_is_waited_for: "ok, 4 s more", real only: NO_SESSION;
    agent_that_ends_the_call_after_its_reply_is_ok: "ok, the agent deleted the room", real only: NO_SESSION;
}

pub(crate) fn contains(scenario: &Scenario) -> bool {
    CONVERSATIONS.iter().any(|it| it.name == scenario.name)
}

/// The tolerances of delays against the log of the agent, in seconds: of the median and of nine in ten. The log begins a delay
/// when the agent's jitter buffer has released the end of the caller's speech. On an idle machine, the median is 40 ms.
const REPLY_TOLERANCE: (f64, f64) = (0.08, 0.12);
/// The same of nine in ten onsets. A packet of 20 ms and the look-ahead of Opus pass before a sound can arrive, and on a busy
/// machine timers are late.
const ONSET_TOLERANCE: f64 = 0.045;
const YIELD_TOLERANCE: f64 = 0.1;

/// One call, and what its agent reported.
struct Call {
    probe: Probe,
    events: Vec<AgentEvent>,
}

impl Call {
    /// Calls the agent, which must have this verdict. Rooms stay open for one turn.
    fn run(
        fixture: &Fixture,
        behaviour: &Behaviour,
        expected: (i32, &str),
        set: impl FnOnce(Settings) -> Settings,
    ) -> anyhow::Result<Self> {
        Self::on(fixture, fixture.stack(behaviour)?, behaviour, expected, set)
    }

    fn on(
        fixture: &Fixture,
        stack: &Stack,
        behaviour: &Behaviour,
        (code, verdict): (i32, &str),
        set: impl FnOnce(Settings) -> Settings,
    ) -> anyhow::Result<Self> {
        let settings = Settings::new(stack)
            .behaviour(behaviour)
            .set("expect.reply", true)
            .set("deadlines.reply", "8s")
            .set("transcript", true)
            .set("batch.hold", "12s");
        let mut batch = expect(fixture, &set(settings).run()?, code, &[verdict])?;
        expect_gone(stack, &batch)?;
        let probe = batch.probes.pop().context("no probe")?;
        let events = stack.events()?.into_iter();
        let events = events.filter(|event| event.room() == probe.room).collect();
        Ok(Self { probe, events })
    }

    fn events<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a AgentEvent> {
        self.events.iter().filter(move |event| event.name() == name)
    }

    /// The times of one kind of event, in seconds since the start of the probe.
    fn times(&self, name: &str, key: &str) -> anyhow::Result<Vec<f64>> {
        let started = unix_seconds(self.probe.started_at);
        self.events(name)
            .map(|event| Ok(event.number(key)? - started))
            .collect()
    }

    fn turn(&self) -> anyhow::Result<&Turn> {
        let [turn] = &self.probe.turns[..] else {
            anyhow::bail!("{} turns: {:?}", self.probe.turns.len(), self.probe);
        };
        Ok(turn)
    }

    /// The delay of the only reply, in seconds.
    fn reply_delay(&self) -> anyhow::Result<f64> {
        self.turn()?;
        let delay = self.probe.reply_delay_seconds;
        delay.with_context(|| format!("no reply delay: {:?}", self.probe))
    }

    /// The only reply began where the agent played speech for the last time.
    fn expect_reply_as_played(&self) -> anyhow::Result<()> {
        let replied = self.turn()?.replied.context("no reply")?;
        let played = self.times("spoke", "began")?;
        let last = played.last().context("the agent did not speak")?;
        ensure!(
            (replied - last).abs() < 0.3,
            "reply at {replied} s, but the agent spoke at {played:?}"
        );
        Ok(())
    }

    /// The number of requests to the agent's LLM.
    fn llm_requests(&self) -> usize {
        self.events("llm").count()
    }

    /// Everything that the agent understood.
    fn heard(&self) -> String {
        let texts: Vec<_> = self.events("heard").map(|it| it.text("text")).collect();
        texts.join(" ")
    }
}

fn ok() -> (i32, &'static str) {
    (0, "ok")
}

/// A figure below which this share of the figures is.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "an index of a short list"
)]
fn quantile(figures: &[f64], share: f64) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (share * (sorted.len() - 1) as f64).round() as usize;
    sorted[index]
}

/// The differences between two lists of times, without their signs.
fn differences(one: &[f64], other: &[f64]) -> Vec<f64> {
    let pairs = one.iter().zip(other);
    pairs.map(|(one, other)| (one - other).abs()).collect()
}

/// Speech by espeak-ng as a WAV file in the folder of the stack.
fn speech_file(stack: &Stack, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = stack.dir().join(name);
    let mut voice = command(&program("PYTHON")?);
    voice.arg(source("voice.py")).arg(text).arg(&path);
    let status = Process::spawn("voice", voice, stack.dir())?.finish(SHORT_TIMEOUT)?;
    ensure!(status.success(), "voice.py: {status}");
    Ok(path)
}

// --- turns ---

fn every_turn_of_a_conversation_matches_the_agents_log(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    const TURNS: usize = 10;
    let behaviour = Behaviour::pipeline().with("replies", json!(["I have noted that."]));
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings
            .set("caller.turns", 10)
            .set("caller.silence", "1s")
            .set("batch.hold", "20s")
    })?;
    let turns = &call.probe.turns;
    ensure!(turns.len() == TURNS, "{} turns", turns.len());
    ensure!(
        call.llm_requests() == TURNS,
        "{} LLM requests",
        call.llm_requests()
    );
    let replied: Option<Vec<_>> = turns.iter().map(|turn| turn.replied).collect();
    let delays: Option<Vec<_>> = turns.iter().map(|turn| turn.reply_delay_seconds).collect();
    let replied = replied.with_context(|| format!("a turn without a reply: {turns:?}"))?;
    let delays = delays.with_context(|| format!("a turn without a delay: {turns:?}"))?;
    // The first speech is the greeting.
    let spoke = &call.times("spoke", "began")?[1..];
    let heard = call.times("heard", "ended")?;
    ensure!(
        spoke.len() == TURNS && heard.len() == TURNS,
        "{} replies played, {} echoes heard",
        spoke.len(),
        heard.len()
    );
    let in_log: Vec<_> = spoke
        .iter()
        .zip(&heard)
        .map(|(to, from)| to - from)
        .collect();
    let delays = differences(&delays, &in_log);
    let onsets = differences(&replied, spoke);
    let (median, most) = (quantile(&delays, 0.5), quantile(&delays, 0.9));
    let onset = quantile(&onsets, 0.9);
    let seen = format!(
        "ok; from the log: reply delay {:.0} ms (median), {:.0} ms (p90), onset {:.0} ms (p90)",
        median * 1e3,
        most * 1e3,
        onset * 1e3
    );
    ensure!(
        median < REPLY_TOLERANCE.0 && most < REPLY_TOLERANCE.1,
        "{seen}"
    );
    ensure!(onset < ONSET_TOLERANCE, "{seen}");
    Ok(seen)
}

fn pauses_in_an_echo_are_one_turn(fixture: &Fixture) -> anyhow::Result<String> {
    let greeting =
        "Hello. This is the test line. All calls are recorded. How can I help you today?";
    let behaviour = Behaviour::pipeline().with("greeting", json!([greeting]));
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "18s")
    })?;
    let requests = call.llm_requests();
    ensure!(requests == 1, "{requests} LLM requests");
    ensure!(call.heard() == greeting, "heard {:?}", call.heard());
    call.expect_reply_as_played()?;
    Ok(format!(
        "ok, one LLM request, reply {:.3} s",
        call.reply_delay()?
    ))
}

fn two_parts_of_a_greeting_are_spoken_whole(fixture: &Fixture) -> anyhow::Result<String> {
    expect_whole_greeting(fixture, false)
}

fn pause_within_a_greeting_is_waited_for(fixture: &Fixture) -> anyhow::Result<String> {
    expect_whole_greeting(fixture, true)
}

/// A greeting with a pause of 1.6 s, as one speech of the session or as two.
fn expect_whole_greeting(fixture: &Fixture, as_one: bool) -> anyhow::Result<String> {
    let parts = ["This call is recorded.", "How can I help you today?"];
    let behaviour = Behaviour::pipeline()
        .with("greeting", json!([parts[0], 1.6, parts[1]]))
        .with("as_one", as_one);
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "16s")
    })?;
    let mut spoken = call.events("spoke");
    ensure!(spoken.all(|it| !it.flag("interrupted")), "{:?}", call.probe);
    let heard = call.heard();
    ensure!(heard == parts.join(" "), "heard {heard:?}");
    Ok(format!(
        "ok, both parts echoed, reply {:.3} s",
        call.reply_delay()?
    ))
}

/// The agent pauses for about as long as the caller's silence, and its session reports in the pause that it listens. If the pause
/// is shorter, the caller waits for the rest. If it is longer, the session drops the rest without a report: it has not begun to
/// speak when it hears the caller. Between the two are 0.1 s, so several pauses are tried.
fn caller_that_cuts_in_is_noted(fixture: &Fixture) -> anyhow::Result<String> {
    let greeting = [
        "Welcome to the test line.",
        "This call is recorded. How can I help you today?",
    ];
    for pause in [2.1, 2.05, 2.0, 2.1, 1.95, 2.0] {
        let behaviour =
            Behaviour::pipeline().with("greeting", json!([greeting[0], pause, greeting[1]]));
        let call = Call::run(fixture, &behaviour, ok(), |settings| {
            settings.set("batch.hold", "16s")
        })?;
        let cut = call.events("spoke").filter(|it| it.flag("interrupted"));
        let cut = cut.count();
        if cut == 0 {
            continue;
        }
        ensure!(cut == 1, "{cut} interruptions");
        let notes = &call.probe.evidence.notes;
        let note = notes.iter().find(|it| it.starts_with("the caller cut in"));
        let note = note.with_context(|| format!("no note in {notes:?}"))?;
        let delay = call.probe.reply_delay_seconds;
        ensure!(delay.is_none(), "a reply delay of {delay:?} s");
        return Ok(note.chars().take(40).collect());
    }
    anyhow::bail!("nothing was interrupted")
}

fn reply_in_progress_is_finished(fixture: &Fixture) -> anyhow::Result<String> {
    let reply = "Thank you, I have noted that. We will call you back tomorrow morning at nine.";
    let behaviour = Behaviour::pipeline().with("replies", json!([reply]));
    // The reply begins about 6.5 s after the agent's join, and lasts 4 s.
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "7s")
    })?;
    let last = call.events("spoke").last().context("no speech")?;
    let seconds = last.number("seconds")?;
    ensure!(
        !last.flag("interrupted") && seconds > 3.5,
        "{seconds} s played"
    );
    let left = call.probe.seconds("Left")?;
    let turn = call.turn()?;
    let ended = turn.replied.context("no reply")? + seconds;
    ensure!(
        left > ended,
        "left at {left} s, the reply ended at {ended} s"
    );
    Ok(format!(
        "ok, left {:.1} s after the end of the reply",
        left - ended
    ))
}

// --- what is no reply ---

fn thinking_sound_is_no_reply(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::pipeline()
        .with("thinking_sound", true)
        .with("ambient_sound", true)
        .with("llm_delay", 2.5);
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "14s")
    })?;
    call.expect_reply_as_played()?;
    ensure!(call.reply_delay()? > 2.5, "{:?}", call.probe);
    Ok(format!("ok, reply {:.3} s", call.reply_delay()?))
}

fn hold_music_is_no_reply(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::pipeline()
        .with("calls", json!({"1": "book_table"}))
        .with("hold_music", true)
        .with("tool_seconds", 3);
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "15s")
    })?;
    call.expect_reply_as_played()?;
    ensure!(call.reply_delay()? > 3.0, "{:?}", call.probe);
    Ok(format!("ok, reply {:.3} s", call.reply_delay()?))
}

// --- the agent's own way ---

fn quiet_agent_is_heard(fixture: &Fixture) -> anyhow::Result<String> {
    let greeting = "Hello, this is the test line. How can I help you today?";
    let behaviour = Behaviour::pipeline()
        .with("greeting", json!([greeting]))
        .with("gain", -29);
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "16s")
    })?;
    let spoke = call.probe.seconds("AgentSpoke")?;
    let began = call.times("spoke", "began")?;
    let began = began.first().context("no speech")?;
    let late = spoke - began;
    ensure!(
        late.abs() < 0.2,
        "first speech {late} s after its playout began"
    );
    ensure!(call.heard() == greeting, "heard {:?}", call.heard());
    let level = call.probe.evidence.speech_level_dbfs.context("no level")?;
    Ok(format!(
        "ok at {level:.0} dBFS, first speech {:.0} ms late",
        late * 1e3
    ))
}

fn colleague_answers_after_a_handoff(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::pipeline().with("calls", json!({"1": "transfer"}));
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "13s")
    })?;
    ensure!(call.events("handoff").count() == 1, "no handoff");
    call.expect_reply_as_played()?;
    let segments = call.probe.transcript.iter().flatten();
    let texts: Vec<_> = segments.map(|segment| segment.text.as_str()).collect();
    ensure!(texts.iter().any(|it| it.contains("colleague")), "{texts:?}");
    Ok(format!("ok, reply {:.3} s", call.reply_delay()?))
}

fn reply_of_a_slow_llm_is_waited_for(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::pipeline().with("llm_delay", 4);
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "14s")
    })?;
    call.expect_reply_as_played()?;
    ensure!(call.reply_delay()? > 4.0, "{:?}", call.probe);
    Ok(format!("ok, reply {:.3} s", call.reply_delay()?))
}

fn agent_that_ends_the_call_after_its_reply_is_ok(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::pipeline()
        .with("calls", json!({"1": "end_call"}))
        .with("replies", json!(["Thank you for calling. Goodbye."]));
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings
            .set("expect.agent_may_leave", "after_reply")
            .set("batch.hold", "20s")
    })?;
    let left = call.probe.seconds("Left")?;
    ensure!(left < 18.0, "the agent did not end the call");
    Ok(format!("ok, ended after {left:.1} s"))
}

// --- interruptions ---

fn long_answer_is_interrupted(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::gives_a_long_answer();
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings
            .set("caller.interrupt", true)
            .set("expect.yield_within", "4s")
    })?;
    let mut turns = call.probe.turns.iter();
    let turn = turns
        .find(|turn| turn.yield_delay_seconds.is_some())
        .context("no interruption")?;
    let (started, delay) = (turn.caller_started, turn.yield_delay_seconds);
    let (started, delay) = (started.context("no start")?, delay.context("no delay")?);
    let cut: Vec<_> = call
        .events("spoke")
        .filter(|it| it.flag("interrupted"))
        .collect();
    ensure!(cut.len() == 1, "{} speeches were interrupted", cut.len());
    let ended = cut[0].number("ended")? - unix_seconds(call.probe.started_at);
    let in_log = ended - started;
    let seen = format!("ok, yielded after {delay:.3} s ({in_log:.3} s in the log)");
    ensure!((delay - in_log).abs() < YIELD_TOLERANCE, "{seen}");
    Ok(seen)
}

// --- who speaks first, and what is said ---

const QUESTION: &str = "Please book a table for two.";

fn tool_that_runs_is_ok(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::waits_for_the_caller()
        .with("calls", json!({"1": "book_table"}))
        .with("hears", json!([QUESTION]));
    let stack = fixture.stack(&behaviour)?;
    let question = speech_file(stack, "question.wav", QUESTION)?;
    let question = question.to_str().context("a path in UTF-8")?;
    let expected = Table::from_iter([
        ("tool".to_owned(), "book_table".into()),
        ("words".to_owned(), vec!["thank you|thanks", "noted"].into()),
    ]);
    let call = Call::on(fixture, stack, &behaviour, ok(), |settings| {
        settings
            .set("caller.speaks_first", true)
            .line(question, expected)
    })?;
    ensure!(call.events("tool").count() == 1, "no tool");
    Ok(format!("ok, reply {:.3} s", call.reply_delay()?))
}

// --- figures ---

fn planted_word_errors_are_the_word_error(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::pipeline().with("planted_errors", 2);
    let call = Call::run(fixture, &behaviour, ok(), |settings| settings)?;
    let error = call.turn()?.word_error.context("no word error")?;
    // "How can I help you today?" has six words.
    ensure!((error - 2.0 / 6.0).abs() < 1e-3, "a word error of {error}");
    Ok(format!("ok, a word error of {error:.4}"))
}

/// The STT recognises speech instead of being told what was said.
fn recognised_speech_has_no_word_error(fixture: &Fixture) -> anyhow::Result<String> {
    let said = ["Hello, this is the test line.", "How can I help you today?"];
    let others = ["Please book a table for two.", "We open at nine."];
    let behaviour = Behaviour::pipeline()
        .with("greeting", json!([said.join(" ")]))
        .with("sentences", json!([said, others].concat()));
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "16s")
    })?;
    let heard = call.heard();
    let error = call.turn()?.word_error.context("no word error")?;
    ensure!(error == 0.0, "a word error of {error}: heard {heard:?}");
    Ok(format!("ok, heard {heard:?}"))
}

fn planted_delay_of_each_stage_is_reported(fixture: &Fixture) -> anyhow::Result<String> {
    let planted = [
        ("transcription", "stt_delay", 0.8),
        ("end_of_turn", "turn_delay", 1.6),
        ("llm", "llm_delay", 1.2),
        ("tts", "tts_delay", 0.6),
    ];
    let behaviour = planted
        .iter()
        .fold(Behaviour::pipeline(), |behaviour, (_, key, seconds)| {
            behaviour.with(key, *seconds)
        });
    let call = Call::run(fixture, &behaviour, ok(), |settings| {
        settings.set("batch.hold", "15s")
    })?;
    let stages = &call.turn()?.stages;
    let mut seen = Vec::new();
    for (stage, _, seconds) in planted {
        let found = stages.get(stage).copied().flatten();
        let found = found.with_context(|| format!("no {stage} in {stages:?}"))?;
        ensure!(
            (found - seconds).abs() < 0.15,
            "{stage} is {found}, planted {seconds}: {stages:?}"
        );
        seen.push(format!("{stage} {found:.2} s"));
    }
    Ok(format!("ok, {}", seen.join(", ")))
}

fn network_delay_is_the_unexplained_part_of_a_reply(fixture: &Fixture) -> anyhow::Result<String> {
    let delay = Duration::from_millis(150);
    let stack = fixture.stack_behind_veth(&[Agent::conversation()])?;
    let path = Path {
        delay,
        jitter: Duration::ZERO,
        loss: 0.0,
    };
    let _relay = start_relay(stack, path)?;
    let behaviour = Behaviour::pipeline();
    let call = Call::on(fixture, stack, &behaviour, ok(), |settings| settings)?;
    let turn = call.turn()?;
    let unexplained = turn.unexplained_seconds.context("no claim")?;
    let seen = format!(
        "ok, reply {:.3} s, of which the agent claims {:.3} s",
        call.reply_delay()?,
        turn.agent_claim_seconds.unwrap_or(f64::NAN)
    );
    // There and back, and the agent's jitter buffer.
    let network = 2.0 * delay.as_secs_f64();
    ensure!(
        (network - 0.02..network + 0.25).contains(&unexplained),
        "{seen}"
    );
    Ok(seen)
}
