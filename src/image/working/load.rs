//! Working images that an earlier mount has left.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use super::attributes::Attributes;
use super::base::{self, Base, Missing};
use super::layer::{By, Layer, Turn};
use super::phase::{Phase, Remark};
use super::{Damaged, Error, Inner, REMOVED, Result, Trouble, WorkingImage, Workshop};
use crate::blocking::blocking;
use crate::image::staging::record::{self, ImageRecord, RECORD, boot};
use crate::image::staging::{Files, Staging};

impl WorkingImage {
    /// All images that are staged; those that were being committed, or failed, are to be committed
    /// again.
    ///
    /// What cannot be read stays where it is, is logged, and is among
    /// [`Workshop::damaged`].
    pub async fn load_all(shop: &Arc<Workshop>) -> Vec<Arc<Self>> {
        let directories = match shop.staging.images() {
            Ok(directories) => directories,
            Err(error) => {
                tracing::error!(
                    "cannot see what is staged in {}: {error}",
                    shop.staging.path().display()
                );
                return Vec::new();
            }
        };
        let mut images = Vec::new();
        for directory in directories {
            match Self::load(shop, &directory).await {
                Ok(Some(image)) => images.push(image),
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(
                        "what is staged in {} cannot be used: {error}",
                        directory.display()
                    );
                    let damaged = Damaged::new(directory, &error);
                    shop.damaged.lock().unwrap_or_else(PoisonError::into_inner).push(damaged);
                }
            }
        }
        images
    }

    async fn load(shop: &Arc<Workshop>, directory: &Path) -> Result<Option<Arc<Self>>> {
        let damaged = |why: String| Error::Damaged { path: directory.display().to_string(), why };
        crate::own::check(directory).map_err(|e| Error::io("use", directory, e))?;
        let unborn = is_unborn(directory).map_err(|e| Error::io("read", directory, e))?;
        if unborn || directory.join(REMOVED).exists() {
            let left = std::fs::remove_dir_all(directory);
            left.map_err(|e| Error::io("remove", directory, e))?;
            return Ok(None);
        }
        let record = ImageRecord::read(directory).map_err(damaged)?;
        if Some(record.id) != record::id_of(directory) {
            return Err(damaged("its image.json is that of another image".to_owned()));
        }
        if record.generations.is_empty() && record.trouble.is_none() {
            // It was clean when the mount ended.
            let left = Staging::discard(directory);
            left.map_err(|e| Error::io("remove", directory, e))?;
            return Ok(None);
        }
        let mut base = match &record.base {
            Some(id) => base::look_up(shop, id).await,
            None => Base::None,
        };
        let same_run = record.boot == boot();
        let mut layers = Vec::new();
        let mut len = base.known().map_or(0, |base| base.image().len());
        for generation in &record.generations {
            let (place, id) = (directory.to_owned(), generation.id);
            let over_data = record.base.is_some() || !layers.is_empty();
            let opened = blocking(move || Files::open(&place, id, same_run, over_data)).await;
            let (files, marks) = opened.map_err(|e| damaged(e.to_string()))?;
            len = files.data.metadata().map_err(|e| Error::io("read", directory, e))?.len();
            shop.staging.count(marks.staged.len());
            let mut layer = Layer::new(files);
            layer.marks = marks;
            layer.frozen = generation.frozen;
            layer.durable = generation.durable;
            layer.queued = generation.queued.then_some(Turn::Closed);
            layer.attempt.clone_from(&generation.attempt);
            layers.push(layer);
        }
        // An earlier version froze what waits.
        if let [_, upper] = &mut layers[..]
            && std::mem::take(&mut upper.frozen)
        {
            upper.queued = Some(Turn::Closed);
        }
        // A copy of a store has its id, and not what was made in the store since.
        let made = [record.base.clone(), layers.first().and_then(Layer::pending)];
        let mut elsewhere = None;
        for id in made.into_iter().flatten() {
            if elsewhere.is_none() && base::is_gone(shop, &id).await {
                elsewhere = Some(format!(
                    "{id} is not in this store, and should be: it was deleted, or this is a copy of the store; `fspfs commit` takes the file here"
                ));
            }
        }
        // What was truncated to nothing has nothing of it.
        if elsewhere.is_none()
            && base.missing().is_some()
            && layers.first().is_some_and(|layer| layer.marks.cut_off)
        {
            base = Base::None;
        }
        if let Some(Missing { why, .. }) = base.missing() {
            tracing::error!("new/{}: {why}", record.name);
        }
        let mut trouble = record.trouble;
        if !same_run && layers.iter().any(|layer| layer.frozen && !layer.durable) {
            // Nobody was told that it is safe.
            let why =
                "the machine stopped while it was being committed, and some of it may be missing";
            trouble = Some(Trouble::Interrupted(why.to_owned()));
            layers.last_mut().expect("there is one").frozen = false;
        }
        let phase = match elsewhere {
            Some(why) => Phase::Idle(Some(Remark::Elsewhere(why, trouble))),
            None => trouble.map_or(Phase::Idle(None), Phase::from),
        };
        let ImageRecord { name, mode, uid, gid, modified, wishes, snapshot, lost, .. } = record;
        let attributes = Attributes { mode, uid, gid, modified };
        let new = Inner::new(name, attributes, base);
        let inner = Inner { len, layers, phase, lost, wishes, snapshot, ..new };
        Ok(Some(Self::with(Arc::clone(shop), directory.to_owned(), inner)))
    }

    /// Goes on with a commit that was under way when its mount ended, or that failed.
    pub fn resume(self: &Arc<Self>) {
        let (wanted, trouble) = {
            let state = self.state();
            if state.phase.is_elsewhere() {
                return;
            }
            (state.layers.iter().any(Layer::is_wanted), state.phase.trouble())
        };
        if wanted && !matches!(trouble, Some(Trouble::Interrupted(_))) {
            // What was written over it has not been closed, and is not committed with it.
            self.go_on();
        } else if matches!(trouble, Some(Trouble::Failed(_))) {
            let image = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = image.begin_commit(true, By::Closing).await {
                    tracing::error!("{} cannot be committed: {error}", image.name());
                }
            });
        }
    }
}

impl Damaged {
    fn new(directory: PathBuf, error: &Error) -> Self {
        let id = record::id_of(&directory);
        let record = ImageRecord::read(&directory).ok().filter(|record| Some(record.id) == id);
        let name = record.map(|record| record.name).or_else(|| id.map(|id| id.to_string()));
        Self { name: name.unwrap_or_default(), directory, error: error.to_string() }
    }
}

/// Whether a directory is of an image whose making nobody was told of: without a document, and
/// without data.
fn is_unborn(directory: &Path) -> std::io::Result<bool> {
    let unfinished = Path::new(RECORD).with_extension("next");
    for entry in std::fs::read_dir(directory)? {
        if Path::new(&entry?.file_name()) != unfinished {
            return Ok(false);
        }
    }
    Ok(true)
}
