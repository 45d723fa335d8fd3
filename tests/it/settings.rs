//! The errors of wrong settings, and that the documented defaults are those of the code.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono_tz::Tz;
use insta::assert_snapshot;
use livekit_canary::config::{
    Alerts, Backoff, Budget, CallerMode, Channel, ChannelKind, Config, DaemonSettings,
    DispatchMode, HistorySettings, Project, RampMode, RawConfig, RoomSettings, Schedule, Target,
    WebhookFormat,
};
use secrecy::ExposeSecret;
use tempfile::TempDir;

use crate::canary;

const SECRET: &str = "an-API-secret-that-nobody-may-see";
const KEY: &str = "APIkeyThatNobodyMaySee";

const CREDENTIALS: [(&str, &str); 3] = [
    ("LIVEKIT_URL", "wss://canary.example"),
    ("LIVEKIT_API_KEY", KEY),
    ("LIVEKIT_API_SECRET", SECRET),
];

fn folder_with(settings: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("canary.toml"), settings).unwrap();
    folder
}

/// The error of `check` about these settings, with credentials in the environment.
fn error_of(settings: &str) -> String {
    error_with(settings, &CREDENTIALS)
}

fn error_with(settings: &str, variables: &[(&str, &str)]) -> String {
    let folder = folder_with(settings);
    let run = canary(
        folder.path(),
        ["check", "--config", "canary.toml"],
        variables,
    );
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert_eq!(run.stdout, "");
    assert!(!run.stderr.contains(SECRET), "{}", run.stderr);
    assert!(!run.stderr.contains(KEY), "{}", run.stderr);
    run.stderr
}

fn read(settings: &str, variables: &[(&str, &str)]) -> Config {
    let folder = folder_with(settings);
    read_file(&folder.path().join("canary.toml"), variables)
}

fn read_file(file: &Path, variables: &[(&str, &str)]) -> Config {
    let draft = RawConfig::read(Some(file), environment(variables));
    draft
        .unwrap()
        .validate()
        .map_err(|problems| problems.to_string())
        .unwrap()
}

fn environment(variables: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    let owned = |(name, value): &(&str, &str)| (OsString::from(name), OsString::from(value));
    variables.iter().map(owned).collect()
}

/// A valid target with one more setting, which may be a mistake.
fn target_with(more: &str) -> String {
    format!("[targets.support]\nagent_name = \"my-agent\"\n{more}\n")
}

#[test]
fn five_mistakes_are_reported_at_once() {
    assert_snapshot!(error_of(
        r#"
[projects.acme]
url = "ftp://livekit.example"
max_rooms = 2

[targets.support]
project = "acne"
agent_nam = "my-agent"

[targets.support.batch]
ramp = "bursts"
hold = "15"
"#
    ));
}

#[test]
#[cfg(not(feature = "libwebrtc"))]
fn engine_that_the_binary_lacks_is_reported_with_a_hint() {
    assert_snapshot!(error_of(&target_with("engine = \"libwebrtc\"")));
    let run = canary(
        Path::new("."),
        ["once", "--agent-name", "a", "--engine", "libwebrtc"],
        &CREDENTIALS,
    );
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert!(run.stderr.contains("--engine on the command line"));
}

#[test]
fn mistakes_of_recordings_are_reported() {
    assert_snapshot!(error_of(&format!(
        "[history]\nkeep = \"2d\"\nkeep_failures = \"3d\"\nkeep_recordings = \"4d\"\nmax_recording_megabytes = 0\n{}",
        target_with("record.audio = \"failure\"")
    )));
}

#[test]
fn retention_of_recordings_is_shorter_if_that_of_failures_is() {
    let settings = "[history]\nkeep = \"2d\"\nkeep_failures = \"3d\"\n";
    let config = read(&format!("{settings}{}", target_with("")), &CREDENTIALS);
    let kept = config.daemon.history.keep_recordings;
    assert_eq!(kept, Duration::from_hours(72));
}

#[test]
fn engine_that_cannot_record_is_reported() {
    let settings = target_with("engine = \"libwebrtc\"\nrecord.audio = \"always\"");
    let error = error_of(&settings);
    assert!(
        error.contains("record.audio: the engine \"libwebrtc\" can't record"),
        "{error}"
    );
}

