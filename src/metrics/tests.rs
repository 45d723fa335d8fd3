//! What `/metrics` shows. The catalogue is a contract, and every series of it exists from the start.

#![expect(
    clippy::float_cmp,
    reason = "a value is printed and parsed without loss"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::config::{
    Backoff, Budget, CallerMode, DispatchMode, Ice, Objectives, Period, Project, Target,
};
use crate::livekit::RoomName;
use crate::livekit::event::AudioStats;
use crate::metrics::{
    Build, CATALOGUE, Definition, IncidentInfo, InternalError, MetricKind, Metrics, PREFIX,
    SkipCause, Sli, SliVerdict, TargetMetrics,
};
use crate::probe::{
    AgentStage, Circumstances, Evidence, Failure, LimitKind, MediaConnection, MediaPath, Milestone,
    Outcome, Position, ProbeReport, Reason, Timeline, Turn, TurnResult, TurnStages,
};
use crate::report::{BatchReport, BatchResult, Fault, Purpose, TargetState};
use chrono::{DateTime, TimeDelta, Utc};
use support::scrape::{Family, Sample, Scrape};
use tokio::time::Instant;

fn metrics() -> Metrics {
    Metrics::new(&build(), false)
}

fn build() -> Build {
    Build {
        version: "0.1.0".to_owned(),
        revision: "0a1b2c3".to_owned(),
        rustc: "1.95.0".to_owned(),
        engine: "native".to_owned(),
    }
}

fn project() -> Project {
    Project {
        url: "wss://acme.livekit.cloud".parse().unwrap(),
        api_key: "the-key".into(),
        api_secret: "the-secret".to_owned().into(),
        credential_files: crate::config::CredentialFiles::default(),
        ca_file: None,
        cloud_project: None,
        ice: Ice::default(),
        api_timeout: Project::DEFAULT_API_TIMEOUT,
        max_rooms: Project::DEFAULT_MAX_ROOMS,
        budget: Budget::default(),
        backoff: Backoff::default(),
    }
}

fn target() -> Target {
    Target {
        project: "acme".to_owned(),
        agent_name: Some("my-agent".to_owned()),
        ..Target::default()
    }
}

/// Metrics with one project, one target and one channel.
fn with_a_target() -> (Metrics, TargetMetrics) {
    let metrics = metrics();
    metrics.project("acme", &project());
    metrics.channel("team");
    let support = metrics.target("support", &target(), &project());
    (metrics, support)
}

/// A good probe.
fn report() -> ProbeReport {
    let base = Instant::now();
    let at = |millis| base + Duration::from_millis(millis);
    let mut timeline = Timeline::default();
    for (milestone, millis) in [
        (Milestone::Started, 0),
        (Milestone::RoomCreated, 50),
        (Milestone::SignalConnected, 150),
        (Milestone::MediaConnected, 400),
        (Milestone::CallerPublished, 350),
        (Milestone::DispatchSent, 400),
        (Milestone::DispatchAccepted, 425),
        (Milestone::AgentJoined, 1_150),
        (Milestone::AgentTrackSubscribed, 1_250),
        (Milestone::AgentFirstAudio, 1_275),
        (Milestone::AgentSpoke, 2_400),
        (Milestone::Left, 62_000),
        (Milestone::RoomDeleted, 62_500),
    ] {
        timeline.mark(milestone, at(millis));
    }
    let turn = |caller_ended, replied| Turn {
        caller_ended: Some(at(caller_ended)),
        replied: Some(at(replied)),
        result: TurnResult::Answered,
        ..Turn::default()
    };
    ProbeReport {
        room: RoomName("canary-0a1b2-1c3d4e5f6g7h8".to_owned()),
        room_sid: None,
        position: Position::First,
        outcome: Outcome::Ok,
        evidence: Evidence::default(),
        timeline,
        expects_reply: true,
        turns: vec![turn(10_000, 11_250), turn(20_000, 22_500)],
        transcript: None,
        agent: None,
        other_agents: 0,
        audio: AudioStats {
            packets: 900,
            lost: 3,
            jitter: Some(Duration::from_millis(4)),
        },
        join_upper_bound: false,
        circumstances: Circumstances::default(),
        recording: None,
        waveform: None,
        started_at: moment(),
    }
}

fn failed(reason: Reason) -> Outcome {
    Outcome::Failed(Failure {
        reason,
        detail: "scripted".to_owned(),
    })
}

/// A probe that failed before it measured anything.
fn failed_at_once(reason: Reason) -> ProbeReport {
    ProbeReport {
        outcome: failed(reason),
        timeline: Timeline::default(),
        turns: Vec::new(),
        audio: AudioStats::default(),
        ..report()
    }
}

fn batch(outcomes: impl IntoIterator<Item = Outcome>) -> BatchReport {
    let probes = outcomes.into_iter().map(|outcome| ProbeReport {
        outcome,
        ..report()
    });
    BatchReport {
        batch_id: "20260921T141320-0a1b2-c3d4".to_owned(),
        target: "support".to_owned(),
        purpose: Purpose::Scheduled,
        started_at: moment(),
        ended_at: moment() + TimeDelta::seconds(40),
        probes: probes.collect(),
        not_opened: None,
    }
}

fn moment() -> DateTime<Utc> {
    DateTime::from_timestamp(1_790_000_000, 250_000_000).unwrap()
}

fn scraped(metrics: &Metrics) -> Scrape {
    Scrape::parse(&metrics.render()).unwrap()
}

/// The value of the only series with this name and these labels.
fn value_of(scrape: &Scrape, name: &str, labels: &[(&str, &str)]) -> f64 {
    scrape.value(name, labels).unwrap()
}

/// The sum over the series with this name and these labels.
fn sum_of(scrape: &Scrape, name: &str, labels: &[(&str, &str)]) -> f64 {
    scrape.sum(name, labels).unwrap()
}

/// The series of a family. Of a histogram, only the count.
fn series<'a>(scrape: &'a Scrape, family: &str) -> impl Iterator<Item = &'a Sample> {
    let name = format!("{PREFIX}_{family}");
    let count = format!("{name}_count");
    let samples = scrape.samples.iter();
    samples.filter(move |sample| sample.name == name || sample.name == count)
}

/// The label values of a family's series in the order of the catalogue, without `target` and `project`.
fn label_values<'a>(scrape: &'a Scrape, family: &str) -> BTreeSet<Vec<&'a str>> {
    let definition = CATALOGUE.iter().find(|one| one.name == family).unwrap();
    let labels = definition
        .labels
        .iter()
        .filter(|label| !["target", "project"].contains(*label));
    series(scrape, family)
        .map(|sample| {
            let values = labels.clone().map(|label| sample.labels[*label].as_str());
            values.collect()
        })
        .collect()
}

/// The values of a label over all series.
fn values_of<'a>(scrape: &'a Scrape, label: &str) -> BTreeSet<&'a str> {
    let values = scrape.samples.iter().map(|sample| sample.labels.get(label));
    values.flatten().map(String::as_str).collect()
}

/// The sum over a family's series. Of a histogram, the sum of the counts.
fn total(scrape: &Scrape, family: &str) -> f64 {
    let values = series(scrape, family).map(Sample::number);
    values.sum::<anyhow::Result<f64>>().unwrap()
}

