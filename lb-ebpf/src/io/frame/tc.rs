//! A frame in TC: a socket buffer, perhaps many segments merged.

use core::{ffi::c_void, mem::MaybeUninit, ptr::read_volatile};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_DECAP_L3_IPV4, BPF_F_ADJ_ROOM_DECAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4,
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
        BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        bpf_adj_room_mode::{BPF_ADJ_ROOM_MAC, BPF_ADJ_ROOM_NET},
    },
    helpers::generated::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_proto, bpf_skb_change_tail,
        bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use lb_common::{
    abi::XdpMetadata,
    checksum::Delta,
    net::{Be16, TCP, UDP},
    tags::VlanTag,
};

use super::Frame;
use crate::{
    io::{
        maps,
        packet::{Offsets, Packet},
    },
    wire::ethernet::{IPV4, IPV6},
};

/// Bytes that hold every header the datapath looks at: Ethernet, two tags, IPv6, extension headers, TCP.
const HEADERS: u32 = 14 + 8 + 40 + 256 + 20;

/// Bytes that hold the headers of a plain segment, with all options that TCP has room for.
const PLAIN: u32 = 14 + 40 + 60;

/// `BPF_F_IPV6` of `bpf_l4_csum_replace` (Linux 6.16): the pseudo header's addresses are IPv6, so that the
/// device's sum over the whole packet (`CHECKSUM_COMPLETE`) does not change.
const IPV6_SUM: u64 = 1 << 7;

/// How much longer IPv6's header is than IPv4's.
const FAMILY_BYTES: i32 = 20;

/// A frame in TC: a socket buffer, perhaps many segments merged.
pub struct Skb {
    context: TcContext,
    /// It may come without a link header: generic XDP saw it before, or its interface has none.
    may_lack_link: bool,
}

impl Skb {
    /// Wraps the program's context.
    #[inline(always)]
    pub fn new(context: TcContext, may_lack_link: bool) -> Self {
        Self { context, may_lack_link }
    }

    /// Wraps the context of a program that runs on the uplink, which has link headers, and on interfaces beside it, which may have
    /// none.
    #[inline(always)]
    pub fn beside(context: TcContext, uplink: u32) -> Self {
        let frame = Self::new(context, false);
        let may_lack_link = frame.ifindex() != uplink;
        Self { may_lack_link, ..frame }
    }

    /// The kernel's view of the buffer, for helpers.
    #[inline(always)]
    pub fn raw(&self) -> *mut __sk_buff {
        self.context.skb.skb
    }

    /// Makes the headers readable and writable in place.
    #[inline(always)]
    pub fn pull_headers(&mut self) {
        self.pull_if_shorter(self.headers());
    }

    /// The same of what has left the tunnel: it was pulled with its outer headers.
    #[inline(always)]
    pub fn pull_inner_headers(&mut self) {
        self.pull_if_shorter(PLAIN);
    }

    #[inline(always)]
    fn pull_if_shorter(&mut self, enough: u32) {
        let length = self.length() as u32;
        let linear = (self.data_end() - self.data()) as u32;
        if linear < length && linear < enough {
            // What cannot be pulled fails its bounds check later and is passed.
            // SAFETY: the context is the program's own.
            unsafe { bpf_skb_pull_data(self.raw(), if length < HEADERS { length } else { HEADERS }) };
        }
    }

    /// Bytes of the headers of a plain TCP segment, most of what is sent in pieces: the headers alone are linear then. Of anything
    /// else [`HEADERS`].
    #[inline(never)]
    fn headers(&self) -> u32 {
        let protocol = self.read::<u16>(12).copied().unwrap_or(0);
        let (transport, is_tcp) = match self.read::<u8>(14) {
            Some(0x45) if protocol == IPV4 => (14 + 20, self.read::<u8>(14 + 9) == Some(&TCP)),
            Some(_) if protocol == IPV6 => (14 + 40, self.read::<u8>(14 + 6) == Some(&TCP)),
            _ => (0, false),
        };
        match self.read::<u8>(transport + 12) {
            Some(offset) if is_tcp && !self.may_lack_link => transport as u32 + (*offset as u32 >> 4) * 4,
            _ => HEADERS,
        }
    }

