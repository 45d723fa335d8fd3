//! Scenarios of agents that behave well or badly as real ones do, and of what other clients do to a call.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use livekit_protocol::participant_info::Kind;
use livekit_protocol::{
    ParticipantInfo, ParticipantUpdate, SubscriptionError, SubscriptionResponse,
};
use rustix::process::Signal;
use support::behaviour::Behaviour;
use support::canary::Canary;
use support::gate::{Gate, Hold};
use support::settings::Settings;
use support::signal_proxy::{SignalMessage, SignalProxy};
use support::stack::{AGENT, Agent, Stack};
use support::wait_for;

use crate::fixture::{
    Fixture, expect, expect_agent_fault, expect_faulty, expect_gone, expect_heard, expect_no_agent,
    expect_ok, join_delays, wait_for_job, wait_for_two_greetings,
};
use crate::proxy::Interceptor;

/// How long the agent of this room heard its own tone, in seconds.
fn heard(stack: &Stack, room: &str) -> anyhow::Result<f64> {
    let events = stack.events()?;
    let mut heard = events
        .iter()
        .filter(|event| event.name() == "heard" && event.room() == room);
    let first = heard.next().context("the agent heard nothing")?;
    ensure!(heard.next().is_none(), "{room}: more than one echo heard");
    first.number("seconds")
}

// --- when the agent speaks ---

pub(crate) fn speech_before_the_subscription_counts_from_its_first_audio(
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

pub(crate) fn speech_before_the_canary_joins_is_agent_silent(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let tag = "speaks-too-early";
    let (stack, settings) = fixture.call(&Behaviour::speaks_at_once().tag(tag))?;
    let gate = Gate::before(stack.address(), Hold::Signal)?;
    let running = settings
        .project("url", format!("ws://{}", gate.address))
        .set("dispatch.mode", "room")
        // The time at the gate counts.
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

pub(crate) fn agent_that_leaves_before_its_reply_is_agent_left_early(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::hangs_up())?;
    let finished = settings
        .set("expect.agent_may_leave", "after_reply")
        .set("batch.hold", "12s")
        .run()?;
    let batch = expect(fixture, &finished, 1, &["agent_left_early"])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    let says_so = probe.detail().contains("before it answered the caller");
    ensure!(says_so, "{probe:?}");
    Ok(probe.detail().to_owned())
}

pub(crate) fn agent_that_leaves_after_its_reply_is_ok(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::replies_and_leaves())?;
    let finished = settings
        .set("expect.agent_may_leave", "after_reply")
        .expects_reply()
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

/// The agent ends the call by deleting the room once it has spoken. That is ok if it may, and otherwise another program could
/// have done it.
fn expect_call_ended_by(fixture: &Fixture, behaviour: &Behaviour) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(behaviour)?;
    let settings = settings.set("batch.hold", "60s");
    let not_allowed = settings.run()?;
    let not_allowed = expect(fixture, &not_allowed, 4, &["removed"])?;
    expect_gone(stack, &not_allowed)?;
    let probe = not_allowed.only_probe()?;
    let hints = probe.detail().contains("set expect.agent_may_leave");
    ensure!(hints, "{probe:?}");

    let allowed = settings.set("expect.agent_may_leave", "after_speech");
    let batch = expect_ok(fixture, stack, &allowed.run()?, 1)?;
    let probe = batch.only_probe()?;
    let open = probe.seconds("RoomDeleted")? - probe.seconds("AgentJoined")?;
    ensure!(open < 50.0, "the room stayed open for {open} s");
    probe.at("AgentSpoke")?;
    let mut notes = probe.evidence.notes.iter();
    let deleted = notes.find(|note| note.contains("ROOM_DELETED"));
    let deleted = deleted.with_context(|| format!("{probe:?}"))?;
    Ok(format!("removed if it may not; else ok: {deleted}"))
}

pub(crate) fn agent_that_may_leave_and_deletes_the_room_is_ok(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    expect_call_ended_by(fixture, &Behaviour::ends_the_call())
}

pub(crate) fn agent_that_may_leave_and_closes_its_session_is_ok(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    expect_call_ended_by(fixture, &Behaviour::closes_its_session())
}

pub(crate) fn agent_that_fails_before_it_connects_is_agent_no_show_if_its_job_is_listed(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (batch, _) = expect_no_agent(fixture, Behaviour::fails(), "fails-at-once")?;
    Ok(batch.only_probe()?.detail().to_owned())
}

