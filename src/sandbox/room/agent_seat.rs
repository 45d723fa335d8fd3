//! An agent's place in a room: how it appears to the others, and the tracks that it plays on.

use std::collections::HashMap;

use livekit_protocol as proto;

use crate::sandbox::agent::{AgentSound, DemoAgent};
use crate::sandbox::fault::{Faults, InjectedFault};
use crate::sandbox::ids::{guid, unix_millis};

/// An agent in the room.
pub(super) struct AgentSeat {
    pub(super) info: proto::ParticipantInfo,
    /// The participant that speaks on its behalf.
    pub(super) avatar: Option<proto::ParticipantInfo>,
    pub(super) agent: DemoAgent,
    pub(super) dispatch_id: String,
    pub(super) visible: bool,
    /// Ids of the callers' tracks that it subscribed to.
    pub(super) listens_to: Vec<String>,
    pub(super) voice: Option<AudioOut>,
    pub(super) background: Option<AudioOut>,
}

/// A track that an agent plays on.
pub(super) struct AudioOut {
    pub(super) track_sid: String,
    pub(super) seq: u64,
    pub(super) time: u32,
}

impl AgentSeat {
    /// The agent, and the participant that speaks on its behalf.
    pub(super) fn people(&self) -> impl Iterator<Item = &proto::ParticipantInfo> {
        std::iter::once(&self.info).chain(&self.avatar)
    }

    pub(super) fn people_mut(&mut self) -> impl Iterator<Item = &mut proto::ParticipantInfo> {
        std::iter::once(&mut self.info).chain(&mut self.avatar)
    }

    /// The participant that publishes this sound.
    pub(super) fn speaker(&mut self, sound: AgentSound) -> &mut proto::ParticipantInfo {
        match (sound, &mut self.avatar) {
            (AgentSound::Voice, Some(avatar)) => avatar,
            _ => &mut self.info,
        }
    }

    pub(super) fn line(&mut self, sound: AgentSound) -> &mut Option<AudioOut> {
        match sound {
            AgentSound::Voice => &mut self.voice,
            AgentSound::Background => &mut self.background,
        }
    }
}

/// An agent's participant. The server sets the attribute `lk.agent_name`, the worker `lk.agent.name`.
pub(super) fn agent_info(job: &proto::Job) -> proto::ParticipantInfo {
    let joined = unix_millis();
    let mut attributes = HashMap::new();
    if !job.agent_name.is_empty() {
        attributes.insert("lk.agent_name".to_owned(), job.agent_name.clone());
        attributes.insert("lk.agent.name".to_owned(), job.agent_name.clone());
    }
    let identity = job.state.as_ref().map(|s| s.participant_identity.clone());
    proto::ParticipantInfo {
        sid: guid("PA_"),
        identity: identity.unwrap_or_default(),
        state: proto::participant_info::State::Joined.into(),
        joined_at: joined / 1000,
        joined_at_ms: joined,
        kind: proto::participant_info::Kind::Agent.into(),
        attributes,
        permission: Some(proto::ParticipantPermission {
            can_subscribe: true,
            can_publish: true,
            can_publish_data: true,
            can_update_metadata: true,
            ..proto::ParticipantPermission::default()
        }),
        ..proto::ParticipantInfo::default()
    }
}

/// An avatar's participant, as the avatar's worker joins it in addition to the agent.
pub(super) fn avatar_of(agent: &proto::ParticipantInfo, room: &str) -> proto::ParticipantInfo {
    let on_behalf = ("lk.publish_on_behalf".to_owned(), agent.identity.clone());
    proto::ParticipantInfo {
        sid: guid("PA_"),
        identity: format!("avatar-{room}"),
        attributes: [on_behalf].into(),
        ..agent.clone()
    }
}

/// A track as livekit-agents publishes it: its names, and no source for background sound.
pub(super) fn agent_track(sound: AgentSound, faults: &Faults) -> proto::TrackInfo {
    let (name, source, mid) = match sound {
        AgentSound::Voice if faults.has(&InjectedFault::UnknownSource) => {
            ("voice", proto::TrackSource::Unknown, "0")
        }
        AgentSound::Voice => ("roomio_audio", proto::TrackSource::Microphone, "0"),
        AgentSound::Background => ("background_audio", proto::TrackSource::Unknown, "1"),
    };
    proto::TrackInfo {
        sid: guid("TR_AM"),
        name: name.to_owned(),
        source: source.into(),
        mime_type: "audio/opus".to_owned(),
        mid: mid.to_owned(),
        encryption: if faults.has(&InjectedFault::Encrypted) {
            proto::encryption::Type::Gcm.into()
        } else {
            proto::encryption::Type::None.into()
        },
        stream: "camera".to_owned(),
        ..proto::TrackInfo::default()
    }
}
