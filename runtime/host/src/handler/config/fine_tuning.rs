//! `[fine_tuning]` of a file of handlers: who may be trained here, and what that may take.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::models::last_part;
use crate::progress::thousands;
use crate::toml_problems::Problems;

/// The keys of the table. None of their values is a secret.
pub const KEYS: [&str; 10] = [
    "bases",
    "keys",
    "threads",
    "niceness",
    "queue",
    "file_mib_max",
    "files_mib_max",
    "key_files_mib_max",
    "key_uploads",
    "key_jobs",
];

/// Files that are sent at once.
pub const UPLOADS_MAX: usize = 4;

/// How much is kept of the files that clients send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one file.
    pub file_bytes: u64,
    /// Bytes of all files.
    pub all_bytes: u64,
    /// Bytes of all files of a key. Where no key is wanted, nobody has a share.
    pub key_bytes: u64,
    /// Files that are sent with a key at once.
    pub key_uploads: usize,
}

/// What `[fine_tuning]` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `bases`: the models that may be trained, by the names that clients give.
    pub bases: BTreeMap<String, PathBuf>,
    /// `keys`: the names of the keys that may train; `None`: all.
    pub keys: Option<Vec<String>>,
    /// `threads`: that a training computes with; `None`: all.
    pub threads: Option<usize>,
    /// `niceness`: 0 competes with answers as an equal, 19 takes what they leave.
    pub niceness: u8,
    /// `queue`: jobs that may wait.
    pub queue: usize,
    /// `key_jobs`: jobs of a key that have not ended. Where no key is wanted, nobody has a share.
    pub key_jobs: usize,
    /// `file_mib_max`, `files_mib_max`, `key_files_mib_max` and `key_uploads`.
    pub files: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        let (file_bytes, all_bytes) = (512 << 20, 4 << 30);
        let files = Limits { file_bytes, all_bytes, key_bytes: share(file_bytes, all_bytes), key_uploads: 2 };
        Self { bases: BTreeMap::new(), keys: None, threads: None, niceness: 10, queue: 16, key_jobs: 4, files }
    }
}

impl Settings {
    /// The same, and a model may be trained: by the name that it was given, and by the last part of a path.
    #[must_use]
    pub fn with_base(mut self, name: &str, model: &Path) -> Self {
        let short = last_part(Path::new(name)).filter(|short| !short.is_empty());
        // What was said in full wins over what is only the end of another.
        if let Some(short) = short {
            self.bases.entry(short).or_insert_with(|| model.to_owned());
        }
        self.bases.insert(name.to_owned(), model.to_owned());
        self
    }

    /// What a key may take, in words.
    pub fn of_key(&self) -> String {
        let Limits { key_bytes, key_uploads, .. } = self.files;
        let mib = thousands(usize::try_from(key_bytes >> 20).unwrap_or(usize::MAX));
        format!(
            "each key: {mib} MiB of files, files sent at once: {key_uploads}, jobs that have not ended: {}",
            self.key_jobs
        )
    }

    /// Reads the table of the file at `path`, if it has one.
    pub fn read<'a>(problems: &mut Problems<'a>, path: &Path, root: &DeTable<'a>) -> Option<Self> {
        let value = root.get("fine_tuning")?;
        let Some(table) = value.get_ref().as_table() else {
            problems.wrong_type("fine_tuning", value, "a table, [fine_tuning]");
            return None;
        };
        problems.unknown_keys(table, &KEYS);
        let mut settings = Self::default();
        let mut int = |key: &str, range: RangeInclusive<i64>| {
            let given = problems.int(key, table.get(key)?, range)?;
            Some(given.unsigned_abs())
        };
        settings.threads = int("threads", 1..=1024).map(|threads| threads as usize);
        settings.niceness = int("niceness", 0..=19).map_or(settings.niceness, |niceness| niceness as u8);
        settings.queue = int("queue", 1..=1000).map_or(settings.queue, |queue| queue as usize);
        let mib = |given: Option<u64>, usual: u64| given.map_or(usual, |mib| mib << 20);
        settings.files.file_bytes = mib(int("file_mib_max", 1..=1 << 20), settings.files.file_bytes);
        settings.files.all_bytes = mib(int("files_mib_max", 1..=1 << 30), settings.files.all_bytes);
        let usual = share(settings.files.file_bytes, settings.files.all_bytes);
        settings.files.key_bytes = mib(int("key_files_mib_max", 1..=1 << 30), usual);
        let uploads = int("key_uploads", 1..=UPLOADS_MAX as i64);
        settings.files.key_uploads = uploads.map_or(settings.files.key_uploads, |most| most as usize);
        settings.key_jobs = int("key_jobs", 1..=1000).map_or(settings.key_jobs, |most| most as usize);
        let Some(bases) = table.get("bases") else {
            problems.at(
                value.span(),
                "[fine_tuning]: `bases` is missing; it lists the models that may be trained: bases = [\"…\"]",
            );
            return None;
        };
        settings.keys = table.get("keys").map(|keys| names(problems, "keys", keys));
        for name in names(problems, "bases", bases) {
            let beside = path.parent().map(|dir| dir.join(&name)).filter(|beside| beside.exists());
            let model =
                beside.and_then(|beside| std::path::absolute(beside).ok()).unwrap_or_else(|| PathBuf::from(&name));
            settings = settings.with_base(&name, &model);
        }
        Some(settings)
    }
}

