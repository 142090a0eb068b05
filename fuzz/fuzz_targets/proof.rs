//! Searches for input that breaks `latzero_fuzz::proof`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| latzero_fuzz::proof(data));
