//! What a script may take: time, memory in its machine, memory that the program holds for it, and output.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use homeroom_engine::memory;

/// Bounds of one run of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Time of its Lua and of its work on datasets.
    pub lua_time: Duration,
    /// Bytes that its own values may take.
    pub memory_bytes: usize,
    /// Bytes that it may print.
    pub output_bytes: usize,
    /// Bytes that the program may hold for it: the rows of its datasets, and what a dry run would do.
    pub held_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let half = memory::total().map_or(4 << 30, |bytes| usize::try_from(bytes / 2).unwrap_or(usize::MAX));
        let held_bytes = half.clamp(1 << 30, 8 << 30);
        Self { lua_time: Duration::from_secs(60), memory_bytes: 256 << 20, output_bytes: 16 << 20, held_bytes }
    }
}

/// A number of bytes for messages: `256 MiB`, or `64 KiB`.
pub fn bytes(count: usize) -> String {
    match count {
        0..0x400 => format!("{count} bytes"),
        0x400..0x10_0000 => format!("{} KiB", count >> 10),
        _ => format!("{} MiB", count >> 20),
    }
}

/// Counts what the program holds for a script.
#[derive(Clone)]
pub struct Account {
    bytes: Rc<Cell<usize>>,
    most: usize,
}

/// Bytes of an [`Account`], given back when dropped.
pub struct Held {
    account: Rc<Cell<usize>>,
    bytes: usize,
}

impl Account {
    /// An account with nothing on it.
    pub fn new(most: usize) -> Self {
        Self { bytes: Rc::default(), most }
    }

    /// Adds bytes; `None`: they are more than may be held.
    pub fn hold(&self, bytes: usize) -> Option<Held> {
        let all = self.bytes.get().checked_add(bytes).filter(|all| *all <= self.most)?;
        self.bytes.set(all);
        Some(Held { account: self.bytes.clone(), bytes })
    }

    /// The most that may be held.
    pub fn most(&self) -> usize {
        self.most
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.account.set(self.account.get().saturating_sub(self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_given_back() {
        let account = Account::new(100);
        let first = account.hold(60).expect("it is below the bound");
        assert!(account.hold(41).is_none());
        assert!(account.hold(usize::MAX).is_none());
        drop(first);
        assert!(account.hold(100).is_some());
    }
}
