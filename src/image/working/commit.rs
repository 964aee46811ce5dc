//! Asking for a commit: what is dirty is frozen, unless nobody would want a snapshot of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::layer::{By, Commit, Layer};
use super::phase::Remark;
use super::run::ASK_FIRST;
use super::{Error, Inner, Result, Trouble, WorkingImage, name};
use crate::blocking::blocking;
use crate::image::staging::files::read_padded;
use crate::model::{BlockBuffer, BlockIndex, SnapshotId};

/// Why there is no snapshot of an image without a byte.
pub(super) const EMPTY: &str = "it is empty: no snapshot was made";

/// Why a commit ended that nothing else is known of.
pub(super) const DIED: &str = "the commit died";

/// What asking for a commit led to.
#[derive(Debug)]
pub(super) enum Begun {
    /// There is nothing to commit.
    Nothing,
    /// It is under way.
    Running(Arc<Commit>),
    /// It is durable on the local disk, and has to wait for the one before.
    Queued(Arc<Commit>),
}

impl WorkingImage {
    /// Commits what closing it calls for, and waits until the store has accepted it. A commit that
    /// has to wait for another one only makes what is staged durable.
    ///
    /// # Errors
    ///
    /// If the snapshot could not be made: what is staged stays.
    pub async fn commit_closed(self: &Arc<Self>) -> Result<Option<SnapshotId>> {
        self.commit_if_wanted(!self.shop.settings.in_background, By::Closing).await
    }

    async fn commit_if_wanted(self: &Arc<Self>, waits: bool, by: By) -> Result<Option<SnapshotId>> {
        if self.is_temporary() || !self.shop.settings.commit_at_close {
            return Ok(None);
        }
        if let Some(notice) = self.reason_against().await? {
            tracing::info!("{}: {notice}", self.name());
            let was_in_trouble = {
                let mut state = self.state();
                let was_in_trouble = state.phase.trouble().is_some();
                state.phase.say(Some(Remark::Notice(notice)));
                was_in_trouble
            };
            if was_in_trouble {
                self.recorded(false).await?;
            }
            return Ok(None);
        }
        self.check_whole(false).await?;
        match self.begin_commit(!waits, by).await? {
            Begun::Running(commit) if waits => match commit.wait().await {
                // It only waited for another one, and whoever has changed it closes it anew.
                Err(Error::Changed) => Ok(None),
                result => result.map(Some),
            },
            _ => Ok(None),
        }
    }

    /// Commits whatever there is to commit, and waits until the store has accepted it. Answers the
    /// newest snapshot of the image.
    ///
    /// # Errors
    ///
    /// As [`commit_closed`](Self::commit_closed); [`Error::Empty`] for an image without a byte.
    pub async fn commit(self: &Arc<Self>) -> Result<SnapshotId> {
        self.commit_as(false).await
    }

    /// The same; `as_is` takes an image that is known not to be whole, too.
    ///
    /// # Errors
    ///
    /// As [`commit`](Self::commit).
    pub async fn commit_as(self: &Arc<Self>, as_is: bool) -> Result<SnapshotId> {
        if self.is_empty() {
            return Err(Error::Empty);
        }
        self.check_whole(as_is).await?;
        let begun = match self.begin_commit(false, By::Name { as_is }).await? {
            // A file of zeros, or none at all, is an image too, when somebody asks.
            Begun::Nothing if self.state().snapshot.is_none() => {
                self.touch().await?;
                self.begin_commit(false, By::Name { as_is }).await?
            }
            begun => begun,
        };
        match begun {
            Begun::Nothing => {
                let snapshot = self.state().snapshot.clone();
                snapshot.ok_or(Error::Empty)
            }
            Begun::Running(commit) | Begun::Queued(commit) => commit.wait().await,
        }
    }

    /// Begins to commit in the background, as [`commit_closed`](Self::commit_closed) does; what is
    /// staged is made durable first. If it has to wait for another commit, it takes whatever is there then.
    pub fn commit_in_background(self: &Arc<Self>) {
        self.commit_unseen(By::Ending);
    }

    /// The same, for whoever asks for it.
    pub(super) fn commit_unseen(self: &Arc<Self>, by: By) {
        let starting = Starting::new(self);
        tokio::spawn(async move {
            let Starting(image) = &starting;
            if let Err(error) = image.commit_if_wanted(false, by).await {
                tracing::error!("{} cannot be committed: {error}", image.name());
            }
        });
    }

    /// Ends the commit that is under way.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if there is none.
    pub fn cancel(&self) -> Result<()> {
        let state = self.state();
        // One that is being made durable before it begins finds out when it does.
        let under_way = state.phase.is_committing() || state.starting > 0;
        match state.layers.first().filter(|layer| {
            under_way && layer.is_wanted() && layer.commit.outcome.borrow().is_none()
        }) {
            Some(layer) => {
                layer.commit.cancel.notify_one();
                Ok(())
            }
            None => Err(Error::Refused("no commit of it is under way".to_owned())),
        }
    }

