//! A model as one GGUF file, which llama.cpp loads and all that is made of it: Ollama, LM Studio and others.
//!
//! Names and shapes of tensors are those of llama.cpp's converter, values those of its quantiser. The header is read back by the reader of
//! such files, and held to the model, before the weights follow, a panel of rows at a time.

mod types;

use std::fs::File;
use std::ops::Range;

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_abi::plan::ModuleKind;
use homeroom_kernels::{RowOrder, Storage, encode_rows};

pub use self::types::{Fallback, FileType};
use crate::adapt::adaptation::Adaptation;
use crate::adapt::merge::Merged;
use crate::files::NewDirectory;
use crate::files::gguf::{Gguf, NewTensor, Value, Writer, file_bytes};
use crate::models::metadata::{ensure_same, keys_of};
use crate::models::rope::RopeScaling;
use crate::models::weight::{PANEL_VALUES, Weight};
use crate::models::{Architecture, Module};

/// A file that can be written.
pub struct Plan {
    metadata: Vec<(String, Value)>,
    tensors: Vec<NewTensor>,
    sources: Vec<Source>,
    /// Matrices whose rows are no whole blocks of what they would be stored in.
    pub fallbacks: Vec<Fallback>,
    /// What llama.cpp makes otherwise of the file, each a sentence.
    pub notes: Vec<String>,
}

/// Where the values of a tensor come from.
enum Source {
    /// These.
    Values(Vec<f32>),
    /// Rows of a module's weight, to be stored in this order.
    Weight { module: usize, rows: Range<usize>, order: RowOrder },
    /// Its bias, in the order of its weight's rows.
    Bias { module: usize, rows: Range<usize>, order: RowOrder },
}

impl Plan {
    /// A file of this type. A base that came of a GGUF file keeps the file's metadata and tokenizer; `name` is what any other model is called in it.
    ///
    /// # Errors
    /// When the model, its rope or its tokenizer has no form in such a file.
    pub fn new(merged: &Merged<'_>, kind: FileType, name: &str) -> Result<Self> {
        let base = merged.base();
        let architecture = merged.architecture();
        let family = architecture.family()?.in_gguf;
        ensure!(
            architecture.tie_word_embeddings || family != "gemma2",
            "its head is no longer its embedding, and llama.cpp takes that for the head of every {family} model; export `merged`"
        );
        let of_gguf = base.path.is_file().then(|| Gguf::open(&base.path)).transpose()?;
        let (mut metadata, divisors) = match &of_gguf {
            Some(gguf) => {
                let mut keys = kept(gguf);
                // What was trained is another model than its base.
                if merged.adaptation().is_some() {
                    let of_base = ["general.name", "general.basename", "general.finetune"];
                    keys.retain(|(key, _)| !of_base.contains(&key.as_str()));
                    keys.insert(1.min(keys.len()), ("general.name".to_owned(), Value::String(named(name, merged))));
                }
                (keys, divisors_of(gguf, architecture)?)
            }
            None => {
                let (mut keys, divisors) = keys_of(architecture)?;
                keys.insert(1, ("general.name".to_owned(), Value::String(named(name, merged))));
                (keys, divisors)
            }
        };
        if of_gguf.is_none() || base.text_from.is_some() {
            metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
            metadata.extend(base.tokenizer.gguf_keys(architecture.vocab_size)?);
        }
        metadata.push(("general.quantization_version".to_owned(), Value::U32(2)));
        metadata.push(("general.file_type".to_owned(), Value::U32(kind.number())));

        let (mut tensors, mut sources) = (Vec::new(), Vec::new());
        for (name, values) in divisors {
            tensors.push(NewTensor { name, shape: vec![values.len()], storage: Storage::F32 });
            sources.push(Source::Values(values));
        }
        modules(merged, &mut tensors, &mut sources)?;
        // What llama.cpp calls so: it tells models by their number of layers, and this one by its shared heads besides.
        let shared = architecture.layers.iter().any(|layer| layer.attention().heads != layer.attention().kv_heads);
        let seventy = architecture.layers.len() == 80 && (family == "qwen2" || family == "llama" && shared);
        let fallbacks = types::choose(kind, &mut tensors, architecture.layers.len(), seventy);
        let mut notes = notes(architecture, family);
        let again = sources.iter().zip(&tensors).filter(|(source, tensor)| is_rounded_again(merged, source, tensor));
        let again = again.count();
        if again > 0 {
            notes.push(format!(
                "{again} matrices, which are quantised in the base, are rounded a second time: a file of the unquantised base is nearer"
            ));
        }
        Ok(Self { metadata, tensors, sources, fallbacks, notes })
    }