fn incident() -> IncidentInfo {
    IncidentInfo {
        incident: "20260921T141320Z-support".to_owned(),
        reason: Some("agent_silent".to_owned()),
        failed: 5,
        rooms: 6,
        differs: String::new(),
        url: None,
    }
}

/// The information about an incident is the only family that has no series until there is one.
#[test]
fn every_family_of_the_catalogue_exists_before_the_first_event() {
    let (metrics, support) = with_a_target();
    metrics.project("acme", &project());
    assert!(!metrics.render().contains("incident_info"));
    support.incident(Some(Fault::Agent), Some(incident()));
    let scrape = scraped(&metrics);
    let ours: Vec<_> = scrape
        .families
        .iter()
        .filter(|family| family.name.starts_with(PREFIX))
        .cloned()
        .collect();
    let mut expected: Vec<_> = CATALOGUE
        .iter()
        .map(|family| Family {
            name: format!("{PREFIX}_{}", family.name),
            kind: family.kind.label().to_owned(),
            help: family.help.to_owned(),
        })
        .collect();
    expected.sort();
    assert_eq!(ours, expected);
}

#[test]
fn every_series_of_a_target_has_the_labels_of_the_catalogue() {
    let (metrics, support) = with_a_target();
    support.incident(Some(Fault::Agent), Some(incident()));
    let scrape = scraped(&metrics);
    for family in CATALOGUE {
        let expected: BTreeSet<&str> = family.labels.iter().copied().collect();
        assert!(
            series(&scrape, family.name).next().is_some(),
            "{}",
            family.name
        );
        for sample in series(&scrape, family.name) {
            let labels: BTreeSet<&str> = sample.labels.keys().map(String::as_str).collect();
            assert_eq!(labels, expected, "{}", family.name);
        }
    }
}

