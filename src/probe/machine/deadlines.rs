//! What is due when, and what a missed deadline does.

use std::time::Duration;

use tokio::time::Instant;

use super::{Action, DispatchCall, Disruption, Phase, ProbeMachine};
use crate::config::{Caller, Target};
use crate::livekit::event::CallerTurn;
use crate::probe::turns::{Awaited, EVIDENCE_WAIT, YIELD_SILENCE};
use crate::probe::verdict::{AgentDuty, DispatchListing, MediaState};
use crate::probe::{Failure, Milestone};

/// The engine's own deadline for the signal connection comes first, because it knows more; ours comes this much later.
pub(super) const ENGINE_GRACE: Duration = Duration::from_secs(2);

/// A server that froze is known to be after this long: one ping interval and the ping timeout.
const MAX_SIGNAL_SILENCE: Duration = Duration::from_secs(20);

/// How much longer than its speech the caller's turn may take. A turn that takes longer is a fault of the canary.
const CALLER_GRACE: Duration = Duration::from_secs(10);

/// LiveKit reports what it received about once per second. After a missed reply, its report is waited for.
const UPLINK_WAIT: Duration = Duration::from_secs(5);

/// The longest that a room stays open for a verdict after the agent's join, whatever the hold, excluding clean-up. The worst
/// case that is reserved for a room rests on it.
pub fn max_time_to_verdict(target: &Target) -> Duration {
    target.deadlines.speech + max_conversation(target, target.caller.turns) + MAX_SIGNAL_SILENCE
}

/// How much longer than its hold a room stays open to finish a turn that need not be answered.
pub fn max_overrun(target: &Target) -> Duration {
    if target.expect.reply {
        // Every turn is waited for, so none begins after the last one.
        return Duration::ZERO;
    }
    let deadlines = &target.deadlines;
    max_caller_speech(&target.caller) + deadlines.reply + deadlines.agent_turn + EVIDENCE_WAIT
}

/// How long the conversation takes at most, if a reply is expected to each turn and this many of them are left.
fn max_conversation(target: &Target, turns: u32) -> Duration {
    if !target.expect.reply {
        return Duration::ZERO;
    }
    let deadlines = &target.deadlines;
    let before = deadlines.agent_turn + max_caller_wait(target);
    let turn = before + max_caller_speech(&target.caller) + deadlines.reply;
    let interruption = if target.caller.interrupt {
        max_caller_speech(&target.caller) + deadlines.reply
    } else {
        Duration::ZERO
    };
    turn * turns + interruption + deadlines.agent_turn + EVIDENCE_WAIT
}

/// From the end of the agent's speech until the caller speaks, at the longest.
fn max_caller_wait(target: &Target) -> Duration {
    let Caller { silence, pause, .. } = &target.caller;
    target.deadlines.agent_turn.max(*silence).max(*pause)
}

/// How long the caller may speak.
fn max_caller_speech(caller: &Caller) -> Duration {
    let lines = caller.lines.iter().map(|line| line.audio.duration());
    lines.max().unwrap_or_default().max(CallerTurn::MAX_ECHO) + CALLER_GRACE
}

/// How often the jobs are listed while an agent without a name may be the target's, or while the agent's worker is unknown.
/// LiveKit can list a job late.
pub(super) const LIST_INTERVAL: Duration = Duration::from_secs(2);

/// What a deadline is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Signal,
    Media,
    Agent(AgentDuty),
    /// A list of the jobs, to recognise an agent without a name.
    Recognise,
    /// A list of the jobs, for the agent's worker.
    ListJobs,
    /// The end of what the caller says.
    CallerSpeech,
    /// The end of a turn that has a voice after it, or that was not answered and need not be.
    TurnEnd,
    /// The agent must have stopped speaking.
    Yield,
    /// The end of a room in which everything expected has happened.
    Ok,
    FinalCheck,
    Leave,
}

impl ProbeMachine {
    pub(in crate::probe) fn next_deadline(&self) -> Option<Instant> {
        self.due().map(|(at, _)| at)
    }

    /// Acts on every deadline that `passed` covers, the earliest first.
    pub(super) fn expire(&mut self, now: Instant, passed: impl Fn(Instant) -> bool) {
        while let Some((at, due)) = self.due().filter(|(at, _)| passed(*at)) {
            self.miss(due, at, now);
            self.proceed(now);
        }
    }

    /// How long the agent may take for a duty.
    pub(super) fn limit_of(&self, duty: AgentDuty) -> Duration {
        let deadlines = &self.target.deadlines;
        match duty {
            AgentDuty::Join => deadlines.join,
            AgentDuty::Track => deadlines.track.min(deadlines.speech),
            AgentDuty::Speech => deadlines.speech,
            AgentDuty::Pause => deadlines.agent_turn,
            AgentDuty::Reply | AgentDuty::Words => deadlines.reply,
            AgentDuty::Yield => self.target.expect.yield_within.unwrap_or_default(),
        }
    }

