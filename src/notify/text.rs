//! The sentences of a message: which target, since when, which reason and share, what differs.

use std::time::Duration;

use chrono::{DateTime, Utc};
use humantime::format_duration;

use super::{Notice, NoticeKind};
use crate::report::counted;

/// Reasons and differences that a text names. The incident's page has all of them.
const MAX_NAMED: usize = 5;
/// Targets that the text of a grouped message names.
const MAX_LINES: usize = 20;

/// How one message reports what happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tense {
    /// When it happens.
    Present,
    /// Begin and end in one message: the message about the begin was not delivered before the end.
    Past,
}

impl Notice {
    /// What happened, in one sentence.
    pub(super) fn headline(&self, tense: Tense) -> String {
        let began = utc(self.began_at);
        let at = utc(self.at);
        let lasted = self.lasted();
        let lasted = format_duration(Duration::from_secs(lasted.as_secs()));
        let target = &self.target;
        let who = self.who();
        let share = self.share();
        let sentence = match (self.kind, tense) {
            (NoticeKind::Opened, _) => {
                let again = if self.continues { " again" } else { "" };
                format!("{target}: {who} fails{again} since {began}{share}.")
            }
            (NoticeKind::Closed, Tense::Past) => {
                let end = match self.ended_without_recovery() {
                    Some(why) => format!("No recovery was seen: {why}."),
                    None => "It has recovered.".to_owned(),
                };
                format!("{target}: {who} failed from {began} to {at} ({lasted}){share}. {end}")
            }
            (NoticeKind::Closed, Tense::Present) => match self.ended_without_recovery() {
                Some(why) => format!(
                    "{target}: {why} at {at}. {} had failed since {began} ({lasted}){share}. No recovery was seen.",
                    capitalized(who)
                ),
                None => format!(
                    "{target}: recovered at {at}, after {lasted}. {} had failed since {began}{share}.",
                    capitalized(who)
                ),
            },
            (NoticeKind::Blind, _) => {
                format!(
                    "{target}: the canary has had no verdict on the agent since {began}{share}."
                )
            }
            (NoticeKind::Sighted, Tense::Present) => {
                format!(
                    "{target}: the canary has verdicts on the agent again since {at}, after {lasted} without one."
                )
            }
            (NoticeKind::Sighted, Tense::Past) => {
                format!(
                    "{target}: the canary had no verdict on the agent from {began} to {at} ({lasted}){share}. It has verdicts again."
                )
            }
            (NoticeKind::Test, _) => {
                format!("Test message of livekit-canary, sent at {at}. This channel works.")
            }
        };
        let drill = if self.drill { "DRILL: " } else { "" };
        format!("{drill}{sentence}")
    }

    /// What helps to find the cause, one sentence each.
    pub(super) fn explanations(&self) -> Vec<String> {
        let mut sentences = Vec::new();
        if !self.differs.is_empty() {
            let mut named = self
                .differs
                .iter()
                .take(MAX_NAMED)
                .cloned()
                .collect::<Vec<_>>();
            if let Some(more) = self
                .differs
                .len()
                .checked_sub(MAX_NAMED)
                .filter(|more| *more > 0)
            {
                named.push(format!("{more} more"));
            }
            sentences.push(format!("What differs: {}.", named.join("; ")));
        }
        if let Some(detail) = &self.detail {
            let label = match self.kind {
                NoticeKind::Opened => "Last failure: ",
                _ => "",
            };
            let end = if detail.ends_with('.') { "" } else { "." };
            sentences.push(format!("{label}{detail}{end}"));
        }
        sentences
    }

    /// From the begin to the change of the state.
    pub(super) fn lasted(&self) -> Duration {
        (self.at - self.began_at).to_std().unwrap_or_default()
    }

    fn who(&self) -> &'static str {
        match self.fault.as_deref() {
            Some("service") => "LiveKit or the network",
            _ => "the agent",
        }
    }

    /// Why an incident ended, if not by good rooms.
    fn ended_without_recovery(&self) -> Option<String> {
        match self.ended_by.as_deref() {
            None | Some("recovered") => None,
            Some(how) => Some(format!("the target was {how}")),
        }
    }

    /// The reasons and the share of failed rooms; empty if no room has ended.
    fn share(&self) -> String {
        if self.rooms == 0 {
            return String::new();
        }
        let rooms = counted(self.rooms.into(), "room");
        let Some(((first, number), others)) = self.reasons.split_first() else {
            return format!(": {} of {rooms} failed", self.failed);
        };
        let mut parts = vec![format!("{first} in {number}")];
        let named = others.iter().take(MAX_NAMED - 1);
        parts.extend(named.map(|(reason, number)| format!("{reason} in {number}")));
        if others.len() >= MAX_NAMED {
            parts.push(format!("{} more reasons", self.reasons.len() - MAX_NAMED));
        }
        let last = parts.pop().unwrap_or_default();
        let parts = if parts.is_empty() {
            last
        } else {
            format!("{} and {last}", parts.join(", "))
        };
        format!(": {parts} of {rooms}")
    }
}

/// One message as plain text, with its link.
pub(super) fn whole(notices: &[Notice], tense: Tense) -> String {
    if let [notice] = notices {
        let mut parts = vec![notice.headline(tense)];
        parts.extend(notice.explanations());
        parts.extend(notice.url.clone());
        return parts.join(" ");
    }
    let mut lines = vec![group_headline(notices)];
    for notice in notices.iter().take(MAX_LINES) {
        let link = notice
            .url
            .as_ref()
            .map_or_else(String::new, |url| format!(" {url}"));
        lines.push(format!("- {}{link}", undrilled(&notice.headline(tense))));
    }
    if let Some(more) = notices
        .len()
        .checked_sub(MAX_LINES)
        .filter(|more| *more > 0)
    {
        lines.push(format!("- and {more} more"));
    }
    lines.join("\n")
}

/// The first line of a message about several targets of one project.
pub(super) fn group_headline(notices: &[Notice]) -> String {
    let drill = notices.iter().any(|notice| notice.drill);
    let drill = if drill { "DRILL: " } else { "" };
    let project = notices.first().map_or("", |notice| &notice.project);
    format!(
        "{drill}{} targets of project {project} fail:",
        notices.len()
    )
}

/// A line below a headline that says that it is a drill.
pub(super) fn undrilled(headline: &str) -> &str {
    headline.strip_prefix("DRILL: ").unwrap_or(headline)
}

fn utc(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}

fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        format!("{}{}", first.to_uppercase(), letters.as_str())
    })
}

/// The beginning of a text, with at most `chars` characters.
pub(super) fn shortened(text: &str, chars: usize) -> String {
    if text.chars().count() <= chars {
        return text.to_owned();
    }
    let kept: String = text.chars().take(chars.saturating_sub(1)).collect();
    format!("{kept}…")
}
