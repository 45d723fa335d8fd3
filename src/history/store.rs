//! The database file: its schema, its opening, what is written to it and what it forgets.
//!
//! A file that is found corrupt is moved aside, and its ledger and journal are taken over as far as they can be read.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Months, NaiveTime, Utc};
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior, params};

use super::OpenError;
use super::ledger::{Loaded, Row};
use super::record::Record;
use crate::config::{self, Period};
use crate::livekit::RoomName;

/// The database, in the folder.
pub(super) const FILE: &str = "history.sqlite3";
const LOCK: &str = "lock";

/// The steps from an empty file to today's schema. A file's `user_version` counts the steps that it has had.
///
/// Only append to this list: files in the field have had the steps as they were when they ran. `salvage` reads `rooms`
/// and `ledger` of a corrupt file without migrating it, so a step that changes these tables must keep it working.
///
/// By hand, because the newest rusqlite_migration (2.6) needs rusqlite 0.40. Its libsqlite3-sys links the same native
/// library as that of our rusqlite 0.43, and cargo allows one of them only.
pub(super) const MIGRATIONS: Migrations<'static> = &[VERSION_1];

/// SQL scripts, in the order in which they are applied.
pub(super) type Migrations<'a> = &'a [&'a str];

/// Times are Unix milliseconds, agent times seconds.
const VERSION_1: &str = "
    CREATE TABLE rooms (
        room TEXT PRIMARY KEY,
        project TEXT NOT NULL,
        target TEXT NOT NULL,
        boot TEXT NOT NULL,
        opened_at INTEGER NOT NULL,
        reserved INTEGER NOT NULL,
        settled INTEGER,
        gone_at INTEGER
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX rooms_by_age ON rooms (opened_at);
    CREATE INDEX rooms_left ON rooms (room) WHERE gone_at IS NULL;

    CREATE TABLE batches (
        id TEXT PRIMARY KEY,
        target TEXT NOT NULL,
        project TEXT NOT NULL,
        started_at INTEGER NOT NULL,
        ended_at INTEGER NOT NULL,
        result TEXT NOT NULL,
        ok INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        aborted INTEGER NOT NULL,
        head TEXT NOT NULL
    ) STRICT;
    CREATE INDEX batches_of_target ON batches (target, id);
    CREATE INDEX batches_by_result ON batches (result, id);
    CREATE INDEX batches_without_failure ON batches (started_at) WHERE failed = 0;
    CREATE INDEX batches_with_failure ON batches (started_at) WHERE failed > 0;

    CREATE TABLE probes (
        room TEXT PRIMARY KEY,
        batch TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
        place INTEGER NOT NULL,
        outcome TEXT NOT NULL,
        reason TEXT,
        started_at INTEGER NOT NULL,
        document TEXT NOT NULL
    ) STRICT;
    CREATE INDEX probes_of_batch ON probes (batch, place);

    CREATE TABLE agents_seen (
        target TEXT NOT NULL,
        agent_name TEXT NOT NULL,
        first_seen_at INTEGER NOT NULL,
        PRIMARY KEY (target, agent_name)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE ledger (lost INTEGER NOT NULL) STRICT;
";

/// How long a statement waits for another connection; only a reader's recovery of the log ever holds one up.
const BUSY: Duration = Duration::from_secs(5);

/// The log is cut back to this size when it has been copied into the file.
const LOG_BYTES: i64 = 4 << 20;

/// Batches, and ledger rows, that one step of forgetting deletes: a reservation waits for no more than that.
const STEP_BATCHES: i64 = 10;
const STEP_ROOMS: i64 = 500;

/// Pages that a step gives back to the file system.
const STEP_PAGES: i64 = 256;

const ROOM_COLUMNS: &str = "room, project, target, boot, opened_at, reserved, settled, gone_at";

/// Why there is no store.
#[derive(Debug)]
pub(super) enum NotOpened {
    /// For a person to sort out.
    Refused(OpenError),
    /// It may pass.
    Unavailable(String),
}

#[derive(Debug)]
enum Fault {
    Corrupt(String),
    Newer(i64),
    Other(String),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Corrupt(error.to_string())
            }
            _ => Self::Other(error.to_string()),
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Other(error.to_string())
    }
}

pub(super) struct Store {
    pub connection: Connection,
    /// Held for as long as the connection is open; fields are dropped in order.
    _lock: File,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the folder's database, or begins one.
    pub fn open(dir: &Path, now: DateTime<Utc>) -> Result<(Self, Loaded), NotOpened> {
        Self::open_with(dir, now, MIGRATIONS)
    }

    pub fn open_with(
        dir: &Path,
        now: DateTime<Utc>,
        migrations: Migrations<'_>,
    ) -> Result<(Self, Loaded), NotOpened> {
        let unavailable = |what: &str, error: io::Error| {
            NotOpened::Unavailable(format!("{what} {}: {error}", dir.display()))
        };
        fs::create_dir_all(dir).map_err(|error| unavailable("can't create", error))?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join(LOCK))
            .map_err(|error| unavailable("can't write to", error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(NotOpened::Refused(OpenError::Locked(dir.to_owned())));
            }
            Err(TryLockError::Error(error)) => return Err(unavailable("can't lock", error)),
        }
        let path = dir.join(FILE);
        let opened = open_file(&path, now, migrations).and_then(|connection| {
            let loaded = load(&connection, now)?;
            Ok((connection, loaded))
        });
        match opened {
            Ok((connection, loaded)) => Ok((
                Self {
                    connection,
                    _lock: lock,
                },
                loaded,
            )),
            Err(Fault::Newer(found)) => Err(NotOpened::Refused(OpenError::Newer {
                path,
                found,
                known: newest(migrations),
            })),
            Err(Fault::Corrupt(why) | Fault::Other(why)) => Err(NotOpened::Unavailable(format!(
                "can't open {}: {why}",
                path.display()
            ))),
        }
    }

    /// Durable when it returns.
    pub fn write_rows(&mut self, rows: &[(RoomName, Row)]) -> rusqlite::Result<()> {
        let transaction = self.begin("FULL")?;
        insert_rows(&transaction, rows)?;
        transaction.commit()
    }

    /// A power cut may cost the record, but tears nothing.
    pub fn write_record(&mut self, record: &Record) -> rusqlite::Result<()> {
        let transaction = self.begin("NORMAL")?;
        record.insert(&transaction)?;
        transaction.commit()
    }

    /// Durable when it returns.
    pub fn accept_lost_ledger(&mut self) -> rusqlite::Result<()> {
        let transaction = self.begin("FULL")?;
        transaction.execute("UPDATE ledger SET lost = 0", [])?;
        transaction.commit()
    }

    /// Forgets a little of what is too old or too much, and says whether there was any.
    pub fn forget(
        &mut self,
        limits: &config::HistorySettings,
        now: DateTime<Utc>,
    ) -> rusqlite::Result<bool> {
        let transaction = self.begin("NORMAL")?;
        let deleted = forget_old(&transaction, limits, now)?
            || forget_large(&transaction, limits.max_megabytes)?;
        transaction.commit()?;
        let given_back = self.give_back_pages()?;
        Ok(deleted || given_back)
    }

    fn give_back_pages(&self) -> rusqlite::Result<bool> {
        if pragma(&self.connection, "freelist_count")? == 0 {
            return Ok(false);
        }
        // Each step of the statement frees one page.
        let sql = format!("PRAGMA incremental_vacuum({STEP_PAGES})");
        let mut statement = self.connection.prepare(&sql)?;
        let mut rows = statement.query([])?;
        while rows.next()?.is_some() {}
        Ok(true)
    }

    fn begin(&mut self, synchronous: &str) -> rusqlite::Result<Transaction<'_>> {
        self.connection
            .pragma_update(None, "synchronous", synchronous)?;
        self.connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
    }
}

