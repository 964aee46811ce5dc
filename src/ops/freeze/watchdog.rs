//! A process of its own that freezes a file system, and thaws it in every case: when it is asked to, after a time,
//! after a signal, and when the process that started it is there no more.
//!
//! It is a fork, and starts no program: that might have to be read from what is frozen. It writes nothing but to the
//! process that started it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::sys;
use crate::transfer::engine::Run;

/// What the watchdog is sent: first for freezing, then for thawing.
const NOW: u8 = 1;

/// What it answers when it has frozen; else the number of the error.
const FROZEN: u8 = 0;

/// What it answers when it has thawed, or has not.
const AS_ASKED: u8 = 1;
const TOO_LONG: u8 = 2;
const SIGNALLED: u8 = 3;
const BY_OTHERS: u8 = 4;
const FAILED: u8 = 5;

/// Signals that thaw.
const SIGNALS: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// How long thawing may take: the kernel waits for nothing then.
const THAWS_WITHIN: Duration = Duration::from_secs(20);

/// The process, which has not frozen anything yet. It ends with this.
#[derive(Debug)]
pub(super) struct Watchdog {
    file: File,
    child: UnixStream,
    limit: Duration,
}

impl Watchdog {
    /// Starts it, for the file system that `file` is on, which it thaws after `limit`.
    ///
    /// # Errors
    ///
    /// If it cannot be started, or there are threads already.
    pub(super) fn start(file: File, limit: Duration) -> io::Result<Self> {
        let (child, parent) = UnixStream::pair()?;
        sys::fork_off(|| {
            // That it ends shows that the other process has.
            let _ = nix::unistd::close(child.as_raw_fd());
            keep_watch(file.as_fd(), &parent, limit);
        })?;
        Ok(Self { file, child, limit })
    }

    /// What is frozen is on the same file system.
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Freezes it. If it is thawed before it is asked for, `run` is given up; it is thawed when `run` ends.
    ///
    /// # Errors
    ///
    /// Those of [`sys::freeze`].
    pub(super) async fn freeze(self, point: &Path, run: &Run) -> io::Result<Frozen> {
        let Self { file, child, limit } = self;
        child.set_nonblocking(true)?;
        let mut child = tokio::net::UnixStream::from_std(child)?;
        child.write_all(&[NOW]).await?;
        match child.read_u8().await {
            Ok(FROZEN) => {}
            Ok(errno) => return Err(io::Error::from_raw_os_error(errno.into())),
            Err(error) => {
                // It was killed, and may have done it.
                let _ = sys::thaw(file.as_fd());
                return Err(error);
            }
        }
        let (began, asked, run) = (Instant::now(), CancellationToken::new(), run.clone());
        let (tell, ended) = watch::channel(None);
        let frozen = Frozen { point: point.to_owned(), asked: asked.clone(), ended, limit };
        tokio::spawn(async move {
            let end = follow(&mut child, &file, &asked, &run).await;
            let _ = tell.send(Some((end, began.elapsed())));
            if !matches!(end, End::AsAsked | End::Stopped) {
                run.cancel.cancel();
            }
        });
        Ok(frozen)
    }
}

/// How it was thawed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// All was read.
    AsAsked,
    /// The run was stopped.
    Stopped,
    TooLong,
    Signalled,
    ByOthers,
    /// The watchdog was killed.
    Alone,
    Failed,
}

/// A file system that is frozen. It is thawed with this.
#[derive(Debug)]
pub(in crate::ops) struct Frozen {
    point: PathBuf,
    asked: CancellationToken,
    ended: watch::Receiver<Option<(End, Duration)>>,
    limit: Duration,
}

impl Frozen {
    /// Thaws it, if it is not thawed yet; how that came, and how long it was frozen.
    pub(super) async fn thaw(&self) -> (End, Duration) {
        self.asked.cancel();
        let mut ended = self.ended.clone();
        let ended = tokio::time::timeout(THAWS_WITHIN, ended.wait_for(Option::is_some)).await;
        let end = ended.ok().and_then(Result::ok).and_then(|end| *end);
        end.unwrap_or((End::Failed, THAWS_WITHIN))
    }

