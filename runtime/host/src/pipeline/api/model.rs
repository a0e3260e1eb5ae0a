//! Models as scripts hold them: plain tables that say which base, which strategy and which adapter.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::plan::PlanRequest;
use homeroom_engine::adaptation::Adaptation;
use homeroom_engine::adapter::{AdapterFiles, HOMEROOM_FILE, Manifest, is_adapter};
use homeroom_engine::model::BaseModel;
use homeroom_engine::requantize::store_as_planned;
use mlua::{Lua, Table, Value};
use serde_json::{Map, Value as Json};

use super::options::strategy_options;
use super::value::to_lua;
use super::{Failure, Session, said};
use crate::job::encode;
use crate::models::{Loaded, load_base};
use crate::plugin::native;
use crate::registry;

/// What stands for the id of an adapter that a dry run did not train.
pub const DRY: &str = "dry-run";

/// A model that has not been loaded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelSpec {
    /// The base: a name or path.
    pub base: String,
    /// The strategy to train it with.
    pub strategy: Option<String>,
    /// The strategy's options.
    pub options: Map<String, Json>,
    /// A trained adapter (or model): an id, a name in the registry or a path.
    pub adapter: Option<String>,
}

impl ModelSpec {
    /// Reads a verb's `model`: a name, or what another verb returned.
    ///
    /// # Errors
    /// When it is neither, or there is no such model.
    pub fn read(session: &Session, value: &Value) -> Result<Self, Failure> {
        match value {
            Value::String(name) => Ok(Self::named(session, &name.to_string_lossy())?),
            Value::Table(table) => {
                let wrong = || said("`model` should be a model: its name, or what a verb returned");
                let text = |key: &str| table.raw_get::<Option<String>>(key).map_err(|_| wrong());
                let base = text("model")?.ok_or_else(wrong)?;
                let options = match table.raw_get::<Value>("options")? {
                    Value::Table(options) => strategy_options(&options)?,
                    _ => Map::new(),
                };
                Ok(Self { base, strategy: text("strategy")?, options, adapter: text("adapter")? })
            }
            _ => Err(said("`model` should be a model: its name, or what a verb returned")),
        }
    }

    /// The model of that name or path: a base, or a trained one with what it was trained from.
    ///
    /// # Errors
    /// When a trained one is damaged.
    pub fn named(session: &Session, name: &str) -> Result<Self> {
        if let Some(saved) = session.dry_saved.borrow().get(name) {
            return Ok(saved.clone());
        }
        let path = session.locate(name);
        let manifest = manifest(&path)?;
        let strategy = manifest.as_ref().map(|manifest| manifest.strategy.name.clone());
        let options = manifest.as_ref().and_then(|manifest| manifest.training["options"].as_object().cloned());
        let options = options.unwrap_or_default();
        if !is_adapter(&path) {
            return Ok(Self { base: name.to_owned(), strategy, options, adapter: None });
        }
        let files = AdapterFiles::read(&path)?;
        let base =
            files.base_path().with_context(|| format!("{}: it does not say which base it has", path.display()))?;
        Ok(Self { base: base.display().to_string(), strategy, options, adapter: Some(name.to_owned()) })
    }

    /// The table that a script gets.
    ///
    /// # Errors
    /// When memory is out.
    pub fn to_table(&self, lua: &Lua) -> mlua::Result<Table> {
        let table = lua.create_table()?;
        table.set("model", self.base.as_str())?;
        table.set("strategy", self.strategy.as_deref())?;
        table.set("options", to_lua(lua, &Json::Object(self.options.clone()))?)?;
        table.set("adapter", self.adapter.as_deref())?;
        Ok(table)
    }

    /// Where its adapter is, if it has one that is a directory of its own; a trained whole model is a base.
    pub fn adapter_path(&self, session: &Session) -> Option<PathBuf> {
        let adapter = self.adapter.as_deref().filter(|adapter| *adapter != DRY)?;
        Some(session.locate(adapter)).filter(|path| is_adapter(path))
    }

