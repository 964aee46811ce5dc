//! What every request passes: who asks, what it brings, what goes wrong on purpose; and what every
//! answer passes: its form, its headers, the log.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, EXPECT, HOST, HeaderName};
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use uuid::Uuid;

use super::connections::Connection;
use super::endpoint::Endpoint;
use super::inject::Verdict;
use super::refusal::Refusal;
use super::{Access, direct, guard, query, signature};
use crate::model::{BLOCK_SIZE, Block, BlockBuffer, Digest};

/// Bytes of a body at most, where it is not a block.
const MAX_BODY: usize = 256 << 10;

/// A body has to be there within this time.
const BODY_DEADLINE: Duration = Duration::from_mins(1);

/// How long the store may take. A completion of a volume of terabytes takes a while.
const ANSWER_DEADLINE: Duration = Duration::from_mins(5);

/// Bytes of a body that are read after a refusal, so that the client comes to read why; and how
/// long.
const MAX_DRAINED: usize = 1 << 20;
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Operation {
    StartSnapshot,
    PutSnapshotBlock,
    CompleteSnapshot,
    ListSnapshotBlocks,
    ListChangedBlocks,
    GetSnapshotBlock,
    /// An action of EC2 or STS.
    Query,
    Metrics,
    Unknown,
}

impl Operation {
    pub(super) fn of(method: &Method, path: &str) -> Self {
        let Some(path) = path.strip_prefix('/') else { return Self::Unknown };
        let mut parts = path.split('/');
        let parts = [(); 5].map(|()| parts.next());
        match (method.as_str(), parts) {
            ("GET" | "POST", [Some(""), None, ..]) => Self::Query,
            ("GET", [Some("metrics"), None, ..]) => Self::Metrics,
            ("POST", [Some("snapshots"), None, ..]) => Self::StartSnapshot,
            ("POST", [Some("snapshots"), Some("completion"), Some(_), None, _]) => {
                Self::CompleteSnapshot
            }
            ("GET", [Some("snapshots"), Some(_), Some("blocks"), None, _]) => {
                Self::ListSnapshotBlocks
            }
            ("GET", [Some("snapshots"), Some(_), Some("changedblocks"), None, _]) => {
                Self::ListChangedBlocks
            }
            ("GET", [Some("snapshots"), Some(_), Some("blocks"), Some(_), None]) => {
                Self::GetSnapshotBlock
            }
            ("PUT", [Some("snapshots"), Some(_), Some("blocks"), Some(_), None]) => {
                Self::PutSnapshotBlock
            }
            _ => Self::Unknown,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::StartSnapshot => "StartSnapshot",
            Self::PutSnapshotBlock => "PutSnapshotBlock",
            Self::CompleteSnapshot => "CompleteSnapshot",
            Self::ListSnapshotBlocks => "ListSnapshotBlocks",
            Self::ListChangedBlocks => "ListChangedBlocks",
            Self::GetSnapshotBlock => "GetSnapshotBlock",
            Self::Query => "Query",
            Self::Metrics => "Metrics",
            Self::Unknown => "Unknown",
        }
    }

    /// The services whose signature it takes.
    fn services(self) -> &'static [&'static str] {
        match self {
            Self::Query => &["ec2", "sts"],
            _ => &["ebs"],
        }
    }
}

/// Names a request, in its answer and in the log.
#[derive(Clone, Debug)]
pub(super) struct RequestId(pub(super) String);

/// The action of a query, for the log; set by its answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Action(pub(super) &'static str);

/// The body of a request.
#[derive(Clone, Debug)]
pub(super) struct Payload {
    pub(super) bytes: Bytes,
    /// The body as a block, if it has the size of one and is to be put.
    pub(super) block: Option<Block>,
}

impl Payload {
    fn new(operation: Operation, bytes: Bytes) -> Self {
        let is_block = operation == Operation::PutSnapshotBlock && bytes.len() == BLOCK_SIZE;
        let block = is_block.then(|| Block::new(bytes.clone()));
        Self { bytes, block }
    }

    /// The SHA-256 of the body; that of a block was computed already.
    fn digest(&self) -> Digest {
        self.block.as_ref().map_or_else(|| Digest::of(&self.bytes), Block::digest)
    }
}

