//! Jobs that do nothing but end, one way or another.

use super::*;

fn jobs() -> Jobs {
    Jobs::default()
}

async fn ended(job: &Job) -> State {
    for _ in 0..2000 {
        match job.state() {
            State::Running => tokio::time::sleep(Duration::from_millis(5)).await,
            state => return state,
        }
    }
    panic!("job {} does not end", job.number());
}

#[tokio::test]
async fn a_job_tells_what_it_does() {
    let jobs = jobs();
    assert_eq!((jobs.last(), jobs.numbers()), (None, vec![]));
    let (go, wait) = tokio::sync::oneshot::channel::<()>();
    let job = jobs
        .start("commit 'a b'".to_owned(), |job| async move {
            job.set_progress(3, 8);
            job.log("one\ntwo");
            let _ = wait.await;
            job.print("snap-0");
            DONE
        })
        .unwrap();
    assert_eq!((job.number(), job.command(), job.state()), (1, "commit 'a b'", State::Running));
    tokio::task::yield_now().await;
    assert_eq!((job.progress(), job.result()), ((3, 8), String::new()));
    assert_eq!(job.log_text(), "one\ntwo\n");
    go.send(()).unwrap();
    assert_eq!(ended(&job).await, State::Done);
    assert_eq!(job.result(), "snap-0\n");
    // What comes too late changes nothing.
    job.cancel();
    assert_eq!(job.state().to_string(), "done 0");
    assert_eq!((jobs.last(), jobs.numbers()), (Some(1), vec![1]));
}

#[tokio::test]
async fn jobs_fail_with_a_code_and_a_panic_is_a_failure() {
    let jobs = jobs();
    let job = jobs.start("x".to_owned(), |_| async { 3 }).unwrap();
    assert_eq!(ended(&job).await.to_string(), "failed 3");
    let job = jobs.start("x".to_owned(), |_| async { panic!("seven is {}", 8) }).unwrap();
    assert_eq!(ended(&job).await, State::Failed(FAILED));
    assert!(job.log_text().contains("seven is 8"), "{}", job.log_text());
    // Its slot is free again.
    assert_eq!(jobs.slots.available_permits(), MAX_RUNNING);
}

#[tokio::test]
async fn a_cancelled_job_ends_by_itself_or_is_dropped() {
    let jobs = jobs();
    let obedient = jobs.start("x".to_owned(), |job| async move {
        job.cancelled().await;
        FAILED
    });
    let obedient = obedient.unwrap();
    obedient.cancel();
    assert_eq!(ended(&obedient).await.to_string(), "cancelled 1");
    assert_eq!(obedient.log_text(), "");
    let (alive, gone) = tokio::sync::oneshot::channel::<()>();
    let deaf = Job::new(1, "x".to_owned());
    deaf.cancel();
    let work = async move {
        std::future::pending::<()>().await;
        drop(alive);
        DONE
    };
    let state = run(&deaf, work, Duration::from_millis(20)).await;
    assert!(gone.await.is_err());
    assert_eq!(state, State::Cancelled);
    assert!(deaf.log_text().contains("did not stop within 20ms"), "{}", deaf.log_text());
}

#[tokio::test]
async fn the_jobs_that_ended_first_are_forgotten_first() {
    let jobs = jobs();
    let long = jobs.start("long".to_owned(), |job| async move {
        job.cancelled().await;
        DONE
    });
    let long = long.unwrap();
    for _ in 0..=MAX_ENDED {
        ended(&jobs.start("x".to_owned(), |_| async { DONE }).unwrap()).await;
    }
    tokio::task::yield_now().await;
    let numbers = jobs.numbers();
    assert_eq!((numbers.len(), numbers[0], numbers[1]), (MAX_ENDED + 1, 1, 3));
    // It is the oldest by its number, and the newest by its end.
    long.cancel();
    ended(&long).await;
    tokio::task::yield_now().await;
    assert!(jobs.get(1).is_some() && jobs.get(3).is_none());
    assert_eq!(jobs.numbers().len(), MAX_ENDED);
}

