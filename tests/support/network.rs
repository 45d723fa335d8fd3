//! Network namespaces and addresses for the real stack. They need root.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Weak};

use anyhow::{Context as _, ensure};

/// Removes the namespaces and addresses of runs that were killed. Agents and media would use them, too.
pub fn sweep() -> anyhow::Result<()> {
    Namespace::sweep()?;
    Bridge::sweep()?;
    LoopbackIpv6::sweep()
}

fn has_ended(process: &str) -> bool {
    !Path::new("/proc").join(process).exists()
}

/// Namespaces that no stack uses yet.
static FREE: Mutex<Vec<Weak<Namespace>>> = Mutex::new(Vec::new());

/// A bridge to the namespaces of this process. Its address is the only one that they add to our side.
///
/// The WebRTC stack of an agent tries every local address with every address of the server. With an address for each
/// namespace, the agents of a run took more CPU time for that than for their calls.
struct Bridge {
    device: String,
    /// The third byte of its network, 10.231.x.0/24. Two runs at the same time must not share one.
    net: u8,
}

impl Bridge {
    const PREFIX: &str = "cnb";

    fn create() -> anyhow::Result<Self> {
        let process = std::process::id();
        let this = Self {
            device: format!("{}{process}", Self::PREFIX),
            net: u8::try_from(process % 256)?,
        };
        let (device, net) = (&this.device, this.net);
        ip(&format!("link add {device} type bridge"))?;
        ip(&format!("addr add 10.231.{net}.1/24 dev {device}"))?;
        ip(&format!("link set {device} up"))?;
        Ok(this)
    }

    /// Deletes the bridges of killed runs. Each is one more path that every agent tries.
    fn sweep() -> anyhow::Result<()> {
        for entry in fs::read_dir("/sys/class/net")? {
            let name = entry?.file_name();
            let name = name.to_str().unwrap_or_default();
            if name.strip_prefix(Self::PREFIX).is_some_and(has_ended) {
                ip(&format!("link del {name}"))?;
            }
        }
        Ok(())
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // Fails only if the bridge could not be created.
        let _ = ip(&format!("link del {}", self.device));
    }
}

/// A network namespace that a veth pair and a bridge join to ours.
///
/// When an interface appears or disappears, the WebRTC stack of every agent on the machine looks for new paths, and some
/// calls lose seconds of audio. So all namespaces are created before the first agent starts, and deleted after the last has
/// ended.
pub struct Namespace {
    name: String,
    /// The address of the end in the namespace.
    address: Ipv4Addr,
    /// The device of the end in the namespace.
    device: String,
    /// The device of the end on the bridge.
    outer: String,
    /// Is deleted with the last of its namespaces.
    _bridge: Arc<Bridge>,
}

impl Namespace {
    /// Creates `count` namespaces for stacks to use. They exist until the returned values are dropped.
    pub fn prepare(count: usize) -> anyhow::Result<Vec<Arc<Self>>> {
        let bridge = Arc::new(Bridge::create()?);
        let created = (0..count).map(|_| Ok(Arc::new(Self::create(&bridge)?)));
        let created = created.collect::<anyhow::Result<Vec<_>>>()?;
        let mut free = FREE.lock().expect("no push panics");
        free.extend(created.iter().map(Arc::downgrade));
        Ok(created)
    }

    /// Deletes the namespaces of killed runs.
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

    pub(crate) fn take() -> anyhow::Result<Arc<Self>> {
        let free = FREE.lock().expect("no pop panics").pop();
        free.and_then(|it| it.upgrade())
            .context("more stacks behind a veth pair than namespaces were prepared")
    }

    fn create(bridge: &Arc<Bridge>) -> anyhow::Result<Self> {
        static CREATED: AtomicU8 = AtomicU8::new(0);
        // A new name each time: the kernel deletes a namespace some time after its name.
        let number = CREATED.fetch_add(1, Ordering::Relaxed) % 100;
        let id = format!("{}-{number}", std::process::id());
        let this = Self {
            name: format!("canary-{id}"),
            // The bridge has the address that ends in 1.
            address: Ipv4Addr::new(10, 231, bridge.net, number + 2),
            device: format!("cni{id}"),
            outer: format!("cno{id}"),
            _bridge: Arc::clone(bridge),
        };
        let (name, outer, inner) = (&this.name, &this.outer, &this.device);
        ip(&format!("netns add {name}"))?;
        ip(&format!(
            "link add {outer} type veth peer name {inner} netns {name}"
        ))?;
        ip(&format!("link set {outer} master {} up", bridge.device))?;
        ip(&format!(
            "-n {name} addr add {}/24 dev {inner}",
            this.address
        ))?;
        ip(&format!("-n {name} link set {inner} up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        Ok(this)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        self.address
    }

    pub(crate) fn device(&self) -> &str {
        &self.device
    }

    /// An address in the namespace that our side cannot reach: nothing there answers our side's search for it (ARP).
    pub(crate) fn add_hidden_address(&self) -> anyhow::Result<Ipv4Addr> {
        let name = &self.name;
        let [a, b, net, number] = self.address.octets();
        let address = Ipv4Addr::new(a, b, net, number + 128);
        ip(&format!(
            "netns exec {name} sysctl -qw net.ipv4.conf.all.arp_ignore=1"
        ))?;
        ip(&format!("-n {name} addr add {address}/32 dev lo"))?;
        Ok(address)
    }

    /// Adds a rule for packets that arrive from our side.
    pub(crate) fn filter(&self, rule: &str) -> anyhow::Result<()> {
        self.iptables(&format!("-A INPUT -i {} {rule}", self.device))
    }

    pub(crate) fn iptables(&self, arguments: &str) -> anyhow::Result<()> {
        ip(&format!("netns exec {} iptables -w {arguments}", self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The namespace, and a veth pair in it, live on until the last socket of the stack has timed out.
        let _ = ip(&format!("link del {}", self.outer));
        // Both fail only if the namespace could not be created.
        let _ = ip(&format!("netns del {}", self.name));
    }
}

/// An IPv6 address on the loopback interface that is not a loopback address. Servers offer it for media in addition to
/// 127.0.0.1, but no WebRTC stack uses it as a local address.
pub struct LoopbackIpv6 {
    address: Ipv6Addr,
}

impl LoopbackIpv6 {
    /// The id of the process that added the address follows.
    const NET: u128 = 0xfd31 << 112;

    /// Adds the address. It exists until the returned value is dropped.
    pub fn add() -> anyhow::Result<Self> {
        let address = Ipv6Addr::from_bits(Self::NET | u128::from(std::process::id()));
        ip(&format!("addr replace {address}/128 dev lo"))?;
        Ok(Self { address })
    }

    /// Removes the addresses of killed runs. Media would use them, and they cost more CPU time than 127.0.0.1.
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

impl Drop for LoopbackIpv6 {
    fn drop(&mut self) {
        // Fails only if another program has removed it.
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
