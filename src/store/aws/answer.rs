//! Answers are bounded, whatever sends them.

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::BeforeDeserializationInterceptorContextMut;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::config_bag::ConfigBag;
use http_body_util::Limited;

/// Bytes of an answer at most: a page of a thousand snapshots, each with fifty tags of 384 characters that all
/// have to be escaped, has 100 MB.
pub(crate) const MAX_ANSWER: usize = 128 << 20;

/// Bytes of a refusal at most.
const MAX_REFUSAL: usize = 1 << 20;

/// Ends an answer that is longer than any of the service, in bytes: the SDK collects whatever comes.
#[derive(Debug)]
pub(crate) struct Bounded(pub(crate) usize);

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
        let most = if answer.status().is_success() { self.0 } else { MAX_REFUSAL };
        let body = std::mem::replace(answer.body_mut(), SdkBody::taken());
        *answer.body_mut() = SdkBody::from_body_1_x(Limited::new(body, most));
        Ok(())
    }
}
