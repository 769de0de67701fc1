//! What the parser learned about a packet, passed through the stages.

use lb_common::{
    flow::{Flow, FlowKey, Tags},
    net::{TCP, V4, V6},
};

/// FIN, of the TCP flags (RFC 9293, 3.1).
pub const FIN: u8 = 1;
/// SYN.
pub const SYN: u8 = 2;
/// RST.
pub const RST: u8 = 4;
/// ACK.
pub const ACK: u8 = 16;

/// The link layer: where the network header starts, and the VLAN tags before it.
pub struct Link {
    /// Offset of the network header in bytes.
    pub network: usize,
    /// Its VLAN tags.
    pub tags: Tags,
}

/// A TCP or UDP packet. It lives in a per-CPU table ([`crate::maps::SCRATCH`]), not on the stack: there is
/// not room enough, and the verifier, which forgets what it knew of a value that was stored there, has one
/// packet to follow through the later stages instead of one for each way through the parser.
#[repr(C)]
pub struct Packet<A> {
    /// Its five-tuple.
    pub key: FlowKey<A>,
    /// The frame's VLAN tags.
    pub tags: Tags,
    /// Offset of the network header in bytes; read by [`Packet::network`].
    pub network_at: u16,
    /// Offset of the transport header in bytes; read by [`Packet::transport`].
    pub transport_at: u16,
    /// Bytes from the network header to the end of the packet.
    pub bytes: u16,
    /// Bytes of the transport header and the payload.
    pub transport_bytes: u16,
    /// Time to live or hop limit.
    pub hops: u8,
    /// TCP flags; zero for UDP.
    pub flags: u8,
    /// The flow being made for it.
    pub draft: Flow<A>,
    /// The entry for that flow's replies being made (snat).
    pub reply: Flow<A>,
    /// Its key.
    pub reply_key: FlowKey<A>,
}

impl<A> Packet<A> {
    /// Whether the protocol is TCP.
    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        self.key.protocol == TCP
    }

    /// Whether the packet asks for a new connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Whether the packet may make a flow: any UDP datagram, of TCP only a SYN.
    #[inline(always)]
    pub fn may_open(&self) -> bool {
        !self.is_tcp() || self.opens()
    }

    /// Whether the frame carries a VLAN tag.
    #[inline(always)]
    pub fn tagged(&self) -> bool {
        self.tags.outer.is_some()
    }

    /// Offset of the network header in bytes. The mask changes nothing but what the verifier knows.
    #[inline(always)]
    pub fn network(&self) -> usize {
        (self.network_at & 0x1f) as usize
    }

    /// Offset of the transport header in bytes; masked likewise.
    #[inline(always)]
    pub fn transport(&self) -> usize {
        (self.transport_at & 0x1ff) as usize
    }

    /// Offset of the transport checksum.
    #[inline(always)]
    pub fn checksum_offset(&self) -> usize {
        self.transport() + if self.is_tcp() { 16 } else { 6 }
    }
}

/// Room for the packet a program is working on.
#[repr(C)]
pub struct Scratch {
    /// Set by the parser for an IPv4 packet.
    pub v4: Packet<V4>,
    /// Set by the parser for an IPv6 packet.
    pub v6: Packet<V6>,
}

/// A hardware address in words as bytes.
#[inline(always)]
pub fn mac(words: [u16; 3]) -> [u8; 6] {
    let ([a, b], [c, d], [e, f]) = (words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes());
    [a, b, c, d, e, f]
}
