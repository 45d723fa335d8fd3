//! The servers and agents that a test calls: the sandbox, a real livekit-server with livekit-agents workers, or upstream's
//! mock server.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::api::LivekitApi;
use crate::network::Namespace;
use crate::process::{
    MEDIA_NICENESS, Process, background_in, command, command_in, free_ports, program, source,
};
use crate::{SECRET, SHORT_TIMEOUT, canary, wait_for};

/// The API key of the real servers.
pub const KEY: &str = "scenario-key";

/// The name under which a stack's ordinary worker registers.
pub const AGENT: &str = "echo-tester";
/// The name of a worker that reports full load.
pub const BUSY_AGENT: &str = "busy-tester";
/// The name of the worker of `pipeline.py`.
pub const CONVERSATION_AGENT: &str = "conversation-tester";

/// The payload type of Opus that WebRTC stacks use.
const OPUS: u8 = 111;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum StackKind {
    /// The canary's own sandbox, served by its binary.
    Sandbox,
    /// livekit-server and a livekit-agents worker.
    Real,
    /// Upstream's programmable mock of livekit-server: API and signalling without agents, rooms or media.
    Mock,
}

impl StackKind {
    pub const ALL: [Self; 3] = [Self::Sandbox, Self::Real, Self::Mock];

    pub fn label(self) -> &'static str {
        match self {
            Self::Sandbox => "sandbox",
            Self::Real => "real",
            Self::Mock => "test-server",
        }
    }
}

/// An agent worker to start.
#[derive(Clone, Copy)]
pub struct Agent {
    /// If it is empty, the worker has no name and LiveKit sends it to every new room.
    pub name: &'static str,
    /// The load that it reports, 0 to 1.
    pub load: f32,
    /// The deployment as which it registers; empty if it has none.
    pub deployment: &'static str,
    /// Its jobs join as hidden participants.
    pub hidden: bool,
    /// Its agents join and stay silent, whatever their behaviour.
    pub poisoned: bool,
    /// The Python program of the worker, in `tests/real`.
    pub program: &'static str,
    /// The worker is a program of its own, and runs each job in a process, as users run it. Other workers are forked from the
    /// [`Nursery`], and their jobs run in threads.
    pub in_processes: bool,
}

impl Agent {
    pub const fn named(name: &'static str) -> Self {
        Self {
            name,
            load: 0.0,
            deployment: "",
            hidden: false,
            poisoned: false,
            program: "agent.py",
            in_processes: false,
        }
    }

    /// The agent that converses with a real `AgentSession`.
    pub const fn conversation() -> Self {
        Self {
            program: "pipeline.py",
            ..Self::named(CONVERSATION_AGENT)
        }
    }

    #[must_use]
    pub const fn in_processes(self) -> Self {
        Self {
            in_processes: true,
            ..self
        }
    }

    #[must_use]
    pub const fn hidden(self) -> Self {
        Self {
            hidden: true,
            ..self
        }
    }

    #[must_use]
    pub const fn poisoned(self) -> Self {
        Self {
            poisoned: true,
            ..self
        }
    }

    #[must_use]
    pub const fn deployed_as(self, deployment: &'static str) -> Self {
        Self { deployment, ..self }
    }
}

/// A Python process that has imported livekit-agents, and forks workers. Without it, the imports of each worker take some 15 s of
/// CPU time, for which the audio of the other rooms has to wait.
pub struct Nursery {
    _process: Process,
    _dir: TempDir,
}

/// The socket of the running nursery.
static NURSERY: Mutex<Option<PathBuf>> = Mutex::new(None);

impl Nursery {
    /// Starts one for the workers of all stacks, until it is dropped.
    pub fn start() -> anyhow::Result<Self> {
        let dir = temporary_dir()?;
        let socket = dir.path().join("socket");
        let mut command = background_in(None, &program("PYTHON")?);
        command.arg(source(NURSERY_PROGRAM)).arg(&socket);
        let process = Process::spawn("nursery", command, dir.path())?;
        *Self::socket() = Some(socket);
        Ok(Self {
            _process: process,
            _dir: dir,
        })
    }

