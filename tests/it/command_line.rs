//! What the commands print and how they exit, as far as that needs no LiveKit server.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread;

use insta::assert_snapshot;
use rustix::process::Signal;
use support::canary::{Canary, Finished, binary};
use support::{SECRET, SHORT_TIMEOUT, wait_for};

use crate::canary;

/// Runs `once` or `check` with this URL, from an empty folder.
fn run_with_url(url: &str, args: &[&str]) -> Finished {
    let folder = tempfile::tempdir().unwrap();
    let variables = [
        ("LIVEKIT_URL", url),
        ("LIVEKIT_API_KEY", "devkey"),
        ("LIVEKIT_API_SECRET", SECRET),
    ];
    canary(folder.path(), args, &variables)
}

/// A loopback URL on which no server listens.
fn closed_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("ws://{}", listener.local_addr().unwrap())
}

/// Starts a server that sends this response to every request, and returns its URL.
fn server_that_responds(response: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut request = vec![0; 64 * 1024];
                // The request is small enough for one read, and the response doesn't depend on it.
                let read = stream.read(&mut request).unwrap();
                if read > 0 {
                    stream.write_all(response.as_bytes()).unwrap();
                }
            });
        }
    });
    url
}

const UNAUTHORIZED: &str = "HTTP/1.1 401 Unauthorized\r\ncontent-type: text/plain\r\n\
                            content-length: 13\r\nconnection: close\r\n\r\ninvalid token";
const TOO_MANY: &str = "HTTP/1.1 429 Too Many Requests\r\ncontent-type: text/plain\r\nretry-after: 7\r\n\
                        content-length: 9\r\nconnection: close\r\n\r\nslow down";
const MOVED: &str = "HTTP/1.1 308 Permanent Redirect\r\nlocation: https://livekit.invalid/\r\n\
                     content-length: 0\r\nconnection: close\r\n\r\n";
const PAGE: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\n\
                    content-length: 0\r\nconnection: close\r\n\r\n";
const ROOMS: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\n\
                     content-length: 0\r\nconnection: close\r\n\r\n";

#[test]
fn help_describes_each_command() {
    let folder = tempfile::tempdir().unwrap();
    for (name, args) in [
        ("help", &["--help"][..]),
        ("help_run", &["run", "--help"]),
        ("help_once", &["once", "--help"]),
        ("help_check", &["check", "--help"]),
        ("help_rules", &["rules", "--help"]),
        ("help_demo", &["demo", "--help"]),
        ("help_sandbox", &["sandbox", "--help"]),
        ("help_drill", &["drill", "--help"]),
        ("help_health", &["health", "--help"]),
    ] {
        let run = canary(folder.path(), args, &[]);
        assert_eq!(run.code, Some(0));
        assert_snapshot!(name, run.stdout);
    }
}

#[test]
fn no_flag_takes_a_secret() {
    let folder = tempfile::tempdir().unwrap();
    for flag in ["--api-secret", "--api-key", "--secret", "--token"] {
        let run = canary(folder.path(), ["once", flag, SECRET], &[]);
        assert_eq!(run.code, Some(2));
    }
}

#[test]
fn wrong_usage_exits_2() {
    let folder = tempfile::tempdir().unwrap();
    for args in [
        &["once", "--rooms", "few"][..],
        &["once", "--hold", "15"],
        &["once", "--ramp", "bursts"],
        &["twice"],
        &[],
    ] {
        let run = canary(folder.path(), args, &[]);
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.output());
        assert_eq!(run.stdout, "", "{args:?}");
    }
}

#[test]
fn missing_credentials_name_the_variables() {
    let folder = tempfile::tempdir().unwrap();
    let run = canary(folder.path(), ["once"], &[]);
    assert_eq!(run.code, Some(2));
    assert_snapshot!(run.stderr);
}

#[test]
fn mistake_in_a_flag_names_the_flag() {
    let run = run_with_url(
        "ws://127.0.0.1:1",
        &[
            "once",
            "--agent-name",
            "a",
            "--rooms",
            "6",
            "--max-rooms",
            "5",
            "--join-timeout",
            "0s",
        ],
    );
    assert_eq!(run.code, Some(2));
    assert_snapshot!(run.stderr);
}

