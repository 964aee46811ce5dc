//! Random operations on working images, with commits, faults and crashes, against maps of pages.

use std::sync::Arc;

use proptest::prelude::*;
use tokio::runtime::Runtime;

use super::trap::{Fault, Plan};
use super::world::{Change, PATIENCE, World};
use crate::image::working::{Closed, Opened, Result, Settings, State};
use crate::model::{BLOCK_SIZE, BLOCK_SIZE_U64, SnapshotId};
use crate::store::wrap::Call;

/// About ten seconds.
const CASES: u32 = 45;

/// Blocks at the start, on both sides of a GiB, and far away.
const BLOCKS: [u64; 8] = [0, 1, 2, 3, 2047, 2048, 2049, 4097];

const INSIDE: [u64; 6] = [0, 1, 4096, 300_000, BLOCK_SIZE_U64 - 4096, BLOCK_SIZE_U64 - 1];

const WRITES: [usize; 6] = [1, 100, 4096, 100_000, BLOCK_SIZE, BLOCK_SIZE + 4096];

const RANGES: [u64; 7] =
    [1, 5000, BLOCK_SIZE_U64, BLOCK_SIZE_U64 + 1, 3 * BLOCK_SIZE_U64, 1 << 30, 3 << 30];

const GIB: u64 = 1 << 30;

const LENGTHS: [u64; 16] = [
    0,
    1,
    4095,
    BLOCK_SIZE_U64 - 1,
    BLOCK_SIZE_U64,
    BLOCK_SIZE_U64 + 1000,
    2 * BLOCK_SIZE_U64,
    3 * BLOCK_SIZE_U64 + 7,
    4 * BLOCK_SIZE_U64,
    GIB - BLOCK_SIZE_U64,
    GIB - 1,
    GIB,
    GIB + 1,
    GIB + 2 * BLOCK_SIZE_U64 + 5,
    2 * GIB,
    2 * GIB + 2 * BLOCK_SIZE_U64,
];

/// At most so many images at a time.
const IMAGES: usize = 3;

#[derive(Clone, Debug)]
enum Op {
    Create,
    Clone {
        snapshot: usize,
    },
    Change(Change),
    Fsync,
    /// A program opens, changes and closes it.
    Close {
        change: Change,
        how: How,
    },
    Commit,
    /// Something happens while a commit hangs in the store.
    Hang {
        change: Change,
        plan: Plan,
        meanwhile: Vec<Change>,
        again: Again,
        end: End,
    },
    Rename {
        to: To,
    },
    /// Asks for a parent of its first snapshot.
    WishParent {
        snapshot: usize,
    },
    Remove,
    Crash,
}

#[derive(Clone, Copy, Debug)]
enum How {
    Clean,
    Dying,
    /// Somebody else has it open, and lets go of it later.
    Shared,
    /// The store goes on for a while after the completion.
    Slowly,
}

/// What is asked for while the commit hangs, if something was changed meanwhile.
#[derive(Clone, Copy, Debug)]
enum Again {
    Nothing,
    Close,
    /// It is changed before its turn.
    CloseAndChange,
    /// By name; and it is changed before its turn.
    AskAndChange,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Go,
    Cancel,
    Crash,
}

#[derive(Clone, Copy, Debug)]
enum To {
    Temporary,
    Final,
}

#[derive(Clone, Debug)]
struct Step {
    image: usize,
    op: Op,
    /// What goes wrong in the store meanwhile.
    fault: Option<Plan>,
}

fn offset() -> impl Strategy<Value = u64> {
    let block = prop_oneof![3 => 0..4usize, 1 => 4..BLOCKS.len()];
    (block, 0..INSIDE.len()).prop_map(|(b, i)| BLOCKS[b] * BLOCK_SIZE_U64 + INSIDE[i])
}

fn change() -> impl Strategy<Value = Change> {
    let write = (offset(), 0..WRITES.len(), prop_oneof![1 => Just(0), 4 => 1..=u8::MAX]);
    let range = || (offset(), 0..RANGES.len());
    prop_oneof![
        8 => write.prop_map(|(offset, len, value)| Change::Write { offset, len: WRITES[len], value }),
        3 => (0..LENGTHS.len()).prop_map(|len| Change::Truncate(LENGTHS[len])),
        3 => range().prop_map(|(offset, len)| Change::Punch { offset, len: RANGES[len] }),
        1 => range().prop_map(|(offset, len)| Change::ZeroRange { offset, len: RANGES[len] }),
        1 => (0..LENGTHS.len()).prop_map(|len| Change::Grow(LENGTHS[len])),
    ]
}

