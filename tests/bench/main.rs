//! What the canary costs, how fast it answers with a large history, and how accurate its delays are, against the sandbox in another process and against the real
//! server. Run it with `cargo bench --bench load` or `just bench`. It prints tables, and then a JSON object per line. The
//! figures are only valid on an otherwise idle machine.

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Parser, ValueEnum};
use livekit_canary::livekit::audio::opus::{Codec, MAX_PACKET_SAMPLES};
use rustix::process::Signal;
use serde_json::{Value, json};
use support::behaviour::Behaviour;
use support::canary::Running;
use support::process::{Process, command, program};
use support::settings::Settings;
use support::stack::{AGENT, Agent, AgentEvent, KEY, Stack};
use support::{SECRET, network, wait_for};
use tokio::time::Instant;

mod daemon;
mod history;

use daemon::Daemons;
use history::Latency;

/// How long the load of one number of rooms is measured.
const WINDOW: Duration = Duration::from_secs(30);
/// The time between the start of the last call and the measurement: for the start of that room, and for the echo delay of one
/// second.
const SETTLE: Duration = Duration::from_secs(3);
/// The agents of the sandbox use almost no CPU. On the real stack, the talker and livekit-server use too much for 200 rooms on
/// two cores.
const ROOMS_ON_SANDBOX: &[u32] = &[1, 10, 50, 200];
const ROOMS_ON_REAL: &[u32] = &[1, 10, 50];
/// The limit until a program has a call in every room: a fixed part, and a part per room.
const START_TIMEOUT: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(1));
/// The number of rooms whose join is compared with the time of the server. The same number is used for the first speech.
const JOINS: u32 = 50;
/// The number of rooms whose reply is compared with the log of the agent.
const REPLIES: u32 = 10;
/// Opus packets per minute in one room.
const PACKETS_PER_MINUTE: u32 = 50 * 60;

/// Measure the CPU time and memory of the canary, and of another program that does the same work
#[derive(Parser)]
struct Arguments {
    /// Use only this stack; the real one needs Go and Python
    #[arg(long, value_enum)]
    stack: Option<StackChoice>,

    /// Numbers of rooms to measure, one after the other [default: 1,10,50,200 on the sandbox, 1,10,50 on the real stack]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    rooms: Vec<u32>,

    /// Another program to measure with the same work, as a command line for sh
    ///
    /// The program receives four more arguments: the URL of the server, the number of rooms, the name of the agent, and
    /// the number of seconds that it must run. The key pair is in `LIVEKIT_API_KEY` and `LIVEKIT_API_SECRET`. In every room
    /// the program must call the agent and echo its speech. The measurement of the program and of all processes that it
    /// starts begins when the agent speaks in every room.
    #[arg(long, value_name = "CMD")]
    peer: Option<String>,

    /// Measure only the pages and lists with a large history
    #[arg(long)]
    history: bool,

    /// Set by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StackChoice {
    Sandbox,
    Real,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.history {
        for latency in history::measure()? {
            println!("{latency}\n{}", latency.json());
        }
        return Ok(());
    }
    let wants = |stack| arguments.stack.is_none_or(|only| only == stack);
    let packets = speech()?;
    let decoding = decoding(&packets)?;
    let mut found = Findings {
        decoding,
        daemons: None,
        latencies: Vec::new(),
        accuracy: Vec::new(),
        loads: Vec::new(),
    };
    if wants(StackChoice::Sandbox) {
        found.daemons = Some(daemon::measure()?);
        found.latencies = history::measure()?;
        for rooms in arguments.rooms_on(ROOMS_ON_SANDBOX) {
            for program in arguments.programs() {
                // Each program gets a new sandbox, so that rooms of an earlier one don't cost it time.
                let speakers = SpeakingStack::sandbox()?;
                found
                    .loads
                    .push(load(&speakers, Voice::Speech, program, rooms)?);
            }
        }
    }
    if wants(StackChoice::Real) {
        network::sweep()?;
        let stack = Stack::real(&[Agent::named(AGENT).in_processes()])?;
        found.accuracy.push(join_accuracy(&stack)?);
        found.accuracy.push(reply_accuracy(&stack)?);
        let speakers = SpeakingStack::real(stack, &packets)?;
        found.accuracy.push(speech_accuracy(&speakers)?);
        for rooms in arguments.rooms_on(ROOMS_ON_REAL) {
            let transport = load(&speakers, Voice::Undecodable, Program::Canary, rooms)?;
            found.loads.push(transport);
            for program in arguments.programs() {
                found
                    .loads
                    .push(load(&speakers, Voice::Speech, program, rooms)?);
            }
        }
    }
    let ratios: Vec<_> = found.loads.windows(2).filter_map(Ratio::of).collect();
    print_tables(&found, &ratios);
    print_json(&found, &ratios);
    Ok(())
}

