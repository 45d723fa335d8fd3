//! Scenarios of agents that behave well or badly as real ones do, and of what other clients do to a call.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use support::behaviour::Behaviour;
use support::gate::{Gate, Hold};
use support::settings::Settings;
use support::stack::{AGENT, Agent, Stack};
use support::wait_for;

use crate::fixture::{
    Fixture, expect, expect_faulty, expect_gone, expect_heard, expect_no_agent, expect_ok,
    join_delays, wait_for_job, wait_for_two_greetings,
};

/// What the agent of this room heard, in seconds of its own tone.
fn heard(stack: &Stack, room: &str) -> anyhow::Result<f64> {
    let events = stack.events()?;
    let mut heard = events
        .iter()
        .filter(|event| event.name() == "heard" && event.room() == room);
    let first = heard.next().context("the agent heard nothing")?;
    ensure!(heard.next().is_none(), "{room}: more than one echo heard");
    first.number("seconds")
}

// --- when it speaks ---

pub fn speech_before_our_subscription_counts_from_when_it_is_heard(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::speaks_at_once().with("seconds", 2.5))?;
    let batch = expect_ok(fixture, stack, &settings.run()?, 1)?;
    let probe = batch.only_probe()?;
    let (subscribed, spoke) = (probe.at("AgentTrackSubscribed")?, probe.at("AgentSpoke")?);
    ensure!(spoke > subscribed, "{probe:?}");
    let echoed = heard(stack, &probe.room)?;
    Ok(format!(
        "ok, heard {:.3} s after the subscription, {echoed:.2} s of 2.5 s echoed",
        spoke - subscribed
    ))
}

pub fn speech_before_anybody_listens_is_an_agent_that_says_nothing(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let tag = "speaks-to-nobody";
    let (stack, settings) = fixture.call(&Behaviour::speaks_at_once().tag(tag))?;
    let gate = Gate::before(stack.address(), Hold::Signal)?;
    let running = settings
        .project("url", format!("ws://{}", gate.address))
        .set("dispatch.mode", "room")
        // The gate's time counts.
        .set("deadlines.signal", "30s")
        .set("deadlines.join", "60s")
        .set("deadlines.speech", "5s")
        .once()?;
    wait_for_job(stack, tag, "greeted")?;
    gate.open();
    let batch = expect(fixture, &running.finish()?, 1, &["agent_silent"])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    ensure!(probe.join_upper_bound, "{probe:?}");
    let says_so = probe.detail().contains("may have spoken before");
    ensure!(says_so, "{probe:?}");
    Ok(probe.detail().to_owned())
}

pub fn agent_that_leaves_without_its_reply_left_early(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::hangs_up())?;
    let finished = settings
        .set("expect.agent_may_leave", "after_reply")
        .set("batch.hold", "12s")
        .run()?;
    let batch = expect(fixture, &finished, 1, &["agent_left_early"])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    let says_so = probe.detail().contains("before it answered the echo");
    ensure!(says_so, "{probe:?}");
    Ok(probe.detail().to_owned())
}

pub fn agent_that_leaves_after_its_reply_is_ok(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::replies_and_leaves())?;
    let finished = settings
        .set("expect.agent_may_leave", "after_reply")
        .set("expect.reply", true)
        .set("batch.hold", "20s")
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 1)?;
    let probe = batch.only_probe()?;
    let reply = probe.reply_delay_seconds.context("no reply delay")?;
    let open = probe.seconds("Left")? - probe.seconds("AgentJoined")?;
    ensure!(open < 15.0, "the room stayed open for {open} s");
    Ok(format!(
        "ok, reply after {reply:.3} s, left {open:.1} s after the join"
    ))
}

pub fn agent_that_fails_before_it_connects_is_blamed_where_its_job_is_listed(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (batch, _) = expect_no_agent(fixture, Behaviour::fails(), "fails-at-once")?;
    Ok(batch.only_probe()?.detail().to_owned())
}

// --- who speaks, and on what ---

/// An unnamed worker, which LiveKit sends to every room, beside the target's agent: first that one speaks, then it is
/// silent, then it doesn't come at all.
pub fn stray_agent_is_evidence_and_never_the_agent(fixture: &Fixture) -> anyhow::Result<String> {
    let agents = [Agent::named(""), Agent::named(AGENT)];
    let stack = fixture.own_stack(&agents, &Behaviour::greets().with_stray_agent())?;
    let settings = |behaviour: &Behaviour| {
        Settings::new(stack)
            .behaviour(behaviour)
            .set("deadlines.join", "5s")
            .set("deadlines.speech", "5s")
    };
    let named = |batch: &support::report::Batch| {
        let seen = &batch.only_probe()?.evidence.participants;
        let stray = seen.iter().any(|line| line.ends_with("(AGENT)"));
        ensure!(stray, "no agent without a name in {seen:?}");
        anyhow::Ok(())
    };

    let well = expect_ok(fixture, stack, &settings(&Behaviour::greets()).run()?, 1)?;
    named(&well)?;
    let agent = well.only_probe()?.agent.as_ref().context("no agent")?;
    ensure!(agent.name.as_deref() == Some(AGENT), "{agent:?}");

    let silent = settings(&Behaviour::is_silent()).run()?;
    let silent = expect(fixture, &silent, 1, &["agent_silent"])?;
    named(&silent)?;

    let nobody = settings(&Behaviour::greets()).set("agent_name", "no-such-agent");
    let nobody = expect(fixture, &nobody.run()?, 1, &["dispatch_unanswered"])?;
    named(&nobody)?;
    let told = nobody
        .only_probe()?
        .detail()
        .contains("another agent came: one without a name");
    ensure!(told, "{nobody:?}");
    ensure!(
        nobody.only_probe()?.join_delay_seconds.is_none(),
        "{nobody:?}"
    );
    Ok("ok, agent_silent, dispatch_unanswered, the stray named each time".to_owned())
}

