use std::fs;
use std::path::Path;

use chrono::{Months, TimeDelta};
use rusqlite::Connection;
use tempfile::TempDir;

use super::store::{self, FILE};
use super::*;
use crate::config::Period;
use crate::probe::{Evidence, Outcome, Reason};
use crate::report::sample::{self, WELL, failed};

const MINUTE: Duration = Duration::from_mins(1);
const DAY: Duration = Duration::from_hours(24);

impl History {
    /// A history that no disk ever takes, and that knows all that was used.
    pub(crate) fn in_memory(clock: Clock) -> Self {
        let settings = config::HistorySettings {
            dir: "Cargo.toml/is-no-folder".into(),
            ..config::HistorySettings::default()
        };
        let (history, _never_runs) = Self::prepare(&settings, clock).expect("nobody locks it");
        assert!(history.is_degraded());
        history.accept_lost_ledger();
        history
    }
}

/// A folder and a clock, and what runs of the program leave there.
struct Disk {
    dir: TempDir,
    now: Arc<Mutex<DateTime<Utc>>>,
    settings: config::HistorySettings,
}

/// A run of the program whose writer works when the test says so.
struct Run {
    history: History,
    writer: Writer,
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

    fn clock(&self) -> Clock {
        let now = Arc::clone(&self.now);
        Arc::new(move || *now.lock().unwrap())
    }

    fn set(&self, now: &str) {
        *self.now.lock().unwrap() = at(now);
    }

    fn start(&self) -> Run {
        let (history, writer) = History::prepare(&self.settings, self.clock()).unwrap();
        Run { history, writer }
    }

    /// The files that were moved aside.
    fn aside(&self) -> usize {
        let names = fs::read_dir(&self.settings.dir).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| {
                name.contains(".corrupt-") && !name.ends_with("-wal") && !name.ends_with("-shm")
            })
            .count()
    }

    /// What another process sees in the file.
    fn rows(&self) -> i64 {
        let file = Connection::open(self.file()).unwrap();
        file.query_row("SELECT count(*) FROM rooms", [], |row| row.get(0))
            .unwrap()
    }
}

