//! The text of a rule file. It is written without a YAML serializer, which could not write comments and readable blocks.

use std::fmt::Write as _;
use std::time::Duration;

use super::catalogue::{Alert, COMPONENT, Group, Severity};
use crate::config::Alerts;

const DAY: Duration = Duration::from_hours(24);

/// A Prometheus rule file that is being written.
pub(super) struct RuleFile<'a> {
    alerts: &'a Alerts,
    pub(super) text: String,
}

impl<'a> RuleFile<'a> {
    pub(super) fn new(alerts: &'a Alerts) -> Self {
        // Prometheus deletes whole blocks: the one that contains the start of the window must still exist.
        let kept = duration(alerts.slo_window + DAY);
        Self {
            alerts,
            text: format!(
                "# Alert rules for livekit-canary, printed by `livekit-canary rules`. To change them, change the settings, not this file.
#
# The rules need Prometheus 2.42 or later. It must retain its data for {kept} (--storage.tsdb.retention.time={kept}) and
# scrape the canary at least every {}. Recorded series and alerts have the labels of the scrape, excluding instance
# and pod, so that the series continue when a new pod replaces an old one.
#
# The rules cover targets with a batch at least every three hours, and the targets of the settings.
#
# Windows are a multiple of a target's interval. PromQL can't take a window from a series, so each line of a record covers
# the targets of one class of intervals. Everything else that differs per target comes from the target's series.
groups:
",
                duration(alerts.scrape_interval)
            ),
        }
    }

    pub(super) fn group(&mut self, group: Group) {
        self.line(&format!("- name: {}", group.name()));
        if let Some(interval) = group.interval() {
            self.line(&format!("  interval: {}", duration(interval)));
        }
        self.line("  rules:");
    }

    pub(super) fn record(&mut self, name: &str, expr: &str) {
        self.line(&format!("  - record: {name}"));
        self.expr(expr);
    }

    pub(super) fn alert(&mut self, alert: &Alert, expr: &str) {
        self.line(&format!("  - alert: {}", alert.name));
        self.expr(expr);
        if alert.lasting > Duration::ZERO {
            self.line(&format!("    for: {}", duration(alert.lasting)));
        }
        let severity = match alert.severity {
            Severity::Page => &self.alerts.page,
            Severity::Ticket => &self.alerts.ticket,
        };
        let labels = [("severity", severity.as_str()), ("component", COMPONENT)];
        let runbook = alert.runbook(self.alerts);
        let (summary, description) = (alert.summary(), alert.description());
        let annotations = [
            ("summary", summary.as_str()),
            ("description", description.as_str()),
            ("runbook_url", runbook.as_str()),
        ];
        for (block, entries) in [("labels", &labels[..]), ("annotations", &annotations[..])] {
            self.line(&format!("    {block}:"));
            for (key, value) in entries {
                // A JSON string is also a valid YAML string.
                let value = serde_json::Value::from(*value);
                self.line(&format!("      {key}: {value}"));
            }
        }
    }

    fn expr(&mut self, expr: &str) {
        self.line("    expr: |-");
        for line in expr.lines() {
            self.line(&format!("      {line}"));
        }
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }
}

/// A duration in the notation of Prometheus, such as `1h30m`.
pub(super) fn duration(duration: Duration) -> String {
    const UNITS: [(&str, u128); 5] = [
        ("d", 86_400_000),
        ("h", 3_600_000),
        ("m", 60_000),
        ("s", 1000),
        ("ms", 1),
    ];
    let mut left = duration.as_millis();
    let mut text = String::new();
    for (unit, length) in UNITS {
        if left >= length {
            write!(text, "{}{unit}", left / length).expect("writing to a string can't fail");
            left %= length;
        }
    }
    text
}
