//! Small JSON objects with their checksum.
//!
//! The first line is the JSON value, the second the JSON string `"sha256:<hex>"` with the SHA-256
//! of the first line without its newline.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Error, ErrorKind, Result};
use crate::model::Digest;

/// The bytes of a document.
pub(crate) fn encode<T: Serialize>(value: &T) -> Bytes {
    seal(serde_json::to_vec(value).expect("our documents have string keys only"))
}

/// The document of a line.
pub(crate) fn seal(mut text: Vec<u8>) -> Bytes {
    let digest = Digest::of(&text);
    text.extend_from_slice(format!("\n\"sha256:{digest}\"\n").as_bytes());
    text.into()
}

/// Reads a document; `name` is for the error.
///
/// # Errors
///
/// [`ErrorKind::Corrupt`] if it is not what was written.
pub(crate) fn decode<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T> {
    let damaged = |why: &str| Error::new(ErrorKind::Corrupt, format!("{name} is damaged: {why}"));
    let end = bytes.iter().position(|&b| b == b'\n').ok_or_else(|| damaged("it is truncated"))?;
    let (line, rest) = bytes.split_at(end);
    if rest != format!("\n\"sha256:{}\"\n", Digest::of(line)).as_bytes() {
        return Err(damaged("its checksum does not match"));
    }
    serde_json::from_slice(line)
        .map_err(|e| Error::with_source(ErrorKind::Corrupt, format!("{name} is damaged"), e))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn goes_there_and_back() {
        let bytes = encode(&("line\nfeed", 7));
        assert_eq!(decode::<(String, u32)>("x", &bytes).unwrap(), ("line\nfeed".to_owned(), 7));
    }

    proptest! {
        #[test]
        fn any_change_is_seen(at in 0..1000usize, bit in 0..8u32, cut in any::<bool>()) {
            let mut bytes = encode(&vec![1, 2, 3]).to_vec();
            let at = at % bytes.len();
            if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
            let error = decode::<Vec<u32>>("x", &bytes).unwrap_err();
            prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }
}
