//! The sum over a whole datagram, which no helper makes: block by block, over a copy of it.

use core::ptr::null_mut;

use aya_ebpf::helpers::generated::bpf_csum_diff;
use lb_common::checksum::fold;

use super::{
    packet::{Cutting, OFFSETS},
    verifier::opaque,
};

/// Bytes of a datagram that can be summed up, at most: more than a jumbo frame has.
pub const LONGEST: u32 = 9_216;
/// Bytes that the kernel sums up at once before 6.15.
const BLOCK: u32 = 512;

/// The checksum over what was read, and so much more. Never zero, which says that there is no sum (RFC 768).
#[inline(always)]
pub fn of(cutting: &mut Cutting, more: u32) -> u64 {
    let bytes = opaque(cutting.bytes as u64) as u32 & OFFSETS;
    // The sum is one of words of four bytes; what lies behind the last one's first is of another datagram.
    for byte in 0..3 {
        cutting.payload[bytes as usize + byte] = 0;
    }
    let mut sum = more as u64;
    for block in 0..LONGEST / BLOCK {
        sum = sum_up(cutting, block * BLOCK, sum as u32);
    }
    match !fold((sum as u32 & 0xffff) + (sum as u32 >> 16)) {
        0 => u16::MAX as u64,
        sum => sum as u64,
    }
}

/// Adds a block of the packet's bytes to their sum.
#[inline(never)]
fn sum_up(cutting: &Cutting, from: u32, sum: u32) -> u64 {
    let rest = (cutting.bytes.saturating_sub(from)).next_multiple_of(4);
    let length = opaque(if rest < BLOCK { rest } else { BLOCK } as u64) as u32 & (2 * BLOCK - 4);
    // SAFETY: the block lies in the entry.
    let block = unsafe { cutting.payload.as_ptr().add(from as usize & OFFSETS as usize) };
    // SAFETY: the helper reads the block alone.
    unsafe { bpf_csum_diff(null_mut(), 0, block.cast_mut().cast(), length, sum) as u32 as u64 }
}
