//! LiveKit's server API over Twirp: rooms, participants, agent dispatches. One attempt a call; status, body and
//! `Retry-After` of a refusal are always kept.

use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use http::{Request, StatusCode};
use http_body_util::Full;
use livekit_protocol as proto;
use tokio::time::Instant;

use super::connect::{ConnectError, Endpoint};
use super::request::{
    BodyEnd, ExchangeError, HttpRejection, MAX_BODY_BYTES, bearer, exchange, sanitize,
};
use super::token::{ApiPermission, Keys};
use crate::livekit::RoomName;

/// A client of one project's server API. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    endpoint: Endpoint,
    pub(crate) keys: Keys,
    timeout: Duration,
}

/// One call: when its request was written (after TLS), and what came of it.
#[derive(Debug)]
pub struct Call<T> {
    /// Just before the request was written; `None` where no connection came up.
    pub sent_at: Option<Instant>,
    pub answered_at: Instant,
    pub result: Result<T, ApiError>,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum ApiError {
    #[error(transparent)]
    Unreachable(#[from] ConnectError),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("refused with HTTP {}: {}", .0.status, .0.message)]
    Refused(HttpRejection),
    #[error("the connection broke before the answer was complete: {0}")]
    Broken(String),
    #[error("an answer that is not LiveKit's: {0}")]
    Protocol(String),
}

impl ApiError {
    /// Twirp's `not_found`, whatever the HTTP status.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.twirp_code.as_deref() == Some("not_found"))
    }
}

/// The settings of a room that the canary creates.
#[derive(Debug, Clone)]
pub struct NewRoom {
    pub name: RoomName,
    pub metadata: String,
    pub empty_timeout: Duration,
    pub departure_timeout: Duration,
    pub max_participants: u32,
    /// Dispatched as the room is created; none leaves it to the project's unnamed agent.
    pub agents: Vec<NamedAgent>,
}

/// An agent to dispatch, by the name that it registered under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedAgent {
    pub name: String,
    /// Handed to its job.
    pub metadata: String,
}

#[derive(Debug, Clone)]
pub struct RoomInfo {
    pub name: RoomName,
    pub sid: String,
    pub metadata: String,
}

#[derive(Debug, Clone)]
pub struct DispatchInfo {
    pub id: String,
    pub agent_name: String,
    pub jobs: Vec<JobInfo>,
}

/// One job of a dispatch: a worker had accepted it.
#[derive(Debug, Clone)]
pub struct JobInfo {
    pub id: String,
    /// `JS_PENDING`, `JS_RUNNING`, …
    pub status: String,
    pub error: String,
}

#[derive(Debug, Clone)]
pub struct ParticipantBrief {
    pub identity: String,
    pub kind: String,
    pub attributes: std::collections::HashMap<String, String>,
    /// Unix milliseconds on the server's clock.
    pub joined_at_ms: i64,
}

impl Api {
    /// `timeout` bounds each call, from DNS to the last byte of the answer.
    pub fn new(endpoint: Endpoint, keys: Keys, timeout: Duration) -> Self {
        Self {
            endpoint,
            keys,
            timeout,
        }
    }

    pub async fn create_room(&self, room: &NewRoom) -> Call<RoomInfo> {
        let request = proto::CreateRoomRequest {
            name: room.name.0.clone(),
            metadata: room.metadata.clone(),
            empty_timeout: whole_seconds(room.empty_timeout),
            departure_timeout: whole_seconds(room.departure_timeout),
            max_participants: room.max_participants,
            agents: room.agents.iter().cloned().map(Into::into).collect(),
            ..proto::CreateRoomRequest::default()
        };
        self.call("RoomService/CreateRoom", ApiPermission::Create, &request)
            .await
            .map(|room: proto::Room| RoomInfo::from(room))
    }

