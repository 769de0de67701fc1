//! Source ports for flows that leave with an address of this node.
//!
//! The entry for replies *is* the reservation: its key holds the task's endpoint, so that the same port serves
//! flows to different tasks, and inserting it only where there is none keeps two flows apart.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::generated::bpf_get_prandom_u32};
use lb_common::{
    abi::Config,
    backend::Backend,
    checksum::Delta,
    flow::{ACK, Flow, FlowKey, REPLY},
    net::Be16,
    outcome::Outcome,
};

use crate::{family::Family, heal, maps, packet::Packet, track};

/// Ports tried for one flow. With nine tenths of a range in use, all fail once in thirty flows.
const TRIES: usize = 32;

/// Reserves a source port towards the backend and has the requests of the flow that is being made leave with it.
#[inline(always)]
pub fn reserve<A: Family>(packet: &mut Packet<A>, backend: &Backend) -> Result<(), Outcome> {
    match free_port(packet, backend) {
        NO_PORT => Err(Outcome::SnatPortsExhausted),
        port if claim(packet, backend, Be16::from_raw(port as u16)) => Ok(()),
        // Another CPU was faster: the client will send again.
        _ => Err(Outcome::BackendUnreachable),
    }
}

/// Stands for no port: none is as high.
const NO_PORT: u32 = u32::MAX;

/// A port that no flow to the backend has, network order.
#[inline(never)]
fn free_port<A: Family>(packet: &mut Packet<A>, backend: &Backend) -> u32 {
    let Some(config) = maps::config() else {
        return NO_PORT;
    };
    let Packet { key, reply_key, .. } = packet;
    reply_key.source = *A::in_wide(&backend.address);
    reply_key.destination = *A::in_wide(&backend.source);
    reply_key.source_port = backend.port;
    reply_key.protocol = key.protocol;
    reply_key._pad = 0;
    reply_key._pad2 = 0;
    let mut port = first_choice(config, key.source_port);
    for _ in 0..TRIES {
        packet.reply_key.destination_port = port;
        if is_free(packet, backend.service) {
            return port.raw() as u32;
        }
        port = any(config);
    }
    NO_PORT
}

/// Whether no flow has the port in the key for replies. What an earlier connection of the same client to the same
/// listener left behind is ours to take, and what a flow holds that nobody heard of for long. Should a late request of
/// that come, [`look_after`] finds the port gone before the packet leaves.
#[inline(never)]
fn is_free<A: Family>(packet: &Packet<A>, service: u32) -> bool {
    let Some(taken) = A::any_flow(&packet.reply_key) else {
        return true;
    };
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let taken = unsafe { &*taken };
    let (key, rewrite) = (&packet.key, &taken.rewrite);
    let own = (rewrite.destination == key.source && rewrite.destination_port == key.source_port)
        && (rewrite.source == key.destination && rewrite.source_port == key.destination_port);
    // Of several CPUs that are after the port, one removes it.
    (own || track::expired(taken, packet.is_tcp(), service)) && A::delete_flow(&packet.reply_key).is_ok()
}

/// The client's own port where it cannot clash with a connection of the host itself, else any of the range.
#[inline(always)]
fn first_choice(config: &Config, port: Be16) -> Be16 {
    let [low, high] = config.host_ports;
    if port.get() < 1024 || (low <= port.get() && port.get() <= high) { any(config) } else { port }
}

#[inline(always)]
fn any(config: &Config) -> Be16 {
    let [low, high] = config.snat_ports;
    // SAFETY: the helper has no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    Be16::new(low.wrapping_add((random % (high.wrapping_sub(low) as u32 + 1)) as u16))
}

/// Puts the entry for replies in place and the port into the flow; false if another flow has this port now.
#[inline(never)]
fn claim<A: Family>(packet: &mut Packet<A>, backend: &Backend, port: Be16) -> bool {
    let (own, task) = (A::in_wide(&backend.source), A::in_wide(&backend.address));
    packet.flow.rewrite.set(&packet.key, (own, port), (task, backend.port));
    let Packet { key, flow, reply, reply_key, .. } = packet;
    answer(key, flow, reply, reply_key);
    A::HALF_OPEN.insert(reply_key, reply, BPF_NOEXIST as u64).is_ok()
}

