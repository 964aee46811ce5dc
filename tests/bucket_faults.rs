//! Faults between the program and a bucket: what it gives is right, or an error that says what to do.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rstest::rstest;
use support::between::{Act, Between, Request};
use support::service::has_buckets;
use support::{BLOCK, MIB, Sandbox, run, text};

/// A snapshot in a local repository, a bucket, and a way to it that may fail.
struct Faulty {
    sandbox: Sandbox,
    way: Between,
    id: String,
}

impl Faulty {
    /// `rule` holds while `is_on` says so.
    fn new(
        is_on: &Arc<AtomicBool>,
        mut rule: impl FnMut(&Request, String) -> Act + Send + 'static,
    ) -> Self {
        let sandbox = Sandbox::with_bucket(false);
        sandbox.ok(&["-s", "here", "init"]);
        sandbox.random("disk.img", 48 * MIB);
        let id = sandbox.ok(&["-s", "here", "-q", "upload", "disk.img"]).trim_end().to_owned();
        let is_on = Arc::clone(is_on);
        let way = Between::with_rule(&sandbox.service().url, move |request, head| {
            if is_on.load(Ordering::SeqCst) { rule(request, head) } else { Act::Pass(head) }
        });
        Self { sandbox, way, id }
    }

    fn url(&self) -> String {
        format!("bucket/archive?endpoint={}", self.way.url)
    }

    fn run(&self, words: &[&str]) -> (bool, String) {
        let output = run(self.sandbox.fspfs().args(["-s", "here"]).args(words));
        (output.status.success(), text(&output))
    }

    fn moves(&self) -> (bool, String) {
        self.run(&["movetos3", &self.id, &self.url()])
    }

    #[track_caller]
    fn assert_restores(&self) {
        let (id, url) = (&self.id, &self.url());
        let (is_done, said) = self.run(&["getfroms3", id, url, "--output", "out.img"]);
        assert!(is_done, "{said}");
        assert!(support::same(self.sandbox.join("disk.img"), self.sandbox.join("out.img")));
        std::fs::remove_file(self.sandbox.join("out.img")).unwrap();
    }
}

fn on() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(true))
}

fn off() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(false))
}

/// Whether this is one of every `n`.
fn each(n: usize) -> impl FnMut() -> bool {
    let mut count = 0;
    move || {
        count += 1;
        count % n == 0
    }
}

#[rstest]
#[case::whose_connections_are_cut(|head| Act::Cut(head, 700))]
#[case::that_answer_503(|_| Act::error("503 Slow Down", "SlowDown"))]
#[case::that_answer_500(|_| Act::error("500 Internal Server Error", "InternalError"))]
fn requests_are_made_again(#[case] fault: fn(String) -> Act) {
    if !has_buckets() {
        return;
    }
    let mut is_hit = each(5);
    let faulty =
        Faulty::new(&on(), move |_, head| if is_hit() { fault(head) } else { Act::Pass(head) });
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    faulty.assert_restores();
    let verified = faulty.sandbox.ok(&["-s", &format!("s3://{}", faulty.url()), "verify"]);
    assert!(verified.contains("Everything is intact"), "{verified}");
    // An answer that was lost stores nothing twice.
    assert_eq!(faulty.sandbox.service().keys("archive/packs/").len(), 2);
}

