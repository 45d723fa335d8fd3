//! Every alert: its condition, its severity and what to do. `docs/alerts.md` has a section for each.

use std::time::Duration;

use url::Url;

use super::window::{MINUTE, PAGE_WINDOW, TICKET_WINDOW};
use crate::config::Alerts;

/// The value of the label `component`, which lets Alertmanager's routes select these alerts.
pub(super) const COMPONENT: &str = "livekit-canary";

/// How urgent an alert is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Severity {
    /// Needs attention at once.
    Page,
    /// Can wait for working hours.
    Ticket,
}

impl Severity {
    /// The key of the setting that holds this severity's label value.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Rules that Prometheus evaluates together, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// What the canary has decided itself, and what must page at once.
    Incidents,
    /// Counts of the latest batches.
    Batches,
    /// Counts of hours and days, which change slowly and are expensive.
    Slow,
}

impl Group {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Incidents => "livekit-canary-incidents",
            Self::Batches => "livekit-canary",
            Self::Slow => "livekit-canary-slow",
        }
    }

    /// How often the group is evaluated; `None`: as the settings of Prometheus require.
    pub(super) fn interval(self) -> Option<Duration> {
        match self {
            Self::Incidents => Some(Duration::from_secs(15)),
            Self::Batches => None,
            Self::Slow => Some(2 * MINUTE),
        }
    }
}

/// One alert rule.
#[derive(Debug, Clone, Copy)]
pub struct Alert {
    pub name: &'static str,
    pub severity: Severity,
    /// How long the expression must hold before the alert fires.
    pub(super) lasting: Duration,
    pub(super) group: Group,
    /// What happened, in one line.
    summary: &'static str,
    /// What to do.
    remedy: &'static str,
    condition: Condition,
}

