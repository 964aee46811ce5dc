//! Working images over a repository, and what they should hold.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;

use super::content::{Content, difference};
use super::trap::{Plan, Trap};
use crate::cache::{Cache, MIN_BUDGET};
use crate::image::Image;
use crate::image::staging::Staging;
use crate::image::working::{
    Commit, Error, Maker, Result, Settings, State, Watch, WorkingImage, Workshop,
};
use crate::model::{BLOCK_SIZE, BLOCK_SIZE_U64, BlockIndex, Snapshot, SnapshotId, SnapshotState};
use crate::store::repository::Repository;
use crate::store::wrap::{Call, Count, Counters};
use crate::store::{ListFrom, SharedStore};

/// Longest time that what goes on in the background may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(4);

/// What the staging directory says that it belongs to.
pub(super) const STORE: &str = "file:///x";

/// A change of the content.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    Write { offset: u64, len: usize, value: u8 },
    Truncate(u64),
    Punch { offset: u64, len: u64 },
    ZeroRange { offset: u64, len: u64 },
    Grow(u64),
}

/// A process, or a mount.
pub(super) struct Life {
    pub(super) shop: Arc<Workshop>,
    pub(super) trap: Arc<Trap>,
    pub(super) counters: Arc<Counters>,
    pub(super) told: Arc<Told>,
}

/// The commits that were told of.
#[derive(Debug, Default)]
pub(super) struct Told(Mutex<Vec<Arc<Commit>>>);

impl Watch for Arc<Told> {
    fn commit_begins(&self, _: &str, commit: &Arc<Commit>) {
        self.0.lock().unwrap().push(Arc::clone(commit));
    }
}

impl Told {
    /// How many were told of, all of which have ended.
    pub(super) fn ended(&self) -> usize {
        let commits = self.0.lock().unwrap();
        assert!(commits.iter().all(|commit| commit.outcome.borrow().is_some()), "one never ends");
        commits.len()
    }
}

/// A working image, and what it should hold.
pub(super) struct Slot {
    /// As long as there is a process.
    image: Option<Arc<WorkingImage>>,
    pub(super) name: String,
    pub(super) content: Content,
    /// A commit of it failed, and it was not changed since.
    pub(super) failed: bool,
    /// A commit of it failed, and it was changed since.
    pub(super) changed: bool,
    /// It is what it was made as.
    pub(super) pristine: bool,
}

impl Slot {
    pub(super) fn image(&self) -> Arc<WorkingImage> {
        Arc::clone(self.image.as_ref().unwrap())
    }
}

pub(super) struct World {
    dir: tempfile::TempDir,
    pub(super) settings: Settings,
    life: Option<Life>,
    /// What goes wrong when the next process begins.
    pub(super) at_begin: Option<Plan>,
    pub(super) slots: Vec<Slot>,
    /// Completed ones.
    pub(super) snapshots: BTreeMap<SnapshotId, Content>,
    /// What images held when somebody asked for a commit.
    pub(super) attempts: Vec<Content>,
    /// Blocks that were ever changed.
    touched: BTreeSet<u32>,
    names: u32,
}

/// The bytes that a write of `value` is of; 0 is zeros.
fn bytes(value: u8, offset: u64, len: usize) -> Vec<u8> {
    let byte = |at: u64| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 ^ value | 1;
    let at = offset..offset + len as u64;
    at.map(|at| if value == 0 { 0 } else { byte(at) }).collect()
}

impl Change {
    pub(super) fn apply(self, content: &mut Content) {
        match self {
            Self::Write { offset, len, value } => {
                content.write(offset, &bytes(value, offset, len));
            }
            Self::Truncate(len) => content.truncate(len),
            Self::Punch { offset, len } => content.zero(offset, len),
            Self::ZeroRange { offset, len } => {
                content.zero(offset, len);
                content.len = content.len.max(offset + len);
            }
            Self::Grow(len) => content.len = content.len.max(len),
        }
    }

    async fn make(self, image: &Arc<WorkingImage>) -> Result<()> {
        match self {
            Self::Write { offset, len, value } => {
                image.write(offset, Bytes::from(bytes(value, offset, len))).await
            }
            Self::Truncate(len) => image.truncate(len).await,
            Self::Punch { offset, len } => image.punch(offset, len).await,
            Self::ZeroRange { offset, len } => {
                image.punch(offset, len).await?;
                image.grow(offset + len).await
            }
            Self::Grow(len) => image.grow(len).await,
        }
    }

