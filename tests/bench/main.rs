//! What the canary costs, and how accurate its delays are, against the sandbox in another process and against the real
//! server. Run it with `cargo bench --bench load` or `just bench`. It prints tables, and then a JSON object per line. The
//! figures are only valid on an otherwise idle machine.

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Parser, ValueEnum};
use livekit_canary::livekit::audio::opus::{Codec, MAX_PACKET_SAMPLES};
use ropus::{Application, Channels, Encoder};
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

use daemon::Daemons;

/// How long the load of one number of rooms is measured.
const WINDOW: Duration = Duration::from_secs(30);
/// From the last room's call to the window: for that room's own start, and the echo's delay of one second.
const SETTLE: Duration = Duration::from_secs(3);
/// The sandbox's agents cost next to nothing; the talker and livekit-server leave two cores no room for 200.
const ROOMS_ON_SANDBOX: &[u32] = &[1, 10, 50, 200];
const ROOMS_ON_REAL: &[u32] = &[1, 10, 50];
/// The longest that a program may take until it has a call in every room: so much, and so much a room.
const START: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(1));
/// Rooms whose join is compared with the server's own stamp, and as many whose first speech is with the agent's.
const JOINS: u32 = 50;
/// Rooms whose reply is compared with the agent's own log.
const REPLIES: u32 = 10;
/// Scrape a second of the speech that is encoded.
const RATE: u16 = 48_000;
/// Packets of Opus that one room brings in a minute.
const PACKETS_A_MINUTE: u32 = 50 * 60;

/// Measure what the canary costs, and another program on the same work
#[derive(Parser)]
struct Arguments {
    /// Only on this stack; the real one needs Go and Python
    #[arg(long, value_enum)]
    stack: Option<StackChoice>,

    /// How many rooms to hold open, one after the other [default: 1,10,50,200 on the sandbox, 1,10,50 on the real stack]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    rooms: Vec<u32>,

    /// Another program to measure on the same work, as a command line for sh
    ///
    /// It gets four arguments more: the server's URL, the number of rooms, the agent's name, and how many seconds it
    /// must last; and the key pair in the usual two variables. In every room it calls the agent and echoes what that
    /// says. It and all that it starts are measured once the agent speaks in every room.
    #[arg(long, value_name = "CMD")]
    peer: Option<String>,

    /// Given by cargo
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
    let wants = |stack| arguments.stack.is_none_or(|only| only == stack);
    let packets = speech()?;
    let decoding = decoding(&packets)?;
    let mut found = Findings {
        decoding,
        daemons: None,
        accuracy: Vec::new(),
        loads: Vec::new(),
    };
    if wants(StackChoice::Sandbox) {
        found.daemons = Some(daemon::measure()?);
        for rooms in arguments.rooms_on(ROOMS_ON_SANDBOX) {
            for program in arguments.programs() {
                // What one left behind must not be the other's burden.
                let speakers = SpeakingStack::sandbox()?;
                found
                    .loads
                    .push(load(&speakers, Voice::Speech, program, rooms)?);
            }
        }
    }
    if wants(StackChoice::Real) {
        network::sweep()?;
        let stack = Stack::real(&[Agent::named(AGENT)])?;
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
    /// CPU seconds for what one room's agent says in one minute.
    decoding: f64,
    daemons: Option<Daemons>,
    accuracy: Vec<Accuracy>,
    loads: Vec<Load>,
}

fn print_tables(found: &Findings, ratios: &[Ratio]) {
    let decoding = found.decoding;
    println!();
    if let Some(daemons) = &found.daemons {
        println!("{daemons}");
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

/// One object a line.
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
    for load in &found.loads {
        println!("{}", load.json());
    }
    for ratio in ratios {
        println!("{}", ratio.json());
    }
}

/// One second of something like voiced speech: Opus packets of 20 ms, mono.
fn speech() -> anyhow::Result<Vec<Vec<u8>>> {
    let mut encoder =
        Encoder::builder(u32::from(RATE), Channels::Mono, Application::Voip).build()?;
    (0..50_u16)
        .map(|frame| {
            let samples = (frame * 960..(frame + 1) * 960)
                .map(|index| {
                    let at = f32::from(index) / f32::from(RATE) * std::f32::consts::TAU;
                    0.3 * (at * 180.0).sin() + 0.2 * (at * 1270.0).sin()
                })
                .collect::<Vec<_>>();
            let mut packet = vec![0; 1500];
            let length = encoder.encode_float(&samples, &mut packet)?;
            packet.truncate(length);
            Ok(packet)
        })
        .collect()
}

/// CPU seconds for decoding what one room's agent says in one minute, one packet right after the other.
fn decoding(packets: &[Vec<u8>]) -> anyhow::Result<f64> {
    const MINUTES: u32 = 20;
    let (mut codec, mut pcm) = (Codec::default(), vec![0; MAX_PACKET_SAMPLES]);
    let before = own_cpu_seconds()?;
    for packet in packets
        .iter()
        .cycle()
        .take((MINUTES * PACKETS_A_MINUTE) as usize)
    {
        let samples = codec.decode(packet, &mut pcm);
        samples.context("a packet of speech was turned down")?;
    }
    Ok((own_cpu_seconds()? - before) / f64::from(MINUTES))
}

/// What an agent sends without a pause.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Voice {
    Speech,
    /// As many packets of the same sizes, which the decoder turns down at once: what is left is the transport.
    Undecodable,
}

impl Voice {
    /// Also the name of the agent that sends it, all rooms in one process.
    fn label(self) -> &'static str {
        match self {
            Self::Speech => "speech",
            Self::Undecodable => "undecodable",
        }
    }

