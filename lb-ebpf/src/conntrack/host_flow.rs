//! What the host itself sends from a published port: noted where it leaves, asked for where a datagram would begin a connection.

use aya_ebpf::bindings::BPF_ANY;
use lb_common::{
    conntrack::{FiveTuple, is_within},
    host_flow::{HOST_FLOW_SECONDS, HostFlow},
    net::Be16,
};

use crate::io::{
    clock,
    family::Family,
    maps::{self, HOST_FLOWS},
};

/// Notes a datagram that the host sends. One look a packet, one write a second.
#[inline(never)]
pub fn note<A: Family>(key: &FiveTuple<A>) -> i32 {
    let flow = between(&key.destination, key.destination_port, &key.source, key.source_port);
    let now = clock::now();
    if is_noted(&flow, now, 1) {
        return 0;
    }
    HOST_FLOWS.insert(flow, now, BPF_ANY as u64).err().unwrap_or(0)
}

/// Whether a datagram that came in answers one that the host has sent.
#[inline(never)]
pub fn is_answer<A: Family>(key: &FiveTuple<A>) -> bool {
    let flow = between(&key.source, key.source_port, &key.destination, key.destination_port);
    is_noted(&flow, clock::now(), HOST_FLOW_SECONDS)
}

#[inline(always)]
fn between<A: Family>(remote: &A, remote_port: Be16, local: &A, local_port: Be16) -> HostFlow {
    HostFlow { remote: remote.to_mapped(), local: local.to_mapped(), remote_port, local_port }
}

#[inline(always)]
fn is_noted(flow: &HostFlow, now: u32, seconds: u32) -> bool {
    let hz = maps::config().map_or(1, |config| config.jiffies_per_second);
    // SAFETY: copied at once.
    unsafe { HOST_FLOWS.get(flow) }
        .copied()
        .is_some_and(|seen| is_within(seen, now, seconds.wrapping_mul(hz)))
}
