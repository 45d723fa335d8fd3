//! Messages that an agent sends over data channels. Each byte stream with the topic `lk.agent.session` carries one
//! `AgentSessionMessage` (livekit-agents 1.5 and later): errors, states, messages with the metrics of their turns, tools and
//! handoffs are read. If requested, text streams with the transcript are read, too.
//!
//! A job's first session in a room sends these messages to all participants without being asked, unless its developer
//! started it with `session_host=False` (`voice/agent_session.py` of livekit-agents 1.8.9).
//!
//! Any participant may send here. Buffered data is therefore bounded, and malformed data is dropped.

use std::collections::VecDeque;

use livekit_protocol::agent::{
    AgentSessionMessage, AgentState, ChatMessage, ChatRole, FunctionCall, FunctionCallOutput,
    MetricsReport, UserState,
    agent_session_event::{Event, ToolExecutionUpdated, tool_execution_updated::Update},
    agent_session_message::Message,
    chat_context::chat_item::Item,
    chat_message::chat_content::Payload,
};
use livekit_protocol::data_packet::Value;
use livekit_protocol::{DataPacket, data_stream};
use prost::Message as _;
use tokio::time::Instant;

use super::transcript::{self, TranscriptHeader};
use crate::livekit::event::{
    SessionEvent, SessionMessage, Speaker, TranscriptSegment, TranscriptText, TurnMetrics,
    to_microseconds,
};
use crate::livekit::wire::request::sanitize;

const TOPIC: &str = "lk.agent.session";

/// Streams that may be open at the same time; a further one replaces the oldest.
const MAX_STREAMS: usize = 8;

/// Bytes of one stream. An error has a few lines; a turn with its text has some KiB.
const MAX_STREAM_BYTES: usize = 64 * 1024;

/// Calls of tools that are read from one message.
const MAX_TOOLS: usize = 16;

/// Characters of the name of a tool or an agent.
const MAX_NAME_LENGTH: usize = 64;

/// Bytes of a stream's id, which is a UUID.
const MAX_STREAM_ID_LENGTH: usize = 128;

/// A message from a participant. The server sets the identity, so the sender cannot forge it.
#[derive(Debug, PartialEq)]
pub(crate) enum AgentMessage {
    /// What the participant's session reported.
    Session {
        identity: String,
        event: SessionEvent,
    },
    Transcript(TranscriptSegment),
}

/// Reassembles data streams from their packets.
pub(crate) struct StreamReader {
    /// Whether transcripts are read. If not, their packets are not even buffered.
    transcript: bool,
    streams: VecDeque<OpenStream>,
}

struct OpenStream {
    id: String,
    content: Vec<u8>,
    kind: StreamKind,
}

enum StreamKind {
    Session,
    Transcript(TranscriptHeader),
}

impl StreamReader {
    pub(crate) fn new(transcript: bool) -> Self {
        Self {
            transcript,
            streams: VecDeque::new(),
        }
    }

    /// Handles a packet that arrived on a reliable data channel.
    pub(crate) fn on_packet(&mut self, at: Instant, packet: DataPacket) -> Vec<AgentMessage> {
        let identity = packet.participant_identity;
        match packet.value {
            Some(Value::StreamHeader(header)) => self.begin(at, &identity, header),
            Some(Value::StreamChunk(chunk)) => self.append(&chunk),
            Some(Value::StreamTrailer(trailer)) => {
                return self.end(&identity, &trailer);
            }
            Some(Value::Transcription(packet)) if self.transcript => {
                let segments = transcript::from_packet(at, packet);
                return segments.map(AgentMessage::Transcript).collect();
            }
            _ => {}
        }
        Vec::new()
    }

    /// The transcripts whose streams are still open, as far as they have arrived.
    pub(crate) fn unfinished(&mut self) -> Vec<TranscriptSegment> {
        let streams = self.streams.drain(..);
        let segments = streams.filter_map(|stream| match stream.kind {
            StreamKind::Session => None,
            StreamKind::Transcript(header) => header.into_segment(&stream.content, None),
        });
        segments.collect()
    }

