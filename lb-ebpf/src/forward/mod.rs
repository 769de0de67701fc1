//! Sending a packet of ours on: what is written into it, and where it leaves. Imports everything below it; chooses no verdict:
//! [`Action`] says what is to become of the frame, and `main` says it to the kernel.

pub mod early;
pub mod egress;
pub mod encap;
pub mod fast_path;
pub mod fragmentation;
pub mod headers;
pub mod icmp_error;
pub mod mss;
pub mod mtu;
pub mod nat;
pub mod next_hop;
pub mod rst;
pub mod tc;
pub mod xdp;

use lb_common::{backend::Kind, outcome::Outcome};

use crate::{
    conntrack::{Classified, Direction},
    io::{
        counters,
        family::Family,
        frame::Frame,
        packet::{FIRST, Packet},
        verifier,
    },
};

/// What is to become of a frame. A plain number: of an enum whose variants are of several sizes the compiler leaves parts
/// undefined, and the verifier sees them read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Action(u32);

impl Action {
    /// It goes on to the host, or to the next program.
    pub const PASS: Self = Self(0);
    /// It ends here.
    pub const DROP: Self = Self(1);
    /// It goes back by the interface it came from.
    pub const BACK: Self = Self(2);
    /// It comes in once more, and after it the fragments of its datagram that came before.
    pub const RELEASE: Self = Self(3);
    /// From here on: the kernel's redirect helper has taken it, and answered this.
    const SENT: u32 = 16;
    /// From here on: it is to be cut into fragments of at most so many bytes.
    const CUT: u32 = 1 << 16;

    /// The kernel's redirect helper has taken it, and answered this.
    #[inline(always)]
    pub const fn sent(answer: u32) -> Self {
        Self(Self::SENT + answer)
    }

    /// What the kernel's redirect helper answered, if it has taken the frame.
    #[inline(always)]
    pub const fn answer(self) -> Option<u32> {
        if self.0 >= Self::SENT && self.0 < Self::CUT { Some(self.0 - Self::SENT) } else { None }
    }

    /// It is to be cut into fragments of at most so many bytes.
    #[inline(always)]
    pub const fn cut(limit: u32) -> Self {
        Self(Self::CUT | limit & 0xffff)
    }

    /// How many bytes its fragments may have, if it is to be cut.
    #[inline(always)]
    pub const fn limit(self) -> Option<u32> {
        if self.0 >= Self::CUT { Some(self.0 & 0xffff) } else { None }
    }
}

/// What a stage has come to, as a function of its own may return it.
#[inline(always)]
pub fn pack(done: Result<Action, Outcome>) -> u64 {
    verifier::pack(done.map(|action| action.0))
}

/// The reverse; an outcome as its discriminant.
#[inline(always)]
pub fn unpack(done: u64) -> Result<Action, u32> {
    verifier::unpack_raw(done).map(Action)
}

/// What a forwarded packet is counted as.
#[inline(always)]
fn outcome(found: &Classified) -> Result<Outcome, Outcome> {
    match (found.direction, Kind::try_from(found.backend.kind)) {
        (Direction::Client, _) => Ok(Outcome::Reply),
        (Direction::Task, Ok(Kind::Local)) => Ok(Outcome::Local),
        (Direction::Task, Ok(Kind::Routed)) => Ok(Outcome::Routed),
        (Direction::Task, Ok(Kind::Snat)) => Ok(Outcome::Snat),
        (Direction::Task, Ok(Kind::Peer)) => Ok(Outcome::Peer),
        (Direction::Task, Err(_)) => Err(Outcome::BackendUnreachable),
    }
}

/// Counts for the backend.
#[inline(always)]
fn tally<A: Family>(packet: &Packet<A>, found: &Classified, packets: u64, bytes: u64) {
    match found.direction {
        Direction::Task => counters::request(packet.connection.backend, packets, bytes),
        Direction::Client => counters::reply(packet.connection.backend, packets, bytes),
    }
}

/// [`too_big`] for a client, who may be forged: an address gets so many errors in a second.
#[inline(always)]
fn too_big_for_client<F: Frame, A: headers::Back>(
    frame: &mut F,
    packet: &Packet<A>,
    mtu: u32,
) -> Result<(), Outcome> {
    if packet.kind > FIRST || !icmp_error::may_answer(&packet.key.source) {
        return Err(Outcome::TooBig);
    }
    too_big(frame, packet, mtu)
}

/// Answers a packet that is too long by an ICMP error in its place, to be sent back. Errors are not answered by errors, nor are
/// later fragments (RFC 1122, 3.2.2).
#[inline(always)]
fn too_big<F: Frame, A: headers::Back>(frame: &mut F, packet: &Packet<A>, mtu: u32) -> Result<(), Outcome> {
    if packet.kind > FIRST || icmp_error::too_big(frame, packet, mtu).is_none() {
        return Err(Outcome::TooBig);
    }
    counters::outcome(Outcome::TooBig as u32, 1);
    Ok(())
}
