//! The fspfs program.

fn main() {}
