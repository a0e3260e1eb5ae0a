//! A model that was trained here for a client, as a handler: it is loaded when it is first asked, and again after it was not asked for
//! long. One that is removed from the disk is none any more.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, TryLockError, Weak};

use anyhow::Result;
use homeroom_engine::inference::Engine;
use homeroom_engine::run::compute::Compute;

use crate::handler::config::load_local;
use crate::handler::{Context, EventStream, Handler, HandlerError, Kind, Request};
use crate::models::ModelRef;
use crate::progress::line;
use crate::registry;

/// So many are in memory at once; the one that was not asked for longest makes room.
const LOADED_MAX: usize = 8;

type Loaded = Mutex<Option<Arc<dyn Handler>>>;

/// Those that are loaded, the one that was asked last behind the others.
static LOADED: Mutex<VecDeque<Weak<Loaded>>> = Mutex::new(VecDeque::new());

/// A model of the registry that is loaded when it is asked.
pub struct Tuned {
    name: String,
    /// Its directory; `None`: that of the model of this name.
    place: Option<PathBuf>,
    loaded: Arc<Loaded>,
}

impl Tuned {
    /// The model of this name; nothing is loaded.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), place: None, loaded: Arc::default() }
    }

    /// The model in a directory, under a name.
    pub fn at(name: &str, place: PathBuf) -> Self {
        Self { place: Some(place), ..Self::new(name) }
    }

    /// Where it is.
    fn place(&self) -> Result<PathBuf> {
        self.place.clone().map_or_else(|| registry::place(&self.name), Ok)
    }

    /// Returns true if it is on the disk: whoever runs the server may remove it, and then it answers no more.
    pub fn is_here(&self) -> bool {
        self.place().is_ok_and(|place| place.is_dir())
    }

    /// What a client is told of a model that cannot be loaded; whoever runs the server is told where and why.
    fn failed(&self, error: &anyhow::Error) -> HandlerError {
        if !self.is_here() {
            return HandlerError::new(Kind::Unavailable, format!("`{}` was removed just now", self.name));
        }
        line(format_args!("warning: {}: it cannot be loaded: {error:#}", self.name));
        let message = "the model cannot be loaded; whoever runs the server finds the reason in its messages";
        HandlerError::new(Kind::Internal, message)
    }

    fn handler(&self) -> Result<Arc<dyn Handler>, HandlerError> {
        // Whoever comes second waits for the same loading.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let handler = match &*loaded {
            Some(handler) => handler.clone(),
            None => {
                let load = |name| load_local(&self.name, ModelRef { name, ..ModelRef::default() }, Compute::Auto);
                let handler = self.place().and_then(load).map_err(|error| self.failed(&error))?;
                loaded.insert(handler).clone()
            }
        };
        drop(loaded);
        self.touch();
        Ok(handler)
    }

    /// Notes that it was asked, and has the one forgotten that was not for longest.
    fn touch(&self) {
        let forgotten = {
            let mut all = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
            let is_this = |other: &Weak<Loaded>| other.ptr_eq(&Arc::downgrade(&self.loaded));
            all.retain(|other| !is_this(other) && other.strong_count() > 0);
            all.push_back(Arc::downgrade(&self.loaded));
            if all.len() > LOADED_MAX { all.pop_front() } else { None }
        };
        if let Some(other) = forgotten.and_then(|other| other.upgrade()) {
            // Answers under way keep it until they are complete.
            *other.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

impl Handler for Tuned {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        self.handler()?.stream(request, context)
    }

    fn engine(&self) -> Option<Arc<Engine>> {
        // While it is loaded, whoever lists models does not wait for it.
        let loaded = match self.loaded.try_lock() {
            Ok(loaded) => loaded,
            Err(TryLockError::Poisoned(loaded)) => loaded.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        loaded.as_ref().and_then(|handler| handler.engine())
    }
}