    /// Loads the base, or the whole model that training made.
    ///
    /// # Errors
    /// When it is not there or cannot be run.
    pub fn load_base(&self, session: &Session) -> Result<Arc<BaseModel>> {
        let path = match &self.adapter {
            Some(adapter) if adapter != DRY && self.adapter_path(session).is_none() => {
                let path = session.locate(adapter);
                ensure!(path.exists(), "there is no trained model `{adapter}`; `homeroom list-models` shows yours");
                path
            }
            _ => session.locate(&self.base),
        };
        if let Some(known) = session.bases.borrow().get(&path) {
            return Ok(known.clone());
        }
        // What is not there may be a name that means something elsewhere, so it is told as it was given.
        let model = Arc::new(load_base(if path.exists() { &path } else { Path::new(&self.base) })?);
        session.bases.borrow_mut().insert(path, model.clone());
        Ok(model)
    }

    /// Loads the base and the adapter on it.
    ///
    /// # Errors
    /// When a file is missing or damaged, or they do not belong together.
    pub fn load(&self, session: &Session) -> Result<(Arc<BaseModel>, Option<Arc<Adaptation>>)> {
        let model = self.load_base(session)?;
        let Some(path) = self.adapter_path(session) else { return Ok((self.stored(session, model)?, None)) };
        if let Some(Loaded { model, adaptation }) = session.adaptations.borrow().get(&path) {
            return Ok((model.clone(), adaptation.clone()));
        }
        let files = AdapterFiles::read(&path)?;
        // By the pipeline's search, whose policy its file may have tightened.
        let native = |strategy: &_, name: &_| native::find_in(&session.search, strategy, name);
        let model = encode(|progress| files.store(model, &native, progress))?;
        let adaptation = Some(Arc::new(files.adapt(&model, false)?));
        session.adaptations.borrow_mut().insert(path, Loaded { model: model.clone(), adaptation: adaptation.clone() });
        Ok((model, adaptation))
    }

    /// The base of a model that was not trained, stored as its strategy will have it in training: that is what a training begins with.
    /// What is named without a strategy, or was made by one, is as its files have it.
    fn stored(&self, session: &Session, model: Arc<BaseModel>) -> Result<Arc<BaseModel>> {
        let Some(strategy) = self.strategy.as_deref().filter(|_| self.adapter.is_none() && !session.dry) else {
            return Ok(model);
        };
        if manifest(&session.locate(&self.base))?.is_some_and(|made| made.strategy.name == strategy) {
            return Ok(model);
        }
        let plugin = session.plugin(strategy)?;
        plugin.check_options(&self.options)?;
        let plan = plugin.plan(&PlanRequest { options: self.options.clone(), model: model.info() })?;
        let native = |name: &str| native::of_plugin(&plugin, name);
        encode(|progress| store_as_planned(model, &plan, false, &native, progress))
    }

    /// The name in the registry of the model that this one goes on from.
    pub fn parent(&self, session: &Session) -> Option<String> {
        let adapter = self.adapter.as_deref()?;
        if registry::is_name(adapter) {
            return Some(adapter.to_owned());
        }
        manifest(&session.locate(adapter)).ok()??.training["parent"].as_str().map(str::to_owned)
    }
}

/// What `homeroom.json` says, if it is there.
fn manifest(path: &Path) -> Result<Option<Manifest>> {
    let file = path.join(HOMEROOM_FILE);
    match std::fs::read_to_string(&file) {
        Ok(text) => Ok(Some(serde_json::from_str(&text).with_context(|| format!("{}: damaged", file.display()))?)),
        Err(_) => Ok(None),
    }
}

/// The model that training made, by name.
///
/// # Errors
/// When there is none of that name, or it was not trained.
pub fn fine_tuned(session: &Session, name: &str) -> Result<ModelSpec> {
    if let Some(saved) = session.dry_saved.borrow().get(name) {
        return Ok(saved.clone());
    }
    let path = session.locate(name);
    if !path.exists() {
        bail!("there is no model `{name}`\nhint: `homeroom list-models` shows yours");
    }
    if !is_adapter(&path) && !path.join(HOMEROOM_FILE).exists() {
        bail!("{}: it was not fine-tuned; `load_model` describes a base", path.display());
    }
    ModelSpec::named(session, name)
}
