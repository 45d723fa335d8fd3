//! The result of a batch as `JUnit` XML, for a CI system's test report: one test case per room.
//!
//! A failure that makes `once` exit with status 1 is a JUnit failure: it blames the agent. Every other failure is a JUnit
//! error: it does not blame the deploy.

use quick_junit::{NonSuccessKind, Property, Report, TestCase, TestCaseStatus, TestSuite};

use super::Exit;
use super::format::{evidence, printable, reason};
use crate::config::{Project, Target};
use crate::probe::{Failure, Outcome, ProbeReport, Span, Turn};
use crate::report::BatchReport;
use crate::report::json::session_url;

/// Returns an XML document that ends with a newline.
pub(super) fn render(batch: &BatchReport, target: &Target, project: &Project) -> String {
    let took = (batch.ended_at - batch.started_at).to_std();
    let mut suite = TestSuite::new(batch.target.as_str());
    suite.set_timestamp(batch.started_at);
    suite.add_properties(properties(batch, target));
    let opened = batch.probes.len();
    for (index, probe) in batch.probes.iter().enumerate() {
        suite.add_test_case(room(index, batch, probe, project));
    }
    if let Some(rest) = &batch.not_opened {
        for index in opened..opened + rest.rooms {
            let mut skipped = TestCaseStatus::skipped();
            skipped.set_message(format!("did not open: {}", printable(&rest.why)));
            suite.add_test_case(case(index, batch, skipped));
        }
    }
    let mut report = Report::new("livekit-canary");
    report.set_timestamp(batch.started_at);
    // If the wall clock was set back during the batch, its duration is unknown.
    if let Ok(took) = took {
        suite.set_time(took);
        report.set_time(took);
    }
    report.add_test_suite(suite);
    report
        .to_string()
        .expect("writing to a string cannot fail, and the crate drops what XML forbids")
}

fn properties(batch: &BatchReport, target: &Target) -> Vec<Property> {
    let mut properties = vec![
        Property::new("batch_id", batch.batch_id.as_str()),
        Property::new("ramp", target.batch.ramp.name()),
        Property::new("dispatch", target.dispatch.mode.name()),
    ];
    if let Some(name) = &target.agent_name {
        properties.push(Property::new("agent_name", name.as_str()));
    }
    if let Some(deployment) = target.dispatch.named_deployment() {
        properties.push(Property::new("deployment", deployment));
    }
    if let Some(delays) = batch.summary().join_delay {
        let quantiles = [
            ("p50", delays.p50),
            ("p90", delays.p90),
            ("max", delays.max),
        ];
        properties.extend(
            quantiles.map(|(name, delay)| seconds(&format!("join_delay_{name}_seconds"), delay)),
        );
    }
    properties
}

/// A CI system follows a test from run to run by its name. So the name is the room's place in the batch: the name of a
/// room is never used again.
fn case(index: usize, batch: &BatchReport, status: TestCaseStatus) -> TestCase {
    let mut case = TestCase::new(format!("room {}", index + 1), status);
    case.set_classname(format!("livekit-canary.{}", batch.target));
    case
}

fn room(index: usize, batch: &BatchReport, probe: &ProbeReport, project: &Project) -> TestCase {
    let report = probe;
    let mut case = case(index, batch, status(probe));
    case.set_timestamp(probe.started_at);
    let marks = report.timeline.marks();
    if let Some(took) = marks
        .filter_map(|(milestone, _)| report.timeline.since_started(milestone))
        .max()
    {
        case.set_time(took);
    }
    case.add_property(("room", report.room.0.as_str()));
    if let Some(url) = session_url(report, project) {
        case.add_property(("session", url.as_str()));
    }
    if let Some(delay) = report.timeline.span(Span::AgentJoin) {
        case.add_property(seconds("join_delay_seconds", delay));
        if report.join_upper_bound {
            case.add_property(("join_upper_bound", "true"));
        }
    }
    let speech = report.timeline.span(Span::FirstSpeech);
    let reply = report.turns.iter().find_map(Turn::reply_delay);
    for (name, delay) in [
        ("first_speech_delay_seconds", speech),
        ("reply_delay_seconds", reply),
    ] {
        if let Some(delay) = delay {
            case.add_property(seconds(name, delay));
        }
    }
    case
}