/// The limit of five rooms protects a project from its schedule. A number on the command line is a decision.
#[test]
fn rooms_of_the_command_line_raise_the_default_limit_but_not_one_that_is_set() {
    let rooms = [
        "once",
        "--agent-name",
        "a",
        "--rooms",
        "7",
        "--ramp",
        "burst",
    ];
    // The first rooms to fail may end the ramp before the others open.
    let began = |run: &Finished| run.stderr.contains("room 1 of 7: ");
    let run = run_with_url(&closed_port(), &rooms);
    assert_eq!((run.code, began(&run)), (Some(4), true), "{}", run.output());

    let run = run_with_url(
        &closed_port(),
        &[&rooms[..], &["--max-rooms", "6"]].concat(),
    );
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert!(run.stderr.contains("add --max-rooms 7"), "{}", run.stderr);

    let folder = tempfile::tempdir().unwrap();
    let url = closed_port();
    let variables = [
        ("LIVEKIT_URL", url.as_str()),
        ("LIVEKIT_API_KEY", "devkey"),
        ("LIVEKIT_API_SECRET", SECRET),
        ("LIVEKIT_CANARY__projects__default__max_rooms", "6"),
    ];
    let run = canary(folder.path(), rooms, &variables);
    assert_eq!(run.code, Some(2), "{}", run.output());
    let run = canary(
        folder.path(),
        [&rooms[..], &["--max-rooms", "7"]].concat(),
        &variables,
    );
    assert_eq!((run.code, began(&run)), (Some(4), true), "{}", run.output());
}

#[test]
fn result_goes_to_the_file_of_the_flag_and_the_table_to_stdout() {
    let folder = tempfile::tempdir().unwrap();
    let url = closed_port();
    let variables = [
        ("LIVEKIT_URL", url.as_str()),
        ("LIVEKIT_API_KEY", "devkey"),
        ("LIVEKIT_API_SECRET", SECRET),
    ];
    let once = ["once", "--agent-name", "a", "--format", "junit", "--output"];
    let path = folder.path().join("result.xml");
    std::fs::write(&path, "of an earlier run").unwrap();
    let run = canary(
        folder.path(),
        [&once[..], &["result.xml"]].concat(),
        &variables,
    );
    assert_eq!(run.code, Some(4), "{}", run.output());
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(
        written.starts_with("<?xml") && written.contains("unreachable"),
        "{written}"
    );
    assert!(
        run.stdout.contains("unreachable (origin: network)"),
        "{}",
        run.stdout
    );
    assert!(!run.stdout.contains("<?xml"), "{}", run.stdout);

    // No room opens for a result that cannot be written.
    let run = canary(
        folder.path(),
        [&once[..], &["nowhere/result.xml"]].concat(),
        &variables,
    );
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert!(
        run.stderr
            .starts_with("error: cannot write to nowhere/result.xml"),
        "{}",
        run.stderr
    );
    if std::path::Path::new("/dev/full").exists() {
        let run = canary(
            folder.path(),
            [&once[..], &["/dev/full"]].concat(),
            &variables,
        );
        assert_eq!(run.code, Some(4), "{}", run.output());
        assert!(
            run.stderr.contains("cannot write to /dev/full"),
            "{}",
            run.stderr
        );
    }
}

#[test]
fn transcript_without_json_is_reported() {
    let flags = ["once", "--agent-name", "a", "--transcript"];
    let run = run_with_url("ws://127.0.0.1:1", &flags);
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert!(
        run.stderr.contains("--transcript has no effect"),
        "{}",
        run.stderr
    );
}

#[test]
fn check_with_an_agent_name_shows_what_once_would_do() {
    let flags = [
        "check",
        "--agent-name",
        "my-agent",
        "--deployment",
        "staging",
    ];
    let run = run_with_url("ws://127.0.0.1:1", &flags);
    assert_eq!(run.code, Some(0), "{}", run.output());
    assert!(
        run.stdout.contains("target default on project default"),
        "{}",
        run.stdout
    );
    assert!(
        run.stdout
            .contains("my-agent, deployment staging, explicit dispatch"),
        "{}",
        run.stdout
    );

    let run = with_two_targets(&["check", "--agent-name", "other"]);
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert!(
        run.stderr.contains("the settings have several targets"),
        "{}",
        run.stderr
    );
    let run = with_two_targets(&["check", "--agent-name", "other", "--target", "support"]);
    assert_eq!(run.code, Some(0), "{}", run.output());
    assert!(
        run.stdout.contains("other, explicit dispatch"),
        "{}",
        run.stdout
    );
}

