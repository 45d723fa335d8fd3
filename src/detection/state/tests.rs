use super::*;
use crate::probe::{LimitKind, Reason};
use crate::report::sample;

const AGENT: Verdict = Verdict::Bad(Fault::Agent);
const SERVICE: Verdict = Verdict::Bad(Fault::Service);
const GOOD: Verdict = Verdict::Good;
const SILENCE: Duration = Duration::from_secs(2250);

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(1_790_000_000 + seconds)
}

/// A machine that rooms give verdicts: each opened and ended at these seconds.
struct Story(StateMachine);

impl Story {
    fn healthy() -> Self {
        let mut story = Self(StateMachine::new(at(-100)));
        assert_eq!(story.room(-60, -40, GOOD), Some(Transition::Found));
        story
    }

    /// A scheduled batch of one failed room at 0 and a confirmation at 30, which all fail.
    fn failing() -> Self {
        let mut story = Self::healthy();
        story.room(-20, 0, AGENT);
        story.room(30, 50, AGENT);
        story.room(30, 50, AGENT);
        story.room(80, 100, AGENT);
        assert_eq!(story.0.state(), TargetState::Failing);
        story
    }

    fn room(&mut self, opened: i64, ended: i64, verdict: Verdict) -> Option<Transition> {
        self.0.room(at(opened), at(ended), verdict)
    }

    fn next(&self) -> Option<(i64, usize)> {
        let due = self.0.next_confirmation(&Confirm::default())?;
        Some(((due.at - at(0)).num_seconds(), due.rooms))
    }
}

fn failed(reason: Reason) -> Outcome {
    sample::failed(reason, "")
}

#[test]
fn verdict_follows_the_origin_of_the_failure() {
    for (outcome, expected) in [
        (Outcome::Ok, GOOD),
        (Outcome::Aborted, Verdict::None),
        (failed(Reason::AgentSilent), AGENT),
        (failed(Reason::DispatchUnanswered), AGENT),
        (failed(Reason::SignalFailed), SERVICE),
        (failed(Reason::Unreachable), SERVICE),
        (failed(Reason::Removed), Verdict::None),
        (failed(Reason::PlanLimit(LimitKind::Quota)), Verdict::None),
        (failed(Reason::AuthRejected), Verdict::None),
        (failed(Reason::Internal), Verdict::None),
    ] {
        assert_eq!(Verdict::of(&outcome), expected, "{outcome:?}");
    }
}

#[test]
fn state_is_unknown_until_the_first_verdict() {
    let mut story = Story(StateMachine::new(at(0)));
    assert_eq!(story.room(1, 2, Verdict::None), None);
    assert_eq!(story.0.state(), TargetState::Unknown);
    assert_eq!(story.room(3, 4, GOOD), Some(Transition::Found));
    assert_eq!(
        (story.0.state(), story.0.since()),
        (TargetState::Healthy, at(4))
    );
    let mut bad_first = Story(StateMachine::new(at(0)));
    assert_eq!(bad_first.room(1, 2, AGENT), Some(Transition::Suspected));
}

#[test]
fn batch_that_fails_and_its_confirmation_are_an_outage_since_the_first_failure() {
    let mut story = Story::healthy();
    assert_eq!(story.room(-21, 0, AGENT), Some(Transition::Suspected));
    assert_eq!(story.room(-20, 1, AGENT), None);
    assert_eq!(story.room(-19, 2, AGENT), None);
    assert_eq!(story.next(), Some((30, 2)));
    assert_eq!(story.room(30, 51, AGENT), None);
    let failed = Transition::Failed {
        began_at: at(0),
        fault: Fault::Agent,
        continues: false,
    };
    assert_eq!(story.room(30, 52, AGENT), Some(failed));
    assert_eq!(
        (story.0.state(), story.0.since()),
        (TargetState::Failing, at(52))
    );
    assert_eq!(story.0.fault(), Some(Fault::Agent));
}

