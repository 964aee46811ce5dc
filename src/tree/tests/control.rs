//! Control files and jobs, without a mount.

use std::sync::Arc;

use bytes::Bytes;

use super::super::{Changes, Error, Kind, OpenMode, ROOT};
use super::{Place, place};
use crate::jobs::{FAILED, Job};

impl Place {
    /// Opens a file below `control/`, for reading and writing.
    async fn control(&self, name: &str) -> super::super::Result<u64> {
        let ino = self.walk(&format!("control/{name}")).await?;
        Ok(self.tree.open(ino, OpenMode::WRITE).await?.0)
    }

    async fn say(&self, handle: u64, line: &str) -> super::super::Result<()> {
        self.tree.write(handle, 0, Bytes::copy_from_slice(line.as_bytes())).await
    }

    async fn hear(&self, handle: u64, offset: usize) -> String {
        let bytes = self.tree.read(handle, offset as u64, 1 << 20).await.unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    async fn text(&self, path: &str) -> String {
        let (handle, _) =
            self.tree.open(self.walk(path).await.unwrap(), OpenMode::READ).await.unwrap();
        self.hear(handle, 0).await
    }

    /// A job that ends when it is told to.
    fn endless_job(&self) -> u64 {
        let work = |job: Arc<Job>| async move {
            job.cancelled().await;
            job.log("as you wish");
            FAILED
        };
        self.tree.control.jobs.start("endless".to_owned(), work).unwrap().number()
    }

    /// Waits until a job has ended; what its `state` says then.
    async fn ended(&self, job: u64) -> String {
        for _ in 0..1000 {
            let state = self.text(&format!("control/jobs/{job}/state")).await;
            if state != "running\n" {
                return state;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("job {job} does not end");
    }
}

#[tokio::test]
async fn a_good_line_starts_a_job_and_is_answered_with_its_number() {
    let place = place().await;
    assert_eq!(place.names("control/jobs").await, [""; 0]);
    assert!(matches!(place.walk("control/jobs/last").await, Err(Error::NotFound)));
    let commit = place.control("commit").await.unwrap();
    let usage = place.hear(commit, 0).await;
    assert!(usage.contains("Usage: commit") && !usage.contains("error"), "{usage}");
    let line = "--wait 'no such.img'\n";
    place.say(commit, line).await.unwrap();
    // Behind the line, as a shell reads, and from the start, as others do.
    assert_eq!(place.hear(commit, line.len()).await, "1\n");
    assert_eq!(place.hear(commit, line.len() + 2).await, "");
    assert_eq!(place.hear(commit, 0).await, "1\n");
    assert_eq!(place.hear(commit, 2).await, "");
    place.say(commit, "/mnt/fsp/new/x").await.unwrap();
    assert_eq!(place.hear(commit, 0).await, "2\n");
    assert_eq!(place.names("control/jobs").await, ["1", "2", "last"]);
    let files = ["cancel", "command", "log", "progress", "result", "state"];
    assert_eq!(place.names("control/jobs/1").await, files);
    assert_eq!(place.text("control/jobs/1/command").await, "commit --wait 'no such.img'\n");
    // There is no such working image.
    assert_eq!(place.ended(1).await, "failed 1\n");
    assert!(place.text("control/jobs/1/log").await.contains("cannot commit no such.img: "));
    assert_eq!(place.text("control/jobs/1/result").await, "");
    assert_eq!(place.text("control/jobs/1/progress").await, "0/0\n");
    let clone = place.control("clone").await.unwrap();
    place.say(clone, "snap-0123456789abcdef0 web.img").await.unwrap();
    assert_eq!(place.ended(3).await, "failed 1\n");
}

#[tokio::test]
async fn a_bad_line_is_refused_and_explained() {
    let place = place().await;
    let commit = place.control("commit").await.unwrap();
    let lines = [
        "",
        "\n",
        "--nonsense a",
        "a b",
        "a\nb\n",
        "a\0b",
        "'a",
        "by-name/a",
        "..",
        "-- ''",
        "--wait --cancel a",
    ];
    for line in lines {
        let error = place.say(commit, line).await.unwrap_err();
        let Error::Refused(why) = error else { panic!("{line:?}: {error:?}") };
        let answer = place.hear(commit, line.len()).await;
        assert!(answer.starts_with(&format!("error: {why}\n\n")), "{line:?}: {answer}");
        assert!(answer.matches("Usage: commit").count() == 1, "{line:?}: {answer}");
        // Who opens it anew learns why, too.
        assert_eq!(place.text("control/commit").await, answer);
    }
    let long = "x".repeat((64 << 10) + 1);
    assert!(matches!(place.say(commit, &long).await, Err(Error::Refused(_))));
    let not_text = Bytes::from_static(b"\xff\n");
    assert!(matches!(place.tree.write(commit, 0, not_text).await, Err(Error::Refused(_))));
    // Nothing was started, and the other operation has heard nothing of it.
    assert_eq!(place.names("control/jobs").await, [""; 0]);
    assert!(!place.text("control/clone").await.contains("error"));
    // A good line is the end of it.
    place.say(commit, &long[1..]).await.unwrap();
    assert!(!place.text("control/commit").await.contains("error"));
}

#[tokio::test]
async fn the_link_to_the_newest_job_gets_a_new_number_with_each() {
    let place = place().await;
    let first = place.endless_job();
    let link = place.walk("control/jobs/last").await.unwrap();
    assert_eq!(place.tree.readlink(link).unwrap(), "1");
    assert_eq!(place.tree.getattr(link).unwrap().kind, Kind::Link);
    let second = place.endless_job();
    let other = place.walk("control/jobs/last").await.unwrap();
    assert_ne!(link, other);
    assert_eq!(place.tree.readlink(other).unwrap(), "2");
    let jobs = place.walk("control/jobs").await.unwrap();
    place.tree.rmdir(jobs, "2".as_ref()).await.unwrap();
    assert_eq!(place.walk("control/jobs/last").await.unwrap(), link);
    assert_eq!((first, second), (1, 2));
}

#[tokio::test]
async fn a_job_is_cancelled_by_a_write_and_forgotten_with_its_directory() {
    let place = place().await;
    let (one, two) = (place.endless_job(), place.endless_job());
    assert_eq!(place.text("control/jobs/1/state").await, "running\n");
    let cancel = place.control("jobs/1/cancel").await.unwrap();
    assert_eq!(place.hear(cancel, 0).await, "");
    place.say(cancel, "please").await.unwrap();
    assert_eq!(place.ended(one).await, "cancelled 1\n");
    assert_eq!(place.text("control/jobs/1/log").await, "as you wish\n");

    // As `rm -r` does it.
    let running = place.tree.control.jobs.get(two).unwrap();
    let jobs = place.walk("control/jobs").await.unwrap();
    let directory = place.walk("control/jobs/2").await.unwrap();
    let state = place.walk("control/jobs/2/state").await.unwrap();
    for name in place.names("control/jobs/2").await {
        place.tree.unlink(directory, name.as_ref()).await.unwrap();
    }
    assert_eq!(place.text("control/jobs/2/state").await, "running\n");
    place.tree.rmdir(jobs, "2".as_ref()).await.unwrap();
    assert_eq!(place.names("control/jobs").await, ["1", "last"]);
    for ino in [directory, state] {
        assert!(matches!(place.tree.getattr(ino), Err(Error::NotFound)));
        assert!(matches!(place.tree.open(ino, OpenMode::READ).await, Err(Error::NotFound)));
    }
    tokio::time::timeout(std::time::Duration::from_secs(5), running.cancelled()).await.unwrap();
}

#[tokio::test]
async fn the_directory_of_the_jobs_changes_when_one_comes_or_goes() {
    let place = place().await;
    let jobs = place.walk("control/jobs").await.unwrap();
    let time = || place.tree.getattr(jobs).unwrap().time;
    let before = time();
    let job = place.endless_job();
    let came = time();
    assert!(before < came && came == time());
    place.tree.rmdir(jobs, job.to_string().as_ref()).await.unwrap();
    assert!(came < time());
}

#[tokio::test]
async fn control_files_belong_to_the_daemon_and_little_of_them_changes() {
    let place = place().await;
    place.endless_job();
    let modes = [
        ("control/commit", Kind::File, 0o600),
        ("control/clone", Kind::File, 0o600),
        ("control/jobs", Kind::Directory, 0o700),
        ("control/jobs/1", Kind::Directory, 0o700),
        ("control/jobs/1/state", Kind::File, 0o400),
        ("control/jobs/1/cancel", Kind::File, 0o600),
    ];
    for (path, kind, mode) in modes {
        let ino = place.walk(path).await.unwrap();
        let found = place.tree.getattr(ino).unwrap();
        assert_eq!((found.kind, found.mode, found.uid, found.gid), (kind, mode, 0, 0), "{path}");
        // What can be written can be truncated, as `echo x > file` does.
        let empty = Changes { size: Some(0), ..Changes::default() };
        assert_eq!(place.tree.setattr(ino, None, empty).await.is_ok(), mode == 0o600, "{path}");
    }
    for path in ["jobs/1/state", "metrics", "README"] {
        assert!(matches!(place.control(path).await, Err(Error::Denied)), "{path}");
    }
    let (jobs, control) = ("control/jobs", "control");
    type Says = fn(&Error) -> bool;
    let refused: [(&str, &str, Says); 6] = [
        (jobs, "1", |e| matches!(e, Error::IsADirectory)),
        (jobs, "9", |e| matches!(e, Error::NotFound)),
        ("control/jobs/1", "x", |e| matches!(e, Error::NotFound)),
        (control, "commit", |e| matches!(e, Error::NotPermitted)),
        (control, "jobs", |e| matches!(e, Error::NotPermitted)),
        ("", "by-name", |e| matches!(e, Error::NotPermitted)),
    ];
    for (directory, name, says) in refused {
        let ino = place.walk(directory).await.unwrap();
        let error = place.tree.unlink(ino, name.as_ref()).await.unwrap_err();
        assert!(says(&error), "{directory}/{name}: {error:?}");
    }
    let ino = place.walk(jobs).await.unwrap();
    let rmdir = |ino, name: &'static str| place.tree.rmdir(ino, name.as_ref());
    assert!(matches!(rmdir(ino, "last").await, Err(Error::NotADirectory)));
    assert!(matches!(rmdir(ino, "9").await, Err(Error::NotFound)));
    assert!(matches!(rmdir(ROOT, "control").await, Err(Error::NotPermitted)));
    for missing in ["jobs/01", "jobs/+1", "jobs/2", "jobs/1/x", "jobs/1/state/x"] {
        assert!(place.walk(&format!("control/{missing}")).await.is_err(), "{missing}");
    }
    let (handle, _) =
        place.tree.open(place.walk("control/README").await.unwrap(), OpenMode::READ).await.unwrap();
    assert!(matches!(place.say(handle, "x").await, Err(Error::BadHandle)));
}
