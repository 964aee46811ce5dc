//! Work that waits for a disk or computes for a while, where that is allowed.

/// Runs `work` on a thread that may wait. A panic of it goes on here.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The program ends, and nobody waits for this any more.
            Err(_) => std::future::pending().await,
        },
    }
}
