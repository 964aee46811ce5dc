//! What an image says of its own size: whether a partition table, a file system or the like on it ends beyond it,
//! or it is no raw image at all.
//!
//! Only a structure that is validated counts: by its checksum where it has one, else by what else must be so. What
//! was on a disk before is often still there: where two are found, one that ends inside the image is enough.

use std::fmt;

use bytes::{Bytes, BytesMut};

pub(crate) use self::container::Format;
use crate::model::{BlockIndex, block_parts};

mod array;
mod bytes_at;
mod container;
mod file_system;
mod partitions;

/// How much of the beginning is read at once: up to the second header of VHDX.
const HEAD: usize = 136 << 10;

/// Most bytes of partition entries that are read; a table with more is not looked at.
const MAX_ENTRIES: usize = 1 << 20;

/// Why an image is no snapshot that anybody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// What is on it ends beyond it.
    Cut {
        /// As the subject of a sentence: `its partition table`.
        what: String,
        /// Where that ends, in bytes.
        end: u64,
        /// Where the image does.
        len: u64,
    },
    /// It is no raw image.
    Packed(Format),
}

/// What was found on an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) fault: Option<Fault>,
    /// What is odd, and no fault.
    pub(crate) notes: Vec<String>,
}

/// Something on an image, and where it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Claim {
    what: String,
    end: u64,
}

impl Claim {
    fn new(what: impl Into<String>, end: u64) -> Self {
        Self { what: what.into(), end }
    }
}

/// Looks at an image of `len` bytes. `read` answers so many bytes from an offset on; fewer only at the end.
///
/// # Errors
///
/// That of `read`.
pub(crate) async fn look<R, F, E>(len: u64, read: R) -> Result<Found, E>
where
    R: Fn(u64, usize) -> F,
    F: Future<Output = Result<Bytes, E>>,
{
    let head = read(0, HEAD).await?;
    let mut found = Found::default();
    if let Some(format) = container::format(&head) {
        found.fault = Some(Fault::Packed(format));
        return Ok(found);
    }
    let claims = match file_system::iso(&head) {
        // A partition table over it may say anything.
        Some(iso) => vec![iso],
        None => {
            let table = on_partitions(&head, len, &read, &mut found.notes).await?;
            table.into_iter().chain(on_whole(&head, &read).await?).collect()
        }
    };
    if claims.iter().any(|claim| claim.end <= len) {
        return Ok(found);
    }
    let Some(Claim { what, end }) = claims.into_iter().next() else { return Ok(found) };
    let fault = Fault::Cut { what, end, len };
    let start = len.saturating_sub(array::TAIL);
    let tail = read(start, usize::try_from(len - start).unwrap_or(usize::MAX)).await?;
    match array::member(&head, &tail, len) {
        Some(kind) => found.notes.push(format!("{fault}; it is a member of {kind}")),
        None => found.fault = Some(fault),
    }
    Ok(found)
}

/// The same of an image that is read block by block.
///
/// # Errors
///
/// That of `block`.
pub(crate) async fn look_at_blocks<R, F, E>(len: u64, block: R) -> Result<Found, E>
where
    R: Fn(BlockIndex) -> F,
    F: Future<Output = Result<Bytes, E>>,
{
    let block = &block;
    let read = |offset: u64, wanted: usize| async move {
        let inside = len.saturating_sub(offset).min(wanted as u64);
        let mut bytes = BytesMut::new();
        for part in block_parts(offset, inside) {
            bytes.extend_from_slice(&block(part.index).await?[part.start..part.start + part.len]);
        }
        Ok(bytes.freeze())
    };
    look(len, read).await
}

async fn on_partitions<R, F, E>(
    head: &[u8],
    len: u64,
    read: &R,
    notes: &mut Vec<String>,
) -> Result<Option<Claim>, E>
where
    R: Fn(u64, usize) -> F,
    F: Future<Output = Result<Bytes, E>>,
{
    for sector in [512, 4096] {
        let Some(header) = partitions::Gpt::read(head, sector) else { continue };
        let Some(bytes) = header.entry_bytes().filter(|bytes| *bytes <= MAX_ENTRIES) else {
            continue;
        };
        let entries = read(header.entries_at(), bytes).await?;
        let Some(claim) = header.claim(&entries) else { continue };
        if claim.end <= len && header.backup_end() != len {
            notes.push(
                "the backup of its partition table is not at its end: the disk was larger or smaller once"
                    .to_owned(),
            );
        }
        return Ok(Some(claim));
    }
    Ok(partitions::mbr(head))
}

async fn on_whole<R, F, E>(head: &[u8], read: &R) -> Result<Option<Claim>, E>
where
    R: Fn(u64, usize) -> F,
    F: Future<Output = Result<Bytes, E>>,
{
    if let Some(claim) = file_system::claim(head) {
        return Ok(Some(claim));
    }
    let Some(fat) = file_system::Fat::read(head) else { return Ok(None) };
    let table = read(fat.table_at(), 2).await?;
    Ok(fat.claim(&table))
}

impl Fault {
    /// Whether a child has it from its base, so that it is no news.
    pub(crate) fn is_from(&self, base: &Self) -> bool {
        match (self, base) {
            (
                Self::Cut { what, end, len },
                Self::Cut { what: of_base, end: base_end, len: base_len },
            ) => what == of_base && end == base_end && len >= base_len,
            _ => self == base,
        }
    }

    /// Why the image of this name is refused, what to do about it, and what takes it all the same.
    pub(crate) fn refusal(&self, name: &str, as_is: &str) -> String {
        let advice = match self {
            Self::Cut { .. } => "write all of it".to_owned(),
            Self::Packed(format) => format.advice(name),
        };
        format!("{self}: {advice}; {as_is} takes it as it is")
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut { what, end, len } => {
                write!(f, "{what} ends at {}, the image at {}", size(*end), size(*len))
            }
            Self::Packed(format) => write!(f, "it is {}, not a raw image", format.name()),
        }
    }
}

/// A number of bytes, in the largest unit that says it exactly.
fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let exact = units.iter().find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    exact.map_or_else(
        || format!("{bytes} bytes"),
        |(shift, unit)| format!("{} {unit}", bytes >> shift),
    )
}

#[cfg(test)]
mod tests;