/// How the expression of an alert is built.
#[derive(Debug, Clone, Copy)]
enum Condition {
    /// The canary has an open incident of this fault.
    Incident { fault: &'static str },
    /// The error budget burns too fast.
    Burn(BurnRate),
    /// A complete expression.
    Plain(&'static str),
}

/// A rate of failures that would spend the error budget before the SLO window ends.
#[derive(Debug, Clone, Copy)]
struct BurnRate {
    window: &'static str,
    /// Length of the window for targets with frequent batches; rarer batches have longer windows.
    length: Duration,
    /// The share of the error budget that must be spent within that length.
    share: f64,
    bad_batches: &'static str,
}

// Annotations read what changes during an incident by a query. As labels, these values would make each change a new alert.
// A query finds nothing while the canary is down, so each part is left out then.

/// Sets `$of` to the label matchers of the alert's target, with the labels of the scrape.
const OF_TARGET: &str = "{{ $of := \"\" }}{{ range $label, $value := $labels }}\
     {{ if not (match \"^(__name__|fault)$\" $label) }}{{ $of = printf \"%s%s=%q,\" $of $label $value }}{{ end }}{{ end }}";
const SHARE_OF_INCIDENT: &str = "{{ with query (printf \"livekit_canary_incident_info{%s}\" $of) }}{{ with first . }}\
     {{ if .Labels.share }}: {{ .Labels.share }} of its rooms{{ end }}{{ if .Labels.reason }}, mostly {{ .Labels.reason }}{{ end }}\
     {{ end }}{{ end }}";
/// The state can be unknown during an incident. Then it does not show how long the incident has lasted.
const SINCE: &str = "{{ with query (printf \"livekit_canary_target_state_since_timestamp_seconds{%s} \
     and ignoring (state) livekit_canary_target_state{%sstate=\\\"failing\\\"} == 1\" $of $of) }}\
     , since {{ (. | first | value | toTime).UTC.Format \"2006-01-02 15:04:05 UTC\" }}{{ end }}";
const DIFFERENCE: &str = "{{ with query (printf \"livekit_canary_incident_info{%s}\" $of) }}{{ with first . }}\
     {{ if .Labels.differs }}What differs: {{ .Labels.differs }}. {{ end }}{{ end }}{{ end }}";
const ADDRESS: &str = "{{ with query (printf \"livekit_canary_incident_info{%s}\" $of) }}{{ with first . }}\
     {{ if .Labels.url }} The incident: {{ .Labels.url }}{{ end }}{{ end }}{{ end }}";

/// A rate over fewer probes than this is not significant.
const MIN_SAMPLES: &str = "19.5";

impl Alert {
    /// The address of this alert's section in the runbook.
    pub(super) fn runbook(&self, alerts: &Alerts) -> Url {
        let mut url = alerts.runbook_base_url.clone();
        url.set_fragment(Some(&self.name.to_ascii_lowercase()));
        url
    }

    /// The annotation `summary`: what happened, and of an incident since when, for which reason, and how many rooms fail.
    pub(super) fn summary(&self) -> String {
        match self.condition {
            Condition::Incident { .. } => {
                format!("{OF_TARGET}{}{SHARE_OF_INCIDENT}{SINCE}", self.summary)
            }
            Condition::Burn(_) | Condition::Plain(_) => self.summary.to_owned(),
        }
    }

    /// The annotation `description`: what to do, and of an incident what differs and where its details are.
    pub(super) fn description(&self) -> String {
        match self.condition {
            Condition::Incident { .. } => {
                format!("{OF_TARGET}{DIFFERENCE}{}{ADDRESS}", self.remedy)
            }
            Condition::Burn(_) | Condition::Plain(_) => self.remedy.to_owned(),
        }
    }

    /// The PromQL expression. Thresholds of counts are halves, such as 1.5 for "at least two": `increase` extrapolates, so
    /// its result is seldom a whole number.
    pub(super) fn expr(&self, alerts: &Alerts) -> String {
        match self.condition {
            // The last value within an hour, which is the current one while the canary answers: a canary that dies during an
            // outage must not end the alert. Only if it answers and no longer has the target, the incident is gone.
            Condition::Incident { fault } => {
                let last = format!(
                    "last_over_time(livekit_canary:incident_open:live{{fault=\"{fault}\"}}[1h])"
                );
                format!(
                    "(
  {last}
    and ignoring (fault) max without (instance, pod) (livekit_canary_target_paused)
  or
  {last}
    unless ignoring (fault, target) group without (instance, pod, version, revision, rustc, engine)
      (livekit_canary_build_info)
) == 1"
                )
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

    /// Keeps the alert firing until probes show that the condition is over: a lack of probes is not a recovery. The series
    /// `ALERTS` holds what was firing at the previous evaluation.
    ///
    /// Without an objective no probe will ever count, so the alert would stay for good: the settings no longer expect what
    /// it is about.
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
  and ignoring (sli) livekit_canary:batch_interval:effective
  and livekit_canary:slo_objective:ratio
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

    /// How many times faster than the objective allows the budget must burn. At least 1: at a lower rate the budget lasts
    /// for the whole window.
    fn factor(&self, alerts: &Alerts) -> f64 {
        let windows = alerts.slo_window.as_secs_f64() / self.length.as_secs_f64();
        ((self.share * windows).max(1.0) * 100.0).round() / 100.0
    }
}

/// Restricts a condition to cases in which LiveKit or the network caused more than half of the bad probes. Agents and
/// limits have their own alerts.
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
        group: Group::Incidents,
        summary: "{{ $labels.target }}: the agent fails",
        remedy: "Look up the reason in docs/reasons.md, and read the agent's log for the failed rooms. If the agent was deployed \
                 just before, roll it back.",
        condition: Condition::Incident { fault: "agent" },
    },
    Alert {
        name: "ServiceFailing",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        group: Group::Incidents,
        summary: "{{ $labels.target }}: LiveKit or the network fails",
        remedy: "The reason shows which step fails. Check LiveKit's status and the network between the canary and LiveKit. \
                 This alert says nothing about the agent.",
        condition: Condition::Incident { fault: "service" },
    },
    Alert {
        name: "ErrorBudgetBurnsFast",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        group: Group::Slow,
        summary: "{{ $labels.target }}: {{ $labels.sli }} misses its objective, and the error budget burns fast",
        remedy: "Some calls fail repeatedly. Compare failed rooms with good ones in the history: first room or later, time of \
                 day, reason. Then continue as for AgentFailing or, if sli is service, as for ServiceFailing.",
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
        group: Group::Slow,
        summary: "{{ $labels.target }}: {{ $labels.sli }} misses its objective, and the error budget burns slowly",
        remedy: "Proceed as for ErrorBudgetBurnsFast, within working hours.",
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
        group: Group::Slow,
        summary: "{{ $labels.target }}: {{ $labels.sli }} missed its objective over the whole SLO window",
        remedy: "Put reliability first until the bad batches leave the window, or choose an objective that can be met.",
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
        group: Group::Batches,
        summary: "{{ $labels.target }}: batches run, but none gives a verdict on the agent",
        remedy: "Find out why the rooms fail: wrong settings, LiveKit, the network, limits or the canary itself. Until then, \
                 the canary can't detect an outage of the agent.",
        condition: Condition::Plain(
            "(
  sum without (result) (livekit_canary:batches:fast{result!~\"aborted|limited\"}) > 1.5
  and livekit_canary:agent_verdicts:fast < 0.5
)
or (
  livekit_canary:ticks_limited:page > 19.5
  and livekit_canary:agent_verdicts:page < 0.5
)",
        ),
    },
    Alert {
        name: "CredentialsRejected",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        group: Group::Batches,
        summary: "{{ $labels.target }}: LiveKit rejects the canary's credentials",
        remedy: "Set the project's key and secret to a valid pair, and reload. Check that they belong to this URL, and check \
                 the host's clock. Find out whether the agents' credentials were changed as well.",
        condition: Condition::Plain(
            "livekit_canary:credentials_rejected:fast > 1.5
and ignoring (result) livekit_canary:batches:fast{result=\"failed\"} > 1.5",
        ),
    },
    Alert {
        name: "PlanLimitHit",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        group: Group::Batches,
        summary: "{{ $labels.target }}: LiveKit reported a plan limit ({{ $labels.limit }})",
        remedy: "Compare the plan's limit with what callers and the canary use together. Lower batch.rooms, or raise the \
                 plan.",
        condition: Condition::Plain("livekit_canary:limit_rejections:lately > 0.5"),
    },
    Alert {
        name: "PlanLimitHit",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        group: Group::Batches,
        summary: "{{ $labels.target }}: the plan limit {{ $labels.limit }} persists, so callers fail as well",
        remedy: "Raise the plan, or end what uses it up. A paused target leaves its share to callers.",
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
        group: Group::Batches,
        summary: "{{ $labels.target }}: a batch is overdue",
        remedy: "The schedule of the canary no longer ticks. Read the canary's log, keep it for a report, and restart the canary.",
        condition: Condition::Plain(
            "time() - max without (instance, pod) (livekit_canary_next_batch_timestamp_seconds) > 120
unless max without (instance, pod) (livekit_canary_target_paused) == 1",
        ),
    },
    Alert {
        name: "CanaryStuck",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        group: Group::Batches,
        summary: "{{ $labels.target }}: a batch does not end and blocks the next ones",
        remedy: "If `check` warns that a batch may outlast its interval, make the interval longer. Otherwise keep the log for \
                 a report, and restart the canary.",
        condition: Condition::Plain(
            "livekit_canary:batches_skipped:fast{cause=\"overlap\"} > 1.5
and ignoring (cause) sum without (result) (livekit_canary:batches:fast) < 0.5",
        ),
    },
    // The end of a drill leaves no canary behind, so the next three alerts select what is no drill.
    Alert {
        name: "CanaryAbsent",
        severity: Severity::Page,
        lasting: Duration::from_mins(10),
        group: Group::Batches,
        summary: "Prometheus scrapes no canary, or no longer scrapes one of them",
        remedy: "Check whether the canary is deployed, and whether Prometheus still finds it.",
        condition: Condition::Plain(
            "(
  group without (instance, pod, version, revision, rustc, engine)
    (last_over_time(livekit_canary_build_info{drill=\"\"}[1d]))
  unless group without (instance, pod, version, revision, rustc, engine) (livekit_canary_build_info)
  unless on (job) up == 0
)
or absent(last_over_time(livekit_canary_build_info{drill=\"\"}[1d]))",
        ),
    },
    Alert {
        name: "CanaryDown",
        severity: Severity::Page,
        lasting: Duration::from_mins(5),
        group: Group::Batches,
        summary: "The canary of job {{ $labels.job }} answers no scrape",
        remedy: "Check whether the canary runs, and read its log. Then check the network and the credentials between the canary and \
                 Prometheus.",
        condition: Condition::Plain(
            "max without (instance, pod) (
  up == 0 and on (job, instance) last_over_time(livekit_canary_build_info{drill=\"\"}[1d])
)",
        ),
    },
    Alert {
        name: "CanaryCrashLooping",
        severity: Severity::Page,
        lasting: Duration::ZERO,
        group: Group::Batches,
        summary: "The canary of job {{ $labels.job }} restarts repeatedly",
        remedy: "Read the end of the canary's log and the log of its service manager. Usual causes are wrong settings, the \
                 history's disk, and memory.",
        condition: Condition::Plain(
            "max without (instance, pod) (
  changes(process_start_time_seconds[30m]) and on (job, instance) last_over_time(livekit_canary_build_info{drill=\"\"}[30m])
) > 2.5",
        ),
    },
    Alert {
        name: "AgentTimeSpent",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        group: Group::Batches,
        summary: "{{ $labels.target }}: the budget of agent time is spent, so no batch starts",
        remedy: "Batches resume with the next UTC day or month. `check` shows how much agent time the schedules need. Raise \
                 the budget, or lower rooms, hold or frequency.",
        condition: Condition::Plain("livekit_canary:batches_skipped:fast{cause=\"budget\"} > 0.5"),
    },
    Alert {
        name: "BackingOff",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        group: Group::Batches,
        summary: "{{ $labels.target }}: batches are paused after a plan limit",
        remedy: "Proceed as for PlanLimitHit. Until the pause ends, the canary measures less.",
        condition: Condition::Plain("livekit_canary:batches_skipped:fast{cause=\"backoff\"} > 0.5"),
    },
    Alert {
        name: "ReloadFailed",
        severity: Severity::Ticket,
        lasting: Duration::from_mins(5),
        group: Group::Batches,
        summary: "The canary of job {{ $labels.job }} rejected its new settings and still uses the old ones",
        remedy: "`check --config` and the canary's log name every mistake. Correct the settings, and reload.",
        condition: Condition::Plain(
            "max without (instance, pod) (livekit_canary_config_last_reload_successful) == 0",
        ),
    },
    Alert {
        name: "HistoryDegraded",
        severity: Severity::Ticket,
        lasting: Duration::from_mins(5),
        group: Group::Batches,
        summary: "The canary of job {{ $labels.job }} can't write its history",
        remedy: "Check the disk under history.dir: it may be full, read-only or slow. Probing continues, but the canary keeps \
                 the budget in memory only.",
        condition: Condition::Plain("max without (instance, pod) (livekit_canary_history_degraded) == 1"),
    },
    Alert {
        name: "RoomsLeaking",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        group: Group::Batches,
        summary: "{{ $labels.target }}: the canary could not delete rooms",
        remedy: "The canary's log names the rooms. Delete those that still exist, and find out why DeleteRoom failed. The \
                 canary looks for them again at its next start.",
        condition: Condition::Plain(
            "sum without (instance, pod) (increase(livekit_canary_rooms_leaked_total[2h])) > 0.5",
        ),
    },
    Alert {
        name: "InternalErrors",
        severity: Severity::Ticket,
        lasting: Duration::ZERO,
        group: Group::Batches,
        summary: "The canary of job {{ $labels.job }} had an internal error ({{ $labels.kind }})",
        remedy: "Report the error with the canary's log.",
        condition: Condition::Plain(
            "sum without (instance, pod) (increase(livekit_canary_internal_errors_total[2h])) > 0.5",
        ),
    },
];
