use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;

use chrono::TimeDelta;
use insta::assert_snapshot;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::queue::{Delivery, GROUP_WINDOW, MAX_WAITING, Queue, Step, Style};
use super::text::Tense;
use super::*;
use crate::config::{ChannelKind, WebhookFormat};
use crate::metrics::Build;

/// A part of every address, and the routing key: neither may be shown.
const SECRET: &str = "T0SECRET0T";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const QUOTING: &str =
    "HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\nno hook /hooks/T0SECRET0T?token=T0SECRET0T";
const INVALID: &str = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n{\"errors\":[\"routing_key T0SECRET0T is invalid\"]}";
const MOVED: &str = "HTTP/1.1 308 Permanent Redirect\r\nLocation: https://new.example/T0SECRET0T\r\nContent-Length: 0\r\n\r\n";
const BUSY: &str = "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n";
const QUOTING_LOGGED: &str = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nbad T0SECRET0T";
const UNAVAILABLE: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";

fn time(seconds: i64) -> DateTime<Utc> {
    let start = DateTime::parse_from_rfc3339("2026-11-30T15:12:52Z").unwrap();
    start.to_utc() + TimeDelta::seconds(seconds)
}

fn opened(target: &str) -> Notice {
    Notice {
        kind: NoticeKind::Opened,
        target: target.to_owned(),
        project: "main".to_owned(),
        fault: Some("agent".to_owned()),
        incident: format!("20261130T151252-{target}"),
        continues: false,
        began_at: time(0),
        at: time(64),
        reasons: vec![("agent_silent".to_owned(), 5)],
        failed: 5,
        rooms: 6,
        differs: vec![
            "worker AW_x fails in 5 of 5 rooms, all others in 0 of 1 (p = 0.0048)".to_owned(),
        ],
        detail: Some(
            "the agent joined, but no speech was heard within 20 s. Check <TTS> & keys".to_owned(),
        ),
        url: Some(format!(
            "https://canary.example.com/incidents/20261130T151252-{target}"
        )),
        ended_by: None,
        drill: false,
    }
}

fn closed(target: &str) -> Notice {
    Notice {
        kind: NoticeKind::Closed,
        at: time(428),
        failed: 9,
        rooms: 13,
        reasons: vec![
            ("agent_silent".to_owned(), 8),
            ("agent_no_show".to_owned(), 1),
        ],
        detail: None,
        ended_by: Some("recovered".to_owned()),
        ..opened(target)
    }
}

fn blind(target: &str) -> Notice {
    Notice {
        kind: NoticeKind::Blind,
        fault: None,
        incident: format!("blind-{target}"),
        reasons: vec![("plan_limit".to_owned(), 3)],
        failed: 3,
        rooms: 3,
        differs: Vec::new(),
        detail: None,
        ..opened(target)
    }
}

// --- Texts and bodies.

#[test]
fn texts_say_which_target_since_when_which_reason_and_share_what_differs_and_where_to_look() {
    let service = Notice {
        fault: Some("service".to_owned()),
        continues: true,
        ..opened("support")
    };
    let paused = Notice {
        ended_by: Some("paused".to_owned()),
        ..closed("support")
    };
    let sighted = Notice {
        kind: NoticeKind::Sighted,
        at: time(7_328),
        ..blind("support")
    };
    let bare = Notice {
        reasons: Vec::new(),
        differs: Vec::new(),
        detail: None,
        url: None,
        rooms: 1,
        failed: 1,
        ..opened("support")
    };
    let many = Notice {
        reasons: (1..9)
            .map(|number| (format!("reason_{number}"), number))
            .collect(),
        differs: (1..9).map(|number| format!("factor {number}")).collect(),
        ..opened("support")
    };
    let texts = [
        ("opened", opened("support"), Tense::Present),
        ("opened, service, again", service, Tense::Present),
        ("opened, bare", bare, Tense::Present),
        ("opened, many reasons", many, Tense::Present),
        ("closed", closed("support"), Tense::Present),
        ("closed, late", closed("support"), Tense::Past),
        ("paused", paused.clone(), Tense::Present),
        ("paused, late", paused, Tense::Past),
        ("blind", blind("support"), Tense::Present),
        ("sighted", sighted.clone(), Tense::Present),
        ("sighted, late", sighted, Tense::Past),
        ("test", sender::test_notice(time(0)), Tense::Present),
    ];
    let texts =
        texts.map(|(name, notice, tense)| format!("{name}\n  {}", text::whole(&[notice], tense)));
    assert_snapshot!("texts", texts.join("\n"));
}

#[test]
fn drill_is_the_first_word_of_every_text() {
    let kinds = [
        NoticeKind::Opened,
        NoticeKind::Closed,
        NoticeKind::Blind,
        NoticeKind::Sighted,
    ];
    for kind in kinds {
        for tense in [Tense::Present, Tense::Past] {
            let drill = |target| Notice {
                kind,
                drill: true,
                ..opened(target)
            };
            let one = vec![drill("support")];
            let group = vec![drill("support"), drill("sales")];
            for notices in [&one, &group] {
                let json = webhook::document(notices, tense).unwrap();
                let slack = webhook::slack(notices, tense);
                let first_block = slack["blocks"][0]["text"]["text"].as_str().unwrap();
                for text in [
                    json["text"].as_str().unwrap(),
                    slack["text"].as_str().unwrap(),
                    first_block.trim_start_matches('*'),
                ] {
                    assert!(text.starts_with("DRILL: "), "{kind:?}: {text}");
                }
            }
            let event = pagerduty::event(&one[0], "key");
            if let Some(summary) = event["payload"]["summary"].as_str() {
                assert!(summary.starts_with("DRILL: "), "{summary}");
            }
        }
    }
}

#[test]
fn bodies_are_unchanged() {
    let show = |value: Value| serde_json::to_string_pretty(&value).unwrap();
    let group = [opened("support"), opened("sales")];
    let one = [opened("support")];
    let end = [closed("support")];
    assert_snapshot!(
        "json_opened",
        show(webhook::document(&one, Tense::Present).unwrap())
    );
    assert_snapshot!(
        "json_late",
        show(webhook::document(&end, Tense::Past).unwrap())
    );
    assert_snapshot!(
        "json_group",
        show(webhook::document(&group, Tense::Present).unwrap())
    );
    assert_snapshot!("slack_opened", show(webhook::slack(&one, Tense::Present)));
    assert_snapshot!("slack_closed", show(webhook::slack(&end, Tense::Present)));
    assert_snapshot!("slack_group", show(webhook::slack(&group, Tense::Present)));
    assert_snapshot!("pagerduty_opened", show(pagerduty::event(&one[0], "KEY")));
    assert_snapshot!("pagerduty_closed", show(pagerduty::event(&end[0], "KEY")));
    assert_snapshot!(
        "pagerduty_blind",
        show(pagerduty::event(&blind("support"), "KEY"))
    );
}

#[test]
fn slack_receives_no_section_that_is_too_long_and_no_half_of_an_entity() {
    let long = Notice {
        detail: Some("&".repeat(5_000)),
        differs: vec!["<".repeat(5_000)],
        ..opened("support")
    };
    let mut group = vec![long.clone(); 50];
    for notices in [vec![long], std::mem::take(&mut group)] {
        let body = webhook::slack(&notices, Tense::Present);
        let blocks = body["blocks"].as_array().unwrap();
        assert!(blocks.len() <= 50);
        for block in blocks {
            let text = block["text"]["text"].as_str().unwrap();
            assert!(text.chars().count() <= 3_000 && !text.is_empty());
            let rest = text
                .replace("&amp;", "")
                .replace("&lt;", "")
                .replace("&gt;", "");
            assert!(!rest.contains('&'), "{rest}");
        }
    }
}

#[test]
fn notice_of_an_older_outbox_is_read_back() {
    let mut document = serde_json::to_value(opened("support")).unwrap();
    document.as_object_mut().unwrap().remove("ended_by");
    let read: Notice = serde_json::from_value(document).unwrap();
    assert_eq!(read, opened("support"));
}

// --- The queue.

fn pending(id: &str, notice: Notice, now: Instant) -> Pending {
    Pending::new(id.to_owned(), notice, now, Duration::ZERO)
}

fn send(step: Step) -> Delivery {
    match step {
        Step::Send(delivery) => delivery,
        other => panic!("{other:?}"),
    }
}

fn kinds(delivery: &Delivery) -> Vec<(NoticeKind, &str)> {
    let notices = delivery.notices.iter();
    notices
        .map(|notice| (notice.kind, notice.target.as_str()))
        .collect()
}

fn wait(step: Step, now: Instant) -> Duration {
    match step {
        Step::WaitUntil(at) => at - now,
        other => panic!("{other:?}"),
    }
}

#[test]
fn end_of_an_incident_is_not_sent_before_its_begin() {
    for style in [Style::Texts, Style::Events] {
        let (mut queue, now) = (Queue::new(style), Instant::now());
        queue.push(pending("1", opened("support"), now));
        let begin = send(queue.next(now, false));
        // It ends while the begin is on its way.
        queue.push(pending("2", closed("support"), now));
        assert_eq!(queue.delivered(&begin, now).len(), 1);
        let end = send(queue.next(now, false));
        assert_eq!(kinds(&end), [(NoticeKind::Closed, "support")]);
        assert_eq!(end.tense, Tense::Present);
        queue.delivered(&end, now);
        assert!(matches!(queue.next(now, false), Step::Idle));
    }
}

#[test]
fn outage_that_is_over_before_its_first_message_is_one_text_in_the_past_tense() {
    let (mut queue, now) = (Queue::new(Style::Texts), Instant::now());
    queue.push(pending("1", opened("support"), now));
    let begin = send(queue.next(now, false));
    queue.failed(&begin, now, None, false);
    queue.push(pending("2", closed("support"), now));
    let later = now + Duration::from_secs(2);
    let both = send(queue.next(later, false));
    assert_eq!(kinds(&both), [(NoticeKind::Closed, "support")]);
    assert_eq!(both.tense, Tense::Past);
    assert_eq!(queue.delivered(&both, later).len(), 2);
    assert_eq!(queue.len(), 0);
}

#[test]
fn event_of_an_outage_that_is_over_is_not_sent_if_the_receiver_cannot_know_of_it() {
    for (kind, end) in [(opened("support"), closed("support")), {
        let end = Notice {
            kind: NoticeKind::Sighted,
            ..blind("support")
        };
        (blind("support"), end)
    }] {
        let (mut queue, now) = (Queue::new(Style::Events), Instant::now());
        queue.push(pending("1", kind, now));
        queue.push(pending("2", end, now));
        match queue.next(now, false) {
            Step::Skip(messages) => assert_eq!(messages.len(), 2),
            other => panic!("{other:?}"),
        }
        assert!(matches!(queue.next(now, false), Step::Idle));
    }
}

#[test]
fn event_of_an_outage_that_is_over_is_resolved_if_its_begin_may_have_arrived() {
    let (mut queue, now) = (Queue::new(Style::Events), Instant::now());
    queue.push(pending("1", opened("support"), now));
    let begin = send(queue.next(now, false));
    queue.failed(&begin, now, None, true);
    queue.push(pending("2", closed("support"), now));
    let later = now + Duration::from_secs(2);
    let both = send(queue.next(later, false));
    assert_eq!(kinds(&both), [(NoticeKind::Closed, "support")]);
    assert_eq!(queue.delivered(&both, later).len(), 2);
}

#[test]
fn further_outages_of_a_project_are_one_message_at_the_end_of_a_minute() {
    let (mut queue, now) = (Queue::new(Style::Texts), Instant::now());
    queue.push(pending("1", opened("support"), now));
    let first = send(queue.next(now, false));
    queue.delivered(&first, now);
    let of_another_project = Notice {
        project: "other".to_owned(),
        ..opened("bookings")
    };
    queue.push(pending("2", opened("sales"), now));
    queue.push(pending("3", opened("billing"), now));
    queue.push(pending("4", of_another_project, now));
    let other = send(queue.next(now, false));
    assert_eq!(kinds(&other), [(NoticeKind::Opened, "bookings")]);
    queue.delivered(&other, now);
    assert_eq!(wait(queue.next(now, false), now), GROUP_WINDOW);
    // The end of the first incident waits for nothing.
    queue.push(pending("5", closed("support"), now));
    let end = send(queue.next(now, false));
    assert_eq!(kinds(&end), [(NoticeKind::Closed, "support")]);
    queue.delivered(&end, now);
    let later = now + GROUP_WINDOW;
    let group = send(queue.next(later, false));
    assert_eq!(
        kinds(&group),
        [
            (NoticeKind::Opened, "sales"),
            (NoticeKind::Opened, "billing")
        ]
    );
    assert_eq!(queue.delivered(&group, later).len(), 2);
}

#[test]
fn events_are_not_grouped() {
    let (mut queue, now) = (Queue::new(Style::Events), Instant::now());
    for target in ["support", "sales", "billing"] {
        queue.push(pending(target, opened(target), now));
    }
    for target in ["support", "sales", "billing"] {
        let event = send(queue.next(now, false));
        assert_eq!(kinds(&event), [(NoticeKind::Opened, target)]);
        queue.delivered(&event, now);
    }
}

#[test]
fn group_is_not_awaited_when_the_process_ends() {
    let (mut queue, now) = (Queue::new(Style::Texts), Instant::now());
    queue.push(pending("1", opened("support"), now));
    let first = send(queue.next(now, false));
    queue.delivered(&first, now);
    queue.push(pending("2", opened("sales"), now));
    assert!(matches!(queue.next(now, false), Step::WaitUntil(_)));
    assert!(matches!(queue.next(now, true), Step::Send(_)));
}

#[test]
fn back_off_doubles_from_a_second_to_five_minutes() {
    let (mut queue, mut now) = (Queue::new(Style::Events), Instant::now());
    queue.push(pending("1", opened("support"), now));
    for attempt in 0..12_u32 {
        let delivery = send(queue.next(now, false));
        assert_eq!(delivery.attempts, attempt);
        queue.failed(&delivery, now, None, false);
        let wait = wait(queue.next(now, false), now);
        let longest = Duration::from_secs(2_u64.pow(attempt)).min(Duration::from_mins(5));
        assert!(
            wait <= longest && wait >= longest.mul_f64(0.74),
            "{wait:?} after {attempt}"
        );
        now += wait;
    }
}

#[test]
fn message_that_the_receiver_does_not_take_blocks_no_other_incident() {
    let (mut queue, now) = (Queue::new(Style::Events), Instant::now());
    queue.push(pending("1", opened("support"), now));
    let refused = send(queue.next(now, false));
    queue.failed(&refused, now, None, false);
    queue.push(pending("2", opened("sales"), now));
    let other = send(queue.next(now, false));
    assert_eq!(kinds(&other), [(NoticeKind::Opened, "sales")]);
    // The receiver works, so the first is tried again at once, but not before what waits for its first attempt.
    queue.delivered(&other, now);
    let again = send(queue.next(now, false));
    assert_eq!(kinds(&again), [(NoticeKind::Opened, "support")]);
}

#[test]
fn pause_that_the_receiver_asks_for_holds_for_all_messages() {
    let (mut queue, now) = (Queue::new(Style::Events), Instant::now());
    queue.push(pending("1", opened("support"), now));
    let refused = send(queue.next(now, false));
    let pause = Duration::from_mins(2);
    assert_eq!(queue.failed(&refused, now, Some(pause), false), now + pause);
    queue.push(pending("2", opened("sales"), now));
    assert_eq!(wait(queue.next(now, false), now), pause);
    // A wrong value must not silence the channel.
    queue.failed(&refused, now, Some(Duration::from_hours(10_000)), false);
    assert!(wait(queue.next(now, false), now) <= Duration::from_hours(1));
    // Changed settings may lead to another receiver.
    queue.wake(now);
    assert!(matches!(queue.next(now, false), Step::Send(_)));
}

#[test]
fn message_is_given_up_a_day_after_it_was_created() {
    let (mut queue, now) = (Queue::new(Style::Texts), Instant::now());
    let hour = Duration::from_hours(1);
    let old = Pending::new(
        "1".to_owned(),
        opened("support"),
        now,
        Duration::from_hours(23),
    );
    queue.push(old);
    queue.push(pending("2", opened("sales"), now));
    let later = now + hour;
    match queue.next(later, false) {
        Step::GiveUp(messages) => assert_eq!(messages[0].id, "1"),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        kinds(&send(queue.next(later, false))),
        [(NoticeKind::Opened, "sales")]
    );
}

#[test]
fn full_queue_drops_the_oldest_message_that_is_not_on_its_way() {
    let (mut queue, now) = (Queue::new(Style::Events), Instant::now());
    queue.push(pending("0", opened("t0"), now));
    let on_its_way = send(queue.next(now, false));
    for number in 1..MAX_WAITING {
        let dropped = queue.push(pending(
            &number.to_string(),
            opened(&format!("t{number}")),
            now,
        ));
        assert!(dropped.is_none());
    }
    let dropped = queue.push(pending("last", opened("last"), now));
    assert_eq!(dropped.unwrap().id, "1");
    assert_eq!(queue.delivered(&on_its_way, now).len(), 1);
    assert_eq!(queue.len(), MAX_WAITING - 1);
}

// --- Requests.

#[derive(Debug)]
struct Received {
    head: String,
    body: String,
}

impl Received {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    fn kind(&self) -> String {
        self.json()["kind"].as_str().unwrap().to_owned()
    }
}

/// Answers each request with the next answer, and the last one for ever. Dropping it ends it.
struct Receiver {
    address: SocketAddr,
    requests: mpsc::Receiver<Received>,
    task: JoinHandle<()>,
}

impl Receiver {
    async fn start(answers: &'static [&'static str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = mpsc::channel(100);
        let number = Arc::new(AtomicUsize::new(0));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (sender, number) = (sender.clone(), Arc::clone(&number));
                connections.spawn(async move {
                    // A client that gives up closes the connection.
                    answer(stream, answers, &number, &sender).await.ok();
                });
            }
        });
        Self {
            address,
            requests,
            task,
        }
    }

    fn url(&self) -> String {
        format!(
            "http://127.0.0.1:{}/hooks/{SECRET}?token={SECRET}",
            self.address.port()
        )
    }

    fn webhook(&self) -> Channel {
        let url = self.url().into();
        let format = WebhookFormat::Json;
        channel(ChannelKind::Webhook { url, format })
    }

    fn pagerduty(&self) -> Channel {
        let url = format!("http://127.0.0.1:{}/v2/enqueue", self.address.port());
        channel(ChannelKind::Pagerduty {
            routing_key: SECRET.into(),
            url: url.parse().unwrap(),
        })
    }

    async fn next(&mut self) -> Received {
        self.requests.recv().await.unwrap()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(
    mut stream: TcpStream,
    answers: &[&str],
    number: &AtomicUsize,
    sender: &mpsc::Sender<Received>,
) -> io::Result<()> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(bytes).unwrap();
    let mut lines = head.lines();
    let length = lines.find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await?;
    let body = String::from_utf8(body).unwrap();
    let number = number.fetch_add(1, Ordering::Relaxed);
    let answer = answers[number.min(answers.len() - 1)];
    sender.send(Received { head, body }).await.unwrap();
    if answer.is_empty() {
        // Never answers.
        stream.read_u8().await?;
    }
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

fn channel(kind: ChannelKind) -> Channel {
    Channel {
        kind,
        targets: None,
        timeout: Channel::DEFAULT_TIMEOUT,
        ca_file: None,
    }
}

/// A notifier, the series of its channels, and the ids of the messages that are done.
struct Setup {
    notifier: Notifier,
    metrics: Metrics,
    done: watch::Receiver<Vec<String>>,
}

fn start(channels: &[(&str, &Channel)], left: Vec<OutboxMessage>) -> Setup {
    let build = Build {
        version: "1".to_owned(),
        revision: "2".to_owned(),
        rustc: "3".to_owned(),
        engine: "4".to_owned(),
    };
    let metrics = Metrics::new(&build, false);
    let (sender, done) = watch::channel(Vec::new());
    let on_done: OnDone = Arc::new(move |id| {
        sender.send_modify(|ids| ids.push(id.to_owned()));
    });
    Setup {
        notifier: Notifier::start_with(&map(channels), left, on_done, metrics.clone()),
        metrics,
        done,
    }
}

fn map(channels: &[(&str, &Channel)]) -> BTreeMap<String, Channel> {
    let channels = channels.iter();
    channels
        .map(|(name, channel)| ((*name).to_owned(), (*channel).clone()))
        .collect()
}

impl Setup {
    fn notify(&self, notice: &Notice) -> Vec<String> {
        let messages = self.notifier.messages(notice);
        let ids = messages.iter().map(|message| message.id.clone()).collect();
        self.notifier.deliver(messages);
        ids
    }

    async fn all_done(&mut self, number: usize) {
        self.done.wait_for(|ids| ids.len() >= number).await.unwrap();
    }

    fn series(&self, name: &str) -> Vec<String> {
        let name = format!("livekit_canary_{name}{{");
        let text = self.metrics.render();
        let lines = text.lines().filter_map(|line| line.strip_prefix(&name));
        lines.map(str::to_owned).collect()
    }
}

#[tokio::test]
async fn begin_and_end_are_delivered_in_order_to_each_channel_and_then_leave_the_history() {
    let (mut team, mut pager) = (Receiver::start(&[OK]).await, Receiver::start(&[OK]).await);
    let mut setup = start(
        &[("team", &team.webhook()), ("pager", &pager.pagerduty())],
        Vec::new(),
    );
    let mut ids = setup.notify(&opened("support"));
    assert_eq!(ids.len(), 2);
    setup.all_done(2).await;
    ids.extend(setup.notify(&closed("support")));
    setup.all_done(4).await;
    let request = team.next().await;
    let path = format!("POST /hooks/{SECRET}?token={SECRET} HTTP/1.1\r\n");
    assert!(request.head.starts_with(&path), "{}", request.head);
    assert!(request.head.contains("content-type: application/json\r\n"));
    assert_eq!(request.kind(), "opened");
    assert_eq!(team.next().await.kind(), "closed");
    for action in ["trigger", "resolve"] {
        let event = pager.next().await.json();
        assert_eq!(event["event_action"], action);
        assert_eq!(event["dedup_key"], "20261130T151252-support");
        assert_eq!(event["routing_key"], SECRET);
    }
    let mut done = setup.done.borrow().clone();
    done.sort();
    ids.sort();
    assert_eq!(done, ids);
    assert_eq!(
        setup.series("notifications_total"),
        ["channel=\"pager\"} 2", "channel=\"team\"} 2"]
    );
}

#[tokio::test]
async fn message_that_is_not_taken_is_sent_again_and_the_failure_counted() {
    let mut team = Receiver::start(&[UNAVAILABLE, OK]).await;
    let mut setup = start(&[("team", &team.webhook())], Vec::new());
    assert_eq!(
        setup.series("notification_failures_total"),
        ["channel=\"team\"} 0"]
    );
    setup.notify(&opened("support"));
    setup.all_done(1).await;
    assert_eq!(team.next().await.body, team.next().await.body);
    assert_eq!(setup.series("notifications_total"), ["channel=\"team\"} 2"]);
    assert_eq!(
        setup.series("notification_failures_total"),
        ["channel=\"team\"} 1"]
    );
    assert_eq!(
        setup.series("notifications_lost_total"),
        ["channel=\"team\"} 0"]
    );
}

#[tokio::test]
async fn message_that_the_receiver_rejects_for_good_is_sent_once() {
    let mut pager = Receiver::start(&[
        "HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nno!",
        OK,
    ])
    .await;
    let mut setup = start(&[("pager", &pager.pagerduty())], Vec::new());
    setup.notify(&opened("support"));
    setup.all_done(1).await;
    assert_eq!(
        setup.series("notifications_lost_total"),
        ["channel=\"pager\"} 1"]
    );
    setup.notify(&opened("sales"));
    setup.all_done(2).await;
    let targets = [pager.next().await, pager.next().await]
        .map(|request| request.json()["payload"]["source"].clone());
    assert_eq!(targets, ["support", "sales"]);
}

#[tokio::test]
async fn receiver_that_does_not_answer_delays_no_other_channel() {
    let (mut silent, mut team) = (Receiver::start(&[""]).await, Receiver::start(&[OK]).await);
    let mut setup = start(
        &[("silent", &silent.webhook()), ("team", &team.webhook())],
        Vec::new(),
    );
    setup.notify(&opened("support"));
    silent.next().await;
    team.next().await;
    setup.all_done(1).await;
    assert_eq!(setup.done.borrow().len(), 1);
}

#[tokio::test]
async fn messages_that_an_earlier_run_left_are_delivered() {
    let mut team = Receiver::start(&[OK]).await;
    let channels = [("team", &team.webhook())];
    let earlier = start(&channels, Vec::new());
    let mut left = earlier.notifier.messages(&opened("support"));
    let mut later = earlier.notifier.messages(&closed("sales"));
    assert!(left[0].id < later[0].id);
    left.append(&mut later);
    drop(earlier);
    let mut setup = start(&channels, left);
    setup.all_done(2).await;
    assert_eq!(team.next().await.kind(), "opened");
    assert_eq!(team.next().await.kind(), "closed");
}

#[tokio::test]
async fn incident_that_ended_before_a_restart_is_resolved_and_not_triggered() {
    let mut pager = Receiver::start(&[OK]).await;
    let channels = [("pager", &pager.pagerduty())];
    let earlier = start(&channels, Vec::new());
    let mut left = earlier.notifier.messages(&opened("support"));
    left.extend(earlier.notifier.messages(&closed("support")));
    drop(earlier);
    let mut setup = start(&channels, left);
    setup.all_done(2).await;
    // The run before may have sent the trigger.
    assert_eq!(pager.next().await.json()["event_action"], "resolve");
    assert!(pager.requests.try_recv().is_err());
}

#[tokio::test]
async fn messages_of_a_removed_channel_are_dropped() {
    let (team, mut other) = (
        Receiver::start(&[UNAVAILABLE]).await,
        Receiver::start(&[OK]).await,
    );
    let webhook = team.webhook();
    let mut setup = start(
        &[("team", &webhook), ("other", &other.webhook())],
        Vec::new(),
    );
    let messages = setup.notifier.messages(&opened("support"));
    let of_team = messages.iter().find(|message| message.channel == "team");
    let of_team = of_team.unwrap().clone();
    setup.notifier.deliver(messages);
    other.next().await;
    setup.all_done(1).await;
    setup
        .notifier
        .configure(&map(&[("other", &other.webhook())]));
    assert!(setup.done.borrow().contains(&of_team.id));
    assert_eq!(setup.series("notifications_total").len(), 1);
    // Also a message that an earlier run left for it.
    setup.notifier.deliver(vec![OutboxMessage {
        id: "left".to_owned(),
        ..of_team
    }]);
    assert!(setup.done.borrow().contains(&"left".to_owned()));
}

#[tokio::test]
async fn changed_address_takes_effect_for_messages_that_wait() {
    let (mut wrong, mut right) = (
        Receiver::start(&[UNAVAILABLE]).await,
        Receiver::start(&[OK]).await,
    );
    let mut setup = start(&[("team", &wrong.webhook())], Vec::new());
    setup.notify(&opened("support"));
    wrong.next().await;
    setup
        .notifier
        .configure(&map(&[("team", &right.webhook())]));
    assert_eq!(right.next().await.kind(), "opened");
    setup.all_done(1).await;
}

#[tokio::test]
async fn channel_reports_only_its_targets() {
    let receiver = Receiver::start(&[OK]).await;
    let only_sales = Channel {
        targets: Some(["sales".to_owned()].into()),
        ..receiver.webhook()
    };
    let beat = channel(ChannelKind::Heartbeat {
        url: receiver.url().into(),
    });
    let setup = start(
        &[
            ("all", &receiver.webhook()),
            ("sales", &only_sales),
            ("beat", &beat),
        ],
        Vec::new(),
    );
    let channels = |target| {
        let messages = setup.notifier.messages(&opened(target)).into_iter();
        messages.map(|message| message.channel).collect::<Vec<_>>()
    };
    assert_eq!(channels("support"), ["all"]);
    assert_eq!(channels("sales"), ["all", "sales"]);
}

#[tokio::test]
async fn heartbeat_is_a_get_request_that_is_not_repeated_after_a_failure() {
    let mut receiver = Receiver::start(&[UNAVAILABLE, OK]).await;
    let beat = channel(ChannelKind::Heartbeat {
        url: receiver.url().into(),
    });
    let setup = start(&[("beat", &beat)], Vec::new());
    setup.notifier.heartbeat("support");
    let request = receiver.next().await;
    assert!(request.head.starts_with("GET /hooks/"), "{}", request.head);
    assert_eq!(request.body, "");
    setup.notifier.heartbeat("support");
    receiver.next().await;
    setup
        .notifier
        .close(Instant::now() + Duration::from_secs(30))
        .await;
    assert!(receiver.requests.try_recv().is_err());
    assert_eq!(setup.series("notifications_total"), ["channel=\"beat\"} 2"]);
    assert_eq!(
        setup.series("notification_failures_total"),
        ["channel=\"beat\"} 1"]
    );
}

#[tokio::test]
async fn close_sends_what_can_be_sent_and_leaves_the_rest_in_the_history() {
    let (mut team, mut down) = (
        Receiver::start(&[OK]).await,
        Receiver::start(&[UNAVAILABLE]).await,
    );
    let setup = start(
        &[("team", &team.webhook()), ("down", &down.webhook())],
        Vec::new(),
    );
    setup.notify(&opened("support"));
    setup
        .notifier
        .close(Instant::now() + Duration::from_secs(30))
        .await;
    assert_eq!(team.next().await.kind(), "opened");
    assert_eq!(down.next().await.kind(), "opened");
    assert_eq!(setup.done.borrow().len(), 1);
    assert!(setup.notifier.messages(&opened("support")).is_empty());
}

#[tokio::test]
async fn close_does_not_wait_longer_than_its_deadline() {
    let mut silent = Receiver::start(&[""]).await;
    let setup = start(&[("silent", &silent.webhook())], Vec::new());
    setup.notify(&opened("support"));
    silent.next().await;
    setup.notifier.close(Instant::now()).await;
    assert!(setup.done.borrow().is_empty());
}

#[tokio::test]
async fn message_that_arrives_after_close_stays_in_the_history() {
    let mut team = Receiver::start(&[OK]).await;
    let setup = start(&[("team", &team.webhook())], Vec::new());
    let messages = setup.notifier.messages(&opened("support"));
    assert_eq!(messages.len(), 1);
    setup.notifier.close(Instant::now()).await;
    setup.notifier.deliver(messages);
    assert!(setup.done.borrow().is_empty());
    // A reload during the shutdown starts no channel that nothing would end.
    setup.notifier.configure(&map(&[("team", &team.webhook())]));
    assert!(setup.notifier.messages(&opened("support")).is_empty());
    assert!(team.requests.try_recv().is_err());
}

/// Sends a message to a receiver with this answer, and returns the error.
async fn error_of(
    answers: &'static [&'static str],
    kind: impl Fn(&Receiver) -> Channel,
) -> SendError {
    let receiver = Receiver::start(answers).await;
    let channel = kind(&receiver);
    let error = send_test(&channel).await.unwrap_err();
    let text = error.to_string();
    assert!(!text.contains(SECRET), "{text}");
    assert!(!format!("{channel:?}").contains(SECRET));
    error
}

