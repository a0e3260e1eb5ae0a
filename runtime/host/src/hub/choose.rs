//! Which files of a repository are downloaded: those that this program reads, and no other.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::embedding::{PROMPTS_FILE, SENTENCE_FILES};

use super::listing::{Listing, RemoteFile};
use super::whole::{INDEX, INDEX_BYTES_MAX, shards_of};
use super::{HubName, gguf};
use crate::progress::{line, size};

/// Small files that are read if they are there.
const SMALL: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    PROMPTS_FILE,
];
/// Files of an adapter, besides the small ones.
const ADAPTER: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "homeroom.json"];
/// Weights in forms that are not read.
const OTHER_WEIGHTS: [(&str, &str); 8] = [
    (".bin", "PyTorch's pickle, which can run programs when it is loaded"),
    (".pt", "PyTorch's pickle, which can run programs when it is loaded"),
    (".pth", "PyTorch's pickle, which can run programs when it is loaded"),
    (".ckpt", "PyTorch's pickle, which can run programs when it is loaded"),
    (".h5", "TensorFlow's form"),
    (".msgpack", "Flax's form"),
    (".onnx", "ONNX"),
    (".npz", "NumPy's form"),
];

/// The files to download. `read` fetches a small one, to see which others it names.
///
/// # Errors
/// When the repository has no files in a form that is read, or several could be meant. The message names them.
pub(super) fn choose(
    listing: &Listing,
    name: &HubName,
    read: impl FnOnce(&RemoteFile) -> Result<String>,
) -> Result<Vec<RemoteFile>> {
    let paths: Vec<&str> = listing.files.iter().map(|file| file.path.as_str()).collect();
    if let Some(quantization) = &name.quantization {
        return gguf_of(listing, name, quantization);
    }
    let has = |path: &str| listing.file(path).is_some();
    let is_adapter = has("adapter_config.json");
    let weights: Vec<String> = if is_adapter {
        ensure!(
            has("adapter_model.safetensors"),
            "{name}: an adapter without adapter_model.safetensors{}",
            others(&paths)
        );
        ADAPTER.iter().map(|path| (*path).to_owned()).collect()
    } else if has("model.safetensors") {
        vec!["model.safetensors".to_owned()]
    } else if let Some(index) = listing.file(INDEX) {
        ensure!(index.size <= INDEX_BYTES_MAX, "{name}: {INDEX} is too long");
        let shards = shards_of(&read(index)?).with_context(|| format!("{name}: {INDEX}"))?;
        if let Some(missing) = shards.iter().find(|shard| !has(shard)) {
            bail!("{name}: {INDEX} names {missing:?}, which is not in the repository");
        }
        std::iter::once(INDEX.to_owned()).chain(shards).collect()
    } else if let models = gguf::models(paths.iter().copied())
        && let [one] = gguf::whole(&models)[..]
        && let files = gguf::files_of(one, &models)
        && files.len() == models.len()
    {
        line(format_args!("note: {name}: {one} is taken, the only GGUF file of it"));
        return of_list(listing, &files);
    } else {
        bail!(without_weights(listing, name, &paths));
    };
    let is_embedding = has("modules.json");
    if !is_adapter {
        ensure!(has("config.json"), "{name}: config.json is missing, so what its weights are of is not known");
        let has_vocabulary = is_embedding && has("vocab.txt");
        ensure!(
            has("tokenizer.json") || has_vocabulary,
            "{name}: tokenizer.json is missing, and is needed{}",
            if has("tokenizer.model") {
                "; transformers makes it of tokenizer.model: AutoTokenizer.from_pretrained(NAME).save_pretrained(DIR)"
            } else {
                ""
            }
        );
    }
    let mut wanted: BTreeSet<&str> = SMALL.into_iter().chain(SENTENCE_FILES).collect();
    wanted.extend(weights.iter().map(String::as_str));
    if is_embedding && !has("tokenizer.json") {
        wanted.insert("vocab.txt");
    }
    let is_wanted = |path: &str| wanted.contains(path) || is_template(path) || is_embedding && is_of_module(path);
    Ok(listing.files.iter().filter(|file| is_wanted(&file.path)).cloned().collect())
}

/// A chat template that has a name.
fn is_template(path: &str) -> bool {
    let name = path.strip_prefix("additional_chat_templates/");
    name.is_some_and(|name| name.ends_with(".jinja") && !name.contains('/'))
}

/// A file of one of the layers behind a model of sentence-transformers: `1_Pooling/config.json`, `2_Dense/model.safetensors`.
fn is_of_module(path: &str) -> bool {
    let Some((module, file)) = path.split_once('/') else { return false };
    let numbered = module.split_once('_').is_some_and(|(number, kind)| {
        !number.is_empty()
            && number.bytes().all(|c| c.is_ascii_digit())
            && kind.bytes().all(|c| c.is_ascii_alphanumeric())
    });
    numbered && ["config.json", "model.safetensors"].contains(&file)
}

