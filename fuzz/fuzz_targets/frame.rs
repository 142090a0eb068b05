#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| latzero_fuzz::frame(data));
