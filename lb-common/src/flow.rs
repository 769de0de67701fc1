//! Flows: one client connection or UDP exchange, both directions in one entry.
//!
//! A request is keyed as it arrives, (client, listener). The reply of a local or routed task finds the same
//! entry through the listeners that lead to the task ([`crate::endpoint::Replies`]). A flow that leaves with
//! an address of this node (snat) has a second entry, keyed as its reply arrives: (task, own address). What a peer
//! sent to a task of this node has only that one: (task, client).

use crate::{
    checksum::Delta,
    net::{Address, Be16, V4, V6},
    pod,
};

/// The five-tuple of a packet as it arrives from the uplink.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct FlowKey<A> {
    /// Source address, network order.
    pub source: A,
    /// Destination address, network order.
    pub destination: A,
    /// Network order.
    pub source_port: Be16,
    /// Network order.
    pub destination_port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub _pad: u8,
    /// Zero; not an array, which the BPF compiler would fill by calling a loop.
    pub _pad2: u16,
}

impl<A> FlowKey<A> {
    /// A key with its padding zeroed.
    #[inline(always)]
    pub const fn new(
        source: A,
        destination: A,
        source_port: Be16,
        destination_port: Be16,
        protocol: u8,
    ) -> Self {
        Self { source, destination, source_port, destination_port, protocol, _pad: 0, _pad2: 0 }
    }

    /// The key of what travels the other way.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self
    where
        A: Copy,
    {
        Self::new(self.destination, self.source, self.destination_port, self.source_port, self.protocol)
    }
}

/// The addresses and ports that a packet leaves with, and what that adds to its checksums.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rewrite<A> {
    /// Source address, network order.
    pub source: A,
    /// Destination address, network order.
    pub destination: A,
    /// Network order.
    pub source_port: Be16,
    /// Network order.
    pub destination_port: Be16,
    /// [`Delta`] of the addresses: for the IPv4 header and for the pseudo header.
    pub address_delta: u16,
    /// [`Delta`] of the ports.
    pub port_delta: u16,
}

impl<A: Address> Rewrite<A> {
    /// Becomes the rewrite from a packet's five-tuple to new addresses and ports. In place, for a copy would
    /// take stack that the programs do not have.
    #[inline(always)]
    pub fn set(&mut self, from: &FlowKey<A>, source: (&A, Be16), destination: (&A, Be16)) {
        let addresses = Delta::of_address(from.source, *source.0);
        let ports = Delta::of_port(from.source_port, source.1);
        self.source = *source.0;
        self.destination = *destination.0;
        self.source_port = source.1;
        self.destination_port = destination.1;
        self.address_delta = addresses.and(Delta::of_address(from.destination, *destination.0)).raw();
        self.port_delta = ports.and(Delta::of_port(from.destination_port, destination.1)).raw();
    }
}

/// A flow whose packets go to a task.
pub const REQUEST: u8 = 0;
/// The entry by which replies to an address of this node find their way back (snat).
pub const REPLY: u8 = 1;
/// The entry by which a task's replies find their way back through the peer that the client used.
pub const REPLY_BY_PEER: u8 = 2;
/// The same for replies that go straight to the client.
pub const REPLY_DIRECT: u8 = 3;

/// The client sent FIN.
pub const CLIENT_FIN: u8 = 1;
/// The task sent FIN.
pub const TASK_FIN: u8 = 2;
/// Either side sent RST.
pub const RESET: u8 = 4;
/// The task answered.
pub const ANSWERED: u8 = 8;

/// A VLAN tag: protocol (TPID) and TCI, both network order; zero is no tag.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VlanTag {
    /// 0x8100 or 0x88a8, network order.
    pub protocol: Be16,
    /// Priority and VLAN id, network order.
    pub tci: Be16,
}

/// The VLAN tags of a frame.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tags {
    /// The first on the wire.
    pub outer: VlanTag,
    /// The second; never without the first.
    pub inner: VlanTag,
}

impl VlanTag {
    /// No tag.
    pub const NONE: Self = Self { protocol: Be16::from_raw(0), tci: Be16::from_raw(0) };

