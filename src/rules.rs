//! Renders the settings as a file of Prometheus rules; pure.
//!
//! One set of rules serves every target of every daemon: objectives and intervals come from the series themselves, so the
//! rules that one daemon prints fit any other. Only the window of a range selector must be literal, because PromQL can't
//! take it from a series. There is one window per class of intervals, and a target's own interval selects the class.
//! The schedules of these settings get their own classes, with windows that fit exactly.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::config::{Alerts, Config, Project, Target};

mod catalogue;
mod records;
mod window;
mod yaml;

use catalogue::Group;
pub use catalogue::{ALERTS, Alert, Severity};
pub(crate) use window::max_watched_interval;

use records::{
    BAD_BATCHES, BY_LIVEKIT_OUTSIDE, ELIGIBLE, FAST, GOOD, RecordingRule, SLOW, record_name,
};
use window::Pace;

/// Upper bounds of the interval classes, in minutes. Common schedules fit exactly, others within a factor of about two.
/// Prometheus evaluates the windows of all classes for every target. Longer intervals need windows of days, so their
/// classes exist only if these settings contain such a schedule.
const LADDER: [u64; 7] = [2, 5, 10, 15, 30, 60, 180];

/// The rules for these settings, as the text of a Prometheus rule file. `longest_batch` returns how long a batch of a target
/// can take.
pub(crate) fn render(
    config: &Config,
    longest_batch: fn(&Target, &Project) -> Duration,
    now: DateTime<Utc>,
) -> String {
    let alerts = &config.alerts;
    let mut file = yaml::RuleFile::new(alerts);
    file.group(Group::Incidents);
    file.record("livekit_canary:incident_open:live", INCIDENT_OPEN);
    add_alerts(&mut file, alerts, Group::Incidents);
    file.group(Group::Batches);
    for pace in Pace::ALL {
        file.record(&pace.series(), &interval_of_target(*pace));
    }
    file.record("livekit_canary:slo_objective:ratio", OBJECTIVE);
    let [effective, mean] =
        [Pace::Effective, Pace::Mean].map(|pace| classes(config, pace, longest_batch, now));
    let add_records = |file: &mut yaml::RuleFile<'_>, records: &[RecordingRule]| {
        for record in records {
            let classes = match record.window.pace() {
                Pace::Effective => &effective,
                Pace::Mean => &mean,
            };
            file.record(&record_name(record), &by_class(record, classes, alerts));
        }
    };
    add_records(&mut file, FAST);
    add_alerts(&mut file, alerts, Group::Batches);
    file.group(Group::Slow);
    add_records(&mut file, SLOW);
    file.record(
        "livekit_canary:failures_by_livekit:page",
        BY_LIVEKIT_OUTSIDE,
    );
    for (name, counter) in [
        ("slo_eligible", ELIGIBLE),
        ("slo_good", GOOD),
        ("slo_bad_batches", BAD_BATCHES),
    ] {
        let expr = counter.replace("$w", &yaml::duration(alerts.slo_window));
        file.record(&format!("livekit_canary:{name}:slo_window"), &expr);
    }
    file.record("livekit_canary:slo_error_budget_left:ratio", BUDGET_LEFT);
    add_alerts(&mut file, alerts, Group::Slow);
    file.text
}

fn add_alerts(file: &mut yaml::RuleFile<'_>, alerts: &Alerts, group: Group) {
    for alert in ALERTS.iter().filter(|alert| alert.group == group) {
        file.alert(alert, &alert.expr(alerts));
    }
}

/// The interval of every target that is not paused. It stays for an hour after the last scrape, so that an alert about an
/// outage does not end if the daemon dies during the outage.
fn interval_of_target(pace: Pace) -> String {
    format!(
        "max without (instance, pod) (last_over_time(livekit_canary_batch_interval_{}_seconds[1h]))\n\
         unless max without (instance, pod) (livekit_canary_target_paused) == 1",
        pace.label()
    )
}

/// What a canary shows now, over all of its pods: an old and a new one may both be scraped for a while. A canary that has just
/// started shows NaN until it has read its history. The record has no pod, so its last value is the latest one of any pod.
const INCIDENT_OPEN: &str = "max without (instance, pod) (livekit_canary_incident_open >= 0)";

/// Without the service levels that the settings rule out, whose objective is NaN.
const OBJECTIVE: &str =
    "max without (instance, pod) (last_over_time(livekit_canary_slo_objective_ratio[1h])) > 0";

const BUDGET_LEFT: &str = "\
1 - (1 - livekit_canary:slo_good:slo_window / (livekit_canary:slo_eligible:slo_window > 0.5))
  / (1 - livekit_canary:slo_objective:ratio)";

/// The upper bounds of the interval classes, ascending.
fn classes(
    config: &Config,
    pace: Pace,
    longest_batch: fn(&Target, &Project) -> Duration,
    now: DateTime<Utc>,
) -> Vec<Duration> {
    let ladder = LADDER.map(Duration::from_mins);
    let own = config.targets.values().filter_map(|target| {
        let longest_batch = longest_batch(target, &config.projects[&target.project]);
        pace.of(&target.schedule, longest_batch, now)
    });
    // Rounded up to whole seconds: a mean is seldom whole.
    let own = own.map(|interval| {
        let part = u64::from(interval.subsec_nanos() > 0);
        Duration::from_secs(interval.as_secs() + part)
    });
    let all: BTreeSet<Duration> = ladder.into_iter().chain(own).collect();
    let longest = max_watched_interval(&config.alerts);
    all.into_iter()
        .filter(|class| pace == Pace::Effective || *class <= longest)
        .collect()
}

/// The expression of a recording rule: one line per class, each over its own window. Classes with equal windows share one.
fn by_class(record: &RecordingRule, classes: &[Duration], alerts: &Alerts) -> String {
    let length = |class: &Duration| record.window.length(*class, alerts);
    let interval = record.window.pace().series();
    let mut above = None;
    let mut lines = Vec::new();
    for class in classes.chunk_by(|one, next| length(one) == length(next)) {
        let up_to = class.last().expect("a chunk is not empty");
        let lower = above.map_or_else(String::new, |above: Duration| {
            format!(" > {}", above.as_secs_f64())
        });
        above = Some(*up_to);
        let counted = record.expr.replace("$w", &yaml::duration(length(up_to)));
        let matching = if record.labels.is_empty() {
            String::new()
        } else {
            format!(" ignoring ({})", record.labels)
        };
        lines.push(format!(
            "{counted}\n  and{matching} ({interval}{lower} <= {})",
            up_to.as_secs_f64()
        ));
    }
    lines.join("\nor\n")
}
