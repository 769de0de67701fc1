//! Fragments: the first one has the ports, the later ones go where it went.

use aya_ebpf::bindings::BPF_ANY;
use lb_common::{
    fragment::{FRAGMENT_SECONDS, FragmentKey, Ports},
    outcome::Outcome,
};

use crate::io::{clock, family::Family, maps, packet::Packet};

#[inline(always)]
fn key<A: Family>(packet: &Packet<A>) -> FragmentKey<A> {
    FragmentKey {
        source: packet.key.source,
        destination: packet.key.destination,
        identification: packet.identification,
        protocol: packet.key.protocol as u32,
    }
}

/// Remembers the ports of a first fragment.
#[inline(never)]
pub fn remember<A: Family>(packet: &Packet<A>) -> i32 {
    let ports = Ports {
        source: packet.key.source_port,
        destination: packet.key.destination_port,
        seen: clock::now(),
    };
    // Where there is no room the later fragments pass with their reason.
    A::FRAGMENTS.insert(key(packet), ports, BPF_ANY as u64).err().unwrap_or(0)
}

/// Gives a later fragment the ports of its first one.
#[inline(always)]
pub fn follow<A: Family>(packet: &mut Packet<A>) -> Result<(), Outcome> {
    let hz = maps::config().map_or(1, |config| config.jiffies_per_second);
    // SAFETY: copied at once.
    let ports = unsafe { A::FRAGMENTS.get(key(packet)) }.copied().ok_or(Outcome::Fragment)?;
    if (clock::now()).wrapping_sub(ports.seen) > FRAGMENT_SECONDS * hz {
        return Err(Outcome::Fragment);
    }
    packet.key.source_port = ports.source;
    packet.key.destination_port = ports.destination;
    Ok(())
}
