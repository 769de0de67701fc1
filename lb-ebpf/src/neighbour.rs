//! The next hop to a client, kept in its flow and asked for anew about once a second.
//!
//! A flow starts by answering to the hardware address its first packet came from. From then on the kernel's
//! routing and neighbour tables say better, at the price of one lookup a second and flow, and without anybody
//! in user space: a router that fails over is followed within that second, a neighbour that moves as soon as the
//! kernel's own probes notice.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT, bpf_fib_lookup},
    helpers::generated::{bpf_fib_lookup as fib_lookup, bpf_jiffies64},
};
use lb_common::{
    flow::{Flow, REPLY_DIRECT, REQUEST, elapsed},
    net::Wide,
};

use crate::{
    family::Family,
    packet::{Packet, mac},
    rewrite::{Hop, words},
};

/// What is known of the way to a client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The flow's hop is fresh.
    Known,
    /// It was just looked up: a packet through the kernel's own neighbour code keeps the entry alive.
    Confirm,
    /// The kernel has no neighbour entry: it must resolve one.
    Unresolved,
}

/// The kernel's clock of coarse ticks; 2 ns, against 45 for nanoseconds.
#[inline(always)]
pub fn jiffies() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_jiffies64() }
}

/// How long a hop is believed, in jiffies: 0.26 s at 1,000 Hz, 1.02 s at 250 Hz, 2.56 s at 100 Hz.
pub const LIFETIME: u32 = 256;

/// Whether something done at `then` is due again, about every second.
#[inline(always)]
pub fn is_due(then: u32, now: u32) -> bool {
    elapsed(then, now) >= LIFETIME
}

/// Whether the flow's hop may be used as it is. The routing table knows nothing of the tags a client's frames
/// carry: their hop stays as it was learnt.
#[inline(always)]
pub fn is_fresh<A>(flow: &Flow<A>) -> bool {
    flow.tags.outer.is_some() || !is_due(flow.hop_seen, jiffies() as u32)
}

/// The hop in the flow.
#[inline(always)]
pub fn hop<A>(flow: &Flow<A>) -> Hop {
    Hop { destination: words(&flow.client_mac), source: words(&flow.node_mac), known: true }
}

/// Renews the hop of the packet's flow if it is old, in the copy and in the entry.
#[inline(always)]
pub fn refresh<A: Family>(context: *mut c_void, packet: &mut Packet<A>, route: &Route) -> Next {
    let flow = &mut packet.flow;
    if is_fresh(flow) {
        return Next::Known;
    }
    let now = jiffies() as u32;
    let next = match ask(context, route, &mut flow.client_mac, &mut flow.node_mac) {
        BPF_FIB_LKUP_RET_SUCCESS => Next::Confirm,
        BPF_FIB_LKUP_RET_NO_NEIGH => return Next::Unresolved,
        // No route by the uplink, or forwarding is off: go on answering to where the question came from. What came
        // through a peer, or was made again, shows no such place; the kernel's neighbour code asks less.
        _ if flow.role == REPLY_DIRECT || !flow.has_hop() => return Next::Unresolved,
        _ => Next::Known,
    };
    flow.hop_seen = now;
    keep(packet);
    next
}

/// Keeps the hop in the flow's entry. An answer to a request finds the entry by the request's key.
#[inline(never)]
fn keep<A: Family>(packet: &Packet<A>) -> i32 {
    let flow = &packet.flow;
    let key = if flow.role == REQUEST { &packet.flow_key } else { &packet.key };
    if let Some(there) = A::any_flow(key) {
        // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
        unsafe {
            (*there).client_mac = flow.client_mac;
            (*there).node_mac = flow.node_mac;
            (*there).hop_seen = flow.hop_seen;
        }
    }
    0
}

/// What the routing table is asked.
pub struct Route {
    family: u8,
    uplink: u32,
    to: Wide,
    from: Wide,
}

impl Route {
    /// The way from an own address to a client, by the uplink.
    #[inline(always)]
    pub fn new<A: Family>(to: &A, from: &A, uplink: u32) -> Self {
        Self { family: A::NUMBER, uplink, to: to.to_wide(), from: from.to_wide() }
    }
}

/// `struct bpf_fib_lookup` of the kernel's user API, in words: the compiler would zero its byte arrays by
/// calling a loop.
#[repr(C)]
struct FibLookup {
    /// The family in the first byte, then the transport protocol; zero is any.
    family_and_protocol: u32,
    /// Any destination port, and no length of our own.
    port_and_length: u32,
    ifindex: u32,
    flow_info: u32,
    source: Wide,
    destination: Wide,
    vlan: u32,
    /// Source and destination hardware address, six bytes each.
    macs: [u16; 6],
}

const _: () = assert!(size_of::<FibLookup>() == size_of::<bpf_fib_lookup>());

/// Asks the routing and neighbour tables, and takes their hardware addresses if they have them; not inlined,
/// for the helper's parameters take an eighth of the stack.
#[inline(never)]
fn ask(context: *mut c_void, route: &Route, to: &mut [u8; 6], from: &mut [u8; 6]) -> u32 {
    let mut question = FibLookup {
        family_and_protocol: u32::from_ne_bytes([route.family, 0, 0, 0]),
        port_and_length: 0,
        ifindex: route.uplink,
        flow_info: 0,
        source: route.from,
        destination: route.to,
        vlan: 0,
        macs: [1, 2, 3, 4, 5, 6],
    };
    // SAFETY: the context is the program's own, the structure is on the stack and of the size passed.
    let answer = unsafe {
        fib_lookup(context, (&raw mut question).cast(), size_of::<FibLookup>() as i32, BPF_FIB_LOOKUP_OUTPUT)
    } as u32;
    if answer == BPF_FIB_LKUP_RET_SUCCESS {
        let [a, b, c, d, e, f] = question.macs;
        *from = mac([a, b, c]);
        *to = mac([d, e, f]);
    }
    answer
}
