//! The processes that a scenario runs against: servers, agent workers, a TLS proxy, each owned by a guard that ends it.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::twirp;

/// The key pair of the real servers.
pub const KEY: &str = "scenario-key";
/// No output of the product may ever hold it.
pub const SECRET: &str = "scenario-secret-that-no-output-may-ever-hold";

/// The name that a site's ordinary worker registers under.
pub const AGENT: &str = "echo-tester";
/// A worker that claims to be at full load.
pub const BUSY_AGENT: &str = "busy-tester";

/// What a scenario runs on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stack {
    /// The product's own sandbox, as its binary serves it.
    Sandbox,
    /// livekit-server and a livekit-agents worker.
    Real,
    /// Upstream's programmable mock of livekit-server: API and signalling without agents, rooms or media.
    Mock,
}

impl Stack {
    pub const ALL: [Self; 3] = [Self::Sandbox, Self::Real, Self::Mock];

    pub fn label(self) -> &'static str {
        match self {
            Self::Sandbox => "sandbox",
            Self::Real => "real",
            Self::Mock => "test-server",
        }
    }
}

/// A worker to start.
#[derive(Clone, Copy)]
pub struct Agent {
    /// Empty: an unnamed worker, which LiveKit sends to every new room.
    pub name: &'static str,
    /// What it claims its load to be, 0 to 1.
    pub load: f32,
}

impl Agent {
    pub const fn named(name: &'static str) -> Self {
        Self { name, load: 0.0 }
    }
}

