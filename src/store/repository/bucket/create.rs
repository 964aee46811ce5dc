//! Objects that are created.

use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_s3::Client;
use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, ServerSideEncryption};
use bytes::Bytes;
use uuid::Uuid;

use super::{Bucket, NONCE, kinds, names};
use crate::store::aws::failure::{Class, Failure};
use crate::store::aws::service::RetryPolicy;
use crate::store::repository::objects::Objects as _;
use crate::store::{Error, ErrorKind, Result};

impl Bucket {
    pub(super) fn put(&self, client: &Client, name: &str, data: &Bytes) -> PutObjectFluentBuilder {
        let put = client.put_object().bucket(&self.url.bucket).key(self.url.key(name));
        let put = put.body(ByteStream::from(data.clone()));
        let put = match self.needs_checksum.load(Ordering::Relaxed) {
            true => put.checksum_algorithm(ChecksumAlgorithm::Crc32),
            false => put,
        };
        let put = match &self.url.kms_key {
            Some(key) => {
                put.server_side_encryption(ServerSideEncryption::AwsKms).ssekms_key_id(key)
            }
            None => put,
        };
        match &self.url.class {
            Some(class) if name.starts_with(names::PACKS) => {
                put.storage_class(class.as_str().into())
            }
            _ => put,
        }
    }

    /// Creates an object where the service keeps to the condition.
    pub(super) async fn create_exclusively(&self, name: &str, data: &Bytes) -> Result<bool> {
        let doing = format!("write {name}");
        let nonce = Uuid::new_v4().simple().to_string();
        // A request was sent of which nobody knows what it did.
        let unsure = AtomicBool::new(false);
        let policy = RetryPolicy::for_bytes(data.len());
        let created = self.call_with(&kinds::PUT, &doing, policy, |client| {
            let put = self.put(&client, name, data).if_none_match("*").metadata(NONCE, &nonce);
            let unsure = &unsure;
            async move {
                // Whoever waits for the answer may give up.
                let was_unsure = unsure.swap(true, Ordering::Relaxed);
                let Err(error) = put.send().await else { return Ok(Some(true)) };
                let status = error.raw_response().map(|raw| raw.status().as_u16());
                if status.is_some_and(|status| status < 500 && status != 408) {
                    unsure.store(was_unsure, Ordering::Relaxed);
                }
                match status {
                    Some(412) => Ok((!was_unsure).then_some(false)),
                    // Somebody deletes what had the name.
                    Some(409) => Err(Failure::new(Class::Transient, "the name is in use")),
                    _ => Err(self.failed(&client, &error)),
                }
            }
        });
        match created.await {
            Ok(Some(created)) => Ok(created),
            Ok(None) => match self.nonce(name).await? {
                Some(found) => Ok(found == nonce),
                None => {
                    let message =
                        format!("cannot {doing}: an answer was lost, and so was the object");
                    Err(Error::new(ErrorKind::Unavailable, message))
                }
            },
            Err(error) if unsure.into_inner() && error.kind() != ErrorKind::Timeout => {
                Err(error.of_kind(ErrorKind::Unavailable))
            }
            Err(error) => Err(error),
        }
    }

    /// Creates an object where one alone writes.
    pub(super) async fn create_alone(&self, name: &str, data: &Bytes) -> Result<bool> {
        if self.exists(name).await? {
            return Ok(false);
        }
        let doing = format!("write {name}");
        let policy = RetryPolicy::for_bytes(data.len());
        let put = self.call_with(&kinds::PUT, &doing, policy, |client| {
            let put = self.put(&client, name, data);
            async move { put.send().await.map_err(|error| self.failed(&client, &error)) }
        });
        put.await?;
        Ok(true)
    }
}
