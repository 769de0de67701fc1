//! What the stages work with: the frame, the packet, the tables, the counters, the clock, sums. Imports `wire` alone.

pub mod atomic;
pub mod clock;
pub mod counters;
pub mod family;
pub mod frame;
pub mod maps;
pub mod packet;
pub mod sum;
pub mod verifier;
