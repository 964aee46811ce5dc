//! Tokens of blocks, which live for a while only, and the newer ones that are listed instead.
//!
//! A token is a cache entry: the service may refuse it before its time. Then the blocks around are
//! listed again, once for all who wait.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_sdk_ebs::primitives::DateTime;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use lru::LruCache;

use super::Ebs;
use crate::model::{BlockIndex, SnapshotId};
use crate::store::{BlockToken, Error, ErrorKind, ListFrom, Result};

/// Blocks whose tokens are renewed together: as many as the service lists at the least.
const GROUP: u32 = 100;

/// Groups whose newer tokens are kept: at most some 10 MiB.
const MAX_GROUPS: NonZeroUsize = NonZeroUsize::new(256).expect("not 0");

/// Pages of a listing that are asked for until the wanted block came.
const MAX_PAGES: usize = 1000;

/// A token is not used so shortly before its end.
const MARGIN: Duration = Duration::from_millis(100);

/// What times are counted from.
static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A token of the service, and when it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) text: String,
    /// Milliseconds since [`BEGIN`]: clocks of two machines are not compared later on.
    pub(super) end: u64,
}

impl Token {
    /// A token that was listed just now, and the time of its end by the clock of the service.
    pub(super) fn listed(text: String, expiry: Option<&DateTime>) -> Self {
        let left = expiry.and_then(|end| {
            let now = jiff::Timestamp::now().as_millisecond();
            u64::try_from(end.to_millis().ok()?.checked_sub(now)?).ok()
        });
        // One that has ended already is so by a clock that is wrong, and that says nothing.
        let end = left.map_or(u64::MAX, |left| now().saturating_add(left));
        Self { text, end }
    }

    fn has_ended(&self) -> bool {
        self.end <= now().saturating_add(MARGIN.as_millis() as u64)
    }

    #[cfg(test)]
    pub(super) fn encode(&self) -> BlockToken {
        Self::encode_all(std::slice::from_ref(self)).remove(0)
    }

    /// The tokens of a page, in one piece of memory: each in its own would take twice as much, and leave gaps.
    pub(super) fn encode_all(tokens: &[Self]) -> Vec<BlockToken> {
        let len = tokens.iter().map(|token| 8 + token.text.len()).sum();
        let mut bytes = BytesMut::with_capacity(len);
        for token in tokens {
            bytes.put_u64(token.end);
            bytes.put_slice(token.text.as_bytes());
        }
        let mut rest = bytes.freeze();
        tokens.iter().map(|token| BlockToken(rest.split_to(8 + token.text.len()))).collect()
    }

    pub(super) fn decode(token: &BlockToken) -> Option<Self> {
        let mut bytes: Bytes = token.0.clone();
        let end = bytes.try_get_u64().ok()?;
        Some(Self { text: String::from_utf8(bytes.into()).ok()?, end })
    }
}

fn now() -> u64 {
    u64::try_from(BEGIN.elapsed().as_millis()).unwrap_or(u64::MAX)
}

type Group = Arc<tokio::sync::Mutex<HashMap<u32, Token>>>;

/// Tokens that are newer than those of the listings that others hold.
#[derive(Debug)]
pub(super) struct Tokens(Mutex<LruCache<(SnapshotId, u32), Group>>);

impl Tokens {
    pub(super) fn new() -> Self {
        Self(Mutex::new(LruCache::new(MAX_GROUPS)))
    }

    fn group(&self, id: &SnapshotId, number: u32) -> Group {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(groups.get_or_insert_mut((id.clone(), number), Group::default))
    }
}

impl Ebs {
    /// The token to read a block with: the given one, or a newer one if that has ended.
    pub(super) async fn valid(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: Token,
    ) -> Result<Token> {
        if token.has_ended() { self.renewed(id, index, &token).await } else { Ok(token) }
    }

    /// A token of this block that is not `old`.
    ///
    /// # Errors
    ///
    /// `ExpiredToken` if the block is not listed any more.
    pub(super) async fn renewed(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        old: &Token,
    ) -> Result<Token> {
        let number = index.0 / GROUP;
        let group = self.service.account.tokens.group(id, number);
        let mut tokens = group.lock().await;
        if let Some(token) = tokens.get(&index.0).filter(|t| t.text != old.text && !t.has_ended()) {
            return Ok(token.clone());
        }
        tokens.clear();
        let end = BlockIndex((number + 1) * GROUP);
        let mut from = ListFrom::Index(BlockIndex(number * GROUP));
        for _ in 0..MAX_PAGES {
            let page = self.list_block_page(id, from, GROUP as usize).await?;
            let blocks = page.blocks.iter().filter(|block| block.index < end);
            let listed = blocks.filter_map(|b| Some((b.index.0, Token::decode(&b.token)?)));
            tokens.extend(listed);
            match page.next {
                Some(next) if page.covered.is_none_or(|covered| covered < end) => {
                    from = ListFrom::Page(next);
                }
                _ => break,
            }
        }
        tokens.get(&index.0).cloned().ok_or_else(|| {
            let message = format!("block {index} of {id} is not listed any more");
            Error::new(ErrorKind::ExpiredToken, message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_and_written() {
        let in_an_hour = jiff::Timestamp::now().as_second() + 3600;
        for (expiry, ended) in [
            (None, false),
            (Some(DateTime::from_secs(in_an_hour)), false),
            // By a clock that is wrong.
            (Some(DateTime::from_secs(0)), false),
            (Some(DateTime::from_millis(jiff::Timestamp::now().as_millisecond() + 50)), true),
        ] {
            let token = Token::listed("AAAB".to_owned(), expiry.as_ref());
            assert_eq!(token.has_ended(), ended, "{expiry:?}");
            assert_eq!(Token::decode(&token.encode()), Some(token));
        }
        assert_eq!(Token::decode(&BlockToken(Bytes::from_static(b"short"))), None);
        assert_eq!(Token::decode(&BlockToken(Bytes::from_static(b"12345678\xff"))), None);
    }
}
