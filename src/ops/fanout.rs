//! `fanout`: a file or device is read once, and becomes a snapshot in each of several stores.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, FromArgMatches as _};
use serde::Serialize;

use super::begin::{Begin, Made, Prepared};
use super::context::Context;
use super::destination::{KmsKey, elsewhere, in_region, key_for, open, region, tell_pending};
use super::image::{AsItWas, Image, ImageArgs, Parent, Place};
use super::list_file::{Named, read_list};
use super::multiclone::unless_stopped;
use super::table::{Operation, Report};
use super::text::rate;
use super::{Ending, Error, Exit, Left, Result};
use crate::arguments::ResumeArgs;
use crate::model::{BLOCK_SIZE_U64, SnapshotId};
use crate::shown::{self, one_line};
use crate::store::{ErrorKind, SharedStore, StoreUrl};
use crate::transfer::engine::{Run, transfer};

/// Make a snapshot of a file or a block device in each of several regions or stores
#[derive(Args, Debug)]
#[command(after_help = "\
The image is read once. A destination is a region, with the account and the endpoints of -s, or a
store. It can be followed by `--parent SNAP` and `--kms-key KEY`, in quotation marks on the command
line. If there is one DESTINATION alone, and it is a file, it is a list with one a line; blank lines
and lines that begin with # do not count. A destination that fails does not stop the others. What is
stopped goes on where it was when the same command is given again.

Examples:
  fspfs -s ebs: fanout /dev/sdb us-east-1 'us-west-2 --parent snap-0123456789abcdef0'
  fspfs -s ebs: fanout disk.img regions.txt
  fspfs fanout disk.img ebs://work@eu-central-1 /srv/snaps

The last line on stdout is a JSON object: the snapshot of each destination.
Exit status: 0 all are made, 1 none is, 2 wrong usage, 3 some are.")]
pub(crate) struct FanoutArgs {
    /// A disk image or a block device
    #[arg(value_name = "FILE")]
    path: PathBuf,
    /// Regions or stores, or a list of them
    #[arg(value_name = "DESTINATION", required_unless_present = "list")]
    destinations: Vec<String>,
    /// Take destinations from this text file too, one a line
    #[arg(long, value_name = "FILE")]
    list: Option<PathBuf>,
    #[command(flatten)]
    image: ImageArgs,
    /// The key to encrypt with, or that of a region, as eu-west-1=arn:…; can be given several times
    #[arg(
        long = "kms-key",
        visible_alias = "kms-key-id",
        value_name = "KEY",
        requires = "encrypted"
    )]
    kms_keys: Vec<KmsKey>,
    #[command(flatten)]
    resume: ResumeArgs,
}

/// What came of each destination.
#[derive(Debug, Serialize)]
pub(crate) struct Fanned {
    destinations: Vec<End>,
    failed: usize,
    #[serde(skip)]
    dry_run: bool,
    #[serde(skip)]
    file: String,
    /// Blocks that were put, in all of them.
    #[serde(skip)]
    blocks: u64,
    #[serde(skip)]
    elapsed: Duration,
}

/// What came of one.
#[derive(Debug, Serialize)]
struct End {
    /// As it was named.
    to: String,
    id: Option<SnapshotId>,
    error: Option<String>,
}

impl Report for Fanned {
    fn lines(&self) -> Vec<String> {
        if self.dry_run {
            return Vec::new();
        }
        let made = self.destinations.iter().filter_map(|end| Some((&end.to, end.id.as_ref()?)));
        let made: BTreeMap<_, _> = made.collect();
        vec![
            format!("{} {}", self.file, rate(self.elapsed, self.blocks * BLOCK_SIZE_U64)),
            shown::json(&serde_json::to_string(&made).expect("its keys are texts")),
        ]
    }

    fn ids(&self) -> Vec<String> {
        let ids = self.destinations.iter().filter_map(|end| end.id.as_ref());
        ids.map(ToString::to_string).collect()
    }

    fn exit(&self) -> Exit {
        match self.failed {
            0 => Exit::Done,
            failed if failed == self.destinations.len() => Exit::Failed,
            _ => Exit::Partly,
        }
    }
}

/// Where a snapshot is to be made.
#[derive(Debug)]
struct Destination {
    /// As it was named.
    name: String,
    /// The store, if it is not the one of `-s`.
    elsewhere: Option<StoreUrl>,
    more: MoreArgs,
}

/// What may stand behind a destination.
#[derive(Args, Clone, Debug)]
struct MoreArgs {
    #[arg(value_name = "DESTINATION")]
    to: String,
    #[arg(long, value_name = "SNAP", default_value = "none")]
    #[arg(visible_aliases = ["parent-snapshot-id", "parent_snapshot_id"])]
    parent: Parent,
    #[arg(long = "kms-key", visible_alias = "kms-key-id", value_name = "KEY")]
    kms_key: Option<KmsKey>,
}

