//! The way of an alert: a real Prometheus scrapes a canary and notifies a real Alertmanager, which calls a webhook.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use support::canary::binary;
use support::http;
use support::process::{Process, command, free_ports};

/// Starts a program in `dir`, with its log there.
fn start(name: &str, program: &Path, dir: &Path, arguments: &[&str]) -> Process {
    let mut command = command(program.to_str().unwrap());
    command.args(arguments).current_dir(dir);
    Process::spawn(name, command, dir).unwrap()
}

/// Receives all alerts of all notifications that Alertmanager posts to `listener`.
fn webhook(listener: TcpListener) -> Receiver<Value> {
    let (sender, alerts) = channel();
    // The thread ends with the process.
    thread::spawn(move || {
        for client in listener.incoming() {
            let body = http::receive(client.unwrap(), "200 OK", "").unwrap();
            let notification: Value = serde_json::from_slice(&body).unwrap();
            for alert in notification["alerts"].as_array().unwrap() {
                if sender.send(alert.clone()).is_err() {
                    return;
                }
            }
        }
    });
    alerts
}

/// Answers scrapes with the series of an outage of the agent, while it is `open`, and reports each scrape.
fn scraped(listener: TcpListener, open: Arc<AtomicBool>, scrapes: Sender<()>) {
    // The thread ends with the process.
    thread::spawn(move || {
        for client in listener.incoming() {
            let open = open.load(Ordering::SeqCst);
            let mut text = format!(
                "livekit_canary_build_info{{version=\"1\"}} 1
livekit_canary_target_paused{{target=\"support\"}} 0
livekit_canary_incident_open{{target=\"support\",fault=\"agent\"}} {}
livekit_canary_incident_open{{target=\"support\",fault=\"service\"}} 0
",
                u8::from(open)
            );
            if open {
                text += "livekit_canary_incident_info{target=\"support\",incident=\"one\",reason=\"agent_silent\",share=\"100 %\",differs=\"\",url=\"\"} 1\n";
            }
            http::receive(client.unwrap(), "200 OK", &text).unwrap();
            if scrapes.send(()).is_err() {
                return;
            }
        }
    });
}

/// The deployed configuration of Alertmanager, with this webhook as each receiver.
fn deployed_routes(hook: &str) -> String {
    let deployed = include_str!("../../deploy/prometheus/alertmanager.yml");
    let pager = "    webhook_configs:\n      - url: http://pager:9094/\n";
    assert!(deployed.contains(pager), "{deployed}");
    let deployed = deployed.replace(pager, "");
    let receivers = ["pages", "tickets", "drills"];
    receivers.iter().fold(deployed, |text, name| {
        let name = format!("  - name: {name}\n");
        assert!(text.contains(&name), "{text}");
        let hook =
            format!("    webhook_configs: [{{url: 'http://{hook}/', send_resolved: true}}]\n");
        text.replace(&name, &format!("{name}{hook}"))
    })
}

fn start_alertmanager(dir: &Path, port: u16) -> Process {
    let listen = format!("--web.listen-address=127.0.0.1:{port}");
    let arguments = [
        "--config.file=alertmanager.yml",
        "--storage.path=data",
        "--cluster.listen-address=",
        &listen,
    ];
    let program = Path::new("prometheus-alertmanager");
    start("alertmanager", program, dir, &arguments)
}

fn start_prometheus(server: &Path, dir: &Path, port: u16) -> Process {
    let listen = format!("--web.listen-address=127.0.0.1:{port}");
    let arguments = [
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        &listen,
    ];
    start("prometheus", server, dir, &arguments)
}

/// The notification after the page comes with what ends it, and there is no third one.
#[test]
fn page_of_an_outage_and_its_end_leave_within_a_minute_through_prometheus_2() {
    let [two, _] = &super::programs().servers;
    expect_page_within_a_minute(two);
}

#[test]
fn page_of_an_outage_and_its_end_leave_within_a_minute_through_prometheus_3() {
    let [_, three] = &super::programs().servers;
    expect_page_within_a_minute(three);
}

/// With the files of `deploy/prometheus` as they are, but for the addresses.
fn expect_page_within_a_minute(prometheus_server: &Path) {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let [prometheus_dir, alertmanager_dir] = folders.each_ref().map(tempfile::TempDir::path);
    let [hook, canary] = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let [hook_address, canary_address] = [&hook, &canary].map(|it| it.local_addr().unwrap());
    let alerts = webhook(hook);
    let open = Arc::new(AtomicBool::new(false));
    let (sender, scrapes) = channel();
    scraped(canary, Arc::clone(&open), sender);
    let [prometheus, alertmanager] = [(); 2].map(|()| free_ports().unwrap());

    let routes = deployed_routes(&hook_address.to_string());
    fs::write(alertmanager_dir.join("alertmanager.yml"), routes).unwrap();
    let deployed = include_str!("../../deploy/prometheus/prometheus.yml")
        .replace("alertmanager:9093", &format!("127.0.0.1:{alertmanager}"))
        .replace("canary:9787", &canary_address.to_string());
    fs::write(prometheus_dir.join("prometheus.yml"), deployed).unwrap();
    super::write_rules(prometheus_dir, &[]);
    let rules = prometheus_dir.join("rules.yml");
    fs::rename(rules, prometheus_dir.join("livekit-canary.rules.yml")).unwrap();
    let alertmanager = start_alertmanager(alertmanager_dir, alertmanager);
    let prometheus = start_prometheus(prometheus_server, prometheus_dir, prometheus);

    scrapes.recv_timeout(Duration::from_mins(1)).unwrap();
    for (is_open, status) in [(true, "firing"), (false, "resolved")] {
        open.store(is_open, Ordering::SeqCst);
        let alert = alerts
            .recv_timeout(Duration::from_mins(1))
            .unwrap_or_else(|_| {
                let logs = [&prometheus, &alertmanager].map(|it| it.log().unwrap());
                panic!("no alert is {status}\n{}", logs.join("\n"))
            });
        assert_eq!(alert["status"], status, "{alert}");
        assert_eq!(alert["labels"]["alertname"], "AgentFailing", "{alert}");
        assert_eq!(alert["labels"]["region"], "local", "{alert}");
        if is_open {
            let summary = "support: the agent fails: 100 % of its rooms, mostly agent_silent";
            assert_eq!(alert["annotations"]["summary"], summary);
        }
    }
}

/// Writes rules for a canary that is scraped and evaluated every second, and starts a batch every ten seconds.
fn write_fast_rules(dir: &Path) {
    let settings = "alerts.scrape_interval = \"1s\"\n[targets.drill]\nagent_name = \"demo\"\nschedule.every = \"10s\"\n";
    fs::write(dir.join("canary.toml"), settings).unwrap();
    super::write_rules(dir, &["--config", "canary.toml"]);
    let rules = dir.join("rules.yml");
    let text = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, text.replace("interval: 15s\n", "interval: 1s\n")).unwrap();
}

#[test]
fn alert_of_a_drill_arrives_and_resolves_through_prometheus_2() {
    let [two, _] = &super::programs().servers;
    expect_alert(two);
}

#[test]
fn alert_of_a_drill_arrives_and_resolves_through_prometheus_3() {
    let [_, three] = &super::programs().servers;
    expect_alert(three);
}

fn expect_alert(prometheus_server: &Path) {
    let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [drill_dir, prometheus_dir, alertmanager_dir] =
        folders.each_ref().map(tempfile::TempDir::path);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let hook = listener.local_addr().unwrap();
    let alerts = webhook(listener);
    let [canary, prometheus, alertmanager] = [(); 3].map(|()| free_ports().unwrap());

    // Without the waits of tickets, because a drill is none of the pages.
    let routes = deployed_routes(&hook.to_string()).replace(
        "  receiver: tickets\n  group_by",
        "  receiver: tickets\n  group_wait: 0s\n  group_interval: 1s\n  group_by",
    );
    fs::write(alertmanager_dir.join("alertmanager.yml"), routes).unwrap();
    write_fast_rules(prometheus_dir);
    fs::write(
        prometheus_dir.join("prometheus.yml"),
        format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [rules.yml]
alerting:
  alertmanagers:
  - static_configs:
    - targets: ['127.0.0.1:{alertmanager}']
scrape_configs:
- job_name: livekit-canary
  static_configs:
  - targets: ['127.0.0.1:{canary}']
"
        ),
    )
    .unwrap();

    let alertmanager = start_alertmanager(alertmanager_dir, alertmanager);
    let prometheus = start_prometheus(prometheus_server, prometheus_dir, prometheus);
    let listen = format!("127.0.0.1:{canary}");
    let arguments = [
        "drill",
        "agent_left_early",
        "--every",
        "10s",
        "--rooms",
        "2",
        "--after",
        "15s",
        // An outage lasts for half a minute at least.
        "--recover-after",
        "1m",
        "--web.listen-address",
        &listen,
    ];
    let drill = start("drill", &binary(), drill_dir, &arguments);

    let timeout = Duration::from_mins(2);
    let wait_for_alert = |status: &str| -> Value {
        loop {
            let alert = alerts.recv_timeout(timeout).unwrap_or_else(|_| {
                let logs = [&drill, &prometheus, &alertmanager].map(|it| it.log().unwrap());
                panic!("no alert is {status}\n{}", logs.join("\n"))
            });
            if alert["status"] == status && alert["labels"]["alertname"] == "AgentFailing" {
                return alert;
            }
        }
    };
    let fired = wait_for_alert("firing");
    for (label, value) in [
        ("severity", "page"),
        ("component", "livekit-canary"),
        ("fault", "agent"),
        ("job", "livekit-canary"),
    ] {
        assert_eq!(fired["labels"][label], value, "{fired}");
    }
    let target = fired["labels"]["target"].as_str().unwrap();
    assert!(target.starts_with("drill-"), "{fired}");
    assert_eq!(
        fired["annotations"]["runbook_url"],
        "https://github.com/livekit-canary/livekit-canary/blob/main/docs/alerts.md#agentfailing"
    );
    let summary = fired["annotations"]["summary"].as_str().unwrap();
    assert!(summary.starts_with(target), "{fired}");
    let resolved = wait_for_alert("resolved");
    assert_eq!(resolved["labels"], fired["labels"]);
}
