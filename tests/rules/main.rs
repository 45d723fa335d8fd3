//! Which alerts fire in the stories of three canaries, minute by minute, in the promtool of Prometheus 3. In some stories also
//! in the promtool of Prometheus 2, so that each alert fires and clears in both. Run it with `cargo test --test rules`.
//!
//! A story is what happens to a canary at each tick; `simulation` turns it into series. A test lists each alert with the minute
//! in which it begins to fire and the minute in which it ends. It fails if another alert fires, or at another minute.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]
#![expect(
    clippy::cast_precision_loss,
    reason = "counts and seconds of a few days"
)]

mod path;
mod simulation;
mod texts;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use livekit_canary::rules::{ALERTS, Alert};
use simulation::Event::{self, *};
use simulation::{Reference, SCRAPE_INTERVAL, Story};

const QUARTER: Reference = Reference {
    name: "3 rooms every 15 min",
    rooms: 3,
    every: 15,
    objective: 0.99,
};
const FIVE: Reference = Reference {
    name: "5 rooms every 5 min",
    rooms: 5,
    every: 5,
    objective: 0.995,
};
const HOUR: Reference = Reference {
    name: "3 rooms every hour",
    rooms: 3,
    every: 60,
    objective: 0.99,
};

const REFERENCES: [Reference; 3] = [QUARTER, FIVE, HOUR];

/// An alert by its name, its severity and, if it has one, its `sli`, `limit` or `kind`; the first minute in which it fires, and
/// the first minute after that in which it doesn't.
type Fired = (&'static str, usize, Option<usize>);

/// Good batches at the start of a story, more than in a fast window.
const SHORT_START: (usize, Event) = (4, Good);
/// Good batches at the start of a story, with as many rooms as a slow alert requires.
const LONG_START: (usize, Event) = (8, Good);

#[test]
fn single_failed_rooms_and_batches_are_quiet() {
    let events = [SHORT_START, (1, OneRoom), (5, Good), (1, Blip), (5, Good)];
    expect_alerts_in_both(
        &REFERENCES.map(|reference| (Story::new(reference, &events), &[] as &[Fired])),
    );
}

#[test]
fn repaired_outage_pages_once_and_later_failures_page_by_the_burn_rate() {
    // One room of nine.
    let now_and_then = [(2, Good), (1, OneRoom)];
    let events = [
        &[SHORT_START, (4, Outage), (6, Good)][..],
        &now_and_then.repeat(6),
        &[(4, Good)],
    ]
    .concat();
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[
            ("AgentFailing page", 63, Some(123)),
            ("ErrorBudgetBurnsSlowly ticket sli=availability", 108, None),
            ("ErrorBudgetBurnsSlowly ticket sli=first_speech", 108, None),
            ("ErrorBudgetBurnsSlowly ticket sli=join", 108, None),
            ("ErrorBudgetBurnsFast page sli=availability", 333, None),
            ("ErrorBudgetBurnsFast page sli=first_speech", 333, None),
            ("ErrorBudgetBurnsFast page sli=join", 333, None),
            ("ErrorBudgetSpent ticket sli=availability", 513, None),
            ("ErrorBudgetSpent ticket sli=first_speech", 513, None),
            ("ErrorBudgetSpent ticket sli=join", 513, None),
            ("ErrorBudgetSpent ticket sli=service", 513, None),
        ],
    )]);
}

/// Before, the burn rate paged a second time for the repaired outage.
#[test]
fn long_outage_pages_once() {
    let events = [LONG_START, (24, Outage), (24, Good)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[
            ("AgentFailing page", 123, Some(483)),
            (
                "ErrorBudgetBurnsSlowly ticket sli=availability",
                153,
                Some(828),
            ),
            (
                "ErrorBudgetBurnsSlowly ticket sli=first_speech",
                153,
                Some(828),
            ),
            ("ErrorBudgetBurnsSlowly ticket sli=join", 153, Some(828)),
            ("ErrorBudgetSpent ticket sli=availability", 618, None),
            ("ErrorBudgetSpent ticket sli=first_speech", 618, None),
            ("ErrorBudgetSpent ticket sli=join", 618, None),
            ("ErrorBudgetSpent ticket sli=service", 618, None),
        ],
    )]);
}

