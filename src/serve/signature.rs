//! Signature version 4, checked: the request is signed again with the key that it names.
//!
//! Rules: <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html>.

use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4::SigningParams;
use http::header::AUTHORIZATION;
use http::request::Parts;
use http::{HeaderName, StatusCode};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use subtle::ConstantTimeEq as _;

use super::keys::{Keys, Pair};
use super::refusal::Refusal;
use crate::model::Digest;

/// How far the clock of a client may be off.
const MAX_SKEW: Duration = Duration::from_mins(5);

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const DATE: HeaderName = HeaderName::from_static("x-amz-date");
const CONTENT: HeaderName = HeaderName::from_static("x-amz-content-sha256");
const SESSION: HeaderName = HeaderName::from_static("x-amz-security-token");
const UNSIGNED: &str = "UNSIGNED-PAYLOAD";

/// Headers of ours that some clients leave unsigned, since proxies add or change them.
const MAY_BE_UNSIGNED: [&str; 2] = ["x-amz-user-agent", "x-amz-security-token"];

/// What a request says of its signature. It is not checked yet.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    pub(super) key: &'a Pair,
    pub(super) service: String,
    region: String,
    signed: Vec<String>,
    signature: String,
    time: SystemTime,
}

fn denied(code: &'static str, message: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::FORBIDDEN, code, message)
}

fn incomplete(message: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::FORBIDDEN, "IncompleteSignatureException", message)
}

/// What a request claims, as far as it can be refused before its body is read: whose it is, for
/// which service, and when it was made.
pub(super) fn claim<'a>(
    parts: &Parts,
    keys: &'a Keys,
    services: &[&str],
) -> Result<Claim<'a>, Refusal> {
    let Some(header) = parts.headers.get(AUTHORIZATION) else {
        return Err(denied("MissingAuthenticationTokenException", "Missing Authentication Token"));
    };
    let header = header.to_str().map_err(|_| incomplete("The signature is not ASCII."))?;
    let fields = header.strip_prefix(ALGORITHM).ok_or_else(|| {
        incomplete(format!("Unsupported signature algorithm; this server takes {ALGORITHM}."))
    })?;
    let field = |name: &str| {
        let mut found = fields.split(',').filter_map(|field| field.trim().split_once('='));
        let value = found.find(|(key, _)| *key == name).map(|(_, value)| value);
        value
            .ok_or_else(|| incomplete(format!("Authorization header requires '{name}' parameter.")))
    };
    let scope: Vec<_> = field("Credential")?.split('/').collect();
    let [id, date, region, service, "aws4_request"] = scope[..] else {
        return Err(incomplete(
            "Credential must have 5 parts: key, date, region, service, aws4_request.",
        ));
    };
    let Some(key) = keys.get(id) else {
        return Err(denied(
            "UnrecognizedClientException",
            "The security token included in the request is invalid.",
        ));
    };
    check_session(parts, key)?;
    if !services.contains(&service) {
        let services = services.join("' or '");
        return Err(wrong(format!(
            "Credential should be scoped to correct service: '{services}'."
        )));
    }
    let time = time(parts, date)?;
    let signed: Vec<_> = field("SignedHeaders")?.split(';').map(str::to_owned).collect();
    check_signed(parts, &signed)?;
    Ok(Claim {
        key,
        service: service.to_owned(),
        region: region.to_owned(),
        signed,
        signature: field("Signature")?.to_owned(),
        time,
    })
}

fn wrong(message: impl Into<String>) -> Refusal {
    denied("InvalidSignatureException", message)
}

fn check_session(parts: &Parts, key: &Pair) -> Result<(), Refusal> {
    let given = parts.headers.get(SESSION).map(http::HeaderValue::as_bytes);
    let same = match (given, &key.session) {
        (None, None) => true,
        (Some(given), Some(session)) => bool::from(given.ct_eq(session.as_bytes())),
        _ => false,
    };
    if same {
        return Ok(());
    }
    let message = "The security token included in the request is invalid.";
    Err(denied("UnrecognizedClientException", message))
}

