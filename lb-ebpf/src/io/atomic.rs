//! Atomic operations on a table's words. The target has the instructions, but the standard library offers them only where there
//! is all of them; on the host, where this is only checked, std stands in. All are full barriers: with relaxed ordering LLVM 22
//! emits forms that do not fetch, and takes their operand for the result.

macro_rules! atomics {
    ($($(#[doc = $doc:literal])+ $name:ident($type:ident, $atomic:ident): $intrinsic:ident, $method:ident;)+) => {$(
        $(#[doc = $doc])+
        ///
        /// # Safety
        /// `at` is aligned, and valid for reads and writes.
        #[inline(always)]
        pub unsafe fn $name(at: *mut $type, operand: $type) -> $type {
            #[cfg(target_arch = "bpf")]
            {
                use core::intrinsics::AtomicOrdering;
                // SAFETY: the caller's.
                let before = unsafe { atomics!(@call $intrinsic, $type, at, operand) };
                lb_common::verifier::opaque(before as u64) as $type
            }
            #[cfg(not(target_arch = "bpf"))]
            {
                use core::sync::atomic::{$atomic, Ordering};
                // SAFETY: the caller's.
                unsafe { $atomic::from_ptr(at) }.$method(operand, Ordering::SeqCst)
            }
        }
    )+};
    (@call atomic_xchg, $type:ident, $at:ident, $operand:ident) => {
        core::intrinsics::atomic_xchg::<$type, { AtomicOrdering::SeqCst }>($at, $operand)
    };
    (@call $intrinsic:ident, $type:ident, $at:ident, $operand:ident) => {
        core::intrinsics::$intrinsic::<$type, $type, { AtomicOrdering::SeqCst }>($at, $operand)
    };
}

atomics! {
    /// Adds; what was there before.
    fetch_add(u64, AtomicU64): atomic_xadd, fetch_add;
    /// Keeps the bits of the operand; what was there before.
    fetch_and(u32, AtomicU32): atomic_and, fetch_and;
    /// Sets the bits of the operand; what was there before.
    fetch_or(u32, AtomicU32): atomic_or, fetch_or;
    /// Exchanges; what was there before.
    swap(u64, AtomicU64): atomic_xchg, swap;
}

macro_rules! compare_and_swap {
    ($($(#[doc = $doc:literal])+ $name:ident($type:ident, $atomic:ident);)+) => {$(
        $(#[doc = $doc])+
        ///
        /// # Safety
        /// `at` is aligned, and valid for reads and writes.
        #[inline(always)]
        pub unsafe fn $name(at: *mut $type, from: $type, to: $type) -> bool {
            #[cfg(target_arch = "bpf")]
            {
                use core::intrinsics::{AtomicOrdering, atomic_cxchg};
                // SAFETY: the caller's.
                unsafe {
                    atomic_cxchg::<$type, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, from, to).0 == from
                }
            }
            #[cfg(not(target_arch = "bpf"))]
            {
                use core::sync::atomic::{$atomic, Ordering};
                // SAFETY: the caller's.
                unsafe { $atomic::from_ptr(at) }
                    .compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
            }
        }
    )+};
}

compare_and_swap! {
    /// Writes `to` if `from` is there; whether it was.
    swap_if64(u64, AtomicU64);
    /// Writes `to` if `from` is there; whether it was.
    swap_if32(u32, AtomicU32);
}
