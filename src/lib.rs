//! EBS snapshots as files: the parts that the `fspfs` program is made of.
//!
//! The rooms, from the top down: [`cli`] and [`mount`] take the user's words, `fuse` translates
//! the kernel's requests for the [`tree`], which serves an [`image`] of each snapshot through the
//! [`cache`] from a [`store`]. `ops` are the operations, [`model`] the words
//! that all of them use. Nothing calls upwards. `docs/architecture.md` walks through it.

pub(crate) mod arguments;
pub(crate) mod blocking;
pub mod cache;
mod claim;
pub mod cli;
pub mod doctor;
pub(crate) mod fuse;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod image;
pub(crate) mod jobs;
pub mod model;
pub mod mount;
pub(crate) mod mountinfo;
pub(crate) mod ops;
pub(crate) mod own;
pub mod serve;
pub mod shown;
pub mod store;
pub mod sys;
pub(crate) mod threads;
pub mod transfer;
pub mod tree;
