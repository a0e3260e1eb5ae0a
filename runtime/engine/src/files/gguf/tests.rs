use std::path::Path;

use anyhow::Result;
use homeroom_kernels::Storage;

use super::header::parse;
use super::{Gguf, ShardName};

/// Writes a GGUF file piece by piece, right or wrong.
struct Writer(Vec<u8>);

impl Writer {
    fn new(version: u32, n_tensors: u64, n_entries: u64) -> Self {
        let writer = Writer(b"GGUF".to_vec());
        writer.u32(version).u64(n_tensors).u64(n_entries)
    }
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    fn u32(self, x: u32) -> Self {
        self.raw(&x.to_le_bytes())
    }
    fn u64(self, x: u64) -> Self {
        self.raw(&x.to_le_bytes())
    }
    fn string(self, s: &str) -> Self {
        self.u64(s.len() as u64).raw(s.as_bytes())
    }
    fn tensor(self, name: &str, ne: &[u64], ggml_type: u32, offset: u64) -> Self {
        let start = self.string(name).u32(ne.len() as u32);
        let dims = ne.iter().fold(start, |writer, &dim| writer.u64(dim));
        dims.u32(ggml_type).u64(offset)
    }
    fn data(mut self, alignment: usize, n: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(alignment), 0);
        self.0.extend((0..n).map(|i| i as u8));
        self.0
    }
}

/// Every kind of value, and three tensors whose last byte is the file's last byte.
fn valid() -> Vec<u8> {
    Writer::new(3, 3, 7)
        .string("general.alignment")
        .u32(4)
        .u32(16)
        .string("a.string")
        .u32(8)
        .string("né")
        .string("a.u8")
        .u32(0)
        .raw(&[200])
        .string("a.i64")
        .u32(11)
        .raw(&(-5_i64).to_le_bytes())
        .string("a.bool")
        .u32(7)
        .raw(&[1])
        .string("some.strings")
        .u32(9)
        .u32(8)
        .u64(2)
        .string("x")
        .string("")
        .string("some.floats")
        .u32(9)
        .u32(6)
        .u64(2)
        .raw(&1.5_f32.to_le_bytes())
        .raw(&2_f32.to_le_bytes())
        .tensor("q", &[32, 3], 8, 0) // 3 rows of one 34-byte block: 102 bytes
        .tensor("v", &[5], 0, 112)
        .tensor("cube", &[2, 3, 5], 30, 144)
        .data(16, 144 + 60)
}

fn error(bytes: &[u8]) -> String {
    format!("{:#}", parse(bytes).expect_err("the file should be refused"))
}

#[test]
fn a_valid_file_is_read_in_both_versions() -> Result<()> {
    for version in [2_u32, 3] {
        let mut bytes = valid();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        let path = std::env::temp_dir().join(format!("homeroom-gguf-{}-{version}", std::process::id()));
        std::fs::write(&path, &bytes)?;
        let gguf = Gguf::open(&path)?;
        assert_eq!(gguf.str("a.string")?, Some("né"));
        assert_eq!(gguf.str("absent")?, None);
        assert_eq!(gguf.u64("a.u8")?, Some(200));
        assert_eq!(gguf.bool("a.bool")?, Some(true));
        assert_eq!(gguf.f32s("some.floats")?, Some([1.5, 2.0].as_slice()));
        assert_eq!(gguf.strings("some.strings")?.map(<[_]>::len), Some(2));
        let message = gguf.u64("a.i64").expect_err("it is negative").to_string();
        assert!(message.contains("a.i64: is -5, expected an integer of at least 0"), "{message}");
        let message = gguf.bool("a.string").expect_err("it is a string").to_string();
        assert!(message.contains(&path.display().to_string()), "{message}");

        let q = gguf.tensor("q")?;
        assert_eq!((&q.shape[..], q.storage, q.range.len()), (&[3, 32][..], Storage::Q8_0, 102));
        assert_eq!(gguf.map(q)[q.range.start], 0);
        let cube = gguf.tensor("cube")?;
        assert_eq!((&cube.shape[..], cube.storage), (&[5, 3, 2][..], Storage::BF16));
        assert_eq!(cube.range.end, bytes.len());
        assert_eq!(gguf.map(cube)[cube.range.clone()][0], 144);
        assert!(gguf.tensor("absent").is_err());
        std::fs::remove_file(&path)?;
    }
    Ok(())
}

