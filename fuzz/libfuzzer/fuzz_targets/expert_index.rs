#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| st_fuzz::expert_index(data));
