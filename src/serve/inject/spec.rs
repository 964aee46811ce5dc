//! The language of faults: `latency=20ms,get.corrupt=1%,throttle=5%,seed=7`.

use std::str::FromStr;
use std::time::Duration;

use http::StatusCode;

use crate::serve::gate::Operation;
use crate::serve::refusal::Refusal;

/// Longest time in a fault.
const LONGEST: Duration = Duration::from_hours(24);

/// A text that describes no faults.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part:?} is not a fault: {why}; as in `latency=20ms,throttle=5%,get.corrupt=1%,seed=7`")]
pub struct InvalidFaults {
    part: String,
    why: String,
}

/// What goes wrong on purpose, and how often.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    pub(super) seed: u64,
    /// Each for one operation, or for all.
    pub(super) rules: Vec<(Option<Operation>, Fault)>,
    pub(super) block_token_life: Option<Duration>,
    pub(super) page_token_life: Option<Duration>,
    pub(super) empty_pages: Option<Chance>,
    pub(super) missing_after_start: Option<Duration>,
}

/// A probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Chance(pub(super) f64);

/// How long a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Latency {
    Fixed(Duration),
    /// Evenly distributed.
    Between(Duration, Duration),
    /// Exponentially distributed.
    Mean(Duration),
}

/// Requests a second, and how many at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rate {
    pub(super) per_second: f64,
    pub(super) burst: f64,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fault {
    Latency(Latency),
    Fail(Chance, Code),
    Rate(Rate),
    SnapshotRate(Rate),
    Cut(Chance),
    CutBody(Chance),
    Corrupt(Chance),
}

/// An error that is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Code {
    status: StatusCode,
    name: &'static str,
    reason: Option<&'static str>,
}

/// Errors that `fail` knows, with their status and reason.
const CODES: [(&str, u16, Option<&str>); 14] = [
    ("InternalServerException", 500, None),
    ("ServiceUnavailable", 503, None),
    ("RequestThrottledException", 400, Some("ACCOUNT_THROTTLED")),
    ("ThrottlingException", 400, None),
    ("AccessDeniedException", 403, Some("UNAUTHORIZED_ACCOUNT")),
    ("DependencyAccessDenied", 403, Some("DEPENDENCY_ACCESS_DENIED")),
    ("ResourceNotFoundException", 404, Some("SNAPSHOT_NOT_FOUND")),
    ("ValidationException", 400, Some("INVALID_PARAMETER_VALUE")),
    ("ServiceQuotaExceededException", 402, Some("DEPENDENCY_SERVICE_QUOTA_EXCEEDED")),
    ("ConcurrentLimitExceededException", 400, None),
    ("ExpiredTokenException", 403, None),
    ("InvalidSignatureException", 403, None),
    ("FailedToReadBlockData", 400, None),
    ("ConflictingBlockUpdate", 400, Some("CONFLICTING_BLOCK_UPDATE")),
];

impl Code {
    fn named(text: &str) -> Option<Self> {
        let (name, status, reason) = CODES.into_iter().find(|(name, ..)| *name == text)?;
        let name = match name {
            // The code is that of its class, the reason tells.
            "DependencyAccessDenied" => "AccessDeniedException",
            "FailedToReadBlockData" | "ConflictingBlockUpdate" => "ValidationException",
            name => name,
        };
        Some(Self { status: StatusCode::from_u16(status).ok()?, name, reason })
    }

    pub(super) fn refusal(&self) -> Refusal {
        let message = match (self.name, self.reason) {
            // One of the few that clients have to know by its text.
            ("ValidationException", None) => "Failed to read block data",
            _ => "This error was asked for with --inject.",
        };
        let refusal = Refusal::new(self.status, self.name, message);
        match self.reason {
            Some(reason) => refusal.because(reason),
            None => refusal,
        }
    }
}

impl FromStr for Faults {
    type Err = InvalidFaults;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut faults = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            faults.add(part).map_err(|why| InvalidFaults { part: part.to_owned(), why })?;
        }
        Ok(faults)
    }
}

impl Faults {
    fn add(&mut self, part: &str) -> Result<(), String> {
        let (name, value) = part.split_once('=').ok_or("it has no `=`")?;
        let (of, name) = match name.split_once('.') {
            Some((of, name)) => (Some(operation(of)?), name),
            None => (None, name),
        };
        let fault = match name {
            "latency" => Fault::Latency(latency(value)?),
            "throttle" => Fault::Fail(chance(value)?, code("RequestThrottledException")?),
            "error" => Fault::Fail(chance(value)?, code("InternalServerException")?),
            "fail" => {
                let (name, often) = value.split_once(':').unwrap_or((value, "100%"));
                Fault::Fail(chance(often)?, code(name)?)
            }
            "rate" => Fault::Rate(rate(value)?),
            "snapshot-rate" => Fault::SnapshotRate(rate(value)?),
            "cut" => Fault::Cut(chance(value)?),
            "cut-body" => Fault::CutBody(chance(value)?),
            "corrupt" => Fault::Corrupt(chance(value)?),
            _ if of.is_some() => return Err(format!("{name:?} is not for one operation")),
            _ => return self.set(name, value),
        };
        self.rules.push((of, fault));
        Ok(())
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "seed" => self.seed = value.parse().map_err(|_| "a seed is a number".to_owned())?,
            "block-tokens" => self.block_token_life = Some(time(value)?),
            "page-tokens" => self.page_token_life = Some(time(value)?),
            "tokens" => {
                self.block_token_life = Some(time(value)?);
                self.page_token_life = Some(time(value)?);
            }
            "empty-pages" => {
                let chance = chance(value)?;
                if chance.0 >= 1.0 {
                    return Err("if every page were empty, no listing would end".to_owned());
                }
                self.empty_pages = Some(chance);
            }
            "missing-after-start" => self.missing_after_start = Some(time(value)?),
            _ => {
                return Err("there are latency, throttle, error, fail, rate, snapshot-rate, cut, cut-body, corrupt, tokens, block-tokens, page-tokens, empty-pages, missing-after-start and seed".to_owned());
            }
        }
        Ok(())
    }
}

