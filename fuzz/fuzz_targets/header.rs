//! Searches for input that breaks `latzero_fuzz::header`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| latzero_fuzz::header(data));