    /// Made of packets of speech.
    fn of(self, mut packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        if self == Self::Undecodable {
            for packet in &mut packets {
                // A packet of several frames, and none of them (RFC 6716, 3.2.5).
                packet[..2].copy_from_slice(&[3, 0]);
            }
        }
        packets
    }
}

/// A server whose agents speak without a pause.
struct SpeakingStack {
    label: &'static str,
    stack: Stack,
    /// On the real stack: the agents, each of which all rooms share.
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

    /// In how many rooms the agent of this voice has begun to speak since it was started.
    fn rooms_with_speech(&self, voice: Voice) -> anyhow::Result<usize> {
        if let Some(talker) = self.talker(voice) {
            return Ok(talker.log()?.matches("talking").count());
        }
        let events = self.stack.events()?;
        let met = events.iter().filter(|event| event.name() == "caller");
        let rooms: BTreeSet<_> = met.map(AgentEvent::room).collect();
        Ok(rooms.len())
    }
}

fn start_talker(stack: &Stack, voice: Voice, packets: Vec<Vec<u8>>) -> anyhow::Result<Process> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("packets");
    let mut data = Vec::new();
    for packet in voice.of(packets) {
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

/// How far the canary's stamps lie from those of who did what is stamped.
struct Accuracy {
    bench: &'static str,
    /// Whose stamp of what is taken from the canary's.
    beside: &'static str,
    /// Milliseconds, ascending; above zero the canary's is later.
    off: Vec<f64>,
}

impl Accuracy {
    fn new(bench: &'static str, beside: &'static str, mut off: Vec<f64>) -> Self {
        off.sort_by(f64::total_cmp);
        Self { bench, beside, off }
    }

    fn quantile(&self, percent: usize) -> f64 {
        self.off[(self.off.len() * percent).div_ceil(100).max(1) - 1]
    }

    fn json(&self) -> Value {
        json!({
            "bench": self.bench,
            "rooms": self.off.len(),
            "least_ms": self.quantile(0),
            "median_ms": self.quantile(50),
            "p99_ms": self.quantile(99),
        })
    }
}

impl std::fmt::Display for Accuracy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [least, median, p99] = [0, 50, 99].map(|percent| self.quantile(percent));
        let (rooms, beside) = (self.off.len(), self.beside);
        write!(
            f,
            "{rooms} rooms, {beside}: least {least:+.1} ms, median {median:+.1} ms, p99 {p99:+.1} ms"
        )
    }
}

/// Many short rooms with real jobs, one after the other, so that the machine stays nearly idle.
fn join_accuracy(stack: &Stack) -> anyhow::Result<Accuracy> {
    let finished = Settings::new(stack)
        .project("max_rooms", JOINS)
        .behaviour(&Behaviour::greets().with("seconds", 0.3))
        .set("batch.rooms", JOINS)
        .set("batch.stay", "one_by_one")
        .set("batch.hold", "2s")
        .run()?;
    let batch = finished.batch()?;
    let mut off = Vec::new();
    for probe in &batch.probes {
        let agent = probe.agent.as_ref();
        let agent = agent.with_context(|| format!("no agent in {probe:?}"))?;
        off.push(probe.at("AgentJoined")? * 1e3 - agent.joined_at_ms);
    }
    ensure!(off.len() == JOINS as usize, "only {} rooms", off.len());
    let beside = "AgentJoined - the server's joined_at";
    Ok(Accuracy::new("join_accuracy", beside, off))
}

/// The talker says itself when it sends its first packet of speech: nothing but the way through the server lies between.
/// A livekit-agents job can't say it as well, for the SDK encodes and paces on its own.
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
    let mut off = Vec::new();
    for probe in &batch.probes {
        let told = format!("talking {} ", probe.room);
        let sent = log.lines().find_map(|line| line.strip_prefix(&told));
        let sent: f64 = sent
            .with_context(|| format!("the talker didn't speak in {}", probe.room))?
            .parse()?;
        off.push((probe.at("AgentSpoke")? - sent) * 1e3);
    }
    ensure!(off.len() == JOINS as usize, "only {} rooms", off.len());
    let beside = "AgentSpoke - the agent's first packet of speech";
    Ok(Accuracy::new("first_speech_accuracy", beside, off))
}

