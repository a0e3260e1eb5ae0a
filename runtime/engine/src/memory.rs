//! The memory of the machine in bytes, where the system tells (on Linux, `/proc/meminfo` and cgroups); elsewhere nothing is known but what
//! `HOMEROOM_MEMORY` says.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The environment variable that says how much memory this process may take, such as `12GB`: less than the machine has, for the sake of
/// others.
pub const VARIABLE: &str = "HOMEROOM_MEMORY";

/// Memory is short where less than this part of it can be had,
const SHORT_PART: u64 = 32;
/// and less than this, in bytes.
const SHORT_MOST: u64 = 512 << 20;

/// What there is, and what of it can still be had, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// What this process can still get.
    pub left: u64,
    /// All that it shares with others.
    pub all: u64,
}

impl Room {
    /// Whether so little is left that the system may end this process for the next piece.
    pub fn is_short(&self) -> bool {
        self.left < (self.all / SHORT_PART).min(SHORT_MOST)
    }
}

/// All of it.
pub fn total() -> Option<u64> {
    field("MemTotal:")
}

/// What can be used without pushing others out.
pub fn available() -> Option<u64> {
    field("MemAvailable:")
}

/// What this process can still get, swap included: of the machine, of its container, and of what `HOMEROOM_MEMORY` allows.
pub fn obtainable() -> Option<u64> {
    free().into_iter().chain(bounds().map(|room| room.left)).min()
}

/// The same whatever `HOMEROOM_MEMORY` allows: what the system would give.
pub fn free() -> Option<u64> {
    let free = available().map(|free| free.saturating_add(field("SwapFree:").unwrap_or(0)));
    free.into_iter().chain(of_container().map(|room| room.left)).min()
}

/// What this process may have in all: the machine's memory, or less where its container or `HOMEROOM_MEMORY` says so.
pub fn limit() -> Option<u64> {
    total().into_iter().chain(bounds().map(|room| room.all)).min()
}

/// Where the least is left, in parts of what there is: of the machine without its swap, of the container, or of what `HOMEROOM_MEMORY`
/// allows.
pub fn room() -> Option<Room> {
    let machine = available().zip(total()).map(|(left, all)| Room { left, all });
    // Of two small shares the smaller; no share is more than the whole.
    let share = |room: &Room| (room.left as f64 / room.all.max(1) as f64 * 1e9) as u64;
    machine.into_iter().chain(bounds()).min_by_key(share)
}

/// The limit of the container that this process is in, if it has one: of its cgroup or of one above.
pub fn of_container() -> Option<Room> {
    cgroups(Path::new("/sys/fs/cgroup"), &read_to_string("/proc/self/cgroup").unwrap_or_default())
        .filter_map(|directory| of_cgroup(&directory))
        .min_by_key(|room| room.left)
}

/// How many processes of the container were ended since it began, as it had no memory left; `None`: nobody counts them.
pub fn ended_in_container() -> Option<u64> {
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let counts = cgroups(Path::new("/sys/fs/cgroup"), &groups).filter_map(|directory| {
        // The second version's file, or the first's.
        let events = ["memory.events", "memory.oom_control"].map(|name| read_to_string(directory.join(name)));
        let events = events.into_iter().find_map(Result::ok)?;
        events.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
    });
    counts.max()
}

/// What `HOMEROOM_MEMORY` says.
///
/// # Errors
/// When it is no size.
pub fn allowed() -> Result<Option<u64>, String> {
    let Some(value) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else { return Ok(None) };
    let value = value.to_string_lossy();
    let size = bytes_of(&value).filter(|bytes| *bytes > 0);
    size.map(Some).ok_or_else(|| format!("{VARIABLE} is `{value}`, it should be a size such as 12GB"))
}

/// Bytes of a size such as `12GB`, `1.5 GiB` or `800M`: kB, MB, GB and TB count in thousands, as disks do, KiB and the like in 1024.
/// `None`: it is none.
pub fn bytes_of(text: &str) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let scale = match unit.as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        "tib" => 1_099_511_627_776.0,
        _ => return None,
    };
    let bytes = number.parse::<f64>().ok()? * scale;
    (bytes.is_finite() && bytes < 1e18).then_some(bytes as u64)
}

