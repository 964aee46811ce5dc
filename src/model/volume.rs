//! The size of a volume.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{BLOCK_SIZE_U64, BlockIndex};

/// Bytes in a GiB, the unit in which volumes are sized.
pub const GIB: u64 = 1 << 30;

/// Size of the largest volume: 64 TiB (EBS direct service model).
pub const MAX_VOLUME_BYTES: u64 = 65_536 * GIB;

/// The size of a volume: 1 to 65,536 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VolumeSize {
    gib: u32,
}

/// A size that no volume has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidVolumeSize {
    /// Nothing at all.
    #[error("it is empty; a volume has at least 1 GiB, so there must be at least 1 byte")]
    Empty,
    /// More than the largest volume has.
    #[error("it is larger than 64 TiB, the size of the largest volume")]
    TooLarge,
}

impl VolumeSize {
    /// The size of `gib` GiB.
    ///
    /// # Errors
    ///
    /// If `gib` is 0 or more than 65,536.
    pub fn from_gib(gib: u64) -> Result<Self, InvalidVolumeSize> {
        match u32::try_from(gib) {
            Ok(0) => Err(InvalidVolumeSize::Empty),
            Ok(gib @ 1..=65_536) => Ok(Self { gib }),
            _ => Err(InvalidVolumeSize::TooLarge),
        }
    }

    /// The smallest size that holds `bytes` bytes.
    ///
    /// # Errors
    ///
    /// If `bytes` is 0 or more than [`MAX_VOLUME_BYTES`].
    pub fn holding(bytes: u64) -> Result<Self, InvalidVolumeSize> {
        Self::from_gib(bytes.div_ceil(GIB))
    }

    /// In GiB.
    pub fn gib(self) -> u64 {
        u64::from(self.gib)
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.gib() * GIB
    }

    /// In blocks: the index one past the last block.
    pub fn blocks(self) -> BlockIndex {
        BlockIndex::containing(self.bytes())
    }

    /// Whether the volume has a block at `index`.
    pub fn contains(self, index: BlockIndex) -> bool {
        index < self.blocks()
    }
}

impl TryFrom<u64> for VolumeSize {
    type Error = InvalidVolumeSize;

    fn try_from(gib: u64) -> Result<Self, Self::Error> {
        Self::from_gib(gib)
    }
}

impl From<VolumeSize> for u64 {
    fn from(size: VolumeSize) -> Self {
        size.gib()
    }
}

impl fmt::Display for VolumeSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} GiB", self.gib)
    }
}

const _: () = assert!(MAX_VOLUME_BYTES / BLOCK_SIZE_U64 == 1 << 27);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_edges() {
        assert_eq!(VolumeSize::holding(0), Err(InvalidVolumeSize::Empty));
        assert_eq!(VolumeSize::holding(1).unwrap().gib(), 1);
        assert_eq!(VolumeSize::holding(GIB).unwrap().gib(), 1);
        assert_eq!(VolumeSize::holding(GIB + 1).unwrap().gib(), 2);
        assert_eq!(VolumeSize::holding(MAX_VOLUME_BYTES).unwrap().gib(), 65_536);
        assert_eq!(VolumeSize::holding(MAX_VOLUME_BYTES + 1), Err(InvalidVolumeSize::TooLarge));
        assert_eq!(VolumeSize::holding(u64::MAX), Err(InvalidVolumeSize::TooLarge));
    }

    proptest! {
        #[test]
        fn a_volume_holds_what_it_was_made_for(bytes in 1..=MAX_VOLUME_BYTES) {
            let size = VolumeSize::holding(bytes).unwrap();
            prop_assert!(size.bytes() >= bytes && size.bytes() - bytes < GIB);
            prop_assert!(size.contains(BlockIndex::containing(bytes - 1)));
            prop_assert_eq!(size.blocks().offset(), size.bytes());
        }
    }
}
