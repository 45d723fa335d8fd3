use fastrand::Rng;

use super::*;

fn p_value(failed: u32, good: u32, others_failed: u32, others_good: u32) -> f64 {
    let table = Table {
        failed,
        good,
        others_failed,
        others_good,
    };
    table.p_value()
}

#[test]
fn p_values_are_the_published_ones() {
    // Fisher's tea tasting (1935): 34/70. Agresti's and scipy's examples; R's fisher.test for the others.
    for (table, expected) in [
        ([3, 1, 1, 3], 0.485_714_285_714_285_7),
        ([8, 2, 1, 5], 0.034_965_034_965_034_94),
        ([6, 0, 0, 7], 1.0 / 1716.0),
        ([1, 9, 11, 3], 0.002_759_456_185_220_082_8),
        ([10, 2, 3, 15], 0.000_536_724_119_143_430_2),
        ([0, 0, 3, 4], 1.0),
        ([0, 5, 0, 9], 1.0),
        ([7, 0, 9, 0], 1.0),
    ] {
        let [bad, good, bad_others, good_others] = table;
        let found = p_value(bad, good, bad_others, good_others);
        assert!((found - expected).abs() < 1e-12, "{table:?}: {found}");
    }
}

#[test]
fn p_value_of_many_rooms_is_finite() {
    let p = p_value(900, 100, 100, 900);
    assert!(p > 0.0 && p < 1e-250, "{p}");
    assert!((p_value(500, 500, 500, 500) - 1.0).abs() < 1e-9);
}

struct Room {
    failed: bool,
    batch: String,
    values: [Option<String>; Factor::ALL.len()],
}

impl Room {
    fn new(batch: usize, failed: bool) -> Self {
        Self {
            failed,
            batch: format!("batch-{batch}"),
            values: std::array::from_fn(|_| None),
        }
    }

    fn with(mut self, factor: Factor, value: impl Into<String>) -> Self {
        self.values[factor as usize] = Some(value.into());
        self
    }
}

fn found_before(rooms: &[Room], before: &[Room]) -> Vec<Difference> {
    let [rooms, before] = [rooms, before].map(|rooms| rooms.iter().map(case).collect::<Vec<_>>());
    differences(&rooms, &before)
}

fn found(rooms: &[Room]) -> Vec<Difference> {
    found_before(rooms, &[])
}

fn case(room: &Room) -> Case<'_> {
    Case {
        failed: room.failed,
        batch_id: &room.batch,
        values: std::array::from_fn(|index| room.values[index].as_deref()),
    }
}

/// The batches of an incident, by their rooms: the scheduled one, its confirmation, then one room per minute, two more after
/// a good one, and a scheduled batch every 15 minutes.
fn incident(
    rooms: usize,
    rng: &mut Rng,
    mut room: impl FnMut(&mut Rng, usize, bool) -> Room,
) -> Vec<Room> {
    let mut all: Vec<Room> = Vec::new();
    let mut batch = 0;
    while all.len() < rooms {
        let good = all.last().is_some_and(|last| !last.failed);
        let size = match batch {
            _ if batch % 15 == 0 => 3,
            1 => 2,
            _ if good => 2,
            _ => 1,
        };
        for index in 0..size {
            let position = if index == 0 { "first" } else { "later" };
            let room = room(rng, batch, index == 0).with(Factor::Position, position);
            all.push(room);
        }
        batch += 1;
    }
    all.truncate(rooms);
    all
}

fn one_of_two(rng: &mut Rng, name: &str) -> String {
    format!("{name}_{}", if rng.bool() { "a" } else { "b" })
}

