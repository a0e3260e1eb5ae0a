//! The models of the registry: what each is, what it came of, and whether it is whole.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use homeroom_engine::adapt::adapter::{
    Base, CONFIG_FILE, HOMEROOM_FILE, Manifest, NamedBase, WEIGHTS_FILE, is_adapter, read_manifest,
};
use homeroom_engine::embedding::encoder_type;
use homeroom_engine::files::tensors::{map_directory, map_safetensors};
use homeroom_engine::files::{self, SMALL_FILE_BYTES_MAX, broken_link, bytes_below_few, is_named, read_text};
use homeroom_engine::models::BaseModel;
use serde::Serialize;
use serde_json::Value;

use super::names::{is_name, owner};
use super::{data_directory, when};
use crate::hub::{self, HubName, cache};
use crate::models::hub_name_of;

/// Most files that are looked at for their bytes: a link may lead to a whole disk.
const ENTRIES_MAX: usize = 10_000;

/// A model in the registry.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
    /// `adapter`, `model` or `embedding`.
    pub kind: &'static str,
    /// The strategy that trained it.
    pub strategy: String,
    /// The base it was trained on.
    pub base: PathBuf,
    /// Held-out loss at the end of its training.
    pub eval_loss: Option<f64>,
    /// The model it was trained on from, if it went on from another of the registry.
    pub parent: Option<String>,
    /// What is wrong with it: its files are missing or damaged, or its base is gone. Of weights only the headers are looked at.
    pub problem: Option<String>,
    /// The base's name on the hub, `owner/name` with `:quantization` where it is one of several GGUF files, if it is known.
    pub base_name: Option<String>,
    /// The commit of the base, if it is known.
    pub base_revision: Option<String>,
    /// Held-out loss before its training.
    pub eval_loss_before: Option<f64>,
    /// Loss of the last steps of its training.
    pub train_loss: Option<f64>,
    /// Rows that it was trained on.
    pub rows: Option<u64>,
    /// Rows that were held out.
    pub eval_rows: Option<u64>,
    /// Bytes of its files.
    pub bytes: u64,
    /// When it was trained, or else when its files were written.
    pub date: Option<String>,
}

/// The names of all models in the registry, in order.
///
/// # Errors
/// When the directory cannot be listed.
pub fn names() -> Result<Vec<String>> {
    let Some(models) = data_directory().map(|data| data.join("models")) else { return Ok(Vec::new()) };
    // A process that was killed while it replaced a model may have left it without its name.
    files::recover_all(&models);
    let entries = match fs::read_dir(&models) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("{}: cannot list", models.display())),
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str().filter(|name| is_name(name))?.to_owned();
            may_be_model(&path).then_some(name)
        })
        .collect();
    names.sort();
    Ok(names)
}

/// Whether a model may be what a name of the registry leads to. A link that leads nowhere is one that is missed.
fn may_be_model(path: &Path) -> bool {
    let is_gguf = path.extension().is_some_and(|extension| extension == "gguf");
    path.is_dir() || is_gguf && path.is_file() || broken_link(path).is_some()
}

/// Whether there is a model at a place of the registry.
///
/// # Errors
/// When the place cannot be looked at.
pub fn is_there(path: &Path) -> Result<bool> {
    files::recover(path);
    Ok(is_named(path)? && may_be_model(path))
}

/// All models in the registry, by name.
///
/// # Errors
/// When the directory cannot be listed.
pub fn list() -> Result<Vec<Entry>> {
    let Some(models) = data_directory().map(|data| data.join("models")) else { return Ok(Vec::new()) };
    Ok(names()?.into_iter().map(|name| entry(name.clone(), models.join(name))).collect())
}

/// Looks whether the files of a model are whole; of weights at the headers alone.
///
/// # Errors
/// When one is missing, cut short or damaged.
pub fn inspect(path: &Path) -> Result<()> {
    if let Some(link) = broken_link(path) {
        bail!("{link}");
    }
    if is_adapter(path) && !path.join("config.json").exists() {
        return map_safetensors(&path.join(WEIGHTS_FILE)).map(drop);
    }
    match encoder_type(path) {
        Some(_) => map_directory(path).map(drop),
        None => BaseModel::inspect(path),
    }
}

