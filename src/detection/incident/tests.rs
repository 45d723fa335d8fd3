use std::time::Duration;

use serde_json::Value;

use super::*;
use crate::livekit::RoomName;
use crate::probe::{LimitKind, Outcome, Position, Reason};
use crate::report::sample::{self, assert_same_keys};

fn at(seconds: u64) -> DateTime<Utc> {
    DateTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000 + seconds)
}

fn failed(reason: Reason) -> Outcome {
    sample::failed(reason, "as scripted")
}

/// A room that opens at this second and lasts 20 s.
fn sample(second: u64, worker: &str, outcome: Outcome) -> Sample {
    let room = RoomName(format!("canary-0a1b2-{second}"));
    let mut report = ProbeReport::new(room, Position::First, at(second), outcome);
    report.circumstances = Circumstances {
        node: Some("ND_a".to_owned()),
        region: Some("eu".to_owned()),
        worker: Some(worker.to_owned()),
        media_path: Some(crate::livekit::event::MediaPath::Udp),
        agent_version: None,
    };
    let batch = format!("batch-{second}");
    Sample::of(&batch, Purpose::Confirmation, &report, at(second + 20))
}

fn incident() -> Incident {
    let head = IncidentHead {
        id: "20260921T141320-0a1b2-c3d4".to_owned(),
        target: "support".to_owned(),
        project: "main".to_owned(),
        fault: Fault::Agent,
        dispatch: "explicit".to_owned(),
        began_at: at(20),
        opened_at: at(80),
    };
    let before = (0..40).map(|second| sample(second, "AW_b", Outcome::Ok));
    Incident::new(head, before.collect())
}

fn rendered(incident: &Incident) -> String {
    incident.document(&incident.differences())
}

/// One of two workers fails.
fn mixed() -> Incident {
    let mut incident = incident();
    for second in 100..106 {
        incident.add(sample(second, "AW_a", failed(Reason::AgentSilent)));
        incident.add(sample(second + 50, "AW_b", Outcome::Ok));
    }
    incident.add(sample(180, "AW_b", Outcome::Ok));
    incident
}

#[test]
fn document_has_the_shape_that_the_docs_show() {
    let docs = include_str!("../../../docs/api.md");
    let (_, section) = docs.split_once("\n### The incident\n").unwrap();
    let (_, after) = section.split_once("```json\n").unwrap();
    let (example, _) = after.split_once("```").unwrap();
    let example: Value = serde_json::from_str(example).unwrap();
    let mut ended = mixed();
    ended.end(at(400), EndedBy::Recovered);
    let real: Value = serde_json::from_str(&rendered(&ended)).unwrap();
    assert_same_keys(&example, &real, "");
}

#[test]
fn document_has_figures_of_the_rooms_and_what_differs() {
    let mut incident = mixed();
    incident.end(at(400), EndedBy::Recovered);
    let document: Value = serde_json::from_str(&rendered(&incident)).unwrap();
    assert_eq!(document["state"], "ended");
    assert_eq!(document["ended_by"], "recovered");
    assert_eq!(document["duration_seconds"], 380.0);
    assert_eq!(
        (&document["rooms"], &document["failed"]),
        (&13.into(), &6.into())
    );
    assert_eq!(document["batches"], 13);
    assert_eq!(document["reasons"][0]["reason"], "agent_silent");
    assert_eq!(document["workers"][0]["value"], "AW_b");
    assert_eq!(document["workers"][1]["failed"], 6);
    let sentence = "worker AW_a fails in 6 of 6 rooms, all others in 0 of 7 (p = 0.0006)";
    assert_eq!(document["differs"][0]["sentence"], sentence);
    assert_eq!(document["before"].as_array().unwrap().len(), MAX_BEFORE);
}

#[test]
fn open_incident_has_neither_an_end_nor_a_duration() {
    let document: Value = serde_json::from_str(&rendered(&mixed())).unwrap();
    assert_eq!(document["state"], "open");
    for key in ["ended_at", "ended_by", "duration_seconds"] {
        assert_eq!(document[key], Value::Null, "{key}");
    }
    let empty: Value = serde_json::from_str(&rendered(&incident())).unwrap();
    assert_eq!(empty["share"], Value::Null);
}

#[test]
fn incident_is_read_back_as_it_was_written() {
    let mut incident = mixed();
    incident.end(at(400), EndedBy::Paused);
    let read = Incident::from_document(&rendered(&incident)).unwrap();
    assert_eq!(read, incident);
    let mut reopened = read;
    reopened.reopen();
    assert_eq!(reopened, mixed());
    assert!(Incident::from_document("{}").is_err());
}

#[test]
fn batch_counts_once_also_in_a_document_of_an_older_version() {
    let mut incident = incident();
    for (second, batch) in [(1, "one"), (2, "two"), (3, "one"), (4, "two")] {
        let mut room = sample(second, "AW_a", failed(Reason::AgentSilent));
        room.batch_id = batch.to_owned();
        incident.add(room);
    }
    let mut document: Value = serde_json::from_str(&rendered(&incident)).unwrap();
    assert_eq!(document["batches"], 2);
    document.as_object_mut().unwrap().remove("batches");
    let read = Incident::from_document(&document.to_string()).unwrap();
    assert_eq!(read, incident);
}

#[test]
fn room_without_a_verdict_is_kept_and_not_counted() {
    let mut incident = mixed();
    let limit = Reason::PlanLimit(LimitKind::Quota);
    incident.add(sample(200, "AW_c", failed(limit)));
    incident.add(sample(201, "AW_c", Outcome::Aborted));
    assert_eq!((incident.rooms(), incident.failed()), (13, 6));
    assert_eq!(incident.batches, 13);
    assert_eq!(incident.samples().len(), 15);
    assert_eq!(incident.reasons().len(), 1);
    assert!(incident.has("canary-0a1b2-201"));
}

#[test]
fn reasons_are_in_the_order_of_their_frequency() {
    let mut incident = incident();
    incident.add(sample(1, "AW_a", failed(Reason::AgentNoShow)));
    for second in 2..4 {
        incident.add(sample(second, "AW_a", failed(Reason::AgentSilent)));
    }
    let reasons = incident
        .reasons()
        .iter()
        .map(|one| (&*one.reason, one.rooms));
    assert_eq!(
        reasons.collect::<Vec<_>>(),
        [("agent_silent", 2), ("agent_no_show", 1)]
    );
}

#[test]
fn long_incident_keeps_its_first_and_last_rooms_and_counts_all() {
    let mut incident = incident();
    let rooms = 2500;
    for second in 0..rooms {
        incident.add(sample(second, "AW_a", failed(Reason::AgentSilent)));
    }
    assert_eq!(u64::from(incident.rooms()), rooms);
    let seconds: Vec<_> = incident
        .samples()
        .iter()
        .map(|sample| (sample.opened_at - at(0)).num_seconds())
        .collect();
    assert_eq!(seconds.len(), MAX_SAMPLES);
    assert_eq!((seconds[0], seconds[999]), (0, 999));
    assert_eq!((seconds[1000], seconds[1999]), (1500, 2499));
}
