//! `doctor` as an operator meets it: faults are planted, each is found by one command, with what mends it.

use std::{fs, io, path::Path, process::Command, time::Duration};

use lb_tests::{
    agent::{Agent, json, other_xdp, program, text, verb},
    cluster::Cluster,
    netns::{Netns, Running, eventually, run, within},
    swarm::{PATIENCE, Swarm},
    traffic::requests,
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// What `doctor` finds: the worst severity as exit code, and the findings that are no all-clear.
fn doctor(netns: &Netns, options: &[&str]) -> (i32, Vec<Value>) {
    let output = netns
        .command(program())
        .args(["doctor", "-o", "json"])
        .args(options)
        // Whatever Docker this machine has is none of these nodes'.
        .env("DOCKER_HOST", "unix:///nonexistent/docker.sock")
        .output()
        .expect("start the agent");
    parse(&output)
}

fn parse(output: &std::process::Output) -> (i32, Vec<Value>) {
    let document: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let findings = document["findings"].as_array().cloned().unwrap_or_default();
    let code = output.status.code().expect("an exit code");
    let found = findings.into_iter().filter(|f| f["severity"] == "warning" || f["severity"] == "error");
    // Other tests' leavings, and this machine's own filter, are not these nodes'.
    (code, found.filter(|f| f["check"] != "pins" && f["check"] != "firewall").collect())
}

/// Asserts that one of the findings is of this check, says this, and names what mends it.
fn found(findings: &[Value], check: &str, part: &str, mend: &str) {
    let is = |finding: &&Value| {
        finding["check"] == check
            && finding["text"].as_str().is_some_and(|text| text.contains(part))
            && finding["mend"].as_str().is_some_and(|text| text.contains(mend))
    };
    assert!(findings.iter().any(|finding| is(&finding)), "{check}: {part}: {findings:#?}");
}

/// Two nodes with agents, two tasks on the first and one on the second.
fn two_nodes() -> Cluster {
    let mut cluster = Cluster::new(2);
    cluster.reach.peers = true;
    cluster.add_nginx("web.1", 0);
    cluster.add_nginx("web.2", 0);
    cluster.add_nginx("web.3", 1);
    cluster.write_all_running();
    cluster
}

fn attach(cluster: &Cluster, node: usize) -> Agent<'_> {
    let path = cluster.folder().join("cluster.toml");
    Agent::attach(&cluster.nodes[node].netns, cluster.folder(), &path, &[])
}

/// Waits until a node hears another, or does not.
fn hears(node: &Netns, other: &str, wanted: &str) {
    eventually("the other node is heard, or silent", || {
        json(node, &["node", "inspect", other])["agent"] == wanted
    });
}

#[test]
fn a_whole_cluster_has_nothing_wrong_and_its_ways_are_known() {
    let cluster = two_nodes();
    let agents = [attach(&cluster, 0), attach(&cluster, 1)];
    let node = &cluster.nodes[0].netns;
    hears(node, "node2", "yes");
    let (code, findings) = doctor(node, &["--probe"]);
    assert_eq!(findings, Vec::<Value>::new());
    assert!(code <= 1, "{code}");
    drop(agents);
}

