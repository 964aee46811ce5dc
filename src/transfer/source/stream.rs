//! What comes on a pipe, as a source: it can be read once, in order.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};

use super::file::len_within;
use super::{Change, Source};
use crate::blocking::blocking;
use crate::claim::look_at_blocks;
use crate::model::{Block, BlockBuffer, BlockIndex, VolumeSize};
use crate::store::ListedBlock;
use crate::transfer::{Error, Result, run_len};

/// A stream of a bounded length. Where it is shorter there is a hole.
///
/// Whoever follows its changes reads it: a run of blocks at a time is kept until it is asked for.
#[derive(Debug)]
pub(crate) struct StreamSource(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: &'static str,
    file: File,
    /// What it has at most.
    len: u64,
    size: VolumeSize,
    /// It is taken although it is cut or packed.
    as_is: bool,
    was_read: AtomicBool,
    is_waiting: AtomicBool,
    /// Blocks that nobody has asked for yet.
    blocks: Mutex<HashMap<BlockIndex, Bytes>>,
    kept: Mutex<Kept>,
}

/// What is looked at when all has come.
#[derive(Debug, Default)]
struct Kept {
    /// The first two blocks, and the last two.
    blocks: HashMap<BlockIndex, Bytes>,
    /// Bytes that have come.
    len: u64,
}

impl StreamSource {
    /// What can be read from `file`, `len` bytes at most, which fit into a volume of this size.
    pub(crate) fn new(
        name: &'static str,
        file: File,
        len: u64,
        size: VolumeSize,
        as_is: bool,
    ) -> Self {
        Self(Arc::new(Inner {
            name,
            file,
            len,
            size,
            as_is,
            was_read: AtomicBool::new(false),
            is_waiting: AtomicBool::new(false),
            blocks: Mutex::default(),
            kept: Mutex::default(),
        }))
    }
}

impl Inner {
    fn blocks(&self) -> MutexGuard<'_, HashMap<BlockIndex, Bytes>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, index: BlockIndex, bytes: &Bytes, len: usize) {
        let mut kept = self.kept();
        kept.blocks.insert(index, bytes.clone());
        if index.0 >= 4 {
            kept.blocks.remove(&BlockIndex(index.0 - 2));
        }
        kept.len += len as u64;
    }

    /// Reads the blocks from `start` on, as many as are hashed together; fewer are the last ones.
    fn read_run(&self, start: BlockIndex) -> Result<u32> {
        let mut index = start;
        while index.0 - start.0 < run_len() as u32 {
            let room = len_within(index, self.len);
            let Some((bytes, len)) = self.read_block(room)? else { break };
            self.keep(index, &bytes, len);
            self.blocks().insert(index, bytes);
            index = index.next();
            if len < room {
                break;
            }
        }
        if start == BlockIndex::ZERO && index == start {
            return Err(self.unsuitable("nothing has come"));
        }
        Ok(index.0 - start.0)
    }

    /// The next block, of which so much may have been sent, and how much has been; none at the end.
    fn read_block(&self, room: usize) -> Result<Option<(Bytes, usize)>> {
        let failed = |e| Error::io("read", Path::new(self.name), e);
        if room == 0 {
            return match fill(&self.file, &mut [0]).map_err(failed)? {
                0 => Ok(None),
                _ => Err(self.unsuitable(&format!("it is longer than --size, {} bytes", self.len))),
            };
        }
        let mut buffer = BlockBuffer::block();
        let len = fill(&self.file, &mut buffer[..room]).map_err(failed)?;
        buffer[len..].fill(0);
        Ok((len > 0).then(|| (buffer.freeze(), len)))
    }

    fn unsuitable(&self, why: &str) -> Error {
        Error::unsuitable(Path::new(self.name), why)
    }
}

