//! A frame in XDP.

use core::{ffi::c_void, ptr::read_volatile};

use aya_ebpf::{
    Global,
    bindings::xdp_md,
    helpers::generated::{
        bpf_xdp_adjust_head, bpf_xdp_adjust_meta, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len,
    },
    programs::XdpContext,
};
use lb_common::{abi::XdpMetadata, checksum::Delta, net::UDP, tags::VlanTag};

use super::Frame;
use crate::io::packet::{Offsets, Packet};

/// Whether the kernel knows `bpf_xdp_get_buff_len` (5.18); the loader says. Without it a frame is linear.
#[unsafe(no_mangle)]
static FRAGS: Global<u8> = Global::new(1);

/// A frame in XDP.
pub struct XdpFrame {
    context: XdpContext,
}

impl XdpFrame {
    /// Wraps the program's context.
    #[inline(always)]
    pub fn new(context: XdpContext) -> Self {
        Self { context }
    }

    #[inline(always)]
    fn raw(&self) -> *mut xdp_md {
        self.context.ctx
    }

    /// Puts metadata for TC in front of the frame; false where the driver has no room for it.
    #[inline(always)]
    pub fn set_metadata(&mut self, metadata: XdpMetadata) -> bool {
        let room = size_of::<XdpMetadata>();
        // SAFETY: the context is the program's own; the new metadata is bounds-checked before it is written.
        unsafe {
            if bpf_xdp_adjust_meta(self.raw(), -(room as i32)) != 0 {
                return false;
            }
            let start = read_volatile(&raw const (*self.raw()).data_meta) as usize;
            if start + room > self.data() {
                return false;
            }
            *(start as *mut XdpMetadata) = metadata;
        }
        true
    }
}

impl Frame for XdpFrame {
    type Context = XdpContext;

    #[inline(always)]
    fn ebpf(&self) -> &XdpContext {
        &self.context
    }

    // Read anew each time: a compiler that keeps the difference of the two makes the verifier refuse.
    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: the context is valid while the program runs.
        unsafe { read_volatile(&raw const (*self.raw()).data) as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { read_volatile(&raw const (*self.raw()).data_end) as usize }
    }

    #[inline(always)]
    fn length(&self) -> usize {
        if FRAGS.load() != 0 {
            // SAFETY: as above.
            unsafe { bpf_xdp_get_buff_len(self.raw()) as usize }
        } else {
            self.data_end() - self.data()
        }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.raw()).ingress_ifindex }
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.raw().cast()
    }

    #[inline(always)]
    fn packets(&self) -> u64 {
        1
    }

    #[inline(always)]
    fn offloaded_tag(&self) -> Option<VlanTag> {
        None
    }

    #[inline(always)]
    fn without_link_header(&self) -> Option<u16> {
        None
    }

    #[inline(always)]
    fn update_checksum(&mut self, offsets: &Offsets, addresses: Delta, ports: Delta, _: bool) -> Option<()> {
        let udp = offsets.protocol == UDP;
        let field = self.at::<u16>(offsets.checksum())?;
        // A UDP datagram may carry no sum (RFC 768; over IPv6 in tunnels, RFC 6935); one that computes to 0 is
        // sent as 0xffff.
        if udp && *field == 0 {
            return Some(());
        }
        let new = addresses.and(ports).apply(*field);
        *field = if udp && new == 0 { 0xffff } else { new };
        Some(())
    }

    #[inline(always)]
    fn adjust_sum(&self, _: Delta) {}

    #[inline(always)]
    fn longest<A>(&self, packet: &Packet<A>) -> u32 {
        packet.bytes as u32
    }

    #[inline(always)]
    fn replace_word<A>(&mut self, packet: &Packet<A>, offset: usize, new: u16, finished: bool) -> Option<()> {
        let word = self.at::<u16>(offset)?;
        let change = Delta::of_word(*word, new);
        *word = new;
        let checksum = self.at::<u16>(packet.checksum_offset())?;
        // An unfinished sum does not cover the header yet.
        if finished {
            *checksum = change.apply(*checksum);
        }
        Some(())
    }

    #[inline(always)]
    fn cut(&mut self, bytes: u32) -> bool {
        let less = (self.length() as u32).wrapping_sub(bytes);
        // SAFETY: the context is the program's own.
        unsafe { bpf_xdp_adjust_tail(self.raw(), -(less as i32)) == 0 }
    }

    #[inline(always)]
    fn put_before(&mut self, bytes: u32) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { bpf_xdp_adjust_head(self.raw(), -(bytes as i32)) == 0 }
    }

    #[inline(always)]
    fn make_room(&mut self, bytes: u32, _: bool, _: u32) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { bpf_xdp_adjust_head(self.raw(), -(bytes as i32)) == 0 }
    }

    #[inline(always)]
    fn take_room(&mut self, bytes: u32, _: bool, _: bool) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { bpf_xdp_adjust_head(self.raw(), bytes as i32) == 0 }
    }
}
