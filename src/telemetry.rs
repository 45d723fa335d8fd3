//! Logging: which events are written, in which format, and where they go.
//!
//! Only this crate's own events are written, whatever `RUST_LOG` asks for: at their finer levels the WebSocket and WebRTC
//! libraries log tokens, ICE passwords and SDPs.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Layer, Registry};

/// Lines of the daemon's log that may wait for their reader; a few MB. Further ones are dropped and counted.
const MAX_QUEUED_LINES: usize = 8192;

/// How long the end of the process waits for the last lines to be read.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Sends the log to `writer` as text. `RUST_LOG` replaces `default_level`.
pub(crate) fn log_to<W>(writer: W, colour: bool, default_level: &str)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(OneLinePerEvent(writer))
        .with_ansi(colour);
    install(layer, default_level);
}

/// Sends the daemon's log to stderr: text on a terminal, otherwise one JSON object per line. Hold the returned value until
/// the process ends.
///
/// A thread of its own writes the log, and no other thread waits for it: a pipe that is not read must not stop the probes, the
/// shutdown and the other tasks, which all log.
///
/// # Errors
/// No thread can be started.
pub(crate) fn log_daemon() -> io::Result<LogFlush> {
    let (queue, flush) = LogQueue::start(io::stderr())?;
    DROPPED.get_or_init(|| Arc::clone(&queue.dropped));
    let layer = tracing_subscriber::fmt::layer();
    if io::stderr().is_terminal() {
        let layer = layer.with_writer(OneLinePerEvent(queue));
        install(layer.with_target(false), "info");
    } else {
        install(layer.with_writer(queue).json().flatten_event(true), "info");
    }
    Ok(flush)
}

/// Lines of the daemon's log that were dropped because the lines before them were not read.
pub(crate) fn dropped_lines() -> u64 {
    DROPPED
        .get()
        .map_or(0, |dropped| dropped.load(Ordering::Relaxed))
}

/// A process has one log.
static DROPPED: OnceLock<Arc<AtomicU64>> = OnceLock::new();

fn install<L: Layer<Registry> + Send + Sync>(layer: L, default_level: &str) {
    // An empty variable is an unset one. As a filter it would hide everything but errors.
    let wanted = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let by_level = match EnvFilter::try_new(&wanted) {
        Ok(filter) if !wanted.trim().is_empty() => filter,
        _ => EnvFilter::new(default_level),
    };
    let own = filter_fn(|metadata| metadata.target().starts_with(env!("CARGO_CRATE_NAME")));
    let layer = layer.with_filter(by_level).with_filter(own);
    // Not `init()`: it also receives what other crates log through `log`, one record per packet, only to drop it here.
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer))
        .expect("a process starts logging only once");
}

/// Hands each line to the thread that writes the log, and never waits.
///
/// Not `tracing-appender`: the end of its guard prints to stdout when the queue is full. That hangs if both streams are the
/// pipe that is not read.
#[derive(Clone)]
struct LogQueue {
    lines: SyncSender<LogMessage>,
    dropped: Arc<AtomicU64>,
}

enum LogMessage {
    Line(Vec<u8>),
    /// Everything before this has been written once the sender is gone.
    Flush(#[expect(dead_code, reason = "it is only dropped")] SyncSender<()>),
}

/// Waits for the last lines when it is dropped, at most for [`FLUSH_TIMEOUT`].
#[must_use = "dropping it ends the wait for the last lines"]
pub(crate) struct LogFlush(SyncSender<LogMessage>);

impl LogQueue {
    fn start(output: impl Write + Send + 'static) -> io::Result<(Self, LogFlush)> {
        let (lines, queue) = sync_channel(MAX_QUEUED_LINES);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_log(&queue, output))?;
        let flush = LogFlush(lines.clone());
        let dropped = Arc::default();
        Ok((Self { lines, dropped }, flush))
    }
}

fn write_log(queue: &Receiver<LogMessage>, mut output: impl Write) {
    while let Ok(message) = queue.recv() {
        if let LogMessage::Line(line) = message {
            // A closed stderr must not stop the daemon, and there is no other place to report it.
            drop(output.write_all(&line));
        }
    }
}

impl Write for LogQueue {
    /// Takes one whole event: the formatter writes each at once.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = LogMessage::Line(event.to_owned());
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.lines.try_send(line)
        {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogQueue {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Drop for LogFlush {
    fn drop(&mut self) {
        let (written, wait) = sync_channel(0);
        // A full queue means that the log is not read: then there is nothing to wait for.
        if self.0.try_send(LogMessage::Flush(written)).is_ok() {
            // An error both ways: the writer has dropped its end, or the time is over.
            let _over = wait.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

/// Escapes what would let a text from outside, such as an agent's error, look like a line of the log, or reverse its letters.
struct OneLinePerEvent<W>(W);

impl<'a, W: MakeWriter<'a>> MakeWriter<'a> for OneLinePerEvent<W> {
    type Writer = OneLine<W::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        OneLine(self.0.make_writer())
    }
}

struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    /// Takes one whole event: the formatter writes each at once.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.0.write_all(one_line(event).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn one_line(event: &[u8]) -> String {
    let text = String::from_utf8_lossy(event);
    let (text, end) = match text.strip_suffix('\n') {
        Some(text) => (text, "\n"),
        None => (&*text, ""),
    };
    without_marks(text) + end
}

/// The text on one line, and without marks that change its direction.
pub(crate) fn without_marks(text: &str) -> String {
    let mut line = String::with_capacity(text.len() + 1);
    for char in text.chars() {
        match char {
            '\n' | '\r' => line.extend(char.escape_default()),
            // Line and paragraph separators, and the marks that change the direction of text.
            '\u{85}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{61c}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}' => line.extend(char.escape_unicode()),
            _ => line.push(char),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;

    /// Blocks while the test holds the lock, as a pipe does that is not read.
    #[derive(Clone, Default)]
    struct BlockedPipe(Arc<Mutex<Vec<u8>>>);

    impl BlockedPipe {
        fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl Write for BlockedPipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.lock().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn log_that_is_not_read_blocks_no_thread_and_its_lost_lines_are_counted() {
        let pipe = BlockedPipe::default();
        let (mut log, flush) = LogQueue::start(pipe.clone()).unwrap();
        let blocked = pipe.lock();
        for _ in 0..MAX_QUEUED_LINES + 10 {
            log.write_all(b"line\n").unwrap();
        }
        // The writing thread may have taken one line before it blocked.
        let dropped = log.dropped.load(Ordering::Relaxed);
        assert!((9..=10).contains(&dropped), "{dropped}");
        drop(flush);
        drop(blocked);
    }

    #[test]
    fn end_of_the_process_waits_for_the_last_lines() {
        let pipe = BlockedPipe::default();
        let (mut log, flush) = LogQueue::start(pipe.clone()).unwrap();
        for _ in 0..100 {
            log.write_all(b"line\n").unwrap();
        }
        drop(flush);
        assert_eq!(pipe.lock().len(), 500);
        assert_eq!(log.dropped.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn event_is_one_line_that_reads_from_left_to_right() {
        for (event, line) in [
            ("INFO all well\n", "INFO all well\n"),
            ("a\nERROR forged\r\n", "a\\nERROR forged\\r\n"),
            (
                "a\u{202e}b\u{2066}c\u{2028}\n",
                "a\\u{202e}b\\u{2066}c\\u{2028}\n",
            ),
            ("\u{1b}[31mé€\u{1b}[0m\tx", "\u{1b}[31mé€\u{1b}[0m\tx"),
        ] {
            assert_eq!(one_line(event.as_bytes()), line);
        }
    }
}
