use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use super::*;
use crate::config::Batch;
use crate::report::sample;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);

/// A guard whose wall clock the test sets.
struct GuardFixture {
    guard: Guard,
    now: Arc<Mutex<DateTime<Utc>>>,
    opened: usize,
}

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn project(max_rooms: usize, day: Option<Duration>, month: Option<Duration>) -> Project {
    Project {
        max_rooms,
        budget: Budget {
            agent_time_per_day: day,
            agent_time_per_month: month,
        },
        ..sample::project()
    }
}

impl GuardFixture {
    fn new(project: &Project) -> Self {
        let now = Arc::new(Mutex::new(at("2026-03-10T12:00:00Z")));
        let clock = Arc::clone(&now);
        let history = History::in_memory(Arc::new(move || *clock.lock().unwrap()));
        Self {
            guard: Guard::new("acme", project, history),
            now,
            opened: 0,
        }
    }

    fn set(&self, now: &str) {
        *self.now.lock().unwrap() = at(now);
    }

    async fn open(&mut self, worst_case: Duration) -> Result<Reservation, Denial> {
        self.opened += 1;
        let room = RoomName(format!("canary-test-{}", self.opened));
        let mut reservation = self
            .guard
            .reserve(&room, "support", Purpose::Scheduled, worst_case)
            .await?;
        reservation.opened();
        Ok(reservation)
    }

    async fn denied(&mut self, worst_case: Duration) -> Denial {
        let announced = self.guard.denial(worst_case);
        let denial = self.open(worst_case).await.unwrap_err();
        assert_eq!(
            announced.as_ref(),
            Some(&denial),
            "the announced denial and the real one differ"
        );
        denial
    }

    /// How long the back-off still lasts.
    fn backoff(&self) -> Option<Duration> {
        let until = self.guard.backoff_until()?;
        Some((until - *self.now.lock().unwrap()).to_std().unwrap())
    }
}

fn target(rooms: usize, stay: Stay) -> Target {
    Target {
        batch: Batch {
            rooms,
            stay,
            ..Batch::default()
        },
        ..Target::default()
    }
}

fn together(rooms: usize) -> Target {
    target(rooms, Stay::Together)
}

type WaitingBatch<'a> = Pin<Box<dyn Future<Output = RoomPermits> + 'a>>;

fn queue<'a>(guard: &'a Guard, target: &'a Target) -> WaitingBatch<'a> {
    Box::pin(guard.acquire(target))
}

async fn poll_once(waiting: &mut WaitingBatch<'_>) -> Option<RoomPermits> {
    poll_fn(|context| {
        Poll::Ready(match waiting.as_mut().poll(context) {
            Poll::Ready(permits) => Some(permits),
            Poll::Pending => None,
        })
    })
    .await
}

// Agent time.

#[tokio::test(start_paused = true)]
async fn room_opens_only_if_its_worst_case_fits_into_the_daily_budget() {
    let mut fixture = GuardFixture::new(&project(5, Some(10 * MINUTE), None));
    let first = fixture.open(4 * MINUTE).await.unwrap();
    let _second = fixture.open(4 * MINUTE).await.unwrap();
    let denial = fixture.denied(3 * MINUTE).await;
    assert_eq!(
        denial.to_string(),
        "agent-time budget reached: 8m of 10m used or reserved this UTC day, and one more room could use 3m; the count \
         restarts at 2026-03-11 00:00 UTC"
    );
    assert_eq!(denial.label(), "budget");
    assert_eq!(denial.until(), Some(at("2026-03-11T00:00:00Z")));
    let _exactly = fixture.open(2 * MINUTE).await.unwrap();
    fixture.denied(SECOND).await;
    first.settle(MINUTE);
    let _fits = fixture.open(3 * MINUTE).await.unwrap();
    assert_eq!(fixture.guard.used(Period::Day), 10 * MINUTE);
    assert_eq!(fixture.guard.limit(Period::Day), Some(10 * MINUTE));
    assert_eq!(fixture.guard.limit(Period::Month), None);
}

