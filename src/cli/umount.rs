//! `umount`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::UmountArgs;
use super::output::{Output, tell};
use crate::mount;
use crate::ops::Exit;
use crate::transfer::Follower;

/// How long a mount may take to tell about itself.
const ANSWER: Duration = Duration::from_secs(5);

/// How often it is looked whether what is waited for has ended.
const LOOK: Duration = Duration::from_millis(50);

/// How long the daemon may take to end before it is said that it is waited for.
const QUIET: Duration = Duration::from_secs(1);

/// How long commits are waited for that do not get on, and then as long the daemon. It goes on without that.
const STANDSTILL: Duration = Duration::from_hours(1);

pub(super) fn umount(out: Output, args: &UmountArgs) -> anyhow::Result<Exit> {
    let entry = mount::our_mount(&args.mount_point)?;
    // A dead mount cannot tell. Another user's is not asked: it may be any program, and keep whoever waits for its
    // answer for ever.
    let daemon = match is_own(&entry) && !args.lazy {
        true => in_time({
            let entry = entry.clone();
            move || Daemon::of(&entry)
        }),
        false => None,
    };
    let failed =
        if daemon.is_some() { wait_for_commits(out, &entry.mount_point) } else { Vec::new() };
    mount::unmount(&args.mount_point, args.lazy)?;
    for Failed { name, why } in &failed {
        tell(format_args!(
            "new/{name} was not committed: {why}; it is kept, and committed at the next mount"
        ));
    }
    let ended = daemon.is_none_or(|it| it.wait(out, &entry));
    Ok(if failed.is_empty() && ended { Exit::Done } else { Exit::Partly })
}

/// Whether this user has mounted it.
fn is_own(entry: &mount::MountEntry) -> bool {
    entry.owner == Some(nix::unistd::geteuid().as_raw())
}

/// An image whose commit was waited for in vain.
struct Failed {
    name: String,
    why: String,
}

fn in_time<T: Send + 'static>(work: impl FnOnce() -> Option<T> + Send + 'static) -> Option<T> {
    let (said, answer) = mpsc::channel();
    // Without a thread there is no answer.
    let _ = crate::threads::aside(move || {
        // Nobody listens if it took too long.
        let _ = said.send(work());
    });
    answer.recv_timeout(ANSWER).ok().flatten()
}

/// Waits until no working image is being committed, and shows how far those are that are; those that could
/// not be.
fn wait_for_commits(out: Output, mount_point: &Path) -> Vec<Failed> {
    let mut told = Vec::new();
    let mut shown: BTreeMap<String, Follower> = BTreeMap::new();
    let (mut before, mut moved) = (BTreeMap::new(), Instant::now());
    loop {
        let new = mount_point.join("new");
        let commits = in_time(move || committing(&new)).unwrap_or_default();
        shown.retain(|name, _| commits.contains_key(name));
        if commits != before {
            (before, moved) = (commits.clone(), Instant::now());
        }
        if moved.elapsed() > STANDSTILL {
            out.note("the commits go on, and are not waited for any longer");
            return Vec::new();
        }
        if commits.is_empty() {
            let new = mount_point.join("new");
            return in_time(move || Some(failed(&new, told))).unwrap_or_default();
        }
        for (name, (done, all)) in commits {
            if !told.contains(&name) {
                out.note(format_args!("waiting for the commit of new/{name}"));
                told.push(name.clone());
            }
            let follower = shown
                .entry(name)
                .or_insert_with_key(|name| Follower::new(out.progress(&format!("new/{name}"))));
            follower.is_at(done, all);
        }
        std::thread::sleep(LOOK);
    }
}

/// The working images whose commit is under way, with the blocks that are done, and all.
fn committing(new: &Path) -> Option<BTreeMap<String, (u64, u64)>> {
    let files = std::fs::read_dir(new).ok()?.flatten();
    let commits = files.filter_map(|file| {
        let progress = xattr::get(file.path(), "user.fspfs.progress").ok()??;
        let progress = String::from_utf8(progress).unwrap_or_default();
        let (done, all) = progress.split_once('/').unwrap_or_default();
        let blocks = (done.parse().unwrap_or(0), all.parse().unwrap_or(0));
        Some((file.file_name().to_string_lossy().into_owned(), blocks))
    });
    Some(commits.collect())
}

fn failed(new: &Path, names: Vec<String>) -> Vec<Failed> {
    let attribute = |name: &str, what: &str| {
        let value = xattr::get(new.join(name), format!("user.fspfs.{what}")).ok()??;
        String::from_utf8(value).ok()
    };
    let failed = names.into_iter().filter_map(|name| {
        let is_failed = attribute(&name, "state")? == "failed";
        let why = attribute(&name, "error").unwrap_or_else(|| "the log says why".to_owned());
        is_failed.then_some(Failed { name, why })
    });
    failed.collect()
}

/// The process that serves a mount.
struct Daemon {
    pid: u32,
    /// When it was started, which tells it from a later one of the same number.
    started: String,
}

impl Daemon {
    /// The process that a mount names, if it may be true.
    fn of(entry: &mount::MountEntry) -> Option<Self> {
        let pid = std::fs::read_to_string(entry.mount_point.join("control/pid")).ok()?;
        let pid = pid.trim().parse().ok()?;
        let started = started(pid)?;
        mount::is_served_by(entry, pid).then_some(Self { pid, started })
    }

    /// Waits for its end: it commits what programs have just closed. It does not end while it serves another
    /// place. Answers whether there is nothing more to wait for.
    fn wait(&self, out: Output, entry: &mount::MountEntry) -> bool {
        let began = Instant::now();
        let mut told = false;
        while started(self.pid).as_ref() == Some(&self.started) {
            if !told && began.elapsed() > QUIET {
                if let Some(place) = mount::mounted_elsewhere(entry) {
                    out.note(format_args!("it is served on: it is mounted at {place}, too"));
                    return true;
                }
                out.note("waiting for what is being committed");
                told = true;
            }
            if began.elapsed() > STANDSTILL {
                let pid = self.pid;
                tell(format_args!(
                    "it is unmounted, and process {pid} that served it still runs: it commits what was written, or hangs; its log says which"
                ));
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }
}

/// When a process was started, in ticks since the boot (field 22 of `/proc/<pid>/stat`); `None` for
/// one that has ended.
fn started(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_whitespace();
    let state = fields.next()?;
    // Whoever started it has yet to ask how it ended.
    if state == "Z" { None } else { fields.nth(18).map(str::to_owned) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_mount_of_this_user_is_asked() {
        let me = nix::unistd::geteuid().as_raw();
        let is_asked = |owner| {
            is_own(&mount::MountEntry {
                id: 1,
                device: "0:1".to_owned(),
                mount_point: "/mnt".into(),
                fs_type: "fuse.fspfs".to_owned(),
                source: "synth:".to_owned(),
                owner,
            })
        };
        assert!(is_asked(Some(me)) && !is_asked(Some(me + 1)) && !is_asked(None));
    }
}
