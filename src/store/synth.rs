//! A synthetic store: snapshots that are computed, of any size. Nothing is stored, nothing can be
//! written, and a page of a listing costs the same anywhere in 64 TiB.
//!
//! `docs/synth.md` describes the URL, and which blocks of which snapshot differ.

use async_trait::async_trait;
use bytes::{BufMut as _, BytesMut};
use jiff::Timestamp;

use super::page::{page_token, start_index};
use super::{
    BlockPage, BlockToken, ChangedBlock, ChangedPage, CompleteRequest, Error, ErrorKind, ListFrom,
    ListToken, ListedBlock, MAX_PAGE_BLOCKS, Result, SnapshotPage, SnapshotStore, StartRequest,
};
use crate::blocking::blocking;
use crate::model::{
    Block, BlockIndex, Digest, NAME_TAG, Snapshot, SnapshotId, SnapshotState, Tags,
};

mod changes;
mod content;
mod mix;
mod recipe;
#[cfg(test)]
mod tests;
mod version;

pub(super) use recipe::SCHEME;
pub use recipe::{InvalidRecipe, MAX_LINEAGES, MAX_VERSIONS, Recipe};
use version::{Kind, Page, Version};

/// Snapshots that one page of the list has at most.
const LIST_PAGE: u32 = 1000;

/// Which block of which snapshot, and a check.
const TOKEN_LEN: usize = 8 + 8;

/// When the first versions were started: 2024-01-01T00:00:00Z, in seconds.
const FIRST_START: i64 = 1_704_067_200;

/// Seconds from the start of one version to that of the next.
const BETWEEN_STARTS: i64 = 3600;

/// A store whose snapshots are computed from a [`Recipe`].
#[derive(Debug)]
pub struct Synth {
    recipe: Recipe,
    /// Tells the tokens of this store from those of others.
    key: u64,
}

impl Synth {
    /// The store of a recipe.
    pub fn new(recipe: Recipe) -> Self {
        let digest = Digest::of(recipe.to_string().as_bytes());
        let key = u64::from_le_bytes(digest.0[..8].try_into().expect("8 bytes"));
        Self { recipe, key }
    }

    fn version(&self, id: &SnapshotId) -> Result<Version> {
        let recipe = self.recipe;
        let found = read_id(id).filter(|&(seed, family, number)| {
            seed == recipe.seed
                && (1..=recipe.lineages).contains(&family)
                && (1..=recipe.versions).contains(&number)
        });
        match found {
            Some((_, family, number)) => Ok(Version { recipe, family, number }),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no snapshot {id} in {recipe}"),
            )),
        }
    }

    fn read_only(&self, doing: &str) -> Error {
        let recipe = self.recipe;
        let message = format!(
            "cannot {doing}: {recipe} is computed and can only be read; a repository can be written, as `-s /srv/snaps`"
        );
        Error::new(ErrorKind::Unsupported, message)
    }

    fn listed(
        &self,
        version: &Version,
        blocks: &[(BlockIndex, Kind)],
    ) -> impl Iterator<Item = ListedBlock> {
        let mut tokens = BytesMut::with_capacity(blocks.len() * TOKEN_LEN);
        for (index, _) in blocks {
            tokens.put_slice(&self.token(version, *index));
        }
        let tokens = tokens.freeze();
        blocks.iter().enumerate().map(move |(n, &(index, kind))| ListedBlock {
            index,
            token: BlockToken(tokens.slice(n * TOKEN_LEN..(n + 1) * TOKEN_LEN)),
            digest: (kind == Kind::Zero).then_some(Digest::OF_ZEROS),
        })
    }

    fn token(&self, version: &Version, index: BlockIndex) -> [u8; TOKEN_LEN] {
        let block = [version.family.into(), version.number.into(), index.0.into()];
        let check = mix::key([self.key].into_iter().chain(block));
        let block =
            u64::from(version.family) << 48 | u64::from(version.number) << 32 | u64::from(index.0);
        let mut token = [0; TOKEN_LEN];
        token[..8].copy_from_slice(&block.to_le_bytes());
        token[8..].copy_from_slice(&check.to_le_bytes());
        token
    }
}

#[async_trait]
impl SnapshotStore for Synth {
    async fn describe(&self, id: &SnapshotId) -> Result<Snapshot> {
        Ok(self.version(id)?.describe())
    }

    async fn list(&self, token: Option<ListToken>) -> Result<SnapshotPage> {
        let all = self.recipe.lineages * self.recipe.versions;
        let first = match token {
            None => 0,
            Some(ListToken(token)) => token.parse().map_err(|_| {
                let message = format!("{token:?} is not a token of a list of snapshots");
                Error::new(ErrorKind::ExpiredToken, message)
            })?,
        };
        let end = all.min(LIST_PAGE.saturating_add(first));
        let version = |n: u32| Version {
            recipe: self.recipe,
            family: n / self.recipe.versions + 1,
            number: n % self.recipe.versions + 1,
        };
        let snapshots = (first..end).map(|n| version(n).describe()).collect();
        Ok(SnapshotPage { snapshots, next: (end < all).then(|| ListToken(end.to_string())) })
    }

