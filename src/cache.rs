//! What was fetched lately, in memory, within one budget of bytes.
//!
//! However many readers want one thing at a time, it is fetched once. A fetch runs in a task of
//! its own: a reader that goes away does not take it along. Errors are handed to all who wait,
//! and kept for a moment only if
//! they took long.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;

use tokio::sync::{Notify, Semaphore, SemaphorePermit, watch};
use tokio::time::Instant;

use self::memory::Memory;
use crate::model::{BLOCK_SIZE, Block, BlockIndex, Digest};
use crate::store::{Error, ErrorKind, ListedBlock, Priority, SharedStore};

mod memory;

/// An error that several readers get.
pub type SharedError = Arc<Error>;

/// Smallest budget that works: a few blocks being fetched while one is being read.
pub const MIN_BUDGET: usize = 16 << 20;

/// Budget unless another is given.
pub const DEFAULT_BUDGET: usize = 256 << 20;

/// Fetches at the same time, at most; each also needs a buffer for the compressed block.
const MAX_FETCHES: usize = 32;

/// The same for a store that is far away, where more of them wait for the network.
const MAX_FAR_FETCHES: usize = 100;

/// Part of the budget that all fetches under way may take.
const FETCH_SHARE: usize = 4;

/// Bytes of replies that are put together at the same time; the blocks that they are made of may
/// have left the cache by then, and are not in the budget either. Further ones wait.
const MAX_REPLIES: usize = 16 << 20;

/// A fetch that takes longer than this before it fails, or before whoever waited for it gives up, is not waited for
/// again at once: the kernel asks a second time for what its read-ahead could not have, and a program would wait
/// twice.
const LONG: Duration = Duration::from_secs(5);
const REMEMBERED: Duration = Duration::from_secs(1);
const MAX_FAILED: NonZeroUsize = NonZeroUsize::new(256).expect("not 0");

/// Blocks that one reader has fetched ahead of it, at most: 32 MiB; or as many as may be fetched at the
/// same time before anybody asks, if these are more.
const MAX_WINDOW: usize = 64;

/// What is cached under which name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// A block of this content, of whatever snapshot.
    Content(Digest),
    /// A block of an image whose digest is not known before it is read.
    Block(ImageKey, BlockIndex),
    /// A span of the listing of an image.
    Listing(ImageKey, u32),
}

/// Tells images apart, also those of a snapshot id that was used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageKey(pub u64);

/// What is cached.
#[derive(Clone, Debug)]
pub enum Value {
    /// A block.
    Block(Block),
    /// The listed blocks of one span, ascending.
    Listing(Arc<Vec<ListedBlock>>),
}

impl Value {
    /// Bytes that it takes, about.
    fn weight(&self) -> usize {
        /// What a key, a node and a list entry take.
        const ENTRY: usize = 256;
        match self {
            Self::Block(Block::Zero) => ENTRY,
            Self::Block(Block::Data { .. }) => ENTRY + BLOCK_SIZE,
            Self::Listing(blocks) => {
                let tokens: usize = blocks.iter().map(|block| block.token.0.len()).sum();
                ENTRY + blocks.capacity() * size_of::<ListedBlock>() + tokens
            }
        }
    }
}

/// Who waits for a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A program that reads.
    Reader,
    /// Nobody yet.
    Prefetch,
}

/// Numbers for `control/metrics`.
#[derive(Debug, Default)]
pub struct CacheMetrics {
    /// Reads of a block or a listing that was in memory.
    pub hits: AtomicU64,
    /// Reads of one that had to be fetched, or was being fetched.
    pub misses: AtomicU64,
    /// Fetches that were begun before anybody asked.
    pub prefetches: AtomicU64,
    /// Fetches under way.
    pub in_flight: AtomicUsize,
}

/// A cache with one budget.
pub struct Cache {
    budget: usize,
    state: Mutex<State>,
    /// One permit a fetch.
    fetches: Semaphore,
    /// One permit a fetch that nobody waits for: fewer, so that readers always find a place.
    prefetches: Semaphore,
    /// Blocks that one reader has fetched ahead of it, at most.
    max_window: usize,
    /// One permit a KiB of replies that are put together from several blocks.
    replies: Semaphore,
    /// Readers that have blocks fetched ahead of them.
    streams: AtomicUsize,
    metrics: CacheMetrics,
}

