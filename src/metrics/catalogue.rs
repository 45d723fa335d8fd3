//! Every metric family: name, type, labels and HELP. To rename one is a breaking change.
//!
//! A new metric is one entry of the list below, one handle in `metrics.rs`, and one row in `docs/metrics.md`.

/// Prefix of every name, followed by an underscore.
pub const PREFIX: &str = "livekit_canary";

/// Bucket bounds of the delays that involve the agent, in seconds. All targets share them, because `sum by (le)` needs equal buckets. The default
/// thresholds (5 s, 8 s) and deadlines are among them, so that the share within a threshold is exact.
const DELAY_BUCKETS: &[f64] = &[
    0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 60.0,
    120.0, 300.0,
];

/// Bucket bounds of the steps of a probe, in seconds. On the same host a step takes a millisecond, and at worst as long as
/// its deadline.
const SPAN_BUCKETS: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0,
    3.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0,
];

/// Bucket bounds of jitter, in seconds. Normal jitter is a few milliseconds, and speech breaks up above about 30 ms, so the
/// buckets of the delays would begin too high.
const JITTER_BUCKETS: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0,
];

/// Bucket bounds of a round trip, in seconds: from the same host to the other side of the world and back over a relay.
const ROUND_TRIP_BUCKETS: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0,
];

/// Bucket bounds of the stages that an agent reports of a reply, in seconds. A transcript can be ready within a hundredth of a
/// second, and an LLM can take half a minute.
const STAGE_BUCKETS: &[f64] = &[
    0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0,
];

/// Bucket bounds of a difference of two times, in seconds, which can be negative. They are finest around zero, which is
/// the expected value. A quantile in the lowest bucket is the bound of that bucket, so it is never too low.
const DIFFERENCE_BUCKETS: &[f64] = &[
    -5.0, -2.0, -1.0, -0.5, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 10.0,
];

/// Bucket bounds of a share of words. The first one counts the turns without any error. A share above 1 is possible,
/// because an agent can hear more words than were said.
const WORD_ERROR_BUCKETS: &[f64] = &[
    0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0,
];

