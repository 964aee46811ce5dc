//! `verify`, where a store cannot check itself: every block is read, and compared with its SHA-256;
//! and with a file, if there is one.

use std::path::PathBuf;

use futures::TryStreamExt as _;
use serde::Serialize;

use super::blocks::Listing;
use super::upload::{Candidate, candidates};
use super::{Error, Result};
use crate::blocking::blocking;
use crate::model::{BLOCK_SIZE_U64, Block, BlockIndex, SnapshotId};
use crate::store::{self, ErrorKind, SharedStore};
use crate::transfer::source::Source;
use crate::transfer::{self, SharedProgress, spawned};

/// Findings that a report has at most; beyond, they are only counted.
const MAX_FINDINGS: usize = 1000;

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Snapshots that were read.
    pub snapshots: u64,
    /// Blocks that were read.
    pub blocks: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// What is not as it should be.
    pub findings: Vec<Finding>,
    /// How many findings there were.
    pub wrong: u64,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The block.
    pub block: BlockIndex,
    /// What is wrong with it.
    pub problem: String,
}

impl Report {
    fn add(&mut self, snapshot: &SnapshotId, block: BlockIndex, problem: String) {
        self.wrong += 1;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { snapshot: snapshot.clone(), block, problem });
        }
    }
}

/// Reads every block of a snapshot. If there is a file, it must be what the snapshot is.
///
/// # Errors
///
/// If the snapshot or the file cannot be read at all. A block that is damaged is a finding.
pub async fn verify(
    store: &SharedStore,
    id: &SnapshotId,
    against: Option<PathBuf>,
    progress: &SharedProgress,
    report: &mut Report,
) -> Result<()> {
    let snapshot = store.describe(id).await?;
    if !snapshot.is_readable() {
        let message = format!("{id} is {}, and cannot be read", snapshot.state.as_str());
        return Err(store::Error::new(ErrorKind::NotReady, message).into());
    }
    let listing = Listing::new(store.clone(), id.clone());
    let source = match against {
        Some(path) => {
            let source = blocking(move || Source::open(&path)).await?;
            if source.len() != snapshot.image_len() {
                let why =
                    format!("it has {} bytes, and {id} has {}", source.len(), snapshot.image_len());
                return Err(transfer::Error::unsuitable(source.path(), why).into());
            }
            Some(source)
        }
        None => None,
    };
    let everything =
        match source.clone() {
            Some(source) => {
                let end = source.volume_size().blocks();
                futures::future::Either::Left(candidates(source, end, Some(listing)).await?)
            }
            None => futures::future::Either::Right(listing.stream().map_err(Error::from).map_ok(
                |block| Candidate { index: block.index, in_file: false, parent: Some(block) },
            )),
        };
    let checks = everything
        .map_ok(|candidate| spawned(check(store.clone(), id.clone(), source.clone(), candidate)))
        .try_buffer_unordered(store.parallelism());
    let mut checks = std::pin::pin!(checks);
    while let Some((index, read, problem)) = checks.try_next().await? {
        progress.advance(1);
        report.blocks += u64::from(read);
        if let Some(problem) = problem {
            report.add(id, index, problem);
        }
    }
    report.bytes = report.blocks * BLOCK_SIZE_U64;
    report.snapshots += 1;
    Ok(())
}

/// Reads one block: whether there is one, and what is wrong with it.
async fn check(
    store: SharedStore,
    id: SnapshotId,
    source: Option<Source>,
    candidate: Candidate,
) -> Result<(BlockIndex, bool, Option<String>)> {
    let Candidate { index, in_file, parent: listed } = candidate;
    let read = listed.is_some();
    let block = match listed {
        None => Block::Zero,
        Some(listed) => match store.get_block(&id, index, &listed.token).await {
            Ok(block) if listed.digest.is_none_or(|digest| digest == block.digest()) => block,
            Ok(_) => return Ok((index, true, Some("it is not what was listed".to_owned()))),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                return Ok((index, true, Some(error.to_string())));
            }
            Err(error) => return Err(error.into()),
        },
    };
    let Some(source) = source else { return Ok((index, read, None)) };
    let path = source.path().display().to_string();
    let other = match in_file {
        true => source.read(index).await?,
        false => Block::Zero,
    };
    let problem = (other != block).then(|| format!("it differs from {path}"));
    Ok((index, read, problem))
}