impl Arguments {
    fn rooms_on(&self, default: &[u32]) -> Vec<u32> {
        if self.rooms.is_empty() {
            default.to_vec()
        } else {
            self.rooms.clone()
        }
    }

    fn programs(&self) -> impl Iterator<Item = Program<'_>> {
        let peer = self.peer.as_deref().map(Program::Peer);
        [Program::Canary].into_iter().chain(peer)
    }
}

struct Findings {
    /// CPU seconds to decode one minute of speech.
    decoding: f64,
    daemons: Option<Daemons>,
    latencies: Vec<Latency>,
    accuracy: Vec<Accuracy>,
    loads: Vec<Load>,
}

fn print_tables(found: &Findings, ratios: &[Ratio]) {
    let decoding = found.decoding;
    println!();
    if let Some(daemons) = &found.daemons {
        println!("{daemons}");
    }
    for latency in &found.latencies {
        println!("{latency}");
    }
    println!("decoding: {decoding:.3} CPU s per room-minute");
    for accuracy in &found.accuracy {
        println!("{accuracy}");
    }
    println!(
        "\nstack | rooms | program | what the agent sends | CPU s per room-minute | CPU % of a core | RSS MB | threads \
         | server's CPU %"
    );
    for load in &found.loads {
        println!(
            "{} | {} | {} | {} | {:.3} | {:.1} | {:.1} | {} | {:.1}",
            load.stack,
            load.rooms,
            load.program,
            load.voice.label(),
            load.cpu_per_room_minute(),
            percent(load.cpu_seconds),
            load.rss_mb,
            load.threads,
            percent(load.server_cpu_seconds),
        );
    }
    if !ratios.is_empty() {
        println!("\nstack | rooms | CPU, peer / canary | RSS, peer / canary");
    }
    for ratio in ratios {
        let Ratio {
            stack,
            rooms,
            cpu,
            rss,
        } = ratio;
        println!("{stack} | {rooms} | {cpu:.2} | {rss:.2}");
    }
}

/// Prints one JSON object per line.
fn print_json(found: &Findings, ratios: &[Ratio]) {
    let decoding = found.decoding;
    println!();
    println!(
        "{}",
        json!({"bench": "decoding", "cpu_seconds_per_room_minute": decoding})
    );
    for accuracy in &found.accuracy {
        println!("{}", accuracy.json());
    }
    if let Some(daemons) = &found.daemons {
        println!("{}", daemons.json());
    }
    for latency in &found.latencies {
        println!("{}", latency.json());
    }
    for load in &found.loads {
        println!("{}", load.json());
    }
    for ratio in ratios {
        println!("{}", ratio.json());
    }
}

/// The greeting of the sandbox's agent: mono Opus packets of 20 ms. In the file, each is preceded by its length.
fn speech() -> anyhow::Result<Vec<Vec<u8>>> {
    let mut rest = &include_bytes!("../../src/sandbox/greeting.opusframes")[..];
    let mut packets = Vec::new();
    while let [high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let (packet, after) = after
            .split_at_checked(length)
            .context("a packet is cut off")?;
        packets.push(packet.to_vec());
        rest = after;
    }
    Ok(packets)
}

/// CPU seconds to decode one minute of speech, with one packet directly after the other.
fn decoding(packets: &[Vec<u8>]) -> anyhow::Result<f64> {
    const MINUTES: u32 = 20;
    let (mut codec, mut pcm) = (Codec::default(), vec![0; MAX_PACKET_SAMPLES]);
    let before = own_cpu_seconds()?;
    for packet in packets
        .iter()
        .cycle()
        .take((MINUTES * PACKETS_PER_MINUTE) as usize)
    {
        let samples = codec.decode(packet, &mut pcm);
        samples.context("the decoder rejected a packet of speech")?;
    }
    Ok((own_cpu_seconds()? - before) / f64::from(MINUTES))
}

/// What an agent sends without pauses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Voice {
    Speech,
    /// The same number of packets with the same sizes, which the decoder rejects at once. So only the transport uses CPU time.
    Undecodable,
}

