//! The kinds of requests of S3, with the prices of the Standard class in us-east-1
//! (<https://aws.amazon.com/s3/pricing/>).

use crate::store::request::Kind;

pub(super) static GET: Kind = kind("GetObject", 400, true);
pub(super) static HEAD: Kind = kind("HeadObject", 400, false);
pub(super) static PUT: Kind = kind("PutObject", 5_000, true);
pub(super) static LIST: Kind = kind("ListObjectsV2", 5_000, false);
pub(super) static DELETE: Kind = kind("DeleteObject", 0, false);
pub(super) static DELETE_MANY: Kind = kind("DeleteObjects", 0, false);

/// All of them, in the order in which they are shown.
pub(super) const ALL: [&Kind; 6] = [&GET, &HEAD, &PUT, &LIST, &DELETE, &DELETE_MANY];

const fn kind(name: &'static str, nanodollars: u64, is_bulk: bool) -> Kind {
    Kind { name, quota: None, nanodollars, is_bulk }
}
