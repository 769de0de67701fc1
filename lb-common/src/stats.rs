//! Per-CPU counters of services, backends and connection tables.

use crate::pod;

/// What passed through one backend.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackendStats {
    /// New connections.
    pub connections: u64,
    /// Connections given to another task because this one did not answer, or refused.
    pub failovers: u64,
    /// Packets sent to the task.
    pub request_packets: u64,
    /// Bytes of them, from the network header on.
    pub request_bytes: u64,
    /// Packets from the task.
    pub reply_packets: u64,
    /// Bytes of them, from the network header on.
    pub reply_bytes: u64,
}

/// What a service did with new connections; the rest of a service's figures is the sum over its backends.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ServiceStats {
    /// New connections given to a task.
    pub connections: u64,
    /// New connections given to none, passed to the host.
    pub refused: u64,
    /// Packets of clients that may not connect, dropped.
    pub denied: u64,
}

/// What became of a connection table's lines. Those that are there are all that were inserted, less the others.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableStats {
    /// Made.
    pub inserted: u64,
    /// Given to another, after their connection had ended or been silent for too long.
    pub reused: u64,
    /// Given to another, though somebody may miss them: half-open ones, datagrams, one-sided ones.
    pub displaced: u64,
    /// Given up.
    pub removed: u64,
}

impl BackendStats {
    /// The sum of both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            connections: self.connections + other.connections,
            failovers: self.failovers + other.failovers,
            request_packets: self.request_packets + other.request_packets,
            request_bytes: self.request_bytes + other.request_bytes,
            reply_packets: self.reply_packets + other.reply_packets,
            reply_bytes: self.reply_bytes + other.reply_bytes,
        }
    }
}

impl TableStats {
    /// The sum of both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            inserted: self.inserted + other.inserted,
            reused: self.reused + other.reused,
            displaced: self.displaced + other.displaced,
            removed: self.removed + other.removed,
        }
    }

    /// Lines that are there, once nobody is at work.
    #[must_use]
    pub const fn live(&self) -> u64 {
        self.inserted.wrapping_sub(self.reused).wrapping_sub(self.displaced).wrapping_sub(self.removed)
    }
}

impl ServiceStats {
    /// The sum of both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            connections: self.connections + other.connections,
            refused: self.refused + other.refused,
            denied: self.denied + other.denied,
        }
    }
}

pod!(BackendStats, ServiceStats, TableStats);
