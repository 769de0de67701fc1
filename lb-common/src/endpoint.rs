//! Listeners (where a service answers) and its tasks' endpoints (where replies come from).

use crate::{
    net::{Be16, V4, V6},
    pod,
};

/// An address, protocol and port: the key of a listener, or of the tasks' side of a connection.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord, Default)]
pub struct Endpoint<A> {
    /// Network order.
    pub address: A,
    /// Network order.
    pub port: Be16,
    /// IP protocol number, [`crate::net::TCP`] or [`crate::net::UDP`].
    pub protocol: u8,
    /// Zero.
    pub _pad: u8,
}

impl<A> Endpoint<A> {
    /// An endpoint with its padding zeroed.
    #[inline(always)]
    pub const fn new(address: A, port: Be16, protocol: u8) -> Self {
        Self { address, port, protocol, _pad: 0 }
    }
}

/// What a listener leads to: a range of the slot table.
///
/// A whole value is replaced at once by an update of the hash table, so that base and count always belong
/// together.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Listener {
    /// Index of the service and of its counters.
    pub service: u32,
    /// First slot.
    pub slot_base: u32,
    /// Number of slots; zero when no task is eligible.
    pub slot_count: u32,
    /// Index of the published port's round-robin cursor.
    pub cursor: u32,
    /// [`CONSISTENT`], [`RESTRICTED`], [`AFFINE`], [`CLOSED`], [`RANDOM`], [`LEAST`], [`LIMITED`]; from [`IGNORED_SHIFT`] on a number.
    pub flags: u32,
}

/// New connections of a listener are placed by a hash of their five-tuple, so that one whose line is lost is found again.
pub const CONSISTENT: u32 = 1;
/// Not everybody may connect: [`crate::access`].
pub const RESTRICTED: u32 = 2;
/// Beside [`CONSISTENT`]: the hash is of the client's address alone, so that a client gets the same task whatever node, address and
/// port it uses.
pub const AFFINE: u32 = 4;
/// There are tasks, and none of them is to get new connections here: those are refused instead of being passed to the host, whose
/// mesh would give them to one.
pub const CLOSED: u32 = 8;
/// New connections are given to any of the slots by chance, and not in turn.
pub const RANDOM: u32 = 16;
/// New connections are given to the task that has the fewest open ones for its weight, [`crate::slot::Slot`].
pub const LEAST: u32 = 32;
/// A task may have no more than so many connections: [`crate::service::Settings::task_connections`].
pub const LIMITED: u32 = 64;
/// From this bit on, beside [`AFFINE`]: how many of the last bits of a client's address do not count, of IPv6 none or at least 64.
pub const IGNORED_SHIFT: u32 = 24;

/// What is known of one port of one task, keyed by its [`Endpoint`]: for packets of it that have no line in the connection
/// table.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct TaskEndpoint<A> {
    /// Index of its backend.
    pub backend: u32,
    /// The listener that leads to it, if a single one does. Network order.
    pub listener: A,
    /// Its port, network order; zero if none or several do.
    pub listener_port: Be16,
    /// Zero.
    pub _pad: u16,
}

const _: () = {
    assert!(size_of::<Endpoint<V4>>() == 8 && align_of::<Endpoint<V4>>() == 4);
    assert!(size_of::<Endpoint<V6>>() == 20 && align_of::<Endpoint<V6>>() == 4);
    assert!(size_of::<Listener>() == 20);
    assert!(size_of::<TaskEndpoint<V4>>() == 12 && size_of::<TaskEndpoint<V6>>() == 24);
};

pod!(Endpoint<V4>, Endpoint<V6>, Listener, TaskEndpoint<V4>, TaskEndpoint<V6>);
