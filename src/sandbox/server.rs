//! HTTP on one port: the signal socket's upgrade, `validate`, and the server API over Twirp.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use livekit_api::access_token::Claims;
use livekit_protocol as proto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::command::{JoinedClient, Newcomer, RoomCommand, RoomFull, RoomOptions};
use super::fault::{FaultAnswer, Faults, HttpStep, SignalStep};
use super::ids::guid;
use super::registry::{Registry, RoomHandle, TooManyRooms};
use super::room;
use super::signal::{self, HANG, SignalOpening};
use super::token::{Denied, authenticate, check_join};
use super::twirp::{Body, TwirpFailure, Wire, response};

const MAX_CONNECTIONS: usize = 4096;
const MAX_BODY: usize = 1 << 20;
/// Also how long a kept connection may be idle; clients pool theirs.
const HEADER_TIMEOUT: Duration = Duration::from_mins(5);

/// Ends the connection without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the connection is dropped, as the fault demands")]
pub(crate) struct Dropped;

/// Why a call gets no normal answer.
enum Interrupt {
    Answer(Box<Response<Body>>),
    Drop,
}

impl From<TwirpFailure> for Interrupt {
    fn from(error: TwirpFailure) -> Self {
        Self::Answer(Box::new(error.into_response()))
    }
}

impl From<TooManyRooms> for Interrupt {
    fn from(_: TooManyRooms) -> Self {
        TwirpFailure::exhausted("the sandbox has reached its limit of rooms").into()
    }
}

/// Accepts connections until shutdown.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Registry>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = shared.shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Most likely out of file descriptors: give connections time to end.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            continue;
        };
        let connection = connection(stream, Arc::clone(&shared));
        shared.tracker.spawn(async move {
            connection.await;
            drop(permit);
        });
    }
}

async fn connection(stream: TcpStream, shared: Arc<Registry>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let shutdown = shared.shutdown.clone();
    let service = hyper::service::service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { answer(&shared, request).await }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::select! {
        () = shutdown.cancelled() => {}
        ended = connection => if let Err(error) = ended {
            tracing::debug!(%error, "a connection ended early");
        }
    }
}

async fn answer(
    shared: &Arc<Registry>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Dropped> {
    let path = request.uri().path().to_owned();
    let result = route(shared, request, &path).await;
    let mut response = match result {
        Ok(response) => response,
        Err(Interrupt::Answer(response)) => *response,
        Err(Interrupt::Drop) => return Err(Dropped),
    };
    if matches!(path.as_str(), "/rtc/validate" | "/rtc/v1/validate") {
        // Browsers send this request from any page.
        let any = HeaderValue::from_static("*");
        response
            .headers_mut()
            .insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, any);
    }
    Ok(response)
}

async fn route(
    shared: &Arc<Registry>,
    request: Request<Incoming>,
    path: &str,
) -> Result<Response<Body>, Interrupt> {
    let query = Query::of(&request);
    let authorization = request
        .headers()
        .get(header::AUTHORIZATION)
        .map(|value| value.to_str().unwrap_or_default());
    let claims = authenticate(
        &shared.settings.api_key,
        shared.settings.secret(),
        authorization,
        query.get("access_token"),
    )?;
    match path {
        "/" => Ok(plain(StatusCode::OK, "OK")),
        "/rtc" => join(shared, request, claims, &query).await,
        // The sandbox has no single peer connection: clients fall back to /rtc on a 404.
        "/rtc/v1" => Ok(response(StatusCode::NOT_FOUND, "", "")),
        "/rtc/validate" => {
            check_join(claims.as_ref())?;
            Ok(plain(StatusCode::OK, "success"))
        }
        "/rtc/v1/validate" => {
            check_join(claims.as_ref())?;
            Ok(plain(StatusCode::BAD_REQUEST, "join_request is required"))
        }
        _ => match path.strip_prefix("/twirp/livekit.") {
            Some(method)
                if method.starts_with("RoomService/")
                    || method.starts_with("AgentDispatchService/") =>
            {
                let method = method.to_owned();
                twirp(shared, request, claims, &method, path).await
            }
            _ => Ok(plain(StatusCode::NOT_FOUND, "404 page not found\n")),
        },
    }
}

