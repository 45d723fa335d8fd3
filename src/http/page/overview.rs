//! The first page: is it bad, since when, what fails, and whether LiveKit or one agent is to blame.

use std::fmt::Write as _;

use chrono::{DateTime, Datelike as _, NaiveTime, Utc};
use maud::{Markup, html};

use super::document::IncidentDocument;
use super::layout::{Moment, Page, Tone};
use super::past::{Past, batch_table, delays, no_history, reasons, results_of};
use crate::http::status::{BudgetStatus, DaemonStage, ProjectStatus, Status, TargetStatus};
use crate::report::counted;

pub(super) struct Overview<'a> {
    pub(super) status: &'a Status,
    /// With the open incidents; `None` if the history can't be read.
    pub(super) past: Option<Past>,
    pub(super) now: DateTime<Utc>,
}

impl Overview<'_> {
    pub(super) fn render(&self) -> String {
        let (verdict, tone) = verdict(self.status, self.incidents(), self.now);
        let page = Page {
            root: "./",
            verdict: &verdict,
            tone,
            live: true,
            content: self.content(),
        };
        page.render()
    }

    fn incidents(&self) -> &[IncidentDocument] {
        self.past.as_ref().map_or(&[], |past| &past.incidents)
    }

    fn content(&self) -> Markup {
        let &Self { status, now, .. } = self;
        let incidents = self.incidents();
        html! {
            @for line in scope(status) { p { (line) } }
            @if let Some(error) = status.last_reload.as_ref().and_then(|reload| reload.error.as_ref()) {
                p .bad { "The last reload was refused; the settings before it are in force." }
                pre { (error) }
            }
            @if !incidents.is_empty() {
                h2 { "Open incidents" }
                ul {
                    @for incident in incidents {
                        li { a href={ "incidents/" (incident.id) } { (incident.headline(now)) } }
                    }
                }
            }
            h2 { "Targets" }
            div .scroll { table {
                thead { tr { th { "Target" } th { "State" } th { "Last batch" } th { "Next batch" } } }
                tbody { @for target in &status.targets { (target_row(target, now)) } }
            } }
            (self.past())
            h2 { "Projects" }
            div .scroll { table {
                thead { tr { th { "Project" } th { "Rooms" } th { "Agent time" } } }
                tbody { @for project in &status.projects { (project_row(project, now)) } }
            } }
            footer { p {
                "Version " (status.version) ", " (stage(status.stage)) ", up since "
                (Moment { at: status.started_at, now }) ". API: "
                a href="api/v1/targets" { "targets" } ", " a href="api/v1/batches" { "batches" } ", "
                a href="api/v1/incidents" { "incidents" } "."
            } }
        }
    }

    fn past(&self) -> Markup {
        let Some(past) = &self.past else {
            return no_history();
        };
        html! {
            h2 { "Scheduled rooms" }
            @for target in &self.status.targets {
                (results_of(&target.name, past, "targets/"))
                @if let Some(statistics) = past.statistics_of(&target.name) {
                    details {
                        summary { "Delays and failures of " (target.name) }
                        (delays(statistics, &target.objectives))
                        (reasons(statistics, &target.name, "./"))
                    }
                }
            }
            h2 { "Last batches" }
            (batch_table(&past.batches, "./", self.now))
        }
    }
}

fn stage(stage: DaemonStage) -> &'static str {
    match stage {
        DaemonStage::Starting => "starting",
        DaemonStage::Running => "running",
        DaemonStage::Draining => "draining: no new batch starts",
    }
}

/// The worst that is known.
fn verdict(status: &Status, incidents: &[IncidentDocument], now: DateTime<Utc>) -> (String, Tone) {
    if let [first, rest @ ..] = incidents {
        let more = match rest.len() as u64 {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        return (first.headline(now) + &more, Tone::Bad);
    }
    let names = |state: &str| {
        let targets = status.targets.iter().filter(|target| target.state == state);
        targets
            .map(|target| target.name.as_str())
            .collect::<Vec<_>>()
    };
    match (&names("failing")[..], &names("suspect")[..]) {
        (failing @ [_, ..], _) => (format!("{} FAILS", failing.join(", ")), Tone::Bad),
        ([], suspect @ [_, ..]) => {
            let text = format!(
                "{}: a room failed, and more rooms are to confirm it",
                suspect.join(", ")
            );
            (text, Tone::Warning)
        }
        ([], []) => calm_verdict(status),
    }
}

/// The verdict while nothing fails. What keeps batches from starting comes before a state that is old.
fn calm_verdict(status: &Status) -> (String, Tone) {
    if status.targets.is_empty() {
        return ("no targets".to_owned(), Tone::Neutral);
    }
    let held = |target: &&TargetStatus| target.obstacle().is_some();
    let obstacles = status.targets.iter().filter(held).map(|target| {
        let obstacle = target.obstacle().unwrap_or_default();
        format!("{}: {obstacle}", target.name)
    });
    let mut parts: Vec<_> = obstacles.collect();
    for state in ["never ran", "unknown"] {
        let in_state = |target: &&TargetStatus| !held(target) && target.shown_state() == state;
        let targets = status.targets.iter().filter(in_state);
        let names: Vec<_> = targets.map(|target| target.name.as_str()).collect();
        if !names.is_empty() {
            parts.push(format!("{state}: {}", names.join(", ")));
        }
    }
    if parts.is_empty() {
        let targets = counted(status.targets.len() as u64, "target");
        return (format!("healthy: {targets}"), Tone::Good);
    }
    let is_held_back = status
        .targets
        .iter()
        .any(|target| !target.paused && target.held_back.is_some());
    let tone = if is_held_back {
        Tone::Warning
    } else {
        Tone::Neutral
    };
    (parts.join("; "), tone)
}

impl TargetStatus {
    /// The state; `never ran` before the first batch.
    pub(super) fn shown_state(&self) -> &'static str {
        match (self.state, &self.last_batch) {
            ("unknown", None) => "never ran",
            (state, _) => state,
        }
    }

    /// Why no batch of the schedule starts.
    pub(super) fn obstacle(&self) -> Option<String> {
        match &self.held_back {
            _ if self.paused => Some("paused".to_owned()),
            Some(why) => Some(format!("no batch can start: {why}")),
            None => None,
        }
    }
}

