//! A batch for the tests of its renderings: one room is ok, and the others failed for different reasons.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio::time::Instant;

use crate::config::{Backoff, Budget, Ice, Project};
use crate::livekit::RoomName;
use crate::livekit::event::TranscriptText;
use crate::livekit::event::{Agent, AudioStats, MediaConnection, MediaPath, Speaker, TurnMetrics};
use crate::probe::{
    AgentTurn, Circumstances, Evidence, Failure, LimitKind, Milestone, Outcome, Position,
    ProbeReport, Reason, SessionEntry, Timeline, TranscriptLine, Turn, TurnResult, TurnStages,
};
use crate::recording::{SavedRecording, SavedTrack, Waveform};
use crate::report::{BatchReport, NotOpened, Purpose};

fn start_of_day() -> DateTime<Utc> {
    DateTime::from_timestamp(1_790_000_000, 123_456_000).expect("a time that chrono knows")
}

pub(crate) fn project() -> Project {
    Project {
        url: "wss://acme.livekit.cloud".parse().unwrap(),
        api_key: "key".into(),
        api_secret: "secret".to_owned().into(),
        credential_files: crate::config::CredentialFiles::default(),
        ca_file: None,
        cloud_project: Some("p_acme".to_owned()),
        ice: Ice::default(),
        api_timeout: Project::DEFAULT_API_TIMEOUT,
        max_rooms: Project::DEFAULT_MAX_ROOMS,
        budget: Budget::default(),
        backoff: Backoff::default(),
    }
}

pub(crate) fn failed(reason: Reason, detail: &str) -> Outcome {
    Outcome::Failed(Failure {
        reason,
        detail: detail.to_owned(),
    })
}

/// Both documents have the same keys in the same order. Only the first element of an array counts; the example may have an
/// empty one.
pub(crate) fn assert_same_keys(example: &Value, real: &Value, path: &str) {
    match (example, real) {
        (Value::Object(example), Value::Object(real)) => {
            let keys =
                |map: &serde_json::Map<String, Value>| map.keys().cloned().collect::<Vec<_>>();
            assert_eq!(keys(example), keys(real), "at {path}");
            for (key, value) in example {
                assert_same_keys(value, &real[key], &format!("{path}.{key}"));
            }
        }
        (Value::Array(example), Value::Array(real)) if !example.is_empty() => {
            assert_same_keys(&example[0], &real[0], &format!("{path}[]"));
        }
        _ => {}
    }
}

/// One room; `marks` are milliseconds since its start.
pub(crate) fn probe(
    number: u8,
    outcome: Outcome,
    evidence: Evidence,
    marks: &[(Milestone, u64)],
) -> ProbeReport {
    let base = Instant::now();
    let at = |millis| base + Duration::from_millis(millis);
    let mut timeline = Timeline::default();
    timeline.mark(Milestone::Started, base);
    for (milestone, millis) in marks {
        timeline.mark(*milestone, at(*millis));
    }
    let spoke = timeline.get(Milestone::AgentSpoke).is_some();
    let turn = Turn {
        agent_started: Some(at(1000)),
        agent_ended: Some(at(3000)),
        caller_started: Some(at(4000)),
        caller_ended: Some(at(6000)),
        replied: Some(at(7250)),
        reply_ended: Some(at(9000)),
        result: TurnResult::Answered,
        confirmed: Some(true),
        stages: TurnStages {
            end_of_turn: Some(Duration::from_millis(600)),
            end_to_end: Some(Duration::from_millis(1100)),
            ..TurnStages::default()
        },
        word_error: Some(0.0),
        ..Turn::default()
    };
    ProbeReport {
        started_at: start_of_day() + Duration::from_secs(u64::from(number)),
        room: RoomName(format!("canary-0a1b2-{number:x}c3d4e5f6g7h8")),
        room_sid: Some(format!("RM_{number}")),
        position: if number == 1 {
            Position::First
        } else {
            Position::Later
        },
        outcome,
        evidence,
        turns: if spoke { vec![turn] } else { Vec::new() },
        expects_reply: true,
        transcript: spoke.then(|| {
            vec![TranscriptLine {
                at: at(1100),
                speaker: Speaker::Agent,
                text: TranscriptText::new("Good day to you."),
                is_final: true,
            }]
        }),
        agent: timeline.get(Milestone::AgentJoined).map(|_| Agent {
            identity: "agent-AJ_1".to_owned(),
            sid: "PA_1".to_owned(),
            name: Some("my-agent".to_owned()),
            joined_at_ms: 1_790_000_000_645,
            joined: None,
        }),
        other_agents: 0,
        audio: AudioStats {
            packets: if spoke { 900 } else { 0 },
            lost: 0,
            jitter: spoke.then_some(Duration::from_micros(1250)),
        },
        circumstances: Circumstances {
            node: timeline
                .get(Milestone::SignalConnected)
                .map(|_| "ND_1".to_owned()),
            media_path: timeline
                .get(Milestone::MediaConnected)
                .map(|_| MediaPath::Udp),
            worker: timeline
                .get(Milestone::AgentJoined)
                .map(|_| "AW_1".to_owned()),
            ..Circumstances::default()
        },
        recording: spoke.then(|| {
            let track = |bytes| SavedTrack {
                bytes,
                duration: Duration::from_millis(15_950),
            };
            SavedRecording {
                started: at(30),
                agent: Some(track(61_000)),
                caller: Some(track(20_000)),
            }
        }),
        waveform: spoke.then(|| Waveform {
            started: at(30),
            step: Duration::from_millis(100),
            agent: Some(vec![0, 71, 84]),
            caller: None,
        }),
        timeline,
        join_upper_bound: false,
    }
}