impl Operation for FanoutArgs {
    const NAME: &'static str = "fanout";
    const LINE: Option<&'static str> = Some("/srv/images/web.img us-east-1 /srv/other");
    const DRY_RUN: bool = true;
    type Report = Fanned;

    async fn run(self, cx: &Context) -> Result<Fanned> {
        let file = one_line(&self.path.display().to_string());
        let doing = |error: Error| error.doing(format!("upload {file} to several stores"));
        cx.check_place(&self.path)?;
        let destinations = self.destinations(cx).await.map_err(doing)?;
        let image = Image::open(&self.path).await.map_err(doing)?;
        let (len, chunks) = (image.len, image.len.div_ceil(BLOCK_SIZE_U64));
        let size = image.size.gib();
        cx.line(format_args!(
            "Size of {file} is {len} bytes and {chunks} chunks. Aligning snapshot to {size} GiB boundary."
        ));
        image.check_whole(cx, self.image.as_is, None).await.map_err(doing)?;
        let began = Instant::now();
        let _turn = match cx.dry_run {
            true => None,
            false => Some(cx.run.unless_stopped(cx.run.memory.turn()).await?),
        };
        let ends = self.make(cx, &image, &destinations).await;
        let ends = unless_stopped(ends).map_err(doing)?;
        if !cx.dry_run && !image.is_unchanged() {
            cx.note(format_args!(
                "{file} was written to while it was read: the snapshots may hold a mixture"
            ));
        }
        let mut blocks = 0;
        let ends = destinations.iter().zip(ends).map(|(destination, end)| {
            let to = destination.name.clone();
            match end {
                Ok(Some(made)) => {
                    blocks += made.blocks;
                    made.tell(cx, Some(&to), "uploaded");
                    tell_pending(cx, &made.snapshot);
                    End { to, id: Some(made.snapshot.id), error: None }
                }
                Ok(None) => End { to, id: None, error: None },
                Err(error) => {
                    cx.warn(format_args!("{to}: {error}"));
                    if let Error::Unfinished { left: Left::Snapshot(id, _), .. } = &error {
                        cx.note(format_args!(
                            "{id} stays pending: the same command goes on with it"
                        ));
                    }
                    End { to, id: None, error: Some(error.to_string()) }
                }
            }
        });
        let destinations: Vec<_> = ends.collect();
        let failed = destinations.iter().filter(|end| end.error.is_some()).count();
        let (dry_run, elapsed) = (cx.dry_run, began.elapsed());
        Ok(Fanned { destinations, failed, dry_run, file, blocks, elapsed })
    }
}

impl FanoutArgs {
    /// All destinations, each of which is another store.
    async fn destinations(&self, cx: &Context) -> Result<Vec<Destination>> {
        let by_itself = |text: &String| Named::by_itself(text.into());
        let mut named: Vec<_> = self.destinations.iter().map(by_itself).collect();
        if let Some(list) = &self.list {
            cx.check_place(list)?;
            named.extend(read_list(list).await?);
        } else if let [alone] = &self.destinations[..]
            && std::path::Path::new(alone).is_file()
        {
            cx.check_place(alone.as_ref())?;
            named = read_list(alone.as_ref()).await?;
        }
        let mut destinations = Vec::with_capacity(named.len());
        let mut seen = HashSet::new();
        for named in &named {
            let destination = destination(cx, &named.path.to_string_lossy());
            let destination = destination.map_err(|error| named.refused(error))?;
            let url =
                destination.elsewhere.as_ref().unwrap_or(&cx.house.from).absolute()?.to_string();
            if !seen.insert(url) {
                let name = one_line(&destination.name);
                return Err(named.refused(format_args!("{name} is named twice")));
            }
            destinations.push(destination);
        }
        Ok(destinations)
    }

