//! The table of scenarios: what is done to the product, and what must come of it.

use std::cell::{OnceCell, RefCell};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use chrono::Utc;
use rustix::process::Signal;
use tokio::time::Instant;

use crate::agents::{
    agent_before_the_answer_to_its_dispatch_has_a_join_delay,
    agent_that_fails_before_it_connects_is_blamed_where_its_job_is_listed,
    agent_that_leaves_after_its_reply_is_ok, agent_that_leaves_without_its_reply_left_early,
    agent_that_restarts_its_track_is_heard_on, avatar_speaks_for_its_agent,
    background_alone_is_a_silent_agent, background_sound_is_neither_speech_nor_echoed,
    drained_server_lets_its_calls_end_well, identity_taken_by_another_client_is_removed,
    restarted_server_is_signal_lost_and_serves_the_next_batch,
    right_to_publish_taken_away_is_removed, right_to_subscribe_taken_away_is_removed,
    server_that_creates_no_room_by_itself_takes_every_dispatch,
    speech_before_anybody_listens_is_an_agent_that_says_nothing,
    speech_before_our_subscription_counts_from_when_it_is_heard,
    stray_agent_is_evidence_and_never_the_agent,
};
use crate::canary::{Batch, Canary, Finished, Probe, Settings, unix_seconds};
use crate::daemon::{
    killed_daemon_loses_no_ledger_and_the_next_deletes_its_rooms,
    outage_fails_the_batches_within_it_and_no_other, prometheus_holds_what_the_history_holds,
};
use crate::gate::{Gate, Hold};
use crate::journey::Journey;
use crate::network::{
    distant_server_delays_the_join_by_its_distance_alone, loss_and_jitter_are_measured_as_they_are,
};
use crate::order::Order;
use crate::reports::{
    conversation_is_not_written_down_where_nobody_asked,
    conversation_is_written_down_where_that_is_wanted, inference_that_is_used_up_is_a_plan_limit,
    model_that_answers_429_is_a_plan_limit, other_error_of_a_model_is_evidence_of_a_silent_agent,
    turns_are_measured_by_the_agent_itself, voice_that_answers_429_is_a_plan_limit,
};
use crate::stack::{self, AGENT, Agent, Event, Process, SECRET, Site, Stack, TlsProxy};
use crate::stack::{kill, wait_for};

/// What every scenario gets.
pub struct Ground<'a> {
    pub stack: Stack,
    /// On the real stack: a server with every agent that orders name, shared by all scenarios that harm nobody.
    shared: Option<&'a Site>,
    /// The site that the scenario started.
    own: OnceCell<Site>,
    /// Of every room, in the order in which batches were looked at.
    journeys: RefCell<Vec<Journey>>,
}

impl<'a> Ground<'a> {
    pub fn new(stack: Stack, shared: Option<&'a Site>) -> Self {
        Self {
            stack,
            shared,
            own: OnceCell::new(),
            journeys: RefCell::default(),
        }
    }

    /// A site whose agent does in every room what `order` says.
    pub fn site(&self, order: &Order) -> anyhow::Result<&Site> {
        match self.shared {
            Some(shared) => Ok(shared),
            None => self.own_site(&[], order),
        }
    }

    /// Such a site, and settings by which its agent is called.
    pub fn call(&self, order: &Order) -> anyhow::Result<(&Site, Settings)> {
        let site = self.site(order)?;
        Ok((site, Settings::new(site).order(order)))
    }

    /// A site that the scenario may harm; its workers are those of `agents` on the real stack.
    pub fn own_site(&self, agents: &[Agent], order: &Order) -> anyhow::Result<&Site> {
        self.keep(match self.stack {
            Stack::Real => Site::real(agents)?,
            Stack::Sandbox => Site::sandbox(order.agent, &order.faults)?,
            Stack::Mock => Site::mock()?,
        })
    }

    /// A livekit-server with these settings besides the usual ones, in YAML.
    pub fn own_site_with(&self, settings: &str, agents: &[Agent]) -> anyhow::Result<&Site> {
        self.keep(Site::real_with(settings, agents)?)
    }

    /// A real one on the far side of a veth pair.
    pub fn site_behind_veth(&self, agents: &[Agent]) -> anyhow::Result<&Site> {
        self.keep(Site::real_behind_veth(agents)?)
    }

    fn keep(&self, site: Site) -> anyhow::Result<&Site> {
        ensure!(self.own.set(site).is_ok(), "one site of its own is enough");
        self.own.get().context("it was set above")
    }

    pub fn journeys(self) -> Vec<Journey> {
        self.journeys.into_inner()
    }

    /// What the logs say of the rooms that `error` names; of a site of the scenario's own their last lines too.
    pub fn logs(&self, error: &str) -> String {
        let shared = self.shared.map(|site| site.logs_about(error));
        let own = self.own.get().map(Site::logs);
        [shared, own].into_iter().flatten().collect()
    }

    /// No room stayed on a sandbox, which the scenario had for itself; the real stack is looked at when all are over.
    pub fn expect_empty(&self) -> anyhow::Result<()> {
        // A server that was killed or frozen says nothing.
        if let (Stack::Sandbox, Some(site)) = (self.stack, self.own.get())
            && let Ok(left) = site.api.rooms()
        {
            ensure!(left.is_empty(), "left on the sandbox: {left:?}");
        }
        Ok(())
    }
}

pub struct Scenario {
    /// The sentence that is false where it fails.
    pub name: &'static str,
    pub expected: &'static str,
    /// Why the sandbox can't express it; `None` where it can.
    pub real_only: Option<&'static str>,
    /// Rooms in which agents speak at the same time; more for one that measures what a busy machine changes.
    pub load: u32,
    /// Does it, checks it, and says what was seen.
    run: Run,
}

pub type Run = fn(&Ground) -> anyhow::Result<String>;

impl Scenario {
    /// What runs there, or why nothing does; `None` where nobody expects it.
    pub fn on(&self, stack: Stack) -> Option<Result<Run, &'static str>> {
        match (stack, self.real_only) {
            (Stack::Sandbox, Some(why)) => Some(Err(why)),
            (Stack::Sandbox, None) | (Stack::Real, _) => Some(Ok(self.run)),
            (Stack::Mock, _) => None,
        }
    }
}

