//! Loads a strategy and calls it: the one place where foreign code enters the process.
//!
//! Loading is trusting: a plugin has all the rights of this program, and what is checked here stops accidents. In the program a
//! child process loads it first and plans in this one's place, see [`super::probe`]; what is left for this process is the
//! strategy's `on_step` and its codec. A library is never unloaded: threads and thread-local values may keep pointing into it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use homeroom_abi::describe::{Description, option_problems};
use homeroom_abi::limits::{
    ANSWER_BYTES_MAX, DESCRIPTION_BYTES_MAX, PLAN_BYTES_MAX, check_answer, check_description, check_plan,
};
use homeroom_abi::plan::{Plan, PlanRequest};
use homeroom_abi::step::{StepAnswer, StepRequest};
use homeroom_abi::table::{self, ABI_MAJOR, ABI_MINOR, Call, Descriptor, ENTRY, Entry, MAGIC};
use homeroom_engine::adapt::adapter::StrategyRecord;
use homeroom_engine::models::weight::NativeCodec;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::probe::{self, Probe};
use super::stage::{PluginFile, Staged};
use super::{call, demand, foreign, text};

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
    library: Library,
    /// What plans in this process's place; `None`: this process plans.
    probe: Option<Probe>,
}

impl Plugin {
    /// Reads a file and loads it in this process, whoever trusts it and whatever it does: the caller has asked.
    ///
    /// # Errors
    /// As [`PluginFile::read`] and [`PluginFile::load`].
    pub fn load(path: &Path) -> Result<Self> {
        PluginFile::read(path)?.load()
    }

    /// Loads a copy. `probed`: the description that a child process was given, and what asks another one for plans.
    pub(super) fn open(staged: &Staged, probed: Option<(Description, Probe)>) -> Result<Self> {
        let library = Library::open(&staged.copy)?;
        let (description, probe) = match probed {
            Some((description, probe)) => (description, Some(probe)),
            None => (library.describe()?, None),
        };
        let (path, sha256, codec) = (staged.source.clone(), staged.sha256.clone(), library.codec.clone());
        Ok(Self { path, sha256, description, codec, library, probe })
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
    /// What the strategy answers, with the author's file and line; what it does instead of answering; or more than the machine's
    /// memory holds.
    pub fn plan(&self, request: &PlanRequest) -> Result<Plan> {
        let planned = || -> Result<Plan> {
            let plan = match &self.probe {
                Some(probe) => self.plan_in_child(probe, request)?,
                None => self.library.plan(request)?,
            };
            demand::check(&plan, &request.model)?;
            Ok(plan)
        };
        planned().with_context(|| format!("strategy `{}`", self.description.name))
    }

    fn plan_in_child(&self, probe: &Probe, request: &PlanRequest) -> Result<Plan> {
        // The bytes were looked at when they were loaded.
        let staged = PluginFile::open(&self.path).ok().filter(|file| file.sha256 == self.sha256);
        let Some(staged) = staged.map(|file| file.stage()).transpose()? else {
            // The file has changed since it was loaded, and what is loaded goes on.
            let (library, request) = (self.library.clone(), request.clone());
            return probe::within(probe.deadline, move || library.plan(&request));
        };
        let mut answers = probe.ask(&staged, std::slice::from_ref(request))?;
        if !answers.said.is_empty() {
            crate::progress::line(&answers.said);
        }
        let plan = answers.plans.pop().context("one request has one answer")?;
        plan.map_err(|failure| anyhow!(failure.reason))
    }

    /// What the strategy has a run do after a step; `None`: it wants to hear of no step. Blocks for as long as it likes.
    ///
    /// # Errors
    /// What the strategy answers, with the author's file and line.
    pub fn on_step(&self, request: &StepRequest) -> Result<Option<StepAnswer>> {
        // Before ABI 1.1 there was no such method.
        if self.library.abi_minor < 1 {
            return Ok(None);
        }
        let input = serde_json::to_vec(request)?;
        let Some(json) = self.library.ask(table::METHOD_ON_STEP, &input, ANSWER_BYTES_MAX)? else { return Ok(None) };
        let answer: StepAnswer = serde_json::from_slice(&json).context("its directives are not known to this host")?;
        check_answer(&answer).map_err(|problem| anyhow!(problem))?;
        Ok(Some(answer))
    }

    /// What an adapter records of its strategy.
    pub fn record(&self) -> StrategyRecord {
        let Description { name, version, .. } = self.description.clone();
        StrategyRecord { name, version, sha256: self.sha256.clone() }
    }
}

/// A library that was loaded, and what it exports.
#[derive(Clone)]
pub(super) struct Library {
    call: Call,
    abi_minor: u16,
    codec: Option<Arc<dyn NativeCodec>>,
}

impl Library {
    /// Loads a private copy, and checks what it exports. Its constructors, its entry and its codec run.
    ///
    /// # Errors
    /// When it cannot be loaded, is of another ABI, or exports what cannot be.
    pub fn open(copy: &Path) -> Result<Self> {
        let entry = open_copy(copy)?;
        // SAFETY: the library exports this ABI's entry, which takes nothing; what it returns is checked.
        let at = unsafe { entry() };
        let descriptor = read_descriptor(at)?;
        let call = descriptor.call.context("its descriptor has no function `call`")?;
        let get_extension = descriptor.get_extension.context("its descriptor has no function `get_extension`")?;
        let codec = super::native::codec(get_extension)?;
        Ok(Self { call, abi_minor: descriptor.abi_minor, codec })
    }