#[test]
fn a_page_in_the_place_of_a_repository_is_told_as_such() {
    if !has_buckets() {
        return;
    }
    let is_on = off();
    let faulty = Faulty::new(&is_on, |request, head| {
        if request.kind() != "GET" {
            return Act::Pass(head);
        }
        let page = "<html><body>Sign in</body></html>";
        Act::Answer(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{page}", page.len()))
    });
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    is_on.store(true, Ordering::SeqCst);
    let (is_done, said) = faulty.run(&["list", "-s", &format!("s3://{}", faulty.url())]);
    assert!(!is_done && said.contains("a page of HTML") && !said.contains("damaged"), "{said}");
}

#[test]
fn a_list_is_read_no_further_than_one_can_be() {
    if !has_buckets() {
        return;
    }
    let is_on = off();
    let faulty = Faulty::new(&is_on, |request, head| {
        if request.kind() != "LIST" {
            return Act::Pass(head);
        }
        let key = "<Contents><Key>archive/snapshots/snap-0a.json</Key></Contents>";
        let keys = key.repeat(20 * 1024 * 1024 / key.len());
        let list = format!("<ListBucketResult>{keys}</ListBucketResult>");
        Act::Answer(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{list}", list.len()))
    });
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    is_on.store(true, Ordering::SeqCst);
    let (is_done, said) = faulty.run(&["list", "-s", &format!("s3://{}", faulty.url())]);
    assert!(!is_done && said.contains("length limit exceeded"), "{said}");
}

/// An answer with a part of an object that has too few bytes, and says so, or others.
fn part(request: &Request, whole: u64) -> Act {
    let (_, range) = request.line.rsplit_once(" bytes=").unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
    let len = usize::try_from(last - first + 1 - u64::from(whole == 0)).unwrap();
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{}\r\n",
        last + 1000
    );
    Act::Answer(format!("{head}Content-Length: {len}\r\n\r\n{}", "x".repeat(len)))
}

#[rstest]
#[case::that_is_short(0)]
#[case::of_other_bytes(1)]
fn a_part_is_not_what_is_given(#[case] whole: u64) {
    if !has_buckets() {
        return;
    }
    let is_on = off();
    let faulty = Faulty::new(&is_on, move |request, head| {
        let is_part = request.line.contains("/packs/") && request.line.contains(" bytes=");
        if is_part { part(request, whole) } else { Act::Pass(head) }
    });
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    is_on.store(true, Ordering::SeqCst);
    let (is_done, said) = faulty.run(&["getfroms3", &faulty.id, &faulty.url(), "--output", "out"]);
    assert!(!is_done && said.contains("packs/"), "{said}");
    assert!(!faulty.sandbox.join("out").exists());
    is_on.store(false, Ordering::SeqCst);
    faulty.assert_restores();
}

#[rstest]
#[case("PUT", "s3:PutObject")]
#[case("LIST", "s3:ListBucket")]
#[case("GET", "s3:GetObject")]
#[case("HEAD", "s3:GetObject")]
#[case("DELETE", "s3:DeleteObject")]
fn an_action_that_is_denied_is_named(#[case] kind: &'static str, #[case] action: &str) {
    if !has_buckets() {
        return;
    }
    let is_on = on();
    let faulty = Faulty::new(&is_on, move |request, head| {
        let is_denied = request.kind() == kind;
        if is_denied { Act::error("403 Forbidden", "AccessDenied") } else { Act::Pass(head) }
    });
    let (is_done, said) = faulty.moves();
    // What cannot be deleted stays, and the archive is whole.
    if kind == "DELETE" {
        assert!(is_done || said.contains(action), "{said}");
    } else {
        assert!(!is_done && said.contains(action), "{said}");
        // What was not made is not said to stay.
        assert!(!said.contains(" stays in "), "{said}");
    }
    is_on.store(false, Ordering::SeqCst);
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    faulty.assert_restores();
}

#[rstest]
#[case("LIST", "s3:ListBucket", "failure")]
#[case("GET", "s3:GetObject", "failure")]
#[case("PUT", "s3:PutObject", "warning")]
fn the_doctor_says_which_action_is_denied(
    #[case] kind: &'static str,
    #[case] action: &str,
    #[case] status: &str,
) {
    if !has_buckets() {
        return;
    }
    let is_on = off();
    let faulty = Faulty::new(&is_on, move |request, head| {
        let is_denied = request.kind() == kind;
        if is_denied { Act::error("403 Forbidden", "AccessDenied") } else { Act::Pass(head) }
    });
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    is_on.store(true, Ordering::SeqCst);
    let checks = faulty.sandbox.doctor(&format!("s3://{}", faulty.url()));
    for check in ["s3:ListBucket", "s3:GetObject", "s3:PutObject"] {
        let found = checks.iter().find(|found| found["check"] == check);
        if check == action {
            let found = found.unwrap();
            assert_eq!(found["status"], status, "{found}");
            assert!(found["cure"].as_str().unwrap().contains("docs/iam.md"), "{found}");
            assert!(!found["found"].as_str().unwrap().contains("doctor"), "{found}");
        } else {
            assert!(found.is_none_or(|f| f["status"] == "ok" || f["status"] == "skipped"));
        }
    }
}

#[test]
fn a_move_whose_credentials_expire_goes_on_with_new_ones() {
    if !has_buckets() {
        return;
    }
    let (is_on, packs) = (on(), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&packs);
    let faulty = Faulty::new(&is_on, move |request, head| {
        let is_pack = request.kind() == "PUT" && request.line.contains("/packs/");
        if seen.fetch_add(usize::from(is_pack), Ordering::SeqCst) > 0 {
            return Act::error("400 Bad Request", "ExpiredToken");
        }
        Act::Pass(head)
    });
    let (is_done, said) = faulty.moves();
    assert!(!is_done && said.contains("ExpiredToken"), "{said}");
    assert!(said.contains("stays pending") && said.contains("goes on: "), "{said}");
    assert!(faulty.sandbox.service().keys("archive/snapshots/").is_empty());
    is_on.store(false, Ordering::SeqCst);
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    faulty.assert_restores();
    let bytes = 48 * MIB / BLOCK;
    assert!(faulty.sandbox.service().keys("archive/packs/").len() as u64 <= bytes.div_ceil(64) + 1);
}

#[test]
fn a_snapshot_that_goes_while_it_is_listed_is_not_listed() {
    if !has_buckets() {
        return;
    }
    let is_on = off();
    let faulty = Faulty::new(&is_on, |request, head| {
        let is_manifest = request.kind() == "GET" && request.line.contains("/snapshots/");
        if is_manifest { Act::error("404 Not Found", "NoSuchKey") } else { Act::Pass(head) }
    });
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    is_on.store(true, Ordering::SeqCst);
    let url = format!("s3://{}", faulty.url());
    assert_eq!(faulty.sandbox.ok(&["-s", &url, "list", "-q"]), "");
    let message = faulty.sandbox.fails(&["-s", &url, "download", &faulty.id, "out"]);
    assert!(message.contains("there is no snapshot"), "{message}");
}

#[test]
fn a_bucket_of_another_region_is_followed_once() {
    if !has_buckets() {
        return;
    }
    let faulty = Faulty::new(&on(), |_, head| {
        if head.contains("/us-east-1/s3/") {
            let head = "HTTP/1.1 301 Moved Permanently\r\nx-amz-bucket-region: eu-west-1\r\n";
            let body = "<Error><Code>PermanentRedirect</Code></Error>";
            return Act::Answer(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()));
        }
        Act::Pass(head)
    });
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    faulty.assert_restores();
    let wrong = faulty.way.requests().len();
    assert!(wrong > 0);
}

