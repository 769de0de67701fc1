//! A real Docker Swarm on one machine: a dockerd a namespace, joined by a bridge.
//!
//! ```text
//! client ──┐          ┌── node1: eth1, dockerd ── containers …
//!          ├── lan ───┤
//!          ┘          └── node2: eth1, dockerd ── containers …
//! ```
//!
//! Each node is also a namespace of processes whose first one ends with the test, and everything in it with that: the
//! engine, its containers, what a killed engine has left.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    agent::{self, Agent},
    netns::{Netns, Running, forget_ours, run, within},
    traffic::{client, get},
};

/// The client's address.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The client's IPv6 address.
pub const CLIENT6: Ipv6Addr = v6(CLIENT);
/// What engines and containers may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A machine with Docker.
pub struct Node {
    /// Its network namespace.
    pub netns: Netns,
    /// Its host name: `node1`, …
    pub name: String,
    number: u8,
    /// The first process of its namespace of processes, and what keeps that.
    first: Pid,
    _keeper: Running,
    folder: PathBuf,
    cgroup: String,
}

/// The machines and a client of theirs.
pub struct Swarm {
    // Dropped in this order: engines before the bridge that joins them.
    /// The machines.
    pub nodes: Vec<Node>,
    /// A machine on the same lan that is no node.
    pub client: Netns,
    /// Others, one for each node, for load: a task remembers a client's port for a minute, whichever node it used.
    pub crowd: Vec<Netns>,
    lan: Netns,
    folder: tempfile::TempDir,
}

/// A network beside the swarm's, by which clients come: the nodes have it by [`PUBLIC`].
pub struct Public {
    /// A client.
    pub client: Netns,
    /// What carries its frames.
    pub lan: Netns,
}

/// The interface by which nodes have the public network.
pub const PUBLIC: &str = "pub0";

impl Public {
    /// Plugs the nodes of a swarm into it.
    pub fn new(swarm: &Swarm) -> Self {
        let (lan, client) = (Netns::new("public"), Netns::new("client"));
        lan.ip("link add lanbr type bridge");
        lan.ip("link set lanbr up");
        let machines = swarm.nodes.iter().map(|node| (&node.netns, Self::address(node)));
        for (machine, address) in machines.chain([(&client, Self::CLIENT.into())]) {
            let port = port_of(address);
            lan.ip(&format!("link add {port} type veth peer name {PUBLIC} netns {}", machine.name()));
            lan.ip(&format!("link set {port} master lanbr up"));
            machine.ip(&format!("addr add {address}/24 dev {PUBLIC}"));
            machine.ip(&format!("link set {PUBLIC} up"));
        }
        Self { client, lan }
    }

    /// The client's address.
    pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);

    /// A node's address there.
    pub fn address(node: &Node) -> IpAddr {
        match node.address() {
            IpAddr::V4(v4) => Ipv4Addr::new(198, 51, 100, v4.octets()[3]).into(),
            IpAddr::V6(_) => unreachable!("the lan has IPv4"),
        }
    }

    /// Several answers of a node's, one after another.
    pub fn ask(&self, node: &Node, port: u16, count: usize) -> Vec<String> {
        ask(&self.client, Self::address(node), port, count)
    }
}

/// What a client is told at an address, several times.
fn ask(netns: &Netns, address: IpAddr, port: u16, count: usize) -> Vec<String> {
    netns.enter(|| {
        let (client, to) = (client(), SocketAddr::new(address, port));
        let answer = |_| get(&client, to, "/cgi-bin/who").unwrap_or_else(|error| panic!("{error}"));
        (0..count).map(answer).map(|text| text.trim().to_owned()).collect()
    })
}

impl Swarm {
    /// Machines with Docker that are no swarm yet.
    pub fn machines(count: u8) -> Self {
        let folder = tempfile::tempdir().expect("make a folder");
        let lan = Netns::new("lan");
        lan.ip("link add lanbr type bridge");
        lan.ip("link set lanbr up");
        let client = Netns::new("client");
        plug(&lan, &client, CLIENT);
        let member = |number: u8| {
            let member = Netns::new("crowd");
            plug(&lan, &member, Ipv4Addr::new(192, 0, 2, 20 + number));
            member
        };
        let crowd = (1..=count).map(member).collect();
        let nodes: Vec<Node> = (1..=count).map(|number| Node::new(&lan, folder.path(), number)).collect();
        nodes.iter().for_each(Node::start_docker);
        nodes.iter().for_each(Node::wait_for_docker);
        let image = image(folder.path());
        thread::scope(|scope| {
            nodes.iter().for_each(|node| {
                drop(scope.spawn(|| node.import(&image, "web:latest", &["--change", IMAGE_CHANGE])))
            })
        });
        Self { nodes, client, crowd, lan, folder }
    }

