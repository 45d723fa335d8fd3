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
    "sum without (instance, pod, in_incident) (increase(livekit_canary_slo_eligible_total[$w]))";
pub(super) const GOOD: &str =
    "sum without (instance, pod, in_incident) (increase(livekit_canary_slo_good_total[$w]))";
pub(super) const BAD_BATCHES: &str =
    "sum without (instance, pod, in_incident) (increase(livekit_canary_slo_bad_batches_total[$w]))";
/// An outage pages by its incident, so the burn rate that pages does not count what ended during one.
const ELIGIBLE_OUTSIDE: &str = "sum without (instance, pod, in_incident) \
     (increase(livekit_canary_slo_eligible_total{in_incident=\"false\"}[$w]))";
const GOOD_OUTSIDE: &str = "sum without (instance, pod, in_incident) \
     (increase(livekit_canary_slo_good_total{in_incident=\"false\"}[$w]))";
const BAD_BATCHES_OUTSIDE: &str = "sum without (instance, pod, in_incident) \
     (increase(livekit_canary_slo_bad_batches_total{in_incident=\"false\"}[$w]))";
/// Rooms with a verdict on the agent.
const AGENT_VERDICTS: &str = "sum without (instance, pod, in_incident, sli) \
     (increase(livekit_canary_slo_eligible_total{sli=\"availability\"}[$w]))";
const BY_LIVEKIT: &str = "sum without (instance, pod, purpose, reason, origin) \
     (increase(livekit_canary_probe_failures_total{purpose=\"scheduled\", origin=~\"livekit|network\"}[$w]))";
const BY_LIMIT: &str = "sum without (instance, pod, purpose, reason, origin) \
     (increase(livekit_canary_probe_failures_total{purpose=\"scheduled\", origin=\"limit\"}[$w]))";
/// The counter of failures does not show whether an incident was open. Only failures of LiveKit, of the network and of limits
/// count towards the service and not towards the agent's availability. Computed from records, because their windows are long and
/// thus expensive.
pub(super) const BY_LIVEKIT_OUTSIDE: &str = "\
livekit_canary:slo_eligible:page{sli=\"service\"}
  - ignoring (sli) livekit_canary:slo_eligible:page{sli=\"availability\"}
  - ignoring (sli) livekit_canary:failures_by_limit:page";
const BATCHES_LIMITED: &str = "sum without (instance, pod, purpose, result) \
     (increase(livekit_canary_batches_total{purpose=\"scheduled\", result=\"limited\"}[$w]))";
const TICKS_LIMITED: &str = "sum without (instance, pod, purpose, result) \
     (increase(livekit_canary_batches_total{purpose=\"scheduled\", result=\"limited\"}[$w]))\n  \
     + sum without (instance, pod, cause) (increase(livekit_canary_batches_skipped_total{cause=\"backoff\"}[$w]))";

pub(super) const FAST: &[RecordingRule] = &[
    counted("agent_verdicts", RuleWindow::Fast, "", AGENT_VERDICTS),
    counted(
        "credentials_rejected",
        RuleWindow::Fast,
        "",
        "sum without (instance, pod, purpose, reason, origin) \
         (increase(livekit_canary_probe_failures_total{purpose=\"scheduled\", reason=\"auth_rejected\"}[$w]))",
    ),
    counted(
        "batches",
        RuleWindow::Fast,
        "result",
        "sum without (instance, pod, purpose) (increase(livekit_canary_batches_total{purpose=\"scheduled\"}[$w]))",
    ),
    counted(
        "batches_skipped",
        RuleWindow::Fast,
        "cause",
        "sum without (instance, pod) (increase(livekit_canary_batches_skipped_total[$w]))",
    ),
    counted("ticks_limited", RuleWindow::Persisting, "", TICKS_LIMITED),
    counted("batches_limited", RuleWindow::Lately, "", BATCHES_LIMITED),
    counted(
        "limit_rejections",
        RuleWindow::Lately,
        "limit",
        "sum without (instance, pod) (increase(livekit_canary_plan_limit_rejections_total[$w]))",
    ),
];

pub(super) const SLOW: &[RecordingRule] = &[
    counted("slo_eligible", RuleWindow::Page, "sli", ELIGIBLE_OUTSIDE),
    counted("slo_good", RuleWindow::Page, "sli", GOOD_OUTSIDE),
    counted(
        "slo_bad_batches",
        RuleWindow::Page,
        "sli",
        BAD_BATCHES_OUTSIDE,
    ),
    counted("failures_by_limit", RuleWindow::Page, "", BY_LIMIT),
    counted("agent_verdicts", RuleWindow::Page, "", AGENT_VERDICTS),
    counted("ticks_limited", RuleWindow::Page, "", TICKS_LIMITED),
    counted(
        "slo_eligible",
        RuleWindow::PageRecent,
        "sli",
        ELIGIBLE_OUTSIDE,
    ),
    counted(
        "slo_bad_batches",
        RuleWindow::PageRecent,
        "sli",
        BAD_BATCHES_OUTSIDE,
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
