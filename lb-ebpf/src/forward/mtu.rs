//! What fits through an interface of this node. A redirect passes the kernel's own comparison by: what is too long is
//! dropped without a word by the device, or on the wire.

use aya_ebpf::helpers::generated::bpf_check_mtu;

use crate::{
    io::{
        frame::{Frame, Skb},
        packet::Packet,
    },
    wire::ipv6,
};

/// Stands for no limit.
const UNLIMITED: u32 = u32::MAX;

/// MTU of an interface in bytes, without the link header; the frame's own is 0. No limit if the kernel does not say.
#[inline(never)]
pub fn of_interface<F: Frame>(frame: &F, interface: u32) -> u32 {
    let mut mtu = 0;
    // SAFETY: the context is the program's own; the helper writes the number, and reads it as zero: no other length.
    let answer = unsafe { bpf_check_mtu(frame.context(), interface, &raw mut mtu, 0, 0) };
    // Above zero says that this frame is too long; below that there is no such interface.
    if answer < 0 { UNLIMITED } else { mtu }
}

/// The MTU of an interface if the packet, or a segment that the frame will be cut into, is longer.
#[inline(always)]
pub fn exceeded<A>(frame: &Skb, packet: &Packet<A>, interface: u32) -> Option<u32> {
    let longest = frame.longest_cut(packet);
    // For what every interface that carries both families lets pass nothing is asked.
    if longest <= ipv6::LEAST_MTU {
        return None;
    }
    let mtu = of_interface(frame, interface);
    (longest > mtu).then_some(mtu)
}
