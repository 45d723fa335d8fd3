//! What an agent tells over data channels: byte streams of topic `lk.agent.session`, each one `AgentSessionMessage`
//! (livekit-agents 1.5 and later), of which errors and the metrics of turns are read; and, where it is wanted, the
//! transcript.
//!
//! The job's first session with a room sends its messages to everybody there, unasked, unless its developer started it
//! with `session_host=False` (`voice/agent_session.py` of livekit-agents 1.8.9).
//!
//! Whoever is in the room may send here: what is kept at once is bounded, and what is malformed is dropped.

use std::collections::VecDeque;

use livekit_protocol::agent::{
    AgentSessionMessage, ChatMessage, ChatRole, MetricsReport, agent_session_event::Event,
    agent_session_message::Message, chat_context::chat_item::Item,
};
use livekit_protocol::data_packet::Value;
use livekit_protocol::{DataPacket, data_stream};
use prost::Message as _;
use tokio::time::Instant;

use super::transcript::{self, Heading};
use crate::livekit::event::{Speaker, TurnMetrics, Words, to_microseconds};
use crate::livekit::wire::request::presentable;

const TOPIC: &str = "lk.agent.session";

/// Streams that are under way at once; the oldest gives way.
const MOST_STREAMS: usize = 8;

/// Of one stream. An error is a line or a few, a turn with its text some KiB.
const MOST_BYTES: usize = 64 * 1024;

/// Of a stream's id, which is a UUID.
const LONGEST_ID: usize = 128;

/// What a participant told; its identity is the server's word.
#[derive(Debug, PartialEq)]
pub(crate) enum Told {
    /// An error that its session reported, in its words.
    Error {
        identity: String,
        message: String,
    },
    Turn {
        identity: String,
        metrics: TurnMetrics,
    },
    Words(Words),
}

/// Puts streams together.
pub(crate) struct Reader {
    /// Whether transcripts are wanted; otherwise nothing of them is kept even for a moment.
    transcript: bool,
    streams: VecDeque<Stream>,
}

struct Stream {
    id: String,
    content: Vec<u8>,
    kind: Kind,
}

enum Kind {
    Session,
    Transcript(Heading),
}

impl Reader {
    pub(crate) fn new(transcript: bool) -> Self {
        Self {
            transcript,
            streams: VecDeque::new(),
        }
    }

    /// Takes what came on a reliable data channel.
    pub(crate) fn on_packet(&mut self, at: Instant, packet: DataPacket) -> Vec<Told> {
        let identity = packet.participant_identity;
        match packet.value {
            Some(Value::StreamHeader(header)) => self.begin(at, &identity, header),
            Some(Value::StreamChunk(chunk)) => self.append(&chunk),
            Some(Value::StreamTrailer(trailer)) => {
                return self.end(identity, &trailer).into_iter().collect();
            }
            Some(Value::Transcription(packet)) if self.transcript => {
                let words = transcript::of_packet(at, packet);
                return words.map(Told::Words).collect();
            }
            _ => {}
        }
        Vec::new()
    }

    /// The transcripts that were cut off.
    pub(crate) fn unfinished(&mut self) -> Vec<Words> {
        let streams = self.streams.drain(..);
        let words = streams.filter_map(|stream| match stream.kind {
            Kind::Session => None,
            Kind::Transcript(heading) => heading.words(&stream.content, None),
        });
        words.collect()
    }

    fn begin(&mut self, at: Instant, identity: &str, header: data_stream::Header) {
        let kind = match header.topic.as_str() {
            TOPIC => Kind::Session,
            transcript::TOPIC if self.transcript => {
                Kind::Transcript(Heading::of(at, identity, &header))
            }
            _ => return,
        };
        if header.stream_id.len() > LONGEST_ID {
            return;
        }
        if self.streams.len() == MOST_STREAMS {
            self.streams.pop_front();
        }
        self.streams.push_back(Stream {
            id: header.stream_id,
            content: Vec::new(),
            kind,
        });
    }

    fn append(&mut self, chunk: &data_stream::Chunk) {
        let id = &chunk.stream_id;
        let Some(stream) = self.streams.iter_mut().find(|it| it.id == *id) else {
            return;
        };
        let fits = stream.content.len() + chunk.content.len() <= MOST_BYTES;
        if fits {
            stream.content.extend_from_slice(&chunk.content);
        } else if matches!(stream.kind, Kind::Session) {
            // Half a message says nothing; of a text what has come is kept.
            self.streams.retain(|it| it.id != *id);
        }
    }

