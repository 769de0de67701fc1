//! Datagrams that the host itself sends from a published port: what answers them is the host's, not a request.
//!
//! A published UDP port may be one that the host's kernel or a program of its has chosen for queries (WireGuard, RTP, NTP, DNS, a
//! masqueraded container). The kernel cannot tell: nothing holds the port but what was sent from it.

use crate::{
    net::{Be16, Wide},
    pod,
};

/// Between whom they go.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct HostFlow {
    /// To whom the host sends; IPv4 as an IPv4-mapped address (RFC 4291, 2.5.5.2).
    pub remote: Wide,
    /// The host's own address, likewise.
    pub local: Wide,
    /// To which port, network order.
    pub remote_port: Be16,
    /// From which port, network order.
    pub local_port: Be16,
}

/// Seconds after the host's last datagram for which those of the other side are the host's: as the kernel's connection tracking
/// keeps an exchange of datagrams (`nf_conntrack_udp_timeout_stream`).
pub const HOST_FLOW_SECONDS: u32 = 120;

const _: () = assert!(size_of::<HostFlow>() == 36);

pod!(HostFlow);
