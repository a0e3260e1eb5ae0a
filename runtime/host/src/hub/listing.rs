//! What the hub says of a repository at a revision: its commit and its files. Nothing in it is trusted.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::HubName;
use super::digest::Digest;

/// Longest listing, in bytes.
pub(super) const BYTES_MAX: u64 = 16 << 20;
/// Most files of a repository.
const FILES_MAX: usize = 100_000;
/// Longest path, in bytes.
const PATH_BYTES_MAX: usize = 1024;
/// Largest file, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 44;
/// Longest name of a license, in characters.
const LICENSE_MAX: usize = 60;
/// Most licenses that are told.
const LICENSES_MAX: usize = 8;
/// Longest part of a path, in bytes: no file name can be longer, and a link is made beside it under another.
const PART_BYTES_MAX: usize = 255;

/// A repository at a commit.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    /// The name that it has now, if another one is still known.
    pub(super) id: Option<String>,
    pub(super) commit: String,
    pub(super) license: Option<String>,
    /// Its owner asks to accept terms before it is downloaded.
    pub(super) is_gated: bool,
    pub(super) files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RemoteFile {
    /// Its path in the repository, whose parts are names of files.
    pub(super) path: String,
    /// In bytes.
    pub(super) size: u64,
    pub(super) digest: Digest,
}

#[derive(Deserialize)]
struct Info {
    id: Option<String>,
    sha: Option<String>,
    #[serde(default)]
    gated: Loose,
    #[serde(default, rename = "cardData")]
    card: Option<Card>,
    #[serde(default)]
    siblings: Siblings,
}

#[derive(Deserialize)]
struct Card {
    #[serde(default)]
    license: Loose,
    #[serde(default)]
    license_name: Loose,
}

/// A value of which only `true`, a text, or the texts of a list matter. Whatever else it is, is read over and takes no memory.
#[derive(Default)]
struct Loose {
    is_true: bool,
    texts: Vec<String>,
}

/// Files, which are counted as they are read: a list without end is not held.
#[derive(Default)]
struct Siblings(Vec<Sibling>);

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Listing {
    /// Reads an answer to `/api/models/{repo}/revision/{revision}?blobs=true`.
    ///
    /// # Errors
    /// When it is none, a path in it could lead out of a directory, or a file has no size or digest.
    pub(super) fn parse(answer: &[u8]) -> Result<Self> {
        let info: Info = serde_json::from_slice(answer).context("the answer is no list of files")?;
        let commit = info.sha.filter(|sha| HubName::is_commit(sha)).context("the answer names no commit")?;
        let mut seen = BTreeSet::new();
        let mut files = Vec::with_capacity(info.siblings.0.len());
        for sibling in info.siblings.0 {
            let path = sibling.rfilename.clone();
            let quoted = || format!("{:?}", path.chars().take(80).collect::<String>());
            check_path(&path).with_context(|| format!("the list has a file {}", quoted()))?;
            ensure!(seen.insert(path.clone()), "the list has {} twice", quoted());
            files.push(sibling.read().with_context(quoted)?);
        }
        let mut sizes = HashMap::new();
        for file in &files {
            let size = *sizes.entry(&file.digest).or_insert(file.size);
            ensure!(size == file.size, "{:?} has the digest of a file of another size", file.path);
        }
        let total = files.iter().try_fold(0_u64, |sum, file| sum.checked_add(file.size));
        ensure!(total.is_some(), "the list has more bytes than can be counted");
        let id = info.id.filter(|id| HubName::parse(id).is_some_and(|name| name.repo == *id));
        let is_gated = info.gated.is_true || !info.gated.texts.is_empty();
        Ok(Self { id, commit, license: info.card.as_ref().and_then(license), is_gated, files })
    }

    /// The file of that path.
    pub(super) fn file(&self, path: &str) -> Option<&RemoteFile> {
        self.files.iter().find(|file| file.path == path)
    }
}

