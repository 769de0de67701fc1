//! Sending a packet of ours where its flow says: the last stage, one function for each place it is called from.

use core::ptr::null_mut;

use aya_ebpf::{
    bindings::{
        TC_ACT_UNSPEC,
        xdp_action::{XDP_PASS, XDP_TX},
    },
    helpers::generated::{
        bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_head, bpf_skb_vlan_pop,
        bpf_skb_vlan_push,
    },
};
use lb_common::{
    abi::{
        Config, HANDOVER_DECIDE, HANDOVER_EMIT, PARTIAL_CHECKSUMS, XDP_GENERIC, XDP_REDIRECTS, XDP_TRANSMITS,
    },
    backend::{Backend, Kind, VIA_TC},
    checksum::pseudo_header,
    flow::{REPLY_BY_PEER, REPLY_DIRECT, Tags, VlanTag},
    outcome::Outcome,
    tunnel::{RETURN_DIRECT, TO_CLIENT, TO_TASK},
};

use crate::{
    classify, count,
    family::Family,
    flow::{Found, Way},
    frame::{Frame, Skb, XdpFrame},
    icmp,
    maps::{self, BACKENDS},
    mtu,
    neighbour::{self, Next, Route},
    packet::{Arrival, FIRST, Packet, WHOLE},
    parse::Ethernet,
    reset,
    rewrite::{self, Hop, Place, Target, words},
    segment,
    tunnel::{self, Cargo},
};

/// In XDP: local tasks are left to TC with a note, everything else is rewritten and sent at once.
#[inline(always)]
pub fn from_xdp<A: Family>(frame: &XdpFrame, packet: &Packet<A>, found: &Found) -> Result<u32, Outcome> {
    let config = maps::config().ok_or(Outcome::NotOurs)?;
    let backend = found.backend;
    let to_task = matches!(found.way, Way::Task);
    if to_task && backend.kind == Kind::Local as u8 {
        return Ok(hand_over(frame, config, packet.flow.backend, packet.bytes as u64));
    }
    let config_allows = config.flags & XDP_TRANSMITS != 0;
    let way_allows = if to_task {
        backend.flags & VIA_TC == 0 && !packet.tagged()
    } else {
        let tagged = packet.tagged() || packet.flow.tags.outer.is_some();
        // A hop that is due is left to TC, which asks the routing table and has the kernel resolve and confirm
        // the neighbour.
        !tagged && neighbour::is_fresh(&packet.flow)
    };
    // TC knows tags and unfinished checksums; XDP sees only bytes.
    if !config_allows || !way_allows || config.flags & PARTIAL_CHECKSUMS != 0 && leaves_sum(frame, packet) {
        note(frame, config, HANDOVER_DECIDE);
        return Ok(XDP_PASS);
    }
    if to_task && backend.kind == Kind::Peer as u8 {
        let interface = to_peer(frame, packet, found)?;
        return Ok(transmit(frame, config, if interface == BACK { frame.ifindex() } else { interface }));
    }
    let outcome = outcome(found)?;
    let target = Target::of(&packet.flow.rewrite);
    let (hop, interface) = if to_task {
        (backend_hop(backend), backend.ifindex)
    } else {
        (neighbour::hop(&packet.flow), config.uplink)
    };
    rewrite::apply(frame, packet, &target, hop).ok_or(Outcome::Malformed)?;
    tally(packet, found, 1, packet.bytes as u64);
    count::outcome(outcome as u32, 1);
    Ok(transmit(frame, config, interface))
}

/// Leaves a packet for a task of this node to TC. Without a note TC looks the flow up, and counts.
#[inline(always)]
pub fn hand_over(frame: &XdpFrame, config: &Config, backend: u32, bytes: u64) -> u32 {
    if note(frame, config, backend) {
        count::request(backend, 1, bytes);
        count::outcome(Outcome::Local as u32, 1);
    }
    XDP_PASS
}

