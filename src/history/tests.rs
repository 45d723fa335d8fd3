use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use chrono::TimeDelta;
use rusqlite::{Connection, params};
use tempfile::TempDir;

use super::incidents::{MAX_MESSAGES, MAX_UNWRITTEN_INCIDENTS};
use super::store::{self, FILE};
use super::*;
use crate::livekit::event::Speaker;
use crate::probe::{Circumstances, Evidence, Milestone, Origin, Outcome, Reason};
use crate::recording;
use crate::report::BatchResult;
use crate::report::sample::{self, WELL, failed};

/// What the history holds of a target, for comparison with the counters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HistoryCounts {
    /// By result.
    pub batches: BTreeMap<String, u64>,
    /// By outcome: `ok`, `aborted`, or the reason of the failure.
    pub probes: BTreeMap<String, u64>,
    /// Rooms in the journal.
    pub rooms: u64,
    /// Agent time in the ledger; rooms that are not settled count with their worst case.
    pub agent_time: Duration,
}

impl History {
    pub(crate) async fn counts(&self, target: &str) -> Result<HistoryCounts, super::ReadError> {
        let target = target.to_owned();
        let query = move |connection: &_| counts(connection, &target);
        self.reader.read(query).await
    }
}

fn counts(connection: &Connection, target: &str) -> rusqlite::Result<HistoryCounts> {
    let grouped = |sql: &str| -> rusqlite::Result<BTreeMap<String, u64>> {
        let mut statement = connection.prepare(sql)?;
        let groups = statement.query_map([target], |row| Ok((row.get(0)?, unsigned(row, 1)?)))?;
        groups.collect()
    };
    let (rooms, seconds) = connection.query_row(
        "SELECT count(*), coalesce(sum(coalesce(settled, reserved)), 0) FROM rooms WHERE target = ?1",
        params![target],
        |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)),
    )?;
    Ok(HistoryCounts {
        batches: grouped("SELECT result, count(*) FROM batches WHERE target = ?1 GROUP BY 1")?,
        probes: grouped(
            "SELECT coalesce(reason, outcome), count(*) FROM probes JOIN batches ON id = batch
             WHERE batches.target = ?1 GROUP BY 1",
        )?,
        rooms,
        agent_time: Duration::from_secs(seconds),
    })
}

fn unsigned(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(column).map(i64::unsigned_abs)
}

const SCHEDULED: Purpose = Purpose::Scheduled;
const MINUTE: Duration = Duration::from_mins(1);
const DAY: Duration = Duration::from_hours(24);

impl History {
    /// A history without a disk, whose ledger is not lost.
    pub(crate) fn in_memory(clock: UtcClock) -> Self {
        let settings = config::HistorySettings {
            dir: "Cargo.toml/is-no-folder".into(),
            ..config::HistorySettings::default()
        };
        let (history, _never_runs) =
            Self::prepare(&settings, clock).expect("no folder, so no lock");
        assert!(history.is_degraded());
        history.accept_lost_ledger();
        history
    }
}

/// A folder and a clock that several runs of the program share.
struct Disk {
    dir: TempDir,
    now: Arc<Mutex<DateTime<Utc>>>,
    settings: config::HistorySettings,
}

/// A run of the program whose writer works only when the test calls it.
struct TestRun {
    history: History,
    writer: HistoryWriter,
}

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn room(name: &str) -> RoomName {
    RoomName(format!("canary-test-{name}"))
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = config::HistorySettings {
            dir: dir.path().join("state"),
            ..config::HistorySettings::default()
        };
        Self {
            dir,
            now: Arc::new(Mutex::new(at("2026-03-10T12:00:00Z"))),
            settings,
        }
    }

    fn file(&self) -> std::path::PathBuf {
        self.settings.dir.join(FILE)
    }

    fn clock(&self) -> UtcClock {
        let now = Arc::clone(&self.now);
        Arc::new(move || *now.lock().unwrap())
    }

    fn set(&self, now: &str) {
        *self.now.lock().unwrap() = at(now);
    }

    fn start(&self) -> TestRun {
        let (history, writer) = History::prepare(&self.settings, self.clock()).unwrap();
        TestRun { history, writer }
    }

    /// Puts a file in the place of the folder, so that it can neither be read nor created.
    fn move_folder_away(&self) {
        fs::rename(&self.settings.dir, self.away()).unwrap();
        fs::write(&self.settings.dir, "a file is in the way").unwrap();
    }

    fn move_folder_back(&self) {
        fs::remove_file(&self.settings.dir).unwrap();
        fs::rename(self.away(), &self.settings.dir).unwrap();
    }

    fn away(&self) -> std::path::PathBuf {
        self.dir.path().join("away")
    }

    /// How many corrupt files were moved aside.
    fn aside(&self) -> usize {
        let names = fs::read_dir(&self.settings.dir).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| {
                name.contains(".corrupt-") && !name.ends_with("-wal") && !name.ends_with("-shm")
            })
            .count()
    }

    /// The rows that another process sees in the file.
    fn rows(&self) -> i64 {
        let file = Connection::open(self.file()).unwrap();
        file.query_row("SELECT count(*) FROM rooms", [], |row| row.get(0))
            .unwrap()
    }
}

impl TestRun {
    async fn reserve(&mut self, name: &str, worst: Duration) -> Reservation {
        self.reserve_for(SCHEDULED, name, worst).await
    }

    async fn reserve_for(&mut self, purpose: Purpose, name: &str, worst: Duration) -> Reservation {
        let name = room(name);
        let admit = |_: &AgentTimeUsed, _| Ok::<_, ()>(());
        let reserving = self
            .history
            .reserve(&name, "acme", "support", purpose, worst, admit);
        let (reservation, ()) = tokio::join!(reserving, async { self.writer.run_once() });
        reservation.unwrap()
    }

    async fn open(&mut self, name: &str, worst: Duration) -> Reservation {
        let mut reservation = self.reserve(name, worst).await;
        reservation.opened();
        reservation
    }

    /// Minutes of the day and of the month.
    fn used(&self) -> (u64, u64) {
        let used = self.history.used("acme");
        (used.day.as_secs() / 60, used.month.as_secs() / 60)
    }

    fn is_lost(&self) -> bool {
        self.history.used("acme").ledger_lost
    }

    fn is_unread(&self) -> bool {
        self.history.used("acme").ledger_unread
    }

    fn orphan_rooms(&self) -> Vec<String> {
        let orphans = self.history.orphan_rooms().into_iter();
        orphans.map(|orphan| orphan.room.0).collect()
    }

    /// SQLite may add no further page to the file.
    fn fill_disk(&mut self) {
        let connection = &self.writer.store().connection;
        let limit = |_: &rusqlite::Row<'_>| Ok(());
        connection
            .pragma_update_and_check(None, "max_page_count", 1, limit)
            .unwrap();
    }

    fn free_disk(&mut self) {
        let connection = &self.writer.store().connection;
        let limit = |_: &rusqlite::Row<'_>| Ok(());
        connection
            .pragma_update_and_check(None, "max_page_count", 1_000_000, limit)
            .unwrap();
    }

    /// Ends as with `kill -9`: unwritten changes are lost, and nothing is cleaned up.
    fn kill(self) {
        let Self { history, writer } = self;
        std::mem::forget(history);
        // The kernel closes the files of a killed process, which releases the lock and leaves the log unchanged.
        let log = SavedLog::save(writer.dir());
        drop(writer);
        log.restore();
    }
}

/// A copy of the database and its log: closing the database would merge the log into the file.
struct SavedLog(Vec<(std::path::PathBuf, Vec<u8>)>);

impl SavedLog {
    fn save(dir: &Path) -> Self {
        let files = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let files = files.filter(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with(FILE)
        });
        Self(
            files
                .map(|path| (path.clone(), fs::read(path).unwrap()))
                .collect(),
        )
    }

    fn restore(self) {
        for (path, content) in self.0 {
            fs::write(path, content).unwrap();
        }
    }
}

fn batch(id: &str, target: &str, started_at: &str, outcome: Outcome) -> BatchReport {
    let mut report = sample::batch(
        vec![
            sample::probe(1, Outcome::Ok, Evidence::default(), WELL),
            sample::probe(2, outcome, Evidence::default(), &WELL[..6]),
        ],
        None,
    );
    report.batch_id = id.to_owned();
    report.target = target.to_owned();
    report.started_at = at(started_at);
    report.ended_at = at(started_at) + TimeDelta::seconds(40);
    for (place, probe) in report.probes.iter_mut().enumerate() {
        probe.room = RoomName(format!("canary-{id}-{place}"));
    }
    report
}

fn target() -> Target {
    Target {
        project: "acme".to_owned(),
        agent_name: Some("my-agent".to_owned()),
        ..Target::default()
    }
}

fn record(run: &TestRun, batch: &BatchReport) {
    run.history.record(batch, &target(), &sample::project());
}

async fn ids(history: &History, filter: BatchFilter) -> Vec<String> {
    let heads = history.batches(filter).await.unwrap().into_iter();
    heads
        .map(|head| {
            let head: serde_json::Value = serde_json::from_str(head.document.get()).unwrap();
            head["batch_id"].as_str().unwrap().to_owned()
        })
        .collect()
}

fn all() -> BatchFilter {
    BatchFilter {
        limit: MAX_BATCHES,
        ..BatchFilter::default()
    }
}

// The ledger and the journal.

#[tokio::test(start_paused = true)]
async fn reservation_waits_until_its_row_is_on_disk() {
    let disk = Disk::new();
    let mut run = disk.start();
    let name = room("1");
    let admit = |_: &AgentTimeUsed, _| Ok::<_, ()>(());
    let mut reserving = Box::pin(
        run.history
            .reserve(&name, "acme", "support", SCHEDULED, MINUTE, admit),
    );
    let once =
        std::future::poll_fn(|context| std::task::Poll::Ready(reserving.as_mut().poll(context)));
    assert!(once.await.is_pending());
    assert_eq!(disk.rows(), 0);
    run.writer.run_once();
    let _reservation = reserving.await.unwrap();
    assert_eq!(disk.rows(), 1);
    assert!(!run.history.is_degraded());
}

#[tokio::test(start_paused = true)]
async fn open_room_counts_its_worst_case_and_a_settled_room_what_it_used() {
    let disk = Disk::new();
    let mut run = disk.start();
    let less = run.open("1", 3 * MINUTE).await;
    let more = run.open("2", MINUTE).await;
    let none = run.open("3", 2 * MINUTE).await;
    assert_eq!(run.used(), (6, 6));
    let reserved = |run: &TestRun| run.history.used("acme").reserved_day;
    assert_eq!(reserved(&run), 6 * MINUTE);
    less.settle(MINUTE);
    assert_eq!(run.used(), (4, 4));
    assert_eq!(reserved(&run), 3 * MINUTE);
    more.settle(4 * MINUTE);
    assert_eq!(
        run.used(),
        (7, 7),
        "time above the reservation counts as well"
    );
    none.settle(Duration::ZERO);
    assert_eq!(run.used(), (5, 5));
}

#[tokio::test(start_paused = true)]
async fn reservation_can_only_shrink_and_counts_its_last_worst_case() {
    let disk = Disk::new();
    let mut run = disk.start();
    let mut room = run.open("1", 9 * MINUTE).await;
    room.shrink(5 * MINUTE);
    room.shrink(7 * MINUTE);
    assert_eq!(run.used(), (5, 5));
    assert_eq!(room.worst_case(), 5 * MINUTE);
    run.writer.run_once();
    run.kill();
    drop(room);
    assert_eq!(disk.start().used(), (5, 5), "the disk has it, too");
}

#[tokio::test(start_paused = true)]
async fn dropped_reservation_costs_nothing_without_a_room_and_the_worst_case_with_one() {
    let disk = Disk::new();
    let mut run = disk.start();
    drop(run.reserve("1", 3 * MINUTE).await);
    assert_eq!(run.used(), (0, 0));
    drop(run.open("2", 3 * MINUTE).await);
    assert_eq!(run.used(), (3, 3));
    run.writer.run_once();
    run.kill();
    let run = disk.start();
    assert_eq!(run.used(), (3, 3));
    assert_eq!(
        run.history.used("acme").reserved_day,
        Duration::ZERO,
        "no room of this run is open"
    );
    assert_eq!(run.orphan_rooms(), ["canary-test-2"]);
}

#[tokio::test(start_paused = true)]
async fn fraction_of_a_second_counts_as_a_whole_second() {
    let disk = Disk::new();
    let mut run = disk.start();
    let _open = run.open("1", Duration::from_millis(59_001)).await;
    assert_eq!(run.history.used("acme").day, MINUTE);
}

