//! `list`: which snapshots there are, and how large one is.

use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::bucket::over;
use super::context::Context;
use super::reference::{Reference, describe};
use super::table::{Operation, Report};
use super::text::{columns, contains, size};
use super::{Error, Result};
use crate::arguments::ScopeArgs;
use crate::model::{BLOCK_SIZE_U64, Snapshot, SnapshotId, SnapshotState};
use crate::shown::one_line;
use crate::store::listing::Listing;
use crate::store::page::list_all;
use crate::store::{SharedStore, StoreUrl};

/// List the snapshots, or say how large one is
#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    /// Say how many blocks this snapshot has, named as for `download`; or list what is at `s3://BUCKET/PREFIX`
    #[arg(value_name = "SNAP")]
    snapshot: Option<Reference>,
    #[command(flatten)]
    scope: ScopeArgs,
}

/// What there is.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Listed {
    All(Vec<Snapshot>),
    One(Counted),
}

/// A snapshot whose blocks were counted: those that were ever written to it, here or in an ancestor.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Counted {
    pub(super) id: SnapshotId,
    pub(super) blocks: u64,
    pub(super) bytes: u64,
    #[serde(skip)]
    elapsed: Duration,
}

impl Operation for ListArgs {
    const NAME: &'static str = "list";
    const READS: bool = true;
    type Report = Listed;

    async fn run(mut self, cx: &Context) -> Result<Listed> {
        let bucket = self.snapshot.as_ref().and_then(Reference::image).and_then(Path::to_str);
        let bucket = bucket.filter(|text| text.starts_with("s3://")).map(str::parse::<StoreUrl>);
        let elsewhere = match bucket {
            Some(url) => {
                self.snapshot = None;
                Some(over(cx, &url.map_err(|error| Error::Refused(error.to_string()))?))
            }
            None => None,
        };
        let cx = elsewhere.as_ref().unwrap_or(cx);
        let store = cx.open_scope(&self.scope).await?;
        let listed = async {
            let Some(snapshot) = &self.snapshot else {
                return Ok(Listed::All(snapshots(&store).await?));
            };
            let id = snapshot.id(cx, &store).await?;
            Ok(Listed::One(Counted::of(&store, &id).await?))
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
            Self::One(counted) => vec![counted.line()],
        }
    }

    fn ids(&self) -> Vec<String> {
        match self {
            Self::All(snapshots) => snapshots.iter().map(|found| found.id.to_string()).collect(),
            Self::One(counted) => vec![counted.id.to_string()],
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

impl Counted {
    pub(super) async fn of(store: &SharedStore, id: &SnapshotId) -> Result<Self> {
        let began = Instant::now();
        let snapshot = describe(store, id).await?;
        let known = snapshot.data_blocks.zip(snapshot.zero_blocks);
        let mut blocks = known.map_or(0, |(data, zero)| data + zero);
        if known.is_none() {
            let mut listing = Listing::blocks(store.clone(), &snapshot);
            while listing.next().await?.is_some() {
                blocks += 1;
            }
        }
        let (id, bytes) = (id.clone(), blocks * BLOCK_SIZE_U64);
        Ok(Self { id, blocks, bytes, elapsed: began.elapsed() })
    }

    pub(super) fn line(&self) -> String {
        contains(&self.id, self.blocks, self.elapsed.as_secs_f64())
    }
}
