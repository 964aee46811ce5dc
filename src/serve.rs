//! Any store behind the EBS direct APIs, and the EC2 and STS actions that their clients need.
//!
//! A request passes the gate (`gate`): its connection is counted, it is authenticated, its body read
//! within bounds of size and time. Then `direct` or `query` answers it over the store. What both
//! know lives in the `Endpoint`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tokio::net::TcpListener;

use self::endpoint::Endpoint;
pub use self::inject::{Faults, InvalidFaults};
pub use self::keys::{Keys, KeysError, Pair};
use crate::store::SharedStore;

mod connections;
mod direct;
mod endpoint;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod gate;
mod guard;
mod inject;
mod keys;
mod metrics;
mod query;
mod refusal;
mod signature;

/// Where it listens unless told otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:4560";

/// The account that everything belongs to, unless another is given.
pub const DEFAULT_ACCOUNT: &str = "000000000000";

/// The region that it says it is in, unless another is given.
pub const DEFAULT_REGION: &str = "us-east-1";

/// Memory for blocks, unless other is given.
pub const DEFAULT_MEMORY: usize = 32 << 20;

/// Who may ask.
#[derive(Debug)]
pub enum Access {
    /// Whoever signs with one of these.
    Keys(Keys),
    /// Every program on this machine. The keys are for tokens alone, which nobody must make up.
    Everybody(Keys),
}

/// How a store is served.
#[derive(Debug)]
pub struct Options {
    /// Who may ask.
    pub access: Access,
    /// How long a snapshot stays `pending` after its completion.
    pub pending: Duration,
    /// What goes wrong on purpose.
    pub faults: Option<Faults>,
    /// Bytes of blocks that are kept in memory.
    pub memory: usize,
    /// The account that owns the snapshots: 12 digits.
    pub account: String,
    /// The region that it says it is in.
    pub region: String,
    /// What tokens are made with, besides the keys: servers of one store take each other's.
    pub name: String,
}

/// Serves `store` on `listener` until `stop` is done, then finishes what is in flight.
pub async fn serve(
    listener: TcpListener,
    store: SharedStore,
    options: Options,
    stop: impl Future<Output = ()> + Send,
) {
    let endpoint = Endpoint::new(store, options, listener.local_addr().ok());
    let router = router(Arc::clone(&endpoint));
    connections::accept(listener, router, &endpoint.metrics, stop).await;
}

fn router(endpoint: Arc<Endpoint>) -> Router {
    Router::new()
        .route("/", get(query::answer).post(query::answer))
        .route("/metrics", get(metrics::answer))
        .route("/snapshots", post(direct::start))
        .route("/snapshots/completion/{id}", post(direct::complete))
        .route("/snapshots/{id}/blocks", get(direct::list_blocks))
        .route("/snapshots/{id}/changedblocks", get(direct::list_changed_blocks))
        .route("/snapshots/{id}/blocks/{index}", get(direct::get_block).put(direct::put_block))
        .fallback(direct::unknown)
        .method_not_allowed_fallback(direct::unknown)
        .layer(from_fn_with_state(Arc::clone(&endpoint), gate::pass))
        .with_state(endpoint)
}

/// Whether only programs on this machine reach this address.
pub fn is_local(address: SocketAddr) -> bool {
    address.ip().is_loopback()
}
