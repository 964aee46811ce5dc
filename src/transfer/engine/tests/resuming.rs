//! Transfers to a store that fails, which later runs go on with.

use rstest::rstest;

use super::*;
use crate::transfer::journal::{Ends, FileJournal};

/// A store that loses the answers of chosen calls.
#[derive(Debug)]
struct Lossy {
    inner: SharedStore,
    /// Puts until answers are lost, and how many are.
    lost: Mutex<(u32, u32)>,
}

#[async_trait]
impl Wrapper for Lossy {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    async fn answer(&self, call: Call) -> crate::store::Result<()> {
        if !matches!(call, Call::PutBlock | Call::Complete) {
            return Ok(());
        }
        let mut lost = self.lost.lock().unwrap();
        if lost.0 > 0 {
            lost.0 -= 1;
        } else if lost.1 > 0 {
            lost.1 -= 1;
            let message = "the answer was lost";
            return Err(crate::store::Error::new(ErrorKind::Unavailable, message));
        }
        Ok(())
    }
}

/// A sink that takes no block any more.
#[derive(Debug)]
struct Closed {
    gathers: bool,
    is_aborted: AtomicBool,
}

#[async_trait]
impl Sink for Closed {
    async fn write(&self, _: Step, _: Block) -> Result<bool> {
        Err(crate::store::Error::new(ErrorKind::Conflict, "it takes no more").into())
    }

    fn parallelism(&self) -> usize {
        1
    }

    fn needs_flush(&self) -> bool {
        self.gathers
    }

    async fn finish(&self) -> Result<Option<Snapshot>> {
        Ok(None)
    }

    async fn abort(&self) {
        self.is_aborted.store(true, Ordering::SeqCst);
    }
}

/// Who completes a snapshot of a service is the service; of a repository it was the process that was killed.
#[rstest]
#[case::of_a_service(false)]
#[case::of_a_repository(true)]
#[tokio::test]
async fn a_snapshot_that_takes_no_more_stays_if_somebody_completes_it(#[case] gathers: bool) {
    let root = tempfile::tempdir().unwrap();
    let ends = || ["upload", "/a", "b"].map(str::to_owned);
    let open = || {
        let [operation, from, to] = ends();
        FileJournal::open::<String>(root.path(), Ends { operation, from, to }, false).unwrap().0
    };
    let mut journal = open();
    journal.begin(&"first");
    journal.finishing();
    drop(journal);
    let journal = Arc::new(open());
    let sink = Arc::new(Closed { gathers, is_aborted: AtomicBool::new(false) });
    let source = Arc::new(Given::whole(image(3), 3));
    let closed = Arc::clone(&sink);
    let kept = Arc::clone(&journal) as Arc<dyn Journal>;
    let done = transfer_to(source, closed, kept, &Run::default()).await;
    assert_eq!(done.unwrap_err().kind(), Some(ErrorKind::Conflict));
    assert_eq!(sink.is_aborted.load(Ordering::SeqCst), gathers);
    assert_eq!(journal.is_kept(), !gathers);
}

