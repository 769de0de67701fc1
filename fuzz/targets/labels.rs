//! A service's labels and its name.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_userspace::source::docker::fuzz::labels(data));
