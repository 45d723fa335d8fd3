//! Every alert: when it fires, how urgent that is, and what to do.

use std::time::Duration;

use url::Url;

use super::window::{MINUTE, PAGE_WINDOW, TICKET_WINDOW};
use crate::config::Alerts;

/// The value of the label `component`, by which routes tell these alerts from others.
pub(super) const COMPONENT: &str = "livekit-canary";

/// How soon somebody must look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Severity {
    Page,
    Ticket,
}

impl Severity {
    /// The key of the setting that holds this severity's label value.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// One alert rule.
#[derive(Debug, Clone, Copy)]
pub struct Alert {
    pub name: &'static str,
    pub severity: Severity,
    /// How long its expression must hold.
    pub(super) lasting: Duration,
    /// Evaluated with the records over hours and days.
    pub(super) slow: bool,
    pub(super) summary: &'static str,
    /// What to do.
    pub remedy: &'static str,
    condition: Condition,
}

#[derive(Debug, Clone, Copy)]
enum Condition {
    /// Two batches bad, and fewer than half as many good probes as the objective asks for.
    Outage {
        slis: &'static str,
        own: bool,
    },
    Burn(BurnRate),
    /// As it stands.
    Plain(&'static str),
}

/// A burn of the error budget that would spend it before the window of the objectives ends.
#[derive(Debug, Clone, Copy)]
struct BurnRate {
    window: &'static str,
    /// Of records with this window's classes, the length where batches are frequent.
    length: Duration,
    /// The share of the error budget that a window of that length spends.
    share: f64,
    bad_batches: &'static str,
}

/// Fewer probes than that tell nothing of a rate.
const MIN_SAMPLES: &str = "19.5";

impl Alert {
    /// The address of this alert's section in the runbook.
    pub(super) fn runbook(&self, alerts: &Alerts) -> Url {
        let mut url = alerts.runbook_base_url.clone();
        url.set_fragment(Some(&self.name.to_ascii_lowercase()));
        url
    }

    /// The expression. Counts are compared with a half between them: `increase` extrapolates, so it seldom is whole.
    pub(super) fn expr(&self, alerts: &Alerts) -> String {
        match self.condition {
            Condition::Outage { slis, own } => {
                let failing = most_fail(slis);
                let failing = if own {
                    by_livekit(&failing, "fast")
                } else {
                    failing
                };
                let outage = format!("{failing}\nand livekit_canary:slo_bad_batches:fast > 1.5");
                // A lone bad batch doesn't begin an outage, and doesn't end one either.
                let over = format!(
                    "livekit_canary:slo_eligible:fast > 0.5 unless (\n{}\n)",
                    indented(&failing)
                );
                self.latched(&outage, &over)
            }
            Condition::Burn(burn) => {
                let agents = burn.expr(alerts, "sli!=\"service\"");
                let service = burn.expr(alerts, "sli=\"service\"");
                let service = by_livekit(&service, burn.window);
                let burns = format!(
                    "(\n{}\n) or (\n{}\n)",
                    indented(&agents),
                    indented(&service)
                );
                let over = format!("livekit_canary:slo_eligible:{}_recent > 0.5", burn.window);
                self.latched(&burns, &over)
            }
            Condition::Plain(expr) => expr.to_owned(),
        }
    }