    /// The longest time from the agent's join to the verdict, now that the caller speaks.
    pub(super) fn time_to_verdict(&self, now: Instant) -> Duration {
        let joined = self.report.timeline.get(Milestone::AgentJoined);
        let passed = joined.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let taken = u32::try_from(self.turns.taken()).unwrap_or(u32::MAX);
        let left = (self.target.caller.turns + 1).saturating_sub(taken);
        passed + max_conversation(&self.target, left) + MAX_SIGNAL_SILENCE
    }

    /// The next deadline and what it is for.
    fn due(&self) -> Option<(Instant, Due)> {
        let deadlines = &self.target.deadlines;
        match self.phase {
            // CreateRoom and the deletion have deadlines of their own.
            Phase::Idle | Phase::Creating | Phase::Deleting | Phase::Over => None,
            Phase::Joining => Some((
                self.join_asked? + deadlines.signal + ENGINE_GRACE,
                Due::Signal,
            )),
            Phase::Connecting => {
                let joined = self.report.timeline.get(Milestone::SignalConnected)?;
                Some((joined + deadlines.media, Due::Media))
            }
            Phase::Watching => {
                let next_list = self.worker_search.next_at.map(|at| (at, Due::ListJobs));
                let due = [self.due_of_agent(), next_list];
                due.into_iter().flatten().min_by_key(|(at, _)| *at)
            }
            Phase::FinalCheck { at, .. } => {
                let wait = if self.final_listing.is_some() {
                    UPLINK_WAIT
                } else {
                    MAX_SIGNAL_SILENCE
                };
                Some((at + wait, Due::FinalCheck))
            }
            Phase::Leaving { until } => Some((until, Due::Leave)),
        }
    }

    fn due_of_agent(&self) -> Option<(Instant, Due)> {
        let timeline = &self.report.timeline;
        let Some(joined) = timeline.get(Milestone::AgentJoined) else {
            return self.due_of_join();
        };
        // The agent's track and speech can't arrive before the canary's own transports are up.
        let start = joined.max(self.ready?);
        let spoke = timeline.get(Milestone::AgentSpoke).is_some();
        if !spoke && self.turns.last_said().is_none() {
            let audio = [Milestone::AgentTrackSubscribed, Milestone::AgentFirstAudio];
            let track = audio.iter().find_map(|mark| timeline.get(*mark));
            return match track {
                None => Some(self.due_of_duty(start, AgentDuty::Track)),
                Some(_) if !self.target.caller.speaks_first => {
                    Some(self.due_of_duty(start, AgentDuty::Speech))
                }
                Some(track) => Some((
                    track + max_caller_wait(&self.target) + CALLER_GRACE,
                    Due::CallerSpeech,
                )),
            };
        }
        self.due_of_conversation()
    }

    fn due_of_duty(&self, from: Instant, duty: AgentDuty) -> (Instant, Due) {
        (from + self.limit_of(duty), Due::Agent(duty))
    }

    /// What is due once someone has spoken.
    fn due_of_conversation(&self) -> Option<(Instant, Due)> {
        // Nothing more can come from an agent that has left.
        if let Some(Disruption::Left { at, .. }) = &self.disruption {
            return (!self.call_under_way()).then_some((*at, Due::Ok));
        }
        let turn = [
            self.due_of_turn(),
            self.yield_due().map(|at| (at, Due::Yield)),
        ];
        let turn = turn.into_iter().flatten().min_by_key(|(at, _)| *at);
        if turn.is_some() {
            return turn;
        }
        // The agent can join before CreateDispatch has returned. The probe waits for that answer.
        if self.call_under_way() {
            return None;
        }
        self.hold_until.map(|until| (until, Due::Ok))
    }

    /// The next deadline of a turn. A turn that has begun is finished, even if no reply is expected.
    fn due_of_turn(&self) -> Option<(Instant, Due)> {
        let expected = self.target.expect.reply;
        let deadlines = &self.target.deadlines;
        match self.turns.awaited() {
            Awaited::AgentPause { since } if expected => {
                Some(self.due_of_duty(since, AgentDuty::Pause))
            }
            Awaited::CallerTurn { since } if expected => {
                let until = since + max_caller_wait(&self.target) + CALLER_GRACE;
                Some((until, Due::CallerSpeech))
            }
            Awaited::CallerSpeech { since } => {
                let until = since + max_caller_speech(&self.target.caller);
                Some((until, Due::CallerSpeech))
            }
            Awaited::Reply { since } if expected => Some(self.due_of_duty(since, AgentDuty::Reply)),
            Awaited::Reply { since } => Some((since + deadlines.reply, Due::TurnEnd)),
            Awaited::ReplyEnd { since } => Some((since + deadlines.agent_turn, Due::TurnEnd)),
            Awaited::Evidence { until } => Some((until, Due::TurnEnd)),
            Awaited::AgentPause { .. } | Awaited::CallerTurn { .. } | Awaited::Nothing => None,
        }
    }