#[async_trait]
impl Source for StreamSource {
    fn changes(&self) -> BoxStream<'static, Result<Change>> {
        let inner = Arc::clone(&self.0);
        if inner.was_read.swap(true, Ordering::Relaxed) {
            let why = "what came was read already; send it again";
            return stream::iter([Err(inner.unsuitable(why))]).boxed();
        }
        let runs = stream::try_unfold(Some(BlockIndex::ZERO), move |start| {
            let inner = Arc::clone(&inner);
            async move {
                let Some(start): Option<BlockIndex> = start else { return Ok(None) };
                inner.is_waiting.store(true, Ordering::Relaxed);
                let reading = Arc::clone(&inner);
                let read = blocking(move || reading.read_run(start)).await;
                inner.is_waiting.store(false, Ordering::Relaxed);
                let (end, volume_end) = (BlockIndex(start.0 + read?), inner.size.blocks());
                let data = (start.0..end.0).map(|n| Ok(Change::Data(BlockIndex(n), None)));
                let is_last = end.0 - start.0 < run_len() as u32;
                let hole =
                    (is_last && end < volume_end).then(|| Ok(Change::Zeros(end..volume_end)));
                let changes = stream::iter(data.chain(hole).collect::<Vec<_>>());
                Ok::<_, Error>(Some((changes, (!is_last).then_some(end))))
            }
        });
        runs.try_flatten().boxed()
    }

    async fn holes(&self, _: BlockIndex) -> Result<u64> {
        Ok(0)
    }

    fn is_waiting(&self) -> bool {
        self.0.is_waiting.load(Ordering::Relaxed)
    }

    async fn read(&self, blocks: &[(BlockIndex, Option<ListedBlock>)]) -> Result<Vec<Block>> {
        let bytes: Vec<_> = {
            let mut read = self.0.blocks();
            let taken = blocks.iter().map(|(index, _)| read.remove(index));
            taken.map(|bytes| bytes.expect("each block is asked for once")).collect()
        };
        blocking(move || Ok(Block::many(bytes))).await
    }

    fn is_read_again(&self) -> bool {
        false
    }

    /// Checks that it is as long as what is on it, and a raw image. What was not kept is not looked at.
    async fn check(&self) -> Result<()> {
        if self.0.as_is {
            return Ok(());
        }
        let kept = std::mem::take(&mut *self.0.kept());
        let block = |index| std::future::ready(kept.blocks.get(&index).cloned().ok_or(()));
        let fault = look_at_blocks(kept.len, block).await.ok().and_then(|found| found.fault);
        match fault {
            Some(fault) => Err(self.0.unsuitable(&fault.refusal("FILE", "--as-is"))),
            None => Ok(()),
        }
    }
}