/// In XDP, answers a packet whose task is gone by a reset in its place; a tagged one is left to TC.
#[inline(always)]
pub fn reset_in_xdp<A: Family>(frame: &XdpFrame, packet: &Packet<A>) -> Result<u32, Outcome> {
    let config = maps::config().ok_or(Outcome::BackendGone)?;
    if config.flags & XDP_TRANSMITS == 0 || packet.tagged() {
        note(frame, config, HANDOVER_DECIDE);
        return Ok(XDP_PASS);
    }
    reset::answer(frame, packet).ok_or(Outcome::BackendGone)?;
    count::outcome(Outcome::Reset as u32, 1);
    Ok(transmit(frame, config, frame.ifindex()))
}

/// In TC, the same.
#[inline(always)]
pub fn reset_in_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>) -> Result<i32, Outcome> {
    let config = maps::config().ok_or(Outcome::BackendGone)?;
    let (packets, headless) = (frame.packets(), packet.network() == 0);
    give_link_header(frame, packet)?;
    untag(frame, packet)?;
    reset::answer(frame, packet).ok_or(Outcome::BackendGone)?;
    count::outcome(Outcome::Reset as u32, packets);
    back_in_tc(frame, config, packet.tags, headless)
}

/// Sends back what was made of a packet. Whose link header the kernel has hidden, its neighbour code gives a new one.
#[inline(always)]
fn back_in_tc(frame: &Skb, config: &Config, tags: Tags, headless: bool) -> Result<i32, Outcome> {
    tag(frame, tags)?;
    Ok(to_hop(config.uplink, if headless { Next::Unresolved } else { Next::Known }, tags))
}

/// Sends a frame out of an interface.
#[inline(always)]
pub fn transmit(frame: &XdpFrame, config: &Config, interface: u32) -> u32 {
    if interface == frame.ifindex() && config.flags & XDP_REDIRECTS == 0 {
        return XDP_TX;
    }
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(interface, 0) as u32 }
}

/// In XDP, what a peer sent to a task of this node: left to TC with a note.
#[inline(always)]
pub fn arrived_in_xdp<A: Family>(
    frame: &XdpFrame,
    packet: &mut Packet<A>,
    arrival: &mut Arrival,
) -> Result<u32, Outcome> {
    let config = maps::config().ok_or(Outcome::HandoverLost)?;
    let index = classify::for_task(packet, arrival)?;
    let finished = !(config.flags & PARTIAL_CHECKSUMS != 0 && leaves_sum(frame, packet));
    clamp_arrived(frame, packet, arrival, finished)?;
    if !note(frame, config, index) {
        return Err(Outcome::HandoverLost);
    }
    count::request(index, 1, packet.bytes as u64);
    count::outcome(Outcome::Local as u32, 1);
    Ok(XDP_PASS)
}

/// In TC, the same: delivered.
#[inline(always)]
pub fn arrived_in_tc<A: Family>(
    frame: &Skb,
    packet: &mut Packet<A>,
    arrival: &mut Arrival,
) -> Result<i32, Outcome> {
    let index = classify::for_task(packet, arrival)?;
    let (packets, bytes) = (frame.packets(), bytes(frame, packet));
    clamp_arrived(frame, packet, arrival, true)?;
    let action = handed_over(frame, packet, index)?;
    count::request(index, packets, bytes);
    count::outcome(Outcome::Local as u32, packets);
    Ok(action)
}

/// In XDP, a probe: sent back.
#[inline(never)]
pub fn answer_probe_in_xdp(frame: &XdpFrame, arrival: &Arrival) -> i32 {
    match maps::config() {
        Some(config) if config.flags & XDP_TRANSMITS != 0 => {
            if tunnel::answer_probe(frame, arrival.outer_v4 != 0).is_none() {
                return XDP_PASS as i32;
            }
            count::outcome(Outcome::TunnelProbe as u32, 1);
            transmit(frame, config, frame.ifindex()) as i32
        }
        _ => leave_to_tc(frame),
    }
}

