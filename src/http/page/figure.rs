//! Drawings of what happened when: rows of bars and marks on one axis of time, as inline SVG.
//!
//! The words stand in HTML beside each row, so that they keep their size on a narrow screen. What is drawn stands in a table, too.

#![expect(clippy::cast_precision_loss, reason = "counts of rooms and of columns")]

use std::fmt::Write as _;

use maud::{Markup, html};

/// A span of time with its meaning.
pub(super) struct Bar {
    /// Seconds on the axis.
    pub(super) from: f64,
    pub(super) to: f64,
    /// The class of the style sheet.
    pub(super) class: &'static str,
    pub(super) label: String,
}

/// A point in time with its meaning.
pub(super) struct Mark {
    pub(super) at: f64,
    pub(super) class: &'static str,
    pub(super) label: String,
}

impl Mark {
    fn line(&self) -> Markup {
        html! { line .(self.class) x1=(self.at) x2=(self.at) y1="0" y2="1" { title { (self.label) } } }
    }
}

/// How loud a side of the call was.
pub(super) struct Wave<'a> {
    /// Seconds on the axis.
    pub(super) from: f64,
    pub(super) step: f64,
    /// 0 to 100.
    pub(super) levels: &'a [u8],
    pub(super) class: &'static str,
}

#[derive(Default)]
pub(super) struct Row<'a> {
    pub(super) name: Markup,
    pub(super) bars: Vec<Bar>,
    pub(super) wave: Option<Wave<'a>>,
    pub(super) marks: Vec<Mark>,
}

/// The rows on an axis from 0 to the end of the last bar or mark. `caption` names the figure for those who can't see it.
pub(super) fn rows(caption: &str, rows: &[Row<'_>]) -> Markup {
    let bars = rows
        .iter()
        .flat_map(|row| row.bars.iter().map(|bar| bar.to));
    let marks = rows
        .iter()
        .flat_map(|row| row.marks.iter().map(|mark| mark.at));
    let end = bars.chain(marks).fold(0.0_f64, f64::max);
    if end <= 0.0 {
        return html! {};
    }
    html! {
        figure {
            figcaption { (caption) }
            @for row in rows {
                div .row {
                    div .name { (row.name) }
                    svg viewBox={ "0 0 " (end) " 1" } preserveAspectRatio="none" role="img" aria-label=(described(row)) {
                        @for bar in &row.bars {
                            rect .(bar.class) x=(bar.from) y="0.15" width=(bar.to - bar.from) height="0.7" {
                                title { (bar.label) }
                            }
                        }
                        @if let Some(wave) = &row.wave { path .(wave.class) d=(wave.outline()) {} }
                        @for mark in &row.marks { (mark.line()) }
                    }
                }
            }
            div .row .axis {
                div .name {}
                div .ticks { span { "0 s" } span { (tick(end / 2.0)) } span { (tick(end)) } }
            }
        }
    }
}

/// A short axis is labelled in milliseconds, so that its parts differ.
fn tick(seconds: f64) -> String {
    if seconds < 2.0 {
        format!("{seconds:.3} s")
    } else {
        format!("{seconds:.1} s")
    }
}

impl Wave<'_> {
    /// The area between the levels above the middle and the same below it.
    fn outline(&self) -> String {
        let mut outline = format!("M{} .5", self.from);
        let mut at = |index: usize, y: f64| {
            let x = self.from + self.step * index as f64;
            let _ = write!(outline, "L{x:.2} {y:.3}");
        };
        for (index, level) in self.levels.iter().enumerate() {
            at(index, 0.5 - f64::from(*level) / 200.0);
        }
        for (index, level) in self.levels.iter().enumerate().rev() {
            at(index, 0.5 + f64::from(*level) / 200.0);
        }
        outline + "Z"
    }
}

/// A line of a plot.
pub(super) struct Line {
    pub(super) class: &'static str,
    /// A value for each span of time; `None` is a gap.
    pub(super) values: Vec<Option<f64>>,
}

