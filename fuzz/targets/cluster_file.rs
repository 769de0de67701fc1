//! A cluster file, and what it is changed to.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_userspace::source::file::fuzz::cluster_file(data));
