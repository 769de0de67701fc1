//! What nodes say to each other: a client's packet, or a task's reply, whole inside Geneve (RFC 8926).
//!
//! ```text
//! Ethernet │ IPv4 or IPv6 │ UDP │ Geneve │ option: to whom │ the packet as the client sent it
//!          └──────────── 60 or 80 bytes ────────────────────┘
//! ```
//!
//! The inner packet starts with its IP header. The one option says which task a request is for, or a reply from, by an
//! address that is unique in the cluster and its target port. All fields on the wire are in network order, but cookies and
//! names, which are bytes.
//!
//! A node takes packets from the addresses of other nodes alone, and anybody can write such an address. So each pair of nodes
//! that know each other's keys has a cookie for either direction, as L2TPv3 has (RFC 3931, 4.1): who cannot read what they send
//! to each other does not know it. Nodes without keys speak version 1, which has none.

use core::net::IpAddr;

use crate::{
    net::{Address, Be16, V4, V6, Wide},
    pod,
};

/// The port that IANA gave to Geneve.
pub const DEFAULT_PORT: u16 = 6081;

/// Option class, from the range for experiments (RFC 8926, 7).
pub const OPTION_CLASS: Be16 = Be16::new(0xfff5);
/// Type of our option when the packet goes to the task it names. The highest bit is set: who does not know the
/// option must drop the packet (RFC 8926, 3.5.1).
pub const TO_TASK: u8 = 0x81;
/// Type of our option when the packet is a task's reply, which the node emits to the client; address and port are the
/// task's if [`NAMES_TASK`] is set, else they have no meaning.
pub const TO_CLIENT: u8 = 0x82;
/// Type of our option in a probe: the datapath that receives it sends it back at once. There is no packet inside, address
/// and port are the prober's to choose.
pub const PROBE: u8 = 0x83;
/// Type of our option in a probe that comes back; the host's, whose controller waits for it.
pub const PROBE_ANSWER: u8 = 0x84;
/// Version of the option's data without a cookie: the whole address of the task.
pub const VERSION: u8 = 1;
/// Version of the option's data with a cookie, and the task's [`Name`].
pub const VERSION_KEYED: u8 = 2;
/// Flag of [`TO_TASK`]: the task's node sends answers straight to the client.
pub const RETURN_DIRECT: u8 = 1;
/// Flag of [`TO_CLIENT`]: the option names the task that answers, as a request to it would. Who sends answers without it is
/// an agent that knew no names for them.
pub const NAMES_TASK: u8 = 2;

/// Options are counted in words of four bytes.
const OPTION_WORDS: u8 = 6;
/// Geneve version 0 and the length of our option.
pub const VERSION_AND_LENGTH: u8 = OPTION_WORDS;
/// Critical options are present (the C bit).
pub const CRITICAL: u8 = 0x40;

/// UDP, Geneve and our option, as they follow the outer IP header.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// UDP source port: the connection's hash, for queues and equal-cost paths.
    pub source_port: Be16,
    /// UDP destination port.
    pub destination_port: Be16,
    /// UDP length.
    pub length: Be16,
    /// UDP checksum: none. The inner packet has its own (RFC 6935 and RFC 6936 for IPv6).
    pub checksum: u16,
    /// [`VERSION_AND_LENGTH`].
    pub version_and_length: u8,
    /// [`CRITICAL`].
    pub flags: u8,
    /// EtherType of the inner packet.
    pub protocol: Be16,
    /// Virtual network: zero, but in a [`PROBE_ANSWER`] what the answering node's uplink lets pass ([`network_of`]).
    pub network: u32,
    /// [`OPTION_CLASS`].
    pub class: Be16,
    /// [`TO_TASK`], [`TO_CLIENT`], [`PROBE`] or [`PROBE_ANSWER`].
    pub kind: u8,
    /// Words of data: five.
    pub words: u8,
    /// [`VERSION`] or [`VERSION_KEYED`].
    pub version: u8,
    /// [`RETURN_DIRECT`], [`NAMES_TASK`].
    pub option_flags: u8,
    /// The task's target port.
    pub port: Be16,
    /// [`VERSION`]: the task's address in the cluster; IPv4 as an IPv4-mapped address (RFC 4291, 2.5.5.2).
    /// [`VERSION_KEYED`]: the cookie, the less significant bytes first, then the task's [`Name`].
    pub address: Wide,
}

/// What a tunnel packet calls a task by: its address in the cluster if that is IPv4, as the last eight bytes of the IPv4-mapped
/// one; of an IPv6 address a hash that leaves no two addresses of a network the same.
pub type Name = [u32; 2];

/// The name of a task by its address in the cluster, IPv4 as an IPv4-mapped address.
#[inline(always)]
pub const fn name(address: &Wide) -> Name {
    /// Odd, so that different networks stay different: 2⁶⁴ by the golden ratio.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    on_wire(number(address[2], address[3]) ^ number(address[0], address[1]).wrapping_mul(SPREAD))
}

