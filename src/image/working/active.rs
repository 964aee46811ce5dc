//! The generation that takes writes.

use std::sync::Arc;

use tokio::sync::RwLockReadGuard;

use super::layer::Layer;
use super::phase::Phase;
use super::{Error, Inner, Result, WorkingImage};
use crate::blocking::blocking;
use crate::image::staging::Files;

impl WorkingImage {
    /// The generation that takes writes, made if there is none; and the gate, held.
    pub(super) async fn active(self: &Arc<Self>) -> Result<(RwLockReadGuard<'_, ()>, Arc<Files>)> {
        loop {
            let writing = self.gate.read().await;
            let files = {
                let mut state = self.state();
                let as_attempted = state.is_as_attempted();
                state.active().filter(|_| !as_attempted).map(|layer| Arc::clone(&layer.files))
            };
            if let Some(files) = files {
                return Ok((writing, files));
            }
            drop(writing);
            let _alone = self.gate.write().await;
            self.ensure_active().await?;
        }
    }

    /// Makes a generation that takes writes, if there is none. The caller holds the gate alone.
    pub(super) async fn ensure_active(self: &Arc<Self>) -> Result<Arc<Files>> {
        let image = Arc::clone(self);
        blocking(move || {
            image.note_change()?;
            let len = {
                let mut state = image.state();
                if let Some(layer) = state.active() {
                    return Ok(Arc::clone(&layer.files));
                }
                if let Some(missing) = state.base.missing().filter(|_| state.layers.is_empty()) {
                    // Nobody knows how long it is.
                    return Err(missing.error());
                }
                if state.layers.len() > 1 {
                    drop(state);
                    return image.thaw();
                }
                state.len
            };
            let files = Files::create(&image.directory, len)
                .map_err(|e| Error::io("stage in", &image.directory, e))?;
            {
                let mut state = image.state();
                state.layers.push(Layer::new(Arc::clone(&files)));
                state.phase.forget_notice();
            }
            image.record(false)?;
            Ok(files)
        })
        .await
    }

    /// Lets the uppermost generation take writes again, which waits for a commit that went wrong.
    /// Notes durably, before anything changes, that it is no longer to be committed.
    fn thaw(&self) -> Result<Arc<Files>> {
        let (files, durable) = {
            let mut state = self.state();
            if state.phase.is_committing() {
                return Err(Error::Busy);
            }
            let layer = state.layers.last_mut().expect("there are two");
            layer.frozen = false;
            (Arc::clone(&layer.files), std::mem::replace(&mut layer.durable, false))
        };
        let recorded = self.record(true);
        if recorded.is_err() {
            let mut state = self.state();
            let layer = state.layers.last_mut().expect("there are two");
            (layer.frozen, layer.durable) = (true, durable);
        }
        recorded.map(|()| files)
    }

    /// Notes, durably and before anything changes, that this is no longer what a commit has failed
    /// to make a snapshot of.
    fn note_change(&self) -> Result<()> {
        let (failed, changed) = {
            let mut state = self.state();
            if !state.is_as_attempted() {
                return Ok(());
            }
            let failed = state.phase.failure_to_notice();
            let attempt = state.lowest_mut().attempt.as_mut();
            (failed, attempt.map(|attempt| std::mem::replace(&mut attempt.changed, true)))
        };
        let recorded = self.record(true);
        if recorded.is_err() {
            let mut state = self.state();
            if let Some(why) = failed {
                state.phase = Phase::Failed(why);
            }
            if let Some((attempt, changed)) = state.lowest_mut().attempt.as_mut().zip(changed) {
                attempt.changed = changed;
            }
        }
        recorded
    }
}

impl Inner {
    /// The generation that takes what is written, if there is one.
    pub(super) fn active(&mut self) -> Option<&mut Layer> {
        self.layers.last_mut().filter(|layer| !layer.frozen)
    }

    /// Whether what is staged is known to be what a commit failed to make a snapshot of, or may
    /// have made one of: a change must be noted first.
    pub(super) fn is_as_attempted(&self) -> bool {
        let [layer] = &self.layers[..] else { return false };
        let attempt = layer.attempt.as_ref();
        let begun = attempt.is_some_and(|attempt| attempt.snapshot.is_some() && !attempt.changed);
        !layer.frozen && (begun || matches!(self.phase, Phase::Failed(_)))
    }
}
