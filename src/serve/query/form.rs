//! The parameters of an action: names with numbers in them, `Filter.1.Value.2`.

use std::collections::BTreeMap;

use super::bad;
use crate::serve::refusal::Refusal;

/// Members of a list at most: more than any of the service's own limits.
const MAX_MEMBERS: usize = 1000;

/// All parameters, those in the address and those in the body.
#[derive(Debug, Default)]
pub(super) struct Form(BTreeMap<String, String>);

impl Form {
    pub(super) fn of(query: &str, body: &[u8]) -> Self {
        let both = form_urlencoded::parse(query.as_bytes()).chain(form_urlencoded::parse(body));
        Self(both.map(|(name, value)| (name.into_owned(), value.into_owned())).collect())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// `true` or `false`, the latter if it is not there.
    pub(super) fn flag(&self, name: &str) -> Result<bool, Refusal> {
        match self.get(name).map(str::to_ascii_lowercase).as_deref() {
            None | Some("" | "false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(other) => {
                let message =
                    format!("Invalid value '{other}' for {name}: expected true or false.");
                Err(bad("InvalidParameterValue", message))
            }
        }
    }

    /// The numbers `n` for which there is a `name.n`, or a `name.n.` of something, ascending.
    fn numbers(&self, name: &str) -> Result<Vec<u32>, Refusal> {
        let prefix = format!("{name}.");
        let below = self.0.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
        let number = |key: &String| key[prefix.len()..].split('.').next()?.parse().ok();
        let mut numbers: Vec<u32> = below.filter_map(|(key, _)| number(key)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        if numbers.len() > MAX_MEMBERS {
            let message = format!("{name} has more than {MAX_MEMBERS} members.");
            return Err(bad("InvalidParameterValue", message));
        }
        Ok(numbers)
    }

    /// `name.1`, `name.2` and so on.
    pub(super) fn list(&self, name: &str) -> Result<Vec<&str>, Refusal> {
        let numbers = self.numbers(name)?;
        Ok(numbers.iter().filter_map(|n| self.get(&format!("{name}.{n}"))).collect())
    }

    /// `name.1.Key` and `name.1.Value`, and so on.
    pub(super) fn tags(&self, name: &str) -> Result<Vec<(String, Option<String>)>, Refusal> {
        let tag = |n: &u32| {
            let key = self.get(&format!("{name}.{n}.Key")).ok_or_else(|| {
                bad(
                    "MissingParameter",
                    format!("The request must contain the parameter {name}.{n}.Key"),
                )
            })?;
            let value = self.get(&format!("{name}.{n}.Value")).map(str::to_owned);
            Ok((key.to_owned(), value))
        };
        self.numbers(name)?.iter().map(tag).collect()
    }

    /// `Filter.1.Name` with `Filter.1.Value.1` and so on.
    pub(super) fn filters(&self) -> Result<Vec<(&str, Vec<&str>)>, Refusal> {
        let filter = |n: &u32| {
            let name = self
                .get(&format!("Filter.{n}.Name"))
                .ok_or_else(|| bad("InvalidParameterValue", format!("Filter.{n} has no name.")))?;
            Ok((name, self.list(&format!("Filter.{n}.Value"))?))
        };
        self.numbers("Filter")?.iter().map(filter).collect()
    }

    /// How many items a page has at most, within the bounds of EC2; `None` for all.
    pub(super) fn max_results(&self) -> Result<Option<usize>, Refusal> {
        let Some(text) = self.get("MaxResults").filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        match text.parse::<usize>() {
            Ok(max) if (5..=1000).contains(&max) => Ok(Some(max)),
            _ => {
                let message = format!(
                    "Value ( {text} ) for parameter maxResults is invalid. Expecting a value between 5 and 1000."
                );
                Err(bad("InvalidParameterValue", message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_keep_their_order_and_may_have_gaps() {
        let body = b"Action=X&SnapshotId.10=c&SnapshotId.2=b&SnapshotId.1=a&SnapshotIdentity.3=z&Filter.1.Name=tag%3AName&Filter.1.Value.1=w+b&Filter.1.Value.2=x&Tag.1.Key=k&Tag.2.Key=l&Tag.2.Value=";
        let form = Form::of("", body);
        assert_eq!(form.list("SnapshotId").unwrap(), ["a", "b", "c"]);
        assert_eq!(form.filters().unwrap(), [("tag:Name", vec!["w b", "x"])]);
        let tags = form.tags("Tag").unwrap();
        assert_eq!(tags, [("k".to_owned(), None), ("l".to_owned(), Some(String::new()))]);
        assert_eq!(form.max_results().unwrap(), None);
        for bad in ["4", "1001", "x", "-5"] {
            assert!(Form::of(&format!("MaxResults={bad}"), b"").max_results().is_err());
        }
    }
}
