//! `--format peft`: the adapter alone, as PEFT has it.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::plan::Peft;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::{AdapterFiles, WEIGHTS_FILE, is_adapter, save_peft};
use homeroom_engine::adapt::peft::text_name;
use homeroom_engine::files::tensors::map_safetensors;

use super::compare::{compare, tell};
use super::{Arguments, Export, Written};
use crate::models::here;

/// Refuses what is no adapter, before a base is loaded.
pub fn check(arguments: &Arguments) -> Result<()> {
    ensure!(
        arguments.dtype.is_none(),
        "--dtype: an adapter is written in f32, as it was trained; `--format peft` takes no other"
    );
    let name = &arguments.model.model_dir;
    match here(name)? {
        Some(located) if !is_adapter(&located.path) => refuse(&name.display().to_string()),
        _ => Ok(()),
    }
}

fn refuse<T>(name: &str) -> Result<T> {
    bail!("{name}: not an adapter, and PEFT has adapters; `--format merged` writes a model for transformers")
}

/// Writes the adapter.
pub fn write(export: &Export<'_>) -> Result<Written> {
    let name = export.arguments.model.model_dir.display().to_string();
    let Some(adaptation) = export.adaptation else { return refuse(&name) };
    let peft = peft_of(adaptation, &name)?;
    save_peft(export.directory, export.model, adaptation)?;
    same_tensors(export, adaptation)?;
    let mut said = Written::default();
    if peft.peft_type == "LORA" {
        let read = AdapterFiles::read(export.directory.path()).and_then(|files| files.adapt(export.model, false));
        let read = read.context("the export cannot be read back")?;
        let found = compare(export, (export.model, Some(&read)))?;
        tell(export, &found, "f32", None, &mut said);
    } else {
        said.line("check     its tensors are those of the adapter".to_owned());
    }
    let base = export.model;
    if base.path.is_file() {
        said.line("          its base is a GGUF file, which PEFT does not load; of the directory that the file was made of it does".to_owned());
    } else if base.layers.first().is_some_and(|layer| base.modules[layer.down].weight.is_encoded()) {
        let stored = base.storage_words();
        said.line(format!("          it was trained on the base stored as {stored}; load that alike, by bitsandbytes, for the same answers"));
    }
    said.field("peft_type", peft.peft_type.as_str());
    Ok(said)
}

/// What PEFT calls the adapter.
fn peft_of<'a>(adaptation: &'a Adaptation, name: &str) -> Result<&'a Peft> {
    let peft = adaptation.plan.peft.as_ref();
    peft.with_context(|| format!("{name}: its strategy has no form in PEFT; `--format merged` writes a model of it"))
}

/// Whether what was written has the values of all parameters, each under its name.
fn same_tensors(export: &Export<'_>, adaptation: &Adaptation) -> Result<()> {
    let written = map_safetensors(&export.directory.path().join(WEIGHTS_FILE))?;
    let mut written: HashMap<String, _> =
        written.into_iter().map(|(name, tensor)| (text_name(&name), tensor)).collect();
    for param in &adaptation.params {
        let name = &param.spec.tensor;
        let values: Vec<f32> = param.var.as_detached_tensor().flatten_all()?.to_vec1()?;
        let same =
            written.remove(name).map(|tensor| tensor.values()).transpose()?.is_some_and(|written| written == values);
        ensure!(same, "tensor `{name}` was not written as it is, so nothing is saved");
    }
    ensure!(written.is_empty(), "tensors were written that the adapter has not, so nothing is saved");
    Ok(())
}