#[test]
fn what_gguf_py_wrote_is_read() -> Result<()> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers");
    let expected: serde_json::Value = serde_json::from_slice(&std::fs::read(fixtures.join("expected.json"))?)?;
    for name in ["byte_level", "sentencepiece"] {
        let gguf = Gguf::open(&fixtures.join(format!("{name}.gguf")))?;
        let said = &expected["gguf"][name];
        assert_eq!(
            gguf.strings("tokenizer.ggml.tokens")?.map(<[_]>::len),
            said["n_tokens"].as_u64().map(|n| n as usize)
        );
        assert_eq!(gguf.u64("tokenizer.ggml.eos_token_id")?, said["eos"].as_u64());
        assert_eq!(gguf.i64s("tokenizer.ggml.token_type")?.map(|x| x.iter().sum()), said["type_sum"].as_i64());
        let tensor = gguf.tensor("tiny.weight")?;
        assert_eq!((&tensor.shape[..], tensor.storage), (&[3, 32][..], Storage::F16));
        // 0, 1, 2, … 95, whose halves are exact.
        let last = &gguf.map(tensor)[tensor.range.clone()][2 * 95..];
        assert_eq!(last, 0x55f0_u16.to_le_bytes(), "95.0 as f16");
    }
    Ok(())
}

#[test]
fn a_file_cut_short_anywhere_is_an_error() {
    let bytes = valid();
    assert!(parse(&bytes).is_ok());
    for len in 0..bytes.len() {
        assert!(parse(&bytes[..len]).is_err(), "cut to {len} bytes");
    }
}

/// Each byte flipped, and each eight bytes set to a huge or a small count: an error, or
/// contents whose every range lies in the file. A count trusted before it is checked would ask
/// for terabytes here and abort the test.
#[test]
fn a_damaged_file_is_an_error_or_stays_within_bounds() {
    let good = valid();
    let mut damaged = Vec::new();
    for at in 0..good.len() {
        for mask in [0x01, 0x02, 0x10, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= mask;
            damaged.push(bytes);
        }
        for count in [u64::MAX, 1 << 62, 1 << 40, 1 << 32, 0] {
            let mut bytes = good.clone();
            let end = good.len().min(at + 8);
            bytes[at..end].copy_from_slice(&count.to_le_bytes()[..end - at]);
            damaged.push(bytes);
        }
    }
    let mut n_accepted = 0;
    for bytes in damaged {
        let Ok(contents) = parse(&bytes) else {
            continue;
        };
        n_accepted += 1;
        for tensor in &contents.tensors {
            assert!(tensor.range.start <= tensor.range.end && tensor.range.end <= bytes.len());
            let n: usize = tensor.shape.iter().product();
            let blocks = n / tensor.storage.block_len();
            assert_eq!(tensor.range.len(), blocks * tensor.storage.block_bytes());
        }
    }
    assert!(n_accepted > 0, "damage to tensor data alone is not seen here");
}