/// The words of a number of eight bytes, the less significant bytes first.
#[inline(always)]
pub const fn on_wire(number: u64) -> [u32; 2] {
    [(number as u32).to_le(), ((number >> 32) as u32).to_le()]
}

/// The number that [`on_wire`] makes these of.
#[inline(always)]
const fn number(first: u32, second: u32) -> u64 {
    u32::from_le(first) as u64 | (u32::from_le(second) as u64) << 32
}

/// The cookie that the option has; zero if it has none, which is no node's.
#[inline(always)]
pub const fn cookie(version: u8, address: &Wide) -> u64 {
    if version == VERSION_KEYED { number(address[0], address[1]) } else { 0 }
}

/// By what the packets of a peer are known, by the peer's number. Only the last two are written by programs.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct PeerKey {
    /// The cookie of its packets; zero while none is known.
    pub current: u64,
    /// The cookie that they had before; zero if they had none.
    pub previous: u64,
    /// Packets that were refused for want of the right one.
    pub refused: u64,
    /// The last cookie that was current when a packet with it came: the current one once the peer was seen using it. One word, so
    /// that who writes it late proves no other.
    pub seen: u64,
}

/// What a cookie says of a packet.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Said {
    /// Another sent it.
    Forged = 0,
    /// The peer may have sent it.
    Possible = 1,
    /// Nobody but the peer can have sent it.
    Known = 2,
}

impl PeerKey {
    /// What this cookie, or none (zero), says: what was taken before is taken until the peer was seen using the current cookie. It
    /// may not have heard of it, and does not before it knows this node's key.
    #[inline(always)]
    pub const fn judge(&self, cookie: u64) -> Said {
        if cookie != 0 && cookie == self.current {
            Said::Known
        } else if self.current != 0 && self.is_proven() {
            Said::Forged
        } else if cookie != 0 && cookie == self.previous {
            Said::Known
        } else if self.previous == 0 {
            Said::Possible
        } else {
            Said::Forged
        }
    }

    /// Whether the peer was seen using the current cookie.
    #[inline(always)]
    pub const fn is_proven(&self) -> bool {
        self.seen == self.current
    }

    /// The same for a peer whose packets are to have this cookie from now on; zero if they are to have none.
    #[must_use]
    pub const fn renewed(self, cookie: u64) -> Self {
        if cookie == self.current {
            return self;
        }
        let known = if self.is_proven() { self.current } else { self.previous };
        let previous = if cookie == 0 { 0 } else { known };
        Self { current: cookie, previous, ..self }
    }
}

/// The virtual network of a [`PROBE_ANSWER`] that says how long a packet the node's uplink lets pass, in bytes: its replies to clients
/// leave by that, wherever they come from. No more than [`Peer::mtu`] has room for. Three bytes, then one that is reserved
/// (RFC 8926, 3.4).
#[inline(always)]
pub const fn network_of(uplink_mtu: u32) -> u32 {
    let told = if uplink_mtu < u16::MAX as u32 { uplink_mtu } else { u16::MAX as u32 };
    (told << 8).to_be()
}

/// What [`network_of`] was made of; `None` of zero, which agents say that know no such field.
pub const fn uplink_mtu(network: u32) -> Option<u32> {
    match u32::from_be(network) >> 8 {
        0 => None,
        told => Some(told),
    }
}

/// Words of data in our option.
pub const DATA_WORDS: u8 = OPTION_WORDS - 1;

/// Bytes that the tunnel adds to a packet, by family of the outer header.
#[inline(always)]
pub const fn overhead(outer_v4: bool) -> u16 {
    size_of::<Header>() as u16 + if outer_v4 { 20 } else { 40 }
}

/// A node as the datapath reaches it: one cache line, by the node's number.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Peer {
    /// Its address; IPv4 in the first word.
    pub address: Wide,
    /// Own address that reaches it; IPv4 in the first word.
    pub source: Wide,
    /// Hardware address of the node or of the next hop to it.
    pub mac: [u8; 6],
    /// Largest packet that may be sent there, in bytes: what the way there is known to let pass, and what comes out of the tunnel the
    /// node's uplink.
    pub mtu: u16,
    /// Hardware address of the interface that leads there.
    pub source_mac: [u8; 6],
    /// Zero.
    pub _pad: u16,
    /// Interface that leads there.
    pub ifindex: u32,
    /// Family of both addresses, 4 or 6.
    pub family: u8,
    /// 1 if a way leads to it.
    pub reachable: u8,
    /// Zero.
    pub _pad2: u16,
    /// The cookie of packets to it; zero if they are to have none.
    pub cookie: u64,
}

/// The number of this node itself in the table of nodes' addresses.
pub const SELF: u32 = 0;

