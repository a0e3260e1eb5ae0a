//! Model files against transformers: every architecture, every way of storing weights.

use anyhow::{Context, Result};
use homeroom_engine::inference::Engine;
use homeroom_engine::inference::generate::{Sampling, generate};
use homeroom_engine::models::families::{FAMILIES, Family};
use homeroom_engine::models::{Architecture, BaseModel};
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::plain::recipe::Pass;

use crate::support::{Place, distance, expected, fixture, homeroom, model, root, stored_ids, succeeds};

fn check(model: &BaseModel, answers: &str, bound: f32) -> Result<()> {
    let pass = Pass::evaluation(model, None);
    for (ids, want) in expected(&fixture("models").join(answers))? {
        let logits = pass.logits(&Batch::of_tokens(&ids, 0))?.flatten_all()?.to_vec1::<f32>()?;
        let apart = distance(&logits, &want);
        assert!(apart < bound, "{}: a logit is {apart} away from transformers'", model.path.display());
    }
    Ok(())
}

/// The table of what runs has a row for each family, with the names of its models, of its `model_type` and of its GGUF files.
#[test]
fn the_readme_names_every_family_and_no_other() -> Result<()> {
    let readme = std::fs::read_to_string(root().join("README.md"))?;
    let (_, section) = readme.split_once("\n## Models that run\n").context("the README has the section")?;
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows: Vec<Vec<&str>> = (section.lines().filter(|line| line.starts_with("| ")).skip(1))
        .map(|row| row.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), FAMILIES.len());
    for (family, row) in FAMILIES.iter().zip(&rows) {
        let types: Vec<String> =
            [Some(family.model_type), family.part_of].into_iter().flatten().map(|name| format!("`{name}`")).collect();
        assert_eq!(row[1..3], [family.known_as, &types.join(", ")]);
        let gguf = family.gguf.map_or("as `".to_owned(), |name| format!("`{name}`"));
        assert!(row[3].starts_with(&gguf), "{}: {}", family.model_type, row[3]);
    }
    let refused =
        ["mixtral", "qwen3_moe", "gpt_oss", "falcon_h1", "gemma3n", "gemma4", "qwen3_5", "ministral3", "mllama"];
    for name in refused {
        let told = Family::of(name).err().with_context(|| format!("{name} is refused"))?.to_string();
        assert!(told.contains(&format!("`{name}`")), "{told}");
    }
    Ok(())
}

#[test]
fn logits_equal_those_of_transformers() -> Result<()> {
    for name in ["llama", "llama-tied", "qwen2", "mistral", "llama3-rope", "llama-gguf"] {
        check(&model(name)?, &format!("{name}/expected.safetensors"), 1e-4)?;
    }
    Ok(())
}

#[test]
fn logits_of_gguf_files_equal_those_of_transformers() -> Result<()> {
    check(&model("llama-gguf/model-f32.gguf")?, "llama-gguf/expected-f32.safetensors", 1e-4)?;
    check(&model("llama-gguf/model-mixed.gguf")?, "llama-gguf/expected.safetensors", 1e-4)
}

/// The directory and any of the files name the whole.
#[test]
fn a_gguf_model_in_several_files_answers_as_it_does_in_one() -> Result<()> {
    let whole = model("llama-gguf/model-mixed.gguf")?;
    let logits = |model: &BaseModel, ids: &[u32]| -> Result<Vec<f32>> {
        let logits = Pass::evaluation(model, None).logits(&Batch::of_tokens(ids, 0))?;
        Ok(logits.flatten_all()?.to_vec1::<f32>()?)
    };
    let shard = |number: usize| format!("llama-gguf-split/model-mixed-0000{number}-of-00003.gguf");
    for name in ["llama-gguf-split".to_owned(), shard(1), shard(3)] {
        let split = model(&name)?;
        assert_eq!((split.digest(), split.files.len()), (whole.digest(), 3), "{name}");
        assert_eq!(split.path, model(&shard(1))?.path, "{name}");
        for (ids, _) in expected(&fixture("models/llama-gguf/expected.safetensors"))? {
            assert!(logits(&split, &ids)? == logits(&whole, &ids)?, "{name}");
        }
    }
    Ok(())
}

