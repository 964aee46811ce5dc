//! So many requests a second, as far as is known: a number that was given, and what the service
//! shows that it takes.
//!
//! A service that has enough answers "throttled", and goes on to take as many as it is willing to.
//! So what it took while it refused many is its limit, measured: the pace falls to that. While it
//! refuses hardly any, the pace rises slowly.
//!
//! Not all that is refused is so because of the pace. Some services refuse a few requests in a hundred by
//! chance: a trial, a while at a slower pace, shows whether less is refused then, and if not the pace goes
//! back to where it was. And where little is known of the limit, it is searched for: what was taken of a
//! handful of requests may be far below it, and a service that suddenly takes a small part of what it took
//! is ill, and may be well again at any moment. Then the pace rises quickly until much is refused.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use self::count::{Count, DEVIATIONS};

mod count;
#[cfg(test)]
mod tests;

/// How long what is taken and refused is counted before something follows from it.
const EPOCH: Duration = Duration::from_millis(250);

/// Requests an epoch has at least, unless none was refused for so long.
const MIN_REQUESTS: u32 = 50;
const QUIET_EPOCH: Duration = Duration::from_secs(2);

/// So many refusals in a row show that the limit is far below, and that there is nothing left of what
/// the service had saved up. After a pause it is measured how much it takes until that is so again.
const IN_A_ROW: u32 = 5;
const PAUSE: Duration = Duration::from_millis(60);

/// Part of the requests that may be refused because of our pace: more, and it falls to what was
/// taken.
const TOO_MANY: f64 = 0.05;

/// Part that is nothing to speak of: no more, and it rises. Between the two it falls a little.
const FEW: f64 = 0.005;
const EASE: f64 = 0.995;

/// The pace of a trial, as a part of what the service takes: what is refused then is so by chance. It
/// needs more requests, since it tells a few in a hundred from none; where no limit is known, it is not
/// worth more than so long. From fewer than half of them nothing follows.
const TRIAL: f64 = 0.85;
const TRIAL_REQUESTS: u32 = 120;
const TRIAL_TIME: Duration = Duration::from_secs(2);

/// Requests after which it follows from a few refusals too, where nothing is known of a limit yet; fewer
/// are enough for many.
const LONG: u32 = 400;

/// More than this is not refused by chance, but because the pace has not fallen far enough.
const MOST_BY_CHANCE: f64 = 0.15;

/// So many times it falls a little before a trial has to show that this is of use.
const EASES: u32 = 20;

/// A pause this long ends a trial, and what was refused before it says nothing of what comes after it. A
/// shorter one is left out of the time in which something is taken.
const IDLE: Duration = Duration::from_secs(1);

/// How much it rises an epoch; and after so many epochs in which no more was refused than comes by chance.
const RISE: f64 = 1.02;
const QUIET_EPOCHS: u32 = 4;
const QUIET_RISE: f64 = 1.1;

/// What is a tenth of what it took before is no limit: the service is ill; and from fewer than so many
/// that were taken none is known well. Then the pace rises by half whenever nothing was refused for a
/// moment, and falls to what was taken when something was, until there are enough requests to tell more.
const ILL: f64 = 0.1;
const KNOWN_FROM: u32 = 20;
const SEARCH_RISE: f64 = 1.5;

/// So many requests are enough if none of them was refused, or if some were, or those of so long.
const SEARCH_FEW: f64 = 8.0;
const SEARCH_REQUESTS: f64 = 20.0;
const SEARCH_TIME: Duration = Duration::from_secs(1);

/// Part that may be refused without being the end of a search, and that is one for certain; and so many of
/// fewer requests are, unless they are more than half: then the service is ill. It may be so too where it
/// has taken twice as much.
const SEARCH_PART: f64 = 0.1;
const SEARCH_LIMIT: f64 = 0.3;
const SEARCH_REFUSED: f64 = 4.0;
const ILL_PART: f64 = 0.5;
const FAR_BELOW: f64 = 0.5;

/// Requests that are enough where it has taken twice as much before, if none was refused.
const RETURN_FEW: f64 = 4.0;

