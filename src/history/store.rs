//! The database file: schema and migrations, opening, writing, and deleting what is too old or too large.
//!
//! A corrupt file is moved aside. Its ledger, its journal, and its outages with their messages are copied to a new file as far
//! as they can be read.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, Permissions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Months, NaiveTime, TimeDelta, Utc};
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior, params};

use super::OpenError;
use super::events::HistoryEvent;
use super::incidents::{DetectionRows, IncidentRecord, OutboxMessage};
use super::ledger::{LedgerRow, LedgerSum, LoadedLedger};
use super::record::BatchRecord;
use super::statistics;
use crate::config::{self, Period};
use crate::livekit::RoomName;
use crate::report::Purpose;

/// The database's name in its folder.
pub(super) const FILE: &str = "history.sqlite3";
const LOCK_FILE: &str = "lock";

/// The permissions of every file: agents' transcripts and URLs are in them.
const PRIVATE: u32 = 0o600;

/// The `boot` of a row that is the sum of a target's closed rooms of one day.
const SUMMED_UP: &str = "";

/// The steps from an empty file to today's schema. A file's `user_version` is the number of steps that it has had.
///
/// Only append to this list: files in the field had each step as it was when it ran. [`salvage`] reads a corrupt file without
/// migrating it, so a step that changes one of its tables must adapt `salvage`, too.
///
/// Our own few lines, because the newest `rusqlite_migration` (2.6) needs rusqlite 0.40. Its libsqlite3-sys links the
/// same native library as that of our rusqlite 0.43, and cargo allows only one of them.
pub(super) const MIGRATIONS: Migrations<'static> = &[VERSION_1, VERSION_2, VERSION_3];

