//! Transfers of which a part hangs, and those that are given up.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_transfer_that_hangs_for_a_minute_is_stalled() {
    let stuck = Kept::with(u64::MAX, 20);
    let source = Arc::new(Given::whole(image(130), 2048));
    let began = Instant::now();
    let done = transfer(source, vec![to(&stuck)], &Run::default()).await;
    assert!(matches!(done[..], [Err(Error::Stalled(_))]), "{done:?}");
    assert!((STALL..STALL * 3).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert_eq!(stuck.ends(), (false, true));
}

#[tokio::test(start_paused = true)]
async fn waiting_for_memory_is_no_stall() {
    let memory = Memory::new(0);
    let taken = memory.take(memory.most).await;
    let run = Run { memory, ..Run::default() };
    tokio::spawn(async move {
        tokio::time::sleep(STALL * 5).await;
        drop(taken);
    });
    let sink = Kept::new();
    let source = Arc::new(Given::whole(image(130), 2048));
    transfer_to(source, sink.clone(), Arc::new(NoJournal), &run).await.unwrap();
    assert_eq!(sink.content().len(), image(130).len());
}

/// A source each of whose changes is sent by somebody who takes their time.
#[derive(Debug)]
struct Sent(Given);

#[async_trait]
impl Source for Sent {
    fn changes(&self) -> BoxStream<'static, Result<Change>> {
        let sent = self.0.changes().then(|change| async {
            tokio::time::sleep(STALL * 3).await;
            change
        });
        sent.boxed()
    }

    fn is_waiting(&self) -> bool {
        true
    }

    async fn read(&self, blocks: &[(BlockIndex, Option<ListedBlock>)]) -> Result<Vec<Block>> {
        self.0.read(blocks).await
    }

    fn is_read_again(&self) -> bool {
        false
    }
}

#[tokio::test(start_paused = true)]
async fn waiting_for_whoever_sends_is_no_stall() {
    let sent = || Arc::new(Sent(Given::whole(image(3), 3)));
    let sink = Kept::new();
    let done = transfer(sent(), vec![to(&sink)], &Run::default()).await;
    assert!(done[0].is_ok() && sink.ends() == (true, false), "{done:?}");
    // A sink that takes nothing is one.
    let sink = Kept::with(u64::MAX, 1);
    let done = transfer(sent(), vec![to(&sink)], &Run::default()).await;
    assert!(matches!(done[..], [Err(Error::Stalled(_))]), "{done:?}");
}

#[tokio::test]
async fn cancelling_aborts_the_sink_before_it_returns() {
    let stuck = Kept::with(u64::MAX, 20);
    let run = Run::default();
    let cancel = run.cancel.clone();
    let source: Arc<dyn Source> = Arc::new(Given::whole(image(130), 2048));
    let destination = to(&stuck);
    let moving = tokio::spawn(async move { transfer(source, vec![destination], &run).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    cancel.cancel();
    let done = moving.await.unwrap();
    assert!(matches!(done[..], [Err(Error::Cancelled)]), "{done:?}");
    assert_eq!(stuck.ends(), (false, true));
}

/// A sink whose writes take a while and cannot be ended, as those to a disk.
#[derive(Debug, Default)]
struct Slow {
    writing: AtomicU64,
    was_writing: AtomicBool,
    is_aborted: AtomicBool,
}

#[async_trait]
impl Sink for Slow {
    async fn write(&self, _: Step, _: Block) -> Result<bool> {
        self.writing.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(200));
        self.writing.fetch_sub(1, Ordering::SeqCst);
        Ok(true)
    }

    fn parallelism(&self) -> usize {
        8
    }

    async fn finish(&self) -> Result<Option<Snapshot>> {
        Ok(None)
    }

    async fn abort(&self) {
        self.was_writing.store(self.writing.load(Ordering::SeqCst) > 0, Ordering::SeqCst);
        self.is_aborted.store(true, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_written_any_more_when_a_sink_is_aborted() {
    let (sink, run) = (Arc::new(Slow::default()), Run::default());
    let (cancel, to_cancel) = (run.cancel.clone(), sink.clone());
    let source: Arc<dyn Source> = Arc::new(Given::whole(image(130), 2048));
    tokio::spawn(async move {
        while to_cancel.writing.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        cancel.cancel();
    });
    let done = transfer_to(source, sink.clone(), Arc::new(NoJournal), &run).await;
    assert!(matches!(done, Err(Error::Cancelled)), "{done:?}");
    assert!(sink.is_aborted.load(Ordering::SeqCst));
    assert!(!sink.was_writing.load(Ordering::SeqCst), "a write was under way");
}

#[tokio::test(start_paused = true)]
async fn a_sink_that_hangs_does_not_keep_the_others_from_their_end() {
    let (stuck, good) = (Kept::with(u64::MAX, 20), Kept::new());
    let run = Run { memory: Memory::new(16 * BLOCK_SIZE), ..Run::default() };
    let source = Arc::new(Given::whole(image(130), 2048));
    let began = Instant::now();
    let done = transfer(source, vec![to(&stuck), to(&good)], &run).await;
    assert!(matches!(done[..], [Err(Error::Stalled(_)), Ok(_)]), "{done:?}");
    assert!((STALL..STALL * 2).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert!(good.content() == image(130));
    assert_eq!((stuck.ends(), good.ends()), ((false, true), (true, false)));
}

/// A sink that takes everything, and never says that it is durable.
#[derive(Debug)]
struct Unflushed;

#[async_trait]
impl Sink for Unflushed {
    async fn write(&self, _: Step, _: Block) -> Result<bool> {
        Ok(true)
    }

    fn parallelism(&self) -> usize {
        8
    }

    fn needs_flush(&self) -> bool {
        true
    }

    async fn flush(&self) -> Result<()> {
        std::future::pending().await
    }

    async fn finish(&self) -> Result<Option<Snapshot>> {
        Ok(None)
    }

    async fn abort(&self) {}
}

#[tokio::test(start_paused = true)]
async fn a_flush_that_hangs_does_not_keep_the_others_from_their_end() {
    let good = Kept::new();
    let (sink, journal) = (Arc::new(Unflushed), Arc::new(Noted::default()));
    let stuck = Destination { sink, journal, progress: Arc::new(Silent) };
    let block = block(0, 1);
    let blocks: Model = (0..1100).map(|n| (n, block.clone())).collect();
    let source = Arc::new(Given::whole(blocks, 2048));
    let began = Instant::now();
    let done = transfer(source, vec![stuck, to(&good)], &Run::default()).await;
    assert!(matches!(done[..], [Err(Error::Stalled(_)), Ok(_)]), "{done:?}");
    assert!((STALL..STALL * 2).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert_eq!((good.content().len(), good.ends()), (1100, (true, false)));
}
