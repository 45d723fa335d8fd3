//! One room: what happened when, who spoke, what the agent claims, and the evidence.

use chrono::{DateTime, Utc};
use maud::{Markup, html};

use super::docs::Advice;
use super::document::{ProbeDocument, TurnDocument, WaveformDocument};
use super::figure::{self, Bar, Mark, Row, Wave};
use super::layout::{Moment, Page, seconds};

pub(super) fn render(probe: &ProbeDocument, now: DateTime<Utc>) -> String {
    let target = probe.target.as_deref().unwrap_or("the target");
    let verdict = match &probe.reason {
        Some(reason) => format!("{target}: room failed: {reason}"),
        None => format!("{target}: room {}", probe.outcome),
    };
    let content = html! {
        @if let Some(detail) = &probe.detail { p { (detail) } }
        @if let Some(reason) = &probe.reason { @if let Some(advice) = Advice::of(reason) { (advice.render(reason, "../")) } }
        dl {
            dt { "Room" } dd { code { (probe.room) } }
            @if let Some(target) = &probe.target { dt { "Target" } dd { a href={ "../targets/" (target) } { (target) } } }
            @if let Some(batch) = &probe.batch_id {
                dt { "Batch" } dd { a href={ "../batches/" (batch) } { (batch) } ", " (probe.position) " room" }
            }
            dt { "Opened" } dd { (Moment { at: probe.started_at, now }) }
            @if let Some(origin) = &probe.origin { dt { "Fault of" } dd { (origin) } }
            @if let Some(limit) = &probe.limit { dt { "Limit" } dd { (limit) } }
            dt { "Delays" } dd {
                "join " (seconds(probe.join_delay_seconds)) ", first speech " (seconds(probe.first_speech_delay_seconds))
                ", reply " (seconds(probe.reply_delay_seconds))
            }
            @if let Some(agent) = &probe.agent {
                dt { "Agent" } dd { bdi { (agent.identity) } @if let Some(name) = &agent.name { " (" bdi { (name) } ")" } }
            }
            @for (name, value) in &probe.circumstances {
                @if let Some(value) = value { dt { (label(name)) } dd { (value) } }
            }
            (media(probe))
            dt { "Audio received" } dd {
                (probe.audio.packets) " packets, " (probe.audio.lost) " lost, jitter " (seconds(probe.audio.jitter_seconds))
            }
            @if let Some(url) = &probe.url { dt { "LiveKit Cloud" } dd { a href=(url) rel="noreferrer" { "session" } } }
        }
        h2 { "What happened" }
        (figure::rows("Milestones, and who spoke when.", &lanes(probe)))
        (milestones(probe))
        (recording(probe))
        @if !probe.turns.is_empty() { h2 { "Turns" } (turns(&probe.turns)) (stages(&probe.turns)) }
        @if let Some(lines) = &probe.transcript {
            h2 { "Transcript" }
            @if lines.is_empty() { p { "Nothing was transcribed." } }
            ol .transcript { @for line in lines { li {
                b { (line.speaker) } " " small { (seconds(line.at)) } " " (line.text)
                @if !line.r#final { small { " (interrupted)" } }
            } } }
        }
        h2 { "Evidence" }
        details { summary { "What the canary and LiveKit said" } pre { (serde_json::to_string_pretty(&probe.evidence).unwrap_or_default()) } }
        p { "The " a href={ "../api/v1/probes/" (probe.room) } { "JSON" } " has the same." }
    };
    let page = Page {
        root: "../",
        verdict: &verdict,
        tone: probe.tone(),
        live: false,
        content,
    };
    page.render()
}

fn lanes(probe: &ProbeDocument) -> [Row<'_>; 3] {
    let spoke = |class: &'static str, who: &str, from: Option<f64>, to: Option<f64>| {
        let (from, to) = (from?, to?);
        let label = format!("{who} speaks from {from:.3} s to {to:.3} s");
        (to > from).then_some(Bar {
            from,
            to,
            class,
            label,
        })
    };
    let agent = probe.turns.iter().flat_map(|turn| {
        [
            spoke(
                "agent turn",
                "the agent",
                turn.agent_started,
                turn.agent_ended,
            ),
            spoke("agent turn", "the agent", turn.replied, turn.reply_ended),
        ]
    });
    let caller = probe.turns.iter();
    let caller = caller.filter_map(|turn| {
        spoke(
            "caller turn",
            "the caller",
            turn.caller_started,
            turn.caller_ended,
        )
    });
    let marks = probe.reached().into_iter().map(|(name, at)| Mark {
        at,
        class: "milestone",
        label: format!("{name} {at:.3} s"),
    });
    let said = |speaker: &str| {
        let lines = probe
            .transcript
            .iter()
            .flatten()
            .filter(|line| line.speaker == speaker);
        let marks = lines.filter_map(|line| {
            Some(Mark {
                at: line.at?,
                class: "said",
                label: line.text.clone(),
            })
        });
        marks.collect::<Vec<_>>()
    };
    let wave = |class, levels: fn(&WaveformDocument) -> &Option<Vec<u8>>| {
        let waveform = probe.waveform.as_ref()?;
        Some(Wave {
            from: waveform.started,
            step: waveform.step_seconds,
            levels: levels(waveform).as_ref()?,
            class,
        })
    };
    [
        Row {
            name: html! { "milestones" },
            marks: marks.collect(),
            ..Row::default()
        },
        Row {
            name: html! { "agent" },
            bars: agent.flatten().collect(),
            wave: wave("agent", |it| &it.agent),
            marks: said("agent"),
        },
        Row {
            name: html! { "caller" },
            bars: caller.collect(),
            wave: wave("caller", |it| &it.caller),
            marks: said("caller"),
        },
    ]
}

