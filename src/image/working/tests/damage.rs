//! Damage of what is staged: no snapshot of it, nothing of it deleted, and the others unharmed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rstest::rstest;
use tokio::runtime::Runtime;

use super::content::Content;
use super::trap::{Fault, Plan};
use super::world::{Change, STORE, World, tempdir};
use crate::image::staging::Staging;
use crate::model::BLOCK_SIZE_U64;
use crate::store::wrap::Call;

/// How the image was left that is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Failed,
    /// With a generation that waits for the one before.
    Queued,
    /// Synced by its program, and not closed.
    Dirty,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Document,
    Data,
    Map,
    Sums,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    Missing,
    Empty,
    Half,
    /// Without its last byte.
    Short,
    /// One bit flipped, so far behind the start in thousandths.
    Flip(usize),
    /// It is a copy of that of another image.
    Foreign,
    /// It and that of another image have changed places.
    Swapped,
}

const DAMAGES: [Damage; 13] = [
    Damage::Missing,
    Damage::Empty,
    Damage::Half,
    Damage::Short,
    Damage::Flip(0),
    Damage::Flip(2),
    Damage::Flip(130),
    Damage::Flip(500),
    Damage::Flip(800),
    Damage::Flip(995),
    Damage::Flip(999),
    Damage::Foreign,
    Damage::Swapped,
];

/// What was logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn listen(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || log.clone());
        tracing::subscriber::set_default(subscriber.with_ansi(false).finish())
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn write(block: u64, value: u8) -> Change {
    Change::Write { offset: block * BLOCK_SIZE_U64 + 1000, len: 300_000, value }
}

/// Two images that a process leaves: the first one as asked for, the second one failed.
fn leave(left: Left) -> (World, [PathBuf; 2]) {
    let process = runtime();
    let (mut world, directories) = process.block_on(async {
        let mut world = World::new().await;
        for n in 0..2 {
            world.create(None).await;
            for block in [0, 1, 4] {
                world.change(n, write(block, 10 * n as u8 + block as u8 + 1)).await.unwrap();
            }
        }
        let trap = Arc::clone(&world.life().trap);
        let images = [0, 1].map(|n: usize| world.slots[n].image());
        for n in [1, 0] {
            let image = Arc::clone(&images[n]);
            world.attempts.push(world.slots[n].content.clone());
            let plan = |fault| Plan { call: Call::Complete, after: 0, fault };
            if n == 1 || left == Left::Failed {
                trap.arm(plan(Fault::Fail));
                image.commit().await.unwrap_err();
            } else if left == Left::Dirty {
                image.sync().await.unwrap();
            } else {
                trap.arm(plan(Fault::HangBefore));
                let committing = Arc::clone(&image);
                tokio::spawn(async move { committing.commit().await });
                trap.caught.acquire().await.unwrap().forget();
                for block in [1, 3] {
                    world.change(0, write(block, 100 + block as u8)).await.unwrap();
                }
                world.attempts.push(world.slots[0].content.clone());
                assert_eq!(image.commit_closed().await.unwrap(), None);
            }
        }
        let directories = images.map(|image| image.directory.clone());
        (world, directories)
    });
    drop(process);
    world.die();
    (world, directories)
}

/// The file of the newest generation.
fn find(directory: &Path, what: What) -> PathBuf {
    if what == What::Document {
        return directory.join("image.json");
    }
    let text = std::fs::read_to_string(directory.join("image.json")).unwrap();
    let document: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let newest = document["generations"].as_array().unwrap().last().unwrap()["id"].clone();
    let kind = format!("{what:?}").to_lowercase();
    directory.join(format!("{}.{kind}", newest.as_str().unwrap()))
}

/// Damages a file; whether that changed anything.
fn harm(damage: Damage, file: &Path, other: &Path) -> bool {
    let mut bytes = std::fs::read(file).unwrap();
    let theirs = std::fs::read(other).unwrap();
    let before = bytes.clone();
    if bytes.is_empty() && damage != Damage::Missing {
        return false;
    }
    match damage {
        Damage::Missing => {
            std::fs::remove_file(file).unwrap();
            return true;
        }
        Damage::Empty => bytes.clear(),
        Damage::Half => bytes.truncate(bytes.len() / 2),
        Damage::Short => bytes.truncate(bytes.len() - 1),
        Damage::Flip(thousandths) => {
            let at = bytes.len() * thousandths / 1000;
            bytes[at] ^= 0x10;
        }
        Damage::Foreign => bytes = theirs,
        Damage::Swapped => {
            std::fs::write(other, &bytes).unwrap();
            bytes = theirs;
        }
    }
    std::fs::write(file, &bytes).unwrap();
    bytes != before
}

