//! Objects in a bucket of S3, or of another service that speaks its protocol.
//!
//! Whoever creates an object sends `If-None-Match: *`: of several one alone succeeds. What a lost answer means is told
//! by a nonce in the metadata of the object (<https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html>).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use tokio::sync::OnceCell;

use self::account::BucketAccount;
use self::gather::{Gatherer, NEIGHBOURS, Part};
pub(crate) use self::trial::Trial;
pub use self::url::{BucketUrl, InvalidBucketUrl};
use super::names;
use super::objects::{Decode, MAX_NAMES, Objects, most_bytes, too_many};
use super::read::damaged;
use crate::blocking::blocking;
use crate::model::Block;
use crate::store::aws::answer::Bounded;
use crate::store::aws::failure::{Class, Failure};
use crate::store::aws::service::{Request, RetryPolicy, Service};
use crate::store::listing::MAX_IDLE_PAGES;
use crate::store::request::Kind;
use crate::store::{Error, ErrorKind, Priority, Result, StoreOptions, Usage};

mod account;
mod clock;
mod create;
mod delete;
mod exclusive;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
mod gather;
mod kinds;
mod trial;
mod url;

/// Names that one request deletes (the limit of S3).
const MAX_DELETED: usize = 1000;

/// Bytes of a key at most (the limit of S3).
const MAX_KEY: usize = 1024;

/// Bytes of a page of a list at most: a thousand keys with the longest escapes, and what is said of them, have 7 MB.
const MAX_LIST: usize = 16 << 20;

/// Bytes of an `ETag` that is remembered, at most: those of S3 have 34, with a count of parts a few more.
const MAX_ETAG: usize = 128;

/// Bytes of an answer to a part of an object at most: a service without ranges gives a whole pack, which has 33 MiB at
/// most.
const MAX_PART: u64 = 40 << 20;

/// What is described and then listed, or listed page by page, is looked for once in this time. A snapshot that
/// another host deletes may be read so much longer.
const MANIFESTS_LAST: Duration = Duration::from_secs(10);

/// The objects of a bucket that is no repository, for whoever reads what others have put there.
#[derive(Debug)]
pub(crate) struct Foreign(Bucket);

impl Foreign {
    /// # Errors
    ///
    /// As [`Bucket::new`].
    pub(crate) async fn open(url: &BucketUrl, options: &StoreOptions) -> Result<Self> {
        Ok(Self(Bucket::new(url, options).await?))
    }

    /// The names of all that begin like this, below the prefix of the URL.
    pub(crate) async fn list(&self, begins: &str) -> Result<Vec<String>> {
        self.0.list(begins).await
    }

    /// When an object was made.
    pub(crate) async fn modified(&self, name: &str) -> Result<Timestamp> {
        self.0.modified(name).await
    }

    /// All of an object, which has so many bytes at most.
    pub(crate) async fn read(&self, name: &str, most: u64) -> Result<Bytes> {
        self.0.read_whole(name, most).await
    }

    pub(crate) fn usage(&self) -> Usage {
        self.0.service.usage()
    }
}

/// Where it is tried what a service does.
const PROBES: &str = "tmp/probe-";

/// Metadata of an object that tells who has created it.
const NONCE: &str = "nonce";

/// The objects below a prefix of a bucket.
#[derive(Debug)]
pub(super) struct Bucket {
    url: BucketUrl,
    service: Service<BucketAccount>,
    /// Nobody else writes: so says the user.
    single_writer: bool,
    /// Where what was learnt of the service is kept.
    state: Option<PathBuf>,
    /// Whether the service creates a name for one alone.
    exclusive: OnceCell<bool>,
    /// Parts of packs that are about to be read.
    gatherer: Gatherer,
    /// It was told that the bucket keeps versions.
    told_of_versions: AtomicBool,
    /// What is put needs a checksum, since the bucket locks objects.
    needs_checksum: AtomicBool,
    /// How long most requests are tried.
    policy: RetryPolicy,
}

impl Bucket {
    /// The objects that the URL names. No request is made yet.
    ///
    /// # Errors
    ///
    /// `Invalid` if the environment names a proxy or certificates that cannot be used.
    pub(super) async fn new(url: &BucketUrl, options: &StoreOptions) -> Result<Self> {
        Ok(Self::of(BucketAccount::of(url).await?, url, options))
    }

    /// The same with a configuration of the AWS SDK, for programs that have one themselves.
    pub(super) fn with_config(shared: &SdkConfig, url: &BucketUrl, options: &StoreOptions) -> Self {
        Self::of(BucketAccount::with_config(shared, url), url, options)
    }

