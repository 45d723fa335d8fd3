//! The milestones of a probe in the order of time. The order is the same on both stacks, except for milestones that nothing
//! orders.

use support::report::Probe;

/// Milestones that may have either order on either stack, and why.
///
/// With explicit dispatch, `DispatchSent` is after the canary's own milestones and before the agent's. That order is checked.
const FREE: &[(&str, &[&str])] = &[
    // The signal connection acknowledges the track, independently of ICE and DTLS.
    ("CallerPublished", &["MediaConnected"]),
    // An agent can join before the response to its dispatch arrives.
    (
        "DispatchAccepted",
        &[
            "AgentJoined",
            "AgentListening",
            "AgentTrackSubscribed",
            "AgentFirstAudio",
            "AgentSpoke",
        ],
    ),
    // An attribute of the participant, independent of the track and of the packets on it.
    (
        "AgentListening",
        &["AgentTrackSubscribed", "AgentFirstAudio", "AgentSpoke"],
    ),
    // Without explicit dispatch, the agent and the canary connect at the same time. Media counts as connected when both
    // transports are, and the agent's audio needs only one of them.
    ("SignalConnected", &["AgentJoined", "AgentListening"]),
    (
        "MediaConnected",
        &[
            "AgentJoined",
            "AgentListening",
            "AgentTrackSubscribed",
            "AgentFirstAudio",
            "AgentSpoke",
        ],
    ),
    (
        "CallerPublished",
        &[
            "AgentJoined",
            "AgentListening",
            "AgentTrackSubscribed",
            "AgentFirstAudio",
            "AgentSpoke",
        ],
    ),
];

/// Only an agent with a session reports its state. For a silent agent, `agent.py` starts no session.
const OPTIONAL: &str = "AgentListening";

pub(crate) struct Timeline {
    /// A signal ended the probe, at any milestone.
    aborted: bool,
    /// The milestones with their seconds since the start of the probe.
    marks: Vec<(String, f64)>,
}

impl Timeline {
    pub(crate) fn new(probe: &Probe) -> Self {
        // If the agent or another client deletes the room, LiveKit informs the participants in any order: the canary leaves by
        // itself only if it sees the agent leave first.
        let mut notes = probe.evidence.notes.iter();
        let ended_by_agent = notes.any(|note| note.starts_with("the call ended ("));
        let deleted_by_another = ended_by_agent || probe.outcome == "removed";
        let marks = probe.milestones.iter();
        let marks = marks.filter(|(name, _)| !(deleted_by_another && *name == "Left"));
        Self {
            aborted: probe.outcome == "aborted",
            marks: marks
                .filter_map(|(name, at)| Some((name.clone(), (*at)?)))
                .collect(),
        }
    }

    fn at(&self, milestone: &str) -> Option<f64> {
        let mut marks = self.marks.iter();
        marks.find(|(name, _)| name == milestone).map(|(_, at)| *at)
    }

    /// The milestones that `other` lacks.
    fn missing_in<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a str> {
        let names = self.marks.iter().map(|(name, _)| name.as_str());
        names.filter(|name| *name != OPTIONAL && other.at(name).is_none())
    }

    /// The milestones as text, in the order of time.
    fn text(&self) -> String {
        let mut marks: Vec<_> = self.marks.iter().collect();
        marks.sort_by(|(_, one), (_, other)| one.total_cmp(other));
        let marks: Vec<_> = marks
            .iter()
            .map(|(name, at)| format!("{name} {at:.3}"))
            .collect();
        marks.join(", ")
    }
}

/// The differences between the rooms of a scenario on two stacks.
pub(crate) fn differences(one: &[Timeline], other: &[Timeline]) -> Vec<String> {
    if one.len() != other.len() {
        return vec![format!("{} rooms and {}", one.len(), other.len())];
    }
    let pairs = one.iter().zip(other).enumerate();
    pairs
        .filter_map(|(room, (one, other))| {
            let what = difference(one, other)?;
            Some(format!(
                "room {}: {what}\n  {}\n  {}",
                room + 1,
                one.text(),
                other.text()
            ))
        })
        .collect()
}

fn difference(one: &Timeline, other: &Timeline) -> Option<String> {
    if !one.aborted && !other.aborted {
        let alone = one.missing_in(other).chain(other.missing_in(one)).next();
        if let Some(alone) = alone {
            return Some(format!("{alone} is on one stack only"));
        }
    }
    for (first, _) in &one.marks {
        for (second, _) in &one.marks {
            let before = |timeline: &Timeline| Some(timeline.at(first)? < timeline.at(second)?);
            let after = |timeline: &Timeline| Some(timeline.at(first)? > timeline.at(second)?);
            let reversed = before(one) == Some(true) && after(other) == Some(true);
            if reversed && !is_free(first, second) {
                return Some(format!("{first} and {second} have another order"));
            }
        }
    }
    None
}

fn is_free(one: &str, other: &str) -> bool {
    FREE.iter().any(|(name, others)| {
        (*name == one && others.contains(&other)) || (*name == other && others.contains(&one))
    })
}
