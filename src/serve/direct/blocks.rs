//! GetSnapshotBlock and PutSnapshotBlock.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::Response;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};

use super::super::endpoint::Endpoint;
use super::super::gate::Payload;
use super::super::refusal::Refusal;
use super::token::About;
use super::{
    Answer, CHECKSUM, CHECKSUM_ALGORITHM, DATA_LENGTH, Parameters, SHA256, block_index, checksum,
    header, parameter, required, snapshot_id,
};
use crate::cache::{Key, Urgency, Value};
use crate::model::{BLOCK_SIZE, Block, BlockIndex, SnapshotId};
use crate::store::{BlockToken, ErrorKind, ListFrom, Result as StoreResult, SharedStore};

pub(in crate::serve) async fn get_block(
    State(endpoint): State<Arc<Endpoint>>,
    Path((id, index)): Path<(String, String)>,
    request: Request,
) -> Answer {
    let (id, index) = (snapshot_id(&id)?, block_index(&index)?);
    let parameters = Parameters::of(request.uri());
    let seen = endpoint.readable(&id).await?;
    if !seen.snapshot.volume_size.contains(index) {
        return Err(no_such_block(index));
    }
    let refused = || {
        let message = "The block token is not valid, has expired, or is for another block.";
        Refusal::invalid("INVALID_BLOCK_TOKEN", message)
    };
    let token = parameters.get("blockToken").ok_or_else(refused)?;
    let token = endpoint
        .tokens
        .open(About::Block((&seen.snapshot).into(), index), token)
        .ok_or_else(refused)?;
    let key = Key::Block(seen.key, index);
    let block = if let Some(Value::Block(block)) = endpoint.blocks.peek(&key) {
        endpoint.blocks.count_hit();
        block
    } else {
        let store = Arc::clone(&endpoint.store);
        let fetch = || async move { read(&store, &id, index, token).await.map(Value::Block) };
        match endpoint.blocks.get(key, Urgency::Reader, fetch).await {
            Ok(Value::Block(block)) => block,
            Ok(Value::Listing(_)) => unreachable!("it is not stored under the name of a block"),
            Err(error) if error.kind() == ErrorKind::ExpiredToken => return Err(refused()),
            Err(error) => return Err(Refusal::of_store(&error, "INVALID_SNAPSHOT_ID")),
        }
    };
    Ok(block_response(&block))
}

/// Reads a block from the store. A token that was too long for ours is looked up again.
async fn read(
    store: &SharedStore,
    id: &SnapshotId,
    index: BlockIndex,
    token: Vec<u8>,
) -> StoreResult<Block> {
    if !token.is_empty() {
        return store.get_block(id, index, &BlockToken(token.into())).await;
    }
    let mut from = ListFrom::Index(index);
    loop {
        let page = store.list_blocks(id, from, 1).await?;
        match (page.blocks.first(), page.next) {
            (Some(listed), _) if listed.index == index => {
                return store.get_block(id, index, &listed.token).await;
            }
            (None, Some(next)) => from = ListFrom::Page(next),
            _ => {
                let message = format!("block {index} of {id} is not there any more");
                return Err(crate::store::Error::new(ErrorKind::ExpiredToken, message));
            }
        }
    }
}

fn block_response(block: &Block) -> Response {
    let mut response = Response::new(Body::from(block.bytes()));
    let headers = response.headers_mut();
    let checksum = HeaderValue::from_str(&block.digest().to_base64()).expect("base64 is ASCII");
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(DATA_LENGTH, HeaderValue::from_static("524288"));
    headers.insert(CHECKSUM, checksum);
    headers.insert(CHECKSUM_ALGORITHM, HeaderValue::from_static(SHA256));
    response
}

pub(in crate::serve) async fn put_block(
    State(endpoint): State<Arc<Endpoint>>,
    Path((id, index)): Path<(String, String)>,
    request: Request,
) -> Answer {
    let (mut parts, _) = request.into_parts();
    let (id, index) = (snapshot_id(&id)?, block_index(&index)?);
    let length = required(&parts, DATA_LENGTH)?;
    if length != "524288" {
        return Err(parameter(DATA_LENGTH, length, "524288, the size of a block"));
    }
    if let Some(progress) = header(&parts.headers, "x-amz-progress")?
        && !progress.parse::<u8>().is_ok_and(|progress| progress <= 100)
    {
        return Err(parameter("x-amz-Progress", progress, "0 to 100"));
    }
    let digest = checksum(&parts)?;
    let payload = parts.extensions.remove::<Payload>();
    let Some(block) = payload.as_ref().and_then(|payload| payload.block.clone()) else {
        let len = payload.map_or(0, |payload| payload.bytes.len());
        let message = format!("The body has {len} bytes, not {BLOCK_SIZE}.");
        return Err(Refusal::invalid("INVALID_BLOCK", message));
    };
    if block.digest() != digest {
        return Err(Refusal::spoilt_block());
    }
    if let Some(faults) = &endpoint.faults {
        faults.check_started(&id)?;
    }
    endpoint.store.put_block_durably(&id, index, block).await.map_err(|e| match e.kind() {
        ErrorKind::NotFound => Refusal::no_snapshot(&id),
        ErrorKind::Invalid => no_such_block(index),
        _ => Refusal::of_store(&e, "INVALID_SNAPSHOT_ID"),
    })?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::CREATED;
    let checksum = HeaderValue::from_str(&digest.to_base64()).expect("base64 is ASCII");
    response.headers_mut().insert(CHECKSUM, checksum);
    response.headers_mut().insert(CHECKSUM_ALGORITHM, HeaderValue::from_static(SHA256));
    Ok(response)
}

fn no_such_block(index: BlockIndex) -> Refusal {
    let message = format!("The volume of the snapshot has no block {index}.");
    Refusal::invalid("INVALID_BLOCK", message)
}
