//! The families of one registry: a target's, a project's or the process's own.

use std::collections::HashMap;
use std::ops::Deref;
use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts,
    Registry, TextEncoder,
};

use super::catalogue::{Definition, Kind, PREFIX};

/// The lines of one family, in Prometheus' text format.
pub(super) struct Lines {
    pub(super) name: String,
    text: String,
    /// Where its series begin.
    series: usize,
}

impl Lines {
    /// HELP and TYPE.
    pub(super) fn head(&self) -> &str {
        &self.text[..self.series]
    }

    pub(super) fn series(&self) -> &str {
        &self.text[self.series..]
    }

    pub(super) fn len(&self) -> usize {
        self.text.len()
    }
}

/// Those of all families in a registry.
fn lines_of(registry: &Registry) -> Vec<Lines> {
    let encoder = TextEncoder::new();
    let families = registry.gather().into_iter();
    let lines = families.map(|family| {
        let mut text = String::new();
        encoder
            .encode_utf8(slice::from_ref(&family), &mut text)
            .expect("every family that is gathered has a name and a series");
        let mut ends = text.match_indices('\n').map(|(at, _)| at + 1);
        // A HELP text has its line breaks escaped.
        let series = ends.nth(1).expect("each family has a HELP and a TYPE");
        Lines {
            name: family.name().to_owned(),
            text,
            series,
        }
    });
    lines.collect()
}

/// CPU time, memory, threads, descriptors and start of this process, as any Prometheus client names them.
pub(super) struct Standard(Registry);

impl Standard {
    pub(super) fn new() -> Self {
        let registry = Registry::new();
        registry
            .register(Box::new(ProcessCollector::for_self()))
            .expect("it is the only one");
        Self(registry)
    }

    pub(super) fn lines(&self) -> Vec<Lines> {
        lines_of(&self.0)
    }
}

/// The series of a registry behind one lock: what moves while it is held is seen together. Most targets rest while one is
/// scraped, so that the lines of the last time are kept until something moves again.
pub(super) struct Kept<S> {
    registry: Registry,
    inner: Mutex<Inner<S>>,
}

struct Inner<S> {
    series: S,
    /// `None` once something moved.
    lines: Option<Arc<[Lines]>>,
}

/// While this lives, nothing is gathered.
pub(super) struct Moving<'a, S>(MutexGuard<'a, Inner<S>>);

impl<S> Deref for Moving<'_, S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.0.series
    }
}

impl<S> Kept<S> {
    /// The only way to the series.
    pub(super) fn moving(&self) -> Moving<'_, S> {
        let mut inner = self.lock();
        inner.lines = None;
        Moving(inner)
    }

    pub(super) fn lines(&self) -> Arc<[Lines]> {
        let mut inner = self.lock();
        let lines = inner
            .lines
            .get_or_insert_with(|| lines_of(&self.registry).into());
        Arc::clone(lines)
    }

    fn lock(&self) -> MutexGuard<'_, Inner<S>> {
        // It guards no data that a panic could have left half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes families by their definitions.
pub(super) struct Families {
    registry: Registry,
}

impl Families {
    /// Those of one target or project: each of their series has this label.
    pub(super) fn of(label: &str, name: &str) -> Self {
        Self::with(HashMap::from([(label.to_owned(), name.to_owned())]))
    }

    pub(super) fn of_process() -> Self {
        Self::with(HashMap::new())
    }

    fn with(labels: HashMap<String, String>) -> Self {
        let registry = Registry::new_custom(Some(PREFIX.to_owned()), Some(labels));
        Self {
            registry: registry.expect("the prefix is not empty"),
        }
    }

    /// Takes their handles, which nothing else may hold.
    pub(super) fn keep<S>(self, series: S) -> Kept<S> {
        Kept {
            registry: self.registry,
            inner: Mutex::new(Inner {
                series,
                lines: None,
            }),
        }
    }

    pub(super) fn counter(&self, definition: &Definition) -> IntCounter {
        self.register(IntCounter::with_opts(opts(definition)))
    }

    /// All with these label values, at zero.
    pub(super) fn counters<const N: usize>(
        &self,
        definition: &Definition,
        values: impl IntoIterator<Item = [&'static str; N]>,
    ) -> IntCounterVec {
        let within = definition.labels_within();
        let counters = self.register(IntCounterVec::new(opts(definition), within));
        for values in values {
            counters.with_label_values(&values).reset();
        }
        counters
    }

    /// NaN until it is set.
    pub(super) fn gauge(&self, definition: &Definition) -> Gauge {
        let gauge = self.register(Gauge::with_opts(opts(definition)));
        gauge.set(f64::NAN);
        gauge
    }

    /// None yet.
    pub(super) fn gauges(&self, definition: &Definition) -> GaugeVec {
        let within = definition.labels_within();
        self.register(GaugeVec::new(opts(definition), within))
    }

    pub(super) fn histogram(&self, definition: &Definition) -> Histogram {
        self.register(Histogram::with_opts(histogram_opts(definition)))
    }

    /// All with these label values, without an observation.
    pub(super) fn histograms(
        &self,
        definition: &Definition,
        values: impl IntoIterator<Item = [&'static str; 1]>,
    ) -> HistogramVec {
        let within = definition.labels_within();
        let histograms = self.register(HistogramVec::new(histogram_opts(definition), within));
        for values in values {
            let _exists_now = histograms.with_label_values(&values);
        }
        histograms
    }

    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector = made.expect("names and labels of the catalogue are valid");
        let registered = self.registry.register(Box::new(collector.clone()));
        registered.expect("each definition is used once a registry");
        collector
    }
}

fn opts(definition: &Definition) -> Opts {
    Opts::new(definition.name, definition.help)
}

fn histogram_opts(definition: &Definition) -> HistogramOpts {
    let Kind::Histogram(buckets) = definition.kind else {
        unreachable!("{} is no histogram", definition.name);
    };
    HistogramOpts::new(definition.name, definition.help).buckets(buckets.to_vec())
}
