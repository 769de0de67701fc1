//! Putting the programs where packets come in: the uplink, in the best way that works, and the interfaces by which tasks
//! answer.

use std::{fs, time::Duration};

use anyhow::{Result, anyhow, bail};
use lb_common::{
    abi::{Config, Mode, PARTIAL_CHECKSUMS, TC_ALONE, XDP_GENERIC, XDP_IS_NEW, XDP_REDIRECTS, XDP_TRANSMITS},
    guard::default_rate,
};
use tokio::time::Instant;

use super::{Controller, beside, roles};
use crate::{
    datapath::{DatapathError, TcHook},
    events::Kind,
    net::{self, Link, Snapshot},
    plan::{NextHop, NextHops, Role},
};

/// From the device's driver to TC no frame takes as long: between the two are queues of one CPU's network code.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

impl Controller {
    /// Attaches the uplink's programs: native XDP, else TC alone, or only what was asked for.
    pub(super) fn attach(&mut self, snapshot: &Snapshot, uplink: &Link) -> Result<()> {
        let modes = match self.settings.mode {
            Some(mode) => vec![mode],
            // Generic XDP costs what TC costs and gives up segmentation offload: it is never the better choice.
            None => vec![Mode::Native, Mode::Tc],
        };
        let before = self.datapath.attached().map(|(_, mode)| mode);
        let mut problems = Vec::new();
        for mode in modes {
            let done = hidden_tags(snapshot, uplink, mode)
                .and_then(|()| self.attach_in(uplink, mode).map_err(|error| error.to_string()));
            match done {
                Ok(()) => {
                    let hook = self.datapath.tc_hook();
                    let since = problems.iter().map(|p| format!("; not {p}")).collect::<String>();
                    let text = format!("{}: served by {} ({hook}){since}", uplink.name, mode.name());
                    // What was not asked for is worth a look.
                    let slower = !problems.is_empty();
                    if slower {
                        log::warn!("{text}")
                    } else {
                        log::info!("{text}")
                    }
                    if before.is_some_and(|before| before != mode) {
                        self.record(Kind::ModeChanged, text);
                    }
                    return Ok(());
                }
                Err(problem) => problems.push(format!("{}: {problem}", mode.name())),
            }
        }
        Err(anyhow!("{}", problems.join("; ")))
    }

    fn attach_in(&mut self, uplink: &Link, mode: Mode) -> Result<()> {
        let device = net::device(&uplink.name).ok();
        let partial = device.as_ref().is_none_or(net::Device::passes_partial_checksums);
        let before = self.datapath.config();
        let mut config = Config {
            uplink: uplink.index,
            snat_ports: self.settings.snat_ports,
            host_ports: host_ports(),
            tunnel_port: before.tunnel_port,
            jiffies_per_second: jiffies_per_second(),
            mode: mode as u32,
            flood_rate: match self.settings.flood_rate {
                Some(rate) => rate,
                None => default_rate(self.datapath.lines()?),
            },
            uplink_mac: uplink.mac,
            pool: self.settings.v6_pool.first(),
            pool_bits: self.settings.v6_pool.bits(),
            pref64: self.settings.pref64,
            stale_after: self.settings.stale_after.map_or(0, |time| time.as_secs().max(1) as u32),
            ..Config::default()
        };
        config.flags |= if partial { PARTIAL_CHECKSUMS } else { 0 };
        config.flags |= match mode {
            Mode::Native => 0,
            Mode::Generic => XDP_GENERIC,
            Mode::Tc => TC_ALONE,
        };
        self.datapath.take_pool(self.settings.v6_pool)?;
        // Until XDP is there, and its features are known, TC does all of it: no packet of a connection that runs finds
        // nobody at work. A generic XDP that goes hides link headers until it has gone.
        self.datapath.beat()?;
        let there = self.datapath.attached() == Some((uplink.index, mode));
        let meanwhile = config.flags | before.flags & XDP_GENERIC | if there { 0 } else { TC_ALONE };
        self.datapath.set_config(Config { flags: meanwhile, ..config })?;
        if let Err(problem) = self.datapath.attach_uplink(&uplink.name, uplink.index, mode) {
            self.datapath.set_config(before)?;
            bail!("{problem}");
        }
        let veth = device.is_some_and(|device| device.driver == "veth");
        config.flags |= transmission(uplink.index, mode, veth);
        self.xdp_since = None;
        if !there && mode != Mode::Tc {
            config.flags |= XDP_IS_NEW;
            self.xdp_since = Some(Instant::now());
        }
        self.datapath.set_config(config)?;
        Ok(())
    }

