//! The second layer of tests: the product's own binary against the real stack and the sandbox, one table of scenarios.
//!
//! `cargo test --test real [name]` runs it (`just real`, and `just matrix` for the faults alone); plain `cargo test`
//! leaves it out, because it needs Go, Python and root for a network namespace. A row for every scenario and stack is
//! printed, and an absent row fails the run, as does a room whose milestones come in another order on one stack than on
//! the other.

#![expect(
    clippy::print_stdout,
    reason = "the table is for whoever runs the tests"
)]

use std::borrow::Cow;
use std::process::ExitCode;
use std::sync::{Arc, LazyLock, Mutex};

use anyhow::Context as _;
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime;
use tokio::sync::Semaphore;
use tokio::time::Instant;

mod agents;
mod canary;
mod daemon;
mod gate;
mod home;
mod journey;
mod matrix;
mod network;
mod order;
mod relay;
mod reports;
mod scenarios;
mod stack;
mod twirp;

use journey::Journey;
use matrix::{FAULTS, Fault};
use scenarios::{Ground, SCENARIOS, Scenario};
use stack::{AGENT, Agent, BUSY_AGENT, Ipv6, Namespace, Site, Stack};

/// Scenarios and faults that start one.
const SITES_BEHIND_VETH: usize = 8;

/// How often everything is done that is asked for; the figures of all runs are printed at the end.
const REPEAT: &str = "REPEAT";

/// On the real stack: rooms in which agents speak at the same time. An agent is a process with an interpreter of its own,
/// and where more of them than this share two slow cores, some hear no echo for a second or two.
const LOAD_AT_ONCE: usize = 6;

/// One scenario or one fault on one stack.
struct Case {
    kind: Kind,
    stack: Stack,
    /// Why it isn't there.
    absent: Option<&'static str>,
}