/// In TC, the same. Whose link header the kernel has hidden, its neighbour code gives a new one.
#[inline(never)]
pub fn answer_probe_in_tc(frame: &Skb, arrival: &Arrival) -> i32 {
    let headless = arrival.headless != 0;
    if headless && put_link_header(frame).is_none()
        || tunnel::answer_probe(frame, arrival.outer_v4 != 0).is_none()
    {
        return TC_ACT_UNSPEC;
    }
    count::outcome(Outcome::TunnelProbe as u32, 1);
    let next = if headless { Next::Unresolved } else { Next::Known };
    to_hop(frame.ifindex(), next, Tags { outer: VlanTag::NONE, inner: VlanTag::NONE })
}

/// Lowers what a SYN says of the segments the task may send, if those come back through the tunnel.
#[inline(always)]
fn clamp_arrived<F: Frame, A: Family>(
    frame: &F,
    packet: &Packet<A>,
    arrival: &Arrival,
    finished: bool,
) -> Result<(), Outcome> {
    if !packet.negotiates() || arrival.flags & RETURN_DIRECT != 0 {
        return Ok(());
    }
    // A peer that cannot be reached for a moment: the answer will tell.
    let Ok(peer) = tunnel::peer(arrival.peer) else {
        return Ok(());
    };
    let room = tunnel::room(arrival.peer, peer);
    segment::clamp(frame, packet, room, finished).ok_or(Outcome::TunnelMalformed)
}

/// In XDP, an answer that a peer sent for the client: emitted by its flow's hop, or left to TC, which asks the routing
/// table.
#[inline(always)]
pub fn emit_in_xdp<A: Family>(
    frame: &XdpFrame,
    packet: &mut Packet<A>,
    arrival: &Arrival,
) -> Result<u32, Outcome> {
    let config = maps::config().ok_or(Outcome::HandoverLost)?;
    let known = classify::for_client(packet, arrival)?;
    let fits = config.flags & XDP_TRANSMITS != 0
        && !(config.flags & PARTIAL_CHECKSUMS != 0 && leaves_sum(frame, packet));
    let flow = &packet.flow;
    if !known || !fits || flow.tags.outer.is_some() || !neighbour::is_fresh(flow) {
        return if note(frame, config, HANDOVER_EMIT) { Ok(XDP_PASS) } else { Err(Outcome::HandoverLost) };
    }
    clamp_emitted(frame, packet, arrival.peer)?;
    rewrite::link(frame, neighbour::hop(&packet.flow)).ok_or(Outcome::TunnelMalformed)?;
    count::reply(packet.flow.backend, 1, packet.bytes as u64);
    count::outcome(Outcome::Reply as u32, 1);
    Ok(transmit(frame, config, config.uplink))
}

/// In TC, the same.
#[inline(always)]
pub fn emit_in_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>, arrival: &Arrival) -> Result<i32, Outcome> {
    let config = maps::config().ok_or(Outcome::HandoverLost)?;
    let known = classify::for_client(packet, arrival)?;
    let (packets, bytes) = (frame.packets(), bytes(frame, packet));
    give_link_header(frame, packet)?;
    if !known {
        count::outcome(Outcome::Reply as u32, packets);
        // SAFETY: no parameters are passed: the kernel takes the next hop from its routing table.
        return Ok(unsafe { bpf_redirect_neigh(config.uplink, null_mut(), 0, 0) } as i32);
    }
    let (index, tags) = (packet.flow.backend, packet.flow.tags);
    if let Some(backend) = BACKENDS.get(index) {
        clamp_emitted(frame, packet, backend.peer as u32)?;
    }
    let route = Route::new(&packet.key.destination, &packet.key.source, config.uplink);
    let next = neighbour::refresh(frame.context(), packet, &route);
    rewrite::link(frame, neighbour::hop(&packet.flow)).ok_or(Outcome::TunnelMalformed)?;
    tag(frame, tags)?;
    count::reply(index, packets, bytes);
    count::outcome(Outcome::Reply as u32, packets);
    Ok(to_hop(config.uplink, next, tags))
}

/// Lowers what a SYN-ACK says of the segments that the client may send through the tunnel to a peer.
#[inline(always)]
fn clamp_emitted<F: Frame, A: Family>(frame: &F, packet: &Packet<A>, number: u32) -> Result<(), Outcome> {
    if !packet.negotiates() {
        return Ok(());
    }
    let Ok(peer) = tunnel::peer(number) else {
        return Ok(());
    };
    segment::clamp(frame, packet, tunnel::room(number, peer), true).ok_or(Outcome::TunnelMalformed)
}

