//! What the server has done so far, in the text format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::header::CONTENT_TYPE;

use super::endpoint::Endpoint;

/// Counters of a server.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    /// Connections that are open.
    pub(super) connections: AtomicU64,
    /// Connections that were closed to make place for others.
    pub(super) evicted: AtomicU64,
    /// Bytes of bodies that were read.
    pub(super) received: AtomicU64,
    /// Bytes of bodies that were sent.
    pub(super) sent: AtomicU64,
    requests: Mutex<BTreeMap<(&'static str, String), Answers>>,
}

/// Answers of one kind to one operation.
#[derive(Clone, Copy, Debug, Default)]
struct Answers {
    count: u64,
    time: Duration,
}

impl Metrics {
    /// Counts an answer. `outcome` is the status, or the code of the error.
    pub(super) fn count(&self, operation: &'static str, outcome: &str, took: Duration) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        // A client must not be able to make up new ones without end.
        let key = (operation, outcome.to_owned());
        let answers = requests.entry(key).or_default();
        answers.count += 1;
        answers.time += took;
    }

    fn text(&self, endpoint: &Endpoint) -> String {
        let mut text = String::new();
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        head(&mut text, "requests_total", "counter", "Requests that were answered.");
        for ((operation, outcome), answers) in &requests {
            let labels = format!("{{operation=\"{operation}\",outcome=\"{outcome}\"}}");
            line(&mut text, &format!("requests_total{labels}"), answers.count);
        }
        head(&mut text, "request_seconds_total", "counter", "Time that they took.");
        for ((operation, outcome), answers) in &requests {
            let labels = format!("{{operation=\"{operation}\",outcome=\"{outcome}\"}}");
            line(&mut text, &format!("request_seconds_total{labels}"), answers.time.as_secs_f64());
        }
        let cache = endpoint.blocks.metrics();
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        for (name, kind, help, value) in [
            (
                "received_bytes_total",
                "counter",
                "Bytes of bodies that were read.",
                load(&self.received),
            ),
            ("sent_bytes_total", "counter", "Bytes of bodies that were sent.", load(&self.sent)),
            ("connections", "gauge", "Connections that are open.", load(&self.connections)),
            (
                "evicted_total",
                "counter",
                "Connections that gave way to others.",
                load(&self.evicted),
            ),
            ("cache_hits_total", "counter", "Blocks that were in memory.", load(&cache.hits)),
            ("cache_misses_total", "counter", "Blocks that were not.", load(&cache.misses)),
            ("cache_bytes", "gauge", "Bytes of blocks in memory.", endpoint.blocks.bytes() as u64),
        ] {
            head(&mut text, name, kind, help);
            line(&mut text, name, value);
        }
        text
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP fspfs_serve_{name} {help}\n# TYPE fspfs_serve_{name} {kind}");
}

fn line(text: &mut String, name: &str, value: impl std::fmt::Display) {
    let _ = writeln!(text, "fspfs_serve_{name} {value}");
}

pub(super) async fn answer(State(endpoint): State<Arc<Endpoint>>) -> Response {
    let text = endpoint.metrics.text(&endpoint);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
