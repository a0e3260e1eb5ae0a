//! Tensors written to safetensors files as they come, some values at a time.
//!
//! The form: eight bytes with the length of a header, the header as JSON with the place of each tensor, and the values. Sizes follow from
//! shapes, so the header is written first. (`safetensors::serialize_to_file` wants each tensor whole in memory.) <https://github.com/huggingface/safetensors#format>

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::Floats;
use super::floats::encode;
use crate::adapt::adapter::pretty;
use crate::files::NewDirectory;

/// A tensor that is to be written, and what its values come from.
pub(super) struct Planned<T> {
    pub name: String,
    pub shape: Vec<usize>,
    pub of: T,
}

impl<T> Planned<T> {
    fn bytes(&self, floats: Floats) -> u64 {
        (self.shape.iter().product::<usize>() * floats.bytes()) as u64
    }
}

/// The bytes of all values.
pub(super) fn total_bytes<T>(tensors: &[Planned<T>], floats: Floats) -> u64 {
    tensors.iter().map(|tensor| tensor.bytes(floats)).sum()
}

/// Writes tensors as `model.safetensors`, or where they have more than `most` bytes as several files and their index, named as transformers
/// does. `values` is asked for each tensor in turn and gives its values in order, some at a time.
///
/// # Errors
/// When there are not as many values as a shape asks for, one is beyond the floats, or a file cannot be written.
pub(super) fn write_shards<T>(
    directory: &NewDirectory,
    tensors: &[Planned<T>],
    floats: Floats,
    most: u64,
    mut values: impl FnMut(&Planned<T>, &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let parts = cut(tensors, floats, most);
    let name = |number: usize| match parts.len() {
        1 => "model.safetensors".to_owned(),
        count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    for (number, part) in parts.iter().enumerate() {
        write_file(directory, &name(number), &tensors[part.clone()], floats, &mut values)?;
    }
    if parts.len() > 1 {
        let mut places: Vec<(&str, String)> = Vec::new();
        for (number, part) in parts.iter().enumerate() {
            places.extend(tensors[part.clone()].iter().map(|tensor| (tensor.name.as_str(), name(number))));
        }
        places.sort();
        let places: Map<String, Value> =
            places.into_iter().map(|(name, file)| (name.to_owned(), json!(file))).collect();
        let total = total_bytes(tensors, floats);
        let metadata = json!({"total_parameters": total / floats.bytes() as u64, "total_size": total});
        let index = json!({"metadata": metadata, "weight_map": places});
        directory.write("model.safetensors.index.json", pretty(&index)?.as_bytes())?;
    }
    Ok(())
}

/// The tensors of each file: as many as fit, in their order.
fn cut<T>(tensors: &[Planned<T>], floats: Floats, most: u64) -> Vec<Range<usize>> {
    let (mut parts, mut from, mut filled) = (Vec::new(), 0, 0);
    for (number, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes(floats);
        if number > from && filled + bytes > most {
            parts.push(from..number);
            (from, filled) = (number, 0);
        }
        filled += bytes;
    }
    parts.push(from..tensors.len());
    parts
}

fn write_file<T>(
    directory: &NewDirectory,
    name: &str,
    tensors: &[Planned<T>],
    floats: Floats,
    values: &mut impl FnMut(&Planned<T>, &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let failed = || directory.cannot_write(name);
    let file = File::create(directory.path().join(name)).with_context(failed)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&header(tensors, floats)?).with_context(failed)?;
    let mut bytes = Vec::new();
    for tensor in tensors {
        let mut missing = tensor.shape.iter().product::<usize>();
        values(tensor, &mut |part| {
            ensure!(part.len() <= missing, "tensor `{}` has more values than its shape", tensor.name);
            missing -= part.len();
            for part in part.chunks(1 << 16) {
                bytes.clear();
                encode(part, floats, &mut bytes).with_context(|| format!("tensor `{}`", tensor.name))?;
                out.write_all(&bytes).with_context(failed)?;
            }
            Ok(())
        })?;
        ensure!(missing == 0, "tensor `{}` lacks {missing} values", tensor.name);
    }
    let file = out.into_inner().map_err(std::io::IntoInnerError::into_error).with_context(failed)?;
    file.sync_all().with_context(failed)
}

/// A file up to its values, which begin at a multiple of eight bytes.
fn header<T>(tensors: &[Planned<T>], floats: Floats) -> Result<Vec<u8>> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut at = 0;
    for tensor in tensors {
        let end = at + tensor.bytes(floats);
        let entry = json!({"dtype": floats.dtype(), "shape": tensor.shape, "data_offsets": [at, end]});
        entries.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut json = serde_json::to_vec(&entries)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tensors::map_directory;

    fn planned(sizes: &[usize]) -> Vec<Planned<usize>> {
        let tensor = |(of, size): (usize, &usize)| Planned { name: format!("t{of}"), shape: vec![*size, 3], of };
        sizes.iter().enumerate().map(tensor).collect()
    }

    #[test]
    fn a_file_takes_as_many_tensors_as_fit_and_one_that_never_does_is_alone() {
        let cuts = |sizes: &[usize]| {
            cut(&planned(sizes), Floats::Bf16, 60).into_iter().map(|part| part.len()).collect::<Vec<_>>()
        };
        assert_eq!(cuts(&[5, 5, 1, 20, 1, 9]), [2, 1, 1, 2]);
        assert_eq!(cuts(&[20, 2]), [1, 1]);
        assert_eq!(cuts(&[3]), [1]);
    }

    #[test]
    fn what_is_written_in_pieces_is_read_back() -> Result<()> {
        let place = tempfile::tempdir()?;
        for (most, files) in [(1000, 1), (50, 3)] {
            let directory = NewDirectory::start(&place.path().join(most.to_string()))?;
            write_shards(&directory, &planned(&[2, 3, 1, 5]), Floats::F32, most, |tensor, write| {
                let values: Vec<f32> = (0..tensor.shape[0] * 3).map(|i| (100 * tensor.of + i) as f32).collect();
                values.chunks(4).try_for_each(write)
            })?;
            let tensors = map_directory(directory.path())?;
            let written = std::fs::read_dir(directory.path())?.count();
            assert_eq!(written, if files == 1 { 1 } else { files + 1 });
            let last = &tensors["t3"];
            assert_eq!((last.shape.as_slice(), last.values()?[14]), (&[5, 3][..], 314.0));
            assert_eq!(tensors["t1"].values()?, [100.0, 101.0, 102.0, 103.0, 104.0, 105.0, 106.0, 107.0, 108.0]);
        }
        let directory = NewDirectory::start(&place.path().join("short"))?;
        let short = write_shards(&directory, &planned(&[2]), Floats::F32, 9, |_, write| write(&[1.0; 5]));
        assert!(short.is_err_and(|error| error.to_string().contains("lacks 1 values")));
        Ok(())
    }
}