#[tokio::test(start_paused = true)]
async fn new_day_and_new_month_count_from_zero() {
    let mut fixture = GuardFixture::new(&project(5, Some(2 * MINUTE), Some(3 * MINUTE)));
    fixture.set("2026-12-30T23:59:59Z");
    let _one = fixture.open(2 * MINUTE).await.unwrap();
    let denial = fixture.denied(MINUTE).await;
    assert_eq!(denial.until(), Some(at("2026-12-31T00:00:00Z")));

    fixture.set("2026-12-31T00:00:00Z");
    let _two = fixture.open(MINUTE).await.unwrap();
    let denial = fixture.denied(MINUTE).await;
    assert!(matches!(
        denial,
        Denial::Budget {
            period: Period::Month,
            ..
        }
    ));
    assert_eq!(denial.until(), Some(at("2027-01-01T00:00:00Z")));

    fixture.set("2027-01-01T00:00:00Z");
    assert_eq!(fixture.guard.denial(2 * MINUTE), None);
    let _three = fixture.open(2 * MINUTE).await.unwrap();
    assert_eq!(fixture.guard.used(Period::Month), 2 * MINUTE);
}

#[tokio::test(start_paused = true)]
async fn without_a_budget_nothing_is_denied_and_everything_is_counted() {
    let mut fixture = GuardFixture::new(&project(5, None, None));
    for _ in 0..100 {
        drop(fixture.open(HOUR).await.unwrap());
    }
    assert_eq!(fixture.guard.used(Period::Month), 100 * HOUR);
}

#[tokio::test(start_paused = true)]
async fn unread_ledger_denies_every_room_of_a_project_with_a_budget_and_does_not_count_as_lost() {
    let settings = crate::config::HistorySettings {
        dir: "Cargo.toml/is-no-folder".into(),
        ..crate::config::HistorySettings::default()
    };
    let history = History::open(&settings).unwrap();
    let with = Guard::new("acme", &project(5, None, Some(HOUR)), history.clone());
    let without = Guard::new("beta", &project(5, None, None), history.clone());
    let denial = with.denial(MINUTE).unwrap();
    assert_eq!(denial, Denial::LedgerUnread);
    assert_eq!((denial.label(), denial.until()), ("budget", None));
    assert!(!denial.to_string().contains("lost"), "{denial}");
    assert_eq!(without.denial(MINUTE), None);
    history.accept_lost_ledger();
    assert_eq!(with.denial(MINUTE), None);
}

#[tokio::test]
async fn lost_ledger_denies_every_room_of_a_project_with_a_budget_until_it_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("history.sqlite3"), "no database").unwrap();
    let settings = crate::config::HistorySettings {
        dir: folder.path().to_owned(),
        ..crate::config::HistorySettings::default()
    };
    let history = History::open(&settings).unwrap();
    let with = Guard::new("acme", &project(5, None, Some(HOUR)), history.clone());
    let denial = with.denial(MINUTE).unwrap();
    assert_eq!(denial, Denial::LedgerLost);
    assert!(
        denial.to_string().contains("--accept-lost-ledger"),
        "{denial}"
    );
    history.accept_lost_ledger();
    assert_eq!(with.denial(MINUTE), None);
}

#[tokio::test(start_paused = true)]
async fn changed_budget_applies_at_once() {
    let mut fixture = GuardFixture::new(&project(5, Some(10 * MINUTE), None));
    let _open = fixture.open(4 * MINUTE).await.unwrap();
    fixture.guard.configure(&project(5, Some(5 * MINUTE), None));
    fixture.denied(2 * MINUTE).await;
    fixture.guard.configure(&project(5, None, None));
    let _open = fixture.open(2 * MINUTE).await.unwrap();
}

// Back-off.

