//! Turns the messages between the server and the SDK into room events and into the end of the participant. A state
//! machine without I/O.
//!
//! The SDK reconnects and resumes by itself, which would hide failures. For a canary, the first lost connection is the
//! end.

use std::time::Duration;

use livekit_protocol as proto;
use proto::signal_response::Message as Response;
use str0m::Candidate;
use tokio::time::Instant;

use super::transport::WireEvent;
use crate::livekit::event::{EndReason, RoomEventKind};
use crate::livekit::room::observer::Observer;
use crate::livekit::wire::candidate::{candidate_line, media_address};
use crate::livekit::wire::signal::{self, Pings, SignalError, leave_reason};

/// How long the SDK waits for a join response once its socket is open (a constant in `livekit-signaling`).
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of one participant's signal connection.
pub(crate) struct SignalWatch {
    pub(crate) observer: Observer,
    pings: Pings,
    requested: bool,
    joined: bool,
    last_received_at: Instant,
    ping_timeout: Duration,
    /// Why the last attempt to connect failed.
    failed: Option<SignalError>,
}

impl SignalWatch {
    pub(crate) fn new(now: Instant, observer: Observer) -> Self {
        Self {
            observer,
            pings: Pings::default(),
            requested: false,
            joined: false,
            last_received_at: now,
            ping_timeout: Duration::from_secs(15),
            failed: None,
        }
    }

    pub(crate) fn joined(&self) -> bool {
        self.joined
    }

    /// Handles one event; returns its time if participants or tracks of the room may have changed.
    ///
    /// # Errors
    /// The participant has ended.
    pub(crate) fn on_wire_event(&mut self, event: WireEvent) -> Result<Option<Instant>, EndReason> {
        match event {
            // The SDK requests a second path if the server does not know the first one.
            WireEvent::Requested(at) => {
                if !std::mem::replace(&mut self.requested, true) {
                    self.observer
                        .events
                        .send(at, RoomEventKind::SignalRequested)?;
                }
            }
            WireEvent::Pinged(at, timestamp) => self.pings.on_ping(timestamp, at),
            WireEvent::Lost(error) => self.on_lost(error)?,
            WireEvent::Message(at, message) => return self.on_message(at, *message),
        }
        Ok(None)
    }

    /// Treats this agent without a name as the target's.
    pub(crate) fn adopt(&mut self, at: Instant, identity: &str) -> Result<(), EndReason> {
        self.observer.adopt(at, identity, self.pings.clock())
    }

    fn on_message(&mut self, at: Instant, message: Response) -> Result<Option<Instant>, EndReason> {
        self.last_received_at = at;
        self.observer.on_addresses(at, addresses(&message))?;
        let (participants, in_join_response) = match message {
            Response::Join(response) => {
                self.joined = true;
                (_, self.ping_timeout) = signal::keep_alive(&response);
                self.observer.on_join(at, &response)?;
                (response.other_participants, true)
            }
            // An update can come before the join response. What it shows was there before the canary.
            Response::Update(update) => (update.participants, !self.joined),
            Response::Leave(leave) if !self.joined => {
                let reason = leave_reason(&leave);
                return Err(EndReason::Signal(SignalError::LeftBeforeJoin { reason }));
            }
            Response::PongResp(pong) => {
                self.pings.on_pong(at, &pong);
                return Ok(None);
            }
            other => return self.observer.on_message(at, other).map(|()| None),
        };
        let clock = self.pings.clock();
        self.observer
            .on_participants(at, participants, in_join_response, clock)?;
        Ok(Some(at))
    }

    /// A connection failed or closed. Before the join, the SDK may try another path of the server. After the join, the
    /// participant has ended.
    fn on_lost(&mut self, error: SignalError) -> Result<(), EndReason> {
        if self.joined {
            return Err(EndReason::Signal(error));
        }
        self.failed = Some(error);
        Ok(())
    }

    /// The reason why the SDK did not connect. `detail`: the SDK's own text.
    pub(crate) fn not_connected(&mut self, detail: String) -> EndReason {
        match self.failed.take() {
            _ if self.joined => media_failed(detail),
            Some(error) => EndReason::Signal(error),
            None => EndReason::Signal(SignalError::JoinTimeout(JOIN_TIMEOUT)),
        }
    }

    /// The reason why the SDK reconnects or reports a disconnect while the socket seemed to be alive.
    pub(crate) fn reconnecting(&self, now: Instant) -> EndReason {
        if now.saturating_duration_since(self.last_received_at) >= self.ping_timeout {
            return EndReason::Signal(SignalError::PingTimeout(self.ping_timeout));
        }
        media_failed("the SDK started to reconnect".to_owned())
    }
}

/// Returns the server's media addresses from the candidates of a message.
fn addresses(message: &Response) -> Vec<String> {
    let read = |line: &str| {
        let candidate = Candidate::from_sdp_string(line.trim()).ok()?;
        Some(media_address(&candidate))
    };
    match message {
        Response::Answer(description) | Response::Offer(description) => {
            let lines = description.sdp.lines();
            let candidates = lines.filter_map(|line| line.strip_prefix("a="));
            candidates.filter_map(read).collect()
        }
        Response::Trickle(trickle) => {
            let line = candidate_line(trickle);
            line.iter().filter_map(|line| read(line)).collect()
        }
        _ => Vec::new(),
    }
}

fn media_failed(detail: String) -> EndReason {
    EndReason::MediaFailed {
        transport: "SDK's",
        detail,
    }
}

#[cfg(test)]
mod tests;
