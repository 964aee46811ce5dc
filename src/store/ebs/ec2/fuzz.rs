//! Answers of EC2, made of arbitrary bytes.

use super::{Answer, DefaultKey, Done, EncryptionByDefault, Snapshots};
use crate::store::ebs::catalog;

/// Reads an answer: a byte that tells to what, then what stands in it; and a refusal.
pub fn answers(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    drop(super::refusal(data));
    match kind % 4 {
        0 => {
            if let Some(found) = read::<Snapshots>("DescribeSnapshots", data) {
                found.snapshots.into_iter().for_each(|found| drop(catalog::snapshot(found)));
            }
        }
        1 => drop(read::<Done>("DeleteSnapshot", data)),
        2 => drop(read::<EncryptionByDefault>("GetEbsEncryptionByDefault", data)),
        _ => drop(read::<DefaultKey>("GetEbsDefaultKmsKeyId", data)),
    }
}

fn read<A: Answer>(action: &str, data: &[u8]) -> Option<A> {
    let answer =
        [b"<", action.as_bytes(), b"Response>", data, b"</", action.as_bytes(), b"Response>"];
    super::parse(action, &answer.concat()).ok()
}
