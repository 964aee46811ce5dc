//! What the services of AWS have in common: the configuration, the accounts, the one place that sends requests, and
//! what these can end with.

pub(crate) mod account;
pub(crate) mod answer;
pub(crate) mod config;
pub(crate) mod failure;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub(crate) mod http;
pub(crate) mod service;
