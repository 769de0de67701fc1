//! What the documentation says is what the program takes: command lines, options in files, cluster files.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use lb_userspace::{cmd::keygen, settings, source::file};

fn documents() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the project");
    let mut found = Vec::new();
    let mut folders = vec![root.join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("read a folder").flatten() {
            if entry.path().is_dir() { folders.push(entry.path()) } else { found.push(entry.path()) }
        }
    }
    found.push(root.join("README.md"));
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    found.into_iter().map(|path| (path.clone(), fs::read_to_string(path).expect("read a document"))).collect()
}

/// The fenced blocks of a kind.
fn blocks<'a>(text: &'a str, kind: &str) -> Vec<&'a str> {
    let start = format!("```{kind}\n");
    text.split(&start).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}

#[test]
fn every_command_line_is_one_that_is_understood() {
    let mut seen = 0;
    for (path, text) in documents() {
        for line in blocks(&text, "console").iter().flat_map(|block| block.lines()) {
            let line = line.trim().trim_start_matches("$ ").trim_start_matches("sudo ");
            let Some(rest) = line.strip_prefix("lb-userspace ").or(line.strip_prefix("lb ")) else {
                continue;
            };
            let rest = rest.split(['|', '#', '>', '&']).next().unwrap_or_default();
            let words = std::iter::once("lb-userspace").chain(rest.split_whitespace()).map(OsString::from);
            if let Err(error) = settings::parse(words) {
                panic!("{}: {line}: {error}", path.display());
            }
            seen += 1;
        }
    }
    assert!(seen >= 10, "{seen}");
}

#[test]
fn every_file_is_one_that_is_understood() {
    let folder = tempfile::tempdir().expect("make a folder");
    // The key that cluster files name.
    keygen::run(Some(&folder.path().join("tunnel.key"))).expect("make a key");
    let (mut clusters, mut options) = (0, 0);
    for (path, text) in documents() {
        for block in blocks(&text, "toml") {
            let file = folder.path().join("cluster.toml");
            fs::write(&file, block).expect("write a file");
            if let Err(error) = file::read(&file) {
                panic!("{}: {error}", path.display());
            }
            clusters += 1;
        }
        for block in blocks(&text, "toml agent") {
            let file = folder.path().join("agent.toml");
            fs::write(&file, block).expect("write a file");
            let words = ["lb-userspace", "attach", "--config"].map(OsString::from);
            if let Err(error) = settings::parse(words.into_iter().chain([file.into()])) {
                panic!("{}: {error}", path.display());
            }
            options += 1;
        }
    }
    assert!(clusters > 0 && options > 0);
}
