//! The sandbox and the canary with each other: two implementations of the protocol that share no code.

use std::path::Path;
use std::thread;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use livekit_canary::livekit::RoomName;
use livekit_canary::livekit::wire::api::Api;
use livekit_canary::livekit::wire::connect::Endpoint;
use livekit_canary::livekit::wire::token::Keys;
use livekit_canary::sandbox::{Handle, Sandbox, SandboxSettings};
use serde_json::Value;
use support::gate::{Gate, Hold};
use support::recording::Heard;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{canary, in_parallel};

/// Short deadlines, because a failure on loopback is not temporary. A call ends once the agent has spoken: most tests need
/// no conversation.
const CONFIG: &str = r#"
[projects.sandbox]
api_timeout = "2s"
[targets.demo]
late_agent_window = "1s"
[targets.demo.batch]
hold = "100ms"
[targets.demo.deadlines]
signal = "2s"
media = "5s"
join = "3s"
track = "2s"
speech = "4s"
reply = "5s"
cleanup = "3s"
[targets.demo.caller]
silence = "500ms"
[targets.demo.expect]
reply = false
"#;

/// With this variable, a call ends once the agent has replied to the echo of its greeting.
const EXPECT_REPLY: (&str, &str) = ("LIVEKIT_CANARY__targets__demo__expect__reply", "true");

/// A sandbox in a thread. It ends when this is dropped.
pub(crate) struct SandboxThread {
    pub url: String,
    pub handle: Handle,
    shutdown: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

impl SandboxThread {
    fn new(agent_name: &str, faults: &[&str]) -> Self {
        Self::start(SandboxSettings {
            agent_name: agent_name.to_owned(),
            faults: faults.iter().map(|text| text.parse().unwrap()).collect(),
            ..SandboxSettings::default()
        })
    }

    pub(crate) fn start(settings: SandboxSettings) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let sandbox = runtime.block_on(Sandbox::bind(settings)).unwrap();
        let (url, handle) = (sandbox.url(), sandbox.handle());
        let shutdown = CancellationToken::new();
        let stop = shutdown.clone();
        let thread = thread::spawn(move || runtime.block_on(sandbox.run(stop)));
        Self {
            url,
            handle,
            shutdown,
            thread: Some(thread),
        }
    }

    /// Runs `once` with this sandbox. Returns the exit status and the probes of the report.
    fn once(&self, flags: &[&str]) -> (Option<i32>, Vec<Value>) {
        self.once_with(flags, &[])
    }

    fn once_with(&self, flags: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, Vec<Value>) {
        let (code, report) = once(&self.url, CONFIG, flags, variables);
        (code, report["probes"].as_array().unwrap().clone())
    }

