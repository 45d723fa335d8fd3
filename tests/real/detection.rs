//! Scenarios of detection: an outage that is confirmed, reported and over, a poisoned worker that is named, and confirmations that
//! cost no scheduled batch.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use serde_json::Value;
use support::behaviour::Behaviour;
use support::daemon::{Daemon, DaemonDir, TargetStatus};
use support::http;
use support::process::Process;
use support::settings::{Settings, TARGET};
use support::stack::{AGENT, Agent, Stack};
use support::{SHORT_TIMEOUT, wait_for};
use tokio::time::Instant;

use crate::fixture::Fixture;

/// The bound of every wait for a change of state.
const OUTAGE_TIMEOUT: Duration = Duration::from_mins(3);

/// A receiver of webhooks. It refuses all of them until it is open.
struct Webhook {
    url: String,
    open: Arc<AtomicBool>,
    /// It has refused a message.
    refused: Arc<AtomicBool>,
    accepted: Arc<Mutex<Vec<Value>>>,
}

impl Webhook {
    fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let webhook = Self {
            url: format!("http://{}/hook", listener.local_addr()?),
            open: Arc::default(),
            refused: Arc::default(),
            accepted: Arc::default(),
        };
        let (open, accepted) = (Arc::clone(&webhook.open), Arc::clone(&webhook.accepted));
        let refused = Arc::clone(&webhook.refused);
        // The thread ends with the process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let is_open = open.load(Ordering::Relaxed);
                match receive(client, is_open) {
                    Ok(body) if is_open => {
                        let mut accepted = accepted.lock().unwrap_or_else(PoisonError::into_inner);
                        accepted.push(body);
                    }
                    Ok(_) => refused.store(true, Ordering::Relaxed),
                    Err(_) => {}
                }
            }
        });
        Ok(webhook)
    }

    /// The kinds of the messages that it accepted, in order.
    fn kinds(&self) -> Vec<String> {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        let kinds = accepted.iter().filter_map(|body| body["kind"].as_str());
        kinds.map(str::to_owned).collect()
    }

    fn settings(&self) -> String {
        format!(
            "\n[notify.hook]\nkind = \"webhook\"\nurl = {:?}\n",
            self.url
        )
    }
}

/// Reads one request, and responds to it.
fn receive(client: TcpStream, is_open: bool) -> anyhow::Result<Value> {
    let status = if is_open { "200 OK" } else { "503 Busy" };
    let body = http::receive(client, status, "")?;
    Ok(serde_json::from_slice(&body)?)
}

/// The status of the only target.
fn status(daemon: &Daemon) -> anyhow::Result<TargetStatus> {
    daemon.targets()?.pop().context("no target")
}

fn wait_for_state(daemon: &Daemon, state: &str) -> anyhow::Result<TargetStatus> {
    let reached = wait_for(state, OUTAGE_TIMEOUT, || {
        let status = status(daemon)?;
        Ok((status.state == state).then_some(status))
    });
    reached.with_context(|| format!("{:?}", status(daemon)))
}

fn wait_for_messages(webhook: &Webhook, expected: &[&str]) -> anyhow::Result<()> {
    wait_for("the messages", SHORT_TIMEOUT, || {
        Ok((webhook.kinds().len() >= expected.len()).then_some(()))
    })
    .with_context(|| format!("{:?}", webhook.kinds()))?;
    let kinds = webhook.kinds();
    ensure!(kinds == expected, "expected {expected:?}, seen {kinds:?}");
    Ok(())
}

fn incident(daemon: &Daemon, id: &str) -> anyhow::Result<Value> {
    daemon.http.json(&format!("/api/v1/incidents/{id}"))
}

/// What makes an outage when it is frozen: the worker of the agent, or the sandbox.
fn frozen_process(stack: &Stack) -> &Process {
    stack.workers.first().unwrap_or(&stack.server)
}

pub(crate) fn outage_is_confirmed_survives_a_kill_and_is_over_after_the_repair(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    let behaviour = Behaviour::greets_briefly();
    let stack = fixture.own_stack(&[Agent::named(AGENT).in_processes()], &behaviour)?;
    let webhook = Webhook::start()?;
    let dir = DaemonDir::new()?;
    let settings = Settings::new(stack)
        .behaviour(&behaviour)
        .project("api_timeout", "2s")
        .set("schedule.every", "2h")
        .set("batch.hold", "1s")
        .set("confirm.rooms", 2)
        .set("confirm.after", "2s")
        .set("deadlines.signal", "3s")
        .set("deadlines.join", "5s")
        .set("deadlines.cleanup", "2s");
    dir.write(&(settings.text() + &webhook.settings()))?;
    let daemon = dir.start()?;
    wait_for_state(&daemon, "healthy")?;

    let begin = Instant::now();
    frozen_process(stack).signal(Signal::STOP)?;
    daemon.start_batch(TARGET)?;
    let failing = wait_for_state(&daemon, "failing")?;
    let seen = begin.elapsed();
    let id = failing.incident.context("no incident")?;
    // The canary sends a message once its state is on the disk.
    wait_for("a refused message", SHORT_TIMEOUT, || {
        Ok(webhook.refused.load(Ordering::Relaxed).then_some(()))
    })?;
    daemon.signal(Signal::KILL)?;
    daemon.finish()?;

    // The webhook refused the message until now.
    webhook.open.store(true, Ordering::Relaxed);
    let daemon = dir.start()?;
    let status = status(&daemon)?;
    ensure!(
        status.state == "failing" && status.incident.as_ref() == Some(&id),
        "after the restart: {status:?}"
    );
    wait_for_messages(&webhook, &["opened"])?;

    let repaired = Instant::now();
    frozen_process(stack).signal(Signal::CONT)?;
    wait_for_state(&daemon, "healthy")?;
    let recovered = repaired.elapsed();
    wait_for_messages(&webhook, &["opened", "closed"])?;
    let incident = incident(&daemon, &id)?;
    ensure!(
        incident["ended_by"] == "recovered" && incident["failed"].as_u64() >= Some(3),
        "{incident}"
    );
    daemon.terminate()?;
    Ok(format!(
        "{} failing after {:.0} s, healthy {:.0} s after the repair",
        incident["fault"].as_str().unwrap_or_default(),
        seen.as_secs_f64(),
        recovered.as_secs_f64()
    ))
}

