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

/// Clients that the live generator knows.
pub const CLIENTS: u32 = 1 << 16;

/// What the live generator sends. The frame's checksums are those of a client whose number is zero.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Stream {
    /// The frame, and whose it is.
    pub feed: Feed,
    /// The interface that it is sent out of; zero if it is only made.
    pub interface: u32,
    /// Where the checksum of the IPv4 header is that holds the client's address.
    pub header_sum_at: u32,
    /// Where the transport checksum is.
    pub sum_at: u32,
    /// Where the last two bytes of the backend's address are, which are zero in the frame; zero if the backend that the
    /// client was given is not to be written.
    pub backend_at: u32,
    /// Frames made so far.
    pub frames: u64,
    /// When the first was made, and the last at which time was looked at: nanoseconds of the monotonic clock.
    pub begun: u64,
    /// See there.
    pub ended: u64,
    /// Frames made between.
    pub timed: u64,
}

/// The live generator looks at the time once in so many frames, a power of two.
pub const TIMED: u64 = 1024;

/// What ought to arrive.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Wanted {
    /// The first two bytes of its destination address.
    pub network: u16,
    /// Its destination port.
    pub port: u16,
    /// Zero.
    pub _pad: u32,
}

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
    /// [`Stream`](crate::Stream), one entry.
    pub const STREAM: &str = "STREAM";
    /// [`Wanted`](crate::Wanted), one entry.
    pub const WANTED: &str = "WANTED";
    /// Per CPU, packets that have arrived as wanted.
    pub const ARRIVED: &str = "ARRIVED";
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
    /// Makes live frames.
    pub const GENERATE: &str = "generate";
    /// Counts and ends those that arrive, in XDP.
    pub const SINK_XDP: &str = "sink_xdp";
    /// The same in TC.
    pub const SINK_TC: &str = "sink_tc";
    /// `bpf_redirect`, and nothing else.
    pub const REDIRECT: &str = "redirect";
    /// `XDP_DROP`, and nothing else.
    pub const DISCARD: &str = "discard";
}

/// The constant that says where `redirect` sends to; zero is back.
pub const INTERFACE: &str = "INTERFACE";

/// Bytes that `grow` makes room for: the tunnel's headers over IPv4.
pub const GROWN: u32 = 60;
