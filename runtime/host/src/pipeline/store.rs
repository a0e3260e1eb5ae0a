//! The step store: what a verb made, under the SHA-256 of all that went into it.
//!
//! A pipeline is a build. A verb that was called before with the same inputs is not run again: its result is looked up, in whichever run made
//! it. What went in is said by the callers as JSON, in which models, rows, plugins and callbacks are digests; the program and what it
//! computes with are added here. An entry is `runs/<id>/steps/<hash>.json`, with the result and the digests of the files that belong
//! to it: if one of these is gone or altered, the entry counts for nothing and the result is made anew.
//!
//! Rows are not kept: to read them is to know their digest, so that `prepare_dataset` reads its file in each run and is a part of the
//! key of what uses its rows.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use homeroom_engine::files::{digest, make_directory, read_text, replace_file};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::bytecode::hex;
use crate::registry::{self, when};

/// Name of the directory of a run that holds its entries.
const DIRECTORY: &str = "steps";
/// Longest entry that is read.
const ENTRY_BYTES_MAX: u64 = 64 << 20;

/// What went into a verb.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    verb: &'static str,
    inputs: Value,
    hash: String,
    /// Whether it is known which program computes: if not, nothing is found or kept.
    is_whole: bool,
}

/// A verb's inputs as a key; with them go the program, and the way it computes on this processor.
pub fn key(verb: &'static str, inputs: Value) -> Key {
    let isa = homeroom_kernels::isa();
    let computes = json!({"processor": isa.name(), "prefers_bf16": isa.prefers_bf16()});
    key_of(program(), verb, json!({"verb": verb, "program": program(), "computes": computes, "inputs": inputs}))
}

fn key_of(program: Option<&str>, verb: &'static str, inputs: Value) -> Key {
    let hash = hex(&Sha256::digest(canonical(&inputs)));
    Key { verb, inputs, hash, is_whole: program.is_some() }
}

impl Key {
    /// Its SHA-256, as small hexadecimal digits.
    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// The program that computes: its version, and the digest of its file, since one that was built anew may compute otherwise. `None`: its
/// file cannot be read. It is read once, and a run asks for it when it begins, before the file is likely to be replaced.
pub fn program() -> Option<&'static str> {
    static PROGRAM: OnceLock<Option<String>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        // The file that runs, whatever has its name by now. Elsewhere there is only the name.
        let file = match cfg!(target_os = "linux") {
            true => PathBuf::from("/proc/self/exe"),
            false => std::env::current_exe().ok()?.canonicalize().ok()?,
        };
        let digests = digest::of_files(&[file], registry::kept_digests().as_deref()).ok()?;
        Some(format!("{} {}", env!("CARGO_PKG_VERSION"), digests.into_values().next()?))
    });
    program.as_deref()
}

/// JSON in one form: keys in order, no spaces.
pub fn canonical(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_by_key(|(name, _)| *name);
            let fields = fields.into_iter().map(|(name, value)| format!("{}:{}", json!(name), canonical(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(",")),
        plain => plain.to_string(),
    }
}

/// The SHA-256 of JSON in its one form.
pub fn digest_of(value: &Value) -> String {
    format!("sha256:{}", hex(&Sha256::digest(canonical(value))))
}

/// What a verb made before.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The run that made it.
    pub run: String,
    /// What came of it.
    pub result: Value,
    /// Seconds that it took then.
    pub seconds: f64,
}

/// An entry on the disk.
#[derive(Serialize, Deserialize)]
struct Record {
    verb: String,
    made: String,
    seconds: f64,
    result: Value,
    /// SHA-256 of each file that belongs to the result; paths below the run's directory, or absolute ones.
    files: Map<String, Value>,
    inputs: Value,
}

/// The entries of all runs.
pub struct Store {
    runs: Option<PathBuf>,
    fresh: bool,
}

impl Store {
    /// The runs below a directory. `fresh`: nothing is found, and what is put replaces what other runs have.
    pub fn new(runs: Option<PathBuf>, fresh: bool) -> Self {
        Self { runs, fresh }
    }

