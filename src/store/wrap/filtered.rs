//! A store that lists only some of its snapshots, where the store itself cannot choose.

use super::forward::Wrapper;
use crate::model::Snapshot;
use crate::store::{Error, ErrorKind, Filter, Result, SharedStore, SnapshotPage};

/// Lists the snapshots that match all of some filters. Others can be used as ever.
#[derive(Debug)]
pub struct Filtered {
    inner: SharedStore,
    filters: Vec<Filter>,
}

impl Filtered {
    /// Narrows down what `inner` lists.
    ///
    /// # Errors
    ///
    /// `Unsupported` for a filter that a store of snapshots alone has nothing to compare with.
    pub fn new(inner: SharedStore, filters: Vec<Filter>) -> Result<Self> {
        match filters.iter().find(|filter| !is_known(&filter.name)) {
            Some(filter) => {
                let message = format!(
                    "this store cannot be filtered by {:?}; it can by tag:KEY, tag-key, snapshot-id, volume-id, volume-size, description, status and encrypted",
                    filter.name
                );
                Err(Error::new(ErrorKind::Unsupported, message))
            }
            None => Ok(Self { inner, filters }),
        }
    }
}

impl Wrapper for Filtered {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    fn listed(&self, mut page: SnapshotPage) -> SnapshotPage {
        let matches = |snapshot: &Snapshot| {
            self.filters.iter().all(|filter| filter.matches(&values(snapshot, &filter.name)))
        };
        page.snapshots.retain(matches);
        page
    }
}

const NAMES: [&str; 7] =
    ["description", "encrypted", "snapshot-id", "status", "tag-key", "volume-id", "volume-size"];

fn is_known(name: &str) -> bool {
    NAMES.contains(&name) || name.starts_with("tag:")
}

/// What a filter of this name looks at.
fn values(snapshot: &Snapshot, name: &str) -> Vec<String> {
    let one = |text: &str| vec![text.to_owned()];
    match name {
        "description" => one(&snapshot.description),
        "encrypted" => one(&snapshot.encrypted.to_string()),
        "snapshot-id" => one(snapshot.id.as_str()),
        "status" => one(snapshot.state.as_str()),
        "tag-key" => snapshot.tags.keys().cloned().collect(),
        "volume-id" => snapshot.volume_id.iter().cloned().collect(),
        "volume-size" => one(&snapshot.volume_size.gib().to_string()),
        _ => {
            let key = name.strip_prefix("tag:").unwrap_or_default();
            snapshot.tags.get(key).cloned().into_iter().collect()
        }
    }
}