    /// Bytes of the file.
    ///
    /// # Errors
    /// When a size overflows.
    pub fn bytes(&self) -> Result<u64> {
        file_bytes(&self.metadata, &self.tensors)
    }

    /// The storages of the matrices, and how many have each, the most frequent first.
    pub fn storages(&self) -> Vec<(Storage, usize)> {
        let mut counted: Vec<(Storage, usize)> = Vec::new();
        for tensor in self.tensors.iter().filter(|tensor| tensor.shape.len() == 2) {
            match counted.iter_mut().find(|(storage, _)| *storage == tensor.storage) {
                Some((_, count)) => *count += 1,
                None => counted.push((tensor.storage, 1)),
            }
        }
        counted.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        counted
    }

    /// Writes the file into a directory.
    ///
    /// # Errors
    /// When a reader of the file would make another model of it, a value is too large for its storage, or the disk is full.
    pub fn write(&self, directory: &NewDirectory, file: &str, merged: &Merged<'_>) -> Result<()> {
        let path = directory.path().join(file);
        let cannot = || directory.cannot_write(file);
        let mut writer = Writer::start(File::create(&path).with_context(cannot)?, &self.metadata, &self.tensors)?;
        let mut values = self.sources.iter().zip(&self.tensors).peekable();
        // The divisors of a rope come first: with them a reader knows what the file computes.
        while let Some((Source::Values(values), _)) = values.next_if(|(source, _)| matches!(source, Source::Values(_)))
        {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            writer.write(&bytes).with_context(cannot)?;
        }
        writer.extend().with_context(cannot)?;
        let read = Gguf::open(&path).and_then(|gguf| Architecture::from_gguf(&gguf));
        let written = read.context("the model has no form in a GGUF file; export `merged`")?;
        ensure_same(&written, merged.architecture())?;

        let mut last: Option<(usize, Module)> = None;
        for (source, tensor) in values {
            let (Source::Weight { module: index, .. } | Source::Bias { module: index, .. }) = source else {
                bail!("tensor {} comes too late", tensor.name)
            };
            if last.as_ref().is_none_or(|(of, _)| of != index) {
                drop(last.take());
                last = Some((*index, merged.module(*index)?));
            }
            let Some((_, module)) = &last else { bail!("module {index} is not there") };
            match source {
                Source::Weight { rows, order, .. } => {
                    write_weight(&mut writer, &module.weight, rows, *order, tensor.storage, &cannot)
                        .with_context(|| format!("tensor {}", tensor.name))?;
                    module.weight.release();
                }
                Source::Bias { rows, order, .. } => {
                    let bias = module.bias.as_ref().with_context(|| format!("{}: has no bias", module.info.path))?;
                    let stored = stored_rows(rows.len(), *order);
                    let bytes: Vec<u8> = stored.iter().flat_map(|row| bias[rows.start + row].to_le_bytes()).collect();
                    writer.write(&bytes).with_context(cannot)?;
                }
                Source::Values(_) => {}
            }
        }
        writer.finish().with_context(cannot)
    }
}

