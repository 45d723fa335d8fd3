//! The lists of batches and probes as CSV (RFC 4180), one row per document.
//!
//! A list is requested as CSV with `?format=csv` and not by `Accept`: a link on a page can do that, and a query that was saved or
//! logged shows what it returned.

use serde_json::Value;

use crate::history::StoredDocument;

/// A column: its name, and the keys that lead to its value in the document.
pub(super) type Column = (&'static str, &'static [&'static str]);

pub(super) const BATCH_COLUMNS: &[Column] = &[
    ("batch_id", &["batch_id"]),
    ("target", &["target"]),
    ("project", &["project"]),
    ("purpose", &["purpose"]),
    ("started_at", &["started_at"]),
    ("ended_at", &["ended_at"]),
    ("result", &["result"]),
    ("deployment", &["deployment"]),
    ("ramp", &["ramp"]),
    ("ok", &["summary", "ok"]),
    ("failed", &["summary", "failed"]),
    ("aborted", &["summary", "aborted"]),
    ("not_opened", &["not_opened", "rooms"]),
    ("join_delay_p50_seconds", &["summary", "join_delay", "p50"]),
    ("join_delay_p90_seconds", &["summary", "join_delay", "p90"]),
    ("join_delay_max_seconds", &["summary", "join_delay", "max"]),
];

pub(super) const PROBE_COLUMNS: &[Column] = &[
    ("room", &["room"]),
    ("batch_id", &["batch_id"]),
    ("target", &["target"]),
    ("started_at", &["started_at"]),
    ("position", &["position"]),
    ("outcome", &["outcome"]),
    ("reason", &["reason"]),
    ("origin", &["origin"]),
    ("limit", &["limit"]),
    ("detail", &["detail"]),
    ("join_delay_seconds", &["join_delay_seconds"]),
    ("join_upper_bound", &["join_upper_bound"]),
    (
        "first_speech_delay_seconds",
        &["first_speech_delay_seconds"],
    ),
    ("reply_delay_seconds", &["reply_delay_seconds"]),
    ("node", &["circumstances", "node"]),
    ("region", &["circumstances", "region"]),
    ("worker", &["circumstances", "worker"]),
    ("media_path", &["circumstances", "media_path"]),
    ("agent_version", &["circumstances", "agent_version"]),
    ("agent", &["agent", "identity"]),
    ("packets", &["audio", "packets"]),
    ("lost", &["audio", "lost"]),
    ("jitter_seconds", &["audio", "jitter_seconds"]),
    ("url", &["url"]),
];

/// A header row, and a row per document. A missing value is an empty cell.
///
/// # Errors
/// A document is no JSON.
pub(super) fn render(
    columns: &[Column],
    documents: &[StoredDocument],
) -> serde_json::Result<Vec<u8>> {
    const IN_MEMORY: &str = "every row has the same number of cells, and memory takes every byte";
    let mut writer = csv::WriterBuilder::new()
        .terminator(csv::Terminator::CRLF)
        .from_writer(Vec::new());
    let header = columns.iter().map(|(name, _)| name);
    writer.write_record(header).expect(IN_MEMORY);
    for document in documents {
        let document: Value = serde_json::from_str(document.document.get())?;
        let row = columns.iter().map(|(_, path)| {
            let value = path.iter().try_fold(&document, |value, key| value.get(key));
            value.map_or_else(String::new, cell)
        });
        writer.write_record(row).expect(IN_MEMORY);
    }
    Ok(writer.into_inner().expect(IN_MEMORY))
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => inert(text),
        other => other.to_string(),
    }
}

/// The text as it is shown by a spreadsheet. Servers and agents choose some of these texts, and a spreadsheet runs a cell that
/// begins with one of these characters as a formula. <https://owasp.org/www-community/attacks/CSV_Injection>
fn inert(text: &str) -> String {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n']) {
        format!("'{text}")
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rendered(columns: &[Column], documents: &[Value]) -> String {
        let documents: Vec<_> = documents
            .iter()
            .map(|document| StoredDocument {
                id: "1".to_owned(),
                document: serde_json::value::to_raw_value(document).unwrap(),
            })
            .collect();
        String::from_utf8(render(columns, &documents).unwrap()).unwrap()
    }

    #[test]
    fn rows_are_quoted_as_rfc_4180_says_and_a_formula_is_text() {
        const COLUMNS: &[Column] = &[("a", &["a"]), ("b", &["of", "b"]), ("c", &["c"])];
        let rows = [
            json!({"a": "plain", "of": {"b": -1.5}, "c": true}),
            json!({"a": "comma, \"quote\"\r\nline", "of": null, "c": null}),
            json!({"a": "=1+1", "of": {"b": "@SUM(A1)"}, "c": "-2"}),
            json!({"a": "+49", "of": {"b": "\t=1"}, "c": "a=b"}),
        ];
        let expected = "a,b,c\r\n\
                        plain,-1.5,true\r\n\
                        \"comma, \"\"quote\"\"\r\nline\",,\r\n\
                        '=1+1,'@SUM(A1),'-2\r\n\
                        '+49,'\t=1,a=b\r\n";
        assert_eq!(rendered(COLUMNS, &rows), expected);
        assert_eq!(rendered(COLUMNS, &[]), "a,b,c\r\n");
    }

    #[test]
    fn every_column_is_a_key_of_the_documents() {
        use crate::config::Target;
        use crate::report::json;
        use crate::report::sample::{mixed, project};

        let batch = mixed();
        let head: Value = serde_json::from_str(&json::head(&batch, &Target::default())).unwrap();
        let mut probe: Value =
            serde_json::from_str(&json::of_probe(&batch.probes[0], &project())).unwrap();
        // The history adds these two.
        probe["batch_id"] = "b".into();
        probe["target"] = "support".into();
        for (document, columns) in [(&head, BATCH_COLUMNS), (&probe, PROBE_COLUMNS)] {
            for (name, path) in columns {
                let value = path.iter().try_fold(document, |value, key| value.get(key));
                assert!(value.is_some(), "{name}");
            }
        }
    }
}
