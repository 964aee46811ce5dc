//! The kinds of requests of S3, with the prices of the Standard class in us-east-1
//! (<https://aws.amazon.com/s3/pricing/>).

use crate::store::request::Kind;

pub(super) static GET: Kind = kind("GetObject", "s3:GetObject", 400, true);
pub(super) static HEAD: Kind = kind("HeadObject", "s3:GetObject", 400, false);
pub(super) static PUT: Kind = kind("PutObject", "s3:PutObject", 5_000, true);
pub(super) static LIST: Kind = kind("ListObjectsV2", "s3:ListBucket", 5_000, false);
pub(super) static DELETE: Kind = kind("DeleteObject", "s3:DeleteObject", 0, false);
pub(super) static DELETE_MANY: Kind = kind("DeleteObjects", "s3:DeleteObject", 0, false);

/// All of them, in the order in which they are shown.
pub(super) const ALL: [&Kind; 6] = [&GET, &HEAD, &PUT, &LIST, &DELETE, &DELETE_MANY];

const fn kind(name: &'static str, action: &'static str, nanodollars: u64, is_bulk: bool) -> Kind {
    Kind { name, action, quota: None, nanodollars, is_bulk }
}