#[test]
fn canary_that_dies_during_an_outage_does_not_end_it() {
    let events = [SHORT_START, (2, Outage), (3, Down), (3, Good)];
    expect_alerts_in_both(&[(
        Story::new(QUARTER, &events),
        &[
            ("AgentFailing page", 62, Some(136)),
            ("CanaryDown page", 95, Some(135)),
        ],
    )]);
}

/// It ends after an hour: see `texts`.
#[test]
fn outage_of_a_canary_that_is_no_longer_scraped_stays() {
    let events = [SHORT_START, (2, Outage), (3, Gone)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[
            ("AgentFailing page", 62, None),
            ("CanaryAbsent page", 100, None),
        ],
    )]);
}

/// The last value of the old pod would be an open incident, for an hour.
#[test]
fn pod_that_was_replaced_does_not_prolong_an_outage() {
    let events = [
        SHORT_START,
        (2, Outage),
        (1, Gone),
        (1, Rollout),
        (2, Down),
        (2, Good),
    ];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[
            ("AgentFailing page", 62, Some(106)),
            ("CanaryAbsent page", 100, Some(105)),
            ("CanaryDown page", 125, Some(150)),
        ],
    )]);
}

#[test]
fn target_that_was_removed_has_no_outage() {
    let events = [SHORT_START, (2, Outage), (3, Removed)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[("AgentFailing page", 62, Some(90))],
    )]);
}

#[test]
fn limit_on_the_rate_of_requests_is_only_a_ticket() {
    let events = [SHORT_START, (6, Limit("api_rate")), (1, Good)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[
            ("PlanLimitHit ticket limit=api_rate", 61, None),
            ("BackingOff ticket", 135, None),
        ],
    )]);
}

#[test]
fn limit_that_persists_makes_the_canary_blind() {
    let events = [SHORT_START, (25, Limit("api_rate")), (2, Good)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[
            ("PlanLimitHit ticket limit=api_rate", 63, None),
            ("BackingOff ticket", 135, Some(444)),
            ("CanaryBlind page", 411, Some(441)),
        ],
    )]);
}

#[test]
fn batch_that_never_ends_pages() {
    let events = [SHORT_START, (4, Hung), (4, Good)];
    expect_alerts_in_both(&[(
        Story::new(QUARTER, &events),
        &[("CanaryStuck page", 90, Some(121))],
    )]);
}

#[test]
fn canary_that_is_down_pages() {
    let events = [SHORT_START, (3, Down), (4, Good)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[("CanaryDown page", 65, Some(105))],
    )]);
}

#[test]
fn drill_that_ends_or_crashes_pages_no_one() {
    let events = [SHORT_START, (8, Good)];
    for drill in [
        // Still scraped, no longer scraped, and started again and again.
        [(2, Good), (6, Down)],
        [(2, Good), (6, Gone)],
        [(2, Good), (6, CrashLoop)],
    ] {
        let story = Story::new(QUARTER, &events).beside_drill(&drill);
        expect_alerts(&[(story, &[])]);
    }
}

#[test]
fn crash_loop_pages() {
    let events = [SHORT_START, (4, CrashLoop), (4, Good)];
    expect_alerts_in_both(&[(
        Story::new(QUARTER, &events),
        &[("CanaryCrashLooping page", 67, Some(141))],
    )]);
}

#[test]
fn outage_pages_at_once_for_any_interval() {
    let events = [LONG_START, (3, Outage), (4, Good)];
    let of = |reference| Story::new(reference, &events);
    expect_alerts(&[
        (
            of(QUARTER),
            &[
                ("AgentFailing page", 122, Some(166)),
                ("ErrorBudgetBurnsSlowly ticket sli=availability", 152, None),
                ("ErrorBudgetBurnsSlowly ticket sli=first_speech", 152, None),
                ("ErrorBudgetBurnsSlowly ticket sli=join", 152, None),
            ],
        ),
        (
            of(FIVE),
            &[
                ("AgentFailing page", 42, Some(56)),
                ("ErrorBudgetBurnsSlowly ticket sli=availability", 52, None),
                ("ErrorBudgetBurnsSlowly ticket sli=first_speech", 52, None),
                ("ErrorBudgetBurnsSlowly ticket sli=join", 52, None),
            ],
        ),
        (
            of(HOUR),
            &[
                ("AgentFailing page", 483, Some(663)),
                ("ErrorBudgetBurnsSlowly ticket sli=availability", 603, None),
                ("ErrorBudgetBurnsSlowly ticket sli=first_speech", 603, None),
                ("ErrorBudgetBurnsSlowly ticket sli=join", 603, None),
            ],
        ),
    ]);
}