#[test]
fn what_does_not_fit_is_named() {
    let one = |ne: &[u64], ggml_type, offset| Writer::new(3, 1, 0).tensor("w", ne, ggml_type, offset).data(32, 256);
    let aligned = |alignment: u32, offset| {
        let writer = Writer::new(3, 1, 1).string("general.alignment").u32(4).u32(alignment);
        writer.tensor("w", &[4], 0, offset).data(32, 256)
    };
    let entry = |value_type: u32| Writer::new(3, 0, 1).string("k").u32(value_type);
    // 30 floats of 4 bytes each: with 128 bytes in between they lie apart.
    let two = |a: u64, b: u64| Writer::new(3, 2, 0).tensor("a", &[30], 0, a).tensor("b", &[30], 0, b).data(32, 512);
    assert!(parse(&two(0, 128)).is_ok() && parse(&two(256, 128)).is_ok());
    let cases = [
        (b"GGML....".to_vec(), "not a GGUF file"),
        (Writer::new(1, 0, 0).0, "version 1 is not supported"),
        (Writer::new(4, 0, 0).0, "version 4 is not supported"),
        (Writer::new(3_u32.swap_bytes(), 0, 0).0, "big-endian"),
        (Writer::new(3, 1 << 40, 0).0, "tensor count: claims 1099511627776"),
        (Writer::new(3, 0, u64::MAX).0, "metadata count: claims 18446744073709551615"),
        (one(&[1, 1, 1, 1, 1], 0, 0), "tensor w: has 5 dimensions"),
        (one(&[], 0, 0), "tensor w: has 0 dimensions"),
        (one(&[4, 0], 0, 0), "tensor w: has a dimension of 0"),
        (one(&[1 << 40, 1 << 40], 0, 0), "overflows"),
        (one(&[1 << 62, 4, 4, 4], 0, 0), "overflows"),
        (one(&[65], 0, 0), "tensor w: its 260 bytes at offset 0 end beyond"),
        (one(&[64], 0, u64::MAX - 31), "end beyond the file"),
        (one(&[64], 0, 16), "not a multiple of the alignment 32"),
        (one(&[33], 8, 0), "rows of 33 values are not whole blocks of 32"),
        (one(&[32], 20, 0), "tensor w: IQ4_NL is not supported; requantise"),
        (one(&[32], 4, 0), "ggml type 4 is unknown"),
        (aligned(0, 0), "general.alignment: is 0, expected a power of two"),
        (aligned(24, 0), "general.alignment: is 24, expected a power of two"),
        (aligned(1, 1), "not a multiple of 4"),
        (entry(13).0, "k: value type 13 is unknown"),
        (entry(7).raw(&[2]).0, "k: a truth value is stored as 2"),
        (entry(8).u64(2).raw(&[0xff, 0xfe]).0, "k: string is not UTF-8"),
        (entry(9).u32(9).u64(1).u32(0).u64(0).0, "k: an array of arrays"),
        (entry(9).u32(4).u64(1 << 62).0, "k: array length: claims"),
        (entry(9).u32(8).u64(1).u64(99).0, "k: element 0: string length: claims 99"),
        (Writer::new(3, 0, 2).string("k").u32(0).raw(&[7]).string("k").u32(0).raw(&[8]).0, "k: appears twice"),
        (Writer::new(3, 2, 0).tensor("w", &[4], 0, 0).tensor("w", &[4], 0, 32).data(32, 64), "tensor w: appears twice"),
        (two(0, 0), "tensors a and b lie at one place"),
        (two(32, 0), "tensors b and a lie at one place"),
        (two(0, 64), "tensors a and b lie at one place"),
        (two(160, 64), "tensors b and a lie at one place"),
    ];
    for (bytes, expected) in cases {
        let message = error(&bytes);
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    }
}

fn models() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models")
}

#[test]
fn any_file_of_several_opens_the_whole_model() -> Result<()> {
    let whole = Gguf::open(&models().join("llama-gguf/model-mixed.gguf"))?;
    for number in 1..=3 {
        let name = |number| models().join(format!("llama-gguf-split/model-mixed-0000{number}-of-00003.gguf"));
        let split = Gguf::open(&name(number))?;
        assert_eq!(split.path(), name(1));
        assert_eq!(split.files().collect::<Vec<_>>(), [1, 2, 3].map(name));
        assert_eq!(split.u64("llama.embedding_length")?, whole.u64("llama.embedding_length")?);
        assert_eq!(split.strings("tokenizer.ggml.tokens")?, whole.strings("tokenizer.ggml.tokens")?);
        let names = |gguf: &Gguf| gguf.tensors().map(|tensor| tensor.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&split), names(&whole));
        for a in whole.tensors() {
            let b = split.tensor(&a.name)?;
            assert_eq!((&a.shape, a.storage), (&b.shape, b.storage), "{}", a.name);
            assert!(whole.map(a)[a.range.clone()] == split.map(b)[b.range.clone()], "{}", a.name);
        }
    }
    Ok(())
}

/// A file of a model in several, with one tensor of that name.
fn shard(number: u16, count: u16, tensors: u32, tensor: &str) -> Vec<u8> {
    let writer = Writer::new(3, 1, 3).string("split.no").u32(2).raw(&number.to_le_bytes());
    let writer = writer.string("split.count").u32(2).raw(&count.to_le_bytes());
    writer.string("split.tensors.count").u32(5).u32(tensors).tensor(tensor, &[4], 0, 0).data(32, 16)
}

