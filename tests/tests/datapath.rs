//! Every path of the datapath as packets in and packets out: the whole frame and all counters compared.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::atomic::{AtomicU32, Ordering},
};

use lb_common::net::Address as _;
use lb_common::{
    abi::{META_TC_DECIDES, PARTIAL_CHECKSUMS, TC_ALONE, XDP_GENERIC, XDP_IS_NEW, XDP_TRANSMITS, inner},
    backend::VIA_TC,
    conntrack::line::ALIAS,
    outcome::Outcome,
};
use lb_tests::{
    lab::{
        BRIDGE_MAC, DROP, HOP_MAC, Lab, PASS, REDIRECT, TASK_MAC, TX, UNSPEC, ip, service, task, with_lab,
    },
    netns::eventually,
    packet::{
        ACK, CLIENT_MAC, Checksum, FIN, NODE_MAC, Packet, RST, SYN, SYN_ACK, Transport, assert_checksums,
    },
};
use lb_userspace::cluster::{Access, Scheduler, Service, TaskState, Via};

/// What one family's tests use: client, listener, tasks.
#[derive(Clone, Copy)]
struct Family {
    client: &'static str,
    listener: &'static str,
    local: &'static str,
    routed: &'static str,
    snat: &'static str,
}

const V4: Family = Family {
    client: "198.51.100.7",
    listener: "192.0.2.1",
    local: "172.18.0.11",
    routed: "10.9.0.1",
    snat: "10.9.0.2",
};
const V6: Family = Family {
    client: "2001:db8:77::7",
    listener: "2001:db8::1",
    local: "fd18::11",
    routed: "fd09::1",
    snat: "fd09::2",
};

impl Family {
    fn packet(&self, transport: Transport, port: u16, to: u16) -> Packet {
        Packet::new(transport, (ip(self.client), port), (ip(self.listener), to))
    }

    fn answer(&self, transport: Transport, from: (&str, u16), to: (IpAddr, u16)) -> Packet {
        Packet::new(transport, (ip(from.0), from.1), to).with(|packet| packet.macs = (HOP_MAC, NODE_MAC))
    }
}

