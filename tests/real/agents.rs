//! Scenarios of agents that behave as real ones do, well or badly, and of what others do to a call.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;

use crate::canary::{Batch, Probe, Settings};
use crate::gate::{Gate, Hold};
use crate::order::Order;
use crate::scenarios::{
    Ground, expect, expect_faulty, expect_gone, expect_heard, expect_no_agent, expect_ok, joins,
    wait_for_job, wait_for_two_greetings,
};
use crate::stack::{AGENT, Agent, Site, wait_for};

/// The one probe of a batch of one room.
fn only(batch: &Batch) -> anyhow::Result<&Probe> {
    ensure!(batch.probes.len() == 1, "{batch:?}");
    Ok(&batch.probes[0])
}

fn detail(probe: &Probe) -> &str {
    probe.detail.as_deref().unwrap_or_default()
}

/// What the agent of this room heard, in seconds of its own tone.
fn heard(site: &Site, room: &str) -> anyhow::Result<f64> {
    let events = site.events()?;
    let mut heard = events
        .iter()
        .filter(|event| event.name() == "heard" && event.room() == room);
    let first = heard.next().context("the agent heard nothing")?;
    ensure!(heard.next().is_none(), "{room}: more than one echo heard");
    first.number("seconds")
}

// --- when it speaks ---

pub fn speech_before_our_subscription_counts_from_when_it_is_heard(
    ground: &Ground,
) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::speaks_at_once().with("seconds", 2.5))?;
    let batch = expect_ok(ground, site, &settings.run()?, 1)?;
    let probe = only(&batch)?;
    let (subscribed, spoke) = (probe.at("AgentTrackSubscribed")?, probe.at("AgentSpoke")?);
    ensure!(spoke > subscribed, "{probe:?}");
    let echoed = heard(site, &probe.room)?;
    Ok(format!(
        "ok, heard {:.3} s after the subscription, {echoed:.2} s of 2.5 s echoed",
        spoke - subscribed
    ))
}

pub fn speech_before_anybody_listens_is_an_agent_that_says_nothing(
    ground: &Ground,
) -> anyhow::Result<String> {
    let tag = "speaks-to-nobody";
    let (site, settings) = ground.call(&Order::speaks_at_once().tag(tag))?;
    let gate = Gate::before(site.address(), Hold::Signal)?;
    let running = settings
        .project("url", format!("ws://{}", gate.address))
        .set("dispatch.mode", "room")
        // The gate's time counts.
        .set("deadlines.signal", "30s")
        .set("deadlines.join", "60s")
        .set("deadlines.speech", "5s")
        .once()?;
    wait_for_job(site, tag, "greeted")?;
    gate.open();
    let batch = expect(ground, &running.finish()?, 1, &["agent_silent"])?;
    expect_gone(site, &batch)?;
    let probe = only(&batch)?;
    ensure!(probe.join_upper_bound, "{probe:?}");
    let says_so = detail(probe).contains("may have spoken before");
    ensure!(says_so, "{probe:?}");
    Ok(detail(probe).to_owned())
}

pub fn agent_that_leaves_without_its_reply_left_early(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::hangs_up())?;
    let finished = settings
        .set("expect.agent_may_leave", "after_reply")
        .set("batch.hold", "12s")
        .run()?;
    let batch = expect(ground, &finished, 1, &["agent_left_early"])?;
    expect_gone(site, &batch)?;
    let probe = only(&batch)?;
    let says_so = detail(probe).contains("before it answered the echo");
    ensure!(says_so, "{probe:?}");
    Ok(detail(probe).to_owned())
}

pub fn agent_that_leaves_after_its_reply_is_ok(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::replies_and_leaves())?;
    let finished = settings
        .set("expect.agent_may_leave", "after_reply")
        .set("expect.reply", true)
        .set("batch.hold", "20s")
        .run()?;
    let batch = expect_ok(ground, site, &finished, 1)?;
    let probe = only(&batch)?;
    let reply = probe.reply_delay_seconds.context("no reply delay")?;
    let open = probe.seconds("Left")? - probe.seconds("AgentJoined")?;
    ensure!(open < 15.0, "the room stayed open for {open} s");
    Ok(format!(
        "ok, reply after {reply:.3} s, left {open:.1} s after the join"
    ))
}

pub fn agent_that_fails_before_it_connects_is_blamed_where_its_job_is_listed(
    ground: &Ground,
) -> anyhow::Result<String> {
    let (batch, _) = expect_no_agent(ground, Order::fails(), "fails-at-once")?;
    Ok(detail(only(&batch)?).to_owned())
}

// --- who speaks, and on what ---