    /// A swarm whose first node manages it.
    pub fn new(count: u8) -> Self {
        let swarm = Self::machines(count);
        swarm.nodes[0].init();
        for node in &swarm.nodes[1..] {
            node.join(&swarm.nodes[0], "worker");
        }
        swarm
    }

    /// A client with IPv6 behind a router, by a link of this MTU; nodes know the way back.
    pub fn distant(&self, mtu: u32) -> Netns {
        let (router, client) = (&self.crowd[0], Netns::new("distant"));
        router.ip(&format!("link add far type veth peer name eth1 netns {}", client.name()));
        for (netns, link, number) in [(router, "far", 1), (&client, "eth1", 10)] {
            netns.ip(&format!("link set {link} mtu {mtu} up"));
            netns.ip(&format!("addr add 2001:db8:3::{number}/64 dev {link} nodad"));
        }
        client.ip("route add default via 2001:db8:3::1");
        run(router.command("sysctl").args(["-qw", "net.ipv6.conf.all.forwarding=1"]));
        let own = v6(Ipv4Addr::new(192, 0, 2, 21));
        self.nodes.iter().for_each(|node| node.netns.ip(&format!("route add 2001:db8:3::/64 via {own}")));
        client
    }

    /// Where files may be put.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// An agent on every node, with nothing but the interface to go by.
    pub fn attach(&self) -> Vec<Agent<'_>> {
        self.nodes.iter().map(|node| self.attach_one(node, &[])).collect()
    }

    /// An agent on a node.
    pub fn attach_one<'a>(&self, node: &'a Node, arguments: &[&str]) -> Agent<'a> {
        let host = node.docker_host();
        Agent::start(&node.netns, self.folder(), arguments, &[("DOCKER_HOST", &host)])
    }

    /// An agent on a node's interface to the public network.
    pub fn attach_public<'a>(&self, node: &'a Node) -> Agent<'a> {
        let (host, program) = (node.docker_host(), agent::program());
        let variables = [("DOCKER_HOST", host.as_str())];
        Agent::start_at(PUBLIC, &program, &node.netns, self.folder(), &[], &[], &variables)
    }

    /// An agent on a node, of another program than the one that is tested.
    pub fn attach_program<'a>(&self, program: &Path, node: &'a Node, arguments: &[&str]) -> Agent<'a> {
        let host = node.docker_host();
        Agent::start_program(program, &node.netns, self.folder(), &[], arguments, &[("DOCKER_HOST", &host)])
    }

    /// An agent on a node, started by another program that this is the beginning of the command of.
    pub fn attach_under<'a>(&self, node: &'a Node, under: &[&str]) -> Agent<'a> {
        let host = node.docker_host();
        Agent::start_under(&node.netns, self.folder(), under, &[], &[("DOCKER_HOST", &host)])
    }

    /// What the client is told on a port by whoever serves it: `TASK saw ADDRESS`.
    pub fn ask(&self, node: &Node, port: u16) -> Result<String, String> {
        let to = SocketAddr::new(node.address(), port);
        self.client.enter(|| get(&client(), to, "/cgi-bin/who")).map(|text| text.trim().to_owned())
    }

    /// Several answers, one after another.
    pub fn ask_often(&self, node: &Node, port: u16, count: usize) -> Vec<String> {
        self.ask_at(node.address(), port, count)
    }

    /// The same of an address.
    pub fn ask_at(&self, address: IpAddr, port: u16, count: usize) -> Vec<String> {
        ask(&self.client, address, port, count)
    }

    /// Takes a node's cable out, or puts it in again.
    pub fn set_cable(&self, node: &Node, in_it: bool) {
        let state = if in_it { "up" } else { "down" };
        self.lan.ip(&format!("link set {} {state}", port_of(node.address())));
    }
}

