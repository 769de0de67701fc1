//! What the kernel and the user side of the balancer share: the keys and values of every table, the names
//! of the counters, and the checksum arithmetic.
//!
//! This crate owns layouts and meaning, never I/O. Every type in a table is `#[repr(C)]`, has its padding
//! spelled out, and holds neither `bool` nor `enum`: a byte read back from a map may hold anything.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod abi;
pub mod access;
pub mod backend;
pub mod budget;
pub mod checksum;
pub mod conntrack;
pub mod endpoint;
pub mod filter;
pub mod fragment;
pub mod guard;
pub mod host_flow;
pub mod net;
pub mod outcome;
pub mod service;
pub mod slot;
pub mod stats;
pub mod tags;
pub mod translation;
pub mod tunnel;
pub mod verifier;

/// Declares that a type is plain data without padding, so that user space may copy it to and from a map.
macro_rules! pod {
    ($($type:ty),+ $(,)?) => {$(
        // SAFETY: the type is `#[repr(C)]`, has no implicit padding (asserted on its size beside it) and every
        // bit pattern is a valid value of it.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    )+};
}
pub(crate) use pod;
