//! Images, as a commit looks at them, made of arbitrary bytes. `scripts/fuzz.sh` runs it.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fspfs::fuzz::images(data));
