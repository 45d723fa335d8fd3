//! What all rooms share: the open rooms and their numbers, the faults, and what the agents heard and report.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::agent::VoiceClips;
use super::command::RoomCommand;
use super::fault::{FaultRule, Faults};
use super::ids::guid;
use super::peer::Net;
use super::report::{AgentReport, ReportEvent};
use super::settings::SandboxSettings;

const MAX_ROOMS: usize = 2000;
/// Room names whose number is remembered.
const MAX_NUMBERS: usize = 10_000;
/// Utterances kept for [`Handle::heard`](super::Handle::heard).
const MAX_HEARD: usize = 10_000;
const COMMAND_QUEUE: usize = 256;

/// An utterance of a caller that a demo agent heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallerUtterance {
    pub room: String,
    pub agent: String,
    /// 20 ms frames of speech.
    pub frames: u32,
    /// From its first to its last frame.
    pub duration: Duration,
    /// It began while the agent itself spoke; such an utterance gets no reply.
    pub over_agent: bool,
}

pub(crate) struct Registry {
    pub settings: SandboxSettings,
    pub net: Arc<Net>,
    pub voice: Arc<VoiceClips>,
    pub node_id: String,
    /// Owns every task of the sandbox.
    pub tracker: TaskTracker,
    pub shutdown: CancellationToken,
    faults: Mutex<Vec<FaultRule>>,
    rooms: Mutex<RoomTable>,
    heard: Mutex<VecDeque<CallerUtterance>>,
    report: Option<AgentReport>,
}

#[derive(Default)]
struct RoomTable {
    open: HashMap<String, RoomHandle>,
    numbers: HashMap<String, u64>,
    /// Names in the order of their numbers.
    named: VecDeque<String>,
    last_number: u64,
    last_id: u64,
}

/// Sends commands to a room's task.
#[derive(Clone)]
pub(crate) struct RoomHandle {
    id: u64,
    commands: mpsc::Sender<RoomCommand>,
}

/// What a new room's task reads from.
pub(crate) struct RoomQueues {
    pub id: u64,
    pub commands: mpsc::Receiver<RoomCommand>,
}

/// The sandbox has reached its limit of rooms.
#[derive(Debug)]
pub(crate) struct TooManyRooms;

impl RoomHandle {
    /// Sends a command and awaits its answer; `None` if the room has closed.
    pub(crate) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> RoomCommand,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }

    /// Sends a command; returns whether the room is still open.
    pub(crate) async fn send(&self, command: RoomCommand) -> bool {
        self.commands.send(command).await.is_ok()
    }
}

impl Registry {
    pub(crate) fn new(settings: SandboxSettings, net: Net, report: Option<AgentReport>) -> Self {
        Self {
            faults: Mutex::new(settings.faults.clone()),
            settings,
            net: Arc::new(net),
            voice: Arc::new(VoiceClips::load()),
            node_id: guid("ND_"),
            tracker: TaskTracker::new(),
            shutdown: CancellationToken::new(),
            rooms: Mutex::default(),
            heard: Mutex::default(),
            report,
        }
    }

    /// The faults of the room of this name; a new name gets its number here.
    pub(crate) fn faults(&self, room: &str) -> Faults {
        let number = lock(&self.rooms).number(room);
        Faults::of_room(&lock(&self.faults), number)
    }

    /// The faults that hold for all rooms, for calls that name none.
    pub(crate) fn common_faults(&self) -> Faults {
        Faults::of_room(&lock(&self.faults), 0)
    }

    pub(crate) fn set_faults(&self, rules: Vec<FaultRule>) {
        *lock(&self.faults) = rules;
    }

    /// The open room of this name, and the queues of its task if it is new: the caller starts the task.
    pub(crate) fn open(
        &self,
        name: &str,
    ) -> Result<(RoomHandle, Option<RoomQueues>), TooManyRooms> {
        let mut rooms = lock(&self.rooms);
        if let Some(room) = rooms.open.get(name) {
            return Ok((room.clone(), None));
        }
        if rooms.open.len() >= MAX_ROOMS {
            return Err(TooManyRooms);
        }
        rooms.last_id += 1;
        let id = rooms.last_id;
        let (commands, command_queue) = mpsc::channel(COMMAND_QUEUE);
        let handle = RoomHandle { id, commands };
        rooms.open.insert(name.to_owned(), handle.clone());
        let queues = RoomQueues {
            id,
            commands: command_queue,
        };
        Ok((handle, Some(queues)))
    }

    pub(crate) fn find(&self, name: &str) -> Option<RoomHandle> {
        lock(&self.rooms).open.get(name).cloned()
    }

    /// Removes the room of this name from the open rooms and returns its handle, so that it can be closed.
    pub(crate) fn take(&self, name: &str) -> Option<RoomHandle> {
        lock(&self.rooms).open.remove(name)
    }

    /// Forgets a room that has closed, unless another of its name has taken its place.
    pub(crate) fn forget(&self, name: &str, id: u64) {
        let mut rooms = lock(&self.rooms);
        if rooms.open.get(name).is_some_and(|room| room.id == id) {
            rooms.open.remove(name);
        }
    }

    pub(crate) fn open_rooms(&self) -> Vec<(String, RoomHandle)> {
        let rooms = lock(&self.rooms);
        let all = rooms.open.iter();
        all.map(|(name, room)| (name.clone(), room.clone()))
            .collect()
    }

    pub(crate) fn rooms_seen(&self) -> u64 {
        lock(&self.rooms).last_number
    }

    pub(crate) fn record(&self, heard: CallerUtterance) {
        tracing::info!(
            room = heard.room,
            frames = heard.frames,
            milliseconds = heard.duration.as_millis(),
            over_agent = heard.over_agent,
            "the demo agent heard an utterance of its caller"
        );
        let mut record = lock(&self.heard);
        if record.len() == MAX_HEARD {
            record.pop_front();
        }
        record.push_back(heard);
    }

    /// Adds a line to the report, if there is one.
    pub(crate) fn report(&self, room: &str, agent: &str, event: &ReportEvent) {
        if let Some(report) = &self.report {
            report.write(room, agent, event);
        }
    }

    pub(crate) fn heard(&self) -> Vec<CallerUtterance> {
        lock(&self.heard).iter().cloned().collect()
    }
}

impl RoomTable {
    fn number(&mut self, name: &str) -> u64 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        if self.named.len() == MAX_NUMBERS
            && let Some(oldest) = self.named.pop_front()
        {
            self.numbers.remove(&oldest);
        }
        self.last_number += 1;
        self.numbers.insert(name.to_owned(), self.last_number);
        self.named.push_back(name.to_owned());
        self.last_number
    }
}

/// Ignores poisoning: the data behind a lock is valid after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_keeps_its_number_and_the_next_name_gets_the_next() {
        let mut rooms = RoomTable::default();
        assert_eq!(
            [rooms.number("a"), rooms.number("b"), rooms.number("a")],
            [1, 2, 1]
        );
    }

    #[test]
    fn numbers_of_old_rooms_are_dropped_beyond_the_limit() {
        let mut rooms = RoomTable::default();
        for name in 0..=MAX_NUMBERS {
            rooms.number(&name.to_string());
        }
        assert_eq!(rooms.numbers.len(), MAX_NUMBERS);
        assert_eq!(rooms.number("0"), u64::try_from(MAX_NUMBERS).unwrap() + 2);
    }
}
