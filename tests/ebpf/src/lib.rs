//! What the programs of the benches share with those who run them.
#![no_std]

/// Bytes of a frame that are put back before each run.
pub const FRAME: usize = 192;

/// The frame that a feeder puts before the program that is measured, anew for each run.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Feed {
    /// The frame; what lies past `length` is not looked at.
    pub frame: [u8; FRAME],
    /// Its bytes, a multiple of eight.
    pub length: u32,
    /// Where the last two bytes of the client's address are.
    pub address_at: u32,
    /// Where the client's port is.
    pub port_at: u32,
    /// One less than the number of clients, which is a power of two. The low bits of a client's number are in its port, the
    /// others in its address.
    pub mask: u32,
    /// The number of the client that comes next, or what it is drawn from.
    pub next: u32,
    /// Whether clients come in a scattered order, else one after the other.
    pub scattered: u32,
}

/// A client's port is this and the low bits of its number.
pub const FIRST_PORT: u16 = 0x4000;
/// How many bits of a client's number are in its port.
pub const PORT_BITS: u32 = 12;

/// Names of the tables.
pub mod table {
    /// [`Feed`](crate::Feed), one entry.
    pub const FEED: &str = "FEED";
    /// The program that `feed_xdp` goes on with.
    pub const XDP: &str = "FED_XDP";
    /// The program that `feed_xdp_linear` goes on with.
    pub const XDP_LINEAR: &str = "FED_XDP_LINEAR";
    /// The program that `feed_tc` goes on with.
    pub const TC: &str = "FED_TC";
}

/// Names of the programs.
pub mod program {
    /// Feeds an XDP program that takes frames in several pieces.
    pub const FEED_XDP: &str = "feed_xdp";
    /// Feeds one that does not.
    pub const FEED_XDP_LINEAR: &str = "feed_xdp_linear";
    /// Feeds a TC program.
    pub const FEED_TC: &str = "feed_tc";
    /// `XDP_PASS`, and nothing else: the floor of the XDP programs.
    pub const PASS: &str = "pass";
    /// The same without `frags`.
    pub const PASS_LINEAR: &str = "pass_linear";
    /// Makes room before the frame as a tunnel's headers ask for: what of the feeding is taking it away again.
    pub const GROW: &str = "grow";
    /// Leaves eight bytes before the frame: what of the feeding is taking them away again.
    pub const NOTE: &str = "note";
    /// `XDP_TX`, and nothing else.
    pub const TRANSMIT: &str = "transmit";
    /// `TC_ACT_UNSPEC`, and nothing else: the floor of the TC programs.
    pub const NOTHING: &str = "nothing";
}

/// Bytes that `grow` makes room for: the tunnel's headers over IPv4.
pub const GROWN: u32 = 60;
