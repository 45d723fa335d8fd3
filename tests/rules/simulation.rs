//! A canary's series as Prometheus would have scraped them, in the notation of promtool's unit tests.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Seconds between two scrapes. With 20 s, no window of the rules begins at a scrape: Prometheus 2 would count that scrape,
/// Prometheus 3 would not.
pub(crate) const SCRAPE_INTERVAL: usize = 20;
const SLIS: [&str; 5] = ["availability", "join", "first_speech", "reply", "service"];

/// The settings of a canary.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reference {
    pub name: &'static str,
    pub rooms: usize,
    /// Minutes between two ticks.
    pub every: usize,
    pub objective: f64,
}

/// What happens at a tick.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Event {
    Good,
    /// Only the first room fails.
    OneRoom,
    /// No agent joins. After two rooms the others don't open. Confirmations fail as well, so an incident opens two minutes after
    /// the tick. Each incident ends a minute after the tick of the next good batch.
    Outage,
    /// No agent joins, but confirmations are good, so no incident opens.
    Blip,
    /// Agents join later than the objective.
    SlowJoins,
    /// Agents join and don't speak. No reply is due. An incident opens.
    SilentAgents,
    /// Agents speak first, and don't reply. An incident opens.
    DeafAgents,
    /// Only the agent of the first room does not reply.
    OneDeafRoom,
    /// Agents reply later than the objective.
    SlowReplies,
    /// As `Good`, with settings that expect no reply.
    ReplyOptional,
    /// The network fails only the first room.
    OneLostRoom,
    /// The server can't be reached. After the first room the others don't open. An incident opens.
    LiveKitDown,
    /// The key pair is no longer valid. After the first room the others don't open.
    RotatedKey,
    /// This limit rejects the first room. The ticks after it are skipped as with the default back-off.
    Limit(&'static str),
    /// The batch of this tick never ends, so no other begins.
    Hung,
    /// The budget of agent time is spent.
    Spent,
    /// The target is paused.
    Paused,
    /// The cron expression has no tick here. A story with nights has a schedule that covers half of the day.
    Night,
    /// The tick never happens, but the canary responds to scrapes.
    DeadScheduler,
    /// There are no ticks and no responses to scrapes.
    Down,
    /// The canary ends and starts again every three minutes, before it has opened a room.
    CrashLoop,
    /// As `Good`, in a new pod. It has read its history after a minute.
    Rollout,
    /// The settings no longer have the target.
    Removed,
    /// The canary is no longer scraped.
    Gone,
    /// As `Good`, while the changed settings are rejected.
    BadSettings,
    /// As `Good`, while the history can't be written.
    FullDisk,
    /// As `Good`, but a room can't be deleted.
    LeakedRoom,
    /// A failure of the canary ends its first room.
    OwnFault,
}

/// The story of a canary: what happens at each tick, from minute 0 on.
pub(crate) struct Story {
    pub reference: Reference,
    pub events: Vec<Event>,
    /// What happens meanwhile to a drill on another host, from minute 0 on.
    drill: Vec<Event>,
}

impl Story {
    pub(crate) fn new(reference: Reference, events: &[(usize, Event)]) -> Self {
        Self {
            reference,
            events: repeated(events),
            drill: Vec::new(),
        }
    }

    pub(crate) fn beside_drill(mut self, events: &[(usize, Event)]) -> Self {
        self.drill = repeated(events);
        self
    }

    pub(crate) fn minutes(&self) -> usize {
        self.events.len() * self.reference.every
    }

    /// All series of the story with their values.
    pub(crate) fn series(&self) -> Vec<(String, String)> {
        let drill = self.series_of(&self.drill).into_iter();
        let drill = drill.map(|(series, values)| (as_drill(&series), values));
        self.series_of(&self.events)
            .into_iter()
            .chain(drill)
            .collect()
    }

    fn series_of(&self, events: &[Event]) -> Vec<(String, String)> {
        let mut canary = Canary::new(self);
        for (tick, event) in events.iter().enumerate() {
            let later = events[tick + 1..].iter();
            let nights = later.take_while(|event| **event == Event::Night).count();
            let next = (tick + 1 + nights) * self.reference.every * 60;
            canary.interval(*event, next);
        }
        canary.history.finish()
    }
}

fn repeated(events: &[(usize, Event)]) -> Vec<Event> {
    let events = events.iter();
    events
        .flat_map(|(count, event)| std::iter::repeat_n(*event, *count))
        .collect()
}