#[test]
fn faults_of_the_ways_between_nodes_are_told_apart() {
    let cluster = two_nodes();
    let first = attach(&cluster, 0);
    let node = &cluster.nodes[0].netns;
    // 1. No agent there: the machine says so itself.
    let (code, findings) = doctor(node, &[]);
    assert_eq!(code, 2);
    // It says so by an ICMP error, or says nothing: the kernel sends few of them, and the agent's probes get those.
    let said = findings.iter().find(|finding| finding["check"] == "tunnel").expect("a finding");
    let text = said["text"].as_str().expect("text");
    assert!(text.starts_with("node node2: the machine at 192.0.2.102 is there"), "{said:#}");
    assert!(text.contains("no datapath is attached"), "{said:#}");
    // 2. The tunnel's port does not get out, by this node's own filter.
    let second = attach(&cluster, 1);
    hears(node, "node2", "yes");
    let rule = ["OUTPUT", "-p", "udp", "--dport", "6081", "-j", "DROP"];
    // Either family would do.
    for filter in ["iptables", "ip6tables"] {
        run(node.command(filter).args(["-w", "-A"]).args(rule));
    }
    hears(node, "node2", "silent");
    let (_, findings) = doctor(node, &[]);
    found(&findings, "tunnel", "own packet filter does not let UDP port 6081 out", "iptables -I OUTPUT");
    for filter in ["iptables", "ip6tables"] {
        run(node.command(filter).args(["-w", "-D"]).args(rule));
    }
    // 3. It is dropped somewhere between the nodes.
    let lan = cluster.lan();
    let port = Cluster::port(&cluster.nodes[1].netns);
    run(lan.command("tc").args(["qdisc", "add", "dev", &port, "clsact"]));
    let filter = ["filter", "add", "dev", &port, "egress", "protocol", "ip", "u32"];
    let matches =
        ["match", "ip", "protocol", "17", "0xff", "match", "ip", "dport", "6081", "0xffff", "action", "drop"];
    let dropped = lan.command("tc").args(filter).args(matches).status().is_ok_and(|status| status.success());
    if dropped {
        let (_, findings) = doctor(node, &[]);
        found(&findings, "tunnel", "a firewall between the nodes drops it", "let UDP and TCP port 6081 pass");
        run(lan.command("tc").args(["qdisc", "del", "dev", &port, "clsact"]));
    } else {
        println!("this kernel has no u32 classifier: not tried");
    }
    hears(node, "node2", "yes");
    // 4. What is between the nodes takes shorter packets than the nodes think.
    lan.ip(&format!("link set {port} mtu 1300"));
    let (_, findings) = doctor(node, &[]);
    found(&findings, "mtu", "node node2: packets of 1500 bytes", "ip route change");
    lan.ip(&format!("link set {port} mtu 1500"));
    // 5. The node is off.
    second.stop(Signal::SIGKILL);
    lan.ip(&format!("link set {port} down"));
    hears(node, "node2", "silent");
    let (_, findings) = doctor(node, &[]);
    found(
        &findings,
        "tunnel",
        "nothing answers at 192.0.2.102, not even a ping",
        "docker node rm --force node2",
    );
    lan.ip(&format!("link set {port} up"));
    let _ = verb(&cluster.nodes[1].netns, &["detach", "--iface", "eth1"]);
    drop(first);
}

#[test]
fn faults_of_a_node_are_told_apart() {
    let mut cluster = Cluster::new(1);
    cluster.add_nginx("web.1", 0);
    cluster.add_nginx("web.2", 0);
    cluster.add_task("web.3", 0);
    let path = cluster.write_all_running();
    let node = &cluster.nodes[0].netns;
    // 6. Nothing is attached, and the wrong interface is.
    let (code, findings) = doctor(node, &[]);
    assert_eq!(code, 2);
    found(
        &findings,
        "attached",
        "nothing is served. Interfaces with an address: eth1",
        "attach --iface eth1",
    );
    node.ip("link add eth2 type veth peer name far");
    node.ip("link set eth2 up");
    node.ip("link set far up");
    node.ip("addr add 198.51.100.1/24 dev eth2");
    let wrong = Running::start(
        node.command(program())
            .args(["attach", "--iface", "eth2", "--on-exit", "detach"])
            .args(["--log-level", "off", "--listen", "none", "--cluster"])
            .arg(&path),
    );
    within(Duration::from_secs(60), "eth2 is served", || {
        doctor(node, &[]).1.iter().any(|f| f["check"] == "interface")
    });
    let (_, findings) = doctor(node, &[]);
    found(&findings, "interface", "eth2 has none of this node's addresses: ", "attach --iface eth1");
    drop(wrong);
    // 7. A task does not listen: it is named, and asked if that is wanted.
    let agent = attach(&cluster, 0);
    requests(&cluster.client, cluster.addresses(0)[0], 6);
    eventually("it is known", || text(node, &["task", "ls", "-q", "--filter", "problem"]) == "web.3\n");
    let (code, findings) = doctor(node, &["--probe"]);
    assert_eq!(code, 2);
    found(&findings, "task", "task web.3 on node1", "task drain web.3");
    found(&findings, "probe", "task web.3 of service web takes no connection", "does it listen on port 8080");
    // 8. Ports that others hold: a published one, and the tunnel's.
    let holder =
        node.command("busybox").args(["nc", "-l", "-p", "80"]).spawn().map(Holder).expect("start busybox");
    eventually("the port is held", || doctor(node, &[]).1.iter().any(|finding| finding["check"] == "ports"));
    let (_, findings) = doctor(node, &[]);
    found(
        &findings,
        "ports",
        "port 80/tcp is published by service web, and busybox (process ",
        "publish another port",
    );
    drop(holder);
    // 9. Two interfaces with the same addresses.
    node.ip("addr add 172.18.1.200/16 dev eth2");
    let (_, findings) = doctor(node, &[]);
    found(&findings, "ranges", "have overlapping addresses", "default-address-pools");
    node.ip("addr del 172.18.1.200/16 dev eth2");
    drop(agent);
    // 10. Another XDP program sits there.
    let other = other_xdp(node);
    let agent = attach(&cluster, 0);
    let (_, findings) = doctor(node, &[]);
    found(&findings, "mode", "another XDP program holds eth1: id ", "xdp off");
    found(&findings, "mode", "uplink_xdp", "xdp off");
    drop(agent);
    drop(other);
    // And no capability.
    let output = node
        .command("setpriv")
        .args(["--bounding-set=-perfmon,-bpf,-sys_admin", "--inh-caps=-all"])
        .arg(program())
        .args(["doctor", "-o", "json"])
        .env("DOCKER_HOST", "unix:///nonexistent/docker.sock")
        .output()
        .expect("start setpriv");
    let (code, findings) = parse(&output);
    assert_eq!(code, 2);
    found(&findings, "capabilities", "CAP_BPF, CAP_PERFMON missing", "cap_add: [BPF, PERFMON]");
}

