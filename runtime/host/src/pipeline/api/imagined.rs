//! What a dry run imagines: models that nobody trained, and losses that fall as trainings go on. They are no forecast: a script that compares
//! them goes the way that it goes when all is well.

use std::cell::RefCell;

use homeroom_engine::models::BaseModel;

use super::model::ModelSpec;
use crate::progress::size;

/// What the id of an imagined adapter begins with.
const DRY: &str = "dry-run/";
/// Steps that halve what can be learned.
const STEPS_HALF: f64 = 20.0;
/// Share of the first loss that is never learned.
const SHARE_LEFT: f64 = 0.2;
/// Steps that a model has had that was trained before.
const STEPS_BEFORE: u64 = 100;

/// Whether an adapter is one that a dry run did not train. In a run, where the name means nothing, ask [`Session::imagines`](super::Session).
pub fn is_imagined(adapter: &str) -> bool {
    adapter.starts_with(DRY)
}

/// The adapters that a dry run imagines, each with the steps that it has had.
#[derive(Default)]
pub struct Imagined(RefCell<Vec<u64>>);

impl Imagined {
    /// The id of a new one, that has had so many steps.
    pub fn adapter(&self, steps: u64) -> String {
        self.0.borrow_mut().push(steps);
        format!("{DRY}{}", self.0.borrow().len())
    }

    /// Steps that a model has had.
    pub fn steps(&self, spec: &ModelSpec) -> u64 {
        let Some(adapter) = &spec.adapter else { return 0 };
        let number = adapter.strip_prefix(DRY).and_then(|number| number.parse::<usize>().ok());
        match number {
            Some(number) => self.0.borrow().get(number.wrapping_sub(1)).copied().unwrap_or(0),
            None => STEPS_BEFORE,
        }
    }
}

/// The loss of a model after some steps, in nats: at first that of a guess among all tokens, ln V.
pub fn loss(model: &BaseModel, steps: u64) -> f64 {
    let first = (model.architecture.vocab_size.max(2) as f64).ln();
    first * (SHARE_LEFT + (1.0 - SHARE_LEFT) / (1.0 + steps as f64 / STEPS_HALF))
}

/// The share of tokens that it finds likeliest.
pub fn accuracy(model: &BaseModel, steps: u64) -> f64 {
    1.0 - loss(model, steps) / loss(model, 0)
}

/// What a training needs beside its tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Needs {
    /// Bytes of what it makes.
    pub disk_bytes: u64,
    /// Bytes of its checkpoints at their most, which go when the run has finished.
    pub checkpoint_bytes: u64,
    /// Highest resident memory, in bytes.
    pub memory_bytes: Option<u64>,
}

/// Bytes of a value of an adapter, and of a parameter with its moments in a checkpoint.
const VALUE_BYTES: [u64; 2] = [4, 12];
/// Most checkpoints that are kept at once: the last, the two best, and two to go back to.
const CHECKPOINTS: u64 = 5;

impl Needs {
    /// What is written for so many trained values.
    pub fn disk(trainable: usize) -> Self {
        let [result, checkpoint] = VALUE_BYTES.map(|bytes| bytes * trainable as u64);
        Self { disk_bytes: result, checkpoint_bytes: CHECKPOINTS * checkpoint, ..Self::default() }
    }

    /// What two trainings, one after the other, need together.
    pub fn and(self, other: Self) -> Self {
        Self {
            disk_bytes: self.disk_bytes + other.disk_bytes,
            checkpoint_bytes: self.checkpoint_bytes + other.checkpoint_bytes,
            memory_bytes: self.memory_bytes.max(other.memory_bytes),
        }
    }

    /// In words.
    pub fn words(&self) -> String {
        let memory = self.memory_bytes.map(|bytes| format!("{} of memory, ", size(bytes)));
        format!(
            "{}{} on disk and at most {} of checkpoints until it has finished",
            memory.unwrap_or_default(),
            size(self.disk_bytes),
            size(self.checkpoint_bytes)
        )
    }
}