impl Run {
    async fn reserve(&mut self, name: &str, worst: Duration) -> Reservation {
        let name = room(name);
        let admit = |_: &Used, _| Ok::<_, ()>(());
        let reserving = self.history.reserve(&name, "acme", "support", worst, admit);
        let (reservation, ()) = tokio::join!(reserving, async { self.writer.turn() });
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

    fn orphan_rooms(&self) -> Vec<String> {
        let left = self.history.orphan_rooms().into_iter();
        left.map(|left| left.room.0).collect()
    }

    /// No page more than there are.
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

    /// Ends as `kill -9` would: what was not written is gone, and nothing is put in order.
    fn kill(self) {
        let Self { history, writer } = self;
        std::mem::forget(history);
        // A process that dies closes its files and so its lock, but leaves the log as it is.
        let log = Log::save(writer.dir());
        drop(writer);
        log.restore();
    }
}

/// The database with its log, which closing the database would fold into it.
struct Log(Vec<(std::path::PathBuf, Vec<u8>)>);

impl Log {
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

fn keep(run: &Run, batch: &BatchReport) {
    run.history.record(batch, &target(), &sample::project());
}

async fn ids(history: &History, filter: BatchFilter) -> Vec<String> {
    let heads = history.batches(filter).await.unwrap().into_iter();
    heads
        .map(|head| {
            let head: serde_json::Value = serde_json::from_str(head.get()).unwrap();
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
async fn a_reservation_waits_until_its_row_is_on_disk() {
    let disk = Disk::new();
    let mut run = disk.start();
    let name = room("1");
    let admit = |_: &Used, _| Ok::<_, ()>(());
    let mut reserving = Box::pin(run.history.reserve(&name, "acme", "support", MINUTE, admit));
    let once =
        std::future::poll_fn(|context| std::task::Poll::Ready(reserving.as_mut().poll(context)));
    assert!(once.await.is_pending());
    assert_eq!(disk.rows(), 0);
    run.writer.turn();
    let _reservation = reserving.await.unwrap();
    assert_eq!(disk.rows(), 1);
    assert!(!run.history.is_degraded());
}

#[tokio::test(start_paused = true)]
async fn an_open_room_counts_at_its_worst_and_a_settled_one_at_what_it_used() {
    let disk = Disk::new();
    let mut run = disk.start();
    let less = run.open("1", 3 * MINUTE).await;
    let more = run.open("2", MINUTE).await;
    let none = run.open("3", 2 * MINUTE).await;
    assert_eq!(run.used(), (6, 6));
    less.settle(MINUTE);
    assert_eq!(run.used(), (4, 4));
    more.settle(4 * MINUTE);
    assert_eq!(run.used(), (7, 7), "more than was reserved counts as well");
    none.settle(Duration::ZERO);
    assert_eq!(run.used(), (5, 5));
}

#[tokio::test(start_paused = true)]
async fn a_reservation_without_a_room_costs_nothing_and_one_that_is_dropped_with_its_room_the_worst()
 {
    let disk = Disk::new();
    let mut run = disk.start();
    drop(run.reserve("1", 3 * MINUTE).await);
    assert_eq!(run.used(), (0, 0));
    drop(run.open("2", 3 * MINUTE).await);
    assert_eq!(run.used(), (3, 3));
    run.writer.turn();
    run.kill();
    let run = disk.start();
    assert_eq!(run.used(), (3, 3));
    assert_eq!(run.orphan_rooms(), ["canary-test-2"]);
}

#[tokio::test(start_paused = true)]
async fn a_part_of_a_second_counts_as_a_whole_one() {
    let disk = Disk::new();
    let mut run = disk.start();
    let _open = run.open("1", Duration::from_millis(59_001)).await;
    assert_eq!(run.history.used("acme").day, MINUTE);
}

#[tokio::test(start_paused = true)]
async fn a_room_counts_to_the_utc_day_and_month_in_which_it_opened() {
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
    assert_eq!(run.used(), (1, 1), "the clock was set back");
    disk.set("2024-02-29T12:00:00Z");
    assert_eq!(run.used(), (0, 0));
    let _leap = run.open("4", MINUTE).await;
    assert_eq!(run.used(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn projects_do_not_share_what_they_use_and_their_targets_do() {
    let disk = Disk::new();
    let mut run = disk.start();
    let _one = run.open("1", MINUTE).await;
    let admit = |used: &Used, _| {
        assert_eq!(used.day, Duration::ZERO);
        Ok::<_, ()>(())
    };
    let (name, other) = (room("2"), room("3"));
    let other_project = run.history.reserve(&name, "beta", "support", MINUTE, admit);
    let (_two, ()) = tokio::join!(other_project, async { run.writer.turn() });
    let admit = |used: &Used, _| {
        assert_eq!(used.day, MINUTE);
        Err("full")
    };
    let refused = run.history.reserve(&other, "acme", "sales", MINUTE, admit);
    assert_eq!(refused.await.err(), Some("full"));
    assert_eq!(run.used(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn after_a_kill_the_ledger_is_not_lower_than_what_was_used_and_every_room_is_journalled() {
    let disk = Disk::new();
    let mut run = disk.start();
    let settled = run.open("1", 5 * MINUTE).await;
    let open = run.open("2", 3 * MINUTE).await;
    settled.settle(2 * MINUTE);
    run.history.gone(&room("1"));
    run.writer.turn();
    std::mem::forget(open);
    run.kill();

    let mut run = disk.start();
    assert_eq!(run.used(), (5, 5));
    assert_eq!(run.orphan_rooms(), ["canary-test-2"]);
    assert_eq!(run.history.target_of(&room("2")).unwrap(), "support");
    run.history.gone(&room("2"));
    assert_eq!(run.orphan_rooms(), [""; 0]);
    run.writer.turn();
    run.kill();
    assert_eq!(disk.start().orphan_rooms(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_settlement_that_was_not_written_leaves_the_worst_case() {
    let disk = Disk::new();
    let mut run = disk.start();
    run.open("1", 5 * MINUTE).await.settle(MINUTE);
    run.kill();
    assert_eq!(disk.start().used(), (5, 5));
}

#[tokio::test(start_paused = true)]
async fn memory_and_disk_agree_whatever_happened_and_no_row_stays_in_memory() {
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
            run.writer.turn();
            let used = run.history.used("acme");
            let memory = run.history.shared.lock().ledger.len();
            assert_eq!(memory, open.len() + run.orphan_rooms().len());
            open.drain(..)
                .for_each(|(_, reservation)| std::mem::forget(reservation));
            run.kill();
            run = disk.start();
            assert_eq!(run.history.used("acme"), used);
        }
    }
    assert!(run.used().1 > 0);
}

// A disk that does not do as it should.

#[tokio::test(start_paused = true)]
async fn a_full_disk_degrades_and_all_is_written_once_there_is_room() {
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
    assert_eq!(run.used(), (201, 201), "memory counts on");
    assert!(disk.rows() < 201);
    keep(
        &run,
        &batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    open.remove(0).settle(Duration::ZERO);
    run.writer.turn();
    assert!(run.history.is_degraded());

    run.free_disk();
    run.writer.turn();
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
    run.writer.turn();
    open.drain(..).for_each(std::mem::forget);
    run.kill();
    let run = disk.start();
    assert_eq!(run.used(), (200, 200));
    assert!(!run.is_lost());
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_answers_nothing_holds_a_reservation_up_for_a_few_seconds_and_only_once() {
    let disk = Disk::new();
    let run = disk.start();
    let began = Instant::now();
    for name in ["1", "2"] {
        let admit = |_: &Used, _| Ok::<_, ()>(());
        let name = room(name);
        let reservation = run.history.reserve(&name, "acme", "support", MINUTE, admit);
        std::mem::forget(reservation.await.unwrap());
        assert_eq!(began.elapsed(), RESERVE_TIMEOUT);
    }
    assert!(run.history.is_degraded());
    assert_eq!(run.used(), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_folder_that_can_not_be_made_degrades_and_is_used_once_it_can() {
    let disk = Disk::new();
    fs::write(&disk.settings.dir, "a file is in the way").unwrap();
    let mut run = disk.start();
    assert!(run.history.is_degraded());
    assert!(run.is_lost(), "what was used before is not known");
    assert!(run.history.batches(all()).await.is_err());
    let _open = run.open("1", MINUTE).await;
    assert_eq!(run.used(), (1, 1));

    fs::remove_file(&disk.settings.dir).unwrap();
    run.writer.turn();
    assert!(!run.history.is_degraded());
    assert!(!run.is_lost());
    assert_eq!(run.used(), (1, 1));
    assert_eq!(disk.rows(), 1);
    assert_eq!(ids(&run.history, all()).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn what_was_used_before_is_added_once_the_folder_can_be_read() {
    let disk = Disk::new();
    let mut run = disk.start();
    run.open("1", 2 * MINUTE).await.settle(2 * MINUTE);
    run.writer.turn();
    drop(run);
    let away = disk.dir.path().join("away");
    fs::rename(&disk.settings.dir, &away).unwrap();
    fs::write(&disk.settings.dir, "a file is in the way").unwrap();
    let mut run = disk.start();
    let _open = run.open("2", MINUTE).await;
    assert_eq!(run.used(), (1, 1));
    fs::remove_file(&disk.settings.dir).unwrap();
    fs::rename(&away, &disk.settings.dir).unwrap();
    run.writer.turn();
    assert_eq!(run.used(), (3, 3));
    assert_eq!(run.orphan_rooms(), ["canary-test-1"]);
}

/// A history with a settled room of two minutes and some batches, closed in order.
async fn full(disk: &Disk) {
    let mut run = disk.start();
    run.open("1", 2 * MINUTE).await.settle(2 * MINUTE);
    for index in 0..30 {
        let id = format!("b{index:02}");
        keep(
            &run,
            &batch(&id, "support", "2026-03-10T11:00:00Z", Outcome::Ok),
        );
        run.writer.turn();
    }
}

/// Overwrites the pages that hold this text.
fn spoil(file: &Path, text: &str) -> usize {
    let mut content = fs::read(file).unwrap();
    let mut spoilt = 0;
    for page in content.chunks_mut(4096).skip(1) {
        if page
            .windows(text.len())
            .any(|window| window == text.as_bytes())
        {
            page[..2000].fill(0xa5);
            spoilt += 1;
        }
    }
    fs::write(file, content).unwrap();
    spoilt
}

#[tokio::test(start_paused = true)]
async fn a_corrupt_file_is_moved_aside_and_its_ledger_is_lost_until_that_is_accepted() {
    let garbage: fn(&Path) = |file| fs::write(file, vec![b'x'; 9000]).unwrap();
    let empty: fn(&Path) = |file| fs::write(file, "").unwrap();
    let torn: fn(&Path) = |file| {
        let content = fs::read(file).unwrap();
        fs::write(file, &content[..4096 * 2 + 100]).unwrap();
    };
    let spoilt: fn(&Path) = |file| assert!(spoil(file, "canary-test-1") > 0);
    for (what, damage) in [
        ("garbage", garbage),
        ("empty", empty),
        ("torn", torn),
        ("spoilt", spoilt),
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
        assert!(run.is_lost(), "{what}: a restart does not find it");
        assert_eq!(
            run.orphan_rooms().last().unwrap(),
            "canary-test-2",
            "{what}"
        );
        run.history.accept_lost_ledger();
        assert!(!run.is_lost(), "{what}");
        run.writer.turn();
        run.kill();
        let run = disk.start();
        assert!(!run.is_lost(), "{what}");
        assert_eq!(disk.aside(), 1, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_ledger_and_the_journal_of_a_file_that_is_corrupt_elsewhere_are_saved() {
    let disk = Disk::new();
    full(&disk).await;
    assert!(spoil(&disk.file(), "DispatchAccepted") > 3);
    let run = disk.start();
    assert_eq!(disk.aside(), 1);
    assert!(!run.is_lost());
    assert_eq!(run.used(), (2, 2));
    assert_eq!(run.orphan_rooms(), ["canary-test-1"]);
    assert_eq!(ids(&run.history, all()).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn what_was_saved_of_a_corrupt_file_survives_a_kill_between_the_last_two_steps() {
    let disk = Disk::new();
    full(&disk).await;
    let file = disk.file();
    fs::rename(&file, file.with_extension("sqlite3.new")).unwrap();
    // The corrupt one's log, which was not moved yet: another database's, with rows that must not come in.
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
    // And half a new file is made anew.
    drop(run);
    fs::remove_file(&file).unwrap();
    fs::write(file.with_extension("sqlite3.new"), "SQLite").unwrap();
    let run = disk.start();
    assert_eq!((run.used(), run.is_lost()), ((0, 0), false));
}

#[tokio::test(start_paused = true)]
async fn a_file_that_becomes_corrupt_while_it_is_used_degrades_and_memory_counts_on() {
    let disk = Disk::new();
    full(&disk).await;
    let mut run = disk.start();
    spoil(&disk.file(), "canary-test-1");
    // SQLite trusts the pages that it has in memory.
    let connection = &run.writer.store().connection;
    connection.execute_batch("PRAGMA shrink_memory").unwrap();
    let _open = run.open("2", MINUTE).await;
    assert!(run.history.is_degraded());
    assert_eq!(run.used(), (3, 3));
}

#[test]
fn a_file_of_a_newer_format_is_refused_and_left_alone() {
    let disk = Disk::new();
    drop(disk.start());
    let newer = Connection::open(disk.file()).unwrap();
    newer.pragma_update(None, "user_version", 2).unwrap();
    drop(newer);
    let refused = History::prepare(&disk.settings, disk.clock())
        .err()
        .unwrap();
    assert!(matches!(
        refused,
        OpenError::Newer {
            found: 2,
            known: 1,
            ..
        }
    ));
    assert!(
        refused
            .to_string()
            .contains("written by a newer livekit-canary (format 2")
    );
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
async fn history_of_the_first_version_is_read_in_full() {
    let disk = Disk::with_file(VERSION_1_FILE);
    let run = disk.start();
    assert!(!run.history.is_degraded());
    assert!(!run.is_lost());
    assert_eq!(disk.aside(), 0);
    assert_eq!(run.used(), (5, 5), "one room settled, one at its worst");
    assert_eq!(run.history.used("beta").day, MINUTE);
    assert_eq!(run.orphan_rooms(), ["canary-old-2", "canary-old-3"]);
    assert_eq!(ids(&run.history, all()).await, ["b-old"]);
    let probe = run.history.probe("canary-old-4".to_owned()).await.unwrap();
    assert!(probe.unwrap().get().contains(r#""outcome":"failed""#));
    let seen = run.history.has_seen_agent("support", Some("my-agent"));
    assert!(seen.await.unwrap());
    drop(run);
    let new = Disk::new();
    drop(new.start());
    assert_eq!(disk.schema(), new.schema(), "both end with the same schema");
    assert_eq!(disk.version(), new.version());
}

#[tokio::test(start_paused = true)]
async fn older_history_is_migrated_step_by_step_and_keeps_every_row() {
    // Both forms of a change: a column is added, and a table with rows that refer to it is rebuilt.
    const VERSION_2: &str = "ALTER TABLE rooms ADD COLUMN region TEXT NOT NULL DEFAULT 'eu'";
    const VERSION_3: &str = "
        CREATE TABLE rebuilt (id TEXT PRIMARY KEY, target TEXT NOT NULL, head TEXT NOT NULL) STRICT;
        INSERT INTO rebuilt SELECT id, target, head FROM batches;
        DROP TABLE batches;
        ALTER TABLE rebuilt RENAME TO batches;
    ";
    let disk = Disk::with_file(VERSION_1_FILE);
    let steps = [store::MIGRATIONS, &[VERSION_2, VERSION_3]].concat();
    let open = |steps| Store::open_with(&disk.settings.dir, disk.clock()(), steps);
    let (store, loaded) = open(&steps).unwrap();
    assert_eq!(disk.version(), 3);
    assert_eq!(loaded.rows.len(), 2);
    assert_eq!(
        loaded.days.iter().map(|(.., seconds)| seconds).sum::<u64>(),
        360
    );
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
    assert_eq!(loaded.rows.len(), 2, "no step runs twice");
    assert_eq!(disk.aside(), 0);
}

#[test]
fn migration_that_fails_changes_nothing_and_the_file_stays_readable() {
    let disk = Disk::with_file(VERSION_1_FILE);
    let before = disk.schema();
    let half = "ALTER TABLE rooms ADD COLUMN region TEXT; INSERT INTO missing VALUES (1);";
    let steps = [store::MIGRATIONS, &[half]].concat();
    let failed = Store::open_with(&disk.settings.dir, disk.clock()(), &steps).err();
    assert!(
        matches!(&failed, Some(NotOpened::Unavailable(why)) if why.contains("no such table")),
        "{failed:?}"
    );
    assert_eq!((disk.schema(), disk.version()), (before, 1));
    assert_eq!(disk.start().orphan_rooms().len(), 2);
}

#[test]
fn a_folder_in_use_is_refused_until_its_user_is_gone() {
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

// Batches.

#[tokio::test(start_paused = true)]
async fn more_batches_than_may_wait_are_dropped_and_counted_and_no_row_of_the_ledger_is() {
    let disk = Disk::new();
    let mut run = disk.start();
    let _first = run.open("first", MINUTE).await;
    run.fill_disk();
    for index in 0..MAX_QUEUED_RECORDS + 3 {
        let id = format!("b{index:02}");
        keep(
            &run,
            &batch(&id, "support", "2026-03-10T12:00:00Z", Outcome::Ok),
        );
        run.open(&id, MINUTE).await.settle(MINUTE);
    }
    assert!(run.history.is_degraded());
    run.free_disk();
    run.writer.turn();
    // The first may have found room in pages that were begun.
    let (kept, dropped) = (ids(&run.history, all()).await.len(), run.history.dropped());
    assert!((2..=3).contains(&dropped), "{dropped}");
    assert_eq!(kept as u64 + dropped, MAX_QUEUED_RECORDS as u64 + 3);
    assert_eq!(disk.rows(), i64::try_from(MAX_QUEUED_RECORDS).unwrap() + 4);
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
        keep(&run, &batch(id, target, "2026-03-10T12:00:00Z", outcome));
    }
    run.writer.turn();
    let find = async |target: Option<&str>, result: Option<&str>, before: Option<&str>, limit| {
        let own = |text: Option<&str>| text.map(str::to_owned);
        let filter = BatchFilter {
            target: own(target),
            result: own(result),
            before: own(before),
            limit,
        };
        ids(&run.history, filter).await.join(" ")
    };
    assert_eq!(find(None, None, None, 9).await, "b5 b4 b3 b2 b1");
    assert_eq!(find(None, None, None, 2).await, "b5 b4");
    assert_eq!(find(None, None, Some("b4"), 2).await, "b3 b2");
    assert_eq!(find(Some("support"), None, None, 9).await, "b4 b3 b1");
    assert_eq!(find(None, Some("degraded"), None, 9).await, "b5 b3");
    assert_eq!(find(Some("sales"), Some("ok"), Some("b5"), 9).await, "b2");
    assert_eq!(find(Some("nobody"), None, None, 9).await, "");
}

#[tokio::test(start_paused = true)]
async fn a_batch_and_a_probe_come_back_as_the_documents_that_were_rendered() {
    let disk = Disk::new();
    let mut run = disk.start();
    let mixed = sample::mixed();
    keep(&run, &mixed);
    run.writer.turn();
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
async fn the_last_batch_that_was_not_aborted_is_known_after_a_restart() {
    let disk = Disk::new();
    let mut run = disk.start();
    keep(
        &run,
        &batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    let silent = failed(Reason::AgentSilent, "no speech");
    keep(
        &run,
        &batch("b2", "support", "2026-03-10T12:15:00Z", silent),
    );
    keep(
        &run,
        &batch("b3", "support", "2026-03-10T12:30:00Z", Outcome::Aborted),
    );
    run.writer.turn();
    run.kill();
    let run = disk.start();
    let last = run.history.last_completed("support").await.unwrap();
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
    assert_eq!(run.history.last_completed("sales").await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn an_agent_counts_as_seen_under_the_name_that_was_asked_for() {
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
    keep(&run, &unseen);
    keep(
        &run,
        &batch("b2", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    run.writer.turn();
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
async fn raw_counts_are_of_one_target() {
    let disk = Disk::new();
    let mut run = disk.start();
    let silent = || failed(Reason::AgentSilent, "no speech");
    keep(
        &run,
        &batch("b1", "support", "2026-03-10T12:00:00Z", silent()),
    );
    keep(
        &run,
        &batch("b2", "support", "2026-03-10T12:00:00Z", silent()),
    );
    keep(
        &run,
        &batch("b3", "sales", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    run.open("1", 3 * MINUTE).await.settle(MINUTE);
    let _open = run.open("2", 3 * MINUTE).await;
    run.writer.turn();
    let counts = run.history.counts("support").await.unwrap();
    let expected = Counts {
        batches: [("degraded".to_owned(), 2)].into(),
        probes: [("agent_silent".to_owned(), 2), ("ok".to_owned(), 2)].into(),
        rooms: 2,
        agent_time: 4 * MINUTE,
    };
    assert_eq!(counts, expected);
}

#[tokio::test(start_paused = true)]
async fn batch_that_the_schema_rejects_is_dropped_as_one_fault_and_holds_up_no_other() {
    let disk = Disk::new();
    let mut run = disk.start();
    let mut twice = batch("b1", "support", "2026-03-10T12:00:00Z", Outcome::Ok);
    twice.probes[1].room = twice.probes[0].room.clone();
    keep(&run, &twice);
    keep(
        &run,
        &batch("b2", "support", "2026-03-10T12:00:00Z", Outcome::Ok),
    );
    run.writer.turn();
    assert_eq!(ids(&run.history, all()).await, ["b2"]);
    assert_eq!((run.history.dropped(), run.history.faults()), (1, 1));
    assert!(!run.history.is_degraded());
}

// Forgetting.

/// Does all that is due, and says in how many steps.
fn forget(run: &mut Run, settings: &config::HistorySettings) -> usize {
    let now = run.history.now();
    let mut steps = 0;
    while run.writer.store().forget(settings, now).unwrap() {
        steps += 1;
    }
    steps
}

#[tokio::test(start_paused = true)]
async fn batches_with_a_failure_are_kept_longer_than_those_without() {
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
        keep(&run, &batch(id, "support", started_at, outcome));
    }
    run.writer.turn();
    disk.set("2026-03-12T00:00:00Z");
    let settings = config::HistorySettings {
        keep: 10 * DAY,
        keep_failures: 20 * DAY,
        ..disk.settings.clone()
    };
    forget(&mut run, &settings);
    assert_eq!(ids(&run.history, all()).await, ["b3", "b2"]);
    let gone = RoomName("canary-b1-0".to_owned());
    assert!(run.history.probe(gone.0).await.unwrap().is_none());
    let kept = RoomName("canary-b2-0".to_owned());
    assert!(run.history.probe(kept.0).await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn above_the_size_the_oldest_good_batches_go_before_any_failure_and_the_file_shrinks() {
    let disk = Disk::new();
    let mut run = disk.start();
    for index in 0..600 {
        let outcome = match index % 4 {
            0 => failed(Reason::AgentSilent, "no speech"),
            _ => Outcome::Ok,
        };
        let started_at = disk.now.lock().unwrap().to_rfc3339();
        keep(
            &run,
            &batch(&format!("b{index:03}"), "support", &started_at, outcome),
        );
        *disk.now.lock().unwrap() += TimeDelta::minutes(15);
        run.writer.turn();
    }
    let size = |disk: &Disk| fs::metadata(disk.file()).unwrap().len();
    let checkpoint = |run: &mut Run| {
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
    let steps = forget(&mut run, &settings);
    assert!(steps > 10, "in small steps: {steps}");
    checkpoint(&mut run);
    assert!(size(&disk) <= 1_100_000, "{}", size(&disk));
    let counts = run.history.counts("support").await.unwrap().batches;
    assert_eq!(
        counts["degraded"], 150,
        "no failure goes while a good batch is left"
    );
    assert!(counts["ok"] > 0);
    let left = ids(
        &run.history,
        BatchFilter {
            result: Some("ok".to_owned()),
            ..all()
        },
    )
    .await;
    assert_eq!(left[0], "b599");

    let settings = config::HistorySettings {
        max_megabytes: 0,
        ..disk.settings.clone()
    };
    forget(&mut run, &settings);
    assert_eq!(ids(&run.history, all()).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_row_of_the_ledger_is_kept_for_two_months_after_its_own() {
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
        forget(&mut run, &settings);
        assert_eq!(disk.rows(), rows, "{now}");
    }
    assert_eq!(
        Period::Month.first_day(at("2026-03-31T23:59:59Z").date_naive()) - Months::new(2),
        at("2026-01-01T00:00:00Z").date_naive()
    );
}

// The thread.

#[tokio::test]
async fn the_thread_writes_what_it_is_given_and_closing_writes_the_rest() {
    let disk = Disk::new();
    let history = History::open_with_clock(&disk.settings, disk.clock()).unwrap();
    let admit = |_: &Used, _| Ok::<_, ()>(());
    let reserving = (0..50).map(|index| {
        let history = history.clone();
        async move {
            let name = room(&index.to_string());
            history
                .reserve(&name, "acme", "support", MINUTE, admit)
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
    let soon = Instant::now() + DAY;
    assert!(history.close(soon).await);
    let run = disk.start();
    assert_eq!(run.used(), (100, 100));
    assert_eq!(ids(&run.history, all()).await, ["b1"]);
}

#[tokio::test]
async fn the_last_handle_ends_the_thread_and_unlocks_the_folder() {
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
