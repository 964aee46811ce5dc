//! What a mount has done so far, in numbers.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;

use crate::cache::Cache;
use crate::store::SharedStore;
use crate::store::wrap::{Call, Counters};

/// Prometheus text format, version 0.0.4.
pub(super) fn text(
    cache: &Cache,
    calls: Option<&Counters>,
    store: &SharedStore,
    staged: Option<u64>,
) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, values: &[(String, String)]| {
        let _ = writeln!(text, "# HELP fspfs_{name} {help}\n# TYPE fspfs_{name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(text, "fspfs_{name}{labels} {value}");
        }
    };
    let one = |value: u64| [(String::new(), value.to_string())];
    if let Some(calls) = calls {
        let by_call = |count: &dyn Fn(Call) -> u64| -> Vec<(String, String)> {
            Call::ALL
                .iter()
                .map(|&call| {
                    (format!("{{operation=\"{}\"}}", call.as_str()), count(call).to_string())
                })
                .collect()
        };
        let requests = by_call(&|call| calls.calls(call));
        metric("store_requests_total", "counter", "Requests to the store.", &requests);
        let errors = by_call(&|call| calls.errors(call));
        metric("store_errors_total", "counter", "Requests to the store that failed.", &errors);
        let read = one(calls.bytes_read());
        metric("store_read_bytes_total", "counter", "Bytes of blocks read from the store.", &read);
    }
    if let Some(usage) = store.usage() {
        let requests = usage.requests.iter();
        let requests: Vec<_> = requests
            .map(|(name, sent)| (format!("{{request=\"{name}\"}}"), sent.to_string()))
            .collect();
        metric("service_requests_total", "counter", "Requests sent to the service.", &requests);
        let help = "Requests that were sent again, after a failure.";
        metric("service_requests_again_total", "counter", help, &one(usage.again));
        let help = "What the requests cost in dollars, at the prices of us-east-1.";
        let price = [(String::new(), format!("{:.9}", usage.dollars()))];
        metric("service_cost_dollars_total", "counter", help, &price);
        let help = "Blocks that may be read and put at the same time, at present.";
        metric("service_in_flight_limit", "gauge", help, &one(usage.in_flight_limit));
    }
    let numbers = cache.metrics();
    let load = |value: &std::sync::atomic::AtomicU64| one(value.load(Ordering::Relaxed));
    metric("cache_hits_total", "counter", "Reads served from memory.", &load(&numbers.hits));
    metric(
        "cache_misses_total",
        "counter",
        "Reads that waited for the store.",
        &load(&numbers.misses),
    );
    let help = "Blocks that were fetched before they were read.";
    metric("cache_prefetches_total", "counter", help, &load(&numbers.prefetches));
    let in_flight = one(numbers.in_flight.load(Ordering::Relaxed) as u64);
    metric("fetches_in_flight", "gauge", "Fetches from the store under way.", &in_flight);
    metric("memory_bytes", "gauge", "Bytes in memory.", &one(cache.bytes() as u64));
    metric(
        "memory_budget_bytes",
        "gauge",
        "Bytes that may be in memory.",
        &one(cache.budget() as u64),
    );
    if let Some(staged) = staged {
        metric("staged_bytes", "gauge", "Bytes of working images that are staged.", &one(staged));
    }
    text
}