/// A task of this node as peers name it, and the protocol and family of the packets they send.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash, PartialOrd, Ord)]
pub struct TaskKey {
    /// Its name.
    pub name: Name,
    /// Its target port, network order.
    pub port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// Family of the packets, 4 or 6.
    pub family: u8,
}

/// An address as the wire and the tables of nodes and tasks have it: IPv4 as an IPv4-mapped address.
pub fn mapped(address: IpAddr) -> Wide {
    match address {
        IpAddr::V4(v4) => V4::from(v4).to_mapped(),
        IpAddr::V6(v6) => V6::from(v6).to_mapped(),
    }
}

/// The address that [`mapped`] was made of.
pub fn unmapped(wide: Wide) -> IpAddr {
    V6::from_wide(wide).to_ip().to_canonical()
}

const _: () = {
    assert!(size_of::<Header>() == 40 && align_of::<Header>() == 4);
    assert!(size_of::<Peer>() == 64);
    assert!(size_of::<TaskKey>() == 12 && align_of::<TaskKey>() == 4);
    assert!(size_of::<PeerKey>() == 32);
    assert!(size_of::<Header>() == 8 + 8 + OPTION_WORDS as usize * 4);
};

pod!(Peer, PeerKey, TaskKey);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_mapped_and_come_back() {
        for text in ["10.0.0.7", "2001:db8::7"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(unmapped(mapped(ip)), ip);
        }
        let IpAddr::V6(v6) = "::ffff:10.0.0.7".parse::<IpAddr>().unwrap() else { panic!() };
        assert_eq!(V6::from(v6).to_wide(), mapped("10.0.0.7".parse().unwrap()));
    }

    #[test]
    fn names_are_the_same_on_all_nodes_and_differ_between_tasks() {
        let of = |text: &str| name(&mapped(text.parse().unwrap()));
        let bytes = |text: &str| -> Vec<u8> { of(text).into_iter().flat_map(u32::to_ne_bytes).collect() };
        assert_eq!(bytes("10.0.0.7"), [0, 0, 0xff, 0xff, 10, 0, 0, 7]);
        // Not from this code, so that it cannot change by accident: agents of other versions count on it.
        assert_eq!(bytes("2001:db8:0:1::1:2"), [0xa0, 0x97, 0xdc, 0x98, 0xa6, 0xf1, 0x51, 0x97]);
        // Neighbours in one network, the same task in neighbouring networks, and what adding up would take for one.
        let texts = [
            "2001:db8:0:1::1",
            "2001:db8:0:1::2",
            "2001:db8:0:2::1",
            "2001:db8:0:2::2",
            "2001:db8:0:1::1:2",
            "2001:db8:0:2::1:1",
            "fd00::1",
            "fd00:0:0:1::",
            "::1",
            "10.0.0.1",
        ];
        let names: std::collections::HashSet<_> = texts.iter().map(|text| of(text)).collect();
        assert_eq!(names.len(), texts.len());
    }

    #[test]
    fn a_cookie_is_asked_for_once_its_peer_was_seen_using_it() {
        let mut key = PeerKey::default();
        let admits = |key: &PeerKey| [0, 1, 2, 3].map(|cookie| key.judge(cookie) != Said::Forged);
        let known = |key: &PeerKey| [0, 1, 2, 3].map(|cookie| key.judge(cookie) == Said::Known);
        assert_eq!((admits(&key), known(&key)), ([true; 4], [false; 4]), "no key is known");
        key = key.renewed(1);
        assert_eq!(admits(&key), [true; 4], "the peer may not know of it yet");
        assert_eq!(known(&key), [false, true, false, false]);
        key.seen = 1;
        assert_eq!(key.renewed(1), key);
        assert_eq!(admits(&key), [false, true, false, false]);
        // The peer has another one, and another one again before it was heard.
        key = key.renewed(2);
        assert_eq!((admits(&key), known(&key)), ([false, true, true, false], [false, true, true, false]));
        key = key.renewed(3);
        assert_eq!(admits(&key), [false, true, false, true]);
        key.seen = 3;
        assert_eq!(admits(&key), [false, false, false, true]);
        // It says that it has none any more: an older agent.
        key.refused = 7;
        key = key.renewed(0);
        assert_eq!((admits(&key), known(&key), key.refused), ([true; 4], [false; 4], 7));
        assert_eq!(admits(&key.renewed(1)), [true; 4], "and has one again");
    }

    #[test]
    fn what_an_uplink_lets_pass_is_told_in_three_bytes() {
        assert_eq!(network_of(1_500).to_ne_bytes(), [0, 0x05, 0xdc, 0]);
        for (told, heard) in [(0, None), (68, Some(68)), (1_500, Some(1_500)), (u32::MAX, Some(65_535))] {
            assert_eq!(uplink_mtu(network_of(told)), heard);
        }
    }

    #[test]
    fn the_tunnel_takes_what_the_documentation_says() {
        assert_eq!((overhead(true), overhead(false)), (60, 80));
    }
}
