//! Answers of S3, made of arbitrary bytes.

use bytes::Bytes;

use super::gather::Part;
use super::{Bucket, BucketUrl};
use crate::store::StoreOptions;
use crate::store::aws::fuzz::{answered_by, at_once};
use crate::store::repository::objects::Objects as _;

/// Reads an answer: a byte that tells to what, then the answer. Answers whether it was taken.
pub(in crate::store::repository) fn objects(data: &[u8]) -> bool {
    const NAME: &str = "snapshots/snap-0a.json";
    let Some((&kind, data)) = data.split_first() else { return false };
    let Some(config) = answered_by(data) else { return false };
    let url: BucketUrl = "s3://bucket/snaps".parse().expect("it is a URL");
    let bucket = Bucket::with_config(&config, &url, &StoreOptions::default());
    match kind % 7 {
        0 => at_once(bucket.list_versions("snapshots/")).is_some_and(|list| list.is_ok()),
        1 => {
            let read = at_once(bucket.part(NAME, Part { offset: 10, len: 20 }));
            let read = read.and_then(Result::ok);
            assert!(read.as_ref().is_none_or(|bytes| bytes.len() == 20), "{read:?}");
            read.is_some()
        }
        2 => {
            let read = at_once(bucket.read_tail(NAME, 20)).and_then(Result::ok);
            assert!(read.as_ref().is_none_or(|bytes| bytes.len() <= 20), "{read:?}");
            read.is_some()
        }
        3 => at_once(bucket.read(NAME)).is_some_and(|read| read.is_ok()),
        4 => at_once(bucket.modified(NAME)).is_some_and(|time| time.is_ok()),
        5 => at_once(bucket.delete(&[NAME.to_owned(), "b".to_owned()])).is_some_and(|d| d.is_ok()),
        _ => {
            at_once(bucket.create_exclusively(NAME, &Bytes::new())).is_some_and(|made| made.is_ok())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_answers_are_taken() {
        let list = "<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>snaps/snapshots/a</Key>\
                    <ETag>\"1\"</ETag></Contents></ListBucketResult>";
        let head = "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT";
        for (kind, status, head, body) in [
            (0, 0, "A: b", list),
            (1, 1, "Content-Range: bytes 10-29/100", "01234567890123456789"),
            (2, 1, "Content-Range: bytes 80-99/100", "01234567890123456789"),
            (3, 0, "Content-Length: 2", "{}"),
            (4, 0, head, ""),
            (5, 0, "A: b", "<DeleteResult></DeleteResult>"),
            (6, 0, "A: b", ""),
        ] {
            let data = [&[kind, status][..], head.as_bytes(), b"\n\n", body.as_bytes()].concat();
            assert!(objects(&data), "{kind}");
        }
    }
}