/// SQL scripts, in the order in which they run.
pub(super) type Migrations<'a> = &'a [&'a str];

/// Times are in Unix milliseconds, agent times in seconds.
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

/// Purposes, what may differ between rooms, and outages. Everything before was scheduled.
const VERSION_2: &str = "
    ALTER TABLE rooms ADD COLUMN purpose TEXT NOT NULL DEFAULT 'scheduled';
    ALTER TABLE batches ADD COLUMN purpose TEXT NOT NULL DEFAULT 'scheduled';
    CREATE INDEX batches_by_purpose ON batches (purpose, id);

    ALTER TABLE probes ADD COLUMN node TEXT;
    ALTER TABLE probes ADD COLUMN region TEXT;
    ALTER TABLE probes ADD COLUMN worker TEXT;
    ALTER TABLE probes ADD COLUMN media_path TEXT;
    ALTER TABLE probes ADD COLUMN agent_version TEXT;

    CREATE TABLE target_states (target TEXT PRIMARY KEY, document TEXT NOT NULL) STRICT, WITHOUT ROWID;

    CREATE TABLE incidents (
        id TEXT PRIMARY KEY,
        target TEXT NOT NULL,
        project TEXT NOT NULL,
        fault TEXT NOT NULL,
        began_at INTEGER NOT NULL,
        ended_at INTEGER,
        document TEXT NOT NULL
    ) STRICT;
    CREATE INDEX incidents_of_target ON incidents (target, id);
    CREATE INDEX incidents_ended ON incidents (ended_at) WHERE ended_at IS NOT NULL;

    CREATE TABLE outbox (
        id TEXT PRIMARY KEY,
        channel TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        document TEXT NOT NULL
    ) STRICT;
";

/// Lists by every filter, statistics and events.
///
/// A document lies in front of the later columns of its row, mostly on further pages. So each list is filtered on an index that
/// has all columns of its filter, and reads the documents of the result only.
const VERSION_3: &str = "
    CREATE INDEX batches_by_time ON batches (started_at, id, purpose, target, result, ok, failed);

    ALTER TABLE probes ADD COLUMN target TEXT NOT NULL DEFAULT '';
    ALTER TABLE probes ADD COLUMN purpose TEXT NOT NULL DEFAULT 'scheduled';
    UPDATE probes SET target = batches.target, purpose = batches.purpose FROM batches WHERE id = batch;
    DROP INDEX probes_of_batch;
    CREATE INDEX probes_of_batch ON probes (batch, place, target, purpose, reason, node, worker);
    CREATE INDEX probes_by_time ON probes (started_at, target, purpose, outcome, reason, node, worker);
    CREATE INDEX probes_not_ok ON probes (started_at, target, purpose, outcome, reason, node, worker)
        WHERE outcome <> 'ok';

    CREATE TABLE events (
        id TEXT PRIMARY KEY,
        at INTEGER NOT NULL,
        target TEXT,
        kind TEXT NOT NULL,
        text TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX events_by_time ON events (at);

    CREATE TABLE statistics (
        width INTEGER NOT NULL,
        start INTEGER NOT NULL,
        target TEXT NOT NULL,
        ok INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        join_delays TEXT NOT NULL,
        first_speech_delays TEXT NOT NULL,
        reply_delays TEXT NOT NULL,
        PRIMARY KEY (width, start, target)
    ) STRICT, WITHOUT ROWID;
    WITH
        rooms AS MATERIALIZED (
            SELECT target, started_at, outcome,
                   iif(document ->> '$.join_upper_bound', NULL, document ->> '$.join_delay_seconds') AS join_delay,
                   document ->> '$.first_speech_delay_seconds' AS first_speech_delay,
                   document ->> '$.reply_delay_seconds' AS reply_delay
            FROM probes WHERE purpose = 'scheduled' AND outcome IN ('ok', 'failed')
                AND coalesce(document ->> '$.origin', '') NOT IN ('external', 'config', 'canary')
        ),
        widths (width) AS (VALUES (3600000), (86400000)),
        delays AS (
            SELECT target, started_at, 'join' AS kind, CAST(round(join_delay * 1e6) AS INTEGER) / 1000 AS delay FROM rooms
            UNION ALL
            SELECT target, started_at, 'first_speech', CAST(round(first_speech_delay * 1e6) AS INTEGER) / 1000
            FROM rooms
            UNION ALL
            SELECT target, started_at, 'reply', CAST(round(reply_delay * 1e6) AS INTEGER) / 1000 FROM rooms
        ),
        classes AS (
            SELECT width, started_at / width * width AS start, target, kind, count(*) AS rooms,
                   CASE WHEN delay < 128 THEN delay
                        WHEN delay < 256 THEN delay / 2 * 2
                        WHEN delay < 512 THEN delay / 4 * 4
                        WHEN delay < 1024 THEN delay / 8 * 8
                        WHEN delay < 2048 THEN delay / 16 * 16
                        WHEN delay < 4096 THEN delay / 32 * 32
                        WHEN delay < 8192 THEN delay / 64 * 64
                        WHEN delay < 16384 THEN delay / 128 * 128
                        WHEN delay < 32768 THEN delay / 256 * 256
                        ELSE delay / 512 * 512 END AS class
            FROM delays, widths WHERE delay IS NOT NULL GROUP BY 1, 2, 3, 4, 6
        ),
        histograms AS (
            SELECT width, start, target, kind, json_group_object(CAST(class AS TEXT), rooms) AS delays
            FROM classes GROUP BY 1, 2, 3, 4
        ),
        counts AS (
            SELECT width, started_at / width * width AS start, target,
                   sum(outcome = 'ok') AS ok, sum(outcome = 'failed') AS failed
            FROM rooms, widths GROUP BY 1, 2, 3
        )
    INSERT INTO statistics
    SELECT width, start, target, ok, failed,
           coalesce(max(delays) FILTER (WHERE kind = 'join'), '{}'),
           coalesce(max(delays) FILTER (WHERE kind = 'first_speech'), '{}'),
           coalesce(max(delays) FILTER (WHERE kind = 'reply'), '{}')
    FROM counts LEFT JOIN histograms USING (width, start, target)
    GROUP BY width, start, target, ok, failed;
";

/// How long a statement waits for another connection. Only a reader that recovers the write-ahead log holds one up.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The write-ahead log is truncated to this size when it has been copied into the file.
const MAX_LOG_BYTES: i64 = 4 << 20;

/// How many batches, incidents, and ledger rows one clean-up step deletes. A reservation never waits for more than one step.
const STEP_BATCHES: i64 = 10;
const STEP_ROOMS: i64 = 500;

/// Pages that a clean-up step returns to the file system.
const STEP_PAGES: i64 = 256;

const ROOM_COLUMNS: &str =
    "room, project, target, boot, opened_at, reserved, settled, gone_at, purpose";
/// A file of format 1 has no purposes.
const VERSION_1_ROOM_COLUMNS: &str =
    "room, project, target, boot, opened_at, reserved, settled, gone_at, 'scheduled'";
const INCIDENT_COLUMNS: &str = "id, target, project, fault, began_at, ended_at, document";
const OUTBOX_COLUMNS: &str = "id, channel, created_at, document";

/// What this run needs of the file.
#[derive(Debug)]
pub(super) struct LoadedHistory {
    pub(super) ledger: LoadedLedger,
    /// Messages that are still to be delivered.
    pub(super) outbox: Vec<OutboxMessage>,
}

/// Why the store can't be opened.
#[derive(Debug)]
pub(super) enum StoreOpenError {
    /// A person has to act.
    Refused(OpenError),
    /// The fault may pass.
    Unavailable(String),
}

#[derive(Debug)]
enum StoreFault {
    Corrupt(String),
    Newer(i64),
    Other(String),
}

impl From<rusqlite::Error> for StoreFault {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Corrupt(error.to_string())
            }
            _ => Self::Other(error.to_string()),
        }
    }
}

impl From<io::Error> for StoreFault {
    fn from(error: io::Error) -> Self {
        Self::Other(error.to_string())
    }
}