    /// What it says of itself, within the ABI's limits and fit to be shown.
    ///
    /// # Errors
    /// What it answers instead, or what is wrong with the answer.
    pub fn describe(&self) -> Result<Description> {
        let mut about: Description = self.call(table::METHOD_DESCRIBE, b"{}", DESCRIPTION_BYTES_MAX)?;
        text::clean_description(&mut about);
        check_description(&about).map_err(|problem| anyhow!(problem))?;
        Ok(about)
    }

    /// Its plan for a model, within the ABI's limits.
    ///
    /// # Errors
    /// What it answers instead, or what is wrong with the answer.
    pub fn plan(&self, request: &PlanRequest) -> Result<Plan> {
        let mut plan: Plan = self.call(table::METHOD_PLAN, &serde_json::to_vec(request)?, PLAN_BYTES_MAX)?;
        check_plan(&plan).map_err(|problem| anyhow!(problem))?;
        text::clean_plan(&mut plan);
        Ok(plan)
    }

    fn call<T: DeserializeOwned>(&self, method: u32, input: &[u8], result_max: usize) -> Result<T> {
        let json = self.ask(method, input, result_max)?.context("it does not know what every strategy has to")?;
        serde_json::from_slice(&json)
            .map_err(|error| anyhow!("its result cannot be read by this host: {}", text::line(&error.to_string())))
    }

    fn ask(&self, method: u32, input: &[u8], result_max: usize) -> Result<Option<Vec<u8>>> {
        // SAFETY: it is the descriptor's, and the library is never unloaded.
        unsafe { call::ask(self.call, method, input, result_max) }
    }
}

/// Whether bytes hold the entry's name. Asked first, since loading a library runs its constructors.
pub fn names_entry(bytes: &[u8]) -> bool {
    let name = ENTRY.as_bytes();
    bytes.windows(name.len()).any(|window| window == name)
}

/// Loads a private copy.
fn open_copy(copy: &Path) -> Result<Entry> {
    // The linker quotes names from the file.
    let words = |error| text::line(&format!("{:#}", anyhow::Error::from(error)));
    let library = open(copy).map_err(|error| anyhow!("cannot load: {}", words(error)))?;
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

/// Copies a descriptor, in the order that the ABI asks for. The pointers in it are as the plugin has them.
fn read_descriptor(at: *const Descriptor) -> Result<Descriptor> {
    ensure!(!at.is_null(), "its entry returned no descriptor");
    ensure!(at.is_aligned(), "its entry returned a descriptor that is not aligned");
    /// How every descriptor begins.
    #[repr(C)]
    struct Head {
        magic: u64,
        struct_size: u32,
    }
    // SAFETY: any bits are two numbers.
    let head = unsafe { foreign::value(at.cast::<Head>()) }.context("its descriptor")?;
    ensure!(head.magic == MAGIC, "not a strategy of this ABI: its descriptor begins otherwise");
    let (size, known) = (head.struct_size, size_of::<Descriptor>());
    ensure!(
        size as usize >= known,
        "its descriptor has {size} bytes, this host reads {known}; rebuild it with this SDK"
    );
    // SAFETY: any bits are numbers, pointers that nobody follows unasked, and functions that may be null.
    let descriptor = unsafe { foreign::value(at) }.context("its descriptor")?;
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
