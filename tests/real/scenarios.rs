//! The table of scenarios: what each does to the canary, and the result that it must have.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use chrono::Utc;
use rustix::process::Signal;
use support::behaviour::Behaviour;
use support::canary::{Canary, engine};
use support::gate::{Gate, Hold};
use support::process::{Process, command, kill, program, source};
use support::recording::Heard;
use support::report::{Probe, unix_seconds};
use support::settings::Settings;
use support::stack::{AGENT, Agent, AgentEvent, Stack, StackKind};
use support::{SECRET, wait_for};
use tokio::time::Instant;
use toml::Table;

use crate::agents::{
    agent_in_an_update_before_the_join_response_is_seen,
    agent_that_denies_the_subscription_is_named,
    agent_that_fails_before_it_connects_is_agent_no_show_if_its_job_is_listed,
    agent_that_joins_before_the_dispatch_response_has_a_join_delay,
    agent_that_leaves_after_its_reply_is_ok,
    agent_that_leaves_before_its_reply_is_agent_left_early,
    agent_that_may_leave_and_closes_its_session_is_ok,
    agent_that_may_leave_and_deletes_the_room_is_ok, agent_that_restarts_its_track_is_still_heard,
    agent_with_video_is_heard, agent_without_a_name_attribute_is_recognised,
    agent_without_a_track_source_is_heard, avatar_speaks_for_its_agent,
    avatar_that_is_no_agent_needs_a_place_in_the_room,
    background_sound_is_not_speech_and_is_not_echoed,
    background_sound_without_speech_is_agent_silent, calls_on_a_drained_server_end_normally,
    codec_that_the_canary_lacks_is_config_rejected,
    deployment_of_the_agent_is_dispatched_in_each_mode,
    end_to_end_encrypted_agent_is_config_rejected, hidden_agent_is_named,
    identity_taken_by_another_client_is_removed,
    join_token_that_a_proxy_refuses_is_named_by_its_size,
    restarted_server_is_signal_lost_and_the_next_batch_is_ok,
    revoked_publish_permission_is_removed, revoked_subscribe_permission_is_removed,
    server_without_auto_create_accepts_every_dispatch,
    speech_before_the_canary_joins_is_agent_silent,
    speech_before_the_subscription_counts_from_its_first_audio,
    stray_agent_is_evidence_but_never_the_agent, track_that_livekit_does_not_find_is_named,
};
use crate::daemon::{
    frozen_daemon_blames_itself_and_goes_on,
    killed_daemon_keeps_its_ledger_and_the_next_daemon_deletes_its_rooms,
    outage_fails_only_the_batches_within_it, prometheus_has_the_same_counts_as_the_history,
    room_that_an_agent_re_creates_after_a_server_crash_is_deleted,
};
use crate::detection::{
    confirmations_cost_no_scheduled_batch_and_count_in_no_service_level,
    outage_is_confirmed_survives_a_kill_and_is_over_after_the_repair,
    poisoned_worker_is_named_by_the_incident,
};
use crate::fixture::{
    Fixture, expect, expect_agent_fault, expect_faulty, expect_gone, expect_heard, expect_no_agent,
    expect_ok, join_delays, notes_blocked_udp, range, reason_by_listed_jobs, wait_for_job,
    wait_for_two_greetings,
};
use crate::network_path::{
    join_delay_of_a_distant_server_contains_the_network_delay_once,
    measured_loss_and_jitter_match_the_network,
};
use crate::proxy::TlsProxy;
use crate::reports::{
    exhausted_inference_quota_is_a_plan_limit, llm_that_responds_with_429_is_a_plan_limit,
    metrics_of_the_agent_session_are_evidence, other_error_of_an_llm_is_evidence_of_a_silent_agent,
    transcript_is_not_recorded_by_default, transcript_is_recorded_if_the_target_requests_it,
    tts_that_responds_with_429_is_a_plan_limit,
};
use crate::turn::{
    blocked_udp_is_a_call_over_the_plainest_path_that_is_left,
    media_address_without_a_route_is_reached_over_turn, reset_turn_connection_is_media_failed,
    turn_over_tls_carries_a_call, turn_over_udp_carries_a_call,
    turn_that_refuses_the_media_address_names_the_setting,
};

pub(crate) struct Scenario {
    /// The sentence that is false if the scenario fails.
    pub name: &'static str,
    pub expected: &'static str,
    /// Why the scenario can't run on the sandbox; `None` if it can.
    pub real_only: Option<&'static str>,
    /// The number of rooms in which agents speak at the same time. It is higher for a scenario whose figures a busy machine
    /// would change.
    pub load: u32,
    /// Runs the scenario with its checks, and returns a summary.
    pub run: Run,
}

pub(crate) type Run = fn(&Fixture) -> anyhow::Result<String>;

impl Scenario {
    /// The scenario on this kind of stack, or why it can't run there. `None` if it isn't meant for it.
    pub(crate) fn on(&self, stack: StackKind) -> Option<Result<Run, &'static str>> {
        match (stack, self.real_only) {
            (StackKind::Sandbox, Some(why)) => Some(Err(why)),
            (StackKind::Sandbox, None) | (StackKind::Real, _) => Some(Ok(self.run)),
            (StackKind::Mock, _) => None,
        }
    }
}

/// Why some scenarios run only on the real stack.
const NO_PROCESS: &str = "its agent is not a separate process";
const NO_NETWORK: &str = "it listens on 127.0.0.1 only, so there is no network in between";
const NO_MODELS: &str = "its agent has no models";
const NO_VIDEO: &str = "its agent has no video";
const NO_DENIAL: &str = "its agent permits every subscription";
const NO_TCP: &str = "it supports media over UDP only";
const NO_TURN: &str = "it has no TURN server";
const SAME: &str = "a killed daemon leaves the same on both stacks";
const OWN_SANDBOX: &str = "it starts its own sandbox on both stacks";
const NO_PERMISSIONS: &str = "it can't revoke a permission";
const NO_SETTINGS: &str = "it always creates a room for a token";
const NO_RESTART: &str = "it ends at once, and listens on another port after a restart";

/// A table of scenarios. The longest come first, so that no long one runs alone at the end.
macro_rules! scenarios {
    ($table:ident: $($name:ident: $expected:literal $(, real only: $why:ident)? $(, load: $load:literal)?;)*) => {
        pub(crate) const $table: &[Scenario] = &[
            $(Scenario {
                name: stringify!($name),
                expected: $expected,
                real_only: scenarios!(@why $($why)?),
                load: scenarios!(@load $($load)?),
                run: $name,
            },)*
        ];
    };
    (@why) => { None };
    (@why $why:ident) => { Some($why) };
    (@load) => { 1 };
    (@load $load:literal) => { $load };
}

