//! The programs of the benches.
//!
//! BPF_PROG_TEST_RUN repeats a program on one and the same frame, as the last run left it: a balancer would find its own
//! work there. So a feeder is run instead. It puts the frame back as it was, for the next client, and goes on with the
//! program that is measured by a tail call, which does not return. Its own time is what the same feeder takes with a
//! program that does nothing.
// On the host, where this is only checked and never run, std stands in.
#![cfg_attr(target_arch = "bpf", no_std)]
#![no_main]
#![expect(
    missing_docs,
    reason = "the macros of the entry points wrap them in functions without documentation"
)]

mod live;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_ABORTED, XDP_PASS, XDP_TX},
    },
    btf_maps::{Array, ProgramArray},
    helpers::generated::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use lb_bench_ebpf::{FIRST_PORT, FRAME, Feed, GROWN, PORT_BITS};

#[btf_map]
static FEED: Array<Feed, 1> = Array::new();

#[btf_map]
static FED_XDP: ProgramArray<1> = ProgramArray::new();

#[btf_map]
static FED_XDP_LINEAR: ProgramArray<1> = ProgramArray::new();

#[btf_map]
static FED_TC: ProgramArray<1> = ProgramArray::new();

#[xdp(frags)]
pub fn feed_xdp(context: XdpContext) -> u32 {
    if restore_xdp(&context).is_some() {
        // SAFETY: nothing here needs to be dropped.
        unsafe { FED_XDP.tail_call(&context, 0) };
    }
    XDP_ABORTED
}

#[xdp]
pub fn feed_xdp_linear(context: XdpContext) -> u32 {
    if restore_xdp(&context).is_some() {
        // SAFETY: as above.
        unsafe { FED_XDP_LINEAR.tail_call(&context, 0) };
    }
    XDP_ABORTED
}

#[classifier]
pub fn feed_tc(context: TcContext) -> i32 {
    if let Some(feed) = feed() {
        restore(context.data(), context.data_end(), feed);
        // SAFETY: as above.
        unsafe { FED_TC.tail_call(&context, 0) };
    }
    TC_ACT_SHOT
}

#[inline(always)]
fn feed() -> Option<&'static mut Feed> {
    // SAFETY: a bench feeds one program at a time, on one CPU.
    FEED.get_ptr_mut(0).map(|feed| unsafe { &mut *feed })
}

/// Takes off what the last run has put before the frame, and puts the frame back.
#[inline(always)]
fn restore_xdp(context: &XdpContext) -> Option<()> {
    let feed = feed()?;
    let noted = context.data() as i64 - context.metadata() as i64;
    // SAFETY: the context is the program's own.
    if noted > 0 && unsafe { bpf_xdp_adjust_meta(context.as_ptr().cast(), noted as i32) } != 0 {
        return None;
    }
    let more = (context.data_end() as i64 - context.data() as i64) - feed.length as i64;
    // SAFETY: as above.
    if more != 0 && unsafe { bpf_xdp_adjust_head(context.as_ptr().cast(), more as i32) } != 0 {
        return None;
    }
    restore(context.data(), context.data_end(), feed);
    Some(())
}

/// Writes the frame and, into it, whose it is; that client's number.
#[inline(always)]
fn restore(data: usize, end: usize, feed: &mut Feed) -> u32 {
    let from = feed.frame.as_ptr().cast::<u64>();
    for word in 0..FRAME / 8 {
        let to = data + word * 8;
        if (word as u32) * 8 >= feed.length || to + 8 > end {
            break;
        }
        // SAFETY: the bounds were checked; the feed's frame has as many words.
        unsafe { (to as *mut u64).write_unaligned(from.add(word).read()) };
    }
    let client = if feed.scattered != 0 {
        feed.next = feed.next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        feed.next >> 8
    } else {
        feed.next = feed.next.wrapping_add(1);
        feed.next
    } & feed.mask;
    let (port, address) = (client & ((1 << PORT_BITS) - 1), client >> PORT_BITS);
    put(data, end, feed.port_at, FIRST_PORT + port as u16);
    put(data, end, feed.address_at, address as u16);
    client
}

/// Writes a word in network order.
#[inline(always)]
fn put(data: usize, end: usize, at: u32, word: u16) {
    let to = data + (at as usize & 0xff);
    if to + 2 <= end {
        // SAFETY: the bounds were checked.
        unsafe { (to as *mut u16).write_unaligned(word.to_be()) };
    }
}

#[xdp(frags)]
pub fn pass(_: XdpContext) -> u32 {
    XDP_PASS
}

#[xdp]
pub fn pass_linear(_: XdpContext) -> u32 {
    XDP_PASS
}

#[xdp(frags)]
pub fn grow(context: XdpContext) -> u32 {
    // SAFETY: the context is the program's own.
    match unsafe { bpf_xdp_adjust_head(context.as_ptr().cast(), -(GROWN as i32)) } {
        0 => XDP_TX,
        _ => XDP_ABORTED,
    }
}

#[xdp(frags)]
pub fn note(context: XdpContext) -> u32 {
    // SAFETY: the context is the program's own.
    match unsafe { bpf_xdp_adjust_meta(context.as_ptr().cast(), -8) } {
        0 => XDP_PASS,
        _ => XDP_ABORTED,
    }
}

#[xdp(frags)]
pub fn transmit(_: XdpContext) -> u32 {
    XDP_TX
}

#[classifier]
pub fn nothing(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // No path leads here: the build refuses an object that holds a panic.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