/// Lets a request pass, and gives its answer the form that its API has.
pub(super) async fn pass(
    State(endpoint): State<Arc<Endpoint>>,
    request: Request,
    next: Next,
) -> Response {
    let began = Instant::now();
    let (mut parts, mut body) = request.into_parts();
    let operation = Operation::of(&parts.method, parts.uri.path());
    let id = RequestId(Uuid::new_v4().to_string());
    let peer = parts.extensions.remove::<Option<SocketAddr>>().flatten();
    let connection = parts.extensions.remove::<Arc<Connection>>();
    let path = parts.uri.path().to_owned();
    let is_sts = query::is_sts(&parts.headers);
    let admitted = admit(&endpoint, operation, &parts, &mut body).await;
    let mut verdict = Verdict::default();
    if let (Ok(_), Some(faults)) = (&admitted, &endpoint.faults) {
        verdict = faults.judge(operation, &parts);
        tokio::time::sleep(verdict.delay).await;
    }
    let working = connection.as_ref().map(Connection::work);
    let mut response = match admitted {
        Ok(payload) => {
            endpoint.metrics.received.fetch_add(payload.bytes.len() as u64, Ordering::Relaxed);
            match verdict.refusal.take() {
                Some(refusal) => refusal.into_response(),
                None if verdict.cut => cut(connection.as_deref()).await,
                None => {
                    parts.extensions.insert(payload);
                    parts.extensions.insert(id.clone());
                    answer(next, Request::from_parts(parts, Body::empty())).await
                }
            }
        }
        Err(refusal) => {
            // Whoever waits to be told to go on with the body is told not to.
            if !parts.headers.contains_key(EXPECT) {
                drain(body).await;
            }
            refusal.into_response()
        }
    };
    drop(working);
    let formed = response.extensions_mut().remove::<query::Refused>().map(|refused| refused.0);
    let refusal = response.extensions_mut().remove::<Refusal>();
    let status = response.status();
    let refusal = match refusal {
        // A path that leads nowhere, or that is no text: the router itself refused it.
        None if formed.is_none() && !status.is_success() => Some(unroutable(status)),
        refusal => refusal,
    };
    if let Some(refusal) = &refusal {
        response = match operation {
            Operation::Query => query::refuse(refusal, &id, is_sts),
            _ => direct::refuse(refusal),
        };
    }
    if response.status() == StatusCode::OK {
        verdict.spoil(&mut response);
    }
    let refusal = refusal.or(formed);
    let value = HeaderValue::from_str(&id.0).expect("a UUID is ASCII");
    response.headers_mut().insert("x-amzn-requestid", value);
    let action = response.extensions().get::<Action>().map_or(operation.name(), |action| action.0);
    let sent = response.body().size_hint().exact().unwrap_or(0);
    endpoint.metrics.sent.fetch_add(sent, Ordering::Relaxed);
    let took = began.elapsed();
    let outcome = refusal
        .as_ref()
        .map_or_else(|| response.status().as_str().to_owned(), |refusal| refusal.code.clone());
    endpoint.metrics.count(action, &outcome, took);
    let status = response.status().as_u16();
    let peer = peer.map_or_else(|| "-".to_owned(), |peer| peer.to_string());
    let why = refusal.as_ref().map_or(String::new(), |refusal| {
        let reason = refusal.reason.map_or(String::new(), |reason| format!("/{reason}"));
        let detail = refusal.detail.as_deref().unwrap_or(&refusal.message);
        format!(" {}{reason}: {}", refusal.code, detail.escape_debug())
    });
    let millis = took.as_secs_f64() * 1000.0;
    tracing::info!(target: "access", "{peer} {action} {path} {status} {sent} {millis:.1}ms {}{why}", id.0);
    response
}

/// Answers a request in a task of its own: what has begun is not given up halfway when the client
/// goes away, and what dies takes nothing along.
async fn answer(next: Next, request: Request) -> Response {
    let answered = tokio::spawn(next.run(request));
    let refusal = match tokio::time::timeout(ANSWER_DEADLINE, answered).await {
        Ok(Ok(response)) => return response,
        Ok(Err(error)) => Refusal::internal(format!("the answer died: {error}")),
        Err(_) => {
            let seconds = ANSWER_DEADLINE.as_secs();
            Refusal::internal(format!("the store did not answer within {seconds} s; it may yet"))
        }
    };
    refusal.into_response()
}

fn unroutable(status: StatusCode) -> Refusal {
    match status {
        StatusCode::BAD_REQUEST => {
            Refusal::invalid("INVALID_PARAMETER_VALUE", "The path of the request is not valid.")
        }
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => direct::unknown_operation(),
        status => Refusal::internal(format!("the router answered {status}")),
    }
}