/// Stands for the interface that a frame came in by: no interface has this index.
const BACK: u32 = 0;

/// Puts a request into the tunnel to its task's node, or turns it into the answer that it is too big; the interface
/// to send it by, or [`BACK`].
#[inline(always)]
fn to_peer<F: Frame, A: Family>(frame: &F, packet: &Packet<A>, found: &Found) -> Result<u32, Outcome> {
    let backend = found.backend;
    let number = backend.peer as u32;
    let peer = tunnel::peer(number)?;
    let room = tunnel::room(number, peer);
    let (packets, bytes) = (frame.packets(), packet_bytes(frame, packet));
    if frame.longest(packet) > room {
        return too_big(frame, packet, room);
    }
    if packet.negotiates() {
        segment::clamp(frame, packet, room, true).ok_or(Outcome::Malformed)?;
    }
    let cargo =
        Cargo::new(&packet.key, packet.service, packet.headers(), backend, TO_TASK, bytes as u16, room);
    if !tunnel::wrap(frame, &cargo, peer) {
        return Err(Outcome::BackendUnreachable);
    }
    tally(packet, found, packets, bytes);
    count::outcome(Outcome::Peer as u32, packets);
    Ok(peer.ifindex)
}

/// Answers a packet that is too long by an ICMP error in its place, to be sent [`BACK`]. Errors are not answered by
/// errors, nor are later fragments (RFC 1122, 3.2.2).
#[inline(always)]
fn too_big<F: Frame, A: Family>(frame: &F, packet: &Packet<A>, room: u32) -> Result<u32, Outcome> {
    if packet.form > FIRST || icmp::too_big(frame, packet, room).is_none() {
        return Err(Outcome::TooBig);
    }
    count::outcome(Outcome::TooBig as u32, 1);
    Ok(BACK)
}

/// In TC on the uplink, where XDP has not decided.
#[inline(always)]
pub fn from_uplink_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>, found: &Found) -> Result<i32, Outcome> {
    let config = maps::config().ok_or(Outcome::NotOurs)?;
    let (backend, packets) = (found.backend, frame.packets());
    let outcome = outcome(found)?;
    let headless = packet.network() == 0;
    give_link_header(frame, packet)?;
    let Way::Task = found.way else {
        return to_client(frame, packet, found, config, outcome);
    };
    untag(frame, packet)?;
    if backend.kind == Kind::Peer as u8 {
        let interface = to_peer(frame, packet, found)?;
        if interface == BACK {
            return back_in_tc(frame, config, packet.tags, headless);
        }
        // SAFETY: the helper has no preconditions.
        return Ok(unsafe { bpf_redirect(interface, 0) } as i32);
    }
    let local = backend.kind == Kind::Local as u8;
    let target = Target::of(&packet.flow.rewrite);
    let hop = backend_hop(backend);
    rewrite::apply(frame, packet, &target, hop).ok_or(Outcome::Malformed)?;
    if local && packet.negotiates() {
        clamp_to(frame, packet, config.uplink)?;
    }
    tally(packet, found, packets, bytes(frame, packet));
    count::outcome(outcome as u32, packets);
    // SAFETY: the helpers have no preconditions.
    let action = unsafe {
        if local { bpf_redirect_peer(backend.ifindex, 0) } else { bpf_redirect(backend.ifindex, 0) }
    };
    Ok(action as i32)
}

/// Lowers what a SYN or its answer says of segments to what an interface lets pass.
#[inline(always)]
fn clamp_to<A: Family>(frame: &Skb, packet: &Packet<A>, interface: u32) -> Result<(), Outcome> {
    segment::clamp(frame, packet, mtu::of_interface(frame, interface), true).ok_or(Outcome::Malformed)
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
    if packet.negotiates() {
        // The task's answers leave by this interface.
        clamp_to(frame, packet, frame.ifindex())?;
    }
    // SAFETY: the helper has no preconditions.
    Ok(unsafe { bpf_redirect_peer(backend.ifindex, 0) } as i32)
}

