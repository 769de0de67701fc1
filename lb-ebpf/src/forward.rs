//! Sending a packet of ours where its flow says: the last stage, one function for each place it is called from.

use core::ptr::null_mut;

use aya_ebpf::{
    bindings::xdp_action::{XDP_PASS, XDP_TX},
    helpers::generated::{
        bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_head, bpf_skb_vlan_pop,
        bpf_skb_vlan_push,
    },
};
use lb_common::{
    abi::{Config, HANDOVER_DECIDE, PARTIAL_CHECKSUMS, XDP_GENERIC, XDP_REDIRECTS, XDP_TRANSMITS},
    backend::{Backend, Kind, VIA_TC},
    checksum::pseudo_header,
    flow::Tags,
    outcome::Outcome,
};

use crate::{
    count,
    family::Family,
    flow::{Found, Way},
    frame::{Frame, Skb, XdpFrame},
    maps::{self, BACKENDS},
    neighbour::{self, Next},
    packet::Packet,
    parse::Ethernet,
    rewrite::{self, Hop, Target},
};

/// In XDP: local tasks are left to TC with a note, everything else is rewritten and sent at once.
#[inline(always)]
pub fn from_xdp<A: Family>(frame: &XdpFrame, packet: &Packet<A>, found: &Found<A>) -> Result<u32, Outcome> {
    let config = maps::config().ok_or(Outcome::NotOurs)?;
    let backend = found.backend;
    let to_task = matches!(found.way, Way::Task);
    if to_task && backend.kind == Kind::Local as u8 {
        // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
        let index = unsafe { (*found.flow).backend };
        // Without a note TC looks the flow up, and counts.
        if note(frame, config, index) {
            count::request(index, 1, packet.bytes as u64);
            count::outcome(Outcome::Local as u32, 1);
        }
        return Ok(XDP_PASS);
    }
    let config_allows = config.flags & XDP_TRANSMITS != 0;
    let way_allows = if to_task {
        backend.flags & VIA_TC == 0 && !packet.tagged()
    } else {
        // SAFETY: as above.
        let tagged = packet.tagged() || unsafe { (*found.flow).tags.outer.is_some() };
        // A hop that is due is left to TC, which asks the routing table and has the kernel resolve and confirm
        // the neighbour.
        !tagged && neighbour::is_fresh(found.flow)
    };
    // TC knows tags and unfinished checksums; XDP sees only bytes.
    if !config_allows || !way_allows || config.flags & PARTIAL_CHECKSUMS != 0 && unfinished(frame, packet) {
        note(frame, config, HANDOVER_DECIDE);
        return Ok(XDP_PASS);
    }
    let outcome = outcome(found)?;
    let target = target(packet, found);
    let (hop, interface) = if to_task {
        (backend_hop(backend), backend.ifindex)
    } else {
        (neighbour::hop(found.flow), config.uplink)
    };
    rewrite::apply(frame, packet, &target, hop).ok_or(Outcome::Malformed)?;
    tally(found, 1, packet.bytes as u64);
    count::outcome(outcome as u32, 1);
    if interface == frame.ifindex() && config.flags & XDP_REDIRECTS == 0 {
        return Ok(XDP_TX);
    }
    // SAFETY: the helper has no preconditions.
    Ok(unsafe { bpf_redirect(interface, 0) } as u32)
}

/// In TC on the uplink, where XDP has not decided.
#[inline(always)]
pub fn from_uplink_tc<A: Family>(
    frame: &Skb,
    packet: &mut Packet<A>,
    found: &Found<A>,
) -> Result<i32, Outcome> {
    let config = maps::config().ok_or(Outcome::NotOurs)?;
    let (backend, packets) = (found.backend, frame.packets());
    let outcome = outcome(found)?;
    give_link_header(frame, packet)?;
    let Way::Task = found.way else {
        return to_client(frame, packet, found, config, outcome);
    };
    untag(frame, packet)?;
    let local = backend.kind == Kind::Local as u8;
    let target = target(packet, found);
    let hop = backend_hop(backend);
    rewrite::apply(frame, packet, &target, hop).ok_or(Outcome::Malformed)?;
    tally(found, packets, bytes(frame, packet));
    count::outcome(outcome as u32, packets);
    // SAFETY: the helpers have no preconditions.
    let action = unsafe {
        if local { bpf_redirect_peer(backend.ifindex, 0) } else { bpf_redirect(backend.ifindex, 0) }
    };
    Ok(action as i32)
}

