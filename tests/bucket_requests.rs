//! What a repository in a bucket asks of the service, counted between the two.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashSet;
use std::os::unix::fs::FileExt as _;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_types::SdkConfig;
use fspfs::model::{BLOCK_SIZE, Digest, SnapshotId};
use fspfs::store::repository::Repository;
use fspfs::store::{ErrorKind, ListFrom, ListedBlock, SnapshotStore as _, StoreOptions};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use support::between::{Between, Request};
use support::service::has_buckets;
use support::{BLOCK, GIB, MIB, Sandbox, can_mount};

/// A bucket, and the way to it on which requests are counted.
struct Counted {
    sandbox: Sandbox,
    way: Between,
}

impl Counted {
    fn new() -> Self {
        let sandbox = Sandbox::with_bucket(false);
        let way = Between::counting(&sandbox.service().url);
        Self { sandbox, way }
    }

    /// The repository, by that way.
    fn url(&self) -> String {
        format!("s3://bucket/snaps?region=us-east-1&endpoint={}", self.way.url)
    }

    /// A client that goes another way.
    fn client(&self) -> aws_sdk_s3::Client {
        let config = aws_sdk_s3::config::Builder::from(&configuration())
            .endpoint_url(&self.sandbox.service().url)
            .force_path_style(true)
            .build();
        aws_sdk_s3::Client::from_conf(config)
    }

    /// Opens a repository as a program does that has a configuration of its own.
    async fn open(&self) -> Repository {
        let (url, options) = (self.url().parse().unwrap(), StoreOptions::default());
        Repository::in_bucket(&configuration(), &url, &options).await.unwrap()
    }
}

fn configuration() -> SdkConfig {
    SdkConfig::builder()
        .behavior_version(aws_config::BehaviorVersion::latest())
        .region(aws_config::Region::new("us-east-1"))
        .credentials_provider(SharedCredentialsProvider::new(Credentials::new(
            "AKIATEST",
            "test/secret",
            None,
            None,
            "test",
        )))
        .retry_config(aws_config::retry::RetryConfig::disabled())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .build()
}

async fn listed(store: &Repository, id: &SnapshotId) -> Vec<ListedBlock> {
    let start = ListFrom::Index(fspfs::model::BlockIndex::ZERO);
    store.list_blocks(id, start, 1000).await.unwrap().blocks
}

#[tokio::test]
async fn the_first_block_takes_seven_requests_and_the_next_one_more() {
    if !has_buckets() {
        return;
    }
    let counted = Counted::new();
    counted.sandbox.random("disk.img", 3 * MIB);
    let id = counted.sandbox.upload("disk.img", &["--name", "web"]).parse().unwrap();
    let store = counted.open().await;
    assert_eq!(store.describe(&id).await.unwrap().name(), Some("web"));
    let blocks = listed(&store, &id).await;
    store.get_block(&id, blocks[0].index, &blocks[0].token).await.unwrap();
    let requests = counted.way.requests();
    assert!(requests.len() <= 7, "{requests:#?}");
    store.get_block(&id, blocks[1].index, &blocks[1].token).await.unwrap();
    let requests = counted.way.requests();
    assert!(requests.len() == 1 && requests[0].line.contains(" bytes="), "{requests:#?}");
}

/// Those for parts of packs.
fn of_packs(requests: &[Request]) -> usize {
    let lines = requests.iter().map(|request| &request.line);
    lines.filter(|line| line.contains("/packs/") && line.contains(" bytes=")).count()
}

#[test]
fn neighbours_come_with_one_request() {
    if !has_buckets() {
        return;
    }
    let counted = Counted::new();
    let Counted { sandbox, way } = &counted;
    sandbox.random("disk.img", 128 * MIB);
    let id = sandbox.upload("disk.img", &[]);
    let url = counted.url();
    sandbox.ok(&["-s", &url, "download", &id, "out.img"]);
    assert!(support::same(sandbox.join("disk.img"), sandbox.join("out.img")));
    let requests = of_packs(&way.requests());
    eprintln!("a download of 256 blocks took {requests} requests");
    assert!((16..=256 / 8).contains(&requests), "{requests}");
    if !can_mount(&[]) {
        return;
    }
    let mount = sandbox.mount(&[&url]);
    way.requests();
    sandbox.sh(&format!("cmp -n {} disk.img mnt/{id}.img", 128 * MIB));
    let requests = of_packs(&way.requests());
    eprintln!("reading them in order took {requests} requests");
    assert!(requests <= 256 / 3, "{requests}");
    mount.unmount();
}

