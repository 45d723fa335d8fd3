//! The recording of a call: one track per path, as a whole or one range of it (RFC 9110, section 14), so that a browser's player
//! can seek.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::ops::Range;
use std::time::SystemTime;

use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_RANGE, ETAG, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tokio::task;
use tracing::warn;

use super::response::{HttpError, ServerResponse, response};
use crate::history::History;
use crate::livekit::event::Speaker;
use crate::recording::RecordingFile;

const CONTENT_TYPE: &str = "audio/ogg";

/// What a request asks of a file of this many bytes.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    Whole,
    /// At least one byte.
    Bytes(Range<u64>),
    Unsatisfiable,
}

/// The track that a path's last segment names.
pub(super) fn track(file: &str) -> Option<Speaker> {
    match file {
        "agent.ogg" => Some(Speaker::Agent),
        "caller.ogg" => Some(Speaker::Caller),
        _ => None,
    }
}

/// Reads the file on a thread that may block.
///
/// # Errors
/// 404 if the call was not recorded or its recording is deleted, 416 for a range outside of the file, 503 if the file cannot be
/// read.
pub(super) async fn recording(
    history: &History,
    room: &str,
    track: Speaker,
    headers: &HeaderMap,
) -> Result<ServerResponse, HttpError> {
    let (store, room, headers) = (
        history.recordings().clone(),
        room.to_owned(),
        headers.clone(),
    );
    let read = task::spawn_blocking(move || {
        let found = store.read(&room, track)?;
        found.map(|found| respond(found, &headers)).transpose()
    });
    let read = read
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)));
    match read {
        Ok(Some(response)) => response,
        Ok(None) => Err(HttpError::new(
            StatusCode::NOT_FOUND,
            "no such recording: the call was not recorded (record.audio), this side of it sent no audio, or the recording \
             was deleted (history.keep_recordings, history.max_recording_megabytes)",
        )),
        Err(error) => {
            warn!("HTTP: cannot read a recording: {error}");
            let text = format!("the recording cannot be read: {error}");
            Err(HttpError::new(StatusCode::SERVICE_UNAVAILABLE, text))
        }
    }
}

fn respond(
    mut found: RecordingFile,
    headers: &HeaderMap,
) -> io::Result<Result<ServerResponse, HttpError>> {
    let tag = entity_tag(found.bytes, found.written);
    let answer = if names_tag(headers, IF_NONE_MATCH, &tag) {
        Ok(response(StatusCode::NOT_MODIFIED, CONTENT_TYPE, ""))
    } else {
        match part(headers, found.bytes, &tag) {
            Part::Whole => {
                let content = read(&mut found.file, &(0..found.bytes))?;
                Ok(response(StatusCode::OK, CONTENT_TYPE, content))
            }
            Part::Bytes(range) => {
                let content = read(&mut found.file, &range)?;
                let mut part = response(StatusCode::PARTIAL_CONTENT, CONTENT_TYPE, content);
                let position = format!("bytes {}-{}/{}", range.start, range.end - 1, found.bytes);
                part.headers_mut()
                    .insert(CONTENT_RANGE, text_value(&position));
                Ok(part)
            }
            Part::Unsatisfiable => {
                let text = format!(
                    "the range is outside of the recording, which has {} bytes",
                    found.bytes
                );
                let error = HttpError::new(StatusCode::RANGE_NOT_SATISFIABLE, text);
                let position = format!("bytes */{}", found.bytes);
                Err(error.with(CONTENT_RANGE, text_value(&position)))
            }
        }
    };
    Ok(answer.map(|mut response| {
        let headers = response.headers_mut();
        headers.insert(ETAG, text_value(&tag));
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        // A cache asks again each time, so a deleted recording is not played.
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
        response
    }))
}

