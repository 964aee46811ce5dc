//! A snapshot that is begun, or that of an earlier run that goes on: for all operations that make one.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::{Ending, Error, Left, Result, Resume};
use crate::model::{BlockIndex, Digest, Snapshot, SnapshotId, SnapshotState};
use crate::store::{self, ErrorKind, SharedStore, StartRequest, StoreUrl};
use crate::transfer;
use crate::transfer::engine::{Destination, Finished, Run, transfer_to};
use crate::transfer::journal::{Ends, FileJournal, Journal, NoJournal};
use crate::transfer::sink::snapshot::{SnapshotSink, Zeros, abort};
use crate::transfer::source::Source;

/// How long an operation that is stopped while it begins waits for the id of its snapshot.
const STARTING: Duration = Duration::from_secs(10);

/// What a snapshot is made of, and how. A run goes on with what an earlier one has left if `T` is as it was.
#[derive(Debug)]
pub(super) struct Begin<T> {
    pub(super) source: Arc<dyn Source>,
    /// The source has only what differs from the parent.
    pub(super) is_delta: bool,
    /// Where it is made.
    pub(super) store: SharedStore,
    /// That store, if it is not the one of `-s`.
    pub(super) elsewhere: Option<StoreUrl>,
    pub(super) request: StartRequest,
    /// What is put of what reads as zeros; holes only if the store has encrypted the snapshot.
    pub(super) zeros: Zeros,
    /// The name of its journal.
    pub(super) ends: Ends,
    pub(super) resume: Resume,
    /// What tells whether the source is what it was.
    pub(super) as_it_was: T,
    /// The source, in words.
    pub(super) what: &'static str,
}

/// What was made.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) snapshot: Snapshot,
    /// Blocks that were put.
    pub(super) blocks: u64,
    /// Those of them that an earlier run had put.
    kept: u64,
    /// Blocks that were read from the parent, to compare.
    compared: u64,
}

impl Made {
    /// One that an earlier run has made.
    pub(super) fn before(snapshot: Snapshot) -> Self {
        Self { snapshot, blocks: 0, kept: 0, compared: 0 }
    }

    /// What came of a transfer.
    ///
    /// # Errors
    ///
    /// What has ended it, with what is left.
    pub(super) fn of(finished: transfer::Result<Finished>, ending: Ending) -> Result<Self> {
        let Finished { blocks, kept, compared, snapshot } =
            finished.map_err(|error| ending.explain(error))?;
        Ok(Self { snapshot: snapshot.expect("a snapshot was made"), blocks, kept, compared })
    }

    /// Says what an earlier run had `done`, and what was read beside the source; behind `place` if there are several.
    pub(super) fn tell(&self, cx: &Context, place: Option<&str>, done: &str) {
        let place = place.map(|place| format!("{place}: ")).unwrap_or_default();
        if self.kept > 0 {
            cx.note(format_args!("{place}{} chunks were {done} before", self.kept));
        }
        if self.compared > 0 {
            let compared = self.compared;
            cx.note(format_args!("{place}{compared} chunks of the parent were read to compare"));
        }
    }
}

/// A snapshot that can be put to.
#[derive(Debug)]
pub(super) enum Prepared {
    /// An earlier run has made it.
    Made(Box<Snapshot>),
    /// It is pending.
    Begun { destination: Destination, ending: Ending },
}

/// What a journal says of a snapshot that is being made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Attempt<T> {
    client_token: String,
    /// What the snapshot was asked for with.
    request: Digest,
    /// What tells whether the source is what it was.
    #[serde(flatten)]
    as_it_was: T,
    /// Known once it is started.
    snapshot: Option<SnapshotId>,
    /// When that was, by the store.
    begun: Option<Timestamp>,
}

