//! Working images without a mount: random operations against a model, and damage of what is staged.

mod adoption;
mod base;
mod content;
mod damage;
mod failures;
mod property;
mod sums;
mod trap;
mod turns;
mod world;