    fn socket() -> MutexGuard<'static, Option<PathBuf>> {
        NURSERY.lock().expect("nothing panics while it is locked")
    }

    /// What stands before the program of a worker; empty without a nursery.
    fn arguments() -> Vec<PathBuf> {
        let socket = Self::socket().clone();
        socket.map_or_else(Vec::new, |socket| vec![source(NURSERY_PROGRAM), socket])
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        *Self::socket() = None;
    }
}

/// The TURN server of a stack behind a veth pair.
#[derive(Clone, Copy)]
pub struct Turn {
    /// The server's media address is one that only its own namespace reaches.
    pub hides_media: bool,
    /// Without this, livekit-server refuses to relay to the media address, which is a private one.
    pub relays_to_private_networks: bool,
}

/// livekit-server offers no other port for TLS.
pub const TURN_TLS_PORT: u16 = 443;
pub const TURN_UDP_PORT: u16 = 3478;

/// One server with its workers. Dropping it ends them all.
pub struct Stack {
    pub url: String,
    pub key: String,
    pub secret: String,
    /// How long a room must stay open for a greeting and its echo.
    pub hold: &'static str,
    pub api: LivekitApi,
    pub server: Process,
    pub workers: Vec<Process>,
    pub port: u16,
    pub host: Ipv4Addr,
    dir: TempDir,
    /// The last field, so that it is dropped after the processes in it.
    namespace: Option<Arc<Namespace>>,
}

impl Stack {
    /// livekit-server with workers of `agents`. All of them are ready.
    pub fn real(agents: &[Agent]) -> anyhow::Result<Self> {
        Self::start(agents, None, "")
    }

    /// Such a stack with additional `settings` of the server, in YAML.
    pub fn real_with(settings: &str, agents: &[Agent]) -> anyhow::Result<Self> {
        Self::start(agents, None, settings)
    }

    /// Such a stack on the far side of a veth pair. None of its addresses is a loopback address.
    pub fn real_behind_veth(agents: &[Agent]) -> anyhow::Result<Self> {
        Self::start(agents, Some(Namespace::take()?), "")
    }