/// In TC on the uplink, with XDP's note: the flow is decided and counted, only the backend is asked.
#[inline(always)]
pub fn handed_over<A: Family>(frame: &Skb, packet: &mut Packet<A>, index: u32) -> Result<i32, Outcome> {
    let backend = BACKENDS.get(index).ok_or(Outcome::HandoverLost)?;
    if !backend.forwards() || backend.kind != Kind::Local as u8 {
        return Err(Outcome::HandoverLost);
    }
    untag(frame, packet)?;
    let target = Target::task(packet, A::in_wide(&backend.address), backend.port);
    let hop = backend_hop(backend);
    rewrite::apply(frame, packet, &target, hop).ok_or(Outcome::HandoverLost)?;
    // SAFETY: the helper has no preconditions.
    Ok(unsafe { bpf_redirect_peer(backend.ifindex, 0) } as i32)
}

/// In TC where tasks answer.
#[inline(always)]
pub fn from_task_tc<A: Family>(
    frame: &Skb,
    packet: &mut Packet<A>,
    found: &Found<A>,
) -> Result<i32, Outcome> {
    let config = maps::config().ok_or(Outcome::NotOurs)?;
    to_client(frame, packet, found, config, Outcome::Reply)
}

/// Turns an answer around to the client.
#[inline(always)]
fn to_client<A: Family>(
    frame: &Skb,
    packet: &mut Packet<A>,
    found: &Found<A>,
    config: &Config,
    outcome: Outcome,
) -> Result<i32, Outcome> {
    let (packets, bytes) = (frame.packets(), bytes(frame, packet));
    untag(frame, packet)?;
    let target = target(packet, found);
    let next =
        neighbour::refresh(frame.context(), found.flow, target.destination, target.source, config.uplink);
    let hop = neighbour::hop(found.flow);
    rewrite::apply(frame, packet, &target, hop).ok_or(Outcome::Malformed)?;
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let tags = unsafe { (*found.flow).tags };
    tag(frame, tags)?;
    tally(found, packets, bytes);
    count::outcome(outcome as u32, packets);
    // With tags the kernel's neighbour code would build the frame without them.
    if next == Next::Known || tags.outer.is_some() {
        // SAFETY: the helper has no preconditions.
        return Ok(unsafe { bpf_redirect(config.uplink, 0) } as i32);
    }
    // SAFETY: no parameters are passed: the kernel takes the next hop from its routing table.
    Ok(unsafe { bpf_redirect_neigh(config.uplink, null_mut(), 0, 0) } as i32)
}

/// What a forwarded packet is counted as.
#[inline(always)]
fn outcome<A: Family>(found: &Found<A>) -> Result<Outcome, Outcome> {
    match (&found.way, Kind::try_from(found.backend.kind)) {
        (Way::Client | Way::Back, _) => Ok(Outcome::Reply),
        (Way::Task, Ok(Kind::Local)) => Ok(Outcome::Local),
        (Way::Task, Ok(Kind::Routed)) => Ok(Outcome::Routed),
        (Way::Task, Ok(Kind::Snat)) => Ok(Outcome::Snat),
        (Way::Task, Err(_)) => Err(Outcome::BackendUnreachable),
    }
}

/// What the packet leaves with.
#[inline(always)]
fn target<'a, A: Family>(packet: &'a Packet<A>, found: &'a Found<A>) -> Target<'a, A> {
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let flow = unsafe { &*found.flow };
    match found.way {
        // SAFETY: with this way it is set, and an entry of a table.
        Way::Back => Target::answer(packet, flow, unsafe { &*found.listener }),
        Way::Task | Way::Client => Target::of(&flow.rewrite),
    }
}

