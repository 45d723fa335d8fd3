//! What differs between the failed and the good rooms of an incident: a node, a region, a worker, the position in the batch, the
//! media path, the agent's version.
//!
//! Each value of a factor is tested against all other values by Fisher's exact test, with Holm's correction over all tests.
//! Rooms of one batch may fail together for one cause, but the test takes them for independent. So a value is named only if it
//! also passes the test with such batches as one room: see [`Table::as_cluster`].

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// A value is named if chance alone would name any value of this incident less often than this.
const NAMED_BELOW: f64 = 0.01;
/// Bounds the work and the list, if rooms have a value each, as they have with a worker per job.
const MAX_VALUES: usize = 50;
/// With fewer failed rooms, a value that is new may be new by chance, such as the id of a worker.
const MIN_ROOMS_SINCE_ONSET: usize = 3;

/// What may differ between two rooms.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Factor {
    Node,
    Region,
    Worker,
    Position,
    MediaPath,
    AgentVersion,
}

impl Factor {
    pub(crate) const ALL: &'static [Self] = <Self as strum::VariantArray>::VARIANTS;

    /// The `factor` in JSON.
    pub(crate) fn label(self) -> &'static str {
        self.into()
    }

    /// With its value, in a sentence.
    fn phrase(self, value: &str) -> String {
        match self {
            Self::Position => match value {
                "first" => "the first room of a batch".to_owned(),
                _ => "a later room of a batch".to_owned(),
            },
            Self::MediaPath => format!("media path {value}"),
            Self::AgentVersion => format!("agent version {value}"),
            Self::Node | Self::Region | Self::Worker => format!("{} {value}", self.label()),
        }
    }
}

/// One room with a verdict, as far as this module cares.
#[derive(Debug, Clone)]
pub(crate) struct Case<'a> {
    pub(crate) failed: bool,
    /// Rooms of one batch are one cluster.
    pub(crate) batch_id: &'a str,
    /// One per factor, in the order of [`Factor::ALL`].
    pub(crate) values: [Option<&'a str>; Factor::ALL.len()],
}

impl<'a> Case<'a> {
    fn value(&self, factor: Factor) -> Option<&'a str> {
        self.values[factor as usize]
    }
}

/// A value that separates failed rooms from good ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Difference {
    pub(crate) factor: Factor,
    pub(crate) value: String,
    /// Rooms with this value.
    pub(crate) failed: u32,
    pub(crate) rooms: u32,
    /// Rooms with another value.
    pub(crate) others_failed: u32,
    pub(crate) others_rooms: u32,
    /// Fisher's exact test, two-sided, before the correction. `None` if every room failed and the value is new since the onset.
    pub(crate) p_value: Option<f64>,
}

impl Difference {
    /// For a person, such as `worker AW_x fails in 6 of 6 rooms, all others in 0 of 7 (p = 0.0006)`.
    pub(crate) fn sentence(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            failed,
            rooms,
            others_failed,
            others_rooms,
            ..
        } = self;
        let phrase = self.factor.phrase(&self.value);
        match self.p_value {
            Some(p) => write!(
                f,
                "{phrase} fails in {failed} of {rooms} rooms, all others in {others_failed} of {others_rooms} (p = {})",
                one_digit(p)
            ),
            None => write!(
                f,
                "all {rooms} failed rooms have {phrase}, and none of the {others_rooms} rooms before had it"
            ),
        }
    }
}

/// A p-value with one significant digit.
fn one_digit(p: f64) -> String {
    match p {
        _ if p >= 0.001 => format!("{p:.3}"),
        _ if p >= 0.0001 => format!("{p:.4}"),
        _ => format!("{p:.0e}"),
    }
}

/// The values that separate the failed rooms from the good ones of an incident, the smallest p-value first. If no room was good,
/// the values that are new since the onset. `before` are the last good rooms before the incident.
///
/// Rooms without a value of a factor are left out of its tests, and a factor with one value is not tested.
pub(crate) fn differences(rooms: &[Case<'_>], before: &[Case<'_>]) -> Vec<Difference> {
    let factors = Factor::ALL.iter().copied();
    if rooms.iter().all(|room| room.failed) {
        let new = factors.filter_map(|factor| new_since_onset(factor, rooms, before));
        return new.collect();
    }
    named(factors.flat_map(|factor| tests_of(factor, rooms)).collect())
}

