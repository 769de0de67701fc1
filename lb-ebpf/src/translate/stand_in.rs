//! The IPv4 address that a task with IPv6 alone has within its node, and the reverse.

use lb_common::{
    net::{Address as _, V4, V6},
    translation::is_stand_in,
};

use crate::io::maps::STAND_INS;

/// Whether an address stands in for a task here; who else has one of the range is left alone.
#[inline(always)]
pub fn is_one(address: V4) -> bool {
    is_stand_in(address) && own(address).is_some()
}

/// The task's own address.
#[inline(always)]
pub fn own(stand_in: V4) -> Option<&'static V6> {
    // SAFETY: an entry's memory stays while the program runs; whose is given anew meanwhile is a task that has ended.
    unsafe { STAND_INS.get(V6(stand_in.to_mapped())) }
}

/// What stands in for the task with this address.
#[inline(always)]
pub fn of(own: &V6) -> Option<V4> {
    // SAFETY: copied at once.
    unsafe { STAND_INS.get(own) }.map(|mapped| V4(mapped.0[3]))
}