struct State {
    memory: Memory,
    flights: HashMap<Key, Flight>,
    /// Fetches that failed after a long time, or were waited for in vain, a moment ago.
    failed: LruCache<Key, (Instant, SharedError)>,
}

impl State {
    fn failed_just_now(&mut self, key: &Key) -> Option<SharedError> {
        let (when, error) = self.failed.peek(key)?;
        if when.elapsed() < REMEMBERED {
            return Some(Arc::clone(error));
        }
        self.failed.pop(key);
        None
    }
}

/// A fetch under way.
struct Flight {
    landed: watch::Receiver<Option<Result<Value, SharedError>>>,
    /// Told when a reader joins a prefetch.
    urgent: Arc<Notify>,
    priority: Priority,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl Cache {
    /// A cache that keeps to `budget` bytes, which should be at least [`MIN_BUDGET`].
    pub fn new(budget: usize) -> Arc<Self> {
        Self::with_fetches(budget, MAX_FETCHES)
    }

    /// One for this store.
    pub fn of_store(budget: usize, store: &SharedStore) -> Arc<Self> {
        Self::with_fetches(budget, store.parallelism().clamp(MAX_FETCHES, MAX_FAR_FETCHES))
    }

    fn with_fetches(budget: usize, most: usize) -> Arc<Self> {
        let fetches = (budget / FETCH_SHARE / BLOCK_SIZE).clamp(2, most);
        let ahead = fetches - fetches / 4 - 1;
        Arc::new(Self {
            budget,
            state: Mutex::new(State {
                memory: Memory::new(budget),
                flights: HashMap::new(),
                failed: LruCache::new(MAX_FAILED),
            }),
            fetches: Semaphore::new(fetches),
            prefetches: Semaphore::new(ahead),
            max_window: ahead.max(MAX_WINDOW),
            replies: Semaphore::new(MAX_REPLIES >> 10),
            streams: AtomicUsize::new(0),
            metrics: CacheMetrics::default(),
        })
    }

    /// Numbers for `control/metrics`.
    pub fn metrics(&self) -> &CacheMetrics {
        &self.metrics
    }

    /// Bytes that are cached or being fetched.
    pub fn bytes(&self) -> usize {
        self.state().memory.bytes()
    }

    /// The budget in bytes.
    pub fn budget(&self) -> usize {
        self.budget
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is in memory under this name; never waits.
    pub fn peek(&self, key: &Key) -> Option<Value> {
        self.state().memory.get(key)
    }

    /// Counts a read that [`peek`](Self::peek) could serve.
    pub fn count_hit(&self) {
        self.metrics.hits.fetch_add(1, Ordering::Relaxed);
    }

    /// Puts what was learnt along the way.
    pub fn insert(&self, key: Key, value: Value) {
        let weight = value.weight();
        self.state().memory.insert(key, value, weight);
    }

    /// Forgets what turned out to be of no use any more.
    pub fn remove(&self, key: &Key) {
        self.state().memory.remove(key);
    }

    /// What is cached under `key`, or what `fetch` brings.
    ///
    /// # Errors
    ///
    /// That of the fetch, which may have been begun by another reader.
    pub async fn get<F>(
        self: &Arc<Self>,
        key: Key,
        urgency: Urgency,
        fetch: impl FnOnce() -> F,
    ) -> Result<Value, SharedError>
    where
        F: Future<Output = crate::store::Result<Value>> + Send + 'static,
    {
        let (mut landed, begun) = {
            let mut state = self.state();
            if let Some(value) = state.memory.get(&key) {
                drop(state);
                self.count_hit();
                return Ok(value);
            }
            if urgency == Urgency::Reader {
                self.metrics.misses.fetch_add(1, Ordering::Relaxed);
            }
            if let Some(error) = state.failed_just_now(&key) {
                return Err(error);
            }
            match state.flights.get(&key) {
                Some(flight) => {
                    if urgency == Urgency::Reader {
                        flight.urgent.notify_one();
                        flight.priority.raise();
                    }
                    (flight.landed.clone(), None)
                }
                None => {
                    let (landed, begun) = self.start_fetch(&mut state, key, urgency, fetch());
                    (landed, Some(begun))
                }
            }
        };
        if let Some(begun) = begun {
            tokio::spawn(begun);
        }
        let waiting = Waiting { cache: self, key, since: Instant::now() };
        let landed = landed.wait_for(Option::is_some).await;
        std::mem::forget(waiting);
        match landed.as_deref() {
            Ok(Some(result)) => result.clone(),
            _ => Err(Arc::new(Error::new(ErrorKind::Unavailable, "the fetch was abandoned"))),
        }
    }

    /// Begins to fetch `key`, unless it is there or on its way.
    pub fn prefetch<F>(self: &Arc<Self>, key: Key, fetch: impl FnOnce() -> F)
    where
        F: Future<Output = crate::store::Result<Value>> + Send + 'static,
    {
        let begun = {
            let mut state = self.state();
            if state.memory.contains(&key) || state.flights.contains_key(&key) {
                return;
            }
            self.metrics.prefetches.fetch_add(1, Ordering::Relaxed);
            self.start_fetch(&mut state, key, Urgency::Prefetch, fetch()).1
        };
        tokio::spawn(begun);
    }

    /// A fetch, to be spawned once the state is not locked any more: a runtime that is shut down drops it at once,
    /// and that locks the state.
    fn start_fetch<F>(
        self: &Arc<Self>,
        state: &mut State,
        key: Key,
        urgency: Urgency,
        fetch: F,
    ) -> (
        watch::Receiver<Option<Result<Value, SharedError>>>,
        impl Future<Output = ()> + Send + use<F>,
    )
    where
        F: Future<Output = crate::store::Result<Value>> + Send + 'static,
    {
        let (sender, landed) = watch::channel(None);
        let urgent = Arc::new(Notify::new());
        let priority = match urgency {
            Urgency::Reader => Priority::urgent(),
            Urgency::Prefetch => Priority::background(),
        };
        let told = (Arc::clone(&urgent), priority.clone());
        let flight = Flight { landed: landed.clone(), urgent: told.0, priority: told.1 };
        state.flights.insert(key, flight);
        let landing = Landing { cache: Arc::clone(self), key, sender };
        (landed, priority.scope(landing.run(urgency, urgent, fetch)))
    }

    /// Waits until a reply of `len` bytes may be put together; it may until the permit is dropped.
    pub(crate) async fn reply_room(&self, len: usize) -> Option<SemaphorePermit<'_>> {
        let kib = u32::try_from((len >> 10).clamp(1, MAX_REPLIES >> 10)).expect("it was clamped");
        self.replies.acquire_many(kib).await.ok()
    }

    /// Takes `bytes` of the budget, though never more than five eighths of it, for something else than what
    /// is cached, until the loan is dropped.
    pub(crate) fn lend(self: &Arc<Self>, bytes: usize) -> Loan {
        let bytes = bytes.min(self.budget / 8 * 5);
        self.state().memory.reserve(bytes);
        // What was cached is lent only once the system has it back.
        crate::sys::give_back_freed_memory();
        Loan { cache: Arc::clone(self), bytes }
    }

    /// Joins the readers that have blocks fetched ahead of them.
    pub(crate) fn stream(self: &Arc<Self>) -> Stream {
        self.streams.fetch_add(1, Ordering::Relaxed);
        Stream(Arc::clone(self))
    }
}

/// Somebody who waits for a fetch. Dropped if that was for too long: the fetch itself goes on.
struct Waiting<'a> {
    cache: &'a Cache,
    key: Key,
    since: Instant,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let waited = self.since.elapsed();
        if waited > LONG {
            let why = format!("the store has not answered for {} s", waited.as_secs());
            let error = Arc::new(Error::new(ErrorKind::Timeout, why));
            self.cache.state().failed.put(self.key, (Instant::now(), error));
        }
    }
}

