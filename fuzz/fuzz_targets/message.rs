//! Searches for input that breaks `latzero_fuzz::message`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| latzero_fuzz::message(data));