impl Voice {
    /// Also the name of the agent that sends it. One process sends it to all rooms.
    fn label(self) -> &'static str {
        match self {
            Self::Speech => "speech",
            Self::Undecodable => "undecodable",
        }
    }

    /// Makes the packets of this voice from packets of speech.
    fn packets(self, mut packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        if self == Self::Undecodable {
            for packet in &mut packets {
                // The header of several frames with a count of 0, which is invalid (RFC 6716, 3.2.5).
                packet[..2].copy_from_slice(&[3, 0]);
            }
        }
        packets
    }
}

/// A server whose agents speak without pauses.
struct SpeakingStack {
    label: &'static str,
    stack: Stack,
    /// The agents of the real stack. All rooms share them.
    talkers: Vec<(Voice, Process)>,
}

impl SpeakingStack {
    fn sandbox() -> anyhow::Result<Self> {
        Ok(Self {
            label: "sandbox",
            stack: Stack::sandbox(AGENT, &["never_pauses".to_owned()])?,
            talkers: Vec::new(),
        })
    }

    fn real(stack: Stack, packets: &[Vec<u8>]) -> anyhow::Result<Self> {
        let talkers = [Voice::Speech, Voice::Undecodable]
            .into_iter()
            .map(|voice| Ok((voice, start_talker(&stack, voice, packets.to_vec())?)))
            .collect::<anyhow::Result<_>>()?;
        Ok(Self {
            label: "real",
            stack,
            talkers,
        })
    }

    fn talker(&self, voice: Voice) -> Option<&Process> {
        let mut talkers = self.talkers.iter();
        talkers.find_map(|(its, talker)| (*its == voice).then_some(talker))
    }

    fn agent(&self, voice: Voice) -> &'static str {
        self.talker(voice).map_or(AGENT, |_| voice.label())
    }

    /// The number of rooms in which the agent of this voice has begun to speak since its start.
    fn rooms_with_speech(&self, voice: Voice) -> anyhow::Result<usize> {
        if let Some(talker) = self.talker(voice) {
            return Ok(talker.log()?.matches("talking").count());
        }
        let events = self.stack.events()?;
        let callers = events.iter().filter(|event| event.name() == "caller");
        let rooms: BTreeSet<_> = callers.map(AgentEvent::room).collect();
        Ok(rooms.len())
    }
}

fn start_talker(stack: &Stack, voice: Voice, packets: Vec<Vec<u8>>) -> anyhow::Result<Process> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("packets");
    let mut data = Vec::new();
    for packet in voice.packets(packets) {
        data.extend(u16::try_from(packet.len())?.to_be_bytes());
        data.extend(packet);
    }
    fs::write(&file, data)?;
    let mut command = command(&program("TALKER")?);
    command
        .args([&stack.url, voice.label()])
        .arg(&file)
        .env("LIVEKIT_API_KEY", KEY)
        .env("LIVEKIT_API_SECRET", SECRET);
    let mut talker = Process::spawn(voice.label(), command, stack.dir())?;
    talker.wait_for_line("registered worker", Duration::from_secs(10))?;
    Ok(talker)
}

/// The difference between the canary's times and the times of the program that caused the events.
struct Accuracy {
    bench: &'static str,
    /// What is subtracted from the time of the canary.
    reference: &'static str,
    /// In milliseconds, ascending. If it is positive, the canary is later.
    differences: Vec<f64>,
}

impl Accuracy {
    fn new(bench: &'static str, reference: &'static str, mut differences: Vec<f64>) -> Self {
        differences.sort_by(f64::total_cmp);
        Self {
            bench,
            reference,
            differences,
        }
    }

    fn quantile(&self, percent: usize) -> f64 {
        self.differences[(self.differences.len() * percent).div_ceil(100).max(1) - 1]
    }

    fn json(&self) -> Value {
        json!({
            "bench": self.bench,
            "rooms": self.differences.len(),
            "min_ms": self.quantile(0),
            "median_ms": self.quantile(50),
            "p99_ms": self.quantile(99),
        })
    }
}

impl std::fmt::Display for Accuracy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [min, median, p99] = [0, 50, 99].map(|percent| self.quantile(percent));
        let (rooms, reference) = (self.differences.len(), self.reference);
        write!(
            f,
            "{rooms} rooms, {reference}: min {min:+.1} ms, median {median:+.1} ms, p99 {p99:+.1} ms"
        )
    }
}

