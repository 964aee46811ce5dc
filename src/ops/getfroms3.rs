//! `getfroms3`: an archive becomes a snapshot again, or a file.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::bucket::{BucketArgs, Cost, over_archives};
use super::context::Context;
use super::copy::{Copied, HowArgs, Order};
use super::destination::{in_region, region};
use super::download::{DownloadArgs, Downloaded};
use super::reference::{HELP, Reference};
use super::table::{Operation, Report};
use super::{Error, Exit, Result};

/// Restore an archive from a bucket, as a snapshot or as a file
#[derive(Args, Debug)]
#[command(after_help = "\
The snapshot is made in the store of -s. The tag fspfs:origin has the id of the archive.

Examples:
  fspfs -s ebs: getfroms3 snap-0123456789abcdef0 my-bucket/snaps
  fspfs -s ebs: getfroms3 name:web my-bucket/snaps -d eu-west-1
  fspfs getfroms3 latest my-bucket/snaps --output /dev/sdb

Archives that Flexible Snapshot Proxy has made are read, too. It never stored the last segment of a snapshot:
--salvage restores the others, and marks the result with the tag fspfs:salvaged.

What is stopped goes on where it was when the same command is given again.
Exit status: 0 done, 1 failed, 2 wrong usage, 3 restored in part.")]
pub(crate) struct Getfroms3Args {
    #[arg(value_name = "SNAP", help = HELP)]
    snapshot: Reference,
    #[command(flatten)]
    bucket: BucketArgs,
    /// The region that the snapshot is made in; for `ebs:`
    #[arg(short, long, value_name = "REGION", value_parser = region)]
    #[arg(visible_alias = "destination_region")]
    destination_region: Option<String>,
    /// Write a file or a block device, and make no snapshot
    #[arg(long, value_name = "FILE", conflicts_with = "destination_region")]
    output: Option<PathBuf>,
    /// Restore what is whole of an archive of Flexible Snapshot Proxy, and say what is missing
    #[arg(long)]
    salvage: bool,
    #[command(flatten)]
    how: HowArgs,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Restored {
    #[serde(flatten)]
    what: What,
    /// What was asked of the bucket.
    #[serde(flatten)]
    cost: Cost,
    #[serde(skip)]
    is_whole: bool,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum What {
    Snapshot(Copied),
    File(Downloaded),
}

impl Report for Restored {
    fn lines(&self) -> Vec<String> {
        match &self.what {
            What::Snapshot(copied) => copied.lines(),
            What::File(downloaded) => downloaded.lines(),
        }
    }

    fn ids(&self) -> Vec<String> {
        match &self.what {
            What::Snapshot(copied) => copied.ids(),
            What::File(downloaded) => downloaded.ids(),
        }
    }

    fn exit(&self) -> Exit {
        if self.is_whole { Exit::Done } else { Exit::Partly }
    }
}

impl Operation for Getfroms3Args {
    const NAME: &'static str = "getfroms3";
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0 my-bucket/snaps");
    const DRY_RUN: bool = true;
    type Report = Restored;

    fn uses_store(&self) -> bool {
        self.output.is_none()
    }

    async fn run(self, cx: &Context) -> Result<Restored> {
        let Self { snapshot, bucket, destination_region, output, salvage, how } = self;
        let url = bucket.url(None)?;
        let (archives, store) = over_archives(cx, &url, salvage).await?;
        if let Some(path) = output {
            how.check_plain("a file")?;
            let download = DownloadArgs::of(snapshot, path, how.resume);
            let file = download.run(&archives).await?;
            let is_whole = file.is_whole();
            return Ok(Restored { what: What::File(file), cost: Cost::of(&store), is_whole });
        }
        let to = match &destination_region {
            Some(region) => in_region(&cx.house.from, region)?,
            None => cx.house.from.clone(),
        };
        if !to.is_writable() {
            return Err(Error::Refused(format!("{to} cannot be written to")));
        }
        let order = Order { snapshot, how, elsewhere: Some(to), archive: None };
        let copied = order.run(&archives).await?;
        let is_whole = copied.missing().is_none();
        if let Some(missing) = copied.missing() {
            cx.note(missing);
        }
        Ok(Restored { what: What::Snapshot(copied), cost: Cost::of(&store), is_whole })
    }
}