    /// Whether it is thawed already, or is about to be.
    pub(super) fn is_over(&self) -> bool {
        self.asked.is_cancelled()
    }

    /// What is wrong with this end, in words.
    pub(super) fn why(&self, end: End) -> Option<String> {
        let limit = humantime::format_duration(self.limit);
        let why = match end {
            End::AsAsked | End::Stopped => return None,
            End::TooLong => {
                format!("it was thawed after {limit}, before all was read (--freeze-limit)")
            }
            End::Signalled => "a signal had it thawed before all was read".to_owned(),
            End::ByOthers => "somebody else has thawed it before all was read".to_owned(),
            End::Alone => {
                "it was thawed before all was read, as the watchdog was killed".to_owned()
            }
            End::Failed => "it may be frozen still: `fsfreeze -u` thaws it".to_owned(),
        };
        Some(format!("{}: {why}", self.point.display()))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.asked.cancel();
    }
}

/// Has it thawed when that is asked for, or the run ends; notices if it is before.
async fn follow(
    child: &mut tokio::net::UnixStream,
    file: &File,
    asked: &CancellationToken,
    run: &Run,
) -> End {
    let (answer, as_asked) = tokio::select! {
        biased;
        answer = child.read_u8() => (answer, false),
        () = asked.cancelled() => (thawed(child).await, true),
        _ = run.unless_stopped(std::future::pending::<()>()) => (thawed(child).await, false),
    };
    match answer {
        Ok(AS_ASKED) if as_asked => End::AsAsked,
        Ok(AS_ASKED) => End::Stopped,
        Ok(TOO_LONG) => End::TooLong,
        Ok(SIGNALLED) => End::Signalled,
        Ok(BY_OTHERS) => End::ByOthers,
        Ok(_) => End::Failed,
        Err(_) => match sys::thaw(file.as_fd()) {
            Ok(()) | Err(nix::Error::EINVAL) => End::Alone,
            Err(_) => End::Failed,
        },
    }
}

async fn thawed(child: &mut tokio::net::UnixStream) -> io::Result<u8> {
    child.write_all(&[NOW]).await?;
    child.read_u8().await
}

/// The other process.
fn keep_watch(file: BorrowedFd<'_>, mut parent: &UnixStream, limit: Duration) {
    // What is sent to a terminal's programs, or to all of a name, is for the one that uploads.
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_name(c"thaw-watchdog");
    // Whoever reads what that one prints must not wait for this one.
    for fd in 0..3 {
        let _ = nix::unistd::close(fd);
    }
    let mut asked = [0];
    if parent.read_exact(&mut asked).is_err() {
        return;
    }
    let end = Instant::now() + limit;
    let signals: SigSet = SIGNALS.into_iter().collect();
    let watched = signals
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC))
        .and_then(|signals| sys::freeze(file).map(|()| signals));
    let signals = match watched {
        Ok(signals) => signals,
        Err(error) => {
            let _ = parent.write_all(&[u8::try_from(error as i32).unwrap_or(u8::MAX)]);
            return;
        }
    };
    // If nobody is there any more that is found below.
    let _ = parent.write_all(&[FROZEN]);
    let why = wait(parent, &signals, end);
    let answer = match sys::thaw(file) {
        Ok(()) => why,
        Err(nix::Error::EINVAL) => BY_OTHERS,
        Err(_) => FAILED,
    };
    let _ = parent.write_all(&[answer]);
}

/// Waits for what thaws: a word of the other process or its end, a signal, or the time.
fn wait(parent: &UnixStream, signals: &SignalFd, end: Instant) -> u8 {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return TOO_LONG;
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds =
            [parent.as_fd(), signals.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, timeout) {
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) if fds[0].any() == Some(false) => return SIGNALLED,
            Ok(_) => return AS_ASKED,
            Err(_) => return SIGNALLED,
        }
    }
}
