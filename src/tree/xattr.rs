//! Extended attributes: what a store knows of a snapshot.

use crate::image::working::WorkingImage;
use crate::model::{Digest, Snapshot};
use crate::shown;

/// What all our attributes begin with.
pub(super) const PREFIX: &str = "user.fspfs.";

/// Longest name of an attribute in bytes (`XATTR_NAME_MAX`).
const MAX_NAME: usize = 255;

/// The attributes of an image, by name.
pub(super) fn attributes(snapshot: &Snapshot) -> Vec<(String, String)> {
    let mut attributes = Vec::new();
    let mut add = |name: &str, value: Option<String>| {
        let name = format!("{PREFIX}{name}");
        if let Some(value) = value
            && name.len() <= MAX_NAME
        {
            attributes.push((name, value));
        }
    };
    add("id", Some(snapshot.id.to_string()));
    add("state", Some(snapshot.state.as_str().to_owned()));
    add("state-message", snapshot.state_message.clone());
    add("size", Some(snapshot.volume_size.bytes().to_string()));
    add("parent", snapshot.parent.as_ref().map(ToString::to_string));
    add("lineage", snapshot.lineage.as_ref().map(ToString::to_string));
    add("volume-id", snapshot.volume_id.clone());
    add("description", Some(snapshot.description.clone()));
    add("start-time", Some(snapshot.start_time.to_string()));
    add("encrypted", Some(snapshot.encrypted.to_string()));
    add("content-digest", snapshot.content_digest.map(Digest::to_hex));
    add("data-blocks", snapshot.data_blocks.map(|blocks| blocks.to_string()));
    add("zero-blocks", snapshot.zero_blocks.map(|blocks| blocks.to_string()));
    for (key, value) in &snapshot.tags {
        // A key of many long characters is in `tags` alone.
        add(&format!("tag.{key}"), Some(value.clone()));
    }
    let tags = serde_json::to_string(&snapshot.tags).expect("keys and values are strings");
    let tags = shown::json(&tags);
    add("tags", Some(tags));
    attributes
}

/// The attributes of a file of `new/`, by name.
pub(super) fn of_working(image: &WorkingImage) -> Vec<(String, String)> {
    let status = image.status();
    let mut attributes = Vec::new();
    let mut add = |name: &str, value: Option<String>| {
        attributes.extend(value.map(|value| (format!("{PREFIX}{name}"), value)));
    };
    add("state", Some(status.state.as_str().to_owned()));
    add("error", status.error);
    add("snapshot", status.snapshot.map(|id| id.to_string()));
    add("base", status.base.map(|id| id.to_string()));
    add("staged-bytes", Some(status.staged.to_string()));
    if let Some((done, total)) = status.progress {
        add("progress", Some(format!("{done}/{total}")));
    }
    for (name, value) in image.wishes() {
        add(&name, Some(value));
    }
    attributes
}
