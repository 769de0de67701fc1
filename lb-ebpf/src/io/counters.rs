//! Counters, all per CPU: an add is a plain memory write.

use lb_common::{net::Address, stats::TableStats};

use super::maps::{BACKEND_STATS, OUTCOMES, SERVICE_STATS, TABLE_STATS};

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
