//! Page tokens of stores that can begin a page at any block: they name the block.

use super::{Error, ErrorKind, ListFrom, ListedBlock, PageToken, Result};
use crate::model::{BlockIndex, SnapshotId};

/// Pages of a listing in a row that may tell nothing new before it is given up: the service may
/// answer with short and empty pages, but not for ever.
pub(crate) const MAX_IDLE_PAGES: u32 = 100;

/// Checks that a page goes on in order from `from`, or behind `last`, if that was listed before. What comes
/// again, or too late, would seem to be a hole where it belongs.
///
/// # Errors
///
/// `Corrupt`, if it does not.
pub(crate) fn check_ascending(
    id: &SnapshotId,
    from: BlockIndex,
    last: Option<&ListedBlock>,
    page: &[ListedBlock],
) -> Result<()> {
    let before = last.map(|block| block.index);
    let indexes = before.into_iter().chain(page.iter().map(|block| block.index));
    let ascending = indexes.is_sorted_by(|a, b| a < b);
    if ascending && page.first().is_none_or(|block| block.index >= from || before.is_some()) {
        return Ok(());
    }
    let message = format!("the store lists the blocks of {id} out of order at block {from}");
    Err(Error::new(ErrorKind::Corrupt, message))
}

/// The error of a listing that ends nowhere.
pub(crate) fn no_progress(id: &SnapshotId, at: BlockIndex) -> Error {
    let message = format!("the listing of {id} makes no progress at block {at}");
    Error::new(ErrorKind::Unavailable, message)
}

/// The block that a page begins at, or the first one behind it.
pub(super) fn start_index(from: &ListFrom) -> Result<BlockIndex> {
    match from {
        ListFrom::Index(index) => Ok(*index),
        ListFrom::Page(PageToken(token)) => token.parse().map(BlockIndex).map_err(|_| {
            Error::new(ErrorKind::ExpiredToken, format!("{token:?} is not a page token"))
        }),
    }
}

/// The token of the page that begins at a block.
pub(super) fn page_token(next: BlockIndex) -> PageToken {
    PageToken(next.to_string())
}