#[tokio::test]
async fn damage_among_neighbours_is_that_of_one_block() {
    if !has_buckets() {
        return;
    }
    let counted = Counted::new();
    counted.sandbox.random("disk.img", 8 * MIB);
    let id = counted.sandbox.upload("disk.img", &[]).parse().unwrap();
    let [pack] = &counted.sandbox.service().keys("snaps/packs/")[..] else { panic!("one pack") };
    let client = counted.client();
    let object = client.get_object().bucket("bucket").key(pack).send().await.unwrap();
    let whole = object.body.collect().await.unwrap().into_bytes().to_vec();
    let read_all = async || {
        let store = counted.open().await;
        let blocks = listed(&store, &id).await;
        counted.way.requests();
        let read = blocks.iter().map(|block| store.get_block(&id, block.index, &block.token));
        let read = futures::future::join_all(read).await;
        let failed = read.into_iter().enumerate().filter_map(|(n, read)| Some((n, read.err()?)));
        (failed.collect::<Vec<_>>(), of_packs(&counted.way.requests()))
    };
    let (failed, requests) = read_all().await;
    assert!(failed.is_empty() && requests <= 2, "{failed:?} after {requests}");
    // In the frame of one block, and in the end of the last.
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (bytes, most) in [(flipped, 2), (whole[..whole.len() * 15 / 16].to_vec(), 17)] {
        client.put_object().bucket("bucket").key(pack).body(bytes.into()).send().await.unwrap();
        let (failed, requests) = read_all().await;
        assert!(failed.len() == 1 && requests <= most, "{failed:?} after {requests}");
        assert_eq!(failed[0].1.kind(), ErrorKind::Corrupt, "{failed:?}");
    }
}

#[tokio::test]
async fn a_bucket_of_many_snapshots_is_opened_by_one_request() {
    const SNAPSHOTS: u32 = 2_000;
    if !has_buckets() {
        return;
    }
    let counted = Counted::new();
    let client = counted.client();
    let put = |n| {
        let key = format!("snaps/snapshots/snap-{n:017x}.json");
        client.put_object().bucket("bucket").key(key).send()
    };
    stream::iter(0..SNAPSHOTS)
        .map(put)
        .buffer_unordered(8)
        .try_for_each(async |_| Ok(()))
        .await
        .unwrap();
    counted.open().await;
    let requests = counted.way.requests();
    assert!(requests.len() == 1 && requests[0].kind() == "GET", "{requests:#?}");
    assert!(requests[0].line.contains("/snaps/fspfs.json"), "{requests:#?}");
}

#[tokio::test]
async fn a_list_reads_what_is_new_since_the_last_one() {
    if !has_buckets() {
        return;
    }
    let counted = Counted::new();
    counted.sandbox.random("disk.img", MIB);
    let upload = |name: &str| {
        let id = counted.sandbox.upload("disk.img", &["--name", name]);
        id.parse::<SnapshotId>().unwrap()
    };
    let (a, b) = (upload("a"), upload("b"));
    let (store, other) = (counted.open().await, counted.open().await);
    let listed = async || {
        counted.way.requests();
        let page = store.list(None).await.unwrap();
        let requests = counted.way.requests();
        let read = requests.iter().filter(|request| request.kind() == "GET").count();
        let mut names: Vec<_> = page
            .snapshots
            .iter()
            .map(|one| (one.id.clone(), one.name().unwrap().to_owned()))
            .collect();
        names.sort_by(|a, b| a.1.cmp(&b.1));
        (names, read)
    };
    let named = |id: &SnapshotId, name: &str| (id.clone(), name.to_owned());
    assert_eq!(listed().await, (vec![named(&a, "a"), named(&b, "b")], 4));
    assert_eq!(listed().await, (vec![named(&a, "a"), named(&b, "b")], 0));
    let c = upload("c");
    assert_eq!(listed().await, (vec![named(&a, "a"), named(&b, "b"), named(&c, "c")], 2));
    // Tags that another host has changed, and a snapshot that it has deleted and made again.
    let tags = [("Name".to_owned(), "z".to_owned())].into_iter().collect();
    other.set_tags(&b, tags).await.unwrap();
    assert_eq!(listed().await, (vec![named(&a, "a"), named(&c, "c"), named(&b, "z")], 2));
    other.delete(&c).await.unwrap();
    let again = fspfs::store::StartRequest {
        id: Some(c.clone()),
        tags: [("Name".to_owned(), "y".to_owned())].into_iter().collect(),
        ..fspfs::store::StartRequest::new(fspfs::model::VolumeSize::from_gib(2).unwrap())
    };
    other.start(again).await.unwrap();
    other
        .complete(
            &c,
            fspfs::store::CompleteRequest { changed_blocks: 0, checksum: None, started: None },
        )
        .await
        .unwrap();
    assert_eq!(listed().await.0, [named(&a, "a"), named(&c, "y"), named(&b, "z")]);
    let page = store.list(None).await.unwrap();
    let found = page.snapshots.iter().find(|one| one.id == c).unwrap();
    assert_eq!(found.volume_size.gib(), 2);
}

