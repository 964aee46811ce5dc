//! The least recently used goes first.

use std::fmt;

use lru::LruCache;

use super::{Key, Value};

/// Values and reservations within a budget of bytes.
pub(super) struct Memory {
    budget: usize,
    values: LruCache<Key, (Value, usize)>,
    cached: usize,
    reserved: usize,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl Memory {
    pub(super) fn new(budget: usize) -> Self {
        Self { budget, values: LruCache::unbounded(), cached: 0, reserved: 0 }
    }

    pub(super) fn bytes(&self) -> usize {
        self.cached + self.reserved
    }

    pub(super) fn get(&mut self, key: &Key) -> Option<Value> {
        self.values.get(key).map(|(value, _)| value.clone())
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.values.contains(key)
    }

    /// Adds a value of `weight` bytes. One that is larger than the budget is not kept.
    pub(super) fn insert(&mut self, key: Key, value: Value, weight: usize) {
        self.remove(&key);
        self.cached += weight;
        self.values.put(key, (value, weight));
        self.shrink();
    }

    pub(super) fn remove(&mut self, key: &Key) {
        if let Some((_, weight)) = self.values.pop(key) {
            self.cached -= weight;
        }
    }

    /// Takes `bytes` of the budget for something that is not a value yet.
    pub(super) fn reserve(&mut self, bytes: usize) {
        self.reserved += bytes;
        self.shrink();
    }

    pub(super) fn release(&mut self, bytes: usize) {
        self.reserved -= bytes;
    }

    fn shrink(&mut self) {
        while self.bytes() > self.budget {
            let Some((_, (_, weight))) = self.values.pop_lru() else { break };
            self.cached -= weight;
        }
    }
}