/// How far it falls at most in a search, and when nothing at all was taken: that tells that it has to
/// fall, and not how far.
const SEARCH_FALL: f64 = 0.5;
const BLIND_FALL: f64 = 0.25;

/// What it took at most counts for less when limits below it are found: while it is searched for one,
/// and when a trial has confirmed one.
const FADE: f64 = 0.8;
const FORGET: f64 = 0.5;

/// Slower than this it never gets: whoever waits must see that something happens.
const SLOWEST: f64 = 2.0;

/// Requests that may be begun at once after a pause, as seconds of the pace.
const BURST: f64 = 0.02;

/// The pace of one kind of requests.
#[derive(Debug)]
pub(super) struct Pace {
    /// What was given; infinite if nothing was.
    most: f64,
    /// Requests a second.
    now: f64,
    /// When the next request is due if all came evenly.
    due: Option<Instant>,
    /// When the latest was begun, or answered.
    latest: Option<Instant>,
    /// Nothing is begun before this.
    paused: Option<Instant>,
    epoch: Epoch,
    /// Epochs in a row in which no more was refused than comes by chance.
    quiet: u32,
    /// What is refused whatever the pace is, as trials have shown.
    by_chance: Count,
    /// Epochs in a row in which less was refused than that.
    calm: Count,
    /// What the service took at most, in requests a second.
    record: f64,
    /// Whether the limit is searched for: it was measured from few requests, or while the service was ill.
    searches: bool,
    /// Times in a row that it fell a little.
    eased: u32,
    trial: Option<Trial>,
}

/// For a while it is slower than what the service takes, to see what is refused by chance.
#[derive(Clone, Copy, Debug)]
struct Trial {
    /// The pace before, what the service took of it, and what it refused.
    before: f64,
    taken: f64,
    refused: Count,
    /// Whether it ended a search.
    searched: bool,
}

#[derive(Debug)]
struct Epoch {
    began: Instant,
    /// Requests that were sent in it, answered or not.
    sent: u32,
    taken: u32,
    refused: u32,
    /// Refusals behind the last request that was taken.
    in_a_row: u32,
    /// Whether the service had nothing saved up when it began.
    drained: bool,
    /// Whether requests had to wait for the pace.
    held: bool,
}

impl Epoch {
    fn new(began: Instant) -> Self {
        Self { began, sent: 0, taken: 0, refused: 0, in_a_row: 0, drained: false, held: false }
    }

    fn count(&self) -> Count {
        Count { refused: self.refused.into(), of: f64::from(self.taken + self.refused) }
    }
}

impl Pace {
    /// At most `most` requests a second.
    pub(super) fn new(most: f64, now: Instant) -> Self {
        Self {
            most,
            now: most,
            due: None,
            latest: None,
            paused: None,
            epoch: Epoch::new(now),
            quiet: 0,
            by_chance: Count::default(),
            calm: Count::default(),
            trial: None,
            record: 0.0,
            searches: false,
            eased: 0,
        }
    }