/// A program of the real stack, by the name that the set-up script prints it under. The script runs once a process.
pub fn program(name: &str) -> anyhow::Result<String> {
    static SET_UP: OnceLock<String> = OnceLock::new();
    if SET_UP.get().is_none() {
        let output = Command::new(source("setup.sh"))
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(output.status.success(), "setup.sh: {}", output.status);
        SET_UP.get_or_init(|| String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let programs = SET_UP.get().context("set up above")?;
    let program = programs
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    program
        .map(str::to_owned)
        .with_context(|| format!("setup.sh names no {name}"))
}

/// A file of the scenarios' own.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/real")
        .join(name)
}

/// One server with its workers; dropping it ends them all.
pub struct Site {
    /// What the product is told.
    pub url: String,
    pub key: String,
    pub secret: String,
    /// How long a room must stay open for a greeting and its echo.
    pub hold: &'static str,
    pub api: twirp::Server,
    pub server: Process,
    pub workers: Vec<Process>,
    /// Port of the server on its own address.
    pub port: u16,
    /// That address.
    pub host: Ipv4Addr,
    dir: TempDir,
    /// Last, so that it goes after the processes that live in it.
    namespace: Option<Arc<Namespace>>,
}

impl Site {
    /// livekit-server with workers of `agents`, all of them ready.
    pub fn real(agents: &[Agent]) -> anyhow::Result<Self> {
        Self::start(agents, None, "")
    }

    /// The same with `settings` of the server besides the usual ones, in YAML.
    pub fn real_with(settings: &str, agents: &[Agent]) -> anyhow::Result<Self> {
        Self::start(agents, None, settings)
    }

    /// The same on the far side of a veth pair, so that no address of it is loopback.
    pub fn real_behind_veth(agents: &[Agent]) -> anyhow::Result<Self> {
        Self::start(agents, Some(Namespace::take()?), "")
    }

    /// Upstream's mock, which does what an attribute of the participant says.
    pub fn mock() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("canary-real-").tempdir()?;
        let port = free_ports()?;
        let mut command = command(&program("TEST_SERVER")?);
        command.args(["--bind", "127.0.0.1", "--api-secret", SECRET]);
        command.args(["--ports", &port.to_string()]);
        let mut site = Self {
            url: format!("ws://127.0.0.1:{port}"),
            key: KEY.to_owned(),
            secret: SECRET.to_owned(),
            hold: "1s",
            api: twirp::Server::new(format!("http://127.0.0.1:{port}"), KEY, SECRET),
            server: Process::spawn("test-server", command, dir.path())?,
            workers: Vec::new(),
            port,
            host: Ipv4Addr::LOCALHOST,
            dir,
            namespace: None,
        };
        answers("test-server", &mut site.server, &site.api)?;
        Ok(site)
    }

    /// A sandbox whose agent of the name `agent` does in every room what `faults` make of it.
    pub fn sandbox(agent: &str, faults: &[String]) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("canary-real-").tempdir()?;
        let mut command = command(env!("CARGO_BIN_EXE_livekit-canary"));
        command
            .args(["sandbox", "--port", "0", "--agent-name", agent])
            .arg("--report")
            .arg(report(dir.path()))
            .args(faults.iter().flat_map(|fault| ["--fault", fault]));
        let mut server = Process::spawn("sandbox", command, dir.path())?;
        // The last of the three variables that it prints.
        server.wait_for_line("LIVEKIT_API_SECRET=", Duration::from_secs(30))?;
        let printed = server.log()?;
        let variable = |name: &str| {
            let mut lines = printed.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value
                .map(str::to_owned)
                .with_context(|| format!("no {name} in {printed}"))
        };
        let (url, key) = (variable("LIVEKIT_URL")?, variable("LIVEKIT_API_KEY")?);
        let secret = variable("LIVEKIT_API_SECRET")?;
        let address: SocketAddr = url.strip_prefix("ws://").context("not a ws URL")?.parse()?;
        Ok(Self {
            api: twirp::Server::new(format!("http://{address}"), &key, &secret),
            port: address.port(),
            host: Ipv4Addr::LOCALHOST,
            url,
            key,
            secret,
            hold: "9s",
            server,
            workers: Vec::new(),
            dir,
            namespace: None,
        })
    }

    fn start(
        agents: &[Agent],
        namespace: Option<Arc<Namespace>>,
        settings: &str,
    ) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("canary-real-").tempdir()?;
        let port = free_ports()?;
        let address = namespace
            .as_ref()
            .map_or(Ipv4Addr::LOCALHOST, |namespace| namespace.address);
        let device = namespace.as_ref().map_or("lo", |it| &it.device);
        let config = server_config(address, device, port) + settings;
        fs::write(dir.path().join(SERVER_CONFIG), config)?;
        let server = spawn_server("livekit-server", namespace.as_deref(), dir.path())?;
        let mut site = Self {
            url: format!("ws://{address}:{port}"),
            key: KEY.to_owned(),
            secret: SECRET.to_owned(),
            // An agent on a busy machine greets some four seconds after its join.
            hold: "10s",
            api: twirp::Server::new(format!("http://{address}:{port}"), KEY, SECRET),
            server,
            workers: Vec::new(),
            port,
            host: address,
            dir,
            namespace,
        };
        answers("livekit-server", &mut site.server, &site.api)?;
        for agent in agents {
            site.workers.push(site.spawn(agent)?);
        }
        for worker in &mut site.workers {
            worker.wait_for_line("registered worker", Duration::from_mins(2))?;
        }
        for agent in agents.iter().filter(|agent| agent.load < 0.5) {
            site.prove(agent)?;
        }
        Ok(site)
    }

    /// Of the server, for who connects without a URL.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((self.host, self.port))
    }

    /// A livekit-server in the place of its own, which has ended: the same addresses, nothing remembered.
    pub fn restarted_server(&self) -> anyhow::Result<Process> {
        let name = "livekit-server-restarted";
        let mut server = spawn_server(name, self.namespace.as_deref(), self.dir())?;
        answers("livekit-server", &mut server, &self.api)?;
        Ok(server)
    }

    /// Waits until a job reaches the agent: livekit-server drops one that it is asked for within some 100 ms of the
    /// worker's registration.
    pub fn prove(&self, agent: &Agent) -> anyhow::Result<()> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        for _ in 0..10 {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let room = format!("proof-{}-{number}", agent.name);
            if agent.name.is_empty() {
                self.api.create_room(&room)?;
            } else {
                self.api
                    .dispatch(&room, agent.name, r#"{"behaviour": "nothing"}"#)?;
            }
            let came = self.wait_for_event("a job", Duration::from_secs(2), |event| {
                event.room() == room
            });
            self.api.delete_room(&room)?;
            if came.is_ok() {
                return Ok(());
            }
        }
        bail!("no job reached {:?}\n{}", agent.name, self.logs());
    }

    fn spawn(&self, agent: &Agent) -> anyhow::Result<Process> {
        let mut command = within(self.namespace.as_deref(), &program("PYTHON")?);
        command
            .arg(source("agent.py"))
            .env("LIVEKIT_URL", &self.url)
            .env("LIVEKIT_API_KEY", &self.key)
            .env("LIVEKIT_API_SECRET", &self.secret)
            .env("AGENT_NAME", agent.name)
            .env("AGENT_LOAD", agent.load.to_string())
            .env("REPORT", report(self.dir()));
        Process::spawn(&format!("agent-{}", agent.name), command, self.dir.path())
    }

    /// Drops UDP to a site behind a veth pair, as a firewall does: without an answer.
    pub fn block_udp(&self) -> anyhow::Result<()> {
        self.filter("-p udp -j DROP")
    }

    /// Does the same to media over TCP.
    pub fn block_media_over_tcp(&self) -> anyhow::Result<()> {
        self.filter(&format!("-p tcp --dport {} -j DROP", self.port + 1))
    }

    /// Breaks every connection with media, and each new one.
    pub fn reset_media_over_tcp(&self) -> anyhow::Result<()> {
        let port = self.port + 1;
        self.filter(&format!(
            "-p tcp --dport {port} -j REJECT --reject-with tcp-reset"
        ))
    }

    /// Sends what comes from our side to other ports there: what is for the API, and what is for media over UDP. In
    /// place of what was said before. The server's own datagrams to us, which would go around, are dropped.
    pub fn detour(&self, api: u16, media: u16) -> anyhow::Result<()> {
        let namespace = self.behind_veth()?;
        let device = &namespace.device;
        namespace.iptables("-t nat -F PREROUTING")?;
        for (protocol, from, to) in [("tcp", self.port, api), ("udp", self.port + 2, media)] {
            namespace.iptables(&format!(
                "-t nat -A PREROUTING -i {device} -p {protocol} --dport {from} -j REDIRECT --to-ports {to}"
            ))?;
        }
        let direct = self.port + 2;
        namespace.iptables("-F OUTPUT")?;
        namespace.iptables(&format!(
            "-A OUTPUT -o {device} -p udp --sport {direct} -j DROP"
        ))
    }

    pub fn namespace_name(&self) -> anyhow::Result<&str> {
        Ok(&self.behind_veth()?.name)
    }

    fn filter(&self, rule: &str) -> anyhow::Result<()> {
        self.behind_veth()?.filter(rule)
    }

    fn behind_veth(&self) -> anyhow::Result<&Namespace> {
        self.namespace.as_deref().context("not behind a veth pair")
    }

    /// Where its processes keep their files, as long as it lives.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Everything that the agents reported, oldest first.
    pub fn events(&self) -> anyhow::Result<Vec<Event>> {
        let report = match fs::read_to_string(report(self.dir())) {
            Ok(report) => report,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error.into()),
        };
        // A line that is still being written has no end yet.
        let whole = report.rfind('\n').map_or("", |end| report.split_at(end).0);
        whole.lines().map(Event::read).collect()
    }

    /// The first report that `wanted` takes, once it is there.
    pub fn wait_for_event(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> anyhow::Result<Event> {
        wait_for(what, limit, || {
            Ok(self.events()?.into_iter().find(|event| wanted(event)))
        })
    }

    /// The last lines of every log, for a person who looks for the cause of a failure.
    pub fn logs(&self) -> String {
        self.each_log(|log| {
            let lines: Vec<_> = log.lines().collect();
            lines[lines.len().saturating_sub(40)..].join("\n")
        })
    }

    /// The lines of every log about the rooms that `text` names.
    pub fn logs_about(&self, text: &str) -> String {
        let of_name = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let rooms: BTreeSet<_> = text
            .split(|c| !of_name(c))
            .filter(|word| word.starts_with("canary-"))
            .collect();
        self.each_log(|log| {
            let about = |line: &&str| rooms.iter().any(|room| line.contains(room));
            log.lines().filter(about).collect::<Vec<_>>().join("\n")
        })
    }

    fn each_log(&self, part: impl Fn(&str) -> String) -> String {
        let part_of = |process: &Process| {
            let log = process.log().unwrap_or_else(|error| error.to_string());
            format!("--- {}\n{}\n", process.name, part(&log))
        };
        let processes = std::iter::once(&self.server).chain(&self.workers);
        processes.map(part_of).collect::<Vec<_>>().concat()
    }
}

