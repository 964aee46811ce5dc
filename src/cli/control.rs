//! Talking to a mount through the files below its `control/`.

use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Serialize;

use super::output::{Output, tell};
use super::signals::Signals;
use crate::arguments::{DAMAGED, ScreenArgs, WORKING_DIRECTORY};
use crate::image::working::Damaged;
use crate::mount;
use crate::ops::{self, Exit, table};
use crate::transfer::Follower;

/// First and longest pause between two looks at a job.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// A mount of fspfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Control {
    mount_point: PathBuf,
}

/// A job, as far as it is now.
#[derive(Debug, Serialize)]
pub(super) struct Job {
    pub(super) number: u64,
    pub(super) command: String,
    pub(super) state: String,
    /// `None` while it is running.
    pub(super) exit_code: Option<i32>,
    pub(super) blocks_done: u64,
    pub(super) blocks_in_all: u64,
    /// The lines that the command prints.
    pub(super) result: Vec<String>,
}

impl Control {
    /// The mount that is exactly at `path`.
    pub(super) fn of_mount(path: &Path) -> Result<Self, mount::Error> {
        Ok(Self { mount_point: mount::our_mount(path)?.mount_point })
    }

    /// The mount that a working image is in, and its name there. The file need not be there.
    pub(super) fn of_working_image(path: &Path) -> anyhow::Result<(Self, String)> {
        let absolute = std::path::absolute(path)?;
        let (Some(directory), Some(name)) = (absolute.parent(), absolute.file_name()) else {
            bail!("{} is not a file", path.display());
        };
        let directory =
            fs_err::canonicalize(directory).context("a working image is below a mount")?;
        let mounts = mount::our_mounts()?.into_iter().map(|entry| entry.mount_point).collect();
        locate(&directory.join(name), mounts)
    }

    /// The directory of the working images.
    pub(super) fn working_directory(&self) -> PathBuf {
        self.mount_point.join(WORKING_DIRECTORY)
    }

    /// What is staged and cannot be used. Those who may not look into `control/` are not told.
    pub(super) fn damaged(&self) -> anyhow::Result<Vec<Damaged>> {
        let text = match fs_err::read_to_string(self.file(DAMAGED)) {
            Ok(text) => text,
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) =>
            {
                return Ok(Vec::new());
            }
            Err(error) => return Err(error.into()),
        };
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.mount_point.join("control").join(name)
    }

    /// Starts a job with these words behind the name of the operation; its number.
    fn start(&self, operation: &str, words: &[String]) -> anyhow::Result<u64> {
        let line = shlex::try_join(words.iter().map(String::as_str))?;
        if line.contains('\n') {
            bail!("a name with a line break in it cannot be given to a control file");
        }
        let path = self.file(operation);
        let mut file = fs_err::OpenOptions::new().read(true).write(true).open(&path)?;
        let written = file.write_all(format!("{line}\n").as_bytes());
        let mut answer = String::new();
        if let Err(error) = written {
            // It says why, above its usage.
            let _ = file.read_to_string(&mut answer);
            match answer.split("\n\n").next().and_then(|why| why.strip_prefix("error: ")) {
                Some(why) => bail!("{} does not take this: {why}", path.display()),
                None => return Err(error.into()),
            }
        }
        file.read_to_string(&mut answer)?;
        let number = answer.trim().parse();
        number.with_context(|| format!("{} answers {answer:?}", path.display()))
    }

    /// The jobs that the mount knows.
    pub(super) fn jobs(&self) -> anyhow::Result<Vec<Job>> {
        let mut jobs = Vec::new();
        for entry in fs_err::read_dir(self.file("jobs"))? {
            let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok())
            else {
                continue;
            };
            match self.job(number) {
                Ok(job) => jobs.push(job),
                // It was forgotten meanwhile.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        jobs.sort_unstable_by_key(|job| job.number);
        Ok(jobs)
    }

    fn read_of(&self, job: u64, name: &str) -> std::io::Result<String> {
        fs_err::read_to_string(self.file("jobs").join(job.to_string()).join(name))
    }

    fn job(&self, number: u64) -> anyhow::Result<Job> {
        let read = |name| self.read_of(number, name);
        // The state comes first: once it has ended, what it has done does not change any more.
        let (state, exit_code) = state(&read("state")?)?;
        let progress = read("progress")?;
        let progress = progress.trim().split_once('/').context("its progress is no fraction")?;
        Ok(Job {
            number,
            command: read("command")?.trim_end().to_owned(),
            state,
            exit_code,
            blocks_done: progress.0.parse()?,
            blocks_in_all: progress.1.parse()?,
            result: read("result")?.lines().map(str::to_owned).collect(),
        })
    }

    /// Waits for a job to end, and prints what it has to say; how the command ends.
    ///
    /// A signal ends the wait and not the job.
    pub(super) async fn follow(&self, number: u64, out: Output) -> anyhow::Result<Exit> {
        let job = match Signals::unless_signalled(self.ended(number, out)).await {
            Ok(ended) => ended?,
            Err(error @ ops::Error::Interrupted(_)) => {
                let at = self.mount_point.display();
                tell(format_args!("{error}: job {number} goes on"));
                tell(format_args!("`fspfs jobs {at} --wait {number}` waits for it again"));
                return Ok(Exit::Failed);
            }
            Err(error) => return Err(error.into()),
        };
        let exit = Exit::from_code(job.exit_code);
        for line in self.read_of(number, "log")?.lines() {
            match exit {
                Exit::Done => out.note(line),
                _ => tell(line),
            }
        }
        if job.state == "cancelled" {
            tell(format_args!("job {number} was cancelled"));
        }
        // It is what the command would have printed, in the form that was asked for.
        out.made(&job.result, &job.result)?;
        Ok(exit)
    }

    async fn ended(&self, number: u64, out: Output) -> anyhow::Result<Job> {
        let mut follower = Follower::new(out.progress("Storing"));
        let (mut pause, longest) = PAUSES;
        loop {
            let control = self.clone();
            // The mount may be slow to answer, and a signal must end the wait for that, too.
            let job = tokio::task::spawn_blocking(move || control.job(number)).await?;
            let job = job.map_err(|error| match is_gone(&error) {
                true => anyhow::anyhow!(
                    "{} knows no job {number}: it was never started, or is forgotten",
                    self.mount_point.display()
                ),
                false => error,
            })?;
            if job.exit_code.is_some() {
                return Ok(job);
            }
            follower.is_at(job.blocks_done, job.blocks_in_all);
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(longest);
        }
    }
}

