//! Listing and reading blocks.

use aws_sdk_ebs::operation::get_snapshot_block::GetSnapshotBlockError;
use aws_sdk_ebs::operation::list_changed_blocks::ListChangedBlocksError;
use aws_sdk_ebs::operation::list_snapshot_blocks::ListSnapshotBlocksError;
use aws_sdk_ebs::primitives::{ByteStream, DateTime};
use bytes::Bytes;

use super::Ebs;
use super::kinds;
use super::tokens::Token;
use super::write::reason_of;
use crate::model::{BLOCK_SIZE, Block, BlockBuffer, BlockIndex, Digest, SnapshotId, VolumeSize};
use crate::store::aws::failure::{Class, Failure};
use crate::store::aws::service::{ATTEMPT, Request, RetryPolicy};
use crate::store::request::Kind;
use crate::store::{
    BlockPage, BlockToken, ChangedBlock, ChangedPage, Error, ErrorKind, ListFrom, ListedBlock,
    MAX_PAGE_BLOCKS, PageToken, Result, causes,
};

/// How often a block is listed again for one read.
const MAX_RENEWALS: u32 = 8;

/// GiB of the largest volume.
const MAX_VOLUME_GIB: i64 = 65_536;

/// The service gives at least so many blocks a page, whatever is asked for.
const MIN_PAGE_BLOCKS: usize = 100;

/// What one of our page tokens stands for: one of the service's, or an index.
struct Position {
    token: Option<String>,
    index: Option<i32>,
}

impl Position {
    fn of(from: ListFrom) -> Result<Self> {
        let bad = || Error::new(ErrorKind::ExpiredToken, "this is no page token of this store");
        let index = |index: BlockIndex| i32::try_from(index.0).map_err(|_| bad());
        match from {
            ListFrom::Index(at) => Ok(Self { token: None, index: Some(index(at)?) }),
            ListFrom::Page(PageToken(text)) => match text.split_once(' ') {
                Some(("token", token)) => Ok(Self { token: Some(token.to_owned()), index: None }),
                Some(("index", text)) => {
                    Ok(Self { token: None, index: Some(text.parse().map_err(|_| bad())?) })
                }
                _ => Err(bad()),
            },
        }
    }
}

/// Leads on behind the blocks that are kept of a page. `full`: behind the last block of one that has all that
/// were asked for. It does so without a token, too: there are servers that give none, and what they left out
/// would be holes.
fn next(
    cut: Option<BlockIndex>,
    token: Option<String>,
    full: Option<BlockIndex>,
) -> Option<PageToken> {
    let token = token.filter(|token| !token.is_empty());
    match (cut, token) {
        (Some(index), _) => Some(PageToken(format!("index {index}"))),
        (None, Some(token)) => Some(PageToken(format!("token {token}"))),
        (None, None) => full.map(|index| PageToken(format!("index {index}"))),
    }
}

/// The index behind the last block of a page, if that has as many as were asked for.
fn behind<T>(blocks: &[T], max: usize, index: impl Fn(&T) -> BlockIndex) -> Option<BlockIndex> {
    let is_full = i32::try_from(blocks.len()).is_ok_and(|len| len >= results(max));
    blocks.last().filter(|_| is_full).map(|block| index(block).next())
}

fn results(max: usize) -> i32 {
    let max = max.clamp(MIN_PAGE_BLOCKS, MAX_PAGE_BLOCKS);
    i32::try_from(max).expect("at most 10,000")
}

/// Listed blocks of these indexes, with these tokens of the service.
fn listed(blocks: Vec<(BlockIndex, String)>, expiry: Option<&DateTime>) -> Vec<ListedBlock> {
    let (indexes, tokens): (Vec<_>, Vec<_>) =
        blocks.into_iter().map(|(index, text)| (index, Token::listed(text, expiry))).unzip();
    let tokens = Token::encode_all(&tokens);
    let block = |(index, token)| ListedBlock { index, token, digest: None };
    indexes.into_iter().zip(tokens).map(block).collect()
}

fn index(value: Option<i32>) -> Result<BlockIndex, Failure> {
    let index = value.and_then(|value| u32::try_from(value).ok()).map(BlockIndex);
    index.ok_or_else(|| unexpected(format!("the block index {value:?}")))
}

pub(super) fn unexpected(what: impl std::fmt::Display) -> Failure {
    Failure::new(Class::Foreign, format!("the service gave {what}"))
}

/// Says so, once, if a service gives another block size than the one there is. What counts is the
/// length of each block, without which none is used (moto says 512 and means 524,288).
pub(super) fn check_block_size(size: Option<i32>) {
    static TOLD: std::sync::Once = std::sync::Once::new();
    if let Some(size) = size.filter(|size| usize::try_from(*size) != Ok(BLOCK_SIZE)) {
        TOLD.call_once(|| {
            tracing::warn!(
                "the service gives a block size of {size}, where EBS has {BLOCK_SIZE}: is this its endpoint?"
            );
        });
    }
}

