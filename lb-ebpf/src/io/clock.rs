//! The clock of connections: the kernel's coarse ticks.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use lb_common::conntrack::{elapsed, line::HOP_TICK};

/// Jiffies, low 32 bits; 2 ns, against 45 for nanoseconds.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_jiffies64() as u32 }
}

/// How long a next hop is believed, in jiffies: 0.26 s at 1,000 Hz, 1.02 s at 250 Hz, 2.56 s at 100 Hz.
const LIFETIME: u32 = 256;

/// Whether something done at `then` is due again, about every second.
#[inline(always)]
pub fn is_due(then: u32, now: u32) -> bool {
    elapsed(then, now) >= LIFETIME
}

/// A time as a line keeps it of its next hop.
#[inline(always)]
pub fn hop_ticks(now: u32) -> u16 {
    (now / HOP_TICK) as u16
}

/// Whether a next hop that was asked for then is due again. After so long a silence that the short number has gone round (an hour at 250 Hz) it may look fresh for a second.
#[inline(always)]
pub fn hop_is_due(then: u16, now: u32) -> bool {
    hop_ticks(now).wrapping_sub(then) >= (LIFETIME / HOP_TICK) as u16
}

/// A time at which a next hop counts as due.
#[inline(always)]
pub fn hop_long_ago(now: u32) -> u16 {
    hop_ticks(now).wrapping_sub(u16::MAX / 2)
}
