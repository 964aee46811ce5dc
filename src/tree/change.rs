//! The requests that change something, each handed to the part of the tree that it is about.

use std::ffi::OsStr;
use std::sync::Arc;

use bytes::Bytes;

use super::node::Node;
use super::{Attributes, Changes, Error, Handle, Result, Tree};

impl Tree {
    /// Writes to an open file at `offset`: all of `bytes`, or nothing.
    pub async fn write(self: &Arc<Self>, handle: u64, offset: u64, bytes: Bytes) -> Result<()> {
        match self.handle(handle)? {
            Handle::Command(conversation) => {
                self.command(&conversation, &bytes, offset.saturating_add(bytes.len() as u64))
            }
            Handle::Working(opened) => Self::write_working(&opened, offset, bytes).await,
            Handle::Cancel(job) => {
                job.cancel();
                Ok(())
            }
            _ => Err(Error::BadHandle),
        }
    }

    /// Writes to an open file, if that needs to wait for nothing but the local disk; else `None`,
    /// and nothing has happened.
    pub fn write_now(&self, handle: u64, offset: u64, bytes: &[u8]) -> Option<Result<()>> {
        let Ok(Handle::Working(opened)) = self.handle(handle) else { return None };
        opened.begin_change();
        let result = opened.image().write_now(offset, bytes)?;
        opened.end_write(offset..offset.saturating_add(bytes.len() as u64), &result);
        Some(result.map_err(Error::from))
    }

    /// Changes attributes of a file. A control file has no length, and every length is fine.
    pub async fn setattr(
        &self,
        ino: u64,
        handle: Option<u64>,
        changes: Changes,
    ) -> Result<Attributes> {
        match self.node(ino)? {
            Node::Working(image) => self.change_working(&image, handle, changes).await?,
            Node::Operation(_) | Node::JobFile(_, super::job::JobFile::Cancel)
                if changes.mode.or(changes.uid.map(|_| 0)).or(changes.gid.map(|_| 0)).is_none() => {
            }
            _ => return Err(Error::NotPermitted),
        }
        self.getattr(ino)
    }

    /// Removes a name that is not a directory.
    pub async fn unlink(&self, parent: u64, name: &OsStr) -> Result<()> {
        let name = name.to_str().ok_or(Error::NotFound)?;
        match self.node(parent)? {
            Node::New => self.unlink_working(name).await,
            parent @ (Node::Jobs | Node::Job(_)) => self.control.unlink(&parent, name),
            _ => Err(Error::NotPermitted),
        }
    }

    /// Removes a directory.
    pub async fn rmdir(&self, parent: u64, name: &OsStr) -> Result<()> {
        let name = name.to_str().ok_or(Error::NotFound)?;
        match self.node(parent)? {
            parent @ (Node::Jobs | Node::Job(_)) => self.control.rmdir(&parent, name).await,
            _ => Err(Error::NotPermitted),
        }
    }
}
