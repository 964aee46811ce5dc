//! `jobs`

use super::JobsArgs;
use super::control::{Control, Job};
use super::output::Output;
use crate::ops::{Exit, text};
use crate::shown;

pub(super) async fn jobs(out: Output, args: &JobsArgs) -> anyhow::Result<Exit> {
    let control = Control::of_mount(&args.mount_point)?;
    if let Some(number) = args.wait {
        return control.follow(number, out).await;
    }
    let jobs = control.jobs()?;
    let header = ["JOB", "STATE", "BLOCKS", "COMMAND"];
    let numbers = || jobs.iter().map(|job| job.number.to_string()).collect();
    out.result(&jobs, numbers, || text::columns(header, jobs.iter().map(row)))?;
    Ok(Exit::Done)
}

fn row(job: &Job) -> [String; 4] {
    let blocks = match (job.blocks_done, job.blocks_in_all) {
        (0, 0) => "-".to_owned(),
        (done, all) => format!("{done}/{all}"),
    };
    let state = match job.exit_code {
        // The other words say it all.
        Some(code) if job.state == "failed" => format!("{} {code}", job.state),
        _ => job.state.clone(),
    };
    [job.number.to_string(), state, blocks, shown::one_line(&job.command)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_a_line() {
        let job = Job {
            number: 3,
            command: "commit web.img".to_owned(),
            state: "failed".to_owned(),
            exit_code: Some(1),
            blocks_done: 2,
            blocks_in_all: 8,
            result: Vec::new(),
        };
        assert_eq!(row(&job), ["3", "failed 1", "2/8", "commit web.img"]);
        let job = Job { state: "running".to_owned(), exit_code: None, blocks_in_all: 0, ..job };
        let job = Job { blocks_done: 0, ..job };
        assert_eq!(row(&job), ["3", "running", "-", "commit web.img"]);
    }
}
