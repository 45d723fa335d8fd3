//! What the history keeps of outages: the state of each target, the incidents, and the messages that still have to be sent.
//!
//! The documents are JSON that other modules write and read; this module knows their keys only. It knows no disk and reads no
//! clock.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::kept::Kept;

/// Messages that may wait for their delivery. Beyond it, the oldest ones are given up.
pub(super) const MAX_MESSAGES: usize = 1000;
/// Incidents that may wait for the disk. Beyond it, the oldest ended ones are dropped.
pub(super) const MAX_UNWRITTEN_INCIDENTS: usize = 200;

/// What a target's detection keeps. It is written in one transaction and durable then.
#[derive(Debug, Clone)]
pub(crate) struct DetectionRecord {
    pub(crate) target: String,
    /// The state of the target, for the next run of this program.
    pub(crate) state: String,
    /// The incident that began, changed or ended.
    pub(crate) incident: Option<IncidentRecord>,
    /// The messages about it, in order.
    pub(crate) messages: Vec<OutboxMessage>,
}

/// One incident. A later record with the same id replaces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IncidentRecord {
    /// Letters, digits and hyphens, because it is part of a path. Ids sort by time.
    pub(crate) id: String,
    pub(crate) target: String,
    pub(crate) project: String,
    /// A label of the fault.
    pub(crate) fault: String,
    /// The first failed room.
    pub(crate) began_at: DateTime<Utc>,
    /// `None` while it is open.
    pub(crate) ended_at: Option<DateTime<Utc>>,
    /// What `/api/v1/incidents/{id}` returns.
    pub(crate) document: String,
}

/// A message that one channel has to deliver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OutboxMessage {
    /// Sorts by time.
    pub(crate) id: String,
    /// The name of the channel.
    pub(crate) channel: String,
    pub(crate) created_at: DateTime<Utc>,
    /// The notice, as JSON.
    pub(crate) document: String,
}

/// Rows to write in one transaction, each of which replaces an older one with its key.
#[derive(Debug, Default)]
pub(super) struct DetectionRows {
    /// Targets with their states.
    pub(super) states: Vec<(String, String)>,
    pub(super) incidents: Vec<IncidentRecord>,
    pub(super) messages: Vec<OutboxMessage>,
    /// Ids of messages that need no delivery any more.
    pub(super) done: Vec<String>,
}

impl DetectionRows {
    pub(super) fn is_empty(&self) -> bool {
        let Self {
            states,
            incidents,
            messages,
            done,
        } = self;
        states.is_empty() && incidents.is_empty() && messages.is_empty() && done.is_empty()
    }
}

#[derive(Debug)]
struct KeptMessage {
    message: OutboxMessage,
    /// An earlier run of this program left it.
    earlier: bool,
    /// It needs no delivery any more, so the disk must forget it.
    done: bool,
}

/// What this run needs of the detection's rows, in memory. A later row replaces an earlier one with its key, so a disk that
/// takes nothing costs no more than the latest rows.
#[derive(Debug, Default)]
pub(super) struct Detections {
    /// Of each target that recorded one in this run: no more than the settings have names.
    states: BTreeMap<String, Kept<String>>,
    /// Those that are open, or not on disk.
    incidents: BTreeMap<String, Kept<IncidentRecord>>,
    /// Those that wait for their delivery, or whose end is not on disk.
    messages: BTreeMap<String, Kept<KeptMessage>>,
    /// Number of changes so far.
    change: u64,
}

impl Detections {
    /// Adds messages that earlier runs left on disk. Returns how many of all messages had to be given up.
    pub(super) fn load(&mut self, outbox: Vec<OutboxMessage>) -> usize {
        for message in outbox {
            let kept = Kept {
                value: KeptMessage {
                    message,
                    earlier: true,
                    done: false,
                },
                unwritten: None,
            };
            let id = kept.value.message.id.clone();
            self.messages.entry(id).or_insert(kept);
        }
        self.limit_messages()
    }

    /// Returns how many incidents and messages had to be given up to stay within the bounds.
    pub(super) fn record(&mut self, record: DetectionRecord) -> usize {
        self.change += 1;
        let unwritten = Some(self.change);
        let state = Kept {
            value: record.state,
            unwritten,
        };
        self.states.insert(record.target, state);
        if let Some(value) = record.incident {
            let id = value.id.clone();
            self.incidents.insert(id, Kept { value, unwritten });
        }
        for message in record.messages {
            let id = message.id.clone();
            let value = KeptMessage {
                message,
                earlier: false,
                done: false,
            };
            self.messages.insert(id, Kept { value, unwritten });
        }
        self.limit_incidents() + self.limit_messages()
    }