/// Why some scenarios are the real stack's alone.
const NO_PROCESS: &str = "its agent is no process of its own that could be killed";
const NO_NETWORK: &str = "it binds to 127.0.0.1 alone, where nothing lies between";
const NO_MODELS: &str = "its agent has no models whose work could be measured";
const NO_TCP: &str = "it takes media over UDP alone";
const SAME: &str = "what a killed daemon leaves is the same there";
const OWN_SANDBOX: &str = "it has a sandbox of its own on either";
const NO_PERMISSIONS: &str = "it changes no permission of a participant";
const NO_SETTINGS: &str = "its rooms may always be created by a token";
const NO_RESTART: &str = "it ends at once, and comes back on another port";

macro_rules! scenarios {
    ($($name:ident: $expected:literal $(, real only: $why:ident)? $(, load: $load:literal)?;)*) => {
        /// The longest first, so that none of them is left alone at the end.
        pub const SCENARIOS: &[Scenario] = &[
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

scenarios! {
    outage_fails_the_batches_within_it_and_no_other: "dispatch_unanswered within, ok outside, counters = history, exit 0", real only: NO_PROCESS;
    killed_daemon_loses_no_ledger_and_the_next_deletes_its_rooms: "no torn row, ledger whole, journalled rooms gone", real only: SAME, load: 2;
    prometheus_holds_what_the_history_holds: "counters = history, promtool finds nothing", real only: OWN_SANDBOX;
    killed_job_is_an_agent_that_left_early: "agent_left_early, exit 1", real only: NO_PROCESS;
    killed_worker_is_an_agent_that_left_early: "agent_left_early, exit 1", real only: NO_PROCESS;
    frozen_server_is_signal_lost_and_its_rooms_are_named: "signal_lost within 20 s, rooms named, exit 4", load: 2;
    late_agent_changes_no_verdict_and_leaves_nothing_behind: "no agent; 15 s later no room, exit 1";
    stray_agent_is_evidence_and_never_the_agent: "ok, agent_silent, dispatch_unanswered; the stray is named", load: 2;
    restarted_server_is_signal_lost_and_serves_the_next_batch: "2 signal_lost, exit 4; then 2 ok", real only: NO_RESTART, load: 2;
    drained_server_lets_its_calls_end_well: "2 ok, exit 0, then the server ends", real only: NO_RESTART, load: 2;
    loss_and_jitter_are_measured_as_they_are: "2 ok, both figures right, exit 0", real only: NO_NETWORK, load: 4;
    distant_server_delays_the_join_by_its_distance_alone: "ok, joined by the server's clock, exit 0", real only: NO_NETWORK, load: 4;
    five_rooms_open_in_order_and_the_agent_hears_every_echo: "5 ok, exit 0", load: 5;
    panicking_probe_harms_no_other: "4 ok, 1 internal, exit 4", load: 5;
    delayed_agent_has_at_least_its_delay_as_join_delay: "ok, every join delay >= 2.000 s", load: 3;
    no_worker_at_all_is_dispatch_unanswered: "dispatch_unanswered, exit 1";
    busy_worker_is_dispatch_unanswered: "dispatch_unanswered, exit 1";
    wrong_agent_name_is_dispatch_unanswered: "dispatch_unanswered, exit 1";
    agent_that_never_connects_is_blamed_where_its_job_is_listed: "agent_no_show where a job is listed, exit 1";
    model_that_answers_429_is_a_plan_limit: "plan_limit/inference, error noted, exit 3";
    voice_that_answers_429_is_a_plan_limit: "plan_limit/inference, error noted, exit 3";
    inference_that_is_used_up_is_a_plan_limit: "plan_limit/inference, error noted, exit 3";
    conversation_is_written_down_where_that_is_wanted: "ok, agent, caller and agent in its transcript, exit 0";
    conversation_is_not_written_down_where_nobody_asked: "ok, transcript null, exit 0";
    turns_are_measured_by_the_agent_itself: "ok, figures of three turns, exit 0", real only: NO_MODELS;
    other_error_of_a_model_is_evidence_of_a_silent_agent: "agent_silent, error noted, exit 1";
    agent_that_fails_before_it_connects_is_blamed_where_its_job_is_listed: "agent_no_show where a job is listed, exit 1";
    speech_before_our_subscription_counts_from_when_it_is_heard: "ok, first speech after the subscription, exit 0";
    speech_before_anybody_listens_is_an_agent_that_says_nothing: "agent_silent that says so, exit 1";
    background_sound_is_neither_speech_nor_echoed: "ok, its greeting alone echoed, exit 0";
    background_alone_is_a_silent_agent: "agent_silent, exit 1";
    avatar_speaks_for_its_agent: "ok, the agent's own join, exit 0";
    agent_that_restarts_its_track_is_heard_on: "ok with a reply on the second track, exit 0";
    agent_before_the_answer_to_its_dispatch_has_a_join_delay: "ok with a join delay, exit 0";
    agent_that_leaves_without_its_reply_left_early: "agent_left_early, exit 1";
    agent_that_leaves_after_its_reply_is_ok: "ok with a reply delay, exit 0";
    agent_without_packets_is_silent: "agent_silent with a join delay, exit 1";
    agent_with_a_track_of_silence_is_silent: "agent_silent with a join delay, exit 1";
    agent_without_a_track_has_no_track: "agent_no_track with a join delay, exit 1";
    agent_that_hangs_up_left_early: "agent_left_early, exit 1";
    agent_that_may_leave_after_speech_is_ok: "ok, exit 0";
    second_agent_is_a_duplicate: "agent_duplicate, exit 1";
    pypi_client_hears_the_agent_and_is_heard: "greeting heard, 2 s of tone heard, reply heard";
    answering_agent_has_a_reply_delay: "ok with a reply delay, exit 0";
    missing_reply_is_agent_no_reply: "agent_no_reply, exit 1";
    continuous_echo_is_heard: "ok, echo heard, exit 0";
    one_by_one_holds_each_room_from_its_own_join: "ok, each room for its own hold, exit 0";
    metadata_and_attributes_reach_the_agent: "ok, canary=true seen, exit 0";
    unnamed_agent_comes_by_automatic_dispatch: "ok, exit 0";
    agent_comes_by_create_room: "ok, metadata seen, exit 0";
    agent_comes_by_token: "ok, metadata seen, exit 0";
    interval_opens_rooms_whatever_the_agent_does: "3 ok, 2 s apart, exit 0", load: 3;
    burst_opens_all_rooms_at_once: "3 ok, within 1 s, exit 0", load: 3;
    server_off_loopback_is_ok: "ok, exit 0", real only: NO_NETWORK, load: 2;
    blocked_udp_is_a_call_over_tcp_that_says_so: "2 ok over TCP, noted, exit 0", real only: NO_NETWORK, load: 2;
    blocked_udp_and_tcp_is_media_failed_within_its_deadline: "media_failed within 15 s, exit 4", real only: NO_NETWORK;
    broken_connection_with_media_is_media_failed: "media_failed within 10 s, exit 4", real only: NO_NETWORK;
    tcp_alone_is_ok: "2 ok over TCP, exit 0", real only: NO_TCP, load: 2;
    wss_with_a_private_authority_is_ok: "ok, exit 0";
    untrusted_certificate_is_unreachable: "unreachable, exit 4";
    certificate_for_another_name_is_unreachable: "unreachable, exit 4";
    two_batches_at_once_do_not_disturb_each_other: "both ok, exit 0", load: 4;
    room_deleted_by_somebody_else_is_removed: "removed, exit 4";
    participant_removed_by_somebody_else_is_removed: "removed, exit 4";
    identity_taken_by_another_client_is_removed: "removed, exit 4";
    right_to_subscribe_taken_away_is_removed: "removed, exit 4", real only: NO_PERMISSIONS;
    right_to_publish_taken_away_is_removed: "removed, exit 4", real only: NO_PERMISSIONS;
    server_that_creates_no_room_by_itself_takes_every_dispatch: "4 dispatch_unanswered, exit 1", real only: NO_SETTINGS;
    killed_server_is_signal_lost_at_once: "signal_lost within 3 s, exit 4", load: 2;
    wrong_secret_is_a_config_error: "auth_rejected, exit 2";
    unknown_host_is_unreachable: "unreachable, exit 4";
    closed_port_is_unreachable: "unreachable, exit 4";
    table_has_a_row_for_every_room: "a row for every room, exit 1";
    check_tries_the_credentials: "exit 0; wrong secret: exit 2";
    five_mistakes_are_reported_at_once: "five errors, exit 2";
    ctrl_c_aborts_within_five_seconds: "aborted, exit 130 within 5 s";
    sigterm_aborts_within_five_seconds: "aborted, exit 130 within 5 s";
    late_agent_of_create_room_leaves_nothing_behind: "no agent; 15 s later no room, exit 1";
    late_agent_of_a_token_leaves_nothing_behind: "no agent; 15 s later no room, exit 1";
    room_and_token_that_name_nobodys_agent_are_unanswered: "dispatch_unanswered, exit 1";
    agent_that_is_there_before_the_canary_is_an_upper_bound: "ok, an upper bound, exit 0";
}

// --- what all of them ask ---

fn verdict(probe: &Probe) -> &str {
    probe.reason.as_deref().unwrap_or(&probe.outcome)
}

/// Exit code and the verdict of every room.
pub fn expect(
    ground: &Ground,
    finished: &Finished,
    code: i32,
    wanted: &[&str],
) -> anyhow::Result<Batch> {
    let batch = finished.batch()?;
    let journeys = batch.probes.iter().map(Journey::of);
    ground.journeys.borrow_mut().extend(journeys);
    let verdicts: Vec<_> = batch.probes.iter().map(verdict).collect();
    ensure!(
        finished.code == Some(code) && verdicts == wanted,
        "expected {wanted:?} and exit {code}, seen {verdicts:?} and {}",
        finished.all()
    );
    Ok(batch)
}

/// The server holds none of the batch's rooms.
pub fn expect_gone(site: &Site, batch: &Batch) -> anyhow::Result<()> {
    let rooms = site.api.rooms()?;
    let left: Vec<_> = batch
        .probes
        .iter()
        .filter(|probe| rooms.contains(&probe.room))
        .collect();
    ensure!(left.is_empty(), "still on the server: {left:?}");
    Ok(())
}

/// All rooms ok, exit 0, nothing left on the server.
pub fn expect_ok(
    ground: &Ground,
    site: &Site,
    finished: &Finished,
    rooms: usize,
) -> anyhow::Result<Batch> {
    let batch = expect(ground, finished, 0, &vec!["ok"; rooms])?;
    expect_gone(site, &batch)?;
    Ok(batch)
}

/// The agent in the room of this probe heard the whole of its own greeting, once, after it had spoken it.
pub fn expect_heard(site: &Site, probe: &Probe) -> anyhow::Result<f64> {
    let events = site.events()?;
    let of_room = |name: &str| {
        events
            .iter()
            .filter(|event| event.room() == probe.room && event.name() == name)
            .collect::<Vec<_>>()
    };
    let (greeted, echoes) = (of_room("greeted"), of_room("heard"));
    ensure!(
        greeted.len() == 1 && echoes.len() == 1,
        "{}: {} greetings, {} echoes heard",
        probe.room,
        greeted.len(),
        echoes.len()
    );
    let seconds = echoes[0].number("seconds")?;
    ensure!(seconds > 1.8, "{}: only {seconds} s heard", probe.room);
    let after = echoes[0].number("began")? - greeted[0].number("ended")?;
    ensure!(
        after > 0.0,
        "{}: echoed {after} s into its greeting",
        probe.room
    );
    Ok(after)
}

/// The least and the most of a figure over all probes, as text.
fn range(batch: &Batch, figure: impl Fn(&Probe) -> Option<f64>) -> anyhow::Result<String> {
    let figures: Option<Vec<_>> = batch.probes.iter().map(figure).collect();
    let figures = figures.with_context(|| format!("a figure is missing: {batch:?}"))?;
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    let most = figures.iter().copied().fold(0.0, f64::max);
    Ok(format!("{least:.3}-{most:.3} s"))
}

pub fn joins(batch: &Batch) -> anyhow::Result<String> {
    range(batch, |probe| probe.join_delay_seconds)
}

/// A report from the job of the scenario that put `tag` into its order.
pub fn wait_for_job(site: &Site, tag: &str, event: &str) -> anyhow::Result<Event> {
    let limit = Duration::from_secs(30);
    let job = site.wait_for_event("the job to start", limit, |seen| {
        seen.name() == "job" && seen.text("metadata").contains(tag)
    })?;
    if event == "job" {
        return Ok(job);
    }
    site.wait_for_event(event, limit, |seen| {
        seen.name() == event && seen.room() == job.room()
    })
}

// --- it goes well ---

fn five_rooms_open_in_order_and_the_agent_hears_every_echo(
    ground: &Ground,
) -> anyhow::Result<String> {
    let site = ground.site(&Order::greets())?;
    let finished = Canary::once()
        .args(&["--agent-name", AGENT, "--rooms", "5", "--hold", site.hold])
        .on(site)
        .start()?
        .finish()?;
    let batch = expect_ok(ground, site, &finished, 5)?;
    for pair in batch.probes.windows(2) {
        let (joined, sent) = (pair[0].at("AgentJoined")?, pair[1].at("DispatchSent")?);
        ensure!(joined < sent, "{} opened too early", pair[1].room);
    }
    let positions: Vec<_> = batch.probes.iter().map(|probe| &*probe.position).collect();
    ensure!(positions == ["first", "later", "later", "later", "later"]);
    for probe in &batch.probes {
        expect_heard(site, probe)?;
    }
    Ok(format!(
        "5 ok, in order, 5 echoes heard, join {}",
        joins(&batch)?
    ))
}

fn delayed_agent_has_at_least_its_delay_as_join_delay(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets().after(2))?;
    let finished = settings.set("batch.rooms", 3).run()?;
    let batch = expect_ok(ground, site, &finished, 3)?;
    for probe in &batch.probes {
        ensure!(probe.join_delay_seconds >= Some(2.0), "{probe:?}");
    }
    Ok(format!("3 ok, join {}", joins(&batch)?))
}

/// A caller that shares nothing with the canary: client.py, on the client library of the Python package index.
fn pypi_client_hears_the_agent_and_is_heard(ground: &Ground) -> anyhow::Result<String> {
    let order = Order::replies();
    let site = ground.site(&order)?;
    let room = format!("pypi-{}", std::process::id());
    site.api.dispatch(&room, AGENT, &order.metadata())?;
    let mut client = stack::command(&stack::program("PYTHON")?);
    client
        .arg(stack::source("client.py"))
        .env("LIVEKIT_URL", &site.url)
        .env("LIVEKIT_TOKEN", site.api.token(&room, "pypi-client")?)
        .env("ROOM", &room);
    let mut client = Process::spawn("client", client, site.dir())?;
    let status = client.finish(Duration::from_mins(2))?;
    let printed = client.log()?;
    ensure!(status.success(), "{status}: {printed}");
    let told = |event: &str| {
        let mut lines = printed.lines().filter(|line| line.starts_with('{'));
        let line = lines.find_map(|line| Event::read(line).ok().filter(|it| it.name() == event));
        line.with_context(|| format!("no {event} in {printed}"))?
            .number("seconds")
    };
    let (greeting, reply) = (told("greeting")?, told("reply")?);
    let heard = site
        .wait_for_event("the agent to hear", Duration::from_secs(5), |event| {
            event.name() == "heard" && event.room() == room
        })?
        .number("seconds")?;
    site.api.delete_room(&room)?;
    ensure!(greeting > 1.5, "only {greeting} s of the greeting came");
    ensure!(heard > 1.5, "the agent heard only {heard} s of 2");
    Ok(format!(
        "{greeting:.2} s of greeting, {heard:.2} s of tone, {reply:.2} s of reply heard"
    ))
}

fn answering_agent_has_a_reply_delay(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::replies())?;
    let finished = settings
        .set("expect.reply", true)
        .set("batch.hold", "12s")
        .run()?;
    let batch = expect_ok(ground, site, &finished, 1)?;
    Ok(format!(
        "ok, reply after {}",
        range(&batch, |probe| probe.reply_delay_seconds)?
    ))
}

fn continuous_echo_is_heard(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets())?;
    let finished = settings
        .set("echo.mode", "continuous")
        .set("echo.delay", "3s")
        .run()?;
    let batch = expect_ok(ground, site, &finished, 1)?;
    let after = expect_heard(site, &batch.probes[0])?;
    Ok(format!("ok, heard {after:.1} s after the greeting"))
}

