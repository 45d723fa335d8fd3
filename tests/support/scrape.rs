//! Metrics in Prometheus' text format 0.0.4.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};

/// The start of the name of every series of the canary. The methods of [`Scrape`] take names without it.
pub const PREFIX: &str = "livekit_canary_";

/// One series with its value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    /// As printed.
    pub value: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Family {
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    pub help: String,
}

#[derive(Debug, Default)]
pub struct Scrape {
    /// In the order of the text.
    pub families: Vec<Family>,
    pub samples: Vec<Sample>,
}

impl Scrape {
    /// # Errors
    /// If a line can't be understood, a family lacks its HELP or TYPE, or a sample is not below its family.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut scrape = Self::default();
        let mut help: Option<(&str, &str)> = None;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let previous = help.replace(rest.split_once(' ').context("no help")?);
                ensure!(previous.is_none(), "{previous:?} has no TYPE");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').context("no type")?;
                let (helped, help) = help.take().with_context(|| format!("{name} has no HELP"))?;
                ensure!(helped == name, "the HELP of {helped} is before {name}");
                scrape.families.push(Family {
                    name: name.to_owned(),
                    kind: kind.to_owned(),
                    help: help.to_owned(),
                });
            } else {
                let sample = Sample::parse(line).with_context(|| line.to_owned())?;
                let family = scrape.families.last();
                let is_below = family.is_some_and(|family| sample.name.starts_with(&family.name));
                ensure!(is_below, "{line} is below {family:?}");
                scrape.samples.push(sample);
            }
        }
        Ok(scrape)
    }

    /// The series of this name that have all of these labels.
    pub fn series(
        &self,
        name: &str,
        labels: &[(&str, &str)],
    ) -> impl Iterator<Item = &Sample> + Clone {
        self.samples.iter().filter(move |sample| {
            let has = |(label, value): &(&str, &str)| {
                sample.labels.get(*label).is_some_and(|own| own == value)
            };
            sample.name.strip_prefix(PREFIX) == Some(name) && labels.iter().all(has)
        })
    }

    /// The value of the only series of this name that has all of these labels.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<f64> {
        let mut found = self.series(name, labels);
        match (found.next(), found.count()) {
            (Some(sample), 0) => sample.number(),
            (None, _) => bail!("no series {name} {labels:?}"),
            (Some(_), more) => bail!("{} series {name} {labels:?}", more + 1),
        }
    }

    /// The sum over all series of this name that have all of these labels.
    ///
    /// # Errors
    /// If there is no such series.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<f64> {
        let found = self.series(name, labels);
        ensure!(
            found.clone().next().is_some(),
            "no series {name} {labels:?}"
        );
        found.map(Sample::number).sum()
    }

    /// Such a sum that is a whole number.
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<u64> {
        whole(self.sum(name, labels)?)
    }

    /// The value of a gauge that is 0 or 1 and has no labels.
    pub fn flag(&self, name: &str) -> anyhow::Result<bool> {
        match whole(self.value(name, &[])?)? {
            0 => Ok(false),
            1 => Ok(true),
            other => bail!("{name} is {other}"),
        }
    }

    /// Whether any series has this target.
    pub fn has_target(&self, target: &str) -> bool {
        let mut targets = self
            .samples
            .iter()
            .map(|sample| sample.labels.get("target"));
        targets.any(|own| own.is_some_and(|own| own == target))
    }
}

impl Sample {
    fn parse(line: &str) -> anyhow::Result<Self> {
        let name = line.find(['{', ' ']).context("no name")?;
        let (name, rest) = line.split_at(name);
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => parse_labels(rest)?,
            None => (BTreeMap::new(), rest),
        };
        let value = value
            .strip_prefix(' ')
            .context("no space before the value")?;
        ensure!(value.parse::<f64>().is_ok(), "{value:?} is not a number");
        Ok(Self {
            name: name.to_owned(),
            labels,
            value: value.to_owned(),
        })
    }

    pub fn number(&self) -> anyhow::Result<f64> {
        Ok(self.value.parse()?)
    }
}

/// Labels up to the closing brace, and the text after it.
fn parse_labels(mut text: &str) -> anyhow::Result<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        if let Some(rest) = text.strip_prefix('}') {
            return Ok((labels, rest));
        }
        let (label, rest) = text.split_once("=\"").context("no label")?;
        let (value, rest) = parse_value(rest)?;
        let twice = labels.insert(label.to_owned(), value);
        ensure!(twice.is_none(), "the label {label} occurs twice");
        text = rest.strip_prefix(',').unwrap_or(rest);
    }
}

/// A label's value up to its closing quote, and the text after that.
fn parse_value(text: &str) -> anyhow::Result<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => value.push(match chars.next().context("the value ends early")?.1 {
                'n' => '\n',
                escaped => escaped,
            }),
            char => value.push(char),
        }
    }
    bail!("the value has no end")
}

/// # Errors
/// If `value` is not a whole number of at least 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked below"
)]
pub fn whole(value: f64) -> anyhow::Result<u64> {
    ensure!(
        value >= 0.0 && value.fract() == 0.0,
        "{value} is not a count"
    );
    Ok(value as u64)
}