/// Whether a weight that was quantised already is to other blocks.
fn is_rounded_again(merged: &Merged<'_>, source: &Source, tensor: &NewTensor) -> bool {
    let Source::Weight { module, .. } = source else { return false };
    let stored = merged.base().modules[*module].weight.storage();
    let is_float = |storage| matches!(storage, Storage::F32 | Storage::F16 | Storage::BF16);
    !is_float(stored) && !is_float(tensor.storage) && stored != tensor.storage
}

/// What llama.cpp leaves out of account of a file.
fn notes(architecture: &Architecture, family: &str) -> Vec<String> {
    let window = architecture.layers.iter().find_map(|layer| layer.attention().window);
    let left_out = window.filter(|_| family == "llama" || family == "phi3");
    let note = |window| {
        format!("llama.cpp leaves the window of {window} tokens out of this family: its answers to longer texts differ")
    };
    let original = architecture.ropes.iter().find_map(|rope| match rope.scaling {
        RopeScaling::LongRope { original, .. } => Some(original),
        _ => None,
    });
    let long = |original| {
        format!(
            "llama.cpp turns all texts as long ones where its context (-c) has more than {original} tokens: shorter ones are answered as here with -c {original}"
        )
    };
    left_out.map(note).into_iter().chain(original.map(long)).collect()
}

/// What a model is called in its file. By the name llama.cpp knows Phi-3, whose tokenizer drops spaces behind control tokens; of other
/// tokenizers it misses these tokens then, and loads nothing.
fn named(name: &str, merged: &Merged<'_>) -> String {
    let tokenizer = &merged.base().tokenizer;
    let phi3 = ["</s>", "<unk>", "<s>", "<|endoftext|>"].into_iter().all(|token| tokenizer.id(token).is_some())
        && merged.architecture().model_type == "phi3";
    let lower = name.to_lowercase();
    match (phi3, lower.contains("phi-3") || lower.contains("phi3")) {
        (true, false) => format!("{name} (Phi-3)"),
        (false, true) => lower.replace("phi-3", "phi 3").replace("phi3", "phi 3"),
        _ => name.to_owned(),
    }
}

/// A file's metadata as it is, but for what is said anew of another file.
fn kept(gguf: &Gguf) -> Vec<(String, Value)> {
    let anew = |key: &str| {
        key.starts_with("split.")
            || ["general.alignment", "general.file_type", "general.quantization_version"].contains(&key)
    };
    let mut entries: Vec<(String, Value)> =
        gguf.entries().filter(|(key, _)| !anew(key)).map(|(key, value)| (key.clone(), value.clone())).collect();
    // As in llama.cpp, the one that says how others are called is first, and tokens are last.
    entries.sort_by_key(|(key, _)| (key != "general.architecture", key.starts_with("tokenizer.")));
    entries
}

/// The divisors of a file's ropes.
fn divisors_of(gguf: &Gguf, architecture: &Architecture) -> Result<Vec<(String, Vec<f32>)>> {
    let divisors = gguf.tensors().filter(|tensor| architecture.is_rope(&tensor.name));
    divisors.map(|tensor| Ok((tensor.name.clone(), gguf.mapped(tensor).values()?))).collect()
}

/// The tensors of all modules, in the order of the forward pass.
fn modules(merged: &Merged<'_>, tensors: &mut Vec<NewTensor>, sources: &mut Vec<Source>) -> Result<()> {
    let (base, architecture) = (merged.base(), merged.architecture());
    for spec in architecture.modules() {
        let index =
            base.module_index(&spec.path).with_context(|| format!("{}: the base has no such module", spec.path))?;
        let info = &base.modules[index].info;
        let gains = |adaptation: &Adaptation| {
            adaptation.of(index).is_some_and(|module| adaptation.plan.recipes[module.recipe].merged_bias.is_some())
        };
        let biased = base.modules[index].bias.is_some() || merged.adaptation().is_some_and(gains);
        for Part { stem, rows, order } in parts(architecture, &spec.path, &spec.gguf, spec.turns)? {
            let rows = rows.unwrap_or(0..base.modules[index].weight.rows());
            let shape = match spec.kind {
                ModuleKind::Norm => vec![info.d_in],
                _ => vec![rows.len(), base.modules[index].weight.cols()],
            };
            tensors.push(NewTensor { name: format!("{stem}.weight"), shape, storage: Storage::F32 });
            sources.push(Source::Weight { module: index, rows: rows.clone(), order });
            if biased {
                tensors.push(NewTensor {
                    name: format!("{stem}.bias"),
                    shape: vec![rows.len()],
                    storage: Storage::F32,
                });
                sources.push(Source::Bias { module: index, rows, order });
            }
        }
    }
    Ok(())
}