pub(super) struct Store {
    pub(super) connection: Connection,
    path: PathBuf,
    /// The file that is open.
    file: FileId,
    /// Held while the connection is open: fields drop in the order of their declaration.
    _locks: [Option<Lock>; 2],
}

/// Which file a path names, whatever its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

/// What one step of the clean-up did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Expiry {
    /// The rooms of the probes that were deleted.
    pub(super) rooms: Vec<String>,
    /// There may be more to delete.
    pub(super) more: bool,
    /// Batches were deleted only because the file is too large.
    pub(super) for_size: bool,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

/// A locked file. A process that is being started holds a copy of every open file for a moment, and so the lock, unless it is
/// released explicitly.
#[derive(Debug)]
struct Lock(File);

impl Lock {
    fn take(file: File) -> Result<Self, TryLockError> {
        file.try_lock()?;
        Ok(Self(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // If it fails, the lock ends with the process.
        self.0.unlock().ok();
    }
}

impl Store {
    /// Opens the folder's database, migrates it, or creates it if it is missing.
    pub(super) fn open(
        dir: &Path,
        now: DateTime<Utc>,
    ) -> Result<(Self, LoadedHistory), StoreOpenError> {
        Self::open_with_migrations(dir, now, MIGRATIONS)
    }

    pub(super) fn open_with_migrations(
        dir: &Path,
        now: DateTime<Utc>,
        migrations: Migrations<'_>,
    ) -> Result<(Self, LoadedHistory), StoreOpenError> {
        let unavailable = |what: &str, error: io::Error| {
            StoreOpenError::Unavailable(format!("{what} {}: {error}", dir.display()))
        };
        fs::create_dir_all(dir).map_err(|error| unavailable("can't create", error))?;
        let in_use = || StoreOpenError::Refused(OpenError::Locked(dir.to_owned()));
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(PRIVATE)
            .open(dir.join(LOCK_FILE))
            .map_err(|error| unavailable("can't write to", error))?;
        let lock = match Lock::take(lock) {
            Ok(lock) => lock,
            Err(TryLockError::WouldBlock) => return Err(in_use()),
            Err(TryLockError::Error(error)) => return Err(unavailable("can't lock", error)),
        };
        // The folder as well, because the lock file can be deleted. Not all file systems can lock a folder (NFS can't).
        let folder = match File::open(dir).ok().map(Lock::take) {
            Some(Err(TryLockError::WouldBlock)) => return Err(in_use()),
            Some(Ok(lock)) => Some(lock),
            Some(Err(TryLockError::Error(_))) | None => None,
        };
        let path = dir.join(FILE);
        make_private(dir);
        let opened = open_file(&path, now, migrations).and_then(|connection| {
            let loaded = load(&connection)?;
            let file = FileId::of(&path)?;
            Ok((connection, file, loaded))
        });
        match opened {
            Ok((connection, file, loaded)) => Ok((
                Self {
                    connection,
                    path,
                    file,
                    _locks: [Some(lock), folder],
                },
                loaded,
            )),
            Err(StoreFault::Newer(found)) => Err(StoreOpenError::Refused(OpenError::Newer {
                path,
                found,
                known: newest(migrations),
            })),
            Err(StoreFault::Corrupt(why) | StoreFault::Other(why)) => Err(
                StoreOpenError::Unavailable(format!("can't open {}: {why}", path.display())),
            ),
        }
    }

    /// Durable when it returns.
    pub(super) fn write_rows(&mut self, rows: &[(RoomName, LedgerRow)]) -> rusqlite::Result<()> {
        let transaction = self.begin("FULL")?;
        insert_rows(&transaction, rows)?;
        transaction.commit()
    }

    /// Durable when it returns.
    pub(super) fn write_detections(&mut self, rows: &DetectionRows) -> rusqlite::Result<()> {
        let transaction = self.begin("FULL")?;
        insert_detections(&transaction, rows)?;
        transaction.commit()
    }

    /// Durable when it returns.
    pub(super) fn write_event(&mut self, event: &HistoryEvent) -> rusqlite::Result<()> {
        let transaction = self.begin("FULL")?;
        event.insert(&transaction)?;
        transaction.commit()
    }

    /// A power failure may lose the record, but it corrupts nothing.
    pub(super) fn write_record(&mut self, record: &BatchRecord) -> rusqlite::Result<()> {
        let transaction = self.begin("NORMAL")?;
        record.insert(&transaction)?;
        transaction.commit()
    }

    /// Removes the recording from the documents of these rooms' probes: its files are deleted.
    pub(super) fn remove_recordings(&mut self, rooms: &[String]) -> rusqlite::Result<()> {
        let transaction = self.begin("NORMAL")?;
        let mut statement = transaction.prepare(
            "UPDATE probes SET document = json_set(document, '$.recording', NULL) WHERE room = ?1",
        )?;
        for room in rooms {
            statement.execute([room])?;
        }
        drop(statement);
        transaction.commit()
    }

    /// Whether there is a probe of this room.
    pub(super) fn has_probe(&self, room: &str) -> rusqlite::Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM probes WHERE room = ?1)";
        self.connection.query_row(sql, [room], |row| row.get(0))
    }

