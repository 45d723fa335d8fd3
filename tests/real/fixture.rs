//! What a scenario or a fault runs on, and the expectations that many of them share.

use std::cell::{OnceCell, RefCell};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use support::behaviour::Behaviour;
use support::canary::Finished;
use support::report::{Batch, Probe};
use support::settings::Settings;
use support::stack::{AGENT, Agent, AgentEvent, Stack, StackKind, Turn};
use support::{SHORT_TIMEOUT, wait_for};

use crate::proxy::certificates;
use crate::timeline::Timeline;

/// The server and the agents of one scenario.
pub(crate) struct Fixture<'a> {
    kind: StackKind,
    /// On the real stack: a server with all agents of [`Behaviour`], for scenarios that don't harm it.
    shared: Option<&'a Stack>,
    /// The stack that the scenario started.
    own: OnceCell<Stack>,
    /// One for each room, in the order in which the scenario read the batches.
    timelines: RefCell<Vec<Timeline>>,
}

impl<'a> Fixture<'a> {
    pub(crate) fn new(kind: StackKind, shared: Option<&'a Stack>) -> Self {
        Self {
            kind,
            shared,
            own: OnceCell::new(),
            timelines: RefCell::default(),
        }
    }

    /// A stack whose agent has this behaviour in every room.
    pub(crate) fn stack(&self, behaviour: &Behaviour) -> anyhow::Result<&Stack> {
        match self.shared {
            Some(shared) => Ok(shared),
            None => self.own_stack(&[], behaviour),
        }
    }

    /// Such a stack, and settings that call its agent.
    pub(crate) fn call(&self, behaviour: &Behaviour) -> anyhow::Result<(&Stack, Settings)> {
        let stack = self.stack(behaviour)?;
        Ok((stack, Settings::new(stack).behaviour(behaviour)))
    }

    /// A stack that the scenario may harm. On the real stack, its workers are those of `agents`.
    pub(crate) fn own_stack(
        &self,
        agents: &[Agent],
        behaviour: &Behaviour,
    ) -> anyhow::Result<&Stack> {
        self.set_own(match self.kind {
            StackKind::Real => Stack::real(agents)?,
            StackKind::Sandbox => Stack::sandbox(behaviour.agent, &behaviour.faults)?,
            StackKind::Mock => Stack::mock()?,
        })
    }

    /// A real stack with additional settings of the server, in YAML.
    pub(crate) fn own_stack_with(
        &self,
        settings: &str,
        agents: &[Agent],
    ) -> anyhow::Result<&Stack> {
        self.set_own(Stack::real_with(settings, agents)?)
    }

    /// A real stack on the far side of a veth pair.
    pub(crate) fn stack_behind_veth(&self, agents: &[Agent]) -> anyhow::Result<&Stack> {
        self.set_own(Stack::real_behind_veth(agents)?)
    }

    /// Such a stack with a TURN server. Returns the certificate of the authority that the server's is from, too.
    pub(crate) fn stack_with_turn(&self, turn: Turn) -> anyhow::Result<(&Stack, String)> {
        let mut authority = String::new();
        let stack = Stack::real_with_turn(&[Agent::named(AGENT)], turn, |host| {
            let (certificate, server) = certificates(&host.to_string())?;
            authority = certificate;
            Ok(server)
        })?;
        Ok((self.set_own(stack)?, authority))
    }

    fn set_own(&self, stack: Stack) -> anyhow::Result<&Stack> {
        ensure!(
            self.own.set(stack).is_ok(),
            "a second stack of one scenario"
        );
        self.own.get().context("set above")
    }

    pub(crate) fn into_timelines(self) -> Vec<Timeline> {
        self.timelines.into_inner()
    }

    /// The lines of the logs about the rooms that `error` names. If the scenario started a stack, the last lines of its logs,
    /// too.
    pub(crate) fn logs(&self, error: &str) -> String {
        let shared = self.shared.map(|stack| stack.logs_about(error));
        let own = self.own.get().map(Stack::logs);
        [shared, own].into_iter().flatten().collect()
    }

    /// No room is left on the scenario's sandbox. The shared real stack is checked after the last scenario.
    pub(crate) fn expect_no_rooms(&self) -> anyhow::Result<()> {
        // A server that was killed or frozen doesn't respond.
        if let (StackKind::Sandbox, Some(stack)) = (self.kind, self.own.get())
            && let Ok(left) = stack.api.rooms()
        {
            ensure!(left.is_empty(), "rooms left on the sandbox: {left:?}");
        }
        Ok(())
    }
}

/// The exit code is `code`, and the rooms have these verdicts.
pub(crate) fn expect(
    fixture: &Fixture,
    finished: &Finished,
    code: i32,
    expected: &[&str],
) -> anyhow::Result<Batch> {
    let batch = finished.batch()?;
    let timelines = batch.probes.iter().map(Timeline::new);
    fixture.timelines.borrow_mut().extend(timelines);
    let verdicts: Vec<_> = batch.probes.iter().map(Probe::verdict).collect();
    ensure!(
        finished.code == Some(code) && verdicts == expected,
        "expected {expected:?} and exit {code}, seen {verdicts:?} and {}",
        finished.output()
    );
    Ok(batch)
}

/// None of the batch's rooms is on the server.
pub(crate) fn expect_gone(stack: &Stack, batch: &Batch) -> anyhow::Result<()> {
    let rooms = stack.api.rooms()?;
    let left: Vec<_> = batch
        .probes
        .iter()
        .filter(|probe| rooms.contains(&probe.room))
        .collect();
    ensure!(left.is_empty(), "still on the server: {left:?}");
    Ok(())
}

