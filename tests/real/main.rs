//! The second layer of tests: the product's own binary against the real stack and the sandbox, one table of scenarios.
//!
//! `cargo test --test real [name]` runs it (`just real`); plain `cargo test` leaves it out, because it needs Go, Python
//! and root for a network namespace. A row for every scenario and stack is printed, and an absent row fails the run, as
//! does a room whose milestones come in another order on one stack than on the other.

#![expect(
    clippy::print_stdout,
    reason = "the table is for whoever runs the tests"
)]

use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Failed, Trial};
use tokio::time::Instant;

mod canary;
mod daemon;
mod gate;
mod home;
mod journey;
mod order;
mod reports;
mod scenarios;
mod stack;
mod twirp;

use journey::Journey;
use scenarios::{Ground, SCENARIOS, Scenario};
use stack::{AGENT, Agent, BUSY_AGENT, Namespace, Site, Stack};

/// Scenarios that start one.
const SITES_BEHIND_VETH: usize = 4;

/// What became of one scenario on one stack.
struct Row {
    scenario: &'static Scenario,
    stack: Stack,
    /// What was seen; `Err` where it isn't what must come of it.
    result: Result<String, String>,
    seconds: f64,
    journeys: Vec<Journey>,
}

type Rows = Arc<Mutex<Vec<Row>>>;

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::from_args();
    if arguments.list {
        let names = Stack::ALL.into_iter().flat_map(on).map(|(name, _)| name);
        let trials = names.map(|name| Trial::test(name, || Ok(())));
        return Ok(libtest_mimic::run(&arguments, trials.collect()).exit_code());
    }

    let rows = Rows::default();
    let mut faults = Vec::new();
    // One after the other: the real agents' jitter buffers tell a busy machine from an idle one.
    for stack in Stack::ALL {
        faults.extend(run(stack, &arguments, &rows)?);
    }
    let mut rows = rows.lock().expect("no trial panics while it adds its row");
    rows.sort_by_key(|row| {
        SCENARIOS
            .iter()
            .position(|one| one.name == row.scenario.name)
    });
    print_table(&rows);
    faults.extend(absent(&rows, &arguments));
    faults.extend(compare(&rows));
    for fault in &faults {
        println!("{fault}");
    }
    let passed = rows.iter().filter(|row| row.result.is_ok()).count();
    let failed = rows.len() - passed + faults.len();
    println!("\n{passed} passed, {failed} failed");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The scenarios of a stack, by the names of their trials.
fn on(stack: Stack) -> impl Iterator<Item = (String, &'static Scenario)> {
    let scenarios = SCENARIOS
        .iter()
        .filter(move |scenario| scenario.absent_on(stack).is_none());
    scenarios.map(move |scenario| (name(scenario, stack), scenario))
}

fn name(scenario: &Scenario, stack: Stack) -> String {
    format!("{}::{}", stack.label(), scenario.name)
}

/// Whether the command line asks for the trial of this name.
fn is_wanted(name: &str, arguments: &Arguments) -> bool {
    let matches = |pattern: &String| {
        if arguments.exact {
            name == pattern
        } else {
            name.contains(pattern)
        }
    };
    arguments.filter.as_ref().is_none_or(matches) && !arguments.skip.iter().any(matches)
}

/// Runs the scenarios of one stack; says what is wrong besides the rows.
fn run(stack: Stack, arguments: &Arguments, rows: &Rows) -> anyhow::Result<Vec<String>> {
    let mut faults = Vec::new();
    if !on(stack).any(|(name, _)| is_wanted(&name, arguments)) {
        return Ok(faults);
    }
    let (_namespaces, site) = match stack {
        // Each scenario starts its own.
        Stack::Sandbox => (Vec::new(), None),
        Stack::Real => {
            let namespaces = Namespace::prepare(SITES_BEHIND_VETH)?;
            (namespaces, Some(Arc::new(shared_site()?)))
        }
    };
    let trials = on(stack).map(|(name, scenario)| {
        let (site, rows) = (site.clone(), Arc::clone(rows));
        Trial::test(name, move || trial(scenario, stack, site.as_deref(), &rows))
    });
    let mut arguments = arguments.clone();
    arguments.test_threads.get_or_insert(at_once(stack));
    let mut failed = libtest_mimic::run(&arguments, trials.collect()).has_failed();
    if let Some(site) = site {
        // Every scenario is over: whatever is there now was left behind.
        let left = site.api.rooms()?;
        if !left.is_empty() {
            faults.push(format!("left on the {} server: {left:?}", stack.label()));
            failed = true;
        }
        if failed {
            println!("{}", site.logs());
        }
    }
    Ok(faults)
}

