//! Every series of ours: name, type, labels and HELP, each in this one place. Renaming one is a breaking change.

/// What the name of each series begins with, before an underscore.
pub const PREFIX: &str = "livekit_canary";

/// Upper bounds of the buckets of every delay, in seconds: one ladder for all targets, because unequal ones break
/// `sum by (le)`. The default thresholds (5 s, 8 s) and deadlines are among them.
pub const DELAYS: &[f64] = &[
    0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 60.0,
    120.0, 300.0,
];

/// Jitter is a few milliseconds where all is well, and speech breaks up from some 30 ms on: the ladder of the delays
/// begins where it is over.
pub const JITTERS: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0,
];

/// One metric family.
#[derive(Debug, Clone, Copy)]
pub struct Definition {
    /// Without [`PREFIX`].
    pub name: &'static str,
    pub labels: &'static [&'static str],
    pub kind: Kind,
    pub help: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Counter,
    Gauge,
    /// With the upper bounds of its buckets.
    Histogram(&'static [f64]),
}

impl Kind {
    /// As the text format's TYPE line has it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

impl Definition {
    /// The labels that tell its series of one target, or of one project, apart.
    pub(super) fn labels_within(&self) -> &'static [&'static str] {
        match self.labels {
            ["target" | "project", within @ ..] => within,
            all => all,
        }
    }
}

/// Makes the doc comment of a definition its HELP text, and lists them all.
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

        /// Every metric family but those about the process (`process_*`).
        pub const CATALOGUE: &[Definition] = &[$($id),+];
    };
}