fn one_by_one_holds_each_room_from_its_own_join(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets())?;
    let finished = settings
        .set("batch.rooms", 3)
        .set("batch.stay", "one_by_one")
        .set("batch.hold", "6s")
        .run()?;
    let batch = expect_ok(ground, site, &finished, 3)?;
    let open =
        |probe: &Probe| Some(probe.seconds("Left").ok()? - probe.seconds("AgentJoined").ok()?);
    for probe in &batch.probes {
        let seconds = open(probe).context("never left")?;
        ensure!((6.0..8.0).contains(&seconds), "held for {seconds} s");
    }
    Ok(format!("3 ok, each held for {}", range(&batch, open)?))
}

fn metadata_and_attributes_reach_the_agent(ground: &Ground) -> anyhow::Result<String> {
    let tag = "metadata arrives whole";
    let order = Order::greets().tag(tag);
    let (site, settings) = ground.call(&order)?;
    let finished = settings.set("attributes.team", "blue").run()?;
    let batch = expect_ok(ground, site, &finished, 1)?;
    let job = wait_for_job(site, tag, "job")?;
    ensure!(job.room() == batch.probes[0].room);
    ensure!(job.text("metadata") == order.metadata());
    let caller = wait_for_job(site, tag, "caller")?;
    let attributes = caller.attributes();
    ensure!(
        attributes["canary"] == "true" && attributes["team"] == "blue",
        "{attributes}"
    );
    Ok(format!("ok, the agent saw {attributes}"))
}

