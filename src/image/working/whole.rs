//! Whether an image is whole, as far as that can be known before a snapshot is made of it.

use std::sync::Arc;

use super::phase::Remark;
use super::put::in_time;
use super::{Error, Result, WorkingImage};
use crate::claim::{Fault, look};

/// What takes an image that is not whole.
const AS_IS: &str = "`fspfs commit --as-is`";

impl WorkingImage {
    /// Checks that it is not known to lack something, and is as long as what is on it. What fails is interrupted;
    /// `as_is` does without.
    ///
    /// # Errors
    ///
    /// [`Error::NotWhole`], with the reason.
    pub(super) async fn check_whole(self: &Arc<Self>, as_is: bool) -> Result<()> {
        if as_is {
            self.state().lost.clear();
            return Ok(());
        }
        let Some(why) = self.reason_to_refuse().await else { return Ok(()) };
        {
            let mut state = self.state();
            // What a program was told stays said.
            if state.is_dirty() && state.phase.trouble().is_none() {
                state.phase.say(Some(Remark::Interrupted(why.clone())));
                state.unsynced = true;
            }
        }
        self.record_interruption().await;
        Err(Error::NotWhole(why))
    }

    async fn reason_to_refuse(self: &Arc<Self>) -> Option<String> {
        {
            let lost = &self.state().lost;
            if !lost.is_empty() {
                return Some(format!(
                    "{lost} could not be written, and what was to follow may be missing: write it again; {AS_IS} takes it as it is"
                ));
            }
        }
        if !self.shop.settings.check_images || !self.state().is_dirty() {
            return None;
        }
        let name = self.name();
        let fault = self.fault().await?;
        if let Some(base) = self.fault_of_base().await
            && fault.is_from(&base)
        {
            tracing::warn!("{name}: {fault}, as its base is");
            return None;
        }
        Some(fault.refusal(&name, AS_IS))
    }

    /// What is wrong with it as a raw image. What cannot be read is not looked at: reading it for the snapshot
    /// tells.
    async fn fault(self: &Arc<Self>) -> Option<Fault> {
        let read = |offset, len| {
            let image = Arc::clone(self);
            async move { image.read(offset, len).await }
        };
        match in_time(look(self.len(), read)).await {
            Ok(found) => {
                found.notes.iter().for_each(|note| tracing::info!("{}: {note}", self.name()));
                found.fault
            }
            Err(error) => {
                tracing::warn!("{} is not checked: {error}", self.name());
                None
            }
        }
    }

    async fn fault_of_base(&self) -> Option<Fault> {
        let base = self.state().base.known().map(Arc::clone)?;
        let read = |offset, len| {
            let base = Arc::clone(&base);
            async move { base.read(offset, len).await }
        };
        in_time(look(base.image().len(), read)).await.ok()?.fault
    }
}
