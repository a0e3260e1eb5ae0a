//! The chat templates that lie with a tokenizer: in which files, and by which names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{SMALL_BYTES_MAX, Tokenizer};
use crate::files::read_if_there;
use crate::text::template::ChatTemplate;

impl ChatTemplate {
    /// The chat template of a tokenizer, with the one for tools if that has a source of its own. `place`: what it was read from.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`]. Names the file.
    pub fn of_tokenizer(tokenizer: &Tokenizer, place: &Path) -> Result<Option<Self>> {
        let file = |name: Option<&str>| template_file(place, name).display().to_string();
        let (bos, eos) = (tokenizer.bos_token.as_deref(), tokenizer.eos_token.as_deref());
        let Some(source) = &tokenizer.chat_template else { return Ok(None) };
        let template = Self::new(source, bos, eos).context("its chat template").with_context(|| file(None))?;
        Ok(Some(match tokenizer.named_templates.get("tool_use") {
            Some(source) => {
                let tool_use = Self::new(source, bos, eos).context("its chat template `tool_use`");
                template.with_tool_use(tool_use.with_context(|| file(Some("tool_use")))?)
            }
            None => template,
        }))
    }
}

pub use crate::files::TEMPLATES_DIR;

/// The name of the template that needs none.
pub(super) const DEFAULT: &str = "default";

/// The file of a directory that holds its chat template, or the one of that name; the directory itself where no file is for that alone.
fn template_file(dir: &Path, name: Option<&str>) -> PathBuf {
    let named = dir.join(TEMPLATES_DIR).join(format!("{}.jinja", name.unwrap_or(DEFAULT)));
    let plain = name.is_none().then(|| dir.join("chat_template.jinja"));
    std::iter::once(named).chain(plain).find(|file| file.exists()).unwrap_or_else(|| dir.to_owned())
}

/// Most templates with names; published models have three.
const TEMPLATES_MAX: usize = 64;

/// The files `NAME.jinja` of a directory, which may be missing.
pub(super) fn read_named_templates(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut templates = BTreeMap::new();
    if !dir.is_dir() {
        return Ok(templates);
    }
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry.with_context(|| dir.display().to_string())?.path();
        let name =
            path.file_stem().and_then(|name| name.to_str()).filter(|_| path.extension().is_some_and(|e| e == "jinja"));
        if let (Some(name), Some(template)) = (name, read_if_there(&path, SMALL_BYTES_MAX)?) {
            templates.insert(name.to_owned(), template);
            ensure!(
                templates.len() <= TEMPLATES_MAX,
                "{}: has more than {TEMPLATES_MAX} chat templates",
                dir.display()
            );
        }
    }
    Ok(templates)
}

/// A template, or the one named "default" of a list and the others by name.
pub(super) fn listed_templates(value: &Value) -> Result<(Option<String>, BTreeMap<String, String>)> {
    match value {
        Value::Null => Ok((None, BTreeMap::new())),
        Value::String(template) => Ok((Some(template.clone()), BTreeMap::new())),
        Value::Array(templates) => {
            let entry =
                |entry: &Value| Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()));
            let mut named: BTreeMap<String, String> = templates.iter().filter_map(entry).collect();
            let default = named.remove(DEFAULT).with_context(|| {
                let names: Vec<&String> = named.keys().collect();
                format!(
                    "tokenizer_config.json: chat_template has {names:?} but no \"default\"; \
                     write the one to use to chat_template.jinja"
                )
            })?;
            check_names(&named).context("tokenizer_config.json: chat_template")?;
            Ok((Some(default), named))
        }
        _ => bail!("tokenizer_config.json: chat_template is neither a string nor a list"),
    }
}

/// Checks that templates can be files of their names: that is how they are written.
pub(super) fn check_names(named: &BTreeMap<String, String>) -> Result<()> {
    let plain = |name: &&String| {
        let known = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(known)
    };
    ensure!(named.len() <= TEMPLATES_MAX, "has more than {TEMPLATES_MAX} chat templates");
    match named.keys().find(|name| !plain(name)) {
        Some(name) => bail!("the name {name:?} cannot be that of a file"),
        None => Ok(()),
    }
}
