//! The result of a batch as JSON. Seconds are numbers, missing values are null; `docs/api.md` describes it.

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::BatchReport;
use crate::config::{Project, Target};
use crate::livekit::event::TranscriptText;
use crate::livekit::event::{Speaker, to_microseconds};
use crate::probe::{
    AgentStage, Circumstances, Evidence, Milestone, ProbeReport, Reason, Span, Turn,
};
use crate::recording::{SavedRecording, SavedTrack, Waveform};

#[derive(Serialize)]
struct BatchJson<'a> {
    batch_id: &'a str,
    target: &'a str,
    project: &'a str,
    purpose: &'static str,
    started_at: String,
    ended_at: String,
    result: &'static str,
    deployment: Option<&'a str>,
    ramp: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    probes: Option<Vec<ProbeJson<'a>>>,
    not_opened: Option<NotOpenedJson<'a>>,
    summary: SummaryJson,
}

#[derive(Serialize)]
struct NotOpenedJson<'a> {
    rooms: usize,
    why: &'a str,
}

#[derive(Serialize)]
struct ProbeJson<'a> {
    room: &'a str,
    room_sid: Option<&'a str>,
    started_at: String,
    position: &'static str,
    outcome: &'static str,
    reason: Option<&'static str>,
    origin: Option<&'static str>,
    limit: Option<&'static str>,
    detail: Option<&'a str>,
    evidence: &'a Evidence,
    join_delay_seconds: Option<f64>,
    join_upper_bound: bool,
    first_speech_delay_seconds: Option<f64>,
    reply_delay_seconds: Option<f64>,
    spans: OrderedObject,
    milestones: OrderedObject,
    turns: Vec<TurnJson<'a>>,
    transcript: Option<Vec<TranscriptLineJson<'a>>>,
    agent: Option<AgentJson<'a>>,
    circumstances: &'a Circumstances,
    audio: AudioJson,
    recording: Option<RecordingJson>,
    waveform: Option<WaveformJson>,
    url: Option<String>,
}

/// An object whose keys are in order of time.
struct OrderedObject(Vec<(&'static str, Option<f64>)>);

impl Serialize for OrderedObject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

/// Times are seconds since the probe's start.
#[derive(Serialize)]
struct TurnJson<'a> {
    agent_started: Option<f64>,
    agent_ended: Option<f64>,
    caller_started: Option<f64>,
    caller_ended: Option<f64>,
    replied: Option<f64>,
    reply_ended: Option<f64>,
    result: &'static str,
    /// The number of the script's line, from 1.
    line: Option<usize>,
    interrupts: bool,
    overlap: bool,
    confirmed: Option<bool>,
    reply_delay_seconds: Option<f64>,
    agent_claim_seconds: Option<f64>,
    unexplained_seconds: Option<f64>,
    yield_delay_seconds: Option<f64>,
    /// What the agent's session claims of each stage.
    stages: OrderedObject,
    word_error: Option<f64>,
    said: Option<&'a str>,
    heard: Option<&'a str>,
    reply_text: Option<&'a str>,
}

/// Seconds since the probe's start.
#[derive(Serialize)]
struct TranscriptLineJson<'a> {
    at: Option<f64>,
    speaker: Speaker,
    text: &'a str,
    r#final: bool,
}

#[derive(Serialize)]
struct AgentJson<'a> {
    identity: &'a str,
    name: Option<&'a str>,
    /// The server's own stamp in Unix milliseconds, by which a join delay can be checked.
    joined_at_ms: Option<i64>,
}

#[derive(Serialize)]
struct AudioJson {
    packets: u64,
    lost: u64,
    jitter_seconds: Option<f64>,
}

/// The files of a call. The history replaces it by null when they are deleted.
#[derive(Serialize)]
struct RecordingJson {
    /// Seconds since the probe's start.
    started: Option<f64>,
    agent: Option<RecordedTrackJson>,
    caller: Option<RecordedTrackJson>,
}

#[derive(Serialize)]
struct RecordedTrackJson {
    bytes: u64,
    seconds: f64,
}

#[derive(Serialize)]
struct WaveformJson {
    /// Seconds since the probe's start.
    started: Option<f64>,
    step_seconds: f64,
    agent: Option<Box<RawValue>>,
    caller: Option<Box<RawValue>>,
}

#[derive(Serialize)]
struct SummaryJson {
    ok: usize,
    failed: usize,
    aborted: usize,
    join_delay: JoinDelayJson,
}

#[derive(Serialize)]
struct JoinDelayJson {
    p50: Option<f64>,
    p90: Option<f64>,
    max: Option<f64>,
}

