use chrono::TimeDelta;
use serde_json::{Value, json};

use super::*;
use crate::config::Target;
use crate::report::json::render;
use crate::report::sample::{mixed, project};

/// A name that would run a script, leave its attribute, and turn the direction of the text around.
const HOSTILE: &str = "<script>alert(\"'&\u{202e}";

fn now() -> DateTime<Utc> {
    mixed().ended_at + TimeDelta::minutes(22)
}

fn batch_document() -> Value {
    serde_json::from_str(&render(&mixed(), &Target::default(), &project())).unwrap()
}

fn probe_document(index: usize) -> Value {
    let mut probe = batch_document()["probes"][index].clone();
    probe["batch_id"] = "b-1".into();
    probe["target"] = "support".into();
    probe
}

fn sample(room: &str, failed: bool, worker: &str) -> Value {
    json!({
        "room": room, "batch_id": "b-1", "purpose": "scheduled", "position": "first",
        "opened_at": mixed().started_at, "ended_at": mixed().ended_at,
        "outcome": if failed { "failed" } else { "ok" },
        "reason": failed.then_some("agent_silent"), "origin": failed.then_some("agent"),
        "failed": failed, "node": "ND_1", "region": null, "worker": worker, "media_path": "udp", "agent_version": null
    })
}

fn incident_document() -> Value {
    json!({
        "id": "i-1", "target": "support", "project": "acme", "fault": "agent", "dispatch": "api",
        "began_at": mixed().started_at, "opened_at": mixed().ended_at, "ended_at": null, "ended_by": null,
        "rooms": 3, "failed": 3, "reasons": [{"reason": "agent_silent", "rooms": 3}],
        "samples": [sample("room-bad", true, "AW_new")], "before": [sample("room-good", false, "AW_old")],
        "differs": [{"sentence": "all 3 failed rooms have worker AW_new, and none of the 9 rooms before had it"}]
    })
}

/// Puts `text` in place of every string of the document, but not of times, and keeps what decides how it is shown.
fn with_every_text(document: &mut Value, text: &str) {
    match document {
        Value::String(value) if value.parse::<DateTime<Utc>>().is_err() => *value = text.to_owned(),
        Value::Array(values) => values
            .iter_mut()
            .for_each(|value| with_every_text(value, text)),
        Value::Object(values) => values
            .values_mut()
            .for_each(|value| with_every_text(value, text)),
        _ => {}
    }
}

fn incident_page(document: Value, bad: Option<Value>) -> String {
    let sides = Sides {
        good: None,
        bad: bad.map(|probe| serde_json::from_value(probe).unwrap()),
    };
    incident::render(&serde_json::from_value(document).unwrap(), &sides, now())
}

fn pages(change: impl Fn(&mut Value)) -> Vec<(&'static str, String)> {
    let changed = |mut document: Value| {
        change(&mut document);
        document
    };
    let batch: BatchDocument = serde_json::from_value(changed(batch_document())).unwrap();
    let probe = |index| {
        let probe: ProbeDocument = serde_json::from_value(changed(probe_document(index))).unwrap();
        probe::render(&probe, now())
    };
    let bad = changed(probe_document(1));
    vec![
        ("batch", batch::render(&batch, now())),
        ("ok", probe(0)),
        ("failed", probe(1)),
        (
            "incident",
            incident_page(changed(incident_document()), Some(bad)),
        ),
    ]
}

#[test]
fn every_page_shows_its_verdict_first_and_in_the_title() {
    let verdicts = [
        "support: batch limited",
        "support: room ok",
        "support: room ",
        "support FAILS: agent_silent, 3 of 3 rooms, since 2026-09-21 14:13:20 UTC (22 min); last ok",
    ];
    for ((name, page), verdict) in pages(|_| {}).iter().zip(verdicts) {
        let (_, title) = page.split_once("<title>").unwrap();
        assert!(title.starts_with(verdict), "{name}: {page}");
        let (_, heading) = page.split_once("<h1").unwrap();
        let (_, heading) = heading.split_once('>').unwrap();
        assert!(heading.starts_with(verdict), "{name}: {page}");
    }
}

#[test]
fn no_text_of_a_document_becomes_markup() {
    for (name, page) in pages(|document| with_every_text(document, HOSTILE)) {
        assert!(
            page.contains("&lt;script&gt;alert(&quot;"),
            "{name}: {page}"
        );
        assert!(!page.contains("<script>"), "{name}: {page}");
    }
}

#[test]
fn pages_link_to_each_other_and_to_no_other_host_but_livekit_cloud() {
    let pages = pages(|_| {});
    for (name, page) in &pages {
        let links = page.split("href=\"").skip(1);
        for link in links.map(|link| link.split('"').next().unwrap()) {
            let allowed = link.starts_with("../") || link.starts_with("https://cloud.livekit.io/");
            assert!(allowed, "{name}: {link}");
        }
    }
    let rooms = batch_document()["probes"].as_array().unwrap().clone();
    for room in rooms {
        let link = format!("href=\"../probes/{}\"", room["room"].as_str().unwrap());
        assert!(pages[0].1.contains(&link), "{link}");
    }
    assert!(pages[1].1.contains("href=\"../batches/b-1\""));
    for link in [
        "../probes/room-bad",
        "../probes/room-good",
        "../batches/b-1",
    ] {
        assert!(pages[3].1.contains(&format!("href=\"{link}\"")), "{link}");
    }
}

