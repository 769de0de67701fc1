//! Snapshots of what the command line says, so that words change on purpose: `INSTA_UPDATE=always` takes new ones over.

use clap::{Command, CommandFactory as _, Parser as _};

use super::Cli;

/// Every page of help, by the verbs that lead to it.
fn pages(command: &mut Command, path: &str, pages: &mut Vec<(String, String)>) {
    let help = command.render_long_help().to_string();
    pages.push((path.to_owned(), help.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")));
    let shown = |verb: &&mut Command| verb.get_name() != "help" && !verb.is_hide_set();
    for verb in command.get_subcommands_mut().filter(shown) {
        let path = format!("{path}-{}", verb.get_name());
        self::pages(verb, &path, pages);
    }
}

#[test]
fn every_page_of_help() {
    let mut command = Cli::command();
    command.build();
    let mut found = Vec::new();
    pages(&mut command, "help", &mut found);
    assert!(found.len() > 15, "{}", found.len());
    for (path, help) in found {
        insta::assert_snapshot!(path, help);
    }
}

#[test]
fn what_is_said_of_wrong_command_lines() {
    let lines = [
        "attach --iface",
        "attach --iface eth1 --peer-timeout soon",
        "attach --iface eth1 --stale-after 1w",
        "attach --iface eth1 --max-connections 1G",
        "attach --iface eth1 --max-connections 0",
        "attach --iface eth1 --snat-ports 9",
        "attach --iface eth1 --address 0.0.0.0",
        "attach --iface eth1 --source file",
        "attach --iface eth1 --log-level warning",
        "service lst",
        "service ls --quiet --format {{.Name}}",
        "task drain",
    ];
    let said = lines.map(|line| {
        let words = std::iter::once("lb-userspace").chain(line.split_whitespace());
        let error = Cli::try_parse_from(words).expect_err(line);
        format!("$ lb-userspace {line}\n{error}exit code {}\n", error.exit_code())
    });
    insta::assert_snapshot!("wrong-command-lines", said.join("\n"));
}
