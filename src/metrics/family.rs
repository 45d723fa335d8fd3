//! The metric families of one registry: of a target, of a project, or of the process.

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

use super::catalogue::{CATALOGUE, Definition, MetricKind, PREFIX};

/// One family in Prometheus' text format.
pub(super) struct EncodedFamily {
    pub(super) name: String,
    text: String,
    /// Byte offset of the first series.
    series_start: usize,
}

impl EncodedFamily {
    /// The HELP and TYPE lines.
    pub(super) fn head(&self) -> &str {
        &self.text[..self.series_start]
    }

    pub(super) fn series(&self) -> &str {
        &self.text[self.series_start..]
    }

    pub(super) fn len(&self) -> usize {
        self.text.len()
    }
}

fn encode(registry: &Registry) -> Vec<EncodedFamily> {
    let encoder = TextEncoder::new();
    let families = registry.gather().into_iter();
    families
        .map(|family| {
            let mut text = String::new();
            encoder
                .encode_utf8(slice::from_ref(&family), &mut text)
                .expect("every family that is gathered has a name and a series");
            if has_negative_values(family.name()) {
                text = without_sums(&text, family.name());
            }
            let mut ends = text.match_indices('\n').map(|(at, _)| at + 1);
            // HELP and TYPE are one line each: line breaks in a HELP text are escaped.
            let series_start = ends.nth(1).expect("each family has a HELP and a TYPE");
            EncodedFamily {
                name: family.name().to_owned(),
                text,
                series_start,
            }
        })
        .collect()
}

/// Whether the values of the family with this name, prefix included, can be below zero.
fn has_negative_values(name: &str) -> bool {
    let name = name
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_prefix('_'));
    let definition = CATALOGUE.iter().find(|one| Some(one.name) == name);
    definition.is_some_and(Definition::has_negative_values)
}

/// Removes the series `_sum` of a histogram. With negative values a sum can fall, and Prometheus' `rate` takes each fall for a
/// restart. `OpenMetrics` forbids such a sum. The buckets, and so every quantile, are exact without it.
fn without_sums(text: &str, name: &str) -> String {
    let sum = format!("{name}_sum{{");
    let lines = text.split_inclusive('\n');
    lines.filter(|line| !line.starts_with(&sum)).collect()
}

/// The usual `process_*` series: CPU time, memory, threads, file descriptors and start time of this process.
pub(super) struct ProcessMetrics(Registry);

impl ProcessMetrics {
    pub(super) fn new(labels: &CommonLabels) -> Self {
        let registry = labels.registry(None);
        registry
            .register(Box::new(ProcessCollector::for_self()))
            .expect("the registry is empty");
        Self(registry)
    }

    pub(super) fn encode(&self) -> Vec<EncodedFamily> {
        encode(&self.0)
    }
}

/// The series of a registry behind one lock, so that a scrape sees all changes made under the lock or none of them.
///
/// The encoded text is cached until the next change: at most scrapes, most targets have not changed.
pub(super) struct CachedRegistry<S> {
    registry: Registry,
    inner: Mutex<CachedSeries<S>>,
}

struct CachedSeries<S> {
    series: S,
    /// `None` after a change.
    encoded: Option<Arc<[EncodedFamily]>>,
}

/// Access to the series. A scrape of this registry waits until it is dropped.
pub(super) struct SeriesGuard<'a, S>(MutexGuard<'a, CachedSeries<S>>);

impl<S> Deref for SeriesGuard<'_, S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.0.series
    }
}

impl<S> CachedRegistry<S> {
    /// The only access to the series, because it must invalidate the cached text.
    pub(super) fn update(&self) -> SeriesGuard<'_, S> {
        let mut inner = self.lock();
        inner.encoded = None;
        SeriesGuard(inner)
    }

    pub(super) fn encoded(&self) -> Arc<[EncodedFamily]> {
        let mut inner = self.lock();
        let encoded = inner
            .encoded
            .get_or_insert_with(|| encode(&self.registry).into());
        Arc::clone(encoded)
    }

    fn lock(&self) -> MutexGuard<'_, CachedSeries<S>> {
        // A panic can't leave the series inconsistent: each update is atomic in itself.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The labels of every series of this process, its `process_*` series included.
