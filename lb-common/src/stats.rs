//! Counters of services, backends and connection tables: per CPU, but for what is open.

use crate::{
    conntrack::line::{ALIAS, ANSWERED, CLIENT_FIN, ESTABLISHED, FOREIGN, ONE_WAY, RESET, is_over},
    pod,
};

/// What passed through one backend.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackendStats {
    /// New connections.
    pub connections: u64,
    /// Connections given to another task because this one did not answer, or refused.
    pub failovers: u64,
    /// Connections that the task has answered; the low 32 bits.
    pub answered: u32,
    /// Connections that it refused, or that were given up, or given to another, before it had answered, likewise.
    pub unanswered: u32,
    /// Packets sent to the task.
    pub request_packets: u64,
    /// Bytes of them, from the network header on.
    pub request_bytes: u64,
    /// Packets from the task.
    pub reply_packets: u64,
    /// Bytes of them, from the network header on.
    pub reply_bytes: u64,
}

/// The connections of a backend: those of clients that came to this node, and those of all that are established. Changed by one
/// atomic addition ([`Open::unit`]), so that none is lost or counted twice whichever CPUs are at work.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Open(pub u64);

impl Open {
    /// What one connection in this state counts for: nothing if it is over, or an alias. One that was refused counts until it is
    /// another task's, or forgotten. Where replies pass elsewhere the client's end is all that is seen of it. Whoever forges
    /// clients establishes nothing.
    #[inline(always)]
    pub const fn unit(state: u32) -> u64 {
        let one_way = state & ONE_WAY != 0;
        let over =
            if one_way { state & (RESET | CLIENT_FIN) != 0 } else { is_over(state) && state & ANSWERED != 0 };
        if state & ALIAS != 0 || over {
            return 0;
        }
        let (own, established) = (state & FOREIGN == 0, state & ESTABLISHED != 0);
        own as u64 | (established as u64) << 32
    }

    /// Those of clients that came to this node, from their first packets on.
    #[inline(always)]
    pub const fn own(self) -> u64 {
        self.0 & u32::MAX as u64
    }

    /// Those of all nodes' clients that are established: the client went on after the task's answer.
    #[inline(always)]
    pub const fn established(self) -> u64 {
        self.0 >> 32
    }
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
            answered: self.answered.wrapping_add(other.answered),
            unanswered: self.unanswered.wrapping_add(other.unanswered),
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

pod!(BackendStats, ServiceStats, TableStats, Open);