#[test]
fn engine_that_cannot_be_restricted_is_reported_if_the_project_needs_it() {
    for (ice, restriction) in [("tcp", "TCP"), ("tls", "TURN over TLS")] {
        let settings = format!(
            "[projects.acme]\nice = \"{ice}\"\n{}",
            target_with("engine = \"libwebrtc\"")
        );
        let error = error_of(&settings);
        let expected = format!(
            "can't be restricted to {restriction}, but project \"acme\" sets ice = \"{ice}\"\n  --> canary.toml:5"
        );
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn unknown_engine_is_reported() {
    assert_snapshot!(error_of(&target_with("engine = \"libweb\"")));
}

#[test]
fn file_that_is_not_toml_is_one_error_with_line_and_column() {
    assert_snapshot!(error_of(
        "[projects.acme]\nurl = \"wss://a\nmax_rooms = 3\n"
    ));
}

#[test]
fn duplicate_key_is_reported() {
    assert_snapshot!(error_of("[projects.acme]\nmax_rooms = 3\nmax_rooms = 4\n"));
}

#[test]
fn missing_file_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let run = canary(folder.path(), ["check", "--config", "nowhere.toml"], &[]);
    assert_eq!(run.code, Some(2));
    assert_snapshot!(run.stderr);
}

#[test]
fn unknown_keys_are_reported_without_their_values() {
    let settings = target_with(&format!(
        "api_secrets = \"{SECRET}\"\n[projects.acme]\napi_secert = \"{SECRET}\"\n[target]\n"
    ));
    assert_snapshot!(error_of(&settings));
}

#[test]
fn secret_under_a_wrong_key_is_not_printed() {
    for key in [
        "url",
        "api_key_file",
        "api_secret_file",
        "ca_file",
        "cloud_project",
        "ice",
        "api_timeout",
        "max_rooms",
        "budget",
        "budget.agent_time_per_day",
        "budget.agent_time_per_month",
        "backoff.first",
        "backoff.longest",
    ] {
        error_of(&format!("[projects.acme]\n{key} = \"{SECRET}\"\n"));
    }
    for key in [
        "http.listen",
        "http.enable_lifecycle",
        "http.sensitive",
        "history.keep",
        "history.keep_failures",
        "history.max_megabytes",
        "history.keep_recordings",
        "history.max_recording_megabytes",
        "lifetime.startup_delay",
        "lifetime.drain_grace",
        "lifetime.shutdown_linger",
    ] {
        error_of(&format!("{key} = \"{SECRET}\"\n"));
    }
    for key in [
        "project",
        "late_agent_window",
        "batch.rooms",
        "batch.ramp",
        "batch.hold",
        "expect.reply",
        "batch",
        "schedule",
        "schedule.every",
        "schedule.cron",
        "objectives.availability",
        "objectives.join_within",
        "objectives.reply",
        "caller",
        "caller.mode",
        "caller.turns",
        "caller.lines",
        "expect.yield_within",
        "expect.word_error_below",
    ] {
        error_of(&target_with(&format!("{key} = \"{SECRET}\"")));
    }
    error_of(&on_clock("* * * * *", SECRET));
    error_of(&on_clock(&[SECRET; 5].join(" "), "UTC"));
    error_of(&format!("[projects.acme]\napi_secret = \"{SECRET}\n"));
    error_of(&format!("{SECRET}\n"));
}

#[test]
fn credentials_in_the_url_are_rejected_and_not_printed() {
    assert_snapshot!(error_of(&format!(
        "[projects.acme]\nurl = \"wss://{KEY}:{SECRET}@livekit.example\"\n"
    )));
}

#[test]
fn invalid_names_are_reported() {
    assert_snapshot!(error_of(
        "[projects.Acme_1]\n[targets.\"the support\"]\nagent_name = \"a\"\n"
    ));
}

#[test]
fn numbers_out_of_range_are_reported() {
    assert_snapshot!(error_of(&target_with(
        "batch.rooms = 0\ncaller.turns = 0\nspeech.threshold_dbfs = 3\nspeech.min_frames = \"many\""
    )));
}

#[test]
fn durations_out_of_range_or_without_unit_are_reported() {
    assert_snapshot!(error_of(&target_with(
        "deadlines.join = \"0s\"\ndeadlines.speech = 20\ncaller.silence = \"10 parsecs\"\nbatch.hold = \"3 days\""
    )));
}

#[test]
fn unknown_choices_are_reported() {
    assert_snapshot!(error_of(&target_with(
        "dispatch.mode = \"auto\"\ncaller.mode = \"turns\"\nbatch.stay = \"for_ever\"\nexpect.agent_may_leave = \"whenever\"\nexpect.reply = \"perhaps\""
    )));
}

#[test]
fn values_in_place_of_tables_and_tables_in_place_of_values_are_reported() {
    assert_snapshot!(error_of(
        "targets = 3\n[projects.acme]\nmax_rooms = [1, 2]\nurl.host = \"a\"\n"
    ));
    assert_snapshot!(error_of("[targets]\nsupport = 3\n"));
    assert_snapshot!(error_of(&target_with("batch = 3")));
}

#[test]
fn explicit_dispatch_without_an_agent_name_is_reported() {
    assert_snapshot!(error_of("[targets.support]\n"));
    assert_snapshot!(error_of("[targets.support]\nagent_name = \"\"\n"));
}

#[test]
fn metadata_with_automatic_dispatch_is_reported() {
    assert_snapshot!(error_of(
        "[targets.support]\ndispatch.mode = \"automatic\"\ndispatch.metadata = \"vip\"\n"
    ));
}

#[test]
fn more_rooms_than_the_project_allows_are_reported() {
    assert_snapshot!(error_of(&target_with("batch.rooms = 6")));
}

#[test]
fn one_by_one_is_rejected_with_a_ramp_that_opens_rooms_together() {
    for ramp in ["interval", "burst"] {
        let settings = format!("batch.stay = \"one_by_one\"\nbatch.ramp = \"{ramp}\"");
        assert_snapshot!(
            format!("ramp_{ramp}_is_not_one_by_one"),
            error_of(&target_with(&settings))
        );
    }
}

/// A target with this cron expression and time zone.
fn on_clock(cron: &str, zone: &str) -> String {
    target_with(&format!(
        "schedule = {{ cron = \"{cron}\", time_zone = \"{zone}\" }}"
    ))
}

#[test]
fn mistake_in_a_cron_expression_names_its_field() {
    for (name, expression) in [
        ("second", "60 0 9 * * *"),
        ("minute", "61 * * * *"),
        ("minute_as_a_list", "0,15,,45 * * * *"),
        ("minute_as_a_step", "*/0 * * * *"),
        ("hour", "0 24 * * *"),
        ("hour_as_a_range", "0 18-8 * * *"),
        ("day_of_month", "0 9 0 * *"),
        ("month", "0 9 1 13 *"),
        ("month_by_a_weekday", "0 9 1 mon *"),
        ("day_of_week", "0 9 * * monday"),
        ("day_of_week_with_a_plus", "0 9 1 * +mon"),
    ] {
        let error = error_of(&on_clock(expression, "Europe/Berlin"));
        assert_snapshot!(format!("cron_with_a_wrong_{name}"), error);
    }
}

#[test]
fn cron_expression_of_another_form_is_reported() {
    for (name, expression) in [
        ("too_few_fields", "0 9 * *"),
        ("a_year", "0 0 9 * * * 2027"),
        ("nothing", ""),
        ("an_unknown_nickname", "@reboot"),
        ("a_time_zone_in_it", "CRON_TZ=Europe/Berlin 0 9 * * *"),
        ("an_interval", "@every 5m"),
        ("a_day_that_never_comes", "0 9 31 2,4 *"),
    ] {
        let error = error_of(&on_clock(expression, "UTC"));
        assert_snapshot!(format!("cron_with_{name}"), error);
    }
}

#[test]
fn unknown_time_zone_is_reported_in_addition_to_a_wrong_expression() {
    assert_snapshot!(error_of(&on_clock("0 25 * * *", "Europe/Berlim")));
}

#[test]
fn time_zone_without_a_place_is_reported() {
    assert_snapshot!(error_of(&on_clock("0 9 * * *", "here")));
}

#[test]
fn time_zone_with_an_interval_is_reported() {
    let settings = "schedule = { every = \"5m\", time_zone = \"UTC\" }";
    assert_snapshot!(error_of(&target_with(settings)));
}

#[test]
fn interval_with_a_cron_expression_is_reported() {
    let settings = "schedule = { every = \"5m\", cron = \"*/5 * * * *\" }";
    assert_snapshot!(error_of(&target_with(settings)));
}

#[test]
fn interval_out_of_range_is_reported() {
    for (name, every) in [("short", "500ms"), ("long", "40d"), ("bare", "900")] {
        let error = error_of(&target_with(&format!("schedule.every = \"{every}\"")));
        assert_snapshot!(format!("interval_{name}"), error);
    }
}

#[test]
fn schedule_that_is_not_a_table_is_reported() {
    assert_snapshot!(error_of(&target_with("schedule = \"*/5 * * * *\"")));
}

#[test]
fn objectives_out_of_range_are_reported() {
    assert_snapshot!(error_of(&target_with(
        "objectives = { availability = 99.5, join = 1, first_speech = \"nan\", service = 0 }"
    )));
}

#[test]
fn objective_in_per_cent_is_reported() {
    assert_snapshot!(error_of(&target_with("objectives.availability = \"99%\"")));
}

#[test]
fn thresholds_out_of_range_are_reported() {
    assert_snapshot!(error_of(&target_with(
        "objectives = { join_within = \"0s\", first_speech_within = 8 }"
    )));
}

#[test]
fn threshold_above_its_deadlines_is_reported() {
    assert_snapshot!(error_of(&target_with(
        "objectives = { join_within = \"31s\", first_speech_within = \"51s\", reply_within = \"21s\" }"
    )));
}

#[test]
fn budget_out_of_range_is_reported() {
    assert_snapshot!(error_of(
        "[projects.acme.budget]\nagent_time_per_day = \"30s\"\nagent_time_per_month = \"100\"\n"
    ));
}

#[test]
fn monthly_budget_below_the_daily_one_is_reported() {
    assert_snapshot!(error_of(
        "[projects.acme.budget]\nagent_time_per_day = \"5h\"\nagent_time_per_month = \"4h\"\n"
    ));
}

#[test]
fn backoff_out_of_range_is_reported() {
    assert_snapshot!(error_of(
        "[projects.acme.backoff]\nfirst = \"2h\"\nlongest = \"2d\"\n"
    ));
}

#[test]
fn backoff_with_a_maximum_below_its_first_value_is_reported() {
    assert_snapshot!(error_of("[projects.acme.backoff]\nlongest = \"30s\"\n"));
}

#[test]
fn listen_address_without_an_ip_address_is_reported() {
    for (name, listen) in [
        ("port", ":9787"),
        ("name", "localhost:9787"),
        ("host", "0.0.0.0"),
    ] {
        let error = error_of(&format!("[http]\nlisten = \"{listen}\"\n"));
        assert_snapshot!(format!("listen_on_a_{name}"), error);
    }
}

#[test]
fn boolean_that_is_neither_true_nor_false_is_reported() {
    assert_snapshot!(error_of(
        "[http]\nenable_lifecycle = \"perhaps\"\nweb_config_file = \"\"\n"
    ));
}

#[test]
fn unknown_group_of_readers_is_reported() {
    assert_snapshot!(error_of("[http]\nsensitive = \"all\"\n"));
}

#[test]
fn history_limits_out_of_range_are_reported() {
    assert_snapshot!(error_of(
        "[history]\ndir = \" \"\nkeep = \"12h\"\nkeep_failures = \"20y\"\nmax_megabytes = 1\n"
    ));
}

#[test]
fn history_that_deletes_failures_first_is_reported() {
    assert_snapshot!(error_of(
        "[history]\nkeep = \"90d\"\nkeep_failures = \"60d\"\n"
    ));
}

#[test]
fn unusable_alert_settings_are_reported() {
    assert_snapshot!(error_of(
        "[alerts]\nslo_window = \"1d\"\nscrape_interval = \"5m\"\npage = \"\"\nrunbook_base_url = \"{{ x }}\"\n"
    ));
    assert_snapshot!(error_of("[alerts]\nticket = \"page\"\n"));
}

#[test]
fn lifetime_out_of_range_is_reported() {
    assert_snapshot!(error_of(
        "[lifetime]\nstartup_delay = \"2h\"\ndrain_grace = 30\nshutdown_linger = \"-5s\"\n"
    ));
}

#[test]
fn unknown_keys_of_the_daemon_are_reported() {
    assert_snapshot!(error_of(&target_with(
        "schedule.evry = \"5m\"\nobjectives.replies = 0.9\n\
         [http]\nport = 9787\n[history]\nmax_mb = 8\n[lifetime]\ngrace = \"5s\"\n\
         [projects.acme.budget]\nagent_time = \"5h\"\n[projects.acme.backoff]\nmax = \"1h\""
    )));
}

#[test]
fn schedule_in_the_environment_replaces_the_other_key_of_the_file() {
    let schedule = |settings: &str, key: &str, value: &str| {
        let mut variables = CREDENTIALS.to_vec();
        let name = format!("LIVEKIT_CANARY__targets__support__schedule__{key}");
        variables.push((&name, value));
        read(&target_with(settings), &variables).targets["support"]
            .schedule
            .clone()
    };
    let every = "schedule.every = \"15m\"";
    let nightly = schedule(every, "cron", "0 3 * * *");
    assert!(
        matches!(nightly, Schedule::Cron { zone: Tz::UTC, .. }),
        "{nightly:?}"
    );
    let cron = "schedule = { cron = \"0 3 * * *\", time_zone = \"Europe/Berlin\" }";
    let often = schedule(cron, "every", "20s");
    assert_eq!(often, Schedule::Every(Duration::from_secs(20)));
}

#[test]
fn ramp_interval_may_be_set_without_its_ramp() {
    for (more, ramp) in [
        ("", RampMode::AfterJoin),
        ("batch.ramp = \"interval\"", RampMode::Interval),
    ] {
        let settings = target_with(&format!("batch.interval = \"250ms\"\n{more}"));
        let batch = &read(&settings, &CREDENTIALS).targets["support"].batch;
        assert_eq!(batch.ramp, ramp);
        assert_eq!(batch.interval, Duration::from_millis(250));
    }
}

#[test]
fn every_dispatch_mode_except_automatic_accepts_metadata() {
    for mode in <DispatchMode as strum::VariantArray>::VARIANTS {
        let name = mode.name();
        let settings = target_with(&format!(
            "dispatch = {{ mode = \"{name}\", metadata = \"{}\" }}",
            if mode.facts().names_agent { "vip" } else { "" }
        ));
        let dispatch = &read(&settings, &CREDENTIALS).targets["support"].dispatch;
        assert_eq!(dispatch.mode, *mode);
        assert_eq!(!dispatch.metadata.is_empty(), mode.facts().names_agent);
        assert_eq!(mode.facts().names_agent, *mode != DispatchMode::Automatic);
    }
}

#[test]
fn more_rooms_than_the_project_allows_are_valid_one_by_one() {
    let config = read(
        &target_with("batch.rooms = 6\nbatch.stay = \"one_by_one\""),
        &CREDENTIALS,
    );
    assert_eq!(config.targets["support"].batch.rooms, 6);
}

#[test]
fn attribute_for_upstreams_test_server_is_not_reserved() {
    let config = target_with("participant.attributes = { \"lk.mock\" = \"no_pong\" }");
    let config = read(&config, &CREDENTIALS);
    let attributes = &config.targets["support"].participant.attributes;
    assert_eq!(attributes["lk.mock"], "no_pong");
}

#[test]
fn reserved_attributes_are_reported() {
    assert_snapshot!(error_of(&target_with(
        "participant.attributes = { canary = \"no\", \"lk.simulator\" = \"1\", tier = 3 }"
    )));
}

#[test]
fn mistakes_of_room_and_deployment_are_reported() {
    assert_snapshot!(error_of(&target_with(
        "room = { name_prefix = \"calls/\", max_participants = 1001 }\ndispatch.deployment = \"my_staging\""
    )));
    let automatic = "dispatch = { mode = \"automatic\", deployment = \"staging\" }";
    assert_snapshot!(error_of(&target_with(automatic)));
}

#[test]
fn room_participant_and_deployment_are_read() {
    let settings = "room = { name_prefix = \"call-\", metadata = \"\", max_participants = 0 }\n\
                    participant = { name = \"Ada\", metadata = \"vip\" }\ndispatch.deployment = \"staging\"";
    let config = read(&target_with(settings), &CREDENTIALS);
    let target = &config.targets["support"];
    let room = RoomSettings {
        name_prefix: "call-".to_owned(),
        metadata: String::new(),
        max_participants: 0,
    };
    assert_eq!(target.room, room);
    let participant = (&*target.participant.name, &*target.participant.metadata);
    assert_eq!(participant, ("Ada", "vip"));
    assert_eq!(target.dispatch.deployment, "staging");
}

/// A WAV file with a tone of `millis` at `rate`.
fn wav(path: &Path, rate: u32, millis: u32) {
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: rate,
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    let mut writer = hound::WavWriter::create(path, spec).unwrap();
    for index in 0..rate * millis / 1_000 {
        let loud = (index * 800 / rate).is_multiple_of(2);
        writer
            .write_sample(if loud { 8_000 } else { -8_000_i16 })
            .unwrap();
    }
    writer.finalize().unwrap();
}

#[test]
fn script_is_read_with_its_files_and_expectations() {
    let folder = folder_with(&target_with(
        r#"caller.mode = "script"
caller.pause = "1m"
caller.speaks_first = true
caller.interrupt = true
expect = { yield_within = "2s", word_error_below = 0.3 }
[[targets.support.caller.lines]]
audio = "builtin:hello"
text = "Hello, can you tell me what you can do for me?"
[[targets.support.caller.lines]]
audio = "order.wav"
text = "Where is my order?"
expect = { words = ["order|delivery", "tomorrow"], tool = "lookup_order" }"#,
    ));
    wav(&folder.path().join("order.wav"), 16_000, 700);
    let config = read_file(&folder.path().join("canary.toml"), &CREDENTIALS);
    let support = &config.targets["support"];
    let caller = &support.caller;
    assert_eq!(caller.mode, CallerMode::Script);
    assert_eq!((caller.turns, caller.pause), (2, Duration::from_mins(1)));
    assert!(caller.speaks_first && caller.interrupt);
    let [hello, order] = &caller.lines[..] else {
        panic!("{caller:?}")
    };
    assert!(hello.audio.duration() > Duration::from_secs(2));
    assert_eq!(hello.name, "builtin:hello");
    assert!(hello.expected_words.is_empty() && hello.expected_tool.is_none());
    assert_eq!(order.audio.duration(), Duration::from_millis(700));
    assert_eq!(order.text.as_deref(), Some("Where is my order?"));
    assert_eq!(
        order.expected_words,
        [vec!["order", "delivery"], vec!["tomorrow"]]
    );
    assert_eq!(order.expected_tool.as_deref(), Some("lookup_order"));
    let expect = &support.expect;
    assert!(expect.reply);
    assert_eq!(expect.yield_within, Some(Duration::from_secs(2)));
    assert_eq!(expect.word_error_below, Some(0.3));
}

#[test]
fn number_of_turns_may_differ_from_the_number_of_lines() {
    let line = "[[targets.support.caller.lines]]\naudio = \"builtin:hello\"\n";
    for (turns, expected) in [
        ("", 3),
        ("caller.turns = 2\n", 2),
        ("caller.turns = 7\n", 7),
    ] {
        let settings = format!("caller.mode = \"script\"\n{turns}{}", line.repeat(3));
        let config = read(&target_with(&settings), &CREDENTIALS);
        assert_eq!(config.targets["support"].caller.turns, expected);
    }
}

#[test]
fn pass_through_expects_no_reply_unless_it_is_set() {
    let expect = |settings: &str| {
        read(&target_with(settings), &CREDENTIALS).targets["support"]
            .expect
            .reply
    };
    assert!(expect(""));
    assert!(!expect("caller.mode = \"pass_through\""));
    assert!(!expect(
        "caller.mode = \"pass_through\"\nexpect.reply = false"
    ));
    assert_snapshot!(error_of(&target_with(
        "caller.mode = \"pass_through\"\nexpect.reply = true"
    )));
}

#[test]
fn script_without_lines_and_lines_without_script_are_reported() {
    assert_snapshot!(error_of(&target_with("caller.mode = \"script\"")));
    let empty = error_of(&target_with("caller = { mode = \"script\", lines = [] }"));
    assert!(
        empty.contains("a script needs at least one line"),
        "{empty}"
    );
    assert_snapshot!(error_of(&target_with(
        "[[targets.support.caller.lines]]\naudio = \"builtin:hello\""
    )));
}

#[test]
fn mode_in_the_environment_replaces_the_script_of_the_file() {
    let mut variables = CREDENTIALS.to_vec();
    variables.push(("LIVEKIT_CANARY__targets__support__caller__mode", "echo"));
    let script = "caller.mode = \"script\"\n\
                  [[targets.support.caller.lines]]\naudio = \"builtin:hello\"\n\
                  [[targets.support.caller.lines]]\naudio = \"builtin:hello\"";
    let config = read(&target_with(script), &variables);
    let caller = &config.targets["support"].caller;
    assert_eq!((caller.turns, caller.lines.len()), (1, 0));
}

#[test]
fn settings_of_the_caller_that_contradict_its_mode_are_reported() {
    assert_snapshot!(error_of(&target_with(
        "caller = { mode = \"pass_through\", speaks_first = true, interrupt = true }\nexpect.word_error_below = 0.5"
    )));
    assert_snapshot!(error_of(&target_with(
        "caller.speaks_first = true\nexpect = { yield_within = \"1s\", word_error_below = 0 }"
    )));
}

#[test]
fn expectations_that_contradict_each_other_are_reported() {
    let script = "caller.mode = \"script\"\nexpect = { reply = false, word_error_below = 0.2 }\n\
                  [[targets.support.caller.lines]]\naudio = \"builtin:hello\"\nexpect.words = [\"help\"]";
    assert_snapshot!(error_of(&target_with(script)));
}

#[test]
fn mistakes_in_the_lines_of_a_script_are_reported() {
    assert_snapshot!(error_of(&target_with(
        r#"caller.mode = "script"
[[targets.support.caller.lines]]
text = "?!"
expect.words = ["help|", 3, ["a"]]
expect.tool = " "
[[targets.support.caller.lines]]
audio = "builtin:goodbye"
expect.words = "help"
expect.word = ["help"]
[[targets.support.caller.lines]]
audio = ["a.wav"]
expect = "help"
"#
    )));
    assert_snapshot!(error_of(&target_with(
        "caller = { mode = \"script\", lines = \"a.wav\" }"
    )));
    assert_snapshot!(error_of(&target_with(
        "caller = { mode = \"script\", lines = [\"a.wav\"] }"
    )));
    let many = "[[targets.support.caller.lines]]\naudio = \"builtin:hello\"\n".repeat(21);
    assert_snapshot!(error_of(&target_with(&format!(
        "caller.mode = \"script\"\n{many}"
    ))));
}

#[test]
fn audio_files_that_cannot_be_used_are_reported_with_the_reason() {
    let files = [
        "missing.wav",
        "",
        "canary.toml",
        "cd.wav",
        "short.wav",
        "/dev/zero",
    ];
    let lines: Vec<String> = files
        .iter()
        .map(|file| format!("[[targets.support.caller.lines]]\naudio = \"{file}\""))
        .collect();
    let folder = folder_with(&target_with(&format!(
        "caller.mode = \"script\"\n{}",
        lines.join("\n")
    )));
    wav(&folder.path().join("cd.wav"), 44_100, 500);
    wav(&folder.path().join("short.wav"), 8_000, 50);
    let run = canary(
        folder.path(),
        ["check", "--config", "canary.toml"],
        &CREDENTIALS,
    );
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert_snapshot!(run.stderr);
    // Commands that never connect play nothing.
    let rules = canary(folder.path(), ["rules", "--config", "canary.toml"], &[]);
    assert!(!rules.stderr.contains("missing.wav"), "{}", rules.output());
}

#[test]
fn objective_for_replies_is_read() {
    let config = read(
        &target_with("objectives = { reply = 0.9, reply_within = \"3s\" }"),
        &CREDENTIALS,
    );
    let objectives = &config.targets["support"].objectives;
    assert!((objectives.reply - 0.9).abs() < 1e-9);
    assert_eq!(objectives.reply_within, Duration::from_secs(3));
}

#[test]
fn ambiguous_project_is_reported() {
    assert_snapshot!(error_of(
        "[projects.a]\n[projects.b]\n[targets.support]\nagent_name = \"x\"\n"
    ));
}

#[test]
fn contradictory_and_missing_credentials_are_reported() {
    assert_snapshot!(error_with(
        "[projects.acme]\nurl = \"wss://a.example\"\napi_key = \"\"\napi_secret = \"x\"\napi_secret_file = \"y\"\n[projects.other]\n",
        &[]
    ));
}

#[test]
fn unusable_secret_files_are_reported() {
    assert_snapshot!(error_of(
        "[projects.acme]\napi_key_file = \"canary.toml.missing\"\napi_secret_file = \"/dev/null\"\n"
    ));
    let empty = tempfile::NamedTempFile::new().unwrap();
    let empty = empty.path().display();
    let error = error_of(&format!(
        "[projects.acme]\napi_key = \"key\"\napi_secret_file = \"{empty}\"\n"
    ));
    assert!(
        error.contains("api_secret_file: this file is empty"),
        "{error}"
    );
}

#[test]
fn certificate_file_without_certificates_is_reported() {
    assert_snapshot!(error_of("[projects.acme]\nca_file = \"canary.toml\"\n"));
}

/// A part of an address and a routing key, which no message may show.
const HOOK: &str = "hook-that-must-stay-secret";

fn error_of_channel(keys: &str) -> String {
    let settings = format!("{}[notify.team]\n{keys}\n", target_with(""));
    let error = error_of(&settings);
    assert!(!error.contains(HOOK), "{error}");
    error
}

#[test]
fn mistakes_of_a_channel_are_reported() {
    for (name, keys) in [
        ("no_kind", "url = \"https://hooks.example/a\"".to_owned()),
        ("unknown_kind", "kind = \"webhok\"".to_owned()),
        ("no_url", "kind = \"heartbeat\"".to_owned()),
        ("another_scheme", format!("kind = \"webhook\"\nurl = \"slack://{HOOK}\"")),
        ("a_relative_url", format!("kind = \"webhook\"\nurl = \"{HOOK}\"")),
        ("a_fragment", format!("kind = \"webhook\"\nurl = \"https://hooks.example/#{HOOK}\"")),
        ("two_urls", format!("kind = \"webhook\"\nurl = \"https://hooks.example/{HOOK}\"\nurl_file = \"url\"")),
        ("a_missing_file", "kind = \"webhook\"\nurl_file = \"missing\"".to_owned()),
        ("no_routing_key", "kind = \"pagerduty\"".to_owned()),
        ("keys_of_other_kinds", format!("kind = \"pagerduty\"\nrouting_key = \"{HOOK}\"\nurl_file = \"url\"\nformat = \"slack\"")),
        ("a_key_of_pagerduty", format!("kind = \"webhook\"\nurl = \"https://hooks.example\"\nrouting_key = \"{HOOK}\"")),
        ("unknown_targets", "kind = \"heartbeat\"\nurl = \"https://hooks.example\"\ntargets = [\"suport\", \"other\"]".to_owned()),
        ("no_targets", "kind = \"heartbeat\"\nurl = \"https://hooks.example\"\ntargets = []".to_owned()),
        ("a_long_timeout", "kind = \"heartbeat\"\nurl = \"https://hooks.example\"\ntimeout = \"2m\"".to_owned()),
        ("an_unknown_key", "kind = \"heartbeat\"\nurl = \"https://hooks.example\"\nevery = \"2m\"".to_owned()),
    ] {
        assert_snapshot!(format!("channel_with_{name}"), error_of_channel(&keys));
    }
}

#[test]
fn channels_are_read_with_their_defaults_and_their_files() {
    let settings = format!(
        "{}[notify.team]\nkind = \"webhook\"\nurl_file = \"hook\"\n\
         [notify.pager]\nkind = \"pagerduty\"\ntargets = [\"support\"]\ntimeout = \"3s\"\n",
        target_with("")
    );
    let folder = folder_with(&settings);
    let hook = format!("https://user:pass@hooks.example/{HOOK}?x=1");
    std::fs::write(folder.path().join("hook"), format!("{hook}\n")).unwrap();
    let mut variables = CREDENTIALS.to_vec();
    variables.push(("LIVEKIT_CANARY__notify__pager__routing_key", HOOK));
    let config = read_file(&folder.path().join("canary.toml"), &variables);
    let team = &config.notify["team"];
    let ChannelKind::Webhook { url, format } = &team.kind else {
        panic!("{team:?}");
    };
    assert_eq!(url.expose_secret(), hook);
    assert_eq!(*format, WebhookFormat::Json);
    assert_eq!(team.timeout, Duration::from_secs(10));
    assert!(team.reports("support") && team.reports("other"));
    let pager = &config.notify["pager"];
    let ChannelKind::Pagerduty { url, routing_key } = &pager.kind else {
        panic!("{pager:?}");
    };
    assert_eq!(url.as_str(), "https://events.pagerduty.com/v2/enqueue");
    assert_eq!(routing_key.expose_secret(), HOOK);
    assert_eq!(pager.timeout, Duration::from_secs(3));
    assert!(pager.reports("support") && !pager.reports("other"));
    assert!(!format!("{config:?}").contains(HOOK));
    // Commands that send nothing read no secret.
    let file = folder.path().join("canary.toml");
    std::fs::remove_file(folder.path().join("hook")).unwrap();
    let draft = RawConfig::read(Some(&file), [])
        .unwrap()
        .without_credentials();
    assert_eq!(draft.validate().unwrap().notify.len(), 2);
}

/// The sample has no channel, because each needs an address. Its example shows every key.
#[test]
fn sample_of_a_channel_shows_every_key() {
    let sample = std::fs::read_to_string(sample()).unwrap();
    let (_, example) = sample.split_once("#[notify.team]\n").unwrap();
    let (example, _) = example.split_once("\n\n").unwrap();
    for kind in ["webhook", "pagerduty", "heartbeat"] {
        let error = error_of_channel(&format!("kind = \"{kind}\"\nqqqqqq = 1"));
        let (_, known) = error.split_once("known keys: ").unwrap();
        for key in known.lines().next().unwrap().split(", ") {
            assert!(
                example.contains(&format!("\n#{key} =")) || key == "kind",
                "{key}"
            );
        }
    }
    let keys = example.lines().filter_map(|line| line.strip_prefix('#'));
    let keys = keys.filter(|line| !line.starts_with(' '));
    let keys = keys.filter(|line| !line.contains("_file") && !line.contains("routing_key"));
    let settings = format!(
        "{}[notify.team]\n{}\n",
        target_with(""),
        keys.collect::<Vec<_>>().join("\n")
    );
    assert_eq!(
        read(&settings, &CREDENTIALS).notify["team"].timeout,
        Channel::DEFAULT_TIMEOUT
    );
}

#[test]
fn address_of_the_page_that_no_link_can_be_made_of_is_reported() {
    for (name, url) in [
        ("relative", "canary.example.com"),
        ("another_scheme", "ftp://canary.example.com"),
        ("a_query", "https://canary.example.com/?a=b"),
        ("credentials", "https://user:pass@canary.example.com/"),
    ] {
        let error = error_of(&format!("[http]\nexternal_url = \"{url}\"\n"));
        assert_snapshot!(format!("external_url_with_{name}"), error);
    }
    let settings = format!(
        "[http]\nexternal_url = \"https://canary.example.com/live\"\n{}",
        target_with("")
    );
    let url = read(&settings, &CREDENTIALS)
        .daemon
        .http
        .external_url
        .unwrap();
    assert_eq!(url.as_str(), "https://canary.example.com/live");
}

#[test]
fn cloud_project_of_another_form_is_reported() {
    assert_snapshot!(error_of("[projects.acme]\ncloud_project = \"acme\"\n"));
}

#[test]
fn mistake_in_the_environment_names_its_variable() {
    let name = "LIVEKIT_CANARY__targets__support__batch__rooms";
    let unknown = "LIVEKIT_CANARY__targets__support__bach__rooms";
    let mut variables = CREDENTIALS.to_vec();
    variables.extend([(name, "five"), (unknown, SECRET)]);
    assert_snapshot!(error_with(&target_with(""), &variables));
}

#[test]
fn environment_overrides_any_key_of_the_file() {
    let mut variables = CREDENTIALS.to_vec();
    variables.extend([
        ("LIVEKIT_CANARY__targets__support__batch__rooms", "5"),
        ("LIVEKIT_CANARY__TARGETS__SUPPORT__EXPECT__REPLY", "true"),
        (
            "LIVEKIT_CANARY__targets__support__participant__attributes__Tier",
            "gold",
        ),
        ("LIVEKIT_CANARY__projects__big_one__api_secret", "12345"),
    ]);
    let settings = "[projects.big-one]\napi_secret_file = \"missing\"\n";
    let config = read(
        &format!("{settings}{}", target_with("batch.rooms = 2")),
        &variables,
    );
    let support = &config.targets["support"];
    assert_eq!(support.batch.rooms, 5);
    assert!(support.expect.reply);
    assert_eq!(
        support.participant.attributes,
        BTreeMap::from([("Tier".to_owned(), "gold".to_owned())])
    );
    assert_eq!(
        config.projects["big-one"].api_secret.expose_secret(),
        "12345"
    );
}

#[test]
fn plain_variables_are_used_only_if_the_file_sets_no_value() {
    let config = read(
        "[projects.acme]\nurl = \"ws://here:7880\"\napi_key = 5\n",
        &CREDENTIALS,
    );
    let acme = &config.projects["acme"];
    assert_eq!(acme.url.as_str(), "ws://here:7880/");
    assert_eq!(acme.api_key.expose_secret(), "5");
    assert_eq!(acme.api_secret.expose_secret(), SECRET);
}

#[test]
fn white_space_around_a_credential_is_removed() {
    let folder = folder_with("[projects.acme]\napi_secret_file = \"secret\"\n");
    std::fs::write(folder.path().join("secret"), format!("\n {SECRET} \r\n\n")).unwrap();
    let key = format!(" {KEY}\n");
    let variables = [
        ("LIVEKIT_URL", " \"wss://canary.example\" \n"),
        ("LIVEKIT_API_KEY", key.as_str()),
    ];
    let config = read_file(&folder.path().join("canary.toml"), &variables);
    let acme = &config.projects["acme"];
    assert_eq!(acme.url.as_str(), "wss://canary.example/");
    assert_eq!(acme.api_key.expose_secret(), KEY);
    assert_eq!(acme.api_secret.expose_secret(), SECRET);
}

#[test]
fn text_that_is_no_credential_is_refused_by_its_name_and_not_printed() {
    let folder = folder_with(
        "[projects.acme]\nurl = \"wss://a.example\"\napi_key_file = \"pair\"\napi_secret_file = \"quoted\"\n",
    );
    let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
    write("pair", format!("{KEY}\n{SECRET}\n"));
    write("quoted", format!("\"{SECRET}\"\n"));
    let run = canary(folder.path(), ["check", "--config", "canary.toml"], &[]);
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert_snapshot!(run.stderr);
    let (key, secret) = (format!("{KEY}: {SECRET}"), format!("'{SECRET}'"));
    let variables = [
        ("LIVEKIT_URL", "wss://a.example"),
        ("LIVEKIT_API_KEY", key.as_str()),
        ("LIVEKIT_API_SECRET", secret.as_str()),
    ];
    assert_snapshot!(
        "credentials_of_the_environment_are_refused",
        error_with(&target_with(""), &variables)
    );
}

#[test]
fn agent_name_with_white_space_around_it_is_reported() {
    let error = error_of("[targets.support]\nagent_name = \"my-agent \"\n");
    assert!(
        error.contains("agent_name: it has white space around it"),
        "{error}"
    );
}

/// Only the names of projects, targets and channels have `-` for `_`.
#[test]
fn variable_can_set_a_key_of_two_words_in_every_table() {
    let folder = folder_with(&target_with(""));
    let mut variables = CREDENTIALS.to_vec();
    variables.push(("LIVEKIT_CANARY__lifetime__startup_delay", "7m"));
    variables.push(("LIVEKIT_CANARY__notify__on_call__kind", "webhook"));
    variables.push((
        "LIVEKIT_CANARY__notify__on_call__url",
        "https://example.com",
    ));
    let config = read_file(&folder.path().join("canary.toml"), &variables);
    assert_eq!(config.daemon.lifetime.startup_delay, Duration::from_mins(7));
    assert!(config.notify.contains_key("on-call"));
}

/// Compose and Helm pass a value that is not set on as an empty one.
#[test]
fn empty_variable_counts_as_unset() {
    let folder = folder_with(&target_with(
        "batch.rooms = 2\nparticipant.attributes = { tier = \"gold\" }",
    ));
    let file = folder.path().join("canary.toml");
    let mut variables = CREDENTIALS.to_vec();
    variables.extend(
        [
            "LIVEKIT_CANARY__targets__support__agent_name",
            "LIVEKIT_CANARY__targets__support__batch__rooms",
            "LIVEKIT_CANARY__targets__support__participant__attributes__tier",
            "LIVEKIT_CANARY__targets__support__dispatch__metadata",
            "LIVEKIT_CANARY__targets__other__agent_name",
            "LIVEKIT_CANARY__projects__other__api_key",
            "LIVEKIT_CANARY__http__listen",
            "LIVEKIT_CANARY__history__dir",
        ]
        .map(|name| (name, "")),
    );
    let config = read_file(&file, &variables);
    assert_eq!(config.targets.len(), 1);
    assert_eq!(config.projects.len(), 1);
    let unset = read_file(&file, &CREDENTIALS);
    assert_eq!(config.targets["support"], unset.targets["support"]);
    assert_eq!(config.daemon, unset.daemon);
    // White space alone is nothing either.
    variables.push(("LIVEKIT_CANARY__targets__support__batch__rooms", " \n"));
    assert_eq!(
        read_file(&file, &variables).targets["support"].batch.rooms,
        2
    );
}

#[test]
fn quotation_marks_around_a_variable_are_removed_if_they_cannot_belong_to_it() {
    let mut variables = CREDENTIALS.to_vec();
    variables.extend([
        (
            "LIVEKIT_CANARY__targets__support__agent_name",
            "\"other-agent\"",
        ),
        ("LIVEKIT_CANARY__targets__support__batch__hold", "'20s' "),
        (
            "LIVEKIT_CANARY__targets__support__dispatch__metadata",
            "\"a JSON string\"",
        ),
        (
            "LIVEKIT_CANARY__targets__support__participant__attributes__tier",
            " gold ",
        ),
    ]);
    let config = read(&target_with(""), &variables);
    let support = &config.targets["support"];
    assert_eq!(support.agent_name.as_deref(), Some("other-agent"));
    assert_eq!(support.batch.hold, Duration::from_secs(20));
    assert_eq!(support.dispatch.metadata, "\"a JSON string\"");
    assert_eq!(support.participant.attributes["tier"], " gold ");
}

#[test]
fn numbers_and_booleans_may_be_strings() {
    let config = read(&target_with("batch.rooms = \"4\""), &CREDENTIALS);
    assert_eq!(config.targets["support"].batch.rooms, 4);
    let config = read(
        &target_with("batch.rooms = 0x4\nexpect.reply = \"yes\""),
        &CREDENTIALS,
    );
    assert_eq!(config.targets["support"].batch.rooms, 4);
    assert!(config.targets["support"].expect.reply);
}

#[test]
fn debug_output_of_the_settings_hides_the_secret() {
    let config = read(&target_with(""), &CREDENTIALS);
    let shown = format!("{config:?}");
    assert!(!shown.contains(SECRET) && !shown.contains(KEY), "{shown}");
}

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/canary.toml")
}

