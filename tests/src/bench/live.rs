//! Live frames, as a network card's driver hands them to XDP: made, sent and counted where they arrive, see
//! `tests/ebpf`.

use std::{env, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData, PerCpuArray},
    programs::{
        SchedClassifier, TcAttachType, TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode,
        tc::qdisc_add_clsact,
    },
};
use lb_bench_ebpf::{CLIENTS, FIRST_PORT, FRAME, Feed, INTERFACE, Stream, Wanted, program, table};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use crate::netns::Netns;

/// How often frames are sent of which too many get lost.
const TRIES: u32 = 8;
/// Frames that are under way arrive within this time.
const QUIET: std::time::Duration = std::time::Duration::from_millis(20);
/// Frames that the generator hands over at a time, as many as a driver's poll.
const BATCH: u32 = 64;

/// A frame, and where in it stands whose it is.
#[derive(Clone)]
pub struct Shape {
    /// The frame of the first client; the low half of its address is zero.
    pub frame: Vec<u8>,
    /// Where the IPv4 header is that holds the client's address.
    pub network: u32,
    /// Whether the client is the one that it goes to, by the backend that the client was given.
    pub answer: bool,
    /// Whether its source is to be that backend.
    pub from_backend: bool,
}

impl Shape {
    fn stream(&self, interface: u32, clients: u32, first: u32) -> Stream {
        let mut frame = [0; FRAME];
        frame[..self.frame.len()].copy_from_slice(&self.frame);
        let (addresses, ports) = (self.network + 12, self.network + 20);
        let feed = Feed {
            frame,
            // The generator writes words of eight bytes.
            length: (self.frame.len() as u32).next_multiple_of(8),
            address_at: addresses + if self.answer { 4 + 2 } else { 2 },
            port_at: ports + if self.answer { 2 } else { 0 },
            mask: clients - 1,
            next: first.wrapping_sub(1),
            scattered: 0,
        };
        let backend_at = if self.from_backend { addresses + 2 } else { 0 };
        Stream {
            feed,
            interface,
            header_sum_at: self.network + 10,
            sum_at: ports + 16,
            backend_at,
            frames: 0,
            begun: 0,
            ended: 0,
            timed: 0,
        }
    }
}

/// The first client's port.
pub const PORT: u16 = FIRST_PORT;

/// The programs, loaded.
pub struct Live {
    ebpf: Ebpf,
    cpu: usize,
    clients: u32,
}

/// A plain structure as a table's value.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Plain<T>(T);

// SAFETY: words and bytes alone, without padding.
unsafe impl aya::Pod for Plain<Stream> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Wanted> {}

impl Live {
    /// Loads them; `redirect` sends to an interface, or back where a frame came from if it is 0. What is sent is worked off
    /// by the last of the machine's processors.
    pub fn load(redirect_to: u32) -> Self {
        let path = env::var_os("LB_BENCH_OBJECT").expect("LB_BENCH_OBJECT names the benches' eBPF object");
        let mut loader = EbpfLoader::new();
        loader.override_global(INTERFACE, &redirect_to, true);
        let ebpf = loader.load_file(Path::new(&path)).expect("load the benches' programs");
        let cpu = std::thread::available_parallelism().map_or(1, usize::from) - 1;
        let mut live = Self { ebpf, cpu, clients: CLIENTS };
        live.xdp(program::GENERATE).load().expect("load the generator");
        live
    }

    fn xdp(&mut self, name: &str) -> &mut Xdp {
        self.ebpf.program_mut(name).expect(name).try_into().expect("an XDP program")
    }

    /// Attaches an XDP program to an interface, natively.
    pub fn attach_xdp(&mut self, name: &str, netns: &Netns, interface: &str) {
        let program = self.xdp(name);
        if program.fd().is_err() {
            program.load().unwrap_or_else(|error| panic!("load {name}: {error:?}"));
        }
        netns.enter(|| {
            let attached = program.attach(interface, XdpMode::Driver);
            attached.unwrap_or_else(|error| panic!("attach {name} to {interface}: {error:?}"));
        });
    }

    /// Counts and ends what arrives at an interface in socket buffers.
    pub fn attach_tc_sink(&mut self, netns: &Netns, interface: &str) {
        let name = program::SINK_TC;
        let program: &mut SchedClassifier =
            self.ebpf.program_mut(name).expect(name).try_into().expect("a TC program");
        if program.fd().is_err() {
            program.load().unwrap_or_else(|error| panic!("load {name}: {error:?}"));
        }
        netns.enter(|| {
            // Kernels without TCX attach to this; where it is already it stays.
            let _ = qdisc_add_clsact(interface);
            let attached = program.attach(interface, TcAttachType::Ingress);
            attached.unwrap_or_else(|error| panic!("attach {name} to {interface}: {error:?}"));
        });
    }

