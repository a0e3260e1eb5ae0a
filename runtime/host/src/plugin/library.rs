//! A library of foreign code: the one place where such enters the process.
//!
//! Loading is trusting: a plugin has all the rights of this program, and what is checked here stops accidents. A library is never
//! unloaded: threads and thread-local values may keep pointing into it.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use homeroom_abi::check::{check_description, check_plan};
use homeroom_abi::describe::Description;
use homeroom_abi::limits::{DESCRIPTION_BYTES_MAX, PLAN_BYTES_MAX};
use homeroom_abi::plan::{Plan, PlanRequest};
use homeroom_abi::table::{self, ABI_MAJOR, ABI_MINOR, Call, Descriptor, ENTRY, Entry, MAGIC};
use homeroom_engine::models::weight::NativeCodec;
use serde::de::DeserializeOwned;

use super::{call, foreign, text};

/// A library that was loaded, and what it exports.
#[derive(Clone)]
pub(super) struct Library {
    call: Call,
    /// The minor version of the ABI that it was built for.
    pub abi_minor: u16,
    /// Its native codec, if it has one.
    pub codec: Option<Arc<dyn NativeCodec>>,
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

    /// What it answers to a method; `None`: it does not know it.
    ///
    /// # Errors
    /// What it answers instead.
    pub fn ask(&self, method: u32, input: &[u8], result_max: usize) -> Result<Option<Vec<u8>>> {
        // SAFETY: it is the descriptor's, and the library is never unloaded.
        unsafe { call::ask(self.call, method, input, result_max) }
    }
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
