use std::collections::BTreeMap;

use super::*;
use crate::config::Target;
use crate::livekit::RoomName;
use crate::metrics::{Build, Metrics};
use crate::probe::Outcome;
use crate::report::sample;

const START: DateTime<Utc> = DateTime::UNIX_EPOCH;

/// A detector without channels, and what shows its state.
struct Fixture {
    detector: Detector,
    history: History,
    metrics: Metrics,
    _tasks: JoinSet<()>,
}

impl Fixture {
    fn new(history: History) -> Self {
        let build = Build {
            version: "1".to_owned(),
            revision: "2".to_owned(),
            rustc: "3".to_owned(),
            engine: "4".to_owned(),
        };
        let metrics = Metrics::new(&build, false);
        let settings = Target::default();
        let project = sample::project();
        let notifier = Notifier::start_with(
            &BTreeMap::new(),
            Vec::new(),
            Arc::new(|_: &str| {}),
            metrics.clone(),
        );
        let mut tasks = JoinSet::new();
        let outputs = Outputs {
            history: history.clone(),
            metrics: metrics.target("support", &settings, &project),
            courier: Courier::start(history.clone(), notifier.clone(), &mut tasks),
            notifier,
            external_url: Some("https://canary.example.com/".parse().unwrap()),
            drill: false,
        };
        let detector = Detector::new("support", Arc::new(settings), outputs, START);
        Self {
            detector,
            history,
            metrics,
            _tasks: tasks,
        }
    }

    fn in_memory() -> Self {
        Self::new(History::in_memory(Arc::new(|| START)))
    }

    /// A room that opens and ends at these seconds.
    fn room(&self, opened: i64, ended: i64, outcome: Outcome) {
        let room = RoomName(format!("canary-{opened}-{ended}"));
        let opened_at = START + TimeDelta::seconds(opened);
        let report = ProbeReport::new(room, Position::First, opened_at, outcome);
        let ended_at = START + TimeDelta::seconds(ended);
        self.detector
            .room_at("batch", Purpose::Confirmation, &report, ended_at);
    }

    fn bad(&self, opened: i64, ended: i64) {
        let silent = sample::failed(Reason::AgentSilent, "no speech within 20 s");
        self.room(opened, ended, silent);
    }

    fn fail(&self) {
        self.room(0, 20, Outcome::Ok);
        self.bad(100, 121);
        for opened in [152, 153, 154] {
            self.bad(opened, opened + 21);
        }
        assert_eq!(self.detector.state().0, TargetState::Failing);
    }

    fn shows(&self, series: &str) -> bool {
        self.metrics.render().lines().any(|line| line == series)
    }
}

fn state(state: &str, value: u8) -> String {
    format!("livekit_canary_target_state{{state=\"{state}\",target=\"support\"}} {value}")
}

fn open(fault: &str, value: u8) -> String {
    format!("livekit_canary_incident_open{{fault=\"{fault}\",target=\"support\"}} {value}")
}

#[tokio::test]
async fn outage_opens_an_incident_and_good_rooms_end_it() {
    let fixture = Fixture::in_memory();
    fixture.fail();
    assert!(fixture.shows(&state("failing", 1)) && fixture.shows(&state("healthy", 0)));
    assert!(fixture.shows(&open("agent", 1)) && fixture.shows(&open("service", 0)));
    let id = fixture.detector.open_incident();
    assert_eq!(id.as_deref(), Some("19700101T000201Z-support"));
    for opened in 300..304 {
        fixture.room(opened, opened + 20, Outcome::Ok);
    }
    assert_eq!(fixture.detector.state().0, TargetState::Healthy);
    assert_eq!(fixture.detector.open_incident(), None);
    assert!(fixture.shows(&open("agent", 0)) && fixture.shows(&state("healthy", 1)));
}

#[tokio::test]
async fn next_run_continues_an_open_incident() {
    let first = Fixture::in_memory();
    first.fail();
    let detection = first.detector.shared.lock();
    let kept = serde_json::to_string(&detection.kept).unwrap();
    let incident = detection.incident.as_ref().unwrap();
    let document = incident.document(&incident.differences());
    drop(detection);
    assert_eq!(
        Restored::incident_of(&kept),
        first.detector.open_incident(),
        "the next run looks for this incident"
    );

    let second = Fixture::new(first.history.clone());
    assert!(
        !second.shows(&open("agent", 0)),
        "the alert would end for a moment"
    );
    second.detector.restore(Restored {
        state: Some(kept),
        incident: Some(document),
        recent: Vec::new(),
    });
    assert_eq!(second.detector.state(), first.detector.state());
    assert_eq!(
        second.detector.open_incident(),
        first.detector.open_incident()
    );
    assert!(second.shows(&open("agent", 1)));
}

#[tokio::test]
async fn paused_target_is_unknown_and_its_rooms_change_nothing() {
    let fixture = Fixture::in_memory();
    fixture.fail();
    fixture.detector.set_paused(true);
    assert_eq!(fixture.detector.state().0, TargetState::Unknown);
    assert!(fixture.shows(&open("agent", 0)));
    fixture.bad(400, 421);
    assert_eq!(fixture.detector.state().0, TargetState::Unknown);
    fixture.detector.set_paused(false);
    fixture.room(500, 520, Outcome::Ok);
    assert_eq!(fixture.detector.state().0, TargetState::Healthy);
}

