//! What the parser and connection tracking learned about a packet, passed through the stages.

use lb_common::{
    conntrack::{
        FiveTuple, Segment,
        tcp::{ACK, FIN, RST, SYN},
    },
    endpoint::Listener,
    net::{Be16, TCP, V4, V6},
    tags::Tags,
    tunnel::TaskKey,
};

use crate::wire::{ethernet::Mac, transport::checksum_at};

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
    /// The sender's hardware address; zero if it is hidden.
    pub source: Mac,
}

/// Where the headers of a TCP or UDP packet are.
pub struct Offsets {
    /// Offset of the network header in bytes.
    pub network: usize,
    /// Offset of the transport header in bytes.
    pub transport: usize,
    /// Its protocol.
    pub protocol: u8,
}

impl Offsets {
    /// As the parser saw them.
    #[inline(always)]
    pub fn of<A>(packet: &Packet<A>) -> Self {
        Self { network: packet.network(), transport: packet.transport(), protocol: packet.key.protocol }
    }

    /// Offset of the transport checksum.
    #[inline(always)]
    pub fn checksum(&self) -> usize {
        self.transport + checksum_at(self.protocol)
    }
}

/// A TCP or UDP packet, a fragment of one, or an ICMP error about one. An error's five-tuple is that of the packet it
/// quotes turned around, which is the way the error itself travels. It lives in a per-CPU table ([`super::maps::SCRATCH`]), not
/// on the stack: there is not room enough, and the verifier, which forgets what it knew of a value that was stored there, has one
/// packet to follow through the later stages instead of one for each way through the parser.
#[repr(C)]
pub struct Packet<A> {
    /// Its five-tuple.
    pub key: FiveTuple<A>,
    /// The frame's VLAN tags.
    pub tags: Tags,
    /// Hardware address that the frame came from; zero if it is hidden.
    pub source_mac: Mac,
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
    pub ttl: u8,
    /// Bytes of the TCP or UDP header.
    pub header_bytes: u8,
    /// TCP flags; zero for UDP, later fragments and errors.
    pub tcp_flags: u8,
    /// [`WHOLE`], [`FIRST`], [`LATER`] or [`ERROR`].
    pub kind: u8,
    /// Type of service or traffic class.
    pub tos: u8,
    /// Whether its sender sent it as IPv4 that may be cut on its way. Of what comes as it is, the parser leaves it zero.
    pub may_be_cut: u8,
    /// Of TCP: sequence number, host order.
    pub sequence: u32,
    /// Of TCP: what it acknowledges, host order.
    pub acknowledgment: u32,
    /// Its connection: what the later stages need of its line. They know this copy alone, so that it does not matter to them
    /// where the line was found.
    pub connection: Connection<A>,
    /// Its line.
    pub line: Located,
    /// What else the search for its line has come to.
    pub search: Search,
    /// The listener of the connection that is being made.
    pub listener: Listener,
    /// The line that is being made.
    pub draft: Draft<A>,
    /// The five-tuple that is sought, where that is not the packet's own.
    pub sought: FiveTuple<A>,
    /// The other one of the same pair, see [`crate::conntrack::table::find_reply`].
    pub alias_tuple: FiveTuple<A>,
    /// A second search: for what already has the client's port at a task.
    pub probe: Search,
    /// What that has found.
    pub probed: Located,
    /// The alias that is being made.
    pub alias: Draft<A>,
    /// Its line.
    pub alias_line: Located,
}

/// What the later stages need of a connection.
#[repr(C)]
pub struct Connection<A> {
    /// Its requests' five-tuple: (client, listener).
    pub tuple: FiveTuple<A>,
    /// Index of the task's backend.
    pub backend: u32,
    /// Its state.
    pub state: u32,
    /// Next hop to the client.
    pub mac: Mac,
    /// When that was last asked for, as the line has it.
    pub hop_seen: u16,
    /// Number of the node through which the client's packets come; zero if they come to this one.
    pub peer: u16,
    /// The client's port as the task sees it.
    pub port: Be16,
    /// Largest packet that the way to the client lets pass, in bytes; zero if nothing is known.
    pub mtu: u16,
    /// [`lb_common::conntrack::line::Line::link`].
    pub link: u16,
    /// The client's tags.
    pub tags: Tags,
}

/// Where a line lies, and what its control word was.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Located {
    /// The control word by which it was found.
    pub control: u64,
    /// [`lb_common::conntrack::line::slot`].
    pub slot: u32,
    /// Whether the line is to be given anew to the packet's connection.
    pub anew: u32,
}