/// Where the agents of a site report to.
fn report(dir: &Path) -> PathBuf {
    dir.join("report.jsonl")
}

/// One line of an agent's report.
pub struct Event(Value);

impl Event {
    pub fn read(line: &str) -> anyhow::Result<Self> {
        Ok(Self(serde_json::from_str(line)?))
    }

    pub fn room(&self) -> &str {
        self.text("room")
    }

    pub fn name(&self) -> &str {
        self.text("event")
    }

    pub fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_default()
    }

    /// A figure; times are Unix seconds.
    pub fn number(&self, key: &str) -> anyhow::Result<f64> {
        self.0[key]
            .as_f64()
            .with_context(|| format!("no {key} in {}", self.0))
    }

    pub fn attributes(&self) -> &Value {
        &self.0["attributes"]
    }
}

const SERVER_CONFIG: &str = "livekit.yaml";

fn spawn_server(name: &str, namespace: Option<&Namespace>, dir: &Path) -> anyhow::Result<Process> {
    let mut command = within(namespace, &program("LIVEKIT_SERVER")?);
    command.arg("--config").arg(dir.join(SERVER_CONFIG));
    Process::spawn(name, command, dir)
}

fn answers(name: &str, server: &mut Process, api: &twirp::Server) -> anyhow::Result<()> {
    let what = format!("{name} to answer");
    wait_for(&what, Duration::from_secs(30), || {
        server.must_run()?;
        Ok(api.rooms().is_ok().then_some(()))
    })
}