/// The same series of a drill. `up` comes from Prometheus, so it lacks the label of the canary.
fn as_drill(series: &str) -> String {
    let label = if series.starts_with("up{") {
        "{"
    } else {
        "{drill=\"true\","
    };
    series
        .replacen('{', label, 1)
        .replace("target=\"support\"", "target=\"drill-agent-silent\"")
        .replace("instance=\"10.0.0.", "instance=\"10.0.9.")
}

/// The values of the next scrape, and the earlier scrapes.
struct Canary {
    reference: Reference,
    counters: BTreeMap<String, f64>,
    gauges: BTreeMap<String, f64>,
    history: History,
    pod: usize,
    now: usize,
    backoff_until: usize,
    rest: usize,
    hung: bool,
    /// The fault of the open incident.
    incident: Option<&'static str>,
}

impl Canary {
    fn new(story: &Story) -> Self {
        let reference = story.reference;
        let seconds = |minutes: usize| minutes as f64 * 60.0;
        let rests = story.events.contains(&Event::Night);
        let mean = reference.every * if rests { 2 } else { 1 };
        let mut gauges = BTreeMap::new();
        for (name, value) in [
            (
                "livekit_canary_batch_interval_shortest_seconds",
                seconds(reference.every),
            ),
            (
                "livekit_canary_batch_interval_effective_seconds",
                seconds(reference.every),
            ),
            ("livekit_canary_batch_interval_mean_seconds", seconds(mean)),
            ("livekit_canary_next_batch_timestamp_seconds", 0.0),
        ] {
            gauges.insert(series(name, &[]), value);
        }
        for sli in SLIS {
            let objective = series("livekit_canary_slo_objective_ratio", &[("sli", sli)]);
            gauges.insert(objective, reference.objective);
        }
        for (name, value) in [
            ("livekit_canary_build_info", 1.0),
            ("process_start_time_seconds", 0.0),
        ] {
            gauges.insert(format!("{name}{{"), value);
        }
        let mut canary = Self {
            reference,
            counters: BTreeMap::new(),
            gauges,
            history: History::default(),
            pod: 0,
            now: 0,
            backoff_until: 0,
            rest: 60,
            hung: false,
            incident: None,
        };
        canary.show_incident();
        canary.reset();
        canary
    }

    /// All counters of a new process exist at zero.
    fn reset(&mut self) {
        self.counters.clear();
        for sli in SLIS {
            for name in ["eligible", "good", "bad_batches"] {
                for in_incident in ["false", "true"] {
                    let labels = [("sli", sli), ("in_incident", in_incident)];
                    self.count(&format!("slo_{name}_total"), &labels, 0);
                }
            }
        }
        for purpose in ["scheduled", "confirmation"] {
            for result in ["ok", "degraded", "failed", "limited", "aborted"] {
                self.end(purpose, result, 0);
            }
        }
        for cause in ["overlap", "budget", "backoff", "paused"] {
            self.count("batches_skipped_total", &[("cause", cause)], 0);
        }
        for reason in [
            ("dispatch_unanswered", "undetermined"),
            ("agent_silent", "agent"),
            ("agent_no_reply", "agent"),
            ("unreachable", "network"),
            ("auth_rejected", "config"),
            ("plan_limit", "limit"),
            ("internal", "canary"),
        ] {
            self.fail("scheduled", reason, 0);
            self.fail("confirmation", reason, 0);
        }
        for limit in ["api_rate", "connections"] {
            self.count("plan_limit_rejections_total", &[("limit", limit)], 0);
        }
        self.count("rooms_leaked_total", &[], 0);
        self.count_fault(0);
    }

    fn count(&mut self, name: &str, labels: &[(&str, &str)], by: usize) {
        let series = series(&format!("livekit_canary_{name}"), labels);
        *self.counters.entry(series).or_default() += by as f64;
    }

    /// A counter without a target.
    fn count_fault(&mut self, by: usize) {
        let series = "livekit_canary_internal_errors_total{kind=\"probe\",".to_owned();
        *self.counters.entry(series).or_default() += by as f64;
    }

    fn fail(&mut self, purpose: &str, (reason, origin): (&str, &str), by: usize) {
        let labels = [("purpose", purpose), ("reason", reason), ("origin", origin)];
        self.count("probe_failures_total", &labels, by);
    }

