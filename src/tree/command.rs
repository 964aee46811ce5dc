//! The control files that take commands, and the directory of the jobs that they start.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::job::JobFile;
use super::node::Node;
use super::{Attributes, Error, Handle, Kind, Result, Tree, operations, part};
use crate::jobs::{Job, Jobs};
use crate::ops::table::Entry;

/// Longest line that a control file takes, in bytes. A longer one is refused.
const MAX_LINE: usize = 64 << 10;

/// The link to the newest job.
const LAST: &str = "last";

/// What `control/` knows beside the texts in it.
#[derive(Debug, Default)]
pub(super) struct Control {
    pub(super) jobs: Jobs,
    /// Why the latest line for an operation was refused, if it was.
    refusals: Mutex<HashMap<&'static Entry, String>>,
}

/// An open control file of an operation: lines are written to it, and answers are read.
#[derive(Debug)]
pub(super) struct Conversation {
    operation: &'static Entry,
    answer: Mutex<Answer>,
}

/// What is read next.
#[derive(Debug)]
struct Answer {
    text: Bytes,
    /// Where the line ended that this answers.
    asked_to: u64,
    /// The position in the file at which the answer begins, once its reader has begun.
    origin: Option<u64>,
    /// The line had no line feed: what is written behind it may be the rest of it.
    is_open: bool,
}

impl Conversation {
    fn new(operation: &'static Entry, text: String) -> Self {
        let answer = Answer { text: text.into(), asked_to: 0, origin: None, is_open: false };
        Self { operation, answer: Mutex::new(answer) }
    }

    fn answer(&self, text: String, asked_to: u64, is_open: bool) {
        let answer = Answer { text: text.into(), asked_to, origin: None, is_open };
        *self.lock() = answer;
    }

    /// Whether bytes that begin at `offset` go on with a line that came before.
    fn goes_on(&self, offset: u64) -> bool {
        let answer = self.lock();
        answer.is_open && offset > 0 && offset == answer.asked_to
    }

    fn lock(&self) -> MutexGuard<'_, Answer> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the answer. A shell goes on reading where its line ended, other programs go back to
    /// the start of the file first: both read it from its beginning.
    pub(super) fn read(&self, offset: u64, len: usize) -> Bytes {
        let mut answer = self.lock();
        let origin = match answer.origin {
            Some(origin) if offset >= origin => origin,
            None if offset >= answer.asked_to => answer.asked_to,
            _ => 0,
        };
        answer.origin = Some(origin);
        part(&answer.text, offset - origin, len)
    }
}

impl Control {
    fn refusals(&self) -> MutexGuard<'_, HashMap<&'static Entry, String>> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a node is still there: a job may have been forgotten.
    pub(super) fn has(&self, node: &Node) -> bool {
        match node {
            Node::Job(number) | Node::JobFile(number, _) | Node::LastJob(number) => {
                self.jobs.get(*number).is_some()
            }
            _ => true,
        }
    }