/// A fetch that always lands: also when its task panics or is dropped.
struct Landing {
    cache: Arc<Cache>,
    key: Key,
    sender: watch::Sender<Option<Result<Value, SharedError>>>,
}

impl Landing {
    async fn run<F>(self, urgency: Urgency, urgent: Arc<Notify>, fetch: F)
    where
        F: Future<Output = crate::store::Result<Value>>,
    {
        let cache = Arc::clone(&self.cache);
        let _low = match urgency {
            Urgency::Reader => None,
            Urgency::Prefetch => tokio::select! {
                permit = cache.prefetches.acquire() => permit.ok(),
                () = urgent.notified() => None,
            },
        };
        let _permit = cache.fetches.acquire().await;
        let _reserved = Reserved::new(&cache, BLOCK_SIZE);
        let began = Instant::now();
        let result = fetch.await.map_err(Arc::new);
        {
            let mut state = cache.state();
            // In one step with its landing: nobody may find it neither here nor there.
            state.flights.remove(&self.key);
            if let Err(error) = &result
                && began.elapsed() > LONG
            {
                state.failed.put(self.key, (Instant::now(), Arc::clone(error)));
            }
            if let Ok(value) = &result {
                state.memory.release(BLOCK_SIZE);
                state.memory.insert(self.key, value.clone(), value.weight());
                state.memory.reserve(BLOCK_SIZE);
            }
        }
        self.sender.send_replace(Some(result));
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut state = self.cache.state();
        // A flight that landed was removed, and another one may be under way by now.
        let ours = state
            .flights
            .get(&self.key)
            .is_some_and(|f| f.landed.same_channel(&self.sender.subscribe()));
        if ours {
            state.flights.remove(&self.key);
        }
    }
}