/// Keeps the entry for replies of the packet's flow, whose requests still come: refreshes it, or makes it anew where it
/// was evicted. False if the port has gone to another flow meanwhile.
#[inline(never)]
pub fn look_after<A: Family>(packet: &mut Packet<A>) -> bool {
    let Packet { key, flow, reply, reply_key, flags, acknowledgment, .. } = packet;
    answer(key, flow, reply, reply_key);
    if let Some(there) = A::any_flow(reply_key) {
        // SAFETY: as above.
        let there = unsafe { &mut *there };
        if !there.rewrite.leads_as(&reply.rewrite) {
            return false;
        }
        there.seen = flow.hop_seen;
        // One that was made again of its spare does not know the way to the client.
        if !there.has_hop() {
            there.client_mac = flow.client_mac;
            there.node_mac = flow.node_mac;
            there.tags = flow.tags;
            there.hop_seen = flow.hop_seen;
        }
        return true;
    }
    // What the task has sent since is seen by that entry alone, and acknowledged here.
    if *flags & ACK != 0 {
        reply.task_next = *acknowledgment;
    }
    // Where its request's is. Should another CPU be faster, the next look tells whose entry that is.
    let _ = if flow.established() {
        A::FLOWS.insert(reply_key, reply, BPF_NOEXIST as u64)
    } else {
        A::HALF_OPEN.insert(reply_key, reply, BPF_NOEXIST as u64)
    };
    true
}

/// The entry, and its key, by which the replies to a request find their way back. Field by field: copying a
/// structure whole would be a call of a loop.
#[inline(always)]
fn answer<A: Family>(request: &FlowKey<A>, flow: &Flow<A>, reply: &mut Flow<A>, key: &mut FlowKey<A>) {
    key.source = flow.rewrite.destination;
    key.destination = flow.rewrite.source;
    key.source_port = flow.rewrite.destination_port;
    key.destination_port = flow.rewrite.source_port;
    key.protocol = request.protocol;
    key._pad = 0;
    key._pad2 = 0;
    let (there, back) = (&flow.rewrite, &mut reply.rewrite);
    back.source = request.destination;
    back.destination = request.source;
    back.source_port = request.destination_port;
    back.destination_port = request.source_port;
    back.address_delta = Delta::from_raw(there.address_delta).reversed().raw();
    back.port_delta = Delta::from_raw(there.port_delta).reversed().raw();
    reply.backend = flow.backend;
    reply.generation = flow.generation;
    reply.seen = flow.hop_seen;
    reply.hop_seen = flow.hop_seen;
    reply.client_mac = flow.client_mac;
    reply.node_mac = flow.node_mac;
    reply.tags = flow.tags;
    reply.role = REPLY;
    reply.state = flow.state;
    reply.peer = 0;
    reply.client_next = flow.client_next;
    reply.task_next = flow.task_next;
}

/// Tells the other entry of the packet's flow what became of its state: each sees the packets of one side alone.
#[inline(never)]
pub fn tell<A: Family>(packet: &mut Packet<A>) -> i32 {
    heal::set_twin(&packet.flow, packet.key.protocol, &mut packet.reply_key);
    if let Some(there) = A::any_flow(&packet.reply_key) {
        // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
        let there = unsafe { &mut *there };
        there.state |= packet.flow.state;
        if packet.flow.is_reply() {
            there.task_next = packet.flow.task_next;
        } else {
            there.client_next = packet.flow.client_next;
        }
    }
    0
}

/// Moves the entry for replies of an established flow to where the flow is, if it has one.
#[inline(never)]
pub fn establish<A: Family>(packet: &mut Packet<A>) -> i32 {
    heal::set_twin(&packet.flow, packet.key.protocol, &mut packet.reply_key);
    if let Some(there) = A::half_open(&packet.reply_key) {
        // SAFETY: as above.
        unsafe { packet.reply.copy_from(there) };
        track::move_over(&packet.reply_key, there, &packet.reply);
    }
    0
}