/// A part of a module that is a tensor of its own in a file.
pub(super) struct Part {
    /// The tensor's name, without what follows the last dot.
    pub(super) stem: String,
    /// Its rows; `None`: all.
    pub(super) rows: Option<Range<usize>>,
    /// How they are ordered.
    pub(super) order: RowOrder,
}

/// The parts of a module, by both of its names: one, but where a family has two in one module that llama.cpp has apart.
pub(super) fn parts(architecture: &Architecture, path: &str, gguf: &str, turns: bool) -> Result<Vec<Part>> {
    let family = architecture.family()?;
    let layer = architecture.layers.first().context("a model has layers")?;
    let order = match family.interleaved && turns {
        true => RowOrder::Interleaved { head_dim: layer.attention().head_dim },
        false => RowOrder::Natural,
    };
    // A family that has files of its own has its modules in them as they are.
    let [fused] = &layer.feed_forward.gate_up[..] else {
        return Ok(vec![Part { stem: gguf.to_owned(), rows: None, order }]);
    };
    let inner = layer.feed_forward.inner;
    match family.gguf.is_none() && path.ends_with(fused.path) {
        false => Ok(vec![Part { stem: gguf.to_owned(), rows: None, order }]),
        true => {
            let part = |name: &str, rows| Part { stem: gguf.replace("ffn_up", name), rows: Some(rows), order };
            Ok(vec![part("ffn_gate", 0..inner), part("ffn_up", inner..2 * inner)])
        }
    }
}

/// For each stored row which one it is of as many.
pub(super) fn stored_rows(rows: usize, order: RowOrder) -> Vec<usize> {
    let mut stored = vec![0; rows];
    (0..rows).for_each(|row| stored[order.stored(row)] = row);
    stored
}

/// Writes rows of a weight in this order and storage: their own bytes where they lie so already.
fn write_weight(
    writer: &mut Writer,
    weight: &Weight,
    rows: &Range<usize>,
    order: RowOrder,
    storage: Storage,
    cannot: &dyn Fn() -> String,
) -> Result<()> {
    let cols = weight.cols();
    if let Some((bytes, lies)) = weight.stored()
        && weight.storage() == storage
        && lies == order
    {
        let row = bytes.len() / weight.rows().max(1);
        return writer.write(&bytes[rows.start * row..rows.end * row]).with_context(cannot);
    }
    let stored = stored_rows(rows.len(), order);
    let matrix = weight.matrix();
    let row_bytes = storage.row_bytes(cols).context("its rows are no whole blocks")?;
    let step = (PANEL_VALUES / cols.max(1)).max(1);
    let mut bytes = Vec::new();
    for panel in stored.chunks(step) {
        bytes.resize(panel.len() * row_bytes, 0);
        let read = |range: Range<usize>, out: &mut [f32]| {
            for (row, out) in panel[range].iter().zip(out.chunks_exact_mut(cols)) {
                let row = rows.start + row;
                matrix.decode_rows(row..row + 1, out);
            }
        };
        let encoded = encode_rows(storage, (panel.len(), cols), &read, &mut bytes);
        encoded.map_err(|error| anyhow!("{error}; `--dtype f32` holds all that the model does"))?;
        writer.write(&bytes).with_context(cannot)?;
    }
    ensure!(!stored.is_empty(), "it has no rows");
    Ok(())
}
