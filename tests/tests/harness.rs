//! What the tests say when they fail.

use std::{fs, panic};

use lb_tests::{
    frames::{assert_frame, difference},
    packet::{Packet, SYN},
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