pub(crate) fn batch(probes: Vec<ProbeReport>, not_opened: Option<NotOpened>) -> BatchReport {
    BatchReport {
        batch_id: "20260921T141320-0a1b2-c3d4".to_owned(),
        target: "support".to_owned(),
        purpose: Purpose::Scheduled,
        started_at: start_of_day(),
        ended_at: start_of_day() + Duration::from_secs(40),
        probes,
        not_opened,
    }
}

/// Every milestone of a room that went well.
pub(crate) const WELL: &[(Milestone, u64)] = &[
    (Milestone::RoomCreated, 12),
    (Milestone::SignalConnected, 40),
    (Milestone::MediaConnected, 180),
    (Milestone::CallerPublished, 150),
    (Milestone::DispatchSent, 181),
    (Milestone::DispatchAccepted, 190),
    (Milestone::AgentJoined, 693),
    (Milestone::AgentListening, 720),
    (Milestone::AgentTrackSubscribed, 730),
    (Milestone::AgentFirstAudio, 790),
    (Milestone::AgentSpoke, 1000),
    (Milestone::Left, 16_000),
    (Milestone::RoomDeleted, 16_020),
];

pub(crate) fn mixed() -> BatchReport {
    let no_show = Evidence {
        step: Some("agent_join"),
        deadline_seconds: Some(30.0),
        dispatches: Some(vec![
            "AD_1 for \"my-agent\": job AJ_1 JS_RUNNING".to_owned(),
        ]),
        participants: vec!["observer (STANDARD)".to_owned()],
        ..Evidence::default()
    };
    let limited = Evidence {
        step: Some("create_room"),
        http_status: Some(429),
        twirp_code: Some("resource_exhausted".to_owned()),
        answer: Some("slow\ndown\u{1b}[2J".to_owned()),
        retry_after_seconds: Some(7.0),
        ..Evidence::default()
    };
    let way_in = &WELL[..6];
    let failure = |reason, detail| failed(reason, detail);
    batch(
        vec![
            probe(
                1,
                Outcome::Ok,
                Evidence {
                    session: vec![SessionEntry {
                        at: 1.25,
                        event: "agent_state",
                        name: Some("listening".to_owned()),
                        is_error: None,
                    }],
                    agent_metrics: vec![AgentTurn {
                        at: 3.012_346,
                        metrics: TurnMetrics {
                            llm_ttft_seconds: Some(0.3),
                            llm_ttfs_seconds: Some(0.4),
                            llm_tokens_per_second: Some(61.5),
                            tts_ttfb_seconds: Some(0.2),
                            ..TurnMetrics::none(Speaker::Agent)
                        },
                    }],
                    media: vec![MediaConnection {
                        connection: "publisher",
                        path: MediaPath::Udp,
                        via: None,
                        round_trip_seconds: Some(0.018),
                    }],
                    speech_level_dbfs: Some(-21.4),
                    ..Evidence::default()
                },
                WELL,
            ),
            probe(
                2,
                failure(
                    Reason::AgentNoShow,
                    "a worker accepted the job, but no agent joined within 30s",
                ),
                no_show.clone(),
                way_in,
            ),
            probe(
                3,
                failure(
                    Reason::AgentNoShow,
                    "a worker accepted the job, but no agent joined within 30s",
                ),
                no_show,
                way_in,
            ),
            probe(
                4,
                failure(
                    Reason::PlanLimit(LimitKind::ApiRate),
                    "CreateRoom met a limit: HTTP 429",
                ),
                limited,
                &[],
            ),
        ],
        Some(NotOpened {
            rooms: 1,
            why: "plan limit reached".to_owned(),
            denial: None,
        }),
    )
}
