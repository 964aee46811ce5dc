//! Faults on purpose, for testing clients. `docs/serve.md` describes the language.
//!
//! What happens to a request follows from the seed, the operation, the block or page that it is
//! about, and how often that was asked for: not from the order in which requests of different
//! connections happen to come. So a run repeats.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::request::Parts;
use http_body_util::BodyExt as _;

use self::spec::{Chance, Fault, Latency};
pub use self::spec::{Faults, InvalidFaults};
use super::gate::Operation;
use super::refusal::Refusal;
use crate::model::{BlockIndex, SnapshotId};

mod bucket;
mod spec;

/// Requests that are told apart at most. Beyond, the count begins anew: a run that long repeats
/// only up to there.
const MAX_SUBJECTS: usize = 1 << 20;

/// Decides what goes wrong.
#[derive(Debug)]
pub(super) struct Injector {
    faults: Faults,
    /// How often each subject was asked for.
    asked: Mutex<HashMap<(Operation, u64), u32>>,
    buckets: bucket::Buckets,
    started: Mutex<HashMap<SnapshotId, Instant>>,
}

/// What happens to one request.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// It waits so long first.
    pub(super) delay: Duration,
    /// It gets this instead of an answer.
    pub(super) refusal: Option<Refusal>,
    /// Its connection is cut before the answer.
    pub(super) cut: bool,
    /// Its connection is cut in the middle of the body.
    cut_body: bool,
    /// One bit of its body is changed, and the checksum is not.
    corrupt: bool,
}

impl Verdict {
    /// Does to an answer what is due.
    pub(super) fn spoil(&self, response: &mut Response) {
        if !self.cut_body && !self.corrupt {
            return;
        }
        let (cut, corrupt) = (self.cut_body, self.corrupt);
        let body = std::mem::take(response.body_mut());
        let len = hyper::body::Body::size_hint(&body).exact();
        let spoiled = futures::stream::once(async move {
            let mut bytes = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
            if corrupt && !bytes.is_empty() {
                let mut changed = BytesMut::from(&bytes[..]);
                let at = changed.len() / 3;
                changed[at] ^= 1;
                bytes = changed.freeze();
            }
            Ok::<Bytes, std::io::Error>(if cut { bytes.slice(..bytes.len() / 2) } else { bytes })
        });
        let end = futures::stream::iter(cut.then(|| Err(std::io::Error::other("cut on purpose"))));
        *response.body_mut() =
            axum::body::Body::from_stream(futures::StreamExt::chain(spoiled, end));
        if let Some(len) = len {
            response.headers_mut().insert(http::header::CONTENT_LENGTH, len.into());
        }
    }
}

/// A row of numbers that follow from a seed (SplitMix64).
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Between 0 and 1.
    fn fraction(&mut self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
        let fraction = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        fraction
    }

    fn hits(&mut self, chance: Chance) -> bool {
        self.fraction() < chance.0
    }

    fn latency(&mut self, latency: Latency) -> Duration {
        match latency {
            Latency::Fixed(time) => time,
            Latency::Between(least, most) => {
                least + most.saturating_sub(least).mul_f64(self.fraction())
            }
            // Exponential, but not for ever.
            Latency::Mean(mean) => mean.mul_f64((-(1.0 - self.fraction()).ln()).min(10.0)),
        }
    }
}

impl Injector {
    pub(super) fn new(faults: Faults) -> Self {
        let buckets = bucket::Buckets::default();
        Self { faults, asked: Mutex::default(), buckets, started: Mutex::default() }
    }

    pub(super) fn block_token_life(&self) -> Option<Duration> {
        self.faults.block_token_life
    }

    pub(super) fn page_token_life(&self) -> Option<Duration> {
        self.faults.page_token_life
    }

    /// Decides what happens to a request.
    pub(super) fn judge(&self, operation: Operation, parts: &Parts) -> Verdict {
        let mut verdict = Verdict::default();
        if matches!(operation, Operation::Metrics | Operation::Unknown) {
            return verdict;
        }
        let mut draw = self.draw(operation, subject(parts));
        for (of, fault) in &self.faults.rules {
            if of.is_some_and(|of| of != operation) {
                continue;
            }
            match fault {
                Fault::Latency(latency) => verdict.delay += draw.latency(*latency),
                Fault::Fail(chance, code) => {
                    if draw.hits(*chance) && verdict.refusal.is_none() {
                        verdict.refusal = Some(code.refusal());
                    }
                }
                Fault::Rate(rate) => {
                    if !self.buckets.account(*of, *rate) {
                        verdict.refusal.get_or_insert_with(|| throttled("ACCOUNT_THROTTLED"));
                    }
                }
                Fault::SnapshotRate(rate) => {
                    let snapshot = parts.uri.path().split('/').nth(2).unwrap_or("");
                    if !self.buckets.snapshot(*of, snapshot, *rate) {
                        verdict.refusal.get_or_insert_with(|| throttled("RESOURCE_LEVEL_THROTTLE"));
                    }
                }
                Fault::Cut(chance) => verdict.cut |= draw.hits(*chance),
                Fault::CutBody(chance) => verdict.cut_body |= draw.hits(*chance),
                Fault::Corrupt(chance) => {
                    let hit = draw.hits(*chance);
                    verdict.corrupt |= hit && operation == Operation::GetSnapshotBlock;
                    if hit && operation == Operation::PutSnapshotBlock {
                        verdict.refusal.get_or_insert_with(Refusal::spoilt_block);
                    }
                }
            }
        }
        verdict
    }

