//! Puts strategies where every copy of this program finds them: `plugins` in the user's data directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::describe::nearest;

use super::trust::{self, Entry};
use super::{PluginFile, Probe, Search, Standing, StrategyFile, Trust, beside_program, build, file_name};
use crate::near::{did_you_mean, exists};
use crate::registry::data_directory;

/// The strategies that come with the program. Beside a build lie those of its tests, too.
pub const BUILT_IN: [&str; 4] = ["lora", "qlora", "int8", "full"];

/// A strategy that was installed.
pub struct Installed {
    /// What `plugins.lock` says of it.
    pub entry: Entry,
    /// Its version before, if there was one and its file was another.
    pub replaced: Option<String>,
    /// Whether the file was there as it is.
    pub unchanged: bool,
}

/// The libraries that are meant: files, crates, which are built, or without either those beside this program.
///
/// # Errors
/// When a crate does not build, or there is nothing to install.
pub fn sources(given: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let search = Search::of(beside_program(), Trust::default());
    if !given.is_empty() {
        return given.iter().map(|path| library(path, &search)).collect();
    }
    let built_in = search.list().into_iter().filter(|file| BUILT_IN.contains(&file.name.as_str()));
    let trusted = built_in.filter(|file| matches!(search.read(file), Ok((_, Standing::Beside))));
    let paths: Vec<PathBuf> = trusted.map(|file| file.path).collect();
    if paths.is_empty() {
        let dirs = search.dirs().iter().map(|dir| format!("\n  {}", dir.display())).collect::<String>();
        bail!(
            "no strategies beside this program, in:{dirs}\nhint: run the program where it was built, `target/release/homeroom plugins install`, or name crates or libraries"
        );
    }
    Ok(paths)
}

/// The library that a path means: itself, or what the crate in a directory builds. Where nothing has that path it may be the name of
/// a strategy that is found.
///
/// # Errors
/// When nothing is there, or the crate does not build.
pub fn library(path: &Path, search: &Search) -> Result<PathBuf> {
    if !path.exists() {
        let found = search.list();
        let is_named = |file: &&StrategyFile| path.as_os_str() == file.name.as_str();
        if let Some(file) = found.iter().find(is_named) {
            return Ok(file.path.clone());
        }
        let names = found.iter().map(|file| file.name.as_str());
        if let Some(near) = path.to_str().and_then(|name| nearest(name, names)) {
            bail!("{}: no such file, directory or strategy{}", path.display(), did_you_mean(Some(near.to_owned())));
        }
    }
    exists(path)?;
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let manifest = path.join("Cargo.toml");
    ensure!(manifest.exists(), "{}: neither a library nor a crate, which has a Cargo.toml", path.display());
    build::build(path).with_context(|| path.display().to_string())
}

/// Installs a library and locks it: its digest and version in `plugins.lock`. Its code is run in a child process, to ask for them.
///
/// # Errors
/// When it is no strategy of this ABI, has another name than its file, or cannot be written. What was there before then stays.
pub fn install(library: &Path, probe: &Probe) -> Result<Installed> {
    let place = || format!("plugin {}", library.display());
    let read = PluginFile::read(library).with_context(place)?;
    let staged = read.stage().with_context(place)?;
    let about = probe.ask(&staged, &[]).with_context(place)?.description;
    let file = file_name(&about.name);
    let named = library.file_name().is_some_and(|name| name == file.as_str());
    ensure!(named, "{}: it calls itself `{}`, so its file should be {file}; rename it", place(), about.name);
    let data = data_directory().context("there is no data directory; set HOMEROOM_HOME")?;
    let path = data.join("plugins").join(file);
    let before = PluginFile::open(&path).ok().map(|before| before.sha256);
    let unchanged = before.as_ref() == Some(&read.sha256);
    let replaced = before.filter(|_| !unchanged).map(|sha256| trust::locked_version(&about.name, &sha256));
    let told = std::path::absolute(&path).with_context(place)?;
    let entry = Entry { name: about.name, version: about.version, sha256: read.sha256.clone(), path: told };
    trust::lock_while(entry.clone(), || if unchanged { Ok(()) } else { read.write(&path) })?;
    Ok(Installed { entry, replaced, unchanged })
}