/// What lies at a path, whether in the registry or elsewhere.
pub fn entry(name: String, path: PathBuf) -> Entry {
    let adapter = is_adapter(&path) && !path.join("config.json").exists();
    let embedding = !adapter && encoder_type(&path).is_some();
    let mut problem = inspect(&path).err().map(|error| format!("{error:#}"));
    let mut entry = Entry {
        name,
        kind: match (adapter, embedding) {
            (true, _) => "adapter",
            (false, true) => "embedding",
            (false, false) => "model",
        },
        strategy: String::new(),
        base: PathBuf::new(),
        eval_loss: None,
        parent: None,
        problem: None,
        base_name: None,
        base_revision: None,
        eval_loss_before: None,
        train_loss: None,
        rows: None,
        eval_rows: None,
        bytes: bytes_below_few(&path.canonicalize().unwrap_or_else(|_| path.clone()), ENTRIES_MAX).unwrap_or_default(),
        date: written(&path),
        path,
    };
    match read_manifest(&entry.path) {
        Ok(Some(manifest)) => entry.take(manifest),
        Ok(None) => match read_peft(&entry.path) {
            Ok((strategy, base, revision)) => {
                (entry.strategy, entry.base) = (strategy, base);
                let base = NamedBase {
                    path: Some(entry.base.clone()),
                    name: entry.base.to_str().map(str::to_owned),
                    revision,
                };
                entry.name_base(&base);
            }
            Err(error) => problem = problem.or(Some(format!("{error:#}"))),
        },
        Err(error) => problem = problem.or(Some(format!("{error:#}"))),
    }
    let gone = if adapter && problem.is_none() { entry.missing_base() } else { None };
    Entry { problem: problem.or(gone), ..entry }
}

impl Entry {
    fn take(&mut self, manifest: Manifest) {
        let (training, result) = (&manifest.training, &manifest.training["result"]);
        self.eval_loss = result["eval_loss"].as_f64();
        self.eval_loss_before = result["eval_loss_before"].as_f64();
        self.train_loss = result["train_loss"].as_f64();
        self.rows = training["rows"].as_u64();
        self.eval_rows = training["eval_rows"].as_u64();
        let parent = training["parent"].as_str().map(str::to_owned);
        self.parent = parent.or_else(|| owner(Path::new(training["init_from"].as_str()?)));
        // Of a text that another program wrote there, only what is a time is shown as one.
        let finished = training["finished"].as_str().filter(|text| when::is_text(text));
        self.date = finished.map(str::to_owned).or_else(|| self.date.take());
        let Base { path, name, revision, .. } = manifest.base;
        self.name_base(&NamedBase { path: Some(path.clone()), name, revision });
        (self.strategy, self.base) = (manifest.strategy.name, path);
    }

    fn name_base(&mut self, base: &NamedBase) {
        let name = hub_name_of(base);
        self.base_revision = name.as_ref().and_then(|name| name.revision.clone());
        self.base_name = name.map(|name| HubName { revision: None, ..name }.to_string());
    }

    /// What to say where the base of an adapter is not on this machine.
    fn missing_base(&self) -> Option<String> {
        if self.base.as_os_str().is_empty() || self.base.exists() {
            return None;
        }
        let Some(name) = self.base_on_hub() else {
            return Some("its base is not there; `--base-model` names where it is".to_owned());
        };
        match hub::find(&name) {
            Ok(Some(_)) => None,
            Err(error) => Some(format!("its base {}", error.to_string().lines().next().unwrap_or_default())),
            // Another commit often has the same weights; whether it has shows when it is loaded.
            Ok(None) if is_cached(&name.repo) => None,
            Ok(None) => Some(format!(
                "its base {name} is not there; `homeroom pull {name}` fetches it, `--base-model` names another place"
            )),
        }
    }

    /// The name of the base on the hub, at the commit that it was.
    pub fn base_on_hub(&self) -> Option<HubName> {
        let name = HubName::parse(self.base_name.as_deref()?)?;
        Some(HubName { revision: self.base_revision.clone(), ..name })
    }
}

/// Whether a commit of a repository is here that is whole.
fn is_cached(repo: &str) -> bool {
    let cached = cache::list().unwrap_or_default();
    cached.iter().any(|cached| cached.repo.eq_ignore_ascii_case(repo) && cached.current().is_some())
}

/// When the files of a model were last written.
fn written(path: &Path) -> Option<String> {
    let files = [HOMEROOM_FILE, WEIGHTS_FILE, "model.safetensors", "config.json"].map(|name| path.join(name));
    let about = files.iter().map(PathBuf::as_path).chain([path]).find_map(|file| fs::metadata(file).ok())?;
    about.modified().ok().map(when::text)
}

/// Kind, base and revision of the base of an adapter that another program trained; of a model without `homeroom.json` nothing is known.
fn read_peft(path: &Path) -> Result<(String, PathBuf, Option<String>)> {
    let file = path.join(CONFIG_FILE);
    if !is_named(&file)? {
        return Ok(Default::default());
    }
    let text = read_text(&file, SMALL_FILE_BYTES_MAX)?;
    let config: Value = serde_json::from_str(&text).with_context(|| format!("{CONFIG_FILE}: damaged"))?;
    let text = |key: &str| config[key].as_str().unwrap_or_default().to_owned();
    let revision = config["revision"].as_str().map(str::to_owned);
    Ok((text("peft_type").to_lowercase(), text("base_model_name_or_path").into(), revision))
}
