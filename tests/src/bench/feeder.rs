//! Runs a program again and again on a frame that is put back each time, see `tests/ebpf`.

use std::{env, path::Path};

use aya::{
    Ebpf,
    maps::{Array, ProgramArray},
    programs::{ProgramFd, SchedClassifier, TestRun as _, TestRunOptions, Xdp},
};
use lb_bench_ebpf::{FRAME, Feed, program, table};

/// What is measured: which feeder goes on with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// XDP that takes frames in several pieces.
    Xdp,
    /// XDP that does not.
    XdpLinear,
    /// TC.
    Tc,
}

/// Which clients come, and where they stand in the frame.
#[derive(Clone, Copy, Debug)]
pub struct Clients {
    /// How many; a power of two.
    pub count: u32,
    /// Which comes first, where they come one after the other.
    pub first: u32,
    /// In a scattered order, else one after the other.
    pub scattered: bool,
    /// Where the last two bytes of the address are.
    pub address_at: u32,
    /// Where the port is.
    pub port_at: u32,
}

/// The feeders, loaded.
pub struct Feeder {
    ebpf: Ebpf,
    /// struct xdp_md: the interface that frames come in by is its fourth word.
    xdp_context: Vec<u8>,
    /// struct __sk_buff: the eleventh.
    tc_context: Vec<u8>,
    frame: Vec<u8>,
}

/// A plain structure as a table's value.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Pod(Feed);

// SAFETY: words and bytes alone, without padding.
unsafe impl aya::Pod for Pod {}

impl Feeder {
    /// Loads the programs of the benches, for frames that come in by these interfaces in XDP and in TC.
    pub fn load(uplink: u32, veth: u32) -> Self {
        let path = env::var_os("LB_BENCH_OBJECT").expect("LB_BENCH_OBJECT names the benches' eBPF object");
        let mut ebpf = Ebpf::load_file(Path::new(&path)).expect("load the benches' programs");
        let xdp = [program::FEED_XDP, program::FEED_XDP_LINEAR, program::PASS, program::PASS_LINEAR];
        for name in xdp.into_iter().chain([program::GROW, program::NOTE, program::TRANSMIT]) {
            let program: &mut Xdp = ebpf.program_mut(name).expect(name).try_into().expect(name);
            program.load().unwrap_or_else(|error| panic!("load {name}: {error:?}"));
        }
        for name in [program::FEED_TC, program::NOTHING] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).expect(name).try_into().expect(name);
            program.load().unwrap_or_else(|error| panic!("load {name}: {error:?}"));
        }
        let mut tc_context = vec![0; 192];
        tc_context[40..44].copy_from_slice(&veth.to_ne_bytes());
        let mut xdp_context = vec![0; 24];
        xdp_context[12..16].copy_from_slice(&uplink.to_ne_bytes());
        Self { ebpf, xdp_context, tc_context, frame: vec![] }
    }

    /// One of the programs that came with the feeders.
    pub fn own(&self, name: &str) -> ProgramFd {
        let program = self.ebpf.program(name).expect(name);
        program.fd().expect("it is loaded").try_clone().expect("a file descriptor")
    }

    /// Goes on with this program from now on.
    ///
    /// # Errors
    /// The kernel does not let the feeder of this kind go on with it.
    pub fn feed_to(&mut self, kind: Kind, program: &ProgramFd) -> Result<(), aya::maps::MapError> {
        let name = match kind {
            Kind::Xdp => table::XDP,
            Kind::XdpLinear => table::XDP_LINEAR,
            Kind::Tc => table::TC,
        };
        let map = self.ebpf.map_mut(name).expect(name);
        ProgramArray::try_from(map).expect("an array of programs").set(0, program, 0)
    }

    /// Sets the frame, and whose it is from one run to the next.
    pub fn set(&mut self, frame: &[u8], clients: &Clients) {
        assert!(frame.len() <= FRAME && frame.len().is_multiple_of(8), "a frame of {} bytes", frame.len());
        assert!(clients.count.is_power_of_two(), "{} clients", clients.count);
        self.frame = frame.to_vec();
        let mut bytes = [0; FRAME];
        bytes[..frame.len()].copy_from_slice(frame);
        let feed = Feed {
            frame: bytes,
            length: frame.len() as u32,
            address_at: clients.address_at,
            port_at: clients.port_at,
            mask: clients.count - 1,
            next: clients.first.wrapping_sub(1),
            scattered: u32::from(clients.scattered),
        };
        let map = self.ebpf.map_mut(table::FEED).expect("the feed");
        Array::try_from(map).expect("an array").set(0, Pod(feed), 0).expect("set the feed");
    }

    /// Runs the program so many times; nanoseconds a run, and what the last returned.
    pub fn run(&self, kind: Kind, runs: u32) -> (f64, u32) {
        let (name, context) = match kind {
            Kind::Xdp => (program::FEED_XDP, &self.xdp_context),
            Kind::XdpLinear => (program::FEED_XDP_LINEAR, &self.xdp_context),
            Kind::Tc => (program::FEED_TC, &self.tc_context),
        };
        let mut context = context.clone();
        if kind != Kind::Tc {
            context[4..8].copy_from_slice(&(self.frame.len() as u32).to_ne_bytes());
        }
        let options = TestRunOptions {
            data_in: Some(&self.frame),
            ctx_in: Some(&context),
            repeat: runs,
            ..TestRunOptions::default()
        };
        let program = self.ebpf.program(name).expect(name);
        let result = match kind {
            Kind::Tc => <&SchedClassifier>::try_from(program).expect("a TC program").test_run(options),
            _ => <&Xdp>::try_from(program).expect("an XDP program").test_run(options),
        };
        let result = result.unwrap_or_else(|error| panic!("run {name}: {error:?}"));
        (result.duration.as_nanos() as f64, result.return_value)
    }
}
