//! The partitions of AWS, and where EC2 is in them.
//!
//! Names are those of botocore's `partitions.json` and of its rules for the endpoints of EC2.

/// Regions that share their domains.
struct Partition {
    /// What the names of its regions begin with.
    regions: &'static str,
    domain: &'static str,
    /// The domain of endpoints for IPv4 and IPv6.
    dual_stack: &'static str,
}

const GOV: &str = "us-gov-";

const PARTITIONS: [Partition; 8] = [
    of("cn-", "amazonaws.com.cn", "api.amazonwebservices.com.cn"),
    of(GOV, "amazonaws.com", "api.aws"),
    of("eusc-", "amazonaws.eu", "api.amazonwebservices.eu"),
    of("us-iso-", "c2s.ic.gov", "api.aws.ic.gov"),
    of("us-isob-", "sc2s.sgov.gov", "api.aws.scloud"),
    of("eu-isoe-", "cloud.adc-e.uk", "api.cloud-aws.adc-e.uk"),
    of("us-isof-", "csp.hci.ic.gov", "api.aws.hci.ic.gov"),
    // All others.
    of("", "amazonaws.com", "api.aws"),
];

const fn of(regions: &'static str, domain: &'static str, dual_stack: &'static str) -> Partition {
    Partition { regions, domain, dual_stack }
}

/// The URL of EC2 in a region; `None` if that is no part of the name of a host.
pub(super) fn ec2(region: &str, fips: bool, dual_stack: bool) -> Option<String> {
    if region.is_empty() || !region.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return None;
    }
    let found = PARTITIONS.iter().find(|partition| region.starts_with(partition.regions));
    let partition = found.expect("the last one has all regions");
    let domain = if dual_stack { partition.dual_stack } else { partition.domain };
    // In GovCloud the usual endpoint is one of FIPS.
    let name = if fips && (dual_stack || partition.regions != GOV) { "ec2-fips" } else { "ec2" };
    Some(format!("https://{name}.{region}.{domain}"))
}

/// Whether an endpoint is one of AWS.
pub(crate) fn is_of_aws(endpoint: &str) -> bool {
    let host = endpoint.split("://").last().unwrap_or(endpoint);
    let host = host.split(['/', ':']).next().unwrap_or(host);
    let is_in = |domain: &str| host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'));
    PARTITIONS.iter().any(|partition| is_in(partition.domain) || is_in(partition.dual_stack))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("us-east-1", false, false, "ec2.us-east-1.amazonaws.com")]
    #[case("us-east-1", true, false, "ec2-fips.us-east-1.amazonaws.com")]
    #[case("us-east-1", false, true, "ec2.us-east-1.api.aws")]
    #[case("us-east-1", true, true, "ec2-fips.us-east-1.api.aws")]
    #[case("cn-north-1", false, false, "ec2.cn-north-1.amazonaws.com.cn")]
    #[case("cn-north-1", true, true, "ec2-fips.cn-north-1.api.amazonwebservices.com.cn")]
    #[case("us-gov-west-1", true, false, "ec2.us-gov-west-1.amazonaws.com")]
    #[case("us-gov-west-1", true, true, "ec2-fips.us-gov-west-1.api.aws")]
    #[case("eusc-de-east-1", false, false, "ec2.eusc-de-east-1.amazonaws.eu")]
    #[case("us-iso-east-1", false, false, "ec2.us-iso-east-1.c2s.ic.gov")]
    #[case("us-isob-east-1", true, false, "ec2-fips.us-isob-east-1.sc2s.sgov.gov")]
    #[case("eu-isoe-west-1", false, true, "ec2.eu-isoe-west-1.api.cloud-aws.adc-e.uk")]
    #[case("us-isof-south-1", false, false, "ec2.us-isof-south-1.csp.hci.ic.gov")]
    #[case("mx-central-1", false, false, "ec2.mx-central-1.amazonaws.com")]
    fn knows_where_ec2_is(
        #[case] region: &str,
        #[case] fips: bool,
        #[case] dual_stack: bool,
        #[case] host: &str,
    ) {
        let url = ec2(region, fips, dual_stack).unwrap();
        assert_eq!(url, format!("https://{host}"));
        assert!(is_of_aws(&url) && is_of_aws(&format!("{url}:443/x")));
    }

    #[test]
    fn a_region_cannot_lead_elsewhere() {
        for region in ["", "us-east-1 ", "us-east-1.example/", "x@127.0.0.1:1/#", "a_b"] {
            assert_eq!(ec2(region, false, false), None, "{region}");
        }
    }

    #[test]
    fn knows_what_is_not_of_aws() {
        for other in ["http://127.0.0.1:4560", "https://amazonaws.com.example", "https://xapi.aws"]
        {
            assert!(!is_of_aws(other), "{other}");
        }
    }
}