impl From<Denied> for Interrupt {
    fn from(denied: Denied) -> Self {
        Self::Answer(Box::new(plain(denied.status, denied.text)))
    }
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    response(status, "text/plain; charset=utf-8", text)
}

/// The query's parameters.
struct Query(Vec<(String, String)>);

impl Query {
    fn of(request: &Request<Incoming>) -> Self {
        let query = request.uri().query().unwrap_or_default();
        Self(
            url::form_urlencoded::parse(query.as_bytes())
                .into_owned()
                .collect(),
        )
    }

    fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Whether a flag is set, as the Go server parses it: `1` or `true`.
    fn flag(&self, name: &str, default: bool) -> bool {
        match self.get(name) {
            None | Some("") => default,
            Some(value) => matches!(value, "1" | "true"),
        }
    }
}

async fn join(
    shared: &Arc<Registry>,
    mut request: Request<Incoming>,
    claims: Option<Claims>,
    query: &Query,
) -> Result<Response<Body>, Interrupt> {
    let Some(accept) = websocket_accept(&request) else {
        return Ok(response(StatusCode::NOT_FOUND, "", ""));
    };
    let claims = check_join(claims.as_ref())?;
    let name = claims.video.room.clone();
    let faults = shared.faults(&name);
    interrupt(&faults, HttpStep::Upgrade).await?;

    let opening = if let Some(action) = faults.action(SignalStep::BeforeJoin) {
        SignalOpening::Misbehave(action)
    } else if query.flag("reconnect", false) {
        // The sandbox keeps no session that could be resumed.
        SignalOpening::StateMismatch
    } else {
        let (room, joined) = enter(shared, &name, claims, query).await?;
        SignalOpening::Session {
            room,
            joined,
            fault: faults.action(SignalStep::AfterJoin),
        }
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let shutdown = shared.shutdown.clone();
    shared
        .tracker
        .spawn(signal::run(upgrade, opening, shutdown));

    let mut switch = response(StatusCode::SWITCHING_PROTOCOLS, "", "");
    let headers = switch.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    Ok(switch)
}

/// Joins the room; a missing room is created.
async fn enter(
    shared: &Arc<Registry>,
    name: &str,
    claims: &Claims,
    query: &Query,
) -> Result<(RoomHandle, JoinedClient), Interrupt> {
    // A room can close between the lookup and the join; the next attempt creates a new one.
    for _ in 0..3 {
        let new = claims.room_config.clone().map(from_token);
        let room = room::open(shared, name, new.unwrap_or_default())?;
        let newcomer = Box::new(newcomer(claims, query));
        match room.ask(|reply| RoomCommand::Join(newcomer, reply)).await {
            Some(Ok(joined)) => return Ok((room, joined)),
            Some(Err(RoomFull)) => break,
            None => {}
        }
    }
    // The real server's response for a full room.
    Err(Denied {
        status: StatusCode::INTERNAL_SERVER_ERROR,
        text: "connection closed by media".to_owned(),
    }
    .into())
}

fn from_token(config: proto::RoomConfiguration) -> RoomOptions {
    RoomOptions {
        empty_timeout: config.empty_timeout,
        departure_timeout: config.departure_timeout,
        max_participants: config.max_participants,
        metadata: config.metadata,
        agents: config.agents,
    }
}

fn newcomer(claims: &Claims, query: &Query) -> Newcomer {
    let is_agent = claims.video.agent || claims.kind == "agent";
    let number = |name: &str| query.get(name).and_then(|value| value.parse().ok());
    Newcomer {
        identity: claims.sub.clone(),
        name: claims.name.clone(),
        metadata: claims.metadata.clone(),
        attributes: claims.attributes.clone(),
        permission: proto::ParticipantPermission {
            can_subscribe: claims.video.can_subscribe(),
            can_publish: claims.video.can_publish(),
            can_publish_data: claims.video.can_publish_data(),
            can_update_metadata: claims.video.can_update_own_metadata(),
            ..proto::ParticipantPermission::default()
        },
        kind: if is_agent {
            proto::participant_info::Kind::Agent
        } else {
            proto::participant_info::Kind::Standard
        },
        auto_subscribe: query.flag("auto_subscribe", true) && claims.video.can_subscribe(),
        client_protocol: number("client_protocol").unwrap_or_default(),
    }
}

/// `Sec-WebSocket-Accept` for an upgrade request; `None` if the request is none.
fn websocket_accept(request: &Request<Incoming>) -> Option<String> {
    let headers = request.headers();
    let names_websocket = headers
        .get(header::UPGRADE)?
        .to_str()
        .ok()?
        .eq_ignore_ascii_case("websocket");
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?;
    names_websocket
        .then(|| tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes()))
}

