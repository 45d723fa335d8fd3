use super::*;
use crate::probe::{Evidence, LimitKind, Reason};
use crate::report::sample;

/// A probe that was dispatched at once; the marks are milliseconds after that.
fn report(outcome: Outcome, marks: &[(Milestone, u64)]) -> ProbeReport {
    let dispatched = [(Milestone::DispatchSent, 0)];
    let marks = [dispatched.as_slice(), marks].concat();
    sample::probe(1, outcome, Evidence::default(), &marks)
}

fn failed(reason: Reason) -> Outcome {
    sample::failed(reason, "as scripted")
}

/// What each of [`Sli::ALL`] makes of it, with the default thresholds of 5 s and 8 s: `+` good, `-` bad, `.` not
/// counted.
fn verdicts(report: &ProbeReport) -> String {
    let objectives = Objectives::default();
    let verdicts = Sli::ALL.map(|sli| match sli.judge(report, &objectives) {
        Verdict::Good => '+',
        Verdict::Bad => '-',
        Verdict::NotEligible => '.',
    });
    verdicts.iter().collect()
}

const IN_TIME: &[(Milestone, u64)] = &[
    (Milestone::AgentJoined, 500),
    (Milestone::AgentSpoke, 1_500),
];

#[test]
fn every_reason_counts_in_the_service_levels_that_its_origin_concerns() {
    let expected = [
        ("agent_no_show", "-++-"),
        ("dispatch_unanswered", "-++-"),
        ("agent_no_track", "-++-"),
        ("agent_silent", "-++-"),
        ("agent_no_reply", "-++-"),
        ("agent_left_early", "-++-"),
        ("agent_duplicate", "-++-"),
        ("room_create_failed", "...-"),
        ("dispatch_failed", "...-"),
        ("signal_failed", "...-"),
        ("signal_lost", "...-"),
        ("publish_failed", "...-"),
        ("unreachable", "...-"),
        ("media_failed", "...-"),
        ("removed", "...."),
        ("plan_limit", "...-"),
        ("auth_rejected", "...."),
        ("config_rejected", "...."),
        ("internal", "...."),
    ];
    // Also where the marks don't go with the reason: it is the outcome that says in what a probe counts.
    let seen = Reason::ALL.map(|reason| {
        let verdicts = verdicts(&report(failed(reason), IN_TIME));
        (reason.label(), verdicts)
    });
    let expected = expected.map(|(reason, verdicts)| (reason, verdicts.to_owned()));
    assert_eq!(seen, expected);
}

#[test]
fn nothing_that_was_missed_is_good() {
    for reason in Reason::ALL {
        let verdicts = verdicts(&report(failed(reason), &[]));
        assert!(!verdicts.contains('+'), "{}: {verdicts}", reason.label());
    }
    for kind in LimitKind::ALL {
        let limited = report(failed(Reason::PlanLimit(kind)), IN_TIME);
        assert_eq!(verdicts(&limited), "...-");
    }
}

#[test]
fn probe_that_is_ok_counts_everywhere_and_an_aborted_one_nowhere() {
    assert_eq!(verdicts(&report(Outcome::Ok, IN_TIME)), "++++");
    assert_eq!(verdicts(&report(Outcome::Aborted, IN_TIME)), "....");
    assert_eq!(verdicts(&report(Outcome::Aborted, &[])), "....");
}

#[test]
fn agent_that_is_late_is_bad_in_what_it_is_late_for_alone() {
    let at = |joined, spoke| {
        let marks = [
            (Milestone::AgentJoined, joined),
            (Milestone::AgentSpoke, spoke),
        ];
        verdicts(&report(Outcome::Ok, &marks))
    };
    assert_eq!(at(5_000, 8_000), "++++");
    assert_eq!(at(5_001, 8_000), "+-++");
    assert_eq!(at(5_000, 8_001), "++-+");
    assert_eq!(at(6_000, 9_000), "+--+");
}

#[test]
fn good_join_stays_good_whatever_comes_later() {
    let silent = report(
        failed(Reason::AgentSilent),
        &[(Milestone::AgentJoined, 500)],
    );
    assert_eq!(verdicts(&silent), "-+--");
    let left = report(failed(Reason::AgentLeftEarly), IN_TIME);
    assert_eq!(verdicts(&left), "-++-");
    let never = report(failed(Reason::DispatchUnanswered), &[]);
    assert_eq!(verdicts(&never), "----");
}

#[test]
fn upper_bound_proves_an_agent_in_time_and_never_late() {
    let bound = |joined| {
        let marks = [
            (Milestone::AgentJoined, joined),
            (Milestone::AgentSpoke, 7_000),
        ];
        let mut report = report(Outcome::Ok, &marks);
        report.join_upper_bound = true;
        verdicts(&report)
    };
    assert_eq!(bound(5_000), "++++");
    assert_eq!(bound(5_001), "+.++");
}

#[test]
fn agent_that_was_there_before_its_dispatch_was_in_time() {
    let marks = [
        (Milestone::AgentJoined, 100),
        (Milestone::AgentSpoke, 200),
        (Milestone::DispatchSent, 300),
    ];
    let early = sample::probe(1, Outcome::Ok, Evidence::default(), &marks);
    assert_eq!(verdicts(&early), "++++");
    let undispatched = sample::probe(
        1,
        failed(Reason::AgentLeftEarly),
        Evidence::default(),
        IN_TIME,
    );
    assert_eq!(verdicts(&undispatched), "-++-");
}

#[test]
fn thresholds_and_objectives_are_those_of_the_settings() {
    let objectives = Objectives {
        availability: 0.1,
        join: 0.2,
        join_within: Duration::from_millis(499),
        first_speech: 0.3,
        first_speech_within: Duration::from_millis(1_499),
        service: 0.4,
    };
    let shares = Sli::ALL.map(|sli| format!("{:.1}", sli.objective(&objectives)));
    assert_eq!(shares, ["0.1", "0.2", "0.3", "0.4"]);
    let thresholds = Sli::ALL.map(|sli| sli.threshold(&objectives).map(|t| t.as_millis()));
    assert_eq!(thresholds, [None, Some(499), Some(1_499), None]);
    let report = report(Outcome::Ok, IN_TIME);
    for sli in [Sli::Join, Sli::FirstSpeech] {
        assert_eq!(sli.judge(&report, &objectives), Verdict::Bad);
    }
}