#[test]
fn files_that_are_no_whole_model_are_refused() -> Result<()> {
    let good = [shard(0, 3, 3, "a"), shard(1, 3, 3, "b"), shard(2, 3, 3, "c")];
    // What is said when these have the names of three files, and the second one is opened.
    let said = |files: [Option<Vec<u8>>; 3]| -> Result<Option<String>> {
        let place = tempfile::tempdir()?;
        let path = |number: usize| place.path().join(format!("m-0000{number}-of-00003.gguf"));
        for (index, bytes) in files.iter().enumerate() {
            bytes.as_ref().map_or(Ok(()), |bytes| std::fs::write(path(index + 1), bytes))?;
        }
        let place = format!("{}/", place.path().display());
        Ok(Gguf::open(&path(2)).err().map(|error| format!("{error:#}").replace(&place, "")))
    };
    let with = |index: usize, bytes: Option<Vec<u8>>| {
        let mut files = good.clone().map(Some);
        files[index] = bytes;
        files
    };
    assert_eq!(said(good.clone().map(Some))?, None);
    let number = |key: &str, kind: u32| Writer::new(3, 0, 1).string(key).u32(kind);
    for (files, expected) in [
        (
            with(2, None),
            "2-of-00003.gguf: 1 of the 3 files of this model are not there: m-00003-of-00003.gguf; download",
        ),
        (with(0, None), "are not there: m-00001-of-00003.gguf"),
        (
            with(1, Some(shard(0, 3, 3, "b"))),
            "is file 1 of 3 of a model, and its name does not end in -00001-of-00003.gguf",
        ),
        (
            with(1, Some(shard(1, 2, 3, "b"))),
            "is file 2 of 2 of a model, and its name does not end in -00002-of-00002.gguf",
        ),
        (with(2, Some(shard(1, 3, 3, "c"))), "m-00003-of-00003.gguf: split.no: is 1, expected 2 by its name"),
        (with(2, Some(shard(2, 4, 3, "c"))), "m-00003-of-00003.gguf: split.count: is 4, and the model has 3 files"),
        (with(2, Some(shard(2, 3, 4, "c"))), "split.tensors.count: is 4, and 3 in m-00001-of-00003.gguf"),
        (with(2, Some(shard(2, 3, 3, "a"))), "m-00003-of-00003.gguf: tensor a: is in m-00001-of-00003.gguf already"),
        (with(2, Some(Writer::new(3, 0, 0).0)), "m-00003-of-00003.gguf: split.no: is missing"),
        (with(2, Some(b"GGUF".to_vec())), "m-00003-of-00003.gguf: needs 4 bytes"),
        (with(1, Some(number("split.count", 8).string("3").0)), "split.count: is a string, expected an integer"),
        (with(1, Some(number("split.count", 4).u32(3).0)), "split.no: is missing, and this is one file of several"),
        (
            [shard(0, 3, 4, "a"), shard(1, 3, 4, "b"), shard(2, 3, 4, "c")].map(Some),
            "split.tensors.count: is 4, and the 3 files have 3 tensors",
        ),
    ] {
        let message = said(files)?.unwrap_or_default();
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    }
    Ok(())
}

#[test]
fn names_say_which_file_of_how_many_it_is() {
    let parts = |name| ShardName::of(name).map(|shard| (shard.before, shard.number, shard.count));
    assert_eq!(parts("Q2/m-Q2_K-00002-of-00010.GGUF"), Some(("Q2/m-Q2_K", 2, 10)));
    for name in [
        "m.gguf",
        "m-00001-of-00002.safetensors",
        "m-00000-of-00002.gguf",
        "m-00003-of-00002.gguf",
        "m-0001-of-00002.gguf",
        "m-+0001-of-00002.gguf",
        "00001-of-00002.gguf",
        "é",
    ] {
        assert_eq!(parts(name), None, "{name}");
    }
    let all: Vec<String> = ShardName::of("m-00002-of-00003.gguf").into_iter().flat_map(ShardName::all).collect();
    assert_eq!(all, ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]);
    let beside = |a, b| ShardName::of(a).zip(ShardName::of(b)).is_some_and(|(a, b)| a.is_beside(&b));
    assert!(beside("m-00001-of-00003.gguf", "m-00003-of-00003.gguf"));
    assert!(
        !beside("m-00001-of-00002.gguf", "m-00001-of-00003.gguf")
            && !beside("m-00001-of-00002.gguf", "n-00002-of-00002.gguf")
    );
}
