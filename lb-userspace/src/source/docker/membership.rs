//! This node's part in the swarm, as its own Docker has it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::de::IgnoredAny;
use tokio::sync::mpsc;

use super::{
    engine::Engine,
    model::{Info, RemoteManager},
};

/// Between two looks: nobody tells a worker that it was promoted.
const LOOK: Duration = Duration::from_secs(1);
/// Between two whole answers. Docker starts other programs for each, so that they are not asked for each time.
const WHOLE: Duration = Duration::from_secs(5);

/// A node's part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It is part of a swarm.
    Member(Member),
    /// It is part of none, for sure.
    Outside,
    /// Nobody can say, and why.
    Unknown(String),
}

impl Membership {
    /// The part, if it has one.
    pub fn member(&self) -> Option<&Member> {
        match self {
            Self::Member(member) => Some(member),
            _ => None,
        }
    }
}

/// A node that is part of a swarm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its identifier.
    pub node: String,
    /// Whether it manages.
    pub manager: bool,
    /// Docker's root directory, with the node's certificates.
    pub root: PathBuf,
    managers: Vec<RemoteManager>,
}

impl Member {
    /// The other managers, and where their agents listen.
    pub fn other_managers(&self, port: u16) -> Vec<(String, SocketAddr)> {
        let others = self.managers.iter().filter(|manager| manager.node_id != self.node);
        others
            .filter_map(|manager| {
                let at: SocketAddr = manager.addr.parse().ok()?;
                Some((manager.node_id.clone(), SocketAddr::new(at.ip(), port)))
            })
            .collect()
    }
}

pub(super) fn of(info: Info) -> Membership {
    let swarm = info.swarm;
    match swarm.local_node_state.as_str() {
        "active" if !swarm.node_id.is_empty() => {
            let mut managers = swarm.remote_managers;
            managers.sort_by(|a, b| a.node_id.cmp(&b.node_id));
            Membership::Member(Member {
                node: swarm.node_id,
                manager: swarm.control_available,
                root: Path::new(&info.docker_root_dir).to_owned(),
                managers,
            })
        }
        "inactive" => Membership::Outside,
        "locked" => {
            Membership::Unknown("this node of the swarm is locked; `docker swarm unlock` opens it".into())
        }
        state if swarm.error.is_empty() => {
            Membership::Unknown(format!("this node's part in the swarm is {state}"))
        }
        state => Membership::Unknown(format!("this node's part in the swarm is {state}: {}", swarm.error)),
    }
}

/// Follows this node's part until the receiver is gone.
pub fn follow(engine: Engine) -> mpsc::Receiver<Membership> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut last: Option<Membership> = None;
        // What the engine answered to a question that only managers answer, and when it was asked for the whole.
        let mut before: Option<(Option<String>, Instant)> = None;
        while !sender.is_closed() {
            let manages = match engine.get::<IgnoredAny>("/swarm").await {
                Ok(_) => None,
                Err(error) => Some(error.to_string()),
            };
            let same = before.as_ref().is_some_and(|(said, at)| *said == manages && at.elapsed() < WHOLE);
            let settled = matches!(last, Some(Membership::Member(_) | Membership::Outside));
            if !same || !settled {
                before = Some((manages, Instant::now()));
                let now = match engine.get::<Info>("/info").await {
                    Ok(info) => of(info),
                    Err(error) => Membership::Unknown(error.to_string()),
                };
                if last.as_ref() != Some(&now) {
                    last = Some(now.clone());
                    if sender.send(now).await.is_err() {
                        return;
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(swarm: &str) -> Membership {
        of(serde_json::from_str(&format!(r#"{{"DockerRootDir": "/var/lib/docker", "Swarm": {swarm}}}"#))
            .unwrap())
    }

    #[test]
    fn a_part_is_read_as_docker_says_it() {
        let managers =
            r#"[{"NodeID": "m2", "Addr": "192.0.2.2:2377"}, {"NodeID": "m1", "Addr": "[2001:db8::1]:2377"}]"#;
        let swarm = format!(
            r#"{{"NodeID": "m1", "LocalNodeState": "active", "ControlAvailable": true, "RemoteManagers": {managers}}}"#
        );
        let member = parse(&swarm).member().cloned().unwrap();
        assert!(member.manager);
        assert_eq!(member.root, Path::new("/var/lib/docker"));
        assert_eq!(member.other_managers(6081), [("m2".to_owned(), "192.0.2.2:6081".parse().unwrap())]);
        assert_eq!(parse(r#"{"LocalNodeState": "inactive", "RemoteManagers": null}"#), Membership::Outside);
        let Membership::Unknown(reason) = parse(r#"{"LocalNodeState": "locked"}"#) else { panic!() };
        assert!(reason.contains("docker swarm unlock"), "{reason}");
        let Membership::Unknown(reason) = parse(r#"{"LocalNodeState": "error", "Error": "no CA"}"#) else {
            panic!()
        };
        assert!(reason.contains("no CA"), "{reason}");
    }
}
