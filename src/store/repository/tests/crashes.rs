//! The life of a parent and its child, with a crash at each call of each operation.

use super::model::{Asks, World};
use super::*;

const OPERATIONS: usize = 14;

async fn operation(world: &mut World, n: usize) {
    let (parent, child) = ("snap-0".parse().unwrap(), "snap-1".parse().unwrap());
    let request = |id: &SnapshotId, value| StartRequest {
        id: Some(id.clone()),
        client_token: Some(id.to_string()),
        tags: tags(value),
        ..StartRequest::new(size(9))
    };
    match n {
        0 => world.start(0, request(&parent, 1)).await,
        1 => {
            world.put(0, &parent, 0, 1).await;
            world.put(0, &parent, 17_000, 1).await;
        }
        2 => world.flush(0, &parent).await,
        3 => world.put(1, &parent, 0, 2).await,
        4 => world.complete(1, &parent, Asks::Right).await,
        5 => {
            let parent = Some(parent);
            world.start(1, StartRequest { parent, ..request(&child, 2) }).await;
        }
        6 => world.put(0, &child, 1, 3).await,
        7 => world.complete(0, &child, Asks::WrongCount).await,
        8 => world.complete(0, &child, Asks::Right).await,
        9 => world.set_tags(1, &child, tags(3)).await,
        10 => world.delete(1, &parent).await,
        11 | 12 => {
            world.gc(0, false).await;
            world.space.advance(2 * super::super::MIN_GRACE);
        }
        13 => world.delete(0, &child).await,
        _ => unreachable!(),
    }
}

#[test]
fn a_crash_at_any_call_leaves_what_was_or_what_will_be() {
    run(async {
        for crashing in 0..OPERATIONS {
            for calls in 0.. {
                // Whether the last call took effect is up to the seed.
                let mut crashed = false;
                for seed in 0..3 {
                    let mut world = World::new(seed, 2);
                    for n in 0..OPERATIONS {
                        if n == crashing {
                            world.crash(0, Some(calls));
                            world.crash(1, Some(calls));
                            operation(&mut world, n).await;
                            crashed |= world.crashes > 0;
                            world.exit();
                            world.check_all().await;
                        }
                        operation(&mut world, n).await;
                        world.check().await;
                    }
                    world.end().await;
                }
                if !crashed {
                    break;
                }
            }
        }
    });
}

/// A completion that crashed while it was closing leaves to others what counts: also to one that is
/// refused for its count after it has saved what it had.
#[test]
fn a_wrong_count_after_a_crash_while_closing() {
    run(async {
        let (mut calls, mut crashed) = (0, true);
        while crashed {
            crashed = false;
            for seed in 0..3 {
                let mut world = World::new(seed, 2);
                let id: SnapshotId = "snap-0".parse().unwrap();
                let request = StartRequest { id: Some(id.clone()), ..StartRequest::new(size(1)) };
                world.start(0, request).await;
                world.put(0, &id, 0, 1).await;
                world.put(1, &id, 1, 1).await;
                world.crash(0, Some(calls));
                world.complete(0, &id, Asks::Right).await;
                crashed |= world.crashes > 0;
                world.complete(1, &id, Asks::WrongCount).await;
                world.put(1, &id, 2, 1).await;
                world.complete(1, &id, Asks::Right).await;
                world.check_all().await;
                world.end().await;
            }
            calls += 1;
        }
    });
}
