//! The Engine API's answers, as far as they are read. States and kinds stay text: a word that nobody knew yet must
//! not lose the whole answer.

use std::{collections::BTreeMap, time::SystemTime};

use serde::{Deserialize, Deserializer, de::DeserializeOwned};

/// `null` is as good as nothing.
fn nullable<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SystemTime>, D::Error> {
    let text: Option<String> = Option::deserialize(from)?;
    Ok(text.and_then(|text| humantime::parse_rfc3339(&text).ok()))
}

/// Of `GET /info`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Info {
    /// What the engine knows of the swarm.
    #[serde(deserialize_with = "nullable")]
    pub swarm: Swarm,
    /// Where the engine keeps its state.
    pub docker_root_dir: String,
}

/// The swarm as `GET /info` has it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Swarm {
    /// This node.
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// The address it advertises.
    pub node_addr: String,
    /// `active`, `inactive`, `pending`, `locked`, `error`.
    pub local_node_state: String,
    /// Whether it is a manager.
    pub control_available: bool,
    /// What is wrong.
    pub error: String,
    /// The managers.
    #[serde(deserialize_with = "nullable")]
    pub remote_managers: Vec<RemoteManager>,
}

/// A manager.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RemoteManager {
    /// Its node.
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// Where its raft listens.
    pub addr: String,
}

/// Of `GET /nodes`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Node {
    /// Identifier.
    #[serde(rename = "ID")]
    pub id: String,
    /// When it changed last.
    #[serde(deserialize_with = "time")]
    pub updated_at: Option<SystemTime>,
    /// What was said of it.
    #[serde(deserialize_with = "nullable")]
    pub spec: NodeSpec,
    /// What it said of itself.
    #[serde(deserialize_with = "nullable")]
    pub description: NodeDescription,
    /// How it is.
    #[serde(deserialize_with = "nullable")]
    pub status: NodeStatus,
    /// Its part as a manager.
    #[serde(deserialize_with = "nullable")]
    pub manager_status: ManagerStatus,
}

/// What was said of a node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeSpec {
    /// Labels.
    #[serde(deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
}

/// What a node said of itself.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeDescription {
    /// Host name; not unique.
    pub hostname: String,
}

/// How a node is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeStatus {
    /// `ready`, `down`, `unknown`, `disconnected`.
    pub state: String,
    /// Address that it was seen with; may be useless (moby#30119).
    pub addr: String,
}

/// A node's part as a manager.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ManagerStatus {
    /// Address and port of its raft.
    pub addr: String,
}

/// Of `GET /services`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Service {
    /// Identifier.
    #[serde(rename = "ID")]
    pub id: String,
    /// When it changed last.
    #[serde(deserialize_with = "time")]
    pub updated_at: Option<SystemTime>,
    /// What was asked for.
    #[serde(deserialize_with = "nullable")]
    pub spec: ServiceSpec,
    /// What came of it.
    #[serde(deserialize_with = "nullable")]
    pub endpoint: Endpoint,
}

/// What was asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ServiceSpec {
    /// Name.
    pub name: String,
    /// Labels.
    #[serde(deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
}

/// Published ports.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Endpoint {
    /// The ports, with numbers where the service asked for any.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<Port>,
}

/// A published port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Port {
    /// `tcp`, `udp`, `sctp`.
    pub protocol: String,
    /// The port tasks listen on.
    pub target_port: u16,
    /// The port clients use.
    pub published_port: u16,
    /// `ingress` or `host`.
    pub publish_mode: String,
}

/// Of `GET /tasks`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Task {
    /// Identifier.
    #[serde(rename = "ID")]
    pub id: String,
    /// When it changed last.
    #[serde(deserialize_with = "time")]
    pub updated_at: Option<SystemTime>,
    /// Its service.
    #[serde(rename = "ServiceID")]
    pub service_id: String,
    /// Its number in a replicated service.
    pub slot: u64,
    /// Its node.
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// What it does.
    #[serde(deserialize_with = "nullable")]
    pub status: TaskStatus,
    /// What it should do.
    pub desired_state: String,
    /// Its addresses.
    #[serde(deserialize_with = "nullable")]
    pub networks_attachments: Vec<Attachment>,
}

/// What a task does.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskStatus {
    /// `running` and many others.
    pub state: String,
}

/// A task's place on a network.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Attachment {
    /// The network.
    #[serde(deserialize_with = "nullable")]
    pub network: AttachedNetwork,
    /// Addresses with the length of their prefix.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<String>,
}

/// A network of a task.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AttachedNetwork {
    /// What was asked for.
    #[serde(deserialize_with = "nullable")]
    pub spec: NetworkSpec,
}

/// What a network was asked to be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NetworkSpec {
    /// Whether it is the routing mesh's.
    pub ingress: bool,
}

/// Of `GET /containers/json`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Container {
    /// Labels.
    #[serde(deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// `running`, `paused`, …
    pub state: String,
    /// For people; the only place in the list that says `(unhealthy)`.
    pub status: String,
    /// Its networks.
    #[serde(deserialize_with = "nullable")]
    pub network_settings: NetworkSettings,
}

/// A container's networks.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NetworkSettings {
    /// By name.
    #[serde(deserialize_with = "nullable")]
    pub networks: BTreeMap<String, ContainerNetwork>,
}

/// A container's place on a network.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ContainerNetwork {
    /// The network.
    #[serde(rename = "NetworkID")]
    pub network_id: String,
    /// Its IPv4 address, empty for none.
    #[serde(rename = "IPAddress")]
    pub ip_address: String,
}

/// Of `GET /networks/ingress?verbose=true`: what the nodes tell each other.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Gossip {
    /// Services of the routing mesh, by name.
    #[serde(deserialize_with = "nullable")]
    pub services: BTreeMap<String, GossipService>,
    /// The nodes that are heard.
    #[serde(deserialize_with = "nullable")]
    pub peers: Vec<GossipPeer>,
}

/// A node that is heard.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct GossipPeer {
    /// Its address.
    #[serde(rename = "IP")]
    pub ip: String,
}

/// A service of the routing mesh.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct GossipService {
    /// Its tasks.
    #[serde(deserialize_with = "nullable")]
    pub tasks: Vec<GossipTask>,
}

/// A task that the mesh sends connections to.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct GossipTask {
    /// `web.1.` and its identifier.
    pub name: String,
    /// What else is known.
    #[serde(deserialize_with = "nullable")]
    pub info: BTreeMap<String, String>,
}

/// Of `GET /networks`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Network {
    /// Identifier.
    pub id: String,
    /// Whether it is the routing mesh's.
    pub ingress: bool,
}
