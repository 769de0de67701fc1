//! What the kernel can do, and what the agent makes of it: run on each kernel of the matrix
//! (`cargo xtask test --kernel …`) as on this machine's own.

use std::{fs, path::Path};

use lb_tests::{
    agent::{Agent, active_tasks, json, outcome, verb},
    cluster::Cluster,
    kernel::{self, version},
    netns::eventually,
    traffic::{requests, tally},
};
use serde_json::Value;

/// Two nodes, three tasks: two on the first, one on the second.
fn three_tasks() -> Cluster {
    let mut cluster = Cluster::new(2);
    cluster.receive_xdp();
    for slot in 1..=3 {
        cluster.add_nginx(&format!("web.{slot}"), usize::from(slot > 2));
    }
    cluster.write_all_running();
    cluster
}

/// Attaches to the first node as on a kernel that lacks these features, and sees it serve; its status.
fn serve(cluster: &Cluster, lacks: &str, mode: &str) -> Value {
    let node = &cluster.nodes[0].netns;
    let path = cluster.folder().join("cluster.toml");
    let agent = Agent::attach_with(
        node,
        cluster.folder(),
        &path,
        &["--mode", mode],
        &[("LB_TEST", "1"), ("LB_KERNEL_LACKS", lacks)],
    );
    eventually("all tasks are offered", || active_tasks(node, "web") == 3);
    for address in cluster.addresses(0) {
        let answers = requests(&cluster.client, address, 6);
        assert!(tally(&answers).values().all(|count| *count == 2), "{mode} {address}: {answers:?}");
    }
    assert_eq!(outcome(node, "delivery_lost"), 0);
    let status = json(node, &["status"]);
    drop(agent);
    status
}

/// Whether a pin of any datapath is left in the namespace of the first node.
fn pins(cluster: &Cluster) -> Option<String> {
    cluster.nodes[0].netns.enter(|| {
        let pins = lb_userspace::datapath::PinDir::of("eth1").ok()?;
        Path::exists(pins.path()).then(|| format!("{:?}", fs::read_dir(pins.path())))
    })
}

#[test]
fn status_names_the_ways_that_the_kernel_has() {
    let cluster = three_tasks();
    for (mode, name) in [("native", "native XDP"), ("generic", "generic XDP"), ("tc", "TC alone")] {
        let status = serve(&cluster, "", mode);
        assert_eq!(status["mode"], name);
        assert_eq!(status["kernel"], lb_userspace::datapath::release());
        // A newer kernel that lacks what an older one has is news.
        let hook = if version() >= kernel::TCX { "tcx" } else { "clsact" };
        assert_eq!(status["tc_hook"], hook, "{status}");
        assert_eq!(status["xdp_frags"], version() >= kernel::FRAGS, "{status}");
        assert!(status["clock"].as_str().is_some_and(|clock| clock.starts_with("jiffies, ")), "{status}");
        let told = status["told_to_tc_by"].as_str().expect("a sentence");
        assert_eq!(told.starts_with("metadata"), mode == "native", "{status}");
        assert_eq!(pins(&cluster), None, "after {mode}");
    }
}

#[test]
fn a_kernel_without_links_and_frames_in_pieces_serves_all_the_same() {
    let cluster = three_tasks();
    for mode in ["native", "generic", "tc"] {
        let status = serve(&cluster, "tcx,frags", mode);
        assert_eq!((&status["tc_hook"], &status["xdp_frags"]), (&"clsact".into(), &false.into()), "{status}");
    }
    // A frame that may lie in pieces is then no business of native XDP: the driver refuses, and TC serves.
    cluster.set_mtu(9000);
    assert_eq!(serve(&cluster, "tcx,frags", "auto")["mode"], "TC alone");
}

#[test]
fn programs_are_swapped_under_running_traffic_and_nothing_stays() {
    let cluster = three_tasks();
    let node = &cluster.nodes[0].netns;
    let path = cluster.folder().join("cluster.toml");
    let address = cluster.addresses(0)[0];
    let attach = || {
        let agent = Agent::attach(node, cluster.folder(), &path, &[]);
        eventually("all tasks are offered", || active_tasks(node, "web") == 3);
        agent
    };
    let mut agent = attach();
    let load = lb_tests::traffic::Load::start(&cluster.client, address, 2, u64::MAX);
    for _ in 0..3 {
        let done = load.done();
        eventually("traffic", || load.done() > done + 20);
        agent.stop(nix::sys::signal::Signal::SIGKILL);
        agent = attach();
        assert!(agent.log().contains("adopted the running datapath"), "{}", agent.log());
    }
    let done = load.done();
    eventually("traffic", || load.done() > done + 20);
    assert_eq!(load.stop(), Vec::<String>::new());
    drop(agent);
    assert_eq!(pins(&cluster), None);
    assert_eq!(node.output("tc", &["qdisc", "show"]).matches("clsact").count(), 0);
    assert!(!node.output("ip", &["-d", "link", "show", "eth1"]).contains("xdp"));
}

#[test]
fn a_kernel_that_lacks_what_is_needed_is_refused_in_one_sentence() {
    let cluster = Cluster::new(1);
    let path = cluster.write_all_running();
    let node = &cluster.nodes[0].netns;
    let mut command = node.command(lb_tests::agent::program());
    command.args(["attach", "--iface", "eth1", "--cluster"]).arg(path);
    if version() >= kernel::OLDEST {
        // As on an older one.
        command.envs([("LB_TEST", "1"), ("LB_KERNEL_LACKS", "fetching_add,netns_cookie")]);
    }
    let output = command.output().expect("start the agent");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    // Besides, it warns that it takes the kernel for another.
    let sentences = errors.lines().filter(|line| !line.contains("LB_TEST"));
    assert_eq!(sentences.filter(|line| !line.contains("LB_KERNEL_LACKS")).count(), 1, "{errors}");
    assert!(
        errors.contains(
            "atomic additions in eBPF that return the old value (Linux 5.12), the cookie of a network"
        ),
        "{errors}"
    );
    println!("{errors}");
    assert!(!verb(node, &["status"]).status.success());
    assert!(!node.output("ip", &["-d", "link", "show", "eth1"]).contains("xdp"));
    assert_eq!(node.output("tc", &["qdisc", "show"]).matches("clsact").count(), 0);
    assert!(!Path::new("/sys/fs/bpf/lb").exists() || pins(&cluster).is_none());
}
