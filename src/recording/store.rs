//! The folder of the recordings: writing them, reading them, and deleting the oldest above the limit of the folder.
//!
//! Each file appears complete or not at all. Everything here blocks on the disk, except for what is marked as `async`.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::task;
use tokio::time::timeout;

use super::{CallRecording, SavedRecording, TrackFile};
use crate::livekit::RoomName;
use crate::livekit::event::Speaker;

/// Recordings are personal data: only their owner may read them.
const PRIVATE_DIR: u32 = 0o700;

/// How long a probe waits for its files. A disk that hangs must not hold up a batch.
const SAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The end of the name of a file that is being written.
const TEMPORARY: &str = ".tmp";

const TRACKS: [Speaker; 2] = [Speaker::Agent, Speaker::Caller];

/// The handle to the folder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RecordingStore(Arc<Folder>);

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// Above this the oldest recordings are deleted; `None` never deletes one.
    max_bytes: Option<u64>,
    index: Mutex<Index>,
}

#[derive(Debug, Default)]
struct Index {
    rooms: HashMap<String, Stored>,
    bytes: u64,
    /// Rooms of earlier runs, until [`RecordingStore::sweep`].
    unchecked: Vec<String>,
    /// Rooms whose recording was deleted, until the history knows.
    deleted: Vec<String>,
    /// Rooms whose recording is to be deleted by [`RecordingStore::delete_discarded`].
    discarded: Vec<String>,
}

#[derive(Debug, Clone, Copy)]
struct Stored {
    written: SystemTime,
    bytes: u64,
}

/// A track of a recording, open for reading.
pub(crate) struct RecordingFile {
    pub(crate) file: File,
    pub(crate) bytes: u64,
    pub(crate) written: SystemTime,
}

impl RecordingStore {
    /// Reads which recordings the folder has. A folder that is missing is created by the first recording.
    pub(crate) fn open(path: PathBuf, max_bytes: u64) -> Self {
        let mut index = Index::default();
        if let Err(error) = index.read(&path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("cannot read {}: {error}", path.display());
        }
        index.unchecked = index.rooms.keys().cloned().collect();
        Self(Arc::new(Folder {
            path,
            max_bytes: Some(max_bytes),
            index: Mutex::new(index),
        }))
    }

    /// A folder of the user, which may have other files, and from which nothing is deleted.
    ///
    /// # Errors
    /// The folder cannot be created, or no file can be created in it.
    pub(crate) fn open_unmanaged(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        // A batch costs agent time, so a folder that cannot be written is reported before it.
        temporary_file(path)?;
        Ok(Self(Arc::new(Folder {
            path: path.to_owned(),
            max_bytes: None,
            index: Mutex::default(),
        })))
    }

    /// Writes the files of a room, on a thread that may block.
    ///
    /// # Errors
    /// The files cannot be written, or the disk takes longer than [`SAVE_TIMEOUT`]; then none of them appears later.
    pub(crate) async fn save(
        &self,
        room: &RoomName,
        recording: CallRecording,
    ) -> io::Result<SavedRecording> {
        let given_up = Arc::new(AtomicBool::new(false));
        let (store, room, stop) = (self.clone(), room.0.clone(), Arc::clone(&given_up));
        let saving = task::spawn_blocking(move || store.write(&room, recording, &stop));
        match timeout(SAVE_TIMEOUT, saving).await {
            Ok(Ok(saved)) => saved,
            Ok(Err(error)) => Err(io::Error::other(error)),
            Err(_) => {
                given_up.store(true, Ordering::Relaxed);
                let text = format!("the disk took longer than {SAVE_TIMEOUT:?}");
                Err(io::Error::new(ErrorKind::TimedOut, text))
            }
        }
    }

