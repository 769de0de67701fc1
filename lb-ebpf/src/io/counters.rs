//! Counters. All but [`open`] are per CPU: an add is a plain memory write.

use lb_common::{
    conntrack::line::{ALIAS, ANSWERED, ONE_WAY, RESET, UDP},
    net::Address,
    stats::{Open, TableStats},
};

use super::{
    atomic,
    maps::{BACKEND_STATS, OPEN, OUTCOMES, SERVICE_STATS, SERVICES, TABLE_STATS},
    verifier::opaque,
};

/// Counts what became of `packets` packets: an [`Outcome`](lb_common::outcome::Outcome)'s discriminant.
#[inline(always)]
pub fn outcome(outcome: u32, packets: u64) {
    if let Some(counter) = OUTCOMES.get_ptr_mut(outcome) {
        // SAFETY: the slot is this CPU's own, and a program is not preempted by another on its CPU.
        unsafe { *counter += packets };
    }
}

/// Counts packets and bytes on their way to a task.
#[inline(always)]
pub fn request(backend: u32, packets: u64, bytes: u64) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(backend) {
        // SAFETY: as above.
        unsafe {
            (*stats).request_packets += packets;
            (*stats).request_bytes += bytes;
        }
    }
}

/// Counts packets and bytes on their way from a task.
#[inline(always)]
pub fn reply(backend: u32, packets: u64, bytes: u64) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(backend) {
        // SAFETY: as above.
        unsafe {
            (*stats).reply_packets += packets;
            (*stats).reply_bytes += bytes;
        }
    }
}

/// Counts a new connection to a backend of a service.
#[inline(always)]
pub fn new_connection(service: u32, backend: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: as above.
        unsafe { (*stats).connections += 1 };
    }
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(backend) {
        // SAFETY: as above.
        unsafe { (*stats).connections += 1 };
    }
}

/// Counts a connection that a backend did not answer and another took.
#[inline(always)]
pub fn failover(backend: u32) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(backend) {
        // SAFETY: as above.
        unsafe { (*stats).failovers += 1 };
    }
}

/// Counts among a backend's open connections one that was in this state and is in that.
#[inline(always)]
pub fn open(backend: u32, before: u32, after: u32) {
    let _ = changed(backend, before, after);
}

/// [`open`], and whether its task has answered it now, or it was refused.
#[inline(always)]
pub fn heard(backend: u32, before: u32, after: u32) {
    let _ = told(backend, before, after);
}

/// [`heard`], looked at by itself too.
#[unsafe(export_name = "connection_heard")]
#[inline(never)]
extern "C" fn told(backend: u32, before: u32, after: u32) -> u64 {
    let new = after & !before;
    if after & ALIAS == 0
        && let Some(stats) = BACKEND_STATS.get_ptr_mut(backend)
    {
        let refused = new & RESET != 0 && after & ANSWERED == 0;
        // SAFETY: as for all that are per CPU.
        unsafe {
            (*stats).answered = (*stats).answered.wrapping_add((new & ANSWERED != 0) as u32);
            (*stats).unanswered = (*stats).unanswered.wrapping_add(refused as u32);
        }
    }
    changed(backend, before, after)
}

/// Counts a connection that was given up, or given to another backend, before this one had answered it.
#[inline(always)]
fn unanswered(backend: u32) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(backend) {
        // SAFETY: as above.
        unsafe { (*stats).unanswered = (*stats).unanswered.wrapping_add(1) };
    }
}

/// [`open`]; how many there were. The verifier looks at it by itself, for it is all numbers, and must return one: few packets come to
/// it, from many places.
#[unsafe(export_name = "connection_open")]
#[inline(never)]
extern "C" fn changed(backend: u32, before: u32, after: u32) -> u64 {
    // It is given up, or given to another: of TCP, a task of this node may have been silent.
    const HEARD: u32 = ALIAS | ANSWERED | RESET | UDP | ONE_WAY;
    if before & HEARD == 0 && after & ALIAS != 0 {
        unanswered(backend);
    }
    let change = Open::unit(after).wrapping_sub(Open::unit(before));
    if change == 0 {
        return 0;
    }
    // SAFETY: an array's entry is valid while the program runs, and aligned to eight bytes.
    OPEN.get_ptr_mut(backend).map_or(0, |open| unsafe { atomic::fetch_add(open.cast(), change) })
}

/// The open connections of a backend. Whether there is one the verifier is not to follow.
#[inline(always)]
pub fn opened(backend: u32) -> Open {
    // SAFETY: as above.
    Open(opaque(OPEN.get_ptr(backend).map_or(0, |open| unsafe { open.read_volatile() }.0)))
}

/// Connections that a task of a service may have; zero is any number.
#[inline(always)]
pub fn most_connections(service: u32) -> u64 {
    opaque(SERVICES.get(service).map_or(0, |settings| settings.task_connections) as u64)
}

/// Whether a task of a service has as many connections as it may have.
#[inline(always)]
pub fn is_full(service: u32, backend: u32) -> bool {
    let most = most_connections(service);
    // Of none less one there are fewer always.
    opened(backend).established() > most.wrapping_sub(1)
}

/// Counts a new connection that no backend took.
#[inline(always)]
pub fn refused(service: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: as above.
        unsafe { (*stats).refused += 1 };
    }
}

/// Counts a packet of a client that may not connect.
#[inline(always)]
pub fn denied(service: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: as above.
        unsafe { (*stats).denied += 1 };
    }
}

/// Counts what became of a line of a family's connection table.
#[inline(always)]
pub fn line<A: Address>(count: impl FnOnce(&mut TableStats)) {
    if let Some(stats) = TABLE_STATS.get_ptr_mut(!A::IS_V4 as u32) {
        // SAFETY: as above.
        count(unsafe { &mut *stats });
    }
}