/// How each of the canary's two peer connections reached LiveKit.
fn media(probe: &ProbeDocument) -> Markup {
    let connections = probe.evidence["media"].as_array();
    html! {
        @for one in connections.into_iter().flatten() {
            dt { "Media, " (one["connection"].as_str().unwrap_or_default()) } dd {
                (one["path"].as_str().unwrap_or_default())
                @if let Some(via) = one["via"].as_str() { " via " bdi { (via) } }
                ", round trip " (seconds(one["round_trip_seconds"].as_f64()))
            }
        }
    }
}

/// `media_path` as `Media path`.
fn label(key: &str) -> String {
    let words = key.replace('_', " ");
    let (first, rest) = words.split_at(words.chars().next().map_or(0, char::len_utf8));
    first.to_uppercase() + rest
}

/// The files of the call. Both begin at the same moment.
fn recording(probe: &ProbeDocument) -> Markup {
    let Some(recording) = &probe.recording else {
        return html! {};
    };
    let sides = [("agent", &recording.agent), ("caller", &recording.caller)];
    html! {
        h2 { "Recording" }
        @for (side, file) in sides { @if let Some(file) = file {
            @let path = format!("../api/v1/probes/{}/audio/{side}.ogg", probe.room);
            p {
                label { (side) " " audio controls preload="none" src=(path) {} }
                " " a href=(path) download { "download" } small { (seconds(Some(file.seconds))) ", " (file.bytes / 1000) " kB" }
            }
        } }
        p { small { "Both begin " (seconds(Some(recording.started))) " after the start of the probe." } }
    }
}

/// The delay that the canary measured, and the parts of it that the agent claims. They overlap, so they are never summed.
fn stages(turns: &[TurnDocument]) -> Markup {
    let row = |name: String, class, delay: Option<f64>| {
        delay.map(|to| Row {
            name: html! { (name) },
            bars: vec![Bar {
                from: 0.0,
                to,
                class,
                label: format!("{name} {to:.3} s"),
            }],
            ..Row::default()
        })
    };
    let claimed = turns
        .iter()
        .enumerate()
        .filter(|(_, turn)| turn.stages.values().any(Option::is_some));
    let rows: Vec<_> = claimed
        .flat_map(|(index, turn)| {
            let measured = row(
                format!("turn {}: measured", index + 1),
                "join",
                turn.reply_delay_seconds,
            );
            let stages = turn.stages.iter();
            let stages = stages.map(|(stage, delay)| row(stage.replace('_', " "), "agent", *delay));
            std::iter::once(measured).chain(stages).flatten()
        })
        .collect();
    if rows.is_empty() {
        return html! {};
    }
    figure::rows(
        "The reply: what the canary measured, and what the agent claims of its stages. Stages overlap.",
        &rows,
    )
}

fn milestones(probe: &ProbeDocument) -> Markup {
    html! {
        details { summary { "Milestones in figures" } div .scroll { table {
            thead { tr { th { "Milestone" } th { "Since the start" } } }
            tbody { @for (name, at) in probe.reached() {
                tr { th scope="row" { (name) } td { (seconds(Some(at))) } }
            } }
        } } }
    }
}

fn turns(turns: &[TurnDocument]) -> Markup {
    html! {
        div .scroll { table {
            thead { tr {
                th { "Turn" } th { "Result" } th { "Reply" } th { "The agent claims" } th { "Unexplained" } th { "Yields" }
                th { "Word error" }
            } }
            tbody { @for (index, turn) in turns.iter().enumerate() { tr {
                th scope="row" { (index + 1) }
                td { (turn.result) }
                td { (seconds(turn.reply_delay_seconds)) }
                td {
                    (seconds(turn.agent_claim_seconds))
                    @for (stage, delay) in &turn.stages {
                        @if delay.is_some() && stage != "end_to_end" { small { (stage.replace('_', " ")) " " (seconds(*delay)) } }
                    }
                }
                td { (seconds(turn.unexplained_seconds)) }
                td { (seconds(turn.yield_delay_seconds)) }
                td { @match turn.word_error { None => "-", Some(error) => (format!("{:.0} %", error * 100.0)) } }
            } } }
        } }
    }
}