pub(crate) use scenarios;

scenarios! { SCENARIOS:
    outage_is_confirmed_survives_a_kill_and_is_over_after_the_repair: "failing, one message of it and one of its end, over a kill";
    confirmations_cost_no_scheduled_batch_and_count_in_no_service_level: "no batch skipped, service levels of the schedule", load: 3;
    poisoned_worker_is_named_by_the_incident: "the worker, and no other factor", real only: NO_PROCESS, load: 4;
    room_that_an_agent_re_creates_after_a_server_crash_is_deleted: "3 signal_lost; 75 s later no room", real only: NO_RESTART, load: 3;
    frozen_daemon_blames_itself_and_goes_on: "internal, nothing counts; then ok";
    outage_fails_only_the_batches_within_it: "dispatch_unanswered within, ok outside, counters = history, exit 0", real only: NO_PROCESS;
    killed_daemon_keeps_its_ledger_and_the_next_daemon_deletes_its_rooms: "no incomplete row, ledger complete, journalled rooms deleted", real only: SAME, load: 2;
    prometheus_has_the_same_counts_as_the_history: "counters = history, promtool finds nothing", real only: OWN_SANDBOX;
    killed_job_is_agent_left_early: "agent_left_early, exit 1", real only: NO_PROCESS;
    killed_worker_is_agent_left_early: "agent_left_early, exit 1", real only: NO_PROCESS;
    frozen_server_is_signal_lost_and_its_rooms_are_listed: "signal_lost within 20 s, rooms named, exit 4", load: 2;
    late_agent_of_create_dispatch_changes_no_verdict_and_leaves_no_room: "no agent; 15 s later no room, exit 1";
    deployment_of_the_agent_is_dispatched_in_each_mode: "3 ok with it, dispatch_unanswered without", load: 2;
    stray_agent_is_evidence_but_never_the_agent: "ok, agent_silent, dispatch_unanswered; the stray is named", load: 2;
    restarted_server_is_signal_lost_and_the_next_batch_is_ok: "2 signal_lost, exit 4; then 2 ok", real only: NO_RESTART, load: 2;
    calls_on_a_drained_server_end_normally: "2 ok, exit 0, then the server ends", real only: NO_RESTART, load: 2;
    measured_loss_and_jitter_match_the_network: "2 ok, both figures right, exit 0", real only: NO_NETWORK, load: 4;
    join_delay_of_a_distant_server_contains_the_network_delay_once: "ok, joined by the server's clock, exit 0", real only: NO_NETWORK, load: 4;
    five_rooms_open_in_order_and_the_agent_hears_every_echo: "5 ok, exit 0", load: 5;
    panic_in_one_probe_does_not_affect_the_others: "4 ok, 1 internal, exit 4", load: 5;
    delayed_agent_has_at_least_its_delay_as_join_delay: "ok, every join delay >= 2.000 s", load: 3;
    no_worker_is_dispatch_unanswered: "dispatch_unanswered, exit 1";
    busy_worker_is_dispatch_unanswered: "dispatch_unanswered, exit 1";
    wrong_agent_name_is_dispatch_unanswered: "dispatch_unanswered, exit 1";
    agent_that_never_connects_is_agent_no_show_if_its_job_is_listed: "agent_no_show if a job is listed, exit 1";
    llm_that_responds_with_429_is_a_plan_limit: "plan_limit/inference, error noted, exit 3";
    tts_that_responds_with_429_is_a_plan_limit: "plan_limit/inference, error noted, exit 3";
    exhausted_inference_quota_is_a_plan_limit: "plan_limit/inference, error noted, exit 3";
    transcript_is_recorded_if_the_target_requests_it: "ok, agent, caller and agent in its transcript, exit 0";
    transcript_is_not_recorded_by_default: "ok, transcript null, exit 0";
    metrics_of_the_agent_session_are_evidence: "ok, figures of three turns, exit 0", real only: NO_MODELS;
    other_error_of_an_llm_is_evidence_of_a_silent_agent: "agent_silent, error noted, exit 1";
    agent_that_fails_before_it_connects_is_agent_no_show_if_its_job_is_listed: "agent_no_show if a job is listed, exit 1";
    speech_before_the_subscription_counts_from_its_first_audio: "ok, first speech after the subscription, exit 0";
    speech_before_the_canary_joins_is_agent_silent: "agent_silent with this explanation, exit 1";
    background_sound_is_not_speech_and_is_not_echoed: "ok, its greeting alone echoed, exit 0";
    background_sound_without_speech_is_agent_silent: "agent_silent, exit 1";
    avatar_that_is_no_agent_needs_a_place_in_the_room: "agent_no_track in a room for one; ok in a room for two";
    avatar_speaks_for_its_agent: "ok, the agent's own join, exit 0";
    agent_without_a_track_source_is_heard: "ok, noted, exit 0";
    agent_with_video_is_heard: "ok with a reply, exit 0", real only: NO_VIDEO;
    agent_that_denies_the_subscription_is_named: "agent_no_track, the denial named, exit 1", real only: NO_DENIAL;
    end_to_end_encrypted_agent_is_config_rejected: "config_rejected, nothing heard, exit 2";
    agent_that_restarts_its_track_is_still_heard: "ok with a reply on the second track, exit 0";
    agent_that_joins_before_the_dispatch_response_has_a_join_delay: "ok with a join delay, exit 0";
    agent_that_leaves_before_its_reply_is_agent_left_early: "agent_left_early, exit 1";
    agent_that_leaves_after_its_reply_is_ok: "ok with a reply delay, exit 0";
    agent_without_packets_is_agent_silent: "agent_silent with a join delay, exit 1";
    agent_with_a_silent_track_is_agent_silent: "agent_silent with a join delay, exit 1";
    agent_without_a_track_is_agent_no_track: "agent_no_track with a join delay, exit 1";
    agent_that_hangs_up_is_agent_left_early: "agent_left_early, exit 1";
    agent_that_may_leave_after_speech_is_ok: "ok, exit 0";
    agent_that_may_leave_and_deletes_the_room_is_ok: "removed if it may not; else ok, noted";
    agent_that_may_leave_and_closes_its_session_is_ok: "removed if it may not; else ok, noted";
    agent_without_a_name_attribute_is_recognised: "ok in each mode, noted, exit 0";
    codec_that_the_canary_lacks_is_config_rejected: "config_rejected, the error named, exit 2";
    track_that_livekit_does_not_find_is_named: "agent_no_track, the error named, exit 1";
    hidden_agent_is_named: "agent_no_track, hidden, exit 1", load: 2;
    second_agent_is_agent_duplicate: "agent_duplicate, exit 1";
    pypi_client_hears_the_agent_and_is_heard: "greeting heard, 2 s of tone heard, reply heard";
    call_is_recorded_with_its_speech_at_the_reported_times: "2 ok, both sides recorded, exit 0", load: 2;
    agent_that_replies_has_a_reply_delay: "ok with a reply delay, exit 0";
    missing_reply_is_agent_no_reply: "agent_no_reply, exit 1";
    continuous_echo_is_heard: "ok, echo heard, exit 0";
    one_by_one_holds_each_room_from_its_own_join: "ok, each room for its own hold, exit 0";
    metadata_and_attributes_reach_the_agent: "ok, canary=true seen, exit 0";
    unnamed_agent_joins_by_automatic_dispatch: "ok, exit 0";
    agent_joins_by_create_room: "ok, metadata seen, exit 0";
    agent_joins_by_token: "ok, metadata seen, exit 0";
    interval_ramp_opens_rooms_before_the_agent_joins: "3 ok, 2 s apart, exit 0", load: 3;
    burst_ramp_opens_all_rooms_at_once: "3 ok, within 1 s, exit 0", load: 3;
    server_on_another_host_is_ok: "ok, exit 0", real only: NO_NETWORK, load: 2;
    blocked_udp_is_a_call_over_tcp_with_a_note: "2 ok over TCP, noted, exit 0", real only: NO_NETWORK, load: 2;
    blocked_udp_and_tcp_is_media_failed_within_its_deadline: "media_failed within 15 s, exit 4", real only: NO_NETWORK;
    reset_media_connection_is_media_failed: "media_failed within 10 s, exit 4", real only: NO_NETWORK;
    turn_over_udp_carries_a_call: "ok over relay_udp, exit 0", real only: NO_TURN, load: 2;
    turn_over_tls_carries_a_call: "ok over relay_tls, exit 0", real only: NO_TURN, load: 2;
    media_address_without_a_route_is_reached_over_turn: "ok over relay_tls, noted, exit 0", real only: NO_TURN, load: 2;
    blocked_udp_is_a_call_over_the_plainest_path_that_is_left: "3 ok: udp, tcp, relay_tls, exit 0", real only: NO_TURN, load: 2;
    turn_that_refuses_the_media_address_names_the_setting: "media_failed, the setting named, exit 4", real only: NO_TURN;
    reset_turn_connection_is_media_failed: "media_failed within 10 s, TURN named, exit 4", real only: NO_TURN;
    tcp_only_is_ok: "2 ok over TCP, exit 0", real only: NO_TCP, load: 2;
    wss_with_a_private_authority_is_ok: "ok, exit 0";
    untrusted_certificate_is_unreachable: "unreachable, exit 4";
    certificate_for_another_name_is_unreachable: "unreachable, exit 4";
    two_batches_at_the_same_time_do_not_affect_each_other: "both ok, exit 0", load: 4;
    room_deleted_by_another_client_is_removed: "removed, exit 4";
    participant_removed_by_another_client_is_removed: "removed, exit 4";
    identity_taken_by_another_client_is_removed: "removed, exit 4";
    revoked_subscribe_permission_is_removed: "removed, exit 4", real only: NO_PERMISSIONS;
    revoked_publish_permission_is_removed: "removed, exit 4", real only: NO_PERMISSIONS;
    server_without_auto_create_accepts_every_dispatch: "4 dispatch_unanswered, exit 1", real only: NO_SETTINGS;
    killed_server_is_signal_lost_at_once: "signal_lost within 3 s, exit 4", load: 2;
    join_token_that_a_proxy_refuses_is_named_by_its_size: "ok without a proxy; config_rejected, size named, exit 2";
    wrong_secret_is_auth_rejected: "auth_rejected, exit 2";
    unknown_key_is_auth_rejected_and_not_printed: "auth_rejected, exit 2";
    unknown_host_is_unreachable: "unreachable, exit 4";
    closed_port_is_unreachable: "unreachable, exit 4";
    table_has_a_row_for_every_room: "a row for every room, exit 1";
    check_connect_tries_the_credentials: "exit 0; wrong secret: exit 2";
    five_mistakes_are_reported_at_once: "five errors, exit 2";
    ctrl_c_aborts_within_five_seconds: "aborted, exit 130 within 5 s";
    sigterm_aborts_within_five_seconds: "aborted, exit 130 within 5 s";
    late_agent_of_create_room_leaves_no_room: "no agent; 15 s later no room, exit 1";
    late_agent_of_a_token_leaves_no_room: "no agent; 15 s later no room, exit 1";
    unknown_agent_name_in_a_room_or_token_is_dispatch_unanswered: "dispatch_unanswered, exit 1";
    agent_in_an_update_before_the_join_response_is_seen: "ok, an upper bound, exit 0";
    agent_that_joins_before_the_canary_has_an_upper_bound_as_join_delay: "ok, an upper bound, exit 0";
}

