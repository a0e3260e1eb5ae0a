//! What a server does beside answering: it takes files and trains on them, and remembers answers and what was thought of them.

use std::sync::Arc;

use super::caller::Caller;
use super::fine_tuning::Tuning;
use super::observed::Observed;
use super::places::Places;
use crate::handler::Handler;
use crate::memory::Memory;

/// What a server does beside answering. By default that is nothing.
#[derive(Clone, Default)]
pub struct Class {
    tuning: Option<Arc<Tuning>>,
    memory: Option<Arc<Memory>>,
    /// Places of files that are being sent.
    pub(super) uploads: Arc<Places>,
}

impl Class {
    /// The same, and it trains.
    #[must_use]
    pub fn with_tuning(mut self, tuning: Tuning) -> Self {
        self.tuning = Some(Arc::new(tuning));
        self
    }

    /// The same, and it remembers answers.
    #[must_use]
    pub fn with_memory(mut self, memory: Arc<Memory>) -> Self {
        self.memory = Some(memory);
        self
    }

    /// The memory, if there is one.
    pub(super) fn memory(&self) -> Option<Arc<Memory>> {
        self.memory.clone()
    }

    /// A handler for one request, whose answer is remembered if there is a memory.
    pub(super) fn observed(
        &self,
        handler: Arc<dyn Handler>,
        id: &str,
        model: &str,
        caller: &Caller,
    ) -> Arc<dyn Handler> {
        match self.memory() {
            None => handler,
            Some(memory) => {
                let (id, model, person) = (id.to_owned(), model.to_owned(), caller.clone().into());
                Arc::new(Observed { inner: handler, id, memory, model, person })
            }
        }
    }

    /// The jobs, if it trains.
    pub(super) fn tuning(&self) -> Option<Arc<Tuning>> {
        self.tuning.clone()
    }

    /// Has a training save what it has and end; does not wait for it.
    pub(super) fn stop(&self) {
        if let Some(tuning) = &self.tuning {
            tuning.stop();
        }
    }

    /// Waits until the answers that were given are written, and a training that was stopped has ended.
    pub(super) fn wait(&self) {
        if let Some(memory) = &self.memory {
            memory.settle();
        }
        if let Some(tuning) = &self.tuning {
            tuning.wait();
        }
    }
}
