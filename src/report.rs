//! The findings of a batch: its probes, its result and its summary. Everything that shows, counts or stores a batch depends
//! on this module, and it depends on none of them.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use humantime::format_duration;
use serde::{Deserialize, Serialize};
use strum::VariantArray;

use crate::config::Period;
use crate::probe::{Outcome, ProbeReport, Span};

pub(crate) mod json;
#[cfg(test)]
pub(crate) mod sample;

/// A number with its noun: `1 room`, `3 rooms`. The noun forms its plural with s or, after s and ch, with es.
pub(crate) fn counted(number: u64, noun: &str) -> String {
    let plural = match noun {
        _ if number == 1 => "",
        _ if noun.ends_with('s') || noun.ends_with("ch") => "es",
        _ => "s",
    };
    format!("{number} {noun}{plural}")
}

/// Why a batch runs. Only scheduled batches count in service levels and delay histograms: the others run when something is
/// wrong, or when a person asks, so they would bias the sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Purpose {
    Scheduled,
    /// To see whether a failure lasts, and whether an outage is over.
    Confirmation,
    /// A person or another program started it.
    Manual,
}

impl Purpose {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The label value in metrics and the `purpose` in output.
    pub fn label(self) -> &'static str {
        self.into()
    }

    pub(crate) fn of_label(label: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|purpose| purpose.label() == label)
    }
}

/// What the canary knows of a target.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    Serialize,
    Deserialize,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum TargetState {
    /// The canary just started, the target is paused, or no room has given a verdict for 2.5 intervals.
    #[default]
    Unknown,
    /// The last rooms were good.
    Healthy,
    /// A room failed, and more rooms are to confirm it.
    Suspect,
    /// An incident is open.
    Failing,
}

impl TargetState {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The value of the label `state`.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// Whose fault an outage is.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum Fault {
    /// The agent, or nothing proves that it is not the agent.
    Agent,
    /// LiveKit or the network.
    Service,
}

impl Fault {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The value of the label `fault`.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// The findings of one batch.
#[derive(Debug, Clone)]
pub struct BatchReport {
    /// See [`new_id`](crate::batch::new_id).
    pub batch_id: String,
    pub target: String,
    pub purpose: Purpose,
    pub started_at: DateTime<Utc>,
    pub ended_at: DateTime<Utc>,
    /// In the order of opening.
    pub probes: Vec<ProbeReport>,
    /// Rooms of the batch that never opened, and why.
    pub not_opened: Option<NotOpened>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotOpened {
    pub rooms: usize,
    pub why: String,
    /// If a guard rail denied the next room.
    pub denial: Option<Denial>,
}

/// The result of a batch as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum BatchResult {
    /// Every room that opened was ok.
    Ok,
    /// Some rooms were ok, some failed.
    Degraded,
    /// No room was ok.
    Failed,
    /// The service named a limit, whatever else happened, because what the other rooms would have shown is unknown.
    Limited,
    /// The canary was asked to stop.
    Aborted,
}

impl BatchResult {
    pub const ALL: [Self; <Self as VariantArray>::VARIANTS.len()] =
        *<Self as VariantArray>::VARIANTS
            .first_chunk()
            .expect("the array has the length of the slice");

    /// The label value in metrics and the `result` in output.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// How the probes of a batch ended, and how long their agents took to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    pub ok: usize,
    pub failed: usize,
    pub aborted: usize,
    /// `None` if no probe has a join delay.
    pub join_delay: Option<Quantiles>,
}

/// Nearest-rank quantiles, so each is a delay that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantiles {
    pub p50: Duration,
    pub p90: Duration,
    pub max: Duration,
}

impl BatchReport {
    /// An aborted batch is not judged by the rooms that ended before, and neither is one that opened no room.
    pub fn result(&self) -> BatchResult {
        let any = |wanted: fn(&Outcome) -> bool| {
            let mut outcomes = self.probes.iter().map(|probe| &probe.outcome);
            outcomes.any(wanted)
        };
        let ok = any(|outcome| *outcome == Outcome::Ok);
        let failed = any(|outcome| matches!(outcome, Outcome::Failed(_)));
        if any(|outcome| *outcome == Outcome::Aborted) {
            BatchResult::Aborted
        } else if any(Outcome::is_plan_limit) {
            BatchResult::Limited
        } else {
            match (ok, failed) {
                (true, false) => BatchResult::Ok,
                (true, true) => BatchResult::Degraded,
                (false, true) => BatchResult::Failed,
                (false, false) => BatchResult::Aborted,
            }
        }
    }