fn unnamed_agent_comes_by_automatic_dispatch(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.own_site(&[Agent::named("")], &Order::greets().unnamed())?;
    let finished = Settings::new(site)
        .without("agent_name")
        .set("dispatch.mode", "automatic")
        .set("batch.rooms", 2)
        .run()?;
    let batch = expect_ok(ground, site, &finished, 2)?;
    for probe in &batch.probes {
        expect_heard(site, probe)?;
    }
    Ok(format!("2 ok, join {}", joins(&batch)?))
}

/// The named agent, and its metadata, without a `CreateDispatch` of ours.
fn expect_dispatched(ground: &Ground, mode: &str) -> anyhow::Result<String> {
    let tag = format!("comes by {mode}");
    let (site, settings) = ground.call(&Order::greets().tag(&tag))?;
    let finished = settings
        .set("dispatch.mode", mode)
        .set("batch.rooms", 2)
        .run()?;
    let batch = expect_ok(ground, site, &finished, 2)?;
    for probe in &batch.probes {
        expect_heard(site, probe)?;
    }
    wait_for_job(site, &tag, "job")?;
    Ok(format!("2 ok, join {}", joins(&batch)?))
}

fn agent_comes_by_create_room(ground: &Ground) -> anyhow::Result<String> {
    expect_dispatched(ground, "room")
}

fn agent_comes_by_token(ground: &Ground) -> anyhow::Result<String> {
    expect_dispatched(ground, "token")
}

