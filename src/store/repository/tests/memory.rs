//! Objects in memory, shared by simulated processes that crash, and take turns, as tests say.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Deref;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::{BoxFuture, maybe_done};
use jiff::Timestamp;
use uuid::Uuid;

use crate::model::Block;
use crate::store::repository::Repository;
use crate::store::repository::objects::{Decode, Objects, most_bytes};
use crate::store::{Error, ErrorKind, Result, Usage};

/// The objects of one repository, with their clock.
#[derive(Clone, Debug)]
pub(super) struct Space(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    objects: BTreeMap<String, Bytes>,
    /// When each was made.
    made: BTreeMap<String, Timestamp>,
    now: Timestamp,
    random: u64,
    /// As in a bucket: packs are arranged, so that one request brings several frames.
    is_far: bool,
    /// Two operations take turns at each call.
    turns: Option<Turns>,
    processes: usize,
}

/// Calls that wait for their turn, by their process.
#[derive(Debug)]
struct Turns {
    waiting: BTreeMap<usize, Waker>,
    /// Wakes whoever gives the turns.
    giver: Waker,
}

impl Space {
    pub(super) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            objects: BTreeMap::from([("fspfs.json".to_owned(), Bytes::new())]),
            made: BTreeMap::new(),
            now: "2026-01-01T00:00:00Z".parse().unwrap(),
            random: seed,
            is_far: seed.is_multiple_of(2),
            turns: None,
            processes: 0,
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    pub(super) fn advance(&self, time: Duration) {
        let mut inner = self.inner();
        inner.now = inner.now.checked_add(time).unwrap();
    }

    /// Everything that is there.
    pub(super) fn objects(&self) -> BTreeMap<String, Bytes> {
        self.inner().objects.clone()
    }

    /// The names below `prefix`.
    pub(super) fn names(&self, prefix: &str) -> Vec<String> {
        self.inner().objects.keys().filter(|name| name.starts_with(prefix)).cloned().collect()
    }

    /// Removes an object behind everyone's back.
    pub(super) fn lose(&self, name: &str) {
        self.inner().objects.remove(name).unwrap();
    }

    /// Changes an object behind everyone's back.
    pub(super) fn spoil(&self, name: &str) {
        let mut inner = self.inner();
        let object = inner.objects.get_mut(name).unwrap();
        let mut bytes = object.to_vec();
        bytes[0] ^= 1;
        *object = bytes.into();
    }

    /// A number below `bound`, by the seed.
    pub(super) fn random(&self, bound: usize) -> usize {
        let mut inner = self.inner();
        // SplitMix64.
        inner.random = inner.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = inner.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((z ^ (z >> 31)) >> 33).unwrap() % bound
    }

    /// A new process with this repository open.
    pub(super) fn process(&self) -> Process {
        let mut inner = self.inner();
        inner.processes += 1;
        let number = inner.processes;
        drop(inner);
        let handle = Arc::new(Handle { space: self.clone(), number, fate: Mutex::default() });
        let objects = Arc::clone(&handle) as Arc<dyn Objects>;
        let repository = Repository::with_objects(Uuid::nil(), objects);
        Process { repository, handle }
    }

    /// Runs an operation of each of two processes at the same time, with all that they spawn. At
    /// each call to the objects the seed says which of them goes on; between two calls of one
    /// nothing of the other runs.
    pub(super) async fn interleave<A, B>(
        &self,
        a: impl Future<Output = A>,
        b: impl Future<Output = B>,
    ) -> (A, B) {
        let (mut a, mut b) = (pin!(maybe_done(a)), pin!(maybe_done(b)));
        std::future::poll_fn(|cx| {
            let giver = cx.waker().clone();
            self.inner().turns.get_or_insert_with(|| Turns::new(giver));
            let done = [a.as_mut().poll(cx).is_ready(), b.as_mut().poll(cx).is_ready()];
            let running = done.iter().filter(|done| !**done).count();
            if running == 0 {
                self.inner().turns = None;
                return Poll::Ready(());
            }
            // Otherwise one has not come to its next call yet.
            if self.waiting() == running {
                let next = self.random(running);
                self.give_turn(next);
            }
            Poll::Pending
        })
        .await;
        (a.take_output().expect("it is done"), b.take_output().expect("it is done"))
    }

    fn waiting(&self) -> usize {
        self.inner().turns.as_ref().map_or(0, |turns| turns.waiting.len())
    }

