//! What it takes to tell other nodes' agents a large cluster, and one change of it: a manager's agent and some that follow
//! it, over real sockets with certificates as Swarm makes them.

use std::{
    collections::BTreeSet,
    fs,
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use lb_userspace::{
    cluster::ClusterState,
    source::peer::{ClusterSnapshot, Published, client, server, tls},
};
use nix::time::{ClockId, clock_gettime};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{mpsc, watch},
};

use super::figure::{Figure, Samples, Target};

/// Agents that follow.
const AGENTS: usize = 8;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells a cluster to some agents, and then so many changes of one task.
pub fn measure(cluster: &ClusterState, rounds: usize) -> Vec<Figure> {
    let folder = tempfile::tempdir().expect("make a folder");
    let workers: Vec<String> = (0..AGENTS).map(|number| format!("w{number}")).collect();
    let root = |node: &str| folder.path().join(node);
    let roles = workers.iter().map(|worker| (worker.as_str(), tls::WORKER)).chain([("m1", tls::MANAGER)]);
    let roots: Vec<_> = roles.map(|(node, role)| (root(node), node, role)).collect();
    certify(&roots.iter().map(|(root, node, role)| (root.as_path(), *node, *role)).collect::<Vec<_>>());
    let keeper = |node: &str| Arc::new(tls::Keeper::new(&root(node)));
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = free.local_addr().expect("an address");
    drop(free);
    let (published, snapshots) = watch::channel::<Published>(None);
    let (agents, mut heard_of_agents) = mpsc::channel(64);
    // As agents run: one thread each side.
    let clock = spawn(server::serve(at.port(), keeper("m1"), snapshots, agents));
    let (sender, mut events) = mpsc::channel(AGENTS);
    let (_facts, known) = watch::channel(None);
    let at = SocketAddr::from(([127, 0, 0, 1], at.port()));
    let follow: Vec<_> = workers
        .iter()
        .map(|worker| client::follow("m1".into(), at, keeper(worker), known.clone(), sender.clone()))
        .collect();
    spawn(async {
        let tasks: Vec<_> = follow.into_iter().map(tokio::spawn).collect();
        for task in tasks {
            let _ = task.await;
        }
    });
    let waiting = runtime();
    // All are there, and were told that there is nothing yet.
    waiting.block_on(async {
        let mut there = 0;
        while there < AGENTS {
            if let Some(client::ManagerEvent::Problem(..)) = within(events.recv()).await {
                there += 1;
            }
        }
    });
    thread::spawn(move || while heard_of_agents.blocking_recv().is_some() {});

    let members: BTreeSet<String> = workers.iter().cloned().collect();
    let mut state = cluster.clone();
    // Of the whole every service is looked at, of a change the one that has changed.
    let mut tell = |state: &ClusterState, changed: std::ops::Range<usize>| {
        let (start, busy) = (Instant::now(), used(clock));
        published.send_replace(Some(Arc::new(ClusterSnapshot::new(state.clone(), members.clone(), None))));
        waiting.block_on(async {
            let mut there = 0;
            while there < AGENTS {
                if let Some(client::ManagerEvent::Cluster(_, heard)) = within(events.recv()).await {
                    there += usize::from(
                        heard.services.get(changed.clone()) == state.services.get(changed.clone()),
                    );
                }
            }
        });
        [start.elapsed(), used(clock) - busy].map(|time| time.as_secs_f64() * 1e3)
    };
    let whole = tell(&state, 0..state.services.len());
    let changes: Vec<[f64; 2]> = (0..rounds)
        .map(|round| {
            let index = round * (state.services.len() - 1) / (rounds.max(2) - 1);
            let tasks = &mut state.service_mut(index).tasks;
            tasks[0].weight = 1 + tasks[0].weight % 2;
            tell(&state, index..index + 1)
        })
        .collect();
    let figure =
        |name: &str, samples: &[f64]| Figure::new(name, "ms", &Samples::new(samples.iter().copied()));
    let column = |index: usize| changes.iter().map(|change| change[index]).collect::<Vec<_>>();
    vec![
        figure("the whole cluster, told to eight agents", &whole[..1]),
        figure("of that, the manager's agent's CPU", &whole[1..]),
        figure("one task changed, told to eight agents", &column(0)).target(Target::AtMost(50.0)),
        figure("of that, the manager's agent's CPU", &column(1)),
    ]
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Runs something on a thread of its own; the clock of that thread's CPU time.
fn spawn(work: impl Future<Output = ()> + Send + 'static) -> ClockId {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut clock = 0;
        // SAFETY: the thread is this one, and `clock` is written once.
        let result = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) };
        assert_eq!(result, 0, "the clock of a thread");
        sender.send(ClockId::from_raw(clock)).expect("somebody waits");
        runtime().block_on(work);
    });
    receiver.recv().expect("a clock")
}

fn used(clock: ClockId) -> Duration {
    clock_gettime(clock).expect("the clock of a thread").into()
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("nothing is heard for too long")
}

/// Certificates as Swarm has them, in the Docker root directories of some nodes.
fn certify(nodes: &[(&Path, &str, &str)]) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "swarm-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let root = params.self_signed(&key).expect("a certificate").pem();
    let authority = Issuer::new(params, key);
    for (folder, node, role) in nodes {
        let names = vec![(*role).to_owned(), (*node).to_owned()];
        let mut params = CertificateParams::new(names).expect("names");
        for (kind, value) in [
            (DnType::OrganizationName, "c1"),
            (DnType::OrganizationalUnitName, role),
            (DnType::CommonName, node),
        ] {
            params.distinguished_name.push(kind, value);
        }
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &authority).expect("a certificate").pem();
        let folder = folder.join("swarm/certificates");
        fs::create_dir_all(&folder).expect("make a folder");
        let files = [
            ("swarm-node.crt", certificate),
            ("swarm-node.key", key.serialize_pem()),
            ("swarm-root-ca.crt", root.clone()),
        ];
        for (name, text) in files {
            fs::write(folder.join(name), text).expect("write a certificate");
        }
    }
}
