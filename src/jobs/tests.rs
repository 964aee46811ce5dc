//! Jobs that do nothing but end, one way or another.

use super::job::DONE;
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
    run(&deaf, work, Duration::from_millis(20)).await;
    assert!(gone.await.is_err());
    assert_eq!(deaf.state(), State::Cancelled);
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
    assert!(jobs.forget(7) && !jobs.forget(7) && !jobs.forget(1000));
    assert!(jobs.get(7).is_none() && !jobs.numbers().contains(&7));
    assert_eq!(ended(&running[6]).await, State::Cancelled);
    tokio::task::yield_now().await;
    // A number is never used again, also not that of a job which nobody saw.
    let next = jobs.start("x".to_owned(), wait).unwrap().number();
    assert_eq!(next, MAX_RUNNING as u64 + 1);
    assert!(jobs.forget(next));
    assert_eq!(jobs.last(), Some(MAX_RUNNING as u64));
}
