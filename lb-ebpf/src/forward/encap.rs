//! The tunnel between nodes: [`encapsulate`] puts a packet into Geneve, [`decapsulate`] takes one out.
//!
//! A packet travels as it came, so that the node with the task sees what the client sent; nothing of it is changed
//! here but its maximum segment size ([`super::mss`]).

use lb_common::{
    backend::{self, Backend},
    checksum::fold,
    conntrack::FiveTuple,
    net::{Address as _, Be16, UDP, V4, Wide},
    outcome::Outcome,
    tunnel::{
        CRITICAL, DATA_WORDS, Header, NAMES_TASK, OPTION_CLASS, PROBE_ANSWER, Peer, RETURN_DIRECT, SELF,
        Said, TO_TASK, VERSION, VERSION_AND_LENGTH, VERSION_KEYED, cookie, name, network_of, on_wire,
        overhead,
    },
};

use super::mtu;
use crate::{
    io::{
        atomic,
        family::Family,
        frame::Frame,
        maps::{self, PEER_KEYS, PEER_NUMBERS, PEERS},
        packet::{ERROR, Packet, TunnelMeta, WHOLE},
    },
    wire::{
        ethernet::{Ethernet, IPV4, IPV6, words},
        ipv4::{DONT_FRAGMENT, Ipv4, PLAIN},
        ipv6::Ipv6,
    },
};

/// Time to live of a tunnel packet.
const TTL: u8 = 64;
/// Differentiated services; the two bits of congestion notification stay behind, as in the compatibility mode of
/// RFC 6040, because they would have to be put together again at the other end.
const SERVICE: u8 = 0xfc;
const LINK: usize = size_of::<Ethernet>();

/// The peer of a number, if a way leads to it.
#[inline(always)]
pub fn peer(number: u32) -> Result<&'static Peer, Outcome> {
    match PEERS.get(number) {
        Some(peer) if peer.reachable != 0 => Ok(peer),
        _ => Err(Outcome::BackendUnreachable),
    }
}

/// The largest packet that fits into the tunnel to a peer, in bytes.
#[inline(always)]
pub fn inner_mtu(peer: &Peer) -> u32 {
    (peer.mtu as u32).saturating_sub(overhead(peer.family == 4) as u32)
}

/// What the tunnel is told about a packet.
pub struct EncapParams<'a> {
    /// Address in the option.
    pub address: &'a Wide,
    /// Port in the option.
    pub port: Be16,
    /// [`TO_TASK`] or [`lb_common::tunnel::TO_CLIENT`].
    pub kind: u8,
    /// Flags of the option.
    pub flags: u8,
    /// Type of service of the packet.
    pub tos: u8,
    /// EtherType of the packet, network order.
    pub ether: u16,
    /// Bytes of the packet.
    pub bytes: u16,
    /// The same for all packets of its connection.
    pub hash: u32,
    /// Largest segment that still fits.
    pub segment: u32,
}

impl<'a> EncapParams<'a> {
    /// A packet for a task or from one, whose network and transport header are so many bytes.
    #[inline(always)]
    pub fn new<A: Family>(
        key: &FiveTuple<A>,
        tos: u8,
        headers: u32,
        backend: &'a Backend,
        kind: u8,
        bytes: u16,
        inner_mtu: u32,
    ) -> Self {
        let (address, flags) = if kind == TO_TASK {
            (
                &backend.address,
                (backend.flags & backend::RETURN_DIRECT) / backend::RETURN_DIRECT * RETURN_DIRECT,
            )
        } else {
            (&backend.source, (backend.flags & backend::NAMED) / backend::NAMED * NAMES_TASK)
        };
        Self {
            address,
            port: backend.port,
            kind,
            flags,
            tos,
            ether: A::ETHER_TYPE,
            bytes,
            hash: key.flow_hash(),
            segment: inner_mtu.saturating_sub(headers),
        }
    }
}

/// Puts the packet, whose link header is not tagged, into the tunnel. False if there is no room for it; nothing has
/// changed then.
#[inline(never)]
pub fn encapsulate<F: Frame>(frame: &mut F, params: &EncapParams<'_>, peer: &Peer) -> bool {
    encapsulate_inline(frame, params, peer)
}

