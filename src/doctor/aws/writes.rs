//! What writing needs, as far as it can be tried without writing.

use aws_sdk_ec2::types::Tag;

use super::outcome::{Trouble, ask};
use super::probe::NO_SNAPSHOT;
use crate::doctor::report::Findings;
use crate::store::ebs::clients::Clients;

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
    let tag = || Tag::builder().key("fspfs:doctor").value("x").build();
    let ec2 = &clients.ec2;
    let create = ec2.create_tags().resources(NO_SNAPSHOT).tags(tag()).dry_run(true);
    let remove = ec2.delete_tags().resources(NO_SNAPSHOT).tags(tag()).dry_run(true);
    let delete = ec2.delete_snapshot().snapshot_id(NO_SNAPSHOT).dry_run(true);
    let (create, remove, delete) =
        tokio::join!(ask(create.send()), ask(remove.send()), ask(delete.send()));
    tell("ec2:CreateTags", create.err().as_ref(), "writing", report);
    tell("ec2:DeleteTags", remove.err().as_ref(), "administration", report);
    tell("ec2:DeleteSnapshot", delete.err().as_ref(), "administration", report);
    report.skip(
        "ebs:StartSnapshot, ebs:PutSnapshotBlock, ebs:CompleteSnapshot",
        "not tried: to try them is to make a snapshot; the policy for writing in docs/iam.md has them",
    );
}

fn judge(trouble: Option<&Trouble>) -> Answer {
    match trouble {
        Some(Trouble::Refused { code, .. }) if code == "DryRunOperation" => Answer::Allowed,
        Some(Trouble::Refused { code, .. }) if code.ends_with(".NotFound") => Answer::Unfound,
        Some(trouble) if trouble.is_denial() => Answer::Denied,
        // A dry run never succeeds.
        _ => Answer::Unknown,
    }
}

fn tell(action: &str, trouble: Option<&Trouble>, policy: &str, report: &mut impl Findings) {
    let text = trouble.map_or_else(|| "the dry run was done".to_owned(), Trouble::text);
    match judge(trouble) {
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
        let refused = |code: &str| Trouble::Refused { code: code.to_owned(), text: String::new() };
        assert_eq!(judge(Some(&refused("DryRunOperation"))), Answer::Allowed);
        assert_eq!(judge(Some(&refused("UnauthorizedOperation"))), Answer::Denied);
        assert_eq!(judge(Some(&refused("InvalidSnapshot.NotFound"))), Answer::Unfound);
        assert_eq!(judge(Some(&refused("RequestLimitExceeded"))), Answer::Unknown);
        assert_eq!(judge(None), Answer::Unknown);
    }
}
