//! The kinds of requests of the EBS direct APIs and of EC2.
//!
//! Quotas are those of an account (EBS quotas L-C125AE42, L-AFAE1BE8, L-18E976AB, L-DB2FBAA1, L-AFEBDF7A,
//! L-1D4D9345). EC2 has buckets of its own, which nobody reaches here.

use crate::store::request::Kind;

pub(super) static LIST_SNAPSHOT_BLOCKS: Kind =
    ebs("ListSnapshotBlocks", "ebs:ListSnapshotBlocks", 50.0, 600, false);
pub(super) static LIST_CHANGED_BLOCKS: Kind =
    ebs("ListChangedBlocks", "ebs:ListChangedBlocks", 50.0, 600, false);
pub(super) static GET_SNAPSHOT_BLOCK: Kind =
    ebs("GetSnapshotBlock", "ebs:GetSnapshotBlock", 1000.0, 3_000, true);
pub(super) static PUT_SNAPSHOT_BLOCK: Kind =
    ebs("PutSnapshotBlock", "ebs:PutSnapshotBlock", 1000.0, 6_000, true);
pub(super) static START_SNAPSHOT: Kind = ebs("StartSnapshot", "ebs:StartSnapshot", 10.0, 0, false);
pub(super) static COMPLETE_SNAPSHOT: Kind =
    ebs("CompleteSnapshot", "ebs:CompleteSnapshot", 10.0, 0, false);
pub(super) static DESCRIBE_SNAPSHOTS: Kind = ec2("DescribeSnapshots", "ec2:DescribeSnapshots");
pub(super) static DELETE_SNAPSHOT: Kind = ec2("DeleteSnapshot", "ec2:DeleteSnapshot");
pub(super) static CREATE_TAGS: Kind = ec2("CreateTags", "ec2:CreateTags");
pub(super) static DELETE_TAGS: Kind = ec2("DeleteTags", "ec2:DeleteTags");

/// All of them, in the order in which they are shown.
pub(super) const ALL: [&Kind; 10] = [
    &LIST_SNAPSHOT_BLOCKS,
    &LIST_CHANGED_BLOCKS,
    &GET_SNAPSHOT_BLOCK,
    &PUT_SNAPSHOT_BLOCK,
    &START_SNAPSHOT,
    &COMPLETE_SNAPSHOT,
    &DESCRIBE_SNAPSHOTS,
    &DELETE_SNAPSHOT,
    &CREATE_TAGS,
    &DELETE_TAGS,
];

const fn ebs(
    name: &'static str,
    action: &'static str,
    quota: f64,
    nanodollars: u64,
    is_bulk: bool,
) -> Kind {
    Kind { name, action, quota: Some(quota), nanodollars, is_bulk }
}

const fn ec2(name: &'static str, action: &'static str) -> Kind {
    Kind { name, action, quota: None, nanodollars: 0, is_bulk: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::request::Sent;

    #[test]
    fn a_gibibyte_costs_what_the_price_list_says() {
        let sent = Sent::new(&ALL);
        for _ in 0..2048 {
            sent.count(&GET_SNAPSHOT_BLOCK);
        }
        assert!((sent.usage().dollars() - 0.006_144).abs() < 1e-9);
        sent.count(&PUT_SNAPSHOT_BLOCK);
        sent.count(&LIST_SNAPSHOT_BLOCKS);
        sent.count(&DESCRIBE_SNAPSHOTS);
        let usage = sent.usage();
        assert_eq!(usage.nanodollars, 2048 * 3_000 + 6_000 + 600);
        assert_eq!(usage.requests.iter().map(|(_, n)| n).sum::<u64>(), 2051);
    }
}