impl Node {
    fn new(lan: &Netns, folder: &Path, number: u8) -> Self {
        let name = format!("node{number}");
        let netns = Netns::new(&name);
        let folder = folder.join(&name);
        fs::create_dir(&folder).expect("make a folder");
        plug(lan, &netns, address(number));
        netns.keep_connections_on_one_cpu("eth1");
        run(netns.command("sysctl").args(["-qw", "net.ipv4.ip_forward=1"]));
        // The first process of a namespace of processes must reap what others leave, and nothing else.
        let script =
            format!("hostname {name}; echo $$ > {}/up; while :; do sleep 60 & wait; done", folder.display());
        let mut command = netns.command("unshare");
        command.args(["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["busybox", "sh", "-c", &script]).stderr(Stdio::null());
        let keeper = Running::start(&mut command);
        within(PATIENCE, "the node's first process runs", || folder.join("up").exists());
        let first = first_child(keeper.pid());
        let cgroup = format!("{}-docker", netns.name());
        Self { netns, name, number, first, _keeper: keeper, folder, cgroup }
    }

    /// Its address on the lan.
    pub fn address(&self) -> IpAddr {
        address(self.number).into()
    }

    /// Its IPv6 address on the lan.
    pub fn address6(&self) -> IpAddr {
        v6(address(self.number)).into()
    }

    /// Makes the bridge by which containers reach the outside, before the node is part of a swarm, with IPv6.
    pub fn make_gateway_bridge_with_v6(&self) {
        let (v4, v6) = (format!("172.18.{}.0/24", self.number), format!("fd18:{}::/64", self.number));
        let bridge = ["network", "create", "--ipv6", "--subnet", &v4, "--subnet", &v6];
        let options = [
            "com.docker.network.bridge.name=docker_gwbridge",
            "com.docker.network.bridge.enable_icc=false",
            "com.docker.network.bridge.enable_ip_masquerade=true",
        ];
        let options = options.iter().flat_map(|option| ["--opt", option]).collect::<Vec<_>>();
        self.docker(&[&bridge[..], &options, &["docker_gwbridge"]].concat());
    }

    /// Where its engine listens, as `DOCKER_HOST` has it.
    pub fn docker_host(&self) -> String {
        format!("unix://{}", self.folder.join("docker.sock").display())
    }

    /// Docker's root directory.
    pub fn root(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Starts the engine.
    pub fn start_docker(&self) {
        self.start_docker_with(&[]);
    }

    /// Starts the engine with more options.
    pub fn start_docker_with(&self, options: &[&str]) {
        let log = fs::File::options().create(true).append(true).open(self.folder.join("log")).expect("a log");
        let at = |name: &str| self.folder.join(name).display().to_string();
        let mut command = Command::new("nsenter");
        forget_ours(&mut command);
        command.args(["-t", &self.first.to_string(), "--net", "--mount", "--uts", "--pid", "--"]);
        command.args(["busybox", "sh", "-c", "\"$@\" & echo $! > \"$0\"", &at("dockerd"), "dockerd"]);
        command.args(["-H", &self.docker_host(), "--data-root", &at("data"), "--exec-root", &at("exec")]);
        command.args(["--pidfile", &at("pid"), "--bip", &format!("172.2{}.0.1/24", self.number)]);
        command.args(["--cgroup-parent", &self.cgroup, "--exec-opt", "native.cgroupdriver=cgroupfs"]);
        command.args(options).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("share the log")).stderr(log);
        run_quiet(&mut command);
    }

    /// Waits until the engine answers.
    pub fn wait_for_docker(&self) {
        within(PATIENCE, "dockerd answers", || {
            let asked = self.docker_command(&["info"]).output().expect("start docker");
            asked.status.success()
        });
    }

    /// Ends the engine as a crash would; its containers stay.
    pub fn kill_docker(&self) {
        self.signal_in(&self.dockerd(), "KILL");
        let _ = fs::remove_file(self.folder.join("pid"));
    }

    /// Ends the engine in order, and what it started with it.
    pub fn stop_docker(&self) {
        self.signal_in(&self.dockerd(), "TERM");
        within(PATIENCE, "dockerd ends", || !self.folder.join("pid").exists());
    }

    /// Starts the engine again after a crash.
    pub fn restart_docker(&self) {
        self.start_docker();
        self.wait_for_docker();
    }

    /// Switches the machine off: everything on it ends at once.
    pub fn switch_off(&self) {
        let _ = kill(self.first, Signal::SIGKILL);
    }

    fn dockerd(&self) -> String {
        fs::read_to_string(self.folder.join("dockerd")).expect("the engine's process").trim().to_owned()
    }

    /// Signals a process that goes by this number on the node.
    pub fn signal_in(&self, pid: &str, signal: &str) {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.first.to_string(), "--mount", "--pid", "--", "busybox", "kill"]);
        run(command.args(["-s", signal, pid]));
    }