    /// When an agent that was interrupted must be known to be silent.
    fn yield_due(&self) -> Option<Instant> {
        let within = self.target.expect.yield_within?;
        let turn = self.turns.last_said().filter(|turn| turn.interrupts)?;
        // Its silence is known when an utterance has ended.
        let known = self.target.speech.end_silence.max(YIELD_SILENCE);
        let at = turn.caller_started? + within + known;
        (!self.yield_judged).then_some(at)
    }

    /// Whether an agent that was interrupted spoke on for too long. One that had finished by itself did not.
    fn is_late_to_yield(&self) -> bool {
        let Some(turn) = self.turns.last_said() else {
            return false;
        };
        let within = self.target.expect.yield_within.unwrap_or_default();
        match (turn.yield_delay(), turn.caller_started) {
            (Some(delay), _) => delay > within,
            (None, Some(started)) => self.turns.speaks_since(started),
            (None, None) => false,
        }
    }

    fn due_of_join(&self) -> Option<(Instant, Due)> {
        let limit = self.limit_of(AgentDuty::Join);
        let mut join = self.dispatch_base()? + limit;
        if let Some(by) = self.nameless.join_by {
            join = join.max(by);
        }
        let list = self.nameless.list_at.filter(|_| !self.call_under_way());
        Some(match list {
            Some(at) if at < join => (at, Due::Recognise),
            _ => (join, Due::Agent(AgentDuty::Join)),
        })
    }

    /// From when the agent's join counts.
    fn dispatch_base(&self) -> Option<Instant> {
        let sent = self.report.timeline.get(Milestone::DispatchSent);
        sent.or(match self.dispatch {
            DispatchCall::UnderWay { since } => Some(since),
            _ => self.join_asked,
        })
    }

    /// The agent missed this duty. Before it is blamed, LiveKit has to show that it still answers.
    pub(super) fn final_check(&mut self, duty: AgentDuty, at: Instant) {
        self.phase = Phase::FinalCheck { duty, at };
        self.final_listing = None;
        let participants = duty == AgentDuty::Join;
        self.actions.push(Action::ListRoom { participants });
    }

    fn miss(&mut self, due: Due, at: Instant, now: Instant) {
        match due {
            Due::Signal => {
                let limit = self.target.deadlines.signal;
                let failure = Failure::of_slow_join(limit, &mut self.report.evidence);
                self.fail(failure, now);
            }
            Due::Media => {
                let reached = |milestone| self.report.timeline.get(milestone).is_some();
                let state = if reached(Milestone::CallerPublished) {
                    MediaState::Published
                } else if reached(Milestone::MediaConnected) {
                    MediaState::ConnectedOnly
                } else {
                    MediaState::Neither
                };
                let limit = self.target.deadlines.media;
                let failure = Failure::of_slow_media(state, limit, &mut self.report.evidence);
                self.fail(failure, now);
            }
            Due::Agent(AgentDuty::Join) if self.call_under_way() => {
                let limit = self.target.deadlines.join;
                let failure = Failure::of_slow_dispatch(limit, &mut self.report.evidence);
                self.fail(failure, now);
            }
            Due::Agent(duty) => {
                if duty == AgentDuty::Join {
                    self.decide_join(false);
                }
                self.final_check(duty, at);
            }
            Due::Recognise => {
                self.nameless.list_at = Some(now + LIST_INTERVAL);
                let participants = false;
                self.actions.push(Action::ListRoom { participants });
            }
            Due::ListJobs => self.list_jobs(),
            Due::CallerSpeech => self.fail(Failure::of_missing_caller_turn(), now),
            Due::TurnEnd => self.end_turn(now),
            Due::Yield => {
                self.yield_judged = true;
                if self.is_late_to_yield() {
                    self.final_check(AgentDuty::Yield, now);
                }
            }
            Due::Ok => self.conclude(now),
            Due::FinalCheck => {
                if let Phase::FinalCheck { duty, .. } = self.phase {
                    let listing = self.final_listing.take();
                    self.blame_agent(duty, &listing.unwrap_or(DispatchListing::Unknown), now);
                }
            }
            Due::Leave => {
                let limit = self.target.deadlines.cleanup;
                self.add_note(format!(
                    "the canary had not left the room after {limit:?}, and deleted it"
                ));
                self.delete();
            }
        }
    }
}
