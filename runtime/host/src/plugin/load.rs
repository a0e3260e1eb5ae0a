//! Loads a strategy and calls it: the one place where foreign code enters the process.
//!
//! Loading is trusting: a plugin has all the rights of this program, and what is checked here stops accidents. A library is
//! never unloaded: threads and thread-local values may keep pointing into it.

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_abi::describe::{Description, PluginError, option_problems};
use homeroom_abi::plan::{Plan, PlanRequest};
use homeroom_abi::step::{StepAnswer, StepRequest};
use homeroom_abi::table::{
    self, ABI_MAJOR, ABI_MINOR, Bytes, Descriptor, EMIT_ERROR, EMIT_RESULT, ENTRY, Entry, MAGIC, OK, UNKNOWN_METHOD,
};
use homeroom_engine::adapter::StrategyRecord;
use homeroom_engine::weight::NativeCodec;
use serde_json::{Map, Value};

use super::pages::Pages;
use super::stage::{PluginFile, Staged};

/// A loaded strategy. Its code stays mapped until the process ends.
#[derive(Clone)]
pub struct Plugin {
    /// The file it was read from.
    pub path: PathBuf,
    /// SHA-256 of that file, in hexadecimal digits.
    pub sha256: String,
    /// What it says of itself.
    pub description: Description,
    /// Its native codec, if it has one.
    pub codec: Option<Arc<dyn NativeCodec>>,
    descriptor: &'static Descriptor,
    pages: Pages,
}

impl Plugin {
    /// Reads a file and loads it, whoever trusts it: the caller has asked.
    ///
    /// # Errors
    /// As [`PluginFile::read`] and [`PluginFile::load`].
    pub fn load(path: &Path) -> Result<Self> {
        PluginFile::read(path)?.load()
    }

    /// Loads a file that was read and checked.
    pub(super) fn open(staged: &Staged) -> Result<Self> {
        let entry = open_copy(&staged.copy)?;
        // SAFETY: the library exports this ABI's entry, whose contract is to return a pointer to static data or null.
        let descriptor = unsafe { entry() };
        let descriptor = check_descriptor(descriptor)?;
        let mut plugin = Self {
            path: staged.source.clone(),
            sha256: staged.sha256.clone(),
            description: Description {
                name: String::new(),
                version: String::new(),
                doc: String::new(),
                options: vec![],
            },
            codec: super::native::codec(descriptor)?,
            descriptor,
            pages: Pages::around((&raw const *descriptor).cast()),
        };
        plugin.description = plugin.call(table::METHOD_DESCRIBE, b"{}")?;
        Ok(plugin)
    }

    /// Checks options against the strategy's own declaration, before anything large is loaded.
    ///
    /// # Errors
    /// All unknown names and wrong types together, each with the nearest known name or the wanted type.
    pub fn check_options(&self, given: &Map<String, Value>) -> Result<()> {
        let problems = option_problems(&self.description.options, given);
        ensure!(problems.is_empty(), "strategy `{}`: {}", self.description.name, problems.join("; "));
        Ok(())
    }

    /// The strategy's plan for a model.
    ///
    /// # Errors
    /// What the strategy answers, with the author's file and line.
    pub fn plan(&self, request: &PlanRequest) -> Result<Plan> {
        let input = serde_json::to_vec(request)?;
        let plan = self.call(table::METHOD_PLAN, &input);
        // Of what is left to call, `on_step` and a codec, little is code.
        self.pages.release();
        plan.with_context(|| format!("strategy `{}`", self.description.name))
    }

    /// What the strategy has a run do after a step; `None`: it wants to hear of no step. Blocks for as long as it likes.
    ///
    /// # Errors
    /// What the strategy answers, with the author's file and line.
    pub fn on_step(&self, request: &StepRequest) -> Result<Option<StepAnswer>> {
        // Before ABI 1.1 there was no such method.
        if self.descriptor.abi_minor < 1 {
            return Ok(None);
        }
        let input = serde_json::to_vec(request)?;
        match self.ask(table::METHOD_ON_STEP, &input)? {
            Some(answer) => {
                serde_json::from_slice(&answer).map(Some).context("its directives are not known to this host")
            }
            None => Ok(None),
        }
    }

    /// What an adapter records of its strategy.
    pub fn record(&self) -> StrategyRecord {
        let Description { name, version, .. } = self.description.clone();
        StrategyRecord { name, version, sha256: self.sha256.clone() }
    }

    fn call<T: serde::de::DeserializeOwned>(&self, method: u32, input: &[u8]) -> Result<T> {
        let json = self.ask(method, input)?.context("it does not know what every strategy has to")?;
        serde_json::from_slice(&json).context("its result cannot be read by this host")
    }

