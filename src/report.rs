//! What a batch found out: its probes, its result and its summary. Everything that shows, counts or keeps a batch depends on
//! this module, and it on none of them.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use humantime::format_duration;

use crate::config::Period;
use crate::probe::{Outcome, ProbeReport, Span};

pub(crate) mod json;
#[cfg(test)]
pub(crate) mod sample;

/// Everything that one batch found out.
#[derive(Debug, Clone)]
pub struct BatchReport {
    /// See [`new_id`].
    pub batch_id: String,
    pub target: String,
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
    /// Where a guard rail refused the next one.
    pub refusal: Option<Denial>,
}

/// What a batch comes to as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchResult {
    /// Every room that opened.
    Ok,
    /// Some rooms ok, some failed.
    Degraded,
    /// No room ok.
    Failed,
    /// The service named a limit, whatever else happened: what the rest would have shown is not known.
    Limited,
    /// We were told to stop.
    Aborted,
}

impl BatchResult {
    pub const ALL: [Self; 5] = [
        Self::Ok,
        Self::Degraded,
        Self::Failed,
        Self::Limited,
        Self::Aborted,
    ];

    /// The label value in metrics and the `result` in output.
    pub fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
            Self::Limited => "limited",
            Self::Aborted => "aborted",
        }
    }
}

/// How the probes of a batch ended, and how long their agents took to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    pub ok: usize,
    pub failed: usize,
    pub aborted: usize,
    /// `None` where no probe has a join delay.
    pub join_delay: Option<Quantiles>,
}

/// Nearest-rank quantiles: each is a delay that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantiles {
    pub p50: Duration,
    pub p90: Duration,
    pub max: Duration,
}

impl BatchReport {
    /// A batch that was aborted is not judged by the rooms that had ended before; nor is one that never opened a room.
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

    /// The share of rooms that were ok; aborted ones don't count. `None` where that leaves none.
    pub fn success_ratio(&self) -> Option<f64> {
        let summary = self.summary();
        let [ok, ended] = [summary.ok, summary.ok + summary.failed]
            .map(|rooms| f64::from(u32::try_from(rooms).unwrap_or(u32::MAX)));
        (ended > 0.0).then(|| ok / ended)
    }

    /// Nothing was found out: a guard rail refused the first room, or the end came before it.
    pub fn opened_nothing(&self) -> bool {
        self.probes.is_empty()
    }

    /// The join delays are those of every probe whose agent joined, whatever its outcome, without upper bounds.
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
        /// What the room could use at worst.
        worst_case: Duration,
        limit: Duration,
        resets_at: DateTime<Utc>,
    },
    Backoff {
        until: DateTime<Utc>,
    },
    /// There is a budget, and what of it was used is not known.
    LedgerLost,
}

impl Denial {
    /// The `cause` of a skipped batch.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Budget { .. } | Self::LedgerLost => "budget",
            Self::Backoff { .. } => "backoff",
        }
    }

    /// When it may be worth to ask again; `None` where time alone changes nothing.
    pub fn until(&self) -> Option<DateTime<Utc>> {
        match self {
            Self::Budget { resets_at, .. } => Some(*resets_at),
            Self::Backoff { until } => Some(*until),
            Self::LedgerLost => None,
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
                "the project's agent time of this UTC {} is used up: {} of {}, and one more room could use {}; it counts \
                 anew from {}",
                period.label(),
                format_duration(*used),
                format_duration(*limit),
                format_duration(*worst_case),
                minute(*resets_at)
            ),
            Self::Backoff { until } => write!(
                f,
                "the project rests until {} after a plan limit was met",
                until.format("%Y-%m-%d %H:%M:%S UTC")
            ),
            Self::LedgerLost => f.write_str(
                "the record of used agent time was lost, and the project has a budget: see the log, then run with \
                 --accept-lost-ledger to count from zero",
            ),
        }
    }
}

fn minute(at: DateTime<Utc>) -> impl fmt::Display {
    at.format("%Y-%m-%d %H:%M UTC")
}

#[cfg(test)]
mod tests;
