//! The time of this machine's processors, for which the cases on the real stack compete.

use std::sync::Mutex;
use std::thread::{available_parallelism, sleep};
use std::time::Duration;

use anyhow::Context as _;
use procfs::{CurrentSI as _, KernelStats};

/// The share of the processors' time that must be unused before another case starts. A case needs about a fifth of one.
const MIN_IDLE: f64 = 0.25;
/// Over how long the share is measured. A case that has just started shows its need within this time.
const INTERVAL: Duration = Duration::from_secs(1);
/// After this many intervals a case starts anyway, because something else keeps the machine busy.
const PATIENCE: usize = 15;

/// Lets one case after the other start, each once the processors have time for it. Otherwise the audio of a call arrives late on
/// a slow machine: the jitter buffers of agents grow, and they hear only parts of what the caller says.
#[derive(Default)]
pub(crate) struct Machine(Mutex<()>);

impl Machine {
    pub(crate) fn wait(&self) -> anyhow::Result<()> {
        let _turn = self.0.lock().ok().context("a case panicked here")?;
        for _ in 0..PATIENCE {
            if idle()? >= MIN_IDLE {
                break;
            }
        }
        Ok(())
    }
}

/// The share of the processors' time that the next [`INTERVAL`] leaves unused, 0 to 1.
fn idle() -> anyhow::Result<f64> {
    let before = idle_time()?;
    sleep(INTERVAL);
    let unused = idle_time()?.saturating_sub(before);
    let processors = u32::try_from(available_parallelism()?.get())?;
    Ok(unused.div_duration_f64(INTERVAL * processors))
}

/// How long the processors have been idle since the machine started, all together.
fn idle_time() -> anyhow::Result<Duration> {
    let statistics = KernelStats::current().context("/proc/stat")?;
    Ok(statistics.total.idle_duration())
}