#[test]
fn livekit_outage_has_its_own_pages() {
    let events = [LONG_START, (4, LiveKitDown), (6, Good)];
    expect_alerts_in_both(&[
        (
            Story::new(QUARTER, &events),
            &[
                ("ServiceFailing page", 122, Some(181)),
                ("CanaryBlind page", 144, Some(181)),
                ("ErrorBudgetBurnsSlowly ticket sli=service", 151, None),
            ],
        ),
        (
            Story::new(HOUR, &events),
            &[
                ("ServiceFailing page", 483, Some(723)),
                ("CanaryBlind page", 573, Some(723)),
                ("ErrorBudgetBurnsSlowly ticket sli=service", 603, Some(1023)),
            ],
        ),
    ]);
}

#[test]
fn one_fifth_of_lost_rooms_pages_by_the_burn_rate_of_the_service() {
    let events = [SHORT_START, (6, OneLostRoom), (30, Good)];
    expect_alerts_in_both(&[(
        Story::new(FIVE, &events),
        &[
            ("ErrorBudgetBurnsSlowly ticket sli=service", 31, None),
            ("ErrorBudgetBurnsFast page sli=service", 36, Some(136)),
            ("ErrorBudgetSpent ticket sli=service", 96, None),
        ],
    )]);
}

#[test]
fn rotated_key_has_its_own_page() {
    let events = [LONG_START, (4, RotatedKey), (4, Good)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[
            ("CredentialsRejected page", 136, Some(188)),
            ("CanaryBlind page", 144, Some(181)),
        ],
    )]);
}

#[test]
fn slow_joins_page_by_the_burn_rate_of_the_join() {
    let events = [LONG_START, (5, SlowJoins), (8, Good)];
    expect_alerts(&[
        (
            Story::new(QUARTER, &events),
            &[
                ("ErrorBudgetBurnsSlowly ticket sli=join", 151, None),
                ("ErrorBudgetBurnsFast page sli=join", 166, Some(271)),
            ],
        ),
        (
            Story::new(HOUR, &events),
            &[
                ("ErrorBudgetBurnsSlowly ticket sli=join", 603, Some(1083)),
                ("ErrorBudgetBurnsFast page sli=join", 663, Some(1083)),
            ],
        ),
    ]);
}

#[test]
fn silent_agents_open_tickets_for_everything_except_the_join() {
    let events = [LONG_START, (3, SilentAgents), (4, Good)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[
            ("AgentFailing page", 122, Some(166)),
            ("ErrorBudgetBurnsSlowly ticket sli=availability", 152, None),
            ("ErrorBudgetBurnsSlowly ticket sli=first_speech", 152, None),
        ],
    )]);
}

#[test]
fn deaf_agents_open_tickets_for_the_reply() {
    let events = [LONG_START, (3, DeafAgents), (4, Good)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[
            ("AgentFailing page", 122, Some(166)),
            ("ErrorBudgetBurnsSlowly ticket sli=availability", 152, None),
            ("ErrorBudgetBurnsSlowly ticket sli=reply", 152, None),
        ],
    )]);
}

#[test]
fn slow_replies_page_by_the_burn_rate_of_the_reply() {
    let events = [LONG_START, (5, SlowReplies), (8, Good)];
    expect_alerts(&[
        (
            Story::new(QUARTER, &events),
            &[
                ("ErrorBudgetBurnsSlowly ticket sli=reply", 151, None),
                ("ErrorBudgetBurnsFast page sli=reply", 166, Some(271)),
            ],
        ),
        (
            Story::new(HOUR, &events),
            &[
                ("ErrorBudgetBurnsSlowly ticket sli=reply", 603, Some(1083)),
                ("ErrorBudgetBurnsFast page sli=reply", 663, Some(1083)),
            ],
        ),
    ]);
}

