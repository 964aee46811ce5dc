//! What goes wrong in a store, as outcomes that a caller can act on.

use std::error::Error as StdError;
use std::fmt;

/// What came of a call to a store.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such thing.
    NotFound,
    /// The caller may not do this. Trying again does not help.
    Denied,
    /// The caller is nobody that the store knows, or not any more. With new credentials it may be done.
    Credentials,
    /// Too many requests. Trying again later helps.
    Throttled,
    /// A token does not work, or no longer: list again.
    ExpiredToken,
    /// It is not in a state in which this can be done, but may come to be.
    NotReady,
    /// Somebody else did something that excludes this.
    Conflict,
    /// A quota is used up.
    Quota,
    /// A disk is full.
    NoRoom,
    /// Data is not what it was when it was written.
    Corrupt,
    /// The store cannot be reached, or failed inside. Trying again may help.
    Unavailable,
    /// No answer within the deadline.
    Timeout,
    /// The store cannot do this at all.
    Unsupported,
    /// The request makes no sense.
    Invalid,
}

impl ErrorKind {
    /// Whether a request was refused for what it asks for: another one may be taken.
    pub(crate) fn refuses_as_asked(self) -> bool {
        matches!(self, Self::Invalid | Self::NotFound | Self::NotReady | Self::Unsupported)
    }
}

/// An error of a store: its message names the snapshot, block or path, and what to do.
///
/// `Display` gives the message and the chain of its causes, on one line.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error with no cause but itself.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// An error with a cause.
    pub fn with_source(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    /// An error of the operating system, classified by its code.
    pub fn from_io(message: impl Into<String>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match source.kind() {
            Io::NotFound => ErrorKind::NotFound,
            Io::PermissionDenied | Io::ReadOnlyFilesystem => ErrorKind::Denied,
            Io::StorageFull => ErrorKind::NoRoom,
            Io::QuotaExceeded => ErrorKind::Quota,
            Io::AlreadyExists => ErrorKind::Conflict,
            Io::TimedOut => ErrorKind::Timeout,
            Io::InvalidData => ErrorKind::Corrupt,
            _ => ErrorKind::Unavailable,
        };
        Self::with_source(kind, message, source)
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error, as another kind: what it means follows from what was asked.
    #[must_use]
    pub fn of_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The same error, with what was being done in front of its message.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut cause = self.source.as_deref().map(|source| source as &dyn StdError);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

// `source()` stays empty: the causes are part of the message, and would be printed twice.
impl StdError for Error {}

/// An error with its causes.
pub(crate) fn causes(error: &(dyn StdError + 'static)) -> String {
    let mut texts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        texts.push(error.to_string());
        cause = error.source();
    }
    texts.dedup();
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_tells_the_whole_chain_once() {
        let io = std::io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::from_io("cannot write packs/00/x", io).context("put block 7 of snap-0a");
        assert_eq!(error.kind(), ErrorKind::NoRoom);
        assert_eq!(
            error.to_string(),
            "put block 7 of snap-0a: cannot write packs/00/x: No space left on device (os error 28)"
        );
        assert!(StdError::source(&error).is_none());
    }
}
