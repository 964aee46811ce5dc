//! Blocks that are durable when they are acknowledged, of one process and of several.

use futures::future::try_join_all;

use super::memory::Space;
use super::{block, chosen, count, put, read, run, start};
use crate::model::BlockIndex;
use crate::store::SnapshotStore as _;

#[test]
fn the_later_put_wins_whichever_process_makes_it() {
    run(async {
        for seed in 0..8 {
            let space = Space::new(seed);
            let (p, q) = (space.process(), space.process());
            let id = start(&p, chosen("snap-0a")).await;
            for (n, value) in [1, 2, 3, 4, 5, 6, 7].into_iter().enumerate() {
                // In an order of its own for each seed.
                let process = if (seed >> (n % 3)) & 1 == 0 { &p } else { &q };
                process.put_block_durably(&id, BlockIndex(5), block(value)).await.unwrap();
            }
            q.complete(&id, count(1)).await.unwrap();
            assert_eq!(read(&p, &id).await.unwrap(), [(5, 7)], "seed {seed}");
        }
    });
}

#[test]
fn acknowledged_puts_survive_the_process() {
    run(async {
        let space = Space::new(1);
        let (p, q) = (space.process(), space.process());
        let id = start(&p, chosen("snap-0a")).await;
        q.put_block_durably(&id, BlockIndex(0), block(1)).await.unwrap();
        p.put_block_durably(&id, BlockIndex(0), block(2)).await.unwrap();
        p.put_block_durably(&id, BlockIndex(1), block(3)).await.unwrap();
        drop(p);
        q.complete(&id, count(2)).await.unwrap();
        assert_eq!(read(&q, &id).await.unwrap(), [(0, 2), (1, 3)]);
    });
}

#[test]
fn those_who_put_at_the_same_time_share_records() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        let id = start(&p, chosen("snap-0a")).await;
        let puts = (0..200u32).map(|n| {
            let value = u8::try_from(n % 250).unwrap();
            p.put_block_durably(&id, BlockIndex(n), block(value))
        });
        try_join_all(puts).await.unwrap();
        let records = space.names("pending/").len();
        assert!(records < 60, "{records} objects for 200 blocks");
        // One after the other, mixed with what is not durable yet.
        put(&p, &id, &[(300, 1)]).await;
        p.put_block_durably(&id, BlockIndex(301), block(2)).await.unwrap();
        space.process().complete(&id, count(202)).await.unwrap();
        assert_eq!(read(&p, &id).await.unwrap().len(), 202);
        assert!(space.names("pending/").is_empty(), "the writers are tidied up too");
    });
}
