//! Who is in the room, and which of them is the agent and which track its voice. A plain state machine over what the
//! server says of participants.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use livekit_protocol::participant_info::{Kind, State};
use livekit_protocol::{DisconnectReason, ParticipantInfo, TrackInfo, TrackSource, TrackType};
use tokio::time::Instant;

use crate::livekit::event::{Agent, RoomEvent, Seen};

/// Participants kept in mind; a probe's room has two.
const MOST_PARTICIPANTS: usize = 64;

/// Set by the server in an agent's token.
const NAME_BY_SERVER: &str = "lk.agent_name";
/// Set by the worker's SDK.
const NAME_BY_WORKER: &str = "lk.agent.name";
const STATE: &str = "lk.agent.state";
/// An avatar's or another helper's: it speaks for the agent of that identity and isn't one itself.
const ON_BEHALF: &str = "lk.publish_on_behalf";

pub(crate) struct Roster {
    own_identity: String,
    agent_name: Option<String>,
    /// By session id: an identity may come back in another session.
    present: HashMap<String, Member>,
    /// The agent's session; it stays after the agent has left.
    agent: Option<String>,
    agent_state: Option<String>,
    agent_connected: bool,
}

struct Member {
    first_seen: Instant,
    in_join_response: bool,
    info: ParticipantInfo,
    role: Role,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// An agent whose name hasn't come yet, or anybody else.
    Other,
    Agent,
    Duplicate,
}

impl Roster {
    /// `agent_name`: the target's; `None` takes any agent.
    pub(crate) fn new(own_identity: String, agent_name: Option<String>) -> Self {
        Self {
            own_identity,
            agent_name,
            present: HashMap::new(),
            agent: None,
            agent_state: None,
            agent_connected: false,
        }
    }

    /// The server may give us another identity than we asked for.
    pub(crate) fn we_are(&mut self, identity: String) {
        self.own_identity = identity;
    }

    pub(crate) fn is_own(&self, identity: &str) -> bool {
        identity == self.own_identity
    }

    /// Takes in what the server says of participants: in its join response, or in an update.
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
                events.extend(self.leave(at, &info));
            } else {
                self.sight(at, info, in_join_response, &mut events);
            }
        }
        events
    }

    /// Whether the agent has been seen.
    pub(crate) fn knows_agent(&self) -> bool {
        self.agent.is_some()
    }

    /// The tracks that carry the agent's voice: of the agent itself or of who publishes on its behalf.
    ///
    /// The server tells of an agent that publishes nothing up to three seconds after it told of its avatar. Until then
    /// whoever speaks for somebody may speak for the agent.
    pub(crate) fn voice(&self) -> impl Iterator<Item = &str> {
        let agent = self.agent.as_ref().and_then(|sid| self.present.get(sid));
        let identity = agent.map(|agent| agent.info.identity.as_str());
        let speaks = move |member: &&Member| {
            let on_behalf = attribute(&member.info, ON_BEHALF);
            let for_agent = on_behalf == identity || !self.knows_agent();
            member.role == Role::Agent || on_behalf.is_some() && for_agent
        };
        let tracks = self.present.values().filter(speaks);
        tracks
            .flat_map(|member| &member.info.tracks)
            .filter(|track| is_voice(track))
            .map(|track| track.sid.as_str())
    }

    fn sight(
        &mut self,
        at: Instant,
        info: ParticipantInfo,
        in_join_response: bool,
        events: &mut Vec<RoomEvent>,
    ) {
        let sid = info.sid.clone();
        let room_left = self.present.len() < MOST_PARTICIPANTS;
        let (member, first) = match self.present.entry(sid.clone()) {
            Entry::Occupied(known) => {
                let member = known.into_mut();
                if info.version < member.info.version {
                    return;
                }
                member.info = info;
                (member, false)
            }
            Entry::Vacant(free) if room_left => (
                free.insert(Member {
                    first_seen: at,
                    in_join_response,
                    info,
                    role: Role::Other,
                }),
                true,
            ),
            Entry::Vacant(_) => return,
        };
        if member.role == Role::Other {
            let (first_seen, in_join_response) = (member.first_seen, member.in_join_response);
            let agent = is_agent(&member.info, self.agent_name.as_deref());
            let seen = if agent {
                self.assign(&sid, in_join_response)
            } else if first {
                Some(other(&member.info))
            } else {
                None
            };
            // A name that comes late names somebody who was there before.
            events.extend(seen.map(|seen| RoomEvent {
                at: first_seen,
                seen,
            }));
        }
        events.extend(self.connection(at, &sid));
        events.extend(self.state_change(at, &sid));
    }

    /// An agent of the target's name: the first is the agent, a second beside it a duplicate, and one after it has left
    /// a stray.
    fn assign(&mut self, sid: &str, in_join_response: bool) -> Option<Seen> {
        let identity = self.present[sid].info.identity.clone();
        let current = self.agent.as_ref().and_then(|it| self.present.get_mut(it));
        match (&self.agent, current) {
            // The same agent in a new session; the server tells of the old one's end, if at all, only afterwards.
            (Some(_), Some(current)) if current.info.identity == identity => {
                current.role = Role::Duplicate;
                self.agent = Some(sid.to_owned());
                self.member(sid)?.role = Role::Agent;
                None
            }
            (Some(_), Some(_)) => {
                self.member(sid)?.role = Role::Duplicate;
                Some(Seen::AgentDuplicate { identity })
            }
            (Some(_), None) => {
                let member = self.member(sid)?;
                member.role = Role::Duplicate;
                Some(other(&member.info))
            }
            (None, _) => {
                self.agent = Some(sid.to_owned());
                let member = self.member(sid)?;
                member.role = Role::Agent;
                Some(Seen::AgentJoined {
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
            seen: Seen::AgentConnected,
        })
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
            seen: Seen::AgentState(state),
        })
    }

    fn leave(&mut self, at: Instant, info: &ParticipantInfo) -> Option<RoomEvent> {
        let member = self.present.remove(&info.sid)?;
        (member.role == Role::Agent).then(|| RoomEvent {
            at,
            seen: Seen::AgentLeft {
                reason: reason(info.disconnect_reason),
            },
        })
    }
}

