//! Where the options of `attach` come from: the command line, else the environment, else a file; by the same names in all
//! three, and read by the same rules.
//!
//! `--peer-timeout 2s` is `LB_PEER_TIMEOUT=2s` in the environment and `peer-timeout = "2s"` in the file. The file's values
//! are put on the command line as far as nothing else says them, so that a value is checked in one place, and an option
//! that is new is known everywhere at once.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
};

use clap::{
    ArgAction, ArgMatches, Command, CommandFactory as _, FromArgMatches as _, error::ErrorKind,
    parser::ValueSource,
};

use crate::cli::Cli;

/// The file that is read where none is named.
pub const FILE: &str = "/etc/lb-userspace/agent.toml";
/// The verb whose options may come from elsewhere.
const VERB: &str = "attach";
/// The option that names the file.
const CONFIG: &str = "config";
/// And the one that serves nothing: it is for the command line alone.
const PRINT: &str = "print";

/// Reads the command line, the environment and the file.
///
/// # Errors
/// As clap has them: what is wrong, where it stands, and what may stand there.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    // What is wrong with the command line is said below, when all that belongs to it is there.
    if let Ok(matches) = command().ignore_errors(true).try_get_matches_from(&arguments)
        && let Some((VERB, given)) = matches.subcommand()
        && let Some((path, text)) = file(given)?
    {
        let more = from_file(&path, &text, given)?;
        // Before the end of the options, if the user gave one.
        let end = arguments.iter().position(|word| word == "--").unwrap_or(arguments.len());
        arguments.splice(end..end, more);
    }
    let matches = command().try_get_matches_from(arguments)?;
    Cli::from_arg_matches(&matches)
}

/// The command line, each option of `attach` with the variable that stands for it.
pub fn command() -> Command {
    Cli::command().mut_subcommand(VERB, |verb| {
        verb.mut_args(|arg| {
            let hidden = arg.is_hide_set();
            let Some(long) =
                arg.get_long().filter(|long| !hidden && !matches!(*long, "help" | "version" | PRINT))
            else {
                return arg;
            };
            // clap wants names that live as long as the program; they are made once or twice in its life.
            let name: &'static str = Box::leak(variable(long).into_boxed_str());
            // One that is empty, as a template leaves it, says nothing.
            match std::env::var_os(name).is_some_and(|value| value.is_empty()) {
                true => arg,
                false => arg.env(name).hide_env(true),
            }
        })
    })
}

/// The variable of an option: `LB_PEER_TIMEOUT` of `peer-timeout`.
pub fn variable(long: &str) -> String {
    format!("LB_{}", long.replace('-', "_").to_uppercase())
}

/// The options that may stand in the file and in the environment: their names, and whether each takes a value.
pub fn options() -> Vec<clap::Arg> {
    let command = Cli::command();
    let verb = command.find_subcommand(VERB);
    let all = verb.into_iter().flat_map(Command::get_arguments);
    all.filter(|arg| {
        !arg.is_hide_set()
            && arg.get_long().is_some_and(|long| !matches!(long, "help" | "version" | CONFIG | PRINT))
    })
    .cloned()
    .collect()
}

/// The file and its text; none where none is named and the usual one is not there.
fn file(given: &ArgMatches) -> Result<Option<(PathBuf, String)>, clap::Error> {
    let named = given.try_get_one::<PathBuf>(CONFIG).ok().flatten().cloned();
    let path = named.clone().unwrap_or_else(|| FILE.into());
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some((path, text))),
        Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => Ok(None),
        Err(error) => Err(wrong(&format!("cannot read {}: {error}", path.display()))),
    }
}

