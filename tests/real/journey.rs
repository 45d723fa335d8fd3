//! The milestones that a probe passed, in the order of time: the same on both stacks, but for what nothing orders.

use crate::canary::Probe;

/// Pairs that come in either order, on either stack, and why.
///
/// With explicit dispatch `DispatchSent` lies between the canary's own way in and the agent's, and its order to both is held.
const FREE: &[(&str, &[&str])] = &[
    // Signalling acknowledges the track, while ICE and DTLS go their own way.
    ("EchoPublished", &["MediaConnected"]),
    // An agent can be there before the call that sent it has its answer.
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
    // An attribute of the participant, beside a track that is negotiated and the packets on it.
    (
        "AgentListening",
        &["AgentTrackSubscribed", "AgentFirstAudio", "AgentSpoke"],
    ),
    // Where the room, the token or nobody names the agent, it and the canary set out together. Media is connected when
    // both transports are, and the agent is heard over one of them.
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
        "EchoPublished",
        &[
            "AgentJoined",
            "AgentListening",
            "AgentTrackSubscribed",
            "AgentFirstAudio",
            "AgentSpoke",
        ],
    ),
];

/// Only an agent with a session tells its state, and agent.py starts none where it is to be silent.
const OPTIONAL: &str = "AgentListening";

pub struct Journey {
    /// Cut off by a signal, anywhere.
    aborted: bool,
    /// Seconds since the probe's start.
    marks: Vec<(String, f64)>,
}

impl Journey {
    pub fn of(probe: &Probe) -> Self {
        let marks = probe.milestones.iter();
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

    /// Milestones that it has and `other` lacks.
    fn beside<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a str> {
        let names = self.marks.iter().map(|(name, _)| name.as_str());
        names.filter(|name| *name != OPTIONAL && other.at(name).is_none())
    }

    /// As text, in the order of time.
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

/// What differs between the rooms of a scenario on the two stacks.
pub fn differences(one: &[Journey], other: &[Journey]) -> Vec<String> {
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

fn difference(one: &Journey, other: &Journey) -> Option<String> {
    if !one.aborted && !other.aborted {
        let alone = one.beside(other).chain(other.beside(one)).next();
        if let Some(alone) = alone {
            return Some(format!("{alone} on one stack only"));
        }
    }
    for (first, _) in &one.marks {
        for (second, _) in &one.marks {
            let before = |journey: &Journey| Some(journey.at(first)? < journey.at(second)?);
            let after = |journey: &Journey| Some(journey.at(first)? > journey.at(second)?);
            let reversed = before(one) == Some(true) && after(other) == Some(true);
            if reversed && !is_free(first, second) {
                return Some(format!("{first} and {second} change places"));
            }
        }
    }
    None
}

fn is_free(one: &str, other: &str) -> bool {
    FREE.iter().any(|(name, beside)| {
        (*name == one && beside.contains(&other)) || (*name == other && beside.contains(&one))
    })
}