    fn of(account: BucketAccount, url: &BucketUrl, options: &StoreOptions) -> Self {
        Self {
            url: url.clone(),
            service: Service::new(Arc::new(account), &kinds::ALL, options),
            single_writer: options.single_writer,
            state: options.state.clone(),
            exclusive: OnceCell::new(),
            gatherer: Gatherer::default(),
            told_of_versions: AtomicBool::new(false),
            needs_checksum: AtomicBool::new(false),
            policy: RetryPolicy::standard(),
        }
    }

    /// Whether nothing is below the prefix but what was made to try the service.
    pub(super) async fn is_free(&self) -> Result<bool> {
        let (prefix, probes) = (self.url.key(""), self.url.key(PROBES));
        let doing = format!("list {}", self.url);
        let listing = self.call(&kinds::LIST, &doing, |client| {
            let list = client.list_objects_v2().bucket(&self.url.bucket).prefix(&prefix);
            let list = list.customize().interceptor(Bounded(MAX_LIST));
            async move { list.send().await.map_err(|error| self.failed(&client, &error)) }
        });
        let listed = listing.await?;
        let mut keys = listed.contents().iter().filter_map(|object| object.key());
        Ok(keys.all(|key| key.starts_with(&probes)))
    }

    async fn call<T, F>(
        &self,
        kind: &'static Kind,
        doing: &str,
        attempt: impl FnMut(Arc<Client>) -> F,
    ) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, Failure>>,
    {
        self.call_with(kind, doing, self.policy, attempt).await
    }

    async fn call_with<T, F>(
        &self,
        kind: &'static Kind,
        doing: &str,
        policy: RetryPolicy,
        attempt: impl FnMut(Arc<Client>) -> F,
    ) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, Failure>>,
    {
        let request = Request { kind, snapshot: None, doing, policy };
        Box::pin(self.service.call(request, attempt)).await
    }

    /// What an answer means. One that names another region is followed, once; one that wants a checksum gets it.
    fn failed<E>(&self, client: &Client, error: &SdkError<E, HttpResponse>) -> Failure
    where
        E: std::error::Error + ProvideErrorMetadata + 'static,
    {
        let region = error.raw_response().and_then(|raw| raw.headers().get("x-amz-bucket-region"));
        let asked = client.config().region().map(AsRef::as_ref);
        if let Some(region) = region.filter(|region| Some(*region) != asked)
            && self.service.account.is_in(region)
        {
            // The client is made anew then.
            return Failure::new(Class::Credentials, format!("the bucket is in {region}"));
        }
        let failure = Failure::of_sdk(error, None);
        if failure.mentions("content-md5") {
            self.needs_checksum.store(true, Ordering::Relaxed);
            // Sent a few times more, not for a minute.
            return Failure::new(Class::Foreign, failure.to_string());
        }
        failure
    }

    /// What is known of an object without its content.
    async fn head(&self, name: &str) -> Result<HeadObjectOutput> {
        let doing = format!("look for {name}");
        let found = self.call(&kinds::HEAD, &doing, |client| {
            let head = client.head_object().bucket(&self.url.bucket).key(self.url.key(name));
            async move { head.send().await.map_err(|error| self.failed(&client, &error)) }
        });
        found.await
    }