// --- calls that are ok ---

fn five_rooms_open_in_order_and_the_agent_hears_every_echo(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let stack = fixture.stack(&Behaviour::greets())?;
    let finished = Canary::once()
        .args(&["--agent-name", AGENT, "--rooms", "5", "--hold", stack.hold])
        .args(&["--expect-reply=false"])
        .on(stack)
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 5)?;
    for pair in batch.probes.windows(2) {
        let (joined, sent) = (pair[0].at("AgentJoined")?, pair[1].at("DispatchSent")?);
        ensure!(joined < sent, "{} opened too early", pair[1].room);
    }
    let positions: Vec<_> = batch.probes.iter().map(|probe| &*probe.position).collect();
    ensure!(positions == ["first", "later", "later", "later", "later"]);
    for probe in &batch.probes {
        expect_heard(stack, probe)?;
    }
    Ok(format!(
        "5 ok, in order, 5 echoes heard, join {}",
        join_delays(&batch)?
    ))
}

fn delayed_agent_has_at_least_its_delay_as_join_delay(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets().after(2))?;
    let finished = settings.set("batch.rooms", 3).run()?;
    let batch = expect_ok(fixture, stack, &finished, 3)?;
    for probe in &batch.probes {
        ensure!(probe.join_delay_seconds >= Some(2.0), "{probe:?}");
    }
    Ok(format!("3 ok, join {}", join_delays(&batch)?))
}

