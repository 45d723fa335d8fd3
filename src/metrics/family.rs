//! The families of one registry: a target's, a project's or the process's own.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts,
    Registry,
};

use super::catalogue::{Definition, Kind, PREFIX};

/// Makes families by their definitions and gathers them.
pub(super) struct Families {
    registry: Registry,
    /// Held while series move together, and while they are gathered.
    whole: Mutex<()>,
}

impl Families {
    /// Those of one target or project: each of their series has this label.
    pub(super) fn of(label: &str, name: &str) -> Self {
        Self::with(HashMap::from([(label.to_owned(), name.to_owned())]))
    }

    pub(super) fn of_process() -> Self {
        Self::with(HashMap::new())
    }

    /// CPU time, memory, threads, descriptors and start of this process, as any Prometheus client names them.
    pub(super) fn about_process() -> Self {
        let registry = Registry::new();
        registry
            .register(Box::new(ProcessCollector::for_self()))
            .expect("it is the only one");
        Self {
            registry,
            whole: Mutex::default(),
        }
    }

    fn with(labels: HashMap<String, String>) -> Self {
        let registry = Registry::new_custom(Some(PREFIX.to_owned()), Some(labels));
        Self {
            registry: registry.expect("the prefix is not empty"),
            whole: Mutex::default(),
        }
    }

    /// While this lives, nothing is gathered: what moves until then is seen together.
    pub(super) fn together(&self) -> MutexGuard<'_, ()> {
        // It guards no data that a panic could have left half done.
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn gather(&self) -> Vec<MetricFamily> {
        let _together = self.together();
        self.registry.gather()
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