/// A process that is ended with the test.
struct Holder(std::process::Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _: io::Result<()> = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_is_left_of_namespaces_that_are_gone_is_found_and_removed() {
    let folder = {
        let cluster = two_nodes();
        let agent = attach(&cluster, 0);
        let node = &cluster.nodes[0].netns;
        let folders = node.enter(|| {
            let pins = lb_userspace::datapath::PinDir::of("eth1").expect("the pins");
            let runtime = lb_userspace::events::runtime_folder().expect("where it keeps events");
            (pins.path().parent().map(Path::to_owned), runtime)
        });
        // The agent ends, its namespace goes; nobody detaches, nor cleans up.
        agent.stop(Signal::SIGKILL);
        run(Command::new("ip").args(["netns", "del", node.name()]));
        let _: io::Result<()> = fs::remove_dir_all(folders.1);
        folders.0.expect("a folder")
    };
    assert!(folder.exists());
    let netns = Netns::new("other");
    let leaves = || {
        let output =
            netns.command(program()).args(["doctor", "-o", "json"]).output().expect("start the agent");
        let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let all = document["findings"].as_array().cloned().unwrap_or_default();
        all.iter().any(|f| {
            f["check"] == "pins" && f["text"].as_str().is_some_and(|t| t.contains(&*folder.to_string_lossy()))
        })
    };
    // Namespaces are taken down in the background.
    eventually("it is found", leaves);
    let said = text(&netns, &["doctor", "--remove-dead-pins"]);
    assert!(said.contains(&format!("removed {}", folder.display())), "{said}");
    assert!(!folder.exists());
}

#[test]
fn a_bundle_has_everything_and_no_keys() {
    let cluster = two_nodes();
    let _agent = attach(&cluster, 0);
    let node = &cluster.nodes[0].netns;
    let path = cluster.folder().join("bundle.txt");
    let mut command: Command = node.command(program());
    command.args(["support-bundle", "--to"]).arg(&path).env("SECRET_TOKEN", "hunter2");
    run(&mut command);
    let bundle = fs::read_to_string(&path).expect("the bundle");
    for part in [
        "===== doctor",
        "===== interfaces",
        "===== events",
        "\"web.1\"",
        "controller_started",
        "===== ip route",
    ] {
        assert!(bundle.contains(part), "{part}");
    }
    assert!(!bundle.contains("hunter2") && !bundle.contains("PRIVATE KEY"));
    // What is there is not written over.
    let output = command.output().expect("start the agent");
    assert!(!output.status.success());
}

#[test]
fn a_label_that_nobody_knows_is_shown_on_every_node() {
    let swarm = Swarm::new(2);
    let _agents = swarm.attach();
    let [manager, worker] = [&swarm.nodes[0], &swarm.nodes[1]];
    manager.docker(&[
        "service",
        "create",
        "-d",
        "--name",
        "web",
        "-p",
        "80:8080",
        "--label",
        "lb.schedular=maglev",
        "--label",
        "lb.idle=kill",
        "web",
    ]);
    for node in [manager, worker] {
        within(PATIENCE, &format!("{} shows it", node.name), || {
            let services =
                json(&node.netns, &["service", "ls"])["services"].as_array().cloned().unwrap_or_default();
            services.iter().any(|service| {
                service["problem"].as_str().is_some_and(|problem| {
                    problem.contains("label lb.schedular is unknown; did you mean lb.scheduler?")
                        && problem.contains("label lb.idle=kill is neither forget nor reset")
                })
            })
        });
    }
    let output = worker
        .netns
        .command(program())
        .args(["doctor", "-o", "json"])
        .env("DOCKER_HOST", worker.docker_host())
        .output()
        .expect("start the agent");
    let (code, findings) = parse(&output);
    assert!(code > 0);
    found(
        &findings,
        "serving",
        "label lb.schedular is unknown",
        "docker service update --label-rm lb.schedular",
    );
    let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let all = all["findings"].as_array().cloned().unwrap_or_default();
    let says = |check: &str, part: &str| {
        all.iter().any(|f| f["check"] == check && f["text"].as_str().is_some_and(|text| text.contains(part)))
    };
    assert!(says("docker", "a worker of its swarm"), "{all:#?}");
    assert!(says("certificate", "valid for"), "{all:#?}");
}
