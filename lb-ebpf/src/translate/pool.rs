//! Which client an address of the pool stands for, and the reverse: [`lb_common::translation::PoolEntry`]'s protocol on the tables.

use core::ptr::from_ref;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use lb_common::{
    abi::Config,
    net::{Be16, V4, V6},
    translation::{
        BUSY, FREE, NEW, PART_BITS, RESERVED, ROUTER, TRIES, after_reply, after_request, is_held, seen,
        silence, state, word,
    },
};

use crate::io::{
    atomic, clock,
    maps::{self, POOL, POOL_CLIENTS},
    packet::NOBODY,
};

/// The address of a number.
#[inline(always)]
pub fn address(config: &Config, number: u32) -> V4 {
    V4((u32::from_be(config.pool) | number).to_be())
}

/// The address by which routers are known.
#[inline(always)]
pub fn router(config: &Config) -> V4 {
    address(config, ROUTER)
}

/// The number of an address of the pool.
#[inline(always)]
pub fn number(config: &Config, address: V4) -> Option<u32> {
    let differs = u32::from_be(address.0) ^ u32::from_be(config.pool);
    (config.pool_bits != 0 && differs >> (config.pool_bits & 31) == 0).then_some(differs)
}

/// The number of the address that a client has, or is given; [`NOBODY`] if each that could be his is somebody else's.
#[inline(never)]
pub fn take(client: &V6) -> u32 {
    let now = clock::now();
    // SAFETY: copied at once.
    if let Some(number) = unsafe { POOL_CLIENTS.get(client) }.copied()
        && hear(number, client, now)
    {
        return number;
    }
    let Some(config) = maps::config() else {
        return NOBODY;
    };
    // Another CPU may take what was chosen, for the same client or another one.
    for _ in 0..2 {
        let number = choose(config, client, now);
        if number != NOBODY {
            return known(client, number, now);
        }
        let other = find(client);
        if other != NOBODY {
            return other;
        }
    }
    NOBODY
}

/// The number of the address that a client has; [`NOBODY`] if he has none. It says nothing of him: anybody may send an error about
/// what was sent to him.
#[inline(never)]
pub fn find(client: &V6) -> u32 {
    // SAFETY: copied at once.
    let Some(number) = unsafe { POOL_CLIENTS.get(client) }.copied() else {
        return NOBODY;
    };
    let Some(entry) = POOL.get_ptr_mut(number) else {
        return NOBODY;
    };
    // SAFETY: as below.
    let his = unsafe { is_held((&raw const (*entry).word).read_volatile()) && is_of(entry, client) };
    if his { number } else { NOBODY }
}

/// Whether a number is a client's, which is then noted as heard.
#[inline(always)]
fn hear(number: u32, client: &V6, now: u32) -> bool {
    let Some(entry) = POOL.get_ptr_mut(number) else {
        return false;
    };
    // SAFETY: an array's entry is valid while the program runs, its words are aligned, and the word by which it is known whose
    // the others are is read before and after them.
    unsafe {
        let before = (&raw const (*entry).word).read_volatile();
        if !is_held(before) || !is_of(entry, client) {
            return false;
        }
        let next = after_request(state(before));
        if next != state(before) || clock::is_due(seen(before), now) {
            let noted = atomic::swap_if64(&raw mut (*entry).word, before, word(next, now));
            // Another packet of his may have been faster.
            return noted || is_held((&raw const (*entry).word).read_volatile()) && is_of(entry, client);
        }
    }
    true
}

/// Whether an entry names the client.
///
/// # Safety
/// It is one of the table's.
#[inline(always)]
unsafe fn is_of(entry: *const lb_common::translation::PoolEntry, client: &V6) -> bool {
    // SAFETY: the caller's.
    let known = unsafe { (&raw const (*entry).client.0).read_volatile() };
    known[0] == client.0[0] && known[1] == client.0[1] && known[2] == client.0[2] && known[3] == client.0[3]
}