#[test]
fn sample_file_shows_the_defaults_of_the_code() {
    let mut variables = CREDENTIALS.to_vec();
    variables.push(("LIVEKIT_CANARY__targets__support__agent_name", "my-agent"));
    let config = read_file(&sample(), &variables);
    let expected = Target {
        project: "main".to_owned(),
        agent_name: Some("my-agent".to_owned()),
        ..Target::default()
    };
    assert_eq!(config.targets["support"], expected);
    let project = &config.projects["main"];
    assert_eq!(project.api_timeout, Project::DEFAULT_API_TIMEOUT);
    assert_eq!(project.max_rooms, Project::DEFAULT_MAX_ROOMS);
    assert_eq!(project.budget, Budget::default());
    assert_eq!(project.backoff, Backoff::default());
    let daemon = DaemonSettings {
        history: HistorySettings {
            dir: sample().with_file_name("state"),
            ..HistorySettings::default()
        },
        ..DaemonSettings::default()
    };
    assert_eq!(config.daemon, daemon);
    assert_eq!(config.alerts, Alerts::default());

    let folder = folder_with(&target_with(""));
    let bare = read_file(&folder.path().join("canary.toml"), &CREDENTIALS);
    assert_eq!(bare.daemon.history.dir, folder.path().join("state"));
    let code = Target {
        project: "default".to_owned(),
        ..expected
    };
    assert_eq!(
        bare.targets["support"], code,
        "the reader's defaults are the types'"
    );
    assert!(bare.targets["support"].late_agent_window > Duration::ZERO);
}

