//! Scenarios and faults: the canary's binary against the sandbox and against the real stack.
//!
//! Run it with `cargo test --test real [FILTER]` or `just real`; `just matrix` runs only the faults. Plain `cargo test` leaves
//! it out, because it needs Go, Python, and root for network namespaces.
//!
//! The run prints a row for every case. It fails if a case fails or leaves no row, or if the milestones of a room have another
//! order on one stack than on the other.

#![expect(clippy::print_stdout, reason = "the tables are the output of the run")]

use std::borrow::Cow;
use std::process::ExitCode;
use std::sync::{Arc, LazyLock, Mutex};

use anyhow::Context as _;
use libtest_mimic::{Arguments, Failed, Trial};
use support::canary::rooms_in_doubt;
use support::network::{self, LoopbackIpv6, Namespace};
use support::process;
use support::stack::{AGENT, Agent, BUSY_AGENT, Nursery, Stack, StackKind};
use tokio::runtime;
use tokio::sync::Semaphore;
use tokio::time::Instant;

mod agents;
mod conversation;
mod daemon;
mod detection;
mod fixture;
mod machine;
mod matrix;
mod network_path;
mod proxy;
mod relay;
mod reports;
mod scenarios;
mod timeline;
mod turn;

use conversation::CONVERSATIONS;
use fixture::Fixture;
use machine::Machine;
use matrix::{FAULTS, Fault};
use scenarios::{SCENARIOS, Scenario};
use timeline::Timeline;

/// The number of scenarios and faults that start a stack behind a veth pair.
const STACKS_BEHIND_VETH: usize = 16;

/// The variable with the number of runs. After several runs, the figures of all runs are printed.
const REPEAT: &str = "REPEAT";

/// The maximum of rooms on the real stack in which agents speak at the same time. If more than this share two slow cores, some of
/// their agents receive no echo for a second or two.
const MAX_LOAD: u32 = 9;

/// What a room with an agent that converses counts at least: its models need as much time as another agent.
const CONVERSATION_LOAD: u32 = 2;

/// One scenario or one fault on one kind of stack.
struct Case {
    test: Test,
    stack: StackKind,
    /// Why it can't run there; `None` if it can.
    absent: Option<&'static str>,
}

#[derive(Clone, Copy)]
enum Test {
    Scenario(&'static Scenario),
    Fault(&'static Fault),
}

impl Test {
    fn name(self) -> &'static str {
        match self {
            Self::Scenario(scenario) => scenario.name,
            Self::Fault(fault) => fault.name,
        }
    }
}

impl Case {
    fn all() -> Vec<Self> {
        let scenarios = SCENARIOS.iter().chain(CONVERSATIONS).map(Test::Scenario);
        let tests = scenarios.chain(FAULTS.iter().map(Test::Fault));
        let cases = tests.flat_map(|test| StackKind::ALL.map(|stack| Self::new(test, stack)));
        cases.flatten().collect()
    }

    /// `None` if the test isn't meant for this kind of stack.
    fn new(test: Test, stack: StackKind) -> Option<Self> {
        let absent = match test {
            Test::Scenario(scenario) => scenario.on(stack)?.err(),
            Test::Fault(fault) => fault.on(stack)?.err(),
        };
        Some(Self {
            test,
            stack,
            absent,
        })
    }

    fn name(&self) -> String {
        let (stack, name) = (self.stack.label(), self.test.name());
        match self.test {
            Test::Scenario(scenario) if conversation::contains(scenario) => {
                format!("{stack}::conversation::{name}")
            }
            Test::Scenario(_) => format!("{stack}::{name}"),
            Test::Fault(_) => format!("matrix::{stack}::{name}"),
        }
    }

    fn expected(&self) -> Cow<'static, str> {
        match self.test {
            Test::Scenario(scenario) => scenario.expected.into(),
            Test::Fault(fault) => fault.expected().into(),
        }
    }