/// What a search has come to, beside a line: what an insertion goes on with.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Search {
    /// Index of the endpoint's home set.
    pub set: u32,
    /// The home's way.
    pub way: u32,
    /// The home word before the search.
    pub hints: u32,
    /// Whether a line that may be what is sought was being made all the while.
    pub busy: u32,
    /// The lower half of the endpoint's hash, and the upper.
    pub hash: [u32; 2],
    /// The alias by which a connection was found, if by one; [`NOBODY`] otherwise.
    pub alias: u32,
    /// The lower half of its control word, and the upper.
    pub alias_control: [u32; 2],
    /// The backend that is not to take the connection which is being made, because it has not answered; [`NOBODY`] if all may.
    pub avoid: u32,
    /// How many tasks the connection that is being made was given to before.
    pub retries: u32,
    /// Whether its task knows the client's port from another connection.
    pub port_is_taken: u32,
    /// Whether it is to be counted as new.
    pub is_new: u32,
    /// Whether it goes on without ever having had a line that is still known.
    pub goes_on: u32,
    /// Whether it may do without a line.
    pub guarded: u32,
    /// All ones if its line is to lie at home whoever is driven out there, for an alias found no other place than that of the line
    /// itself; else zero.
    pub stays: u32,
    /// Whether a pair that its task may remember from a closed connection is as good as another.
    pub forgetful: u32,
}

/// A line that is being made.
#[repr(C)]
pub struct Draft<A> {
    /// As the line has them.
    pub tuple: FiveTuple<A>,
    pub backend: u32,
    pub client_next: u32,
    pub task_next: u32,
    pub state: u32,
    pub hop_seen: u16,
    pub peer: u16,
    pub mac: Mac,
    pub port: Be16,
    pub tci: [Be16; 2],
    pub link: u16,
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
            flags: self.tcp_flags,
        }
    }

    /// Whether the packet goes on with a connection: it acknowledges, and neither opens nor ends.
    #[inline(always)]
    pub fn acknowledges(&self) -> bool {
        self.tcp_flags & (SYN | ACK | RST | FIN) == ACK
    }

    /// Whether the packet answers a SYN.
    #[inline(always)]
    pub fn answers_syn(&self) -> bool {
        self.tcp_flags & (SYN | ACK | RST | FIN) == SYN | ACK
    }

    /// Whether the packet asks for a new connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.tcp_flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Whether the packet may make a connection: any UDP datagram, of TCP only a SYN. Neither an error nor a fragment
    /// without ports.
    #[inline(always)]
    pub fn may_open(&self) -> bool {
        self.kind <= FIRST && (!self.is_tcp() || self.opens())
    }

    /// Whether the packet is a SYN or its answer, which may carry a maximum segment size.
    #[inline(always)]
    pub fn negotiates(&self) -> bool {
        self.tcp_flags & SYN != 0 && self.kind == WHOLE
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
        self.transport() + checksum_at(self.key.protocol)
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
    pub tunnel: TunnelMeta,
    /// XDP's metadata of the frame, in TC.
    pub metadata: u64,
}

/// What the tunnel said of a packet.
#[repr(C)]
pub struct TunnelMeta {
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
    /// Whether nobody but the peer can have sent it ([`lb_common::tunnel::Said::Known`]).
    pub is_known: u8,
}

/// What holds an offset into a packet that is being cut, for the verifier.
pub const OFFSETS: u32 = 0x3fff;
/// Bytes of a fragment's payload, at most, in the same way; a multiple of eight.
pub const LONGEST_PIECE: u32 = 0x1ff8;

/// A packet that is being cut. It lives in a per-CPU table, not on the stack, so that the verifier sees the same in each round.
#[repr(C)]
pub struct Cutting {
    /// From the transport header on, and room for what a fragment could have behind that.
    pub payload: [u8; (OFFSETS + LONGEST_PIECE + 9) as usize],
    /// Its bytes.
    pub bytes: u32,
    /// Bytes of a fragment's payload.
    pub piece: u32,
    /// How many bytes have been sent.
    pub sent: u32,
    /// Offset of the network header.
    pub network: u32,
    /// Bytes of a fragment's headers.
    pub headers: u32,
    /// Bytes of the next fragment's payload.
    pub length: u32,
    /// Whether it is the packet's last.
    pub is_last: u32,
    /// Whether fragments leave by the packet's interface once more, and do not come in.
    pub goes_out: u32,
    /// Where in its datagram it lies.
    pub place: Place,
}

/// Where in its datagram a packet lies, and what it has in common with the other fragments.
#[repr(C)]
pub struct Place {
    /// Of IPv6, network order; of IPv4 it stays where it is.
    pub identification: u32,
    /// Offset in bytes, in host order.
    pub offset: u16,
    /// Whether more fragments follow.
    pub more: u16,
}

impl Cutting {
    /// Where in its datagram the next fragment lies, in bytes.
    #[inline(always)]
    pub fn offset(&self) -> u16 {
        self.place.offset.wrapping_add(self.sent as u16) & !7
    }

    /// One if more fragments follow the next one, else zero.
    #[inline(always)]
    pub fn more(&self) -> u16 {
        self.place.more | (self.is_last as u16 ^ 1)
    }
}
