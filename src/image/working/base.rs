//! The snapshot beneath a working image, and what is done where the store does not tell of it.

use std::sync::Arc;
use std::time::Duration;

use super::put::in_time;
use super::{Error, Reader, Result, WorkingImage, Workshop};
use crate::image::Image;
use crate::model::SnapshotId;
use crate::store::{self, ErrorKind};

/// What is beneath all generations.
#[derive(Debug)]
pub(super) enum Base {
    /// Nothing: zeros.
    None,
    Known(Arc<Reader>),
    /// A snapshot, of which the store does not tell.
    Missing(Missing),
}

/// A base that could not be looked up: what is not staged cannot be read, and nothing be committed.
#[derive(Clone, Debug)]
pub(super) struct Missing {
    pub(super) id: SnapshotId,
    pub(super) why: String,
}

/// Longest time that coming back waits for the store to tell of a base: the mount waits for it, and
/// it is looked for again.
const AT_FIRST: Duration = Duration::from_secs(5);

pub(super) async fn look_up(shop: &Workshop, id: &SnapshotId) -> Base {
    let error = match tokio::time::timeout(AT_FIRST, shop.store.describe(id)).await {
        Ok(Ok(snapshot)) => return shop.image(snapshot).into(),
        Ok(Err(error)) => error,
        Err(_) => store::Error::new(ErrorKind::Timeout, format!("no answer within {AT_FIRST:?}")),
    };
    Base::Missing(Missing::new(id.clone(), &error.into()))
}

/// Whether the store knows nothing of a snapshot, which it would if it was there.
pub(super) async fn is_gone(shop: &Workshop, id: &SnapshotId) -> bool {
    if !shop.store.settling().is_zero() {
        return false;
    }
    let described = tokio::time::timeout(AT_FIRST, shop.store.describe(id)).await;
    matches!(described, Ok(Err(error)) if error.kind() == ErrorKind::NotFound)
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
        let Some(id) = self.state().base.missing().map(|missing| missing.id.clone()) else {
            return Ok(());
        };
        let found = in_time(self.shop.store.describe(&id)).await;
        let mut state = self.state();
        // Somebody else may have found it meanwhile.
        if state.base.missing().is_none() {
            return Ok(());
        }
        match found {
            Ok(snapshot) => {
                tracing::info!("{}: its base {id} is there again", state.name);
                let base = self.shop.image(snapshot);
                if state.layers.is_empty() {
                    state.len = base.len();
                }
                state.base = Base::from(base);
                Ok(())
            }
            Err(error) => {
                let missing = Missing::new(id, &error);
                let error = missing.error();
                state.base = Base::Missing(missing);
                Err(error)
            }
        }
    }
}

impl From<Arc<Image>> for Base {
    fn from(image: Arc<Image>) -> Self {
        Self::Known(Arc::new(Reader::new(image)))
    }
}

impl Base {
    pub(super) fn known(&self) -> Option<&Arc<Reader>> {
        if let Self::Known(base) = self { Some(base) } else { None }
    }

    pub(super) fn missing(&self) -> Option<&Missing> {
        if let Self::Missing(missing) = self { Some(missing) } else { None }
    }

    /// Whether there is a snapshot, known or not.
    pub(super) fn is_some(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// The snapshot, known or not.
    pub(super) fn id(&self) -> Option<SnapshotId> {
        match self {
            Self::None => None,
            Self::Known(base) => Some(base.image().snapshot().id.clone()),
            Self::Missing(missing) => Some(missing.id.clone()),
        }
    }
}