    /// The share of rooms that were ok, excluding aborted ones. `None` if no other room remains.
    pub fn success_ratio(&self) -> Option<f64> {
        let summary = self.summary();
        let [ok, ended] = [summary.ok, summary.ok + summary.failed]
            .map(|rooms| f64::from(u32::try_from(rooms).unwrap_or(u32::MAX)));
        (ended > 0.0).then(|| ok / ended)
    }

    /// A guard rail denied the first room, or the batch was aborted before it.
    pub fn opened_nothing(&self) -> bool {
        self.probes.is_empty()
    }

    /// The join delays are those of every probe whose agent joined, whatever its outcome, excluding upper bounds.
    pub fn summary(&self) -> Summary {
        let count = |wanted: fn(&Outcome) -> bool| {
            let outcomes = self.probes.iter().map(|probe| &probe.outcome);
            outcomes.filter(|outcome| wanted(outcome)).count()
        };
        let delays = self
            .probes
            .iter()
            .filter(|probe| !probe.join_upper_bound)
            .filter_map(|probe| probe.timeline.span(Span::AgentJoin));
        Summary {
            ok: count(|outcome| matches!(outcome, Outcome::Ok)),
            failed: count(|outcome| matches!(outcome, Outcome::Failed(_))),
            aborted: count(|outcome| matches!(outcome, Outcome::Aborted)),
            join_delay: Quantiles::of(delays.collect()),
        }
    }
}

impl Quantiles {
    fn of(mut delays: Vec<Duration>) -> Option<Self> {
        delays.sort_unstable();
        let rank = |percent: usize| delays[(delays.len() * percent).div_ceil(100) - 1];
        let max = *delays.last()?;
        Some(Self {
            p50: rank(50),
            p90: rank(90),
            max,
        })
    }
}

/// Why no room may open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denial {
    Budget {
        period: Period,
        used: Duration,
        /// The most that the room can use.
        worst_case: Duration,
        limit: Duration,
        resets_at: DateTime<Utc>,
    },
    /// The target's confirmations have their own limit of a UTC day.
    Confirmations {
        used: Duration,
        /// The most that the room can use.
        worst_case: Duration,
        limit: Duration,
        resets_at: DateTime<Utc>,
    },
    Backoff {
        until: DateTime<Utc>,
    },
    /// There is a budget, and the record of how much of it is used is lost.
    LedgerLost,
    /// There is a budget, and the disk cannot be read, so it is unknown how much of it is used.
    LedgerUnread,
}

impl Denial {
    /// The `cause` of a skipped batch.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Budget { .. }
            | Self::Confirmations { .. }
            | Self::LedgerLost
            | Self::LedgerUnread => "budget",
            Self::Backoff { .. } => "backoff",
        }
    }

    /// When the next request may succeed; `None` if time alone changes nothing.
    pub fn until(&self) -> Option<DateTime<Utc>> {
        match self {
            Self::Budget { resets_at, .. } | Self::Confirmations { resets_at, .. } => {
                Some(*resets_at)
            }
            Self::Backoff { until } => Some(*until),
            Self::LedgerLost | Self::LedgerUnread => None,
        }
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Budget {
                period,
                used,
                worst_case,
                limit,
                resets_at,
            } => write!(
                f,
                "agent-time budget reached: {} of {} used or reserved this UTC {}, and one more room could use {}; the count restarts at {}",
                format_duration(*used),
                format_duration(*limit),
                period.label(),
                format_duration(*worst_case),
                minute(*resets_at)
            ),
            Self::Confirmations {
                used,
                worst_case,
                limit,
                resets_at,
            } => write!(
                f,
                "limit of confirmations reached: {} of {} used or reserved this UTC day, and one more room could use {}; the count restarts at {}",
                format_duration(*used),
                format_duration(*limit),
                format_duration(*worst_case),
                minute(*resets_at)
            ),
            Self::Backoff { until } => write!(
                f,
                "plan limit reached: no new rooms on this project until {}",
                until.format("%Y-%m-%d %H:%M:%S UTC")
            ),
            Self::LedgerLost => f.write_str(
                "the record of used agent time is lost, and the project has a budget: read the log, then run with \
                 --accept-lost-ledger to count from zero",
            ),
            Self::LedgerUnread => f.write_str(
                "the record of used agent time can't be read, and the project has a budget: the log names the fault of \
                 history.dir; batches start again when the folder can be read and written",
            ),
        }
    }
}

fn minute(at: DateTime<Utc>) -> impl fmt::Display {
    at.format("%Y-%m-%d %H:%M UTC")
}

#[cfg(test)]
mod tests;