    /// What was made of the same inputs, the latest first, with all its files as they were then.
    pub fn find(&self, key: &Key) -> Option<Entry> {
        if self.fresh || !key.is_whole {
            return None;
        }
        let mut found: Vec<(Option<SystemTime>, PathBuf, PathBuf)> = self
            .entries(key)
            .map(|(run, file)| (fs::metadata(&file).and_then(|about| about.modified()).ok(), run, file))
            .collect();
        found.sort_by(|a, b| b.cmp(a));
        found.into_iter().find_map(|(_, run, file)| sound(key, &run, &file))
    }

    fn entries(&self, key: &Key) -> impl Iterator<Item = (PathBuf, PathBuf)> {
        let runs = self.runs.iter().flat_map(|runs| fs::read_dir(runs).into_iter().flatten().flatten());
        let name = format!("{}.json", key.hash);
        runs.filter_map(move |run| {
            let file = run.path().join(DIRECTORY).join(&name);
            file.is_file().then(|| (run.path(), file))
        })
    }

    /// Keeps a result in a run's directory, with the digests of its files.
    ///
    /// # Errors
    /// When a file cannot be read, that of the program too, or the entry cannot be written.
    pub fn put(&self, run: &Path, key: &Key, result: Value, files: &[PathBuf], seconds: f64) -> Result<()> {
        ensure!(key.is_whole, "the program's own file cannot be read, so that nobody knows which program made it");
        let mut digests = Map::new();
        for file in files {
            let name = file.strip_prefix(run).unwrap_or(file).to_str().context("a path is no text")?.to_owned();
            digests.insert(name, digest_of_file(file)?.into());
        }
        let record = Record {
            verb: key.verb.to_owned(),
            made: when::text(SystemTime::now()),
            seconds,
            result,
            files: digests,
            inputs: key.inputs.clone(),
        };
        let directory = run.join(DIRECTORY);
        make_directory(&directory)?;
        let file = directory.join(format!("{}.json", key.hash));
        replace_file(&file, format!("{:#}\n", serde_json::to_value(&record)?).as_bytes())?;
        if self.fresh {
            for (_, other) in self.entries(key).filter(|(_, other)| *other != file) {
                // One that stays is older, and comes second.
                let _ = fs::remove_file(other);
            }
        }
        Ok(())
    }
}

/// An entry, if it is of this key and its files are as they were.
fn sound(key: &Key, run: &Path, file: &Path) -> Option<Entry> {
    let record: Record = serde_json::from_str(&read_text(file, ENTRY_BYTES_MAX).ok()?).ok()?;
    if canonical(&record.inputs) != canonical(&key.inputs) {
        return None;
    }
    for (name, digest) in &record.files {
        if digest_of_file(&run.join(name)).ok()? != digest.as_str()? {
            return None;
        }
    }
    let run = run.file_name()?.to_str()?.to_owned();
    Some(Entry { run, result: record.result, seconds: record.seconds })
}

