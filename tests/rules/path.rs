//! The way of an alert: a fire drill is scraped by a real Prometheus, which tells a real Alertmanager, which calls a webhook.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use serde_json::Value;

/// Every alert of every notification that is posted to `listener`.
fn webhook(listener: TcpListener) -> Receiver<Value> {
    let (sender, alerts) = channel();
    // Ends with the process.
    thread::spawn(move || {
        for client in listener.incoming() {
            let notification = take(client.unwrap());
            for alert in notification["alerts"].as_array().unwrap() {
                if sender.send(alert.clone()).is_err() {
                    return;
                }
            }
        }
    });
    alerts
}

/// One request with a body, answered.
fn take(mut client: TcpStream) -> Value {
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
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    client.write_all(answer.as_bytes()).unwrap();
    serde_json::from_slice(&body).unwrap()
}

/// The rules for a canary that is scraped every second and opens a batch every ten.
fn rules(dir: &Path) {
    let settings = "alerts.scrape_interval = \"1s\"\n[targets.drill]\nagent_name = \"demo\"\nschedule.every = \"10s\"\n";
    std::fs::write(dir.join("canary.toml"), settings).unwrap();
    super::write_rules(dir, &["--config", "canary.toml"]);
}

#[test]
fn drill_makes_its_alert_arrive_and_resolve_through_prometheus_2() {
    let [two, _] = &super::programs().servers;
    alert_arrives_and_resolves(two);
}

#[test]
fn drill_makes_its_alert_arrive_and_resolve_through_prometheus_3() {
    let [_, three] = &super::programs().servers;
    alert_arrives_and_resolves(three);
}

fn alert_arrives_and_resolves(prometheus_server: &Path) {
    let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [drill_dir, prometheus_dir, alertmanager_dir] =
        folders.each_ref().map(tempfile::TempDir::path);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let hook = listener.local_addr().unwrap();
    let alerts = webhook(listener);
    let [canary, prometheus, alertmanager] = [(); 3].map(|()| free_port());

    // The routes that are deployed, but without their waits and with the webhook behind each.
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
    std::fs::write(alertmanager_dir.join("alertmanager.yml"), routes).unwrap();
    rules(prometheus_dir);
    std::fs::write(
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

    let args = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
    let mut am_args = args(&[
        "--config.file=alertmanager.yml",
        "--storage.path=data",
        "--cluster.listen-address=",
    ]);
    am_args.push(format!("--web.listen-address=127.0.0.1:{alertmanager}"));
    let _alertmanager = Process::start(alertmanager_dir, "prometheus-alertmanager", &am_args);
    let mut prometheus_args = args(&["--config.file=prometheus.yml", "--storage.tsdb.path=data"]);
    prometheus_args.push(format!("--web.listen-address=127.0.0.1:{prometheus}"));
    let _prometheus = Process::start(prometheus_dir, prometheus_server, &prometheus_args);
    let mut drill_args = args(&[
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
    ]);
    drill_args.push(format!("127.0.0.1:{canary}"));
    let _drill = Process::start(drill_dir, env!("CARGO_BIN_EXE_livekit-canary"), &drill_args);

    let wait = |status: &str| -> Value {
        loop {
            let alert = alerts
                .recv_timeout(Duration::from_mins(2))
                .unwrap_or_else(|_| {
                    let log = |dir: &Path| std::fs::read_to_string(dir.join("log")).unwrap();
                    panic!(
                        "no alert is {status}\n{}\n{}\n{}",
                        log(drill_dir),
                        log(prometheus_dir),
                        log(alertmanager_dir)
                    )
                });
            if alert["status"] == status && alert["labels"]["alertname"] == "AgentFailing" {
                return alert;
            }
        }
    };
    let fired = wait("firing");
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
    assert_eq!(fired["annotations"]["runbook"], "README.md#alerts");
    let summary = fired["annotations"]["summary"].as_str().unwrap();
    assert!(summary.starts_with(target), "{fired}");
    let resolved = wait("resolved");
    assert_eq!(resolved["labels"], fired["labels"]);
}