// --- who speaks, and on which track ---

/// An unnamed worker, which LiveKit sends to every room, in addition to the target's agent. The agent speaks in the first
/// room, is silent in the second, and doesn't join the third.
pub(crate) fn stray_agent_is_evidence_but_never_the_agent(
    fixture: &Fixture,
) -> anyhow::Result<String> {
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

    let absent = settings(&Behaviour::greets()).set("agent_name", "no-such-agent");
    let absent = expect(fixture, &absent.run()?, 1, &["dispatch_unanswered"])?;
    named(&absent)?;
    let names_stray = absent
        .only_probe()?
        .detail()
        .contains("another agent came: one without a name");
    ensure!(names_stray, "{absent:?}");
    ensure!(
        absent.only_probe()?.join_delay_seconds.is_none(),
        "{absent:?}"
    );
    Ok("ok, agent_silent, dispatch_unanswered, the stray agent named in each".to_owned())
}

pub(crate) fn background_sound_is_not_speech_and_is_not_echoed(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets_over_background())?;
    let batch = expect_ok(fixture, stack, &settings.run()?, 1)?;
    let after = expect_heard(stack, batch.only_probe()?)?;
    Ok(format!(
        "ok, the greeting alone echoed, {after:.1} s after it"
    ))
}

pub(crate) fn background_sound_without_speech_is_agent_silent(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let behaviour = Behaviour::plays_background_alone();
    let (batch, seen) = expect_faulty(fixture, &behaviour, "agent_silent")?;
    // The packets of the voice: 50 per second for 5 s.
    let packets = batch.only_probe()?.audio.packets;
    ensure!((100..400).contains(&packets), "{seen}");
    Ok(seen)
}

pub(crate) fn avatar_speaks_for_its_agent(fixture: &Fixture) -> anyhow::Result<String> {
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

pub(crate) fn avatar_that_is_no_agent_needs_a_place_in_the_room(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::speaks_by_standard_avatar())?;
    let full = settings.run()?;
    let full = expect(fixture, &full, 1, &["agent_no_track"])?;
    expect_gone(stack, &full)?;
    let probe = full.only_probe()?;
    let hints = probe.detail().contains("room.max_participants");
    ensure!(hints, "{probe:?}");

    let batch = settings.set("room.max_participants", 2).run()?;
    let batch = expect_ok(fixture, stack, &batch, 1)?;
    let probe = batch.only_probe()?;
    let mut others = probe.evidence.participants.iter();
    let avatar = others.any(|line| line.starts_with("avatar-") && line.contains("(STANDARD"));
    ensure!(avatar, "{probe:?}");
    expect_heard(stack, probe)?;
    Ok("agent_no_track with one place, ok with two".to_owned())
}

pub(crate) fn agent_without_a_track_source_is_heard(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::speaks_without_a_source())?;
    let batch = expect_ok(fixture, stack, &settings.run()?, 1)?;
    let probe = batch.only_probe()?;
    let mut notes = probe.evidence.notes.iter();
    let has_note = notes.any(|note| note.contains("a track of source UNKNOWN"));
    ensure!(has_note, "{probe:?}");
    let [track] = &probe.evidence.tracks[..] else {
        anyhow::bail!("not one track: {probe:?}");
    };
    let listed = track.contains(": AUDIO from UNKNOWN \"voice\"");
    ensure!(listed && !track.contains("encrypted"), "{track}");
    expect_heard(stack, probe)?;
    Ok(format!("ok, echo heard, noted, {track}"))
}

pub(crate) fn agent_with_video_is_heard(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::has_video())?;
    let finished = settings.expects_reply().set("batch.hold", "8s");
    let batch = expect_ok(fixture, stack, &finished.run()?, 1)?;
    let probe = batch.only_probe()?;
    let mut tracks = probe.evidence.tracks.iter();
    let listed = tracks.any(|track| track.contains(": VIDEO from CAMERA \"avatar\""));
    ensure!(listed, "{probe:?}");
    // LiveKit reports a video codec that the canary did not accept.
    let notes = probe.evidence.notes.join("\n");
    ensure!(!notes.contains("could not subscribe"), "{probe:?}");
    let reply = probe.reply_delay_seconds.context("no reply")?;
    expect_heard(stack, probe)?;
    Ok(format!("ok, reply after {reply:.3} s"))
}

