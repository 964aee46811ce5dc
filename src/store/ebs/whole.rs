//! Whether an answer of EC2 is one, and all of it.
//!
//! To the SDK, XML that has no end, or a page of HTML that something in between gave for it, is a list
//! that is empty or ends early; and a deletion that was not done is a success.

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::AfterDeserializationInterceptorContextRef;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::config_bag::ConfigBag;

/// Looks at each answer.
#[derive(Debug)]
pub(super) struct Whole;

impl Intercept for Whole {
    fn name(&self) -> &'static str {
        "Whole"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let answer = context.response();
        // What the SDK takes for a refusal, or cannot read, is an error already.
        match answer.body().bytes() {
            Some(body) if answer.status().is_success() => check(body).map_err(Into::into),
            _ => Ok(()),
        }
    }
}

/// What is wrong with an answer that says that all is well.
fn check(body: &[u8]) -> Result<(), &'static str> {
    let body = body.trim_ascii_end();
    // As in `</DescribeSnapshotsResponse>`.
    if !body.ends_with(b"Response>") {
        return Err("the answer is not one of EC2, or was cut short");
    }
    let says = |text: &[u8]| body.windows(text.len()).any(|part| part == text);
    if body.len() < 1000 && says(b"<return>false</return>") {
        return Err("EC2 answers that it has not done it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ends_as_an_answer_is_one() {
        check(b"<DescribeSnapshotsResponse><snapshotSet/></DescribeSnapshotsResponse>\n").unwrap();
        check(b"<DeleteSnapshotResponse><return>true</return></DeleteSnapshotResponse>").unwrap();
        for wrong in [
            "",
            "<html><body>Please log in</body></html>",
            "<DescribeSnapshotsResponse><snapshotSet><item>",
            "<DeleteSnapshotResponse><return>false</return></DeleteSnapshotResponse>",
        ] {
            check(wrong.as_bytes()).unwrap_err();
        }
    }
}
