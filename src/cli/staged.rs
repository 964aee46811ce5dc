//! `staged`: the working images of a mount.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use super::StagedArgs;
use super::control::Control;
use super::output::Output;
use crate::image::working::Damaged;
use crate::ops::{Exit, text};
use crate::shown;

/// A working image. What it does not tell is empty.
#[derive(Debug, Default, Serialize)]
struct WorkingImage {
    name: String,
    state: String,
    /// Bytes.
    size: Option<u64>,
    staged_bytes: Option<u64>,
    /// Of a commit that is under way.
    blocks_done: Option<u64>,
    blocks_in_all: Option<u64>,
    snapshot: String,
    error: String,
}

pub(super) async fn staged(out: Output, args: &StagedArgs) -> anyhow::Result<Exit> {
    let control = Control::of_mount(&args.mount_point)?;
    // The mount may be slow to answer.
    let read = tokio::task::spawn_blocking(move || {
        let mut images = images(&control.working_directory())?;
        images.extend(control.damaged()?.into_iter().map(WorkingImage::from));
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok::<_, anyhow::Error>(images)
    });
    let images = read.await??;
    let header = ["NAME", "STATE", "SIZE", "STAGED", "SNAPSHOT", "ERROR"];
    let names = || images.iter().map(|image| shown::one_line(&image.name)).collect();
    out.result(&images, names, || text::columns(header, images.iter().map(row)))?;
    Ok(Exit::Done)
}

impl From<Damaged> for WorkingImage {
    fn from(damaged: Damaged) -> Self {
        let Damaged { name, error, .. } = damaged;
        Self { name, state: "damaged".to_owned(), error, ..Self::default() }
    }
}

fn row(image: &WorkingImage) -> [String; 6] {
    let cell = |text: &str| if text.is_empty() { "-".to_owned() } else { shown::one_line(text) };
    let state = match (image.blocks_done, image.blocks_in_all) {
        (Some(done), Some(all @ 1..)) => format!("{} {}%", image.state, done.min(all) * 100 / all),
        _ => cell(&image.state),
    };
    [
        cell(&image.name),
        state,
        image.size.map_or_else(|| "-".to_owned(), text::size),
        image.staged_bytes.map_or_else(|| "-".to_owned(), text::size),
        cell(&image.snapshot),
        cell(&image.error),
    ]
}

fn images(directory: &Path) -> anyhow::Result<Vec<WorkingImage>> {
    let mut images = Vec::new();
    for entry in fs_err::read_dir(directory)? {
        let path = entry?.path();
        match image(&path) {
            Ok(image) => images.push(image),
            // It was removed or renamed meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot look at {}", path.display()));
            }
        }
    }
    Ok(images)
}

fn image(path: &Path) -> std::io::Result<WorkingImage> {
    let attribute = |name: &str| {
        let value = xattr::get(path, format!("user.fspfs.{name}"))?.unwrap_or_default();
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&value).into_owned())
    };
    let progress = attribute("progress")?;
    let (done, all) = progress.split_once('/').unwrap_or_default();
    Ok(WorkingImage {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        state: attribute("state")?,
        size: Some(path.symlink_metadata()?.len()),
        staged_bytes: attribute("staged-bytes")?.parse().ok(),
        blocks_done: done.parse().ok(),
        blocks_in_all: all.parse().ok(),
        snapshot: attribute("snapshot")?,
        error: attribute("error")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_does_not_tell_is_a_dash() {
        let image = WorkingImage {
            name: "web.img".to_owned(),
            size: Some(3 << 30),
            ..WorkingImage::default()
        };
        assert_eq!(row(&image), ["web.img", "-", "3.0 GiB", "-", "-", "-"]);
        let done = WorkingImage {
            state: "committing".to_owned(),
            blocks_done: Some(3),
            blocks_in_all: Some(8),
            ..WorkingImage::default()
        };
        assert_eq!(row(&done)[1], "committing 37%");
        let begun = WorkingImage { blocks_done: Some(0), blocks_in_all: Some(0), ..done };
        assert_eq!(row(&begun)[1], "committing");
        let image = WorkingImage {
            state: "failed".to_owned(),
            staged_bytes: Some(512 << 10),
            error: "two\nlines".to_owned(),
            ..image
        };
        assert_eq!(row(&image)[1..4], ["failed", "3.0 GiB", "512.0 KiB"]);
        assert_eq!(row(&image)[5], "two\u{fffd}lines");
    }

    #[test]
    fn files_without_attributes_are_listed_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b", "a"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let found = images(dir.path()).unwrap();
        let mut names: Vec<_> = found.iter().map(|image| (&image.name[..], image.size)).collect();
        names.sort_unstable();
        assert_eq!(names, [("a", Some(1)), ("b", Some(1))]);
        assert!(images(&dir.path().join("none")).is_err());
    }
}