#[test]
fn runbook_address_that_no_link_can_be_made_of_is_reported() {
    for (name, url) in [
        ("relative", "docs/alerts.md"),
        ("another_scheme", "file:///docs/alerts.md"),
        ("a_fragment", "https://wiki.example/alerts#all"),
        ("braces", "https://wiki.example/?page={{ x }}"),
    ] {
        let error = error_of(&format!("[alerts]\nrunbook_base_url = \"{url}\"\n"));
        assert_snapshot!(format!("runbook_address_with_{name}"), error);
    }
}

/// The error about an unknown key lists the known keys of the table.
#[test]
fn sample_file_shows_every_key() {
    let sample = std::fs::read_to_string(sample()).unwrap();
    let tables: Vec<&str> = sample
        .lines()
        .filter_map(|line| line.strip_prefix('[')?.strip_suffix(']'))
        .collect();
    for table in tables
        .iter()
        .filter(|table| !table.ends_with(".attributes"))
    {
        let broken = sample.replace(&format!("[{table}]"), &format!("[{table}]\nqqqqqq = 1"));
        let error = error_of(&broken);
        let (_, after) = error.split_once("unknown key").unwrap();
        let (_, known) = after.split_once("known keys: ").unwrap();
        for key in known.lines().next().unwrap().split(", ") {
            let own = body(&sample, table);
            let shown = own.lines().any(|line| {
                line.trim_start_matches('#')
                    .starts_with(&format!("{key} ="))
            }) || tables.contains(&format!("{table}.{key}").as_str())
                || sample.contains(&format!("#[[{table}.{key}]]\n"));
            assert!(shown, "{table}.{key} is not in the sample");
        }
    }
}