/// [`encapsulate`] without a call.
#[inline(always)]
pub fn encapsulate_inline<F: Frame>(frame: &mut F, params: &EncapParams<'_>, peer: &Peer) -> bool {
    let outer_v4 = peer.family == 4;
    if !frame.make_room(overhead(outer_v4) as u32, outer_v4, params.segment) {
        return false;
    }
    let length = params.bytes.wrapping_add(size_of::<Header>() as u16);
    let Some(ethernet) = frame.at::<Ethernet>(0) else {
        return false;
    };
    ethernet.destination = words(&peer.mac);
    ethernet.source = words(&peer.source_mac);
    ethernet.kind = if outer_v4 { IPV4 } else { IPV6 };
    let at = if outer_v4 { outer4(frame, params, peer, length) } else { outer6(frame, params, peer, length) };
    let Some(at) = at else {
        return false;
    };
    let Some(header) = frame.at::<Header>(at) else {
        return false;
    };
    // Dynamic ports (RFC 6335), as RFC 8926, 3.3 advises.
    header.source_port = Be16::new(0xc000 | (params.hash >> 18) as u16);
    header.destination_port = maps::config().map_or(Be16::from_raw(0), |config| config.tunnel_port);
    header.length = Be16::new(length);
    header.checksum = 0;
    header.version_and_length = VERSION_AND_LENGTH;
    header.flags = CRITICAL;
    header.protocol = Be16::from_raw(params.ether);
    header.network = 0;
    header.class = OPTION_CLASS;
    header.kind = params.kind;
    header.words = DATA_WORDS;
    header.option_flags = params.flags;
    header.port = params.port;
    if peer.cookie == 0 {
        header.version = VERSION;
        header.address[0] = params.address[0];
        header.address[1] = params.address[1];
        header.address[2] = params.address[2];
        header.address[3] = params.address[3];
    } else {
        let (cookie, name) = (on_wire(peer.cookie), name(params.address));
        header.version = VERSION_KEYED;
        header.address[0] = cookie[0];
        header.address[1] = cookie[1];
        header.address[2] = name[0];
        header.address[3] = name[1];
    }
    true
}

/// Writes the outer IPv4 header; where the next one goes.
#[inline(always)]
fn outer4<F: Frame>(frame: &mut F, params: &EncapParams<'_>, peer: &Peer, length: u16) -> Option<usize> {
    const BYTES: usize = size_of::<Ipv4>();
    let header = frame.at::<Ipv4>(LINK)?;
    let (source, destination) = (V4::from_wide(peer.source), V4::from_wide(peer.address));
    let tos = params.tos & SERVICE;
    let total = length.wrapping_add(BYTES as u16).to_be();
    let sum = source.sum()
        + destination.sum()
        + u16::from_ne_bytes([PLAIN, tos]) as u32
        + total as u32
        + DONT_FRAGMENT as u32
        + u16::from_ne_bytes([TTL, UDP]) as u32;
    header.version_and_length = PLAIN;
    header.tos = tos;
    header.total_length = total;
    // Never fragmented, so that it needs no identification (RFC 6864).
    header.identification = 0;
    header.fragment = DONT_FRAGMENT;
    header.ttl = TTL;
    header.protocol = UDP;
    header.checksum = !fold(sum);
    header.source = source.0;
    header.destination = destination.0;
    Some(LINK + BYTES)
}

/// Writes the outer IPv6 header; where the next one goes.
#[inline(always)]
fn outer6<F: Frame>(frame: &mut F, params: &EncapParams<'_>, peer: &Peer, length: u16) -> Option<usize> {
    let header = frame.at::<Ipv6>(LINK)?;
    let class = (params.tos & SERVICE) as u32;
    // The flow label spreads what looks no further (RFC 6438).
    header.version_and_flow = (0x6000_0000 | class << 20 | params.hash >> 12).to_be();
    header.payload_length = length.to_be();
    header.next = UDP;
    header.hop_limit = TTL;
    for word in 0..4 {
        header.source[word] = peer.source[word];
        header.destination[word] = peer.address[word];
    }
    Some(LINK + size_of::<Ipv6>())
}

