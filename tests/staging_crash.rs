//! The daemon is killed, again and again, while programs write: what they were told is true.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::fd::IntoRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::{BLOCK, Mount, Sandbox, can_mount, names, until};

const ROUNDS: usize = 50;

/// Longest time between a mount and its end.
const LIFE_MILLIS: u64 = 250;

const MAX_LEN: u64 = 5 * BLOCK;

/// A xorshift generator: the same seed does the same.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.below(u64::MAX).to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// What its writer was told of a file.
#[derive(Default)]
struct Told {
    /// All writes that were answered.
    content: Vec<u8>,
    /// Where a write was not answered.
    open_end: Option<(u64, u64)>,
    /// What it held when a close was answered, and nothing was written since.
    closed: bool,
    /// What it held when somebody called close.
    tried: Vec<u64>,
}

type Book = Arc<Mutex<BTreeMap<String, Told>>>;

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Makes files until something fails.
fn write_files(directory: &Path, prefix: &str, random: &mut Random, book: &Book) -> std::io::Error {
    for n in 0.. {
        let name = format!("{prefix}-{n}.img");
        for _ in 0..=random.below(2) {
            if let Err(error) = write_file(&directory.join(&name), &name, random, book) {
                return error;
            }
        }
    }
    unreachable!()
}

fn write_file(path: &Path, name: &str, random: &mut Random, book: &Book) -> std::io::Result<()> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    for _ in 0..=random.below(4) {
        change(&file, name, random, book)?;
        if random.below(3) == 0 {
            file.sync_all()?;
        }
    }
    {
        let mut book = book.lock().unwrap();
        let told = book.get_mut(name).unwrap();
        told.tried.push(digest(&told.content));
    }
    nix::unistd::close(file.into_raw_fd())?;
    book.lock().unwrap().get_mut(name).unwrap().closed = true;
    Ok(())
}

fn change(file: &File, name: &str, random: &mut Random, book: &Book) -> std::io::Result<()> {
    let offset = random.below(MAX_LEN - 700_000);
    let len = 1 + random.below(700_000);
    let data = random.bytes(usize::try_from(len).unwrap());
    let end = offset + data.len() as u64;
    {
        let mut book = book.lock().unwrap();
        let told = book.entry(name.to_owned()).or_default();
        told.open_end = Some((offset, end));
        told.closed = false;
    }
    file.write_all_at(&data, offset)?;
    let mut book = book.lock().unwrap();
    let told = book.get_mut(name).unwrap();
    let (start, end) = (usize::try_from(offset).unwrap(), usize::try_from(end).unwrap());
    let len = told.content.len().max(end);
    told.content.resize(len, 0);
    told.content[start..end].copy_from_slice(&data);
    told.open_end = None;
    Ok(())
}

/// Whether a file is what its writer was told, but for the write that was not answered.
fn is_as_told(read: &[u8], told: &Told) -> bool {
    let (start, end) = told.open_end.unwrap_or((0, 0));
    let (start, end) = (usize::try_from(start).unwrap(), usize::try_from(end).unwrap());
    let fits = read.len() >= told.content.len() && read.len() <= told.content.len().max(end);
    let expected = |at: usize| told.content.get(at).copied().unwrap_or(0);
    fits && (0..read.len()).all(|at| (start..end).contains(&at) || read[at] == expected(at))
}

fn state(path: &Path) -> String {
    let state = xattr::get(path, "user.fspfs.state").unwrap().unwrap_or_default();
    String::from_utf8(state).unwrap()
}

/// Checks everything that was said before this mount, and clears `new/`.
fn check(mount: &Mount, book: &Book, seen: &mut BTreeMap<String, u64>) {
    let mut book = book.lock().unwrap();
    let new = mount.join("new");
    let mut staged = BTreeMap::new();
    for name in names(&new) {
        let path = new.join(&name);
        staged.insert(name.clone(), std::fs::read(&path).unwrap());
        until("what was being committed is", || {
            !["committing", "queued"].contains(&&state(&path)[..])
        });
        assert_ne!(state(&path), "failed", "{name}");
    }
    // Only what a close was called for is a snapshot.
    let tried: BTreeSet<u64> = book.values().flat_map(|told| told.tried.iter().copied()).collect();
    for name in names(&mount.path).into_iter().filter(|name| name.starts_with("snap-")) {
        let Entry::Vacant(unseen) = seen.entry(name.clone()) else { continue };
        let content = digest(&std::fs::read(mount.join(&name)).unwrap());
        assert!(tried.contains(&content), "{name} is not what was closed");
        unseen.insert(content);
    }
    let snapshots: BTreeSet<u64> = seen.values().copied().collect();
    for (name, told) in book.iter() {
        let committed = snapshots.contains(&digest(&told.content));
        let is_staged = staged.get(name).is_some_and(|read| is_as_told(read, told));
        let nothing = told.content.is_empty();
        assert!(!told.closed || committed, "{name} was closed, and there is no snapshot");
        assert!(committed || is_staged || nothing, "{name} is lost");
        let wrong = staged.contains_key(name) && !is_staged;
        assert!(!wrong, "{name} is not what was written");
    }
    for name in staged.keys() {
        std::fs::remove_file(new.join(name)).unwrap();
    }
    // What was checked once is not looked for again, but for its contents.
    book.retain(|_, told| {
        told.content.clear();
        told.closed = false;
        told.open_end = None;
        true
    });
}

#[test]
fn what_a_killed_daemon_had_accepted_is_there() {
    if !can_mount(&[]) {
        return;
    }
    let seed = std::env::var("FSPFS_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 0x5eed);
    println!("FSPFS_SEED={seed}");
    let began = Instant::now();
    let mut random = Random(seed);
    let sandbox = Sandbox::with_store();
    let book = Book::default();
    let mut seen = BTreeMap::new();
    for round in 0..ROUNDS {
        let mut mount = sandbox.mount(&[]);
        check(&mount, &book, &mut seen);
        let killed = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let (directory, book) = (mount.join("new"), Arc::clone(&book));
                let (mut random, killed) =
                    (Random(random.below(u64::MAX) | 1), Arc::clone(&killed));
                std::thread::spawn(move || {
                    let prefix = format!("{round}-{writer}");
                    let error = write_files(&directory, &prefix, &mut random, &book);
                    assert!(killed.load(Ordering::SeqCst), "before the end: {error}");
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(random.below(LIFE_MILLIS)));
        killed.store(true, Ordering::SeqCst);
        mount.signal(Signal::SIGKILL);
        mount.daemon.wait().unwrap();
        for writer in writers {
            writer.join().unwrap();
        }
    }
    let mount = sandbox.mount(&[]);
    check(&mount, &book, &mut seen);
    let log = mount.unmount();
    assert!(!log.contains("cannot be used"), "{log}");
    assert!(
        names(
            sandbox
                .join("state/fspfs/staging")
                .join(names(sandbox.join("state/fspfs/staging")).first().unwrap(),)
                .join("images")
        )
        .is_empty()
    );
    println!("{} snapshots in {:?}", seen.len(), began.elapsed());
    sandbox.assert_nothing_is_left();
}
