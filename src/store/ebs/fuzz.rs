//! Answers of the EBS direct APIs, made of arbitrary bytes.

use super::Ebs;
use super::tokens::Token;
use crate::model::{BlockIndex, SnapshotId};
use crate::store::aws::fuzz::{answered_by, at_once};
use crate::store::{ListFrom, SnapshotStore as _, StoreOptions};

/// Blocks that are asked for.
const MAX: usize = 100;

/// Reads an answer: a byte that tells to what, then the answer. Answers whether it was taken.
pub(crate) fn blocks(data: &[u8]) -> bool {
    let Some((&kind, data)) = data.split_first() else { return false };
    let Some(config) = answered_by(data) else { return false };
    let store = Ebs::with_config(&config, &StoreOptions::default());
    let id: SnapshotId = "snap-0a".parse().expect("it is an id");
    let from = ListFrom::Index(BlockIndex(7));
    match kind % 3 {
        0 => {
            let page = at_once(store.list_blocks(&id, from, MAX)).and_then(Result::ok);
            if let Some(page) = &page {
                assert!(page.blocks.len() <= MAX, "{page:?}");
                assert!(page.blocks.is_sorted_by(|a, b| a.index < b.index), "{page:?}");
            }
            page.is_some()
        }
        1 => {
            let page = at_once(store.list_changed_blocks(&id, &id, from, MAX));
            let page = page.and_then(Result::ok);
            if let Some(page) = &page {
                assert!(page.blocks.len() <= MAX, "{page:?}");
                assert!(page.blocks.is_sorted_by(|a, b| a.index < b.index), "{page:?}");
            }
            page.is_some()
        }
        _ => {
            let token = Token::encode_all(&[Token::listed("t".to_owned(), None)]).remove(0);
            at_once(store.get_block(&id, BlockIndex(7), &token)).is_some_and(|read| read.is_ok())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_answers_are_taken() {
        let list =
            r#"{"Blocks":[{"BlockIndex":8,"BlockToken":"t"}],"VolumeSize":1,"BlockSize":524288}"#;
        assert!(blocks(format!("\0\0A: b\n\n{list}").as_bytes()));
        let changed =
            r#"{"ChangedBlocks":[{"BlockIndex":8,"SecondBlockToken":"t"}],"BlockSize":524288}"#;
        assert!(blocks(format!("\x01\0A: b\n\n{changed}").as_bytes()));
        let block = vec![7; crate::model::BLOCK_SIZE];
        let sum = crate::model::Digest::of(&block).to_base64();
        let head = format!(
            "\x02\0x-amz-Checksum: {sum}\nx-amz-Checksum-Algorithm: SHA256\nx-amz-Data-Length: 524288\n\n"
        );
        assert!(blocks(&[head.as_bytes(), &block].concat()));
        assert!(!blocks(&[head.as_bytes(), &block[1..]].concat()));
    }
}
