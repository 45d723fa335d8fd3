//! Who is in the room, which participant is the agent, and which tracks carry its voice. A plain state machine over the
//! server's updates of participants.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use livekit_protocol::encryption;
use livekit_protocol::participant_info::{Kind, State};
use livekit_protocol::{DisconnectReason, ParticipantInfo, TrackInfo, TrackSource, TrackType};
use tokio::time::Instant;

use crate::livekit::event::{AGENT_VERSION, Agent, RemoteTrackInfo, RoomEvent, RoomEventKind};
use crate::livekit::wire::request::sanitize;

/// Participants that are remembered; a probe's room has two.
const MAX_PARTICIPANTS: usize = 64;

/// Tracks whose changes are reported; a probe's room has two or three.
const MAX_TRACKS: usize = 64;

/// The name of the track on which livekit-agents plays background sound (`voice/background_audio.py`). It has no source, but it
/// is no voice.
const BACKGROUND_TRACK: &str = "background_audio";

/// Set by the server in an agent's token.
const NAME_BY_SERVER: &str = "lk.agent_name";
/// Set by the worker's SDK.
const NAME_BY_WORKER: &str = "lk.agent.name";
const STATE: &str = "lk.agent.state";
/// Set on an avatar or another helper: it speaks for the agent with this identity and is not an agent itself.
const ON_BEHALF: &str = "lk.publish_on_behalf";

pub(crate) struct Roster {
    own_identity: String,
    agent_name: Option<String>,
    /// By session id, because an identity may return in another session.
    present: HashMap<String, Member>,
    /// The agent's session id. It stays set after the agent has left.
    agent: Option<String>,
    agent_state: Option<String>,
    agent_version: Option<String>,
    agent_connected: bool,
    /// The agent has had a track with the source MICROPHONE. Audio of another source is then no voice of it.
    has_microphone: bool,
    encryption_reported: bool,
    /// The tracks that were reported, as they were reported.
    reported_tracks: Vec<RemoteTrackInfo>,
}

struct Member {
    first_seen: Instant,
    in_join_response: bool,
    info: ParticipantInfo,
    role: Role,
    reported_nameless: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Any other participant, including an agent whose name has not arrived yet.
    Other,
    Agent,
    Duplicate,
}

impl Roster {
    /// `agent_name` is the target's; `None` accepts any agent.
    pub(crate) fn new(own_identity: String, agent_name: Option<String>) -> Self {
        Self {
            own_identity,
            agent_name,
            present: HashMap::new(),
            agent: None,
            agent_state: None,
            agent_version: None,
            agent_connected: false,
            has_microphone: false,
            encryption_reported: false,
            reported_tracks: Vec::new(),
        }
    }

    /// Sets the identity that the server gave us, which may differ from the one that we asked for.
    pub(crate) fn set_own_identity(&mut self, identity: String) {
        self.own_identity = identity;
    }

    pub(crate) fn is_own(&self, identity: &str) -> bool {
        identity == self.own_identity
    }

    /// Handles participants from the join response or from an update; returns the events that follow.
    pub(crate) fn update(
        &mut self,
        at: Instant,
        participants: Vec<ParticipantInfo>,
        in_join_response: bool,
    ) -> Vec<RoomEvent> {
        let mut events = Vec::new();
        for info in participants {
            if self.is_own(&info.identity) {
                continue;
            }
            if info.state() == State::Disconnected {
                events.extend(self.on_disconnected(at, &info));
            } else {
                self.on_present(at, info, in_join_response, &mut events);
            }
        }
        let has_microphone = self.knows_agent() && self.audio_tracks().any(is_microphone);
        self.has_microphone |= has_microphone;
        events
    }

    /// Whether the agent has been seen.
    pub(crate) fn knows_agent(&self) -> bool {
        self.agent.is_some()
    }

