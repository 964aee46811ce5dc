//! Answers of the EBS direct APIs and of S3, made of arbitrary bytes. `scripts/fuzz.sh` runs it.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fspfs::fuzz::services(data));