    fn blocks(self) -> [u32; 3] {
        let (start, end) = match self {
            Self::Write { offset, len, .. } => (offset, offset + len as u64),
            Self::Punch { offset, len } | Self::ZeroRange { offset, len } => (offset, offset + len),
            Self::Truncate(len) | Self::Grow(len) => (len.saturating_sub(1), len + 1),
        };
        // What is between those of a long range is looked at where there is something.
        let (first, last) = (BlockIndex::containing(start).0, BlockIndex::containing(end).0);
        [first, (first + 1).min(last), last]
    }
}

/// A directory that is in memory, where there is one.
pub(super) fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

impl World {
    pub(super) async fn new() -> Self {
        Self::with(Settings::default()).await
    }

    /// A world in which mounts have these settings.
    pub(super) async fn with(settings: Settings) -> Self {
        let dir = tempdir();
        Repository::create(&dir.path().join("store")).await.unwrap();
        let mut world = Self {
            dir,
            settings,
            life: None,
            at_begin: None,
            slots: Vec::new(),
            snapshots: BTreeMap::new(),
            attempts: Vec::new(),
            touched: BTreeSet::new(),
            names: 0,
        };
        world.live().await;
        world
    }

    pub(super) fn life(&self) -> &Life {
        self.life.as_ref().unwrap()
    }

    pub(super) fn staging(&self) -> PathBuf {
        self.dir.path().join("staging")
    }

    /// A new process; the images that it finds.
    pub(super) async fn begin(&mut self) -> Vec<Arc<WorkingImage>> {
        let staging = Staging::open(&self.staging(), STORE, u64::MAX).unwrap();
        self.begin_in(staging).await
    }

    pub(super) async fn begin_in(&mut self, staging: Staging) -> Vec<Arc<WorkingImage>> {
        let repository = Repository::open(&self.dir.path().join("store")).await.unwrap();
        let count = Count::new(Arc::new(repository));
        let counters = count.counters();
        let trap = Arc::new(Trap::new(Arc::new(count)));
        if let Some(plan) = self.at_begin.take() {
            trap.arm(plan);
        }
        let store: SharedStore = Arc::clone(&trap) as SharedStore;
        let settings = self.settings.clone();
        let shop = Workshop::new(store, Cache::new(MIN_BUDGET), staging, settings);
        let told = Arc::new(Told::default());
        shop.watch(Box::new(Arc::clone(&told)));
        let loaded = WorkingImage::load_all(&shop).await;
        self.life = Some(Life { shop, trap, counters, told });
        loaded
    }

    /// A new process finds what the one before has left, and goes on with it.
    pub(super) async fn live(&mut self) {
        let loaded = self.begin().await;
        for image in loaded {
            let name = image.name();
            let slot = self.slots.iter_mut().find(|slot| slot.name == name);
            slot.unwrap_or_else(|| panic!("{name} comes from nowhere")).image = Some(image);
        }
        self.check_store().await;
        let (staged, gone) =
            std::mem::take(&mut self.slots).into_iter().partition(|slot| slot.image.is_some());
        self.slots = staged;
        for slot in gone {
            let committed = self.snapshots.values().any(|content| *content == slot.content);
            assert!(slot.pristine || committed, "{} is lost: {:?}", slot.name, slot.content);
        }
        for slot in &self.slots {
            self.check_slot(slot).await;
            slot.image().resume();
        }
        self.quiet().await;
        for slot in &mut self.slots {
            let status = slot.image().status();
            let waits = matches!(status.state, State::Clean | State::Dirty | State::Interrupted);
            assert!(waits, "{}: {status:?}", slot.name);
            (slot.failed, slot.changed) = (false, false);
        }
        self.life().trap.repeated();
    }

    /// The process is gone; its tasks are already.
    pub(super) fn die(&mut self) {
        for slot in &mut self.slots {
            slot.image = None;
        }
        self.life = None;
    }

