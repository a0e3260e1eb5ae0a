//! Loads a strategy and calls it.
//!
//! In the program a child process loads it first and plans in this one's place, see [`super::probe`]; what is left for this process
//! is the strategy's `on_step` and its codec.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use homeroom_abi::check::check_answer;
use homeroom_abi::describe::{Description, option_problems};
use homeroom_abi::limits::ANSWER_BYTES_MAX;
use homeroom_abi::plan::{ModelInfo, Plan, PlanRequest};
use homeroom_abi::step::{StepAnswer, StepRequest};
use homeroom_abi::table;
use homeroom_engine::adapt::adapter::StrategyRecord;
use homeroom_engine::models::weight::NativeCodec;
use serde_json::{Map, Value};

use super::demand;
use super::library::Library;
use super::probe::{self, Probe};
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
        self.plan_within(request, demand::check)
    }

    /// The same plan, which is only estimated: a model may be larger than this machine.
    ///
    /// # Errors
    /// As [`Self::plan`], but for what this machine's memory holds.
    pub fn plan_to_estimate(&self, request: &PlanRequest) -> Result<Plan> {
        self.plan_within(request, demand::check_estimated)
    }

    fn plan_within(&self, request: &PlanRequest, check: fn(&Plan, &ModelInfo) -> Result<()>) -> Result<Plan> {
        let planned = || -> Result<Plan> {
            let plan = match &self.probe {
                Some(probe) => self.plan_in_child(probe, request)?,
                None => self.library.plan(request)?,
            };
            check(&plan, &request.model)?;
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

impl PluginFile {
    /// Loads a private copy of the bytes in this process.
    ///
    /// # Errors
    /// When it cannot be loaded, is of another ABI, or does not describe itself.
    pub fn load(self) -> Result<Plugin> {
        self.stage()?.load()
    }
}

impl Staged {
    /// Loads the copy in this process.
    ///
    /// # Errors
    /// As [`PluginFile::load`].
    pub fn load(&self) -> Result<Plugin> {
        Plugin::open(self, None)
    }

    /// The same after a child process has loaded it, which was given this description. Other children plan in its place.
    ///
    /// # Errors
    /// When it cannot be loaded, or is of another ABI.
    pub fn load_probed(&self, description: Description, probe: Probe) -> Result<Plugin> {
        Plugin::open(self, Some((description, probe)))
    }
}