/// A caller that shares no code with the canary: `client.py` with LiveKit's Python client library.
fn pypi_client_hears_the_agent_and_is_heard(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::replies();
    let stack = fixture.stack(&behaviour)?;
    let room = format!("pypi-{}", std::process::id());
    stack.api.dispatch(&room, AGENT, &behaviour.metadata())?;
    let mut client = command(&program("PYTHON")?);
    client
        .arg(source("client.py"))
        .env("LIVEKIT_URL", &stack.url)
        .env("LIVEKIT_TOKEN", stack.api.token(&room, "pypi-client")?)
        .env("ROOM", &room);
    let mut client = Process::spawn("client", client, stack.dir())?;
    let status = client.finish(Duration::from_mins(2))?;
    let printed = client.log()?;
    ensure!(status.success(), "{status}: {printed}");
    let heard_event = |event: &str| {
        let mut lines = printed.lines().filter(|line| line.starts_with('{'));
        let line =
            lines.find_map(|line| AgentEvent::read(line).ok().filter(|it| it.name() == event));
        line.with_context(|| format!("no {event} in {printed}"))?
            .number("seconds")
    };
    let (greeting, reply) = (heard_event("greeting")?, heard_event("reply")?);
    let heard = stack
        .wait_for_event("the agent to hear", Duration::from_secs(5), |event| {
            event.name() == "heard" && event.room() == room
        })?
        .number("seconds")?;
    stack.api.delete_room(&room)?;
    ensure!(greeting > 1.5, "only {greeting} s of the greeting came");
    ensure!(heard > 1.5, "the agent heard only {heard} s of 2");
    Ok(format!(
        "{greeting:.2} s of greeting, {heard:.2} s of tone, {reply:.2} s of reply heard"
    ))
}

fn agent_that_replies_has_a_reply_delay(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::replies())?;
    let finished = settings.expects_reply().set("batch.hold", "12s").run()?;
    let batch = expect_ok(fixture, stack, &finished, 1)?;
    Ok(format!(
        "ok, reply after {}",
        range(&batch, |probe| probe.reply_delay_seconds)?
    ))
}

fn call_is_recorded_with_its_speech_at_the_reported_times(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    if engine() == "libwebrtc" {
        return Ok("this engine can't record".to_owned());
    }
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().to_str().context("no UTF-8")?;
    let settings = settings
        .set("batch.rooms", 2)
        .set("batch.hold", "12s")
        .line("builtin:hello", Table::new());
    let finished = Canary::once()
        .config(&settings.text())?
        .args(&["--record", path])
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 2)?;
    let mut found = Vec::new();
    for probe in &batch.probes {
        let recording = probe.recording.as_ref().context("no recording")?;
        let track =
            |name: &str| Heard::read(&folder.path().join(format!("{}.{name}.ogg", probe.room)));
        let (agent, caller) = (track("agent")?, track("caller")?);
        let joined = probe.seconds("SignalConnected")?;
        ensure!((recording.started - joined).abs() < 1e-6);
        let call = probe.seconds("Left")? - recording.started;
        for heard in [&agent, &caller] {
            let missing = call - heard.seconds();
            ensure!((-0.01..1.0).contains(&missing), "{missing} s: {probe:?}");
        }
        let [agent, caller] = [agent, caller].map(|heard| heard.loud(0.5));
        let turn = probe.turns.first().context("no turn")?;
        let (greeting, turn_start, turn_end) = (
            agent.first().context("the agent is silent")?.0,
            caller.first().context("the caller is silent")?.0,
            caller.last().context("the caller is silent")?.1,
        );
        let seconds = |time: Option<f64>| time.context("no time of the turn");
        found.push([
            recording.started + greeting - probe.seconds("AgentSpoke")?,
            recording.started + turn_start - seconds(turn.caller_started)?,
            recording.started + turn_end - seconds(turn.caller_ended)?,
        ]);
    }
    // A time of the probe is that of one packet, which may be late. In the recording it is where it belongs.
    // The caller's clip has 40 ms of silence at both ends.
    for (place, expected) in [0.0, 0.04, -0.04].into_iter().enumerate() {
        let differs = |it: &[f64; 3]| (it[place] - expected).abs();
        ensure!(found.iter().any(|it| differs(it) <= 0.03), "{found:?}");
        ensure!(found.iter().all(|it| differs(it) < 0.4), "{found:?}");
    }
    let shown = found
        .iter()
        .flatten()
        .map(|it| format!("{:.0}", it * 1_000.0));
    let shown: Vec<_> = shown.collect();
    Ok(format!("2 ok, differences of {} ms", shown.join(", ")))
}

fn continuous_echo_is_heard(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let finished = settings
        .set("caller.mode", "pass_through")
        .set("caller.silence", "3s")
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 1)?;
    let after = expect_heard(stack, &batch.probes[0])?;
    Ok(format!("ok, heard {after:.1} s after the greeting"))
}

fn one_by_one_holds_each_room_from_its_own_join(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let finished = settings
        .set("batch.rooms", 3)
        .set("batch.stay", "one_by_one")
        .set("batch.hold", "6s")
        // A turn would have to be finished.
        .set("caller.silence", "20s")
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 3)?;
    let open =
        |probe: &Probe| Some(probe.seconds("Left").ok()? - probe.seconds("AgentJoined").ok()?);
    for probe in &batch.probes {
        let seconds = open(probe).context("the probe never left")?;
        ensure!((6.0..8.0).contains(&seconds), "held for {seconds} s");
    }
    Ok(format!("3 ok, each held for {}", range(&batch, open)?))
}

fn metadata_and_attributes_reach_the_agent(fixture: &Fixture) -> anyhow::Result<String> {
    let tag = "metadata-arrives";
    let behaviour = Behaviour::greets().tag(tag);
    let (stack, settings) = fixture.call(&behaviour)?;
    let finished = settings
        .set("participant.attributes.team", "blue")
        .set("participant.name", "Ada")
        .set("participant.metadata", "a caller's metadata")
        .set("room.name_prefix", "calls_")
        .set("room.metadata", "a room's metadata")
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 1)?;
    let job = wait_for_job(stack, tag, "job")?;
    ensure!(job.room() == batch.probes[0].room);
    ensure!(job.room().starts_with("calls_"), "{}", job.room());
    ensure!(job.text("metadata") == behaviour.metadata());
    let caller = wait_for_job(stack, tag, "caller")?;
    let attributes = caller.attributes();
    ensure!(
        attributes["canary"] == "true" && attributes["team"] == "blue",
        "{attributes}"
    );
    let seen = ["name", "metadata", "room_metadata"].map(|key| caller.text(key));
    let expected = ["Ada", "a caller's metadata", "a room's metadata"];
    ensure!(seen == expected, "{seen:?}");
    Ok(format!("ok, the agent saw {seen:?} and {attributes}"))
}