#[tokio::test]
async fn error_names_the_host_and_what_to_do_and_no_part_of_the_address() {
    let error = error_of(&[QUOTING], Receiver::webhook).await;
    assert!(error.blames_settings() && !error.is_final());
    assert_eq!(
        error.to_string(),
        "127.0.0.1 answered 404: no hook [secret]. Check the address and the key of the channel"
    );

    let error = error_of(&[INVALID], Receiver::pagerduty).await;
    assert!(error.blames_settings() && error.is_final());
    assert!(
        error
            .to_string()
            .contains("routing_key [secret] is invalid"),
        "{error}"
    );

    let error = error_of(&[MOVED], Receiver::webhook).await;
    assert!(error.blames_settings());
    assert_eq!(
        error.to_string(),
        "127.0.0.1 redirects to new.example, which is not followed. Set the address to which it leads"
    );

    let error = error_of(&[BUSY], Receiver::pagerduty).await;
    assert_eq!(error.pause(), Some(Duration::from_secs(7)));
    assert!(!error.blames_settings() && !error.is_final() && !error.may_have_arrived());

    let hasty = |receiver: &Receiver| Channel {
        timeout: Duration::from_millis(100),
        ..receiver.webhook()
    };
    let error = error_of(&[""], hasty).await;
    assert_eq!(error.to_string(), "127.0.0.1 did not answer within 100ms");
    assert!(error.may_have_arrived());

    let nowhere = |_: &Receiver| {
        let url = format!("http://127.0.0.1:1/{SECRET}").into();
        channel(ChannelKind::Heartbeat { url })
    };
    let error = error_of(&[OK], nowhere).await;
    assert!(!error.may_have_arrived() && !error.blames_settings());
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
}

