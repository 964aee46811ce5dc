//! The store that a snapshot is made in, and what the snapshot is called and encrypted with there.

use std::str::FromStr;
use std::time::Duration;

use clap::Args;

use super::context::Context;
use super::{Error, Result};
use crate::arguments::EncryptedHoles;
use crate::model::{NAME_TAG, Snapshot, SnapshotState, Tags};
use crate::store::ebs::EbsUrl;
use crate::store::{self, ErrorKind, SharedStore, StoreOptions, StoreUrl};
use crate::transfer::sink::snapshot::Zeros;

/// How long to wait before the store is asked whether it is done, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(15);

/// The store that a snapshot is made in.
#[derive(Args, Clone, Debug)]
pub(super) struct ToArgs {
    /// The store that it is made in; by default, the one of -s
    #[arg(long, value_name = "STORE")]
    to: Option<StoreUrl>,
    /// The region that it is made in, with the account and the endpoints of -s; for `ebs:`
    #[arg(short, long, value_name = "REGION", value_parser = region, conflicts_with = "to")]
    #[arg(visible_alias = "destination_region")]
    destination_region: Option<String>,
}

/// A region of EBS.
///
/// # Errors
///
/// If the text is none.
pub(super) fn region(text: &str) -> std::result::Result<String, String> {
    let url: EbsUrl = format!("ebs://{text}").parse().map_err(|_| "it is not a region")?;
    let named = EbsUrl { region: Some(text.to_owned()), ..EbsUrl::default() };
    if url == named { Ok(text.to_owned()) } else { Err("it is not a region".to_owned()) }
}

impl ToArgs {
    /// That store, if it is another one than that of `-s`.
    ///
    /// # Errors
    ///
    /// If nothing can be made there.
    pub(super) fn elsewhere(&self, cx: &Context) -> Result<Option<StoreUrl>> {
        let from = &cx.house.from;
        let to = match (&self.to, &self.destination_region, from) {
            (Some(to), _, _) => to.clone(),
            (None, None, _) => return Ok(None),
            (None, Some(region), _) => in_region(from, region)?,
        };
        elsewhere(cx, to)
    }
}

/// The store of `-s`, in another region.
///
/// # Errors
///
/// If it has none.
pub(super) fn in_region(from: &StoreUrl, region: &str) -> Result<StoreUrl> {
    let StoreUrl::Ebs(url) = from else {
        let why = format!("{from} has no regions: --to names the store to copy to");
        return Err(Error::Refused(why));
    };
    Ok(StoreUrl::Ebs(EbsUrl { region: Some(region.to_owned()), ..url.clone() }))
}

/// A store, if it is another one than that of `-s`.
///
/// # Errors
///
/// If nothing can be made there.
pub(super) fn elsewhere(cx: &Context, to: StoreUrl) -> Result<Option<StoreUrl>> {
    if let StoreUrl::Directory(path) = &to
        && cx.house.absolute
        && !path.is_absolute()
    {
        return Err(Error::Refused(format!("{}: give an absolute path", path.display())));
    }
    if to.absolute()? == cx.house.from.absolute()? {
        return Ok(None);
    }
    if let StoreUrl::Directory(path) = &to {
        cx.check_place(path)?;
    }
    if !to.is_writable() {
        return Err(Error::Refused(format!("{to} cannot be written to")));
    }
    Ok(Some(to))
}

/// Opens that store, with all its snapshots.
///
/// # Errors
///
/// Those of the store.
pub(super) async fn open(cx: &Context, elsewhere: Option<&StoreUrl>) -> Result<SharedStore> {
    match elsewhere {
        None => cx.open().await,
        Some(url) => Ok(cx.house.stores.open(url, &options(cx)).await?),
    }
}

/// How a store is opened that is not the one of `-s`.
pub(super) fn options(cx: &Context) -> StoreOptions {
    StoreOptions { owners: Vec::new(), filters: Vec::new(), ..cx.house.options.clone() }
}

/// What is stored of what reads as zeros.
#[derive(Args, Clone, Debug)]
pub(super) struct ZerosArgs {
    /// Store blocks of zeros too, where the source has no hole
    #[arg(short, long, visible_alias = "full_copy", env = "FULL_COPY")]
    #[arg(value_parser = clap::builder::FalseyValueParser::new())]
    pub(super) full_copy: bool,
    /// What becomes of the holes of an encrypted snapshot
    #[arg(long, value_name = "HOW", default_value = "write")]
    encrypted_holes: EncryptedHoles,
}

