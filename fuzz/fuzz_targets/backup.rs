//! Searches for input that breaks `latzero_fuzz::backup`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| latzero_fuzz::backup(data));
