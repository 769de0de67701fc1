//! An attached interface: its mode, its driver, whose programs sit on it, and whether it is the right one.

use std::net::IpAddr;

use lb_common::abi::{Mode, program};

use super::{Attached, Findings};
use crate::{
    datapath::{self, PinDir},
    net::{self, Snapshot},
};

/// All there is to check of an interface.
pub fn all(findings: &mut Findings, one: &Attached, snapshot: &Snapshot, attached: &[Attached]) {
    let interface = &one.inventory.interface;
    let Some(link) = snapshot.link(interface) else {
        findings.error(
            "interface",
            format!("{interface} is gone: what was attached to it went with it"),
            format!("bring {interface} back, or: sudo lb-userspace detach --iface {interface}"),
        );
        return;
    };
    if !link.up {
        findings.error(
            "interface",
            format!("{interface} is down: nothing comes in"),
            format!("sudo ip link set {interface} up"),
        );
    }
    mode(findings, one, link);
    right_one(findings, one, snapshot, attached);
}

fn mode(findings: &mut Findings, one: &Attached, link: &net::Link) {
    const CHECK: &str = "mode";
    let interface = &one.inventory.interface;
    let device = net::device(interface).ok();
    let driver = device.as_ref().map_or("unknown", |device| device.driver.as_str());
    let mode = Mode::try_from(one.around.config.mode).ok();
    let own = PinDir::of(interface).ok().and_then(|pins| datapath::own(&pins, program::UPLINK_XDP));
    if let Some(id) = link.xdp.filter(|id| Some(*id) != own || mode == Some(Mode::Tc)) {
        let loaded = datapath::loaded(id);
        let name = if loaded.name.is_empty() { "of unknown name".to_owned() } else { loaded.name.clone() };
        let owner = match loaded.owners.as_slice() {
            [] => "no process holds it".to_owned(),
            owners => format!("held by {}", owners.join(", ")),
        };
        findings.warn(
            CHECK,
            format!(
                "another XDP program holds {interface}: id {id}, {name}, {owner}; TC alone serves, at about half of XDP's speed"
            ),
            format!("sudo ip link set dev {interface} xdp off (or stop what put it there), then attach again"),
        );
        return;
    }
    let text = format!(
        "{interface}: {}, driver {driver}, MTU {}",
        mode.map_or("not attached yet", Mode::name),
        link.mtu
    );
    match mode {
        Some(Mode::Native) => findings.ok(CHECK, text),
        Some(Mode::Tc) => {
            findings.note(CHECK, format!("{text}; native XDP is faster where the driver has it"))
        }
        Some(Mode::Generic) => findings.warn(
            CHECK,
            format!("{text}; generic XDP costs what TC costs and gives up segmentation offload"),
            format!("sudo lb-userspace attach --iface {interface} --mode auto"),
        ),
        None => findings.note(CHECK, text),
    }
    if let Some(device) = device.filter(|device| device.takes_tags && mode != Some(Mode::Tc)) {
        findings.note(
            "offload",
            format!(
                "{interface}: {} takes VLAN tags out of frames before XDP sees them; with VLANs on it: ethtool -K {interface} \
                 rxvlan off",
                device.driver
            ),
        );
    }
}

/// Whether clients and nodes come by this interface.
fn right_one(findings: &mut Findings, one: &Attached, snapshot: &Snapshot, attached: &[Attached]) {
    const CHECK: &str = "interface";
    let interface = &one.inventory.interface;
    let nodes = one.inventory.nodes();
    let name_of = |index: u32| snapshot.links.get(&index).map(|link| link.name.clone()).unwrap_or_default();
    let owner = |wanted: &IpAddr| {
        let found = snapshot.addresses.iter().find(|(_, address)| address == wanted);
        found.map(|(index, _)| name_of(*index))
    };
    let Some(this) = nodes.iter().find(|node| node.this) else {
        if !nodes.is_empty() {
            let theirs: Vec<String> =
                nodes.iter().map(|node| format!("{} {}", node.name, addresses(&node.addresses))).collect();
            let own: Vec<IpAddr> = snapshot.addresses.iter().map(|(_, address)| *address).collect();
            findings.error(
                CHECK,
                format!(
                    "no node of the cluster has an address of this machine: the nodes are {}; this machine has {}",
                    theirs.join(", "),
                    addresses(&own)
                ),
                format!("sudo lb-userspace attach --iface {interface} --node NAME"),
            );
        }
        return;
    };
    let places: Vec<String> = this.addresses.iter().filter_map(owner).collect();
    if places.is_empty() || places.contains(interface) {
        findings.ok(CHECK, format!("{interface} has the address of this node, {}", this.name));
        return;
    }
    let right = &places[0];
    if attached.iter().any(|other| other.inventory.interface == *right) {
        findings
            .note(CHECK, format!("{interface} is served beside {right}, which has the address of this node"));
        return;
    }
    if nodes.iter().any(|node| node.reached_by.as_ref() == Some(right)) {
        findings.note(
            CHECK,
            format!(
                "clients are served on the addresses of {interface}; the nodes reach each other by {right}, where clients of {} are not",
                addresses(&this.addresses)
            ),
        );
        return;
    }
    findings.error(
        CHECK,
        format!(
            "{interface} has none of this node's addresses: {} is on {right}. Clients of that address are not served",
            addresses(&this.addresses)
        ),
        format!("sudo lb-userspace detach --iface {interface}; sudo lb-userspace attach --iface {right}"),
    );
}

fn addresses(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}