impl<T> Begin<T>
where
    T: Clone + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static,
{
    /// Makes it. What ends it before leaves a pending snapshot that the same operation goes on with, if there is a
    /// journal and the cause may go away.
    ///
    /// # Errors
    ///
    /// [`Error::Unfinished`] if it can go on; else there is no snapshot.
    pub(super) async fn run(&self, run: &Run) -> Result<Made> {
        // Only a store that needs a flush gathers blocks before it writes them.
        let _turn = match self.store.needs_flush() {
            true => Some(run.unless_stopped(run.memory.turn()).await?),
            false => None,
        };
        self.run_in_turn(run).await
    }

    /// The same for one who has the turn.
    pub(super) async fn run_in_turn(&self, run: &Run) -> Result<Made> {
        let mut goes_on = false;
        match self.attempt(run, &mut goes_on).await {
            // What was begun before is gone, or takes nothing more.
            Err(Error::Transfer(error))
                if goes_on
                    && matches!(error.kind(), Some(ErrorKind::Conflict | ErrorKind::NotFound)) =>
            {
                tracing::warn!("beginning anew: {error}");
                self.attempt(run, &mut goes_on).await
            }
            made => made,
        }
    }

    /// Brings everything to the snapshot of an earlier run, if there is one, else to a new one.
    async fn attempt(&self, run: &Run, goes_on: &mut bool) -> Result<Made> {
        match self.prepare(run, goes_on).await? {
            Prepared::Made(snapshot) => Ok(Made::before(*snapshot)),
            Prepared::Begun { destination: Destination { sink, journal, .. }, ending } => {
                let finished = transfer_to(Arc::clone(&self.source), sink, journal, run).await;
                Made::of(finished, ending)
            }
        }
    }

    /// Starts the snapshot, or takes up that of an earlier run.
    ///
    /// # Errors
    ///
    /// As of [`run`](Self::run).
    pub(super) async fn prepare(&self, run: &Run, goes_on: &mut bool) -> Result<Prepared> {
        let store = &self.store;
        let parent = match &self.request.parent {
            Some(parent) => {
                Some((run.unless_stopped(super::readable(store, parent)).await??, self.is_delta))
            }
            None => None,
        };
        let opened = super::journal(&self.resume, self.ends.clone()).await?;
        let (mut journal, found) = opened.unzip();
        let found: Option<Attempt<T>> = found.flatten();
        *goes_on = found.is_some();
        let start = Starting { begin: self, journal: journal.as_mut(), run };
        let snapshot = start.snapshot(found).await?;
        let journal: Arc<dyn Journal> = match journal {
            Some(journal) => Arc::new(journal),
            None => Arc::new(NoJournal),
        };
        if snapshot.state == SnapshotState::Completed {
            // It was completed by the run before, which did not hear of it.
            journal.forget();
            return Ok(Prepared::Made(Box::new(snapshot)));
        }
        let id = snapshot.id.clone();
        let zeros = Zeros {
            encrypted_holes: snapshot.encrypted && self.zeros.encrypted_holes,
            ..self.zeros
        };
        let sink = SnapshotSink::new(store.clone(), snapshot, parent, zeros, &*self.source).await;
        let sink = match sink {
            Ok(sink) => Arc::new(sink),
            Err(error) => {
                abort(store, &id).await;
                journal.forget();
                return Err(error.into());
            }
        };
        let left = Left::Snapshot(id, self.elsewhere.clone());
        let ending = Ending { journal: Arc::clone(&journal), left };
        let progress = Arc::clone(&run.progress);
        Ok(Prepared::Begun { destination: Destination { sink, journal, progress }, ending })
    }

    /// What an earlier run must have asked for, too.
    fn asked(&self) -> Digest {
        let zeros = (self.zeros.full_copy, self.zeros.encrypted_holes);
        Digest::of(format!("{:?} {zeros:?}", self.request).as_bytes())
    }
}

/// A snapshot that is begun, or goes on.
struct Starting<'a, T> {
    begin: &'a Begin<T>,
    journal: Option<&'a mut FileJournal>,
    run: &'a Run,
}

