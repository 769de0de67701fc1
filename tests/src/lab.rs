//! The programs on the bench: loaded in a namespace of their own, tables filled by the planner, fed with packets
//! by BPF_PROG_TEST_RUN, every counter watched.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use aya::{
    maps::{Array, Map, MapData, MapInfo},
    programs::{
        Program, ProgramFd, SchedClassifier, TestRun, TestRunOptions, TestRunResult, Xdp, loaded_programs,
    },
};
use lb_common::{
    abi::{Config, PARTIAL_CHECKSUMS, Removal, XDP_TRANSMITS, XdpMetadata, program, remove, table},
    conntrack::{Control, FiveTuple, Line, Set},
    net::{Be16, V4, V6},
    outcome::Outcome,
    stats::Open,
    tunnel::DEFAULT_PORT,
};
use lb_userspace::{
    cluster::{ClusterState, Node, Service, Task, TaskState, Via},
    datapath::{Collection, ConnectionLog, Counters, Datapath, InnerRanges, PinDir, Sizes, TableSet},
    net::Reset,
    plan::{NextHop, Planner, Reach, View},
    tunnel_key::{Cookies, NodeKey},
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
    /// XDP's metadata for TC: the backend, or what TC is to do.
    pub note: Option<u32>,
    /// And the client's port as the task is to see it.
    pub port: Option<u16>,
}

/// `XDP_DROP`.
pub const DROP: u32 = 1;
/// `XDP_PASS`.
pub const PASS: u32 = 2;
/// `XDP_TX`.
pub const TX: u32 = 3;
/// `TC_ACT_UNSPEC`.
pub const UNSPEC: u32 = u32::MAX;
/// `TC_ACT_SHOT`.
pub const SHOT: u32 = 2;
/// `TC_ACT_REDIRECT`.
pub const REDIRECT: u32 = 7;

/// The connection tables as they were; compared by what their lines say, without times and places.
#[derive(Clone)]
pub struct ConnectionState {
    v4: Vec<Set<V4>>,
    v6: Vec<Set<V6>>,
}

/// What a line says.
type Said<A> = (u32, Line<A>);

fn said<A: Copy + Default + Ord>(sets: &[Set<A>]) -> Vec<Said<A>>
where
    FiveTuple<A>: Default,
{
    let lines = sets.iter().flat_map(|set| set.lines).filter(|line| Control(line.control).is_live());
    let mut said: Vec<_> = lines
        .map(|line| {
            let state = Control(line.control).state();
            (state, Line { control: 0, home: 0, seen: 0, hop_seen: 0, ..line })
        })
        .collect();
    said.sort_unstable_by_key(|(_, line)| {
        let tuple = &line.tuple;
        (
            tuple.source,
            tuple.source_port,
            tuple.destination,
            tuple.destination_port,
            tuple.protocol,
            tuple.kind,
        )
    });
    said
}

impl PartialEq for ConnectionState {
    fn eq(&self, other: &Self) -> bool {
        said(&self.v4) == said(&other.v4) && said(&self.v6) == said(&other.v6)
    }
}

impl std::fmt::Debug for ConnectionState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(said(&self.v4)).entries(said(&self.v6)).finish()
    }
}

/// What is asked of the program that removes lines: number, control word, when it was seen, what it is.
pub type Removed = (u32, u64, u32, u32);

/// Asks the program that removes lines for these; whether each was.
fn remove_lines(gc: &Xdp, removals: &[Removed]) -> Vec<bool> {
    let mut removed = Vec::new();
    for batch in removals.chunks(Removal::BATCH) {
        let mut frame = Vec::new();
        for (slot, control, seen, what) in batch {
            frame.extend(control.to_ne_bytes());
            [*slot, *seen, *what, 0].iter().for_each(|word| frame.extend(word.to_ne_bytes()));
        }
        let (_, out) = run(gc, &frame, &[]);
        let done = |removal: &[u8]| removal[size_of::<Removal>() - 4..] == 1_u32.to_ne_bytes();
        removed.extend(out.chunks_exact(size_of::<Removal>()).map(done));
    }
    removed
}

/// Which lines of a node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// All.
    All,
    /// Of connections whose clients' packets come to this node.
    OwnClients,
}

