//! Controller and command line of the balancer.
//!
//! ```text
//! source ─► cluster ─► plan ─► datapath        net ─► ways to the tasks ─► plan
//! ```

pub mod cluster;
pub mod plan;
pub mod slots;
pub mod source;
