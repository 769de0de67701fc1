//! Docker: whether it answers, which version it is, this node's part in the swarm, and how old its certificate is.

use std::{fs, path::Path, time::Duration};

use serde::Deserialize;

use super::Findings;
use crate::source::docker::{engine::Engine, model};

/// What was found.
#[derive(Debug, Default)]
pub struct Docker {
    /// Whether it answers.
    pub is_there: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Version {
    version: String,
    api_version: String,
}

/// It answers at once or is said not to.
const PATIENCE: Duration = Duration::from_secs(3);

/// Looks at Docker. Where it is not there, or the cluster comes from a file (`by_file`), that is a note.
pub async fn docker(findings: &mut Findings, by_file: bool) -> Docker {
    const CHECK: &str = "docker";
    let asked = async {
        let engine = Engine::from_environment()?;
        let version: Version = engine.get("/version").await?;
        let info: model::Info = engine.get("/info").await?;
        Ok::<_, crate::source::docker::engine::EngineError>((engine.place(), version, info))
    };
    let (place, version, info) = match tokio::time::timeout(PATIENCE, asked).await {
        Err(_) => {
            findings.error(CHECK, "Docker does not answer within 3 s", "systemctl restart docker");
            return Docker::default();
        }
        Ok(Err(error)) => {
            findings.note(CHECK, error.to_string());
            return Docker::default();
        }
        Ok(Ok(found)) => found,
    };
    let Version { version, api_version } = version;
    let state = info.swarm.local_node_state.as_str();
    let part = match (state, info.swarm.control_available) {
        ("active", true) => "a manager of its swarm",
        ("active", false) => "a worker of its swarm",
        _ => "in no swarm",
    };
    let text = format!("Docker {version} (API {api_version}) at {place}, {part}");
    match state {
        "active" => findings.ok(CHECK, text),
        // The swarm is not where the cluster comes from.
        _ if by_file => findings.note(CHECK, text),
        "locked" => findings.error(CHECK, format!("{text}: it is locked"), "docker swarm unlock"),
        _ => findings.warn(
            CHECK,
            format!("{text}: there is nothing to serve"),
            "docker swarm init, or docker swarm join",
        ),
    }
    if state == "active" {
        certificate(findings, &Path::new(&info.docker_root_dir).join("swarm/certificates/swarm-node.crt"));
    }
    Docker { is_there: true }
}

/// By the node's certificate the agents know each other.
fn certificate(findings: &mut Findings, path: &Path) {
    const CHECK: &str = "certificate";
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) => {
            findings.error(
                CHECK,
                format!("read {}: {error}: the agents of this swarm cannot know this one", path.display()),
                "run it as root; in a container mount Docker's root directory, read-only, at the same path",
            );
            return;
        }
    };
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(&text) else {
        findings.error(
            CHECK,
            format!("{} is no certificate", path.display()),
            "docker swarm ca --rotate on a manager",
        );
        return;
    };
    let Ok(certificate) = pem.parse_x509() else { return };
    match certificate.validity().time_to_expiration() {
        None => findings.error(
            CHECK,
            format!("{} has run out: the agents of this swarm do not talk to this one", path.display()),
            "is the clock right (timedatectl)? Else: docker swarm ca --rotate on a manager",
        ),
        Some(left) => {
            let days = left.whole_hours() / 24;
            findings.ok(
                CHECK,
                format!("this node's certificate is valid for {days} days more, Swarm renews it by itself"),
            );
        }
    }
}