#[test]
fn one_fifth_of_deaf_agents_pages_by_the_burn_rate_of_the_reply() {
    let events = [SHORT_START, (6, OneDeafRoom), (90, Good)];
    expect_alerts(&[(
        Story::new(FIVE, &events),
        &[
            (
                "ErrorBudgetBurnsSlowly ticket sli=availability",
                33,
                Some(408),
            ),
            ("ErrorBudgetBurnsSlowly ticket sli=reply", 33, Some(408)),
            ("ErrorBudgetBurnsFast page sli=availability", 36, Some(138)),
            ("ErrorBudgetBurnsFast page sli=reply", 36, Some(138)),
            ("ErrorBudgetSpent ticket sli=availability", 96, None),
            ("ErrorBudgetSpent ticket sli=reply", 96, None),
            ("ErrorBudgetSpent ticket sli=service", 96, None),
        ],
    )]);
}

/// No room counts towards the reply any more, so no room could end the alert.
#[test]
fn alert_ends_when_the_settings_no_longer_expect_a_reply() {
    let events = [SHORT_START, (6, OneDeafRoom), (6, ReplyOptional)];
    expect_alerts(&[(
        Story::new(FIVE, &events),
        &[
            ("ErrorBudgetBurnsSlowly ticket sli=availability", 31, None),
            ("ErrorBudgetBurnsSlowly ticket sli=reply", 31, Some(50)),
            ("ErrorBudgetBurnsFast page sli=availability", 36, None),
            ("ErrorBudgetBurnsFast page sli=reply", 36, Some(50)),
        ],
    )]);
}

#[test]
fn one_fifth_of_failed_calls_pages_by_the_burn_rate() {
    let now_and_then = [(1, OneRoom), (1, Good), (2, OneRoom), (1, Good)];
    let quarter = [
        &[SHORT_START][..],
        &now_and_then,
        &now_and_then,
        &[(28, Good)],
    ]
    .concat();
    let five = [SHORT_START, (6, OneRoom), (90, Good)];
    let hour = [
        &[SHORT_START][..],
        &now_and_then,
        &now_and_then,
        &[(8, Good)],
    ]
    .concat();
    expect_alerts(&[
        (
            Story::new(QUARTER, &quarter),
            &[
                (
                    "ErrorBudgetBurnsSlowly ticket sli=availability",
                    108,
                    Some(543),
                ),
                (
                    "ErrorBudgetBurnsSlowly ticket sli=first_speech",
                    108,
                    Some(543),
                ),
                ("ErrorBudgetBurnsSlowly ticket sli=join", 108, Some(543)),
                ("ErrorBudgetBurnsFast page sli=availability", 138, Some(273)),
                ("ErrorBudgetBurnsFast page sli=first_speech", 138, Some(273)),
                ("ErrorBudgetBurnsFast page sli=join", 138, Some(273)),
                ("ErrorBudgetSpent ticket sli=availability", 498, None),
                ("ErrorBudgetSpent ticket sli=first_speech", 498, None),
                ("ErrorBudgetSpent ticket sli=join", 498, None),
                ("ErrorBudgetSpent ticket sli=service", 498, None),
            ],
        ),
        (
            Story::new(FIVE, &five),
            &[
                (
                    "ErrorBudgetBurnsSlowly ticket sli=availability",
                    33,
                    Some(408),
                ),
                (
                    "ErrorBudgetBurnsSlowly ticket sli=first_speech",
                    33,
                    Some(408),
                ),
                ("ErrorBudgetBurnsSlowly ticket sli=join", 33, Some(408)),
                ("ErrorBudgetBurnsFast page sli=availability", 36, Some(138)),
                ("ErrorBudgetBurnsFast page sli=first_speech", 36, Some(138)),
                ("ErrorBudgetBurnsFast page sli=join", 36, Some(138)),
                ("ErrorBudgetSpent ticket sli=availability", 96, None),
                ("ErrorBudgetSpent ticket sli=first_speech", 96, None),
                ("ErrorBudgetSpent ticket sli=join", 96, None),
                ("ErrorBudgetSpent ticket sli=service", 96, None),
            ],
        ),
        (
            Story::new(HOUR, &hour),
            &[
                (
                    "ErrorBudgetBurnsSlowly ticket sli=availability",
                    423,
                    Some(1083),
                ),
                (
                    "ErrorBudgetBurnsSlowly ticket sli=first_speech",
                    423,
                    Some(1083),
                ),
                ("ErrorBudgetBurnsSlowly ticket sli=join", 423, Some(1083)),
                (
                    "ErrorBudgetBurnsFast page sli=availability",
                    543,
                    Some(1083),
                ),
                (
                    "ErrorBudgetBurnsFast page sli=first_speech",
                    543,
                    Some(1083),
                ),
                ("ErrorBudgetBurnsFast page sli=join", 543, Some(1083)),
            ],
        ),
    ]);
}