/// A difference, and the p-value that decides whether it is named.
#[derive(Debug)]
struct Test {
    difference: Difference,
    deciding: f64,
}

/// One test per value of the factor. The most frequent values come first.
fn tests_of(factor: Factor, rooms: &[Case<'_>]) -> Vec<Test> {
    let known: Vec<_> = rooms
        .iter()
        .filter_map(|room| Some((room.value(factor)?, room)))
        .collect();
    let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
    for (value, _) in &known {
        *sizes.entry(value).or_default() += 1;
    }
    let mut values: Vec<_> = sizes.into_iter().collect();
    values.sort_by_key(|(_, size)| Reverse(*size));
    values.truncate(MAX_VALUES);
    let values: Vec<_> = values.into_iter().map(|(value, _)| value).collect();
    let test = |value| {
        let mut batches: BTreeMap<&str, Table> = BTreeMap::new();
        for (own, room) in &known {
            let table = batches.entry(room.batch_id).or_default();
            table.add(*own == value, room.failed);
        }
        Test::new(factor, value, batches.values())
    };
    match values[..] {
        [] | [_] => Vec::new(),
        // The test of one value is the test of the other one.
        [one, other] => {
            let tests = [test(one), test(other)].into_iter().flatten();
            tests.filter(Test::fails_more_often).collect()
        }
        _ => values.into_iter().filter_map(test).collect(),
    }
}

impl Test {
    /// `None` if no outcome of these rooms could name the value. Such a test doesn't count in the correction (Tarone, 1990).
    fn new<'a>(
        factor: Factor,
        value: &str,
        batches: impl Iterator<Item = &'a Table> + Clone,
    ) -> Option<Self> {
        let all: Table = batches.clone().copied().sum();
        if all.smallest_p_value() >= NAMED_BELOW {
            return None;
        }
        let clusters: Table = batches.map(Table::as_cluster).sum();
        let p_value = all.p_value();
        Some(Self {
            difference: Difference {
                factor,
                value: value.to_owned(),
                failed: all.failed,
                rooms: all.failed + all.good,
                others_failed: all.others_failed,
                others_rooms: all.others_failed + all.others_good,
                p_value: Some(p_value),
            },
            deciding: p_value.max(clusters.p_value()),
        })
    }

    fn fails_more_often(&self) -> bool {
        let Difference {
            failed,
            rooms,
            others_failed,
            others_rooms,
            ..
        } = self.difference;
        u64::from(failed) * u64::from(others_rooms) > u64::from(others_failed) * u64::from(rooms)
    }
}

/// The tests that stand after Holm's correction, if their value fails more often than the others.
fn named(mut tests: Vec<Test>) -> Vec<Difference> {
    tests.sort_by(|a, b| a.deciding.total_cmp(&b.deciding));
    let total = tests.len();
    let stands =
        |place: usize, test: &Test| test.deciding * f64::from(count(total - place)) < NAMED_BELOW;
    let places = tests.into_iter().enumerate();
    places
        .take_while(|(place, test)| stands(*place, test))
        .filter(|(_, test)| test.fails_more_often())
        .map(|(_, test)| test.difference)
        .collect()
}

