//! What the canary costs and how exact its join delay is, against the real server; `cargo bench --bench real` (`just
//! bench`). Prints a table, and a JSON object a line to keep. The figures mean something on an otherwise idle machine.

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ropus::{Application, Channels, Decoder, Encoder};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::Instant;

#[expect(dead_code, reason = "the scenarios use the rest")]
#[path = "../real/canary.rs"]
mod canary;
mod daemon;
#[expect(dead_code, reason = "the scenarios use the rest")]
#[path = "../real/home.rs"]
mod home;
#[expect(dead_code, reason = "the scenarios use the rest")]
#[path = "../real/order.rs"]
mod order;
#[expect(dead_code, reason = "the scenarios use the rest")]
#[path = "../real/stack.rs"]
mod stack;
#[expect(dead_code, reason = "the scenarios use the rest")]
#[path = "../real/twirp.rs"]
mod twirp;

use canary::{Running, Settings};
use order::Order;
use stack::{AGENT, Agent, KEY, Process, SECRET, Site, wait_for};

/// The name of the agent that speaks without a pause, all rooms in one process.
const TALKER: &str = "talker";
/// How long the load of one number of rooms is measured.
const WINDOW: Duration = Duration::from_secs(30);
const ROOMS: [u32; 3] = [1, 10, 50];
/// Rooms whose join is compared with the server's own stamp.
const JOINS: u32 = 50;
/// Samples a second.
const RATE: u16 = 48_000;
/// Packets of Opus that one room brings in a minute.
const PACKETS_A_MINUTE: u32 = 50 * 60;

fn main() -> anyhow::Result<()> {
    let packets = speech()?;
    let decoding = decoding(&packets)?;
    let site = Site::real(&[Agent::named(AGENT)])?;
    let accuracy = accuracy(&site)?;
    let talker = start_talker(&site, &packets)?;
    let loads = ROOMS
        .iter()
        .map(|rooms| load(&site, &talker, *rooms))
        .collect::<anyhow::Result<Vec<_>>>()?;

    let daemons = daemon::measure()?;

    println!("\n{daemons}");
    println!("decoding: {decoding:.3} CPU s per room-minute");
    println!("{JOINS} joins, |AgentJoined - joined_at|: {accuracy}");
    println!(
        "\nrooms | CPU s per room-minute | of it transport | CPU % of a core | RSS MB | threads"
    );
    for load in &loads {
        let all = load.cpu_per_room_minute();
        println!(
            "{} | {all:.3} | {:.3} | {:.1} | {:.1} | {}",
            load.rooms,
            all - decoding,
            load.cpu_percent(),
            load.rss_mb,
            load.threads
        );
    }
    println!();
    println!(
        "{}",
        json!({"bench": "decoding", "cpu_seconds_per_room_minute": decoding})
    );
    println!("{}", accuracy.json());
    println!("{}", daemons.json());
    for load in &loads {
        println!("{}", load.json(decoding));
    }
    Ok(())
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

/// CPU seconds for decoding what one room's agent says in one minute.
///
/// It is measured apart because it can't be turned off in a run: speech is what the canary listens for.
fn decoding(packets: &[Vec<u8>]) -> anyhow::Result<f64> {
    const MINUTES: u32 = 20;
    let mut decoder = Decoder::new(u32::from(RATE), Channels::Mono)?;
    let mut pcm = vec![0_i16; 5760];
    let before = cpu_seconds("self")?;
    for packet in packets
        .iter()
        .cycle()
        .take((MINUTES * PACKETS_A_MINUTE) as usize)
    {
        decoder.decode(packet, &mut pcm, ropus::DecodeMode::Normal)?;
    }
    Ok((cpu_seconds("self")? - before) / f64::from(MINUTES))
}

/// Starts the agent that all rooms of the load share.
fn start_talker(site: &Site, packets: &[Vec<u8>]) -> anyhow::Result<Process> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("packets");
    let mut data = Vec::new();
    for packet in packets {
        data.extend(u16::try_from(packet.len())?.to_be_bytes());
        data.extend(packet);
    }
    fs::write(&file, data)?;
    let mut command = stack::command(&stack::program("TALKER")?);
    command
        .args([&site.url, TALKER])
        .arg(&file)
        .env("LIVEKIT_API_KEY", KEY)
        .env("LIVEKIT_API_SECRET", SECRET);
    let mut talker = Process::spawn(TALKER, command, site.dir())?;
    talker.wait_for_line("registered worker", Duration::from_secs(10))?;
    Ok(talker)
}

/// How far the canary's stamps lie from the server's.
struct Accuracy {
    /// Milliseconds, ascending.
    off: Vec<f64>,
}

impl Accuracy {
    fn quantile(&self, percent: usize) -> f64 {
        self.off[(self.off.len() * percent).div_ceil(100).max(1) - 1]
    }

