//! Large clusters: what a change costs does not depend on their size.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use lb_tests::{
    agent::{Agent, json, text},
    cluster::Cluster,
    large::{Large, Listeners, Size},
    netns::eventually,
    traffic::{ask, client, echo, get, stop_echo},
};
use lb_userspace::datapath::PinDir;

/// Large enough that what is done for each service or task would show.
const SIZE: Size = Size { services: 300, tasks: 3_000 };

#[test]
fn a_change_of_one_task_writes_what_that_task_is_named_in() {
    let large = Large::new(SIZE);
    let _others = large.answer();
    large.write(&SIZE.text(None));
    let agent = large.attach(&large.put(), &[]);
    let listeners = Listeners::open(&large.node.enter(|| PinDir::of("eth1").expect("the pins")));
    listeners.complete(SIZE, Duration::from_secs(60));
    let applied = |log: &str| -> Vec<String> {
        let counts = log.lines().filter_map(|line| line.split_once(": applied ")?.1.split_once(" changes"));
        counts.map(|(count, _)| count.to_owned()).collect()
    };
    let loaded = applied(&agent.log()).len();
    for service in [0, 150, 299] {
        large.change(&listeners, Some(service), service);
        large.change(&listeners, None, service);
    }
    // The service's label, the backend, its slots and the listener; whatever else happens meanwhile.
    let small = || applied(&agent.log())[loaded..].iter().filter(|count| *count == "4").count();
    eventually("six changes of four operations each were applied", || small() == 6);
}

#[test]
fn ten_thousand_ports_of_a_service_follow_an_address_that_comes() {
    let mut cluster = Cluster::new(1);
    cluster.add_nginx("web.1", 0);
    let media = cluster.add_task("media.1", 0);
    let web = cluster.file("\"80:8080\"", &[(&cluster.tasks[0], "running")]);
    let task = &cluster.tasks[media];
    let range = format!(
        "[[service]]\nname = \"media\"\nports = [\"10000-20000:30000-40000/udp\"]\n\n[[service.task]]\nname = \"media.1\"\n\
         node = \"node1\"\naddresses = [\"{}\", \"{}\"]\n",
        task.v4, task.v6
    );
    let path = cluster.write(&(web + "\n" + &range));
    let ports = [30_000, 35_000, 40_000];
    let echoes: Vec<_> = ports.map(|port| task.netns.spawn(move || echo(port, "media.1"))).into();
    let node = &cluster.nodes[0].netns;
    let start = Instant::now();
    let _agent = Agent::attach(node, cluster.folder(), &path, &[]);
    let answers = |address: IpAddr, port: u16| {
        let asked = || ask(SocketAddr::new(address, port - 20_000), &format!("{port}"));
        cluster.client.enter(asked).is_some_and(|answer| answer.starts_with(&format!("media.1 {port} ")))
    };
    let [v4, v6] = cluster.addresses(0);
    for (address, port) in [v4, v6].into_iter().flat_map(|address| ports.map(|port| (address, port))) {
        eventually(&format!("{address} answers for {port}"), || answers(address, port));
    }
    println!("all served {:?} after the start", start.elapsed());
    // Shown as one.
    let listed = text(node, &["service", "ls"]);
    assert!(listed.contains(" *:10000-20000->30000-40000/udp"), "{listed}");
    // An address that keepalived brings: everybody answers there.
    node.ip("addr add 192.0.2.200/24 dev eth1");
    let start = Instant::now();
    let new = IpAddr::from([192, 0, 2, 200]);
    eventually("web answers there", || {
        let to = SocketAddr::new(new, 80);
        cluster.client.enter(|| get(&client(), to, "/")).is_ok_and(|answer| answer.contains("web.1 saw"))
    });
    println!("web answers there after {:?}", start.elapsed());
    for port in ports {
        eventually(&format!("{new} answers for {port}"), || answers(new, port));
    }
    println!("all ports answer there after {:?}", start.elapsed());
    // And where it is taken away, nothing is left.
    node.ip("addr del 192.0.2.200/24 dev eth1");
    let listeners = || json(node, &["status"])["listeners"].as_u64();
    eventually("its listeners are gone", || listeners() == Some(2 * 10_002));
    ports.iter().for_each(|port| stop_echo(&cluster.tasks[media].netns, *port));
    echoes.into_iter().for_each(|echo| echo.join().expect("an echo"));
}
