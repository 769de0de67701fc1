//! Making flows: choose a task, compute the rewrite and its checksum deltas once, put both into the table.

use core::ptr::null;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_log_ebpf::debug;
use lb_common::{
    backend::{Backend, Kind},
    endpoint::{Listener, ReplySource},
    flow::{Flow, REQUEST},
    outcome::Outcome,
};

use crate::{
    count,
    family::Family,
    frame::Frame,
    maps::BACKENDS,
    neighbour,
    packet::{Packet, mac},
    parse::Ethernet,
    select, snat,
};

const EEXIST: i32 = -17;

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the flow's task.
    Task,
    /// To the client, from its entry for replies (snat): the rewrite is the entry's own.
    Client,
    /// To the client, by the entry of the request to this listener: the rewrite is the reverse.
    Back,
}

/// A packet of ours: its flow and the backend that the flow names.
pub struct Found<A: 'static> {
    /// In the flow table.
    pub flow: *mut Flow<A>,
    /// In the backend array.
    pub backend: &'static Backend,
    /// Where it goes.
    pub way: Way,
    /// With [`Way::Back`] the listener, else null. Beside the way, not in it: the compiler takes a pointer in an
    /// enum apart, which the verifier forbids.
    pub listener: *const ReplySource<A>,
}

/// Starts a flow for a packet that reached a listener.
#[inline(always)]
pub fn open<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    listener: &Listener,
) -> Result<Found<A>, Outcome> {
    if !packet.may_open() {
        return Err(Outcome::NoFlow);
    }
    if packet.hops <= 1 {
        return Err(Outcome::TtlExpired);
    }
    match make(frame, packet, listener) {
        Ok(()) => {}
        Err(outcome) => {
            debug!(frame.ebpf(), "service {}: no flow, outcome {}", listener.service, outcome as u8);
            count::refused(listener.service);
            return Err(outcome);
        }
    }
    // Read back: another CPU may have been first with the same flow, and its choice stands.
    let known = A::flow(&packet.key).ok_or(Outcome::FlowTableFull)?;
    // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
    let index = unsafe { (*known).backend };
    let backend = BACKENDS.get(index).ok_or(Outcome::BackendGone)?;
    Ok(Found { flow: known, backend, way: Way::Task, listener: null() })
}

#[inline(always)]
fn make<F: Frame, A: Family>(frame: &F, packet: &mut Packet<A>, listener: &Listener) -> Result<(), Outcome> {
    let (index, backend) = select::backend(packet, listener)?;
    draft(frame, packet, index, backend)?;
    let snat = backend.kind == Kind::Snat as u8;
    if snat {
        snat::reserve(packet, backend)?;
    }
    match A::insert_flow(&packet.key, &packet.draft, BPF_NOEXIST as u64) {
        Ok(()) => {
            debug!(frame.ebpf(), "service {}: new flow to backend {}", listener.service, index);
            count::new_flow(listener.service, index);
            Ok(())
        }
        Err(error) => {
            // Another CPU was first with the same flow; where it chose the same, the entry for replies is its own.
            // SAFETY: a table's entry stays readable while the program runs, see `Family::flow`.
            let same = error == EEXIST
                && A::flow(&packet.key)
                    .is_some_and(|first| unsafe { (*first).rewrite == packet.draft.rewrite });
            if snat && !same {
                let _ = A::delete_flow(&packet.reply_key);
            }
            if error == EEXIST { Ok(()) } else { Err(Outcome::FlowTableFull) }
        }
    }
}

/// Drafts a flow from this packet to a backend that keeps the client's address and port.
#[inline(always)]
fn draft<F: Frame, A: Family>(
    frame: &F,
    packet: &mut Packet<A>,
    index: u32,
    backend: &Backend,
) -> Result<(), Outcome> {
    let ethernet = frame.at::<Ethernet>(0).ok_or(Outcome::Malformed)?;
    let now = neighbour::jiffies();
    let (key, flow) = (&packet.key, &mut packet.draft);
    flow.rewrite.set(key, (&key.source, key.source_port), (A::in_wide(&backend.address), backend.port));
    flow.backend = index;
    flow.generation = backend.generation;
    flow.seen = now as u32;
    // Until the routing table is asked, answer to where the question came from.
    flow.hop_seen = now as u32;
    // SAFETY: `at` checked the bounds.
    unsafe {
        flow.client_mac = mac((*ethernet).source);
        flow.node_mac = mac((*ethernet).destination);
    }
    flow.tags = packet.tags;
    flow.role = REQUEST;
    flow.state = 0;
    flow._pad = 0;
    Ok(())
}
