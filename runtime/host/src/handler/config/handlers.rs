//! The handlers of a file, loaded when they are first asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::inference::Engine;
use homeroom_engine::models::BaseModel;

use super::disabled::Disabled;
use super::{Config, Egress, HandlerSpec};
use crate::handler::route::Route;
use crate::handler::wrap::redact::Redacting;
use crate::handler::wrap::wrapped;
use crate::handler::{Gives, Handler};
use crate::progress::line;
use crate::registry;
use crate::toml_problems::near;

/// Handlers by name, each loaded when it is first asked for.
pub struct Handlers {
    config: Config,
    loaded: Mutex<BTreeMap<String, Arc<dyn Handler>>>,
    /// Handlers that are disabled, and that was said.
    warned: Mutex<BTreeSet<String>>,
}

impl Handlers {
    /// Takes the handlers of a file; loads nothing.
    pub fn new(config: Config) -> Self {
        Self { config, loaded: Mutex::default(), warned: Mutex::default() }
    }

    /// Takes the handlers of the edited file. Those that it has not changed stay loaded.
    pub fn succeed(&self, config: Config) -> Self {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let is_same = |name: &str| {
            let (old, new) = (&self.config, &config);
            new.handlers.contains_key(name)
                && old.handlers.get(name) == new.handlers.get(name)
                && old.settings.get(name) == new.settings.get(name)
        };
        let kept =
            loaded.iter().filter(|(name, _)| is_same(name)).map(|(name, handler)| (name.clone(), handler.clone()));
        let kept = kept.collect();
        Self { config, loaded: Mutex::new(kept), warned: Mutex::default() }
    }

    /// Returns what clients can name, ready to answer: the routes or, if the file has none, each handler under its own name. Only a route
    /// can allow conversations to leave this machine, so that without one a handler that sends them away is left out, with a note.
    ///
    /// # Errors
    /// When nothing can be served, or as [`Handlers::get`]. A key that is missing is no error: its handler is disabled, with a warning.
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
        self.warn_of_keys(names.iter().map(|name| name.as_str()));
        let one = |name: &String| match handlers.get(name).and_then(HandlerSpec::disabled) {
            Some(why) if !routes.contains_key(name) => {
                Ok(Arc::new(Disabled(name.clone(), format!("`{name}` is disabled: {why}"))) as _)
            }
            _ => self.get(name),
        };
        names.into_iter().map(|name| Ok((name.clone(), one(name)?))).collect()
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
        let all = routes.values().chain(self.config.rules.values().map(|rules| &rules.context_fallback));
        let is_routed = |name: &String| routes.is_empty() || all.clone().any(|chain| chain.contains(name));
        handlers.keys().filter(|name| !is_routed(name)).cloned().collect()
    }

    /// Names of the handlers behind a route, or of the handler itself.
    fn behind(&self, name: &str) -> Vec<String> {
        let Some(chain) = self.config.routes.get(name) else { return vec![name.to_owned()] };
        let long = self.config.rules.get(name).map_or(&[][..], |rules| &rules.context_fallback);
        let mut names = chain.clone();
        names.extend(long.iter().filter(|name| !chain.contains(name)).cloned());
        names
    }

    /// Says once which handlers behind some names are disabled, as their keys are not in the environment.
    fn warn_of_keys<'n>(&self, names: impl IntoIterator<Item = &'n str>) {
        let used: BTreeSet<String> = names.into_iter().flat_map(|name| self.behind(name)).collect();
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        for name in used {
            if let Some(why) = self.config.handlers.get(&name).and_then(HandlerSpec::disabled)
                && warned.insert(name.clone())
            {
                let path = self.config.path.display();
                line(format_args!("warning: {path}: [handlers.{name}]: {why}; until then the handler is disabled"));
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
        self.behind(name)
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
    /// `egress` is not asked. A route whose handlers are all disabled refuses each request and says why.
    ///
    /// # Errors
    /// When there is no such name, a model cannot be loaded, or the key of a handler that is asked for by name is not in the environment.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Handler>> {
        let Some(chain) = self.config.routes.get(name) else { return self.handler(name) };
        self.warn_of_keys([name]);
        let rules = self.config.rules.get(name).cloned().unwrap_or_default();
        let handlers = self.enabled(chain, rules.egress)?;
        let path = self.config.path.display();
        let embeds = handlers.iter().find(|(_, handler)| handler.gives() == Gives::Vectors);
        if let Some((embeds, _)) = embeds.filter(|_| chain.len() > 1) {
            bail!(
                "{path}: [routes.{name}]: `{embeds}` is an embedding model, and vectors of two models cannot be compared; give it a route of its own"
            );
        }
        if handlers.is_empty() {
            let why = |name: &String| Some(format!("`{name}`: {}", self.config.handlers.get(name)?.disabled()?));
            let whys: Vec<String> = chain.iter().filter_map(why).collect();
            let why = format!("no handler of `{name}` is enabled: {}", whys.join("; "));
            return Ok(Arc::new(Disabled(name.to_owned(), why)));
        }
        let mut route =
            Route::new(handlers).with_context_fallback(self.enabled(&rules.context_fallback, rules.egress)?);
        if let Some(on) = rules.fallback_on {
            route = route.with_fallback_on(on);
        }
        if rules.egress == Egress::Deny {
            route = route.staying();
        }
        rules.settings.around_route(name, Arc::new(route)).with_context(|| format!("{path}: [routes.{name}]"))
    }

    /// Those of some handlers that are enabled, as a route asks them.
    fn enabled(&self, names: &[String], egress: Egress) -> Result<Vec<(String, Arc<dyn Handler>)>> {
        let is_enabled = |name: &&String| self.config.handlers.get(*name).is_none_or(|spec| spec.disabled().is_none());
        let handlers = names.iter().filter(is_enabled).map(|name| {
            let mut handler = self.handler(name)?;
            let is_far = self.config.handlers.get(name).is_some_and(|spec| spec.far_host().is_some());
            if is_far && egress == Egress::Redact {
                handler = wrapped(handler, Redacting);
            }
            Ok((name.clone(), handler))
        });
        handlers.collect()
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
        let settings = self.config.settings.get(name).cloned().unwrap_or_default();
        let handler = spec.load(name, &settings).with_context(|| format!("{path}: [handlers.{name}]"))?;
        loaded.insert(name.to_owned(), handler.clone());
        Ok(handler)
    }
}