    /// Rooms of these exact names that exist now; all rooms of the project where `names` is empty.
    pub async fn list_rooms(&self, names: &[RoomName]) -> Call<Vec<RoomInfo>> {
        let request = proto::ListRoomsRequest {
            names: names.iter().map(|name| name.0.clone()).collect(),
        };
        self.call("RoomService/ListRooms", ApiPermission::List, &request)
            .await
            .map(|answer: proto::ListRoomsResponse| {
                answer.rooms.into_iter().map(RoomInfo::from).collect()
            })
    }

    pub async fn delete_room(&self, room: &RoomName) -> Call<()> {
        let request = proto::DeleteRoomRequest {
            room: room.0.clone(),
        };
        self.call("RoomService/DeleteRoom", ApiPermission::Create, &request)
            .await
            .map(|_: proto::DeleteRoomResponse| ())
    }

    /// Nobody where the room doesn't exist.
    pub async fn list_participants(&self, room: &RoomName) -> Call<Vec<ParticipantBrief>> {
        let request = proto::ListParticipantsRequest {
            room: room.0.clone(),
        };
        self.call(
            "RoomService/ListParticipants",
            ApiPermission::Admin(room),
            &request,
        )
        .await
        .map(|answer: proto::ListParticipantsResponse| {
            let participants = answer.participants.into_iter();
            participants.map(ParticipantBrief::from).collect()
        })
    }

    /// Asks LiveKit to send `agent` to `room`; returns the dispatch's id once the server has accepted.
    ///
    /// That proves nothing of the agent: the server accepts a name that no worker has. A missing room is created.
    pub async fn create_dispatch(
        &self,
        room: &RoomName,
        agent: &str,
        metadata: &str,
    ) -> Call<String> {
        let request = proto::CreateAgentDispatchRequest {
            agent_name: agent.to_owned(),
            room: room.0.clone(),
            metadata: metadata.to_owned(),
            ..proto::CreateAgentDispatchRequest::default()
        };
        self.call(
            "AgentDispatchService/CreateDispatch",
            ApiPermission::Admin(room),
            &request,
        )
        .await
        .map(|dispatch: proto::AgentDispatch| dispatch.id)
    }

    /// The dispatches of a room, the unnamed one included that livekit-server adds to every room by itself.
    ///
    /// Where the room doesn't exist, livekit-server (1.13.5) answers only after 3 s, with HTTP 503 `unavailable`; the same
    /// goes for [`delete_dispatch`](Self::delete_dispatch).
    pub async fn list_dispatch(&self, room: &RoomName) -> Call<Vec<DispatchInfo>> {
        let request = proto::ListAgentDispatchRequest {
            room: room.0.clone(),
            ..proto::ListAgentDispatchRequest::default()
        };
        self.call(
            "AgentDispatchService/ListDispatch",
            ApiPermission::Admin(room),
            &request,
        )
        .await
        .map(|answer: proto::ListAgentDispatchResponse| {
            let dispatches = answer.agent_dispatches.into_iter();
            dispatches.map(DispatchInfo::from).collect()
        })
    }

    /// Deletes a dispatch, which ends its jobs.
    pub async fn delete_dispatch(&self, room: &RoomName, id: &str) -> Call<()> {
        let request = proto::DeleteAgentDispatchRequest {
            dispatch_id: id.to_owned(),
            room: room.0.clone(),
        };
        self.call(
            "AgentDispatchService/DeleteDispatch",
            ApiPermission::Admin(room),
            &request,
        )
        .await
        .map(|_: proto::AgentDispatch| ())
    }

    /// One Twirp call on a connection of its own: a kept one could be stale, and then a failure would be nobody's.
    async fn call<A: prost::Message + Default>(
        &self,
        method: &str,
        permission: ApiPermission<'_>,
        request: &impl prost::Message,
    ) -> Call<A> {
        let mut sent_at = None;
        let result = self
            .attempt(method, permission, request, &mut sent_at)
            .await;
        Call {
            sent_at,
            answered_at: Instant::now(),
            result,
        }
    }

