use tokio::time::Instant;

use super::*;
use crate::probe::{Evidence, LimitKind, Reason, Turn};
use crate::report::sample;

/// A probe whose agent was dispatched at once, without a turn. The marks are in milliseconds after the dispatch.
fn report(outcome: Outcome, marks: &[(Milestone, u64)]) -> ProbeReport {
    let dispatched = [(Milestone::DispatchSent, 0)];
    let marks = [dispatched.as_slice(), marks].concat();
    ProbeReport {
        turns: Vec::new(),
        ..sample::probe(1, outcome, Evidence::default(), &marks)
    }
}

fn failed(reason: Reason) -> Outcome {
    sample::failed(reason, "as scripted")
}

/// The verdict of each of [`Sli::ALL`] with the default thresholds of 5 s and 8 s: `+` good, `-` bad, `.` not eligible.
fn verdicts(report: &ProbeReport) -> String {
    let objectives = Objectives::default();
    let verdicts = Sli::ALL
        .iter()
        .map(|sli| match sli.judge(report, &objectives) {
            SliVerdict::Good => '+',
            SliVerdict::Bad => '-',
            SliVerdict::NotEligible => '.',
        });
    verdicts.collect()
}

const IN_TIME: &[(Milestone, u64)] = &[
    (Milestone::AgentJoined, 500),
    (Milestone::AgentSpoke, 1_500),
];

#[test]
fn every_reason_counts_in_the_service_levels_of_its_origin() {
    let expected = [
        ("agent_no_show", "-++.-"),
        ("dispatch_unanswered", "-++.-"),
        ("agent_no_track", "-++.-"),
        ("agent_silent", "-++.-"),
        ("agent_no_reply", "-++.-"),
        ("agent_wrong_reply", "-++.-"),
        ("agent_not_yielding", "-++.-"),
        ("agent_left_early", "-++.-"),
        ("agent_duplicate", "-++.-"),
        ("room_create_failed", "....-"),
        ("dispatch_failed", "....-"),
        ("signal_failed", "....-"),
        ("signal_lost", "....-"),
        ("publish_failed", "....-"),
        ("unreachable", "....-"),
        ("media_failed", "....-"),
        ("removed", "....."),
        ("plan_limit", "....-"),
        ("auth_rejected", "....."),
        ("config_rejected", "....."),
        ("internal", "....."),
    ];
    // The marks fit only some of the reasons. Still the outcome alone decides where a probe counts.
    let seen = Reason::ALL.map(|reason| {
        let verdicts = verdicts(&report(failed(reason), IN_TIME));
        (reason.label(), verdicts)
    });
    let expected = expected.map(|(reason, verdicts)| (reason, verdicts.to_owned()));
    assert_eq!(seen, expected);
}

#[test]
fn milestone_that_was_not_reached_is_never_good() {
    for reason in Reason::ALL {
        let verdicts = verdicts(&report(failed(reason), &[]));
        assert!(!verdicts.contains('+'), "{}: {verdicts}", reason.label());
    }
    for kind in LimitKind::ALL {
        let limited = report(failed(Reason::PlanLimit(kind)), IN_TIME);
        assert_eq!(verdicts(&limited), "....-");
    }
}

#[test]
fn probe_that_is_ok_counts_everywhere_and_an_aborted_one_nowhere() {
    assert_eq!(verdicts(&report(Outcome::Ok, IN_TIME)), "+++.+");
    assert_eq!(verdicts(&report(Outcome::Aborted, IN_TIME)), ".....");
    assert_eq!(verdicts(&report(Outcome::Aborted, &[])), ".....");
}

#[test]
fn late_agent_is_bad_only_in_the_service_level_of_the_late_milestone() {
    let at = |joined, spoke| {
        let marks = [
            (Milestone::AgentJoined, joined),
            (Milestone::AgentSpoke, spoke),
        ];
        verdicts(&report(Outcome::Ok, &marks))
    };
    assert_eq!(at(5_000, 8_000), "+++.+");
    assert_eq!(at(5_001, 8_000), "+-+.+");
    assert_eq!(at(5_000, 8_001), "++-.+");
    assert_eq!(at(6_000, 9_000), "+--.+");
}