impl ZerosArgs {
    pub(super) fn zeros(&self) -> Zeros {
        Zeros {
            full_copy: self.full_copy,
            encrypted_holes: self.encrypted_holes == EncryptedHoles::Write,
        }
    }
}

/// What a snapshot is called.
#[derive(Args, Clone, Debug)]
pub(super) struct LabelArgs {
    /// The tag Name
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<String>,
    /// A tag; can be given several times
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = crate::arguments::values::tag)]
    tags: Vec<(String, String)>,
    /// The description
    #[arg(long, value_name = "TEXT")]
    pub(super) description: Option<String>,
}

impl LabelArgs {
    /// The tags that are asked for.
    pub(super) fn tags(&self) -> Tags {
        let mut tags: Tags = self.tags.iter().cloned().collect();
        if let Some(name) = &self.name {
            tags.insert(NAME_TAG.to_owned(), name.clone());
        }
        tags
    }
}

/// A key to encrypt with, and the region that it is of, if that was said. Keys are of one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KmsKey {
    region: Option<String>,
    key: String,
}

impl FromStr for KmsKey {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (region, key) = match text.split_once('=') {
            Some((name, key)) => (Some(region(name)?), key),
            None => (None, text),
        };
        match key.is_empty() {
            true => Err("give a key, or a region and its key as eu-west-1=arn:…".to_owned()),
            false => Ok(Self { region, key: key.to_owned() }),
        }
    }
}

/// The key for a store: that of its region, else the one of no region.
///
/// # Errors
///
/// If there are keys for other regions alone.
pub(super) fn key_for(keys: &[KmsKey], to: &StoreUrl) -> Result<Option<String>> {
    let region = match to {
        StoreUrl::Ebs(url) => url.region.as_deref(),
        _ => None,
    };
    let of = |region| keys.iter().find(|key| key.region.as_deref() == region);
    match of(region).or_else(|| of(None)) {
        Some(key) => Ok(Some(key.key.clone())),
        None if keys.is_empty() => Ok(None),
        None => Err(Error::Refused(format!("none of the keys is for {to}"))),
    }
}

/// Waits until the store says that a snapshot is completed.
///
/// # Errors
///
/// If it fails there.
pub(super) async fn completed(
    cx: &Context,
    store: &SharedStore,
    mut snapshot: Snapshot,
) -> Result<Snapshot> {
    let id = snapshot.id.clone();
    let waiting = async {
        let mut pause = FIRST_PAUSE;
        while snapshot.state == SnapshotState::Pending {
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(LAST_PAUSE);
            snapshot = store.describe(&id).await?;
        }
        if snapshot.state == SnapshotState::Error {
            let why = snapshot.state_message.unwrap_or_default();
            let message = format!("{id} failed in the store: {why}");
            return Err(Error::from(store::Error::new(ErrorKind::Conflict, message)));
        }
        Ok(snapshot)
    };
    let waited = cx.run.unless_stopped(waiting).await.unwrap_or_else(|stopped| {
        // To do it again would make another one.
        cx.note(format_args!("{id} has everything: the store completes it by itself"));
        Err(stopped.into())
    });
    waited.map_err(|error| error.doing(format!("wait until {id} is completed")))
}

/// Says that EBS is still at work.
pub(super) fn tell_pending(cx: &Context, snapshot: &Snapshot) {
    if snapshot.state == SnapshotState::Pending {
        cx.note(format_args!("{} is pending until EBS has processed it", snapshot.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_of_one_region() {
        let keys: Vec<KmsKey> =
            ["eu-west-1=arn:a", "us-west-2=b"].map(|key| key.parse().unwrap()).to_vec();
        let to = |text: &str| text.parse::<StoreUrl>().unwrap();
        assert_eq!(key_for(&keys, &to("ebs://us-west-2")).unwrap().as_deref(), Some("b"));
        assert!(key_for(&keys, &to("ebs://us-east-1")).is_err());
        assert!(key_for(&keys, &to("ebs:")).is_err());
        assert_eq!(key_for(&[], &to("ebs:")).unwrap(), None);
        let any = ["c".parse().unwrap()];
        assert_eq!(key_for(&any, &to("ebs://us-east-1")).unwrap().as_deref(), Some("c"));
        for bad in ["", "eu-west-1=", "EU=c"] {
            assert!(bad.parse::<KmsKey>().is_err(), "{bad}");
        }
    }
}
