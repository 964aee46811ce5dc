//! What is synced before what: the order that lets a snapshot, and a file that was downloaded,
//! survive a power cut at any moment. Seen from the system calls that the program makes.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use support::{BLOCK, GIB, Sandbox, has, run, text};

/// A system call that succeeded, in the order in which they returned.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Create(PathBuf),
    MakeDirectory(PathBuf),
    Write(PathBuf),
    /// Covers what came before this position: it began then.
    Sync(PathBuf, usize),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

/// Runs the program under strace.
fn trace(sandbox: &Sandbox, arguments: &[&str]) -> (Vec<Event>, String) {
    let calls = "trace=openat,openat2,open,creat,mkdir,mkdirat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,ftruncate,fallocate,copy_file_range";
    let store = sandbox.join("store");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-qq", "-s", "0", "-o", "trace", "-e", calls, "-e", "signal=none"]);
    strace.arg(env!("CARGO_BIN_EXE_fspfs")).args(arguments);
    strace.current_dir(&sandbox.path).env("FSPFS_STORE", store);
    let output = run(&mut strace);
    assert!(output.status.success(), "{}", text(&output));
    let log = std::fs::read_to_string(sandbox.join("trace")).unwrap();
    (events(&log, &sandbox.path), String::from_utf8(output.stdout).unwrap())
}

/// Reads a log of strace. A call counts from when it returns, but a sync covers only what came before
/// it began.
fn events(log: &str, directory: &Path) -> Vec<Event> {
    let mut begun: HashMap<&str, (String, usize)> = HashMap::new();
    let mut events = Vec::new();
    for line in log.lines() {
        let (thread, call) = line.split_once(' ').unwrap();
        let call = call.trim_start();
        if let Some(start) = call.strip_suffix("<unfinished ...>") {
            begun.insert(thread, (start.trim_end().to_owned(), events.len()));
        } else if call.starts_with("<... ") {
            let end = call.split_once("resumed>").unwrap().1;
            let (start, position) = begun.remove(thread).unwrap();
            events.extend(event(&format!("{start}{end}"), directory, position));
        } else {
            events.extend(event(call, directory, events.len()));
        }
    }
    events
}

fn event(call: &str, directory: &Path, begun: usize) -> Option<Event> {
    let (call, result) = call.rsplit_once(" = ")?;
    if result.starts_with('-') || result.starts_with('?') {
        return None;
    }
    let (name, arguments) = call.split_once('(')?;
    // A path is the text between quotes; a descriptor has its path between angle brackets. One before a path is the
    // directory that it is in.
    let parts: Vec<&str> = arguments.split('"').collect();
    let path = |[before, path]: &[&str; 2]| {
        let inside = before.rsplit_once('<').and_then(|(_, rest)| rest.split_once('>'));
        let inside = inside.map_or(directory, |(at, _)| Path::new(at));
        let path = inside.join(path);
        path.components().filter(|part| *part != Component::CurDir).collect()
    };
    let quoted: Vec<PathBuf> = parts.as_chunks().0.iter().map(path).collect();
    let descriptor = || {
        let path = arguments.split_once('<')?.1.split_once('>')?.0;
        Some(PathBuf::from(path.trim_end_matches(" (deleted)")))
    };
    match name {
        "openat" | "openat2" | "open" | "creat" if arguments.contains("O_CREAT") => {
            Some(Event::Create(quoted.into_iter().next()?))
        }
        "mkdir" | "mkdirat" => Some(Event::MakeDirectory(quoted.into_iter().next()?)),
        "write" | "pwrite64" | "writev" | "ftruncate" | "fallocate" | "copy_file_range" => {
            Some(Event::Write(descriptor()?))
        }
        "fsync" | "fdatasync" => Some(Event::Sync(descriptor()?, begun)),
        "rename" | "renameat" | "renameat2" | "link" | "linkat" => {
            let mut paths = quoted.into_iter();
            Some(Event::Rename(paths.next()?, paths.next()?))
        }
        "unlink" | "unlinkat" => Some(Event::Remove(quoted.into_iter().next()?)),
        _ => None,
    }
}

/// What a power cut would leave, if it left no more than it must: a name counts once its directory
/// was synced, data once its file was.
#[derive(Debug, Default)]
struct Disk {
    /// Files with data that is not synced, and when it was written.
    dirty: Vec<(PathBuf, usize)>,
    /// Names that are not durable since their directory was not synced, and when they were made.
    loose: Vec<(PathBuf, usize)>,
    /// Number of events so far.
    now: usize,
}

