use tokio::time::Instant;

use super::*;
use crate::livekit::RoomName;
use crate::probe::{Failure, LimitKind, Milestone, Position, Reason};

const SECOND: Duration = Duration::from_secs(1);

fn failed(reason: Reason) -> Outcome {
    Outcome::Failed(Failure {
        reason,
        detail: "as scripted".to_owned(),
    })
}

fn report(outcome: Outcome) -> ProbeReport {
    let room = RoomName("canary-0a1b2-1c3d4e5f6g7h8".to_owned());
    ProbeReport::new(room, Position::First, Utc::now(), outcome)
}

#[test]
fn quantiles_are_measured_delays() {
    let of = |millis: &[u64]| {
        Quantiles::of(millis.iter().copied().map(Duration::from_millis).collect())
            .map(|q| (q.p50.as_millis(), q.p90.as_millis(), q.max.as_millis()))
    };
    assert_eq!(of(&[]), None);
    assert_eq!(of(&[7]), Some((7, 7, 7)));
    assert_eq!(of(&[40, 10, 30, 20]), Some((20, 40, 40)));
    assert_eq!(of(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), Some((5, 9, 10)));
}

#[test]
fn summary_excludes_join_delays_that_are_upper_bounds() {
    let probe = |delay: Duration, join_upper_bound| {
        let mut report = report(failed(Reason::AgentSilent));
        report.join_upper_bound = join_upper_bound;
        let now = Instant::now();
        report.timeline.mark(Milestone::DispatchSent, now);
        report.timeline.mark(Milestone::AgentJoined, now + delay);
        report
    };
    let batch = BatchReport {
        batch_id: String::new(),
        target: String::new(),
        purpose: Purpose::Scheduled,
        started_at: Utc::now(),
        ended_at: Utc::now(),
        probes: vec![probe(SECOND, false), probe(9 * SECOND, true)],
        not_opened: None,
    };
    let summary = batch.summary();
    assert_eq!((summary.ok, summary.failed, summary.aborted), (0, 2, 0));
    assert_eq!(summary.join_delay.unwrap().max, SECOND);
}

#[test]
fn result_of_a_batch_follows_from_its_rooms() {
    let ok = || Outcome::Ok;
    let silent = || failed(Reason::AgentSilent);
    let limited = || failed(Reason::PlanLimit(LimitKind::Quota));
    let result = |outcomes: Vec<Outcome>| {
        let probes = outcomes.into_iter().map(report);
        sample::batch(probes.collect(), None).result()
    };
    assert_eq!(result(vec![ok(), ok()]), BatchResult::Ok);
    assert_eq!(result(vec![ok(), silent()]), BatchResult::Degraded);
    assert_eq!(result(vec![silent(), silent()]), BatchResult::Failed);
    assert_eq!(
        result(vec![ok(), silent(), limited()]),
        BatchResult::Limited
    );
    assert_eq!(
        result(vec![limited(), Outcome::Aborted]),
        BatchResult::Aborted
    );
    assert_eq!(result(Vec::new()), BatchResult::Aborted);
}
