//! `multiclone`: a snapshot is read once, and written to many files and devices.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::context::Context;
use super::download::{Download, check_outside};
use super::list::Counted;
use super::list_file::{Line, Named, read_if_list, read_list};
use super::reference::{HELP, Reference};
use super::table::{Operation, Report};
use super::text::contains;
use super::{Ending, Error, Exit, Left, Result};
use crate::arguments::ResumeArgs;
use crate::blocking::blocking;
use crate::model::{Snapshot, SnapshotId};
use crate::shown::one_line;
use crate::store::SharedStore;
use crate::transfer;
use crate::transfer::engine::transfer;
use crate::transfer::journal::name_of;
use crate::transfer::sink::target::Target;
use crate::transfer::source::snapshot::SnapshotSource;

/// Write a snapshot to many files or block devices
#[derive(Args, Debug)]
#[command(after_help = "\
The snapshot is read once. Each target is written as `download` writes it: a file is replaced as a
whole once everything is there, a device is written in place. A target that fails does not stop the
others. What is stopped goes on where it was when the same command is given again.

A list is a text file with one target a line; blank lines and lines that begin with # do not count.
If there is one TARGET alone, and it is a file with nothing but absolute paths, it is taken as a list.

Examples:
  fspfs -s /srv/snaps multiclone snap-0123456789abcdef0 /dev/sdb /dev/sdc /dev/sdd
  fspfs -s /srv/snaps multiclone snap-0123456789abcdef0 --list targets.txt
  fspfs -s /srv/snaps multiclone --dry-run snap-0123456789abcdef0 --list targets.txt

Exit status: 0 all targets are written, 1 none is, 2 wrong usage, 3 some are.")]
pub(crate) struct MulticloneArgs {
    #[arg(value_name = "SNAP", help = HELP)]
    snapshot: Reference,
    /// Files or block devices
    #[arg(value_name = "TARGET", required_unless_present = "list")]
    targets: Vec<PathBuf>,
    /// Take targets from this text file too, one a line
    #[arg(long, value_name = "FILE")]
    list: Option<PathBuf>,
    #[command(flatten)]
    resume: ResumeArgs,
}

/// What came of each target.
#[derive(Debug, Serialize)]
pub(crate) struct Multicloned {
    id: SnapshotId,
    targets: Vec<Written>,
    failed: usize,
    #[serde(skip)]
    dry_run: bool,
    /// Blocks that each target has got.
    #[serde(skip)]
    blocks: u64,
    #[serde(skip)]
    elapsed: Duration,
}

/// What came of one target.
#[derive(Debug, Serialize)]
struct Written {
    path: String,
    error: Option<String>,
}

impl Report for Multicloned {
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.dry_run && self.exit() != Exit::Failed {
            lines.push(contains(&self.id, self.blocks, self.elapsed.as_secs_f64()));
            let done = self.targets.iter().filter(|target| target.error.is_none());
            lines.extend(done.map(|target| format!("{}: done", one_line(&target.path))));
        }
        lines.extend(self.ids());
        lines
    }

    /// The snapshot, unless no target is it.
    fn ids(&self) -> Vec<String> {
        let id = (self.exit() != Exit::Failed).then(|| self.id.to_string());
        id.into_iter().collect()
    }

    fn exit(&self) -> Exit {
        match self.failed {
            0 => Exit::Done,
            failed if failed == self.targets.len() => Exit::Failed,
            _ => Exit::Partly,
        }
    }
}

impl Operation for MulticloneArgs {
    const NAME: &'static str = "multiclone";
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0 /dev/sdb /dev/sdc");
    const DRY_RUN: bool = true;
    type Report = Multicloned;

    async fn run(self, cx: &Context) -> Result<Multicloned> {
        let began = Instant::now();
        let paths = self.paths(cx).await?;
        let store = cx.open().await?;
        let doing = || format!("write {} to {} targets", self.snapshot, paths.len());
        let finding = cx.run.unless_stopped(async {
            let id = self.snapshot.id(cx, &store).await?;
            super::readable(&store, &id).await
        });
        let snapshot = finding.await?.map_err(|error| error.doing(doing()))?;
        let (ends, blocks) = if cx.dry_run {
            let ends = dry_run(cx, &store, &snapshot, &paths).await;
            (ends.map_err(|error| error.doing(doing()))?, 0)
        } else {
            let resume = cx.resume(&cx.house.from, &store, &self.resume)?;
            let download = |path: &PathBuf| Download {
                id: snapshot.id.clone(),
                path: path.clone(),
                resume: resume.clone(),
            };
            let downloads = paths.iter().map(download).collect();
            let (ends, blocks) = write(cx, &store, &snapshot, downloads).await;
            (unless_stopped(ends).map_err(|error| error.doing(doing()))?, blocks)
        };
        for (path, end) in paths.iter().zip(&ends) {
            if let Err(error) = end {
                tell_failed(cx, &snapshot.id, path, error);
            }
        }
        cx.tell_cost(&store);
        let targets = paths.iter().zip(ends).map(|(path, end)| Written {
            path: name_of(path),
            error: end.err().map(|error| error.to_string()),
        });
        let targets: Vec<_> = targets.collect();
        let failed = targets.iter().filter(|target| target.error.is_some()).count();
        let (id, dry_run, elapsed) = (snapshot.id, cx.dry_run, began.elapsed());
        Ok(Multicloned { id, targets, failed, dry_run, blocks, elapsed })
    }
}