fn unnamed_agent_joins_by_automatic_dispatch(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[Agent::named("")], &Behaviour::greets().unnamed())?;
    let finished = Settings::new(stack)
        .without("agent_name")
        .set("dispatch.mode", "automatic")
        .set("batch.rooms", 2)
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 2)?;
    for probe in &batch.probes {
        expect_heard(stack, probe)?;
    }
    Ok(format!("2 ok, join {}", join_delays(&batch)?))
}

/// The agent joins, and receives its metadata, without a `CreateDispatch` request.
fn expect_dispatched(fixture: &Fixture, mode: &str) -> anyhow::Result<String> {
    let tag = format!("joins-by-{mode}");
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(&tag))?;
    let finished = settings
        .set("dispatch.mode", mode)
        .set("batch.rooms", 2)
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 2)?;
    for probe in &batch.probes {
        expect_heard(stack, probe)?;
    }
    wait_for_job(stack, &tag, "job")?;
    Ok(format!("2 ok, join {}", join_delays(&batch)?))
}

fn agent_joins_by_create_room(fixture: &Fixture) -> anyhow::Result<String> {
    expect_dispatched(fixture, "room")
}

fn agent_joins_by_token(fixture: &Fixture) -> anyhow::Result<String> {
    expect_dispatched(fixture, "token")
}

/// The start of each of three probes, in seconds after the first.
fn openings(fixture: &Fixture, stack: &Stack, settings: Settings) -> anyhow::Result<Vec<f64>> {
    let finished = settings.set("batch.rooms", 3).run()?;
    let batch = expect_ok(fixture, stack, &finished, 3)?;
    let opened = batch
        .probes
        .iter()
        .map(|probe| unix_seconds(probe.started_at));
    let opened: Vec<_> = opened.collect();
    Ok(opened.iter().map(|at| at - opened[0]).collect())
}

fn interval_ramp_opens_rooms_before_the_agent_joins(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets().after(3))?;
    let settings = settings
        .set("batch.ramp", "interval")
        .set("batch.interval", "2s");
    let opened = openings(fixture, stack, settings)?;
    let apart = opened
        .windows(2)
        .all(|pair| (1.9..3.0).contains(&(pair[1] - pair[0])));
    ensure!(apart, "opened at {opened:?}");
    Ok(format!("3 ok, opened at {opened:.2?} s"))
}

fn burst_ramp_opens_all_rooms_at_once(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let opened = openings(fixture, stack, settings.set("batch.ramp", "burst"))?;
    ensure!(opened.iter().all(|at| *at < 1.0), "opened at {opened:?}");
    Ok(format!("3 ok, opened at {opened:.2?} s"))
}

fn agent_that_joins_before_the_canary_has_an_upper_bound_as_join_delay(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let tag = "joins-first";
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let gate = Gate::before(stack.address(), Hold::Signal)?;
    let running = settings
        .project("url", format!("ws://{}", gate.address))
        .set("dispatch.mode", "room")
        // The time at the gate counts.
        .set("deadlines.signal", "30s")
        .set("deadlines.join", "60s")
        .once()?;
    wait_for_job(stack, tag, "connected")?;
    gate.open();
    let finished = running.finish()?;
    let batch = expect_ok(fixture, stack, &finished, 1)?;
    let probe = &batch.probes[0];
    ensure!(probe.join_upper_bound, "{probe:?}");
    ensure!(probe.seconds("AgentJoined")? >= probe.seconds("SignalConnected")?);
    expect_heard(stack, probe)?;
    Ok(format!(
        "ok, joined within {}, echo heard",
        join_delays(&batch)?
    ))
}

fn server_on_another_host_is_ok(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.stack_behind_veth(&[Agent::named(AGENT)])?;
    let finished = Settings::new(stack).set("batch.rooms", 2).run()?;
    let batch = expect_ok(fixture, stack, &finished, 2)?;
    for probe in &batch.probes {
        ensure!(!notes_blocked_udp(probe), "{:?}", probe.evidence);
        expect_heard(stack, probe)?;
    }
    Ok(format!(
        "2 ok at {}, join {}",
        stack.url,
        join_delays(&batch)?
    ))
}

/// The seconds from the join response until media was connected.
fn media(probe: &Probe) -> anyhow::Result<f64> {
    Ok(probe.seconds("MediaConnected")? - probe.seconds("SignalConnected")?)
}

fn blocked_udp_is_a_call_over_tcp_with_a_note(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.stack_behind_veth(&[Agent::named(AGENT)])?;
    stack.block_udp()?;
    let finished = Settings::new(stack).set("batch.rooms", 2).run()?;
    let batch = expect_ok(fixture, stack, &finished, 2)?;
    for probe in &batch.probes {
        ensure!(notes_blocked_udp(probe), "{:?}", probe.evidence);
        expect_heard(stack, probe)?;
    }
    let media = range(&batch, |probe| media(probe).ok())?;
    Ok(format!("2 ok, noted, media up after {media}"))
}

fn blocked_udp_and_tcp_is_media_failed_within_its_deadline(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let stack = fixture.stack_behind_veth(&[])?;
    stack.block_udp()?;
    stack.block_media_over_tcp()?;
    let finished = Settings::new(stack).run()?;
    let batch = expect(fixture, &finished, 4, &["media_failed"])?;
    expect_gone(stack, &batch)?;
    let probe = &batch.probes[0];
    ensure!(probe.origin.as_deref() == Some("network"), "{probe:?}");
    let seconds = unix_seconds(batch.ended_at) - probe.at("SignalConnected")?;
    // The deadline, and the time to leave and to delete the room.
    ensure!(seconds < 17.0, "over {seconds} s after the join response");
    Ok(format!(
        "media_failed, over {seconds:.1} s after the join response"
    ))
}

fn reset_media_connection_is_media_failed(fixture: &Fixture) -> anyhow::Result<String> {
    let tag = "media-breaks";
    let stack = fixture.stack_behind_veth(&[Agent::named(AGENT)])?;
    let running = Settings::new(stack)
        .behaviour(&Behaviour::greets().tag(tag))
        .project("ice", "tcp")
        .set("batch.hold", "60s")
        .once()?;
    wait_for_job(stack, tag, "greeted")?;
    stack.reset_media_over_tcp()?;
    let broken = unix_seconds(Utc::now());
    let batch = expect(fixture, &running.finish()?, 4, &["media_failed"])?;
    // Not the end of the process: after a failed call it checks for some time that the room does not reappear.
    let seconds = batch.probes[0].at("RoomDeleted")? - broken;
    expect_gone(stack, &batch)?;
    // The signal connection is up, so the canary first waits whether the transport recovers.
    ensure!(seconds < 10.0, "over {seconds} s after the break");
    let detail = batch.probes[0].detail().to_owned();
    Ok(format!("{detail}; over {seconds:.1} s after the break"))
}