/// Requests by their kind.
fn by_kind(requests: &[Request]) -> [(&'static str, usize); 5] {
    ["PUT", "LIST", "GET", "HEAD", "DELETE"]
        .map(|kind| (kind, requests.iter().filter(|request| request.kind() == kind).count()))
}

/// What `docs/costs.md` says that an archive costs, by its packs and parts, which is the first in its bucket.
fn first(packs: usize, parts: usize) -> [(&'static str, usize); 5] {
    [
        ("PUT", 2 * packs + parts + 6),
        ("LIST", 9),
        ("GET", 3 * packs + parts + 14),
        ("HEAD", packs + 5),
        ("DELETE", 2),
    ]
}

/// The same of a child, of whose parts some are changed, beside so many others.
fn child(packs: usize, parts: usize, changed: usize, others: usize) -> [(&'static str, usize); 5] {
    [
        ("PUT", 2 * packs + changed + 6),
        ("LIST", 10),
        ("GET", 3 * packs + parts + changed + 2 * others + 20),
        ("HEAD", packs + 5),
        ("DELETE", 2),
    ]
}

/// Packs that were put, and requests by their kind; the packs of an archive of so many blocks are checked.
fn counted(requests: &[Request], blocks: u64) -> (usize, [(&'static str, usize); 5]) {
    let is_pack = |r: &&Request| r.kind() == "PUT" && r.line.contains("/packs/");
    let packs = requests.iter().filter(is_pack).count();
    // Where it is slow what there is after ten seconds is saved before it fills a pack.
    let full = usize::try_from(blocks).unwrap().div_ceil(64);
    assert!(packs == full || packs == full + 1, "{packs}");
    (packs, by_kind(requests))
}

#[test]
fn an_archive_costs_what_the_formula_says() {
    if !has_buckets() {
        return;
    }
    let far = Counted::new();
    let Counted { sandbox, way } = &far;
    sandbox.ok(&["-s", "here", "init"]);
    let local =
        |words: &[&str]| sandbox.ok(&[&["-s", "here", "-q"], words].concat()).trim_end().to_owned();
    // Where the data of each part of 8 GiB is, and how many blocks the next archive changes there.
    for (name, runs, changes) in [
        ("small", &[(0, 64 * BLOCK)][..], &[(0, 3)][..]),
        ("large", &[(0, 320 * BLOCK)], &[(0, 70)]),
        ("parts", &[(0, 10 * BLOCK), (9 * GIB, 20 * BLOCK), (17 * GIB, BLOCK)], &[(9 * GIB, 2)]),
        ("all parts", &[(0, BLOCK), (9 * GIB, BLOCK)], &[(0, 1), (9 * GIB, 1)]),
    ] {
        let file = format!("{name}.img");
        let image = sandbox.image(&file, 20 * GIB, runs);
        let mut parent = local(&["upload", &file]);
        let url = format!("bucket/{}?endpoint={}", name.replace(' ', "-"), way.url);
        // What is learnt of the service is kept.
        sandbox.ok(&["init", &format!("s3://{url}")]);
        way.requests();
        sandbox.ok(&["-s", "here", "movetos3", &parent, &url]);
        let blocks = runs.iter().map(|(_, len)| len / BLOCK).sum::<u64>();
        let (packs, found) = counted(&way.requests(), blocks);
        assert_eq!(found, first(packs, runs.len()), "{name}");
        let image = std::fs::File::options().write(true).open(image).unwrap();
        for others in 1..3 {
            for &(at, blocks) in changes {
                for block in 0..blocks {
                    image.write_all_at(&[0xee], at + block * BLOCK + 8 * block + others).unwrap();
                }
            }
            let id = local(&["upload", &file, "--parent", &parent]);
            way.requests();
            sandbox.ok(&["-s", "here", "movetos3", &id, &url]);
            let blocks = changes.iter().map(|(_, blocks)| blocks).sum();
            let (packs, found) = counted(&way.requests(), blocks);
            let others = usize::try_from(others).unwrap();
            assert_eq!(found, child(packs, runs.len(), changes.len(), others), "{name}");
            parent = id;
        }
    }
}

#[test]
fn thirty_daily_snapshots_send_what_was_changed() {
    if !has_buckets() {
        return;
    }
    const DAYS: usize = 30;
    const BLOCKS: u64 = 128;
    let counted = Counted::new();
    let Counted { sandbox, way } = &counted;
    sandbox.ok(&["-s", "here", "init"]);
    let path = sandbox.image("disk.img", BLOCKS * BLOCK, &[(0, 40 * BLOCK)]);
    let file = std::fs::File::options().write(true).open(path).unwrap();
    let url = format!("bucket/daily?endpoint={}", way.url);
    let mut random = fastrand::Rng::with_seed(7);
    let (mut contents, mut ids) = (HashSet::new(), Vec::<String>::new());
    let mut read = || {
        let image = std::fs::read(sandbox.join("disk.img")).unwrap();
        let new = image.chunks(BLOCK_SIZE).filter(|block| contents.insert(Digest::of(block)));
        // What is all zeros is a hole.
        let new = new.filter(|block| block.iter().any(|&byte| byte != 0));
        new.map(|block| zstd::bulk::compress(block, 1).unwrap().len()).sum::<usize>() as u64
    };
    for day in 0..DAYS {
        for _ in 0..random.u64(1..8) {
            // A file that grows, a log, a record of a database.
            let (at, len) = (random.u64(0..BLOCKS) * BLOCK, random.usize(1..BLOCK_SIZE));
            let bytes: Vec<u8> = match random.u8(0..3) {
                0 => std::iter::repeat_with(|| random.u8(..)).take(len).collect(),
                1 => format!("a line of day {day}\n").bytes().cycle().take(len).collect(),
                _ => std::iter::repeat_with(|| random.u8(..)).take(512).collect(),
            };
            file.write_all_at(&bytes, at + random.u64(0..=BLOCK - bytes.len() as u64)).unwrap();
        }
        let changed = read();
        let upload = ["-s", "here", "-q", "upload", "disk.img", "--name", "web"];
        let parent = ids.last().map(|id| ["--parent", id]);
        let id = sandbox.ok(&[&upload[..], parent.as_ref().map_or(&[][..], |p| &p[..])].concat());
        let id = id.trim_end().to_owned();
        way.requests();
        sandbox.ok(&["-s", "here", "movetos3", &id, &url]);
        let requests = way.requests();
        let sent = |is_pack: bool| {
            let of = requests
                .iter()
                .filter(|r| r.kind() == "PUT" && r.line.contains("/packs/") == is_pack);
            of.map(|request| request.body).sum::<u64>()
        };
        let (packs, index) = (sent(true), sent(false));
        assert!(packs <= changed + changed / 10 + 4096, "day {day}: {packs} for {changed}");
        // 84 bytes for each block, in a page and in records, and some documents.
        assert!(index <= 2 * 100 * BLOCKS + 8192, "day {day}: {index}");
        ids.push(id);
    }
    let gc = sandbox.ok(&["-s", &format!("s3://{url}"), "--json", "gc", "--dry-run"]);
    let gc: serde_json::Value = serde_json::from_str(&gc).unwrap();
    contents.remove(&Digest::OF_ZEROS);
    assert_eq!(gc["packed_blocks"], contents.len(), "{gc}");
    sandbox.ok(&["getfroms3", ids.last().unwrap(), &url, "--output", "out.img"]);
    assert!(support::same(sandbox.join("disk.img"), sandbox.join("out.img")));
}