/// One JSON document, indented, with a newline at its end.
pub(crate) fn render(batch: &BatchReport, target: &Target, project: &Project) -> String {
    let probes = batch.probes.iter().map(|one| probe(one, project));
    let document = BatchJson {
        probes: Some(probes.collect()),
        ..without_probes(batch, target)
    };
    let mut text = serde_json::to_string_pretty(&document).expect(SERIALIZES);
    text.push('\n');
    text
}

/// The same document without its probes, on one line.
pub(crate) fn head(batch: &BatchReport, target: &Target) -> String {
    serde_json::to_string(&without_probes(batch, target)).expect(SERIALIZES)
}

/// One of its probes, on one line.
pub(crate) fn of_probe(report: &ProbeReport, project: &Project) -> String {
    serde_json::to_string(&probe(report, project)).expect(SERIALIZES)
}

const SERIALIZES: &str = "plain structs with string keys always serialize";

fn without_probes<'a>(batch: &'a BatchReport, target: &'a Target) -> BatchJson<'a> {
    let summary = batch.summary();
    let quantile = |of: fn(&super::Quantiles) -> Duration| {
        summary
            .join_delay
            .as_ref()
            .map(|delays| seconds(of(delays)))
    };
    BatchJson {
        batch_id: &batch.batch_id,
        target: &batch.target,
        project: &target.project,
        purpose: batch.purpose.label(),
        started_at: wall_clock(batch.started_at),
        ended_at: wall_clock(batch.ended_at),
        result: batch.result().label(),
        deployment: target.dispatch.named_deployment(),
        ramp: target.batch.ramp.name(),
        probes: None,
        not_opened: batch.not_opened.as_ref().map(|rest| NotOpenedJson {
            rooms: rest.rooms,
            why: &rest.why,
        }),
        summary: SummaryJson {
            ok: summary.ok,
            failed: summary.failed,
            aborted: summary.aborted,
            join_delay: JoinDelayJson {
                p50: quantile(|delays| delays.p50),
                p90: quantile(|delays| delays.p90),
                max: quantile(|delays| delays.max),
            },
        },
    }
}

fn probe<'a>(report: &'a ProbeReport, project: &Project) -> ProbeJson<'a> {
    let span = |span| report.timeline.span(span).map(seconds);
    let reply = report.turns.iter().find_map(Turn::reply_delay).map(seconds);
    let failure = report.outcome.failure();
    ProbeJson {
        room: &report.room.0,
        room_sid: report.room_sid.as_deref(),
        started_at: wall_clock(report.started_at),
        position: report.position.label(),
        outcome: report.outcome.label(),
        reason: failure.map(|failure| failure.reason.label()),
        origin: failure.map(|failure| failure.reason.origin().label()),
        limit: failure.and_then(|failure| match failure.reason {
            Reason::PlanLimit(kind) => Some(kind.label()),
            _ => None,
        }),
        detail: failure.map(|failure| failure.detail.as_str()),
        evidence: &report.evidence,
        join_delay_seconds: span(Span::AgentJoin),
        join_upper_bound: report.join_upper_bound,
        first_speech_delay_seconds: span(Span::FirstSpeech),
        reply_delay_seconds: reply,
        spans: OrderedObject(Vec::from(Span::ALL.map(|one| match one {
            Span::Reply => (one.label(), reply),
            _ => (one.label(), span(one)),
        }))),
        milestones: OrderedObject(Vec::from(
            Milestone::ALL
                .map(|one| (one.label(), report.timeline.since_started(one).map(seconds))),
        )),
        turns: report
            .turns
            .iter()
            .map(|turn| turn_json(report, turn))
            .collect(),
        transcript: report.transcript.as_ref().map(|lines| {
            let lines = lines.iter().map(|it| TranscriptLineJson {
                at: since_started(report, Some(it.at)),
                speaker: it.speaker,
                text: it.text.as_str(),
                r#final: it.is_final,
            });
            lines.collect()
        }),
        agent: report.agent.as_ref().map(|agent| AgentJson {
            identity: &agent.identity,
            name: agent.name.as_deref(),
            joined_at_ms: (agent.joined_at_ms > 0).then_some(agent.joined_at_ms),
        }),
        circumstances: &report.circumstances,
        audio: AudioJson {
            packets: report.audio.packets,
            lost: report.audio.lost,
            jitter_seconds: report.audio.jitter.map(seconds),
        },
        recording: report
            .recording
            .as_ref()
            .map(|recording| recording_json(report, recording)),
        waveform: report
            .waveform
            .as_ref()
            .map(|waveform| waveform_json(report, waveform)),
        url: session_url(report, project),
    }
}