fn tcp_only_is_ok(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let finished = settings.project("ice", "tcp").set("batch.rooms", 2).run()?;
    let batch = expect_ok(fixture, stack, &finished, 2)?;
    for probe in &batch.probes {
        // TCP was requested, so it is not noted.
        ensure!(!notes_blocked_udp(probe), "{:?}", probe.evidence);
        expect_heard(stack, probe)?;
    }
    let media = range(&batch, |probe| media(probe).ok())?;
    Ok(format!("2 ok, media up after {media}"))
}

fn wss_with_a_private_authority_is_ok(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let proxy = TlsProxy::start(stack, "localhost")?;
    let finished = settings
        .project("url", proxy.url.as_str())
        .project("ca_file", proxy.ca_file.display().to_string())
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 1)?;
    expect_heard(stack, &batch.probes[0])?;
    Ok(format!("ok, join {}", join_delays(&batch)?))
}

fn two_batches_at_the_same_time_do_not_affect_each_other(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let settings = settings.set("batch.rooms", 2);
    let (one, other) = (settings.once()?, settings.once()?);
    let batches = [one.finish()?, other.finish()?];
    for finished in &batches {
        let batch = expect_ok(fixture, stack, finished, 2)?;
        for probe in &batch.probes {
            expect_heard(stack, probe)?;
        }
    }
    Ok("2 + 2 ok, 4 echoes heard".to_owned())
}

fn agent_that_may_leave_after_speech_is_ok(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::hangs_up())?;
    let finished = settings
        .set("expect.agent_may_leave", "after_speech")
        .run()?;
    let batch = expect_ok(fixture, stack, &finished, 1)?;
    Ok(format!("ok, join {}", join_delays(&batch)?))
}

// --- no agent joins ---

/// No agent joins any of two rooms. Each takes at most its join deadline of 5 s and two seconds more.
fn expect_unanswered(fixture: &Fixture, stack: &Stack, agent: &str) -> anyhow::Result<String> {
    let finished = Settings::new(stack)
        .set("agent_name", agent)
        .set("batch.rooms", 2)
        .set("deadlines.join", "5s")
        .run()?;
    let batch = expect(fixture, &finished, 1, &["dispatch_unanswered"; 2])?;
    expect_gone(stack, &batch)?;
    for probe in &batch.probes {
        ensure!(probe.join_delay_seconds.is_none());
        let seconds = probe.seconds("Left")? - probe.seconds("DispatchSent")?;
        ensure!(seconds < 7.0, "{seconds} s for one room");
    }
    let seconds = range(&batch, |probe| probe.seconds("Left").ok())?;
    Ok(format!("2 dispatch_unanswered, each after {seconds}"))
}

fn no_worker_is_dispatch_unanswered(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[], &Behaviour::is_busy())?;
    expect_unanswered(fixture, stack, AGENT)
}

fn busy_worker_is_dispatch_unanswered(fixture: &Fixture) -> anyhow::Result<String> {
    let behaviour = Behaviour::is_busy();
    expect_unanswered(fixture, fixture.stack(&behaviour)?, behaviour.agent)
}

fn wrong_agent_name_is_dispatch_unanswered(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.stack(&Behaviour::greets())?;
    expect_unanswered(fixture, stack, "no-such-agent")
}

fn unknown_agent_name_in_a_room_or_token_is_dispatch_unanswered(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let stack = fixture.stack(&Behaviour::greets())?;
    let started = ["room", "token"].map(|mode| {
        let settings = Settings::new(stack)
            .set("agent_name", "no-such-agent")
            .set("dispatch.mode", mode)
            .set("deadlines.join", "3s");
        (mode, settings.once())
    });
    for (mode, running) in started {
        let batch = expect(fixture, &running?.finish()?, 1, &["dispatch_unanswered"])?;
        expect_gone(stack, &batch)?;
        let detail = batch.probes[0].detail().to_owned();
        // The detail doesn't say that no dispatch is listed: the server accepted it.
        ensure!(detail.contains("no accepted job"), "{mode}: {detail}");
    }
    Ok("both dispatch_unanswered, both dispatches listed".to_owned())
}

fn table_has_a_row_for_every_room(fixture: &Fixture) -> anyhow::Result<String> {
    let settings = Settings::new(fixture.stack(&Behaviour::greets())?)
        .set("agent_name", "no-such-agent")
        .set("batch.rooms", 2)
        .set("deadlines.join", "2s");
    let finished = Canary::new(["once"]).config(&settings.text())?.run()?;
    ensure!(finished.code == Some(1), "{}", finished.output());
    let rows = finished
        .stdout
        .lines()
        .filter(|line| line.contains("canary-") && line.contains("dispatch_unanswered"));
    ensure!(rows.count() == 2, "{}", finished.output());
    Ok("2 rows dispatch_unanswered, exit 1".to_owned())
}

fn agent_that_never_connects_is_agent_no_show_if_its_job_is_listed(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (_, wanted) = expect_no_agent(fixture, Behaviour::never_connects(), "never-connects")?;
    Ok(format!("{wanted}, as the server listed its jobs"))
}

fn late_agent_of_create_dispatch_changes_no_verdict_and_leaves_no_room(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    expect_late(fixture, "explicit")
}

fn late_agent_of_create_room_leaves_no_room(fixture: &Fixture) -> anyhow::Result<String> {
    expect_late(fixture, "room")
}

fn late_agent_of_a_token_leaves_no_room(fixture: &Fixture) -> anyhow::Result<String> {
    expect_late(fixture, "token")
}

fn expect_late(fixture: &Fixture, dispatch: &str) -> anyhow::Result<String> {
    let tag = &format!("joins-late-by-{dispatch}");
    let (stack, settings) = fixture.call(&Behaviour::greets().too_late(10, 5).tag(tag))?;
    let running = settings
        .set("dispatch.mode", dispatch)
        .set("deadlines.join", "5s")
        .without("late_agent_window")
        .once()?;
    let job = wait_for_job(stack, tag, "job")?;
    let wanted = reason_by_listed_jobs(stack, job.room())?;
    let batch = expect(fixture, &running.finish()?, 1, &[wanted])?;
    let connected = wait_for_job(stack, tag, "connecting")?.number("at")?;
    wait_for(
        "15 s after the agent connected",
        Duration::from_secs(40),
        || Ok((unix_seconds(Utc::now()) > connected + 15.0).then_some(())),
    )?;
    expect_gone(stack, &batch)?;
    ensure!(stack.api.participants(job.room())?.is_empty());
    Ok(format!("{wanted}; the late agent and its room are gone"))
}