/// What a file says, as words of the command line: what that and the environment do not say.
fn from_file(path: &Path, text: &str, given: &ArgMatches) -> Result<Vec<OsString>, clap::Error> {
    let table: toml::Table =
        text.parse().map_err(|error| wrong(format!("{}: {error}", path.display()).trim_end()))?;
    let options = options();
    let (mut words, mut alone) = (Vec::new(), vec![OsString::from("lb-userspace"), VERB.into()]);
    for (key, value) in &table {
        let place = format!("{}:{}: {key}", path.display(), line(text, key));
        let Some(option) = options.iter().find(|arg| arg.get_long() == Some(key.as_str())) else {
            return Err(wrong(&unknown(&place, key, &options)));
        };
        let said = said(option, key, value).map_err(|reason| wrong(&format!("{place}: {reason}")))?;
        alone.extend(said.iter().cloned());
        let source = given.value_source(option.get_id().as_str());
        if !matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            words.extend(said);
        }
    }
    // By itself, so that what is wrong in it is said of the file.
    match Cli::command().try_get_matches_from(alone) {
        Err(error) if matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) => {
            let text = error.to_string();
            let text = text.trim_start_matches("error: ").split("\n\nFor more").next().unwrap_or_default();
            Err(wrong(&format!("{}: {text}", path.display())))
        }
        _ => Ok(words),
    }
}

/// A key and its value as words of the command line.
fn said(option: &clap::Arg, key: &str, value: &toml::Value) -> Result<Vec<OsString>, String> {
    use toml::Value::{Array, Boolean, Integer, String};
    let flag = matches!(option.get_action(), ArgAction::SetTrue);
    let word = |value: &toml::Value| match value {
        String(text) => Ok(text.clone()),
        Integer(number) => Ok(number.to_string()),
        _ => Err(format!("a text or a number is wanted, as in {key} = \"…\"")),
    };
    let pair = |value: std::string::String| OsString::from(format!("--{key}={value}"));
    match value {
        Boolean(true) if flag => Ok(vec![format!("--{key}").into()]),
        Boolean(false) if flag => Ok(Vec::new()),
        _ if flag => Err("true or false is wanted".into()),
        // Something else would stand in for it.
        Array(values) if values.is_empty() && !option.get_default_values().is_empty() => {
            Err("one value at least is wanted, or leave it out".into())
        }
        Array(values) if matches!(option.get_action(), ArgAction::Append) => {
            values.iter().map(|value| word(value).map(pair)).collect()
        }
        value => Ok(vec![pair(word(value)?)]),
    }
}

fn unknown(place: &str, key: &str, options: &[clap::Arg]) -> String {
    let names: Vec<&str> = options.iter().filter_map(clap::Arg::get_long).collect();
    let meant = key.replace('_', "-");
    match names.iter().find(|name| **name == meant) {
        Some(name) => format!("{place} is no option; did you mean {name}?"),
        None => format!("{place} is no option; there are {}", names.join(", ")),
    }
}

/// The line that a key stands in.
fn line(text: &str, key: &str) -> usize {
    let is_key = |line: &str| {
        let name = line.split('=').next().unwrap_or_default().trim().trim_matches(['"', '\'']);
        line.contains('=') && name == key
    };
    text.lines().position(is_key).map_or(1, |index| index + 1)
}

fn wrong(message: &str) -> clap::Error {
    Cli::command().error(ErrorKind::ValueValidation, message)
}

/// The program as it is installed by now. The kernel marks the file that runs when another has been put in its place.
pub fn program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let name = path.to_string_lossy();
    Ok(name.strip_suffix(REPLACED).map_or_else(|| path.clone(), PathBuf::from))
}

/// Whether another program has been installed since this one started.
pub fn is_replaced() -> bool {
    std::env::current_exe().is_ok_and(|path| path.to_string_lossy().ends_with(REPLACED))
}

const REPLACED: &str = " (deleted)";

