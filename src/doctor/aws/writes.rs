//! What writing needs, as far as it can be tried without writing.

use super::probe::{NO_SNAPSHOT, ask};
use crate::doctor::report::Findings;
use crate::store::aws::failure::Failure;
use crate::store::ebs::clients::Clients;
use crate::store::ebs::ec2;

/// What an answer to a dry run says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Allowed,
    Denied,
    /// Not refused: it only minds that there is no such snapshot.
    Unfound,
    Unknown,
}

/// Tries what EC2 can try: a dry run, of a snapshot that is not there. Never of a real one: an
/// endpoint that does not know dry runs would do it.
pub(super) async fn examine(clients: &Clients, report: &mut impl Findings) {
    let (key, value) = ("fspfs:doctor".to_owned(), "x".to_owned());
    let try_out = |request: ec2::Request<ec2::Done>| ask(clients.ec2.send(request.dry_run()));
    let (create, remove, delete) = tokio::join!(
        try_out(ec2::create_tags(NO_SNAPSHOT, [(&key, &value)])),
        try_out(ec2::delete_tags(NO_SNAPSHOT, [&key])),
        try_out(ec2::delete_snapshot(NO_SNAPSHOT)),
    );
    tell("ec2:CreateTags", create.err().as_ref(), "writing", report);
    tell("ec2:DeleteTags", remove.err().as_ref(), "administration", report);
    tell("ec2:DeleteSnapshot", delete.err().as_ref(), "administration", report);
    report.skip(
        "ebs:StartSnapshot, ebs:PutSnapshotBlock, ebs:CompleteSnapshot",
        "not tried: to try them is to make a snapshot; the policy for writing in docs/iam.md has them",
    );
}

fn judge(failure: Option<&Failure>) -> Answer {
    match failure.and_then(Failure::code) {
        Some("DryRunOperation") => Answer::Allowed,
        Some(code) if code.ends_with(".NotFound") => Answer::Unfound,
        _ if failure.is_some_and(Failure::is_denial) => Answer::Denied,
        // A dry run never succeeds.
        _ => Answer::Unknown,
    }
}

fn tell(action: &str, failure: Option<&Failure>, policy: &str, report: &mut impl Findings) {
    let text = failure.map_or_else(|| "the dry run was done".to_owned(), ToString::to_string);
    match judge(failure) {
        Answer::Allowed => report.ok(action, "allowed, says a dry run"),
        Answer::Unfound => {
            report.ok(action, "not refused in a dry run of a snapshot that does not exist");
        }
        Answer::Denied => report.warn(
            action,
            format!("not allowed: {text}"),
            format!("nothing, to read; else the policy for {policy} in docs/iam.md"),
        ),
        Answer::Unknown => report.warn(
            action,
            format!("it could not be told: {text}"),
            "nothing, to read; else try again",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dry_runs_are_understood() {
        let refused = Failure::refused;
        assert_eq!(judge(Some(&refused("DryRunOperation"))), Answer::Allowed);
        assert_eq!(judge(Some(&refused("UnauthorizedOperation"))), Answer::Denied);
        assert_eq!(judge(Some(&refused("InvalidSnapshot.NotFound"))), Answer::Unfound);
        assert_eq!(judge(Some(&refused("RequestLimitExceeded"))), Answer::Unknown);
        assert_eq!(judge(None), Answer::Unknown);
    }
}