/// A packet's frame with some bytes replaced.
fn patched(packet: &Packet, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = packet.bytes();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

fn services() -> Vec<Service> {
    vec![
        service(
            "web",
            &["80:8080", "53:5353/udp"],
            vec![
                task("web.1", true, Via::Snat, &[V4.local, V6.local]),
                task("web.2", true, Via::Snat, &["172.18.0.12", "fd18::12"]),
            ],
        ),
        service(
            "routed",
            &["81:8081", "81:8081/udp"],
            vec![task("routed.1", false, Via::Routed, &[V4.routed, V6.routed])],
        ),
        service(
            "snat",
            &["82:8082", "82:8082/udp"],
            vec![task("snat.1", false, Via::Snat, &[V4.snat, V6.snat])],
        ),
        service("empty", &["85:8085"], vec![]),
        service(
            "twin",
            &["86:8086", "87:8086"],
            vec![
                task("twin.1", true, Via::Snat, &["172.18.0.21"]),
                task("twin.2", true, Via::Snat, &["172.18.0.22"]),
            ],
        ),
    ]
}

#[test]
fn what_is_not_ours_passes_untouched_and_named() {
    with_lab(services(), |lab| {
        let syn = V4.packet(SYN, 40_000, 80);
        let arp = [&NODE_MAC[..], &CLIENT_MAC, &[8, 6], &[0; 46]].concat();
        lab.passes("ARP", &arp, Outcome::NotIp);
        let group = syn.clone().with(|p| p.macs.1 = [1, 0, 0x5e, 0, 0, 1]);
        lab.passes("a multicast frame", &group.bytes(), Outcome::NotUnicast);
        lab.passes("another port", &V4.packet(SYN, 40_000, 22).bytes(), Outcome::NotOurs);
        lab.passes("the other protocol", &V4.packet(Transport::Udp, 40_000, 80).bytes(), Outcome::NotOurs);
        lab.passes("another port, IPv6", &V6.packet(SYN, 40_000, 22).bytes(), Outcome::NotOurs);
        let elsewhere = syn.clone().with(|p| p.destination = ip("192.0.2.9"));
        lab.passes("our port on another address", &elsewhere.bytes(), Outcome::NotOurs);
        let to_task = syn.clone().with(|p| (p.destination, p.destination_port) = (ip(V4.local), 8080));
        lab.passes("straight to a task", &to_task.bytes(), Outcome::NotOurs);
        lab.passes("a connection of the host's", &V4.packet(ACK, 40_000, 80).bytes(), Outcome::NoConnection);
        lab.passes("SYN and ACK", &V4.packet(SYN_ACK, 40_000, 80).bytes(), Outcome::NoConnection);
        lab.passes("a stray RST", &V6.packet(RST, 40_000, 80).bytes(), Outcome::NoConnection);
        lab.passes("no task", &V4.packet(SYN, 40_000, 85).bytes(), Outcome::NoBackend);
        lab.passes("expired", &syn.clone().with(|p| p.hops = 1).bytes(), Outcome::TtlExpired);
        lab.passes(
            "expired, IPv6",
            &V6.packet(SYN, 40_000, 80).with(|p| p.hops = 0).bytes(),
            Outcome::TtlExpired,
        );
        let triple = syn.clone().with(|p| p.tags = vec![(0x88a8, 1), (0x8100, 2), (0x8100, 3)]);
        lab.passes("three tags", &triple.bytes(), Outcome::NotIp);
        // Nothing of this made a connection.
        lab.passes("still no connection", &V4.packet(ACK, 40_000, 80).bytes(), Outcome::NoConnection);
    });
}

#[test]
fn nobody_is_served_who_cannot_be_out_there() {
    let sources = [
        (
            &V4,
            ["0.0.0.1", "127.0.0.1", "127.255.255.254", "224.0.0.1", "240.0.0.1", "255.255.255.255"]
                .as_slice(),
        ),
        (&V4, [V4.listener, "172.30.0.0", "172.30.0.1", "172.30.255.255"].as_slice()),
        (&V6, ["::", "::1", "ff02::1", V6.listener].as_slice()),
    ];
    with_lab(services(), |lab| {
        lab.set_inner_ranges(&[
            ("172.30.0.0", 16, inner::BRIDGE),
            // The kernel routes what is narrower elsewhere.
            ("172.30.7.0", 24, inner::OUTSIDE),
            (V4.listener, 32, inner::OWN),
            (V6.listener, 128, inner::OWN),
        ]);
        let forged = |family: &Family, transport, to, source: &str| {
            family.packet(transport, 40_000, to).with(|p| p.source = ip(source)).bytes()
        };
        for (family, sources) in sources {
            for source in sources {
                for (transport, to) in [(SYN, 80), (Transport::Udp, 53)] {
                    let frame = forged(family, transport, to, source);
                    let (verdict, counted) = lab.counting(|lab| lab.xdp(&frame));
                    let refused = BTreeMap::from([(Outcome::Martian, 1)]);
                    assert_eq!((verdict.action, counted), (DROP, refused), "{source}");
                }
            }
        }
        assert_eq!((lab.lines().len(), lab.lines6().len()), (0, 0));
        // Their neighbours are.
        for source in [
            "1.0.0.1",
            "126.255.255.255",
            "128.0.0.1",
            "223.255.255.255",
            "172.29.255.255",
            "172.31.0.0",
            "172.30.7.7",
        ] {
            let (_, counted) = lab.counting(|lab| lab.xdp(&forged(&V4, SYN, 80, source)));
            assert_eq!(counted.get(&Outcome::Martian), None, "{source}");
        }
        assert_eq!(lab.lines().len(), 7);
        lab.set_inner_ranges(&[("fd30::", 64, inner::BRIDGE)]);
        let (verdict, counted) = lab.counting(|lab| lab.xdp(&forged(&V6, SYN, 80, "fd30::7")));
        assert_eq!((verdict.action, counted), (DROP, BTreeMap::from([(Outcome::Martian, 1)])));
        let (_, counted) = lab.counting(|lab| lab.xdp(&forged(&V4, SYN, 80, "172.30.0.1")));
        assert_eq!(counted.get(&Outcome::Martian), None);
    });
}

#[test]
fn services_that_answer_every_datagram_do_not_answer_each_other() {
    with_lab(services(), |lab| {
        let [node, node6] = ["192.0.2.2", "2001:db8::2"];
        let from = |family: &Family, source: &str, port: u16| {
            family.packet(Transport::Udp, port, 81).with(|p| p.source = ip(source)).bytes()
        };
        for (family, node) in [(&V4, node), (&V6, node6)] {
            // Whichever service it is whose port it says to come from.
            for port in [53, 81, 82] {
                let (verdict, counted) = lab.counting(|lab| lab.xdp(&from(family, node, port)));
                assert_eq!(
                    (verdict.action, counted),
                    (DROP, BTreeMap::from([(Outcome::Martian, 1)])),
                    "{port}"
                );
            }
            // A node may be a client, and a client may have any port.
            for (source, port) in [(node, 40_000), (node, 80), (family.client, 53)] {
                let (_, counted) = lab.counting(|lab| lab.xdp(&from(family, source, port)));
                assert_eq!(counted, BTreeMap::from([(Outcome::Routed, 1)]), "{source} {port}");
            }
        }
    });
}

#[test]
fn only_who_may_connect_is_served() {
    let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a range")).collect();
    with_lab(services(), |lab| {
        let ask = |lab: &mut Lab, family: &Family, source: &str, transport, to| {
            let frame = family.packet(transport, 40_000, to).with(|p| p.source = ip(source)).bytes();
            lab.counting(|lab| lab.xdp(&frame))
        };
        // Another service is everybody's.
        lab.update(|cluster| {
            cluster.service_mut(0).access = Access {
                allow: Some(ranges(&["198.51.100.0/24", "2001:db8:9::/48"])),
                deny: ranges(&["198.51.100.7/32"]),
            };
        });
        let denied = BTreeMap::from([(Outcome::Denied, 1)]);
        let lists = [
            (&V4, "198.51.100.6", true),
            (&V4, "198.51.100.7", false),
            (&V4, "198.51.100.8", true),
            (&V4, "198.51.101.1", false),
            (&V6, "2001:db8:9::1", true),
            (&V6, "2001:db8:a::1", false),
        ];
        for (family, source, allowed) in lists {
            let (verdict, counted) = ask(lab, family, source, SYN, 80);
            assert_eq!(counted == denied, !allowed, "{source}: {counted:?}");
            assert_eq!(verdict.action == DROP, !allowed, "{source}");
            let (_, counted) = ask(lab, family, source, Transport::Udp, 81);
            assert_eq!(counted, BTreeMap::from([(Outcome::Routed, 1)]), "{source}: of another service");
        }
        let stats = lab.datapath().counters().expect("the counters").services;
        assert_eq!(stats.values().map(|stats| stats.denied).collect::<Vec<_>>(), [0, 0, 0, 0, 3], "by name");
        // What no line is known of is denied before anything else is done for it; the guard counts none of it.
        lab.update(|cluster| cluster.service_mut(0).scheduler = Scheduler::Maglev);
        let (verdict, counted) = ask(lab, &V4, "198.51.101.1", ACK, 80);
        assert_eq!((verdict.action, counted), (DROP, denied.clone()));
        // A list that shrinks ends what it no longer allows.
        let (before, before6) = (lab.lines().len(), lab.lines6().len());
        lab.update(|cluster| {
            cluster.service_mut(0).access.deny = ranges(&["198.51.100.8/32", "2001:db8:9::1/128"])
        });
        lab.collect();
        assert_eq!((lab.lines().len(), lab.lines6().len()), (before - 1, before6 - 1));
        let left = lab.lines().into_iter().map(|(_, _, line)| line.tuple);
        let tcp =
            left.filter(|tuple| tuple.protocol == lb_common::net::TCP).map(|tuple| tuple.source.to_ip());
        assert_eq!(tcp.collect::<Vec<_>>(), [ip("198.51.100.6")]);
        // Everybody's again.
        lab.update(|cluster| cluster.service_mut(0).access = Access::default());
        let (_, counted) = ask(lab, &V4, "198.51.101.1", SYN, 80);
        assert_eq!(counted.get(&Outcome::Denied), None);
        // Whom no service takes none takes, whatever its list says.
        let (before, before6) = (lab.lines().len(), lab.lines6().len());
        lab.update(|cluster| {
            cluster.denied = ranges(&["198.51.100.0/29", "2001:db8:9::1/128"]);
            cluster.service_mut(0).access.allow = Some(ranges(&["198.51.100.7/32"]));
        });
        for (family, source) in [(&V4, "198.51.100.7"), (&V6, "2001:db8:9::1")] {
            for (transport, to) in [(SYN, 80), (Transport::Udp, 81)] {
                let fresh = family.packet(transport, 40_001, to).with(|p| p.source = ip(source)).bytes();
                assert_eq!(lab.counting(|lab| lab.xdp(&fresh)).1, denied, "{source} to {to}");
            }
        }
        let fresh = V4.packet(Transport::Udp, 40_001, 81).with(|p| p.source = ip("198.51.100.8")).bytes();
        assert_eq!(lab.counting(|lab| lab.xdp(&fresh)).1, BTreeMap::from([(Outcome::Routed, 1)]));
        lab.collect();
        let lines = lab.lines();
        let is_denied = |source| ip("198.51.100.0") <= source && source <= ip("198.51.100.7");
        assert!(lines.len() < before && lab.lines6().len() < before6, "their connections end");
        assert!(!lines.iter().any(|(_, _, line)| is_denied(line.tuple.source.to_ip())), "{lines:?}");
        // All of IPv6 is none of IPv4, which stands as mapped addresses in the same trie.
        lab.update(|cluster| {
            cluster.denied = ranges(&["::/0"]);
            cluster.service_mut(0).access = Access::default();
        });
        for (family, is_denied) in [(&V4, false), (&V6, true)] {
            let fresh = family.packet(SYN, 40_002, 80).bytes();
            let counted = lab.counting(|lab| lab.xdp(&fresh)).1;
            assert_eq!(counted == denied, is_denied, "{}: {counted:?}", family.client);
        }
        lab.update(|cluster| {
            cluster.denied.clear();
            cluster.service_mut(0).access = Access::default();
        });
        let (_, counted) = ask(lab, &V4, "198.51.100.7", SYN, 80);
        assert_eq!(counted.get(&Outcome::Denied), None);
    });
}

#[test]
fn frames_of_vlans_that_the_node_does_not_have_pass() {
    with_lab(services(), |lab| {
        let mut port = 41_000;
        let mut counted = |lab: &mut Lab, tags: &[(u16, u16)]| {
            port += 1;
            let packet = V4.packet(SYN, port, 80).with(|p| p.tags = tags.to_vec());
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&packet.bytes()));
            assert!(verdict.action == PASS, "{tags:?}");
            counted.into_keys().collect::<Vec<_>>()
        };
        lab.set_vlans([7, 63, 64, 4094]);
        // A tag that has a priority alone is of no VLAN; what the inner one is the owner of the outer one knows.
        let here = [
            &[][..],
            &[(0x8100, 0)],
            &[(0x8100, 0), (0x8100, 7)],
            &[(0x8100, 7)],
            &[(0x8100, 63)],
            &[(0x88a8, 64), (0x8100, 5)],
            &[(0x8100, 4094)],
        ];
        for tags in here {
            assert_ne!(counted(lab, tags), [Outcome::ForeignVlan], "{tags:?}");
        }
        let lines = lab.lines().len();
        assert_eq!(lines, here.len());
        for tags in [
            &[(0x8100, 1)][..],
            &[(0x8100, 8)],
            &[(0x8100, 62)],
            &[(0x8100, 0), (0x8100, 5)],
            &[(0x88a8, 65), (0x8100, 7)],
            &[(0x8100, 4095)],
        ] {
            assert_eq!(counted(lab, tags), [Outcome::ForeignVlan], "{tags:?}");
        }
        // One that goes.
        lab.set_vlans([]);
        assert_eq!(counted(lab, &[(0x8100, 7)]), [Outcome::ForeignVlan]);
        assert_eq!(lab.lines().len(), lines);
    });
}

