//! `s3://bucket/prefix?region=…&endpoint=…&profile=…`.

use std::fmt;
use std::str::FromStr;

use crate::store::url::{check_endpoint, write_query};

/// A repository in a bucket. What is not said is left to the configuration of AWS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct BucketUrl {
    /// The name of the bucket.
    pub bucket: String,
    /// What the names of all objects begin with, without a slash at either end; empty, if that is nothing.
    pub prefix: String,
    /// The region of the bucket.
    pub region: Option<String>,
    /// A service that speaks the protocol of S3.
    pub endpoint: Option<String>,
    /// A profile of `~/.aws/config`.
    pub profile: Option<String>,
    /// `path` puts the bucket into the path of a request, `virtual` into its host; by default it stands in the path
    /// where an endpoint is given or the name has dots.
    pub style: Option<String>,
    /// The storage class of packs, such as `STANDARD_IA`. All else is read often, or is short-lived.
    pub class: Option<String>,
    /// The KMS key that the service encrypts with.
    pub kms_key: Option<String>,
}

/// A text that names no bucket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} names no repository in a bucket: {why}; as in `s3://bucket/prefix`")]
pub struct InvalidBucketUrl {
    text: String,
    why: String,
}

impl BucketUrl {
    fn options(&mut self) -> [(&'static str, &mut Option<String>); 6] {
        [
            ("region", &mut self.region),
            ("endpoint", &mut self.endpoint),
            ("profile", &mut self.profile),
            ("style", &mut self.style),
            ("class", &mut self.class),
            ("kms-key", &mut self.kms_key),
        ]
    }

    /// Whether the bucket stands in the path of a request.
    pub(super) fn is_path_style(&self) -> bool {
        match self.style.as_deref() {
            Some(style) => style == "path",
            // A certificate stands for one label before the host alone.
            None => self.endpoint.is_some() || self.bucket.contains('.'),
        }
    }

    /// The key of the object of this name.
    pub(super) fn key(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) }
    }
}

impl FromStr for BucketUrl {
    type Err = InvalidBucketUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // What is behind it may be secret.
        let shown = text.split('?').next().unwrap_or_default();
        let bad = |why: String| InvalidBucketUrl { text: shown.to_owned(), why };
        let rest = text.strip_prefix("s3://").ok_or_else(|| bad("it begins otherwise".into()))?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if bucket.len() < 3 || bucket.len() > 255 || !bucket.chars().all(is_allowed) {
            return Err(bad(format!("{bucket:?} is no name of a bucket")));
        }
        let prefix = prefix.trim_end_matches('/');
        // Clients and servers make different keys of these.
        let is_odd = |part: &str| matches!(part, "" | "." | "..");
        if prefix.chars().any(|c| c.is_control() || c == '\\')
            || (!prefix.is_empty() && prefix.split('/').any(is_odd))
        {
            return Err(bad(format!("the prefix {prefix:?} has a part that is no name")));
        }
        let (bucket, prefix) = (bucket.to_owned(), prefix.to_owned());
        let mut url = Self { bucket, prefix, ..Self::default() };
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let mut options = url.options();
            let Some((_, place)) = options.iter_mut().find(|(name, _)| *name == key) else {
                let names = options.map(|(name, _)| name).join(", ");
                return Err(bad(format!("{key:?} is not one of {names}")));
            };
            if value.is_empty() || place.replace(value.into_owned()).is_some() {
                return Err(bad(format!("give one value of {key}")));
            }
        }
        if let Some(endpoint) = &url.endpoint {
            check_endpoint(endpoint).map_err(|why| bad(format!("the endpoint: {why}")))?;
        }
        if let Some(class @ ("GLACIER" | "DEEP_ARCHIVE")) = url.class.as_deref() {
            return Err(bad(format!(
                "what is of the class {class} cannot be read before it is restored"
            )));
        }
        if let Some(style) = &url.style
            && !matches!(&**style, "path" | "virtual")
        {
            return Err(bad(format!("the style {style:?} is neither path nor virtual")));
        }
        Ok(url)
    }
}

impl fmt::Display for BucketUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        write_query(f, self.clone().options().map(|(name, value)| (name, value.as_deref())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_written() {
        for (text, bucket, prefix) in [
            ("s3://snaps", "snaps", ""),
            ("s3://snaps/a/b", "snaps", "a/b"),
            ("s3://my.snaps/ü x?region=eu-west-1&profile=work", "my.snaps", "ü x"),
            (
                "s3://snaps?endpoint=http://127.0.0.1:9000&style=virtual&class=STANDARD_IA",
                "snaps",
                "",
            ),
        ] {
            let url: BucketUrl = text.parse().unwrap();
            assert_eq!((&*url.bucket, &*url.prefix), (bucket, prefix), "{text}");
            assert_eq!(url.to_string(), text);
        }
        let url: BucketUrl = "s3://snaps/a/".parse().unwrap();
        assert_eq!(url.to_string(), "s3://snaps/a");
        assert_eq!(url.key("fspfs.json"), "a/fspfs.json");
    }

    #[test]
    fn other_texts_are_refused_with_an_example() {
        for text in [
            "s3:snaps",
            "s3://",
            "s3://a b/x",
            "s3://snaps//x",
            "s3://snaps/../x",
            "s3://snaps?x=y",
            "s3://snaps?region=",
            "s3://snaps?endpoint=127.0.0.1",
            "s3://snaps?endpoint=https://secret@s3.example",
            "s3://snaps?style=host",
            "s3://snaps?class=GLACIER",
            "s3://snaps/a\\b",
            "s3://snaps?region=a&region=b",
        ] {
            let error = text.parse::<BucketUrl>().unwrap_err().to_string();
            assert!(error.contains("s3://bucket/prefix") && !error.contains("secret"), "{error}");
        }
    }
}