    /// Waits until an agent is in the only room.
    fn wait_for_agent(&self) {
        let endpoint = Endpoint::new(&self.url.parse().unwrap(), None).unwrap();
        let keys = Keys::new("devkey", "secret").unwrap();
        let api = Api::new(endpoint, keys, Duration::from_secs(2));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let is_there = || {
            let room = RoomName(self.handle.rooms().pop()?);
            let listed = runtime.block_on(api.list_participants(&room)).result.ok()?;
            listed
                .iter()
                .find(|someone| someone.kind == "AGENT")
                .map(drop)
        };
        let limit = Instant::now() + Duration::from_secs(20);
        while is_there().is_none() {
            assert!(Instant::now() < limit, "no agent joined");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Runs `once` with the server at `url` and these settings. Returns the exit status and the report.
fn once(
    url: &str,
    config: &str,
    flags: &[&str],
    variables: &[(&str, &str)],
) -> (Option<i32>, Value) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("canary.toml"), config).unwrap();
    let mut args = vec!["once", "--config", "canary.toml", "--format", "json"];
    args.extend(flags);
    let credentials = [
        ("LIVEKIT_URL", url),
        ("LIVEKIT_API_KEY", "devkey"),
        ("LIVEKIT_API_SECRET", "secret"),
    ];
    let run = canary(folder.path(), args, &[&credentials, variables].concat());
    assert!(!run.output().contains("eyJ"), "a token: {}", run.output());
    let report = serde_json::from_str(&run.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", run.output()));
    (run.code, report)
}

impl Drop for SandboxThread {
    fn drop(&mut self) {
        self.shutdown.cancel();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// The reason of a probe with the kind of limit, if there is one. `ok` if it didn't fail.
fn verdict(probe: &Value) -> String {
    let text = |key: &str| probe[key].as_str().unwrap_or_default();
    match (text("outcome"), text("limit")) {
        ("failed", "") => text("reason").to_owned(),
        ("failed", limit) => format!("{}/{limit}", text("reason")),
        (outcome, _) => outcome.to_owned(),
    }
}

#[test]
fn rooms_are_ok_and_the_agent_hears_every_echo() {
    let sandbox = SandboxThread::new("demo", &[]);
    let flags = ["--agent-name", "demo", "--rooms", "3"];
    let (code, probes) = sandbox.once_with(&flags, &[EXPECT_REPLY]);
    let verdicts: Vec<String> = probes.iter().map(verdict).collect();
    assert_eq!(
        (code, verdicts),
        (Some(0), vec!["ok".to_owned(); 3]),
        "{probes:#?}"
    );
    for probe in &probes {
        assert!(probe["join_delay_seconds"].is_f64());
        assert!(probe["reply_delay_seconds"].is_f64());
        let heard = sandbox.handle.heard();
        let heard = heard.iter().filter(|heard| heard.room == probe["room"]);
        assert!(heard.clone().all(|heard| !heard.over_agent));
        // The greeting has 125 frames. A busy machine may lose some of them.
        assert!(heard.clone().all(|heard| heard.frames > 100));
        assert_eq!(heard.count(), 1, "{probe:#?}");
    }
    assert_eq!(sandbox.handle.rooms(), Vec::<String>::new());
}

/// How far the speech of a recording is from the times that the probe reports, in seconds: of the agent's greeting, and of the
/// start and the end of the caller's turn.
fn differences(probe: &Value, folder: &Path) -> [f64; 3] {
    let room = probe["room"].as_str().unwrap();
    let heard = |track: &str| Heard::read(&folder.join(format!("{room}.{track}.ogg"))).unwrap();
    let recording = &probe["recording"];
    let seconds = |value: &Value| value.as_f64().unwrap();
    let started = seconds(&recording["started"]);
    assert_eq!(recording["started"], probe["milestones"]["SignalConnected"]);
    let tracks = ["agent", "caller"].map(|track| {
        let heard = heard(track);
        let duration = seconds(&recording[track]["seconds"]);
        assert!((heard.seconds() - duration).abs() < 0.001, "{duration}");
        let left = seconds(&probe["milestones"]["Left"]);
        // Leaving takes a moment, and more on a busy machine.
        assert!(
            (left - 1.0..left + 0.01).contains(&(started + duration)),
            "{probe:#?}"
        );
        heard.loud(0.5)
    });
    let turn = &probe["turns"][0];
    let (greeting, _) = tracks[0][0];
    let (first, last) = tracks[1][0];
    [
        started + greeting - seconds(&probe["milestones"]["AgentSpoke"]),
        started + first - seconds(&turn["caller_started"]),
        started + last - seconds(&turn["caller_ended"]),
    ]
}

#[test]
fn recording_has_the_speech_at_the_times_that_the_probe_reports() {
    let sandbox = SandboxThread::new("demo", &[]);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("calls");
    let settings = format!("{CONFIG}[[targets.demo.caller.lines]]\naudio = \"builtin:hello\"\n");
    let record = dir.to_str().unwrap();
    let flags = ["--agent-name", "demo", "--rooms", "4", "--record", record];
    let script = ("LIVEKIT_CANARY__targets__demo__caller__mode", "script");
    let (code, report) = once(&sandbox.url, &settings, &flags, &[EXPECT_REPLY, script]);
    assert_eq!(code, Some(0), "{report:#?}");
    let probes = report["probes"].as_array().unwrap();
    let mut names: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let mut expected: Vec<_> = probes
        .iter()
        .flat_map(|probe| ["agent", "caller"].map(|track| (probe["room"].as_str().unwrap(), track)))
        .map(|(room, track)| format!("{room}.{track}.ogg"))
        .collect();
    expected.sort();
    assert_eq!(names, expected);
    // The probe's times are those of single packets, and on a busy machine such a packet may be late. In a recording it is where
    // it belongs. So not every room has to match.
    let found: Vec<_> = probes
        .iter()
        .map(|probe| differences(probe, &dir))
        .collect();
    // The caller's clip has 40 ms of silence at both ends.
    let expected = [
        ("greeting", 0.0),
        ("start of the turn", 0.04),
        ("end of the turn", -0.04),
    ];
    for (place, (what, expected)) in expected.into_iter().enumerate() {
        let differs = |it: &[f64; 3]| (it[place] - expected).abs();
        assert!(
            found.iter().any(|it| differs(it) <= 0.02),
            "{what}: {found:?}"
        );
        assert!(
            found.iter().all(|it| differs(it) < 0.5),
            "{what}: {found:?}"
        );
    }
}

#[test]
fn waveform_shows_who_spoke_when_without_a_recording() {
    let sandbox = SandboxThread::new("demo", &[]);
    let flags = ["--agent-name", "demo", "--rooms", "1"];
    let (_, probes) = sandbox.once_with(&flags, &[EXPECT_REPLY]);
    let probe = &probes[0];
    assert!(probe["recording"].is_null());
    let waveform = &probe["waveform"];
    assert_eq!(waveform["step_seconds"], 0.1);
    assert_eq!(waveform["started"], probe["milestones"]["SignalConnected"]);
    let started = waveform["started"].as_f64().unwrap();
    // The loudest level of a side in a span, in seconds since the start of the probe.
    let loudest = |side: &str, from: f64, to: f64| {
        let levels = waveform[side].as_array().unwrap().iter().enumerate();
        let within = levels.filter(|(place, _)| {
            let at = started + 0.1 * f64::from(u32::try_from(*place).unwrap());
            (from..to).contains(&at)
        });
        within
            .map(|(_, level)| level.as_u64().unwrap())
            .max()
            .unwrap_or_default()
    };
    let turn = |key: &str| probe["turns"][0][key].as_f64().unwrap();
    let (spoke, stopped) = (turn("agent_started"), turn("agent_ended"));
    let (began, ended) = (turn("caller_started"), turn("caller_ended"));
    assert!(
        (60..=100).contains(&loudest("agent", spoke, stopped)),
        "{probe}"
    );
    assert!(
        (60..=100).contains(&loudest("caller", began, ended)),
        "{probe}"
    );
    assert!(loudest("caller", 0.0, began - 0.1) < 30, "{probe}");
    assert!(loudest("agent", stopped + 0.3, began) < 30, "{probe}");
}

#[test]
fn folder_that_cannot_take_recordings_is_reported_before_a_room_opens() {
    let sandbox = SandboxThread::new("demo", &[]);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "").unwrap();
    let credentials = [
        ("LIVEKIT_URL", sandbox.url.as_str()),
        ("LIVEKIT_API_KEY", "devkey"),
        ("LIVEKIT_API_SECRET", "secret"),
    ];
    let args = ["once", "--agent-name", "demo", "--record", "file/calls"];
    let run = canary(folder.path(), args, &credentials);
    assert_eq!(run.code, Some(2), "{}", run.output());
    let expected = "cannot write recordings to file/calls: ";
    assert!(run.stderr.contains(expected), "{}", run.stderr);
    assert_eq!(sandbox.handle.rooms_seen(), 0);
}

#[test]
fn report_lists_what_the_agent_did_heard_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.jsonl");
    let sandbox = SandboxThread::start(SandboxSettings {
        report: Some(report.clone()),
        ..SandboxSettings::default()
    });
    let flags = ["--agent-name", "demo", "--rooms", "1"];
    let (_, probes) = sandbox.once_with(&flags, &[EXPECT_REPLY]);
    drop(sandbox);
    let report = std::fs::read_to_string(report).unwrap();
    let events: Vec<Value> = report
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let names: Vec<_> = events
        .iter()
        .map(|event| event["event"].as_str().unwrap())
        .collect();
    let expected = [
        "job",
        "connecting",
        "connected",
        "caller",
        "greeted",
        "heard",
        "replied",
        "left",
    ];
    assert_eq!(names, expected, "{report}");
    let agent = &probes[0]["agent"]["identity"];
    let of_probe = |event: &Value| event["room"] == probes[0]["room"] && event["agent"] == *agent;
    assert!(events.iter().all(of_probe), "{report}");
    assert_eq!(events[3]["attributes"]["canary"], "true", "{report}");
    let said = |event: &Value, key: &str| event[key].as_f64().unwrap();
    let (greeted, heard) = (&events[4], &events[5]);
    assert!(said(heard, "began") > said(greeted, "ended"), "{report}");
    assert!(said(heard, "seconds") > 2.0, "{report}");
}

/// The order of the milestones in each dispatch mode. With automatic dispatch there is no request that LiveKit could accept.
const DISPATCHES: &[(&str, &str, &[&str])] = &[
    (
        "explicit",
        "demo",
        &[
            "RoomCreated",
            "SignalConnected",
            "MediaConnected",
            "DispatchSent",
            "AgentJoined",
            "AgentTrackSubscribed",
            "AgentFirstAudio",
            "AgentSpoke",
            "Left",
        ],
    ),
    (
        "room",
        "demo",
        &[
            "DispatchSent",
            "DispatchAccepted",
            "SignalConnected",
            "MediaConnected",
            "AgentSpoke",
        ],
    ),
    (
        "token",
        "demo",
        &[
            "DispatchSent",
            "DispatchAccepted",
            "MediaConnected",
            "AgentSpoke",
        ],
    ),
    (
        "automatic",
        "",
        &[
            "DispatchSent",
            "SignalConnected",
            "MediaConnected",
            "AgentSpoke",
        ],
    ),
];

#[test]
fn agent_joins_in_every_dispatch_mode() {
    in_parallel(DISPATCHES, |(mode, agent, order)| {
        // Later than the canary's connection, so that its join is seen.
        let sandbox = SandboxThread::new(agent, &["join_delay=1s"]);
        let mut flags = vec!["--rooms", "1", "--dispatch", mode];
        if !agent.is_empty() {
            flags.extend(["--agent-name", agent]);
        }
        let (code, probes) = sandbox.once(&flags);
        let probe = &probes[0];
        assert_eq!((code, &*verdict(probe)), (Some(0), "ok"), "{probe:#?}");
        let milestones = &probe["milestones"];
        // The agent joins while the canary's media connects, unless the canary waits with the dispatch.
        for order in [order, &["DispatchSent", "AgentJoined", "AgentSpoke"][..]] {
            let marks = order
                .iter()
                .map(|name| milestones[name].as_f64().expect(name));
            assert!(marks.is_sorted(), "{probe:#?}");
        }
        assert_eq!(milestones["DispatchAccepted"].is_f64(), !agent.is_empty());
        let created = matches!(*mode, "explicit" | "room");
        assert_eq!(milestones["RoomCreated"].is_f64(), created, "{mode}");
        assert_eq!(probe["join_upper_bound"], false, "{mode}");
    });
}

#[test]
fn agent_that_joins_before_the_canary_has_an_upper_bound_as_join_delay() {
    let sandbox = SandboxThread::new("demo", &[]);
    let server = sandbox.url.strip_prefix("ws://").unwrap().parse().unwrap();
    let gate = Gate::before(server, Hold::Signal).unwrap();
    let (code, report) = thread::scope(|scope| {
        let flags = ["--agent-name", "demo", "--rooms", "1", "--dispatch", "room"];
        let url = format!("ws://{}", gate.address);
        let running = scope.spawn(move || once(&url, CONFIG, &flags, &[]));
        sandbox.wait_for_agent();
        gate.open();
        running.join().unwrap()
    });
    let probe = &report["probes"][0];
    assert_eq!((code, &*verdict(probe)), (Some(0), "ok"), "{probe:#?}");
    assert_eq!(probe["join_upper_bound"], true, "{probe:#?}");
    let milestones = &probe["milestones"];
    assert_eq!(milestones["AgentJoined"], milestones["SignalConnected"]);
    assert_eq!(report["summary"]["join_delay"]["p50"], Value::Null);
}

#[test]
fn agent_of_a_room_or_token_that_does_not_join_leaves_no_room() {
    let cases = [
        ("room", "never_accepts", "dispatch_unanswered"),
        ("room", "late_after_deletion=300ms", "agent_no_show"),
        ("token", "never_accepts", "dispatch_unanswered"),
        ("token", "late_after_deletion=300ms", "agent_no_show"),
    ];
    in_parallel(&cases, |(mode, fault, expected)| {
        let sandbox = SandboxThread::new("demo", &[fault]);
        let flags = ["--agent-name", "demo", "--rooms", "1", "--dispatch", mode];
        let (code, probes) = sandbox.once(&flags);
        assert_eq!(
            (code, &*verdict(&probes[0])),
            (Some(1), *expected),
            "{mode} {fault}"
        );
        assert_eq!(
            sandbox.handle.rooms(),
            Vec::<String>::new(),
            "{mode} {fault}"
        );
    });
}

#[test]
fn interval_and_burst_open_rooms_before_any_agent_joins() {
    in_parallel(&[("interval", 200), ("burst", 0)], |(ramp, apart)| {
        let sandbox = SandboxThread::new("demo", &["join_delay=3s"]);
        let interval = format!("{apart}ms");
        let mut flags = vec!["--agent-name", "demo", "--rooms", "5", "--ramp", ramp];
        if *apart > 0 {
            flags.extend(["--ramp-interval", interval.as_str()]);
        }
        flags.extend(["--join-timeout", "10s"]);
        let (code, probes) = sandbox.once(&flags);
        assert_eq!(code, Some(0), "{probes:#?}");
        let started: Vec<DateTime<Utc>> = probes.iter().map(started_at).collect();
        let joined = probes[0]["milestones"]["AgentJoined"].as_f64().unwrap();
        let first_join = started[0] + Duration::from_secs_f64(joined);
        assert!(started.iter().all(|at| *at < first_join), "{started:?}");
        // A room that opens late on a busy machine delays none after it, so single intervals may be short.
        let least = TimeDelta::milliseconds(4 * apart / 2);
        assert!(started[4] - started[0] >= least, "{started:?}");
    });
}

fn started_at(probe: &Value) -> DateTime<Utc> {
    probe["started_at"].as_str().unwrap().parse().unwrap()
}

/// Faults that show only after the first speech, and the verdicts that they must have.
const FAULTS_AFTER_SPEECH: &[(&str, &str)] = &[
    ("no_reply", "agent_no_reply"),
    ("slow_reply=20s", "agent_no_reply"),
    ("deaf", "agent_no_reply"),
    ("dead_llm", "agent_no_reply"),
    ("slow_stage=transcription:20s", "agent_no_reply"),
    ("waits_for_caller", "agent_silent"),
    ("uplink_lost", "media_failed"),
    ("two_part_greeting=300ms", "ok"),
    ("silent_session", "ok"),
    ("tool_error=lookup", "ok"),
    ("wrong_words", "ok"),
    ("hears=hello", "ok"),
    ("long_reply=4s", "ok"),
    ("background", "ok"),
    ("avatar", "ok"),
    ("restarts_track", "ok"),
    ("leaves_early=500ms", "agent_left_early"),
    ("duplicate", "agent_duplicate"),
];

/// The other faults and the verdicts that they must have.
const FAULTS: &[(&str, &str)] = &[
    ("join_delay=1500ms", "ok"),
    ("never_accepts", "dispatch_unanswered"),
    ("never_joins", "agent_no_show"),
    ("late_after_deletion=300ms", "agent_no_show"),
    ("no_track", "agent_no_track"),
    ("silent_track", "agent_silent"),
    ("plays=clicks", "agent_silent"),
    ("plays=music", "agent_silent"),
    ("plays=noise", "agent_silent"),
    ("no_packets", "agent_silent"),
    ("background silent_track", "agent_silent"),
    ("avatar no_track", "agent_no_track"),
    ("inference_error", "plan_limit/inference"),
    ("no_media", "media_failed"),
    ("create_room=429,retry_after=7s", "plan_limit/api_rate"),
    ("create_room=429,html", "plan_limit/api_rate"),
    ("create_dispatch=429", "plan_limit/api_rate"),
    (
        "create_dispatch=resource_exhausted",
        "plan_limit/agent_sessions",
    ),
    ("create_room=quota", "plan_limit/quota"),
    ("create_room=unnamed", "plan_limit/other"),
    ("upgrade=429", "plan_limit/connections"),
    ("upgrade=503", "plan_limit/node"),
    ("before_join=leave", "plan_limit/room"),
    ("create_room=500", "room_create_failed"),
    ("create_room=drop", "room_create_failed"),
    ("create_room=hang", "room_create_failed"),
    ("create_room=flood", "room_create_failed"),
    ("create_dispatch=500", "dispatch_failed"),
    ("create_dispatch=drop", "dispatch_failed"),
    ("create_dispatch=hang", "dispatch_failed"),
    ("create_dispatch=flood", "dispatch_failed"),
    ("upgrade=500", "signal_failed"),
    ("upgrade=drop", "signal_failed"),
    ("upgrade=hang", "signal_failed"),
    ("upgrade=flood", "config_rejected"),
    ("before_join=drop", "signal_failed"),
    ("before_join=hang", "signal_failed"),
    ("before_join=flood", "signal_failed"),
    // The sandbox doesn't respond to media negotiation either. The ping timeout is later.
    ("after_join=hang", "publish_failed"),
    ("after_join=drop", "signal_lost"),
    ("after_join=flood", "signal_lost"),
    ("after_join=remove", "removed"),
    ("before_join=remove", "removed"),
    // livekit-server sends JOIN_FAILURE if media does not connect after a join.
    ("after_join=leave", "media_failed"),
    ("api=429", "plan_limit/api_rate"),
    ("api=500", "room_create_failed"),
    ("api=drop", "room_create_failed"),
    ("api=hang", "room_create_failed"),
    // Without the list it is unknown whether a worker has accepted the job.
    ("never_joins list_dispatch=500", "dispatch_unanswered"),
    ("never_joins list_dispatch=flood", "dispatch_unanswered"),
    // A failure after the verdict does not change it.
    ("delete_dispatch=500", "ok"),
    ("delete_dispatch=hang", "ok"),
    ("delete_room=500", "ok"),
    ("delete_room=drop", "ok"),
];

#[test]
fn every_fault_has_its_reason() {
    // The longest calls first.
    let after_speech = FAULTS_AFTER_SPEECH.iter().map(|fault| (fault, true));
    let faults: Vec<_> = after_speech
        .chain(FAULTS.iter().map(|fault| (fault, false)))
        .collect();
    let results = in_parallel(&faults, |((faults, expected), reply)| {
        differs(faults, expected, *reply)
    });
    let wrong: Vec<_> = results.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is wrong with the verdict of a call with these faults, if anything.
fn differs(faults: &str, expected: &str, reply: bool) -> Option<String> {
    let sandbox = SandboxThread::new("demo", &faults.split(' ').collect::<Vec<_>>());
    let flags = ["--agent-name", "demo", "--rooms", "1"];
    let variables = Vec::from_iter(reply.then_some(EXPECT_REPLY));
    let (_, probes) = sandbox.once_with(&flags, &variables);
    let probe = &probes[0];
    let got = verdict(probe);
    if got != expected {
        return Some(format!(
            "{faults}: {got}, not {expected}: {}",
            probe["detail"]
        ));
    }
    // A room is left only if its deletion fails. Then the evidence contains a note.
    let fails = faults.starts_with("delete_room=");
    let stays = !sandbox.handle.rooms().is_empty();
    let notes = probe["evidence"]["notes"].as_array().unwrap();
    let told = notes
        .iter()
        .any(|note| note.as_str().unwrap().contains("was not deleted"));
    (stays != fails || (stays && !told)).then(|| format!("{faults}: left {stays}: {probe:#}"))
}

/// A call of which the conversation is judged.
struct Conversation {
    faults: &'static [&'static str],
    /// TOML of the caller and of what is expected.
    settings: &'static str,
    verdict: &'static str,
    /// A part of the detail.
    detail: &'static str,
}

const INTERRUPTION: &str = "[targets.talk.caller]
silence = '500ms'
interrupt = true
[targets.talk.expect]
yield_within = '2s'";

const QUESTION_WITH_TOOL: &str = "[targets.talk.caller]
silence = '500ms'
mode = 'script'
speaks_first = true
[[targets.talk.caller.lines]]
audio = 'builtin:hello'
expect.words = ['good']
expect.tool = 'lookup'";

const UNDERSTANDING: &str = "[targets.talk.caller]
silence = '500ms'
[targets.talk.expect]
word_error_below = 0.3";

const THREE_TURNS: &str = "[targets.talk.caller]
silence = '500ms'
turns = 3";

#[rustfmt::skip]
const CONVERSATIONS: &[Conversation] = &[
    Conversation { faults: &[], settings: THREE_TURNS, verdict: "ok", detail: "" },
    Conversation { faults: &["deaf_after=2"], settings: THREE_TURNS, verdict: "agent_no_reply", detail: "in turn 3 of 3" },
    Conversation { faults: &["long_reply"], settings: INTERRUPTION, verdict: "ok", detail: "" },
    Conversation { faults: &["long_reply", "never_yields"], settings: INTERRUPTION, verdict: "agent_not_yielding", detail: "" },
    Conversation { faults: &["waits_for_caller", "tool=lookup"], settings: QUESTION_WITH_TOOL, verdict: "ok", detail: "" },
    Conversation { faults: &["waits_for_caller"], settings: QUESTION_WITH_TOOL, verdict: "agent_wrong_reply", detail: "lookup" },
    Conversation { faults: &["waits_for_caller", "tool_error=lookup"], settings: QUESTION_WITH_TOOL, verdict: "agent_wrong_reply", detail: "lookup" },
    Conversation { faults: &["waits_for_caller", "tool=lookup", "wrong_words"], settings: QUESTION_WITH_TOOL, verdict: "agent_wrong_reply", detail: "good" },
    Conversation { faults: &["word_errors=1"], settings: UNDERSTANDING, verdict: "ok", detail: "" },
    Conversation { faults: &["word_errors=2"], settings: UNDERSTANDING, verdict: "agent_wrong_reply", detail: "50 %" },
];

#[test]
fn every_fault_of_a_conversation_has_its_reason() {
    let results = in_parallel(CONVERSATIONS, |call| {
        let sandbox = SandboxThread::new("demo", call.faults);
        let probe = converse(&sandbox, call.settings);
        let detail = probe["detail"].as_str().unwrap_or_default();
        let right = verdict(&probe) == call.verdict && detail.contains(call.detail);
        (!right).then(|| format!("{:?}: {}: {detail}", call.faults, verdict(&probe)))
    });
    let wrong: Vec<_> = results.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Runs one room of target `talk`, whose replies are judged.
fn converse(sandbox: &SandboxThread, settings: &str) -> Value {
    let target = "[targets.talk]\ntranscript = true\nlate_agent_window = '1s'\n[targets.talk.batch]\nhold = '100ms'\n\
                  [targets.talk.deadlines]\nreply = '5s'\n";
    let config = format!("[projects.sandbox]\n{target}{settings}\n");
    let flags = ["--agent-name", "demo", "--rooms", "1"];
    let (_, report) = once(&sandbox.url, &config, &flags, &[]);
    report["probes"][0].clone()
}

/// A fault that delays each reply by a second, and where the delay must show: a key of the turn, or of its stages.
const SLOW: &[(&str, &str)] = &[
    ("slow_stage=transcription:1s", "transcription"),
    ("slow_stage=end_of_turn:1s", "end_of_turn"),
    ("slow_stage=llm:1s", "llm"),
    ("slow_stage=tts:1s", "tts"),
    ("slow_network=1s", "unexplained_seconds"),
];

#[test]
fn delay_shows_where_it_arose() {
    in_parallel(SLOW, |(fault, key)| {
        let sandbox = SandboxThread::new("demo", &[fault]);
        let probe = converse(&sandbox, "");
        let turn = &probe["turns"][0];
        let seconds = turn["stages"][key].as_f64().or(turn[key].as_f64());
        assert!(seconds > Some(0.9), "{fault}: {turn:#}");
        let delay = turn["reply_delay_seconds"].as_f64();
        assert!(delay > Some(1.9), "{fault}: {turn:#}");
    });
}

#[test]
fn fault_of_one_room_does_not_affect_the_others() {
    let sandbox = SandboxThread::new("demo", &["room2:no_track"]);
    let (code, probes) = sandbox.once(&["--agent-name", "demo", "--rooms", "3"]);
    let verdicts: Vec<String> = probes.iter().map(verdict).collect();
    assert_eq!(
        (code, verdicts.as_slice()),
        (
            Some(1),
            ["ok", "agent_no_track", "ok"].map(String::from).as_slice()
        )
    );
}

#[test]
fn wrong_secret_is_auth_rejected() {
    let sandbox = SandboxThread::new("demo", &[]);
    let folder = tempfile::tempdir().unwrap();
    let variables = [
        ("LIVEKIT_URL", sandbox.url.as_str()),
        ("LIVEKIT_API_KEY", "devkey"),
        (
            "LIVEKIT_API_SECRET",
            "not the secret of this sandbox, surely",
        ),
    ];
    let run = canary(folder.path(), ["once", "--agent-name", "demo"], &variables);
    assert_eq!(run.code, Some(2), "{}", run.output());
    // The server's response contains the whole token.
    assert!(!run.output().contains("eyJ"), "{}", run.output());
}