#[tokio::test(start_paused = true)]
async fn room_counts_in_the_utc_day_and_month_in_which_it_opened() {
    let disk = Disk::new();
    let mut run = disk.start();
    disk.set("2026-01-31T23:59:59.999Z");
    let late = run.open("1", 3 * MINUTE).await;
    assert_eq!(run.used(), (3, 3));
    disk.set("2026-02-01T00:00:00Z");
    assert_eq!(run.used(), (0, 0));
    let _early = run.open("2", MINUTE).await;
    late.settle(MINUTE);
    assert_eq!(run.used(), (1, 1));
    disk.set("2026-02-28T23:00:00Z");
    let _last = run.open("3", MINUTE).await;
    assert_eq!(run.used(), (1, 2));
    disk.set("2026-03-01T00:00:00Z");
    assert_eq!(run.used(), (0, 0));
    disk.set("2026-01-31T12:00:00Z");
    assert_eq!(
        run.used(),
        (1, 1),
        "the clock was set back, and January still counts"
    );
    disk.set("2024-02-29T12:00:00Z");
    assert_eq!(run.used(), (0, 0));
    let _leap = run.open("4", MINUTE).await;
    assert_eq!(run.used(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn targets_share_the_agent_time_of_their_project_and_projects_share_none() {
    let disk = Disk::new();
    let mut run = disk.start();
    let _one = run.open("1", MINUTE).await;
    let admit = |used: &AgentTimeUsed, _| {
        assert_eq!(used.day, Duration::ZERO);
        Ok::<_, ()>(())
    };
    let (name, other) = (room("2"), room("3"));
    let other_project = run
        .history
        .reserve(&name, "beta", "support", SCHEDULED, MINUTE, admit);
    let (_two, ()) = tokio::join!(other_project, async { run.writer.run_once() });
    let admit = |used: &AgentTimeUsed, _| {
        assert_eq!(used.day, MINUTE);
        Err("full")
    };
    let refused = run
        .history
        .reserve(&other, "acme", "sales", SCHEDULED, MINUTE, admit);
    assert_eq!(refused.await.err(), Some("full"));
    assert_eq!(run.used(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn after_a_kill_the_ledger_counts_all_agent_time_and_the_journal_has_every_open_room() {
    let disk = Disk::new();
    let mut run = disk.start();
    let settled = run.open("1", 5 * MINUTE).await;
    let open = run.open("2", 3 * MINUTE).await;
    settled.settle(2 * MINUTE);
    run.history.gone(&room("1"));
    run.writer.run_once();
    std::mem::forget(open);
    run.kill();

    let mut run = disk.start();
    assert_eq!(run.used(), (5, 5));
    assert_eq!(run.orphan_rooms(), ["canary-test-2"]);
    assert_eq!(run.history.target_of(&room("2")).unwrap(), "support");
    run.history.gone(&room("2"));
    assert_eq!(run.orphan_rooms(), [""; 0]);
    run.writer.run_once();
    run.kill();
    assert_eq!(disk.start().orphan_rooms(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn settlement_that_was_not_written_leaves_the_worst_case() {
    let disk = Disk::new();
    let mut run = disk.start();
    run.open("1", 5 * MINUTE).await.settle(MINUTE);
    run.kill();
    assert_eq!(disk.start().used(), (5, 5));
}

#[tokio::test(start_paused = true)]
async fn ledger_in_memory_equals_the_one_on_disk_and_drops_closed_rows() {
    let mut random = fastrand::Rng::with_seed(7);
    let disk = Disk::new();
    let mut run = disk.start();
    let mut open = Vec::new();
    for index in 0..400 {
        let hours = TimeDelta::minutes(random.i64(0..300));
        *disk.now.lock().unwrap() += hours;
        let name = index.to_string();
        let reservation = run.reserve(&name, MINUTE * random.u32(1..9)).await;
        open.push((name, reservation));
        if random.bool() {
            let (name, mut reservation) = open.swap_remove(random.usize(0..open.len()));
            match random.u8(0..3) {
                0 => drop(reservation),
                1 => {
                    reservation.opened();
                    drop(reservation);
                }
                _ => reservation.settle(MINUTE * random.u32(0..12)),
            }
            run.history.gone(&room(&name));
        }
        if random.u8(0..40) == 0 {
            run.writer.run_once();
            let used = (run.used(), run.is_lost());
            let memory = run.history.shared.lock().ledger.len();
            assert_eq!(memory, open.len() + run.orphan_rooms().len());
            open.drain(..)
                .for_each(|(_, reservation)| std::mem::forget(reservation));
            run.kill();
            run = disk.start();
            assert_eq!((run.used(), run.is_lost()), used);
        }
    }
    assert!(run.used().1 > 0);
}

// A disk that fails.

#[tokio::test(start_paused = true)]
async fn full_disk_degrades_the_history_and_everything_is_written_once_there_is_space() {
    let disk = Disk::new();
    let mut run = disk.start();
    let mut open = vec![run.open("first", MINUTE).await];
    run.fill_disk();
    for index in 0..200 {
        open.push(run.open(&index.to_string(), MINUTE).await);
    }
    assert!(run.history.is_degraded());
    assert_eq!(
        run.history.faults(),
        1,
        "one fault, however often it is retried"
    );
    assert_eq!(run.used(), (201, 201), "the ledger goes on in memory");
    assert!(disk.rows() < 201);
    record(
        &run,
        &batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    open.remove(0).settle(Duration::ZERO);
    run.writer.run_once();
    assert!(run.history.is_degraded());

    run.free_disk();
    run.writer.run_once();
    assert!(!run.history.is_degraded());
    assert_eq!(disk.rows(), 201);
    assert_eq!(ids(&run.history, all()).await, ["b1"]);
    assert_eq!(run.history.dropped(), 0);
    assert_eq!(run.history.faults(), 1);
    run.fill_disk();
    for index in 200..400 {
        std::mem::forget(run.open(&index.to_string(), Duration::ZERO).await);
    }
    assert_eq!(run.history.faults(), 2, "the next fault counts again");
    run.free_disk();
    run.writer.run_once();
    open.drain(..).for_each(std::mem::forget);
    run.kill();
    let run = disk.start();
    assert_eq!(run.used(), (200, 200));
    assert!(!run.is_lost());
}

#[tokio::test(start_paused = true)]
async fn hanging_disk_delays_one_reservation_until_the_timeout_and_no_further_one() {
    let disk = Disk::new();
    let run = disk.start();
    let began = Instant::now();
    for name in ["1", "2"] {
        let admit = |_: &AgentTimeUsed, _| Ok::<_, ()>(());
        let name = room(name);
        let reservation = run
            .history
            .reserve(&name, "acme", "support", SCHEDULED, MINUTE, admit);
        std::mem::forget(reservation.await.unwrap());
        assert_eq!(began.elapsed(), RESERVE_TIMEOUT);
    }
    assert!(run.history.is_degraded());
    assert_eq!(run.used(), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn folder_that_cannot_be_created_degrades_the_history_and_is_used_once_it_can() {
    let disk = Disk::new();
    fs::write(&disk.settings.dir, "a file is in the way").unwrap();
    let mut run = disk.start();
    assert!(run.history.is_degraded());
    assert!(run.is_unread(), "earlier use is unknown");
    assert!(!run.is_lost(), "the record may be there");
    assert!(run.history.batches(all()).await.is_err());
    let _open = run.open("1", MINUTE).await;
    assert_eq!(run.used(), (1, 1));

    fs::remove_file(&disk.settings.dir).unwrap();
    run.writer.run_once();
    assert!(!run.history.is_degraded());
    assert!(!run.is_lost());
    assert_eq!(run.used(), (1, 1));
    assert_eq!(disk.rows(), 1);
    assert_eq!(ids(&run.history, all()).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn earlier_agent_time_is_added_once_the_folder_can_be_read() {
    let disk = Disk::new();
    let mut run = disk.start();
    run.open("1", 2 * MINUTE).await.settle(2 * MINUTE);
    run.writer.run_once();
    drop(run);
    disk.move_folder_away();
    let mut run = disk.start();
    let _open = run.open("2", MINUTE).await;
    assert_eq!(run.used(), (1, 1));
    disk.move_folder_back();
    run.writer.run_once();
    assert_eq!(run.used(), (3, 3));
    assert_eq!(run.orphan_rooms(), ["canary-test-1"]);
}

/// Leaves a history with one settled room of two minutes and 30 batches.
async fn full(disk: &Disk) {
    let mut run = disk.start();
    run.open("1", 2 * MINUTE).await.settle(2 * MINUTE);
    for index in 0..30 {
        let id = format!("b{index:02}");
        record(
            &run,
            &batch(&id, "support", "2026-03-10T11:00:00Z", Outcome::Ok),
        );
        run.writer.run_once();
    }
}

/// Overwrites the pages that contain this text, and returns their number.
fn corrupt(file: &Path, text: &str) -> usize {
    let mut content = fs::read(file).unwrap();
    let mut pages = 0;
    for page in content.chunks_mut(4096).skip(1) {
        if page
            .windows(text.len())
            .any(|window| window == text.as_bytes())
        {
            page[..2000].fill(0xa5);
            pages += 1;
        }
    }
    fs::write(file, content).unwrap();
    pages
}

#[tokio::test(start_paused = true)]
async fn corrupt_file_is_moved_aside_and_its_ledger_is_lost_until_that_is_accepted() {
    let garbage: fn(&Path) = |file| fs::write(file, vec![b'x'; 9000]).unwrap();
    let empty: fn(&Path) = |file| fs::write(file, "").unwrap();
    let torn: fn(&Path) = |file| {
        let content = fs::read(file).unwrap();
        fs::write(file, &content[..4096 * 2 + 100]).unwrap();
    };
    let overwritten: fn(&Path) = |file| assert!(corrupt(file, "canary-test-1") > 0);
    for (what, damage) in [
        ("garbage", garbage),
        ("empty", empty),
        ("torn", torn),
        ("overwritten", overwritten),
    ] {
        let disk = Disk::new();
        full(&disk).await;
        damage(&disk.file());
        let mut run = disk.start();
        assert_eq!(disk.aside(), 1, "{what}");
        assert!(!run.history.is_degraded(), "{what}");
        assert!(run.is_lost(), "{what}");
        assert_eq!(ids(&run.history, all()).await, [""; 0], "{what}");
        let _open = run.open("2", MINUTE).await;
        run.kill();

        let mut run = disk.start();
        assert!(run.is_lost(), "{what}: a restart must not lose this");
        assert_eq!(
            run.orphan_rooms().last().unwrap(),
            "canary-test-2",
            "{what}"
        );
        run.history.accept_lost_ledger();
        assert!(!run.is_lost(), "{what}");
        run.writer.run_once();
        run.kill();
        let run = disk.start();
        assert!(!run.is_lost(), "{what}");
        assert_eq!(disk.aside(), 1, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn ledger_and_journal_are_saved_from_a_file_that_is_corrupt_elsewhere() {
    let disk = Disk::new();
    full(&disk).await;
    assert!(corrupt(&disk.file(), "DispatchAccepted") > 3);
    let run = disk.start();
    assert_eq!(disk.aside(), 1);
    assert!(!run.is_lost());
    assert_eq!(run.used(), (2, 2));
    assert_eq!(run.orphan_rooms(), ["canary-test-1"]);
    assert_eq!(ids(&run.history, all()).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn ledger_is_saved_from_a_corrupt_file_of_the_first_version() {
    let disk = Disk::with_file(VERSION_1_FILE);
    assert_eq!(corrupt(&disk.file(), r#""room":"canary-old-4""#), 1);
    let run = disk.start();
    assert_eq!(disk.aside(), 1);
    assert!(!run.is_lost());
    assert_eq!(run.used(), (5, 5));
    assert_eq!(run.orphan_rooms(), ["canary-old-2", "canary-old-3"]);
}

#[tokio::test(start_paused = true)]
async fn states_incidents_and_messages_are_saved_from_a_corrupt_file_as_far_as_they_can_be_read() {
    for (damaged, states, incidents, messages) in [
        ("DispatchAccepted", true, true, true),
        ("the state of support", false, true, true),
        ("the incident i-1", true, false, true),
        ("the message m-1", true, true, false),
    ] {
        let disk = Disk::new();
        full(&disk).await;
        let mut run = disk.start();
        run.history.record_detection(detection(1));
        run.writer.run_once();
        drop(run);
        assert!(corrupt(&disk.file(), damaged) > 0, "{damaged}");
        let run = disk.start();
        assert_eq!(disk.aside(), 1, "{damaged}");
        assert_eq!(run.used(), (2, 2), "{damaged}");
        let state = run.history.target_state("support").await.unwrap();
        assert_eq!(state.is_some(), states, "{damaged}");
        let found = run.history.incident("i-1".to_owned()).await.unwrap();
        assert_eq!(found.is_some(), incidents, "{damaged}");
        assert_eq!(!run.history.outbox().is_empty(), messages, "{damaged}");
    }
}

#[tokio::test(start_paused = true)]
async fn rows_saved_from_a_corrupt_file_survive_a_kill_before_the_last_step() {
    let disk = Disk::new();
    full(&disk).await;
    let file = disk.file();
    fs::rename(&file, file.with_extension("sqlite3.new")).unwrap();
    // The log of the corrupt file was not moved yet. It is that of another database, and its rows must not appear.
    let other = Disk::new();
    full(&other).await;
    let mut run = other.start();
    let open = run.open("stray", 7 * MINUTE).await;
    let log = fs::read(other.file().with_extension("sqlite3-wal")).unwrap();
    assert!(!log.is_empty());
    drop(open);
    fs::write(file.with_extension("sqlite3-wal"), log).unwrap();
    let run = disk.start();
    assert_eq!(run.used(), (2, 2));
    assert_eq!(run.orphan_rooms(), ["canary-test-1"]);
    // A half-written new file is replaced.
    drop(run);
    fs::remove_file(&file).unwrap();
    fs::write(file.with_extension("sqlite3.new"), "SQLite").unwrap();
    let run = disk.start();
    assert_eq!((run.used(), run.is_lost()), ((0, 0), false));
}

#[tokio::test(start_paused = true)]
async fn file_that_becomes_corrupt_in_use_degrades_the_history_and_the_ledger_goes_on_in_memory() {
    let disk = Disk::new();
    full(&disk).await;
    let mut run = disk.start();
    corrupt(&disk.file(), "canary-test-1");
    // SQLite reads no page again that it has in memory.
    let connection = &run.writer.store().connection;
    connection.execute_batch("PRAGMA shrink_memory").unwrap();
    let _open = run.open("2", MINUTE).await;
    assert!(run.history.is_degraded());
    assert_eq!(run.used(), (3, 3));
}

#[test]
fn file_of_a_newer_format_is_refused_and_left_unchanged() {
    let disk = Disk::new();
    drop(disk.start());
    let newer = Connection::open(disk.file()).unwrap();
    let known = disk.version();
    newer
        .pragma_update(None, "user_version", known + 1)
        .unwrap();
    drop(newer);
    let refused = History::prepare(&disk.settings, disk.clock())
        .err()
        .unwrap();
    assert!(matches!(
        refused,
        OpenError::Newer { found, known: newest, .. } if (found, newest) == (known + 1, known)
    ));
    let format = format!("(format {}", known + 1);
    assert!(refused.to_string().contains(&format));
    assert_eq!(disk.aside(), 0);
}

/// A file as an earlier version of this program left it: every table has rows.
const VERSION_1_FILE: &str = include_str!("tests/version_1.sql");

impl Disk {
    fn with_file(script: &str) -> Self {
        let disk = Self::new();
        fs::create_dir(&disk.settings.dir).unwrap();
        let file = Connection::open(disk.file()).unwrap();
        file.execute_batch(script).unwrap();
        disk
    }

    fn schema(&self) -> Vec<(String, Option<String>)> {
        let file = Connection::open(self.file()).unwrap();
        let sql = "SELECT name, sql FROM sqlite_schema ORDER BY name";
        let mut statement = file.prepare(sql).unwrap();
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
        // Two scripts with the same statements may be indented differently.
        let flat = |sql: String| sql.split_whitespace().collect::<Vec<_>>().join(" ");
        rows.unwrap()
            .map(|row| row.map(|(name, sql): (_, Option<String>)| (name, sql.map(flat))))
            .collect::<Result<_, _>>()
            .unwrap()
    }

    fn version(&self) -> i64 {
        let file = Connection::open(self.file()).unwrap();
        file.pragma_query_value(None, "user_version", |row| row.get(0))
            .unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn history_of_the_first_version_is_read_completely() {
    let disk = Disk::with_file(VERSION_1_FILE);
    let run = disk.start();
    assert!(!run.history.is_degraded());
    assert!(!run.is_lost());
    assert_eq!(disk.aside(), 0);
    assert_eq!(
        run.used(),
        (5, 5),
        "one room is settled, the other counts its worst case"
    );
    assert_eq!(run.history.used("beta").day, MINUTE);
    assert_eq!(run.orphan_rooms(), ["canary-old-2", "canary-old-3"]);
    assert_eq!(ids(&run.history, all()).await, ["b-old"]);
    let probe = run.history.probe("canary-old-4".to_owned()).await.unwrap();
    assert!(probe.unwrap().get().contains(r#""outcome":"failed""#));
    let seen = run.history.has_seen_agent("support", Some("my-agent"));
    assert!(seen.await.unwrap());
    let scheduled = BatchFilter {
        purpose: Some(SCHEDULED),
        ..all()
    };
    assert_eq!(ids(&run.history, scheduled).await, ["b-old"]);
    let confirmations = run.history.confirmations_used("acme", "support");
    assert_eq!(confirmations, Duration::ZERO);
    let recent = run.history.recent_probes("support", 9).await.unwrap();
    assert_eq!(recent.len(), 2);
    assert_eq!(recent[0].purpose, SCHEDULED);
    assert_eq!(recent[0].circumstances, Circumstances::default());
    assert_eq!(run.history.outbox(), []);
    assert_eq!(run.history.target_state("support").await.unwrap(), None);
    drop(run);
    let new = Disk::new();
    drop(new.start());
    assert_eq!(disk.schema(), new.schema(), "both end with the same schema");
    assert_eq!(disk.version(), new.version());
}

#[tokio::test(start_paused = true)]
async fn older_history_is_migrated_step_by_step_and_keeps_every_row() {
    // Both forms of a change: a column is added, and a table with rows that refer to it is rebuilt.
    const ADDED: &str = "ALTER TABLE rooms ADD COLUMN region TEXT NOT NULL DEFAULT 'eu'";
    const REBUILT: &str = "
        CREATE TABLE rebuilt (id TEXT PRIMARY KEY, target TEXT NOT NULL, head TEXT NOT NULL) STRICT;
        INSERT INTO rebuilt SELECT id, target, head FROM batches;
        DROP TABLE batches;
        ALTER TABLE rebuilt RENAME TO batches;
    ";
    let disk = Disk::with_file(VERSION_1_FILE);
    let steps = [store::MIGRATIONS, &[ADDED, REBUILT]].concat();
    let open = |steps| Store::open_with_migrations(&disk.settings.dir, disk.clock()(), steps);
    let (store, loaded) = open(&steps).unwrap();
    assert_eq!(disk.version(), i64::try_from(steps.len()).unwrap());
    assert_eq!(loaded.ledger.rows.len(), 2);
    let sums = loaded.ledger.sums.iter().map(|sum| sum.seconds);
    assert_eq!(sums.sum::<u64>(), 360);
    let count = |sql: &str| -> i64 {
        store
            .connection
            .query_row(sql, [], |row| row.get(0))
            .unwrap()
    };
    assert_eq!(count("SELECT count(*) FROM rooms WHERE region = 'eu'"), 3);
    assert_eq!(
        count("SELECT count(*) FROM probes JOIN batches ON id = batch"),
        2
    );
    assert_eq!(count("SELECT count(*) FROM agents_seen"), 1);
    assert_eq!(count("PRAGMA foreign_keys"), 1);
    drop(store);
    let (_again, loaded) = open(&steps).unwrap();
    assert_eq!(loaded.ledger.rows.len(), 2, "no step runs twice");
    assert_eq!(disk.aside(), 0);
}

#[test]
fn migration_that_fails_changes_nothing_and_the_file_stays_readable() {
    let disk = Disk::with_file(VERSION_1_FILE);
    drop(disk.start());
    let before = (disk.schema(), disk.version());
    let half = "ALTER TABLE rooms ADD COLUMN region TEXT; INSERT INTO missing VALUES (1);";
    let steps = [store::MIGRATIONS, &[half]].concat();
    let failed = Store::open_with_migrations(&disk.settings.dir, disk.clock()(), &steps).err();
    assert!(
        matches!(&failed, Some(StoreOpenError::Unavailable(why)) if why.contains("no such table")),
        "{failed:?}"
    );
    assert_eq!((disk.schema(), disk.version()), before);
    assert_eq!(disk.start().orphan_rooms().len(), 2);
}

#[test]
fn folder_in_use_is_refused_until_its_user_has_ended() {
    let disk = Disk::new();
    let run = disk.start();
    let refused = History::prepare(&disk.settings, disk.clock())
        .err()
        .unwrap();
    assert!(
        refused
            .to_string()
            .starts_with("another livekit-canary uses the folder")
    );
    run.kill();
    History::prepare(&disk.settings, disk.clock()).unwrap();
}

#[test]
fn folder_in_use_is_refused_although_its_lock_file_was_deleted() {
    let disk = Disk::new();
    let _run = disk.start();
    fs::remove_file(disk.settings.dir.join("lock")).unwrap();
    let refused = History::prepare(&disk.settings, disk.clock());
    let refused = refused.err().unwrap().to_string();
    assert!(refused.contains("uses the folder"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn folder_that_was_removed_or_replaced_in_use_is_noticed_and_its_next_run_starts_lost() {
    for replaced in [false, true] {
        let disk = Disk::new();
        let mut run = disk.start();
        run.open("1", 3 * MINUTE).await.settle(2 * MINUTE);
        let _open = run.open("2", MINUTE).await;
        run.history.gone(&room("1"));
        run.history.record_detection(detection(1));
        run.writer.run_once();
        fs::rename(&disk.settings.dir, disk.dir.path().join("moved")).unwrap();
        if replaced {
            drop(disk.start());
        }
        assert_eq!(run.history.faults(), 0);
        run.writer.run_once();
        assert_eq!(run.history.faults(), 1, "replaced: {replaced}");
        // This run knows what was used, and its open room is in the new journal.
        assert_eq!((run.used(), run.is_lost()), ((3, 3), false));
        record(
            &run,
            &batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
        );
        run.writer.run_once();
        assert!(!run.history.is_degraded());
        assert_eq!(ids(&run.history, all()).await, ["b1"]);
        run.kill();
        let run = disk.start();
        assert!(run.is_lost(), "replaced: {replaced}");
        assert_eq!(run.orphan_rooms(), ["canary-test-2"]);
        let [state, incidents] = stored(&run).await;
        assert_eq!((state.as_str(), incidents.as_str()), ("1", "i-1"));
        assert_eq!(outbox(&run), ["m-1"]);
    }
}

#[tokio::test(start_paused = true)]
async fn log_without_its_database_means_a_lost_ledger() {
    let disk = Disk::new();
    let mut run = disk.start();
    let _open = run.open("1", MINUTE).await;
    run.kill();
    fs::remove_file(disk.file()).unwrap();
    let run = disk.start();
    assert!(run.is_lost());
    let names = fs::read_dir(&disk.settings.dir).unwrap();
    let names: Vec<_> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let aside = names.iter().filter(|name| name.contains("-wal.orphaned-"));
    assert_eq!(aside.count(), 1, "{names:?}");
}

#[tokio::test(start_paused = true)]
async fn files_are_readable_by_their_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let disk = Disk::new();
    let modes = |disk: &Disk| {
        let files = fs::read_dir(&disk.settings.dir).unwrap();
        let modes = files.map(|file| {
            let file = file.unwrap();
            let mode = file.metadata().unwrap().permissions().mode() & 0o777;
            (file.file_name().into_string().unwrap(), mode)
        });
        modes.collect::<BTreeMap<_, _>>()
    };
    let private = |names: &[&str]| {
        let modes = names.iter().map(|name| ((*name).to_owned(), 0o600));
        modes.collect::<BTreeMap<_, _>>()
    };
    let mut run = disk.start();
    let _open = run.open("1", MINUTE).await;
    let all = private(&[
        "history.sqlite3",
        "history.sqlite3-shm",
        "history.sqlite3-wal",
        "lock",
    ]);
    assert_eq!(modes(&disk), all);
    run.kill();
    // Files of an earlier version.
    for name in ["history.sqlite3", "history.sqlite3-wal", "lock"] {
        let file = disk.settings.dir.join(name);
        fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
    }
    let mut run = disk.start();
    let _open = run.open("2", MINUTE).await;
    assert_eq!(modes(&disk), all);
}

// Batches.

#[tokio::test(start_paused = true)]
async fn batches_beyond_the_queue_are_dropped_and_counted_and_no_ledger_row_is_dropped() {
    let disk = Disk::new();
    let mut run = disk.start();
    let _first = run.open("first", MINUTE).await;
    run.fill_disk();
    for index in 0..MAX_QUEUED_BATCHES + 3 {
        let id = format!("b{index:02}");
        record(
            &run,
            &batch(&id, "support", "2026-03-10T12:00:00Z", Outcome::Ok),
        );
        run.open(&id, MINUTE).await.settle(MINUTE);
    }
    assert!(run.history.is_degraded());
    run.free_disk();
    run.writer.run_once();
    // The first batches may fit into pages that the file already has.
    let (stored, dropped) = (ids(&run.history, all()).await.len(), run.history.dropped());
    assert!((2..=3).contains(&dropped), "{dropped}");
    assert_eq!(stored as u64 + dropped, MAX_QUEUED_BATCHES as u64 + 3);
    assert_eq!(disk.rows(), i64::try_from(MAX_QUEUED_BATCHES).unwrap() + 4);
}

#[tokio::test(start_paused = true)]
async fn batches_are_found_by_target_and_result_page_by_page() {
    let disk = Disk::new();
    let mut run = disk.start();
    let silent = || failed(Reason::AgentSilent, "no speech");
    for (id, target, outcome) in [
        ("b1", "support", Outcome::Ok),
        ("b2", "sales", Outcome::Ok),
        ("b3", "support", silent()),
        ("b4", "support", Outcome::Ok),
        ("b5", "sales", silent()),
    ] {
        record(&run, &batch(id, target, "2026-03-10T12:00:00Z", outcome));
    }
    run.writer.run_once();
    let find = async |target: Option<&str>, result, before: Option<&str>, limit| {
        let own = |text: Option<&str>| text.map(str::to_owned);
        let filter = BatchFilter {
            target: own(target),
            result,
            before: own(before),
            limit,
            ..BatchFilter::default()
        };
        ids(&run.history, filter).await.join(" ")
    };
    assert_eq!(find(None, None, None, 9).await, "b5 b4 b3 b2 b1");
    assert_eq!(find(None, None, None, 2).await, "b5 b4");
    assert_eq!(find(None, None, Some("b4"), 2).await, "b3 b2");
    assert_eq!(find(Some("support"), None, None, 9).await, "b4 b3 b1");
    let (degraded, ok) = (Some(BatchResult::Degraded), Some(BatchResult::Ok));
    assert_eq!(find(None, degraded, None, 9).await, "b5 b3");
    assert_eq!(find(Some("sales"), ok, Some("b5"), 9).await, "b2");
    assert_eq!(find(Some("other"), None, None, 9).await, "");
}

#[tokio::test(start_paused = true)]
async fn batches_are_found_by_their_purpose() {
    let disk = Disk::new();
    let mut run = disk.start();
    for (id, purpose) in [
        ("b1", Purpose::Manual),
        ("b2", Purpose::Confirmation),
        ("b3", SCHEDULED),
        ("b4", Purpose::Confirmation),
    ] {
        let mut batch = batch(id, "support", "2026-03-10T12:00:00Z", Outcome::Ok);
        batch.purpose = purpose;
        record(&run, &batch);
    }
    run.writer.run_once();
    for (purpose, expected) in [
        (SCHEDULED, "b3"),
        (Purpose::Confirmation, "b4 b2"),
        (Purpose::Manual, "b1"),
    ] {
        let filter = BatchFilter {
            target: Some("support".to_owned()),
            purpose: Some(purpose),
            ..all()
        };
        assert_eq!(ids(&run.history, filter).await.join(" "), expected);
    }
}

/// A batch like [`batch`], whose rooms opened one second apart, each on a node and a worker of its own.
fn batch_in_time(id: &str, target: &str, started_at: &str, outcome: Outcome) -> BatchReport {
    let mut report = batch(id, target, started_at, outcome);
    for (place, probe) in (0..).zip(&mut report.probes) {
        probe.started_at = report.started_at + TimeDelta::seconds(place);
        probe.circumstances.node = Some(format!("ND_{place}"));
        probe.circumstances.worker = Some(format!("AW_{place}"));
    }
    report
}

/// Five batches of two rooms, two hours apart. The first room of each is ok.
fn record_series(run: &mut TestRun) {
    for (id, target, hour, outcome) in [
        ("b1", "support", 0, Outcome::Ok),
        ("b2", "sales", 2, failed(Reason::AgentSilent, "no speech")),
        ("b3", "support", 4, failed(Reason::AgentNoShow, "no agent")),
        ("b4", "support", 6, failed(Reason::SignalLost, "reset")),
        ("b5", "sales", 8, Outcome::Aborted),
    ] {
        let started_at = format!("2026-03-10T{hour:02}:00:00Z");
        let mut batch = batch_in_time(id, target, &started_at, outcome);
        if id == "b4" {
            batch.purpose = Purpose::Confirmation;
        }
        record(run, &batch);
    }
    run.writer.run_once();
}

#[expect(
    clippy::too_many_lines,
    reason = "all filters on one series of batches"
)]
#[tokio::test(start_paused = true)]
async fn probes_are_found_by_every_filter_and_page_by_page() {
    let disk = Disk::new();
    let mut run = disk.start();
    record_series(&mut run);
    let all = || ProbeFilter {
        limit: MAX_BATCHES,
        ..ProbeFilter::default()
    };
    let own = |text: &str| Some(text.to_owned());
    let with = |room: RoomFilter| ProbeFilter { room, ..all() };
    let rooms = async |filter: ProbeFilter| {
        let found = run.history.probes(filter).await.unwrap();
        let room = |probe: &StoredDocument| {
            let probe: serde_json::Value = serde_json::from_str(probe.document.get()).unwrap();
            let room = probe["room"].as_str().unwrap().to_owned();
            assert!(
                room.contains(probe["batch_id"].as_str().unwrap()),
                "{probe}"
            );
            room.strip_prefix("canary-").unwrap().to_owned()
        };
        (
            found.iter().map(room).collect::<Vec<_>>().join(" "),
            found.last().map(|last| last.id.parse().unwrap()),
        )
    };
    for (filter, expected) in [
        (all(), "b5-1 b5-0 b4-1 b4-0 b3-1 b3-0 b2-1 b2-0 b1-1 b1-0"),
        (
            ProbeFilter {
                target: own("sales"),
                ..all()
            },
            "b5-1 b5-0 b2-1 b2-0",
        ),
        (
            ProbeFilter {
                outcome: Some("failed"),
                ..all()
            },
            "b4-1 b3-1 b2-1",
        ),
        (
            ProbeFilter {
                outcome: Some("aborted"),
                ..all()
            },
            "b5-1",
        ),
        (
            ProbeFilter {
                outcome: Some("ok"),
                target: own("support"),
                ..all()
            },
            "b4-0 b3-0 b1-1 b1-0",
        ),
        (
            ProbeFilter {
                purpose: Some(Purpose::Confirmation),
                ..all()
            },
            "b4-1 b4-0",
        ),
        (
            ProbeFilter {
                since: Some(at("2026-03-10T04:00:01Z")),
                until: Some(at("2026-03-10T06:00:01Z")),
                ..all()
            },
            "b4-0 b3-1",
        ),
        (
            with(RoomFilter {
                reason: Some(Reason::AgentSilent),
                ..RoomFilter::default()
            }),
            "b2-1",
        ),
        (
            with(RoomFilter {
                origin: Some(Origin::Agent),
                ..RoomFilter::default()
            }),
            "b3-1 b2-1",
        ),
        (
            with(RoomFilter {
                reason: Some(Reason::AgentSilent),
                origin: Some(Origin::Livekit),
                ..RoomFilter::default()
            }),
            "",
        ),
        (
            ProbeFilter {
                target: own("support"),
                ..with(RoomFilter {
                    node: own("ND_1"),
                    worker: own("AW_1"),
                    ..RoomFilter::default()
                })
            },
            "b4-1 b3-1 b1-1",
        ),
        (
            with(RoomFilter {
                node: own("ND_1"),
                worker: own("AW_0"),
                ..RoomFilter::default()
            }),
            "",
        ),
    ] {
        assert_eq!(rooms(filter.clone()).await.0, expected, "{filter:?}");
    }
    let mut pages = Vec::new();
    let mut before = None;
    loop {
        let filter = ProbeFilter {
            before,
            limit: 4,
            ..all()
        };
        let (page, last) = rooms(filter).await;
        if page.is_empty() {
            break;
        }
        pages.push(page);
        before = last;
    }
    assert_eq!(
        pages,
        ["b5-1 b5-0 b4-1 b4-0", "b3-1 b3-0 b2-1 b2-0", "b1-1 b1-0"]
    );
}

#[tokio::test(start_paused = true)]
async fn pages_of_probes_that_started_in_the_same_millisecond_miss_none() {
    let disk = Disk::new();
    let mut run = disk.start();
    for number in 0..3 {
        let id = format!("b{number}");
        let mut batch = batch_in_time(&id, "support", "2026-03-10T12:00:00Z", Outcome::Ok);
        for probe in &mut batch.probes {
            probe.started_at = batch.started_at;
        }
        record(&run, &batch);
    }
    run.writer.run_once();
    let mut seen = BTreeSet::new();
    let mut before = None;
    for _ in 0..6 {
        let filter = ProbeFilter {
            before,
            limit: 1,
            ..ProbeFilter::default()
        };
        let page = run.history.probes(filter).await.unwrap();
        seen.insert(page[0].document.get().to_owned());
        before = Some(page[0].id.parse().unwrap());
    }
    assert_eq!(seen.len(), 6);
}

#[tokio::test(start_paused = true)]
async fn batches_are_found_by_time_and_by_their_rooms() {
    let disk = Disk::new();
    let mut run = disk.start();
    record_series(&mut run);
    let own = |text: &str| Some(text.to_owned());
    let with = |with_room: RoomFilter| BatchFilter { with_room, ..all() };
    let agent = || RoomFilter {
        origin: Some(Origin::Agent),
        ..RoomFilter::default()
    };
    for (filter, expected) in [
        (
            BatchFilter {
                since: Some(at("2026-03-10T02:00:00Z")),
                until: Some(at("2026-03-10T06:00:00Z")),
                ..all()
            },
            "b3 b2",
        ),
        (
            BatchFilter {
                since: Some(at("2026-03-10T02:00:00Z")),
                target: own("support"),
                limit: 1,
                ..all()
            },
            "b4",
        ),
        (with(agent()), "b3 b2"),
        (
            BatchFilter {
                target: own("support"),
                ..with(agent())
            },
            "b3",
        ),
        (
            BatchFilter {
                before: own("b3"),
                ..with(agent())
            },
            "b2",
        ),
        (
            BatchFilter {
                until: Some(at("2026-03-10T04:00:00Z")),
                ..with(agent())
            },
            "b2",
        ),
        (
            with(RoomFilter {
                reason: Some(Reason::SignalLost),
                node: own("ND_1"),
                ..RoomFilter::default()
            }),
            "b4",
        ),
        // Both conditions are met, but by different rooms.
        (
            with(RoomFilter {
                reason: Some(Reason::SignalLost),
                node: own("ND_0"),
                ..RoomFilter::default()
            }),
            "",
        ),
        (
            BatchFilter {
                limit: 2,
                ..with(RoomFilter {
                    worker: own("AW_0"),
                    ..RoomFilter::default()
                })
            },
            "b5 b4",
        ),
    ] {
        assert_eq!(
            ids(&run.history, filter.clone()).await.join(" "),
            expected,
            "{filter:?}"
        );
    }
}

// Statistics and events.

#[tokio::test(start_paused = true)]
async fn statistics_have_the_rooms_and_delays_of_scheduled_batches_by_hour_and_day() {
    let disk = Disk::new();
    let mut run = disk.start();
    record_series(&mut run);
    let day_before = batch_in_time("a1", "support", "2026-03-09T04:00:00Z", Outcome::Ok);
    record(&run, &day_before);
    let week_before = failed(Reason::AgentSilent, "no speech");
    record(
        &run,
        &batch_in_time("a0", "support", "2026-03-03T11:59:59Z", week_before),
    );
    run.writer.run_once();
    let statistics = run
        .history
        .statistics(at("2026-03-10T12:34:56Z"), None)
        .await
        .unwrap();
    let targets: Vec<_> = statistics
        .targets
        .iter()
        .map(|it| it.target.as_str())
        .collect();
    assert_eq!(targets, ["sales", "support"]);
    let [sales, support] = &statistics.targets[..] else {
        unreachable!()
    };
    let counts = |span: &statistics::SpanStatistics| (span.ok, span.failed);
    assert_eq!(support.hours.len(), 24);
    assert_eq!(support.hours[0].from, at("2026-03-09T13:00:00Z"));
    assert_eq!(support.hours[23].from, at("2026-03-10T12:00:00Z"));
    // b4 was a confirmation, so its rooms are in no figure.
    assert_eq!(counts(support.last_day()), (3, 1));
    assert_eq!(counts(&support.hours[11]), (2, 0), "midnight");
    assert_eq!(counts(&support.hours[15]), (1, 1));
    assert_eq!(counts(&support.compared[1].day_before), (2, 0));
    assert_eq!(counts(&support.hours_before[15]), (2, 0));
    assert_eq!(support.hours_before[15].from, at("2026-03-09T04:00:00Z"));
    assert_eq!(
        counts(&support.compared[1].week_before),
        (1, 1),
        "its rooms are in two hours"
    );
    assert_eq!(support.days.len(), 30);
    assert_eq!(counts(&support.days[29]), (3, 1));
    assert_eq!(counts(&support.days[28]), (2, 0));
    assert_eq!(counts(&support.days[22]), (1, 1));
    assert_eq!(support.days[22].from, at("2026-03-03T00:00:00Z"));
    assert_eq!(
        counts(sales.last_day()),
        (2, 1),
        "an aborted room does not count"
    );
    let reasons = |target: &statistics::TargetStatistics| {
        let reasons = target.reasons.iter();
        let reasons = reasons.map(|it| format!("{} {}", it.reason, it.rooms));
        reasons.collect::<Vec<_>>().join(", ")
    };
    assert_eq!(
        (reasons(support).as_str(), reasons(sales).as_str()),
        ("agent_no_show 1", "agent_silent 1")
    );
    assert_eq!(support.last_hour, RoomCount::default());
    let of_one = run
        .history
        .statistics(at("2026-03-10T12:34:56Z"), Some("support".to_owned()))
        .await
        .unwrap();
    assert_eq!(of_one.targets, std::slice::from_ref(support));
    let earlier = run
        .history
        .statistics(at("2026-03-10T08:59:59Z"), None)
        .await
        .unwrap();
    assert_eq!(earlier.targets[0].last_hour, RoomCount { ok: 1, failed: 0 });
    let later = run
        .history
        .statistics(at("2026-05-10T12:00:00Z"), None)
        .await
        .unwrap();
    assert_eq!(later.targets, []);
    // Up to 0.8 % off: the delays are 512 ms, 819 ms and 1250 ms.
    let close = |found: Option<f64>, exact: f64| {
        let found = found.unwrap();
        assert!(
            (found - exact).abs() <= 0.008 * exact,
            "{found} instead of {exact}"
        );
    };
    let midnight = &support.hours[11];
    for delay in [midnight.join_delay.p50, support.last_day().join_delay.p90] {
        close(delay, 0.512);
    }
    close(midnight.first_speech_delay.p90, 0.819);
    close(midnight.reply_delay.p50, 1.25);
    assert_eq!(support.hours[12].reply_delay.p50, None);
}

#[tokio::test(start_paused = true)]
async fn statistics_count_what_shows_something_of_the_service() {
    let disk = Disk::new();
    let mut run = disk.start();
    for (minute, reason) in Reason::ALL.iter().enumerate() {
        let started_at = format!("2026-03-10T12:{minute:02}:00Z");
        let outcome = failed(*reason, "as scripted");
        let id = format!("b{minute:02}");
        record(&run, &batch_in_time(&id, "support", &started_at, outcome));
    }
    run.writer.run_once();
    let statistics = run
        .history
        .statistics(at("2026-03-10T12:59:00Z"), None)
        .await;
    let [support] = &statistics.unwrap().targets[..] else {
        panic!("one target")
    };
    // Wrong settings, refused credentials, another client that removes the canary, and the canary itself.
    let own = ["auth_rejected", "config_rejected", "internal", "removed"];
    let (ok, failed) = (Reason::ALL.len(), Reason::ALL.len() - own.len());
    assert_eq!(support.last_hour, RoomCount { ok, failed });
    let day = support.last_day();
    assert_eq!((day.ok, day.failed), (ok as u64, failed as u64));
    for reason in own {
        assert!(
            support.reasons.iter().any(|it| it.reason == reason),
            "{reason}: {:?}",
            support.reasons
        );
    }
}

#[tokio::test(start_paused = true)]
async fn statistics_outlive_the_batches_they_were_counted_from() {
    let disk = Disk::new();
    let mut run = disk.start();
    record_series(&mut run);
    let now = at("2026-03-10T12:34:56Z");
    let before = run.history.statistics(now, None).await.unwrap();
    let connection = &run.writer.store().connection;
    connection.execute("DELETE FROM batches", []).unwrap();
    let after = run.history.statistics(now, None).await.unwrap();
    assert_eq!(after.targets[0].days, before.targets[0].days);
    assert_eq!(after.targets[0].reasons, []);
}

/// The columns and statistics that the migration fills must be those that recording fills.
#[tokio::test(start_paused = true)]
async fn migration_fills_columns_and_statistics_as_recording_does() {
    let disk = Disk::new();
    let mut run = disk.start();
    record_series(&mut run);
    // Delays of every size, the smallest and largest classes included.
    let mut batch = batch_in_time("b6", "support", "2026-03-10T09:00:00Z", Outcome::Ok);
    let template = batch.probes[0].clone();
    batch.probes = (0..40_u32)
        .map(|number| {
            let join = 2_u64.pow(number / 2).saturating_sub(u64::from(number % 2));
            let marks = [
                (Milestone::DispatchSent, 100),
                (Milestone::AgentJoined, 100 + join),
                (Milestone::AgentSpoke, 101 + join * 2),
            ];
            let mut probe = sample::probe(1, Outcome::Ok, Evidence::default(), &marks);
            probe.room = room(&number.to_string());
            probe.started_at = template.started_at;
            probe.join_upper_bound = number == 7;
            if number % 10 == 9 {
                probe.outcome = failed(Reason::ConfigRejected, "as scripted");
            }
            probe
        })
        .collect();
    record(&run, &batch);
    run.writer.run_once();
    drop(run);
    let read = |disk: &Disk, sql: &str| -> Vec<String> {
        let file = Connection::open(disk.file()).unwrap();
        let mut statement = file.prepare(sql).unwrap();
        let columns = statement.column_count();
        let rows = statement.query_map([], |row| {
            let cells = (0..columns).map(|column| {
                let cell: rusqlite::types::Value = row.get(column)?;
                // The order of an object's keys does not matter.
                Ok(match cell {
                    rusqlite::types::Value::Text(text) if text.starts_with('{') => {
                        let sorted: BTreeMap<u64, u64> = serde_json::from_str(&text).unwrap();
                        format!("{sorted:?}")
                    }
                    other => format!("{other:?}"),
                })
            });
            cells.collect::<rusqlite::Result<Vec<_>>>()
        });
        let rows = rows.unwrap().map(|row| row.unwrap().join(" "));
        rows.collect()
    };
    let statistics = "SELECT * FROM statistics ORDER BY width, start, target";
    let columns = "SELECT room, target, purpose FROM probes ORDER BY room";
    let recorded = (read(&disk, statistics), read(&disk, columns));
    assert_eq!(recorded.0.len(), 7, "{recorded:#?}");
    // The same file as format 2 left it.
    let older = Disk::new();
    fs::create_dir(&older.settings.dir).unwrap();
    let [version_1, version_2, ..] = store::MIGRATIONS else {
        unreachable!()
    };
    let file = Connection::open(older.file()).unwrap();
    file.execute_batch(&format!(
        "{version_1} {version_2} INSERT INTO ledger (lost) VALUES (0); PRAGMA user_version = 2;
         ATTACH '{}' AS newer;
         INSERT INTO batches SELECT * FROM newer.batches;
         INSERT INTO probes SELECT room, batch, place, outcome, reason, started_at, document,
                                   node, region, worker, media_path, agent_version FROM newer.probes;",
        disk.file().display()
    ))
    .unwrap();
    drop(file);
    drop(older.start());
    assert_eq!(older.aside(), 0);
    assert_eq!((read(&older, statistics), read(&older, columns)), recorded);
}

fn deploy(at_time: &str, target: Option<&str>, text: &str) -> HistoryEvent {
    let target = target.map(str::to_owned);
    HistoryEvent::new(at(at_time), target, "deploy".to_owned(), text.to_owned())
}

async fn event_texts(history: &History, filter: EventFilter) -> String {
    let events = history.events(filter).await.unwrap();
    let texts: Vec<_> = events.into_iter().map(|event| event.text).collect();
    texts.join(" ")
}

#[tokio::test(start_paused = true)]
async fn event_is_durable_when_it_is_confirmed_and_is_found_by_target_and_time() {
    let disk = Disk::new();
    let mut run = disk.start();
    for event in [
        deploy("2026-03-10T10:00:00Z", None, "all"),
        deploy("2026-03-10T08:00:00Z", Some("support"), "support"),
        deploy("2026-03-10T11:00:00.5Z", Some("sales"), "sales"),
    ] {
        let recording = run.history.record_event(event);
        let (recorded, ()) = tokio::join!(recording, async { run.writer.run_once() });
        assert_eq!(recorded, EventRecorded::Durable);
    }
    run.kill();
    let run = disk.start();
    let all = || EventFilter {
        limit: MAX_BATCHES,
        ..EventFilter::default()
    };
    assert_eq!(event_texts(&run.history, all()).await, "sales all support");
    let of_support = EventFilter {
        target: Some("support".to_owned()),
        ..all()
    };
    assert_eq!(event_texts(&run.history, of_support).await, "all support");
    let in_time = EventFilter {
        since: Some(at("2026-03-10T10:00:00Z")),
        until: Some(at("2026-03-10T11:00:00.5Z")),
        ..all()
    };
    assert_eq!(event_texts(&run.history, in_time).await, "all");
    let last = EventFilter { limit: 1, ..all() };
    let last = run.history.events(last).await.unwrap().remove(0);
    assert_eq!(last.at, at("2026-03-10T11:00:00.5Z"));
    let earlier = EventFilter {
        before: Some(last.id),
        ..all()
    };
    assert_eq!(event_texts(&run.history, earlier).await, "all support");
}

#[tokio::test(start_paused = true)]
async fn event_waits_for_a_full_disk_and_further_ones_are_dropped_beyond_the_bound() {
    let disk = Disk::new();
    let mut run = disk.start();
    run.fill_disk();
    let text = "x".repeat(5000);
    for number in 0..=MAX_QUEUED_EVENTS {
        let recording = run
            .history
            .record_event(deploy("2026-03-10T08:00:00Z", None, &text));
        let (recorded, ()) = tokio::join!(recording, async { run.writer.run_once() });
        let expected = match number {
            MAX_QUEUED_EVENTS => EventRecorded::Dropped,
            _ => EventRecorded::Waiting,
        };
        assert_eq!(recorded, expected, "{number}");
    }
    run.free_disk();
    run.writer.run_once();
    let all = EventFilter {
        limit: MAX_BATCHES,
        ..EventFilter::default()
    };
    let events = run.history.events(all).await.unwrap();
    assert_eq!(events.len(), MAX_QUEUED_EVENTS);
}

#[tokio::test(start_paused = true)]
async fn events_and_statistics_expire() {
    let disk = Disk::new();
    let mut run = disk.start();
    record_series(&mut run);
    for (at, text) in [
        ("2026-03-01T00:00:00Z", "old"),
        ("2026-03-09T00:00:00Z", "new"),
    ] {
        let recording = run.history.record_event(deploy(at, None, text));
        tokio::join!(recording, async { run.writer.run_once() });
    }
    let settings = config::HistorySettings {
        keep: 5 * DAY,
        ..disk.settings.clone()
    };
    delete_expired(&mut run, &settings);
    let all = || EventFilter {
        limit: MAX_BATCHES,
        ..EventFilter::default()
    };
    assert_eq!(event_texts(&run.history, all()).await, "new");
    let now = at("2026-03-10T12:00:00Z");
    assert_eq!(
        run.history
            .statistics(now, None)
            .await
            .unwrap()
            .targets
            .len(),
        2
    );
    disk.set("2026-04-20T12:00:00Z");
    delete_expired(&mut run, &settings);
    assert_eq!(run.history.statistics(now, None).await.unwrap().targets, []);
}

#[tokio::test(start_paused = true)]
async fn recent_probes_are_those_of_the_target_by_time_with_what_may_differ() {
    let disk = Disk::new();
    let mut run = disk.start();
    let silent = failed(Reason::AgentSilent, "no speech");
    let mut scheduled = batch("b1", "support", "2026-03-10T12:00:00Z", silent);
    let mut confirmation = batch("b2", "support", "2026-03-10T12:00:10Z", Outcome::Ok);
    confirmation.purpose = Purpose::Confirmation;
    // The last room of the scheduled batch opened after the confirmation began.
    let seconds = [(&mut scheduled, [0, 15]), (&mut confirmation, [10, 20])];
    for (batch, seconds) in seconds {
        for (probe, second) in batch.probes.iter_mut().zip(seconds) {
            probe.started_at = at("2026-03-10T12:00:00Z") + TimeDelta::seconds(second);
            probe.circumstances = Circumstances {
                node: Some("ND_1".to_owned()),
                region: None,
                worker: Some(format!("AW_{second}")),
                media_path: Some(crate::livekit::event::MediaPath::Tcp),
                agent_version: Some("1.2".to_owned()),
            };
        }
    }
    record(&run, &scheduled);
    record(
        &run,
        &batch("b3", "sales", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    record(&run, &confirmation);
    run.writer.run_once();
    let recent = run.history.recent_probes("support", 3).await.unwrap();
    let rooms: Vec<_> = recent.iter().map(|probe| probe.room.as_str()).collect();
    assert_eq!(rooms, ["canary-b2-1", "canary-b1-1", "canary-b2-0"]);
    let expected = RecentProbe {
        room: "canary-b1-1".to_owned(),
        batch_id: "b1".to_owned(),
        purpose: SCHEDULED,
        place: 1,
        started_at: at("2026-03-10T12:00:15Z"),
        outcome: "failed".to_owned(),
        reason: Some("agent_silent".to_owned()),
        circumstances: scheduled.probes[1].circumstances.clone(),
    };
    assert_eq!(recent[1], expected);
    assert_eq!(recent[0].purpose, Purpose::Confirmation);
}

#[tokio::test(start_paused = true)]
async fn batch_and_probe_are_returned_as_the_documents_that_were_rendered() {
    let disk = Disk::new();
    let mut run = disk.start();
    let mut mixed = sample::mixed();
    for probe in &mut mixed.probes {
        // There are no files.
        probe.recording = None;
    }
    record(&run, &mixed);
    run.writer.run_once();
    let rendered = crate::report::json::render(&mixed, &target(), &sample::project());
    let mut rendered: serde_json::Value = serde_json::from_str(&rendered).unwrap();
    let kept = run
        .history
        .batch(mixed.batch_id.clone())
        .await
        .unwrap()
        .unwrap();
    let kept: serde_json::Value = serde_json::from_str(kept.get()).unwrap();
    assert_eq!(kept, rendered);

    let one = mixed.probes[1].room.clone();
    let kept = run.history.probe(one.0).await.unwrap().unwrap();
    let kept: serde_json::Value = serde_json::from_str(kept.get()).unwrap();
    let expected = rendered["probes"][1].as_object_mut().unwrap();
    expected.insert("batch_id".to_owned(), mixed.batch_id.clone().into());
    expected.insert("target".to_owned(), mixed.target.clone().into());
    assert_eq!(kept, rendered["probes"][1]);

    assert!(
        run.history
            .batch("none".to_owned())
            .await
            .unwrap()
            .is_none()
    );
    assert!(run.history.probe(room("none").0).await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn last_batch_that_was_not_aborted_is_known_after_a_restart() {
    let disk = Disk::new();
    let mut run = disk.start();
    record(
        &run,
        &batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    let silent = failed(Reason::AgentSilent, "no speech");
    record(
        &run,
        &batch("b2", "support", "2026-03-10T12:15:00Z", silent),
    );
    record(
        &run,
        &batch("b3", "support", "2026-03-10T12:30:00Z", Outcome::Aborted),
    );
    run.writer.run_once();
    run.kill();
    let run = disk.start();
    let last = run
        .history
        .last_completed("support", &[Purpose::Scheduled, Purpose::Manual])
        .await
        .unwrap();
    let expected = LastBatch {
        batch_id: "b2".to_owned(),
        started_at: at("2026-03-10T12:15:00Z"),
        ended_at: at("2026-03-10T12:15:40Z"),
        result: "degraded".to_owned(),
        ok: 1,
        failed: 1,
        aborted: 0,
    };
    assert_eq!(last, Some(expected));
    assert_eq!(
        run.history
            .last_completed("sales", &[Purpose::Scheduled, Purpose::Manual])
            .await
            .unwrap(),
        None
    );
}

#[tokio::test(start_paused = true)]
async fn agent_counts_as_seen_under_its_configured_name_only() {
    let disk = Disk::new();
    let mut run = disk.start();
    let no_show = sample::probe(
        1,
        failed(Reason::DispatchUnanswered, ""),
        Evidence::default(),
        &WELL[..6],
    );
    let mut unseen = batch("b1", "sales", "2026-03-10T12:00:00Z", Outcome::Ok);
    unseen.probes = vec![no_show];
    record(&run, &unseen);
    record(
        &run,
        &batch("b2", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    run.writer.run_once();
    for (target, agent_name, seen) in [
        ("support", Some("my-agent"), true),
        ("support", Some("my-agnet"), false),
        ("support", None, false),
        ("sales", Some("my-agent"), false),
    ] {
        let found = run
            .history
            .has_seen_agent(target, agent_name)
            .await
            .unwrap();
        assert_eq!(found, seen, "{target} {agent_name:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn batch_that_the_schema_rejects_is_dropped_as_one_fault_and_holds_up_no_other() {
    let disk = Disk::new();
    let mut run = disk.start();
    let mut twice = batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok);
    twice.probes[1].room = twice.probes[0].room.clone();
    record(&run, &twice);
    record(
        &run,
        &batch("b2", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    run.writer.run_once();
    assert_eq!(ids(&run.history, all()).await, ["b2"]);
    assert_eq!((run.history.dropped(), run.history.faults()), (1, 1));
    assert!(!run.history.is_degraded());
}

// States, incidents and messages.

/// What `support` records as its change with this number: an open incident, and a message about it.
fn detection(number: u32) -> DetectionRecord {
    let now = at("2026-03-10T12:00:00Z") + TimeDelta::seconds(number.into());
    DetectionRecord {
        target: "support".to_owned(),
        state: format!(r#"{{"is":"the state of support","number":{number}}}"#),
        incident: Some(IncidentRecord {
            id: format!("i-{number}"),
            target: "support".to_owned(),
            project: "acme".to_owned(),
            fault: "agent".to_owned(),
            began_at: now,
            ended_at: None,
            document: format!(r#"{{"id":"i-{number}","is":"the incident i-{number}"}}"#),
        }),
        messages: vec![message(number)],
    }
}

fn message(number: u32) -> OutboxMessage {
    OutboxMessage {
        id: format!("m-{number}"),
        channel: "oncall".to_owned(),
        created_at: at("2026-03-10T12:00:00Z") + TimeDelta::seconds(number.into()),
        document: format!(r#"{{"is":"the message m-{number}"}}"#),
    }
}

/// The number of the state of `support` on disk, and the ids of the incidents.
async fn stored(run: &TestRun) -> [String; 2] {
    let state = run.history.target_state("support").await.unwrap();
    let state = state.map_or_else(String::new, |state| {
        let state: serde_json::Value = serde_json::from_str(&state).unwrap();
        state["number"].to_string()
    });
    let filter = IncidentFilter {
        limit: MAX_BATCHES,
        ..IncidentFilter::default()
    };
    let incidents = run.history.incidents(filter).await.unwrap();
    let ids: Vec<String> = incidents.into_iter().map(|it| it.id).collect();
    [state, ids.join(" ")]
}

fn outbox(run: &TestRun) -> Vec<String> {
    let messages = run.history.outbox().into_iter();
    messages.map(|message| message.id).collect()
}

#[tokio::test(start_paused = true)]
async fn detection_is_durable_as_a_whole_and_a_message_stays_until_it_is_done() {
    let disk = Disk::new();
    let run = disk.start();
    run.history.record_detection(detection(1));
    run.kill();
    let mut run = disk.start();
    assert_eq!(stored(&run).await, ["", ""], "it was not written");
    assert_eq!(outbox(&run), [""; 0]);

    run.history.record_detection(detection(1));
    let durable = run.history.detections_durable();
    let ((), ()) = tokio::join!(durable, async { run.writer.run_once() });
    assert_eq!(outbox(&run), [""; 0], "only messages of earlier runs");
    run.kill();
    let run = disk.start();
    assert_eq!(stored(&run).await, ["1", "i-1"]);
    assert_eq!(run.history.outbox(), [message(1)]);
    run.history.message_done("m-1");
    assert_eq!(outbox(&run), [""; 0]);
    run.kill();
    let mut run = disk.start();
    assert_eq!(outbox(&run), ["m-1"], "its end was not written");
    run.history.message_done("m-1");
    run.writer.run_once();
    run.kill();
    let run = disk.start();
    assert_eq!(outbox(&run), [""; 0]);
    assert_eq!(stored(&run).await, ["1", "i-1"]);
    assert_eq!(run.history.faults(), 0);
}

#[tokio::test(start_paused = true)]
async fn later_state_and_incident_replace_the_earlier_ones_and_messages_are_in_order() {
    let disk = Disk::new();
    let mut run = disk.start();
    for number in [1, 2, 3] {
        let mut record = detection(number);
        record.incident.as_mut().unwrap().id = "i-1".to_owned();
        if number == 3 {
            record.incident.as_mut().unwrap().ended_at = Some(at("2026-03-10T13:00:00Z"));
        }
        run.history.record_detection(record);
        if number == 1 {
            run.writer.run_once();
        }
    }
    let other = DetectionRecord {
        target: "sales".to_owned(),
        state: "{}".to_owned(),
        incident: None,
        messages: Vec::new(),
    };
    run.history.record_detection(other);
    run.writer.run_once();
    assert_eq!(stored(&run).await, ["3", "i-1"]);
    let state = run.history.target_state("sales").await.unwrap();
    assert_eq!(state.as_deref(), Some("{}"));
    assert_eq!(run.history.target_state("none").await.unwrap(), None);
    let incident = run.history.incident("i-1".to_owned()).await.unwrap();
    assert!(incident.unwrap().get().contains("the incident i-3"));
    let filter = |open| IncidentFilter {
        open: Some(open),
        limit: 9,
        ..IncidentFilter::default()
    };
    assert_eq!(run.history.incidents(filter(true)).await.unwrap().len(), 0);
    assert_eq!(run.history.incidents(filter(false)).await.unwrap().len(), 1);
    run.kill();
    assert_eq!(outbox(&disk.start()), ["m-1", "m-2", "m-3"]);
}

#[tokio::test(start_paused = true)]
async fn full_disk_keeps_the_latest_state_every_incident_and_every_message_until_there_is_space() {
    let disk = Disk::new();
    let mut run = disk.start();
    let _open = run.open("first", MINUTE).await;
    run.fill_disk();
    for number in 0..150 {
        let mut record = detection(number);
        let incident = record.incident.as_mut().unwrap();
        incident.id = format!("i-{:02}", number / 10);
        incident.document = format!("{:?}", "x".repeat(3000));
        incident.ended_at = (number % 10 == 9).then_some(incident.began_at);
        record.messages[0].id = format!("m-{number:03}");
        run.history.record_detection(record);
        run.writer.run_once();
    }
    assert!(run.history.is_degraded());
    // A degraded history holds up no message.
    run.history.detections_durable().await;
    for number in 0..140 {
        run.history.message_done(&format!("m-{number:03}"));
    }
    let [states, incidents, messages] = run.history.shared.lock().detections.len();
    assert_eq!((states, messages), (1, 150));
    // The first incidents may fit into pages that the file already has.
    assert!((13..=15).contains(&incidents), "{incidents}");
    run.free_disk();
    run.writer.run_once();
    assert!(!run.history.is_degraded());
    assert_eq!(run.history.faults(), 1);
    assert_eq!(run.history.shared.lock().detections.len(), [1, 0, 10]);
    let [state, incidents] = stored(&run).await;
    assert_eq!((state.as_str(), incidents.split(' ').count()), ("149", 15));
    run.kill();
    let left = outbox(&disk.start());
    assert_eq!((left.len(), left[0].as_str()), (10, "m-140"));
}

#[tokio::test(start_paused = true)]
async fn incidents_and_messages_beyond_their_bounds_are_given_up_as_faults() {
    let disk = Disk::new();
    let mut run = disk.start();
    run.history.record_detection(detection(0));
    run.writer.run_once();
    let _first = run.open("first", MINUTE).await;
    run.fill_disk();
    let surplus = 5;
    let messages = u32::try_from(MAX_MESSAGES).unwrap();
    for number in 1..messages + surplus {
        let mut record = detection(number);
        let incident = record.incident.as_mut().unwrap();
        incident.id = format!("i-{number:04}");
        incident.ended_at = Some(incident.began_at);
        record.messages[0].id = format!("m-{number:04}");
        run.history.record_detection(record);
    }
    let [states, incidents, messages] = run.history.shared.lock().detections.len();
    // The first incident is open, so it is not among those that are dropped.
    assert_eq!((states, incidents), (1, MAX_UNWRITTEN_INCIDENTS));
    assert!(messages <= 2 * MAX_MESSAGES);
    assert!(run.history.faults() >= u64::from(surplus));
    run.free_disk();
    run.writer.run_once();
    let [state, stored] = stored(&run).await;
    assert_eq!(
        state,
        (u32::try_from(MAX_MESSAGES).unwrap() + surplus - 1).to_string()
    );
    assert!(stored.starts_with("i-1004 i-1003"));
    assert!(
        run.history
            .incident("i-0".to_owned())
            .await
            .unwrap()
            .is_some()
    );
    run.kill();
    let left = outbox(&disk.start());
    assert_eq!((left.len(), left[0].as_str()), (MAX_MESSAGES, "m-0005"));
}

#[tokio::test(start_paused = true)]
async fn messages_of_earlier_runs_are_there_once_the_folder_can_be_read() {
    let disk = Disk::new();
    let mut run = disk.start();
    run.history.record_detection(detection(1));
    run.writer.run_once();
    drop(run);
    disk.move_folder_away();
    let mut run = disk.start();
    assert_eq!(outbox(&run), [""; 0]);
    assert!(run.history.target_state("support").await.is_err());
    run.history.record_detection(detection(2));
    disk.move_folder_back();
    run.writer.run_once();
    assert_eq!(outbox(&run), ["m-1"]);
    assert_eq!(stored(&run).await, ["2", "i-2 i-1"]);
}

#[tokio::test(start_paused = true)]
async fn hanging_disk_delays_a_message_until_the_timeout() {
    let disk = Disk::new();
    let run = disk.start();
    run.history.record_detection(detection(1));
    let began = Instant::now();
    run.history.detections_durable().await;
    assert_eq!(began.elapsed(), RESERVE_TIMEOUT);
    assert!(run.history.is_degraded());
}

// Deletion of old data.

/// Deletes everything that is due, and returns the number of steps.
fn delete_expired(run: &mut TestRun, settings: &config::HistorySettings) -> usize {
    let now = Some(run.history.now());
    let boot = run.history.shared.boot.clone();
    let mut steps = 0;
    loop {
        let store = run.writer.store();
        let expiry = store.delete_expired(settings, now, &boot).unwrap();
        if !expiry.more {
            return steps;
        }
        steps += 1;
    }
}

#[tokio::test(start_paused = true)]
async fn batches_with_a_failure_are_kept_longer_than_batches_without() {
    let disk = Disk::new();
    let mut run = disk.start();
    let silent = || failed(Reason::AgentSilent, "no speech");
    for (id, started_at, outcome) in [
        ("b1", "2026-03-01T00:00:00Z", Outcome::Ok),
        ("b2", "2026-03-01T00:00:00Z", silent()),
        ("b3", "2026-03-02T00:00:01Z", Outcome::Ok),
        ("b4", "2026-02-01T00:00:00Z", silent()),
        ("b5", "2026-03-01T23:59:59Z", Outcome::Ok),
    ] {
        record(&run, &batch(id, "support", started_at, outcome));
    }
    run.writer.run_once();
    disk.set("2026-03-12T00:00:00Z");
    let settings = config::HistorySettings {
        keep: 10 * DAY,
        keep_failures: 20 * DAY,
        ..disk.settings.clone()
    };
    delete_expired(&mut run, &settings);
    assert_eq!(ids(&run.history, all()).await, ["b3", "b2"]);
    let gone = RoomName("canary-b1-0".to_owned());
    assert!(run.history.probe(gone.0).await.unwrap().is_none());
    let kept = RoomName("canary-b2-0".to_owned());
    assert!(run.history.probe(kept.0).await.unwrap().is_some());
}

/// Records a batch of one room whose call was recorded, and returns the room.
async fn record_with_audio(run: &mut TestRun, id: &str, started_at: &str) -> String {
    let mut batch = batch(id, "support", started_at, Outcome::Ok);
    let saving = run.history.recordings().save(
        &batch.probes[0].room,
        recording::sample_call(Duration::from_secs(1)),
    );
    batch.probes[0].recording = Some(saving.await.unwrap());
    record(run, &batch);
    run.writer.run_once();
    batch.probes[0].room.0.clone()
}

/// Whether the document of a probe has a recording, and whether there is a file.
async fn audio_of(run: &TestRun, room: &str) -> (Option<bool>, bool) {
    let document = run.history.probe(room.to_owned()).await.unwrap();
    let document = document.map(|document| {
        let document: serde_json::Value = serde_json::from_str(document.get()).unwrap();
        let keys = document.as_object().unwrap();
        assert!(keys.contains_key("waveform") && keys.contains_key("outcome"));
        !keys["recording"].is_null()
    });
    let file = run.history.recordings().read(room, Speaker::Agent).unwrap();
    (document, file.is_some())
}

// The files have the time of the real clock, and their writing takes a thread, so the clock is not paused.
#[tokio::test]
async fn recordings_are_deleted_with_their_probes_by_age_and_by_size() {
    let disk = Disk::new();
    *disk.now.lock().unwrap() = Utc::now();
    let mut run = disk.start();
    let started_at = Utc::now().to_rfc3339();
    let room = record_with_audio(&mut run, "b1", &started_at).await;
    assert_eq!(audio_of(&run, &room).await, (Some(true), true));
    let bytes = run
        .history
        .recordings()
        .read(&room, Speaker::Agent)
        .unwrap()
        .unwrap()
        .bytes;

    // By its own retention, as soon as the clock is trusted, and the probe stays.
    let now = *disk.now.lock().unwrap();
    *disk.now.lock().unwrap() = now + TimeDelta::days(8);
    let old = now + TimeDelta::days(8) - disk.settings.keep_recordings;
    run.history.recordings().expire(old.into());
    run.writer.run_once();
    assert_eq!(audio_of(&run, &room).await, (Some(false), false));

    // With its probe.
    let room = record_with_audio(&mut run, "b2", &started_at).await;
    *disk.now.lock().unwrap() = now + TimeDelta::days(31);
    let expiry = run
        .writer
        .store()
        .delete_expired(&disk.settings, Some(run.history.now()), "boot")
        .unwrap();
    assert!(expiry.rooms.contains(&"canary-b1-0".to_owned()) && expiry.rooms.contains(&room));
    run.history.recordings().delete(expiry.rooms);
    run.writer.run_once();
    assert_eq!(audio_of(&run, &room).await, (None, false));
    run.kill();

    // By the size of the folder; the first is deleted before its batch is stored.
    let mut settings = disk.settings.clone();
    settings.max_recording_megabytes = 0;
    let (history, writer) = History::prepare(&settings, disk.clock()).unwrap();
    let mut run = TestRun { history, writer };
    assert!(bytes > 1_000);
    let room = record_with_audio(&mut run, "b3", &started_at).await;
    assert_eq!(audio_of(&run, &room).await, (Some(false), false));
}

#[tokio::test]
async fn recording_whose_probe_is_not_stored_is_deleted() {
    let disk = Disk::new();
    let mut run = disk.start();
    let room = record_with_audio(&mut run, "b1", "2026-03-01T00:00:00Z").await;
    let orphan = RoomName("canary-orphan".to_owned());
    let save = |run: &TestRun| {
        let call = recording::sample_call(Duration::from_secs(1));
        let recordings = run.history.recordings().clone();
        let orphan = orphan.clone();
        async move { recordings.save(&orphan, call).await.unwrap() }
    };
    save(&run).await;
    run.kill();
    let mut run = disk.start();
    run.writer.run_once();
    assert_eq!(audio_of(&run, &room).await, (Some(true), true));
    assert_eq!(audio_of(&run, &orphan.0).await, (None, false));

    // A batch that the queue has no place for.
    let mut batch = batch("b2", "support", "2026-03-01T00:00:00Z", Outcome::Ok);
    for _ in 0..MAX_QUEUED_BATCHES {
        record(&run, &batch);
    }
    batch.probes[0].room = orphan.clone();
    batch.probes[0].recording = Some(save(&run).await);
    record(&run, &batch);
    assert_eq!(run.history.dropped(), 1);
    run.writer.run_once();
    assert_eq!(audio_of(&run, &orphan.0).await, (None, false));
}

#[tokio::test(start_paused = true)]
async fn above_the_size_limit_the_oldest_good_batches_are_deleted_first_and_the_file_shrinks() {
    let disk = Disk::new();
    let mut run = disk.start();
    for index in 0..600 {
        let outcome = match index % 5 {
            0 => failed(Reason::AgentSilent, "no speech"),
            _ => Outcome::Ok,
        };
        let started_at = disk.now.lock().unwrap().to_rfc3339();
        record(
            &run,
            &batch(&format!("b{index:03}"), "support", &started_at, outcome),
        );
        *disk.now.lock().unwrap() += TimeDelta::minutes(15);
        run.writer.run_once();
    }
    let size = |disk: &Disk| fs::metadata(disk.file()).unwrap().len();
    let checkpoint = |run: &mut TestRun| {
        let connection = &run.writer.store().connection;
        connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .unwrap();
    };
    checkpoint(&mut run);
    assert!(size(&disk) > 1_500_000, "{}", size(&disk));
    let settings = config::HistorySettings {
        max_megabytes: 1,
        ..disk.settings.clone()
    };
    let steps = delete_expired(&mut run, &settings);
    assert!(steps > 10, "too few steps: {steps}");
    checkpoint(&mut run);
    assert!(size(&disk) <= 1_100_000, "{}", size(&disk));
    let counts = run.history.counts("support").await.unwrap().batches;
    assert_eq!(
        counts["degraded"], 120,
        "a failure was deleted while a good batch was left"
    );
    assert!(counts["ok"] > 0);
    let left = ids(
        &run.history,
        BatchFilter {
            result: Some(BatchResult::Ok),
            ..all()
        },
    )
    .await;
    assert_eq!(left[0], "b599");

    let settings = config::HistorySettings {
        max_megabytes: 0,
        ..disk.settings.clone()
    };
    delete_expired(&mut run, &settings);
    assert_eq!(ids(&run.history, all()).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn ledger_row_is_kept_for_two_months_after_its_own_month() {
    let disk = Disk::new();
    let mut run = disk.start();
    disk.set("2026-01-01T00:00:00Z");
    let _early = run.open("1", MINUTE).await;
    disk.set("2026-01-31T23:59:59Z");
    let _late = run.open("2", MINUTE).await;
    disk.set("2026-02-01T00:00:00Z");
    let _next = run.open("3", MINUTE).await;
    let settings = config::HistorySettings {
        keep: MINUTE,
        keep_failures: MINUTE,
        max_megabytes: 0,
        ..disk.settings.clone()
    };
    for (now, rows) in [
        ("2026-03-31T23:59:59Z", 3),
        ("2026-04-01T00:00:00Z", 1),
        ("2026-05-01T00:00:00Z", 0),
    ] {
        disk.set(now);
        delete_expired(&mut run, &settings);
        assert_eq!(disk.rows(), rows, "{now}");
    }
}

/// 200 days ahead for 75 s: a clock without a battery, or a wrong time server.
#[tokio::test(start_paused = true)]
async fn forward_clock_jump_erases_neither_the_history_nor_the_ledger() {
    let disk = Disk::new();
    let mut run = disk.start();
    record(
        &run,
        &batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    let room = run.open("1", 3 * MINUTE).await;
    room.settle(2 * MINUTE);
    run.history.gone(&self::room("1"));
    let step = async |run: &mut TestRun, now: &str, passed: Duration| {
        disk.set(now);
        tokio::time::advance(passed).await;
        run.writer.run_once();
    };
    step(&mut run, "2026-03-10T14:00:00Z", Duration::from_hours(2)).await;
    step(&mut run, "2026-09-26T14:00:00Z", MINUTE).await;
    let _ahead = run.open("2", MINUTE).await;
    step(&mut run, "2026-09-26T14:01:15Z", Duration::from_secs(75)).await;
    step(&mut run, "2026-03-10T14:02:15Z", MINUTE).await;
    assert_eq!(run.used(), (2, 2));
    assert_eq!(ids(&run.history, all()).await, ["b1"]);
    // A start while the clock is wrong forgets nothing either.
    run.kill();
    disk.set("2026-09-26T14:03:00Z");
    let mut run = disk.start();
    run.writer.run_once();
    disk.set("2026-03-10T14:04:00Z");
    assert_eq!(run.used(), (2, 2));
    assert_eq!(ids(&run.history, all()).await, ["b1"]);
    // What is old by a clock that stays is forgotten after an hour.
    step(&mut run, "2026-09-26T15:00:00Z", MINUTE).await;
    step(&mut run, "2026-09-26T15:59:00Z", 59 * MINUTE).await;
    assert_eq!(ids(&run.history, all()).await, ["b1"]);
    step(&mut run, "2026-09-26T16:00:00Z", MINUTE).await;
    assert_eq!(ids(&run.history, all()).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn closed_rows_of_past_days_become_one_row_per_target_and_day_with_the_same_sum() {
    let disk = Disk::new();
    let mut run = disk.start();
    disk.set("2026-03-07T10:00:00Z");
    for name in 0..700 {
        let name = name.to_string();
        run.open(&name, 3 * MINUTE).await.settle(MINUTE);
        run.history.gone(&room(&name));
    }
    disk.set("2026-03-08T10:00:00Z");
    let unsettled = run.open("unsettled", 5 * MINUTE).await;
    run.history.gone(&room("unsettled"));
    run.open("not-gone", 3 * MINUTE).await.settle(2 * MINUTE);
    disk.set("2026-03-09T10:00:00Z");
    run.open("yesterday", 3 * MINUTE).await.settle(4 * MINUTE);
    run.history.gone(&room("yesterday"));
    disk.set("2026-03-10T10:00:00Z");
    run.writer.run_once();
    assert_eq!(disk.rows(), 703);
    let steps = delete_expired(&mut run, &disk.settings.clone());
    assert!(steps >= 2, "700 rows in {steps} steps");
    assert_eq!(disk.rows(), 4);
    // The settlement that was still to come counts.
    unsettled.settle(MINUTE);
    run.writer.run_once();
    assert_eq!(run.used(), (0, 707));
    run.kill();
    let mut run = disk.start();
    assert_eq!(run.used(), (0, 707));
    assert_eq!(run.orphan_rooms(), ["canary-test-not-gone"]);
    run.history.gone(&room("not-gone"));
    run.writer.run_once();
    delete_expired(&mut run, &disk.settings.clone());
    // One row for each of the three days: yesterday's is a room.
    assert_eq!(disk.rows(), 3);
    assert_eq!(run.used(), (0, 707));
}

#[tokio::test(start_paused = true)]
async fn agent_time_of_confirmations_counts_per_target_and_utc_day_over_restarts() {
    let disk = Disk::new();
    let mut run = disk.start();
    let of =
        |run: &TestRun, target: &str| run.history.confirmations_used("acme", target).as_secs() / 60;
    run.open("scheduled", 9 * MINUTE).await.settle(9 * MINUTE);
    let manual = run.reserve_for(Purpose::Manual, "manual", 9 * MINUTE).await;
    manual.settle(9 * MINUTE);
    let mut open = run
        .reserve_for(Purpose::Confirmation, "open", 5 * MINUTE)
        .await;
    open.opened();
    assert_eq!(of(&run, "support"), 5);
    open.shrink(4 * MINUTE);
    assert_eq!(of(&run, "support"), 4);
    let settled = run
        .reserve_for(Purpose::Confirmation, "settled", 5 * MINUTE)
        .await;
    settled.settle(2 * MINUTE);
    run.history.gone(&room("settled"));
    assert_eq!(of(&run, "support"), 6);
    assert_eq!(of(&run, "sales"), 0);
    assert_eq!(run.used(), (24, 24), "they count in the budget as well");
    run.writer.run_once();
    std::mem::forget(open);
    run.kill();

    let mut run = disk.start();
    assert_eq!(of(&run, "support"), 6);
    assert_eq!(
        run.history.confirmations_used("beta", "support"),
        Duration::ZERO
    );
    // The sums of past days keep the purpose.
    for name in ["scheduled", "manual", "open"] {
        run.history.gone(&room(name));
    }
    run.writer.run_once();
    disk.set("2026-03-11T00:00:00Z");
    assert_eq!(of(&run, "support"), 0);
    disk.set("2026-03-12T12:00:00Z");
    delete_expired(&mut run, &disk.settings.clone());
    assert_eq!(disk.rows(), 3, "one row per target, purpose and day");
    run.kill();
    disk.set("2026-03-10T23:59:59Z");
    let run = disk.start();
    assert_eq!((of(&run, "support"), run.used()), (6, (24, 24)));
}

#[tokio::test(start_paused = true)]
async fn ended_incident_is_kept_as_long_as_failures_and_an_open_one_forever() {
    let disk = Disk::new();
    let mut run = disk.start();
    for (number, ended_at) in [
        (1, Some("2026-03-01T00:00:00Z")),
        (2, Some("2026-03-02T00:00:01Z")),
        (3, None),
    ] {
        let mut record = detection(number);
        let incident = record.incident.as_mut().unwrap();
        incident.began_at = at("2025-01-01T00:00:00Z");
        incident.ended_at = ended_at.map(at);
        run.history.record_detection(record);
    }
    run.writer.run_once();
    disk.set("2026-03-22T00:00:00Z");
    let settings = config::HistorySettings {
        keep: DAY,
        keep_failures: 20 * DAY,
        max_megabytes: 0,
        ..disk.settings.clone()
    };
    delete_expired(&mut run, &settings);
    assert_eq!(stored(&run).await, ["3", "i-3 i-2"]);
    disk.set("2036-03-22T00:00:00Z");
    delete_expired(&mut run, &settings);
    assert_eq!(stored(&run).await, ["3", "i-3"]);
}

#[tokio::test(start_paused = true)]
async fn large_ledger_deletes_no_batches() {
    let disk = Disk::new();
    let mut run = disk.start();
    record(
        &run,
        &batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    run.writer.run_once();
    run.writer
        .store()
        .connection
        .execute_batch(
            "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
             INSERT INTO rooms SELECT printf('canary-abcde-%013d', i), 'acme', 'support', 'b', 1773144000000, 60, 60, NULL, 'scheduled'
             FROM n",
        )
        .unwrap();
    let size = fs::metadata(disk.file()).unwrap().len();
    let log = fs::metadata(disk.file().with_extension("sqlite3-wal"))
        .unwrap()
        .len();
    assert!(size + log > 2_000_000, "{size} + {log}");
    let settings = config::HistorySettings {
        max_megabytes: 1,
        ..disk.settings.clone()
    };
    delete_expired(&mut run, &settings);
    assert_eq!(ids(&run.history, all()).await, ["b1"]);
}

// The thread.

#[tokio::test]
async fn thread_writes_what_is_queued_and_close_writes_the_rest() {
    let disk = Disk::new();
    let history = History::open_with_clock(&disk.settings, disk.clock()).unwrap();
    let admit = |_: &AgentTimeUsed, _| Ok::<_, ()>(());
    let reserving = (0..50).map(|index| {
        let history = history.clone();
        async move {
            let name = room(&index.to_string());
            history
                .reserve(&name, "acme", "support", SCHEDULED, MINUTE, admit)
                .await
        }
    });
    let reserved = futures_util::future::join_all(reserving).await;
    assert_eq!(disk.rows(), 50);
    for reservation in reserved {
        reservation.unwrap().settle(2 * MINUTE);
    }
    let kept = batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok);
    history.record(&kept, &target(), &sample::project());
    history.record_detection(detection(1));
    history.record_detection(detection(2));
    history.message_done("m-1");
    let soon = Instant::now() + DAY;
    assert!(history.close(soon).await);
    let run = disk.start();
    assert_eq!(outbox(&run), ["m-2"]);
    assert_eq!(stored(&run).await, ["2", "i-2 i-1"]);
    assert_eq!(run.used(), (100, 100));
    assert_eq!(ids(&run.history, all()).await, ["b1"]);
}

#[tokio::test]
async fn dropping_the_last_handle_ends_the_thread_and_unlocks_the_folder() {
    let disk = Disk::new();
    let history = History::open_with_clock(&disk.settings, disk.clock()).unwrap();
    let mut progress = history.shared.progress.subscribe();
    let other = history.clone();
    drop(history);
    assert!(!progress.borrow().ended);
    drop(other);
    progress.wait_for(|progress| progress.ended).await.unwrap();
    disk.start();
}

// A process that is killed.

/// Names the folder in which the child process has its history.
const CHILD_FOLDER: &str = "CANARY_TEST_HISTORY";

#[tokio::main(flavor = "current_thread")]
async fn reserve_without_end(folder: &Path) {
    let history = open(folder);
    for index in 0.. {
        let room = RoomName(format!("canary-{}-{index}", std::process::id()));
        let admit = |_: &AgentTimeUsed, _| Ok::<_, ()>(());
        let reserved = history.reserve(&room, "acme", "support", SCHEDULED, 3 * MINUTE, admit);
        let mut reservation = reserved.await.unwrap();
        reservation.opened();
        print_to_parent(&room.0);
        if index % 2 == 0 {
            reservation.settle(3 * MINUTE);
        }
        if index % 3 == 0 {
            history.gone(&room);
        }
    }
}

fn open(folder: &Path) -> History {
    let settings = config::HistorySettings {
        dir: folder.to_owned(),
        ..config::HistorySettings::default()
    };
    History::open(&settings).unwrap()
}

#[test]
#[ignore = "the child of the test below, which kills it"]
fn child() {
    let folder = std::env::var_os(CHILD_FOLDER).unwrap();
    reserve_without_end(Path::new(&folder));
}

#[tokio::main(flavor = "current_thread")]
async fn detect_without_end(folder: &Path) {
    let history = open(folder);
    let first = u32::from(history.outbox().is_empty());
    for number in first.. {
        let mut record = detection(number);
        let id = format!("{}-{number}", std::process::id());
        record.messages[0].id.clone_from(&id);
        record.incident.as_mut().unwrap().id.clone_from(&id);
        history.record_detection(record);
        history.detections_durable().await;
        print_to_parent(&id);
        if number % 2 == 0 {
            history.message_done(&id);
            history.detections_durable().await;
            print_to_parent(&format!("{id} done"));
        }
    }
}

#[test]
#[ignore = "the child of the test below, which kills it"]
fn detecting_child() {
    let folder = std::env::var_os(CHILD_FOLDER).unwrap();
    detect_without_end(Path::new(&folder));
}

#[tokio::test]
async fn killed_process_leaves_every_durable_detection_and_no_message_whose_end_is_durable() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = fastrand::Rng::with_seed(21);
    let mut left = BTreeSet::new();
    let mut done = BTreeSet::new();
    for _ in 0..10 {
        let variables = [(CHILD_FOLDER, folder.path().as_os_str())];
        let test = "history::tests::detecting_child";
        for line in run_and_kill(test, random.usize(1..40), &variables) {
            match line.strip_suffix(" done") {
                Some(id) => {
                    left.remove(id);
                    done.insert(id.to_owned());
                }
                None => {
                    left.insert(line);
                }
            }
        }
        let history = open(folder.path());
        let found: BTreeSet<String> = history.outbox().into_iter().map(|it| it.id).collect();
        assert!(found.is_disjoint(&done), "{done:?} in {found:?}");
        for id in &left {
            let incident = history.incident(id.clone()).await.unwrap();
            assert!(incident.is_some(), "{id}");
        }
        // The end of the last message may be durable before the child could print that.
        let missing: Vec<&String> = left.difference(&found).collect();
        assert!(missing.len() <= 1, "{missing:?} not in {found:?}");
        left.retain(|id| found.contains(id));
        assert!(history.close(Instant::now() + Duration::from_mins(1)).await);
    }
}

pub(crate) fn print_to_parent(line: &str) {
    println!("child: {line}");
}

/// Runs an ignored test of this program as a child process, and kills it after this many lines of
/// [`print_to_parent`]. Returns all lines that the child printed until then.
pub(crate) fn run_and_kill(
    test: &str,
    lines: usize,
    variables: &[(&str, &std::ffi::OsStr)],
) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .envs(variables.iter().copied())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let printed = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut printed = printed.filter_map(|line| {
        let line = line.unwrap();
        line.strip_prefix("child: ").map(str::to_owned)
    });
    let first: Vec<String> = printed.by_ref().take(lines).collect();
    child.kill().unwrap();
    let all: Vec<String> = first.into_iter().chain(printed).collect();
    child.wait().unwrap();
    assert!(all.len() >= lines, "the child ended by itself: {all:?}");
    all
}

#[tokio::test]
async fn killed_process_leaves_every_reservation_recorded_and_the_folder_unlocked() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = fastrand::Rng::with_seed(20);
    let mut expected = BTreeSet::new();
    let mut reserved = 0;
    for _ in 0..20 {
        let variables = [(CHILD_FOLDER, folder.path().as_os_str())];
        let rooms = run_and_kill("history::tests::child", random.usize(1..40), &variables);
        reserved += rooms.len();
        let third = rooms.iter().enumerate().filter(|(index, _)| index % 3 != 0);
        expected.extend(third.map(|(_, room)| room.clone()));

        let history = open(folder.path());
        assert!(!history.is_degraded());
        let used = history.used("acme");
        assert!(!used.ledger_lost);
        let min = 3 * MINUTE * u32::try_from(reserved).unwrap();
        assert!(used.month >= min, "{used:?} is less than {min:?}");
        let orphans: BTreeSet<String> = history
            .orphan_rooms()
            .into_iter()
            .map(|orphan| orphan.room.0)
            .collect();
        assert!(
            orphans.is_superset(&expected),
            "{expected:?} not in {orphans:?}"
        );
        assert!(history.close(Instant::now() + Duration::from_mins(1)).await);
    }
}
