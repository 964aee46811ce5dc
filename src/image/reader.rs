//! An open image.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::Image;
use super::prefetch::Cursors;
use crate::cache::SharedError;

/// One open of an image: reads, and guesses what will be read next.
#[derive(Debug)]
pub struct Reader {
    image: Arc<Image>,
    cursors: Mutex<Cursors>,
}

impl Reader {
    /// Opens an image.
    pub fn new(image: Arc<Image>) -> Self {
        Self { image, cursors: Mutex::default() }
    }

    /// What is read.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Up to `len` bytes from `offset` on, if that needs no waiting.
    pub fn read_cached(&self, offset: u64, len: usize) -> Option<Bytes> {
        let bytes = self.image.read_cached(offset, len)?;
        self.note(offset, len, false);
        Some(bytes)
    }

    /// Up to `len` bytes from `offset` on; fewer only at the end of the image.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, SharedError> {
        self.note(offset, len, true);
        self.image.read(offset, len).await
    }

    fn note(&self, offset: u64, len: usize, waited: bool) {
        if offset >= self.image.len() {
            return;
        }
        let mut cursors = self.cursors.lock().unwrap_or_else(PoisonError::into_inner);
        let ahead = cursors.advance(&self.image.cache, offset, len, waited);
        drop(cursors);
        let Some(range) = ahead else { return };
        let end = self.image.map().end().min(range.end);
        let mut index = range.start;
        // To wake a thread for what is in memory would cost a reader a twentieth of its time.
        while index < end && self.image.is_here(index) {
            index = index.next();
        }
        if index < end {
            let image = Arc::clone(&self.image);
            tokio::spawn(async move {
                while index < end {
                    Arc::clone(&image).prefetch(index).await;
                    index = index.next();
                }
            });
        }
    }
}
