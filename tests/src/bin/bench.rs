//! What a packet costs in the programs, by BPF_PROG_TEST_RUN. `cargo xtask bench` builds and runs it.
//!
//! Each figure is the median over many single runs, less that of an ARP frame in the same program, which leaves at
//! once: a run that changes its packet cannot be repeated by the kernel. Caches are as warm as the system call between
//! two runs leaves them, so the figures are upper bounds.

use std::net::IpAddr;

use clap::Parser;
use lb_common::{
    abi::XDP_TRANSMITS,
    tunnel::{DEFAULT_PORT, OPTION_CLASS, RETURN_DIRECT, TO_CLIENT, TO_TASK, VERSION},
};
use lb_tests::{
    lab::{HOP_MAC, Hook, Lab, ip, service, task, with_lab},
    packet::{ACK, NODE_MAC, Packet, SYN, SYN_ACK, Tunnelled},
};
use lb_userspace::cluster::Via;

/// Nanoseconds a packet, by program and what it does.
#[derive(Parser)]
struct Arguments {
    /// Runs for each figure
    #[arg(long, default_value_t = 20_001)]
    runs: usize,
}

/// The addresses of each family: client, listener, the peer's listener, a near task, a routed one.
const FAMILIES: [(&str, [&str; 5]); 2] = [
    ("IPv4", ["198.51.100.7", "192.0.2.1", "192.0.2.2", "172.18.0.11", "10.9.0.1"]),
    ("IPv6", ["2001:db8:77::7", "2001:db8::1", "2001:db8::2", "fd18::11", "fd09::1"]),
];
/// The first sequence number of a client and of a task.
const FIRST: u32 = 1_000;
const TASK_FIRST: u32 = 7_000;

fn main() {
    let runs = Arguments::parse().runs;
    let services = vec![
        service("far", &["83:8083"], vec![task("far.1", false, Via::Peer, &["172.18.9.11", "fd18::9:11"])]),
        service("near", &["84:8084"], vec![task("near.1", true, Via::Peer, &["172.18.0.11", "fd18::11"])]),
        service("routed", &["81:8081"], vec![task("routed.1", false, Via::Routed, &["10.9.0.1", "fd09::1"])]),
    ];
    println!("{:<52} {:>8} {:>8}", "ns a packet above an ARP frame", "median", "least");
    with_lab(services, |lab| {
        // As on a network card: sums are finished.
        lab.configure(|config| config.flags = XDP_TRANSMITS);
        let arp = [&NODE_MAC[..], &HOP_MAC, &[8, 6], &[0; 46]].concat();
        let floors = [Hook::UplinkXdp, Hook::TaskTc].map(|hook| (hook, median(lab, hook, &arp, runs)));
        let show = |what: &str, family: &str, hook: Hook, lab: &Lab, frame: &[u8]| {
            let (_, floor) = floors.iter().find(|(of, _)| *of == hook).expect("a floor");
            let cost = median(lab, hook, frame, runs);
            let [middle, least] = [0, 1].map(|i| cost[i].saturating_sub(floor[i]));
            println!("{:<52} {middle:>8} {least:>8}", format!("{what}, {family}"));
        };
        for (name, [client, listener, peer, near, routed]) in FAMILIES {
            let (client, small) = ((ip(client), 40_000), |p: &mut Packet| p.payload = vec![0; 6]);
            let request = |transport, to| Packet::new(transport, client, (ip(listener), to)).with(small);
            let arrived = |kind, flags, inner: &Packet| {
                let tunnelled = Tunnelled {
                    macs: (HOP_MAC, NODE_MAC),
                    nodes: (ip("192.0.2.2"), ip("192.0.2.1")),
                    ports: (51_000, DEFAULT_PORT),
                    class: OPTION_CLASS.get(),
                    kind,
                    version_and_flags: [VERSION, flags],
                    task: (ip("172.18.0.11"), 8084),
                    inner: inner.bytes()[14..].to_vec(),
                };
                tunnelled.bytes()
            };
            // Established: asked, answered, gone on.
            for port in [81, 83, 84] {
                lab.xdp(&request(SYN, port).at(FIRST, 0).bytes());
            }
            let taken = |from: (IpAddr, u16), to: u16| {
                Packet::new(SYN_ACK, from, (client.0, to))
                    .at(TASK_FIRST, FIRST + 1)
                    .with(|p| p.macs = (HOP_MAC, NODE_MAC))
            };
            lab.xdp(&taken((ip(routed), 8081), client.1).bytes());
            lab.xdp(&arrived(TO_CLIENT, 0, &taken((ip(listener), 83), client.1)));
            lab.task_tc(&taken((ip(near), 8084), client.1).bytes());
            for port in [81, 83, 84] {
                lab.xdp(&request(ACK, port).at(FIRST + 1, TASK_FIRST + 1).bytes());
            }
            let xdp = Hook::UplinkXdp;
            show("XDP: not ours", name, xdp, lab, &request(ACK, 22).bytes());
            show("XDP: known flow to a routed task", name, xdp, lab, &request(ACK, 81).bytes());
            show("XDP: known flow to a peer, encapsulated", name, xdp, lab, &request(ACK, 83).bytes());
            let by_peer = |port, transport| {
                let packet = Packet::new(transport, (client.0, port), (ip(peer), 84));
                packet.with(small)
            };
            // Two clients' ports: answers to the one go back through the peer, to the other straight.
            for (port, flags) in [(40_001, 0), (40_002, RETURN_DIRECT)] {
                lab.xdp(&arrived(TO_TASK, flags, &by_peer(port, SYN).at(FIRST, 0)));
                lab.task_tc(&taken((ip(near), 8084), port).bytes());
                lab.xdp(&arrived(TO_TASK, flags, &by_peer(port, ACK).at(FIRST + 1, TASK_FIRST + 1)));
            }
            let frame = arrived(TO_TASK, 0, &by_peer(40_001, ACK));
            show("XDP: from a peer to a task, decapsulated", name, xdp, lab, &frame);
            let answer = Packet::new(ACK, (ip(listener), 83), client).with(small);
            // Its next hop is renewed by TC each second; XDP's own share is what is shown.
            let frame = arrived(TO_CLIENT, 0, &answer);
            show("XDP: from a peer to the client, decapsulated", name, xdp, lab, &frame);
            let reply = |to| Packet::new(ACK, (ip(near), 8084), (client.0, to)).with(small).bytes();
            let tc = Hook::TaskTc;
            show("TC: a task's answer, client of this node", name, tc, lab, &reply(40_000));
            show("TC: a task's answer, back through the peer", name, tc, lab, &reply(40_001));
            show("TC: a task's answer, straight to a peer's client", name, tc, lab, &reply(40_002));
        }
    });
}

/// The median and the least of many runs, in nanoseconds.
fn median(lab: &Lab, hook: Hook, frame: &[u8], runs: usize) -> [u32; 2] {
    let mut samples: Vec<u32> = (0..runs).map(|_| lab.cost(hook, frame)).collect();
    samples.sort_unstable();
    [samples[samples.len() / 2], samples[0]]
}
