//! ListSnapshotBlocks and ListChangedBlocks.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::SystemTime;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::Response;
use bytes::Bytes;
use http::StatusCode;
use hyper::body::{Frame, SizeHint};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;

use super::super::endpoint::Endpoint;
use super::super::refusal::Refusal;
use super::token::About;
use super::{Answer, Parameters, block_index, epoch, json, parameter, snapshot_id};
use crate::model::{BLOCK_SIZE_U64, BlockIndex, Snapshot};
use crate::store::listing::Of;
use crate::store::{Error, ErrorKind, ListFrom, ListedBlock, PageToken};

/// Bounds of MaxResults; fewer are as many as the lowest (service model).
const MIN_RESULTS: usize = 100;
const MAX_RESULTS: usize = 10_000;

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Blocks {
    blocks: Vec<Listed>,
    #[serde(flatten)]
    page: Page,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    block_index: u32,
    block_token: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ChangedBlocks {
    changed_blocks: Vec<Changed>,
    #[serde(flatten)]
    page: Page,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Changed {
    block_index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_block_token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    second_block_token: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Page {
    expiry_time: f64,
    volume_size: u64,
    block_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_token: Option<String>,
}

/// Which page a client asks for.
struct Asked {
    from: ListFrom,
    max: usize,
}

impl Asked {
    fn of(parameters: &Parameters, endpoint: &Endpoint, about: About<'_>) -> Result<Self, Refusal> {
        let max = match parameters.get("maxResults") {
            None => MAX_RESULTS,
            Some(text) => match text.parse::<usize>() {
                Ok(max) if (1..=MAX_RESULTS).contains(&max) => max.max(MIN_RESULTS),
                _ => return Err(parameter("maxResults", text, "100 to 10000")),
            },
        };
        let from = match (parameters.get("pageToken"), parameters.get("startingBlockIndex")) {
            (Some(token), _) => {
                let inner = endpoint.tokens.open(about, token);
                inner.and_then(|inner| resume(&inner)).ok_or_else(bad_page_token)?
            }
            (None, Some(text)) => ListFrom::Index(block_index(text)?),
            (None, None) => ListFrom::Index(BlockIndex::ZERO),
        };
        Ok(Self { from, max })
    }
}

fn bad_page_token() -> Refusal {
    let message = "The page token is not valid, has expired, or is for another listing.";
    Refusal::invalid("INVALID_PAGE_TOKEN", message)
}

/// What a page token stands for: an index, which any server can go on from, or else what the store
/// gave.
fn resume(inner: &[u8]) -> Option<ListFrom> {
    match inner.split_first()? {
        (0, index) => Some(ListFrom::Index(BlockIndex(u32::from_be_bytes(index.try_into().ok()?)))),
        (1, token) => String::from_utf8(token.to_vec()).ok().map(PageToken).map(ListFrom::Page),
        _ => None,
    }
}

fn resuming(known: Option<BlockIndex>, next: &PageToken) -> Vec<u8> {
    match known {
        Some(index) => [&[0], &index.0.to_be_bytes()[..]].concat(),
        None => [&[1], next.0.as_bytes()].concat(),
    }
}

fn refused(error: &Error) -> Refusal {
    match error.kind() {
        ErrorKind::ExpiredToken => bad_page_token(),
        _ => Refusal::of_store(error, "INVALID_SNAPSHOT_ID"),
    }
}

impl Endpoint {
    fn page(
        &self,
        about: About<'_>,
        volume_gib: u64,
        next: Option<Vec<u8>>,
    ) -> Result<Page, Refusal> {
        let seal = |inner: Vec<u8>| {
            let too_long = || Refusal::internal("a page token of the store is too long");
            self.tokens.seal(about, &inner).ok_or_else(too_long)
        };
        let expiry = SystemTime::now() + self.tokens.block_life();
        Ok(Page {
            expiry_time: jiff::Timestamp::try_from(expiry).map_or(0.0, epoch),
            volume_size: volume_gib,
            block_size: BLOCK_SIZE_U64,
            next_token: next.map(seal).transpose()?,
        })
    }

    fn block_token(&self, of: &Snapshot, listed: &ListedBlock) -> String {
        let about = About::Block(of.into(), listed.index);
        // What is too long is looked up again when the block is read.
        let token = self.tokens.seal(about, &listed.token.0);
        token.or_else(|| self.tokens.seal(about, &[])).expect("an empty one fits")
    }

    /// Whether this page shall be empty, with the token to the one that was asked for.
    fn empties(&self, from: &ListFrom) -> Option<Vec<u8>> {
        let ListFrom::Index(index) = from else { return None };
        self.faults
            .as_ref()?
            .empties(*index)
            .then(|| resuming(Some(*index), &PageToken(String::new())))
    }
}

pub(in crate::serve) async fn list_blocks(
    State(endpoint): State<Arc<Endpoint>>,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let id = snapshot_id(&id)?;
    let seen = endpoint.readable(&id).await?;
    let about = About::Blocks((&seen.snapshot).into());
    let asked = Asked::of(&Parameters::of(request.uri()), &endpoint, about)?;
    let gib = seen.snapshot.volume_size.gib();
    let permit = Arc::clone(&endpoint.listings).acquire_owned().await.map_err(Refusal::internal)?;
    if let Some(again) = endpoint.empties(&asked.from) {
        let page = endpoint.page(about, gib, Some(again))?;
        return Ok(json(StatusCode::OK, &Blocks { blocks: Vec::new(), page }));
    }
    let found =
        endpoint.store.list_blocks(&id, asked.from, asked.max).await.map_err(|e| refused(&e))?;
    Of::from(&seen.snapshot).check(found.started).map_err(|e| refused(&e))?;
    let known = found.covered.or(found.blocks.last().map(|last| last.index.next()));
    let next = found.next.map(|next| resuming(known, &next));
    let listed = |block: &ListedBlock| Listed {
        block_index: block.index.0,
        block_token: endpoint.block_token(&seen.snapshot, block),
    };
    let blocks = found.blocks.iter().map(listed).collect();
    let page = endpoint.page(about, gib, next)?;
    Ok(held(json(StatusCode::OK, &Blocks { blocks, page }), permit))
}

pub(in crate::serve) async fn list_changed_blocks(
    State(endpoint): State<Arc<Endpoint>>,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let second = snapshot_id(&id)?;
    let parameters = Parameters::of(request.uri());
    let Some(first) = parameters.get("firstSnapshotId") else {
        let message = "The parameter firstSnapshotId is required.";
        return Err(Refusal::invalid("INVALID_PARAMETER_VALUE", message));
    };
    let first = snapshot_id(first)?;
    let one = endpoint.readable(&first).await?;
    let two = endpoint.readable(&second).await?;
    let about = About::Changes((&one.snapshot).into(), (&two.snapshot).into());
    let asked = Asked::of(&parameters, &endpoint, about)?;
    if one.snapshot.lineage.is_none() || one.snapshot.lineage != two.snapshot.lineage {
        let message = format!("The snapshots '{first}' and '{second}' are not of one lineage.");
        return Err(Refusal::invalid("UNRELATED_SNAPSHOTS", message));
    }
    let gib = two.snapshot.volume_size.gib();
    let permit = Arc::clone(&endpoint.listings).acquire_owned().await.map_err(Refusal::internal)?;
    if let Some(again) = endpoint.empties(&asked.from) {
        let page = endpoint.page(about, gib, Some(again))?;
        return Ok(json(StatusCode::OK, &ChangedBlocks { changed_blocks: Vec::new(), page }));
    }
    let store = &endpoint.store;
    let found = store.list_changed_blocks(&first, &second, asked.from, asked.max).await;
    let found = found.map_err(|e| refused(&e))?;
    for (of, started) in
        [(&one, found.started.map(|two| two.0)), (&two, found.started.map(|two| two.1))]
    {
        Of::from(&of.snapshot).check(started).map_err(|e| refused(&e))?;
    }
    let known = found.blocks.last().map(|last| last.index.next());
    let next = found.next.map(|next| resuming(known, &next));
    let token = |of: &Snapshot, listed: &Option<ListedBlock>| {
        listed.as_ref().map(|listed| endpoint.block_token(of, listed))
    };
    let changed = found.blocks.iter().map(|block| Changed {
        block_index: block.index.0,
        first_block_token: token(&one.snapshot, &block.first),
        second_block_token: token(&two.snapshot, &block.second),
    });
    let changed_blocks = changed.collect();
    let page = endpoint.page(about, gib, next)?;
    Ok(held(json(StatusCode::OK, &ChangedBlocks { changed_blocks, page }), permit))
}

/// The same response, which keeps its place among the pages until it is sent.
fn held(response: Response, permit: OwnedSemaphorePermit) -> Response {
    response.map(|body| Body::new(Held { body, _permit: permit }))
}

/// A body with its place among the pages. Its length is known, as that of any other.
struct Held {
    body: Body,
    _permit: OwnedSemaphorePermit,
}

impl hyper::body::Body for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
