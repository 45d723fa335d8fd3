//! The bodies of a webhook: a JSON document of this project's own, or one that Slack accepts.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Value, json};

use super::text::{self, Tense};
use super::{Notice, NoticeKind};

/// Increases when a key is renamed or removed. A new key is no new version.
const VERSION: u8 = 1;

/// Slack accepts 3,000 characters of a section and 50 blocks: <https://docs.slack.dev/reference/block-kit/blocks/section-block>
const MAX_SECTION_CHARS: usize = 2_900;
const MAX_SECTIONS: usize = 20;

/// What people and programs receive. `docs/operate.md` describes the keys.
#[derive(Serialize)]
struct Document<'a> {
    version: u8,
    text: String,
    #[serde(flatten)]
    notice: NoticeDocument<'a>,
    /// The other incidents of a grouped message.
    also: Vec<NoticeDocument<'a>>,
}

#[derive(Serialize)]
struct NoticeDocument<'a> {
    kind: NoticeKind,
    target: &'a str,
    project: &'a str,
    fault: Option<&'a str>,
    incident: &'a str,
    continues: bool,
    began_at: DateTime<Utc>,
    at: DateTime<Utc>,
    ended_by: Option<&'a str>,
    reasons: Vec<ReasonDocument<'a>>,
    failed: u32,
    rooms: u32,
    differs: &'a [String],
    detail: Option<&'a str>,
    url: Option<&'a str>,
    drill: bool,
}

#[derive(Serialize)]
struct ReasonDocument<'a> {
    reason: &'a str,
    rooms: u32,
}

impl<'a> From<&'a Notice> for NoticeDocument<'a> {
    fn from(notice: &'a Notice) -> Self {
        let reasons = notice.reasons.iter();
        Self {
            kind: notice.kind,
            target: &notice.target,
            project: &notice.project,
            fault: notice.fault.as_deref(),
            incident: &notice.incident,
            continues: notice.continues,
            began_at: notice.began_at,
            at: notice.at,
            ended_by: notice.ended_by.as_deref(),
            reasons: reasons
                .map(|(reason, rooms)| ReasonDocument {
                    reason,
                    rooms: *rooms,
                })
                .collect(),
            failed: notice.failed,
            rooms: notice.rooms,
            differs: &notice.differs,
            detail: notice.detail.as_deref(),
            url: notice.url.as_deref(),
            drill: notice.drill,
        }
    }
}

/// The document of one message; `None` without a notice.
pub(super) fn document(notices: &[Notice], tense: Tense) -> Option<Value> {
    let (first, others) = notices.split_first()?;
    let document = Document {
        version: VERSION,
        text: text::whole(notices, tense),
        notice: first.into(),
        also: others.iter().map(Into::into).collect(),
    };
    serde_json::to_value(document).ok()
}

/// The same for an incoming webhook of Slack, or of a program that accepts its messages.
pub(super) fn slack(notices: &[Notice], tense: Tense) -> Value {
    let mut blocks = Vec::new();
    if let [notice] = notices {
        blocks.push(section(&format!(
            "*{}*",
            escaped(&notice.headline(tense), 2_500)
        )));
        blocks.extend(
            notice
                .explanations()
                .iter()
                .map(|text| section(&escaped(text, MAX_SECTION_CHARS))),
        );
        blocks.extend(
            notice
                .url
                .as_deref()
                .map(|url| section(&link(url, "Open the incident"))),
        );
    } else {
        blocks.push(section(&format!(
            "*{}*",
            escaped(&text::group_headline(notices), 2_500)
        )));
        for notice in notices.iter().take(MAX_SECTIONS) {
            let headline = notice.headline(tense);
            let link = notice
                .url
                .as_deref()
                .map_or_else(String::new, |url| format!(" {}", link(url, "Open")));
            let room = MAX_SECTION_CHARS.saturating_sub(link.chars().count());
            blocks.push(section(&format!(
                "{}{link}",
                escaped(text::undrilled(&headline), room)
            )));
        }
        if notices.len() > MAX_SECTIONS {
            let more = notices.len() - MAX_SECTIONS;
            blocks.push(section(&format!("and {more} more")));
        }
    }
    json!({
        "text": escaped(&text::whole(notices, tense), MAX_SECTION_CHARS),
        "blocks": blocks,
    })
}

/// `verbatim`: Slack turns no name in the text into a mention.
fn section(text: &str) -> Value {
    json!({ "type": "section", "text": { "type": "mrkdwn", "text": text, "verbatim": true } })
}

fn link(url: &str, label: &str) -> String {
    // A bar would end the address.
    let url = url.replace('|', "%7C");
    format!("<{}|{label}>", escaped(&url, MAX_SECTION_CHARS / 2))
}

/// Slack's three control characters as entities, with at most `chars` characters in the result:
/// <https://docs.slack.dev/messaging/formatting-message-text#escaping>
fn escaped(text: &str, chars: usize) -> String {
    let mut shown = String::new();
    let mut used = 0;
    for char in text.chars() {
        let replaced: &str = match char {
            '&' => "&amp;",
            '<' => "&lt;",
            '>' => "&gt;",
            _ => "",
        };
        let length = replaced.len().max(1);
        if used + length >= chars {
            shown.push('…');
            break;
        }
        used += length;
        if replaced.is_empty() {
            shown.push(char);
        } else {
            shown.push_str(replaced);
        }
    }
    shown
}
