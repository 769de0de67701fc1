//! Writing a flow's rewrite into a packet: link, network and transport header, and their checksums.

use lb_common::{
    checksum::Delta,
    endpoint::ReplySource,
    flow::{Flow, Rewrite},
    net::Be16,
};

use crate::{family::Family, frame::Frame, packet::Packet, parse::Ethernet};

#[repr(C)]
struct Ports {
    source: u16,
    destination: u16,
}

/// What a packet leaves with. It points into the flow table, or at the packet's own five-tuple: copies of IPv6
/// addresses would take the stack that the programs do not have.
pub struct Target<'a, A> {
    /// Source address.
    pub source: &'a A,
    /// Destination address.
    pub destination: &'a A,
    source_port: Be16,
    destination_port: Be16,
    addresses: Delta,
    ports: Delta,
}

impl<'a, A: Family> Target<'a, A> {
    /// As a ready-made rewrite says.
    #[inline(always)]
    pub fn of(rewrite: &'a Rewrite<A>) -> Self {
        Self {
            source: &rewrite.source,
            destination: &rewrite.destination,
            source_port: rewrite.source_port,
            destination_port: rewrite.destination_port,
            addresses: Delta::from_raw(rewrite.address_delta),
            ports: Delta::from_raw(rewrite.port_delta),
        }
    }

    /// As the flow's listener answers: the reverse of what the flow does to requests.
    #[inline(always)]
    pub fn answer(packet: &'a Packet<A>, flow: &Flow<A>, listener: &'a ReplySource<A>) -> Self {
        Self {
            source: &listener.address,
            destination: &packet.key.destination,
            source_port: listener.port,
            destination_port: packet.key.destination_port,
            addresses: Delta::from_raw(flow.rewrite.address_delta).reversed(),
            ports: Delta::from_raw(flow.rewrite.port_delta).reversed(),
        }
    }

    /// As a backend wants it, for a packet whose flow is not at hand.
    #[inline(always)]
    pub fn task(packet: &'a Packet<A>, address: &'a A, port: Be16) -> Self {
        let key = &packet.key;
        Self {
            source: &key.source,
            destination: address,
            source_port: key.source_port,
            destination_port: port,
            addresses: Delta::of_address(key.destination, *address),
            ports: Delta::of_port(key.destination_port, port),
        }
    }
}

/// Hardware addresses of a hop.
#[derive(Clone, Copy)]
pub struct Hop {
    /// Of the receiver.
    pub destination: [u8; 6],
    /// Of the sender.
    pub source: [u8; 6],
    /// Whether they are written: a local task's need not be known. Not an `Option`, whose empty half the verifier
    /// would see read.
    pub known: bool,
}

/// Rewrites the packet. `None` if the headers are not where the parser saw them, which the bounds checks
/// ask for and no packet shows. Packet pointers are void afterwards.
#[inline(always)]
pub fn apply<F: Frame, A: Family>(
    frame: &F,
    packet: &Packet<A>,
    target: &Target<'_, A>,
    hop: Hop,
) -> Option<()> {
    let ports = frame.at::<Ports>(packet.transport())?;
    // SAFETY: `at` checked the bounds.
    unsafe {
        (*ports).source = target.source_port.raw();
        (*ports).destination = target.destination_port.raw();
    }
    A::rewrite(frame, packet.network(), target.source, target.destination, target.addresses)?;
    if hop.known {
        let ethernet = frame.at::<Ethernet>(0)?;
        // SAFETY: `at` checked the bounds.
        unsafe {
            (*ethernet).destination = words(hop.destination);
            (*ethernet).source = words(hop.source);
        }
    }
    frame.update_checksum(packet, target.addresses, target.ports, A::IS_V4)
}

#[inline(always)]
fn words(mac: [u8; 6]) -> [u16; 3] {
    let [a, b, c, d, e, f] = mac;
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])]
}
