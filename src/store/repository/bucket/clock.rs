//! The time by the clock of the service.

use std::sync::{Arc, Mutex, PoisonError};

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::BeforeDeserializationInterceptorContextRef;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::config_bag::ConfigBag;
use jiff::Timestamp;
use jiff::fmt::rfc2822;

use super::{Bucket, kinds, names};
use crate::store::Result;
use crate::store::aws::failure::{Class, Failure};

/// Keeps the date that an answer has.
#[derive(Clone, Debug, Default)]
struct Dated(Arc<Mutex<Option<Timestamp>>>);

impl Intercept for Dated {
    fn name(&self) -> &'static str {
        "Dated"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        let date = context.response().headers().get("date");
        let date = date.and_then(|date| rfc2822::parse(date).ok()).map(|date| date.timestamp());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = date;
        Ok(())
    }
}

impl Bucket {
    /// Asks the service for its time, which has whole seconds.
    pub(super) async fn time(&self) -> Result<Timestamp> {
        self.call(&kinds::HEAD, "tell the time of the service", |client| {
            let head = client.head_object().bucket(&self.url.bucket);
            let head = head.key(self.url.key(names::INFO));
            let dated = Dated::default();
            async move {
                let answer = head.customize().interceptor(dated.clone()).send().await;
                let date = *dated.0.lock().unwrap_or_else(PoisonError::into_inner);
                match (answer, date) {
                    (_, Some(date)) => Ok(date),
                    (Err(error), None) => Err(self.failed(&client, &error)),
                    (Ok(_), None) => Err(Failure::new(Class::Foreign, "the answer has no date")),
                }
            }
        })
        .await
    }
}
