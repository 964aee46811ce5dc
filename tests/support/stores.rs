//! Snapshots in several stores.

use serde_json::Value;

use super::{Sandbox, names, run, same, text};

impl Sandbox {
    /// The URL of the store that is served.
    pub fn here(&self) -> String {
        format!("ebs://us-east-1?endpoint={}", self.service().url)
    }

    /// What `fspfs list --json` has of a snapshot of a store.
    #[track_caller]
    pub fn described_in(&self, store: &str, id: &str) -> Value {
        let list: Value = serde_json::from_str(&self.ok(&["-s", store, "list", "--json"])).unwrap();
        let found = list.as_array().unwrap().iter().find(|snapshot| snapshot["id"] == id);
        found.unwrap_or_else(|| panic!("{id} is not in {list}")).clone()
    }

    /// Downloads a snapshot of a store, which must be what is in a file of this directory.
    #[track_caller]
    pub fn assert_holds_in(&self, store: &str, id: &str, file: &str) {
        self.ok(&["-s", store, "download", id, "out.img"]);
        assert!(same(self.join(file), self.join("out.img")), "{id} in {store} is not {file}");
    }

    /// What the doctor says of a store: its checks.
    #[track_caller]
    pub fn doctor(&self, store: &str) -> Vec<Value> {
        let output = run(self.fspfs().args(["-s", store, "doctor", "--json"]));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output)))
    }

    /// How many snapshots a store has.
    #[track_caller]
    pub fn count_in(&self, store: &str) -> usize {
        self.ok(&["-s", store, "-q", "list"]).lines().count()
    }

    /// Blocks that are on record in journals.
    pub fn noted(&self) -> usize {
        let journals = self.join("state/fspfs/transfers");
        if !journals.exists() {
            return 0;
        }
        let noted = names(&journals).into_iter().map(|name| {
            let slots = std::fs::read(journals.join(name).join("blocks")).unwrap_or_default();
            slots.chunks_exact(40).filter(|slot| slot[..32].iter().any(|&byte| byte != 0)).count()
        });
        noted.sum()
    }

    /// That no transfer has left a journal.
    #[track_caller]
    pub fn assert_no_journal_is_left(&self) {
        assert!(names(self.join("state/fspfs/transfers")).is_empty());
    }
}