    fn give_turn(&self, nth: usize) {
        let mut inner = self.inner();
        let waiting = &mut inner.turns.as_mut().expect("they take turns").waiting;
        let process = *waiting.keys().nth(nth).expect("it waits");
        waiting.remove(&process).expect("it waits").wake();
    }
}

impl Turns {
    fn new(giver: Waker) -> Self {
        Self { waiting: BTreeMap::new(), giver }
    }
}

/// A process that has the repository open.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) repository: Repository,
    handle: Arc<Handle>,
}

impl Deref for Process {
    type Target = Repository;

    fn deref(&self) -> &Repository {
        &self.repository
    }
}

/// A call that a test can wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Create,
    Delete,
    List,
    Read,
    Exists,
}

impl Process {
    /// Lets it crash at the call after the next `calls`; for ever, then.
    pub(super) fn crash_after(&self, calls: usize) {
        self.handle.fate().calls_left = Some(calls);
    }

    /// Takes back [`crash_after`](Self::crash_after), unless it has crashed: then answers true.
    pub(super) fn has_crashed(&self) -> bool {
        let mut fate = self.handle.fate();
        fate.calls_left = None;
        fate.dead
    }

    /// Whatever is created below `prefix` finds no space; `None` ends that.
    pub(super) fn disk_full(&self, prefix: Option<&str>) {
        self.handle.fate().full = prefix.map(str::to_owned);
    }

    /// Whatever is there below `prefix` cannot be read; `None` ends that.
    pub(super) fn bad_disk(&self, prefix: Option<&str>) {
        self.handle.fate().unreadable = prefix.map(str::to_owned);
    }

    /// Lets the answer to a create get lost, after the next `creates`: it has done what it does.
    pub(super) fn lose_answer(&self, creates: usize) {
        self.handle.fate().loses = Some(creates);
    }

    /// Whether it was lost.
    pub(super) fn has_lost(&self) -> bool {
        self.handle.fate().loses.is_none()
    }

    /// What the repository is over.
    pub(super) fn objects(&self) -> Arc<dyn Objects> {
        Arc::clone(&self.handle) as Arc<dyn Objects>
    }

    /// Runs `what` just before the next such call with a name that begins with `prefix`.
    pub(super) fn before(
        &self,
        call: Call,
        prefix: &str,
        what: impl Future<Output = ()> + Send + 'static,
    ) {
        self.handle.fate().hook = Some((call, prefix.to_owned(), Box::pin(what)));
    }

    /// Whether what [`before`](Self::before) waits for has come.
    pub(super) fn hook_ran(&self) -> bool {
        self.handle.fate().hook.is_none()
    }
}

struct Handle {
    space: Space,
    /// Names the process.
    number: usize,
    fate: Mutex<Fate>,
}

#[derive(Default)]
struct Fate {
    calls_left: Option<usize>,
    dead: bool,
    full: Option<String>,
    unreadable: Option<String>,
    /// Creates whose answers still come before one is lost.
    loses: Option<usize>,
    hook: Option<(Call, String, BoxFuture<'static, ()>)>,
}

impl Fate {
    /// Whether the answer to this create is the one that is lost.
    fn loses_this(&mut self) -> bool {
        let lost = self.loses == Some(0);
        self.loses = self.loses.and_then(|creates| creates.checked_sub(1));
        lost
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

fn crashed() -> Error {
    Error::new(ErrorKind::Unavailable, "the process has crashed")
}

impl Handle {
    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.fate.lock().unwrap()
    }

    /// What comes before each call. Answers whether the process crashes in this one.
    async fn begin(&self, call: Call, name: &str) -> Result<bool> {
        Turn { handle: self, asked: false }.await;
        let hook = {
            let mut fate = self.fate();
            let due = |hook: &mut (Call, String, _)| hook.0 == call && name.starts_with(&hook.1);
            fate.hook.take_if(due)
        };
        if let Some((_, _, what)) = hook {
            what.await;
        }
        let mut fate = self.fate();
        if fate.dead {
            return Err(crashed());
        }
        fate.dead = fate.calls_left == Some(0);
        fate.calls_left = fate.calls_left.map(|calls| calls.saturating_sub(1));
        Ok(fate.dead)
    }

    async fn begin_read(&self, call: Call, name: &str) -> Result<()> {
        if self.begin(call, name).await? { Err(crashed()) } else { Ok(()) }
    }

    fn get(&self, name: &str) -> Result<Bytes> {
        if self.fate().unreadable.as_ref().is_some_and(|prefix| name.starts_with(prefix)) {
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("cannot read {name}: bad disk"),
            ));
        }
        let found = self.space.inner().objects.get(name).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no {name}")))
    }
}