/// When each of three rooms opened, in seconds since the first did.
fn openings(ground: &Ground, site: &Site, settings: Settings) -> anyhow::Result<Vec<f64>> {
    let finished = settings.set("batch.rooms", 3).run()?;
    let batch = expect_ok(ground, site, &finished, 3)?;
    let opened = batch
        .probes
        .iter()
        .map(|probe| unix_seconds(probe.started_at));
    let opened: Vec<_> = opened.collect();
    Ok(opened.iter().map(|at| at - opened[0]).collect())
}

fn interval_opens_rooms_whatever_the_agent_does(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets().after(3))?;
    let settings = settings
        .set("batch.ramp", "interval")
        .set("batch.interval", "2s");
    let opened = openings(ground, site, settings)?;
    let apart = opened
        .windows(2)
        .all(|pair| (1.9..3.0).contains(&(pair[1] - pair[0])));
    ensure!(apart, "opened at {opened:?}");
    Ok(format!("3 ok, opened at {opened:.2?} s"))
}

fn burst_opens_all_rooms_at_once(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets())?;
    let opened = openings(ground, site, settings.set("batch.ramp", "burst"))?;
    ensure!(opened.iter().all(|at| *at < 1.0), "opened at {opened:?}");
    Ok(format!("3 ok, opened at {opened:.2?} s"))
}

fn agent_that_is_there_before_the_canary_is_an_upper_bound(
    ground: &Ground,
) -> anyhow::Result<String> {
    let tag = "is-there-first";
    let (site, settings) = ground.call(&Order::greets().tag(tag))?;
    let gate = Gate::before(site.address(), Hold::Signal)?;
    let running = settings
        .project("url", format!("ws://{}", gate.address))
        .set("dispatch.mode", "room")
        // The gate's time counts.
        .set("deadlines.signal", "30s")
        .set("deadlines.join", "60s")
        .once()?;
    wait_for_job(site, tag, "connected")?;
    gate.open();
    let finished = running.finish()?;
    let batch = expect_ok(ground, site, &finished, 1)?;
    let probe = &batch.probes[0];
    ensure!(probe.join_upper_bound, "{probe:?}");
    ensure!(probe.seconds("AgentJoined")? >= probe.seconds("SignalConnected")?);
    expect_heard(site, probe)?;
    Ok(format!("ok, joined within {}, echo heard", joins(&batch)?))
}

fn server_off_loopback_is_ok(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.site_behind_veth(&[Agent::named(AGENT)])?;
    let finished = Settings::new(site).set("batch.rooms", 2).run()?;
    let batch = expect_ok(ground, site, &finished, 2)?;
    for probe in &batch.probes {
        ensure!(!notes_blocked_udp(probe), "{:?}", probe.evidence);
        expect_heard(site, probe)?;
    }
    Ok(format!("2 ok at {}, join {}", site.url, joins(&batch)?))
}

const UDP_BLOCKED: &str = "media runs over TCP: UDP doesn't get through";

pub fn notes_blocked_udp(probe: &Probe) -> bool {
    let mut notes = probe.evidence.notes.iter();
    notes.any(|note| note.contains(UDP_BLOCKED))
}

/// How long media took to come up, after the join response.
fn media(probe: &Probe) -> anyhow::Result<f64> {
    Ok(probe.seconds("MediaConnected")? - probe.seconds("SignalConnected")?)
}

fn blocked_udp_is_a_call_over_tcp_that_says_so(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.site_behind_veth(&[Agent::named(AGENT)])?;
    site.block_udp()?;
    let finished = Settings::new(site).set("batch.rooms", 2).run()?;
    let batch = expect_ok(ground, site, &finished, 2)?;
    for probe in &batch.probes {
        ensure!(notes_blocked_udp(probe), "{:?}", probe.evidence);
        expect_heard(site, probe)?;
    }
    let media = range(&batch, |probe| media(probe).ok())?;
    Ok(format!("2 ok, noted, media up after {media}"))
}

fn blocked_udp_and_tcp_is_media_failed_within_its_deadline(
    ground: &Ground,
) -> anyhow::Result<String> {
    let site = ground.site_behind_veth(&[])?;
    site.block_udp()?;
    site.block_media_over_tcp()?;
    let finished = Settings::new(site).run()?;
    let batch = expect(ground, &finished, 4, &["media_failed"])?;
    expect_gone(site, &batch)?;
    let probe = &batch.probes[0];
    ensure!(probe.origin.as_deref() == Some("network"), "{probe:?}");
    let seconds = unix_seconds(batch.ended_at) - probe.at("SignalConnected")?;
    // The deadline, and the time to leave and delete.
    ensure!(seconds < 17.0, "over {seconds} s after the join response");
    Ok(format!(
        "media_failed, over {seconds:.1} s after the join response"
    ))
}

fn broken_connection_with_media_is_media_failed(ground: &Ground) -> anyhow::Result<String> {
    let tag = "media-breaks";
    let site = ground.site_behind_veth(&[Agent::named(AGENT)])?;
    let running = Settings::new(site)
        .order(&Order::greets().tag(tag))
        .project("ice", "tcp")
        .set("batch.hold", "30s")
        .once()?;
    wait_for_job(site, tag, "greeted")?;
    site.reset_media_over_tcp()?;
    let broken = Instant::now();
    let batch = expect(ground, &running.finish()?, 4, &["media_failed"])?;
    let seconds = broken.elapsed().as_secs_f64();
    expect_gone(site, &batch)?;
    // The signal connection lives, so the verdict waits for the transport to come back.
    ensure!(seconds < 10.0, "over {seconds} s after the break");
    let detail = batch.probes[0].detail.clone().unwrap_or_default();
    Ok(format!("{detail}; over {seconds:.1} s after the break"))
}

fn tcp_alone_is_ok(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets())?;
    let finished = settings.project("ice", "tcp").set("batch.rooms", 2).run()?;
    let batch = expect_ok(ground, site, &finished, 2)?;
    for probe in &batch.probes {
        // It was asked for, so it is no finding.
        ensure!(!notes_blocked_udp(probe), "{:?}", probe.evidence);
        expect_heard(site, probe)?;
    }
    let media = range(&batch, |probe| media(probe).ok())?;
    Ok(format!("2 ok, media up after {media}"))
}

fn wss_with_a_private_authority_is_ok(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets())?;
    let proxy = TlsProxy::start(site, "localhost")?;
    let finished = settings
        .project("url", proxy.url.as_str())
        .project("ca_file", proxy.ca_file.display().to_string())
        .run()?;
    let batch = expect_ok(ground, site, &finished, 1)?;
    expect_heard(site, &batch.probes[0])?;
    Ok(format!("ok, join {}", joins(&batch)?))
}

