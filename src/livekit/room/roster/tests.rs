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

struct RosterRoom {
    roster: Roster,
    start: Instant,
    millis: u64,
}

impl RosterRoom {
    fn new(agent_name: Option<&str>) -> Self {
        Self {
            roster: Roster::new("me".to_owned(), agent_name.map(str::to_owned)),
            start: Instant::now(),
            millis: 0,
        }
    }

    /// Sends one update, one millisecond after the last; returns each event with the millisecond of its timestamp.
    fn update(&mut self, info: ParticipantInfo) -> Vec<(u64, String)> {
        self.millis += 1;
        let now = self.start + Duration::from_millis(self.millis);
        let events = self.roster.update(now, vec![info], false);
        let described = events.into_iter().map(|event| {
            let at = event.at.duration_since(self.start).as_millis();
            let what = match event.kind {
                RoomEventKind::AgentJoined { agent, .. } => format!("agent {}", agent.sid),
                RoomEventKind::AgentDuplicate { identity } => format!("duplicate {identity}"),
                RoomEventKind::AgentLeft { reason } => format!("left {reason}"),
                RoomEventKind::AgentState(state) => format!("state {state}"),
                RoomEventKind::OtherJoined {
                    identity,
                    kind,
                    agent_name,
                } => format!("other {identity} {kind} {agent_name:?}"),
                other => format!("{other:?}"),
            };
            (u64::try_from(at).unwrap(), what)
        });
        described.collect()
    }

    fn voice(&self) -> Vec<&str> {
        let mut voice: Vec<_> = self.roster.voice().collect();
        voice.sort_unstable();
        voice
    }
}

fn event(at: u64, what: &str) -> Vec<(u64, String)> {
    vec![(at, what.to_owned())]
}

#[test]
fn agent_with_the_targets_name_joins_once_and_leaves_once() {
    let mut room = RosterRoom::new(Some("support"));
    assert_eq!(room.update(agent("PA_1")), event(1, "agent PA_1"));
    assert_eq!(room.update(agent("PA_1")), []);
    let gone = gone(agent("PA_1"), DisconnectReason::ConnectionTimeout);
    assert_eq!(
        room.update(gone.clone()),
        event(3, "left CONNECTION_TIMEOUT")
    );
    assert_eq!(room.update(gone), []);
}

#[test]
fn agent_is_connected_when_its_state_is_active() {
    let active = |mut info: ParticipantInfo| {
        info.state = State::Active.into();
        info
    };
    let mut room = RosterRoom::new(Some("support"));
    let stray = participant("PA_0", Kind::Agent, &[(NAME_BY_SERVER, "billing")]);
    let other = room.update(active(stray));
    assert!(other[0].1.starts_with("other"), "{other:?}");
    assert_eq!(room.update(agent("PA_1")), event(2, "agent PA_1"));
    assert_eq!(
        room.update(active(agent("PA_1"))),
        event(3, "AgentConnected")
    );
    assert_eq!(room.update(active(agent("PA_1"))), []);
}

#[test]
fn agent_in_the_join_response_is_reported_as_such() {
    let mut room = RosterRoom::new(None);
    let events = room.roster.update(room.start, vec![agent("PA_1")], true);
    assert!(matches!(
        &events[..],
        [RoomEvent {
            kind: RoomEventKind::AgentJoined {
                in_join_response: true,
                ..
            },
            ..
        }]
    ));
}

#[test]
fn either_name_attribute_identifies_the_agent() {
    for key in [NAME_BY_SERVER, NAME_BY_WORKER] {
        let mut room = RosterRoom::new(Some("support"));
        let info = participant("PA_1", Kind::Agent, &[(key, "support")]);
        assert_eq!(room.update(info), event(1, "agent PA_1"));
    }
}

