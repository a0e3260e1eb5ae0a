//! From a plugin's file that has changed to a plan that a running training can go on with, or to one line that says why not.
//!
//! The file settles; its bytes are read once, checked and copied; a child process loads the copy and plans for the model;
//! then this process loads it, too. What fails anywhere is not tried again until the file has other bytes, and the training goes on
//! with what it has. The old library stays mapped.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_abi::plan::{Plan, PlanRequest};

use super::demand;
use super::probe::within;
use super::{Plugin, PluginFile, Probe, Standing, Trust};
use crate::watch::Watch;

/// How long a strategy may take to load in this process.
const DEADLINE: Duration = Duration::from_secs(2);
/// How long the child may live that does so first.
const PROBE_DEADLINE: Duration = Duration::from_secs(5);

/// What watching a plugin's file takes.
#[derive(Clone)]
pub struct Watching {
    /// The `homeroom` program, which a child process runs.
    pub program: PathBuf,
    /// What may be loaded.
    pub trust: Trust,
}

/// What a plugin's file has become.
pub struct Ready {
    /// The new generation.
    pub plugin: Plugin,
    /// Its plan for the model.
    pub plan: Plan,
}

/// Watches a plugin's file until it is dropped.
pub struct Reload {
    shared: Arc<Mutex<Shared>>,
    wake: Sender<()>,
}

struct Shared {
    /// Digest of the newest bytes that were good so far.
    current: String,
    /// Digests that are not tried again.
    quarantine: HashSet<String>,
    ready: Option<Ready>,
    ended: bool,
}

impl Reload {
    /// Watches the file that a plugin was loaded from, for others that plan for the same model. `say` is given each line.
    pub fn watch(plugin: &Plugin, request: PlanRequest, watching: Watching, say: fn(&str)) -> Self {
        let (name, path) = (plugin.description.name.clone(), plugin.path.clone());
        let shared = Shared { current: plugin.sha256.clone(), quarantine: HashSet::new(), ready: None, ended: false };
        let shared = Arc::new(Mutex::new(shared));
        let (mut watch, problem) = Watch::new(&path);
        if let Some(problem) = problem {
            say(&format!("note: {}: changes are looked for every 2 s only: {problem}", path.display()));
        }
        let wake = watch.waker();
        let Watching { program, trust } = watching;
        let probe = Probe { program, deadline: PROBE_DEADLINE };
        let known = shared.clone();
        thread::spawn(move || {
            loop {
                let changed = watch.wait();
                if lock(&known).ended {
                    return;
                }
                if !changed {
                    continue;
                }
                let file = match PluginFile::open(&path) {
                    Ok(file) => file,
                    Err(error) => {
                        // A build that has removed the file will put another there.
                        if path.exists() {
                            say(&format!("reload    {}: {error:#}", path.display()));
                        }
                        continue;
                    }
                };
                let sha256 = file.sha256.clone();
                {
                    let shared = lock(&known);
                    if shared.current == sha256 || shared.quarantine.contains(&sha256) {
                        continue;
                    }
                }
                match candidate(&name, &file, &trust, &request, &probe) {
                    Ok(ready) => {
                        let mut shared = lock(&known);
                        shared.current = sha256;
                        shared.ready = Some(ready);
                    }
                    Err(error) => {
                        lock(&known).quarantine.insert(sha256);
                        let reason = format!("{error:#}").replace('\n', " ");
                        say(&format!(
                            "reload    {} refused: {reason}; the training goes on without it",
                            path.display()
                        ));
                    }
                }
            }
        });
        Self { shared, wake }
    }

    /// The newest generation, if there is one that was not taken yet.
    pub fn take(&self) -> Option<Ready> {
        lock(&self.shared).ready.take()
    }

    /// A generation did not do well in the training: its bytes are not tried again. `back_to`: those that are trained with.
    pub fn quarantine(&self, sha256: &str, back_to: &str) {
        let mut shared = lock(&self.shared);
        shared.quarantine.insert(sha256.to_owned());
        if shared.current == sha256 {
            shared.current = back_to.to_owned();
        }
    }
}

impl Drop for Reload {
    fn drop(&mut self) {
        lock(&self.shared).ended = true;
        let _ = self.wake.send(());
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All stages from bytes to a plan.
fn candidate(name: &str, file: &PluginFile, trust: &Trust, request: &PlanRequest, probe: &Probe) -> Result<Ready> {
    file.check()?;
    if let Standing::Refused(why) = trust.standing(name, file) {
        bail!("{why}");
    }
    let staged = file.stage()?;
    let mut answers = probe.ask(&staged, std::slice::from_ref(request))?;
    let named = &answers.description.name;
    ensure!(named == name, "it calls itself `{named}`, and not `{name}`");
    let plan = answers.plans.pop().context("one request has one answer")?;
    let plan = plan.map_err(|failure| anyhow!("strategy `{name}`: {}", failure.reason))?;
    demand::check(&plan, &request.model)?;
    let (about, probe) = (answers.description, probe.clone());
    // The plan is the child's; here it is loaded for its hook.
    let plugin = within(DEADLINE, move || staged.load_probed(about, probe))?;
    Ok(Ready { plugin, plan })
}
