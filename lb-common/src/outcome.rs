//! What became of a packet. Every packet that reaches the datapath ends in exactly one outcome.

macro_rules! outcomes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// What became of a packet; the discriminant is the index of its per-CPU counter.
        ///
        /// The names are the same in `stats`, the metrics and the docs.
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
        pub enum Outcome {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Outcome {
            /// All of them, in the order of their discriminants.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name users see.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// One sentence on what it means.
            pub const fn help(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($($doc),+).trim_ascii(),)+
                }
            }
        }
    };
}

outcomes! {
    /// Handed to a task on this node.
    Local = "forwarded_local",
    /// Sent to a task behind a next hop, the client's address kept.
    Routed = "forwarded_routed",
    /// Sent to a task behind a next hop from an address of this node.
    Snat = "forwarded_snat",
    /// Sent through the tunnel to the agent of the task's node.
    Peer = "forwarded_peer",
    /// A task's reply, turned around to the client.
    Reply = "forwarded_reply",
    /// Neither IPv4 nor IPv6, or more than two VLAN tags.
    NotIp = "not_ip",
    /// Not addressed to this host alone: a broadcast or multicast frame.
    NotUnicast = "not_unicast",
    /// Neither TCP, UDP nor an ICMP error about them.
    OtherProtocol = "other_protocol",
    /// No listener and no connection of ours.
    NotOurs = "not_ours",
    /// A new connection for a listener in a frame of a VLAN that this node does not have on the uplink: its switch sends it more
    /// than it should.
    ForeignVlan = "foreign_vlan",
    /// A datagram to a published port that answers one which the host itself, or a container behind it, has sent from there.
    HostFlow = "host_flow",
    /// A header that contradicts itself or the frame's length.
    Malformed = "malformed",
    /// A later fragment of a packet whose first one was not seen; of a datagram it is held for a while in case that comes.
    Fragment = "fragment",
    /// Nobody has controlled the datapath for longer than --stale-after says: everything is the host's.
    Stale = "stale",
    /// More IPv6 extension headers than are followed, or one that hides the transport header.
    ExtensionHeaders = "extension_headers",
    /// TTL or hop limit used up.
    TtlExpired = "ttl_expired",
    /// TCP for a listener, but no connection of ours and no SYN: one that the host or Swarm's mesh carries. Or a later fragment of
    /// what began no connection.
    NoConnection = "no_connection",
    /// A new connection for a listener without an eligible task.
    NoBackend = "no_backend",
    /// A new connection for a service whose tasks each have as many as they may have: dropped, so that its client asks again.
    TasksFull = "tasks_full",
    /// A new connection for a listener from an address that nobody can have out there: loopback, multicast, unspecified, one of
    /// this node's own, or one behind a bridge of its containers; or a datagram from a published port of another node.
    Martian = "martian",
    /// A new connection for a listener from an address that its service does not allow, or denies.
    Denied = "denied",
    /// The task of the connection is gone.
    BackendGone = "backend_gone",
    /// The task of the connection is gone, or none of the service's tasks is to get new connections here: answered with a reset in
    /// place of the packet.
    Reset = "reset",
    /// The task of the connection cannot be reached now: no next hop, or its interface is down. Dropped, so that the
    /// client sends again. Or what is for a service of whose tasks none is to get new connections
    /// here, and cannot be answered: a datagram, or a SYN in generic XDP.
    BackendUnreachable = "backend_unreachable",
    /// A task refused a connection (RST to a SYN); kept from the client, whose next SYN goes to another task.
    TaskRefused = "task_refused",
    /// A reply of a task to a client that has been given to another task meanwhile.
    LateReply = "late_reply",
    /// A reply to a translated port whose connection is gone: dropped, for it would leave with the task's address.
    StaleAlias = "stale_alias",
    /// Other CPUs began connections of this client port each time that this one was tried: the client sends again.
    SourceCollision = "source_collision",
    /// No free source port for another connection to this task.
    SnatPortsExhausted = "snat_ports_exhausted",
    /// The connection table has no place for a connection that needs one: dropped, for the client's next SYN is placed by its
    /// hash.
    TableFull = "table_full",
    /// Too long for the way to its task and not to be fragmented; answered with an ICMP error that says the
    /// right length.
    TooBig = "too_big",
    /// Too long for the way to its task or client, and cut into fragments, each of which is counted by itself.
    Fragmented = "fragmented",
    /// An ICMP error about a tunnel packet of this node, after which the ways to the other nodes are measured again.
    TunnelError = "tunnel_error",
    /// Through the tunnel from an address that no other node of the cluster has, or a reply from an address that is
    /// not this node's.
    TunnelNotPeer = "tunnel_not_peer",
    /// Sent by a program or a container of this host as if it were this node's datapath that speaks to a peer's.
    TunnelImpostor = "tunnel_impostor",
    /// Through the tunnel from another node's address without the key that the node's packets have: somebody else sent it.
    TunnelForged = "tunnel_forged",
    /// Through the tunnel for a task that is not on this node, or takes no packets.
    TunnelNoTask = "tunnel_no_task",
    /// Through the tunnel with a version, option or packet that is not understood.
    TunnelMalformed = "tunnel_malformed",
    /// A probe by which nodes learn that each other's datapath is there, and how long a packet the way lets pass: sent back, or
    /// passed to the controller that waits for it; or an ICMP error about one.
    TunnelProbe = "tunnel_probe",
    /// Between an IPv6 client and a task that has IPv4 alone, and there is no way to say it in the other family: an ICMP error
    /// without a counterpart, a datagram without a checksum, or from a task to nobody.
    Untranslatable = "untranslatable",
    /// From an IPv6 client for a task that has IPv4 alone, and each IPv4 address that the client could be known by is another's.
    PoolExhausted = "v6_pool_exhausted",
    /// Decided in XDP, but the task was gone when TC came to deliver it (counted beside forwarded_local). Or a fragment that was held
    /// or cut, and whose first one did not get through.
    DeliveryLost = "delivery_lost",
}

/// How many outcomes there are.
pub const OUTCOMES: usize = Outcome::ALL.len();

impl Outcome {
    /// Whether the packet was sent on by the datapath, whole or in pieces.
    pub const fn is_forwarded(self) -> bool {
        matches!(self, Self::Local | Self::Routed | Self::Snat | Self::Peer | Self::Reply | Self::Fragmented)
    }

    /// Whether the packet was dropped; all that are neither forwarded nor dropped were passed to the host as
    /// they came. The host would answer a packet of our connection with a reset.
    #[inline(always)]
    pub const fn is_dropped(self) -> bool {
        matches!(
            self,
            Self::BackendUnreachable
                | Self::TasksFull
                | Self::Martian
                | Self::Denied
                | Self::TaskRefused
                | Self::LateReply
                | Self::StaleAlias
                | Self::SourceCollision
                | Self::TableFull
                | Self::TooBig
                | Self::TunnelNotPeer
                | Self::TunnelImpostor
                | Self::TunnelForged
                | Self::TunnelNoTask
                | Self::TunnelMalformed
                | Self::Untranslatable
                | Self::PoolExhausted
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discriminants_index_the_counters_and_names_are_unique() {
        for (index, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, index);
            assert!(outcome.help().ends_with('.') || outcome.help().ends_with(')'), "{}", outcome.help());
            assert_eq!(Outcome::ALL.iter().filter(|o| o.name() == outcome.name()).count(), 1);
        }
    }
}
