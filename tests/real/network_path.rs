//! Scenarios of a bad network between the canary and LiveKit. The agent works, and the figures of the call must match the
//! network.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use support::canary::Finished;
use support::report::Probe;
use support::settings::Settings;
use support::stack::{AGENT, Agent, Stack};

use crate::fixture::{Fixture, expect_ok, notes_blocked_udp};
use crate::relay::{Path, Relay, Server};

/// The resolution of timers on a busy machine, in seconds: of the canary and of the relay.
const JITTER_TOLERANCE: f64 = 0.004;

fn good() -> Path {
    Path {
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        loss: 0.0,
    }
}

/// The only probe of a run is ok, and its media used UDP.
fn expect_call(fixture: &Fixture, stack: &Stack, finished: &Finished) -> anyhow::Result<Probe> {
    let mut batch = expect_ok(fixture, stack, finished, 1)?;
    let probe = batch.probes.pop().context("no probe")?;
    ensure!(!notes_blocked_udp(&probe), "{:?}", probe.evidence);
    Ok(probe)
}

/// Starts a relay in front of the stack. The agents of the stack don't use it. A later relay replaces it.
pub(crate) fn start_relay(stack: &Stack, path: Path) -> anyhow::Result<Relay> {
    let address = |port| SocketAddr::from((stack.host, port));
    let server = Server {
        api: address(stack.port),
        media: address(stack.port + 2),
    };
    let relay = Relay::start(stack.namespace_name()?, server, path)?;
    stack.redirect(relay.ports.0, relay.ports.1)?;
    Ok(relay)
}

/// A call in which a part of the agent's packets is lost, and the others have jitter.
fn expect_figures(fixture: &Fixture, stack: &Stack, loss: f64) -> anyhow::Result<String> {
    let path = Path {
        jitter: Duration::from_millis(50),
        loss,
        ..good()
    };
    let relay = start_relay(stack, path)?;
    let finished = Settings::new(stack).set("batch.hold", "14s").run()?;
    let probe = expect_call(fixture, stack, &finished)?;
    // Packets that were on their way at that time may have arrived too late.
    let expected = relay.expected(probe.at("Left")?)?;
    let audio = &probe.audio;
    let seen = format!(
        "{} lost of {} (the path: {} of {}), jitter {:.1} ms ({:.1} ms)",
        audio.lost,
        audio.packets + audio.lost,
        expected.lost,
        expected.packets + expected.lost,
        audio.jitter_seconds.unwrap_or(f64::NAN) * 1e3,
        expected.jitter * 1e3,
    );
    let off = |one: u64, other: usize| one.abs_diff(other as u64);
    ensure!(
        off(audio.packets, expected.packets) <= 3,
        "{seen}: {probe:?}"
    );
    ensure!(off(audio.lost, expected.lost) <= 3, "{seen}: {probe:?}");
    let jitter = audio.jitter_seconds.context("no jitter")?;
    let tolerance = JITTER_TOLERANCE + 0.15 * expected.jitter;
    ensure!((jitter - expected.jitter).abs() < tolerance, "{seen}");
    Ok(seen)
}

pub(crate) fn measured_loss_and_jitter_match_the_network(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let stack = fixture.stack_behind_veth(&[Agent::named(AGENT)])?;
    let few = expect_figures(fixture, stack, 0.05)?;
    let many = expect_figures(fixture, stack, 0.2)?;
    Ok(format!("2 ok; {few}; {many}"))
}

pub(crate) fn join_delay_of_a_distant_server_contains_the_network_delay_once(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let delay = Duration::from_millis(150);
    let stack = fixture.stack_behind_veth(&[Agent::named(AGENT)])?;
    let _relay = start_relay(stack, Path { delay, ..good() })?;
    let finished = Settings::new(stack).set("batch.hold", "10s").run()?;
    let probe = expect_call(fixture, stack, &finished)?;
    let agent = probe.agent.as_ref().context("no agent")?;
    // By the time of the server; here both use one clock.
    let stamped = agent.joined_at_ms / 1e3;
    let late = probe.at("AgentJoined")? - stamped;
    let delayed = stamped - probe.at("DispatchSent")?;
    let heard = probe.at("AgentSpoke")? - stamped;
    let seen = format!(
        "ok; joined {delayed:.3} s after the dispatch by the server's clock, {late:+.3} s from that by ours; spoke \
         {heard:.3} s after it"
    );
    // The path delays the request once. The way of the join event back to the canary isn't part of the join delay.
    ensure!(delayed > delay.as_secs_f64(), "{seen}");
    ensure!(late.abs() < delay.as_secs_f64() + 0.02, "{seen}");
    Ok(seen)
}