/// Counts for the backend.
#[inline(always)]
fn tally<A: Family>(found: &Found<A>, packets: u64, bytes: u64) {
    // SAFETY: as above.
    let index = unsafe { (*found.flow).backend };
    match found.way {
        Way::Task => count::request(index, packets, bytes),
        _ => count::reply(index, packets, bytes),
    }
}

/// Bytes of a buffer from the network header on.
#[inline(always)]
fn bytes<A>(frame: &Skb, packet: &Packet<A>) -> u64 {
    (frame.length() - packet.network()) as u64
}

/// The hop to a backend. A local task's hardware address may not be known, and need not be: the buffer goes
/// straight to its device.
#[inline(always)]
fn backend_hop(backend: &Backend) -> Hop {
    let known = backend.kind != Kind::Local as u8 || backend.mac != [0; 6];
    Hop { destination: backend.mac, source: backend.source_mac, known }
}

/// Whether a local stack left the transport checksum to the device: the field holds the pseudo header's sum.
/// One finished sum in 65,536 looks the same; TC is right about those too.
#[inline(always)]
fn unfinished<A: Family>(frame: &XdpFrame, packet: &Packet<A>) -> bool {
    let Some(field) = frame.at::<u16>(packet.checksum_offset()) else {
        return false;
    };
    let key = &packet.key;
    // SAFETY: `at` checked the bounds.
    unsafe { *field == pseudo_header(key.source, key.destination, key.protocol, packet.transport_bytes) }
}

/// Gives a frame whose link header the kernel has hidden (generic XDP) a new one, for the hop's addresses.
#[inline(always)]
fn give_link_header<A: Family>(frame: &Skb, packet: &mut Packet<A>) -> Result<(), Outcome> {
    const LINK: u16 = size_of::<Ethernet>() as u16;
    if packet.network() != 0 {
        return Ok(());
    }
    // SAFETY: the context is the program's own; `at` checks the bounds of the header that is written.
    unsafe {
        if bpf_skb_change_head(frame.raw(), LINK as u32, 0) != 0 {
            return Err(Outcome::HandoverLost);
        }
        let ethernet = frame.at::<Ethernet>(0).ok_or(Outcome::HandoverLost)?;
        (*ethernet).kind = (*frame.raw()).protocol as u16;
    }
    packet.network_at = LINK;
    packet.transport_at = packet.transport_at.wrapping_add(LINK);
    Ok(())
}

/// Takes the tags off, so that the task or the next hop gets what its own link carries. What follows the tags
/// that lay in the frame's bytes moves up; the packet then says where it is.
#[inline(always)]
fn untag<A: Family>(frame: &Skb, packet: &mut Packet<A>) -> Result<(), Outcome> {
    if !packet.tagged() {
        return Ok(());
    }
    for tag in [packet.tags.outer, packet.tags.inner] {
        // SAFETY: the context is the program's own.
        if tag.is_some() && unsafe { bpf_skb_vlan_pop(frame.raw()) } != 0 {
            return Err(Outcome::Malformed);
        }
    }
    let moved = packet.network_at.wrapping_sub(size_of::<Ethernet>() as u16);
    packet.transport_at = packet.transport_at.wrapping_sub(moved);
    packet.network_at = size_of::<Ethernet>() as u16;
    Ok(())
}

/// Puts on the tags that the client's packets came with.
#[inline(always)]
fn tag(frame: &Skb, tags: Tags) -> Result<(), Outcome> {
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

/// Leaves a note for TC on the frame. False where there can be none: generic XDP's do not reach TC, and some
/// drivers have no room, which TC is told once.
#[inline(always)]
fn note(frame: &XdpFrame, config: &Config, backend: u32) -> bool {
    if config.flags & XDP_GENERIC != 0 {
        return false;
    }
    let noted = frame.hand_over(backend);
    if !noted {
        let refused = &raw const config.metadata_refused;
        // SAFETY: the table's entry is valid while the program runs; every writer writes the same.
        unsafe { refused.cast_mut().write_volatile(1) };
    }
    noted
}
