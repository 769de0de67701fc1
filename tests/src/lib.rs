//! What the root tests and the demo are made of: namespaces, clusters in them, packets, agents.
//!
//! Everything made here is taken down when it is dropped, also when a test panics.

pub mod agent;
pub mod before;

pub mod bench;
pub mod browser;
pub mod capture;
pub mod cluster;
pub mod engine;
pub mod flood;
pub mod frames;
pub mod kernel;
pub mod lab;
pub mod large;
pub mod netns;
pub mod packet;
pub mod private;
pub mod service;
pub mod stack;
pub mod swarm;
pub mod talk;
pub mod traffic;
pub mod wire;