/// Those that are less than the machine.
fn bounds() -> impl Iterator<Item = Room> {
    static ALLOWED: OnceLock<Option<u64>> = OnceLock::new();
    let allowed = *ALLOWED.get_or_init(|| allowed().ok().flatten());
    let own = allowed.map(|all| Room { left: all.saturating_sub(resident().unwrap_or(0)), all });
    of_container().into_iter().chain(own)
}

/// Resident memory of this process.
fn resident() -> Option<u64> {
    of_line(&read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// The directories of this process's cgroups that may bound its memory, the innermost first. `groups`: what `/proc/self/cgroup` says.
fn cgroups<'a>(root: &'a Path, groups: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    let of_line = |line: &'a str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        // The second version has one tree, the first one a controller.
        let top = match controllers {
            "" => root.to_owned(),
            all if all.split(',').any(|one| one == "memory") => root.join("memory"),
            _ => return None,
        };
        Some((top, path))
    };
    groups.lines().filter_map(of_line).flat_map(|(top, path)| {
        let inner = Path::new(path.trim_start_matches('/')).to_owned();
        let mut directories: Vec<PathBuf> = inner.ancestors().map(|part| top.join(part)).collect();
        // A container often sees its own group as the top.
        directories.dedup();
        directories
    })
}

/// The limit of one cgroup, of either version, and what is left of it: files that are kept in memory can be given back.
fn of_cgroup(directory: &Path) -> Option<Room> {
    let number = |name: &str| read_to_string(directory.join(name)).ok()?.trim().parse::<u64>().ok();
    let (all, used) = match number("memory.max") {
        Some(all) => (all, number("memory.current")?),
        None => (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?),
    };
    // The first version has a number beyond all memories where it has no limit.
    if all > 1 << 60 {
        return None;
    }
    let about = read_to_string(directory.join("memory.stat")).unwrap_or_default();
    let files: u64 = ["inactive_file", "active_file"]
        .iter()
        .filter_map(|name| about.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok()))
        .sum();
    Some(Room { left: all.saturating_sub(used.saturating_sub(files)), all })
}

fn field(name: &str) -> Option<u64> {
    of_line(&read_to_string("/proc/meminfo").ok()?, name)
}

fn of_line(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_read_as_people_write_it() {
        for (text, bytes) in [
            ("12GB", Some(12_000_000_000)),
            ("12 GiB", Some(12 << 30)),
            ("1.5g", Some(1_500_000_000)),
            ("800M", Some(800_000_000)),
            (" 7 ", Some(7)),
            ("0", Some(0)),
            ("", None),
            ("GB", None),
            ("12 sheep", None),
            ("-1GB", None),
            ("1e99GB", None),
            ("1.2.3GB", None),
        ] {
            assert_eq!(bytes_of(text), bytes, "{text}");
        }
    }

    #[test]
    fn the_tightest_group_of_either_version_bounds_and_files_can_be_given_back() -> std::io::Result<()> {
        let place = tempfile::tempdir()?;
        let root = place.path();
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            std::fs::write(path, text)
        };
        write("school/room/memory.max", "max\n")?;
        write("school/room/memory.current", "70\n")?;
        write("school/memory.max", "1000\n")?;
        write("school/memory.current", "900\n")?;
        write("school/memory.stat", "anon 600\ninactive_file 100\nactive_file 200\n")?;
        let found = |groups: &str| -> Vec<Room> {
            cgroups(root, groups).filter_map(|directory| of_cgroup(&directory)).collect()
        };
        assert_eq!(found("0::/school/room\n"), [Room { left: 400, all: 1000 }]);
        assert_eq!(found("0::/\n"), []);
        write("memory/old/memory.limit_in_bytes", "500\n")?;
        write("memory/old/memory.usage_in_bytes", "30\n")?;
        write("memory/memory.limit_in_bytes", "9223372036854771712\n")?;
        write("memory/memory.usage_in_bytes", "30\n")?;
        assert_eq!(found("4:cpu,cpuacct:/other\n3:memory:/old\n"), [Room { left: 470, all: 500 }]);
        Ok(())
    }

    #[test]
    fn memory_is_short_where_a_small_part_is_left_and_never_where_much_is() {
        let short = |left, all| Room { left, all }.is_short();
        assert!(short(199 << 20, 8 << 30) && !short(300 << 20, 8 << 30));
        assert!(!short(600 << 20, 512 << 30) && short(500 << 20, 512 << 30));
    }
}
