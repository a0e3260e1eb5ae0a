//! The file of keys: `keys.json` in `$HOMEROOM_HOME`, for its owner alone. It holds the SHA-256 of each key and never a key.

use std::fmt::{self, Debug, Formatter};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::files::{read_text, replace_file};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::limits::Limits;
use crate::hex::hex;
use crate::random;
use crate::registry::{self, when};
use crate::toml_problems::near;

/// Its name in the data directory.
pub const KEYS_FILE: &str = "keys.json";
/// Largest file: some ten thousand keys.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// What every key begins with, so that people and scanners for secrets know it.
const PREFIX: &str = "sk-hr-";
/// Random bytes of a key.
const KEY_BYTES: usize = 32;
/// Characters of a key that are kept to tell it by.
const BEGINNING: usize = PREFIX.len() + 4;

/// The SHA-256 of a key. It is not printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct KeyDigest(String);

impl KeyDigest {
    fn of(key: &str) -> Self {
        Self(hex(&Sha256::digest(key)))
    }

    /// Returns whether both are equal, in a time that does not depend on where they differ.
    fn is(&self, other: &Self) -> bool {
        let (a, b) = (self.0.as_bytes(), other.0.as_bytes());
        let differ = a.iter().zip(b).fold(0, |differ, (a, b)| std::hint::black_box(differ | (a ^ b)));
        a.len() == b.len() && differ == 0
    }
}

impl Debug for KeyDigest {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// A key: who has it may use the server as it says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Its name, to which belongs what is made with it.
    pub name: String,
    /// Its first characters, to tell it by.
    pub begins: String,
    sha256: KeyDigest,
    /// When it was made.
    pub added: String,
    /// The models that it may use; `None`: all that are served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routes: Option<Vec<String>>,
    /// How much may be asked with it. If it is trusted to name people, this holds for each of them.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
    /// Whether it is trusted to name the person for whom it asks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trust_forwarded: bool,
}

impl Key {
    /// Makes a key of 256 random bits. Returns it, and the text that is shown once.
    ///
    /// # Errors
    /// When the name is none, or the system has no random numbers.
    pub fn make(name: &str) -> Result<(Self, String)> {
        ensure!(
            registry::is_name(name),
            "`{name}`: a key's name consists of the letters a to z, digits, and . _ - in between, at most 64"
        );
        let text = format!("{PREFIX}{}", hex(&random::bytes::<KEY_BYTES>()?));
        let key = Self {
            name: name.to_owned(),
            begins: text[..BEGINNING].to_owned(),
            sha256: KeyDigest::of(&text),
            added: when::text(SystemTime::now()),
            routes: None,
            limits: Limits::default(),
            trust_forwarded: false,
        };
        Ok((key, text))
    }

    /// Returns true if it may use a model.
    pub fn may_use(&self, model: &str) -> bool {
        self.routes.is_none() || self.names(model)
    }

    /// Returns true if it names a model among those that it may use.
    pub fn names(&self, model: &str) -> bool {
        self.routes.as_ref().is_some_and(|routes| routes.iter().any(|route| route == model))
    }
}

/// Finds the key that a text is. All are compared, so that the time tells nothing.
pub(super) fn find<'a>(keys: &'a [Key], text: &str) -> Option<&'a Key> {
    let given = KeyDigest::of(text);
    keys.iter().fold(None, |found, key| if key.sha256.is(&given) { Some(key) } else { found })
}

/// Where the keys are.
///
/// # Errors
/// When there is no data directory.
pub fn place() -> Result<PathBuf> {
    let data = registry::data_directory().context("there is no data directory for keys; set HOMEROOM_HOME")?;
    Ok(data.join(KEYS_FILE))
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    keys: Vec<Key>,
}

/// Reads the keys; of a file that is not there, none.
///
/// # Errors
/// When it cannot be read, others can read or change it, or it is not what this program writes.
pub fn read(path: &Path) -> Result<Vec<Key>> {
    let place = || format!("{}: the keys cannot be read", path.display());
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(place),
        Ok(about) => is_private(path, &about)?,
    }
    let text = read_text(path, FILE_BYTES_MAX).with_context(place)?;
    // What stands there is not quoted.
    let contents: Contents = serde_json::from_str(&text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        anyhow::anyhow!(
            "{}: line {line}, column {column}: this is not what `homeroom keys` writes\nhint: put it right, or move it away and make new keys with `homeroom keys add NAME`",
            path.display()
        )
    })?;
    for (at, key) in contents.keys.iter().enumerate() {
        if contents.keys[..at].iter().any(|other| other.name == key.name) {
            bail!("{}: there are two keys `{}`; remove one", path.display(), key.name);
        }
    }
    Ok(contents.keys)
}