/// Waits for its turn, if operations take turns.
struct Turn<'a> {
    handle: &'a Handle,
    asked: bool,
}

impl Future for Turn<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.handle.space.inner();
        let Some(turns) = &mut inner.turns else { return Poll::Ready(()) };
        match turns.waiting.entry(self.handle.number) {
            Entry::Occupied(mut waiting) => {
                assert!(self.asked, "a process makes one call at a time");
                waiting.insert(cx.waker().clone());
            }
            Entry::Vacant(_) if self.asked => return Poll::Ready(()),
            Entry::Vacant(first) => {
                first.insert(cx.waker().clone());
                turns.giver.wake_by_ref();
            }
        }
        drop(inner);
        self.asked = true;
        Poll::Pending
    }
}

#[async_trait]
impl Objects for Handle {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    /// A process whose operations take turns makes one call at a time.
    fn parallelism(&self) -> usize {
        if self.space.inner().turns.is_some() { 1 } else { 7 }
    }

    fn neighbours(&self) -> usize {
        if self.space.inner().is_far { 16 } else { 1 }
    }

    fn usage(&self) -> Option<Usage> {
        Some(Usage { again: 3, ..Usage::default() })
    }

    async fn create(&self, name: &str, data: Bytes) -> Result<bool> {
        let crashes = self.begin(Call::Create, name).await?;
        if crashes && self.space.random(2) == 0 {
            return Err(crashed());
        }
        if self.fate().full.as_ref().is_some_and(|prefix| name.starts_with(prefix)) {
            // It takes a while to find out.
            tokio::task::yield_now().await;
            return Err(Error::new(ErrorKind::NoRoom, "no space left"));
        }
        let mut inner = self.space.inner();
        let new = !inner.objects.contains_key(name);
        if new {
            inner.objects.insert(name.to_owned(), data);
            let now = inner.now;
            inner.made.insert(name.to_owned(), now);
        }
        drop(inner);
        if self.fate().loses_this() {
            return Err(Error::new(ErrorKind::Timeout, "no answer"));
        }
        if crashes { Err(crashed()) } else { Ok(new) }
    }

    async fn read(&self, name: &str) -> Result<Bytes> {
        self.begin_read(Call::Read, name).await?;
        let found = self.get(name)?;
        if found.len() as u64 > most_bytes(name) {
            return Err(Error::new(ErrorKind::Corrupt, format!("{name} is too long")));
        }
        Ok(found)
    }

    async fn read_range(
        &self,
        name: &str,
        offset: u64,
        len: usize,
        decode: Decode,
    ) -> Result<Block> {
        self.begin_read(Call::Read, name).await?;
        let data = self.get(name)?;
        let offset = usize::try_from(offset).unwrap();
        if data.len() < offset + len {
            return Err(Error::new(ErrorKind::Corrupt, format!("{name} is truncated")));
        }
        decode(&data[offset..offset + len])
    }

    async fn read_tail(&self, name: &str, len: usize) -> Result<Bytes> {
        self.begin_read(Call::Read, name).await?;
        let data = self.get(name)?;
        Ok(data.slice(data.len().saturating_sub(len)..))
    }

    async fn exists(&self, name: &str) -> Result<bool> {
        self.begin_read(Call::Exists, name).await?;
        Ok(self.space.inner().objects.contains_key(name))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        assert!(prefix.ends_with('/'));
        self.begin_read(Call::List, prefix).await?;
        let mut names = self.space.names(prefix);
        // No order is promised.
        for n in (1..names.len()).rev() {
            names.swap(n, self.space.random(n + 1));
        }
        Ok(names)
    }

    async fn modified(&self, name: &str) -> Result<Timestamp> {
        self.begin_read(Call::Read, name).await?;
        self.get(name)?;
        Ok(self.space.inner().made[name])
    }

    async fn delete(&self, names: &[String]) -> Result<()> {
        let crashes = self.begin(Call::Delete, names.first().map_or("", |name| name)).await?;
        let count = if crashes { self.space.random(names.len() + 1) } else { names.len() };
        for name in &names[..count] {
            self.space.inner().objects.remove(name);
        }
        if crashes { Err(crashed()) } else { Ok(()) }
    }

    async fn sweep(&self, _before: Timestamp) -> Result<u64> {
        self.begin_read(Call::List, "tmp/").await?;
        Ok(0)
    }

    async fn now(&self) -> Result<Timestamp> {
        self.begin_read(Call::Read, "").await?;
        Ok(self.space.inner().now)
    }
}