/// Opens many short rooms with real jobs, one after the other, so that the machine is almost idle.
fn join_accuracy(stack: &Stack) -> anyhow::Result<Accuracy> {
    let finished = Settings::new(stack)
        .project("max_rooms", JOINS)
        .behaviour(&Behaviour::greets_briefly())
        .set("batch.rooms", JOINS)
        .set("batch.stay", "one_by_one")
        .set("batch.hold", "2s")
        .run()?;
    let batch = finished.batch()?;
    let mut differences = Vec::new();
    for probe in &batch.probes {
        let agent = probe.agent.as_ref();
        let agent = agent.with_context(|| format!("no agent in {probe:?}"))?;
        differences.push(probe.at("AgentJoined")? * 1e3 - agent.joined_at_ms);
    }
    ensure!(
        differences.len() == JOINS as usize,
        "only {} rooms",
        differences.len()
    );
    let reference = "AgentJoined - the server's joined_at";
    Ok(Accuracy::new("join_accuracy", reference, differences))
}

/// The talker logs when it sends its first packet of speech. Only the way through the server is in between. A livekit-agents
/// job can't log it as exactly, because its SDK encodes and paces the audio.
fn speech_accuracy(speakers: &SpeakingStack) -> anyhow::Result<Accuracy> {
    let talker = speakers.talker(Voice::Speech).context("no talker")?;
    let finished = Settings::new(&speakers.stack)
        .project("max_rooms", JOINS)
        .set("agent_name", speakers.agent(Voice::Speech))
        .set("batch.rooms", JOINS)
        .set("batch.ramp", "interval")
        .set("batch.interval", "200ms")
        .set("batch.hold", "6s")
        .run()?;
    let batch = finished.batch()?;
    let log = talker.log()?;
    let mut differences = Vec::new();
    for probe in &batch.probes {
        let prefix = format!("talking {} ", probe.room);
        let sent = log.lines().find_map(|line| line.strip_prefix(&prefix));
        let sent: f64 = sent
            .with_context(|| format!("the talker didn't speak in {}", probe.room))?
            .parse()?;
        differences.push((probe.at("AgentSpoke")? - sent) * 1e3);
    }
    ensure!(
        differences.len() == JOINS as usize,
        "only {} rooms",
        differences.len()
    );
    let reference = "AgentSpoke - the agent's first packet of speech";
    Ok(Accuracy::new(
        "first_speech_accuracy",
        reference,
        differences,
    ))
}

/// Compares the reply delay with the log of the agent.
///
/// The agent measures from the end of the echo that it heard until its session enters the state `speaking`, with the first
/// frame on its track. The canary measures from the end of the last packet of speech that it sent until the first audible
/// packet arrives. So its delay also contains both ways through the server and the agent's jitter buffer, for which the
/// caller waits, too.
fn reply_accuracy(stack: &Stack) -> anyhow::Result<Accuracy> {
    // With each call the worker starts a process for its next job. On two cores that would delay the conversation, so the agent
    // connects later.
    let behaviour = Behaviour::replies()
        .with("connect_after", 5)
        .with("seconds", 1);
    let finished = Settings::new(stack)
        .project("max_rooms", REPLIES)
        .behaviour(&behaviour)
        .set("expect.reply", true)
        .set("batch.rooms", REPLIES)
        .set("batch.stay", "one_by_one")
        .set("batch.hold", "6s")
        .run()?;
    let batch = finished.batch()?;
    let events = stack.events()?;
    let mut differences = Vec::new();
    for probe in &batch.probes {
        let reported = |name: &str, key: &str| {
            let mut events = events.iter();
            let event = events.find(|event| event.room() == probe.room && event.name() == name);
            event
                .with_context(|| format!("no {name} in {}", probe.room))?
                .number(key)
        };
        let own = reported("replied", "began")? - reported("heard", "ended")?;
        let delay = probe.reply_delay_seconds;
        let delay = delay.with_context(|| format!("no reply in {probe:?}"))?;
        differences.push((delay - own) * 1e3);
    }
    ensure!(
        differences.len() == REPLIES as usize,
        "only {} rooms",
        differences.len()
    );
    let reference = "reply delay - the agent's own";
    Ok(Accuracy::new("reply_accuracy", reference, differences))
}