/// Whether a variable of the environment is one of ours that no option has: a misspelt one would say nothing.
pub fn misspelt(variables: impl IntoIterator<Item = OsString>) -> Vec<String> {
    /// What is no option of `attach`: for tests alone.
    const OTHERS: [&str; 7] =
        ["LB_AGENT", "LB_CONFIG", "LB_FAULT", "LB_KERNEL_LACKS", "LB_OBJECT", "LB_PATIENCE", "LB_TEST"];
    let known: Vec<String> = options().iter().filter_map(clap::Arg::get_long).map(variable).collect();
    let ours = |name: &OsStr| name.to_str().filter(|name| name.starts_with("LB_")).map(str::to_owned);
    let ours = variables.into_iter().filter_map(|name| ours(&name));
    ours.filter(|name| !known.contains(name) && !OTHERS.contains(&name.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Attach};

    fn attach(arguments: &[&str], file: &str) -> Result<Attach, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.toml");
        fs::write(&path, file).unwrap();
        let config = format!("--config={}", path.display());
        let all =
            ["lb-userspace", VERB, &config].into_iter().chain(arguments.iter().copied()).map(OsString::from);
        match parse(all).map_err(|error| error.to_string())?.command {
            cli::Command::Attach(attach) => Ok(attach),
            _ => unreachable!("attach was asked for"),
        }
    }

    #[test]
    fn the_file_says_what_the_command_line_leaves_out() {
        let file = "iface = [\"eth1\", \"eth2\"]\npeer-timeout = \"2s\"\nlog-connections = true\nmax-connections = 1000\n";
        let read = attach(&["--peer-timeout", "5s"], file).unwrap();
        assert_eq!(read.iface, ["eth1", "eth2"]);
        assert_eq!(read.peer_timeout.as_secs(), 5);
        assert!(read.log_connections);
        assert_eq!(read.max_connections, Some(1000));
        // One that is given is the only one.
        assert_eq!(attach(&["--iface", "eth9"], file).unwrap().iface, ["eth9"]);
        assert_eq!(attach(&[], "iface = \"eth1\"\n").unwrap().iface, ["eth1"]);
    }

    #[test]
    fn what_is_wrong_in_the_file_is_said_with_its_place() {
        let said = |file: &str| attach(&["--iface", "eth1"], file).unwrap_err();
        let error = said("# mine\npeer_timeout = \"2s\"\n");
        assert!(
            error.contains("agent.toml:2: peer_timeout is no option; did you mean peer-timeout?"),
            "{error}"
        );
        assert!(
            said("colour = 1\n").contains("colour is no option; there are iface, "),
            "{}",
            said("colour = 1\n")
        );
        let error = said("peer-timeout = \"soon\"\n");
        assert!(error.contains("agent.toml: invalid value 'soon' for '--peer-timeout"), "{error}");
        let error = said("log-connections = \"yes\"\n");
        assert!(error.contains("agent.toml:1: log-connections: true or false is wanted"), "{error}");
        let error = said("iface = []\n");
        assert!(error.contains("agent.toml:1: iface: one value at least is wanted"), "{error}");
        assert!(attach(&["--iface", "eth1"], "address = []\n").unwrap().address.is_empty());
        assert!(said("iface = {}\n").contains("a text or a number is wanted"));
        assert!(said("iface = \n").contains("agent.toml: "), "{}", said("iface = \n"));
    }

    #[test]
    fn a_file_that_is_named_must_be_there() {
        let all = ["lb-userspace", VERB, "--config", "/nowhere/agent.toml"].map(OsString::from);
        let error = parse(all).unwrap_err().to_string();
        assert!(error.contains("cannot read /nowhere/agent.toml: No such file"), "{error}");
    }

    #[test]
    fn every_option_has_a_variable_and_a_misspelt_one_is_found() {
        let command = command();
        let verb = command.find_subcommand(VERB).unwrap();
        let shown = verb.get_arguments().filter(|arg| !arg.is_hide_set());
        for arg in shown.filter(|arg| arg.get_long().is_some_and(|long| long != "help" && long != PRINT)) {
            let name = variable(arg.get_long().unwrap());
            assert_eq!(arg.get_env(), Some(OsStr::new(&name)), "{name}");
        }
        let set = ["LB_IFACE", "LB_PEER_TIMOUT", "LB_FAULT", "PATH"].map(OsString::from);
        assert_eq!(misspelt(set), ["LB_PEER_TIMOUT"]);
    }
}
