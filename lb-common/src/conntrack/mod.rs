//! Connection tracking: what the programs and user space share of it. A connection is a client's TCP connection or its
//! exchange of datagrams with one listener; it has one line in the table, found from both sides.
//!
//! [`mod@line`] is the layout, [`table`] the protocol by which several CPUs share it, [`tcp`] what segments say of a
//! connection's state, [`timers`] how long silence lasts, [`hash`] where a line lies.

pub mod hash;
pub mod line;
pub mod table;
#[cfg(test)]
mod table_tests;
pub mod tcp;
pub mod timers;

pub use line::{Control, FiveTuple, Line, Set};
pub use tcp::{Numbers, Segment};
pub use timers::{Phase, TIME_WAIT, Timers, elapsed, is_within};