/// The program that is measured.
#[derive(Clone, Copy)]
enum Program<'a> {
    Canary,
    /// With its command line.
    Peer(&'a str),
}

/// The running program.
enum RunningProgram {
    Canary(Running),
    Peer(Process),
}

/// What a program used while speech flowed in both directions in all of its rooms.
struct Load {
    stack: &'static str,
    program: &'static str,
    voice: Voice,
    rooms: u32,
    /// Over [`WINDOW`].
    cpu_seconds: f64,
    rss_mb: f64,
    threads: f64,
    /// Over [`WINDOW`].
    server_cpu_seconds: f64,
}

impl Load {
    fn cpu_per_room_minute(&self) -> f64 {
        self.cpu_seconds * 60.0 / WINDOW.as_secs_f64() / f64::from(self.rooms)
    }

    fn json(&self) -> Value {
        json!({
            "bench": "load",
            "stack": self.stack,
            "program": self.program,
            "voice": self.voice.label(),
            "rooms": self.rooms,
            "cpu_seconds_per_room_minute": self.cpu_per_room_minute(),
            "cpu_percent_of_a_core": percent(self.cpu_seconds),
            "rss_mb": self.rss_mb,
            "threads": self.threads,
            "server_cpu_percent_of_a_core": percent(self.server_cpu_seconds),
        })
    }
}

/// Of one core, over [`WINDOW`].
fn percent(cpu_seconds: f64) -> f64 {
    100.0 * cpu_seconds / WINDOW.as_secs_f64()
}

/// The usage of a peer divided by that of the canary, for the same work.
struct Ratio {
    stack: &'static str,
    rooms: u32,
    cpu: f64,
    rss: f64,
}

impl Ratio {
    /// The ratio of two consecutive loads if they have the same stack and rooms.
    fn of(pair: &[Load]) -> Option<Self> {
        let [canary, peer] = pair else { return None };
        let together = (canary.stack, canary.rooms) == (peer.stack, peer.rooms);
        (together && peer.program != canary.program).then(|| Self {
            stack: peer.stack,
            rooms: peer.rooms,
            cpu: peer.cpu_seconds / canary.cpu_seconds,
            rss: peer.rss_mb / canary.rss_mb,
        })
    }

    fn json(&self) -> Value {
        let Self {
            stack,
            rooms,
            cpu,
            rss,
        } = self;
        json!({"bench": "ratio", "stack": stack, "rooms": rooms, "cpu": cpu, "rss": rss})
    }
}

impl Program<'_> {
    fn label(self) -> &'static str {
        match self {
            Self::Canary => "canary",
            Self::Peer(_) => "peer",
        }
    }

    fn start(
        self,
        speakers: &SpeakingStack,
        voice: Voice,
        rooms: u32,
    ) -> anyhow::Result<RunningProgram> {
        match self {
            Self::Canary => {
                let settings = Settings::new(&speakers.stack)
                    .project("max_rooms", rooms)
                    .set("agent_name", speakers.agent(voice))
                    .set("batch.rooms", rooms)
                    .set("batch.ramp", "interval")
                    .set("batch.interval", "200ms")
                    .set("batch.hold", "5m")
                    // The canary hears no speech in packets that can't be decoded.
                    .set("deadlines.speech", "5m")
                    .set("caller.mode", "pass_through");
                Ok(RunningProgram::Canary(settings.once()?))
            }
            Self::Peer(line) => {
                let seconds = (start_timeout(rooms) + SETTLE + WINDOW).as_secs();
                let mut command = command("sh");
                command
                    .args(["-c", &format!("{line} \"$@\""), "peer"])
                    .args([
                        &speakers.stack.url,
                        &rooms.to_string(),
                        speakers.agent(voice),
                    ])
                    .arg(seconds.to_string())
                    .env("LIVEKIT_URL", &speakers.stack.url)
                    .env("LIVEKIT_API_KEY", &speakers.stack.key)
                    .env("LIVEKIT_API_SECRET", &speakers.stack.secret);
                let peer = Process::spawn("peer", command, speakers.stack.dir())?;
                Ok(RunningProgram::Peer(peer))
            }
        }
    }
}

fn start_timeout(rooms: u32) -> Duration {
    START_TIMEOUT.0 + START_TIMEOUT.1 * rooms
}

impl RunningProgram {
    fn id(&self) -> u32 {
        match self {
            Self::Canary(running) => running.child.id(),
            Self::Peer(peer) => peer.child.id(),
        }
    }