    /// How much of [`MAX_LOAD`] the case uses.
    fn load(&self) -> u32 {
        match (self.stack, self.test) {
            (StackKind::Real, Test::Scenario(scenario)) if conversation::contains(scenario) => {
                scenario.load.max(CONVERSATION_LOAD)
            }
            (StackKind::Real, Test::Scenario(scenario)) => scenario.load,
            (StackKind::Real, Test::Fault(fault)) if fault.expects_reply() => CONVERSATION_LOAD,
            (StackKind::Real, Test::Fault(_)) => 1,
            (StackKind::Sandbox | StackKind::Mock, _) => 0,
        }
    }

    /// Runs the test. Returns a summary of what it saw, and the seconds that it took; for a fault, the seconds until the
    /// verdict.
    fn run(&self, fixture: &Fixture) -> anyhow::Result<(String, f64)> {
        let start = Instant::now();
        let absent = "it can't run on this stack";
        Ok(match self.test {
            Test::Scenario(scenario) => {
                let run = scenario.on(self.stack).and_then(Result::ok);
                let summary = run.context(absent)?(fixture)?;
                (summary, start.elapsed().as_secs_f64())
            }
            Test::Fault(fault) => {
                let inject = fault.on(self.stack).and_then(Result::ok);
                let verdict = fault.run(inject.context(absent)?, fixture)?;
                (verdict.summary, verdict.seconds)
            }
        })
    }
}

static CASES: LazyLock<Vec<Case>> = LazyLock::new(Case::all);

/// The result of one case.
struct Row {
    /// The index in [`CASES`].
    case: usize,
    /// A summary, or the error of a failed case.
    result: Result<String, String>,
    seconds: f64,
    timelines: Vec<Timeline>,
}

type Rows = Arc<Mutex<Vec<Row>>>;

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::from_args();
    if arguments.list {
        let trials = CASES.iter().filter(|case| case.absent.is_none());
        let trials = trials.map(|case| Trial::test(case.name(), || Ok(())));
        return Ok(libtest_mimic::run(&arguments, trials.collect()).exit_code());
    }
    let runs = match std::env::var(REPEAT) {
        Ok(runs) => runs.parse().with_context(|| format!("{REPEAT}={runs}"))?,
        Err(_) => 1,
    };
    let mut all = Vec::new();
    let mut failed = 0;
    for _ in 0..runs {
        let (rows, problems) = run_all(&arguments)?;
        let passed = rows.iter().filter(|row| row.result.is_ok()).count();
        let failed_now = rows.len() - passed + problems;
        println!("\n{passed} passed, {failed_now} failed");
        failed += failed_now;
        all.extend(rows);
    }
    if runs > 1 {
        print_figures(&all);
    }
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs all requested cases once and prints the tables. Returns the rows, and the number of problems that belong to no row.
fn run_all(arguments: &Arguments) -> anyhow::Result<(Vec<Row>, usize)> {
    let rows = Rows::default();
    let mut problems = Vec::new();
    // One stack after the other: on a busy machine the jitter buffers of the real agents become larger.
    for stack in StackKind::ALL {
        problems.extend(run_stack(stack, arguments, &rows)?);
    }
    let mut rows =
        std::mem::take(&mut *rows.lock().expect("no trial panics while it adds its row"));
    rows.sort_by_key(|row| row.case);
    print_table("scenario", &rows, |test| matches!(test, Test::Scenario(_)));
    print_table("fault", &rows, |test| matches!(test, Test::Fault(_)));
    println!("\n{}", matrix::summary());
    problems.extend(missing_rows(&rows, arguments));
    problems.extend(compare_timelines(&rows));
    problems.extend(matrix::gaps());
    for problem in &problems {
        println!("{problem}");
    }
    Ok((rows, problems.len()))
}