fn two_batches_at_once_do_not_disturb_each_other(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets())?;
    let settings = settings.set("batch.rooms", 2);
    let (one, other) = (settings.once()?, settings.once()?);
    let batches = [one.finish()?, other.finish()?];
    for finished in &batches {
        let batch = expect_ok(ground, site, finished, 2)?;
        for probe in &batch.probes {
            expect_heard(site, probe)?;
        }
    }
    Ok("2 + 2 ok, 4 echoes heard".to_owned())
}

fn agent_that_may_leave_after_speech_is_ok(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::hangs_up())?;
    let finished = settings
        .set("expect.agent_may_leave", "after_speech")
        .run()?;
    let batch = expect_ok(ground, site, &finished, 1)?;
    Ok(format!("ok, join {}", joins(&batch)?))
}

// --- nobody comes ---

/// No agent in any of two rooms, each within its join deadline (5 s) and two seconds more.
fn expect_nobody(ground: &Ground, site: &Site, agent: &str) -> anyhow::Result<String> {
    let finished = Settings::new(site)
        .set("agent_name", agent)
        .set("batch.rooms", 2)
        .set("deadlines.join", "5s")
        .run()?;
    let batch = expect(ground, &finished, 1, &["dispatch_unanswered"; 2])?;
    expect_gone(site, &batch)?;
    for probe in &batch.probes {
        ensure!(probe.join_delay_seconds.is_none());
        let seconds = probe.seconds("Left")? - probe.seconds("DispatchSent")?;
        ensure!(seconds < 7.0, "{seconds} s for one room");
    }
    let seconds = range(&batch, |probe| probe.seconds("Left").ok())?;
    Ok(format!("2 dispatch_unanswered, each after {seconds}"))
}

fn no_worker_at_all_is_dispatch_unanswered(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.own_site(&[], &Order::is_busy())?;
    expect_nobody(ground, site, AGENT)
}

fn busy_worker_is_dispatch_unanswered(ground: &Ground) -> anyhow::Result<String> {
    let order = Order::is_busy();
    expect_nobody(ground, ground.site(&order)?, order.agent)
}

fn wrong_agent_name_is_dispatch_unanswered(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.site(&Order::greets())?;
    expect_nobody(ground, site, "no-such-agent")
}

fn room_and_token_that_name_nobodys_agent_are_unanswered(
    ground: &Ground,
) -> anyhow::Result<String> {
    let site = ground.site(&Order::greets())?;
    let started = ["room", "token"].map(|mode| {
        let settings = Settings::new(site)
            .set("agent_name", "no-such-agent")
            .set("dispatch.mode", mode)
            .set("deadlines.join", "3s");
        (mode, settings.once())
    });
    for (mode, running) in started {
        let batch = expect(ground, &running?.finish()?, 1, &["dispatch_unanswered"])?;
        expect_gone(site, &batch)?;
        let detail = batch.probes[0].detail.clone().unwrap_or_default();
        // Not that it lists no dispatch: the server took it.
        ensure!(detail.contains("no accepted job"), "{mode}: {detail}");
    }
    Ok("both dispatch_unanswered, both dispatches listed".to_owned())
}

fn table_has_a_row_for_every_room(ground: &Ground) -> anyhow::Result<String> {
    let settings = Settings::new(ground.site(&Order::greets())?)
        .set("agent_name", "no-such-agent")
        .set("batch.rooms", 2)
        .set("deadlines.join", "2s");
    let finished = Canary::new(&["once"])?
        .config(&settings.text())?
        .start()?
        .finish()?;
    ensure!(finished.code == Some(1), "{}", finished.all());
    let rows = finished
        .stdout
        .lines()
        .filter(|line| line.contains("canary-") && line.contains("dispatch_unanswered"));
    ensure!(rows.count() == 2, "{}", finished.all());
    Ok("2 rows dispatch_unanswered, exit 1".to_owned())
}

/// The verdict that the server's own list of jobs calls for, where no agent comes to `room`. The list is watched until the
/// product deletes the dispatch, because the server lists a running job at once, later or never, as luck has it.
pub fn expected_of_nobody(site: &Site, room: &str) -> anyhow::Result<&'static str> {
    let mut last = 0;
    wait_for(
        "the dispatch to be deleted",
        Duration::from_secs(30),
        || {
            let listed = site.api.jobs(room, AGENT)?;
            last = listed.unwrap_or(last);
            Ok(listed.is_none().then_some(()))
        },
    )?;
    Ok(if last > 0 {
        "agent_no_show"
    } else {
        "dispatch_unanswered"
    })
}

/// A batch of one room whose job brings no agent, and the verdict that the server's list of jobs called for.
pub fn expect_no_agent(
    ground: &Ground,
    order: Order,
    tag: &str,
) -> anyhow::Result<(Batch, &'static str)> {
    let (site, settings) = ground.call(&order.tag(tag))?;
    let running = settings.set("deadlines.join", "5s").once()?;
    let job = wait_for_job(site, tag, "job")?;
    let wanted = expected_of_nobody(site, job.room())?;
    let batch = expect(ground, &running.finish()?, 1, &[wanted])?;
    expect_gone(site, &batch)?;
    Ok((batch, wanted))
}

fn agent_that_never_connects_is_blamed_where_its_job_is_listed(
    ground: &Ground,
) -> anyhow::Result<String> {
    let (_, wanted) = expect_no_agent(ground, Order::never_connects(), "never-connects")?;
    Ok(format!("{wanted}, as the server listed its jobs"))
}

fn late_agent_changes_no_verdict_and_leaves_nothing_behind(
    ground: &Ground,
) -> anyhow::Result<String> {
    expect_late(ground, "explicit")
}

fn late_agent_of_create_room_leaves_nothing_behind(ground: &Ground) -> anyhow::Result<String> {
    expect_late(ground, "room")
}

fn late_agent_of_a_token_leaves_nothing_behind(ground: &Ground) -> anyhow::Result<String> {
    expect_late(ground, "token")
}

fn expect_late(ground: &Ground, dispatch: &str) -> anyhow::Result<String> {
    let tag = &format!("comes late by {dispatch}");
    let (site, settings) = ground.call(&Order::greets().too_late(10, 5).tag(tag))?;
    let running = settings
        .set("dispatch.mode", dispatch)
        .set("deadlines.join", "5s")
        .once()?;
    let job = wait_for_job(site, tag, "job")?;
    let wanted = expected_of_nobody(site, job.room())?;
    let batch = expect(ground, &running.finish()?, 1, &[wanted])?;
    let came = wait_for_job(site, tag, "connecting")?.number("at")?;
    wait_for("15 s since it came", Duration::from_secs(40), || {
        Ok((unix_seconds(Utc::now()) > came + 15.0).then_some(()))
    })?;
    expect_gone(site, &batch)?;
    ensure!(site.api.participants(job.room())?.is_empty());
    Ok(format!(
        "{wanted}; the agent came and is gone, and its room"
    ))
}