/// Whether the error is of what was to be written, and not of the place: to try again is of no use.
pub(super) fn is_of_content(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig)
    )
}

/// A connection to the checked file, which is made if it is missing.
///
/// A file is made under another name and takes its own when it is whole. So a file under its own name that is torn or
/// empty had been whole.
fn open_file(
    path: &Path,
    now: DateTime<Utc>,
    migrations: Migrations<'_>,
) -> Result<Connection, Fault> {
    let new = beside(path, ".new");
    if !path.try_exists()? {
        // Where only the last step was missing, it holds what was saved of a corrupt file.
        let whole = new.try_exists()? && connect(&new, migrations).is_ok();
        if !whole {
            make(&new, migrations, &[], false)?;
        }
        put_in_place(&new, path)?;
    }
    match connect(path, migrations) {
        Err(Fault::Corrupt(why)) => {
            replace(path, &new, &why, now, migrations)?;
            connect(path, migrations)
        }
        opened => opened,
    }
}

/// A connection to a whole file, which is brought to the newest version.
fn connect(path: &Path, migrations: Migrations<'_>) -> Result<Connection, Fault> {
    if fs::metadata(path)?.len() == 0 {
        return Err(Fault::Corrupt("it is empty".to_owned()));
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    connection.pragma_update_and_check(None, "journal_size_limit", LOG_BYTES, |_| Ok(()))?;
    let version = pragma(&connection, "user_version")?;
    if version > newest(migrations) {
        return Err(Fault::Newer(version));
    }
    if version <= 0 {
        return Err(Fault::Corrupt("it holds no history".to_owned()));
    }
    check(&connection, "quick_check(1)")?;
    // Off while tables change: to rebuild one, SQLite has its rows dropped, which would cascade.
    connection.pragma_update(None, "foreign_keys", false)?;
    for step in version..newest(migrations) {
        migrate(&mut connection, migrations, step)?;
    }
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

/// The version of a file that has had all of these steps.
fn newest(migrations: Migrations<'_>) -> i64 {
    i64::try_from(migrations.len()).expect("a short list")
}

/// Brings a file of this version to the next: wholly, or not at all.
fn migrate(
    connection: &mut Connection,
    migrations: Migrations<'_>,
    version: i64,
) -> Result<(), Fault> {
    let step = usize::try_from(version).expect("checked by the caller");
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(migrations[step])?;
    transaction.pragma_update(None, "user_version", version + 1)?;
    transaction.commit()?;
    tracing::info!(
        "migrated the history from version {version} to {}",
        version + 1
    );
    Ok(())
}

fn make(
    path: &Path,
    migrations: Migrations<'_>,
    rows: &[(RoomName, Row)],
    lost: bool,
) -> Result<(), Fault> {
    for suffix in ["", "-journal", "-wal", "-shm"] {
        remove(&beside(path, suffix))?;
    }
    let mut connection = Connection::open(path)?;
    // Only heeded before the first table.
    connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    let transaction = connection.transaction()?;
    for step in migrations {
        transaction.execute_batch(step)?;
    }
    transaction.execute("INSERT INTO ledger (lost) VALUES (?1)", [lost])?;
    insert_rows(&transaction, rows)?;
    transaction.pragma_update(None, "user_version", newest(migrations))?;
    transaction.commit()?;
    connection.close().map_err(|(_, error)| error.into())
}

fn check(connection: &Connection, pragma: &str) -> Result<(), Fault> {
    let sql = format!("PRAGMA {pragma}");
    let found: String = connection.query_row(&sql, [], |row| row.get(0))?;
    if found == "ok" {
        Ok(())
    } else {
        Err(Fault::Corrupt(found))
    }
}

fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, name, |row| row.get(0))
}