#[test]
fn other_protocols_and_stray_fragments_pass() {
    with_lab(services(), |lab| {
        let (v4, v6) = (V4.packet(SYN, 40_000, 80), V6.packet(SYN, 40_000, 80));
        for number in [1, 2, 47, 50, 132] {
            lab.passes("another protocol", &patched(&v4, 23, &[number]), Outcome::OtherProtocol);
        }
        lab.passes("ICMPv6", &patched(&v6, 20, &[58]), Outcome::OtherProtocol);
        lab.passes("a later fragment", &patched(&v4, 20, &[0, 100]), Outcome::Fragment);
        // "Don't fragment" is no fragment.
        assert!(lab.xdp(&patched(&v4, 20, &[0x40, 0])).note.is_some());
        let fragment = v6.clone().with(|p| p.extensions = vec![(44, vec![0, 0, 8, 0, 0, 0, 1])]);
        lab.passes("a later IPv6 fragment", &fragment.bytes(), Outcome::Fragment);
        let hidden = v6.clone().with(|p| p.extensions = vec![(51, vec![0; 15])]);
        lab.passes("an authentication header", &hidden.bytes(), Outcome::ExtensionHeaders);
        let none = patched(&v6, 20, &[59]);
        lab.passes("no next header", &none, Outcome::ExtensionHeaders);
        let many = v6.clone().with(|p| p.extensions = vec![(60, vec![0; 7]); 6]);
        lab.passes("six extension headers", &many.bytes(), Outcome::ExtensionHeaders);
        let long = v6.clone().with(|p| p.extensions = vec![(60, [&[40][..], &[0; 326]].concat())]);
        lab.passes("a long extension header", &long.bytes(), Outcome::ExtensionHeaders);
    });
}

