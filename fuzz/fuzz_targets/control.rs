//! Lines of control files, and URLs, made of arbitrary bytes. `scripts/fuzz.sh` runs it.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fspfs::fuzz::control(data));