pub(crate) fn agent_that_denies_the_subscription_is_named(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::denies_subscription())?;
    let (batch, _) = expect_agent_fault(fixture, stack, &settings, "agent_no_track")?;
    let probe = batch.only_probe()?;
    let named = probe.detail().contains("The agent does not permit it");
    ensure!(named, "{probe:?}");
    Ok(probe.detail().to_owned())
}

pub(crate) fn end_to_end_encrypted_agent_is_config_rejected(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::is_encrypted())?;
    let batch = expect(fixture, &settings.run()?, 2, &["config_rejected"])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    ensure!(probe.origin.as_deref() == Some("config"), "{probe:?}");
    ensure!(probe.detail().contains("encrypted (GCM)"), "{probe:?}");
    let mut tracks = probe.evidence.tracks.iter();
    let listed = tracks.any(|track| {
        track.contains(": AUDIO from MICROPHONE") && track.ends_with("encrypted (GCM)")
    });
    ensure!(listed, "{probe:?}");
    // Ciphertext is no speech.
    ensure!(probe.at("AgentSpoke").is_err(), "{probe:?}");
    Ok(probe.detail().to_owned())
}

pub(crate) fn agent_that_restarts_its_track_is_still_heard(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::restarts_its_track())?;
    let finished = settings
        .set("caller.turns", 2)
        .set("batch.hold", "16s")
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 1)?;
    let probe = batch.only_probe()?;
    let reply = probe.reply_delay_seconds.context("no reply delay")?;
    // The second utterance, on another track, was echoed like the first.
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

/// LiveKit reports that it could not subscribe the canary to the agent's track, and sends no audio.
fn expect_failed_subscription(
    fixture: &Fixture,
    error: SubscriptionError,
    code: i32,
    reason: &str,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::sends_no_packets())?;
    let proxy = SignalProxy::before(stack.address(), move |message| {
        let SignalMessage::Update(update) = &message else {
            // An offer would name the track.
            let is_offer =
                matches!(&message, SignalMessage::Offer(offer) if offer.sdp.contains("m=audio"));
            return if is_offer { Vec::new() } else { vec![message] };
        };
        let agents = update
            .participants
            .iter()
            .filter(|one| one.kind() == Kind::Agent);
        let tracks = agents.flat_map(|agent| &agent.tracks);
        let failed = tracks.map(|track| {
            SignalMessage::SubscriptionResponse(SubscriptionResponse {
                track_sid: track.sid.clone(),
                err: error.into(),
            })
        });
        let failed: Vec<_> = failed.collect();
        std::iter::once(message).chain(failed).collect()
    })?;
    let settings = settings.project("url", proxy.url());
    let batch = expect(fixture, &settings.run()?, code, &[reason])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    let named = probe.detail().contains(error.as_str_name());
    ensure!(named, "{probe:?}");
    Ok(probe.detail().to_owned())
}

pub(crate) fn codec_that_the_canary_lacks_is_config_rejected(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let error = SubscriptionError::SeCodecUnsupported;
    expect_failed_subscription(fixture, error, 2, "config_rejected")
}

pub(crate) fn track_that_livekit_does_not_find_is_named(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let error = SubscriptionError::SeTrackNotfound;
    expect_failed_subscription(fixture, error, 1, "agent_no_track")
}

pub(crate) fn hidden_agent_is_named(fixture: &Fixture) -> anyhow::Result<String> {
    let agents = [Agent::named(AGENT).hidden()];
    let behaviour = Behaviour::greets().fault("hidden");
    let stack = fixture.own_stack(&agents, &behaviour)?;
    let settings = Settings::new(stack).behaviour(&behaviour);
    let batch = settings.set("deadlines.join", "6s").run()?;
    let batch = expect(fixture, &batch, 1, &["agent_no_track"])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    let says_so = probe.detail().contains("joined as a hidden participant");
    ensure!(says_so && probe.join_delay_seconds.is_none(), "{probe:?}");
    Ok(probe.detail().to_owned())
}

/// As a server before 1.9.2 and a worker of that time: no attribute names the agent.
fn without_agent_names(message: SignalMessage) -> Vec<SignalMessage> {
    let unnamed = |participants: Vec<ParticipantInfo>| {
        let unnamed = participants.into_iter().map(|mut one| {
            one.attributes.remove("lk.agent_name");
            one.attributes.remove("lk.agent.name");
            one
        });
        unnamed.collect()
    };
    vec![match message {
        SignalMessage::Join(mut join) => {
            join.other_participants = unnamed(join.other_participants);
            SignalMessage::Join(join)
        }
        SignalMessage::Update(update) => {
            let participants = unnamed(update.participants);
            SignalMessage::Update(ParticipantUpdate { participants })
        }
        other => other,
    }]
}

