//! Who waits for a call to a store.
//!
//! A store that can do only so much at a time serves programs that wait before what is done ahead of
//! them or in the background. The trait does not carry that along: it is a property of the task.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

tokio::task_local! {
    static OF_TASK: Priority;
}

/// Whether a program waits for what a task does; that may begin later than the task.
#[derive(Clone, Debug, Default)]
pub struct Priority(Arc<AtomicBool>);

impl Priority {
    /// Nobody waits, as yet.
    pub fn background() -> Self {
        Self::default()
    }

    /// A program waits.
    pub fn urgent() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    /// That of this task; nobody waits for one that nothing was said of.
    pub fn of_task() -> Self {
        OF_TASK.try_with(Self::clone).unwrap_or_default()
    }

    /// From now on a program waits.
    pub fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether a program waits.
    pub fn is_urgent(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Runs a future that has this priority.
    pub async fn scope<F: Future>(self, future: F) -> F::Output {
        OF_TASK.scope(self, future).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_learns_that_somebody_waits() {
        assert!(!Priority::of_task().is_urgent());
        let priority = Priority::background();
        let raised = priority.clone();
        let inside = priority.scope(async move {
            let before = Priority::of_task().is_urgent();
            raised.raise();
            (before, Priority::of_task().is_urgent())
        });
        assert_eq!(inside.await, (false, true));
    }
}
