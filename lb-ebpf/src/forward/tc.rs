//! Where TC sends a packet of ours: into a task's veth, through the tunnel, or to the client.

use core::ptr::null_mut;

use aya_ebpf::{
    bindings::BPF_F_INGRESS,
    helpers::generated::{
        bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_head, bpf_skb_vlan_pop,
        bpf_skb_vlan_push,
    },
};
use lb_common::{
    abi::Config,
    backend::{Backend, Kind, TRANSLATED},
    conntrack::line::DIRECT,
    net::Be16,
    outcome::Outcome,
    tags::Tags,
    translation::LONGER,
    tunnel::{TO_CLIENT, TO_TASK},
};

use super::{
    Action, early,
    encap::{self, EncapParams},
    fragmentation,
    headers::Back,
    mss, mtu,
    nat::{self, Hop, Target, backend_hop},
    next_hop::{self, Next},
    outcome, rst, tally, too_big, too_big_for_client,
    xdp::{clamp_arrived, clamp_emitted, peer_of},
};
use crate::{
    conntrack::{self, Classified, Direction, tracked::Tracked},
    io::{
        counters,
        family::Family,
        frame::{Frame, Skb},
        maps::{self, BACKENDS},
        packet::{ERROR, Packet, TunnelMeta, WHOLE},
    },
    wire::{
        ethernet::{Ethernet, LINK, words},
        ipv6::{self, Ipv6},
    },
};

/// On the uplink, where XDP has not decided.
#[inline(always)]
pub fn from_uplink<A: Back>(
    frame: &mut Skb,
    packet: &mut Packet<A>,
    found: &Classified,
) -> Result<Action, Outcome> {
    let config = maps::config().ok_or(Outcome::NotOurs)?;
    let (backend, packets) = (found.backend, frame.packets());
    let outcome = outcome(found)?;
    let headless = packet.network() == 0;
    if let Some(limit) = fragmentation::limit(frame, packet, found, config, fragmentation::ANY) {
        return Ok(Action::cut(limit));
    }
    give_link_header(frame, packet)?;
    if found.direction == Direction::Client {
        return to_client(frame, packet, found, config);
    }
    untag(frame, packet)?;
    if backend.kind == Kind::Peer as u8 {
        return to_peer(frame, packet, found, config, headless);
    }
    let local = backend.kind == Kind::Local as u8;
    let target = Target::of(packet, backend, found.direction);
    nat::apply(frame, packet, &target, backend_hop(backend)).ok_or(Outcome::Malformed)?;
    if local && packet.negotiates() {
        clamp_to(frame, packet, config.uplink)?;
    }
    tally(packet, found, packets, bytes(frame, packet));
    counters::outcome(outcome as u32, packets);
    Ok(if local { into_task(frame, backend) } else { out_of(frame, backend.ifindex) })
}

/// Puts a request into the tunnel to its task's node, or turns it into the answer that it is too big.
#[inline(always)]
fn to_peer<A: Back>(
    frame: &mut Skb,
    packet: &Packet<A>,
    found: &Classified,
    config: &Config,
    headless: bool,
) -> Result<Action, Outcome> {
    let backend = found.backend;
    let number = backend.peer as u32;
    let peer = encap::peer(number)?;
    let inner_mtu = encap::inner_mtu(peer);
    let (packets, bytes) = (frame.packets(), packet_bytes(frame, packet));
    if frame.longest(packet) > inner_mtu {
        too_big_for_client(frame, packet, inner_mtu)?;
        return back(frame, config, packet.tags, headless);
    }
    if packet.negotiates() {
        mss::clamp(frame, packet, inner_mtu, true).ok_or(Outcome::Malformed)?;
    }
    let headers = packet.headers();
    let params =
        EncapParams::new(&packet.key, packet.tos, headers, backend, TO_TASK, bytes as u16, inner_mtu);
    if !encap::encapsulate(frame, &params, peer) {
        return Err(Outcome::BackendUnreachable);
    }
    tally(packet, found, packets, bytes);
    counters::outcome(Outcome::Peer as u32, packets);
    Ok(out_of(frame, peer.ifindex))
}