    /// Durable when it returns.
    pub(super) fn accept_lost_ledger(&mut self) -> rusqlite::Result<()> {
        let transaction = self.begin("FULL")?;
        transaction.execute("UPDATE ledger SET lost = 0", [])?;
        transaction.commit()
    }

    /// Whether the path still names the open file. Otherwise everything that is written goes to a file that the next start
    /// won't find.
    pub(super) fn is_in_place(&self) -> bool {
        FileId::of(&self.path).is_ok_and(|found| found == self.file)
    }

    /// Records that the file lacks used agent time. Durable when it returns.
    pub(super) fn mark_ledger_lost(&mut self) -> rusqlite::Result<()> {
        let transaction = self.begin("FULL")?;
        transaction.execute("UPDATE ledger SET lost = 1", [])?;
        transaction.commit()
    }

    /// Deletes one step's worth of what is too old or too large, and sums up closed rows of the ledger. `now` is `None`
    /// while the clock can't be trusted: then nothing is too old. `boot` is this run of the program.
    pub(super) fn delete_expired(
        &mut self,
        limits: &config::HistorySettings,
        now: Option<DateTime<Utc>>,
        boot: &str,
    ) -> rusqlite::Result<Expiry> {
        let transaction = self.begin("NORMAL")?;
        let mut expiry = Expiry::default();
        let rooms = &mut expiry.rooms;
        if let Some(now) = now {
            expiry.more = delete_old(&transaction, limits, now, rooms)?;
            expiry.more |= sum_up_ledger(&transaction, now, boot)?;
        }
        if !expiry.more {
            expiry.for_size = delete_to_size(&transaction, limits.max_megabytes, rooms)?;
        }
        transaction.commit()?;
        expiry.more |= self.free_pages()? || expiry.for_size;
        Ok(expiry)
    }

    fn free_pages(&self) -> rusqlite::Result<bool> {
        if pragma(&self.connection, "freelist_count")? == 0 {
            return Ok(false);
        }
        // Each step of the statement frees one page, so it must be stepped to its end.
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

/// Whether the error comes from the data and not from the disk. A retry can't succeed then.
pub(super) fn is_of_content(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig)
    )
}

/// Connects to the checked file, and creates it first if it is missing.
///
/// A file is created under another name and renamed when it is complete. So a torn or empty file under the final name
/// was complete once, and its ledger is lost.
fn open_file(
    path: &Path,
    now: DateTime<Utc>,
    migrations: Migrations<'_>,
) -> Result<Connection, StoreFault> {
    let new = with_suffix(path, ".new");
    if !path.try_exists()? {
        // If only the rename was missing, this file holds what was saved of a corrupt one.
        let complete = new.try_exists()? && connect(&new, migrations).is_ok();
        if !complete {
            let lost = set_orphaned_log_aside(path, now)?;
            let nothing = Salvage {
                lost,
                ..Salvage::default()
            };
            create(&new, migrations, &nothing)?;
        }
        put_in_place(&new, path)?;
    }
    match connect(path, migrations) {
        Err(StoreFault::Corrupt(why)) => {
            replace(path, &new, &why, now, migrations)?;
            connect(path, migrations)
        }
        opened => opened,
    }
}

/// A write-ahead log without its database: the database was deleted or moved, and the agent time in it is lost. Returns
/// whether there is one.
fn set_orphaned_log_aside(path: &Path, now: DateTime<Utc>) -> Result<bool, StoreFault> {
    let log = with_suffix(path, "-wal");
    if !log.try_exists()? {
        return Ok(false);
    }
    let aside = with_suffix(&log, &format!(".orphaned-{}", now.format("%Y%m%dT%H%M%SZ")));
    fs::rename(&log, &aside)?;
    tracing::error!(
        "{} is missing, but its log was there, and was moved to {}. The record of used agent time is lost: projects with a \
         budget open no room until you accept that with `run --accept-lost-ledger`, or stop the canary and restore the file",
        path.display(),
        aside.display()
    );
    Ok(true)
}

/// Removes the permissions of others from the files of earlier versions. Best effort: another user may own them.
fn make_private(dir: &Path) {
    let database = dir.join(FILE);
    let files = ["", "-wal", "-shm"].map(|suffix| with_suffix(&database, suffix));
    for file in files.into_iter().chain([dir.join(LOCK_FILE)]) {
        let open = |mode: u32| mode & 0o077 != 0;
        if fs::metadata(&file).is_ok_and(|metadata| open(metadata.mode()))
            && let Err(error) = fs::set_permissions(&file, Permissions::from_mode(PRIVATE))
        {
            tracing::warn!(
                "{}: cannot remove the permissions of others: {error}",
                file.display()
            );
        }
    }
}

