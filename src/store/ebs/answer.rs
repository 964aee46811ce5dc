//! What an answer has to be before anything in it is believed: bounded, and, if it is one of EC2, whole.

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::{
    AfterDeserializationInterceptorContextRef, BeforeDeserializationInterceptorContextMut,
};
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::config_bag::ConfigBag;
use http_body_util::Limited;

/// Bytes of an answer at most: a page of a thousand snapshots, each with fifty tags of 384 characters that all
/// have to be escaped, has 100 MB.
const MAX_ANSWER: usize = 128 << 20;

/// Bytes of a refusal at most.
const MAX_REFUSAL: usize = 1 << 20;

/// Ends an answer that is longer than any of the service: the SDK collects whatever comes.
#[derive(Debug)]
pub(super) struct Bounded;

impl Intercept for Bounded {
    fn name(&self) -> &'static str {
        "Bounded"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let answer = context.response_mut();
        let most = if answer.status().is_success() { MAX_ANSWER } else { MAX_REFUSAL };
        let body = std::mem::replace(answer.body_mut(), SdkBody::taken());
        *answer.body_mut() = SdkBody::from_body_1_x(Limited::new(body, most));
        Ok(())
    }
}

/// Looks at each answer of EC2. To the SDK, XML that has no end, or a page of HTML that something in between
/// gave for it, is a list that is empty or ends early; and a deletion that was not done is a success.
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
        return Err("it is none of EC2, or was cut short");
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
