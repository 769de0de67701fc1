//! What the parser learned about a packet, passed through the stages.

use lb_common::{
    flow::{ACK, FIN, Flow, FlowKey, RST, SYN, Segment, Spare, Tags},
    net::{TCP, V4, V6},
    tunnel::TaskKey,
};

/// A whole TCP or UDP packet.
pub const WHOLE: u8 = 0;
/// The first fragment of one: it has the ports, and a checksum over all fragments.
pub const FIRST: u8 = 1;
/// A later fragment: no transport header.
pub const LATER: u8 = 2;
/// An ICMP error that quotes one.
pub const ERROR: u8 = 3;

/// Stands for no backend: no index is as high.
pub const NOBODY: u32 = u32::MAX;

/// The link layer: where the network header starts, and the VLAN tags before it.
pub struct Link {
    /// Offset of the network header in bytes.
    pub network: usize,
    /// Its VLAN tags.
    pub tags: Tags,
}

/// A TCP or UDP packet, a fragment of one, or an ICMP error about one. An error's five-tuple is that of the packet it
/// quotes turned around, which is the way the error itself travels. It lives in a per-CPU table ([`crate::maps::SCRATCH`]), not on the stack: there is
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
    /// Of an error: offset of the quoted network header in bytes; read by [`Packet::quoted`].
    pub quoted_at: u16,
    /// Of an error: offset of the quoted transport header; read by [`Packet::quoted_transport`].
    pub quoted_transport_at: u16,
    /// Of a fragment: what its datagram's fragments have in common.
    pub identification: u32,
    /// Bytes from the network header to the end of the packet.
    pub bytes: u16,
    /// Bytes of the transport header and the payload.
    pub transport_bytes: u16,
    /// Time to live or hop limit.
    pub hops: u8,
    /// Bytes of the TCP or UDP header.
    pub header_bytes: u8,
    /// TCP flags; zero for UDP, later fragments and errors.
    pub flags: u8,
    /// [`WHOLE`], [`FIRST`], [`LATER`] or [`ERROR`].
    pub form: u8,
    /// Type of service or traffic class.
    pub service: u8,
    /// Of TCP: sequence number, host order.
    pub sequence: u32,
    /// Of TCP: what it acknowledges, host order.
    pub acknowledgment: u32,
    /// Its flow: a copy of the entry, or the entry that is being made. The later stages know this copy alone, so that it
    /// does not matter to them which table it comes from.
    pub flow: Flow<A>,
    /// The backend that is not to take the flow which is being made, because it has not answered; [`NOBODY`] if all may.
    pub avoid: u32,
    /// How many tasks the flow that is being made was given to before.
    pub retries: u8,
    /// The key of the flow's entry, where that is not the packet's own five-tuple.
    pub flow_key: FlowKey<A>,
    /// The entry for that flow's replies being made (snat).
    pub reply: Flow<A>,
    /// Its key.
    pub reply_key: FlowKey<A>,
    /// The spare of an entry that is being kept.
    pub spare: Spare<A>,
}

impl<A> Packet<A> {
    /// Whether the protocol is TCP.
    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        self.key.protocol == TCP
    }

    /// What the packet says of its place in the connection.
    #[inline(always)]
    pub fn segment(&self) -> Segment {
        Segment {
            sequence: self.sequence,
            acknowledgment: self.acknowledgment,
            payload: (self.transport_bytes as u32).wrapping_sub(self.header_bytes as u32),
            flags: self.flags,
        }
    }

    /// Whether the packet goes on with a connection: it acknowledges, and neither opens nor ends.
    #[inline(always)]
    pub fn acknowledges(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == ACK
    }

    /// Whether the packet answers a SYN.
    #[inline(always)]
    pub fn answers_syn(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN | ACK
    }

    /// Whether the packet asks for a new connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Whether the packet may make a flow: any UDP datagram, of TCP only a SYN. Neither an error nor a fragment
    /// without ports.
    #[inline(always)]
    pub fn may_open(&self) -> bool {
        self.form <= FIRST && (!self.is_tcp() || self.opens())
    }

    /// Whether the packet is a SYN or its answer, which may carry a maximum segment size.
    #[inline(always)]
    pub fn negotiates(&self) -> bool {
        self.flags & SYN != 0 && self.form == WHOLE
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

    /// Notes that the packet now starts at another offset of its frame.
    #[inline(always)]
    pub fn move_to(&mut self, network_at: u16) {
        let moved = network_at.wrapping_sub(self.network_at);
        self.network_at = network_at;
        self.transport_at = self.transport_at.wrapping_add(moved);
        self.quoted_at = self.quoted_at.wrapping_add(moved);
        self.quoted_transport_at = self.quoted_transport_at.wrapping_add(moved);
    }

    /// Bytes of the network and transport headers.
    #[inline(always)]
    pub fn headers(&self) -> u32 {
        (self.transport_at.wrapping_sub(self.network_at)) as u32 + self.header_bytes as u32
    }

    /// Offset of the network header that an error quotes; masked likewise.
    #[inline(always)]
    pub fn quoted(&self) -> usize {
        (self.quoted_at & 0x1ff) as usize
    }

    /// Offset of the transport header that an error quotes; masked likewise.
    #[inline(always)]
    pub fn quoted_transport(&self) -> usize {
        (self.quoted_transport_at & 0x1ff) as usize
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
    /// Set when the packet came through the tunnel.
    pub arrival: Arrival,
}

/// What the tunnel said of a packet.
#[repr(C)]
pub struct Arrival {
    /// The task that the packet is for, or from; protocol and family are the packet's own.
    pub task: TaskKey,
    /// Number of the node that sent it; [`lb_common::tunnel::SELF`] where who sent it was looked at before.
    pub peer: u32,
    /// [`lb_common::tunnel::TO_TASK`] or [`lb_common::tunnel::TO_CLIENT`].
    pub kind: u8,
    /// [`lb_common::tunnel::RETURN_DIRECT`], [`lb_common::tunnel::NAMES_TASK`].
    pub flags: u8,
    /// Whether the outer header is IPv4, else IPv6.
    pub outer_v4: u8,
    /// Whether the packet inside is.
    pub inner_v4: u8,
    /// Whether the frame's bytes begin with the network header (generic XDP).
    pub headless: u8,
}

/// A hardware address in words as bytes.
#[inline(always)]
pub fn mac(words: [u16; 3]) -> [u8; 6] {
    let ([a, b], [c, d], [e, f]) = (words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes());
    [a, b, c, d, e, f]
}
