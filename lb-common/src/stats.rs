//! Per-CPU counters of services and backends.

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

impl ServiceStats {
    /// The sum of both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self { connections: self.connections + other.connections, refused: self.refused + other.refused }
    }
}

pod!(BackendStats, ServiceStats);
