//! Fragments that come before the first one of their datagram, which alone has the ports. They may be the host's, so that they are
//! passed on, and a copy is held; when the first one turns out to be ours, it comes in once more and they after it.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_INGRESS, BPF_NOEXIST},
    helpers::generated::{bpf_clone_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes},
};
use lb_common::{
    fragment::{EARLY_BYTES, EARLY_OF_A_DATAGRAM, Early, EarlyKey, FRAGMENT_SECONDS},
    net::UDP,
};

use crate::io::{
    clock,
    family::Family,
    frame::{Frame as _, Skb},
    maps::{self, EARLY_FRAGMENTS},
    packet::{FIRST, LATER, NOBODY, Packet},
    verifier::opaque,
};

#[inline(always)]
fn key<A: Family>(packet: &Packet<A>, number: u32) -> EarlyKey {
    EarlyKey {
        source: packet.key.source.to_mapped(),
        destination: packet.key.destination.to_mapped(),
        identification: packet.identification,
        number,
    }
}

/// Whether the packet is the first fragment of a datagram of which others came before.
#[inline(always)]
pub fn waits<A: Family>(packet: &Packet<A>) -> bool {
    packet.kind == FIRST && packet.key.protocol == UDP && packet.line.slot != NOBODY && is_held(packet)
}

/// Whether fragments of the packet's datagram are held. A function of its own: the key is large.
#[inline(never)]
fn is_held<A: Family>(packet: &Packet<A>) -> bool {
    // SAFETY: not read.
    unsafe { EARLY_FRAGMENTS.get(key(packet, 0)) }.is_some()
}

/// Holds a copy of a later fragment whose first one is not known. What there is no room for is not held.
#[inline(never)]
pub fn hold<A: Family>(frame: &Skb, packet: &Packet<A>) -> u32 {
    let Some(early) = maps::early() else {
        return 0;
    };
    if packet.kind != LATER
        || packet.key.protocol != UDP
        || packet.bytes as usize > EARLY_BYTES
        || frame.segment_bytes() != 0
    {
        return 0;
    }
    // Looked for first: the kernel would copy all of it to find that there is one.
    let mut key = key(packet, 0);
    let mut flags = place(&key);
    while flags == TAKEN {
        key.number += 1;
        if key.number == EARLY_OF_A_DATAGRAM {
            return 0;
        }
        flags = place(&key);
    }
    let bytes = one_to_most(packet.bytes as u32);
    early.seen = clock::now();
    early.bytes = packet.bytes as u32;
    let to = early.packet.as_mut_ptr().cast();
    // SAFETY: the context is the program's own, and the entry as long as what is read into it can be.
    if unsafe { bpf_skb_load_bytes(frame.raw().cast(), packet.network() as u32, to, bytes) } != 0 {
        return 0;
    }
    // Where another CPU was quicker this one is not held: a datagram's fragments come by one CPU nearly always.
    let early: &Early = early;
    EARLY_FRAGMENTS.insert(key, early, flags as u64).is_ok() as u32
}

/// An early fragment is held there, of a datagram that may still come.
const TAKEN: u32 = u32::MAX;

/// How an early fragment is put into its place, for the kernel; [`TAKEN`] if there is one.
#[inline(never)]
fn place(key: &EarlyKey) -> u32 {
    // SAFETY: one number is read.
    match unsafe { EARLY_FRAGMENTS.get(key) } {
        None => BPF_NOEXIST,
        Some(early) if is_fresh(early) => TAKEN,
        Some(_) => BPF_ANY,
    }
}

/// Whether a datagram's first fragment may still come.
#[inline(always)]
fn is_fresh(early: &Early) -> bool {
    let hz = maps::config().map_or(1, |config| config.jiffies_per_second);
    clock::now().wrapping_sub(early.seen) <= FRAGMENT_SECONDS * hz
}

/// Has a first fragment come in once more, and after it what was held for it. The frame is used up.
#[inline(never)]
pub fn release<A: Family>(frame: &mut Skb, packet: &Packet<A>) -> u32 {
    let longer = frame.length() as u32 + 1;
    // What a device has summed up the kernel forgets when a frame grows.
    // SAFETY: the context is the program's own.
    if !send_in_again(frame) || unsafe { bpf_skb_change_tail(frame.raw(), longer, 0) } != 0 {
        return 0;
    }
    let mut key = key(packet, 0);
    while key.number < EARLY_OF_A_DATAGRAM {
        send_held(frame, packet.network_at as u32 & 0x1f, &key);
        key.number += 1;
    }
    1
}

/// Makes the frame the early fragment that was held so, if one was, and has it come in.
#[inline(never)]
fn send_held(frame: &mut Skb, network: u32, key: &EarlyKey) -> u32 {
    // SAFETY: copied at once; what is overwritten meanwhile has a wrong sum, and ends at its receiver.
    let Some(early) = (unsafe { EARLY_FRAGMENTS.get(key) }) else {
        return 0;
    };
    let bytes = one_to_most(early.bytes);
    // SAFETY: the context is the program's own, and the entry as long as what is read of it can be.
    let shaped = is_fresh(early)
        && unsafe {
            bpf_skb_change_tail(frame.raw(), network + bytes, 0) == 0
                && bpf_skb_store_bytes(frame.raw(), network, early.packet.as_ptr().cast(), bytes, 0) == 0
        };
    let _ = EARLY_FRAGMENTS.remove(key);
    (shaped && send_in_again(frame)) as u32
}

/// Has a copy of the frame come in once more.
#[inline(always)]
pub fn send_in_again(frame: &mut Skb) -> bool {
    frame.mark_as_seen();
    let interface = frame.ifindex();
    // SAFETY: the context is the program's own.
    unsafe { bpf_clone_redirect(frame.raw(), interface, BPF_F_INGRESS as u64) == 0 }
}

/// Has a copy of the frame leave by its interface once more, as who sends it has signed it.
#[inline(always)]
pub fn send_out_again(frame: &mut Skb) -> bool {
    let interface = frame.ifindex();
    // SAFETY: as above.
    unsafe { bpf_clone_redirect(frame.raw(), interface, 0) == 0 }
}

/// The number, of which the verifier sees that it is neither zero nor more than an entry has room for.
#[inline(always)]
fn one_to_most(bytes: u32) -> u32 {
    (opaque(bytes.wrapping_sub(1) as u64) as u32 & (EARLY_BYTES as u32 - 1)) + 1
}
