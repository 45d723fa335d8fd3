//! What the server itself says, asked by a client of its own: a mistake in the product's API client can't hide here.

use anyhow::Context as _;
use livekit_api::access_token::{AccessToken, VideoGrants};
use serde_json::{Value, json};

/// A client of one server's Twirp API.
#[derive(Clone)]
pub struct Server {
    agent: ureq::Agent,
    base: String,
    key: String,
    secret: String,
}

impl Server {
    /// `base`: `http://host:port`.
    pub fn new(base: String, key: &str, secret: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(std::time::Duration::from_secs(5)))
            // One from before the path to the server changed would be broken.
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

    /// Names of all rooms.
    pub fn rooms(&self) -> anyhow::Result<Vec<String>> {
        let answer = self.call("RoomService/ListRooms", "", &json!({}))?;
        Ok(list(&answer, "rooms")
            .iter()
            .map(|room| text(room, "name"))
            .collect())
    }

    /// The participants of a room; none where there is no such room.
    pub fn participants(&self, room: &str) -> anyhow::Result<Vec<Value>> {
        let answer = self.call("RoomService/ListParticipants", room, &json!({"room": room}))?;
        Ok(list(&answer, "participants"))
    }

    /// How many jobs the server lists for the dispatch of `agent` to a room; `None` where there is no such dispatch.
    pub fn jobs(&self, room: &str, agent: &str) -> anyhow::Result<Option<usize>> {
        let method = "AgentDispatchService/ListDispatch";
        let answer = match self.call(method, room, &json!({"room": room})) {
            Ok(answer) => answer,
            Err(error) if is_not_found(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let dispatches = list(&answer, "agent_dispatches");
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

    /// Takes a right away: `name` is a field of `ParticipantPermission`.
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
        let request = json!({"room": room, "agent_name": agent, "metadata": metadata});
        self.call("AgentDispatchService/CreateDispatch", room, &request)
            .map(drop)
    }

    /// A token that joins `room` as `identity`.
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
        let mut answer = self
            .agent
            .post(format!("{}/twirp/livekit.{method}", self.base))
            .header("Authorization", format!("Bearer {token}"))
            .send_json(request)
            .with_context(|| method.to_owned())?;
        Ok(answer.body_mut().read_json()?)
    }
}

/// Whether the server has no such room: it says so, or no node of it answers for the room.
fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(ureq::Error::StatusCode(404 | 503))
    )
}

/// A field by its name in the protobuf, or in the other spelling of protobuf's JSON, which the sandbox writes.
fn field<'a>(value: &'a Value, name: &str) -> &'a Value {
    let mut words = name.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    let camel_case = words.fold(first, |name, word| {
        let (initial, rest) = word.split_at(1);
        name + &initial.to_uppercase() + rest
    });
    value.get(name).unwrap_or(&value[camel_case])
}

/// Protobuf's JSON leaves empty lists out.
fn list(value: &Value, name: &str) -> Vec<Value> {
    field(value, name).as_array().cloned().unwrap_or_default()
}

fn text(value: &Value, name: &str) -> String {
    field(value, name).as_str().unwrap_or_default().to_owned()
}
