//! The `Modelfile` itself.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::Format;

/// What a model is made of.
#[derive(Clone, Debug)]
pub enum From<'a> {
    /// A GGUF file, named as it lies beside the Modelfile.
    File(&'a str),
    /// A GGUF file, and an adapter of it.
    Adapted(&'a str, &'a str),
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
pub fn modelfile(from: &From<'_>, format: &Format, stops: &[String], generation: Option<&Value>) -> Result<String> {
    let mut text = match from {
        From::File(file) => format!("FROM ./{file}\n"),
        From::Adapted(file, adapter) => format!("FROM ./{file}\nADAPTER ./{adapter}\n"),
    };
    text += &format!("# The chat format `{}`.\nTEMPLATE {}\n", format.name, quoted(&format.template)?);
    if let Some(system) = &format.system {
        text += &format!("SYSTEM {}\n", quoted(system)?);
    }
    for stop in stops {
        ensure!(!stop.contains(['"', '\n']), "the end token {stop:?} has no form in a Modelfile");
        text += &format!("PARAMETER stop \"{stop}\"\n");
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
        let text = modelfile(&From::File("model.gguf"), &format, &["<|im_end|>".to_owned()], Some(&generation))?;
        assert_eq!(
            text,
            "FROM ./model.gguf\n# The chat format `chatml`.\nTEMPLATE \"\"\"{{ .System }}\nx\"\"\"\nSYSTEM \"\"\"Be \"kind\".\nYes.\"\"\"\nPARAMETER stop \"<|im_end|>\"\nPARAMETER temperature 0.6\nPARAMETER top_k 20\n"
        );
        let text = modelfile(&From::Adapted("base.gguf", "adapter.gguf"), &format, &[], None)?;
        assert!(text.starts_with("FROM ./base.gguf\nADAPTER ./adapter.gguf\n"));
        let quotes = Format { system: Some("\"\"\"".to_owned()), ..format };
        assert!(modelfile(&From::File("x"), &quotes, &[], None).is_err());
        Ok(())
    }
}