    fn json(&self) -> Value {
        json!({
            "bench": "join_accuracy",
            "joins": self.off.len(),
            "median_ms": self.quantile(50),
            "p99_ms": self.quantile(99),
        })
    }
}

impl std::fmt::Display for Accuracy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (median, p99) = (self.quantile(50), self.quantile(99));
        write!(f, "median {median:.1} ms, p99 {p99:.1} ms")
    }
}

/// Many short rooms with real jobs, a few at a time, so that the machine stays nearly idle.
fn accuracy(site: &Site) -> anyhow::Result<Accuracy> {
    let finished = Settings::new(site)
        .project("max_rooms", JOINS)
        .order(&Order::greets().with("seconds", 0.3))
        .set("batch.rooms", JOINS)
        .set("batch.stay", "one_by_one")
        .set("batch.hold", "2s")
        .run()?;
    let document: Value = serde_json::from_str(&finished.stdout).with_context(|| finished.all())?;
    let probes = document["probes"].as_array().context("no probes")?;
    let batch = finished.batch()?;
    let mut off = Vec::new();
    for (probe, document) in batch.probes.iter().zip(probes) {
        let server = document["agent"]["joined_at_ms"]
            .as_f64()
            .with_context(|| format!("no agent in {document}"))?;
        off.push((probe.at("AgentJoined")? * 1e3 - server).abs());
    }
    ensure!(off.len() == JOINS as usize, "only {} rooms", off.len());
    off.sort_by(f64::total_cmp);
    Ok(Accuracy { off })
}

/// What the canary used while speech flowed both ways in all of its rooms.
struct Load {
    rooms: u32,
    /// Over [`WINDOW`].
    cpu_seconds: f64,
    rss_mb: f64,
    threads: f64,
}

impl Load {
    fn cpu_percent(&self) -> f64 {
        100.0 * self.cpu_seconds / WINDOW.as_secs_f64()
    }

    fn cpu_per_room_minute(&self) -> f64 {
        self.cpu_seconds * 60.0 / WINDOW.as_secs_f64() / f64::from(self.rooms)
    }

    fn json(&self, decoding: f64) -> Value {
        json!({
            "bench": "load",
            "rooms": self.rooms,
            "cpu_seconds_per_room_minute": self.cpu_per_room_minute(),
            "transport_cpu_seconds_per_room_minute": self.cpu_per_room_minute() - decoding,
            "cpu_percent_of_a_core": self.cpu_percent(),
            "rss_mb": self.rss_mb,
            "threads": self.threads,
        })
    }
}

fn load(site: &Site, talker: &Process, rooms: u32) -> anyhow::Result<Load> {
    println!("load: {rooms} room(s)");
    let before = talking(talker)?;
    let running = Settings::new(site)
        .project("max_rooms", rooms)
        .set("agent_name", TALKER)
        .set("batch.rooms", rooms)
        .set("batch.hold", "5m")
        .set("echo.mode", "continuous")
        .once()?;
    wait_for("all agents to talk", Duration::from_mins(3), || {
        Ok((talking(talker)? == before + rooms as usize).then_some(()))
    })?;
    // The last room's own start, and the echo's delay of one second.
    pause(Duration::from_secs(3));
    measure(running, rooms)
}

/// In how many rooms the talker has begun.
fn talking(talker: &Process) -> anyhow::Result<usize> {
    Ok(talker.log()?.matches("talking").count())
}

fn measure(running: Running, rooms: u32) -> anyhow::Result<Load> {
    let process = running.child.id().to_string();
    let before = cpu_seconds(&process)?;
    pause(WINDOW);
    let load = Load {
        rooms,
        cpu_seconds: cpu_seconds(&process)? - before,
        rss_mb: status(&process, "VmRSS:")? / 1024.0,
        threads: status(&process, "Threads:")?,
    };
    running.signal(Signal::INT)?;
    let finished = running.finish()?;
    let document: Value = serde_json::from_str(&finished.stdout).with_context(|| finished.all())?;
    let expected = WINDOW.as_secs_f64() * 50.0;
    for probe in document["probes"].as_array().context("no probes")? {
        let packets = probe["audio"]["packets"].as_f64().unwrap_or_default();
        ensure!(packets >= expected, "speech didn't flow: {probe}");
    }
    Ok(load)
}

fn pause(length: Duration) {
    let start = Instant::now();
    while let Some(rest) = length.checked_sub(start.elapsed()) {
        std::thread::sleep(rest);
    }
}

/// User and system time of a process, to 10 ms.
fn cpu_seconds(process: &str) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name in parentheses may hold blanks; user and system time are fields 14 and 15, 12 and 13 after it.
    let (_, fields) = stat.rsplit_once(") ").context("no name in stat")?;
    let ticks = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(str::parse::<f64>)
        .sum::<Result<f64, _>>()?;
    // USER_HZ is 100 on every Linux.
    Ok(ticks / 100.0)
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
