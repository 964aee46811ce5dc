//! Threads, which the system may refuse to make: then somebody is told so, and nothing panics.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, available_parallelism, scope};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

/// Threads that must be there beside the runtime's own: one that waits for a disk.
const SPARE: usize = 1;

/// How long a thread that may wait for a disk stays without work: to the end. Without any, and where no other can be
/// made, what needs one would wait for it without end.
const STAYS: Duration = Duration::from_secs(u32::MAX as u64);

/// How long the system may take to let go of threads that have ended.
const LETS_GO: Duration = Duration::from_millis(200);

/// A runtime for everything asynchronous, with at most so many threads that may wait for a disk, where there can be
/// so many others beside it.
///
/// # Errors
///
/// If the system makes no thread, or has no descriptor left.
pub(crate) fn runtime(waiting: Option<usize>, beside: usize) -> io::Result<Runtime> {
    // One may wait for a disk.
    let workers = available_parallelism().map_or(2, usize::from).max(2);
    can_start(workers + SPARE + beside)?;
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(waiting) = waiting {
        builder.max_blocking_threads(waiting);
    }
    let runtime = builder.worker_threads(workers).thread_keep_alive(STAYS).enable_all().build()?;
    drop(runtime.spawn_blocking(|| {}));
    Ok(runtime)
}

/// Runs `work` on a thread that nobody waits for.
///
/// # Errors
///
/// If the system makes none.
pub(crate) fn aside(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    Builder::new().spawn(work).map(drop).map_err(|e| explained(&e))
}

/// Looks whether so many threads can be there at once, for what panics where it cannot make its own.
///
/// # Errors
///
/// If they cannot.
pub(crate) fn can_start(threads: usize) -> io::Result<()> {
    let (gate, before) = (Mutex::new(()), tasks());
    let started = scope(|scope| {
        let _closed = gate.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = || drop(gate.lock());
        (0..threads).try_for_each(|_| Builder::new().spawn_scoped(scope, wait).map(drop))
    });
    // One that has ended counts for the system until it has let go of it.
    let end = Instant::now() + LETS_GO;
    while tasks() > before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    started.map_err(|e| explained(&e))
}

/// Threads of this process; none, where that is not told.
fn tasks() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

fn explained(error: &io::Error) -> io::Error {
    let why = format!(
        "cannot start a thread: {error}; `ulimit -u`, or TasksMax= of the unit, allow more"
    );
    io::Error::new(error.kind(), why)
}
