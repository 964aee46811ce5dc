//! The HTTP client of everything that speaks to AWS: what it trusts, and the proxy that it uses.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, Connector};
use aws_smithy_runtime_api::client::http::SharedHttpClient;
use base64::Engine as _;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::store::causes;

/// Names the file of certificates to trust instead of those of the system, in botocore and the
/// command-line tools (<https://docs.aws.amazon.com/cli/latest/userguide/cli-configure-envvars.html>).
pub(crate) const CA_BUNDLE: &str = "AWS_CA_BUNDLE";

/// Where a proxy is found, the first that is set.
const PROXY: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
const NO_PROXY: [&str; 2] = ["NO_PROXY", "no_proxy"];

/// A proxy for requests by HTTPS. Those by HTTP go to this machine, its network or its metadata service,
/// where a proxy would be in the way.
#[derive(Clone)]
pub(crate) struct Proxy {
    /// Host and port, without any password.
    pub(crate) at: String,
    /// The variable that names it.
    pub(crate) variable: &'static str,
    config: ProxyConfig,
}

// The configuration has the password in it.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("at", &self.at).finish_non_exhaustive()
    }
}

/// What the environment has for connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub(crate) proxy: Option<Proxy>,
    /// The only certificates that are trusted: the file, and what is in it.
    pub(crate) certificates: Option<(PathBuf, Vec<u8>)>,
}

impl Settings {
    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        Ok(Self { proxy: proxy(&variable)?, certificates: certificates(&variable)? })
    }
}

/// The settings of this process, as they were when they were needed first.
///
/// # Errors
///
/// What is wrong with them. To go on without would be to go another way than the user has said, or to trust
/// others.
pub(crate) fn settings() -> Result<&'static Settings, &'static str> {
    static SETTINGS: LazyLock<Result<Settings, String>> = LazyLock::new(|| {
        Settings::read(|name| {
            let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
            Some(value.to_string_lossy().into_owned())
        })
    });
    SETTINGS.as_ref().map_err(String::as_str)
}

/// A client with these settings.
pub(crate) fn client(settings: &Settings) -> SharedHttpClient {
    let tls = match &settings.certificates {
        Some((_, pem)) => {
            let only = TrustStore::empty().with_pem_certificate(pem.clone());
            TlsContext::builder().with_trust_store(only).build().expect("a trust store is enough")
        }
        None => TlsContext::default(),
    };
    let proxy = settings.proxy.as_ref();
    let proxy = proxy.map_or_else(ProxyConfig::disabled, |proxy| proxy.config.clone());
    Builder::new().build_with_connector_fn(move |settings, components| {
        let mut connector = Connector::builder();
        connector.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            connector.set_sleep_impl(components.sleep_impl());
        }
        connector
            .proxy_config(proxy.clone())
            .tls_provider(Provider::Rustls(CryptoMode::Ring))
            .tls_context(tls.clone())
            .build()
    })
}

fn certificates(
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<(PathBuf, Vec<u8>)>, String> {
    let Some(path) = variable(CA_BUNDLE).map(PathBuf::from) else { return Ok(None) };
    match read_bundle(&path) {
        Ok(pem) => Ok(Some((path, pem))),
        Err(why) => Err(format!("{CA_BUNDLE} names {}, {why}", path.display())),
    }
}

/// Those of a file that can be used, as PEM: the HTTP client dies of any other. Old authorities that
/// nobody can use any more stand in many a bundle.
fn read_bundle(path: &Path) -> Result<Vec<u8>, String> {
    let pem = std::fs::read(path).map_err(|e| format!("which cannot be read: {e}"))?;
    let (mut roots, mut usable) = (RootCertStore::empty(), String::new());
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|e| format!("which is no PEM: {}", causes(&e)))?;
        let text = base64::engine::general_purpose::STANDARD.encode(&certificate);
        match roots.add(certificate) {
            Ok(()) => usable.push_str(&format!(
                "-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n"
            )),
            Err(e) => {
                tracing::warn!("a certificate of {} is left out: {}", path.display(), causes(&e));
            }
        }
    }
    if roots.is_empty() {
        return Err("which holds no certificate that can be used".to_owned());
    }
    Ok(usable.into_bytes())
}