    fn end(&mut self, identity: String, trailer: &data_stream::Trailer) -> Option<Told> {
        let mut streams = self.streams.iter();
        let ended = streams.position(|it| it.id == trailer.stream_id)?;
        let stream = self.streams.remove(ended)?;
        match stream.kind {
            Kind::Session => session_message(identity, &stream.content),
            Kind::Transcript(heading) => heading
                .words(&stream.content, Some(trailer))
                .map(Told::Words),
        }
    }
}

fn session_message(identity: String, content: &[u8]) -> Option<Told> {
    let message = AgentSessionMessage::decode(content).ok()?.message?;
    let Message::Event(event) = message else {
        return None;
    };
    match event.event? {
        Event::Error(error) => Some(Told::Error {
            identity,
            message: presentable(&error.message),
        }),
        // A message is added to the conversation once it was spoken.
        Event::ConversationItemAdded(added) => match added.item?.item? {
            Item::Message(message) => {
                let metrics = metrics_of(&message)?;
                Some(Told::Turn { identity, metrics })
            }
            _ => None,
        },
        _ => None,
    }
}

/// `None` where nothing was measured, as for a text that the agent was just told to say.
fn metrics_of(message: &ChatMessage) -> Option<TurnMetrics> {
    let speaker = match message.role() {
        ChatRole::Assistant => Speaker::Agent,
        ChatRole::User => Speaker::Caller,
        ChatRole::Developer | ChatRole::System => return None,
    };
    let report = message.metrics.as_ref()?;
    let metrics = figures(speaker, message.interrupted, report);
    let nothing = figures(speaker, message.interrupted, &MetricsReport::default());
    (metrics != nothing).then_some(metrics)
}

fn figures(speaker: Speaker, interrupted: bool, report: &MetricsReport) -> TurnMetrics {
    let figure = |given: Option<f64>| {
        let given = given.filter(|it| it.is_finite() && *it >= 0.0);
        given.map(to_microseconds)
    };
    TurnMetrics {
        speaker,
        interrupted,
        transcription_delay_seconds: figure(report.transcription_delay),
        end_of_turn_delay_seconds: figure(report.end_of_turn_delay),
        on_user_turn_completed_delay_seconds: figure(report.on_user_turn_completed_delay),
        llm_ttft_seconds: figure(report.llm_node_ttft),
        llm_ttfs_seconds: figure(report.llm_node_ttfs),
        llm_tokens_per_second: figure(report.llm_node_tps),
        tts_ttfb_seconds: figure(report.tts_node_ttfb),
        e2e_latency_seconds: figure(report.e2e_latency),
    }
}

#[cfg(test)]
mod tests {
    use livekit_protocol::agent::{AgentSessionEvent, agent_session_event, chat_context::ChatItem};
    use livekit_protocol::{Transcription, TranscriptionSegment};

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::livekit::arbitrary::{bytes, config, protobuf};

    impl Reader {
        fn on_data(&mut self, at: Instant, data: &[u8]) -> Vec<Told> {
            DataPacket::decode(data)
                .map_or_else(|_| Vec::new(), |packet| self.on_packet(at, packet))
        }
    }

    fn packet(value: Value) -> Vec<u8> {
        let packet = DataPacket {
            participant_identity: "agent-x".to_owned(),
            value: Some(value),
            ..DataPacket::default()
        };
        packet.encode_to_vec()
    }

    fn header(id: &str, topic: &str) -> Vec<u8> {
        header_with(id, topic, &[])
    }