/// Lowers what a SYN or its answer says of segments to what an interface lets pass.
#[inline(always)]
fn clamp_to<A: Family>(frame: &mut Skb, packet: &Packet<A>, interface: u32) -> Result<(), Outcome> {
    let mtu = mtu::of_interface(frame, interface);
    mss::clamp(frame, packet, mtu, true).ok_or(Outcome::Malformed)
}

/// On the uplink, with XDP's metadata: the connection is decided and counted, only the backend is asked.
#[inline(always)]
pub fn deliver<A: Family>(
    frame: &mut Skb,
    packet: &mut Packet<A>,
    index: u32,
    port: Be16,
) -> Result<Action, Outcome> {
    let backend = BACKENDS.get(index).ok_or(Outcome::DeliveryLost)?;
    if !backend.forwards() || backend.kind != Kind::Local as u8 {
        return Err(Outcome::DeliveryLost);
    }
    untag(frame, packet)?;
    let target = Target::task(packet, backend, port);
    nat::apply(frame, packet, &target, backend_hop(backend)).ok_or(Outcome::DeliveryLost)?;
    if packet.negotiates() {
        // The task's replies leave by the uplink, wherever this came from; those through the tunnel were thought of before.
        let uplink = maps::config().ok_or(Outcome::DeliveryLost)?.uplink;
        clamp_to(frame, packet, uplink)?;
    }
    Ok(into_task(frame, backend))
}

/// What a peer sent to a task of this node: delivered.
#[inline(always)]
pub fn arrived<A: Tracked>(
    frame: &mut Skb,
    packet: &mut Packet<A>,
    tunnel: &TunnelMeta,
    index: u32,
) -> Result<Action, Outcome> {
    let (packets, bytes) = (frame.packets(), bytes(frame, packet));
    clamp_arrived(frame, packet, tunnel, true)?;
    let port = packet.connection.port;
    let action = deliver(frame, packet, index, port)?;
    counters::request(index, packets, bytes);
    counters::outcome(Outcome::Local as u32, packets);
    Ok(action)
}

/// A reply that a peer sent for the client.
#[inline(always)]
pub fn emit<A: Tracked>(
    frame: &mut Skb,
    packet: &mut Packet<A>,
    tunnel: &TunnelMeta,
) -> Result<Action, Outcome> {
    let config = maps::config().ok_or(Outcome::DeliveryLost)?;
    let known = conntrack::for_client(packet, tunnel)?;
    let (packets, bytes) = (frame.packets(), bytes(frame, packet));
    give_link_header(frame, packet)?;
    if !known {
        counters::outcome(Outcome::Reply as u32, packets);
        return Ok(by_neighbour(frame, config.uplink));
    }
    let (index, tags) = (packet.connection.backend, packet.connection.tags);
    clamp_emitted(frame, packet, peer_of(index))?;
    let next = next_hop::refresh(frame.context(), packet, config.uplink);
    nat::link(frame, next_hop::hop(config, &packet.connection)).ok_or(Outcome::TunnelMalformed)?;
    tag(frame, tags)?;
    counters::reply(index, packets, bytes);
    counters::outcome(Outcome::Reply as u32, packets);
    Ok(to_hop(frame, config.uplink, next, tags))
}

/// Where tasks answer.
#[inline(always)]
pub fn from_task<A: Back>(
    frame: &mut Skb,
    packet: &mut Packet<A>,
    found: &Classified,
) -> Result<Action, Outcome> {
    let config = maps::config().ok_or(Outcome::NotOurs)?;
    // No router cuts what was made IPv6: whoever lets IPv4 be cut may hear of no path (RFC 7915, 4).
    let most = if packet.may_be_cut != 0 { ipv6::LEAST_MTU } else { fragmentation::ANY };
    if let Some(limit) = fragmentation::limit(frame, packet, found, config, most) {
        return Ok(Action::cut(limit));
    }
    to_client(frame, packet, found, config)
}

