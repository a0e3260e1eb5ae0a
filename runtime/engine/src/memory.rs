//! The memory of the machine in bytes, where the system tells (on Linux, `/proc/meminfo`); elsewhere nothing is known.

use std::fs::read_to_string;

/// All of it.
pub fn total() -> Option<u64> {
    field("MemTotal:")
}

/// What can be used without pushing others out.
pub fn available() -> Option<u64> {
    field("MemAvailable:")
}

/// What this process can still get, swap included. A container may have less than the machine; what it uses already can be given
/// back in part, so that its limit is taken whole.
pub fn obtainable() -> Option<u64> {
    let free = available()?.saturating_add(field("SwapFree:").unwrap_or(0));
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = limits.iter().find_map(|path| read_to_string(path).ok()?.trim().parse().ok());
    Some(free.min(limit.unwrap_or(u64::MAX)))
}

fn field(name: &str) -> Option<u64> {
    let text = read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}
