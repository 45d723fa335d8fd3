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
        let mut reservation = self.guard.reserve(&room, "support", worst_case).await?;
        reservation.opened();
        Ok(reservation)
    }

    async fn refused(&mut self, worst_case: Duration) -> Denial {
        let told = self.guard.refusal(worst_case);
        let refusal = self.open(worst_case).await.unwrap_err();
        assert_eq!(
            told.as_ref(),
            Some(&refusal),
            "what is told is what is done"
        );
        refusal
    }

    /// How long the project rests.
    fn rest(&self) -> Option<Duration> {
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

type Waiting<'a> = Pin<Box<dyn Future<Output = RoomPermits> + 'a>>;

fn queue<'a>(guard: &'a Guard, target: &'a Target) -> Waiting<'a> {
    Box::pin(guard.acquire(target))
}

async fn now_or_not(waiting: &mut Waiting<'_>) -> Option<RoomPermits> {
    poll_fn(|context| {
        Poll::Ready(match waiting.as_mut().poll(context) {
            Poll::Ready(places) => Some(places),
            Poll::Pending => None,
        })
    })
    .await
}

// Agent time.

#[tokio::test(start_paused = true)]
async fn a_room_opens_only_if_its_worst_case_fits_into_the_day() {
    let mut fixture = GuardFixture::new(&project(5, Some(10 * MINUTE), None));
    let first = fixture.open(4 * MINUTE).await.unwrap();
    let _second = fixture.open(4 * MINUTE).await.unwrap();
    let refusal = fixture.refused(3 * MINUTE).await;
    assert_eq!(
        refusal.to_string(),
        "agent-time budget reached: 8m of 10m used this UTC day, and one more room could use 3m; the count restarts at \
         2026-03-11 00:00 UTC"
    );
    assert_eq!(refusal.label(), "budget");
    assert_eq!(refusal.until(), Some(at("2026-03-11T00:00:00Z")));
    let _exactly = fixture.open(2 * MINUTE).await.unwrap();
    fixture.refused(SECOND).await;
    first.settle(MINUTE);
    let _fits = fixture.open(3 * MINUTE).await.unwrap();
    assert_eq!(fixture.guard.used(Period::Day), 10 * MINUTE);
    assert_eq!(fixture.guard.limit(Period::Day), Some(10 * MINUTE));
    assert_eq!(fixture.guard.limit(Period::Month), None);
}

#[tokio::test(start_paused = true)]
async fn a_new_day_and_a_new_month_count_anew() {
    let mut fixture = GuardFixture::new(&project(5, Some(2 * MINUTE), Some(3 * MINUTE)));
    fixture.set("2026-12-30T23:59:59Z");
    let _one = fixture.open(2 * MINUTE).await.unwrap();
    let refusal = fixture.refused(MINUTE).await;
    assert_eq!(refusal.until(), Some(at("2026-12-31T00:00:00Z")));

    fixture.set("2026-12-31T00:00:00Z");
    let _two = fixture.open(MINUTE).await.unwrap();
    let refusal = fixture.refused(MINUTE).await;
    assert!(matches!(
        refusal,
        Denial::Budget {
            period: Period::Month,
            ..
        }
    ));
    assert_eq!(refusal.until(), Some(at("2027-01-01T00:00:00Z")));

    fixture.set("2027-01-01T00:00:00Z");
    assert_eq!(fixture.guard.refusal(2 * MINUTE), None);
    let _three = fixture.open(2 * MINUTE).await.unwrap();
    assert_eq!(fixture.guard.used(Period::Month), 2 * MINUTE);
}

#[tokio::test(start_paused = true)]
async fn without_a_budget_nothing_is_refused_and_all_is_counted() {
    let mut fixture = GuardFixture::new(&project(5, None, None));
    for _ in 0..100 {
        drop(fixture.open(HOUR).await.unwrap());
    }
    assert_eq!(fixture.guard.used(Period::Month), 100 * HOUR);
}

#[tokio::test(start_paused = true)]
async fn a_lost_ledger_refuses_where_there_is_a_budget_until_it_is_accepted() {
    let settings = crate::config::HistorySettings {
        dir: "Cargo.toml/is-no-folder".into(),
        ..crate::config::HistorySettings::default()
    };
    let history = History::open(&settings).unwrap();
    let with = Guard::new("acme", &project(5, None, Some(HOUR)), history.clone());
    let without = Guard::new("beta", &project(5, None, None), history.clone());
    let refusal = with.refusal(MINUTE).unwrap();
    assert_eq!(refusal, Denial::LedgerLost);
    assert_eq!((refusal.label(), refusal.until()), ("budget", None));
    assert_eq!(without.refusal(MINUTE), None);
    history.accept_lost_ledger();
    assert_eq!(with.refusal(MINUTE), None);
}

#[tokio::test(start_paused = true)]
async fn a_changed_budget_counts_at_once() {
    let mut fixture = GuardFixture::new(&project(5, Some(10 * MINUTE), None));
    let _open = fixture.open(4 * MINUTE).await.unwrap();
    fixture.guard.configure(&project(5, Some(5 * MINUTE), None));
    fixture.refused(2 * MINUTE).await;
    fixture.guard.configure(&project(5, None, None));
    let _open = fixture.open(2 * MINUTE).await.unwrap();
}

// Rest.

#[tokio::test(start_paused = true)]
async fn after_a_rejection_no_room_opens_until_the_rest_is_over() {
    let mut fixture = GuardFixture::new(&sample::project());
    assert_eq!(fixture.guard.backoff_until(), None);
    fixture
        .guard
        .record_rejection(LimitKind::ApiRate, Some(7 * SECOND));
    assert_eq!(fixture.rest(), Some(7 * SECOND));
    let refusal = fixture.refused(MINUTE).await;
    assert_eq!(refusal.label(), "backoff");
    assert_eq!(refusal.until(), Some(at("2026-03-10T12:00:07Z")));
    assert_eq!(
        refusal.to_string(),
        "plan limit reached: no new rooms on this project until 2026-03-10 12:00:07 UTC"
    );
    tokio::time::advance(7 * SECOND).await;
    assert_eq!(fixture.guard.backoff_until(), None);
    let _open = fixture.open(MINUTE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_rest_doubles_with_jitter_and_neither_it_nor_retry_after_exceeds_the_longest() {
    let fixture = GuardFixture::new(&sample::project());
    let (first, longest) = (MINUTE, HOUR);
    for times in 0..40 {
        fixture.guard.record_rejection(LimitKind::Connections, None);
        let rest = fixture.rest().unwrap();
        let least = first
            .saturating_mul(2_u32.saturating_pow(times))
            .min(longest);
        assert!(
            rest >= least && rest <= (least + least / 4).min(longest),
            "{times}: {rest:?}"
        );
        tokio::time::advance(rest).await;
    }
    fixture
        .guard
        .record_rejection(LimitKind::Connections, Some(48 * HOUR));
    assert_eq!(fixture.rest(), Some(longest));
}

#[tokio::test(start_paused = true)]
async fn rejections_of_rooms_that_were_open_already_count_once_and_the_longest_wait_stands() {
    let fixture = GuardFixture::new(&sample::project());
    for _ in 0..5 {
        fixture.guard.record_rejection(LimitKind::Connections, None);
    }
    let rest = fixture.rest().unwrap();
    assert!(rest <= MINUTE + MINUTE / 4, "{rest:?}");
    fixture
        .guard
        .record_rejection(LimitKind::ApiRate, Some(SECOND));
    assert_eq!(fixture.rest(), Some(rest));
    fixture
        .guard
        .record_rejection(LimitKind::ApiRate, Some(10 * MINUTE));
    assert_eq!(fixture.rest(), Some(10 * MINUTE));
    tokio::time::advance(10 * MINUTE).await;
    fixture.guard.record_rejection(LimitKind::ApiRate, None);
    assert!(fixture.rest().unwrap() >= 2 * MINUTE);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_began_after_the_last_rejection_and_met_none_makes_the_next_rest_short() {
    let fixture = GuardFixture::new(&sample::project());
    let before = fixture.guard.acquire(&together(1)).await;
    for _ in 0..4 {
        fixture.guard.record_rejection(LimitKind::ApiRate, None);
        tokio::time::advance(HOUR).await;
    }
    // It says nothing of what came after it began.
    before.confirm_none_rejected();
    fixture.guard.record_rejection(LimitKind::ApiRate, None);
    assert!(fixture.rest().unwrap() >= 16 * MINUTE);
    tokio::time::advance(HOUR).await;

    fixture
        .guard
        .acquire(&together(1))
        .await
        .confirm_none_rejected();
    fixture.guard.record_rejection(LimitKind::ApiRate, None);
    assert!(fixture.rest().unwrap() <= MINUTE + MINUTE / 4);
}

// Rooms at once.

#[tokio::test(start_paused = true)]
async fn batches_wait_for_places_in_the_order_in_which_they_came() {
    let guard = GuardFixture::new(&project(5, None, None)).guard;
    let (three, two, one) = (together(3), together(2), target(9, Stay::OneByOne));
    let first = guard.acquire(&three).await;
    assert_eq!(first.count(), 3);
    let mut second = queue(&guard, &three);
    let mut third = queue(&guard, &two);
    let mut fourth = queue(&guard, &one);
    assert!(now_or_not(&mut second).await.is_none());
    assert!(
        now_or_not(&mut third).await.is_none(),
        "it would fit, but came later"
    );
    assert!(now_or_not(&mut fourth).await.is_none());
    drop(first);
    let second = second.await;
    let third = third.await;
    assert!(now_or_not(&mut fourth).await.is_none());
    drop(third);
    assert_eq!(fourth.await.count(), 1);
    drop(second);
}

#[tokio::test(start_paused = true)]
async fn whoever_gives_up_waiting_holds_nobody_up() {
    let guard = GuardFixture::new(&project(3, None, None)).guard;
    let (three, one) = (together(3), together(1));
    let first = guard.acquire(&one).await;
    let mut second = queue(&guard, &three);
    let mut third = queue(&guard, &one);
    assert!(now_or_not(&mut second).await.is_none());
    assert!(now_or_not(&mut third).await.is_none());
    drop(second);
    assert_eq!(third.await.count(), 1);
    drop(first);
    assert_eq!(guard.acquire(&three).await.count(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_changed_limit_counts_for_those_who_wait_and_shuts_no_open_room() {
    let guard = GuardFixture::new(&project(5, None, None)).guard;
    let five = together(5);
    let first = guard.acquire(&five).await;
    let mut second = queue(&guard, &five);
    assert!(now_or_not(&mut second).await.is_none());
    guard.configure(&project(3, None, None));
    assert!(now_or_not(&mut second).await.is_none());
    drop(first);
    let second = second.await;
    assert_eq!(second.count(), 3, "as many as there may ever be");
    let mut third = queue(&guard, &five);
    assert!(now_or_not(&mut third).await.is_none());
    guard.configure(&project(10, None, None));
    assert_eq!(third.await.count(), 5);
}

// What a room may use.

#[test]
fn worst_case_of_a_room_grows_with_the_rooms_that_come_after_it() {
    let project = sample::project();
    let minutes = |target: &Target| -> Vec<u64> {
        let cases = worst_cases(target, &project);
        cases.map(|case| case.as_secs() / 60).collect()
    };
    // A join is decided after 80 s at most; the last room is held for 15 s, but its verdict may take longer; leaving and
    // deleting take 20 s.
    assert_eq!(minutes(&together(3)), [4, 2, 1]);
    assert_eq!(minutes(&together(1)), [1]);
    assert_eq!(minutes(&target(3, Stay::OneByOne)), [1, 1, 1]);
    let ramp = |ramp| {
        let mut target = together(3);
        target.batch.ramp = ramp;
        target.batch.interval = 30 * SECOND;
        target
    };
    assert_eq!(minutes(&ramp(RampMode::Interval)), [3, 3, 2]);
    assert_eq!(minutes(&ramp(RampMode::Burst)), [2, 2, 2]);
}