impl<T> Starting<'_, T>
where
    T: Clone + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static,
{
    /// The snapshot that is put to: that of an earlier run, or a new one.
    async fn snapshot(mut self, found: Option<Attempt<T>>) -> Result<Snapshot> {
        let begin = self.begin;
        let wanted = Attempt {
            client_token: uuid::Uuid::new_v4().simple().to_string(),
            request: begin.asked(),
            as_it_was: begin.as_it_was.clone(),
            snapshot: None,
            begun: None,
        };
        if let Some(found) = found {
            let (client_token, snapshot) = (found.client_token.clone(), found.snapshot.clone());
            let begun = found.begun;
            let is_same = !begin.resume.restart
                && found == Attempt { client_token, snapshot, begun, ..wanted.clone() };
            if let Some(going_on) = self.go_on(found, is_same).await? {
                return Ok(going_on);
            }
        }
        if let Some(journal) = &mut self.journal {
            journal.begin(&wanted);
        }
        self.start(wanted).await
    }

    /// The snapshot of an earlier run, if it takes more.
    async fn go_on(&self, found: Attempt<T>, is_same: bool) -> Result<Option<Snapshot>> {
        let Some(id) = found.snapshot.clone() else {
            // It may have been started without our having heard of it.
            if is_same {
                return self.start(found).await.map(Some);
            }
            tracing::warn!(
                "an earlier run may have left a pending snapshot: `fspfs list` shows it, `fspfs delete` removes it"
            );
            return Ok(None);
        };
        let store = &self.begin.store;
        let described = self.run.unless_stopped(store.describe(&id)).await?;
        let state = match described {
            Ok(snapshot) => snapshot,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                tracing::warn!("{id}, which was begun before, is gone: beginning anew");
                return Ok(None);
            }
            // Nothing can be put to it, and whoever completes it fails.
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!("{id}, which was begun before, is removed: {error}");
                abort(store, &id).await;
                return Ok(None);
            }
            Err(error) => {
                tracing::warn!("{id}, which was begun before, may be pending");
                return Err(error.into());
            }
        };
        // An id that was chosen may be used again.
        if self.begin.request.id.is_some() && found.begun != Some(state.start_time) {
            tracing::warn!("{id}, which was begun before, is gone, and another has its id");
            return Ok(None);
        }
        match state.state {
            SnapshotState::Completed if is_same && !self.begin.source.is_read_again() => {
                tracing::warn!(
                    "{id} was completed by an earlier run, and nothing was changed since"
                );
                return Ok(Some(state));
            }
            SnapshotState::Pending if is_same => {
                tracing::info!("going on with {id}");
                if self.catch_up(&id).await? {
                    return Ok(Some(state));
                }
                abort(store, &id).await;
            }
            SnapshotState::Completed => {
                tracing::warn!("{id} was completed by an earlier run: beginning anew");
            }
            SnapshotState::Pending => {
                let why = match self.begin.resume.restart {
                    true => "--restart".to_owned(),
                    false => format!(
                        "it was begun with other arguments, or before {} was changed",
                        self.begin.what
                    ),
                };
                tracing::warn!("{id} is removed, and it begins anew: {why}");
                abort(store, &id).await;
            }
            SnapshotState::Error | SnapshotState::Archived => {
                let why = state.state_message.unwrap_or_else(|| "it waited too long".to_owned());
                tracing::warn!("{id} takes no more ({why}): beginning anew");
                abort(store, &id).await;
            }
        }
        Ok(None)
    }

    /// Notes what the earlier run has put since it noted something last. Answers whether it can go on: not if that is
    /// damaged.
    async fn catch_up(&self, id: &SnapshotId) -> Result<bool> {
        let Some(journal) = &self.journal else { return Ok(true) };
        let tell = |blocks: &[(BlockIndex, Digest)]| journal.catch_up(blocks);
        let told = self.begin.store.put_before(id, &tell);
        match self.run.unless_stopped(told).await? {
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!("{id} is removed, and it begins anew: {error}");
                return Ok(false);
            }
            Err(error) => tracing::warn!("what {id} has got last may be put again: {error}"),
            Ok(()) => {}
        }
        Ok(true)
    }

    /// Starts a snapshot, in a task of its own: the id of one that is started when nobody waits for it any more
    /// is told all the same.
    async fn start(&self, mut attempt: Attempt<T>) -> Result<Snapshot> {
        let client_token = Some(attempt.client_token.clone());
        let request = StartRequest { client_token, ..self.begin.request.clone() };
        let store = self.begin.store.clone();
        let starting = tokio::spawn(async move { store.start(request).await });
        let too_late = async {
            self.run.stop.cancelled().await;
            let _ = tokio::time::timeout(STARTING, self.run.cancel.cancelled()).await;
        };
        let started = tokio::select! {
            started = starting => started.unwrap_or_else(|e| resume_unwind(e.into_panic())),
            () = too_late => return Err(self.may_be_asked(transfer::Error::Stopped.into())),
        };
        let snapshot: Snapshot = match started {
            Ok(snapshot) => snapshot,
            // It may have been started all the same, and is found by its client token.
            Err(error) if is_unsure(&error) => return Err(self.may_be_asked(error.into())),
            Err(error) => {
                if let Some(journal) = &self.journal {
                    journal.forget();
                }
                return Err(error.into());
            }
        };
        attempt.snapshot = Some(snapshot.id.clone());
        attempt.begun = Some(snapshot.start_time);
        if let Some(journal) = &self.journal {
            journal.update(&attempt);
        }
        Ok(snapshot)
    }

    /// The end of one that may have been started. Only with a journal can it go on.
    fn may_be_asked(&self, cause: Error) -> Error {
        if !self.journal.as_ref().is_some_and(|journal| journal.is_kept()) {
            tracing::warn!("a snapshot may have been started; if so, `fspfs list` shows it");
            return cause;
        }
        let left = Left::Asked(self.begin.elsewhere.clone());
        Error::Unfinished { cause: Box::new(cause), left }
    }
}

/// Whether a request that failed may have been done.
fn is_unsure(error: &store::Error) -> bool {
    matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unavailable)
}
