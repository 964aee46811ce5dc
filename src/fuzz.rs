//! What reads the bytes of others, over arbitrary bytes: for `fuzz/` and for the tests.

use futures::FutureExt as _;

pub use crate::image::staging::fuzz::staging;
use crate::ops::table;
pub use crate::serve::fuzz::request_from as requests;
use crate::store::StoreUrl;
pub use crate::store::ebs::ec2::fuzz::answers;
pub use crate::store::repository::fuzz::format;

/// Answers of the EBS direct APIs and of S3: a byte tells of which, another one to what, a third one the status; lines of
/// headers follow up to an empty one, then the body.
pub fn services(data: &[u8]) {
    let Some((&which, data)) = data.split_first() else { return };
    let _ = match which % 2 {
        0 => crate::store::ebs::fuzz::blocks(data),
        _ => crate::store::repository::fuzz::bucket(data),
    };
}

/// Lines of the files in `control/`, after a byte that tells which, and URLs of stores.
pub fn control(data: &[u8]) {
    let Some((&which, line)) = data.split_first() else { return };
    let Ok(line) = std::str::from_utf8(line) else { return };
    let mut operations = table::in_control();
    if let Some(operation) = operations.nth(usize::from(which) % 24) {
        let _ = operation.parse(line);
    } else if let Ok(url) = line.parse::<StoreUrl>() {
        assert_eq!(url.to_string().parse::<StoreUrl>().as_ref(), Ok(&url), "{url}");
    }
}

/// Images, as a commit looks at them: the gibibytes of their length, then what they begin with.
pub fn images(data: &[u8]) {
    /// What is read at once, whatever the image says.
    const MOST: usize = 4 << 20;
    let Some((&gib, data)) = data.split_first() else { return };
    let len = (u64::from(gib) << 30) + data.len() as u64;
    let read = |offset: u64, wanted: usize| {
        assert!(wanted <= MOST, "{wanted} bytes are wanted at once");
        let wanted = wanted.min(usize::try_from(len.saturating_sub(offset)).unwrap_or(wanted));
        let mut bytes = vec![0; wanted];
        let inside = data.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
        let part = inside.len().min(wanted);
        bytes[..part].copy_from_slice(&inside[..part]);
        std::future::ready(Ok::<_, std::convert::Infallible>(bytes.into()))
    };
    let found = crate::claim::look(len, read).now_or_never().expect("nothing is waited for");
    let Ok(found) = found;
    assert!(found.notes.iter().map(String::len).sum::<usize>() < MOST);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_or_refused(data in prop::collection::vec(any::<u8>(), 0..600)) {
            super::control(&data);
            super::images(&data);
            super::staging(&data);
            super::answers(&data);
            super::services(&data);
            super::format(&data);
        }

        #[test]
        fn arbitrary_text_is_read_or_refused(kind in any::<u8>(), text in "[ -~]{0,100}") {
            let data = [&[kind], text.as_bytes()].concat();
            super::control(&data);
            super::answers(&data);
            super::services(&data);
            super::format(&data);
        }
    }
}
