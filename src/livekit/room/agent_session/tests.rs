use livekit_protocol::agent::{AgentSessionEvent, agent_session_event, chat_context::ChatItem};
use livekit_protocol::{Transcription, TranscriptionSegment};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::livekit::arbitrary::{bytes, config, protobuf};

impl StreamReader {
    fn on_data(&mut self, at: Instant, data: &[u8]) -> Vec<AgentMessage> {
        DataPacket::decode(data).map_or_else(|_| Vec::new(), |packet| self.on_packet(at, packet))
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
    let mut reader = StreamReader::new(false);
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
        [AgentMessage::Turn {
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

fn said(told: Vec<AgentMessage>) -> Vec<(String, String, bool)> {
    let words = told.into_iter().map(|told| match told {
        AgentMessage::Transcript(words) => (
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
    let mut reader = StreamReader::new(true);
    let read = packets
        .iter()
        .flat_map(|packet| reader.on_data(Instant::now(), packet));
    let expected = [("SG_1", "Good day €", true), ("b", "so", false)];
    let own = |(segment, text, is_final): (&str, &str, bool)| {
        (segment.to_owned(), text.to_owned(), is_final)
    };
    assert_eq!(said(read.collect()), expected.map(own));
    let cut = reader
        .unfinished()
        .into_iter()
        .map(AgentMessage::Transcript);
    assert_eq!(said(cut.collect()), [own(("c", "well, I", false))]);

    let mut unwanted = StreamReader::new(false);
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
    let told = StreamReader::new(true).on_data(Instant::now(), &older);
    assert!(!format!("{told:?}").contains("Smith"));
    let expected = ("SG_1".to_owned(), "my name is Smith".to_owned(), true);
    assert_eq!(said(told), [expected]);
    assert_eq!(StreamReader::new(false).on_data(Instant::now(), &older), []);
}

/// The errors that the reader finds in these, one after the other.
fn read(packets: &[Vec<u8>]) -> Vec<String> {
    let mut reader = StreamReader::new(true);
    let told = packets
        .iter()
        .flat_map(|packet| reader.on_data(Instant::now(), packet));
    let errors = told.map(|told| match told {
        AgentMessage::Error { identity, message } => {
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
    let mut reader = StreamReader::new(true);
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
    assert!(reader.streams.len() <= MAX_STREAMS);
    let kept = reader.streams.iter().map(|stream| stream.content.len());
    assert!(kept.sum::<usize>() <= MAX_STREAMS * MAX_STREAM_BYTES);
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
        let mut reader = StreamReader::new(true);
        for packet in packets {
            let told = reader.on_data(Instant::now(), &packet);
            prop_assert!(told.len() <= 8, "{} at once", told.len());
            for one in told {
                let length = match &one {
                    AgentMessage::Error { message, .. } => message.len(),
                    AgentMessage::Transcript(words) => words.text.as_str().len(),
                    AgentMessage::Turn { .. } => 0,
                };
                prop_assert!(length <= 1024, "{length}");
                if let AgentMessage::Transcript(words) = one {
                    let length = |text: &str| text.chars().count();
                    prop_assert!(length(&words.identity) <= 256);
                    prop_assert!(length(&words.segment) <= 64);
                    prop_assert!(words.track.is_none_or(|track| length(&track) <= 64));
                }
            }
            prop_assert!(reader.streams.len() <= MAX_STREAMS);
            let kept = reader.streams.iter().map(|stream| stream.content.len());
            prop_assert!(kept.max().unwrap_or(0) <= MAX_STREAM_BYTES);
        }
    }
}