/// The SHA-256 of a file, computed once and kept.
///
/// # Errors
/// When it cannot be read.
pub fn digest_of_file(file: &Path) -> Result<String> {
    let digests = digest::of_files(&[file.to_owned()], registry::kept_digests().as_deref())?;
    digests.into_values().next().with_context(|| format!("{}: it has no digest", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs() -> Result<(tempfile::TempDir, PathBuf, PathBuf)> {
        let place = tempfile::tempdir()?;
        let [first, second] = ["geo-1", "geo-2"].map(|name| place.path().join(name));
        fs::create_dir_all(&first)?;
        fs::create_dir_all(&second)?;
        Ok((place, first, second))
    }

    #[test]
    fn a_result_is_found_by_what_went_into_it_in_whichever_run_made_it() -> Result<()> {
        let (place, first, _) = runs()?;
        let store = Store::new(Some(place.path().to_owned()), false);
        let inputs = json!({"rate": 0.5, "rows": "sha256:0"});
        let same = key("evaluate", json!({"rows": "sha256:0", "rate": 0.5}));
        assert_eq!(store.find(&same), None);
        store.put(&first, &key("evaluate", inputs.clone()), json!({"loss": 1.5}), &[], 2.5)?;
        let entry = Entry { run: "geo-1".to_owned(), result: json!({"loss": 1.5}), seconds: 2.5 };
        assert_eq!(store.find(&same), Some(entry));
        assert_eq!(store.find(&key("evaluate", json!({"rows": "sha256:0", "rate": 0.25}))), None);
        assert_eq!(store.find(&key("generate", inputs)), None);
        // A file that somebody renamed is none of another key.
        let other = key("evaluate", json!({"x": 1}));
        let steps = first.join(DIRECTORY);
        fs::copy(steps.join(format!("{}.json", same.hash())), steps.join(format!("{}.json", other.hash())))?;
        assert_eq!(store.find(&other), None);
        Ok(())
    }

    #[test]
    fn a_result_whose_files_are_gone_or_altered_is_none() -> Result<()> {
        let (place, first, second) = runs()?;
        let store = Store::new(Some(place.path().to_owned()), false);
        let key = key("fine_tune", json!({"rows": 1}));
        let made = |run: &Path, bytes: &str| -> Result<PathBuf> {
            let file = run.join("adapters/1/weights");
            fs::create_dir_all(run.join("adapters/1"))?;
            fs::write(&file, bytes)?;
            Ok(file)
        };
        let weights = made(&first, "one")?;
        store.put(&first, &key, json!("first"), std::slice::from_ref(&weights), 1.0)?;
        let elsewhere = place.path().join("elsewhere");
        fs::write(&elsewhere, "x")?;
        store.put(&second, &key, json!("second"), &[made(&second, "two")?, elsewhere.clone()], 1.0)?;
        let found = || store.find(&key).map(|entry| entry.result);
        // The latest is taken, and an older one where it is damaged.
        fs::File::options()
            .append(true)
            .open(second.join(DIRECTORY).join(format!("{}.json", key.hash())))?
            .set_modified(SystemTime::now() + std::time::Duration::from_secs(5))?;
        assert_eq!(found(), Some(json!("second")));
        fs::write(&elsewhere, "y")?;
        assert_eq!(found(), Some(json!("first")));
        fs::write(&weights, "ono")?;
        assert_eq!(found(), None);
        fs::write(&weights, "one")?;
        assert_eq!(found(), Some(json!("first")));
        fs::remove_file(&weights)?;
        assert_eq!(found(), None);
        Ok(())
    }

    /// It cannot be told from another program, which may compute otherwise.
    #[test]
    fn a_program_that_cannot_be_told_finds_and_keeps_nothing() -> Result<()> {
        let (place, first, second) = runs()?;
        let store = Store::new(Some(place.path().to_owned()), false);
        let inputs = json!({"verb": "evaluate", "program": null});
        let [known, unknown] = [Some("1"), None].map(|program| key_of(program, "evaluate", inputs.clone()));
        assert!(store.put(&first, &unknown, json!(1), &[], 1.0).is_err());
        assert_eq!(store.find(&known), None);
        store.put(&second, &known, json!(1), &[], 1.0)?;
        assert!(store.find(&known).is_some() && store.find(&unknown).is_none());
        // This one can be told, by what runs and not by the name that it was started under.
        assert!(program().is_some_and(|program| program.contains(" sha256:")), "{:?}", program());
        Ok(())
    }

    #[test]
    fn a_fresh_run_finds_nothing_and_replaces_what_there_is() -> Result<()> {
        let (place, first, second) = runs()?;
        let store = |fresh| Store::new(Some(place.path().to_owned()), fresh);
        let key = key("evaluate", json!({}));
        store(false).put(&first, &key, json!(1), &[], 1.0)?;
        assert_eq!(store(true).find(&key), None);
        store(true).put(&second, &key, json!(2), &[], 1.0)?;
        assert_eq!(
            store(false).find(&key).map(|entry| (entry.run, entry.result)),
            Some(("geo-2".to_owned(), json!(2)))
        );
        assert!(!first.join(DIRECTORY).join(format!("{}.json", key.hash())).exists());
        Ok(())
    }
}