    /// Such a stack with the TURN server of livekit-server, over UDP and over TLS. `certificate` is that of its TLS, by the
    /// address of the server.
    pub fn real_with_turn(
        agents: &[Agent],
        turn: Turn,
        certificate: impl FnOnce(Ipv4Addr) -> anyhow::Result<String>,
    ) -> anyhow::Result<Self> {
        let namespace = Namespace::take()?;
        let host = namespace.address();
        let (media, device) = if turn.hides_media {
            (namespace.add_hidden_address()?, "lo".to_owned())
        } else {
            (host, namespace.device().to_owned())
        };
        let dir = temporary_dir()?;
        let pem = dir.path().join("turn.pem");
        fs::write(&pem, certificate(host)?)?;
        let pem = pem.display();
        // The host of the URL for TLS is the domain, and its port always 443. An address as the domain needs no resolver.
        let mut settings = format!(
            "turn:
  enabled: true
  domain: {host}
  bind_addresses: [\"{host}\"]
  cert_file: {pem}
  key_file: {pem}
  udp_port: {TURN_UDP_PORT}
  tls_port: {TURN_TLS_PORT}
"
        );
        if turn.relays_to_private_networks {
            settings += "  allow_restricted_peer_cidrs: [\"10.0.0.0/8\"]\n";
        }
        Self::start_in(dir, agents, Some(namespace), (media, &device), &settings)
    }

    /// Upstream's mock. An attribute of the participant selects what it does.
    pub fn mock() -> anyhow::Result<Self> {
        let dir = temporary_dir()?;
        let port = free_ports()?;
        let mut command = command(&program("TEST_SERVER")?);
        command.args(["--bind", "127.0.0.1", "--api-secret", SECRET]);
        command.args(["--ports", &port.to_string()]);
        let mut stack = Self {
            url: format!("ws://127.0.0.1:{port}"),
            key: KEY.to_owned(),
            secret: SECRET.to_owned(),
            hold: "1s",
            api: LivekitApi::new(format!("http://127.0.0.1:{port}"), KEY, SECRET),
            server: Process::spawn("test-server", command, dir.path())?,
            workers: Vec::new(),
            port,
            host: Ipv4Addr::LOCALHOST,
            dir,
            namespace: None,
        };
        wait_for_api("test-server", &mut stack.server, &stack.api)?;
        Ok(stack)
    }

    /// A sandbox. Its agent has the name `agent` and these `faults` in every room.
    pub fn sandbox(agent: &str, faults: &[String]) -> anyhow::Result<Self> {
        let dir = temporary_dir()?;
        let binary = canary::binary();
        let mut command = command(binary.to_str().context("a path in UTF-8")?);
        command
            .args(["sandbox", "--port", "0", "--agent-name", agent])
            .arg("--report")
            .arg(report(dir.path()))
            .args(faults.iter().flat_map(|fault| ["--fault", fault]));
        let mut server = Process::spawn("sandbox", command, dir.path())?;
        // The last of the three variables that it prints.
        server.wait_for_line("LIVEKIT_API_SECRET=", SHORT_TIMEOUT)?;
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
            api: LivekitApi::new(format!("http://{address}"), &key, &secret),
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
        let at = |namespace: &Arc<Namespace>| (namespace.address(), namespace.device().to_owned());
        let (host, device) = namespace
            .as_ref()
            .map_or((Ipv4Addr::LOCALHOST, "lo".to_owned()), at);
        let media = (host, device.as_str());
        Self::start_in(temporary_dir()?, agents, namespace, media, settings)
    }

    /// `media` are the address and the device of the server's media.
    fn start_in(
        dir: TempDir,
        agents: &[Agent],
        namespace: Option<Arc<Namespace>>,
        media: (Ipv4Addr, &str),
        settings: &str,
    ) -> anyhow::Result<Self> {
        let port = free_ports()?;
        let host = namespace
            .as_ref()
            .map_or(Ipv4Addr::LOCALHOST, |namespace| namespace.address());
        let config = server_config(host, media, port) + settings;
        fs::write(dir.path().join(SERVER_CONFIG), config)?;
        let server = spawn_server("livekit-server", namespace.as_deref(), dir.path())?;
        let mut stack = Self {
            url: format!("ws://{host}:{port}"),
            key: KEY.to_owned(),
            secret: SECRET.to_owned(),
            // On a busy machine an agent greets about four seconds after its join.
            hold: "10s",
            api: LivekitApi::new(format!("http://{host}:{port}"), KEY, SECRET),
            server,
            workers: Vec::new(),
            port,
            host,
            dir,
            namespace,
        };
        wait_for_api("livekit-server", &mut stack.server, &stack.api)?;
        for agent in agents {
            stack.workers.push(stack.spawn_worker(agent)?);
        }
        for worker in &mut stack.workers {
            worker.wait_for_line("registered worker", Duration::from_mins(2))?;
        }
        for agent in agents.iter().filter(|agent| agent.load < 0.5) {
            stack.wait_for_agent(agent)?;
        }
        Ok(stack)
    }

    /// The address of the server's API.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((self.host, self.port))
    }

    /// Starts livekit-server again after it has ended, on the same addresses. It has forgotten every room.
    pub fn restarted_server(&self) -> anyhow::Result<Process> {
        let name = "livekit-server-restarted";
        let mut server = spawn_server(name, self.namespace.as_deref(), self.dir())?;
        wait_for_api("livekit-server", &mut server, &self.api)?;
        Ok(server)
    }