#[test]
fn limit_on_connections_that_persists_pages() {
    let events = [SHORT_START, (6, Limit("connections")), (11, Good)];
    // The maximum back-off, so that no batch is skipped.
    let hour = [SHORT_START, (6, Limit("connections")), (5, Good)];
    expect_alerts_in_both(&[
        (
            Story::new(QUARTER, &events),
            &[
                ("PlanLimitHit ticket limit=connections", 61, Some(271)),
                ("PlanLimitHit page limit=connections", 91, Some(158)),
                ("BackingOff ticket", 135, Some(173)),
            ],
        ),
        (
            Story::new(HOUR, &hour),
            &[
                ("PlanLimitHit ticket limit=connections", 243, Some(753)),
                ("PlanLimitHit page limit=connections", 363, Some(633)),
            ],
        ),
    ]);
}

#[test]
fn spent_budget_of_agent_time_is_only_a_ticket() {
    let events = [SHORT_START, (6, Spent), (4, Good)];
    expect_alerts_in_both(&[(
        Story::new(QUARTER, &events),
        &[("AgentTimeSpent ticket", 60, Some(173))],
    )]);
}

#[test]
fn dead_scheduler_pages_when_a_batch_is_overdue() {
    let events = [SHORT_START, (3, DeadScheduler), (1, Rollout), (3, Good)];
    expect_alerts_in_both(&[(
        Story::new(QUARTER, &events),
        &[("CanarySilent page", 64, Some(105))],
    )]);
}

#[test]
fn night_without_ticks_is_quiet() {
    let events = [SHORT_START, (48, Night), (4, Good)];
    expect_alerts(&[(Story::new(QUARTER, &events), &[])]);
}

#[test]
fn outage_stays_during_a_night_until_a_batch_is_good() {
    let events = [SHORT_START, (2, Outage), (24, Night), (4, Good)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[("AgentFailing page", 63, Some(453))],
    )]);
}

#[test]
fn outage_stays_while_no_batch_has_a_verdict_on_the_agent() {
    let events = [SHORT_START, (2, Outage), (4, RotatedKey), (4, Good)];
    expect_alerts_in_both(&[(
        Story::new(QUARTER, &events),
        &[
            ("AgentFailing page", 62, Some(151)),
            ("CredentialsRejected page", 106, Some(158)),
            ("CanaryBlind page", 114, Some(151)),
        ],
    )]);
}

#[test]
fn paused_target_is_muted() {
    let events = [SHORT_START, (2, Outage), (4, Paused), (4, Good)];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[("AgentFailing page", 62, Some(90))],
    )]);
}

#[test]
fn canary_that_is_no_longer_scraped_pages() {
    let events = [SHORT_START, (3, Gone), (1, Rollout), (3, Good)];
    expect_alerts_in_both(&[(
        Story::new(QUARTER, &events),
        &[("CanaryAbsent page", 70, Some(105))],
    )]);
}

#[test]
fn canary_that_was_never_scraped_pages() {
    let events = [(2, Gone), SHORT_START];
    expect_alerts(&[(
        Story::new(QUARTER, &events),
        &[("CanaryAbsent page", 10, Some(30))],
    )]);
}

#[test]
fn settings_that_stay_rejected_are_a_ticket() {
    let events = [SHORT_START, (1, BadSettings), (3, Good)];
    expect_alerts_in_both(&[
        (
            Story::new(QUARTER, &events),
            &[("ReloadFailed ticket", 65, Some(75))],
        ),
        (Story::new(FIVE, &events), &[]),
    ]);
}

