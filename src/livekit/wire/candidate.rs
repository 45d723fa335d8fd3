//! ICE candidates in the server's messages: the line of a trickled one, and the address that a candidate names.

use livekit_protocol::TrickleRequest;
use str0m::Candidate;
use str0m::net::Protocol;

/// The candidate's line of a `Trickle` message, whose JSON is a browser's `RTCIceCandidateInit`; `None` if it has none.
pub(crate) fn candidate_line(trickle: &TrickleRequest) -> Option<String> {
    let init: serde_json::Value = serde_json::from_str(&trickle.candidate_init).ok()?;
    init["candidate"].as_str().map(str::to_owned)
}

/// The address at which a candidate receives media: `UDP 192.0.2.1:7882`.
pub(crate) fn media_address(candidate: &Candidate) -> String {
    let protocol = match candidate.proto() {
        Protocol::Udp => "UDP",
        _ => "TCP",
    };
    format!("{protocol} {}", candidate.addr())
}
