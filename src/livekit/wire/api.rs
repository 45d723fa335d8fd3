//! LiveKit's server API over Twirp: rooms, participants and agent dispatches. Each call is a single attempt, because a
//! canary must see what a retry would hide. A rejection preserves status, body and `Retry-After`.

use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::Full;
use livekit_protocol as proto;
use tokio::time::Instant;

use super::connect::{ConnectError, Endpoint};
use super::request::{
    BodyEnd, ExchangeError, HttpRejection, MAX_BODY_BYTES, bearer, exchange, sanitize,
};
use super::token::{ApiPermission, Keys};
use crate::livekit::RoomName;

/// Twirp's content type for protobufs, of a request and of its answer.
const PROTOBUF: &str = "application/protobuf";

/// A client of one project's server API. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    endpoint: Endpoint,
    pub(crate) keys: Keys,
    timeout: Duration,
}

/// One call: its times and its result.
#[derive(Debug)]
pub struct Call<T> {
    /// When the request was about to be written, after TLS. `None` if no connection could be opened.
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
    /// Also HTTP 200 with an answer that is not LiveKit's, such as a page of another server.
    #[error("refused with HTTP {}: {}", .0.status, .0.message)]
    Refused(HttpRejection),
    #[error("the connection broke before the answer was complete: {0}")]
    Broken(String),
    #[error("the answer is not LiveKit's: {0}")]
    Protocol(String),
}

impl ApiError {
    /// Whether Twirp's code is `not_found`. A proxy's own 404 does not count.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(rejection) if rejection.twirp_code.as_deref() == Some("not_found"))
    }
}

/// The settings of a room that the canary creates.
#[derive(Debug, Clone)]
pub(crate) struct NewRoom {
    pub(crate) name: RoomName,
    pub(crate) metadata: String,
    pub(crate) empty_timeout: Duration,
    pub(crate) departure_timeout: Duration,
    pub(crate) max_participants: u32,
    /// Agents that the server dispatches when it creates the room. If empty, only the project's unnamed agent can join.
    pub(crate) agents: Vec<NamedAgent>,
}

/// An agent to dispatch, by the name under which its worker is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedAgent {
    pub(crate) name: String,
    /// Which of the agent's deployments; empty for workers without one.
    pub(crate) deployment: String,
    /// Passed to the agent's job.
    pub(crate) metadata: String,
}

#[derive(Debug, Clone)]
pub(crate) struct RoomInfo {
    pub(crate) sid: String,
}

#[derive(Debug, Clone)]
pub(crate) struct DispatchInfo {
    pub(crate) id: String,
    pub(crate) agent_name: String,
    pub(crate) deployment: String,
    pub(crate) jobs: Vec<JobInfo>,
}

/// One job of a dispatch, which a worker has accepted.
#[derive(Debug, Clone)]
pub(crate) struct JobInfo {
    pub(crate) id: String,
    /// `JS_PENDING`, `JS_RUNNING`, …
    pub(crate) status: String,
    pub(crate) error: String,
    /// The identity under which the job's agent joins; empty if the server does not name it.
    pub(crate) identity: String,
    /// The worker that accepted the job; empty if the server does not name it. The server assigns the id when a worker
    /// registers, so a worker that reconnects has a new one.
    pub(crate) worker: String,
}

impl JobInfo {
    /// Whether the participant with this identity is the job's agent. livekit-agents forms the identity from the job's id,
    /// unless the worker names another one.
    pub(crate) fn is_of(&self, identity: &str) -> bool {
        identity == self.identity || !self.id.is_empty() && identity.contains(&self.id)
    }
}

#[derive(Debug, Clone)]
pub struct ParticipantBrief {
    pub identity: String,
    pub kind: String,
    /// The other participants are not informed of it.
    pub hidden: bool,
    pub attributes: std::collections::HashMap<String, String>,
    /// The join time on the server's clock, in Unix milliseconds.
    pub joined_at_ms: i64,
}

impl Api {
    /// `timeout` bounds each call, from DNS to the last byte of the response.
    pub fn new(endpoint: Endpoint, keys: Keys, timeout: Duration) -> Self {
        Self {
            endpoint,
            keys,
            timeout,
        }
    }

