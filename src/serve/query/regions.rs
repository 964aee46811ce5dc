//! DescribeRegions, and GetCallerIdentity of STS: where and who one is.

use http::StatusCode;
use serde::Serialize;

use super::filter::Filters;
use super::xml::{Set, xml};
use super::{Answer, Call, bad};

#[derive(Serialize)]
struct Described {
    #[serde(rename = "regionInfo")]
    regions: Set<Region>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(clippy::struct_field_names, reason = "as EC2 calls them")]
struct Region {
    region_name: String,
    region_endpoint: String,
    opt_in_status: &'static str,
}

pub(super) fn describe(call: &Call<'_>) -> Answer {
    let known = |name: &str| ["endpoint", "opt-in-status", "region-name"].contains(&name);
    let filters = Filters::of(&call.form, known)?;
    let name = call.endpoint.region.clone();
    let names = call.form.list("RegionName")?;
    if let Some(unknown) = names.iter().find(|asked| **asked != name) {
        return Err(bad("InvalidParameterValue", format!("Invalid region provided: {unknown}")));
    }
    call.check_dry_run()?;
    let endpoint = format!("ec2.{name}.amazonaws.com");
    let region = Region {
        region_name: name,
        region_endpoint: endpoint,
        opt_in_status: "opt-in-not-required",
    };
    let wanted = filters.match_all(|filter| {
        vec![match filter {
            "endpoint" => region.region_endpoint.clone(),
            "opt-in-status" => region.opt_in_status.to_owned(),
            _ => region.region_name.clone(),
        }]
    });
    let regions = wanted.then_some(region).into_iter().collect();
    Ok(call.xml("DescribeRegionsResponse", Described { regions }))
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Identified<'a> {
    #[serde(rename = "@xmlns")]
    xmlns: &'static str,
    get_caller_identity_result: Identity<'a>,
    response_metadata: Metadata<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Identity<'a> {
    arn: String,
    user_id: &'static str,
    account: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Metadata<'a> {
    request_id: &'a str,
}

#[expect(clippy::unnecessary_wraps, reason = "all actions answer alike")]
pub(super) fn caller(call: &Call<'_>) -> Answer {
    let account = &call.endpoint.account;
    let identified = Identified {
        xmlns: "https://sts.amazonaws.com/doc/2011-06-15/",
        get_caller_identity_result: Identity {
            arn: format!("arn:aws:iam::{account}:user/fspfs"),
            user_id: "AIDAFSPFSFSPFSFSPFSFS",
            account,
        },
        response_metadata: Metadata { request_id: &call.request.0 },
    };
    Ok(xml(StatusCode::OK, "GetCallerIdentityResponse", &identified))
}