    /// Its output, for the error if it doesn't work.
    fn log(self) -> anyhow::Result<String> {
        match self {
            Self::Canary(running) => {
                running.signal(Signal::INT)?;
                Ok(running.finish()?.output())
            }
            Self::Peer(peer) => peer.log(),
        }
    }

    /// Ends the program. For the canary, also checks that speech flowed.
    fn end(self) -> anyhow::Result<()> {
        let Self::Canary(running) = self else {
            return Ok(());
        };
        running.signal(Signal::INT)?;
        let finished = running.finish()?;
        let expected = WINDOW.as_secs() * 50;
        for probe in finished.batch()?.probes {
            ensure!(
                probe.audio.packets >= expected,
                "speech didn't flow: {probe:?}"
            );
        }
        Ok(())
    }
}

fn load(
    speakers: &SpeakingStack,
    voice: Voice,
    program: Program<'_>,
    rooms: u32,
) -> anyhow::Result<Load> {
    println!(
        "load: {}, {rooms} room(s), {}, {}",
        speakers.label,
        program.label(),
        voice.label()
    );
    let before = speakers.rooms_with_speech(voice)?;
    let subject = program.start(speakers, voice, rooms)?;
    let all = wait_for(
        "the agent to speak in all rooms",
        start_timeout(rooms),
        || Ok((speakers.rooms_with_speech(voice)? >= before + rooms as usize).then_some(())),
    );
    if let Err(error) = all {
        return Err(error.context(subject.log()?));
    }
    pause(SETTLE);
    let used = (
        usage(subject.id())?,
        usage(speakers.stack.server.child.id())?,
    );
    pause(WINDOW);
    let (now, server) = (
        usage(subject.id())?,
        usage(speakers.stack.server.child.id())?,
    );
    subject.end()?;
    Ok(Load {
        stack: speakers.label,
        program: program.label(),
        voice,
        rooms,
        cpu_seconds: now.cpu_seconds - used.0.cpu_seconds,
        rss_mb: now.rss_mb,
        threads: now.threads,
        server_cpu_seconds: server.cpu_seconds - used.1.cpu_seconds,
    })
}

fn pause(length: Duration) {
    let start = Instant::now();
    while let Some(rest) = length.checked_sub(start.elapsed()) {
        std::thread::sleep(rest);
    }
}

/// What a process and the processes that it started have used.
#[derive(Default)]
struct Usage {
    cpu_seconds: f64,
    rss_mb: f64,
    threads: f64,
}

/// The usage of a process, and of its process group if it leads one.
fn usage(process: u32) -> anyhow::Result<Usage> {
    let mut usage = Usage::default();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(id) = name.to_str().filter(|name| name.parse::<u32>().is_ok()) else {
            continue;
        };
        // The process may have ended since the folder was read.
        let Ok(fields) = stat(id) else { continue };
        let group = fields.get(GROUP).context("no process group")?;
        if id == process.to_string() || *group == process.to_string() {
            usage.cpu_seconds += ticks(&fields)?;
            usage.rss_mb += status(id, "VmRSS:").unwrap_or(0.0) / 1024.0;
            usage.threads += status(id, "Threads:").unwrap_or(0.0);
        }
    }
    ensure!(usage.threads > 0.0, "process {process} has ended");
    Ok(usage)
}

/// Indexes in /proc/…/stat after the name. The name is in parentheses and may contain spaces.
const GROUP: usize = 2;
const USER_TIME: usize = 11;

fn stat(process: &str) -> anyhow::Result<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("no name in stat")?;
    Ok(fields.split(' ').map(str::to_owned).collect())
}

/// User and system time, with a resolution of 10 ms.
fn ticks(fields: &[String]) -> anyhow::Result<f64> {
    let times = fields.iter().skip(USER_TIME).take(2);
    let ticks = times.map(|it| it.parse::<f64>()).sum::<Result<f64, _>>()?;
    // USER_HZ is 100 on every Linux.
    Ok(ticks / 100.0)
}

/// User and system time of this process, with a resolution of 10 ms.
fn own_cpu_seconds() -> anyhow::Result<f64> {
    ticks(&stat("self")?)
}

/// A figure of /proc/…/status, in the unit of that file.
fn status(process: &str, key: &str) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .with_context(|| format!("no {key}"))?;
    let figure = line.split_whitespace().next().context("no figure")?;
    Ok(figure.parse()?)
}
