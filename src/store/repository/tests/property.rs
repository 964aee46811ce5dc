//! Random operations of several processes, some of which crash, against the model.

use std::time::Duration;

use proptest::prelude::*;

use super::model::{Asks, World};
use super::*;

/// Block indexes at the edges of volumes and of index pages.
const INDEXES: [u32; 11] = [0, 1, 2, 2047, 2048, 16_383, 16_384, 18_431, 18_432, 20_000, 34_815];

/// About ten seconds.
const CASES: u32 = 1500;

const SIZES: [u64; 4] = [1, 1, 9, 17];

#[derive(Clone, Debug)]
enum Op {
    Start { chosen: Option<u8>, token: Option<u8>, parent: Option<usize>, size: usize, tags: u8 },
    Put { snap: usize, blocks: Vec<(usize, u8)> },
    Flush { snap: usize },
    Complete { snap: usize, asks: Asks },
    Delete { snap: usize },
    SetTags { snap: usize, tags: u8 },
    Gc { dry_run: bool },
    Advance { minutes: u64 },
    StartTwice { chosen: u8, token: bool },
    CompleteTwice { snap: usize },
    CompleteAndGc { snap: usize },
    CompleteAndDelete { snap: usize },
    CompleteAndFlush { snap: usize, index: usize, more: bool },
    StartAndDelete { snap: usize, gc: bool },
    SetTagsTwice { snap: usize },
}

/// An operation of one process, which may crash, and then may be repeated by the next.
#[derive(Clone, Debug)]
struct Step {
    op: Op,
    process: usize,
    crash: Option<usize>,
    again: bool,
}

fn op() -> impl Strategy<Value = Op> {
    let snap = || 0..12usize;
    let start = (
        prop::option::of(0..3u8),
        prop::option::of(0..3u8),
        prop::option::of(snap()),
        0..SIZES.len(),
        0..3u8,
    );
    let start = start.prop_map(|(chosen, token, parent, size, tags)| Op::Start {
        chosen,
        token,
        parent,
        size,
        tags,
    });
    let blocks = prop::collection::vec((0..INDEXES.len(), 0..4u8), 1..5);
    let asks = prop_oneof![
        8 => Just(Asks::Right), 1 => Just(Asks::WrongCount), 1 => Just(Asks::WrongChecksum)
    ];
    prop_oneof![
        3 => start,
        12 => (snap(), blocks).prop_map(|(snap, blocks)| Op::Put { snap, blocks }),
        6 => snap().prop_map(|snap| Op::Flush { snap }),
        6 => (snap(), asks).prop_map(|(snap, asks)| Op::Complete { snap, asks }),
        3 => snap().prop_map(|snap| Op::Delete { snap }),
        1 => (snap(), 0..4u8).prop_map(|(snap, tags)| Op::SetTags { snap, tags }),
        3 => (0..4u8).prop_map(|n| Op::Gc { dry_run: n == 0 }),
        2 => (1..120u64).prop_map(|minutes| Op::Advance { minutes }),
        1 => (0..3u8, any::<bool>()).prop_map(|(chosen, token)| Op::StartTwice { chosen, token }),
        1 => snap().prop_map(|snap| Op::CompleteTwice { snap }),
        3 => snap().prop_map(|snap| Op::CompleteAndGc { snap }),
        1 => snap().prop_map(|snap| Op::CompleteAndDelete { snap }),
        2 => (snap(), 0..4usize, any::<bool>())
            .prop_map(|(snap, index, more)| Op::CompleteAndFlush { snap, index, more }),
        1 => (snap(), any::<bool>()).prop_map(|(snap, gc)| Op::StartAndDelete { snap, gc }),
        1 => snap().prop_map(|snap| Op::SetTagsTwice { snap }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let crash = prop_oneof![3 => Just(None), 1 => (0..25usize).prop_map(Some)];
    (op(), 0..3usize, crash, any::<bool>()).prop_map(|(op, process, crash, again)| Step {
        op,
        process,
        crash,
        again,
    })
}

fn id(n: u8) -> SnapshotId {
    format!("snap-{n}").parse().unwrap()
}

async fn apply(world: &mut World, step: Step) {
    let Step { op, process: p, crash, again } = step;
    let races = matches!(
        op,
        Op::StartTwice { .. }
            | Op::CompleteTwice { .. }
            | Op::CompleteAndGc { .. }
            | Op::CompleteAndDelete { .. }
            | Op::CompleteAndFlush { .. }
            | Op::StartAndDelete { .. }
            | Op::SetTagsTwice { .. }
    );
    if races {
        race(world, op).await;
        world.check().await;
        return;
    }
    // Chosen before the first try, so that the second means the same.
    let snap = match &op {
        Op::Put { snap, .. }
        | Op::Flush { snap }
        | Op::Complete { snap, .. }
        | Op::Delete { snap }
        | Op::SetTags { snap, .. }
        | Op::Start { parent: Some(snap), .. } => world.pick(*snap),
        _ => id(0),
    };
    for crash in [crash, None].into_iter().take(if again && crash.is_some() { 2 } else { 1 }) {
        world.crash(p, crash);
        match &op {
            Op::Start { chosen, token, parent, size: gib, tags: value } => {
                let request = StartRequest {
                    id: chosen.map(id),
                    client_token: token.map(|token| token.to_string()),
                    parent: parent.map(|_| snap.clone()),
                    tags: tags(*value),
                    ..StartRequest::new(size(SIZES[*gib]))
                };
                world.start(p, request).await;
            }
            Op::Put { blocks, .. } => {
                for (index, value) in blocks {
                    world.put(p, &snap, INDEXES[*index], *value).await;
                }
            }
            Op::Flush { .. } => world.flush(p, &snap).await,
            Op::Complete { asks, .. } => world.complete(p, &snap, *asks).await,
            Op::Delete { .. } => world.delete(p, &snap).await,
            Op::SetTags { tags: value, .. } => world.set_tags(p, &snap, tags(*value)).await,
            Op::Gc { dry_run } => {
                world.gc(p, *dry_run).await;
                world.check_all().await;
            }
            Op::Advance { minutes } => world.space.advance(Duration::from_secs(60 * minutes)),
            _ => unreachable!(),
        }
        world.check().await;
    }
}

async fn race(world: &mut World, op: Op) {
    match op {
        Op::StartTwice { chosen, token } => {
            let request = |value| StartRequest {
                id: Some(id(chosen)),
                client_token: token.then(|| "t".to_owned()),
                tags: tags(value),
                ..StartRequest::new(size(1))
            };
            world.start_twice(request(1), request(2)).await;
        }
        Op::CompleteTwice { snap } => world.complete_twice(&world.pick(snap)).await,
        Op::CompleteAndGc { snap } => {
            world.complete_and_gc(&world.pick(snap)).await;
            world.check_all().await;
        }
        Op::CompleteAndDelete { snap } => world.complete_and_delete(&world.pick(snap)).await,
        Op::CompleteAndFlush { snap, index, more } => {
            world.complete_and_flush(&world.pick(snap), INDEXES[index], more).await;
        }
        Op::StartAndDelete { snap, gc } => {
            world.start_and_delete(&world.pick(snap), gc).await;
            world.check_all().await;
        }
        Op::SetTagsTwice { snap } => world.set_tags_twice(&world.pick(snap)).await,
        _ => unreachable!(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, failure_persistence: None, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn it_does_what_maps_would_do(
        seed in any::<u64>(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        run(async {
            let mut world = World::new(seed, 3);
            for step in steps {
                apply(&mut world, step).await;
            }
            world.end().await;
        });
    }
}
