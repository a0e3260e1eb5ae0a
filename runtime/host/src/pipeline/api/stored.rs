//! Verbs whose results are kept, and looked up where the same was made before.

use std::path::PathBuf;
use std::time::Instant;

use mlua::Lua;
use serde_json::{Value as Json, json};

use super::options::Options;
use super::spec::Verb;
use super::{Session, identity};
use crate::pipeline::errors::{Failure, here};
use crate::pipeline::store::{self, Entry, Key};

/// The inputs of a verb take longer than this to read where a base is large and its digests are not kept yet; that is said.
const TOLD_SECONDS: f64 = 2.0;

/// What a verb made.
pub struct Made {
    /// What is kept of it.
    pub result: Json,
    /// The files that belong to it.
    pub files: Vec<PathBuf>,
}

impl Made {
    /// A result without files.
    pub fn plain(result: Json) -> Self {
        Self { result, files: Vec::new() }
    }
}

/// A call whose result may be kept.
pub struct Step<'a> {
    lua: &'a Lua,
    session: &'a Session,
    verb: &'static Verb,
    options: &'a Options,
    /// What is added to what the options say.
    more: Json,
    key: Key,
    /// Whether the key does not tell what comes of it.
    is_untold: bool,
    started: Instant,
}

/// Looks up what a call makes, or has it made and keeps it. `more`: what goes into it beside its options.
///
/// # Errors
/// When its inputs cannot be read, or `make` fails.
pub fn stored(
    lua: &Lua,
    session: &Session,
    verb: &'static Verb,
    options: &Options,
    more: Json,
    make: impl FnOnce() -> Result<Made, Failure>,
) -> Result<Json, Failure> {
    let step = Step::begin(lua, session, verb, options, more)?;
    if let Some(entry) = step.look_up() {
        session.tell(format_args!("{:9} from run {}, {:.1} s", verb.name, entry.run, step.seconds()));
        return Ok(entry.result);
    }
    let made = make()?;
    let result = made.result.clone();
    step.keep(made)?;
    Ok(result)
}

impl<'a> Step<'a> {
    /// Says what goes into a call. `more`: what goes into it beside its options.
    ///
    /// # Errors
    /// When its inputs cannot be read.
    pub fn begin(
        lua: &'a Lua,
        session: &'a Session,
        verb: &'static Verb,
        options: &'a Options,
        more: Json,
    ) -> Result<Self, Failure> {
        let started = Instant::now();
        let (key, why) = key(lua, session, verb, options, &more)?;
        let seconds = started.elapsed().as_secs_f64();
        if seconds > TOLD_SECONDS {
            session.tell(format_args!("digests   of what {} takes, computed once, {seconds:.1} s", verb.name));
        }
        if let Some(why) = &why {
            session.tell(format_args!(
                "note: {}{}: a later run makes it again, from its beginning: {why}; keep values in `report.state`, or give `key`, a text \
                 that stands for the callbacks",
                here(lua),
                verb.name
            ));
        }
        Ok(Self { lua, session, verb, options, more, key, is_untold: why.is_some(), started })
    }

    /// What it is kept under; `None`: it is not kept, as its callbacks may do anything.
    pub fn key(&self) -> Option<&Key> {
        Some(&self.key).filter(|_| !self.is_untold)
    }

    /// Seconds since it began.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// What the same call made before.
    pub fn look_up(&self) -> Option<Entry> {
        self.session.store.find(self.key()?)
    }

    /// Keeps what it made, unless its callbacks changed something outside of them: who looks it up would not get that.
    ///
    /// # Errors
    /// When the script is to end.
    pub fn keep(self, made: Made) -> Result<(), Failure> {
        if self.is_untold {
            return Ok(());
        }
        if key(self.lua, self.session, self.verb, self.options, &self.more)? != (self.key.clone(), None) {
            let hint = match self.verb.name {
                "fine_tune" => {
                    "; if its callbacks change values outside of them, keep those in `report.state`, or give `key`"
                }
                _ => "",
            };
            self.session.tell(format_args!(
                "note: {}{}: what went into it has changed meanwhile, so that a later run makes it again{hint}",
                here(self.lua),
                self.verb.name
            ));
            return Ok(());
        }
        let Made { result, files } = made;
        let put = |run: PathBuf| self.session.store.put(&run, &self.key, result, &files, self.seconds());
        let kept = self.session.run_path().and_then(put);
        // Where one cannot be kept, the others cannot either.
        if let Err(error) = kept
            && !self.session.unkept.replace(true)
        {
            self.session.tell(format_args!("note: {} is not kept for later runs: {error:#}", self.verb.name));
        }
        Ok(())
    }
}

fn key(
    lua: &Lua,
    session: &Session,
    verb: &'static Verb,
    options: &Options,
    more: &Json,
) -> Result<(Key, Option<String>), Failure> {
    let (inputs, why) = identity::inputs(lua, session, verb, options)?;
    Ok((store::key(verb.name, json!({"options": inputs, "more": more})), why))
}
