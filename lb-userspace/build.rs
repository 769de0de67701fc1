//! Embeds the eBPF object that `cargo xtask` built and names in `LB_EBPF_OBJECT`.
//!
//! Without it an empty one is embedded, so that `cargo check` and clippy need no BPF toolchain; the agent then
//! says at `attach` how it is built.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LB_EBPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("lb-ebpf.o");
    match env::var_os("LB_EBPF_OBJECT") {
        Some(object) => {
            println!("cargo:rerun-if-changed={}", object.display());
            fs::copy(&object, &out)
                .unwrap_or_else(|error| panic!("copy the eBPF object {}: {error}", object.display()));
        }
        None => fs::write(&out, []).expect("write to OUT_DIR"),
    }
}
