use livekit_protocol::agent::{
    AgentSessionEvent, agent_session_event, chat_context::ChatItem, chat_message::ChatContent,
};
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
        content: vec![ChatContent {
            payload: Some(Payload::Text("Good day to you.".to_owned())),
        }],
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
fn turns_are_reported_only_with_valid_measurements() {
    let measured = MetricsReport {
        llm_node_ttft: Some(0.25),
        tts_node_ttfb: Some(f64::NAN),
        e2e_latency: Some(-1.0),
        ..MetricsReport::default()
    };
    let mut reader = StreamReader::new(false);
    let mut read_turn = |role, report| {
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
    let message = |metrics| AgentMessage::Session {
        identity: "agent-x".to_owned(),
        event: SessionEvent::Message(SessionMessage {
            speaker: Speaker::Agent,
            text: TranscriptText::new("Good day to you."),
            interrupted: false,
            metrics,
        }),
    };
    let measured = read_turn(ChatRole::Assistant, measured);
    assert_eq!(measured, [message(Some(own))]);
    let nothing = MetricsReport::default();
    assert_eq!(read_turn(ChatRole::System, nothing), []);
    assert_eq!(read_turn(ChatRole::Assistant, nothing), [message(None)]);
}

/// The header of a transcript's text stream.
fn speech(id: &str, attributes: &[(&str, &str)]) -> Vec<u8> {
    header_with(id, transcript::TOPIC, attributes)
}

fn transcripts(messages: Vec<AgentMessage>) -> Vec<(String, String, bool)> {
    let segments = messages.into_iter().map(|message| match message {
        AgentMessage::Transcript(segment) => (
            segment.segment,
            segment.text.as_str().to_owned(),
            segment.is_final,
        ),
        AgentMessage::Session { event, .. } => panic!("{event:?}"),
    });
    segments.collect()
}

#[test]
fn transcript_is_read_only_on_request_and_an_unfinished_one_is_not_final() {
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
    let owned = |(segment, text, is_final): (&str, &str, bool)| {
        (segment.to_owned(), text.to_owned(), is_final)
    };
    assert_eq!(transcripts(read.collect()), expected.map(owned));
    let unfinished = reader
        .unfinished()
        .into_iter()
        .map(AgentMessage::Transcript);
    assert_eq!(
        transcripts(unfinished.collect()),
        [owned(("c", "well, I", false))]
    );

    let mut without_transcript = StreamReader::new(false);
    for packet in &packets {
        assert_eq!(without_transcript.on_data(Instant::now(), packet), []);
    }
    assert!(without_transcript.streams.is_empty());
}

#[test]
fn older_packets_are_read_and_debug_output_hides_the_text() {
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
    let messages = StreamReader::new(true).on_data(Instant::now(), &older);
    assert!(!format!("{messages:?}").contains("Smith"));
    let expected = ("SG_1".to_owned(), "my name is Smith".to_owned(), true);
    assert_eq!(transcripts(messages), [expected]);
    assert_eq!(StreamReader::new(false).on_data(Instant::now(), &older), []);
}

/// The errors that the reader finds in these packets, in order.
fn read(packets: &[Vec<u8>]) -> Vec<String> {
    let mut reader = StreamReader::new(true);
    let messages = packets
        .iter()
        .flat_map(|packet| reader.on_data(Instant::now(), packet));
    let errors = messages.map(|message| match message {
        AgentMessage::Session {
            identity,
            event: SessionEvent::Error(message),
        } => {
            assert_eq!(identity, "agent-x");
            message
        }
        other => panic!("{other:?}"),
    });
    errors.collect()
}

#[test]
fn interleaved_streams_in_pieces_are_read() {
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
fn other_topics_and_malformed_streams_give_no_message() {
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
fn buffered_data_is_bounded() {
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
    let buffered = reader.streams.iter().map(|stream| stream.content.len());
    assert!(buffered.sum::<usize>() <= MAX_STREAMS * MAX_STREAM_BYTES);
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

/// A packet of some stream. There are few ids, so that packets often belong to the same stream.
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
    // A long text from a short one: to choose every character would take most of the test's time.
    let long = ("\\PC{0,40}", 0..60_usize).prop_map(|(text, times)| text.repeat(times));
    let segment = ("\\PC{0,100}", long, any::<bool>());
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

fn text_length(event: &SessionEvent) -> usize {
    match event {
        SessionEvent::Error(text)
        | SessionEvent::AgentState(text)
        | SessionEvent::ToolStarted(text)
        | SessionEvent::ToolExecuted { name: text, .. }
        | SessionEvent::Handoff(text) => text.len(),
        SessionEvent::CallerTranscribed { text, .. } => text.as_str().len(),
        SessionEvent::Message(message) => message.text.as_str().len(),
        SessionEvent::CallerSpeaks(_) | SessionEvent::FalseInterruption { .. } => 0,
    }
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn packets_of_any_kind_and_order_are_read_within_bounds(packets in vec(any_packet(), 0..80)) {
        let mut reader = StreamReader::new(true);
        for packet in packets {
            let messages = reader.on_data(Instant::now(), &packet);
            prop_assert!(messages.len() <= MAX_TOOLS, "{} at once", messages.len());
            for one in messages {
                let length = match &one {
                    AgentMessage::Session { event, .. } => text_length(event),
                    AgentMessage::Transcript(segment) => segment.text.as_str().len(),
                };
                prop_assert!(length <= 1024, "{length}");
                if let AgentMessage::Transcript(segment) = one {
                    let length = |text: &str| text.chars().count();
                    prop_assert!(length(&segment.identity) <= 256);
                    prop_assert!(length(&segment.segment) <= 64);
                    prop_assert!(segment.track.is_none_or(|track| length(&track) <= 64));
                }
            }
            prop_assert!(reader.streams.len() <= MAX_STREAMS);
            let buffered = reader.streams.iter().map(|stream| stream.content.len());
            prop_assert!(buffered.max().unwrap_or(0) <= MAX_STREAM_BYTES);
        }
    }
}
