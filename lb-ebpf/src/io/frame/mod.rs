//! A frame in the hands of XDP or TC, behind one trait. The only bounds-checked accessors of packet bytes.

mod tc;
mod xdp;

use core::ffi::c_void;

use aya_ebpf::EbpfContext;
use lb_common::{checksum::Delta, tags::VlanTag};
pub use tc::Skb;
pub use xdp::XdpFrame;

use super::packet::{Offsets, Packet};

/// A frame, however it came.
///
/// What is read or written in it is borrowed from it; whatever resizes it asks for it alone. So a reference into a frame cannot
/// outlive the place it points at.
pub trait Frame {
    /// The program's context.
    type Context: EbpfContext;

    /// The program's context, for the log.
    fn ebpf(&self) -> &Self::Context;

    /// Address of the first byte.
    fn data(&self) -> usize;

    /// Address past the last byte that can be read directly.
    fn data_end(&self) -> usize;

    /// Length in bytes, with what lies in fragments.
    fn length(&self) -> usize;

    /// Interface that the frame came in by.
    fn ifindex(&self) -> u32;

    /// The program's context, for helpers.
    fn context(&self) -> *mut c_void;

    /// How many packets of the wire this frame stands for.
    fn packets(&self) -> u64;

    /// The outermost VLAN tag, where it does not lie in the frame's bytes.
    fn offloaded_tag(&self) -> Option<VlanTag>;

    /// The network protocol, where the frame's bytes begin with the network header.
    fn without_link_header(&self) -> Option<u16>;

    /// Adds what a rewrite changed to the transport checksum.
    fn update_checksum(
        &mut self,
        offsets: &Offsets,
        addresses: Delta,
        ports: Delta,
        ipv4: bool,
    ) -> Option<()>;

    /// Adds a change that no checksum of the packet makes up for to the device's sum over the frame, if there is one.
    fn adjust_sum(&self, change: Delta);

    /// Bytes of the longest packet that this frame stands for, from its network header on; zero for TCP segments,
    /// which the kernel can cut again.
    fn longest<A>(&self, packet: &Packet<A>) -> u32;

    /// Changes a word of the transport header and its checksum with it; `finished` tells whether the checksum is a
    /// whole one.
    fn replace_word<A>(&mut self, packet: &Packet<A>, offset: usize, new: u16, finished: bool) -> Option<()>;

    /// Cuts the frame off after so many bytes.
    fn cut(&mut self, bytes: u32) -> bool;

    /// Makes room between the link header, which is to be written, and the packet.
    fn put_before(&mut self, bytes: u32) -> bool;

    /// Makes room for an outer header between the link header and the packet, whose link header is not tagged.
    /// What the room holds, and the link header, is to be written.
    fn make_room(&mut self, bytes: u32, outer_v4: bool, segment: u32) -> bool;

    /// Takes the outer header away; the link header is to be written.
    fn take_room(&mut self, bytes: u32, outer_v4: bool, inner_v4: bool) -> bool;

    /// The address of the `T` at `offset`, if the frame holds all of it.
    #[inline(always)]
    fn address<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.data() + offset;
        if start + size_of::<T>() > self.data_end() {
            return None;
        }
        Some(start as *mut T)
    }

    /// The `T` at `offset`, to be read.
    #[inline(always)]
    fn read<T>(&self, offset: usize) -> Option<&T> {
        // SAFETY: the bytes lie in the frame, whose memory is the program's as long as it is borrowed: what resizes the frame
        // borrows it alone. Every type asked for is plain data that any bytes are a value of; the target has no alignment.
        self.address(offset).map(|at| unsafe { &*at })
    }

    /// The `T` at `offset`, to be written.
    #[inline(always)]
    fn at<T>(&mut self, offset: usize) -> Option<&mut T> {
        // SAFETY: as above.
        self.address(offset).map(|at| unsafe { &mut *at })
    }
}
