//! The programs on the bench: loaded in a namespace of their own, tables filled by the planner, fed with packets
//! by BPF_PROG_TEST_RUN, every counter watched.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use aya::maps::{HashMap, Map, MapData};
use aya::programs::{Program, ProgramFd, SchedClassifier, TestRun, TestRunOptions, TestRunResult, Xdp};
use lb_common::{
    abi::{Config, HANDOVER_MAGIC, PARTIAL_CHECKSUMS, XDP_TRANSMITS, program, table},
    flow::{Flow, FlowKey, REPLY, Spare, Timers},
    net::{Be16, V4, V6},
    outcome::Outcome,
    tunnel::DEFAULT_PORT,
};
use lb_userspace::{
    cluster::{ClusterState, Idle, Node, Service, Task, TaskState, Via},
    datapath::{Counters, Datapath, FlowLog, PinDir, Sizes, Sweep},
    net::Reset,
    plan::{Planner, Reach, View, Way},
};

use crate::{
    frames::assert_frame,
    netns::Netns,
    packet::{NODE_MAC, Packet},
};

/// Hardware address of the next hop to routed and snat tasks.
pub const HOP_MAC: [u8; 6] = [2, 0, 0, 0, 0, 99];
/// Hardware address of local tasks.
pub const TASK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 50];
/// Hardware address of the bridge before them.
pub const BRIDGE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 51];

/// What became of a packet in a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The program's return value.
    pub action: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// XDP's note for TC.
    pub note: Option<u32>,
}

/// `XDP_DROP`.
pub const DROP: u32 = 1;
/// `XDP_PASS`.
pub const PASS: u32 = 2;
/// `XDP_TX`.
pub const TX: u32 = 3;
/// `TC_ACT_UNSPEC`.
pub const UNSPEC: u32 = u32::MAX;
/// `TC_ACT_REDIRECT`.
pub const REDIRECT: u32 = 7;

/// The entries of the flow tables; compared without their times.
#[derive(Clone, Debug)]
pub struct FlowState {
    /// Established, half open.
    v4: [FlowMap<V4>; 2],
    v6: [FlowMap<V6>; 2],
}

type FlowMap<A> = std::collections::HashMap<FlowKey<A>, Flow<A>>;

impl PartialEq for FlowState {
    fn eq(&self, other: &Self) -> bool {
        fn same<A: PartialEq + Copy + Eq + std::hash::Hash>(one: &FlowMap<A>, other: &FlowMap<A>) -> bool {
            let timeless = |flow: &Flow<A>| Flow { seen: 0, hop_seen: 0, ..*flow };
            let twin = |(key, flow): (&FlowKey<A>, &Flow<A>)| {
                other.get(key).is_some_and(|other| timeless(flow) == timeless(other))
            };
            one.len() == other.len() && one.iter().all(twin)
        }
        self.v4.iter().zip(&other.v4).all(|(one, other)| same(one, other))
            && self.v6.iter().zip(&other.v6).all(|(one, other)| same(one, other))
    }
}

/// A table of the datapath of this namespace's `eth1` that is keyed by five-tuples.
pub fn table_by_flow<A, V: aya::Pod>(table: &str) -> HashMap<MapData, FlowKey<A>, V>
where
    FlowKey<A>: aya::Pod,
{
    let pin = PinDir::of("eth1").expect("the pins").table(table);
    let map = Map::from_map_data(MapData::from_pin(pin).expect("the table")).expect("a table");
    map.try_into().expect("a hash table")
}

fn flow_table<A>(table: &str) -> HashMap<MapData, FlowKey<A>, Flow<A>>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    table_by_flow(table)
}

fn fill<A>(table: &str, flows: &FlowMap<A>)
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    let mut there = flow_table(table);
    for (key, flow) in flows {
        there.insert(key, flow, 0).expect("an entry");
    }
}

/// What is done to each flow.
#[derive(Clone, Copy)]
enum Change {
    Forget,
    /// The next hop was asked for then.
    Touch(u32),
}

/// The bench.
pub struct Lab {
    datapath: Option<Datapath>,
    cluster: ClusterState,
    /// Interface indexes of the uplink and of the local tasks' veth.
    pub uplink: u32,
    /// Of the local tasks' veth.
    pub veth: u32,
    /// [`lb_common::backend::VIA_TC`] or nothing, for the ways to other nodes; taken up by the next update.
    pub way_flags: u8,
    /// MTU of the ways to other nodes; taken up by the next update.
    pub mtu: u32,
}

