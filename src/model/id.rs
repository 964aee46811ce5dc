//! The name of a snapshot.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest snapshot id in characters (EBS direct service model).
const MAX_LEN: usize = 64;

/// The id of a snapshot: `snap-` and lower-case hexadecimal digits, at most 64 characters.
///
/// The pattern is that of the EBS direct service model, so an id never holds a character that
/// means something in a path or a URL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(Arc<str>);

/// A text that is no snapshot id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a snapshot id: one is `snap-` and hexadecimal digits in lower case, at most {MAX_LEN} characters"
)]
pub struct InvalidSnapshotId(String);

impl SnapshotId {
    /// A new random id in the form that EC2 gives: `snap-0` and 16 digits.
    pub fn random() -> Self {
        let (random, _) = uuid::Uuid::new_v4().as_u64_pair();
        // The version bits of the UUID are fixed; the other half has the variant bits. Mix both.
        let (_, low) = uuid::Uuid::new_v4().as_u64_pair();
        Self(format!("snap-0{:016x}", random ^ low.rotate_left(32)).into())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SnapshotId {
    type Err = InvalidSnapshotId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = text.len() <= MAX_LEN
            && text.strip_prefix("snap-").is_some_and(|digits| {
                !digits.is_empty()
                    && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
            });
        if valid { Ok(Self(text.into())) } else { Err(InvalidSnapshotId(text.to_owned())) }
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = InvalidSnapshotId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.as_str().to_owned()
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_the_pattern_of_the_service() {
        for good in ["snap-0123456789abcdef0", "snap-0", &format!("snap-{}", "a".repeat(59))] {
            assert_eq!(good.parse::<SnapshotId>().unwrap().as_str(), good);
        }
        let long = format!("snap-{}", "a".repeat(60));
        for bad in ["", "snap-", "snap-xyz", "snap-0A", "vol-01", "snap-0/../0", "snap-0\n", &long]
        {
            assert!(bad.parse::<SnapshotId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn random_ids_are_valid_and_differ() {
        let (one, two) = (SnapshotId::random(), SnapshotId::random());
        assert_ne!(one, two);
        assert_eq!(one.as_str().parse::<SnapshotId>().unwrap(), one);
        assert_eq!(one.as_str().len(), "snap-0123456789abcdef0".len());
    }
}
