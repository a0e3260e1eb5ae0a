//! What was used of a day, on disk: a server that is started anew goes on counting, and so does a second one beside it.
//!
//! A day ends at midnight where the machine is. When the clock is set back, what was counted stays; when it is set ahead over a midnight, a
//! day begins. What running requests have reserved is on disk as used, so that a server that is killed gives nothing back.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use homeroom_engine::files::{Lock, make_directory, read_text, replace_file};
use jiff::{ToSpan, Zoned, civil};
use serde::{Deserialize, Serialize};

use super::limits::Who;
use crate::progress::line;
use crate::registry;

/// Its name in `serve/` in the data directory.
const FILE: &str = "usage.json";
/// Largest file.
const FILE_BYTES_MAX: u64 = 32 << 20;

/// A reading of the clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Seconds of a clock that nobody sets.
    pub second: u64,
    /// Days since 1970, where the machine is.
    pub day: i64,
    /// The time until the next one.
    pub midnight_in: Duration,
}

impl Now {
    /// Returns the clock of this machine.
    pub fn clock() -> impl Fn() -> Self + Send + Sync + 'static {
        let started = Instant::now();
        move || {
            let now = Zoned::now();
            let since = now.date() - civil::date(1970, 1, 1);
            let midnight = now.date().checked_add(1.day()).and_then(|day| day.to_zoned(now.time_zone().clone()));
            let wait = midnight.map_or(0, |midnight| now.duration_until(&midnight).as_secs());
            Self {
                second: started.elapsed().as_secs(),
                day: since.get_days().into(),
                midnight_in: Duration::from_secs(wait.unsigned_abs().max(1)),
            }
        }
    }
}

/// What was used of a day, by everybody who has a limit of it.
#[derive(Default)]
pub struct Days {
    path: Option<PathBuf>,
    day: i64,
    /// As the file had it last.
    kept: BTreeMap<Who, u64>,
    /// What is being added to the file.
    keeping: BTreeMap<Who, i64>,
    /// What is to be added to it.
    change: BTreeMap<Who, i64>,
    /// The part of all that that is reserved and not paid.
    reserved: BTreeMap<Who, u64>,
    /// What was told of a file that cannot be written.
    told: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    /// Days since 1970.
    day: i64,
    /// Tokens by key and person, who is `""` where a key stands for itself.
    used: BTreeMap<String, BTreeMap<String, u64>>,
}

impl Days {
    /// Keeps nothing on disk.
    pub fn none() -> Self {
        Self::default()
    }

    /// Keeps it in a file, which need not be there.
    pub fn at(path: PathBuf) -> Self {
        let contents = read(&path).unwrap_or_else(|error| {
            line(format_args!("warning: what was used today is not known, and counted from 0: {error:#}"));
            Contents::default()
        });
        Self { path: Some(path), day: contents.day, kept: contents.by_who(), ..Self::default() }
    }

    /// Keeps it in the data directory.
    pub fn of_home() -> Self {
        registry::data_directory().map_or_else(Self::none, |data| Self::at(data.join("serve").join(FILE)))
    }

    /// Begins another day, if it is one.
    fn look(&mut self, day: i64) {
        if day > self.day {
            self.kept.clear();
            self.keeping.clear();
            // What is running is paid on the day on which it ends.
            let signed = |(who, tokens): (&Who, &u64)| (who.clone(), i64::try_from(*tokens).unwrap_or(i64::MAX));
            self.change = self.reserved.iter().map(signed).collect();
        }
        self.day = day;
    }

    /// Tokens that were paid today.
    pub(super) fn used(&mut self, who: &Who, day: i64) -> u64 {
        self.look(day);
        let changes = [&self.keeping, &self.change].map(|map| map.get(who).copied().unwrap_or(0));
        let kept = self.kept.get(who).copied().unwrap_or(0);
        let all = changes.into_iter().fold(kept, u64::saturating_add_signed);
        all.saturating_sub(self.reserved(who))
    }

    /// Tokens that are reserved and not paid.
    pub(super) fn reserved(&self, who: &Who) -> u64 {
        self.reserved.get(who).copied().unwrap_or(0)
    }

    /// The number of those who are counted today.
    pub(super) fn people(&mut self, day: i64) -> usize {
        self.look(day);
        self.kept.len() + self.change.len()
    }

    pub(super) fn reserve(&mut self, who: &Who, tokens: u64) {
        let reserved = self.reserved.entry(who.clone()).or_default();
        *reserved = reserved.saturating_add(tokens);
        self.add(who, i64::try_from(tokens).unwrap_or(i64::MAX));
    }

    pub(super) fn pay(&mut self, who: &Who, reserved: u64, paid: u64, day: i64) {
        self.look(day);
        if let Some(all) = self.reserved.get_mut(who) {
            *all = all.saturating_sub(reserved);
            if *all == 0 {
                self.reserved.remove(who);
            }
        }
        let signed = |tokens| i64::try_from(tokens).unwrap_or(i64::MAX);
        self.add(who, signed(paid) - signed(reserved));
    }

    fn add(&mut self, who: &Who, tokens: i64) {
        let change = self.change.entry(who.clone()).or_default();
        *change = change.saturating_add(tokens);
    }

    /// Takes what has changed, to be written without this value. `None`: nothing has, or it is being written.
    pub(super) fn begin_keep(&mut self, day: i64) -> Option<Keeping> {
        self.look(day);
        let path = self.path.clone().filter(|_| !self.change.is_empty() && self.keeping.is_empty())?;
        self.keeping = std::mem::take(&mut self.change);
        Some(Keeping { path, day, change: self.keeping.clone(), all: Ok(BTreeMap::new()) })
    }