    /// Waits until a job reaches the agent. livekit-server drops a job that is requested within about 100 ms of the
    /// registration of the worker.
    pub fn wait_for_agent(&self, agent: &Agent) -> anyhow::Result<()> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        for _ in 0..10 {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let room = format!("proof-{}-{number}", agent.name);
            if agent.name.is_empty() {
                self.api.create_room(&room)?;
            } else {
                let nothing = r#"{"behaviour": "nothing"}"#;
                self.api
                    .dispatch_to(&room, agent.name, agent.deployment, nothing)?;
            }
            let arrived = self.wait_for_event("a job", Duration::from_secs(2), |event| {
                event.room() == room
            });
            self.api.delete_room(&room)?;
            if arrived.is_ok() {
                return Ok(());
            }
        }
        bail!("no job reached {:?}\n{}", agent.name, self.logs());
    }

    /// Starts one more worker. It ends when the result is dropped.
    pub fn start_worker(&self, agent: &Agent) -> anyhow::Result<Process> {
        let mut worker = self.spawn_worker(agent)?;
        worker.wait_for_line("registered worker", Duration::from_mins(2))?;
        Ok(worker)
    }

    fn spawn_worker(&self, agent: &Agent) -> anyhow::Result<Process> {
        // Each job raises its own priority once it has started.
        let mut command = background_in(self.namespace.as_deref(), &program("PYTHON")?);
        if !agent.in_processes {
            command.env("AGENT_THREADS", "1");
            command.args(Nursery::arguments());
        }
        command
            .arg(source(agent.program))
            .env("LIVEKIT_URL", &self.url)
            .env("LIVEKIT_API_KEY", &self.key)
            .env("LIVEKIT_API_SECRET", &self.secret)
            .env("AGENT_NAME", agent.name)
            .env("AGENT_LOAD", agent.load.to_string())
            .env("LIVEKIT_AGENT_DEPLOYMENT", agent.deployment)
            .env("AGENT_HIDDEN", if agent.hidden { "1" } else { "" })
            .env("AGENT_POISONED", if agent.poisoned { "1" } else { "" })
            .env("AGENT_NICENESS", MEDIA_NICENESS.to_string())
            // The monitor of its event loop takes two thirds of the time of an idle job, and would only say that the machine is busy.
            .env("LIVEKIT_AGENTS_LOOP_BLOCK_WARN_MS", "0")
            .env("REPORT", report(self.dir()));
        Process::spawn(&format!("agent-{}", agent.name), command, self.dir())
    }

    /// Drops UDP to a stack behind a veth pair without a response, as a firewall does.
    pub fn block_udp(&self) -> anyhow::Result<()> {
        self.filter("-p udp -j DROP")
    }

    /// Drops what callers say on its way to a stack behind a veth pair: packets of RTP with the payload type of Opus. All else
    /// gets through: ICE, DTLS, RTCP, and the audio of agents.
    pub fn drop_caller_audio(&self) -> anyhow::Result<()> {
        // The payload of UDP begins 8 bytes after the IP header, whose length in words is in its first byte. RTP and RTCP have the
        // version 2 in the first two bits. The type of an RTCP packet, taken as a payload type, is 72 to 79.
        let rtp = "0>>22&0x3C@8>>30=2";
        let opus = format!("0>>22&0x3C@8>>16&0x7F={OPUS}");
        self.filter(&format!("-p udp -m u32 --u32 {rtp}&&{opus} -j DROP"))
    }

    /// Drops media over TCP without a response.
    pub fn block_media_over_tcp(&self) -> anyhow::Result<()> {
        self.filter(&format!("-p tcp --dport {} -j DROP", self.port + 1))
    }

    /// Resets every connection with media over TCP, and every new one.
    pub fn reset_media_over_tcp(&self) -> anyhow::Result<()> {
        let port = self.port + 1;
        self.filter(&format!(
            "-p tcp --dport {port} -j REJECT --reject-with tcp-reset"
        ))
    }

    /// Resets every connection with the TURN server over TLS, and every new one.
    pub fn reset_turn_over_tls(&self) -> anyhow::Result<()> {
        self.filter(&format!(
            "-p tcp --dport {TURN_TLS_PORT} -j REJECT --reject-with tcp-reset"
        ))
    }

    /// Redirects packets from our side to other ports there: those for the API, and those for media over UDP. An earlier
    /// redirection ends. Datagrams that the server sends to us directly are dropped.
    pub fn redirect(&self, api: u16, media: u16) -> anyhow::Result<()> {
        let namespace = self.behind_veth()?;
        let device = namespace.device();
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
        Ok(self.behind_veth()?.name())
    }

    fn filter(&self, rule: &str) -> anyhow::Result<()> {
        self.behind_veth()?.filter(rule)
    }

    fn behind_veth(&self) -> anyhow::Result<&Namespace> {
        self.namespace.as_deref().context("not behind a veth pair")
    }

    /// The folder of the files of its processes. It is deleted with the stack.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// All events that the agents have reported, the oldest first.
    pub fn events(&self) -> anyhow::Result<Vec<AgentEvent>> {
        let report = match fs::read_to_string(report(self.dir())) {
            Ok(report) => report,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error.into()),
        };
        // An agent may have written only a part of the last line.
        let whole = report.rfind('\n').map_or("", |end| report.split_at(end).0);
        whole.lines().map(AgentEvent::read).collect()
    }

    /// Waits for the first event for which `wanted` is true.
    pub fn wait_for_event(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&AgentEvent) -> bool,
    ) -> anyhow::Result<AgentEvent> {
        wait_for(what, limit, || {
            Ok(self.events()?.into_iter().find(|event| wanted(event)))
        })
    }

    /// The last lines of every log, for a person who searches for the cause of a failure.
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

