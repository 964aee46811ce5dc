//! Pending snapshots that were left alone for too long.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

use super::manifest::Start;
use super::names::{self, RecordId};
use super::{Repository, since_boot};
use crate::store::{Error, ErrorKind, Result};

impl Repository {
    /// Why nothing can be done any more with a pending snapshot; `None` as long as something can.
    ///
    /// It counts from the start, from the last put of this process, and from the last record that
    /// another one made, whichever is the latest.
    pub(super) async fn timed_out(&self, start: &Start) -> Result<Option<String>> {
        let Some(minutes) = start.timeout_minutes else { return Ok(None) };
        let timeout = Duration::from_secs(60 * u64::from(minutes));
        let idle = |writer: &super::Writer| since_boot().saturating_sub(writer.last_put());
        if let Some(writer) = self.existing_writer(&start.metadata.id)
            && idle(&writer) <= timeout
        {
            return Ok(None);
        }
        let now = self.objects.now().await?;
        if is_within(start.metadata.start_time, now, timeout) {
            return Ok(None);
        }
        for record in self.last_records(start).await? {
            match self.objects.modified(&record).await {
                Ok(time) if is_within(time, now, timeout) => return Ok(None),
                Ok(_) => {}
                // It is being completed or deleted, so somebody is at work.
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        let unit = if minutes == 1 { "minute" } else { "minutes" };
        Ok(Some(format!("nothing was put for more than {minutes} {unit}, its timeout")))
    }

    /// As [`timed_out`](Self::timed_out), for whoever wants to go on with it.
    pub(super) async fn check_in_time(&self, start: &Start) -> Result<()> {
        match self.timed_out(start).await? {
            Some(why) => Err(Error::new(ErrorKind::Conflict, why)),
            None => Ok(()),
        }
    }

    /// The names of the last record of each writer.
    async fn last_records(&self, start: &Start) -> Result<Vec<String>> {
        let (id, attempt) = (&start.metadata.id, start.metadata.attempt);
        let names = self.objects.list(&names::attempt(id, attempt)).await?;
        let mut last = BTreeMap::new();
        for record in names.iter().filter_map(|name| RecordId::from_name(id, attempt, name)) {
            let number = last.entry((record.epoch, record.writer)).or_insert(record.number);
            *number = record.number.max(*number);
        }
        let name = |((epoch, writer), number)| RecordId { epoch, writer, number }.name(id, attempt);
        Ok(last.into_iter().map(name).collect())
    }
}

fn is_within(time: Timestamp, now: Timestamp, timeout: Duration) -> bool {
    let since = now.duration_since(time);
    since.is_negative() || since.unsigned_abs() <= timeout
}