#[test]
fn rooms_of_one_moment_are_no_outage_however_many_fail() {
    let mut story = Story::healthy();
    for room in 0..200 {
        story.room(-20, room, AGENT);
    }
    assert_eq!(story.0.state(), TargetState::Suspect);
}

#[test]
fn one_failed_room_of_many_is_no_outage() {
    let mut story = Story::healthy();
    story.room(-20, 0, AGENT);
    assert_eq!(story.room(-20, 1, GOOD), None);
    assert_eq!(story.room(30, 45, GOOD), None);
    assert_eq!(story.room(30, 45, GOOD), Some(Transition::Dismissed));
    assert_eq!(story.next(), None);
}

#[test]
fn failures_within_30_seconds_are_a_blip() {
    let mut story = Story::healthy();
    for second in 0..30 {
        assert_ne!(story.0.state(), TargetState::Failing, "at {second}");
        story.room(second, second, SERVICE);
    }
    // Opened in the blip, and its failure is known later.
    story.room(29, 59, SERVICE);
    story.room(29, 59, SERVICE);
    assert_eq!(story.0.state(), TargetState::Suspect);
    story.room(60, 75, GOOD);
    assert_eq!(story.room(60, 75, GOOD), Some(Transition::Dismissed));
}

#[test]
fn fault_is_the_one_of_most_rooms_and_in_doubt_the_agent() {
    let fault = |verdicts: [Verdict; 4]| {
        let mut story = Story::healthy();
        for (place, verdict) in (0..).zip(verdicts) {
            story.room(place * 40, place * 40 + 5, verdict);
        }
        story.0.fault()
    };
    assert_eq!(
        fault([AGENT, SERVICE, SERVICE, SERVICE]),
        Some(Fault::Service)
    );
    assert_eq!(fault([AGENT, SERVICE, SERVICE, AGENT]), Some(Fault::Agent));
}

#[test]
fn good_rooms_that_opened_before_the_failure_dismiss_nothing() {
    let mut story = Story::healthy();
    story.room(-300, 0, AGENT);
    // Long calls that began while the agent was well.
    for second in 1..5 {
        assert_eq!(story.room(-300, second, GOOD), None);
    }
    assert_eq!(story.0.state(), TargetState::Suspect);
}

#[test]
fn without_confirmations_scheduled_rooms_decide() {
    let mut story = Story::healthy();
    let off = Confirm {
        rooms: 0,
        ..Confirm::default()
    };
    story.room(-20, 0, AGENT);
    assert_eq!(story.0.next_confirmation(&off), None);
    story.room(900, 920, AGENT);
    story.room(901, 921, AGENT);
    assert!(matches!(
        story.room(902, 922, AGENT),
        Some(Transition::Failed { .. })
    ));
    assert_eq!(story.0.next_confirmation(&off), None);
}

#[test]
fn confirmations_of_a_suspicion_wait_longer_and_longer() {
    let mut story = Story::healthy();
    story.room(-20, 0, AGENT);
    let mut waits = Vec::new();
    let mut now = 0;
    for _ in 0..8 {
        let (due, rooms) = story.next().unwrap();
        assert_eq!(rooms, 2);
        waits.push(due - now);
        now = due;
        story.0.confirmation_attempted(at(now));
    }
    assert_eq!(waits, [30, 30, 60, 120, 240, 480, 600, 600]);
}

#[test]
fn confirmation_that_ends_after_its_suspicion_does_not_hasten_the_next_one() {
    let mut story = Story::healthy();
    story.room(-20, 0, AGENT);
    story.room(30, 45, GOOD);
    assert_eq!(story.room(30, 45, GOOD), Some(Transition::Dismissed));
    story.0.confirmation_attempted(at(46));
    assert_eq!(story.next(), None);
    story.room(900, 920, AGENT);
    assert_eq!(story.next(), Some((950, 2)));
}

