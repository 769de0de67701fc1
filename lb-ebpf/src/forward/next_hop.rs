//! The next hop to a client, kept in its connection's line and asked for anew about once a second.
//!
//! A connection starts by answering to the hardware address its first packet came from. From then on the kernel's
//! routing and neighbour tables say better, at the price of one lookup a second and connection, and without anybody
//! in user space: a router that fails over is followed within that second, a neighbour that moves as soon as the
//! kernel's own probes notice. The same answer tells what the path lets pass, as far as the kernel knows it.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT, bpf_fib_lookup},
    helpers::generated::bpf_fib_lookup as fib_lookup,
};
use lb_common::{abi::Config, conntrack::line::DIRECT, net::Wide};

use super::nat::Hop;
use crate::{
    conntrack::table,
    io::{
        clock,
        family::Family,
        packet::{Connection, NOBODY, Packet},
    },
    wire::ethernet::{Mac, words},
};

/// What is known of the way to a client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The connection's hop is fresh.
    Known,
    /// It was just looked up: a packet through the kernel's own neighbour code keeps the entry alive.
    Confirm,
    /// The kernel has no neighbour entry: it must resolve one.
    Unresolved,
}

/// Whether the connection's hop may be used as it is. The routing table knows nothing of the tags a client's frames
/// carry: their hop stays as it was learnt.
#[inline(always)]
pub fn is_fresh<A>(connection: &Connection<A>) -> bool {
    connection.tags.outer.is_some() || !clock::hop_is_due(connection.hop_seen, clock::now())
}

/// The hop of the connection, by the uplink.
#[inline(always)]
pub fn hop<A>(config: &Config, connection: &Connection<A>) -> Hop {
    Hop { destination: connection.mac, source: words(&config.uplink_mac), known: true }
}

/// Renews the hop of the packet's connection if it is old, in the copy and in the line.
#[inline(always)]
pub fn refresh<A: Family>(context: *mut c_void, packet: &mut Packet<A>, uplink: u32) -> Next {
    if is_fresh(&packet.connection) {
        return Next::Known;
    }
    let connection = &mut packet.connection;
    let [a, b, c] = connection.mac;
    let known = a | b | c != 0;
    let tuple = &connection.tuple;
    let route =
        Route { family: A::NUMBER, uplink, to: tuple.source.to_wide(), from: tuple.destination.to_wide() };
    let next = match ask(context, &route, &mut connection.mac, &mut connection.mtu) {
        BPF_FIB_LKUP_RET_SUCCESS => Next::Confirm,
        BPF_FIB_LKUP_RET_NO_NEIGH => return Next::Unresolved,
        // No route by the uplink, or forwarding is off: go on answering to where the question came from. What came
        // through a peer, or was made again, shows no such place; the kernel's neighbour code asks less.
        _ if connection.link & DIRECT != 0 || !known => return Next::Unresolved,
        _ => Next::Known,
    };
    connection.hop_seen = clock::hop_ticks(clock::now());
    keep(packet);
    next
}

/// Keeps the hop in the connection's line.
#[inline(never)]
fn keep<A: Family>(packet: &Packet<A>) -> u32 {
    if packet.line.slot != NOBODY
        && let Some(entry) = table::entry::<A>(packet.line.slot)
        && entry.control().version() == (packet.line.control >> 32) as u32
    {
        entry.set_mac(packet.connection.mac);
        entry.set_mtu(packet.connection.mtu);
        entry.set_hop_seen(packet.connection.hop_seen);
    }
    0
}

/// What the routing table is asked: the way from an own address to a client, by the uplink.
struct Route {
    family: u8,
    uplink: u32,
    to: Wide,
    from: Wide,
}

/// `struct bpf_fib_lookup` of the kernel's user API, in words: the compiler would zero its byte arrays by
/// calling a loop.
#[repr(C)]
struct FibLookup {
    /// The family in the first byte, then the transport protocol; zero is any.
    family_and_protocol: u32,
    /// Any destination port, and in the upper half the length of the packet; in the answer what the route lets pass.
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

/// A length that every route lets pass: with none the kernel compares this very packet, and does not tell the route's.
const SHORT: u32 = 1;

/// Asks the routing and neighbour tables, and takes their hardware address and MTU if they have them; not inlined,
/// for the helper's parameters take an eighth of the stack.
#[inline(never)]
fn ask(context: *mut c_void, route: &Route, to: &mut Mac, mtu: &mut u16) -> u32 {
    let mut question = FibLookup {
        family_and_protocol: u32::from_ne_bytes([route.family, 0, 0, 0]),
        port_and_length: SHORT << 16,
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
        let [_, _, _, d, e, f] = question.macs;
        *to = [d, e, f];
        let path = question.port_and_length >> 16;
        *mtu = if path > SHORT { path as u16 } else { 0 };
    }
    answer
}
