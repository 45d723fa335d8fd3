//! The recording rules: what is counted, and over which window.

use super::window::RuleWindow;

/// One recording rule.
pub(super) struct RecordingRule {
    pub(super) name: &'static str,
    pub(super) window: RuleWindow,
    /// The labels of its series in addition to those of a target.
    pub(super) labels: &'static str,
    /// The PromQL expression, with `$w` in place of the window.
    pub(super) expr: &'static str,
}

/// The name of the series, such as `livekit_canary:slo_eligible:fast`.
pub(super) fn record_name(record: &RecordingRule) -> String {
    format!("livekit_canary:{}:{}", record.name, record.window.label())
}

const fn counted(
    name: &'static str,
    window: RuleWindow,
    labels: &'static str,
    expr: &'static str,
) -> RecordingRule {
    RecordingRule {
        name,
        window,
        labels,
        expr,
    }
}

pub(super) const ELIGIBLE: &str =
    "sum without (instance, pod) (increase(livekit_canary_slo_eligible_total[$w]))";
pub(super) const GOOD: &str =
    "sum without (instance, pod) (increase(livekit_canary_slo_good_total[$w]))";
pub(super) const BAD_BATCHES: &str =
    "sum without (instance, pod) (increase(livekit_canary_slo_bad_batches_total[$w]))";
const BY_LIVEKIT: &str = "sum without (instance, pod, reason, origin) \
     (increase(livekit_canary_probe_failures_total{origin=~\"livekit|network\"}[$w]))";
const TICKS_LIMITED: &str = "sum without (instance, pod, result) \
     (increase(livekit_canary_batches_total{result=\"limited\"}[$w])) + sum without (instance, pod, cause) \
     (increase(livekit_canary_batches_skipped_total{cause=\"backoff\"}[$w]))";

pub(super) const FAST: &[RecordingRule] = &[
    counted("slo_eligible", RuleWindow::Fast, "sli", ELIGIBLE),
    counted("slo_good", RuleWindow::Fast, "sli", GOOD),
    counted("slo_bad_batches", RuleWindow::Fast, "sli", BAD_BATCHES),
    counted("failures_by_livekit", RuleWindow::Fast, "", BY_LIVEKIT),
    counted(
        "credentials_rejected",
        RuleWindow::Fast,
        "",
        "sum without (instance, pod, reason, origin) \
         (increase(livekit_canary_probe_failures_total{reason=\"auth_rejected\"}[$w]))",
    ),
    counted(
        "batches",
        RuleWindow::Fast,
        "result",
        "sum without (instance, pod) (increase(livekit_canary_batches_total[$w]))",
    ),
    counted(
        "batches_skipped",
        RuleWindow::Fast,
        "cause",
        "sum without (instance, pod) (increase(livekit_canary_batches_skipped_total[$w]))",
    ),
    counted("ticks_limited", RuleWindow::Persisting, "", TICKS_LIMITED),
    counted(
        "batches_limited",
        RuleWindow::Lately,
        "",
        "sum without (instance, pod, result) (increase(livekit_canary_batches_total{result=\"limited\"}[$w]))",
    ),
    counted(
        "limit_rejections",
        RuleWindow::Lately,
        "limit",
        "sum without (instance, pod) (increase(livekit_canary_plan_limit_rejections_total[$w]))",
    ),
];

pub(super) const SLOW: &[RecordingRule] = &[
    counted("slo_eligible", RuleWindow::Page, "sli", ELIGIBLE),
    counted("slo_good", RuleWindow::Page, "sli", GOOD),
    counted("slo_bad_batches", RuleWindow::Page, "sli", BAD_BATCHES),
    counted("failures_by_livekit", RuleWindow::Page, "", BY_LIVEKIT),
    counted("ticks_limited", RuleWindow::Page, "", TICKS_LIMITED),
    counted("slo_eligible", RuleWindow::PageRecent, "sli", ELIGIBLE),
    counted(
        "slo_bad_batches",
        RuleWindow::PageRecent,
        "sli",
        BAD_BATCHES,
    ),
    counted("slo_eligible", RuleWindow::Ticket, "sli", ELIGIBLE),
    counted("slo_good", RuleWindow::Ticket, "sli", GOOD),
    counted("slo_bad_batches", RuleWindow::Ticket, "sli", BAD_BATCHES),
    counted("failures_by_livekit", RuleWindow::Ticket, "", BY_LIVEKIT),
    counted("slo_eligible", RuleWindow::TicketRecent, "sli", ELIGIBLE),
    counted(
        "slo_bad_batches",
        RuleWindow::TicketRecent,
        "sli",
        BAD_BATCHES,
    ),
];