/// What is to become of a packet that is about to be one of the other family, at its task's interface: it is passed on if that lets it
/// pass then, else cut, or its sender is told what fits. The error comes in as if the task had sent it, and goes the way of those.
#[inline(never)]
pub fn to_other_family<A: Back>(frame: &mut Skb, packet: &Packet<A>) -> u64 {
    super::pack(fit(frame, packet))
}

#[inline(always)]
fn fit<A: Back>(frame: &mut Skb, packet: &Packet<A>) -> Result<Action, Outcome> {
    /// By so much a packet grows at most: the longer header, and an error by that of what it quotes too.
    const GROWTH: u32 = 2 * LONGER;
    const FRAGMENT: u32 = size_of::<ipv6::Fragment>() as u32;
    let longest = frame.longest_cut(packet);
    if longest <= ipv6::LEAST_MTU - GROWTH {
        return Ok(Action::PASS);
    }
    let interface = frame.ifindex();
    let mtu = mtu::of_interface(frame, interface);
    let grows = A::HEADER < size_of::<Ipv6>();
    let whole = if grows { mtu.saturating_sub(LONGER) } else { mtu.saturating_add(LONGER) };
    let piece = if grows { whole.saturating_sub(FRAGMENT) } else { whole };
    let limit = match packet.kind {
        WHOLE => whole,
        ERROR if grows => whole.saturating_sub(LONGER),
        _ => piece,
    };
    if longest <= limit {
        return Ok(Action::PASS);
    }
    if frame.segment_bytes() == 0 && fragmentation::has_pieces(frame, packet, piece) {
        return Ok(Action::cut(piece));
    }
    // Of merged segments, which were made to fit, the sum is not finished: an error that quotes one could not leave.
    if frame.segment_bytes() != 0 {
        return Err(Outcome::TooBig);
    }
    too_big_for_client(frame, packet, limit)?;
    // SAFETY: the helper has no preconditions.
    Ok(Action::sent(unsafe { bpf_redirect(interface, BPF_F_INGRESS as u64) } as u32))
}

/// Reads a packet that is to come in, or to leave, once more as fragments of at most so many bytes.
#[inline(never)]
pub fn begin_cut<A: Back>(frame: &mut Skb, packet: &mut Packet<A>, limit: u32, goes_out: bool) -> u64 {
    let begun = give_link_header(frame, packet)
        .and_then(|()| fragmentation::begin(frame, packet, limit, goes_out).ok_or(Outcome::TooBig));
    super::pack(begun.map(|()| Action::DROP))
}

/// Has it come in.
#[inline(never)]
pub fn cut(frame: &mut Skb) -> u64 {
    super::pack(match fragmentation::send(frame) {
        Some(()) => Err(Outcome::Fragmented),
        None => Err(Outcome::TooBig),
    })
}

/// Has a first fragment come in once more, and after it those that came before; zero if it could not.
#[inline(never)]
pub fn release<A: Family>(frame: &mut Skb, packet: &mut Packet<A>) -> u32 {
    give_link_header(frame, packet).map_or(0, |()| early::release(frame, packet))
}

/// Turns a reply around to the client.
#[inline(always)]
fn to_client<A: Back>(
    frame: &mut Skb,
    packet: &mut Packet<A>,
    found: &Classified,
    config: &Config,
) -> Result<Action, Outcome> {
    untag(frame, packet)?;
    let (peer, link) = (packet.connection.peer as u32, packet.connection.link);
    if peer != 0 && link & DIRECT == 0 {
        return to_client_by_peer(frame, packet, found, peer);
    }
    if let Some(mtu) = mtu::exceeded(frame, packet, config.uplink) {
        too_big(frame, packet, mtu)?;
        return Ok(out_of(frame, frame.ifindex()));
    }
    let (packets, bytes) = (frame.packets(), bytes(frame, packet));
    let next = next_hop::refresh(frame.context(), packet, config.uplink);
    let hop = next_hop::hop(config, &packet.connection);
    nat::apply(frame, packet, &Target::client(packet), hop).ok_or(Outcome::Malformed)?;
    if packet.negotiates() {
        clamp_to(frame, packet, config.uplink)?;
        if peer != 0 {
            // The client's packets come through the tunnel all the same.
            clamp_emitted(frame, packet, peer)?;
        }
    }
    let tags = packet.connection.tags;
    tag(frame, tags)?;
    tally(packet, found, packets, bytes);
    counters::outcome(Outcome::Reply as u32, packets);
    Ok(to_hop(frame, config.uplink, next, tags))
}

