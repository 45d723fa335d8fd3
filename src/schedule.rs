//! When a target's batches start: [`calendar`] computes the ticks of a schedule, and [`Ticker`] delivers them in time.
//!
//! It does not know what a tick starts, or whether its target is still busy.

mod calendar;
mod ticker;
mod wall_clock;

pub(crate) use calendar::{AHEAD, gaps, mean_interval, next_tick, offset, ticks_on};
pub(crate) use ticker::{Tick, Ticker};
pub(crate) use wall_clock::Gaps;