impl Disk {
    fn apply(&mut self, event: &Event) {
        let now = self.now;
        self.now += 1;
        match event {
            Event::Create(path) => {
                self.dirty.push((path.clone(), now));
                self.loose.push((path.clone(), now));
            }
            Event::MakeDirectory(path) => self.loose.push((path.clone(), now)),
            Event::Write(path) => self.dirty.push((path.clone(), now)),
            Event::Sync(path, before) => {
                self.dirty.retain(|(file, when)| file != path || when >= before);
                self.loose.retain(|(file, when)| file.parent() != Some(path) || when >= before);
            }
            Event::Rename(from, to) => {
                for (file, _) in self.dirty.iter_mut().filter(|(file, _)| file == from) {
                    file.clone_from(to);
                }
                self.loose.retain(|(file, _)| file != from);
                self.loose.push((to.clone(), now));
            }
            Event::Remove(path) => {
                self.dirty.retain(|(file, _)| file != path);
                self.loose.retain(|(file, _)| file != path);
            }
        }
    }

    fn is_dirty(&self, path: &Path) -> bool {
        self.dirty.iter().any(|(file, _)| file == path)
    }

    /// Whether this file, with every directory above it up to `root`, survives.
    fn has(&self, path: &Path, root: &Path) -> bool {
        let loose = |at: &Path| self.loose.iter().any(|(file, _)| file == at);
        !self.is_dirty(path) && !path.ancestors().take_while(|at| *at != root).any(loose)
    }
}

/// Where a directory is synced after what happened at `position`.
#[track_caller]
fn synced_after(trace: &[Event], position: usize, directory: &Path) -> usize {
    let synced = |event: &Event| matches!(event, Event::Sync(path, before) if path == directory && *before > position);
    trace.iter().position(synced).expect("it is not made durable")
}

/// The objects of a kind that are in the store now.
fn objects(store: &Path, kind: &str) -> Vec<PathBuf> {
    fn walk(at: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(at).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, files) } else { files.push(path) }
        }
    }
    let mut files = Vec::new();
    walk(&store.join(kind), &mut files);
    files
}

