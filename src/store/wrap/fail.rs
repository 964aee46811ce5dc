//! A store that fails.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;

use super::Call;
use super::forward::Wrapper;
use crate::store::{Error, ErrorKind, Result, SharedStore};

/// Fails chosen calls, which then are not made.
#[derive(Debug)]
pub struct Fail {
    inner: SharedStore,
    plans: Mutex<HashMap<Call, Plan>>,
}

#[derive(Debug)]
struct Plan {
    /// Calls that still succeed.
    after: u64,
    /// Calls that then fail.
    times: u64,
    kind: ErrorKind,
}

impl Fail {
    /// Fails nothing yet.
    pub fn new(inner: SharedStore) -> Self {
        Self { inner, plans: Mutex::default() }
    }

    /// From now on lets `after` calls of this kind succeed and fails the `times` that follow.
    pub fn plan(&self, call: Call, after: u64, times: u64, kind: ErrorKind) {
        let plan = Plan { after, times, kind };
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).insert(call, plan);
    }

    /// Fails nothing any more.
    pub fn heal(&self) {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[async_trait]
impl Wrapper for Fail {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    async fn before(&self, call: Call) -> Result<()> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        match plans.get_mut(&call) {
            Some(plan) if plan.after > 0 => plan.after -= 1,
            Some(plan) if plan.times > 0 => {
                plan.times -= 1;
                let message = format!("{} fails as planned", call.as_str());
                return Err(Error::new(plan.kind, message));
            }
            _ => {}
        }
        Ok(())
    }
}