/// Cuts the connection before anything is answered.
async fn cut(connection: Option<&Connection>) -> Response {
    let Some(connection) = connection else {
        // There is no connection in a test without one.
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    connection.cut();
    std::future::pending().await
}

/// Refuses what a proxy in between may read in another way than we do. Of a length and chunks hyper takes the chunks,
/// and drops the length.
fn check_framing(parts: &Parts) -> Result<(), Refusal> {
    let bad = |message: &str| Err(Refusal::new(StatusCode::BAD_REQUEST, "BadRequest", message));
    if parts.method == Method::HEAD {
        return Err(direct::unknown_operation());
    }
    let is_twice = |name: &HeaderName| parts.headers.get_all(name).iter().count() > 1;
    if is_twice(&AUTHORIZATION) || is_twice(&HOST) {
        return bad("A request has one Authorization and one Host.");
    }
    Ok(())
}

/// Checks who asks, and reads the body.
async fn admit(
    endpoint: &Endpoint,
    operation: Operation,
    parts: &Parts,
    body: &mut Body,
) -> Result<Payload, Refusal> {
    check_framing(parts)?;
    let claim = match &endpoint.access {
        Access::Everybody(_) => {
            guard::check(&parts.headers, endpoint.local)?;
            // An image in a page is fetched by GET, and old browsers do not say that it is one.
            if operation == Operation::Query && parts.method == Method::GET {
                let message = "Without a signature, actions are taken by POST.";
                return Err(Refusal::new(StatusCode::FORBIDDEN, "AccessDeniedException", message));
            }
            None
        }
        // Whoever watches the server has no key for it. There is nothing secret in it.
        Access::Keys(_) if operation == Operation::Metrics => None,
        Access::Keys(keys) => Some(signature::claim(parts, keys, operation.services())?),
    };
    let payload = Payload::new(operation, read(operation, parts, body).await?);
    if let Some(claim) = claim {
        let may_be_unsigned = operation == Operation::PutSnapshotBlock;
        claim.verify(parts, payload.digest(), may_be_unsigned)?;
    }
    Ok(payload)
}

/// Reads a body within its limits of size and time.
async fn read(operation: Operation, parts: &Parts, body: &mut Body) -> Result<Bytes, Refusal> {
    let limit = if operation == Operation::PutSnapshotBlock { BLOCK_SIZE } else { MAX_BODY };
    let length = parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    if length.and_then(|text| text.parse().ok()).is_some_and(|length: u64| length > limit as u64) {
        return Err(too_large(operation, limit));
    }
    let reading = async {
        if operation == Operation::PutSnapshotBlock {
            read_block(body).await
        } else {
            read_small(operation, body).await
        }
    };
    tokio::time::timeout(BODY_DEADLINE, reading).await.unwrap_or_else(|_| {
        let message = "The body of the request did not come in time.";
        Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeout", message)
            .because("WRITE_REQUEST_TIMEOUT"))
    })
}

fn too_large(operation: Operation, limit: usize) -> Refusal {
    let message = format!("The body of a {} has at most {limit} bytes.", operation.name());
    match operation {
        Operation::PutSnapshotBlock => Refusal::invalid("INVALID_BLOCK", message),
        _ => Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message),
    }
}

/// The next piece of a body; `None` at its end.
async fn piece(body: &mut Body) -> Result<Option<Bytes>, Refusal> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Some(Err(error)) => {
                let message = format!("The body of the request ended early: {error}.");
                return Err(Refusal::new(StatusCode::BAD_REQUEST, "IncompleteBody", message));
            }
        }
    }
}

/// Reads straight into the memory in which the block stays.
async fn read_block(body: &mut Body) -> Result<Bytes, Refusal> {
    let Some(mut data) = piece(body).await? else { return Ok(Bytes::new()) };
    let mut buffer = BlockBuffer::block();
    let mut len = 0;
    loop {
        let Some(room) = buffer.get_mut(len..len + data.len()) else {
            return Err(too_large(Operation::PutSnapshotBlock, BLOCK_SIZE));
        };
        room.copy_from_slice(&data);
        len += data.len();
        match piece(body).await? {
            Some(next) => data = next,
            None => break,
        }
    }
    buffer.truncate(len);
    Ok(buffer.freeze())
}

async fn read_small(operation: Operation, body: &mut Body) -> Result<Bytes, Refusal> {
    let mut all = BytesMut::new();
    while let Some(data) = piece(body).await? {
        if all.len() + data.len() > MAX_BODY {
            return Err(too_large(operation, MAX_BODY));
        }
        all.extend_from_slice(&data);
    }
    Ok(all.freeze())
}

/// Reads what a client goes on sending after it was refused: it may not look for the answer before.
async fn drain(mut body: Body) {
    let reading = async {
        let mut left = MAX_DRAINED;
        while let Ok(Some(data)) = piece(&mut body).await {
            match left.checked_sub(data.len()) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    // Whoever takes longer does not get to know.
    let _ = tokio::time::timeout(DRAIN_DEADLINE, reading).await;
}
