//! What is done for the verifier's sake alone, each under its name.

use lb_common::outcome::{OUTCOMES, Outcome};
pub use lb_common::verifier::opaque;

const REFUSED: u64 = 1 << 32;

/// [`pack`] of what is malformed.
pub const PACKED_MALFORMED: u64 = REFUSED | Outcome::Malformed as u64;

/// What a stage that is not inlined comes to, as the plain number that such a function may return: a word, or an outcome, any.
///
/// A function of its own is verified once with what it is given, and its many ends become one state for its caller.
#[inline(always)]
pub fn pack(done: Result<u32, Outcome>) -> u64 {
    match done {
        Ok(word) => word as u64,
        Err(outcome) => REFUSED | outcome as u64,
    }
}

/// A word of which the verifier knows nothing any more, for it went through a table, `place`: it follows one through the later
/// stages instead of one for each way that led here.
#[inline(always)]
pub fn forget(place: &mut u64, word: u64) -> u64 {
    // SAFETY: a reference is valid for both.
    unsafe {
        (&raw mut *place).write_volatile(word);
        (&raw const *place).read_volatile()
    }
}

/// The reverse of [`pack`].
#[inline(always)]
pub fn unpack(packed: u64) -> Result<u32, Outcome> {
    unpack_raw(packed).map_err(outcome)
}

/// The reverse, the outcome as its discriminant: where it is counted next.
#[inline(always)]
pub fn unpack_raw(packed: u64) -> Result<u32, u32> {
    if packed & REFUSED == 0 { Ok(packed as u32) } else { Err(packed as u32 & 0xff) }
}

/// The outcome of a discriminant; of none, what is malformed.
#[inline(always)]
pub fn outcome(discriminant: u32) -> Outcome {
    let discriminant = discriminant as u8;
    if discriminant as usize >= OUTCOMES {
        return Outcome::Malformed;
    }
    // SAFETY: the discriminants of the enum, whose representation this is, are 0 to OUTCOMES - 1.
    unsafe { core::mem::transmute::<u8, Outcome>(discriminant) }
}