/// Lets the mount of a working image do an operation, and waits for it.
pub(super) async fn forward(
    operation: &str,
    file: &Path,
    words: table::Words<'_>,
    screen: ScreenArgs,
    out: Output,
) -> anyhow::Result<Exit> {
    let (control, name) = Control::of_working_image(file)?;
    let flags = [(screen.json, "--json"), (screen.quiet, "--quiet")].into_iter();
    let flags = flags.filter(|(given, _)| *given).map(|(_, flag)| flag.to_owned());
    let flags = flags.chain((0..screen.verbose).map(|_| "--verbose".to_owned()));
    let words: Vec<_> = flags.chain(words(&name)).collect();
    let job = control.start(operation, &words)?;
    control.follow(job, out).await
}

fn is_gone(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == ErrorKind::NotFound)
}

/// What the file `state` of a job says: a word, and the exit code behind it once it has ended.
fn state(text: &str) -> anyhow::Result<(String, Option<i32>)> {
    let mut words = text.split_whitespace();
    let word = words.next().context("its state is empty")?;
    let code = words.next().map(str::parse).transpose().context("its exit code is no number")?;
    Ok((word.to_owned(), code))
}

/// Which of the mounts a working image is in, and its name there.
fn locate(path: &Path, mounts: Vec<PathBuf>) -> anyhow::Result<(Control, String)> {
    // The innermost: a mount may be in a directory of another file system's mount.
    let inside = mounts.iter().filter(|mount| path.starts_with(mount));
    let Some(mount_point) = inside.max_by_key(|mount| mount.components().count()) else {
        return Err(mount::Error::NotInside { path: path.to_owned(), mounts }.into());
    };
    let directory = mount_point.join(WORKING_DIRECTORY);
    let name = path.file_name().filter(|_| path.parent() == Some(&directory));
    let Some(name) = name else {
        bail!("{} is not a working image: those are in {}", path.display(), directory.display());
    };
    let name = name.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok((Control { mount_point: mount_point.clone() }, name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_image_is_located() {
        let mounts = || vec!["/mnt/a".into(), "/mnt/a/b".into(), "/mnt/c".into()];
        let at = |path: &str| locate(Path::new(path), mounts());
        let (control, name) = at("/mnt/a/new/web.img").unwrap();
        assert_eq!((control.mount_point, &name[..]), ("/mnt/a".into(), "web.img"));
        assert_eq!(at("/mnt/a/b/new/x").unwrap().0.mount_point, Path::new("/mnt/a/b"));
        for path in ["/mnt/a", "/mnt/a/new", "/mnt/a/snap-0.img", "/mnt/a/new/x/y", "/mnt/c/x"] {
            let error = at(path).unwrap_err().to_string();
            assert!(error.contains("/new") && error.contains("working image"), "{path}: {error}");
        }
        let error = at("/home/new/x").unwrap_err().to_string();
        assert!(error.contains("not in a mount") && error.contains("/mnt/c"), "{error}");
        let error = locate(Path::new("/x"), Vec::new()).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }

    #[tokio::test]
    async fn a_job_is_followed_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let control = Control { mount_point: dir.path().to_owned() };
        let job = dir.path().join("control/jobs/3");
        std::fs::create_dir_all(&job).unwrap();
        let write = |name: &str, text: &str| std::fs::write(job.join(name), text).unwrap();
        for (name, text) in [("command", "commit a"), ("progress", "1/4\n"), ("result", "")] {
            write(name, text);
        }
        write("state", "running\n");
        write("log", "");
        let screen = ScreenArgs { quiet: true, ..Default::default() };
        let global = super::super::Global { screen, ..Default::default() };
        let out = Output::new(&global);
        let end = async {
            tokio::time::sleep(Duration::from_millis(120)).await;
            assert_eq!(control.jobs().unwrap()[0].exit_code, None);
            write("progress", "4/4\n");
            write("state", "failed 3\n");
        };
        let (exit, ()) = tokio::join!(control.follow(3, out), end);
        assert_eq!(exit.unwrap(), Exit::Partly);
        let jobs = control.jobs().unwrap();
        assert_eq!((jobs[0].blocks_done, jobs[0].blocks_in_all, jobs.len()), (4, 4, 1));
        let error = control.follow(4, out).await.unwrap_err();
        assert!(error.to_string().contains("no job 4"), "{error}");
    }

    #[test]
    fn a_state_is_a_word_and_a_code() {
        assert_eq!(state("running\n").unwrap(), ("running".to_owned(), None));
        assert_eq!(state("failed 3\n").unwrap(), ("failed".to_owned(), Some(3)));
        assert!(state("").is_err() && state("done well").is_err());
    }
}
