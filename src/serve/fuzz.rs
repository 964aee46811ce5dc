//! Requests made of arbitrary bytes, for `fuzz/` and for the tests.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Body;
use http::header::HOST;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::BodyExt as _;
use tokio::runtime::Runtime;
use tower::ServiceExt as _;

use super::endpoint::Endpoint;
use super::{Access, DEFAULT_ACCOUNT, DEFAULT_REGION, Keys, Options, router};

/// A server that asks for no signature, one that does, and what they run on.
struct Servers {
    open: Router,
    closed: Router,
    runtime: Runtime,
}

fn servers() -> &'static Servers {
    static SERVERS: OnceLock<Servers> = OnceLock::new();
    SERVERS.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("there are threads");
        let _guard = runtime.enter();
        let url = "synth:?size=1GiB&density=0.5".parse().expect("it is a store");
        let store = runtime
            .block_on(crate::store::open(&url, &crate::store::StoreOptions::default()))
            .expect("it needs nothing");
        let server = |access| {
            let options = Options {
                access,
                pending: std::time::Duration::ZERO,
                faults: None,
                memory: 16 << 20,
                account: DEFAULT_ACCOUNT.to_owned(),
                region: DEFAULT_REGION.to_owned(),
                name: "fuzz".to_owned(),
            };
            router(Endpoint::new(Arc::clone(&store), options, None))
        };
        let (open, closed) =
            (server(Access::Everybody(Keys::for_tests())), server(Access::Keys(Keys::for_tests())));
        Servers { open, closed, runtime }
    })
}

/// Reads a request: `METHOD PATH`, then a header in each line, an empty line, the body.
fn request(data: &[u8]) -> Option<Request<Body>> {
    let end = data.windows(2).position(|two| two == b"\n\n");
    let (head, body) = match end {
        Some(end) => (&data[..end], &data[end + 2..]),
        None => (data, &[][..]),
    };
    let mut lines = head.split(|byte| *byte == b'\n');
    let first = lines.next()?;
    let space = first.iter().position(|byte| *byte == b' ')?;
    let method = Method::from_bytes(&first[..space]).ok()?;
    let uri = Uri::try_from(&first[space + 1..]).ok()?;
    let mut request = Request::new(Body::from(body.to_vec()));
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    request.headers_mut().insert(HOST, HeaderValue::from_static("127.0.0.1"));
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        request.headers_mut().append(name, HeaderValue::from_bytes(&line[colon + 1..]).ok()?);
    }
    Some(request)
}

/// Sends a request made of these bytes to both servers: whatever it is, the answer is one of the
/// service's, and no fault of ours.
///
/// # Panics
///
/// If it is not.
pub fn request_from(data: &[u8]) {
    for needs_key in [false, true] {
        let Some(request) = request(data) else { return };
        let servers = servers();
        let is_query = request.uri().path() == "/";
        let router = if needs_key { &servers.closed } else { &servers.open }.clone();
        let (status, body) = servers.runtime.block_on(async move {
            let response = router.oneshot(request).await.expect("it answers everything");
            let status = response.status();
            (status, response.into_body().collect().await.expect("it is in memory").to_bytes())
        });
        assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR, "{}", body.escape_ascii());
        if status.is_success() {
            continue;
        }
        if is_query {
            let text = std::str::from_utf8(&body).expect("XML is UTF-8");
            let mut reader = quick_xml::Reader::from_str(text);
            while reader.read_event().expect("it is XML") != quick_xml::events::Event::Eof {}
        } else {
            let error: serde_json::Value = serde_json::from_slice(&body).expect("it is JSON");
            assert!(error["Message"].is_string(), "{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::request_from;

    #[test]
    fn the_seeds_are_answered() {
        let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/requests");
        let mut count = 0;
        for seed in std::fs::read_dir(seeds).unwrap() {
            let data = std::fs::read(seed.unwrap().path()).unwrap();
            assert!(super::request(&data).is_some(), "{}", data.escape_ascii());
            request_from(&data);
            count += 1;
        }
        assert!(count >= 10);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn whatever_comes_is_answered(
            path in "(GET|PUT|POST) /(snapshots(/completion)?(/snap-[0-9a-f]{1,17}(/(blocks|changedblocks)(/[0-9]{1,11})?)?)?)?(\\?[a-zA-Z]{1,20}=[ -~]{0,20})?",
            headers in proptest::collection::vec("(x-amz-[a-z-]{1,20}|authorization|host):[ -~]{0,40}", 0..6),
            body in "[ -~]{0,200}",
        ) {
            let text = format!("{path}\n{}\n\n{body}", headers.join("\n"));
            request_from(text.as_bytes());
        }
    }
}