    /// Holds on while no probe says that it is over: none that counts is no recovery. `ALERTS` has what was firing at the
    /// evaluation before.
    fn latched(&self, condition: &str, over: &str) -> String {
        format!(
            "(
{}
)
or (
  max without (alertname, alertstate, severity, component)
    (ALERTS{{alertname=\"{}\", alertstate=\"firing\", component=\"{COMPONENT}\"}})
  unless (
{}
  )
  and ignoring (sli) livekit_canary:batch_interval:shortest
)",
            indented(condition),
            self.name,
            indented(&indented(over))
        )
    }
}

impl BurnRate {
    fn expr(&self, alerts: &Alerts, slis: &str) -> String {
        let Self {
            window: w,
            bad_batches,
            ..
        } = self;
        let factor = self.factor(alerts);
        format!(
            "(
  livekit_canary:slo_eligible:{w}{{{slis}}} - livekit_canary:slo_good:{w}
    > {factor} * livekit_canary:slo_eligible:{w} * (1 - livekit_canary:slo_objective:ratio)
  or
  livekit_canary:slo_good:{w}{{{slis}}} < livekit_canary:slo_eligible:{w} * livekit_canary:slo_objective:ratio / 2
)
and livekit_canary:slo_eligible:{w} > {MIN_SAMPLES}
and livekit_canary:slo_bad_batches:{w} > {bad_batches}
and livekit_canary:slo_bad_batches:{w}_recent > 0.5"
        )
    }

    /// How many times as fast as the objective allows. Never less than that: what lasts the window isn't worth a word.
    fn factor(&self, alerts: &Alerts) -> f64 {
        let windows = alerts.slo_window.as_secs_f64() / self.length.as_secs_f64();
        ((self.share * windows).max(1.0) * 100.0).round() / 100.0
    }
}

fn most_fail(slis: &str) -> String {
    format!(
        "livekit_canary:slo_good:fast{{{slis}}}
  < livekit_canary:slo_eligible:fast * livekit_canary:slo_objective:ratio / 2"
    )
}

/// Only where LiveKit or the network failed more than half of the probes that were bad: agents and limits have alerts of
/// their own.
fn by_livekit(condition: &str, window: &str) -> String {
    format!(
        "(
{}
)
and ignoring (sli) livekit_canary:failures_by_livekit:{window} > ignoring (sli)
  (livekit_canary:slo_eligible:{window}{{sli=\"service\"}} - livekit_canary:slo_good:{window}) / 2",
        indented(condition)
    )
}

fn indented(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(|line| format!("  {line}")).collect();
    lines.join("\n")
}

/// In the order of the table in `docs/alerts.md`.
pub const ALERTS: &[Alert] = &[
    Alert {
        name: "AgentFailing",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: the agent fails most calls ({{ $labels.sli }})",
        remedy: "See which reason the failed rooms have, on the status page or in probe_failures_total, and look it up in \
                 the table of reasons; read the agent's log for these rooms.",
        condition: Condition::Outage {
            slis: "sli!=\"service\"",
            own: false,
        },
    },
    Alert {
        name: "ServiceFailing",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: LiveKit or the way to it fails most calls",
        remedy: "See which step fails by the reasons of the failed rooms; check LiveKit's status and the network between \
                 the canary and LiveKit. Nothing is said about the agent.",
        condition: Condition::Outage {
            slis: "sli=\"service\"",
            own: true,
        },
    },
    Alert {
        name: "ErrorBudgetBurnsFast",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        slow: true,
        summary: "{{ $labels.target }}: {{ $labels.sli }} falls short of its objective, fast",
        remedy: "Some calls fail, again and again: compare failed rooms with good ones in the history (first room or \
                 later, time of day, reason), then as for AgentFailing or, for service, ServiceFailing.",
        condition: Condition::Burn(BurnRate {
            window: "page",
            length: PAGE_WINDOW,
            share: 0.05,
            bad_batches: "3.5",
        }),
    },
    Alert {
        name: "ErrorBudgetBurnsSlowly",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        slow: true,
        summary: "{{ $labels.target }}: {{ $labels.sli }} falls short of its objective",
        remedy: "The same, within working hours.",
        condition: Condition::Burn(BurnRate {
            window: "ticket",
            length: TICKET_WINDOW,
            share: 0.1,
            bad_batches: "2.5",
        }),
    },
    Alert {
        name: "ErrorBudgetSpent",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        slow: true,
        summary: "{{ $labels.target }}: {{ $labels.sli }} misses its objective over the whole window",
        remedy: "Put reliability first until the window has moved on, or choose an objective that can be met.",
        condition: Condition::Plain(
            "livekit_canary:slo_error_budget_left:ratio <= 0
and livekit_canary:slo_eligible:slo_window > 99.5
and livekit_canary:slo_bad_batches:slo_window > 2.5
and ignoring (sli) livekit_canary:batch_interval:mean",
        ),
    },
    Alert {
        name: "CanaryBlind",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: batches run, and none says anything of the agent",
        remedy: "See what the rooms fail of: wrong settings, LiveKit, the network, limits or the canary itself. Until that is \
                 repaired an outage of the agent would not be seen.",
        condition: Condition::Plain(
            "(
  sum without (result) (livekit_canary:batches:fast{result!~\"aborted|limited\"}) > 1.5
  and ignoring (sli) livekit_canary:slo_eligible:fast{sli=\"availability\"} < 0.5
)
or (
  livekit_canary:ticks_limited:page > 19.5
  and ignoring (sli) livekit_canary:slo_eligible:page{sli=\"availability\"} < 0.5
)",
        ),
    },
    Alert {
        name: "CredentialsRejected",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: LiveKit rejects the canary's credentials",
        remedy: "Set the project's key and secret to a valid pair and reload; check that they belong to this URL, and the \
                 host's clock. Find out whether the agents' credentials were changed as well.",
        condition: Condition::Plain(
            "livekit_canary:credentials_rejected:fast > 1.5
and ignoring (result) livekit_canary:batches:fast{result=\"failed\"} > 1.5",
        ),
    },
    Alert {
        name: "PlanLimitHit",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: LiveKit named a limit ({{ $labels.limit }})",
        remedy: "Compare the plan's limit with what callers and the canary use together; lower batch.rooms or raise the \
                 plan.",
        condition: Condition::Plain("livekit_canary:limit_rejections:lately > 0.5"),
    },
    Alert {
        name: "PlanLimitHit",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: the limit on {{ $labels.limit }} persists: callers fail as well",
        remedy: "Raise the plan, or end what uses it up. Pausing the target gives its share back to callers.",
        condition: Condition::Plain(
            "livekit_canary:limit_rejections:lately{limit=~\"agent_sessions|connections|inference|quota\"} > 0.5
and ignoring (limit) livekit_canary:batches_limited:lately > 1.5
and ignoring (limit) livekit_canary:ticks_limited:persisting > 2.5",
        ),
    },
    Alert {
        name: "CanarySilent",
        severity: Severity::Page,
        lasting: MINUTE,
        slow: false,
        summary: "{{ $labels.target }}: a batch is overdue",
        remedy: "The schedule ticks no more: read the canary's log, keep it for a report, and restart the canary.",
        condition: Condition::Plain(
            "time() - max without (instance, pod) (livekit_canary_next_batch_timestamp_seconds) > 120
unless max without (instance, pod) (livekit_canary_target_paused) == 1",
        ),
    },
    Alert {
        name: "CanaryStuck",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: a batch does not end, and holds the next ones back",
        remedy: "Where `check` warns that a batch may outlast its interval, make the interval longer; else keep the log for \
                 a report and restart the canary.",
        condition: Condition::Plain(
            "livekit_canary:batches_skipped:fast{cause=\"overlap\"} > 1.5
and ignoring (cause) sum without (result) (livekit_canary:batches:fast) < 0.5",
        ),
    },
    Alert {
        name: "CanaryAbsent",
        severity: Severity::Page,
        lasting: Duration::from_mins(10),
        slow: false,
        summary: "No canary is scraped that was, or none at all",
        remedy: "See whether the canary was deployed, and whether Prometheus still finds it.",
        condition: Condition::Plain(
            "(
  group without (instance, pod, version, revision, rustc, engine) (last_over_time(livekit_canary_build_info[1d]))
  unless group without (instance, pod, version, revision, rustc, engine) (livekit_canary_build_info)
  unless on (job) up == 0
)
or absent(last_over_time(livekit_canary_build_info[1d]))",
        ),
    },
    Alert {
        name: "CanaryDown",
        severity: Severity::Page,
        lasting: Duration::from_mins(5),
        slow: false,
        summary: "The canary of job {{ $labels.job }} answers no scrape",
        remedy: "See whether it runs, and its log; then the network and the credentials between it and Prometheus.",
        condition: Condition::Plain(
            "max without (instance, pod) (up == 0 and on (job, instance) last_over_time(livekit_canary_build_info[1d]))",
        ),
    },
    Alert {
        name: "CanaryCrashLooping",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        slow: false,
        summary: "The canary of job {{ $labels.job }} starts again and again",
        remedy: "Read why in the end of its log, and that of whatever starts it: settings, the history's disk, memory.",
        condition: Condition::Plain(
            "max without (instance, pod) (
  changes(process_start_time_seconds[30m]) and on (job, instance) last_over_time(livekit_canary_build_info[30m])
) > 2.5",
        ),
    },
    Alert {
        name: "AgentTimeSpent",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: no batch, the budget of agent time is spent",
        remedy: "It goes on with the next UTC day or month. `check` tells what the schedules come to: raise the budget, or \
                 lower rooms, hold or frequency.",
        condition: Condition::Plain("livekit_canary:batches_skipped:fast{cause=\"budget\"} > 0.5"),
    },
    Alert {
        name: "BackingOff",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: batches rest after a plan limit",
        remedy: "As for PlanLimitHit; until the rest is over, less is measured.",
        condition: Condition::Plain("livekit_canary:batches_skipped:fast{cause=\"backoff\"} > 0.5"),
    },
    Alert {
        name: "ReloadFailed",
        severity: Severity::Ticket,
        lasting: Duration::from_mins(5),
        slow: false,
        summary: "The canary of job {{ $labels.job }} refused its new settings and runs on with the old ones",
        remedy: "`check --config` names what is wrong, as the log does; correct it and reload.",
        condition: Condition::Plain(
            "max without (instance, pod) (livekit_canary_config_last_reload_successful) == 0",
        ),
    },
    Alert {
        name: "HistoryDegraded",
        severity: Severity::Ticket,
        lasting: Duration::from_mins(5),
        slow: false,
        summary: "The canary of job {{ $labels.job }} can't write its history",
        remedy: "Check the disk under history.dir: full, read-only or slow. Probing goes on; the budget is kept in memory \
                 alone.",
        condition: Condition::Plain("max without (instance, pod) (livekit_canary_history_degraded) == 1"),
    },
    Alert {
        name: "RoomsLeaking",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        slow: false,
        summary: "{{ $labels.target }}: rooms could not be deleted",
        remedy: "The log names them: delete what is left, and see why DeleteRoom failed. The next start of the canary looks \
                 for them again.",
        condition: Condition::Plain(
            "sum without (instance, pod) (increase(livekit_canary_rooms_leaked_total[2h])) > 0.5",
        ),
    },
    Alert {
        name: "InternalErrors",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        slow: false,
        summary: "The canary of job {{ $labels.job }} had a fault of its own ({{ $labels.kind }})",
        remedy: "Report it with the log.",
        condition: Condition::Plain(
            "sum without (instance, pod) (increase(livekit_canary_internal_errors_total[2h])) > 0.5",
        ),
    },
];
