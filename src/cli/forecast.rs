//! What the schedules cost: the ticks of the coming year times the cost of a batch, and warnings if a limit is too low.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use chrono::{DateTime, Months, NaiveDate, SecondsFormat, Utc};
use humantime::format_duration;

use crate::config::{Alerts, CallerMode, Config, Period, Problems, Project, Schedule, Target};
use crate::detection::rooms_in_a_days_outage;
use crate::guard::{max_batch_duration, max_rooms_at_once, worst_cases};
use crate::metrics::Sli;
use crate::probe::billable_minutes;
use crate::report::counted;
use crate::rules::max_watched_interval;
use crate::schedule::{AHEAD, Gaps, gaps, mean_interval, next_tick, offset, ticks_on};

pub(super) struct Forecast<'a> {
    now: DateTime<Utc>,
    alerts: &'a Alerts,
    /// The days of twelve whole months, starting with the current month.
    days: Vec<NaiveDate>,
    targets: BTreeMap<&'a str, TargetForecast<'a>>,
}

struct TargetForecast<'a> {
    target: &'a Target,
    /// The limit of agent time of its confirmations per UTC day.
    confirm_limit: Option<Duration>,
    /// The most agent minutes that one room of a confirmation can use.
    confirm_room_minutes: u64,
    offset: Duration,
    /// The number of ticks on each of [`Forecast::days`].
    ticks: Vec<u64>,
    batch: BatchCost,
}

/// What one batch costs. A range goes from the best case, where nothing is late, to the worst, where each step takes as
/// long as its deadline allows.
struct BatchCost {
    agent_minutes: RangeInclusive<u64>,
    /// Minutes of the canary's own participants.
    participant_minutes: RangeInclusive<u64>,
    /// The agent time that the budget must still have for every room to open.
    max_room_cost: Duration,
    max_duration: Duration,
}

impl BatchCost {
    fn of(target: &Target, project: &Project) -> Self {
        let minutes = |time: Duration| time.as_secs() / 60;
        let rooms = target.batch.rooms as u64;
        let held = target.batch.hold.max(min_conversation(target));
        let least = minutes(billable_minutes(held)) * rooms;
        let worst: Vec<Duration> = worst_cases(target, project).collect();
        let agent_minutes: u64 = worst.iter().map(|room| minutes(*room)).sum();
        // The canary joins before the agent: its participant is billed while its media connects, while the dispatch is
        // sent, and while the agent is on its way.
        let deadlines = &target.deadlines;
        let before = billable_minutes(deadlines.media + project.api_timeout + deadlines.join);
        Self {
            agent_minutes: least..=agent_minutes,
            participant_minutes: least..=agent_minutes + minutes(before) * rooms,
            max_room_cost: worst.into_iter().max().unwrap_or_default(),
            max_duration: max_batch_duration(target, project),
        }
    }
}

/// What the history stores of a probe and of a batch, indices included. Measured with evidence of the usual length.
const PROBE_BYTES: f64 = 4_000.0;
const BATCH_BYTES: f64 = 2_000.0;

/// The history must keep the failures of a night until the morning.
const MIN_HISTORY: Duration = Duration::from_hours(8);
/// No batch ends sooner, and batches of a target never overlap, however short the interval of its schedule is.
const MIN_BATCH_DURATION: Duration = Duration::from_secs(5);

/// Refuses a history that cannot hold the batches of eight hours: it would delete them before a person looks.
///
/// # Errors
/// With the size that the schedules need.
pub(super) fn check_history_size(config: &Config, today: NaiveDate) -> Result<(), Problems> {
    let bytes_needed = |target: &Target| {
        let interval = mean_interval(&target.schedule, today)?.max(MIN_BATCH_DURATION);
        let probes = u32::try_from(target.batch.rooms).map_or(f64::INFINITY, f64::from);
        Some(
            MIN_HISTORY.as_secs_f64() / interval.as_secs_f64()
                * (BATCH_BYTES + probes * PROBE_BYTES),
        )
    };
    let bytes: f64 = config.targets.values().filter_map(bytes_needed).sum();
    let needed = (bytes / 1e6).ceil();
    let limit = config.daemon.history.max_megabytes;
    #[expect(clippy::cast_precision_loss, reason = "the settings bound it")]
    if needed <= limit as f64 {
        return Ok(());
    }
    Err(Problems::single(
        format!(
            "history.max_megabytes: {limit} cannot hold the batches of eight hours, which take about {needed} MB"
        ),
        format!(
            "set it to at least {needed}, and three times that per day that you want to keep; or run fewer batches"
        ),
    ))
}