// --- somebody comes, and it goes wrong ---

/// One room whose agent joins and then does as it is told; the verdict is on the agent, the join delay stands.
fn expect_agent_fault(
    ground: &Ground,
    site: &Site,
    settings: &Settings,
    reason: &str,
) -> anyhow::Result<(Batch, String)> {
    let finished = settings.run()?;
    let batch = expect(ground, &finished, 1, &[reason])?;
    expect_gone(site, &batch)?;
    let probe = &batch.probes[0];
    ensure!(probe.origin.as_deref() == Some("agent"), "{probe:?}");
    let seconds = probe.seconds("Left")?;
    let packets = probe.audio.packets;
    let seen = format!(
        "{reason} after {seconds:.1} s, join {}, {packets} packets of audio",
        joins(&batch)?
    );
    Ok((batch, seen))
}

/// The same, for an agent that is to be found out soon.
pub fn expect_faulty(
    ground: &Ground,
    order: &Order,
    reason: &str,
) -> anyhow::Result<(Batch, String)> {
    let (site, settings) = ground.call(order)?;
    let settings = settings
        .set("deadlines.track", "4s")
        .set("deadlines.speech", "5s");
    expect_agent_fault(ground, site, &settings, reason)
}

fn agent_without_packets_is_silent(ground: &Ground) -> anyhow::Result<String> {
    let (batch, seen) = expect_faulty(ground, &Order::sends_no_packets(), "agent_silent")?;
    ensure!(batch.probes[0].audio.packets == 0, "{seen}");
    Ok(seen)
}

fn agent_with_a_track_of_silence_is_silent(ground: &Ground) -> anyhow::Result<String> {
    let (batch, seen) = expect_faulty(ground, &Order::is_silent(), "agent_silent")?;
    // 50 a second, for 5 s.
    ensure!(batch.probes[0].audio.packets > 100, "{seen}");
    Ok(seen)
}

fn agent_without_a_track_has_no_track(ground: &Ground) -> anyhow::Result<String> {
    Ok(expect_faulty(ground, &Order::has_no_track(), "agent_no_track")?.1)
}

fn agent_that_hangs_up_left_early(ground: &Ground) -> anyhow::Result<String> {
    Ok(expect_faulty(ground, &Order::hangs_up(), "agent_left_early")?.1)
}

fn missing_reply_is_agent_no_reply(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets())?;
    let settings = settings
        .set("expect.reply", true)
        .set("deadlines.reply", "3s")
        .set("batch.hold", "15s");
    Ok(expect_agent_fault(ground, site, &settings, "agent_no_reply")?.1)
}

fn second_agent_is_a_duplicate(ground: &Ground) -> anyhow::Result<String> {
    let tag = "has-a-twin";
    let (site, settings) = ground.call(&Order::greets().tag(tag))?;
    let running = settings.once()?;
    let greeted = wait_for_job(site, tag, "greeted")?;
    site.api.dispatch(greeted.room(), AGENT, "")?;
    let batch = expect(ground, &running.finish()?, 1, &["agent_duplicate"])?;
    expect_gone(site, &batch)?;
    Ok(format!("agent_duplicate, join {}", joins(&batch)?))
}

fn killed_job_is_an_agent_that_left_early(ground: &Ground) -> anyhow::Result<String> {
    let tag = "is-killed";
    let (site, settings) = ground.call(&Order::greets().tag(tag))?;
    let running = settings.set("batch.hold", "30s").once()?;
    let job = wait_for_job(site, tag, "job")?;
    wait_for_job(site, tag, "greeted")?;
    kill(job.number("pid")?)?;
    let killed = Instant::now();
    let batch = expect(ground, &running.finish()?, 1, &["agent_left_early"])?;
    expect_gone(site, &batch)?;
    Ok(format!(
        "agent_left_early, ended {:.1} s after the kill",
        killed.elapsed().as_secs_f64()
    ))
}

fn killed_worker_is_an_agent_that_left_early(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.own_site(&[Agent::named(AGENT)], &Order::greets())?;
    let running = Settings::new(site).set("batch.hold", "30s").once()?;
    let limit = Duration::from_secs(30);
    site.wait_for_event("greeted", limit, |event| event.name() == "greeted")?;
    site.workers[0].signal(Signal::KILL)?;
    let killed = Instant::now();
    let batch = expect(ground, &running.finish()?, 1, &["agent_left_early"])?;
    expect_gone(site, &batch)?;
    Ok(format!(
        "agent_left_early, ended {:.1} s after the kill",
        killed.elapsed().as_secs_f64()
    ))
}

fn room_deleted_by_somebody_else_is_removed(ground: &Ground) -> anyhow::Result<String> {
    let tag = "room-is-deleted";
    let (site, settings) = ground.call(&Order::greets().tag(tag))?;
    let running = settings.once()?;
    let greeted = wait_for_job(site, tag, "greeted")?;
    site.api.delete_room(greeted.room())?;
    let batch = expect(ground, &running.finish()?, 4, &["removed"])?;
    expect_gone(site, &batch)?;
    Ok(batch.probes[0].detail.clone().unwrap_or_default())
}

fn participant_removed_by_somebody_else_is_removed(ground: &Ground) -> anyhow::Result<String> {
    let tag = "caller-is-removed";
    let (site, settings) = ground.call(&Order::greets().tag(tag))?;
    let running = settings.once()?;
    let caller = wait_for_job(site, tag, "caller")?;
    wait_for_job(site, tag, "greeted")?;
    let identity = caller.text("caller");
    site.api.remove_participant(caller.room(), identity)?;
    let batch = expect(ground, &running.finish()?, 4, &["removed"])?;
    expect_gone(site, &batch)?;
    Ok(batch.probes[0].detail.clone().unwrap_or_default())
}

/// Waits until the agent has greeted in two rooms of a site of their own.
pub fn wait_for_two_greetings(site: &Site) -> anyhow::Result<()> {
    wait_for("two greetings", Duration::from_secs(40), || {
        let events = site.events()?;
        let greeted = events.iter().filter(|event| event.name() == "greeted");
        Ok((greeted.count() == 2).then_some(()))
    })
}

