//! The fast path and the stages come to the same: the same packets, in the same state, by both.

use lb_common::{
    abi::{PARTIAL_CHECKSUMS, STAGES_ONLY, XDP_REDIRECTS, XDP_TRANSMITS},
    backend::VIA_TC,
    tunnel::{DEFAULT_PORT, OPTION_CLASS, TO_CLIENT, VERSION},
};
use lb_tests::{
    lab::{ConnectionState, HOP_MAC, Lab, Verdict, ip, service, task, with_lab_of},
    packet::{ACK, Checksum, FIN, NODE_MAC, Packet, RST, SYN, SYN_ACK, Transport, Tunnelled},
};
use lb_userspace::{
    cluster::{Service, TaskState, Via},
    datapath::{Counters, Sizes},
};

/// How many packets; each goes both ways.
const PACKETS: usize = 4_000;
/// Ports of the client: few, so that packets meet connections in all states, and such that snat keeps: it draws others by lot.
const PORTS: u16 = 5;

/// A generator that a seed decides (Numerical Recipes).
struct Random(u32);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as usize % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Once in so many times.
    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

/// Client, listener, and a task of each kind: near, routed, snat.
const FAMILIES: [[&str; 5]; 2] = [
    ["198.51.100.7", "192.0.2.1", "172.18.0.11", "10.9.0.1", "10.9.0.2"],
    ["2001:db8:77::7", "2001:db8::1", "fd18::11", "fd09::1", "fd09::2"],
];

/// One task each: which one is next must not depend on how often a packet goes through.
fn services() -> Vec<Service> {
    let near = [FAMILIES[0][2], FAMILIES[1][2]];
    let routed = [FAMILIES[0][3], FAMILIES[1][3]];
    let snat = [FAMILIES[0][4], FAMILIES[1][4]];
    vec![
        service("routed", &["81:8081", "81:8081/udp"], vec![task("routed.1", false, Via::Routed, &routed)]),
        service("snat", &["82:8082", "82:8082/udp"], vec![task("snat.1", false, Via::Snat, &snat)]),
        service(
            "far",
            &["83:8083", "83:8083/udp"],
            vec![task("far.1", false, Via::Peer, &["172.18.9.11", "fd18::9:11"])],
        ),
        service("near", &["84:8084", "84:8084/udp"], vec![task("near.1", true, Via::Peer, &near)]),
    ]
}

/// A frame that comes in by the uplink: mostly what belongs to a connection, now and then something odd about it.
fn frame(random: &mut Random) -> (String, Vec<u8>) {
    let [client, listener, near, routed, snat] = random.of(&FAMILIES);
    let client = (ip(client), 16_384 + random.below(PORTS as usize) as u16);
    let transport = random.of(&[SYN, SYN_ACK, ACK, ACK, ACK, ACK, FIN, RST, Transport::Udp, Transport::Udp]);
    let published = 81 + random.below(5) as u16;
    let mut packet = match random.below(6) {
        0 => Packet::new(transport, (ip(routed), 8081), client),
        // Snat keeps the client's port where it may.
        1 => Packet::new(transport, (ip(snat), 8082), (ip(listener), client.1)),
        2 if random.once_in(3) => Packet::new(transport, (ip(near), 8084), client),
        _ => Packet::new(transport, client, (ip(listener), published)),
    };
    // Few numbers, so that what follows fits now and then.
    packet.sequence = 1_000 + random.below(3) as u32;
    packet.acknowledgment = 1_000 + random.below(3) as u32;
    packet.payload = vec![0; random.of(&[0, 0, 1, 2, 40])];
    packet.hops = if random.once_in(12) { random.below(3) as u8 } else { 64 };
    if random.once_in(15) {
        packet.checksum = Checksum::Unfinished;
    }
    if random.once_in(25) {
        packet.tags = vec![(0x8100, 7)];
    }
    if random.once_in(25) && packet.source.is_ipv4() {
        packet.options = vec![1, 1, 1, 1];
    }
    if random.once_in(25) && packet.source.is_ipv6() {
        packet.extensions = vec![(60, vec![0, 1, 4, 0, 0, 0, 0])];
    }
    if random.once_in(30) {
        packet.payload = vec![0; 1_480];
    }
    let mut bytes = packet.bytes();
    if random.once_in(12) {
        let inner = Packet::new(transport, (ip(listener), 83), client).with(|p| {
            (p.sequence, p.acknowledgment) = (packet.sequence, packet.acknowledgment);
            p.payload.clear();
        });
        bytes = Tunnelled {
            macs: (HOP_MAC, NODE_MAC),
            nodes: (ip("192.0.2.2"), ip("192.0.2.1")),
            ports: (51_000, DEFAULT_PORT),
            network: 0,
            class: OPTION_CLASS.get(),
            kind: TO_CLIENT,
            version_and_flags: [VERSION, 0],
            task: (ip("172.18.9.11"), 8083),
            cookie: None,
            inner: inner.bytes()[14..].to_vec(),
        }
        .bytes();
    }
    match random.below(30) {
        0 => bytes.truncate(random.below(bytes.len()).max(14)),
        1 => bytes.extend([0; 9]),
        2 => {
            let at = 12 + random.below(bytes.len().min(60) - 12);
            bytes[at] ^= 1 << random.below(8);
        }
        _ => {}
    }
    (format!("{packet:?}"), bytes)
}