    /// Makes a snapshot in each: what came of it, or nothing if nothing is to be done.
    async fn make(
        &self,
        cx: &Context,
        image: &Image,
        destinations: &[Destination],
    ) -> Vec<Result<Option<Made>>> {
        let names = destinations.iter().filter(|_| !cx.dry_run).map(|to| to.name.clone());
        let blocks = image.size.blocks().0.into();
        let runs = cx.runs_showing("Uploading", names.collect(), blocks);
        let begun = destinations.iter().enumerate().map(|(n, destination)| {
            let runs = &runs;
            async move {
                let begin = self.begin(cx, image, destination).await?;
                if cx.dry_run {
                    return Ok(None);
                }
                let mut goes_on = false;
                let prepared = begin.prepare(&runs[n], &mut goes_on).await?;
                Ok(Some((begin, prepared, goes_on)))
            }
        });
        let begun: Vec<Result<_>> = futures::future::join_all(begun).await;
        if cx.dry_run {
            let (path, several) = (self.path.display(), destinations.len());
            cx.note(format_args!("{path} would be uploaded to {several} stores"));
            return begun.into_iter().map(|begun| begun.map(|_| None)).collect();
        }
        let lanes = begun.iter().flatten().flatten();
        let (lanes, mut ways) = (lanes.count(), Vec::new());
        cx.line(format_args!("Spawned {lanes} EBS Clients and started a snapshot in each region."));
        let mut endings = Vec::with_capacity(begun.len());
        for begun in begun {
            endings.push(match begun {
                Ok(Some((begin, Prepared::Begun { destination, ending }, goes_on))) => {
                    ways.push(destination);
                    Ok(Way::Goes(Box::new(begin), ending, goes_on))
                }
                Ok(Some((_, Prepared::Made(snapshot), _))) => {
                    Ok(Way::Ended(Some(Made::before(*snapshot))))
                }
                Ok(None) => Ok(Way::Ended(None)),
                Err(error) => Err(error),
            });
        }
        let finished = match ways.is_empty() {
            true => Vec::new(),
            false => transfer(Arc::clone(&image.source), ways, &cx.run).await,
        };
        let mut finished = finished.into_iter();
        let mut ends = Vec::with_capacity(endings.len());
        for (way, run) in endings.into_iter().zip(&runs) {
            ends.push(match way {
                Err(error) => Err(error),
                Ok(Way::Ended(made)) => Ok(made),
                Ok(Way::Goes(begin, ending, goes_on)) => {
                    let finished = finished.next().expect("each that was begun has ended");
                    again(&begin, Made::of(finished, ending), goes_on, run).await.map(Some)
                }
            });
        }
        ends
    }

    /// What is made in one store.
    async fn begin(
        &self,
        cx: &Context,
        image: &Image,
        destination: &Destination,
    ) -> Result<Begin<AsItWas>> {
        let url = destination.elsewhere.as_ref().unwrap_or(&cx.house.from);
        let opening = async {
            let store: SharedStore = open(cx, destination.elsewhere.as_ref()).await?;
            let parent = self.image.parent(cx, &store, image, &destination.more.parent).await?;
            Ok::<_, Error>((store, parent))
        };
        let (store, parent) = cx.run.unless_stopped(opening).await??;
        let kms_key = match &destination.more.kms_key {
            Some(key) => key_for(std::slice::from_ref(key), url)?,
            None => key_for(&self.kms_keys, url)?,
        };
        let resume = cx.resume(url, &store, &self.resume)?;
        let elsewhere = destination.elsewhere.clone();
        let place = Place { store, elsewhere, parent, kms_key, resume };
        Ok(self.image.begin(image, Self::NAME, place))
    }
}

/// How it is with one destination.
enum Way {
    Ended(Option<Made>),
    Goes(Box<Begin<AsItWas>>, Ending, bool),
}

/// Begins anew, if what an earlier run had begun is gone.
async fn again(
    begin: &Begin<AsItWas>,
    made: Result<Made>,
    goes_on: bool,
    run: &Run,
) -> Result<Made> {
    match made {
        Err(Error::Transfer(error))
            if goes_on
                && matches!(error.kind(), Some(ErrorKind::Conflict | ErrorKind::NotFound)) =>
        {
            begin.run_in_turn(run).await
        }
        made => made,
    }
}

/// A destination, and what stands behind it.
fn destination(cx: &Context, text: &str) -> Result<Destination> {
    let refused = |why: String| Error::Refused(why);
    let words = shlex::split(text)
        .ok_or_else(|| refused("a quotation mark or a backslash ends nowhere".to_owned()))?;
    let grammar = MoreArgs::augment_args(clap::Command::new("destination").no_binary_name(true));
    let grammar = grammar.disable_help_flag(true);
    let more = grammar
        .try_get_matches_from(words)
        .and_then(|matches| MoreArgs::from_arg_matches(&matches));
    let more = more.map_err(|error| {
        let error = error.to_string();
        refused(error.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned())
    })?;
    let url = match region(&more.to) {
        Ok(region) if matches!(cx.house.from, StoreUrl::Ebs(_)) && !is_path(&region) => {
            in_region(&cx.house.from, &region)?
        }
        _ => more.to.parse().map_err(|error| refused(format!("{error}")))?,
    };
    Ok(Destination { name: more.to.clone(), elsewhere: elsewhere(cx, url)?, more })
}

/// Whether a repository of this name is here.
fn is_path(name: &str) -> bool {
    std::path::Path::new(name).is_dir()
}