/// An unnamed worker, which LiveKit sends to every room, beside the target's agent: first that one speaks, then it is
/// silent, then it doesn't come at all.
pub fn stray_agent_is_evidence_and_never_the_agent(ground: &Ground) -> anyhow::Result<String> {
    let agents = [Agent::named(""), Agent::named(AGENT)];
    let site = ground.own_site(&agents, &Order::greets().beside_a_stray())?;
    let settings = |order: &Order| {
        Settings::new(site)
            .order(order)
            .set("deadlines.join", "5s")
            .set("deadlines.speech", "5s")
    };
    let named = |batch: &Batch| {
        let seen = &only(batch)?.evidence.participants;
        let stray = seen.iter().any(|line| line.ends_with("(AGENT)"));
        ensure!(stray, "no agent without a name in {seen:?}");
        anyhow::Ok(())
    };

    let well = expect_ok(ground, site, &settings(&Order::greets()).run()?, 1)?;
    named(&well)?;
    let agent = only(&well)?.agent.as_ref().context("no agent")?;
    ensure!(agent.name.as_deref() == Some(AGENT), "{agent:?}");

    let silent = settings(&Order::is_silent()).run()?;
    let silent = expect(ground, &silent, 1, &["agent_silent"])?;
    named(&silent)?;

    let nobody = settings(&Order::greets()).set("agent_name", "no-such-agent");
    let nobody = expect(ground, &nobody.run()?, 1, &["dispatch_unanswered"])?;
    named(&nobody)?;
    let told = detail(only(&nobody)?).contains("another agent came: one without a name");
    ensure!(told, "{nobody:?}");
    ensure!(only(&nobody)?.join_delay_seconds.is_none(), "{nobody:?}");
    Ok("ok, agent_silent, dispatch_unanswered, the stray named each time".to_owned())
}

pub fn background_sound_is_neither_speech_nor_echoed(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets_over_background())?;
    let batch = expect_ok(ground, site, &settings.run()?, 1)?;
    let after = expect_heard(site, only(&batch)?)?;
    Ok(format!(
        "ok, the greeting alone echoed, {after:.1} s after it"
    ))
}

pub fn background_alone_is_a_silent_agent(ground: &Ground) -> anyhow::Result<String> {
    let order = Order::plays_background_alone();
    let (batch, seen) = expect_faulty(ground, &order, "agent_silent")?;
    // Those of the voice: 50 a second, for 5 s.
    let packets = only(&batch)?.audio.packets;
    ensure!((100..400).contains(&packets), "{seen}");
    Ok(seen)
}

pub fn avatar_speaks_for_its_agent(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::speaks_by_avatar())?;
    let batch = expect_ok(ground, site, &settings.run()?, 1)?;
    let probe = only(&batch)?;
    let agent = probe.agent.as_ref().context("no agent")?;
    ensure!(agent.name.as_deref() == Some(AGENT), "{probe:?}");
    let others = &probe.evidence.participants;
    let avatar = others.iter().any(|line| line.starts_with("avatar-"));
    ensure!(
        avatar && !agent.identity.starts_with("avatar-"),
        "{probe:?}"
    );
    expect_heard(site, probe)?;
    Ok(format!("ok, join {}, echo heard", joins(&batch)?))
}

pub fn agent_that_restarts_its_track_is_heard_on(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::restarts_its_track())?;
    let finished = settings
        .set("echo.max_turns", 2)
        .set("batch.hold", "16s")
        .run()?;
    let batch = expect_ok(ground, site, &finished, 1)?;
    let probe = only(&batch)?;
    let reply = probe.reply_delay_seconds.context("no reply delay")?;
    // The second utterance, which came on another track, was echoed as the first was.
    let events = site.events()?;
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
    ground: &Ground,
) -> anyhow::Result<String> {
    let tag = "outruns-the-answer";
    let (site, settings) = ground.call(&Order::greets().tag(tag))?;
    let gate = Gate::before(site.address(), Hold::DispatchAnswer)?;
    let running = settings
        .project("url", format!("ws://{}", gate.address))
        .once()?;
    wait_for_job(site, tag, "greeted")?;
    gate.open();
    let batch = expect_ok(ground, site, &running.finish()?, 1)?;
    let probe = only(&batch)?;
    let accepted = probe.at("DispatchAccepted")?;
    ensure!(probe.at("AgentJoined")? < accepted, "{probe:?}");
    ensure!(probe.at("AgentSpoke")? < accepted, "{probe:?}");
    ensure!(!probe.join_upper_bound, "{probe:?}");
    expect_heard(site, probe)?;
    Ok(format!(
        "ok, join {}, {:.1} s before the answer",
        joins(&batch)?,
        accepted - probe.at("AgentJoined")?
    ))
}

// --- what others do to the call ---

/// Another client joins `room` as `identity`, and leaves once it is in.
///
/// Whoever it removes may delete the room before it is in. LiveKit then tries again, for 18 s at most (`serve` in
/// rtcservice.go), and creates the room anew: that one is nobody's but this client's, and goes with it.
pub fn take_identity(site: &Site, room: &str, identity: &str) -> anyhow::Result<()> {
    let mut socket = TcpStream::connect(site.address())?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let token = site.api.token(room, identity)?;
    write!(
        socket,
        "GET /rtc?protocol=16&auto_subscribe=0 HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {token}\r\n\
         Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        site.address()
    )?;
    let mut answer = [0; 12];
    socket.read_exact(&mut answer)?;
    ensure!(&answer == b"HTTP/1.1 101", "{}", answer.escape_ascii());
    drop(socket);
    // Nothing may be left to delete.
    site.api.delete_room(room).ok();
    Ok(())
}