    /// Bytes of the longest packet that leaves when the frame is sent as it is, from its network header on: merged ones are
    /// cut as they came.
    #[inline(always)]
    pub fn longest_cut<A>(&self, packet: &Packet<A>) -> u32 {
        // SAFETY: the context is valid while the program runs.
        let segment = unsafe { (*self.raw()).gso_size };
        if segment == 0 { packet.bytes as u32 } else { packet.headers() + segment }
    }

    /// Notes that this datapath sends the frame, for its program where the uplink lets frames out. The field is written by programs in
    /// TC alone; no socket and nobody on the wire can.
    #[inline(always)]
    pub fn sign(&mut self) {
        if let Some(config) = maps::config() {
            // SAFETY: the context is valid while the program runs.
            unsafe { (*self.raw()).tc_index = signature(config.nonce) };
        }
    }

    /// Whether the datapath with this nonce sends the frame.
    #[inline(always)]
    pub fn is_signed(&self, nonce: u32) -> bool {
        // SAFETY: as above.
        unsafe { (*self.raw()).tc_index == signature(nonce) }
    }

    /// Notes that the frame comes in once more because this datapath has it so. Native XDP does not see it again.
    #[inline(always)]
    pub fn mark_as_seen(&mut self) {
        if let Some(config) = maps::config() {
            // SAFETY: as above.
            unsafe { (*self.raw()).tc_index = signature(!config.nonce) };
        }
    }

    /// Whether the datapath with this nonce has the frame come in once more.
    #[inline(always)]
    pub fn is_seen(&self, nonce: u32) -> bool {
        // SAFETY: as above.
        unsafe { (*self.raw()).tc_index == signature(!nonce) }
    }

    /// Bytes of the payload of each segment that the kernel will cut the frame into; zero if it will not.
    #[inline(always)]
    pub fn segment_bytes(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.raw()).gso_size }
    }

    /// Copies a value from anywhere in the frame, also from where it is not linear. Any bytes must be a value of it.
    #[inline(always)]
    pub fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper writes all of it or says that it could not, and checks the offset.
        unsafe {
            let done = bpf_skb_load_bytes(
                self.raw().cast(),
                offset,
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
            );
            (done == 0).then(|| value.assume_init())
        }
    }

    /// Writes a value anywhere into the frame. What a device has summed up follows.
    #[inline(always)]
    pub fn store<T>(&mut self, offset: u32, value: &T) -> bool {
        let from = (&raw const *value).cast_mut().cast();
        let flags = BPF_F_RECOMPUTE_CSUM as u64;
        // SAFETY: the context is the program's own; the helper reads the value alone, and checks the offset.
        unsafe { bpf_skb_store_bytes(self.raw(), offset, from, size_of::<T>() as u32, flags) == 0 }
    }

    /// Makes the transport checksum one over addresses of the other family.
    #[inline(always)]
    pub fn update_sum(&mut self, offsets: &Offsets, addresses: Delta) -> Option<()> {
        let mangled = if offsets.protocol == UDP { BPF_F_MARK_MANGLED_0 as u64 } else { 0 };
        let flags = mangled | BPF_F_PSEUDO_HDR as u64;
        // SAFETY: as above; an unfinished sum takes the addresses alone.
        let done = unsafe {
            bpf_l4_csum_replace(self.raw(), offsets.checksum() as u32, 0, addresses.raw() as u64, flags)
        };
        (done == 0).then_some(())
    }

    /// Makes the frame one of the other family's: its network header becomes as long as that one's without options, and is to be
    /// written, as is the link header's type. What is merged stays so (Linux 5.14).
    #[inline(always)]
    pub fn change_family(&mut self, ether_type: u16) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { bpf_skb_change_proto(self.raw(), ether_type, 0) == 0 }
    }

    /// Makes room behind the network header without options, to be written, or takes bytes away there.
    #[inline(always)]
    pub fn shift_behind_network(&mut self, bytes: i32) -> bool {
        let flags = BPF_F_ADJ_ROOM_FIXED_GSO as u64;
        // SAFETY: as above.
        unsafe { bpf_skb_adjust_room(self.raw(), bytes, BPF_ADJ_ROOM_NET, flags) == 0 }
    }

    /// Whether a frame without tags is TCP, without options or extension headers before it.
    #[inline(always)]
    pub fn is_plain_tcp(&self) -> bool {
        let kind = self.read::<u16>(12).copied().unwrap_or(0);
        let at = if kind == IPV4 { 14 + 9 } else { 14 + 6 };
        (kind == IPV4 || kind == IPV6) && self.read::<u8>(at) == Some(&TCP)
    }

    /// What XDP said about this frame, if it was the XDP of the datapath with this nonce.
    #[inline(always)]
    pub fn metadata(&self, nonce: u32) -> Option<XdpMetadata> {
        // SAFETY: the context is valid while the program runs; the metadata is bounds-checked before it is read.
        unsafe {
            let start = read_volatile(&raw const (*self.raw()).data_meta) as usize;
            if start + size_of::<XdpMetadata>() > self.data() {
                return None;
            }
            let metadata = *(start as *const XdpMetadata);
            (metadata.nonce == nonce).then_some(metadata)
        }
    }
}