/// For each project with a failing target: whether its other targets fail, too.
fn scope(status: &Status) -> Vec<String> {
    let lines = status.projects.iter().filter_map(|project| {
        let targets: Vec<_> = status
            .targets
            .iter()
            .filter(|target| target.project == project.name)
            .collect();
        let with = |state: &str| {
            let targets = targets.iter().filter(|target| target.state == state);
            targets
                .map(|target| target.name.as_str())
                .collect::<Vec<_>>()
        };
        let (failing, healthy) = (with("failing"), with("healthy"));
        if failing.is_empty() || targets.len() == 1 {
            return None;
        }
        Some(match &healthy[..] {
            [] if failing.len() == targets.len() => {
                format!("All targets of {} fail.", project.name)
            }
            [] => format!(
                "No other target of {} is known to be healthy.",
                project.name
            ),
            [one] => {
                format!("{one} on the same project is healthy, so it is not LiveKit as a whole.")
            }
            more => format!(
                "{} on the same project are healthy, so it is not LiveKit as a whole.",
                more.join(", ")
            ),
        })
    });
    lines.collect()
}

fn target_row(target: &TargetStatus, now: DateTime<Utc>) -> Markup {
    let activity = match (&target.running, &target.confirming, target.paused) {
        (Some(_), _, _) => "running",
        (None, Some(_), _) => "confirming",
        (None, None, true) => "paused",
        (None, None, false) => "waiting",
    };
    html! {
        tr {
            th scope="row" {
                a href={ "targets/" (target.name) } { (target.name) }
                small { bdi { (target.agent_name.as_deref().unwrap_or("any agent")) } " on " bdi { (target.project) } }
            }
            td {
                span .(Tone::of_state(target.state).class()) { (target.shown_state()) }
                @if let Some(incident) = &target.incident { ": " a href={ "incidents/" (incident) } { "incident" } }
                small { "since " (Moment { at: target.state_since, now }) "; " (activity) }
                @if let Some(why) = &target.held_back { small .bad { (why) } }
            }
            td {
                @match &target.last_batch {
                    None => "none yet",
                    Some(batch) => {
                        a .(Tone::of_result(&batch.result).class()) href={ "batches/" (batch.batch_id) } { (batch.result) }
                        ": " (batch.ok) " ok, " (batch.failed) " failed"
                        @if batch.aborted > 0 { ", " (batch.aborted) " aborted" }
                        small { (Moment { at: batch.ended_at, now }) }
                    }
                }
            }
            td {
                @match target.next_batch_at {
                    _ if target.paused => "paused",
                    None => "none",
                    Some(at) => (Moment { at, now }),
                }
                small { (target.schedule) }
            }
        }
    }
}

fn project_row(project: &ProjectStatus, now: DateTime<Utc>) -> Markup {
    html! {
        tr {
            th scope="row" { (project.name) small { (project.url) } }
            td {
                (project.rooms_in_flight) " of " (project.max_rooms)
                @if let Some(at) = project.backoff_until { small .bad { "backing off until " (Moment { at, now }) } }
            }
            td { @for budget in &project.budgets { div { (budget_line(budget, now)) } } }
        }
    }
}

/// `this day: 12 of 600 min used, 3 reserved; about 40 at its end`.
fn budget_line(budget: &BudgetStatus, now: DateTime<Utc>) -> String {
    let minutes = |seconds: u64| seconds.div_ceil(60);
    let mut line = format!("this {}: {}", budget.period, minutes(budget.used_seconds));
    if let Some(limit) = budget.limit_seconds {
        write!(line, " of {}", limit / 60).expect("a string takes every text");
    }
    line += " min used";
    if budget.reserved_seconds > 0 {
        write!(line, ", {} reserved", minutes(budget.reserved_seconds))
            .expect("a string takes every text");
    }
    if let Some(forecast) = forecast(budget, now) {
        write!(line, "; at this rate {} at its end", minutes(forecast))
            .expect("a string takes every text");
        if budget.limit_seconds.is_some_and(|limit| forecast > limit) {
            line += ": the budget will be spent before";
        }
    }
    line
}

/// What the period will have used if it goes on as it began. The first tenth of a period says too little.
fn forecast(budget: &BudgetStatus, now: DateTime<Utc>) -> Option<u64> {
    let today = now.date_naive();
    let (first, days) = match budget.period {
        "day" => (today, 1),
        _ => (today.with_day(1)?, today.num_days_in_month()),
    };
    let elapsed = (now - first.and_time(NaiveTime::MIN).and_utc()).as_seconds_f64();
    let share = elapsed / (f64::from(days) * 86_400.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "seconds of a month"
    )]
    (share >= 0.1).then(|| (budget.used_seconds as f64 / share) as u64)
}
