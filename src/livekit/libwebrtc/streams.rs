//! Data streams that the SDK has put together, as the packets that they came in: what reads them is the same for both
//! engines. The SDK alone can read compressed ones.

use std::collections::HashMap;

use futures_util::stream::{self, Stream, StreamExt};
use livekit_protocol as proto;
use proto::DataPacket;
use proto::data_packet::Value;
use proto::data_stream::{Chunk, Header, Trailer};

/// A stream that a participant has begun to send.
pub(crate) struct OpenedStream {
    pub(crate) identity: String,
    pub(crate) id: String,
    pub(crate) topic: String,
}

/// The packets of one stream. Where its content ends in an error, the trailer is missing: it was cut off.
///
/// `attributes`: as they are known when they are asked for; the sender may add to them at the end.
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

    /// What the reader makes of a transcript with this content.
    async fn told(content: Vec<Result<Vec<u8>, ()>>) -> (Vec<AgentMessage>, usize) {
        let opened = OpenedStream {
            identity: "agent-x".to_owned(),
            id: "a".to_owned(),
            topic: transcript::TOPIC.to_owned(),
        };
        // What makes a transcript final comes with the trailer.
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
        let told = packets.map(|packet| reader.on_packet(Instant::now(), packet));
        let told = told.collect::<Vec<_>>().await;
        (
            told.into_iter().flatten().collect(),
            reader.unfinished().len(),
        )
    }

    #[tokio::test]
    async fn stream_is_read_as_the_packets_that_it_came_in() {
        let content = [&b"Good "[..], b"day"].map(|it| Ok(it.to_vec()));
        let (told, unfinished) = told(content.to_vec()).await;
        let [AgentMessage::Transcript(words)] = &told[..] else {
            panic!("{told:?}");
        };
        assert_eq!((words.text.as_str(), words.is_final), ("Good day", true));
        assert_eq!(words.identity, "agent-x");
        assert_eq!(unfinished, 0);
    }

    #[tokio::test]
    async fn stream_that_breaks_off_has_no_end() {
        let content = vec![Ok(b"Good ".to_vec()), Err(()), Ok(b"day".to_vec())];
        let (told, unfinished) = told(content).await;
        assert_eq!(told, []);
        assert_eq!(unfinished, 1);
    }
}