catalogue! {
    /// Probes that came to their end, ok or failed; aborted ones apart.
    PROBES: "probes_total" ["target"] Kind::Counter;
    /// Probes that the canary was told to stop.
    PROBES_ABORTED: "probes_aborted_total" ["target"] Kind::Counter;
    /// Failed probes by reason and by who is at fault.
    FAILURES: "probe_failures_total" ["target" "reason" "origin"] Kind::Counter;
    /// Probes that ended because the service named a limit, by which one.
    LIMITS: "plan_limit_rejections_total" ["target" "limit"] Kind::Counter;
    /// Probes that count in a service level.
    ELIGIBLE: "slo_eligible_total" ["target" "sli"] Kind::Counter;
    /// Probes that count in a service level and were good.
    GOOD: "slo_good_total" ["target" "sli"] Kind::Counter;
    /// Batches with a probe that counts in a service level and was bad.
    BAD_BATCHES: "slo_bad_batches_total" ["target" "sli"] Kind::Counter;
    /// Batches by what their rooms came to.
    BATCHES: "batches_total" ["target" "result"] Kind::Counter;
    /// Ticks that started no batch, by what held it back.
    SKIPPED: "batches_skipped_total" ["target" "cause"] Kind::Counter;
    /// Agent time as LiveKit bills it: from an agent's join to the room's end, in whole minutes a session.
    BILLED: "agent_billed_seconds_total" ["target"] Kind::Counter;
    /// RTP packets of the agent's audio that arrived.
    PACKETS: "agent_audio_packets_total" ["target"] Kind::Counter;
    /// RTP packets of the agent's audio that never arrived.
    PACKETS_LOST: "agent_audio_packets_lost_total" ["target"] Kind::Counter;
    /// Rooms that could not be deleted, or may have come back.
    LEAKED: "rooms_leaked_total" ["target"] Kind::Counter;
    /// Rooms of earlier runs that were deleted at the start.
    SWEPT: "rooms_swept_total" ["target"] Kind::Counter;
    /// Faults of the canary itself.
    INTERNAL_ERRORS: "internal_errors_total" ["kind"] Kind::Counter;
    /// Records that the history could not take.
    HISTORY_DROPPED: "history_dropped_total" [] Kind::Counter;

    /// From the dispatch to the agent's join, whatever the outcome; position tells the first room of a batch, where a cold
    /// start hides, from later ones. Upper bounds are left out.
    JOIN_DELAY: "agent_join_delay_seconds" ["target" "position"] Kind::Histogram(DELAYS);
    /// From the dispatch to the agent's first speech.
    FIRST_SPEECH_DELAY: "first_speech_delay_seconds" ["target"] Kind::Histogram(DELAYS);
    /// From the end of an echo to the agent's reply, once a turn.
    REPLY_DELAY: "reply_delay_seconds" ["target"] Kind::Histogram(DELAYS);
    /// The other steps of a probe, whatever its outcome: our own way in, the dispatch call, the agent's start-up.
    SPAN_DURATION: "span_duration_seconds" ["target" "span"] Kind::Histogram(DELAYS);
    /// Interarrival jitter of the agent's audio at its end, once a probe.
    JITTER: "agent_audio_jitter_seconds" ["target"] Kind::Histogram(JITTERS);

    /// Rooms that are open now.
    IN_FLIGHT: "rooms_in_flight" ["target"] Kind::Gauge;
    /// When the schedule last ticked.
    LAST_TICK: "last_tick_timestamp_seconds" ["target"] Kind::Gauge;
    /// When the next batch is due; a tick changes it only once it is handled.
    NEXT_BATCH: "next_batch_timestamp_seconds" ["target"] Kind::Gauge;
    /// When the last batch ended, aborted ones apart; kept over a restart.
    LAST_COMPLETED: "last_batch_completed_timestamp_seconds" ["target"] Kind::Gauge;
    /// Share of the rooms of the last batch that were ok; aborted batches apart.
    LAST_SUCCESS_RATIO: "last_batch_success_ratio" ["target"] Kind::Gauge;
    /// Longest time between two batches in the next seven days.
    INTERVAL: "batch_interval_seconds" ["target"] Kind::Gauge;
    /// Shortest time between two batches in the next seven days.
    SHORTEST_INTERVAL: "batch_interval_shortest_seconds" ["target"] Kind::Gauge;
    /// Seven days by the number of batches that are due in them.
    MEAN_INTERVAL: "batch_interval_mean_seconds" ["target"] Kind::Gauge;
    /// Longest delay from the dispatch that is good, for the join and the first speech.
    SLO_THRESHOLD: "slo_threshold_seconds" ["target" "sli"] Kind::Gauge;
    /// Share of eligible probes that must be good.
    SLO_OBJECTIVE: "slo_objective_ratio" ["target" "sli"] Kind::Gauge;
    /// 1 while the target is paused.
    PAUSED: "target_paused" ["target"] Kind::Gauge;
    /// Settings of the target; always 1.
    TARGET_INFO: "target_info" ["target" "project" "url" "agent_name" "dispatch" "drill"] Kind::Gauge;

    /// Until when batches rest after a plan limit.
    BACKOFF_UNTIL: "backoff_until_timestamp_seconds" ["project"] Kind::Gauge;
    /// Most agent time of a UTC day or calendar month; NaN without a limit.
    BUDGET: "agent_budget_seconds" ["project" "period"] Kind::Gauge;
    /// Agent time of this UTC day or calendar month, what running probes have reserved included.
    BUDGET_USED: "agent_budget_used_seconds" ["project" "period"] Kind::Gauge;

    /// What runs; always 1.
    BUILD_INFO: "build_info" ["version" "revision" "rustc" "engine"] Kind::Gauge;
    /// 1 while the history can't be written; probing goes on.
    HISTORY_DEGRADED: "history_degraded" [] Kind::Gauge;
    /// 1 where the last load of the settings succeeded, else 0.
    RELOAD_SUCCESSFUL: "config_last_reload_successful" [] Kind::Gauge;
    /// When the settings were last loaded successfully.
    RELOAD_SUCCESS_AT: "config_last_reload_success_timestamp_seconds" [] Kind::Gauge;
}