    /// What is in the directory of the jobs, or of one of them.
    pub(super) fn children(&self, node: &Node) -> Vec<(String, Node)> {
        match node {
            Node::Jobs => {
                let last = self.jobs.last().map(|number| (LAST.to_owned(), Node::LastJob(number)));
                let numbers = self.jobs.numbers().into_iter();
                numbers.map(|number| (number.to_string(), Node::Job(number))).chain(last).collect()
            }
            Node::Job(number) => {
                let files = JobFile::ALL.into_iter();
                files.map(|file| (file.name().to_owned(), Node::JobFile(*number, file))).collect()
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn find_child(&self, node: &Node, name: &str) -> Option<Node> {
        let mut children = self.children(node).into_iter();
        children.find(|(child, _)| child == name).map(|(_, node)| node)
    }

    /// The attributes of a node that belongs to the daemon's own user.
    pub(super) fn attributes(&self, node: &Node, base: Attributes) -> Attributes {
        let base = Attributes { kind: node.kind(), ..base };
        let started = |number: u64| self.jobs.get(number).map_or(base.time, |job| job.started());
        match node {
            Node::Operation(_) => Attributes { mode: 0o600, ..base },
            Node::JobFile(number, file) => {
                Attributes { mode: file.mode(), time: started(*number), ..base }
            }
            Node::LastJob(number) => Attributes {
                mode: 0o777,
                size: number.to_string().len() as u64,
                time: started(*number),
                ..base
            },
            Node::Job(number) => {
                Attributes { mode: 0o700, links: 2, time: started(*number), ..base }
            }
            Node::Jobs => {
                let time = self.jobs.changed().unwrap_or(base.time);
                Attributes { mode: 0o700, links: 2, time, ..base }
            }
            _ => Attributes { mode: 0o700, links: 2, ..base },
        }
    }

    /// Opens the file of an operation or of a job.
    pub(super) fn open(&self, node: &Node, for_writing: bool) -> Result<Handle> {
        match node {
            Node::Operation(name) => {
                let why = self.refusals().get(name).cloned();
                let text = explain(name, why.as_deref());
                Ok(Handle::Command(Arc::new(Conversation::new(name, text))))
            }
            Node::JobFile(number, file) => {
                let job = self.jobs.get(*number).ok_or(Error::NotFound)?;
                match file {
                    JobFile::Cancel if for_writing => Ok(Handle::Cancel(job)),
                    _ if for_writing => Err(Error::Denied),
                    _ => Ok(Handle::Text(file.content(&job).into())),
                }
            }
            _ => Err(Error::NotPermitted),
        }
    }

    /// Removes a name below the directory of the jobs. The files of a job stay for as long as the
    /// job is known: they go with their directory, and must not keep `rm -r` from it.
    pub(super) fn unlink(&self, parent: &Node, name: &str) -> Result<()> {
        let child = self.find_child(parent, name).ok_or(Error::NotFound)?;
        if child.kind() == Kind::Directory { Err(Error::IsADirectory) } else { Ok(()) }
    }

    /// Removes a directory below that of the jobs: cancels the job, and forgets it.
    pub(super) async fn rmdir(&self, parent: &Node, name: &str) -> Result<()> {
        match self.find_child(parent, name).ok_or(Error::NotFound)? {
            Node::Job(number) if self.jobs.forget(number).await => Ok(()),
            Node::Job(_) => Err(Error::NotFound),
            _ => Err(Error::NotADirectory),
        }
    }
}

impl Tree {
    /// Takes a line that was written to the control file of an operation, and ends at `asked_to`.
    pub(super) fn command(
        self: &Arc<Self>,
        conversation: &Conversation,
        bytes: &[u8],
        asked_to: u64,
    ) -> Result<()> {
        let name = conversation.operation;
        let is_open = !bytes.ends_with(b"\n");
        let goes_on = conversation.goes_on(asked_to - bytes.len() as u64);
        let started = match goes_on {
            true => Err("write a line in one piece".to_owned()),
            false => self.start_job(name, bytes),
        };
        match started {
            Ok(job) => {
                self.control.refusals().remove(&name);
                conversation.answer(format!("{}\n", job.number()), asked_to, is_open);
                Ok(())
            }
            Err(why) => {
                conversation.answer(explain(name, Some(&why)), asked_to, is_open);
                self.control.refusals().insert(name, why.clone());
                Err(Error::Refused(why))
            }
        }
    }

    fn start_job(
        self: &Arc<Self>,
        operation: &'static Entry,
        bytes: &[u8],
    ) -> std::result::Result<Arc<Job>, String> {
        let line = one_line(bytes)?;
        let asked = operation.parse(line)?;
        let command = format!("{} {}", operation.name, line.trim());
        let tree = Arc::clone(self);
        let started = self.control.jobs.start(command, |job| operations::run(tree, job, asked));
        started.map_err(|error| error.to_string())
    }
}

/// The usage of an operation, below what was wrong with the latest line.
fn explain(name: &'static Entry, why: Option<&str>) -> String {
    match why {
        Some(why) => format!("error: {why}\n\n{}", name.usage()),
        None => name.usage(),
    }
}

fn one_line(bytes: &[u8]) -> std::result::Result<&str, String> {
    if bytes.len() > MAX_LINE {
        return Err(format!("a line has at most {MAX_LINE} bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "the line is not UTF-8".to_owned())?;
    let line = text.strip_suffix('\n').unwrap_or(text);
    if line.contains(['\n', '\0']) {
        return Err("write one line at a time".to_owned());
    }
    Ok(line)
}
