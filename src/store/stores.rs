//! Stores by their URLs. Each is opened once in a process, and let go when nobody uses it any more.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use super::aws::config::check;
use super::ebs::{Accounts, Ebs};
use super::in_use::InUse;
use super::repository::{BucketUrl, Repository};
use super::synth::Synth;
use super::url::NoRepository;
use super::wrap::Filtered;
use super::{Error, ErrorKind, Packing, Result, SharedStore, StoreOptions, StoreUrl, fsp};

/// What a directory is, whatever paths lead to it (its device and inode), and what
/// [`StoreOptions`] say of packs.
type DirectoryKey = (u64, u64, Option<usize>, Packing);

/// The stores that a process has open.
///
/// Stores of EBS that lead to one account (else profile), region and endpoint share their clients, and one limiter:
/// all that they send spends one quota. The smallest limit that one of them was opened with counts for all, as long
/// as that one is in use.
#[derive(Debug, Default)]
pub struct Stores {
    accounts: Accounts,
    repositories: InUse<DirectoryKey, Repository>,
    buckets: InUse<(BucketUrl, Option<usize>, Packing, bool), Repository>,
}

impl Stores {
    /// Opens the store that `url` names, or gives what is open of it. What it lists, its limits, and what it counts
    /// as its [`usage`](super::SnapshotStore::usage) of a service belong to this one use of it.
    ///
    /// # Errors
    ///
    /// If it is not there, or is no store that this version can use. That is not remembered.
    pub async fn open(&self, url: &StoreUrl, options: &StoreOptions) -> Result<SharedStore> {
        let store: SharedStore = match url {
            StoreUrl::Ebs(url) => {
                check(url.profile.as_deref()).await?;
                return Ok(Arc::new(Ebs::of(self.accounts.of(url).await?, options)));
            }
            StoreUrl::Directory(_) => self.repository(url, options).await?,
            StoreUrl::Bucket(bucket) => match self.repository(url, options).await {
                Ok(repository) => repository,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    match fsp::Archives::open(bucket, options).await? {
                        Some(archives) => Arc::new(archives),
                        None => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            },
            // There is nothing to share.
            StoreUrl::Synth(recipe) => Arc::new(Synth::new(*recipe)),
        };
        if options.filters.is_empty() {
            return Ok(store);
        }
        Ok(Arc::new(Filtered::new(store, options.filters.clone())?))
    }

    /// A repository, for what only a repository can do.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); `Unsupported` if it is none.
    pub async fn repository(
        &self,
        url: &StoreUrl,
        options: &StoreOptions,
    ) -> Result<Arc<Repository>> {
        match url {
            StoreUrl::Directory(path) => self.in_directory(path, options).await,
            StoreUrl::Bucket(url) => {
                self.in_bucket(url, options, Repository::open_in_bucket(url, options)).await
            }
            StoreUrl::Ebs(_) | StoreUrl::Synth(_) => {
                let message = NoRepository(url.clone()).to_string();
                Err(Error::new(ErrorKind::Unsupported, message))
            }
        }
    }

    /// Makes a repository in a bucket, and gives it.
    ///
    /// # Errors
    ///
    /// Those of [`Repository::create_in_bucket`].
    pub(crate) async fn make_in_bucket(
        &self,
        url: &BucketUrl,
        options: &StoreOptions,
    ) -> Result<Arc<Repository>> {
        self.in_bucket(url, options, Repository::create_in_bucket(url, options)).await
    }

    async fn in_bucket(
        &self,
        url: &BucketUrl,
        options: &StoreOptions,
        open: impl Future<Output = Result<Repository>>,
    ) -> Result<Arc<Repository>> {
        let StoreOptions { max_unsaved, packing, single_writer, .. } = *options;
        let key = (url.clone(), max_unsaved, packing, single_writer);
        let open = async { Ok(Arc::new(open.await?.with_options(options))) };
        self.buckets.get(key, open).await
    }

    async fn in_directory(&self, path: &Path, options: &StoreOptions) -> Result<Arc<Repository>> {
        let open = async {
            let repository = Repository::open(path).await?;
            Ok(Arc::new(repository.with_options(options)))
        };
        match path.metadata() {
            Ok(found) => {
                let key = (found.dev(), found.ino(), options.max_unsaved, options.packing);
                self.repositories.get(key, open).await
            }
            // It tells better what is wrong.
            Err(_) => open.await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &Path) -> StoreUrl {
        StoreUrl::Directory(path.to_owned())
    }

    #[tokio::test]
    async fn a_repository_is_opened_once_whatever_path_leads_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("store"), dir.path().join("link"));
        Repository::create(&path).await.unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let (stores, options) = (Stores::default(), StoreOptions::default());
        let (path, link) = (at(&path), at(&link));
        let opened = [&path, &link, &path, &link].map(|url| stores.open(url, &options));
        let all = futures::future::try_join_all(opened).await.unwrap();
        assert!(all.iter().all(|store| Arc::ptr_eq(store, &all[0])));
        // One that lists less is another, over the same one.
        let filters = vec!["tag:Role=web".parse().unwrap()];
        let few = StoreOptions { filters, ..options.clone() };
        let filtered = stores.open(&path, &few).await.unwrap();
        assert!(!Arc::ptr_eq(&filtered, &all[0]));
        assert_eq!(Arc::strong_count(&all[0]), 5);
    }

    #[tokio::test]
    async fn a_repository_that_nobody_uses_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        Repository::create(&path).await.unwrap();
        let (stores, options) = (Stores::default(), StoreOptions::default());
        let first = stores.repository(&at(&path), &options).await.unwrap();
        let weak = Arc::downgrade(&first);
        drop(first);
        assert!(weak.upgrade().is_none());
        stores.open(&at(&path), &options).await.unwrap();
    }

    #[tokio::test]
    async fn a_store_that_was_not_there_may_be_there_later() {
        let dir = tempfile::tempdir().unwrap();
        let (stores, options) = (Stores::default(), StoreOptions::default());
        for path in [dir.path().join("store"), dir.path().to_owned()] {
            let error = stores.open(&at(&path), &options).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound);
            assert!(error.to_string().contains("fspfs init"), "{error}");
        }
        Repository::create(dir.path()).await.unwrap();
        stores.open(&at(dir.path()), &options).await.unwrap();
    }
}