/// Turns a reply around to the client, and sends it through the peer that the client used.
#[inline(always)]
fn to_client_by_peer<A: Back>(
    frame: &mut Skb,
    packet: &Packet<A>,
    found: &Classified,
    number: u32,
) -> Result<Action, Outcome> {
    let peer = encap::peer(number)?;
    let inner_mtu = encap::inner_mtu(peer);
    let (packets, bytes) = (frame.packets(), bytes(frame, packet));
    if frame.longest(packet) > inner_mtu {
        too_big(frame, packet, inner_mtu)?;
        return Ok(out_of(frame, frame.ifindex()));
    }
    // The tunnel writes the link header.
    let hop = Hop { destination: words(&peer.mac), source: words(&peer.source_mac), known: false };
    nat::apply(frame, packet, &Target::client(packet), hop).ok_or(Outcome::Malformed)?;
    if packet.negotiates() {
        mss::clamp(frame, packet, inner_mtu, true).ok_or(Outcome::Malformed)?;
    }
    let headers = packet.headers();
    let params =
        EncapParams::new(&packet.key, packet.tos, headers, found.backend, TO_CLIENT, bytes as u16, inner_mtu);
    if !encap::encapsulate(frame, &params, peer) {
        return Err(Outcome::BackendUnreachable);
    }
    tally(packet, found, packets, bytes);
    counters::outcome(Outcome::Reply as u32, packets);
    Ok(out_of(frame, peer.ifindex))
}

/// Answers a packet whose task is gone by a reset in its place.
#[inline(always)]
pub fn reset<A: Back>(frame: &mut Skb, packet: &mut Packet<A>) -> Result<Action, Outcome> {
    let config = maps::config().ok_or(Outcome::BackendGone)?;
    let (packets, headless) = (frame.packets(), packet.network() == 0);
    give_link_header(frame, packet)?;
    untag(frame, packet)?;
    rst::answer(frame, packet).ok_or(Outcome::BackendGone)?;
    counters::outcome(Outcome::Reset as u32, packets);
    back(frame, config, packet.tags, headless)
}

/// A probe: sent back. Whose link header the kernel has hidden, its neighbour code gives a new one.
#[inline(never)]
pub fn answer_probe(frame: &mut Skb, tunnel: &TunnelMeta) -> u64 {
    let headless = tunnel.headless != 0;
    let uplink = maps::config().map_or(0, |config| config.uplink);
    if headless && put_link_header(frame).is_none() || encap::answer_probe(frame, tunnel, uplink).is_none() {
        return super::pack(Ok(Action::PASS));
    }
    counters::outcome(Outcome::TunnelProbe as u32, 1);
    let next = if headless { Next::Unresolved } else { Next::Known };
    super::pack(Ok(to_hop(frame, frame.ifindex(), next, Tags::NONE)))
}

/// Sends back what was made of a packet. Whose link header the kernel has hidden, its neighbour code gives a new one.
#[inline(always)]
fn back(frame: &mut Skb, config: &Config, tags: Tags, headless: bool) -> Result<Action, Outcome> {
    tag(frame, tags)?;
    Ok(to_hop(frame, config.uplink, if headless { Next::Unresolved } else { Next::Known }, tags))
}

