//! What all pages share: the head with the verdict, the links, and how a time and a number are shown.

use chrono::{DateTime, TimeDelta, Utc};
use maud::{DOCTYPE, Markup, Render, html};

use crate::telemetry::without_marks;

/// Nothing from another host, and nothing inline. A text that was not escaped could neither load nor run anything.
pub(in super::super) const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                                           media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; \
                                           frame-ancestors 'none'";

/// How a verdict looks. Its words say the same, so that color alone carries no meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) enum Tone {
    Neutral,
    Good,
    Warning,
    Bad,
}

impl Tone {
    /// The class of the style sheet.
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Neutral => "neutral",
            Self::Good => "good",
            Self::Warning => "warning",
            Self::Bad => "bad",
        }
    }

    pub(super) fn of_result(result: &str) -> Self {
        match result {
            "ok" => Self::Good,
            "degraded" | "limited" => Self::Warning,
            "failed" => Self::Bad,
            _ => Self::Neutral,
        }
    }

    pub(super) fn of_state(state: &str) -> Self {
        match state {
            "healthy" => Self::Good,
            "suspect" => Self::Warning,
            "failing" => Self::Bad,
            _ => Self::Neutral,
        }
    }

    /// The icon of the browser's tab.
    pub(in super::super) fn icon(self) -> String {
        let (fill, sign) = match self {
            Self::Neutral => ("#6b7280", "M10 16h12"),
            Self::Good => ("#17692f", "M9 17l5 5 9-11"),
            Self::Warning => ("#a15c00", "M16 8v10M16 23v1"),
            Self::Bad => ("#b3261e", "M10 10l12 12M22 10L10 22"),
        };
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 32 32\"><circle cx=\"16\" cy=\"16\" r=\"16\" fill=\"{fill}\"/>\
             <path d=\"{sign}\" stroke=\"#fff\" stroke-width=\"3\" fill=\"none\"/></svg>\n"
        )
    }

    pub(in super::super) fn of_icon(name: &str) -> Option<Self> {
        [Self::Neutral, Self::Good, Self::Warning, Self::Bad]
            .into_iter()
            .find(|tone| name.strip_suffix(".svg") == Some(tone.class()))
    }
}

/// A page around its content.
pub(super) struct Page<'a> {
    /// The path from the page to the first one, so that all links work behind a prefix of a proxy.
    pub(super) root: &'static str,
    /// The first line, and the title.
    pub(super) verdict: &'a str,
    pub(super) tone: Tone,
    /// Whether the content may still change.
    pub(super) live: bool,
    pub(super) content: Markup,
}

/// The links of every page.
const LINKS: [(&str, &str); 5] = [
    ("incidents", "Incidents"),
    ("batches", "Batches"),
    ("probes", "Rooms"),
    ("metrics", "Metrics"),
    ("docs/reasons", "Documentation"),
];

/// Seconds after which a browser without scripts loads a page that may still change.
const REFRESH_SECONDS: u8 = 10;

impl Page<'_> {
    pub(super) fn render(self) -> String {
        let Self {
            root,
            verdict,
            tone,
            live,
            content,
        } = self;
        let class = tone.class();
        // A mark in a name would turn the verdict around.
        let verdict = without_marks(verdict);
        let stream = live.then(|| format!("{root}api/v1/stream"));
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    title { (verdict) }
                    link rel="stylesheet" href={ (root) "assets/style.css" };
                    link rel="icon" href={ (root) "assets/" (class) ".svg" };
                    @if live {
                        noscript { meta http-equiv="refresh" content=(REFRESH_SECONDS); }
                        script src={ (root) "assets/live.js" } defer {}
                    }
                }
                body {
                    header {
                        nav aria-label="Pages" {
                            a href=(root) { "livekit-canary" }
                            @for (path, name) in LINKS { " " a href={ (root) (path) } { (name) } }
                        }
                        h1 .(class) { (verdict) }
                    }
                    main data-live=[stream] { (content) }
                }
            }
        };
        page.into_string()
    }
}

pub(super) fn error(text: &str, root: &'static str) -> String {
    let page = Page {
        root,
        verdict: text,
        tone: Tone::Warning,
        live: false,
        content: html! { p { a href=(root) { "All targets" } } },
    };
    page.render()
}

/// A time, and its distance from now: `2026-11-24 13:15:00 UTC (2 min ago)`.
pub(super) struct Moment {
    pub(super) at: DateTime<Utc>,
    pub(super) now: DateTime<Utc>,
}

impl Render for Moment {
    fn render(&self) -> Markup {
        html! { time datetime=(self.at.to_rfc3339()) { (absolute(self.at)) " (" (self.distance()) ")" } }
    }
}

impl Moment {
    /// The distance from now. A pointer shows the time itself.
    pub(super) fn ago(&self) -> Markup {
        html! { time datetime=(self.at.to_rfc3339()) title=(absolute(self.at)) { (self.distance()) } }
    }

    fn distance(&self) -> String {
        let distance = self.now - self.at;
        if distance < TimeDelta::zero() {
            format!("in {}", length(distance))
        } else {
            format!("{} ago", length(distance))
        }
    }
}

fn absolute(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// A length in its largest unit: `22 min`.
pub(super) fn length(length: TimeDelta) -> String {
    let seconds = length.num_seconds().unsigned_abs();
    let (number, unit) = match seconds {
        0..120 => (seconds, "s"),
        120..7_200 => (seconds / 60, "min"),
        7_200..172_800 => (seconds / 3_600, "h"),
        _ => (seconds / 86_400, "days"),
    };
    format!("{number} {unit}")
}

/// A delay: `0.512 s`, or nothing known.
pub(super) fn seconds(delay: Option<f64>) -> String {
    delay.map_or_else(|| "-".to_owned(), |delay| format!("{delay:.3}\u{a0}s"))
}