pub(crate) fn confirmations_cost_no_scheduled_batch_and_count_in_no_service_level(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    const BATCHES: u64 = 4;
    const ROOMS: u64 = 3;
    let behaviour = Behaviour::is_silent();
    let (_, settings) = fixture.call(&behaviour)?;
    let dir = DaemonDir::new()?;
    let settings = settings
        .project("max_rooms", i64::try_from(ROOMS)?)
        .set("schedule.every", "20s")
        .set("batch.rooms", i64::try_from(ROOMS)?)
        .set("batch.ramp", "burst")
        .set("confirm.rooms", 2)
        .set("confirm.after", "1s")
        .set("deadlines.speech", "3s");
    dir.write(&settings.text())?;
    let daemon = dir.start()?;
    let scheduled = [("target", TARGET), ("purpose", "scheduled")];
    wait_for("scheduled batches", OUTAGE_TIMEOUT, || {
        let ended = daemon.scrape()?.count("batches_total", &scheduled)?;
        Ok((ended >= BATCHES).then_some(()))
    })?;
    wait_for_state(&daemon, "failing")?;
    daemon.pause()?;
    let scrape = daemon.scrape()?;
    let count = |name: &str, labels: &[(&str, &str)]| {
        scrape.count(name, &[labels, &[("target", TARGET)]].concat())
    };
    let batches = count("batches_total", &[("purpose", "scheduled")])?;
    let confirmations = count("batches_total", &[("purpose", "confirmation")])?;
    let skipped = count("batches_skipped_total", &[("cause", "overlap")])?;
    ensure!(
        skipped == 0 && confirmations > 0,
        "{batches} scheduled, {skipped} skipped, {confirmations} confirmations"
    );
    // The same outcomes without confirmations: each scheduled batch counts, with each of its rooms.
    for (name, expected) in [
        ("slo_eligible_total", batches * ROOMS),
        ("slo_bad_batches_total", batches),
        ("slo_good_total", 0),
    ] {
        let seen = count(name, &[("sli", "availability")])?;
        ensure!(seen == expected, "{name}: {seen}, expected {expected}");
    }
    let history = daemon.all_batches(TARGET)?;
    let whole = history.iter().filter(|batch| batch.purpose == "scheduled");
    ensure!(
        whole.clone().count() as u64 >= batches
            && whole
                .clone()
                .all(|batch| batch.probes.len() as u64 == ROOMS),
        "{history:?}"
    );
    daemon.terminate()?;
    Ok(format!(
        "{batches} scheduled batches, none skipped, {confirmations} confirmations"
    ))
}

pub(crate) fn poisoned_worker_is_named_by_the_incident(
    fixture: &Fixture,
) -> anyhow::Result<String> {
    const MAX_BATCHES: usize = 40;
    let behaviour = Behaviour::greets_briefly();
    // Alone until the incident is open: good rooms in between often dismiss the suspicion.
    let stack = fixture.own_stack(&[Agent::named(AGENT).poisoned()], &behaviour)?;
    let dir = DaemonDir::new()?;
    let settings = Settings::new(stack)
        .behaviour(&behaviour)
        .project("max_rooms", 8)
        .set("batch.rooms", 4)
        .set("batch.ramp", "burst")
        .set("batch.hold", "3s")
        .set("confirm.rooms", 2)
        .set("confirm.after", "2s")
        .set("deadlines.speech", "6s");
    dir.write(&settings.text())?;
    let daemon = dir.start()?;
    for batches in 1..=MAX_BATCHES {
        run_batch(&daemon)?;
        if latest_incident(&daemon)?.is_some() {
            break;
        }
        ensure!(batches < MAX_BATCHES, "no incident");
    }
    // LiveKit prefers a worker with less load, so most jobs still reach the poisoned one.
    let busier = Agent {
        load: 0.65,
        ..Agent::named(AGENT)
    };
    let _healthy = stack.start_worker(&busier)?;
    for batches in 1..=MAX_BATCHES {
        run_batch(&daemon)?;
        let incident = latest_incident(&daemon)?.context("the incident is gone")?;
        let named = incident["differs"].as_array().context("no differs")?;
        let factors: BTreeSet<_> = named
            .iter()
            .filter_map(|it| it["factor"].as_str())
            .collect();
        if factors.is_empty() {
            continue;
        }
        ensure!(factors == BTreeSet::from(["worker"]), "{incident}");
        daemon.terminate()?;
        return Ok(format!(
            "{}, {batches} batches after the other worker's start",
            named[0]["sentence"].as_str().unwrap_or_default()
        ));
    }
    anyhow::bail!("no worker was named: {:?}", latest_incident(&daemon)?)
}

fn run_batch(daemon: &Daemon) -> anyhow::Result<()> {
    let batch_id = daemon.start_batch(TARGET)?;
    daemon.wait_for_batch(&batch_id)?;
    Ok(())
}

fn latest_incident(daemon: &Daemon) -> anyhow::Result<Option<Value>> {
    let incidents: Value = daemon.http.json("/api/v1/incidents?limit=1")?;
    Ok(incidents["incidents"].get(0).cloned())
}