    /// Whether there is a tag.
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.protocol.raw() != 0
    }
}

/// One entry of the flow table.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flow<A> {
    /// The ready-made rewrite of the packets that find this entry by its key.
    pub rewrite: Rewrite<A>,
    /// Index of the task's backend.
    pub backend: u32,
    /// The backend's generation when the flow was made.
    pub generation: u32,
    /// When the last packet was seen: jiffies, low 32 bits.
    pub seen: u32,
    /// When the next hop to the client was last asked for, jiffies, low 32 bits. A snat request keeps here when
    /// it last looked after its entry for replies.
    pub hop_seen: u32,
    /// Hardware address of the client or of the router to it.
    pub client_mac: [u8; 6],
    /// Own hardware address towards the client.
    pub node_mac: [u8; 6],
    /// The tags the client's packets carry.
    pub tags: Tags,
    /// [`REQUEST`], [`REPLY`], [`REPLY_BY_PEER`] or [`REPLY_DIRECT`].
    pub role: u8,
    /// Bits: [`CLIENT_FIN`], [`TASK_FIN`], [`RESET`], [`ANSWERED`].
    pub state: u8,
    /// Number of the peer that the requests came through, with [`REPLY_BY_PEER`] and [`REPLY_DIRECT`].
    pub peer: u16,
}

/// A flow that both sides have begun to close, in seconds of silence.
const CLOSING_SECONDS: u32 = 120;
/// A UDP exchange: RFC 4787, REQ-5 asks for two minutes at least and recommends five.
const UDP_SECONDS: u32 = 300;
/// An established TCP connection: RFC 5382, REQ-5.
const TCP_SECONDS: u32 = 7440;

impl<A> Flow<A> {
    /// Clears what is known of the client's link. By volatile writes, which the BPF compiler does not join to the call
    /// of a loop.
    #[inline(always)]
    pub fn forget_hop(&mut self) {
        // SAFETY: the fields are valid for writes.
        unsafe {
            for byte in 0..6 {
                (&raw mut self.client_mac[byte]).write_volatile(0);
                (&raw mut self.node_mac[byte]).write_volatile(0);
            }
            (&raw mut self.tags.outer).write_volatile(VlanTag::NONE);
            (&raw mut self.tags.inner).write_volatile(VlanTag::NONE);
        }
    }

    /// Whether nothing was heard of the flow for so long that what it holds may be given to another.
    #[inline(always)]
    pub const fn expired(&self, tcp: bool, now: u32, jiffies_per_second: u32) -> bool {
        let seconds = match tcp {
            _ if self.closing() => CLOSING_SECONDS,
            true => TCP_SECONDS,
            false => UDP_SECONDS,
        };
        now.wrapping_sub(self.seen) > seconds.wrapping_mul(jiffies_per_second)
    }

    /// Whether its client may still use it: another flow of the same client's port would disturb it.
    #[inline(always)]
    pub const fn is_alive(&self, tcp: bool, now: u32, jiffies_per_second: u32) -> bool {
        !self.closing() && !self.expired(tcp, now, jiffies_per_second)
    }

    /// Whether the entry is for replies, keyed as they arrive.
    #[inline(always)]
    pub const fn is_reply(&self) -> bool {
        self.role != REQUEST
    }

    /// Whether either side has begun to close: a SYN starts a new flow.
    #[inline(always)]
    pub const fn closing(&self) -> bool {
        self.state & (CLIENT_FIN | TASK_FIN | RESET) != 0
    }
}

const _: () = {
    assert!(size_of::<FlowKey<V4>>() == 16 && align_of::<FlowKey<V4>>() == 4);
    assert!(size_of::<FlowKey<V6>>() == 40 && align_of::<FlowKey<V6>>() == 4);
    assert!(size_of::<Rewrite<V4>>() == 16 && size_of::<Rewrite<V6>>() == 40);
    assert!(size_of::<Flow<V4>>() == 56 && size_of::<Flow<V6>>() == 80);
};

pod!(FlowKey<V4>, FlowKey<V6>, Flow<V4>, Flow<V6>);
