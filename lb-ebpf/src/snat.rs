//! Source ports for flows that leave with an address of this node.
//!
//! The entry for replies *is* the reservation: its key holds the task's endpoint, so that the same port serves
//! flows to different tasks, and inserting it only where there is none keeps two flows apart.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::generated::bpf_get_prandom_u32,
};
use lb_common::{
    abi::Config,
    backend::Backend,
    flow::{Flow, FlowKey, REPLY},
    net::{Be16, TCP},
    outcome::Outcome,
};

use crate::{family::Family, maps, packet::Packet};

/// Ports tried for one flow. With nine tenths of a range in use, all fail once in thirty flows.
const TRIES: usize = 32;

/// Reserves a source port towards the backend and has the requests of the drafted flow leave with it.
#[inline(always)]
pub fn reserve<A: Family>(packet: &mut Packet<A>, backend: &Backend) -> Result<(), Outcome> {
    let config = maps::config().ok_or(Outcome::SnatPortsExhausted)?;
    let mut port = first_choice(config, packet.key.source_port);
    for _ in 0..TRIES {
        if claim(packet, backend, port, config.jiffies_per_second) {
            return Ok(());
        }
        port = any(config);
    }
    Err(Outcome::SnatPortsExhausted)
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

/// Puts the entry for replies in place and the port into the draft; false if another flow has this port.
#[inline(never)]
fn claim<A: Family>(packet: &mut Packet<A>, backend: &Backend, port: Be16, hz: u32) -> bool {
    let (own, task) = (A::in_wide(&backend.source), A::in_wide(&backend.address));
    packet.draft.rewrite.set(&packet.key, (own, port), (task, backend.port));
    let Packet { key, draft, reply, reply_key, .. } = packet;
    answer(key, draft, reply, reply_key);
    if A::insert_flow(reply_key, reply, BPF_NOEXIST as u64).is_ok() {
        return true;
    }
    let Some(taken) = A::flow(reply_key) else {
        return false;
    };
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let taken = unsafe { &*taken };
    // What an earlier connection of the same client to the same listener left behind is ours to take.
    if taken.rewrite == reply.rewrite {
        return A::insert_flow(reply_key, reply, BPF_ANY as u64).is_ok();
    }
    if !taken.expired(key.protocol == TCP, draft.seen, hz) {
        return false;
    }
    // So is what a flow holds that nobody heard of for long. Should a late request of it come, `look_after` finds
    // the port gone before the packet leaves.
    // Of several CPUs that are after the port, one removes it.
    A::delete_flow(reply_key).is_ok() && A::insert_flow(reply_key, reply, BPF_NOEXIST as u64).is_ok()
}

/// Keeps the entry for replies of a flow whose requests still come: refreshes it, or makes it anew where it was
/// evicted. False if the port has gone to another flow meanwhile.
#[inline(never)]
pub fn look_after<A: Family>(packet: &mut Packet<A>, flow: &Flow<A>) -> bool {
    let Packet { key, reply, reply_key, .. } = packet;
    answer(key, flow, reply, reply_key);
    let Some(there) = A::flow(reply_key) else {
        return A::insert_flow(reply_key, reply, BPF_NOEXIST as u64).is_ok();
    };
    // SAFETY: as above.
    let there = unsafe { &mut *there };
    let own = there.rewrite == reply.rewrite;
    if own {
        there.seen = flow.hop_seen;
    }
    own
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
    let listener = (&request.destination, request.destination_port);
    let client = (&request.source, request.source_port);
    reply.rewrite.set(key, listener, client);
    reply.backend = flow.backend;
    reply.generation = flow.generation;
    reply.seen = flow.hop_seen;
    reply.hop_seen = flow.hop_seen;
    reply.client_mac = flow.client_mac;
    reply.node_mac = flow.node_mac;
    reply.tags = flow.tags;
    reply.role = REPLY;
    reply.state = 0;
    reply.peer = 0;
}