#[test]
fn malformed_packets_pass() {
    with_lab(services(), |lab| {
        let (v4, v6) = (V4.packet(SYN, 40_000, 80), V6.packet(SYN, 40_000, 80));
        lab.passes("version 5", &patched(&v4, 14, &[0x55]), Outcome::Malformed);
        lab.passes("a header of 16 bytes", &patched(&v4, 14, &[0x44]), Outcome::Malformed);
        lab.passes("a total length of 19", &patched(&v4, 16, &[0, 19]), Outcome::Malformed);
        lab.passes("longer than the frame", &patched(&v4, 16, &[1, 0]), Outcome::Malformed);
        lab.passes("a TCP header of 16 bytes", &patched(&v4, 46, &[0x40]), Outcome::Malformed);
        lab.passes("a TCP header past the end", &patched(&v4, 46, &[0xf0]), Outcome::Malformed);
        lab.passes("IPv6, version 4", &patched(&v6, 14, &[0x40]), Outcome::Malformed);
        lab.passes("IPv6, longer than the frame", &patched(&v6, 18, &[9, 9]), Outcome::Malformed);
        let udp = V4.packet(Transport::Udp, 40_000, 53);
        lab.passes("a UDP length of 7", &patched(&udp, 38, &[0, 7]), Outcome::Malformed);
        lab.passes("a UDP length past the end", &patched(&udp, 38, &[1, 0]), Outcome::Malformed);
    });
}

#[test]
fn a_local_task_gets_the_packet_by_a_note_and_keeps_its_connection() {
    with_lab(services(), |lab| {
        for family in [V4, V6] {
            let first = lab.delivered_to(&family.packet(SYN, 40_001, 80));
            // Sent again, or gone on: the same task.
            assert_eq!(lab.delivered_to(&family.packet(SYN, 40_001, 80)), first);
            assert_eq!(lab.delivered_to(&family.packet(ACK, 40_001, 80)), first);
            let second = lab.delivered_to(&family.packet(SYN, 40_002, 80));
            assert_ne!(first, second);
            assert_eq!(lab.delivered_to(&family.packet(ACK, 40_001, 80)), first);
            let third = lab.delivered_to(&family.packet(Transport::Udp, 40_001, 53));
            assert_eq!(lab.delivered_to(&family.packet(Transport::Udp, 40_001, 53)), third);
        }
        // IPv4 options, IPv6 extension headers and tags are stepped over.
        let options = V4.packet(ACK, 40_001, 80).with(|p| p.options = vec![1; 40]);
        lab.delivered_to(&options);
        let extensions = V6
            .packet(ACK, 40_001, 80)
            .with(|p| p.extensions = vec![(0, vec![0; 7]), (60, vec![0; 7]), (43, vec![0; 7])]);
        lab.delivered_to(&extensions);
        for tags in [vec![(0x8100, 7)], vec![(0x88a8, 8), (0x8100, 9)]] {
            lab.delivered_to(&V4.packet(ACK, 40_001, 80).with(|p| p.tags.clone_from(&tags)));
        }
        // A local stack's unfinished checksum is TC's business, which is where a local packet goes anyway.
        lab.delivered_to(&V4.packet(ACK, 40_001, 80).with(|p| p.checksum = Checksum::Unfinished));
    });
}

/// Requests to a routed task and its answers, through XDP.
#[test]
fn a_routed_task_sees_the_client() {
    with_lab(services(), |lab| {
        for family in [V4, V6] {
            for (open, go_on, answer) in
                [(SYN, ACK, SYN_ACK), (Transport::Udp, Transport::Udp, Transport::Udp)]
            {
                let (client, task) = ((ip(family.client), 40_003), (ip(family.routed), 8081));
                for transport in [open, go_on] {
                    let packet = family.packet(transport, 40_003, 81);
                    let expected = packet.forwarded(client, task, (NODE_MAC, HOP_MAC));
                    lab.becomes("a request", &packet, &expected, Outcome::Routed);
                }
                let back = family.answer(answer, (family.routed, 8081), client);
                let expected = back.forwarded((ip(family.listener), 81), client, (NODE_MAC, CLIENT_MAC));
                lab.becomes("an answer", &back, &expected, Outcome::Reply);
                let stray = family.answer(answer, (family.routed, 8081), (ip(family.client), 40_004));
                lab.passes("an answer to nobody", &stray.bytes(), Outcome::NotOurs);
            }
        }
        let options = V4.packet(ACK, 40_003, 81).with(|p| p.options = vec![1; 8]);
        let expected = options.forwarded((ip(V4.client), 40_003), (ip(V4.routed), 8081), (NODE_MAC, HOP_MAC));
        lab.becomes("with IPv4 options", &options, &expected, Outcome::Routed);
        let extended = V6.packet(ACK, 40_003, 81).with(|p| p.extensions = vec![(60, vec![0; 7])]);
        let expected =
            extended.forwarded((ip(V6.client), 40_003), (ip(V6.routed), 8081), (NODE_MAC, HOP_MAC));
        lab.becomes("with an extension header", &extended, &expected, Outcome::Routed);
        lab.passes(
            "expired on the way",
            &V4.packet(ACK, 40_003, 81).with(|p| p.hops = 1).bytes(),
            Outcome::TtlExpired,
        );
    });
}

#[test]
fn a_snat_task_sees_the_node_and_its_answers_find_the_client() {
    with_lab(services(), |lab| {
        for family in [V4, V6] {
            for (open, answer) in [(SYN, SYN_ACK), (Transport::Udp, Transport::Udp)] {
                // A port outside the host's own range is kept.
                let (client, own, task) =
                    ((ip(family.client), 2_345), (ip(family.listener), 2_345), (ip(family.snat), 8082));
                let packet = family.packet(open, 2_345, 82);
                lab.becomes(
                    "a request",
                    &packet,
                    &packet.forwarded(own, task, (NODE_MAC, HOP_MAC)),
                    Outcome::Snat,
                );
                lab.becomes(
                    "once more",
                    &packet,
                    &packet.forwarded(own, task, (NODE_MAC, HOP_MAC)),
                    Outcome::Snat,
                );
                let back = family.answer(answer, (family.snat, 8082), own);
                let expected = back.forwarded((ip(family.listener), 82), client, (NODE_MAC, CLIENT_MAC));
                lab.becomes("an answer", &back, &expected, Outcome::Reply);
            }
        }
    });
}

