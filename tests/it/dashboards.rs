//! The dashboards use only series of the catalogue. The Go tests in grafana check what their queries find.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use livekit_canary::metrics::{CATALOGUE, MetricKind, PREFIX};

/// All series in the dashboards, without their prefix.
fn named() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana/dashboards");
    let files: Vec<_> = fs::read_dir(folder).unwrap().collect();
    assert_eq!(files.len(), 2, "{files:?}");
    let prefix = format!("{PREFIX}_");
    let mut named = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        for rest in text.split(&prefix).skip(1) {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            named.insert(rest[..end.unwrap()].to_owned());
        }
    }
    named
}

#[test]
fn dashboards_use_only_series_of_the_catalogue() {
    let exist: BTreeSet<_> = CATALOGUE
        .iter()
        .map(|definition| match definition.kind {
            MetricKind::Histogram(_) => format!("{}_bucket", definition.name),
            MetricKind::Counter | MetricKind::Gauge => definition.name.to_owned(),
        })
        .collect();
    let unknown: Vec<_> = named().difference(&exist).cloned().collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}