#[test]
fn ramp_interval_without_its_ramp_is_reported() {
    let flags = ["once", "--agent-name", "a", "--ramp-interval", "2s"];
    for more in [&[][..], &["--ramp", "burst"]] {
        let run = run_with_url("ws://127.0.0.1:1", &[&flags, more].concat());
        assert_eq!(run.code, Some(2), "{}", run.output());
        assert!(
            run.stderr.contains("--ramp-interval has no effect"),
            "{}",
            run.stderr
        );
    }
    let run = run_with_url(
        &closed_port(),
        &[&flags[..], &["--ramp", "interval"]].concat(),
    );
    assert_eq!(run.code, Some(4), "{}", run.output());
}

#[test]
fn dotenv_file_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let dotenv = "LIVEKIT_URL=ws://127.0.0.1:1\nLIVEKIT_API_KEY=a\nLIVEKIT_API_SECRET=b\n";
    std::fs::write(folder.path().join(".env"), dotenv).unwrap();
    let run = canary(folder.path(), ["check"], &[]);
    assert_eq!(run.code, Some(2));
}

const TWO_TARGETS: &str = r#"
[projects.acme]
url = "wss://acme.example"
api_key = "key"
api_secret = "scenario-secret-that-no-output-may-ever-hold"
cloud_project = "p_acme"

[targets.support]
agent_name = "support-agent"

[targets.sales]
dispatch.mode = "automatic"
batch = { rooms = 7, stay = "one_by_one", hold = "1m" }
caller.mode = "pass_through"
"#;

fn with_two_targets(args: &[&str]) -> Finished {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("canary.toml"), TWO_TARGETS).unwrap();
    let args = [args, &["--config", "canary.toml"]].concat();
    canary(folder.path(), args, &[])
}

#[test]
fn once_requires_a_target_if_there_are_several() {
    let run = with_two_targets(&["once"]);
    assert_eq!(run.code, Some(2));
    assert_snapshot!(run.stderr);
}

#[test]
fn unknown_target_is_reported() {
    for command in ["once", "check"] {
        let run = with_two_targets(&[command, "--target", "suport"]);
        assert_eq!(run.code, Some(2));
        assert_snapshot!("unknown_target", run.stderr);
    }
}

