//! Tokens: what a listing gives out, and takes back only as it was, for what it was, in time.
//!
//! A token is its kind, the time at which it ends, what it stands for, and a MAC over all that and
//! over what it is about, in base64. Nothing is remembered of it: every server that was started
//! with the same keys over the same store takes it.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use jiff::Timestamp;
use sha2::Sha256;

use crate::model::{BlockIndex, Snapshot, SnapshotId};

/// Bytes of the MAC: 128 bits of a SHA-256 HMAC.
const MAC_LEN: usize = 16;

/// Longest token in characters (service model).
const MAX_TOKEN: usize = 256;

/// How long a block token is good: seven days (EBS user guide).
const BLOCK_LIFE: Duration = Duration::from_hours(168);

/// How long a page token is good: sixty minutes (EBS user guide).
const PAGE_LIFE: Duration = Duration::from_hours(1);

/// A snapshot, and when it was started: an id may be used again, by another one.
#[derive(Clone, Copy, Debug)]
pub(in crate::serve) struct Of<'a>(&'a SnapshotId, Timestamp);

impl<'a> From<&'a Snapshot> for Of<'a> {
    fn from(snapshot: &'a Snapshot) -> Self {
        Self(&snapshot.id, snapshot.start_time)
    }
}

impl Of<'_> {
    fn feed(self, mac: &mut Hmac<Sha256>) {
        mac.update(&self.1.as_nanosecond().to_be_bytes());
        // Ids hold no zero byte, so nothing can be moved from one to the other.
        mac.update(self.0.as_str().as_bytes());
        mac.update(&[0]);
    }
}

/// What a token is about.
#[derive(Clone, Copy, Debug)]
pub(in crate::serve) enum About<'a> {
    /// A block of a snapshot.
    Block(Of<'a>, BlockIndex),
    /// The next page of a listing.
    Blocks(Of<'a>),
    /// The next page of a comparison.
    Changes(Of<'a>, Of<'a>),
    /// The next page of an answer of EC2.
    Query(&'a str),
}

impl About<'_> {
    fn kind(self) -> u8 {
        match self {
            Self::Block(..) => 1,
            Self::Blocks(_) => 2,
            Self::Changes(..) => 3,
            Self::Query(_) => 4,
        }
    }

    fn feed(self, mac: &mut Hmac<Sha256>) {
        match self {
            Self::Block(of, index) => {
                mac.update(&index.0.to_be_bytes());
                of.feed(mac);
            }
            Self::Blocks(of) => of.feed(mac),
            Self::Changes(first, second) => {
                first.feed(mac);
                second.feed(mac);
            }
            Self::Query(action) => mac.update(action.as_bytes()),
        }
        mac.update(&[0, self.kind()]);
    }
}

/// Makes and checks tokens.
pub(in crate::serve) struct Tokens {
    mac: Hmac<Sha256>,
    block_life: Duration,
    page_life: Duration,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").finish_non_exhaustive()
    }
}

impl Tokens {
    /// Tokens of the store `name`, made with `secrets`.
    pub(in crate::serve) fn new(name: &str, secrets: &[&str]) -> Self {
        let mut key = Hmac::<Sha256>::new_from_slice(b"fspfs serve tokens").expect("any length");
        for part in std::iter::once(&name).chain(secrets) {
            key.update(part.as_bytes());
            key.update(&[0]);
        }
        let key = key.finalize().into_bytes();
        Self {
            mac: Hmac::new_from_slice(&key).expect("any length"),
            block_life: BLOCK_LIFE,
            page_life: PAGE_LIFE,
        }
    }

    /// Lets tokens end earlier.
    pub(in crate::serve) fn shorten(&mut self, block: Option<Duration>, page: Option<Duration>) {
        self.block_life = block.unwrap_or(self.block_life);
        self.page_life = page.unwrap_or(self.page_life);
    }

    /// How long a block token is good.
    pub(super) fn block_life(&self) -> Duration {
        self.block_life
    }