#[test]
fn snat_ports_are_never_shared_and_run_out_with_a_name() {
    with_lab(services(), |lab| {
        lab.configure(|config| config.snat_ports = [20_000, 20_003]);
        let mut seen = Vec::new();
        let mut refused = 0;
        // Ports of the host's own range are never taken; two clients with one port neither.
        for client in 0..40_u8 {
            let address = ip(&format!("198.51.100.{}", 100 + client));
            let packet = V4.packet(SYN, 40_000, 82).with(|p| p.source = address);
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&packet.bytes()));
            if verdict.action == TX {
                assert_checksums(&verdict.frame);
                let port = u16::from_be_bytes([verdict.frame[34], verdict.frame[35]]);
                assert!((20_000..=20_003).contains(&port), "{port}");
                assert!(!seen.contains(&port), "port {port} was given twice");
                seen.push(port);
            } else {
                assert_eq!((verdict.action, verdict.frame), (PASS, packet.bytes()));
                assert_eq!(counted, BTreeMap::from([(Outcome::SnatPortsExhausted, 1)]));
                refused += 1;
            }
        }
        assert_eq!((seen.len(), refused), (4, 36));
        let service =
            lab.datapath().tables().services.iter().find(|(_, s)| s.name == "snat").map(|(i, _)| *i);
        assert_eq!(lab.counters().services[&service.expect("the service")].refused, 36);
    });
}

#[test]
fn a_snat_port_nobody_uses_goes_to_the_next_and_its_late_request_finds_no_connection() {
    with_lab(services(), |lab| {
        lab.configure(|config| config.snat_ports = [20_000, 20_000]);
        let (first, second) =
            (V4.packet(SYN, 40_000, 82), V4.packet(SYN, 40_000, 82).with(|p| p.source = ip("198.51.100.8")));
        assert_eq!(lab.xdp(&first.bytes()).action, TX);
        lab.passes("the port is in use", &second.bytes(), Outcome::SnatPortsExhausted);
        // No second lasts a jiffy: whatever is older than now is old enough.
        lab.configure(|config| config.jiffies_per_second = 0);
        eventually("the port is free", || lab.xdp(&second.bytes()).action == TX);
        lab.configure(|config| config.jiffies_per_second = 250);
        // The first client's connection went with its port.
        let late = V4.packet(ACK, 40_000, 82);
        lab.passes("its connection is gone", &late.bytes(), Outcome::NoConnection);
        assert_eq!(lab.xdp(&second.bytes()).action, TX);
    });
}

#[test]
fn a_reply_to_a_port_whose_connection_is_gone_does_not_go_by_the_host() {
    with_lab(services(), |lab| {
        let own = (ip(V4.listener), 2_345);
        assert_eq!(lab.xdp(&V4.packet(SYN, 2_345, 82).bytes()).action, TX);
        let back = V4.answer(SYN_ACK, (V4.snat, 8082), own);
        assert_eq!(lab.evict(|control, _| !control.has(ALIAS)), 1);
        let (verdict, counted) = lab.counting(|lab| lab.xdp(&back.bytes()));
        assert_eq!((verdict.action, counted), (DROP, BTreeMap::from([(Outcome::StaleAlias, 1)])));
        // What is left of it goes too, and the port is another's.
        assert_eq!(lab.collect().0.removed, 1);
        lab.passes("nothing is known of it", &back.bytes(), Outcome::NotOurs);
        assert_eq!(lab.xdp(&V4.packet(SYN, 2_345, 82).bytes()).action, TX);
        assert_eq!(lab.xdp(&back.bytes()).action, TX);
    });
}

#[test]
fn udp_checksums_of_zero_stay_and_are_never_made() {
    with_lab(services(), |lab| {
        let none = V4.packet(Transport::Udp, 40_005, 81).with(|p| p.checksum = Checksum::None);
        let expected = none.forwarded((ip(V4.client), 40_005), (ip(V4.routed), 8081), (NODE_MAC, HOP_MAC));
        lab.becomes("no checksum", &none, &expected, Outcome::Routed);
        let none = V6.packet(Transport::Udp, 40_005, 81).with(|p| p.checksum = Checksum::None);
        let expected = none.forwarded((ip(V6.client), 40_005), (ip(V6.routed), 8081), (NODE_MAC, HOP_MAC));
        assert_eq!(lab.xdp(&none.bytes()).frame, expected.bytes());
        // Among all values of two payload bytes is one whose sum comes to zero after the rewrite.
        let mut met = 0;
        for word in 0..=u16::MAX {
            let packet =
                V4.packet(Transport::Udp, 40_005, 81).with(|p| p.payload = word.to_be_bytes().to_vec());
            let expected =
                packet.forwarded((ip(V4.client), 40_005), (ip(V4.routed), 8081), (NODE_MAC, HOP_MAC));
            let bytes = expected.bytes();
            if bytes[40..42] == [0xff, 0xff] {
                lab.becomes("a sum of zero", &packet, &expected, Outcome::Routed);
                met += 1;
            }
        }
        assert!(met > 0);
    });
}

#[test]
fn what_xdp_cannot_send_is_left_to_tc_uncounted() {
    with_lab(services(), |lab| {
        let decide = |lab: &Lab, what: &str, packet: &Packet| {
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&packet.bytes()));
            assert_eq!((verdict.action, verdict.note), (PASS, Some(META_TC_DECIDES)), "{what}");
            assert_eq!(verdict.frame, packet.bytes(), "{what}");
            assert_eq!(counted, BTreeMap::new(), "{what}");
        };
        for family in [V4, V6] {
            let packet = family.packet(SYN, 40_006, 81);
            let unfinished = packet.clone().with(|p| p.checksum = Checksum::Unfinished);
            decide(lab, "an unfinished checksum", &unfinished);
            decide(lab, "a tag", &packet.clone().with(|p| p.tags = vec![(0x8100, 7)]));
        }
        lab.configure(|config| config.flags = PARTIAL_CHECKSUMS);
        decide(lab, "an uplink that does not transmit", &V4.packet(SYN, 40_006, 81));
        lab.configure(|config| config.flags = XDP_TRANSMITS);
        // On a device that only ever gets finished sums nothing is handed over.
        let unfinished = V4.packet(ACK, 40_006, 81).with(|p| p.checksum = Checksum::Unfinished);
        assert_eq!(lab.xdp(&unfinished.bytes()).action, TX);
        // Generic XDP decides and leaves no note, for none would arrive.
        lab.configure(|config| config.flags = XDP_GENERIC);
        for port in [80, 81] {
            let packet = V4.packet(SYN, 40_009, port);
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&packet.bytes()));
            assert_eq!((verdict.action, verdict.note, verdict.frame), (PASS, None, packet.bytes()));
            assert_eq!(counted, BTreeMap::new());
            let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&packet.bytes()));
            assert_eq!((verdict.action, counted.values().sum::<u64>()), (REDIRECT, 1));
        }
    });
}

