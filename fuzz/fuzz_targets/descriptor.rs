//! Searches for input that breaks `latzero_fuzz::descriptor`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| latzero_fuzz::descriptor(data));