/// In TC where tasks answer.
#[inline(always)]
pub fn from_task_tc<A: Family>(frame: &Skb, packet: &mut Packet<A>, found: &Found) -> Result<i32, Outcome> {
    let config = maps::config().ok_or(Outcome::NotOurs)?;
    to_client(frame, packet, found, config, Outcome::Reply)
}

/// Turns an answer around to the client.
#[inline(always)]
fn to_client<A: Family>(
    frame: &Skb,
    packet: &mut Packet<A>,
    found: &Found,
    config: &Config,
    outcome: Outcome,
) -> Result<i32, Outcome> {
    let (packets, bytes) = (frame.packets(), bytes(frame, packet));
    untag(frame, packet)?;
    let (role, tags, number) = (packet.flow.role, packet.flow.tags, packet.flow.peer as u32);
    if role == REPLY_BY_PEER {
        return to_client_by_peer(frame, packet, found, number);
    }
    if let Some(mtu) = mtu::exceeded(frame, packet, config.uplink) {
        too_big(frame, packet, mtu)?;
        // SAFETY: the helper has no preconditions.
        return Ok(unsafe { bpf_redirect(frame.ifindex(), 0) } as i32);
    }
    let rewrite = &packet.flow.rewrite;
    let route = Route::new(&rewrite.destination, &rewrite.source, config.uplink);
    let next = neighbour::refresh(frame.context(), packet, &route);
    let target = Target::of(&packet.flow.rewrite);
    let hop = neighbour::hop(&packet.flow);
    rewrite::apply(frame, packet, &target, hop).ok_or(Outcome::Malformed)?;
    if packet.negotiates() {
        clamp_to(frame, packet, config.uplink)?;
    }
    if role == REPLY_DIRECT {
        // The client's packets come through the tunnel all the same.
        clamp_emitted(frame, packet, number)?;
    }
    tag(frame, tags)?;
    tally(packet, found, packets, bytes);
    count::outcome(outcome as u32, packets);
    Ok(to_hop(config.uplink, next, tags))
}

/// Sends a frame to the hop that was written into it, or through the kernel's neighbour code.
#[inline(always)]
fn to_hop(uplink: u32, next: Next, tags: Tags) -> i32 {
    // With tags the kernel's neighbour code would build the frame without them.
    if next == Next::Known || tags.outer.is_some() {
        // SAFETY: the helper has no preconditions.
        return unsafe { bpf_redirect(uplink, 0) } as i32;
    }
    // SAFETY: no parameters are passed: the kernel takes the next hop from its routing table.
    unsafe { bpf_redirect_neigh(uplink, null_mut(), 0, 0) as i32 }
}

/// Turns an answer around to the client, and sends it through the peer that the client used.
#[inline(always)]
fn to_client_by_peer<A: Family>(
    frame: &Skb,
    packet: &Packet<A>,
    found: &Found,
    number: u32,
) -> Result<i32, Outcome> {
    let peer = tunnel::peer(number)?;
    let room = tunnel::room(number, peer);
    let (packets, bytes) = (frame.packets(), bytes(frame, packet));
    if frame.longest(packet) > room {
        too_big(frame, packet, room)?;
        // SAFETY: the helper has no preconditions.
        return Ok(unsafe { bpf_redirect(frame.ifindex(), 0) } as i32);
    }
    let target = Target::of(&packet.flow.rewrite);
    // The tunnel writes the link header.
    let hop = Hop { destination: words(&peer.mac), source: words(&peer.source_mac), known: false };
    rewrite::apply(frame, packet, &target, hop).ok_or(Outcome::Malformed)?;
    if packet.negotiates() {
        segment::clamp(frame, packet, room, true).ok_or(Outcome::Malformed)?;
    }
    let cargo = Cargo::new(
        &packet.key,
        packet.service,
        packet.headers(),
        found.backend,
        TO_CLIENT,
        bytes as u16,
        room,
    );
    if !tunnel::wrap(frame, &cargo, peer) {
        return Err(Outcome::BackendUnreachable);
    }
    tally(packet, found, packets, bytes);
    count::outcome(Outcome::Reply as u32, packets);
    // SAFETY: the helper has no preconditions.
    Ok(unsafe { bpf_redirect(peer.ifindex, 0) } as i32)
}