impl Sibling {
    fn read(self) -> Result<RemoteFile> {
        let (digest, size) = match self.lfs {
            Some(lfs) => (Digest::sha256(&lfs.sha256.context("no digest")?)?, lfs.size.or(self.size)),
            None => (Digest::git(&self.blob_id.context("no digest")?)?, self.size),
        };
        let size = size.context("no size")?;
        ensure!(size <= FILE_BYTES_MAX, "larger than any file");
        Ok(RemoteFile { path: self.rfilename, size, digest })
    }
}

/// Refuses a path whose parts are not all plain names of files.
fn check_path(path: &str) -> Result<()> {
    ensure!(path.len() <= PATH_BYTES_MAX, "whose path is too long");
    ensure!(!path.chars().any(|c| c.is_control() || c == '\\'), "whose path has a control character or a backslash");
    for part in path.split('/') {
        ensure!(!part.is_empty() && part != "." && part != "..", "whose path could lead out of its directory");
        ensure!(part.len() <= PART_BYTES_MAX, "whose name is too long");
        // A colon is a drive or a stream on Windows.
        ensure!(!cfg!(windows) || !part.contains(':'), "whose path has a colon");
    }
    Ok(())
}

/// The license of a model's card.
fn license(card: &Card) -> Option<String> {
    let text = |value: &Loose| Some(value.texts.join(", ")).filter(|text| !text.is_empty());
    let name = text(&card.license).filter(|name| name != "other").or_else(|| text(&card.license_name));
    let name = name.or_else(|| text(&card.license))?;
    let name: String = name.chars().filter(|c| !c.is_control()).take(LICENSE_MAX).collect();
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

impl<'de> Deserialize<'de> for Loose {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Loose;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_bool<E>(self, is_true: bool) -> Result<Loose, E> {
                Ok(Loose { is_true, texts: Vec::new() })
            }

            fn visit_str<E>(self, text: &str) -> Result<Loose, E> {
                Ok(Loose { is_true: false, texts: vec![text.chars().take(LICENSE_MAX).collect()] })
            }

            fn visit_i64<E>(self, _: i64) -> Result<Loose, E> {
                Ok(Loose::default())
            }

            fn visit_u64<E>(self, _: u64) -> Result<Loose, E> {
                Ok(Loose::default())
            }

            fn visit_f64<E>(self, _: f64) -> Result<Loose, E> {
                Ok(Loose::default())
            }

            fn visit_unit<E>(self) -> Result<Loose, E> {
                Ok(Loose::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Loose, A::Error> {
                let mut loose = Loose::default();
                // A list of lists would be as deep as it likes; of a license only texts count.
                while loose.texts.len() < LICENSES_MAX {
                    match list.next_element::<Text>()? {
                        Some(Text(text)) => loose.texts.extend(text),
                        None => return Ok(loose),
                    }
                }
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(loose)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Loose, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Loose::default())
            }
        }

        from.deserialize_any(Reader)
    }
}

/// A text, or something else that is read over.
#[derive(Deserialize)]
#[serde(from = "Loose")]
struct Text(Option<String>);

impl From<Loose> for Text {
    fn from(mut loose: Loose) -> Self {
        Self(loose.texts.pop())
    }
}

