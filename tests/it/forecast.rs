//! What `check` prints about the schedules: their cost, and a warning if a limit is too low for it.

use chrono::{DateTime, TimeDelta, Utc};

use crate::canary;

const PROJECT: &str = "url = \"wss://a.example\"\napi_key = \"k\"\napi_secret = \"s\"\n";

/// Runs `check` with these settings, added to a project `acme` and a target `support`. Returns what it prints.
fn check(project: &str, support: &str, more: &str, args: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let settings = format!(
        "[projects.acme]\n{PROJECT}{project}\n[targets.support]\nagent_name = \"a\"\n{support}\n{more}\n"
    );
    std::fs::write(folder.path().join("canary.toml"), settings).unwrap();
    let args = [&["check", "--config", "canary.toml"], args].concat();
    let run = canary(folder.path(), args, &[]);
    assert_eq!(run.code, Some(0), "{}", run.output());
    run.stdout
}

fn check_support(settings: &str) -> String {
    check("", settings, "", &[])
}

/// Returns the value of the line with this key.
fn entry<'a>(output: &'a str, key: &str) -> &'a str {
    let line = output
        .lines()
        .find(|line| line.trim_start().starts_with(key));
    let line = line.unwrap_or_else(|| panic!("no {key:?} in {output}"));
    line.trim_start()[key.len()..].trim()
}

fn warnings(output: &str) -> Vec<&str> {
    let lines = output.lines();
    lines
        .filter_map(|line| line.trim_start().strip_prefix("warning: "))
        .collect()
}

/// Asserts that there is one warning, and that it contains all `parts`.
fn assert_only_warning(output: &str, parts: &[&str]) {
    let warnings = warnings(output);
    let [warning] = warnings[..] else {
        panic!("{warnings:#?}");
    };
    for part in parts {
        assert!(warning.contains(part), "no {part:?} in {warning:?}");
    }
}

/// Returns the agent minutes of a batch in the worst case.
fn worst_case(output: &str) -> u64 {
    let words = entry(output, "worst case").split_whitespace().next();
    words.unwrap().parse().unwrap()
}

#[test]
fn three_rooms_every_quarter_of_an_hour_are_at_least_8640_minutes_in_30_days() {
    let output = check_support("");
    let worst = worst_case(&output);
    for (key, batches, least) in [("per day", 96, 288), ("per 30 days", 2880, 8640)] {
        let agent = format!(
            "{batches} batches, {least} to {} agent minutes",
            batches * worst
        );
        // The canary's own participant waits for the agent, in each of three rooms for a minute more at most.
        let more = batches * (worst + 3);
        let expected = format!("{agent}, {least} to {more} participant minutes");
        assert_eq!(entry(&output, key), expected);
    }
    assert_eq!(warnings(&output), [] as [&str; 0]);
}

#[test]
fn hold_is_billed_for_every_minute_that_begins() {
    // Longer than a conversation can take, so the best case is the worst.
    let output = check_support("batch = { rooms = 1, hold = \"301s\" }");
    assert!(
        entry(&output, "per day").starts_with("96 batches, 576 agent minutes,"),
        "{output}"
    );
}

#[test]
fn pauses_between_turns_are_billed_beyond_the_hold_if_every_turn_must_be_answered() {
    let caller = "batch.rooms = 1\ncaller = { turns = 5, pause = \"1m\" }";
    // Four pauses, and the silence before the first turn.
    for (reply, least) in [("true", 5), ("false", 1)] {
        let output = check_support(&format!("{caller}\nexpect.reply = {reply}"));
        let expected = format!("96 batches, {} to ", 96 * least);
        assert!(entry(&output, "per day").starts_with(&expected), "{output}");
    }
}

#[test]
fn next_ticks_are_in_the_future_and_one_interval_apart() {
    let begun = Utc::now();
    let output = check_support("schedule.every = \"20m\"");
    assert_eq!(entry(&output, "schedule"), "every 20m");
    let ticks: Vec<DateTime<Utc>> = entry(&output, "next")
        .split(", ")
        .map(|tick| tick.parse().unwrap())
        .collect();
    let [first, second, third] = ticks[..] else {
        panic!("{output}");
    };
    assert!(
        first > begun && first <= Utc::now() + TimeDelta::minutes(20),
        "{output}"
    );
    assert_eq!(
        [second - first, third - second],
        [TimeDelta::minutes(20); 2]
    );
    assert_eq!(entry(&output, "longest gap"), "20m");
}