/// Checks that indexes ascend, or the map of the image would be wrong. Only a page that is all there
/// is may be put in order here, and begin before the index that was asked for.
fn in_order<T>(
    blocks: &mut Vec<T>,
    whole: bool,
    start: Option<i32>,
    index: impl Fn(&T) -> BlockIndex,
) -> Result<(), Failure> {
    if whole {
        blocks.sort_by_key(&index);
        let start = start.and_then(|start| u32::try_from(start).ok()).unwrap_or(0);
        blocks.retain(|block| index(block).0 >= start);
    }
    match blocks.windows(2).find(|pair| index(&pair[0]) >= index(&pair[1])) {
        Some(pair) => {
            Err(unexpected(format!("block {} behind block {}", index(&pair[1]), index(&pair[0]))))
        }
        None => Ok(()),
    }
}

fn of<'a>(kind: &'static Kind, id: &'a SnapshotId, doing: &'a str) -> Request<'a> {
    Request { kind, snapshot: Some(id), doing, policy: RetryPolicy::standard() }
}

impl Ebs {
    pub(super) async fn list_block_page(
        &self,
        id: &SnapshotId,
        from: ListFrom,
        max: usize,
    ) -> Result<BlockPage> {
        let position = Position::of(from)?;
        let doing = format!("list the blocks of {id}");
        let (position, asked) = (&position, of(&kinds::LIST_SNAPSHOT_BLOCKS, id, &doing));
        let listed_page = self.service.call(asked, |clients| async move {
            let request = clients.ebs.list_snapshot_blocks().snapshot_id(id.as_str());
            let request = request.max_results(results(max)).set_next_token(position.token.clone());
            let answer = request.set_starting_block_index(position.index).send().await;
            let answer = answer.map_err(|e| {
                let reason = reason_of!(ListSnapshotBlocksError, e);
                Failure::of_sdk(&e, reason.as_deref())
            })?;
            check_block_size(answer.block_size);
            let expiry = answer.expiry_time.as_ref();
            let found = answer.blocks.ok_or_else(|| unexpected("no list of blocks"))?;
            let mut blocks = Vec::with_capacity(found.len());
            for block in found {
                let token =
                    block.block_token.ok_or_else(|| unexpected("a block without a token"))?;
                blocks.push((index(block.block_index)?, token));
            }
            let mut blocks = listed(blocks, expiry);
            let whole = position.token.is_none() && answer.next_token.is_none();
            in_order(&mut blocks, whole, position.index, |block| block.index)?;
            // The service always says it, and EC2 does, too: what says nothing contradicts nobody.
            let gib = answer.volume_size.unwrap_or(MAX_VOLUME_GIB);
            let gib = u64::try_from(gib).unwrap_or(0);
            let end = VolumeSize::from_gib(gib).map(VolumeSize::blocks);
            let end = end.map_err(|_| unexpected(format!("a volume of {gib} GiB")))?;
            if let Some(beyond) = blocks.last().map(|block| block.index).filter(|at| *at >= end) {
                return Err(unexpected(format!("block {beyond} of a volume of {gib} GiB")));
            }
            Ok((blocks, end, answer.next_token))
        });
        let (mut blocks, end, token) = listed_page.await?;
        let cut = blocks.get(max).map(|block| block.index);
        let full = behind(&blocks, max, |block| block.index).filter(|index| *index < end);
        blocks.truncate(max);
        let next = next(cut, token, full);
        let covered = match &next {
            None => Some(end),
            Some(_) => cut.or(blocks.last().map(|block| block.index.next())),
        };
        Ok(BlockPage { blocks, covered, next, started: None })
    }

