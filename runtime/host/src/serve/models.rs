//! What a server serves: handlers by the names that clients give as `model`.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::tuned::Tuned;
use crate::handler::Handler;

/// The handlers of a server. Whoever asks it about a model that was trained for a client looks at the disk, as that may be removed there.
#[derive(Clone, Default)]
pub struct Models {
    listed: BTreeMap<String, Arc<dyn Handler>>,
    /// Other names of these. They are answered and not listed.
    aliases: BTreeMap<String, String>,
    /// Handlers of the file that no route has.
    unrouted: Vec<String>,
    /// Models that were trained here for clients, whatever the file of handlers says.
    tuned: BTreeMap<String, Trained>,
}

/// A model that was trained for a client.
#[derive(Clone)]
struct Trained {
    /// The client's key.
    key: Option<String>,
    model: Arc<Tuned>,
}

impl Models {
    /// Has a model that is served answer to another name as well, which no other model has.
    #[must_use]
    pub fn with_alias(mut self, alias: &str, name: &str) -> Self {
        if alias != name {
            self.aliases.insert(alias.to_owned(), name.to_owned());
        }
        self
    }

    /// Names handlers that are not served, for whoever asks for one.
    #[must_use]
    pub fn with_unrouted(mut self, names: Vec<String>) -> Self {
        self.unrouted = names;
        self
    }

    /// Serves a model that was trained for a client.
    pub(super) fn add_tuned(&mut self, name: &str, key: Option<String>, model: Arc<Tuned>) {
        self.tuned.insert(name.to_owned(), Trained { key, model });
    }

    /// The models that were trained for clients and are still here, and that the file of handlers has no other of.
    fn tuned(&self) -> impl Iterator<Item = (&String, &Trained)> {
        self.tuned.iter().filter(|(name, trained)| !self.listed.contains_key(*name) && trained.model.is_here())
    }

    /// Whose model it is, if it was trained for a client: of whose key, or of nobody's in particular.
    pub(super) fn trained_for(&self, name: &str) -> Option<Option<&str>> {
        let trained = self.tuned.get(name).filter(|_| !self.listed.contains_key(name))?;
        Some(trained.key.as_deref())
    }

    /// The same, with the models that were trained for clients of another.
    #[must_use]
    pub(super) fn with_tuned_of(mut self, other: &Self) -> Self {
        self.tuned.clone_from(&other.tuned);
        self
    }

    /// Returns true if there is none.
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    /// The names that are listed.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.listed.keys().chain(self.tuned().map(|(name, _)| name)).map(String::as_str)
    }

    /// The handlers, by the names that are listed.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, Arc<dyn Handler>)> {
        let listed = self.listed.iter().map(|(name, handler)| (name, handler.clone()));
        listed.chain(self.tuned().map(|(name, trained)| (name, trained.model.clone() as Arc<dyn Handler>)))
    }

    /// The name under which a model is listed.
    pub(super) fn listed<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        let name = self.aliases.get(name).map_or(name, String::as_str);
        let is_here = || self.tuned.get(name).is_some_and(|trained| trained.model.is_here());
        (self.listed.contains_key(name) || is_here()).then_some(name)
    }

    /// The handler of a name.
    pub(super) fn get(&self, name: &str) -> Option<Arc<dyn Handler>> {
        let name = self.listed(name)?;
        let tuned = || self.tuned.get(name).map(|trained| trained.model.clone() as Arc<dyn Handler>);
        self.listed.get(name).cloned().or_else(tuned)
    }

    /// Returns true if a name is that of a handler that no route has.
    pub(super) fn is_unrouted(&self, name: &str) -> bool {
        self.unrouted.iter().any(|unrouted| unrouted == name)
    }
}

impl FromIterator<(String, Arc<dyn Handler>)> for Models {
    fn from_iter<I: IntoIterator<Item = (String, Arc<dyn Handler>)>>(listed: I) -> Self {
        Self { listed: listed.into_iter().collect(), ..Self::default() }
    }
}

impl<const N: usize> From<[(String, Arc<dyn Handler>); N]> for Models {
    fn from(listed: [(String, Arc<dyn Handler>); N]) -> Self {
        listed.into_iter().collect()
    }
}