#[tokio::test]
async fn credentials_of_an_address_are_sent_as_a_header() {
    let mut receiver = Receiver::start(&[OK]).await;
    let url = format!("http://us%40er:pass%20word@{}/hook", receiver.address);
    let format = WebhookFormat::Slack;
    let channel = channel(ChannelKind::Webhook {
        url: url.into(),
        format,
    });
    send_test(&channel).await.unwrap();
    let request = receiver.next().await;
    assert!(request.head.starts_with("POST /hook HTTP/1.1\r\n"));
    // us@er:pass word
    let header = "authorization: Basic dXNAZXI6cGFzcyB3b3Jk\r\n";
    assert!(request.head.contains(header), "{}", request.head);
}

#[tokio::test]
async fn test_of_an_events_channel_leaves_no_open_incident() {
    let mut pager = Receiver::start(&[OK]).await;
    send_test(&pager.pagerduty()).await.unwrap();
    let events = [pager.next().await.json(), pager.next().await.json()];
    assert_eq!(events[0]["payload"]["severity"], "info");
    assert_eq!(events[1]["event_action"], "resolve");
    assert_eq!(events[0]["dedup_key"], events[1]["dedup_key"]);
}

/// What the log of this thread receives.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn log_has_failures_and_no_secret() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let receiver = Receiver::start(&[QUOTING_LOGGED]).await;
    let mut setup = start(
        &[
            ("team", &receiver.webhook()),
            ("pager", &receiver.pagerduty()),
        ],
        Vec::new(),
    );
    setup.notify(&opened("support"));
    setup.all_done(2).await;
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(log.matches("is given up").count(), 2, "{log}");
    assert!(!log.contains(SECRET), "{log}");
}