/// All rooms are ok, the exit code is 0, and no room is left on the server.
pub(crate) fn expect_ok(
    fixture: &Fixture,
    stack: &Stack,
    finished: &Finished,
    rooms: usize,
) -> anyhow::Result<Batch> {
    let batch = expect(fixture, finished, 0, &vec!["ok"; rooms])?;
    expect_gone(stack, &batch)?;
    Ok(batch)
}

/// The agent heard the echo of its whole greeting, once, after the greeting. Returns the seconds between the two.
pub(crate) fn expect_heard(stack: &Stack, probe: &Probe) -> anyhow::Result<f64> {
    let events = stack.events()?;
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
        "{}: the echo began {after} s after the end of the greeting",
        probe.room
    );
    Ok(after)
}

/// The minimum and the maximum of a figure over all probes, as text.
pub(crate) fn range(
    batch: &Batch,
    figure: impl Fn(&Probe) -> Option<f64>,
) -> anyhow::Result<String> {
    let figures: Option<Vec<_>> = batch.probes.iter().map(figure).collect();
    let figures = figures.with_context(|| format!("a figure is missing: {batch:?}"))?;
    let min = figures.iter().copied().fold(f64::INFINITY, f64::min);
    let max = figures.iter().copied().fold(0.0, f64::max);
    Ok(format!("{min:.3}-{max:.3} s"))
}

pub(crate) fn join_delays(batch: &Batch) -> anyhow::Result<String> {
    range(batch, |probe| probe.join_delay_seconds)
}

/// Waits for an event of the job whose metadata contains `tag`.
pub(crate) fn wait_for_job(stack: &Stack, tag: &str, event: &str) -> anyhow::Result<AgentEvent> {
    let job = stack.wait_for_event("the job to start", SHORT_TIMEOUT, |seen| {
        seen.name() == "job" && seen.text("metadata").contains(tag)
    })?;
    if event == "job" {
        return Ok(job);
    }
    stack.wait_for_event(event, SHORT_TIMEOUT, |seen| {
        seen.name() == event && seen.room() == job.room()
    })
}

/// Waits until the agent has greeted in two rooms of the scenario's own stack.
pub(crate) fn wait_for_two_greetings(stack: &Stack) -> anyhow::Result<()> {
    wait_for("two greetings", Duration::from_secs(40), || {
        let events = stack.events()?;
        let greeted = events.iter().filter(|event| event.name() == "greeted");
        Ok((greeted.count() == 2).then_some(()))
    })
}

/// The reason that the server's list of jobs calls for when no agent joins `room`. The list is read until the canary deletes
/// the dispatch: the server may list a running job at once, later or never.
pub(crate) fn reason_by_listed_jobs(stack: &Stack, room: &str) -> anyhow::Result<&'static str> {
    let mut last = 0;
    wait_for("the dispatch to be deleted", SHORT_TIMEOUT, || {
        let listed = stack.api.jobs(room, AGENT)?;
        last = listed.unwrap_or(last);
        Ok(listed.is_none().then_some(()))
    })?;
    Ok(if last > 0 {
        "agent_no_show"
    } else {
        "dispatch_unanswered"
    })
}

/// A batch of one room whose agent doesn't join. Its reason is the one that the server's list of jobs calls for.
pub(crate) fn expect_no_agent(
    fixture: &Fixture,
    behaviour: Behaviour,
    tag: &str,
) -> anyhow::Result<(Batch, &'static str)> {
    let (stack, settings) = fixture.call(&behaviour.tag(tag))?;
    let running = settings.set("deadlines.join", "5s").once()?;
    let job = wait_for_job(stack, tag, "job")?;
    let reason = reason_by_listed_jobs(stack, job.room())?;
    let batch = expect(fixture, &running.finish()?, 1, &[reason])?;
    expect_gone(stack, &batch)?;
    Ok((batch, reason))
}

/// A batch of one room whose agent joins and then fails. The origin is the agent, and there is a join delay. Returns the
/// batch and a summary.
pub(crate) fn expect_agent_fault(
    fixture: &Fixture,
    stack: &Stack,
    settings: &Settings,
    reason: &str,
) -> anyhow::Result<(Batch, String)> {
    let finished = settings.run()?;
    let batch = expect(fixture, &finished, 1, &[reason])?;
    expect_gone(stack, &batch)?;
    let probe = batch.only_probe()?;
    ensure!(probe.origin.as_deref() == Some("agent"), "{probe:?}");
    let seconds = probe.seconds("Left")?;
    let packets = probe.audio.packets;
    let summary = format!(
        "{reason} after {seconds:.1} s, join {}, {packets} packets of audio",
        join_delays(&batch)?
    );
    Ok((batch, summary))
}

/// The same with short deadlines for the track and for speech.
pub(crate) fn expect_faulty(
    fixture: &Fixture,
    behaviour: &Behaviour,
    reason: &str,
) -> anyhow::Result<(Batch, String)> {
    let (stack, settings) = fixture.call(behaviour)?;
    let settings = settings
        .set("deadlines.track", "4s")
        .set("deadlines.speech", "5s");
    expect_agent_fault(fixture, stack, &settings, reason)
}

const UDP_BLOCKED: &str = "because UDP does not get through";

/// Whether a note says that UDP is blocked.
pub(crate) fn notes_blocked_udp(probe: &Probe) -> bool {
    let mut notes = probe.evidence.notes.iter();
    notes.any(|note| note.contains(UDP_BLOCKED))
}
