//! Loads a strategy and calls it: the one place where foreign code enters the process.
//!
//! Loading is trusting: a plugin has all the rights of this program, and what is checked here stops accidents. A library is
//! never unloaded: threads and thread-local values may keep pointing into it.

use std::ffi::c_void;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_abi::describe::{Description, PluginError, option_problems};
use homeroom_abi::plan::{Plan, PlanRequest};
use homeroom_abi::table::{
    self, ABI_MAJOR, ABI_MINOR, Bytes, Descriptor, EMIT_ERROR, EMIT_RESULT, ENTRY, Entry, MAGIC, OK,
};
use homeroom_engine::adapter::StrategyRecord;
use homeroom_engine::weight::NativeCodec;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::owner;

/// A loaded strategy. Its code stays mapped until the process ends.
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
}

/// A library's bytes, read once and checked, not loaded. None of its code has run.
pub struct PluginFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// SHA-256 of the bytes, in hexadecimal digits.
    pub sha256: String,
    /// Whether it lies in this program's directory and has the program's owner.
    pub beside_program: bool,
    bytes: Vec<u8>,
}

impl PluginFile {
    /// Opens a library once; what is checked, hashed and loaded later is what this reads.
    ///
    /// # Errors
    /// When others may write the file or a directory above it, or it is not a whole library for this machine with the entry of
    /// a strategy.
    pub fn read(path: &Path) -> Result<Self> {
        let mut file = owner::open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).context("cannot read")?;
        if cfg!(target_os = "linux") {
            super::elf::check(&bytes)?;
        }
        ensure!(names_entry(&bytes), "not a strategy: it has no function `{ENTRY}`");
        let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let beside_program = is_beside_program(path, &file).unwrap_or(false);
        Ok(Self { path: path.to_owned(), sha256, beside_program, bytes })
    }

    /// Loads a private copy of the bytes.
    ///
    /// # Errors
    /// When it cannot be loaded, is of another ABI, or does not describe itself.
    pub fn load(self) -> Result<Plugin> {
        let entry = open_copy(&self.path, &self.bytes)?;
        Plugin::from_entry(self.path, self.sha256, entry)
    }
}

fn is_beside_program(path: &Path, file: &File) -> std::io::Result<bool> {
    let program = std::env::current_exe()?.canonicalize()?;
    let same_directory = path.canonicalize()?.parent() == program.parent();
    Ok(same_directory && owner::same_owner(&file.metadata()?, &program.metadata()?))
}

impl Plugin {
    /// Reads a file and loads it, whoever trusts it: the caller has asked.
    ///
    /// # Errors
    /// As [`PluginFile::read`] and [`PluginFile::load`].
    pub fn load(path: &Path) -> Result<Self> {
        PluginFile::read(path)?.load()
    }

    fn from_entry(path: PathBuf, sha256: String, entry: Entry) -> Result<Self> {
        // SAFETY: the library exports this ABI's entry, whose contract is to return a pointer to static data or null.
        let descriptor = unsafe { entry() };
        let descriptor = check_descriptor(descriptor)?;
        let mut plugin = Self {
            path,
            sha256,
            description: Description {
                name: String::new(),
                version: String::new(),
                doc: String::new(),
                options: vec![],
            },
            codec: super::native::codec(descriptor)?,
            descriptor,
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
        self.call(table::METHOD_PLAN, &input).with_context(|| format!("strategy `{}`", self.description.name))
    }

    /// What an adapter records of its strategy.
    pub fn record(&self) -> StrategyRecord {
        let Description { name, version, .. } = self.description.clone();
        StrategyRecord { name, version, sha256: self.sha256.clone() }
    }

    fn call<T: serde::de::DeserializeOwned>(&self, method: u32, input: &[u8]) -> Result<T> {
        let mut records: Vec<(u32, Vec<u8>)> = Vec::new();
        let ctx = (&raw mut records).cast::<c_void>();
        // SAFETY: `input` outlives the call; `receive` belongs to `ctx`, which points at `records`, and is called during the
        // call only, from this thread. The SDK turns panics into errors, and builds that abort were refused.
        let code = unsafe { (self.descriptor.call)(method, Bytes::of(input), receive, ctx) };
        let record = |kind| records.iter().find(|(emitted, _)| *emitted == kind).map(|(_, bytes)| bytes.as_slice());
        if code == OK {
            let json = record(EMIT_RESULT).context("it succeeded without a result")?;
            return serde_json::from_slice(json).context("its result cannot be read by this host");
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

/// Writes the bytes to a new file and loads that. A new name and inode, because the linker answers a known name or inode with
/// the library it already has, and a file that is overwritten in place changes code that is running.
fn open_copy(path: &Path, bytes: &[u8]) -> Result<Entry> {
    let dir = tempfile::Builder::new().prefix("homeroom-plugin-").tempdir().context("cannot make a private copy")?;
    let copy = dir.path().join(path.file_name().context("a library has a file name")?);
    write_private(&copy, bytes).with_context(|| format!("cannot make a private copy in {}", dir.path().display()))?;
    let library = open(&copy).map_err(|error| anyhow!("cannot load: {error}"))?;
    // SAFETY: the name is this ABI's, which fixes the type; the library is never unloaded, so the pointer stays good.
    let entry = unsafe { library.get::<Entry>(ENTRY.as_bytes()) };
    let entry = *entry.map_err(|_| anyhow!("not a strategy: it does not export `{ENTRY}`"))?;
    std::mem::forget(library);
    Ok(entry)
}

/// Writes a file that nobody writes again; its directory is the user's alone.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o500);
    options.open(path)?.write_all(bytes)
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
