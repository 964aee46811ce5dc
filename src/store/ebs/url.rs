//! `ebs:`, `ebs://us-west-2`, `ebs://profile@us-west-2?endpoint=…&ec2-endpoint=…`.

use std::fmt;
use std::str::FromStr;

use crate::store::url::{check_endpoint, write_query};

/// Which account, region and endpoints; what is not said is left to the configuration of AWS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EbsUrl {
    /// A profile of `~/.aws/config`.
    pub profile: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// Where the EBS direct APIs are.
    pub endpoint: Option<String>,
    /// Where EC2 is.
    pub ec2_endpoint: Option<String>,
}

/// A text that names no such store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} names no EBS store: {why}; as in `ebs:`, `ebs://us-west-2` or `ebs://profile@us-west-2`"
)]
pub struct InvalidEbsUrl {
    text: String,
    why: String,
}

impl FromStr for EbsUrl {
    type Err = InvalidEbsUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // What is behind it may be secret.
        let shown = text.split('?').next().unwrap_or_default();
        let bad = |why: String| InvalidEbsUrl { text: shown.to_owned(), why };
        let rest =
            text.strip_prefix("ebs:").ok_or_else(|| bad("it begins otherwise".to_owned()))?;
        let (place, query) = match rest.split_once('?') {
            Some((place, query)) => (place, query),
            None => (rest, ""),
        };
        let place = place.strip_prefix("//").unwrap_or(place).trim_end_matches('/');
        let (profile, region) = match place.rsplit_once('@') {
            Some((profile, region)) => (Some(profile), region),
            None => (None, place),
        };
        if profile == Some("") {
            return Err(bad("there is no profile before the `@`".to_owned()));
        }
        let is_region = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if !region.chars().all(is_region) {
            return Err(bad(format!("{region:?} is not a region")));
        }
        let mut url = Self {
            profile: profile.map(str::to_owned),
            region: (!region.is_empty()).then(|| region.to_owned()),
            ..Self::default()
        };
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let place = match &*key {
                "endpoint" => &mut url.endpoint,
                "ec2-endpoint" => &mut url.ec2_endpoint,
                _ => return Err(bad(format!("{key:?} is not one of endpoint and ec2-endpoint"))),
            };
            check_endpoint(&value).map_err(|why| bad(format!("the {key}: {why}")))?;
            if place.replace(value.into_owned()).is_some() {
                return Err(bad(format!("there are two values of {key}")));
            }
        }
        Ok(url)
    }
}

impl fmt::Display for EbsUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ebs:")?;
        let region = self.region.as_deref().unwrap_or("");
        match &self.profile {
            Some(profile) => write!(f, "//{profile}@{region}")?,
            None if !region.is_empty() => write!(f, "//{region}")?,
            None => {}
        }
        let options = [("endpoint", &self.endpoint), ("ec2-endpoint", &self.ec2_endpoint)];
        write_query(f, options.map(|(name, value)| (name, value.as_deref())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_written() {
        for (text, profile, region) in [
            ("ebs:", None, None),
            ("ebs://us-west-2", None, Some("us-west-2")),
            ("ebs://work@us-west-2", Some("work"), Some("us-west-2")),
            ("ebs://work@", Some("work"), None),
            ("ebs://a@b@eu-central-1", Some("a@b"), Some("eu-central-1")),
        ] {
            let url: EbsUrl = text.parse().unwrap();
            assert_eq!(
                (url.profile.as_deref(), url.region.as_deref()),
                (profile, region),
                "{text}"
            );
            assert_eq!(url.to_string(), text);
        }
        let text =
            "ebs://us-east-1?endpoint=http://127.0.0.1:4560&ec2-endpoint=https://ec2.example/x";
        let url: EbsUrl = text.parse().unwrap();
        assert_eq!(url.endpoint.as_deref(), Some("http://127.0.0.1:4560"));
        assert_eq!(url.to_string(), text);
        let odd = EbsUrl { endpoint: Some("http://h/a b&c%+d?e=f".to_owned()), ..url.clone() };
        assert_eq!(odd.to_string().parse(), Ok(odd));
        assert_eq!(url.to_string().parse(), Ok(url));
    }

    #[test]
    fn refuses_other_urls_with_an_example() {
        for text in [
            "ebs://US-West",
            "ebs://@us-west-2",
            "ebs:?endpoint=127.0.0.1",
            "ebs:?ec2-endpoint=https://user:secret@ec2.example/",
            "ebs:?endpoint=https://user:secret@ec2.example?a",
            "ebs:?x=y",
            "ebs:?endpoint=http://a&endpoint=http://b",
        ] {
            let error = text.parse::<EbsUrl>().unwrap_err().to_string();
            assert!(error.contains("ebs://us-west-2") && !error.contains("secret"), "{error}");
        }
    }
}