/// The time at which the request was made, which must be about now and on the day of its scope.
fn time(parts: &Parts, day: &str) -> Result<SystemTime, Refusal> {
    let missing = || incomplete("Authorization header requires existence of 'X-Amz-Date' header.");
    let text = parts.headers.get(DATE).and_then(|date| date.to_str().ok()).ok_or_else(missing)?;
    let parsed = DateTime::strptime("%Y%m%dT%H%M%SZ", text)
        .and_then(|time| time.to_zoned(TimeZone::UTC))
        .map_err(|_| incomplete(format!("Date must be in ISO-8601 'basic format': {text}.")))?;
    if text.get(..8) != Some(day) {
        return Err(wrong(
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP.",
        ));
    }
    let (then, now) = (parsed.timestamp(), Timestamp::now());
    let skew = now.duration_since(then);
    if skew.unsigned_abs() > MAX_SKEW {
        let what = if skew.is_positive() { "expired" } else { "not yet current" };
        return Err(wrong(format!(
            "Signature {what}: {text} is more than 5 minutes off {now:.0}."
        )));
    }
    Ok(then.into())
}

/// What decides what a request does must not be changed on the way.
fn check_signed(parts: &Parts, signed: &[String]) -> Result<(), Refusal> {
    let decides = |name: &str| {
        name == "host" || (name.starts_with("x-amz-") && !MAY_BE_UNSIGNED.contains(&name))
    };
    let mut names = parts.headers.keys().map(HeaderName::as_str);
    if !signed.iter().any(|name| name == "host") {
        return Err(wrong("'Host' must be a 'SignedHeader' in the AWS Authorization."));
    }
    match names.find(|name| decides(name) && !signed.iter().any(|signed| signed == name)) {
        Some(name) => {
            Err(wrong(format!("'{name}' must be a 'SignedHeader' in the AWS Authorization.")))
        }
        None => Ok(()),
    }
}

impl Claim<'_> {
    /// Checks the signature over the request and the SHA-256 of its body.
    ///
    /// Where `may_be_unsigned`, the body need not be in it: then the header with its checksum must
    /// be, and whoever reads the body checks that. Clients tell so in a header or, like botocore
    /// behind TLS, not at all.
    pub(super) fn verify(
        &self,
        parts: &Parts,
        body: Digest,
        may_be_unsigned: bool,
    ) -> Result<(), Refusal> {
        let hash = body.to_hex();
        let hashes: &[&str] = match parts.headers.get(CONTENT).map(http::HeaderValue::as_bytes) {
            Some(given) if given == UNSIGNED.as_bytes() && may_be_unsigned => &[UNSIGNED],
            Some(given) if given == hash.as_bytes() => &[&hash],
            Some(given) if given == UNSIGNED.as_bytes() => {
                return Err(wrong("The body of this request has to be signed."));
            }
            Some(_) => {
                return Err(wrong(
                    "The provided 'x-amz-content-sha256' header does not match what was computed.",
                ));
            }
            None if may_be_unsigned => &[&hash, UNSIGNED],
            None => &[&hash],
        };
        for hash in hashes {
            let signature = self.sign(parts, hash)?;
            if bool::from(signature.as_bytes().ct_eq(self.signature.as_bytes())) {
                if *hash == UNSIGNED {
                    self.check_checksum_signed()?;
                }
                return Ok(());
            }
        }
        Err(wrong(
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details.",
        ))
    }

    fn check_checksum_signed(&self) -> Result<(), Refusal> {
        if self.signed.iter().any(|name| name == "x-amz-checksum") {
            return Ok(());
        }
        Err(wrong("'x-amz-Checksum' must be a 'SignedHeader' where the body is not signed."))
    }

    fn sign(&self, parts: &Parts, hash: &str) -> Result<String, Refusal> {
        let identity = Credentials::new(&self.key.id, &self.key.secret, None, None, "keys").into();
        let mut settings = SigningSettings::default();
        // The client has said which it signs.
        settings.excluded_headers = None;
        let params = SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name(&self.service)
            .time(self.time)
            .settings(settings)
            .build()
            .map_err(Refusal::internal)?
            .into();
        let mut headers = Vec::with_capacity(self.signed.len());
        for name in &self.signed {
            for value in parts.headers.get_all(name.as_str()) {
                let value = value.to_str().map_err(|_| wrong("A signed header is not ASCII."))?;
                headers.push((name.as_str(), value));
            }
        }
        // The signer wants a whole URI; of it, only the path and the query are signed.
        let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let uri = format!("http://localhost{path}");
        let body = SignableBody::Precomputed(hash.to_owned());
        let request = SignableRequest::new(parts.method.as_str(), uri, headers.into_iter(), body)
            .map_err(|e| wrong(format!("The request cannot be signed: {e}.")))?;
        let output = sign(request, &params)
            .map_err(|e| wrong(format!("The request cannot be signed: {e}.")))?;
        Ok(output.signature().to_owned())
    }
}