/// The usual share of a key of all files: a quarter, and room for one that is as large as a file may be.
fn share(file_bytes: u64, all_bytes: u64) -> u64 {
    (all_bytes / 4).max(file_bytes).min(all_bytes)
}

fn names<'a>(problems: &mut Problems<'a>, key: &str, list: &Spanned<DeValue<'a>>) -> Vec<String> {
    let Some(items) = list.get_ref().as_array() else {
        problems.wrong_type(key, list, "a list of names");
        return Vec::new();
    };
    if items.is_empty() {
        problems.at(list.span(), format!("`{key}`: the list is empty; name at least one"));
    }
    items.iter().filter_map(|item| problems.text(key, item)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<Settings>, String> {
        let mut problems = Problems::new(Path::new("h.toml"), text);
        let root = problems.parse();
        let settings = Settings::read(&mut problems, Path::new("h.toml"), &root);
        problems.into_result().map(|()| settings).map_err(|error| error.to_string())
    }

    #[test]
    fn the_table_says_who_may_be_trained() -> Result<(), String> {
        assert_eq!(read("[handlers.x]\n")?, None);
        let settings = read("[fine_tuning]\nbases = [\"owner/tiny\", \"tutor\"]\nthreads = 1\nfile_mib_max = 3\n")?;
        let settings = settings.ok_or("it is there")?;
        assert_eq!(settings.bases.keys().collect::<Vec<_>>(), ["owner/tiny", "tiny", "tutor"]);
        assert_eq!(settings.bases["tiny"], Path::new("owner/tiny"));
        assert_eq!((settings.threads, settings.niceness, settings.files.file_bytes), (Some(1), 10, 3 << 20));
        let usual = settings.of_key();
        assert_eq!(usual, "each key: 1,024 MiB of files, files sent at once: 2, jobs that have not ended: 4");
        let shares = "file_mib_max = 900\nfiles_mib_max = 2000\nkey_uploads = 1\nkey_jobs = 7\n";
        let of_key = |more: &str| -> Result<String, String> {
            let settings = read(&format!("[fine_tuning]\nbases = [\"a\"]\n{shares}{more}"))?;
            Ok(settings.ok_or("it is there")?.of_key())
        };
        assert!(
            of_key("")?.starts_with("each key: 900 MiB of files, files sent at once: 1, jobs that have not ended: 7")
        );
        assert!(of_key("key_files_mib_max = 300\n")?.starts_with("each key: 300 MiB"));
        let all =
            read("[fine_tuning]\nbase = [\"x\"]\nthreads = 0\nniceness = -1\nqueue = \"many\"\nkey_uploads = 9\n")
                .expect_err("it is wrong");
        for words in [
            "`base`: unknown key, did you mean `bases`?",
            "`threads`: should be from 1",
            "`niceness`: should be from 0 to 19",
            "`queue`: is a text",
            "`key_uploads`: should be from 1 to 4",
            "`bases` is missing",
        ] {
            assert!(all.contains(words), "{words}\n{all}");
        }
        assert!(read("[fine_tuning]\nbases = []\n").expect_err("it is empty").contains("name at least one"));
        Ok(())
    }
}