#[test]
fn foreign_objects_and_odd_prefixes_do_no_harm() {
    if !has_buckets() {
        return;
    }
    let faulty = Faulty::new(&off(), |_, head| Act::Pass(head));
    let service = faulty.sandbox.service();
    let endpoint = &service.url;
    faulty.sandbox.sh("mkdir -p foreign/{packs/00,snapshots,tags}; cd foreign
        touch readme.txt packs/lost+found packs/00/x.y snapshots/x.json tags/é");
    for prefix in ["a b/%41%20%2B", "über/日本", "a+b&c=d'(y)!*"] {
        let encoded: String = form_urlencoded::byte_serialize(prefix.as_bytes()).collect();
        let encoded = encoded.replace('+', "%20").replace("%2F", "/");
        let url = format!("bucket/{encoded}?endpoint={endpoint}");
        let (is_done, said) = faulty.run(&["movetos3", &faulty.id, &url]);
        assert!(is_done, "{prefix}: {said}");
        let there = format!("s3://bucket/{prefix}");
        let put = ["s3", "cp", "--recursive", "--quiet", "foreign", &there];
        assert!(service.aws(&put).status.success());
        assert_eq!(service.keys(&format!("{prefix}/tags/é")).len(), 1);
        let (is_done, said) = faulty.run(&["getfroms3", &faulty.id, &url, "--output", "out.img"]);
        assert!(is_done, "{prefix}: {said}");
        assert!(support::same(faulty.sandbox.join("disk.img"), faulty.sandbox.join("out.img")));
        let store = format!("s3://{url}");
        assert_eq!(faulty.sandbox.ok(&["-s", &store, "list", "-q"]).trim_end(), faulty.id);
        faulty.sandbox.ok(&["-s", &store, "verify"]);
        faulty.sandbox.ok(&["-s", &store, "gc"]);
    }
}

#[test]
fn a_repository_of_a_newer_format_is_told() {
    if !has_buckets() {
        return;
    }
    let faulty = Faulty::new(&off(), |_, head| Act::Pass(head));
    let (is_done, said) = faulty.moves();
    assert!(is_done, "{said}");
    let (sandbox, key) = (&faulty.sandbox, "s3://bucket/archive/fspfs.json");
    assert!(sandbox.service().aws(&["s3", "cp", key, "info.json"]).status.success());
    sandbox.sh("sed -i 's/\"format\":1/\"format\":99/' info.json; grep 99 info.json");
    assert!(sandbox.service().aws(&["s3", "cp", "info.json", key]).status.success());
    let (is_done, said) = faulty.moves();
    assert!(!is_done && said.contains("99"), "{said}");
}