/// Connects to a complete file and migrates it to the newest version.
fn connect(path: &Path, migrations: Migrations<'_>) -> Result<Connection, StoreFault> {
    if fs::metadata(path)?.len() == 0 {
        return Err(StoreFault::Corrupt("it is empty".to_owned()));
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    connection.pragma_update_and_check(None, "journal_size_limit", MAX_LOG_BYTES, |_| Ok(()))?;
    let version = pragma(&connection, "user_version")?;
    if version > newest(migrations) {
        return Err(StoreFault::Newer(version));
    }
    if version <= 0 {
        return Err(StoreFault::Corrupt("it holds no history".to_owned()));
    }
    check(&connection, "quick_check(1)")?;
    // Off during migrations: rebuilding a table drops the old one, and SQLite would delete the rows that refer to it.
    // https://www.sqlite.org/lang_altertable.html#otheralter
    connection.pragma_update(None, "foreign_keys", false)?;
    for version in version..newest(migrations) {
        migrate(&mut connection, migrations, version)?;
    }
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

/// The version of a file that has had all these steps.
fn newest(migrations: Migrations<'_>) -> i64 {
    i64::try_from(migrations.len()).expect("the list is short")
}

/// Migrates a file of this version to the next one, completely or not at all.
fn migrate(
    connection: &mut Connection,
    migrations: Migrations<'_>,
    version: i64,
) -> Result<(), StoreFault> {
    let step = usize::try_from(version).expect("the caller checked that it is positive");
    let next = version + 1;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(migrations[step])?;
    transaction.pragma_update(None, "user_version", next)?;
    transaction.commit()?;
    tracing::info!("migrated the history from format {version} to format {next}");
    Ok(())
}

fn create(path: &Path, migrations: Migrations<'_>, content: &Salvage) -> Result<(), StoreFault> {
    for suffix in ["", "-journal", "-wal", "-shm"] {
        remove(&with_suffix(path, suffix))?;
    }
    // SQLite gives its log and its index the permissions of the file.
    File::options()
        .write(true)
        .create_new(true)
        .mode(PRIVATE)
        .open(path)?;
    let mut connection = Connection::open(path)?;
    // SQLite ignores this after the first table.
    connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    let transaction = connection.transaction()?;
    for step in migrations {
        transaction.execute_batch(step)?;
    }
    transaction.execute("INSERT INTO ledger (lost) VALUES (?1)", [content.lost])?;
    insert_rows(&transaction, &content.rows)?;
    insert_detections(&transaction, &content.detections)?;
    transaction.pragma_update(None, "user_version", newest(migrations))?;
    transaction.commit()?;
    connection.close().map_err(|(_, error)| error.into())
}

fn check(connection: &Connection, pragma: &str) -> Result<(), StoreFault> {
    let sql = format!("PRAGMA {pragma}");
    let found: String = connection.query_row(&sql, [], |row| row.get(0))?;
    if found == "ok" {
        Ok(())
    } else {
        Err(StoreFault::Corrupt(found))
    }
}

fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, name, |row| row.get(0))
}