/// An address from text.
pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A service of the bench.
pub fn service(name: &str, ports: &[&str], tasks: Vec<Task>) -> Service {
    let ports = ports.iter().map(|port| port.parse().expect("a port")).collect();
    Service {
        name: name.into(),
        addresses: vec![],
        ports,
        tasks,
        returns: None,
        placement: lb_userspace::cluster::Placement::default(),
        left: String::new(),
        problem: String::new(),
        timers: Timers::DEFAULT,
        idle: Idle::Forget,
    }
}

/// A task of the bench; `here` is local, else it is reached as `via` says.
pub fn task(name: &str, here: bool, via: Via, addresses: &[&str]) -> Task {
    let node = if here { "node1" } else { "node2" }.to_owned();
    let addresses = addresses.iter().map(|text| ip(text)).collect();
    Task { name: name.into(), node, addresses, overlay: None, state: TaskState::Running, weight: 1, via }
}

/// Runs a test on a bench of its own.
pub fn with_lab(services: Vec<Service>, test: impl FnOnce(&mut Lab) + Send) {
    let sizes = Sizes {
        flows: Some(16_384),
        half_open: Some(4_096),
        services: Some(64),
        listeners: Some(256),
        backends: Some(256),
        slots: Some(8_192),
        ..Sizes::default()
    };
    with_lab_of(sizes, services, test);
}

/// The same with tables of other sizes.
pub fn with_lab_of(sizes: Sizes, services: Vec<Service>, test: impl FnOnce(&mut Lab) + Send) {
    let netns = Netns::new("bench");
    netns.ip("link add eth1 type veth peer name wire");
    netns.ip("link add hv1 type veth peer name task");
    for link in ["eth1", "wire", "hv1", "task"] {
        netns.ip(&format!("link set {link} up"));
    }
    netns.enter(move || {
        let index = |name: &str| nix::net::if_::if_nametoindex(name).expect("an interface");
        let datapath = Datapath::open("eth1", &sizes, FlowLog::Off).unwrap_or_else(|error| panic!("{error}"));
        let node = |number: u8| Node {
            name: format!("node{number}"),
            host: String::new(),
            addresses: vec![ip(&format!("192.0.2.{number}")), ip(&format!("2001:db8::{number}"))],
            agent: true,
        };
        let nodes = vec![node(1), node(2)];
        let services = services.into_iter().map(Arc::new).collect();
        let cluster = ClusterState { nodes, services, ..ClusterState::default() };
        let mut lab = Lab {
            datapath: Some(datapath),
            cluster,
            uplink: index("eth1"),
            veth: index("hv1"),
            way_flags: 0,
            mtu: 1500,
        };
        lab.configure(|config| config.flags = XDP_TRANSMITS | PARTIAL_CHECKSUMS);
        lab.update(|_| {});
        test(&mut lab);
    });
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(datapath) = self.datapath.take() {
            datapath.remove(&[]);
        }
    }
}

impl Lab {
    /// The datapath.
    pub fn datapath(&self) -> &Datapath {
        self.datapath.as_ref().expect("the datapath is there until the end")
    }

    fn datapath_mut(&mut self) -> &mut Datapath {
        self.datapath.as_mut().expect("the datapath is there until the end")
    }

    /// The cluster as it is.
    pub fn cluster(&self) -> &ClusterState {
        &self.cluster
    }

    /// The kernel's coarse clock as flows have it, low 32 bits.
    pub fn jiffies(&self) -> u32 {
        self.datapath().now().expect("the clock")
    }

    /// Changes the programs' surroundings.
    pub fn configure(&mut self, change: impl FnOnce(&mut Config)) {
        let mut config = self.datapath().config();
        config.uplink = self.uplink;
        if config.snat_ports == [0, 0] {
            config.snat_ports = [20_000, 20_100];
            config.host_ports = [32_768, 60_999];
            config.jiffies_per_second = 250;
            config.tunnel_port = Be16::new(DEFAULT_PORT);
        }
        change(&mut config);
        self.datapath_mut().set_config(config).expect("write the surroundings");
    }

    /// Changes the cluster, and the tables with it.
    pub fn update(&mut self, change: impl FnOnce(&mut ClusterState)) {
        change(&mut self.cluster);
        let mut planner = Planner::default();
        let ways: BTreeMap<_, _> = planner
            .destinations(&self.cluster, "node1")
            .into_iter()
            .map(|(address, reach)| ((address, reach), Ok(self.way(address, reach))))
            .collect();
        let addresses = [ip("192.0.2.1"), ip("2001:db8::1")];
        let view = View { cluster: &self.cluster, node: "node1", addresses: &addresses, ways: &ways };
        let limits = self.datapath().limits().expect("limits");
        let plan = planner.plan(&view, self.datapath().tables(), &limits);
        assert_eq!(plan.refused, Vec::<String>::new());
        for op in plan.ops {
            self.datapath_mut().apply(op).expect("apply");
        }
    }