/// Calls that a commit alone makes: readers wait for the others too.
fn call() -> impl Strategy<Value = Call> {
    prop_oneof![2 => Just(Call::Start), 3 => Just(Call::PutBlock), 2 => Just(Call::Complete)]
}

fn fault() -> impl Strategy<Value = Option<Plan>> {
    let call = prop_oneof![3 => call(), 1 => (0..Call::ALL.len()).prop_map(|n| Call::ALL[n])];
    let fault = prop_oneof![2 => Just(Fault::Fail), 1 => Just(Fault::Lose)];
    let plan = (call, prop_oneof![2 => Just(0), 1 => 0..5u32], fault);
    let plan = plan.prop_map(|(call, after, fault)| Plan { call, after, fault });
    prop_oneof![3 => Just(None), 2 => plan.prop_map(Some)]
}

fn op() -> impl Strategy<Value = Op> {
    let how = prop_oneof![
        8 => Just(How::Clean), 2 => Just(How::Dying), 2 => Just(How::Shared), 1 => Just(How::Slowly)
    ];
    let hang = prop_oneof![Just(Fault::HangBefore), Just(Fault::HangAfter)];
    let plan = (call(), prop_oneof![2 => Just(0), 1 => 0..3u32], hang)
        .prop_map(|(call, after, fault)| Plan { call, after, fault });
    let meanwhile = prop::collection::vec(change(), 0..3);
    let end = prop_oneof![3 => Just(End::Go), 2 => Just(End::Cancel), 3 => Just(End::Crash)];
    let again = prop_oneof![
        2 => Just(Again::Nothing),
        1 => Just(Again::Close),
        1 => Just(Again::CloseAndChange),
        1 => Just(Again::AskAndChange),
    ];
    let hang = (change(), plan, meanwhile, again, end).prop_map(
        |(change, plan, meanwhile, again, end)| Op::Hang { change, plan, meanwhile, again, end },
    );
    let to = prop_oneof![Just(To::Temporary), Just(To::Final)];
    prop_oneof![
        2 => Just(Op::Create),
        2 => (0..100usize).prop_map(|snapshot| Op::Clone { snapshot }),
        12 => change().prop_map(Op::Change),
        1 => Just(Op::Fsync),
        8 => (change(), how).prop_map(|(change, how)| Op::Close { change, how }),
        3 => Just(Op::Commit),
        5 => hang,
        1 => to.prop_map(|to| Op::Rename { to }),
        2 => (0..100usize).prop_map(|snapshot| Op::WishParent { snapshot }),
        1 => Just(Op::Remove),
        2 => Just(Op::Crash),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    (0..IMAGES, op(), fault()).prop_map(|(image, op, fault)| Step { image, op, fault })
}

impl World {
    /// Does one step; whether the process crashes then.
    async fn step(&mut self, Step { image, op, fault }: Step) -> bool {
        if self.slots.is_empty() {
            self.create(None).await;
        }
        let n = image % self.slots.len();
        let image = self.slots[n].image();
        let trap = Arc::clone(&self.life().trap);
        if let Some(plan) = fault
            && !matches!(op, Op::Hang { .. } | Op::Create | Op::Clone { .. })
        {
            trap.arm(plan);
        }
        trap.repeated();
        let mut crash = false;
        match op {
            Op::Create if self.slots.len() < IMAGES => self.create(None).await,
            Op::Clone { snapshot } if self.slots.len() < IMAGES && !self.snapshots.is_empty() => {
                let mut ids = self.snapshots.keys();
                let id = ids.nth(snapshot % self.snapshots.len()).cloned();
                self.create(id).await;
            }
            Op::WishParent { snapshot } if !self.snapshots.is_empty() => {
                let mut ids = self.snapshots.keys();
                let id = ids.nth(snapshot % self.snapshots.len()).unwrap().to_string();
                let wished = image.wish("parent", Some(&id), 0).await;
                let first = !image.state().base.is_some();
                let frozen = image.state().layers.iter().any(|layer| layer.frozen);
                assert!(wished.is_ok() == (first && !frozen), "{wished:?}");
            }
            Op::Create | Op::Clone { .. } | Op::WishParent { .. } => {}
            Op::Change(change) => {
                let result = self.change(n, change).await;
                assert!(result.is_ok() || !trap.disarm(), "{result:?}");
            }
            Op::Fsync => image.sync().await.unwrap(),
            Op::Close { change, how } => self.close(n, change, how).await,
            Op::Commit => {
                let content = self.slots[n].content.clone();
                self.attempts.push(content.clone());
                let result = image.commit().await;
                let may_fail = !trap.disarm();
                self.committed(n, content, result, may_fail).await;
            }
            Op::Hang { change, plan, meanwhile, again, end } => {
                crash = self.hang(n, change, plan, meanwhile, again, end).await;
            }
            Op::Rename { to } => {
                let name = match to {
                    To::Temporary => format!("{}.part", self.slots[n].name),
                    To::Final => self.slots[n].name.replace(".part", ""),
                };
                self.attempts.push(self.slots[n].content.clone());
                image.rename(&name).await.unwrap();
                self.slots[n].name = name;
                self.quiet().await;
                let slot = &mut self.slots[n];
                match image.status().state {
                    State::Failed => {
                        assert!(slot.failed || slot.changed || !trap.disarm());
                        slot.failed = true;
                    }
                    State::Clean => (slot.failed, slot.changed) = (false, false),
                    _ => {}
                }
            }
            Op::Remove => {
                image.remove().await;
                self.quiet().await;
                assert!(!image.directory.exists());
                self.slots.remove(n);
            }
            Op::Crash => crash = true,
        }
        trap.disarm();
        crash
    }

    /// A commit of `n` has ended, and nobody waited for it.
    fn committed_in_background(&mut self, n: usize) {
        let trap = Arc::clone(&self.life().trap);
        let repeated = trap.repeated();
        let slot = &mut self.slots[n];
        assert!(repeated == 0 || slot.changed, "{repeated} blocks were put again");
        match slot.image().status().state {
            State::Failed => {
                assert!(slot.failed || slot.changed || !trap.disarm());
                (slot.failed, slot.changed) = (true, false);
            }
            State::Clean => (slot.failed, slot.changed, slot.pristine) = (false, false, false),
            _ => {}
        }
    }

    async fn close(&mut self, n: usize, change: Change, how: How) {
        let image = self.slots[n].image();
        let trap = Arc::clone(&self.life().trap);
        let opened = Opened::new(Arc::clone(&image), true, true, 1);
        let other = Opened::new(Arc::clone(&image), true, true, 2);
        opened.begin_change();
        let result = self.change(n, change).await;
        opened.end_change(&result);
        assert!(result.is_ok() || !trap.disarm(), "{result:?}");
        let content = self.slots[n].content.clone();
        let dying = matches!(how, How::Dying).then(|| "killed".to_owned());
        if !matches!(how, How::Shared) {
            other.release();
        }
        if matches!(how, How::Slowly) {
            trap.slow_down(2);
        }
        if dying.is_none() && result.is_ok() {
            self.attempts.push(content.clone());
        }
        let before = self.puts();
        match opened.flush(1, dying) {
            Err(error) => {
                assert!(result.is_err(), "{error}");
            }
            Ok(Closed::Commit) => {
                assert!(matches!(how, How::Clean | How::Slowly));
                let Settings { commit_at_close, in_background, .. } = self.settings;
                let by_itself = commit_at_close && !in_background;
                let may_be_none = content.blocks().is_empty() || image.is_temporary() || !by_itself;
                let result = image.commit_closed().await;
                if result.is_ok() {
                    // The store may not be done with it.
                    self.quiet().await;
                }
                match result.transpose() {
                    Some(result) => {
                        let may_fail = !trap.disarm();
                        self.committed(n, content, result, may_fail).await;
                    }
                    None => assert!(may_be_none, "{:?}", image.status()),
                }
                if in_background {
                    self.committed_in_background(n);
                }
            }
            Ok(Closed::Nothing) => {}
        }
        if matches!(how, How::Shared) {
            assert!(matches!(opened.release(), Closed::Nothing));
            if let Closed::Commit = other.release() {
                // Of what was there before, if the write was refused: that had been closed.
                image.commit_in_background();
                self.quiet().await;
                if self.settings.commit_at_close {
                    let failed = image.status().state == State::Failed;
                    assert!(!failed || !trap.disarm());
                    let repeated = trap.repeated();
                    assert!(
                        repeated == 0 || self.slots[n].changed,
                        "{repeated} blocks were put again"
                    );
                    self.slots[n].failed = failed;
                    self.slots[n].changed &= failed;
                }
            }
        } else {
            let puts = self.puts();
            if let Closed::Commit = opened.release() {
                image.commit_in_background();
            }
            self.quiet().await;
            // What close() has reported is not tried again behind its back.
            assert_eq!(self.puts(), puts, "{before} before the flush");
        }
        if matches!(how, How::Dying) || result.is_err() {
            // What has changed nothing is no trouble, and takes away none.
            let state = image.status().state;
            let known = [State::Interrupted, State::Clean, State::Failed];
            assert!(known.contains(&state), "{state:?}");
        }
        trap.slow_down(0);
    }

    async fn hang(
        &mut self,
        n: usize,
        change: Change,
        plan: Plan,
        meanwhile: Vec<Change>,
        again: Again,
        end: End,
    ) -> bool {
        let image = self.slots[n].image();
        let trap = Arc::clone(&self.life().trap);
        let result = self.change(n, change).await;
        assert!(result.is_ok(), "{result:?}");
        trap.arm(plan);
        let mut content = self.slots[n].content.clone();
        self.attempts.push(content.clone());
        let committing = Arc::clone(&image);
        let commit = tokio::spawn(async move { committing.commit().await });
        let mut hangs = false;
        while !hangs && !commit.is_finished() {
            tokio::time::sleep(std::time::Duration::from_micros(100)).await;
            hangs = trap.caught.available_permits() > 0;
        }
        let mut cancelled = false;
        let mut asked = None;
        if hangs {
            let before = self.slots[n].failed;
            // Another commit of it, which went wrong, comes first.
            let waits = image.status().state == State::Queued;
            for change in meanwhile {
                let result = self.change(n, change).await;
                assert!(result.is_ok(), "{result:?}");
            }
            self.slots[n].failed = before;
            self.check_images().await;
            if image.state().is_dirty() {
                asked = self.again(n, again, waits).await;
            }
            if waits {
                content = self.slots[n].content.clone();
            }
            match end {
                End::Go => trap.release(),
                End::Cancel => {
                    image.cancel().unwrap();
                    cancelled = true;
                }
                End::Crash => return true,
            }
        }
        let result = commit.await.unwrap();
        if cancelled {
            // A start goes on, whoever waits for it.
            trap.release();
        }
        let retried = self.slots[n].changed;
        let empty = content.len == 0;
        self.committed(n, content, result, cancelled).await;
        let mut is_cut_off = false;
        if let Some(asked) = asked {
            let content = self.slots[n].content.clone();
            is_cut_off = content.len == 0;
            self.committed(n, content, asked.await.unwrap(), cancelled).await;
        }
        self.quiet().await;
        let status = image.status();
        if cancelled {
            assert_eq!(status.state, State::Interrupted);
            self.slots[n].changed |= retried;
        } else if !empty && !is_cut_off {
            assert!(matches!(status.state, State::Clean | State::Dirty), "{status:?}");
        }
        false
    }

    /// Asks for another commit while one hangs, and another one `waits`; that which was asked for by name.
    async fn again(
        &mut self,
        n: usize,
        again: Again,
        waits: bool,
    ) -> Option<tokio::task::JoinHandle<Result<SnapshotId>>> {
        let image = self.slots[n].image();
        let state = || image.status().state;
        let mut asked = None;
        self.attempts.push(self.slots[n].content.clone());
        match again {
            Again::Nothing => return None,
            Again::AskAndChange if !image.is_empty() => {
                let image = Arc::clone(&image);
                asked = Some(tokio::spawn(async move { image.commit().await }));
                while state() != State::Queued {
                    tokio::time::sleep(std::time::Duration::from_micros(100)).await;
                }
            }
            _ => assert_eq!(image.commit_closed().await.unwrap(), None),
        }
        if matches!(again, Again::Close) || state() != State::Queued {
            return asked;
        }
        let change = Change::Write { offset: 0, len: 1, value: 7 };
        self.change(n, change).await.unwrap();
        self.attempts.push(self.slots[n].content.clone());
        assert_eq!(state() == State::Queued, waits || asked.is_some());
        asked
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn settings() -> impl Strategy<Value = Settings> {
    let seldom = || prop::bool::weighted(0.25);
    (seldom(), seldom(), seldom()).prop_map(|(manual, in_background, full_copy)| Settings {
        commit_at_close: !manual,
        in_background,
        full_copy,
        ..Settings::default()
    })
}

fn run(settings: Settings, steps: Vec<Step>) {
    let mut process = runtime();
    let mut world = process.block_on(World::with(settings));
    for step in steps {
        let crash = process.block_on(async {
            let step = tokio::time::timeout(PATIENCE, world.step(step));
            step.await.expect("it is stuck")
        });
        if crash {
            drop(process);
            world.die();
            process = runtime();
            process.block_on(world.live());
        }
        process.block_on(async {
            world.check_images().await;
            world.check_store().await;
        });
    }
    process.block_on(async {
        for n in 0..world.slots.len() {
            let content = world.slots[n].content.clone();
            world.attempts.push(content.clone());
            let result = world.slots[n].image().commit().await;
            world.committed(n, content, result, false).await;
        }
        world.quiet().await;
        world.check_store().await;
        world.check_snapshots().await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn images_and_snapshots_are_what_a_map_of_pages_would_be(
        settings in settings(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        run(settings, steps);
    }
}
