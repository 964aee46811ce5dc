//! Writing down what a working image is, and making it durable.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use super::attributes::Attributes;
use super::layer::Layer;
use super::{Error, Inner, Result, Trouble, WorkingImage};
use crate::blocking::blocking;
use crate::image::staging::record::{self, GenerationRecord, ImageRecord, boot};

impl WorkingImage {
    /// Writes the document; durably if `sync`, with the names of all files.
    pub(super) fn record(&self, sync: bool) -> Result<()> {
        let _alone = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        let record = {
            let mut state = self.state();
            if state.removed {
                return Ok(());
            }
            // What changes from now on is not in it.
            state.unsynced = !sync;
            state.record(&self.directory)
        };
        let write = || {
            record.write(&self.directory, sync)?;
            if sync { self.shop.staging.sync_image(&self.directory) } else { Ok(()) }
        };
        write().map_err(|e| {
            self.state().unsynced = true;
            Error::io("stage in", &self.directory, e)
        })
    }

    pub(super) async fn recorded(self: &Arc<Self>, sync: bool) -> Result<()> {
        let image = Arc::clone(self);
        blocking(move || image.record(sync)).await
    }

    /// Whether a writer was cut short, and that is not written down durably.
    fn is_newly_interrupted(&self) -> bool {
        let state = self.state();
        state.unsynced && matches!(state.phase.trouble(), Some(Trouble::Interrupted(_)))
    }

    /// Writes down that a writer was cut short, if one was: the next mount is to know it, whatever ends this
    /// one. A failure is logged: it is known here all the same.
    pub async fn record_interruption(self: &Arc<Self>) {
        if self.is_newly_interrupted()
            && let Err(error) = self.recorded(true).await
        {
            tracing::warn!("the next mount may take {} for whole: {error}", self.name());
        }
    }

    /// The same, while something else goes on.
    pub fn record_interruption_in_background(self: &Arc<Self>) {
        if self.is_newly_interrupted() {
            let image = Arc::clone(self);
            tokio::spawn(async move { image.record_interruption().await });
        }
    }

    /// Makes everything that was written durable on the local disk.
    pub async fn sync(self: &Arc<Self>) -> Result<()> {
        let _writing = self.gate.read().await;
        let image = Arc::clone(self);
        blocking(move || {
            let (files, unsynced) = {
                let state = image.state();
                let files: Vec<_> = state.layers.iter().map(|l| Arc::clone(&l.files)).collect();
                (files, state.unsynced)
            };
            for files in files {
                files.sync().map_err(|e| Error::io("stage in", &image.directory, e))?;
            }
            if unsynced { image.record(true) } else { Ok(()) }
        })
        .await
    }
}

impl Inner {
    fn record(&self, directory: &Path) -> ImageRecord {
        let generation = |layer: &Layer| GenerationRecord {
            id: layer.files.id,
            frozen: layer.frozen,
            durable: layer.durable,
            queued: layer.is_queued_as_it_is(),
            attempt: layer.attempt.clone(),
        };
        let Attributes { mode, uid, gid, modified } = self.attributes;
        ImageRecord {
            id: record::id_of(directory).unwrap_or_default(),
            name: self.name.clone(),
            mode,
            uid,
            gid,
            modified,
            base: self.base.id(),
            snapshot: self.snapshot.clone(),
            trouble: self.phase.trouble(),
            lost: self.lost.clone(),
            wishes: self.wishes.clone(),
            boot: boot(),
            generations: self.layers.iter().map(generation).collect(),
        }
    }
}