#[test]
fn tc_alone_does_all_of_it() {
    with_lab(services(), |lab| {
        lab.configure(|config| config.flags = TC_ALONE);
        let becomes = |lab: &Lab, what: &str, packet: &Packet, expected: &Packet, outcome| {
            let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&packet.bytes()));
            assert_eq!(verdict.frame, expected.bytes(), "{what}");
            assert_checksums(&verdict.frame);
            assert_eq!(verdict.action, REDIRECT, "{what}");
            assert_eq!(counted, BTreeMap::from([(outcome, 1)]), "{what}");
        };
        // Both families take turns by one cursor.
        for (family, local) in [(V4, V4.local), (V6, "fd18::12")] {
            for (open, answer) in [(SYN, SYN_ACK), (Transport::Udp, Transport::Udp)] {
                let client = (ip(family.client), 2_500);
                let packet = family.packet(open, 2_500, 81);
                let expected = packet.forwarded(client, (ip(family.routed), 8081), (NODE_MAC, HOP_MAC));
                becomes(lab, "routed", &packet, &expected, Outcome::Routed);
                let back = family.answer(answer, (family.routed, 8081), client);
                let expected = back.forwarded((ip(family.listener), 81), client, (NODE_MAC, CLIENT_MAC));
                becomes(lab, "a routed answer", &back, &expected, Outcome::Reply);
                let packet = family.packet(open, 2_500, 82);
                let own = (ip(family.listener), 2_500);
                let expected = packet.forwarded(own, (ip(family.snat), 8082), (NODE_MAC, HOP_MAC));
                becomes(lab, "snat", &packet, &expected, Outcome::Snat);
                let back = family.answer(answer, (family.snat, 8082), own);
                let expected = back.forwarded((ip(family.listener), 82), client, (NODE_MAC, CLIENT_MAC));
                becomes(lab, "a snat answer", &back, &expected, Outcome::Reply);
            }
            let packet = family.packet(SYN, 2_501, 80);
            let expected =
                packet.forwarded((ip(family.client), 2_501), (ip(local), 8080), (BRIDGE_MAC, TASK_MAC));
            becomes(lab, "local", &packet, &expected, Outcome::Local);
            // Tags stay on the uplink's link.
            let tagged = packet.clone().with(|p| p.tags = vec![(0x88a8, 8), (0x8100, 9)]);
            becomes(lab, "local, tagged", &tagged, &expected, Outcome::Local);
        }
        let frame = V4.packet(SYN, 2_502, 22).bytes();
        let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&frame));
        assert_eq!((verdict.action, verdict.frame), (UNSPEC, frame));
        assert_eq!(counted, BTreeMap::from([(Outcome::NotOurs, 1)]));
    });
}

#[test]
fn xdp_that_comes_takes_over_packet_by_packet() {
    with_lab(services(), |lab| {
        let flags = lab.datapath().config().flags;
        let (ours, other) = (V4.packet(SYN, 2_600, 81), V4.packet(SYN, 2_600, 22));
        let delivered = V4.packet(SYN, 2_601, 80);
        // It is there, and TC does all of it yet.
        lab.configure(|config| config.flags = flags | TC_ALONE);
        for packet in [&ours, &other] {
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&packet.bytes()));
            assert_eq!((verdict.action, verdict.note, verdict.frame), (PASS, None, packet.bytes()));
            assert_eq!(counted, BTreeMap::new());
        }
        // It decides, and what the device took in before comes to TC without a note.
        lab.configure(|config| config.flags = flags | XDP_IS_NEW);
        let in_tc = |lab: &Lab, packet: &Packet| {
            let (verdict, counted) = lab.counting(|lab| lab.uplink_tc(&packet.bytes()));
            (verdict.action, counted)
        };
        assert_eq!(in_tc(lab, &delivered), (REDIRECT, BTreeMap::from([(Outcome::Local, 1)])));
        assert_eq!(in_tc(lab, &ours), (REDIRECT, BTreeMap::from([(Outcome::Routed, 1)])));
        lab.passes("another port", &other.bytes(), Outcome::NotOurs);
        assert_eq!(in_tc(lab, &other), (UNSPEC, BTreeMap::new()), "XDP has counted it");
        // Nothing without a note is on its way any more.
        lab.configure(|config| config.flags = flags);
        assert_eq!(in_tc(lab, &delivered), (UNSPEC, BTreeMap::new()));
    });
}

#[test]
fn a_tasks_answer_is_turned_around_on_its_veth_alone() {
    with_lab(services(), |lab| {
        for (family, local) in [(V4, V4.local), (V6, V6.local)] {
            let client = (ip(family.client), 40_007);
            let request = family.packet(SYN, 40_007, 80).with(|p| p.tags = vec![(0x8100, 5)]);
            let to = lab.delivered_to(&request);
            let from = if to == "web.1" {
                local
            } else if family.client == V4.client {
                "172.18.0.12"
            } else {
                "fd18::12"
            };
            let answer =
                Packet::new(SYN_ACK, (ip(from), 8080), client).with(|p| p.macs = (TASK_MAC, BRIDGE_MAC));
            // The client's tag is put on too, beside the bytes: the device writes it.
            let expected = answer.forwarded((ip(family.listener), 80), client, (NODE_MAC, CLIENT_MAC));
            let (verdict, counted) = lab.counting(|lab| lab.task_tc(&answer.bytes()));
            assert_eq!((verdict.action, verdict.frame), (REDIRECT, expected.bytes()));
            assert_eq!(counted, BTreeMap::from([(Outcome::Reply, 1)]));
            // From the uplink it is not the task's, whoever sent it.
            lab.passes("a task's address from the wire", &answer.bytes(), Outcome::NotOurs);
            // From another interface, of another port, to another client: the task's own traffic.
            let untouched = |frame: &[u8], ifindex| {
                let (verdict, counted) = lab.counting(|lab| lab.tc("task_tc", frame, ifindex));
                assert_eq!((verdict.action, verdict.frame.as_slice()), (UNSPEC, frame));
                assert_eq!(counted, BTreeMap::new());
            };
            untouched(&answer.bytes(), lab.uplink);
            untouched(&answer.clone().with(|p| p.source_port = 8081).bytes(), lab.veth);
            untouched(&answer.clone().with(|p| p.destination_port = 40_008).bytes(), lab.veth);
            untouched(&answer.clone().with(|p| p.hops = 1).bytes(), lab.veth);
        }
    });
}

