//! Services whose answers are made of arbitrary bytes.

use std::time::SystemTime;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_smithy_runtime_api::client::http::{
    HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_types::body::SdkBody;
use futures::FutureExt as _;

/// Statuses that an answer may have.
const STATUSES: [u16; 8] = [200, 206, 202, 301, 403, 404, 416, 503];

/// What is answered to every request: a byte that tells the status, lines of headers up to an empty one, a body.
#[derive(Clone, Debug)]
struct Canned {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Canned {
    fn of(data: &[u8]) -> Option<Self> {
        let (&status, data) = data.split_first()?;
        let end = data.windows(2).position(|two| two == b"\n\n")?;
        let headers = std::str::from_utf8(&data[..end]).ok()?.lines();
        let headers = headers.filter_map(|line| line.split_once(": "));
        Some(Self {
            status: STATUSES[usize::from(status) % STATUSES.len()],
            headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            body: data[end + 2..].to_vec(),
        })
    }
}

impl HttpConnector for Canned {
    fn call(&self, _: HttpRequest) -> HttpConnectorFuture {
        let status = self.status.try_into().expect("it is a status");
        let mut answer = HttpResponse::new(status, SdkBody::from(self.body.clone()));
        for (name, value) in &self.headers {
            // One that is no header is left out, as by HTTP.
            let _ = answer.headers_mut().try_insert(name.clone(), value.clone());
        }
        HttpConnectorFuture::ready(Ok(answer))
    }
}

/// A configuration whose requests are all answered with this; `None` if it is no answer.
pub(crate) fn answered_by(data: &[u8]) -> Option<SdkConfig> {
    let canned = Canned::of(data)?;
    let keys = Credentials::new("AKIATEST", "secret", None, None::<SystemTime>, "fuzz");
    let config = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .credentials_provider(SharedCredentialsProvider::new(keys))
        .http_client(http_client_fn(move |_, _| SharedHttpConnector::new(canned.clone())));
    Some(config.build())
}

/// What comes of something without waiting: a request that is to be sent again is not.
pub(crate) fn at_once<T>(work: impl Future<Output = T>) -> Option<T> {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a thread has a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(async { Box::pin(work).now_or_never() }))
}
