//! Neighbours in one request: parts of an object that are wanted at the same time, and lie next to each other.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::Bucket;
use crate::model::BLOCK_SIZE;
use crate::store::{Error, ErrorKind, Result};

/// How long a part that no program waits for waits for its neighbours. Who wants several asks for all of them at once.
const LINGER: Duration = Duration::from_millis(2);

/// Bytes of one request for several parts, at most. Beyond it there are several requests: a transfer holds 64 MiB, and
/// some of them are to be under way at the same time.
const MOST: usize = 8 << 20;

/// Blocks that are worth asking for at the same time.
pub(super) const NEIGHBOURS: usize = MOST / BLOCK_SIZE;

/// A part of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Part {
    pub(super) offset: u64,
    pub(super) len: usize,
}

impl Part {
    pub(super) fn end(self) -> u64 {
        self.offset + self.len as u64
    }
}

/// A part that somebody waits for.
#[derive(Debug)]
struct Wanted {
    part: Part,
    tell: oneshot::Sender<Told>,
}

/// What one who waits for a part is told.
#[derive(Debug)]
enum Told {
    /// The part, or why it cannot be had.
    Read(Result<Bytes>),
    /// To ask for it, and for those behind it.
    Ask(Vec<Wanted>),
}

/// The parts that wait for their neighbours, by the name of their object.
#[derive(Debug, Default)]
pub(super) struct Gatherer(Mutex<HashMap<String, Vec<Wanted>>>);

impl Gatherer {
    fn waiting(&self) -> MutexGuard<'_, HashMap<String, Vec<Wanted>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a part wait. Whoever is the first for its object gets what ends the waiting of all.
    fn join<'a>(&'a self, name: &'a str, wanted: Wanted) -> Option<Gathering<'a>> {
        let mut waiting = self.waiting();
        if let Some(others) = waiting.get_mut(name) {
            others.push(wanted);
            return None;
        }
        waiting.insert(name.to_owned(), vec![wanted]);
        Some(Gathering { gatherer: self, name })
    }
}

/// The parts of one object that wait until this is dropped, whoever has gone away by then.
struct Gathering<'a> {
    gatherer: &'a Gatherer,
    name: &'a str,
}

impl Drop for Gathering<'_> {
    fn drop(&mut self) {
        let gathered = self.gatherer.waiting().remove(self.name).unwrap_or_default();
        for mut run in runs(gathered) {
            while !run.is_empty() {
                let first = run.remove(0);
                match first.tell.send(Told::Ask(run)) {
                    // It does not wait any more: the next one asks.
                    Err(Told::Ask(rest)) => run = rest,
                    _ => break,
                }
            }
        }
    }
}

/// Those that lie next to each other, or are the same, together; each within the bound, if it has several parts.
fn runs(mut wanted: Vec<Wanted>) -> Vec<Vec<Wanted>> {
    wanted.sort_by_key(|wanted| wanted.part);
    let mut runs: Vec<(Part, Vec<Wanted>)> = Vec::new();
    for wanted in wanted {
        let part = wanted.part;
        if let Some((whole, run)) = runs.last_mut()
            && part.offset <= whole.end()
            && part.end() <= whole.offset + MOST as u64
        {
            whole.len = (part.end().max(whole.end()) - whole.offset) as usize;
            run.push(wanted);
        } else {
            runs.push((part, vec![wanted]));
        }
    }
    runs.into_iter().map(|(_, run)| run).collect()
}

impl Bucket {
    /// Reads a part of an object, together with its neighbours if they are wanted within a moment.
    ///
    /// # Errors
    ///
    /// As [`part`](Self::part). What is wrong with one does not concern the others.
    pub(super) async fn gathered(&self, name: &str, part: Part) -> Result<Bytes> {
        let (tell, told) = oneshot::channel();
        if let Some(gathering) = self.gatherer.join(name, Wanted { part, tell }) {
            tokio::time::sleep(LINGER).await;
            drop(gathering);
        }
        match told.await {
            Ok(Told::Read(read)) => read,
            Ok(Told::Ask(others)) if !others.is_empty() => self.ask(name, part, others).await,
            // There are no others, or who asked for all has gone away.
            _ => self.part(name, part).await,
        }
    }

    /// Reads a part, and those behind it for others.
    async fn ask(&self, name: &str, part: Part, others: Vec<Wanted>) -> Result<Bytes> {
        let end = others.iter().map(|other| other.part.end()).fold(part.end(), u64::max);
        let whole = Part { offset: part.offset, len: (end - part.offset) as usize };
        let read = self.part(name, whole).await;
        if read.as_ref().is_err_and(|error| error.kind() == ErrorKind::Corrupt) {
            // The object ends before: each finds out for itself whether that concerns it.
            drop(others);
            return self.part(name, part).await;
        }
        for other in others {
            let start = (other.part.offset - part.offset) as usize;
            let theirs = match &read {
                Ok(bytes) => Ok(bytes.slice(start..start + other.part.len)),
                Err(error) => Err(Error::new(error.kind(), error.to_string())),
            };
            // Who does not wait any more needs no answer.
            let _ = other.tell.send(Told::Read(theirs));
        }
        Ok(read?.slice(..part.len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(parts: &[(u64, usize)]) -> (Vec<Wanted>, Vec<oneshot::Receiver<Told>>) {
        let of = |&(offset, len): &_| {
            let (tell, told) = oneshot::channel();
            (Wanted { part: Part { offset, len }, tell }, told)
        };
        parts.iter().map(of).unzip()
    }

    #[test]
    fn neighbours_are_gathered_within_a_bound() {
        let lens =
            |parts: &[(u64, usize)]| runs(wanted(parts).0).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(lens(&[(20, 10), (0, 10), (10, 10)]), [3]);
        assert_eq!(lens(&[(0, 10), (11, 10)]), [1, 1]);
        assert_eq!(lens(&[(0, 10), (0, 10), (10, 5)]), [3]);
        let blocks: Vec<_> = (0..40).map(|n| (n * BLOCK_SIZE as u64, BLOCK_SIZE)).collect();
        assert_eq!(lens(&blocks), [16, 16, 8]);
        assert_eq!(lens(&[(0, 2 * MOST), (2 * MOST as u64, 1)]), [1, 1]);
    }

    #[tokio::test]
    async fn one_of_those_who_still_wait_asks_for_all() {
        let gatherer = Gatherer::default();
        let (wanted, mut told) = wanted(&[(0, 10), (10, 10), (20, 10)]);
        let mut gathering = wanted.into_iter().filter_map(|wanted| gatherer.join("pack", wanted));
        let first = gathering.next().unwrap();
        assert!(gathering.next().is_none());
        told.remove(0);
        drop(first);
        let Ok(Told::Ask(others)) = told.remove(0).await else { panic!("it is to ask") };
        assert_eq!(others.iter().map(|other| other.part.offset).collect::<Vec<_>>(), [20]);
        // Without an answer it is known that nobody asks.
        drop(others);
        assert!(told.remove(0).await.is_err());
        assert!(gatherer.waiting().is_empty());
    }
}
