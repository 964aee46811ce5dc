//! What a store is opened with beside its URL.

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::pattern::matches_pattern;

/// How a repository stores what is put. What is not said is as it is best for most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Packing {
    /// How hard zstd compresses, from 1 on; by default, 1.
    pub level: Option<u8>,
    /// Blocks of a pack, at most; by default, 64, which are also the most.
    pub blocks: Option<u8>,
}

/// Limits, and which snapshots are listed. What a store cannot use is without effect there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreOptions {
    /// Requests that are begun in a second, at most.
    pub max_requests_per_second: Option<NonZeroU32>,
    /// Blocks that are read and put at the same time, at most.
    pub max_in_flight: Option<NonZeroUsize>,
    /// Whose snapshots are listed: account ids, `self` or `amazon`; by default, one's own.
    pub owners: Vec<String>,
    /// What snapshots that are listed have to match, all of it.
    pub filters: Vec<Filter>,
    /// How long after its start a snapshot may not be found by requests about it, which are sent
    /// again until then; by default, the two minutes that EBS may need.
    pub settling: Option<Duration>,
    /// Bytes of what was put to one snapshot and is not saved yet, about, at most: those of four packs
    /// of a repository, which are the smaller. By default, those of packs of the full size, 128 MiB.
    pub max_unsaved: Option<usize>,
    /// How a repository stores what is put.
    pub packing: Packing,
    /// Nobody else writes to the store: so nothing has to decide who was first.
    pub single_writer: bool,
    /// Archives of Flexible Snapshot Proxy are read as far as they are whole.
    pub salvage: bool,
    /// Where what was learnt of a service is kept for the next process; nowhere, if there is none.
    pub state: Option<PathBuf>,
}

/// What a snapshot must match to be listed: `NAME=VALUE[,VALUE…]`, one of the values, with the names
/// of DescribeSnapshots, as `tag:Role=web`, `volume-id=vol-…` or `status=completed`. `*` stands
/// for any characters, `?` for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Its name.
    pub name: String,
    /// The values.
    pub values: Vec<String>,
}

impl Filter {
    /// Whether one of these values is one that it lets through.
    pub fn matches(&self, values: &[String]) -> bool {
        let any = |value: &String| self.values.iter().any(|v| matches_pattern(v, value));
        values.iter().any(any)
    }
}

/// A text that is no filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a filter: one is NAME=VALUE, as `tag:Role=web`")]
pub struct InvalidFilter(String);

impl FromStr for Filter {
    type Err = InvalidFilter;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((name, values)) if !name.is_empty() && name != "tag:" => Ok(Self {
                name: name.to_owned(),
                values: values.split(',').map(str::to_owned).collect(),
            }),
            _ => Err(InvalidFilter(text.to_owned())),
        }
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.values.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_and_written() {
        for (text, name, values) in [
            ("tag:Role=web", "tag:Role", &["web"][..]),
            ("tag:a=b=c", "tag:a", &["b=c"]),
            ("status=pending,error", "status", &["pending", "error"]),
            ("description=", "description", &[""]),
        ] {
            let filter: Filter = text.parse().unwrap();
            assert_eq!(
                (filter.name.as_str(), &filter.values[..]),
                (name, values.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>().as_slice())
            );
            assert_eq!(filter.to_string(), text);
        }
        for text in ["", "web", "=web", "tag:=web"] {
            assert!(text.parse::<Filter>().is_err(), "{text}");
        }
    }
}
