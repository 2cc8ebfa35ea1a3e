#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| st_fuzz::chat_template(data));
