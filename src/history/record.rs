//! A batch as the history stores it: columns for searching, and JSON documents that are returned unchanged.

use chrono::{DateTime, Utc};
use rusqlite::{Transaction, params};

use super::statistics::{self, RoomSample};
use super::store::millis;
use crate::config::{Project, Target};
use crate::probe::{Circumstances, MediaPath, Milestone};
use crate::report::{BatchReport, Purpose, Summary, json};

#[derive(Debug)]
pub(super) struct BatchRecord {
    id: String,
    target: String,
    project: String,
    purpose: Purpose,
    started_at: DateTime<Utc>,
    ended_at: DateTime<Utc>,
    result: &'static str,
    summary: Summary,
    head: String,
    probes: Vec<ProbeRecord>,
    /// The agent name that the target was configured with, if an agent joined a room. Empty for an unnamed agent.
    agent_seen: Option<String>,
}

#[derive(Debug)]
struct ProbeRecord {
    room: String,
    outcome: &'static str,
    reason: Option<&'static str>,
    started_at: DateTime<Utc>,
    circumstances: Circumstances,
    is_recorded: bool,
    /// `None` if the room shows nothing of the target.
    sample: Option<RoomSample>,
    document: String,
}

impl BatchRecord {
    pub(super) fn new(batch: &BatchReport, target: &Target, project: &Project) -> Self {
        let probes = batch.probes.iter().map(|probe| {
            let outcome = &probe.outcome;
            ProbeRecord {
                room: probe.room.0.clone(),
                outcome: outcome.label(),
                reason: outcome.failure().map(|failure| failure.reason.label()),
                started_at: probe.started_at,
                circumstances: probe.circumstances.clone(),
                is_recorded: probe.recording.is_some(),
                sample: RoomSample::of(probe),
                document: json::of_probe(probe, project),
            }
        });
        let mut timelines = batch.probes.iter().map(|probe| &probe.timeline);
        let seen = timelines.any(|timeline| timeline.get(Milestone::AgentJoined).is_some());
        Self {
            id: batch.batch_id.clone(),
            target: batch.target.clone(),
            project: target.project.clone(),
            purpose: batch.purpose,
            started_at: batch.started_at,
            ended_at: batch.ended_at,
            result: batch.result().label(),
            summary: batch.summary(),
            head: json::head(batch, target),
            probes: probes.collect(),
            agent_seen: seen.then(|| target.agent_name.clone().unwrap_or_default()),
        }
    }

    /// The rooms whose calls were recorded.
    pub(super) fn recorded_rooms(&self) -> impl Iterator<Item = String> {
        let recorded = self.probes.iter().filter(|probe| probe.is_recorded);
        recorded.map(|probe| probe.room.clone())
    }

    /// Inserts the batch and its probes. A batch that is already stored is left unchanged.
    pub(super) fn insert(&self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        let count = |rooms: usize| i64::try_from(rooms).unwrap_or(i64::MAX);
        let inserted = transaction.execute(
            "INSERT INTO batches
             (id, target, project, started_at, ended_at, result, ok, failed, aborted, head, purpose)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11) ON CONFLICT DO NOTHING",
            params![
                self.id,
                self.target,
                self.project,
                millis(self.started_at),
                millis(self.ended_at),
                self.result,
                count(self.summary.ok),
                count(self.summary.failed),
                count(self.summary.aborted),
                self.head,
                self.purpose.label(),
            ],
        )?;
        if inserted == 0 {
            return Ok(());
        }
        let mut statement = transaction.prepare(
            "INSERT INTO probes (room, batch, place, outcome, reason, started_at, document,
                                 node, region, worker, media_path, agent_version, target, purpose)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
        )?;
        for (place, probe) in self.probes.iter().enumerate() {
            let Circumstances {
                node,
                region,
                worker,
                media_path,
                agent_version,
            } = &probe.circumstances;
            statement.execute(params![
                probe.room,
                self.id,
                count(place),
                probe.outcome,
                probe.reason,
                millis(probe.started_at),
                probe.document,
                node,
                region,
                worker,
                media_path.map(MediaPath::label),
                agent_version,
                self.target,
                self.purpose.label(),
            ])?;
        }
        if self.purpose == Purpose::Scheduled {
            let samples = self.probes.iter().filter_map(|probe| probe.sample);
            statistics::add(transaction, &self.target, samples)?;
        }
        if let Some(agent_name) = &self.agent_seen {
            transaction.execute(
                "INSERT INTO agents_seen (target, agent_name, first_seen_at) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO NOTHING",
                params![self.target, agent_name, millis(self.started_at)],
            )?;
        }
        Ok(())
    }
}