#[tokio::test(start_paused = true)]
async fn after_a_rejection_no_room_opens_until_the_backoff_ends() {
    let mut fixture = GuardFixture::new(&sample::project());
    assert_eq!(fixture.guard.backoff_until(), None);
    fixture
        .guard
        .record_rejection(LimitKind::ApiRate, Some(7 * SECOND));
    assert_eq!(fixture.backoff(), Some(7 * SECOND));
    let denial = fixture.denied(MINUTE).await;
    assert_eq!(denial.label(), "backoff");
    assert_eq!(denial.until(), Some(at("2026-03-10T12:00:07Z")));
    assert_eq!(
        denial.to_string(),
        "plan limit reached: no new rooms on this project until 2026-03-10 12:00:07 UTC"
    );
    tokio::time::advance(7 * SECOND).await;
    assert_eq!(fixture.guard.backoff_until(), None);
    let _open = fixture.open(MINUTE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn backoff_doubles_with_jitter_and_neither_it_nor_retry_after_exceeds_the_maximum() {
    let fixture = GuardFixture::new(&sample::project());
    let (first, max) = (MINUTE, HOUR);
    for times in 0..40 {
        fixture.guard.record_rejection(LimitKind::Connections, None);
        let backoff = fixture.backoff().unwrap();
        let min = first.saturating_mul(2_u32.saturating_pow(times)).min(max);
        assert!(
            backoff >= min && backoff <= (min + min / 4).min(max),
            "{times}: {backoff:?}"
        );
        tokio::time::advance(backoff).await;
    }
    fixture
        .guard
        .record_rejection(LimitKind::Connections, Some(48 * HOUR));
    assert_eq!(fixture.backoff(), Some(max));
}

#[tokio::test(start_paused = true)]
async fn rejections_of_rooms_that_were_already_open_count_once_and_the_latest_end_applies() {
    let fixture = GuardFixture::new(&sample::project());
    for _ in 0..5 {
        fixture.guard.record_rejection(LimitKind::Connections, None);
    }
    let backoff = fixture.backoff().unwrap();
    assert!(backoff <= MINUTE + MINUTE / 4, "{backoff:?}");
    fixture
        .guard
        .record_rejection(LimitKind::ApiRate, Some(SECOND));
    assert_eq!(fixture.backoff(), Some(backoff));
    fixture
        .guard
        .record_rejection(LimitKind::ApiRate, Some(10 * MINUTE));
    assert_eq!(fixture.backoff(), Some(10 * MINUTE));
    tokio::time::advance(10 * MINUTE).await;
    fixture.guard.record_rejection(LimitKind::ApiRate, None);
    assert!(fixture.backoff().unwrap() >= 2 * MINUTE);
}

#[tokio::test(start_paused = true)]
async fn batch_without_a_rejection_makes_the_next_backoff_short_if_it_began_after_the_last_rejection()
 {
    let fixture = GuardFixture::new(&sample::project());
    let before = fixture.guard.acquire(&together(1)).await;
    for _ in 0..4 {
        fixture.guard.record_rejection(LimitKind::ApiRate, None);
        tokio::time::advance(HOUR).await;
    }
    // This batch began before the rejections, so it does not reset the back-off.
    before.confirm_none_rejected();
    fixture.guard.record_rejection(LimitKind::ApiRate, None);
    assert!(fixture.backoff().unwrap() >= 16 * MINUTE);
    tokio::time::advance(HOUR).await;

    fixture
        .guard
        .acquire(&together(1))
        .await
        .confirm_none_rejected();
    fixture.guard.record_rejection(LimitKind::ApiRate, None);
    assert!(fixture.backoff().unwrap() <= MINUTE + MINUTE / 4);
}

// Rooms at once.

#[tokio::test(start_paused = true)]
async fn batches_get_permits_in_the_order_in_which_they_asked() {
    let guard = GuardFixture::new(&project(5, None, None)).guard;
    let (three, two, one) = (together(3), together(2), target(9, Stay::OneByOne));
    let first = guard.acquire(&three).await;
    assert_eq!(first.count(), 3);
    let mut second = queue(&guard, &three);
    let mut third = queue(&guard, &two);
    let mut fourth = queue(&guard, &one);
    assert!(poll_once(&mut second).await.is_none());
    assert!(
        poll_once(&mut third).await.is_none(),
        "it would fit, but it asked later"
    );
    assert!(poll_once(&mut fourth).await.is_none());
    drop(first);
    let second = second.await;
    let third = third.await;
    assert!(poll_once(&mut fourth).await.is_none());
    drop(third);
    assert_eq!(fourth.await.count(), 1);
    drop(second);
}

#[tokio::test(start_paused = true)]
async fn batch_that_stops_waiting_does_not_hold_up_the_next() {
    let guard = GuardFixture::new(&project(3, None, None)).guard;
    let (three, one) = (together(3), together(1));
    let first = guard.acquire(&one).await;
    let mut second = queue(&guard, &three);
    let mut third = queue(&guard, &one);
    assert!(poll_once(&mut second).await.is_none());
    assert!(poll_once(&mut third).await.is_none());
    drop(second);
    assert_eq!(third.await.count(), 1);
    drop(first);
    assert_eq!(guard.acquire(&three).await.count(), 3);
}

#[tokio::test(start_paused = true)]
async fn changed_limit_applies_to_waiting_batches_and_closes_no_open_room() {
    let guard = GuardFixture::new(&project(5, None, None)).guard;
    let five = together(5);
    let first = guard.acquire(&five).await;
    let mut second = queue(&guard, &five);
    assert!(poll_once(&mut second).await.is_none());
    guard.configure(&project(3, None, None));
    assert!(poll_once(&mut second).await.is_none());
    drop(first);
    let second = second.await;
    assert_eq!(second.count(), 3, "as many as the project may hold");
    let mut third = queue(&guard, &five);
    assert!(poll_once(&mut third).await.is_none());
    guard.configure(&project(10, None, None));
    assert_eq!(third.await.count(), 5);
}

// Worst cases.

#[test]
fn worst_case_of_a_room_grows_with_the_number_of_later_rooms() {
    let project = sample::project();
    let minutes = |target: &Target| -> Vec<u64> {
        let cases = worst_cases(target, &project);
        cases.map(|case| case.as_secs() / 60).collect()
    };
    // A join is decided after at most 80 s. The last room is held for 15 s, but its verdict may take 192 s, because a reply
    // is expected. Leaving and deleting take 20 s.
    assert_eq!(minutes(&together(3)), [4, 4, 4]);
    assert_eq!(minutes(&together(6)), [8, 6, 5, 4, 4, 4]);
    assert_eq!(minutes(&together(1)), [4]);
    assert_eq!(minutes(&target(3, Stay::OneByOne)), [4, 4, 4]);
    // Without that, a turn under way may still take 92 s after the hold.
    let mut unanswered = together(1);
    unanswered.expect.reply = false;
    assert_eq!(minutes(&unanswered), [3]);
    let ramp = |ramp| {
        let mut target = together(3);
        target.batch.ramp = ramp;
        target.batch.interval = 30 * SECOND;
        target.batch.hold = 120 * SECOND;
        target
    };
    assert_eq!(minutes(&ramp(RampMode::Interval)), [5, 5, 4]);
    assert_eq!(minutes(&ramp(RampMode::Burst)), [4, 4, 4]);
}

// Spare places.

#[tokio::test(start_paused = true)]
async fn confirmation_takes_only_places_that_no_batch_uses_or_waits_for() {
    let fixture = GuardFixture::new(&project(3, None, None));
    let guard = &fixture.guard;
    let two = together(2);
    let held = guard.acquire(&two).await;
    let spare = guard.take_spare(2, &CancellationToken::new()).unwrap();
    assert_eq!(spare.count(), 1, "the rest is free");
    assert!(guard.take_spare(1, &CancellationToken::new()).is_none());
    drop(spare);
    let three = together(3);
    let mut waiting = queue(guard, &three);
    assert!(poll_once(&mut waiting).await.is_none());
    let none = guard.take_spare(1, &CancellationToken::new());
    assert!(none.is_none(), "a batch waits for the free place");
    drop(held);
    assert!(poll_once(&mut waiting).await.is_some());
}

#[tokio::test(start_paused = true)]
async fn confirmation_gives_way_to_a_batch_that_needs_its_places_and_only_then() {
    let fixture = GuardFixture::new(&project(3, None, None));
    let guard = &fixture.guard;
    let give_way = CancellationToken::new();
    let spare = guard.take_spare(1, &give_way).unwrap();
    let two = together(2);
    let fits = guard.acquire(&two).await;
    assert!(!give_way.is_cancelled(), "there was a place for both");
    drop(fits);
    let three = together(3);
    let mut waiting = queue(guard, &three);
    assert!(poll_once(&mut waiting).await.is_none());
    assert!(give_way.is_cancelled());
    drop(spare);
    let permits = poll_once(&mut waiting).await.expect("its turn");
    assert_eq!((permits.count(), guard.rooms_held()), (3, 3));
}