#[test]
fn a_manifest_comes_after_all_that_it_needs() {
    if !has(&["strace"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let store = sandbox.join("store");
    // More than one pack and more than one page.
    sandbox.image("a.img", 17 * GIB, &[(0, 70 * BLOCK), (9 * GIB, BLOCK), (17 * GIB - 5, 5)]);
    let (trace, printed) = trace(&sandbox, &["upload", "--name", "x", "a.img"]);
    let id = printed.lines().last().unwrap();
    let manifest = store.join(format!("snapshots/{id}.json"));
    let published = trace.iter().position(|e| matches!(e, Event::Rename(_, to) if *to == manifest));
    let published = published.expect("the manifest gets its name by a rename");
    let needed: Vec<PathBuf> =
        ["packs", "pages", "tags"].iter().flat_map(|kind| objects(&store, kind)).collect();
    assert_eq!(objects(&store, "packs").len(), 2);
    assert_eq!(objects(&store, "pages").len(), 4, "three pages and their list");
    assert_eq!(objects(&store, "tags").len(), 1);

    let mut disk = Disk::default();
    for (n, event) in trace.iter().enumerate() {
        // Nothing gets a name that counts before its data is synced, nor changes afterwards.
        match event {
            Event::Rename(from, to) if to.starts_with(&store) => {
                assert!(from.starts_with(store.join("tmp")), "{event:?}");
                assert!(!disk.is_dirty(from), "{} is not synced", to.display());
            }
            Event::Create(path) | Event::Write(path) if path.starts_with(&store) => {
                assert!(path.starts_with(store.join("tmp")), "{event:?} changes what has a name");
            }
            _ => {}
        }
        if n == published {
            for path in &needed {
                let at = |e: &Event| matches!(e, Event::Rename(_, to) if to == path);
                assert!(trace[..n].iter().any(at), "{} comes later", path.display());
                assert!(disk.has(path, &store), "{} would not survive", path.display());
            }
        }
        disk.apply(event);
    }
    for path in needed.iter().chain([&manifest]) {
        assert!(disk.has(path, &store), "{} would not survive", path.display());
    }
    // What was pending is removed only then.
    let removed = trace
        .iter()
        .position(|e| matches!(e, Event::Remove(p) if p.starts_with(store.join("pending"))));
    assert!(removed.unwrap() > synced_after(&trace, published, &store.join("snapshots")));
}

#[test]
fn deleting_is_durable() {
    if !has(&["strace"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    let store = sandbox.join("store");
    sandbox.image("a.img", BLOCK, &[(0, BLOCK)]);
    let id = sandbox.upload("a.img", &[]);
    let (trace, _) = trace(&sandbox, &["delete", "--yes", &id]);
    let manifest = store.join(format!("snapshots/{id}.json"));
    let removed = trace.iter().position(|e| *e == Event::Remove(manifest.clone())).unwrap();
    synced_after(&trace, removed, &store.join("snapshots"));
}

#[test]
fn a_new_repository_is_durable() {
    if !has(&["strace"]) {
        return;
    }
    let sandbox = Sandbox::new();
    let (trace, _) = trace(&sandbox, &["init", "store"]);
    let mut disk = Disk::default();
    for event in &trace {
        disk.apply(event);
    }
    let info = sandbox.join("store/fspfs.json");
    assert!(trace.iter().any(|e| matches!(e, Event::Rename(_, to) if *to == info)), "{trace:?}");
    assert!(disk.has(&info, &sandbox.path), "{disk:?}");
}

#[test]
fn a_download_is_durable_before_it_gets_its_name() {
    if !has(&["strace"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", GIB, &[(0, 3 * BLOCK), (GIB - 5, 5)]);
    let id = sandbox.upload("a.img", &[]);
    std::fs::create_dir(sandbox.join("out")).unwrap();
    let out = sandbox.join("out/b.img");
    for again in [false, true] {
        if again {
            std::fs::write(&out, "old").unwrap();
        }
        let (trace, _) = trace(&sandbox, &["download", &id, "out/b.img"]);
        let named = trace.iter().position(|e| matches!(e, Event::Rename(_, to) if *to == out));
        let named = named.expect("it gets its name by a rename");
        let mut disk = Disk::default();
        for (n, event) in trace.iter().enumerate() {
            if let (true, Event::Rename(from, _)) = (n == named, event) {
                assert!(!disk.is_dirty(from), "it is not synced before");
                assert_eq!(from.parent(), out.parent());
            }
            assert!(!matches!(event, Event::Write(p) | Event::Create(p) if *p == out), "{event:?}");
            disk.apply(event);
        }
        let writes =
            trace.iter().filter(|e| matches!(e, Event::Write(p) if p.parent() == out.parent()));
        assert!(writes.count() >= 4, "the writes are in the trace");
        assert!(disk.has(&out, &sandbox.path), "{disk:?}");
    }
}

/// The reader of traces is what all this rests on.
#[test]
fn traces_are_understood() {
    let log = r#"7 openat2(4</w/s>, "tmp/x", {flags=O_WRONLY|O_CREAT|O_EXCL, mode=0600, resolve=RESOLVE_BENEATH}, 24) = 9</w/s/tmp/x>
7 write(9</w/s/tmp/x>, ""..., 5) = 5
8 fsync(9</w/s/tmp/x> <unfinished ...>
7 mkdirat(3</w/s>, "packs", 0700) = -1 EEXIST (File exists)
8 <... fsync resumed>) = 0
7 renameat2(5</w/s/tmp>, "x", AT_FDCWD</w>, "./s/packs/x", RENAME_NOREPLACE) = 0
7 fsync(3</w/s/packs>) = 0
7 exit_group(0) = ?
"#;
    let path = |name: &str| Path::new("/w/s").join(name);
    let expected = [
        Event::Create(path("tmp/x")),
        Event::Write(path("tmp/x")),
        Event::Sync(path("tmp/x"), 2),
        Event::Rename(path("tmp/x"), path("packs/x")),
        Event::Sync(path("packs"), 4),
    ];
    let events = events(log, Path::new("/w"));
    assert_eq!(events, expected);
    let mut disk = Disk::default();
    for (n, event) in events.iter().enumerate() {
        assert!(!disk.has(&path("packs/x"), Path::new("/w")) || n < 4);
        disk.apply(event);
    }
    assert!(disk.has(&path("packs/x"), Path::new("/w")));
}