/// Media on one interface alone: `node_ip` stands for the address of each, and where a machine has several, the server answers
/// a check from another address than it was sent to. Such a path dies within seconds, and sometimes takes the call along.
fn server_config(address: Ipv4Addr, device: &str, port: u16) -> String {
    format!(
        "port: {port}
bind_addresses: [\"{address}\"]
rtc:
  tcp_port: {}
  udp_port: {}
  node_ip: {address}
  use_external_ip: false
  interfaces: {{includes: [{}]}}
  enable_loopback_candidate: {}
keys:
  {KEY}: {SECRET}
",
        port + 1,
        port + 2,
        device,
        address.is_loopback()
    )
}

/// The first of three free ports in a row: API, media over TCP, media over UDP.
pub fn free_ports() -> anyhow::Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(17_500);
    for _ in 0..100 {
        let port = NEXT.fetch_add(3, Ordering::Relaxed);
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
            && TcpListener::bind((Ipv4Addr::UNSPECIFIED, port + 1)).is_ok()
            && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port + 2)).is_ok();
        if free {
            return Ok(port);
        }
    }
    bail!("no three free ports from 17500 on");
}

/// A process, its own process group, and a log of all it prints. Dropping it kills the group.
pub struct Process {
    pub name: String,
    pub child: Child,
    log: PathBuf,
}