    /// The nonce of the object of this name; `None` if there is no such object.
    async fn nonce(&self, name: &str) -> Result<Option<String>> {
        match self.head(name).await {
            Ok(found) => {
                let nonce = found.metadata().and_then(|metadata| metadata.get(NONCE)).cloned();
                Ok(Some(nonce.unwrap_or_default()))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What a range of an object holds, and where that is; `None` if the object ends before.
    async fn range(
        &self,
        name: &str,
        range: &str,
        policy: RetryPolicy,
    ) -> Result<Option<(Bytes, ContentRange)>> {
        let doing = format!("read {name}");
        let read = self.call_with(&kinds::GET, &doing, policy, |client| {
            let get = client.get_object().bucket(&self.url.bucket).key(self.url.key(name));
            let get = get.range(range);
            async move {
                let answer = match get.send().await {
                    Ok(answer) => answer,
                    Err(error)
                        if error.raw_response().is_some_and(|r| r.status().as_u16() == 416) =>
                    {
                        return Ok(None);
                    }
                    Err(error) => return Err(self.failed(&client, &error)),
                };
                let Some(bytes) = whole(answer.body, MAX_PART).await? else {
                    return Err(Failure::new(Class::Foreign, "it answers with more than a pack"));
                };
                // A service without ranges gives all of it.
                let range = match answer.content_range.as_deref() {
                    Some(range) => range.parse().map_err(|()| {
                        Failure::new(Class::Foreign, format!("it answers with the range {range:?}"))
                    })?,
                    None => ContentRange { first: 0, total: bytes.len() as u64 },
                };
                Ok(Some((bytes, range)))
            }
        });
        read.await
    }

    /// A part of an object.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no such object, `Corrupt` if it ends before.
    async fn part(&self, name: &str, part: Part) -> Result<Bytes> {
        let truncated = || Error::new(ErrorKind::Corrupt, format!("{name} is truncated"));
        let Part { offset, len } = part;
        let range = format!("bytes={offset}-{}", part.end() - 1);
        let policy = RetryPolicy::for_bytes(len);
        let (bytes, found) = self.range(name, &range, policy).await?.ok_or_else(truncated)?;
        let skipped = offset.checked_sub(found.first).and_then(|n| usize::try_from(n).ok());
        let wanted = skipped.and_then(|skipped| skipped.checked_add(len).map(|end| skipped..end));
        let wanted = wanted.filter(|wanted| wanted.end <= bytes.len());
        Ok(bytes.slice(wanted.ok_or_else(truncated)?))
    }

    async fn len(&self, name: &str) -> Result<u64> {
        let len = self.head(name).await?.content_length();
        Ok(len.and_then(|len| u64::try_from(len).ok()).unwrap_or(0))
    }

    /// All of an object, which has so many bytes at most.
    async fn read_whole(&self, name: &str, most: u64) -> Result<Bytes> {
        let doing = format!("read {name}");
        let read = self.call(&kinds::GET, &doing, |client| {
            let get = client.get_object().bucket(&self.url.bucket).key(self.url.key(name));
            async move {
                let answer = get.send().await.map_err(|error| self.failed(&client, &error))?;
                whole(answer.body, most).await
            }
        });
        let why = format!("it has more than {most} bytes, more than any such object");
        read.await?.ok_or_else(|| damaged(name, &why))
    }
}

/// What an answer holds of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ContentRange {
    first: u64,
    /// Bytes of the whole object.
    total: u64,
}

impl std::str::FromStr for ContentRange {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let (range, total) =
            text.strip_prefix("bytes ").and_then(|t| t.split_once('/')).ok_or(())?;
        let (first, _) = range.split_once('-').ok_or(())?;
        Ok(Self { first: first.parse().map_err(drop)?, total: total.parse().map_err(drop)? })
    }
}

/// All of a body, which is as long as its head says; `None` if it has more bytes than `most`.
async fn whole(mut body: ByteStream, most: u64) -> std::result::Result<Option<Bytes>, Failure> {
    let mut bytes = BytesMut::new();
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| {
            let why = crate::store::causes(&error);
            Failure::new(Class::Transient, format!("the answer was cut: {why}"))
        })?;
        if (bytes.len() + piece.len()) as u64 > most {
            return Ok(None);
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(Some(bytes.freeze()))
}

fn timestamp(time: &DateTime) -> Result<Timestamp> {
    Timestamp::from_second(time.secs()).map_err(|error| {
        Error::with_source(ErrorKind::Unavailable, "the clock of the service is off", error)
    })
}

#[async_trait]
impl Objects for Bucket {
    fn name(&self) -> String {
        self.url.to_string()
    }

    async fn no_repository(&self) -> Error {
        let url = self.url.to_string();
        let word = shlex::try_quote(&url).unwrap_or_default();
        let message = format!(
            "the store {url} is not a repository: it has no fspfs.json; `fspfs init {word}` makes an empty one"
        );
        Error::new(ErrorKind::NotFound, message)
    }

    fn parallelism(&self) -> usize {
        self.service.max_in_flight()
    }

    fn usage(&self) -> Option<Usage> {
        Some(self.service.usage())
    }

    fn neighbours(&self) -> usize {
        NEIGHBOURS
    }

    fn manifests_last(&self) -> Duration {
        MANIFESTS_LAST
    }

    async fn create(&self, name: &str, data: Bytes) -> Result<bool> {
        if self.single_writer {
            return self.create_alone(name, &data).await;
        }
        if self.is_exclusive().await? {
            return self.create_exclusively(name, &data).await;
        }
        let message = format!(
            "cannot write {name}: the service does not keep to If-None-Match, so that two writers could take each \
             other's names; --single-writer writes all the same, if nobody else does"
        );
        Err(Error::new(ErrorKind::Unsupported, message))
    }

    async fn read(&self, name: &str) -> Result<Bytes> {
        self.read_whole(name, most_bytes(name)).await
    }

    async fn read_range(
        &self,
        name: &str,
        offset: u64,
        len: usize,
        decode: Decode,
    ) -> Result<Block> {
        let part = Part { offset, len };
        let bytes = match Priority::of_task().is_urgent() {
            true => self.part(name, part).await?,
            false => self.gathered(name, part).await?,
        };
        blocking(move || decode(&bytes)).await
    }

