//! `list`: which snapshots there are, and how large one is.

use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::Result;
use super::context::Context;
use super::table::{Operation, Report};
use super::text::{columns, contains, one_line, size};
use crate::arguments::ScopeArgs;
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotId, SnapshotState};
use crate::store::SharedStore;
use crate::store::listing::Listing;
use crate::store::page::list_all;

/// List the snapshots, or say how large one is
#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    /// Say how many blocks this snapshot has
    #[arg(value_name = "SNAP")]
    snapshot: Option<SnapshotId>,
    #[command(flatten)]
    scope: ScopeArgs,
}

/// What there is.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Listed {
    All(Vec<Snapshot>),
    One {
        id: SnapshotId,
        blocks: u64,
        bytes: u64,
        #[serde(skip)]
        elapsed: Duration,
    },
}

impl Operation for ListArgs {
    const NAME: &'static str = "list";
    type Report = Listed;

    async fn run(self, cx: &Context) -> Result<Listed> {
        let store = cx.open_scope(&self.scope).await?;
        let listed = async {
            let Some(id) = self.snapshot else { return Ok(Listed::All(snapshots(&store).await?)) };
            let began = Instant::now();
            let blocks = block_count(&store, &id).await?;
            Ok(Listed::One { id, blocks, bytes: blocks * BLOCK_SIZE_U64, elapsed: began.elapsed() })
        };
        cx.run.unless_stopped(listed).await?
    }
}

impl Report for Listed {
    fn lines(&self) -> Vec<String> {
        match self {
            Self::All(snapshots) => {
                let header =
                    ["SNAPSHOT", "STATE", "SIZE", "DATA", "STARTED", "NAME", "DESCRIPTION"];
                columns(header, snapshots.iter().map(row))
            }
            Self::One { id, blocks, elapsed, .. } => {
                vec![contains(id, *blocks, elapsed.as_secs_f64())]
            }
        }
    }

    fn ids(&self) -> Vec<String> {
        match self {
            Self::All(snapshots) => snapshots.iter().map(|found| found.id.to_string()).collect(),
            Self::One { .. } => self.lines(),
        }
    }
}

fn row(snapshot: &Snapshot) -> [String; 7] {
    if snapshot.state == SnapshotState::Error {
        let dash = || "-".to_owned();
        let why = one_line(snapshot.state_message.as_deref().unwrap_or_default());
        let state = snapshot.state.as_str().to_owned();
        return [snapshot.id.to_string(), state, dash(), dash(), dash(), dash(), why];
    }
    [
        snapshot.id.to_string(),
        snapshot.state.as_str().to_owned(),
        snapshot.volume_size.to_string(),
        snapshot.data_bytes().map_or_else(|| "-".to_owned(), size),
        snapshot.start_time.strftime("%Y-%m-%d %H:%M:%S").to_string(),
        one_line(snapshot.name().unwrap_or("-")),
        one_line(snapshot.state_message.as_ref().unwrap_or(&snapshot.description)),
    ]
}

/// All snapshots, from old to new.
pub(crate) async fn snapshots(store: &SharedStore) -> Result<Vec<Snapshot>> {
    let mut snapshots = list_all(&**store).await?;
    snapshots.sort_by(|a, b| (a.start_time, &a.id).cmp(&(b.start_time, &b.id)));
    Ok(snapshots)
}

/// The number of blocks that were ever written to a snapshot, here or in an ancestor.
pub(crate) async fn block_count(store: &SharedStore, id: &SnapshotId) -> Result<u64> {
    let snapshot = store.describe(id).await?;
    if let (Some(data), Some(zero)) = (snapshot.data_blocks, snapshot.zero_blocks) {
        return Ok(data + zero);
    }
    let mut listing = Listing::blocks(store.clone(), &snapshot);
    let mut blocks = 0;
    while listing.next().await?.is_some() {
        blocks += 1;
    }
    Ok(blocks)
}
