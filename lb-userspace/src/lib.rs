//! Controller and command line of the balancer.
//!
//! ```text
//! source ─► cluster ─► plan ─► datapath        net ─► ways to the tasks ─► plan
//! ```
//!
//! [`controller`] joins them; [`cmd`] holds the verbs.

pub mod check;
pub mod cli;
pub mod cluster;
pub mod cmd;
pub mod connection;
pub mod controller;
pub mod datapath;
pub mod descriptors;
pub mod doctor;
pub mod events;
pub mod explain;
pub mod health;
pub mod host;
pub mod inventory;
pub mod limits;
pub mod logging;
pub mod net;
pub mod plan;
pub mod report;
pub mod serve;
pub mod settings;
pub mod slots;
pub mod source;
pub mod supervisor;
pub mod testing;
pub mod text;
pub mod top;
pub mod translation;
pub mod tunnel_key;
pub mod units;