fn read(file: &mut File, range: &Range<u64>) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(range.start))?;
    let length = range.end - range.start;
    let mut content = Vec::new();
    file.take(length).read_to_end(&mut content)?;
    if content.len() as u64 == length {
        Ok(content)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// A file never changes, so its size and time identify it.
fn entity_tag(bytes: u64, written: SystemTime) -> String {
    let since = written.duration_since(SystemTime::UNIX_EPOCH);
    let nanos = since.map_or(0, |since| since.as_nanos());
    format!("\"{bytes:x}-{nanos:x}\"")
}

fn text_value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("digits and ASCII punctuation are valid in a header")
}

/// Whether a header lists this tag.
fn names_tag(headers: &HeaderMap, name: HeaderName, tag: &str) -> bool {
    let values = headers.get_all(name).iter();
    let mut listed = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    listed.any(|listed| {
        let listed = listed.trim();
        listed == tag || listed.strip_prefix("W/") == Some(tag)
    })
}

/// A range that is malformed or that names several parts is ignored, as RFC 9110, section 14.2, allows.
fn part(headers: &HeaderMap, bytes: u64, tag: &str) -> Part {
    let unchanged = headers
        .get(IF_RANGE)
        .is_none_or(|condition| condition.as_bytes() == tag.as_bytes());
    let range = headers.get(RANGE).and_then(|range| range.to_str().ok());
    let range = range.filter(|_| unchanged);
    let Some(range) = range.and_then(|range| range.trim().strip_prefix("bytes=")) else {
        return Part::Whole;
    };
    let Some((first, last)) = range.split_once('-') else {
        return Part::Whole;
    };
    let number = |text: &str| {
        let text = text.trim();
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // A number that is too large is beyond every file.
        is_number.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let range = match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(bytes),
        (Some(first), None) if last.trim().is_empty() => first..bytes,
        // The last bytes.
        (None, Some(count)) if first.trim().is_empty() => bytes.saturating_sub(count)..bytes,
        _ => return Part::Whole,
    };
    if range.is_empty() {
        Part::Unsatisfiable
    } else {
        Part::Bytes(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            (
                name.clone(),
                HeaderValue::from_str(value).expect("the test's own"),
            )
        });
        pairs.collect()
    }

    #[test]
    fn range_selects_bytes_and_other_forms_are_ignored() {
        for (range, expected) in [
            ("bytes=0-", Part::Bytes(0..100)),
            ("bytes=0-0", Part::Bytes(0..1)),
            ("bytes=10-19", Part::Bytes(10..20)),
            ("bytes=90-1000", Part::Bytes(90..100)),
            ("bytes=0-99999999999999999999999", Part::Bytes(0..100)),
            ("bytes=-5", Part::Bytes(95..100)),
            ("bytes=-1000", Part::Bytes(0..100)),
            ("bytes=100-", Part::Unsatisfiable),
            ("bytes=99999999999999999999999-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=5-4", Part::Whole),
            ("bytes=0-1,5-6", Part::Whole),
            ("bytes=-", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=+1-2", Part::Whole),
            ("seconds=0-1", Part::Whole),
        ] {
            let headers = headers(&[(RANGE, range)]);
            assert_eq!(part(&headers, 100, "\"tag\""), expected, "{range}");
        }
        assert_eq!(part(&HeaderMap::new(), 100, "\"tag\""), Part::Whole);
    }

    #[test]
    fn range_of_another_version_is_ignored() {
        for (condition, expected) in [
            ("\"tag\"", Part::Bytes(1..2)),
            ("\"other\"", Part::Whole),
            ("W/\"tag\"", Part::Whole),
            ("Mon, 01 Jan 2024 00:00:00 GMT", Part::Whole),
        ] {
            let headers = headers(&[(RANGE, "bytes=1-1"), (IF_RANGE, condition)]);
            assert_eq!(part(&headers, 100, "\"tag\""), expected, "{condition}");
        }
    }

    #[test]
    fn empty_file_has_no_range() {
        let headers = headers(&[(RANGE, "bytes=0-")]);
        assert_eq!(part(&headers, 0, "\"tag\""), Part::Unsatisfiable);
    }
}