    async fn attempt<A: prost::Message + Default>(
        &self,
        method: &str,
        permission: ApiPermission<'_>,
        request: &impl prost::Message,
        sent_at: &mut Option<Instant>,
    ) -> Result<A, ApiError> {
        let deadline = Instant::now() + self.timeout;
        let request = self.request(method, permission, request.encode_to_vec());
        let stream = self.endpoint.connect(deadline).await?;
        *sent_at = Some(Instant::now());
        let answer = exchange(stream, request, deadline)
            .await
            .map_err(|error| match error {
                ExchangeError::Timeout => ApiError::Timeout(self.timeout),
                ExchangeError::Broken(text) => ApiError::Broken(text),
                ExchangeError::Malformed(text) => ApiError::Protocol(text),
            })?;
        if answer.status != StatusCode::OK {
            return Err(ApiError::Refused(answer.rejection()));
        }
        match answer.body_end {
            BodyEnd::Whole => A::decode(answer.body)
                .map_err(|error| ApiError::Protocol(format!("HTTP 200 without protobuf: {error}"))),
            BodyEnd::TooLong => Err(ApiError::Protocol(format!(
                "a body of more than {MAX_BODY_BYTES} bytes"
            ))),
            BodyEnd::Late => Err(ApiError::Timeout(self.timeout)),
            BodyEnd::Cut => Err(ApiError::Broken(format!(
                "{} bytes of the body came",
                answer.body.len()
            ))),
        }
    }

    fn request(
        &self,
        method: &str,
        permission: ApiPermission<'_>,
        body: Vec<u8>,
    ) -> Request<Full<Bytes>> {
        let path = format!("/twirp/livekit.{method}");
        Request::post(self.endpoint.target(&path))
            .header(HOST, self.endpoint.authority())
            .header(AUTHORIZATION, bearer(&self.keys.api(permission)))
            .header(CONTENT_TYPE, "application/protobuf")
            .header(
                USER_AGENT,
                concat!("livekit-canary/", env!("CARGO_PKG_VERSION")),
            )
            .body(Full::from(body))
            .expect("the path of a URL, a host and fixed headers make a request")
    }
}

impl<T> Call<T> {
    fn map<U>(self, convert: impl FnOnce(T) -> U) -> Call<U> {
        Call {
            sent_at: self.sent_at,
            answered_at: self.answered_at,
            result: self.result.map(convert),
        }
    }
}

impl From<NamedAgent> for proto::RoomAgentDispatch {
    fn from(agent: NamedAgent) -> Self {
        Self {
            agent_name: agent.name,
            metadata: agent.metadata,
            ..Self::default()
        }
    }
}

/// Rounded up: LiveKit takes 0 for "the server's default".
fn whole_seconds(duration: Duration) -> u32 {
    let up = u64::from(duration.subsec_nanos() > 0);
    u32::try_from(duration.as_secs() + up).unwrap_or(u32::MAX)
}

impl From<proto::Room> for RoomInfo {
    fn from(room: proto::Room) -> Self {
        Self {
            name: RoomName(room.name),
            sid: room.sid,
            metadata: room.metadata,
        }
    }
}

impl From<proto::ParticipantInfo> for ParticipantBrief {
    fn from(participant: proto::ParticipantInfo) -> Self {
        Self {
            kind: participant.kind().as_str_name().to_owned(),
            identity: participant.identity,
            attributes: participant.attributes,
            joined_at_ms: participant.joined_at_ms,
        }
    }
}

impl From<proto::AgentDispatch> for DispatchInfo {
    fn from(dispatch: proto::AgentDispatch) -> Self {
        let jobs = dispatch.state.unwrap_or_default().jobs;
        Self {
            id: dispatch.id,
            agent_name: dispatch.agent_name,
            jobs: jobs.into_iter().map(JobInfo::from).collect(),
        }
    }
}

impl From<proto::Job> for JobInfo {
    fn from(job: proto::Job) -> Self {
        let state = job.state.unwrap_or_default();
        Self {
            id: job.id,
            status: state.status().as_str_name().to_owned(),
            error: sanitize(&state.error),
        }
    }
}

#[cfg(test)]
mod tests;