#[test]
fn poisoned_worker_of_two_is_named_after_20_rooms() {
    // An incident of half of the rooms has this many about ten minutes after the page. In half of the incidents, 12 are enough.
    const ROOMS: usize = 20;
    let mut named = 0;
    for seed in 0..200 {
        let mut rng = Rng::with_seed(seed);
        let rooms = incident(ROOMS, &mut rng, |rng, batch, _| {
            let worker = one_of_two(rng, "AW");
            let room = Room::new(batch, worker == "AW_a").with(Factor::Worker, worker);
            room.with(Factor::Node, one_of_two(rng, "ND"))
                .with(Factor::MediaPath, "udp")
        });
        let found = found(&rooms);
        if let [difference] = &found[..] {
            assert_eq!(
                (difference.factor, &*difference.value),
                (Factor::Worker, "AW_a")
            );
            assert_eq!(difference.others_failed, 0);
            assert_eq!(difference.failed, difference.rooms);
            named += 1;
        } else {
            assert!(found.is_empty(), "{found:?}");
        }
    }
    println!("named after {ROOMS} rooms in {named} of 200 incidents");
    assert!(named >= 190, "{named} of 200");
}

/// How many of these incidents name a factor, though failures are random.
fn falsely_named(
    incidents: u64,
    room: impl Fn(&mut Rng, usize, bool, &mut Batch) -> Room,
) -> usize {
    let named = (0..incidents).filter(|seed| {
        let mut rng = Rng::with_seed(*seed);
        let rooms = rng.usize(8..60);
        let mut batch = Batch::default();
        let rooms = incident(rooms, &mut rng, |rng, number, first| {
            if first {
                batch = Batch {
                    failed: rng.bool(),
                    node: one_of_two(rng, "ND"),
                };
            }
            room(rng, number, first, &mut batch)
                .with(Factor::Worker, one_of_two(rng, "AW"))
                .with(Factor::MediaPath, one_of_two(rng, "path"))
                .with(Factor::Region, one_of_two(rng, "region"))
        });
        !found(&rooms).is_empty()
    });
    named.count()
}

/// What all rooms of a batch have in common.
#[derive(Default)]
struct Batch {
    failed: bool,
    node: String,
}

#[test]
fn random_failures_name_no_factor() {
    let independent = |incidents| {
        falsely_named(incidents, |rng, batch, _, _| {
            let failed = rng.bool();
            Room::new(batch, failed).with(Factor::Node, one_of_two(rng, "ND"))
        })
    };
    assert_eq!(independent(10), 0);
    let named = independent(1000);
    println!("independent failures name a factor in {named} of 1000 incidents");
    assert!(named <= 10, "{named} of 1000");
}

#[test]
fn batches_that_fail_as_a_whole_name_no_factor() {
    let one_node = falsely_named(1000, |_, batch, _, common| {
        Room::new(batch, common.failed).with(Factor::Node, &*common.node)
    });
    let mostly_one_node = falsely_named(1000, |rng, batch, _, common| {
        let other = one_of_two(rng, "ND");
        let node = if rng.f64() < 0.7 {
            common.node.clone()
        } else {
            other
        };
        Room::new(batch, common.failed).with(Factor::Node, node)
    });
    let mostly_failed = falsely_named(1000, |rng, batch, _, common| {
        let failed = common.failed ^ (rng.f64() < 0.1);
        Room::new(batch, failed).with(Factor::Node, &*common.node)
    });
    println!("whole batches: {one_node}, {mostly_one_node}, {mostly_failed} of 1000 incidents");
    for named in [one_node, mostly_one_node, mostly_failed] {
        assert!(named <= 15, "{named} of 1000");
    }
}

#[test]
fn each_room_of_a_large_batch_counts_if_both_workers_are_in_it() {
    let rooms: Vec<_> = (0..20)
        .map(|index| {
            let worker = if index % 2 == 0 { "AW_a" } else { "AW_b" };
            Room::new(0, index % 2 == 0).with(Factor::Worker, worker)
        })
        .collect();
    let sentences: Vec<_> = found(&rooms).iter().map(Difference::sentence).collect();
    assert_eq!(
        sentences,
        ["worker AW_a fails in 10 of 10 rooms, all others in 0 of 10 (p = 1e-5)"]
    );
}