    /// Takes what is in the file now. Returns what is to be told of a file that could not be written, the first time.
    pub(super) fn end_keep(&mut self, kept: Keeping) -> Option<String> {
        let mut tells = None;
        match kept.all {
            Ok(all) if kept.day == self.day => (self.kept, self.told) = (all, None),
            Ok(_) => {}
            Err(problem) => {
                let is_told = self.told.as_ref() == Some(&problem);
                tells = (!is_told).then(|| format!("warning: what is used today is not kept on disk: {problem}"));
                self.told = Some(problem);
                for (who, tokens) in std::mem::take(&mut self.keeping) {
                    self.add(&who, tokens);
                }
            }
        }
        self.keeping.clear();
        tells
    }
}

/// A change on its way to the disk.
pub(super) struct Keeping {
    path: PathBuf,
    day: i64,
    change: BTreeMap<Who, i64>,
    all: Result<BTreeMap<Who, u64>, String>,
}

impl Keeping {
    /// Adds it to what is in the file.
    pub(super) fn run(mut self) -> Self {
        self.all = self.add().map_err(|error| format!("{error:#}"));
        self
    }

    fn add(&self) -> Result<BTreeMap<Who, u64>> {
        let directory = self.path.parent().context("a file has a directory")?;
        make_directory(directory)?;
        let _lock = Lock::take(directory, &mut |note| line(note))?;
        let contents = read(&self.path).unwrap_or_default();
        let mut all = if self.day > contents.day { BTreeMap::new() } else { contents.by_who() };
        for (who, tokens) in &self.change {
            let used = all.entry(who.clone()).or_default();
            *used = used.saturating_add_signed(*tokens);
        }
        let mut used = BTreeMap::<String, BTreeMap<String, u64>>::new();
        for (who, tokens) in &all {
            used.entry(who.key.clone()).or_default().insert(who.user.clone().unwrap_or_default(), *tokens);
        }
        replace_file(&self.path, &serde_json::to_vec(&Contents { day: self.day, used })?)?;
        Ok(all)
    }
}

impl Contents {
    fn by_who(self) -> BTreeMap<Who, u64> {
        let person = |key: String| {
            move |(user, tokens): (String, u64)| {
                (Who { key: key.clone(), user: Some(user).filter(|user| !user.is_empty()) }, tokens)
            }
        };
        self.used.into_iter().flat_map(|(key, people)| people.into_iter().map(person(key))).collect()
    }
}

fn read(path: &std::path::Path) -> Result<Contents> {
    if !path.exists() {
        return Ok(Contents::default());
    }
    let text = read_text(path, FILE_BYTES_MAX)?;
    serde_json::from_str(&text).with_context(|| format!("{}: this is not what `homeroom serve` writes", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(user: Option<&str>) -> Who {
        Who { key: "k".into(), user: user.map(str::to_owned) }
    }

    fn keep(days: &mut Days, day: i64) -> Option<String> {
        let job = days.begin_keep(day)?;
        days.end_keep(job.run())
    }

    #[test]
    fn a_day_goes_on_after_a_restart_and_ends_at_midnight() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("serve").join(FILE);
        let mut days = Days::at(path.clone());
        days.look(5);
        days.reserve(&who(None), 100);
        days.reserve(&who(Some("u")), 7);
        assert_eq!((days.used(&who(None), 5), days.reserved(&who(None))), (0, 100));
        keep(&mut days, 5);
        assert_eq!(Days::at(path.clone()).used(&who(None), 5), 100, "a server that is killed gives nothing back");
        days.pay(&who(None), 100, 30, 5);
        assert_eq!((days.used(&who(None), 5), days.reserved(&who(None))), (30, 0));
        // A second server beside it.
        let mut beside = Days::at(path.clone());
        beside.look(5);
        beside.reserve(&who(None), 5);
        beside.pay(&who(None), 5, 5, 5);
        keep(&mut beside, 5);
        keep(&mut days, 5);
        assert_eq!(days.used(&who(None), 5), 35);
        // The clock is set back, over two midnights.
        let mut back = Days::at(path.clone());
        assert_eq!(back.used(&who(None), 3), 35);
        back.reserve(&who(None), 1);
        keep(&mut back, 3);
        assert_eq!(Days::at(path.clone()).used(&who(None), 3), 36);
        // What runs over midnight is paid on the day on which it ends.
        assert_eq!(days.used(&who(Some("u")), 6), 0);
        days.pay(&who(Some("u")), 7, 4, 6);
        keep(&mut days, 6);
        let mut next = Days::at(path);
        assert_eq!((next.used(&who(Some("u")), 6), next.used(&who(None), 6)), (4, 0));
        Ok(())
    }

    #[test]
    fn what_cannot_be_written_is_counted_all_the_same() -> Result<()> {
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("file"), "")?;
        let mut days = Days::at(directory.path().join("file").join(FILE));
        days.look(5);
        days.reserve(&who(None), 9);
        days.pay(&who(None), 9, 9, 5);
        let told = keep(&mut days, 5).expect("it is told");
        assert!(told.starts_with("warning: what is used today is not kept on disk: "), "{told}");
        assert_eq!((days.used(&who(None), 5), keep(&mut days, 5)), (9, None), "it is told once");
        Ok(())
    }

    #[test]
    fn midnight_is_within_a_day() {
        let now = Now::clock()();
        assert!(now.day > 20_000 && now.midnight_in <= Duration::from_secs(26 * 3600), "{now:?}");
    }
}
