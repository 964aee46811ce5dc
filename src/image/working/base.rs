//! The snapshot beneath a working image, where the store does not tell of it.

use std::sync::Arc;
use std::time::Duration;

use super::put::in_time;
use super::{Error, Inner, Reader, Result, WorkingImage, Workshop};
use crate::model::{Snapshot, SnapshotId};
use crate::store::{self, ErrorKind};

/// A base that could not be looked up: what is not staged cannot be read, and nothing be committed.
#[derive(Clone, Debug)]
pub(super) struct Missing {
    pub(super) id: SnapshotId,
    pub(super) why: String,
}

/// Longest time that coming back waits for the store to tell of a base: the mount waits for it, and
/// it is looked for again.
const AT_FIRST: Duration = Duration::from_secs(5);

pub(super) async fn look_up(shop: &Workshop, id: &SnapshotId) -> Result<Snapshot> {
    match tokio::time::timeout(AT_FIRST, shop.store.describe(id)).await {
        Ok(found) => Ok(found?),
        Err(_) => {
            let message = format!("no answer within {AT_FIRST:?}");
            Err(store::Error::new(ErrorKind::Timeout, message).into())
        }
    }
}

impl Missing {
    pub(super) fn new(id: SnapshotId, error: &Error) -> Self {
        let why = format!("its base {id} cannot be looked up: {error}");
        Self { id, why }
    }

    pub(super) fn error(&self) -> Error {
        Error::NoBase(self.why.clone())
    }
}

impl WorkingImage {
    /// Looks for the base once more, if it is missing.
    ///
    /// # Errors
    ///
    /// [`Error::NoBase`] if it is still missing.
    pub async fn find_base(self: &Arc<Self>) -> Result<()> {
        let Some(id) = self.state().missing.as_ref().map(|missing| missing.id.clone()) else {
            return Ok(());
        };
        let found = in_time(self.shop.store.describe(&id)).await;
        let mut state = self.state();
        // Somebody else may have found it meanwhile.
        if state.missing.is_none() {
            return Ok(());
        }
        match found {
            Ok(snapshot) => {
                tracing::info!("{}: its base {id} is there again", state.name);
                let base = self.shop.image(snapshot);
                if state.layers.is_empty() {
                    state.len = base.len();
                }
                state.base = Some(Arc::new(Reader::new(base)));
                state.missing = None;
                Ok(())
            }
            Err(error) => {
                let missing = Missing::new(id, &error);
                let error = missing.error();
                state.missing = Some(missing);
                Err(error)
            }
        }
    }
}

impl Inner {
    /// Whether there is a snapshot beneath all generations, known or not.
    pub(super) fn has_base(&self) -> bool {
        self.base.is_some() || self.missing.is_some()
    }

    /// The snapshot beneath all generations, known or not.
    pub(super) fn base_id(&self) -> Option<SnapshotId> {
        let known = self.base.as_ref().map(|base| base.image().snapshot().id.clone());
        known.or_else(|| self.missing.as_ref().map(|missing| missing.id.clone()))
    }
}
