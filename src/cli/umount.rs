//! `umount`.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use super::UmountArgs;
use super::output::tell;
use crate::mount;
use crate::ops::Exit;

/// How long a mount may take to tell about itself.
const ANSWER: Duration = Duration::from_secs(5);

/// How often it is looked whether what is waited for has ended.
const LOOK: Duration = Duration::from_millis(50);

/// How long the daemon may take to end before it is said that it is waited for.
const QUIET: Duration = Duration::from_secs(1);

pub(super) fn umount(args: &UmountArgs) -> anyhow::Result<Exit> {
    let entry = mount::our_mount(&args.mount_point)?;
    let mount_point = entry.mount_point.clone();
    // Another user's mount does not tell, and a dead one cannot.
    let daemon = in_time({
        let mount_point = mount_point.clone();
        move || Daemon::of(&mount_point)
    });
    let waited = !args.lazy && daemon.is_some();
    let failed = if waited { wait_for_commits(&mount_point) } else { Vec::new() };
    mount::unmount(&args.mount_point, args.lazy)?;
    for Failed { name, why } in &failed {
        tell(format_args!(
            "new/{name} was not committed: {why}; it is kept, and committed at the next mount"
        ));
    }
    if let Some(daemon) = daemon.filter(|_| !args.lazy) {
        daemon.wait(&entry);
    }
    Ok(if failed.is_empty() { Exit::Done } else { Exit::Partly })
}

/// An image whose commit was waited for in vain.
struct Failed {
    name: String,
    why: String,
}

fn in_time<T: Send + 'static>(work: impl FnOnce() -> Option<T> + Send + 'static) -> Option<T> {
    let (said, answer) = mpsc::channel();
    std::thread::spawn(move || {
        // Nobody listens if it took too long.
        let _ = said.send(work());
    });
    answer.recv_timeout(ANSWER).ok().flatten()
}

/// Waits until no working image is being committed, and says which ones are; those that could not be.
fn wait_for_commits(mount_point: &Path) -> Vec<Failed> {
    let mut told = Vec::new();
    loop {
        let new = mount_point.join("new");
        let names = in_time(move || committing(&new)).unwrap_or_default();
        if names.is_empty() {
            let new = mount_point.join("new");
            return in_time(move || Some(failed(&new, told))).unwrap_or_default();
        }
        for name in names {
            if !told.contains(&name) {
                tell(format_args!("waiting for the commit of new/{name}"));
                told.push(name);
            }
        }
        std::thread::sleep(LOOK);
    }
}

fn committing(new: &Path) -> Option<Vec<String>> {
    let files = std::fs::read_dir(new).ok()?.flatten();
    let under_way = |path: &Path| matches!(xattr::get(path, "user.fspfs.progress"), Ok(Some(_)));
    let files = files.filter(|file| under_way(&file.path()));
    Some(files.map(|file| file.file_name().to_string_lossy().into_owned()).collect())
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
    fn of(mount_point: &Path) -> Option<Self> {
        let pid = std::fs::read_to_string(mount_point.join("control/pid")).ok()?;
        let pid = pid.trim().parse().ok()?;
        Some(Self { pid, started: started(pid)? })
    }

    /// Waits for its end: it commits what programs have just closed. It does not end while it serves another
    /// place.
    fn wait(&self, entry: &mount::MountEntry) {
        let began = std::time::Instant::now();
        let mut told = false;
        while started(self.pid).as_ref() == Some(&self.started) {
            if !told && began.elapsed() > QUIET {
                if let Some(place) = mount::mounted_elsewhere(entry) {
                    tell(format_args!("it is served on: it is mounted at {place}, too"));
                    return;
                }
                tell(format_args!("waiting for what is being committed"));
                told = true;
            }
            std::thread::sleep(LOOK);
        }
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