/// What a mount makes of it, and a commit that somebody asks for.
fn check(mut world: World, directories: &[PathBuf; 2], data: &Path, swapped: bool, case: &str) {
    let log = Log::default();
    let _listening = log.listen();
    let staged = std::fs::read(data).ok();
    let expected: Vec<Content> = world.slots.drain(..).map(|slot| slot.content).collect();
    let process = runtime();
    let errors = process.block_on(async {
        let mut errors = String::new();
        let images = world.begin().await;
        // What cannot be used is told.
        for directory in directories {
            let is_back = images.iter().any(|image| image.directory == *directory);
            let damaged = world.life().shop.damaged();
            let told = damaged.iter().find(|damaged| damaged.directory == *directory);
            assert!(is_back != told.is_some(), "{case}: {told:?}");
            assert!(told.is_none_or(|told| !told.name.is_empty() && !told.error.is_empty()));
        }
        for image in &images {
            image.resume();
        }
        world.quiet().await;
        for image in &images {
            if let Err(error) = image.commit().await {
                errors.push_str(&error.to_string());
                errors.push_str(&image.status().error.unwrap());
            }
        }
        world.quiet().await;
        // Nothing wrong was made a snapshot of.
        world.check_store().await;
        errors
    });
    let committed = |n: usize| world.snapshots.values().any(|content| *content == expected[n]);
    let name = |n: usize| directories[n].file_name().unwrap().to_str().unwrap();
    assert!(committed(1) || swapped, "{case}: the other image was not committed: {}", log.text());
    if committed(0) {
        return;
    }
    let told = log.text().contains(name(0));
    assert!(told, "{case}: nothing tells of {}: {errors}\n{}", name(0), log.text());
    assert!(std::fs::read(data).ok() == staged, "{case}: data is deleted or changed");
}

#[rstest]
fn damage_is_no_snapshot_and_costs_no_data(
    #[values(Left::Failed, Left::Queued, Left::Dirty)] left: Left,
    #[values(What::Document, What::Data, What::Map, What::Sums)] what: What,
) {
    for damage in DAMAGES {
        let other_length = !matches!(damage, Damage::Missing | Damage::Empty | Damage::Half);
        // What was only synced has no sums: it is as safe as the disk.
        if (left, what) == (Left::Dirty, What::Data) && other_length && damage != Damage::Short {
            continue;
        }
        let (world, directories) = leave(left);
        let [file, other] = [0, 1].map(|n: usize| find(&directories[n], what));
        let data = find(&directories[0], What::Data);
        let case = format!("{left:?}, {what:?}, {damage:?}");
        let harmed = harm(damage, &file, &other);
        // Files of sums that nothing was noted in are equal.
        assert!(harmed || what == What::Sums, "{case}");
        check(world, &directories, &data, damage == Damage::Swapped, &case);
    }
}

#[test]
fn images_that_are_not_damaged_are_committed() {
    for left in [Left::Failed, Left::Queued, Left::Dirty] {
        let (world, directories) = leave(left);
        let data = find(&directories[0], What::Data);
        check(world, &directories, &data, false, "nothing");
        assert!(!data.exists(), "{left:?}: it was not committed");
    }
}

#[test]
fn a_staging_directory_without_a_valid_owner_is_refused_and_kept() {
    for damage in DAMAGES {
        let (world, directories) = leave(Left::Failed);
        let document = world.staging().join("staging.json");
        let elsewhere = tempdir();
        let theirs = elsewhere.path().join("staging.json");
        drop(Staging::open(elsewhere.path(), "file:///elsewhere", u64::MAX).unwrap());
        let data = find(&directories[0], What::Data);
        let before = std::fs::read(&data).unwrap();
        harm(damage, &document, &theirs);
        let error = Staging::open(&world.staging(), STORE, u64::MAX).unwrap_err().to_string();
        assert!(error.contains(world.staging().to_str().unwrap()), "{damage:?}: {error}");
        assert!(std::fs::read(&data).unwrap() == before, "{damage:?}");
    }
}