impl<'a> Forecast<'a> {
    pub(super) fn new(config: &'a Config, now: DateTime<Utc>) -> Self {
        let today = now.date_naive();
        let first = Period::Month.first_day(today);
        let year = first
            .iter_days()
            .take_while(|day| *day < first + Months::new(12));
        let days: Vec<NaiveDate> = year.collect();
        let targets = config.targets.iter().map(|(name, target)| {
            let project = &config.projects[&target.project];
            let confirming = target.confirming(target.confirm.rooms.max(1));
            let room = worst_cases(&confirming, project).max().unwrap_or_default();
            let offset = offset(name, &target.schedule);
            let ticks = days
                .iter()
                .map(|day| ticks_on(&target.schedule, offset, *day));
            let forecast = TargetForecast {
                target,
                confirm_limit: target.confirm.daily_limit(&project.budget),
                confirm_room_minutes: room.as_secs() / 60,
                offset,
                ticks: ticks.collect(),
                batch: BatchCost::of(target, project),
            };
            (name.as_str(), forecast)
        });
        Self {
            now,
            alerts: &config.alerts,
            targets: targets.collect(),
            days,
        }
    }

    /// The lines about the schedule in a target's description: key and value.
    pub(super) fn of_target(&self, name: &str) -> Vec<(&'static str, String)> {
        let forecast = &self.targets[name];
        let schedule = match &forecast.target.schedule {
            Schedule::Every(every) => format!("every {}", format_duration(*every)),
            Schedule::Cron { expression, zone } => format!("{} in {zone}", expression.as_str()),
        };
        let cost = &forecast.batch;
        let mut entries = vec![
            ("schedule", schedule),
            ("next", forecast.next(self.now, 3).join(", ")),
        ];
        if let Some(gaps) = forecast.gaps(self.now) {
            entries.push(("longest gap", in_days(gaps.longest)));
        }
        entries.push((
            "worst case",
            format!(
                "{} and {} per batch",
                counted(*cost.agent_minutes.end(), "agent minute"),
                in_days(cost.max_duration)
            ),
        ));
        let per_day = forecast.ticks.iter().copied().max().unwrap_or(0);
        for (key, batches) in [
            ("per day", per_day),
            ("per 30 days", forecast.ticks_in_30_days()),
        ] {
            let times = |minutes: &RangeInclusive<u64>| {
                let [least, worst] = [minutes.start(), minutes.end()].map(|end| end * batches);
                if least == worst {
                    least.to_string()
                } else {
                    format!("{least} to {worst}")
                }
            };
            let agent = times(&cost.agent_minutes);
            let participant = times(&cost.participant_minutes);
            entries.push((
                key,
                format!(
                    "{}, {agent} agent minutes, {participant} participant minutes",
                    counted(batches, "batch")
                ),
            ));
        }
        entries.push(("confirm", forecast.confirmations()));
        if let Some(turns) = turns_per_batch(forecast.target) {
            entries.push((
                "turns",
                format!(
                    "{turns} per batch, {} per day: each costs the agent STT, LLM and TTS",
                    turns * per_day
                ),
            ));
        }
        entries
    }

    pub(super) fn warnings_of_target(&self, name: &str) -> Vec<String> {
        let forecast = &self.targets[name];
        let mut warnings = Vec::new();
        if let Some(gaps) = forecast.gaps(self.now)
            && gaps.shortest < forecast.batch.max_duration
        {
            warnings.push(format!(
                "a batch can take {}, but the next one is due after {}: it is skipped if the first is still running (overlap)",
                in_days(forecast.batch.max_duration),
                in_days(gaps.shortest)
            ));
        }
        let target = forecast.target;
        warnings.extend(self.too_rare_for_alerts(target));
        let window = self.alerts.slo_window;
        #[expect(clippy::cast_precision_loss, reason = "a share is shown, not a count")]
        let rooms_in_30_days = (forecast.ticks_in_30_days() * target.batch.rooms as u64) as f64;
        let rooms = rooms_in_30_days * window.div_duration_f64(Duration::from_hours(30 * 24));
        warnings.extend(single_failure_misses(target, window, rooms));
        warnings
    }

    /// A warning if batches are too rare for the alerts on burn rates.
    fn too_rare_for_alerts(&self, target: &Target) -> Option<String> {
        let mean = mean_interval(&target.schedule, self.now.date_naive());
        let max = max_watched_interval(self.alerts);
        let interval = match mean {
            None => "over 7 days".to_owned(),
            Some(mean) if mean > max => in_days(mean),
            Some(_) => return None,
        };
        Some(format!(
            "the mean interval between batches is {interval}, but burn-rate alerts need at most {} (1/24 of alerts.slo_window)",
            in_days(max)
        ))
    }