/// The file of a quantization, or all of them where it is in several.
fn gguf_of(listing: &Listing, name: &HubName, quantization: &str) -> Result<Vec<RemoteFile>> {
    let models = gguf::models(listing.files.iter().map(|file| file.path.as_str()));
    ensure!(!models.is_empty(), "{name}: there are no GGUF files in {}", name.repo);
    let matching = gguf::matching(&models, quantization);
    match (&gguf::whole(&matching)[..], matching.first()) {
        ([], None) => bail!("{name}: no GGUF file of that quantization\nhint: there are {}", sizes(listing, &models)),
        ([], Some(one)) => bail!(
            "{name}: {one} is one file of several, and the repository does not have all of them\nhint: whole are {}",
            sizes(listing, &models)
        ),
        ([one], _) => of_list(listing, &gguf::files_of(one, &matching)),
        (several, _) => bail!("{name}: {quantization} could be {}\nhint: write more of the name", several.join(" or ")),
    }
}

fn of_list(listing: &Listing, paths: &[&str]) -> Result<Vec<RemoteFile>> {
    paths.iter().map(|path| Ok(listing.file(path).context("a path is of the list")?.clone())).collect()
}

/// The quantizations that files are of, with their sizes.
fn sizes(listing: &Listing, models: &[&str]) -> String {
    let told = |path: &&str| {
        let files = gguf::files_of(path, models);
        let bytes = files.iter().filter_map(|path| Some(listing.file(path)?.size)).sum();
        format!("{} ({})", gguf::quantization(path), size(bytes))
    };
    let told: Vec<String> = gguf::whole(models).iter().map(told).collect();
    if told.is_empty() { "none".to_owned() } else { told.join(", ") }
}

/// Why nothing of a repository can be used.
fn without_weights(listing: &Listing, name: &HubName, paths: &[&str]) -> String {
    let models = gguf::models(paths.iter().copied());
    if let Some(first) = gguf::whole(&models).first().or(models.first()) {
        let (repo, at) =
            (&name.repo, name.revision.as_ref().map(|revision| format!("@{revision}")).unwrap_or_default());
        return format!(
            "{name}: it has GGUF files; which one is not said\nhint: there are {}; `homeroom pull {repo}{at}:{}` takes one",
            sizes(listing, &models),
            gguf::quantization(first)
        );
    }
    format!("{name}: there is no model.safetensors{}", others(paths))
}

