//! Documents of a repository.

use serde::de::DeserializeOwned;

use super::objects::Objects;
pub(super) use crate::store::document::{decode, encode};
use crate::store::{ErrorKind, Result};

/// Reads a document; `None` if there is none of this name.
pub(super) async fn read_document<T: DeserializeOwned>(
    objects: &dyn Objects,
    name: &str,
) -> Result<Option<T>> {
    match objects.read(name).await {
        Ok(bytes) => decode(name, &bytes).map(Some),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
