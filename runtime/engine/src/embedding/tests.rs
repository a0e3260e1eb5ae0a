//! Vectors against those of sentence-transformers, and directories that are not what they say.
//!
//! The models and the vectors are made by `tests/fixtures/make_embeddings.py`.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::files::tensors::map_safetensors;
use crate::models::BaseModel;

const MODELS: [&str; 5] = ["bert", "bert-dense", "distilbert", "roberta", "xlm-roberta"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/embeddings").join(name)
}

fn expected(name: &str) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(fixture(name).join("expected.json"))?)?)
}

fn embed_all(model: &EmbeddingModel, texts: &[Tokens]) -> Result<Vec<Vec<f32>>> {
    model.embed(&texts.iter().map(|text| text.ids.as_slice()).collect::<Vec<_>>())
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn vectors_are_those_of_sentence_transformers() -> Result<()> {
    for name in MODELS {
        let (model, expected) = (EmbeddingModel::load(&fixture(name))?, expected(name)?);
        let rows = expected["rows"].as_array().context("rows")?;
        let text = |row: &Value| model.tokens(row["text"].as_str().unwrap_or_default());
        let texts = rows.iter().map(text).collect::<Result<Vec<_>>>()?;
        for (row, tokens) in rows.iter().zip(&texts) {
            assert_eq!(json!(tokens.ids), row["ids"], "{name}: {}", row["text"]);
            assert_eq!(tokens.truncated, row["truncated"] == true, "{name}: {}", row["text"]);
        }
        assert_eq!(json!(model.max_tokens()), expected["max_tokens"], "{name}");
        assert_eq!(json!(model.dimensions()), expected["dimensions"], "{name}");
        for (row, vector) in rows.iter().zip(embed_all(&model, &texts)?) {
            let wanted: Vec<f32> = serde_json::from_value(row["vector"].clone())?;
            let far = furthest(&vector, &wanted);
            assert!(far < 1e-5, "{name}: {}: {far}", row["text"]);
        }
    }
    Ok(())
}

#[test]
fn a_vector_does_not_depend_on_what_is_embedded_beside_it() -> Result<()> {
    for name in MODELS {
        let (model, expected) = (EmbeddingModel::load(&fixture(name))?, expected(name)?);
        let rows = expected["rows"].as_array().context("rows")?;
        let text = |row: &Value| model.tokens(row["text"].as_str().unwrap_or_default());
        let texts = rows.iter().chain(rows).chain(rows).map(text).collect::<Result<Vec<_>>>()?;
        for (tokens, together) in texts.iter().zip(embed_all(&model, &texts)?) {
            let alone = model.embed(&[&tokens.ids])?.remove(0);
            let far = furthest(&alone, &together);
            assert!(far <= 1e-6, "{name}: {far}");
        }
    }
    Ok(())
}

#[test]
fn passes_hold_every_text_once_and_one_length_each() {
    let lengths = [3, 700, 3, 1, 5, 3, 2000, 700, 1, 5];
    let order = passes(&lengths);
    assert!(order.iter().all(|pass| pass.iter().all(|text| lengths[*text] == lengths[pass[0]])));
    assert!(order.iter().all(|pass| pass.len() == 1 || pass.len() * lengths[pass[0]] <= PASS_TOKENS));
    let mut all = order.concat();
    all.sort_unstable();
    assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
    let many = passes(&vec![7; 1000]);
    assert_eq!(many.iter().map(Vec::len).collect::<Vec<_>>(), [[73; 13].as_slice(), &[51]].concat());
}

#[test]
fn a_long_text_is_cut_as_all_of_it_would_be() -> Result<()> {
    for name in MODELS {
        let model = EmbeddingModel::load(&fixture(name))?;
        let word = "cells and more letters ";
        let (long, longer) = (model.tokens(&word.repeat(90))?, model.tokens(&word.repeat(90_000))?);
        assert!(long.truncated && longer.truncated);
        assert_eq!(long, longer, "{name}");
        assert_eq!(long.ids.len(), model.max_tokens());
        // White space alone is no token in BERT, so that all of the text has to be read for its end.
        let hollow = format!("{}cell", " ".repeat(100_000));
        let end = if name == "roberta" || name == "xlm-roberta" { hollow.clone() } else { "cell".to_owned() };
        assert_eq!(model.tokens(&hollow)?.ids, model.tokens(&end)?.ids, "{name}");
    }
    Ok(())
}

/// Cut at any place, also where words are longer than a token's bytes, at white space of many kinds, and within special tokens.
#[test]
fn a_text_is_read_no_further_than_it_matters() -> Result<()> {
    for name in MODELS {
        let model = EmbeddingModel::load(&fixture(name))?;
        for word in [
            "cells ",
            "the  cell\t\n ",
            "a",
            "[MASK] <mask> ",
            "e\u{301} 細胞 \u{2028}\u{a0}",
            " x ",
            "unheard-ofwords-",
        ] {
            for (lead, times) in [("", 40), ("é ", 333), ("a  b", 1000), (&" ".repeat(3000), 1000)] {
                let text = format!("{lead}{}end", word.repeat(times));
                let whole = model.text.whole(&text)?;
                assert_eq!(model.tokens(&text)?, whole, "{name}: {lead:.9?} {word:?} {times}");
            }
        }
    }
    Ok(())
}

#[test]
fn embedding_stops_between_two_passes_and_does_one_at_least() -> Result<()> {
    let model = EmbeddingModel::load(&fixture("bert"))?;
    let text: &[u32] = &[2, 9, 14, 3];
    let texts = vec![text; 3 * PASS_TOKENS / text.len()];
    let some = model.embed_while(&texts, || false)?;
    assert_eq!(some.iter().flatten().count(), PASS_TOKENS / text.len());
    assert!(some.iter().flatten().all(|vector| furthest(vector, some.iter().flatten().next().expect("one")) == 0.0));
    assert!(model.embed_while(&texts, || true)?.iter().all(Option::is_some));
    Ok(())
}

#[test]
fn given_tokens_are_those_of_this_model() -> Result<()> {
    let model = EmbeddingModel::load(&fixture("bert"))?;
    let text = model.tokens("The cell is the smallest unit of life.")?;
    assert_eq!(model.given_tokens(&text.ids)?, text);
    for (ids, words) in [
        (&[][..], "special tokens"),
        (&[2, 3], "special tokens"),
        (&[9, 14, 22], "special tokens, [2] in front and [3] behind"),
        (&[2, 9], "special tokens"),
        (&[2, 131, 3], "token 131 is not one of this model's 131 tokens"),
        (&[u32::MAX], "is not one of this model's"),
    ] {
        let refused = format!("{:#}", model.given_tokens(ids).expect_err("it is refused"));
        assert!(refused.contains(words), "{ids:?}: {refused}");
    }
    let long = [&[2][..], &[9; 500], &[3]].concat();
    let cut = model.given_tokens(&long)?;
    assert!(cut.truncated && cut.ids.len() == 27 && cut.ids.ends_with(&[9, 3]));
    assert!(model.embed(&[&[2, 500, 3]]).is_err(), "no such token");
    assert!(model.embed(&[&[9; 28]]).is_err(), "too long");
    assert!(model.embed(&[&[]]).is_err(), "no token");
    assert!(model.embed(&[])?.is_empty());
    Ok(())
}

/// A copy of a fixture, to be damaged.
fn copy(name: &str) -> Result<TempDir> {
    fn copy_to(from: &Path, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => copy_to(&entry.path(), &to.join(entry.file_name()))?,
                false => drop(fs::copy(entry.path(), to.join(entry.file_name()))?),
            }
        }
        Ok(())
    }
    let dir = tempfile::tempdir()?;
    copy_to(&fixture(name), dir.path())?;
    Ok(dir)
}