    fn header_with(id: &str, topic: &str, attributes: &[(&str, &str)]) -> Vec<u8> {
        let attributes = attributes.iter();
        packet(Value::StreamHeader(data_stream::Header {
            stream_id: id.to_owned(),
            topic: topic.to_owned(),
            attributes: attributes
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
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

    fn session_message(event: Event) -> Vec<u8> {
        let event = AgentSessionEvent {
            event: Some(event),
            ..AgentSessionEvent::default()
        };
        let message = AgentSessionMessage {
            message: Some(Message::Event(event)),
        };
        message.encode_to_vec()
    }

    fn error(message: &str) -> Vec<u8> {
        session_message(Event::Error(agent_session_event::Error {
            message: message.to_owned(),
        }))
    }

    fn turn(role: ChatRole, metrics: MetricsReport) -> Vec<u8> {
        let message = ChatMessage {
            role: role.into(),
            metrics: Some(metrics),
            ..ChatMessage::default()
        };
        let added = agent_session_event::ConversationItemAdded {
            item: Some(ChatItem {
                item: Some(Item::Message(message)),
            }),
        };
        session_message(Event::ConversationItemAdded(added))
    }

    #[test]
    fn turns_are_told_with_what_was_measured_and_with_nothing_else() {
        let measured = MetricsReport {
            llm_node_ttft: Some(0.25),
            tts_node_ttfb: Some(f64::NAN),
            e2e_latency: Some(-1.0),
            ..MetricsReport::default()
        };
        let mut reader = Reader::new(false);
        let mut told = |role, report| {
            let packets = [
                header("a", TOPIC),
                chunk("a", &turn(role, report)),
                trailer("a"),
            ];
            let read = packets.map(|packet| reader.on_data(Instant::now(), &packet));
            read.into_iter().flatten().collect::<Vec<_>>()
        };
        let own = figures(
            Speaker::Agent,
            false,
            &MetricsReport {
                llm_node_ttft: Some(0.25),
                ..MetricsReport::default()
            },
        );
        assert_eq!(
            told(ChatRole::Assistant, measured),
            [Told::Turn {
                identity: "agent-x".to_owned(),
                metrics: own
            }]
        );
        assert_eq!(told(ChatRole::System, measured), []);
        assert_eq!(told(ChatRole::Assistant, MetricsReport::default()), []);
    }

    /// A text stream's header with its attributes.
    fn speech(id: &str, attributes: &[(&str, &str)]) -> Vec<u8> {
        header_with(id, transcript::TOPIC, attributes)
    }

    fn said(told: Vec<Told>) -> Vec<(String, String, bool)> {
        let words = told.into_iter().map(|told| match told {
            Told::Words(words) => (
                words.segment,
                words.text.as_str().to_owned(),
                words.is_final,
            ),
            other => panic!("{other:?}"),
        });
        words.collect()
    }

    #[test]
    fn transcript_is_read_where_it_is_wanted_and_what_is_cut_off_is_not_final() {
        let segment = ("lk.segment_id", "SG_1");
        let packets = [
            speech("a", &[segment, ("lk.transcription_final", "true")]),
            chunk("a", "Good ".as_bytes()),
            chunk("a", "day €".as_bytes()),
            speech("b", &[("lk.transcription_final", "false")]),
            chunk("b", b"so"),
            trailer("a"),
            trailer("b"),
            speech("c", &[("lk.transcription_final", "true")]),
            chunk("c", b"well, I"),
        ];
        let mut reader = Reader::new(true);
        let read = packets
            .iter()
            .flat_map(|packet| reader.on_data(Instant::now(), packet));
        let expected = [("SG_1", "Good day €", true), ("b", "so", false)];
        let own = |(segment, text, is_final): (&str, &str, bool)| {
            (segment.to_owned(), text.to_owned(), is_final)
        };
        assert_eq!(said(read.collect()), expected.map(own));
        let cut = reader.unfinished().into_iter().map(Told::Words);
        assert_eq!(said(cut.collect()), [own(("c", "well, I", false))]);

        let mut unwanted = Reader::new(false);
        for packet in &packets {
            assert_eq!(unwanted.on_data(Instant::now(), packet), []);
        }
        assert!(unwanted.streams.is_empty());
    }

    #[test]
    fn older_packets_are_read_and_the_words_are_not_in_debug_output() {
        let older = packet(Value::Transcription(Transcription {
            transcribed_participant_identity: "canary-echo".to_owned(),
            track_id: "TR_1".to_owned(),
            segments: vec![TranscriptionSegment {
                id: "SG_1".to_owned(),
                text: "my name is Smith".to_owned(),
                r#final: true,
                ..TranscriptionSegment::default()
            }],
        }));
        let told = Reader::new(true).on_data(Instant::now(), &older);
        assert!(!format!("{told:?}").contains("Smith"));
        let expected = ("SG_1".to_owned(), "my name is Smith".to_owned(), true);
        assert_eq!(said(told), [expected]);
        assert_eq!(Reader::new(false).on_data(Instant::now(), &older), []);
    }

    /// The errors that the reader finds in these, one after the other.
    fn read(packets: &[Vec<u8>]) -> Vec<String> {
        let mut reader = Reader::new(true);
        let told = packets
            .iter()
            .flat_map(|packet| reader.on_data(Instant::now(), packet));
        let errors = told.map(|told| match told {
            Told::Error { identity, message } => {
                assert_eq!(identity, "agent-x");
                message
            }
            other => panic!("{other:?}"),
        });
        errors.collect()
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
        let mut reader = Reader::new(true);
        let now = Instant::now();
        for id in 0..100 {
            for topic in [TOPIC, transcript::TOPIC] {
                let id = format!("{id} {topic}");
                reader.on_data(now, &header(&id, topic));
                for _ in 0..100 {
                    reader.on_data(now, &chunk(&id, &[0; 1024]));
                }
            }
        }
        assert!(reader.streams.len() <= MOST_STREAMS);
        let kept = reader.streams.iter().map(|stream| stream.content.len());
        assert!(kept.sum::<usize>() <= MOST_STREAMS * MOST_BYTES);
    }

    fn identity() -> impl Strategy<Value = String> {
        prop_oneof![Just("agent-x".to_owned()), "\\PC{0,600}"]
    }

    fn sent_by(sender: String, packet: &[u8]) -> Vec<u8> {
        let packet = DataPacket {
            participant_identity: sender,
            ..DataPacket::decode(packet).unwrap()
        };
        packet.encode_to_vec()
    }

    /// A packet of streams with few ids, so that they meet.
    fn any_packet() -> impl Strategy<Value = Vec<u8>> {
        let id = || select(vec!["a", "b", "c", ""]);
        let topic = select(vec![TOPIC, transcript::TOPIC, "lk.chat"]);
        let attribute = (
            select(vec![
                "lk.segment_id",
                "lk.transcription_final",
                "lk.transcribed_track_id",
            ]),
            prop_oneof![Just("true".to_owned()), "\\PC{0,100}"],
        );
        let header = (id(), topic, vec(attribute, 0..3), identity());
        let header = header.prop_map(|(id, topic, attributes, sender)| {
            let attributes = attributes.iter();
            let attributes: Vec<_> = attributes
                .map(|(key, value)| (*key, value.as_str()))
                .collect();
            sent_by(sender, &header_with(id, topic, &attributes))
        });
        let content = prop_oneof![
            bytes(300),
            protobuf(),
            (0..70_000_usize).prop_map(|n| vec![b'a'; n])
        ];
        let chunk = (id(), content).prop_map(|(id, content)| chunk(id, &content));
        let segment = ("\\PC{0,100}", "\\PC{0,2000}", any::<bool>());
        let older = (vec(segment, 0..20), identity(), "\\PC{0,100}");
        let older = older.prop_map(|(segments, speaker, track_id)| {
            let segments = segments
                .into_iter()
                .map(|(id, text, last)| TranscriptionSegment {
                    id,
                    text,
                    r#final: last,
                    ..TranscriptionSegment::default()
                });
            packet(Value::Transcription(Transcription {
                transcribed_participant_identity: speaker,
                track_id,
                segments: segments.collect(),
            }))
        });
        prop_oneof![
            4 => header,
            6 => chunk,
            4 => id().prop_map(trailer),
            1 => older,
            1 => protobuf(),
            1 => bytes(200),
        ]
    }

    proptest! {
        #![proptest_config(config(64))]

        #[test]
        fn packets_of_any_kind_and_order_are_read_within_bounds(packets in vec(any_packet(), 0..80)) {
            let mut reader = Reader::new(true);
            for packet in packets {
                let told = reader.on_data(Instant::now(), &packet);
                prop_assert!(told.len() <= 8, "{} at once", told.len());
                for one in told {
                    let length = match &one {
                        Told::Error { message, .. } => message.len(),
                        Told::Words(words) => words.text.as_str().len(),
                        Told::Turn { .. } => 0,
                    };
                    prop_assert!(length <= 1024, "{length}");
                    if let Told::Words(words) = one {
                        let length = |text: &str| text.chars().count();
                        prop_assert!(length(&words.identity) <= 256);
                        prop_assert!(length(&words.segment) <= 64);
                        prop_assert!(words.track.is_none_or(|track| length(&track) <= 64));
                    }
                }
                prop_assert!(reader.streams.len() <= MOST_STREAMS);
                let kept = reader.streams.iter().map(|stream| stream.content.len());
                prop_assert!(kept.max().unwrap_or(0) <= MOST_BYTES);
            }
        }
    }
}
