use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;

use super::*;
use crate::store::wrap::{Call, Count, Fail, Wrapper};
use crate::store::{BlockPage, StoreOptions, open};

/// A store that answers a first page, and then goes on like this.
#[derive(Debug)]
struct Foreign {
    inner: SharedStore,
    first: Mutex<Option<BlockPage>>,
    then: fn(&BlockPage, BlockPage) -> BlockPage,
}

impl Wrapper for Foreign {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    fn listed_blocks(&self, page: BlockPage) -> BlockPage {
        let mut first = self.first.lock().unwrap();
        match &*first {
            Some(first) => (self.then)(first, page),
            None => first.insert(page).clone(),
        }
    }
}

/// A store that is slow to answer; and how many answers were waited for at the same time, at most.
#[derive(Debug)]
struct Slow {
    inner: SharedStore,
    under_way: AtomicUsize,
    most: AtomicUsize,
}

#[async_trait]
impl Wrapper for Slow {
    fn inner(&self) -> &SharedStore {
        &self.inner
    }

    async fn before(&self, call: Call) -> Result<()> {
        if call == Call::ListBlocks {
            let now = self.under_way.fetch_add(1, Ordering::Relaxed) + 1;
            self.most.fetch_max(now, Ordering::Relaxed);
            tokio::time::sleep(std::time::Duration::from_millis(40)).await;
            self.under_way.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

async fn synth(recipe: &str) -> (SharedStore, Snapshot) {
    let url = format!("synth:{recipe}").parse().unwrap();
    let store = open(&url, &StoreOptions::default()).await.unwrap();
    let mut snapshots = crate::store::page::list_all(&*store).await.unwrap();
    (store, snapshots.remove(0))
}

async fn indexes(mut listing: Listing<Blocks>) -> Result<Vec<u32>> {
    let mut indexes = Vec::new();
    while let Some(block) = listing.next().await? {
        indexes.push(block.index.0);
    }
    Ok(indexes)
}

#[tokio::test]
async fn a_list_that_is_none_is_told() {
    let listed = async |then| {
        let (inner, snapshot) = synth("?size=16GiB&density=1").await;
        let store: SharedStore = Arc::new(Foreign { inner, first: Mutex::default(), then });
        indexes(Listing::blocks(store, &snapshot)).await.map(|blocks| blocks.len())
    };
    assert_eq!(listed(|_, page| page).await.unwrap(), 32_768);
    let kind = async |then| listed(then).await.unwrap_err().kind();
    assert_eq!(kind(|first, _| first.clone()).await, ErrorKind::Corrupt);
    let repeats = |_: &BlockPage, mut page: BlockPage| {
        page.blocks.insert(0, page.blocks[0].clone());
        page
    };
    assert_eq!(kind(repeats).await, ErrorKind::Corrupt);
    let reversed = |_: &BlockPage, mut page: BlockPage| {
        page.blocks.reverse();
        page
    };
    assert_eq!(kind(reversed).await, ErrorKind::Corrupt);
    let nothing = |first: &BlockPage, _| BlockPage { blocks: vec![], ..first.clone() };
    assert_eq!(kind(nothing).await, ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_block_beyond_the_volume_is_no_block_of_it() {
    let (store, mut snapshot) = synth("?size=2GiB&density=1").await;
    snapshot.volume_size = crate::model::VolumeSize::from_gib(1).unwrap();
    let error = indexes(Listing::blocks(store, &snapshot)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("beyond"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_long_list_is_asked_for_ahead_and_comes_in_order() {
    for recipe in ["?size=64GiB&density=1", "?size=256GiB&density=0.4", "?size=100GiB&density=0.01"]
    {
        let (inner, snapshot) = synth(recipe).await;
        let (list, end) = (Blocks((&snapshot).into()), snapshot.volume_size.blocks());
        let all = list_span(&inner, &list, BlockIndex::ZERO..end, end, MAX_PAGE_BLOCKS);
        let expected: Vec<u32> = all.await.unwrap().items.iter().map(|b| b.index.0).collect();
        let slow =
            Arc::new(Slow { inner, under_way: AtomicUsize::new(0), most: AtomicUsize::new(0) });
        let listed = indexes(Listing::blocks(slow.clone(), &snapshot)).await.unwrap();
        assert!(listed == expected, "{recipe}: {} of {}", listed.len(), expected.len());
        let pages = expected.len() / MAX_PAGE_BLOCKS;
        let most = slow.most.load(Ordering::Relaxed);
        assert_eq!(most, pages.clamp(1, AHEAD), "{recipe}");
    }
}

#[tokio::test]
async fn few_blocks_are_found_without_listing_all() {
    let (inner, snapshot) = synth("?size=1TiB&density=1").await;
    let counted = Arc::new(Count::new(inner));
    let mut listing = Listing::blocks(counted.clone(), &snapshot);
    for index in [0, 1, 499, 500, 1_000_000, 1_000_001, 2_097_151] {
        let found = listing.find(BlockIndex(index)).await.unwrap().unwrap();
        assert_eq!(found.index.0, index);
    }
    assert!(listing.find(BlockIndex(3_000_000)).await.unwrap().is_none());
    assert_eq!(counted.counters().calls(Call::ListBlocks), 3);
}

#[tokio::test]
async fn skipping_and_finding_agree_with_the_whole_list() {
    let (store, snapshot) = synth("?size=200GiB&density=0.3").await;
    let all = indexes(Listing::blocks(store.clone(), &snapshot)).await.unwrap();
    let mut random = fastrand::Rng::with_seed(11);
    for _ in 0..20 {
        let mut listing = Listing::blocks(store.clone(), &snapshot);
        let mut at = 0;
        while at < snapshot.volume_size.blocks().0 {
            match random.u8(..3) {
                0 => {
                    let found = listing.find(BlockIndex(at)).await.unwrap();
                    assert_eq!(found.is_some(), all.binary_search(&at).is_ok(), "{at}");
                    at += 1;
                }
                1 => {
                    let most = if random.bool() { 100 } else { 100_000 };
                    at += random.u32(..most);
                    listing.skip_to(BlockIndex(at));
                }
                _ => {
                    let stop = at + random.u32(..20_000);
                    let expected = &all[all.partition_point(|i| *i < at)..];
                    let expected = &expected[..expected.partition_point(|i| *i < stop)];
                    let mut found = Vec::new();
                    while let Some(b) = listing.next_below(BlockIndex(stop)).await.unwrap() {
                        found.push(b.index.0);
                    }
                    assert!(found == expected, "{at}..{stop}");
                    at = stop;
                }
            }
        }
    }
}

#[tokio::test]
async fn an_error_of_a_page_ahead_is_told_in_its_turn() {
    let (inner, snapshot) = synth("?size=64GiB&density=1").await;
    let failing = Arc::new(Fail::new(inner));
    failing.plan(Call::ListBlocks, 3, u64::MAX, ErrorKind::Unavailable);
    let mut listing = Listing::blocks(failing, &snapshot);
    let mut listed = 0;
    let error = loop {
        match listing.next().await {
            Ok(Some(_)) => listed += 1,
            Ok(None) => panic!("it has to fail"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!((10_000..=30_000).contains(&listed), "{listed}");
}

#[tokio::test]
async fn changes_are_followed_to_their_end() {
    let (store, _) = synth("?size=64GiB&density=1").await;
    let mut all = crate::store::page::list_all(&*store).await.unwrap();
    all.sort_by_key(|snapshot| snapshot.start_time);
    let [first, second] = [&all[0], &all[1]];
    let mut expected = Vec::new();
    let mut from = ListFrom::Index(BlockIndex::ZERO);
    loop {
        let page = store.list_changed_blocks(&first.id, &second.id, from, 100).await.unwrap();
        expected.extend(page.blocks.iter().map(|block| block.index));
        let Some(next) = page.next else { break };
        from = ListFrom::Page(next);
    }
    let list = Changes(first.into(), second.into());
    let mut listing = Listing::new(store, list, second.volume_size.blocks());
    let mut found = Vec::new();
    while let Some(block) = listing.next().await.unwrap() {
        found.push(block.index);
    }
    assert!(!found.is_empty() && found == expected, "{} of {}", found.len(), expected.len());
}
