//! The `Modelfile` itself.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Format;

/// What a model is made of.
#[derive(Clone, Debug)]
pub enum Origin<'a> {
    /// A GGUF file, named as it lies beside the Modelfile.
    File(&'a str),
    /// A GGUF file by its path, and an adapter of it, named as it lies beside the Modelfile.
    Adapted(&'a Path, &'a str),
}

/// Parameters of `generation_config.json`, and what Ollama calls them.
const PARAMETERS: [(&str, &str); 5] = [
    ("temperature", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("repetition_penalty", "repeat_penalty"),
];

/// The text of a Modelfile. `stops` are the tokens that end an answer; `generation` is what the model generates by, where it says so.
///
/// # Errors
/// When a text cannot be written in it.
pub fn modelfile(from: &Origin<'_>, format: &Format, stops: &[String], generation: Option<&Value>) -> Result<String> {
    let mut text = match from {
        Origin::File(file) => format!("FROM ./{file}\n"),
        Origin::Adapted(base, adapter) => {
            let base = base
                .to_str()
                .filter(|path| !path.contains(char::is_control) && path.trim() == *path)
                .context("the base's path has no form in a Modelfile")?;
            format!("FROM {base}\nADAPTER ./{adapter}\n")
        }
    };
    text += &format!("# The chat format `{}`.\nTEMPLATE {}\n", format.name, quoted(&format.template)?);
    if let Some(system) = &format.system {
        text += &format!("SYSTEM {}\n", quoted(system)?);
    }
    for stop in stops {
        ensure!(
            !stop.contains(|c: char| c == '"' || c.is_control()),
            "the end token {stop:?} has no form in a Modelfile"
        );
        text += &format!("PARAMETER stop \"{stop}\"\n");
    }
    if generation.is_some_and(|config| config["do_sample"] == false) {
        // What likeliest tokens are drawn by is nothing to it.
        return Ok(text + "PARAMETER temperature 0\n");
    }
    for (name, theirs) in PARAMETERS {
        if let Some(value) = generation.and_then(|config| config[name].as_f64()) {
            text += &format!("PARAMETER {theirs} {value}\n");
        }
    }
    Ok(text)
}

/// A text in three quotes, which cannot stand in it.
fn quoted(text: &str) -> Result<String> {
    ensure!(!text.contains("\"\"\"") && !text.ends_with('"'), "a text with three quotes has no form in a Modelfile");
    Ok(format!("\"\"\"{text}\"\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modelfile_names_file_format_and_ends() -> Result<()> {
        let format = Format {
            name: "chatml",
            template: "{{ .System }}\nx".to_owned(),
            system: Some("Be \"kind\".\nYes.".to_owned()),
            notes: vec![],
        };
        let generation = serde_json::json!({"temperature": 0.6, "top_k": 20, "do_sample": true});
        let text = modelfile(&Origin::File("model.gguf"), &format, &["<|im_end|>".to_owned()], Some(&generation))?;
        assert_eq!(
            text,
            "FROM ./model.gguf\n# The chat format `chatml`.\nTEMPLATE \"\"\"{{ .System }}\nx\"\"\"\nSYSTEM \"\"\"Be \"kind\".\nYes.\"\"\"\nPARAMETER stop \"<|im_end|>\"\nPARAMETER temperature 0.6\nPARAMETER top_k 20\n"
        );
        let greedy = serde_json::json!({"temperature": 0.6, "do_sample": false});
        let text = modelfile(&Origin::File("model.gguf"), &format, &[], Some(&greedy))?;
        assert!(text.ends_with("PARAMETER temperature 0\n") && !text.contains("0.6"), "{text}");
        let text = modelfile(&Origin::Adapted(Path::new("/m/base.gguf"), "adapter.gguf"), &format, &[], None)?;
        assert!(text.starts_with("FROM /m/base.gguf\nADAPTER ./adapter.gguf\n"));
        for path in ["/m/c\rFROM evil", "/m/base.gguf ", "/m/a\nb"] {
            assert!(
                modelfile(&Origin::Adapted(Path::new(path), "adapter.gguf"), &format, &[], None).is_err(),
                "{path:?}"
            );
        }
        assert!(modelfile(&Origin::File("x"), &format, &["a\rb".to_owned()], None).is_err());
        let quotes = Format { system: Some("\"\"\"".to_owned()), ..format };
        assert!(modelfile(&Origin::File("x"), &quotes, &[], None).is_err());
        Ok(())
    }
}