pub(crate) fn agent_without_a_name_attribute_is_recognised(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let proxy = SignalProxy::before(stack.address(), without_agent_names)?;
    let settings = settings.project("url", proxy.url());
    let mut seen = Vec::new();
    let mut settings = Some(settings);
    for mode in ["room", "token", "explicit"] {
        let next = settings.take().context("set in each round")?;
        let next = next.set("dispatch.mode", mode);
        let batch = expect_ok(fixture, stack, &next.run()?, 1)?;
        settings = Some(next);
        let probe = batch.only_probe()?;
        let mut notes = probe.evidence.notes.iter();
        let note = notes.find(|note| note.contains("has no name attribute"));
        let note = note.with_context(|| format!("{probe:?}"))?;
        let how = note.split("recognised ").nth(1).unwrap_or_default();
        let how = how.split(':').next().unwrap_or_default();
        let agent = probe.agent.as_ref().context("no agent")?;
        ensure!(agent.name.is_none(), "{agent:?}");
        expect_heard(stack, probe)?;
        seen.push(format!("{mode} {how}, join {}", join_delays(&batch)?));
    }
    Ok(seen.join("; "))
}

// --- how the agent joins ---

pub(crate) fn agent_that_joins_before_the_dispatch_response_has_a_join_delay(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let tag = "joins-before-the-response";
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
        "ok, join {}, {:.1} s before the response",
        join_delays(&batch)?,
        accepted - probe.at("AgentJoined")?
    ))
}

/// The agent is in the room before the canary, and the server names it only in an update before the join response.
pub(crate) fn agent_in_an_update_before_the_join_response_is_seen(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let tag = "comes-in-an-early-update";
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let proxy = SignalProxy::before(stack.address(), |message| match message {
        SignalMessage::Join(mut join) => {
            let participants = std::mem::take(&mut join.other_participants);
            let update = SignalMessage::Update(ParticipantUpdate { participants });
            vec![update, SignalMessage::Join(join)]
        }
        other => vec![other],
    })?;
    let gate = Gate::before(proxy.address, Hold::Signal)?;
    let running = settings
        .project("url", format!("ws://{}", gate.address))
        .set("dispatch.mode", "room")
        // The time at the gate counts.
        .set("deadlines.signal", "30s")
        .set("deadlines.join", "60s")
        .once()?;
    wait_for_job(stack, tag, "connected")?;
    gate.open();
    let batch = expect_ok(fixture, stack, &running.finish()?, 1)?;
    let probe = batch.only_probe()?;
    ensure!(probe.join_upper_bound, "{probe:?}");
    let (joined, signal) = (probe.at("AgentJoined")?, probe.at("SignalConnected")?);
    ensure!(joined >= signal, "{probe:?}");
    expect_heard(stack, probe)?;
    Ok(format!("ok, joined within {}", join_delays(&batch)?))
}

/// The agent runs as the deployment `staging` only. Each mode that names the agent reaches it there, and no mode reaches it
/// without the deployment.
pub(crate) fn deployment_of_the_agent_is_dispatched_in_each_mode(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let staging = "staging";
    let agents = [Agent::named(AGENT).deployed_as(staging)];
    let behaviour = Behaviour::greets().fault(format!("deployment={staging}"));
    let stack = fixture.own_stack(&agents, &behaviour)?;
    let mut joins = Vec::new();
    for mode in ["explicit", "room", "token"] {
        let settings = || {
            let settings = Settings::new(stack).behaviour(&behaviour);
            settings.set("dispatch.mode", mode)
        };
        let elsewhere = settings().set("deadlines.join", "3s").run()?;
        let elsewhere = expect(fixture, &elsewhere, 1, &["dispatch_unanswered"])?;
        expect_gone(stack, &elsewhere)?;
        let deployed = settings().set("dispatch.deployment", staging).run()?;
        let batch = expect_ok(fixture, stack, &deployed, 1)?;
        ensure!(batch.deployment.as_deref() == Some(staging), "{batch:?}");
        joins.push(join_delays(&batch)?);
    }
    let wrong = Settings::new(stack)
        .set("dispatch.deployment", "no-such-deployment")
        .set("deadlines.join", "3s");
    let wrong = expect(fixture, &wrong.run()?, 1, &["dispatch_unanswered"])?;
    let probe = wrong.only_probe()?;
    let named = probe
        .detail()
        .contains("\"no-such-deployment\" (LIVEKIT_AGENT_DEPLOYMENT)");
    ensure!(named, "{probe:?}");
    Ok(format!("3 ok, join {joins:?}; without it, no agent"))
}