#[test]
fn outage_is_confirmed_each_minute_for_an_hour_and_then_less_often() {
    let mut story = Story::failing();
    let mut now = 100;
    let mut wait_at = |minutes: i64| {
        while now < 100 + minutes * 60 {
            now = story.next().unwrap().0;
            story.0.confirmation_attempted(at(now));
            story.room(now, now, AGENT);
        }
        let (due, rooms) = story.next().unwrap();
        assert_eq!(rooms, 1);
        due - now
    };
    assert_eq!(wait_at(0), 60);
    assert_eq!(wait_at(59), 60);
    assert!((90..95).contains(&wait_at(90)));
    assert_eq!(wait_at(24 * 60), 600);
}

#[test]
fn missing_rooms_follow_a_good_one_and_end_the_outage() {
    let mut story = Story::failing();
    assert_eq!(story.next(), Some((160, 1)));
    // The outage had four failed rooms: a fifth makes it certain enough that three good ones end it.
    for second in [160, 220] {
        story.room(second, second + 20, AGENT);
        story.0.confirmation_attempted(at(second + 20));
    }
    assert_eq!(story.next(), Some((300, 1)));
    assert_eq!(story.room(300, 315, GOOD), None);
    story.0.confirmation_attempted(at(315));
    assert_eq!(story.next(), Some((330, 2)));
    assert_eq!(story.room(330, 345, GOOD), None);
    assert_eq!(story.room(330, 345, GOOD), Some(Transition::Recovered));
    assert_eq!(
        (story.0.state(), story.0.fault()),
        (TargetState::Healthy, None)
    );
    assert_eq!(story.next(), None);
}

#[test]
fn bad_room_starts_the_count_of_good_ones_again() {
    let mut story = Story::failing();
    for second in [160, 220, 280] {
        story.room(second, second + 15, GOOD);
        story.room(second, second + 16, GOOD);
        story.room(second, second + 20, AGENT);
    }
    assert_eq!(story.0.state(), TargetState::Failing);
}

#[test]
fn good_rooms_that_opened_before_the_last_failure_end_no_outage() {
    let mut story = Story::failing();
    for second in 101..110 {
        assert_eq!(story.room(-300, second, GOOD), None);
    }
    assert_eq!(story.0.state(), TargetState::Failing);
}

#[test]
fn outage_of_half_of_the_rooms_needs_a_longer_run_of_good_ones() {
    let mut story = Story::failing();
    let mut now = 100;
    for _ in 0..20 {
        story.room(now, now + 15, GOOD);
        story.room(now + 20, now + 40, AGENT);
        now += 60;
    }
    let mut good = 0;
    while story.0.state() == TargetState::Failing {
        story.room(now, now + 15, GOOD);
        now += 60;
        good += 1;
    }
    assert_eq!(good, 8);
}

#[test]
fn failure_within_15_minutes_continues_the_incident() {
    let continues = |pause: i64| {
        let mut story = Story::failing();
        let mut now = 160;
        while story.0.state() == TargetState::Failing {
            story.room(now, now + 15, GOOD);
            now += 20;
        }
        now += pause;
        loop {
            match story.room(now, now, AGENT) {
                Some(Transition::Failed { continues, .. }) => return continues,
                _ => now += 40,
            }
        }
    };
    assert!(continues(14 * 60));
    assert!(!continues(16 * 60));
}

#[test]
fn state_without_a_verdict_becomes_unknown_and_the_incident_stays_open() {
    let mut story = Story::failing();
    let last = 100 + 2250;
    // A plan limit is no verdict.
    story.room(200, 220, Verdict::None);
    assert_eq!(story.0.elapse(at(last - 1), SILENCE), None);
    let transition = Transition::Lost { since: at(100) };
    assert_eq!(story.0.elapse(at(last), SILENCE), Some(transition));
    assert_eq!(story.0.elapse(at(last + 1), SILENCE), None);
    assert_eq!(story.0.state(), TargetState::Unknown);
    assert_eq!(story.0.fault(), Some(Fault::Agent));
    assert_eq!(story.next(), None);
    // The next verdict of either kind continues it.
    let mut bad = Story(story.0.clone());
    assert_eq!(
        bad.room(last + 10, last + 20, AGENT),
        Some(Transition::Found)
    );
    assert_eq!(bad.0.state(), TargetState::Failing);
    assert_eq!(
        story.room(last + 10, last + 20, GOOD),
        Some(Transition::Found)
    );
    assert_eq!(story.0.state(), TargetState::Failing);
    assert!(story.next().is_some());
}

