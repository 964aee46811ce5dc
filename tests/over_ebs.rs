//! What users do, once more: over the EBS direct APIs and EC2 instead of a repository.
#![allow(clippy::unwrap_used)]
#![allow(clippy::duplicate_mod, reason = "what is shared knows over what it runs")]

#[path = "filesystems.rs"]
mod filesystems;
#[path = "names.rs"]
mod names;
#[path = "reading.rs"]
mod reading;
#[path = "seek.rs"]
mod seek;
#[path = "transfer.rs"]
mod transfer;
#[path = "writing.rs"]
mod writing;
#[path = "writing_calls.rs"]
mod writing_calls;
#[path = "writing_children.rs"]
mod writing_children;
#[path = "writing_failures.rs"]
mod writing_failures;
#[path = "writing_loop.rs"]
mod writing_loop;
