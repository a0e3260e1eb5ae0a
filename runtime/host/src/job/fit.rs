//! Whether a training fits in memory, before it is begun, and how the same steps can be gone through in less.

use anyhow::{Result, bail};
use homeroom_engine::data::Group;
use homeroom_engine::estimate::Request;
use homeroom_engine::train::{Passes, TrainConfig};

use super::estimate::{Before, Estimator};
use crate::progress::size;

/// A training that is about to begin.
pub struct Asked {
    /// What it is estimated by.
    pub estimator: Estimator,
    /// How it goes through its rows.
    pub request: Request,
}

/// What is done about a training that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// It is refused, with what would fit.
    Refuse,
    /// Its passes are made smaller.
    Fit,
    /// Its passes are made smaller where that helps, and it goes on in any case: it has been begun before.
    TryFit,
    /// It is begun all the same.
    Nothing,
}

/// What a training is about to take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Highest resident memory, in bytes.
    pub peak_memory_bytes: u64,
    /// Smaller passes that it begins with, where what it asked for does not fit.
    pub fit: Option<Fit>,
    /// What to say of it before it begins.
    pub words: String,
}

/// Smaller passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// The passes.
    pub passes: Passes,
    /// Why.
    pub reason: String,
}

/// How a training by this configuration goes through these rows, as if all were as long as the longest. Each sequence of a row counts for
/// one: of a pair, both answers.
pub fn request(rows: &[&Group], config: &TrainConfig, program_bytes: u64) -> Request {
    let lengths = || rows.iter().flat_map(|group| &group.sequences).map(|sequence| sequence.ids.len());
    let longest = lengths().max().unwrap_or(2);
    let sequences = rows.iter().map(|group| group.sequences.len()).max().unwrap_or(1).max(1);
    Request {
        batch_size: config.batch_size.min(rows.len()).saturating_mul(sequences),
        gradient_accumulation_steps: config.gradient_accumulation_steps,
        row_tokens: longest,
        trained_tokens: longest,
        gradient_checkpointing: config.gradient_checkpointing,
        packing: config.packing,
        pass_rows: config.pass_rows,
        compute: config.compute,
        program_bytes,
    }
}

/// Ways to go through the same steps in less memory, those that cost least time first. `pass_rows`: what a pass has where nothing is said.
pub fn less(request: &Request, pass_rows: usize) -> Vec<Request> {
    let inputs = request.row_tokens.saturating_sub(1).max(1);
    let step = request.batch_size.saturating_mul(request.gradient_accumulation_steps).saturating_mul(inputs);
    let bound = match (request.pass_rows, request.packing) {
        (Some(rows), _) => rows,
        (None, true) => pass_rows,
        (None, false) => request.batch_size.saturating_mul(inputs),
    };
    // Rows are not cut, so that a pass holds whole ones.
    let fullest = (bound / inputs).max(1).saturating_mul(inputs).min(step);
    let now = Passes { pass_rows: fullest, gradient_checkpointing: request.gradient_checkpointing };
    let ways = now.lower(inputs).into_iter();
    let otherwise = |passes: Passes| Request {
        gradient_checkpointing: passes.gradient_checkpointing,
        pass_rows: if passes.pass_rows == now.pass_rows { request.pass_rows } else { Some(passes.pass_rows) },
        ..*request
    };
    ways.map(otherwise).collect()
}

/// The flags that a request has and another has not.
pub fn flags(from: &Request, to: &Request) -> String {
    let mut flags = Vec::new();
    if to.gradient_checkpointing && !from.gradient_checkpointing {
        flags.push("--gradient-checkpointing".to_owned());
    }
    if let Some(rows) = to.pass_rows.filter(|_| to.pass_rows != from.pass_rows) {
        flags.push(format!("--pass-tokens {rows}"));
    }
    if to.row_tokens != from.row_tokens {
        flags.push(format!("--max-seq-len {}", to.row_tokens));
    }
    flags.join(" ")
}

/// The first way to go through the same steps that takes no more than so many bytes, with what it takes.
pub fn fitting(estimator: &Estimator, request: &Request, available: u64) -> Option<(Request, u64)> {
    less(request, estimator.pass_rows()).into_iter().find_map(|request| {
        let peak = estimator.estimate(&request).peak_memory_bytes;
        (peak <= available).then_some((request, peak))
    })
}

impl Asked {
    /// How much memory it will need. What does not fit is refused, or gets smaller passes.
    ///
    /// # Errors
    /// When it does not fit and is to be refused, or no smaller passes would make it fit, with what to change.
    pub fn check(&self, before: Before, otherwise: Otherwise) -> Result<Planned> {
        let peak = self.estimator.estimate(&self.request).peak_memory_bytes;
        let mut words = format!("plan      about {} of memory   `homeroom plan` has the parts", size(peak));
        let Some(available) = before.lacking(peak) else {
            return Ok(Planned { peak_memory_bytes: peak, fit: None, words });
        };
        let needs = format!("about {} of memory are needed, and {} can be had", size(peak), size(available));
        if otherwise == Otherwise::Nothing {
            words += &format!("\nwarning: {needs}; it goes on all the same, with smaller passes once memory is short");
            return Ok(Planned { peak_memory_bytes: peak, fit: None, words });
        }
        match (fitting(&self.estimator, &self.request, available), otherwise) {
            (Some((request, peak)), Otherwise::Fit | Otherwise::TryFit) => {
                let passes = Passes {
                    pass_rows: request.pass_rows.unwrap_or(self.estimator.pass_rows()),
                    gradient_checkpointing: request.gradient_checkpointing,
                };
                words += &format!(
                    "\nfit       {needs}; as with `{}` about {} are, and a step stays what it is",
                    flags(&self.request, &request),
                    size(peak)
                );
                Ok(Planned { peak_memory_bytes: peak, fit: Some(Fit { passes, reason: needs }), words })
            }
            (Some((request, peak)), _) => {
                let flags = flags(&self.request, &request);
                bail!(
                    "{needs}\nto fit: `{flags}` needs about {}, with the same steps; --fit chooses so by itself, and --no-memory-check begins all the same",
                    size(peak)
                )
            }
            (None, Otherwise::TryFit) => {
                words += &format!("\nwarning: {needs}; it goes on all the same, with the smallest passes");
                Ok(Planned { peak_memory_bytes: peak, fit: None, words })
            }
            (None, _) => bail!(
                "{needs}; no way to go through the same steps would fit\nto fit: `homeroom plan` with these settings says what would; --no-memory-check begins all the same"
            ),
        }
    }
}
