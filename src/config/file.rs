//! Reads the files that settings name, without ever waiting for another process: only regular files of a bounded size.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;

/// Settings, secrets, keys, and the web configuration.
pub(crate) const MAX_FILE_BYTES: u64 = 64 * 1024;
/// Certificates: a bundle of a system's public roots has about 250 kB.
pub(crate) const MAX_CA_BYTES: u64 = 1024 * 1024;

/// The content of a regular file with at most `max_bytes`.
///
/// It can still take as long as the file system does, so a task that must go on calls it on a thread of its own.
///
/// # Errors
/// In words that complete "can't read this file: …".
pub(crate) fn read_regular(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    // Without O_NONBLOCK, opening a FIFO waits until another process writes to it.
    let file = File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR.into());
    }
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut content = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut content)?;
    if content.len() as u64 > max_bytes {
        let limit = max_bytes / 1024;
        return Err(io::Error::other(format!("it is larger than {limit} KiB")));
    }
    Ok(content)
}

/// As [`read_regular`], for text.
pub(crate) fn read_regular_text(path: &Path, max_bytes: u64) -> io::Result<String> {
    String::from_utf8(read_regular(path, max_bytes)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn only_regular_files_up_to_the_limit_are_read_and_nothing_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let error = |path: &Path| read_regular(path, 10).unwrap_err().to_string();
        std::fs::write(&path, "0123456789").unwrap();
        assert_eq!(read_regular_text(&path, 10).unwrap(), "0123456789");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(read_regular(&link, 10).unwrap(), b"0123456789");
        std::fs::write(&path, vec![b'x'; 2049]).unwrap();
        let too_large = read_regular(&path, 2048).unwrap_err().to_string();
        assert_eq!(too_large, "it is larger than 2 KiB");
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRUSR).unwrap();
        assert_eq!(error(&fifo), "it is not a regular file");
        assert_eq!(error(Path::new("/dev/zero")), "it is not a regular file");
        assert!(error(folder.path()).starts_with("Is a directory"));
        std::fs::write(&path, [0xff]).unwrap();
        let text = read_regular_text(&path, 10).unwrap_err().to_string();
        assert_eq!(text, "it is not UTF-8");
    }
}