/// The sample has no line of a script, because the default mode needs none. Its example shows every key of one.
#[test]
fn sample_of_a_scripted_line_shows_every_key() {
    let sample = std::fs::read_to_string(sample()).unwrap();
    let (_, example) = sample
        .split_once("#[[targets.support.caller.lines]]\n")
        .unwrap();
    let (example, _) = example.split_once("\n[").unwrap();
    let keys = example.lines().filter_map(|line| line.strip_prefix('#'));
    let keys = keys.filter(|line| !line.starts_with(' '));
    let line = keys.collect::<Vec<_>>().join("\n");
    let script = |line: &str| {
        target_with(&format!(
            "caller.mode = \"script\"\n[[targets.support.caller.lines]]\n{line}"
        ))
    };
    let config = read(&script(&line), &CREDENTIALS);
    let caller = &config.targets["support"].caller;
    assert_eq!(caller.lines[0].expected_words[1], ["order", "delivery"]);
    assert_eq!(
        caller.lines[0].expected_tool.as_deref(),
        Some("lookup_order")
    );
    for table in ["", "expect."] {
        let error = error_of(&script(&format!(
            "audio = \"builtin:hello\"\n{table}qqqqqq = 1"
        )));
        let (_, known) = error.split_once("known keys: ").unwrap();
        for key in known.lines().next().unwrap().split(", ") {
            let shown = line.contains(&format!("{key} =")) || line.contains(&format!(".{key}]"));
            assert!(shown, "{table}{key}");
        }
    }
}

/// The lines of one table.
fn body<'a>(text: &'a str, table: &str) -> &'a str {
    let (_, after) = text.split_once(&format!("[{table}]\n")).unwrap();
    after.split("\n[").next().unwrap()
}