    /// The numbers for one request.
    fn draw(&self, operation: Operation, subject: u64) -> Draw {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.len() >= MAX_SUBJECTS {
            asked.clear();
        }
        let times = asked.entry((operation, subject)).or_default();
        *times += 1;
        let mut draw = Draw(self.faults.seed);
        for part in [operation as u64, subject, u64::from(*times)] {
            draw = Draw(draw.next() ^ part);
        }
        draw
    }

    /// Whether a page of a listing from this index shall be empty, with a token to try again.
    pub(super) fn empties(&self, index: BlockIndex) -> bool {
        // A row of numbers of its own, so that asking again may bring the page.
        let mut draw = self.draw(Operation::Unknown, index.0.into());
        self.faults.empty_pages.is_some_and(|chance| draw.hits(chance))
    }

    /// Notes that a snapshot was started.
    pub(super) fn started(&self, id: &SnapshotId) {
        if self.faults.missing_after_start.is_some() {
            let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
            started.entry(id.clone()).or_insert_with(Instant::now);
        }
    }

    /// Refuses what comes too early after a start, as the service does until all of it has heard of
    /// the snapshot.
    pub(super) fn check_started(&self, id: &SnapshotId) -> Result<(), Refusal> {
        let Some(life) = self.faults.missing_after_start else { return Ok(()) };
        let started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        match started.get(id) {
            Some(started) if started.elapsed() < life => Err(Refusal::no_snapshot(id)),
            _ => Ok(()),
        }
    }
}

fn throttled(reason: &'static str) -> Refusal {
    let message =
        "The number of API requests has exceeded the maximum allowed API request throttling limit.";
    Refusal::new(StatusCode::BAD_REQUEST, "RequestThrottledException", message).because(reason)
}

/// What a request is about, without ids and tokens, which are others in each run.
fn subject(parts: &Parts) -> u64 {
    let path = parts.uri.path();
    if let Some(index) = path.split('/').nth(4) {
        return index.parse().unwrap_or(0);
    }
    let query = parts.uri.query().unwrap_or("");
    let start =
        form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == "startingBlockIndex");
    start.and_then(|(_, index)| index.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(spec: &str, requests: &[&str]) -> Vec<(Duration, bool, bool, bool)> {
        let injector = Injector::new(spec.parse().unwrap());
        let judge = |path: &&str| {
            let (parts, ()) = http::Request::get(*path).body(()).unwrap().into_parts();
            let verdict = injector.judge(Operation::GetSnapshotBlock, &parts);
            (verdict.delay, verdict.refusal.is_some(), verdict.cut, verdict.corrupt)
        };
        requests.iter().map(judge).collect()
    }

    #[test]
    fn a_run_repeats_whatever_the_order_of_the_requests() {
        let paths: Vec<_> = (0..2000).map(|n| format!("/snapshots/snap-0a/blocks/{n}")).collect();
        let mut paths: Vec<_> = paths.iter().map(String::as_str).collect();
        let spec = "latency=1ms..9ms,throttle=20%,cut=10%,corrupt=30%,seed=7";
        let one = verdicts(spec, &paths);
        assert_eq!(one, verdicts(spec, &paths));
        assert_ne!(one, verdicts(&spec.replace('7', "8"), &paths));
        paths.reverse();
        let mut backwards = verdicts(spec, &paths);
        backwards.reverse();
        assert_eq!(one, backwards);
        let refused = one.iter().filter(|verdict| verdict.1).count();
        assert!((330..=470).contains(&refused), "{refused} of 2000 at 20 %");
        assert!(one.iter().all(|v| (1..=9).contains(&v.0.as_millis())));
    }

    #[test]
    fn asking_again_is_another_chance() {
        let paths = ["/snapshots/snap-0a/blocks/5"; 100];
        let refused = verdicts("throttle=50%,seed=1", &paths).iter().filter(|v| v.1).count();
        assert!((30..=70).contains(&refused), "{refused} of 100 at 50 %");
    }
}
