//! Connections: how many, for how long, and which of them give way to others.
//!
//! A client that does not finish its request, or does not read its answer, must not keep others
//! out. There is a deadline for the head of a request, one for its body, one for every write; and
//! when all places are taken, the connection that has been waiting for its client the longest is
//! closed for the next one.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt as _;

use super::metrics::Metrics;

/// Connections at the same time. A further one takes the place of the idlest.
const MAX_CONNECTIONS: usize = 256;

/// A request has to begin within this time after the connection or the last request, and its head
/// to be there as long after its first byte.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);

/// How long a client may take no byte of its answer.
const WRITE_STALL: Duration = Duration::from_secs(30);

/// What is in flight when the server is stopped has this long to end.
const GRACE: Duration = Duration::from_secs(30);

/// Bytes of a head at most. Those of the service's own clients have less than 2 KiB.
const MAX_HEAD: usize = 16 << 10;

/// Header lines at most.
const MAX_HEADERS: usize = 64;

/// Bytes that are read at once.
const READ_BUFFER: usize = 128 << 10;

/// One connection, as the gate sees it.
#[derive(Debug)]
pub(super) struct Connection {
    /// Milliseconds since the start of the server at which it began to wait for its client;
    /// [`BUSY`] while it works for it.
    waiting_since: AtomicU64,
    cut: Notify,
    clock: Instant,
}

const BUSY: u64 = u64::MAX;

impl Connection {
    /// From here until the guard is dropped, what it does is our part: it is not closed for others.
    pub(super) fn work(self: &Arc<Self>) -> Working {
        self.waiting_since.store(BUSY, Ordering::Relaxed);
        Working(Arc::clone(self))
    }

    /// Closes it, whatever it is doing.
    pub(super) fn cut(&self) {
        self.cut.notify_one();
    }

    fn wait(&self) {
        let now = u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(BUSY - 1);
        self.waiting_since.store(now, Ordering::Relaxed);
    }
}

/// A connection that works for its client.
#[derive(Debug)]
pub(super) struct Working(Arc<Connection>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.wait();
    }
}

/// All connections, by a number.
#[derive(Debug)]
struct Places {
    taken: Mutex<BTreeMap<u64, Arc<Connection>>>,
    clock: Instant,
    left: Notify,
}

impl Places {
    fn taken(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Connection>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place, closing the idlest connection if there is none.
    async fn take(&self, number: u64, metrics: &Metrics) -> Arc<Connection> {
        loop {
            let left = self.left.notified();
            let idlest = {
                let mut taken = self.taken();
                if taken.len() < MAX_CONNECTIONS {
                    let connection = Arc::new(Connection {
                        waiting_since: AtomicU64::new(0),
                        cut: Notify::new(),
                        clock: self.clock,
                    });
                    connection.wait();
                    taken.insert(number, Arc::clone(&connection));
                    metrics.connections.store(taken.len() as u64, Ordering::Relaxed);
                    return connection;
                }
                let since = |c: &&Arc<Connection>| c.waiting_since.load(Ordering::Relaxed);
                taken.values().min_by_key(since).filter(|c| since(c) != BUSY).cloned()
            };
            if let Some(idlest) = idlest {
                metrics.evicted.fetch_add(1, Ordering::Relaxed);
                idlest.cut();
            }
            // One that worked until now may be idle soon.
            let _ = tokio::time::timeout(Duration::from_millis(100), left).await;
        }
    }

    fn leave(&self, number: u64, metrics: &Metrics) {
        let mut taken = self.taken();
        taken.remove(&number);
        metrics.connections.store(taken.len() as u64, Ordering::Relaxed);
        drop(taken);
        self.left.notify_one();
    }
}

/// The place of one connection, until it is dropped.
struct Place {
    number: u64,
    places: Arc<Places>,
    metrics: Arc<Metrics>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.leave(self.number, &self.metrics);
    }
}

/// Accepts connections until `stop` is done, then waits for those that are at work.
pub(super) async fn accept(
    listener: TcpListener,
    router: Router,
    metrics: &Arc<Metrics>,
    stop: impl Future<Output = ()> + Send,
) {
    let places =
        Arc::new(Places { taken: Mutex::default(), clock: Instant::now(), left: Notify::new() });
    let stopping = Arc::new(Notify::new());
    let mut running = JoinSet::new();
    let mut stop = pin!(stop);
    for number in 0.. {
        let next = async {
            let stream = accept_one(&listener).await;
            (stream, places.take(number, metrics).await)
        };
        let (stream, connection) = tokio::select! {
            next = next => next,
            () = &mut stop => break,
        };
        // Those that have ended need no memory.
        while running.try_join_next().is_some() {}
        let place = Place { number, places: Arc::clone(&places), metrics: Arc::clone(metrics) };
        let served = serve(stream, connection, router.clone(), Arc::clone(&stopping));
        running.spawn(async move {
            let _place = place;
            served.await;
        });
    }
    drop(listener);
    let ended = async {
        // A connection that is just being made may not listen yet.
        while !running.is_empty() {
            stopping.notify_waiters();
            let _ = tokio::time::timeout(Duration::from_millis(50), running.join_next()).await;
        }
    };
    if tokio::time::timeout(GRACE, ended).await.is_err() {
        tracing::warn!("connections were cut: they did not end within {} s", GRACE.as_secs());
    }
}

async fn accept_one(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                // Out of files, most likely: those that end give some back.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(
    stream: TcpStream,
    connection: Arc<Connection>,
    router: Router,
    stopping: Arc<Notify>,
) {
    // Small answers must not wait for acknowledgements of others.
    let _ = stream.set_nodelay(true);
    let peer = stream.peer_addr().ok();
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_STALL));
    let handle = Arc::clone(&connection);
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Arc::clone(&handle));
        request.extensions_mut().insert(peer);
        router.clone().oneshot(request)
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_header_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .max_buf_size(READ_BUFFER);
    let mut served = pin!(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
    let mut stopped = false;
    loop {
        tokio::select! {
            result = served.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!("a connection ended: {error}");
                }
                return;
            }
            () = connection.cut.notified() => return,
            () = stopping.notified(), if !stopped => {
                stopped = true;
                served.as_mut().graceful_shutdown();
            }
        }
    }
}