#[test]
fn check_prints_what_was_understood() {
    let run = with_two_targets(&["check"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    // When the next batches are depends on the day.
    let lasting = |line: &&str| !line.starts_with("  next ");
    let lines: Vec<&str> = run.stdout.lines().filter(lasting).collect();
    assert_snapshot!(lines.join("\n"));
}

#[test]
fn check_counts_the_agents_that_a_ramp_starts_at_the_same_time() {
    let folder = tempfile::tempdir().unwrap();
    // One room's join takes 1 min at most, by the other deadlines here and 5 s for the journal.
    let settings = |ramp: &str| {
        format!(
            "[projects.acme]\nurl = \"ws://a.example\"\napi_key = \"k\"\napi_secret = \"s\"\napi_timeout = \"10s\"\n\
             [targets.support]\nagent_name = \"a\"\n\
             deadlines = {{ signal = \"10s\", media = \"10s\", join = \"15s\", cleanup = \"10s\" }}\n\
             batch = {{ rooms = 3, hold = \"220s\", {ramp} }}\n"
        )
    };
    for (ramp, shown, minutes) in [
        // Held for four minutes, leaving and deletion included, and as long as the joins of the rooms after take.
        ("ramp = \"after_join\"", "3 rooms, after_join", 4 + 5 + 6),
        (
            "ramp = \"interval\", interval = \"1m\"",
            "3 rooms, one every 1m",
            5 + 6 + 7,
        ),
        ("ramp = \"burst\"", "3 rooms, burst", 5 + 5 + 5),
    ] {
        std::fs::write(folder.path().join("canary.toml"), settings(ramp)).unwrap();
        let run = canary(folder.path(), ["check", "--config", "canary.toml"], &[]);
        assert_eq!(run.code, Some(0), "{}", run.output());
        assert!(run.stdout.contains(shown), "{}", run.stdout);
        let worst = format!(" {minutes} agent minutes and ");
        assert!(run.stdout.contains(&worst), "{ramp}: {}", run.stdout);
    }
}

#[test]
fn check_reads_the_web_configuration_file() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write(
        "canary.toml",
        &format!("http.web_config_file = \"web.yml\"\n{TWO_TARGETS}"),
    );
    let check = || canary(folder.path(), ["check", "--config", "canary.toml"], &[]);
    let hash = "$2y$04$......................zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzu";
    write("web.yml", &format!("basic_auth_users:\n  alice: {hash}\n"));
    let run = check();
    assert_eq!(run.code, Some(0), "{}", run.output());
    assert!(run.stdout.starts_with("http on "), "{}", run.stdout);
    assert!(
        run.stdout.contains("web.yml: plain HTTP, 1 user\n"),
        "{}",
        run.stdout
    );
    for (text, mistake) in [
        ("basic_auth_users:\n  alice: hunter2\n", "not a bcrypt hash"),
        (
            "tls_server_config:\n  cert_file: nowhere.crt\n  key_file: a.key\n",
            "cannot be read",
        ),
        ("http_server_config: {}\n", "is not supported"),
    ] {
        write("web.yml", text);
        let run = check();
        assert_eq!(run.code, Some(2), "{}", run.output());
        let named = run.stderr.starts_with("error: web.yml: ") && run.stderr.contains(mistake);
        assert!(named && !run.stderr.contains("hunter2"), "{}", run.stderr);
    }
}

#[test]
fn check_of_one_target_omits_the_others() {
    let run = with_two_targets(&["check", "--target", "sales"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(!run.stdout.contains("support"), "{}", run.stdout);
}

#[test]
fn closed_port_is_inconclusive_and_reported_once() {
    let run = run_with_url(&closed_port(), &["once", "--agent-name", "my-agent"]);
    assert_eq!(run.code, Some(4), "{}", run.output());
    assert_eq!(
        run.stdout.matches("unreachable (origin: network)").count(),
        1,
        "{}",
        run.stdout
    );
}

#[test]
fn unknown_host_is_inconclusive_and_reported_once() {
    let run = run_with_url(
        "wss://nonexistent.invalid",
        &["once", "--agent-name", "my-agent"],
    );
    assert_eq!(run.code, Some(4), "{}", run.output());
    assert_eq!(
        run.stdout.matches("unreachable (origin: network)").count(),
        1,
        "{}",
        run.stdout
    );
    assert!(run.stdout.contains("nonexistent.invalid"), "{}", run.stdout);
}

#[test]
fn rejected_credentials_exit_2() {
    let run = run_with_url(
        &server_that_responds(UNAUTHORIZED),
        &["once", "--agent-name", "my-agent"],
    );
    assert_eq!(run.code, Some(2), "{}", run.output());
    assert!(
        run.stdout.contains("auth_rejected (origin: config)"),
        "{}",
        run.stdout
    );
}

/// livekit-server repeats a key that it does not know. A key can be the secret, by a mistake of the user.
#[test]
fn key_that_the_server_repeats_is_not_printed() {
    const REPEATED: &str = "HTTP/1.1 401 Unauthorized\r\ncontent-length: 33\r\nconnection: close\r\n\r\n\
                            invalid API key: APIkeyOfThisTest";
    let url = server_that_responds(REPEATED);
    let variables = [
        ("LIVEKIT_URL", url.as_str()),
        ("LIVEKIT_API_KEY", "APIkeyOfThisTest"),
        ("LIVEKIT_API_SECRET", SECRET),
        ("RUST_LOG", "trace"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for args in [
        &["check", "--connect"][..],
        &["once", "--agent-name", "a", "--format", "json"],
        &["once", "--dispatch", "automatic"],
    ] {
        let run = canary(folder.path(), args, &variables);
        assert_eq!(run.code, Some(2), "{}", run.output());
        assert!(
            run.stdout.contains("invalid API key: [API key]"),
            "{}",
            run.stdout
        );
        assert!(
            !run.output().contains("APIkeyOfThisTest"),
            "{}",
            run.output()
        );
    }
}

#[test]
fn trace_logs_contain_no_secret() {
    let folder = tempfile::tempdir().unwrap();
    let url = server_that_responds(UNAUTHORIZED);
    let variables = [
        ("LIVEKIT_URL", url.as_str()),
        ("LIVEKIT_API_KEY", "devkey"),
        ("LIVEKIT_API_SECRET", SECRET),
        ("RUST_LOG", "trace"),
    ];
    // Automatic dispatch begins with the signal connection, explicit dispatch with a call: both carry a token.
    for args in [
        &["once", "--agent-name", "a"][..],
        &["once", "--dispatch", "automatic"],
    ] {
        let run = canary(folder.path(), args, &variables);
        assert_eq!(run.code, Some(2), "{}", run.output());
    }
}

#[test]
fn plan_limit_exits_3_and_the_other_rooms_do_not_open() {
    let run = run_with_url(
        &server_that_responds(TOO_MANY),
        &["once", "--agent-name", "my-agent"],
    );
    assert_eq!(run.code, Some(3), "{}", run.output());
    assert!(
        run.stdout.contains("2 rooms did not open"),
        "{}",
        run.stdout
    );
}

#[test]
fn json_of_a_failed_batch_is_complete() {
    let run = run_with_url(
        &closed_port(),
        &["once", "--agent-name", "my-agent", "--format", "json"],
    );
    assert_eq!(run.code, Some(4), "{}", run.output());
    let batch: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(batch["target"], "default");
    assert_eq!(batch["ramp"], "after_join");
    assert_eq!(batch["summary"]["failed"], 1);
    assert_eq!(batch["not_opened"]["rooms"], 2);
    let probe = &batch["probes"][0];
    assert_eq!(probe["outcome"], "failed");
    assert_eq!(probe["reason"], "unreachable");
    assert_eq!(probe["origin"], "network");
    assert!(probe["join_delay_seconds"].is_null());
    assert!(
        probe["milestones"]
            .as_object()
            .unwrap()
            .contains_key("AgentJoined")
    );
    assert_eq!(probe["milestones"]["Started"], 0.0);
}

#[test]
fn progress_without_a_terminal_is_plain_lines() {
    let run = run_with_url(&closed_port(), &["once", "--agent-name", "my-agent"]);
    assert!(!run.output().contains('\u{1b}'), "{}", run.output());
    assert!(
        run.stderr.starts_with("room 1 of 3: canary-"),
        "{}",
        run.stderr
    );
    assert!(
        run.stderr
            .contains("room 1 of 3: failed: unreachable (network)"),
        "{}",
        run.stderr
    );
}

#[test]
fn check_connects_and_prints_why_it_failed() {
    for (url, code, line) in [
        (server_that_responds(ROOMS), 0, "ok"),
        (
            server_that_responds(UNAUTHORIZED),
            2,
            "failed: refused with HTTP 401",
        ),
        (
            server_that_responds(TOO_MANY),
            4,
            "failed: refused with HTTP 429",
        ),
        (
            server_that_responds(MOVED),
            2,
            "failed: refused with HTTP 308: redirected to https://livekit.invalid/",
        ),
        (
            server_that_responds(PAGE),
            2,
            "failed: refused with HTTP 200",
        ),
        (closed_port(), 4, "failed: TCP connection"),
        (
            "wss://nonexistent.invalid".to_owned(),
            4,
            "failed: DNS lookup",
        ),
    ] {
        let run = run_with_url(&url, &["check", "--connect"]);
        assert_eq!(run.code, Some(code), "{}", run.output());
        let line = format!("  connect     {line}");
        assert!(
            run.stdout.contains(&line),
            "{line:?} is not in\n{}",
            run.stdout
        );
    }
}

/// `check --notify` with one channel of this kind and address.
fn check_channel(kind: &str, url: &str) -> Finished {
    let folder = tempfile::tempdir().unwrap();
    let secret = if kind == "pagerduty" {
        format!("routing_key = \"{SECRET}\"\n")
    } else {
        String::new()
    };
    let settings = format!("[notify.team]\nkind = \"{kind}\"\nurl = \"{url}\"\n{secret}");
    std::fs::write(folder.path().join("canary.toml"), settings).unwrap();
    let run = canary(
        folder.path(),
        ["check", "--notify", "--config", "canary.toml"],
        &[
            ("LIVEKIT_URL", "ws://127.0.0.1:1"),
            ("LIVEKIT_API_KEY", "devkey"),
            ("LIVEKIT_API_SECRET", SECRET),
        ],
    );
    assert!(!run.output().contains(SECRET), "{}", run.output());
    run
}

#[test]
fn check_sends_a_message_to_each_channel_and_prints_why_it_was_not_delivered() {
    for (kind, response, code, line) in [
        ("webhook", ROOMS, 0, "delivered in "),
        ("pagerduty", ROOMS, 0, "delivered in "),
        ("heartbeat", ROOMS, 0, "delivered in "),
        ("webhook", UNAUTHORIZED, 2, "failed: 127.0.0.1 answered 401"),
        ("heartbeat", TOO_MANY, 4, "failed: 127.0.0.1 answered 429"),
        (
            "webhook",
            MOVED,
            2,
            "failed: 127.0.0.1 redirects to livekit.invalid",
        ),
    ] {
        let url = server_that_responds(response).replacen("ws", "http", 1);
        let run = check_channel(kind, &format!("{url}/{SECRET}"));
        assert_eq!(run.code, Some(code), "{}", run.output());
        let line = format!("\nnotify team   {line}");
        assert!(
            run.stdout.contains(&line),
            "{line:?} is not in\n{}",
            run.stdout
        );
    }
    let url = closed_port().replacen("ws", "http", 1);
    let run = check_channel("webhook", &url);
    assert_eq!(run.code, Some(4), "{}", run.output());
    let without = run_with_url("ws://127.0.0.1:1", &["check", "--notify"]);
    assert_eq!(without.code, Some(0), "{}", without.output());
    let line = "notify: no channels are configured; add [notify.NAME]\n";
    assert!(without.stdout.contains(line), "{}", without.stdout);
}

#[test]
fn interrupt_ends_a_batch_whose_server_hangs() {
    signal_ends_a_hanging_batch(Signal::INT);
}

#[test]
fn termination_ends_a_batch_whose_server_hangs() {
    signal_ends_a_hanging_batch(Signal::TERM);
}

/// The server accepts connections and never responds. The canary names the room that the server may have created.
fn signal_ends_a_hanging_batch(signal: Signal) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let running = Canary::new(["once", "--agent-name", "my-agent"])
        .envs(&[
            ("LIVEKIT_URL", &url),
            ("LIVEKIT_API_KEY", "devkey"),
            ("LIVEKIT_API_SECRET", SECRET),
        ])
        .start()
        .unwrap();
    let opens = || Ok(running.stderr()?.contains("opens\n").then_some(()));
    wait_for("the first room", SHORT_TIMEOUT, opens).unwrap();
    // Two at once are one: the second does not cut the batch short, so there is a result.
    running.signal(signal).unwrap();
    running.signal(signal).unwrap();
    let run = running.finish().unwrap().expect_code(130).unwrap();
    assert!(run.stdout.contains("aborted"), "{}", run.output());
    let stderr = run.stderr;
    let (_, rest) = stderr.split_once("opens\n").unwrap();
    assert!(rest.starts_with("stopping: deleting the rooms"), "{rest}");
    assert!(
        rest.contains("warning: room canary-"),
        "the room isn't named: {rest}"
    );
}

#[test]
fn closed_stdout_does_not_cause_a_panic() {
    let mut child = Command::new(binary())
        .args(["once", "--agent-name", "my-agent", "--format", "json"])
        .env_clear()
        .env("LIVEKIT_URL", closed_port())
        .env("LIVEKIT_API_KEY", "devkey")
        .env("LIVEKIT_API_SECRET", SECRET)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    assert!(
        !stderr.contains("panicked") && !stderr.contains("internal error"),
        "{stderr}"
    );
}
