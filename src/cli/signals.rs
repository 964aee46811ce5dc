//! Signals that stop an operation, and what is said then.

use std::sync::{Arc, OnceLock};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

use crate::ops::{Error, Left};
use crate::store::StoreUrl;
use crate::transfer;
use crate::transfer::engine::Run;

/// Signals that stop a transfer, so that it can go on later; the second one gives it up.
pub(super) struct Signals {
    first: Arc<OnceLock<&'static str>>,
    _watch: AbortOnDropHandle<()>,
}

impl Signals {
    pub(super) fn watch(run: &Run) -> std::io::Result<Self> {
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

    /// Why an operation ended; where it can go on, how.
    pub(super) fn explained(&self, error: Error, store: &StoreUrl) -> anyhow::Error {
        let (mut doing, mut left, mut cause) = (Vec::new(), None, error);
        // An operation may be a part of another one.
        let cause = loop {
            cause = match cause {
                Error::Doing { doing: this, cause } => {
                    doing.push(this);
                    *cause
                }
                Error::Unfinished { cause, left: this } => {
                    left.get_or_insert(this);
                    *cause
                }
                cause => break cause,
            };
        };
        let cause = match (cause, self.first.get()) {
            (
                Error::Transfer(transfer::Error::Stopped | transfer::Error::Cancelled),
                Some(name),
            ) => Error::Interrupted(name),
            (cause, _) => cause,
        };
        let within = |error: anyhow::Error, doing| error.context(format!("cannot {doing}"));
        let error = doing.into_iter().rev().fold(anyhow::Error::from(cause), within);
        match left {
            None => error,
            Some(left) => anyhow::anyhow!("{error:#}\n{}", how_to_go_on(&left, store)),
        }
    }

    /// Waits for something, unless a signal comes first.
    pub(super) async fn unless_signalled<T>(work: impl Future<Output = T>) -> Result<T, Error> {
        let run = Run::default();
        let signals = Self::watch(&run)?;
        let ended = run.unless_stopped(work).await;
        ended.map_err(|_| Error::Interrupted(signals.first.get().copied().unwrap_or("a signal")))
    }
}

/// The commands that go on and that give up.
fn how_to_go_on(left: &Left, store: &StoreUrl) -> String {
    let words: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let quoted = |words: &[&str]| shlex::try_join(words.iter().copied()).unwrap_or_default();
    // What was begun anew is what it goes on with.
    let this: Vec<&str> = words.iter().map(String::as_str).filter(|w| *w != "--restart").collect();
    let program = this.first().copied().unwrap_or("fspfs");
    let all = match left {
        Left::Several(all) => all,
        one => std::slice::from_ref(one),
    };
    let (mut told, mut gives_up, mut partials) = (Vec::new(), Vec::new(), Vec::new());
    for left in all {
        match left {
            Left::Snapshot(id, elsewhere) => {
                let store = elsewhere.as_ref().unwrap_or(store).to_string();
                told.push(format!("{id} stays pending"));
                gives_up.push(quoted(&[program, "-s", &store, "delete", id.as_str()]));
            }
            Left::Asked(elsewhere) => {
                let list = match elsewhere {
                    None => "fspfs list".to_owned(),
                    Some(store) => quoted(&["fspfs", "-s", &store.to_string(), "list"]),
                };
                told.push(format!("a snapshot may have been started; if so, `{list}` shows it"));
            }
            Left::Partial(path) => partials.push(path.to_string_lossy()),
            Left::Device(path) => {
                told.push(format!("{} holds a part of the image, and is none yet", path.display()));
            }
            Left::Several(_) => told.push(how_to_go_on(left, store)),
        }
    }
    if !partials.is_empty() {
        told.push("what is there is kept".to_owned());
        let rm = std::iter::once("rm").chain(partials.iter().map(AsRef::as_ref));
        gives_up.push(quoted(&rm.collect::<Vec<_>>()));
    }
    told.push(format!("  goes on:  {}", quoted(&this)));
    told.extend(gives_up.iter().map(|command| format!("  gives up: {command}")));
    told.join("\n")
}
