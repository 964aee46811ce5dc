//! Where the services are, and whether they answer.

use super::probe::{Probe, Service, origin};
use crate::doctor::report::Findings;
use crate::store::aws::failure::NoAnswer;
use crate::store::aws::http;
use crate::store::ebs::EbsUrl;
use crate::store::ebs::ec2::partition::is_of_aws;

/// Reports an endpoint; whether it answers.
pub(super) fn examine(url: &EbsUrl, probe: &Probe, report: &mut impl Findings) -> bool {
    let subject = format!("endpoint of {}", probe.service.name());
    let Some(endpoint) = &probe.endpoint else {
        let why = probe.result.as_ref().err().map_or_else(String::new, ToString::to_string);
        report.fail(
            &subject,
            format!("no request could be made: {why}"),
            "check the region, the endpoint and the credentials",
        );
        return false;
    };
    let at = format!(
        "{endpoint}, {}",
        source(url, probe.service, endpoint, |name| { std::env::var(name).ok() })
    );
    match &probe.result {
        Err(failure) if failure.code().is_none() => {
            let (what, cure) = explain(failure.no_answer.unwrap_or(NoAnswer::Other));
            let proxy = http::settings().ok().and_then(|settings| settings.proxy.as_ref());
            // Whichever of them it is, it looks the same from here.
            let cure = match proxy.filter(|_| endpoint.starts_with("https:")) {
                Some(proxy) => {
                    format!("{cure}; or it is the proxy {} that is not reached", proxy.at)
                }
                None => cure.to_owned(),
            };
            report.fail(&subject, format!("{at}: {what} ({failure})"), cure);
            false
        }
        Ok(()) | Err(_) => {
            let millis = probe.took.as_millis();
            report.ok(&subject, format!("{at}; it answered in {millis} ms"));
            true
        }
    }
}

fn explain(why: NoAnswer) -> (&'static str, &'static str) {
    match why {
        NoAnswer::Name => (
            "its name is not found",
            "check the region and the endpoint for a typing error, and that this machine resolves names",
        ),
        NoAnswer::Nobody => (
            "the connection is refused: nobody listens there",
            "check the port of the endpoint, and that its server runs",
        ),
        NoAnswer::Connection => (
            "no connection comes about",
            "a firewall, a missing route or a missing VPC endpoint: let this machine reach it, by TCP on port 443 unless the endpoint says another; docs/iam.md names the VPC endpoints",
        ),
        NoAnswer::Silence => (
            "it is connected, and does not answer",
            "check what listens there: a port of another service, or a proxy that waits",
        ),
        NoAnswer::Tls => (
            "TLS does not come about",
            "a server without TLS takes http:// as its endpoint; where a proxy opens TLS, its certificate has to be among those that this machine trusts, or in the file that AWS_CA_BUNDLE names",
        ),
        NoAnswer::Proxy => (
            "the proxy does not let it through",
            "check the user and the password in HTTPS_PROXY, and what the proxy allows",
        ),
        NoAnswer::Other => {
            ("there is no answer that can be understood", "check what listens there")
        }
    }
}

/// Who said where a service is.
fn source(
    url: &EbsUrl,
    service: Service,
    endpoint: &str,
    variable: impl Fn(&str) -> Option<String>,
) -> String {
    let (own, name) = match service {
        Service::Ec2 => (url.ec2_endpoint.as_ref().or(url.endpoint.as_ref()), "EC2"),
        Service::Ebs => (url.endpoint.as_ref(), "EBS"),
    };
    if own.is_some() {
        return "as the store says".to_owned();
    }
    for name in [format!("AWS_ENDPOINT_URL_{name}"), "AWS_ENDPOINT_URL".to_owned()] {
        if variable(&name).and_then(|value| origin(&value)).as_deref() == Some(endpoint) {
            return format!("of {name}");
        }
    }
    if is_of_aws(endpoint) { "AWS's own".to_owned() } else { "of the profile".to_owned() }
}

/// Reports what stands between this machine and AWS, where something is configured; whether that can be
/// used.
pub(in crate::doctor) fn way(report: &mut impl Findings) -> bool {
    let settings = match http::settings() {
        Ok(settings) => settings,
        Err(why) => {
            report.fail("connections", why, "mend the variable, or unset it");
            return false;
        }
    };
    if let Some(proxy) = &settings.proxy {
        report.ok(
            "proxy",
            format!(
                "{}, of {}; for HTTPS, but not to what NO_PROXY names",
                proxy.at, proxy.variable
            ),
        );
    }
    if let Some((path, _)) = &settings.certificates {
        report.ok(
            "certificates",
            format!("only those of {} are trusted ({})", path.display(), http::CA_BUNDLE),
        );
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_said_where_a_service_is() {
        let url: EbsUrl = "ebs:".parse().unwrap();
        let none = |_: &str| None;
        let aws = "https://ebs.us-east-1.amazonaws.com";
        assert_eq!(source(&url, Service::Ebs, aws, none), "AWS's own");
        let own = "http://127.0.0.1:4560";
        assert_eq!(source(&url, Service::Ebs, own, none), "of the profile");
        let set = |name: &str| (name == "AWS_ENDPOINT_URL_EC2").then(|| format!("{own}/"));
        assert_eq!(source(&url, Service::Ec2, own, set), "of AWS_ENDPOINT_URL_EC2");
        let url: EbsUrl = "ebs:?endpoint=http://127.0.0.1:4560".parse().unwrap();
        assert_eq!(source(&url, Service::Ec2, own, none), "as the store says");
    }
}
