//! What this node knows by itself: its containers and their health from its own Docker, where they are from the kernel.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{
    Ingress,
    engine::{Engine, EngineError, Events, encode},
    model,
};
use crate::{
    check::runner::Checks,
    net::{Net, Snapshot, newest},
    source::facts::{NodeFacts, TaskFacts, task_name},
    translation::{embed, is_made_up, own, stand_in},
    tunnel_key::PublicKey,
};

/// The bridge by which Swarm's containers reach the outside; its name in the kernel is Docker's own default.
const GATEWAY_BRIDGE: &str = "docker_gwbridge";
const SETTLE: Duration = Duration::from_millis(10);
/// A container whose addresses are not there yet is looked at again.
const SOON: Duration = Duration::from_millis(100);
/// Everything is looked at again, in case an event was missed.
const LOOK: Duration = Duration::from_secs(5);
/// How long a container without an address is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(1);

const EVENTS: &str =
    r#"{"type":["container"],"event":["start","die","pause","unpause","health_status","destroy"]}"#;
const TASKS: &str = r#"{"is-task":["true"]}"#;

/// What an agent says of itself.
pub struct ThisNode {
    /// Its uplinks.
    pub interfaces: Vec<String>,
    /// What its packets in the tunnel are known by.
    pub key: PublicKey,
    /// Whether IPv6 clients of tasks that have IPv4 alone are translated here.
    pub translates: bool,
}

/// Follows until the receiver is gone.
pub async fn follow(engine: Engine, node: ThisNode, checks: Checks, out: watch::Sender<Option<NodeFacts>>) {
    let mut news = checks.news();
    let mut local = Local {
        engine,
        interfaces: node.interfaces,
        translates: node.translates,
        checks,
        ingress: Ingress::default(),
        events: None,
        told: None,
        listed: false,
    };
    let (net, mut changes) = match Net::connect() {
        Ok(connected) => connected,
        Err(error) => {
            log::error!("this node's own tasks cannot be found: {error}");
            return;
        }
    };
    let mut waiting = Instant::now();
    loop {
        let mut facts = out.borrow().clone().unwrap_or_default();
        facts.key = Some(node.key);
        let pause = match local.read(&net, &mut facts).await {
            Ok(true) => {
                waiting = Instant::now();
                LOOK
            }
            Ok(false) if waiting.elapsed() < PATIENCE => SOON,
            Ok(false) => LOOK,
            Err(problem) => {
                local.lost(&problem);
                facts.complete = false;
                RETRY
            }
        };
        // Whether Docker answers or not.
        facts.checks = local.checks.has_begun();
        for (name, task) in &mut facts.tasks {
            task.finding = local.checks.finding(name).unwrap_or_default();
        }
        out.send_if_modified(|told| {
            let facts = Some(facts);
            let news = *told != facts;
            *told = facts;
            news
        });
        if out.is_closed() {
            return;
        }
        local.wait(pause, &mut changes, &mut news).await;
    }
}

struct Local {
    engine: Engine,
    interfaces: Vec<String>,
    translates: bool,
    checks: Checks,
    ingress: Ingress,
    events: Option<Events>,
    told: Option<String>,
    /// Whether they were ever listed.
    listed: bool,
}

impl Local {
    /// Reads everything; whether every task was found in the kernel.
    async fn read(&mut self, net: &Net, facts: &mut NodeFacts) -> Result<bool, EngineError> {
        // Addresses of the uplinks are known without Docker.
        let before = net.snapshot().await.inspect_err(|error| log::debug!("{error}")).ok();
        if let Some(snapshot) = &before {
            facts.addresses = self.addresses(snapshot);
        }
        if self.events.is_none() {
            self.events = Some(self.engine.events(EVENTS).await?);
        }
        let path = format!("/containers/json?filters={}", encode(TASKS));
        let containers: Vec<model::Container> = self.engine.list(&path).await?;
        let ingress = self.ingress.id(&self.engine).await?;
        let Some(snapshot) = net.snapshot().await.ok().or(before) else {
            return Ok(false);
        };
        let mut found = true;
        let mut tasks = BTreeMap::new();
        for container in &containers {
            let Some(name) = container.labels.get("com.docker.swarm.task.name") else {
                continue;
            };
            let unhealthy = container.state != "running" || container.status.contains("(unhealthy)");
            let network = container
                .network_settings
                .networks
                .values()
                .find(|network| Some(&network.network_id) == ingress.as_ref());
            let name = task_name(name);
            // Where it was found once it stays while it runs.
            let mut addresses = facts.tasks.get(&name).map(|task| task.addresses.clone()).unwrap_or_default();
            if let Some(overlay) = network.and_then(|network| network.ip_address.parse().ok()) {
                let now = behind(&snapshot, overlay);
                if !now.is_empty() {
                    let is_taken = |address: IpAddr| {
                        let others = facts.tasks.iter().filter(|(other, _)| **other != name).chain(&tasks);
                        others.flat_map(|(_, task)| &task.addresses).any(|known| *known == address)
                    };
                    addresses = reach_by_both(now, &addresses, self.translates, is_taken);
                }
                found &= !addresses.is_empty();
            }
            tasks.insert(name, TaskFacts { addresses, unhealthy, ..TaskFacts::default() });
        }
        (facts.tasks, facts.complete) = (tasks, true);
        if self.told.take().is_some() {
            log::info!("Docker answers again: this node's own tasks are listed");
        }
        self.listed = true;
        Ok(found)
    }

    fn addresses(&self, snapshot: &Snapshot) -> Vec<IpAddr> {
        let links = self.interfaces.iter().filter_map(|name| snapshot.link(name));
        links.flat_map(|link| snapshot.addresses_of(link.index)).collect()
    }