/// Applies the room's faults to a request.
async fn interrupt(faults: &Faults, step: HttpStep) -> Result<(), Interrupt> {
    let Some(answer) = faults.answer(step) else {
        return Ok(());
    };
    let answer = match answer {
        FaultAnswer::TooMany { retry_after, html } => too_many(step, *retry_after, *html),
        FaultAnswer::ResourceExhausted => {
            TwirpFailure::exhausted("agent sessions limit exceeded").into_response()
        }
        FaultAnswer::Quota => TwirpFailure::exhausted("monthly quota exceeded").into_response(),
        FaultAnswer::Unnamed => TwirpFailure {
            status: StatusCode::FORBIDDEN,
            ..TwirpFailure::exhausted("no more of these")
        }
        .into_response(),
        FaultAnswer::NodeLimit => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "node has exceeded its configured limit",
        ),
        FaultAnswer::ServerError => plain(StatusCode::INTERNAL_SERVER_ERROR, "internal error"),
        FaultAnswer::Drop => return Err(Interrupt::Drop),
        FaultAnswer::Hang => {
            tokio::time::sleep(HANG).await;
            return Err(Interrupt::Drop);
        }
        FaultAnswer::Flood => flood(),
    };
    Err(Interrupt::Answer(Box::new(answer)))
}

fn too_many(step: HttpStep, retry_after: Option<Duration>, html: bool) -> Response<Body> {
    const PAGE: &str = "<html><head><title>429 Too Many Requests</title></head><body>\
                        <h1>429 Too Many Requests</h1></body></html>\n";
    let mut answer = if html {
        response(StatusCode::TOO_MANY_REQUESTS, "text/html", PAGE)
    } else if step == HttpStep::Upgrade {
        plain(
            StatusCode::TOO_MANY_REQUESTS,
            "too many concurrent connections",
        )
    } else {
        TwirpFailure::exhausted("rate limit exceeded").into_response()
    };
    if let Some(after) = retry_after {
        let seconds = HeaderValue::from(after.as_secs());
        answer.headers_mut().insert(header::RETRY_AFTER, seconds);
    }
    answer
}

/// A very long answer: 256 MiB.
fn flood() -> Response<Body> {
    const CHUNK: usize = 64 << 10;
    let chunk = Bytes::from(vec![b' '; CHUNK]);
    let chunks = std::iter::repeat_n(chunk, 4096).map(|chunk| Ok(Frame::data(chunk)));
    let body = StreamBody::new(futures_util::stream::iter(chunks));
    let mut response = Response::new(BodyExt::boxed(body));
    let protobuf = HeaderValue::from_static("application/protobuf");
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, protobuf);
    response
}

async fn twirp(
    shared: &Arc<Registry>,
    request: Request<Incoming>,
    claims: Option<Claims>,
    method: &str,
    path: &str,
) -> Result<Response<Body>, Interrupt> {
    let verb = request.method().clone();
    if verb != Method::POST {
        let msg = format!(
            "unsupported method {:?} (only POST is allowed)",
            verb.as_str()
        );
        return Err(TwirpFailure::bad_route(verb.as_str(), path, msg).into());
    }
    let wire = Wire::of(request.headers())
        .map_err(|msg| TwirpFailure::bad_route(verb.as_str(), path, msg))?;
    let body = Limited::new(request.into_body(), MAX_BODY).collect().await;
    let body = body.map_err(|_| Interrupt::Drop)?.to_bytes();
    let call = TwirpCall {
        shared,
        claims,
        wire,
        body,
    };
    match method {
        "RoomService/CreateRoom" => call.create_room().await,
        "RoomService/ListRooms" => call.list_rooms().await,
        "RoomService/DeleteRoom" => call.delete_room().await,
        "RoomService/UpdateRoomMetadata" => call.update_room_metadata().await,
        "RoomService/ListParticipants" => call.list_participants().await,
        "RoomService/GetParticipant" => call.get_participant().await,
        "RoomService/RemoveParticipant" => call.remove_participant().await,
        "AgentDispatchService/CreateDispatch" => call.create_dispatch().await,
        "AgentDispatchService/ListDispatch" => call.list_dispatch().await,
        "AgentDispatchService/DeleteDispatch" => call.delete_dispatch().await,
        _ => {
            let msg = format!("no handler for path {path:?}");
            Err(TwirpFailure::bad_route(verb.as_str(), path, msg).into())
        }
    }
}

