//! What a training makes its base forget: the rows that tell, drawn once and kept with the run, and the measurement.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::data::{Example, Group};
use homeroom_engine::files::{read_text, replace_file};
use homeroom_engine::forgetting::{self, Forgetting, Measured, OwnRow};
use homeroom_engine::models::BaseModel;
use serde_json::{Value, json};

use crate::interrupt;
use crate::progress::{self, line};

/// Largest file of rows that were drawn.
const ROWS_BYTES_MAX: u64 = 16 << 20;
/// Characters of a base's digest in the name of that file.
const DIGEST_CHARS: usize = 16;

/// Rows of the kind that must not be forgotten.
pub struct ForgettingRows {
    examples: Vec<Example>,
    /// What they are, in words.
    what: String,
}

impl ForgettingRows {
    /// Answers of the base's own. They are drawn once, and kept in a directory, if there is one, where another call finds them.
    ///
    /// # Errors
    /// When the base cannot answer, or the directory cannot be written.
    pub fn own(base: &Arc<BaseModel>, directory: Option<&Path>) -> Result<Self> {
        let kept = directory.map(|directory| place(directory, base));
        let rows = match kept.as_deref().and_then(recall) {
            Some(rows) => rows,
            None => {
                let bar = progress::counting("asking the base", 0);
                let rows = forgetting::own_rows(base, |done, all| {
                    bar.set_length(all as u64);
                    bar.set_position(done as u64);
                    interrupt::stop_if_asked()
                });
                bar.finish_and_clear();
                let rows = rows?;
                if let Some(kept) = &kept {
                    replace_file(kept, serde_json::to_string(&rows)?.as_bytes())?;
                }
                rows
            }
        };
        let examples = rows.iter().filter_map(OwnRow::example).collect();
        Ok(Self { examples, what: "the base's own answers".to_owned() })
    }

    /// Rows that the user gives; `what` tells which.
    pub fn given(rows: Vec<Group>, what: String) -> Self {
        Self { examples: rows.into_iter().flat_map(|row| row.sequences).collect(), what }
    }

    /// Compares a trained model with its base, with a bar on a terminal.
    ///
    /// # Errors
    /// See [`forgetting::forgetting`].
    pub fn measure(&self, base: Measured<'_>, tuned: Measured<'_>) -> Result<Forgetting> {
        let examples: Vec<&Example> = self.examples.iter().collect();
        let bar = progress::counting("measuring what is forgotten", examples.len());
        let measured = forgetting::forgetting(base, tuned, &examples, |done| {
            bar.set_position(done as u64);
            interrupt::stop_if_asked()
        });
        bar.finish_and_clear();
        measured
    }

    /// Measures after a training, and tells it in a line. A failure is told, too: it costs the user nothing that was learned.
    pub fn after(&self, base: &BaseModel, tuned: &Adaptation) -> Option<Forgetting> {
        match self.measure((base, None), (base, Some(tuned))) {
            Ok(measured) => {
                line(self.words(&measured));
                Some(measured)
            }
            Err(error) => {
                line(format_args!("warning: what is forgotten cannot be measured: {error:#}"));
                None
            }
        }
    }

    /// The result in a line.
    pub fn words(&self, measured: &Forgetting) -> String {
        let Forgetting { loss_before, loss_after, kl, .. } = measured;
        format!(
            "forgets   loss on {} {loss_before:.4} before, {loss_after:.4} after; KL {kl:.4} nats a token",
            self.what
        )
    }
}

/// The event of a run.
pub fn event(measured: &Forgetting) -> Value {
    let Forgetting { loss_before, loss_after, kl, tokens } = measured;
    json!({"event": "forgetting", "loss_before": loss_before, "loss_after": loss_after, "kl": kl, "tokens": tokens})
}

/// Where a base's rows are kept.
fn place(directory: &Path, base: &BaseModel) -> PathBuf {
    let digest: String = base.digest().chars().filter(char::is_ascii_hexdigit).take(DIGEST_CHARS).collect();
    directory.join(format!("own-answers-{digest}.json"))
}

/// Reads rows that were kept. What is damaged is drawn anew.
fn recall(kept: &Path) -> Option<Vec<OwnRow>> {
    let rows: Vec<OwnRow> = serde_json::from_str(&read_text(kept, ROWS_BYTES_MAX).ok()?).ok()?;
    (!rows.is_empty() && rows.iter().all(|row| row.example().is_some())).then_some(rows)
}