    async fn list_blocks(&self, id: &SnapshotId, from: ListFrom, max: usize) -> Result<BlockPage> {
        let (version, from) = (self.version(id)?, start_index(&from)?);
        let max = max.clamp(1, MAX_PAGE_BLOCKS);
        let Page { blocks, next, .. } = blocking(move || version.page(from, max)).await;
        Ok(BlockPage {
            blocks: self.listed(&version, &blocks).collect(),
            covered: Some(next.unwrap_or(self.recipe.size.blocks())),
            next: next.map(page_token),
            started: None,
        })
    }

    async fn list_changed_blocks(
        &self,
        first: &SnapshotId,
        second: &SnapshotId,
        from: ListFrom,
        max: usize,
    ) -> Result<ChangedPage> {
        let (one, two) = (self.version(first)?, self.version(second)?);
        if one.family != two.family {
            let message =
                format!("cannot compare {first} and {second}: they are not of one lineage");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let (from, max) = (start_index(&from)?, max.clamp(1, MAX_PAGE_BLOCKS));
        let turned = one.number > two.number;
        let (old, new) = if turned { (two, one) } else { (one, two) };
        let page = blocking(move || old.changes_to(&new, from, max)).await;
        let changed: Vec<_> = page.blocks.iter().map(|(index, _)| (*index, Kind::Data)).collect();
        let pairs = self.listed(&old, &page.blocks).zip(self.listed(&new, &changed));
        let blocks = pairs.zip(&page.blocks).map(|((before, after), (index, kind))| {
            let before = (*kind != Kind::Hole).then_some(before);
            let (first, second) =
                if turned { (Some(after), before) } else { (before, Some(after)) };
            ChangedBlock { index: *index, first, second }
        });
        Ok(ChangedPage { blocks: blocks.collect(), next: page.next.map(page_token), started: None })
    }

    async fn get_block(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        token: &BlockToken,
    ) -> Result<Block> {
        let version = self.version(id)?;
        let expired = || {
            let message = format!("the token of block {index} of {id} is not one of this block");
            Error::new(ErrorKind::ExpiredToken, message)
        };
        if token.0[..] != self.token(&version, index) {
            return Err(expired());
        }
        blocking(move || version.block(index)).await.ok_or_else(expired)
    }

    async fn start(&self, _request: StartRequest) -> Result<Snapshot> {
        Err(self.read_only("start a snapshot"))
    }

    async fn put_block(&self, id: &SnapshotId, index: BlockIndex, _block: Block) -> Result<()> {
        Err(self.read_only(&format!("put block {index} of {id}")))
    }

    async fn flush(&self, id: &SnapshotId) -> Result<()> {
        Err(self.read_only(&format!("flush {id}")))
    }

    async fn complete(&self, id: &SnapshotId, _request: CompleteRequest) -> Result<Snapshot> {
        Err(self.read_only(&format!("complete {id}")))
    }

    async fn delete(&self, id: &SnapshotId) -> Result<()> {
        Err(self.read_only(&format!("delete {id}")))
    }

    async fn set_tags(&self, id: &SnapshotId, _tags: Tags) -> Result<()> {
        Err(self.read_only(&format!("change the tags of {id}")))
    }
}

impl Version {
    fn describe(&self) -> Snapshot {
        let Self { recipe, family, number } = *self;
        let name = match recipe.lineages {
            1 => format!("synth-{number}"),
            _ => format!("synth-{family}-{number}"),
        };
        let full =
            recipe.density == recipe::Fraction::ONE && recipe.zeros == recipe::Fraction::NONE;
        let hours = i64::from(number - 1);
        Snapshot {
            id: id(recipe.seed, family, number),
            state: SnapshotState::Completed,
            state_message: None,
            volume_size: recipe.size,
            parent: (number > 1).then(|| id(recipe.seed, family, number - 1)),
            lineage: Some(id(recipe.seed, family, 1)),
            volume_id: Some(format!("vol-{}", digits(recipe.seed, family, 0))),
            description: format!("version {number} of lineage {family}, computed by {recipe}"),
            start_time: Timestamp::from_second(FIRST_START + hours * BETWEEN_STARTS)
                .expect("it is in this century"),
            completion_time: None,
            tags: Tags::from([(NAME_TAG.to_owned(), name)]),
            encrypted: false,
            content_digest: None,
            data_blocks: full.then(|| recipe.size.blocks().0.into()),
            zero_blocks: full.then_some(0),
        }
    }
}

/// 17 digits as those of EC2: 8 of the seed, 4 of the family, 5 of the version, all hexadecimal.
fn digits(seed: u32, family: u32, number: u32) -> String {
    format!("{seed:08x}{family:04x}{number:05x}")
}

fn id(seed: u32, family: u32, number: u32) -> SnapshotId {
    let id = format!("snap-{}", digits(seed, family, number));
    id.parse().expect("it has the form of an id")
}

/// The seed, the family and the version of an id.
fn read_id(id: &SnapshotId) -> Option<(u32, u32, u32)> {
    let digits = id.as_str().strip_prefix("snap-")?;
    if digits.len() != 17 {
        return None;
    }
    let number = |range| u32::from_str_radix(&digits[range], 16).ok();
    Some((number(0..8)?, number(8..12)?, number(12..17)?))
}
