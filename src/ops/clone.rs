//! `clone`: a working image begins as a snapshot.

use std::path::{Path, PathBuf};

use clap::Args;

use super::commit::Made;
use super::context::Context;
use super::reference::{HELP, Reference};
use super::table::{Operation, Words};
use super::{Error, Result};
use crate::arguments::working_name;

/// Make a working image that begins as a snapshot
#[derive(Args, Debug)]
#[command(after_help = "\
Nothing is copied: the file reads as the snapshot does, and keeps what is written over it.

Examples:
  fspfs clone snap-0123456789abcdef0 /mnt/fsp/new/web.img")]
pub(crate) struct CloneArgs {
    #[arg(value_name = "SNAP", help = HELP)]
    snapshot: Reference,
    /// A new file below `new/` of a mount
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Operation for CloneArgs {
    const NAME: &'static str = "clone";
    const LINE: Option<&'static str> = Some("snap-0123456789abcdef0 web.img");
    type Report = Made;

    async fn run(self, cx: &Context) -> Result<Made> {
        let name = working_name(&self.file).map_err(Error::Refused)?;
        let working = cx.working()?;
        let making = cx.run.unless_stopped(async {
            let id = self.snapshot.id(cx, &cx.open().await?).await?;
            working.clone_of(&id, name).await?;
            Ok(id)
        });
        let id = making.await?.map_err(|error: Error| error.doing(format!("make {name}")))?;
        Ok(Made::of(Some(id)))
    }

    fn check(&self) -> std::result::Result<(), String> {
        working_name(&self.file).map(drop)
    }

    fn at_mount(&self) -> Option<(&Path, Words<'_>)> {
        let words = |name: &str| vec![self.snapshot.to_string(), "--".to_owned(), name.to_owned()];
        Some((&self.file, Box::new(words)))
    }
}
