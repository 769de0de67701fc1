//! What the tests say when they fail, and what they leave when they are ended.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    panic,
    path::Path,
    process::{Command, Stdio},
};

use lb_tests::{
    frames::{assert_frame, difference},
    netns::{Netns, eventually},
    packet::{Packet, SYN},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn request() -> Packet {
    let at = |address: &str, port| (address.parse().expect("an address"), port);
    Packet::new(SYN, at("192.0.2.10", 40_000), at("192.0.2.101", 80))
}

#[test]
fn frames_that_differ_are_shown_field_by_field() {
    let expected = request();
    let got = expected.clone().with(|packet| {
        packet.hops = 63;
        packet.destination_port = 8080;
    });
    let shown = difference(&got.bytes(), &expected.bytes());
    let fields: Vec<_> =
        shown.lines().map(|line| line.split("expected").next().unwrap_or_default().trim()).collect();
    assert_eq!(fields, ["ipv4 ttl", "ipv4 checksum", "tcp destination port", "tcp checksum"], "{shown}");
    assert!(shown.contains("expected 64, got 63") && shown.contains("expected 80, got 8080"), "{shown}");
    assert!(difference(b"short", &expected.bytes()).contains("not understood"));
}

#[test]
fn frames_that_differ_are_left_for_wireshark() {
    let expected = request();
    let got = expected.clone().with(|packet| packet.hops = 63);
    let failed = panic::catch_unwind(|| assert_frame("a request", &got.bytes(), &expected.bytes()));
    let said = *failed.expect_err("they differ").downcast::<String>().expect("a text");
    let path = said.rsplit("the expected first: ").next().expect("a path").trim();
    let kept = fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    // A header of the file, and one for each frame.
    assert_eq!(kept.len(), 24 + 16 + expected.bytes().len() + 16 + got.bytes().len());
    fs::remove_file(path).expect("remove the file");
    assert_frame("the same", &expected.bytes(), &expected.bytes());
}

/// Set in the process that the test below starts of itself, and ends.
const HOLDS: &str = "LB_TEST_HOLDS_A_NAMESPACE";

/// Holds a namespace with a process in it until a signal comes.
fn hold_a_namespace() -> ! {
    let netns = Netns::new("held");
    let mut sleeper = netns.command("sleep").arg("infinity").spawn().expect("start a process in it");
    println!("\nholds {} {}", netns.name(), sleeper.id());
    sleeper.wait().expect("wait for what never ends by itself");
    // It is ended with its namespace, a moment before this process.
    loop {
        std::thread::park();
    }
}

#[test]
fn a_signal_leaves_nothing_behind() {
    if env::var_os(HOLDS).is_some() {
        hold_a_namespace();
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut test = Command::new(env::current_exe().expect("this program"))
            .args(["--exact", "--nocapture", "a_signal_leaves_nothing_behind"])
            .env(HOLDS, "1")
            .stdout(Stdio::piped())
            .spawn()
            .expect("start it again");
        let lines = BufReader::new(test.stdout.take().expect("its output")).lines();
        let held =
            lines.map_while(Result::ok).find_map(|line| line.strip_prefix("holds ").map(str::to_owned));
        let held = held.expect("a namespace");
        let (name, sleeper) = held.split_once(' ').expect("its name and a process");
        let netns = Path::new("/run/netns").join(name);
        assert!(netns.exists());
        kill(Pid::from_raw(test.id() as i32), signal).expect("end it");
        let ended = test.wait().expect("its end");
        assert_eq!(ended.code(), Some(128 + signal as i32));
        assert!(!netns.exists(), "{name} is gone after {signal}");
        let process = Path::new("/proc").join(sleeper).join("stat");
        // It was killed, and dies when it runs next.
        eventually("the process in it has ended", || {
            let state = fs::read_to_string(&process).unwrap_or_default();
            state.is_empty() || state.contains(") Z ")
        });
    }
}

/// What says something to a test says nothing to an agent that it starts.
#[test]
fn an_agent_s_options_are_what_its_test_gives_it() {
    let ours = |line: &&str| line.starts_with("LB_");
    assert!(
        env::vars_os().any(|(name, _)| name.as_encoded_bytes().starts_with(b"LB_")),
        "`cargo xtask test` sets some"
    );
    let netns = Netns::new("told");
    let seen = netns.output("env", &[]);
    assert_eq!(seen.lines().filter(ours).collect::<Vec<_>>(), [""; 0]);
    let mut command = netns.command("env");
    let output = command.env("LB_MODE", "tc").output().expect("start env");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).lines().filter(ours).collect::<Vec<_>>(),
        ["LB_MODE=tc"]
    );
}