impl MulticloneArgs {
    /// All targets, each of which is another file or device.
    async fn paths(&self, cx: &Context) -> Result<Vec<PathBuf>> {
        let mut named: Vec<_> = self.targets.iter().cloned().map(Named::by_itself).collect();
        if let Some(list) = &self.list {
            cx.check_place(list)?;
            named.extend(read_list(list).await?);
        } else if let [alone] = &self.targets[..] {
            cx.check_place(alone)?;
            if let Some(listed) = read_if_list(alone).await? {
                let (list, targets) = (alone.display(), listed.len());
                cx.note(format_args!("{list} is a list of {targets} targets"));
                named = listed;
            }
        }
        let store = cx.house.from.directory().ok();
        for target in &named {
            let checked = cx.check_place(&target.path);
            let checked = checked.and_then(|()| check_outside(&target.path, store));
            let checked = checked.and_then(|()| Ok(Target::check_kind(&target.path)?));
            checked.map_err(|error| target.refused(error))?;
        }
        check_distinct(&named)?;
        Ok(named.into_iter().map(|target| target.path).collect())
    }
}

/// What two names of the same target have in common.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Identity {
    /// Device and inode of a file.
    File(u64, u64),
    /// Number of a device, which may have several nodes.
    Device(u64),
    /// What is not there yet: device and inode of its directory, and its name.
    New(u64, u64, OsString),
    /// The directory is not there either.
    Nowhere(PathBuf),
}

impl Identity {
    fn of(path: &Path) -> Self {
        match path.metadata() {
            Ok(found) if found.file_type().is_block_device() => return Self::Device(found.rdev()),
            Ok(found) => return Self::File(found.dev(), found.ino()),
            Err(_) => {}
        }
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let directory = path.parent().and_then(|directory| directory.metadata().ok());
        match (directory, path.file_name()) {
            (Some(found), Some(name)) => Self::New(found.dev(), found.ino(), name.to_owned()),
            _ => Self::Nowhere(path),
        }
    }
}

/// Refuses a target that is named twice, and one that is the list.
fn check_distinct(named: &[Named]) -> Result<()> {
    let mut seen: HashMap<Identity, &Named> = HashMap::new();
    let mut lists: HashMap<&Path, Identity> = HashMap::new();
    for target in named {
        let (identity, path) = (Identity::of(&target.path), target.path.display());
        if let Some(Line { list, .. }) = &target.line {
            lists.entry(list).or_insert_with(|| Identity::of(list));
        }
        if let Some(first) = seen.get(&identity) {
            let again = match &first.line {
                Some(line) => format!("{} of {line}", first.path.display()),
                None => first.path.display().to_string(),
            };
            return Err(target.refused(format_args!("{path}: it is the same target as {again}")));
        }
        seen.insert(identity, target);
    }
    for identity in lists.values() {
        if let Some(target) = seen.get(identity) {
            let path = target.path.display();
            return Err(target.refused(format_args!("{path}: it is the list itself")));
        }
    }
    Ok(())
}

/// Says what would be done. What is wrong with each target, as far as that shows without a write.
async fn dry_run(
    cx: &Context,
    store: &SharedStore,
    snapshot: &Snapshot,
    paths: &[PathBuf],
) -> Result<Vec<Result<()>>> {
    let counted = cx.run.unless_stopped(Counted::of(store, &snapshot.id)).await??;
    let mut ends = Vec::with_capacity(paths.len());
    for path in paths {
        let (target, len) = (path.clone(), snapshot.image_len());
        let checked = blocking(move || Target::check(&target, len)).await;
        if checked.is_ok() {
            cx.note(format_args!("{} would be written", path.display()));
        }
        ends.push(checked.map_err(Error::from));
    }
    cx.note(format_args!("{} blocks of {} would be read", counted.blocks, counted.id));
    Ok(ends)
}

