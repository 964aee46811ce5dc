//! CompleteSnapshot.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use http::StatusCode;
use serde::Serialize;

use super::super::endpoint::Endpoint;
use super::super::refusal::Refusal;
use super::{
    Answer, CHECKSUM, CHECKSUM_ALGORITHM, checksum, header, json, parameter, required, snapshot_id,
};
use crate::store::{CompleteRequest, ErrorKind};

const COUNT: &str = "x-amz-changedblockscount";
const AGGREGATION: &str = "x-amz-checksum-aggregation-method";

/// The only method.
const LINEAR: &str = "LINEAR";

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Completed {
    status: &'static str,
}

pub(in crate::serve) async fn complete(
    State(endpoint): State<Arc<Endpoint>>,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let (parts, _) = request.into_parts();
    let id = snapshot_id(&id)?;
    let count = required(&parts, COUNT)?;
    let changed_blocks = match count.parse::<u32>() {
        Ok(count) if i32::try_from(count).is_ok() => u64::from(count),
        _ => return Err(parameter("x-amz-ChangedBlocksCount", count, "a number, 0 or more")),
    };
    // All three or none.
    let given =
        [CHECKSUM, CHECKSUM_ALGORITHM, AGGREGATION].map(|name| parts.headers.contains_key(name));
    let checksum = if given.contains(&true) {
        let method = required(&parts, AGGREGATION)?;
        if method != LINEAR {
            return Err(parameter(AGGREGATION, method, LINEAR));
        }
        Some(checksum(&parts)?)
    } else {
        None
    };
    header(&parts.headers, AGGREGATION)?;
    if let Some(faults) = &endpoint.faults {
        faults.check_started(&id)?;
    }
    let request = CompleteRequest { changed_blocks, checksum, started: None };
    let completed = endpoint.store.complete(&id, request).await;
    endpoint.forget(&id);
    let snapshot = completed.map_err(|e| match e.kind() {
        ErrorKind::NotFound => Refusal::no_snapshot(&id),
        _ => Refusal::of_store(&e, "INVALID_SNAPSHOT_ID"),
    })?;
    let status = endpoint.state(&snapshot).as_str();
    Ok(json(StatusCode::ACCEPTED, &Completed { status }))
}
