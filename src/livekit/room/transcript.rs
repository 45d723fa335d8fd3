//! The agent's transcript of the call: of its own speech and of the caller's. It arrives in text streams with the topic
//! `lk.transcription`, or in `Transcription` packets, which are the older form.
//!
//! An agent sends both forms, with different segment ids, as long as a participant may understand only the older one
//! (`voice/room_io/_output.py` of livekit-agents 1.8.9).

use livekit_protocol::{Transcription, data_stream};
use tokio::time::Instant;

use crate::livekit::event::{TranscriptSegment, TranscriptText};

pub(crate) const TOPIC: &str = "lk.transcription";

const SEGMENT: &str = "lk.segment_id";
const TRACK: &str = "lk.transcribed_track_id";
const FINAL: &str = "lk.transcription_final";

/// Segments that are read from one packet; agents send one per packet.
const MAX_SEGMENTS: usize = 8;

/// Characters of a segment's or a track's id; real ids have about a dozen.
const MAX_ID_LENGTH: usize = 64;

/// Characters of a participant's identity: livekit-server's default limit, so that no real identity is cut.
const MAX_IDENTITY_LENGTH: usize = 256;

/// The part of a text stream's header that describes its segment.
pub(crate) struct TranscriptHeader {
    identity: String,
    track: Option<String>,
    segment: String,
    is_final: bool,
    began: Instant,
}

impl TranscriptHeader {
    pub(crate) fn new(at: Instant, identity: &str, header: &data_stream::Header) -> Self {
        let attribute = |key| header.attributes.get(key).map(|value| id(value));
        Self {
            identity: cut(identity, MAX_IDENTITY_LENGTH),
            track: attribute(TRACK),
            segment: attribute(SEGMENT).unwrap_or_else(|| id(&header.stream_id)),
            is_final: is_final(&header.attributes),
            began: at,
        }
    }

    /// The segment with this text; `None` if the text is empty. Without a trailer, the stream was cut off and the segment is
    /// not final.
    pub(crate) fn into_segment(
        self,
        content: &[u8],
        trailer: Option<&data_stream::Trailer>,
    ) -> Option<TranscriptSegment> {
        let text = TranscriptText::new(&String::from_utf8_lossy(content));
        let ended = trailer.is_some_and(|it| self.is_final || is_final(&it.attributes));
        (!text.is_empty()).then_some(TranscriptSegment {
            identity: self.identity,
            track: self.track,
            segment: self.segment,
            text,
            is_final: ended,
            began: self.began,
            older: false,
        })
    }
}

fn is_final(attributes: &std::collections::HashMap<String, String>) -> bool {
    attributes.get(FINAL).is_some_and(|value| value == "true")
}

fn id(text: &str) -> String {
    cut(text, MAX_ID_LENGTH)
}

fn cut(text: &str, max: usize) -> String {
    text.chars().take(max).collect()
}

/// The segments of a `Transcription` packet.
pub(crate) fn from_packet(
    at: Instant,
    packet: Transcription,
) -> impl Iterator<Item = TranscriptSegment> {
    let identity = cut(
        &packet.transcribed_participant_identity,
        MAX_IDENTITY_LENGTH,
    );
    let track = Some(id(&packet.track_id)).filter(|it| !it.is_empty());
    let segments = packet.segments.into_iter().take(MAX_SEGMENTS);
    let segments = segments.map(move |segment| TranscriptSegment {
        identity: identity.clone(),
        track: track.clone(),
        segment: id(&segment.id),
        text: TranscriptText::new(&segment.text),
        is_final: segment.r#final,
        began: at,
        older: true,
    });
    segments.filter(|segment| !segment.text.is_empty())
}
