//! Starting, filling and completing a snapshot.

use aws_sdk_ebs::operation::complete_snapshot::CompleteSnapshotError;
use aws_sdk_ebs::operation::put_snapshot_block::PutSnapshotBlockError;
use aws_sdk_ebs::operation::start_snapshot::StartSnapshotError;
use aws_sdk_ebs::primitives::ByteStream;
use aws_sdk_ebs::types::{ChecksumAggregationMethod, ChecksumAlgorithm, Status, Tag};
use jiff::Timestamp;

use super::failure::{Class, Failure};
use super::{Ebs, Instant, Patience, SnapshotState, retry};
use crate::model::{BLOCK_SIZE, Block, BlockIndex, Snapshot, SnapshotId};
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

/// Minutes that a snapshot may be left alone by its writer: the longest that the service allows,
/// since a commit may wait for a store that is gone, and what is left alone is deleted anyway.
const TIMEOUT_MINUTES: i32 = 4320;

impl Ebs {
    pub(super) async fn start_snapshot(&self, request: StartRequest) -> Result<Snapshot> {
        let unsupported = |what: &str| {
            Err(Error::new(
                ErrorKind::Unsupported,
                format!("EBS cannot start a snapshot with {what}"),
            ))
        };
        if request.id.is_some() {
            return unsupported("a chosen id");
        }
        if request.parent.is_some() && (request.encrypted || request.kms_key.is_some()) {
            return unsupported("a parent and encryption: a child is encrypted as its parent is");
        }
        let gib = i64::try_from(request.volume_size.gib()).expect("at most 65,536");
        let minutes = request.timeout.map_or(TIMEOUT_MINUTES, |timeout| {
            i32::try_from(timeout.as_secs().div_ceil(60)).unwrap_or(TIMEOUT_MINUTES)
        });
        // A start that is tried again must not make a second snapshot.
        let token =
            request.client_token.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let tag = |(key, value): (&String, &String)| Tag::builder().key(key).value(value).build();
        let tags: Vec<_> = request.tags.iter().map(tag).collect();
        let answer = retry("start a snapshot", Patience::usual(), || async {
            let call = self.ebs.start_snapshot().volume_size(gib).client_token(&token);
            let call = call
                .set_parent_snapshot_id(request.parent.as_ref().map(ToString::to_string))
                .set_tags((!tags.is_empty()).then(|| tags.clone()))
                .set_description(
                    (!request.description.is_empty()).then(|| request.description.clone()),
                )
                .set_encrypted(request.encrypted.then_some(true))
                .set_kms_key_arn(request.kms_key.clone())
                .timeout(minutes.clamp(10, TIMEOUT_MINUTES));
            call.send().await.map_err(|e| {
                let reason = reason_of!(StartSnapshotError, e);
                Failure::of_sdk(&e, reason.as_deref())
            })
        })
        .await?;
        let text = answer.snapshot_id.unwrap_or_default();
        let id: SnapshotId = text.parse().map_err(|_| {
            Error::new(ErrorKind::Unavailable, format!("EBS gave the snapshot id {text:?}"))
        })?;
        if answer.block_size.is_some_and(|size| usize::try_from(size) != Ok(BLOCK_SIZE)) {
            let message = format!("{id} has another block size than EBS: is this its endpoint?");
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        self.started().put(id.clone(), Instant::now());
        let time = answer.start_time.and_then(|time| {
            Timestamp::new(time.secs(), i32::try_from(time.subsec_nanos()).unwrap_or(0)).ok()
        });
        let encrypted = answer.kms_key_arn.is_some()
            || answer.sse_type.is_some_and(|sse| sse.as_str() != "none");
        Ok(Snapshot {
            id,
            state: match answer.status {
                Some(Status::Completed) => SnapshotState::Completed,
                Some(Status::Error) => SnapshotState::Error,
                _ => SnapshotState::Pending,
            },
            state_message: None,
            volume_size: request.volume_size,
            parent: request.parent,
            lineage: None,
            volume_id: None,
            description: request.description,
            start_time: time.unwrap_or_else(Timestamp::now),
            completion_time: None,
            tags: request.tags,
            encrypted,
            content_digest: None,
            data_blocks: None,
            zero_blocks: None,
        })
    }

    pub(super) async fn put(
        &self,
        id: &SnapshotId,
        index: BlockIndex,
        block: &Block,
    ) -> Result<()> {
        let number = i32::try_from(index.0).map_err(|_| {
            Error::new(ErrorKind::Invalid, format!("there is no block {index} in a volume"))
        })?;
        let length = i32::try_from(BLOCK_SIZE).expect("512 KiB");
        let checksum = block.digest().to_base64();
        let doing = format!("put block {index} of {id}");
        retry(&doing, self.patience(id), || async {
            let call = self.ebs.put_snapshot_block().snapshot_id(id.as_str()).block_index(number);
            let call = call.data_length(length).block_data(ByteStream::from(block.bytes()));
            let call = call.checksum(&checksum);
            let call = call.checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256);
            let answer = call.send().await.map_err(|e| {
                let reason = reason_of!(PutSnapshotBlockError, e);
                Failure::of_sdk(&e, reason.as_deref())
            })?;
            match answer.checksum {
                Some(given) if given != checksum => {
                    let text = "the service acknowledged another checksum";
                    Err(Failure::new(Class::Final(ErrorKind::Corrupt), text))
                }
                _ => Ok(()),
            }
        })
        .await
        .map_err(|error| match error.kind() {
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
        let mut tried = false;
        let completed = retry(&doing, self.patience(id), || {
            let again = std::mem::replace(&mut tried, true);
            async move {
                let call = self.ebs.complete_snapshot().snapshot_id(id.as_str());
                let mut call = call.changed_blocks_count(count);
                if let Some(checksum) = request.checksum {
                    call = call
                        .checksum(checksum.to_base64())
                        .checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256)
                        .checksum_aggregation_method(
                            ChecksumAggregationMethod::ChecksumAggregationLinear,
                        );
                }
                let failure = match call.send().await {
                    Ok(_) => return Ok(()),
                    Err(e) => {
                        let reason = reason_of!(CompleteSnapshotError, e);
                        Failure::of_sdk(&e, reason.as_deref())
                    }
                };
                // An attempt whose answer was lost may have done it.
                if again && matches!(failure.class, Class::Final(_)) {
                    let found = self.catalog.describe(id, Patience::usual()).await;
                    if found.is_ok_and(|found| found.state == SnapshotState::Completed) {
                        return Ok(());
                    }
                }
                Err(failure)
            }
        })
        .await;
        completed.map_err(|error| match error.kind() {
            ErrorKind::NotReady | ErrorKind::Invalid => error.of_kind(ErrorKind::Conflict),
            _ => error,
        })?;
        let described = self.catalog.describe(id, self.patience(id)).await?;
        self.started().pop(id);
        Ok(described)
    }
}
