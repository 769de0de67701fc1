//! `sbom`: what the agent is made of, by `Cargo.lock` and what the crates say of themselves.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::run::{cargo, output, root, target};

/// The program that is described.
const AGENT: &str = "lb-userspace";
/// And the crate of its eBPF object.
const OBJECT: &str = "lb-ebpf";

/// Writes it.
pub fn run() -> Result<()> {
    let metadata = output(cargo().args([
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("read cargo's metadata")?;
    let lock = fs::read_to_string(root().join("Cargo.lock")).context("read Cargo.lock")?;
    let document = document(&metadata, &checksums(&lock)).context("cargo's metadata has not the agent")?;
    let path = target().join("lb-userspace.cdx.json");
    fs::write(&path, format!("{document:#}\n")).with_context(|| format!("write {}", path.display()))?;
    let count = document["components"].as_array().map_or(0, Vec::len);
    println!("{}: {count} crates", path.display());
    Ok(())
}

/// The bill of materials (CycloneDX 1.5).
fn document(metadata: &Value, checksums: &BTreeMap<(String, String), String>) -> Option<Value> {
    let packages: BTreeMap<&str, &Value> = metadata["packages"]
        .as_array()?
        .iter()
        .filter_map(|package| Some((package["id"].as_str()?, package)))
        .collect();
    let graph = dependencies(metadata)?;
    let agent = packages.iter().find(|(_, package)| package["name"] == AGENT).map(|(id, _)| *id)?;
    // The agent carries the object in it.
    let object = packages.iter().find(|(_, package)| package["name"] == OBJECT).map(|(id, _)| *id);
    let mut used: BTreeSet<&str> = [agent].into_iter().chain(object).collect();
    let mut next: Vec<&str> = used.iter().copied().collect();
    while let Some(id) = next.pop() {
        next.extend(graph.get(id)?.iter().filter(|id| used.insert(**id)));
    }
    let component = |id: &str| component(packages.get(id)?, checksums);
    let components: Option<Vec<Value>> =
        used.iter().filter(|id| **id != agent).map(|id| component(id)).collect();
    let reference = |id: &&str| packages.get(id).map(|package| purl(package));
    let dependencies: Vec<Value> = used
        .iter()
        .map(|id| {
            let on: Vec<String> = graph.get(id).into_iter().flatten().filter_map(reference).collect();
            json!({ "ref": reference(id), "dependsOn": on })
        })
        .collect();
    Some(json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": { "component": component(agent)? },
        "components": components?, "dependencies": dependencies,
    }))
}

/// What each package is built from or with; what only its tests need is not part of it.
fn dependencies(metadata: &Value) -> Option<BTreeMap<&str, Vec<&str>>> {
    let nodes = metadata["resolve"]["nodes"].as_array()?;
    let shipped = |dependency: &&Value| {
        dependency["dep_kinds"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"] != "dev"))
    };
    let node = |node| -> Option<(&str, Vec<&str>)> {
        let of: &Value = node;
        let on = of["deps"].as_array()?.iter().filter(shipped).filter_map(|on| on["pkg"].as_str());
        Some((of["id"].as_str()?, on.collect()))
    };
    nodes.iter().map(node).collect()
}

fn component(package: &Value, checksums: &BTreeMap<(String, String), String>) -> Option<Value> {
    let (name, version) = (package["name"].as_str()?, package["version"].as_str()?);
    let mut component = json!({
        "type": if name == AGENT { "application" } else { "library" },
        "bom-ref": purl(package), "name": name, "version": version, "purl": purl(package),
    });
    if let Some(license) = package["license"].as_str() {
        // Slashes are how licences were joined before SPDX.
        component["licenses"] = json!([{ "expression": license.replace('/', " OR ") }]);
    }
    if let Some(checksum) = checksums.get(&(name.to_owned(), version.to_owned())) {
        component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
    }
    Some(component)
}

fn purl(package: &Value) -> String {
    format!(
        "pkg:cargo/{}@{}",
        package["name"].as_str().unwrap_or_default(),
        package["version"].as_str().unwrap_or_default()
    )
}

/// The checksums of crates by name and version, as `Cargo.lock` has them.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let field = |package: &str, name: &str| -> Option<String> {
        let line = package
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \"")?.strip_suffix('"'));
        line.map(str::to_owned)
    };
    let package =
        |package| Some(((field(package, "name")?, field(package, "version")?), field(package, "checksum")?));
    lock.split("[[package]]").filter_map(package).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shipped_is_listed_with_its_checksum_and_licence() {
        let lock = "[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nsource = \"x\"\nchecksum = \"00ff\"\n\n[[package]]\nname = \"b\"\n\
                    version = \"2.0.0\"\n";
        let package = |name: &str, version: &str, license: &str| json!({"id": name, "name": name, "version": version, "license": license});
        let on = |name: &str, kind: Value| json!({"pkg": name, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [package(AGENT, "0.1.0", "MIT"), package("a", "1.0.0", "MIT/Apache-2.0"), package("t", "3.0.0", "MIT")],
            "resolve": {"nodes": [
                {"id": AGENT, "deps": [on("a", Value::Null), on("t", json!("dev"))]}, {"id": "a", "deps": []}, {"id": "t", "deps": []},
            ]},
        });
        let document = document(&metadata, &checksums(lock)).unwrap();
        let components = document["components"].as_array().unwrap();
        assert_eq!(components.len(), 1);
        assert_eq!(components[0]["purl"], "pkg:cargo/a@1.0.0");
        assert_eq!(components[0]["hashes"][0]["content"], "00ff");
        assert_eq!(components[0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(document["dependencies"][1]["dependsOn"], json!(["pkg:cargo/a@1.0.0"]));
        assert_eq!(document["metadata"]["component"]["name"], AGENT);
    }
}