fn recording_json(report: &ProbeReport, recording: &SavedRecording) -> RecordingJson {
    let track = |track: SavedTrack| RecordedTrackJson {
        bytes: track.bytes,
        seconds: seconds(track.duration),
    };
    RecordingJson {
        started: since_started(report, Some(recording.started)),
        agent: recording.agent.map(track),
        caller: recording.caller.map(track),
    }
}

fn waveform_json(report: &ProbeReport, waveform: &Waveform) -> WaveformJson {
    // On one line, in a document that is indented, too.
    let levels = |levels: &Option<Vec<u8>>| {
        let levels = levels.as_ref()?;
        Some(serde_json::value::to_raw_value(levels).expect(SERIALIZES))
    };
    WaveformJson {
        started: since_started(report, Some(waveform.started)),
        step_seconds: seconds(waveform.step),
        agent: levels(&waveform.agent),
        caller: levels(&waveform.caller),
    }
}

fn turn_json<'a>(report: &ProbeReport, turn: &'a Turn) -> TurnJson<'a> {
    let since = |at| since_started(report, at);
    let text = |text: &'a Option<TranscriptText>| text.as_ref().map(TranscriptText::as_str);
    let stage = |stage: AgentStage| (stage.label(), turn.stages.get(stage).map(seconds));
    TurnJson {
        agent_started: since(turn.agent_started),
        agent_ended: since(turn.agent_ended),
        caller_started: since(turn.caller_started),
        caller_ended: since(turn.caller_ended),
        replied: since(turn.replied),
        reply_ended: since(turn.reply_ended),
        result: turn.result.label(),
        line: turn.line.map(|line| line + 1),
        interrupts: turn.interrupts,
        overlap: turn.overlap,
        confirmed: turn.confirmed,
        reply_delay_seconds: turn.reply_delay().map(seconds),
        agent_claim_seconds: turn.stages.end_to_end.map(seconds),
        unexplained_seconds: turn.unexplained_seconds().map(to_microseconds),
        yield_delay_seconds: turn.yield_delay().map(seconds),
        stages: OrderedObject(AgentStage::ALL.into_iter().map(stage).collect()),
        word_error: turn.word_error.map(to_microseconds),
        said: text(&turn.said),
        heard: text(&turn.heard),
        reply_text: text(&turn.reply_text),
    }
}

fn since_started(report: &ProbeReport, at: Option<Instant>) -> Option<f64> {
    report.timeline.since_start(at?).map(seconds)
}

/// The page of this room's session in LiveKit Cloud, if the project is known. A room id comes from the server, so one that has
/// not LiveKit's form makes no link.
pub(crate) fn session_url(report: &ProbeReport, project: &Project) -> Option<String> {
    let cloud_project = project.cloud_project.as_ref()?;
    let well_formed = |sid: &&String| {
        sid.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    let room_sid = report.room_sid.as_ref().filter(well_formed)?;
    Some(format!(
        "https://cloud.livekit.io/projects/{cloud_project}/sessions/{room_sid}"
    ))
}

fn wall_clock(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

fn seconds(duration: Duration) -> f64 {
    to_microseconds(duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;
    use serde_json::Value;

    use super::super::sample::{
        WELL, assert_same_keys, batch, mixed, probe as sample_probe, project,
    };
    use super::*;
    use crate::config::Target;
    use crate::probe::Outcome;

    fn rendered(batch: &BatchReport) -> Value {
        serde_json::from_str(&render(batch, &Target::default(), &project())).unwrap()
    }

    #[test]
    fn document_has_the_shape_that_the_docs_show() {
        let docs = include_str!("../../docs/api.md");
        let (_, after) = docs.split_once("```json\n").unwrap();
        let (example, _) = after.split_once("```").unwrap();
        let example: Value = serde_json::from_str(example).unwrap();
        assert_same_keys(&example, &rendered(&mixed()), "");
    }

    #[test]
    fn document_of_a_mixed_batch() {
        assert_snapshot!(render(&mixed(), &Target::default(), &project()));
    }

    #[test]
    fn session_without_a_cloud_project_has_no_url() {
        let report = batch(
            vec![sample_probe(1, Outcome::Ok, Evidence::default(), WELL)],
            None,
        );
        let own_server = Project {
            cloud_project: None,
            ..project()
        };
        let text = render(&report, &Target::default(), &own_server);
        let document: Value = serde_json::from_str(&text).unwrap();
        assert!(document["probes"][0]["url"].is_null());
        assert!(document["not_opened"].is_null());
    }
}