/// One room in mid-call, what `harm` does to the canary in it, and what must come of that.
fn expect_removed(
    ground: &Ground,
    tag: &str,
    says: &str,
    harm: impl Fn(&Site, &str, &str) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets().tag(tag))?;
    let running = settings.set("batch.hold", "30s").once()?;
    let caller = wait_for_job(site, tag, "caller")?;
    wait_for_job(site, tag, "greeted")?;
    harm(site, caller.room(), caller.text("caller"))?;
    let batch = expect(ground, &running.finish()?, 4, &["removed"])?;
    expect_gone(site, &batch)?;
    let probe = only(&batch)?;
    ensure!(probe.origin.as_deref() == Some("external"), "{probe:?}");
    ensure!(detail(probe).contains(says), "{probe:?}");
    Ok(detail(probe).to_owned())
}

pub fn identity_taken_by_another_client_is_removed(ground: &Ground) -> anyhow::Result<String> {
    expect_removed(ground, "has-a-double", "DUPLICATE_IDENTITY", take_identity)
}

pub fn right_to_publish_taken_away_is_removed(ground: &Ground) -> anyhow::Result<String> {
    let harm = |site: &Site, room: &str, caller: &str| site.api.revoke(room, caller, "can_publish");
    expect_removed(ground, "may-not-publish", "to publish", harm)
}

pub fn right_to_subscribe_taken_away_is_removed(ground: &Ground) -> anyhow::Result<String> {
    let tag = "may-not-subscribe";
    // Before the agent speaks: otherwise nothing would be missing.
    let (site, settings) = ground.call(&Order::is_silent().tag(tag))?;
    let running = settings.set("deadlines.speech", "8s").once()?;
    let caller = wait_for_job(site, tag, "caller")?;
    let identity = caller.text("caller");
    site.api.revoke(caller.room(), identity, "can_subscribe")?;
    let batch = expect(ground, &running.finish()?, 4, &["removed"])?;
    expect_gone(site, &batch)?;
    let probe = only(&batch)?;
    ensure!(detail(probe).contains("to subscribe"), "{probe:?}");
    Ok(detail(probe).to_owned())
}

/// Nobody comes, which shows that each of the rooms was there to come to.
pub fn server_that_creates_no_room_by_itself_takes_every_dispatch(
    ground: &Ground,
) -> anyhow::Result<String> {
    let site = ground.own_site_with("room:\n  auto_create: false\n", &[])?;
    let started = ["explicit", "room", "token", "automatic"].map(|mode| {
        let settings = Settings::new(site)
            .set("dispatch.mode", mode)
            .set("deadlines.join", "2s");
        settings.once()
    });
    for running in started {
        let batch = expect(ground, &running?.finish()?, 1, &["dispatch_unanswered"])?;
        expect_gone(site, &batch)?;
    }
    Ok("explicit, room, token and automatic: dispatch_unanswered".to_owned())
}

// --- what becomes of the server ---

pub fn restarted_server_is_signal_lost_and_serves_the_next_batch(
    ground: &Ground,
) -> anyhow::Result<String> {
    let site = ground.own_site(&[Agent::named(AGENT)], &Order::greets())?;
    let settings = Settings::new(site)
        .set("batch.rooms", 2)
        .set("batch.hold", "30s");
    let running = settings.once()?;
    wait_for_two_greetings(site)?;
    site.server.signal(Signal::TERM)?;
    // Two signals at once would be one.
    wait_for("the server to take it", Duration::from_secs(10), || {
        let log = site.server.log()?;
        Ok(log.contains("exit requested").then_some(()))
    })?;
    // The second one makes it end with its calls.
    site.server.signal(Signal::TERM)?;
    wait_for("the server to end", Duration::from_secs(20), || {
        Ok(std::net::TcpListener::bind(site.address())
            .is_ok()
            .then_some(()))
    })?;
    let _server = site.restarted_server()?;
    let finished = running.finish()?;
    let lost = expect(ground, &finished, 4, &["signal_lost"; 2])?;
    expect_gone(site, &lost)?;
    site.prove(&Agent::named(AGENT))?;
    let next = Settings::new(site).set("batch.rooms", 2).run()?;
    let next = expect_ok(ground, site, &next, 2)?;
    Ok(format!(
        "{}; then 2 ok, join {}",
        detail(&lost.probes[0]),
        joins(&next)?
    ))
}

pub fn drained_server_lets_its_calls_end_well(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.own_site(&[Agent::named(AGENT)], &Order::greets())?;
    let running = Settings::new(site)
        .set("batch.rooms", 2)
        .set("batch.hold", "12s")
        .once()?;
    wait_for_two_greetings(site)?;
    site.server.signal(Signal::TERM)?;
    let finished = running.finish()?;
    let batch = expect(ground, &finished, 0, &["ok"; 2])?;
    for probe in &batch.probes {
        expect_heard(site, probe)?;
    }
    wait_for("the server to end", Duration::from_secs(20), || {
        Ok(site.api.rooms().is_err().then_some(()))
    })?;
    Ok("2 ok, echoes heard, the server ended after them".to_owned())
}