/// Two rooms in mid-conversation on a site of their own, and what `harm` to its server makes of them within `limit`.
fn expect_signal_lost(ground: &Ground, harm: Signal, limit: f64) -> anyhow::Result<String> {
    let site = ground.own_site(&[Agent::named(AGENT)], &Order::greets())?;
    let running = Settings::new(site)
        .project("api_timeout", "2s")
        .set("deadlines.cleanup", "2s")
        .set("batch.rooms", 2)
        .set("batch.hold", "40s")
        .once()?;
    wait_for_two_greetings(site)?;
    site.server.signal(harm)?;
    let harmed = unix_seconds(Utc::now());
    let finished = running.finish()?;
    let batch = expect(ground, &finished, 4, &["signal_lost"; 2])?;
    // The process goes on trying to delete the rooms; the batch is over when all verdicts are in.
    let seconds = unix_seconds(batch.ended_at) - harmed;
    ensure!(seconds < limit, "took {seconds} s");
    for probe in &batch.probes {
        ensure!(probe.seconds("RoomDeleted").is_err(), "{probe:?}");
        let named = finished.stderr.contains(&probe.room);
        ensure!(named, "{} isn't named: {}", probe.room, finished.all());
    }
    Ok(format!(
        "2 signal_lost, batch over after {seconds:.1} s, rooms named"
    ))
}

fn killed_server_is_signal_lost_at_once(ground: &Ground) -> anyhow::Result<String> {
    // The verdict at once, and the attempts to delete.
    expect_signal_lost(ground, Signal::KILL, 3.0)
}

fn frozen_server_is_signal_lost_and_its_rooms_are_named(ground: &Ground) -> anyhow::Result<String> {
    // 20 s for the verdict, 2 s for the attempt to delete.
    expect_signal_lost(ground, Signal::STOP, 22.0)
}

fn panicking_probe_harms_no_other(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.site(&Order::greets())?;
    let finished = Canary::once()
        .args(&["--agent-name", AGENT, "--rooms", "5", "--hold", site.hold])
        .on(site)
        .env("LIVEKIT_CANARY_FAULT", "panic:2")
        .start()?
        .finish()?;
    let verdicts = ["ok", "ok", "internal", "ok", "ok"];
    let batch = expect(ground, &finished, 4, &verdicts)?;
    expect_gone(site, &batch)?;
    Ok("4 ok, 1 internal, five rooms gone".to_owned())
}

// --- we never get in ---

fn expect_unreachable(ground: &Ground, settings: &Settings, says: &str) -> anyhow::Result<String> {
    let finished = settings.run()?;
    let batch = expect(ground, &finished, 4, &["unreachable"])?;
    let detail = batch.probes[0].detail.clone().unwrap_or_default();
    ensure!(detail.contains(says), "{says:?} isn't in {detail:?}");
    Ok(detail)
}

fn untrusted_certificate_is_unreachable(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets())?;
    let proxy = TlsProxy::start(site, "localhost")?;
    let settings = settings.project("url", proxy.url.as_str());
    expect_unreachable(ground, &settings, "TLS")
}

fn certificate_for_another_name_is_unreachable(ground: &Ground) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets())?;
    let proxy = TlsProxy::start(site, "elsewhere.test")?;
    let settings = settings
        .project("url", proxy.url.as_str())
        .project("ca_file", proxy.ca_file.display().to_string());
    expect_unreachable(ground, &settings, "TLS")
}

fn unknown_host_is_unreachable(ground: &Ground) -> anyhow::Result<String> {
    let (_, settings) = ground.call(&Order::greets())?;
    let settings = settings.project("url", "ws://no-such-host.invalid:7880");
    expect_unreachable(ground, &settings, "no-such-host.invalid")
}

fn closed_port_is_unreachable(ground: &Ground) -> anyhow::Result<String> {
    let (_, settings) = ground.call(&Order::greets())?;
    let settings = settings.project("url", "ws://127.0.0.1:1");
    expect_unreachable(ground, &settings, "127.0.0.1:1")
}

fn wrong_secret_is_a_config_error(ground: &Ground) -> anyhow::Result<String> {
    // Of the right one's length and start, so that the search for it in the output finds parts too.
    let wrong = SECRET.replace("hold", "know");
    let (_, settings) = ground.call(&Order::greets())?;
    let finished = settings.project("api_secret", wrong.as_str()).run()?;
    ensure!(!finished.all().contains(&wrong), "{}", finished.all());
    let batch = expect(ground, &finished, 2, &["auth_rejected"])?;
    Ok(batch.probes[0].detail.clone().unwrap_or_default())
}

fn check_tries_the_credentials(ground: &Ground) -> anyhow::Result<String> {
    let site = ground.site(&Order::greets())?;
    let check = |secret: &str| {
        let settings = Settings::new(site).project("api_secret", secret);
        Canary::new(&["check", "--connect"])?
            .config(&settings.text())?
            .start()?
            .finish()
    };
    let right = check(&site.secret)?;
    ensure!(right.code == Some(0), "{}", right.all());
    let wrong = check("another-secret-of-at-least-32-characters")?;
    ensure!(wrong.code == Some(2), "{}", wrong.all());
    Ok("exit 0; wrong secret: exit 2".to_owned())
}

fn five_mistakes_are_reported_at_once(_: &Ground) -> anyhow::Result<String> {
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
[targets.support.echo]
mode = "loud"
"#;
    let finished = Canary::once().config(config)?.start()?.finish()?;
    ensure!(finished.code == Some(2), "{}", finished.all());
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

// --- we are told to stop ---

fn expect_aborted(ground: &Ground, signal: Signal, tag: &str) -> anyhow::Result<String> {
    let (site, settings) = ground.call(&Order::greets().tag(tag))?;
    let running = settings
        .set("batch.rooms", 2)
        .set("batch.hold", "60s")
        .once()?;
    wait_for_job(site, tag, "greeted")?;
    running.signal(signal)?;
    let signalled = Instant::now();
    let finished = running.finish()?;
    let elapsed = signalled.elapsed();
    ensure!(elapsed < Duration::from_secs(5), "took {elapsed:?}");
    let batch = expect(ground, &finished, 130, &["aborted"; 2])?;
    expect_gone(site, &batch)?;
    Ok(format!(
        "2 aborted, exit 130 after {:.2} s",
        elapsed.as_secs_f64()
    ))
}

fn ctrl_c_aborts_within_five_seconds(ground: &Ground) -> anyhow::Result<String> {
    expect_aborted(ground, Signal::INT, "ctrl-c")
}

fn sigterm_aborts_within_five_seconds(ground: &Ground) -> anyhow::Result<String> {
    expect_aborted(ground, Signal::TERM, "sigterm")
}