/// Bytes of the budget that a fetch under way takes.
struct Reserved<'a> {
    cache: &'a Cache,
    bytes: usize,
}

impl<'a> Reserved<'a> {
    fn new(cache: &'a Cache, bytes: usize) -> Self {
        cache.state().memory.reserve(bytes);
        cache.metrics.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { cache, bytes }
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.cache.state().memory.release(self.bytes);
        self.cache.metrics.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Bytes of the budget that something else takes.
#[derive(Debug)]
pub(crate) struct Loan {
    cache: Arc<Cache>,
    bytes: usize,
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.cache.state().memory.release(self.bytes);
    }
}

/// A reader that has blocks fetched ahead of it.
#[derive(Debug)]
pub(crate) struct Stream(Arc<Cache>);

impl Stream {
    /// Blocks that it may have fetched ahead: a share of half the budget, at least one.
    pub(crate) fn max_window(&self) -> usize {
        let streams = self.0.streams.load(Ordering::Relaxed).max(1);
        (self.0.budget / 2 / BLOCK_SIZE / streams).clamp(1, self.0.max_window)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn block(byte: u8) -> Block {
        Block::new(vec![byte; BLOCK_SIZE].into())
    }

    fn key(n: u32) -> Key {
        Key::Block(ImageKey(1), BlockIndex(n))
    }

    #[tokio::test]
    async fn many_readers_make_one_fetch() {
        let cache = Cache::new(MIN_BUDGET);
        let fetches = Arc::new(AtomicUsize::new(0));
        let read = || {
            let fetches = Arc::clone(&fetches);
            cache.get(key(1), Urgency::Reader, move || async move {
                fetches.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok(Value::Block(block(7)))
            })
        };
        let (a, b, c) = tokio::join!(read(), read(), read());
        for value in [a, b, c, read().await] {
            assert!(matches!(value, Ok(Value::Block(b)) if b == block(7)));
        }
        assert_eq!(fetches.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_fetch_that_the_end_of_the_runtime_drops_locks_nothing_up() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let handle = runtime.handle().clone();
        drop(runtime);
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let _entered = handle.enter();
            let cache = Cache::new(MIN_BUDGET);
            cache.prefetch(key(1), || async { Ok(Value::Block(block(7))) });
            ended.send(cache.peek(&key(1)).is_none()).unwrap();
        });
        assert_eq!(end.recv_timeout(Duration::from_secs(20)), Ok(true));
    }

