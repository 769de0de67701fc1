//! Source ports for flows that leave with an address of this node.
//!
//! The entry for replies *is* the reservation: its key holds the task's endpoint, so that the same port serves
//! flows to different tasks, and inserting it only where there is none keeps two flows apart.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::generated::bpf_get_prandom_u32,
};
use lb_common::{abi::Config, backend::Backend, flow::REPLY, net::Be16, outcome::Outcome};

use crate::{family::Family, maps, packet::Packet};

/// Ports tried for one flow. With nine tenths of a range in use, all fail once in thirty flows.
const TRIES: usize = 32;

/// Reserves a source port towards the backend and has the requests of the drafted flow leave with it.
#[inline(always)]
pub fn reserve<A: Family>(packet: &mut Packet<A>, backend: &Backend) -> Result<(), Outcome> {
    let config = maps::config().ok_or(Outcome::SnatPortsExhausted)?;
    let mut port = first_choice(config, packet.key.source_port);
    for _ in 0..TRIES {
        if claim(packet, backend, port) {
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
fn claim<A: Family>(packet: &mut Packet<A>, backend: &Backend, port: Be16) -> bool {
    let Packet { key: request, draft, reply, reply_key, .. } = packet;
    let (own, task) = (A::in_wide(&backend.source), A::in_wide(&backend.address));
    draft.rewrite.set(request, (own, port), (task, backend.port));
    reply_key.source = *task;
    reply_key.destination = *own;
    reply_key.source_port = backend.port;
    reply_key.destination_port = port;
    reply_key.protocol = request.protocol;
    reply_key._pad = 0;
    reply_key._pad2 = 0;
    let (listener, client) =
        ((&request.destination, request.destination_port), (&request.source, request.source_port));
    reply.rewrite.set(reply_key, listener, client);
    // Field by field: a copy of the whole would be a call of a loop.
    reply.backend = draft.backend;
    reply.generation = draft.generation;
    reply.seen = draft.seen;
    reply.hop_seen = draft.hop_seen;
    reply.client_mac = draft.client_mac;
    reply.node_mac = draft.node_mac;
    reply.tags = draft.tags;
    reply.role = REPLY;
    reply.state = 0;
    reply._pad = 0;
    if A::insert_flow(reply_key, reply, BPF_NOEXIST as u64).is_ok() {
        return true;
    }
    // What an earlier connection of the same client to the same listener left behind is ours to take.
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let own = A::flow(reply_key).is_some_and(|taken| unsafe { (*taken).rewrite == reply.rewrite });
    own && A::insert_flow(reply_key, reply, BPF_ANY as u64).is_ok()
}