#[test]
fn batch_that_fails_as_a_whole_counts_once() {
    // Two batches: all rooms of one node fail, all of the other are good. That is a comparison of two batches.
    let rooms: Vec<_> = (0..20)
        .map(|index| {
            let node = if index < 10 { "ND_a" } else { "ND_b" };
            Room::new(index / 10, index < 10).with(Factor::Node, node)
        })
        .collect();
    assert_eq!(found(&rooms), []);
}

#[test]
fn missing_values_and_a_factor_with_one_value_are_not_tested() {
    let rooms: Vec<_> = (0..20)
        .map(|index| {
            let room = Room::new(index, index < 10).with(Factor::MediaPath, "udp");
            // No worker took the job of a failed room.
            if index < 10 {
                room
            } else {
                room.with(Factor::Worker, "AW_a")
            }
        })
        .collect();
    assert_eq!(found(&rooms), []);
}

#[test]
fn correction_counts_every_test() {
    // 5 of 5 against 0 of 5: p = 2/252 = 0.0079, which one test alone names.
    let rooms = |factors: &[Factor]| -> Vec<Room> {
        let room = |index: usize| {
            let mut room = Room::new(index, index < 5);
            for (place, factor) in factors.iter().enumerate() {
                // The other factors have nothing to do with the failures.
                let of_a = if place == 0 {
                    index < 5
                } else {
                    index.is_multiple_of(2)
                };
                room = room.with(*factor, if of_a { "a" } else { "b" });
            }
            room
        };
        (0..10).map(room).collect()
    };
    assert_eq!(found(&rooms(&[Factor::Worker])).len(), 1);
    assert_eq!(found(&rooms(&[Factor::Worker, Factor::Node])), []);
}

#[test]
fn one_value_of_three_that_fails_is_named_and_one_that_is_good_is_not() {
    let room = |index: usize| {
        let node = ["ND_a", "ND_b", "ND_c"][index % 3];
        Room::new(index, index.is_multiple_of(3)).with(Factor::Node, node)
    };
    let one_fails: Vec<_> = (0..30).map(room).collect();
    let sentences: Vec<_> = found(&one_fails).iter().map(Difference::sentence).collect();
    assert_eq!(
        sentences,
        ["node ND_a fails in 10 of 10 rooms, all others in 0 of 20 (p = 3e-8)"]
    );
    let one_is_good: Vec<_> = (0..30)
        .map(|index| {
            let room = room(index);
            Room {
                failed: !room.failed,
                ..room
            }
        })
        .collect();
    let values: Vec<_> = found(&one_is_good)
        .into_iter()
        .map(|one| one.value)
        .collect();
    assert_eq!(values, [""; 0]);
}

#[test]
fn if_all_rooms_fail_a_value_is_named_that_is_new_since_the_onset() {
    let version = |batch, failed, version: &str| {
        Room::new(batch, failed)
            .with(Factor::AgentVersion, version)
            .with(Factor::Node, "ND_a")
    };
    let before: Vec<_> = (0..30)
        .map(|batch| version(batch, false, "1.4.0"))
        .collect();
    let rooms: Vec<_> = (30..36)
        .map(|batch| version(batch, true, "1.5.0"))
        .collect();
    let found = found_before(&rooms, &before);
    let sentences: Vec<_> = found.iter().map(Difference::sentence).collect();
    assert_eq!(
        sentences,
        ["all 6 failed rooms have agent version 1.5.0, and none of the 30 rooms before had it"]
    );
    assert_eq!(found[0].p_value, None);
    // Two rooms may have a new worker by chance, and without earlier rooms nothing is new.
    assert_eq!(found_before(&rooms[..2], &before), []);
    assert_eq!(found_before(&rooms, &[]), []);
}

#[test]
fn values_without_bound_are_tested_within_a_bound() {
    let rooms: Vec<_> = (0..500)
        .map(|index| Room::new(index, index % 2 == 0).with(Factor::Worker, format!("AW_{index}")))
        .collect();
    assert_eq!(found(&rooms), []);
}
