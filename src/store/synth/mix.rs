//! Numbers that look like random ones, and are the same each time.

/// 2^64 divided by the golden ratio: multiples of it are far apart.
pub(super) const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// A number that depends on every bit of `n`: no two numbers give the same (the end of splitmix64).
pub(super) fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ (n >> 31)
}

/// The `n`-th number of the sequence that `key` begins: splitmix64, at any place.
pub(super) fn nth(key: u64, n: u64) -> u64 {
    mix(key.wrapping_add(n.wrapping_mul(GOLDEN)))
}

/// The beginning of a sequence of its own for these numbers.
pub(super) fn key(numbers: impl IntoIterator<Item = u64>) -> u64 {
    numbers.into_iter().fold(GOLDEN, |key, number| nth(mix(key), number))
}