#[tokio::test]
async fn a_sink_does_not_abort_another_snapshot_of_its_id() {
    let dir = tempfile::tempdir().unwrap();
    let store: SharedStore = Arc::new(Repository::create(&dir.path().join("r")).await.unwrap());
    let chosen = || StartRequest {
        id: Some("snap-0a".parse().unwrap()),
        ..StartRequest::new(VolumeSize::from_gib(1).unwrap())
    };
    let begun = store.start(chosen()).await.unwrap();
    let id = begun.id.clone();
    let source = Given::whole(image(3), 3);
    let sink = SnapshotSink::new(store.clone(), begun, None, Zeros::default(), &source);
    let sink = sink.await.unwrap();
    store.delete(&id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let other = store.start(chosen()).await.unwrap();
    sink.abort().await;
    assert_eq!(store.describe(&id).await.unwrap().start_time, other.start_time);
}

async fn pending(store: &SharedStore, parent: Option<&Snapshot>, gib: u64) -> Snapshot {
    let parent = parent.map(|parent| parent.id.clone());
    let size = VolumeSize::from_gib(gib).unwrap();
    store.start(StartRequest { parent, ..StartRequest::new(size) }).await.unwrap()
}

async fn made(store: &SharedStore, model: &Model, gib: u64) -> Snapshot {
    let snapshot = pending(store, None, gib).await;
    let source: Arc<dyn Source> =
        Arc::new(Given::whole(model.clone(), snapshot.volume_size.blocks().0));
    let zeros = Zeros { full_copy: true, encrypted_holes: false };
    let sink = SnapshotSink::new(store.clone(), snapshot, None, zeros, &*source).await.unwrap();
    let run = Run::default();
    let done = transfer_to(source, Arc::new(sink), Arc::new(NoJournal), &run).await.unwrap();
    done.snapshot.unwrap()
}

/// What of a snapshot does not read as zeros.
async fn content(store: &SharedStore, snapshot: &Snapshot) -> Model {
    let sink = Kept::new();
    let source = Arc::new(SnapshotSource::new(store.clone(), snapshot.clone()));
    transfer_to(source, sink.clone(), Arc::new(NoJournal), &Run::default()).await.unwrap();
    let mut content = sink.content();
    content.retain(|_, block| !block.is_zero());
    content
}

#[derive(Clone, Debug)]
struct Case {
    parent: Option<Model>,
    source: Model,
    /// The source has only these changes, and drops these blocks.
    dropped: Option<BTreeSet<u32>>,
    grown: bool,
    full_copy: bool,
    run_len: usize,
    /// After so many puts so many fail; where, and how.
    faults: Vec<(u32, u32, bool)>,
    /// Stops it after so many steps.
    stops: Vec<u32>,
    /// What a device has in every second run and in the last; a file is as it was.
    changed: Option<Model>,
}

fn model(versions: std::ops::Range<u32>) -> impl Strategy<Value = Model> {
    let version = prop_oneof![
        1 => Just(None),
        4 => versions.prop_map(Some),
    ];
    prop::collection::btree_map(0..24u32, version, 0..24).prop_map(|blocks| {
        let block = |(index, version): (u32, Option<u32>)| {
            (index, version.map_or(Block::Zero, |version| block(index, version)))
        };
        blocks.into_iter().map(block).collect()
    })
}

fn case() -> impl Strategy<Value = Case> {
    let dropped = prop::option::of(prop::collection::btree_set(0..24u32, 0..6));
    let faults = prop::collection::vec((0..20u32, 1..4u32, any::<bool>()), 0..3);
    let stops = prop::collection::vec(0..60u32, 0..3);
    let changed = prop::option::of(model(1..4));
    let rest = (any::<bool>(), any::<bool>(), prop_oneof![Just(1usize), Just(4)], changed);
    (prop::option::of(model(1..3)), model(1..3), dropped, faults, stops, rest).prop_map(
        |(parent, source, dropped, faults, stops, (grown, full_copy, run_len, changed))| {
            // Only what has a parent can be told as changes of it, and a device has no holes.
            let dropped = dropped.filter(|_| parent.is_some() && changed.is_none());
            let whole = |model: Model| {
                let zeros = (0..24).map(|index| (index, Block::Zero));
                zeros.chain(model).collect::<Model>()
            };
            let source = if changed.is_some() { whole(source) } else { source };
            let changed = changed.map(whole);
            Case { parent, source, dropped, grown, full_copy, run_len, faults, stops, changed }
        },
    )
}

/// What the source has in a run.
fn source_of(case: &Case, run: u32, is_last: bool) -> Model {
    let changed = case.changed.as_ref().filter(|_| is_last || run.is_multiple_of(2));
    changed.unwrap_or(&case.source).clone()
}

/// What the snapshot has to read as that was made of this.
fn expected(case: &Case, source: Model) -> Model {
    let mut expected = match (&case.dropped, &case.parent) {
        (Some(dropped), Some(parent)) => {
            let mut expected = parent.clone();
            expected.retain(|index, _| !dropped.contains(index));
            expected
        }
        _ => Model::new(),
    };
    expected.extend(source);
    expected.retain(|_, block| !block.is_zero());
    expected
}

/// Runs a case until it ends well: each run is one with a fault, or is stopped, until there are no more.
async fn run_case(case: Case) {
    let dir = tempfile::tempdir().unwrap();
    let repository = Repository::create(&dir.path().join("store")).await.unwrap();
    let plain: SharedStore = Arc::new(repository);
    let parent = match &case.parent {
        Some(parent) => Some(made(&plain, parent, 1).await),
        None => None,
    };
    let failing = Arc::new(Fail::new(plain.clone()));
    let lossy = Arc::new(Lossy { inner: failing.clone(), lost: Mutex::new((0, 0)) });
    let store: SharedStore = lossy.clone();
    let gib = if case.grown { 2 } else { 1 };
    let snapshot = pending(&store, parent.as_ref(), gib).await;
    let journal = Arc::new(Noted::default());
    let (mut faults, mut stops) = (case.faults.clone(), case.stops.clone());
    let (mut done, mut runs, mut made_of) = (None, 0, Model::new());
    while done.is_none() {
        runs += 1;
        failing.heal();
        *lossy.lost.lock().unwrap() = (0, 0);
        let is_last = faults.is_empty() && stops.is_empty();
        if let Some((after, times, is_lost)) = faults.pop() {
            if is_lost {
                *lossy.lost.lock().unwrap() = (after, times);
            } else {
                failing.plan(Call::PutBlock, after.into(), times.into(), ErrorKind::Unavailable);
            }
        }
        let run = Run::default();
        if let Some(steps) = stops.pop() {
            let stop = run.stop.clone();
            tokio::spawn(async move {
                for _ in 0..steps {
                    tokio::task::yield_now().await;
                }
                stop.cancel();
            });
        }
        made_of = source_of(&case, runs, is_last);
        let source: Arc<dyn Source> = Arc::new(Given {
            blocks: made_of.clone(),
            end: snapshot.volume_size.blocks().0,
            dropped: case.dropped.clone(),
            run_len: case.run_len,
            reads: AtomicU64::new(0),
            is_read_again: case.changed.is_some(),
        });
        let beneath = parent.clone().map(|parent| (parent, case.dropped.is_some()));
        let zeros = Zeros { full_copy: case.full_copy, encrypted_holes: false };
        let sink = SnapshotSink::new(store.clone(), snapshot.clone(), beneath, zeros, &*source);
        let sink: Arc<dyn Sink> = Arc::new(sink.await.unwrap());
        match transfer_to(source, sink, journal.clone(), &run).await {
            Ok(finished) => done = finished.snapshot,
            Err(error) => {
                assert!(!is_last, "nothing was wrong: {error}");
                assert!(error.could_go_on(), "{error}");
                // Its completion may have been all that was not heard of.
                let now = store.describe(&snapshot.id).await.unwrap();
                if now.state == SnapshotState::Completed {
                    done = Some(now);
                }
            }
        }
    }
    let snapshot = done.unwrap();
    assert_eq!(snapshot.state, SnapshotState::Completed);
    let expected = expected(&case, made_of);
    assert!(content(&plain, &snapshot).await == expected, "another image came of it");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn a_snapshot_is_what_its_source_was_whatever_came_between(case in case()) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(run_case(case));
    }
}

