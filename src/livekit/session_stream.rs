//! What an `AgentSession` reports of itself over data channels: byte streams of topic `lk.agent.session`, each one
//! `AgentSessionMessage` (livekit-agents 1.5 and later). Only errors are looked at.
//!
//! The job's first session with a room sends them to everybody there, unasked, unless its developer started it with
//! `session_host=False` (`voice/agent_session.py` of livekit-agents 1.8.9).
//!
//! Whoever is in the room may send here: what is kept at once is bounded, and what is malformed is dropped.

use std::collections::VecDeque;

use livekit_protocol::agent::{
    AgentSessionMessage, agent_session_event::Event, agent_session_message::Message,
};
use livekit_protocol::data_packet::Value;
use livekit_protocol::{DataPacket, data_stream};
use prost::Message as _;

use super::exchange::presentable;

const TOPIC: &str = "lk.agent.session";

/// Streams that are under way at once; the oldest gives way.
const MOST_STREAMS: usize = 4;

/// Of one stream. An error is a line or a few; a stream that grows beyond it is dropped.
const MOST_BYTES: usize = 64 * 1024;

/// An error that an agent's session reported, in its words.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SessionError {
    /// The sender's identity, by the server's word.
    pub(super) identity: String,
    pub(super) message: String,
}

/// Puts streams together.
#[derive(Default)]
pub(super) struct Reader {
    streams: VecDeque<Stream>,
}

struct Stream {
    id: String,
    content: Vec<u8>,
}

impl Reader {
    /// Takes what came on a reliable data channel.
    pub(super) fn on_data(&mut self, data: &[u8]) -> Option<SessionError> {
        let packet = DataPacket::decode(data).ok()?;
        match packet.value? {
            Value::StreamHeader(header) => {
                self.begin(header);
                None
            }
            Value::StreamChunk(chunk) => {
                self.append(&chunk);
                None
            }
            Value::StreamTrailer(trailer) => {
                let ended = self
                    .streams
                    .iter()
                    .position(|it| it.id == trailer.stream_id);
                let stream = self.streams.remove(ended?)?;
                Some(SessionError {
                    identity: packet.participant_identity,
                    message: error_in(&stream.content)?,
                })
            }
            _ => None,
        }
    }

    fn begin(&mut self, header: data_stream::Header) {
        if header.topic != TOPIC {
            return;
        }
        if self.streams.len() == MOST_STREAMS {
            self.streams.pop_front();
        }
        self.streams.push_back(Stream {
            id: header.stream_id,
            content: Vec::new(),
        });
    }

    fn append(&mut self, chunk: &data_stream::Chunk) {
        let id = &chunk.stream_id;
        let Some(stream) = self.streams.iter_mut().find(|it| it.id == *id) else {
            return;
        };
        if stream.content.len() + chunk.content.len() <= MOST_BYTES {
            stream.content.extend_from_slice(&chunk.content);
        } else {
            self.streams.retain(|it| it.id != *id);
        }
    }
}

fn error_in(content: &[u8]) -> Option<String> {
    let message = AgentSessionMessage::decode(content).ok()?.message?;
    let Message::Event(event) = message else {
        return None;
    };
    match event.event? {
        Event::Error(error) => Some(presentable(&error.message)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use livekit_protocol::agent::{AgentSessionEvent, agent_session_event};

    use super::*;

    fn packet(value: Value) -> Vec<u8> {
        let packet = DataPacket {
            participant_identity: "agent-x".to_owned(),
            value: Some(value),
            ..DataPacket::default()
        };
        packet.encode_to_vec()
    }

    fn header(id: &str, topic: &str) -> Vec<u8> {
        packet(Value::StreamHeader(data_stream::Header {
            stream_id: id.to_owned(),
            topic: topic.to_owned(),
            ..data_stream::Header::default()
        }))
    }

    fn chunk(id: &str, content: &[u8]) -> Vec<u8> {
        packet(Value::StreamChunk(data_stream::Chunk {
            stream_id: id.to_owned(),
            content: content.to_owned(),
            ..data_stream::Chunk::default()
        }))
    }

    fn trailer(id: &str) -> Vec<u8> {
        packet(Value::StreamTrailer(data_stream::Trailer {
            stream_id: id.to_owned(),
            ..data_stream::Trailer::default()
        }))
    }

    fn error(message: &str) -> Vec<u8> {
        let error = agent_session_event::Error {
            message: message.to_owned(),
        };
        let event = AgentSessionEvent {
            event: Some(Event::Error(error)),
            ..AgentSessionEvent::default()
        };
        let message = AgentSessionMessage {
            message: Some(Message::Event(event)),
        };
        message.encode_to_vec()
    }

    /// What the reader makes of all of these, one after the other.
    fn read(packets: &[Vec<u8>]) -> Vec<String> {
        let mut reader = Reader::default();
        let errors = packets.iter().filter_map(|packet| reader.on_data(packet));
        errors.map(|error| error.message).collect()
    }

    #[test]
    fn streams_that_come_interleaved_and_in_pieces_are_read() {
        let (one, other) = (error("one"), error("other"));
        let packets = [
            header("a", TOPIC),
            chunk("a", &one[..2]),
            header("b", TOPIC),
            chunk("b", &other),
            chunk("a", &one[2..]),
            trailer("b"),
            trailer("a"),
        ];
        assert_eq!(read(&packets), ["other", "one"]);
        let mut reader = Reader::default();
        for packet in &packets[..5] {
            assert_eq!(reader.on_data(packet), None);
        }
        assert_eq!(reader.on_data(&trailer("a")).unwrap().identity, "agent-x");
    }

    #[test]
    fn other_topics_and_whatever_is_malformed_say_nothing() {
        let content = error("one");
        for packets in [
            vec![header("a", "lk.chat"), chunk("a", &content), trailer("a")],
            vec![chunk("a", &content), trailer("a")],
            vec![header("a", TOPIC), chunk("a", &content[1..]), trailer("a")],
            vec![header("a", TOPIC), trailer("a")],
            vec![vec![255; 40], Vec::new()],
        ] {
            assert_eq!(read(&packets), [""; 0]);
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut reader = Reader::default();
        for id in 0..100 {
            let id = id.to_string();
            reader.on_data(&header(&id, TOPIC));
            for _ in 0..100 {
                reader.on_data(&chunk(&id, &[0; 1024]));
            }
            reader.on_data(&header(&id, TOPIC));
        }
        assert!(reader.streams.len() <= MOST_STREAMS);
        let kept = reader.streams.iter().map(|stream| stream.content.len());
        assert!(kept.sum::<usize>() <= MOST_STREAMS * MOST_BYTES);
    }
}