    pub(super) async fn create(&mut self, base: Option<SnapshotId>) {
        self.names += 1;
        let name = format!("image {}.img", self.names);
        let shop = Arc::clone(&self.life().shop);
        let maker = Maker { uid: 1, gid: 2, mode: 0o600 };
        let content = base.as_ref().map(|id| self.snapshots[id].clone()).unwrap_or_default();
        let base = match base {
            Some(id) => Some(shop.image(shop.store.describe(&id).await.unwrap())),
            None => None,
        };
        let image = WorkingImage::create_over(&shop, &name, maker, base).await.unwrap();
        self.slots.push(Slot {
            image: Some(image),
            name,
            content,
            failed: false,
            changed: false,
            pristine: true,
        });
    }

    /// Changes an image. What is there if that fails is a part of the change.
    pub(super) async fn change(&mut self, n: usize, change: Change) -> Result<()> {
        self.touched.extend(change.blocks());
        let slot = &mut self.slots[n];
        let image = slot.image();
        let mut new = slot.content.clone();
        change.apply(&mut new);
        slot.pristine &= new == slot.content;
        slot.changed |= std::mem::take(&mut slot.failed);
        let result = change.make(&image).await;
        if result.is_ok() {
            slot.content = new;
            return result;
        }
        let old = std::mem::take(&mut slot.content);
        let len = image.len();
        assert!(len == old.len || len == new.len, "{len} bytes after {change:?} of {old:?}");
        for index in self.touched.iter().copied().chain(old.blocks()) {
            let offset = u64::from(index) * BLOCK_SIZE_U64;
            let read = image.read(offset, BLOCK_SIZE).await.unwrap();
            let (old, new) = (old.block(index), new.block(index));
            let is = |bytes: &[u8], at: usize, byte| bytes.get(at).copied().unwrap_or(0) == byte;
            let wrong =
                (0..read.len()).find(|&at| !is(&old, at, read[at]) && !is(&new, at, read[at]));
            assert_eq!(wrong, None, "in block {index}, after {change:?} failed");
            if !read.is_empty() {
                slot.content.write(offset, &read);
            }
        }
        slot.content.len = len;
        result
    }

    /// A commit of `n`, which held `content` then, has ended.
    pub(super) async fn committed(
        &mut self,
        n: usize,
        content: Content,
        result: Result<SnapshotId>,
        may_fail: bool,
    ) {
        let repeated = self.life().trap.repeated();
        let slot = &mut self.slots[n];
        assert!(repeated == 0 || slot.changed, "{repeated} blocks were put again");
        match result {
            Ok(id) => {
                (slot.failed, slot.changed, slot.pristine) = (false, false, false);
                let known = self.snapshots.insert(id.clone(), content.clone());
                assert!(known.is_none_or(|known| known == content), "{id} is of another commit");
                self.check_snapshot(&id, &content).await;
            }
            Err(Error::Empty) => assert_eq!(content.len, 0),
            Err(error) => {
                assert!(may_fail, "{error}");
                slot.failed = true;
                slot.changed = false;
            }
        }
    }

