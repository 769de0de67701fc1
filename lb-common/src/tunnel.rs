//! What nodes say to each other: a client's packet, or a task's reply, whole inside Geneve (RFC 8926).
//!
//! ```text
//! Ethernet │ IPv4 or IPv6 │ UDP │ Geneve │ option: to whom │ the packet as the client sent it
//!          └──────────── 60 or 80 bytes ────────────────────┘
//! ```
//!
//! The inner packet starts with its IP header. The one option says which task a request is for, or a reply from, by an
//! address that is unique in the cluster and its target port. All fields on the wire are in network order.

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
/// Version of the option's data; another one is refused.
pub const VERSION: u8 = 1;
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
    /// Virtual network: zero.
    pub network: u32,
    /// [`OPTION_CLASS`].
    pub class: Be16,
    /// [`TO_TASK`], [`TO_CLIENT`], [`PROBE`] or [`PROBE_ANSWER`].
    pub kind: u8,
    /// Words of data: five.
    pub words: u8,
    /// [`VERSION`].
    pub version: u8,
    /// [`RETURN_DIRECT`], [`NAMES_TASK`].
    pub option_flags: u8,
    /// The task's target port.
    pub port: Be16,
    /// The task's address in the cluster; IPv4 as an IPv4-mapped address (RFC 4291, 2.5.5.2).
    pub address: Wide,
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
    /// Largest packet that the way there is known to let pass, in bytes.
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
    /// Zero.
    pub _pad3: u64,
}

/// The number of this node itself in the table of nodes' addresses.
pub const SELF: u32 = 0;

/// A task of this node as peers name it, and the protocol and family of the packets they send.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash, PartialOrd, Ord)]
pub struct TaskKey {
    /// Its address in the cluster, IPv4 as an IPv4-mapped address.
    pub address: Wide,
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
    assert!(size_of::<TaskKey>() == 20 && align_of::<TaskKey>() == 4);
    assert!(size_of::<Header>() == 8 + 8 + OPTION_WORDS as usize * 4);
};

pod!(Peer, TaskKey);

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
    fn the_tunnel_takes_what_the_documentation_says() {
        assert_eq!((overhead(true), overhead(false)), (60, 80));
    }
}
