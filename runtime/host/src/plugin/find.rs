//! Where strategies are found: never beside a model or a script, nor in the working directory by chance.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::describe::nearest;
use homeroom_abi::table::ENTRY;

use super::beside::beside_program;
use super::owner;
use super::reload::Watching;
use super::stage::{self, BYTES_MAX};
use super::trust::{Policy, Standing, Trust};
use super::{Plugin, PluginFile, Probe};
use crate::registry::data_directory;

/// What to do where no strategy is found.
pub const NONE_HINT: &str = "`cargo build --release` puts them beside the program in target/release; `target/release/homeroom plugins install` copies them to where every copy of the program finds them";

/// Methods that are options of `lora`.
const VARIANTS: [(&str, &str); 2] = [("dora", "use_dora"), ("rslora", "use_rslora")];

/// The directories in which strategies are looked for, in order.
pub struct Search {
    dirs: Vec<PathBuf>,
    trust: Trust,
    program: Option<PathBuf>,
}

/// A strategy's file, not loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StrategyFile {
    /// The strategy's name, from the file's.
    pub name: String,
    /// The file.
    pub path: PathBuf,
}

impl Search {
    /// `--plugin-dir`, then the directories in `HOMEROOM_PLUGINS`, then `plugins` in the user's data directory, then those of
    /// [`beside_program`]. What is found is loaded if `trust` says so.
    pub fn new(plugin_dirs: &[PathBuf], trust: Trust) -> Self {
        let mut dirs = plugin_dirs.to_vec();
        if let Some(list) = std::env::var_os("HOMEROOM_PLUGINS") {
            dirs.extend(std::env::split_paths(&list).filter(|dir| !dir.as_os_str().is_empty()));
        }
        dirs.extend(data_directory().map(|data| data.join("plugins")));
        dirs.extend(beside_program());
        Self::of(dirs, trust)
    }

    /// In these directories and no others.
    pub fn of(dirs: Vec<PathBuf>, trust: Trust) -> Self {
        Self { dirs, trust, program: None }
    }

    /// The same under a policy that a project's file asks for; see [`Trust::tightened`].
    pub fn tightened(self, project: Option<Policy>) -> Self {
        Self { trust: self.trust.tightened(project), ..self }
    }

    /// The same for runs whose strategies are watched while they train. `program`: the `homeroom` program, for child processes.
    pub fn watched(self, program: PathBuf) -> Self {
        Self { program: Some(program), ..self }
    }

    /// What watching a strategy takes, if strategies are to be watched.
    pub fn watching(&self) -> Option<Watching> {
        Some(Watching { program: self.program.clone()?, trust: self.trust.clone() })
    }

    /// Reads a strategy's file and says whether it may be loaded.
    ///
    /// # Errors
    /// As [`PluginFile::read`].
    pub fn read(&self, file: &StrategyFile) -> Result<(PluginFile, Standing)> {
        let read = PluginFile::read(&file.path)?;
        let standing = self.trust.standing(&file.name, &read);
        Ok((read, standing))
    }

    /// Loads a strategy's file if it may be loaded. In the `homeroom` program a child process does so first.
    ///
    /// # Errors
    /// When it may not, cannot, has another name than its file, or does not do well in the child.
    pub fn load_file(&self, file: &StrategyFile) -> Result<(Plugin, Standing)> {
        let (read, standing) = self.read(file)?;
        if let Standing::Refused(why) = standing {
            bail!("{why}");
        }
        let name = &file.name;
        let check = |named: &str| -> Result<()> {
            ensure!(named == name, "it calls itself `{named}`, its file says `{name}`; rename the file");
            Ok(())
        };
        let staged = read.stage()?;
        let plugin = match Probe::of_program() {
            Some(probe) => {
                let about = probe.ask(&staged, &[])?.description;
                check(&about.name)?;
                staged.load_probed(about, probe)?
            }
            None => staged.load()?,
        };
        check(&plugin.description.name)?;
        Ok((plugin, standing))
    }