/// Sends a frame to the hop that was written into it, or through the kernel's neighbour code.
#[inline(always)]
fn to_hop(frame: &mut Skb, uplink: u32, next: Next, tags: Tags) -> Action {
    // With tags the kernel's neighbour code would build the frame without them.
    if next == Next::Known || tags.outer.is_some() {
        out_of(frame, uplink)
    } else {
        by_neighbour(frame, uplink)
    }
}

#[inline(always)]
fn out_of(frame: &mut Skb, interface: u32) -> Action {
    frame.sign();
    // SAFETY: the helper has no preconditions.
    Action::sent(unsafe { bpf_redirect(interface, 0) } as u32)
}

/// Into a task's namespace; by the host's side of its veth if it is translated there.
#[inline(always)]
fn into_task(frame: &mut Skb, backend: &Backend) -> Action {
    if backend.flags & TRANSLATED != 0 {
        return out_of(frame, backend.ifindex);
    }
    // SAFETY: the helper has no preconditions.
    Action::sent(unsafe { bpf_redirect_peer(backend.ifindex, 0) } as u32)
}

#[inline(always)]
fn by_neighbour(frame: &mut Skb, interface: u32) -> Action {
    frame.sign();
    // SAFETY: no parameters are passed: the kernel takes the next hop from its routing table.
    Action::sent(unsafe { bpf_redirect_neigh(interface, null_mut(), 0, 0) } as u32)
}

/// Bytes of a buffer from the network header on.
#[inline(always)]
fn bytes<A>(frame: &Skb, packet: &Packet<A>) -> u64 {
    (frame.length() - packet.network()) as u64
}

/// Bytes of what the frame holds, without padding where it is one packet.
#[inline(always)]
fn packet_bytes<A>(frame: &Skb, packet: &Packet<A>) -> u64 {
    if frame.packets() == 1 { packet.bytes as u64 } else { bytes(frame, packet) }
}

/// Gives a frame whose link header the kernel has hidden (generic XDP) a new one, for the hop's addresses.
#[inline(always)]
fn give_link_header<A: Family>(frame: &mut Skb, packet: &mut Packet<A>) -> Result<(), Outcome> {
    if packet.network() != 0 {
        return Ok(());
    }
    put_link_header(frame).ok_or(Outcome::DeliveryLost)?;
    packet.move_to(LINK as u16);
    Ok(())
}

/// Puts a link header before a frame that has none, its addresses to be written.
#[inline(always)]
pub fn put_link_header(frame: &mut Skb) -> Option<()> {
    // SAFETY: the context is the program's own.
    if unsafe { bpf_skb_change_head(frame.raw(), size_of::<Ethernet>() as u32, 0) } != 0 {
        return None;
    }
    // SAFETY: as above.
    let protocol = unsafe { (*frame.raw()).protocol as u16 };
    frame.at::<Ethernet>(0)?.kind = protocol;
    Some(())
}

/// Takes the tags off, so that the task or the next hop gets what its own link carries. What follows the tags
/// that lay in the frame's bytes moves up; the packet then says where it is.
#[inline(always)]
fn untag<A: Family>(frame: &mut Skb, packet: &mut Packet<A>) -> Result<(), Outcome> {
    if !packet.tagged() {
        return Ok(());
    }
    for tag in [packet.tags.outer, packet.tags.inner] {
        // SAFETY: the context is the program's own.
        if tag.is_some() && unsafe { bpf_skb_vlan_pop(frame.raw()) } != 0 {
            return Err(Outcome::Malformed);
        }
    }
    packet.move_to(LINK as u16);
    Ok(())
}

/// Puts on the tags that the client's packets came with.
#[inline(always)]
fn tag(frame: &mut Skb, tags: Tags) -> Result<(), Outcome> {
    for tag in [tags.inner, tags.outer] {
        if tag.is_some() {
            // SAFETY: the context is the program's own.
            if unsafe { bpf_skb_vlan_push(frame.raw(), tag.protocol.raw(), tag.tci.get()) } != 0 {
                return Err(Outcome::Malformed);
            }
        }
    }
    Ok(())
}
