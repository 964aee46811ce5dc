//! What keeps web pages away from a server that asks for no signature.
//!
//! A page in a browser on this machine can send requests to a local port. It cannot do so without
//! saying where it is from, and, if it has a name of its own resolve to this machine, not without
//! that name in `Host`.

use std::net::{IpAddr, SocketAddr};

use http::StatusCode;
use http::header::{HOST, HeaderMap, ORIGIN};

use super::refusal::Refusal;

/// Refuses what a browser sends for a page, and what was sent to another name than this machine's.
pub(super) fn check(headers: &HeaderMap, local: Option<SocketAddr>) -> Result<(), Refusal> {
    let denied = |message: &str| {
        Err(Refusal::new(StatusCode::FORBIDDEN, "AccessDeniedException", message)
            .because("UNAUTHORIZED_ACCOUNT"))
    };
    if headers.contains_key(ORIGIN) || is_from_a_page(headers) {
        return denied("This server answers programs, not web pages.");
    }
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    if host.is_some_and(|host| names_this_machine(host, local)) {
        return Ok(());
    }
    denied(
        "This server asks for no signature, so it has to be asked by a name of this machine: 127.0.0.1, [::1] or localhost.",
    )
}

fn is_from_a_page(headers: &HeaderMap) -> bool {
    headers.get("sec-fetch-site").is_some_and(|site| site.as_bytes() != b"none")
}

fn names_this_machine(host: &str, local: Option<SocketAddr>) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        // An IPv6 address without a port has colons too.
        Some((name, port)) if !port.ends_with(']') => (name, port.parse().ok()),
        _ => (host, Some(80)),
    };
    if local.is_some_and(|local| port != Some(local.port())) {
        return false;
    }
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_with_our_port() {
        let local = "127.0.0.1:4560".parse().ok();
        for (host, good) in [
            ("127.0.0.1:4560", true),
            ("localhost:4560", true),
            ("LocalHost:4560", true),
            ("[::1]:4560", true),
            ("127.0.0.2:4560", true),
            ("127.0.0.1", false),
            ("127.0.0.1:80", false),
            ("evil.example:4560", false),
            ("localhost.evil.example:4560", false),
            ("127.0.0.1.evil.example:4560", false),
            ("10.0.0.1:4560", false),
            ("[::1]", false),
            ("", false),
        ] {
            let headers = HeaderMap::from_iter([(HOST, host.parse().unwrap())]);
            assert_eq!(check(&headers, local).is_ok(), good, "{host}");
        }
    }

    #[test]
    fn no_page_whatever_host_it_names() {
        let local = "127.0.0.1:80".parse().ok();
        let host = (HOST, "127.0.0.1".parse().unwrap());
        assert!(check(&HeaderMap::from_iter([host.clone()]), local).is_ok());
        for (name, value) in [("origin", "null"), ("sec-fetch-site", "cross-site")] {
            let page = (name.parse().unwrap(), value.parse().unwrap());
            assert!(check(&HeaderMap::from_iter([host.clone(), page]), local).is_err());
        }
    }
}