#[derive(Clone, Copy)]
enum Kind {
    Scenario(&'static Scenario),
    Fault(&'static Fault),
}

impl Case {
    fn all() -> Vec<Self> {
        let scenarios = SCENARIOS.iter().map(Kind::Scenario);
        let kinds = scenarios.chain(FAULTS.iter().map(Kind::Fault));
        let cases = kinds.flat_map(|kind| Stack::ALL.map(|stack| Self::new(kind, stack)));
        cases.flatten().collect()
    }

    /// `None` where nobody expects it there.
    fn new(kind: Kind, stack: Stack) -> Option<Self> {
        let absent = match kind {
            Kind::Scenario(scenario) => scenario.on(stack)?.err(),
            Kind::Fault(fault) => fault.on(stack)?.err(),
        };
        Some(Self {
            kind,
            stack,
            absent,
        })
    }

    fn name(&self) -> String {
        let stack = self.stack.label();
        match self.kind {
            Kind::Scenario(scenario) => format!("{stack}::{}", scenario.name),
            Kind::Fault(fault) => format!("matrix::{stack}::{}", fault.name),
        }
    }

    fn expected(&self) -> Cow<'static, str> {
        match self.kind {
            Kind::Scenario(scenario) => scenario.expected.into(),
            Kind::Fault(fault) => fault.expected().into(),
        }
    }

    /// Its part of [`LOAD_AT_ONCE`].
    fn load(&self) -> u32 {
        match (self.stack, self.kind) {
            (Stack::Real, Kind::Scenario(scenario)) => scenario.load,
            (Stack::Real, Kind::Fault(_)) => 1,
            (Stack::Sandbox | Stack::Mock, _) => 0,
        }
    }

    /// Does it, and says what was seen and how long it took: of a fault, until the verdict was there.
    fn run(&self, ground: &Ground) -> anyhow::Result<(String, f64)> {
        let start = Instant::now();
        let nothing = "it isn't there";
        Ok(match self.kind {
            Kind::Scenario(scenario) => {
                let run = scenario.on(self.stack).and_then(Result::ok);
                let seen = run.context(nothing)?(ground)?;
                (seen, start.elapsed().as_secs_f64())
            }
            Kind::Fault(fault) => {
                let make = fault.on(self.stack).and_then(Result::ok);
                let row = fault.run(make.context(nothing)?, ground)?;
                (row.seen, row.seconds)
            }
        })
    }
}

static CASES: LazyLock<Vec<Case>> = LazyLock::new(Case::all);

/// What became of one case.
struct Row {
    /// Its place in [`CASES`].
    case: usize,
    /// What was seen; `Err` where it isn't what must come of it.
    result: Result<String, String>,
    seconds: f64,
    journeys: Vec<Journey>,
}

type Rows = Arc<Mutex<Vec<Row>>>;

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::from_args();
    if arguments.list {
        let trials = CASES.iter().filter(|case| case.absent.is_none());
        let trials = trials.map(|case| Trial::test(case.name(), || Ok(())));
        return Ok(libtest_mimic::run(&arguments, trials.collect()).exit_code());
    }
    let times = match std::env::var(REPEAT) {
        Ok(times) => times.parse().with_context(|| format!("{REPEAT}={times}"))?,
        Err(_) => 1,
    };
    let mut all = Vec::new();
    let mut failed = 0;
    for _ in 0..times {
        let (rows, faults) = run_all(&arguments)?;
        let passed = rows.iter().filter(|row| row.result.is_ok()).count();
        let failed_now = rows.len() - passed + faults;
        println!("\n{passed} passed, {failed_now} failed");
        failed += failed_now;
        all.extend(rows);
    }
    if times > 1 {
        print_figures(&all);
    }
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs what is asked for, once, prints the tables, and counts what is wrong besides the rows.
fn run_all(arguments: &Arguments) -> anyhow::Result<(Vec<Row>, usize)> {
    let rows = Rows::default();
    let mut faults = Vec::new();
    // One after the other: the real agents' jitter buffers tell a busy machine from an idle one.
    for stack in Stack::ALL {
        faults.extend(run(stack, arguments, &rows)?);
    }
    let mut rows =
        std::mem::take(&mut *rows.lock().expect("no trial panics while it adds its row"));
    rows.sort_by_key(|row| row.case);
    print_table("scenario", &rows, |kind| matches!(kind, Kind::Scenario(_)));
    print_table("fault", &rows, |kind| matches!(kind, Kind::Fault(_)));
    println!("\n{}", matrix::account());
    faults.extend(absent(&rows, arguments));
    faults.extend(compare(&rows));
    faults.extend(matrix::gaps());
    for fault in &faults {
        println!("{fault}");
    }
    Ok((rows, faults.len()))
}

/// The cases of a stack that the command line asks for.
fn wanted(
    stack: Stack,
    arguments: &Arguments,
) -> impl Iterator<Item = (usize, &'static Case)> + use<'_> {
    let cases = CASES.iter().enumerate();
    cases.filter(move |(_, case)| {
        case.stack == stack && case.absent.is_none() && is_wanted(&case.name(), arguments)
    })
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

/// Runs the cases of one stack; says what is wrong besides the rows.
fn run(stack: Stack, arguments: &Arguments, rows: &Rows) -> anyhow::Result<Vec<String>> {
    let mut faults = Vec::new();
    if wanted(stack, arguments).next().is_none() {
        return Ok(faults);
    }
    let (_network, site) = match stack {
        // Each case starts its own.
        Stack::Sandbox | Stack::Mock => (None, None),
        Stack::Real => {
            stack::sweep()?;
            let network = (Ipv6::add()?, Namespace::prepare(SITES_BEHIND_VETH)?);
            (Some(network), Some(Arc::new(shared_site()?)))
        }
    };
    let load = Arc::new(Semaphore::new(LOAD_AT_ONCE));
    let waiting = runtime::Builder::new_current_thread().build()?;
    let trials = wanted(stack, arguments).map(|(place, case)| {
        let (site, rows, load) = (site.clone(), Arc::clone(rows), Arc::clone(&load));
        let waiting = waiting.handle().clone();
        Trial::test(case.name(), move || {
            // First come, first served, so that no heavy one waits for ever.
            let _part = waiting.block_on(load.acquire_many(case.load()));
            trial(place, case, site.as_deref(), &rows)
        })
    });
    let mut arguments = arguments.clone();
    arguments.test_threads.get_or_insert(at_once(stack));
    let mut failed = libtest_mimic::run(&arguments, trials.collect()).has_failed();
    if let Some(site) = site {
        // Every case is over: whatever is there now was left behind.
        let left = site.api.rooms()?;
        if !left.is_empty() {
            faults.push(format!("left on the {} server: {left:?}", stack.label()));
            println!("{}", site.logs_about(&left.join(" ")));
            failed = true;
        }
        if failed {
            println!("{}", site.logs());
        }
    }
    Ok(faults)
}

/// Cases that run at the same time. They mostly wait; more of them would make two cores the thing that is measured.
fn at_once(stack: Stack) -> usize {
    match stack {
        Stack::Sandbox | Stack::Mock => 12,
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

fn trial(place: usize, case: &Case, site: Option<&Site>, rows: &Rows) -> Result<(), Failed> {
    let start = Instant::now();
    let ground = Ground::new(case.stack, site);
    let seen = case.run(&ground);
    let seen = seen.and_then(|seen| ground.expect_empty().map(|()| seen));
    let failed = seen.as_ref().err().map(|error| {
        let error = format!("{error:#}");
        Failed::from(format!("{error}\n{}", ground.logs(&error)))
    });
    let (result, seconds) = match seen {
        Ok((seen, seconds)) => (Ok(seen), seconds),
        Err(error) => (
            Err(error.root_cause().to_string()),
            start.elapsed().as_secs_f64(),
        ),
    };
    let row = Row {
        case: place,
        result,
        seconds,
        journeys: ground.journeys(),
    };
    rows.lock()
        .expect("no trial panics while it adds its row")
        .push(row);
    failed.map_or(Ok(()), Err)
}

/// A row for every case that was run, and one for each stack that can't express it.
fn print_table(title: &str, rows: &[Row], is_part: impl Fn(Kind) -> bool) {
    let ran = |place: usize| rows.iter().find(|row| row.case == place);
    let name = |kind: Kind| match kind {
        Kind::Scenario(scenario) => scenario.name,
        Kind::Fault(fault) => fault.name,
    };
    let cases = CASES
        .iter()
        .enumerate()
        .filter(|(_, case)| is_part(case.kind));
    let cases: Vec<_> = cases.collect();
    let names: Vec<_> = rows.iter().map(|row| name(CASES[row.case].kind)).collect();
    if !cases.iter().any(|(place, _)| ran(*place).is_some()) {
        return;
    }
    println!("\n{title} | stack | expected | seen | seconds");
    for (place, case) in cases {
        let (name, stack) = (name(case.kind), case.stack.label());
        if let Some(row) = ran(place) {
            let (mark, seen) = match &row.result {
                Ok(seen) => ("", seen),
                Err(error) => ("FAILED: ", error),
            };
            let seen = seen.lines().next().unwrap_or_default();
            let (expected, seconds) = (case.expected(), row.seconds);
            println!("{name} | {stack} | {expected} | {mark}{seen} | {seconds:.1}");
        } else if let (Some(why), true) = (case.absent, names.contains(&name)) {
            println!("{name} | {stack} | - | not there: {why} | -");
        }
    }
}

/// Of several runs: how many were right, and how long they took.
fn print_figures(rows: &[Row]) {
    println!("\ncase | right | seconds, from - to");
    for (place, case) in CASES.iter().enumerate() {
        let of_case: Vec<_> = rows.iter().filter(|row| row.case == place).collect();
        if of_case.is_empty() {
            continue;
        }
        let right = of_case.iter().filter(|row| row.result.is_ok()).count();
        let seconds = of_case.iter().map(|row| row.seconds);
        let least = seconds.clone().fold(f64::INFINITY, f64::min);
        let most = seconds.fold(0.0, f64::max);
        println!(
            "{} | {right} of {} | {least:.1} - {most:.1}",
            case.name(),
            of_case.len()
        );
    }
}

/// The cases that left no row.
fn absent(rows: &[Row], arguments: &Arguments) -> Vec<String> {
    let cases = Stack::ALL.into_iter();
    cases
        .flat_map(|stack| wanted(stack, arguments))
        .filter(|(place, _)| !rows.iter().any(|row| row.case == *place))
        .map(|(_, case)| format!("no row: {}", case.name()))
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
                let case = &CASES[row.case];
                let same = matches!(case.kind, Kind::Scenario(it) if it.name == scenario.name);
                same && case.stack == stack && row.result.is_ok()
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
