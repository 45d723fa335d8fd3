//! A client of LiveKit's server API. It shares no code with the canary's client, so that a mistake there becomes visible.

use anyhow::Context as _;
use livekit_api::access_token::{AccessToken, VideoGrants};
use serde_json::{Value, json};

/// A client of the Twirp API of one server.
#[derive(Clone)]
pub struct LivekitApi {
    agent: ureq::Agent,
    base: String,
    key: String,
    secret: String,
}

impl LivekitApi {
    /// `base` is `http://host:port`.
    pub fn new(base: String, key: &str, secret: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(std::time::Duration::from_secs(5)))
            // When a test changes the path to the server, an idle connection breaks.
            .max_idle_connections(0)
            .build()
            .into();
        Self {
            agent,
            base,
            key: key.to_owned(),
            secret: secret.to_owned(),
        }
    }

    /// The names of all rooms.
    pub fn rooms(&self) -> anyhow::Result<Vec<String>> {
        let response = self.call("RoomService/ListRooms", "", &json!({}))?;
        Ok(list(&response, "rooms")
            .iter()
            .map(|room| text(room, "name"))
            .collect())
    }

    /// The participants of a room. If there is no such room, the list is empty.
    pub fn participants(&self, room: &str) -> anyhow::Result<Vec<Value>> {
        let response = self.call("RoomService/ListParticipants", room, &json!({"room": room}))?;
        Ok(list(&response, "participants"))
    }

    /// The number of jobs that the server lists for the dispatch of `agent` to a room. `None` if there is no such dispatch.
    pub fn jobs(&self, room: &str, agent: &str) -> anyhow::Result<Option<usize>> {
        let method = "AgentDispatchService/ListDispatch";
        let response = match self.call(method, room, &json!({"room": room})) {
            Ok(response) => response,
            Err(error) if is_not_found(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let dispatches = list(&response, "agent_dispatches");
        let dispatch = dispatches
            .iter()
            .find(|dispatch| text(dispatch, "agent_name") == agent);
        Ok(dispatch.map(|dispatch| list(&dispatch["state"], "jobs").len()))
    }

    pub fn delete_room(&self, room: &str) -> anyhow::Result<()> {
        self.call("RoomService/DeleteRoom", room, &json!({"room": room}))
            .map(drop)
    }

    pub fn remove_participant(&self, room: &str, identity: &str) -> anyhow::Result<()> {
        let request = json!({"room": room, "identity": identity});
        self.call("RoomService/RemoveParticipant", room, &request)
            .map(drop)
    }

    /// Revokes a permission of a participant. `name` is a field of `ParticipantPermission`.
    pub fn revoke(&self, room: &str, identity: &str, name: &str) -> anyhow::Result<()> {
        let mut permission = json!({
            "can_subscribe": true,
            "can_publish": true,
            "can_publish_data": true,
            "can_update_metadata": true,
        });
        permission[name] = false.into();
        let request = json!({"room": room, "identity": identity, "permission": permission});
        self.call("RoomService/UpdateParticipant", room, &request)
            .map(drop)
    }

    pub fn create_room(&self, room: &str) -> anyhow::Result<()> {
        self.call("RoomService/CreateRoom", room, &json!({"name": room}))
            .map(drop)
    }

    pub fn dispatch(&self, room: &str, agent: &str, metadata: &str) -> anyhow::Result<()> {
        self.dispatch_to(room, agent, "", metadata)
    }

    /// The same to a deployment of the agent.
    pub fn dispatch_to(
        &self,
        room: &str,
        agent: &str,
        deployment: &str,
        metadata: &str,
    ) -> anyhow::Result<()> {
        let request = json!({
            "room": room,
            "agent_name": agent,
            "deployment": deployment,
            "metadata": metadata,
        });
        self.call("AgentDispatchService/CreateDispatch", room, &request)
            .map(drop)
    }

    /// A token with which a client joins `room` as `identity`.
    pub fn token(&self, room: &str, identity: &str) -> anyhow::Result<String> {
        let token = AccessToken::with_api_key(&self.key, &self.secret)
            .with_identity(identity)
            .with_grants(VideoGrants {
                room_join: true,
                room: room.to_owned(),
                ..VideoGrants::default()
            });
        Ok(token.to_jwt()?)
    }

    fn call(&self, method: &str, room: &str, request: &Value) -> anyhow::Result<Value> {
        let token = AccessToken::with_api_key(&self.key, &self.secret)
            .with_grants(VideoGrants {
                room_create: true,
                room_list: true,
                room_admin: true,
                room: room.to_owned(),
                ..VideoGrants::default()
            })
            .to_jwt()?;
        let mut response = self
            .agent
            .post(format!("{}/twirp/livekit.{method}", self.base))
            .header("Authorization", format!("Bearer {token}"))
            .send_json(request)
            .with_context(|| method.to_owned())?;
        Ok(response.body_mut().read_json()?)
    }
}

/// Whether the server has no such room: 404, or 503 if no node is responsible for it.
fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(ureq::Error::StatusCode(404 | 503))
    )
}

/// A field by its name in the protobuf definition, or by its name in camel case, which the sandbox writes. JSON of protobuf
/// allows both.
fn field<'a>(value: &'a Value, name: &str) -> &'a Value {
    let mut words = name.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    let camel_case = words.fold(first, |name, word| {
        let (initial, rest) = word.split_at(1);
        name + &initial.to_uppercase() + rest
    });
    value.get(name).unwrap_or(&value[camel_case])
}

/// JSON of protobuf omits empty lists.
fn list(value: &Value, name: &str) -> Vec<Value> {
    field(value, name).as_array().cloned().unwrap_or_default()
}

fn text(value: &Value, name: &str) -> String {
    field(value, name).as_str().unwrap_or_default().to_owned()
}
