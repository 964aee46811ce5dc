//! `upload` and `download`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

use super::output::{self, Output};
use super::run::{Exit, contains, store_options, store_url, tell_cost};
use super::{DownloadArgs, EncryptedHoles, Global, ResumeArgs, UploadArgs};
use crate::model::{BLOCK_SIZE_U64, NAME_TAG, SnapshotState, Tags};
use crate::ops::download::Download;
use crate::ops::upload::Upload;
use crate::ops::{Error, Left, Resume};
use crate::store::{SharedStore, StoreUrl, Stores};
use crate::transfer;
use crate::transfer::engine::Run;

/// Where the journals of all transfers are.
pub(super) fn journals() -> PathBuf {
    crate::mount::state_directory().join("transfers")
}

fn resume(url: &StoreUrl, store: &SharedStore, args: &ResumeArgs) -> anyhow::Result<Resume> {
    let ResumeArgs { restart, suppress_writes } = *args;
    let journals = (!suppress_writes).then(journals);
    let store = format!("{} {}", url.absolute()?, store.place()).trim_end().to_owned();
    Ok(Resume { journals, store, restart })
}

pub(super) async fn upload(
    global: &Global,
    stores: &Stores,
    out: Output,
    args: &UploadArgs,
) -> anyhow::Result<Exit> {
    let url = store_url(global);
    let store = stores.open(&url, &store_options(global, None)).await?;
    let mut tags: Tags = args.tags.iter().cloned().collect();
    if let Some(name) = &args.name {
        tags.insert(NAME_TAG.to_owned(), name.clone());
    }
    let operation = Upload {
        path: args.path.clone(),
        parent: args.parent_snapshot_id.clone(),
        description: args.description.clone(),
        tags,
        volume_id: args.volume_id.clone(),
        full_copy: args.full_copy,
        encrypted: args.encrypted,
        kms_key: args.kms_key_id.clone(),
        encrypted_holes: args.encrypted_holes == EncryptedHoles::Write,
        resume: resume(&url, &store, &args.resume)?,
    };
    let file = args.path.display().to_string();
    let run = Run { progress: out.progress("Uploading"), ..Run::default() };
    let signals = Signals::watch(&run)?;
    let uploaded = async {
        let opened = operation.open().await?;
        let (len, chunks) = (opened.source_len(), opened.source_len().div_ceil(BLOCK_SIZE_U64));
        // A closed pipe shows again when the result is printed.
        let _ = out.line(format_args!("Size of {file} is {len} bytes and {chunks} chunks"));
        opened.run(store.clone(), &run).await
    };
    let done = signals.explained(uploaded.await, &url, format_args!("cannot upload {file}"))?;
    drop(run);
    if !done.unchanged {
        out.note(format_args!(
            "{file} was written to while it was read: the snapshot may hold a mixture"
        ));
    }
    tell_kept(out, done.kept, "uploaded");
    out.line(format_args!("{file} {}", output::rate(done.elapsed, done.blocks * BLOCK_SIZE_U64)))?;
    out.line(format_args!("Total chunks uploaded {}", done.blocks))?;
    tell_cost(out, &store);
    if done.snapshot.state == SnapshotState::Pending {
        out.note(format_args!("{} is pending until EBS has processed it", done.snapshot.id));
    }
    out.result(&done.snapshot, || vec![done.snapshot.id.to_string()])?;
    Ok(Exit::Done)
}