    pub(super) async fn list_changed_page(
        &self,
        first: &SnapshotId,
        second: &SnapshotId,
        from: ListFrom,
        max: usize,
    ) -> Result<ChangedPage> {
        let position = Position::of(from)?;
        let doing = format!("compare {first} and {second}");
        let (position, asked) = (&position, of(&kinds::LIST_CHANGED_BLOCKS, second, &doing));
        let changed_page = self.service.call(asked, |clients| async move {
            let request = clients.ebs.list_changed_blocks().first_snapshot_id(first.as_str());
            let request = request.second_snapshot_id(second.as_str()).max_results(results(max));
            let request = request.set_next_token(position.token.clone());
            let answer = request.set_starting_block_index(position.index).send().await;
            let answer = answer.map_err(|e| {
                let reason = reason_of!(ListChangedBlocksError, e);
                Failure::of_sdk(&e, reason.as_deref())
            })?;
            check_block_size(answer.block_size);
            let expiry = answer.expiry_time.as_ref();
            let mut blocks = Vec::new();
            for block in
                answer.changed_blocks.ok_or_else(|| unexpected("no list of changed blocks"))?
            {
                let index = index(block.block_index)?;
                let one = |token| listed(vec![(index, token)], expiry).pop();
                blocks.push(ChangedBlock {
                    index,
                    first: block.first_block_token.and_then(one),
                    second: block.second_block_token.and_then(one),
                });
            }
            let whole = position.token.is_none() && answer.next_token.is_none();
            in_order(&mut blocks, whole, position.index, |block| block.index)?;
            Ok((blocks, answer.next_token))
        });
        let (mut blocks, token) = changed_page.await?;
        let cut = blocks.get(max).map(|block| block.index);
        let full = behind(&blocks, max, |block| block.index);
        blocks.truncate(max);
        Ok(ChangedPage { blocks, next: next(cut, token, full), started: None })
    }

    pub(super) async fn read_block(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: &BlockToken,
    ) -> Result<Block> {
        let expired = || {
            let message = format!("the token of block {index} of {id} is none of this store");
            Error::new(ErrorKind::ExpiredToken, message)
        };
        let number = i32::try_from(index.0).map_err(|_| expired())?;
        let mut token = Token::decode(token).ok_or_else(expired)?;
        token = self.valid(id, index, token).await?;
        for _ in 0..MAX_RENEWALS {
            match self.read_with(id, number, &token).await {
                Err(error) if error.kind() == ErrorKind::ExpiredToken => {
                    token = self.renewed(id, index, &token).await?;
                }
                read => return read,
            }
        }
        self.read_with(id, number, &token).await
    }

    async fn read_with(&self, id: &SnapshotId, number: i32, token: &Token) -> Result<Block> {
        let doing = format!("read block {number} of {id}");
        let asked = of(&kinds::GET_SNAPSHOT_BLOCK, id, &doing);
        let read = self.service.call(asked, |clients| async move {
            let request = clients.ebs.get_snapshot_block().snapshot_id(id.as_str());
            let request = request.block_index(number).block_token(&token.text).send();
            let answer = or_silence(request).await?;
            let answer = answer.map_err(|e| {
                let reason = reason_of!(GetSnapshotBlockError, e);
                Failure::of_sdk(&e, reason.as_deref())
            })?;
            let checksum = answer.checksum.as_deref().and_then(Digest::from_base64);
            let expected = checksum.ok_or_else(|| unexpected("no SHA-256 with a block"))?;
            let block = Block::new(collect(answer.block_data).await?);
            // Spoilt on the way, most likely.
            block
                .expect(expected)
                .map_err(|mismatch| Failure::new(Class::Corrupt, mismatch.to_string()))
        });
        read.await
    }
}

/// What comes, unless nothing does for as long as an attempt may take.
async fn or_silence<T>(coming: impl Future<Output = T>) -> Result<T, Failure> {
    tokio::time::timeout(ATTEMPT, coming).await.map_err(|_| Failure::timed_out(ATTEMPT))
}

/// Reads a body straight into the memory in which the block stays.
async fn collect(mut body: ByteStream) -> Result<Bytes, Failure> {
    let mut buffer = BlockBuffer::block();
    let mut len = 0;
    while let Some(data) = or_silence(body.next()).await? {
        let data = data.map_err(|e| {
            let text = format!("the answer was cut: {}", causes(&e));
            Failure::new(Class::Transient, text)
        })?;
        let end = len + data.len();
        let room = buffer.get_mut(len..end);
        let room =
            room.ok_or_else(|| unexpected(format!("more than the {BLOCK_SIZE} bytes of a block")))?;
        room.copy_from_slice(&data);
        len = end;
    }
    match len {
        BLOCK_SIZE => Ok(buffer.freeze()),
        _ => Err(unexpected(format!("{len} bytes, where a block has {BLOCK_SIZE}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_page_leads_on_with_and_without_a_token() {
        let blocks: Vec<_> = (5..105).map(BlockIndex).collect();
        let full = behind(&blocks, 100, |index| *index);
        assert_eq!(full, Some(BlockIndex(105)));
        assert_eq!(behind(&blocks[1..], 100, |index| *index), None);
        let text = |page: Option<PageToken>| page.map(|PageToken(text)| text);
        assert_eq!(text(next(None, None, full)).as_deref(), Some("index 105"));
        assert_eq!(text(next(None, Some("t".to_owned()), full)).as_deref(), Some("token t"));
        assert_eq!(text(next(Some(BlockIndex(7)), None, full)).as_deref(), Some("index 7"));
        assert_eq!(text(next(None, Some(String::new()), None)), None);
    }
}
