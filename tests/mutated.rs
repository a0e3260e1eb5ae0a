//! Files and answers of others, damaged by a seed: each reader refuses them in words or reads what is there. It never panics, never takes
//! more memory than a multiple of what it was given, and always ends.
//!
//! A run of ten minutes a reader: `HOMEROOM_MUTATED_SECONDS=600 HOMEROOM_MUTATED_SEED=7 cargo test --release -p homeroom --test all mutated`.

mod mutation;
mod readers;

use std::alloc::{GlobalAlloc, Layout, System};
use std::env;
use std::panic;
use std::process::{Command, exit};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::mutation::{Numbers, damage};
use self::readers::{Reader, reader};
use crate::support::Place;

/// The system's allocator, counted.
struct Counted;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn count(more: usize, less: usize) {
    let now = NOW.fetch_add(more, Ordering::Relaxed).wrapping_add(more);
    MOST.fetch_max(now, Ordering::Relaxed);
    NOW.fetch_sub(less, Ordering::Relaxed);
}

// SAFETY: every call is passed on as it is; counting touches no memory of the caller.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller holds what `alloc` asks for, and it is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// What any reader may take, however small its file: tables of a template's engine, stacks and the like.
const BYTES_ANYWAY: usize = 24 << 20;
/// The longest that a case may take on a machine that is busy.
const LONGEST: Duration = Duration::from_secs(30);

/// The case that is read: its number, one more; zero between two.
static CASE: AtomicU64 = AtomicU64::new(0);
/// A panic, where it was and what it said.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

fn asked(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

/// Reads damaged files in a process of its own, whose end is seen.
fn holds(name: &str) -> Result<()> {
    let mut command = Command::new(env::current_exe()?);
    command.args(["--exact", "mutated::in_a_process_of_its_own", "--ignored", "--nocapture", "--test-threads", "1"]);
    let output = command.env("HOMEROOM_MUTATED", name).env("RUST_BACKTRACE", "0").output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let end: Vec<&str> = said.lines().rev().take(12).collect::<Vec<_>>().into_iter().rev().collect();
    ensure!(output.status.success(), "{}:\n{}", output.status, end.join("\n"));
    Ok(())
}

#[test]
#[ignore = "the others run it"]
fn in_a_process_of_its_own() -> Result<()> {
    let name = env::var("HOMEROOM_MUTATED").context("HOMEROOM_MUTATED names a reader")?;
    let place = Place::new()?;
    let Reader { seeds, factor, cases } = reader(&name, &place)?;
    panic::set_hook(Box::new(|info| {
        let at = info.location().map(ToString::to_string).unwrap_or_default();
        let said = info.payload_as_str().unwrap_or("no text");
        PANIC.lock().map(|mut panic| *panic = Some(format!("{at}: {said}"))).unwrap_or_default();
    }));
    // The libraries' own tables are filled, and what is not damaged is read.
    for seed in &seeds {
        (seed.read)(&seed.bytes).with_context(|| format!("{name}: {}, which is not damaged", seed.name))?;
    }
    let first = asked("HOMEROOM_MUTATED_SEED").unwrap_or(17);
    thread::spawn(end_what_hangs);
    let (begun, seconds) = (Instant::now(), asked("HOMEROOM_MUTATED_SECONDS"));
    let is_over = |case: u64| match seconds {
        Some(seconds) => begun.elapsed() > Duration::from_secs(seconds),
        None => case >= cases,
    };
    let only = asked("HOMEROOM_MUTATED_CASE");
    let others: Vec<&[u8]> = seeds.iter().map(|seed| &*seed.bytes).collect();
    let (mut read, mut most) = (0, 0.0_f64);
    let mut case = only.unwrap_or_default();
    while !is_over(case) || only.is_some() {
        let mut numbers = Numbers(first.wrapping_mul(1 << 32) ^ case);
        let seed = &seeds[numbers.below(seeds.len())];
        let damaged = damage(&seed.bytes, seed.form, &others, &mut numbers);
        CASE.store(case + 1, Ordering::SeqCst);
        let before = NOW.load(Ordering::SeqCst);
        MOST.store(before, Ordering::SeqCst);
        let outcome = panic::catch_unwind(panic::AssertUnwindSafe(|| (seed.read)(&damaged)));
        let taken = MOST.load(Ordering::SeqCst).saturating_sub(before);
        CASE.store(0, Ordering::SeqCst);
        let told = format!("{name}, HOMEROOM_MUTATED_SEED={first} HOMEROOM_MUTATED_CASE={case}, of {}", seed.name);
        let panic = PANIC.lock().ok().and_then(|mut panic| panic.take());
        ensure!(outcome.is_ok() && panic.is_none(), "{told}: a panic: {}", panic.unwrap_or_default());
        let given = damaged.len().max(seed.bytes.len()) + seed.beside;
        let may = BYTES_ANYWAY + factor * given;
        ensure!(taken <= may, "{told}: it took {taken} bytes for {given}, and may take {may}");
        most = most.max(taken.saturating_sub(BYTES_ANYWAY) as f64 / given as f64);
        let answer = outcome.ok().transpose();
        read += u64::from(matches!(answer, Ok(Some(()))));
        if only.is_some() {
            eprintln!("{told}: {answer:?}");
            return Ok(());
        }
        case += 1;
    }
    eprintln!(
        "{name}: {case} cases, {read} of them read, {:.1} s, {most:.1} times the file beyond {BYTES_ANYWAY} bytes",
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Ends the process when one case takes too long.
fn end_what_hangs() {
    let (mut last, mut since) = (0, Instant::now());
    loop {
        thread::sleep(Duration::from_millis(200));
        let now = CASE.load(Ordering::SeqCst);
        if now != last || now == 0 {
            (last, since) = (now, Instant::now());
        } else if since.elapsed() > LONGEST {
            eprintln!("case {} hangs", now - 1);
            exit(3);
        }
    }
}

#[test]
fn damaged_safetensors_are_refused_or_read() -> Result<()> {
    holds("safetensors")
}

#[test]
fn damaged_gguf_files_are_refused_or_read() -> Result<()> {
    holds("gguf")
}

#[test]
fn damaged_tokenizers_are_refused_or_read() -> Result<()> {
    holds("tokenizer")
}

#[test]
fn damaged_configurations_are_refused_or_read() -> Result<()> {
    holds("config")
}

#[test]
fn damaged_templates_are_refused_or_read() -> Result<()> {
    holds("template")
}

#[test]
fn damaged_adapters_are_refused_or_read() -> Result<()> {
    holds("adapter")
}

#[test]
fn damaged_checkpoints_are_refused_or_read() -> Result<()> {
    holds("checkpoint")
}

#[test]
fn damaged_answers_of_the_hub_are_refused_or_read() -> Result<()> {
    holds("hub")
}

#[test]
fn damaged_rows_are_refused_or_read() -> Result<()> {
    holds("rows")
}

#[test]
fn damaged_embedding_models_are_refused_or_read() -> Result<()> {
    holds("embedding")
}

#[test]
fn damaged_settings_are_refused_or_read() -> Result<()> {
    holds("settings")
}
