//! Puts strategies where every copy of this program finds them: `plugins` in the user's data directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::trust::{self, Entry};
use super::{PluginFile, Probe, Search, Standing, Trust, beside_program, build, file_name};
use crate::registry::data_directory;

/// The strategies that come with the program. Beside a build lie those of its tests, too.
const BUILT_IN: [&str; 4] = ["lora", "qlora", "int8", "full"];

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
    if !given.is_empty() {
        return given.iter().map(|path| library(path)).collect();
    }
    let search = Search::of(beside_program(), Trust::default());
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

/// The library that a path means: itself, or what the crate in a directory builds.
///
/// # Errors
/// When nothing is there, or the crate does not build.
pub fn library(path: &Path) -> Result<PathBuf> {
    crate::near::exists(path)?;
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
    if !unchanged {
        read.install(&path)?;
    }
    let path = path.canonicalize().with_context(place)?;
    let entry = Entry { name: about.name, version: about.version, sha256: read.sha256, path };
    trust::lock(vec![entry.clone()])?;
    Ok(Installed { entry, replaced, unchanged })
}