/// What [`Skb::sign`] writes: sixteen bits, never zero, as the field is in any other frame.
#[inline(always)]
fn signature(nonce: u32) -> u32 {
    nonce & 0xffff | 1
}

impl Frame for Skb {
    type Context = TcContext;

    #[inline(always)]
    fn ebpf(&self) -> &TcContext {
        &self.context
    }

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
        // SAFETY: as above.
        unsafe { (*self.raw()).len as usize }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.raw()).ifindex }
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.context.as_ptr()
    }

    #[inline(always)]
    fn packets(&self) -> u64 {
        // SAFETY: as above.
        let segments = unsafe { (*self.raw()).gso_segs };
        if segments == 0 { 1 } else { segments as u64 }
    }

    #[inline(always)]
    fn offloaded_tag(&self) -> Option<VlanTag> {
        // SAFETY: as above.
        unsafe {
            if (*self.raw()).vlan_present == 0 {
                return None;
            }
            Some(VlanTag {
                protocol: Be16::from_raw((*self.raw()).vlan_proto as u16),
                tci: Be16::new((*self.raw()).vlan_tci as u16),
            })
        }
    }

    // When generic XDP copies a buffer to make room, the kernel forgets how long its link header is (seen on
    // 6.18): TC then gets it from the network header on. An interface without link headers has it so always. Where there is one, its
    // type is what the kernel says of the frame.
    #[inline(always)]
    fn without_link_header(&self) -> Option<u16> {
        if !self.may_lack_link {
            return None;
        }
        let kind = *self.read::<u16>(12)?;
        // SAFETY: the context is valid while the program runs.
        let protocol = unsafe { (*self.raw()).protocol as u16 };
        (kind != protocol).then_some(protocol)
    }

    // The helper knows what the buffer's checksum state asks for: an unfinished sum takes the addresses alone.
    #[inline(always)]
    fn update_checksum(
        &mut self,
        offsets: &Offsets,
        addresses: Delta,
        ports: Delta,
        ipv4: bool,
    ) -> Option<()> {
        let at = offsets.checksum() as u32;
        let mangled = if offsets.protocol == UDP { BPF_F_MARK_MANGLED_0 as u64 } else { 0 };
        let pseudo = mangled | BPF_F_PSEUDO_HDR as u64;
        let (addresses, ports) = (addresses.raw() as u64, ports.raw() as u64);
        // SAFETY: the context is the program's own; the helper checks the offset.
        unsafe {
            if bpf_l4_csum_replace(self.raw(), at, 0, ports, mangled) != 0 {
                return None;
            }
            if ipv4 {
                return (bpf_l4_csum_replace(self.raw(), at, 0, addresses, pseudo) == 0).then_some(());
            }
            // Kernels before 6.16 do not know the flag.
            if bpf_l4_csum_replace(self.raw(), at, 0, addresses, pseudo | IPV6_SUM) != 0 {
                if bpf_l4_csum_replace(self.raw(), at, 0, addresses, pseudo) != 0 {
                    return None;
                }
                // They took the addresses off the device's sum over the whole packet, which did not change.
                bpf_csum_update(self.raw(), addresses as u32);
            }
            // IPv6 has no header checksum to absorb the hop limit; a no-op without a sum from the device.
            bpf_csum_update(self.raw(), Delta::IPV6_HOP.raw() as u32);
        }
        Some(())
    }

    #[inline(always)]
    fn adjust_sum(&self, change: Delta) {
        // SAFETY: the context is the program's own; without a sum the helper does nothing.
        unsafe { bpf_csum_update(self.raw(), change.raw() as u32) };
    }

    #[inline(always)]
    fn longest<A>(&self, packet: &Packet<A>) -> u32 {
        // SAFETY: the context is valid while the program runs.
        let segment = unsafe { (*self.raw()).gso_size };
        if segment == 0 {
            packet.bytes as u32
        } else if packet.key.protocol == UDP {
            packet.headers() + segment
        } else {
            0
        }
    }

    #[inline(always)]
    fn replace_word<A>(&mut self, packet: &Packet<A>, offset: usize, new: u16, _: bool) -> Option<()> {
        let word = self.at::<u16>(offset)?;
        let old = core::mem::replace(word, new);
        let at = packet.checksum_offset() as u32;
        // SAFETY: the context is the program's own; the helper checks the offset, and leaves an unfinished sum alone.
        (unsafe { bpf_l4_csum_replace(self.raw(), at, old as u64, new as u64, 2) } == 0).then_some(())
    }

    #[inline(always)]
    fn cut(&mut self, bytes: u32) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { bpf_skb_change_tail(self.raw(), bytes, 0) == 0 && bpf_skb_pull_data(self.raw(), bytes) == 0 }
    }

    #[inline(always)]
    fn put_before(&mut self, bytes: u32) -> bool {
        // SAFETY: as above.
        unsafe { bpf_skb_adjust_room(self.raw(), bytes as i32, BPF_ADJ_ROOM_MAC, 0) == 0 }
    }

    #[inline(always)]
    fn make_room(&mut self, bytes: u32, outer_v4: bool, segment: u32) -> bool {
        let family = if outer_v4 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 };
        // Segments that fit stay as long as they are; longer ones the kernel cuts shorter by the room that is made.
        // SAFETY: the context is valid while the program runs.
        let fits = unsafe { (*self.raw()).gso_size } <= segment;
        let size = if fits { BPF_F_ADJ_ROOM_FIXED_GSO } else { 0 };
        let flags = (family | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | size) as u64;
        // SAFETY: the context is the program's own.
        unsafe { bpf_skb_adjust_room(self.raw(), bytes as i32, BPF_ADJ_ROOM_MAC, flags) == 0 }
    }

    #[inline(always)]
    fn take_room(&mut self, bytes: u32, outer_v4: bool, inner_v4: bool) -> bool {
        let family = if inner_v4 { BPF_F_ADJ_ROOM_DECAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_DECAP_L3_IPV6 };
        let size = BPF_F_ADJ_ROOM_FIXED_GSO as u64;
        let shrink = -(bytes as i32);
        // SAFETY: the context is the program's own.
        unsafe {
            if bpf_skb_adjust_room(self.raw(), shrink, BPF_ADJ_ROOM_MAC, family as u64 | size) == 0 {
                return true;
            }
            // Kernels before 6.3 do not know the flag, which matters only where the families differ: there the frame
            // becomes one of the other family first, by as many bytes as their headers differ.
            let shrink = match (outer_v4, inner_v4) {
                (true, false) => shrink - FAMILY_BYTES,
                (false, true) => shrink + FAMILY_BYTES,
                _ => shrink,
            };
            let protocol = if inner_v4 { IPV4 } else { IPV6 };
            (outer_v4 == inner_v4 || bpf_skb_change_proto(self.raw(), protocol, 0) == 0)
                && bpf_skb_adjust_room(self.raw(), shrink, BPF_ADJ_ROOM_MAC, size) == 0
        }
    }
}
