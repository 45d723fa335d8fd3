//! Converts data streams, which the SDK has assembled, back to packets, so that both engines use the same reader. Only
//! the SDK can read compressed streams.

use std::collections::HashMap;

use futures_util::stream::{self, Stream, StreamExt};
use livekit_protocol as proto;
use proto::DataPacket;
use proto::data_packet::Value;
use proto::data_stream::{Chunk, Header, Trailer};

/// A data stream that a participant has started to send.
pub(crate) struct OpenedStream {
    pub(crate) identity: String,
    pub(crate) id: String,
    pub(crate) topic: String,
}

/// Returns the packets of one stream. If its content ends in an error, the stream was cut off and has no trailer.
///
/// `attributes` is called for the header and again for the trailer, because the sender may add attributes at the end.
pub(crate) fn packets<E>(
    opened: OpenedStream,
    attributes: impl Fn() -> HashMap<String, String>,
    content: impl Stream<Item = Result<Vec<u8>, E>>,
) -> impl Stream<Item = DataPacket> {
    let OpenedStream {
        identity,
        id,
        topic,
    } = opened;
    let header = Header {
        stream_id: id.clone(),
        topic,
        attributes: attributes(),
        ..Header::default()
    };
    let ended = stream::once(std::future::ready(None));
    let pieces = content.map(Some).chain(ended);
    // An error ends the whole stream, so that no trailer follows.
    let pieces = pieces.scan(false, |cut, piece| {
        *cut |= matches!(piece, Some(Err(_)));
        std::future::ready((!*cut).then_some(piece))
    });
    let pieces = pieces.map(move |piece| match piece {
        Some(content) => Value::StreamChunk(Chunk {
            stream_id: id.clone(),
            content: content.unwrap_or_default(),
            ..Chunk::default()
        }),
        None => Value::StreamTrailer(Trailer {
            stream_id: id.clone(),
            attributes: attributes(),
            ..Trailer::default()
        }),
    });
    let values = stream::once(std::future::ready(Value::StreamHeader(header))).chain(pieces);
    values.map(move |value| packet(identity.clone(), value))
}

/// Wraps `value` in a packet of the participant `identity`.
pub(crate) fn packet(identity: String, value: Value) -> DataPacket {
    DataPacket {
        participant_identity: identity,
        value: Some(value),
        ..DataPacket::default()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::time::Instant;

    use super::*;
    use crate::livekit::room::agent_session::{AgentMessage, StreamReader};
    use crate::livekit::room::transcript;

    /// The messages that the reader returns for a transcript with this content, and its number of unfinished streams.
    async fn read(content: Vec<Result<Vec<u8>, ()>>) -> (Vec<AgentMessage>, usize) {
        let opened = OpenedStream {
            identity: "agent-x".to_owned(),
            id: "a".to_owned(),
            topic: transcript::TOPIC.to_owned(),
        };
        // The attribute that makes a transcript final arrives with the trailer.
        let asked = Cell::new(0);
        let attributes = || {
            asked.set(asked.get() + 1);
            let key = if asked.get() > 1 {
                "lk.transcription_final"
            } else {
                "lk.segment_id"
            };
            HashMap::from([(key.to_owned(), "true".to_owned())])
        };
        let packets = packets(opened, attributes, stream::iter(content));
        let mut reader = StreamReader::new(true);
        let messages = packets.map(|packet| reader.on_packet(Instant::now(), packet));
        let messages = messages.collect::<Vec<_>>().await;
        (
            messages.into_iter().flatten().collect(),
            reader.unfinished().len(),
        )
    }

    #[tokio::test]
    async fn stream_is_read_like_packets_from_the_wire() {
        let content = [&b"Good "[..], b"day"].map(|it| Ok(it.to_vec()));
        let (messages, unfinished) = read(content.to_vec()).await;
        let [AgentMessage::Transcript(words)] = &messages[..] else {
            panic!("{messages:?}");
        };
        assert_eq!((words.text.as_str(), words.is_final), ("Good day", true));
        assert_eq!(words.identity, "agent-x");
        assert_eq!(unfinished, 0);
    }

    #[tokio::test]
    async fn stream_that_is_cut_off_stays_unfinished() {
        let content = vec![Ok(b"Good ".to_vec()), Err(()), Ok(b"day".to_vec())];
        let (messages, unfinished) = read(content).await;
        assert_eq!(messages, []);
        assert_eq!(unfinished, 1);
    }
}