/// Reads until the buffer is full or the end is there; how much came. Waits for whoever sends it.
fn fill(mut file: &File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Brings all that can be read from `stream` into a new file in a directory, which has no name; blocks of zeros as
/// holes if it is to be `sparse`. Waits for whoever sends it, and for the disk.
///
/// # Errors
///
/// If it cannot be read, or there is no room.
pub(crate) fn stage(name: &str, stream: &File, directory: &Path, sparse: bool) -> Result<File> {
    let failed = |e| {
        let why = format!("{e}; TMPDIR names another place, and with --size nothing is kept first");
        Error::unsuitable(directory, why)
    };
    let create = || {
        std::fs::create_dir_all(directory)?;
        tempfile::tempfile_in(directory)
    };
    let file = create().map_err(failed)?;
    let mut buffer = BlockBuffer::block();
    let mut at = 0;
    loop {
        let len = fill(stream, &mut buffer).map_err(|e| Error::io("read", Path::new(name), e))?;
        let bytes = &buffer[..len];
        if !sparse || *bytes != crate::model::zeros()[..len] {
            file.write_all_at(bytes, at).map_err(failed)?;
        }
        at += len as u64;
        if len < buffer.len() {
            return file.set_len(at).map(|()| file).map_err(failed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::model::{BLOCK_SIZE, BLOCK_SIZE_U64};

    /// A source of what is sent in pieces of a size that no block has.
    fn source(bytes: Vec<u8>, len: u64) -> StreamSource {
        let (ours, mut theirs) = std::io::pipe().unwrap();
        std::thread::spawn(move || {
            bytes.chunks(70_001).try_for_each(|part| theirs.write_all(part))
        });
        let file = File::from(std::os::fd::OwnedFd::from(ours));
        StreamSource::new("stdin", file, len, VolumeSize::holding(len).unwrap(), false)
    }

    /// The blocks, and where the hole at the end begins.
    async fn all(source: &StreamSource) -> Result<(Vec<Block>, BlockIndex)> {
        let (mut blocks, mut hole) = (Vec::new(), source.0.size.blocks());
        let mut changes = source.changes();
        while let Some(change) = changes.try_next().await? {
            match change {
                Change::Data(index, None) => {
                    assert_eq!(index.0 as usize, blocks.len());
                    blocks.extend(source.read(&[(index, None)]).await?);
                }
                Change::Zeros(range) => {
                    assert_eq!((range.start.0 as usize, range.end), (blocks.len(), hole));
                    hole = range.start;
                }
                Change::Data(..) => unreachable!(),
            }
        }
        assert!(source.0.blocks().is_empty());
        Ok((blocks, hole))
    }

    #[tokio::test]
    async fn a_stream_is_its_blocks_and_a_hole() {
        let run = run_len() as u64 * BLOCK_SIZE_U64;
        let block = BLOCK_SIZE_U64;
        for len in [1, block - 1, block, block + 1, run - 1, run, run + 1, 2 * run, 2 * run + block]
        {
            let bytes: Vec<_> = (0..len).map(|at| (at / 4096 % 251) as u8 + 1).collect();
            for bound in [len, len + 1, len + block, 3 * run, crate::model::GIB] {
                let (blocks, hole) = all(&source(bytes.clone(), bound)).await.unwrap();
                assert_eq!(u64::from(hole.0), len.div_ceil(block), "{len} of {bound}");
                let mut read: Vec<_> =
                    blocks.iter().flat_map(|block| block.bytes().to_vec()).collect();
                assert!(read.drain(bytes.len()..).all(|byte| byte == 0));
                assert!(read == bytes, "{len} of {bound}");
            }
            if len > 1 {
                let error = all(&source(bytes.clone(), len - 1)).await.unwrap_err().to_string();
                assert!(error.contains("longer than --size"), "{error}");
            }
        }
        let (blocks, _) = all(&source(vec![0; 3 * BLOCK_SIZE], 1 << 30)).await.unwrap();
        assert!(blocks.len() == 3 && blocks.iter().all(Block::is_zero));
    }

    #[tokio::test]
    async fn a_stream_is_read_once_and_not_empty() {
        let error = all(&source(Vec::new(), 1)).await.unwrap_err().to_string();
        assert!(error.contains("stdin: nothing has come"), "{error}");
        let source = source(vec![1], 1);
        all(&source).await.unwrap();
        let error = all(&source).await.unwrap_err().to_string();
        assert!(error.contains("read already"), "{error}");
    }

    #[test]
    fn a_staged_stream_has_holes_where_zeros_were() {
        use std::os::unix::fs::MetadataExt as _;
        let mut bytes = vec![0; 20 * BLOCK_SIZE + 5];
        bytes[7 * BLOCK_SIZE + 3] = 1;
        for (sparse, most) in [(true, 4), (false, 100)] {
            let stream = tempfile::tempfile().unwrap();
            stream.write_all_at(&bytes, 0).unwrap();
            let directory = tempfile::tempdir().unwrap();
            let file = stage("stdin", &stream, directory.path(), sparse).unwrap();
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
            let mut staged = vec![0; bytes.len()];
            file.read_exact_at(&mut staged, 0).unwrap();
            let found = file.metadata().unwrap();
            assert!(staged == bytes && found.len() == bytes.len() as u64);
            let used = found.blocks() * 512 / BLOCK_SIZE_U64;
            assert!(used <= most && (sparse || used >= 20), "{used}");
        }
    }
}