/// The digest is of values, so a quantised file and its decoded copy are one base, and two models are two.
#[test]
fn a_gguf_file_and_its_dequantised_directory_are_the_same_base() -> Result<()> {
    let [mixed, directory, f32] = ["llama-gguf/model-mixed.gguf", "llama-gguf", "llama-gguf/model-f32.gguf"];
    assert_eq!(model(mixed)?.digest(), model(directory)?.digest());
    assert_ne!(model(mixed)?.digest(), model(f32)?.digest());
    Ok(())
}

#[test]
fn both_forms_of_rope_configuration_are_read_alike() -> Result<()> {
    let dir = fixture("models/llama3-rope");
    let old = Architecture::from_json(&dir.join("config.json"))?;
    let new = Architecture::from_json(&dir.join("config.rope_parameters.json"))?;
    assert_eq!(Architecture { config: old.config.clone(), ..new }, old);
    Ok(())
}

/// The cache holds what the whole sequence would compute: 24 tokens, as transformers draws them.
#[test]
fn greedy_tokens_equal_those_of_transformers() -> Result<()> {
    let mut model = model("llama")?;
    let path = fixture("models/llama/expected.safetensors");
    let (prompt, want) = (stored_ids(&path, "ids_0")?, stored_ids(&path, "greedy")?);
    // The fixture goes on past the end of a turn.
    let mut endless = homeroom_engine::text::tokenizer::Tokenizer::from_dir(&model.path)?;
    endless.eos_ids.clear();
    model.tokenizer = endless.into();
    let sampling = Sampling { max_tokens: want.len(), ..Sampling::default() };
    let model = std::sync::Arc::new(model);
    for compute in [Compute::Plain, Compute::F32] {
        let engine = Engine::new(model.clone(), compute);
        assert_eq!(generate(&engine, None, &prompt, sampling)?.ids, want, "{compute:?}");
    }
    Ok(())
}

/// Rows of a batch are laid end to end; what stands beside a sequence must not be seen by it.
#[test]
fn a_sequence_answers_the_same_whatever_shares_its_batch() -> Result<()> {
    use homeroom_engine::data::Example;
    let model = model("llama")?;
    let pass = Pass::evaluation(&model, None);
    let example = |ids: &[u32]| Example::new(ids.to_vec(), vec![true; ids.len()], 0);
    let (mine, other) = (example(&[1, 40, 41, 42, 43, 9]), example(&[7, 8, 9, 10, 11, 12, 13]));
    let last = |examples: &[&Example], row: usize| -> Result<Vec<f32>> {
        let logits = pass.logits(&Batch::of_examples(examples.iter().map(|example| (0, *example))))?;
        Ok(logits.get(row)?.to_vec1()?)
    };
    let alone = last(&[&mine], 4)?;
    assert!(distance(&alone, &last(&[&mine, &other], 4)?) < 1e-5);
    assert!(distance(&alone, &last(&[&other, &mine], 10)?) < 1e-5);
    Ok(())
}

/// What a tokenizer's files leave open is taken in some way, and whoever uses the model is told, once.
#[test]
fn what_a_tokenizer_leaves_open_is_said_where_the_model_is_loaded() -> Result<()> {
    let place = Place::new()?;
    let (mut bytes, key) = (std::fs::read(fixture("models/llama-gguf/model-mixed.gguf"))?, b"tokenizer.ggml.pre");
    let at = bytes.windows(key.len()).position(|window| window == key).context("the file names its pre-tokenizer")?;
    bytes[at + key.len() - 1] = b'x';
    let file = place.write("nameless.gguf", bytes)?;
    let directory = place.copy(&fixture("models/llama"), "endless")?;
    let template = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}";
    place.write("endless/chat_template.jinja", template)?;
    for (model, words) in [(&file, "tokenizer.ggml.pre is missing"), (&directory, "writes nothing behind an answer")] {
        let mut chat = homeroom();
        chat.args(["chat", "--prompt", "hi", "--max-tokens", "2", "--model-dir"]).arg(model);
        let said = succeeds(&mut chat)?.stderr;
        let note = format!("note: {}: ", model.display());
        let notes: Vec<&str> = said.lines().filter(|line| line.starts_with(&note)).collect();
        assert!(notes.len() == 1 && notes[0].contains(words), "{said}");
    }
    Ok(())
}
