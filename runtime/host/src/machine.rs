//! What the machine says of this process, and what it is given back.

// Linked for `mi_collect`, whose Rust binding takes a further crate.
use mimalloc as _;

unsafe extern "C" {
    /// mimalloc's: frees what the calling thread's heap keeps, with `force` all of it.
    fn mi_collect(force: bool);
}

/// Highest resident memory so far, in bytes; `None` where the system does not say.
#[cfg(target_os = "linux")]
pub fn peak_memory_bytes() -> Option<u64> {
    of_status("VmHWM:")
}

/// Resident memory now, in bytes; `None` where the system does not say.
#[cfg(target_os = "linux")]
pub fn resident_memory_bytes() -> Option<u64> {
    of_status("VmRSS:")
}

/// How much of it are pages of files, the program's own among them; `None` where the system does not say.
#[cfg(target_os = "linux")]
pub fn mapped_memory_bytes() -> Option<u64> {
    of_status("RssFile:")
}

#[cfg(target_os = "linux")]
fn of_status(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

/// Gives memory that is not used back to the system: what loading and encoding took is kept otherwise, and a training would have its own
/// beside it.
pub fn give_back_memory() {
    // SAFETY: it is as `mimalloc.h` declares it, has no preconditions, and touches what the calling thread may allocate from.
    let collect = || unsafe { mi_collect(true) };
    homeroom_kernels::on_each_thread(collect);
    collect();
}

/// Begins to count anew: the highest memory so far is the present one. Systems that cannot go on counting.
pub fn reset_peak_memory() {
    // As proc(5) has it; a kernel without page monitoring refuses, which changes what is counted and nothing else.
    #[cfg(target_os = "linux")]
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Highest resident memory so far, in bytes; `None` where the system does not say. On macOS `getrusage` would.
#[cfg(not(target_os = "linux"))]
pub fn peak_memory_bytes() -> Option<u64> {
    None
}

/// Resident memory now, in bytes; `None` where the system does not say.
#[cfg(not(target_os = "linux"))]
pub fn resident_memory_bytes() -> Option<u64> {
    None
}

/// How much of it are pages of files, the program's own among them; `None` where the system does not say.
#[cfg(not(target_os = "linux"))]
pub fn mapped_memory_bytes() -> Option<u64> {
    None
}