/// Whether the packet is addressed to the tunnel's port. What carries a tag belongs to an interface on top of the
/// uplink.
#[inline(always)]
pub fn is_for<A>(packet: &Packet<A>) -> bool {
    packet.key.protocol == UDP
        && packet.kind == WHOLE
        && !packet.tagged()
        && maps::config().is_some_and(|config| config.tunnel_port == packet.key.destination_port)
}

/// Whether the packet is an ICMP error about one of the tunnel's.
#[inline(always)]
pub fn is_error<A>(packet: &Packet<A>) -> bool {
    packet.key.protocol == UDP
        && packet.kind == ERROR
        && maps::config().is_some_and(|config| config.tunnel_port == packet.key.source_port)
}

/// Reads what the tunnel says of the packet inside, and checks that a peer sent it to this node. `NotOurs` if it is
/// another program's, or for another node. Changes nothing.
#[inline(always)]
pub fn open<F: Frame, A: Family>(
    frame: &F,
    packet: &Packet<A>,
    tunnel: &mut TunnelMeta,
) -> Result<(), Outcome> {
    let header = frame.read::<Header>(packet.transport()).ok_or(Outcome::NotOurs)?;
    let ours = header.version_and_length >> 6 == 0
        && header.version_and_length & 0x3f != 0
        && header.class == OPTION_CLASS
        && header.kind >= TO_TASK
        && header.kind <= PROBE_ANSWER;
    if !ours {
        return Err(Outcome::NotOurs);
    }
    let known = header.version_and_length == VERSION_AND_LENGTH
        && header.words & 0x1f == DATA_WORDS
        && (header.version == VERSION || header.version == VERSION_KEYED)
        && (header.protocol.raw() == IPV4 || header.protocol.raw() == IPV6);
    // The outer header is always put there without options and extension headers; who takes it away relies on it.
    let plain = packet.transport_at == packet.network_at + overhead(A::IS_V4) - size_of::<Header>() as u16;
    let sender = number(&packet.key.source);
    // Nearly always the address that we would use ourselves.
    let usual = PEERS.get(sender);
    let own = usual.is_some_and(|peer| *A::in_wide(&peer.source) == packet.key.destination);
    // On its way between two others.
    if !own && !maps::is_own(&packet.key.destination) {
        return Err(Outcome::NotOurs);
    }
    if sender == SELF || sender == NOBODY {
        return Err(Outcome::TunnelNotPeer);
    }
    tunnel.peer = sender;
    if !known || !plain {
        return Err(Outcome::TunnelMalformed);
    }
    let said = judge(sender, cookie(header.version, &header.address));
    if said == Said::Forged as u32 {
        return Err(Outcome::TunnelForged);
    }
    tunnel.is_known = (said == Said::Known as u32) as u8;
    if header.kind == PROBE_ANSWER {
        return Err(Outcome::TunnelProbe);
    }
    let task = &mut tunnel.task;
    task.port = header.port;
    if header.version == VERSION {
        task.name = name(&header.address);
    } else {
        task.name[0] = header.address[2];
        task.name[1] = header.address[3];
    }
    tunnel.kind = header.kind;
    tunnel.flags = header.option_flags;
    tunnel.outer_v4 = A::IS_V4 as u8;
    tunnel.inner_v4 = (header.protocol.raw() == IPV4) as u8;
    tunnel.headless = (packet.network_at == 0) as u8;
    Ok(())
}

/// What a cookie, or none (zero), says of a packet from the peer's address: [`Said`]. What is forged is counted there.
#[inline(always)]
fn judge(peer: u32, cookie: u64) -> u32 {
    let Some(key) = PEER_KEYS.get_ptr_mut(peer) else {
        return Said::Forged as u32;
    };
    // SAFETY: an entry of the array, copied at once.
    let known = unsafe { key.read() };
    let said = known.judge(cookie);
    if said == Said::Forged {
        // SAFETY: a word of the entry.
        unsafe { atomic::fetch_add(&raw mut (*key).refused, 1) };
    } else if cookie != 0 && cookie == known.current && !known.is_proven() {
        // SAFETY: a word of the entry.
        unsafe { (&raw mut (*key).seen).write_volatile(cookie) };
    }
    said as u32
}

