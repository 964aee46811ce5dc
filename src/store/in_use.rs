//! What is opened once, for all who use it at the same time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::Result;

/// Things by what they are opened with. A thing is here as long as somebody uses it.
#[derive(Debug)]
pub(super) struct InUse<K, V>(Mutex<HashMap<K, Arc<Place<V>>>>);

/// Locked by the one who opens what belongs there.
type Place<V> = tokio::sync::Mutex<Weak<V>>;

impl<K, V> Default for InUse<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V> InUse<K, V> {
    /// What is in use under this key, else what `open` gives. Others who ask meanwhile wait for that.
    ///
    /// # Errors
    ///
    /// Those of `open`. They are not remembered: whoever asks next opens it again.
    pub(super) async fn get(
        &self,
        key: K,
        open: impl Future<Output = Result<Arc<V>>>,
    ) -> Result<Arc<V>> {
        let place = self.place(key);
        let mut thing = place.lock().await;
        if let Some(thing) = thing.upgrade() {
            return Ok(thing);
        }
        let opened = open.await?;
        *thing = Arc::downgrade(&opened);
        Ok(opened)
    }

    fn place(&self, key: K) -> Arc<Place<V>> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // One that somebody waits for is held by them too.
        places.retain(|_, place| {
            Arc::strong_count(place) > 1
                || place.try_lock().is_ok_and(|thing| thing.strong_count() > 0)
        });
        Arc::clone(places.entry(key).or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::store::{Error, ErrorKind};

    /// Opens things, and counts them.
    #[derive(Default)]
    struct Opener(AtomicUsize);

    impl Opener {
        async fn open(&self) -> Result<Arc<usize>> {
            tokio::task::yield_now().await;
            Ok(Arc::new(self.0.fetch_add(1, Ordering::Relaxed)))
        }
    }

    fn failure() -> Error {
        Error::new(ErrorKind::Unavailable, "it cannot be opened")
    }

    #[tokio::test]
    async fn opens_once_for_all_who_ask_at_the_same_time() {
        let (things, opener) = (InUse::default(), Opener::default());
        let all = (0..8).map(|_| things.get("a", opener.open()));
        let all = futures::future::try_join_all(all).await.unwrap();
        assert!(all.iter().all(|thing| **thing == 0));
        assert_eq!(*things.get("b", opener.open()).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn lets_go_of_what_nobody_uses() {
        let (things, opener) = (InUse::default(), Opener::default());
        let (a, b) = (things.get("a", opener.open()).await, things.get("b", opener.open()).await);
        drop(a);
        assert_eq!(*things.get("c", opener.open()).await.unwrap(), 2);
        assert!(!things.0.lock().unwrap().contains_key("a"));
        assert_eq!(*things.get("a", opener.open()).await.unwrap(), 3);
        assert_eq!(*things.get("b", opener.open()).await.unwrap(), *b.unwrap());
    }

    #[tokio::test]
    async fn a_failure_and_one_who_goes_away_are_not_remembered() {
        let (things, opener) = (InUse::default(), Opener::default());
        assert!(things.get("a", async { Err(failure()) }).await.is_err());
        let never = things.get("a", std::future::pending());
        let never = tokio::time::timeout(std::time::Duration::from_millis(1), never).await;
        assert!(never.is_err());
        let opened = things.get("a", opener.open()).await;
        let opened = opened.unwrap();
        assert!(Arc::ptr_eq(&opened, &things.get("a", opener.open()).await.unwrap()));
    }
}
