//! What reading needs, tried on a snapshot of the account.

use std::collections::HashMap;

use aws_sdk_ebs::operation::get_snapshot_block::GetSnapshotBlockOutput;

use super::probe::{ask, ask_sdk};
use crate::doctor::report::Findings;
use crate::model::{BLOCK_SIZE, Digest};
use crate::store::Filter;
use crate::store::aws::failure::Failure;
use crate::store::ebs::clients::Clients;
use crate::store::ebs::ec2::{self, Snapshot};

/// The least that EC2 takes for a page.
const FEW: u32 = 5;

/// The volume of a snapshot that was not taken of one.
const NO_VOLUME: &str = "vol-ffffffff";

const LIST: &str = "ebs:ListSnapshotBlocks";
const GET: &str = "ebs:GetSnapshotBlock";
const CHANGED: &str = "ebs:ListChangedBlocks";
const DESCRIBE: &str = "ec2:DescribeSnapshots";

pub(super) async fn examine(clients: &Clients, report: &mut impl Findings) {
    let Some(snapshots) = describe(clients, report).await else {
        for action in [LIST, GET, CHANGED] {
            report.skip(action, format!("because {DESCRIBE} does not work"));
        }
        return;
    };
    let Some(id) = snapshots.first().map(|snapshot| &*snapshot.snapshot_id) else {
        for action in [LIST, GET, CHANGED] {
            report.skip(action, "not tried: there is no completed snapshot of your own to read");
        }
        return;
    };
    blocks(clients, id, report).await;
    match pair(&snapshots) {
        Some((first, second)) => changed(clients, &first, &second, report).await,
        None => report.skip(CHANGED, "not tried: no two snapshots of one volume were seen"),
    }
}

async fn describe(clients: &Clients, report: &mut impl Findings) -> Option<Vec<Snapshot>> {
    let completed = Filter { name: "status".to_owned(), values: vec!["completed".to_owned()] };
    let request = ec2::describe_snapshots(&["self".to_owned()], &[completed]);
    match ask(clients.ec2.send(request.max_results(FEW))).await {
        Ok(page) => {
            report.ok(DESCRIBE, "allowed");
            Some(page.snapshots.into_iter().filter(|s| !s.is_archived()).collect())
        }
        Err(failure) => {
            tell(DESCRIBE, &failure, "", report);
            None
        }
    }
}

/// Lists the blocks of a snapshot, and reads one.
async fn blocks(clients: &Clients, id: &str, report: &mut impl Findings) {
    let request = clients.ebs.list_snapshot_blocks().snapshot_id(id).max_results(100);
    let page = match ask_sdk(request.send()).await {
        Ok(page) => page,
        Err(failure) => {
            tell(LIST, &failure, "", report);
            report.skip(GET, format!("because {LIST} does not work"));
            return;
        }
    };
    report.ok(LIST, format!("allowed: {id}"));
    let block = page.blocks.unwrap_or_default().into_iter().next();
    let Some((index, token)) =
        block.and_then(|block| Some((block.block_index?, block.block_token?)))
    else {
        report.skip(GET, format!("not tried: no block was listed for {id}"));
        return;
    };
    let request = clients.ebs.get_snapshot_block().snapshot_id(id);
    match ask_sdk(request.block_index(index).block_token(token).send()).await {
        Ok(answer) => match what_is_wrong(answer).await {
            None => report.ok(GET, format!("allowed: block {index} of {id}")),
            Some(wrong) => report.warn(
                GET,
                format!("allowed, but block {index} of {id} {wrong}"),
                "check that the endpoint is one of EBS; `fspfs verify` reads every block",
            ),
        },
        Err(failure) => {
            tell(GET, &failure, "; for an encrypted snapshot kms:Decrypt on its key too", report);
        }
    }
}

async fn what_is_wrong(answer: GetSnapshotBlockOutput) -> Option<String> {
    let Some(digest) = answer.checksum().and_then(Digest::from_base64) else {
        return Some("came without a SHA-256".to_owned());
    };
    let mut body = answer.block_data;
    let mut bytes = Vec::new();
    while let Some(part) = body.next().await {
        match part {
            Ok(part) if bytes.len() + part.len() <= BLOCK_SIZE => bytes.extend_from_slice(&part),
            Ok(_) => return Some(format!("has more than {BLOCK_SIZE} bytes")),
            Err(error) => return Some(format!("was cut short: {error}")),
        }
    }
    if bytes.len() != BLOCK_SIZE {
        return Some(format!("has {} bytes, not {BLOCK_SIZE}", bytes.len()));
    }
    (Digest::of(&bytes) != digest).then(|| "is not what its SHA-256 says".to_owned())
}

async fn changed(clients: &Clients, first: &str, second: &str, report: &mut impl Findings) {
    let request = clients.ebs.list_changed_blocks().first_snapshot_id(first);
    match ask_sdk(request.second_snapshot_id(second).max_results(100).send()).await {
        Ok(_) => report.ok(CHANGED, format!("allowed: {first} and {second}")),
        Err(failure) => tell(CHANGED, &failure, "", report),
    }
}

/// Two snapshots of one volume.
fn pair(snapshots: &[Snapshot]) -> Option<(String, String)> {
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for snapshot in snapshots {
        let id = &snapshot.snapshot_id;
        let Some(volume) = snapshot.volume_id.as_deref().filter(|id| *id != NO_VOLUME) else {
            continue;
        };
        if let Some(other) = seen.insert(volume, id) {
            return Some((other.to_owned(), id.to_owned()));
        }
    }
    None
}

/// A denial is a failure, anything else leaves open whether it is allowed.
fn tell(action: &str, failure: &Failure, also: &str, report: &mut impl Findings) {
    if failure.is_denial() {
        let found = format!("not allowed: {failure}");
        report.fail(
            action,
            found,
            format!("allow {action}{also}: the policy for reading in docs/iam.md"),
        );
    } else {
        let found = format!("it could not be told: {failure}");
        report.warn(action, found, "try again; the message says what the service minds");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(id: &str, volume: &str) -> Snapshot {
        let (snapshot_id, volume_id) = (id.to_owned(), Some(volume.to_owned()));
        Snapshot { snapshot_id, volume_id, ..Snapshot::default() }
    }

    #[test]
    fn two_of_one_volume_are_found() {
        let all = [of("snap-1", "vol-1"), of("snap-2", "vol-2"), of("snap-3", "vol-1")];
        assert_eq!(pair(&all), Some(("snap-1".to_owned(), "snap-3".to_owned())));
        assert_eq!(pair(&all[..2]), None);
        assert_eq!(pair(&[of("snap-1", NO_VOLUME), of("snap-2", NO_VOLUME)]), None);
    }
}
