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
    LoopbackIpv6::sweep()
}

fn has_ended(process: &str) -> bool {
    !Path::new("/proc").join(process).exists()
}

/// Namespaces that no stack uses yet.
static FREE: Mutex<Vec<Weak<Namespace>>> = Mutex::new(Vec::new());

/// A network namespace that a veth pair joins to ours.
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
}

impl Namespace {
    /// Creates `count` namespaces for stacks to use. They exist until the returned values are dropped.
    pub fn prepare(count: usize) -> anyhow::Result<Vec<Arc<Self>>> {
        let created = (0..count).map(|_| Ok(Arc::new(Self::create()?)));
        let created = created.collect::<anyhow::Result<Vec<_>>>()?;
        let mut free = FREE.lock().expect("no push panics");
        free.extend(created.iter().map(Arc::downgrade));
        Ok(created)
    }

    /// Deletes the namespaces of killed runs. Each is one more path that every agent tries, and calls would begin late.
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

    fn create() -> anyhow::Result<Self> {
        static CREATED: AtomicU8 = AtomicU8::new(0);
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let id = format!("{process}-{number}");
        // A /30 network for each: two runs at the same time, and a repeated run, must not share one.
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

    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        self.address
    }

    pub(crate) fn device(&self) -> &str {
        &self.device
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
        // Deletes the veth pair, too. Fails only if the namespace could not be created.
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
