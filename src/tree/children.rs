//! What is in a directory.

use std::sync::Arc;

use super::catalog::{Catalog, Links, image_name};
use super::control::ControlFile;
use super::node::{Link, Node};
use crate::model::SnapshotId;
use crate::ops::table;

/// The directory of the jobs, below `control/`.
const JOBS: &str = "jobs";

pub(super) fn fixed_directories() -> [(&'static str, Node); 5] {
    [
        ("by-name", Node::ByName),
        ("by-tag", Node::ByTag),
        ("by-volume", Node::ByVolume),
        ("control", Node::Control),
        ("new", Node::New),
    ]
}

/// What a directory holds.
pub(super) fn children(node: &Node, catalog: &Catalog) -> Vec<(String, Node)> {
    let of = |links: Option<&Links>, directory: &str| -> Vec<(String, Node)> {
        let links = links.into_iter().flatten();
        links.map(|(name, target)| (name.clone(), link(directory, name, target))).collect()
    };
    match node {
        Node::Root => {
            let images = catalog.snapshots.values();
            let images = images.map(|s| (image_name(&s.id), Node::Image(Arc::clone(s))));
            let fixed = fixed_directories().into_iter().map(|(name, node)| (name.to_owned(), node));
            fixed.chain(images).collect()
        }
        Node::ByName => of(Some(&catalog.names), "by-name"),
        Node::ByVolume => {
            catalog.volumes.keys().map(|name| (name.clone(), Node::Volume(name.clone()))).collect()
        }
        Node::Volume(name) => of(catalog.volumes.get(name), &format!("by-volume/{name}")),
        Node::ByTag => {
            catalog.tags.keys().map(|key| (key.clone(), Node::TagKey(key.clone()))).collect()
        }
        Node::TagKey(key) => {
            let values = catalog.tags.get(key).into_iter().flatten();
            values
                .map(|(value, _)| (value.clone(), Node::TagValue(key.clone(), value.clone())))
                .collect()
        }
        Node::TagValue(key, value) => {
            let links = catalog.tags.get(key).and_then(|values| values.get(value));
            of(links, &format!("by-tag/{key}/{value}"))
        }
        Node::Control => {
            let files = ControlFile::ALL.into_iter();
            let files = files.map(|file| (file.name().to_owned(), Node::File(file)));
            let operations = table::in_control();
            let operations =
                operations.map(|entry| (entry.name.to_owned(), Node::Operation(entry)));
            let jobs = (JOBS.to_owned(), Node::Jobs);
            files.chain(operations).chain([jobs]).collect()
        }
        _ => Vec::new(),
    }
}

/// One entry of a directory of the catalog, without making the others.
pub(super) fn find_child(node: &Node, catalog: &Catalog, name: &str) -> Option<Node> {
    let of = |links: Option<&Links>, directory: &str| {
        links?.get(name).map(|target| link(directory, name, target))
    };
    match node {
        Node::ByName => of(Some(&catalog.names), "by-name"),
        Node::ByVolume => catalog.volumes.contains_key(name).then(|| Node::Volume(name.to_owned())),
        Node::Volume(volume) => of(catalog.volumes.get(volume), &format!("by-volume/{volume}")),
        Node::ByTag => catalog.tags.contains_key(name).then(|| Node::TagKey(name.to_owned())),
        Node::TagKey(key) => {
            let values = catalog.tags.get(key)?;
            values.contains_key(name).then(|| Node::TagValue(key.clone(), name.to_owned()))
        }
        Node::TagValue(key, value) => {
            let links = catalog.tags.get(key).and_then(|values| values.get(value));
            of(links, &format!("by-tag/{key}/{value}"))
        }
        Node::Control => {
            let mut children = children(node, catalog).into_iter();
            children.find(|(child, _)| child == name).map(|(_, node)| node)
        }
        _ => None,
    }
}

fn link(directory: &str, name: &str, target: &SnapshotId) -> Node {
    let (directory, name, target) = (directory.to_owned(), name.to_owned(), target.clone());
    Node::Link(Link { directory, name, target })
}

pub(super) fn link_target(link: &Link) -> String {
    let up = "../".repeat(link.directory.split('/').count());
    format!("{up}{}", image_name(&link.target))
}