/// What the agent's own log says of a reply: from the end of the echo that it heard to when its session took up
/// the state `speaking`, with the first frame that it gave to its track.
/// The canary's is from the end of the last packet of speech that it sent to the arrival of the first audible one, so both
/// ways through the server and the agent's jitter buffer come on top: the caller waits for them too.
fn reply_accuracy(stack: &Stack) -> anyhow::Result<Accuracy> {
    // A worker starts a process for its next job with each call; on two cores that would be in the conversation's way.
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
    let mut off = Vec::new();
    for probe in &batch.probes {
        let told = |name: &str, key: &str| {
            let mut events = events.iter();
            let event = events.find(|event| event.room() == probe.room && event.name() == name);
            event
                .with_context(|| format!("no {name} in {}", probe.room))?
                .number(key)
        };
        let own = told("replied", "began")? - told("heard", "ended")?;
        let delay = probe.reply_delay_seconds;
        let delay = delay.with_context(|| format!("no reply in {probe:?}"))?;
        off.push((delay - own) * 1e3);
    }
    ensure!(off.len() == REPLIES as usize, "only {} rooms", off.len());
    let beside = "reply delay - the agent's own";
    Ok(Accuracy::new("reply_accuracy", beside, off))
}

/// Who is measured.
#[derive(Clone, Copy)]
enum Program<'a> {
    Canary,
    /// By its command line.
    Peer(&'a str),
}

/// It, at work.
enum Subject {
    Canary(Running),
    Peer(Process),
}

/// What a program used while speech flowed both ways in all of its rooms.
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

/// How much more a peer used than the canary, on the same work.
struct Ratio {
    stack: &'static str,
    rooms: u32,
    cpu: f64,
    rss: f64,
}

impl Ratio {
    /// Of two loads in a row, where they belong together.
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

    fn start(self, speakers: &SpeakingStack, voice: Voice, rooms: u32) -> anyhow::Result<Subject> {
        match self {
            Self::Canary => {
                let settings = Settings::new(&speakers.stack)
                    .project("max_rooms", rooms)
                    .set("agent_name", speakers.agent(voice))
                    .set("batch.rooms", rooms)
                    .set("batch.ramp", "interval")
                    .set("batch.interval", "200ms")
                    .set("batch.hold", "5m")
                    // Nothing is heard of what can't be decoded.
                    .set("deadlines.speech", "5m")
                    .set("echo.mode", "continuous");
                Ok(Subject::Canary(settings.once()?))
            }
            Self::Peer(line) => {
                let seconds = (longest_start(rooms) + SETTLE + WINDOW).as_secs();
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
                Ok(Subject::Peer(peer))
            }
        }
    }
}

fn longest_start(rooms: u32) -> Duration {
    START.0 + START.1 * rooms
}

impl Subject {
    fn id(&self) -> u32 {
        match self {
            Self::Canary(running) => running.child.id(),
            Self::Peer(peer) => peer.child.id(),
        }
    }

    /// All that it said, where it does not do its work.
    fn log(self) -> anyhow::Result<String> {
        match self {
            Self::Canary(running) => {
                running.signal(Signal::INT)?;
                Ok(running.finish()?.output())
            }
            Self::Peer(peer) => peer.log(),
        }
    }

    /// Ends it, and sees that speech did flow, which only the canary tells.
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
        longest_start(rooms),
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

/// What a process has used, with all that it started.
#[derive(Default)]
struct Usage {
    cpu_seconds: f64,
    rss_mb: f64,
    threads: f64,
}

/// Of the process and of its group, where it leads one.
fn usage(process: u32) -> anyhow::Result<Usage> {
    let mut usage = Usage::default();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(id) = name.to_str().filter(|name| name.parse::<u32>().is_ok()) else {
            continue;
        };
        // A process may end while it is looked at.
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

/// Places in /proc/…/stat after the name, which may hold blanks and stands in parentheses.
const GROUP: usize = 2;
const USER_TIME: usize = 11;

fn stat(process: &str) -> anyhow::Result<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("no name in stat")?;
    Ok(fields.split(' ').map(str::to_owned).collect())
}

/// User and system time, to 10 ms.
fn ticks(fields: &[String]) -> anyhow::Result<f64> {
    let times = fields.iter().skip(USER_TIME).take(2);
    let ticks = times.map(|it| it.parse::<f64>()).sum::<Result<f64, _>>()?;
    // USER_HZ is 100 on every Linux.
    Ok(ticks / 100.0)
}

/// User and system time of this process, to 10 ms.
fn own_cpu_seconds() -> anyhow::Result<f64> {
    ticks(&stat("self")?)
}

/// A figure of /proc/…/status, in the unit that stands there.
fn status(process: &str, key: &str) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .with_context(|| format!("no {key}"))?;
    let figure = line.split_whitespace().next().context("no figure")?;
    Ok(figure.parse()?)
}
