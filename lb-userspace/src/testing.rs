//! What only tests ask of this process, by its environment: that it fails on purpose, or takes the kernel for an older one.
//!
//! None of it works unless [`TEST`] says that this is a test, so that a variable which strays into a service's environment
//! changes nothing.

use std::{env, ffi::OsString};

/// Says that this is a test: `LB_TEST=1`.
pub const TEST: &str = "LB_TEST";
/// Names a file that says which change to the kernel fails (see `datapath/fault.rs`).
pub const FAULT: &str = "LB_FAULT";
/// Names what the kernel is to be taken to lack (see `datapath/features.rs`).
pub const KERNEL_LACKS: &str = "LB_KERNEL_LACKS";

/// All there are.
const ALL: [&str; 2] = [FAULT, KERNEL_LACKS];

fn is_test(environment: impl Fn(&str) -> Option<OsString>) -> bool {
    environment(TEST).is_some_and(|value| value == "1")
}

/// What a test asks by one of these variables.
pub fn asked(name: &str) -> Option<OsString> {
    asked_in(|name| env::var_os(name), name)
}

fn asked_in(environment: impl Fn(&str) -> Option<OsString>, name: &str) -> Option<OsString> {
    debug_assert!(ALL.contains(&name));
    environment(name).filter(|_| is_test(&environment))
}

/// What the operator should hear of it at the start.
pub fn warnings() -> Vec<String> {
    warnings_in(|name| env::var_os(name))
}

fn warnings_in(environment: impl Fn(&str) -> Option<OsString>) -> Vec<String> {
    let test = is_test(&environment);
    let set = ALL.iter().filter_map(|name| Some((name, environment(name)?)));
    let mut said: Vec<String> = set
        .map(|(name, value)| match test {
            true => format!(
                "{name}={value:?} is set: this process behaves as a test asks, and may fail on purpose"
            ),
            false => format!(
                "{name} is set and changes nothing: it is for tests, which also set {TEST}=1; unset it"
            ),
        })
        .collect();
    if test {
        said.insert(
            0,
            format!("{TEST}=1 is set: this is no process to serve anybody; unset it outside of tests"),
        );
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tests_ask_is_done_in_tests_alone_and_said() {
        let environment = |set: &'static [(&str, &str)]| {
            move |name: &str| {
                set.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
            }
        };
        let none = environment(&[]);
        assert_eq!((asked_in(none, FAULT), warnings_in(none).len()), (None, 0));
        for stray in [environment(&[(FAULT, "/x")]), environment(&[(FAULT, "/x"), (TEST, "")])] {
            assert_eq!(asked_in(stray, FAULT), None);
            assert!(warnings_in(stray)[0].starts_with("LB_FAULT is set and changes nothing"));
        }
        let test = environment(&[(FAULT, "/x"), (TEST, "1")]);
        assert_eq!(asked_in(test, FAULT), Some("/x".into()));
        assert_eq!(asked_in(test, KERNEL_LACKS), None);
        let said = warnings_in(test);
        assert!(
            said[0].starts_with("LB_TEST=1 is set") && said[1].starts_with("LB_FAULT=\"/x\" is set: "),
            "{said:?}"
        );
    }
}
