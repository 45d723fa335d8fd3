//! The history of a killed process, as the next process reads it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use livekit_canary::config;
use livekit_canary::history::History;
use livekit_canary::livekit::RoomName;
use tokio::time::Instant;

/// The variable with the history folder of the child.
const FOLDER: &str = "HISTORY_OF_A_CHILD";

const WORST: Duration = Duration::from_mins(3);

fn open(folder: &Path) -> History {
    let settings = config::HistorySettings {
        dir: folder.to_owned(),
        ..config::HistorySettings::default()
    };
    History::open(&settings).unwrap()
}

#[tokio::main(flavor = "current_thread")]
async fn reserve_forever(folder: &Path) {
    let history = open(folder);
    for index in 0.. {
        let room = RoomName(format!("canary-{}-{index}", std::process::id()));
        let admit = |_: &_, _| Ok::<_, ()>(());
        let reserved = history.reserve(&room, "acme", "support", WORST, admit);
        let mut reservation = reserved.await.unwrap();
        reservation.opened();
        print_line(&room.0);
        if index % 2 == 0 {
            reservation.settle(WORST);
        }
        if index % 3 == 0 {
            history.gone(&room);
        }
    }
}

#[expect(clippy::print_stdout, reason = "the parent reads the output")]
pub fn print_line(line: &str) {
    println!("line {line}");
}

#[test]
#[ignore = "the test below runs it as a child and kills it"]
fn child() {
    let folder = std::env::var_os(FOLDER).unwrap();
    reserve_forever(Path::new(&folder));
}

/// Runs an ignored test of this program as a child, reads this many of its lines, and kills it. Returns all its lines.
pub fn killed_after(lines: usize, test: &str, variables: &[(&str, &OsStr)]) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .envs(variables.iter().copied())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let printed = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut printed = printed.filter_map(|line| {
        let line = line.unwrap();
        line.strip_prefix("line ").map(str::to_owned)
    });
    let first: Vec<String> = printed.by_ref().take(lines).collect();
    child.kill().unwrap();
    let all: Vec<String> = first.into_iter().chain(printed).collect();
    child.wait().unwrap();
    assert!(all.len() >= lines, "the child ended by itself: {all:?}");
    all
}

#[tokio::test]
async fn killed_process_has_recorded_every_reservation_and_leaves_the_folder_unlocked() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = fastrand::Rng::with_seed(20);
    let mut expected = BTreeSet::new();
    let mut reserved = 0;
    for _ in 0..20 {
        let variables = [(FOLDER, folder.path().as_os_str())];
        let rooms = killed_after(random.usize(1..40), "history::child", &variables);
        reserved += rooms.len();
        let third = rooms.iter().enumerate().filter(|(index, _)| index % 3 != 0);
        expected.extend(third.map(|(_, room)| room.clone()));

        let history = open(folder.path());
        assert!(!history.is_degraded());
        let used = history.used("acme");
        assert!(!used.ledger_lost);
        let least = WORST * u32::try_from(reserved).unwrap();
        assert!(used.month >= least, "{used:?} is less than {least:?}");
        let left: BTreeSet<String> = history
            .orphan_rooms()
            .into_iter()
            .map(|left| left.room.0)
            .collect();
        assert!(left.is_superset(&expected), "{expected:?} not in {left:?}");
        assert!(history.close(Instant::now() + Duration::from_mins(1)).await);
    }
}
