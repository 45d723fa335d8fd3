//! Scenarios of a bad network between the canary and LiveKit: the agent is well, and its figures must say what the path
//! did.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use support::canary::Finished;
use support::report::Probe;
use support::settings::Settings;
use support::stack::{AGENT, Agent, Stack};

use crate::fixture::{Fixture, expect_ok, notes_blocked_udp};
use crate::relay::{Path, Relay, Server};

/// Neither the canary's timers nor the relay's are finer on a busy machine.
const JITTER_TOLERANCE: f64 = 0.004;

fn good() -> Path {
    Path {
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        loss: 0.0,
    }
}

/// The one probe of a run over a path, which is ok and over UDP.
fn expect_call(fixture: &Fixture, stack: &Stack, finished: &Finished) -> anyhow::Result<Probe> {
    let mut batch = expect_ok(fixture, stack, finished, 1)?;
    let probe = batch.probes.pop().context("no probe")?;
    ensure!(!notes_blocked_udp(&probe), "{:?}", probe.evidence);
    Ok(probe)
}

/// A path to the stack for all but its own agents; it is the stack's last one.
fn before(stack: &Stack, path: Path) -> anyhow::Result<Relay> {
    let address = |port| SocketAddr::from((stack.host, port));
    let server = Server {
        api: address(stack.port),
        media: address(stack.port + 2),
    };
    let relay = Relay::start(stack.namespace_name()?, server, path)?;
    stack.redirect(relay.ports.0, relay.ports.1)?;
    Ok(relay)
}

/// A call in which a part of the agent's packets is lost, and all of them come unevenly.
fn expect_figures(fixture: &Fixture, stack: &Stack, loss: f64) -> anyhow::Result<String> {
    let path = Path {
        jitter: Duration::from_millis(50),
        loss,
        ..good()
    };
    let relay = before(stack, path)?;
    let finished = Settings::new(stack).set("batch.hold", "14s").run()?;
    let probe = expect_call(fixture, stack, &finished)?;
    // What was on its way then may have come too late.
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

pub fn loss_and_jitter_are_measured_as_they_are(fixture: &Fixture) -> anyhow::Result<String> {
    let stack = fixture.stack_behind_veth(&[Agent::named(AGENT)])?;
    let few = expect_figures(fixture, stack, 0.05)?;
    let many = expect_figures(fixture, stack, 0.2)?;
    Ok(format!("2 ok; {few}; {many}"))
}

pub fn distant_server_delays_the_join_by_its_distance_alone(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let delay = Duration::from_millis(150);
    let stack = fixture.stack_behind_veth(&[Agent::named(AGENT)])?;
    let _relay = before(stack, Path { delay, ..good() })?;
    let finished = Settings::new(stack).set("batch.hold", "10s").run()?;
    let probe = expect_call(fixture, stack, &finished)?;
    let agent = probe.agent.as_ref().context("no agent")?;
    // By the server's own stamp; both run on one clock here.
    let stamped = agent.joined_at_ms / 1e3;
    let late = probe.at("AgentJoined")? - stamped;
    let delayed = stamped - probe.at("DispatchSent")?;
    let heard = probe.at("AgentSpoke")? - stamped;
    let seen = format!(
        "ok; joined {delayed:.3} s after the dispatch by the server's clock, {late:+.3} s from that by ours; spoke \
         {heard:.3} s after it"
    );
    // Of what came before, the request's way alone is the path's; the news' way back is no part of the delay.
    ensure!(delayed > delay.as_secs_f64(), "{seen}");
    ensure!(late.abs() < delay.as_secs_f64() + 0.02, "{seen}");
    Ok(seen)
}