/// Takes away the lines of the agent of this namespace's `eth1`, by the program that it loaded; `between` is done after each.
/// What has changed meanwhile stays. How many went.
pub fn take_lines(whose: Whose, mut between: impl FnMut()) -> usize {
    let set = TableSet::of("eth1").expect("the tables");
    let name = PinDir::of("eth1").expect("the pins").table(table::CONNECTIONS4);
    let table = MapInfo::from_pin(name).expect("the table").id();
    let gc = loaded_programs().filter_map(Result::ok).find(|loaded| {
        let its = || loaded.map_ids().ok().flatten().is_some_and(|maps| maps.contains(&table));
        loaded.name_as_str() == Some(program::GC) && its()
    });
    let gc = gc.expect("the agent's program");
    let gc = Xdp::from_program_info(gc, program::GC.into(), aya_obj::programs::XdpAttachType::Interface)
        .expect("a program that can be run");
    // As they are at that moment: what has been seen since is another line to the program.
    let lines = || -> Vec<Removed> {
        let v4 = set.lines::<V4>().expect("the lines").into_iter();
        let v6 = set.lines::<V6>().expect("the lines").into_iter();
        let wanted = |peer: u16| whose == Whose::All || peer == 0;
        let v4 = v4.filter(|(.., line)| wanted(line.peer));
        let v6 = v6.filter(|(.., line)| wanted(line.peer));
        let v4 = v4.map(|(slot, control, line)| (slot, control.0, line.seen, remove::CONNECTION4));
        let v6 = v6.map(|(slot, control, line)| (slot, control.0, line.seen, remove::CONNECTION6));
        v4.chain(v6).collect()
    };
    let mut taken = 0;
    for (slot, _, _, what) in lines() {
        let now = lines().into_iter().find(|line| (line.0, line.3) == (slot, what));
        if now.is_some_and(|line| remove_lines(&gc, &[line]) == [true]) {
            taken += 1;
            between();
        }
    }
    taken
}

/// The connection table of a family of this namespace's `eth1`.
fn connection_table<A>(table: &str) -> Array<MapData, Set<A>>
where
    Set<A>: aya::Pod,
{
    let pin = PinDir::of("eth1").expect("the pins").table(table);
    let map = Map::from_map_data(MapData::from_pin(pin).expect("the table")).expect("a table");
    map.try_into().expect("an array")
}

fn read_sets<A>(table: &str) -> Vec<Set<A>>
where
    Set<A>: aya::Pod,
{
    let table = connection_table::<A>(table);
    (0..table.len()).map(|index| table.get(&index, 0).expect("a set")).collect()
}

/// Writes the sets that differ. Only tests write the table but by a program, while none runs.
fn write_sets<A: PartialEq>(table: &str, sets: &[Set<A>])
where
    Set<A>: aya::Pod + PartialEq,
{
    let mut there = connection_table::<A>(table);
    for (index, set) in (0_u32..).zip(sets) {
        if there.get(&index, 0).expect("a set") != *set {
            there.set(index, *set, 0).expect("write a set");
        }
    }
}

/// What the lab's uplink lets pass, in bytes.
pub const UPLINK_MTU: u32 = 1500;

/// The bench.
pub struct Lab {
    datapath: Option<Datapath>,
    cluster: ClusterState,
    /// Interface indexes of the uplink and of the local tasks' veth.
    pub uplink: u32,
    /// Of the local tasks' veth.
    pub veth: u32,
    /// [`lb_common::backend::VIA_TC`] or nothing, for the next hops to other nodes; taken up by the next update.
    pub next_hop_flags: u8,
    /// MTU of the next hops to other nodes; taken up by the next update.
    pub mtu: u32,
    /// The cookies between this node and others, by their names.
    cookies: BTreeMap<String, Cookies>,
}

/// An address from text.
pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A service of the bench.
pub fn service(name: &str, ports: &[&str], tasks: Vec<Task>) -> Service {
    let ports = ports.iter().map(|port| port.parse().expect("a port")).collect();
    Service { name: name.into(), ports, tasks, ..Service::default() }
}

/// A task of the bench; `here` is local, else it is reached as `via` says.
pub fn task(name: &str, here: bool, via: Via, addresses: &[&str]) -> Task {
    let node = if here { "node1" } else { "node2" }.to_owned();
    let addresses = addresses.iter().map(|text| ip(text)).collect();
    Task {
        name: name.into(),
        node,
        addresses,
        overlay: None,
        state: TaskState::Running,
        weight: 1,
        via,
        finding: None,
    }
}

