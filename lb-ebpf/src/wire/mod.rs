//! Layouts on the wire and where their fields lie. A leaf: it imports nothing of this crate.

pub mod ethernet;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod transport;