pub(super) async fn download(
    global: &Global,
    stores: &Stores,
    out: Output,
    args: &DownloadArgs,
) -> anyhow::Result<Exit> {
    let url = store_url(global);
    let store = stores.open(&url, &store_options(global, None)).await?;
    let operation = Download {
        id: args.snapshot.clone(),
        path: args.path.clone(),
        not_in: url.directory().ok().map(Path::to_owned),
        resume: resume(&url, &store, &args.resume)?,
    };
    let run = Run { progress: out.progress("Downloading"), ..Run::default() };
    let signals = Signals::watch(&run)?;
    let doing = format_args!("cannot download {} to {}", args.snapshot, args.path.display());
    let done = signals.explained(operation.run(store.clone(), &run).await, &url, doing)?;
    drop(run);
    let id = &done.snapshot.id;
    if let Some(why) = &done.snapshot.state_message {
        out.note(format_args!("{id} may be longer than what it was made from: {why}"));
    }
    tell_kept(out, done.kept, "downloaded");
    out.line(contains(id, done.blocks, done.elapsed.as_secs_f64()))?;
    let zeros = done.snapshot.zero_blocks.unwrap_or(0);
    let bytes = done.blocks.saturating_sub(zeros) * BLOCK_SIZE_U64;
    out.line(format_args!("download {}", output::rate(done.elapsed, bytes)))?;
    tell_cost(out, &store);
    out.result(&done.snapshot, || vec![id.to_string()])?;
    Ok(Exit::Done)
}

fn tell_kept(out: Output, kept: u64, done: &str) {
    if kept > 0 {
        out.note(format_args!("{kept} chunks were {done} before"));
    }
}

/// Signals that stop a transfer, so that it can go on later; the second one gives it up.
struct Signals {
    first: Arc<OnceLock<&'static str>>,
    _watch: AbortOnDropHandle<()>,
}

impl Signals {
    fn watch(run: &Run) -> std::io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let (stop, cancel) = (run.stop.clone(), run.cancel.clone());
        let first = Arc::<OnceLock<_>>::default();
        let seen = Arc::clone(&first);
        let watch = tokio::spawn(async move {
            for token in [stop, cancel] {
                let name = tokio::select! {
                    _ = interrupt.recv() => "SIGINT",
                    _ = terminate.recv() => "SIGTERM",
                };
                seen.get_or_init(|| name);
                token.cancel();
            }
        });
        Ok(Self { first, _watch: AbortOnDropHandle::new(watch) })
    }

    /// What came of a transfer; where it can go on, how.
    fn explained<T>(
        &self,
        result: Result<T, Error>,
        store: &StoreUrl,
        doing: fmt::Arguments<'_>,
    ) -> anyhow::Result<T> {
        let (cause, left) = match result {
            Ok(done) => return Ok(done),
            Err(Error::Unfinished { cause, left }) => (*cause, Some(left)),
            Err(error) => (error, None),
        };
        let cause = match (cause, self.first.get()) {
            (
                Error::Transfer(transfer::Error::Stopped | transfer::Error::Cancelled),
                Some(name),
            ) => Error::Interrupted(name),
            (cause, _) => cause,
        };
        let error = anyhow::Error::from(cause).context(doing.to_string());
        Err(match left {
            None => error,
            Some(left) => anyhow::anyhow!("{error:#}\n{}", how_to_go_on(&left, store)),
        })
    }
}

/// The commands that go on and that give up.
fn how_to_go_on(left: &Left, store: &StoreUrl) -> String {
    let words: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let quoted = |words: &[&str]| shlex::try_join(words.iter().copied()).unwrap_or_default();
    // What was begun anew is what it goes on with.
    let this: Vec<&str> = words.iter().map(String::as_str).filter(|w| *w != "--restart").collect();
    let goes_on = format!("  goes on:  {}", quoted(&this));
    match left {
        Left::Snapshot(id) => {
            let program = this.first().copied().unwrap_or("fspfs");
            let gives_up = quoted(&[program, "-s", &store.to_string(), "delete", id.as_str()]);
            format!("{id} stays pending\n{goes_on}\n  gives up: {gives_up}")
        }
        Left::Asked => {
            format!("a snapshot may have been started; if so, `fspfs list` shows it\n{goes_on}")
        }
        Left::Partial(path) => {
            let gives_up = quoted(&["rm", &path.to_string_lossy()]);
            format!("what is there is kept\n{goes_on}\n  gives up: {gives_up}")
        }
        Left::Device(path) => {
            format!("{} holds a part of the image, and is none yet\n{goes_on}", path.display())
        }
    }
}