// --- an agent joins, and the call fails ---

fn agent_without_packets_is_agent_silent(fixture: &Fixture) -> anyhow::Result<String> {
    let (batch, seen) = expect_faulty(fixture, &Behaviour::sends_no_packets(), "agent_silent")?;
    ensure!(batch.probes[0].audio.packets == 0, "{seen}");
    Ok(seen)
}

fn agent_with_a_silent_track_is_agent_silent(fixture: &Fixture) -> anyhow::Result<String> {
    let (batch, seen) = expect_faulty(fixture, &Behaviour::is_silent(), "agent_silent")?;
    // 50 packets per second for 5 s.
    ensure!(batch.probes[0].audio.packets > 100, "{seen}");
    Ok(seen)
}

fn agent_without_a_track_is_agent_no_track(fixture: &Fixture) -> anyhow::Result<String> {
    Ok(expect_faulty(fixture, &Behaviour::has_no_track(), "agent_no_track")?.1)
}

fn agent_that_hangs_up_is_agent_left_early(fixture: &Fixture) -> anyhow::Result<String> {
    Ok(expect_faulty(fixture, &Behaviour::hangs_up(), "agent_left_early")?.1)
}

fn missing_reply_is_agent_no_reply(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let settings = settings
        .set("expect.reply", true)
        .set("deadlines.reply", "3s")
        .set("batch.hold", "15s");
    Ok(expect_agent_fault(fixture, stack, &settings, "agent_no_reply")?.1)
}

fn second_agent_is_agent_duplicate(fixture: &Fixture) -> anyhow::Result<String> {
    let tag = "has-a-duplicate";
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let running = settings.once()?;
    let greeted = wait_for_job(stack, tag, "greeted")?;
    stack.api.dispatch(greeted.room(), AGENT, "")?;
    let batch = expect(fixture, &running.finish()?, 1, &["agent_duplicate"])?;
    expect_gone(stack, &batch)?;
    Ok(format!("agent_duplicate, join {}", join_delays(&batch)?))
}

fn killed_job_is_agent_left_early(fixture: &Fixture) -> anyhow::Result<String> {
    let tag = "is-killed";
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let running = settings.set("batch.hold", "60s").once()?;
    let job = wait_for_job(stack, tag, "job")?;
    wait_for_job(stack, tag, "greeted")?;
    kill(job.number("pid")?)?;
    let killed = Instant::now();
    let batch = expect(fixture, &running.finish()?, 1, &["agent_left_early"])?;
    expect_gone(stack, &batch)?;
    Ok(format!(
        "agent_left_early, ended {:.1} s after the kill",
        killed.elapsed().as_secs_f64()
    ))
}

fn killed_worker_is_agent_left_early(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[Agent::named(AGENT).in_processes()], &Behaviour::greets())?;
    let running = Settings::new(stack).set("batch.hold", "60s").once()?;
    let limit = Duration::from_secs(30);
    stack.wait_for_event("greeted", limit, |event| event.name() == "greeted")?;
    stack.workers[0].signal(Signal::KILL)?;
    let killed = Instant::now();
    let batch = expect(fixture, &running.finish()?, 1, &["agent_left_early"])?;
    expect_gone(stack, &batch)?;
    Ok(format!(
        "agent_left_early, ended {:.1} s after the kill",
        killed.elapsed().as_secs_f64()
    ))
}

fn room_deleted_by_another_client_is_removed(fixture: &Fixture) -> anyhow::Result<String> {
    let tag = "room-is-deleted";
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let running = settings.once()?;
    let greeted = wait_for_job(stack, tag, "greeted")?;
    stack.api.delete_room(greeted.room())?;
    let batch = expect(fixture, &running.finish()?, 4, &["removed"])?;
    expect_gone(stack, &batch)?;
    Ok(batch.probes[0].detail().to_owned())
}

fn participant_removed_by_another_client_is_removed(fixture: &Fixture) -> anyhow::Result<String> {
    let tag = "caller-is-removed";
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let running = settings.once()?;
    let caller = wait_for_job(stack, tag, "caller")?;
    wait_for_job(stack, tag, "greeted")?;
    let identity = caller.text("caller");
    stack.api.remove_participant(caller.room(), identity)?;
    let batch = expect(fixture, &running.finish()?, 4, &["removed"])?;
    expect_gone(stack, &batch)?;
    Ok(batch.probes[0].detail().to_owned())
}

/// Two rooms during their calls on their own stack. After the signal `harm` to the server, both are `signal_lost` within
/// `limit` seconds.
fn expect_signal_lost(fixture: &Fixture, harm: Signal, limit: f64) -> anyhow::Result<String> {
    let stack = fixture.own_stack(&[Agent::named(AGENT)], &Behaviour::greets())?;
    let running = Settings::new(stack)
        .project("api_timeout", "2s")
        .set("deadlines.cleanup", "2s")
        .set("batch.rooms", 2)
        .set("batch.hold", "40s")
        .once()?;
    wait_for_two_greetings(stack)?;
    stack.server.signal(harm)?;
    let harmed = unix_seconds(Utc::now());
    let finished = running.finish()?;
    let batch = expect(fixture, &finished, 4, &["signal_lost"; 2])?;
    // The batch ends when all verdicts are known. The process still tries to delete the rooms after that.
    let seconds = unix_seconds(batch.ended_at) - harmed;
    ensure!(seconds < limit, "took {seconds} s");
    for probe in &batch.probes {
        ensure!(probe.seconds("RoomDeleted").is_err(), "{probe:?}");
        let named = finished.stderr.contains(&probe.room);
        ensure!(named, "{} isn't named: {}", probe.room, finished.output());
    }
    Ok(format!(
        "2 signal_lost, batch ended after {seconds:.1} s, rooms named"
    ))
}

fn killed_server_is_signal_lost_at_once(fixture: &Fixture) -> anyhow::Result<String> {
    // The verdict is immediate. The rest is for the attempts to delete the rooms.
    expect_signal_lost(fixture, Signal::KILL, 3.0)
}

