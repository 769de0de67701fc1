//! `image`: the agent as a container image.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    ebpf,
    run::{exec, root, target},
};

/// Builds the agent, and an image of it by the Docker that is at hand.
pub fn run() -> Result<()> {
    let agent = ebpf::build_agent()?;
    // A folder of its own: everything in it is sent to Docker.
    let folder = target().join("image");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    fs::copy(agent, folder.join("lb-userspace")).context("copy the agent")?;
    let recipe = root().join("packaging/Dockerfile");
    exec(Command::new("docker").args(["build", "-t", "lb-userspace:latest", "-f"]).arg(recipe).arg(folder))
}