    /// The message was delivered or given up.
    pub(super) fn message_done(&mut self, id: &str) {
        if let Some(kept) = self.messages.get_mut(id)
            && !kept.value.done
        {
            self.change += 1;
            kept.value.done = true;
            kept.value.message.document = String::new();
            kept.unwritten = Some(self.change);
        }
    }

    /// Messages that earlier runs left, the oldest first, without those that are done meanwhile.
    pub(super) fn outbox(&self) -> Vec<OutboxMessage> {
        let kept = self.messages.values().map(|kept| &kept.value);
        let left = kept.filter(|kept| kept.earlier && !kept.done);
        left.map(|kept| kept.message.clone()).collect()
    }

    /// The rows that the disk lacks, and the number of the last change in them.
    pub(super) fn unwritten(&self) -> (DetectionRows, u64) {
        fn of<T>(kept: &BTreeMap<String, Kept<T>>) -> impl Iterator<Item = (&String, &T)> {
            let unwritten = kept.iter().filter(|(_, kept)| kept.unwritten.is_some());
            unwritten.map(|(key, kept)| (key, &kept.value))
        }
        let mut rows = DetectionRows::default();
        let states = of(&self.states).map(|(target, state)| (target.clone(), state.clone()));
        rows.states.extend(states);
        let incidents = of(&self.incidents).map(|(_, incident)| incident.clone());
        rows.incidents.extend(incidents);
        for (id, kept) in of(&self.messages) {
            if kept.done {
                rows.done.push(id.clone());
            } else {
                rows.messages.push(kept.message.clone());
            }
        }
        (rows, self.change)
    }

    pub(super) fn is_written(&self) -> bool {
        self.unwritten().0.is_empty()
    }

    /// The number of the last change.
    pub(super) fn change(&self) -> u64 {
        self.change
    }

    /// The disk has every change up to this one, or will never take it.
    pub(super) fn written(&mut self, change: u64) {
        self.states.values_mut().for_each(|it| it.written(change));
        self.incidents.retain(|_, kept| {
            kept.written(change);
            kept.unwritten.is_some() || kept.value.ended_at.is_none()
        });
        self.messages.retain(|_, kept| {
            kept.written(change);
            kept.unwritten.is_some() || !kept.value.done
        });
    }

    /// Another file takes the place of the one that had the rows: all must be written again.
    pub(super) fn write_again(&mut self) {
        self.change += 1;
        let again = Some(self.change);
        let states = self.states.values_mut().map(|it| &mut it.unwritten);
        let incidents = self.incidents.values_mut().map(|it| &mut it.unwritten);
        let messages = self.messages.values_mut().map(|it| &mut it.unwritten);
        for unwritten in states.chain(incidents).chain(messages) {
            *unwritten = again;
        }
    }

    fn limit_incidents(&mut self) -> usize {
        let surplus = self.incidents.len().saturating_sub(MAX_UNWRITTEN_INCIDENTS);
        let ended = self.incidents.iter();
        let ended = ended.filter(|(_, kept)| kept.value.ended_at.is_some());
        let oldest: Vec<String> = ended.map(|(id, _)| id.clone()).take(surplus).collect();
        for id in &oldest {
            self.incidents.remove(id);
        }
        oldest.len()
    }

    /// Gives up the oldest messages beyond the bound, and returns their number. Messages that are done have the same bound: if the
    /// disk has one whose end is forgotten here, the next run delivers it once more.
    fn limit_messages(&mut self) -> usize {
        let of = |messages: &BTreeMap<String, Kept<KeptMessage>>, done: bool| -> Vec<String> {
            let such = messages.iter().filter(|(_, kept)| kept.value.done == done);
            let ids: Vec<&String> = such.map(|(id, _)| id).collect();
            let surplus = ids.len().saturating_sub(MAX_MESSAGES);
            ids.into_iter().take(surplus).cloned().collect()
        };
        let given_up = of(&self.messages, false);
        for id in &given_up {
            self.message_done(id);
        }
        for id in of(&self.messages, true) {
            self.messages.remove(&id);
        }
        given_up.len()
    }
}

#[cfg(test)]
impl Detections {
    /// Rows in memory: states, incidents and messages.
    pub(super) fn len(&self) -> [usize; 3] {
        [self.states.len(), self.incidents.len(), self.messages.len()]
    }
}
