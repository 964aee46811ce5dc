//! Stores around a store: for tests of what depends on one, and for counting.
//!
//! Each wraps any store and can be wrapped again.

mod corrupt;
mod count;
mod fail;
mod filtered;
mod forward;

#[cfg(test)]
pub(crate) use forward::Wrapper;

pub use corrupt::Corrupt;
pub use count::{Count, Counters};
pub use fail::Fail;
pub use filtered::Filtered;

/// A call of [`SnapshotStore`](super::SnapshotStore), to say which ones a wrapper is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// `describe`
    Describe,
    /// `list`
    List,
    /// `list_blocks`
    ListBlocks,
    /// `list_changed_blocks`
    ListChangedBlocks,
    /// `get_block`
    GetBlock,
    /// `start`
    Start,
    /// `put_block`
    PutBlock,
    /// `flush`
    Flush,
    /// `complete`
    Complete,
    /// `delete`
    Delete,
    /// `set_tags`
    SetTags,
}

impl Call {
    /// All of them, in the order of the trait.
    pub const ALL: [Self; 11] = [
        Self::Describe,
        Self::List,
        Self::ListBlocks,
        Self::ListChangedBlocks,
        Self::GetBlock,
        Self::Start,
        Self::PutBlock,
        Self::Flush,
        Self::Complete,
        Self::Delete,
        Self::SetTags,
    ];

    /// The name of the method.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Describe => "describe",
            Self::List => "list",
            Self::ListBlocks => "list_blocks",
            Self::ListChangedBlocks => "list_changed_blocks",
            Self::GetBlock => "get_block",
            Self::Start => "start",
            Self::PutBlock => "put_block",
            Self::Flush => "flush",
            Self::Complete => "complete",
            Self::Delete => "delete",
            Self::SetTags => "set_tags",
        }
    }
}