#[test]
fn cron_schedule_is_printed_in_its_zone_with_its_longest_gap_and_busiest_days() {
    let output = check_support(
        "schedule = { cron = \"0 9-17 * * mon-fri\", time_zone = \"Asia/Kolkata\" }\nobjectives = { \
         availability = 0.9, join = 0.9, first_speech = 0.9, service = 0.9 }",
    );
    assert_eq!(entry(&output, "schedule"), "0 9-17 * * 1-5 in Asia/Kolkata");
    assert!(
        entry(&output, "next").contains(":00:00+05:30, "),
        "{output}"
    );
    assert_eq!(entry(&output, "longest gap"), "2 days 16h");
    assert!(
        entry(&output, "per day").starts_with("9 batches, 27 to "),
        "{output}"
    );
    // No 30 days have more than 22 of these days.
    assert!(
        entry(&output, "per 30 days").starts_with("198 batches, 594 to "),
        "{output}"
    );
    assert_eq!(warnings(&output), [] as [&str; 0]);
}

#[test]
fn budget_below_the_best_case_of_the_schedule_gives_a_warning() {
    let output = check("budget.agent_time_per_day = \"4h\"", "", "", &[]);
    assert!(
        output.contains("agent minutes: at most 240 per UTC day\n"),
        "{output}"
    );
    assert_only_warning(
        &output,
        &["agent_time_per_day is 240", "need at least 288:", "skipped"],
    );
    // The longest month has 31 days.
    let output = check("budget.agent_time_per_month = \"148h\"", "", "", &[]);
    assert_only_warning(
        &output,
        &["agent_time_per_month is 8880", "need at least 8928:"],
    );
}

#[test]
fn budget_below_the_worst_case_of_the_schedule_gives_its_own_warning() {
    let with_minutes = |minutes: u64| {
        let budget = format!("budget.agent_time_per_day = \"{minutes}m\"");
        check(&budget, "", "", &[])
    };
    let output = with_minutes(288);
    let worst = 96 * worst_case(&output);
    assert_only_warning(
        &output,
        &[&format!("need up to {worst} if agents join or reply late")],
    );
    // Confirmations may use a tenth of the budget.
    let confirming = worst / 10;
    assert_only_warning(
        &with_minutes(worst),
        &[&format!(
            "up to {worst}, and confirmations of failures up to {confirming}"
        )],
    );
    let enough = worst * 10 / 9 + 1;
    assert_eq!(warnings(&with_minutes(enough)), [] as [&str; 0]);
}

#[test]
fn budget_counts_all_targets_even_if_one_is_printed() {
    let more = "[targets.sales]\nagent_name = \"b\"\nbatch.rooms = 2\nschedule.every = \"10m\"\n";
    let project = "budget.agent_time_per_day = \"10h\"";
    let output = check(project, "", more, &["--target", "support"]);
    // 288 of the one and 288 of the other, each at least.
    assert_only_warning(&output, &["agent_time_per_day is 600", "up to"]);
    assert!(!output.contains("sales"), "{output}");
}

#[test]
fn budget_below_the_worst_case_of_a_room_gives_a_warning_that_it_never_opens() {
    let output = check("budget.agent_time_per_month = \"2m\"", "", "", &[]);
    let [never, skipped] = warnings(&output)[..] else {
        panic!("{output}");
    };
    assert!(
        never.contains("one room of target \"support\" can use"),
        "{never}"
    );
    assert!(never.contains("never open"), "{never}");
    assert!(skipped.contains("skipped"), "{skipped}");
}

#[test]
fn batch_that_can_outlast_its_interval_gives_a_warning() {
    let output = check_support("schedule.every = \"2m\"");
    assert_only_warning(
        &output,
        &[
            "a batch can take",
            "the next one is due after 2m",
            "(overlap)",
        ],
    );
    // The shortest gap is what counts.
    let output = check_support("schedule.cron = \"0,2 */1 * * *\"");
    assert!(warnings(&output)[0].contains("due after 2m"), "{output}");
}

