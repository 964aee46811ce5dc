//! The name of a working image, and that of its snapshots.

use std::sync::Arc;

use super::{Result, WorkingImage};
use crate::model::{NAME_TAG, SnapshotId};
use crate::store;

impl WorkingImage {
    /// Its name in `new/`.
    pub fn name(&self) -> String {
        self.state().name.clone()
    }

    /// Gives it another name; the tag of its last snapshot follows in the background. A name that
    /// says that it is whole now, after one that did not, commits it in the background.
    ///
    /// # Errors
    ///
    /// If the new name cannot be kept on the local disk.
    pub async fn rename(self: &Arc<Self>, name: &str) -> Result<()> {
        let (old, snapshot) = {
            let mut state = self.state();
            let old = std::mem::replace(&mut state.name, name.to_owned());
            (old, state.snapshot.clone())
        };
        let ready = is_temporary(&old) && !is_temporary(name);
        if ready {
            self.sync().await?;
        }
        self.recorded(ready).await?;
        if ready {
            self.commit_if_closed();
        }
        if let Some(snapshot) = snapshot {
            self.rename_snapshot(snapshot, &old);
        }
        Ok(())
    }

    /// Gives a snapshot that was made under an `old` name the one that the image has now, in the
    /// background.
    pub(super) fn rename_snapshot(self: &Arc<Self>, id: SnapshotId, old: &str) {
        let (old, new) = (stem(old).to_owned(), stem(&self.name()).to_owned());
        if old == new {
            return;
        }
        let image = Arc::clone(self);
        tokio::spawn(async move {
            let store = &image.shop.store;
            let renamed = async {
                let mut tags = store.describe(&id).await?.tags;
                // Somebody may have named it otherwise.
                if tags.get(NAME_TAG) == Some(&old) {
                    tags.insert(NAME_TAG.to_owned(), new);
                    store.set_tags(&id, tags).await?;
                }
                Ok::<_, store::Error>(())
            };
            if let Err(error) = renamed.await {
                tracing::warn!("{id} keeps its old name: {error}");
            }
        });
    }
}

/// Whether a name says that the file is not whole yet: hidden ones (`rsync`), and those of browsers.
pub(super) fn is_temporary(name: &str) -> bool {
    let suffixes = [".part", ".partial", ".tmp"];
    name.starts_with('.') || suffixes.iter().any(|suffix| name.ends_with(suffix))
}

/// What a name ends in that says which kind of file it is. Nothing else does: `ubuntu-22.04` is a name.
const KINDS: [&str; 5] = [".img", ".raw", ".bin", ".dd", ".iso"];

/// The name of a snapshot: that of its file, without what says which kind of file it is, and that it is not whole.
pub(super) fn stem(name: &str) -> &str {
    let without = |name, suffix| str::strip_suffix(name, suffix).filter(|stem| !stem.is_empty());
    let name = without(name, ".part").unwrap_or(name);
    KINDS.into_iter().find_map(|kind| without(name, kind)).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_not_final() {
        for name in [".x.img.Ab3", "x.img.part", "x.partial", "x.tmp"] {
            assert!(is_temporary(name), "{name}");
        }
        for name in ["x.img", "part", "tmp", "x.tmp.img", "x"] {
            assert!(!is_temporary(name), "{name}");
        }
    }

    #[test]
    fn the_kind_of_file_is_no_part_of_the_name() {
        let stems = [
            ("web.img", "web"),
            ("web", "web"),
            ("a.b.raw", "a.b"),
            ("a.bin", "a"),
            ("a.dd", "a"),
            ("a.iso", "a"),
            ("a.part", "a"),
            ("a.img.part", "a"),
            ("a.img.raw", "a.img"),
            (".img", ".img"),
            (".x", ".x"),
            ("ubuntu-22.04", "ubuntu-22.04"),
            ("backup-2026.01.02", "backup-2026.01.02"),
            ("db.example.org", "db.example.org"),
        ];
        for (name, expected) in stems {
            assert_eq!(stem(name), expected);
        }
    }
}
