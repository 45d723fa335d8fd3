//! What an agent sends over data channels as streams: a header, one chunk, a trailer.

use std::collections::HashMap;

use livekit_protocol as proto;
use prost::Message as _;
use proto::agent::{AgentSessionEvent, AgentSessionMessage, agent_session_message};
use proto::data_packet::Value;
use proto::data_stream::{self, header::ContentHeader};

use super::ids::{guid, unix_millis};

/// A report of an `AgentSession`: an `AgentSessionMessage` in a byte stream.
pub(crate) fn session(sender: &str, event: AgentSessionEvent) -> Vec<proto::DataPacket> {
    let message = AgentSessionMessage {
        message: Some(agent_session_message::Message::Event(event)),
    };
    let header = data_stream::Header {
        topic: "lk.agent.session".to_owned(),
        mime_type: "application/octet-stream".to_owned(),
        content_header: Some(ContentHeader::ByteHeader(data_stream::ByteHeader {
            name: guid("AS_"),
        })),
        ..data_stream::Header::default()
    };
    stream(sender, header, message.encode_to_vec())
}

/// A transcription as an `AgentSession` sends it; `speaker` stands in the sender field, which an agent may set freely.
pub(crate) fn transcript(
    speaker: &str,
    track: Option<&str>,
    words: &str,
) -> Vec<proto::DataPacket> {
    let mut attributes = HashMap::from([
        ("lk.transcription_final".to_owned(), "true".to_owned()),
        ("lk.segment_id".to_owned(), guid("SG_")),
    ]);
    if let Some(track) = track {
        attributes.insert("lk.transcribed_track_id".to_owned(), track.to_owned());
    }
    let header = data_stream::Header {
        topic: "lk.transcription".to_owned(),
        mime_type: "text/plain".to_owned(),
        attributes,
        content_header: Some(ContentHeader::TextHeader(data_stream::TextHeader::default())),
        ..data_stream::Header::default()
    };
    stream(speaker, header, words.as_bytes().to_vec())
}

fn stream(sender: &str, header: data_stream::Header, content: Vec<u8>) -> Vec<proto::DataPacket> {
    let stream_id = guid("ST_");
    let header = data_stream::Header {
        stream_id: stream_id.clone(),
        timestamp: unix_millis(),
        total_length: u64::try_from(content.len()).ok(),
        ..header
    };
    let chunk = data_stream::Chunk {
        stream_id: stream_id.clone(),
        content,
        ..data_stream::Chunk::default()
    };
    let trailer = data_stream::Trailer {
        stream_id,
        ..data_stream::Trailer::default()
    };
    let values = [
        Value::StreamHeader(header),
        Value::StreamChunk(chunk),
        Value::StreamTrailer(trailer),
    ];
    values
        .into_iter()
        .map(|value| proto::DataPacket {
            participant_identity: sender.to_owned(),
            value: Some(value),
            ..proto::DataPacket::default()
        })
        .collect()
}