    /// A token about something that stands for `inner`; `None` if that is too long for one.
    pub(in crate::serve) fn seal(&self, about: About<'_>, inner: &[u8]) -> Option<String> {
        let life = if matches!(about, About::Block(..)) { self.block_life } else { self.page_life };
        let ends = u64::try_from(now().saturating_add(life).as_millis()).unwrap_or(u64::MAX);
        let mut token = Vec::with_capacity(1 + 8 + inner.len() + MAC_LEN);
        token.push(about.kind());
        token.extend_from_slice(&ends.to_be_bytes()[2..]);
        token.extend_from_slice(inner);
        let mac = self.mac_of(about, &token).finalize().into_bytes();
        token.extend_from_slice(&mac[..MAC_LEN]);
        let text = STANDARD.encode(token);
        (text.len() <= MAX_TOKEN).then_some(text)
    }

    /// What a token stands for; `None` if it was not made here, is about something else, or has
    /// ended.
    pub(in crate::serve) fn open(&self, about: About<'_>, text: &str) -> Option<Vec<u8>> {
        if text.len() > MAX_TOKEN {
            return None;
        }
        let token = STANDARD.decode(text).ok()?;
        let (signed, mac) = token.split_at_checked(token.len().checked_sub(MAC_LEN)?)?;
        self.mac_of(about, signed).verify_truncated_left(mac).ok()?;
        let mut ends = [0; 8];
        ends[2..].copy_from_slice(signed.get(1..7)?);
        (now() <= Duration::from_millis(u64::from_be_bytes(ends))).then(|| signed[7..].to_vec())
    }

    fn mac_of(&self, about: About<'_>, token: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(token);
        mac.update(&[0]);
        about.feed(&mut mac);
        mac
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> SnapshotId {
        text.parse().unwrap()
    }

    #[test]
    fn a_token_opens_for_what_it_is_about_alone() {
        let tokens = Tokens::new("store", &["secret"]);
        let (a, b) = (id("snap-0a"), id("snap-0b"));
        let (a, b) = (Of(&a, Timestamp::UNIX_EPOCH), Of(&b, Timestamp::UNIX_EPOCH));
        let again = Of(a.0, Timestamp::MAX);
        let about = About::Block(a, BlockIndex(7));
        let token = tokens.seal(about, b"inner").unwrap();
        assert_eq!(tokens.open(about, &token).unwrap(), b"inner");
        for other in [
            About::Block(a, BlockIndex(8)),
            About::Block(again, BlockIndex(7)),
            About::Block(b, BlockIndex(7)),
            About::Blocks(a),
            About::Changes(a, b),
            About::Query("DescribeSnapshots"),
        ] {
            assert!(tokens.open(other, &token).is_none(), "{other:?}");
        }
        assert!(Tokens::new("store", &["other"]).open(about, &token).is_none());
        assert!(Tokens::new("other", &["secret"]).open(about, &token).is_none());
        assert!(Tokens::new("store", &["secret"]).open(about, &token).is_some());
    }

    #[test]
    fn a_changed_or_cut_token_does_not_open() {
        let tokens = Tokens::new("store", &[]);
        let a = id("snap-0a");
        let a = Of(&a, Timestamp::UNIX_EPOCH);
        let token = tokens.seal(About::Blocks(a), &[0, 0, 0, 9]).unwrap();
        for at in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert!(tokens.open(About::Blocks(a), &changed).is_none(), "{at}");
            assert!(tokens.open(About::Blocks(a), &token[..at]).is_none(), "{at}");
        }
        assert!(tokens.open(About::Blocks(a), &"A".repeat(1000)).is_none());
    }

    #[test]
    fn a_token_ends() {
        let mut tokens = Tokens::new("store", &[]);
        tokens.shorten(Some(Duration::ZERO), None);
        let a = id("snap-0a");
        let a = Of(&a, Timestamp::UNIX_EPOCH);
        let token = tokens.seal(About::Block(a, BlockIndex(0)), b"").unwrap();
        std::thread::sleep(Duration::from_millis(2));
        assert!(tokens.open(About::Block(a, BlockIndex(0)), &token).is_none());
        let page = tokens.seal(About::Blocks(a), b"").unwrap();
        assert!(tokens.open(About::Blocks(a), &page).is_some());
    }

    #[test]
    fn what_does_not_fit_has_no_token() {
        let tokens = Tokens::new("store", &[]);
        assert!(tokens.seal(About::Query("DescribeTags"), &[0; 169]).is_some());
        assert!(tokens.seal(About::Query("DescribeTags"), &[0; 170]).is_none());
    }
}
