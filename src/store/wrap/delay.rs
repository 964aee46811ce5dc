//! A store that is far away.

use std::time::Duration;

use async_trait::async_trait;

use super::Call;
use super::forward::Wrapper;
use crate::store::{Result, SharedStore};

/// Waits before each call.
#[derive(Debug)]
pub struct Delay {
    inner: SharedStore,
    delay: Duration,
}

impl Delay {
    /// Waits for `delay` before each call of `inner`.
    pub fn new(inner: SharedStore, delay: Duration) -> Self {
        Self { inner, delay }
    }
}

#[async_trait]
impl Wrapper for Delay {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    async fn before(&self, _call: Call) -> Result<()> {
        tokio::time::sleep(self.delay).await;
        Ok(())
    }
}