/// Sets a key of a JSON file of a copy, at a pointer as `/a/0/b`, and returns why it is not loaded.
fn refusal(name: &str, file: &str, pointer: &str, value: Value) -> Result<String> {
    let dir = copy(name)?;
    let path = dir.path().join(file);
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    let (parent, key) = pointer.rsplit_once('/').context("a pointer")?;
    let parent = json.pointer_mut(parent).context("the parent is there")?;
    match key.parse::<usize>() {
        Ok(index) => parent[index] = value,
        Err(_) => parent[key] = value,
    }
    fs::write(&path, json.to_string())?;
    let refused = EmbeddingModel::load(dir.path()).err().with_context(|| format!("{file} {pointer} is loaded"))?;
    Ok(format!("{refused:#}"))
}

#[test]
fn directories_that_are_not_what_they_say_are_refused_by_name() -> Result<()> {
    let pooling = "1_Pooling/config.json";
    for (name, file, pointer, value, words) in [
        ("distilbert", "config.json", "/dim", json!(32), "tensor `embeddings.word_embeddings.weight` is [131, 28]"),
        ("bert", "config.json", "/hidden_size", json!(39), "it pools 36 channels, and the encoder has 39"),
        ("bert", "config.json", "/vocab_size", json!(8_000_000), "is [131, 36]"),
        ("bert", "config.json", "/num_hidden_layers", json!(4), "tensors are not read"),
        (
            "bert",
            "config.json",
            "/num_hidden_layers",
            json!(6),
            "`encoder.layer.5.attention.self.query.weight` is missing",
        ),
        ("bert", "config.json", "/max_position_embeddings", json!(61), "position_embeddings.weight` is [60, 36]"),
        (
            "bert",
            "modules.json",
            "/2/type",
            json!("sentence_transformers.models.WordWeights"),
            "the module WordWeights",
        ),
        ("bert", "modules.json", "/2/type", json!("mine.Module"), "its code is not run"),
        (
            "bert",
            "modules.json",
            "/1/type",
            json!("sentence_transformers.models.WeightedLayerPooling"),
            "WeightedLayer",
        ),
        ("bert", "modules.json", "/1/path", json!("../../etc"), "leads out of the directory"),
        ("bert", "modules.json", "/0/path", json!("0_Transformer"), "0_Transformer"),
        ("bert", pooling, "/pooling_mode_lasttoken", json!(true), "the pooling `lasttoken` is not supported"),
        ("bert", pooling, "/pooling_mode_weightedmean_tokens", json!(true), "`weightedmean`"),
        ("bert", pooling, "/include_prompt", json!(false), "`include_prompt` = false"),
        ("bert", pooling, "/word_embedding_dimension", json!(35), "it pools 35 channels, and the encoder has 36"),
        ("bert", pooling, "/pooling_mode", json!(["mean", "mode"]), "the pooling `mode`"),
        ("bert", "sentence_bert_config.json", "/max_seq_length", json!(2), "2 tokens, of which 2 are special"),
        ("bert", "sentence_bert_config.json", "/max_seq_length", json!(-1), "`max_seq_length` = -1"),
        ("bert-dense", "2_Dense/config.json", "/in_features", json!(36), "it takes 36 channels, and gets 144"),
        ("bert-dense", "2_Dense/config.json", "/out_features", json!(18), "tensor `linear.weight` is [17, 144]"),
        ("bert-dense", "2_Dense/config.json", "/use_residual", json!(true), "`use_residual`"),
        ("bert-dense", "2_Dense/config.json", "/activation_function", json!("torch.nn.SiLU"), "torch.nn.SiLU"),
        (
            "bert-dense",
            "config_sentence_transformers.json",
            "/default_prompt_name",
            json!("no"),
            "`default_prompt_name`",
        ),
        ("bert-dense", "config_sentence_transformers.json", "/model_type", json!("SparseEncoder"), "SparseEncoder"),
        (
            "bert-dense",
            "config_sentence_transformers.json",
            "/prompts",
            json!({"query": "x".repeat(5000)}),
            "5000 bytes",
        ),
        ("distilbert", "config.json", "/architectures/0", json!("DistilBertForSequenceClassification"), "judges texts"),
        ("distilbert", "config.json", "/n_heads", json!(0), "`n_heads` = 0"),
        ("roberta", "config.json", "/pad_token_id", json!(42), "leaves no position"),
        ("roberta", "config.json", "/type_vocab_size", json!(3), "token_type_embeddings.weight` is [1, 20]"),
        ("xlm-roberta", "config.json", "/model_type", json!("modernbert"), "known are bert, distilbert"),
    ] {
        let refused = refusal(name, file, pointer, value.clone())?;
        assert!(refused.contains(words), "{name} {file} {pointer} {value}: {refused}");
    }
    Ok(())
}