/// The value that every room of the incident has and no good room before it had.
fn new_since_onset(factor: Factor, rooms: &[Case<'_>], before: &[Case<'_>]) -> Option<Difference> {
    let values = |rooms: &[Case<'_>]| -> Vec<String> {
        let values = rooms.iter().filter_map(|room| room.value(factor));
        values.map(str::to_owned).collect()
    };
    let (now, then) = (values(rooms), values(before));
    let value = now.first()?;
    let is_new = now.len() >= MIN_ROOMS_SINCE_ONSET
        && !then.is_empty()
        && now.iter().all(|own| own == value)
        && !then.contains(value);
    is_new.then(|| Difference {
        factor,
        value: value.clone(),
        failed: count(now.len()),
        rooms: count(now.len()),
        others_failed: 0,
        others_rooms: count(then.len()),
        p_value: None,
    })
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Rooms by whether they have a value and whether they failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Table {
    failed: u32,
    good: u32,
    others_failed: u32,
    others_good: u32,
}

impl Table {
    fn add(&mut self, has_value: bool, failed: bool) {
        *match (has_value, failed) {
            (true, true) => &mut self.failed,
            (true, false) => &mut self.good,
            (false, true) => &mut self.others_failed,
            (false, false) => &mut self.others_good,
        } += 1;
    }

    /// A batch as the evidence that it is. If all its rooms ended alike, or all have or lack the value, they may have one cause,
    /// such as a moment without network: they count once. Otherwise each room counts, because the batch itself compares them.
    fn as_cluster(&self) -> Self {
        let failed = self.failed + self.others_failed;
        let good = self.good + self.others_good;
        let with_value = self.failed + self.good;
        let others = self.others_failed + self.others_good;
        if [failed, good, with_value, others].contains(&0) {
            Self {
                failed: self.failed.min(1),
                good: self.good.min(1),
                others_failed: self.others_failed.min(1),
                others_good: self.others_good.min(1),
            }
        } else {
            *self
        }
    }

    /// Fisher's exact test, two-sided: the probability of all tables with the same sums that are at most as likely as this one.
    fn p_value(&self) -> f64 {
        let margins = Margins::of(self);
        let observed = margins.probability(self.failed);
        // As R does: tables that are as likely must not fall out for a rounding error.
        let limit = observed * (1.0 + 1e-7);
        let tables = margins.range().map(|failed| margins.probability(failed));
        tables.filter(|p| *p <= limit).sum::<f64>().min(1.0)
    }

    /// Of all tables with the same sums.
    fn smallest_p_value(&self) -> f64 {
        let margins = Margins::of(self);
        let range = margins.range();
        let ends = [*range.start(), *range.end()].map(|failed| margins.probability(failed));
        ends[0].min(ends[1])
    }
}

impl std::iter::Sum for Table {
    fn sum<I: Iterator<Item = Self>>(tables: I) -> Self {
        tables.fold(Self::default(), |sum, table| Self {
            failed: sum.failed + table.failed,
            good: sum.good + table.good,
            others_failed: sum.others_failed + table.others_failed,
            others_good: sum.others_good + table.others_good,
        })
    }
}

/// The sums of a table, which a test holds fixed.
struct Margins {
    with_value: u32,
    others: u32,
    failed: u32,
    /// The logarithms of the factorials up to the number of rooms.
    ln_factorials: Vec<f64>,
}

impl Margins {
    fn of(table: &Table) -> Self {
        let with_value = table.failed + table.good;
        let others = table.others_failed + table.others_good;
        let mut ln_factorials = vec![0.0];
        let mut sum = 0.0;
        for number in 1..=with_value + others {
            sum += f64::from(number).ln();
            ln_factorials.push(sum);
        }
        Self {
            with_value,
            others,
            failed: table.failed + table.others_failed,
            ln_factorials,
        }
    }

    /// The failures that rooms with the value can have.
    fn range(&self) -> RangeInclusive<u32> {
        self.failed.saturating_sub(self.others)..=self.failed.min(self.with_value)
    }

    /// The hypergeometric probability of this many failures of rooms with the value.
    fn probability(&self, failed: u32) -> f64 {
        let chosen = self.ln_choose(self.with_value, failed)
            + self.ln_choose(self.others, self.failed - failed)
            - self.ln_choose(self.with_value + self.others, self.failed);
        chosen.exp()
    }

    fn ln_choose(&self, of: u32, chosen: u32) -> f64 {
        let ln_factorial = |number: u32| self.ln_factorials[number as usize];
        ln_factorial(of) - ln_factorial(chosen) - ln_factorial(of - chosen)
    }
}

#[cfg(test)]
mod tests;