#[test]
fn every_label_value_exists_at_zero_before_the_first_event() {
    let (metrics, _support) = with_a_target();
    let scrape = scraped(&metrics);
    for family in CATALOGUE {
        for sample in series(&scrape, family.name) {
            if family.kind != MetricKind::Gauge {
                assert_eq!(sample.value, "0", "{sample:?}");
            }
        }
    }
    let one = |labels: &[&'static str]| labels.iter().map(|label| vec![*label]).collect();
    let sli_labels = || Sli::ALL.iter().map(|sli| vec![sli.label()]).collect();
    let purposes = ["scheduled", "confirmation", "manual"];
    let slis = || {
        let slis = Sli::ALL.iter();
        slis.flat_map(|sli| ["true", "false"].map(|open| vec![sli.label(), open]))
            .collect()
    };
    let reasons = Reason::ALL.into_iter().flat_map(|reason| {
        purposes.map(|purpose| vec![purpose, reason.label(), reason.origin().label()])
    });
    let results = BatchResult::ALL
        .into_iter()
        .flat_map(|result| purposes.map(|purpose| vec![purpose, result.label()]));
    let expected: &[(&str, BTreeSet<Vec<&str>>)] = &[
        ("probes_total", one(&purposes)),
        ("probe_failures_total", reasons.collect()),
        (
            "plan_limit_rejections_total",
            one(&LimitKind::ALL.map(LimitKind::label)),
        ),
        ("slo_eligible_total", slis()),
        ("slo_good_total", slis()),
        ("slo_bad_batches_total", slis()),
        ("batches_total", results.collect()),
        (
            "batches_skipped_total",
            one(&["overlap", "budget", "backoff", "paused"]),
        ),
        (
            "probe_paths_total",
            one(&["udp", "relay_udp", "tcp", "relay_tcp", "relay_tls"]),
        ),
        ("agent_join_delay_seconds", one(&["first", "later"])),
        (
            "span_duration_seconds",
            one(&[
                "room_create",
                "signal",
                "media",
                "publish",
                "dispatch",
                "agent_track",
                "first_audio",
            ]),
        ),
        (
            "internal_errors_total",
            InternalError::ALL
                .iter()
                .map(|kind| vec![kind.label()])
                .collect(),
        ),
        (
            "caller_turns_total",
            one(&["not_sent", "answered", "unanswered", "overlapped"]),
        ),
        (
            "agent_stage_seconds",
            one(&["transcription", "end_of_turn", "llm", "tts", "end_to_end"]),
        ),
        (
            "slo_threshold_seconds",
            one(&["join", "first_speech", "reply"]),
        ),
        ("slo_objective_ratio", sli_labels()),
        (
            "target_state",
            one(&["unknown", "healthy", "suspect", "failing"]),
        ),
        ("incident_open", one(&["agent", "service"])),
        ("agent_budget_seconds", one(&["day", "month"])),
        ("agent_budget_used_seconds", one(&["day", "month"])),
        ("agent_budget_reserved_seconds", one(&["day", "month"])),
    ];
    for (family, values) in expected {
        assert_eq!(label_values(&scrape, family), *values, "{family}");
    }
}

#[test]
fn gauge_without_a_value_is_nan_and_one_with_a_known_value_is_not() {
    let (metrics, _support) = with_a_target();
    let scrape = scraped(&metrics);
    let is_nan = |family: &str| {
        let values: BTreeSet<bool> = series(&scrape, family)
            .map(|sample| sample.value == "NaN")
            .collect();
        assert!(values.len() <= 1, "{family}");
        values.contains(&true)
    };
    let unknown: Vec<&str> = CATALOGUE
        .iter()
        .map(|family| family.name)
        .filter(|family| is_nan(family))
        .collect();
    assert_eq!(
        unknown,
        [
            "last_tick_timestamp_seconds",
            "next_batch_timestamp_seconds",
            "last_batch_completed_timestamp_seconds",
            "last_batch_success_ratio",
            "batch_interval_seconds",
            "batch_interval_shortest_seconds",
            "batch_interval_mean_seconds",
            "batch_interval_effective_seconds",
            "target_state_since_timestamp_seconds",
            "incident_open",
            "backoff_until_timestamp_seconds",
            "agent_budget_seconds",
            "agent_budget_used_seconds",
            "agent_budget_reserved_seconds",
            "config_last_reload_successful",
            "config_last_reload_success_timestamp_seconds",
        ]
    );
}

/// Recording rules and dashboards name these bounds, and an old and a new version must have the same ones to be summed.
#[test]
fn bounds_of_the_buckets_are_unchanged_and_include_the_default_thresholds() {
    const DELAYS: &str = "0.1 0.2 0.3 0.5 0.75 1 1.5 2 3 4 5 6 8 10 15 20 30 60 120 300 +Inf";
    const SPANS: &str = "0.001 0.002 0.005 0.01 0.02 0.03 0.05 0.075 0.1 0.15 0.2 0.3 0.5 0.75 1 2 3 5 10 15 30 60 120 \
                         300 +Inf";
    const JITTER: &str = "0.001 0.002 0.005 0.01 0.02 0.03 0.05 0.1 0.2 0.5 1 +Inf";
    const ROUND_TRIPS: &str =
        "0.001 0.002 0.005 0.01 0.02 0.03 0.05 0.075 0.1 0.15 0.2 0.3 0.5 1 2 +Inf";
    const STAGES: &str = "0.01 0.02 0.05 0.1 0.15 0.2 0.3 0.5 0.75 1 1.5 2 3 5 10 20 30 +Inf";
    const DIFFERENCES: &str =
        "-5 -2 -1 -0.5 -0.3 -0.2 -0.1 -0.05 0 0.05 0.1 0.15 0.2 0.3 0.5 0.75 1 1.5 2 3 5 10 +Inf";
    const WORD_ERRORS: &str = "0 0.02 0.05 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2 +Inf";
    let (metrics, _support) = with_a_target();
    let scrape = scraped(&metrics);
    let mut ladders: BTreeMap<(&str, Vec<&str>), Vec<&str>> = BTreeMap::new();
    for sample in &scrape.samples {
        let Some(le) = sample.labels.get("le") else {
            continue;
        };
        let labels = sample.labels.iter().filter(|(label, _)| *label != "le");
        let labels = labels.map(|(_, value)| value.as_str()).collect();
        let name = sample.name.strip_prefix(PREFIX).unwrap();
        ladders.entry((name, labels)).or_default().push(le);
    }
    let mut seen = BTreeMap::new();
    for ((name, _), bounds) in ladders {
        seen.entry(name)
            .or_insert_with(BTreeSet::new)
            .insert(bounds.join(" "));
    }
    let expected = [
        ("_agent_audio_jitter_seconds_bucket", JITTER),
        ("_agent_join_delay_seconds_bucket", DELAYS),
        ("_agent_stage_seconds_bucket", STAGES),
        ("_first_speech_delay_seconds_bucket", DELAYS),
        ("_heard_word_error_ratio_bucket", WORD_ERRORS),
        ("_media_round_trip_seconds_bucket", ROUND_TRIPS),
        ("_reply_delay_seconds_bucket", DELAYS),
        ("_reply_unexplained_seconds_bucket", DIFFERENCES),
        ("_span_duration_seconds_bucket", SPANS),
        ("_yield_delay_seconds_bucket", DELAYS),
    ];
    let expected = expected.map(|(name, bounds)| (name, BTreeSet::from([bounds.to_owned()])));
    assert_eq!(seen, BTreeMap::from(expected));
    let Objectives {
        join_within,
        first_speech_within,
        reply_within,
        ..
    } = Objectives::default();
    // Otherwise the share below a threshold would be interpolated.
    for threshold in [join_within, first_speech_within, reply_within] {
        let bound = threshold.as_secs_f64().to_string();
        assert!(DELAYS.split(' ').any(|le| le == bound), "{threshold:?}");
    }
}

#[test]
fn names_follow_the_rules_of_prometheus() {
    for Definition {
        name,
        labels,
        kind,
        help,
    } in CATALOGUE
    {
        assert_eq!(
            name.ends_with("_total"),
            *kind == MetricKind::Counter,
            "{name} is a {}",
            kind.label()
        );
        if matches!(kind, MetricKind::Histogram(_)) {
            let unit = ["_seconds", "_ratio"];
            assert!(unit.iter().any(|unit| name.ends_with(unit)), "{name}");
        }
        // Units that promtool rejects, and the suffixes that Prometheus reserves for the series of a histogram.
        for word in [
            "minutes", "hours", "days", "millis", "ms", "percent", "bucket", "count", "sum",
        ] {
            assert!(!name.split('_').any(|part| part == word), "{name}");
        }
        let plain = |c: char| c.is_ascii_lowercase() || c == '_';
        assert!(name.chars().all(plain), "{name}");
        assert!(
            labels.iter().all(|label| label.chars().all(plain)),
            "{name}"
        );
        assert!(
            help.ends_with('.') && !help.contains('\n'),
            "{name}: {help}"
        );
    }
    let names: BTreeSet<&str> = CATALOGUE.iter().map(|family| family.name).collect();
    assert_eq!(names.len(), CATALOGUE.len());
}

#[test]
fn good_probe_is_counted_in_every_series_that_it_affects() {
    let (metrics, support) = with_a_target();
    support.probe(Purpose::Scheduled, &report(), &Objectives::default(), false);
    let scrape = scraped(&metrics);
    assert_eq!(sum_of(&scrape, "probes_total", &[]), 1.0);
    assert_eq!(value_of(&scrape, "probes_aborted_total", &[]), 0.0);
    assert_eq!(total(&scrape, "probe_failures_total"), 0.0);
    for &sli in Sli::ALL {
        let sli = [("sli", sli.label())];
        assert_eq!(sum_of(&scrape, "slo_eligible_total", &sli), 1.0);
        assert_eq!(sum_of(&scrape, "slo_good_total", &sli), 1.0);
    }
    // From 1.15 s to 62.5 s.
    assert_eq!(value_of(&scrape, "agent_billed_seconds_total", &[]), 120.0);
    assert_eq!(value_of(&scrape, "agent_audio_packets_total", &[]), 900.0);
    assert_eq!(
        value_of(&scrape, "agent_audio_packets_lost_total", &[]),
        3.0
    );
    assert_eq!(
        value_of(&scrape, "agent_audio_jitter_seconds_sum", &[]),
        0.004
    );
    let first = [("position", "first")];
    assert_eq!(
        value_of(&scrape, "agent_join_delay_seconds_sum", &first),
        0.75
    );
    assert_eq!(total(&scrape, "agent_join_delay_seconds"), 1.0);
    let bucket = |le| {
        let labels = [("position", "first"), ("le", le)];
        value_of(&scrape, "agent_join_delay_seconds_bucket", &labels)
    };
    assert_eq!(
        (bucket("0.5"), bucket("0.75"), bucket("300")),
        (0.0, 1.0, 1.0)
    );
    assert_eq!(
        value_of(&scrape, "first_speech_delay_seconds_sum", &[]),
        2.0
    );
    assert_eq!(value_of(&scrape, "reply_delay_seconds_count", &[]), 2.0);
    assert_eq!(value_of(&scrape, "reply_delay_seconds_sum", &[]), 3.75);
    let answered = [("result", "answered")];
    assert_eq!(value_of(&scrape, "caller_turns_total", &answered), 2.0);
    assert_eq!(total(&scrape, "caller_turns_total"), 2.0);
    let spans = [
        ("room_create", 0.05),
        ("signal", 0.1),
        ("media", 0.25),
        ("publish", 0.2),
        ("dispatch", 0.025),
        ("agent_track", 0.1),
        ("first_audio", 0.875),
    ];
    for (span, seconds) in spans {
        let span = [("span", span)];
        assert_eq!(value_of(&scrape, "span_duration_seconds_count", &span), 1.0);
        assert_eq!(
            value_of(&scrape, "span_duration_seconds_sum", &span),
            seconds
        );
    }
}

#[test]
fn failure_is_counted_once_under_its_reason_and_origin() {
    for reason in Reason::ALL {
        let (metrics, support) = with_a_target();
        support.probe(
            Purpose::Scheduled,
            &failed_at_once(reason),
            &Objectives::default(),
            false,
        );
        let scrape = scraped(&metrics);
        let labels = [
            ("reason", reason.label()),
            ("origin", reason.origin().label()),
        ];
        assert_eq!(sum_of(&scrape, "probe_failures_total", &labels), 1.0);
        assert_eq!(total(&scrape, "probe_failures_total"), 1.0);
        assert_eq!(sum_of(&scrape, "probes_total", &[]), 1.0);
        let limited = matches!(reason, Reason::PlanLimit(_));
        let limits = total(&scrape, "plan_limit_rejections_total");
        assert_eq!(limits, if limited { 1.0 } else { 0.0 }, "{reason:?}");
        let ours = value_of(&scrape, "internal_errors_total", &[("kind", "probe")]);
        let internal = reason == Reason::Internal;
        assert_eq!(ours, if internal { 1.0 } else { 0.0 }, "{reason:?}");
        // Nothing was measured, so nothing may be observed.
        for histogram in CATALOGUE
            .iter()
            .filter(|one| matches!(one.kind, MetricKind::Histogram(_)))
        {
            assert_eq!(total(&scrape, histogram.name), 0.0, "{}", histogram.name);
        }
        assert_eq!(value_of(&scrape, "agent_billed_seconds_total", &[]), 0.0);
    }
}

#[test]
fn limit_is_counted_under_its_kind() {
    let (metrics, support) = with_a_target();
    for (times, kind) in LimitKind::ALL.into_iter().enumerate() {
        for _ in 0..=times {
            let report = failed_at_once(Reason::PlanLimit(kind));
            support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
        }
    }
    let scrape = scraped(&metrics);
    for (times, kind) in LimitKind::ALL.into_iter().enumerate() {
        let limit = [("limit", kind.label())];
        let counted = value_of(&scrape, "plan_limit_rejections_total", &limit);
        assert_eq!(
            counted,
            f64::from(u32::try_from(times + 1).unwrap()),
            "{kind:?}"
        );
    }
}

#[test]
fn delays_are_observed_for_every_outcome() {
    let (metrics, support) = with_a_target();
    for outcome in [
        failed(Reason::AgentNoReply),
        failed(Reason::SignalLost),
        Outcome::Aborted,
    ] {
        let report = ProbeReport {
            outcome,
            position: Position::Later,
            ..report()
        };
        support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
    }
    let scrape = scraped(&metrics);
    let later = [("position", "later")];
    assert_eq!(
        value_of(&scrape, "agent_join_delay_seconds_count", &later),
        3.0
    );
    assert_eq!(
        value_of(&scrape, "first_speech_delay_seconds_count", &[]),
        3.0
    );
    // An aborted call costs as much as any other.
    assert_eq!(value_of(&scrape, "agent_billed_seconds_total", &[]), 360.0);
    assert_eq!(sum_of(&scrape, "probes_total", &[]), 2.0);
    assert_eq!(value_of(&scrape, "probes_aborted_total", &[]), 1.0);
}

#[test]
fn what_is_known_of_a_turn_is_observed_and_what_is_unknown_is_not() {
    let (metrics, support) = with_a_target();
    let base = Instant::now();
    let at = |millis| base + Duration::from_millis(millis);
    let claimed = |stage| {
        let millis = match stage {
            AgentStage::Transcription => 125,
            AgentStage::EndOfTurn => 250,
            AgentStage::Llm => 500,
            AgentStage::Tts => 62,
            AgentStage::EndToEnd => 1_000,
        };
        Some(Duration::from_millis(millis))
    };
    let answered = Turn {
        caller_ended: Some(at(0)),
        replied: Some(at(1_125)),
        result: TurnResult::Answered,
        word_error: Some(0.25),
        stages: TurnStages {
            transcription: claimed(AgentStage::Transcription),
            end_of_turn: claimed(AgentStage::EndOfTurn),
            llm: claimed(AgentStage::Llm),
            tts: claimed(AgentStage::Tts),
            end_to_end: claimed(AgentStage::EndToEnd),
        },
        ..Turn::default()
    };
    // The agent says that it took longer than the canary waited.
    let early = Turn {
        caller_ended: Some(at(0)),
        replied: Some(at(400)),
        result: TurnResult::Answered,
        stages: TurnStages {
            end_to_end: Some(Duration::from_secs(1)),
            ..TurnStages::default()
        },
        ..Turn::default()
    };
    let yielded = Turn {
        interrupts: true,
        caller_started: Some(at(0)),
        caller_ended: Some(at(1_500)),
        yielded: Some(at(750)),
        replied: Some(at(2_500)),
        result: TurnResult::Answered,
        ..Turn::default()
    };
    let unanswered = Turn {
        caller_ended: Some(at(0)),
        result: TurnResult::Unanswered,
        ..Turn::default()
    };
    let report = ProbeReport {
        outcome: failed(Reason::AgentNoReply),
        turns: vec![answered, early, yielded, unanswered, Turn::default()],
        ..report()
    };
    support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
    let scrape = scraped(&metrics);
    for (result, turns) in [
        ("answered", 3.0),
        ("unanswered", 1.0),
        ("overlapped", 0.0),
        ("not_sent", 1.0),
    ] {
        let result = [("result", result)];
        assert_eq!(value_of(&scrape, "caller_turns_total", &result), turns);
    }
    for stage in AgentStage::ALL {
        let labels = [("stage", stage.label())];
        let count = value_of(&scrape, "agent_stage_seconds_count", &labels);
        let sum = value_of(&scrape, "agent_stage_seconds_sum", &labels);
        let claimed = claimed(stage).unwrap().as_secs_f64();
        let expected = match stage {
            AgentStage::EndToEnd => (2.0, 2.0 * claimed),
            _ => (1.0, claimed),
        };
        assert_eq!((count, sum), expected, "{stage:?}");
    }
    // 0.125 s and -0.6 s.
    let unexplained = |le| value_of(&scrape, "reply_unexplained_seconds_bucket", &[("le", le)]);
    let buckets = ["-1", "-0.5", "0.1", "0.15", "+Inf"];
    assert_eq!(buckets.map(unexplained), [0.0, 1.0, 1.0, 2.0, 2.0]);
    assert_eq!(value_of(&scrape, "yield_delay_seconds_count", &[]), 1.0);
    assert_eq!(value_of(&scrape, "yield_delay_seconds_sum", &[]), 0.75);
    assert_eq!(value_of(&scrape, "heard_word_error_ratio_count", &[]), 1.0);
    assert_eq!(value_of(&scrape, "heard_word_error_ratio_sum", &[]), 0.25);
    // A reply to an interruption has no reply delay.
    assert_eq!(value_of(&scrape, "reply_delay_seconds_count", &[]), 2.0);
}

#[test]
fn turn_without_a_wrong_word_is_in_the_lowest_bucket() {
    let (metrics, support) = with_a_target();
    let right = Turn {
        word_error: Some(0.0),
        ..Turn::default()
    };
    let report = ProbeReport {
        turns: vec![right],
        ..report()
    };
    support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
    let bucket = |le| {
        value_of(
            &scraped(&metrics),
            "heard_word_error_ratio_bucket",
            &[("le", le)],
        )
    };
    assert_eq!(bucket("0"), 1.0);
}

/// Prometheus would take a fall of the sum for a restart.
#[test]
fn histogram_whose_values_can_be_negative_has_no_sum() {
    let (metrics, _support) = with_a_target();
    let scrape = scraped(&metrics);
    for family in CATALOGUE {
        let MetricKind::Histogram(bounds) = family.kind else {
            continue;
        };
        let name = format!("{PREFIX}_{}_sum", family.name);
        let has_sum = scrape.samples.iter().any(|sample| sample.name == name);
        assert_eq!(has_sum, bounds[0] >= 0.0, "{name}");
    }
}

#[test]
fn path_counts_once_per_probe_and_its_round_trip_once_per_connection() {
    let (metrics, support) = with_a_target();
    let mut report = report();
    report.circumstances.media_path = Some(MediaPath::RelayTls);
    let connection = |connection, round_trip_seconds| MediaConnection {
        connection,
        path: MediaPath::RelayTls,
        via: Some("turn.example.com:443".to_owned()),
        round_trip_seconds,
    };
    report.evidence.media = vec![
        connection("publisher", Some(0.25)),
        connection("subscriber", Some(0.5)),
    ];
    support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
    report.evidence.media = vec![connection("publisher", None)];
    support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
    let scrape = scraped(&metrics);
    let paths = |path| value_of(&scrape, "probe_paths_total", &[("path", path)]);
    assert_eq!([paths("relay_tls"), paths("udp")], [2.0, 0.0]);
    let round_trip = |part| value_of(&scrape, &format!("media_round_trip_seconds_{part}"), &[]);
    assert_eq!([round_trip("count"), round_trip("sum")], [2.0, 0.75]);
}

#[test]
fn turn_that_the_canary_cut_off_is_not_counted() {
    let (metrics, support) = with_a_target();
    let cut_off = Turn {
        result: TurnResult::Unanswered,
        ..Turn::default()
    };
    let report = ProbeReport {
        outcome: Outcome::Aborted,
        turns: vec![cut_off],
        ..report()
    };
    support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
    assert_eq!(total(&scraped(&metrics), "caller_turns_total"), 0.0);
}

#[test]
fn service_level_that_the_settings_rule_out_has_no_objective_and_no_threshold() {
    let mut deaf = target();
    deaf.expect.reply = false;
    let mut passive = target();
    passive.caller.mode = CallerMode::PassThrough;
    let mut forward = target();
    forward.caller.speaks_first = true;
    for (target, without) in [
        (deaf, Sli::Reply),
        (passive, Sli::Reply),
        (forward, Sli::FirstSpeech),
    ] {
        let (metrics, _support) = with_a_target();
        // As after a reload.
        metrics.target("support", &target, &project());
        let scrape = scraped(&metrics);
        for &sli in Sli::ALL {
            let labels = [("sli", sli.label())];
            let objective = value_of(&scrape, "slo_objective_ratio", &labels);
            assert_eq!(objective.is_nan(), sli == without, "{sli:?}");
            if sli.threshold(&target.objectives).is_some() {
                let threshold = value_of(&scrape, "slo_threshold_seconds", &labels);
                assert_eq!(threshold.is_nan(), sli == without, "{sli:?}");
            }
        }
    }
}

#[test]
fn upper_bound_of_a_join_delay_is_not_observed() {
    let (metrics, support) = with_a_target();
    let report = ProbeReport {
        join_upper_bound: true,
        ..report()
    };
    support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
    let scrape = scraped(&metrics);
    assert_eq!(total(&scrape, "agent_join_delay_seconds"), 0.0);
    assert_eq!(sum_of(&scrape, "probes_total", &[]), 1.0);
}

#[test]
fn batch_is_counted_by_its_result_and_an_aborted_one_does_not_become_the_last() {
    let (metrics, support) = with_a_target();
    let limited = || failed(Reason::PlanLimit(LimitKind::Quota));
    let objectives = target().objectives;
    let mixed = [
        Outcome::Ok,
        failed(Reason::AgentSilent),
        limited(),
        Outcome::Ok,
    ];
    support.batch(&batch(mixed), &objectives, false);
    let mut aborted = batch([Outcome::Ok, Outcome::Aborted]);
    aborted.ended_at = moment() + TimeDelta::hours(1);
    support.batch(&aborted, &objectives, false);
    let scrape = scraped(&metrics);
    let of = |result| sum_of(&scrape, "batches_total", &[("result", result)]);
    assert_eq!((of("limited"), of("aborted")), (1.0, 1.0));
    assert_eq!(total(&scrape, "batches_total"), 2.0);
    let completed = value_of(&scrape, "last_batch_completed_timestamp_seconds", &[]);
    assert_eq!(completed, 1_790_000_040.25);
    assert_eq!(value_of(&scrape, "last_batch_success_ratio", &[]), 0.5);
}

#[test]
fn bad_batch_is_counted_once_in_each_service_level_in_which_it_was_bad() {
    let (metrics, support) = with_a_target();
    let objectives = target().objectives;
    support.batch(&batch([Outcome::Ok, Outcome::Ok]), &objectives, false);
    let limited = failed(Reason::PlanLimit(LimitKind::Quota));
    support.batch(&batch([limited.clone(), limited]), &objectives, false);
    let silent = || failed(Reason::AgentSilent);
    support.batch(
        &batch([silent(), Outcome::Ok, silent()]),
        &objectives,
        false,
    );
    let scrape = scraped(&metrics);
    let of = |sli| sum_of(&scrape, "slo_bad_batches_total", &[("sli", sli)]);
    assert_eq!((of("availability"), of("service")), (1.0, 2.0));
}

#[test]
fn everything_that_the_daemon_reports_of_a_target_is_shown() {
    let (metrics, support) = with_a_target();
    support.tick(moment());
    support.next_batch(Some(moment() + TimeDelta::minutes(15)));
    support.intervals(
        Some(Duration::from_mins(15)),
        Some(Duration::from_mins(5)),
        Some(Duration::from_mins(10)),
        Duration::from_mins(6),
    );
    support.paused(true);
    support.leaked(2);
    support.swept(3);
    support.restore_last_batch(moment() - TimeDelta::seconds(10));
    support.skipped(SkipCause::Budget);
    let open = [support.room_opened(), support.room_opened()];
    let scrape = scraped(&metrics);
    let value = |name| value_of(&scrape, name, &[]);
    assert_eq!(value("last_tick_timestamp_seconds"), 1_790_000_000.25);
    assert_eq!(value("next_batch_timestamp_seconds"), 1_790_000_900.25);
    assert_eq!(value("batch_interval_seconds"), 900.0);
    assert_eq!(value("batch_interval_shortest_seconds"), 300.0);
    assert_eq!(value("batch_interval_mean_seconds"), 600.0);
    // A batch can last longer than the shortest interval.
    assert_eq!(value("batch_interval_effective_seconds"), 360.0);
    assert_eq!(value("target_paused"), 1.0);
    assert_eq!(value("rooms_leaked_total"), 2.0);
    assert_eq!(value("rooms_swept_total"), 3.0);
    assert_eq!(
        value("last_batch_completed_timestamp_seconds"),
        1_789_999_990.25
    );
    assert_eq!(value("rooms_in_flight"), 2.0);
    let skipped = value_of(&scrape, "batches_skipped_total", &[("cause", "budget")]);
    assert_eq!(
        (skipped, total(&scrape, "batches_skipped_total")),
        (1.0, 1.0)
    );

    drop(open);
    support.next_batch(None);
    support.intervals(None, None, None, Duration::from_mins(6));
    support.paused(false);
    let scrape = scraped(&metrics);
    let value = |name| value_of(&scrape, name, &[]);
    assert_eq!(value("rooms_in_flight"), 0.0);
    assert_eq!(value("target_paused"), 0.0);
    assert!(value("next_batch_timestamp_seconds").is_nan());
    for gauge in [
        "batch_interval_seconds",
        "batch_interval_shortest_seconds",
        "batch_interval_mean_seconds",
        "batch_interval_effective_seconds",
    ] {
        assert!(value(gauge).is_nan(), "{gauge}");
    }
}

/// The delays of confirmations would be those of outages.
#[test]
fn only_scheduled_batches_count_in_service_levels_delays_and_the_last_batch() {
    let (metrics, support) = with_a_target();
    let everywhere = [
        "probes_total",
        "batches_total",
        "probe_failures_total",
        "plan_limit_rejections_total",
        "agent_billed_seconds_total",
    ];
    let before = scraped(&metrics);
    let objectives = Objectives::default();
    for purpose in [Purpose::Confirmation, Purpose::Manual] {
        let limited = failed_at_once(Reason::PlanLimit(LimitKind::Quota));
        for probe in [report(), limited] {
            support.probe(purpose, &probe, &objectives, false);
        }
        let ended = BatchReport {
            purpose,
            ..batch([Outcome::Ok, failed(Reason::AgentSilent)])
        };
        support.batch(&ended, &objectives, true);
        let scrape = scraped(&metrics);
        for (name, expected) in [("probes_total", 2.0), ("batches_total", 1.0)] {
            let labels = [("purpose", purpose.label())];
            assert_eq!(sum_of(&scrape, name, &labels), expected, "{purpose:?}");
        }
    }
    let after = scraped(&metrics);
    let counts = |sample: &&Sample| {
        let name = sample
            .name
            .trim_start_matches(PREFIX)
            .trim_start_matches('_');
        !everywhere.contains(&name) && sample.name.starts_with(PREFIX)
    };
    let [before, after] = [&before, &after].map(|scrape| {
        let samples = scrape.samples.iter().filter(counts);
        samples.collect::<Vec<_>>()
    });
    assert_eq!(before, after);
    assert_eq!(
        total(&scraped(&metrics), "agent_billed_seconds_total"),
        240.0
    );
    assert_eq!(
        total(&scraped(&metrics), "plan_limit_rejections_total"),
        2.0
    );
}

#[test]
fn service_levels_separate_what_ends_during_an_incident() {
    let (metrics, support) = with_a_target();
    let objectives = Objectives::default();
    support.probe(Purpose::Scheduled, &report(), &objectives, false);
    let silent = failed_at_once(Reason::AgentSilent);
    support.probe(Purpose::Scheduled, &silent, &objectives, true);
    support.probe(Purpose::Scheduled, &silent, &objectives, true);
    support.batch(&batch([failed(Reason::AgentSilent)]), &objectives, true);
    let scrape = scraped(&metrics);
    let of = |name, in_incident| {
        let labels = [("sli", "availability"), ("in_incident", in_incident)];
        value_of(&scrape, name, &labels)
    };
    for (name, outside, inside) in [
        ("slo_eligible_total", 1.0, 2.0),
        ("slo_good_total", 1.0, 0.0),
        ("slo_bad_batches_total", 0.0, 1.0),
    ] {
        assert_eq!((of(name, "false"), of(name, "true")), (outside, inside));
    }
}

#[test]
fn exactly_one_state_of_a_target_is_1() {
    let (metrics, support) = with_a_target();
    let states = || -> Vec<String> {
        let scrape = scraped(&metrics);
        let states = series(&scrape, "target_state").filter(|sample| sample.value == "1");
        states
            .map(|sample| sample.labels["state"].clone())
            .collect()
    };
    assert_eq!(states(), ["unknown"]);
    for state in TargetState::ALL {
        support.state(state, moment());
        assert_eq!(states(), [state.label()]);
    }
    let scrape = scraped(&metrics);
    let since = value_of(&scrape, "target_state_since_timestamp_seconds", &[]);
    assert_eq!(since, 1_790_000_000.25);
}

#[test]
fn information_about_an_incident_exists_while_it_is_open_and_only_in_its_last_form() {
    let (metrics, support) = with_a_target();
    let open = || {
        let scrape = scraped(&metrics);
        ["agent", "service"].map(|fault| value_of(&scrape, "incident_open", &[("fault", fault)]))
    };
    assert!(open().iter().all(|value| value.is_nan()));
    support.incident(None, None);
    assert_eq!(open(), [0.0, 0.0]);
    support.incident(Some(Fault::Service), Some(incident()));
    let changed = IncidentInfo {
        rooms: 7,
        differs: "only node a fails".to_owned(),
        url: Some("https://canary/incidents/1".to_owned()),
        ..incident()
    };
    support.incident(Some(Fault::Service), Some(changed));
    assert_eq!(open(), [0.0, 1.0]);
    let scrape = scraped(&metrics);
    let info: Vec<&Sample> = series(&scrape, "incident_info").collect();
    let [info] = info[..] else {
        panic!("not one series: {info:?}");
    };
    let labels = [
        ("differs", "only node a fails"),
        ("incident", "20260921T141320Z-support"),
        ("reason", "agent_silent"),
        ("share", "71 %"),
        ("target", "support"),
        ("url", "https://canary/incidents/1"),
    ];
    let labels = labels.map(|(label, value)| (label.to_owned(), value.to_owned()));
    assert_eq!(info.labels, BTreeMap::from(labels));
    assert_eq!(info.value, "1");
    support.incident(None, None);
    assert_eq!(series(&scraped(&metrics), "incident_info").count(), 0);
}

/// Each other share is a series of its own in Prometheus.
#[test]
fn share_of_an_incident_is_in_whole_percent_and_100_only_if_every_room_failed() {
    let share = |failed, rooms| {
        let info = IncidentInfo {
            failed,
            rooms,
            ..incident()
        };
        info.share()
    };
    let shares = [(3, 3), (1, 3), (999, 1_000), (1, 1_000), (0, 4), (0, 0)];
    let shares = shares.map(|(failed, rooms)| share(failed, rooms));
    assert_eq!(shares, ["100 %", "33 %", "99 %", "1 %", "0 %", ""]);
}

#[test]
fn room_of_a_probe_that_panics_no_longer_counts_as_open() {
    let (metrics, support) = with_a_target();
    let crashed = thread::spawn(move || {
        let _open = support.room_opened();
        panic!("scripted");
    });
    assert!(crashed.join().is_err());
    assert_eq!(value_of(&scraped(&metrics), "rooms_in_flight", &[]), 0.0);
}

#[test]
fn everything_that_the_daemon_reports_of_a_project_and_of_itself_is_shown() {
    let metrics = metrics();
    let mut settings = project();
    settings.budget.agent_time_per_day = Some(Duration::from_hours(1));
    let acme = metrics.project("acme", &settings);
    acme.budget_used(Period::Day, Duration::from_mins(7), Duration::from_mins(2));
    acme.backoff_until(Some(moment()));
    metrics.history_dropped(4);
    metrics.history_degraded(true);
    metrics.internal_error(InternalError::Janitor);
    metrics.config_loaded(moment());
    let scrape = scraped(&metrics);
    let of = |name, period| value_of(&scrape, name, &[("project", "acme"), ("period", period)]);
    assert_eq!(of("agent_budget_seconds", "day"), 3600.0);
    assert!(of("agent_budget_seconds", "month").is_nan());
    assert_eq!(of("agent_budget_used_seconds", "day"), 420.0);
    assert_eq!(of("agent_budget_reserved_seconds", "day"), 120.0);
    assert!(of("agent_budget_used_seconds", "month").is_nan());
    let value = |name| value_of(&scrape, name, &[]);
    assert_eq!(value("backoff_until_timestamp_seconds"), 1_790_000_000.25);
    assert_eq!(value("history_dropped_total"), 4.0);
    assert_eq!(value("history_degraded"), 1.0);
    assert_eq!(
        value_of(&scrape, "internal_errors_total", &[("kind", "janitor")]),
        1.0
    );
    assert_eq!(value("config_last_reload_successful"), 1.0);
    let loaded = "config_last_reload_success_timestamp_seconds";
    assert_eq!(value(loaded), 1_790_000_000.25);

    // A removed limit, a back-off that has ended, and rejected settings.
    metrics.project("acme", &project());
    acme.backoff_until(None);
    metrics.config_refused();
    let scrape = scraped(&metrics);
    let budget = value_of(&scrape, "agent_budget_seconds", &[("period", "day")]);
    assert!(budget.is_nan());
    assert_eq!(
        value_of(&scrape, "agent_budget_used_seconds", &[("period", "day")]),
        420.0
    );
    let value = |name| value_of(&scrape, name, &[]);
    assert!(value("backoff_until_timestamp_seconds").is_nan());
    assert_eq!(value("config_last_reload_successful"), 0.0);
    assert_eq!(value(loaded), 1_790_000_000.25);

    metrics.remove_project("acme");
    acme.budget_used(Period::Month, Duration::from_mins(7), Duration::ZERO);
    assert!(!metrics.render().contains("acme"));
}

#[test]
fn attempts_failures_and_losses_of_a_channel_are_counted_until_it_is_removed() {
    let metrics = metrics();
    let team = metrics.channel("team");
    team.attempt(true);
    team.attempt(false);
    team.lost(3);
    // The same channel after a reload.
    metrics.channel("team").attempt(true);
    let scrape = scraped(&metrics);
    let value = |name| value_of(&scrape, name, &[("channel", "team")]);
    assert_eq!(value("notifications_total"), 3.0);
    assert_eq!(value("notification_failures_total"), 1.0);
    assert_eq!(value("notifications_lost_total"), 3.0);
    metrics.remove_channel("team");
    team.attempt(true);
    assert!(!metrics.render().contains("team"));
}

#[test]
fn changed_settings_of_a_target_keep_its_counters() {
    let (metrics, support) = with_a_target();
    support.probe(Purpose::Scheduled, &report(), &Objectives::default(), false);
    let mut changed = target();
    changed.agent_name = None;
    changed.dispatch.mode = DispatchMode::Automatic;
    changed.objectives.join_within = Duration::from_millis(500);
    changed.objectives.availability = 0.9;
    let again = metrics.target("support", &changed, &project());
    again.probe(Purpose::Scheduled, &report(), &changed.objectives, false);
    // The handle from before the change counts in the same series.
    support.probe(Purpose::Scheduled, &report(), &changed.objectives, false);

    let scrape = scraped(&metrics);
    assert_eq!(sum_of(&scrape, "probes_total", &[]), 3.0);
    let join = [("sli", "join")];
    assert_eq!(sum_of(&scrape, "slo_eligible_total", &join), 3.0);
    assert_eq!(sum_of(&scrape, "slo_good_total", &join), 1.0);
    assert_eq!(value_of(&scrape, "slo_threshold_seconds", &join), 0.5);
    let availability = [("sli", "availability")];
    assert_eq!(value_of(&scrape, "slo_objective_ratio", &availability), 0.9);
    let info: Vec<&Sample> = series(&scrape, "target_info").collect();
    let [info] = info[..] else {
        panic!("the old settings are still exported: {info:?}");
    };
    let labels = [
        ("agent_name", ""),
        ("deployment", ""),
        ("dispatch", "automatic"),
        ("project", "acme"),
        ("target", "support"),
        ("url", "wss://acme.livekit.cloud/"),
    ];
    let labels = labels.map(|(label, value)| (label.to_owned(), value.to_owned()));
    assert_eq!(info.labels, BTreeMap::from(labels));
    assert_eq!(info.value, "1");
}

#[test]
fn every_series_of_a_drill_is_labelled_and_no_other_series_is() {
    for drill in [true, false] {
        let metrics = Metrics::new(&build(), drill);
        metrics.target("support", &target(), &project());
        metrics.project("acme", &project());
        let scrape = scraped(&metrics);
        for family in ["process_start_time_seconds", "livekit_canary_build_info"] {
            assert!(scrape.samples.iter().any(|sample| sample.name == family));
        }
        for sample in &scrape.samples {
            let label = sample.labels.get("drill").map(String::as_str);
            assert_eq!(label, drill.then_some("true"), "{sample:?}");
        }
    }
}

#[test]
fn series_of_a_removed_target_disappear_and_an_old_handle_does_not_restore_them() {
    let (metrics, support) = with_a_target();
    metrics.target("sales", &target(), &project());
    let open = support.room_opened();
    metrics.remove_target("support");
    support.probe(Purpose::Scheduled, &report(), &Objectives::default(), false);
    support.batch(&batch([Outcome::Ok]), &target().objectives, false);
    support.tick(moment());
    support.skipped(SkipCause::Overlap);
    drop(open);
    let text = metrics.render();
    assert!(!text.contains("support"), "{text}");
    assert!(text.contains("target=\"sales\""));

    let added_again = metrics.target("support", &target(), &project());
    support.probe(Purpose::Scheduled, &report(), &Objectives::default(), false);
    let value = || total(&scraped(&metrics), "probes_total");
    assert_eq!(value(), 0.0);
    added_again.probe(Purpose::Scheduled, &report(), &Objectives::default(), false);
    assert_eq!(value(), 1.0);
}

#[test]
fn targets_do_not_affect_each_other() {
    let (metrics, support) = with_a_target();
    let sales = metrics.target("sales", &target(), &project());
    let of_sales = |metrics: &Metrics| {
        let mut samples = scraped(metrics).samples;
        samples.retain(|sample| {
            sample
                .labels
                .get("target")
                .is_some_and(|name| name == "sales")
        });
        samples.sort();
        samples
    };
    let before = of_sales(&metrics);
    support.probe(Purpose::Scheduled, &report(), &Objectives::default(), false);
    support.batch(&batch([Outcome::Ok]), &target().objectives, false);
    support.tick(moment());
    let _open = support.room_opened();
    assert_eq!(of_sales(&metrics), before);
    sales.probe(Purpose::Scheduled, &report(), &Objectives::default(), false);
    assert_ne!(of_sales(&metrics), before);
}

#[test]
fn each_series_exists_once_and_families_are_sorted() {
    let (metrics, _support) = with_a_target();
    metrics.project("other", &project());
    metrics.target("sales", &target(), &project());
    let scrape = scraped(&metrics);
    let names: Vec<&String> = scrape.families.iter().map(|family| &family.name).collect();
    assert!(names.is_sorted());
    let series: BTreeSet<_> = scrape
        .samples
        .iter()
        .map(|sample| (&sample.name, &sample.labels))
        .collect();
    assert_eq!(series.len(), scrape.samples.len());
}

#[test]
fn usual_process_metrics_exist() {
    let scrape = scraped(&metrics());
    let value = |name: &str| {
        let sample = scrape.samples.iter().find(|sample| sample.name == name);
        sample.unwrap().value.parse::<f64>().unwrap()
    };
    for name in [
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_open_fds",
        "process_max_fds",
        "process_threads",
        "process_start_time_seconds",
    ] {
        assert!(value(name) > 0.0, "{name}");
    }
    assert!(value("process_cpu_seconds_total") >= 0.0);
}

#[test]
fn special_characters_in_a_setting_are_escaped() {
    let metrics = metrics();
    let mut odd = target();
    odd.agent_name = Some("a\"b\\c\nd".to_owned());
    metrics.target("support", &odd, &project());
    let text = metrics.render();
    let line = text.lines().find(|line| line.contains("_target_info{"));
    let expected = r#"agent_name="a\"b\\c\nd""#;
    assert!(line.unwrap().contains(expected), "{line:?}");
}

#[test]
fn secrets_and_details_are_not_exported() {
    let (metrics, support) = with_a_target();
    let report = ProbeReport {
        outcome: Outcome::Failed(Failure {
            reason: Reason::AuthRejected,
            detail: "the-detail".to_owned(),
        }),
        ..report()
    };
    support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
    let text = metrics.render();
    for word in ["the-key", "the-secret", "the-detail", "canary-0a1b2"] {
        assert!(!text.contains(word), "{word}");
    }
}

#[test]
fn target_that_was_removed_before_a_scrape_is_not_in_it() {
    const TARGETS: usize = 300;
    let metrics = metrics();
    // All targets below this number are removed. The others may exist or not.
    let removed = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..TARGETS {
                let name = format!("t-{number}");
                let handle = metrics.target(&name, &target(), &project());
                handle.probe(Purpose::Scheduled, &report(), &Objectives::default(), false);
                metrics.remove_target(&name);
                removed.store(number + 1, Ordering::SeqCst);
                handle.probe(Purpose::Scheduled, &report(), &Objectives::default(), false);
            }
            over.store(true, Ordering::SeqCst);
        });
        while !over.load(Ordering::SeqCst) {
            let gone = removed.load(Ordering::SeqCst);
            let scrape = scraped(&metrics);
            for sample in &scrape.samples {
                let Some(name) = sample.labels.get("target") else {
                    continue;
                };
                let number: usize = name.strip_prefix("t-").unwrap().parse().unwrap();
                assert!(number >= gone, "{name} was among the {gone} removed ones");
            }
        }
    });
    assert!(!metrics.render().contains("target="));
}

