//! Events of `PagerDuty`'s Events API v2: <https://developer.pagerduty.com/docs/events-api-v2-overview>

use serde_json::{Map, Value, json};

use super::text::{Tense, shortened};
use super::{Notice, NoticeKind};

/// The longest summary that `PagerDuty` accepts.
const MAX_SUMMARY_CHARS: usize = 1_024;

/// One event. An incident of the canary is one incident of `PagerDuty`, because both of its events have its id as `dedup_key`.
pub(super) fn event(notice: &Notice, routing_key: &str) -> Value {
    match notice.kind {
        NoticeKind::Opened => trigger(notice, routing_key, "critical"),
        NoticeKind::Blind => trigger(notice, routing_key, "warning"),
        NoticeKind::Test => trigger(notice, routing_key, "info"),
        NoticeKind::Closed | NoticeKind::Sighted => resolve(notice, routing_key),
    }
}

/// Without a payload: `PagerDuty` reads none of an event that resolves.
pub(super) fn resolve(notice: &Notice, routing_key: &str) -> Value {
    json!({
        "routing_key": routing_key,
        "event_action": "resolve",
        "dedup_key": notice.incident,
    })
}

fn trigger(notice: &Notice, routing_key: &str, severity: &str) -> Value {
    let reasons: Map<String, Value> = notice
        .reasons
        .iter()
        .map(|(reason, rooms)| (reason.clone(), json!(rooms)))
        .collect();
    let mut event = json!({
        "routing_key": routing_key,
        "event_action": "trigger",
        "dedup_key": notice.incident,
        "client": "livekit-canary",
        "payload": {
            "summary": shortened(&notice.headline(Tense::Present), MAX_SUMMARY_CHARS),
            "source": notice.target,
            "severity": severity,
            "timestamp": notice.began_at.to_rfc3339(),
            "component": notice.fault.as_deref().unwrap_or("canary"),
            "group": notice.project,
            "class": notice.reasons.first().map_or("none", |(reason, _)| reason),
            "custom_details": {
                "incident": notice.incident,
                "target": notice.target,
                "project": notice.project,
                "began_at": notice.began_at,
                "continues": notice.continues,
                "reasons": reasons,
                "failed": notice.failed,
                "rooms": notice.rooms,
                "differs": notice.differs,
                "detail": notice.detail,
                "drill": notice.drill,
            },
        },
    });
    if let Some(url) = &notice.url {
        event["client_url"] = json!(url);
        event["links"] = json!([{ "href": url, "text": "Incident" }]);
    }
    event
}
