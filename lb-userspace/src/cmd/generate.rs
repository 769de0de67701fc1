//! `generate`: files made from the code, for packages and for the documentation.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};
use clap::Command;
use clap_complete::Shell;
use lb_common::outcome::Outcome;

use crate::{cli::Artifact, settings};

const PROGRAM: &str = "lb-userspace";

/// Writes what was asked for into a folder.
///
/// # Errors
/// The folder cannot be written to.
pub fn run(artifact: Artifact, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    match artifact {
        Artifact::Man => man(folder),
        Artifact::Completions => completions(folder),
        Artifact::Reference => reference(folder),
    }
}

fn write(path: &Path, text: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// A page for the program and one for each verb, of section 8: commands for administrators.
fn man(folder: &Path) -> Result<()> {
    let mut command = settings::command().name(PROGRAM).mut_subcommands(|verb| verb.version(""));
    command.build();
    pages(&command, PROGRAM, folder)
}

fn pages(command: &Command, name: &str, folder: &Path) -> Result<()> {
    let name_of_page: &'static str = Box::leak(name.to_owned().into_boxed_str());
    let page = clap_mangen::Man::new(command.clone().name(name_of_page)).section("8").manual(PROGRAM);
    let mut text = Vec::new();
    page.render(&mut text).with_context(|| format!("render the page of {name}"))?;
    write(&folder.join(format!("{name}.8")), text)?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        pages(verb, &format!("{name}-{}", verb.get_name()), folder)?;
    }
    Ok(())
}

/// A script for each shell, by the names under which the shells look for them.
fn completions(folder: &Path) -> Result<()> {
    for (shell, file) in [
        (Shell::Bash, PROGRAM.to_owned()),
        (Shell::Zsh, format!("_{PROGRAM}")),
        (Shell::Fish, format!("{PROGRAM}.fish")),
    ] {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut settings::command(), PROGRAM, &mut text);
        let folder = folder.join(shell.to_string());
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        write(&folder.join(file), text)?;
    }
    Ok(())
}

/// The pages of the book that say what the code says.
fn reference(folder: &Path) -> Result<()> {
    write(&folder.join("cli.md"), cli_page())?;
    write(&folder.join("options.md"), options_page())?;
    write(&folder.join("outcomes.md"), outcomes_page())
}

fn cli_page() -> String {
    let mut text = String::from("# Command line\n\nThe same as `lb-userspace VERB --help`.\n");
    let mut command = settings::command().name(PROGRAM).term_width(100);
    command.build();
    verb_section(&mut command, PROGRAM, &mut text);
    text
}

fn verb_section(command: &mut Command, name: &str, text: &mut String) {
    let help = command.render_long_help().to_string();
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    let _ = write!(text, "\n## {name}\n\n```text\n{}\n```\n", lines.join("\n").trim_end());
    for verb in command.get_subcommands_mut() {
        if !verb.is_hide_set() && verb.get_name() != "help" {
            let name = format!("{name} {}", verb.get_name());
            verb_section(verb, &name, text);
        }
    }
}

fn options_page() -> String {
    let mut text = String::from(
        "# Options of the agent\n\nEach can stand on the command line, in the environment, or in \
         `/etc/lb-userspace/agent.toml`; the first of these that has it counts.\n\n\
         | option | environment | meaning | default |\n|---|---|---|---|\n",
    );
    for option in settings::options() {
        let long = option.get_long().unwrap_or_default();
        let help = option.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
        let (help, told) = match help.split_once(" [default: ") {
            Some((help, default)) => (help.to_owned(), default.trim_end_matches(']').to_owned()),
            None => (help, String::new()),
        };
        let values: Vec<_> =
            option.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default = if values.is_empty() { told } else { values.join(" ") };
        let names: Vec<String> =
            option.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
        let help = if names.is_empty() || !option.get_action().takes_values() {
            help
        } else {
            format!("{help}: {}", names.join(", "))
        };
        let _ = writeln!(text, "| `{long}` | `{}` | {help} | {default} |", settings::variable(long));
    }
    text
}

fn outcomes_page() -> String {
    let mut text = String::from(
        "# Outcomes of packets\n\nEvery packet that comes by an interface of ours is counted under one of these names, in \
         `lb-userspace stats` and everywhere else.\n\n| outcome | meaning |\n|---|---|\n",
    );
    for outcome in Outcome::ALL {
        let _ = writeln!(text, "| `{}` | {} |", outcome.name(), outcome.help().replace('|', "\\|"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_and_every_outcome_is_in_the_reference() {
        let folder = tempfile::tempdir().unwrap();
        run(Artifact::Reference, folder.path()).unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        let (cli, options, outcomes) = (read("cli.md"), read("options.md"), read("outcomes.md"));
        assert!(cli.contains("## lb-userspace service ps\n") && cli.contains("Exit codes:"), "{cli}");
        assert!(options.contains("| `peer-timeout` | `LB_PEER_TIMEOUT` | "), "{options}");
        assert!(options.contains(" | 3s |"), "{options}");
        assert!(Outcome::ALL.iter().all(|outcome| outcomes.contains(&format!("| `{}` | ", outcome.name()))));
    }

    #[test]
    fn every_verb_has_a_page_and_every_shell_its_file() {
        let folder = tempfile::tempdir().unwrap();
        run(Artifact::Man, folder.path()).unwrap();
        for page in ["lb-userspace", "lb-userspace-attach", "lb-userspace-service-ps"] {
            let text = fs::read_to_string(folder.path().join(format!("{page}.8"))).unwrap();
            assert!(text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"), "{page}: {text}");
        }
        run(Artifact::Completions, folder.path()).unwrap();
        for file in ["bash/lb-userspace", "zsh/_lb-userspace", "fish/lb-userspace.fish"] {
            let text = fs::read_to_string(folder.path().join(file)).unwrap();
            assert!(text.contains("peer-timeout"), "{file}");
        }
    }
}