#[cfg(unix)]
fn is_private(path: &Path, about: &std::fs::Metadata) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let path = path.display();
    ensure!(
        about.mode() & 0o077 == 0,
        "{path}: others than its owner can read or change the keys\nhint: chmod 600 {path}"
    );
    Ok(())
}

#[cfg(not(unix))]
fn is_private(_: &Path, _: &std::fs::Metadata) -> Result<()> {
    Ok(())
}

/// Adds a key.
///
/// # Errors
/// When there is one of its name, or the file cannot be read or written.
pub fn add(path: &Path, key: Key) -> Result<()> {
    let _lock = registry::lock()?;
    let mut keys = read(path)?;
    ensure!(
        keys.iter().all(|other| other.name != key.name),
        "there is a key `{}` already\nhint: `homeroom keys rm {0}` ends it; its text cannot be shown again",
        key.name
    );
    keys.push(key);
    write(path, keys)
}

/// Removes a key.
///
/// # Errors
/// When there is none of that name, or the file cannot be read or written.
pub fn remove(path: &Path, name: &str) -> Result<()> {
    let _lock = registry::lock()?;
    let mut keys = read(path)?;
    let count = keys.len();
    keys.retain(|key| key.name != name);
    if keys.len() == count {
        let names: Vec<&str> = keys.iter().map(|key| key.name.as_str()).collect();
        bail!("there is no key `{name}`, {}", near(name, &names));
    }
    write(path, keys)
}

fn write(path: &Path, keys: Vec<Key>) -> Result<()> {
    let text = serde_json::to_string_pretty(&Contents { keys })?;
    replace_file(path, format!("{text}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_by_its_text_and_never_printed() -> Result<()> {
        let (first, text) = Key::make("class-7b")?;
        let (second, other) = Key::make("moodle")?;
        assert_eq!((text.len(), &text[..6]), (PREFIX.len() + 64, PREFIX));
        let keys = [first, second];
        assert_eq!(find(&keys, &text).map(|key| key.name.as_str()), Some("class-7b"));
        assert_eq!(find(&keys, &other).map(|key| key.name.as_str()), Some("moodle"));
        for wrong in ["", PREFIX, &text[..text.len() - 1], &text.to_uppercase(), &keys[0].sha256.0] {
            assert_eq!(find(&keys, wrong), None, "{wrong}");
        }
        let printed = format!("{keys:?}");
        assert!(!printed.contains(&keys[0].sha256.0) && !printed.contains(&text[BEGINNING..]), "{printed}");
        Ok(())
    }

    #[test]
    fn names_are_those_of_models() {
        for bad in ["", "Class", "a b", "../x", "é", &"x".repeat(65)] {
            assert!(Key::make(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join(KEYS_FILE);
        assert_eq!(read(&path)?, []);
        let (mut key, _) = Key::make("a")?;
        key.routes = Some(vec!["tutor".into()]);
        key.limits = Limits { tokens_per_day: Some(5), ..Limits::default() };
        key.trust_forwarded = true;
        write(&path, vec![key.clone(), Key::make("b")?.0])?;
        let keys = read(&path)?;
        assert_eq!((&keys[0], keys.len()), (&key, 2));
        assert!(key.may_use("tutor") && !key.may_use("other") && keys[1].may_use("other"));
        let text = std::fs::read_to_string(&path)?;
        for wrong in [
            "",
            "{",
            "[]",
            "{\"keys\":[{}]}",
            &text.replace("trust_forwarded", "trust"),
            &text.replace("\"b\"", "\"a\""),
        ] {
            std::fs::write(&path, wrong)?;
            let refused = format!("{:#}", read(&path).expect_err(wrong));
            assert!(refused.contains("keys.json") && !refused.contains(&key.sha256.0), "{refused}");
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            write(&path, vec![key])?;
            assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640))?;
            assert!(format!("{:#}", read(&path).expect_err("it is open")).contains("hint: chmod 600"));
        }
        Ok(())
    }
}