#[test]
fn suspicion_without_a_verdict_is_forgotten() {
    let mut story = Story::healthy();
    story.room(-20, 0, AGENT);
    let lost = Transition::Lost { since: at(0) };
    assert_eq!(story.0.elapse(at(2250), SILENCE), Some(lost));
    assert_eq!(story.next(), None);
    assert_eq!(story.room(2300, 2320, AGENT), Some(Transition::Suspected));
}

#[test]
fn pause_ends_an_incident() {
    let mut story = Story::failing();
    assert!(story.0.pause(at(200)));
    assert_eq!(
        (story.0.state(), story.0.since()),
        (TargetState::Unknown, at(200))
    );
    assert_eq!((story.0.fault(), story.next()), (None, None));
    assert!(!story.0.pause(at(201)));
}

#[test]
fn state_is_read_back_as_it_was_written() {
    let mut story = Story::failing();
    let mut seen = vec![story.0.clone(), Story::healthy().0];
    story.room(200, 220, GOOD);
    seen.push(story.0.clone());
    let mut suspect = Story::healthy();
    suspect.room(-20, 0, SERVICE);
    seen.push(suspect.0);
    for machine in seen {
        let text = serde_json::to_string(&machine).unwrap();
        assert_eq!(
            serde_json::from_str::<StateMachine>(&text).unwrap(),
            machine
        );
    }
}

#[test]
fn backward_jump_of_the_clock_delays_nothing() {
    let mut story = Story::healthy();
    story.room(-20, 0, AGENT);
    let jump = -86_400;
    story.0.elapse(at(jump), SILENCE);
    assert_eq!(story.next(), Some((jump + 30, 2)));
    story.room(jump + 30, jump + 50, AGENT);
    story.room(jump + 30, jump + 50, AGENT);
    story.room(jump + 80, jump + 100, AGENT);
    assert_eq!(story.0.state(), TargetState::Failing);
    let jump = 2 * jump;
    story.0.elapse(at(jump), SILENCE);
    assert!(story.next().unwrap().0 <= jump + 60);
    for room in 0..10 {
        story.room(jump + room, jump + room, GOOD);
    }
    assert_eq!(story.0.state(), TargetState::Healthy);
    let lost = Transition::Lost {
        since: at(jump + 9),
    };
    assert_eq!(story.0.elapse(at(jump + 9 + 2250), SILENCE), Some(lost));
}

#[test]
fn room_across_a_jump_of_the_clock_is_counted() {
    let mut story = Story::healthy();
    // It ends before it opened.
    assert_eq!(story.room(10_000, 0, AGENT), Some(Transition::Suspected));
    assert_eq!(story.room(-10_000, 100_000, GOOD), None);
    assert_eq!(story.0.state(), TargetState::Suspect);
    // Times at the ends of the calendar don't overflow.
    let mut machine = StateMachine::new(DateTime::<Utc>::MAX_UTC);
    machine.room(DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MIN_UTC, AGENT);
    machine.room(DateTime::<Utc>::MAX_UTC, DateTime::<Utc>::MAX_UTC, AGENT);
}

#[test]
fn settings_at_their_bounds_do_not_overflow() {
    let confirm = Confirm {
        after: Duration::MAX,
        longest: Duration::MAX,
        ..Confirm::default()
    };
    let mut story = Story::healthy();
    story.room(-20, 0, AGENT);
    for _ in 0..40 {
        assert!(story.0.next_confirmation(&confirm).is_some());
        story.0.confirmation_attempted(at(1));
    }
}