/// Lines over spans of equal length. `limit` is drawn in, and is the least top of the plot.
pub(super) fn plot(described: &str, lines: &[Line], limit: Option<f64>) -> Markup {
    let values = lines
        .iter()
        .flat_map(|line| line.values.iter().copied().flatten());
    let top = values.chain(limit).fold(0.0_f64, f64::max) * 1.1;
    let spans = lines
        .iter()
        .map(|line| line.values.len())
        .max()
        .unwrap_or(0);
    if top <= 0.0 || spans == 0 {
        return html! {};
    }
    html! {
        div .plot {
            div .top { (format!("{:.1} s", top)) }
            svg viewBox={ "0 0 " (spans) " 1" } preserveAspectRatio="none" role="img" aria-label=(described) {
                @if let Some(limit) = limit {
                    line .limit x1="0" x2=(spans) y1=(1.0 - limit / top) y2=(1.0 - limit / top) {
                        title { (format!("the objective, {limit:.1} s")) }
                    }
                }
                @for line in lines { path .(line.class) d=(line.path(top)) {} }
            }
        }
    }
}

impl Line {
    /// A step for each span, so that one value between two gaps can be seen.
    fn path(&self, top: f64) -> String {
        let mut path = String::new();
        let mut connected = false;
        for (index, value) in self.values.iter().enumerate() {
            if let Some(value) = value {
                let y = 1.0 - value / top;
                let command = if connected { 'L' } else { 'M' };
                let _ = write!(path, "{command}{index} {y:.3}H{}", index + 1);
            }
            connected = value.is_some();
        }
        path
    }
}

/// One column of a chart of results.
pub(super) struct Column {
    pub(super) ok: u64,
    pub(super) failed: u64,
    /// The span of time in words.
    pub(super) label: String,
}

impl Column {
    fn described(&self) -> String {
        match (self.ok, self.failed) {
            (0, 0) => format!("{}: no room", self.label),
            (ok, failed) => format!("{}: {ok} ok, {failed} failed", self.label),
        }
    }
}

/// Columns of equal width, and marks between them: an `at` of 1 is the begin of the second column. The failed share of each column
/// stands on its floor. An empty one is a gap.
pub(super) fn columns(columns: &[Column], marks: &[Mark]) -> Markup {
    let described: Vec<_> = columns
        .iter()
        .filter(|column| column.failed > 0)
        .map(Column::described)
        .collect();
    let described = match &described[..] {
        [] => "no failed room".to_owned(),
        some => some.join("; "),
    };
    html! {
        svg .columns viewBox={ "0 0 " (columns.len()) " 1" } preserveAspectRatio="none" role="img" aria-label=(described) {
            @for (index, column) in columns.iter().enumerate() {
                @let rooms = column.ok + column.failed;
                @if rooms > 0 {
                    @let share = column.failed as f64 / rooms as f64;
                    g {
                        title { (column.described()) }
                        rect .ok x=(index as f64 + 0.1) y="0" width="0.8" height=(1.0 - share) {}
                        @if share > 0.0 { rect .failed x=(index as f64 + 0.1) y=(1.0 - share) width="0.8" height=(share) {} }
                    }
                }
            }
            @for mark in marks { (mark.line()) }
        }
    }
}

fn described(row: &Row<'_>) -> String {
    let bars = row.bars.iter().map(|bar| (bar.from, &bar.label));
    let marks = row.marks.iter().map(|mark| (mark.at, &mark.label));
    let mut parts: Vec<_> = bars.chain(marks).collect();
    parts.sort_by(|one, other| one.0.total_cmp(&other.0));
    if parts.is_empty() {
        return "nothing".to_owned();
    }
    let labels: Vec<_> = parts.into_iter().map(|(_, label)| label.as_str()).collect();
    labels.join(", ")
}
