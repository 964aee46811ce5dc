//! Objects that are deleted.

use std::sync::atomic::Ordering;

use aws_sdk_s3::error::ProvideErrorMetadata as _;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::{Bucket, kinds};
use crate::store::aws::failure::{Class, Failure};
use crate::store::{ErrorKind, Result};

/// Requests that delete one object each and are under way at the same time.
const DELETIONS: usize = 16;

impl Bucket {
    pub(super) async fn delete_one(&self, name: &str) -> Result<()> {
        let doing = format!("delete {name}");
        let deleted = self.call(&kinds::DELETE, &doing, |client| {
            let delete = client.delete_object().bucket(&self.url.bucket).key(self.url.key(name));
            async move { delete.send().await.map_err(|error| self.failed(&client, &error)) }
        });
        match deleted.await {
            Ok(deleted) => {
                let has_versions = deleted.delete_marker() == Some(true);
                if has_versions && !self.told_of_versions.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "the bucket keeps versions: what is deleted takes room until a rule removes it (docs/s3.md)"
                    );
                }
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn delete_many(&self, names: &[String]) -> Result<()> {
        let ids = names.iter().map(|name| {
            ObjectIdentifier::builder().key(self.url.key(name)).build().expect("it has a key")
        });
        let delete = Delete::builder().set_objects(Some(ids.collect())).quiet(true).build();
        let delete = delete.expect("it has objects");
        let doing = format!("delete {} objects", names.len());
        let deleted = self.call(&kinds::DELETE_MANY, &doing, |client| {
            let delete = client.delete_objects().bucket(&self.url.bucket).delete(delete.clone());
            async move {
                let answer = match delete.send().await {
                    Ok(answer) => answer,
                    // Services that want another checksum than the SDK sends, or know no such request.
                    Err(error)
                        if matches!(error.code(), Some("MissingContentMD5" | "NotImplemented")) =>
                    {
                        return Ok(false);
                    }
                    Err(error) => return Err(self.failed(&client, &error)),
                };
                match answer.errors().first() {
                    None => Ok(true),
                    Some(error) => {
                        let (key, code) = (error.key(), error.code());
                        let text = format!("{}: {}", key.unwrap_or("?"), code.unwrap_or("?"));
                        let class = match code {
                            Some("AccessDenied") => Class::Final(ErrorKind::Denied),
                            _ => Class::Transient,
                        };
                        Err(Failure::new(class, text))
                    }
                }
            }
        });
        if !deleted.await? {
            let each: Vec<_> = names.iter().map(|name| self.delete_one(name)).collect();
            stream::iter(each).buffer_unordered(DELETIONS).try_collect::<()>().await?;
        }
        Ok(())
    }
}
