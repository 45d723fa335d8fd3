//! The status page: plain HTML without scripts and without external resources.

use std::fmt::{self, Display, Formatter, Write};

use chrono::{DateTime, TimeDelta, Utc};

use super::status::{DaemonStage, ProjectStatus, Status, TargetStatus};

/// Allows only the inline style. A name that was not escaped could neither load nor run anything.
pub(super) const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; \
                                 frame-ancestors 'none'";

const STYLE: &str = "\
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { margin: 1rem auto; padding: 0 1rem; max-width: 75rem }
div { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8884 }
small { opacity: .75; display: block }
.ok { color: light-dark(#17692f, #6fd58c) }
.bad { color: light-dark(#b3261e, #ff8a80) }";

/// The page as it is at `now`.
pub(super) fn render(status: &Status, now: DateTime<Utc>) -> String {
    let mut page = String::with_capacity(4096);
    write_page(&mut page, status, now).expect("writing to a String cannot fail");
    page
}

fn write_page(page: &mut String, status: &Status, now: DateTime<Utc>) -> fmt::Result {
    write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>livekit-canary</title>\n<style>\n{STYLE}\n</style>\n<h1>livekit-canary</h1>\n\
         <p>Version {}, {}, up since {}. Times are UTC.</p>\n",
        Escaped(status.version),
        match status.stage {
            DaemonStage::Starting => "starting",
            DaemonStage::Running => "running",
            DaemonStage::Draining => "draining: no new batch starts",
        },
        RelativeTime(status.started_at, now),
    )?;
    if let Some(error) = status
        .last_reload
        .as_ref()
        .and_then(|reload| reload.error.as_ref())
    {
        write!(
            page,
            "<p class=\"bad\">The last reload was refused; the settings before it are in force.</p>\n<pre>{}</pre>\n",
            Escaped(error)
        )?;
    }
    page.push_str(
        "<h2>Targets</h2>\n<div><table>\n\
         <tr><th>Target<th>State<th>Last batch<th>Next batch\n",
    );
    for target in &status.targets {
        write_target(page, target, now)?;
    }
    page.push_str(
        "</table></div>\n<h2>Projects</h2>\n<div><table>\n<tr><th>Project<th>Rooms<th>Agent time\n",
    );
    for project in &status.projects {
        write_project(page, project, now)?;
    }
    page.push_str(
        "</table></div>\n<p><a href=\"/metrics\">Metrics</a>, API: <a href=\"/api/v1/targets\">targets</a>, \
         <a href=\"/api/v1/batches\">batches</a>, <a href=\"/api/v1/incidents\">incidents</a></p>\n</html>\n",
    );
    Ok(())
}

fn write_target(page: &mut String, target: &TargetStatus, now: DateTime<Utc>) -> fmt::Result {
    write!(
        page,
        "<tr><td><b>{}</b><small>{} on {}</small><td>",
        Escaped(&target.name),
        Escaped(target.agent_name.as_deref().unwrap_or("any agent")),
        Escaped(&target.project),
    )?;
    let class = match target.state {
        "healthy" => "ok",
        "failing" | "suspect" => "bad",
        _ => "",
    };
    write!(
        page,
        "<span class=\"{class}\">{}</span>",
        Escaped(target.state)
    )?;
    if let Some(incident) = &target.incident {
        write!(
            page,
            ": <a href=\"/api/v1/incidents/{0}\">incident {0}</a>",
            Escaped(incident)
        )?;
    }
    write!(
        page,
        "<small>since {}</small>",
        RelativeTime(target.state_since, now)
    )?;
    match (&target.running, &target.confirming, target.paused) {
        (Some(_), _, _) => page.push_str("running"),
        (None, Some(_), _) => page.push_str("confirming"),
        (None, None, true) => page.push_str("paused"),
        (None, None, false) => page.push_str("waiting"),
    }
    if let Some(why) = &target.held_back {
        write!(page, "<small class=\"bad\">{}</small>", Escaped(why))?;
    }
    page.push_str("<td>");
    match &target.last_batch {
        None => page.push_str("none yet"),
        Some(batch) => {
            write!(
                page,
                "<a href=\"/api/v1/batches/{}\" class=\"{}\">{}</a>: {} ok, {} failed",
                Escaped(&batch.batch_id),
                if batch.result == "ok" { "ok" } else { "bad" },
                Escaped(&batch.result),
                batch.ok,
                batch.failed,
            )?;
            if batch.aborted > 0 {
                write!(page, ", {} aborted", batch.aborted)?;
            }
            write!(page, "<small>{}</small>", RelativeTime(batch.ended_at, now))?;
        }
    }
    page.push_str("<td>");
    match target.next_batch_at {
        _ if target.paused => page.push_str("paused"),
        None => page.push_str("none"),
        Some(at) => write!(page, "{}", RelativeTime(at, now))?,
    }
    writeln!(page, "<small>{}</small>", Escaped(&target.schedule))
}

fn write_project(page: &mut String, project: &ProjectStatus, now: DateTime<Utc>) -> fmt::Result {
    write!(
        page,
        "<tr><td><b>{}</b><small>{}</small><td>{} of {}",
        Escaped(&project.name),
        Escaped(&project.url),
        project.rooms_in_flight,
        project.max_rooms,
    )?;
    if let Some(until) = project.backoff_until {
        write!(
            page,
            "<small class=\"bad\">backing off until {}</small>",
            RelativeTime(until, now)
        )?;
    }
    page.push_str("<td>");
    for budget in &project.budgets {
        let (used, reserved) = (budget.used_seconds, budget.reserved_seconds);
        write!(
            page,
            "this {}: {} min used",
            Escaped(budget.period),
            used.div_ceil(60)
        )?;
        if reserved > 0 {
            write!(page, ", {} reserved", reserved.div_ceil(60))?;
        }
        if let Some(limit) = budget.limit_seconds {
            write!(page, ", limit {}", limit / 60)?;
        }
        page.push_str("<br>");
    }
    page.push('\n');
    Ok(())
}

/// Text that is safe between tags and inside a quoted attribute.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|char| match char {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            char => f.write_char(char),
        })
    }
}

/// A time, and its distance from now: `2026-11-24 13:15:00 (2 min ago)`.
struct RelativeTime(DateTime<Utc>, DateTime<Utc>);

impl Display for RelativeTime {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(at, now) = self;
        let distance = *now - *at;
        let (before, after) = if distance < TimeDelta::zero() {
            ("in ", "")
        } else {
            ("", " ago")
        };
        let seconds = distance.num_seconds().unsigned_abs();
        let (number, unit) = match seconds {
            0..120 => (seconds, "s"),
            120..7_200 => (seconds / 60, "min"),
            7_200..172_800 => (seconds / 3_600, "h"),
            _ => (seconds / 86_400, "days"),
        };
        write!(
            f,
            "{} ({before}{number} {unit}{after})",
            at.format("%Y-%m-%d %H:%M:%S")
        )
    }
}
