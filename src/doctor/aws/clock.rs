//! The clock: a signature is good for five minutes around the time of the service.

use std::time::{Duration, SystemTime};

use super::probe::Probe;
use crate::doctor::report::Findings;

/// Worth a word: it will be more one day.
const DRIFT: Duration = Duration::from_mins(1);

/// What signatures may be off: for EC2 and EBS, and for S3.
const REFUSED: Duration = Duration::from_mins(5);
pub(in crate::doctor) const REFUSED_BY_S3: Duration = Duration::from_mins(15);

const SUBJECT: &str = "clock";

/// How a clock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clock {
    Right,
    Drifting,
    Wrong,
}

/// How far a clock is off, and which way: ahead is true.
fn off(ours: SystemTime, theirs: SystemTime) -> (Duration, bool) {
    match ours.duration_since(theirs) {
        Ok(ahead) => (ahead, true),
        Err(behind) => (behind.duration(), false),
    }
}

fn judge(off: Duration, refused: Duration) -> Clock {
    match off {
        off if off > refused => Clock::Wrong,
        off if off > DRIFT => Clock::Drifting,
        _ => Clock::Right,
    }
}

/// The time in a `Date` header, as `Tue, 03 Mar 2026 10:11:12 GMT`.
pub(super) fn parse(header: &str) -> Option<SystemTime> {
    jiff::fmt::rfc2822::parse(header).ok().map(|time| time.timestamp().into())
}

pub(super) fn examine(probes: &[&Probe], report: &mut impl Findings) {
    match probes.iter().find_map(|probe| probe.times) {
        Some((ours, theirs)) => tell(ours, theirs, REFUSED, report),
        None => report.skip(SUBJECT, "because no answer had a date"),
    }
}

/// Tells how our clock is beside that of a service, which refuses signatures that are further off.
pub(in crate::doctor) fn tell(
    ours: SystemTime,
    theirs: SystemTime,
    refused: Duration,
    report: &mut impl Findings,
) {
    let (off, ahead) = off(ours, theirs);
    let way = if ahead { "ahead of" } else { "behind" };
    let found = format!("it is {} s {way} that of the service", off.as_secs());
    let cure =
        "set it by the network: `timedatectl set-ntp true`, or chrony; on EC2 from 169.254.169.123";
    match judge(off, refused) {
        Clock::Right if off < Duration::from_secs(2) => {
            report.ok(SUBJECT, "it agrees with that of the service");
        }
        Clock::Right => report.ok(SUBJECT, found),
        Clock::Drifting => report.warn(SUBJECT, found, cure),
        Clock::Wrong => {
            let minutes = refused.as_secs() / 60;
            let found = format!("{found}: signatures are refused above {minutes} minutes");
            report.fail(SUBJECT, found, cure);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read() {
        let time = parse("Tue, 03 Mar 2026 10:11:12 GMT").unwrap();
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(since.as_secs(), 1_772_532_672);
        assert_eq!(parse("yesterday"), None);
    }

    #[test]
    fn a_clock_may_be_a_little_off() {
        let seconds = Duration::from_secs;
        for (off, clock) in [
            (0, Clock::Right),
            (60, Clock::Right),
            (61, Clock::Drifting),
            (300, Clock::Drifting),
            (301, Clock::Wrong),
        ] {
            assert_eq!(judge(seconds(off), REFUSED), clock, "{off}");
        }
        let now = SystemTime::now();
        assert_eq!(off(now + seconds(7), now), (seconds(7), true));
        assert_eq!(off(now, now + seconds(7)), (seconds(7), false));
    }
}