#[test]
fn incident_marks_what_differs_between_the_last_good_and_the_first_bad_room() {
    let page = incident_page(incident_document(), None);
    assert!(page.contains("<td>AW_old</td>"), "{page}");
    assert!(
        page.contains("<strong><bdi>AW_new</bdi></strong> (differs)"),
        "{page}"
    );
    assert!(!page.contains("<strong><bdi>ND_1"), "{page}");
}

#[test]
fn probe_draws_who_spoke_when() {
    let page = probe::render(&serde_json::from_value(probe_document(0)).unwrap(), now());
    for label in [
        "the agent speaks from 1.000 s to 3.000 s",
        "the caller speaks from 4.000 s to 6.000 s",
        "the agent speaks from 7.250 s to 9.000 s",
    ] {
        assert!(page.contains(&format!("<title>{label}</title>")), "{page}");
    }
}

#[test]
fn probe_offers_its_recording_and_draws_how_loud_each_side_was() {
    let mut document = probe_document(0);
    document["recording"] =
        json!({"started": 0.5, "agent": {"bytes": 61_000, "seconds": 15.95}, "caller": null});
    document["waveform"] =
        json!({"started": 0.5, "step_seconds": 0.1, "agent": [0, 100], "caller": null});
    let room = document["room"].as_str().unwrap().to_owned();
    let page = probe::render(&serde_json::from_value(document).unwrap(), now());
    let audio = |side: &str| format!("src=\"../api/v1/probes/{room}/audio/{side}.ogg\"");
    assert!(page.contains(&audio("agent")), "{page}");
    assert!(!page.contains(&audio("caller")), "{page}");
    assert!(
        page.contains("d=\"M0.5 .5L0.50 0.500L0.60 0.000L0.60 1.000L0.50 0.500Z\""),
        "{page}"
    );
    let mut document = probe_document(0);
    document["recording"] = Value::Null;
    document["waveform"] = Value::Null;
    let without = probe::render(&serde_json::from_value(document).unwrap(), now());
    assert!(
        !without.contains("<audio") && !without.contains("<path"),
        "{without}"
    );
}

#[test]
fn failed_room_shows_what_its_reason_means_and_what_to_do() {
    let mut document = probe_document(1);
    document["reason"] = "agent_silent".into();
    let page = probe::render(&serde_json::from_value(document).unwrap(), now());
    assert!(
        page.contains("<b>What to do: </b>Make the agent speak first"),
        "{page}"
    );
    assert!(
        page.contains("href=\"../docs/reasons#agent_silent\""),
        "{page}"
    );
}

#[test]
fn fields_of_a_filter_that_were_left_empty_are_no_filter() {
    let query = |query: &str| list::query_of(&query.parse().unwrap()).to_string();
    assert_eq!(
        query("/probes?target=&reason=agent_silent&node="),
        "/probes?reason=agent_silent"
    );
    assert_eq!(query("/probes"), "/probes?");
    assert_eq!(
        query("/probes?since=2026-09-21T14%3A00%3A00Z"),
        "/probes?since=2026-09-21T14%3A00%3A00Z"
    );
}

#[test]
fn list_keeps_its_filters_in_the_form_and_in_the_address_of_the_next_page() {
    let query = "/probes?outcome=failed".parse().unwrap();
    let list = List {
        targets: vec!["support", HOSTILE],
        query: &query,
        next: Some("1234.canary-b".to_owned()),
        now: now(),
    };
    let probes = [serde_json::from_value(probe_document(1)).unwrap()];
    let page = list::probes(&probes, &list);
    assert!(
        page.contains("<option value=\"failed\" selected>failed</option>"),
        "{page}"
    );
    assert!(
        page.contains("href=\"probes?outcome=failed&amp;before=1234.canary-b\""),
        "{page}"
    );
    assert!(
        page.contains("href=\"api/v1/probes?outcome=failed&amp;format=csv\""),
        "{page}"
    );
    assert!(!page.contains("<script>"), "{page}");
}

/// A value between two gaps is a line, too.
#[test]
fn plot_interrupts_its_line_at_a_gap_and_draws_the_objective() {
    let line = figure::Line {
        class: "p50",
        values: vec![Some(1.0), Some(2.0), None, Some(1.0)],
    };
    let plot = figure::plot("Join delay", &[line], Some(4.0)).into_string();
    assert!(
        plot.contains("d=\"M0 0.773H1L1 0.545H2M3 0.773H4\""),
        "{plot}"
    );
    assert!(plot.contains("the objective, 4.0 s"), "{plot}");
    let gaps = figure::Line {
        class: "p50",
        values: vec![None; 3],
    };
    assert_eq!(figure::plot("Join delay", &[gaps], None).into_string(), "");
}
