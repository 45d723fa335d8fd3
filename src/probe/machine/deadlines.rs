//! What is due when, and what a missed deadline does.

use std::time::Duration;

use tokio::time::Instant;

use super::{Action, DispatchCall, Disruption, Phase, ProbeMachine};
use crate::config::Target;
use crate::probe::verdict::{AgentDuty, DispatchListing, MediaState};
use crate::probe::{Failure, Milestone, Outcome};

/// The engine's own deadline for the signal connection comes first, because it knows more; ours comes this much later.
pub(super) const ENGINE_GRACE: Duration = Duration::from_secs(2);

/// A server that froze is known to be after this long: one ping interval and the ping timeout.
const MAX_SIGNAL_SILENCE: Duration = Duration::from_secs(20);

/// From the end of the agent's speech to the end of its echo, excluding the delay; also how long an echo that has begun may
/// play, because 30 s are recorded. An echo that takes longer is a fault of the canary.
const MAX_CALLER_TURN: Duration = Duration::from_secs(40);

/// If an answer to the echo is expected, the agent may talk for this long without a pause that lets the echo begin.
const MAX_TALK: Duration = Duration::from_mins(2);

/// The longest that a room stays open for a verdict after the agent's join, whatever the hold, excluding clean-up. The worst
/// case that is reserved for a room rests on it.
pub fn max_time_to_verdict(target: &Target) -> Duration {
    let deadlines = &target.deadlines;
    let reply = if target.expect.reply {
        MAX_TALK
            + target.caller.silence.max(target.deadlines.agent_turn)
            + MAX_CALLER_TURN
            + deadlines.reply
    } else {
        Duration::ZERO
    };
    deadlines.speech + reply + MAX_SIGNAL_SILENCE
}

/// How often the jobs are listed while an agent without a name may be the target's. LiveKit can list a job late.
const LIST_INTERVAL: Duration = Duration::from_secs(2);

/// What a deadline is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Signal,
    Media,
    Agent(AgentDuty),
    /// A list of the jobs, to recognise an agent without a name.
    Recognise,
    /// The end of the agent's echo.
    CallerTurn,
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
            AgentDuty::Pause => MAX_TALK,
            AgentDuty::Reply => deadlines.reply,
        }
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
            Phase::Watching => self.due_of_agent(),
            Phase::FinalCheck { at, .. } => Some((at + MAX_SIGNAL_SILENCE, Due::FinalCheck)),
            Phase::Leaving { until } => Some((until, Due::Leave)),
        }
    }

    fn due_of_agent(&self) -> Option<(Instant, Due)> {
        let timeline = &self.report.timeline;
        let limit = |duty| self.limit_of(duty);
        let due = |from: Instant, duty| Some((from + limit(duty), Due::Agent(duty)));
        let Some(joined) = timeline.get(Milestone::AgentJoined) else {
            return self.due_of_join();
        };
        // The agent's track and speech can't arrive before the canary's own transports are up.
        let start = joined.max(self.ready?);
        let Some(spoke) = timeline.get(Milestone::AgentSpoke) else {
            let audio = [Milestone::AgentTrackSubscribed, Milestone::AgentFirstAudio];
            let has_track = audio.iter().any(|mark| timeline.get(*mark).is_some());
            let duty = if has_track {
                AgentDuty::Speech
            } else {
                AgentDuty::Track
            };
            return due(start, duty);
        };
        if self.target.expect.reply {
            if let Some(caller_ended) = self.turns.unanswered_since() {
                return due(caller_ended, AgentDuty::Reply);
            }
            if !self.turns.answered() {
                return match self.turns.caller_turn_since() {
                    Some(since) => Some((
                        since
                            + self
                                .target
                                .caller
                                .silence
                                .max(self.target.deadlines.agent_turn)
                            + MAX_CALLER_TURN,
                        Due::CallerTurn,
                    )),
                    None => due(spoke, AgentDuty::Pause),
                };
            }
        }
        // The agent can join before CreateDispatch has returned. The probe waits for that answer.
        if matches!(self.dispatch, DispatchCall::UnderWay { .. }) {
            return None;
        }
        match &self.disruption {
            Some(Disruption::Left { at, .. }) => Some((*at, Due::Ok)),
            _ => self.hold_until.map(|until| (until, Due::Ok)),
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
                self.phase = Phase::FinalCheck { duty, at };
                let participants = duty == AgentDuty::Join;
                self.actions.push(Action::ListRoom { participants });
            }
            Due::Recognise => {
                self.nameless.list_at = Some(now + LIST_INTERVAL);
                let participants = false;
                self.actions.push(Action::ListRoom { participants });
            }
            Due::CallerTurn => self.fail(Failure::of_missing_caller_turn(), now),
            Due::Ok => self.decide(Outcome::Ok, now),
            Due::FinalCheck => {
                if let Phase::FinalCheck { duty, .. } = self.phase {
                    self.blame_agent(duty, &DispatchListing::Unknown, now);
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