#[test]
fn history_that_stays_unwritable_is_a_ticket() {
    let events = [SHORT_START, (1, FullDisk), (3, Good)];
    expect_alerts_in_both(&[
        (
            Story::new(QUARTER, &events),
            &[("HistoryDegraded ticket", 65, Some(75))],
        ),
        (Story::new(FIVE, &events), &[]),
    ]);
}

#[test]
fn room_that_can_not_be_deleted_is_a_ticket_even_if_its_target_is_paused() {
    let events = [SHORT_START, (1, LeakedRoom), (4, Paused), (6, Good)];
    expect_alerts_in_both(&[(
        Story::new(QUARTER, &events),
        &[("RoomsLeaking ticket", 61, Some(181))],
    )]);
}

#[test]
fn failure_of_the_canary_is_a_ticket() {
    let events = [SHORT_START, (1, OwnFault), (10, Good)];
    expect_alerts_in_both(&[(
        Story::new(QUARTER, &events),
        &[("InternalErrors ticket kind=probe", 61, Some(181))],
    )]);
}

#[test]
fn spent_error_budget_is_a_ticket_until_enough_rooms_are_good() {
    // With 0.95, six failed rooms of 120 would spend the budget exactly, and rounding would decide whether the alerts fire.
    let modest = Reference {
        objective: 0.951,
        ..FIVE
    };
    let events = [SHORT_START, (6, OneRoom), (20, Good)];
    expect_alerts_in_both(&[(
        Story::new(modest, &events),
        &[
            (
                "ErrorBudgetBurnsSlowly ticket sli=availability",
                31,
                Some(121),
            ),
            (
                "ErrorBudgetBurnsSlowly ticket sli=first_speech",
                31,
                Some(121),
            ),
            ("ErrorBudgetBurnsSlowly ticket sli=join", 31, Some(121)),
            ("ErrorBudgetSpent ticket sli=availability", 96, Some(121)),
            ("ErrorBudgetSpent ticket sli=first_speech", 96, Some(121)),
            ("ErrorBudgetSpent ticket sli=join", 96, Some(121)),
            ("ErrorBudgetSpent ticket sli=service", 96, Some(121)),
        ],
    )]);
}

#[test]
fn deployed_configuration_is_valid_with_its_rules() {
    let deployed = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus/prometheus.yml");
    for promtool in &programs().promtools {
        let check = Command::new(promtool)
            .args(["check", "config"])
            .arg(&deployed)
            .output()
            .unwrap();
        assert!(check.status.success(), "{}: {check:?}", promtool.display());
    }
}

/// This reads the source of the tests above.
#[test]
fn every_alert_has_a_story_in_which_it_fires_and_clears() {
    let missing = never_clears(include_str!("main.rs"));
    assert!(missing.is_empty(), "{missing:?}");
}

/// This reads the source of the tests above.
#[test]
fn every_alert_fires_and_clears_in_prometheus_2_as_well() {
    let tests = include_str!("main.rs").split("\n}\n");
    let in_both: Vec<&str> = tests
        .filter(|test| test.contains("\n    expect_alerts_in_both("))
        .collect();
    let missing = never_clears(&in_both.concat());
    assert!(missing.is_empty(), "{missing:?}");
}

/// The alerts that clear in no story of this source.
fn never_clears(source: &str) -> Vec<(&'static str, &'static str)> {
    let text: String = source.split_whitespace().collect();
    let clears = |alert: &&Alert| {
        let fires = format!("(\"{}{}", alert.name, alert.severity.name());
        let mut stories = text.split(&fires).skip(1);
        stories.any(|rest| rest.split(')').next().unwrap().contains("Some("))
    };
    let missing = ALERTS.iter().filter(|alert| !clears(alert));
    missing
        .map(|alert| (alert.name, alert.severity.name()))
        .collect()
}

/// The programs of Prometheus 2 and of Prometheus 3.
struct Programs {
    servers: [PathBuf; 2],
    promtools: [PathBuf; 2],
}

fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rules");
        let output = Command::new(folder.join("setup.sh")).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        let path = |key| {
            let mut lines = said.lines();
            let path = lines.find_map(|line| line.strip_prefix(key));
            PathBuf::from(path.unwrap())
        };
        Programs {
            servers: ["PROMETHEUS2=", "PROMETHEUS3="].map(path),
            promtools: ["PROMTOOL2=", "PROMTOOL3="].map(path),
        }
    })
}

/// In these stories these alerts fire in Prometheus 3, and no others.
fn expect_alerts(stories: &[(Story, &[Fired])]) {
    let [_, three] = &programs().promtools;
    expect_alerts_in(&[three], stories);
}

/// In these stories these alerts fire, and no others, in Prometheus 2 as well. Its range selectors also contain a sample exactly
/// at the start of the window. A few stories show that no alert depends on that.
fn expect_alerts_in_both(stories: &[(Story, &[Fired])]) {
    expect_alerts_in(&programs().promtools.each_ref(), stories);
}

fn expect_alerts_in(promtools: &[&PathBuf], stories: &[(Story, &[Fired])]) {
    let differences: Vec<String> = stories
        .iter()
        .filter_map(|(story, expected)| difference(promtools, story, expected))
        .collect();
    assert!(differences.is_empty(), "{}", differences.concat());
}

fn difference(promtools: &[&PathBuf], story: &Story, expected: &[Fired]) -> Option<String> {
    let failed = promtools.iter().find_map(|promtool| {
        let run = run(promtool, story, expected);
        (!run.passed).then_some((promtool, run.output))
    });
    let (promtool, output) = failed?;
    let seen = observed(story, &run(promtool, story, &[]).output);
    Some(format!(
        "{}, {}: expected\n{}seen\n{}{}",
        story.reference.name,
        promtool.display(),
        table(
            expected
                .iter()
                .map(|(alert, from, until)| (*alert, *from, *until))
        ),
        table(
            seen.iter()
                .map(|(alert, from, until)| (alert.as_str(), *from, *until))
        ),
        if seen.is_empty() { output.as_str() } else { "" }
    ))
}

fn table<'a>(fired: impl Iterator<Item = (&'a str, usize, Option<usize>)>) -> String {
    let rows = fired.map(|(alert, from, until)| format!("    ({alert:?}, {from}, {until:?}),\n"));
    rows.collect()
}

struct Run {
    passed: bool,
    output: String,
}

/// Writes the output of `livekit-canary rules` with these arguments to `rules.yml` in `dir`.
fn write_rules(dir: &Path, args: &[&str]) {
    let rules = Command::new(support::canary::binary())
        .arg("rules")
        .args(args)
        .current_dir(dir)
        .env_clear()
        .output()
        .unwrap();
    assert!(rules.status.success(), "{rules:?}");
    std::fs::write(dir.join("rules.yml"), rules.stdout).unwrap();
}

/// Lets promtool evaluate the rules for a story, and compare the firing alerts of every minute.
fn run(promtool: &Path, story: &Story, expected: &[Fired]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    write_rules(folder.path(), &[]);
    std::fs::write(folder.path().join("tests.yml"), unit_tests(story, expected)).unwrap();
    promtool_test(promtool, folder.path())
}

/// Runs the unit tests of `tests.yml` in `dir`.
fn promtool_test(promtool: &Path, dir: &Path) -> Run {
    let output = Command::new(promtool)
        .args(["test", "rules", "tests.yml"])
        .current_dir(dir)
        // By default, a quarter of the time goes to the garbage collector. With a limit of 1 GiB, as much goes to page faults.
        .envs([("GOGC", "off"), ("GOMEMLIMIT", "256MiB")])
        .output()
        .unwrap();
    Run {
        passed: output.status.success(),
        output: String::from_utf8([output.stdout, output.stderr].concat()).unwrap(),
    }
}

/// The firing alerts, by the labels that distinguish them here.
const FIRING: &str =
    "count by (alertname, severity, sli, limit, kind) (ALERTS{alertstate='firing'})";

/// Minutes between two evaluations; more in a long story. It is at most five, because an alert that stays reads its state of the
/// previous evaluation, and Prometheus looks back for five minutes.
fn step(story: &Story) -> usize {
    if story.minutes() > 360 { 3 } else { 1 }
}