    fn lost(&mut self, problem: &EngineError) {
        self.events = None;
        let problem = problem.to_string();
        if self.told.as_ref() != Some(&problem) {
            // Who waits for the cluster's state says the same.
            match self.listed {
                true => {
                    log::warn!("this node's own tasks cannot be listed, the last known ones stand: {problem}")
                }
                false => log::debug!("this node's own tasks cannot be listed yet: {problem}"),
            }
            self.told = Some(problem);
        }
    }

    async fn wait(
        &mut self,
        pause: Duration,
        changes: &mut crate::net::Changes,
        news: &mut watch::Receiver<u64>,
    ) {
        let events = &mut self.events;
        let heard = async {
            match events {
                Some(stream) => stream.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            more = heard => {
                if !more {
                    *events = None;
                }
            }
            // Neighbours come and go all the time, containers hardly ever.
            Some(()) = changes.recv() => tokio::time::sleep(SOON).await,
            Ok(()) = news.changed() => {}
            () = tokio::time::sleep(pause) => return,
        }
        tokio::time::sleep(SETTLE).await;
    }
}

/// Adds the address at which a task is reached through translation by clients of a family that it may not have, after those of its
/// own: of one that has both others take those. What stood in for it before still does.
fn reach_by_both(
    mut addresses: Vec<IpAddr>,
    before: &[IpAddr],
    translates: bool,
    is_taken: impl Fn(IpAddr) -> bool,
) -> Vec<IpAddr> {
    addresses.retain(|address| !is_made_up(*address));
    let v4 = addresses.iter().find_map(|address| if let IpAddr::V4(v4) = address { Some(*v4) } else { None });
    let v6 = addresses.iter().find_map(|address| if let IpAddr::V6(v6) = address { Some(*v6) } else { None });
    match (v4, v6) {
        (Some(v4), _) if translates => addresses.push(embed(v4)),
        (None, Some(v6)) => {
            let kept = before.iter().find(|one| one.is_ipv4() && own(**one, before) == Some(v6.into()));
            let new = || stand_in(v6, |address| is_taken(address.into())).into();
            addresses.push(kept.copied().unwrap_or_else(new));
        }
        _ => {}
    }
    addresses
}

/// Where a container is reached on this node, found by its address on the cluster's network: both are in one namespace.
fn behind(snapshot: &Snapshot, overlay: IpAddr) -> Vec<IpAddr> {
    let bridge = snapshot.link(GATEWAY_BRIDGE).map(|link| link.index);
    let on_bridge = |port: u32| {
        let master = snapshot.links.get(&port).and_then(|link| link.master);
        master.is_some() && master == bridge
    };
    let inside = newest(&snapshot.containers, |container| {
        container.others.contains(&overlay) && on_bridge(container.port)
    });
    inside.map(|container| container.addresses.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{ContainerNetns, Link};

    fn link(index: u32, name: &str, kind: &str, master: Option<u32>) -> (u32, Link) {
        let link = Link {
            index,
            name: name.into(),
            mac: [0; 6],
            up: true,
            kind: kind.into(),
            ethernet: true,
            vlan: None,
            master,
            lower: None,
            lower_elsewhere: true,
            namespace: Some(0),
            mtu: 1500,
            xdp: None,
        };
        (index, link)
    }

    #[test]
    fn a_task_is_reached_by_the_gateway_bridge_alone() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let container = |port, own: &str| ContainerNetns {
            port,
            mac: [2; 6],
            addresses: vec![ip(own)],
            others: vec![ip("10.0.0.7"), ip("127.0.0.1")],
        };
        let snapshot = Snapshot {
            links: [
                link(5, "docker_gwbridge", "bridge", None),
                link(6, "br-other", "bridge", None),
                link(7, "veth1", "veth", Some(5)),
                link(8, "veth2", "veth", Some(6)),
            ]
            .into(),
            containers: vec![container(8, "172.19.0.2"), container(7, "172.18.0.3")],
            ..Snapshot::default()
        };
        assert_eq!(behind(&snapshot, ip("10.0.0.7")), [ip("172.18.0.3")]);
        // Somebody holds the namespace of an earlier container, whose address another has by now.
        let mut held = snapshot.clone();
        held.links.insert(9, link(9, "veth3", "veth", Some(5)).1);
        held.containers.insert(0, container(9, "172.18.0.4"));
        assert_eq!(behind(&held, ip("10.0.0.7")), [ip("172.18.0.4")]);
        assert_eq!(behind(&snapshot, ip("10.0.0.8")), Vec::<IpAddr>::new());
    }

    #[test]
    fn a_task_of_one_family_is_reached_by_both_at_the_same_address_while_it_runs() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let free = |_| false;
        let (v4, v6) = (ip("172.18.0.3"), ip("fd18::3"));
        assert_eq!(reach_by_both(vec![v4], &[], true, free), [v4, ip("64:ff9b:1:6c62::ac12:3")]);
        // Without a pool IPv6 clients cannot be translated; IPv4 clients need none.
        assert_eq!(reach_by_both(vec![v4], &[], false, free), [v4]);
        let told = reach_by_both(vec![v6], &[], false, free);
        let [own, first] = told[..] else { panic!("{told:?}") };
        assert!(own == v6 && first.is_ipv4() && is_made_up(first));
        // While another task has it, it is the next; and what it was stays.
        let second = reach_by_both(vec![v6], &[], true, |address| address == first);
        assert!(second[1] != first && reach_by_both(vec![v6], &second, true, free) == second);
        // Another task's is not taken over, and who has both needs none.
        let other = reach_by_both(vec![ip("fd18::4")], &second, true, free);
        assert_ne!(other[1], second[1]);
        assert_eq!(reach_by_both(vec![v4, v6], &second, true, free)[..2], [v4, v6]);
    }
}
