//! This machine: rights, file systems, kernel, address ranges, firewall, and what is left of namespaces that are gone.

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sched::{CloneFlags, setns};

use super::Findings;
use crate::{
    datapath::{self, Features, netns_cookie},
    host::Capabilities,
};

/// Whether it may do what the agent must.
pub fn root(findings: &mut Findings) {
    let missing = Capabilities::own().missing();
    if missing.is_empty() {
        findings.ok("capabilities", "this process has all that the agent needs");
        return;
    }
    findings.error(
        "capabilities",
        format!("{} missing: an agent with the rights of this process cannot serve", missing.join(", ")),
        format!(
            "run it with sudo; systemd: AmbientCapabilities={}; Docker: cap_add: [{}]",
            missing.join(" "),
            missing.iter().map(|name| name.trim_start_matches("CAP_")).collect::<Vec<_>>().join(", ")
        ),
    );
}

/// Whether tables can be pinned.
pub fn bpffs(findings: &mut Findings) {
    let path = Path::new("/sys/fs/bpf");
    if !datapath::is_bpffs(path) {
        findings.error(
            "bpffs",
            format!(
                "{} is no BPF file system: tables cannot outlive the agent, nothing can be attached",
                path.display()
            ),
            "sudo mount -t bpf bpf /sys/fs/bpf",
        );
        return;
    }
    let read_only = nix::sys::statvfs::statvfs(path)
        .is_ok_and(|stat| stat.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY));
    if read_only {
        findings.error(
            "bpffs",
            "/sys/fs/bpf is read-only here: nothing can be attached",
            "systemd: leave ProtectKernelTunables= out of the unit; Docker: mount /sys/fs/bpf into the container writable",
        );
    } else {
        findings.ok("bpffs", "/sys/fs/bpf is there");
    }
}

/// Whether the kernel can do what is needed.
pub fn kernel(findings: &mut Findings) {
    if !Capabilities::own().missing().is_empty() {
        findings
            .note("kernel", format!("Linux {}: what it can do is told to root alone", datapath::release()));
        return;
    }
    match Features::find() {
        Ok(features) => findings.ok(
            "kernel",
            format!(
                "Linux {}: {}, XDP takes {}",
                datapath::release(),
                if features.tcx { "TC by links" } else { "TC by filters (before 6.6)" },
                if features.frags { "frames in several pieces" } else { "frames in one piece (before 5.18)" }
            ),
        ),
        Err(error) => findings.error("kernel", error.to_string(), "boot Linux 5.15 or later"),
    }
}

/// A range of addresses, and the interface that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Range {
    interface: String,
    address: Ipv4Addr,
    length: u32,
}

impl Range {
    fn overlaps(&self, other: &Self) -> bool {
        let length = self.length.min(other.length);
        let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
        u32::from(self.address) & mask == u32::from(other.address) & mask
    }
}

/// Whether two interfaces claim the same addresses: tasks behind one of them are then looked for behind the other.
pub fn ranges(findings: &mut Findings) {
    let mut ranges: Vec<Range> = Vec::new();
    for one in nix::ifaddrs::getifaddrs().into_iter().flatten() {
        let v4 =
            |storage: Option<nix::sys::socket::SockaddrStorage>| storage?.as_sockaddr_in().map(|v4| v4.ip());
        if let (Some(address), Some(mask)) = (v4(one.address), v4(one.netmask)) {
            let length = u32::from(mask).count_ones();
            if !address.is_loopback() && length < 32 {
                ranges.push(Range { interface: one.interface_name, address, length });
            }
        }
    }
    let mut clean = true;
    for (at, one) in ranges.iter().enumerate() {
        for other in
            ranges[at + 1..].iter().filter(|other| other.interface != one.interface && one.overlaps(other))
        {
            clean = false;
            findings.error(
                "ranges",
                format!(
                    "{} ({}/{}) and {} ({}/{}) have overlapping addresses: packets for one go to the other",
                    one.interface, one.address, one.length, other.interface, other.address, other.length
                ),
                "give Docker other ranges: \"default-address-pools\" in /etc/docker/daemon.json, \
                 `docker swarm init --default-addr-pool`, or remove docker_gwbridge and make it anew with --subnet",
            );
        }
    }
    if clean {
        findings.ok("ranges", "no two interfaces have overlapping addresses");
    }
}

