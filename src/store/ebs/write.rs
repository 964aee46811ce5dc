//! Starting, filling and completing a snapshot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use aws_sdk_ebs::operation::RequestId as _;
use aws_sdk_ebs::operation::complete_snapshot::CompleteSnapshotError;
use aws_sdk_ebs::operation::put_snapshot_block::PutSnapshotBlockError;
use aws_sdk_ebs::operation::start_snapshot::{StartSnapshotError, StartSnapshotOutput};
use aws_sdk_ebs::primitives::ByteStream;
use aws_sdk_ebs::types::{ChecksumAggregationMethod, ChecksumAlgorithm, Status, Tag};
use jiff::Timestamp;

use super::catalog::{PARENT_TAG, VOLUME_TAG};
use super::kinds;
use super::read::{check_block_size, unexpected};
use super::{Ebs, Instant, SnapshotState, Started, catalog};
use crate::model::{BLOCK_SIZE, Block, BlockIndex, MAX_TAGS, Snapshot, SnapshotId, VolumeSize};
use crate::store::aws::failure::{Class, Failure};
use crate::store::aws::service::{Request, RetryPolicy};
use crate::store::{CompleteRequest, Error, ErrorKind, Result, StartRequest};

/// The reason beside the code of an error, which each operation has in a type of its own.
macro_rules! reason_of {
    ($operation:ident, $error:expr) => {{
        let reason: Option<String> = match $error.as_service_error() {
            Some($operation::AccessDeniedException(e)) => Some(e.reason.as_str().to_owned()),
            Some($operation::RequestThrottledException(e)) => {
                e.reason.as_ref().map(|reason| reason.as_str().to_owned())
            }
            Some($operation::ResourceNotFoundException(e)) => {
                e.reason.as_ref().map(|reason| reason.as_str().to_owned())
            }
            Some($operation::ServiceQuotaExceededException(e)) => {
                e.reason.as_ref().map(|reason| reason.as_str().to_owned())
            }
            Some($operation::ValidationException(e)) => {
                e.reason.as_ref().map(|reason| reason.as_str().to_owned())
            }
            _ => None,
        };
        reason
    }};
}
pub(super) use reason_of;

/// Minutes that a snapshot may be left alone by its writer: at least an hour, the service's own
/// default, and at most three days, the most that it allows.
const TIMEOUT_MINUTES: std::ops::RangeInclusive<i32> = 60..=4320;

/// How long it is watched whether a completion, the answer to which was lost, was accepted.
const PROCESSING: Duration = Duration::from_mins(2);

/// How long it may take to learn what became of a completion that was never answered.
const LOOK: Duration = Duration::from_secs(5);

/// Blocks that even a slow line moves in a minute (about 0.9 MB/s), so that a writer has the time
/// that its volume may need.
const SLOW_BLOCKS_A_MINUTE: u64 = 100;

/// Minutes after which the service gives up a snapshot of this size that nobody completes. It does
/// not say whether they count from the last put or from the start, so there are enough for both.
fn timeout_minutes(size: VolumeSize) -> i32 {
    let needed = u64::from(size.blocks().0) / SLOW_BLOCKS_A_MINUTE;
    i32::try_from(needed)
        .unwrap_or(i32::MAX)
        .clamp(*TIMEOUT_MINUTES.start(), *TIMEOUT_MINUTES.end())
}