/// One call of the server API.
struct TwirpCall<'a> {
    shared: &'a Arc<Registry>,
    claims: Option<Claims>,
    wire: Wire,
    body: Bytes,
}

type Answered = Result<Response<Body>, Interrupt>;

impl TwirpCall<'_> {
    fn permit(&self, granted: impl Fn(&Claims) -> bool) -> Result<(), TwirpFailure> {
        if self.claims.as_ref().is_some_and(granted) {
            Ok(())
        } else {
            Err(TwirpFailure::permission_denied())
        }
    }

    fn permit_admin(&self, room: &str) -> Result<(), TwirpFailure> {
        self.permit(|claims| claims.video.room_admin && claims.video.room == room)
    }

    async fn fault(&self, step: HttpStep, room: &str) -> Result<(), Interrupt> {
        interrupt(&self.shared.faults(room), step).await
    }

    /// The room of this name, or the real server's error for a missing room.
    fn room(&self, name: &str) -> Result<RoomHandle, TwirpFailure> {
        self.shared.find(name).ok_or_else(TwirpFailure::no_room)
    }

    async fn create_room(&self) -> Answered {
        let request: proto::CreateRoomRequest = self.wire.decode(&self.body)?;
        self.fault(HttpStep::CreateRoom, &request.name).await?;
        self.permit(|claims| claims.video.room_create)?;
        let new = RoomOptions {
            empty_timeout: request.empty_timeout,
            departure_timeout: request.departure_timeout,
            max_participants: request.max_participants,
            metadata: request.metadata,
            agents: request.agents,
        };
        // An existing room is left unchanged.
        let room = room::open(self.shared, &request.name, new)?;
        let info = room.ask(RoomCommand::Info).await;
        Ok(self.wire.encode(&info.ok_or_else(TwirpFailure::no_room)?))
    }

    async fn list_rooms(&self) -> Answered {
        let request: proto::ListRoomsRequest = self.wire.decode(&self.body)?;
        match request.names.first() {
            Some(name) => self.fault(HttpStep::Api, name).await?,
            None => interrupt(&self.shared.common_faults(), HttpStep::Api).await?,
        }
        self.permit(|claims| claims.video.room_list)?;
        let mut rooms = Vec::new();
        for (name, room) in self.shared.open_rooms() {
            if request.names.is_empty() || request.names.contains(&name) {
                rooms.extend(room.ask(RoomCommand::Info).await);
            }
        }
        Ok(self.wire.encode(&proto::ListRoomsResponse { rooms }))
    }

    async fn delete_room(&self) -> Answered {
        let request: proto::DeleteRoomRequest = self.wire.decode(&self.body)?;
        self.fault(HttpStep::DeleteRoom, &request.room).await?;
        self.permit(|claims| claims.video.room_create)?;
        let missing = || TwirpFailure::not_found("requested room does not exist");
        let room = self.shared.take(&request.room).ok_or_else(missing)?;
        room.ask(RoomCommand::Close).await;
        Ok(self.wire.encode(&proto::DeleteRoomResponse::default()))
    }

    async fn update_room_metadata(&self) -> Answered {
        let request: proto::UpdateRoomMetadataRequest = self.wire.decode(&self.body)?;
        self.fault(HttpStep::Api, &request.room).await?;
        self.permit_admin(&request.room)?;
        let metadata = request.metadata;
        let room = self.room(&request.room)?;
        let info = room
            .ask(|reply| RoomCommand::SetMetadata(metadata, reply))
            .await;
        Ok(self.wire.encode(&info.ok_or_else(TwirpFailure::no_room)?))
    }

    async fn participants(&self, room: &str) -> Vec<proto::ParticipantInfo> {
        match self.shared.find(room) {
            Some(room) => room
                .ask(RoomCommand::Participants)
                .await
                .unwrap_or_default(),
            None => Vec::new(),
        }
    }

    async fn list_participants(&self) -> Answered {
        let request: proto::ListParticipantsRequest = self.wire.decode(&self.body)?;
        self.fault(HttpStep::Api, &request.room).await?;
        self.permit_admin(&request.room)?;
        let participants = self.participants(&request.room).await;
        let answer = proto::ListParticipantsResponse { participants };
        Ok(self.wire.encode(&answer))
    }

    async fn get_participant(&self) -> Answered {
        let request: proto::RoomParticipantIdentity = self.wire.decode(&self.body)?;
        self.fault(HttpStep::Api, &request.room).await?;
        self.permit_admin(&request.room)?;
        let found = self
            .participants(&request.room)
            .await
            .into_iter()
            .find(|participant| participant.identity == request.identity);
        let missing = || TwirpFailure::not_found("participant does not exist");
        Ok(self.wire.encode(&found.ok_or_else(missing)?))
    }

    async fn remove_participant(&self) -> Answered {
        let request: proto::RoomParticipantIdentity = self.wire.decode(&self.body)?;
        self.fault(HttpStep::Api, &request.room).await?;
        self.permit_admin(&request.room)?;
        let removed = match self.shared.find(&request.room) {
            Some(room) => {
                let identity = request.identity;
                room.ask(|reply| RoomCommand::Remove(identity, reply)).await
            }
            None => None,
        };
        if removed != Some(true) {
            return Err(TwirpFailure::not_found("participant does not exist").into());
        }
        Ok(self
            .wire
            .encode(&proto::RemoveParticipantResponse::default()))
    }

    async fn create_dispatch(&self) -> Answered {
        let request: proto::CreateAgentDispatchRequest = self.wire.decode(&self.body)?;
        self.fault(HttpStep::CreateDispatch, &request.room).await?;
        self.permit_admin(&request.room)?;
        let dispatch = Box::new(proto::AgentDispatch {
            id: guid("AD_"),
            agent_name: request.agent_name,
            metadata: request.metadata,
            deployment: request.deployment,
            ..proto::AgentDispatch::default()
        });
        // The real server creates a missing room, too.
        let room = room::open(self.shared, &request.room, RoomOptions::default())?;
        let made = room
            .ask(|reply| RoomCommand::Dispatch(dispatch, reply))
            .await;
        let made = made.ok_or_else(TwirpFailure::no_room)?;
        let full = || TwirpFailure::exhausted("the room has reached its limit of dispatches");
        Ok(self.wire.encode(&made.ok_or_else(full)?))
    }

    async fn list_dispatch(&self) -> Answered {
        let request: proto::ListAgentDispatchRequest = self.wire.decode(&self.body)?;
        self.fault(HttpStep::ListDispatch, &request.room).await?;
        self.permit_admin(&request.room)?;
        let room = self.room(&request.room)?;
        let all = room.ask(RoomCommand::ListDispatch).await;
        let mut agent_dispatches = all.ok_or_else(TwirpFailure::no_room)?;
        if !request.dispatch_id.is_empty() {
            agent_dispatches.retain(|dispatch| dispatch.id == request.dispatch_id);
        }
        let answer = proto::ListAgentDispatchResponse { agent_dispatches };
        Ok(self.wire.encode(&answer))
    }

    async fn delete_dispatch(&self) -> Answered {
        let request: proto::DeleteAgentDispatchRequest = self.wire.decode(&self.body)?;
        self.fault(HttpStep::DeleteDispatch, &request.room).await?;
        self.permit_admin(&request.room)?;
        let room = self.room(&request.room)?;
        let id = request.dispatch_id;
        let deleted = room
            .ask(|reply| RoomCommand::DeleteDispatch(id, reply))
            .await;
        let deleted = deleted.ok_or_else(TwirpFailure::no_room)?;
        let missing = || TwirpFailure::not_found("dispatch ID not found");
        Ok(self.wire.encode(&deleted.ok_or_else(missing)?))
    }
}