/// One metric family.
#[derive(Debug, Clone, Copy)]
pub struct Definition {
    /// Without [`PREFIX`].
    pub name: &'static str,
    pub labels: &'static [&'static str],
    pub kind: MetricKind,
    pub help: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum MetricKind {
    Counter,
    Gauge,
    /// With the upper bounds of its buckets, in the unit of the metric.
    Histogram(&'static [f64]),
}

impl MetricKind {
    /// As in the TYPE line of the text format.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

impl Definition {
    /// Whether a value can be below zero.
    pub(super) fn has_negative_values(&self) -> bool {
        matches!(self.kind, MetricKind::Histogram([lowest, ..]) if *lowest < 0.0)
    }

    /// The labels without `target` or `project`, which the registry adds.
    pub(super) fn labels_within(&self) -> &'static [&'static str] {
        match self.labels {
            ["target" | "project" | "channel", within @ ..] => within,
            all => all,
        }
    }
}

/// Turns the doc comment of each entry into its HELP text, and lists all entries in `CATALOGUE`.
macro_rules! catalogue {
    ($($(#[doc = $help:literal])+ $id:ident: $name:literal [$($label:literal)*] $kind:expr;)+) => {
        $(
            $(#[doc = $help])+
            pub(super) const $id: Definition = Definition {
                name: $name,
                labels: &[$($label),*],
                kind: $kind,
                help: concat!($($help),+).trim_ascii(),
            };
        )+

        /// Every metric family except the usual `process_*` ones.
        pub const CATALOGUE: &[Definition] = &[$($id),+];
    };
}

catalogue! {
    /// Probes that ended ok or failed, by the purpose of their batch, excluding aborted ones.
    PROBES: "probes_total" ["target" "purpose"] MetricKind::Counter;
    /// Probes that were aborted because the canary stopped, or because a confirmation gave way to a scheduled batch.
    PROBES_ABORTED: "probes_aborted_total" ["target"] MetricKind::Counter;
    /// Failed probes, by the purpose of their batch, by reason, and by origin of the fault.
    FAILURES: "probe_failures_total" ["target" "purpose" "reason" "origin"] MetricKind::Counter;
    /// Probes that ended because LiveKit named a plan limit, by limit.
    LIMITS: "plan_limit_rejections_total" ["target" "limit"] MetricKind::Counter;
    /// Probes of scheduled batches that count towards a service level. A label shows whether an incident was open when the
    /// probe ended.
    ELIGIBLE: "slo_eligible_total" ["target" "sli" "in_incident"] MetricKind::Counter;
    /// Probes of scheduled batches that count towards a service level and were good.
    GOOD: "slo_good_total" ["target" "sli" "in_incident"] MetricKind::Counter;
    /// Scheduled batches with at least one probe that counts towards a service level and was bad. A label shows whether an
    /// incident was open when the batch ended.
    BAD_BATCHES: "slo_bad_batches_total" ["target" "sli" "in_incident"] MetricKind::Counter;
    /// Batches, by purpose and by the combined result of their rooms.
    BATCHES: "batches_total" ["target" "purpose" "result"] MetricKind::Counter;
    /// Ticks of the schedule that started no batch, by cause.
    SKIPPED: "batches_skipped_total" ["target" "cause"] MetricKind::Counter;
    /// Turns of the caller, by result, excluding those of aborted probes.
    CALLER_TURNS: "caller_turns_total" ["target" "result"] MetricKind::Counter;
    /// Agent time as LiveKit bills it: from the agent's join to the room's end, rounded up to whole minutes per
    /// session.
    BILLED: "agent_billed_seconds_total" ["target"] MetricKind::Counter;
    /// Probes whose media connected, by the path that it took.
    PATHS: "probe_paths_total" ["target" "path"] MetricKind::Counter;
    /// RTP packets of the agent's audio that arrived.
    PACKETS: "agent_audio_packets_total" ["target"] MetricKind::Counter;
    /// RTP packets of the agent's audio that did not arrive.
    PACKETS_LOST: "agent_audio_packets_lost_total" ["target"] MetricKind::Counter;
    /// Rooms that could not be deleted, or that may have come back.
    LEAKED: "rooms_leaked_total" ["target"] MetricKind::Counter;
    /// Rooms of earlier runs that were deleted at the start.
    SWEPT: "rooms_swept_total" ["target"] MetricKind::Counter;
    /// Faults of the canary itself, by component.
    INTERNAL_ERRORS: "internal_errors_total" ["kind"] MetricKind::Counter;
    /// Batches that could not be recorded in the history.
    HISTORY_DROPPED: "history_dropped_total" [] MetricKind::Counter;
    /// Lines of the log that were dropped because the lines before them were not read.
    LOG_DROPPED: "log_lines_dropped_total" [] MetricKind::Counter;
    /// Attempts to send a message or a heartbeat to a channel.
    NOTIFICATIONS: "notifications_total" ["channel"] MetricKind::Counter;
    /// Attempts that failed. A message is sent again for a day.
    NOTIFICATION_FAILURES: "notification_failures_total" ["channel"] MetricKind::Counter;
    /// Messages that were never delivered: refused for good, given up after a day, or dropped because too many waited.
    NOTIFICATIONS_LOST: "notifications_lost_total" ["channel"] MetricKind::Counter;

    /// Time from the dispatch to the agent's join, whatever the outcome. The label position separates the first room of
    /// a batch, which a cold start affects, from later rooms. Delays of which only an upper bound is known are
    /// excluded.
    JOIN_DELAY: "agent_join_delay_seconds" ["target" "position"] MetricKind::Histogram(DELAY_BUCKETS);
    /// Time from the dispatch to the agent's first speech.
    FIRST_SPEECH_DELAY: "first_speech_delay_seconds" ["target"] MetricKind::Histogram(DELAY_BUCKETS);
    /// Time from the end of the caller's speech to the agent's reply, once per turn with a reply.
    REPLY_DELAY: "reply_delay_seconds" ["target"] MetricKind::Histogram(DELAY_BUCKETS);
    /// Duration of the stages of a reply, as the agent's session reports them. The stages overlap, so their sum means
    /// nothing.
    AGENT_STAGE: "agent_stage_seconds" ["target" "stage"] MetricKind::Histogram(STAGE_BUCKETS);
    /// The reply delay minus the end-to-end stage that the agent reports for the same turn: what the agent does not explain.
    /// Negative if the agent reports more than was measured, so the histogram has no sum.
    REPLY_UNEXPLAINED: "reply_unexplained_seconds" ["target"] MetricKind::Histogram(DIFFERENCE_BUCKETS);
    /// Time from the start of the caller's interruption until the agent was silent. An agent that goes on speaking has none.
    YIELD_DELAY: "yield_delay_seconds" ["target"] MetricKind::Histogram(DELAY_BUCKETS);
    /// Share of the caller's words that the agent transcribed wrongly, once per turn. Above 1 if it heard more words
    /// than were said.
    WORD_ERROR: "heard_word_error_ratio" ["target"] MetricKind::Histogram(WORD_ERROR_BUCKETS);
    /// Duration of the other steps of a probe, whatever the outcome: the canary's own connection, the dispatch call,
    /// the agent's start-up.
    SPAN_DURATION: "span_duration_seconds" ["target" "span"] MetricKind::Histogram(SPAN_BUCKETS);
    /// Round trip of the ICE checks on the path of each peer connection: the mean of the call, once per connection.
    ROUND_TRIP: "media_round_trip_seconds" ["target"] MetricKind::Histogram(ROUND_TRIP_BUCKETS);
    /// Interarrival jitter of the agent's audio when the audio ends, once per probe.
    JITTER: "agent_audio_jitter_seconds" ["target"] MetricKind::Histogram(JITTER_BUCKETS);

    /// Rooms that are open now.
    IN_FLIGHT: "rooms_in_flight" ["target"] MetricKind::Gauge;
    /// Time of the schedule's last tick.
    LAST_TICK: "last_tick_timestamp_seconds" ["target"] MetricKind::Gauge;
    /// Time of the next scheduled batch. It changes only when a tick has been handled.
    NEXT_BATCH: "next_batch_timestamp_seconds" ["target"] MetricKind::Gauge;
    /// End of the last scheduled batch, excluding aborted ones. It survives a restart.
    LAST_COMPLETED: "last_batch_completed_timestamp_seconds" ["target"] MetricKind::Gauge;
    /// Share of the last scheduled batch's rooms that were ok, excluding aborted batches.
    LAST_SUCCESS_RATIO: "last_batch_success_ratio" ["target"] MetricKind::Gauge;
    /// Longest interval between two batches over the next seven days.
    MAX_INTERVAL: "batch_interval_seconds" ["target"] MetricKind::Gauge;
    /// Shortest interval between two batches over the next seven days.
    MIN_INTERVAL: "batch_interval_shortest_seconds" ["target"] MetricKind::Gauge;
    /// Mean interval between batches over the next seven days.
    MEAN_INTERVAL: "batch_interval_mean_seconds" ["target"] MetricKind::Gauge;
    /// The longer of the shortest interval and the longest possible batch. Alert rules count over a multiple of it.
    EFFECTIVE_INTERVAL: "batch_interval_effective_seconds" ["target"] MetricKind::Gauge;
    /// Longest delay that counts as good: after the dispatch for the join and the first speech, after the end of the
    /// caller's speech for the reply. NaN if the settings rule the service level out.
    SLO_THRESHOLD: "slo_threshold_seconds" ["target" "sli"] MetricKind::Gauge;
    /// Share of eligible probes that must be good. NaN if the settings rule the service level out.
    SLO_OBJECTIVE: "slo_objective_ratio" ["target" "sli"] MetricKind::Gauge;
    /// 1 while the target is paused, else 0.
    PAUSED: "target_paused" ["target"] MetricKind::Gauge;
    /// 1 for the state that the target is in, 0 for the others.
    STATE: "target_state" ["target" "state"] MetricKind::Gauge;
    /// Time of the last change of the target's state.
    STATE_SINCE: "target_state_since_timestamp_seconds" ["target"] MetricKind::Gauge;
    /// 1 while an incident of this fault is open, also if the state is unknown meanwhile, else 0. NaN until the canary has read
    /// what an earlier run knew of the target.
    INCIDENT_OPEN: "incident_open" ["target" "fault"] MetricKind::Gauge;
    /// The open incident as labels: its most frequent reason, its share of failed rooms, what differs, and its address. Always 1.
    /// Absent without an incident.
    INCIDENT_INFO: "incident_info" ["target" "incident" "reason" "share" "differs" "url"] MetricKind::Gauge;
    /// Settings of the target as labels. Always 1.
    TARGET_INFO: "target_info" ["target" "project" "url" "agent_name" "deployment" "dispatch"] MetricKind::Gauge;

    /// End of the back-off after a plan limit. NaN without a back-off.
    BACKOFF_UNTIL: "backoff_until_timestamp_seconds" ["project"] MetricKind::Gauge;
    /// Maximum agent time per UTC day or calendar month. NaN without a limit.
    BUDGET: "agent_budget_seconds" ["project" "period"] MetricKind::Gauge;
    /// Agent time that ended rooms used in the current UTC day or calendar month.
    BUDGET_USED: "agent_budget_used_seconds" ["project" "period"] MetricKind::Gauge;
    /// Agent time that open rooms have reserved, which is their worst case. When a room ends, what it used replaces it.
    BUDGET_RESERVED: "agent_budget_reserved_seconds" ["project" "period"] MetricKind::Gauge;

    /// Version of the canary as labels. Always 1.
    BUILD_INFO: "build_info" ["version" "revision" "rustc" "engine"] MetricKind::Gauge;
    /// 1 while the history can't be written, else 0. Probing goes on.
    HISTORY_DEGRADED: "history_degraded" [] MetricKind::Gauge;
    /// 1 if the last load of the settings succeeded, else 0.
    RELOAD_SUCCESSFUL: "config_last_reload_successful" [] MetricKind::Gauge;
    /// Time of the last successful load of the settings.
    RELOAD_SUCCESS_AT: "config_last_reload_success_timestamp_seconds" [] MetricKind::Gauge;
}