impl<'de> Deserialize<'de> for Siblings {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Siblings;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of files")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Siblings, A::Error> {
                let mut siblings = Vec::new();
                while let Some(sibling) = list.next_element()? {
                    if siblings.len() == FILES_MAX {
                        return Err(A::Error::custom(format!("the list has more than {FILES_MAX} files")));
                    }
                    siblings.push(sibling);
                }
                Ok(Siblings(siblings))
            }
        }

        from.deserialize_seq(Reader)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    const GIT: &str = "ce013625030ba8dba906f756967f9e9ca394464a";

    fn listing(siblings: Value) -> Result<Listing> {
        let card = json!({"license": "other", "license_name": "school\u{1b}[31m"});
        let info = json!({"id": "a/b", "sha": COMMIT, "gated": "auto", "cardData": card, "siblings": siblings});
        Listing::parse(info.to_string().as_bytes())
    }

    #[test]
    fn files_come_with_their_sizes_and_digests() -> Result<()> {
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let listing = listing(json!([
            {"rfilename": "1_Pooling/config.json", "size": 6, "blobId": GIT},
            {"rfilename": "model.safetensors", "size": 7, "blobId": GIT, "lfs": {"sha256": sha256, "size": 7, "pointerSize": 130}},
        ]))?;
        assert_eq!(listing.file("1_Pooling/config.json").map(|file| (file.size, file.digest.name())), Some((6, GIT)));
        assert_eq!(listing.file("model.safetensors").map(|file| file.digest.name()), Some(sha256));
        assert_eq!((listing.license.as_deref(), listing.is_gated), (Some("school[31m"), true));
        Ok(())
    }

    #[test]
    fn what_is_odd_in_a_card_is_read_over() -> Result<()> {
        let parse = |gated: Value, card: Value| {
            let info = json!({"sha": COMMIT, "gated": gated, "cardData": card, "siblings": []});
            Listing::parse(info.to_string().as_bytes())
        };
        for (license, told) in [
            (json!(["mit", 7, ["x"], {"a": [1]}, "apache-2.0"]), Some("mit, x, apache-2.0")),
            (json!({"deep": [[[{}]]]}), None),
            (json!(-1.5), None),
            (json!(null), None),
        ] {
            assert_eq!(
                parse(json!(false), json!({"license": license, "x": [[]]}))?.license.as_deref(),
                told,
                "{license}"
            );
        }
        assert_eq!(parse(json!(null), json!(null))?.license, None);
        for (gated, is_gated) in [
            (json!(true), true),
            (json!("manual"), true),
            (json!(false), false),
            (json!([]), false),
            (json!({}), false),
        ] {
            assert_eq!(parse(gated.clone(), json!({}))?.is_gated, is_gated, "{gated}");
        }
        Ok(())
    }

    #[test]
    fn a_list_of_too_many_files_is_refused_as_it_is_read() {
        // What follows the last file that is allowed is not looked at.
        let file = json!({"rfilename": "a", "size": 1, "blobId": GIT}).to_string();
        let text = format!("{{\"siblings\": [{}, no JSON", vec![file; FILES_MAX + 1].join(","));
        let told = format!("{:#}", Listing::parse(text.as_bytes()).expect_err("too many"));
        assert!(told.contains("more than 100000 files"), "{told}");
    }

    #[test]
    fn a_path_that_could_lead_elsewhere_refuses_the_whole_list() {
        let long = "a/".repeat(600) + "b";
        for bad in [
            "..",
            ".",
            "",
            "/",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a/..",
            "a//b",
            "a/",
            "./a",
            "a\\b",
            "..\\x",
            "a\nb",
            "a\u{7f}",
            "a\u{1b}[31m",
            "a\0b",
            long.as_str(),
            "b".repeat(256).as_str(),
        ] {
            let file = |path: &str| json!({"rfilename": path, "size": 1, "blobId": GIT});
            assert!(listing(json!([file("config.json"), file(bad)])).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_list_that_lacks_or_repeats_something_is_refused() {
        let good = json!({"rfilename": "a", "size": 1, "blobId": GIT});
        assert!(listing(json!([good])).is_ok());
        for (what, siblings) in [
            ("a path twice", json!([good, good])),
            ("no size", json!([{"rfilename": "a", "blobId": GIT}])),
            ("no digest", json!([{"rfilename": "a", "size": 1}])),
            (
                "a digest that is a path",
                json!([{"rfilename": "a", "size": 1, "blobId": "../../../../../../../../../../../../x/y/z"}]),
            ),
            ("a short sha256", json!([{"rfilename": "a", "size": 1, "lfs": {"sha256": GIT, "size": 1}}])),
            ("a negative size", json!([{"rfilename": "a", "size": -1, "blobId": GIT}])),
            ("a size beyond all disks", json!([{"rfilename": "a", "size": 1_u64 << 50, "blobId": GIT}])),
            ("one digest, two sizes", json!([good, {"rfilename": "b", "size": 2, "blobId": GIT}])),
            ("no list", json!("siblings")),
        ] {
            assert!(listing(siblings).is_err(), "{what}");
        }
        for sha in ["main", "", "0123", "../../../../../../../../../../../../../x"] {
            assert!(Listing::parse(json!({"sha": sha, "siblings": []}).to_string().as_bytes()).is_err(), "{sha}");
        }
    }
}