impl Process {
    pub fn spawn(name: &str, mut command: Command, dir: &Path) -> anyhow::Result<Self> {
        use std::os::unix::process::CommandExt as _;

        let log = dir.join(format!("{name}.log"));
        let file = fs::File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("can't start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Signals the process alone, not what it started.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    pub fn log(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.log)?).into_owned())
    }

    /// Waits until it has written `text` to its log.
    pub fn wait_for_line(&mut self, text: &str, limit: Duration) -> anyhow::Result<()> {
        let what = format!("{} to say {text:?}", self.name);
        wait_for(&what, limit, || {
            self.must_run()?;
            Ok(self.log()?.contains(text).then_some(()))
        })
    }

    /// Waits for its end.
    pub fn finish(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait_for(&what, limit, || Ok(self.child.try_wait()?))
    }

    fn must_run(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended: {status}\n{}", self.name, self.log()?),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where everything is gone already.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// Ends a process by its id, without a word.
pub fn kill(pid: f64) -> anyhow::Result<()> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a process id is an integer"
    )]
    let pid = Pid::from_raw(pid as i32).context("not a process id")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// A command that dies with the thread that started it, so that a killed test run leaves no server behind.
pub fn command(program: &str) -> Command {
    within(None, program)
}

fn within(namespace: Option<&Namespace>, program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    if let Some(namespace) = namespace {
        command.args(["ip", "netns", "exec", &namespace.name]);
    }
    command.arg(program);
    command
}

/// Removes what runs that were killed left in the machine's network: agents and media would go that way, too.
pub fn sweep() -> anyhow::Result<()> {
    Namespace::sweep()?;
    Ipv6::sweep()
}

fn has_ended(process: &str) -> bool {
    !Path::new("/proc").join(process).exists()
}

/// Namespaces that no site has taken yet.
static NAMESPACES: Mutex<Vec<Weak<Namespace>>> = Mutex::new(Vec::new());

/// A network namespace, joined to ours by a veth pair.
///
/// Where an interface comes or goes, the WebRTC stack of every agent on the machine looks for new paths, and some calls
/// lose seconds of audio. So all of them are there before the first agent starts, and until the last has ended.
pub struct Namespace {
    name: String,
    /// The address of its end.
    address: Ipv4Addr,
    /// The device of its end.
    device: String,
}

impl Namespace {
    /// Creates `count` of them for sites to take; they last as long as what is returned.
    pub fn prepare(count: usize) -> anyhow::Result<Vec<Arc<Self>>> {
        let created = (0..count).map(|_| Ok(Arc::new(Self::create()?)));
        let created = created.collect::<anyhow::Result<Vec<_>>>()?;
        let mut left = NAMESPACES.lock().expect("no push panics");
        left.extend(created.iter().map(Arc::downgrade));
        Ok(created)
    }

    /// Deletes those of runs that were killed: each is one more path that every agent tries, and calls begin late.
    fn sweep() -> anyhow::Result<()> {
        let Ok(all) = fs::read_dir("/run/netns") else {
            return Ok(());
        };
        for entry in all {
            let name = entry?.file_name();
            let name = name.to_str().unwrap_or_default();
            let owner = name
                .strip_prefix("canary-")
                .and_then(|id| id.split_once('-'));
            if owner.is_some_and(|(process, _)| has_ended(process)) {
                ip(&format!("netns del {name}"))?;
            }
        }
        Ok(())
    }

    fn take() -> anyhow::Result<Arc<Self>> {
        let left = NAMESPACES.lock().expect("no pop panics").pop();
        left.and_then(|it| it.upgrade())
            .context("more sites behind a veth pair than were prepared")
    }

