//! Types without I/O: the words of the project, as types.

mod block;
mod buffer;
mod digest;
mod id;
mod map;
mod snapshot;
mod volume;

pub use block::{BLOCK_SIZE, BLOCK_SIZE_U64, Block, BlockIndex, BlockPart, block_parts, zeros};
pub use buffer::{BlockBuffer, DIRECT_ALIGNMENT};
pub use digest::{Digest, DigestMismatch, Digester};
pub use id::{InvalidSnapshotId, SnapshotId};
pub use map::{BlockMap, BlockState, Extent};
pub use snapshot::{
    DIGEST_TAG, InvalidTags, LENGTH_TAG, MAX_DESCRIPTION_CHARS, MAX_TAG_KEY_CHARS,
    MAX_TAG_VALUE_CHARS, MAX_TAGS, NAME_TAG, ORIGIN_TAG, Snapshot, SnapshotState, Tags, check_tags,
};
pub use volume::{GIB, InvalidVolumeSize, MAX_VOLUME_BYTES, VolumeSize};
