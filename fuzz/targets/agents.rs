//! What agents say to each other.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_userspace::source::peer::fuzz::agents(data));