/// Scenarios that run at the same time. They mostly wait; more of them would make two cores the thing that is measured.
fn at_once(stack: Stack) -> usize {
    match stack {
        Stack::Sandbox => 12,
        // A job of an agent's is a process with an interpreter of its own.
        Stack::Real => 4,
    }
}

fn shared_site() -> anyhow::Result<Site> {
    let busy = Agent {
        name: BUSY_AGENT,
        load: 1.0,
    };
    Site::real(&[Agent::named(AGENT), busy])
}

fn trial(
    scenario: &'static Scenario,
    stack: Stack,
    site: Option<&Site>,
    rows: &Rows,
) -> Result<(), Failed> {
    let start = Instant::now();
    let ground = Ground::new(stack, site);
    let seen = (scenario.run)(&ground).and_then(|seen| ground.expect_empty().map(|()| seen));
    let seconds = start.elapsed().as_secs_f64();
    let failed = seen.as_ref().err().map(|error| {
        let error = format!("{error:#}");
        Failed::from(format!("{error}\n{}", ground.logs(&error)))
    });
    let row = Row {
        scenario,
        stack,
        result: seen.map_err(|error| error.to_string()),
        seconds,
        journeys: ground.journeys(),
    };
    rows.lock()
        .expect("no trial panics while it adds its row")
        .push(row);
    failed.map_or(Ok(()), Err)
}

/// A row for every scenario and stack that was asked for, and one for each that a stack can't express.
fn print_table(rows: &[Row]) {
    println!("\nscenario | stack | expected | seen | seconds");
    for scenario in SCENARIOS {
        let of_scenario: Vec<_> = rows
            .iter()
            .filter(|row| row.scenario.name == scenario.name)
            .collect();
        for row in &of_scenario {
            let (mark, seen) = match &row.result {
                Ok(seen) => ("", seen),
                Err(error) => ("FAILED: ", error),
            };
            let seen = seen.lines().next().unwrap_or_default();
            println!(
                "{} | {} | {} | {mark}{seen} | {:.1}",
                scenario.name,
                row.stack.label(),
                scenario.expected,
                row.seconds
            );
        }
        for stack in Stack::ALL {
            if let (Some(why), false) = (scenario.absent_on(stack), of_scenario.is_empty()) {
                let (name, stack) = (scenario.name, stack.label());
                println!("{name} | {stack} | - | not there: {why} | -");
            }
        }
    }
}

/// The scenarios that left no row.
fn absent(rows: &[Row], arguments: &Arguments) -> Vec<String> {
    let wanted = Stack::ALL.into_iter().flat_map(on);
    wanted
        .filter(|(name, _)| is_wanted(name, arguments))
        .filter(|(wanted, _)| {
            !rows
                .iter()
                .any(|row| name(row.scenario, row.stack) == *wanted)
        })
        .map(|(name, _)| format!("no row: {name}"))
        .collect()
}

/// Where the milestones of a scenario come in another order on one stack than on the other.
fn compare(rows: &[Row]) -> Vec<String> {
    let mut differences = Vec::new();
    let (mut scenarios, mut rooms) = (0, 0);
    for scenario in SCENARIOS {
        let passed = |stack| {
            let mut rows = rows.iter();
            rows.find(|row| {
                row.scenario.name == scenario.name && row.stack == stack && row.result.is_ok()
            })
        };
        let (Some(sandbox), Some(real)) = (passed(Stack::Sandbox), passed(Stack::Real)) else {
            continue;
        };
        scenarios += usize::from(!real.journeys.is_empty());
        rooms += real.journeys.len();
        let found = journey::differences(&sandbox.journeys, &real.journeys);
        let named = found
            .iter()
            .map(|found| format!("{}: sandbox and real differ in {found}", scenario.name));
        differences.extend(named);
    }
    println!("\nmilestones compared: {rooms} rooms of {scenarios} scenarios on both stacks");
    differences
}