fn operation(text: &str) -> Result<Operation, String> {
    Ok(match text {
        "start" => Operation::StartSnapshot,
        "put" => Operation::PutSnapshotBlock,
        "complete" => Operation::CompleteSnapshot,
        "list" => Operation::ListSnapshotBlocks,
        "changed" => Operation::ListChangedBlocks,
        "get" => Operation::GetSnapshotBlock,
        "ec2" => Operation::Query,
        _ => {
            return Err(
                "operations are start, put, complete, list, changed, get and ec2".to_owned()
            );
        }
    })
}

fn code(text: &str) -> Result<Code, String> {
    Code::named(text).ok_or_else(|| {
        let names: Vec<_> = CODES.iter().map(|(name, ..)| *name).collect();
        format!("errors are {}", names.join(", "))
    })
}

fn time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text);
    let time = time.map_err(|_| format!("{text:?} is not a time, as 20ms or 2s"))?;
    if time > LONGEST {
        return Err(format!("{text:?} is longer than a day"));
    }
    Ok(time)
}

fn chance(text: &str) -> Result<Chance, String> {
    let percent = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
    match percent {
        Some(percent) if (0.0..=100.0).contains(&percent) => Ok(Chance(percent / 100.0)),
        _ => Err(format!("{text:?} is not a percentage, as 5%")),
    }
}

fn latency(text: &str) -> Result<Latency, String> {
    if let Some(mean) = text.strip_prefix("exp(").and_then(|rest| rest.strip_suffix(')')) {
        return Ok(Latency::Mean(time(mean)?));
    }
    match text.split_once("..") {
        Some((least, most)) => {
            let (least, most) = (time(least)?, time(most)?);
            if least > most {
                return Err(format!("{text:?} ends before it begins"));
            }
            Ok(Latency::Between(least, most))
        }
        None => Ok(Latency::Fixed(time(text)?)),
    }
}

/// `1000/s`, or `1000/s:50` for bursts of 50; else a burst is a tenth of a second's worth.
fn rate(text: &str) -> Result<Rate, String> {
    let bad = || format!("{text:?} is not a rate, as 1000/s or 1000/s:50");
    let (rate, burst) = match text.split_once(':') {
        Some((rate, burst)) => (rate, Some(burst)),
        None => (text, None),
    };
    let positive = |text: &str| text.parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0);
    let per_second = rate.strip_suffix("/s").and_then(positive).ok_or_else(bad)?;
    let burst = match burst {
        Some(burst) => positive(burst).filter(|burst| *burst >= 1.0).ok_or_else(bad)?,
        None => (per_second / 10.0).max(1.0),
    };
    Ok(Rate { per_second, burst })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_line() {
        let faults: Faults = "latency=20ms, get.latency=1ms..3ms,put.fail=AccessDeniedException,\
             error=2%,rate=100/s,get.snapshot-rate=50/s:5,cut=1%,cut-body=2.5%,corrupt=1%,tokens=2s,\
             empty-pages=10%,missing-after-start=1m,seed=9"
            .parse()
            .unwrap();
        assert_eq!(faults.rules.len(), 9);
        assert_eq!(
            faults.rules[0],
            (None, Fault::Latency(Latency::Fixed(Duration::from_millis(20))))
        );
        let rate = Rate { per_second: 50.0, burst: 5.0 };
        assert_eq!(faults.rules[5], (Some(Operation::GetSnapshotBlock), Fault::SnapshotRate(rate)));
        assert_eq!(faults.block_token_life, Some(Duration::from_secs(2)));
        assert_eq!(faults.missing_after_start, Some(Duration::from_mins(1)));
        assert_eq!(faults.seed, 9);
    }

    #[test]
    fn what_is_no_fault_says_what_would_be() {
        for bad in [
            "latency",
            "latency=fast",
            "latency=3ms..1ms",
            "throttle=5",
            "throttle=101%",
            "rate=5",
            "rate=0/s",
            "fail=Nonsense",
            "get.seed=1",
            "fetch.cut=1%",
            "nonsense=1",
            "empty-pages=100%",
            "seed=x",
        ] {
            let error = bad.parse::<Faults>().unwrap_err().to_string();
            assert!(error.contains("as in `latency=20ms"), "{bad}: {error}");
        }
        assert_eq!("".parse(), Ok(Faults::default()));
    }
}
