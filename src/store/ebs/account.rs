//! What all share who use one account: the clients, the limiter, and what is known of its snapshots.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::clients::Clients;
use super::tokens::Tokens;
use super::{EbsUrl, MAX_STARTED, Started};
use crate::model::SnapshotId;
use crate::store::aws::account::{Account as _, Shared};
use crate::store::aws::{self, http};
use crate::store::in_use::InUse;
use crate::store::limiter::Limiter;
use crate::store::{Error, ErrorKind, Result};

/// An account, as far as it can be told without asking anybody (else a profile), in one region, at one endpoint.
#[derive(Debug)]
pub(crate) struct Account {
    /// Where the configuration is read again; `None` if it was given.
    url: Option<EbsUrl>,
    shared: Shared<Clients>,
    started: Mutex<LruCache<SnapshotId, Started>>,
    pub(super) tokens: Tokens,
}

impl Account {
    /// One that is shared with nobody else.
    pub(super) fn alone(clients: Clients) -> Self {
        let limiter = Arc::new(Limiter::new(clients.is_aws()));
        Self::new(None, clients, limiter)
    }

    fn new(url: Option<EbsUrl>, clients: Clients, limiter: Arc<Limiter>) -> Self {
        Self {
            url,
            shared: Shared::new(clients, limiter),
            started: Mutex::new(LruCache::new(MAX_STARTED)),
            tokens: Tokens::new(),
        }
    }

    /// The snapshots that were started here.
    pub(super) fn started(&self) -> MutexGuard<'_, LruCache<SnapshotId, Started>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The region, the endpoints and the account, as far as they can be told without asking anybody.
    pub(super) fn place(&self) -> String {
        place(&self.clients(), self.url.as_ref())
    }
}

impl aws::account::Account for Account {
    type Clients = Clients;

    fn clients(&self) -> Arc<Clients> {
        self.shared.clients()
    }

    async fn renew(&self, old: &Arc<Clients>) {
        if let Some(url) = &self.url {
            // What reads the configuration is large.
            self.shared.renew(old, Box::pin(Clients::new(url))).await;
        }
    }

    fn limiter(&self) -> Arc<Limiter> {
        self.shared.limiter()
    }

    fn may_warn(&self) -> bool {
        self.shared.may_warn()
    }
}

fn place(clients: &Clients, url: Option<&EbsUrl>) -> String {
    let profile = url.and_then(|url| url.profile.as_deref());
    clients.place(profile, |name| std::env::var(name).ok())
}

/// The accounts that are in use.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    by_url: InUse<EbsUrl, Account>,
    /// With the profile that the URL names: whoever names one has its credentials and no others.
    by_place: InUse<(String, Option<String>), Account>,
    /// By their place alone: a quota is spent by all, wherever their credentials come from.
    limiters: InUse<String, Limiter>,
}

impl Accounts {
    /// The account that `url` leads to. No request is made to it yet.
    ///
    /// # Errors
    ///
    /// `Invalid` if the environment names a proxy or certificates that cannot be used.
    pub(crate) async fn of(&self, url: &EbsUrl) -> Result<Arc<Account>> {
        // What reads the configuration is large.
        self.by_url.get(url.clone(), Box::pin(self.find(url))).await
    }

    /// Reads the configuration, and looks where that leads.
    async fn find(&self, url: &EbsUrl) -> Result<Arc<Account>> {
        http::settings().map_err(|why| Error::new(ErrorKind::Invalid, why))?;
        let clients = Clients::new(url).await;
        clients.check()?;
        tracing::debug!("{url} is in {}", clients.region);
        let place = place(&clients, Some(url));
        let new = async {
            let limiter = async { Ok(Arc::new(Limiter::new(clients.is_aws()))) };
            let limiter = self.limiters.get(place.clone(), limiter).await?;
            Ok(Arc::new(Account::new(Some(url.clone()), clients, limiter)))
        };
        self.by_place.get((place.clone(), url.profile.clone()), new).await
    }
}
