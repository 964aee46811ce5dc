//! Commits that are under way, one after the other.

use std::sync::Arc;
use std::time::Duration;

use super::base::Base;
use super::commit::DIED;
use super::layer::Commit;
use super::put::{Put, in_time};
use super::{Error, Inner, Result, Trouble, WorkingImage};
use crate::blocking::blocking;
use crate::model::{Snapshot, SnapshotState};
use crate::store::ErrorKind;

/// How long the store is asked anew whether it has completed a snapshot: at first, and at most.
pub(super) const ASK_FIRST: Duration = Duration::from_millis(100);
const ASK_AT_MOST: Duration = Duration::from_secs(10);

impl WorkingImage {
    /// Commits what is frozen, in the background, if that is not under way.
    pub(super) fn go_on(self: &Arc<Self>) {
        let begun = self.state().phase.begin();
        self.run_commits(begun);
    }

    /// The same, unless `commit` has ended: a run that ends takes those with it that wait for it.
    pub(super) fn go_on_with(self: &Arc<Self>, commit: &Arc<Commit>) {
        let begun = {
            let mut state = self.state();
            if state.layer_of(commit).is_none() {
                return;
            }
            state.phase.begin()
        };
        self.run_commits(begun);
    }

    /// Runs the commits that have begun under this number.
    fn run_commits(self: &Arc<Self>, begun: Option<u64>) {
        if let Some(number) = begun {
            let run = Run { image: Arc::clone(self), number };
            tokio::spawn(async move {
                let image = &run.image;
                let commits = tokio::spawn(Arc::clone(image).commit_all());
                if commits.await.is_err() {
                    image.fail(Error::Interrupted(DIED.to_owned())).await;
                }
                image.tidy();
            });
        }
    }

    /// Commits what is frozen, and then what waits for that.
    async fn commit_all(self: Arc<Self>) {
        loop {
            let commit = match self.next_turn().await {
                Ok(Some(commit)) => commit,
                Ok(None) => break,
                Err(error) => {
                    self.fail(error).await;
                    break;
                }
            };
            self.make_known(&commit);
            if let Err(error) = self.commit_lowest(&commit).await {
                self.fail(error).await;
                break;
            }
        }
    }

    /// Commits the lowest generation, waits until the store is done with it, and lets go of it.
    async fn commit_lowest(self: &Arc<Self>, commit: &Arc<Commit>) -> Result<()> {
        let put = Put { image: Arc::clone(self), commit: Arc::clone(commit) };
        let snapshot = tokio::select! {
            biased;
            () = commit.cancel.notified() => return Err(Error::Cancelled),
            snapshot = put.run() => snapshot?,
        };
        tracing::info!("{} is {}", self.name(), snapshot.id);
        let committed_as = {
            let mut state = self.state();
            state.snapshot = Some(snapshot.id.clone());
            state.lowest().attempt.as_ref().map(|attempt| attempt.name.clone())
        };
        // It may have been renamed meanwhile.
        if let Some(name) = committed_as {
            self.rename_snapshot(snapshot.id.clone(), &name);
        }
        let id = snapshot.id.clone();
        if snapshot.state == SnapshotState::Completed {
            // Who waited for it finds that it takes no room any more.
            self.rebase(snapshot).await;
            commit.end(Ok(id));
        } else {
            commit.end(Ok(id));
            let completed = self.completed(snapshot).await?;
            self.rebase(completed).await;
        }
        Ok(())
    }