    async fn read_tail(&self, name: &str, len: usize) -> Result<Bytes> {
        let is_tail = |bytes: &Bytes, found: ContentRange| {
            let wanted = found.total.min(len as u64);
            bytes.len() as u64 == wanted && found.first + wanted == found.total
        };
        // Services differ in what they make of a range that is longer than the object.
        let policy = RetryPolicy::for_bytes(len);
        if let Some((bytes, found)) = self.range(name, &format!("bytes=-{len}"), policy).await?
            && is_tail(&bytes, found)
        {
            return Ok(bytes);
        }
        let total = self.len(name).await?;
        if total == 0 {
            return Ok(Bytes::new());
        }
        let first = total.saturating_sub(len as u64);
        match self.range(name, &format!("bytes={first}-{}", total - 1), policy).await? {
            Some((bytes, found)) if is_tail(&bytes, found) => Ok(bytes),
            _ => {
                let message = format!("cannot read the end of {name}: another part came");
                Err(Error::new(ErrorKind::Unavailable, message))
            }
        }
    }

    async fn exists(&self, name: &str) -> Result<bool> {
        Ok(self.nonce(name).await?.is_some())
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        Ok(self.list_versions(prefix).await?.into_iter().map(|(name, _)| name).collect())
    }

    async fn list_versions(&self, prefix: &str) -> Result<Vec<(String, Option<String>)>> {
        let root = self.url.key("");
        let (all, doing) = (self.url.key(prefix), format!("list {prefix}"));
        let (mut names, mut next, mut idle) = (Vec::new(), None::<String>, 0);
        loop {
            let page = self.call(&kinds::LIST, &doing, |client| {
                let list = client.list_objects_v2().bucket(&self.url.bucket).prefix(&all);
                let list = list.set_continuation_token(next.clone());
                let list = list.customize().interceptor(Bounded(MAX_LIST));
                async move { list.send().await.map_err(|error| self.failed(&client, &error)) }
            });
            let page = page.await?;
            idle = if page.contents().is_empty() { idle + 1 } else { 0 };
            names.extend(page.contents().iter().filter_map(|object| {
                // A longer one is none of ours.
                let key = object.key().filter(|key| key.len() <= MAX_KEY)?;
                let version = object.e_tag().filter(|tag| (1..=MAX_ETAG).contains(&tag.len()));
                Some((key.strip_prefix(&root)?.to_owned(), version.map(str::to_owned)))
            }));
            if names.len() > MAX_NAMES {
                return Err(too_many(prefix));
            }
            let token = page.next_continuation_token().map(str::to_owned);
            match token.filter(|_| page.is_truncated() == Some(true)) {
                None => return Ok(names),
                same if same == next || idle > MAX_IDLE_PAGES => {
                    let message = format!("cannot {doing}: the list has no end");
                    return Err(Error::new(ErrorKind::Unavailable, message));
                }
                token => next = token,
            }
        }
    }

    async fn modified(&self, name: &str) -> Result<Timestamp> {
        let found = self.head(name).await?;
        let time = found.last_modified().ok_or_else(|| {
            let message = format!("the service does not say how old {name} is");
            Error::new(ErrorKind::Unavailable, message)
        })?;
        timestamp(time)
    }

    async fn delete(&self, names: &[String]) -> Result<()> {
        match names {
            [] => Ok(()),
            [name] => self.delete_one(name).await,
            names => {
                for names in names.chunks(MAX_DELETED) {
                    self.delete_many(names).await?;
                }
                Ok(())
            }
        }
    }

    /// An object is there whole, or not at all.
    async fn sweep(&self, _: Timestamp) -> Result<u64> {
        Ok(0)
    }

    async fn now(&self) -> Result<Timestamp> {
        self.time().await
    }

    async fn now_by_reading(&self) -> Result<Timestamp> {
        self.time().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_is_read_no_further_than_its_object_can_have() {
        let body = || ByteStream::from_static(b"abcd");
        assert_eq!(whole(body(), 4).await.unwrap().as_deref(), Some(&b"abcd"[..]));
        assert_eq!(whole(body(), 3).await.unwrap(), None);
    }

    #[test]
    fn a_range_says_where_it_is() {
        assert_eq!("bytes 5-9/10".parse(), Ok(ContentRange { first: 5, total: 10 }));
        for bad in ["", "bytes */10", "bytes 5-9/*", "5-9/10"] {
            assert_eq!(bad.parse::<ContentRange>(), Err(()), "{bad}");
        }
    }
}