#[test]
fn scrape_shows_all_changes_of_a_probe_or_none() {
    const PROBES: u32 = 500;
    let (metrics, support) = with_a_target();
    let probing = AtomicUsize::new(2);
    thread::scope(|scope| {
        for outcome in [Outcome::Ok, failed(Reason::AgentNoReply)] {
            let report = ProbeReport {
                outcome,
                ..report()
            };
            let (support, probing) = (&support, &probing);
            scope.spawn(move || {
                for _ in 0..PROBES {
                    support.probe(Purpose::Scheduled, &report, &Objectives::default(), false);
                }
                probing.fetch_sub(1, Ordering::SeqCst);
            });
        }
        loop {
            let last = probing.load(Ordering::SeqCst) == 0;
            let scrape = scraped(&metrics);
            let probes = sum_of(&scrape, "probes_total", &[]);
            let ok = probes - total(&scrape, "probe_failures_total");
            let of = |name, sli| sum_of(&scrape, name, &[("sli", sli)]);
            assert_eq!(of("slo_eligible_total", "availability"), probes);
            assert_eq!(of("slo_good_total", "availability"), ok);
            assert_eq!(of("slo_good_total", "join"), probes);
            assert_eq!(total(&scrape, "agent_join_delay_seconds"), probes);
            assert_eq!(
                value_of(&scrape, "agent_billed_seconds_total", &[]),
                120.0 * probes
            );
            if last {
                assert_eq!(probes, f64::from(2 * PROBES));
                break;
            }
        }
    });
}

