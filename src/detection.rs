//! Outages of targets: the state of each target, its incidents, and what differs between its failed and its good rooms.

mod difference;
mod incident;
#[cfg(test)]
mod simulation;
mod state;
