#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmm_service::fuzzing::tokens(input));