    pub(super) fn warnings_of_project(&self, name: &str, project: &Project) -> Vec<String> {
        let all = self.targets.iter();
        let targets: Vec<(&str, &TargetForecast<'_>)> = all
            .filter(|(_, forecast)| forecast.target.project == name)
            .map(|(target, forecast)| (*target, forecast))
            .collect();
        let mut warnings = Vec::new();
        let held = targets
            .iter()
            .map(|(_, forecast)| max_rooms_at_once(forecast.target));
        let held: usize = held.sum();
        if held > project.max_rooms {
            warnings.push(format!(
                "its targets can hold {held} rooms at once, but max_rooms is {}: a batch waits until the rooms of \
                 another batch are gone",
                project.max_rooms
            ));
        }
        for period in Period::ALL {
            if let Some(limit) = project.budget.limit(period) {
                let busiest = |minutes| self.busiest(&targets, period, minutes);
                warnings.extend(beyond_budget(period, limit, &targets, busiest));
            }
        }
        warnings
    }

    /// The agent minutes of all these targets in the busiest period of this length.
    fn busiest(
        &self,
        targets: &[(&str, &TargetForecast<'_>)],
        period: Period,
        minutes: fn(&BatchCost) -> u64,
    ) -> u64 {
        let mut periods = BTreeMap::<NaiveDate, u64>::new();
        for (index, day) in self.days.iter().enumerate() {
            let cost =
                |forecast: &TargetForecast<'_>| forecast.ticks[index] * minutes(&forecast.batch);
            let of_day: u64 = targets.iter().map(|(_, forecast)| cost(forecast)).sum();
            *periods.entry(period.first_day(*day)).or_default() += of_day;
        }
        periods.into_values().max().unwrap_or(0)
    }
}

impl TargetForecast<'_> {
    /// The next `count` ticks, in the time zone of the schedule.
    fn next(&self, now: DateTime<Utc>, count: usize) -> Vec<String> {
        let next = |after: &DateTime<Utc>| next_tick(&self.target.schedule, self.offset, *after);
        std::iter::successors(next(&now), next)
            .take(count)
            .map(|tick| match &self.target.schedule {
                Schedule::Every(_) => tick.to_rfc3339_opts(SecondsFormat::Secs, true),
                Schedule::Cron { zone, .. } => {
                    let tick = tick.with_timezone(zone);
                    tick.to_rfc3339_opts(SecondsFormat::Secs, true)
                }
            })
            .collect()
    }

    fn gaps(&self, now: DateTime<Utc>) -> Option<Gaps> {
        gaps(&self.target.schedule, now, AHEAD)
    }

    /// The agent minutes that its confirmations can use in a UTC day: those of an outage that lasts for all of it, up to the
    /// limit.
    fn confirming_minutes(&self) -> u64 {
        let all_day = rooms_in_a_days_outage(&self.target.confirm) * self.confirm_room_minutes;
        let limit = self.confirm_limit.map(|limit| limit.as_secs() / 60);
        limit.map_or(all_day, |limit| limit.min(all_day))
    }

    fn confirmations(&self) -> String {
        let confirm = &self.target.confirm;
        if confirm.rooms == 0 {
            return "off: an outage is seen as late as the schedule allows".to_owned();
        }
        let after = format_duration(confirm.after);
        let rooms = counted(confirm.rooms as u64, "room");
        let minutes = counted(self.confirming_minutes(), "agent minute");
        let limit = match (confirm.agent_time_per_day, self.confirm_limit) {
            (Some(_), _) => "its limit",
            (None, Some(_)) => "a tenth of the project's budget",
            (None, None) => "no limit is set; if the agent fails all day",
        };
        format!("{rooms} {after} after a failure; up to {minutes} per UTC day ({limit})")
    }

    /// The number of ticks in the busiest 30 days.
    fn ticks_in_30_days(&self) -> u64 {
        let windows = self.ticks.windows(30).map(|days| days.iter().sum());
        windows.max().unwrap_or(0)
    }
}

/// How many times the callers of a batch speak, if each agent replies. `None` if that depends on the agent alone.
fn turns_per_batch(target: &Target) -> Option<u64> {
    let caller = &target.caller;
    let per_room = u64::from(caller.turns) + u64::from(caller.interrupt);
    (caller.mode != CallerMode::PassThrough).then(|| per_room * target.batch.rooms as u64)
}

/// How long a conversation takes at least: the caller's waits and its lines. The room stays open for it, whatever the hold,
/// if every turn must be answered.
fn min_conversation(target: &Target) -> Duration {
    let caller = &target.caller;
    if !target.expect.reply || caller.mode == CallerMode::PassThrough {
        return Duration::ZERO;
    }
    let first_wait = if caller.speaks_first {
        Duration::ZERO
    } else {
        caller.silence
    };
    let later_waits = caller.silence.max(caller.pause) * caller.turns.saturating_sub(1);
    let turns = usize::try_from(caller.turns).unwrap_or(usize::MAX);
    let lines = caller.lines.iter().cycle().take(turns);
    let speech: Duration = lines.map(|line| line.audio.duration()).sum();
    first_wait + later_waits + speech
}

fn beyond_budget(
    period: Period,
    limit: Duration,
    targets: &[(&str, &TargetForecast<'_>)],
    busiest: impl Fn(fn(&BatchCost) -> u64) -> u64,
) -> Vec<String> {
    let budget = format!(
        "budget.agent_time_per_{} is {}",
        period.label(),
        in_minutes(limit)
    );
    let never = targets
        .iter()
        .filter(|(_, forecast)| forecast.batch.max_room_cost > limit);
    let mut warnings: Vec<String> = never
        .map(|(target, forecast)| {
            let room = in_minutes(forecast.batch.max_room_cost);
            format!(
                "{budget}, but one room of target {target:?} can use {room}: its rooms never open"
            )
        })
        .collect();
    let least = busiest(|cost| *cost.agent_minutes.start());
    let worst = busiest(|cost| *cost.agent_minutes.end());
    let available = limit.as_secs() / 60;
    let confirming = targets
        .iter()
        .map(|(_, target)| target.confirming_minutes());
    let confirming: u64 = confirming.sum();
    let text = if least > available {
        format!("need at least {least}: batches will be skipped (budget)")
    } else if worst > available {
        format!("need up to {worst} if agents join or reply late: batches will be skipped (budget)")
    } else if period == Period::Day && worst + confirming > available {
        format!(
            "need up to {worst}, and confirmations of failures up to {confirming}: batches may be skipped (budget)"
        )
    } else {
        return warnings;
    };
    warnings.push(format!("{budget}, but the schedules of its targets {text}"));
    warnings
}

/// A duration in days, hours, minutes and seconds. `humantime` alone would print 31 days as `1month 13h 26m 24s`.
fn in_days(time: Duration) -> String {
    const DAY: u64 = 24 * 60 * 60;
    let (days, rest) = (
        time.as_secs() / DAY,
        Duration::from_secs(time.as_secs() % DAY),
    );
    let rest_text = format_duration(rest);
    match (days, rest) {
        (0, _) => rest_text.to_string(),
        (1, Duration::ZERO) => "1 day".to_owned(),
        (1, _) => format!("1 day {rest_text}"),
        (_, Duration::ZERO) => format!("{days} days"),
        (_, _) => format!("{days} days {rest_text}"),
    }
}

fn in_minutes(time: Duration) -> String {
    counted(time.as_secs() / 60, "agent minute")
}

/// A warning if there are so few rooms that a single failure misses an objective.
fn single_failure_misses(target: &Target, window: Duration, rooms: f64) -> Option<String> {
    if rooms < 1.0 {
        return None;
    }
    let applicable = Sli::ALL.iter().filter(|sli| sli.applies_to(target));
    let objectives = applicable.map(|sli| (sli.label(), sli.objective(&target.objectives)));
    let allowed = |objective: f64| rooms * (1.0 - objective);
    let missed = objectives.filter(|(_, objective)| allowed(*objective) < 1.0);
    let (names, shares): (Vec<&str>, Vec<f64>) = missed.unzip();
    let strictest = shares.into_iter().reduce(f64::max)?;
    let advice = match 1.0 - 1.0 / rooms {
        max if max >= 0.01 => {
            format!(
                "Set them to at most {}, or open rooms more often",
                (max * 1e4).floor() / 1e4
            )
        }
        _ => "Open rooms more often".to_owned(),
    };
    Some(format!(
        "one failed room misses an objective: {strictest} allows {:.1} failures of {rooms:.0} rooms in {} (objectives: {}). \
         {advice}",
        allowed(strictest),
        in_days(window),
        names.join(", "),
    ))
}