/// haproxy accepts 15 KiB of headers by default, and livekit-server 1 MiB.
pub(crate) fn join_token_that_a_proxy_refuses_is_named_by_its_size(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let filler = "x".repeat(20_000);
    let (stack, settings) = fixture.call(&Behaviour::greets().with("filler", filler))?;
    let settings = settings.set("dispatch.mode", "token");
    let direct = settings.run()?;
    expect_ok(fixture, stack, &direct, 1)?;
    let proxy = Interceptor::start(stack, "")?;
    let settings = settings.project("url", proxy.url.as_str());
    let batch = expect(fixture, &settings.run()?, 2, &["config_rejected"])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    ensure!(probe.detail().contains("The join token has 2"), "{probe:?}");

    let checked = Canary::new(["check"]).config(&settings.text())?.run()?;
    let warned = checked.stdout.contains("warning: the join token has 2");
    ensure!(checked.code == Some(0) && warned, "{}", checked.output());
    Ok(probe.detail().to_owned())
}

// --- what other clients do to the call ---

/// Another client joins `room` as `identity`, and leaves at once.
///
/// The participant that it replaces may delete the room before this client has joined. LiveKit then retries for at most 18 s
/// (`serve` in rtcservice.go), and creates the room again. This function deletes that room.
pub(crate) fn take_identity(stack: &Stack, room: &str, identity: &str) -> anyhow::Result<()> {
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
    // The room may already be deleted.
    stack.api.delete_room(room).ok();
    Ok(())
}

/// During a call, `harm` removes the canary from its room. The probe is `removed`, and its detail contains `text`.
fn expect_removed(
    fixture: &Fixture,
    tag: &str,
    text: &str,
    harm: impl Fn(&Stack, &str, &str) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let running = settings.set("batch.hold", "60s").once()?;
    let caller = wait_for_job(stack, tag, "caller")?;
    wait_for_job(stack, tag, "greeted")?;
    harm(stack, caller.room(), caller.text("caller"))?;
    let batch = expect(fixture, &running.finish()?, 4, &["removed"])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    ensure!(probe.origin.as_deref() == Some("external"), "{probe:?}");
    ensure!(probe.detail().contains(text), "{probe:?}");
    Ok(probe.detail().to_owned())
}

pub(crate) fn identity_taken_by_another_client_is_removed(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    expect_removed(fixture, "has-a-double", "DUPLICATE_IDENTITY", take_identity)
}

pub(crate) fn revoked_publish_permission_is_removed(fixture: &Fixture) -> anyhow::Result<String> {
    let harm =
        |stack: &Stack, room: &str, caller: &str| stack.api.revoke(room, caller, "can_publish");
    expect_removed(fixture, "may-not-publish", "to publish", harm)
}

pub(crate) fn revoked_subscribe_permission_is_removed(fixture: &Fixture) -> anyhow::Result<String> {
    let tag = "may-not-subscribe";
    // The agent is silent, because without the permission the canary must miss its speech.
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

/// No agent joins, so every probe waits in its room. This shows that the room exists.
pub(crate) fn server_without_auto_create_accepts_every_dispatch(
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

// --- the server restarts or drains ---

pub(crate) fn restarted_server_is_signal_lost_and_the_next_batch_is_ok(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[Agent::named(AGENT)], &Behaviour::greets())?;
    let settings = Settings::new(stack)
        .set("batch.rooms", 2)
        .set("batch.hold", "60s")
        .without("late_agent_window");
    let running = settings.once()?;
    wait_for_two_greetings(stack)?;
    stack.server.signal(Signal::TERM)?;
    // Two signals at the same time would count as one.
    wait_for(
        "the server to handle the signal",
        Duration::from_secs(10),
        || {
            let log = stack.server.log()?;
            Ok(log.contains("exit requested").then_some(()))
        },
    )?;
    // After the second signal the server ends its calls and exits.
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

pub(crate) fn calls_on_a_drained_server_end_normally(fixture: &Fixture) -> anyhow::Result<String> {
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
    Ok("2 ok, echoes heard, the server ended after the calls".to_owned())
}