/// Moves a corrupt file aside and begins a new one with what of the ledger and the journal can still be read.
fn replace(
    path: &Path,
    new: &Path,
    why: &str,
    now: DateTime<Utc>,
    migrations: Migrations<'_>,
) -> Result<(), Fault> {
    let salvage = salvage(path);
    make(new, migrations, &salvage.rows, salvage.lost)?;
    let aside = beside(path, &format!(".corrupt-{}", now.format("%Y%m%dT%H%M%SZ")));
    fs::rename(path, &aside)?;
    // Its log belongs to it.
    for suffix in ["-wal", "-shm"] {
        match fs::rename(beside(path, suffix), beside(&aside, suffix)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    put_in_place(new, path)?;
    let (file, aside, rooms) = (path.display(), aside.display(), salvage.rows.len());
    if salvage.lost {
        tracing::error!(
            "{file} is corrupt ({why}): moved to {aside} and begun anew; the record of used agent time is lost, and \
             projects with a budget open no room until told otherwise ({rooms} rooms could be read)"
        );
    } else {
        tracing::error!(
            "{file} is corrupt ({why}): moved to {aside} and begun anew; the record of used agent time was saved \
             ({rooms} rooms)"
        );
    }
    Ok(())
}

/// Durable when it returns.
fn put_in_place(new: &Path, path: &Path) -> Result<(), Fault> {
    // A log that its database left behind would be taken for the new one's.
    for suffix in ["-wal", "-shm"] {
        remove(&beside(path, suffix))?;
    }
    fs::rename(new, path)?;
    if let Some(dir) = path.parent() {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// `<path><suffix>`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

struct Salvage {
    rows: Vec<(RoomName, Row)>,
    /// Rows are missing, or were before.
    lost: bool,
}

fn salvage(path: &Path) -> Salvage {
    let mut salvage = Salvage {
        rows: Vec::new(),
        lost: true,
    };
    let read = |salvage: &mut Salvage| -> Result<(), Fault> {
        let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        // Bad pages of other tables leave these whole.
        let whole = check(&connection, "quick_check(rooms)");
        let sql = format!("SELECT {ROOM_COLUMNS} FROM rooms");
        let mut statement = connection.prepare(&sql)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            salvage.rows.push(read_row(row)?);
        }
        whole?;
        salvage.lost = connection.query_row("SELECT lost FROM ledger", [], |row| row.get(0))?;
        Ok(())
    };
    if let Err(fault) = read(&mut salvage) {
        tracing::debug!(?fault, "the ledger could not be read whole");
    }
    salvage
}

fn load(connection: &Connection, now: DateTime<Utc>) -> Result<Loaded, Fault> {
    let sql = format!("SELECT {ROOM_COLUMNS} FROM rooms WHERE gone_at IS NULL");
    let mut statement = connection.prepare(&sql)?;
    let rows = statement.query_map([], read_row)?;
    let rows = rows.collect::<rusqlite::Result<_>>()?;
    // A month more than is counted: the clock may be set back.
    let since = start_of_month(now, 1);
    let mut statement = connection.prepare(
        "SELECT project, opened_at / 86400000 * 86400000, sum(coalesce(settled, reserved))
         FROM rooms WHERE opened_at >= ?1 GROUP BY 1, 2",
    )?;
    let days = statement.query_map([since], |row| {
        let seconds: i64 = row.get(2)?;
        let day = time(row.get(1)?).date_naive();
        Ok((row.get(0)?, day, seconds.unsigned_abs()))
    })?;
    let days = days.collect::<rusqlite::Result<_>>()?;
    let lost = connection.query_row("SELECT lost FROM ledger", [], |row| row.get(0))?;
    Ok(Loaded { rows, days, lost })
}

fn read_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<(RoomName, Row)> {
    let reserved: i64 = row.get(5)?;
    let settled: Option<i64> = row.get(6)?;
    Ok((
        RoomName(row.get(0)?),
        Row {
            project: row.get(1)?,
            target: row.get(2)?,
            boot: row.get(3)?,
            opened_at: time(row.get(4)?),
            reserved: reserved.unsigned_abs(),
            settled: settled.map(i64::unsigned_abs),
            gone_at: row.get::<_, Option<i64>>(7)?.map(time),
        },
    ))
}

/// A row that is there already takes the changes.
fn insert_rows(transaction: &Transaction<'_>, rows: &[(RoomName, Row)]) -> rusqlite::Result<()> {
    let sql = format!(
        "INSERT INTO rooms ({ROOM_COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
         ON CONFLICT (room) DO UPDATE SET settled = excluded.settled, gone_at = excluded.gone_at"
    );
    let mut statement = transaction.prepare(&sql)?;
    for (room, row) in rows {
        statement.execute(params![
            room.0,
            row.project,
            row.target,
            row.boot,
            millis(row.opened_at),
            whole(row.reserved),
            row.settled.map(whole),
            row.gone_at.map(millis),
        ])?;
    }
    Ok(())
}

fn forget_old(
    transaction: &Transaction<'_>,
    limits: &config::HistorySettings,
    now: DateTime<Utc>,
) -> rusqlite::Result<bool> {
    let before = |keep: Duration| millis(now).saturating_sub(whole_millis(keep));
    let batches = |with: &str, before: i64| {
        let sql = format!(
            "DELETE FROM batches WHERE id IN (SELECT id FROM batches
             WHERE {with} AND started_at < ?1 ORDER BY started_at LIMIT ?2)"
        );
        transaction.execute(&sql, params![before, STEP_BATCHES])
    };
    // Two whole months after a row's own; the current one makes a third.
    let rooms = "DELETE FROM rooms WHERE room IN
                 (SELECT room FROM rooms WHERE opened_at < ?1 ORDER BY opened_at LIMIT ?2)";
    let deleted = batches("failed = 0", before(limits.keep))?
        + batches("failed > 0", before(limits.keep_failures))?
        + transaction.execute(rooms, params![start_of_month(now, 2), STEP_ROOMS])?;
    Ok(deleted > 0)
}

/// The oldest batches go, those without a failure first.
fn forget_large(transaction: &Transaction<'_>, max_megabytes: u64) -> rusqlite::Result<bool> {
    let pages = pragma(transaction, "page_count")? - pragma(transaction, "freelist_count")?;
    let bytes = pages.saturating_mul(pragma(transaction, "page_size")?);
    if bytes <= whole(max_megabytes.saturating_mul(1_000_000)) {
        return Ok(false);
    }
    for with in ["failed = 0", "failed > 0"] {
        let sql = format!(
            "DELETE FROM batches WHERE id IN
             (SELECT id FROM batches WHERE {with} ORDER BY started_at LIMIT ?1)"
        );
        if transaction.execute(&sql, [STEP_BATCHES])? > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The start of the UTC month that lies so many months back.
fn start_of_month(now: DateTime<Utc>, months_back: u32) -> i64 {
    let first = Period::Month.first_day(now.date_naive()) - Months::new(months_back);
    millis(first.and_time(NaiveTime::MIN).and_utc())
}

pub(super) fn millis(at: DateTime<Utc>) -> i64 {
    at.timestamp_millis()
}

/// A time that no calendar knows can only be a foreign value; it counts as long past.
pub(super) fn time(millis: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(millis).unwrap_or(DateTime::UNIX_EPOCH)
}

fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn whole_millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
