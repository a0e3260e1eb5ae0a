//! Models as scripts hold them: plain tables that say which base, which strategy and which adapter.
//!
//! A script can write such a table itself. It gains nothing by that: what a table names is looked up as a name is, by
//! [`Session::locate`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::plan::PlanRequest;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::{AdapterFiles, HOMEROOM_FILE, Manifest, is_adapter};
use homeroom_engine::adapt::requantize::store_as_planned;
use homeroom_engine::files::read_text;
use homeroom_engine::models::BaseModel;
use mlua::{Lua, Table, Value};
use serde_json::{Map, Value as Json};

use super::Session;
use super::options::strategy_options;
use super::value::to_lua;
use crate::job::encode;
use crate::models::{Loaded, Located, Network, adapt, base_of, hub_name_of, load_base, not_there, with_text};
use crate::pipeline::errors::{Failure, said, short};
use crate::pipeline::places::Place;
use crate::plugin::native;
use crate::registry;

/// Longest text of a model's table: no path and no name is longer.
const NAME_BYTES_MAX: usize = 4096;
/// Longest `homeroom.json`.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// It is the user who says what is downloaded: a script that has read rows could write them into a name, and the hub would be asked for
/// that.
pub(super) const NOT_NAMED: &str = "what a script says is not downloaded, as a name could carry rows that it has read; what a parameter of type `model` names is";

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
                let text = |key: &str| match table.raw_get::<Value>(key)? {
                    Value::Nil => Ok(None),
                    Value::String(text) if text.as_bytes().len() <= NAME_BYTES_MAX => Ok(Some(text.to_string_lossy())),
                    _ => Err(wrong()),
                };
                let base = text("model")?.ok_or_else(wrong)?;
                let options = match table.raw_get::<Value>("options")? {
                    Value::Table(options) => strategy_options(session.clock(), &options)?,
                    _ => Map::new(),
                };
                let spec = Self { base, strategy: text("strategy")?, options, adapter: text("adapter")? };
                // Whether it may be read is known now, not when it is.
                session.locate(&spec.base)?;
                spec.adapter.as_deref().map(|adapter| session.locate(adapter)).transpose()?;
                Ok(spec)
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
        let base = |strategy, options| Self { base: name.to_owned(), strategy, options, adapter: None };
        let Some(place) = session.locate(name)? else { return Ok(base(None, Map::new())) };
        let path = &place.path;
        let manifest = manifest(path)?;
        let strategy = manifest.as_ref().map(|manifest| manifest.strategy.name.clone());
        let options = manifest.as_ref().and_then(|manifest| manifest.training["options"].as_object().cloned());
        let options = options.unwrap_or_default();
        if !is_adapter(path) {
            return Ok(base(strategy, options));
        }
        let files = AdapterFiles::read(path)?;
        let text = match place.is_trusted() {
            true => trusted_base(session, &files)?,
            false => foreign_base(session, &files).with_context(|| format!("{}: its base", path.display()))?,
        };
        Ok(Self { base: text, strategy, options, adapter: Some(name.to_owned()) })
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
    ///
    /// # Errors
    /// When the script may not read there.
    pub fn adapter_path(&self, session: &Session) -> Result<Option<PathBuf>> {
        let Some(adapter) = self.adapter.as_deref().filter(|adapter| !session.imagines(adapter)) else {
            return Ok(None);
        };
        Ok(session.locate(adapter)?.map(|place| place.path).filter(|path| is_adapter(path)))
    }

    /// Loads the base, or the whole model that training made.
    ///
    /// # Errors
    /// When it is not there or cannot be run, or the script may not read there.
    pub fn load_base(&self, session: &Session) -> Result<Arc<BaseModel>> {
        let name = match &self.adapter {
            Some(adapter) if !session.imagines(adapter) && self.adapter_path(session)?.is_none() => adapter,
            _ => &self.base,
        };
        let Some(path) = session.locate(name)?.map(|place| place.path) else {
            if Some(name) == self.adapter.as_ref() {
                bail!("there is no trained model `{}`; `homeroom list-models` shows yours", short(name));
            }
            // What is not there may be a name that means something elsewhere, so it is told as it was given; where the user is
            // means nothing to a script.
            ensure!(!Path::new(name).exists(), "{}: no such model: a path is relative to the script", short(name));
            bail!(not_there(Path::new(name), NOT_NAMED));
        };
        if let Some(known) = session.bases.borrow().get(&path) {
            return Ok(known.clone());
        }
        let model = Arc::new(load_base(&Located::at(path.clone())?)?);
        session.bases.borrow_mut().insert(path, model.clone());
        Ok(model)
    }

    /// Loads the base and the adapter on it.
    ///
    /// # Errors
    /// When a file is missing or damaged, or they do not belong together.
    pub fn load(&self, session: &Session) -> Result<(Arc<BaseModel>, Option<Arc<Adaptation>>)> {
        let model = self.load_base(session)?;
        let Some(path) = self.adapter_path(session)? else { return Ok((self.stored(session, model)?, None)) };
        if let Some(Loaded { model, adaptation }) = session.adaptations.borrow().get(&path) {
            return Ok((model.clone(), adaptation.clone()));
        }
        let files = AdapterFiles::read(&path)?;
        let model = with_text(&path, model)?;
        // By the pipeline's search, whose policy its file may have tightened.
        let native = |strategy: &_, name: &_| native::find_in(&session.search, strategy, name);
        let model = encode(|kept, progress| files.store(model, &native, kept, progress))?;
        let adaptation = Some(Arc::new(adapt(files, &model, false)?));
        session.adaptations.borrow_mut().insert(path, Loaded { model: model.clone(), adaptation: adaptation.clone() });
        Ok((model, adaptation))
    }

    /// The base of a model that was not trained, stored as its strategy will have it in training: that is what a training begins with.
    /// What is named without a strategy, or was made by one, is as its files have it.
    fn stored(&self, session: &Session, model: Arc<BaseModel>) -> Result<Arc<BaseModel>> {
        let Some(strategy) = self.strategy.as_deref().filter(|_| self.adapter.is_none() && !session.dry) else {
            return Ok(model);
        };
        let made = session.locate(&self.base)?.map(|place| manifest(&place.path)).transpose()?.flatten();
        if made.is_some_and(|made| made.strategy.name == strategy) {
            return Ok(model);
        }
        let plugin = session.plugin(strategy)?;
        plugin.check_options(&self.options)?;
        let plan = plugin.plan(&PlanRequest { options: self.options.clone(), model: model.info() })?;
        let native = |name: &str| native::of_plugin(&plugin, name);
        encode(|kept, progress| store_as_planned(model, &plan, false, &native, kept, progress))
    }

    /// The name in the registry of the model that this one goes on from.
    pub fn parent(&self, session: &Session) -> Option<String> {
        let adapter = self.adapter.as_deref()?;
        if registry::is_name(adapter) {
            return Some(adapter.to_owned());
        }
        manifest(&session.locate(adapter).ok()??.path).ok()??.training["parent"].as_str().map(str::to_owned)
    }
}