#[test]
fn weights_that_are_damaged_are_refused() -> Result<()> {
    let dir = copy("roberta")?;
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path)?;
    fs::write(&path, &whole[..whole.len() - 40])?;
    let cut = format!("{:#}", EmbeddingModel::load(dir.path()).err().context("cut")?);
    assert!(cut.contains("not a whole safetensors file"), "{cut}");
    fs::write(&path, &whole)?;
    let norm = map_safetensors(&path)?["encoder.layer.1.output.LayerNorm.weight"].range.clone();
    let mut broken = whole.clone();
    broken[norm].fill(0xff); // Not a number.
    fs::remove_file(&path)?;
    fs::write(&path, &broken)?;
    let broken = format!("{:#}", EmbeddingModel::load(dir.path()).err().context("not finite")?);
    assert!(broken.contains("not finite"), "{broken}");
    fs::remove_file(&path)?;
    let gone = format!("{:#}", EmbeddingModel::load(dir.path()).err().context("gone")?);
    assert!(gone.contains("model.safetensors"), "{gone}");
    Ok(())
}

#[test]
fn an_embedding_model_is_no_base() {
    for name in MODELS {
        let refused = format!("{:#}", BaseModel::load(&fixture(name)).err().expect("it is no base"));
        assert!(refused.contains("is an embedding model") && refused.contains("/v1/embeddings"), "{refused}");
        assert!(encoder_type(&fixture(name)).is_some());
    }
    assert_eq!(encoder_type(&fixture("../models/llama")), None);
    assert_eq!(encoder_type(Path::new("/nowhere")), None);
}