/// Of those addresses that a client may have, takes the one that is least missed.
#[inline(always)]
fn choose(config: &Config, client: &V6, now: u32) -> u32 {
    let bits = config.pool_bits & 31;
    let size = 1_u32 << bits;
    let part_bits = if bits > 2 * PART_BITS { PART_BITS } else { 0 };
    let part_size = size >> part_bits;
    let hash = config.hash_keys.endpoint(client, Be16::from_raw(0), 0);
    // Odd, so that each address of the part is tried once before any is again.
    let (hash, step) = (hash as u32, (hash >> 32) as u32 | 1);
    let [first, second, ..] = client.0;
    let network = V6([first, second & 0xffff_0000_u32.to_be(), 0, 0]);
    let part = config.hash_keys.endpoint(&network, Be16::from_raw(1), 0) as u32 & ((1 << part_bits) - 1);
    let (mut best, mut longest) = (NOBODY, 0);
    for probe in 0..TRIES {
        let number = part * part_size + (hash.wrapping_add(probe.wrapping_mul(step)) & (part_size - 1));
        if number < RESERVED || number == size - 1 {
            continue;
        }
        let Some(entry) = POOL.get_ptr_mut(number) else {
            continue;
        };
        // SAFETY: as above.
        let read = unsafe { (&raw const (*entry).word).read_volatile() };
        if let Some(silent) = silence(read, now)
            && (best == NOBODY || silent > longest)
        {
            (best, longest) = (number, silent);
            if state(read) == FREE {
                break;
            }
        }
    }
    let Some(entry) = POOL.get_ptr_mut(best) else {
        return NOBODY;
    };
    // SAFETY: as above; who has swapped the word owns the rest.
    unsafe {
        let read = (&raw const (*entry).word).read_volatile();
        if silence(read, now).is_none() || !atomic::swap_if64(&raw mut (*entry).word, read, word(BUSY, now)) {
            return NOBODY;
        }
        if state(read) != FREE {
            let former = (&raw const (*entry).client).read_volatile();
            // He may have another one by now.
            if POOL_CLIENTS.get(former).copied() == Some(best) {
                let _ = POOL_CLIENTS.remove(former);
            }
        }
        let to = &raw mut (*entry).client;
        (&raw mut (*to).0[0]).write_volatile(client.0[0]);
        (&raw mut (*to).0[1]).write_volatile(client.0[1]);
        (&raw mut (*to).0[2]).write_volatile(client.0[2]);
        (&raw mut (*to).0[3]).write_volatile(client.0[3]);
        (&raw mut (*entry).since).write_volatile(now);
        atomic::swap(&raw mut (*entry).word, word(NEW, now));
    }
    best
}

/// Says that a client has an address, unless another packet of his was faster: then he has what that one took.
#[inline(always)]
fn known(client: &V6, number: u32, now: u32) -> u32 {
    if POOL_CLIENTS.insert(client, number, BPF_NOEXIST as u64).is_ok() {
        return number;
    }
    // SAFETY: copied at once.
    if let Some(other) = unsafe { POOL_CLIENTS.get(client) }.copied()
        && other != number
        && hear(other, client, now)
    {
        if let Some(entry) = POOL.get_ptr_mut(number) {
            // SAFETY: as above.
            unsafe { atomic::swap_if64(&raw mut (*entry).word, word(NEW, now), word(FREE, 0)) };
        }
        return other;
    }
    // What stands there is of one who has lost it.
    let _ = POOL_CLIENTS.insert(client, number, BPF_ANY as u64);
    number
}

/// The client that an address of the pool stands for.
#[inline(always)]
pub fn client(number: u32) -> Option<&'static V6> {
    let entry = POOL.get_ptr_mut(number)?;
    // SAFETY: as above. Who is given the address at this moment has no connection that the packet could be of: it ends there.
    unsafe {
        let held = is_held((&raw const (*entry).word).read_volatile());
        held.then_some(&*from_ref(&(*entry).client))
    }
}

/// Notes that a task has answered the client whom it knows by this address: what it sent was of a connection of his.
#[inline(never)]
pub fn answered(number: u32) -> u32 {
    let Some(entry) = POOL.get_ptr_mut(number) else {
        return 0;
    };
    let now = clock::now();
    // SAFETY: as above.
    unsafe {
        let before = (&raw const (*entry).word).read_volatile();
        let next = after_reply(state(before));
        if is_held(before) && (next != state(before) || clock::is_due(seen(before), now)) {
            atomic::swap_if64(&raw mut (*entry).word, before, word(next, now));
        }
    }
    0
}
