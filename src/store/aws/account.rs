//! What all share who use one account of a service.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::store::limiter::Limiter;

/// The configuration is read again at most so often because credentials do not work.
const BETWEEN_RENEWALS: Duration = Duration::from_secs(2);

/// A warning is given for one of the many requests that fail for the same reason.
const BETWEEN_WARNINGS: Duration = Duration::from_secs(10);

/// An account, as far as it can be told without asking anybody (else a profile), in one region, at one endpoint.
pub(crate) trait Account: Debug + Send + Sync + 'static {
    /// What sends requests.
    type Clients: Send + Sync + 'static;

    /// Those with the credentials that were read last.
    fn clients(&self) -> Arc<Self::Clients>;

    /// Reads the configuration again, since the credentials of `old` do not work: they may have been renewed.
    fn renew(&self, old: &Arc<Self::Clients>) -> impl Future<Output = ()> + Send;

    /// What all requests wait for.
    fn limiter(&self) -> Arc<Limiter>;

    /// Whether it is time for another warning.
    fn may_warn(&self) -> bool;
}

/// The clients and the limiter of an account.
#[derive(Debug)]
pub(crate) struct Shared<C> {
    clients: RwLock<Arc<C>>,
    /// When the configuration was read anew, if it was.
    renewed: tokio::sync::Mutex<Option<Instant>>,
    limiter: Arc<Limiter>,
    /// When it was last said that requests fail.
    warned: Mutex<Option<Instant>>,
}

impl<C> Shared<C> {
    pub(crate) fn new(clients: C, limiter: Arc<Limiter>) -> Self {
        let clients = RwLock::new(Arc::new(clients));
        Self { clients, renewed: tokio::sync::Mutex::default(), limiter, warned: Mutex::default() }
    }

    pub(crate) fn clients(&self) -> Arc<C> {
        Arc::clone(&self.clients.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn limiter(&self) -> Arc<Limiter> {
        Arc::clone(&self.limiter)
    }

    /// Takes new clients in the place of `old`, unless that was done just now.
    pub(crate) async fn renew(&self, old: &Arc<C>, read: impl Future<Output = C>) {
        let mut renewed = self.renewed.lock().await;
        let is_early = renewed.is_some_and(|last| last.elapsed() < BETWEEN_RENEWALS);
        if !Arc::ptr_eq(&self.clients(), old) || is_early {
            return;
        }
        let clients = Arc::new(read.await);
        *self.clients.write().unwrap_or_else(PoisonError::into_inner) = clients;
        *renewed = Some(Instant::now());
    }

    pub(crate) fn may_warn(&self) -> bool {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        let is_time = warned.is_none_or(|last| last.elapsed() >= BETWEEN_WARNINGS);
        if is_time {
            *warned = Some(Instant::now());
        }
        is_time
    }
}
