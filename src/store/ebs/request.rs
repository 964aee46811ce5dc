//! The kinds of requests: what the service calls them, how many it takes, and what they cost.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::store::Usage;

/// A kind of request. Quotas and prices are counted by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    ListSnapshotBlocks,
    ListChangedBlocks,
    GetSnapshotBlock,
    PutSnapshotBlock,
    StartSnapshot,
    CompleteSnapshot,
    DescribeSnapshots,
    DeleteSnapshot,
    CreateTags,
    DeleteTags,
}

impl Kind {
    pub(super) const ALL: [Self; 10] = [
        Self::ListSnapshotBlocks,
        Self::ListChangedBlocks,
        Self::GetSnapshotBlock,
        Self::PutSnapshotBlock,
        Self::StartSnapshot,
        Self::CompleteSnapshot,
        Self::DescribeSnapshots,
        Self::DeleteSnapshot,
        Self::CreateTags,
        Self::DeleteTags,
    ];

    /// The name of the operation, as in the documentation of the service.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::ListSnapshotBlocks => "ListSnapshotBlocks",
            Self::ListChangedBlocks => "ListChangedBlocks",
            Self::GetSnapshotBlock => "GetSnapshotBlock",
            Self::PutSnapshotBlock => "PutSnapshotBlock",
            Self::StartSnapshot => "StartSnapshot",
            Self::CompleteSnapshot => "CompleteSnapshot",
            Self::DescribeSnapshots => "DescribeSnapshots",
            Self::DeleteSnapshot => "DeleteSnapshot",
            Self::CreateTags => "CreateTags",
            Self::DeleteTags => "DeleteTags",
        }
    }

    /// Requests a second that an account has (EBS quotas L-C125AE42, L-AFAE1BE8, L-18E976AB,
    /// L-DB2FBAA1, L-AFEBDF7A, L-1D4D9345). EC2 has buckets of its own, which nobody reaches here.
    pub(super) fn quota(self) -> Option<f64> {
        match self {
            Self::GetSnapshotBlock | Self::PutSnapshotBlock => Some(1000.0),
            Self::ListSnapshotBlocks | Self::ListChangedBlocks => Some(50.0),
            Self::StartSnapshot | Self::CompleteSnapshot => Some(10.0),
            _ => None,
        }
    }

    /// Whether it carries a block: these are the many, and the ones whose number is kept down.
    pub(super) fn is_bulk(self) -> bool {
        matches!(self, Self::GetSnapshotBlock | Self::PutSnapshotBlock)
    }

    /// Whether EC2 has it, and not the EBS direct APIs.
    pub(super) fn is_of_ec2(self) -> bool {
        use Kind::{CreateTags, DeleteSnapshot, DeleteTags, DescribeSnapshots};
        matches!(self, DescribeSnapshots | DeleteSnapshot | CreateTags | DeleteTags)
    }

    /// Billionths of a dollar, in the example region of the price list of the EBS direct APIs.
    fn nanodollars(self) -> u64 {
        match self {
            Self::ListSnapshotBlocks | Self::ListChangedBlocks => 600,
            Self::GetSnapshotBlock => 3_000,
            Self::PutSnapshotBlock => 6_000,
            _ => 0,
        }
    }
}

/// Counts requests as they are sent, those that fail too.
#[derive(Debug, Default)]
pub(super) struct Sent([AtomicU64; Kind::ALL.len()], AtomicU64);

impl Sent {
    pub(super) fn count(&self, kind: Kind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_again(&self) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn usage(&self) -> Usage {
        let sent = |kind: Kind| self.0[kind as usize].load(Ordering::Relaxed);
        let cost = |kind: Kind| sent(kind) * kind.nanodollars();
        Usage {
            requests: Kind::ALL.iter().map(|&kind| (kind.as_str(), sent(kind))).collect(),
            again: self.1.load(Ordering::Relaxed),
            nanodollars: Kind::ALL.into_iter().map(cost).sum(),
            in_flight_limit: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gibibyte_costs_what_the_price_list_says() {
        let sent = Sent::default();
        for _ in 0..2048 {
            sent.count(Kind::GetSnapshotBlock);
        }
        assert!((sent.usage().dollars() - 0.006_144).abs() < 1e-9);
        sent.count(Kind::PutSnapshotBlock);
        sent.count(Kind::ListSnapshotBlocks);
        sent.count(Kind::DescribeSnapshots);
        let usage = sent.usage();
        assert_eq!(usage.nanodollars, 2048 * 3_000 + 6_000 + 600);
        assert_eq!(usage.requests.iter().map(|(_, n)| n).sum::<u64>(), 2051);
    }
}
