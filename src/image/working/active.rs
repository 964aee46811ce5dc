//! The generation that takes writes.

use std::sync::Arc;

use tokio::sync::RwLockReadGuard;

use super::layer::{Layer, Turn};
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
                let must_note = state.must_note_change();
                state.active().filter(|_| !must_note).map(|layer| Arc::clone(&layer.files))
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

    /// Notes, durably and before anything changes, that this is no longer what a commit has failed
    /// to make a snapshot of, or what waits to become one.
    fn note_change(&self) -> Result<()> {
        let (failed, changed, queued) = {
            let mut state = self.state();
            if !state.must_note_change() {
                return Ok(());
            }
            let as_attempted = state.is_as_attempted();
            let failed = if as_attempted { state.phase.failure_to_notice() } else { None };
            let attempt = state.lowest_mut().attempt.as_mut().filter(|_| as_attempted);
            let changed = attempt.map(|attempt| std::mem::replace(&mut attempt.changed, true));
            let queued = state.active().and_then(|layer| {
                let after = match layer.queued? {
                    Turn::Closed => None,
                    Turn::Whatever { .. } => Some(Turn::Whatever { changed: true }),
                };
                std::mem::replace(&mut layer.queued, after)
            });
            (failed, changed, queued)
        };
        let recorded = self.record(true);
        let mut state = self.state();
        if recorded.is_err() {
            if let Some(why) = failed {
                state.phase = Phase::Failed(why);
            }
            if let Some((attempt, changed)) = state.lowest_mut().attempt.as_mut().zip(changed) {
                attempt.changed = changed;
            }
            if let Some(layer) = state.active() {
                layer.queued = queued.or(layer.queued);
            }
        } else if queued == Some(Turn::Closed)
            && let Some(layer) = state.active()
        {
            std::mem::take(&mut layer.commit).end_if_open(&Error::Changed);
        }
        recorded
    }
}

impl Inner {
    /// The generation that takes what is written, if there is one.
    pub(super) fn active(&mut self) -> Option<&mut Layer> {
        self.layers.last_mut().filter(|layer| !layer.frozen)
    }

    /// Whether a change must be noted before it is made.
    pub(super) fn must_note_change(&self) -> bool {
        self.is_as_attempted() || self.layers.last().is_some_and(Layer::is_queued_as_it_is)
    }

    /// Whether what is staged is known to be what a commit failed to make a snapshot of, or may
    /// have made one of.
    fn is_as_attempted(&self) -> bool {
        let [layer] = &self.layers[..] else { return false };
        let attempt = layer.attempt.as_ref();
        let begun = attempt.is_some_and(|attempt| attempt.snapshot.is_some() && !attempt.changed);
        !layer.frozen && (begun || matches!(self.phase, Phase::Failed(_)))
    }
}