#[test]
fn another_name_another_kind_or_a_helper_is_not_the_agent() {
    let mut room = RosterRoom::new(Some("support"));
    let sales = participant("PA_1", Kind::Agent, &[(NAME_BY_SERVER, "sales")]);
    let person = participant("PA_2", Kind::Standard, &[(NAME_BY_SERVER, "support")]);
    let avatar = participant(
        "PA_3",
        Kind::Agent,
        &[(NAME_BY_SERVER, "support"), (ON_BEHALF, "identity-PA_9")],
    );
    assert_eq!(
        room.update(sales),
        event(1, "other identity-PA_1 AGENT Some(\"sales\")")
    );
    assert_eq!(
        room.update(person),
        event(2, "other identity-PA_2 STANDARD Some(\"support\")")
    );
    assert_eq!(
        room.update(avatar),
        event(3, "other identity-PA_3 AGENT Some(\"support\")")
    );
    assert_eq!(room.voice(), [""; 0]);
}

#[test]
fn own_participant_gives_no_event() {
    let mut room = RosterRoom::new(None);
    let mut me = agent("PA_1");
    me.identity = "me".to_owned();
    assert_eq!(room.update(me), []);
}

#[test]
fn agent_whose_name_arrives_late_joined_when_it_was_first_seen() {
    let mut room = RosterRoom::new(Some("support"));
    let unnamed = participant("PA_1", Kind::Agent, &[]);
    assert_eq!(
        room.update(unnamed),
        event(1, "other identity-PA_1 AGENT None")
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
fn second_agent_is_a_duplicate_and_a_later_one_is_another_participant() {
    let mut room = RosterRoom::new(Some("support"));
    room.update(agent("PA_1"));
    assert_eq!(
        room.update(agent("PA_2")),
        event(2, "duplicate identity-PA_2")
    );
    assert_eq!(room.update(agent("PA_2")), []);
    room.update(gone(agent("PA_1"), DisconnectReason::ClientInitiated));
    assert_eq!(
        room.update(agent("PA_3")),
        event(5, "other identity-PA_3 AGENT Some(\"support\")")
    );
}

#[test]
fn same_agent_in_a_new_session_is_no_duplicate_and_the_end_of_the_old_one_is_ignored() {
    let mut room = RosterRoom::new(Some("support"));
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
    assert_eq!(room.update(gone), event(4, "left CLIENT_INITIATED"));
}

#[test]
fn state_is_reported_when_it_changes() {
    let mut room = RosterRoom::new(None);
    let with_state = |state: &str| participant("PA_1", Kind::Agent, &[(STATE, state)]);
    room.update(agent("PA_1"));
    assert_eq!(
        room.update(with_state("initializing")),
        event(2, "state initializing")
    );
    assert_eq!(room.update(with_state("initializing")), []);
    assert_eq!(
        room.update(with_state("speaking")),
        event(4, "state speaking")
    );
    let other = participant("PA_2", Kind::Standard, &[(STATE, "listening")]);
    let events = room.update(other);
    assert!(events.iter().all(|(_, what)| !what.starts_with("state")));
}

#[test]
fn stale_update_changes_nothing() {
    let mut room = RosterRoom::new(None);
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
fn voice_is_the_microphone_track_and_not_the_background_track() {
    let mut room = RosterRoom::new(None);
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
fn audio_of_another_source_is_the_voice_only_of_an_agent_without_a_microphone() {
    let mut room = RosterRoom::new(None);
    let mut info = agent("PA_1");
    let background = TrackInfo {
        name: BACKGROUND_TRACK.to_owned(),
        ..track("TR_background", TrackSource::Unknown)
    };
    info.tracks = vec![background];
    room.update(info.clone());
    assert_eq!(room.voice(), [""; 0]);
    info.tracks.push(track("TR_plain", TrackSource::Unknown));
    room.update(info.clone());
    assert_eq!(room.voice(), ["TR_plain"]);
    assert_eq!(room.roster.unusual_source("TR_plain"), Some("UNKNOWN"));
    info.tracks.push(track("TR_voice", TrackSource::Microphone));
    room.update(info.clone());
    assert_eq!(room.voice(), ["TR_voice"]);
    assert_eq!(room.roster.unusual_source("TR_voice"), None);
    // A session that restarts its voice leaves its other sounds alone.
    info.tracks.pop();
    room.update(info);
    assert_eq!(room.voice(), [""; 0]);
}

#[test]
fn encrypted_audio_is_no_voice_and_is_reported_once() {
    let mut room = RosterRoom::new(Some("support"));
    let encrypted = |sid| TrackInfo {
        encryption: encryption::Type::Gcm.into(),
        ..track(sid, TrackSource::Microphone)
    };
    let mut reported = |info: &ParticipantInfo| {
        room.update(info.clone());
        let changes = room.roster.changes().into_iter();
        let methods = changes.filter_map(|kind| match kind {
            RoomEventKind::AgentEncrypted(method) => Some(method),
            _ => None,
        });
        (methods.collect::<Vec<_>>(), room.voice().len())
    };
    let mut other = participant("PA_0", Kind::Standard, &[]);
    other.tracks = vec![encrypted("TR_0")];
    assert_eq!(reported(&other), (vec![], 0));
    let mut info = agent("PA_1");
    info.tracks = vec![encrypted("TR_1")];
    assert_eq!(reported(&info), (vec!["GCM"], 0));
    assert_eq!(reported(&info), (vec![], 0));
    // Audio that can be heard is heard.
    info.tracks.push(track("TR_2", TrackSource::Microphone));
    assert_eq!(reported(&info), (vec![], 1));
}

#[test]
fn track_is_reported_when_it_is_new_and_when_it_changes() {
    let mut room = RosterRoom::new(None);
    let mut changes = |info: &ParticipantInfo| {
        room.update(info.clone());
        let changes = room.roster.changes();
        let changes = changes.into_iter().map(|kind| match kind {
            RoomEventKind::TrackChanged(track) => track,
            other => panic!("{other:?}"),
        });
        changes.collect::<Vec<_>>()
    };
    let mut info = agent("PA_1");
    info.tracks = vec![track("TR_1", TrackSource::Microphone)];
    let expected = RemoteTrackInfo {
        sid: "TR_1".to_owned(),
        identity: "identity-PA_1".to_owned(),
        kind: "AUDIO",
        source: "MICROPHONE",
        name: String::new(),
        muted: false,
        encryption: "NONE",
    };
    assert_eq!(changes(&info), std::slice::from_ref(&expected));
    assert_eq!(changes(&info), []);
    info.tracks[0].muted = true;
    let muted = RemoteTrackInfo {
        muted: true,
        ..expected
    };
    assert_eq!(changes(&info), [muted]);
    let many = 0..1_000;
    info.tracks = many
        .map(|number| track(&format!("TR_{number}"), TrackSource::Unknown))
        .collect();
    assert!(changes(&info).len() <= MAX_TRACKS);
}

#[test]
fn avatar_speaks_for_its_agent() {
    let mut room = RosterRoom::new(None);
    let mut avatar = participant("PA_2", Kind::Agent, &[(ON_BEHALF, "identity-PA_1")]);
    avatar.tracks = vec![track("TR_avatar", TrackSource::Microphone)];
    room.update(avatar);
    // The agent is not known yet, so the avatar may speak for it.
    assert_eq!(room.voice(), ["TR_avatar"]);
    assert!(!room.roster.knows_agent());
    room.update(agent("PA_1"));
    assert_eq!(room.voice(), ["TR_avatar"]);
    assert!(room.roster.knows_agent());
}

#[test]
fn avatar_of_another_agent_is_not_the_voice_once_the_agent_is_known() {
    let mut room = RosterRoom::new(Some("support"));
    let mut avatar = participant("PA_2", Kind::Agent, &[(ON_BEHALF, "identity-PA_9")]);
    avatar.tracks = vec![track("TR_avatar", TrackSource::Microphone)];
    room.update(avatar);
    assert_eq!(room.voice(), ["TR_avatar"]);
    room.update(agent("PA_1"));
    assert_eq!(room.voice(), [""; 0]);
}

#[test]
fn number_of_remembered_participants_is_bounded() {
    let mut room = RosterRoom::new(Some("support"));
    for i in 0..1_000 {
        room.update(participant(&format!("PA_{i}"), Kind::Standard, &[]));
    }
    assert_eq!(room.roster.present.len(), MAX_PARTICIPANTS);
}

#[test]
fn agent_without_a_name_is_the_agent_once_it_is_adopted() {
    let mut room = RosterRoom::new(Some("support"));
    let mut info = participant("PA_1", Kind::Agent, &[(STATE, "listening")]);
    info.tracks = vec![track("TR_1", TrackSource::Microphone)];
    let other = event(1, "other identity-PA_1 AGENT None");
    assert_eq!(room.update(info.clone()), other);
    // It may be the agent, so its sound is kept.
    assert_eq!(room.voice(), ["TR_1"]);
    let nameless = |room: &mut RosterRoom| {
        let changes = room.roster.changes().into_iter();
        let named = changes.filter(|kind| matches!(kind, RoomEventKind::NamelessAgent { .. }));
        named.count()
    };
    assert_eq!(nameless(&mut room), 1);
    assert_eq!(nameless(&mut room), 0);
    let at = room.start + Duration::from_secs(1);
    assert!(room.roster.adopt(at, "identity-PA_9").is_empty());
    let events = room.roster.adopt(at, "identity-PA_1");
    assert!(
        matches!(
            &events[..],
            [
                RoomEvent {
                    kind: RoomEventKind::AgentJoined { .. },
                    ..
                },
                RoomEvent {
                    kind: RoomEventKind::AgentState(_),
                    ..
                },
            ]
        ),
        "{events:?}"
    );
    // It joined when it was first seen.
    assert_eq!(events[0].at, room.start + Duration::from_millis(1));
    assert_eq!(room.voice(), ["TR_1"]);
    assert!(room.roster.adopt(at, "identity-PA_1").is_empty());
    let gone = gone(info, DisconnectReason::ClientInitiated);
    assert_eq!(room.update(gone), event(2, "left CLIENT_INITIATED"));
}

#[test]
fn agent_with_another_name_or_a_helper_cannot_be_adopted() {
    let mut room = RosterRoom::new(Some("support"));
    room.update(participant(
        "PA_1",
        Kind::Agent,
        &[(NAME_BY_SERVER, "sales")],
    ));
    room.update(participant(
        "PA_2",
        Kind::Agent,
        &[(ON_BEHALF, "identity-PA_9")],
    ));
    room.update(participant("PA_3", Kind::Standard, &[]));
    assert!(room.roster.changes().is_empty());
    for identity in ["identity-PA_1", "identity-PA_2", "identity-PA_3"] {
        assert!(room.roster.adopt(room.start, identity).is_empty());
    }
}

#[test]
fn version_that_the_agent_reports_is_emitted_once_per_change_and_never_that_of_another() {
    let mut room = RosterRoom::new(Some("support"));
    let with_version = |sid: &str, name: &str, version: &str| {
        let attributes = [(NAME_BY_SERVER, name), (AGENT_VERSION, version)];
        participant(sid, Kind::Agent, &attributes)
    };
    let version = |events: Vec<(u64, String)>| {
        let mut versions = events.into_iter().map(|(_, what)| what);
        versions.find(|what| what.starts_with("AgentVersion"))
    };
    let other = with_version("PA_0", "billing", "9.9.9");
    assert_eq!(version(room.update(other)), None);
    assert_eq!(version(room.update(agent("PA_1"))), None);
    let first = room.update(with_version("PA_1", "support", "1.4.0"));
    assert_eq!(version(first).as_deref(), Some("AgentVersion(\"1.4.0\")"));
    let same = room.update(with_version("PA_1", "support", "1.4.0"));
    assert_eq!(version(same), None);
}