    /// Leaves all decisions to XDP once no frame can be on its way that it has not seen.
    pub(super) fn settle_in(&mut self) -> Result<(), DatapathError> {
        if self.xdp_since.is_some_and(|since| since.elapsed() >= ON_ITS_WAY) {
            let config = self.datapath.config();
            self.datapath.set_config(Config { flags: config.flags & !XDP_IS_NEW, ..config })?;
            self.xdp_since = None;
        }
        Ok(())
    }

    /// Takes the filters of an uplink away that is gone: they are known by its index, and would stay beside those of the one that
    /// came in its place. Links are swapped.
    pub(super) fn leave_former(&mut self, snapshot: &Snapshot, uplink: &Link) {
        let former = self.datapath.attached().map(|(index, _)| index).filter(|index| *index != uplink.index);
        let Some(former) = former.filter(|_| self.datapath.tc_hook() == TcHook::Clsact) else {
            return;
        };
        for role in Role::ALL {
            for index in self.datapath.links_beside(role) {
                let name = snapshot.links.get(&index).map(|link| link.name.as_str());
                self.datapath.detach_beside(role, (name, index), former);
            }
        }
    }

    /// Puts the programs where tasks answer and where other nodes are reached beside the uplink, before the first packet can come
    /// there. Who would be answered astray is not offered. What is to be said of programs that could not be swapped.
    pub(super) fn attach_beside(
        &mut self,
        snapshot: &Snapshot,
        uplink: u32,
        next_hops: &mut NextHops,
    ) -> Vec<String> {
        let behind = std::mem::take(&mut self.behind);
        let mut stay = Vec::new();
        for (kind, index) in beside(next_hops, uplink) {
            let attached = self.served.is_some()
                && !behind.contains(&(kind, index))
                && self.datapath.links_beside(kind).contains(&index);
            if attached {
                continue;
            }
            let name = snapshot.links.get(&index).map_or("", |link| &link.name);
            let Err(problem) = self.datapath.attach_beside(kind, (name, index), uplink) else {
                if kind == Role::Peers {
                    log::info!("{}: other nodes are reached by {name}", self.settings.interface);
                }
                continue;
            };
            if self.datapath.carries(kind, index) {
                self.behind.insert((kind, index));
                stay.push(format!("the former program serves on {name}: {problem}; trying again"));
                continue;
            }
            for ((_, reach), next_hop) in next_hops.iter_mut() {
                let its = |next_hop: &NextHop| {
                    next_hop.ifindex == index && roles(*reach, next_hop).any(|role| role == kind)
                };
                if next_hop.as_ref().is_ok_and(its) {
                    *next_hop = Err(format!("attach to {name}: {problem}"));
                }
            }
        }
        stay
    }
}

/// XDP cannot see tags that the device takes out of the frames; TC can.
fn hidden_tags(snapshot: &Snapshot, uplink: &Link, mode: Mode) -> Result<(), String> {
    let above: Vec<&str> = snapshot.vlans_on(uplink.index).map(|link| link.name.as_str()).collect();
    if mode == Mode::Tc
        || above.is_empty()
        || !net::device(&uplink.name).is_ok_and(|device| device.takes_tags)
    {
        return Ok(());
    }
    Err(format!(
        "{0} takes VLAN tags out of the frames before XDP sees them, and {1} sits on it; turn that off with \
         `ethtool -K {0} rxvlan off`, or attach with --mode tc",
        uplink.name,
        above.join(", ")
    ))
}

/// How XDP sends frames back out of the uplink. A veth delivers what XDP sends only if its peer polls for it.
fn transmission(ifindex: u32, mode: Mode, veth: bool) -> u32 {
    const NDO_XMIT: u64 = 4;
    match mode {
        // Merged frames would not fit, and their sums are unfinished: TC sends what generic XDP decides.
        Mode::Tc | Mode::Generic => 0,
        Mode::Native if !veth => XDP_TRANSMITS,
        Mode::Native => match net::xdp_features(ifindex) {
            Some(features) if features & NDO_XMIT != 0 => XDP_TRANSMITS | XDP_REDIRECTS,
            _ => 0,
        },
    }
}

/// The rate of the kernel's tick: its coarse clocks advance once a tick.
fn jiffies_per_second() -> u32 {
    let resolution = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE);
    let nanoseconds = resolution.map_or(4_000_000, |time| time.tv_nsec());
    (1_000_000_000 / nanoseconds.max(1)) as u32
}

/// The host's ephemeral ports.
fn host_ports() -> [u16; 2] {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(low), Some(high)) => [low, high],
        _ => [32768, 60999],
    }
}
