//! What the agent's session reports to every participant, in the form that `SessionHost` sends
//! (`voice/remote_session.py` of livekit-agents 1.8.9).

use std::time::SystemTime;

use chrono::{DateTime, Utc};
use livekit_protocol::agent as proto;
use proto::agent_session_event::{
    AgentStateChanged, ConversationItemAdded, Error, Event, FunctionToolsExecuted,
    ToolExecutionUpdated, UserInputTranscribed, UserStateChanged,
    tool_execution_updated::{Ended, Started, Update},
};
use proto::chat_context::{ChatItem, chat_item::Item};
use proto::chat_message::{ChatContent, chat_content::Payload};
use tokio::time::Instant;

use crate::sandbox::ids::guid;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum SessionEvent {
    AgentState {
        old: AgentState,
        new: AgentState,
    },
    /// The caller speaks, or no longer does, since this time.
    CallerState {
        speaks: bool,
        since: Instant,
    },
    /// The final transcript of what the caller said.
    Transcribed(String),
    Message(Message),
    ToolStarted(ToolCall),
    ToolEnded(ToolCall),
    /// Sent in addition, after all tools of a reply have run.
    ToolsExecuted(ToolCall),
    Error(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AgentState {
    Initializing,
    Listening,
    Thinking,
    Speaking,
}

/// A message of the conversation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Message {
    pub speaker: MessageSpeaker,
    pub text: String,
    pub interrupted: bool,
    pub metrics: TurnClaims,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MessageSpeaker {
    Agent,
    Caller,
}

/// What the session measured: delays in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct TurnClaims {
    pub spoke: Option<(Instant, Instant)>,
    pub transcription_delay: Option<f64>,
    pub end_of_turn_delay: Option<f64>,
    pub on_user_turn_completed_delay: Option<f64>,
    pub llm_node_ttft: Option<f64>,
    pub tts_node_ttfb: Option<f64>,
    pub e2e_latency: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ToolCall {
    pub id: String,
    pub tool: Tool,
}

/// A tool that the agent runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tool {
    pub name: String,
    pub is_error: bool,
}

impl AgentState {
    /// The value of the attribute `lk.agent.state`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Initializing => "initializing",
            Self::Listening => "listening",
            Self::Thinking => "thinking",
            Self::Speaking => "speaking",
        }
    }

    fn encoded(self) -> i32 {
        let state = match self {
            Self::Initializing => proto::AgentState::AsInitializing,
            Self::Listening => proto::AgentState::AsListening,
            Self::Thinking => proto::AgentState::AsThinking,
            Self::Speaking => proto::AgentState::AsSpeaking,
        };
        state.into()
    }
}

impl SessionEvent {
    pub(crate) fn encode(self) -> proto::AgentSessionEvent {
        let mut created_at = wall_clock(Instant::now());
        let event = match self {
            Self::AgentState { old, new } => Event::AgentStateChanged(AgentStateChanged {
                old_state: old.encoded(),
                new_state: new.encoded(),
            }),
            Self::CallerState { speaks, since } => {
                created_at = wall_clock(since);
                let states = [proto::UserState::UsListening, proto::UserState::UsSpeaking];
                Event::UserStateChanged(UserStateChanged {
                    old_state: states[usize::from(!speaks)].into(),
                    new_state: states[usize::from(speaks)].into(),
                })
            }
            Self::Transcribed(transcript) => Event::UserInputTranscribed(UserInputTranscribed {
                transcript,
                is_final: true,
                language: None,
            }),
            Self::Message(message) => {
                let item = Some(Item::Message(message.encode()));
                let item = Some(ChatItem { item });
                Event::ConversationItemAdded(ConversationItemAdded { item })
            }
            Self::ToolStarted(call) => Event::ToolExecutionUpdated(ToolExecutionUpdated {
                update: Some(Update::Started(Started {
                    function_call: Some(call.call()),
                })),
            }),
            Self::ToolEnded(call) => Event::ToolExecutionUpdated(ToolExecutionUpdated {
                update: Some(Update::Ended(Ended {
                    id: call.id.clone(),
                    call_id: call.id.clone(),
                    message: Some(call.output().to_owned()),
                    status: if call.tool.is_error {
                        proto::ToolCallStatus::TcError.into()
                    } else {
                        proto::ToolCallStatus::TcDone.into()
                    },
                })),
            }),
            Self::ToolsExecuted(call) => Event::FunctionToolsExecuted(FunctionToolsExecuted {
                function_calls: vec![call.call()],
                function_call_outputs: vec![proto::FunctionCallOutput {
                    call_id: call.id.clone(),
                    name: call.tool.name.clone(),
                    output: call.output().to_owned(),
                    is_error: call.tool.is_error,
                    ..proto::FunctionCallOutput::default()
                }],
            }),
            Self::Error(message) => Event::Error(Error { message }),
        };
        proto::AgentSessionEvent {
            created_at: Some(created_at.into()),
            event: Some(event),
        }
    }
}

impl ToolCall {
    pub(crate) fn new(tool: Tool) -> Self {
        let id = guid("call_");
        Self { id, tool }
    }

    fn call(&self) -> proto::FunctionCall {
        proto::FunctionCall {
            call_id: self.id.clone(),
            name: self.tool.name.clone(),
            arguments: "{}".to_owned(),
            ..proto::FunctionCall::default()
        }
    }

    /// What the session reports for a tool that raised an exception, unless it is a `ToolError` with a text of its own.
    fn output(&self) -> &'static str {
        if self.tool.is_error {
            "An internal error occurred"
        } else {
            "done"
        }
    }
}

impl Message {
    fn encode(self) -> proto::ChatMessage {
        let role = match self.speaker {
            MessageSpeaker::Agent => proto::ChatRole::Assistant,
            MessageSpeaker::Caller => proto::ChatRole::User,
        };
        let payload = Some(Payload::Text(self.text));
        proto::ChatMessage {
            id: guid("item_"),
            role: role.into(),
            content: vec![ChatContent { payload }],
            interrupted: self.interrupted,
            metrics: Some(self.metrics.encode()),
            created_at: Some(wall_clock(Instant::now()).into()),
            ..proto::ChatMessage::default()
        }
    }
}

impl TurnClaims {
    fn encode(self) -> proto::MetricsReport {
        proto::MetricsReport {
            started_speaking_at: self.spoke.map(|(began, _)| wall_clock(began).into()),
            stopped_speaking_at: self.spoke.map(|(_, ended)| wall_clock(ended).into()),
            transcription_delay: self.transcription_delay,
            end_of_turn_delay: self.end_of_turn_delay,
            on_user_turn_completed_delay: self.on_user_turn_completed_delay,
            llm_node_ttft: self.llm_node_ttft,
            tts_node_ttfb: self.tts_node_ttfb,
            e2e_latency: self.e2e_latency,
            ..proto::MetricsReport::default()
        }
    }
}

/// A past instant on the wall clock.
fn wall_clock(at: Instant) -> DateTime<Utc> {
    (SystemTime::now() - at.elapsed()).into()
}