    /// Docker's client against this node.
    pub fn docker_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        // A stack file may name them.
        forget_ours(&mut command);
        command.arg("-H").arg(self.docker_host()).args(arguments);
        command
    }

    /// What Docker's client says; it must succeed.
    pub fn docker(&self, arguments: &[&str]) -> String {
        let output = self.docker_command(arguments).output().expect("start docker");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker {arguments:?} on {}: {errors}", self.name);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// The engine's major version.
    pub fn docker_version(&self) -> u32 {
        let version = self.docker(&["version", "--format", "{{.Server.Version}}"]);
        let major = version.split('.').next().and_then(|major| major.parse().ok());
        major.unwrap_or_else(|| panic!("the engine's version: {version}"))
    }

    /// `docker swarm init`.
    pub fn init(&self) {
        self.docker(&["swarm", "init", "--advertise-addr", &self.address().to_string()]);
    }

    /// `docker swarm join`.
    pub fn join(&self, manager: &Self, role: &str) {
        let token = manager.docker(&["swarm", "join-token", "-q", role]);
        let (own, other) = (self.address().to_string(), format!("{}:2377", manager.address()));
        let join = ["swarm", "join", "--token", &token, "--advertise-addr", &own, &other];
        let joined = self.docker_command(&join).output().expect("start docker");
        let errors = String::from_utf8_lossy(&joined.stderr);
        // On a busy machine the engine answers before it is done.
        let goes_on = errors.contains("will continue in the background");
        assert!(joined.status.success() || goes_on, "{join:?} on {}: {errors}", self.name);
        within(PATIENCE, "the node is part of the swarm", || {
            self.docker(&["info", "--format", "{{.Swarm.LocalNodeState}}"]) == "active"
        });
    }

    /// The tasks of a service that Docker says are running, named as the agent names them; `None` if this node does not
    /// manage the swarm.
    pub fn running(&self, service: &str) -> Option<BTreeSet<String>> {
        let format = "{{.Name}}.{{.ID}} {{.CurrentState}}";
        let filter = ["service", "ps", service, "--filter", "desired-state=running", "--format", format];
        let output = self.docker_command(&filter).output().expect("start docker");
        let listed = String::from_utf8_lossy(&output.stdout);
        let running = listed.lines().filter_map(|line| line.split_once(" Running"));
        output.status.success().then(|| running.map(|(name, _)| name.to_owned()).collect())
    }

    fn import(&self, image: &[u8], name: &str, options: &[&str]) {
        let mut command = self.docker_command(&[&["import"], options, &["-", name]].concat());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("start docker import");
        child.stdin.take().expect("its input").write_all(image).expect("write the image");
        assert!(child.wait().expect("wait for docker import").success());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(15)..];
            eprintln!("--- dockerd of {}, the last of it:\n{}", self.name, last.join("\n"));
        }
        self.switch_off();
        within(PATIENCE, "the node's processes end", || kill(self.first, None).is_err());
        remove_cgroups(&self.cgroup);
    }
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, 100 + number)
}

/// The IPv6 address of a machine of the lan: the last number is the same.
const fn v6(v4: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, v4.octets()[3] as u16)
}

fn port_of(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("port{}", v4.octets()[3]),
        IpAddr::V6(_) => unreachable!("the lan has IPv4"),
    }
}

fn plug(lan: &Netns, machine: &Netns, address: Ipv4Addr) {
    let port = port_of(address.into());
    lan.ip(&format!("link add {port} type veth peer name eth1 netns {}", machine.name()));
    lan.ip(&format!("link set {port} master lanbr up"));
    machine.ip(&format!("addr add {address}/24 dev eth1"));
    machine.ip(&format!("addr add {}/64 dev eth1 nodad", v6(address)));
    machine.ip("link set eth1 up");
}