impl Ebs {
    pub(super) async fn start_snapshot(&self, request: StartRequest) -> Result<Snapshot> {
        let unsupported = |what: &str| {
            let message = format!("EBS cannot start a snapshot with {what}");
            Err(Error::new(ErrorKind::Unsupported, message))
        };
        if request.id.is_some() {
            return unsupported("a chosen id");
        }
        if request.parent.is_some() && (request.encrypted || request.kms_key.is_some()) {
            return unsupported(
                "both a parent and encryption of its own: it is encrypted as its parent is",
            );
        }
        let answer = self.send_start(&request).await?;
        let text = answer.snapshot_id.unwrap_or_default();
        let id: SnapshotId = text.parse().map_err(|_| {
            Error::new(ErrorKind::Unavailable, format!("EBS gave the snapshot id {text:?}"))
        })?;
        check_block_size(answer.block_size);
        let time = answer.start_time.and_then(|time| {
            // It comes as a floating-point number, and EC2 has milliseconds.
            let time =
                Timestamp::new(time.secs(), i32::try_from(time.subsec_nanos()).ok()?).ok()?;
            time.round(jiff::Unit::Millisecond).ok()
        });
        // Whatever was asked for: an account may encrypt everything.
        let encrypted = answer.kms_key_arn.is_some()
            || answer.sse_type.is_some_and(|sse| sse.as_str() != "none");
        let snapshot = Snapshot {
            id: id.clone(),
            state: match answer.status {
                Some(Status::Completed) => SnapshotState::Completed,
                Some(Status::Error) => SnapshotState::Error,
                _ => SnapshotState::Pending,
            },
            state_message: None,
            volume_size: request.volume_size,
            parent: request.parent,
            lineage: None,
            volume_id: request.volume_id,
            description: request.description,
            start_time: time.unwrap_or_else(Timestamp::now),
            completion_time: None,
            tags: request.tags,
            encrypted,
            content_digest: None,
            data_blocks: None,
            zero_blocks: None,
        };
        let until = Instant::now() + self.settling;
        self.started()
            .put(id, Started { snapshot: snapshot.clone(), until, visibility: Arc::default() });
        Ok(snapshot)
    }

    async fn send_start(&self, request: &StartRequest) -> Result<StartSnapshotOutput> {
        let gib = i64::try_from(request.volume_size.gib()).expect("at most 65,536");
        let minutes = match request.timeout {
            Some(timeout) => i32::try_from(timeout.as_secs().div_ceil(60)).unwrap_or(i32::MAX),
            None => timeout_minutes(request.volume_size),
        };
        let minutes = minutes.clamp(10, *TIMEOUT_MINUTES.end());
        // A start that is tried again must not make a second snapshot.
        let token = request.client_token.clone();
        let token = &token.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let tag = |(key, value): (&String, &String)| Tag::builder().key(key).value(value).build();
        // What EC2 does not keep of a snapshot, as tags, as far as there is room.
        let room = MAX_TAGS.saturating_sub(request.tags.len());
        let parent = request.parent.as_ref().map(|id| (PARENT_TAG.to_owned(), id.to_string()));
        let volume = request.volume_id.as_ref().map(|id| (VOLUME_TAG.to_owned(), id.clone()));
        let own: Vec<_> = parent.into_iter().chain(volume).take(room).collect();
        let own = own.iter().map(|(key, value)| (key, value));
        let tags: &Vec<_> = &request.tags.iter().chain(own).map(tag).collect();
        let asked = Request {
            kind: &kinds::START_SNAPSHOT,
            snapshot: None,
            doing: "start a snapshot",
            policy: RetryPolicy::standard(),
        };
        let attempts = &AtomicU32::new(0);
        let lost = &AtomicBool::new(false);
        let start = self.service.call(asked, |clients| async move {
            let attempt = attempts.fetch_add(1, Ordering::Relaxed);
            let before = lost.swap(true, Ordering::Relaxed);
            let call = clients.ebs.start_snapshot().volume_size(gib).client_token(token);
            let description = Some(request.description.clone()).filter(|text| !text.is_empty());
            let call = call
                .set_parent_snapshot_id(request.parent.as_ref().map(ToString::to_string))
                .set_tags((!tags.is_empty()).then(|| tags.clone()))
                .set_description(description)
                .set_encrypted(request.encrypted.then_some(true))
                .set_kms_key_arn(request.kms_key.clone())
                .timeout(minutes);
            call.send().await.map_err(|e| {
                let reason = reason_of!(StartSnapshotError, e);
                let mut failure = Failure::of_sdk(&e, reason.as_deref());
                // The attempt before, which was given up, is still at work on it.
                if attempt > 0 && failure.class == Class::Final(ErrorKind::Conflict) {
                    failure.class = Class::Transient;
                }
                if failure.is_verdict() {
                    lost.store(before, Ordering::Relaxed);
                }
                failure
            })
        });
        start.await.map_err(|error| match error.kind() {
            kind if lost.load(Ordering::Relaxed)
                || matches!(kind, ErrorKind::Timeout | ErrorKind::Conflict) =>
            {
                let hint =
                    "it may have been started all the same; then `fspfs list` shows it as pending";
                Error::new(error.kind(), format!("{error}; {hint}"))
            }
            _ => error,
        })
    }