pub fn background_sound_is_neither_speech_nor_echoed(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets_over_background())?;
    let batch = expect_ok(fixture, stack, &settings.run()?, 1)?;
    let after = expect_heard(stack, batch.only_probe()?)?;
    Ok(format!(
        "ok, the greeting alone echoed, {after:.1} s after it"
    ))
}

pub fn background_alone_is_a_silent_agent(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::plays_background_alone();
    let (batch, seen) = expect_faulty(fixture, &behaviour, "agent_silent")?;
    // Those of the voice: 50 a second, for 5 s.
    let packets = batch.only_probe()?.audio.packets;
    ensure!((100..400).contains(&packets), "{seen}");
    Ok(seen)
}

pub fn avatar_speaks_for_its_agent(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::speaks_by_avatar())?;
    let batch = expect_ok(fixture, stack, &settings.run()?, 1)?;
    let probe = batch.only_probe()?;
    let agent = probe.agent.as_ref().context("no agent")?;
    ensure!(agent.name.as_deref() == Some(AGENT), "{probe:?}");
    let others = &probe.evidence.participants;
    let avatar = others.iter().any(|line| line.starts_with("avatar-"));
    ensure!(
        avatar && !agent.identity.starts_with("avatar-"),
        "{probe:?}"
    );
    expect_heard(stack, probe)?;
    Ok(format!("ok, join {}, echo heard", join_delays(&batch)?))
}

pub fn agent_that_restarts_its_track_is_heard_on(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::restarts_its_track())?;
    let finished = settings
        .set("echo.max_turns", 2)
        .set("batch.hold", "16s")
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 1)?;
    let probe = batch.only_probe()?;
    let reply = probe.reply_delay_seconds.context("no reply delay")?;
    // The second utterance, which came on another track, was echoed as the first was.
    let events = stack.events()?;
    let echoes = events
        .iter()
        .filter(|event| event.name() == "heard" && event.room() == probe.room);
    let echoes = echoes
        .map(|event| event.number("seconds"))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let whole = echoes.iter().all(|seconds| *seconds > 1.3);
    ensure!(echoes.len() == 2 && whole, "echoes of {echoes:?} s");
    Ok(format!(
        "ok, reply after {reply:.3} s, echoes of {echoes:.2?} s"
    ))
}

// --- how it comes ---

pub fn agent_before_the_answer_to_its_dispatch_has_a_join_delay(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let tag = "outruns-the-answer";
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let gate = Gate::before(stack.address(), Hold::DispatchResponse)?;
    let running = settings
        .project("url", format!("ws://{}", gate.address))
        .once()?;
    wait_for_job(stack, tag, "greeted")?;
    gate.open();
    let batch = expect_ok(fixture, stack, &running.finish()?, 1)?;
    let probe = batch.only_probe()?;
    let accepted = probe.at("DispatchAccepted")?;
    ensure!(probe.at("AgentJoined")? < accepted, "{probe:?}");
    ensure!(probe.at("AgentSpoke")? < accepted, "{probe:?}");
    ensure!(!probe.join_upper_bound, "{probe:?}");
    expect_heard(stack, probe)?;
    Ok(format!(
        "ok, join {}, {:.1} s before the answer",
        join_delays(&batch)?,
        accepted - probe.at("AgentJoined")?
    ))
}

// --- what others do to the call ---

/// Another client joins `room` as `identity`, and leaves once it is in.
///
/// Whoever it removes may delete the room before it is in. LiveKit then tries again, for 18 s at most (`serve` in
/// rtcservice.go), and creates the room anew: that one is nobody's but this client's, and goes with it.
pub fn take_identity(stack: &Stack, room: &str, identity: &str) -> anyhow::Result<()> {
    let mut socket = TcpStream::connect(stack.address())?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let token = stack.api.token(room, identity)?;
    write!(
        socket,
        "GET /rtc?protocol=16&auto_subscribe=0 HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {token}\r\n\
         Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        stack.address()
    )?;
    let mut answer = [0; 12];
    socket.read_exact(&mut answer)?;
    ensure!(&answer == b"HTTP/1.1 101", "{}", answer.escape_ascii());
    drop(socket);
    // Nothing may be left to delete.
    stack.api.delete_room(room).ok();
    Ok(())
}

