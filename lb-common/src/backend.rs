//! Backends: one port of one task, as the datapath reaches it.

use crate::{
    net::{Be16, Wide},
    pod,
};

/// How the datapath reaches a task.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Kind {
    /// Behind a veth of this node; delivered by TC into the task's namespace.
    Local = 1,
    /// A plain address behind a next hop whose replies come back through this node.
    Routed = 2,
    /// A plain address behind a next hop, reached from an address of this node so that replies come back.
    Snat = 3,
    /// Through the tunnel to the agent of the task's node, which sees the packet as the client sent it.
    Peer = 4,
}

impl TryFrom<u8> for Kind {
    type Error = u8;

    #[inline(always)]
    fn try_from(raw: u8) -> Result<Self, u8> {
        match raw {
            1 => Ok(Self::Local),
            2 => Ok(Self::Routed),
            3 => Ok(Self::Snat),
            4 => Ok(Self::Peer),
            other => Err(other),
        }
    }
}

/// Whether a backend takes connections.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum State {
    /// The index is free: connections that name it have lost their task.
    Free = 0,
    /// The task takes neither new connections nor packets: it has not started, or no way leads to it.
    Unavailable = 1,
    /// The task takes new connections.
    Active = 2,
    /// The task keeps the connections it has and takes no new ones.
    Draining = 3,
}

impl TryFrom<u8> for State {
    type Error = u8;

    #[inline(always)]
    fn try_from(raw: u8) -> Result<Self, u8> {
        match raw {
            0 => Ok(Self::Free),
            1 => Ok(Self::Unavailable),
            2 => Ok(Self::Active),
            3 => Ok(Self::Draining),
            other => Err(other),
        }
    }
}

/// XDP cannot transmit on `ifindex`: TC forwards instead.
pub const VIA_TC: u8 = 2;
/// The task's node sends answers straight to the client (peer).
pub const RETURN_DIRECT: u8 = 4;

/// A single listener leads to this backend, so that its replies tell by themselves where they go.
pub const SINGLE: u8 = 8;
/// [`Backend::source`] is the name that other nodes have for the task (local).
pub const NAMED: u8 = 32;

/// The task has IPv4 alone: its address here is [`crate::translation::embed`]ded, and packets for it are translated where they leave
/// the host's side of its veth (local).
pub const TRANSLATED: u8 = 64;

/// One entry of the backend array: what of a backend may change while connections name it.
///
/// One cache line. User space replaces an entry in place; each field that changes alone (a hardware address,
/// the state) lies within one aligned eight-byte word, which the kernel's copy writes at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Backend {
    /// Address of the task; IPv4 in the first word. Of a peer's task its address in the cluster, IPv4 as an
    /// IPv4-mapped address.
    pub address: Wide,
    /// Own address that reaches it, the source of snat; IPv4 in the first word. Of a [`NAMED`] task of this node its
    /// address in the cluster, IPv4 as an IPv4-mapped address: what its replies are from as the tunnel has it.
    pub source: Wide,
    /// Hardware address of the task or of the next hop; zero leaves a local task's frames as they came.
    pub mac: [u8; 6],
    /// Target port, network order.
    pub port: Be16,
    /// Hardware address of the interface that leads there.
    pub source_mac: [u8; 6],
    /// Number of the task's node (peer), an index of the table of peers.
    pub peer: u16,
    /// Interface that leads there: the task's host-side veth, or the one of the next hop.
    pub ifindex: u32,
    /// Index of the service it belongs to.
    pub service: u32,
    /// Changes each time the index is given to another task; a connection that remembers another is a lost one.
    pub generation: u32,
    /// [`Kind`].
    pub kind: u8,
    /// [`State`].
    pub state: u8,
    /// 4 or 6.
    pub family: u8,
    /// [`VIA_TC`], [`RETURN_DIRECT`], [`SINGLE`], [`NAMED`], [`TRANSLATED`].
    pub flags: u8,
}

impl Backend {
    /// Whether packets of existing connections may be sent to it.
    #[inline(always)]
    pub const fn forwards(&self) -> bool {
        self.state == State::Active as u8 || self.state == State::Draining as u8
    }
}

const _: () = assert!(size_of::<Backend>() == 64);

pod!(Backend);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_values_come_back_and_unknown_ones_are_refused() {
        for state in [State::Free, State::Unavailable, State::Active, State::Draining] {
            assert_eq!(State::try_from(state as u8), Ok(state));
        }
        for kind in [Kind::Local, Kind::Routed, Kind::Snat, Kind::Peer] {
            assert_eq!(Kind::try_from(kind as u8), Ok(kind));
        }
        assert_eq!(State::try_from(9), Err(9));
        assert_eq!(Kind::try_from(0), Err(0));
    }
}