    fn create() -> anyhow::Result<Self> {
        static CREATED: AtomicU8 = AtomicU8::new(0);
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let id = format!("{process}-{number}");
        // A net of its own (/30) for each, of this run and of another at the same time; a repeated run takes them anew.
        let (net, host) = (process % 256, number % 64 * 4);
        let this = Self {
            name: format!("canary-{id}"),
            address: format!("10.231.{net}.{}", host + 2).parse()?,
            device: format!("cni{id}"),
        };
        let (name, outer, inner) = (&this.name, format!("cno{id}"), &this.device);
        ip(&format!("netns add {name}"))?;
        ip(&format!(
            "link add {outer} type veth peer name {inner} netns {name}"
        ))?;
        ip(&format!(
            "addr add 10.231.{net}.{}/30 dev {outer}",
            host + 1
        ))?;
        ip(&format!("link set {outer} up"))?;
        ip(&format!(
            "-n {name} addr add {}/30 dev {inner}",
            this.address
        ))?;
        ip(&format!("-n {name} link set {inner} up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        Ok(this)
    }

    /// A rule for what comes from our side.
    fn filter(&self, rule: &str) -> anyhow::Result<()> {
        self.iptables(&format!("-A INPUT -i {} {rule}", self.device))
    }

    fn iptables(&self, arguments: &str) -> anyhow::Result<()> {
        ip(&format!("netns exec {} iptables -w {arguments}", self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Takes the veth pair along. Fails only where creation had failed.
        let _ = ip(&format!("netns del {}", self.name));
    }
}

/// An IPv6 address on the loopback interface that is no loopback address: servers offer it for media beside 127.0.0.1. A
/// WebRTC stack takes none of the interface's addresses for its own.
pub struct Ipv6 {
    address: Ipv6Addr,
}

impl Ipv6 {
    /// Followed by the id of the process whose address it is.
    const NET: u128 = 0xfd31 << 112;

    /// It lasts as long as what is returned.
    pub fn add() -> anyhow::Result<Self> {
        let address = Ipv6Addr::from_bits(Self::NET | u128::from(std::process::id()));
        ip(&format!("addr replace {address}/128 dev lo"))?;
        Ok(Self { address })
    }

    /// Removes those of runs that were killed: media goes over them, and costs more than it does over 127.0.0.1.
    fn sweep() -> anyhow::Result<()> {
        // A machine without IPv6 has no such file.
        let all = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
        for line in all.lines().filter(|line| line.ends_with(" lo")) {
            let bits = u128::from_str_radix(line.split(' ').next().unwrap_or_default(), 16)?;
            let process = bits ^ Self::NET;
            if process <= u128::from(u32::MAX) && has_ended(&process.to_string()) {
                let address = Ipv6Addr::from_bits(bits);
                ip(&format!("addr del {address}/128 dev lo"))?;
            }
        }
        Ok(())
    }
}

impl Drop for Ipv6 {
    fn drop(&mut self) {
        // Fails only where somebody else removed it.
        let _ = ip(&format!("addr del {}/128 dev lo", self.address));
    }
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("ip")?;
    ensure!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// A TLS proxy before a site, as LiveKit Cloud has one, with a certificate of a private authority.
pub struct TlsProxy {
    /// Host and port are what the certificate should be for: `localhost`.
    pub url: String,
    /// The authority's certificate.
    pub ca_file: PathBuf,
    _process: Process,
    _dir: TempDir,
}

impl TlsProxy {
    /// `name`: whom the certificate is for.
    pub fn start(site: &Site, name: &str) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let (authority, server) = certificates(name)?;
        let ca_file = dir.path().join("ca.pem");
        fs::write(&ca_file, authority)?;
        fs::write(dir.path().join("server.pem"), server)?;
        let certificate = format!("ssl crt {}", dir.path().join("server.pem").display());
        let (port, process) = haproxy(dir.path(), site, &certificate, "")?;
        Ok(Self {
            url: format!("wss://localhost:{port}"),
            ca_file,
            _process: process,
            _dir: dir,
        })
    }
}

/// A proxy before a site, as a provider has one, that answers some requests itself.
pub struct Interceptor {
    pub url: String,
    _process: Process,
    _dir: TempDir,
}

impl Interceptor {
    /// `rules`: of haproxy's configuration, one a line.
    pub fn start(site: &Site, rules: &str) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let (port, process) = haproxy(dir.path(), site, "", rules)?;
        Ok(Self {
            url: format!("ws://127.0.0.1:{port}"),
            _process: process,
            _dir: dir,
        })
    }
}

/// haproxy before a site, and its port; `bind` are parameters of its listener.
fn haproxy(dir: &Path, site: &Site, bind: &str, rules: &str) -> anyhow::Result<(u16, Process)> {
    let (from, to) = (free_ports()?, site.port);
    let text = format!(
        "defaults
  mode http
  timeout connect 5s
  timeout client 1m
  timeout server 1m
  timeout tunnel 1h
frontend proxy
  bind 127.0.0.1:{from} {bind}
  {rules}
  default_backend livekit
backend livekit
  server livekit 127.0.0.1:{to}
"
    );
    let config = dir.join("haproxy.cfg");
    fs::write(&config, text)?;
    let mut command = command("haproxy");
    command.arg("-db").arg("-f").arg(&config);
    let mut process = Process::spawn("haproxy", command, dir)?;
    wait_for("haproxy to listen", Duration::from_secs(10), || {
        process.must_run()?;
        let connected = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, from));
        Ok(connected.is_ok().then_some(()))
    })?;
    Ok((from, process))
}

/// An authority's certificate, and a server's certificate and key signed by it, all PEM.
fn certificates(name: &str) -> anyhow::Result<(String, String)> {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate()?;
    let authority_pem = authority.self_signed(&authority_key)?.pem();
    let key = KeyPair::generate()?;
    let issuer = Issuer::new(authority, authority_key);
    let server = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, &issuer)?;
    Ok((authority_pem, server.pem() + &key.serialize_pem()))
}

/// Asks again and again until there is an answer.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        ensure!(start.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