    /// Waits until nothing goes on in the background.
    pub(super) async fn quiet(&self) {
        let metrics = tokio::runtime::Handle::current().metrics();
        let quiet = async {
            while metrics.num_alive_tasks() > 0 {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        };
        tokio::time::timeout(PATIENCE, quiet).await.expect("it does not come to rest");
        if let Some(life) = &self.life {
            life.told.ended();
        }
    }

    async fn completed(&self) -> Vec<Snapshot> {
        let mut snapshots = Vec::new();
        let mut token = None;
        loop {
            let page = self.life().shop.store.list(token).await.unwrap();
            snapshots.extend(page.snapshots);
            token = page.next;
            if token.is_none() {
                break;
            }
        }
        snapshots.retain(|snapshot| snapshot.state == SnapshotState::Completed);
        snapshots
    }

    /// Every snapshot that there is must be what an image held when somebody asked for a commit.
    pub(super) async fn check_store(&mut self) {
        for snapshot in self.completed().await {
            if self.snapshots.contains_key(&snapshot.id) {
                continue;
            }
            let mut found = None;
            let mut differences = Vec::new();
            for content in &self.attempts {
                match self.differs(&snapshot, content).await {
                    Some(difference) => differences.push(difference),
                    None => found = Some(content.clone()),
                }
            }
            let content = found.unwrap_or_else(|| {
                panic!("{} is nothing that was committed: {differences:#?}", snapshot.id)
            });
            self.snapshots.insert(snapshot.id, content);
        }
    }

    /// Every snapshot is what it was.
    pub(super) async fn check_snapshots(&self) {
        for (id, content) in &self.snapshots {
            self.check_snapshot(id, content).await;
        }
    }

    async fn check_snapshot(&self, id: &SnapshotId, content: &Content) {
        let snapshot = self.life().shop.store.describe(id).await.unwrap();
        assert_eq!(snapshot.state, SnapshotState::Completed);
        let difference = self.differs(&snapshot, content).await;
        assert_eq!(difference, None, "{id} is not {content:?}");
    }

    /// How a snapshot differs from what it should be.
    async fn differs(&self, snapshot: &Snapshot, content: &Content) -> Option<String> {
        let shop = &self.life().shop;
        let image = Image::new(
            Arc::new(snapshot.clone()),
            Arc::clone(&shop.store),
            Arc::clone(&shop.cache),
        );
        if image.len() != content.len {
            return Some(format!("{} bytes instead of {}", image.len(), content.len));
        }
        let mut blocks = content.blocks();
        let from = ListFrom::Index(BlockIndex::ZERO);
        let page = shop.store.list_blocks(&snapshot.id, from, 10_000).await.unwrap();
        assert!(page.next.is_none());
        blocks.extend(page.blocks.iter().map(|block| block.index.0));
        for index in blocks {
            let offset = u64::from(index) * BLOCK_SIZE_U64;
            let read = image.read(offset, BLOCK_SIZE).await.unwrap();
            if let Some(difference) = difference(&read, &content.block(index)) {
                return Some(format!("block {index}: {difference}"));
            }
        }
        None
    }

    pub(super) async fn check_images(&self) {
        for slot in &self.slots {
            self.check_slot(slot).await;
        }
    }

    async fn check_slot(&self, slot: &Slot) {
        let (image, content) = (slot.image(), &slot.content);
        assert_eq!(image.len(), content.len, "the length of {}", slot.name);
        for index in self.touched.iter().copied().chain(content.blocks()) {
            let offset = u64::from(index) * BLOCK_SIZE_U64;
            let read = image.read(offset, BLOCK_SIZE).await.unwrap();
            let difference = difference(&read, &content.block(index));
            assert_eq!(difference, None, "block {index} of {}", slot.name);
        }
        // Across blocks too.
        let offset = BLOCK_SIZE_U64 - 3;
        let read = image.read(offset, BLOCK_SIZE + 6).await.unwrap();
        assert_eq!(difference(&read, &content.read(offset, BLOCK_SIZE + 6)), None);
        let data = self.data(&image).await;
        for at in content.data() {
            let inside = data.iter().any(|run| run.contains(&at));
            assert!(inside, "{} has data at {at}, and says that it has a hole there", slot.name);
        }
    }

    /// The runs that an image says that it may have data in.
    async fn data(&self, image: &Arc<WorkingImage>) -> Vec<std::ops::Range<u64>> {
        let (mut runs, mut at) = (Vec::new(), 0);
        while let Some(start) = image.seek_data(at).await.unwrap() {
            assert!(start >= at);
            let end = image.seek_hole(start).await.unwrap().expect("the end is a hole");
            assert!(end >= start && end <= image.len());
            // A hole without a length says nothing.
            at = if end == start { BlockIndex::containing(start).next().offset() } else { end };
            runs.push(start..at);
            assert!(runs.len() < 10_000);
        }
        runs
    }

    /// The records of what is pending in the repository.
    pub(super) fn records(&self) -> Vec<PathBuf> {
        let below = |path: PathBuf| {
            let found = std::fs::read_dir(path).into_iter().flatten().flatten();
            found.map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let snapshots = below(self.dir.path().join("store/pending"));
        let attempts = snapshots.into_iter().flat_map(below);
        attempts.flat_map(below).collect()
    }

    /// Blocks that were put since the process began.
    pub(super) fn puts(&self) -> u64 {
        self.life().counters.calls(Call::PutBlock)
    }
}