fn status(probe: &ProbeReport) -> TestCaseStatus {
    let outcome = &probe.outcome;
    match outcome {
        Outcome::Ok => TestCaseStatus::success(),
        Outcome::Aborted => {
            let mut skipped = TestCaseStatus::skipped();
            skipped.set_message("aborted");
            skipped
        }
        Outcome::Failed(failure) => {
            let kind = match Exit::of(outcome) {
                Exit::Agent => NonSuccessKind::Failure,
                _ => NonSuccessKind::Error,
            };
            failed(kind, failure, probe)
        }
    }
}

fn failed(kind: NonSuccessKind, failure: &Failure, probe: &ProbeReport) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(kind);
    let detail = printable(&failure.detail);
    let origin = failure.reason.origin().label();
    let mut lines = vec![
        format!("{} (origin: {origin})", reason(failure.reason)),
        detail.clone(),
    ];
    lines.extend(evidence(&probe.evidence));
    status
        .set_type(failure.reason.label())
        .set_message(detail)
        .set_description(lines.join("\n"));
    status
}

fn seconds(name: &str, duration: std::time::Duration) -> Property {
    Property::new(name, format!("{:.3}", duration.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::probe::{Evidence, LimitKind, Reason};
    use crate::report::sample::{WELL, batch, failed, mixed, probe, project};

    fn rendered(batch: &BatchReport) -> String {
        let target = Target {
            agent_name: Some("my-agent".to_owned()),
            ..Target::default()
        };
        render(batch, &target, &project())
    }

    #[test]
    fn every_room_is_a_test_case_and_one_that_did_not_open_is_skipped() {
        let mut batch = mixed();
        batch
            .probes
            .push(probe(5, Outcome::Aborted, Evidence::default(), &WELL[..4]));
        batch.probes[0].join_upper_bound = true;
        assert_snapshot!(rendered(&batch));
    }

    #[test]
    fn deployment_is_a_property_if_one_was_dispatched() {
        let mut target = Target::default();
        let has_deployment =
            |target: &Target| render(&mixed(), target, &project()).contains("name=\"deployment\"");
        assert!(!has_deployment(&target));
        target.dispatch.deployment = "staging".to_owned();
        assert!(has_deployment(&target));
    }

    #[test]
    fn only_a_reason_that_makes_once_exit_with_1_is_a_failure() {
        for reason in Reason::ALL {
            let outcome = failed(reason, "as scripted");
            let blamed = Exit::of(&outcome) == Exit::Agent;
            let text = rendered(&batch(
                vec![probe(1, outcome, Evidence::default(), &[])],
                None,
            ));
            let element = if blamed { "<failure " } else { "<error " };
            assert!(text.contains(element), "{text}");
            let counts = format!("failures=\"{}\"", u8::from(blamed));
            assert!(text.contains(&counts), "{text}");
        }
        let limit = failed(Reason::PlanLimit(LimitKind::Node), "");
        assert!(Exit::of(&limit) != Exit::Agent);
    }

    #[test]
    fn text_of_a_server_stays_text() {
        let text_of_server = "</failure>&\"'<![CDATA[ ]]> \u{0}\u{1b}[31m\u{fffe}";
        let evidence = Evidence {
            answer: Some(text_of_server.to_owned()),
            ..Evidence::default()
        };
        let rooms = vec![probe(
            1,
            failed(Reason::AgentSilent, text_of_server),
            evidence,
            WELL,
        )];
        let text = rendered(&batch(rooms, None));
        assert_eq!(text.matches("</failure>").count(), 1, "{text}");
        assert!(!text.contains(['\u{0}', '\u{1b}', '\u{fffe}']), "{text}");
        let read_back = Report::deserialize_from_str(&text).unwrap();
        assert_eq!((read_back.tests, read_back.failures), (1, 1));
    }
}
