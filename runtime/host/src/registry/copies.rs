//! Copies a model's files, all of one save: what is replaced or removed meanwhile is copied as it was, or not at all.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_engine::embedding::{MODULES_FILE, PROMPTS_FILE, SENTENCE_FILES, module_directories};
use homeroom_engine::files::gguf::shard_paths;
use homeroom_engine::files::{
    Kept, NewDirectory, broken_link, ensure_room, is_named, named_templates, open_regular, replaceable_but_for,
    take_away, vacant,
};

use super::place;
use crate::interrupt;
use crate::near::{LIST_HINT, did_you_mean, named_model};
use crate::progress::{self, Counting};

/// How often a model is opened anew that is replaced while it is opened.
const TRIES: usize = 20;
/// Most files of a model: the largest are saved in some hundred shards, and a process may often open no more than 1024 files.
const FILES_MAX: usize = 800;
/// Bytes that are copied between two looks at how far it is.
const PIECE_BYTES: u64 = 32 << 20;

/// Open files, by the names that they are to have in a directory.
pub struct Sources {
    files: Vec<(PathBuf, File, u64)>,
}

impl Sources {
    /// Opens what `choose` names in a directory; all of them are of the same save.
    ///
    /// # Errors
    /// When one is not there or no regular file, or the directory is replaced again and again.
    pub fn open(directory: &Path, choose: &dyn Fn(&Path) -> Result<Vec<PathBuf>>) -> Result<Self> {
        if let Some(link) = broken_link(directory) {
            bail!("{}: {link}", directory.display());
        }
        for _ in 0..TRIES {
            let before = identity(directory);
            let opened = choose(directory).and_then(|names| Self::open_all(directory, names));
            if before.is_some() && identity(directory) == before {
                return opened;
            }
            if !is_named(directory)? {
                bail!("{}: another process has removed it", directory.display());
            }
        }
        bail!("{}: other processes replace it again and again; try again", directory.display())
    }

    fn open_all(directory: &Path, names: Vec<PathBuf>) -> Result<Self> {
        // All are open at once, so that they are of one save.
        let (count, place) = (names.len(), directory.display());
        ensure!(count <= FILES_MAX, "{place}: {count} files, and a model has at most {FILES_MAX}");
        let open = |name: PathBuf| {
            let path = directory.join(&name);
            let file = open_regular(&path)?;
            let bytes = file.metadata().with_context(|| path.display().to_string())?.len();
            Ok((name, file, bytes))
        };
        Ok(Self { files: names.into_iter().map(open).collect::<Result<_>>()? })
    }

    /// Files of one directory, under their own names.
    ///
    /// # Errors
    /// When one is no regular file.
    pub fn of_files(paths: &[PathBuf]) -> Result<Self> {
        let name = |path: &PathBuf| -> Result<PathBuf> {
            Ok(path.file_name().with_context(|| format!("{}: it has no name", path.display()))?.into())
        };
        let names = paths.iter().map(name).collect::<Result<_>>()?;
        Self::open_all(paths.first().and_then(|path| path.parent()).unwrap_or(Path::new("")), names)
    }

    /// Whether one of them has this name, or lies in a directory of this name.
    pub fn holds(&self, name: &Path) -> bool {
        self.files.iter().any(|(file, _, _)| file.starts_with(name))
    }

    /// The same files, which are to lie in a folder of this name.
    pub fn below(mut self, folder: &str) -> Self {
        self.files.iter_mut().for_each(|(name, _, _)| *name = Path::new(folder).join(&*name));
        self
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, _, bytes)| bytes).sum()
    }

    /// Copies them into a directory in the making, with a bar on a terminal.
    ///
    /// # Errors
    /// When one cannot be read, or is written meanwhile, or the disk is full.
    pub fn copy_into(self, directory: &NewDirectory) -> Result<()> {
        let bar = progress::bytes("copying", self.bytes());
        let copied = self.copy_all(directory, &bar);
        bar.finish_and_clear();
        copied
    }

    fn copy_all(mut self, directory: &NewDirectory, bar: &Counting) -> Result<()> {
        let mut done = 0;
        for (name, file, bytes) in &mut self.files {
            if let Some(parent) = name.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                directory.subdirectory(parent).with_context(|| directory.cannot_write(&parent.to_string_lossy()))?;
            }
            let shown = name.display().to_string();
            let to = File::create_new(directory.path().join(&*name));
            let mut to = to.with_context(|| directory.cannot_write(&shown))?;
            let mut copied = 0;
            loop {
                let piece = io::copy(&mut file.take(PIECE_BYTES), &mut to);
                let piece = piece.with_context(|| directory.cannot_write(&shown))?;
                if piece == 0 {
                    break;
                }
                copied += piece;
                bar.set_position(done + copied);
            }
            to.flush().with_context(|| directory.cannot_write(&shown))?;
            ensure!(copied == *bytes, "{shown}: it was written while it was copied; nothing is kept of it");
            done += copied;
        }
        Ok(())
    }
}