#[test]
fn good_join_stays_good_whatever_happens_later() {
    let silent = report(
        failed(Reason::AgentSilent),
        &[(Milestone::AgentJoined, 500)],
    );
    assert_eq!(verdicts(&silent), "-+-.-");
    let left = report(failed(Reason::AgentLeftEarly), IN_TIME);
    assert_eq!(verdicts(&left), "-++.-");
    let never = report(failed(Reason::DispatchUnanswered), &[]);
    assert_eq!(verdicts(&never), "---.-");
}

#[test]
fn upper_bound_of_a_delay_can_make_a_join_good_and_never_bad() {
    let bound = |joined| {
        let marks = [
            (Milestone::AgentJoined, joined),
            (Milestone::AgentSpoke, 7_000),
        ];
        let mut report = report(Outcome::Ok, &marks);
        report.join_upper_bound = true;
        verdicts(&report)
    };
    assert_eq!(bound(5_000), "+++.+");
    assert_eq!(bound(5_001), "+.+.+");
}

#[test]
fn agent_that_joined_before_the_dispatch_was_in_time() {
    let marks = [
        (Milestone::AgentJoined, 100),
        (Milestone::AgentSpoke, 200),
        (Milestone::DispatchSent, 300),
    ];
    let early = sample::probe(1, Outcome::Ok, Evidence::default(), &marks);
    assert_eq!(verdicts(&early), "+++++");
    let undispatched = sample::probe(
        1,
        failed(Reason::AgentLeftEarly),
        Evidence::default(),
        IN_TIME,
    );
    assert_eq!(verdicts(&undispatched), "-+++-");
}

#[test]
fn thresholds_and_objectives_are_those_of_the_settings() {
    let objectives = Objectives {
        availability: 0.1,
        join: 0.2,
        join_within: Duration::from_millis(499),
        first_speech: 0.3,
        first_speech_within: Duration::from_millis(1_499),
        reply: 0.5,
        reply_within: Duration::from_millis(2_499),
        service: 0.4,
    };
    let shares = Sli::ALL
        .iter()
        .map(|sli| format!("{:.1}", sli.objective(&objectives)));
    assert_eq!(
        shares.collect::<Vec<_>>(),
        ["0.1", "0.2", "0.3", "0.5", "0.4"]
    );
    let thresholds = Sli::ALL
        .iter()
        .map(|sli| sli.threshold(&objectives).map(|t| t.as_millis()));
    assert_eq!(
        thresholds.collect::<Vec<_>>(),
        [None, Some(499), Some(1_499), Some(2_499), None]
    );
    let report = report(Outcome::Ok, IN_TIME);
    for sli in [Sli::Join, Sli::FirstSpeech] {
        assert_eq!(sli.judge(&report, &objectives), SliVerdict::Bad);
    }
}

#[test]
fn every_turn_must_be_answered_in_time() {
    use TurnResult::{Answered, NotSent, Overlapped, Unanswered};
    let objectives = Objectives::default();
    let base = Instant::now();
    let turn = |result, delay: Option<u64>| Turn {
        caller_ended: Some(base),
        replied: delay.map(|millis| base + Duration::from_millis(millis)),
        overlap: result == Overlapped,
        result,
        ..Turn::default()
    };
    for (turns, expected) in [
        (vec![], SliVerdict::NotEligible),
        (vec![turn(NotSent, None)], SliVerdict::NotEligible),
        (vec![turn(Overlapped, Some(100))], SliVerdict::NotEligible),
        (vec![turn(Answered, Some(5_000))], SliVerdict::Good),
        (vec![turn(Answered, Some(5_001))], SliVerdict::Bad),
        (vec![turn(Unanswered, None)], SliVerdict::Bad),
        (
            vec![turn(Answered, Some(100)), turn(Overlapped, Some(100))],
            SliVerdict::Good,
        ),
        (
            vec![turn(Answered, Some(100)), turn(Unanswered, None)],
            SliVerdict::Bad,
        ),
    ] {
        let mut report = ProbeReport {
            turns: turns.clone(),
            expects_reply: true,
            ..report(Outcome::Ok, IN_TIME)
        };
        let verdict = Sli::Reply.judge(&report, &objectives);
        assert_eq!(verdict, expected, "{turns:?}");
        report.expects_reply = false;
        let verdict = Sli::Reply.judge(&report, &objectives);
        assert_eq!(verdict, SliVerdict::NotEligible);
    }
}