fn frozen_server_is_signal_lost_and_its_rooms_are_listed(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    // 20 s for the verdict, 2 s for the attempt to delete.
    expect_signal_lost(fixture, Signal::STOP, 22.0)
}

fn panic_in_one_probe_does_not_affect_the_others(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.stack(&Behaviour::greets())?;
    let finished = Canary::once()
        .args(&["--agent-name", AGENT, "--rooms", "5", "--hold", stack.hold])
        .args(&["--expect-reply=false"])
        .on(stack)
        .envs(&[("LIVEKIT_CANARY_FAULT", "panic:2")])
        .run()?;
    let verdicts = ["ok", "ok", "internal", "ok", "ok"];
    let batch = expect(fixture, &finished, 4, &verdicts)?;
    expect_gone(stack, &batch)?;
    Ok("4 ok, 1 internal, five rooms deleted".to_owned())
}

// --- the canary can't connect ---

fn expect_unreachable(
    fixture: &Fixture,
    settings: &Settings,
    text: &str,
) -> anyhow::Result<String> {
    let finished = settings.run()?;
    let batch = expect(fixture, &finished, 4, &["unreachable"])?;
    let detail = batch.probes[0].detail().to_owned();
    ensure!(detail.contains(text), "{text:?} isn't in {detail:?}");
    Ok(detail)
}

fn untrusted_certificate_is_unreachable(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let proxy = TlsProxy::start(stack, "localhost")?;
    let settings = settings.project("url", proxy.url.as_str());
    expect_unreachable(fixture, &settings, "TLS")
}

fn certificate_for_another_name_is_unreachable(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets())?;
    let proxy = TlsProxy::start(stack, "elsewhere.test")?;
    let settings = settings
        .project("url", proxy.url.as_str())
        .project("ca_file", proxy.ca_file.display().to_string());
    expect_unreachable(fixture, &settings, "TLS")
}

fn unknown_host_is_unreachable(fixture: &Fixture) -> anyhow::Result<String> {
    let (_, settings) = fixture.call(&Behaviour::greets())?;
    let settings = settings.project("url", "ws://no-such-host.invalid:7880");
    expect_unreachable(fixture, &settings, "no-such-host.invalid")
}

fn closed_port_is_unreachable(fixture: &Fixture) -> anyhow::Result<String> {
    let (_, settings) = fixture.call(&Behaviour::greets())?;
    let settings = settings.project("url", "ws://127.0.0.1:1");
    expect_unreachable(fixture, &settings, "127.0.0.1:1")
}

fn wrong_secret_is_auth_rejected(fixture: &Fixture) -> anyhow::Result<String> {
    // With the same length and beginning as the right one, so that the search in the output finds parts of it, too.
    let wrong = SECRET.replace("hold", "know");
    let (_, settings) = fixture.call(&Behaviour::greets())?;
    let finished = settings.project("api_secret", wrong.as_str()).run()?;
    ensure!(!finished.output().contains(&wrong), "{}", finished.output());
    let batch = expect(fixture, &finished, 2, &["auth_rejected"])?;
    Ok(batch.probes[0].detail().to_owned())
}

/// livekit-server repeats a key that it does not know.
fn unknown_key_is_auth_rejected_and_not_printed(fixture: &Fixture) -> anyhow::Result<String> {
    const UNKNOWN: &str = "APIkeyThatNoServerKnows";
    let (_, settings) = fixture.call(&Behaviour::greets())?;
    let finished = settings.project("api_key", UNKNOWN).run()?;
    ensure!(
        !finished.output().contains(UNKNOWN),
        "{}",
        finished.output()
    );
    let batch = expect(fixture, &finished, 2, &["auth_rejected"])?;
    Ok(batch.probes[0].detail().to_owned())
}

fn check_connect_tries_the_credentials(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.stack(&Behaviour::greets())?;
    let check = |secret: &str| {
        let settings = Settings::new(stack).project("api_secret", secret);
        Canary::new(["check", "--connect"])
            .config(&settings.text())?
            .run()
    };
    let right = check(&stack.secret)?;
    ensure!(right.code == Some(0), "{}", right.output());
    let wrong = check("another-secret-of-at-least-32-characters")?;
    ensure!(wrong.code == Some(2), "{}", wrong.output());
    Ok("exit 0; wrong secret: exit 2".to_owned())
}

fn five_mistakes_are_reported_at_once(_: &Fixture) -> anyhow::Result<String> {
    let config = r#"
[projects.main]
url = "ftp://example.test"
api_key = "k"
api_secret = "s"
[targets.support]
agent_name = "a"
colour = "blue"
[targets.support.batch]
rooms = 0
hold = "soon"
[targets.support.caller]
mode = "loud"
"#;
    let finished = Canary::once().config(config)?.run()?;
    ensure!(finished.code == Some(2), "{}", finished.output());
    for mistake in ["url", "colour", "rooms", "hold", "mode"] {
        let named = finished.stderr.contains(mistake);
        ensure!(named, "no {mistake}: {}", finished.stderr);
    }
    let lines = finished.stderr.lines();
    let errors = lines.filter(|line| line.starts_with("error:")).count();
    ensure!(errors == 5, "{errors} errors: {}", finished.stderr);
    ensure!(finished.stdout.is_empty());
    Ok("five errors, exit 2".to_owned())
}

// --- the canary is stopped ---

fn expect_aborted(fixture: &Fixture, signal: Signal, tag: &str) -> anyhow::Result<String> {
    let (stack, settings) = fixture.call(&Behaviour::greets().tag(tag))?;
    let running = settings
        .set("batch.rooms", 2)
        .set("batch.hold", "60s")
        .once()?;
    wait_for_job(stack, tag, "greeted")?;
    // Two at once are one: the rooms still end in order, and there is a result.
    running.signal(signal)?;
    running.signal(signal)?;
    let signalled = Instant::now();
    let finished = running.finish()?;
    let elapsed = signalled.elapsed();
    ensure!(elapsed < Duration::from_secs(5), "took {elapsed:?}");
    let batch = expect(fixture, &finished, 130, &["aborted"; 2])?;
    expect_gone(stack, &batch)?;
    Ok(format!(
        "2 aborted, exit 130 after {:.2} s",
        elapsed.as_secs_f64()
    ))
}

fn ctrl_c_aborts_within_five_seconds(fixture: &Fixture) -> anyhow::Result<String> {
    expect_aborted(fixture, Signal::INT, "ctrl-c")
}

fn sigterm_aborts_within_five_seconds(fixture: &Fixture) -> anyhow::Result<String> {
    expect_aborted(fixture, Signal::TERM, "sigterm")
}
