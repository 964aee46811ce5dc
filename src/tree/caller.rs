//! Who sent a request.

/// The thread group of a thread; 0 if it cannot be told, as for one outside our pid namespace.
pub fn thread_group(tid: u32) -> u32 {
    if tid == 0 {
        return 0;
    }
    let group = status(tid);
    let group = group.lines().find_map(|line| line.strip_prefix("Tgid:"));
    group.and_then(|group| group.trim().parse().ok()).unwrap_or(0)
}

fn status(tid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default()
}

/// Which signal a thread is dying of, in words; `None` if it is not.
///
/// `exit_code`, the last field of `/proc/<tid>/stat` (proc(5)), has the signal in its low bits.
/// `PF_SIGNALED` would say so too often: also of threads of a program that simply exits.
///
/// Reading that of a program in `execve` waits until that is done, and closing what is close-on-exec
/// is part of it: both would wait for ever. Only a program that has no memory left is on its way
/// out, and no such one executes another; `status` tells that, and never waits.
pub fn killed_by(tid: u32) -> Option<String> {
    if status(tid).lines().any(|line| line.starts_with("VmSize:")) {
        return None;
    }
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
    // The name of the program is in parentheses, and may hold anything.
    let (before, after) = stat.rsplit_once(')')?;
    let code: i32 = after.split_whitespace().nth(49)?.parse().ok()?;
    let signal = code & 0x7f;
    let name = before.split_once('(').map_or("a program", |(_, name)| name);
    (signal != 0).then(|| format!("{name} was killed by signal {signal} while it had it open"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_process_is_not_killed() {
        let me = std::process::id();
        assert_eq!(thread_group(me), me);
        let thread = std::thread::spawn(|| nix::unistd::gettid().as_raw());
        let tid = u32::try_from(thread.join().unwrap()).unwrap();
        assert!(thread_group(tid) == 0 || thread_group(tid) == me);
        assert_eq!(killed_by(me), None);
        assert_eq!(thread_group(0), 0);
    }
}
