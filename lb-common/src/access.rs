//! Who may connect to a service whose listeners are [`crate::endpoint::RESTRICTED`]: of the ranges that have a client's address
//! the narrowest decides. And whom no service takes ([`every_service`]), which is asked if [`crate::abi::DENIES`] is set.

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

/// What stands for every service in a key, by the family of the clients: whom its ranges deny no service takes, whatever its own list
/// says. A number for each family, because a range of IPv6 may have all IPv4 addresses in it, as they are mapped.
#[inline(always)]
pub const fn every_service(v4: bool) -> u32 {
    if v4 { u32::MAX } else { LAST_SERVICE + 1 }
}

/// No service has a greater number.
pub const LAST_SERVICE: u32 = u32::MAX - 2;

/// Its clients may connect.
pub const ALLOWED: u32 = 1;
/// They may not.
pub const DENIED: u32 = 2;

const _: () = assert!(size_of::<AccessKey>() == 20);

pod!(AccessKey);
