//! The bucket that an archive is in.

use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::context::{Context, House};
use super::{Error, Result};
use crate::store::repository::{BucketUrl, Repository};
use crate::store::{ErrorKind, Packing, SharedStore, StoreOptions, StoreUrl};

/// A bucket, by the original's options or as a URL.
#[derive(Args, Clone, Debug)]
pub(super) struct BucketArgs {
    /// The bucket, and what the names of the archive's objects begin with: `bucket/prefix`, or `s3://bucket/prefix`
    #[arg(value_name = "BUCKET[/PREFIX]", value_parser = place)]
    bucket: BucketUrl,
    /// A service that speaks the protocol of S3
    #[arg(short, long, visible_alias = "endpoint_url", value_name = "URL")]
    endpoint_url: Option<String>,
    /// The profile of the AWS configuration for the bucket
    #[arg(short, long, value_name = "PROFILE")]
    profile: Option<String>,
}

/// # Errors
///
/// If the text names no bucket.
fn place(text: &str) -> std::result::Result<BucketUrl, String> {
    let url = if text.starts_with("s3://") { text.to_owned() } else { format!("s3://{text}") };
    url.parse().map_err(|error| format!("{error}"))
}

impl BucketArgs {
    /// The store that it is, in a region that may be named elsewhere.
    ///
    /// # Errors
    ///
    /// If an option and the URL name two of one.
    pub(super) fn url(&self, region: Option<&String>) -> Result<StoreUrl> {
        let mut url = self.bucket.clone();
        let options = [
            (&mut url.endpoint, self.endpoint_url.as_ref(), "--endpoint-url"),
            (&mut url.profile, self.profile.as_ref(), "--profile"),
            (&mut url.region, region, "--destination-region"),
        ];
        for (place, option, name) in options {
            let Some(value) = option else { continue };
            if place.replace(value.clone()).is_some_and(|known| known != *value) {
                return Err(Error::Refused(format!("{} and {name} name two", self.bucket)));
            }
        }
        // What the options say is read like any other URL.
        let url: BucketUrl = url.to_string().parse().map_err(|error| refused(&error))?;
        Ok(StoreUrl::Bucket(Box::new(url)))
    }
}

fn refused(error: &impl ToString) -> Error {
    Error::Refused(error.to_string())
}

/// The repository there, which is made if there is none; in a dry run `None`, if it could be made.
///
/// # Errors
///
/// Those of the service; if something else is there.
pub(super) async fn ensure(cx: &Context, url: &StoreUrl) -> Result<Option<Arc<Repository>>> {
    let House { stores, options, .. } = &*cx.house;
    let bucket = match (stores.repository(url, options).await, url) {
        (Err(error), StoreUrl::Bucket(bucket)) if error.kind() == ErrorKind::NotFound => bucket,
        (opened, _) => return Ok(Some(opened?)),
    };
    if cx.dry_run {
        Repository::check_free(bucket, options).await?;
        return Ok(None);
    }
    match stores.make_in_bucket(bucket, options).await {
        Ok(made) => {
            cx.note(format_args!("{url} is a new repository, {}", made.id()));
            Ok(Some(made))
        }
        // Somebody else may have made it meanwhile.
        Err(error) if error.kind() == ErrorKind::Conflict => {
            let made = stores.repository(url, options).await;
            made.map(Some).map_err(|_| error.into())
        }
        Err(error) => Err(error.into()),
    }
}

/// What was asked of a bucket.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Cost {
    pub(super) requests: u64,
    /// By the price list of us-east-1.
    dollars: f64,
}

impl Cost {
    /// That of a store so far.
    pub(super) fn of(store: &SharedStore) -> Self {
        let usage = store.usage().unwrap_or_default();
        Self { requests: usage.sent(), dollars: usage.dollars() }
    }
}

/// The same run, where the store of `-s` is another.
pub(super) fn over(cx: &Context, from: &StoreUrl) -> Context {
    let house = House { from: from.clone(), opened: None, ..(*cx.house).clone() };
    Context { house: Arc::new(house), ..cx.clone() }
}

/// The same run over archives, which are opened once.
///
/// # Errors
///
/// Those of the store.
pub(super) async fn over_archives(
    cx: &Context,
    url: &StoreUrl,
    salvage: bool,
) -> Result<(Context, SharedStore)> {
    let options = StoreOptions { salvage, ..cx.house.options.clone() };
    let opening = cx.house.stores.open(url, &options);
    let store = cx.run.unless_stopped(opening).await??;
    let (from, opened) = (url.clone(), Some(Arc::clone(&store)));
    let house = House { from, options, opened, ..(*cx.house).clone() };
    Ok((Context { house: Arc::new(house), ..cx.clone() }, store))
}

/// The same run, where repositories store what is put like this.
pub(super) fn packed(cx: &Context, packing: Packing) -> Context {
    let options = StoreOptions { packing, ..cx.house.options.clone() };
    Context { house: Arc::new(House { options, ..(*cx.house).clone() }), ..cx.clone() }
}
