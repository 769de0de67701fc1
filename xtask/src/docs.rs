//! `docs`: the book, of the files in `docs`, of README.md and ARCHITECTURE.md, and of pages that are made from the code.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    ebpf,
    run::{exec, root, target},
    toolchain,
};

const MDBOOK: (&str, &str) = ("mdbook", "0.5.4");
/// Files outside the folder that are chapters too, with their names there.
const CHAPTERS: [(&str, &str); 3] = [
    ("README.md", "introduction.md"),
    ("ARCHITECTURE.md", "architecture.md"),
    ("CONTRIBUTING.md", "contributing.md"),
];

/// Builds the book, after its links were checked.
///
/// # Errors
/// A link leads nowhere, or something cannot be built.
pub fn run() -> Result<()> {
    let book = target().join("book");
    let source = book.join("source");
    let _ = fs::remove_dir_all(&source);
    copy(&root().join("docs"), &source)?;
    for (file, chapter) in CHAPTERS {
        let text = fs::read_to_string(root().join(file)).with_context(|| format!("read {file}"))?;
        fs::write(source.join(chapter), as_chapter(&text)).with_context(|| format!("write {chapter}"))?;
    }
    // By the agent as it is now: an older one would tell of older options.
    let agent = ebpf::build_agent()?;
    exec(Command::new(agent).args(["generate", "reference"]).arg(source.join("reference")))?;
    let broken = broken_links(&source)?;
    if !broken.is_empty() {
        bail!("links that lead nowhere:\n{}", broken.join("\n"));
    }
    exec(
        Command::new(toolchain::cargo_tool(MDBOOK, &["--no-default-features"])?)
            .arg("build")
            .arg(&source)
            .args(["--dest-dir".as_ref(), book.join("html").as_os_str()]),
    )?;
    println!("{}", book.join("html/index.html").display());
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to)?;
        } else if entry.path().extension().is_some_and(|extension| extension == "md") {
            let text = fs::read_to_string(entry.path())
                .with_context(|| format!("read {}", entry.path().display()))?;
            fs::write(&to, as_document(&text)).with_context(|| format!("write {}", to.display()))?;
        } else {
            fs::copy(entry.path(), &to).with_context(|| format!("copy {}", to.display()))?;
        }
    }
    Ok(())
}

/// A file of the project's root, with its links as they are from the folder of the book.
fn as_chapter(text: &str) -> String {
    let text = text.replace("](docs/", "](");
    CHAPTERS
        .iter()
        .fold(text, |text, (file, chapter)| text.replace(&format!("]({file}"), &format!("]({chapter}")))
}

/// A file of `docs`, with its links to those of the root.
fn as_document(text: &str) -> String {
    CHAPTERS.iter().fold(text.to_owned(), |text, (file, chapter)| {
        let text = text.replace(&format!("](../../{file}"), &format!("](../{chapter}"));
        text.replace(&format!("](../{file}"), &format!("]({chapter}"))
    })
}

/// The links in a folder's Markdown that lead to no file, or to no heading of it.
fn broken_links(folder: &Path) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    for file in markdown(folder)? {
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        for link in links(&text) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let there =
                if path.is_empty() { file.clone() } else { file.parent().unwrap_or(folder).join(path) };
            let found = match fs::read_to_string(&there) {
                Ok(text) => anchor.is_empty() || anchors(&text).contains(anchor),
                Err(_) => there.exists(),
            };
            if !found {
                broken.push(format!("  {}: {link}", file.strip_prefix(folder).unwrap_or(&file).display()));
            }
        }
    }
    Ok(broken)
}

/// The Markdown files in a folder and those below it.
fn markdown(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(markdown(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            files.push(path);
        }
    }
    Ok(files)
}

/// What the links of a text lead to, but for those to other places.
fn links(text: &str) -> Vec<&str> {
    let rest = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    rest.map(|(link, _)| link).filter(|link| !link.contains("://") && !link.contains(' ')).collect()
}

/// The names by which headings can be linked to.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let name = |heading: &str| {
        let words = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        words.chars().filter(|letter| letter.is_alphanumeric() || matches!(letter, '-' | '_')).collect()
    };
    headings.map(name).collect()
}

#[cfg(test)]
mod tests {
    use clap::{Parser as _, error::ErrorKind};

    use super::*;

    /// Everything that people read, but for the table of contents, which also names what is made from the code.
    fn documents() -> Vec<PathBuf> {
        let mut files = markdown(&root().join("docs")).unwrap();
        files.retain(|path| !path.ends_with("SUMMARY.md"));
        let own = fs::read_dir(root()).unwrap().flatten().map(|entry| entry.path());
        files.extend(own.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
        files
    }

    #[test]
    fn every_link_leads_somewhere() {
        for file in documents() {
            let text = fs::read_to_string(&file).unwrap();
            for link in links(&text) {
                let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
                let there = if path.is_empty() { file.clone() } else { file.parent().unwrap().join(path) };
                assert!(there.exists(), "{}: {link}", file.display());
                if !anchor.is_empty() {
                    let text = fs::read_to_string(there).unwrap();
                    assert!(anchors(&text).contains(anchor), "{}: {link}", file.display());
                }
            }
        }
    }

    #[test]
    fn every_file_is_in_the_table_of_contents() {
        let contents = fs::read_to_string(root().join("docs/SUMMARY.md")).unwrap();
        let folder = root().join("docs");
        for file in markdown(&folder).unwrap().iter().filter(|file| !file.ends_with("SUMMARY.md")) {
            let name = file.strip_prefix(&folder).unwrap().display().to_string();
            assert!(contents.contains(&format!("({name})")), "docs/SUMMARY.md leaves out {name}");
        }
    }

    /// Commands in blocks and in the midst of sentences: each is one that this program takes.
    #[test]
    fn every_command_of_ours_is_one() {
        let mut seen = 0;
        for file in documents().iter().filter(|file| !file.ends_with("CHANGELOG.md")) {
            let text = fs::read_to_string(file).unwrap();
            for command in text.split(['`', '\n']).filter_map(|piece| {
                let piece = piece.trim().trim_start_matches("$ ");
                piece.strip_prefix("cargo xtask ")
            }) {
                let command = command.split([';', '|', '#', '&', '(']).next().unwrap().trim_end_matches('.');
                let words = std::iter::once("xtask").chain(command.split_whitespace());
                let words = words.filter(|word| !matches!(*word, "…" | "[" | "]"));
                // An option may be spoken of without its value.
                let is_option =
                    command.split_whitespace().next_back().is_some_and(|word| word.starts_with("--"));
                if let Err(error) = crate::Cli::try_parse_from(words)
                    && error.kind() != ErrorKind::DisplayHelp
                    && !(is_option && error.kind() == ErrorKind::InvalidValue)
                {
                    panic!("{}: cargo xtask {command}: {error}", file.display());
                }
                seen += 1;
            }
        }
        assert!(seen > 10, "{seen}");
    }

    #[test]
    fn headings_are_named_as_readers_link_to_them() {
        let names = anchors("# One thing\n\n## `detach --all`, and more\n");
        assert_eq!(names, BTreeSet::from(["one-thing".into(), "detach---all-and-more".into()]));
        assert_eq!(links("[a](b.md#c) and [d](https://e.f)"), ["b.md#c"]);
    }
}
