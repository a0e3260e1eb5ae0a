//! A model of this machine.

mod answer;
mod asked;
mod calls;
mod formats;
mod grammar;
mod tools;

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Duration;

use anyhow::Result;
use homeroom_engine::inference::Engine;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;

use self::grammar::Grammars;
use super::context::PATIENCE;
use super::{Backend, Context, EventStream, Handler, HandlerError, Request};
use crate::models::{Answerer, Files, ModelRef, Network};
use crate::progress::line;

/// Freedom of the draw where a request does not say: small models lose the thread at OpenAI's 1.
pub const DEFAULT_TEMPERATURE: f64 = 0.7;
/// Share of the probability that is drawn from where neither it nor the temperature is said, as in llama.cpp's family: small models
/// stray in what is left.
const DEFAULT_TOP_P: f64 = 0.9;

/// Longest answer where a request does not say, in tokens: a model that does not find an end would go on to that of its context.
pub const DEFAULT_MAX_TOKENS: usize = 1024;

/// Conversations and other texts of more bytes are made tokens of one at a time, as each byte takes some 200 of memory meanwhile.
pub(super) const LONG_BYTES: usize = 16 << 10;

/// The turn of those.
pub(super) static LONG: Mutex<()> = Mutex::new(());

/// Neither a request nor a file that changes has a server download anything.
pub(super) const OFFLINE: Network = Network::Never("neither `serve` nor a file of handlers downloads anything");

/// Waits for a lock as long as somebody wants the answer.
pub(super) fn turn<'a, T>(lock: &'a Mutex<T>, context: &Context) -> Result<MutexGuard<'a, T>, HandlerError> {
    loop {
        match lock.try_lock() {
            Ok(turn) => return Ok(turn),
            Err(TryLockError::Poisoned(turn)) => return Ok(turn.into_inner()),
            Err(TryLockError::WouldBlock) => context.check()?,
        }
        std::thread::sleep(PATIENCE);
    }
}

/// A model of this machine: a base, perhaps with an adapter.
pub struct Local {
    name: String,
    /// What is loaded anew once its files are others, and what that computes in.
    reference: Option<(ModelRef, Compute)>,
    now: Mutex<Generation>,
}

/// The model that answers, and the files that it was read from.
#[derive(Clone)]
struct Generation {
    answerer: Answerer,
    /// The forms that its answers can be held to, made when one first is.
    grammars: Arc<OnceLock<Result<Grammars, String>>>,
    /// What tells its weights and its text from others.
    fingerprint: Arc<OnceLock<String>>,
    /// `None`: they are not looked at.
    files: Option<Files>,
}

impl Generation {
    fn of(answerer: Answerer, files: Option<Files>) -> Self {
        Self { answerer, grammars: Arc::default(), fingerprint: Arc::default(), files }
    }

    /// Has the fingerprint taken, which reads all files unless their digests are kept. Large models answer without it until it is there.
    fn take_fingerprint(&self, reference: &ModelRef) {
        let (reference, fingerprint) = (reference.clone(), self.fingerprint.clone());
        let (sender, taken) = channel::<()>();
        let take = move || {
            let _sender = sender;
            if let Ok(digest) = reference.digest() {
                let _ = fingerprint.set(format!("fp_{}", &digest[..FINGERPRINT_DIGITS]));
            }
        };
        // Without a thread, answers go without.
        if std::thread::Builder::new().name("digests".to_owned()).spawn(take).is_ok() {
            let _ = taken.recv_timeout(FINGERPRINT_PATIENCE);
        }
    }

    fn model(&self) -> &Arc<BaseModel> {
        self.answerer.model()
    }

    /// The forms of its tokenizer.
    fn grammars(&self) -> Result<&Grammars, HandlerError> {
        let made = self.grammars.get_or_init(|| Grammars::of(self.model()).map_err(|error| format!("{error:#}")));
        made.as_ref().map_err(|error| grammar::no_forms(error))
    }
}

/// Digits of a fingerprint, as many as OpenAI's have.
const FINGERPRINT_DIGITS: usize = 10;
/// Longest wait for a fingerprint while a model is loaded.
const FINGERPRINT_PATIENCE: Duration = Duration::from_secs(1);

impl Local {
    /// Answers with a model under a name.
    pub fn new(name: impl Into<String>, answerer: Answerer) -> Self {
        let now = Generation::of(answerer, None);
        Self { name: name.into(), reference: None, now: Mutex::new(now) }
    }

    /// Loads a model to answer with under a name. When another is put in its place, as by training it again, the next request is
    /// answered by that.
    ///
    /// # Errors
    /// As [`Answerer::load`].
    pub fn load(name: impl Into<String>, reference: ModelRef, compute: Compute) -> Result<Self> {
        // Before they are read: what changes in between is a change.
        let files = Some(Files::named(&reference));
        let now = Generation::of(Answerer::load(&reference, OFFLINE, compute)?, files);
        now.take_fingerprint(&reference);
        Ok(Self { name: name.into(), reference: Some((reference, compute)), now: Mutex::new(now) })
    }

    /// The model as its files are now; if they cannot be loaded, which is said once, the older one.
    fn generation(&self, context: &Context) -> Result<Generation, HandlerError> {
        let mut now = turn(&self.now, context)?;
        if let Some((reference, compute)) = &self.reference {
            let files = Some(Files::named(reference));
            if files != now.files {
                now.files = files;
                match Answerer::load(reference, OFFLINE, *compute) {
                    Ok(answerer) => {
                        *now = Generation::of(answerer, now.files.take());
                        now.take_fingerprint(reference);
                        line(format_args!(
                            "note: {}: its files have changed; the new ones answer from now on",
                            self.name
                        ));
                    }
                    Err(error) => line(format_args!(
                        "warning: {}: its files have changed and cannot be loaded, so the older ones go on answering: {error:#}",
                        self.name
                    )),
                }
            }
        }
        Ok(now.clone())
    }
}

impl Handler for Local {
    fn engine(&self) -> Option<Arc<Engine>> {
        Some(self.now.lock().unwrap_or_else(PoisonError::into_inner).answerer.engine.clone())
    }

    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        request.check_for(Backend::Local)?;
        let generation = self.generation(context)?;
        let asked = asked::asked(&generation, request, context)?;
        Ok(Box::new(answer::Answer::begin(&self.name, generation, asked, context)?))
    }
}
