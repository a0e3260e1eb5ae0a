//! `--format merged`: a Hugging Face directory.

use anyhow::{Context, Result, ensure};
use homeroom_engine::export::{Floats, divergence, exportable, model_bytes, save_model};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::plain::recipe::Pass;

use super::{Arguments, Export, Written, probes};

/// A divergence in nats a token, on a few questions, from which on the loss on rows like those that were trained on can be seen to rise: by
/// some hundred times as much, as it is what was learned last that is rounded away.
const FELT: f64 = 1e-4;

/// Refuses arguments that no model can be written by.
pub fn check(arguments: &Arguments) -> Result<()> {
    arguments.floats().map(drop)
}

/// Writes the model.
pub fn write(export: &Export<'_>) -> Result<Written> {
    let model = export.model;
    exportable(model)?;
    let floats = export.arguments.floats()?.map_or_else(|| Floats::of(model), Ok)?;
    let merged = export.merged()?;
    export.ensure_room(model_bytes(&merged, floats)?)?;
    save_model(export.directory, &merged, floats)?;
    // Compared as it was written, so that rounding to the file's type counts.
    let written = BaseModel::load(export.directory.path()).context("the export cannot be read back")?;
    let trained = Pass::evaluation(model, export.adaptation);
    let kl = divergence(&trained, &Pass::evaluation(&written, None), &probes(model)?)?;
    ensure!(
        kl.is_finite(),
        "the model's answers are no finite numbers, so nothing is saved; `homeroom eval` shows its loss"
    );
    let mut said = Written::default();
    let same = if kl > FELT { "nearly as" } else { "as" };
    let name = floats.name();
    said.line(format!("check     it answers {same} the unmerged model does: KL {kl:.1e} nats a token, in {name}"));
    if kl > FELT && floats != Floats::F32 {
        let keeps = if floats == Floats::Bf16 {
            "`--dtype f16` (as small) and `--dtype f32` keep"
        } else {
            "`--dtype f32` keeps"
        };
        said.line("          more of what was learned is rounded away on rows like those trained on: `homeroom eval` measures it,".to_owned());
        said.line(format!("          {keeps} it"));
    }
    said.field("kl", kl);
    said.field("dtype", name);
    Ok(said)
}