/// Runs a command whose output goes elsewhere.
fn run_quiet(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// The only child of a process.
fn first_child(parent: Pid) -> Pid {
    let children = format!("/proc/{parent}/task/{parent}/children");
    let text = fs::read_to_string(children).expect("the children of a process");
    let child = text.split_whitespace().next().and_then(|pid| pid.parse().ok());
    Pid::from_raw(child.expect("a child"))
}

/// Removes the empty groups that containers have left, in every hierarchy.
fn remove_cgroups(name: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([root.to_owned()]) {
        remove_tree(&hierarchy.join(name));
    }
}

fn remove_tree(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

/// busybox serving HTTP on 8080.
const IMAGE_CHANGE: &str = r#"CMD ["/bin/httpd","-f","-p","8080","-h","/www"]"#;
const APPLETS: [&str; 14] = [
    "sh",
    "httpd",
    "hostname",
    "cat",
    "nc",
    "ip",
    "sleep",
    "kill",
    "wget",
    "touch",
    "rm",
    "test",
    "head",
    "sha256sum",
];
/// Says who answers and which client it saw.
const WHO: &str =
    "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n'\necho \"$(hostname) saw $REMOTE_ADDR\"\n";

/// Says the hash of what is sent to it.
const SUM: &str =
    "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n'\nhead -c \"$CONTENT_LENGTH\" | sha256sum\n";
/// Bytes of the file that each task serves at `/big`.
const BIG: usize = 5_000_000;

/// The file that each task serves at `/big`.
pub fn big() -> Vec<u8> {
    (0..BIG as u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// An image as `docker import` takes it.
fn image(folder: &Path) -> Vec<u8> {
    let root = folder.join("image");
    let busybox = find_busybox();
    for part in ["bin", "tmp", "www/cgi-bin"] {
        fs::create_dir_all(root.join(part)).expect("make the image");
    }
    fs::copy(busybox, root.join("bin/busybox")).expect("copy busybox");
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).expect("link an applet");
    }
    fs::write(root.join("www/index.html"), "here\n").expect("write a page");
    fs::write(root.join("www/big"), big()).expect("write a file");
    for (name, script) in [("who", WHO), ("sum", SUM)] {
        let path = root.join("www/cgi-bin").join(name);
        fs::write(&path, script).expect("write a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it run");
    }
    copy_program(&root, &program("lb-names"), "bin/names");
    pack(&root)
}

/// A folder as `docker import` takes it.
fn pack(root: &Path) -> Vec<u8> {
    let tar = Command::new("tar").arg("-C").arg(root).args(["-c", "."]).output().expect("start tar");
    assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
    tar.stdout
}

/// A file of the project's `packaging` folder.
pub fn packaging(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the project").join("packaging").join(name)
}

impl Swarm {
    /// The agent as an image on every node, by the project's own recipe. The agent that is tested is not linked statically
    /// as the one that is given away: its image starts from one with its libraries.
    pub fn build_agent_image(&self) {
        let context = self.folder().join("agent-image");
        let base = context.join("base");
        fs::create_dir_all(base.join("usr/sbin")).expect("make the image");
        copy_program(&base, &agent::program(), "usr/sbin/lb-userspace");
        fs::remove_file(base.join("usr/sbin/lb-userspace")).expect("take the agent out again");
        let base = pack(&base);
        let send = context.join("context");
        fs::create_dir_all(&send).expect("make a folder");
        fs::copy(agent::program(), send.join("lb-userspace")).expect("copy the agent");
        let recipe = fs::read_to_string(packaging("Dockerfile")).expect("the recipe");
        assert!(recipe.contains("FROM scratch\n"), "{recipe}");
        let recipe = recipe.replace("FROM scratch\n", "FROM lb-libraries\n");
        fs::write(send.join("Dockerfile"), recipe).expect("write the recipe");
        let send = send.display().to_string();
        for node in &self.nodes {
            node.import(&base, "lb-libraries:latest", &[]);
            let build = ["build", "-q", "-t", "lb-userspace:latest", &send];
            let mut command = node.docker_command(&build);
            // The builder that asks no registry about what is here.
            run(command.env("DOCKER_BUILDKIT", "0"));
        }
    }
}

/// A program of this package, which cargo builds along with its tests.
fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("the path of this program");
    let places = own.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    places
        .into_iter()
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} beside {}", own.display()))
}

/// Copies a program and the libraries that it is linked with.
fn copy_program(root: &Path, program: &Path, to: &str) {
    fs::copy(program, root.join(to)).expect("copy a program");
    let listed = Command::new("ldd").arg(program).output().expect("start ldd");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().expect("a folder")).expect("make a folder");
        fs::copy(library, to).expect("copy a library");
    }
}

fn find_busybox() -> PathBuf {
    let places = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    places.into_iter().find(|path| path.exists()).expect("busybox (static); `cargo xtask setup` installs it")
}
