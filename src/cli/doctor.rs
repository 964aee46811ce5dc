//! `doctor`.

use std::path::PathBuf;

use clap::Args;

use super::Global;
use super::output::Output;
use super::run::store_url;
use crate::doctor::{self, Check, Report, Status};
use crate::mount;
use crate::ops::Exit;
use crate::shown::one_line;
use crate::store::StoreUrl;

/// `fspfs doctor`
#[derive(Args, Debug)]
#[command(after_help = "\
Looks at the store (by default ebs:), at this machine, and at MOUNTPOINT. Nothing is changed. For
ebs: and s3: it makes a few requests, which cost less than a tenth of a cent. A service of S3 that takes
no notice of conditions is sent the fspfs.json that it has.

Examples:
  fspfs doctor
  fspfs doctor -s ebs://work@us-west-2 /mnt/fsp
  fspfs doctor -s s3://my-bucket/snaps
  fspfs doctor --json -s /srv/snaps

Exit status: 0 if nothing failed, 1 if something did.")]
pub(super) struct DoctorArgs {
    /// A mount, or a place for one
    #[arg(value_name = "MOUNTPOINT")]
    mount_point: Option<PathBuf>,
    /// Where what is written would be kept until it is a snapshot
    #[arg(long, value_name = "DIR", env = "FSPFS_STAGING")]
    staging: Option<PathBuf>,
}

pub(super) async fn doctor(
    global: &Global,
    out: Output,
    args: &DoctorArgs,
) -> anyhow::Result<Exit> {
    let url = store_url(global).absolute()?;
    let mount_point = args.mount_point.as_deref().map(mount::resolve);
    let mut printed = Ok(());
    let show = |check: &Check| {
        // Each as soon as it is known: some take seconds.
        for line in lines(check) {
            if check.status == Status::Failure {
                out.error(&line);
            }
            if printed.is_ok() {
                printed = out.line(line);
            }
        }
    };
    let report = doctor::examine(&url, mount_point.as_deref(), args.staging.as_deref(), show).await;
    printed?;
    out.result(&report, Vec::new, || vec![summary(&report)])?;
    Ok(if report.is_healthy() { Exit::Done } else { Exit::Failed })
}

/// Looks whether what an operation needs of the store is permitted. What is found is told on stderr.
pub(super) async fn permitted(url: &StoreUrl, out: Output) -> anyhow::Result<bool> {
    let show = |check: &Check| lines(check).into_iter().for_each(|line| out.note(line));
    Ok(doctor::permissions(&url.absolute()?, show).await.is_healthy())
}

fn lines(check: &Check) -> Vec<String> {
    let (status, subject, found) = (check.status, &check.check, one_line(&check.found));
    let mut lines = vec![format!("{status:8} {subject}: {found}")];
    lines.extend(check.cure.as_ref().map(|cure| format!("         cure: {}", one_line(cure))));
    lines
}

fn summary(report: &Report) -> String {
    let count = |status, one: &str, many: &str| match report.count(status) {
        1 => format!("1 {one}"),
        n => format!("{n} {many}"),
    };
    let failures = count(Status::Failure, "failure", "failures");
    let warnings = count(Status::Warning, "warning", "warnings");
    format!("{failures}, {warnings}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_a_line_and_its_cure_another() {
        let check = Check {
            check: "region".to_owned(),
            status: Status::Warning,
            found: "us-east-1".to_owned(),
            cure: Some("name it".to_owned()),
        };
        assert_eq!(lines(&check), ["warning  region: us-east-1", "         cure: name it"]);
        let report = Report { checks: vec![check] };
        assert_eq!(summary(&report), "0 failures, 1 warning");
    }
}