#[derive(Debug, Clone, Default)]
pub(super) struct CommonLabels(HashMap<String, String>);

impl CommonLabels {
    /// A drill has a label on every series, so that no alert about it looks like one about a real canary. Other series lack
    /// the label, which PromQL selects as `drill=""`.
    pub(super) fn new(drill: bool) -> Self {
        let label = drill.then(|| ("drill".to_owned(), "true".to_owned()));
        Self(label.into_iter().collect())
    }

    fn registry(&self, prefix: Option<&str>) -> Registry {
        let registry = Registry::new_custom(prefix.map(str::to_owned), Some(self.0.clone()));
        registry.expect("the prefix is not empty")
    }

    fn with(&self, label: &str, value: &str) -> Self {
        let mut labels = self.0.clone();
        labels.insert(label.to_owned(), value.to_owned());
        Self(labels)
    }
}

/// Creates families from their definitions.
pub(super) struct Families {
    registry: Registry,
}

impl Families {
    /// For one target or project: each series has this label.
    pub(super) fn with_label(label: &str, name: &str, common: &CommonLabels) -> Self {
        Self::for_process(&common.with(label, name))
    }

    pub(super) fn for_process(labels: &CommonLabels) -> Self {
        Self {
            registry: labels.registry(Some(PREFIX)),
        }
    }

    /// Takes the handles of all series. Nothing else may hold one, because it could change a series without the lock.
    pub(super) fn cache<S>(self, series: S) -> CachedRegistry<S> {
        CachedRegistry {
            registry: self.registry,
            inner: Mutex::new(CachedSeries {
                series,
                encoded: None,
            }),
        }
    }

    pub(super) fn counter(&self, definition: &Definition) -> IntCounter {
        self.register(IntCounter::with_opts(opts(definition)))
    }

    /// All combinations of label values exist from the start, at zero: `increase` would miss the first failure otherwise.
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

    /// `NaN` until it is set.
    pub(super) fn gauge(&self, definition: &Definition) -> Gauge {
        let gauge = self.register(Gauge::with_opts(opts(definition)));
        gauge.set(f64::NAN);
        gauge
    }

    /// Without any series.
    pub(super) fn gauges(&self, definition: &Definition) -> GaugeVec {
        let within = definition.labels_within();
        self.register(GaugeVec::new(opts(definition), within))
    }

    pub(super) fn histogram(&self, definition: &Definition) -> Histogram {
        self.register(Histogram::with_opts(histogram_opts(definition)))
    }

    /// All label values exist from the start, without an observation.
    pub(super) fn histograms(
        &self,
        definition: &Definition,
        values: impl IntoIterator<Item = [&'static str; 1]>,
    ) -> HistogramVec {
        let within = definition.labels_within();
        let histograms = self.register(HistogramVec::new(histogram_opts(definition), within));
        for values in values {
            let _created = histograms.with_label_values(&values);
        }
        histograms
    }

    fn register<C: Collector + Clone + 'static>(&self, created: prometheus::Result<C>) -> C {
        let collector = created.expect("the names and labels of the catalogue are valid");
        let registered = self.registry.register(Box::new(collector.clone()));
        registered.expect("each definition is used once per registry");
        collector
    }
}

fn opts(definition: &Definition) -> Opts {
    Opts::new(definition.name, definition.help)
}

fn histogram_opts(definition: &Definition) -> HistogramOpts {
    let MetricKind::Histogram(buckets) = definition.kind else {
        unreachable!("{} is not a histogram", definition.name);
    };
    HistogramOpts::new(definition.name, definition.help).buckets(buckets.to_vec())
}