    async fn completed(&self, snapshot: Snapshot) -> Result<Snapshot> {
        let (id, mut snapshot, mut pause) = (snapshot.id.clone(), snapshot, ASK_FIRST);
        loop {
            match snapshot.state {
                SnapshotState::Completed => return Ok(snapshot),
                SnapshotState::Error | SnapshotState::Archived => {
                    let why =
                        snapshot.state_message.unwrap_or_else(|| "it does not say why".to_owned());
                    let message = format!("the store could not complete {id}: {why}");
                    return Err(crate::store::Error::new(ErrorKind::Unavailable, message).into());
                }
                SnapshotState::Pending => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(ASK_AT_MOST);
            match in_time(self.shop.store.describe(&id)).await {
                Ok(now) => snapshot = now,
                // Somebody deleted it before it was done.
                Err(Error::Store(error)) if error.kind() == ErrorKind::NotFound => {
                    return Err(error.into());
                }
                Err(error) => tracing::warn!("cannot tell whether {id} is completed: {error}"),
            }
        }
    }

    /// Makes the snapshot the base, and lets go of the generation that it was made of.
    async fn rebase(self: &Arc<Self>, snapshot: Snapshot) {
        let base = Base::from(self.shop.image(snapshot));
        let layer = {
            let mut state = self.state();
            state.base = base;
            // Its parent was for the first snapshot.
            state.wishes.parent = None;
            state.layers.remove(0)
        };
        let image = Arc::clone(self);
        blocking(move || {
            // The document first: it must not speak of files that are gone.
            match image.record(true) {
                Ok(()) => layer.files.remove(),
                Err(error) => tracing::error!("{error}"),
            }
            image.shop.staging.give_back(layer.marks.staged.len());
        })
        .await;
    }

    /// Keeps what could not be committed.
    pub(super) async fn fail(self: &Arc<Self>, error: Error) {
        let name = self.name();
        let cancelled = matches!(error, Error::Cancelled);
        tracing::error!("{name} could not be committed: {error}");
        let abort = {
            let mut state = self.state();
            state.layers.first_mut().filter(|_| cancelled).and_then(|layer| {
                let abort = layer.pending();
                layer.renew();
                abort
            })
        };
        if let Some(id) = abort {
            self.abort(&id).await;
        }
        let image = Arc::clone(self);
        let kept = blocking(move || {
            let (files, hash) = {
                let state = image.state();
                let Some(layer) = state.layers.first() else { return Ok(()) };
                let hash = &layer.marks.staged - &layer.marks.hashed;
                (Arc::clone(&layer.files), hash)
            };
            for index in hash {
                image.vouch(&files, index)?;
            }
            files.sync().map_err(|e| Error::io("stage in", &image.directory, e))
        })
        .await;
        if let Err(error) = &kept {
            tracing::error!("what is staged of {name} may not survive a power cut: {error}");
        }
        let trouble = if cancelled { Trouble::Interrupted } else { Trouble::Failed };
        let commits = self.state().stop(trouble(error.to_string()), kept.is_ok());
        if let Err(error) = self.recorded(true).await {
            tracing::error!("{error}");
        }
        for commit in commits {
            commit.end_if_open(&error);
        }
    }
}

/// Commits that are under way, one after the other. Whatever becomes of them, they are not when this
/// is dropped, and whoever waits for one is told.
pub(super) struct Run {
    pub(super) image: Arc<WorkingImage>,
    pub(super) number: u64,
}

impl Drop for Run {
    fn drop(&mut self) {
        let commits = {
            let mut state = self.image.state();
            // Another run may have begun since this one came to its end.
            if state.phase.run() != Some(self.number) {
                return;
            }
            state.stop(Trouble::Failed(DIED.to_owned()), false)
        };
        for commit in commits {
            commit.end_if_open(&Error::Interrupted(DIED.to_owned()));
        }
    }
}

impl Inner {
    /// Ends a run of commits that went wrong; the commits that were to be made.
    fn stop(&mut self, trouble: Trouble, durable: bool) -> Vec<Arc<Commit>> {
        self.phase.end();
        let is_under_another = self.layers.len() > 1;
        // What was not frozen was not to be committed.
        if let Some(layer) = self.layers.first_mut().filter(|layer| layer.frozen) {
            // With another one over it, it stays what that one is over.
            layer.frozen = is_under_another;
            layer.durable = durable;
            self.phase = trouble.into();
        }
        self.layers.iter_mut().map(|layer| std::mem::take(&mut layer.commit)).collect()
    }

    /// The commit that puts blocks, if there is one.
    pub(super) fn putting(&self) -> Option<&Arc<Commit>> {
        let running = self.phase.is_committing();
        let wanted = self.layers.iter().filter(|layer| running && layer.is_wanted());
        wanted.map(|layer| &layer.commit).find(|commit| commit.outcome.borrow().is_none())
    }
}