#[test]
fn duration_of_a_batch_depends_on_its_ramp_and_its_stay() {
    // A join may take 65 s. A room is held for 240 s, in which a conversation ends, and then cleaned up for 20 s.
    let deadlines =
        "deadlines = { signal = \"10s\", media = \"10s\", join = \"20s\", cleanup = \"10s\" }";
    for (ramp, takes) in [
        ("ramp = \"burst\"", "5m 25s"),
        ("ramp = \"interval\", interval = \"1m\"", "7m 25s"),
        ("ramp = \"after_join\"", "7m 35s"),
        ("stay = \"one_by_one\"", "16m 15s"),
    ] {
        let output = check_support(&format!("{deadlines}\nbatch = {{ hold = \"4m\", {ramp} }}"));
        let expected = format!("and {takes} per batch");
        assert!(
            entry(&output, "worst case").ends_with(&expected),
            "{ramp}: {output}"
        );
    }
}

#[test]
fn targets_that_can_hold_more_rooms_than_their_project_give_a_warning() {
    let more = "[targets.sales]\nagent_name = \"b\"\nbatch.rooms = 3\n";
    let output = check("max_rooms = 5", "", more, &[]);
    assert_only_warning(
        &output,
        &["can hold 6 rooms at once", "max_rooms is 5", "waits"],
    );
    let output = check("max_rooms = 6", "", more, &[]);
    assert_eq!(warnings(&output), [] as [&str; 0]);
    let one_by_one = format!("{more}batch.stay = \"one_by_one\"\n");
    let output = check("max_rooms = 4", "", &one_by_one, &[]);
    assert_eq!(warnings(&output), [] as [&str; 0]);
}

#[test]
fn objective_that_a_single_failed_room_misses_gives_a_warning() {
    let output = check_support("objectives = { availability = 0.9999, service = 0.9999 }");
    let parts = [
        "one failed room",
        "0.9999 allows 0.9 failures of 8640 rooms in 30 days",
        "(objectives: availability, service)",
        "at most 0.9998",
    ];
    assert_only_warning(&output, &parts);
    let output = check_support("objectives = { availability = 0.9998, service = 0.9998 }");
    assert_eq!(warnings(&output), [] as [&str; 0]);
}

#[test]
fn objective_of_the_reply_gives_a_warning_only_if_a_reply_is_expected() {
    let objective = "objectives.reply = 0.9999";
    let output = check_support(objective);
    assert_only_warning(&output, &["one failed room", "(objectives: reply)"]);
    let output = check_support(&format!("{objective}\nexpect.reply = false"));
    assert_eq!(warnings(&output), [] as [&str; 0]);
}

#[test]
fn schedule_with_rare_batches_gives_warnings_about_alerts_and_objectives() {
    let output = check_support("schedule.cron = \"0 9 * * mon\"");
    let warnings = warnings(&output);
    let [too_rare, missed] = warnings[..] else {
        panic!("{output}");
    };
    assert!(
        too_rare.starts_with("the mean interval between batches is 7 days"),
        "{too_rare}"
    );
    assert!(missed.ends_with("or open rooms more often"), "{missed}");
}

#[test]
fn history_that_cannot_hold_the_batches_of_a_night_is_refused() {
    let settings = "schedule.every = \"10s\"\nbatch.rooms = 3\n";
    let checked = |megabytes: u32| {
        let folder = tempfile::tempdir().unwrap();
        let settings = format!(
            "[projects.acme]\n{PROJECT}\n[targets.support]\nagent_name = \"a\"\n{settings}\n[history]\nmax_megabytes = {megabytes}\n"
        );
        std::fs::write(folder.path().join("canary.toml"), settings).unwrap();
        let args = ["check", "--config", "canary.toml"];
        canary(folder.path(), args.to_vec(), &[])
    };
    let refused = checked(8);
    assert_eq!(refused.code, Some(2), "{}", refused.output());
    let text = "error: history.max_megabytes: 8 cannot hold the batches of eight hours, which take about 41 MB\n";
    assert!(refused.stderr.contains(text), "{}", refused.output());
    assert_eq!(checked(512).code, Some(0));
}