    /// The tracks that carry the agent's voice: its own, and those of participants that publish on its behalf.
    ///
    /// A session publishes its voice as a MICROPHONE. An agent that never does may speak on audio of any other source.
    /// Encrypted audio is noise to the canary, and so no voice.
    pub(crate) fn voice(&self) -> impl Iterator<Item = &str> {
        let others = !self.has_microphone && !self.audio_tracks().any(is_microphone);
        let tracks = self.audio_tracks();
        tracks
            .filter(move |track| is_microphone(track) || others && track.name != BACKGROUND_TRACK)
            .filter(|track| track.encryption() == encryption::Type::None)
            .map(|track| track.sid.as_str())
    }

    /// The source of this track, if it is another one than a voice has.
    pub(crate) fn unusual_source(&self, sid: &str) -> Option<&'static str> {
        let track = self.audio_tracks().find(|track| track.sid == sid)?;
        (!is_microphone(track)).then(|| track.source().as_str_name())
    }

    /// The tracks of other participants that are new or have changed, agents that need a proof of who they are, and whether the
    /// agent can only be heard with a key.
    pub(crate) fn changes(&mut self) -> Vec<RoomEventKind> {
        let members = self.present.values();
        let published = members.flat_map(|member| {
            let tracks = member.info.tracks.iter();
            tracks.map(|track| remote_track(&member.info.identity, track))
        });
        let mut events = Vec::new();
        for track in published {
            let reported = &mut self.reported_tracks;
            match reported.iter().position(|known| known.sid == track.sid) {
                Some(at) if reported[at] == track => continue,
                Some(at) => reported[at] = track.clone(),
                None if reported.len() == MAX_TRACKS => continue,
                None => reported.push(track.clone()),
            }
            events.push(RoomEventKind::TrackChanged(track));
        }
        events.extend(self.encrypted_agent().map(RoomEventKind::AgentEncrypted));
        events.extend(self.nameless_agents());
        events
    }

    /// Agents without a name, each once, while the target's agent is missing.
    fn nameless_agents(&mut self) -> Vec<RoomEventKind> {
        if self.knows_agent() || self.agent_name.is_none() {
            return Vec::new();
        }
        let members = self.present.values_mut();
        let nameless =
            members.filter(|member| !member.reported_nameless && is_nameless_agent(&member.info));
        let events = nameless.map(|member| {
            member.reported_nameless = true;
            let identity = member.info.identity.clone();
            RoomEventKind::NamelessAgent { identity }
        });
        events.collect()
    }

    /// Treats this participant as the target's agent. Without effect if it has left, if it has a name, or if the agent is known.
    pub(crate) fn adopt(&mut self, at: Instant, identity: &str) -> Vec<RoomEvent> {
        let found = self.present.iter().find(|(_, member)| {
            let is_open = member.role == Role::Other && is_nameless_agent(&member.info);
            is_open && member.info.identity == identity
        });
        let Some((sid, member)) = found.filter(|_| !self.knows_agent()) else {
            return Vec::new();
        };
        let (sid, first_seen) = (sid.clone(), member.first_seen);
        let in_join_response = member.in_join_response;
        let kind = self.assign(&sid, in_join_response);
        let mut events: Vec<_> = kind
            .map(|kind| RoomEvent {
                at: first_seen,
                kind,
            })
            .into_iter()
            .collect();
        let has_microphone = self.audio_tracks().any(is_microphone);
        self.has_microphone |= has_microphone;
        events.extend(self.connection(at, &sid));
        events.extend(self.state_change(at, &sid));
        events.extend(self.version_change(at, &sid));
        events
    }

    /// The method of encryption if all audio of the agent is encrypted; once.
    fn encrypted_agent(&mut self) -> Option<&'static str> {
        if self.encryption_reported || !self.knows_agent() {
            return None;
        }
        let tracks = self.audio_tracks();
        let methods: Vec<_> = tracks.map(TrackInfo::encryption).collect();
        let method = methods.first()?.as_str_name();
        self.encryption_reported = !methods.contains(&encryption::Type::None);
        self.encryption_reported.then_some(method)
    }

    /// The audio tracks of the agent, and of participants that publish on its behalf.
    ///
    /// The server reports an agent that publishes nothing up to three seconds later than its avatar. Until the agent is
    /// known, any participant that publishes on behalf of another one may speak for it, and any agent without a name may be it.
    fn audio_tracks(&self) -> impl Iterator<Item = &TrackInfo> {
        let agent = self.agent.as_ref().and_then(|sid| self.present.get(sid));
        let identity = agent.map(|agent| agent.info.identity.as_str());
        let speaks = move |member: &&Member| {
            let on_behalf = attribute(&member.info, ON_BEHALF);
            let for_agent = on_behalf == identity || !self.knows_agent();
            let may_be_agent = !self.knows_agent() && is_nameless_agent(&member.info);
            member.role == Role::Agent || on_behalf.is_some() && for_agent || may_be_agent
        };
        let tracks = self.present.values().filter(speaks);
        tracks
            .flat_map(|member| &member.info.tracks)
            .filter(|track| track.r#type() == TrackType::Audio)
    }

    fn on_present(
        &mut self,
        at: Instant,
        info: ParticipantInfo,
        in_join_response: bool,
        events: &mut Vec<RoomEvent>,
    ) {
        let sid = info.sid.clone();
        let has_capacity = self.present.len() < MAX_PARTICIPANTS;
        let (member, first) = match self.present.entry(sid.clone()) {
            Entry::Occupied(known) => {
                let member = known.into_mut();
                // Updates can overtake each other; the server numbers them for this check.
                if info.version < member.info.version {
                    return;
                }
                member.info = info;
                (member, false)
            }
            Entry::Vacant(free) if has_capacity => (
                free.insert(Member {
                    first_seen: at,
                    in_join_response,
                    info,
                    role: Role::Other,
                    reported_nameless: false,
                }),
                true,
            ),
            // Anyone with a token may fill the room. Participants beyond the limit are ignored, so memory stays bounded.
            Entry::Vacant(_) => return,
        };
        if member.role == Role::Other {
            let (first_seen, in_join_response) = (member.first_seen, member.in_join_response);
            let agent = is_agent(&member.info, self.agent_name.as_deref());
            let kind = if agent {
                self.assign(&sid, in_join_response)
            } else if first {
                Some(other_joined(&member.info))
            } else {
                None
            };
            // A name may arrive late. The participant was there before, so the event has the time when it was first seen.
            events.extend(kind.map(|kind| RoomEvent {
                at: first_seen,
                kind,
            }));
        }
        events.extend(self.connection(at, &sid));
        events.extend(self.state_change(at, &sid));
        events.extend(self.version_change(at, &sid));
    }

    /// Assigns the role of an agent with the target's name. The first one is the agent, and a second one at the same time is
    /// a duplicate. One that joins after the agent has left counts as another participant.
    fn assign(&mut self, sid: &str, in_join_response: bool) -> Option<RoomEventKind> {
        let identity = self.present[sid].info.identity.clone();
        let current = self.agent.as_ref().and_then(|it| self.present.get_mut(it));
        match (&self.agent, current) {
            // The same agent in a new session. The server reports the end of the old session only afterwards, if at all.
            (Some(_), Some(current)) if current.info.identity == identity => {
                current.role = Role::Duplicate;
                self.agent = Some(sid.to_owned());
                self.member(sid)?.role = Role::Agent;
                None
            }
            (Some(_), Some(_)) => {
                self.member(sid)?.role = Role::Duplicate;
                Some(RoomEventKind::AgentDuplicate { identity })
            }
            (Some(_), None) => {
                let member = self.member(sid)?;
                member.role = Role::Duplicate;
                Some(other_joined(&member.info))
            }
            (None, _) => {
                self.agent = Some(sid.to_owned());
                let member = self.member(sid)?;
                member.role = Role::Agent;
                Some(RoomEventKind::AgentJoined {
                    agent: Agent {
                        identity,
                        sid: sid.to_owned(),
                        name: agent_name(&member.info).map(str::to_owned),
                        joined_at_ms: member.info.joined_at_ms,
                        joined: None,
                    },
                    in_join_response,
                })
            }
        }
    }

    fn member(&mut self, sid: &str) -> Option<&mut Member> {
        self.present.get_mut(sid)
    }

    fn connection(&mut self, at: Instant, sid: &str) -> Option<RoomEvent> {
        let member = self.present.get(sid)?;
        let connected = member.role == Role::Agent && member.info.state() == State::Active;
        if !connected || self.agent_connected {
            return None;
        }
        self.agent_connected = true;
        Some(RoomEvent {
            at,
            kind: RoomEventKind::AgentConnected,
        })
    }

    /// The last state that the agent's session reported.
    pub(crate) fn agent_state(&self) -> Option<&str> {
        self.agent_state.as_deref()
    }

    fn state_change(&mut self, at: Instant, sid: &str) -> Option<RoomEvent> {
        let member = self.present.get(sid)?;
        let state = attribute(&member.info, STATE)?;
        if member.role != Role::Agent || self.agent_state.as_deref() == Some(state) {
            return None;
        }
        let state = state.to_owned();
        self.agent_state = Some(state.clone());
        Some(RoomEvent {
            at,
            kind: RoomEventKind::AgentState(state),
        })
    }

    fn version_change(&mut self, at: Instant, sid: &str) -> Option<RoomEvent> {
        let member = self.present.get(sid)?;
        let version = sanitize(attribute(&member.info, AGENT_VERSION)?);
        if member.role != Role::Agent || self.agent_version.as_ref() == Some(&version) {
            return None;
        }
        self.agent_version = Some(version.clone());
        Some(RoomEvent {
            at,
            kind: RoomEventKind::AgentVersion(version),
        })
    }

    fn on_disconnected(&mut self, at: Instant, info: &ParticipantInfo) -> Option<RoomEvent> {
        let member = self.present.remove(&info.sid)?;
        (member.role == Role::Agent).then(|| RoomEvent {
            at,
            kind: RoomEventKind::AgentLeft {
                reason: disconnect_reason(info.disconnect_reason),
            },
        })
    }
}

