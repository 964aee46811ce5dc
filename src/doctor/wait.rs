//! Questions to the system that may never be answered: a dead network file system, a frozen mount.

use std::time::Duration;

/// How long the system may take for one answer.
pub(super) const SYSTEM: Duration = Duration::from_secs(5);

/// Asks on a thread of its own; `None` if there was no answer in time. The thread is then left
/// behind, and ends with the program.
pub(super) async fn asked<T: Send + 'static>(
    question: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let answer = tokio::task::spawn_blocking(question);
    tokio::time::timeout(SYSTEM, answer).await.ok()?.ok()
}

/// That there was no answer.
pub(super) fn no_answer() -> String {
    format!("there was no answer within {} s", SYSTEM.as_secs())
}
