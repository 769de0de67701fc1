//! Live traffic: a generator whose frames travel as a network card's would, what they end in, and what forwards them
//! with nothing else to do.

use aya_ebpf::{
    Global,
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS},
    },
    btf_maps::{Array, PerCpuArray},
    helpers::generated::{bpf_ktime_get_ns, bpf_redirect},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use lb_bench_ebpf::{CLIENTS, FIRST_PORT, PORT_BITS, Stream, TIMED, Wanted};

use crate::{put, restore};

/// What is sent.
#[btf_map]
static STREAM: Array<Stream, 1> = Array::new();

/// What ought to arrive.
#[btf_map]
static WANTED: Array<Wanted, 1> = Array::new();

/// What has.
#[btf_map]
static ARRIVED: PerCpuArray<u64, 1> = PerCpuArray::new();

/// The last two bytes of the address at which each client's first packet arrived.
#[btf_map]
static CHOSEN: Array<u16, { CLIENTS as usize }> = Array::new();

/// Where `redirect` sends to; zero is back to where the frame came from.
#[unsafe(no_mangle)]
static INTERFACE: Global<u32> = Global::new(0);

/// Makes the next frame of the stream and sends it. Frames come back as the receiver has left them, so all of it is
/// written.
#[xdp]
pub fn generate(context: XdpContext) -> u32 {
    // SAFETY: one generator runs at a time, on one CPU.
    let Some(stream) = STREAM.get_ptr_mut(0).map(|stream| unsafe { &mut *stream }) else {
        return XDP_ABORTED;
    };
    let (data, end) = (context.data(), context.data_end());
    let client = restore(data, end, &mut stream.feed);
    let (port, address) = (client & ((1 << PORT_BITS) - 1), client >> PORT_BITS);
    let mut backend = 0;
    if stream.backend_at != 0 {
        backend = CHOSEN.get(client).map_or(0, |chosen| u32::from(*chosen));
        put(data, end, stream.backend_at, backend as u16);
    }
    add(data, end, stream.header_sum_at, address + backend);
    add(data, end, stream.sum_at, address + backend + port);
    if stream.frames & (TIMED - 1) == 0 {
        // SAFETY: the helper has no preconditions.
        stream.ended = unsafe { bpf_ktime_get_ns() };
        stream.timed = stream.frames;
        if stream.frames == 0 {
            stream.begun = stream.ended;
        }
    }
    stream.frames += 1;
    if stream.interface == 0 {
        return XDP_DROP;
    }
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(stream.interface, 0) as u32 }
}

/// Brings a checksum up to date where words that were zero have become others of this sum (RFC 1624, equation 3).
#[inline(always)]
fn add(data: usize, end: usize, at: u32, words: u32) {
    let field = data + (at as usize & 0xff);
    if field + 2 > end {
        return;
    }
    // SAFETY: the bounds were checked.
    let mut sum = words + u32::from(!u16::from_be(unsafe { (field as *const u16).read_unaligned() }));
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    put(data, end, at, !(sum as u16));
}

/// Counts what arrives as it ought to and ends it; the rest is the host's.
#[xdp]
pub fn sink_xdp(context: XdpContext) -> u32 {
    if arrives(context.data(), context.data_end()) { XDP_DROP } else { XDP_PASS }
}

/// The same for what arrives in socket buffers.
#[classifier]
pub fn sink_tc(context: TcContext) -> i32 {
    if arrives(context.data(), context.data_end()) { TC_ACT_SHOT } else { TC_ACT_UNSPEC }
}

/// Ethernet, IPv4 without options, and the ports.
const ADDRESS: usize = 14 + 12;
const HEADERS: usize = 14 + 20 + 4;
/// The flags of a TCP header.
const FLAGS: usize = 14 + 20 + 13;
const SYN: u8 = 2;

#[inline(always)]
fn arrives(data: usize, end: usize) -> bool {
    let Some(wanted) = WANTED.get(0) else {
        return false;
    };
    if data + HEADERS > end {
        return false;
    }
    // SAFETY: the bounds were checked.
    let word = |at: usize| u16::from_be(unsafe { ((data + at) as *const u16).read_unaligned() });
    let [source_low, network, destination_low, source_port, port] =
        [2, 4, 6, 8, 10].map(|offset| word(ADDRESS + offset));
    if word(12) != 0x0800 || network != wanted.network || port != wanted.port {
        return false;
    }
    if data + FLAGS < end {
        // SAFETY: the bounds were checked.
        let flags = unsafe { ((data + FLAGS) as *const u8).read() };
        let client = u32::from(source_low) << PORT_BITS | u32::from(source_port.wrapping_sub(FIRST_PORT));
        if flags == SYN
            && let Some(chosen) = CHOSEN.get_ptr_mut(client)
        {
            // SAFETY: the pointer is the table's; a client's SYN comes once.
            unsafe { chosen.write(destination_low) };
        }
    }
    if let Some(count) = ARRIVED.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's.
        unsafe { *count += 1 };
    }
    true
}

/// Sends every frame on as it is.
#[xdp(frags)]
pub fn redirect(context: XdpContext) -> u32 {
    let interface = match INTERFACE.load() {
        // SAFETY: the context is the program's own.
        0 => unsafe { (*context.ctx).ingress_ifindex },
        interface => interface,
    };
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(interface, 0) as u32 }
}

/// Ends every frame: what is left is the generator's own.
#[xdp(frags)]
pub fn discard(_: XdpContext) -> u32 {
    XDP_DROP
}