/// Writes all targets that can be opened: what came of each, and how many blocks each has got.
async fn write(
    cx: &Context,
    store: &SharedStore,
    snapshot: &Snapshot,
    downloads: Vec<Download>,
) -> (Vec<Result<()>>, u64) {
    let places: Vec<_> = downloads.iter().map(|download| name_of(&download.path)).collect();
    let runs = cx.runs_showing("Writing", places, snapshot.volume_size.blocks().0.into());
    let mut destinations = Vec::new();
    let mut begun: Vec<Result<Ending>> = Vec::with_capacity(downloads.len());
    for (download, run) in downloads.iter().zip(&runs) {
        begun.push(download.prepare(snapshot, run).await.map(|(destination, ending)| {
            destinations.push(destination);
            ending
        }));
    }
    let finished = if destinations.is_empty() {
        Vec::new()
    } else {
        let source = SnapshotSource::new(store.clone(), snapshot.clone());
        transfer(Arc::new(source), destinations, &cx.run).await
    };
    drop(runs);
    let (mut finished, mut blocks) = (finished.into_iter(), 0);
    let ends = downloads.iter().zip(begun).map(|(download, begun)| {
        let ending = begun?;
        let finished = finished.next().expect("each that was begun has ended");
        let finished = finished.map_err(|error| ending.explain(error))?;
        if finished.kept > 0 {
            let (kept, path) = (finished.kept, download.path.display());
            cx.note(format_args!("{path}: {kept} chunks were downloaded before"));
        }
        blocks = finished.blocks.max(blocks);
        Ok(())
    });
    (ends.collect(), blocks)
}

/// The error of all of them, if they were stopped before any was whole: what is left of each.
pub(super) fn unless_stopped<T>(ends: Vec<Result<T>>) -> Result<Vec<Result<T>>> {
    let cause = |end: &Result<T>| match end {
        Err(Error::Unfinished { cause, .. }) => stopped(cause),
        Err(error) => stopped(error),
        Ok(_) => None,
    };
    let Some(error) = ends.iter().find_map(cause) else { return Ok(ends) };
    if ends.iter().any(Result::is_ok) {
        return Ok(ends);
    }
    let left = ends.into_iter().filter_map(|end| match end {
        Err(Error::Unfinished { left, .. }) => Some(left),
        _ => None,
    });
    let left: Vec<_> = left.collect();
    if left.is_empty() {
        return Err(error.into());
    }
    Err(Error::Unfinished { cause: Box::new(error.into()), left: Left::Several(left) })
}

fn stopped(error: &Error) -> Option<transfer::Error> {
    use transfer::Error::{Cancelled, Stopped};
    match error {
        Error::Transfer(error @ (Stopped | Cancelled)) => Some(error.clone()),
        _ => None,
    }
}

/// Says why a target is not written, and what is left there.
fn tell_failed(cx: &Context, id: &SnapshotId, path: &Path, error: &Error) {
    let (path, text) = (path.display().to_string(), error.to_string());
    // Most errors name it.
    match text.contains(&path) {
        true => cx.warn(&text),
        false => cx.warn(format_args!("{path}: {text}")),
    }
    if let Error::Unfinished { left, .. } = error {
        let goes_on = format!("a download of {id} to {path} goes on");
        match left {
            Left::Partial(partial) => {
                let partial = partial.display();
                cx.note(format_args!("what is there is kept in {partial}: {goes_on}"));
            }
            _ => cx.note(format_args!("{path} holds a part of the image: {goes_on}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_target_is_found_by_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("a"), "").unwrap();
        std::fs::hard_link(at("a"), at("hard")).unwrap();
        std::os::unix::fs::symlink("a", at("soft")).unwrap();
        std::os::unix::fs::symlink(".", at("here")).unwrap();
        let same = |a: &str, b: &str| {
            let named = [at(a), at(b)].map(Named::by_itself);
            check_distinct(&named).err().map(|error| error.to_string())
        };
        for (a, b) in [("a", "hard"), ("soft", "a"), ("here/a", "a"), ("x", "here/x"), ("x", "x")] {
            let error = same(a, b).unwrap();
            assert!(error.contains("same target") && error.contains(b), "{error}");
        }
        assert!(same("no/x", "no/./x").is_some());
        for (a, b) in [("a", "b"), ("x", "y"), ("no/x", "x")] {
            assert_eq!(same(a, b), None, "{a} {b}");
        }
        let line = Line { list: at("soft"), number: 3 };
        let named = [Named { path: at("a"), line: Some(line) }];
        let error = check_distinct(&named).unwrap_err().to_string();
        assert!(error.contains("line 3") && error.contains("the list itself"), "{error}");
    }
}
