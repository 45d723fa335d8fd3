//! The report of the demo agents: one JSON object per line of what they saw, heard and spoke. Tests judge a client by it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::fs::{File, OpenOptions};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Lines that may wait for the disk: a few seconds of 200 rooms.
const QUEUE: usize = 8192;

/// For `--help`: what a report holds.
pub const SYNTAX: &str = "\
A line of the report has room, agent (its identity), event and at; times are Unix seconds. Events:
  job          a worker took the job: metadata
  connecting, connected, left
  caller       a caller's microphone track is there: caller, attributes, name, metadata, room_metadata
  greeted      began, ended
  heard        the caller spoke: began, ended, seconds (of speech), over_agent (it began while the agent spoke)
  replied      began, ended
  interrupted  began, ended (of a reply that the caller interrupted)";

/// What an agent reports.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum ReportEvent {
    Job {
        metadata: String,
    },
    Connecting,
    Connected,
    Caller {
        caller: String,
        attributes: HashMap<String, String>,
        name: String,
        metadata: String,
        room_metadata: String,
    },
    Greeted(SpeechInterval),
    Heard {
        #[serde(flatten)]
        stretch: SpeechInterval,
        /// Seconds of frames with speech.
        seconds: f64,
        over_agent: bool,
    },
    Replied(SpeechInterval),
    /// A reply that the caller interrupted.
    Interrupted(SpeechInterval),
    Left,
}

/// Start and end of speech, in Unix seconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct SpeechInterval {
    began: f64,
    ended: f64,
}

impl SpeechInterval {
    pub(crate) fn of(began: Instant, ended: Instant) -> Self {
        Self {
            began: unix_seconds(began),
            ended: unix_seconds(ended),
        }
    }
}

/// A past instant on the wall clock, in Unix seconds.
fn unix_seconds(at: Instant) -> f64 {
    let now = SystemTime::now() - at.elapsed();
    now.duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

#[derive(Serialize)]
struct ReportLine<'a> {
    room: &'a str,
    agent: &'a str,
    at: f64,
    #[serde(flatten)]
    event: &'a ReportEvent,
}

/// Takes the reports of the agents.
pub(crate) struct AgentReport {
    lines: mpsc::Sender<Vec<u8>>,
}

/// Writes the lines to the file.
pub(crate) struct ReportWriter {
    path: PathBuf,
    file: File,
    lines: mpsc::Receiver<Vec<u8>>,
}

/// Opens the report at `path`; new lines are appended to what the file holds.
pub(crate) async fn open(path: &Path) -> std::io::Result<(AgentReport, ReportWriter)> {
    let mut options = OpenOptions::new();
    let file = options.create(true).append(true).open(path).await?;
    let (sender, lines) = mpsc::channel(QUEUE);
    let path = path.to_owned();
    Ok((
        AgentReport { lines: sender },
        ReportWriter { path, file, lines },
    ))
}

impl AgentReport {
    pub(crate) fn write(&self, room: &str, agent: &str, event: &ReportEvent) {
        let at = unix_seconds(Instant::now());
        let line = ReportLine {
            room,
            agent,
            at,
            event,
        };
        let mut line = serde_json::to_vec(&line).expect("text and numbers make JSON");
        line.push(b'\n');
        // An agent must not wait for the disk. A closed channel means that the writer failed and logged why.
        if let Err(TrySendError::Full(_)) = self.lines.try_send(line) {
            tracing::warn!(room, "lost a line of the report: the disk is too slow");
        }
    }
}

impl ReportWriter {
    /// Writes until shutdown, including what was reported before it.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut waiting = Vec::new();
        loop {
            let received = tokio::select! {
                biased;
                received = self.lines.recv_many(&mut waiting, QUEUE) => received,
                () = shutdown.cancelled(), if !self.lines.is_closed() => {
                    self.lines.close();
                    continue;
                }
            };
            if received == 0 {
                return;
            }
            if let Err(error) = self.append(&waiting.concat()).await {
                tracing::error!(path = %self.path.display(), %error, "the report can't be written");
                return;
            }
            waiting.clear();
        }
    }

    async fn append(&mut self, lines: &[u8]) -> std::io::Result<()> {
        self.file.write_all(lines).await?;
        self.file.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_appended_and_none_is_lost_at_the_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "before\n").unwrap();
        let (report, writer) = open(file.path()).await.unwrap();
        let stretch = SpeechInterval::of(Instant::now(), Instant::now());
        let heard = ReportEvent::Heard {
            stretch,
            seconds: 1.5,
            over_agent: false,
        };
        for event in [ReportEvent::Connecting, heard, ReportEvent::Left] {
            report.write("r", "a", &event);
        }
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        writer.run(shutdown).await;
        let text = std::fs::read_to_string(file.path()).unwrap();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("before"));
        let events: Vec<serde_json::Value> = lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let names: Vec<_> = events.iter().map(|event| &event["event"]).collect();
        assert_eq!(names, ["connecting", "heard", "left"]);
        assert!(events.iter().all(|event| event["room"] == "r"));
        assert_eq!(events[1]["seconds"], 1.5);
        assert!(events[1]["began"].as_f64() > Some(1.6e9));
    }
}
