//! Hashing the blocks of many tasks at once.
//!
//! The rounds of one SHA-256 wait for each other and leave most of a core idle; a core that hashes
//! sixteen messages side by side takes about half the time for each. So a task that has a block which no
//! program waits for leaves it here. A thread takes what has come; if so many are on their way that
//! there may soon be enough for a full round, it waits for them a little.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot::{Sender, channel};

use crate::model::{Block, Digest};

/// How long a block waits for others at most. Where so many are on their way the network takes longer.
const LINGER: Duration = Duration::from_millis(10);

static QUEUE: Queue = Queue {
    state: Mutex::new(State { coming: 0, waiting: VecDeque::new(), threads: 0, busy: 0 }),
    work: Condvar::new(),
};

struct Queue {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    /// Blocks that will be here soon.
    coming: usize,
    waiting: VecDeque<Waiting>,
    /// Those that there are; they stay.
    threads: usize,
    /// Those that hash.
    busy: usize,
}

struct Waiting {
    bytes: Bytes,
    since: Instant,
    done: Sender<Block>,
}

/// A block that will be hashed, and is still to come.
#[derive(Debug)]
pub(crate) struct Coming(());

impl Coming {
    /// One more.
    pub(crate) fn new() -> Self {
        QUEUE.state().coming += 1;
        Self(())
    }

    /// Hashes `bytes` into a block, with those of other tasks.
    ///
    /// # Panics
    ///
    /// If they are not as many as a block has.
    pub(crate) async fn hash(self, bytes: Bytes) -> Block {
        drop(self);
        let (done, hashed) = channel();
        let waiting = Waiting { bytes: bytes.clone(), since: Instant::now(), done };
        let block = if QUEUE.push(waiting) { hashed.await.ok() } else { None };
        block.unwrap_or_else(|| Block::new(bytes))
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        QUEUE.state().coming -= 1;
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False if nobody would take it.
    fn push(&'static self, block: Waiting) -> bool {
        let mut state = self.state();
        if state.needs_thread() {
            let thread = std::thread::Builder::new().name("hasher".to_owned());
            match thread.spawn(|| self.hash_all()) {
                Ok(_) => state.threads += 1,
                Err(error) if state.threads == 0 => {
                    tracing::debug!("hashing without a thread of its own: {error}");
                    return false;
                }
                Err(_) => {}
            }
        }
        state.waiting.push_back(block);
        // The first one sets the clock.
        if state.busy == 0 && state.waiting.len() == 1 || state.is_full() {
            self.work.notify_one();
        }
        true
    }

    /// Never ends.
    fn hash_all(&self) {
        loop {
            let taken = self.take();
            // Who is not answered hashes for itself.
            let _ = catch_unwind(AssertUnwindSafe(|| hash(taken)));
            self.state().busy -= 1;
        }
    }

    /// Waits until there is something to hash.
    fn take(&self) -> Vec<Waiting> {
        let mut state = self.state();
        loop {
            let left = match state.waiting.front() {
                _ if state.is_full() => Some(Duration::ZERO),
                Some(first) if state.busy == 0 && state.may_be_full_soon() => {
                    Some(LINGER.saturating_sub(first.since.elapsed()))
                }
                // One thread is enough for less than a full round.
                Some(_) if state.busy == 0 => Some(Duration::ZERO),
                _ => None,
            };
            state = match left {
                Some(Duration::ZERO) => break,
                Some(left) => {
                    let waited = self.work.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        state.busy += 1;
        let count = state.waiting.len().min(Digest::lanes());
        state.waiting.drain(..count).collect()
    }
}

impl State {
    fn is_full(&self) -> bool {
        self.waiting.len() >= Digest::lanes()
    }

    fn may_be_full_soon(&self) -> bool {
        self.waiting.len() + self.coming >= Digest::lanes()
    }

    fn needs_thread(&self) -> bool {
        let most = || std::thread::available_parallelism().map_or(1, usize::from);
        match self.threads {
            0 => true,
            threads => threads == self.busy && self.is_full() && threads < most(),
        }
    }
}

fn hash(taken: Vec<Waiting>) {
    let wanted = taken.into_iter().filter(|block| !block.done.is_closed());
    let (bytes, done): (Vec<_>, Vec<_>) = wanted.map(|w| (w.bytes, w.done)).unzip();
    for (done, block) in done.into_iter().zip(Block::many(bytes)) {
        // Nobody may want it any more.
        let _ = done.send(block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::BLOCK_SIZE;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn every_task_gets_its_own_block() {
        let bytes = |n: u8| Bytes::from(vec![n; BLOCK_SIZE]);
        for company in [0, 1000] {
            let others: Vec<_> = (0..company).map(|_| Coming::new()).collect();
            let hashed = |n| async move { (n, Coming::new().hash(bytes(n)).await) };
            let tasks: Vec<_> = (0..100).map(|n| tokio::spawn(hashed(n))).collect();
            for task in tasks {
                let (n, hashed) = task.await.unwrap();
                assert_eq!(hashed, Block::new(bytes(n)), "{n}");
            }
            drop(others);
        }
    }

    #[tokio::test]
    async fn whoever_goes_away_keeps_nobody_waiting() {
        let bytes = Bytes::from(vec![1; BLOCK_SIZE]);
        for _ in 0..100 {
            let gone = tokio::spawn(Coming::new().hash(bytes.clone()));
            tokio::task::yield_now().await;
            gone.abort();
            drop(Coming::new());
        }
        assert_eq!(Coming::new().hash(bytes.clone()).await, Block::new(bytes));
    }
}