#[tokio::test]
async fn too_many_are_refused_and_forgetting_cancels() {
    let jobs = jobs();
    let wait = |job: Arc<Job>| async move {
        job.cancelled().await;
        FAILED
    };
    let running: Vec<_> =
        (0..MAX_RUNNING).map(|_| jobs.start("x".to_owned(), wait).unwrap()).collect();
    assert_eq!(jobs.start("x".to_owned(), wait).unwrap_err(), TooMany);
    assert!(jobs.forget(7).await && !jobs.forget(7).await && !jobs.forget(1000).await);
    assert!(jobs.get(7).is_none() && !jobs.numbers().contains(&7));
    assert_eq!(ended(&running[6]).await, State::Cancelled);
    tokio::task::yield_now().await;
    // A number is never used again, also not that of a job which nobody saw.
    let next = jobs.start("x".to_owned(), wait).unwrap().number();
    assert_eq!(next, MAX_RUNNING as u64 + 1);
    assert!(jobs.forget(next).await);
    assert_eq!(jobs.last(), Some(MAX_RUNNING as u64));
}

/// What a mount finds that comes after these jobs, whose mount was killed at this moment.
fn after_a_kill(root: &Path) -> (tempfile::TempDir, Jobs) {
    let dir = tempfile::tempdir().unwrap();
    for place in std::fs::read_dir(root).unwrap().flatten() {
        let copy = dir.path().join(place.file_name());
        std::fs::create_dir(&copy).unwrap();
        for file in std::fs::read_dir(place.path()).unwrap().flatten() {
            std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
        }
    }
    let jobs = Jobs::with_history(dir.path(), "store");
    (dir, jobs)
}

/// The files of the only history below `root`.
fn files(root: &Path) -> Vec<std::path::PathBuf> {
    let place = std::fs::read_dir(root).unwrap().next().unwrap().unwrap();
    std::fs::read_dir(place.path()).unwrap().map(|file| file.unwrap().path()).collect()
}

async fn until(is_true: impl Fn() -> bool) {
    for _ in 0..2000 {
        if is_true() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it never becomes true");
}

async fn endless(job: Arc<Job>) -> ExitCode {
    job.cancelled().await;
    FAILED
}

#[tokio::test]
async fn jobs_outlast_their_mount() {
    use std::os::unix::fs::PermissionsExt as _;

    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("jobs");
    let jobs = Jobs::with_history(&root, "store");
    let copy = jobs.start("copy 'ä b'".to_owned(), |job| async move {
        job.set_progress(8, 8);
        job.log("one\ntwo");
        job.print("snap-0");
        DONE
    });
    let copy = copy.unwrap();
    ended(&copy).await;
    ended(&jobs.start("x".to_owned(), |_| async { 3 }).unwrap()).await;
    let long = jobs.start("long".to_owned(), |job| async move {
        job.print("x".repeat(100 << 10));
        DONE
    });
    ended(&long.unwrap()).await;
    jobs.start("endless".to_owned(), endless).unwrap();
    let rest: Vec<_> =
        (5..8).map(|_| jobs.start("forgotten".to_owned(), endless).unwrap()).collect();
    until(|| files(&root).len() == 8).await;
    for (number, job) in (5..).zip(&rest) {
        assert!(jobs.forget(number).await);
        ended(job).await;
    }
    until(|| files(&root).len() == 5).await;

    let (later, jobs) = after_a_kill(&root);
    assert_eq!(jobs.numbers(), [1, 2, 3, 4]);
    let state = |number| jobs.get(number).unwrap().state().to_string();
    let states = [1, 2, 3, 4].map(state);
    assert_eq!(states, ["done 0", "failed 3", "done 0", "interrupted 1"]);
    let found = jobs.get(1).unwrap();
    assert_eq!((found.command(), found.started()), (copy.command(), copy.started()));
    assert_eq!((found.progress(), &found.result()[..]), ((8, 8), "snap-0\n"));
    assert_eq!(found.log_text(), "one\ntwo\n");
    let long = jobs.get(3).unwrap();
    assert_eq!(long.result(), "");
    assert!(long.log_text().contains("102401 bytes"), "{}", long.log_text());
    assert!(jobs.get(4).unwrap().log_text().contains("the mount ended"));
    // Numbers go on, also behind one that was forgotten.
    assert_eq!(jobs.start("x".to_owned(), |_| async { DONE }).unwrap().number(), 8);
    for file in files(&root) {
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700));
    }
    // Another store has its own, and so has a mount beside this one.
    assert!(Jobs::with_history(later.path(), "other").numbers().is_empty());
    assert!(Jobs::with_history(later.path(), "store").numbers().is_empty());
}