const METRICS: &str = include_str!("../../docs/metrics.md");

/// The cells of the table with this head in `docs/metrics.md`, by row.
fn documented_table(head: &str) -> Vec<Vec<&'static str>> {
    let (_, table) = METRICS.split_once(head).unwrap();
    let rows = table.lines().skip(2).take_while(|row| row.starts_with('|'));
    rows.map(|row| {
        let cells = row.strip_prefix('|').unwrap().strip_suffix('|').unwrap();
        cells.split('|').map(str::trim).collect()
    })
    .collect()
}

/// The texts in backquotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn docs_list_the_catalogue() {
    let listed = documented_table("| name | type | labels | means |");
    let expected = CATALOGUE.iter().map(|family| {
        let labels = family.labels.iter().map(|label| format!("`{label}`"));
        vec![
            format!("`{}`", family.name),
            family.kind.label().to_owned(),
            labels.collect::<Vec<_>>().join(", "),
            family.help.to_owned(),
        ]
    });
    assert_eq!(listed, expected.collect::<Vec<_>>());
}

#[test]
fn docs_list_every_label_value() {
    let (metrics, _support) = with_a_target();
    let scrape = scraped(&metrics);
    let rows = documented_table("| label | values |");
    for row in &rows {
        let [labels, values] = row[..] else {
            panic!("{row:?} has not two cells");
        };
        // Other tests check the pages that list the other values.
        if !values.contains("](") && values != "`true`, `false`" {
            let [label] = quoted(labels)[..] else {
                panic!("{labels} is not one label");
            };
            let listed: BTreeSet<&str> = quoted(values).into_iter().collect();
            assert_eq!(listed, values_of(&scrape, label), "{label}");
        }
    }
    // Values from the settings, from an incident and from the build can be any text.
    let free = [
        "target",
        "incident",
        "share",
        "differs",
        "project",
        "channel",
        "url",
        "agent_name",
        "deployment",
        "version",
        "revision",
        "rustc",
        "engine",
    ];
    let explained: BTreeSet<&str> = rows.iter().flat_map(|row| quoted(row[0])).collect();
    for label in CATALOGUE.iter().flat_map(|family| family.labels) {
        assert!(free.contains(label) || explained.contains(label), "{label}");
    }
}

#[test]
fn docs_list_the_origins_that_count_in_each_service_level() {
    let objectives = Objectives::default();
    let expected = Sli::ALL.iter().map(|sli| {
        let counts = |reason: &Reason| {
            let unanswered = Turn {
                result: TurnResult::Unanswered,
                ..Turn::default()
            };
            let report = ProbeReport {
                turns: vec![unanswered],
                ..failed_at_once(*reason)
            };
            sli.judge(&report, &objectives) != SliVerdict::NotEligible
        };
        let reasons = Reason::ALL.into_iter().filter(counts);
        let origins: BTreeSet<&str> = reasons.map(|reason| reason.origin().label()).collect();
        (sli.label(), origins)
    });
    let rows = documented_table("| sli | a probe is good | failures that count, by origin |");
    let listed: Vec<_> = rows
        .iter()
        .map(|row| (quoted(row[0])[0], quoted(row[2]).into_iter().collect()))
        .collect();
    assert_eq!(listed, expected.collect::<Vec<_>>());
}
