//! Scenarios with the TURN server of livekit-server between the canary and the server's media.

use std::fs;

use anyhow::{Context as _, ensure};
use chrono::Utc;
use support::behaviour::Behaviour;
use support::report::{Probe, unix_seconds};
use support::settings::Settings;
use support::stack::{Stack, Turn};

use crate::fixture::{
    Fixture, expect, expect_gone, expect_heard, expect_ok, notes_blocked_udp, wait_for_job,
};

const REACHABLE: Turn = Turn {
    hides_media: false,
    relays_to_private_networks: true,
};

/// A stack with a TURN server, and settings that trust its certificate.
fn stack<'a>(fixture: &'a Fixture, turn: Turn) -> anyhow::Result<(&'a Stack, Settings)> {
    let (stack, authority) = fixture.stack_with_turn(turn)?;
    let ca_file = stack.dir().join("ca.pem");
    fs::write(&ca_file, authority)?;
    let ca_file = ca_file.to_str().context("a path in UTF-8")?;
    Ok((stack, Settings::new(stack).project("ca_file", ca_file)))
}

/// The seconds from the join response until media was connected.
fn media(probe: &Probe) -> anyhow::Result<f64> {
    Ok(probe.seconds("MediaConnected")? - probe.seconds("SignalConnected")?)
}

/// A call is ok, and its media took `path`. Returns a summary.
fn expect_path(
    fixture: &Fixture,
    stack: &Stack,
    settings: &Settings,
    path: &str,
) -> anyhow::Result<String> {
    let batch = expect_ok(fixture, stack, &settings.run()?, 1)?;
    let probe = batch.only_probe()?;
    let taken = probe.circumstances.media_path.as_deref();
    ensure!(taken == Some(path), "{taken:?}: {probe:?}");
    let connections: Vec<_> = probe.evidence.media.iter().collect();
    let names = connections.iter().map(|it| &*it.connection);
    ensure!(
        names.eq(["publisher", "subscriber"]) && connections.iter().all(|it| it.path == path),
        "{connections:?}"
    );
    let round_trips: Option<Vec<_>> = connections.iter().map(|it| it.round_trip_seconds).collect();
    let round_trips = round_trips.with_context(|| format!("no round trip: {connections:?}"))?;
    let round_trip = round_trips.into_iter().fold(0.0, f64::max);
    // All of it is one machine.
    ensure!(round_trip > 0.0 && round_trip < 0.5, "{round_trip} s");
    let fell_back = path != "udp" && !settings.is_restricted();
    ensure!(
        notes_blocked_udp(probe) == fell_back,
        "{:?}",
        probe.evidence
    );
    expect_heard(stack, probe)?;
    Ok(format!(
        "ok over {path}, media up after {:.2} s, round trip {:.1} ms",
        media(probe)?,
        round_trip * 1e3
    ))
}

pub(crate) fn turn_over_udp_carries_a_call(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = stack(fixture, REACHABLE)?;
    expect_path(
        fixture,
        stack,
        &settings.project("ice", "relay"),
        "relay_udp",
    )
}

pub(crate) fn turn_over_tls_carries_a_call(fixture: &Fixture) -> anyhow::Result<String> {
    let (stack, settings) = stack(fixture, REACHABLE)?;
    expect_path(fixture, stack, &settings.project("ice", "tls"), "relay_tls")
}

pub(crate) fn media_address_without_a_route_is_reached_over_turn(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let hidden = Turn {
        hides_media: true,
        ..REACHABLE
    };
    let (stack, settings) = stack(fixture, hidden)?;
    // The URL of TURN over UDP has the media address as its host.
    expect_path(fixture, stack, &settings, "relay_tls")
}

pub(crate) fn blocked_udp_is_a_call_over_the_plainest_path_that_is_left(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let (stack, settings) = stack(fixture, REACHABLE)?;
    let open = expect_path(fixture, stack, &settings, "udp")?;
    stack.block_udp()?;
    let without_udp = expect_path(fixture, stack, &settings, "tcp")?;
    stack.block_media_over_tcp()?;
    let without_both = expect_path(fixture, stack, &settings, "relay_tls")?;
    Ok(format!(
        "{open}; without UDP {without_udp}; without TCP, too, {without_both}"
    ))
}

pub(crate) fn turn_that_refuses_the_media_address_names_the_setting(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let refusing = Turn {
        relays_to_private_networks: false,
        ..REACHABLE
    };
    let (stack, settings) = stack(fixture, refusing)?;
    let finished = settings.project("ice", "relay").run()?;
    let batch = expect(fixture, &finished, 4, &["media_failed"])?;
    expect_gone(stack, &batch)?;
    let detail = batch.only_probe()?.detail().to_owned();
    for part in [
        "does not relay to LiveKit's media address",
        "turn.allow_restricted_peer_cidrs",
    ] {
        ensure!(detail.contains(part), "{detail}");
    }
    Ok(detail)
}

pub(crate) fn reset_turn_connection_is_media_failed(fixture: &Fixture) -> anyhow::Result<String> {
    let tag = "turn-breaks";
    let (stack, settings) = stack(fixture, REACHABLE)?;
    let running = settings
        .behaviour(&Behaviour::greets().tag(tag))
        .project("ice", "tls")
        .set("batch.hold", "60s")
        .once()?;
    wait_for_job(stack, tag, "greeted")?;
    stack.reset_turn_over_tls()?;
    let broken = unix_seconds(Utc::now());
    let batch = expect(fixture, &running.finish()?, 4, &["media_failed"])?;
    let seconds = batch.only_probe()?.at("RoomDeleted")? - broken;
    expect_gone(stack, &batch)?;
    let detail = batch.only_probe()?.detail().to_owned();
    ensure!(detail.contains("TURN/TLS"), "{detail}");
    ensure!(seconds < 10.0, "over {seconds} s after the break");
    Ok(format!("{detail}; over {seconds:.1} s after the break"))
}