/// The protocol's own name of a disconnect reason.
pub(crate) fn reason(number: i32) -> String {
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

fn agent_name(info: &ParticipantInfo) -> Option<&str> {
    attribute(info, NAME_BY_SERVER).or_else(|| attribute(info, NAME_BY_WORKER))
}

/// The server sends a removed attribute as an empty one.
fn attribute<'a>(info: &'a ParticipantInfo, key: &str) -> Option<&'a str> {
    let value = info.attributes.get(key).map(String::as_str);
    value.filter(|value| !value.is_empty())
}

/// Background sound comes as a track of another source.
fn is_voice(track: &TrackInfo) -> bool {
    track.r#type() == TrackType::Audio && track.source() == TrackSource::Microphone
}

fn other(info: &ParticipantInfo) -> Seen {
    Seen::OtherJoined {
        identity: info.identity.clone(),
        kind: info.kind().as_str_name().to_owned(),
        agent_name: agent_name(info).map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn participant(sid: &str, kind: Kind, attributes: &[(&str, &str)]) -> ParticipantInfo {
        ParticipantInfo {
            sid: sid.to_owned(),
            identity: format!("identity-{sid}"),
            state: State::Joined.into(),
            kind: kind.into(),
            attributes: attributes
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..ParticipantInfo::default()
        }
    }

    fn agent(sid: &str) -> ParticipantInfo {
        participant(sid, Kind::Agent, &[(NAME_BY_SERVER, "support")])
    }

    fn track(sid: &str, source: TrackSource) -> TrackInfo {
        TrackInfo {
            sid: sid.to_owned(),
            r#type: TrackType::Audio.into(),
            source: source.into(),
            ..TrackInfo::default()
        }
    }

    fn gone(mut info: ParticipantInfo, reason: DisconnectReason) -> ParticipantInfo {
        info.state = State::Disconnected.into();
        info.disconnect_reason = reason.into();
        info.version += 1;
        info
    }

    struct Room {
        roster: Roster,
        start: Instant,
        millis: u64,
    }

    impl Room {
        fn new(agent_name: Option<&str>) -> Self {
            Self {
                roster: Roster::new("me".to_owned(), agent_name.map(str::to_owned)),
                start: Instant::now(),
                millis: 0,
            }
        }

        /// One update a millisecond; each event with the millisecond it is stamped with.
        fn update(&mut self, info: ParticipantInfo) -> Vec<(u64, String)> {
            self.millis += 1;
            let now = self.start + Duration::from_millis(self.millis);
            let events = self.roster.update(now, vec![info], false);
            let told = events.into_iter().map(|event| {
                let at = event.at.duration_since(self.start).as_millis();
                let what = match event.seen {
                    Seen::AgentJoined { agent, .. } => format!("agent {}", agent.sid),
                    Seen::AgentDuplicate { identity } => format!("duplicate {identity}"),
                    Seen::AgentLeft { reason } => format!("left {reason}"),
                    Seen::AgentState(state) => format!("state {state}"),
                    Seen::OtherJoined {
                        identity,
                        kind,
                        agent_name,
                    } => format!("other {identity} {kind} {agent_name:?}"),
                    seen => format!("{seen:?}"),
                };
                (u64::try_from(at).unwrap(), what)
            });
            told.collect()
        }

        fn voice(&self) -> Vec<&str> {
            let mut voice: Vec<_> = self.roster.voice().collect();
            voice.sort_unstable();
            voice
        }
    }

    fn told(at: u64, what: &str) -> Vec<(u64, String)> {
        vec![(at, what.to_owned())]
    }

    #[test]
    fn agent_of_the_name_is_seen_once_and_leaves_once() {
        let mut room = Room::new(Some("support"));
        assert_eq!(room.update(agent("PA_1")), told(1, "agent PA_1"));
        assert_eq!(room.update(agent("PA_1")), []);
        let gone = gone(agent("PA_1"), DisconnectReason::ConnectionTimeout);
        assert_eq!(
            room.update(gone.clone()),
            told(3, "left CONNECTION_TIMEOUT")
        );
        assert_eq!(room.update(gone), []);
    }

    #[test]
    fn agent_is_connected_once_the_server_calls_it_active() {
        let active = |mut info: ParticipantInfo| {
            info.state = State::Active.into();
            info
        };
        let mut room = Room::new(Some("support"));
        let stray = participant("PA_0", Kind::Agent, &[(NAME_BY_SERVER, "billing")]);
        let other = room.update(active(stray));
        assert!(other[0].1.starts_with("other"), "{other:?}");
        assert_eq!(room.update(agent("PA_1")), told(2, "agent PA_1"));
        assert_eq!(
            room.update(active(agent("PA_1"))),
            told(3, "AgentConnected")
        );
        assert_eq!(room.update(active(agent("PA_1"))), []);
    }

    #[test]
    fn agent_in_the_join_response_is_marked() {
        let mut room = Room::new(None);
        let events = room.roster.update(room.start, vec![agent("PA_1")], true);
        assert!(matches!(
            &events[..],
            [RoomEvent {
                seen: Seen::AgentJoined {
                    in_join_response: true,
                    ..
                },
                ..
            }]
        ));
    }

    #[test]
    fn either_name_attribute_will_do() {
        for key in [NAME_BY_SERVER, NAME_BY_WORKER] {
            let mut room = Room::new(Some("support"));
            let info = participant("PA_1", Kind::Agent, &[(key, "support")]);
            assert_eq!(room.update(info), told(1, "agent PA_1"));
        }
    }

    #[test]
    fn another_name_another_kind_and_a_helper_are_strays() {
        let mut room = Room::new(Some("support"));
        let sales = participant("PA_1", Kind::Agent, &[(NAME_BY_SERVER, "sales")]);
        let person = participant("PA_2", Kind::Standard, &[(NAME_BY_SERVER, "support")]);
        let avatar = participant(
            "PA_3",
            Kind::Agent,
            &[(NAME_BY_SERVER, "support"), (ON_BEHALF, "identity-PA_9")],
        );
        assert_eq!(
            room.update(sales),
            told(1, "other identity-PA_1 AGENT Some(\"sales\")")
        );
        assert_eq!(
            room.update(person),
            told(2, "other identity-PA_2 STANDARD Some(\"support\")")
        );
        assert_eq!(
            room.update(avatar),
            told(3, "other identity-PA_3 AGENT Some(\"support\")")
        );
        assert_eq!(room.voice(), [""; 0]);
    }

    #[test]
    fn we_ourselves_are_nobody() {
        let mut room = Room::new(None);
        let mut me = agent("PA_1");
        me.identity = "me".to_owned();
        assert_eq!(room.update(me), []);
    }

    #[test]
    fn name_that_comes_late_dates_the_agent_back_to_its_first_sight() {
        let mut room = Room::new(Some("support"));
        let unnamed = participant("PA_1", Kind::Agent, &[]);
        assert_eq!(
            room.update(unnamed),
            told(1, "other identity-PA_1 AGENT None")
        );
        let named = participant(
            "PA_1",
            Kind::Agent,
            &[(NAME_BY_WORKER, "support"), (STATE, "listening")],
        );
        assert_eq!(
            room.update(named),
            [
                (1, "agent PA_1".to_owned()),
                (2, "state listening".to_owned())
            ]
        );
    }

    #[test]
    fn second_agent_beside_the_first_is_a_duplicate_and_after_it_a_stray() {
        let mut room = Room::new(Some("support"));
        room.update(agent("PA_1"));
        assert_eq!(
            room.update(agent("PA_2")),
            told(2, "duplicate identity-PA_2")
        );
        assert_eq!(room.update(agent("PA_2")), []);
        room.update(gone(agent("PA_1"), DisconnectReason::ClientInitiated));
        assert_eq!(
            room.update(agent("PA_3")),
            told(5, "other identity-PA_3 AGENT Some(\"support\")")
        );
    }

    #[test]
    fn same_agent_in_a_new_session_is_no_duplicate_and_its_old_session_ends_unnoticed() {
        let mut room = Room::new(Some("support"));
        let old = agent("PA_1");
        let mut new = agent("PA_2");
        new.identity.clone_from(&old.identity);
        new.tracks = vec![track("TR_2", TrackSource::Microphone)];
        room.update(old.clone());
        assert_eq!(room.update(new.clone()), []);
        assert_eq!(
            room.update(gone(old, DisconnectReason::DuplicateIdentity)),
            []
        );
        assert_eq!(room.voice(), ["TR_2"]);
        let gone = gone(new, DisconnectReason::ClientInitiated);
        assert_eq!(room.update(gone), told(4, "left CLIENT_INITIATED"));
    }

    #[test]
    fn state_is_told_when_it_changes() {
        let mut room = Room::new(None);
        let with_state = |state: &str| participant("PA_1", Kind::Agent, &[(STATE, state)]);
        room.update(agent("PA_1"));
        assert_eq!(
            room.update(with_state("initializing")),
            told(2, "state initializing")
        );
        assert_eq!(room.update(with_state("initializing")), []);
        assert_eq!(
            room.update(with_state("speaking")),
            told(4, "state speaking")
        );
        let other = participant("PA_2", Kind::Standard, &[(STATE, "listening")]);
        let events = room.update(other);
        assert!(events.iter().all(|(_, what)| !what.starts_with("state")));
    }

    #[test]
    fn stale_update_changes_nothing() {
        let mut room = Room::new(None);
        let mut fresh = agent("PA_1");
        fresh.version = 5;
        fresh.tracks = vec![track("TR_1", TrackSource::Microphone)];
        room.update(fresh);
        let mut stale = agent("PA_1");
        stale.version = 4;
        room.update(stale);
        assert_eq!(room.voice(), ["TR_1"]);
    }

    #[test]
    fn voice_is_the_microphone_and_not_the_background() {
        let mut room = Room::new(None);
        let mut info = agent("PA_1");
        info.tracks = vec![
            track("TR_background", TrackSource::Unknown),
            track("TR_voice", TrackSource::Microphone),
        ];
        room.update(info.clone());
        assert_eq!(room.voice(), ["TR_voice"]);
        info.tracks.truncate(1);
        room.update(info.clone());
        assert_eq!(room.voice(), [""; 0]);
        info.tracks.push(track("TR_again", TrackSource::Microphone));
        room.update(info);
        assert_eq!(room.voice(), ["TR_again"]);
    }

    #[test]
    fn avatar_speaks_for_its_agent() {
        let mut room = Room::new(None);
        let mut avatar = participant("PA_2", Kind::Agent, &[(ON_BEHALF, "identity-PA_1")]);
        avatar.tracks = vec![track("TR_avatar", TrackSource::Microphone)];
        room.update(avatar);
        // Nobody knows yet for whom.
        assert_eq!(room.voice(), ["TR_avatar"]);
        assert!(!room.roster.knows_agent());
        room.update(agent("PA_1"));
        assert_eq!(room.voice(), ["TR_avatar"]);
        assert!(room.roster.knows_agent());
    }

    #[test]
    fn avatar_of_another_agent_is_no_voice_once_the_agent_is_known() {
        let mut room = Room::new(Some("support"));
        let mut avatar = participant("PA_2", Kind::Agent, &[(ON_BEHALF, "identity-PA_9")]);
        avatar.tracks = vec![track("TR_avatar", TrackSource::Microphone)];
        room.update(avatar);
        assert_eq!(room.voice(), ["TR_avatar"]);
        room.update(agent("PA_1"));
        assert_eq!(room.voice(), [""; 0]);
    }

    #[test]
    fn crowd_is_kept_in_mind_only_up_to_a_bound() {
        let mut room = Room::new(Some("support"));
        for i in 0..1_000 {
            room.update(participant(&format!("PA_{i}"), Kind::Standard, &[]));
        }
        assert_eq!(room.roster.present.len(), MOST_PARTICIPANTS);
    }
}
