//! The benches of `cargo xtask bench`: a module measures one thing, beside what it is to be set against, in one run.

mod agents;
pub mod control;
mod feeder;
pub mod figure;
pub mod forward;
mod line;
mod live;
mod load;
pub mod packets;
mod paths;
mod rivals;
pub mod tcp;
pub mod translation;