/// What a repository has instead.
fn others(paths: &[&str]) -> String {
    let safetensors = paths.iter().find(|path| path.ends_with(".safetensors"));
    let form = |path: &str| OTHER_WEIGHTS.iter().find(|(ending, _)| path.ends_with(ending)).map(|(_, what)| *what);
    match (paths.iter().find_map(|path| Some((path, form(path)?))), safetensors) {
        (Some((path, what)), None) => format!(
            "; {path} is {what}, and is not read\nhint: the hub's space `safetensors/convert` makes safetensors of it, or look for another upload of the model"
        ),
        (_, Some(path)) => format!("; {path} is not a name that such a model's file has"),
        (None, None) => "; it seems to be no language model".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// What is chosen of a repository of such files, each with its place in the list as its size in MB.
    fn chosen(name: &str, paths: &[&str], index: &str) -> Result<Vec<String>> {
        let file = |(at, path): (usize, &&str)| json!({"rfilename": path, "size": (at + 1) * 1_000_000, "blobId": format!("{at:040x}")});
        let siblings: Vec<_> = paths.iter().enumerate().map(file).collect();
        let listing = Listing::parse(json!({"sha": COMMIT, "siblings": siblings}).to_string().as_bytes())?;
        let name = HubName::parse(name).context("a name")?;
        let files = choose(&listing, &name, |_| Ok(index.to_owned()))?;
        Ok(files.into_iter().map(|file| file.path).collect())
    }

    #[test]
    fn of_a_model_only_what_is_read_is_downloaded() -> Result<()> {
        let paths = [
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            "merges.txt",
            "model.safetensors",
            "onnx/model.onnx",
            "pytorch_model.bin",
            "runs/events.out",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
            "chat_template.jinja",
            "additional_chat_templates/tool.jinja",
            "additional_chat_templates/x/y.jinja",
            "modeling.py",
            "1_Pooling/config.json",
            "m-Q4_0.gguf",
        ];
        assert_eq!(
            chosen("a/b", &paths, "")?,
            [
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
                "additional_chat_templates/tool.jinja",
            ]
        );
        assert_eq!(chosen("a/b:q4_0", &paths, "")?, ["m-Q4_0.gguf"]);
        Ok(())
    }

    #[test]
    fn shards_are_those_that_the_index_names() -> Result<()> {
        let index = r#"{"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors", "z": "model-00001-of-00002.safetensors"}}"#;
        let paths = [
            "config.json",
            "tokenizer.json",
            INDEX,
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model-00003-of-00002.safetensors",
        ];
        assert_eq!(chosen("a/b", &paths, index)?, paths[..5]);
        for (bad, words) in [
            (r#"{"weight_map": {"x": "../../x.safetensors"}}"#, "no file beside it"),
            (r#"{"weight_map": {"x": "/etc/x.safetensors"}}"#, "no file beside it"),
            (r#"{"weight_map": {"x": "other.safetensors"}}"#, "not in the repository"),
            (r#"{"weight_map": {"x": "config.json"}}"#, "no file beside it"),
            (r#"{"weight_map": {}}"#, "no weight_map"),
            ("[]", "no weight_map"),
            ("{", INDEX),
        ] {
            let error = format!("{:#}", chosen("a/b", &paths, bad).expect_err(bad));
            assert!(error.contains(words), "{error}");
        }
        Ok(())
    }

    #[test]
    fn of_an_adapter_and_of_an_embedding_model_their_own_files_are_downloaded() -> Result<()> {
        let adapter = [
            "adapter_config.json",
            "adapter_model.safetensors",
            "checkpoint-7/adapter_model.safetensors",
            "optimizer.pt",
            "tokenizer.json",
        ];
        assert_eq!(chosen("a/b", &adapter, "")?, [adapter[0], adapter[1], adapter[4]]);
        let embedding = [
            "1_Pooling/config.json",
            "2_Dense/model.safetensors",
            "2_Dense/pytorch_model.bin",
            "config.json",
            "model.safetensors",
            "modules.json",
            "config_sentence_transformers.json",
            "sentence_bert_config.json",
            "vocab.txt",
            "train_script.py",
        ];
        let kept = |range: &[usize]| range.iter().map(|at| embedding[*at]).collect::<Vec<_>>();
        assert_eq!(chosen("a/b", &embedding, "")?, kept(&[0, 1, 3, 4, 5, 6, 7, 8]));
        let with_tokenizer = [&embedding[..], &["tokenizer.json"]].concat();
        assert!(!chosen("a/b", &with_tokenizer, "")?.contains(&"vocab.txt".to_owned()));
        Ok(())
    }

    #[test]
    fn of_a_quantization_in_several_files_all_are_downloaded() -> Result<()> {
        let all = ["q/m-Q8_0-00001-of-00002.gguf", "q/m-Q8_0-00002-of-00002.gguf"];
        let paths = [&all[..], &["m-Q4_0.gguf", "README.md"]].concat();
        assert_eq!(chosen("a/b:Q8_0", &paths, "")?, all);
        assert_eq!(chosen("a/b", &[all[1], all[0], "README.md"], "")?, all, "there is no other");
        let error = format!("{:#}", chosen("a/b", &paths, "").expect_err("two"));
        assert!(error.contains("there are Q8_0 (3.00 MB), Q4_0 (3.00 MB)"), "{error}");
        Ok(())
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_what_there_is() {
        let base = ["config.json", "tokenizer.json"];
        let with = |more: &[&'static str]| [&base[..], more].concat();
        for (name, paths, words) in [
            ("a/b", with(&["pytorch_model.bin"]), "pickle"),
            ("a/b", with(&["tf_model.h5"]), "TensorFlow"),
            ("a/b", with(&["diffusion.safetensors"]), "diffusion.safetensors is not a name"),
            ("a/b", with(&[]), "no language model"),
            ("a/b", vec!["model.safetensors", "tokenizer.json"], "config.json is missing"),
            ("a/b", vec!["model.safetensors", "config.json", "tokenizer.model"], "AutoTokenizer"),
            ("a/b", vec!["adapter_config.json", "adapter_model.bin"], "without adapter_model.safetensors"),
            ("a/b", vec!["m-Q4_0.gguf", "m-Q8_0.gguf"], "Q4_0 (1.00 MB), Q8_0 (2.00 MB); `homeroom pull a/b:Q4_0`"),
            ("a/b@v1", vec!["m-Q4_0.gguf", "n.gguf"], "`homeroom pull a/b@v1:Q4_0`"),
            ("a/b", vec!["m-Q8_0-00001-of-00002.gguf"], "which one is not said"),
            ("a/b:Q2_K", vec!["m-Q4_0.gguf", "m-Q8_0.gguf"], "there are Q4_0 (1.00 MB), Q8_0 (2.00 MB)"),
            ("a/b:Q4_0", vec!["m-Q4_0.gguf", "n-Q4_0.gguf"], "could be m-Q4_0.gguf or n-Q4_0.gguf"),
            ("a/b:Q4_0", vec!["model.safetensors"], "no GGUF files"),
            (
                "a/b:Q8_0",
                vec!["m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00002-of-00003.gguf", "m-Q4_0.gguf"],
                "one file of several, and the repository does not have all of them\nhint: whole are Q4_0 (3.00 MB)",
            ),
        ] {
            let error = format!("{:#}", chosen(name, &paths, "").expect_err(words));
            assert!(error.contains(words), "{error}");
        }
    }
}
