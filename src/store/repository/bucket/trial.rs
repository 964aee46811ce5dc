//! What a bucket answers to somebody who looks whether it can be used, and changes nothing in it.

use std::sync::Arc;

use jiff::Timestamp;

use super::exclusive::Attempt;
use super::{Bucket, BucketUrl};
use crate::store::aws::service::RetryPolicy;
use crate::store::repository::objects::Objects;
use crate::store::repository::{Repository, names};
use crate::store::{Result, StoreOptions};

/// A bucket that is looked at. Whatever is asked is given up soon.
#[derive(Debug)]
pub(crate) struct Trial(Arc<Bucket>);

impl Trial {
    /// # Errors
    ///
    /// As [`Bucket::new`].
    pub(crate) async fn open(url: &BucketUrl) -> Result<Self> {
        let bucket = Bucket::new(url, &StoreOptions::default()).await?;
        Ok(Self(Arc::new(Bucket { policy: RetryPolicy::brief(), ..bucket })))
    }

    /// The time by the clock of the service, which it tells also whom it refuses.
    pub(crate) async fn time(&self) -> Result<Timestamp> {
        self.0.time().await
    }

    /// Lists what is there, as far as one request does.
    pub(crate) async fn list(&self) -> Result<()> {
        self.0.is_free().await.map(drop)
    }

    /// Opens the repository.
    pub(crate) async fn repository(&self) -> Result<Repository> {
        Repository::over(Arc::clone(&self.0) as Arc<dyn Objects>).await
    }

    /// Asks for the `fspfs.json` of a repository to be made, which is there. Whether the service keeps to the condition
    /// that it is not; one that does not makes it of the same bytes.
    pub(crate) async fn write(&self) -> Result<bool> {
        let info = self.0.read(names::INFO).await?;
        Ok(self.0.attempt(names::INFO, &info).await? == Attempt::Taken)
    }
}
