//! Searches for input that breaks `latzero_fuzz::rows`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| latzero_fuzz::rows(data));