    /// Says what ought to arrive: where its destination address begins, and the port.
    pub fn want(&mut self, network: [u8; 2], port: u16) {
        let wanted = Plain(Wanted { network: u16::from_be_bytes(network), port, _pad: 0 });
        let map = self.ebpf.map_mut(table::WANTED).expect("the table");
        Array::try_from(map).expect("an array").set(0, wanted, 0).expect("set what is wanted");
    }

    /// Packets that have arrived so far.
    pub fn arrived(&self) -> u64 {
        let map = self.ebpf.map(table::ARRIVED).expect("the table");
        let counts: PerCpuArray<_, u64> = map.try_into().expect("counters");
        counts.get(&0, 0).expect("the counters").iter().sum()
    }

    /// Which clients send from now on: so many, a power of two.
    pub fn set_clients(&mut self, clients: u32) {
        assert!(clients.is_power_of_two() && clients <= CLIENTS, "{clients} clients");
        self.clients = clients;
    }

    /// Sends a frame of each of some clients.
    pub fn send_each(&mut self, netns: &Netns, interface: &str, shape: &Shape, first: u32, count: u32) {
        self.run(netns, Some(interface), shape, (CLIENTS, first), count);
    }

    /// Sends so many frames, of all clients in turn, and waits for them to arrive, nearly all of which must; nanoseconds a
    /// frame. Where more are lost, because something else had the processors, they are sent again, some times.
    pub fn send(&mut self, netns: &Netns, interface: &str, shape: &Shape, count: u32) -> f64 {
        // One in a thousand may be lost in a full ring.
        let least = u64::from(count - count / 1_000);
        let mut lost = 0;
        for _ in 0..TRIES {
            let before = self.arrived();
            let cost = self.run(netns, Some(interface), shape, (self.clients, 0), count);
            let arrived = self.settled() - before;
            if arrived >= least {
                return cost;
            }
            lost = u64::from(count) - arrived;
            eprintln!("{lost} of {count} frames got lost: sent again");
        }
        panic!("{lost} of {count} frames got lost, {TRIES} times");
    }

    /// What has arrived once no more does.
    fn settled(&self) -> u64 {
        let mut arrived = self.arrived();
        loop {
            std::thread::sleep(QUIET);
            let now = self.arrived();
            if now == arrived {
                return now;
            }
            arrived = now;
        }
    }

    /// The same where nothing is to arrive; nor is anything sent where no interface is named.
    pub fn send_nowhere(&mut self, netns: &Netns, interface: Option<&str>, shape: &Shape, count: u32) -> f64 {
        self.run(netns, interface, shape, (self.clients, 0), count)
    }

    /// Has the generator make so many frames; nanoseconds a frame, between the first and one of the last: what the system
    /// call takes before and after is another matter.
    fn run(
        &mut self,
        netns: &Netns,
        interface: Option<&str>,
        shape: &Shape,
        (clients, first): (u32, u32),
        count: u32,
    ) -> f64 {
        let index = |name| nix::net::if_::if_nametoindex(name).expect("the generator's interface");
        let interface = interface.map_or(0, |name| netns.enter(|| index(name)));
        self.stream().set(0, Plain(shape.stream(interface, clients, first)), 0).expect("set the stream");
        let name = program::GENERATE;
        let program: &Xdp = self.ebpf.program(name).expect(name).try_into().expect("an XDP program");
        let frame = vec![0; shape.frame.len().next_multiple_of(8)];
        netns.enter(|| {
            let mut cpus = CpuSet::new();
            cpus.set(self.cpu).expect("a processor");
            sched_setaffinity(Pid::from_raw(0), &cpus).expect("stay on one processor");
            let options = TestRunOptions {
                data_in: Some(&frame),
                repeat: count,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::default()
            };
            program.test_run(options).unwrap_or_else(|error| panic!("send live frames: {error:?}"));
        });
        let Plain(stream) = self.stream().get(&0, 0).expect("the stream");
        (stream.ended - stream.begun) as f64 / stream.timed as f64
    }

    fn stream(&mut self) -> Array<&mut MapData, Plain<Stream>> {
        Array::try_from(self.ebpf.map_mut(table::STREAM).expect("the table")).expect("an array")
    }
}
