//! The second layer of tests: the product's own binary against the real stack, one table of scenarios.
//!
//! `cargo test --test real [name]` runs it (`just real`); plain `cargo test` leaves it out, because it needs Go, Python
//! and root for a network namespace. A row for every scenario and stack is printed, and an absent row fails the run.

#![expect(
    clippy::print_stdout,
    reason = "the table is for whoever runs the tests"
)]

use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Failed, Trial};
use tokio::time::Instant;

mod canary;
mod gate;
mod scenarios;
mod stack;
mod twirp;

use scenarios::{Ground, SCENARIOS, Scenario};
use stack::{AGENT, Agent, BUSY_AGENT, Namespace, Site, Stack};

/// Scenarios that start one.
const SITES_BEHIND_VETH: usize = 4;

/// What became of one scenario on one stack.
struct Row {
    scenario: &'static str,
    stack: &'static str,
    expected: &'static str,
    seen: String,
    seconds: f64,
    passed: bool,
}

type Rows = Arc<Mutex<Vec<Row>>>;

fn main() -> anyhow::Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    // They mostly wait; more of them at once would make two cores the thing that is measured.
    arguments.test_threads.get_or_insert(4);
    if arguments.list {
        let names = Stack::ALL.into_iter().flat_map(|stack| {
            SCENARIOS
                .iter()
                .map(move |scenario| Trial::test(name(scenario, stack), || Ok(())))
        });
        return Ok(libtest_mimic::run(&arguments, names.collect()).exit_code());
    }

    let rows = Rows::default();
    let _namespaces = Namespace::prepare(SITES_BEHIND_VETH)?;
    let sites = Stack::ALL
        .into_iter()
        .map(|stack| Ok((stack, Arc::new(shared_site(stack)?))))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let trials = sites.iter().flat_map(|(stack, site)| {
        SCENARIOS
            .iter()
            .map(|scenario| trial(scenario, *stack, Arc::clone(site), Arc::clone(&rows)))
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());

    let mut rows = rows.lock().expect("no trial panics while it adds its row");
    rows.sort_by_key(|row| SCENARIOS.iter().position(|one| one.name == row.scenario));
    let mut failed = rows.iter().filter(|row| !row.passed).count();
    for (stack, site) in &sites {
        // Every scenario is over: whatever is there now was left behind.
        let left = site.api.rooms()?;
        if !left.is_empty() {
            println!("left on the {} server: {left:?}", stack.label());
            failed += 1;
        }
        if failed > 0 {
            println!("{}", site.logs());
        }
    }
    print_table(&rows);
    let absent = absent(
        &rows,
        arguments.filter.is_some() || !arguments.skip.is_empty(),
    );
    for name in &absent {
        println!("no row: {name}");
    }
    failed += absent.len();
    println!(
        "\n{} passed, {failed} failed",
        rows.iter().filter(|row| row.passed).count()
    );
    let good = failed == 0 && !conclusion.has_failed();
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn shared_site(stack: Stack) -> anyhow::Result<Site> {
    let busy = Agent {
        name: BUSY_AGENT,
        load: 1.0,
    };
    stack.start(&[Agent::named(AGENT), busy])
}

fn name(scenario: &Scenario, stack: Stack) -> String {
    format!("{}::{}", stack.label(), scenario.name)
}

fn trial(scenario: &'static Scenario, stack: Stack, site: Arc<Site>, rows: Rows) -> Trial {
    Trial::test(name(scenario, stack), move || {
        let start = Instant::now();
        let ground = Ground {
            stack,
            shared: &site,
        };
        let result = (scenario.run)(&ground);
        let seen = match &result {
            Ok(seen) => seen.clone(),
            Err(error) => error.to_string(),
        };
        let row = Row {
            scenario: scenario.name,
            stack: stack.label(),
            expected: scenario.expected,
            seen: seen.lines().next().unwrap_or_default().to_owned(),
            seconds: start.elapsed().as_secs_f64(),
            passed: result.is_ok(),
        };
        rows.lock()
            .expect("no trial panics while it adds its row")
            .push(row);
        result.map(drop).map_err(|error| {
            let error = format!("{error:#}");
            Failed::from(format!("{error}\n{}", site.logs_about(&error)))
        })
    })
}

fn print_table(rows: &[Row]) {
    println!("\nscenario | stack | expected | seen | seconds");
    for row in rows {
        let Row {
            scenario,
            stack,
            expected,
            seen,
            seconds,
            passed,
        } = row;
        let mark = if *passed { "" } else { "FAILED: " };
        println!("{scenario} | {stack} | {expected} | {mark}{seen} | {seconds:.1}");
    }
}

/// The scenarios that left no row, unless only some were asked for.
fn absent(rows: &[Row], filtered: bool) -> Vec<String> {
    if filtered {
        return Vec::new();
    }
    let expected = Stack::ALL
        .into_iter()
        .flat_map(|stack| SCENARIOS.iter().map(move |scenario| (scenario, stack)));
    expected
        .filter(|(scenario, stack)| {
            !rows
                .iter()
                .any(|row| row.scenario == scenario.name && row.stack == stack.label())
        })
        .map(|(scenario, stack)| name(scenario, stack))
        .collect()
}
