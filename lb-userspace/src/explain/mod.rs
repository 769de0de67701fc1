//! What would become of a packet on this node, and why: the datapath's own answer ([`DryRun`]), told step by step.

mod frame;
mod tell;

use std::net::{IpAddr, SocketAddr};

use lb_common::{conntrack::Phase, outcome::Outcome};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    cluster::Protocol,
    connection::Names,
    datapath::{DatapathError, DryRun, Seen, TableSet, Verdict},
    inventory::Inventory,
    plan::At,
    report::SCHEMA,
};

/// The client's port where nobody has said one.
pub const CLIENT_PORT: u16 = 50_000;

/// Which packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The client.
    pub client: SocketAddr,
    /// Where it sends to, of the same family.
    pub listener: SocketAddr,
    /// Whether it is one of a connection that the client takes for open, though this node may know none.
    pub established: bool,
    /// The node through whose tunnel it comes, and the task that this node has chosen.
    pub through: Option<[String; 2]>,
}

impl Question {
    /// Whether the packet begins a connection of TCP: none is open that the client knows of, as far as anybody has said.
    fn is_syn(&self, known: Option<&Seen>) -> bool {
        let is_open = known.is_some_and(|seen| seen.phase == Phase::Established);
        self.protocol == Protocol::Tcp && !self.established && !is_open
    }

    /// The listener, as in `192.0.2.1:80/tcp`.
    fn at(&self) -> String {
        format!("{}/{}", self.listener, self.protocol)
    }
}

/// One step on the packet's way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Told {
    /// Which.
    pub step: &'static str,
    /// What is decided there, and by what.
    pub text: String,
}

/// What would become of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The interface that it comes in by.
    pub interface: String,
    /// What becomes of it.
    pub verdict: Verdict,
    /// As it would be counted.
    pub outcome: Option<&'static str>,
    /// What that means.
    pub meaning: Option<&'static str>,
    /// The service.
    pub service: Option<String>,
    /// The task.
    pub task: Option<String>,
    /// The task's node.
    pub node: Option<String>,
    /// Step by step.
    pub steps: Vec<Told>,
    /// What to do, or to ask, next.
    pub next: Option<String>,
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// It is about no packet.
    #[error("{0} and {1} are not of one family: no packet goes from one to the other")]
    Families(IpAddr, IpAddr),
    /// It names what is not there.
    #[error("{0}")]
    Unknown(String),
    /// The kernel refuses.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}

/// The answer as a document: of the interface that serves what is asked about; where none does the first one's.
///
/// # Errors
/// Nothing is attached, or those of [`explain`].
pub fn document(attached: &[(Inventory, TableSet)], question: &Question) -> anyhow::Result<Value> {
    let explanation = explain_one(attached, question)?;
    Ok(json!({
        "schema": SCHEMA, "protocol": question.protocol, "client": question.client, "listener": question.listener,
        "explanation": explanation,
    }))
}

/// Asks the interface that serves what is asked about; where none does the first one.
///
/// # Errors
/// Nothing is attached, or those of [`explain`].
pub fn explain_one(attached: &[(Inventory, TableSet)], question: &Question) -> anyhow::Result<Explanation> {
    let Question { protocol, listener, .. } = question;
    let at = At { address: listener.ip(), protocol: *protocol, port: listener.port() };
    let serves = attached.iter().find(|(inventory, _)| inventory.tables.listeners.contains_key(&at));
    let (inventory, set) = serves.or(attached.first()).ok_or(DatapathError::NotAttached(None))?;
    Ok(explain(inventory, set, question)?)
}

/// Asks the datapath of an interface.
///
/// # Errors
/// The question is about no packet, or the kernel refuses.
pub fn explain(
    inventory: &Inventory,
    set: &TableSet,
    question: &Question,
) -> Result<Explanation, ExplainError> {
    let (client, listener) = (question.client, question.listener);
    if client.is_ipv4() != listener.is_ipv4() {
        return Err(ExplainError::Families(client.ip(), listener.ip()));
    }
    let config = set.config()?;
    let names = Names::of(inventory, config, &[]);
    let run = DryRun::new(set, &inventory.tables, question.protocol, (client, listener))?;
    let known = run.connection()?;
    let frame = match &question.through {
        None => frame::plain(&config, question, known.as_ref()),
        Some([node, task]) => {
            let sender = frame::sender(inventory, set, &names, question, [node, task])?;
            frame::tunnelled(&config, question, known.as_ref(), &sender)
        }
    };
    let ran = run.run(&frame)?;
    let mut teller = tell::Teller::new(inventory, &names, question, (&ran, &config));
    teller.tell(set, &config)?;
    let entry = teller.entry();
    Ok(Explanation {
        interface: inventory.interface.clone(),
        verdict: ran.verdict,
        outcome: ran.outcome.map(Outcome::name),
        meaning: ran.outcome.map(Outcome::help),
        service: teller.service().map(|label| label.name.clone()),
        task: entry.map(|entry| entry.label.task.clone()),
        node: entry.map(|entry| names.node(&entry.label.node).to_owned()),
        next: teller.next(),
        steps: teller.steps,
    })
}