/// Runs a test on a bench of its own.
pub fn with_lab(services: Vec<Service>, test: impl FnOnce(&mut Lab) + Send) {
    let sizes = Sizes {
        connections: Some(8_192),
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
        let datapath =
            Datapath::open("eth1", &sizes, ConnectionLog::Off).unwrap_or_else(|error| panic!("{error}"));
        let node = |number: u8| Node {
            name: format!("node{number}"),
            host: String::new(),
            addresses: vec![ip(&format!("192.0.2.{number}")), ip(&format!("2001:db8::{number}"))],
            agent: true,
            down: false,
            key: NodeKey::Unknown,
            ..Node::default()
        };
        let nodes = vec![node(1), node(2)];
        let services = services.into_iter().map(Arc::new).collect();
        let cluster = ClusterState { nodes, services, ..ClusterState::default() };
        let mut lab = Lab {
            datapath: Some(datapath),
            cluster,
            uplink: index("eth1"),
            veth: index("hv1"),
            next_hop_flags: 0,
            mtu: UPLINK_MTU,
            cookies: BTreeMap::new(),
        };
        lab.configure(|config| config.flags = XDP_TRANSMITS | PARTIAL_CHECKSUMS);
        lab.set_vlans(0..4096);
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

    /// The kernel's coarse clock as connections have it, low 32 bits.
    pub fn jiffies(&self) -> u32 {
        self.datapath().now().expect("the clock")
    }

    /// Has the kernel take a program that is loaded when it is needed first.
    pub fn demand(&mut self, program: &'static str) {
        self.datapath_mut().demand(program).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Tells the programs what these ranges are to the node, one of [`lb_common::abi::inner`] each.
    pub fn set_inner_ranges(&mut self, ranges: &[(&str, u8, u32)]) {
        let ranges = ranges.iter().map(|(first, prefix, what)| ((ip(first), *prefix), *what));
        let ranges = InnerRanges::from_iter(ranges);
        self.datapath_mut().set_inner_ranges(ranges).expect("set the ranges");
    }

    /// Has the programs serve frames of these VLANs; at first it is all.
    pub fn set_vlans(&mut self, ids: impl IntoIterator<Item = u16>) {
        self.datapath_mut().set_vlans(ids.into_iter().collect()).expect("set the VLANs");
    }

    /// Changes the programs' configuration.
    pub fn configure(&mut self, change: impl FnOnce(&mut Config)) {
        let mut config = self.datapath().config();
        config.uplink = self.uplink;
        config.uplink_mac = NODE_MAC;
        if config.snat_ports == [0, 0] {
            config.snat_ports = [20_000, 20_100];
            config.host_ports = [32_768, 60_999];
            config.jiffies_per_second = 250;
            config.tunnel_port = Be16::new(DEFAULT_PORT);
        }
        change(&mut config);
        self.datapath_mut().set_config(config).expect("write the configuration");
    }

    /// Has packets to and from a node known by these cookies from now on, or by none.
    pub fn agree(&mut self, node: &str, cookies: Option<Cookies>) {
        self.cookies = cookies.map(|cookies| (node.to_owned(), cookies)).into_iter().collect();
        self.update(|_| {});
    }

    /// Changes the cluster, and the tables with it.
    pub fn update(&mut self, change: impl FnOnce(&mut ClusterState)) {
        change(&mut self.cluster);
        let mut planner = Planner::default();
        let next_hops: BTreeMap<_, _> = planner
            .destinations(&self.cluster, "node1")
            .into_iter()
            .map(|(address, reach)| ((address, reach), Ok(self.next_hop(address, reach))))
            .collect();
        let view = View {
            cluster: &self.cluster,
            node: "node1",
            addresses: &[ip("192.0.2.1"), ip("2001:db8::1")],
            named: &[],
            cookies: &self.cookies,
            next_hops: &next_hops,
        };
        let limits = self.datapath().limits().expect("limits");
        let plan = planner.plan(&view, self.datapath().tables(), &limits);
        assert_eq!(plan.refused, Vec::<String>::new());
        for op in plan.ops {
            self.datapath_mut().apply(op).expect("apply");
        }
    }

    fn next_hop(&self, address: IpAddr, reach: Reach) -> NextHop {
        let source = Some(if address.is_ipv4() { ip("192.0.2.1") } else { ip("2001:db8::1") });
        let (ifindex, mac, source_mac) = match reach {
            Reach::Local | Reach::Translated => (self.veth, TASK_MAC, BRIDGE_MAC),
            Reach::Snat | Reach::Routed | Reach::Peer => (self.uplink, HOP_MAC, NODE_MAC),
        };
        NextHop { ifindex, mac, source_mac, source, mtu: self.mtu, flags: self.next_hop_flags, silent: None }
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
        let (mut note, mut port) = (None, None);
        let room = size_of::<XdpMetadata>();
        if out.len() > room && out[..4] == self.datapath().config().nonce.to_ne_bytes() {
            note = Some(u32::from_ne_bytes([out[4], out[5], out[6], out[7]]));
            port = Some(u16::from_be_bytes([out[8], out[9]]));
            out.drain(..room);
        }
        Verdict { action, frame: out, note, port }
    }

    /// Runs a TC program on a frame that came in by an interface.
    pub fn tc(&self, name: &str, frame: &[u8], ifindex: u32) -> Verdict {
        let (action, out) = run(self.tc_program(name), frame, &tc_context(ifindex));
        Verdict { action, frame: out, note: None, port: None }
    }

    /// TC ingress on the uplink.
    pub fn uplink_tc(&self, frame: &[u8]) -> Verdict {
        self.tc(program::UPLINK_TC, frame, self.uplink)
    }

    /// TC ingress on the tasks' veth.
    pub fn task_tc(&self, frame: &[u8]) -> Verdict {
        self.tc(program::TASK_TC, frame, self.veth)
    }

    /// The lines of the IPv4 connection table, by their numbers.
    pub fn lines(&self) -> Vec<(u32, Control, Line<V4>)> {
        TableSet::of("eth1").and_then(|set| set.lines::<V4>()).expect("the lines")
    }

    /// The sets of the IPv4 connection table, as they are while nobody changes them.
    pub fn sets(&self) -> Vec<Set<V4>> {
        read_sets(table::CONNECTIONS4)
    }

    /// Those of IPv6.
    pub fn lines6(&self) -> Vec<(u32, Control, Line<V6>)> {
        TableSet::of("eth1").and_then(|set| set.lines::<V6>()).expect("the lines")
    }

    /// Removes the IPv4 lines that are chosen, as evictions would; how many there were.
    pub fn evict(&self, chosen: impl Fn(Control, &Line<V4>) -> bool) -> usize {
        let lines = self.lines().into_iter().filter(|(_, control, line)| chosen(*control, line));
        let removals: Vec<_> =
            lines.map(|(slot, control, line)| (slot, control.0, line.seen, remove::CONNECTION4)).collect();
        self.remove(&removals);
        removals.len()
    }

    /// Asks the program that removes for these: number, control word, when it was seen, what it is. Whether each was.
    pub fn try_remove(&self, removals: &[Removed]) -> Vec<bool> {
        let Some(Program::Xdp(gc)) = self.datapath().program(program::GC) else {
            panic!("no program that removes");
        };
        remove_lines(gc, removals)
    }

    fn remove(&self, removals: &[Removed]) {
        assert!(self.try_remove(removals).iter().all(|removed| *removed), "all lines are removed");
    }

    /// Removes what has ended; what came of it, and the resets that the controller would send.
    pub fn collect(&mut self) -> (Collection, Vec<Reset>) {
        let mut resets = Vec::new();
        let collection = self.datapath_mut().collect(&mut resets).expect("remove what has ended");
        (collection, resets)
    }

    /// Forgets every connection.
    pub fn forget_connections(&self) {
        self.evict(|_, _| true);
        let removals: Vec<_> = self
            .lines6()
            .into_iter()
            .map(|(slot, control, line)| (slot, control.0, line.seen, remove::CONNECTION6))
            .collect();
        self.remove(&removals);
    }

    /// What is known of all connections.
    pub fn connection_state(&self) -> ConnectionState {
        ConnectionState { v4: read_sets(table::CONNECTIONS4), v6: read_sets(table::CONNECTIONS6) }
    }

    /// Makes it what it was.
    pub fn set_connection_state(&self, state: &ConnectionState) {
        write_sets(table::CONNECTIONS4, &state.v4);
        write_sets(table::CONNECTIONS6, &state.v6);
    }

    /// Makes the next hop of every connection fresh.
    pub fn touch_hops(&self) {
        let now = (self.jiffies() / lb_common::conntrack::line::HOP_TICK) as u16;
        let mut state = self.connection_state();
        let v4 = state.v4.iter_mut().flat_map(|set| &mut set.lines).map(|line| &mut line.hop_seen);
        let v6 = state.v6.iter_mut().flat_map(|set| &mut set.lines).map(|line| &mut line.hop_seen);
        v4.chain(v6).for_each(|seen| *seen = now);
        self.set_connection_state(&state);
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

    /// What is open at a backend, as the programs count it.
    pub fn open(&self, backend: u32) -> Open {
        self.datapath().counted_open(backend).expect("a count")
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
        assert_eq!((verdict.action, verdict.note, verdict.port), (PASS, None, None), "{what}");
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
        ctx_in: (!context.is_empty()).then_some(context),
        ..TestRunOptions::default()
    };
    let result = program.test_run(options).expect("run the program");
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}
