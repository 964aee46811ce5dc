//! Open directories: one list for all who open the same, and so many for each user.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::catalog::Catalog;
use super::node::Node;
use super::{DirectoryEntry, Error, Result};

/// Directories that one user has open at most. A program has as many files open unless it asks for more.
const OPEN: usize = 1024;

/// What is open.
#[derive(Debug, Default)]
pub(super) struct Directories(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Lists of names that somebody has open, by the inode number of the directory.
    lists: HashMap<u64, List>,
    /// How many each user has open.
    of_users: HashMap<u32, usize>,
}

/// A list, and what it was made of.
#[derive(Debug)]
struct List {
    catalog: Weak<Catalog>,
    entries: Weak<Vec<DirectoryEntry>>,
}

/// An open directory.
#[derive(Debug)]
pub(super) struct OpenDirectory {
    pub(super) entries: Arc<Vec<DirectoryEntry>>,
    _counted: Counted,
}

/// One of those that a user has open.
#[derive(Debug)]
struct Counted {
    directories: Arc<Directories>,
    uid: u32,
}

impl Directories {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a directory for a user; `entries` makes its list, if nobody has that of this catalog open.
    ///
    /// # Errors
    ///
    /// [`Error::TooMany`] if the user has too many open.
    pub(super) fn open(
        self: &Arc<Self>,
        uid: u32,
        node: &Node,
        catalog: Option<&Arc<Catalog>>,
        entries: impl FnOnce() -> Vec<DirectoryEntry>,
    ) -> Result<OpenDirectory> {
        let mut state = self.state();
        let open = state.of_users.entry(uid).or_default();
        if *open == OPEN {
            return Err(Error::TooMany);
        }
        *open += 1;
        let counted = Counted { directories: Arc::clone(self), uid };
        let Some(catalog) = catalog else {
            drop(state);
            return Ok(OpenDirectory { entries: Arc::new(entries()), _counted: counted });
        };
        let catalog = Arc::downgrade(catalog);
        let list = state.lists.get(&node.ino()).filter(|list| list.catalog.ptr_eq(&catalog));
        let entries = list.and_then(|list| list.entries.upgrade()).unwrap_or_else(|| {
            let entries = Arc::new(entries());
            let list = List { catalog, entries: Arc::downgrade(&entries) };
            state.lists.retain(|_, list| list.entries.strong_count() > 0);
            state.lists.insert(node.ino(), list);
            entries
        });
        Ok(OpenDirectory { entries, _counted: counted })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut state = self.directories.state();
        if let Some(open) = state.of_users.get_mut(&self.uid) {
            *open -= 1;
            if *open == 0 {
                state.of_users.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Kind;

    fn entries() -> Vec<DirectoryEntry> {
        vec![DirectoryEntry { name: ".".to_owned(), ino: 1, kind: Kind::Directory, node: None }]
    }

    #[test]
    fn a_list_is_made_once_for_all_who_have_it_open() {
        let (directories, catalog) = (Arc::new(Directories::default()), Arc::default());
        let open = |uid, node: &Node, catalog: &Arc<Catalog>| {
            directories.open(uid, node, Some(catalog), entries).unwrap().entries
        };
        let first = directories.open(0, &Node::Root, Some(&catalog), entries).unwrap();
        assert!(Arc::ptr_eq(&first.entries, &open(1, &Node::Root, &catalog)));
        assert!(!Arc::ptr_eq(&first.entries, &open(1, &Node::ByName, &catalog)));
        // After a change it is another one.
        let changed = Arc::default();
        let second = directories.open(0, &Node::Root, Some(&changed), entries).unwrap();
        assert!(!Arc::ptr_eq(&first.entries, &second.entries));
        drop((first, second));
        open(0, &Node::ByTag, &catalog);
        assert_eq!(directories.state().lists.len(), 1);
        assert!(directories.state().of_users.is_empty());
    }

    #[test]
    fn a_user_who_has_too_many_open_keeps_nobody_else_from_opening_one() {
        let directories = Arc::new(Directories::default());
        let open = |uid| directories.open(uid, &Node::Jobs, None, entries);
        let mut all: Vec<_> = (0..OPEN).map(|_| open(7).unwrap()).collect();
        assert!(matches!(open(7), Err(Error::TooMany)));
        drop(open(8).unwrap());
        all.pop();
        all.push(open(7).unwrap());
        assert!(matches!(open(7), Err(Error::TooMany)));
    }
}
