//! The handlers of a file, loaded when they are first asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::inference::Engine;
use homeroom_engine::models::BaseModel;

use super::{Config, HandlerSpec};
use crate::handler::route::Route;
use crate::handler::{Gives, Handler};
use crate::registry;
use crate::toml_problems::near;

/// Handlers by name, each loaded when it is first asked for.
pub struct Handlers {
    config: Config,
    loaded: Mutex<BTreeMap<String, Arc<dyn Handler>>>,
}

impl Handlers {
    /// Takes the handlers of a file; loads nothing.
    pub fn new(config: Config) -> Self {
        Self { config, loaded: Mutex::default() }
    }

    /// Takes the handlers of the edited file. Those that it has not changed stay loaded.
    pub fn succeed(&self, config: Config) -> Self {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let same =
            |name: &str| config.handlers.get(name).is_some_and(|spec| self.config.handlers.get(name) == Some(spec));
        let kept = loaded.iter().filter(|(name, _)| same(name)).map(|(name, handler)| (name.clone(), handler.clone()));
        let kept = kept.collect();
        Self { config, loaded: Mutex::new(kept) }
    }

    /// Returns what clients can name, ready to answer: the routes or, if the file has none, each handler under its own name. Only a route
    /// can allow conversations to leave this machine, so that without one a handler that sends them away is left out, with a note.
    ///
    /// # Errors
    /// When nothing can be served, or as [`Handlers::get`]. All missing keys are reported at once, before a model is loaded.
    pub fn served(&self) -> Result<BTreeMap<String, Arc<dyn Handler>>> {
        let Config { path, handlers, routes, .. } = &self.config;
        let path = path.display();
        let mut names: Vec<&String> = routes.keys().collect();
        if routes.is_empty() {
            ensure!(
                !handlers.is_empty(),
                "{path}: it has no handler\nhint: add [handlers.NAME] with kind = \"local\" and model = \"…\""
            );
            let tell = |(name, spec): (&String, &HandlerSpec)| {
                Some(format!("`{name}` sends conversations to {}, and no route allows that", spec.far_host()?))
            };
            let far: Vec<String> = handlers.iter().filter_map(tell).collect();
            names = handlers.iter().filter(|(_, spec)| spec.far_host().is_none()).map(|(name, _)| name).collect();
            let hint = "add [routes.NAME] with handlers = [\"…\"] and egress = \"allow\"";
            ensure!(!names.is_empty(), "{path}: {}\nhint: {hint}", far.join("; "));
            eprintln!("note: {path}: it has no route, so each handler is served under its own name");
            for denied in far {
                eprintln!("note: {path}: {denied}, so it is not served; {hint}");
            }
        }
        self.check_keys(&names)?;
        names.into_iter().map(|name| Ok((name.clone(), self.get(name)?))).collect()
    }

    /// Bases that several handlers share, of those that are loaded, and the names of these.
    pub fn shared(&self) -> Vec<(Arc<BaseModel>, Vec<String>)> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bases: Vec<(Arc<Engine>, Vec<String>)> = Vec::new();
        for (name, handler) in loaded.iter() {
            let Some(engine) = handler.engine() else { continue };
            match bases.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &engine)) {
                Some((_, names)) => names.push(name.clone()),
                None => bases.push((engine, vec![name.clone()])),
            }
        }
        let shared = bases.into_iter().filter(|(_, names)| names.len() > 1);
        shared.map(|(engine, names)| (engine.model().clone(), names)).collect()
    }

    /// Handlers in no route of a file that has routes: clients cannot name them.
    pub fn unrouted(&self) -> Vec<String> {
        let Config { handlers, routes, .. } = &self.config;
        let is_routed = |name: &String| routes.is_empty() || routes.values().any(|chain| chain.contains(name));
        handlers.keys().filter(|name| !is_routed(name)).cloned().collect()
    }

    /// Checks that all handlers behind some names have their keys.
    fn check_keys(&self, names: &[&String]) -> Result<()> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let behind = |name: &&String| self.config.routes.get(*name).cloned().unwrap_or_else(|| vec![(*name).clone()]);
        let used: BTreeSet<String> = names.iter().flat_map(behind).filter(|name| !loaded.contains_key(name)).collect();
        let key = |name: &String| self.config.handlers.get(name)?.api_key().err();
        let missing: Vec<(String, String)> = used.into_iter().filter_map(|name| Some((key(&name)?, name))).collect();
        let path = self.config.path.display();
        match missing.as_slice() {
            [] => Ok(()),
            [(why, name)] => bail!("{path}: [handlers.{name}]: {why}"),
            many => {
                let lines: Vec<String> =
                    many.iter().map(|(why, name)| format!("\n  [handlers.{name}]: {why}")).collect();
                bail!("{path}: {} keys are missing{}", many.len(), lines.concat())
            }
        }
    }

    /// The file.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns the host that a handler sends conversations to, if it is not this machine. Of a route there is none: the file allows
    /// where it leads.
    pub fn far_host(&self, name: &str) -> Option<&str> {
        self.config.handlers.get(name).filter(|_| !self.config.routes.contains_key(name))?.far_host()
    }

    /// What a route or a handler consists of, in order: names and descriptions.
    pub fn chain(&self, name: &str) -> Vec<(&str, &HandlerSpec)> {
        let own = [name.to_owned()];
        let names = self.config.routes.get(name).map_or(&own[..], Vec::as_slice);
        names
            .iter()
            .filter_map(|name| self.config.handlers.get_key_value(name))
            .map(|(name, spec)| (&**name, spec))
            .collect()
    }

    /// Names of routes and handlers.
    pub fn names(&self) -> Vec<&str> {
        self.config.routes.keys().chain(self.config.handlers.keys()).map(String::as_str).collect()
    }

    /// Returns a route or a handler, ready to answer. Whoever asks for a handler by name chooses where conversations go, so that
    /// `egress` is not asked.
    ///
    /// # Errors
    /// When there is no such name, a model cannot be loaded, or a key is not in the environment.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Handler>> {
        let Some(chain) = self.config.routes.get(name) else { return self.handler(name) };
        let handlers = chain.iter().map(|name| Ok((name.clone(), self.handler(name)?)));
        let handlers: Vec<(String, Arc<dyn Handler>)> = handlers.collect::<Result<_>>()?;
        let embeds = handlers.iter().find(|(_, handler)| handler.gives() == Gives::Vectors);
        if let Some((embeds, _)) = embeds.filter(|_| handlers.len() > 1) {
            let path = self.config.path.display();
            bail!(
                "{path}: [routes.{name}]: `{embeds}` is an embedding model, and vectors of two models cannot be compared; give it a route of its own"
            );
        }
        Ok(Arc::new(Route::new(handlers)))
    }

    fn handler(&self, name: &str) -> Result<Arc<dyn Handler>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handler) = loaded.get(name) {
            return Ok(handler.clone());
        }
        let path = self.config.path.display();
        let Some(spec) = self.config.handlers.get(name) else {
            let model = registry::is_name(name) && registry::place(name).is_ok_and(|place| place.exists());
            let hint =
                if model { format!("\nhint: `--model-dir {name}` is the model of that name") } else { String::new() };
            bail!("{path}: there is no handler or route `{name}`, {}{hint}", near(name, &self.names()));
        };
        let handler = spec.load(name).with_context(|| format!("{path}: [handlers.{name}]"))?;
        loaded.insert(name.to_owned(), handler.clone());
        Ok(handler)
    }
}