/// What a forwarded packet is counted as.
#[inline(always)]
fn outcome(found: &Found) -> Result<Outcome, Outcome> {
    match (&found.way, Kind::try_from(found.backend.kind)) {
        (Way::Client, _) => Ok(Outcome::Reply),
        (Way::Task, Ok(Kind::Local)) => Ok(Outcome::Local),
        (Way::Task, Ok(Kind::Routed)) => Ok(Outcome::Routed),
        (Way::Task, Ok(Kind::Snat)) => Ok(Outcome::Snat),
        (Way::Task, Ok(Kind::Peer)) => Ok(Outcome::Peer),
        (Way::Task, Err(_)) => Err(Outcome::BackendUnreachable),
    }
}

/// Counts for the backend.
#[inline(always)]
fn tally<A: Family>(packet: &Packet<A>, found: &Found, packets: u64, bytes: u64) {
    match found.way {
        Way::Task => count::request(packet.flow.backend, packets, bytes),
        Way::Client => count::reply(packet.flow.backend, packets, bytes),
    }
}

/// Bytes of a buffer from the network header on.
#[inline(always)]
fn bytes<A>(frame: &Skb, packet: &Packet<A>) -> u64 {
    (frame.length() - packet.network()) as u64
}

/// Bytes of what the frame holds, without padding where it is one packet.
#[inline(always)]
fn packet_bytes<F: Frame, A>(frame: &F, packet: &Packet<A>) -> u64 {
    if frame.packets() == 1 { packet.bytes as u64 } else { (frame.length() - packet.network()) as u64 }
}

/// The hop to a backend. A local task's hardware address may not be known, and need not be: the buffer goes
/// straight to its device.
#[inline(always)]
pub fn backend_hop(backend: &Backend) -> Hop {
    let known = backend.kind != Kind::Local as u8 || backend.mac != [0; 6];
    Hop { destination: words(&backend.mac), source: words(&backend.source_mac), known }
}

/// Whether a local stack left the transport checksum to the device. A fragmented packet's sum covers more than this frame,
/// and an error has a sum of another kind; both are finished by whoever makes them.
#[inline(always)]
fn leaves_sum<A: Family>(frame: &XdpFrame, packet: &Packet<A>) -> bool {
    packet.form == WHOLE && unfinished(frame, &Place::of(packet), packet)
}

/// Whether the field for the transport checksum holds the pseudo header's sum. One finished sum in 65,536 looks the same;
/// TC is right about those too.
#[inline(always)]
pub fn unfinished<A: Family>(frame: &XdpFrame, place: &Place, packet: &Packet<A>) -> bool {
    let Some(field) = frame.at::<u16>(place.checksum()) else {
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
    put_link_header(frame).ok_or(Outcome::HandoverLost)?;
    packet.move_to(LINK);
    Ok(())
}

/// Puts a link header before a frame that has none, its addresses to be written. Packet pointers are void afterwards.
#[inline(always)]
pub fn put_link_header(frame: &Skb) -> Option<()> {
    // SAFETY: the context is the program's own; `at` checks the bounds of the header that is written.
    unsafe {
        if bpf_skb_change_head(frame.raw(), size_of::<Ethernet>() as u32, 0) != 0 {
            return None;
        }
        let ethernet = frame.at::<Ethernet>(0)?;
        (*ethernet).kind = (*frame.raw()).protocol as u16;
    }
    Some(())
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
    packet.move_to(size_of::<Ethernet>() as u16);
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

/// Leaves a frame, as it came, to TC.
#[inline(always)]
pub fn leave_to_tc(frame: &XdpFrame) -> i32 {
    if let Some(config) = maps::config() {
        note(frame, config, HANDOVER_DECIDE);
    }
    XDP_PASS as i32
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
