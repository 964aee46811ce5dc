//! Page tokens of stores that can begin a page at any block: they name the block.

use super::{Error, ErrorKind, ListFrom, PageToken, Result};
use crate::model::BlockIndex;

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