/// Moves a corrupt file aside, and creates a new one with what can be read of it, excluding batches.
fn replace(
    path: &Path,
    new: &Path,
    why: &str,
    now: DateTime<Utc>,
    migrations: Migrations<'_>,
) -> Result<(), StoreFault> {
    let salvage = salvage(path);
    // First the new file, then the move: a crash in between leaves one of the two to go on with.
    create(new, migrations, &salvage)?;
    let aside = with_suffix(path, &format!(".corrupt-{}", now.format("%Y%m%dT%H%M%SZ")));
    fs::rename(path, &aside)?;
    // The log belongs to the corrupt file: SQLite would replay it into the new one.
    for suffix in ["-wal", "-shm"] {
        match fs::rename(with_suffix(path, suffix), with_suffix(&aside, suffix)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    put_in_place(new, path)?;
    let (file, aside, rooms) = (path.display(), aside.display(), salvage.rows.len());
    if salvage.lost {
        tracing::error!(
            "{file} is corrupt ({why}). It was moved to {aside}, and a new file was created. The record of used agent \
             time is lost: projects with a budget open no room until you accept that with `run --accept-lost-ledger` \
             ({rooms} rooms were saved)"
        );
    } else {
        tracing::error!(
            "{file} is corrupt ({why}). It was moved to {aside}, and a new file was created. The record of used agent \
             time was saved ({rooms} rooms)"
        );
    }
    Ok(())
}

/// Durable when it returns.
fn put_in_place(new: &Path, path: &Path) -> Result<(), StoreFault> {
    // SQLite would replay a log that an earlier database left here into the new file.
    for suffix in ["-wal", "-shm"] {
        remove(&with_suffix(path, suffix))?;
    }
    fs::rename(new, path)?;
    if let Some(dir) = path.parent() {
        // A rename is durable only once its folder is synced.
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
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// What a new file begins with: what could be read of a corrupt one.
#[derive(Default)]
struct Salvage {
    rows: Vec<(RoomName, LedgerRow)>,
    /// Rows of the ledger are missing, or were missing before.
    lost: bool,
    detections: DetectionRows,
}

fn salvage(path: &Path) -> Salvage {
    let mut salvage = Salvage {
        lost: true,
        ..Salvage::default()
    };
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
    let connection = match Connection::open_with_flags(path, flags) {
        Ok(connection) => connection,
        Err(fault) => {
            tracing::debug!(?fault, "could not read anything");
            return salvage;
        }
    };
    if let Err(fault) = salvage_ledger(&connection, &mut salvage) {
        tracing::debug!(?fault, "could not read the whole ledger");
    }
    let saved = &mut salvage.detections;
    // Corrupt pages of one table do not affect the others. A file of format 1 has none of them.
    let select = |columns: &str, table: &str| {
        format!("SELECT {columns} FROM {table} WHERE json_valid(document)")
    };
    let state = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
    let states = select("target, document", "target_states");
    let incidents = select(INCIDENT_COLUMNS, "incidents");
    let outbox = select(OUTBOX_COLUMNS, "outbox");
    for read in [
        read_into(&mut saved.states, &connection, &states, state),
        read_into(&mut saved.incidents, &connection, &incidents, read_incident),
        read_into(&mut saved.messages, &connection, &outbox, read_message),
    ] {
        if let Err(fault) = read {
            tracing::debug!(?fault, "could not read all states, incidents and messages");
        }
    }
    salvage
}

fn salvage_ledger(connection: &Connection, salvage: &mut Salvage) -> Result<(), StoreFault> {
    // Corrupt pages of other tables do not affect this one.
    let whole = check(connection, "quick_check(rooms)");
    let columns = if connection.column_exists(None, "rooms", "purpose")? {
        ROOM_COLUMNS
    } else {
        VERSION_1_ROOM_COLUMNS
    };
    let sql = format!("SELECT {columns} FROM rooms");
    read_into(&mut salvage.rows, connection, &sql, read_row)?;
    whole?;
    salvage.lost = connection.query_row("SELECT lost FROM ledger", [], |row| row.get(0))?;
    Ok(())
}

/// Adds rows until the end, or until one that can't be read.
fn read_into<T>(
    found: &mut Vec<T>,
    connection: &Connection,
    sql: &str,
    read: impl Fn(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<()> {
    let mut statement = connection.prepare(sql)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        found.push(read(row)?);
    }
    Ok(())
}

fn load(connection: &Connection) -> Result<LoadedHistory, StoreFault> {
    let ledger = load_ledger(connection)?;
    let sql = format!("SELECT {OUTBOX_COLUMNS} FROM outbox");
    let mut statement = connection.prepare(&sql)?;
    let outbox = statement.query_map([], read_message)?;
    let outbox = outbox.collect::<rusqlite::Result<_>>()?;
    Ok(LoadedHistory { ledger, outbox })
}

fn load_ledger(connection: &Connection) -> Result<LoadedLedger, StoreFault> {
    let sql = format!("SELECT {ROOM_COLUMNS} FROM rooms WHERE gone_at IS NULL");
    let mut statement = connection.prepare(&sql)?;
    let rows = statement.query_map([], read_row)?;
    let rows = rows.collect::<rusqlite::Result<_>>()?;
    // All days, whatever the clock says now: it may be wrong, and be set later.
    let mut statement = connection.prepare(
        "SELECT project, target, purpose, opened_at / 86400000 * 86400000,
                sum(coalesce(settled, reserved))
         FROM rooms GROUP BY 1, 2, 3, 4",
    )?;
    let sums = statement.query_map([], |row| {
        let label: String = row.get(2)?;
        let seconds: i64 = row.get(4)?;
        Ok(LedgerSum {
            project: row.get(0)?,
            target: row.get(1)?,
            purpose: purpose(&label),
            day: time(row.get(3)?).date_naive(),
            seconds: seconds.unsigned_abs(),
        })
    })?;
    let sums = sums.collect::<rusqlite::Result<_>>()?;
    let lost = connection.query_row("SELECT lost FROM ledger", [], |row| row.get(0))?;
    Ok(LoadedLedger { rows, sums, lost })
}

fn read_incident(row: &rusqlite::Row<'_>) -> rusqlite::Result<IncidentRecord> {
    Ok(IncidentRecord {
        id: row.get(0)?,
        target: row.get(1)?,
        project: row.get(2)?,
        fault: row.get(3)?,
        began_at: time(row.get(4)?),
        ended_at: row.get::<_, Option<i64>>(5)?.map(time),
        document: row.get(6)?,
    })
}

fn read_message(row: &rusqlite::Row<'_>) -> rusqlite::Result<OutboxMessage> {
    Ok(OutboxMessage {
        id: row.get(0)?,
        channel: row.get(1)?,
        created_at: time(row.get(2)?),
        document: row.get(3)?,
    })
}

/// Inserts rows; a row that exists is replaced. Messages that are done are deleted.
fn insert_detections(transaction: &Transaction<'_>, rows: &DetectionRows) -> rusqlite::Result<()> {
    let mut state = transaction.prepare(
        "INSERT INTO target_states (target, document) VALUES (?1, ?2)
         ON CONFLICT (target) DO UPDATE SET document = excluded.document",
    )?;
    for row in &rows.states {
        state.execute(params![row.0, row.1])?;
    }
    let mut incident = transaction.prepare(&format!(
        "INSERT OR REPLACE INTO incidents ({INCIDENT_COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"
    ))?;
    for row in &rows.incidents {
        incident.execute(params![
            row.id,
            row.target,
            row.project,
            row.fault,
            millis(row.began_at),
            row.ended_at.map(millis),
            row.document,
        ])?;
    }
    let mut message = transaction.prepare(&format!(
        "INSERT OR REPLACE INTO outbox ({OUTBOX_COLUMNS}) VALUES (?1, ?2, ?3, ?4)"
    ))?;
    for row in &rows.messages {
        message.execute(params![
            row.id,
            row.channel,
            millis(row.created_at),
            row.document,
        ])?;
    }
    let mut done = transaction.prepare("DELETE FROM outbox WHERE id = ?1")?;
    for id in &rows.done {
        done.execute([id])?;
    }
    Ok(())
}

fn read_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<(RoomName, LedgerRow)> {
    let reserved: i64 = row.get(5)?;
    let settled: Option<i64> = row.get(6)?;
    let label: String = row.get(8)?;
    Ok((
        RoomName(row.get(0)?),
        LedgerRow {
            project: row.get(1)?,
            target: row.get(2)?,
            purpose: purpose(&label),
            boot: row.get(3)?,
            opened_at: time(row.get(4)?),
            reserved: reserved.unsigned_abs(),
            settled: settled.map(i64::unsigned_abs),
            gone_at: row.get::<_, Option<i64>>(7)?.map(time),
        },
    ))
}

/// Inserts rows; a row that exists is updated.
fn insert_rows(
    transaction: &Transaction<'_>,
    rows: &[(RoomName, LedgerRow)],
) -> rusqlite::Result<()> {
    let sql = format!(
        "INSERT INTO rooms ({ROOM_COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         ON CONFLICT (room) DO UPDATE SET reserved = excluded.reserved, settled = excluded.settled, gone_at = excluded.gone_at"
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
            row.purpose.label(),
        ])?;
    }
    Ok(())
}

fn delete_old(
    transaction: &Transaction<'_>,
    limits: &config::HistorySettings,
    now: DateTime<Utc>,
    deleted_rooms: &mut Vec<String>,
) -> rusqlite::Result<bool> {
    let before = |keep: Duration| millis(now).saturating_sub(whole_millis(keep));
    let mut batches = |with: &str, before: i64| {
        let old = format!("{with} AND started_at < {before}");
        delete_batches(transaction, &old, deleted_rooms)
    };
    // The current month and the two before it: one of them counts if the clock is set back, and the other is a reserve.
    let rooms = "DELETE FROM rooms WHERE room IN
                 (SELECT room FROM rooms WHERE opened_at < ?1 ORDER BY opened_at LIMIT ?2)";
    let incidents = "DELETE FROM incidents WHERE id IN
                     (SELECT id FROM incidents WHERE ended_at < ?1 ORDER BY ended_at LIMIT ?2)";
    let deleted = batches("failed = 0", before(limits.keep))?
        + batches("failed > 0", before(limits.keep_failures))?
        + transaction.execute(
            incidents,
            params![before(limits.keep_failures), STEP_BATCHES],
        )?
        + transaction.execute(rooms, params![start_of_month(now, 2), STEP_ROOMS])?
        + transaction.execute(
            "DELETE FROM events WHERE at < ?1",
            params![before(limits.keep)],
        )?
        + statistics::delete_old(transaction, now)?;
    Ok(deleted > 0)
}

/// Replaces closed rooms of past days by one row per target, purpose and day, which bounds the ledger: budgets need the sums only.
/// Returns whether there was anything to sum up.
///
/// The rows of today and yesterday stay, for those who look up a room. A room of this run that is gone but not settled stays
/// too: its settlement is still to come.
fn sum_up_ledger(
    transaction: &Transaction<'_>,
    now: DateTime<Utc>,
    boot: &str,
) -> rusqlite::Result<bool> {
    let yesterday = now.date_naive() - TimeDelta::days(1);
    let before = millis(yesterday.and_time(NaiveTime::MIN).and_utc());
    let mut closed = transaction.prepare(&format!(
        "SELECT {ROOM_COLUMNS} FROM rooms
         WHERE opened_at < ?1 AND gone_at IS NOT NULL AND boot <> ?2 AND (settled IS NOT NULL OR boot <> ?3)
         ORDER BY opened_at LIMIT ?4"
    ))?;
    let closed = closed.query_map(params![before, SUMMED_UP, boot, STEP_ROOMS], read_row)?;
    let closed: Vec<_> = closed.collect::<rusqlite::Result<_>>()?;
    let mut sums: BTreeMap<_, u64> = BTreeMap::new();
    let mut delete = transaction.prepare("DELETE FROM rooms WHERE room = ?1")?;
    for (room, row) in &closed {
        delete.execute([&room.0])?;
        let day = row.opened_at.date_naive();
        let purpose = row.purpose.label();
        *sums
            .entry((day, &row.project, &row.target, purpose))
            .or_default() += row.seconds();
    }
    let mut add = transaction.prepare(&format!(
        "INSERT INTO rooms ({ROOM_COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6, ?5, ?7)
         ON CONFLICT (room) DO UPDATE SET reserved = reserved + excluded.reserved, settled = settled + excluded.settled"
    ))?;
    for ((day, project, target, purpose), seconds) in sums {
        // No room's name contains a space.
        let name = format!("{day} {project} {target} {purpose}");
        let start = millis(day.and_time(NaiveTime::MIN).and_utc());
        add.execute(params![
            name,
            project,
            target,
            SUMMED_UP,
            start,
            whole(seconds),
            purpose,
        ])?;
    }
    Ok(!closed.is_empty())
}

/// Deletes the oldest batches while the file without its other tables is too large: first those without a failure, then the
/// others. Deleting batches makes the other tables no smaller, and each has a bound of its own.
fn delete_to_size(
    transaction: &Transaction<'_>,
    max_megabytes: u64,
    deleted_rooms: &mut Vec<String>,
) -> rusqlite::Result<bool> {
    let limit = whole(max_megabytes.saturating_mul(1_000_000));
    let pages = pragma(transaction, "page_count")? - pragma(transaction, "freelist_count")?;
    let bytes = pages.saturating_mul(pragma(transaction, "page_size")?);
    // The size of the other tables costs a read of all their pages.
    if bytes <= limit || bytes - other_bytes(transaction)? <= limit {
        return Ok(false);
    }
    for with in ["failed = 0", "failed > 0"] {
        if delete_batches(transaction, with, deleted_rooms)? > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Deletes one step's worth of the oldest batches that meet a condition, and adds the rooms of their probes to `rooms`. Returns
/// the number of batches.
fn delete_batches(
    transaction: &Transaction<'_>,
    condition: &str,
    rooms: &mut Vec<String>,
) -> rusqlite::Result<usize> {
    let oldest =
        format!("SELECT id FROM batches WHERE {condition} ORDER BY started_at, id LIMIT ?1");
    let mut statement = transaction.prepare(&format!(
        "SELECT room FROM probes WHERE batch IN ({oldest})"
    ))?;
    let found = statement.query_map([STEP_BATCHES], |row| row.get(0))?;
    rooms.append(&mut found.collect::<rusqlite::Result<_>>()?);
    let sql = format!("DELETE FROM batches WHERE id IN ({oldest})");
    transaction.execute(&sql, [STEP_BATCHES])
}

/// Bytes of the ledger, of what the detection keeps, and of statistics and events.
fn other_bytes(transaction: &Transaction<'_>) -> rusqlite::Result<i64> {
    transaction.query_row(
        "SELECT coalesce(sum(pgsize), 0) FROM dbstat WHERE aggregate = TRUE AND name IN
         (SELECT name FROM sqlite_schema
          WHERE tbl_name IN ('rooms', 'incidents', 'outbox', 'target_states', 'events', 'statistics'))",
        [],
        |row| row.get(0),
    )
}

/// The start of the UTC month that is this many months before the current one.
fn start_of_month(now: DateTime<Utc>, months_back: u32) -> i64 {
    let first = Period::Month.first_day(now.date_naive()) - Months::new(months_back);
    millis(first.and_time(NaiveTime::MIN).and_utc())
}

pub(super) fn millis(at: DateTime<Utc>) -> i64 {
    at.timestamp_millis()
}

/// A value outside the calendar was not written by this program; it counts as long past.
pub(super) fn time(millis: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(millis).unwrap_or(DateTime::UNIX_EPOCH)
}

/// An unknown purpose was not written by this program; its agent time counts whatever it is.
pub(super) fn purpose(label: &str) -> Purpose {
    Purpose::of_label(label).unwrap_or(Purpose::Scheduled)
}

fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn whole_millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