/// The proxy that is named. No error has anything of its URL: a password may be anywhere in one that
/// is mistyped.
fn proxy(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Proxy>, String> {
    let Some((name, url)) = PROXY.iter().find_map(|name| Some((*name, variable(name)?))) else {
        return Ok(None);
    };
    let bad = || {
        format!(
            "{name} is no URL of a proxy: give http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT with \
             what is special in either as %XX"
        )
    };
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", &url));
    let scheme = scheme.to_ascii_lowercase();
    let rest = rest.trim_end_matches('/');
    let at = rest.rsplit_once('@').map_or(rest, |(_, at)| at);
    if !matches!(&*scheme, "http" | "https")
        || at.is_empty()
        || rest.matches('@').count() > 1
        || rest.contains(['/', '?', '#'])
    {
        return Err(bad());
    }
    let config = ProxyConfig::https(format!("{scheme}://{rest}")).map_err(|_| bad())?;
    let config = match NO_PROXY.iter().find_map(|name| variable(name)) {
        Some(rules) => config.no_proxy(rules),
        None => config,
    };
    Ok(Some(Proxy { at: at.to_owned(), variable: name, config }))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn set<'a>(variables: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + use<'a> {
        |name| variables.iter().find(|(known, _)| *known == name).map(|(_, v)| (*v).to_owned())
    }

    #[rstest]
    #[case(&[], None)]
    // HTTP goes to this machine and its metadata service.
    #[case(&[("HTTP_PROXY", "http://a:1")], None)]
    #[case(&[("https_proxy", "http://a:1"), ("ALL_PROXY", "http://b:1")], Some(("https_proxy", "a:1")))]
    #[case(&[("ALL_PROXY", "b.example:3128")], Some(("ALL_PROXY", "b.example:3128")))]
    #[case(&[("HTTPS_PROXY", "HTTP://me:secret@c:8080/")], Some(("HTTPS_PROXY", "c:8080")))]
    fn finds_the_proxy_in_the_environment(
        #[case] variables: &[(&str, &str)],
        #[case] expected: Option<(&str, &str)>,
    ) {
        let found = proxy(set(variables)).unwrap();
        assert_eq!(found.as_ref().map(|proxy| (proxy.variable, &*proxy.at)), expected);
    }

    #[rstest]
    #[case("socks5://me:secret@a:1")]
    #[case("http://me:secret@")]
    #[case("me:secret@http://a:1")]
    #[case("me:secret://b@a:1")]
    #[case("http://me:secret/x@a:1")]
    #[case("http://me:secret@x@a:1")]
    fn refuses_a_bad_proxy_without_showing_its_password(#[case] url: &str) {
        let why = proxy(set(&[("HTTPS_PROXY", url)])).unwrap_err();
        assert!(why.contains("HTTPS_PROXY") && !why.contains("secret"), "{why}");
        let shown = format!("{:?}", proxy(set(&[("HTTPS_PROXY", "me:secret@a:1")])));
        assert!(shown.contains("a:1") && !shown.contains("secret"), "{shown}");
    }

    #[test]
    fn refuses_a_bundle_without_certificates() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle.pem");
        let told = |content: Option<&str>| {
            if let Some(content) = content {
                std::fs::write(&path, content).unwrap();
            }
            certificates(set(&[(CA_BUNDLE, path.to_str().unwrap())])).unwrap_err()
        };
        assert!(told(None).contains("cannot be read"));
        assert!(told(Some("certificates")).contains("no certificate that can be used"));
        let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(told(Some(nonsense)).contains("no certificate that can be used"));
        assert!(told(Some("-----BEGIN CERTIFICATE-----\n~~\n")).contains("no PEM"));
        assert!(certificates(set(&[])).unwrap().is_none());
    }
}
