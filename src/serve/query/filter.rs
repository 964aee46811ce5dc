//! Filters: all of them have to match, each by one of its values.

use super::bad;
use super::form::Form;
use crate::serve::refusal::Refusal;
use crate::store::matches_pattern;

/// The filters of a request.
pub(super) struct Filters<'a>(Vec<(&'a str, Vec<&'a str>)>);

impl<'a> Filters<'a> {
    /// Those of a request, each of which has to be one that `known` knows.
    pub(super) fn of(form: &'a Form, known: impl Fn(&str) -> bool) -> Result<Self, Refusal> {
        let filters = form.filters()?;
        match filters.iter().find(|(name, _)| !known(name)) {
            Some((name, _)) => {
                Err(bad("InvalidParameterValue", format!("The filter '{name}' is invalid")))
            }
            None => Ok(Self(filters)),
        }
    }

    /// Whether something has, for each filter, a value that one of its patterns matches.
    pub(super) fn match_all(&self, values: impl Fn(&str) -> Vec<String>) -> bool {
        self.0.iter().all(|(name, patterns)| {
            let values = values(name);
            values
                .iter()
                .any(|value| patterns.iter().any(|pattern| matches_pattern(pattern, value)))
        })
    }
}