    /// Puts a block. While the service does not know a snapshot that was started just now, one block
    /// tries whether it does, and the others wait.
    pub(super) async fn put(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        block: &Block,
    ) -> Result<()> {
        let started = self.started().get(id).map(|s| (Arc::clone(&s.visibility), s.until));
        let Some((visibility, until)) = started else {
            return self.put_with(RetryPolicy::standard(), id, index, block).await;
        };
        if !visibility.is_missing.load(Ordering::Relaxed) {
            match self.put_with(RetryPolicy::standard(), id, index, block).await {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    visibility.is_missing.store(true, Ordering::Relaxed);
                }
                put => return put,
            }
        }
        let trying = visibility.trying.lock().await;
        let policy = RetryPolicy::until_known(until);
        if !visibility.is_missing.load(Ordering::Relaxed) {
            drop(trying);
            // It is not known everywhere at the same moment.
            return self.put_with(policy, id, index, block).await;
        }
        let put = self.put_with(policy, id, index, block).await;
        // If something else is wrong, those that wait find it out together, not one after the other.
        let still = put.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound);
        visibility.is_missing.store(still, Ordering::Relaxed);
        put
    }

    async fn put_with(
        &self,
        policy: RetryPolicy,
        id: &SnapshotId,
        index: BlockIndex,
        block: &Block,
    ) -> Result<()> {
        let number = i32::try_from(index.0).map_err(|_| {
            Error::new(ErrorKind::Invalid, format!("there is no block {index} in a volume"))
        })?;
        let length = i32::try_from(BLOCK_SIZE).expect("512 KiB");
        let checksum = &block.digest().to_base64();
        let doing = &format!("put block {index} of {id}");
        let asked = Request { kind: &kinds::PUT_SNAPSHOT_BLOCK, snapshot: Some(id), doing, policy };
        let put = self.service.call(asked, |clients| async move {
            let call =
                clients.ebs.put_snapshot_block().snapshot_id(id.as_str()).block_index(number);
            let call = call.data_length(length).block_data(ByteStream::from(block.bytes()));
            let call = call.checksum(checksum);
            let call = call.checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256);
            let answer = call.send().await.map_err(|e| {
                let reason = reason_of!(PutSnapshotBlockError, e);
                let mut failure = Failure::of_sdk(&e, reason.as_deref());
                match reason.as_deref() {
                    // It left here as it should be.
                    Some("INVALID_BLOCK") if failure.mentions("checksum") => {
                        failure.class = Class::Corrupt;
                    }
                    // An attempt that was given up may still be at work on it.
                    Some("CONFLICTING_BLOCK_UPDATE") => failure.class = Class::Transient,
                    _ => {}
                }
                failure
            })?;
            if answer.checksum.is_none() && answer.request_id().is_none() {
                return Err(unexpected("neither a checksum nor the id of a request"));
            }
            match answer.checksum {
                Some(given) if given != *checksum => {
                    let text = "the service acknowledged another checksum";
                    Err(Failure::new(Class::Corrupt, text))
                }
                _ => Ok(()),
            }
        });
        put.await.map_err(|error| match error.kind() {
            // A snapshot takes blocks while it is pending, and never again.
            ErrorKind::NotReady => error.of_kind(ErrorKind::Conflict),
            _ => error,
        })
    }

    pub(super) async fn complete_snapshot(
        &self,
        id: &SnapshotId,
        request: CompleteRequest,
    ) -> Result<Snapshot> {
        let count = i32::try_from(request.changed_blocks).map_err(|_| {
            Error::new(
                ErrorKind::Invalid,
                format!("{} blocks are too many", request.changed_blocks),
            )
        })?;
        let doing = format!("complete {id}");
        // Whether an attempt, the answer to which was lost, may have done it.
        let lost = &AtomicBool::new(false);
        let asked = self.about(&kinds::COMPLETE_SNAPSHOT, id, &doing);
        let completed = self.service.call(asked, |clients| async move {
            let call = clients.ebs.complete_snapshot().snapshot_id(id.as_str());
            let mut call = call.changed_blocks_count(count);
            if let Some(checksum) = request.checksum {
                call = call
                    .checksum(checksum.to_base64())
                    .checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256)
                    .checksum_aggregation_method(
                        ChecksumAggregationMethod::ChecksumAggregationLinear,
                    );
            }
            let before = lost.swap(true, Ordering::Relaxed);
            call.send().await.map(|_| ()).map_err(|e| {
                let reason = reason_of!(CompleteSnapshotError, e);
                let failure = Failure::of_sdk(&e, reason.as_deref());
                if failure.is_verdict() {
                    lost.store(before, Ordering::Relaxed);
                }
                failure
            })
        });
        if let Err(error) = completed.await {
            return match error.kind() {
                ErrorKind::Unavailable | ErrorKind::Timeout => {
                    self.completed_after(id, error).await
                }
                _ if lost.load(Ordering::Relaxed) => self.processed(id, error).await,
                ErrorKind::NotReady | ErrorKind::Invalid => Err(error.of_kind(ErrorKind::Conflict)),
                _ => Err(error),
            };
        }
        match catalog::describe(&self.service, id, self.policy(id)).await {
            Ok(snapshot) => Ok(snapshot),
            // It is complete, whatever can be learnt of it: whoever hears of a refusal deletes it.
            Err(error) => {
                tracing::warn!("{id} was accepted, and what became of it is not known: {error}");
                let started = self.started().get(id).map(|started| started.snapshot.clone());
                started.ok_or_else(|| error.of_kind(ErrorKind::Unavailable))
            }
        }
    }

    /// A snapshot whose completion was not answered, if it shows that it was accepted; else the error, for
    /// which nobody deletes anything.
    async fn completed_after(&self, id: &SnapshotId, error: Error) -> Result<Snapshot> {
        let found = catalog::describe(&self.service, id, self.policy(id));
        match tokio::time::timeout(LOOK, found).await {
            Ok(Ok(found)) if found.state == SnapshotState::Completed => Ok(found),
            _ => Err(error),
        }
    }

    /// A snapshot whose completion was `refused`, and may have been accepted before: once the service
    /// has processed it.
    ///
    /// # Errors
    ///
    /// `Conflict` if it was not accepted, and `Unavailable` if that cannot be told.
    async fn processed(&self, id: &SnapshotId, refused: Error) -> Result<Snapshot> {
        let end = Instant::now() + PROCESSING;
        let mut pause = Duration::from_millis(500);
        let unknown = |why: &str| {
            let message = format!("whether {id} was completed is not known: {refused}, and {why}");
            Error::new(ErrorKind::Unavailable, message)
        };
        loop {
            let found = catalog::describe(&self.service, id, self.policy(id)).await;
            match found {
                Ok(found) if found.state == SnapshotState::Completed => return Ok(found),
                Ok(found) if found.state != SnapshotState::Pending => {
                    return Err(refused.of_kind(ErrorKind::Conflict));
                }
                Ok(_) if Instant::now() < end => tokio::time::sleep(pause).await,
                Ok(_) => {
                    let seconds = PROCESSING.as_secs();
                    return Err(unknown(&format!("it is still pending after {seconds} s")));
                }
                Err(error) => return Err(unknown(&error.to_string())),
            }
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_volume_has_more_time() {
        for (gib, minutes) in [(1, 60), (8, 163), (100, 2048), (65_536, 4320)] {
            assert_eq!(timeout_minutes(VolumeSize::from_gib(gib).unwrap()), minutes, "{gib}");
        }
    }
}
