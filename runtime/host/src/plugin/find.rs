//! Where strategies are found: never beside a model or a script, nor in the working directory by chance.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::describe::nearest;

use super::load::Plugin;
use crate::registry::data_directory;

/// The directories in which strategies are looked for, in order.
pub struct Search {
    dirs: Vec<PathBuf>,
}

/// A strategy's file, not loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StrategyFile {
    /// The strategy's name, from the file's.
    pub name: String,
    /// The file.
    pub path: PathBuf,
}

impl StrategyFile {
    /// Loads the strategy.
    ///
    /// # Errors
    /// As [`Plugin::load`], and when it has another name than its file.
    pub fn load(&self) -> Result<Plugin> {
        let plugin = Plugin::load(&self.path)?;
        let (named, name) = (&plugin.description.name, &self.name);
        ensure!(named == name, "it calls itself `{named}`, its file says `{name}`; rename the file");
        Ok(plugin)
    }
}

impl Search {
    /// `--plugin-dir`, then the directories in `HOMEROOM_PLUGINS`, then `plugins` in the user's data directory, then the
    /// directory of this program.
    pub fn new(plugin_dirs: &[PathBuf]) -> Self {
        let mut dirs = plugin_dirs.to_vec();
        if let Some(list) = std::env::var_os("HOMEROOM_PLUGINS") {
            dirs.extend(std::env::split_paths(&list).filter(|dir| !dir.as_os_str().is_empty()));
        }
        dirs.extend(data_directory().map(|data| data.join("plugins")));
        let program = std::env::current_exe().and_then(|program| program.canonicalize());
        dirs.extend(program.ok().and_then(|program| Some(program.parent()?.to_owned())));
        Self { dirs }
    }

    /// Loads the strategy of that name from the first directory that has it.
    ///
    /// # Errors
    /// When no directory has it (the message says where it looked), or the one that was found cannot be loaded.
    pub fn load(&self, name: &str) -> Result<Plugin> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        ensure!(!name.is_empty() && name.chars().all(plain), "`{name}` is not a strategy's name");
        let file = file_name(name);
        if let Some(path) = self.dirs.iter().map(|dir| dir.join(&file)).find(|path| path.exists()) {
            let file = StrategyFile { name: name.to_owned(), path };
            return file.load().with_context(|| format!("plugin {}", file.path.display()));
        }
        let known = self.list();
        let near = nearest(name, known.iter().map(|file| file.name.as_str()));
        let near = near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
        let dirs: Vec<String> = self.dirs.iter().map(|dir| format!("\n  {}", dir.display())).collect();
        bail!(
            "unknown strategy `{name}`{near}\nlooked for {file} in:{}\nhint: `homeroom plugins list` shows what is there; --plugin-dir adds a directory",
            dirs.concat()
        );
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

/// The strategy's name that a file's says; `None`: it is not a library's.
pub fn strategy_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file.strip_prefix(std::env::consts::DLL_PREFIX)?.strip_suffix(std::env::consts::DLL_SUFFIX)?;
    Some(name.to_owned())
}

/// Libraries of a directory that hold the entry's name.
fn strategy_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let files = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| strategy_name(path).is_some());
    files.filter(|path| std::fs::read(path).is_ok_and(|bytes| super::load::names_entry(&bytes))).collect()
}
