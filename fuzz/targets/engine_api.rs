//! Docker's answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_userspace::source::docker::fuzz::engine_api(data));