/// What tells a directory from one that takes its place.
#[cfg(unix)]
fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).ok().map(|about| (about.dev(), about.ino()))
}

#[cfg(not(unix))]
fn identity(path: &Path) -> Option<std::time::SystemTime> {
    fs::metadata(path).ok().and_then(|about| about.modified().ok())
}

/// The files of a model of the registry: all that lie there, and its chat templates.
fn files_of(model: &Path) -> Result<Vec<PathBuf>> {
    let place = || format!("{}: cannot list", model.display());
    let mut names = [named_templates(model)?, files_of_modules(model)?].concat();
    for entry in fs::read_dir(model).with_context(place)? {
        let entry = entry.with_context(place)?;
        // A link stands for the file that it leads to.
        if !entry.path().is_dir() {
            names.push(entry.file_name().into());
        }
    }
    let is_weights = |name: &PathBuf| name.extension().is_some_and(|kind| kind == "safetensors" || kind == "gguf");
    ensure!(names.iter().any(is_weights), "{}: no weights of a model are in it", model.display());
    names.sort();
    Ok(names)
}

/// The files of the further modules of an embedding model, in directories as `1_Pooling`.
///
/// # Errors
/// When the list of modules is damaged.
pub fn files_of_modules(model: &Path) -> Result<Vec<PathBuf>> {
    let directories = module_directories(model)?;
    let files = directories.iter().flat_map(|directory| MODULE_FILES.map(|file| directory.join(file)));
    let mut files: Vec<PathBuf> = files.filter(|file| model.join(file).is_file()).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// What is read of a module in a directory of its own.
const MODULE_FILES: [&str; 2] = ["config.json", "model.safetensors"];

/// Whether a file of a model that was imported may be replaced with it, beyond those that a training writes.
fn may_go(model: &Path, file: &Path) -> bool {
    let is_listed = || files_of_modules(model).is_ok_and(|files| files.iter().any(|other| other == file));
    let name = file.to_str().unwrap_or_default();
    let further = [MODULES_FILE, PROMPTS_FILE, "vocab.txt"];
    name.ends_with(".gguf") || further.contains(&name) || SENTENCE_FILES.contains(&name) || is_listed()
}

/// Refuses a name that is taken, unless what has it may be replaced.
///
/// # Errors
/// When it is taken, or holds what is no part of a model.
pub fn ensure_free(name: &str, overwrite: bool) -> Result<PathBuf> {
    let to = place(name)?;
    if overwrite {
        replaceable_but_for(&to, |file| may_go(&to, file))?;
    } else if vacant(&to).is_err() {
        bail!("{name}: a model of this name is there already; choose another name, or pass --overwrite");
    }
    Ok(to)
}

/// Gives a model of the registry a second name, of its own files. Returns where they are, and their bytes.
///
/// # Errors
/// When there is no such model, the name is taken, the disk is full, or a file cannot be read.
pub fn copy(name: &str, new: &str, overwrite: bool) -> Result<(PathBuf, u64)> {
    let from = place(name)?;
    ensure!(
        super::entries::is_there(&from)?,
        "{name}: no such model{}{LIST_HINT}",
        did_you_mean(named_model(name.as_ref()))
    );
    ensure!(name != new, "{name}: it has that name already");
    let to = ensure_free(new, overwrite)?;
    let sources = match from.is_file() {
        true => Sources::of_files(&shard_paths(&from))?,
        false => Sources::open(&from, &files_of)?,
    };
    let bytes = sources.bytes();
    save(sources, &to, overwrite).map(|path| (path, bytes))
}

/// Copies files to a place of the registry, whole or not at all. Ctrl-C leaves nothing.
///
/// # Errors
/// When the disk is full, a file cannot be read, or the place is taken.
pub fn save(sources: Sources, to: &Path, overwrite: bool) -> Result<PathBuf> {
    save_or(sources, to, overwrite, &|| None)
}

/// As [`save`]; a name that is taken meanwhile is given up for `another`.
///
/// # Errors
/// As [`save`].
pub fn save_or(sources: Sources, to: &Path, overwrite: bool, another: &dyn Fn() -> Option<PathBuf>) -> Result<PathBuf> {
    ensure_room(to, sources.bytes())?;
    interrupt::end_at_once()?;
    let mut directory = NewDirectory::start(to)?;
    directory.replaces = overwrite;
    sources.copy_into(&directory)?;
    directory.publish_or(another).map_err(|error| {
        let Some(kept) = error.downcast_ref::<Kept>().map(|kept| kept.kept.clone()) else { return error };
        // Of a training it is all there is; a copy's source is there still.
        let removed = take_away(&kept).err().map(|error| format!("; {error:#}")).unwrap_or_default();
        let why = if vacant(to).is_err() {
            "another process has taken this name meanwhile".to_owned()
        } else {
            error.root_cause().to_string()
        };
        anyhow!("{}: {why}; nothing is kept of the copy{removed}", to.display())
    })
}