    fn begin(&mut self, at: Instant, identity: &str, header: data_stream::Header) {
        let kind = match header.topic.as_str() {
            TOPIC => StreamKind::Session,
            transcript::TOPIC if self.transcript => {
                StreamKind::Transcript(TranscriptHeader::new(at, identity, &header))
            }
            _ => return,
        };
        if header.stream_id.len() > MAX_STREAM_ID_LENGTH {
            return;
        }
        if self.streams.len() == MAX_STREAMS {
            self.streams.pop_front();
        }
        self.streams.push_back(OpenStream {
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
        let fits = stream.content.len() + chunk.content.len() <= MAX_STREAM_BYTES;
        if fits {
            stream.content.extend_from_slice(&chunk.content);
        } else if matches!(stream.kind, StreamKind::Session) {
            // Half of a protobuf is useless, but the beginning of a transcript is worth keeping.
            self.streams.retain(|it| it.id != *id);
        }
    }

    fn end(&mut self, identity: &str, trailer: &data_stream::Trailer) -> Vec<AgentMessage> {
        let mut streams = self.streams.iter();
        let Some(stream) = streams
            .position(|it| it.id == trailer.stream_id)
            .and_then(|ended| self.streams.remove(ended))
        else {
            return Vec::new();
        };
        match stream.kind {
            StreamKind::Session => {
                let events = session_events(&stream.content).into_iter();
                let message = |event| AgentMessage::Session {
                    identity: identity.to_owned(),
                    event,
                };
                events.map(message).collect()
            }
            StreamKind::Transcript(header) => {
                let segment = header.into_segment(&stream.content, Some(trailer));
                segment.map(AgentMessage::Transcript).into_iter().collect()
            }
        }
    }
}

/// What one message of a session reports; empty if it is of no use here.
fn session_events(content: &[u8]) -> Vec<SessionEvent> {
    let message = AgentSessionMessage::decode(content);
    let Some(Message::Event(event)) = message.ok().and_then(|message| message.message) else {
        return Vec::new();
    };
    match event.event {
        Some(Event::Error(error)) => vec![SessionEvent::Error(sanitize(&error.message))],
        Some(Event::AgentStateChanged(change)) => {
            let state = match change.new_state() {
                AgentState::AsInitializing => "initializing",
                AgentState::AsIdle => "idle",
                AgentState::AsListening => "listening",
                AgentState::AsThinking => "thinking",
                AgentState::AsSpeaking => "speaking",
            };
            vec![SessionEvent::AgentState(state.to_owned())]
        }
        Some(Event::UserStateChanged(change)) => {
            vec![SessionEvent::CallerSpeaks(
                change.new_state() == UserState::UsSpeaking,
            )]
        }
        Some(Event::UserInputTranscribed(input)) => vec![SessionEvent::CallerTranscribed {
            text: TranscriptText::new(&input.transcript),
            is_final: input.is_final,
        }],
        Some(Event::ConversationItemAdded(added)) => {
            let item = added.item.and_then(|added| added.item);
            item.and_then(conversation_item).into_iter().collect()
        }
        Some(Event::FunctionToolsStarted(started)) => {
            let calls = started.function_calls.iter().take(MAX_TOOLS);
            let started = |call: &FunctionCall| SessionEvent::ToolStarted(name_of(&call.name));
            calls.map(started).collect()
        }
        // livekit-agents 1.8.9 sends this one; its end names no tool.
        Some(Event::ToolExecutionUpdated(ToolExecutionUpdated {
            update: Some(Update::Started(started)),
        })) => {
            let call = started.function_call.iter();
            call.map(|call| SessionEvent::ToolStarted(name_of(&call.name)))
                .collect()
        }
        Some(Event::FunctionToolsExecuted(executed)) => {
            let outputs = executed.function_call_outputs.iter().take(MAX_TOOLS);
            let executed = |output: &FunctionCallOutput| SessionEvent::ToolExecuted {
                name: name_of(&output.name),
                is_error: output.is_error,
            };
            outputs.map(executed).collect()
        }
        Some(Event::AgentFalseInterruption(interruption)) => {
            let resumed = interruption.resumed;
            vec![SessionEvent::FalseInterruption { resumed }]
        }
        _ => Vec::new(),
    }
}

/// The session adds an item to the conversation after it was spoken.
fn conversation_item(item: Item) -> Option<SessionEvent> {
    match item {
        Item::Message(message) => {
            let speaker = match message.role() {
                ChatRole::Assistant => Speaker::Agent,
                ChatRole::User => Speaker::Caller,
                ChatRole::Developer | ChatRole::System => return None,
            };
            Some(SessionEvent::Message(SessionMessage {
                speaker,
                text: TranscriptText::new(&text_of(&message)),
                interrupted: message.interrupted,
                metrics: metrics_of(speaker, &message),
            }))
        }
        Item::AgentHandoff(handoff) => Some(SessionEvent::Handoff(name_of(&handoff.new_agent_id))),
        _ => None,
    }
}

/// The text of a message, whose parts are joined by spaces.
fn text_of(message: &ChatMessage) -> String {
    let parts = message.content.iter();
    let parts = parts.filter_map(|part| {
        let Payload::Text(text) = part.payload.as_ref()?;
        Some(text.as_str())
    });
    parts.collect::<Vec<_>>().join(" ")
}

/// The name of a tool or of an agent: one line of at most [`MAX_NAME_LENGTH`] characters.
fn name_of(text: &str) -> String {
    sanitize(text).chars().take(MAX_NAME_LENGTH).collect()
}

/// `None` if nothing was measured, as for a fixed text that the agent was asked to speak.
fn metrics_of(speaker: Speaker, message: &ChatMessage) -> Option<TurnMetrics> {
    let report = message.metrics.as_ref()?;
    let metrics = figures(speaker, message.interrupted, report);
    let nothing = TurnMetrics {
        interrupted: message.interrupted,
        ..TurnMetrics::none(speaker)
    };
    (metrics != nothing).then_some(metrics)
}

fn figures(speaker: Speaker, interrupted: bool, report: &MetricsReport) -> TurnMetrics {
    let figure = |given: Option<f64>| {
        // The sender may send any float, including NaN, which JSON cannot represent.
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
mod tests;
