//! Removes what people said from the documents of the history, for clients that must not read it.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

use super::access::{Protection, WITHHELD};

/// The document of a batch or a probe as its reader may see it. Its last key, `withheld`, is null, or says what was removed and
/// which setting shows it.
///
/// # Errors
/// The document is no JSON object.
pub(super) fn disclose(
    document: &RawValue,
    protection: Protection,
) -> serde_json::Result<Box<RawValue>> {
    let mut fields: Fields = serde_json::from_str(document.get())?;
    let withheld = !protection.is_sensitive_allowed() && fields.withhold()?;
    fields.0.push((
        "withheld".to_owned(),
        to_raw_value(&withheld.then_some(WITHHELD))?,
    ));
    to_raw_value(&fields)
}

/// The fields of a JSON object, in their order.
struct Fields(Vec<(String, Box<RawValue>)>);

impl Fields {
    /// Sets what people said to null, at every depth. Returns whether there was anything.
    fn withhold(&mut self) -> serde_json::Result<bool> {
        let mut found = false;
        for (key, value) in &mut self.0 {
            match key.as_str() {
                "transcript" | "recording" | "said" | "heard" | "reply_text"
                    if value.get() != "null" =>
                {
                    *value = RawValue::NULL.to_owned();
                    found = true;
                }
                "probes" | "turns" => {
                    let mut objects: Vec<Self> = serde_json::from_str(value.get())?;
                    for object in &mut objects {
                        found |= object.withhold()?;
                    }
                    *value = to_raw_value(&objects)?;
                }
                _ => {}
            }
        }
        Ok(found)
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;

        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(FieldsVisitor)
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SensitiveAccess;

    fn disclosed(document: &str, protection: Protection) -> String {
        let document = RawValue::from_string(document.to_owned()).unwrap();
        disclose(&document, protection).unwrap().get().to_owned()
    }

    #[test]
    fn what_people_said_is_withheld_at_every_depth_and_every_other_field_keeps_its_place() {
        let closed = Protection::default();
        let open = Protection {
            sensitive: SensitiveAccess::Everyone,
            ..closed
        };
        let probe = |transcript: &str, heard: &str| {
            format!(
                "{{\"room\":\"r\",\"turns\":[{{\"z\":1.50,\"said\":null,\"heard\":{heard},\"a\":2}}],\"transcript\":{transcript},\
                 \"recording\":{transcript},\"waveform\":[7]}}"
            )
        };
        let with = |document: &str, withheld: &str| {
            let open = document.strip_suffix('}').unwrap();
            format!("{open},\"withheld\":{withheld}}}")
        };
        let spoken = probe("[{\"text\":\"my name\"}]", "\"my name\"");
        let silent = probe("null", "null");
        let why = serde_json::to_string(WITHHELD).unwrap();
        assert_eq!(disclosed(&spoken, closed), with(&silent, &why));
        assert_eq!(disclosed(&spoken, open), with(&spoken, "null"));
        assert_eq!(
            disclosed(&silent, closed),
            with(&silent, "null"),
            "nothing to withhold"
        );
        let batch = |probe: &str| {
            format!("{{\"batch_id\":\"b\",\"probes\":[{probe},{probe}],\"summary\":{{}}}}")
        };
        assert_eq!(
            disclosed(&batch(&spoken), closed),
            with(&batch(&silent), &why)
        );
        assert!(why.contains("http.sensitive"), "{why}");
        let list = RawValue::from_string("[1]".to_owned()).unwrap();
        assert!(disclose(&list, closed).is_err());
    }
}
