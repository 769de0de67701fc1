//! Who may connect to a service whose listeners are [`crate::endpoint::RESTRICTED`]: of the ranges that have a client's address
//! the narrowest decides. And whom no service takes ([`EVERY_SERVICE`]), which is asked if [`crate::abi::DENIES`] is set.

use crate::{net::Wide, pod};

/// A range of clients' addresses of one service, as the key of a trie after the length of its prefix.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AccessKey {
    /// Index of the service.
    pub service: u32,
    /// First address of the range, IPv4 as an IPv4-mapped one; network order.
    pub address: Wide,
}

/// Bits of a key before its address.
pub const SERVICE_BITS: u32 = u32::BITS;
/// All bits of a key.
pub const KEY_BITS: u32 = SERVICE_BITS + 128;

/// Stands for every service: whom its ranges deny no service takes, whatever its own list says.
pub const EVERY_SERVICE: u32 = u32::MAX;

/// Its clients may connect.
pub const ALLOWED: u32 = 1;
/// They may not.
pub const DENIED: u32 = 2;

const _: () = assert!(size_of::<AccessKey>() == 20);

pod!(AccessKey);