/// One room in mid-call, what `harm` does to the canary in it, and what must come of that.
fn expect_removed(
    fixture: &Fixture,
    tag: &str,
    says: &str,
    harm: impl Fn(&Stack, &str, &str) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let running = settings.set("batch.hold", "30s").once()?;
    let caller = wait_for_job(stack, tag, "caller")?;
    wait_for_job(stack, tag, "greeted")?;
    harm(stack, caller.room(), caller.text("caller"))?;
    let batch = expect(fixture, &running.finish()?, 4, &["removed"])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    ensure!(probe.origin.as_deref() == Some("external"), "{probe:?}");
    ensure!(probe.detail().contains(says), "{probe:?}");
    Ok(probe.detail().to_owned())
}

pub fn identity_taken_by_another_client_is_removed(fixture: &Fixture) -> anyhow::Result<String> {
    expect_removed(fixture, "has-a-double", "DUPLICATE_IDENTITY", take_identity)
}

pub fn right_to_publish_taken_away_is_removed(fixture: &Fixture) -> anyhow::Result<String> {
    let harm =
        |stack: &Stack, room: &str, caller: &str| stack.api.revoke(room, caller, "can_publish");
    expect_removed(fixture, "may-not-publish", "to publish", harm)
}

pub fn right_to_subscribe_taken_away_is_removed(fixture: &Fixture) -> anyhow::Result<String> {
    let tag = "may-not-subscribe";
    // Before the agent speaks: otherwise nothing would be missing.
    let (stack, settings) = fixture.call(&Behaviour::is_silent().tag(tag))?;
    let running = settings.set("deadlines.speech", "8s").once()?;
    let caller = wait_for_job(stack, tag, "caller")?;
    let identity = caller.text("caller");
    stack.api.revoke(caller.room(), identity, "can_subscribe")?;
    let batch = expect(fixture, &running.finish()?, 4, &["removed"])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    ensure!(probe.detail().contains("to subscribe"), "{probe:?}");
    Ok(probe.detail().to_owned())
}

/// Nobody comes, which shows that each of the rooms was there to come to.
pub fn server_that_creates_no_room_by_itself_takes_every_dispatch(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let stack = fixture.own_stack_with("room:\n  auto_create: false\n", &[])?;
    let started = ["explicit", "room", "token", "automatic"].map(|mode| {
        let settings = Settings::new(stack)
            .set("dispatch.mode", mode)
            .set("deadlines.join", "2s");
        settings.once()
    });
    for running in started {
        let batch = expect(fixture, &running?.finish()?, 1, &["dispatch_unanswered"])?;
        expect_gone(stack, &batch)?;
    }
    Ok("explicit, room, token and automatic: dispatch_unanswered".to_owned())
}

// --- what becomes of the server ---

pub fn restarted_server_is_signal_lost_and_serves_the_next_batch(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[Agent::named(AGENT)], &Behaviour::greets())?;
    let settings = Settings::new(stack)
        .set("batch.rooms", 2)
        .set("batch.hold", "30s");
    let running = settings.once()?;
    wait_for_two_greetings(stack)?;
    stack.server.signal(Signal::TERM)?;
    // Two signals at once would be one.
    wait_for("the server to take it", Duration::from_secs(10), || {
        let log = stack.server.log()?;
        Ok(log.contains("exit requested").then_some(()))
    })?;
    // The second one makes it end with its calls.
    stack.server.signal(Signal::TERM)?;
    wait_for("the server to end", Duration::from_secs(20), || {
        Ok(TcpListener::bind(stack.address()).is_ok().then_some(()))
    })?;
    let _server = stack.restarted_server()?;
    let finished = running.finish()?;
    let lost = expect(fixture, &finished, 4, &["signal_lost"; 2])?;
    expect_gone(stack, &lost)?;
    stack.wait_for_agent(&Agent::named(AGENT))?;
    let next = Settings::new(stack).set("batch.rooms", 2).run()?;
    let next = expect_ok(fixture, stack, &next, 2)?;
    Ok(format!(
        "{}; then 2 ok, join {}",
        lost.probes[0].detail(),
        join_delays(&next)?
    ))
}

pub fn drained_server_lets_its_calls_end_well(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[Agent::named(AGENT)], &Behaviour::greets())?;
    let running = Settings::new(stack)
        .set("batch.rooms", 2)
        .set("batch.hold", "12s")
        .once()?;
    wait_for_two_greetings(stack)?;
    stack.server.signal(Signal::TERM)?;
    let finished = running.finish()?;
    let batch = expect(fixture, &finished, 0, &["ok"; 2])?;
    for probe in &batch.probes {
        expect_heard(stack, probe)?;
    }
    wait_for("the server to end", Duration::from_secs(20), || {
        Ok(stack.api.rooms().is_err().then_some(()))
    })?;
    Ok("2 ok, echoes heard, the server ended after them".to_owned())
}