    fn end(&mut self, purpose: &str, result: &str, by: usize) {
        let labels = [("purpose", purpose), ("result", result)];
        self.count("batches_total", &labels, by);
    }

    /// One room of one confirmation fails.
    fn confirm(&mut self, fault: &str) {
        let reason = match fault {
            "agent" => ("agent_silent", "agent"),
            _ => ("unreachable", "network"),
        };
        self.fail("confirmation", reason, 1);
        self.end("confirmation", "failed", 1);
    }

    fn set_incident(&mut self, incident: Option<&'static str>) {
        self.incident = incident;
        self.show_incident();
    }

    fn show_incident(&mut self) {
        for fault in ["agent", "service"] {
            let open = series("livekit_canary_incident_open", &[("fault", fault)]);
            let value = u8::from(self.incident == Some(fault));
            self.gauges.insert(open, f64::from(value));
        }
    }

    /// Counts the good and bad rooms of a batch in a service level.
    fn judge(&mut self, sli: &str, good: usize, bad: usize) {
        let in_incident = if self.incident.is_some() {
            "true"
        } else {
            "false"
        };
        let labels = [("sli", sli), ("in_incident", in_incident)];
        self.count("slo_eligible_total", &labels, good + bad);
        self.count("slo_good_total", &labels, good);
        self.count("slo_bad_batches_total", &labels, usize::from(bad > 0));
    }

    fn batch(&mut self, good: usize, failed: usize) {
        let result = match (good, failed) {
            (_, 0) => "ok",
            (0, _) => "failed",
            _ => "degraded",
        };
        self.end("scheduled", result, 1);
    }

    /// The time from a tick until the next.
    fn interval(&mut self, event: Event, next: usize) {
        if event == Event::Rollout {
            self.new_process(true);
            for fault in ["agent", "service"] {
                let open = series("livekit_canary_incident_open", &[("fault", fault)]);
                self.gauges.insert(open, f64::NAN);
            }
        }
        if event == Event::Paused {
            self.set_incident(None);
        }
        let handled = !matches!(
            event,
            Event::Down
                | Event::CrashLoop
                | Event::DeadScheduler
                | Event::Night
                | Event::Gone
                | Event::Removed
        );
        for (series, holds) in [
            (
                series("livekit_canary_target_paused", &[]),
                event == Event::Paused,
            ),
            (
                "livekit_canary_config_last_reload_successful{".to_owned(),
                event != Event::BadSettings,
            ),
            (
                "livekit_canary_history_degraded{".to_owned(),
                event == Event::FullDisk,
            ),
        ] {
            self.gauges.insert(series, f64::from(u8::from(holds)));
        }
        // Settings that rule out a service level leave it without an objective.
        let objective = match event {
            Event::ReplyOptional => f64::NAN,
            _ => self.reference.objective,
        };
        let reply = series("livekit_canary_slo_objective_ratio", &[("sli", "reply")]);
        self.gauges.insert(reply, objective);
        if handled {
            let next_batch = series("livekit_canary_next_batch_timestamp_seconds", &[]);
            self.gauges.insert(next_batch, next as f64);
        }
        let end = self.now + self.reference.every * 60;
        // A good batch takes one minute. A batch that waits for agents takes half a minute more.
        let ends = match event {
            Event::Outage | Event::Blip | Event::SilentAgents | Event::DeafAgents => self.now + 90,
            Event::LiveKitDown | Event::RotatedKey | Event::Limit(_) => self.now + 30,
            _ => self.now + 60,
        };
        let mut runs = handled && !self.skips(event);
        let begin = self.now;
        let is_good = runs && !matches!(event, Event::RotatedKey | Event::Limit(_) | Event::Blip);
        // What is open at the begin, or opens later.
        let fault = match event {
            Event::Outage | Event::SilentAgents | Event::DeafAgents => Some("agent"),
            Event::LiveKitDown => Some("service"),
            _ => None,
        };
        while self.now < end {
            if event == Event::CrashLoop && self.now.is_multiple_of(180) {
                self.new_process(false);
                // After the startup delay.
                let next_batch = series("livekit_canary_next_batch_timestamp_seconds", &[]);
                self.gauges.insert(next_batch, (self.now + 60) as f64);
            }
            if let Some(fault) = fault {
                if self.incident.is_none() && self.now >= begin + 120 {
                    self.set_incident(Some(fault));
                }
            } else if is_good && self.now == begin + 60 {
                self.set_incident(None);
            }
            if let Some(fault) = self.incident
                && handled
                && self.now.is_multiple_of(60)
            {
                self.confirm(fault);
            }
            if runs && self.now >= ends {
                self.end_batch(event);
                runs = false;
            }
            let down = event == Event::Down || event == Event::CrashLoop && self.now % 180 < 60;
            if event != Event::Gone {
                self.scrape(down, event == Event::Removed);
            }
            self.now += SCRAPE_INTERVAL;
        }
    }