#[tokio::test]
async fn the_history_is_bounded_and_leaves_out_what_it_cannot_read() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = Jobs::with_history(dir.path(), "store");
    for _ in 0..MAX_ENDED + 5 {
        ended(&jobs.start("x".to_owned(), |_| async { DONE }).unwrap()).await;
    }
    let full = "\u{1}".repeat(64 << 10);
    ended(&jobs.start(full, |_| async { DONE }).unwrap()).await;
    until(|| files(dir.path()).len() == MAX_ENDED).await;
    let place = files(dir.path())[0].parent().unwrap().to_owned();
    for (name, text) in [("50", "{"), ("51", ""), (".new-x", "y"), ("052", ""), ("x", "")] {
        std::fs::write(place.join(name), text).unwrap();
    }
    let (later, jobs) = after_a_kill(dir.path());
    let numbers = jobs.numbers();
    assert_eq!((numbers.len(), jobs.last()), (MAX_ENDED - 3, Some(MAX_ENDED as u64 + 5)));
    assert!(!numbers.contains(&50) && !numbers.contains(&51));
    let unread = files(later.path()).len() - numbers.len();
    assert_eq!(unread, 3, "what is not its own stays, beside the newest number");
    let next = jobs.start("x".to_owned(), |_| async { DONE }).unwrap();
    assert_eq!(next.number(), MAX_ENDED as u64 + 7);
}

#[tokio::test]
async fn jobs_run_where_they_cannot_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let jobs = Jobs::with_history(&file, "store");
    let job = jobs.start("x".to_owned(), |_| async { DONE }).unwrap();
    assert_eq!((job.number(), ended(&job).await), (1, State::Done));
    let root = dir.path().join("jobs");
    let jobs = Jobs::with_history(&root, "store");
    let place = files(&root)[0].parent().unwrap().to_owned();
    std::fs::rename(&place, dir.path().join("away")).unwrap();
    let job = jobs.start("x".to_owned(), |_| async { DONE }).unwrap();
    assert_eq!(ended(&job).await, State::Done);
    std::fs::rename(dir.path().join("away"), &place).unwrap();
    // What can be kept again is.
    let job = jobs.start("x".to_owned(), |_| async { DONE }).unwrap();
    ended(&job).await;
    let (_later, jobs) = after_a_kill(&root);
    assert_eq!(jobs.numbers(), [2]);
}

#[tokio::test]
async fn a_job_of_a_commit_is_never_refused_and_ends_with_it() {
    let jobs = jobs();
    for _ in 0..MAX_RUNNING {
        jobs.start("x".to_owned(), endless).unwrap();
    }
    let (go, wait) = tokio::sync::oneshot::channel::<()>();
    let job = jobs.follow("commit".to_owned(), |_| async move {
        let _ = wait.await;
        DONE
    });
    assert_eq!(job.number(), MAX_RUNNING as u64 + 1);
    job.cancel();
    tokio::time::timeout(Duration::from_millis(50), jobs.settled()).await.unwrap_err();
    assert_eq!(job.state(), State::Running);
    go.send(()).unwrap();
    jobs.settled().await;
    assert_eq!(job.state(), State::Done);
}