/// Turns a probe, whose frame has a link header, into its answer: back to where it came from, with what this node's packets to
/// there are known by and what its uplink lets pass. `None` if the frame is not what it was.
#[inline(always)]
pub fn answer_probe<F: Frame>(frame: &mut F, tunnel: &TunnelMeta, uplink: u32) -> Option<()> {
    let outer_v4 = tunnel.outer_v4 != 0;
    let cookie = PEERS.get(tunnel.peer)?.cookie;
    let mtu = mtu::of_interface(frame, uplink);
    let ethernet = frame.at::<Ethernet>(0)?;
    let (destination, source) = (ethernet.destination, ethernet.source);
    ethernet.destination = source;
    ethernet.source = destination;
    let at = if outer_v4 {
        let header = frame.at::<Ipv4>(LINK)?;
        // The checksum does not mind the order of its terms.
        let (source, destination) = (header.source, header.destination);
        header.source = destination;
        header.destination = source;
        LINK + size_of::<Ipv4>()
    } else {
        let header = frame.at::<Ipv6>(LINK)?;
        for word in 0..4 {
            let (source, destination) = (header.source[word], header.destination[word]);
            header.source[word] = destination;
            header.destination[word] = source;
        }
        LINK + size_of::<Ipv6>()
    };
    let header = frame.at::<Header>(at)?;
    let (source, destination) = (header.source_port, header.destination_port);
    header.source_port = destination;
    header.destination_port = source;
    header.checksum = 0;
    header.kind = PROBE_ANSWER;
    header.network = network_of(mtu);
    // Agents that know no keys have something else there; and who only may be the peer is not told what the peer knows.
    if header.version == VERSION_KEYED {
        let cookie = if tunnel.is_known != 0 { cookie } else { 0 };
        header.version = if cookie == 0 { VERSION } else { VERSION_KEYED };
        let cookie = on_wire(cookie);
        header.address[0] = cookie[0];
        header.address[1] = cookie[1];
    }
    Some(())
}

/// No node's number. Not an `Option`: the compiler keeps the number of none on the stack without ever writing it, and
/// Linux 6.1 refuses to read that back.
const NOBODY: u32 = u32::MAX;

/// The number of the node with this address.
#[inline(always)]
fn number<A: Family>(address: &A) -> u32 {
    let mapped = address.to_mapped();
    // SAFETY: copied at once.
    unsafe { PEER_NUMBERS.get(mapped) }.copied().unwrap_or(NOBODY)
}

/// Takes the packet out of the tunnel; the link header goes on before it.
#[inline(always)]
pub fn decapsulate<F: Frame>(frame: &mut F, tunnel: &TunnelMeta) -> Option<()> {
    let (outer_v4, inner_v4) = (tunnel.outer_v4 != 0, tunnel.inner_v4 != 0);
    let ethernet = frame.at::<Ethernet>(0)?;
    let (destination, source) = (ethernet.destination, ethernet.source);
    if !frame.take_room(overhead(outer_v4) as u32, outer_v4, inner_v4) {
        return None;
    }
    let ethernet = frame.at::<Ethernet>(0)?;
    ethernet.destination = destination;
    ethernet.source = source;
    ethernet.kind = if inner_v4 { IPV4 } else { IPV6 };
    Some(())
}

/// What an ICMP error about one of the tunnel's packets comes to. Anybody can have sent it: what it says is not believed, but that
/// there is one has user space probe the ways to peers.
#[inline(always)]
pub fn error<A: Family>(packet: &Packet<A>) -> Outcome {
    // Turned around: from the peer to this node.
    if number(&packet.key.source) == NOBODY {
        return Outcome::NotOurs;
    }
    // Those that are too long for the way are sent to find it.
    if packet.key.destination_port == packet.key.source_port {
        return Outcome::TunnelProbe;
    }
    Outcome::TunnelError
}