/// Without an order, promtool uses a random one. Then an alert that reads a series of the other group could fire one step earlier
/// or later.
const GROUPS: &str = "[livekit-canary-incidents, livekit-canary, livekit-canary-slow]";

/// The begin of promtool's unit tests, up to the series.
fn test_head(evaluation_interval: &str, interval: &str) -> String {
    format!(
        "rule_files: [rules.yml]\ngroup_eval_order: {GROUPS}\nevaluation_interval: {evaluation_interval}\ntests:\n\
        - interval: {interval}\n  input_series:\n"
    )
}

fn unit_tests(story: &Story, expected: &[Fired]) -> String {
    let mut text = test_head(&format!("{}m", step(story)), &format!("{SCRAPE_INTERVAL}s"));
    for (series, values) in story.series() {
        writeln!(text, "  - series: '{series}'\n    values: '{values}'").unwrap();
    }
    text.push_str("  promql_expr_test:\n");
    for minute in (0..story.minutes()).step_by(step(story)) {
        let firing = expected
            .iter()
            .filter(|(_, from, until)| *from <= minute && until.is_none_or(|until| minute < until));
        let firing: Vec<String> = firing
            .map(|(alert, _, _)| format!("    - {{labels: '{}', value: 1}}\n", labels(alert)))
            .collect();
        writeln!(text, "  - expr: \"{FIRING}\"\n    eval_time: {minute}m").unwrap();
        if !firing.is_empty() {
            write!(text, "    exp_samples:\n{}", firing.concat()).unwrap();
        }
    }
    text
}

/// `AgentFailing page sli=join` as labels.
fn labels(alert: &str) -> String {
    let mut words = alert.split(' ');
    let [name, severity] = [words.next().unwrap(), words.next().unwrap()];
    let mut labels = format!("{{alertname=\"{name}\", severity=\"{severity}\"");
    for word in words {
        let (label, value) = word.split_once('=').unwrap();
        write!(labels, ", {label}=\"{value}\"").unwrap();
    }
    labels + "}"
}

/// Which alerts fired when, from promtool's output for a test that expects none.
fn observed(story: &Story, output: &str) -> Vec<(String, usize, Option<usize>)> {
    let mut minutes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut minute = 0;
    let step = step(story);
    for line in output.lines() {
        if let Some((_, rest)) = line.split_once(", time: ") {
            minute = minutes_of(rest.split(',').next().unwrap());
        }
        if let Some((_, got)) = line.split_once("got:") {
            for sample in got.split('{').skip(1) {
                let (labels, _) = sample.split_once('}').unwrap();
                minutes.entry(alert_of(labels)).or_default().push(minute);
            }
        }
    }
    let mut seen = Vec::new();
    for (alert, minutes) in minutes {
        for run in minutes.chunk_by(|one, next| one + step == *next) {
            let end = run[run.len() - 1] + step;
            seen.push((
                alert.clone(),
                run[0],
                (end < story.minutes()).then_some(end),
            ));
        }
    }
    seen.sort_by_key(|(_, from, _)| *from);
    seen
}

fn alert_of(labels: &str) -> String {
    let labels: BTreeMap<&str, &str> = labels
        .split(", ")
        .map(|label| label.split_once('=').unwrap())
        .collect();
    let value = |label| labels.get(label).map(|value| value.trim_matches('"'));
    let mut alert = format!(
        "{} {}",
        value("alertname").unwrap(),
        value("severity").unwrap()
    );
    for label in ["sli", "limit", "kind"] {
        if let Some(value) = value(label) {
            write!(alert, " {label}={value}").unwrap();
        }
    }
    alert
}

/// `1h5m` is 65.
fn minutes_of(duration: &str) -> usize {
    let mut total = 0;
    let mut number = 0;
    for char in duration.trim().chars() {
        match char {
            '0'..='9' => number = number * 10 + char.to_digit(10).unwrap() as usize,
            unit => {
                total += match unit {
                    'd' => number * 24 * 60,
                    'h' => number * 60,
                    'm' => number,
                    _ => 0,
                };
                number = 0;
            }
        }
    }
    total
}