/// The name of a disconnect reason in the protobufs.
pub(crate) fn disconnect_reason(number: i32) -> String {
    DisconnectReason::try_from(number).map_or_else(
        |_| format!("unknown reason {number}"),
        |reason| reason.as_str_name().to_owned(),
    )
}

fn is_agent(info: &ParticipantInfo, wanted: Option<&str>) -> bool {
    let named = wanted.is_none_or(|wanted| {
        let names = [NAME_BY_SERVER, NAME_BY_WORKER];
        names.iter().any(|key| attribute(info, key) == Some(wanted))
    });
    info.kind() == Kind::Agent && attribute(info, ON_BEHALF).is_none() && named
}

/// Servers before 1.9.2 set no name, and neither do workers of that time.
fn is_nameless_agent(info: &ParticipantInfo) -> bool {
    let is_agent = info.kind() == Kind::Agent && attribute(info, ON_BEHALF).is_none();
    is_agent && agent_name(info).is_none()
}

fn agent_name(info: &ParticipantInfo) -> Option<&str> {
    attribute(info, NAME_BY_SERVER).or_else(|| attribute(info, NAME_BY_WORKER))
}

/// The server sends a removed attribute as an empty one.
fn attribute<'a>(info: &'a ParticipantInfo, key: &str) -> Option<&'a str> {
    let value = info.attributes.get(key).map(String::as_str);
    value.filter(|value| !value.is_empty())
}

fn is_microphone(track: &TrackInfo) -> bool {
    track.source() == TrackSource::Microphone
}

fn remote_track(identity: &str, track: &TrackInfo) -> RemoteTrackInfo {
    RemoteTrackInfo {
        sid: track.sid.clone(),
        identity: identity.to_owned(),
        kind: track.r#type().as_str_name(),
        source: track.source().as_str_name(),
        name: sanitize(&track.name),
        muted: track.muted,
        encryption: track.encryption().as_str_name(),
    }
}

fn other_joined(info: &ParticipantInfo) -> RoomEventKind {
    RoomEventKind::OtherJoined {
        identity: info.identity.clone(),
        kind: info.kind().as_str_name().to_owned(),
        agent_name: agent_name(info).map(str::to_owned),
    }
}

#[cfg(test)]
mod tests;