/// The cases on one kind of stack that the command line requests.
fn requested(
    stack: StackKind,
    arguments: &Arguments,
) -> impl Iterator<Item = (usize, &'static Case)> + use<'_> {
    let cases = CASES.iter().enumerate();
    cases.filter(move |(_, case)| {
        case.stack == stack && case.absent.is_none() && is_requested(&case.name(), arguments)
    })
}

fn is_requested(name: &str, arguments: &Arguments) -> bool {
    let matches = |pattern: &String| {
        if arguments.exact {
            name == pattern
        } else {
            name.contains(pattern)
        }
    };
    arguments.filter.as_ref().is_none_or(matches) && !arguments.skip.iter().any(matches)
}

/// Runs the cases on one kind of stack. Returns the problems that belong to no row.
fn run_stack(kind: StackKind, arguments: &Arguments, rows: &Rows) -> anyhow::Result<Vec<String>> {
    let mut problems = Vec::new();
    if requested(kind, arguments).next().is_none() {
        return Ok(problems);
    }
    let (_needs, shared) = match kind {
        // Each case starts a stack.
        StackKind::Sandbox | StackKind::Mock => (None, None),
        StackKind::Real => {
            process::prioritise_media()?;
            network::sweep()?;
            let namespaces = Namespace::prepare(STACKS_BEHIND_VETH)?;
            let needs = (LoopbackIpv6::add()?, namespaces, Nursery::start()?);
            (Some(needs), Some(Arc::new(shared_stack()?)))
        }
    };
    let load = Arc::new(Semaphore::new(MAX_LOAD as usize));
    let machine = Arc::new(Machine::default());
    let runtime = runtime::Builder::new_current_thread().build()?;
    let trials = requested(kind, arguments).map(|(index, case)| {
        let (shared, rows, load) = (shared.clone(), Arc::clone(rows), Arc::clone(&load));
        let machine = Arc::clone(&machine);
        let runtime = runtime.handle().clone();
        Trial::test(case.name(), move || {
            // The semaphore is fair, so that a case with much load doesn't wait for ever.
            let _permits = runtime.block_on(load.acquire_many(case.load().min(MAX_LOAD)));
            if kind == StackKind::Real {
                machine.wait()?;
            }
            trial(index, case, shared.as_deref(), &rows)
        })
    });
    let mut arguments = arguments.clone();
    arguments.test_threads.get_or_insert(max_threads(kind));
    let failed = libtest_mimic::run(&arguments, trials.collect()).has_failed();
    if let Some(shared) = shared {
        // Every case has ended, so a room that exists now was left behind, unless its canary said so: a late agent creates a
        // room again.
        let mut left = shared.api.rooms()?;
        left.retain(|room| !rooms_in_doubt().contains(room));
        if failed || !left.is_empty() {
            println!("{}", shared.logs());
        }
        if !left.is_empty() {
            // With its log lines at the end of the output, the only part that CI shows.
            problems.push(format!(
                "rooms left on the {} server: {left:?}\n{}",
                kind.label(),
                shared.logs_about(&left.join(" "))
            ));
        }
    }
    Ok(problems)
}

/// The maximum of cases that run at the same time. They mostly wait. With more of them, two cores would limit the result.
fn max_threads(stack: StackKind) -> usize {
    match stack {
        StackKind::Sandbox | StackKind::Mock => 16,
        // Each of them has a load.
        StackKind::Real => MAX_LOAD as usize,
    }
}

fn shared_stack() -> anyhow::Result<Stack> {
    let busy = Agent {
        name: BUSY_AGENT,
        load: 1.0,
        ..Agent::named("")
    };
    let (tones, conversation) = (Agent::named(AGENT), Agent::conversation());
    Stack::real(&[tones.in_processes(), busy, conversation.in_processes()])
}

fn trial(index: usize, case: &Case, shared: Option<&Stack>, rows: &Rows) -> Result<(), Failed> {
    let start = Instant::now();
    let fixture = Fixture::new(case.stack, shared);
    let result = case.run(&fixture);
    let result = result.and_then(|seen| fixture.expect_no_rooms().map(|()| seen));
    let failed = result.as_ref().err().map(|error| {
        let error = format!("{error:#}");
        Failed::from(format!("{error}\n{}", fixture.logs(&error)))
    });
    let (result, seconds) = match result {
        Ok((summary, seconds)) => (Ok(summary), seconds),
        Err(error) => (
            Err(error.root_cause().to_string()),
            start.elapsed().as_secs_f64(),
        ),
    };
    let row = Row {
        case: index,
        result,
        seconds,
        timelines: fixture.into_timelines(),
    };
    rows.lock()
        .expect("no trial panics while it adds its row")
        .push(row);
    failed.map_or(Ok(()), Err)
}

/// Prints a row for every case that ran, and one for every stack on which such a test can't run.
fn print_table(title: &str, rows: &[Row], is_part: impl Fn(Test) -> bool) {
    let row_of = |index: usize| rows.iter().find(|row| row.case == index);
    let cases = CASES
        .iter()
        .enumerate()
        .filter(|(_, case)| is_part(case.test));
    let cases: Vec<_> = cases.collect();
    let ran: Vec<_> = rows.iter().map(|row| CASES[row.case].test.name()).collect();
    if !cases.iter().any(|(index, _)| row_of(*index).is_some()) {
        return;
    }
    println!("\n{title} | stack | expected | seen | seconds");
    for (index, case) in cases {
        let (name, stack) = (case.test.name(), case.stack.label());
        if let Some(row) = row_of(index) {
            let (mark, seen) = match &row.result {
                Ok(seen) => ("", seen),
                Err(error) => ("FAILED: ", error),
            };
            let seen = seen.lines().next().unwrap_or_default();
            let (expected, seconds) = (case.expected(), row.seconds);
            println!("{name} | {stack} | {expected} | {mark}{seen} | {seconds:.1}");
        } else if let (Some(why), true) = (case.absent, ran.contains(&name)) {
            println!("{name} | {stack} | - | can't run there: {why} | -");
        }
    }
}

/// Prints for several runs how many were right, and how long they took.
fn print_figures(rows: &[Row]) {
    println!("\ncase | right | seconds, from - to");
    for (index, case) in CASES.iter().enumerate() {
        let of_case: Vec<_> = rows.iter().filter(|row| row.case == index).collect();
        if of_case.is_empty() {
            continue;
        }
        let right = of_case.iter().filter(|row| row.result.is_ok()).count();
        let seconds = of_case.iter().map(|row| row.seconds);
        let min = seconds.clone().fold(f64::INFINITY, f64::min);
        let max = seconds.fold(0.0, f64::max);
        println!(
            "{} | {right} of {} | {min:.1} - {max:.1}",
            case.name(),
            of_case.len()
        );
    }
}

/// The requested cases that have no row.
fn missing_rows(rows: &[Row], arguments: &Arguments) -> Vec<String> {
    let stacks = StackKind::ALL.into_iter();
    stacks
        .flat_map(|stack| requested(stack, arguments))
        .filter(|(index, _)| !rows.iter().any(|row| row.case == *index))
        .map(|(_, case)| format!("no row: {}", case.name()))
        .collect()
}

/// The scenarios whose milestones have another order on one stack than on the other.
fn compare_timelines(rows: &[Row]) -> Vec<String> {
    let mut problems = Vec::new();
    let (mut scenarios, mut rooms) = (0, 0);
    for scenario in SCENARIOS {
        let passed = |stack| {
            let mut rows = rows.iter();
            rows.find(|row| {
                let case = &CASES[row.case];
                let same = matches!(case.test, Test::Scenario(it) if it.name == scenario.name);
                same && case.stack == stack && row.result.is_ok()
            })
        };
        let (Some(sandbox), Some(real)) = (passed(StackKind::Sandbox), passed(StackKind::Real))
        else {
            continue;
        };
        scenarios += usize::from(!real.timelines.is_empty());
        rooms += real.timelines.len();
        let differences = timeline::differences(&sandbox.timelines, &real.timelines);
        let differences = differences.iter().map(|difference| {
            format!("{}: sandbox and real differ in {difference}", scenario.name)
        });
        problems.extend(differences);
    }
    println!("\nmilestones compared: {rooms} rooms of {scenarios} scenarios on both stacks");
    problems
}
