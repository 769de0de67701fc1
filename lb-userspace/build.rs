//! Embeds the eBPF object that `cargo xtask` has built in the target folder, or that `LB_EBPF_OBJECT` names.
//!
//! A release without an object, or with one that is older than its sources, is refused: its agent could do nothing.
//! `cargo check`, clippy and debug builds need no BPF toolchain: an empty object is embedded in them then, and the agent
//! says at `attach` how it is built.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Where `cargo xtask` leaves the object, from the target folder.
const OBJECT: &str = "ebpf/bpfel-unknown-none/release/lb-ebpf";

fn main() {
    println!("cargo:rerun-if-env-changed=LB_EBPF_OBJECT");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let found = match env::var_os("LB_EBPF_OBJECT") {
        Some(named) => {
            println!("cargo:rerun-if-changed={}", named.display());
            Ok(PathBuf::from(named))
        }
        None => built(&out),
    };
    let object = match found {
        Ok(path) => {
            fs::read(&path).unwrap_or_else(|error| panic!("read the eBPF object {}: {error}", path.display()))
        }
        Err(_) if env::var("PROFILE").as_deref() != Ok("release") => Vec::new(),
        Err(reason) => {
            // cargo shows these lines, and the rest of a failed build script's output below them.
            println!(
                "cargo::error={reason}; this command builds it, and the agent with it: cargo xtask build"
            );
            return;
        }
    };
    fs::write(out.join("lb-ebpf.o"), object).expect("write to OUT_DIR");
}

/// The object in the target folder, which is one of the folders that `OUT_DIR` lies in.
fn built(out: &Path) -> Result<PathBuf, String> {
    let object = out.ancestors().map(|folder| folder.join(OBJECT)).find(|path| path.is_file());
    let object = object.ok_or("the agent's eBPF object has not been built")?;
    println!("cargo:rerun-if-changed={}", object.display());
    let time = modified(&object).ok_or("the agent's eBPF object cannot be read")?;
    // What it was made of, as cargo has written it down: `object: source source …`.
    let listed = fs::read_to_string(object.with_extension("d")).unwrap_or_default();
    let sources = listed.split_once(": ").map_or("", |(_, sources)| sources).trim().replace("\\ ", "\0");
    for source in
        sources.split(' ').map(|source| source.replace('\0', " ")).filter(|source| !source.is_empty())
    {
        println!("cargo:rerun-if-changed={source}");
        if modified(Path::new(&source)).is_none_or(|changed| changed > time) {
            return Err(format!("the agent's eBPF object is older than {source}"));
        }
    }
    Ok(object)
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}
