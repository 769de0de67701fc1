//! The agent as a service: what systemd is told of it, and its options from a file and from the environment.

use std::{fs, io, os::unix::net::UnixDatagram, path::Path, time::Duration};

use lb_tests::{
    agent::{Agent, active_tasks, json, program, text},
    cluster::Cluster,
    netns::{Netns, Running, eventually, within},
    traffic::{Load, requests},
};
use nix::sys::signal::{Signal, kill};

/// What systemd would hear.
struct Systemd {
    socket: UnixDatagram,
    heard: Vec<String>,
}

impl Systemd {
    fn listen(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).expect("make a socket");
        socket.set_nonblocking(true).expect("do not wait in it");
        Self { socket, heard: Vec::new() }
    }

    /// Waits for a message with this line; those before it are taken too.
    fn hears(&mut self, line: &str) {
        within(Duration::from_secs(60), line, || {
            let mut buffer = [0; 4096];
            loop {
                match self.socket.recv(&mut buffer) {
                    Ok(bytes) => self.heard.push(String::from_utf8_lossy(&buffer[..bytes]).into_owned()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
            let found = self.heard.iter().position(|message| message.lines().any(|said| said == line));
            found.map(|index| self.heard.drain(..=index)).is_some()
        });
    }
}

fn two_tasks() -> Cluster {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    for slot in 1..=2 {
        cluster.add_nginx(&format!("web.{slot}"), 0);
    }
    cluster.write_all_running();
    cluster
}

fn mode(netns: &Netns) -> String {
    json(netns, &["status"])["mode"].as_str().expect("a mode").to_owned()
}

/// A reload takes the configuration as it is by then, in the same process, and no request fails meanwhile.
#[test]
fn a_reload_takes_the_new_configuration_and_loses_nothing() {
    let cluster = two_tasks();
    let netns = &cluster.nodes[0].netns;
    let mut systemd = Systemd::listen(&cluster.folder().join("notify"));
    let config = cluster.folder().join("agent.toml");
    let options = |mode: &str| {
        let file = cluster.folder().join("cluster.toml");
        fs::write(&config, format!("cluster = \"{}\"\nmode = \"{mode}\"\n", file.display())).expect("a file");
    };
    options("auto");
    let socket = cluster.folder().join("notify").display().to_string();
    let variables = [("NOTIFY_SOCKET", socket.as_str()), ("WATCHDOG_USEC", "3000000")];
    let arguments = ["--config", config.to_str().expect("text")];
    let mut agent = Agent::start(netns, cluster.folder(), &arguments, &variables);
    systemd.hears("READY=1");
    systemd.hears("STATUS=eth1: 1 services on 2 listeners");
    systemd.hears("WATCHDOG=1");
    assert_ne!(mode(netns), "TC alone");
    eventually("both are offered", || active_tasks(netns, "web") == 2);

    let pid = agent.pid();
    let hang_up = || kill(nix::unistd::Pid::from_raw(pid), Signal::SIGHUP).expect("send SIGHUP");
    let load = Load::start(&cluster.client, cluster.nodes[0].v4().into(), 2, u64::MAX);
    options("tc");
    hang_up();
    systemd.hears("RELOADING=1");
    systemd.hears("READY=1");
    assert_eq!(mode(netns), "TC alone");
    let goal = load.done() + 200;
    eventually("requests go on", || load.done() >= goal);

    // What a start would refuse changes nothing, and is said: a mistake, other sizes than those
    // that run, an address of somebody else.
    options("warp");
    hang_up();
    eventually("the mistake is named", || agent.log().contains("invalid value 'warp' for '--mode"));
    for (line, said) in [
        ("max-connections = 1000", "--max-connections 1000: the datapath that runs has 262144"),
        ("listen = [\"198.51.100.77:9464\"]", "listen on http://198.51.100.77:9464"),
        ("source = \"docker\"", "--source docker has no use for --cluster"),
    ] {
        options("tc");
        let text = fs::read_to_string(&config).expect("the file") + line + "\n";
        fs::write(&config, text).expect("write the file");
        hang_up();
        let goes_on = "SIGHUP: the agent goes on as it was: ";
        eventually(line, || {
            let log = agent.log();
            log.lines().any(|told| told.contains(goes_on) && told.contains(said))
        });
        assert!(agent.is_running() && agent.pid() == pid, "{line}");
    }
    let goal = load.done() + 200;
    eventually("requests go on", || load.done() >= goal);
    assert_eq!(load.stop(), Vec::<String>::new());
    assert!(agent.is_running() && agent.pid() == pid);
    kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).expect("send SIGTERM");
    systemd.hears("STOPPING=1");
}

/// No argument but the verb: what a stack file or a unit has.
#[test]
fn the_environment_says_everything() {
    let cluster = two_tasks();
    let netns = &cluster.nodes[0].netns;
    let mut command = netns.command(program());
    let file = cluster.folder().join("cluster.toml");
    command.arg("attach").env("LB_IFACE", "eth1").env("LB_CLUSTER", file).env("LB_MODE", "tc");
    command.env("LB_ON_EXIT", "detach").env("LB_PEER_TIMEOUT", "");
    let mut running = Running::start(&mut command);
    eventually("both are offered", || active_tasks(netns, "web") == 2);
    // The tables are full before the programs are attached.
    eventually("the programs are attached", || text(netns, &["events"]).contains("began to serve"));
    assert_eq!(mode(netns), "TC alone");
    assert_eq!(requests(&cluster.client, cluster.nodes[0].v4().into(), 4).len(), 4);
    running.stop(Signal::SIGTERM);
    let status = netns.command(program()).arg("status").output().expect("start the agent");
    assert_eq!(status.status.code(), Some(3), "{}", String::from_utf8_lossy(&status.stderr));
}

/// Somebody keeps the namespace of a container that has ended, and its address is another one's by now.
#[test]
fn an_address_that_two_namespaces_hold_is_the_newer_one_s() {
    let mut cluster = Cluster::new(1);
    cluster.receive_xdp();
    let ended = cluster.add_task("web.1", 0);
    let task = cluster.add_nginx("web.2", 0);
    let (v4, v6) = (cluster.tasks[task].v4, cluster.tasks[task].v6);
    cluster.tasks[ended].netns.ip(&format!("addr add {v4}/24 dev eth0"));
    cluster.tasks[ended].netns.ip(&format!("addr add {v6}/64 dev eth0 nodad"));
    let file = cluster.write(&cluster.file("\"80:8080\"", &[(&cluster.tasks[task], "running")]));
    let netns = &cluster.nodes[0].netns;
    let _agent = Agent::attach(netns, cluster.folder(), &file, &[]);
    eventually("the task is offered", || active_tasks(netns, "web") == 1);
    for address in cluster.addresses(0) {
        let answers = requests(&cluster.client, address, 3);
        assert!(answers.iter().all(|answer| answer.starts_with("web.2 saw ")), "{answers:?}");
    }
}
