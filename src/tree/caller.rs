//! Who sent a request, and whether that program is about to end.

/// The thread group of a thread; 0 if it cannot be told, as for one outside our pid namespace.
pub fn thread_group(tid: u32) -> u32 {
    if tid == 0 {
        return 0;
    }
    let status = Status::of(tid);
    status.field("Tgid").and_then(|group| group.parse().ok()).unwrap_or(0)
}

/// Signals that end programs, and their names.
const ENDING: [(u32, &str); 5] =
    [(1, "SIGHUP"), (2, "SIGINT"), (3, "SIGQUIT"), (15, "SIGTERM"), (SIGKILL, "SIGKILL")];
const SIGINT: u32 = 2;
const SIGKILL: u32 = 9;

/// Programs that close what they have written so far when SIGINT comes, and end of it then. They catch it once.
const CLOSE_AT_SIGINT: [&str; 3] = ["dd", "dcfldd", "dc3dd"];

/// What the kernel tells of a thread (`/proc/<tid>/status`, proc(5)). Reading it never waits.
struct Status(String);

impl Status {
    fn of(tid: u32) -> Self {
        Self(std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default())
    }

    fn field(&self, name: &str) -> Option<&str> {
        let mut lines = self.0.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(field, _)| *field == name).map(|(_, value)| value.trim())
    }

    fn name(&self) -> &str {
        self.field("Name").unwrap_or("a program")
    }

    /// Whether a set of signals has this one.
    fn has(&self, set: &str, signal: u32) -> bool {
        let set = self.field(set).and_then(|set| u64::from_str_radix(set, 16).ok());
        set.is_some_and(|set| set >> (signal - 1) & 1 == 1)
    }

    /// A signal that ends the program, or is caught by it, as soon as the request is answered.
    fn pending(&self) -> Option<&'static str> {
        let is_pending = |signal: u32| {
            let of_thread = self.has("SigPnd", signal);
            // A program that exits leaves it with its other threads.
            let of_thread = of_thread && signal != SIGKILL;
            (self.has("ShdPnd", signal) || of_thread)
                && !self.has("SigBlk", signal)
                && !self.has("SigIgn", signal)
        };
        ENDING.iter().find(|(signal, _)| is_pending(*signal)).map(|(_, name)| *name)
    }
}

/// Whether a signal waits for a thread, or for its program, that ends it or is caught by it: whoever sent it wants it to
/// come back.
pub fn is_called_away(tid: u32) -> bool {
    tid != 0 && Status::of(tid).pending().is_some()
}

/// Whether a thread is one of a program that would close its files in order at SIGINT, and has not met it yet.
pub(super) fn closes_at_sigint(tid: u32) -> bool {
    let status = Status::of(tid);
    CLOSE_AT_SIGINT.contains(&status.name()) && status.has("SigCgt", SIGINT)
}

/// Why what a thread closes may not be whole; `None` if nothing speaks for that. `closed_at_sigint` is what
/// `closes_at_sigint` said of it when it began to write.
pub fn cut_short(tid: u32, closed_at_sigint: bool) -> Option<String> {
    let status = Status::of(tid);
    let name = status.name();
    if let Some(signal) = killed_by(tid, &status) {
        return Some(format!("{name} was killed by signal {signal} while it had it open"));
    }
    if let Some(signal) = status.pending() {
        return Some(format!("{name} closed it when {signal} had been sent to it"));
    }
    let stopped = closed_at_sigint && !status.has("SigCgt", SIGINT);
    stopped.then(|| format!("{name} was stopped by SIGINT, and closed it before it was done"))
}

/// Which signal a thread is dying of; `None` if it is not.
///
/// `exit_code`, the last field of `/proc/<tid>/stat` (proc(5)), has the signal in its low bits.
/// `PF_SIGNALED` would say so too often: also of threads of a program that simply exits.
///
/// Reading that of a program in `execve` waits until that is done, and closing what is close-on-exec
/// is part of it: both would wait for ever. Only a program that has no memory left is on its way
/// out, and no such one executes another; `status` tells that, and never waits.
fn killed_by(tid: u32, status: &Status) -> Option<i32> {
    if status.field("VmSize").is_some() {
        return None;
    }
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
    // The name of the program is in parentheses, and may hold anything.
    let (_, after) = stat.rsplit_once(')')?;
    let code: i32 = after.split_whitespace().nth(49)?.parse().ok()?;
    let signal = code & 0x7f;
    (signal != 0).then_some(signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_process_is_not_cut_short() {
        let me = std::process::id();
        assert_eq!(thread_group(me), me);
        let thread = std::thread::spawn(|| nix::unistd::gettid().as_raw());
        let tid = u32::try_from(thread.join().unwrap()).unwrap();
        assert!(thread_group(tid) == 0 || thread_group(tid) == me);
        assert_eq!(cut_short(me, false), None);
        assert!(!closes_at_sigint(me));
        assert_eq!(thread_group(0), 0);
    }

    #[test]
    fn a_pending_signal_counts_unless_it_is_blocked_or_ignored_or_of_an_exit() {
        let pending = |fields: &str| Status(fields.replace(' ', "\n")).pending();
        assert_eq!(pending("ShdPnd:0000000000000002"), Some("SIGINT"));
        assert_eq!(pending("SigPnd:0000000000004000 ShdPnd:0"), Some("SIGTERM"));
        assert_eq!(pending("ShdPnd:0000000000000100"), Some("SIGKILL"));
        assert_eq!(pending("SigPnd:0000000000000100"), None);
        assert_eq!(pending("ShdPnd:0000000000000002 SigBlk:0000000000000002"), None);
        assert_eq!(pending("ShdPnd:0000000000000002 SigIgn:0000000000000002"), None);
        assert_eq!(pending("ShdPnd:0000000000010000"), None, "SIGCHLD is of no concern");
    }
}
