//! The way of an alert: a real Prometheus scrapes a drill and notifies a real Alertmanager, which calls a webhook.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use support::canary::binary;
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
            let notification = read_request(client.unwrap());
            for alert in notification["alerts"].as_array().unwrap() {
                if sender.send(alert.clone()).is_err() {
                    return;
                }
            }
        }
    });
    alerts
}

/// Reads the body of one request, and responds.
fn read_request(mut client: TcpStream) -> Value {
    let mut reader = BufReader::new(client.try_clone().unwrap());
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let line = line.trim_end().to_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let response = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    client.write_all(response.as_bytes()).unwrap();
    serde_json::from_slice(&body).unwrap()
}

/// Writes rules for a canary that is scraped every second and starts a batch every ten seconds.
fn write_fast_rules(dir: &Path) {
    let settings = "alerts.scrape_interval = \"1s\"\n[targets.drill]\nagent_name = \"demo\"\nschedule.every = \"10s\"\n";
    fs::write(dir.join("canary.toml"), settings).unwrap();
    super::write_rules(dir, &["--config", "canary.toml"]);
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

#[expect(
    clippy::too_many_lines,
    reason = "one story, from the drill to the webhook"
)]
fn expect_alert(prometheus_server: &Path) {
    let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [drill_dir, prometheus_dir, alertmanager_dir] =
        folders.each_ref().map(tempfile::TempDir::path);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let hook = listener.local_addr().unwrap();
    let alerts = webhook(listener);
    let [canary, prometheus, alertmanager] = [(); 3].map(|()| free_ports().unwrap());

    // The deployed routes, without their waits, and with the webhook as the receiver of each.
    let deployed = include_str!("../../deploy/prometheus/alertmanager.yml");
    let receivers = ["pages", "tickets", "drills"];
    let routes = receivers.iter().fold(deployed.to_owned(), |text, name| {
        let name = format!("  - name: {name}\n");
        assert!(text.contains(&name), "{text}");
        let hook =
            format!("    webhook_configs: [{{url: 'http://{hook}/', send_resolved: true}}]\n");
        text.replace(&name, &format!("{name}{hook}"))
    });
    let routes = routes.replace(
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

    let listen = format!("--web.listen-address=127.0.0.1:{alertmanager}");
    let arguments = [
        "--config.file=alertmanager.yml",
        "--storage.path=data",
        "--cluster.listen-address=",
        &listen,
    ];
    let program = Path::new("prometheus-alertmanager");
    let alertmanager = start("alertmanager", program, alertmanager_dir, &arguments);
    let listen = format!("--web.listen-address=127.0.0.1:{prometheus}");
    let arguments = [
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        &listen,
    ];
    let prometheus = start("prometheus", prometheus_server, prometheus_dir, &arguments);
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
        "--recover-after",
        "35s",
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
        ("sli", "availability"),
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