/// What to name the base of one of the user's adapters by, which the script may read wherever it is.
fn trusted_base(session: &Session, files: &AdapterFiles) -> Result<String> {
    if let Ok(base) = base_of(files, Network::Never(NOT_NAMED)) {
        if base.source.is_none() {
            session.known_bases.borrow_mut().insert(base.path.clone());
        }
        return Ok(base.name());
    }
    // Who needs the base says that it is not there; to copy an adapter, say, nobody does.
    let [by_name, by_path] = base_names(files);
    let name = by_name.or(by_path);
    name.with_context(|| format!("{}: it does not say which base it has", files.path.display()))
}

/// What to name the base of an adapter by that comes with the script or from the hub, as does what it says of its base.
fn foreign_base(session: &Session, files: &AdapterFiles) -> Result<String> {
    let [by_name, by_path] = base_names(files);
    // As `base_of` does it.
    let names = if files.manifest.is_some() { [by_name, by_path] } else { [by_path, by_name] };
    let mut refused = None;
    for name in names.iter().flatten() {
        match session.locate(name) {
            Ok(Some(_)) => return Ok(name.clone()),
            Ok(None) => {}
            Err(outside) => refused = Some(outside),
        }
    }
    match (names, refused) {
        (_, Some(outside)) => Err(outside),
        ([Some(name), _] | [None, Some(name)], None) => Ok(name),
        ([None, None], None) => bail!("it does not say which it is"),
    }
}

/// The name on the hub of an adapter's base, and its path.
fn base_names(files: &AdapterFiles) -> [Option<String>; 2] {
    let base = files.base();
    [hub_name_of(&base).map(|name| name.to_string()), base.path.map(|path| path.display().to_string())]
}

/// What `homeroom.json` says, if it is there.
///
/// # Errors
/// When it is damaged.
pub fn manifest(path: &Path) -> Result<Option<Manifest>> {
    let file = path.join(HOMEROOM_FILE);
    match read_text(&file, MANIFEST_BYTES_MAX) {
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
    let Some(Place { path, .. }) = session.locate(name)? else {
        bail!("there is no model `{}`\nhint: `homeroom list-models` shows yours", short(name));
    };
    if !is_adapter(&path) && !path.join(HOMEROOM_FILE).exists() {
        bail!("{}: it was not fine-tuned; `load_model` describes a base", path.display());
    }
    ModelSpec::named(session, name)
}