    fn write(
        &self,
        room: &str,
        recording: CallRecording,
        given_up: &AtomicBool,
    ) -> io::Result<SavedRecording> {
        let (started, files) = recording.into_files();
        let [agent, caller] = &files;
        let saved = SavedRecording {
            started,
            agent: agent.as_ref().map(TrackFile::saved),
            caller: caller.as_ref().map(TrackFile::saved),
        };
        let folder = &self.0;
        if folder.max_bytes.is_some() {
            let mut builder = DirBuilder::new();
            builder
                .recursive(true)
                .mode(PRIVATE_DIR)
                .create(&folder.path)?;
        }
        let mut written = Vec::new();
        for (track, file) in TRACKS.iter().zip(&files) {
            let Some(file) = file else {
                continue;
            };
            let path = folder.file(room, *track).ok_or_else(|| {
                io::Error::new(
                    ErrorKind::InvalidInput,
                    "the name of the room is no file name",
                )
            })?;
            let mut temporary = temporary_file(&folder.path)?;
            temporary.write_all(&file.content)?;
            written.push((temporary, path));
        }
        let bytes = files.iter().flatten().map(|file| file.saved().bytes).sum();
        if given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("given up"));
        }
        for (temporary, path) in written {
            temporary.persist(path).map_err(|error| error.error)?;
        }
        folder.lock().insert(room, SystemTime::now(), bytes);
        if let Some(max_bytes) = folder.max_bytes {
            self.delete_above(max_bytes);
        }
        Ok(saved)
    }

    /// Opens a track; `None` if there is none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn read(&self, room: &str, track: Speaker) -> io::Result<Option<RecordingFile>> {
        let Some(path) = self.0.file(room, track) else {
            return Ok(None);
        };
        let file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let metadata = file.metadata()?;
        Ok(Some(RecordingFile {
            bytes: metadata.len(),
            written: metadata.modified()?,
            file,
        }))
    }

    /// Whether there are files of this room. Does not block on the disk.
    pub(crate) fn contains(&self, room: &str) -> bool {
        self.0.lock().rooms.contains_key(room)
    }

    /// Deletes the recordings that were written before this time.
    pub(crate) fn expire(&self, before: SystemTime) {
        let index = self.0.lock();
        let old = index.rooms.iter().filter(|(_, it)| it.written < before);
        let old: Vec<String> = old.map(|(room, _)| room.clone()).collect();
        drop(index);
        self.delete(old);
    }

    /// Deletes the recordings of these rooms, if they have any.
    pub(crate) fn delete(&self, rooms: impl IntoIterator<Item = String>) {
        for room in rooms {
            let mut index = self.0.lock();
            if index.remove(&room) {
                index.deleted.push(room.clone());
                drop(index);
                self.0.delete_files(&room);
            }
        }
    }

    /// Marks rooms whose probe the history does not store. Does not block on the disk.
    pub(crate) fn discard(&self, rooms: impl IntoIterator<Item = String>) {
        self.0.lock().discarded.extend(rooms);
    }

    /// Deletes what was discarded.
    pub(crate) fn delete_discarded(&self) {
        let rooms = std::mem::take(&mut self.0.lock().discarded);
        self.delete(rooms);
    }

    /// The rooms whose recordings were deleted since the last call. Does not block on the disk.
    pub(crate) fn take_deleted(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().deleted)
    }

    /// Deletes the recordings of earlier runs whose probe is unknown. Only the first call has any to check.
    ///
    /// # Errors
    /// Those of `is_known`. The rest is checked by the next call.
    pub(crate) fn sweep<E>(
        &self,
        mut is_known: impl FnMut(&str) -> Result<bool, E>,
    ) -> Result<(), E> {
        loop {
            let Some(room) = self.0.lock().unchecked.last().cloned() else {
                return Ok(());
            };
            if !is_known(&room)? {
                self.delete([room]);
            }
            self.0.lock().unchecked.pop();
        }
    }

    fn delete_above(&self, max_bytes: u64) {
        loop {
            let index = self.0.lock();
            if index.bytes <= max_bytes {
                return;
            }
            let age = |(room, stored): &(&String, &Stored)| (stored.written, (*room).clone());
            let Some((oldest, _)) = index.rooms.iter().min_by_key(age) else {
                return;
            };
            let oldest = oldest.clone();
            drop(index);
            self.delete([oldest]);
        }
    }
}

impl Folder {
    fn lock(&self) -> MutexGuard<'_, Index> {
        // Each change of the index is complete before anything that can panic.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path of a track; `None` if no room has this name. A request names a room as it likes.
    fn file(&self, room: &str, track: Speaker) -> Option<PathBuf> {
        is_room_name(room).then(|| self.path.join(format!("{room}{}", suffix(track))))
    }

    /// A file that remains is deleted at the next start, because no probe refers to it.
    fn delete_files(&self, room: &str) {
        for path in TRACKS.iter().filter_map(|track| self.file(room, *track)) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    tracing::warn!("cannot delete {}: {error}", path.display());
                }
                _ => {}
            }
        }
    }
}

impl Index {
    /// Adds all recordings of a folder, and removes files that an earlier run did not complete.
    fn read(&mut self, path: &Path) -> io::Result<()> {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                continue;
            };
            if name.ends_with(TEMPORARY) {
                fs::remove_file(entry.path())?;
                continue;
            }
            let mut rooms = TRACKS
                .iter()
                .filter_map(|track| name.strip_suffix(suffix(*track)));
            let Some(room) = rooms.next().filter(|room| is_room_name(room)) else {
                continue;
            };
            let metadata = entry.metadata()?;
            self.insert(room, metadata.modified()?, metadata.len());
        }
        Ok(())
    }

    fn insert(&mut self, room: &str, written: SystemTime, bytes: u64) {
        let stored = self
            .rooms
            .entry(room.to_owned())
            .or_insert(Stored { written, bytes: 0 });
        stored.bytes += bytes;
        self.bytes += bytes;
    }

    /// Returns whether there was one.
    fn remove(&mut self, room: &str) -> bool {
        let removed = self.rooms.remove(room);
        self.bytes -= removed.map_or(0, |stored| stored.bytes);
        removed.is_some()
    }
}

/// A file that only its owner may read, and that is deleted unless it is renamed.
fn temporary_file(folder: &Path) -> io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".recording-")
        .suffix(TEMPORARY)
        .tempfile_in(folder)
}

/// Whether this may be a room of a canary: the characters of `room.name_prefix`, none of which separates folders.
fn is_room_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~:+@".contains(&byte);
    (1..=200).contains(&text.len()) && text.bytes().all(allowed)
}

fn suffix(track: Speaker) -> &'static str {
    match track {
        Speaker::Agent => ".agent.ogg",
        Speaker::Caller => ".caller.ogg",
    }
}