    /// Whether the tick opens no room. Counts a skipped tick.
    fn skips(&mut self, event: Event) -> bool {
        let cause = match event {
            Event::Hung if self.hung => "overlap",
            Event::Limit(_) if self.now < self.backoff_until => "backoff",
            Event::Spent => "budget",
            Event::Paused => "paused",
            _ => {
                let was_hung = std::mem::replace(&mut self.hung, event == Event::Hung);
                if was_hung {
                    self.new_process(false);
                }
                return event == Event::Hung;
            }
        };
        self.count("batches_skipped_total", &[("cause", cause)], 1);
        true
    }

    fn end_batch(&mut self, event: Event) {
        let rooms = self.reference.rooms;
        let all = |canary: &mut Self, slis: &[&str], good, bad| {
            for sli in slis {
                canary.judge(sli, good, bad);
            }
        };
        let except = |sli| {
            SLIS.into_iter()
                .filter(move |it| *it != sli)
                .collect::<Vec<_>>()
        };
        match event {
            Event::Good | Event::Rollout | Event::BadSettings | Event::FullDisk => {
                all(self, &SLIS, rooms, 0);
                self.batch(rooms, 0);
            }
            Event::LeakedRoom => {
                all(self, &SLIS, rooms, 0);
                self.batch(rooms, 0);
                self.count("rooms_leaked_total", &[], 1);
            }
            Event::ReplyOptional => {
                all(self, &except("reply"), rooms, 0);
                self.batch(rooms, 0);
            }
            // The failed room counts in no service level.
            Event::OwnFault => {
                all(self, &SLIS, rooms - 1, 0);
                self.fail("scheduled", ("internal", "canary"), 1);
                self.count_fault(1);
                self.batch(rooms - 1, 1);
            }
            Event::OneRoom => {
                // Without an agent no reply is due.
                all(self, &except("reply"), rooms - 1, 1);
                self.judge("reply", rooms - 1, 0);
                self.fail("scheduled", ("dispatch_unanswered", "undetermined"), 1);
                self.batch(rooms - 1, 1);
            }
            Event::Outage | Event::Blip => {
                let opened = rooms.min(2);
                all(self, &except("reply"), 0, opened);
                self.fail("scheduled", ("dispatch_unanswered", "undetermined"), opened);
                self.batch(0, opened);
            }
            Event::SlowJoins => {
                all(self, &except("join"), rooms, 0);
                self.judge("join", 0, rooms);
                self.batch(rooms, 0);
            }
            Event::SlowReplies => {
                all(self, &except("reply"), rooms, 0);
                self.judge("reply", 0, rooms);
                self.batch(rooms, 0);
            }
            Event::DeafAgents => {
                all(self, &["availability", "reply", "service"], 0, rooms);
                all(self, &["join", "first_speech"], rooms, 0);
                self.fail("scheduled", ("agent_no_reply", "agent"), rooms);
                self.batch(0, rooms);
            }
            Event::SilentAgents => {
                all(self, &["availability", "first_speech", "service"], 0, rooms);
                self.judge("join", rooms, 0);
                self.fail("scheduled", ("agent_silent", "agent"), rooms);
                self.batch(0, rooms);
            }
            Event::OneDeafRoom => {
                all(self, &["availability", "reply", "service"], rooms - 1, 1);
                all(self, &["join", "first_speech"], rooms, 0);
                self.fail("scheduled", ("agent_no_reply", "agent"), 1);
                self.batch(rooms - 1, 1);
            }
            Event::OneLostRoom => {
                all(self, &except("service"), rooms - 1, 0);
                self.judge("service", rooms - 1, 1);
                self.fail("scheduled", ("unreachable", "network"), 1);
                self.batch(rooms - 1, 1);
            }
            Event::LiveKitDown => {
                self.judge("service", 0, 1);
                self.fail("scheduled", ("unreachable", "network"), 1);
                self.batch(0, 1);
            }
            // A wrong setting counts in no service level.
            Event::RotatedKey => {
                self.fail("scheduled", ("auth_rejected", "config"), 1);
                self.batch(0, 1);
            }
            Event::Limit(limit) => {
                self.judge("service", 0, 1);
                self.fail("scheduled", ("plan_limit", "limit"), 1);
                self.count("plan_limit_rejections_total", &[("limit", limit)], 1);
                self.end("scheduled", "limited", 1);
                self.backoff_until = self.now + self.rest;
                self.rest = (self.rest * 2).min(3600);
            }
            _ => {}
        }
    }