#[tokio::test]
async fn target_without_a_verdict_is_unknown_and_that_is_reported_once() {
    let fixture = Fixture::in_memory();
    let silence = Duration::from_mins(40);
    let elapse = |minutes| {
        let now = START + TimeDelta::minutes(minutes);
        fixture.detector.elapse_at(silence, now);
        fixture.detector.shared.lock().kept.blind
    };
    assert_eq!(elapse(39), None);
    let never_known = elapse(40);
    assert_eq!(never_known, Some(START + TimeDelta::minutes(40)));
    assert_eq!(elapse(50), never_known, "it is reported once");
    fixture.room(3600, 3620, Outcome::Ok);
    assert_eq!(elapse(61), None);
    assert_eq!(elapse(120), Some(START + TimeDelta::minutes(120)));
}

#[tokio::test]
async fn time_between_two_runs_is_no_silence() {
    let first = Fixture::in_memory();
    first.room(0, 20, Outcome::Ok);
    let kept = serde_json::to_string(&first.detector.shared.lock().kept).unwrap();
    let second = Fixture::new(first.history.clone());
    second.detector.restore(Restored {
        state: Some(kept),
        ..Restored::default()
    });
    // The stored room is of 1970.
    second.detector.elapse(Duration::from_mins(40));
    assert_eq!(second.detector.state().0, TargetState::Healthy);
}

/// A pause is not stored, and a target that was removed may come back days later.
#[tokio::test]
async fn target_that_was_paused_in_the_last_run_has_a_full_interval_for_its_first_verdict() {
    let first = Fixture::in_memory();
    first.room(0, 20, Outcome::Ok);
    first.detector.set_paused(true);
    let second = Fixture::new(first.history.clone());
    let mut kept = first.detector.shared.lock().kept.clone();
    // It was paused in 1970.
    kept.machine.pause(START);
    second.detector.restore(Restored {
        state: Some(serde_json::to_string(&kept).unwrap()),
        ..Restored::default()
    });
    let silence = Duration::from_mins(40);
    second.detector.elapse(silence);
    assert_eq!(second.detector.shared.lock().kept.blind, None);
    let later = Utc::now() + silence;
    second.detector.elapse_at(silence, later);
    assert_eq!(second.detector.shared.lock().kept.blind, Some(later));
}

#[tokio::test]
async fn message_about_silence_names_the_last_verdict() {
    let first = Fixture::in_memory();
    let silence = Duration::from_mins(40);
    let minute = |minute| START + TimeDelta::minutes(minute);
    let names = |fixture: &Fixture, kind, at| {
        let detection = fixture.detector.shared.lock();
        let notice = fixture.detector.shared.notice(&detection, kind, at);
        (notice.began_at, notice.incident)
    };
    let id = |time: &str| format!("19700101T{time}Z-support-blind");
    first.detector.elapse_at(silence, minute(50));
    let never_known = (minute(0), id("005000"));
    assert_eq!(names(&first, NoticeKind::Blind, minute(50)), never_known);
    first.room(3580, 3600, Outcome::Ok);
    first.detector.elapse_at(silence, minute(105));
    let known = (minute(60), id("014500"));
    assert_eq!(names(&first, NoticeKind::Blind, minute(105)), known);
    let kept = serde_json::to_string(&first.detector.shared.lock().kept).unwrap();
    let second = Fixture::new(first.history.clone());
    second.detector.restore(Restored {
        state: Some(kept),
        ..Restored::default()
    });
    assert_eq!(names(&second, NoticeKind::Sighted, Utc::now()), known);
}

#[tokio::test]
async fn message_about_silence_after_a_restart_names_the_last_verdict_of_the_run_before() {
    let first = Fixture::in_memory();
    first.room(0, 20, Outcome::Ok);
    let kept = serde_json::to_string(&first.detector.shared.lock().kept).unwrap();
    let second = Fixture::new(first.history.clone());
    second.detector.restore(Restored {
        state: Some(kept),
        ..Restored::default()
    });
    let silence = Duration::from_mins(40);
    let later = Utc::now() + silence;
    second.detector.elapse_at(silence, later);
    let detection = second.detector.shared.lock();
    assert_eq!(detection.kept.blind, Some(later));
    let shared = &second.detector.shared;
    let notice = shared.notice(&detection, NoticeKind::Blind, later);
    assert_eq!(notice.began_at, START + TimeDelta::seconds(20));
}

/// `PagerDuty` ends an incident by the id that its first message had.
#[tokio::test]
async fn end_of_an_incident_whose_document_cannot_be_read_has_its_id() {
    let first = Fixture::in_memory();
    first.fail();
    let kept = serde_json::to_string(&first.detector.shared.lock().kept).unwrap();
    let second = Fixture::new(first.history.clone());
    second.detector.restore(Restored {
        state: Some(kept),
        incident: Some("[]".to_owned()),
        recent: Vec::new(),
    });
    let id = first.detector.open_incident();
    assert!(id.is_some());
    let detection = second.detector.shared.lock();
    let shared = &second.detector.shared;
    let notice = shared.notice(&detection, NoticeKind::Closed, Utc::now());
    assert_eq!(Some(notice.incident), id);
}

#[tokio::test]
async fn unreadable_state_counts_as_unknown() {
    let fixture = Fixture::in_memory();
    fixture.detector.restore(Restored {
        state: Some("{\"of\": \"another version\"}".to_owned()),
        incident: Some("[]".to_owned()),
        recent: Vec::new(),
    });
    assert_eq!(fixture.detector.state().0, TargetState::Unknown);
    assert!(fixture.shows(&state("unknown", 1)));
}

#[test]
fn outage_of_a_day_opens_a_bounded_number_of_rooms() {
    let rooms = rooms_in_a_days_outage(&Confirm::default());
    assert!((100..400).contains(&rooms), "{rooms}");
}