    fn way(&self, address: IpAddr, reach: Reach) -> Way {
        let source = Some(if address.is_ipv4() { ip("192.0.2.1") } else { ip("2001:db8::1") });
        let (ifindex, mac, source_mac) = match reach {
            Reach::Local => (self.veth, TASK_MAC, BRIDGE_MAC),
            Reach::Snat | Reach::Routed | Reach::Peer => (self.uplink, HOP_MAC, NODE_MAC),
        };
        Way { ifindex, mac, source_mac, source, mtu: self.mtu, flags: self.way_flags, silent: None }
    }

    fn xdp_program(&self) -> &Xdp {
        match self.datapath().program(program::UPLINK_XDP) {
            Some(Program::Xdp(program)) => program,
            _ => panic!("no XDP program"),
        }
    }

    fn tc_program(&self, name: &str) -> &SchedClassifier {
        match self.datapath().program(name) {
            Some(Program::SchedClassifier(program)) => program,
            _ => panic!("no TC program {name}"),
        }
    }

    /// struct xdp_md
    fn xdp_context(&self, frame: &[u8]) -> Vec<u8> {
        let words = [0, frame.len() as u32, 0, self.uplink, 0, 0];
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// Runs the uplink's XDP program.
    pub fn xdp(&self, frame: &[u8]) -> Verdict {
        let (action, mut out) = run(self.xdp_program(), frame, &self.xdp_context(frame));
        let mut note = None;
        if out.len() > 8 && out[..4] == HANDOVER_MAGIC.to_ne_bytes() {
            note = Some(u32::from_ne_bytes([out[4], out[5], out[6], out[7]]));
            out.drain(..8);
        }
        Verdict { action, frame: out, note }
    }

    /// Runs a TC program on a frame that came in by an interface.
    pub fn tc(&self, name: &str, frame: &[u8], ifindex: u32) -> Verdict {
        let (action, out) = run(self.tc_program(name), frame, &tc_context(ifindex));
        Verdict { action, frame: out, note: None }
    }

    /// TC ingress on the uplink.
    pub fn uplink_tc(&self, frame: &[u8]) -> Verdict {
        self.tc(program::UPLINK_TC, frame, self.uplink)
    }

    /// TC ingress on the tasks' veth.
    pub fn task_tc(&self, frame: &[u8]) -> Verdict {
        self.tc(program::TASK_TC, frame, self.veth)
    }

    /// Takes the IPv4 entries that are chosen out of a flow table, as evictions would; how many there were.
    pub fn evict(&self, table: &str, chosen: impl Fn(&Flow<V4>) -> bool) -> usize {
        let mut flows = flow_table::<V4>(table);
        let entries: Vec<_> = flows.iter().flatten().filter(|(_, flow)| chosen(flow)).collect();
        for (key, _) in &entries {
            flows.remove(key).expect("an entry");
        }
        entries.len()
    }

    /// Takes every IPv4 entry for replies out of the flow tables; how many there were.
    pub fn evict_replies(&self) -> usize {
        let tables = [table::FLOWS4, table::HALF_OPEN4];
        tables.iter().map(|table| self.evict(table, |flow| flow.role == REPLY)).sum()
    }

    /// The IPv4 entries of a flow table.
    pub fn flows(&self, table: &str) -> Vec<(FlowKey<V4>, Flow<V4>)> {
        flow_table(table).iter().flatten().collect()
    }

    /// Walks once through all flows; what came of it, and the resets that the controller would send.
    pub fn sweep(&mut self) -> (Sweep, Vec<Reset>) {
        let mut resets = Vec::new();
        loop {
            if let Some(sweep) = self.datapath_mut().sweep(&mut resets).expect("walk through the flows") {
                return (sweep, resets);
            }
        }
    }

    /// Forgets every flow.
    pub fn forget_flows(&self) {
        self.each_family(Change::Forget);
    }

    /// Forgets every spare; how many there were.
    pub fn forget_spares(&self) -> usize {
        fn forget<A: 'static>(table: &str) -> usize
        where
            FlowKey<A>: aya::Pod,
            Spare<A>: aya::Pod,
        {
            let mut spares = table_by_flow::<A, Spare<A>>(table);
            let keys: Vec<_> = spares.keys().flatten().collect();
            keys.iter().for_each(|key| spares.remove(key).expect("an entry"));
            keys.len()
        }
        forget::<V4>(table::SPARES4) + forget::<V6>(table::SPARES6)
    }

    /// What is known of all flows.
    pub fn flow_state(&self) -> FlowState {
        FlowState {
            v4: [table::FLOWS4, table::HALF_OPEN4].map(|table| flow_table(table).iter().flatten().collect()),
            v6: [table::FLOWS6, table::HALF_OPEN6].map(|table| flow_table(table).iter().flatten().collect()),
        }
    }

    /// Makes it what it was.
    pub fn set_flow_state(&self, state: &FlowState) {
        self.forget_flows();
        for (table, flows) in [table::FLOWS4, table::HALF_OPEN4].into_iter().zip(&state.v4) {
            fill(table, flows);
        }
        for (table, flows) in [table::FLOWS6, table::HALF_OPEN6].into_iter().zip(&state.v6) {
            fill(table, flows);
        }
    }

    /// Makes the next hop of every flow fresh.
    pub fn touch_hops(&self) {
        self.each_family(Change::Touch(self.jiffies()));
    }

    fn each_family(&self, change: Change) {
        for table in [table::FLOWS4, table::HALF_OPEN4] {
            self.each_flow::<V4>(table, change);
        }
        for table in [table::FLOWS6, table::HALF_OPEN6] {
            self.each_flow::<V6>(table, change);
        }
    }

    fn each_flow<A>(&self, table: &str, change: Change)
    where
        FlowKey<A>: aya::Pod,
        Flow<A>: aya::Pod,
    {
        let mut flows = flow_table::<A>(table);
        let entries: Vec<_> = flows.iter().flatten().collect();
        for (key, flow) in entries {
            match change {
                Change::Forget => flows.remove(&key).expect("an entry"),
                Change::Touch(now) => {
                    flows.insert(key, Flow { hop_seen: now, ..flow }, 0).expect("an entry");
                }
            }
        }
    }

    /// A program, to be run by others.
    pub fn program(&self, name: &str) -> ProgramFd {
        let program = self.datapath().program(name).expect(name);
        program.fd().expect("it is loaded").try_clone().expect("a file descriptor")
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        self.datapath().counters().expect("counters")
    }

    /// Runs something and says which outcomes were counted meanwhile.
    pub fn counting<T>(&self, body: impl FnOnce(&Self) -> T) -> (T, BTreeMap<Outcome, u64>) {
        let before = self.counters();
        let result = body(self);
        let after = self.counters();
        let changes = Outcome::ALL
            .iter()
            .map(|outcome| (*outcome, after.of(*outcome) - before.of(*outcome)))
            .filter(|(_, change)| *change > 0)
            .collect();
        (result, changes)
    }

    /// Asserts that XDP passes a frame untouched, and counts it once, so.
    pub fn passes(&self, what: &str, frame: &[u8], outcome: Outcome) {
        let (verdict, counted) = self.counting(|lab| lab.xdp(frame));
        assert_frame(what, &verdict.frame, frame);
        assert_eq!((verdict.action, verdict.note), (PASS, None), "{what}");
        assert_eq!(counted, BTreeMap::from([(outcome, 1)]), "{what}");
    }

    /// Asserts that XDP sends a packet on as another, and counts it once, so.
    pub fn becomes(&self, what: &str, packet: &Packet, expected: &Packet, outcome: Outcome) {
        let (verdict, counted) = self.counting(|lab| lab.xdp(&packet.bytes()));
        assert_frame(&format!("{what}: {packet:?}"), &verdict.frame, &expected.bytes());
        crate::packet::assert_checksums(&verdict.frame);
        assert_eq!((verdict.action, verdict.note), (TX, None), "{what}");
        assert_eq!(counted, BTreeMap::from([(outcome, 1)]), "{what}");
    }

    /// The task that XDP leaves a note for, with the packet as it came.
    pub fn delivered_to(&self, packet: &Packet) -> String {
        let (verdict, counted) = self.counting(|lab| lab.xdp(&packet.bytes()));
        assert_frame("on its way to a task here", &verdict.frame, &packet.bytes());
        assert_eq!(verdict.action, PASS);
        assert_eq!(counted, BTreeMap::from([(Outcome::Local, 1)]));
        self.task_of(verdict.note.expect("a note"))
    }

    /// The task of a backend's number.
    pub fn task_of(&self, backend: u32) -> String {
        self.datapath().tables().backends[&backend].label.task.clone()
    }
}

/// struct __sk_buff: ifindex is its eleventh word.
fn tc_context(ifindex: u32) -> Vec<u8> {
    let mut context = vec![0; 192];
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    context
}

/// Runs a program on a frame; its return value and the frame afterwards.
fn run<P>(program: &P, frame: &[u8], context: &[u8]) -> (u32, Vec<u8>)
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = vec![0; frame.len() + 256];
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut out),
        ctx_in: Some(context),
        ..TestRunOptions::default()
    };
    let result = program.test_run(options).expect("run the program");
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}