    /// When a request may be begun, if not at `now`.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Instant> {
        if let Some(until) = self.paused.filter(|until| *until > now) {
            return Some(until);
        }
        let burst = Duration::from_secs_f64(BURST.max(0.5 / self.now));
        let at = self.due?.checked_sub(burst)?;
        if at <= now {
            return None;
        }
        self.epoch.held = true;
        Some(at)
    }

    /// A request is begun.
    pub(super) fn take(&mut self, now: Instant) {
        let before = self.latest.replace(now);
        let gap = before.map_or(Duration::ZERO, |before| now.saturating_duration_since(before));
        // The program had nothing to send: no time in which the service took little.
        let idle = gap.saturating_sub(Duration::from_secs_f64(1.0 / self.now));
        if gap > IDLE
            && let Some(trial) = self.trial.take()
        {
            self.set(trial.before, now);
            self.epoch = Epoch::new(now);
        } else if gap > IDLE && (self.epoch.drained || self.epoch.refused > 0) {
            self.epoch = Epoch::new(now);
        } else if idle > 2 * PAUSE {
            self.epoch.began += idle;
        }
        self.epoch.sent += 1;
        if self.now.is_finite() {
            let due = self.due.map_or(now, |due| due.max(now));
            self.due = Some(due + Duration::from_secs_f64(1.0 / self.now));
        }
    }

    /// A request that was begun at `began` was taken by the service.
    pub(super) fn taken(&mut self, began: Instant, now: Instant) {
        self.count(began, now, |epoch| {
            epoch.taken += 1;
            epoch.in_a_row = 0;
        });
    }

    /// A request that was begun at `began` was refused.
    pub(super) fn refused(&mut self, began: Instant, now: Instant) {
        self.count(began, now, |epoch| {
            epoch.refused += 1;
            epoch.in_a_row += 1;
        });
    }

    fn count(&mut self, sent: Instant, now: Instant, count: impl FnOnce(&mut Epoch)) {
        self.latest = self.latest.max(Some(now));
        // What was sent before the pace was set says nothing of it.
        if sent < self.epoch.began {
            return;
        }
        count(&mut self.epoch);
        let Epoch { began, in_a_row, drained, .. } = self.epoch;
        let age = now.saturating_duration_since(began);
        let sent = sent.saturating_duration_since(began);
        if in_a_row >= IN_A_ROW && !drained {
            // From here on, what is taken is what it is willing to take.
            self.epoch = Epoch { drained: true, ..Epoch::new(now) };
            self.paused = Some(now + PAUSE);
        } else if in_a_row >= IN_A_ROW && age >= PAUSE {
            self.close((sent + age) / 2, true, now);
        } else if sent >= EPOCH && self.is_enough(sent) {
            self.close(sent, false, now);
        }
    }

    /// Whether something follows from what was counted in an epoch, of which the last request was sent
    /// so long after it began.
    fn is_enough(&self, sent: Duration) -> bool {
        let count = self.epoch.count();
        if let Some(trial) = self.trial {
            let is_late = trial.before >= self.most && sent >= TRIAL_TIME;
            return is_late || count.of >= f64::from(TRIAL_REQUESTS);
        }
        if self.searches {
            let (enough, time) = match count.part() {
                0.0 if self.is_far_below(self.now) => (RETURN_FEW, SEARCH_TIME),
                0.0 => (SEARCH_FEW, SEARCH_TIME),
                part if part < SEARCH_PART => (SEARCH_REQUESTS, Duration::MAX),
                part if part < SEARCH_LIMIT => (f64::from(MIN_REQUESTS), Duration::MAX),
                _ => (SEARCH_REQUESTS, SEARCH_TIME),
            };
            return count.of >= enough || sent >= time;
        }
        if count.of < f64::from(MIN_REQUESTS) {
            return self.now < self.most && count.refused == 0.0 && sent >= QUIET_EPOCH;
        }
        let expected = self.by_chance.part() + TOO_MANY;
        self.now < self.most
            || count.of >= f64::from(LONG)
            || count.part() > expected + DEVIATIONS * (expected / count.of).sqrt()
    }

    /// Draws the conclusion from an epoch of this length. `exact`: nothing was left of what the service
    /// had saved up, neither at its beginning nor at its end.
    fn close(&mut self, age: Duration, exact: bool, now: Instant) {
        let Epoch { began, sent, taken, held, .. } = self.epoch;
        let count = self.epoch.count();
        self.epoch = Epoch::new(now);
        let part = count.part();
        // Of those that were sent last, not all are answered yet.
        let measured = if exact {
            f64::from(taken + 1) / age.as_secs_f64()
        } else {
            f64::from(sent) / now.saturating_duration_since(began).as_secs_f64() * (1.0 - part)
        };
        let measured = measured.min(self.now);
        if exact {
            self.trial = None;
            self.searches = taken < KNOWN_FROM || measured <= self.record * ILL;
            self.record = self.record.max(measured);
            let blind =
                self.now * if taken == 0 && self.now.is_finite() { BLIND_FALL } else { 0.0 };
            self.set(measured.max(blind), now);
            // There is nothing saved up for the first ones.
            self.paused = Some(now + Duration::from_secs_f64(2.0 / self.now).min(EPOCH));
            return;
        }
        if self.searches
            && let Some(pace) = self.found(count, measured, held)
        {
            return self.set(pace, now);
        }
        let searched = std::mem::take(&mut self.searches);
        self.record = self.record.max(measured);
        if let Some(trial) = self.trial.take()
            && let Some(pace) = self.after(trial, count)
        {
            return self.set(pace, now);
        }
        self.forget_chance(count);
        let by_chance = self.by_chance.part();
        let ours = part - by_chance;
        let noise = DEVIATIONS * (by_chance / count.of).sqrt();
        // A single one is chance.
        let is_much = count.refused > 1.0 && ours > FEW.max(noise / 2.0);
        self.quiet = if is_much { 0 } else { self.quiet.saturating_add(1) };
        if ours > TOO_MANY.max(noise) || is_much && self.eased >= EASES {
            let before = self.now / EASE.powi(i32::try_from(self.eased).unwrap_or(0));
            self.trial = Some(Trial { before, taken: measured, refused: count, searched });
            self.set(measured * TRIAL, now);
        } else if is_much {
            self.set(self.now * EASE, now);
            self.eased += 1;
            return;
        } else if held && self.now < self.most {
            self.searches = self.is_far_below(self.now);
            let rise = match self.quiet {
                _ if self.searches => SEARCH_RISE,
                ..=QUIET_EPOCHS => RISE,
                _ => QUIET_RISE,
            };
            self.set(self.now * rise, now);
        }
        self.eased = 0;
    }

    /// The pace to go on with the search at; `None` if it has ended, with a limit.
    fn found(&mut self, count: Count, measured: f64, held: bool) -> Option<f64> {
        let faster = self.now * SEARCH_RISE;
        if count.refused == 0.0 {
            return Some(if held { faster } else { self.now });
        }
        let part = count.part() - self.by_chance.part();
        let slower = measured.max(self.now * SEARCH_FALL);
        let is_far_below = self.is_far_below(measured);
        if count.of < SEARCH_REQUESTS {
            let is_limit = count.refused >= SEARCH_REFUSED
                && (SEARCH_LIMIT..=ILL_PART).contains(&count.part());
            return match count.refused {
                ..2.0 => Some(self.now),
                _ => (is_far_below || !is_limit).then_some(slower),
            };
        }
        if part <= SEARCH_PART {
            return Some(faster);
        }
        // It took more before, and what is refused may be so by chance.
        if part <= MOST_BY_CHANCE && self.now < self.record {
            return Some(faster.min(self.record));
        }
        if is_far_below {
            self.record *= FADE;
        }
        is_far_below.then_some(slower)
    }

    /// Whether the service has taken so much more than this that it may do so again.
    fn is_far_below(&self, pace: f64) -> bool {
        pace <= self.record * FAR_BELOW
    }

    /// The pace after a trial; `None` if too much was refused in that as well.
    fn after(&mut self, trial: Trial, count: Count) -> Option<f64> {
        let enough = count.of >= f64::from(TRIAL_REQUESTS / 2);
        match trial.refused.compare(count) {
            Ordering::Equal | Ordering::Less if !enough => Some(trial.before),
            // Where a slower pace changes nothing, it was not the pace.
            Ordering::Equal => {
                self.by_chance.add(trial.refused);
                self.by_chance.add(count);
                self.searches = trial.searched || self.is_far_below(trial.before);
                Some(trial.before)
            }
            Ordering::Greater if count.part() < MOST_BY_CHANCE => {
                self.by_chance.add(count);
                if trial.searched {
                    self.record = trial.taken.max(self.record * FORGET);
                }
                // What ended the search may have been chance.
                let few = trial.refused.of < f64::from(MIN_REQUESTS);
                self.searches = trial.searched && few && count.part() > FEW;
                Some(trial.taken)
            }
            _ => None,
        }
    }

    /// What comes by chance does not stay away for long.
    fn forget_chance(&mut self, count: Count) {
        if count.part() >= self.by_chance.part() {
            self.calm = Count::default();
            return;
        }
        self.calm.add(count);
        if self.calm.compare(self.by_chance) == Ordering::Less {
            self.by_chance = self.calm;
        }
    }

    fn set(&mut self, pace: f64, now: Instant) {
        self.now = pace.clamp(SLOWEST.min(self.most), self.most);
        if self.now.is_finite() && self.due.is_none() {
            self.due = Some(now);
        }
    }
}
