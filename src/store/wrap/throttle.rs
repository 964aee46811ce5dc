//! A store that refuses too many requests.

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use tokio::time::Instant;

use super::Call;
use super::forward::Wrapper;
use crate::store::{Error, ErrorKind, Result, SharedStore};

/// A token bucket: refuses calls beyond a rate as the service does, at once and without waiting.
#[derive(Debug)]
pub struct Throttle {
    inner: SharedStore,
    per_second: f64,
    burst: f64,
    bucket: Mutex<(f64, Instant)>,
}

impl Throttle {
    /// Lets `per_second` calls through, and up to `burst` at once.
    pub fn new(inner: SharedStore, per_second: f64, burst: f64) -> Self {
        Self { inner, per_second, burst, bucket: Mutex::new((burst, Instant::now())) }
    }
}

#[async_trait]
impl Wrapper for Throttle {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    async fn before(&self, call: Call) -> Result<()> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let (tokens, filled) = *bucket;
        let now = Instant::now();
        let tokens = self.burst.min(tokens + (now - filled).as_secs_f64() * self.per_second);
        if tokens < 1.0 {
            *bucket = (tokens, now);
            let message = format!("too many requests: {} was refused", call.as_str());
            return Err(Error::new(ErrorKind::Throttled, message));
        }
        *bucket = (tokens - 1.0, now);
        Ok(())
    }
}