    /// The result of a method; `None`: the plugin does not have it.
    fn ask(&self, method: u32, input: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut records: Vec<(u32, Vec<u8>)> = Vec::new();
        let ctx = (&raw mut records).cast::<c_void>();
        // SAFETY: `input` outlives the call; `receive` belongs to `ctx`, which points at `records`, and is called during the
        // call only, from this thread. The SDK turns panics into errors, and builds that abort were refused.
        let code = unsafe { (self.descriptor.call)(method, Bytes::of(input), receive, ctx) };
        let record = |kind| records.iter().find(|(emitted, _)| *emitted == kind).map(|(_, bytes)| bytes.as_slice());
        if code == OK {
            return Ok(Some(record(EMIT_RESULT).context("it succeeded without a result")?.to_vec()));
        }
        if code == UNKNOWN_METHOD {
            return Ok(None);
        }
        let error = record(EMIT_ERROR).and_then(|json| serde_json::from_slice::<PluginError>(json).ok());
        match error {
            Some(PluginError { message, at: Some(at) }) => bail!("{message} ({at})"),
            Some(PluginError { message, at: None }) => bail!("{message}"),
            None => bail!("it failed with code {code} and said nothing"),
        }
    }
}

/// Copies a record that a plugin emits.
unsafe extern "C" fn receive(ctx: *mut c_void, kind: u32, record: Bytes) {
    // SAFETY: `call` passed a pointer to its `records` as `ctx`, and waits for this to return; `record` is readable now.
    let (records, bytes) = unsafe { (&mut *ctx.cast::<Vec<(u32, Vec<u8>)>>(), record.as_slice()) };
    records.push((kind, bytes.to_vec()));
}

/// Whether a library's bytes hold the entry's name. Asked first, since loading a library runs its constructors.
pub fn names_entry(bytes: &[u8]) -> bool {
    let name = ENTRY.as_bytes();
    bytes.windows(name.len()).any(|window| window == name)
}

/// Loads a private copy.
fn open_copy(copy: &Path) -> Result<Entry> {
    let library = open(copy).context("cannot load")?;
    // SAFETY: the name is this ABI's, which fixes the type; the library is never unloaded, so the pointer stays good.
    let entry = unsafe { library.get::<Entry>(ENTRY.as_bytes()) };
    let entry = *entry.map_err(|_| anyhow!("not a strategy: it does not export `{ENTRY}`"))?;
    std::mem::forget(library);
    Ok(entry)
}

/// Resolves everything now, so that a missing symbol is an error here and not an exit later; and keeps symbols to itself.
#[cfg(unix)]
fn open(path: &Path) -> Result<libloading::Library, libloading::Error> {
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
    // SAFETY: this runs the library's constructors, which is what loading a plugin means; see the top of this file.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map(Into::into)
}

#[cfg(not(unix))]
fn open(path: &Path) -> Result<libloading::Library, libloading::Error> {
    // SAFETY: this runs the library's start-up code, which is what loading a plugin means; see the top of this file.
    unsafe { libloading::Library::new(path) }
}

/// Reads a descriptor in the order that the ABI asks for.
fn check_descriptor(descriptor: *const Descriptor) -> Result<&'static Descriptor> {
    ensure!(!descriptor.is_null() && descriptor.is_aligned(), "its entry returned no descriptor");
    // SAFETY: the entry's contract is static data that begins with the magic and the size; nothing else is read before both
    // are known to be right.
    let (magic, size) =
        unsafe { ((&raw const (*descriptor).magic).read(), (&raw const (*descriptor).struct_size).read()) };
    ensure!(magic == MAGIC, "not a strategy of this ABI: its descriptor begins otherwise");
    let known = size_of::<Descriptor>();
    ensure!(
        size as usize >= known,
        "its descriptor has {size} bytes, this host reads {known}; rebuild it with this SDK"
    );
    // SAFETY: at least as many bytes as this type has are there, and they are static.
    let descriptor = unsafe { &*descriptor };
    let (major, minor) = (descriptor.abi_major, descriptor.abi_minor);
    ensure!(
        major == ABI_MAJOR && (0..=ABI_MINOR).contains(&minor),
        "built for ABI {major}.{minor}, this host has {ABI_MAJOR}.{ABI_MINOR}; rebuild it with this SDK"
    );
    ensure!(
        descriptor.panic_unwind == 1,
        "built with panic=abort, so that a panic would end the run; build it with unwinding"
    );
    Ok(descriptor)
}
