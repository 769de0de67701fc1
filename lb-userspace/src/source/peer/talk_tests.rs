//! Agents that talk over real sockets, with certificates as Swarm makes them.

use std::{fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use super::*;
use crate::source::facts::NodeFacts;

pub(super) struct Authority(Issuer<'static, KeyPair>, String);

impl Authority {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "swarm-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self(Issuer::new(params, key), pem)
    }

    /// Docker's root directory of a node.
    pub(super) fn node(&self, cluster: &str, role: &str, node: &str) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("swarm/certificates")).unwrap();
        self.certify(root.path(), (cluster, role, node), Duration::from_secs(3600));
        root
    }

    /// Gives a node a certificate that is good for so long.
    pub(super) fn certify(&self, root: &Path, (cluster, role, node): (&str, &str, &str), good: Duration) {
        let mut params = CertificateParams::new(vec![role.to_owned(), node.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::OrganizationName, cluster);
        params.distinguished_name.push(DnType::OrganizationalUnitName, role);
        params.distinguished_name.push(DnType::CommonName, node);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_after = (SystemTime::now() + good).into();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap().pem();
        let folder = root.join("swarm/certificates");
        fs::write(folder.join("swarm-node.crt"), certificate).unwrap();
        // With headers, as Swarm writes its keys.
        let (first, rest) =
            key.serialize_pem().split_once('\n').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        fs::write(folder.join("swarm-node.key"), format!("{first}\nkek-version: 0\n\n{rest}")).unwrap();
        fs::write(folder.join("swarm-root-ca.crt"), &self.1).unwrap();
    }
}

pub(super) fn keeper(root: &Path) -> Arc<tls::Keeper> {
    Arc::new(tls::Keeper::new(root))
}

/// A manager's agent, and another that follows it.
struct Pair {
    published: watch::Sender<Published>,
    facts: watch::Sender<Option<NodeFacts>>,
    agents: mpsc::Receiver<server::PeerEvent>,
    managers: mpsc::Receiver<client::ManagerEvent>,
    jobs: [JoinHandle<()>; 2],
}

impl Pair {
    fn start(manager: &Path, agent: &Path) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let (published, snapshots) = watch::channel(None);
        let (facts, known) = watch::channel(None);
        let (agent_sender, agents) = mpsc::channel(8);
        let (manager_sender, managers) = mpsc::channel(8);
        let at = SocketAddr::from(([127, 0, 0, 1], port));
        let jobs = [
            tokio::spawn(server::serve(port, keeper(manager), snapshots, agent_sender)),
            tokio::spawn(client::follow("m1".into(), at, keeper(agent), known, manager_sender)),
        ];
        Self { published, facts, agents, managers, jobs }
    }

    fn tell(&self, problem: Option<&str>, tunnel: u16) {
        let cluster =
            ClusterState { tunnel: Tunnel { port: tunnel, ..Tunnel::default() }, ..ClusterState::default() };
        let members = BTreeSet::from(["w1".to_owned(), "w2".to_owned()]);
        let snapshot = ClusterSnapshot::new(cluster, members, problem.map(str::to_owned));
        self.published.send_replace(Some(Arc::new(snapshot)));
    }

    async fn event(&mut self) -> client::ManagerEvent {
        tokio::time::timeout(Duration::from_secs(20), self.managers.recv()).await.unwrap().unwrap()
    }

    /// The first event that is none of trouble in coming together.
    async fn cluster(&mut self) -> ClusterState {
        loop {
            match self.event().await {
                client::ManagerEvent::Cluster(id, state) => {
                    assert_eq!(id, "m1");
                    return *state;
                }
                client::ManagerEvent::Gone(..) | client::ManagerEvent::Problem(..) => {}
            }
        }
    }

    /// Why the agent does not hear the manager.
    async fn refusal(mut self) -> String {
        loop {
            if let client::ManagerEvent::Gone(_, reason) = self.event().await
                && !reason.contains("refused")
            {
                assert!(self.agents.try_recv().is_err(), "nothing was said to a stranger");
                return reason;
            }
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.jobs.iter().for_each(JoinHandle::abort);
    }
}

#[tokio::test]
async fn members_of_a_swarm_tell_each_other_what_they_know() {
    let authority = Authority::new();
    let manager = authority.node("c1", tls::MANAGER, "m1");
    let worker = authority.node("c1", tls::WORKER, "w1");
    let mut pair = Pair::start(manager.path(), worker.path());
    let addresses = vec!["192.0.2.2".parse().unwrap()];
    pair.facts.send_replace(Some(NodeFacts { addresses, ..NodeFacts::default() }));
    pair.tell(None, 7000);
    let state = pair.cluster().await;
    assert_eq!((state.tunnel.port, state.this.as_deref()), (7000, Some("w1")));
    let node = loop {
        let event = tokio::time::timeout(Duration::from_secs(20), pair.agents.recv()).await.unwrap();
        if let Some(server::PeerEvent::Facts(node, _, facts)) = event {
            assert_eq!(facts.addresses.len(), 1);
            break node;
        }
    };
    // By its certificate, not by its own word.
    assert_eq!(node, "w1");
    pair.tell(Some("no quorum"), 7000);
    let client::ManagerEvent::Problem(_, problem) = pair.event().await else { panic!() };
    assert_eq!(problem, "no quorum");
    // Nothing has changed but that it is sure again.
    pair.tell(None, 7000);
    assert_eq!(pair.cluster().await.tunnel.port, 7000);
    pair.tell(None, 7001);
    assert_eq!(pair.cluster().await.tunnel.port, 7001);
}

#[tokio::test]
async fn only_a_manager_of_the_same_swarm_is_believed() {
    let (authority, other) = (Authority::new(), Authority::new());
    let worker = authority.node("c1", tls::WORKER, "w1");
    for (what, manager, reason) in [
        ("a worker", authority.node("c1", tls::WORKER, "m1"), "not valid for name"),
        ("another manager", authority.node("c1", tls::MANAGER, "m2"), "not manager m1"),
        ("of another authority", other.node("c1", tls::MANAGER, "m1"), "ertificate"),
        ("of another swarm", authority.node("c2", tls::MANAGER, "m1"), "is of swarm c2"),
    ] {
        let pair = Pair::start(manager.path(), worker.path());
        pair.tell(None, 7000);
        let said = pair.refusal().await;
        assert!(said.contains(reason), "{what}: {said}");
    }
    let manager = authority.node("c1", tls::MANAGER, "m1");
    let locked = authority.node("c1", tls::WORKER, "w1");
    let key = locked.path().join("swarm/certificates/swarm-node.key");
    fs::write(key, "-----BEGIN ENCRYPTED PRIVATE KEY-----\n").unwrap();
    let said = Pair::start(manager.path(), locked.path()).refusal().await;
    assert!(said.contains("autolock"), "{said}");
}

#[tokio::test]
async fn a_stranger_s_agent_is_told_nothing() {
    let (authority, other) = (Authority::new(), Authority::new());
    let manager = authority.node("c1", tls::MANAGER, "m1");
    // It believes the manager, who does not believe it.
    let stranger = other.node("c1", tls::WORKER, "w1");
    let folder = "swarm/certificates/swarm-root-ca.crt";
    fs::copy(manager.path().join(folder), stranger.path().join(folder)).unwrap();
    let pair = Pair::start(manager.path(), stranger.path());
    pair.tell(None, 7000);
    pair.refusal().await;
}