#[tokio::test]
async fn a_later_run_neither_reads_nor_puts_what_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let repository = Repository::create(&dir.path().join("store")).await.unwrap();
    let plain: SharedStore = Arc::new(repository);
    let (failing, journal) = (Arc::new(Fail::new(plain.clone())), Arc::new(Noted::default()));
    let counted = Arc::new(Count::new(failing.clone()));
    let store: SharedStore = counted.clone();
    let snapshot = pending(&store, None, 1).await;
    let model: Model = (0..130).map(|n| (n, block(n, 1))).collect();
    let end = snapshot.volume_size.blocks().0;
    let put = async |source: &Arc<Given>| {
        let zeros = Zeros::default();
        let sink = SnapshotSink::new(store.clone(), snapshot.clone(), None, zeros, &**source);
        let sink = Arc::new(sink.await.unwrap());
        transfer_to(source.clone(), sink, journal.clone(), &Run::default()).await
    };
    failing.plan(Call::PutBlock, 100, u64::MAX, ErrorKind::Unavailable);
    put(&Arc::new(Given::whole(model.clone(), end))).await.unwrap_err();
    failing.heal();
    let durable = journal.durable();
    assert!(durable >= 90, "{durable}");
    let before = counted.counters().calls(Call::PutBlock);
    let source = Arc::new(Given::whole(model.clone(), end));
    let finished = put(&source).await.unwrap();
    assert_eq!((finished.blocks, finished.kept), (130, durable));
    assert_eq!(source.reads.load(Ordering::Relaxed), 130 - durable);
    assert_eq!(counted.counters().calls(Call::PutBlock) - before, 130 - durable);
    assert!(content(&plain, &finished.snapshot.unwrap()).await == model);
}

#[tokio::test]
async fn a_block_of_the_parent_that_is_lost_is_put() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let plain: SharedStore = Arc::new(Repository::create(&path).await.unwrap());
    let model: Model = (0..4).map(|n| (n, block(n, 1))).collect();
    let parent = made(&plain, &model, 1).await;
    let failing = Arc::new(Fail::new(plain.clone()));
    let store: SharedStore = failing.clone();
    let snapshot = pending(&store, Some(&parent), 1).await;
    let source: Arc<dyn Source> = Arc::new(Given::whole(model, snapshot.volume_size.blocks().0));
    let beneath = Some((parent, false));
    let sink = SnapshotSink::new(store, snapshot, beneath, Zeros::default(), &*source);
    let sink = Arc::new(sink.await.unwrap());
    failing.plan(Call::GetBlock, 1, 2, ErrorKind::Corrupt);
    let done = transfer_to(source, sink, Arc::new(NoJournal), &Run::default()).await.unwrap();
    assert_eq!(done.blocks, 2);
}