fn temporary_dir() -> anyhow::Result<TempDir> {
    Ok(tempfile::Builder::new().prefix("canary-real-").tempdir()?)
}

/// The file to which the agents of a stack report.
fn report(dir: &Path) -> PathBuf {
    dir.join("report.jsonl")
}

/// One line of an agent's report.
pub struct AgentEvent(Value);

impl AgentEvent {
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

    /// A number. Times are in Unix seconds.
    pub fn number(&self, key: &str) -> anyhow::Result<f64> {
        self.0[key]
            .as_f64()
            .with_context(|| format!("no {key} in {}", self.0))
    }

    /// A boolean; false if the event has none.
    pub fn flag(&self, key: &str) -> bool {
        self.0[key].as_bool().unwrap_or_default()
    }

    pub fn attributes(&self) -> &Value {
        &self.0["attributes"]
    }
}

const NURSERY_PROGRAM: &str = "nursery.py";
const SERVER_CONFIG: &str = "livekit.yaml";

fn spawn_server(name: &str, namespace: Option<&Namespace>, dir: &Path) -> anyhow::Result<Process> {
    let mut command = command_in(namespace, &program("LIVEKIT_SERVER")?);
    command.arg("--config").arg(dir.join(SERVER_CONFIG));
    Process::spawn(name, command, dir)
}

fn wait_for_api(name: &str, server: &mut Process, api: &LivekitApi) -> anyhow::Result<()> {
    let what = format!("the API of {name}");
    wait_for(&what, SHORT_TIMEOUT, || {
        server.expect_running()?;
        Ok(api.rooms().is_ok().then_some(()))
    })
}

/// Media uses one interface only: `node_ip` replaces the address of each interface. On a machine with several interfaces, the
/// server would respond to a check from another address than the one that was checked. Such a path dies within seconds, and
/// sometimes ends the call.
fn server_config(address: Ipv4Addr, (media, device): (Ipv4Addr, &str), port: u16) -> String {
    format!(
        "port: {port}
bind_addresses: [\"{address}\"]
rtc:
  tcp_port: {}
  udp_port: {}
  node_ip: {media}
  use_external_ip: false
  interfaces: {{includes: [{}]}}
  ips: {{includes: [\"{media}/32\"]}}
  enable_loopback_candidate: {}
keys:
  {KEY}: {SECRET}
",
        port + 1,
        port + 2,
        device,
        device == "lo"
    )
}