    #[tokio::test]
    async fn an_error_goes_to_all_who_wait_and_is_not_kept() {
        let cache = Cache::new(MIN_BUDGET);
        let fail = || {
            cache.get(key(1), Urgency::Reader, || async {
                tokio::time::sleep(Duration::from_millis(5)).await;
                Err(Error::new(ErrorKind::Corrupt, "bad"))
            })
        };
        let (a, b) = tokio::join!(fail(), fail());
        assert_eq!(a.unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(b.unwrap_err().kind(), ErrorKind::Corrupt);
        let good = cache.get(key(1), Urgency::Reader, || async { Ok(Value::Block(Block::Zero)) });
        assert!(good.await.is_ok());
    }

    #[tokio::test]
    async fn a_reader_that_leaves_does_not_take_the_fetch_along() {
        let cache = Cache::new(MIN_BUDGET);
        let slow = cache.get(key(1), Urgency::Reader, || async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok(Value::Block(Block::Zero))
        });
        assert!(tokio::time::timeout(Duration::from_millis(1), slow).await.is_err());
        let joined = cache.get(key(1), Urgency::Reader, || async {
            Err(Error::new(ErrorKind::Unavailable, "must not be called"))
        });
        assert!(joined.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_block_of_a_hung_store_costs_one_deadline() {
        let cache = Cache::new(MIN_BUDGET);
        let hung = || cache.get(key(1), Urgency::Reader, std::future::pending);
        let minute = Duration::from_mins(1);
        assert!(tokio::time::timeout(minute, hung()).await.is_err());
        let again = Instant::now();
        assert_eq!(hung().await.unwrap_err().kind(), ErrorKind::Timeout);
        assert!(again.elapsed() < REMEMBERED);
        // Another block may be had, and later this one.
        let other = cache.get(key(2), Urgency::Reader, || async { Ok(Value::Block(Block::Zero)) });
        assert!(other.await.is_ok());
        tokio::time::sleep(2 * REMEMBERED).await;
        assert!(tokio::time::timeout(minute, hung()).await.is_err());
        // Who leaves after a moment takes it from nobody.
        let short = cache.get(key(3), Urgency::Reader, || async move {
            tokio::time::sleep(minute / 2).await;
            Ok(Value::Block(Block::Zero))
        });
        assert!(tokio::time::timeout(Duration::from_secs(1), short).await.is_err());
        assert!(cache.get(key(3), Urgency::Reader, std::future::pending).await.is_ok());
    }

    #[tokio::test]
    async fn a_fetch_that_panics_lands_as_an_error() {
        let cache = Cache::new(MIN_BUDGET);
        let lost = cache.get(key(1), Urgency::Reader, || async { panic!("on purpose") }).await;
        assert_eq!(lost.unwrap_err().kind(), ErrorKind::Unavailable);
        let again = cache.get(key(1), Urgency::Reader, || async { Ok(Value::Block(Block::Zero)) });
        assert!(again.await.is_ok());
        assert_eq!(cache.metrics().in_flight.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_reader_overtakes_prefetches() {
        let cache = Cache::new(MIN_BUDGET);
        let never = Arc::new(Notify::new());
        for n in 0..100 {
            let never = Arc::clone(&never);
            cache.prefetch(key(n), move || async move {
                never.notified().await;
                Ok(Value::Block(Block::Zero))
            });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        let other =
            cache.get(key(1000), Urgency::Reader, || async { Ok(Value::Block(Block::Zero)) });
        tokio::time::timeout(Duration::from_secs(5), other).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_budget_holds() {
        let cache = Cache::new(MIN_BUDGET);
        for n in 0..200 {
            let fetch = move || async move { Ok(Value::Block(block((n % 250) as u8 + 1))) };
            cache.get(key(n), Urgency::Reader, fetch).await.unwrap();
            assert!(cache.bytes() <= MIN_BUDGET, "{} bytes", cache.bytes());
        }
        assert!(cache.peek(&key(199)).is_some());
        assert!(cache.peek(&key(0)).is_none());
    }
}