/// What a packet came to.
#[derive(Debug, PartialEq)]
struct End {
    verdict: Verdict,
    counters: Counters,
    connections: ConnectionState,
}

fn end(lab: &mut Lab, flags: u32, frame: &[u8]) -> End {
    lab.configure(|config| config.flags = flags);
    let verdict = lab.xdp(frame);
    End { verdict, counters: lab.counters(), connections: lab.connection_state() }
}

/// The increase alone.
fn since(mut end: End, before: &Counters) -> End {
    for (count, before) in end.counters.outcomes.iter_mut().zip(&before.outcomes) {
        count.packets -= before.packets;
    }
    for (number, stats) in &mut end.counters.backends {
        let before = &before.backends[number];
        stats.connections -= before.connections;
        stats.failovers -= before.failovers;
        stats.answered -= before.answered;
        stats.unanswered -= before.unanswered;
        stats.request_packets -= before.request_packets;
        stats.request_bytes -= before.request_bytes;
        stats.reply_packets -= before.reply_packets;
        stats.reply_bytes -= before.reply_bytes;
    }
    for (number, stats) in &mut end.counters.services {
        let before = &before.services[number];
        stats.connections -= before.connections;
        stats.refused -= before.refused;
    }
    for (lines, before) in end.counters.connections.iter_mut().zip(&before.connections) {
        lines.inserted -= before.inserted;
        lines.reused -= before.reused;
        lines.displaced -= before.displaced;
        lines.removed -= before.removed;
    }
    end
}

/// Where a packet ends by the stages, and by the fast path from the same state.
fn both(lab: &mut Lab, flags: u32, frame: &[u8]) -> (End, End) {
    let (connections, before) = (lab.connection_state(), lab.counters());
    let staged = since(end(lab, flags | STAGES_ONLY, frame), &before);
    lab.set_connection_state(&connections);
    let before = lab.counters();
    let short = since(end(lab, flags, frame), &before);
    (staged, short)
}

#[test]
fn the_fast_path_and_the_stages_come_to_the_same() {
    let seed = std::env::var("LB_FAST_PATH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x5eed);
    println!("LB_FAST_PATH_SEED={seed}");
    let mut random = Random(seed);
    let sizes = Sizes {
        connections: Some(128),
        services: Some(64),
        listeners: Some(256),
        backends: Some(256),
        slots: Some(8_192),
        ..Sizes::default()
    };
    with_lab_of(sizes, services(), |lab| {
        let mut sent = 0;
        for number in 0..PACKETS {
            // What is around changes now and then: the state of tasks, the ways to them, what XDP may do.
            if number % 250 == 0 {
                lab.next_hop_flags = random.of(&[0, 0, 0, VIA_TC]);
                let state = random.of(&[TaskState::Running, TaskState::Running, TaskState::Draining]);
                lab.update(|cluster| {
                    (0..cluster.services.len())
                        .for_each(|index| cluster.service_mut(index).tasks[0].state = state);
                });
            }
            let flags = random.of(&[
                XDP_TRANSMITS,
                XDP_TRANSMITS,
                XDP_TRANSMITS | PARTIAL_CHECKSUMS,
                XDP_TRANSMITS | XDP_REDIRECTS,
                0,
            ]);
            let (what, frame) = frame(&mut random);
            let connections = lab.connection_state();
            let (mut staged, mut short) = both(lab, flags, &frame);
            // A moment at which something falls due may lie between the two; not again and again.
            for _ in 0..3 {
                if short == staged {
                    break;
                }
                lab.set_connection_state(&connections);
                (staged, short) = both(lab, flags, &frame);
            }
            let by_snat = |number: u32| lab.task_of(number).starts_with("snat");
            if staged
                .counters
                .backends
                .iter()
                .any(|(number, stats)| stats.connections > 0 && by_snat(*number))
            {
                // A new connection by snat: where the client's port is taken, another is drawn by lot.
                continue;
            }
            assert_eq!(short, staged, "packet {number}, flags {flags}: {what}, {frame:02x?}");
            sent += u32::from(staged.verdict.frame != frame || staged.verdict.note.is_some());
        }
        // Most of them belong to connections: a test of what passes alone would show little.
        assert!(sent as usize > PACKETS / 4, "{sent} of {PACKETS} packets were forwarded");
    });
}