    /// Starts a new process in a new or in the same pod. Its counters begin at zero.
    fn new_process(&mut self, new_pod: bool) {
        self.pod += usize::from(new_pod);
        let started = "process_start_time_seconds{".to_owned();
        self.gauges.insert(started, self.now as f64);
        self.reset();
    }

    fn scrape(&mut self, down: bool, without_target: bool) {
        let at = self.now / SCRAPE_INTERVAL;
        let place = format!(
            "job=\"livekit-canary\",region=\"eu\",instance=\"10.0.0.{0}:9787\",pod=\"canary-{0}\"}}",
            self.pod
        );
        self.history
            .add(format!("up{{{place}"), at, f64::from(u8::from(!down)));
        if down {
            return;
        }
        for (series, value) in self.counters.iter().chain(&self.gauges) {
            if without_target && series.contains("target=") {
                continue;
            }
            self.history.add(format!("{series}{place}"), at, *value);
        }
    }
}

/// The beginning of a series, `name{target="support",label="value",`. The labels of the scrape follow.
fn series(name: &str, labels: &[(&str, &str)]) -> String {
    let mut text = format!("{name}{{target=\"support\",");
    for (label, value) in labels {
        write!(text, "{label}=\"{value}\",").expect("writing to a string can't fail");
    }
    text
}

/// The samples of each series; `None` for a scrape without the series.
#[derive(Default)]
struct History(BTreeMap<String, Vec<Option<f64>>>);

impl History {
    fn add(&mut self, series: String, at: usize, value: f64) {
        let samples = self.0.entry(series).or_default();
        samples.resize(at, None);
        samples.push(Some(value));
    }

    /// Repeated values in the notation of promtool: `3x4` is five times 3, and `_x4` is four times no value.
    fn finish(self) -> Vec<(String, String)> {
        let all = self.0.into_iter();
        let values = all.map(|(series, samples)| {
            let points = thinned(&samples);
            let runs = points.chunk_by(|one, next| one == next);
            let runs = runs.map(|run| match (run[0], run.len()) {
                // A series becomes stale with the first scrape that fails or lacks it.
                (Point::Missing, 1) => "stale".to_owned(),
                (Point::Missing, length) => format!("stale _x{}", length - 1),
                (Point::LeftOut, length) => format!("_x{length}"),
                (Point::Value(value), 1) => format!("{value}"),
                (Point::Value(value), length) => format!("{value}x{}", length - 1),
            });
            let values = runs.collect::<Vec<_>>().join(" ") + " stale";
            (series, values)
        });
        values.collect()
    }
}

/// What promtool reads for one scrape of a series.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Point {
    Value(f64),
    /// The scrape failed or lacks the series.
    Missing,
    /// The scrape repeats a value.
    LeftOut,
}

/// Most of promtool's time goes into reading samples again and again, and nearly all of them repeat the one before.
///
/// The scrapes before and after a change remain, so a window contains the same changes as with all scrapes. At least one scrape
/// of every two minutes remains, so a value doesn't get too old for Prometheus, and `increase` extrapolates little.
fn thinned(samples: &[Option<f64>]) -> Vec<Point> {
    const KEPT_EVERY: usize = 120 / SCRAPE_INTERVAL;
    let points = samples.iter().enumerate().map(|(at, sample)| {
        let repeats = |neighbour: usize| samples.get(neighbour) == Some(sample);
        match sample {
            None => Point::Missing,
            Some(_) if at % KEPT_EVERY != 0 && repeats(at - 1) && repeats(at + 1) => Point::LeftOut,
            Some(value) => Point::Value(*value),
        }
    });
    points.collect()
}