    /// Waits until the store calls the snapshots of all commits completed, or one of them failed.
    pub async fn until_completed(&self) -> Result<()> {
        let mut pause = ASK_FIRST;
        loop {
            {
                let state = self.state();
                if !state.phase.is_committing() {
                    return match state.phase.trouble() {
                        Some(Trouble::Failed(why) | Trouble::Interrupted(why)) => {
                            Err(Error::Interrupted(why))
                        }
                        None => Ok(()),
                    };
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Whether a commit is putting blocks, or is about to.
    pub fn is_putting(&self) -> bool {
        let state = self.state();
        state.starting > 0 || state.putting().is_some()
    }

    /// Waits until no commit is putting blocks, is about to, or tidies up.
    pub async fn put_down(&self) {
        loop {
            let (commit, soon) = {
                let state = self.state();
                let tidies_up = state.phase.is_committing() && state.layers.is_empty();
                (state.putting().map(Arc::clone), state.starting > 0 || tidies_up)
            };
            match commit {
                // How it ended is told elsewhere.
                Some(commit) => drop(commit.wait().await),
                None if soon => tokio::time::sleep(Duration::from_millis(5)).await,
                None => return,
            }
        }
    }

    /// Names that programs use for what is not whole yet.
    pub(super) fn is_temporary(&self) -> bool {
        name::is_temporary(&self.state().name)
    }

    /// Why closing it makes no snapshot: nobody would want one of it.
    async fn reason_against(self: &Arc<Self>) -> Result<Option<String>> {
        let (files, staged, len) = {
            let state = self.state();
            if state.len == 0 && state.is_dirty() {
                return Ok(Some(EMPTY.to_owned()));
            }
            let Some(layer) = state.layers.last() else { return Ok(None) };
            let is_over = state.layers.len() > 1 || state.base.is_some();
            if layer.frozen || (is_over && !layer.marks.cut_off) {
                return Ok(None);
            }
            (Arc::clone(&layer.files), layer.marks.staged.clone(), state.len)
        };
        let directory = self.directory.clone();
        let only_zeros = blocking(move || {
            let mut buffer = BlockBuffer::block();
            for index in staged {
                let start = BlockIndex(index).offset();
                if start >= len {
                    break;
                }
                read_padded(&files.data, &mut buffer, start)?;
                if buffer[..] != crate::model::zeros()[..] {
                    return Ok(false);
                }
            }
            Ok::<_, std::io::Error>(true)
        })
        .await
        .map_err(|e| Error::io("read", &directory, e))?;
        let notice = "it holds nothing but zeros: no snapshot was made; `fspfs commit` makes one";
        Ok(only_zeros.then(|| notice.to_owned()))
    }

    /// Makes a generation, so that there is something to commit.
    async fn touch(self: &Arc<Self>) -> Result<()> {
        let _alone = self.gate.write().await;
        self.ensure_active().await.map(drop)
    }

    /// Freezes what was written, and starts to commit it; while another commit is before it, it only waits for
    /// its turn.
    ///
    /// `durable` makes what is staged durable first: where nobody waits for the snapshot.
    pub(super) async fn begin_commit(self: &Arc<Self>, durable: bool, by: By) -> Result<Begun> {
        let _alone = self.gate.write().await;
        let _starting = Starting::new(self);
        let in_vain = {
            let mut state = self.state();
            state.layers.is_empty() && state.phase.forget_trouble()
        };
        if in_vain {
            // What went wrong had changed nothing.
            self.recorded(false).await?;
        }
        let (commit, running, behind, before, ready) = {
            let mut state = self.state();
            if state.removed {
                return Ok(Begun::Nothing);
            }
            let (len, name, wishes) = (state.len, state.name.clone(), state.wishes.clone());
            let (running, behind) = (state.phase.is_committing(), state.layers.len() > 1);
            let Some(layer) = state.layers.last_mut() else {
                state.phase.forget_trouble();
                return Ok(Begun::Nothing);
            };
            let (before, was_frozen) = (layer.queued, layer.frozen);
            let ready = if behind { layer.is_queued_as_it_is() } else { was_frozen };
            if behind {
                layer.queue(by);
            } else if !was_frozen {
                layer.freeze(len, name, wishes);
            } else if !running {
                layer.commit = Arc::default();
            }
            if let By::Name { as_is } = by
                && !(was_frozen && running)
            {
                layer.commit.is_known.store(true, Ordering::Relaxed);
                layer.commit.as_is.fetch_or(as_is, Ordering::Relaxed);
            }
            (Arc::clone(&layer.commit), running, behind, before, ready)
        };
        if !behind {
            self.make_known(&commit);
        }
        if !ready
            && let Err(error) = self.prepare(&commit, durable || behind || before.is_some()).await
        {
            let mut state = self.state();
            if let Some(layer) = state.layer_of(&commit) {
                (layer.frozen, layer.queued) = (false, before);
            }
            if before.is_none() {
                commit.end_if_open(&error);
            }
            // Who cancelled what did not begin has not cancelled what comes next.
            if !state.phase.is_committing()
                && let Some(layer) = state.layers.first_mut()
            {
                layer.commit = Arc::default();
            }
            return Err(error);
        }
        self.go_on_with(&commit);
        Ok(if running && behind { Begun::Queued(commit) } else { Begun::Running(commit) })
    }

    /// Makes durable what the snapshot will be, or that one is to be made; `data` says that of what is staged, too.
    /// The caller holds the gate alone.
    async fn prepare(self: &Arc<Self>, commit: &Arc<Commit>, data: bool) -> Result<()> {
        let (image, of) = (Arc::clone(self), Arc::clone(commit));
        blocking(move || {
            // The image may be removed meanwhile.
            let staged =
                image.state().layer_of(&of).filter(|_| data).map(|layer| {
                    (Arc::clone(&layer.files), &layer.marks.staged - &layer.marks.hashed)
                });
            if let Some((files, hash)) = staged {
                // Nothing of it is anywhere else for a while.
                for index in hash {
                    image.vouch(&files, index)?;
                }
                files.sync().map_err(|e| Error::io("stage in", &image.directory, e))?;
                if let Some(layer) = image.state().layer_of(&of) {
                    layer.durable = true;
                }
            }
            image.record(true)
        })
        .await
    }

    /// The commit whose turn it is: of what is frozen, or of what waited for that. Ends the run if there is none.
    pub(super) async fn next_turn(self: &Arc<Self>) -> Result<Option<Arc<Commit>>> {
        let _alone = self.gate.write().await;
        let commit = {
            let mut state = self.state();
            match state.layers.first() {
                Some(layer) if layer.frozen => return Ok(Some(Arc::clone(&layer.commit))),
                Some(layer) if layer.queued.is_some() => Arc::clone(&layer.commit),
                _ => {
                    state.phase.end();
                    return Ok(None);
                }
            }
        };
        if !commit.as_is.load(Ordering::Relaxed)
            && let Err(error) = self.check_uncut().await
        {
            let commit = {
                let mut state = self.state();
                state.phase.end();
                state.layer_of(&commit).map(|layer| {
                    layer.queued = None;
                    std::mem::take(&mut layer.commit)
                })
            };
            if let Err(error) = self.recorded(true).await {
                tracing::error!("{error}");
            }
            if let Some(commit) = commit {
                commit.end_if_open(&error);
            }
            return Ok(None);
        }
        {
            let mut state = self.state();
            let (len, name, wishes) = (state.len, state.name.clone(), state.wishes.clone());
            if let Some(layer) = state.layer_of(&commit) {
                layer.freeze(len, name, wishes);
            }
        }
        self.prepare(&commit, true).await?;
        Ok(Some(commit))
    }

    /// Checks that nothing was cut short since a commit was asked for.
    async fn check_uncut(self: &Arc<Self>) -> Result<()> {
        self.check_whole(false).await?;
        match self.state().phase.trouble() {
            Some(Trouble::Interrupted(why)) => Err(Error::Interrupted(why)),
            _ => Ok(()),
        }
    }
}

impl WorkingImage {
    /// Tells of a commit, once, unless somebody sees to it.
    pub(super) fn make_known(&self, commit: &Arc<Commit>) {
        if !commit.is_known.swap(true, Ordering::Relaxed)
            && let Some(watch) = self.shop.watch.get()
        {
            watch.commit_begins(&self.name(), commit);
        }
    }
}

fn is_of(layer: &Layer, commit: &Arc<Commit>) -> bool {
    Arc::ptr_eq(&layer.commit, commit)
}

impl Inner {
    /// The generation that is committed by this; `None` once it is a snapshot.
    pub(super) fn layer_of(&mut self, commit: &Arc<Commit>) -> Option<&mut Layer> {
        self.layers.iter_mut().find(|layer| is_of(layer, commit))
    }
}

/// A commit that is about to begin: the end of the mount waits for it, whatever becomes of it.
struct Starting(Arc<WorkingImage>);

impl Starting {
    fn new(image: &Arc<WorkingImage>) -> Self {
        image.state().starting += 1;
        Self(Arc::clone(image))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.0.state().starting -= 1;
    }
}