    pub(crate) async fn create_room(&self, room: &NewRoom) -> Call<RoomInfo> {
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

    /// The rooms with exactly these names that exist now; all rooms of the project if `names` is empty.
    pub(crate) async fn list_rooms(&self, names: &[RoomName]) -> Call<Vec<RoomInfo>> {
        let request = proto::ListRoomsRequest {
            names: names.iter().map(|name| name.0.clone()).collect(),
        };
        self.call("RoomService/ListRooms", ApiPermission::List, &request)
            .await
            .map(|response: proto::ListRoomsResponse| {
                response.rooms.into_iter().map(RoomInfo::from).collect()
            })
    }

    pub(crate) async fn delete_room(&self, room: &RoomName) -> Call<()> {
        let request = proto::DeleteRoomRequest {
            room: room.0.clone(),
        };
        self.call("RoomService/DeleteRoom", ApiPermission::Create, &request)
            .await
            .map(|_: proto::DeleteRoomResponse| ())
    }

    /// The participants of a room; empty if the room does not exist.
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
        .map(|response: proto::ListParticipantsResponse| {
            let participants = response.participants.into_iter();
            participants.map(ParticipantBrief::from).collect()
        })
    }

    /// Asks LiveKit to send `agent` to `room`; returns the dispatch's id when the server has accepted the request.
    ///
    /// An accepted dispatch does not mean that an agent will join: the server also accepts a name that no worker has
    /// registered. It creates a missing room.
    pub(crate) async fn create_dispatch(&self, room: &RoomName, agent: NamedAgent) -> Call<String> {
        let request = proto::CreateAgentDispatchRequest {
            agent_name: agent.name,
            room: room.0.clone(),
            metadata: agent.metadata,
            deployment: agent.deployment,
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

    /// The dispatches of a room, including the unnamed one that livekit-server adds to every room.
    ///
    /// If the room does not exist, livekit-server (1.13.5) answers only after 3 s, with HTTP 503 `unavailable`.
    /// [`delete_dispatch`](Self::delete_dispatch) behaves the same.
    pub(crate) async fn list_dispatch(&self, room: &RoomName) -> Call<Vec<DispatchInfo>> {
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
        .map(|response: proto::ListAgentDispatchResponse| {
            let dispatches = response.agent_dispatches.into_iter();
            dispatches.map(DispatchInfo::from).collect()
        })
    }

    /// Deletes a dispatch, which ends its jobs.
    pub(crate) async fn delete_dispatch(&self, room: &RoomName, id: &str) -> Call<()> {
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

    /// One Twirp call on a connection of its own. A pooled connection could be stale, and then a failure would say nothing
    /// about the server.
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
        let response = exchange(stream, request, deadline)
            .await
            .map_err(|error| match error {
                ExchangeError::Timeout => ApiError::Timeout(self.timeout),
                ExchangeError::Broken(text) => ApiError::Broken(text),
                ExchangeError::Malformed(text) => ApiError::Protocol(text),
            })?;
        if response.status != StatusCode::OK || !is_protobuf(&response.headers) {
            return Err(ApiError::Refused(response.rejection()));
        }
        match response.body_end {
            BodyEnd::Whole => A::decode(response.body).map_err(|error| {
                ApiError::Protocol(format!(
                    "HTTP 200, but the body is not a valid protobuf: {error}"
                ))
            }),
            BodyEnd::TooLong => Err(ApiError::Protocol(format!(
                "the body has more than {MAX_BODY_BYTES} bytes"
            ))),
            BodyEnd::Late => Err(ApiError::Timeout(self.timeout)),
            BodyEnd::Cut => Err(ApiError::Broken(format!(
                "only {} bytes of the body arrived",
                response.body.len()
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
            .header(CONTENT_TYPE, PROTOBUF)
            .header(
                USER_AGENT,
                concat!("livekit-canary/", env!("CARGO_PKG_VERSION")),
            )
            .body(Full::from(body))
            .expect("the path of a URL, a host and fixed headers make a request")
    }
}

/// Whether an answer has Twirp's content type for protobufs. An empty page of another server would be a valid protobuf.
fn is_protobuf(headers: &HeaderMap) -> bool {
    let value = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let media_type = value.and_then(|value| value.split(';').next());
    media_type.is_some_and(|it| it.trim().eq_ignore_ascii_case(PROTOBUF))
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
            deployment: agent.deployment,
            ..Self::default()
        }
    }
}

/// Rounds up, because LiveKit interprets 0 as "the server's default".
fn whole_seconds(duration: Duration) -> u32 {
    let up = u64::from(duration.subsec_nanos() > 0);
    u32::try_from(duration.as_secs() + up).unwrap_or(u32::MAX)
}

impl From<proto::Room> for RoomInfo {
    fn from(room: proto::Room) -> Self {
        Self { sid: room.sid }
    }
}

impl From<proto::ParticipantInfo> for ParticipantBrief {
    fn from(participant: proto::ParticipantInfo) -> Self {
        Self {
            kind: participant.kind().as_str_name().to_owned(),
            hidden: participant.permission.is_some_and(|it| it.hidden),
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
            deployment: dispatch.deployment,
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
            identity: state.participant_identity,
            worker: sanitize(&state.worker_id),
        }
    }
}

#[cfg(test)]
mod tests;