#[test]
fn answers_to_tagged_clients_get_their_tags_from_tc() {
    with_lab(services(), |lab| {
        for (port, own) in [(81, ip(V4.client)), (82, ip(V4.listener))] {
            let request = V4.packet(SYN, 2_600, port).with(|p| p.tags = vec![(0x8100, 5)]);
            assert_eq!(lab.xdp(&request.bytes()).note, Some(META_TC_DECIDES));
            let task = if port == 81 { V4.routed } else { V4.snat };
            let answer = V4.answer(SYN_ACK, (task, 8000 + port), (own, 2_600));
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&answer.bytes()));
            assert_eq!((verdict.action, verdict.note), (PASS, Some(META_TC_DECIDES)));
            assert_eq!(counted, BTreeMap::new());
        }
    });
}

#[test]
fn rotation_is_exact_with_many_clients_at_once() {
    let mut services = services();
    let tasks =
        (1..=5).map(|slot| task(&format!("five.{slot}"), true, Via::Snat, &[&format!("172.18.1.{slot}")]));
    services.push(service("five", &["90:8090"], tasks.collect()));
    with_lab(services, |lab| {
        let order: Vec<String> =
            (0..10).map(|port| lab.delivered_to(&V4.packet(SYN, 41_000 + port, 90))).collect();
        assert_eq!(order[..5], ["five.1", "five.2", "five.3", "five.4", "five.5"]);
        assert_eq!(order[..5], order[5..]);
        let counts: Vec<AtomicU32> = (0..6).map(|_| AtomicU32::new(0)).collect();
        let netns = std::fs::File::open("/proc/thread-self/ns/net").expect("the namespace");
        std::thread::scope(|scope| {
            for thread in 0..8_u16 {
                let (lab, counts, netns) = (&*lab, &counts, &netns);
                scope.spawn(move || {
                    nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)
                        .expect("enter the namespace");
                    for port in 0..500 {
                        let frame = V4.packet(SYN, 42_000 + thread * 500 + port, 90).bytes();
                        let task = lab.task_of(lab.xdp(&frame).note.expect("a note"));
                        let slot: usize = task["five.".len()..].parse().expect("a slot");
                        counts[slot].fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        let counts: Vec<u32> = counts.into_iter().skip(1).map(AtomicU32::into_inner).collect();
        assert_eq!(counts, [800; 5]);
    });
}

#[test]
fn ports_of_one_service_rotate_apart() {
    with_lab(services(), |lab| {
        for port in 0..4 {
            let tcp = lab.delivered_to(&V4.packet(SYN, 43_000 + port, 80));
            let udp = lab.delivered_to(&V4.packet(Transport::Udp, 43_000 + port, 53));
            assert_eq!(tcp, udp);
        }
    });
}

#[test]
fn one_client_port_to_two_listeners_gets_two_tasks() {
    with_lab(services(), |lab| {
        let first = lab.delivered_to(&V4.packet(SYN, 44_000, 86));
        // Both cursors stand where they would choose the same task.
        let second = lab.delivered_to(&V4.packet(SYN, 44_000, 87));
        assert_ne!(first, second);
        lab.update(|cluster| {
            let twin = cluster.services.iter().position(|s| s.name == "twin").expect("the service");
            cluster.service_mut(twin).tasks.truncate(1);
        });
        let only = lab.delivered_to(&V4.packet(SYN, 44_001, 86));
        assert_eq!(only, "twin.1");
        // Where no other task is left the task sees another port of the client.
        let (second, counted) = lab.counting(|lab| lab.xdp(&V4.packet(SYN, 44_001, 87).bytes()));
        assert_eq!(counted, BTreeMap::from([(Outcome::Local, 1)]));
        assert_eq!(lab.task_of(second.note.expect("a note")), "twin.1");
        assert!(second.port.is_some_and(|port| port != 44_001 && port >= 1_024), "{second:?}");
    });
}

#[test]
fn a_syn_on_a_closing_connection_starts_anew() {
    with_lab(services(), |lab| {
        for (ending, port) in [(FIN, 45_000), (RST, 45_001)] {
            let first = lab.delivered_to(&V4.packet(SYN, port, 80));
            lab.delivered_to(&V4.packet(ending, port, 80).at(1_001, 0));
            // What follows the end still goes to the task.
            assert_eq!(lab.delivered_to(&V4.packet(ACK, port, 80)), first);
            assert_ne!(lab.delivered_to(&V4.packet(SYN, port, 80)), first);
        }
    });
}

#[test]
fn draining_keeps_connections_and_a_task_that_is_gone_ends_them() {
    with_lab(services(), |lab| {
        let state = |lab: &mut Lab, state| {
            lab.update(|cluster| cluster.service_mut(0).tasks[0].state = state);
        };
        let (tcp, udp) = (V4.packet(SYN, 46_000, 80), V4.packet(Transport::Udp, 46_000, 53));
        assert_eq!(lab.delivered_to(&tcp), "web.1");
        assert_eq!(lab.delivered_to(&udp), "web.1");
        state(lab, TaskState::Draining);
        assert_eq!(lab.delivered_to(&V4.packet(ACK, 46_000, 80)), "web.1");
        assert_eq!(lab.delivered_to(&udp), "web.1");
        for port in 0..4 {
            assert_eq!(lab.delivered_to(&V4.packet(SYN, 46_100 + port, 80)), "web.2");
        }
        lab.update(|cluster| drop(cluster.service_mut(0).tasks.remove(0)));
        let gone = |lab: &Lab, packet: &Packet| {
            let (verdict, counted) = lab.counting(|lab| lab.xdp(&packet.bytes()));
            assert_eq!((verdict.action, counted), (TX, BTreeMap::from([(Outcome::Reset, 1)])));
        };
        gone(lab, &V4.packet(ACK, 46_000, 80));
        // A datagram finds another task.
        assert_eq!(lab.delivered_to(&udp), "web.2");
        assert_eq!(lab.delivered_to(&tcp), "web.2");
        // Its number in other hands does not bring the connection back.
        assert_eq!(lab.delivered_to(&V6.packet(SYN, 46_001, 80)), "web.2");
        lab.update(|cluster| cluster.service_mut(0).tasks.clear());
        lab.passes("scaled to zero", &V4.packet(SYN, 46_002, 80).bytes(), Outcome::NoBackend);
        gone(lab, &V6.packet(ACK, 46_001, 80));
    });
}

#[test]
fn a_task_without_a_way_gets_nothing() {
    with_lab(services(), |lab| {
        assert_eq!(lab.delivered_to(&V4.packet(SYN, 47_000, 80)), "web.1");
        lab.update(|cluster| cluster.service_mut(0).tasks[0].state = TaskState::Starting);
        // Its connection waits: the host would answer with a reset, so the client is left to send again.
        let (verdict, counted) = lab.counting(|lab| lab.xdp(&V4.packet(ACK, 47_000, 80).bytes()));
        assert_eq!((verdict.action, counted), (DROP, BTreeMap::from([(Outcome::BackendUnreachable, 1)])));
        lab.update(|cluster| cluster.service_mut(0).tasks[0].state = TaskState::Running);
        assert_eq!(lab.delivered_to(&V4.packet(ACK, 47_000, 80)), "web.1");
        lab.update(|cluster| cluster.service_mut(0).tasks[0].state = TaskState::Starting);
        assert_eq!(lab.delivered_to(&V4.packet(SYN, 47_000, 80)), "web.2");
    });
}

#[test]
fn a_way_by_tc_is_left_to_tc() {
    with_lab(services(), |lab| {
        lab.next_hop_flags = VIA_TC;
        lab.update(|_| {});
        let packet = V4.packet(SYN, 48_000, 81);
        let (verdict, counted) = lab.counting(|lab| lab.xdp(&packet.bytes()));
        assert_eq!(
            (verdict.action, verdict.note, verdict.frame),
            (PASS, Some(META_TC_DECIDES), packet.bytes())
        );
        assert_eq!(counted, BTreeMap::new());
        // The answer comes in by the uplink, and XDP can send it on.
        let client = (ip(V4.client), 48_000);
        let back = V4.answer(SYN_ACK, (V4.routed, 8081), client);
        let expected = back.forwarded((ip(V4.listener), 81), client, (NODE_MAC, CLIENT_MAC));
        lab.becomes("an answer", &back, &expected, Outcome::Reply);
    });
}

/// A pseudo-random sequence that is the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn truncated_packets_of_every_length_pass_untouched() {
    with_lab(services(), |lab| {
        let tagged = |packet: Packet| packet.with(|p| p.tags = vec![(0x88a8, 1), (0x8100, 2)]);
        let packets = [
            V4.packet(SYN, 49_000, 80),
            V6.packet(SYN, 49_000, 81),
            V4.packet(Transport::Udp, 49_000, 82),
            tagged(V4.packet(SYN, 49_000, 82)),
            V4.packet(SYN, 49_000, 81).with(|p| p.options = vec![1; 40]),
            V6.packet(SYN, 49_000, 82).with(|p| p.extensions = vec![(0, vec![0; 7]), (60, vec![0; 7])]),
        ];
        for packet in packets {
            let bytes = packet.bytes();
            for length in 14..bytes.len() {
                let (verdict, counted) = lab.counting(|lab| lab.xdp(&bytes[..length]));
                assert_eq!(
                    (verdict.action, verdict.frame.as_slice(), verdict.note),
                    (PASS, &bytes[..length], None)
                );
                assert_eq!(counted.values().sum::<u64>(), 1, "{length} bytes of {packet:?}");
                assert!(counted.keys().all(|outcome| !outcome.is_forwarded()));
            }
        }
    });
}

#[test]
fn random_bytes_change_nothing_and_are_all_counted() {
    with_lab(services(), |lab| {
        let mut random = Random(0x1234_5678_9abc_def1);
        let seeds: Vec<Vec<u8>> = [V4, V6]
            .iter()
            .flat_map(|f| [f.packet(ACK, 50_000, 80), f.packet(ACK, 50_000, 82)])
            .map(|p| p.bytes())
            .collect();
        let rounds = 40_000;
        let ((), counted) = lab.counting(|lab| {
            for round in 0..rounds {
                let mut frame = seeds[round % seeds.len()].clone();
                if round % 3 == 0 {
                    // Nothing but noise.
                    let length = 14 + (random.next() % 200) as usize;
                    frame = (0..length).map(|_| random.next() as u8).collect();
                } else {
                    // A packet with a few bytes wrong; never one that opens a connection.
                    for _ in 0..1 + random.next() % 6 {
                        let at = (random.next() as usize) % frame.len();
                        frame[at] = random.next() as u8;
                    }
                    let udp = frame.get(23) == Some(&17) || frame.get(20) == Some(&17);
                    let syn = [47, 67].iter().any(|at| frame.get(*at).is_some_and(|flags| flags & 2 != 0));
                    if udp || syn {
                        continue;
                    }
                }
                let verdict = lab.xdp(&frame);
                assert_eq!((verdict.action, &verdict.frame), (PASS, &frame), "round {round}");
            }
        });
        assert!(counted.keys().all(|outcome| !outcome.is_forwarded()), "{counted:?}");
        assert!(counted.values().sum::<u64>() > 30_000, "{counted:?}");
    });
}
