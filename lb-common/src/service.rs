//! What the datapath knows of a service beside its listeners.

use crate::{conntrack::Timers, pod};

/// An entry of the table of services.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Settings {
    /// When its connections have ended.
    pub timers: Timers,
    /// Connections that one of its tasks may have, those of all nodes' clients; zero is any number.
    pub task_connections: u32,
    /// Zero.
    pub _pad: u32,
}

const _: () = assert!(size_of::<Settings>() == 40);

pod!(Settings);