    /// Loads the strategy of that name from the first directory that has it.
    ///
    /// # Errors
    /// As [`Search::find`]; or when the one that was found cannot be loaded.
    pub fn load(&self, name: &str) -> Result<Plugin> {
        let file = self.find(name)?;
        let loaded = self.load_file(&file).with_context(|| format!("plugin {}", file.path.display()));
        Ok(loaded?.0)
    }

    /// The file of the strategy of that name, of the first directory that has it.
    ///
    /// # Errors
    /// When no directory has it; the message says where it looked.
    pub fn find(&self, name: &str) -> Result<StrategyFile> {
        ensure!(is_plain(name), "`{name}` is not a strategy's name");
        let file = file_name(name);
        if let Some(path) = self.dirs.iter().map(|dir| dir.join(&file)).find(|path| path.exists()) {
            return Ok(StrategyFile { name: name.to_owned(), path });
        }
        if let Some((_, option)) = VARIANTS.iter().find(|(variant, _)| name.eq_ignore_ascii_case(variant)) {
            bail!(
                "unknown strategy `{name}`: it is `lora` with an option: --strategy lora --set-option {option}=true, in a script {{ strategy = \"lora\", {option} = true }}"
            );
        }
        let known = self.list();
        // Papers write LoRA and QLoRA; strategies' names are small.
        let near = nearest(&name.to_lowercase(), known.iter().map(|file| file.name.as_str()));
        let near = near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
        let dirs: Vec<String> = self.dirs.iter().map(|dir| format!("\n  {}", dir.display())).collect();
        let hint = match known.as_slice() {
            [] => NONE_HINT,
            _ => "`homeroom plugins list` shows what is there; --plugin-dir adds a directory",
        };
        bail!("unknown strategy `{name}`{near}\nlooked for {file} in:{}\nhint: {hint}", dirs.concat());
    }

    /// The strategy files of all directories; of equal names the first, which is the one that is loaded.
    pub fn list(&self) -> Vec<StrategyFile> {
        let mut found = BTreeMap::new();
        for path in self.dirs.iter().flat_map(|dir| strategy_files(dir)) {
            if let Some(name) = strategy_name(&path) {
                found.entry(name).or_insert(path);
            }
        }
        found.into_iter().map(|(name, path)| StrategyFile { name, path }).collect()
    }

    /// The directories, in the order of the search.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }
}

/// The file of a strategy of that name.
pub fn file_name(name: &str) -> String {
    format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX)
}

/// Whether a name is one that a strategy can be asked for by.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    !name.is_empty() && name.chars().all(plain)
}

/// The strategy's name that a file's says; `None`: it is not a library's.
pub fn strategy_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file.strip_prefix(std::env::consts::DLL_PREFIX)?.strip_suffix(std::env::consts::DLL_SUFFIX)?;
    Some(name.to_owned())
}

/// Libraries of a directory that hold the entry's name.
fn strategy_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let files = files.filter(|path| strategy_name(path).is_some_and(|name| is_plain(&name)));
    files.filter(|path| names_entry(path).unwrap_or(false)).collect()
}

/// Whether a file holds the entry's name; read by pieces, since a directory may hold libraries of any size.
fn names_entry(path: &Path) -> Result<bool> {
    const PIECE: usize = 1 << 18;
    let mut file = owner::open_unchecked(path)?;
    if file.metadata()?.len() > BYTES_MAX {
        return Ok(false);
    }
    let mut piece = Vec::new();
    loop {
        // The name may lie across two pieces.
        piece.drain(..piece.len().saturating_sub(ENTRY.len()));
        if (&mut file).take(PIECE as u64).read_to_end(&mut piece)? == 0 {
            return Ok(false);
        }
        if stage::names_entry(&piece) {
            return Ok(true);
        }
    }
}