/// Rules of the host's packet filter that published ports bypass.
pub fn firewall(findings: &mut Findings, serves: bool) {
    const CHECK: &str = "firewall";
    let lines = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let user = lines("iptables", &["-w", "2", "-S", "DOCKER-USER"]).unwrap_or_default();
    let user = user.lines().filter(|line| line.starts_with("-A") && !line.ends_with("-j RETURN")).count();
    let input = lines("iptables", &["-w", "2", "-S", "INPUT"]).unwrap_or_default();
    let drops =
        |line: &&str| line.ends_with("-j DROP") || line.contains("-j REJECT") || *line == "-P INPUT DROP";
    let input = input.lines().filter(drops).count();
    if user + input == 0 {
        findings.ok(CHECK, "no rule of iptables in DOCKER-USER or INPUT that published ports would bypass");
        return;
    }
    let text = format!(
        "{user} rules in DOCKER-USER and {input} in INPUT do not see packets to ports that are served here: these bypass the \
         host's packet filter"
    );
    if serves {
        findings.warn(CHECK, text, "filter in front of the node, or do not publish what must not be reached: `iptables -S` shows the rules");
    } else {
        findings.note(CHECK, text);
    }
}

/// In the kernel's first namespace of processes all of them are seen (`PROC_PID_INIT_INO`).
const FIRST_PIDS: u64 = 0xEFFF_FFFC;

/// The cookies of all network namespaces there are; none where not all can be seen.
fn cookies() -> Option<BTreeSet<u64>> {
    if fs::metadata("/proc/self/ns/pid").ok()?.ino() != FIRST_PIDS {
        return None;
    }
    let mut places: Vec<PathBuf> = Vec::new();
    for folder in ["/run/netns", "/run/docker/netns", "/var/run/docker/netns"] {
        places.extend(fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()));
    }
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        if entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            places.push(entry.path().join("ns/net"));
        }
    }
    let mut seen = BTreeSet::new();
    let mut files = Vec::new();
    for place in places {
        if let Ok(file) = fs::File::open(&place)
            && let Ok(meta) = file.metadata()
            && seen.insert((meta.dev(), meta.ino()))
        {
            files.push(file);
        }
    }
    // A thread of its own goes into each; this one stays where it is.
    let visit = || -> Option<BTreeSet<u64>> {
        let mut cookies = BTreeSet::new();
        for file in files {
            // What is no network namespace (a file that was a mount point) is none that pins name.
            if setns(&file, CloneFlags::CLONE_NEWNET).is_ok() {
                cookies.insert(netns_cookie().ok()?);
            }
        }
        Some(cookies)
    };
    std::thread::scope(|scope| scope.spawn(visit).join().ok().flatten())
}

/// Pins of network namespaces that are gone.
pub fn dead() -> Vec<PathBuf> {
    // Pins first: a namespace that is made meanwhile is then among those there are, and not taken for gone.
    let pinned = datapath::pinned_namespaces().unwrap_or_default();
    let Some(alive) = cookies() else { return Vec::new() };
    pinned.into_iter().filter(|(cookie, _)| !alive.contains(cookie)).map(|(_, path)| path).collect()
}

/// Tables that nothing can reach any more hold memory.
pub fn abandoned(findings: &mut Findings) {
    let dead = dead();
    if dead.is_empty() {
        return;
    }
    let paths: Vec<String> = dead.iter().map(|path| path.display().to_string()).collect();
    findings.warn(
        "pins",
        format!(
            "{} of network namespaces that are gone hold memory: {}",
            crate::controller::counted(dead.len(), "datapath"),
            paths.join(", ")
        ),
        "sudo lb-userspace doctor --remove-dead-pins",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_overlap_where_one_lies_in_the_other() {
        let range = |text: &str| {
            let (address, length) = text.split_once('/').unwrap();
            Range {
                interface: text.into(),
                address: address.parse().unwrap(),
                length: length.parse().unwrap(),
            }
        };
        assert!(range("172.18.0.1/16").overlaps(&range("172.18.5.1/24")));
        assert!(range("10.0.0.1/8").overlaps(&range("10.255.0.1/24")));
        assert!(!range("172.18.0.1/16").overlaps(&range("172.19.0.1/16")));
        assert!(range("0.0.0.0/0").overlaps(&range("172.19.0.1/16")));
    }
}
